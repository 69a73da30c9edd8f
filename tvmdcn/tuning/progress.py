# SPDX-License-Identifier: Apache-2.0
"""What a tuning says while it runs, and in the end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tvmdcn.tuning.records import Record

__all__ = ["Progress", "TuningResult"]


@dataclass(frozen=True)
class Progress:
    """What a tuning reports after each trial.

    Parameters
    ----------
    trials, wanted : int
        Trials of the layer so far, earlier runs included, and how many are wanted: of this layer, or of all that
        are tuned together.
    best, default : float
        Seconds of the best schedule so far and of the default one; infinite until measured.
    failures : mapping of str to int
        Failed trials by reason.
    elapsed : float
        Seconds of this run.
    stage : str
        "search", "build", "measure" or "final".
    name : str
        The layer.
    weight : float
        How often it is called.
    """

    trials: int
    wanted: int
    best: float
    default: float
    failures: Mapping[str, int]
    elapsed: float
    stage: str
    name: str = ""
    weight: float = 1.0


@dataclass(frozen=True)
class TuningResult:
    """How a tuning ended.

    Parameters
    ----------
    record : Record
        What was kept.
    path : Path
        Where: the target's ``meta.json``.
    trials : int
        All trials of the layer so far.
    new_trials : int
        Those of this run.
    failures : mapping of str to int
        Failed trials by reason.
    interrupted : bool
        Whether Ctrl-C ended it.
    """

    record: Record
    path: Path
    trials: int
    new_trials: int
    failures: Mapping[str, int]
    interrupted: bool
