# SPDX-License-Identifier: Apache-2.0
"""Random layers on random images, against ONNX Runtime and against the reference; and their gradients.

Layers are drawn once, from a fixed seed, because each takes a second to compile; sizes, offsets and values
are drawn anew for each.
"""

from __future__ import annotations

import dataclasses
import os
import random
from collections.abc import Sequence

import numpy as np
import pytest
from compiled import build_only, dirty, error_of, gradient_arguments, gradients_of, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx_oracle import run_onnxruntime
from strategies import FINITE_OFFSETS, IMAGES, NON_FINITE_IMAGES, NON_FINITE_OFFSETS, Case

import tvmdcn
from tvmdcn.grad_kernel import GradKernel
from tvmdcn.kernel import Kernel
from tvmdcn.problems import Tensors
from tvmdcn.reference import reference
from tvmdcn.reference_grad import expected_gradients
from tvmdcn.spec import BORDERS, DeformConv2dGradSpec, DeformConv2dSpec, Extents

# Largest error over the largest value a sum's terms could add up to; for the halves the output's rounding.
TOLERANCES = {"float64": 1e-13, "float32": 1e-5, "float16": 2e-3, "bfloat16": 1.6e-2}
LAYERS, OTHER_LAYERS, GRADIENTS = 26, 8, 8
EXAMPLES = 20
assert LAYERS * EXAMPLES >= 500


def draw_layer(rng: random.Random, dtype: str) -> DeformConv2dSpec:
    """Draw a layer; with groups, offset groups and channels that need not fit one another's vectors."""
    groups, offset_groups = rng.choice((1, 1, 1, 2, 3, 4)), rng.choice((1, 1, 1, 2, 3, 8))
    unit = int(np.lcm(groups, offset_groups))
    in_channels = unit * rng.choice([n for n in (1, 2, 3, 4, 5, 8, 16, 19, 32) if n == 1 or n * unit <= 64])
    out_channels = groups * rng.choice((1, 2, 3, 5, 8, 16, 17, 24, 32))
    if rng.random() < 0.12:
        groups, out_channels = in_channels, in_channels * rng.choice((1, 1, 2))
    return DeformConv2dSpec(
        in_channels,
        out_channels,
        kernel_size=rng.choice(((3, 3), (3, 3), (1, 1), (3, 2), (1, 4), (5, 5), (2, 2))),
        stride=(rng.choice((1, 1, 2, 3)), rng.choice((1, 1, 2, 3))),
        padding=tuple(rng.randrange(4) for _ in range(4)),
        dilation=(rng.choice((1, 1, 2, 3)), rng.choice((1, 1, 2))),
        groups=groups,
        offset_groups=offset_groups,
        mask=rng.random() < 0.6,
        dtype=dtype,
        layout=rng.choice(("NCHW", "NHWC")),
    )


def draw_layers() -> tuple[list[DeformConv2dSpec], list[DeformConv2dSpec]]:
    """Return layers in float32, which ONNX Runtime computes, and others."""
    rng = random.Random(20261122)
    others = [("float64", "float16", "bfloat16")[index % 3] for index in range(OTHER_LAYERS)]
    return [draw_layer(rng, "float32") for _ in range(LAYERS)], [draw_layer(rng, dtype) for dtype in others]


def draw_gradients(count: int = GRADIENTS, seed: int = 20261123) -> list[DeformConv2dGradSpec]:
    """Return gradients of layers in all dtypes: all of a layer's, or some."""
    rng = random.Random(seed)
    found = []
    for index in range(count):
        drawn = draw_layer(rng, ("float32", "float64", "bfloat16", "float32", "float16")[index % 5])
        asked = rng.choice(([True] * 4, [True] * 4, [True, True, False, True], [rng.random() < 0.5 for _ in range(4)]))
        flags = dict(zip(("grad_input", "grad_offset", "grad_weight", "grad_bias"), asked, strict=True))
        flags["grad_input"] |= not any(asked)
        found.append(DeformConv2dGradSpec.of(drawn, **flags, border=rng.choice(BORDERS)))
    return found


