# SPDX-License-Identifier: Apache-2.0
"""Random valid layers and tensors, as hypothesis strategies, for the reference and for kernels alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from hypothesis import strategies as st

from tvmdcn.problems import Tensors, make_tensors
from tvmdcn.spec import DeformConv2dSpec, Extents

# How the samples lie. "border" hits -1, 0, H - 1 and H exactly, from both sides and in between.
FINITE_OFFSETS = ("zero", "learned", "integer", "half", "border", "far", "huge")
NON_FINITE_OFFSETS = ("infinite", "nan")
IMAGES = ("normal", "ones")
NON_FINITE_IMAGES = ("infinite",)


@dataclass(frozen=True)
class Case:
    """A layer, sizes, and how to make its tensors; small to print, and enough to make them again."""

    spec: DeformConv2dSpec
    extents: Extents
    offsets: str
    image: str
    bias: bool
    seed: int

    @cached_property
    def tensors(self) -> Tensors:
        """The tensors; the same ones each time."""
        tensors = make_tensors(self.spec, self.extents, seed=self.seed, far=0.0)
        rng = np.random.default_rng(self.seed + 1)
        if not self.bias:
            tensors.bias = None
        tensors.offset = make_offsets(self.spec, self.extents, self.offsets, rng, tensors.offset)
        if self.image == "ones":
            tensors.input[...] = 1
        elif self.image == "infinite":
            chosen = rng.random(tensors.input.shape) < 0.1
            tensors.input[chosen] = rng.choice([np.inf, -np.inf], chosen.sum())
        return tensors


def sampled_from_axis(size: int) -> np.ndarray:
    """Return the places along an axis of `size` at which something happens."""
    near = np.float32(2**-12)
    return np.array(
        [
            *(-2, -1 - near, -1, -1 + near, -0.5, -near, 0, 0.5),
            *(size - 1, size - 1 + near, size - 0.5, size - near, size, size + near, size + 1),
        ],
        dtype=np.float32,
    )


def base_positions(spec: DeformConv2dSpec, extents: Extents) -> np.ndarray:
    """Return where samples lie at offset 0, in the offset's NCHW order: [og, taps, (y, x), Ho, Wo]."""
    height, width = spec.output_size(extents.height, extents.width)
    base = np.empty((spec.offset_groups, *spec.kernel_size, 2, height, width), np.float32)
    for i in range(spec.kernel_size[0]):
        base[:, i, :, 0] = np.arange(height)[:, None] * spec.stride[0] - spec.padding[0] + i * spec.dilation[0]
    for j in range(spec.kernel_size[1]):
        base[:, :, j, 1] = np.arange(width) * spec.stride[1] - spec.padding[1] + j * spec.dilation[1]
    return base.reshape(spec.offset_groups, spec.taps, 2, height, width)


def make_offsets(
    spec: DeformConv2dSpec, extents: Extents, kind: str, rng: np.random.Generator, learned: np.ndarray
) -> np.ndarray:
    """Return offsets of a kind, of the shape, order and dtype of `learned`, which is the kind "learned"."""
    shape, dtype = learned.shape, learned.dtype
    if kind == "zero":
        return np.zeros(shape, dtype)
    if kind == "learned":
        return learned
    if kind == "integer":
        return rng.integers(-3, 4, shape).astype(dtype)
    if kind == "half":
        return (rng.integers(-6, 7, shape) / 2).astype(dtype)
    if kind == "border":
        base = base_positions(spec, extents)
        wanted = np.empty((extents.batch, *base.shape), np.float32)
        for axis, size in enumerate((extents.height, extents.width)):
            wanted[:, :, :, axis] = rng.choice(sampled_from_axis(size), wanted[:, :, :, axis].shape)
        channels = spec.offset_groups * spec.taps * 2
        nchw = (wanted - base).reshape(extents.batch, channels, *base.shape[-2:])
        return np.ascontiguousarray(np.moveaxis(nchw, 1, -1) if spec.layout == "NHWC" else nchw).astype(dtype)
    values: dict[str, Sequence[float]] = {
        "far": (-1e3, -1e2, 1e2, 1e3),
        # the second half is beyond the range of 32-bit and of 64-bit integers
        "huge": (-6e4, 6e4) if dtype == np.float16 else (-3e9, 3e9, -1e30, 1e30),
        "infinite": (-np.inf, np.inf),
        "nan": (np.nan, -np.nan, np.inf),
    }
    strange = rng.random(shape) < 0.3
    return np.where(strange, rng.choice(values[kind], shape), learned.astype(np.float64)).astype(dtype)


@st.composite
def cases(
    draw: st.DrawFn,
    *,
    dtypes: Sequence[str] = ("float32",),
    layouts: Sequence[str] = ("NCHW",),
    offsets: Sequence[str] = FINITE_OFFSETS,
    images: Sequence[str] = IMAGES,
    min_batch: int = 0,
    max_channels: int = 8,
) -> Case:
    """Draw a valid case.

    `max_channels` bounds the channels of one block; with groups and offset groups there can be up to
    twelve times as many.
    """
    groups = draw(st.sampled_from((1, 1, 2, 3, 4)), label="groups")
    offset_groups = draw(st.sampled_from((1, 1, 2, 3)), label="offset_groups")
    in_channels = np.lcm(groups, offset_groups) * draw(st.integers(1, max_channels), label="channels")
    kernel = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)), label="kernel")
    dilation = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)), label="dilation")
    padding = draw(st.tuples(*[st.integers(0, 3)] * 4), label="padding")
    spec = DeformConv2dSpec(
        in_channels=int(in_channels),
        out_channels=groups * draw(st.integers(1, max_channels)),
        kernel_size=kernel,
        stride=draw(st.tuples(st.integers(1, 3), st.integers(1, 3)), label="stride"),
        padding=padding,
        dilation=dilation,
        groups=groups,
        offset_groups=offset_groups,
        mask=draw(st.booleans(), label="mask"),
        dtype=draw(st.sampled_from(dtypes)),
        layout=draw(st.sampled_from(layouts)),
    )
    smallest = [max(1, dilation[a] * (kernel[a] - 1) + 1 - padding[a] - padding[a + 2]) for a in (0, 1)]
    extents = Extents(
        draw(st.integers(min_batch, 3), label="batch"),
        smallest[0] + draw(st.integers(0, 9)),
        smallest[1] + draw(st.integers(0, 9)),
    )
    return Case(
        spec,
        extents,
        draw(st.sampled_from(offsets), label="offsets"),
        draw(st.sampled_from(images), label="image"),
        draw(st.booleans(), label="bias"),
        draw(st.integers(0, 2**31 - 1), label="seed"),
    )
