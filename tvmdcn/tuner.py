# SPDX-License-Identifier: Apache-2.0
"""Tuning: search the best schedule of a layer on this machine, and keep it.

Every trial is checked against the reference before its time counts. All that is measured is on disk at once; a tuning
that was interrupted or killed continues where it was.
"""

from __future__ import annotations

import logging
import math
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from tvmdcn.cache_key import source_digest
from tvmdcn.errors import SpecError, TuningError
from tvmdcn.history import TrialLog, TrialRow, drop_torn_line
from tvmdcn.problems import make_tensors
from tvmdcn.records import Record, TuningRecords, user_root
from tvmdcn.search import Candidate, Search
from tvmdcn.space import Decisions
from tvmdcn.spec import DeformConv2dSpec, Extents
from tvmdcn.target import TargetInfo, detect_target, host_identity, resolve_target
from tvmdcn.te import operator_of
from tvmdcn.threads import thread_count
from tvmdcn.trial import Job, Outcome, Workers
from tvmdcn.validation import check_int

__all__ = ["Progress", "TuningResult", "tune"]

_log = logging.getLogger(__name__)

_ROUND = 12  # candidates between two looks at the cost model
_FINALISTS = 3  # measured again in turns, with the default, before one is kept
_FINAL_ROUNDS = 5
_IDLE_ROUNDS = 3  # rounds without anything new after which the space counts as exhausted


