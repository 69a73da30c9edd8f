# SPDX-License-Identifier: Apache-2.0
"""Tuning of gradients: the same tuner, with several outputs to check, and records beside the layer's."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("xgboost")
pytest.importorskip("psutil")
pytest.importorskip("cloudpickle")

from tvmdcn.builder import build
from tvmdcn.errors import RecordsError, TuningError
from tvmdcn.problems import TEST_PROBLEMS, parse_problem
from tvmdcn.runtime import open_kernel
from tvmdcn.spec import Extents
from tvmdcn.target import detect_target
from tvmdcn.te import operator_of
from tvmdcn.tuning import session as session_module
from tvmdcn.tuning import trial
from tvmdcn.tuning import tuner as tuner_module
from tvmdcn.tuning.history import read_log
from tvmdcn.tuning.records import TuningRecords
from tvmdcn.tuning.search import _entry
from tvmdcn.tuning.session import TuningResult
from tvmdcn.tuning.trial import Job, Outcome
from tvmdcn.tuning.tuner import tune

TAG = detect_target().tag
LAYER = parse_problem("1,8,6,7,8")
SMALL = LAYER.backward
# Largest error of a float32 gradient relative to its own largest value.
TOLERANCE = 2e-6


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> tuple[TuningResult, Path]:
    """A short tuning of a layer's gradients, by a name that the layer has too."""
    root = tmp_path_factory.mktemp("records")
    return tune(SMALL.spec, SMALL.extents, trials=2, threads=1, records=root, name="small"), root


def test_record_says_what_was_tuned(tuned: tuple[TuningResult, Path]) -> None:
    result, root = tuned
    (record,) = TuningRecords.read(root, TAG).records
    assert record == result.record
    assert (record.spec, record.extents, record.threads, record.trials) == (SMALL.spec, SMALL.extents, 1, 2)
    assert result.failures == {}
    assert 0 < record.seconds <= record.default_seconds
    header, rows = read_log(root / TAG / "trials" / "small_grad-t1.jsonl")
    assert header["spec"] == SMALL.spec.to_json()
    assert len(rows) == 2


def test_tuned_build_gives_the_references_numbers(
    tuned: tuple[TuningResult, Path], cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result, root = tuned
    monkeypatch.setenv("TVMDCN_RECORDS", str(root))
    artifact = build(SMALL.spec, schedule="tuned", cache_dir=cache_dir)
    assert artifact.schedule["source"] == "tuned: 2 trials"
    assert artifact.schedule["decisions"] == result.record.decisions.to_json()
    operator = operator_of(SMALL.spec)
    for extents in (SMALL.extents, Extents(3, 11, 4)):
        tensors = operator.tensors(SMALL.spec, extents, 1)
        found = open_kernel(artifact, 2).bind(tensors)()
        assert trial._error(found, operator.expected(SMALL.spec, tensors)) < TOLERANCE


class Pretended:
    """Builds and measures nothing."""

    def __init__(self, builders: int, measuring: object = None) -> None:
        pass

    def __enter__(self) -> Pretended:
        return self

    def __exit__(self, *details: object) -> None:
        pass

    def trials(self, job: Job, candidates: list) -> Iterator[tuple[int, Outcome]]:
        for place in range(len(candidates)):
            yield place, Outcome((0.001,), 1e-7)

    def compare(self, job: Job, candidates: list, rounds: int) -> list[Outcome]:
        return [Outcome((0.001,), 1e-7)] * len(candidates)


def test_a_layer_and_its_gradients_are_tuned_by_one_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuner_module, "Workers", Pretended)
    for problem in (LAYER, SMALL, LAYER, SMALL):
        tune(problem.spec, problem.extents, trials=2, threads=1, records=tmp_path, name="small")
    records = TuningRecords.read(tmp_path, TAG)
    assert sorted(record.spec.operator for record in records.records) == ["deform_conv2d", "deform_conv2d_grad"]
    assert {record.trials for record in records.records} == {2}
    logs = sorted(path.name for path in (tmp_path / TAG / "trials").glob("*.jsonl"))
    assert logs == ["small-t1.jsonl", "small_grad-t1.jsonl"]
    without_input = dataclasses.replace(SMALL.spec, grad_input=False)
    found = records.best(without_input)
    assert found is not None
    assert found.description == f"as tuned for {SMALL.spec.slug}"
    with pytest.raises(RecordsError, match="is the log of another tuning: spec differ"):
        tune(without_input, SMALL.extents, trials=2, threads=1, records=tmp_path, name="small")


