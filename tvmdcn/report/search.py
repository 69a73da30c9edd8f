# SPDX-License-Identifier: Apache-2.0
"""The search: how tunings went, whether the cost model knew, and which decisions matter."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tvmdcn.report.charts import Numbers, PageSection
from tvmdcn.report.data import TuningHistory
from tvmdcn.report.rendering import plural, render, render_markdown
from tvmdcn.report.search_charts import (
    draw_importance,
    draw_model,
    draw_overview,
    draw_population,
    draw_progress,
    words_of,
)
from tvmdcn.report.trials import Correlation, Importance, correlations, importances, measured_scores

__all__ = ["section"]

# Figures of a tuning take about 25 KiB of the page. Beyond this many bytes, further tunings are in the tables only.
_MOST_BYTES = 900_000


@dataclass(frozen=True)
class _Tuning:
    """A history and what was worked out from it."""

    label: str
    history: TuningHistory
    importances: Sequence[Importance]
    correlations: Sequence[Correlation]

    @property
    def gain(self) -> float | None:
        """How many times as fast as the first trial the best one is."""
        best, first = self.history.best, self.history.first
        if best is None or first is None or not best.time_ms or first.time_ms is None:
            return None
        return first.time_ms / best.time_ms

    @property
    def seconds(self) -> float | None:
        """How long it took."""
        return self.history.trials[-1].elapsed_s if self.history.trials else None

    @property
    def correlation(self) -> float | None:
        """The median of the rounds' correlations."""
        return statistics.median(row.value for row in self.correlations) if self.correlations else None


def section(histories: Sequence[TuningHistory]) -> PageSection | None:
    """Return how tunings went.

    Parameters
    ----------
    histories : sequence of TuningHistory
        As :func:`tvmdcn.tuning.history.histories` reads them.

    Returns
    -------
    PageSection or None
        None if there is no trial.
    """
    histories = [history for history in histories if history.trials]
    if not histories:
        return None
    tunings = [
        _Tuning(label, history, importances(history), correlations(history))
        for label, history in zip(_labels(histories), histories, strict=True)
    ]
    figures, left_out = _figures(tunings)
    failures = Counter(reason for history in histories for reason in _failures(history).elements())
    content = {
        "tunings": tunings,
        "figures": figures,
        "left_out": left_out,
        "overview": draw_overview([(t.label, t.history) for t in tunings]),
        "failures": failures.most_common(),
        "trials": sum(len(history.trials) for history in histories),
        "predicted": any(tuning.correlations for tuning in tunings),
    }
    return PageSection(
        anchor="search",
        title="The search",
        html=render("search.html.j2", **content),
        markdown=render_markdown("search.md.j2", **content),
        numbers=_numbers(tunings),
    )


def _failures(history: TuningHistory) -> Counter[str]:
    return Counter(dict(history.failures))


def _labels(histories: Sequence[TuningHistory]) -> list[str]:
    """Return a name for each history: that of the layer, and as much else as is needed to tell it from others."""

    def names(*parts: Any) -> list[str]:
        return [", ".join(part(history) for part in parts if part(history)) for history in histories]

    def threads(history: TuningHistory) -> str:
        return "" if history.threads is None else plural(history.threads, "thread")

    problem, source = (lambda history: history.problem), (lambda history: history.source)
    for found in (names(problem), names(problem, threads), names(problem, threads, source)):
        if len(set(found)) == len(found):
            return found
    return [f"{name} ({number})" for number, name in enumerate(found, 1)]


def _figures(tunings: Sequence[_Tuning]) -> tuple[list[tuple[_Tuning, list[Any]]], list[str]]:
    """Return the figures of each tuning as far as the page can bear them, and the names of the others."""
    figures, left_out, spent = [], [], 0
    for tuning in tunings:
        drawn: list[Any] = []
        if tuning.history.best is not None and spent < _MOST_BYTES:
            drawn = [
                draw_progress(tuning.history),
                draw_model(tuning.history, tuning.correlations),
                draw_importance(tuning.history, tuning.importances),
                draw_population(tuning.history),
            ]
            drawn = [figure for figure in drawn if figure is not None]
            spent += sum(map(len, drawn))
        if drawn:
            figures.append((tuning, drawn))
        else:
            left_out.append(tuning.label)
    return figures, left_out


def _numbers(tunings: Sequence[_Tuning]) -> list[Numbers]:
    trials: list[list[Any]] = []
    importance: list[list[Any]] = []
    correlation: list[list[Any]] = []
    for tuning in tunings:
        history = tuning.history
        scores, best = measured_scores(history), history.best_so_far()
        where = [history.problem, history.source, history.threads]
        for trial, so_far in zip(history.trials, best, strict=True):
            measured = (trial.time_ms, so_far, trial.reason, trial.elapsed_s)
            model = (trial.round, trial.predicted, scores.get(trial.index))
            trials.append([*where, trial.index, *measured, *model, words_of(trial)])
        for row in tuning.importances:
            medians = _medians(row.medians)
            importance.append([*where, row.decision, row.share, row.trials, row.values, row.best, medians])
        correlation += [[*where, row.round, row.value, row.trials, row.chance] for row in tuning.correlations]
    columns = ("layer", "target", "threads")
    measured_columns = ("trial", "time_ms", "best_so_far_ms", "failure", "elapsed_s")
    model_columns = ("round", "predicted_score", "measured_score", "decisions")
    return [
        Numbers("search_trials", (*columns, *measured_columns, *model_columns), trials),
        Numbers(
            "search_decisions",
            (*columns, "decision", "share_of_variance", "trials", "values", "best_value", "median_ms_by_value"),
            importance,
        ),
        Numbers(
            "search_model",
            (*columns, "round", "rank_correlation", "trials", "reached_by_chance"),
            correlation,
        ),
    ]


def _medians(medians: Mapping[str, float]) -> str:
    return "; ".join(f"{value}: {milliseconds:.6g}" for value, milliseconds in medians.items())
