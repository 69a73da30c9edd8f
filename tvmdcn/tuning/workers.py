# SPDX-License-Identifier: Apache-2.0
"""The processes of a tuning: some that build, here, and one or many that measure, here or on other machines."""

from __future__ import annotations

import itertools
import shutil
import signal
from collections.abc import Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from heapq import heappop, heappush
from typing import Any, Protocol

from tvm.support.popen_pool import PopenPoolExecutor

from tvmdcn.errors import TuningError
from tvmdcn.space import Decisions
from tvmdcn.tuning.trial import NO_ROOM, Job, Outcome, build_trial, measure_trials, tolerance_of

__all__ = ["LocalMeasuring", "Measuring", "Workers"]

# How the messages begin of kernels that a GPU could not run.
OVER_LIMITS = ("too much shared memory", "too many registers")


class Measuring(Protocol):
    """Where built candidates are checked and measured."""

    alone: bool
    """Whether it measures on the machine that builds, where nothing else must run meanwhile."""

    def submit(self, job: Job, names: Sequence[str], rounds: int) -> Future[list[Outcome]]:
        """Check and measure built candidates, taking turns for `rounds`; the outcomes come in their order."""

    def close(self) -> None:
        """End what measures, whatever it is doing."""


def ignore_interrupts() -> None:
    """Leave Ctrl-C, which a terminal sends to all processes of a command, to the one that started the others."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class LocalMeasuring:
    """Measures in one process of this machine: killed when a kernel hangs, and dying alone when one crashes.

    Parameters
    ----------
    run_timeout : float
        Seconds after which a measurement is given up, and its process killed.
    """

    alone = True

    def __init__(self, run_timeout: float = 60.0) -> None:
        self._run_timeout = run_timeout
        self._pool = self._process()
        self._thread = ThreadPoolExecutor(1)

    def _process(self) -> PopenPoolExecutor:
        return PopenPoolExecutor(max_workers=1, timeout=self._run_timeout, initializer=ignore_interrupts)

    def submit(self, job: Job, names: Sequence[str], rounds: int) -> Future[list[Outcome]]:
        """Check and measure built candidates, taking turns for `rounds`."""
        return self._thread.submit(self._measure, job, list(names), rounds)

    def _measure(self, job: Job, names: list[str], rounds: int) -> list[Outcome]:
        try:
            rows = self._pool.submit(measure_trials, job.to_json(), names, rounds).result()
        except TimeoutError:
            return [Outcome(reason="time-out: run")] * len(names)
        except Exception as error:  # the worker died, or the call raised: the trial's failure
            return [Outcome(reason=f"{self._failure(job, error)}: {_last_line(error)}")] * len(names)
        limit = tolerance_of(job.spec)
        return [
            Outcome(tuple(times), error)
            if error <= limit
            else Outcome(error=error, reason=f"wrong result: relative error {error:.1e} above {limit:.0e}")
            for times, error in rows
        ]

    def _failure(self, job: Job, error: Exception) -> str:
        """Return what an error is called; after one of a GPU's kernel its process is of no use any more."""
        if job.target.kind != "cuda":
            return "crash"
        self._pool.shutdown()
        self._pool = self._process()
        return "launch failure" if "CUDA" in str(error) else "crash"

    def close(self) -> None:
        """End the process."""
        self._pool.shutdown()
        self._thread.shutdown()


