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
        Its arguments, the outputs behind the inputs. Empty if there is nothing to compute (batch 0).
    threads : int
        Threads to use.

    Attributes
    ----------
    out_shape : tuple of int
        Shape of the output, N, C, H, W, where there is one.
    out_shapes : sequence of (tuple of int, str)
        Shape, N, C, H, W, and layout of each output, where there are several.
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
        "out_shapes",
        "plan",
    )

    def __init__(self, function: Function, plan: Sequence[Tensor | int], threads: int) -> None:
        self.plan = plan
        self.out_shape: tuple[int, ...] = ()
        self.out_shapes: Sequence[tuple[tuple[int, ...], str]] = ()
        self.copies = False
        self.bias_dtype: str | None = None
        self.item_mask = 0
        self._sizes = [argument.bytes for argument in plan if isinstance(argument, Tensor)]
        self._function = function
        self._threads = threads
        self._spare: list[Frame] = []  # frames that no thread is using

    def refuse_overlap(self, pointers: tuple[int, ...]) -> None:
        """Raise SpecError if the only output, the last of the addresses, would be written into an input."""
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
        thread_pool.use_threads(self._threads, self._function.team)
        frame.run()
        self._spare.append(frame)


class _Narrow:
    """A tensor of the caller's with fewer pixels than the kernel computes, as rows of bytes."""

    __slots__ = ("_memory", "_shape", "_wide_shape", "fill", "index", "is_output")

    def __init__(self, index: int, narrow: Tensor, wide: Tensor, is_output: bool, fill: int) -> None:
        # Pixels are the last axis, or come before channels: all axes before that of the pixels are rows.
        axis = next(i for i, size in enumerate(narrow.shape) if size != wide.shape[i])
        rows = int(np.prod(narrow.shape[:axis]))
        self.index, self.is_output, self.fill = index, is_output, fill
        self._memory = ctypes.c_char * narrow.bytes
        self._shape = rows, narrow.bytes // rows
        self._wide_shape = rows, wide.bytes // rows

    def widened(self) -> tuple[np.ndarray, int]:
        """Return memory with as many pixels as the kernel needs: the first ones as rows, and the address."""
        wide = np.full(self._wide_shape, self.fill, np.uint8)
        return wide[:, : self._shape[1]], wide.ctypes.data

    def at(self, pointer: int) -> np.ndarray:
        """Return the memory at an address."""
        return np.frombuffer(memoryview(self._memory.from_address(pointer)), np.uint8).reshape(self._shape)


class WidenedCall(PreparedCall):
    """A call with fewer output pixels than the kernel's smallest unit: it works on copies with more behind.

    The pixels behind have offsets that are not numbers, so samples of 0, and zeros in all else: they add nothing
    to sums over pixels.

    Parameters
    ----------
    function, plan, threads
        As of :class:`PreparedCall`, with the pixels there are.
    wide : sequence of Tensor and int
        The arguments with as many pixels as the kernel needs.
    outputs : int
        How many of the tensors are outputs.
    inputs : sequence of str
        Names of the others.
    """

    __slots__ = ("_narrow", "_spare_wide", "_wide")

    def __init__(
        self,
        function: Function,
        plan: Sequence[Tensor | int],
        threads: int,
        wide: Sequence[Tensor | int],
        outputs: int,
        inputs: Sequence[str],
    ) -> None:
        super().__init__(function, plan, threads)
        self._wide = wide
        pairs = [(a, b) for a, b in zip(plan, wide, strict=True) if isinstance(a, Tensor)]
        names = [*inputs, *[""] * outputs]
        self._narrow = [
            # All bits set are a NaN in every dtype.
            _Narrow(index, narrow, full, index >= len(inputs), 0xFF if name == "offset" else 0)
            for index, ((narrow, full), name) in enumerate(zip(pairs, names, strict=True))
            if isinstance(full, Tensor) and narrow.shape != full.shape
        ]
        self._spare_wide: list[tuple[Frame, list[tuple[np.ndarray, int]]]] = []

    def run(self, pointers: tuple[int, ...]) -> None:
        """Copy, call, and copy the first pixels of the outputs back; about 5 us."""
        try:
            frame, copies = self._spare_wide.pop()
        except IndexError:
            frame = Frame(self._function, self._wide)
            copies = [narrow.widened() for narrow in self._narrow]
        words, places = frame.words, frame.pointers
        for at, pointer in zip(places, pointers):  # noqa: B905 - equal by construction
            words[at] = pointer
        for narrow, (copy, address) in zip(self._narrow, copies):  # noqa: B905
            words[places[narrow.index]] = address
            if not narrow.is_output:
                copy[...] = narrow.at(pointers[narrow.index])
        thread_pool.use_threads(self._threads, self._function.team)
        frame.run()
        for narrow, (copy, _) in zip(self._narrow, copies):  # noqa: B905
            if narrow.is_output:
                narrow.at(pointers[narrow.index])[...] = copy
        self._spare_wide.append((frame, copies))
