# SPDX-License-Identifier: Apache-2.0
"""Tuning: search the best schedules of layers, on this machine or on others, and keep them.

Every trial is checked against the reference before its time counts. All that is measured is on disk at once;
a tuning that was interrupted or killed continues where it was.
"""

from __future__ import annotations

import contextlib
import logging
import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from filelock import FileLock, Timeout

from tvmdcn import env
from tvmdcn.errors import SpecError, SpecTypeError, TuningError
from tvmdcn.extras import require
from tvmdcn.spec import DeformConv2dSpec, Extents
from tvmdcn.target import TargetInfo, detect_target, resolve_target
from tvmdcn.threads import thread_count
from tvmdcn.tuning.allocation import next_layer
from tvmdcn.tuning.farm import Farm, ServersLost
from tvmdcn.tuning.records import TuningRecords, user_root
from tvmdcn.tuning.scratch import scratch_directory
from tvmdcn.tuning.session import Progress, Session, TuningResult
from tvmdcn.tuning.warm_start import similar_decisions
from tvmdcn.tuning.workers import Workers
from tvmdcn.validation import check_int, shown

__all__ = ["Farm", "Layer", "Progress", "TuningResult", "tune", "tune_together"]

_log = logging.getLogger(__name__)

WARM_STARTS = 4
"""Schedules of similar layers that are tried first, where nobody says how many."""
_GRACE = 1.2  # of the time budget, after which a round that has begun ends early
_MOST_BUILDERS = 8


