# SPDX-License-Identifier: Apache-2.0
"""What is tried first: the schedules of similar layers, of this target before those of others."""

from __future__ import annotations

from pathlib import Path

import pytest

from tvmdcn.errors import RecordsError
from tvmdcn.problems import parse_problem
from tvmdcn.space import Decisions
from tvmdcn.target import resolve_target
from tvmdcn.tuning import records as records_module
from tvmdcn.tuning import warm_start
from tvmdcn.tuning.records import META, Record, TuningRecords
from tvmdcn.tuning.warm_start import similar_decisions

TARGET = resolve_target("skylake-avx512")
OTHER = resolve_target("haswell")
LAYER = parse_problem("1,64,20,20,64,og=2")


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder as the only root of records."""
    for module in (records_module, warm_start):
        monkeypatch.setattr(module, "record_roots", lambda: [tmp_path])
    return tmp_path


def keep(root: Path, tag: str, text: str, variant: str, threads: int = 1, backward: bool = False) -> None:
    problem = parse_problem(text).backward if backward else parse_problem(text)
    decisions = Decisions(variant, {"unroll": 2})
    record = Record(problem.spec, problem.extents, threads, decisions, 1e-3, 2e-3, 9, {"versions": {}})
    TuningRecords.keep(root, tag, record)


def found(limit: int = 9, **options: bool) -> list[str]:
    return [made.variant for made in similar_decisions(LAYER.spec, TARGET, 1, limit, **options)]


def test_the_nearest_comes_first(root: Path) -> None:
    keep(root, OTHER.tag, "1,64,20,20,64,og=2", "other target, this layer")
    keep(root, OTHER.tag, "1,64,20,20,128,og=2", "other target, twice the outputs")
    keep(root, TARGET.tag, "1,64,20,20,64,og=2,k=5", "other kernel")
    keep(root, TARGET.tag, "1,64,20,20,64,og=4", "other offset groups")
    keep(root, TARGET.tag, "1,64,20,20,64,og=2", "this layer")
    keep(root, TARGET.tag, "1,64,20,20,256,og=2", "four times the outputs")
    keep(root, TARGET.tag, "1,64,20,20,128,og=2", "twice the outputs")
    keep(root, TARGET.tag, "1,64,20,20,64,og=2", "gradients", backward=True)
    assert found() == [
        "this layer",
        "twice the outputs",
        "four times the outputs",
        "other target, this layer",
        "other target, twice the outputs",
    ]
    assert found(2) == ["this layer", "twice the outputs"]
    assert found(0) == []
    assert found(2, own=False) == ["twice the outputs", "four times the outputs"]
    assert "other target, this layer" not in found(own=False)


def test_threads_decide_between_records_of_one_layer(root: Path) -> None:
    keep(root, TARGET.tag, "1,64,20,20,64,og=2", "eight threads", threads=8)
    keep(root, TARGET.tag, "1,64,20,20,64,og=2", "two threads", threads=2)
    assert found() == ["two threads", "eight threads"]


def test_a_schedule_is_tried_once(root: Path) -> None:
    for outputs in (64, 128, 256):
        keep(root, TARGET.tag, f"1,64,20,20,{outputs},og=2", "the same")
    assert found() == ["the same"]


def test_without_records_there_is_nothing(root: Path) -> None:
    assert found() == []


def test_damaged_records_of_other_targets_are_passed_over(root: Path) -> None:
    keep(root, TARGET.tag, "1,64,20,20,128,og=2", "mine")
    keep(root, OTHER.tag, "1,64,20,20,128,og=2", "other")
    (root / OTHER.tag / META).write_text("{")
    assert found() == ["mine"]
    (root / TARGET.tag / META).write_text("{")
    with pytest.raises(RecordsError):
        found()
