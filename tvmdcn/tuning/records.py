# SPDX-License-Identifier: Apache-2.0
"""Tuning records: the best schedules found on a target, with where they come from.

``<root>/<target tag>/meta.json`` holds one record per signature, sizes and number of threads: decisions,
times, provenance, and a digest of them, by which a change that tuning did not make is seen. Roots are that of
TVMDCN_RECORDS, or the user's data directory, and the ``tuning_logs`` that ship with the package, in this order.

A record is decisions by name, not a trace: MetaSchedule's database of one layer takes 1.3 MB (the module is
repeated in it, with its transpositions written out), and a trace can only be replayed on the very module it
was made for.

Records are for finding schedules. A report measures again, it never quotes a record's time.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from tvmdcn.cache_key import record_roots, user_records
from tvmdcn.errors import RecordsError
from tvmdcn.files import leftovers, write_whole
from tvmdcn.space import Decisions
from tvmdcn.spec import BORDERS, DeformConv2dGradSpec, DeformConv2dSpec
from tvmdcn.tuning.record import Record
from tvmdcn.validation import shown

__all__ = [
    "META",
    "Found",
    "Record",
    "TuningRecords",
    "distance",
    "read_each",
    "shipped_root",
    "structure",
    "user_root",
]

_log = logging.getLogger(__name__)

META = "meta.json"
_SCHEMA = 1
_LIMIT = 16 << 20  # bytes
_LOCK_SECONDS = 60


def user_root() -> Path:
    """Return where tuning puts its records: TVMDCN_RECORDS, or the user's data directory.

    Raises
    ------
    SettingError
        If TVMDCN_RECORDS names no directory, or is not set and the user has no home.
    """
    return user_records()


def shipped_root() -> Path:
    """Return the directory of the records that ship with the package (``tuning_logs`` in a checkout)."""
    return record_roots()[-1]


@dataclass(frozen=True)
class Found:
    """The outcome of a look-up.

    Parameters
    ----------
    decisions : Decisions
    description : str
        In words: of this layer, or of which other one.
    exact : bool
        Whether the record is of the very signature.
    """

    decisions: Decisions
    description: str
    exact: bool


_ALL_GRADIENTS: dict[str, Any] = {
    "grad_input": True,
    "grad_offset": True,
    "grad_weight": True,
    "grad_bias": True,
    "border": BORDERS[0],
    "deterministic": False,
}


def structure(spec: DeformConv2dSpec) -> DeformConv2dSpec:
    """Return what two signatures must share for the decisions of one to make sense for the other.

    Signatures of different operators never share it. Of the gradients, those of all may serve for some.
    """
    return replace(
        spec,
        in_channels=spec.groups * spec.offset_groups,
        out_channels=spec.groups,
        stride=(1, 1),
        padding=(0, 0, 0, 0),
        dilation=(1, 1),
        mask=True,
        **(_ALL_GRADIENTS if isinstance(spec, DeformConv2dGradSpec) else {}),
    )


def distance(spec: DeformConv2dSpec, other: DeformConv2dSpec) -> tuple[float, int]:
    """Return how far apart two signatures of one structure are: in channels, and in which gradients are asked for."""
    channels = abs(math.log(other.in_channels / spec.in_channels)) + abs(
        math.log(other.out_channels / spec.out_channels)
    )
    flags = () if not isinstance(spec, DeformConv2dGradSpec) else _ALL_GRADIENTS
    return channels, sum(getattr(spec, name) != getattr(other, name) for name in flags)


class TuningRecords:
    """The records of one target tag.

    Parameters
    ----------
    tag : str
        Such as "llvm-znver5".
    records : iterable of Record
        At most one per signature, sizes and number of threads.
    """

    def __init__(self, tag: str, records: Iterable[Record] = ()) -> None:
        self.tag = tag
        self.records = list(records)

    @classmethod
    def of(cls, tag: str) -> TuningRecords:
        """Return all records of a target tag, the user's before those that ship.

        What ships for a signature that the user has tuned is left out, whatever the sizes.

        Raises
        ------
        RecordsError
            If a file cannot be read.
        """
        found: list[Record] = []
        for root in record_roots():
            own = {record.spec for record in found}
            found += [record for record in cls.read(root, tag).records if record.spec not in own]
        return cls(tag, found)

    @classmethod
    def read(cls, root: Path, tag: str) -> TuningRecords:
        """Return the records in ``<root>/<tag>/meta.json``; none where there is no such file.

        Raises
        ------
        RecordsError
            If the file is damaged, or of another target or schema.
        """
        path = Path(root) / tag / META
        try:
            if not path.exists():
                return cls(tag)
            if not path.is_file():  # reading a pipe would wait for ever
                raise RecordsError("it is not a file.")
            with open(path, "rb") as file:
                content = file.read(_LIMIT + 1)
            # By content: a clock that jumps, or is coarse, would give two contents one time.
            return cls(tag, _parse(content, tag))
        except (OSError, RecordsError) as error:
            reason = f"{error.strerror or error}." if isinstance(error, OSError) else str(error)
            raise RecordsError(f"{path} cannot be used: {reason} Restore it, or delete it and tune again.") from error

    def write(self, root: Path) -> Path:
        """Write ``<root>/<tag>/meta.json``, whole or not at all, and return its path.

        Raises
        ------
        RecordsError
            If it cannot be written: what was there before is there still.
        """
        path = Path(root) / self.tag / META
        ordered = sorted(self.records, key=lambda r: (r.spec.slug, r.pixels, r.threads))
        data = {
            "schema": _SCHEMA,
            "generated": "by tvmdcn tune; do not edit",
            "target": self.tag,
            "records": [record.to_json() for record in ordered],
        }
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, json.dumps(data, indent=1, sort_keys=True) + "\n")
        except OSError as error:
            raise _unwritable(path, error) from error
        return path

    @classmethod
    @contextlib.contextmanager
    def locked(cls, root: Path, tag: str) -> Iterator[TuningRecords]:
        """Give the records in a root, to be changed while nobody else may; they are written at the end of the block.

        Raises
        ------
        RecordsError
            If the records there cannot be read or written, or another process does not give them free.
        """
        path = Path(root) / tag / META
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(path.parent / ".meta.lock", timeout=_LOCK_SECONDS)
            lock.acquire()
        except Timeout as error:
            raise RecordsError(
                f"{path} is locked by another process for more than {_LOCK_SECONDS} s. The trials are kept: run the "
                "same command again."
            ) from error
        except OSError as error:
            raise _unwritable(path, error) from error
        try:
            for leftover in leftovers(path):
                with contextlib.suppress(OSError):
                    leftover.unlink()
            known = cls.read(root, tag)
            before = list(known.records)
            yield known
            if known.records != before:
                known.write(root)
        finally:
            lock.release()

    @classmethod
    def keep(cls, root: Path, tag: str, record: Record) -> Path:
        """Add a record to those in a root, while others may do the same, and return the file's path.

        Raises
        ------
        RecordsError
            If the records there cannot be read, or another process does not give them free.
        """
        with cls.locked(root, tag) as known:
            known.add(record)
        return Path(root) / tag / META

    def add(self, record: Record) -> bool:
        """Keep a record if it is the first or fastest of its signature, sizes and threads; say whether so."""
        for i, known in enumerate(self.records):
            if (known.spec, known.extents, known.threads) == (record.spec, record.extents, record.threads):
                if record.seconds >= known.seconds and known.provenance == record.provenance:
                    return False
                # Times of two runs do not compare on a noisy machine: the newer search, which starts from the
                # older one's records, decides.
                self.records[i] = record
                return True
        self.records.append(record)
        return True

    def best(self, spec: DeformConv2dSpec, threads: int | None = None) -> Found | None:
        """Return the decisions for a signature: its own; else of the nearest that is built alike; else None.

        Distance is that of the logarithms of input and output channels per group, then the number of gradients
        that one asks for and the other not. Of the sizes that one signature was tuned on, the largest decides:
        there is the most time to win.
        """

        def rank(record: Record) -> tuple[float, int, float, int]:
            other_threads = 0.0 if threads is None else abs(math.log(record.threads / threads))
            return (
                *distance(spec, record.spec),
                other_threads if threads is not None else -record.threads,
                -record.pixels,
            )

        same = [record for record in self.records if record.spec == spec]
        if same:
            chosen = min(same, key=rank)
            return Found(chosen.decisions, f"tuned: {chosen.trials} trials", True)
        alike = [record for record in self.records if structure(record.spec) == structure(spec)]
        if not alike:
            return None
        chosen = min(alike, key=rank)
        return Found(chosen.decisions, f"as tuned for {chosen.spec.slug}", False)


def _unwritable(path: Path, error: OSError) -> RecordsError:
    return RecordsError(
        f"{path} cannot be written: {error.strerror or error}. The trials are kept: make room or name another "
        "directory (--output, TVMDCN_RECORDS), and run the same command again."
    )


@functools.lru_cache(maxsize=8)
def _parse(content: bytes, tag: str) -> tuple[Record, ...]:
    return tuple(Record.from_json(row) for row in _rows(content, tag))


def read_each(content: bytes, tag: str) -> list[Record | RecordsError]:
    """Return the records of a ``meta.json``, and in place of one that is damaged why it is none.

    Raises
    ------
    RecordsError
        If the file as a whole is none, or of another target or schema.
    """

    def read(row: Any) -> Record | RecordsError:
        try:
            return Record.from_json(row)
        except RecordsError as error:
            return error

    return [read(row) for row in _rows(content, tag)]


def _rows(content: bytes, tag: str) -> list[Any]:
    try:
        if len(content) > _LIMIT:
            raise RecordsError(f"it is larger than {_LIMIT} bytes.")
        data = json.loads(content)
        if not isinstance(data, dict) or type(data.get("schema")) is not int or data["schema"] != _SCHEMA:
            raise RecordsError(f"its schema is not {_SCHEMA}.")
        if data.get("target") != tag:
            raise RecordsError(f"it is of target {shown(data.get('target'))}, not {tag!r}: refused.")
        if not isinstance(data.get("records"), list):
            raise RecordsError("it has no list of records.")
        rows: list[Any] = data["records"]
        return rows
    except (ValueError, RecursionError) as error:
        raise RecordsError(f"{error}") from error
