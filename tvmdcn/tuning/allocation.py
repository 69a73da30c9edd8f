# SPDX-License-Identifier: Apache-2.0
"""Which of several layers the next trials go to: where the weighted sum of their times is expected to fall fastest.

The rule is Ansor's (Zheng et al., "Ansor: Generating High-Performance Tensor Programs for Deep Learning", OSDI 2020,
section 6), with its constants. MetaSchedule has a simpler form of it, ``task_scheduler.GradientBased``, which cannot
be used here: it reads times only from tasks that its own ``tune`` builds and runs, from C++, where it can neither
continue a log of trials, nor take in candidates of ours, nor survive Ctrl-C.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

__all__ = ["ROUND", "Standing", "best_so_far", "expected_gain", "next_layer"]

ROUND = 12
"""Trials between two looks at the cost model: what a layer is given at a time."""

_BACKWARD_SHARE = 0.2  # Ansor's alpha: what the last rounds gained, against what is still possible
_SIMILAR_FACTOR = 2.0  # Ansor's beta: how far behind the best similar layer a layer is expected to end, at worst
_WINDOW = 3  # rounds to look back on


@dataclass(frozen=True)
class Standing:
    """How far the tuning of one layer is.

    Parameters
    ----------
    best : sequence of float
        Seconds of the best schedule after each trial; infinite before one worked.
    flops : float
        Operations of a call.
    weight : float
        How often the layer is called.
    kind : hashable
        What layers that can reach similar speeds have in common.
    """

    best: Sequence[float]
    flops: float
    weight: float
    kind: Hashable

    @property
    def seconds(self) -> float:
        """The best time so far; infinite if there is none."""
        return self.best[-1] if self.best else math.inf


def best_so_far(seconds: Sequence[float | None]) -> list[float]:
    """Return the best time after each trial, from their times in order, None for a failure."""
    best, curve = math.inf, []
    for value in seconds:
        best = min(best, math.inf if value is None else value)
        curve.append(best)
    return curve


def expected_gain(standing: Standing, others: Sequence[Standing]) -> float:
    """Return by how many weighted seconds the next round is expected to lower a layer's time.

    A part is what the last rounds gained. The rest is the larger of two hopes: that the time falls as the inverse of
    the number of rounds, and that the layer gets near the speed of the fastest similar one.

    Parameters
    ----------
    standing : Standing
    others : sequence of Standing
        All layers; those of another kind are passed over.

    Returns
    -------
    float
        Infinite for a layer that has no time yet.
    """
    now = standing.seconds
    if not math.isfinite(now):
        return math.inf
    rounds, back = max(1.0, len(standing.best) / ROUND), 1 + _WINDOW * ROUND
    backward = 0.0
    if len(standing.best) >= back and math.isfinite(standing.best[-back]):
        backward = (standing.best[-back] - now) / _WINDOW
    speeds = [other.flops / other.seconds for other in others if other.kind == standing.kind]
    reachable = _SIMILAR_FACTOR * standing.flops / max(speeds) if speeds and max(speeds) > 0 else math.inf
    forward = max(now / rounds, now - reachable)
    return standing.weight * (_BACKWARD_SHARE * backward + (1 - _BACKWARD_SHARE) * forward)


def next_layer(standings: Sequence[Standing], alive: Sequence[int]) -> int:
    """Return which of the layers `alive` the next trials go to; of equals the first.

    Parameters
    ----------
    standings : sequence of Standing
        All layers, those with nothing more to try included: others are compared with them.
    alive : sequence of int
        Places of those that can go on; not empty.
    """
    return max(alive, key=lambda place: (expected_gain(standings[place], standings), -place))
