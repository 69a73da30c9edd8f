# SPDX-License-Identifier: Apache-2.0
"""The log of a tuning holds what the cost model thought of each trial before it was measured, and the trial's round."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tvmdcn.problems import parse_problem
from tvmdcn.report.trials import correlations
from tvmdcn.space import Decisions
from tvmdcn.target import detect_target
from tvmdcn.tuning.history import histories, read_log
from tvmdcn.tuning.search import Search
from tvmdcn.tuning.session import Session
from tvmdcn.tuning.trial import Outcome

LAYER = parse_problem("1,16,6,7,32")


def seconds_of(decisions: Decisions) -> float:
    """Return a made-up time that the model can learn."""
    time = 1e-3 * (1 + 8 / decisions.values["register_pixels"])
    return time * (1.5 if decisions.variant.startswith("split") else 1)


class FakeWorkers:
    """Measures nothing, and notes when it was asked."""

    def __init__(self, events: list[str]) -> None:
        self.events = events

    def trials(self, job: Any, candidates: Sequence[Decisions]) -> Iterator[tuple[int, Outcome]]:
        """Return the outcomes, the last first."""
        for place in reversed(range(len(candidates))):
            self.events.append("measured")
            yield place, Outcome((seconds_of(candidates[place]),) * 2, 0.0)


def session(tmp_path: Path) -> Session:
    options: dict[str, Any] = {"threads": 1, "name": "layer", "resume": True, "seed": 0, "wanted": 60, "report": None}
    options |= {"weight": 1.0, "starts": []}
    scratch = tmp_path / "scratch"
    scratch.mkdir(exist_ok=True)
    log = tmp_path / detect_target().tag / "trials" / "layer-t1.jsonl"
    return Session(LAYER.spec, LAYER.extents, detect_target(), log=log, scratch=scratch, **options)


def test_predictions_are_logged_before_anything_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    given: dict[Any, float | None] = {}
    real = Search.predict

    def predict(self: Search, candidates: Any) -> list[float | None]:
        events.append("predicted")
        scores = real(self, candidates)
        given.update(
            {
                (c.decisions.variant, *sorted(c.decisions.values.items())): s
                for c, s in zip(candidates, scores, strict=True)
            }
        )
        return scores

    monkeypatch.setattr(Search, "predict", predict)
    first = session(tmp_path)
    workers: Any = FakeWorkers(events)
    # Rounds of its own choice take MetaSchedule some seconds each; what is tried makes no difference here.
    made = [
        Decisions("full-2-unit", {"register_pixels": r, "tile_units": t}) for r in (1, 2, 3, 6) for t in (1, 2, 3, 4)
    ]
    first._try(workers, [first.search.candidate(decisions) for decisions in made[:9]], math.inf)
    first._try(workers, [first.search.candidate(decisions) for decisions in made[9:13]], math.inf)
    again = session(tmp_path)  # a later run continues the numbers
    again._try(workers, [again.search.candidate(decisions) for decisions in made[13:]], math.inf)

    _, rows = read_log(first.log.path)
    numbers = [row.round for row in rows]
    assert numbers == sorted(numbers)
    assert numbers[0] == 0
    assert set(numbers) == {0, 1, 2}
    assert len(rows) == events.count("measured")
    starts = [place for place, event in enumerate(events) if event == "predicted"]
    sizes = [numbers.count(number) for number in sorted(set(numbers))]
    assert [b - a - 1 for a, b in zip(starts, [*starts[1:], len(events)], strict=True)] == sizes
    for row in rows:
        assert row.predicted == given[(row.decisions.variant, *sorted(row.decisions.values.items()))]
    assert all(row.predicted is None for row in rows if row.round != 2), "there is too little to learn from"
    assert all(row.predicted is not None for row in rows if row.round == 2)

    (history,) = histories(tmp_path)
    assert [trial.round for trial in history.trials] == numbers
    assert [trial.predicted for trial in history.trials] == [row.predicted for row in rows]
    assert all(-1 <= row.value <= 1 for row in correlations(history))


def test_without_enough_trials_there_is_no_prediction() -> None:
    search = Search(LAYER.spec, LAYER.extents, detect_target(), seed=0)
    candidates = [search.candidate(decisions) for decisions in search.names.defaults.values()]
    assert search.predict(candidates) == [None] * len(candidates)
    assert search.predict([]) == []
    made = [
        Decisions("full-2-unit", {"register_pixels": r, "tile_units": t}) for r in (1, 2, 3, 6) for t in (1, 2, 3, 4)
    ]
    search.recall((decisions, seconds_of(decisions)) for decisions in made)
    scores = search.predict([search.candidate(decisions) for decisions in made])
    # About the best time over the candidate's own.
    best = min(map(seconds_of, made))
    assert scores == pytest.approx([best / seconds_of(decisions) for decisions in made], abs=0.15)
