# SPDX-License-Identifier: Apache-2.0
"""Tuning: it searches for real on this machine, survives what ends it, and never keeps a wrong kernel.

The tests with `FakeWorkers` build and run nothing: they are about what a session makes of the outcomes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from click.testing import CliRunner
from compiled import error_of, run

pytest.importorskip("xgboost")
pytest.importorskip("psutil")
pytest.importorskip("cloudpickle")

from tvmdcn.bench.command import benchmark_command
from tvmdcn.builder import build
from tvmdcn.errors import RecordsError, SpecError, SpecTypeError, TuningError
from tvmdcn.kernel import Kernel
from tvmdcn.problems import make_tensors, parse_problem
from tvmdcn.reference import reference
from tvmdcn.space import space_of
from tvmdcn.spec import Extents
from tvmdcn.target import detect_target, resolve_target
from tvmdcn.te import operator_of
from tvmdcn.tuning import session as session_module
from tvmdcn.tuning import trial
from tvmdcn.tuning import tuner as tuner_module
from tvmdcn.tuning import workers as workers_module
from tvmdcn.tuning.farm import Machine, ServersLost
from tvmdcn.tuning.history import read_log
from tvmdcn.tuning.records import META, TuningRecords
from tvmdcn.tuning.search import Search, uninterrupted
from tvmdcn.tuning.trial import Job, Outcome
from tvmdcn.tuning.tuner import Layer, Progress, TuningResult, tune, tune_together

TAG = detect_target().tag
# The smallest layer with more than one variant of schedules, and room for a search.
SMALL = parse_problem("1,8,6,7,8")
# One with many variants, so that there is much to try before the slow search begins.
MANY = parse_problem("1,32,9,10,32,og=4")
VARIANTS = space_of(SMALL.spec.operator, "llvm").variants(SMALL.spec, detect_target())
# The defaults of all variants, what is known of a similar layer, and a few that the search proposes.
TRIALS = len(VARIANTS) + 3
# A search on two busy cores takes a minute; more means that something hangs.
PATIENCE = 180.0


def log_of(root: Path, name: str = "small") -> Path:
    return root / TAG / "trials" / f"{name}-t1.jsonl"


def rows_of(root: Path, name: str = "small") -> list[dict]:
    return [json.loads(line) for line in log_of(root, name).read_text().splitlines()[1:]]


def identities(rows: list[dict]) -> list[str]:
    return [json.dumps(row["decisions"], sort_keys=True) for row in rows]


# -- for real ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> tuple[TuningResult, Path, list[Progress]]:
    """A real tuning of a small layer: its result, where its records are, and what it reported."""
    root, states = tmp_path_factory.mktemp("records"), []
    result = tune(
        SMALL.spec,
        SMALL.extents,
        trials=TRIALS,
        threads=1,
        records=root,
        name="small",
        warm_starts=1,
        progress=states.append,
    )
    return result, root, states


def test_tuning_keeps_what_it_measured(tuned: tuple[TuningResult, Path, list[Progress]]) -> None:
    result, root, states = tuned
    rows = rows_of(root)
    assert (result.trials, result.new_trials, len(rows), result.interrupted) == (
        TRIALS,
        TRIALS,
        TRIALS,
        False,
    )
    assert len(set(identities(rows))) == TRIALS, "a schedule was measured twice"
    assert all(bool(row["reason"]) is (row["seconds"] is None) for row in rows)
    assert sum(result.failures.values()) == sum(row["seconds"] is None for row in rows)
    assert [row["elapsed"] for row in rows] == sorted(row["elapsed"] for row in rows)
    tried = [row["decisions"]["variant"] for row in rows]
    assert tried[0] == VARIANTS[0], "the default comes first"
    assert set(tried[: len(VARIANTS) + 1]) == set(VARIANTS), "every variant's default is tried"
    assert {state.stage for state in states} == {"search", "build", "measure", "final"}
    assert [state.trials for state in states] == sorted(state.trials for state in states)
    assert states[-1].trials == TRIALS
    assert states[-1].best <= states[-1].default


def test_tuning_writes_a_record_with_provenance(tuned: tuple[TuningResult, Path, list[Progress]]) -> None:
    result, root, _ = tuned
    assert result.path == root / TAG / META
    (record,) = TuningRecords.read(root, TAG).records
    assert record == result.record
    assert (record.spec, record.extents, record.threads, record.trials) == (*SMALL_LAYER, 1, TRIALS)
    assert record.decisions.to_json() in [row["decisions"] for row in rows_of(root)]
    assert 0 < record.seconds <= record.default_seconds
    assert {"cpu", "system", "date", "source", "target", "versions"} <= set(record.provenance)
    assert {"apache-tvm", "apache-tvm-ffi", "numpy", "python", "tvmdcn"} <= set(record.provenance["versions"])


SMALL_LAYER = (SMALL.spec, SMALL.extents)


def test_tuned_build_gives_the_references_numbers(
    tuned: tuple[TuningResult, Path, list[Progress]], cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result, root, _ = tuned
    monkeypatch.setenv("TVMDCN_RECORDS", str(root))
    artifact = build(SMALL.spec, schedule="tuned", cache_dir=cache_dir)
    assert artifact.schedule["source"] == f"tuned: {TRIALS} trials"
    assert artifact.schedule["decisions"] == result.record.decisions.to_json()
    for extents in (SMALL.extents, Extents(3, 11, 4)):
        tensors = make_tensors(SMALL.spec, extents, seed=1)
        found = run(Kernel(artifact, 2), tensors)
        assert error_of(found, reference(SMALL.spec, tensors)) < 2e-6


def test_nothing_is_left_to_do_when_all_trials_are_there(
    tuned: tuple[TuningResult, Path, list[Progress]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuner_module, "Workers", FakeWorkers)
    _, root, _ = tuned
    shutil.copytree(root, tmp_path / "copy")
    before = log_of(root).read_bytes()
    result = tune(SMALL.spec, SMALL.extents, trials=2, threads=1, records=tmp_path / "copy", name="small")
    assert (result.trials, result.new_trials) == (TRIALS, 0)
    assert log_of(tmp_path / "copy").read_bytes() == before


# A child of a shell's background job inherits that Ctrl-C is ignored: said explicitly, it is not.
_COMMAND = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from tvmdcn.cli import main
main(prog_name="tvmdcn")
"""


