# SPDX-License-Identifier: Apache-2.0
"""Prepared calls: what stays the same while shapes, strides, dtypes and the number of threads do."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np

from tvmdcn import threads as thread_pool
from tvmdcn.errors import SpecError
from tvmdcn.native import Frame, Function, Tensor

__all__ = ["PreparedCall", "WidenedCall"]


class PreparedCall:
    """A compiled function with all its arguments but the addresses.

    Parameters
    ----------
    function : Function
        What to call.
    plan : sequence of Tensor and int
        Its arguments; the last tensor is the output. Empty if there is nothing to compute (batch 0).
    threads : int
        Threads to use.

    Attributes
    ----------
    out_shape : tuple of int
        Shape of the output, N, C, H, W.
    copies : bool
        Whether input, offset or mask are not laid out as the kernel reads them.
    bias_dtype : str or None
        What the bias must be converted to.
    item_mask : int
        The bits of an address that must be zero for the items to be aligned.
    """

    __slots__ = (
        "_function",
        "_sizes",
        "_spare",
        "_threads",
        "bias_dtype",
        "copies",
        "item_mask",
        "out_shape",
        "plan",
    )

    def __init__(self, function: Function, plan: Sequence[Tensor | int], threads: int) -> None:
        self.plan = plan
        self.out_shape: tuple[int, ...] = ()
        self.copies = False
        self.bias_dtype: str | None = None
        self.item_mask = 0
        self._sizes = [argument.bytes for argument in plan if isinstance(argument, Tensor)]
        self._function = function
        self._threads = threads
        self._spare: list[Frame] = []  # frames that no thread is using

    def refuse_overlap(self, pointers: tuple[int, ...]) -> None:
        """Raise SpecError if the output, the last of the addresses, would be written into an input."""
        *sizes, size = self._sizes
        *sources, target = pointers
        for start, length in zip(sources, sizes, strict=True):
            if start < target + size and target < start + length:
                raise SpecError("out shares memory with an input: it would be overwritten while it is read.")

    def run(self, pointers: tuple[int, ...]) -> None:
        """Call the function on tensors at these addresses, in the order of its arguments."""
        try:
            frame = self._spare.pop()
        except IndexError:
            frame = Frame(self._function, self.plan)
        words = frame.words
        for at, pointer in zip(frame.pointers, pointers):  # noqa: B905 - equal by construction; 0.1 us
            words[at] = pointer
        thread_pool.use_threads(self._threads)
        frame.run()
        self._spare.append(frame)


class _Narrow:
    """A tensor of the caller's with fewer pixels than the kernel computes, as rows of bytes."""

    __slots__ = ("_memory", "index", "shape", "wide_shape")

    def __init__(self, index: int, narrow: Tensor, wide: Tensor, rows: int) -> None:
        self.index = index
        self._memory = ctypes.c_char * narrow.bytes
        self.shape = rows, narrow.bytes // rows
        self.wide_shape = rows, wide.bytes // rows

    def at(self, pointer: int) -> np.ndarray:
        """Return the memory at an address."""
        return np.frombuffer(memoryview(self._memory.from_address(pointer)), np.uint8).reshape(self.shape)


class WidenedCall(PreparedCall):
    """A call with fewer output pixels than the kernel's smallest unit: it works on copies with zeros behind.

    Parameters
    ----------
    function, plan, threads
        As of :class:`PreparedCall`, with the pixels there are.
    wide : sequence of Tensor and int
        The arguments with as many pixels as the kernel needs.
    """

    __slots__ = ("_narrow", "_spare_wide", "_wide")

    def __init__(
        self,
        function: Function,
        plan: Sequence[Tensor | int],
        threads: int,
        wide: Sequence[Tensor | int],
    ) -> None:
        super().__init__(function, plan, threads)
        self._wide = wide
        pairs = [(a, b) for a, b in zip(plan, wide, strict=True) if isinstance(a, Tensor)]
        # Pixels are the last axis, or come before channels: all axes before that of the pixels are rows.
        self._narrow: list[_Narrow] = []
        for index, (narrow, full) in enumerate(pairs):
            if isinstance(full, Tensor) and narrow.shape != full.shape:
                axis = next(i for i, size in enumerate(narrow.shape) if size != full.shape[i])
                rows = int(np.prod(narrow.shape[:axis]))
                self._narrow.append(_Narrow(index, narrow, full, rows))
        self._spare_wide: list[tuple[Frame, list[tuple[np.ndarray, int]]]] = []

    def run(self, pointers: tuple[int, ...]) -> None:
        """Copy, call, and copy the first pixels of the output back; about 5 us."""
        out = self._narrow[-1]
        try:
            frame, copies = self._spare_wide.pop()
        except IndexError:
            frame = Frame(self._function, self._wide)
            copies = []
            for narrow in self._narrow:
                wide = np.zeros(narrow.wide_shape, np.uint8)
                copies.append((wide[:, : narrow.shape[1]], wide.ctypes.data))
        words, places = frame.words, frame.pointers
        for at, pointer in zip(places, pointers):  # noqa: B905 - equal by construction
            words[at] = pointer
        for narrow, (copy, address) in zip(self._narrow, copies):  # noqa: B905
            words[places[narrow.index]] = address
            if narrow is not out:
                copy[...] = narrow.at(pointers[narrow.index])
        thread_pool.use_threads(self._threads)
        frame.run()
        out.at(pointers[-1])[...] = copies[-1][0]
        self._spare_wide.append((frame, copies))
