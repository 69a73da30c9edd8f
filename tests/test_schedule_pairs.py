# SPDX-License-Identifier: Apache-2.0
"""Default and tuned schedule side by side: from manifests in the cache, whoever wrote them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from fake_artifacts import INTERFACE, build_fake
from handmade import SPEC

from tvmdcn.artifact import Artifact
from tvmdcn.bench.measurement import Measurement
from tvmdcn.problems import PROBLEMS
from tvmdcn.report.schedule_sources import cached_pairs
from tvmdcn.spec import DeformConv2dGradSpec, DeformConv2dSpec, Extents
from tvmdcn.target import detect_target

SCHEDULES = {
    "default": {
        "source": "default",
        "decisions": {"variant": "full", "values": {"tile": 4}},
        "tir": "for i in 4",
    },
    "tuned": {
        "source": "tuned: 64 trials",
        "decisions": {"variant": "split", "values": {"tile": 8}},
        "tir": "for i in 8",
    },
}


def row(spec: DeformConv2dSpec = SPEC, **fields: Any) -> Measurement:
    base = {
        "problem": "layer",
        "extents": Extents(1, 5, 5),
        "provider": "ours-tuned",
        "role": "ours",
        "threads": 1,
        "machine": {"target": detect_target().tag},
        "versions": {},
        "date": "2026-11-22T10:00:00+00:00",
        "command": "",
        "status": "failed",
        "reason": "not measured",
    }
    return Measurement(spec=spec, **{**base, **fields})


def build(side: str, schedule: Mapping[str, Any] | None = None, **options: Any) -> Artifact:
    def make(directory: Path) -> Any:
        (directory / "kernel.so").write_bytes(b"not a library")
        return INTERFACE, SCHEDULES[side] if schedule is None else schedule

    return build_fake(side, make=make, **options)


@pytest.fixture(autouse=True)
def _own_cache(cache_dir: Path) -> None:
    pass


def test_pair_of_a_measured_layer() -> None:
    build("default")
    build("tuned")
    pairs = cached_pairs([row(), row(provider="ours-default"), row(problem="again")])
    assert [pair.title for pair in pairs] == ["layer", "again"]
    for pair in pairs:
        assert [view.title for view in (pair.left, pair.right)] == ["default", "tuned: 64 trials"]
        assert pair.left.decisions == {"variant": "full", "tile": "4"}
        assert pair.right.decisions == {"variant": "split", "tile": "8"}
        assert (pair.left.texts, pair.right.texts) == ({"TIR": "for i in 4"}, {"TIR": "for i in 8"})
        assert pair.left.facts["target"] == detect_target().tag
        assert all("Without generated code" in view.notes[0] for view in (pair.left, pair.right)), "it is no library"
    assert len(cached_pairs([row(), row(problem="again")], limit=1)) == 1


def test_gradients_have_a_pair_of_their_own() -> None:
    gradients = DeformConv2dGradSpec.of(SPEC)
    for side in ("default", "tuned"):
        build(side)
        build(side, spec=gradients)
    pairs = cached_pairs([row(), row(gradients), row(gradients, provider="ours-default")])
    assert [pair.title for pair in pairs] == ["layer", "layer backward"]


def test_both_must_be_there_and_belong_to_the_row() -> None:
    build("default")
    assert cached_pairs([row()]) == []
    build("tuned")
    assert cached_pairs([row(PROBLEMS["r50_c4"].spec)]) == []
    assert cached_pairs([row(machine={"target": "llvm-elsewhere"})]) == []
    assert cached_pairs([row(machine={})]) == []
    assert cached_pairs([row(role="peer", provider="onnxruntime")]) == []
    assert len(cached_pairs([row()])) == 1


def test_builds_of_other_code_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    build("default")
    build("tuned")
    monkeypatch.setattr("tvmdcn.report.schedule_sources.source_digest", lambda: "changed since")
    assert cached_pairs([row()]) == []


def test_tuned_build_without_a_record_says_so() -> None:
    build("default")
    build("tuned", {**SCHEDULES["tuned"], "source": "as tuned for another"})
    ((_, right),) = [(pair.left, pair.right) for pair in cached_pairs([row()])]
    assert right.title == "tuned: as tuned for another"


@pytest.mark.parametrize(
    "schedule",
    [
        {},
        {"source": 7, "decisions": [], "tir": None},
        {"decisions": {"values": 5}},
        {"decisions": {"values": {"a": ["b"]}}},
    ],
    ids=str,
)
def test_manifests_of_another_form_are_harmless(schedule: dict[str, Any]) -> None:
    build("default")
    build("tuned", schedule)
    (pair,) = cached_pairs([row()])
    texts = (pair.right.title, *pair.right.texts.values(), *pair.right.decisions.values(), *pair.right.facts.values())
    assert all(isinstance(text, str) for text in texts)


def test_cache_that_cannot_be_used_shows_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TVMDCN_CACHE_DIR", str(tmp_path / "nowhere"))
    assert cached_pairs([row()]) == []
    monkeypatch.setenv("TVMDCN_CACHE_DIR", __file__)
    assert cached_pairs([row()]) == []
