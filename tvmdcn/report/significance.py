# SPDX-License-Identifier: Apache-2.0
"""Statistics of measured rows: how well a median is known, and whether two of them differ beyond noise.

All on a logarithmic scale, on which ratios are differences.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tvmdcn.bench.measurement import Measurement

__all__ = ["Drift", "Estimate", "Interval", "difference", "drift_of", "estimate", "holm", "interval"]

DRAWS = 1000
# Fewer controls than this say nothing of a run's drift.
LEAST_CONTROLS = 5
# The distance of the 10th and 90th percentiles of a normal distribution, and its median absolute deviation, in
# standard deviations.
_NORMAL_WIDTH = 2.563
_NORMAL_MAD = 0.6745


@dataclass(frozen=True)
class Estimate:
    """A number with the variance of its estimate and the degrees of freedom that the variance rests on.

    `rough` says that a row had no samples, so that the spread of its single calls stands for the noise.
    """

    value: float
    variance: float
    freedom: float
    rough: bool = False


@dataclass(frozen=True)
class Interval:
    """An interval of confidence, and the two-sided p-value of the difference being none."""

    low: float
    high: float
    p: float


@dataclass(frozen=True)
class Drift:
    """What rows that cannot have changed say of two runs.

    Parameters
    ----------
    value : float
        Logarithm of the median ratio.
    spread : float
        Standard deviation between runs beyond what samples show.
    controls : int
        How many rows there were.
    """

    value: float
    spread: float
    controls: int

    @property
    def variance(self) -> float:
        """What it adds to the variance of any row's ratio: the spread between runs, and the error of the median."""
        return self.spread**2 * (1 + math.pi / 2 / self.controls)


def estimate(row: Measurement, generator: np.random.Generator) -> Estimate:
    """Return the logarithm of a row's median, with its variance.

    The samples are drawn again with replacement, turns first, then calls within a turn: a bootstrap of clustered data
    (Davison and Hinkley, "Bootstrap methods and their application", 1997, section 3.8). A row without samples has
    the variance of its single calls, which is too large rather than too small.

    Parameters
    ----------
    row : Measurement
        A row that did not fail.
    generator : numpy.random.Generator
        Draws the samples.
    """
    assert row.median_ms is not None
    value = math.log(row.median_ms)
    turns = row.samples_ms or ()
    count = len(turns)
    if count < 2:
        assert row.p10 is not None
        assert row.p90 is not None
        return Estimate(value, (math.log(row.p90 / row.p10) / _NORMAL_WIDTH) ** 2, max(row.runs - 1, 1), rough=True)
    # Drawing from k turns underestimates the variance between turns by (k - 1) / k.
    variance = float(np.var(np.log(_medians(turns, generator)))) * count / (count - 1)
    return Estimate(value, variance, count - 1)


def _medians(turns: Sequence[Sequence[float]], generator: np.random.Generator) -> np.ndarray[Any, np.dtype[Any]]:
    """Return the medians of samples drawn again."""
    size = max(map(len, turns))
    # A turn that kept fewer calls weighs as much as any other: each stands for its own quantiles.
    shares = (np.arange(size) + 0.5) / size
    table = np.stack([np.quantile(np.asarray(turn), shares, method="hazen") for turn in turns])
    drawn = table[generator.integers(len(turns), size=(DRAWS, len(turns)))]
    calls = generator.integers(size, size=drawn.shape)
    return np.median(np.take_along_axis(drawn, calls, axis=2).reshape(DRAWS, -1), axis=1)


def drift_of(differences: Sequence[Estimate]) -> Drift | None:
    """Return the drift between two runs from rows that cannot have changed; None if there are too few.

    The spread is that of the controls about their median, by its absolute deviation, beyond what their samples explain.
    """
    if len(differences) < LEAST_CONTROLS:
        return None
    values = np.array([found.value for found in differences])
    middle = float(np.median(values))
    total = float(np.median(np.abs(values - middle))) / _NORMAL_MAD
    explained = float(np.median([found.variance for found in differences]))
    return Drift(middle, math.sqrt(max(total**2 - explained, 0.0)), len(differences))


def difference(b: Estimate, a: Estimate) -> Estimate:
    """Return B less A; the degrees of freedom are those of Welch and Satterthwaite."""
    return Estimate(b.value - a.value, b.variance + a.variance, _welch(b, a), b.rough or a.rough)


def _welch(*parts: Estimate) -> float:
    total = sum(part.variance for part in parts)
    weighed = sum(part.variance**2 / part.freedom for part in parts)
    return total**2 / weighed if weighed else min(part.freedom for part in parts)


def interval(found: Estimate, drift: Drift | None, level: float) -> Interval:
    """Return the interval of a difference, without the drift, at confidence 1 - level, by Student's t."""
    from scipy import special

    centre, combined = found.value, found
    if drift is not None:
        noise = Estimate(0.0, drift.variance, drift.controls - 1)
        combined = Estimate(0.0, found.variance + noise.variance, _welch(found, noise))
        centre -= drift.value
    error = math.sqrt(combined.variance)
    reach = error * float(special.stdtrit(combined.freedom, 1 - level / 2))
    p = 2 * float(special.stdtr(combined.freedom, -abs(centre) / error)) if error else float(centre == 0)
    return Interval(centre - reach, centre + reach, p)


def holm(values: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number, in the same order.

    What is below a level then is a finding, and the chance of any false one is at most that level (Holm, "A simple
    sequentially rejective multiple test procedure", 1979).
    """
    order = sorted(range(len(values)), key=values.__getitem__)
    corrected = [0.0] * len(values)
    largest = 0.0
    for place, index in enumerate(order):
        largest = max(largest, min(1.0, values[index] * (len(values) - place)))
        corrected[index] = largest
    return corrected
