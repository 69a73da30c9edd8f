# SPDX-License-Identifier: Apache-2.0
"""What a report takes besides rows: how a tuning went. The logs fill it in; a report knows nothing of their format."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

__all__ = ["Trial", "TuningHistory"]


@dataclass(frozen=True)
class Trial:
    """One candidate of a tuning run.

    Parameters
    ----------
    index : int
        Its place in the order of measurement.
    time_ms : float, optional
        What it took; None if it failed.
    reason : str, optional
        Why it failed: build, run, time-out, wrong result.
    elapsed_s : float, optional
        Seconds from the start of the run to the end of the trial.
    decisions : mapping of str to str
        What it decided, in words.
    round : int, optional
        In which round of the search it was tried, counted from 0 over all runs.
    predicted : float, optional
        What the cost model gave it beforehand, higher is better; None if it gave nothing.
    """

    index: int
    time_ms: float | None
    reason: str | None = None
    elapsed_s: float | None = None
    decisions: Mapping[str, str] = field(default_factory=dict)
    round: int | None = None
    predicted: float | None = None


@dataclass(frozen=True)
class TuningHistory:
    """The trials of one problem, in the order of measurement.

    Parameters
    ----------
    problem : str
    trials : sequence of Trial
    source : str
        Where they come from: a target.
    threads : int, optional
        Of each call.
    """

    problem: str
    trials: Sequence[Trial]
    source: str = ""
    threads: int | None = None

    @property
    def best(self) -> Trial | None:
        """The fastest trial."""
        measured = [trial for trial in self.trials if trial.time_ms is not None]
        return min(measured, key=lambda trial: trial.time_ms or 0.0, default=None)

    @property
    def first(self) -> Trial | None:
        """The first trial that was measured."""
        return next((trial for trial in self.trials if trial.time_ms is not None), None)

    @property
    def failures(self) -> Mapping[str, int]:
        """How many trials failed, by reason, the most frequent first."""
        reasons = Counter(trial.reason or "no reason given" for trial in self.trials if trial.time_ms is None)
        return dict(reasons.most_common())

    def best_so_far(self) -> list[float | None]:
        """Return the fastest time up to and with each trial."""
        best: float | None = None
        series = []
        for trial in self.trials:
            if trial.time_ms is not None and (best is None or trial.time_ms < best):
                best = trial.time_ms
            series.append(best)
        return series