def start(root: Path) -> subprocess.Popen[str]:
    """Begin a long tuning in a process group of its own."""
    words = ["tune", "--problem", "1,8,6,7,8", "--trials", "500", "--threads", "1", "--output", root]
    return subprocess.Popen(
        [sys.executable, "-c", _COMMAND, *map(str, words)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "TMPDIR": str(root)},  # what a killed process leaves behind goes with the test's
        text=True,
        start_new_session=True,
    )


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[Path, int, str, str]]]:
    """Two tunings that were ended from outside after two trials, one by SIGKILL, one by Ctrl-C.

    For each the root of its records, its exit status, and what it wrote.
    """
    signals = {"kill": signal.SIGKILL, "interrupt": signal.SIGINT}
    roots = {name: tmp_path_factory.mktemp(name) for name in signals}
    processes = {name: start(root) for name, root in roots.items()}
    try:
        deadline, waiting = time.monotonic() + PATIENCE, set(signals)
        while waiting and time.monotonic() < deadline:
            for name in sorted(waiting):
                log = log_of(roots[name], "1,8,6,7,8")
                if log.is_file() and log.read_bytes().count(b"\n") > 2:
                    os.killpg(processes[name].pid, signals[name])
                    waiting.discard(name)
                elif processes[name].poll() is not None:
                    pytest.fail(f"the tuning ended by itself: {processes[name].communicate()}")
            time.sleep(0.05)
        assert not waiting, f"no two trials in {PATIENCE} s"
        yield {
            name: (roots[name], *reversed([*process.communicate(timeout=PATIENCE), process.wait()]))
            for name, process in processes.items()
        }
    finally:
        for process in processes.values():
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()


def test_killed_tuning_has_lost_nothing(ended: dict[str, tuple[Path, int, str, str]]) -> None:
    root, status, _, _ = ended["kill"]
    name = "1,8,6,7,8"
    assert status == -signal.SIGKILL
    assert not (root / TAG / META).exists()
    before = rows_of(root, name)
    assert len(before) >= 2
    with open(log_of(root, name), "a") as file:
        file.write('{"decisions": {"val')  # what a kill in the middle of a write leaves behind
    result = tune(SMALL.spec, SMALL.extents, trials=len(before) + 1, threads=1, records=root, name=name)
    after = rows_of(root, name)
    assert after[: len(before)] == before
    assert (result.trials, result.new_trials, len(after)) == (len(before) + 1, 1, len(before) + 1)
    assert len(set(identities(after))) == len(after), "a trial was repeated"
    assert after[-1]["elapsed"] > before[-1]["elapsed"]
    assert TuningRecords.read(root, TAG).best(SMALL.spec).decisions == result.record.decisions


