# SPDX-License-Identifier: Apache-2.0
"""The benchmark: its protocol with cheap providers.

No time is ever asserted: only what was measured how often, by whom, and what is said when it fails.
"""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from bench_fakes import FAKES, QUICK, SMALL, fake

from tvmdcn.bench import command as bench
from tvmdcn.bench.comparison import organize
from tvmdcn.bench.inputs import Expected, Inputs, relative_error
from tvmdcn.bench.measurement import Measurement
from tvmdcn.bench.process import Worker, WorkerError
from tvmdcn.bench.protocol import compare
from tvmdcn.bench.provider import BackwardTensors, Provider
from tvmdcn.bench.providers import default_providers
from tvmdcn.bench.sweep import vary
from tvmdcn.bench.turns import Protocol, Turns, turn_order
from tvmdcn.bench.words import describe_layer
from tvmdcn.bench.worker import load_tensors, save_tensors
from tvmdcn.problems import PROBLEMS, REAL_LAYERS, TEST_PROBLEMS, Problem, make_tensors
from tvmdcn.spec import DeformConv2dGradSpec
from tvmdcn.tensors import make_gradient_tensors

# --- arithmetic --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("output", "expected", "error"),
    [
        ([1.0, 4.5], [1.0, 4.0], 0.125),
        ([], [], 0.0),
        ([0.0], [0.0], 0.0),
        ([1.0], [0.0], math.inf),
        ([math.nan, 1.0], [1.0, 1.0], math.inf),
        ([math.nan, 1.0], [math.nan, 1.0], 0.0),
        ([math.inf, 3.0], [math.inf, 2.0], 0.5),
        ([-math.inf], [math.inf], math.inf),
        ([1.0], [1.0, 1.0], math.inf),
    ],
)
def test_relative_error(output, expected, error):
    assert relative_error(np.array(output), np.array(expected)) == error


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_turns_are_rotated_and_reversed(count):
    items = list(range(count))
    orders = [turn_order(items, index) for index in range(2 * count)]
    assert all(sorted(order) == items for order in orders)
    for first, second in zip(orders[::2], orders[1::2], strict=True):
        assert second == first[::-1]
    assert sorted(order[0] for order in orders[::2]) == items  # each is first once
    assert turn_order([], 3) == []


def test_worst_gradient_counts_in_units_of_its_own():
    exact = {"grad_input": np.array([100.0, -50.0]), "grad_bias": np.array([0.5, 0.25])}
    expected = Expected(exact)
    assert expected.error_of(exact) == (0, "grad_input")
    assert expected.error_of({**exact, "grad_input": exact["grad_input"] + 1}) == (0.01, "grad_input")
    assert expected.error_of({**exact, "grad_bias": exact["grad_bias"] + 0.125}) == (0.25, "grad_bias")
    assert expected.error_of({"grad_input": exact["grad_input"]}) == (math.inf, "grad_bias")
    assert expected.error_of({**exact, "grad_bias": np.zeros((2, 1))}) == (math.inf, "grad_bias")


def test_offset_gradient_is_not_compared_where_it_jumps():
    exact = np.array([1.0, 2.0, 4.0])
    expected = Expected({"grad_offset": exact, "grad_input": exact}, np.array([False, True, False]))
    other_side = np.array([1.0, -2.0, 4.0])
    assert expected.error_of({"grad_offset": other_side, "grad_input": exact})[0] == 0
    assert expected.error_of({"grad_offset": exact + np.eye(3)[2], "grad_input": exact}) == (0.25, "grad_offset")
    assert expected.error_of({"grad_offset": exact, "grad_input": other_side}) == (1.0, "grad_input")


def test_jumps_are_at_whole_offsets_and_few(tmp_path):
    inputs = Inputs(tmp_path, 0, None)
    for name in ("asymmetric", "bfloat16"):  # in bfloat16 many an offset is whole
        problem = TEST_PROBLEMS[name].backward
        folder, expected = inputs.of(problem)
        offset = load_tensors(folder, problem.spec).offset.astype(np.float64)
        np.testing.assert_array_equal(expected.jumps, np.abs(offset - np.rint(offset)) < 1e-4)
        assert expected.jumps.mean() < (0.002 if name == "asymmetric" else 0.1)
    assert expected.jumps.any()


def test_protocol_refuses_to_measure_nothing():
    with pytest.raises(ValueError, match="rounds and min_calls must be at least 1"):
        Protocol(rounds=0)


