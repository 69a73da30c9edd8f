# SPDX-License-Identifier: Apache-2.0
"""One measured layer: the rows that benchmarks write and reports read.

Rows are validated when written and when read (:mod:`tvmdcn.bench.rows`), so that a report never rests on half a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from tvmdcn.bench.row import Row, check, check_number
from tvmdcn.bench.schema import MeasurementError, upgrade, validate
from tvmdcn.errors import TvmdcnError
from tvmdcn.spec import DeformConv2dGradSpec, DeformConv2dSpec, Extents, spec_from_json

__all__ = [
    "CACHES",
    "DIRECTIONS",
    "MEASURES",
    "ROLES",
    "SWEEPS",
    "Measurement",
    "MeasurementError",
    "direction_of",
]

DIRECTIONS = ("forward", "backward")
# What was timed: one call of a prepared layer; one call of a tiny layer, nearly all of which is overhead, of the
# kernel with arrays of NumPy or of torch, and of what users call, which is the kernel and more; import to first
# result in a new process, with the artifact built before.
MEASURES = (
    "call",
    "overhead_numpy",
    "overhead_torch",
    "overhead_function",
    "overhead_operator",
    "overhead_module",
    "overhead_autograd",
    "first_result",
)
ROLES = ("ours", "peer", "floor")
CACHES = ("warm", "cold")
SWEEPS = ("batch", "image_size")
_TENSORS = ("made", "real")


def direction_of(spec: DeformConv2dSpec) -> str:
    """Return which of :data:`DIRECTIONS` a specification computes: the layer's output, or its gradients."""
    return "backward" if isinstance(spec, DeformConv2dGradSpec) else "forward"


@dataclass(frozen=True, kw_only=True)
class Measurement(Row):
    """What one provider needed for one problem at one number of threads; further fields are :class:`Row`'s.

    Parameters
    ----------
    problem : str
        Name of the layer; `spec` and `extents` say what it is.
    spec : DeformConv2dSpec or DeformConv2dGradSpec
        What was computed; its kind is the row's direction.
    extents : Extents
        The sizes.
    role : str
        ``ours``; ``peer`` computes the same; ``floor`` is a plain convolution of the same shape.
    schedule : str, optional
        Which schedule of ours: ``naive``, ``default`` or ``tuned``.
    max_rel_error : float, optional
        Largest absolute difference from the float64 reference over the largest absolute value of the
        reference, of gradients the worst of these; None where there is nothing to compare with, as for a plain
        convolution.
    measure : str
        One of :data:`MEASURES`.
    cache : str
        ``warm``: calls follow each other; ``cold``: the caches are filled with something else before each.
    sweep : tuple of str
        Which of :data:`SWEEPS` the row's sizes were varied along; empty for a size of its own.
    artifact : str, optional
        The directory's name of our kernel's artifact: equal for sizes that one kernel served.
    tensors : str, optional
        ``made`` up, or those of a ``real`` layer.
    memory_bytes, memory_prepare_bytes : int, optional
        Peak memory beyond inputs and outputs during a call and while it was prepared, see
        :mod:`tvmdcn.bench.device`; None where it is not known.
    memory_resolution_bytes : int, optional
        By how much these can be off.
    protocol : dict, optional
        How it was measured: rounds, burst_seconds, min_calls, warmup_seconds, and of cold caches evicted_bytes.
    """

    kind: ClassVar[str] = "layer"

    problem: str
    spec: DeformConv2dSpec
    extents: Extents
    role: str
    schedule: str | None = None
    max_rel_error: float | None = None
    measure: str = "call"
    cache: str = "warm"
    sweep: tuple[str, ...] = ()
    artifact: str | None = None
    tensors: str | None = None
    memory_bytes: int | None = None
    memory_prepare_bytes: int | None = None
    memory_resolution_bytes: int | None = None
    protocol: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        """Check the fields, each and together."""
        check("problem", self.problem, isinstance(self.problem, str), "a text")
        check("problem", self.problem, bool(self.problem), "a text that is not empty")
        for name, allowed in (("role", ROLES), ("measure", MEASURES), ("cache", CACHES)):
            check(name, getattr(self, name), getattr(self, name) in allowed, f"one of {', '.join(allowed)}")
        for name in ("schedule", "artifact"):
            value = getattr(self, name)
            check(name, value, value is None or isinstance(value, str), "a text or null")
        check("tensors", self.tensors, self.tensors in (None, *_TENSORS), f"one of {', '.join(_TENSORS)}, or null")
        check("sweep", self.sweep, set(self.sweep) <= set(SWEEPS), f"some of {', '.join(SWEEPS)}")
        check("protocol", self.protocol, self.protocol is None or isinstance(self.protocol, dict), "an object or null")
        check_number("max_rel_error", self.max_rel_error)
        for name in ("memory_bytes", "memory_prepare_bytes", "memory_resolution_bytes"):
            value = getattr(self, name)
            check(name, value, value is None or (type(value) is int and value >= 0), "an int of at least 0, or null")
        super().__post_init__()

    @property
    def direction(self) -> str:
        """Whether the layer's output was computed or its gradients; one of :data:`DIRECTIONS`."""
        return direction_of(self.spec)

    @property
    def layer(self) -> DeformConv2dSpec:
        """The layer, of its gradients too."""
        return self.spec.layer if isinstance(self.spec, DeformConv2dGradSpec) else self.spec

    @property
    def title(self) -> str:
        """The name of the layer, with the direction if it is backward."""
        return self.problem if self.direction == DIRECTIONS[0] else f"{self.problem} {self.direction}"

    @property
    def operations(self) -> int:
        """Operations of one call, two per multiply-add, sampling not counted.

        All gradients take twice the layer's: one product for those of input, offset and mask, one for the weight's.
        """
        return self.spec.flops(self.extents)

    @property
    def pixels(self) -> int:
        """Pixels of the output, of all images of the batch."""
        height, width = self.spec.output_size(self.extents.height, self.extents.width)
        return self.extents.batch * height * width

    def to_json(self) -> dict[str, Any]:
        """Return the row as a dict of JSON types."""
        layer = {"spec": self.spec.to_json(), "extents": asdict(self.extents), "direction": self.direction}
        return {**super().to_json(), **layer}

    @classmethod
    def from_json(cls, data: Any) -> Measurement:
        """Return the row that :meth:`to_json` wrote, of this version or an earlier one.

        Raises
        ------
        MeasurementError
            If the schema is another, a key is missing or unknown, or a value is not what was written.
        MissingExtra
            If the package that validates rows is not installed.
        """
        data = upgrade(data)
        check("kind", data["kind"], data["kind"] == cls.kind, repr(cls.kind))
        validate(data)
        return cls.from_valid(data)

    @classmethod
    def from_valid(cls, data: Mapping[str, Any]) -> Measurement:
        """Return the row of data that the schema has been checked of; raises MeasurementError."""
        values = cls._fields_of(data)
        try:
            values["spec"] = spec_from_json(values["spec"])
            values["extents"] = Extents(**values["extents"])
            values["spec"].output_size(values["extents"].height, values["extents"].width)
        except (TvmdcnError, TypeError) as error:
            raise MeasurementError(f"the row describes no layer: {error}") from error
        row = cls(**{**values, "sweep": tuple(values["sweep"])})
        expected = f"{row.direction}, as the operator in spec says"
        check("direction", data["direction"], data["direction"] == row.direction, expected)
        return row
