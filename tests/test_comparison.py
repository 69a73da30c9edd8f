# SPDX-License-Identifier: Apache-2.0
"""Rows of measurements set beside each other: ratios, means, sections, sweeps."""

from __future__ import annotations

import dataclasses

import pytest
from bench_rows import GRADIENTS, backward_rows, row

from tvmdcn.bench.comparison import geometric_mean, organize, thread_gains
from tvmdcn.bench.measurement import MEASURES
from tvmdcn.bench.words import describe_layer, describe_measure
from tvmdcn.problems import PROBLEMS, TEST_PROBLEMS


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


def test_what_differs_in_more_than_the_provider_is_not_compared():
    half = dataclasses.replace(PROBLEMS["r50_c4"].spec, dtype="float16")
    last = dataclasses.replace(PROBLEMS["r50_c4"].spec, layout="NHWC")
    rows = [
        row(spec=last, median_ms=1.875),
        row(spec=half, median_ms=1.75),
        row(cache="cold", median_ms=2.125),
        row(device="cuda", median_ms=1.5),
        row(median_ms=1.625),
        row(sweep=("batch",), median_ms=1.3125),
    ]
    sections = organize(rows)
    assert [section.title for section in sections] == [
        "forward, 1 thread",
        "forward, 1 thread, cold caches",
        "forward, 1 thread, float16",
        "forward, 1 thread, NHWC",
        "forward, 1 thread, cuda",
    ]
    times = [section.lines[0].rows["onnxruntime"].median_ms for section in sections]
    assert times == [1.625, 2.125, 1.75, 1.875, 1.5]
    assert [(s.device, s.cache, s.dtype, s.layout) for s in sections[3:]] == [
        ("cpu", "warm", "float32", "NHWC"),
        ("cuda", "warm", "float32", "NCHW"),
    ]
    assert [len(section.sweeps) for section in sections] == [1, 0, 0, 0, 0]
    assert all(section.superseded == 0 for section in sections)


def test_gradients_know_the_forward_of_the_same_place():
    half = dataclasses.replace(PROBLEMS["r50_c4"].spec, dtype="float16")
    ours = {"provider": "ours-tuned", "role": "ours"}
    rows = [
        row(spec=GRADIENTS, **ours),
        row(cache="cold", median_ms=1.25, **ours),
        row(spec=half, median_ms=1.5, **ours),
        row(sweep=("batch",), median_ms=1.75, **ours),
    ]
    backward = next(section for section in organize(rows) if section.direction == "backward")
    assert backward.lines[0].growth is None
    backward = next(s for s in organize([*rows, row(median_ms=1.6, **ours)]) if s.direction == "backward")
    assert backward.lines[0].growth == 2 / 1.6


def test_unsteady_rows_of_a_section_are_found():
    noisy = {"p90": 9.0}
    rows = [
        row(**noisy),
        row(provider="openvino"),
        row(sweep=("batch",), **noisy),
        row(measure="first_result", **noisy),
    ]
    (section,) = organize(rows)
    assert section.unsteady == [rows[0], rows[2], rows[3]]


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