@pytest.mark.parametrize("name", ["asymmetric", "bfloat16", "asymmetric_v1"])
def test_tensors_survive_the_way_to_a_worker(tmp_path, name):
    problem = TEST_PROBLEMS[name]
    tensors = make_tensors(problem.spec, problem.extents)
    save_tensors(tmp_path, tensors)
    for field in dataclasses.fields(tensors):
        before = getattr(tensors, field.name)
        after = getattr(load_tensors(tmp_path, problem.spec), field.name)
        assert (before is None) == (after is None)
        if before is not None:
            assert after.dtype == before.dtype
            np.testing.assert_array_equal(after.astype(np.float64), before.astype(np.float64))


@pytest.mark.parametrize("name", ["asymmetric", "bfloat16", "asymmetric_v1"])
def test_gradient_of_the_output_goes_with_the_others(tmp_path, name):
    problem = TEST_PROBLEMS[name].backward
    drawn = make_gradient_tensors(problem.spec, problem.extents)
    save_tensors(tmp_path, BackwardTensors(**{"mask": None, "bias": None, **drawn}))
    read = load_tensors(tmp_path, problem.spec)
    for field, array in drawn.items():
        np.testing.assert_array_equal(getattr(read, field).astype(np.float64), array.astype(np.float64))
    assert not hasattr(load_tensors(tmp_path, problem.forward.spec), "grad_output")


# --- the protocol ------------------------------------------------------------------------------------------

FAILURES = {
    "wrong": "wrong result: maximum relative error",
    "not_finite": "wrong result: maximum relative error inf",
    "unsupported": "it cannot do <this> & that",
    "raises": "ZeroDivisionError: divided by nothing",
    "killed": "the process was killed by SIGKILL",
    "exits": "the process ended with status 3: a last word",
    "dies_when_measured": "the process ended with status 4",
    "absent": "AttributeError: module 'fake_providers' has no attribute 'absent'",
    "environment": "2 a-schedule OMP_NUM_THREADS=2 TVMDCN_NUM_THREADS=2",
}


def test_failures_become_rows_and_stop_nobody():
    providers = [
        fake("right", "ours", schedule="tuned"),
        *(fake(name, schedule="a-schedule") for name in FAILURES),
        Provider("missing", "peer", "nowhere:nothing", package="no_such_package"),
        fake("noisy"),
        fake("floor", "floor"),
    ]
    problems = [SMALL, TEST_PROBLEMS["wide_nhwc"]]
    seen = []
    rows = compare(problems, [2], providers, protocol=QUICK, on_row=seen.append, command="a command")
    assert seen == rows
    names = [provider.name for provider in providers]
    assert [(r.problem, r.provider) for r in rows] == [(p.name, name) for p in problems for name in names]
    for found in rows:
        assert Measurement.from_json(json.loads(json.dumps(found.to_json()))) == found
        assert (found.threads, found.command) == (2, "a command")
        if found.provider in ("right", "noisy", "floor"):
            assert found.status == "ok"
            assert found.runs >= QUICK.rounds * QUICK.min_calls
            assert (found.max_rel_error is None) == (found.provider == "floor")
            assert found.max_rel_error is None or found.max_rel_error < 1e-7
        elif found.provider == "missing":
            assert found.reason == "no_such_package is not installed: pip install no_such_package"
        else:
            assert FAILURES[found.provider.replace("-", "_")] in found.reason
    assert [found.schedule for found in rows[:2]] == ["tuned", None]


def test_gradients_are_measured_beside_the_forward():
    providers = [
        fake("right", "ours", "gradients", schedule="tuned"),
        fake("noisy", backward="wrong_gradients"),
        fake("slow", backward="without_mask"),
        fake("environment", backward="without_gradients"),
        fake("floor", "floor", "floor"),
        Provider("backward-only", "peer", None, backward=f"{FAKES}:gradients"),
        Provider("forward-only", "peer", f"{FAKES}:right"),
    ]
    problems = [SMALL, SMALL.backward]
    rows = compare(problems, [1], providers, protocol=QUICK)
    by_part = {(found.direction, found.provider): found for found in rows}
    assert len(by_part) == len(rows) == 2 * len(providers) - 2
    assert [found.direction for found in rows] == ["forward"] * 6 + ["backward"] * 6
    assert ("forward", "backward-only") not in by_part
    assert ("backward", "forward-only") not in by_part
    for found in rows:
        assert (found.problem, found.layer) == (SMALL.name, SMALL.spec)
        assert Measurement.from_json(json.loads(json.dumps(found.to_json()))) == found
    for provider in ("right", "backward-only"):
        assert by_part["backward", provider].max_rel_error < 1e-6
    assert by_part["backward", "floor"].max_rel_error is None
    for provider, reason in {
        "noisy": "wrong result: maximum relative error of grad_bias ",
        "slow": "wrong result: maximum relative error of grad_mask inf",
        "environment": "it has no gradients of <this>",
    }.items():
        assert reason in by_part["backward", provider].reason