def test_interrupted_tuning_keeps_the_best(ended: dict[str, tuple[Path, int, str, str]]) -> None:
    root, status, stderr, stdout = ended["interrupt"]
    assert status == 0, stderr
    assert "Traceback" not in stdout + stderr
    (record,) = TuningRecords.read(root, TAG).records
    measured = [row for row in rows_of(root, "1,8,6,7,8") if row["seconds"] is not None]
    best = min(measured, key=lambda row: row["seconds"])
    assert (record.decisions.to_json(), record.seconds) == (best["decisions"], best["seconds"])
    lines = stdout.splitlines()
    assert lines[0].startswith("1,8,6,7,8: ")
    assert f"schedule: variant {record.decisions.variant}" in lines[1]
    assert lines[-3:-1] == [
        "interrupted; run the same command again to continue",
        f"records: {root / TAG / META}",
    ]
    setting, program, command, *arguments = shlex.split(lines[-1].removeprefix("next: "))
    assert (setting, program, command) == (f"TVMDCN_RECORDS={root}", "tvmdcn", "benchmark")
    # It can be run as it stands: without rounds to measure it ends where measuring would begin.
    assert CliRunner().invoke(benchmark_command, [*arguments, "--time-budget", "0"]).exit_code == 1
    assert parse_problem(arguments[arguments.index("--problem") + 1]).spec == SMALL.spec


def test_progress_in_a_file_is_a_line_for_each_round(ended: dict[str, tuple[Path, int, str, str]]) -> None:
    root, _, stderr, _ = ended["interrupt"]
    lines = [line for line in stderr.splitlines() if " trials · " in line]
    assert lines[0] == "1,8,6,7,8: 0 of 500 trials · searching"
    assert len(lines) < len(rows_of(root, "1,8,6,7,8")), "a line for each round, not for each trial"
    assert len(set(lines)) == len(lines)


def test_wrong_results_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    operator = operator_of(SMALL.spec)

    def changed(*arguments: object) -> dict[str, np.ndarray]:
        results = operator.expected(*arguments)
        for result in results.values():
            result[0, 0, 0, 0] += 0.01 * np.abs(result).max()  # one element of hundreds, by a hundredth
        return results

    monkeypatch.setattr(session_module, "operator_of", lambda _: dataclasses.replace(operator, expected=changed))
    with pytest.raises(TuningError, match=r"none of 2 schedules .* \(2 x wrong result\).* relative error"):
        tune(SMALL.spec, SMALL.extents, trials=2, threads=1, records=tmp_path, name="small")
    assert [row["seconds"] for row in rows_of(tmp_path)] == [None, None]
    assert not (tmp_path / TAG / META).exists()


def test_when_every_build_fails_the_first_reason_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nowhere/no-such-compiler")
    with pytest.raises(TuningError, match=r"\(\d+ x build\)\. The first failure: build: .*no-such-compiler"):
        tune(SMALL.spec, SMALL.extents, trials=50, threads=1, records=tmp_path, name="small")
    assert len(rows_of(tmp_path)) < 20, "if every default fails, nothing else is tried"
    # The compiler is there again: what failed for its sake is tried once more.
    monkeypatch.undo()
    monkeypatch.setattr(tuner_module, "Workers", FakeWorkers)
    assert tune(SMALL.spec, SMALL.extents, trials=2, threads=1, records=tmp_path, name="small").failures == {}


# -- with workers that only pretend -----------------------------------------------------------------


