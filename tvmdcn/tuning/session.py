# SPDX-License-Identifier: Apache-2.0
"""One layer in a run of a tuning: rounds of proposing, building, checking and measuring; a final among the best."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from tvmdcn.bench.machine import identify_versions
from tvmdcn.cache_key import source_digest
from tvmdcn.errors import TuningError
from tvmdcn.space import Decisions
from tvmdcn.spec import DeformConv2dSpec, Extents
from tvmdcn.target import TargetInfo, host_identity
from tvmdcn.te import operator_of
from tvmdcn.tuning.allocation import ROUND, Standing, best_so_far
from tvmdcn.tuning.decision_search import DecisionSearch
from tvmdcn.tuning.history import TrialLog, TrialRow, read_log
from tvmdcn.tuning.progress import Progress, TuningResult
from tvmdcn.tuning.records import Record, TuningRecords, structure
from tvmdcn.tuning.search import Candidate, Search, uninterrupted
from tvmdcn.tuning.trial import Job, save_inputs
from tvmdcn.tuning.workers import Workers

__all__ = ["Progress", "Session", "TuningResult"]

_log = logging.getLogger(__name__)

_FINALISTS = 3  # measured again in turns, with the default, before one is kept
_FINAL_ROUNDS = 5
_IDLE_ROUNDS = 3  # rounds without anything new after which the space counts as exhausted


class Session:
    """One layer in a run of a tuning. Holds the log; the caller holds its lock.

    Parameters
    ----------
    spec, extents, target
        What is tuned, for what.
    threads : int
        Threads of a call.
    log : Path
        The log of trials; made, continued, or begun afresh.
    scratch : Path
        An empty private directory, for inputs and builds.
    name : str
        The layer's name in logs and reports.
    weight : float
        How often it is called, compared with others that are tuned together.
    resume : bool
        Whether to continue the log.
    seed : int
    starts : sequence of Decisions
        What to try first, after the default: what is known of similar layers.
    wanted : int
        Trials in all, for reports.
    report : callable, optional
        Called with a :class:`Progress` after each trial and at the begin of each stage.
    machine : mapping, optional
        Who measures, for trials of earlier runs too; this machine by default.

    Attributes
    ----------
    exhausted : bool
        Whether there is nothing more to try.

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
        scratch: Path,
        name: str,
        weight: float,
        resume: bool,
        seed: int,
        starts: Sequence[Decisions],
        wanted: int,
        report: Callable[[Progress], None] | None,
        machine: Mapping[str, Any] | None = None,
    ) -> None:
        self._since, self._spent = time.monotonic(), 0.0
        self.spec, self.extents, self.target, self.threads = spec, extents, target, threads
        self.name, self.weight, self.wanted, self._report = name, weight, wanted, report
        self._starts = list(starts)
        self.exhausted = False
        self._idle, self._begun = 0, False
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
        self._machine = machine
        self._machines: dict[Any, Mapping[str, Any]] = {}
        self._before = self.log.rows[-1].elapsed if self.log.rows else 0.0
        self._first_new = len(self.log.rows)
        self._number = 1 + max((row.round for row in self.log.rows if row.round is not None), default=-1)
        with uninterrupted():
            self.search = (DecisionSearch if target.kind == "cuda" else Search)(spec, extents, target, seed)
            self.search.recall((row.decisions, row.seconds) for row in self.log.rows)
        self.default = self.search.names.defaults[self.search.names.variants[0]]
        self._job = Job(spec, extents, target, threads, scratch)
        self._pause()

    def _pause(self) -> None:
        """Stop the clock: the time from now on is another layer's."""
        self._spent, self._since = self.elapsed(), math.inf

    def elapsed(self) -> float:
        """Return the seconds that this run has spent on the layer."""
        return self._spent + max(0.0, time.monotonic() - self._since)

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
                self.name,
                self.weight,
            )
        )

    def standing(self) -> Standing:
        """Return how far the tuning is, for deciding which layer goes on."""
        return Standing(
            best_so_far([row.seconds for row in self.log.rows]),
            float(self.spec.flops(self.extents)),
            self.weight,
            structure(self.spec),
        )

    def round(self, workers: Workers, limit: int, deadline: float = math.inf) -> None:
        """Propose up to `limit` candidates, try them, and learn from how they did.

        Parameters
        ----------
        workers : Workers
        limit : int
            At least 1.
        deadline : float
            Time of ``time.monotonic`` after which nothing more is measured, once there is something to keep.
        """
        self._since = time.monotonic()
        try:
            self._prepare()
            self.tell("search")
            first, self._begun = not self._begun, True
            if first:
                proposed = self._seeds()
            else:
                with uninterrupted():
                    proposed = self.search.propose(ROUND, limit)
            fresh = list({c.identity: c for c in proposed if c.identity not in self.known}.values())[:limit]
            if fresh:
                self._try(workers, fresh, deadline)
            if first:
                # If every variant's default fails, the others would only take longer to.
                self.exhausted = not self.ranked()
                return
            self._idle = 0 if fresh else self._idle + 1
            self.exhausted = self._idle >= _IDLE_ROUNDS
            with uninterrupted():
                self.search.end_round(self._outcomes())
        finally:
            self._pause()

    def _prepare(self) -> None:
        """Write the inputs of all trials, with the outputs that they must have, once."""
        if not self._begun:
            operator = operator_of(self.spec)
            tensors = operator.tensors(self.spec, self.extents)
            save_inputs(self._job, tensors, operator.expected(self.spec, tensors))

    def finish(self, workers: Workers, root: Path) -> TuningResult:
        """Compare the best again, and keep the winner in the records below `root`.

        Raises
        ------
        TuningError
            If nothing could be built, run and verified.
        RecordsError
            If the best cannot be added to the records.
        KeyboardInterrupt
            If Ctrl-C comes meanwhile: then there is still :meth:`stop`.
        """
        if not self.ranked():
            self._raise_nothing()
        self._since = time.monotonic()
        self._prepare()
        self._begun = True
        self.tell("final")
        return self._keep(root, *self._compare(workers), interrupted=False)

    def stop(self, root: Path) -> TuningResult:
        """Keep the best as it was measured in the search: what is left to do after Ctrl-C, or without servers.

        Raises
        ------
        TuningError, RecordsError
            As :meth:`finish`.
        """
        if not self.ranked():
            self._raise_nothing()
        return self._keep(root, *self._quick(), interrupted=True)

    def _keep(self, root: Path, winner: Decisions, seconds: float, default: float, interrupted: bool) -> TuningResult:
        trials = len(self.log.rows)
        provenance = _provenance(self._machines.get(_identity(winner)) or self._machine)
        record = Record(self.spec, self.extents, self.threads, winner, seconds, default, trials, provenance)
        with uninterrupted():
            path = TuningRecords.keep(root, self.target.tag, record)
        return TuningResult(record, path, trials, trials - self._first_new, self.failures(), interrupted)

    def _seeds(self) -> list[Candidate]:
        """Return what is tried first: the default, what is known of similar layers, every variant's defaults.

        Of what is known the nearest comes early. The rest comes last: on CPUs the defaults of a layer's own variants
        were the better first tries (docs/tuning-farm.md).
        """
        wishes = [self.search.names.defaults[variant] for variant in self.search.names.variants]
        wishes[1:1] = self._starts[:1]
        wishes += self._starts[1:]
        with uninterrupted():
            return [self.search.candidate(decisions) for decisions in wishes]

    def _outcomes(self) -> dict[Any, list[float] | None]:
        return {identity: None if s is None else [s] for identity, s in self.known.items()}

    def _try(self, workers: Workers, candidates: Sequence[Candidate], deadline: float) -> None:
        self.tell("build")
        done: list[Candidate] = []
        with uninterrupted():
            predicted = self.search.predict(candidates)
        try:
            trials = workers.trials(self._job, [candidate.decisions for candidate in candidates])
            with contextlib.closing(trials):
                for place, outcome in trials:
                    candidate = candidates[place]
                    seconds = None if outcome.reason else outcome.quiet
                    if outcome.reason:
                        _log.info("%s: %s", candidate.decisions, outcome.reason)
                    with uninterrupted():
                        elapsed = self._before + self.elapsed()
                        row = TrialRow(
                            candidate.decisions, seconds, outcome.reason, elapsed, self._number, predicted[place]
                        )
                        self.log.add(row)
                        self.known[candidate.identity] = seconds
                        self._machines[candidate.identity] = outcome.machine
                        done.append(candidate)
                    self.tell("measure")
                    if time.monotonic() > deadline and self.ranked():
                        break
        finally:
            self._number += 1
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
        outcomes = workers.compare(self._job, finalists, _FINAL_ROUNDS)
        timed = [(o.median, d, o.machine) for d, o in zip(finalists, outcomes, strict=True) if not o.reason]
        if not timed:
            return self._quick()
        seconds, winner, machine = min(timed, key=lambda entry: entry[0])
        self._machines[_identity(winner)] = machine
        default = next((s for s, d, _ in timed if d == self.default), seconds)
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


def _provenance(machine: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return where a record comes from: who measured it (this machine by default), when, of which source."""
    return {
        **(machine or {**host_identity(), "versions": identify_versions()}),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "source": source_digest(),
    }