@dataclass(frozen=True)
class Layer:
    """What :func:`tune_together` tunes.

    Parameters
    ----------
    spec : DeformConv2dSpec or DeformConv2dGradSpec
        The layer, or its gradients.
    extents : Extents
        Representative batch, height and width; the kernel stays free in them.
    name : str
        A name for the layer in logs and reports; the spec's slug by default.
    weight : float
        How often it is called, compared with the others.

    Raises
    ------
    SpecError, SpecTypeError
        If one is not understood.
    """

    spec: DeformConv2dSpec
    extents: Extents
    name: str = ""
    weight: float = 1.0

    def __post_init__(self) -> None:
        """Check the fields."""
        if not isinstance(self.spec, DeformConv2dSpec):
            raise SpecTypeError(
                f"spec must be a DeformConv2dSpec or DeformConv2dGradSpec, got {shown(self.spec)} of type "
                f"{type(self.spec).__name__}."
            )
        if self.extents.batch < 1:
            raise SpecError("extents.batch must be at least 1 to measure anything, got 0.")
        if not (isinstance(self.weight, (int, float)) and 0 < self.weight < math.inf):
            raise SpecError(f"weight must be a positive number, got {shown(self.weight)}.")

    def label(self, threads: int) -> str:
        """Return the name of its log, without a suffix."""
        # A layer and its gradients may have one name.
        suffix = self.spec.operator.removeprefix(DeformConv2dSpec.operator)
        return f"{_file_name(self.name or self.spec.slug)}{suffix}-t{threads}"


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
    warm_starts: int = WARM_STARTS,
    progress: Callable[[Progress], None] | None = None,
    farm: Farm | None = None,
) -> TuningResult:
    """Search the best schedule of a layer and keep it in the target's records.

    Parameters
    ----------
    spec, extents, name
        The layer; see :class:`Layer`.
    target, trials, threads, time_budget, resume, records, seed, warm_starts, progress, farm
        See :func:`tune_together`.

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
    (result,) = tune_together(
        [Layer(spec, extents, name)],
        target,
        trials=trials,
        threads=threads,
        time_budget=time_budget,
        resume=resume,
        records=records,
        seed=seed,
        warm_starts=warm_starts,
        progress=progress,
        farm=farm,
    )
    if isinstance(result, TuningError):
        raise result
    return result


def tune_together(
    layers: Sequence[Layer],
    target: str | TargetInfo | None = None,
    *,
    trials: int = 64,
    threads: int | None = None,
    time_budget: float | None = None,
    resume: bool = True,
    records: Path | None = None,
    seed: int = 0,
    warm_starts: int = WARM_STARTS,
    progress: Callable[[Progress], None] | None = None,
    farm: Farm | None = None,
) -> list[TuningResult | TuningError]:
    """Search the best schedules of several layers, giving the trials to where most is to be gained.

    Each layer gets a first round: the defaults of its design space, and what is known of similar layers. Then
    rounds go where the weighted sum of all layers' times is expected to fall fastest
    (:mod:`tvmdcn.tuning.allocation`).

    Parameters
    ----------
    layers : sequence of Layer
        No two of the same name and operator.
    target : str or TargetInfo, optional
        Must be able to run here; this machine by default. With a farm, what its servers are, and the default.
    trials : int
        Schedules to measure in all, those of earlier runs included when resuming; at least one for each layer.
    threads : int, optional
        Threads of a call; by default as :func:`tvmdcn.threads.thread_count` says where it is measured.
    time_budget : float, optional
        Seconds after which no new round begins.
    resume : bool
        Continue from the trials of earlier runs; otherwise they are deleted.
    records : Path, optional
        Root of the records; by default TVMDCN_RECORDS, or the user's data directory.
    seed : int
    warm_starts : int
        Schedules to try first that were found for similar layers, of this target or of others of its kind.
    progress : callable, optional
        Called after each trial.
    farm : Farm, optional
        Other machines, which measure what is built here.

    Returns
    -------
    list of TuningResult or TuningError
        For each layer what was kept, or why nothing was.

    Raises
    ------
    SpecError, SpecTypeError
        If an argument is not understood, or the target is another machine's.
    TuningError
        If another process is tuning one of the layers, or no server of the farm can be used.
    RecordsError
        If earlier records or trials cannot be read.
    MissingExtra
        If the packages of the extra "tune" are not installed.
    KeyboardInterrupt
        If Ctrl-C comes before anything was measured.
    """
    check_int("trials", trials, 1)
    check_int("warm_starts", warm_starts, 0)
    if threads is not None:
        check_int("threads", threads, 1)
    if time_budget is not None and not (isinstance(time_budget, (int, float)) and 0 < time_budget < math.inf):
        raise SpecError(f"time_budget must be a positive number of seconds, got {shown(time_budget)}.")
    if trials < len(layers):
        raise SpecError(f"trials must be at least 1 for each of the {len(layers)} layers, got {trials}.")
    labels = [layer.label(0) for layer in layers]
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice is not None:
        raise SpecError(f"two layers would share the log {twice.removesuffix('-t0')}. Give each a name of its own.")
    info = _known_target(target, farm)
    # The search for a GPU's schedules does without the cost model's package.
    require("tune", "tuning", ("xgboost",) if info is not None and info.kind == "cuda" else ())
    root = user_root() if records is None else Path(records)
    with contextlib.ExitStack() as stack:
        machine = None if farm is None else stack.enter_context(farm.opened(info, threads))
        if machine is not None:
            info, count = machine.target, threads or machine.threads
        else:
            assert info is not None
            count = threads or thread_count()
        TuningRecords.read(root, info.tag)  # a damaged file is told now, not after the search
        logs = [root / info.tag / "trials" / f"{layer.label(count)}.jsonl" for layer in layers]
        for log in logs:
            stack.enter_context(_locked(log))
        scratch = stack.enter_context(scratch_directory())
        run = _Run(root, trials, time_budget)
        for number, (layer, log) in enumerate(zip(layers, logs, strict=True)):
            folder = scratch / f"layer{number}"
            folder.mkdir(mode=0o700)
            run.sessions.append(
                Session(
                    layer.spec,
                    layer.extents,
                    info,
                    threads=count,
                    log=log,
                    scratch=folder,
                    name=layer.name or layer.spec.slug,
                    weight=layer.weight,
                    resume=resume,
                    seed=seed,
                    starts=similar_decisions(layer.spec, info, count, warm_starts),
                    wanted=trials,
                    report=progress,
                    machine=None if machine is None else machine.provenance,
                )
            )
        builders = max(1, min(detect_target().cores or 1, _MOST_BUILDERS))
        # CUDA's compiler takes its time.
        options = {"build_timeout": 240.0} if info.kind == "cuda" else {}
        return run.results(stack.enter_context(Workers(builders, farm, **options)))


@dataclass
class _Run:
    """Several layers in one run."""

    root: Path
    trials: int
    time_budget: float | None
    sessions: list[Session] = field(default_factory=list)
    start: float = field(default_factory=time.monotonic)

    def results(self, workers: Workers) -> list[TuningResult | TuningError]:
        """Search until the trials or the time are used up, then keep the best of each layer."""
        results: list[TuningResult | TuningError] = []
        try:
            self._search(workers)
            for session in self.sessions:
                results.append(self._result(session, workers))
        except (KeyboardInterrupt, ServersLost) as end:
            if not any(session.ranked() for session in self.sessions):
                raise
            _log.warning("%s: keeping the best that was measured", str(end) or "interrupted")
            results += [self._result(session, None) for session in self.sessions[len(results) :]]
        return results

    def _result(self, session: Session, workers: Workers | None) -> TuningResult | TuningError:
        """Keep the best of a layer, compared once more if there are workers; return an error of this layer alone."""
        try:
            return session.stop(self.root) if workers is None else session.finish(workers, self.root)
        except ServersLost:
            raise
        except TuningError as error:
            return error

    def _search(self, workers: Workers) -> None:
        budget = math.inf if self.time_budget is None else self.time_budget
        waiting = list(range(len(self.sessions)))
        while True:
            left = self.trials - sum(len(session.log.rows) for session in self.sessions)
            late = time.monotonic() - self.start > budget
            alive = [place for place, session in enumerate(self.sessions) if not session.exhausted]
            if left <= 0 or not (waiting or alive) or (late and not waiting):
                return
            if waiting:  # each in turn, and none takes what the others need for theirs
                place = waiting.pop(0)
                limit = 1 if late else left - len(waiting)
            else:
                place = next_layer([session.standing() for session in self.sessions], alive)
                limit = left
            if limit > 0:
                self.sessions[place].round(workers, limit, self.start + _GRACE * budget)


def _known_target(target: str | TargetInfo | None, farm: Farm | None) -> TargetInfo | None:
    """Return the target; refuse one that this machine cannot run, if it is to measure. None: what the farm is."""
    if farm is not None:
        return None if target is None and env.target() is None else resolve_target(target)
    info = resolve_target(target)
    why = info.refusal()
    if why:
        raise SpecError(
            f"target {info.tag} cannot be measured on this machine: it {why}. Or build here and measure on one that "
            "can: --tracker."
        )
    return info


@contextlib.contextmanager
def _locked(log: Path) -> Iterator[None]:
    """Hold the lock of a log."""
    log.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(log.parent / f".{log.stem}.lock", timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise TuningError(
            f"another process is tuning {log.stem} into {log.parent}. Wait for it, or name another folder."
        ) from error
    try:
        yield
    finally:
        lock.release()


def _file_name(name: str) -> str:
    """Return a name with nothing in it that means something to a file system."""
    return re.sub(r"[^\w.,=+-]+", "_", name, flags=re.ASCII).strip("._")[:100] or "layer"
