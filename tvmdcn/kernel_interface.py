# SPDX-License-Identifier: Apache-2.0
"""How a compiled kernel is called, as its artifact's manifest says it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from tvmdcn.errors import ArtifactError

__all__ = ["KernelInterface"]

# Of sums; words of 32 bits are operands of tensor cores.
_PACKED_DTYPES = ("float32", "float64", "uint32")


@dataclass(frozen=True)
class KernelInterface:
    """What a caller must know of a compiled kernel.

    Parameters
    ----------
    granule, max_tile_units : int
        Output pixels come in units of `granule`; a tile has at most `max_tile_units` of them.
    packed_shape, packed_dtype
        The packed weight.
    layout : str
        NCHW or NHWC.
    entry, pack : str
        Names of the two functions.
    alignment : int
        Bytes that data pointers must be a multiple of.
    splits : int
        Parts into which a kernel for GPUs divides its sums. Where there is more than one, it has an argument for them,
        ``parts``, before the output. Manifests leave out a 1.
    planes : bool
        Whether a kernel for GPUs reads an NCHW input as it is. Otherwise it has an argument for a channels-last copy.
        Manifests leave out what is not so.
    """

    granule: int
    max_tile_units: int
    packed_shape: tuple[int, ...]
    packed_dtype: str
    layout: str
    entry: str = "deform_conv2d"
    pack: str = "pack_weight"
    alignment: int = 4
    splits: int = 1
    planes: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return the interface as a dict of JSON types."""
        # What versions before these fields can call, they can read.
        unusual = {"splits": self.splits > 1, "planes": self.planes}
        return {name: value for name, value in asdict(self).items() if unusual.get(name, True)}

    @classmethod
    def from_json(cls, data: Any) -> KernelInterface:
        """Return the interface that a manifest holds.

        Raises
        ------
        ArtifactError
            If a field is missing, unknown, or has a value that it cannot have.
        """
        if not isinstance(data, dict) or {*data, "splits", "planes"} != {field.name for field in fields(cls)}:
            raise ArtifactError("the field kernel has other keys than this version writes.")
        shape = data["packed_shape"]
        positive = [data["granule"], data["max_tile_units"], data["alignment"], data.get("splits", 1)]
        positive += shape if isinstance(shape, list) else [None]
        if not all(type(value) is int and 0 < value < 1 << 31 for value in positive):
            raise ArtifactError("the field kernel holds a size that is not a positive integer.")
        if type(data.get("planes", False)) is not bool:
            raise ArtifactError("the field kernel holds something other than true or false.")
        if data["packed_dtype"] not in _PACKED_DTYPES or data["layout"] not in ("NCHW", "NHWC"):
            raise ArtifactError("the field kernel holds an unknown dtype or layout.")
        if not all(isinstance(data[name], str) and data[name].isidentifier() for name in ("entry", "pack")):
            raise ArtifactError("the field kernel holds a function name that is none.")
        return cls(**{**data, "packed_shape": tuple(shape)})
