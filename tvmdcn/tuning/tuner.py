# SPDX-License-Identifier: Apache-2.0
"""Tuning: search the best schedule of a layer on this machine, and keep it.

Every trial is checked against the reference before its time counts. All that is measured is on disk at once;
a tuning that was interrupted or killed continues where it was.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock, Timeout

from tvmdcn.errors import SpecError, SpecTypeError, TuningError
from tvmdcn.extras import require
from tvmdcn.spec import DeformConv2dSpec, Extents
from tvmdcn.target import TargetInfo, detect_target, resolve_target
from tvmdcn.threads import thread_count
from tvmdcn.tuning.records import TuningRecords, user_root
from tvmdcn.tuning.session import Progress, Session, TuningResult
from tvmdcn.validation import check_int, shown

__all__ = ["Progress", "TuningResult", "tune"]


def tune(
    spec: DeformConv2dSpec,
    extents: Extents,
    target: str | TargetInfo | None = None,
    *,
    trials: int = 64,
    threads: int | None = None,
    time_budget: float | None = None,
    resume: bool = True,
    records: Path | None = None,
    name: str = "",
    seed: int = 0,
    progress: Callable[[Progress], None] | None = None,
) -> TuningResult:
    """Search the best schedule of a layer and keep it in the target's records.

    Parameters
    ----------
    spec : DeformConv2dSpec or DeformConv2dGradSpec
        The layer, or its gradients.
    extents : Extents
        Representative batch, height and width; the kernel stays free in them.
    target : str or TargetInfo, optional
        Must be able to run here; this machine by default.
    trials : int
        Schedules to measure in all, those of earlier runs included when resuming.
    threads : int, optional
        Threads of a call; by default as :func:`tvmdcn.threads.thread_count` says.
    time_budget : float, optional
        Seconds after which no new round begins.
    resume : bool
        Continue from the trials of earlier runs; otherwise they are deleted.
    records : Path, optional
        Root of the records; by default TVMDCN_RECORDS, or the user's data directory.
    name : str
        A name for the layer in logs and reports; the spec's slug by default.
    seed : int
    progress : callable, optional
        Called after each trial.

    Returns
    -------
    TuningResult

    Raises
    ------
    SpecError, SpecTypeError
        If an argument is not understood, or the target is another machine's.
    TuningError
        If no schedule could be built, run and verified, or another process is tuning the same layer.
    RecordsError
        If earlier records or trials cannot be read.
    MissingExtra
        If the packages of the extra "tune" are not installed.
    KeyboardInterrupt
        If Ctrl-C comes before anything was measured.
    """
    if not isinstance(spec, DeformConv2dSpec):
        raise SpecTypeError(
            f"spec must be a DeformConv2dSpec or DeformConv2dGradSpec, got {shown(spec)} of type {type(spec).__name__}."
        )
    check_int("trials", trials, 1)
    count = thread_count() if threads is None else check_int("threads", threads, 1)
    if time_budget is not None and not (isinstance(time_budget, (int, float)) and 0 < time_budget < math.inf):
        raise SpecError(f"time_budget must be a positive number of seconds, got {shown(time_budget)}.")
    if extents.batch < 1:
        raise SpecError("extents.batch must be at least 1 to measure anything, got 0.")
    info = resolve_target(target)
    here = detect_target()
    if info.tag != here.tag and not info.features <= here.features:
        raise SpecError(f"target {info.tag} cannot be measured on this machine, which is {here.tag}. Tune there.")
    require("tune", "tuning")
    root = user_root() if records is None else Path(records)
    TuningRecords.read(root, info.tag)  # a damaged file is told now, not after the search
    suffix = spec.operator.removeprefix(DeformConv2dSpec.operator)  # a layer and its gradients may have one name
    label = f"{_file_name(name or spec.slug)}{suffix}-t{count}"
    folder = root / info.tag / "trials"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / f".{label}.lock", timeout=0):
            session = Session(
                spec,
                extents,
                info,
                threads=count,
                log=folder / f"{label}.jsonl",
                name=name or spec.slug,
                resume=resume,
                seed=seed,
                wanted=trials,
                report=progress,
            )
            return session.run(root, time_budget)
    except Timeout as error:
        raise TuningError(
            f"another process is tuning {label} into {folder}. Wait for it, or name another folder."
        ) from error


def _file_name(name: str) -> str:
    """Return a name with nothing in it that means something to a file system."""
    return re.sub(r"[^\w.,=+-]+", "_", name, flags=re.ASCII).strip("._")[:100] or "layer"
