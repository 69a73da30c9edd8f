# SPDX-License-Identifier: Apache-2.0
"""Who is measured: peers and ours on small problems, and what users call.

No time is ever asserted: only what was measured how often, by whom, and what is said when it fails.
"""

from __future__ import annotations

import dataclasses
import json

import handmade
import numpy as np
import pytest
from bench_fakes import QUICK, SMALL

from tvmdcn.bench import overhead as bench_overhead
from tvmdcn.bench.comparison import organize
from tvmdcn.bench.inputs import Inputs
from tvmdcn.bench.overhead import TINY, measure_first_result, measure_overhead
from tvmdcn.bench.protocol import compare
from tvmdcn.bench.providers import PROVIDERS
from tvmdcn.bench.rows import parse_row
from tvmdcn.bench.sweep import vary
from tvmdcn.bench.worker import Layers
from tvmdcn.problems import TEST_PROBLEMS, Problem
from tvmdcn.spec import DeformConv2dGradSpec

_PEERS = [name for name, provider in PROVIDERS.items() if provider.role != "ours" and provider.source]


@pytest.mark.parametrize("name", _PEERS)
def test_peer_computes_the_reference(name):
    provider = PROVIDERS[name]
    for package in (provider.package, "onnx" if name == "onnxruntime" else None):
        if package:
            pytest.importorskip(package)
    problems = [
        TEST_PROBLEMS[problem]
        for problem in (
            "asymmetric_single",
            "uneven_padding",
            "asymmetric_nhwc",
            "asymmetric_v1",
            "straddling",
        )
    ]
    for found in compare(problems, [1], [provider], protocol=QUICK):
        if name == "torchvision" and found.problem == "uneven_padding":
            assert "no asymmetric padding" in found.reason
            continue
        assert (found.status, found.reason) == ("ok", None), found.problem
        assert provider.role == "floor" or found.max_rel_error < 1e-5
        changed = found.spec.layout == "NHWC" and provider.role == "peer"
        assert found.note == ("computed in NCHW; the change from NHWC is not timed" if changed else None)


_BACKWARD_PEERS = [name for name in PROVIDERS if PROVIDERS[name].role != "ours" and PROVIDERS[name].backward]


@pytest.mark.parametrize("name", _BACKWARD_PEERS)
def test_peer_computes_the_gradients_of_the_reference(name):
    provider = PROVIDERS[name]
    pytest.importorskip(provider.package)
    layers = [
        TEST_PROBLEMS[problem]
        for problem in (
            "asymmetric_single",
            "uneven_padding",
            "asymmetric_nhwc",
            "asymmetric_v1",
            "straddling",
            "row",
            "float64",
        )
    ]
    few = DeformConv2dGradSpec.of(SMALL.spec, grad_offset=False, grad_bias=False)
    problems = [*(layer.backward for layer in layers), Problem("few", few, SMALL.extents, "")]
    for found in compare(problems, [2], [provider], protocol=QUICK):
        if name == "torchvision" and found.problem == "uneven_padding":
            assert "no asymmetric padding" in found.reason
            continue
        assert (found.direction, found.status, found.reason) == ("backward", "ok", None), found.problem
        assert provider.role == "floor" or found.max_rel_error < 1e-5


@pytest.fixture
def kernels(cache_dir):
    """Kernels written by hand, in the cache under the keys of the default schedule; the tiny one's of the tuned too."""
    if handmade.COMPILER is None:
        pytest.skip("no C compiler")
    problems = [SMALL, TEST_PROBLEMS["asymmetric_nhwc"], TINY]
    build(problems)
    return problems


def build(problems):
    for problem in (*problems, *(problem.backward for problem in problems)):
        handmade.build(problem.spec, schedule="default")
        if problem.forward == TINY:
            handmade.build(problem.spec)


@pytest.mark.parametrize("source", ["prepare_ours", "prepare_ours_torch"])
def test_ours_computes_the_reference(kernels, source):
    if source == "prepare_ours_torch":
        pytest.importorskip("torch")
    provider = dataclasses.replace(PROVIDERS["ours-default"], source=f"tvmdcn.bench.providers:{source}")
    for found in compare(kernels, [2], [provider], protocol=QUICK):
        assert (found.status, found.reason, found.schedule) == ("ok", None, "default")
        assert found.max_rel_error < 1e-5
        assert (found.artifact is not None) == (source == "prepare_ours")


