# SPDX-License-Identifier: Apache-2.0
"""Made-up tensors for a layer, with offsets that are spread as learned ones are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from tvmdcn.errors import SpecError
from tvmdcn.spec import DeformConv2dSpec, Extents

__all__ = ["Gradients", "Tensors", "make_gradient_tensors", "make_layer_tensors", "make_tensors", "numpy_dtype"]


@dataclass
class Tensors:
    """The NumPy arrays of one call: contiguous, in the order of the specification's layout, of its dtype."""

    input: np.ndarray
    offset: np.ndarray
    weight: np.ndarray
    mask: np.ndarray | None
    bias: np.ndarray | None


class Gradients(NamedTuple):
    """The gradients of one call, each None if it was not asked for; each as the tensor that it belongs to."""

    input: Any
    offset: Any
    weight: Any
    bias: Any
    mask: Any


def numpy_dtype(dtype: str) -> np.dtype:
    """Return the NumPy dtype of a specification's dtype name.

    Raises
    ------
    SpecError
        For bfloat16 where ml_dtypes is not installed: NumPy itself has none.
    """
    if dtype == "bfloat16":
        try:
            import ml_dtypes
        except ImportError as error:
            raise SpecError(
                "dtype bfloat16 exists in NumPy only with the package ml_dtypes: pip install ml_dtypes, or use torch."
            ) from error
        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(dtype)


def make_tensors(
    spec: DeformConv2dSpec,
    extents: Extents,
    seed: int = 0,
    offset_scale: float = 2.0,
    far: float = 0.02,
) -> Tensors:
    """Make tensors whose offsets are spread as learned ones are, with a few far outside the image.

    Parameters
    ----------
    spec, extents
        The layer and the sizes.
    seed : int
        Equal seeds give equal tensors.
    offset_scale : float
        Standard deviation of the offsets, in pixels.
    far : float
        Share of the offsets that are a hundred times as large.

    Returns
    -------
    Tensors
        Offset normal, mask the sigmoid of a normal, weight scaled by ``1 / sqrt(fan_in)``; with a bias.

    Raises
    ------
    SpecError
        If the image is too small for the layer, or bfloat16 is not to be had.
    """
    dtype = numpy_dtype(spec.dtype)
    drawn = np.float64 if spec.dtype == "float64" else np.float32
    rng = np.random.default_rng(seed)

    def normal(shape: Sequence[int]) -> np.ndarray:
        return rng.standard_normal(shape, dtype=drawn)

    offset = normal(spec.offset_shape(extents)) * drawn(offset_scale)
    offset[rng.random(offset.shape, dtype=np.float32) < far] *= 100
    fan_in = spec.in_channels // spec.groups * spec.taps
    return Tensors(
        input=normal(spec.input_shape(extents)).astype(dtype),
        offset=offset.astype(dtype),
        weight=(normal(spec.weight_shape) / drawn(fan_in**0.5)).astype(dtype),
        mask=(1 / (1 + np.exp(-normal(spec.mask_shape(extents))))).astype(dtype) if spec.mask else None,
        bias=normal((spec.out_channels,)).astype(dtype),
    )


def make_layer_tensors(spec: DeformConv2dSpec, extents: Extents, seed: int = 0) -> dict[str, np.ndarray]:
    """Return the arguments of a layer by name: :func:`make_tensors`'s, without what the layer has not."""
    return {name: array for name, array in vars(make_tensors(spec, extents, seed)).items() if array is not None}


def make_gradient_tensors(spec: DeformConv2dSpec, extents: Extents, seed: int = 0) -> dict[str, np.ndarray]:
    """Return the arguments of a layer's gradients by name; the gradient of the output is normal."""
    tensors = make_layer_tensors(spec, extents, seed)
    del tensors["bias"]
    drawn = np.random.default_rng([seed, 1]).standard_normal(spec.output_shape(extents), dtype=np.float32)
    return {"grad_output": drawn.astype(numpy_dtype(spec.dtype)), **tensors}