class Workers:
    """The processes of a tuning; of several layers, too, each with its own job.

    Parameters
    ----------
    builders : int
        Processes that build.
    measuring : Measuring, optional
        Where to measure; by default in one process of this machine. It is closed with the workers.
    build_timeout : float
        Seconds after which a build is given up, and its process killed.
    """

    def __init__(self, builders: int, measuring: Measuring | None = None, build_timeout: float = 60.0) -> None:
        self._builders = PopenPoolExecutor(max_workers=builders, timeout=build_timeout, initializer=ignore_interrupts)
        self._measuring: Measuring = LocalMeasuring() if measuring is None else measuring
        self._numbers = itertools.count(1)

    def __enter__(self) -> Workers:
        """Return the workers; the end of the block ends their processes."""
        return self

    def __exit__(self, *details: object) -> None:
        """End the processes, whatever they are doing."""
        self._builders.shutdown()
        self._measuring.close()

    def trials(self, job: Job, candidates: Sequence[Decisions]) -> Generator[tuple[int, Outcome], None, None]:
        """Build, check and measure candidates; yield the place and the outcome of each as it ends.

        On one machine all are built before the first is measured, and one is measured at a time, while nothing
        else runs, the caller included; in their order, whichever was built first. Elsewhere each is measured as soon
        as it is built.
        """
        names, builds = self._start(job, candidates)
        pending: dict[Future[Any], int] = dict(builds)
        ready: list[int] = []
        try:
            while pending or ready:
                while ready and not (self._measuring.alone and pending):
                    place = heappop(ready)
                    pending[self._measuring.submit(job, [names[place]], 1)] = place
                done, _ = wait(pending, return_when=FIRST_COMPLETED)
                for future in sorted(done, key=lambda future: pending[future]):
                    place = pending.pop(future)
                    if future in builds:
                        outcome = _build_failure(future)
                        if outcome is None:
                            heappush(ready, place)
                            continue
                    else:
                        (outcome,) = future.result()
                    self._discard(job, names[place])
                    yield place, outcome
        finally:
            # After Ctrl-C, what has not begun must not begin: the pools would wait for it in the end.
            for future in pending:
                future.cancel()

    def compare(self, job: Job, candidates: Sequence[Decisions], rounds: int) -> list[Outcome]:
        """Build candidates, and check and measure them in turns, on one machine, for a fair comparison."""
        names, builds = self._start(job, candidates)
        try:
            outcomes = [_build_failure(build) for build in builds]
            built = [place for place, failed in enumerate(outcomes) if failed is None]
            measured = self._measuring.submit(job, [names[place] for place in built], rounds).result() if built else []
        finally:
            for build in builds:
                build.cancel()
        for place, outcome in zip(built, measured, strict=True):
            outcomes[place] = outcome
        for name in names:
            self._discard(job, name)
        return [outcome for outcome in outcomes if outcome is not None]

    def _start(self, job: Job, candidates: Sequence[Decisions]) -> tuple[list[str], dict[Future[str], int]]:
        """Begin to compile candidates; return their names, and the futures with the place of each."""
        names = [f"trial{next(self._numbers)}" for _ in candidates]
        data = job.to_json()
        return names, {
            self._builders.submit(build_trial, data, decisions.to_json(), name): place
            for place, (decisions, name) in enumerate(zip(candidates, names, strict=True))
        }

    @staticmethod
    def _discard(job: Job, name: str) -> None:
        shutil.rmtree(job.directory / name, ignore_errors=True)


def _build_failure(future: Future[str]) -> Outcome | None:
    """Wait for a build; return None if it went well.

    Raises
    ------
    TuningError
        If there is no room for builds.
    """
    try:
        message = future.result()
    except TimeoutError:
        return Outcome(reason="time-out: build")
    except Exception as error:  # whatever a worker ends with is the trial's failure, not the tuning's
        return Outcome(reason=f"build: {_last_line(error)}")
    if message.startswith(NO_ROOM):  # not the candidate's failure, which would be remembered
        raise TuningError(
            f"{message}. Builds go to the directory of temporary files (TMPDIR). What was measured is kept: make room, "
            "and run the same command again."
        )
    if message.startswith(OVER_LIMITS):
        return Outcome(reason=message)
    return Outcome(reason=f"build: {message}") if message else None


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # A traceback from a worker ends with what happened.
    return lines[-1][:200] if lines else type(error).__name__