@dataclass(frozen=True)
class Progress:
    """What a tuning reports after each trial.

    Parameters
    ----------
    trials, wanted : int
        Trials so far, earlier runs included, and how many are wanted.
    best, default : float
        Seconds of the best schedule so far and of the default one; infinite until measured.
    failures : mapping of str to int
        Failed trials by reason.
    elapsed : float
        Seconds of this run.
    stage : str
        "search", "build", "measure" or "final".
    """

    trials: int
    wanted: int
    best: float
    default: float
    failures: Mapping[str, int]
    elapsed: float
    stage: str


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
    spec : DeformConv2dSpec
        The layer.
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
        If earlier records cannot be read.
    """
    check_int("trials", trials, 1)
    if time_budget is not None and not (isinstance(time_budget, (int, float)) and time_budget > 0):
        raise SpecError(f"time_budget must be a positive number of seconds, got {time_budget!r}.")
    if extents.batch < 1:
        raise SpecError("extents.batch must be at least 1 to measure anything, got 0.")
    info = resolve_target(target)
    here = detect_target()
    if info.tag != here.tag and not info.features <= here.features:
        raise SpecError(f"target {info.tag} cannot be measured on this machine, which is {here.tag}. Tune there.")
    count = threads or thread_count()
    root = user_root() if records is None else Path(records)
    label = f"{name or spec.slug}-t{count}"
    folder = root / info.tag / "trials"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / f".{label}.lock", timeout=0):
            session = _Session(spec, extents, info, count, folder, label, name, resume, seed, progress, trials)
            return session.run(root, time_budget)
    except Timeout as error:
        raise TuningError(
            f"another process is tuning {label} into {folder}. Wait for it, or name another folder."
        ) from error


class _Session:
    """One run of a tuning."""

    def __init__(
        self,
        spec: DeformConv2dSpec,
        extents: Extents,
        target: TargetInfo,
        threads: int,
        folder: Path,
        label: str,
        name: str,
        resume: bool,
        seed: int,
        progress: Callable[[Progress], None] | None,
        wanted: int,
    ) -> None:
        self.spec, self.extents, self.target, self.threads = spec, extents, target, threads
        self.wanted, self._report = wanted, progress
        database = folder / f"{label}.database"
        path = folder / f"{label}.jsonl"
        header = {
            "name": name or spec.slug,
            "spec": spec.to_json(),
            "extents": asdict(extents),
            "target": target.tag,
            "threads": threads,
            "source": source_digest(),
        }
        if path.is_file() and (not resume or f'"{header["source"]}"' not in path.read_text()):
            # Trials of other generating code measured other programs.
            _log.info("%s: starting afresh", label)
            path.unlink()
            for file in database.glob("database_*.json"):
                file.unlink()
        database.mkdir(exist_ok=True)
        for file in database.glob("database_*.json"):
            drop_torn_line(file)
        self.log = TrialLog(path, header)
        self.search = Search(spec, extents, target, database, seed)
        self.start = time.monotonic()
        self._before = self.log.rows[-1].elapsed if self.log.rows else 0.0
        self._first_new = len(self.log.rows)
        self.default = self.search.names.defaults[self.search.names.variants[0]]
        self.known: dict[Any, float | None] = {
            _identity(row.decisions): row.seconds for row in self.log.rows
        }

    # -- state ---------------------------------------------------------------------------------------------------

    def elapsed(self) -> float:
        """Return the seconds of this run."""
        return time.monotonic() - self.start

    def failures(self) -> dict[str, int]:
        """Return the failed trials by reason, without the details."""
        return dict(Counter(row.reason.split(":")[0] for row in self.log.rows if row.reason).most_common())

    def ranked(self) -> list[TrialRow]:
        """Return the successful trials, the fastest first."""
        rows = [row for row in self.log.rows if row.seconds is not None]
        return sorted(rows, key=lambda row: row.seconds or math.inf)

    def tell(self, stage: str) -> None:
        """Report progress."""
        if self._report is None:
            return
        best = self.ranked()
        default = self.known.get(_identity(self.default)) or math.inf
        self._report(
            Progress(
                len(self.log.rows),
                self.wanted,
                best[0].seconds or math.inf if best else math.inf,
                default,
                self.failures(),
                self.elapsed(),
                stage,
            )
        )

    # -- the search ----------------------------------------------------------------------------------------------

    def run(self, root: Path, time_budget: float | None) -> TuningResult:
        """Search until the trials or the time are used up, then keep the best."""
        interrupted = False
        with tempfile.TemporaryDirectory(prefix="tvmdcn-tune-") as scratch:
            job = Job(self.spec, self.extents, self.target, self.threads, Path(scratch))
            self._save_inputs(job)
            workers = Workers(job, builders=max(1, min(self.target.cores or 1, 8)))
            try:
                self._rounds(workers, time_budget)
            except KeyboardInterrupt:
                interrupted = True
                _log.warning("interrupted: keeping the best of %d trials", len(self.log.rows))
            if not self.ranked():
                self._raise_nothing()
            self.tell("final")
            winner, seconds, default = self._final(workers, quick=interrupted)
        record = Record(
            self.spec, self.extents, self.threads, winner, seconds, default, len(self.log.rows), _provenance()
        )
        known = TuningRecords.read(root, self.target.tag)
        known.add(record)
        path = known.write(root)
        return TuningResult(
            record,
            path,
            len(self.log.rows),
            len(self.log.rows) - self._first_new,
            self.failures(),
            interrupted,
        )

    def _save_inputs(self, job: Job) -> None:
        tensors = make_tensors(self.spec, self.extents)
        expected = operator_of(self.spec).reference(self.spec, tensors)
        arrays = {k: v for k, v in vars(tensors).items() if v is not None}
        # numpy.savez does not know bfloat16; its bits travel.
        raw = {k: v.view("uint16") if v.dtype.itemsize == 2 else v for k, v in arrays.items()}
        np.savez(job.directory / "inputs.npz", **raw, expected=expected)

    def _seeds(self) -> list[Candidate]:
        """Return what is tried first: every variant's defaults, and what is known of similar layers."""
        wishes = [self.search.names.defaults[variant] for variant in self.search.names.variants]
        records = TuningRecords.of(self.target.tag)
        found = records.best(self.spec, self.threads)
        if found is not None:
            wishes.insert(1, found.decisions)
        return [self.search.candidate(decisions) for decisions in wishes]

    def _rounds(self, workers: Workers, time_budget: float | None) -> None:
        first, idle = True, 0
        while len(self.log.rows) < self.wanted and idle < _IDLE_ROUNDS:
            if not first and time_budget is not None and self.elapsed() > time_budget:
                break
            self.tell("search")
            left = self.wanted - len(self.log.rows)
            proposed = self._seeds() if first else self.search.propose(_ROUND, left)
            fresh = list({c.identity: c for c in proposed if c.identity not in self.known}.values())[:left]
            if fresh:
                self._try(workers, fresh, None if first else time_budget)
            outcomes = {identity: None if s is None else [s] for identity, s in self.known.items()}
            if not first:
                idle = 0 if fresh else idle + 1
                self.search.end_round(outcomes)
            first = False

    def _try(self, workers: Workers, candidates: Sequence[Candidate], time_budget: float | None) -> None:
        self.tell("build")
        built = workers.build([candidate.decisions for candidate in candidates])
        done: list[Candidate] = []
        try:
            for candidate, (name, reason) in zip(candidates, built, strict=True):
                outcome = Outcome(reason=reason) if reason else workers.measure(name)
                workers.discard(name)
                seconds = None if outcome.reason else outcome.median
                if outcome.reason:
                    _log.info("%s: %s", candidate.decisions, outcome.reason)
                self.known[candidate.identity] = seconds
                done.append(candidate)
                self.log.add(
                    TrialRow(candidate.decisions, seconds, outcome.reason, self._before + self.elapsed())
                )
                self.tell("measure")
                if time_budget is not None and self.elapsed() > 1.2 * time_budget:
                    break
        finally:
            outcomes = {identity: None if s is None else [s] for identity, s in self.known.items()}
            self.search.learn(outcomes, done)

    def _final(self, workers: Workers, quick: bool) -> tuple[Decisions, float, float]:
        """Measure the best again in turns with the default: of many noisy measurements the smallest flatters."""
        finalists = [row.decisions for row in self.ranked()[:_FINALISTS]]
        if self.default not in finalists:
            finalists.append(self.default)
        if quick:
            best = self.ranked()[0]
            default = self.known.get(_identity(self.default)) or best.seconds
            assert best.seconds is not None and default is not None
            return best.decisions, best.seconds, default
        built = [
            (d, n) for d, (n, reason) in zip(finalists, workers.build(finalists), strict=True) if not reason
        ]
        outcomes = workers.measure_together([n for _, n in built], _FINAL_ROUNDS)
        timed = [(o.median, d) for (d, _), o in zip(built, outcomes, strict=True) if not o.reason]
        if not timed:
            return self._final(workers, quick=True)
        seconds, winner = min(timed, key=lambda pair: pair[0])
        default = next((s for s, d in timed if d == self.default), seconds)
        return winner, seconds, default

    def _raise_nothing(self) -> None:
        reasons = "; ".join(f"{count} x {reason}" for reason, count in self.failures().items())
        example = next((row.reason for row in self.log.rows if row.reason), "nothing was tried")
        raise TuningError(
            f"none of {len(self.log.rows)} schedules of {self.spec.slug} could be built, run and verified "
            f"({reasons}). The first failure: {example}"
        )


def _identity(decisions: Decisions) -> tuple[Any, ...]:
    return decisions.variant, tuple(sorted(decisions.values.items()))


def _provenance() -> dict[str, Any]:
    identity = host_identity()
    return {**identity, "date": datetime.now(timezone.utc).date().isoformat(), "source": source_digest()}


