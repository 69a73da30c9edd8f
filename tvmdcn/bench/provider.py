# SPDX-License-Identifier: Apache-2.0
"""What a provider is, what it prepares, and how it gets the tensors of a problem in an order that it knows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np

from tvmdcn.spec import DeformConv2dSpec
from tvmdcn.tensors import Tensors

__all__ = [
    "BackwardTensors",
    "Prepared",
    "Provider",
    "Unsupported",
    "copied_bytes",
    "from_nchw",
    "nchw_only",
    "to_nchw",
    "torch_tensor",
]


class Unsupported(Exception):  # noqa: N818 - an answer, not a failure of the benchmark
    """The provider cannot compute this problem; the message says why."""


@dataclass
class BackwardTensors(Tensors):
    """The arrays of one call and of its backward: `grad_output` as the others."""

    grad_output: np.ndarray


@dataclass(frozen=True)
class Prepared:
    """A layer, or its gradients, ready to be called.

    Parameters
    ----------
    call : callable
        Computes once; what it returns goes to `output`, and nowhere else.
    output : callable, optional
        Turns the result into a NumPy array in the order of the specification's layout; of gradients into a
        dict of them, by the names of the specification's outputs. None where there is no deformable convolution
        to compare: a plain one.
    copied_bytes : int
        What it holds of the inputs a second time, see :func:`copied_bytes`.
    artifact : str, optional
        The directory's name of our kernel's artifact.
    note : str, optional
        What a reader of the row should know.
    """

    call: Callable[[], Any]
    output: Callable[[Any], np.ndarray | Mapping[str, np.ndarray]] | None
    copied_bytes: int = 0
    artifact: str | None = None
    note: str | None = None


@dataclass(frozen=True)
class Provider:
    """A row of the table of providers.

    Parameters
    ----------
    name : str
        As in rows and reports.
    role : str
        ``ours``, ``peer`` or ``floor``, see :class:`~tvmdcn.bench.measurement.Measurement`.
    source : str, optional
        ``module:function`` or ``path/to/file.py:function`` for the forward; the function takes (spec, extents,
        tensors, threads, schedule) and returns :class:`Prepared`, or raises :class:`Unsupported`. None if it is
        not to be measured.
    package : str, optional
        The module without which it cannot run.
    schedule : str, optional
        Handed to the function.
    optional : bool
        Left out by default where `package` is missing; others then give a failed row, for a comparison that
        lacks a strong peer must show it.
    backward : str, optional
        As `source` for all gradients of a layer, the tensors being :class:`BackwardTensors`. None if it has none.
    measure : str
        What a call is, see :data:`tvmdcn.bench.measurement.MEASURES`.
    python : str, optional
        The interpreter of its process, for a package that has an environment of its own; NumPy must be in it.
    device : str
        What it computes on, one of :data:`tvmdcn.bench.device.DEVICES`.
    """

    name: str
    role: str
    source: str | None
    package: str | None = None
    schedule: str | None = None
    optional: bool = False
    backward: str | None = None
    measure: str = "call"
    python: str | None = None
    device: str = "cpu"

    @property
    def installed(self) -> bool:
        """Whether the package it needs can be imported; in another environment that shows when it is."""
        return self.python is not None or self.package is None or find_spec(self.package) is not None

    def source_of(self, direction: str) -> str | None:
        """Return the function for the forward or the backward; None if it has none."""
        return {"forward": self.source, "backward": self.backward}[direction]


def to_nchw(array: np.ndarray | None, spec: DeformConv2dSpec) -> Any:
    """Return a tensor of the problem as a contiguous NCHW array (None stays None)."""
    if array is None or spec.layout == "NCHW":
        return array
    return np.ascontiguousarray(array.transpose(0, 3, 1, 2))


def copied_bytes(tensors: Tensors, held: Iterable[Any]) -> int:
    """Return the bytes of those arrays and torch tensors that hold an input a second time, in another order.

    What a library needs them in is no fault of its own where the layout of the problem is ours.
    """
    given = {array.ctypes.data for array in vars(tensors).values() if array is not None}
    return sum(
        array.nbytes
        for array in held
        if array is not None and (array.data_ptr() if hasattr(array, "data_ptr") else array.ctypes.data) not in given
    )


def nchw_only(spec: DeformConv2dSpec) -> str | None:
    """Return the note of a provider that knows NCHW only."""
    return None if spec.layout == "NCHW" else f"computed in NCHW; the change from {spec.layout} is not timed"


def from_nchw(array: np.ndarray, spec: DeformConv2dSpec) -> np.ndarray:
    """Return an NCHW array in the order of the layout."""
    return array if spec.layout == "NCHW" else array.transpose(0, 2, 3, 1)


def torch_tensor(array: np.ndarray, spec: DeformConv2dSpec) -> Any:
    """Return a torch tensor that shares the array's memory; bfloat16 goes through its bits."""
    import torch

    if spec.dtype == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
