# SPDX-License-Identifier: Apache-2.0
"""One tuning record: the best schedule of a signature on a target, and where it comes from."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from tvmdcn.errors import BuildError, RecordsError
from tvmdcn.space import Decisions
from tvmdcn.spec import DeformConv2dSpec, Extents, spec_from_json
from tvmdcn.validation import check_int, shown

__all__ = ["Record"]

_DEPTH = 5  # of provenance: what we write has 2


def _digest(data: Mapping[str, Any]) -> str:
    """Return 16 hexadecimal digits that stand for a record as JSON, but for its field digest."""
    content = {name: value for name, value in data.items() if name != "digest"}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:16]


def _is_plain(value: Any, depth: int = _DEPTH) -> bool:
    """Return whether a value is JSON that can be written again: not too deep, all numbers finite."""
    if isinstance(value, dict):
        return depth > 0 and all(_is_plain(part, depth - 1) for part in value.values())
    if isinstance(value, list):
        return depth > 0 and all(_is_plain(part, depth - 1) for part in value)
    if isinstance(value, str):
        return value.isascii() or value == value.encode("utf-8", "replace").decode()
    return not isinstance(value, float) or math.isfinite(value)


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

    @property
    def signature(self) -> tuple[DeformConv2dSpec, Extents, int]:
        """What there is one record of: specification, sizes, number of threads."""
        return self.spec, self.extents, self.threads

    def digest(self) -> str:
        """Return 16 hexadecimal digits that stand for the record's content."""
        return _digest(self._content())

    def to_json(self) -> dict[str, Any]:
        """Return the record as a dict of JSON types."""
        return {**self._content(), "digest": self.digest()}

    def _content(self) -> dict[str, Any]:
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
                    raise RecordsError(f"a time is {shown(value)}, not a positive number.")
            threads = check_int("threads", data["threads"], 1)
            trials = check_int("trials", data["trials"], 1)
            decisions, provenance = Decisions.from_json(data["decisions"]), data["provenance"]
            if not isinstance(provenance, dict) or not _is_plain(provenance):
                raise RecordsError("its provenance is not a plain object.")
            spec.output_size(extents.height, extents.width)
            # Of what is written, not of what is read: a later version may give a specification more fields. Records
            # of the first version have none.
            if "digest" in data and data["digest"] != _digest(data):
                raise RecordsError(
                    f"the record of {spec.slug} is not what its digest {shown(data['digest'])} was made for: it was "
                    "damaged, or changed by hand."
                )
            return cls(spec, extents, threads, decisions, float(seconds), float(default), trials, provenance)
        except RecordsError as error:
            raise RecordsError(f"not a tuning record: {error}") from error
        except (KeyError, TypeError, ValueError, OverflowError, RecursionError, BuildError) as error:
            raise RecordsError(f"not a tuning record: {type(error).__name__}: {str(error)[:400]}") from error
