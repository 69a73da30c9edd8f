# SPDX-License-Identifier: Apache-2.0
"""Tuning records: the best schedules found on a target, with where they come from.

``<root>/<target tag>/meta.json`` holds one record per signature, sizes and number of threads: decisions,
times, provenance. Roots are that of TVMDCN_RECORDS, or the user's data directory, and the ``tuning_logs``
that ship with the package, in this order.

A record is decisions by name, not a trace: MetaSchedule's database of one layer takes 1.3 MB (the module is
repeated in it, with its transpositions written out), and a trace can only be replayed on the very module it
was made for.

Records are for finding schedules. A report measures again, it never quotes a record's time.
"""

from __future__ import annotations

import functools
import json
import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from tvmdcn.cache_key import record_roots
from tvmdcn.errors import BuildError, RecordsError
from tvmdcn.space import Decisions
from tvmdcn.spec import BORDERS, DeformConv2dGradSpec, DeformConv2dSpec, Extents, spec_from_json
from tvmdcn.validation import check_int

__all__ = ["META", "Found", "Record", "TuningRecords", "shipped_root", "user_root"]

_log = logging.getLogger(__name__)

META = "meta.json"
_SCHEMA = 1
_LIMIT = 16 << 20  # bytes
_LOCK_SECONDS = 60


def user_root() -> Path:
    """Return where tuning puts its records: TVMDCN_RECORDS, or the user's data directory."""
    return record_roots()[0]


def shipped_root() -> Path:
    """Return the directory of the records that ship with the package (``tuning_logs`` in a checkout)."""
    return record_roots()[1]


@dataclass(frozen=True)
class Record:
    """The best schedule of one signature on one target.

    Parameters
    ----------
    spec : DeformConv2dSpec or DeformConv2dGradSpec
    extents : Extents
        Representative sizes that it was tuned on; the kernel is free in them.
    threads : int
    decisions : Decisions
    seconds, default_seconds : float
        Median time of a call when it was measured, and of the default schedule in the same run.
    trials : int
        Schedules measured, the failed ones included.
    provenance : mapping
        Machine, compiler and package versions, commit, date.
    """

    spec: DeformConv2dSpec
    extents: Extents
    threads: int
    decisions: Decisions
    seconds: float
    default_seconds: float
    trials: int
    provenance: Mapping[str, Any]

    @property
    def pixels(self) -> int:
        """Output pixels of the sizes that it was tuned on, all images together."""
        height, width = self.spec.output_size(self.extents.height, self.extents.width)
        return self.extents.batch * height * width

    def to_json(self) -> dict[str, Any]:
        """Return the record as a dict of JSON types."""
        return {
            "spec": self.spec.to_json(),
            "extents": asdict(self.extents),
            "threads": self.threads,
            "decisions": self.decisions.to_json(),
            "seconds": self.seconds,
            "default_seconds": self.default_seconds,
            "trials": self.trials,
            "provenance": dict(self.provenance),
        }

    @classmethod
    def from_json(cls, data: Any) -> Record:
        """Return the record that :meth:`to_json` wrote.

        Raises
        ------
        RecordsError
            If a field is missing or has an impossible value.
        """
        try:
            spec, extents = spec_from_json(data["spec"]), Extents(**data["extents"])
            seconds, default = data["seconds"], data["default_seconds"]
            for value in (seconds, default):
                if type(value) not in (int, float) or not 0 < value < math.inf:
                    raise RecordsError(f"a time is {str(value)[:80]}, not a positive number.")
            threads = check_int("threads", data["threads"], 1)
            trials = check_int("trials", data["trials"], 1)
            decisions, provenance = Decisions.from_json(data["decisions"]), data["provenance"]
            if not isinstance(provenance, dict):
                raise RecordsError("its provenance is not an object.")
            return cls(spec, extents, threads, decisions, float(seconds), float(default), trials, provenance)
        except RecordsError as error:
            raise RecordsError(f"not a tuning record: {error}") from error
        except (KeyError, TypeError, ValueError, OverflowError, BuildError) as error:
            raise RecordsError(f"not a tuning record: {type(error).__name__}: {error}") from error


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
}


def _structure(spec: DeformConv2dSpec) -> DeformConv2dSpec:
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


def _distance(spec: DeformConv2dSpec, other: DeformConv2dSpec) -> tuple[float, int]:
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
        if not path.is_file():
            return cls(tag)
        stat = path.stat()
        return cls(tag, _read(path, tag, stat.st_mtime_ns, stat.st_size))

    def write(self, root: Path) -> Path:
        """Write ``<root>/<tag>/meta.json``, whole or not at all, and return its path."""
        path = Path(root) / self.tag / META
        path.parent.mkdir(parents=True, exist_ok=True)
        ordered = sorted(self.records, key=lambda r: (r.spec.slug, r.pixels, r.threads))
        data = {
            "schema": _SCHEMA,
            "generated": "by tvmdcn tune; do not edit",
            "target": self.tag,
            "records": [record.to_json() for record in ordered],
        }
        staged = path.with_suffix(".new")
        staged.write_text(json.dumps(data, indent=1, sort_keys=True) + "\n")
        staged.replace(path)
        return path

    @classmethod
    def keep(cls, root: Path, tag: str, record: Record) -> Path:
        """Add a record to those in a root, while others may do the same, and return the file's path.

        Raises
        ------
        RecordsError
            If the records there cannot be read, or another process does not give them free.
        """
        folder = Path(root) / tag
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(folder / ".meta.lock", timeout=_LOCK_SECONDS):
                known = cls.read(root, tag)
                known.add(record)
                return known.write(root)
        except Timeout as error:
            raise RecordsError(
                f"{folder / META} is locked by another process for more than {_LOCK_SECONDS} s. "
                "The trials are kept: run the same command again."
            ) from error

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
                *_distance(spec, record.spec),
                other_threads if threads is not None else -record.threads,
                -record.pixels,
            )

        same = [record for record in self.records if record.spec == spec]
        if same:
            chosen = min(same, key=rank)
            return Found(chosen.decisions, f"tuned: {chosen.trials} trials", True)
        alike = [record for record in self.records if _structure(record.spec) == _structure(spec)]
        if not alike:
            return None
        chosen = min(alike, key=rank)
        return Found(chosen.decisions, f"as tuned for {chosen.spec.slug}", False)


@functools.lru_cache(maxsize=32)
def _read(path: Path, tag: str, _mtime: int, size: int) -> tuple[Record, ...]:
    try:
        if size > _LIMIT:
            raise RecordsError(f"it is larger than {_LIMIT} bytes.")
        data = json.loads(path.read_text())
        if not isinstance(data, dict) or data.get("schema") != _SCHEMA:
            raise RecordsError(f"its schema is not {_SCHEMA}.")
        if data.get("target") != tag:
            raise RecordsError(f"it is of target {str(data.get('target'))[:80]!r}, not {tag!r}: refused.")
        if not isinstance(data.get("records"), list):
            raise RecordsError("it has no list of records.")
        return tuple(Record.from_json(row) for row in data["records"])
    except (OSError, ValueError, RecursionError, RecordsError) as error:
        raise RecordsError(f"{path} cannot be used: {error} Restore it, or delete it and tune again.") from error
