# SPDX-License-Identifier: Apache-2.0
"""Who is measured on GPUs, without one: torch tensors on the CPU pass for tensors there. No time is asserted."""

from __future__ import annotations

import functools
import importlib

import handmade
import pytest
from compiled import error_of

import tvmdcn
from tvmdcn.bench import providers_cuda
from tvmdcn.bench.provider import BackwardTensors
from tvmdcn.bench.providers_cuda import GPU_PROVIDERS
from tvmdcn.problems import TEST_PROBLEMS
from tvmdcn.reference import expected_output
from tvmdcn.reference_grad import expected_gradients
from tvmdcn.spec import DeformConv2dGradSpec
from tvmdcn.tensors import make_gradient_tensors, make_layer_tensors

torch = pytest.importorskip("torch")

LAYERS = [TEST_PROBLEMS[name] for name in ("asymmetric_single", "asymmetric_nhwc", "asymmetric_v1")]


@pytest.fixture(autouse=True)
def without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    monkeypatch.setattr(providers_cuda, "_torch", lambda spec: torch)


def prepared(source, problem, **flags):
    """Return what a provider prepares for a layer, or its gradients if `flags` are given, and the expected outputs."""
    module, _, name = source.partition(":")
    provider = GPU_PROVIDERS[flags.pop("provider")]
    spec, extents = problem.spec, problem.extents
    if flags:
        spec = DeformConv2dGradSpec.of(spec, **flags)
        arrays = make_gradient_tensors(spec, extents)
        expected = expected_gradients(spec, arrays)
    else:
        arrays = make_layer_tensors(spec, extents)
        expected = expected_output(spec, arrays)
    tensors = BackwardTensors(**{**dict.fromkeys(("mask", "bias", "grad_output")), **arrays})
    prepare = getattr(importlib.import_module(module), name)
    return prepare(spec, extents, tensors, 1, provider.schedule), expected


@pytest.mark.parametrize("problem", [*LAYERS, TEST_PROBLEMS["uneven_padding"]], ids=lambda problem: problem.name)
@pytest.mark.parametrize("name", [name for name in GPU_PROVIDERS if not name.startswith("ours")])
def test_peers(name, problem):
    provider = GPU_PROVIDERS[name]
    pytest.importorskip(provider.package)
    if provider.role == "peer" and problem.name == "uneven_padding":
        with pytest.raises(providers_cuda.Unsupported, match="no asymmetric padding"):
            prepared(provider.source, problem, provider=name)
        return
    sources = [
        (provider.source, {}),
        (provider.backward, {"grad_bias": True}),
        (provider.backward, {"grad_bias": False}),
    ]
    for source, flags in sources:
        ready, expected = prepared(source, problem, provider=name, **flags)
        found = ready.call()
        if provider.role == "floor":
            if flags:
                assert [tensor is not None for tensor in found] == [True, True, flags["grad_bias"]]
                assert found[1].shape == problem.spec.weight_shape
            continue
        found = ready.output(found)
        found = found if flags else {"output": found}
        assert all(error_of(found[key], array) < 1e-5 for key, array in expected.items())
        assert set(found) == set(expected)


@pytest.mark.parametrize("problem", LAYERS, ids=lambda problem: problem.name)
def test_ours(problem, monkeypatch, cache_dir):
    """With kernels for the CPU, by the arguments that those for GPUs take."""
    if handmade.COMPILER is None:
        pytest.skip("no C compiler")
    load = tvmdcn.load

    def load_for_the_host(spec, target, schedule):
        assert target == "cuda"
        return load(spec, None, schedule)

    monkeypatch.setattr(tvmdcn, "load", load_for_the_host)
    provider = GPU_PROVIDERS["ours-cuda-default"]
    prepare = functools.partial(prepared, problem=problem, provider=provider.name)
    for source, flags in ((provider.source, {}), (provider.backward, {"grad_bias": True})):
        spec = DeformConv2dGradSpec.of(problem.spec) if flags else problem.spec
        artifact = handmade.build(spec, schedule="default")
        ready, expected = prepare(source, **flags)
        assert ready.artifact == artifact.path.name
        found = ready.output(ready.call())
        found = found if flags else {"output": found}
        assert set(found) == set(expected)
        assert all(error_of(found[key], array) < 1e-5 for key, array in expected.items())
