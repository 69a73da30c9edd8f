# SPDX-License-Identifier: Apache-2.0
"""What scripts/soak.py calls: random layers on random images, in the ways in which users call; every result checked."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import tvmdcn
import tvmdcn.torch
from tvmdcn.errors import SpecError
from tvmdcn.reference import reference
from tvmdcn.reference_grad import reference_grad
from tvmdcn.spec import DeformConv2dGradSpec, DeformConv2dSpec, Extents
from tvmdcn.tensors import Tensors, make_tensors, numpy_dtype

# Largest error over the largest value that a sum's terms can have; for the halves the output's rounding.
TOLERANCES = {"float64": 1e-13, "float32": 1e-5, "float16": 2e-3, "bfloat16": 1.6e-2}
# Whose product the terms of a gradient are.
FACTORS = {
    "input": ("grad_output", "weight", "mask"),
    "offset": ("grad_output", "weight", "mask", "input"),
    "mask": ("grad_output", "weight", "input"),
    "weight": ("grad_output", "mask", "input"),
    "bias": ("grad_output",),
}


class WrongResult(Exception):  # noqa: N818 - what the run is there to find
    """A result that is not the reference's."""


# --- what is called -----------------------------------------------------------------------------------------


def draw_layer(rng: random.Random) -> DeformConv2dSpec:
    """Draw a layer of few channels: any kernel, stride, padding, dilation, groups, dtype and layout."""
    groups, offset_groups = rng.choice((1, 1, 1, 2, 3, 4)), rng.choice((1, 1, 1, 2, 4))
    unit = int(np.lcm(groups, offset_groups))
    kernel = rng.choice(((3, 3), (3, 3), (1, 1), (3, 2), (1, 4), (5, 5), (2, 2)))
    in_channels = unit * rng.choice([n for n in (1, 2, 3, 4, 5, 8, 16) if n * unit <= 32])
    return DeformConv2dSpec(
        in_channels,
        groups * rng.choice((1, 2, 3, 5, 8, 16, 17)),
        kernel,
        stride=(rng.choice((1, 1, 2)), rng.choice((1, 1, 2, 3))),
        padding=(rng.randrange(3), rng.randrange(3), rng.randrange(3), rng.randrange(3)),
        dilation=(rng.choice((1, 1, 2)), rng.choice((1, 1, 2))),
        groups=groups,
        offset_groups=offset_groups,
        mask=rng.random() < 0.6,
        dtype=rng.choice(("float32", "float32", "float32", "float64", "float16", "bfloat16")),
        layout=rng.choice(("NCHW", "NCHW", "NHWC")) if in_channels > 1 else "NCHW",
    )


def draw_layers(count: int, seed: int) -> list[DeformConv2dSpec]:
    """Draw different layers."""
    rng, found = random.Random(seed), dict[DeformConv2dSpec, None]()
    while len(found) < count:
        found[draw_layer(rng)] = None
    return list(found)


def gradient_of(layer: DeformConv2dSpec) -> DeformConv2dGradSpec:
    """Return the gradients that a call of a backward asks for."""
    return DeformConv2dGradSpec.of(layer)


@dataclass
class Case:
    """The arguments of a call, drawn."""

    spec: DeformConv2dSpec
    extents: Extents
    tensors: Tensors

    @classmethod
    def draw(cls, spec: DeformConv2dSpec, rng: random.Random) -> Case:
        """Draw sizes and values; some offsets lead far away, or nowhere."""
        needed = [
            spec.dilation[a] * (spec.kernel_size[a] - 1) + 1 - spec.padding[a] - spec.padding[a + 2] for a in (0, 1)
        ]
        # At least 2, for an image of one pixel, or of one channel, is contiguous in both layouts.
        height, width = (max(2, least) + rng.randrange(12) for least in needed)
        extents = Extents(rng.choice((1, 1, 2, 3)), height, width)
        seed = rng.randrange(1 << 30)
        tensors = make_tensors(spec, extents, seed, far=rng.choice((0.0, 0.02, 0.3)))
        if rng.random() < 0.3:
            strange = np.random.default_rng(seed).random(tensors.offset.shape) < 0.05
            tensors.offset[strange] = rng.choice((np.nan, np.inf, -np.inf, -1e4, 1e4))
        if rng.random() < 0.5:
            tensors.bias = None
        return cls(spec, extents, tensors)

    @property
    def geometry(self) -> dict[str, Any]:
        """The arguments that are no tensors."""
        return {"stride": self.spec.stride, "padding": self.spec.padding, "dilation": self.spec.dilation}

    def torch(self, *names: str) -> list[Any]:
        """Return tensors, those of an NHWC layer in channels_last."""
        found = []
        for name in names:
            array = getattr(self.tensors, name)
            tensor = None if array is None else torch_of(array)
            if tensor is not None and self.spec.layout == "NHWC" and name in ("input", "offset", "mask"):
                tensor = tensor.permute(0, 3, 1, 2)
            found.append(tensor)
        return found

    def check(self, found: np.ndarray) -> None:
        """Compare an output with the reference."""
        t = self.tensors
        scale = largest(t.input) * largest(t.weight) + 1
        compare(self.spec, "output", found, reference(self.spec, t), scale)

    def check_gradients(self, grad_output: np.ndarray, found: dict[str, Any]) -> None:
        """Compare gradients, by the names of what they are the gradients of, with the reference."""
        arguments = {**vars(self.tensors), "grad_output": grad_output}
        sizes = {name: largest(array) for name, array in arguments.items() if array is not None}
        expected = reference_grad(gradient_of(self.spec), self.tensors, grad_output)
        for name, array in found.items():
            scale = float(np.prod([sizes.get(factor, 1.0) for factor in FACTORS[name]]))
            compare(self.spec, f"gradient of {name}", array, getattr(expected, name), scale)