def test_one_kernel_serves_all_sizes(cache_dir):
    if handmade.COMPILER is None:
        pytest.skip("no C compiler")
    build([SMALL])
    varied = vary([SMALL, SMALL.backward], batches=[1, 3], image_sizes=[(5, 4), (9, 11)])
    rows = compare(varied, [1], [PROVIDERS["ours-default"]], protocol=QUICK, sweep=["batch", "image_size"])
    assert [found.status for found in rows] == ["ok"] * 8
    for section in organize(rows):
        (sweep,) = section.sweeps
        assert len(sweep.extents) == len(sweep.rows["ours-default"]) == 4
        (artifact,) = sweep.artifacts("ours-default")
        assert artifact.startswith(SMALL.spec.operator)


@pytest.mark.parametrize("source", ["prepare_ours", "prepare_ours_numpy", "prepare_ours_torch"])
def test_ours_computes_the_gradients_of_the_reference(kernels, source):
    if source == "prepare_ours_torch":
        pytest.importorskip("torch")
    backward = f"tvmdcn.bench.providers_backward:{source}"
    provider = dataclasses.replace(PROVIDERS["ours-default"], source=None, backward=backward)
    rows = compare([problem.backward for problem in kernels], [2], [provider], protocol=QUICK)
    assert [found.direction for found in rows] == ["backward"] * len(kernels)
    for found in rows:
        assert (found.status, found.reason, found.schedule) == ("ok", None, "default")
        assert found.max_rel_error < 1e-5


@pytest.fixture
def torch_threads():
    """Torch with the number of threads that it had, afterwards too."""
    torch = pytest.importorskip("torch")
    count = torch.get_num_threads()
    yield
    torch.set_num_threads(count)


_CALLS = {(p.measure, p.name): p for p in bench_overhead._providers("default")}


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("call", _CALLS, ids="-".join)
def test_what_users_call_computes_the_reference(cache_dir, monkeypatch, torch_threads, tmp_path, call, direction):
    if handmade.COMPILER is None:
        pytest.skip("no C compiler")
    handmade.install(monkeypatch)
    source = _CALLS[call].source_of(direction)
    if source is None:
        assert (call[0], direction) == ("overhead_module", "backward")
        return
    for problem in (SMALL, TEST_PROBLEMS["asymmetric_nhwc"]):
        problem = problem if direction == "forward" else problem.backward
        (tmp_path / problem.name).mkdir()
        folder, expected = Inputs(tmp_path / problem.name, 0, None).of(problem)
        output = tmp_path / "output.npz"
        request = {"spec": problem.spec.to_json(), "extents": vars(problem.extents), "tensors": str(folder)}
        answer = Layers(source, "default", 1).prepare({**request, "output": str(output)})
        assert answer["compared"] == (call[1] != "torch-function")
        if answer["compared"]:
            with np.load(output) as results:
                assert expected.error_of(results)[0] < 1e-5


def test_overhead_rows(kernels, monkeypatch):
    measured = [_CALLS[measure, "ours-default"] for measure in ("overhead_torch", "overhead_function")]
    monkeypatch.setattr(bench_overhead, "_providers", lambda schedule: measured)
    options = {"schedule": "default", "problem": SMALL, "processes": 1, "command": "a command"}
    rows = measure_overhead([1], **options, protocol=QUICK)
    assert [(found.direction, found.measure, found.problem) for found in rows] == [
        *((direction, p.measure, TINY.name) for direction in ("forward", "backward") for p in measured),
        ("forward", "first_result", SMALL.name),
    ]
    assert {found.command for found in rows} == {"a command"}
    assert {found.reason for found in rows} <= {None, "torch is not installed: pip install torch"}
    for found in rows:
        assert parse_row(json.loads(json.dumps(found.to_json()))) == found
        if found.status == "ok":
            assert all(1 <= len(turn) <= 16 for turn in found.samples_ms)
            assert sum(map(len, found.samples_ms)) <= found.runs
            assert len(found.affinity) == 1
            assert found.memory_bytes is None  # of a tiny layer it says nothing
    taken = []
    assert measure_overhead([1], **options, protocol=QUICK, known=rows, on_known=taken.append) == []
    assert taken == rows


def test_first_result_that_fails_has_a_reason(cache_dir, monkeypatch):
    monkeypatch.setenv("TVMDCN_BUILD", "never")
    (first,) = measure_first_result([1], schedule="default", problem=SMALL, processes=1)
    assert first.reason.startswith("tvmdcn.errors.ArtifactMissing: ")
