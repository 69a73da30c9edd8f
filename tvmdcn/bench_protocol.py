# SPDX-License-Identifier: Apache-2.0
"""Compare our kernels with the peers: the measurement protocol.

Every provider runs in a process of its own with its number of threads set (:mod:`tvmdcn.bench_process`). The
processes take turns, one measuring while the others are stopped; a turn is a short burst of calls after a
warm-up; the order is rotated and reversed from round to round, so that a slow moment of the machine falls on
all alike. The row holds the median over all rounds. Each output is first compared with the float64 reference:
a wrong result is a failed row, and so is anything else that goes wrong, with its reason.
"""

from __future__ import annotations

import datetime
import logging
import math
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from tvmdcn.bench_process import Worker, WorkerError
from tvmdcn.bench_worker import save_tensors
from tvmdcn.errors import TvmdcnError
from tvmdcn.measurement import Measurement, identify_machine, identify_versions, percentile
from tvmdcn.problems import REAL_LAYERS, Problem, make_tensors, real_layer
from tvmdcn.providers import Provider, default_providers
from tvmdcn.reference import reference

__all__ = [
    "TOLERANCES",
    "Measurement",
    "Protocol",
    "compare",
    "describe_run",
    "relative_error",
    "turn_order",
]

logger = logging.getLogger(__name__)