FLOAT32, OTHERS = draw_layers()
ALL = [*FLOAT32, *OTHERS]
BACKWARD = draw_gradients()


@pytest.fixture(scope="module")
def builds(request, compilers, session_cache_dir):
    """Kernels of the layers of the tests that were selected, being built."""
    calls = (getattr(item, "callspec", None) for item in request.session.items)
    chosen = dict.fromkeys(c.params["layer"] for c in calls if c is not None and "layer" in c.params)
    return {spec: compilers.submit(build_only, spec, "tuned", session_cache_dir) for spec in chosen}


def cases(spec: DeformConv2dSpec, offsets: Sequence[str], images: Sequence[str]) -> st.SearchStrategy[Case]:
    """Return a strategy for what a layer can be called with, from one output pixel to some units of them."""
    needed = [spec.dilation[a] * (spec.kernel_size[a] - 1) + 1 for a in (0, 1)]
    smallest = [max(1, needed[a] - spec.padding[a] - spec.padding[a + 2]) for a in (0, 1)]
    extents = st.builds(
        Extents,
        st.integers(1, 3),
        st.integers(smallest[0], smallest[0] + 12),
        st.integers(smallest[1], smallest[1] + 16),
    )
    return st.builds(
        Case,
        st.just(spec),
        extents,
        st.sampled_from(offsets),
        st.sampled_from(images),
        st.booleans(),
        st.integers(0, 2**31 - 1),
    )


def planar(case: Case) -> Case:
    """Return the case in NCHW, its tensors transposed."""
    if case.spec.layout == "NCHW":
        return case

    def first(array: np.ndarray | None) -> np.ndarray | None:
        return None if array is None else np.ascontiguousarray(np.moveaxis(array, -1, 1))

    old = case.tensors
    new = dataclasses.replace(case, spec=dataclasses.replace(case.spec, layout="NCHW"))
    # The property of the frozen case would make tensors of its own.
    vars(new)["tensors"] = Tensors(first(old.input), first(old.offset), old.weight, first(old.mask), old.bias)
    return new


def scale_of(case: Case) -> float:
    """Return the size that a sum's terms have: a float32 sum is exact only relative to these."""
    x, weight = case.tensors.input.astype(np.float64), case.tensors.weight.astype(np.float64)
    return float(np.abs(x[np.isfinite(x)]).max(initial=0) * np.abs(weight).max() + 1)


def check(case: Case, found: np.ndarray, expected: np.ndarray) -> None:
    finite = np.isfinite(expected)
    own = max(np.abs(expected[finite]).max(initial=0), 1e-30)
    assert error_of(found, expected) * own <= TOLERANCES[case.spec.dtype] * max(scale_of(case), own)


def call_forward(kernel: Kernel, case: Case) -> np.ndarray:
    return run(kernel, case.tensors)


def fuzz(
    spec: DeformConv2dSpec, offsets: Sequence[str], images: Sequence[str], examples: int, compare, call=call_forward
) -> None:
    """Call `compare` with that many cases and what the kernel makes of them; with the same ones again if CI is set."""
    kernel = tvmdcn.load(spec)
    dirty(kernel)
    seen = 0

    @settings(
        max_examples=examples,
        derandomize=bool(os.environ.get("CI")),
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=cases(spec, offsets, images))
    def body(case: Case) -> None:
        nonlocal seen
        seen += 1
        compare(case, call(kernel, case))

    body()
    assert seen >= examples


