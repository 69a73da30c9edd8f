# SPDX-License-Identifier: Apache-2.0
"""One run of a tuning: rounds of proposing, building, checking and measuring; then a final among the best."""

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

from tvmdcn.bench.measurement import identify_versions
from tvmdcn.cache_key import source_digest
from tvmdcn.errors import TuningError
from tvmdcn.space import Decisions
from tvmdcn.spec import DeformConv2dSpec, Extents
from tvmdcn.target import TargetInfo, host_identity
from tvmdcn.te import operator_of
from tvmdcn.tuning.history import TrialLog, TrialRow, read_log
from tvmdcn.tuning.records import Record, TuningRecords
from tvmdcn.tuning.search import Candidate, Search, uninterrupted
from tvmdcn.tuning.trial import Job, Outcome, Workers, save_inputs

__all__ = ["Progress", "Session", "TuningResult"]

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


class Session:
    """One run of a tuning. Holds the log; the caller holds its lock.

    Parameters
    ----------
    spec, extents, target
        What is tuned, for what.
    threads : int
        Threads of a call.
    log : Path
        The log of trials; made, continued, or begun afresh.
    name : str
        The layer's name in logs and reports.
    resume : bool
        Whether to continue the log.
    seed : int
    wanted : int
        Trials in all.
    report : callable, optional
        Called with a :class:`Progress` after each trial and at the begin of each stage.

    Raises
    ------
    RecordsError
        If the log is another layer's or cannot be read.
    """

    def __init__(
        self,
        spec: DeformConv2dSpec,
        extents: Extents,
        target: TargetInfo,
        *,
        threads: int,
        log: Path,
        name: str,
        resume: bool,
        seed: int,
        wanted: int,
        report: Callable[[Progress], None] | None,
    ) -> None:
        self.spec, self.extents, self.target, self.threads = spec, extents, target, threads
        self.wanted, self._report = wanted, report
        self.start = time.monotonic()
        header = {
            "name": name,
            "spec": spec.to_json(),
            "extents": asdict(extents),
            "target": target.tag,
            "threads": threads,
            "source": source_digest(),
        }
        why = _outdated(log, header) if resume else "as asked"
        if why:
            _log.info("%s: forgetting earlier trials: %s", name, why)
            log.unlink(missing_ok=True)
        self.log = TrialLog(log, header)
        self.known: dict[Any, float | None] = {_identity(row.decisions): row.seconds for row in self.log.rows}
        self._before = self.log.rows[-1].elapsed if self.log.rows else 0.0
        self._first_new = len(self.log.rows)
        with uninterrupted():
            self.search = Search(spec, extents, target, seed)
            self.search.recall((row.decisions, row.seconds) for row in self.log.rows)
        self.default = self.search.names.defaults[self.search.names.variants[0]]

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

    def run(self, root: Path, time_budget: float | None) -> TuningResult:
        """Search until the trials or the time are used up, then keep the best.

        Raises
        ------
        TuningError
            If nothing could be built, run and verified.
        RecordsError
            If the best cannot be added to the records.
        KeyboardInterrupt
            If Ctrl-C comes before anything was measured; later it only ends the search.
        """
        interrupted = False
        with tempfile.TemporaryDirectory(prefix="tvmdcn-tune-") as scratch:
            job = Job(self.spec, self.extents, self.target, self.threads, Path(scratch))
            operator = operator_of(self.spec)
            tensors = operator.tensors(self.spec, self.extents)
            save_inputs(job, tensors, operator.expected(self.spec, tensors))
            with Workers(job, builders=max(1, min(self.target.cores or 1, 8))) as workers:
                try:
                    self._rounds(workers, time_budget)
                    if not self.ranked():
                        self._raise_nothing()
                    self.tell("final")
                    winner, seconds, default = self._compare(workers)
                except KeyboardInterrupt:
                    if not self.ranked():
                        raise
                    interrupted = True
                    _log.warning("interrupted: keeping the best of %d trials", len(self.log.rows))
                    winner, seconds, default = self._quick()
        record = Record(
            self.spec, self.extents, self.threads, winner, seconds, default, len(self.log.rows), _provenance()
        )
        with uninterrupted():
            path = TuningRecords.keep(root, self.target.tag, record)
        new = len(self.log.rows) - self._first_new
        return TuningResult(record, path, len(self.log.rows), new, self.failures(), interrupted)

    def _seeds(self) -> list[Candidate]:
        """Return what is tried first: every variant's defaults, and what is known of similar layers."""
        wishes = [self.search.names.defaults[variant] for variant in self.search.names.variants]
        found = TuningRecords.of(self.target.tag).best(self.spec, self.threads)
        if found is not None:
            wishes.insert(1, found.decisions)
        with uninterrupted():
            return [self.search.candidate(decisions) for decisions in wishes]

    def _rounds(self, workers: Workers, time_budget: float | None) -> None:
        first, idle = True, 0
        while len(self.log.rows) < self.wanted and idle < _IDLE_ROUNDS:
            if not first and time_budget is not None and self.elapsed() > time_budget:
                break
            self.tell("search")
            left = self.wanted - len(self.log.rows)
            if first:
                proposed = self._seeds()
            else:
                with uninterrupted():
                    proposed = self.search.propose(_ROUND, left)
            fresh = list({c.identity: c for c in proposed if c.identity not in self.known}.values())[:left]
            if fresh:
                self._try(workers, fresh, time_budget)
            if first and not self.ranked():
                break  # if every variant's default fails, the others would only take longer to
            if not first:
                idle = 0 if fresh else idle + 1
                with uninterrupted():
                    self.search.end_round(self._outcomes())
            first = False

    def _outcomes(self) -> dict[Any, list[float] | None]:
        return {identity: None if s is None else [s] for identity, s in self.known.items()}

    def _try(self, workers: Workers, candidates: Sequence[Candidate], time_budget: float | None) -> None:
        self.tell("build")
        built = workers.build([candidate.decisions for candidate in candidates])
        done: list[Candidate] = []
        try:
            for candidate, (name, reason) in zip(candidates, built, strict=True):
                outcome = Outcome(reason=reason) if reason else workers.measure(name)
                workers.discard(name)
                seconds = None if outcome.reason else outcome.quiet
                if outcome.reason:
                    _log.info("%s: %s", candidate.decisions, outcome.reason)
                with uninterrupted():
                    self.log.add(TrialRow(candidate.decisions, seconds, outcome.reason, self._before + self.elapsed()))
                    self.known[candidate.identity] = seconds
                    done.append(candidate)
                self.tell("measure")
                late = time_budget is not None and self.elapsed() > 1.2 * time_budget
                if late and self.ranked():
                    break
        finally:
            with uninterrupted():
                self.search.learn(self._outcomes(), done)

    def _quick(self) -> tuple[Decisions, float, float]:
        """Return the best trial, its time, and the default's, as they were measured in the search."""
        best = self.ranked()[0]
        seconds = best.seconds or math.inf
        return best.decisions, seconds, self.known.get(_identity(self.default)) or seconds

    def _compare(self, workers: Workers) -> tuple[Decisions, float, float]:
        """Measure the best again in turns with the default: of many noisy times the smallest flatters."""
        finalists = [row.decisions for row in self.ranked()[:_FINALISTS]]
        if self.default not in finalists:
            finalists.append(self.default)
        built = [(d, n) for d, (n, reason) in zip(finalists, workers.build(finalists), strict=True) if not reason]
        outcomes = workers.measure_together([n for _, n in built], _FINAL_ROUNDS)
        timed = [(o.median, d) for (d, _), o in zip(built, outcomes, strict=True) if not o.reason]
        if not timed:
            return self._quick()
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


def _outdated(log: Path, header: Mapping[str, Any]) -> str:
    """Return why the trials of a log must not be continued; empty if they may."""
    if not log.is_file():
        return ""
    found, rows = read_log(log)
    if found.get("source") not in (None, header["source"]):
        return "the code that generates kernels has changed since, they measured other programs"
    if rows and all(row.seconds is None for row in rows):
        return "none of them worked, which may have had a cause that is gone"
    return ""


def _provenance() -> dict[str, Any]:
    return {
        **host_identity(),
        "versions": identify_versions(),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "source": source_digest(),
    }