class FakeWorkers:
    """Builds and measures nothing; `outcome` says how the n-th trial ends, `final` what finalists take."""

    outcome: Callable[[int], Outcome] = staticmethod(lambda number: Outcome((0.001 * (number + 1),), 1e-7))
    final: Callable[[int], Outcome] | None = None

    def __init__(self, builders: int, measuring: object = None) -> None:
        self.measured = itertools.count()

    def __enter__(self) -> FakeWorkers:
        return self

    def __exit__(self, *details: object) -> None:
        pass

    def trials(self, job: Job, candidates: list) -> Iterator[tuple[int, Outcome]]:
        assert (job.directory / "inputs.npz").is_file()
        for place in range(len(candidates)):
            yield place, type(self).outcome(next(self.measured))

    def compare(self, job: Job, candidates: list, rounds: int) -> list[Outcome]:
        final = type(self).final or (lambda place: Outcome((0.001 * (place + 1),), 1e-7))
        return [final(place) for place in range(len(candidates))]


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Replace the workers of tunings; a call sets how trials end."""
    monkeypatch.setattr(tuner_module, "Workers", FakeWorkers)

    def set_outcomes(
        outcome: Callable[[int], Outcome] | None = None, final: Callable[[int], Outcome] | None = None
    ) -> None:
        if outcome is not None:
            monkeypatch.setattr(FakeWorkers, "outcome", staticmethod(outcome))
        if final is not None:
            monkeypatch.setattr(FakeWorkers, "final", staticmethod(final))

    return set_outcomes


def tune_many(root: Path, trials: int = 4, **options: object) -> TuningResult:
    return tune(
        MANY.spec,
        MANY.extents,
        **{"trials": trials, "threads": 1, "records": root, "name": "small", **options},
    )


def milliseconds(*values: float) -> Callable[[int], Outcome]:
    return lambda number: Outcome((1e-3 * values[number],), 1e-7)


def test_fastest_schedule_wins_unless_it_is_wrong(tmp_path: Path, pretend: Callable[..., None]) -> None:
    wrong = Outcome(error=0.3, reason="wrong result: relative error 3e-01 above 2e-05")
    crash = Outcome(reason="crash: Subprocess terminated")
    pretend(lambda n: [Outcome((4e-3,), 0.0), wrong, Outcome((2e-3,), 0.0), crash][n])
    result = tune_many(tmp_path)
    rows = rows_of(tmp_path)
    assert result.record.decisions.to_json() == rows[2]["decisions"]
    assert result.failures == {"wrong result": 1, "crash": 1}
    assert [row["reason"].partition(":")[0] for row in rows] == ["", "wrong result", "", "crash"]


def test_the_final_decides_among_the_best(tmp_path: Path, pretend: Callable[..., None]) -> None:
    # Finalists: the fastest three of the search, and the default. In turns, the third is the fastest.
    pretend(milliseconds(9, 1, 2, 3), milliseconds(8, 7, 5, 6))
    result = tune_many(tmp_path)
    assert result.record.decisions.to_json() == rows_of(tmp_path)[3]["decisions"]
    assert (result.record.seconds, result.record.default_seconds) == (5e-3, 6e-3)


def test_default_that_is_fastest_stays(tmp_path: Path, pretend: Callable[..., None]) -> None:
    pretend(milliseconds(1, 2, 3, 4), milliseconds(1, 1.5, 2))
    record = tune_many(tmp_path).record
    assert record.decisions.to_json() == rows_of(tmp_path)[0]["decisions"]
    assert record.seconds == record.default_seconds == 1e-3


def test_final_in_which_all_fail_falls_back_on_the_search(tmp_path: Path, pretend: Callable[..., None]) -> None:
    pretend(milliseconds(3, 1, 2, 4), lambda place: Outcome(reason="time-out: run"))
    record = tune_many(tmp_path).record
    assert record.decisions.to_json() == rows_of(tmp_path)[1]["decisions"]
    assert (record.seconds, record.default_seconds) == (1e-3, 3e-3)


def test_time_budget_ends_the_search(tmp_path: Path, pretend: Callable[..., None]) -> None:
    pretend()
    started = time.monotonic()
    result = tune_many(tmp_path, trials=10_000, time_budget=1e-6)
    assert result.trials == 1, "nothing begins after the budget, once there is something to keep"
    assert time.monotonic() - started < PATIENCE / 3


def test_ctrl_c_between_trials_keeps_the_best(tmp_path: Path, pretend: Callable[..., None]) -> None:
    def outcome(number: int) -> Outcome:
        if number == 3:
            raise KeyboardInterrupt
        return Outcome(((3e-3, 1e-3, 2e-3)[number],), 0.0)

    pretend(outcome)
    result = tune_many(tmp_path)
    assert (result.interrupted, result.trials) == (True, 3)
    assert result.record.decisions.to_json() == rows_of(tmp_path)[1]["decisions"]
    assert (result.record.seconds, result.record.default_seconds) == (1e-3, 3e-3)


def test_ctrl_c_in_the_final_keeps_the_best(tmp_path: Path, pretend: Callable[..., None]) -> None:
    def interrupt(place: int) -> Outcome:
        raise KeyboardInterrupt

    pretend(milliseconds(2, 1, 3, 4), interrupt)
    result = tune_many(tmp_path)
    assert result.interrupted
    assert result.record.decisions.to_json() == rows_of(tmp_path)[1]["decisions"]
    assert TuningRecords.read(tmp_path, TAG).records == [result.record]


def test_ctrl_c_before_anything_was_measured_keeps_nothing(tmp_path: Path, pretend: Callable[..., None]) -> None:
    def interrupt(number: int) -> Outcome:
        raise KeyboardInterrupt

    pretend(interrupt)
    with pytest.raises(KeyboardInterrupt):
        tune_many(tmp_path)
    assert not (tmp_path / TAG / META).exists()


def test_ctrl_c_waits_until_the_compiler_has_returned() -> None:
    # A shell without a terminal starts background processes with the signal ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        check_ctrl_c()
    finally:
        signal.signal(signal.SIGINT, before)


def check_ctrl_c() -> None:
    steps = []
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012 - what counts is which statement raises
        with uninterrupted():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
            steps.append("inside")
        steps.append("outside")
    assert steps == ["inside"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_two_tunings_of_a_layer_do_not_mix(tmp_path: Path, pretend: Callable[..., None]) -> None:
    refusals = []

    def outcome(number: int) -> Outcome:
        with pytest.raises(TuningError, match=r"another process is tuning small-t1 into .*Wait for it") as info:
            tune_many(tmp_path)
        refusals.append(info)
        return Outcome((1e-3,), 0.0)

    pretend(outcome)
    tune_many(tmp_path, trials=2)
    assert len(refusals) == 2
    assert len(rows_of(tmp_path)) == 2


def test_tunings_of_two_layers_keep_both_records(tmp_path: Path, pretend: Callable[..., None]) -> None:
    ready = []

    def outcome(number: int) -> Outcome:
        if not ready:  # while the first layer is being tuned, the second begins and ends
            ready.append(True)
            tune(SMALL.spec, SMALL.extents, trials=1, threads=1, records=tmp_path, name="other")
        return Outcome((1e-3,), 0.0)

    pretend(outcome)
    tune_many(tmp_path, trials=1)
    assert {record.spec for record in TuningRecords.read(tmp_path, TAG).records} == {MANY.spec, SMALL.spec}


def test_each_number_of_threads_has_its_record(tmp_path: Path, pretend: Callable[..., None]) -> None:
    pretend()
    for threads in (1, 2, 1):
        tune_many(tmp_path, trials=1, threads=threads)
    records = TuningRecords.read(tmp_path, TAG)
    assert [record.threads for record in records.records] == [1, 2]
    assert log_of(tmp_path).with_name("small-t2.jsonl").is_file()


def test_trials_of_other_code_are_forgotten(
    tmp_path: Path, pretend: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend()
    tune_many(tmp_path, trials=3)
    monkeypatch.setattr(session_module, "source_digest", lambda: "changed")
    result = tune_many(tmp_path, trials=1)
    assert (result.trials, result.new_trials) == (1, 1)


def test_fresh_forgets_and_resume_continues(tmp_path: Path, pretend: Callable[..., None]) -> None:
    pretend()
    first = tune_many(tmp_path, trials=2)
    second = tune_many(tmp_path, trials=2)
    third = tune_many(tmp_path, trials=2, resume=False)
    assert [result.new_trials for result in (first, second, third)] == [2, 0, 2]


def test_what_was_found_for_a_similar_layer_is_tried_early(
    tmp_path: Path, pretend: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TVMDCN_RECORDS", str(tmp_path))
    pretend(milliseconds(2, 1, 3, 4), milliseconds(1, 2, 3))
    found = tune_many(tmp_path).record.decisions
    similar = parse_problem("1,48,5,5,32,og=4")
    pretend(milliseconds(1, 2))
    tune(similar.spec, similar.extents, trials=2, threads=1, records=tmp_path, name="similar")
    assert rows_of(tmp_path, "similar")[1]["decisions"]["variant"] == found.variant


def test_candidates_are_measured_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in the order in which they were built: the default comes first, whatever else the machine does."""

    class LateFirst:
        """Ends the builds from the last to the first, once all are there."""

        def __init__(self, **_: object) -> None:
            self.builds: list[Future[str]] = []

        def submit(self, *_: object) -> Future[str]:
            self.builds.append(Future())
            if len(self.builds) == 3:
                threading.Thread(target=self.end).start()
            return self.builds[-1]

        def end(self) -> None:
            for late in reversed(self.builds):
                late.set_result("")
                time.sleep(0.05)

        def shutdown(self) -> None:
            pass

    class Measuring:
        alone = True

        def submit(self, job: Job, names: list[str], rounds: int) -> Future[list[Outcome]]:
            measured: Future[list[Outcome]] = Future()
            measured.set_result([Outcome((1.0,), 0.0)])
            return measured

        def close(self) -> None:
            pass

    monkeypatch.setattr(workers_module, "PopenPoolExecutor", LateFirst)
    job = Job(SMALL.spec, SMALL.extents, detect_target(), 1, tmp_path)
    default = Search(SMALL.spec, SMALL.extents, detect_target(), 0).names.defaults[VARIANTS[0]]
    with workers_module.Workers(2, Measuring()) as workers:
        assert [place for place, _ in workers.trials(job, [default] * 3)] == [0, 1, 2]


