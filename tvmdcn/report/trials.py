# SPDX-License-Identifier: Apache-2.0
"""What the trials of a tuning say: which decisions matter, and whether the cost model knew."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tvmdcn.report.data import Trial, TuningHistory
from tvmdcn.tuning.words import variant_parts

__all__ = [
    "ABSENT",
    "Correlation",
    "Importance",
    "chance",
    "correlations",
    "decided",
    "importances",
    "levels",
    "measured_scores",
    "rank_correlation",
]

ABSENT = "\u2013"
"""The value of a decision that a trial's variant does not have."""

_FEWEST_PAIRS = 3  # of which a correlation can be told


def decided(trial: Trial) -> dict[str, str]:
    """Return the decisions of a trial, the variant in its parts."""
    found = dict(trial.decisions)
    variant = found.pop("variant", None)
    return {**({} if variant is None else variant_parts(variant)), **found}


def levels(trials: Sequence[Trial]) -> dict[str, list[str]]:
    """Return the values of each decision among trials: numbers in ascending order, absence first.

    Only decisions that were decided in more than one way.
    """
    rows = [decided(trial) for trial in trials]
    names = dict.fromkeys(name for row in rows for name in row)
    found = {name: {row.get(name, ABSENT) for row in rows} for name in names}
    return {name: sorted(values, key=_order) for name, values in found.items() if len(values) > 1}


def _order(value: str) -> tuple[int, float, str]:
    if value == ABSENT:
        return 0, 0.0, ""
    try:
        return 1, float(value), ""
    except ValueError:
        return 2, 0.0, value


@dataclass(frozen=True)
class Importance:
    """How much of the differences in time goes with one decision.

    Parameters
    ----------
    decision : str
    share : float
        Part of the variance of the logarithm of the time that the means of its values explain, less what as many
        values would explain by chance (epsilon squared); at least 0.
    trials : int
        Those that had the decision to take.
    values : int
        How many values it took.
    best : str
        The value with the lowest median time.
    medians : mapping of str to float
        Median milliseconds by value.
    """

    decision: str
    share: float
    trials: int
    values: int
    best: str
    medians: Mapping[str, float]


def importances(history: TuningHistory) -> list[Importance]:
    """Return the decisions of a tuning that varied, the one that matters most first.

    Each is looked at alone, as the marginal of a functional analysis of variance: what two decisions do only together
    is nobody's, and of two that always went together both get the credit.
    """
    measured = [trial for trial in history.trials if trial.time_ms is not None]
    found = []
    for name in levels(measured):
        groups: dict[str, list[float]] = {}
        for trial in measured:
            value = decided(trial).get(name)
            if value is not None and trial.time_ms is not None:
                groups.setdefault(value, []).append(trial.time_ms)
        share = _explained([np.log(times) for times in groups.values()])
        if share is None:
            continue
        medians = {value: statistics.median(groups[value]) for value in sorted(groups, key=_order)}
        best = min(medians, key=lambda value: medians[value])
        count = sum(map(len, groups.values()))
        found.append(Importance(name, share, count, len(groups), best, medians))
    return sorted(found, key=lambda row: -row.share)


def _explained(groups: Sequence[np.ndarray]) -> float | None:
    """Return epsilon squared of a division into groups; None if it cannot be told."""
    everything = np.concatenate(list(groups)) if groups else np.zeros(0)
    count, kinds = len(everything), len(groups)
    if kinds < 2 or count <= kinds:
        return None
    total = float(((everything - everything.mean()) ** 2).sum())
    within = float(sum(((group - group.mean()) ** 2).sum() for group in groups))
    if total <= 0:
        return 0.0
    chance_part = (kinds - 1) * within / (count - kinds)
    return max(0.0, (total - within - chance_part) / total)


def measured_scores(history: TuningHistory) -> dict[int, float]:
    """Return for each trial, by its index, what the cost model predicts: the best time before its round over its own.

    0 for a trial that failed. None of the trials before which nothing was measured.
    """
    scores: dict[int, float] = {}
    best, best_before, number = math.inf, math.inf, None
    for trial in history.trials:
        if trial.round != number or trial.round is None:
            number, best_before = trial.round, best
        if math.isfinite(best_before):
            scores[trial.index] = 0.0 if trial.time_ms is None else best_before / trial.time_ms
        if trial.time_ms is not None:
            best = min(best, trial.time_ms)
    return scores


@dataclass(frozen=True)
class Correlation:
    """How well the cost model ordered the trials of a round.

    Parameters
    ----------
    round : int
    value : float
        Spearman's rank correlation of the prediction and the speed; 1 is the same order.
    trials : int
        Measured trials with a prediction.
    chance : float
        What the size of a correlation exceeds by chance in one of twenty rounds.
    """

    round: int
    value: float
    trials: int
    chance: float


def correlations(history: TuningHistory) -> list[Correlation]:
    """Return the rank correlation of each round that has at least three predictions; failed trials do not count."""
    rounds: dict[int, list[tuple[float, float]]] = {}
    for trial in history.trials:
        if trial.round is not None and trial.predicted is not None and trial.time_ms is not None:
            rounds.setdefault(trial.round, []).append((trial.predicted, -trial.time_ms))
    found = []
    for number, pairs in sorted(rounds.items()):
        value = rank_correlation(*zip(*pairs, strict=True)) if len(pairs) >= _FEWEST_PAIRS else None
        if value is not None:
            found.append(Correlation(number, value, len(pairs), chance(len(pairs))))
    return found


def chance(count: int) -> float:
    """Return the size that Spearman's correlation of so many unrelated pairs exceeds in one of twenty cases.

    Fisher's transformation with the variance of Fieller, Hartley and Pearson (1957); 1 where there are too few pairs.
    """
    return 1.0 if count <= 4 else math.tanh(1.96 * math.sqrt(1.06 / (count - 3)))


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Return Spearman's rank correlation; None if one of the two has no order."""
    ranks = [_ranks(np.asarray(values, float)) for values in (first, second)]
    if any(rank.std() == 0 for rank in ranks):
        return None
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    """Return the rank of each value; equal ones share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    mean: np.ndarray = last - (counts - 1) / 2
    return mean[inverse]