def test_one_wrong_output_of_five_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    operator = operator_of(SMALL.spec)

    def changed(*arguments: object) -> dict[str, np.ndarray]:
        results = operator.expected(*arguments)
        results["grad_mask"].flat[-1] += 0.01 * np.abs(results["grad_mask"]).max()  # one element, by a hundredth
        return results

    monkeypatch.setattr(session_module, "operator_of", lambda _: dataclasses.replace(operator, expected=changed))
    with pytest.raises(TuningError, match=r"none of 1 schedules .* \(1 x wrong result\).* relative error"):
        tune(SMALL.spec, SMALL.extents, trials=1, threads=1, records=tmp_path, name="small")
    _, (row,) = read_log(tmp_path / TAG / "trials" / "small_grad-t1.jsonl")
    assert row.seconds is None


# --- what a trial compares ----------------------------------------------------------------------------------


def test_errors_are_relative_to_each_output() -> None:
    expected = {"large": np.array([1e6, -2e6]), "small": np.array([1e-6, 2e-6]), "zero": np.zeros(3)}
    found = {name: array.astype(np.float64) for name, array in expected.items()}
    assert trial._error(found, expected) == 0
    assert trial._error({**found, "small": np.array([1e-6, 2.02e-6])}, expected) == pytest.approx(0.01)
    assert trial._error({**found, "large": np.array([1.02e6, -2e6])}, expected) == pytest.approx(0.01)
    assert trial._error({**found, "zero": np.array([0, 0.5, 0])}, expected) == 0.5
    for wrong in (np.nan, np.inf, -np.inf):
        for name in expected:
            array = found[name].copy()
            array[0] = wrong
            assert trial._error({**found, name: array}, expected) == np.inf


@pytest.mark.parametrize("name", ["asymmetric", "bfloat16", "float16", "float64", "asymmetric_v1", "wide_nhwc"])
def test_inputs_reach_the_workers(name: str, tmp_path: Path) -> None:
    for problem in (TEST_PROBLEMS[name], TEST_PROBLEMS[name].backward):
        folder = tmp_path / problem.spec.operator
        folder.mkdir()
        job = Job(problem.spec, problem.extents, detect_target(), 1, folder)
        assert Job.from_json(json.loads(json.dumps(job.to_json()))) == job
        operator = operator_of(problem.spec)
        tensors = operator.tensors(problem.spec, problem.extents)
        assert set(tensors) >= set(problem.spec.inputs)
        expected = operator.expected(problem.spec, tensors)
        assert tuple(expected) == problem.spec.outputs
        trial.save_inputs(job, tensors, expected)
        read_tensors, read_expected = trial._inputs(job)
        for written, read in ((tensors, read_tensors), (expected, read_expected)):
            assert list(read) == list(written)
            for key, array in written.items():
                assert read[key].dtype == array.dtype
                np.testing.assert_array_equal(read[key], array)


@pytest.mark.parametrize("name", ["asymmetric", "asymmetric_nhwc", "asymmetric_v1"])
def test_the_search_sees_the_layers_sizes(name: str) -> None:
    for problem in (TEST_PROBLEMS[name], TEST_PROBLEMS[name].backward):
        spec, extents = problem.spec, Extents(2, 9, 8)
        names = (*spec.inputs, *spec.outputs)
        params = _entry(spec, extents).params
        assert [param.name for param in params] == list(names)
        assert [tuple(map(int, param.shape)) for param in params] == [spec.shape_of(n, extents) for n in names]
        assert {str(param.dtype) for param in params} == {spec.dtype}
