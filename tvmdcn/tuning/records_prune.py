# SPDX-License-Identifier: Apache-2.0
"""What may go of a root of records: what no look-up finds, and logs that no tuning goes on with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from tvmdcn.cache_key import source_digest
from tvmdcn.errors import RecordsError
from tvmdcn.tuning.history import read_log
from tvmdcn.tuning.record import Record
from tvmdcn.tuning.records import TuningRecords
from tvmdcn.tuning.records_merge import REPLACED

__all__ = ["TRIALS", "prune"]

TRIALS = ("none", "replaced", "outdated", "all")
"""Which logs of trials go: none; those that made way for others; also those of an earlier code; all."""


def prune(root: Path, tag: str, trials: str = "replaced", dry_run: bool = False) -> Iterator[str]:
    """Delete what is of no use in the records of a target.

    Of the records of one signature and number of threads the one on the largest sizes is looked up, so only that is
    kept; of two on the same sizes, the one that was added last.

    Parameters
    ----------
    root : Path
    tag : str
        The target.
    trials : str
        Which logs go: one of :data:`TRIALS`.
    dry_run : bool
        Only say what would go.

    Yields
    ------
    str
        What goes, in words.

    Raises
    ------
    RecordsError
        If the records cannot be read or written, or another process does not give them free.
    """
    if dry_run:
        kept = _kept(TuningRecords.read(root, tag).records)
        yield from _words(TuningRecords.read(root, tag).records, kept)
    else:
        with TuningRecords.locked(root, tag) as known:
            before = list(known.records)
            known.records[:] = _kept(before)
        yield from _words(before, known.records)
    folder = root / tag / "trials"
    if trials == "none":
        return
    for log in sorted((folder / REPLACED).glob("*.jsonl")):
        yield f"{tag}: {REPLACED}/{log.name}, a log that made way for another"
        if not dry_run:
            _delete(log)
    for log in sorted(folder.glob("*.jsonl")) if trials != "replaced" else ():
        reason = _why(log, trials)
        if reason:
            yield f"{tag}: {log.name}, {reason}"
            if not dry_run:
                _delete(log)


def _kept(records: list[Record]) -> list[Record]:
    best: dict[object, Record] = {}
    for record in records:
        known = best.get((record.spec, record.threads))
        if known is None or record.pixels >= known.pixels:
            best[record.spec, record.threads] = record
    return [record for record in records if best[record.spec, record.threads] is record]


def _words(before: list[Record], kept: list[Record]) -> Iterator[str]:
    left = {id(record) for record in kept}
    for record in before:
        if id(record) not in left:
            sizes = f"{record.extents.batch} x {record.extents.height} x {record.extents.width}"
            yield (
                f"record of {record.spec.operator} {record.spec.slug} t{record.threads} on {sizes}: the look-up takes "
                "the one on larger images"
            )


def _why(log: Path, trials: str) -> str:
    """Return why a log goes; empty if it stays."""
    if trials == "all":
        return "as asked"
    try:
        header, _ = read_log(log)
    except RecordsError:
        return ""  # whose it is cannot be told: `verify` names it
    return "" if header.get("source") == source_digest() else "trials of an earlier state of the code"


def _delete(log: Path) -> None:
    """Delete a log unless a tuning is writing it."""
    try:
        with FileLock(log.parent / f".{log.stem}.lock", timeout=0):
            log.unlink(missing_ok=True)
    except Timeout as error:
        raise RecordsError(f"{log} is being written by a tuning. Wait for it, and prune again.") from error
    except OSError as error:
        raise RecordsError(f"{log} cannot be deleted: {error.strerror or error}.") from error
    finally:
        (log.parent / f".{log.stem}.lock").unlink(missing_ok=True)
