# SPDX-License-Identifier: Apache-2.0
"""The search in a report: which decisions matter, what the cost model knew, and figures that hold the numbers."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from tvmdcn.report import search
from tvmdcn.report.data import Trial, TuningHistory
from tvmdcn.report.search import section
from tvmdcn.report.trials import (
    ABSENT,
    chance,
    correlations,
    decided,
    importances,
    levels,
    measured_scores,
    rank_correlation,
)
from tvmdcn.tuning.words import variant_parts

HOSTILE = '</script><script>alert("x")</script>'


def history(trials: Sequence[tuple[dict[str, Any], float | None]], name: str = "layer", **fields: Any) -> TuningHistory:
    """Return a history of (decisions, milliseconds or None for a failure)."""
    rows = [
        Trial(index, time, None if time is not None else "build", float(index), {k: str(v) for k, v in made.items()})
        for index, (made, time) in enumerate(trials)
    ]
    return TuningHistory(name, rows, **fields)


def grid(time: Callable[..., float], **choices: Sequence[Any]) -> TuningHistory:
    """Return the history of all combinations of choices."""
    combinations = [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]
    return history([(made, time(**made)) for made in combinations])


# --- which decisions matter --------------------------------------------------------------------------------


def test_importance_is_the_share_of_variance() -> None:
    # The logarithm is a sum of one part per decision: their variances are in the ratio 9 to 1, and c does nothing.
    found = importances(grid(lambda a, b, c: math.exp(3 * a + b), a=(0, 1), b=(0, 1), c=tuple(range(5))))
    shares = {row.decision: row.share for row in found}
    count = 20
    # Epsilon squared by its definition: what is left after as much as chance would explain.
    assert shares["a"] == pytest.approx(0.9 - 0.1 / (count - 2))
    assert shares["b"] == pytest.approx(0.1 - 0.9 / (count - 2))
    assert shares["c"] == 0
    assert [row.decision for row in found] == ["a", "b", "c"]
    first = found[0]
    assert (first.values, first.trials, first.best) == (2, 20, "0")
    assert first.medians["1"] / first.medians["0"] == pytest.approx(math.exp(3))


def test_noise_explains_nothing() -> None:
    random = np.random.default_rng(0)
    shares = []
    for _ in range(60):
        trials = [({"a": random.integers(8)}, math.exp(random.normal())) for _ in range(40)]
        shares += [row.share for row in importances(history(trials))]
    assert np.median(shares) < 0.02, "without the correction it would be 0.18"
    assert np.mean(shares) < 0.07


def test_what_two_decisions_do_only_together_is_nobodys() -> None:
    found = importances(grid(lambda a, b: 1.0 + (a != b), a=(0, 1), b=(0, 1)))
    assert [row.share for row in found] == [0, 0]


def test_decisions_that_never_varied_or_failed_are_left_out() -> None:
    trials = [({"a": 1, "b": i % 2, "c": i}, None if i == 3 else 1.0 + i % 2) for i in range(6)]
    assert [row.decision for row in importances(history(trials))] == ["b"], "c has as many values as trials"
    assert importances(history([({"a": 1}, None), ({"a": 2}, None)])) == []
    assert importances(history([])) == []


def test_a_decision_that_some_variants_lack_is_judged_among_those_that_have_it() -> None:
    trials = [({"variant": "full-2-unit"}, 1.0)] * 5
    trials += [({"variant": "split-2-unit", "taps": taps}, 1.0 + taps) for taps in (1, 1, 3, 3)]
    by_name = {row.decision: row for row in importances(history(trials))}
    assert by_name["taps"].trials == 4
    assert by_name["taps"].share == pytest.approx(1)
    assert by_name["reduction"].trials == 9
    assert "vectors" not in by_name


def test_equal_times_have_nothing_to_explain() -> None:
    assert [row.share for row in importances(grid(lambda a: 2.0, a=(1, 1, 2, 2)))] == [0]


def test_variants_are_taken_apart() -> None:
    assert variant_parts("split-4-tap") == {"reduction": "split", "vectors": "4", "plan per": "tap"}
    assert variant_parts("own-2") == {"order": "own", "vectors": "2"}
    assert variant_parts("depthwise") == {"variant": "depthwise"}
    assert variant_parts("mma-block-planes") == {"product": "mma", "plan per": "block", "corners from": "planes"}
    assert variant_parts("full-x") == {"variant": "full-x"}
    assert variant_parts("unheard-of") == {"variant": "unheard-of"}
    trial = Trial(0, 1.0, decisions={"variant": "full-2-unit", "unroll": "4"})
    assert decided(trial) == {"reduction": "full", "vectors": "2", "plan per": "unit", "unroll": "4"}
    assert decided(Trial(0, 1.0, decisions={"unroll": "4"})) == {"unroll": "4"}


def test_levels_are_ordered_as_numbers_with_absence_first() -> None:
    trials = history([({"a": a, "n": "x"} | ({"b": b} if b else {}), 1.0) for a, b in ((12, 1), (3, 0), (100, 2))])
    assert levels(trials.trials) == {"a": ["3", "12", "100"], "b": [ABSENT, "1", "2"]}


# --- what the cost model knew ------------------------------------------------------------------------------


def test_rank_correlation_is_spearmans() -> None:
    stats = pytest.importorskip("scipy.stats")
    random = np.random.default_rng(0)
    for size in (3, 7, 20):
        first, second = random.integers(0, 6, size).astype(float), random.integers(0, 6, size).astype(float)
        first[0], second[0] = 7, 8  # at least two values
        assert rank_correlation(first, second) == pytest.approx(stats.spearmanr(first, second).statistic)
    assert rank_correlation([1, 2, 3], [10, 100, 1000]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert rank_correlation([1, 1, 1], [1, 2, 3]) is None


@pytest.mark.parametrize("count", [8, 12, 24])
def test_chance_is_exceeded_in_one_of_twenty(count: int) -> None:
    random = np.random.default_rng(count)
    found = [rank_correlation(random.normal(size=count), random.normal(size=count)) for _ in range(2000)]
    beyond = np.mean([abs(value or 0) > chance(count) for value in found])
    assert 0.03 < beyond < 0.08
    assert chance(3) == chance(4) == 1.0


def predicted(*rounds: Sequence[tuple[float | None, float | None]]) -> TuningHistory:
    """Return a history of rounds of (prediction, milliseconds)."""
    rows = [(number, *pair) for number, found in enumerate(rounds) for pair in found]
    return TuningHistory(
        "layer",
        [
            Trial(i, time, None if time is not None else "crash", float(i), {"a": str(i % 3)}, number, score)
            for i, (number, score, time) in enumerate(rows)
        ],
    )


def test_each_round_has_its_correlation() -> None:
    found = correlations(
        predicted(
            [(None, 1.0), (None, 2.0), (None, 3.0)],
            [(0.9, 1.0), (0.8, 2.0), (0.7, 3.0), (0.1, None)],
            [(0.9, 3.0), (0.8, 2.0), (0.7, 1.0)],
            [(0.9, 3.0), (0.8, 2.0)],
            [(0.5, 3.0), (0.5, 2.0), (0.5, 1.0)],
        )
    )
    assert [(row.round, row.trials) for row in found] == [(1, 3), (2, 3)]
    assert [row.value for row in found] == pytest.approx([1.0, -1.0]), "a higher score means a shorter time"


def test_measured_scores_are_what_the_model_predicts() -> None:
    found = measured_scores(predicted([(None, 2.0), (None, 4.0)], [(1.0, 1.0), (0.5, 8.0), (0.1, None)], [(1.0, 2.0)]))
    # The best time before the round over the trial's own; 0 for a failure.
    assert found == {2: 2.0, 3: 0.25, 4: 0.0, 5: 0.5}


def test_logs_without_rounds_have_no_correlation() -> None:
    old = history([({"a": 1}, 2.0), ({"a": 2}, 1.0)])
    assert correlations(old) == []
    assert measured_scores(old) == {1: 2.0}


# --- the section -------------------------------------------------------------------------------------------


def specs_of(html: str) -> list[dict[str, Any]]:
    return [json.loads(text) for text in re.findall(r'<script type="application/json">(.*?)</script>', html, re.S)]


def data_of(spec: Any) -> list[dict[str, Any]]:
    """Return all rows of inline data within a specification."""
    if isinstance(spec, dict):
        own = spec["values"] if isinstance(spec.get("values"), list) else []
        own += [row for rows in spec.get("datasets", {}).values() for row in rows]
        return own + [row for name, part in spec.items() if name != "datasets" for row in data_of(part)]
    return [row for part in spec for row in data_of(part)] if isinstance(spec, list) else []


def whole() -> TuningHistory:
    random = np.random.default_rng(0)
    trials = []
    for index in range(40):
        made = {"variant": ["full-2-unit", "split-2-tap"][index % 2], "unroll": str(2 ** random.integers(3))}
        time = None if index == 7 else float(made["unroll"]) * (1 + index % 2)
        score = None if index < 12 else 1 / (time or 9)
        reason = None if time is not None else "wrong result"
        trials.append(Trial(index, time, reason, 10.0 + index, made, max(0, index // 12), score))
    return TuningHistory("a_layer", trials, "llvm-a", 1)


def test_section_holds_every_figure_and_its_numbers() -> None:
    found = section([whole()])
    assert found is not None
    titles = re.findall(r"<h3>(.*?)</h3>", found.html)
    assert titles == ["Best so far", "What the cost model knew", "Which decisions matter", "The population"]
    overview, progress, model, decisions, population = specs_of(found.html)
    best = [row["best_ms"] for row in data_of(progress) if "best_ms" in row]
    assert len(best) == 40
    assert best[-1] == min(best) == whole().best.time_ms
    assert [row["failed"] for row in data_of(progress) if row.get("failed")] == ["wrong result"]
    assert {row["round"] for row in data_of(model) if "rank_correlation" in row} == {1, 2, 3}
    assert {row["decision"] for row in data_of(decisions) if "share" in row} == {"unroll", "reduction", "plan per"}
    lines = [row for row in data_of(population) if "decisions" in row]
    assert len(lines) == 39
    assert sum(row["best"] for row in lines) == 1
    assert all(0 <= height <= 1 for row in lines for height in row["height"])
    assert "full-2-unit, unroll 1" in [row["decisions"] for row in lines]
    assert {row["layer"] for row in data_of(overview)} == {"a_layer"}
    names = {numbers.name: numbers for numbers in found.numbers}
    assert [len(names[name].rows) for name in ("search_trials", "search_decisions", "search_model")] == [40, 3, 3]
    assert names["search_trials"].records()[39]["best_so_far_ms"] == whole().best.time_ms
    assert all(row["rank_correlation"] == pytest.approx(1) for row in names["search_model"].records())
    assert "1 wrong result" in found.html
    assert "| a_layer | llvm-a | 40 | 1 wrong result |" in found.markdown


def test_each_figure_says_what_it_says_and_how_to_read_it() -> None:
    found = section([whole()])
    assert found is not None
    captions = re.findall(r"<figcaption><b>(.+?)</b>\s*(.+?)</figcaption>", found.html, re.S)
    assert len(captions) == 5
    assert all(len(says) > 30 and len(read) > 60 for says, read in captions)
    assert "to a rank correlation of 1.00 in the median of 3 rounds" in found.html


def test_logs_without_predictions_say_so() -> None:
    found = section([grid(lambda a, b: a + b, a=(1, 2), b=(1, 2, 3))])
    assert found is not None
    assert "hold no predictions of the cost model" in found.html
    assert "What the cost model knew" not in found.html
    assert "rank correlation" not in found.markdown


def test_nothing_no_trial_and_failures_only() -> None:
    assert section([]) is None
    assert section([history([])]) is None
    found = section([history([({"a": 1}, None), ({"a": 2}, None)])])
    assert found is not None
    assert "2 build" in found.html
    assert "<figure" not in found.html
    one = section([history([({"a": 1}, 1.5)])])
    assert one is not None
    assert one.html.count("<figure") == 2, "the best so far, of all and of the one"


def test_names_from_outside_are_escaped() -> None:
    made = [({"variant": HOSTILE, HOSTILE: HOSTILE + str(i % 2), "b": str(i % 3)}, 1.0 + i % 2) for i in range(8)]
    found = section([history(made, HOSTILE, source=HOSTILE), history([({"a": 1}, None)], HOSTILE, source="b")])
    assert found is not None
    assert "alert(" in found.html
    assert "<script>alert" not in found.html
    assert "<script>alert" not in found.markdown
    texts = [row.get("decision") for spec in specs_of(found.html) for row in data_of(spec)]
    assert HOSTILE in texts, "as a value it is what it was"


def test_tunings_of_one_name_are_told_apart() -> None:
    trials = [({"a": 1}, 1.0)]
    assert search._labels([history(trials, "a"), history(trials, "b")]) == ["a", "b"]
    by_threads = [history(trials, "a", threads=count, source="x") for count in (1, 2)]
    assert search._labels(by_threads) == ["a, 1 thread", "a, 2 threads"]
    by_target = [history(trials, "a", threads=1, source=source) for source in ("x", "y")]
    assert search._labels(by_target) == ["a, 1 thread, x", "a, 1 thread, y"]
    assert len(set(search._labels([by_target[0]] * 2))) == 2


def test_too_many_tunings_keep_their_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "_MOST_BYTES", 1)
    histories = [grid(lambda a, b: a + b, a=(1, 2), b=(1, 2)) for _ in range(3)]
    found = section(histories)
    assert found is not None
    assert found.html.count("<h3>Best so far</h3>") == 1
    assert "Without figures" in found.html
    assert len(found.numbers[0].rows) == 12
