# SPDX-License-Identifier: Apache-2.0
"""The benchmark: its rows, its protocol with cheap providers, its peers on small problems, its command.

No time is ever asserted: only what was measured how often, by whom, and what is said when it fails.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import subprocess
import sys
import time
from pathlib import Path

import handmade
import numpy as np
import pytest
from click.testing import CliRunner

from tvmdcn import bench, bench_protocol
from tvmdcn.bench import benchmark_command, section_table
from tvmdcn.bench_inputs import Expected, Inputs, relative_error
from tvmdcn.bench_overhead import TINY, measure_overhead
from tvmdcn.bench_process import Worker, WorkerError
from tvmdcn.bench_protocol import Protocol, compare, turn_order
from tvmdcn.bench_words import describe_layer, describe_measure
from tvmdcn.bench_worker import load_tensors, save_tensors
from tvmdcn.comparison import geometric_mean, organize, thread_gains
from tvmdcn.measurement import MEASURES, Measurement, MeasurementError, append_row, percentile, read_rows
from tvmdcn.problems import PROBLEMS, TEST_PROBLEMS, Problem, make_tensors
from tvmdcn.providers import PROVIDERS, BackwardTensors, Provider, default_providers
from tvmdcn.spec import DeformConv2dGradSpec
from tvmdcn.tensors import make_gradient_tensors

FAKES = Path(__file__).with_name("fake_providers.py")
SMALL = TEST_PROBLEMS["asymmetric_single"]
QUICK = Protocol(rounds=2, burst_seconds=0.001, min_calls=2)


def fake(name, role="peer", backward=None, **fields):
    """Return a provider; `backward` names its function for gradients."""
    gradients = None if backward is None else f"{FAKES}:{backward}"
    return Provider(name.replace("_", "-"), role, f"{FAKES}:{name}", backward=gradients, **fields)


def row(**fields):
    problem = PROBLEMS["r50_c4"]
    times = {"median_ms": 2.0, "min_ms": 1.0, "p10": 1.25, "p90": 2.25, "runs": 9}
    base = {
        "problem": problem.name,
        "spec": problem.spec,
        "extents": problem.extents,
        "provider": "onnxruntime",
        "role": "peer",
        "threads": 1,
        "machine": {"cpu": "a cpu", "cores": 2},
        "versions": {"python": "3.11", "tvmdcn": "0.1"},
        "date": "2026-11-22T10:00:00+00:00",
        "command": "scripts/benchmark.py",
        **({} if fields.get("status") == "failed" else times),
    }
    return Measurement(**{**base, **fields})


MEASUREMENTS = Path(bench.__file__).parents[1] / "docs" / "measurements"
GRADIENTS = PROBLEMS["r50_c4"].backward.spec


# --- rows --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "measurement",
    [
        row(),
        row(provider="ours-tuned", role="ours", schedule="tuned", max_rel_error=1e-7),
        row(status="failed", reason='a "reason"\nof two lines, \u00e4 \U0001f600'),
        row(measure="first_result", threads=2),
        row(spec=GRADIENTS),
        row(spec=DeformConv2dGradSpec.of(PROBLEMS["r50_c4"].spec, grad_weight=False, border="mmcv")),
    ],
)
def test_row_survives_a_file(tmp_path, measurement):
    path = tmp_path / "rows.jsonl"
    append_row(path, measurement)
    append_row(path, measurement)
    assert read_rows(path) == ([measurement, measurement], [])
    assert path.read_text().count("\n") == 2
    assert json.loads(path.read_text().splitlines()[0])["direction"] == measurement.direction


def test_direction_and_operations_are_those_of_what_was_computed():
    forward, backward = row(), row(spec=GRADIENTS)
    assert (forward.direction, forward.title) == ("forward", "r50_c4")
    assert (backward.direction, backward.title) == ("backward", "r50_c4 backward")
    assert backward.layer == forward.layer == forward.spec
    assert backward.operations == 2 * forward.operations == 4 * 1024 * 256 * 256 * 9


def test_rows_of_the_first_schema_are_forward():
    data = row().to_json()
    del data["direction"]
    assert Measurement.from_json({**data, "schema": 1}) == row()
    with pytest.raises(MeasurementError, match="missing direction"):
        Measurement.from_json(data)
    with pytest.raises(MeasurementError, match="the row describes no layer: .*unknown border"):
        Measurement.from_json({**data, "schema": 1, "spec": GRADIENTS.to_json()})


@pytest.mark.parametrize("path", sorted(MEASUREMENTS.glob("*.jsonl")), ids=lambda path: path.stem)
def test_rows_that_were_published_are_still_read(path):
    rows, complaints = read_rows(path)
    assert complaints == []
    assert rows


BAD_FIELDS = {
    "empty problem": ({"problem": ""}, "problem must be a text that is not empty"),
    "role": ({"role": "rival"}, "role must be one of ours, peer, floor, got 'rival'"),
    "threads of zero": ({"threads": 0}, "threads must be an int of at least 1, got 0"),
    "threads of a bool": ({"threads": True}, "threads must be an int"),
    "status": ({"status": "fine"}, "status must be one of ok, failed"),
    "measure": ({"measure": "guess"}, "measure must be one of call"),
    "infinite time": ({"p90": math.inf}, "p90 must be a finite number"),
    "negative time": ({"min_ms": -1.0}, "min_ms must be a finite number of at least 0"),
    "time as text": ({"median_ms": "2"}, "median_ms must be a finite number"),
    "missing time": ({"p10": None}, "median_ms must be four times where status is ok"),
    "order of times": ({"p90": 1.1}, "in ascending order"),
    "zero time": ({"min_ms": 0.0}, "positive"),
    "no runs": ({"runs": 0}, "runs must be at least 1 where status is ok"),
    "reason of a success": ({"reason": "why"}, "reason must be null where status is ok"),
    "no reason": ({"status": "failed"}, "reason must be given where status is failed"),
    "date": ({"date": "yesterday"}, "date must be a date and time in ISO 8601, got 'yesterday'"),
    "machine": ({"machine": None}, "machine must be an object"),
    "versions": ({"versions": {"torch": 2}}, "versions must be an object of texts"),
    "nan error": ({"max_rel_error": math.nan}, "max_rel_error must be a finite number"),
}


@pytest.mark.parametrize("case", BAD_FIELDS)
def test_row_is_validated(case):
    fields, message = BAD_FIELDS[case]
    with pytest.raises(MeasurementError) as raised:
        row(**fields)
    assert message in str(raised.value)


def test_failed_row_has_no_times():
    with pytest.raises(MeasurementError, match="median_ms must be null where status is failed"):
        row(status="failed", reason="why", median_ms=1.0)


def edited(**changes):
    data = row().to_json()
    for key, value in changes.items():
        if value is ...:
            del data[key]
        else:
            data[key] = value
    return json.dumps(data).encode()


BROKEN_LINES = {
    "no json": (b"{broken", "not a line of JSON"),
    "no text": (b'{"a": "\xff"}', "not a line of JSON"),
    "cut short": (edited()[:-20], "not a line of JSON"),
    "deep nesting": (b"[" * 100_000, "not a line of JSON"),
    "a list": (b"[1]", "a row must be a JSON object, got list"),
    "other schema": (edited(schema=3), "schema must be 1 or 2, got 3: measure again"),
    "schema of a bool": (edited(schema=True), "schema must be 1 or 2, got True: measure again"),
    "other direction": (edited(direction="backward"), "direction must be forward, as the operator in spec says"),
    "unknown key": (edited(fast=True), "missing none; unknown fast"),
    "missing key": (edited(runs=...), "missing runs; unknown none"),
    "bad layer": (edited(spec={"operator": "conv"}), "the row describes no layer"),
    "bad extents": (edited(extents={"batch": 1}), "the row describes no layer"),
    "layer too small": (edited(extents={"batch": 1, "height": 1, "width": -1}), "the row describes no layer"),
    "bad value": (edited(median_ms=None), "median_ms must be four times"),
}


@pytest.mark.parametrize("case", BROKEN_LINES)
def test_broken_line_is_named_and_the_rest_is_used(tmp_path, case):
    line, message = BROKEN_LINES[case]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join((edited(), b"", line, edited(threads=2), b"")))
    rows, complaints = read_rows(path)
    assert [found.threads for found in rows] == [1, 2]
    (complaint,) = complaints
    assert complaint.startswith(f"{path}, line 3: ")
    assert message in complaint


def test_line_cut_by_a_kill_does_not_swallow_the_next(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(edited()[:50])
    append_row(path, row())
    rows, complaints = read_rows(path)
    assert rows == [row()]
    assert len(complaints) == 1


# --- arithmetic --------------------------------------------------------------------------------------------


def test_percentile_agrees_with_numpy():
    values = [5.0, 1.0, 9.0, 2.5, 2.5, 7.0]
    for share in (0, 0.1, 0.5, 0.9, 1):
        assert percentile(values, share) == pytest.approx(np.quantile(values, share))
    with pytest.raises(ValueError, match="percentile needs values"):
        percentile([], 0.5)


def test_geometric_mean():
    mean = geometric_mean([0.5, None, 8.0])
    assert (mean.value, mean.count, mean.total, mean.lowest, mean.highest) == (pytest.approx(2), 2, 3, 0.5, 8)
    assert geometric_mean([None]) is None
    with pytest.raises(ValueError, match="positive"):
        geometric_mean([1.0, 0.0])


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
    turns = bench_protocol._Turns(None, 2, {}, None)
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
        worker.ask({"do": "measure", "seconds": 0.05, "min_calls": 1, "warmup": None}, 60)
        assert len(ticks.read_bytes()) > len(before)
    assert not worker.alive


def test_closed_worker_gives_a_reason(tmp_path):
    with Worker(fake("right"), 1) as worker:
        worker.ask(prepare_request(tmp_path), 60)
        worker.close()
        with pytest.raises(WorkerError, match="the process has been ended"):
            worker.ask({"do": "measure", "seconds": 0, "min_calls": 1, "warmup": None}, 60)


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux to end a process with its parent")
def test_stopped_worker_ends_with_its_parent(tmp_path):
    code = (
        "import json, os, sys\n"
        "from tvmdcn.bench_process import Worker\n"
        "from tvmdcn.providers import Provider\n"
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


# --- the providers -----------------------------------------------------------------------------------------

_PEERS = [name for name, provider in PROVIDERS.items() if provider.role != "ours"]


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
    """Kernels written by hand, in the cache under the keys of the default and of the tuned schedule."""
    if handmade.COMPILER is None:
        pytest.skip("no C compiler")
    problems = [SMALL, TEST_PROBLEMS["asymmetric_nhwc"], TINY]
    for problem in problems:
        for each in (problem, problem.backward):
            for schedule in ("default", *(("tuned",) if problem is TINY else ())):
                handmade.build(each.spec, schedule=schedule)
    return problems


@pytest.mark.parametrize("source", ["prepare_ours", "prepare_ours_torch"])
def test_ours_computes_the_reference(kernels, source):
    if source == "prepare_ours_torch":
        pytest.importorskip("torch")
    provider = dataclasses.replace(PROVIDERS["ours-default"], source=f"tvmdcn.providers:{source}")
    for found in compare(kernels, [2], [provider], protocol=QUICK):
        assert (found.status, found.reason, found.schedule) == ("ok", None, "default")
        assert found.max_rel_error < 1e-5


@pytest.mark.parametrize("source", ["prepare_ours", "prepare_ours_numpy", "prepare_ours_torch"])
def test_ours_computes_the_gradients_of_the_reference(kernels, source):
    if source == "prepare_ours_torch":
        pytest.importorskip("torch")
    backward = f"tvmdcn.providers_backward:{source}"
    provider = dataclasses.replace(PROVIDERS["ours-default"], source=None, backward=backward)
    rows = compare([problem.backward for problem in kernels], [2], [provider], protocol=QUICK)
    assert [found.direction for found in rows] == ["backward"] * len(kernels)
    for found in rows:
        assert (found.status, found.reason, found.schedule) == ("ok", None, "default")
        assert found.max_rel_error < 1e-5


def test_overhead_rows(kernels):
    options = {"schedule": "default", "problem": SMALL, "processes": 1, "command": "a command"}
    rows = measure_overhead([1], **options, protocol=dataclasses.replace(QUICK, rounds=1))
    overheads = [name for name in MEASURES if name.startswith("overhead")]
    ours = [(found.direction, found.measure) for found in rows if found.role == "ours"]
    assert ours == [
        *(("forward", measure) for measure in overheads),
        *(("backward", measure) for measure in overheads if measure != "overhead_module"),
        ("forward", "first_result"),
    ]
    assert [found.direction for found in rows if found.role == "floor"] == ["forward", "backward"]
    assert {found.problem for found in rows[:-1]} == {TINY.name}
    assert rows[-1].problem == SMALL.name
    assert {found.command for found in rows} == {"a command"}
    assert {found.reason for found in rows} <= {None, "torch is not installed: pip install torch"}
    for section in organize(rows):
        kernel, *others = [found for found in section.extra if found.measure != "overhead_numpy"]
        for found in others:
            above = section.above_kernel(found)
            if found.measure == "first_result" or found.role == "floor" or found.status == "failed":
                assert above is None
            else:
                assert above == pytest.approx(found.median_ms - kernel.median_ms)


def test_measures_have_words_of_their_own():
    specs = (PROBLEMS["r50_c4"].spec, GRADIENTS)
    words = [describe_measure(row(measure=measure, role="ours", spec=spec)) for measure in MEASURES for spec in specs]
    assert len(set(words)) == len(words) - 2  # modules, and a new process, are measured forward only


def test_first_result_that_fails_has_a_reason(cache_dir, monkeypatch):
    monkeypatch.setenv("TVMDCN_BUILD", "never")
    *_, first = measure_overhead([1], schedule="default", problem=SMALL, processes=1)
    assert first.reason.startswith("tvmdcn.errors.ArtifactMissing: ")


# --- rows set beside each other ----------------------------------------------------------------------------


def test_ratios_are_against_the_fastest():
    (section,) = organize(
        [
            row(provider="conv2d-nchw", role="floor", median_ms=2.1),
            row(provider="conv2d-channels-last", role="floor", median_ms=1.8),
            row(provider="openvino", median_ms=2.2),
            row(provider="torchvision", status="failed", reason="absent"),
            row(),
            row(provider="ours-default", role="ours", median_ms=1.9, schedule="default"),
            row(provider="ours-tuned", role="ours", median_ms=1.6, schedule="tuned"),
        ]
    )
    (line,) = section.lines
    assert section.providers[:2] == ["ours-tuned", "ours-default"]
    assert section.subject == "ours-tuned"
    assert (line.fastest_peer.provider, line.floor.provider) == ("onnxruntime", "conv2d-channels-last")
    assert line.speedup == pytest.approx(2.0 / 1.6)
    assert line.cost == pytest.approx(1.6 / 1.8)
    assert section.speedup.value == pytest.approx(1.25)
    assert section.against("openvino").value == pytest.approx(2.2 / 1.6)
    assert section.against("torchvision") is None


def test_the_best_schedule_that_was_measured_stands_for_us():
    tuned = row(provider="ours-tuned", role="ours", status="failed", reason="no records")
    default = row(provider="ours-default", role="ours")
    (section,) = organize([tuned, default])
    assert section.subject == "ours-default"
    (section,) = organize([tuned])
    assert section.subject == "ours-tuned"
    assert section.lines[0].ours is None
    assert section.speedup is None


def test_machines_and_threads_are_kept_apart_and_the_latest_row_counts():
    other = {"cpu": "another", "cores": 2}
    later = row(date="2026-11-22T12:00:00+00:00", median_ms=1.9)
    # 12:30 at +02:00 is before 12:00 at UTC.
    earlier = row(date="2026-11-22T12:30:00+02:00", median_ms=1.8)
    sections = organize([row(machine=other), row(), later, earlier, row(threads=2)])
    assert [(s.machine["cpu"], s.threads) for s in sections] == [("a cpu", 1), ("a cpu", 2), ("another", 1)]
    assert sections[0].lines[0].rows["onnxruntime"] is later
    assert sections[0].superseded == 2


def test_other_versions_are_found():
    odd = row(provider="openvino", versions={"python": "3.12", "openvino": "1"})
    (section,) = organize([row(), row(threads=1, provider="x"), odd])
    assert section.differences(row()) == []
    assert section.differences(odd) == [
        "openvino 1 instead of absent",
        "python 3.12 instead of 3.11",
        "tvmdcn absent instead of 0.1",
    ]


def test_thread_gains_need_the_same_subject():
    one = row(provider="ours-tuned", role="ours")
    two = row(provider="ours-tuned", role="ours", threads=2, median_ms=1.6)
    ((line, gains),) = thread_gains(organize([one, two]))
    assert (line.problem, gains) == ("r50_c4", {2: pytest.approx(1.25)})
    default = row(provider="ours-default", role="ours", threads=2)
    assert thread_gains(organize([one, default])) == []
    assert thread_gains([]) == []


def backward_rows(ours=4.0, forward=2.0, conv2d=3.0, torchvision=40.0, problem="r50_c4", **fields):
    layer = PROBLEMS[problem]
    shared = {"problem": problem, "extents": layer.extents, "min_ms": 0.5, "p10": 0.5, "p90": 99.0, **fields}
    gradients = layer.backward.spec
    rows = [row(provider="ours-tuned", role="ours", median_ms=ours, spec=gradients, **shared)]
    rows += [row(provider="ours-tuned", role="ours", median_ms=forward, spec=layer.spec, **shared)] if forward else []
    rows += [row(provider="conv2d-nchw", role="floor", median_ms=conv2d, spec=gradients, **shared)]
    rows += [row(provider="torchvision", median_ms=torchvision, spec=gradients, **shared)] if torchvision else []
    return rows


def test_directions_are_kept_apart_and_gradients_know_their_forward():
    forward, backward = organize([*backward_rows(), row(median_ms=2.2)])
    assert (forward.direction, backward.direction) == ("forward", "backward")
    (line,) = backward.lines
    assert (line.speedup, line.cost, line.growth) == (10, pytest.approx(4 / 3), 2)
    assert backward.growth.value == pytest.approx(2)
    assert line.gflops == pytest.approx(2 * line.spec.layer.flops(line.extents) / 4.0 / 1e6)
    assert forward.lines[0].growth is None
    assert forward.growth is None
    # Only the forward of the same schedule, machine and number of threads.
    for fields in ({"threads": 2}, {"machine": {"cpu": "another"}}, {"provider": "ours-default"}):
        ours = {"provider": "ours-tuned", "role": "ours", "median_ms": 2.0, **fields}
        sections = organize([*backward_rows(forward=None), row(**ours)])
        assert next(section for section in sections if section.direction == "backward").growth is None
    earlier = row(provider="ours-tuned", role="ours", median_ms=1.5, date="2026-11-21T10:00:00+00:00")
    assert organize([*backward_rows(), earlier])[1].lines[0].growth == 2


def test_aims_name_the_layers_that_miss_them():
    rows = [
        *backward_rows(),
        *backward_rows(5.0, problem="deft"),  # 2.5 of our forward, 1.67 of conv2d's, 8 of torchvision's
        *backward_rows(50.0, problem="edvr_align", torchvision=None),  # eight offset groups: no aim but torchvision's
        *backward_rows(3.0, problem="grouped32"),  # groups: no aim beside conv2d
    ]
    forward, backward = organize(rows)
    assert forward.verdicts == []
    assert [
        ([line.problem for line, _ in v.ratios], [line.problem for line, _ in v.misses], v.worst)
        for v in (backward.verdicts)
    ] == [
        (["r50_c4", "deft", "grouped32"], ["deft"], 2.5),
        (["r50_c4", "deft"], ["deft"], pytest.approx(5 / 3)),
        (["r50_c4", "deft", "grouped32"], [], 8),
    ]
    assert organize(backward_rows(forward=None, torchvision=None))[0].verdicts[0].aim.limit == 1.5


def test_thread_gains_of_gradients():
    rows = [*backward_rows(), *backward_rows(2.5, 1.0, threads=2)]
    gains = [(line.title, gain) for line, gain in thread_gains(organize(rows))]
    assert gains == [("r50_c4", {2: 2.0}), ("r50_c4 backward", {2: pytest.approx(1.6)})]


def test_describe_layer_says_what_is_unusual():
    plain, odd = PROBLEMS["r50_c4"], TEST_PROBLEMS["asymmetric_v1"]
    assert describe_layer(plain.spec, plain.extents) == "1\u00d7256\u00d732\u00d732 \u2192 256, 3\u00d73"
    assert describe_layer(odd.spec, odd.extents) == (
        "2\u00d76\u00d75\u00d74 \u2192 2, 3\u00d72, stride 2\u00d71, padding 1\u00d70\u00d71\u00d70, "
        "dilation 2\u00d71, 2 groups, 3 offset groups, no mask"
    )


# --- the command -------------------------------------------------------------------------------------------


@pytest.fixture
def fakes(monkeypatch):
    table = {
        provider.name: provider
        for provider in (
            fake("right", "ours", "gradients"),
            fake("noisy"),
            fake("floor", "floor", "floor"),
            fake("unsupported"),
        )
    }
    monkeypatch.setattr(bench, "PROVIDERS", table)
    return table


def test_command_measures_writes_and_shows(tmp_path, fakes):
    output = tmp_path / "new" / "rows.jsonl"
    arguments = [
        "--problem",
        "asymmetric_single",
        "row",
        "--threads",
        "1",
        "2",
        "--rounds",
        "1",
        "--burst",
        "0.001",
    ]
    result = CliRunner().invoke(
        benchmark_command, [*arguments, "--provider", *fakes, "--output", str(output)], catch_exceptions=False
    )
    assert result.exit_code == 0
    rows, complaints = read_rows(output)
    assert complaints == []
    assert len(rows) == 2 * 2 * len(fakes)
    assert {(found.problem, found.threads) for found in rows} == {
        (problem, threads) for problem in ("asymmetric_single", "row") for threads in (1, 2)
    }
    for text in ("geometric mean", "vs peer", "2 threads", "it cannot do <this> & that"):
        assert text in result.stdout
    assert f"16 rows in {output}" in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("direction", "parts"),
    [
        ("backward", [("forward", "right"), ("backward", "right"), ("backward", "floor")]),
        ("all", [("forward", "right"), ("forward", "floor"), ("backward", "right"), ("backward", "floor")]),
    ],
)
def test_command_measures_gradients(tmp_path, fakes, direction, parts):
    output = tmp_path / "rows.jsonl"
    arguments = ["--problem", "row", "--rounds", "1", "--burst", "0.001", "--direction", direction]
    result = CliRunner().invoke(
        benchmark_command,
        [*arguments, "--provider", "right", "floor", "--output", str(output)],
        catch_exceptions=False,
    )
    assert result.exit_code == 0
    assert [(found.direction, found.provider) for found in read_rows(output)[0]] == parts
    for text in ("backward, 1 thread", "vs forward", "at most 2.2\u00d7 our own forward"):
        assert text in result.stdout
    assert "row backward 1 right: " in result.stderr


def test_command_runs_a_provider_elsewhere(fakes):
    arguments = ["--problem", "row", "--rounds", "1", "--burst", "0.001", "--provider", "right"]
    result = CliRunner().invoke(benchmark_command, [*arguments, "--python", "right=/no/such/python"])
    assert result.exit_code == 1
    assert "/no/such/python" in result.stdout


def test_command_fails_when_all_fails(fakes):
    arguments = ["--problem", "row", "--provider", "unsupported", "--rounds", "1"]
    assert CliRunner().invoke(benchmark_command, arguments).exit_code == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--provider", "mmcv"], "'mmcv' is not one of ours-tuned, ours-default"),
        (["--problem", "r51"], "problem 'r51' is neither a name nor of the form"),
        (["--threads", "0"], "0 is not in the range x>=1"),
        (["--direction", "sideways"], "'sideways' is not one of 'forward', 'backward', 'all'"),
        (["--python", "torchvision"], "'torchvision' is not of the form PROVIDER=INTERPRETER"),
        (["--python", "mmcv=/usr/bin/python3"], "'mmcv' is not one of ours-tuned"),
        (["--rounds", "none"], "'none' is not a valid integer"),
        (["--problem-file", "no-such-file.json"], "does not exist"),
        (["stray"], "unexpected extra argument"),
    ],
)
def test_command_refuses_in_words(arguments, message):
    result = CliRunner().invoke(benchmark_command, arguments)
    assert result.exit_code in (1, 2)
    assert message in result.stderr


def test_all_means_the_named_problems():
    assert bench._problems((), None, None) == list(PROBLEMS.values())
    assert bench._problems(("all", "deft"), None, None) == list(PROBLEMS.values())
    assert [p.name for p in bench._problems((), None, Path("."))][:1] == ["aliked_b3c1"]


def test_table_shows_hostile_names_as_they_are():
    from rich.console import Console

    (section,) = organize([row(problem="[red]x[/nothing]", provider="ours-tuned", role="ours")])
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(section_table(section))
    assert "[red]x[/nothing]" in console.export_text()