@pytest.mark.parametrize("layer", FLOAT32, ids=lambda spec: spec.slug)
def test_onnxruntime_and_the_reference_agree(builds, layer):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    builds[layer].result()

    def compare(case: Case, found: np.ndarray) -> None:
        check(case, found, reference(case.spec, case.tensors))
        oracle = run_onnxruntime(planar(case)).astype(np.float64)
        check(case, found, oracle if case.spec.layout == "NCHW" else np.moveaxis(oracle, 1, -1))

    # ONNX Runtime documents nothing for NaN, and multiplies what it reads outside by 0.
    fuzz(layer, (*FINITE_OFFSETS, "infinite"), IMAGES, EXAMPLES, compare)


@pytest.mark.parametrize("layer", ALL, ids=lambda spec: spec.slug)
def test_strange_values_are_as_in_the_reference(builds, layer):
    builds[layer].result()

    def compare(case: Case, found: np.ndarray) -> None:
        check(case, found, reference(case.spec, case.tensors))

    offsets = (*FINITE_OFFSETS, *NON_FINITE_OFFSETS)
    fuzz(layer, offsets, (*IMAGES, *NON_FINITE_IMAGES, *NON_FINITE_IMAGES), 10, compare)


# Which arguments the terms are products of, whose sum a gradient is.
FACTORS = {
    "grad_input": ("grad_output", "weight", "mask"),
    "grad_offset": ("grad_output", "weight", "mask", "input"),
    "grad_mask": ("grad_output", "weight", "input"),
    "grad_weight": ("grad_output", "mask", "input"),
    "grad_bias": ("grad_output",),
}


def check_gradients(case: Case, found: dict[str, np.ndarray]) -> None:
    arguments = gradient_arguments(case)
    largest = {name: np.abs(a[np.isfinite(a)].astype(np.float64)).max(initial=0) for name, a in arguments.items()}
    expected = expected_gradients(case.spec, arguments)
    assert found.keys() == expected.keys()
    for name, wanted in expected.items():
        own = max(np.abs(wanted[np.isfinite(wanted)]).max(initial=0), 1e-30)
        scale = float(np.prod([largest.get(factor, 1) for factor in FACTORS[name]]))
        assert error_of(found[name], wanted) * own <= TOLERANCES[case.spec.dtype] * max(scale, own), name


@pytest.mark.parametrize("layer", BACKWARD, ids=lambda spec: spec.slug)
def test_gradients_are_those_of_the_reference(builds, layer):
    builds[layer].result()

    def call(kernel: GradKernel, case: Case) -> dict[str, np.ndarray]:
        return gradients_of(kernel, gradient_arguments(case))

    offsets = (*FINITE_OFFSETS, *NON_FINITE_OFFSETS)
    images = (*IMAGES, *NON_FINITE_IMAGES)
    fuzz(layer, offsets, images, EXAMPLES, check_gradients, call)


def test_layers_are_of_all_kinds():
    """The seed is fixed; should it change, it must not lose a kind."""
    crossing = [s for s in ALL if s.groups > 1 and s.offset_groups > 1 and s.groups != s.offset_groups]
    assert crossing
    assert any(s.groups == s.in_channels == s.out_channels > 1 for s in ALL)
    assert any(s.groups == 1 and s.offset_groups > 1 for s in ALL)
    assert {s.layout for s in FLOAT32} == {"NCHW", "NHWC"}
    assert {s.mask for s in FLOAT32} == {True, False}
    assert {s.kernel_size for s in FLOAT32} >= {(1, 1), (3, 3), (5, 5), (3, 2)}
    assert any(s.out_channels // s.groups % 8 for s in FLOAT32)
    assert len(set(ALL)) == LAYERS + OTHER_LAYERS
    assert len(set(BACKWARD)) == GRADIENTS
    assert {s.layout for s in BACKWARD} == {"NCHW", "NHWC"}
    assert {s.dtype for s in BACKWARD} == set(TOLERANCES)
    assert {s.border for s in BACKWARD if s.grad_offset} == set(BORDERS)
    assert any(s.groups > 1 for s in BACKWARD)
    assert any(s.offset_groups > 1 for s in BACKWARD)