def largest(array: np.ndarray) -> float:
    """Return the largest finite size of a value."""
    wide = np.abs(array.astype(np.float64))
    return float(wide[np.isfinite(wide)].max(initial=0))


def compare(spec: DeformConv2dSpec, name: str, found: np.ndarray, expected: np.ndarray, scale: float) -> None:
    """Raise WrongResult unless two arrays are the same but for rounding."""
    if found.shape != expected.shape:
        raise WrongResult(f"{spec.slug}: {name} is of the shape {found.shape}, not {expected.shape}.")
    error = np.abs(found.astype(np.float64) - expected).max(initial=0)
    limit = TOLERANCES[spec.dtype] * max(scale, largest(expected))
    if not error <= limit:
        raise WrongResult(f"{spec.slug}: {name} is wrong by {error:.3g}, more than {limit:.3g}.")


def torch_of(array: np.ndarray) -> torch.Tensor:
    """Return a tensor over an array's memory."""
    if array.dtype == numpy_dtype("bfloat16"):
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def numpy_of(tensor: torch.Tensor, spec: DeformConv2dSpec) -> np.ndarray:
    """Return an image's values in the order of the layout, in float64."""
    if spec.layout == "NHWC":
        tensor = tensor.permute(0, 2, 3, 1)
    array: np.ndarray = tensor.detach().double().numpy()
    return array


# --- who calls ----------------------------------------------------------------------------------------------


def call_numpy(case: Case, rng: random.Random) -> None:
    """Call as NumPy: the function, or a kernel for arrays in NHWC, for which the function has none."""
    t = case.tensors
    if case.spec.layout == "NCHW":
        found = tvmdcn.deform_conv2d(t.input, t.offset, t.weight, t.bias, mask=t.mask, **case.geometry)
    else:
        found = tvmdcn.load(case.spec)(t.input, t.offset, t.weight, t.bias, t.mask)
    case.check(found)


def call_packed(case: Case, rng: random.Random) -> None:
    """Call a kernel with a packed weight, a number of threads and memory for the result."""
    t = case.tensors
    kernel = tvmdcn.load(case.spec, threads=rng.choice((None, 1, 2)))
    out = np.empty(case.spec.output_shape(case.extents), t.input.dtype)
    weight = kernel.pack(t.weight)
    for _ in range(2):
        kernel(t.input, t.offset, weight, t.bias, t.mask, out)
    case.check(out)


def call_torch(case: Case, rng: random.Random) -> None:
    """Call as torch: the function, or the dispatcher's operator."""
    input, offset, weight, bias, mask = case.torch("input", "offset", "weight", "bias", "mask")
    if rng.random() < 0.5:
        found = tvmdcn.deform_conv2d(input, offset, weight, bias, mask=mask, **case.geometry)
    else:
        found = torch.ops.tvmdcn.deform_conv2d(input, offset, weight, bias, *case.geometry.values(), mask)
    case.check(numpy_of(found, case.spec))


def call_gradients(case: Case, rng: random.Random) -> None:
    """Call with gradients: torch's autograd, or the function for NumPy."""
    names = ("input", "offset", "weight", "bias", "mask")
    drawn = np.random.default_rng(rng.randrange(1 << 30)).standard_normal(case.spec.output_shape(case.extents))
    grad_output = drawn.astype(numpy_dtype(case.spec.dtype))
    t = case.tensors
    if case.spec.layout == "NCHW" and rng.random() < 0.3:
        arrays = tvmdcn.deform_conv2d_backward(grad_output, t.input, t.offset, t.weight, t.mask, **case.geometry)
        found = {name: array for name, array in arrays._asdict().items() if array is not None}
    else:
        if t.bias is None:
            t.bias = np.zeros(case.spec.out_channels, t.input.dtype)
        leaves = {name: leaf for name, leaf in zip(names, case.torch(*names), strict=True) if leaf is not None}
        for leaf in leaves.values():
            leaf.requires_grad_()
        output = tvmdcn.deform_conv2d(**leaves, **case.geometry)
        upper = torch_of(grad_output)
        output.backward(upper.permute(0, 3, 1, 2) if case.spec.layout == "NHWC" else upper)
        case.check(numpy_of(output, case.spec))
        found = {
            name: numpy_of(leaf.grad, case.spec) if leaf.dim() == 4 and name != "weight" else leaf.grad.double().numpy()
            for name, leaf in leaves.items()
        }
    case.check_gradients(grad_output, found)


def call_wrongly(case: Case, rng: random.Random) -> None:
    """Call with arguments that are refused."""
    t = case.tensors
    kernel = tvmdcn.load(case.spec)
    for wrong in (t.offset[:, 1:], t.input[0]):
        try:
            kernel(t.input, wrong, t.weight, t.bias, t.mask)
        except SpecError:
            continue
        raise WrongResult(f"{case.spec.slug}: an offset of the shape {wrong.shape} was taken.")


# Callers, and how often each is chosen.
CALLERS: dict[str, tuple[Callable[[Case, random.Random], None], int]] = {
    "numpy": (call_numpy, 6),
    "packed": (call_packed, 5),
    "torch": (call_torch, 6),
    "gradients": (call_gradients, 4),
    "wrong": (call_wrongly, 1),
}
