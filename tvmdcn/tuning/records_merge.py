# SPDX-License-Identifier: Apache-2.0
"""Records of several contributors brought together: what is taken, what is refused, which of two is kept.

Of two records of one signature, sizes and number of threads,

1. of one state of the code, whose default schedule is one: the one with the greater gain over it. Both were measured
   in turns, in one run; times of two runs say less, and those of two machines nothing.
2. of two states of the code, on the same machine (processor, their number, caches): the one with the smaller time.
3. otherwise the one of the code that is installed here, else the newer one.

A tie keeps what is there. Trials of two machines do not mix either, as the search would take differences of the
machines for differences of the schedules: the log goes with the record, and a log that makes way for another is
moved to ``trials/replaced``.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from tvmdcn.cache_key import installed_compiler, source_digest
from tvmdcn.errors import RecordsError, TvmdcnError
from tvmdcn.files import write_whole
from tvmdcn.spec import DeformConv2dSpec
from tvmdcn.target import resolve_target
from tvmdcn.tuning.contribution import Contribution, read_contribution
from tvmdcn.tuning.history import parse_log
from tvmdcn.tuning.record import Record
from tvmdcn.tuning.records import META, TuningRecords, read_each
from tvmdcn.validation import shown

__all__ = ["REPLACED", "Verdict", "better", "log_of", "machine_of", "merge", "refusal"]

REPLACED = "replaced"
"""Directory below ``trials`` of logs that made way for others; nothing reads it."""
_COMPILERS = ("apache-tvm", "apache-tvm-ffi")
_NEEDED = ("cpu", "date", "target", "versions", "source")


@dataclass(frozen=True)
class Verdict:
    """What became of one record, or of one file, of a contribution.

    Parameters
    ----------
    what : str
        The record or file, in words.
    action : str
        "added", "replaced" (another), "same" or "kept" (what was there), "refused".
    reason : str
    """

    what: str
    action: str
    reason: str


def machine_of(provenance: Mapping[str, Any]) -> str:
    """Return what tells the machine of a record, by its provenance, from others, as far as times go."""
    identity = {name: provenance.get(name) for name in ("cpu", "processors", "hypervisor", "target")}
    return json.dumps(identity, sort_keys=True)


def better(known: Record, new: Record) -> tuple[bool, str]:
    """Return whether a record should take the place of the one that is there, and why; see above for the rule."""
    sources = [record.provenance.get("source") for record in (known, new)]
    if sources[0] == sources[1]:
        gains = [record.default_seconds / record.seconds for record in (known, new)]
        return gains[1] > gains[0], f"{gains[1]:.2f}x as fast as the default, and {gains[0]:.2f}x there"
    if machine_of(known.provenance) == machine_of(new.provenance):
        times = f"{1e3 * new.seconds:.3f} ms, and {1e3 * known.seconds:.3f} ms there, on the same machine"
        return new.seconds < known.seconds, times
    here = source_digest()
    if here in sources:
        return sources[1] == here, "of two machines and two states of the code, the one of the code that is installed"
    dates = [str(record.provenance.get("date", "")) for record in (known, new)]
    return dates[1] > dates[0], f"of two machines and two states of the code: {dates[1]}, and {dates[0]} there"


def refusal(record: Record, tag: str) -> str:
    """Return why a record may not be taken into those of a target; empty if it may."""
    from tvmdcn.tuning.records_check import orphaned

    found = record.provenance
    missing = [name for name in _NEEDED if not found.get(name)]
    if missing:
        return f"it does not say where it comes from: {', '.join(missing)} missing"
    try:
        target = resolve_target(tag)
    except TvmdcnError as error:
        return f"{error}"
    machine = found["target"] if isinstance(found["target"], Mapping) else {}
    features = machine.get("features")
    if (machine.get("kind"), machine.get("arch")) != (target.kind, target.arch) or not (
        isinstance(features, list) and target.features <= {str(feature) for feature in features}
    ):
        return f"it was measured on {machine.get('mcpu', 'another machine')!s:.40}, which cannot run code for {tag}"
    versions = found["versions"] if isinstance(found["versions"], Mapping) else {}
    for name, here in zip(_COMPILERS, installed_compiler(), strict=True):
        if versions.get(name) != here:
            return (
                f"it was tuned with {name} {str(versions.get(name))[:40]}, and {here} is installed here: another "
                "compiler makes other code of the same decisions"
            )
    return orphaned(record, target)


def merge(source: Path, root: Path, tag: str | None = None, dry_run: bool = False) -> Iterator[Verdict]:
    """Take the records of a contribution, and their logs of trials, into a root.

    Parameters
    ----------
    source : Path
        A root of records (or the directory of one target), or a tar or zip archive of one.
    root : Path
        Where to.
    tag : str, optional
        Only this target.
    dry_run : bool
        Only say what would be done.

    Yields
    ------
    Verdict
        For each record, and for each file that cannot be read.

    Raises
    ------
    RecordsError
        If the source is none, the records in `root` cannot be read or written, or another process does not give
        them free.
    """
    for part in read_contribution(source):
        if tag is not None and part.tag != tag:
            yield Verdict(part.tag, "refused", f"another target than {tag}, which was asked for")
            continue
        try:
            rows = read_each(part.meta, part.tag)
        except RecordsError as error:
            yield Verdict(f"{part.tag}/{META}", "refused", str(error))
            continue
        yield from _refuse_logs(part)
        if dry_run:
            known = TuningRecords.read(root, part.tag)
            yield from (_judge(known, row, part.tag)[0] for row in rows)
            continue
        with TuningRecords.locked(root, part.tag) as known:
            verdicts = []
            for row in rows:
                verdict, record = _judge(known, row, part.tag)
                if record is not None:
                    verdict = _take(known, record, part, root, verdict)
                verdicts.append(verdict)
        yield from verdicts


def _refuse_logs(part: Contribution) -> list[Verdict]:
    """Take the logs out of a contribution that cannot be read, or are of another target, and say so."""
    verdicts = []
    for name, content in list(part.logs.items()):
        try:
            header, _ = parse_log(content)
            if header.get("target") != part.tag:
                raise RecordsError(f"it is of target {shown(header.get('target'))}.")
        except RecordsError as error:
            verdicts.append(Verdict(f"{part.tag}/trials/{name}", "refused", str(error)))
            del part.logs[name]
    return verdicts


def _judge(known: TuningRecords, row: Record | RecordsError, tag: str) -> tuple[Verdict, Record | None]:
    """Return the verdict on a record, and the record if it is to be taken."""
    if isinstance(row, RecordsError):
        return Verdict(tag, "refused", str(row)), None
    size = f"{row.extents.batch}x{row.extents.height}x{row.extents.width}"
    what = f"{tag} {row.spec.operator} {row.spec.slug} {size} t{row.threads}"
    reason = refusal(row, tag)
    if reason:
        return Verdict(what, "refused", reason), None
    there = next((record for record in known.records if record.signature == row.signature), None)
    if there is None:
        return Verdict(what, "added", f"{row.trials} trials, {row.default_seconds / row.seconds:.2f}x of default"), row
    if there == row:
        return Verdict(what, "same", "it is there already"), None
    take, why = better(there, row)
    return Verdict(what, "replaced" if take else "kept", why), row if take else None


def _take(known: TuningRecords, record: Record, part: Contribution, root: Path, verdict: Verdict) -> Verdict:
    """Put a record and its log in their places; the log first, so that a record is never without."""
    note = ""
    name = log_of(record, part.logs)
    if name is not None:
        note = _place_log(record, name, part.logs[name], root / part.tag / "trials")
    known.records[:] = [other for other in known.records if other.signature != record.signature] + [record]
    return Verdict(verdict.what, verdict.action, f"{verdict.reason}{note}")


def log_of(record: Record, logs: Mapping[str, bytes]) -> str | None:
    """Return which of some logs (names and contents) holds the trials of a record; None if none does.

    Raises
    ------
    RecordsError
        If a log cannot be read.
    """
    wanted = {
        "spec": record.spec.to_json(),
        "extents": asdict(record.extents),
        "threads": record.threads,
    }
    for name, content in logs.items():
        header, _ = parse_log(content)
        if {key: header.get(key) for key in wanted} == wanted:
            return name
    return None


def _place_log(record: Record, name: str, content: bytes, folder: Path) -> str:
    """Write a log into a directory of logs; return what is to be said of it."""
    place = folder / name
    mine, rows = parse_log(content)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if place.exists() and _signature(_header(place)) != _signature(mine):
            suffix = record.spec.operator.removeprefix(DeformConv2dSpec.operator)
            place = folder / f"{record.spec.slug}{suffix}-t{record.threads}.jsonl"  # another layer has the name
        with _log_lock(place):
            if place.exists():
                there = place.read_bytes()
                if there == content:
                    return ""
                if not content.startswith(there.rstrip(b"\n")):
                    _set_aside(place)
            write_whole(place, content.decode("utf-8"))
    except OSError as error:
        raise RecordsError(f"{place} cannot be written: {error.strerror or error}.") from error
    return f"; {len(rows)} trials in {place.name}"


def _header(log: Path) -> dict[str, Any]:
    """Return what a log says it is of; nothing if it cannot be read."""
    try:
        return parse_log(log.read_bytes())[0]
    except RecordsError:
        return {}


def _signature(header: Mapping[str, Any]) -> list[Any]:
    return [header.get(name) for name in ("spec", "extents", "threads")]


@contextlib.contextmanager
def _log_lock(log: Path) -> Iterator[None]:
    """Hold the lock of a log, which a tuning of the layer holds all the time."""
    lock = FileLock(log.parent / f".{log.stem}.lock", timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise RecordsError(f"{log} is being written by a tuning. Wait for it, and merge again.") from error
    try:
        yield
    finally:
        lock.release()


def _set_aside(log: Path) -> None:
    """Move a log to where nothing reads it, and nothing is lost."""
    aside = log.parent / REPLACED
    aside.mkdir(exist_ok=True)
    for number in range(1, 1 << 20):
        place = aside / f"{log.stem}-{number}{log.suffix}"
        if not place.exists():
            os.rename(log, place)
            return