# -- several layers ---------------------------------------------------------------------------------

BOTH = [Layer(SMALL.spec, SMALL.extents, "small"), Layer(MANY.spec, MANY.extents, "many")]
FIRST = {layer.name: len(space_of(layer.spec.operator, "llvm").variants(layer.spec, detect_target())) for layer in BOTH}


class ByLayer(FakeWorkers):
    """Every schedule of a layer takes the same time; `outcomes` says what, by input channels."""

    outcomes: ClassVar[dict[int, Outcome]] = {}

    def trials(self, job: Job, candidates: list) -> Iterator[tuple[int, Outcome]]:
        for place in reversed(range(len(candidates))):  # as it may be with several machines
            yield place, self.outcomes[job.spec.in_channels]


@pytest.fixture
def by_layer(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Replace the workers; a call sets how long the two layers take."""
    monkeypatch.setattr(tuner_module, "Workers", ByLayer)

    def set_outcomes(small: Outcome, many: Outcome) -> None:
        monkeypatch.setattr(ByLayer, "outcomes", {SMALL.spec.in_channels: small, MANY.spec.in_channels: many})

    return set_outcomes


def together(root: Path, trials: int, layers: list[Layer] = BOTH, **options: object) -> list:
    return tune_together(layers, **{"trials": trials, "threads": 1, "records": root, "warm_starts": 0, **options})


@pytest.mark.parametrize(("weight", "favoured"), [(1.0, "many"), (100.0, "small")])
def test_trials_go_where_the_weighted_time_falls_fastest(
    weight: float, favoured: str, tmp_path: Path, by_layer: Callable[..., None]
) -> None:
    by_layer(Outcome((1e-3,), 0.0), Outcome((9e-3,), 0.0))
    layers = [dataclasses.replace(BOTH[0], weight=weight), BOTH[1]]
    states: list[Progress] = []
    results = together(tmp_path, sum(FIRST.values()) + 2, layers, progress=states.append)
    more = {layer.name: result.trials - FIRST[layer.name] for layer, result in zip(BOTH, results, strict=True)}
    assert more == {"small": 0, "many": 0, favoured: 2}
    assert {record.spec for record in TuningRecords.read(tmp_path, TAG).records} == {SMALL.spec, MANY.spec}
    assert {(state.name, state.weight) for state in states} == {("small", weight), ("many", 1.0)}
    assert [len(rows_of(tmp_path, layer.name)) for layer in BOTH] == [result.trials for result in results]


def test_every_layer_has_a_share_of_few_trials(tmp_path: Path, by_layer: Callable[..., None]) -> None:
    by_layer(Outcome((1e-3,), 0.0), Outcome((9e-3,), 0.0))
    assert [result.trials for result in together(tmp_path, 2)] == [1, 1]
    # And earlier ones count.
    assert [result.new_trials for result in together(tmp_path, 2)] == [0, 0]


def test_layer_that_fails_leaves_the_trials_to_the_others(tmp_path: Path, by_layer: Callable[..., None]) -> None:
    by_layer(Outcome(reason="crash: it does"), Outcome((9e-3,), 0.0))
    failed, result = together(tmp_path, sum(FIRST.values()) + 1)
    assert isinstance(failed, TuningError)
    assert f"none of {FIRST['small']} schedules" in str(failed)
    assert result.trials == FIRST["many"] + 1
    assert [record.spec for record in TuningRecords.read(tmp_path, TAG).records] == [MANY.spec]


@pytest.mark.parametrize("end", [KeyboardInterrupt(), ServersLost("all of them are gone")], ids=["Ctrl-C", "no server"])
def test_early_end_keeps_the_best_of_every_layer(
    end: BaseException, tmp_path: Path, pretend: Callable[..., None]
) -> None:
    count = FIRST["small"] + 2

    def outcome(number: int) -> Outcome:
        if number == count:
            raise end
        return Outcome((1e-3 * (count - number),), 0.0)

    pretend(outcome)
    results = together(tmp_path, 50)
    assert [(result.trials, result.interrupted) for result in results] == [(FIRST["small"], True), (2, True)]
    assert [result.record.seconds for result in results] == [pytest.approx(3e-3), pytest.approx(1e-3)]
    assert len(TuningRecords.read(tmp_path, TAG).records) == 2


def test_end_before_anything_was_measured_is_told(tmp_path: Path, pretend: Callable[..., None]) -> None:
    def outcome(number: int) -> Outcome:
        raise ServersLost("all of them are gone")

    pretend(outcome)
    with pytest.raises(ServersLost, match="all of them are gone"):
        together(tmp_path, 50)


def test_records_say_which_machine_measured_the_winner(tmp_path: Path, pretend: Callable[..., None]) -> None:
    machines = [{"cpu": f"machine {number}", "versions": {}} for number in range(9)]
    pretend(
        lambda number: Outcome((1e-3 * (number + 1),), 0.0, machine=machines[number]),
        lambda place: Outcome((1e-3 * (9 - place),), 0.0, machine=machines[7]),
    )
    provenance = tune_many(tmp_path).record.provenance
    assert provenance["cpu"] == "machine 7"
    assert {"date", "source"} <= set(provenance)


class PretendedFarm:
    """Servers of another target with four threads; what they answer, `FakeWorkers` says."""

    machine = Machine(resolve_target("neoverse-n1"), 4, {"cpu": "a server's", "versions": {}})

    @contextlib.contextmanager
    def opened(self, target: object, threads: int | None) -> Iterator[Machine]:
        assert (target, threads) == (None, None)
        yield self.machine


def test_farm_decides_target_and_threads_and_is_the_provenance(tmp_path: Path, pretend: Callable[..., None]) -> None:
    def interrupt(place: int) -> Outcome:
        raise KeyboardInterrupt

    # The trials are of an earlier run, whose machines nobody has noted.
    pretend(milliseconds(2, 1), interrupt)
    for _ in range(2):
        options = {"trials": 2, "records": tmp_path, "name": "small", "farm": PretendedFarm()}
        record = tune(MANY.spec, MANY.extents, **options).record
    assert record.threads == 4
    assert record.provenance["cpu"] == "a server's"
    assert TuningRecords.read(tmp_path, "llvm-neoverse-n1").records == [record]
    assert (tmp_path / "llvm-neoverse-n1" / "trials" / "small-t4.jsonl").is_file()


@pytest.mark.parametrize(
    ("layers", "options", "message"),
    [
        (BOTH, {"trials": 1}, "trials must be at least 1 for each of the 2 layers, got 1"),
        ([BOTH[0], BOTH[0]], {}, "two layers would share the log small"),
        (BOTH, {"warm_starts": -1}, "warm_starts must be at least 0"),
    ],
)
def test_bad_arguments_of_several_layers_are_refused(
    layers: list[Layer], options: dict, message: str, tmp_path: Path
) -> None:
    with pytest.raises(SpecError, match=message):
        together(tmp_path, **{"trials": 9, "layers": layers, **options})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf"), "2"])
def test_weights_are_positive_numbers(weight: object) -> None:
    with pytest.raises(SpecError, match="weight must be a positive number"):
        Layer(SMALL.spec, SMALL.extents, weight=weight)


def test_log_of_another_layer_is_not_continued(tmp_path: Path, pretend: Callable[..., None]) -> None:
    pretend()
    tune_many(tmp_path, trials=1)
    before = log_of(tmp_path).read_bytes()
    with pytest.raises(RecordsError, match=r"is the log of another tuning: extents, spec differ"):
        tune(SMALL.spec, SMALL.extents, trials=1, threads=1, records=tmp_path, name="small")
    assert log_of(tmp_path).read_bytes() == before


@pytest.mark.parametrize("name", ["../../elsewhere", "/etc/passwd", ".hidden", "a b\n;c", "\u4e16", "x" * 4000])
def test_hostile_names_stay_in_the_folder(name: str, tmp_path: Path, pretend: Callable[..., None]) -> None:
    pretend()
    root = tmp_path / "in" / "side"
    result = tune_many(root, trials=1, name=name)
    assert result.trials == 1
    (log,) = (root / TAG / "trials").glob("[!.]*.jsonl")
    assert read_log(log)[0]["name"] == name
    assert {path.name for path in tmp_path.rglob("*") if path.is_dir()} == {"in", "side", TAG, "trials"}


def test_damaged_records_are_told_before_the_search(tmp_path: Path, pretend: Callable[..., None]) -> None:
    path = tmp_path / TAG / META
    path.parent.mkdir()
    path.write_text("{")
    with pytest.raises(RecordsError, match=r"meta\.json cannot be used"):
        tune_many(tmp_path)
    assert path.read_text() == "{"
    assert not log_of(tmp_path).exists()


def test_damaged_log_is_told(tmp_path: Path, pretend: Callable[..., None]) -> None:
    pretend()
    tune_many(tmp_path, trials=2)
    text = log_of(tmp_path).read_bytes()
    log_of(tmp_path).write_bytes(text.replace(b'"variant"', b'"varia\xff"', 1))
    with pytest.raises(RecordsError, match=r"small-t1\.jsonl, line 2 cannot be read"):
        tune_many(tmp_path)
    assert tune_many(tmp_path, resume=False).trials == 4


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"spec": "r50_c4"}, SpecTypeError, "spec must be a DeformConv2dSpec"),
        ({"trials": 0}, SpecError, "trials must be at least 1"),
        ({"trials": 1.5}, SpecTypeError, "trials must be made of ints"),
        ({"threads": 0}, SpecError, "threads must be at least 1"),
        ({"threads": -2}, SpecError, "threads must be at least 1"),
        ({"time_budget": 0}, SpecError, "time_budget must be a positive number"),
        ({"time_budget": float("nan")}, SpecError, "time_budget must be a positive number"),
        ({"time_budget": "1"}, SpecError, "time_budget must be a positive number"),
        ({"extents": Extents(0, 6, 7)}, SpecError, r"extents\.batch must be at least 1"),
        ({"target": "pentium"}, SpecError, "target 'pentium' is not known"),
    ],
    ids=lambda value: str(value)[:30] if isinstance(value, dict) else "",
)
def test_bad_arguments_are_refused_in_words(
    changed: dict, error: type[Exception], message: str, tmp_path: Path
) -> None:
    arguments = {"spec": SMALL.spec, "extents": SMALL.extents, "records": tmp_path, **changed}
    with pytest.raises(error, match=message):
        tune(**arguments)
    assert not list(tmp_path.iterdir())


def test_other_machines_are_not_tuned_for_here(tmp_path: Path) -> None:
    foreign = next(
        target
        for target in map(resolve_target, ("apple-m4", "znver5"))
        if not target.features <= detect_target().features
    )
    with pytest.raises(SpecError, match=f"target {foreign.tag} cannot be measured on this machine"):
        tune(SMALL.spec, SMALL.extents, foreign, records=tmp_path)


def test_search_learns_from_earlier_trials() -> None:
    search = Search(SMALL.spec, SMALL.extents, detect_target(), seed=0)
    defaults = list(search.names.defaults.values())
    search.recall([(defaults[0], 1e-3), *((decisions, None) for decisions in defaults[1:])])
    records = search._database.get_all_tuning_records()
    assert [[float(second) for second in record.run_secs] for record in records] == [
        [1e-3],
        *([1e10] for _ in defaults[1:]),
    ]
    scores = search.predict([search.candidate(decisions) for decisions in defaults])
    assert len(scores) == len(defaults)


def test_tolerances_are_those_of_the_dtypes() -> None:
    assert set(trial.TOLERANCE) == {"float64", "float32", "tf32", "float16", "bfloat16"}
    assert trial.TOLERANCE["float64"] < trial.TOLERANCE["float32"] < trial.TOLERANCE["float16"]