# Above these a result is wrong, not inexact. Correct kernels stay far below: about 1e-6 for float32.
TOLERANCES = {"float64": 1e-9, "float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}

_T = TypeVar("_T")


@dataclass(frozen=True)
class Protocol:
    """How long and how often is measured.

    Parameters
    ----------
    rounds : int
        How often each provider gets a turn per problem. A turn begins with a few calls that are not timed.
    burst_seconds : float
        Length of a turn.
    min_calls : int
        Calls of a turn, at least.
    slow_seconds : float
        A provider whose turns would exceed this in all, per problem, gets one call per turn and fewer turns.
    prepare_timeout, measure_timeout : float
        Seconds after which a process counts as hung. Preparing may build a kernel.
    """

    rounds: int = 6
    burst_seconds: float = 0.08
    min_calls: int = 3
    slow_seconds: float = 6.0
    prepare_timeout: float = 900.0
    measure_timeout: float = 300.0

    def __post_init__(self) -> None:
        """Refuse a protocol that would measure nothing."""
        if self.rounds < 1 or self.min_calls < 1:
            raise ValueError(f"rounds and min_calls must be at least 1, got {self.rounds} and {self.min_calls}.")

    def plan(self, call_ms: float) -> tuple[int, dict[str, Any]]:
        """Return the number of turns for a provider of this speed, and the request of a turn."""
        seconds = call_ms / 1e3
        request = {
            "do": "measure",
            "seconds": self.burst_seconds,
            "min_calls": self.min_calls,
            "warmup": 0.005,
        }
        if seconds * (self.min_calls + 1) * self.rounds <= self.slow_seconds:
            return self.rounds, request
        turns = min(max(int(self.slow_seconds / seconds), 1), self.rounds)
        return turns, {**request, "seconds": 0.0, "min_calls": 1, "warmup": None}


def turn_order(items: Sequence[_T], index: int) -> list[_T]:
    """Return the order of a round: rotated by one each two rounds, and reversed in every second.

    Two rounds in a row give every item the same mean place.
    """
    shift = index // 2 % len(items) if items else 0
    order = [*items[shift:], *items[:shift]]
    return order[::-1] if index % 2 else order


def relative_error(output: np.ndarray, expected: np.ndarray) -> float:
    """Return the largest absolute difference over the largest absolute value expected.

    Infinite where the shapes differ, or where only one of the two is not finite.
    """
    if output.shape != expected.shape:
        return math.inf
    if not expected.size:
        return 0.0
    same = (output == expected) | (np.isnan(output) & np.isnan(expected))
    with np.errstate(invalid="ignore"):
        difference = np.where(same, 0.0, np.abs(output - expected))
    worst = float(difference.max())
    finite = np.abs(expected[np.isfinite(expected)])
    scale = float(finite.max()) if finite.size else 0.0
    if not math.isfinite(worst):
        return math.inf
    return worst / scale if scale else (0.0 if worst == 0 else math.inf)


@dataclass
class _Turns:
    """What one provider still has to do for a problem, and what it has done."""

    worker: Worker
    turns: int
    request: dict[str, Any]
    error: float | None
    times: list[float] = field(default_factory=list)

    def due(self, index: int, rounds: int) -> bool:
        """Whether it takes part in a round: turns are spread evenly, the first round has all."""
        return index == 0 or (index * self.turns) // rounds != ((index - 1) * self.turns) // rounds


def describe_run(measure: str = "call", command: str | None = None) -> Callable[..., Measurement]:
    """Return a function (problem, provider, threads, **result) that makes rows, where and how filled in."""
    common: dict[str, Any] = {
        "machine": identify_machine(),
        "versions": identify_versions(),
        "command": command or shlex.join(sys.argv) or "python",
        "measure": measure,
    }

    def row(problem: Problem, provider: Provider, threads: int, **result: Any) -> Measurement:
        return Measurement(
            problem=problem.name,
            spec=problem.spec,
            extents=problem.extents,
            provider=provider.name,
            role=provider.role,
            schedule=provider.schedule if provider.role == "ours" else None,
            threads=threads,
            date=datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
            **common,
            **result,
        )

    return row


@dataclass(frozen=True)
class _Inputs:
    folder: Path
    expected: np.ndarray


class _Run:
    """The state of one comparison: its protocol, its inputs, and how its rows are made."""

    def __init__(
        self,
        protocol: Protocol,
        folder: Path,
        row: Callable[..., Measurement],
        seed: int,
        real_layers: Path | None,
    ) -> None:
        self.protocol, self.folder, self.row = protocol, folder, row
        self.seed, self.real_layers = seed, real_layers
        self._inputs: dict[Problem, _Inputs] = {}

    def inputs(self, problem: Problem) -> _Inputs:
        """Make the tensors of a problem and their exact result, once."""
        if problem not in self._inputs:
            if self.real_layers is not None and problem.name in REAL_LAYERS:
                tensors, _ = real_layer(problem.name, self.real_layers)
            else:
                tensors = make_tensors(problem.spec, problem.extents, self.seed)
            folder = self.folder / str(len(self._inputs))
            folder.mkdir()
            save_tensors(folder, tensors)
            self._inputs[problem] = _Inputs(folder, reference(problem.spec, tensors))
        return self._inputs[problem]

    def prepare(self, worker: Worker, problem: Problem) -> _Turns:
        """Prepare a problem in a worker and check its result; raise WorkerError if either fails."""
        inputs = self.inputs(problem)
        output = inputs.folder / "output.npy"
        output.unlink(missing_ok=True)
        answer = worker.ask(
            {
                "do": "prepare",
                "spec": problem.spec.to_json(),
                "extents": vars(problem.extents),
                "tensors": str(inputs.folder),
                "output": str(output),
            },
            self.protocol.prepare_timeout,
        )
        error = None
        if answer["compared"]:
            error = relative_error(np.load(output, allow_pickle=False), inputs.expected)
            limit = TOLERANCES[problem.spec.dtype]
            if not error <= limit:
                raise WorkerError(f"wrong result: maximum relative error {error:.1e}, limit {limit:g}")
        turns, request = self.protocol.plan(answer["call_ms"])
        return _Turns(worker, turns, request, error)


def compare(
    problems: Sequence[Problem],
    threads: Sequence[int] = (1,),
    providers: Sequence[Provider] | None = None,
    *,
    protocol: Protocol | None = None,
    time_budget: float | None = None,
    seed: int = 0,
    real_layers: str | Path | None = None,
    measure: str = "call",
    command: str | None = None,
    on_row: Callable[[Measurement], object] | None = None,
    on_step: Callable[[str], object] | None = None,
) -> list[Measurement]:
    """Measure problems with several providers, in processes that take turns.

    Parameters
    ----------
    problems : sequence of Problem
        See :mod:`tvmdcn.problems`.
    threads : sequence of int
        Numbers of threads; each is a comparison of its own.
    providers : sequence of Provider, optional
        Default: :func:`tvmdcn.providers.default_providers`.
    protocol : Protocol, optional
        Numbers of rounds and lengths.
    time_budget : float, optional
        Seconds for everything. Rounds are cut (to no fewer than two) so that every problem gets its share;
        problems for which no time is left are left out, with a warning in the log.
    seed : int
        Of the made-up tensors.
    real_layers : str or Path, optional
        Folder with the tensors of real layers, used instead of made-up ones.
    measure : str
        What the rows say they measured, see :data:`tvmdcn.measurement.MEASURES`.
    command : str, optional
        What the rows say measured them; default: this process's command line.
    on_row : callable, optional
        Called with each row as soon as it is known.
    on_step : callable, optional
        Called with a short text whenever something new begins.

    Returns
    -------
    list of Measurement
        One per problem, provider and number of threads; a provider that failed has a row with the reason.

    Raises
    ------
    ValueError
        If there is nothing to measure.
    """
    chosen = default_providers() if providers is None else list(providers)
    if not problems or not threads or not chosen:
        raise ValueError("compare needs at least one problem, one number of threads and one provider.")
    if len({provider.name for provider in chosen}) < len(chosen):
        raise ValueError("compare needs providers with different names.")
    end = math.inf if time_budget is None else time.monotonic() + time_budget
    rows: list[Measurement] = []
    left = len(threads) * len(problems)
    with tempfile.TemporaryDirectory(prefix="tvmdcn-bench-") as name:
        run = _Run(
            protocol or Protocol(),
            Path(name),
            describe_run(measure, command),
            seed,
            None if real_layers is None else Path(real_layers),
        )
        for count in threads:
            with _Workers(chosen, count) as workers:
                for problem in problems:
                    now = time.monotonic()
                    if now >= end:
                        logger.warning("time budget spent: %s at %d threads left out", problem.name, count)
                        continue
                    share = now + (end - now) / left
                    left -= 1
                    for row in _measure(run, workers, problem, share, on_step or (lambda text: None)):
                        rows.append(row)
                        if on_row is not None:
                            on_row(row)
    return rows


class _Workers:
    """The processes of all providers at one number of threads, started when needed, again after a death."""

    def __init__(self, providers: Sequence[Provider], threads: int) -> None:
        self.providers, self.threads = providers, threads
        self._stack = ExitStack()
        self._running: dict[str, Worker] = {}

    def __enter__(self) -> _Workers:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def get(self, provider: Provider) -> Worker:
        """Return the provider's process; raises WorkerError if its package is missing."""
        if not provider.installed:
            raise WorkerError(f"{provider.package} is not installed: pip install {provider.package}")
        worker = self._running.get(provider.name)
        if worker is None or not worker.alive:
            worker = self._stack.enter_context(Worker(provider, self.threads))
            self._running[provider.name] = worker
        return worker


def _measure(
    run: _Run, workers: _Workers, problem: Problem, until: float, on_step: Callable[[str], object]
) -> Iterator[Measurement]:
    """Measure one problem at one number of threads; yields the rows in the order of the providers."""
    title = f"{problem.name}, {workers.threads} thread{'s' * (workers.threads > 1)}"
    active: dict[str, _Turns] = {}
    failed: dict[str, str] = {}
    providers = {provider.name: provider for provider in workers.providers}
    for name, provider in providers.items():
        on_step(f"{title}: preparing {name}")
        try:
            active[name] = run.prepare(workers.get(provider), problem)
        except (TvmdcnError, OSError) as error:  # a worker's reason, or inputs that cannot be made
            failed[name] = str(error)
    for index in range(run.protocol.rounds):
        if index >= 2 and time.monotonic() > until:
            break
        on_step(f"{title}: round {index + 1} of {run.protocol.rounds}")
        for name in turn_order(list(providers), index):
            turns = active.get(name)
            if turns is None or not turns.due(index, run.protocol.rounds):
                continue
            try:
                answer = turns.worker.ask(turns.request, run.protocol.measure_timeout)
                turns.times += answer["times_ms"]
            except WorkerError as error:
                failed[name] = str(error)
                del active[name]
    for name, provider in providers.items():
        if name in failed:
            logger.info("%s: %s failed: %s", title, name, failed[name])
            yield run.row(problem, provider, workers.threads, status="failed", reason=failed[name])
            continue
        times = active[name].times
        yield run.row(
            problem,
            provider,
            workers.threads,
            median_ms=percentile(times, 0.5),
            min_ms=min(times),
            p10=percentile(times, 0.1),
            p90=percentile(times, 0.9),
            runs=len(times),
            max_rel_error=active[name].error,
        )
