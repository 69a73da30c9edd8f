# SPDX-License-Identifier: Apache-2.0
"""A benchmark that is stopped keeps its rows, and goes on where it was."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from bench_fakes import QUICK, SMALL, fake, invoke

from tvmdcn.bench.protocol import compare
from tvmdcn.bench.rows import read_row_file, read_rows
from tvmdcn.bench.turns import Protocol
from tvmdcn.problems import TEST_PROBLEMS


def test_resume_measures_what_is_missing(tmp_path, fakes):
    output = tmp_path / "rows.jsonl"
    common = ("--provider", "right", "unsupported", "--output", output)
    invoke("--problem", "row", *common)
    before = output.read_bytes()
    result = invoke("--problem", "row", "column", *common, "--resume")
    assert output.read_bytes().startswith(before)
    rows, _ = read_rows(output)
    assert [(found.problem, found.provider) for found in rows] == [
        (problem, provider) for problem in ("row", "column") for provider in ("right", "unsupported")
    ]
    assert len({found.run for found in rows}) == 2
    told = " ".join(result.stderr.split())
    assert "2 rows were measured before, and were taken from" in told
    assert f"2 rows in {output}." in told
    assert all(f"\u2502 {name} " in result.stdout for name in ("row", "column"))
    # A provider more: a comparison rests on the same moments, so all of it is made again.
    invoke("--problem", "row", "--provider", "right", "unsupported", "floor", "--output", output, "--resume")
    assert len(read_rows(output)[0]) == 7


def test_appending_without_resume_says_what_there_is(tmp_path, fakes):
    output = tmp_path / "rows.jsonl"
    for _ in range(2):
        result = invoke("--problem", "row", "--provider", "right", "--output", output)
    assert len(read_rows(output)[0]) == 2
    told = " ".join(result.stderr.split())
    assert "holds 1 rows; new ones are appended" in told
    assert "--resume measures only what is missing" in told


@pytest.mark.parametrize(
    "change",
    [
        {"machine": {"cpu": "another"}},
        {"versions": {"tvmdcn": "0"}},
        {"threads": 3},
        {"cache": "cold"},
        {"provider": "floor"},
        {"extents": {"batch": 1, "height": 1, "width": 12}},
    ],
)
def test_rows_of_something_else_are_not_taken_over(tmp_path, fakes, change):
    output = tmp_path / "rows.jsonl"
    arguments = ("--problem", "row", "--provider", "right", "--output", output)
    invoke(*arguments)
    data = json.loads(output.read_text())
    output.write_text(json.dumps({**data, **change}) + "\n")
    invoke(*arguments, "--resume")
    rows, complaints = read_rows(output)
    assert (len(rows), complaints) == (2, [])
    assert rows[1].problem == "row"


def test_resume_measures_a_line_again_that_was_cut(tmp_path, fakes):
    output = tmp_path / "rows.jsonl"
    arguments = ("--problem", "row", "column", "--provider", "right", "--output", output)
    invoke(*arguments)
    output.write_bytes(output.read_bytes()[:-40])
    result = invoke(*arguments, "--resume")
    assert "line 2: not a line of JSON" in " ".join(result.stderr.split())
    found = read_row_file(output)
    assert [(entry.line, entry.row.problem) for entry in found.entries] == [(1, "row"), (3, "column")]


DRIVER = """
import sys
sys.path.insert(0, {tests!r})
from bench_fakes import fake
from tvmdcn.bench import command
command.PROVIDERS = {{"patient": fake("patient", "ours"), "right": fake("right")}}
command.main()
"""


def begin(tmp_path, *arguments):
    """Start the command with a provider that takes its time."""
    code = DRIVER.format(tests=str(Path(__file__).parent))
    command = [sys.executable, "-c", code, *map(str, arguments), "--burst", "0.001"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(("stop", "status"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGKILL", -9)])
def test_stopped_command_keeps_its_rows_and_goes_on(tmp_path, stop, status):
    output = tmp_path / "rows.jsonl"
    problems = ("--problem", "row", "column", "pixel", "--provider", "patient", "right", "--output", output)
    process = begin(tmp_path, *problems, "--rounds", "4")
    deadline = time.monotonic() + 60
    while not output.exists() or output.read_text().count("\n") < 2:
        assert time.monotonic() < deadline, "no row was written"
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(getattr(signal, stop))
    out, err = process.communicate(timeout=60)
    assert process.returncode == status, err
    assert "Traceback" not in err
    found = read_row_file(output)
    assert len(found.complaints) <= (stop == "SIGKILL")
    first = [found.provider for found in found.measurements if found.problem == "row"]
    assert first == ["patient", "right"]
    if stop != "SIGKILL":
        assert "comparisons were not made: interrupted. The same command with --resume goes on." in " ".join(
            err.split()
        )
        assert "geometric mean" in out
    process = begin(tmp_path, *problems, "--rounds", "1", "--resume")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    rows = read_rows(output)[0]
    assert [(r.problem, r.provider) for r in rows if r.problem != "column"] == [
        *(("row", name) for name in ("patient", "right")),
        *(("pixel", name) for name in ("patient", "right")),
    ]
    assert all(text in out for text in ("row", "column", "pixel"))


@pytest.mark.parametrize(("at", "kept"), [(1, 0), (2, 0), (3, 2), (4, 3)])
def test_layer_at_hand_is_kept_after_two_rounds(at, kept):
    """A first round and its reverse give everyone the same mean place; fewer say nothing."""
    seen = []

    def step(text):
        if f"round {at} of" in text:
            raise KeyboardInterrupt

    providers = [fake("right", "ours"), fake("noisy")]
    protocol = Protocol(rounds=5, burst_seconds=0.0, min_calls=1)
    with pytest.raises(KeyboardInterrupt):
        compare([SMALL, TEST_PROBLEMS["row"]], [1], providers, protocol=protocol, on_row=seen.append, on_step=step)
    assert [found.provider for found in seen] == (["right", "noisy"] if kept else [])
    for found in seen:
        assert (found.problem, found.runs, found.protocol["rounds"]) == (SMALL.name, kept, kept)


def test_known_rows_of_another_environment_need_the_same_version_of_ours():
    here = fake("right", "ours", python=sys.executable)
    (found,) = compare([SMALL], [1], [here], protocol=QUICK)
    other = dataclasses.replace(found, versions={**found.versions, "torch": "another"})
    taken = []
    assert compare([SMALL], [1], [here], protocol=QUICK, known=[other], on_known=taken.append) == []
    assert taken == [other]
    older = dataclasses.replace(found, versions={**found.versions, "tvmdcn": "older"})
    assert len(compare([SMALL], [1], [here], protocol=QUICK, known=[older])) == 1
