# SPDX-License-Identifier: Apache-2.0
"""Sampling at fractional places: the only code that knows the border rule.

A *sampling plan* says, for each (offset group, tap, pixel), which ``2**d`` image corners are read and with which
weights. It does not depend on the channel, so it is computed once and shared by all channels of an offset group.

Rule A (that of torchvision, mmcv, ONNX): a sample is 0 where its coordinate is ``<= -1`` or ``>= extent`` on any
axis; elsewhere it is the multilinear interpolation in which a corner outside the image is worth 0. NaN and infinite
coordinates fall under the first case, and nothing is ever read out of bounds.

Written for any number of spatial axes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from tvm import te, tirx

__all__ = ["Frame", "Plan", "derivatives", "interpolate", "on_border", "plan_blocks", "sampling_plan"]

Expr = Any
"""A TIR expression."""


def plan_blocks(ndim: int, prefix: str = "", framed: bool = False) -> list[str]:
    """Return the names of the plan's blocks, consumers before producers."""
    corners = ["".join(map(str, bits)) for bits in product((0, 1), repeat=ndim)]
    axes = range(ndim)
    sides = ("fraction",) if framed else ("low", "high", "fraction")
    names = (
        (["index"] if framed else [f"index_{c}" for c in corners])
        + [f"weight_{c}" for c in corners]
        + [f"{side}_{axis}" for axis in axes for side in sides]
        + [f"position_{axis}" for axis in axes]
    )
    return [prefix + name for name in names]


@dataclass(frozen=True)
class Frame:
    """How an image lies in memory with a frame of zeros, so that corners outside are read as what they are worth.

    Along each axis comes one place before the image, which is the one behind the row before, too. All corners of the
    sample at `nowhere` are in the frame.

    Attributes
    ----------
    extents : sequence of int or tirx.Var
        Size of the image on each spatial axis.
    """

    extents: Sequence[Expr]

    @property
    def strides(self) -> list[Expr]:
        """The pixels between two places of each axis."""
        strides: list[Expr] = [1]
        for extent in reversed(self.extents[1:]):
            strides.insert(0, strides[0] * (extent + 1))
        return strides

    @property
    def first(self) -> Expr:
        """The number of the image's first pixel."""
        return sum(self.strides, 1)

    @property
    def pixels(self) -> Expr:
        """The pixels in all."""
        # In this form TVM sees that they are some.
        return (self.extents[0] + 2) * self.strides[0] + sum(self.strides[1:], 1)

    @property
    def nowhere(self) -> list[float]:
        """A place whose corners are all zeros, such as (-1, -2): the first two pixels of the frame's first two rows."""
        return [-1.0] * (len(self.extents) - 1) + [-2.0]

    def step(self, corner: Sequence[int]) -> Expr:
        """Return the pixels from the first corner of a sample to another."""
        return sum(stride for stride, bit in zip(self.strides, corner, strict=True) if bit)


@dataclass(frozen=True)
class Plan:
    """The sampling plan as TE tensors over ``(offset group, tap, *pixel axes)``.

    Attributes
    ----------
    indices : tuple of te.Tensor, int32
        One per corner: where the corner's channels begin in the flat image; negative outside. In a frame, of the first
        corner alone.
    weights : tuple of te.Tensor
        One per corner: the interpolation weight times the modulation mask.
    fractions : tuple of te.Tensor
        One per spatial axis: how far a sample lies from its low corner to its high one. With `border_inside` it is -0.0
        where the sample lies at exactly -1, so that its sign tells; see `on_border`.
    dtype : str
        Type of the weights.
    frame : Frame or None
        The frame of zeros that the image lies in.
    pitch : int
        Elements between two pixels of the image.
    """

    indices: tuple[te.Tensor, ...]
    weights: tuple[te.Tensor, ...]
    fractions: tuple[te.Tensor, ...]
    dtype: str
    frame: Frame | None
    pitch: int

    def corners(self, at: Sequence[Expr]) -> list[Expr]:
        """Return where the channels of each corner of a sample begin, in int64 if the image has a frame."""
        if self.frame is None:
            return [index(*at) for index in self.indices]
        # In 64 bits, which addresses have, the compiler need not extend the sum for each corner anew.
        first = self.indices[0](*at).astype("int64")
        corners = product((0, 1), repeat=len(self.frame.extents))
        return [first + self.frame.step(corner) * self.pitch for corner in corners]


