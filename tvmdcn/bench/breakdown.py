# SPDX-License-Identifier: Apache-2.0
"""What each stage of a kernel costs, from times of the kernel with some of its stages switched on.

Stages are switched on one after the other, once in the order in which they run and once the other way round. What a
stage adds to the time differs between the two, because a processor works on neighbouring stages at once, and because
one leaves in the caches what the other reads. The mean of both is shown: these add up to the whole exactly. How far
the two lie apart, and how far each moves if other turns had been measured, is the error.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tvmdcn.bench.schema import MeasurementError, shortened
from tvmdcn.errors import TvmdcnError
from tvmdcn.spec import DeformConv2dGradSpec, spec_from_json

__all__ = ["KIND", "Breakdown", "StageTime"]

KIND = "stages"
"""The kind of row that holds what is read here."""

_DRAWS = 1000
_TAIL = 0.05  # on either side of an interval


@dataclass(frozen=True)
class StageTime:
    """What a stage costs.

    Parameters
    ----------
    name : str
    running_ms, reverse_ms : float
        What it added to those before it, switched on in the order in which stages run, and in the other.
    low_ms, high_ms : float
        The interval that holds both, each with its 90 % interval of the bootstrap over turns.
    """

    name: str
    running_ms: float
    reverse_ms: float
    low_ms: float
    high_ms: float

    @property
    def ms(self) -> float:
        """The mean of both."""
        return (self.running_ms + self.reverse_ms) / 2


@dataclass(frozen=True)
class Breakdown:
    """Where the time of one kernel goes.

    Parameters
    ----------
    title : str
        The layer, with the direction if it is backward.
    direction : str
        "forward" or "backward".
    schedule : str
    threads : int
    machine : mapping
    date : str
    stages : sequence of StageTime
        In the order in which they run.
    rest_ms : float
        With every stage switched off: the call, memory of its own, loops, threads.
    whole_ms : float
        With every stage switched on.
    shipped_ms : float
        The kernel without switches.
    """

    title: str
    direction: str
    schedule: str
    threads: int
    machine: Mapping[str, Any]
    date: str
    stages: Sequence[StageTime]
    rest_ms: float
    whole_ms: float
    shipped_ms: float

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Breakdown:
        """Return what a successful row of the kind ``stages`` says.

        Raises
        ------
        MeasurementError
            If a field is missing or is not what the tool writes.
        """
        try:
            spec = spec_from_json(row["spec"])
            names, orders = [str(name) for name in row["stages"]], [list(order) for order in row["orders"]]
            settings = {frozenset(setting["on"]): _turns(setting["turns_ms"]) for setting in row["settings"]}
            shipped = _turns(row["shipped_ms"])
            title, schedule, threads = str(row["problem"]), str(row["schedule"]), int(row["threads"])
            machine, date = dict(row["machine"]), str(row["date"])
        except (KeyError, TypeError, ValueError, TvmdcnError) as error:
            raise MeasurementError(f"a row of stages cannot be read: {type(error).__name__}: {error}") from error
        if len(orders) != 2 or any(sorted(order) != sorted(names) for order in orders):
            raise MeasurementError(f"orders must be two orders of the stages, got {shortened(orders)}.")
        count = len(shipped)
        if any(len(turns) != count for turns in settings.values()):
            raise MeasurementError("every setting of a row of stages must have as many turns as the shipped kernel.")
        # The same turns for all settings: what disturbed a turn of one disturbed its neighbours too.
        drawn = np.random.default_rng(0).integers(0, count, (_DRAWS, count))
        added = []
        for order in orders:
            steps = [frozenset(order[:end]) for end in range(len(order) + 1)]
            missing = [step for step in steps if step not in settings]
            if missing:
                raise MeasurementError(f"settings lacks the one with {', '.join(sorted(missing[0])) or 'no stage'} on.")
            added.append(
                {
                    stage: _difference(settings[after], settings[before], drawn)
                    for stage, before, after in zip(order, steps, steps[1:], strict=False)
                }
            )
        stages = []
        for name in names:
            (running, low, high), (reverse, low_2, high_2) = (found[name] for found in added)
            stages.append(StageTime(name, running, reverse, min(low, low_2), max(high, high_2)))
        direction = "backward" if isinstance(spec, DeformConv2dGradSpec) else "forward"
        if direction == "backward":
            title += " backward"
        times = (settings[frozenset()], settings[frozenset(names)], shipped)
        rest, whole, shipped_ms = (float(np.median(turns)) for turns in times)
        return cls(title, direction, schedule, threads, machine, date, stages, rest, whole, shipped_ms)

    @property
    def overhead(self) -> float:
        """The time with all switches on in units of the kernel without switches."""
        return self.whole_ms / self.shipped_ms


def _turns(values: Any) -> np.ndarray:
    turns = np.array(values, dtype=float)
    if turns.ndim != 1 or not turns.size or not all(math.isfinite(value) and value > 0 for value in turns):
        raise ValueError(f"turns must be positive times, got {shortened(values)}.")
    return turns


def _difference(after: np.ndarray, before: np.ndarray, drawn: np.ndarray) -> tuple[float, float, float]:
    """Return the difference of medians, and the ends of its interval over redrawn turns."""
    moved = np.median(after[drawn], axis=1) - np.median(before[drawn], axis=1)
    low, high = np.quantile(moved, [_TAIL, 1 - _TAIL])
    value = float(np.median(after) - np.median(before))
    return value, min(float(low), value), max(float(high), value)
