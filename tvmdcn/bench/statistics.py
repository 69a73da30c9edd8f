# SPDX-License-Identifier: Apache-2.0
"""What is kept of many timed calls: quantiles, a sample that comparisons can draw from, and whether to trust it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

__all__ = ["NOISY_DRIFT", "NOISY_SPREAD", "NOISY_TAIL", "SAMPLES_PER_TURN", "noise", "percentile", "summarize"]

SAMPLES_PER_TURN = 16
"""Of a turn with more calls than this, that many quantiles are kept."""

# A figure is noisy if one of these is exceeded. On an idle machine (Zen 5, 2 processors, virtual, 2026-11) calls above
# 0.1 ms have spreads of 0.01 to 0.04 and tails of 1.02 to 1.1.
NOISY_SPREAD = 0.10
"""Distance of the quartiles in units of the median."""
NOISY_TAIL = 1.25
"""The 90th percentile in units of the median."""
NOISY_DRIFT = 0.25
"""Distance of the lowest and the highest median of a turn in units of the median."""


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value below which a share (0 to 1) of the values lie, interpolated between neighbours.

    Raises
    ------
    ValueError
        If there are no values, or the share is outside 0 to 1.
    """
    if not values or not 0 <= share <= 1:
        raise ValueError(f"percentile needs values and a share from 0 to 1, got {len(values)} and {share}.")
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    # This form keeps equal neighbours exactly equal, so that percentiles stay in order.
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def summarize(turns: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Return the fields of a row that its timed calls give.

    Parameters
    ----------
    turns : sequence of sequence of float
        Milliseconds of each call, by turn.

    Returns
    -------
    dict
        ``median_ms``, ``min_ms``, ``p10``, ``p25``, ``p75``, ``p90`` over all calls, their number ``runs``, and
        ``samples_ms``: per turn its calls in ascending order, or, where there are more, as many quantiles as
        :data:`SAMPLES_PER_TURN`, each in the middle of an equal share of the calls.

    Raises
    ------
    ValueError
        If there is no call.
    """
    turns = [turn for turn in turns if turn]
    times = sorted(time for turn in turns for time in turn)
    return {
        "median_ms": percentile(times, 0.5),
        "min_ms": min(times),
        **{f"p{round(100 * share)}": percentile(times, share) for share in (0.1, 0.25, 0.75, 0.9)},
        "runs": len(times),
        "samples_ms": tuple(map(_sample, turns)),
    }


def _sample(turn: Sequence[float]) -> tuple[float, ...]:
    count = min(len(turn), SAMPLES_PER_TURN)
    chosen = sorted(turn) if len(turn) == count else [percentile(turn, (i + 0.5) / count) for i in range(count)]
    return tuple(float(f"{value:.6g}") for value in chosen)


def noise(
    median: float, p90: float, spread: float | None = None, turns: Sequence[Sequence[float]] | None = None
) -> str | None:
    """Return why the calls of a row are too unlike each other to trust the median; None if they are alike.

    Parameters
    ----------
    median, p90 : float
        Milliseconds.
    spread : float, optional
        Distance of the quartiles in units of the median.
    turns : sequence of sequence of float, optional
        Milliseconds, by turn.
    """
    if spread is not None and spread > NOISY_SPREAD:
        return f"the middle half of the calls spreads over {spread:.0%} of the median"
    if p90 > NOISY_TAIL * median:
        return f"one call in ten takes {p90 / median:.2f} times the median or more"
    if turns is not None:
        medians = [percentile(turn, 0.5) for turn in turns]
        drift = (max(medians) - min(medians)) / median
        if drift > NOISY_DRIFT:
            return f"the medians of its turns lie {drift:.0%} of the median apart"
    return None