def sampling_plan(
    shape: Sequence[Expr],
    position: Callable[..., Expr],
    extents: Sequence[Expr],
    pitch: int,
    dtype: str,
    modulation: Callable[..., Expr] | None = None,
    framed: bool = False,
    border_inside: bool = False,
    prefix: str = "",
) -> Plan:
    """Describe which corners each sample reads, and with which weights.

    Parameters
    ----------
    shape : sequence of int or tirx.Var
        ``(offset groups, taps, *pixel axes)``.
    position : callable
        ``position(axis, *index)`` is the fractional coordinate of a sample on a spatial axis, in `dtype`.
    extents : sequence of int or tirx.Var
        Size of the image on each spatial axis.
    pitch : int
        Elements between two pixels of the image (its channels).
    dtype : {"float32", "float64"}
        Type of coordinates and weights.
    modulation : callable, optional
        ``modulation(*index)``, the mask of DCNv2 in `dtype`. Absent: ones (DCNv1).
    framed : bool
        Whether the image lies in a frame of zeros (`Frame`).
    border_inside : bool
        Whether a sample at exactly -1 has its high corner inside. Its value is 0 either way, which is for the caller to
        see to (`on_border`), but its derivative then is the one-sided one (torchvision) instead of 0 (mmcv).
    prefix : str
        What the names of the blocks begin with.

    Returns
    -------
    Plan
        Its blocks are named by `plan_blocks`.
    """
    axes = range(len(extents))
    # Index of a place outside on one axis. Negative also after the indices on the other axes are added to it, be they
    # inside (an image has fewer pixels than this) or outside as well (the sum is no less than the smallest integer).
    one, outside = tirx.const(1.0, dtype), tirx.const(-((1 << 31) // len(axes)), "int32")

    def stage(name: str, value: Callable[..., Expr]) -> te.Tensor:
        return te.compute(shape, value, name=prefix + name)

    frame = Frame(extents) if framed else None
    border = tirx.const(-1.0, dtype)

    def clamped(axis: int) -> Callable[..., Expr]:
        # A sample worth 0 is moved to where all corners are outside: to `extent` on the axis; in a frame, to the same
        # place for all. A NaN fails the comparison, and the conversion to an integer below sees nothing but [-2,
        # extent].
        elsewhere = as_float(extents[axis]) if frame is None else tirx.const(frame.nowhere[axis], dtype)

        def value(*i: Expr) -> Expr:
            places = [position(a, *i) for a in (axes if framed else [axis])]
            inside = []
            for p, extent in zip(places, extents if framed else [extents[axis]], strict=True):
                inside += [p >= border if border_inside else p > border, p < as_float(extent)]
            return tirx.Select(tirx.all(*inside), places[axis if framed else 0], elsewhere)

        return value

    def as_float(extent: Expr) -> Expr:
        return extent.astype(dtype) if hasattr(extent, "astype") else tirx.const(extent, dtype)

    positions = [stage(f"position_{axis}", clamped(axis)) for axis in axes]
    # Row-major: the index on an axis counts pixels of all faster axes.
    strides: list[Expr] = [1] * len(extents)
    for axis in reversed(axes[:-1]):
        strides[axis] = strides[axis + 1] * extents[axis + 1]

    def first_corner(frame: Frame) -> Callable[..., Expr]:
        def index(*i: Expr) -> Expr:
            flat = frame.first
            for axis, stride in zip(axes, frame.strides, strict=True):
                flat = flat + te.floor(positions[axis](*i)).astype("int32") * stride
            return flat * pitch

        return index

    def side(axis: int, bit: int) -> Callable[..., Expr]:
        def index(*i: Expr) -> Expr:
            at = te.floor(positions[axis](*i)).astype("int32") + bit
            return tirx.Select(tirx.all(at >= 0, at < extents[axis]), at * strides[axis], outside)

        return index

    sides = []
    if frame is None:
        names = ("low", "high")
        sides = [[stage(f"{names[bit]}_{axis}", side(axis, bit)) for bit in (0, 1)] for axis in axes]

    def fraction(axis: int) -> Callable[..., Expr]:
        def value(*i: Expr) -> Expr:
            place = positions[axis](*i)
            beyond = place - te.floor(place)
            if border_inside:
                beyond = tirx.Select(place == tirx.const(-1.0, dtype), tirx.const(-0.0, dtype), beyond)
            return beyond

        return value

    fractions = [stage(f"fraction_{axis}", fraction(axis)) for axis in axes]

    def corner_index(bits: tuple[int, ...]) -> Callable[..., Expr]:
        def index(*i: Expr) -> Expr:
            flat = sides[0][bits[0]](*i)
            for axis in axes[1:]:
                flat = flat + sides[axis][bits[axis]](*i)
            return tirx.Select(flat >= 0, flat, tirx.const(-1, "int32")) * pitch

        return index

    def corner_weight(bits: tuple[int, ...]) -> Callable[..., Expr]:
        def weight(*i: Expr) -> Expr:
            value = None if modulation is None else modulation(*i)
            for axis, bit in enumerate(bits):
                share = fractions[axis](*i) if bit else one - fractions[axis](*i)
                value = share if value is None else value * share
            return value

        return weight

    corners = [("".join(map(str, bits)), bits) for bits in product((0, 1), repeat=len(extents))]
    if frame is None:
        indices = [stage(f"index_{name}", corner_index(bits)) for name, bits in corners]
    else:
        indices = [stage("index", first_corner(frame))]
    weights = [stage(f"weight_{name}", corner_weight(bits)) for name, bits in corners]
    return Plan(tuple(indices), tuple(weights), tuple(fractions), dtype, frame, pitch)


def interpolate(plan: Plan, at: Sequence[Expr], read: Callable[[Expr], Expr]) -> Expr:
    """Return the value of one sample.

    Parameters
    ----------
    plan : Plan
    at : sequence of expressions
        Index into the plan.
    read : callable
        ``read(index)`` is the image's element there, in the plan's dtype.
    """
    total: Expr | None = None
    for i, weight in zip(plan.corners(at), plan.weights, strict=True):
        # A corner outside must be worth 0 whatever the image holds: 0 * inf would be NaN. So it is either read from a
        # frame of zeros, where one index does for all corners, or masked, for which no copy of the image is needed.
        outside = tirx.const(0.0, plan.dtype)
        value = tirx.Select(i >= 0, read(te.max(i, 0)), outside) if plan.frame is None else read(i)
        term = weight(*at) * value
        total = term if total is None else total + term
    return total


def on_border(fractions: Sequence[Expr], dtype: str, lanes: int = 1) -> Expr:
    """Return whether samples lie at exactly -1 on some axis, from a plan with `border_inside`.

    Such a sample is worth 0, but its corners inside have a share of 0, and 0 times an infinite element is NaN.

    Parameters
    ----------
    fractions : sequence of expressions
        Those of the plan, as they were loaded; vectors, to do several samples.
    dtype : str
        Their element type.
    lanes : int
    """
    integer = dtype.replace("float", "int") + (f"x{lanes}" if lanes > 1 else "")
    signs = [tirx.reinterpret(integer, fraction) for fraction in fractions]
    together = signs[0]
    for sign in signs[1:]:
        together = tirx.bitwise_or(together, sign)
    zero = tirx.const(0, dtype.replace("float", "int"))
    return together < (tirx.Broadcast(zero, lanes) if lanes > 1 else zero)


def derivatives(fractions: Sequence[Expr], sums: Sequence[Expr], one: Expr) -> list[Expr]:
    """Return the derivatives of a loss with respect to a sample's modulation, and to its place along each axis.

    A sample is ``modulation * sum over corners of share * image[corner]``, with shares that are products over the axes
    of ``fraction`` (high corner) or ``1 - fraction`` (low). What is left to do is the sum over channels, in `sums`.

    Parameters
    ----------
    fractions : sequence of expressions
        How far the sample lies from its low corner to its high one, on each axis. Vectors, to do several samples.
    sums : sequence of expressions
        For each corner, the sum over channels of the loss's derivative by the sample's channel times the image's
        element at the corner; 0 outside.
    one : expression
        1 in the type of the others.

    Returns
    -------
    list of expressions
        The derivative by the modulation, then those by the place on each axis *before* modulation (times the mask, they
        are the gradient of the offset).
    """
    axes = range(len(fractions))
    corners = list(product((0, 1), repeat=len(axes)))

    def total(skipped: int | None) -> Expr:
        result: Expr | None = None
        for bits, value in zip(corners, sums, strict=True):
            for axis in axes:
                if axis != skipped:
                    value = value * (fractions[axis] if bits[axis] else one - fractions[axis])
            if result is None:
                result = value if skipped is None or bits[skipped] else -value
            else:
                result = result + value if skipped is None or bits[skipped] else result - value
        return result

    return [total(None), *(total(axis) for axis in axes)]
