# SPDX-License-Identifier: Apache-2.0
"""The log of trials: nothing that was measured is lost, whatever happens to the process or the last line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tvmdcn.errors import RecordsError
from tvmdcn.space import Decisions
from tvmdcn.tuning.history import TrialLog, TrialRow, histories, read_log

HEADER = {"name": "a_layer", "spec": {"padding": (1, 1)}, "target": "llvm-a", "threads": 1, "source": "abc"}
ROWS = [
    TrialRow(Decisions("full-2-tap", {"unroll": 1}), 2e-3, "", 1.5),
    TrialRow(Decisions("full-2-tap", {"unroll": 2}), None, "wrong result: relative error 1e+00 above 2e-05", 2.0),
    TrialRow(Decisions("split-2-tap", {"unroll": 1, "taps": 3}), 1e-3, "", 3.25, 1, 0.75),
    TrialRow(Decisions("split-2-tap", {"unroll": 1, "taps": 9}), None, "wrong result: other details", 4.0),
]


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """A log with all the rows."""
    path = tmp_path / "llvm-a" / "trials" / "a_layer-t1.jsonl"
    written = TrialLog(path, HEADER)
    for row in ROWS:
        written.add(row)
    return path


def test_log_survives_a_file(log: Path) -> None:
    assert TrialLog(log, HEADER).rows == ROWS
    header, rows = read_log(log)
    assert header == {"schema": 1, **json.loads(json.dumps(HEADER))}
    assert rows == ROWS
    assert log.read_bytes().count(b"\n") == 1 + len(ROWS)


def test_each_trial_is_on_disk_when_add_returns(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    log = TrialLog(path, HEADER)
    for count, row in enumerate(ROWS, 1):
        log.add(row)
        assert read_log(path)[1] == ROWS[:count]


def test_a_cut_at_any_byte_loses_at_most_the_last_trial(log: Path) -> None:
    whole = log.read_bytes()
    for size in range(len(whole) + 1):
        log.write_bytes(whole[:size])
        complete = max(whole[:size].count(b"\n") - 1, 0)
        if size > whole.index(b"\n"):  # with the header cut there is nothing to read yet
            assert read_log(log)[1] == ROWS[:complete]
        continued = TrialLog(log, HEADER)
        assert continued.rows == ROWS[:complete]
        continued.add(ROWS[0])
        assert TrialLog(log, HEADER).rows == [*ROWS[:complete], ROWS[0]]


def test_reading_leaves_a_file_alone(log: Path) -> None:
    with open(log, "ab") as file:
        file.write(b'{"half')
    before = log.read_bytes()
    assert len(read_log(log)[1]) == len(ROWS)
    assert len(list(histories(log.parents[2]))) == 1
    assert log.read_bytes() == before


def test_log_of_another_tuning_is_refused(log: Path) -> None:
    before = log.read_bytes()
    with pytest.raises(RecordsError, match=r"is the log of another tuning: source, threads differ\. Delete it"):
        TrialLog(log, {**HEADER, "threads": 2, "source": "changed"})
    assert log.read_bytes() == before


GOOD = {"decisions": {"variant": "v", "values": {"a": 1}}, "seconds": 1e-3, "reason": "", "elapsed": 1.0}


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"null",
        b"[]",
        b'"text"',
        b"{",
        b"\xff\xfe",
        b"[" * 100_000,
        json.dumps({**GOOD, "seconds": "fast"}).encode(),
        json.dumps({**GOOD, "seconds": True}).encode(),
        json.dumps({**GOOD, "seconds": 0}).encode(),
        json.dumps({**GOOD, "seconds": -1}).encode(),
        json.dumps({**GOOD, "seconds": float("nan")}).encode(),
        json.dumps({**GOOD, "seconds": float("inf")}).encode(),
        json.dumps({**GOOD, "seconds": None}).encode(),
        json.dumps({**GOOD, "reason": "build: x"}).encode(),
        json.dumps({**GOOD, "reason": None}).encode(),
        json.dumps({**GOOD, "elapsed": -1}).encode(),
        json.dumps({**GOOD, "elapsed": "1"}).encode(),
        json.dumps({**GOOD, "decisions": {"variant": 1, "values": {}}}).encode(),
        json.dumps({**GOOD, "decisions": {"variant": "v", "values": {"a": "1"}}}).encode(),
        json.dumps({**GOOD, "decisions": {"variant": "v", "values": {"a": 1.5}}}).encode(),
        json.dumps({"seconds": 1}).encode(),
        json.dumps({**GOOD, "round": -1}).encode(),
        json.dumps({**GOOD, "round": 1.5}).encode(),
        json.dumps({**GOOD, "round": True}).encode(),
        json.dumps({**GOOD, "predicted": "well"}).encode(),
        json.dumps({**GOOD, "predicted": float("nan")}).encode(),
    ],
    ids=lambda line: line[:60].decode(errors="replace"),
)
def test_damaged_line_is_named(log: Path, line: bytes) -> None:
    lines = log.read_bytes().split(b"\n")
    log.write_bytes(b"\n".join([*lines[:2], line, *lines[2:]]))
    with pytest.raises(RecordsError, match=r"a_layer-t1\.jsonl, line 3 cannot be read: .* Delete it and tune again"):
        read_log(log)
    with pytest.raises(RecordsError, match="line 3"):
        TrialLog(log, HEADER)


@pytest.mark.parametrize("header", [b"[]", b"{}", b'{"schema": 2}', b"7"])
def test_file_that_is_no_log_is_refused(log: Path, header: bytes) -> None:
    log.write_bytes(header + b"\n")
    with pytest.raises(RecordsError, match="line 1 cannot be read: its schema is not 1"):
        read_log(log)


def test_trials_of_earlier_versions_have_no_round_and_no_prediction(log: Path) -> None:
    with open(log, "a") as file:
        file.write(json.dumps(GOOD) + "\n")
    row = read_log(log)[1][-1]
    assert (row.round, row.predicted) == (None, None)
    (history,) = histories(log.parents[2])
    assert [(trial.round, trial.predicted) for trial in history.trials[1:3]] == [(None, None), (1, 0.75)]
    assert history.threads == 1


def test_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RecordsError, match="cannot be read"):
        read_log(tmp_path / "none.jsonl")


def test_histories_are_what_a_report_shows(log: Path) -> None:
    (history,) = histories(log.parents[2])
    assert (history.problem, history.source) == ("a_layer", "llvm-a")
    assert [trial.time_ms for trial in history.trials] == [2.0, None, 1.0, None]
    assert [trial.index for trial in history.trials] == [0, 1, 2, 3]
    assert history.failures == {"wrong result": 2}, "failures of one kind are counted together"
    assert history.best is history.trials[2]
    assert history.trials[2].decisions == {"variant": "split-2-tap", "unroll": "1", "taps": "3"}
    assert history.trials[-1].elapsed_s == 4.0


def test_histories_are_found_below_any_folder(log: Path, tmp_path: Path) -> None:
    second = tmp_path / "llvm-b" / "trials" / "b-t2.jsonl"
    TrialLog(second, {**HEADER, "name": "b"})
    found = [(history.problem, len(history.trials)) for history in histories(tmp_path)]
    assert found == [("a_layer", 4), ("b", 0)]
    assert len(list(histories(tmp_path / "llvm-b"))) == 1
    assert list(histories(tmp_path / "nowhere")) == []


def test_damaged_log_is_no_history(log: Path) -> None:
    log.write_bytes(b"nothing\n")
    with pytest.raises(RecordsError, match="line 1"):
        list(histories(log.parents[2]))