def test_gradients_alone_bring_our_forward_with_them():
    ours = [fake(name, "ours", "gradients") for name in ("right", "noisy")]
    rows = compare([SMALL.backward], [1], [*ours, fake("slow", backward="gradients")], protocol=QUICK)
    assert [(found.direction, found.provider) for found in rows] == [
        ("forward", "right"),
        ("backward", "right"),
        ("backward", "noisy"),
        ("backward", "slow"),
    ]
    (_, section) = organize(rows)
    assert section.lines[0].growth == pytest.approx(rows[1].median_ms / rows[0].median_ms)


def test_provider_asked_for_what_it_has_not_says_so():
    only_forward = fake("right")
    only_backward = Provider("backward-only", "peer", None, backward=f"{FAKES}:gradients")
    (found,) = compare([SMALL.backward], [1], [only_forward], protocol=QUICK)
    assert (found.direction, found.reason) == ("backward", "right has no gradients: it only infers")
    (found,) = compare([SMALL], [1], [only_backward], protocol=QUICK)
    assert found.reason == "backward-only is measured for its gradients only: --direction backward"


def test_default_providers_have_something_to_do():
    forward, backward = ({p.name for p in default_providers([name])} for name in ("forward", "backward"))
    assert "torch-grid-sample" in backward - forward
    assert {"onnxruntime", "openvino"} <= forward - backward
    assert {"ours-tuned", "conv2d-nchw"} <= forward & backward
    assert {p.name for p in default_providers()} == forward | backward


def test_gradients_of_some_tensors_are_compared_apart():
    few = DeformConv2dGradSpec.of(SMALL.spec, grad_input=False, grad_offset=False)
    problems = [SMALL.backward, Problem("asymmetric_single backward", few, SMALL.extents, "")]
    rows = compare(problems, [1], [fake("right", backward="gradients")], protocol=QUICK)
    assert [(found.status, found.spec) for found in rows] == [("ok", problem.spec) for problem in problems]
    (section,) = organize(rows)
    assert len(section.lines) == 2
    assert "grad_weight, grad_bias only" in describe_layer(few, SMALL.extents)


def test_provider_in_another_environment(tmp_path):
    here = Provider("right", "peer", f"{FAKES}:right", python=sys.executable)
    gone = Provider("noisy", "peer", f"{FAKES}:noisy", package="no_such_package", python=str(tmp_path / "python"))
    found, missing = compare([SMALL], [1], [here, gone], protocol=QUICK)
    assert (found.status, found.versions["numpy"]) == ("ok", np.__version__)
    assert "No such file" in missing.reason


def test_slow_provider_gets_fewer_turns():
    protocol = Protocol(rounds=6, burst_seconds=0.001, slow_seconds=0.16)
    slow, right = compare([SMALL], [1], [fake("slow"), fake("right")], protocol=protocol)
    assert slow.status == "ok"
    assert 1 <= slow.runs <= 3  # 50 ms a call, 160 ms in all
    assert right.runs >= 6 * protocol.min_calls


def test_turns_of_a_slow_provider_are_spread_over_the_rounds():
    turns = Turns(None, 2, {}, None)
    assert [turns.due(index, 6) for index in range(6)] == [True, False, False, True, False, False]


def test_hanging_provider_is_given_up():
    protocol = Protocol(rounds=1, prepare_timeout=1.0)
    (found,) = compare([SMALL], [1], [fake("hangs")], protocol=protocol)
    assert found.reason == "no answer within 1 s"


def test_inputs_that_cannot_be_made_are_a_reason(tmp_path):
    layer = PROBLEMS["aliked_b4c1"]
    (found,) = compare([layer], [1], [fake("right")], protocol=QUICK, real_layers=tmp_path)
    assert "aliked" in found.reason
    assert str(tmp_path) in found.reason


def test_real_tensors_are_for_the_real_layers_only(tmp_path):
    (found,) = compare([SMALL], [1], [fake("right")], protocol=QUICK, real_layers=tmp_path)
    assert found.status == "ok"


def write_real_layer(folder, name="aliked_b4c1"):
    spec, extents = PROBLEMS[name].spec, PROBLEMS[name].extents
    tensors = make_tensors(spec, extents, seed=7)
    arrays = {part: getattr(tensors, part) for part in ("input", "offset", "weight")}
    output = np.zeros(spec.output_shape(extents), np.float32)
    np.savez(folder / f"{REAL_LAYERS[name]}.npz", **arrays, output_float64_rounded=output)
    return arrays


