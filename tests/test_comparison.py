# SPDX-License-Identifier: Apache-2.0
"""Rows of measurements: what they hold, what they say when set beside each other."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from bench_rows import GRADIENTS, backward_rows, row

from tvmdcn.bench.comparison import geometric_mean, organize, thread_gains
from tvmdcn.bench.measurement import MEASURES, Measurement, MeasurementError, append_row, percentile, read_rows
from tvmdcn.bench.words import describe_layer, describe_measure
from tvmdcn.problems import PROBLEMS, TEST_PROBLEMS
from tvmdcn.spec import DeformConv2dGradSpec

MEASUREMENTS = Path(__file__).resolve().parents[1] / "docs" / "measurements"


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
    with pytest.raises(MeasurementError, match=r"the row describes no layer: .*unknown border"):
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


def test_overhead_is_counted_from_the_kernel_up():
    def overhead(measure, median, **fields):
        return row(measure=measure, median_ms=median, role="ours", min_ms=0.001, p10=0.001, **fields)

    nothing = row(measure="overhead_autograd", provider="torch-function", role="floor")
    forward, backward = organize(
        [
            overhead("overhead_function", 1.5),
            overhead("overhead_torch", 1.25),
            overhead("overhead_numpy", 1.125),
            overhead("first_result", 2.0),
            nothing,
            overhead("overhead_autograd", 2.0, spec=GRADIENTS),
        ]
    )
    above = {found.measure: forward.above_kernel(found) for found in forward.extra if found.role == "ours"}
    assert above == {"overhead_function": 0.25, "overhead_torch": None, "overhead_numpy": None, "first_result": None}
    assert forward.above_kernel(nothing) is None
    assert backward.above_kernel(backward.extra[0]) is None  # the gradients' kernel was not measured


def test_measures_have_words_of_their_own():
    specs = (PROBLEMS["r50_c4"].spec, GRADIENTS)
    words = [describe_measure(row(measure=measure, role="ours", spec=spec)) for measure in MEASURES for spec in specs]
    assert len(set(words)) == len(words) - 2  # modules, and a new process, are measured forward only
