# SPDX-License-Identifier: Apache-2.0
"""Rows and files of rows: what they hold, the published schema, and what is said of lines that are not sound."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from bench_rows import GRADIENTS, backward_rows, roof, row

from tvmdcn.bench.measurement import Measurement, MeasurementError
from tvmdcn.bench.rows import Entry, append_row, parse_row, read_row_file, read_rows
from tvmdcn.bench.schema import published_schema
from tvmdcn.bench.statistics import noise, percentile, summarize
from tvmdcn.problems import PROBLEMS
from tvmdcn.spec import DeformConv2dGradSpec

MEASUREMENTS = Path(__file__).resolve().parents[1] / "docs" / "measurements"
FULL = {
    "p25": 1.5,
    "p75": 2.125,
    "samples_ms": ((1.0, 2.0, 2.25), (1.5, 2.125)),
    "run": "20261122T100000-abc123",
    "affinity": (0, 1),
    "commit": "0123456789+",
    "note": "computed in NCHW",
    "cache": "cold",
    "sweep": ("batch", "image_size"),
    "artifact": "deform_conv2d-1-abc",
    "tensors": "real",
    "memory_bytes": 4096,
    "memory_prepare_bytes": 8192,
    "memory_resolution_bytes": 1 << 21,
    "protocol": {
        "rounds": 2,
        "burst_seconds": 0.08,
        "min_calls": 3,
        "warmup_seconds": 0.005,
        "evicted_bytes": 1 << 26,
    },
}

# --- rows ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "measurement",
    [
        row(),
        row(**FULL),
        row(provider="ours-tuned", role="ours", schedule="tuned", max_rel_error=1e-7),
        row(status="failed", reason='a "reason"\nof two lines, \u00e4 \U0001f600'),
        row(measure="first_result", threads=2),
        row(spec=GRADIENTS),
        row(spec=DeformConv2dGradSpec.of(PROBLEMS["r50_c4"].spec, grad_weight=False, border="mmcv")),
        roof(),
        roof(roof="matmul", level=None, dtype="float64", provider="torch"),
        roof(status="failed", reason="no such package", work=None),
    ],
)
def test_row_survives_a_file(tmp_path, measurement):
    path = tmp_path / "rows.jsonl"
    append_row(path, measurement)
    append_row(path, measurement)
    found = read_row_file(path)
    assert found.entries == [Entry(1, 3, measurement), Entry(2, 3, measurement)]
    assert found.complaints == []
    assert path.read_text().count("\n") == 2


def test_row_says_what_follows_from_its_fields():
    data = row(**FULL).to_json()
    assert (data["schema"], data["kind"], data["direction"]) == (3, "layer", "forward")
    assert (data["spread"], data["noisy"]) == (0.3125, True)
    assert (data["samples_ms"], data["sweep"]) == ([[1.0, 2.0, 2.25], [1.5, 2.125]], ["batch", "image_size"])
    assert row(spec=GRADIENTS).to_json()["direction"] == "backward"
    data = roof(work=6_000_000_000).to_json()  # 2 ms in the median, 1 ms the fastest
    assert (data["kind"], data["unit"], data["rate"], data["best_rate"]) == ("roof", "GB/s", 3000, 6000)


def test_direction_operations_and_pixels_are_those_of_what_was_computed():
    forward, backward = row(), row(spec=GRADIENTS)
    assert (forward.direction, forward.title) == ("forward", "r50_c4")
    assert (backward.direction, backward.title) == ("backward", "r50_c4 backward")
    assert backward.layer == forward.layer == forward.spec
    assert backward.operations == 2 * forward.operations == 4 * 1024 * 256 * 256 * 9
    strided = PROBLEMS["r50_c3_s2"]
    assert row(spec=strided.spec, extents=strided.extents).pixels == 32 * 32


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
    "missing time": ({"p10": None}, "the times must be numbers where status is ok"),
    "one quartile": ({"p25": 1.5}, "the times must be numbers where status is ok"),
    "order of times": ({"p90": 1.1}, "in ascending order"),
    "order of quartiles": ({"p25": 2.125, "p75": 2.0}, "in ascending order"),
    "zero time": ({"min_ms": 0.0}, "positive"),
    "no runs": ({"runs": 0}, "runs must be at least 1 where status is ok"),
    "reason of a success": ({"reason": "why"}, "reason must be null where status is ok"),
    "no reason": ({"status": "failed"}, "reason must be given where status is failed"),
    "date": ({"date": "yesterday"}, "date must be a date and time in ISO 8601, got 'yesterday'"),
    "machine": ({"machine": None}, "machine must be an object"),
    "versions": ({"versions": {"torch": 2}}, "versions must be an object of texts"),
    "nan error": ({"max_rel_error": math.nan}, "max_rel_error must be a finite number"),
    "cache": ({"cache": "tepid"}, "cache must be one of warm, cold, got 'tepid'"),
    "sweep": ({"sweep": ("channels",)}, "sweep must be some of batch, image_size"),
    "tensors": ({"tensors": "some"}, "tensors must be one of made, real, or null"),
    "memory": ({"memory_bytes": -1}, "memory_bytes must be an int of at least 0, or null"),
    "empty turn": ({"samples_ms": ((),)}, "samples_ms must be turns of ascending times"),
    "turn out of order": ({"samples_ms": ((2.0, 1.0),)}, "samples_ms must be turns of ascending times"),
    "infinite sample": ({"samples_ms": ((math.inf,),)}, "samples_ms must be a finite number"),
    "device": ({"device": ""}, "device must be a text that is not empty"),
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


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"roof": "sky"}, "roof must be one of copy, matmul, got 'sky'"),
        ({"level": None}, "level must be one of memory, cache for a copy, else null"),
        ({"roof": "matmul", "dtype": "float32"}, "level must be one of memory, cache for a copy, else null"),
        ({"dtype": "float32"}, "dtype must be the dtype of the matrices, null for a copy"),
        ({"work": None}, "work must be a positive int"),
        ({"size": 3}, "size must be a text"),
    ],
)
def test_roof_is_validated(fields, message):
    with pytest.raises(MeasurementError, match=message):
        roof(**fields)


# --- the published schema ------------------------------------------------------------------------------------


def refused_by_schema(data):
    from jsonschema import Draft202012Validator

    return not Draft202012Validator(published_schema()).is_valid(data)


def test_published_schema_is_a_schema():
    from jsonschema import Draft202012Validator

    schema = published_schema()
    assert schema["$schema"] == Draft202012Validator.META_SCHEMA["$id"]
    Draft202012Validator.check_schema(schema)
    for data in (row(**FULL), row(), row(status="failed", reason="why"), roof()):
        assert not refused_by_schema(json.loads(json.dumps(data.to_json())))


# What only two fields together show, or JSON cannot write.
_BEYOND_JSON = ("order", "turn out of order", "date", "threads of a bool", "one quartile", "infinite", "nan")


@pytest.mark.parametrize("case", [case for case in BAD_FIELDS if not case.startswith(_BEYOND_JSON)])
def test_schema_alone_refuses_what_rows_refuse(case):
    fields, _ = BAD_FIELDS[case]
    plain = {name: [list(turn) for turn in value] if name == "samples_ms" else value for name, value in fields.items()}
    if case == "no reason":
        plain |= dict.fromkeys(("median_ms", "min_ms", "p10", "p90"))
    assert refused_by_schema({**row().to_json(), **plain})


@pytest.mark.parametrize(
    "changes",
    [
        {"surprise": 1},
        {"schema": 4},
        {"kind": "roof"},
        {"spec": {}},
        {"extents": {"batch": 1, "height": -1}},
    ],
)
def test_schema_refuses_other_keys_and_kinds(changes):
    assert refused_by_schema({**row().to_json(), **changes})
    assert refused_by_schema({**roof().to_json(), **changes, "kind": "roof", "surprise": 1})


# --- files ---------------------------------------------------------------------------------------------------


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
    "later schema": (edited(schema=4), "schema must be 1 to 3, got 4: update tvmdcn, a later version wrote it."),
    "schema of zero": (edited(schema=0), "schema must be 1 to 3, got 0: measure again with this version."),
    "schema of a bool": (edited(schema=True), "schema must be 1 to 3, got True: measure again"),
    "no schema": (edited(schema=...), "schema must be 1 to 3, got None: measure again"),
    "no kind": (edited(kind=...), "kind must be a text, got None"),
    "other direction": (edited(direction="backward"), "direction must be forward, as the operator in spec says"),
    "unknown key": (edited(fast=True), "missing none; unknown fast"),
    "missing key": (edited(runs=...), "missing runs; unknown none"),
    "bad layer": (edited(spec={"operator": "conv"}), "spec is not as the schema says: 'in_channels' is a required"),
    "bad extents": (edited(extents={"batch": 1}), "extents is not as the schema says: 'height' is a required property"),
    "negative width": (edited(extents={"batch": 1, "height": 1, "width": -1}), "extents.width is not as the schema"),
    "layer too small": (edited(extents={"batch": 1, "height": 1, "width": 0}), "the row describes no layer: width"),
    "bad value": (edited(median_ms=None), "median_ms is not as the schema says: None is not of type 'number'"),
    "bad sample": (edited(samples_ms=[[1.0], ["2"]]), "samples_ms[1][0] is not as the schema says: '2' is not"),
    "nan": (edited().replace(b'"p90": 2.25', b'"p90": NaN'), "numbers must be finite, got NaN: measure again"),
    "overflow": (edited().replace(b'"p90": 2.25', b'"p90": 1e999'), "numbers must be finite, got 1e999"),
    "unit": (json.dumps({**roof().to_json(), "unit": "GFLOP/s"}).encode(), "unit must be GB/s, as roof says"),
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
    path.write_bytes(edited() + b"\n" + edited()[:50])
    found = read_row_file(path)
    assert found.measurements == [row()]
    (complaint,) = found.complaints
    assert complaint.startswith(f"{path}, line 2: not a line of JSON")
    assert "it was cut short; measure with --resume to have it again" in complaint
    append_row(path, row(threads=2))
    found = read_row_file(path)
    assert [entry.line for entry in found.entries] == [1, 3]
    assert found.measurements == [row(), row(threads=2)]
    assert len(found.complaints) == 1


def test_row_that_is_not_sound_is_not_written(tmp_path):
    path = tmp_path / "rows.jsonl"
    for data in ({**row().to_json(), "surprise": 1}, {**row().to_json(), "machine": {"cpu": math.nan}}, {"kind": "x"}):
        with pytest.raises(MeasurementError):
            append_row(path, data)
    assert not path.exists()


def test_rows_of_other_kinds_have_room(tmp_path):
    path = tmp_path / "rows.jsonl"
    common = {name: row().to_json()[name] for name in published_schema()["$defs"]["other"]["required"]}
    stage = {**common, "kind": "stage", "stage": "sampling", "milliseconds": [1.5, 2.5]}
    append_row(path, stage)
    append_row(path, row())
    found = read_row_file(path)
    assert (found.others, found.measurements, found.complaints) == ([stage], [row()], [])
    with pytest.raises(MeasurementError, match="missing machine"):
        append_row(path, {name: value for name, value in stage.items() if name != "machine"})


ADDED_IN_3 = (
    *("kind", "spread", "noisy", "p25", "p75", "samples_ms", "note", "run", "device", "affinity", "commit", "cache"),
    *("sweep", "artifact", "tensors", "protocol", "memory_bytes", "memory_prepare_bytes", "memory_resolution_bytes"),
)


def of_schema_2(measurement):
    data = {name: value for name, value in measurement.to_json().items() if name not in ADDED_IN_3}
    return {**data, "schema": 2}


def test_rows_of_earlier_schemas_are_read():
    second = of_schema_2(row())
    first = {name: value for name, value in second.items() if name != "direction"}
    assert Measurement.from_json(second) == row()
    assert Measurement.from_json({**first, "schema": 1}) == row()
    with pytest.raises(MeasurementError, match="a row of schema 1 has no direction: they came later"):
        Measurement.from_json({**second, "schema": 1})
    with pytest.raises(MeasurementError, match="a row of schema 2 has no kind, p25: they came later"):
        Measurement.from_json({**second, "kind": "layer", "p25": None})
    with pytest.raises(MeasurementError, match="missing direction"):
        Measurement.from_json({**first, "schema": 2})
    with pytest.raises(MeasurementError, match="a row of schema 1 is of the operator deform_conv2d"):
        Measurement.from_json({**first, "schema": 1, "spec": GRADIENTS.to_json()})


@pytest.mark.parametrize("path", sorted(MEASUREMENTS.glob("*.jsonl")), ids=lambda path: path.stem)
def test_rows_that_were_published_are_still_read(path):
    rows, complaints = read_rows(path)
    assert complaints == []
    assert rows


def test_file_says_what_to_know_of_its_rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    steady = {"p25": 2.0, "p75": 2.125, "min_ms": 2.0, "p10": 2.0, "p90": 2.25}
    for measurement in (row(**steady), row(**steady, threads=2), row(**steady, machine={"cpu": "a cpu", "cores": 4})):
        append_row(path, measurement)
    append_row(path, roof(**{**steady, "p90": 9.0}))
    with path.open("a") as file:
        file.write(json.dumps(of_schema_2(row(**steady))) + "\n")
    found = read_row_file(path)
    assert found.complaints == []
    assert found.warnings == [
        f"{path}, line 5: of schema 2, without samples, memory and affinity; measure again to have them.",
        f"{path}, line 3: of another machine than the first (cores 4 instead of 2); "
        "rows of different machines are not set beside each other.",
        f"{path}, line 4: unsteady times; measure again on an idle machine.",
    ]


def test_many_lines_are_named_shortly(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"".join(edited(p90=9.0 if n % 2 or n > 30 else 2.25) + b"\n" for n in range(1, 40)))
    (warning,) = read_row_file(path).warnings
    assert "lines 1, 3, 5, 7, 9, 11, 13, 15 and 16 more: unsteady" in warning


def test_reading_without_the_validator_names_the_extra(tmp_path):
    path = tmp_path / "rows.jsonl"
    append_row(path, row())
    code = (
        "import sys\nsys.modules['jsonschema'] = None\n"
        "from tvmdcn import MissingExtra\nfrom tvmdcn.bench.rows import read_rows\n"
        "try:\n    read_rows(sys.argv[1])\n"
        "except MissingExtra as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert "jsonschema, not installed here: pip install 'tvmdcn[bench]'" in done.stdout


def test_ratios_and_rows_do_not_share_a_file_by_chance(tmp_path):
    """Backward rows and forward rows of one layer are told apart after a file, too."""
    path = tmp_path / "rows.jsonl"
    rows = backward_rows()
    for measurement in rows:
        append_row(path, measurement)
    assert read_rows(path) == (rows, [])
    assert [parse_row(json.loads(line)) for line in path.read_text().splitlines()] == rows


# --- statistics ----------------------------------------------------------------------------------------------


def test_percentile_agrees_with_numpy():
    values = [5.0, 1.0, 9.0, 2.5, 2.5, 7.0]
    for share in (0, 0.1, 0.5, 0.9, 1):
        assert percentile(values, share) == pytest.approx(np.quantile(values, share))
    with pytest.raises(ValueError, match="percentile needs values"):
        percentile([], 0.5)


def test_summary_keeps_turns_apart_and_few_values():
    turns = [[3.0, 1.0, 2.0], [], [float(value) for value in range(320, 0, -1)]]
    found = summarize(turns)
    times = [1.0, 2.0, 3.0, *range(1, 321)]
    assert (found["runs"], found["min_ms"], found["median_ms"]) == (323, 1.0, np.median(times))
    for name, share in (("p10", 0.1), ("p25", 0.25), ("p75", 0.75), ("p90", 0.9)):
        assert found[name] == pytest.approx(np.quantile(times, share))
    first, second = found["samples_ms"]
    assert first == (1.0, 2.0, 3.0)
    assert second == pytest.approx(np.quantile(range(1, 321), (np.arange(16) + 0.5) / 16), rel=1e-5)
    assert row(**found).samples_ms == found["samples_ms"]
    with pytest.raises(ValueError, match="percentile needs values"):
        summarize([[], []])


def test_samples_are_short_texts():
    (sample,) = summarize([[math.pi, math.e * 1e-4]])["samples_ms"]
    assert sample == (0.000271828, 3.14159)


STEADY = [[1.0, 1.01, 1.02, 1.03] * 5] * 3


@pytest.mark.parametrize(
    ("turns", "said"),
    [
        (STEADY, None),
        ([[1.0] * 10 + [1.2] * 10] * 3, "the middle half of the calls spreads over 18% of the median"),
        ([[1.0] * 17 + [1.4] * 3] * 3, "one call in ten takes 1.40 times the median or more"),
        ([[1.0] * 20, [1.0] * 20, [1.0] * 20, [1.3] * 4], "the medians of its turns lie 30% of the median apart"),
    ],
)
def test_noise_is_what_the_calls_show(turns, said):
    found = row(**summarize(turns))
    assert found.noise == said
    assert found.noisy == (said is not None)
    assert row(status="failed", reason="why").noisy is None


def test_noise_of_earlier_rows_is_told_by_their_tail():
    assert noise(1.0, 1.25) is None
    assert noise(1.0, 1.26) == "one call in ten takes 1.26 times the median or more"
    assert row(p90=2.6).noisy
    assert not row().noisy