def test_real_tensors_come_in_every_dtype_and_layout(tmp_path):
    arrays = write_real_layer(tmp_path)
    inputs = Inputs(tmp_path, 0, tmp_path)
    layer = PROBLEMS["aliked_b4c1"]
    (odd,) = vary([layer], ["float16"], ["NHWC"])
    for problem in (odd, odd.backward):
        folder, expected = inputs.of(problem)
        read = load_tensors(folder, problem.spec)
        assert inputs.kind_of(problem) == "real"
        assert read.input.dtype == "float16"
        np.testing.assert_array_equal(read.input, arrays["input"].transpose(0, 2, 3, 1).astype(np.float16))
        np.testing.assert_array_equal(read.offset, arrays["offset"].transpose(0, 2, 3, 1).astype(np.float16))
        np.testing.assert_array_equal(read.weight, arrays["weight"].astype(np.float16))
        shapes = {name: problem.spec.shape_of(name, problem.extents) for name in problem.spec.outputs}
        assert {name: array.shape for name, array in expected.results.items()} == shapes


def test_real_tensors_are_of_one_size(tmp_path):
    arrays = write_real_layer(tmp_path)
    inputs = Inputs(tmp_path, 0, tmp_path)
    layer = PROBLEMS["aliked_b4c1"]
    (larger,) = vary([layer], image_sizes=[(16, 20)])
    assert (inputs.kind_of(layer), inputs.kind_of(larger), inputs.kind_of(SMALL)) == ("real", "made", "made")
    assert not np.array_equal(load_tensors(inputs.of(larger)[0], larger.spec).weight, arrays["weight"])
    assert Inputs(tmp_path, 0, None).kind_of(layer) == "made"


def test_time_budget_leaves_problems_out_and_says_so(caplog):
    assert compare([SMALL], [1, 2], [fake("right")], protocol=QUICK, time_budget=0) == []
    assert "asymmetric_single at 2 threads left out" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], [1], [fake("right")]), "at least one problem"),
        (([SMALL], [], [fake("right")]), "at least one problem"),
        (([SMALL], [1], []), "at least one problem"),
        (([SMALL], [1], [fake("right"), fake("right")]), "different names"),
    ],
)
def test_compare_refuses_nothing_to_measure(arguments, message):
    with pytest.raises(ValueError, match=message):
        compare(*arguments)


def prepare_request(folder, problem=SMALL):
    save_tensors(folder, make_tensors(problem.spec, problem.extents))
    return {
        "do": "prepare",
        "spec": problem.spec.to_json(),
        "extents": vars(problem.extents),
        "tensors": str(folder),
        "output": None,
    }


def test_worker_stands_still_while_others_measure(tmp_path):
    ticks = tmp_path / "ticks"
    with Worker(fake("ticking", schedule=str(ticks)), 1) as worker:
        worker.ask(prepare_request(tmp_path), 60)
        time.sleep(0.05)  # the signal has arrived by now
        before = ticks.read_bytes()
        time.sleep(0.2)
        assert ticks.read_bytes() == before
        worker.ask({"do": "measure", "cache": "warm", "seconds": 0.05, "min_calls": 1, "warmup": None}, 60)
        assert len(ticks.read_bytes()) > len(before)
    assert not worker.alive


def test_closed_worker_gives_a_reason(tmp_path):
    with Worker(fake("right"), 1) as worker:
        worker.ask(prepare_request(tmp_path), 60)
        worker.close()
        with pytest.raises(WorkerError, match="the process has been ended"):
            worker.ask({"do": "measure", "cache": "warm", "seconds": 0, "min_calls": 1, "warmup": None}, 60)


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux to end a process with its parent")
def test_stopped_worker_ends_with_its_parent(tmp_path):
    code = (
        "import json, os, sys\n"
        "from tvmdcn.bench.process import Worker\n"
        "from tvmdcn.bench.providers import Provider\n"
        f"worker = Worker(Provider('right', 'peer', {str(FAKES) + ':right'!r}), 1)\n"
        "worker.ask(json.loads(sys.argv[1]), 60)\n"
        "print(worker._process.pid, flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    request = json.dumps(prepare_request(tmp_path))
    root = str(Path(bench.__file__).parent.parent)
    done = subprocess.run([sys.executable, "-c", code, request], capture_output=True, text=True, cwd=root)
    stat = Path("/proc") / done.stdout.strip() / "stat"
    deadline = time.monotonic() + 20
    # A zombie is as dead, where nobody collects orphans.
    while stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline, "the worker outlived its parent"
        time.sleep(0.05)
