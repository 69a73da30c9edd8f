# SPDX-License-Identifier: Apache-2.0
"""Compare our kernels with the peers: the measurement protocol.

Every provider runs in a process of its own with its number of threads set (:mod:`tvmdcn.bench.process`). The
processes take turns, one measuring while the others are stopped; a turn is a short burst of calls after a
warm-up; the order is rotated and reversed from round to round, so that a slow moment of the machine falls on
all alike. The row holds the median over all rounds. Each output is first compared with the float64 reference:
a wrong result is a failed row, and so is anything else that goes wrong, with its reason.

A layer and its gradients are measured in the same rounds, so that what the backward takes in units of the forward
rests on the same moments.
"""

from __future__ import annotations

import datetime
import logging
import math
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from tvmdcn.bench.inputs import TOLERANCES, Inputs
from tvmdcn.bench.measurement import Measurement, direction_of, identify_machine, identify_versions, percentile
from tvmdcn.bench.process import Worker, WorkerError
from tvmdcn.bench.providers import Provider, default_providers
from tvmdcn.errors import TvmdcnError
from tvmdcn.problems import Problem

__all__ = ["Measurement", "Protocol", "compare", "describe_run", "turn_order"]

logger = logging.getLogger(__name__)

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


def describe_run(command: str | None = None) -> Callable[..., Measurement]:
    """Return a function (problem, provider, threads, **result) that makes rows, where and how filled in."""
    common: dict[str, Any] = {
        "machine": identify_machine(),
        "versions": identify_versions(),
        "command": command or shlex.join(sys.argv) or "python",
    }

    def row(problem: Problem, provider: Provider, threads: int, **result: Any) -> Measurement:
        values = {
            "problem": problem.forward.name,
            "spec": problem.spec,
            "extents": problem.extents,
            "provider": provider.name,
            "role": provider.role,
            "schedule": provider.schedule if provider.role == "ours" else None,
            "measure": provider.measure,
            "threads": threads,
            "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        }
        return Measurement(**{**values, **common, **result})

    return row


class _Part(NamedTuple):
    """Who computes what in a comparison."""

    provider: Provider
    problem: Problem

    @property
    def key(self) -> tuple[str, str, str]:
        """What sets it apart from the others of a comparison."""
        return self.provider.name, self.provider.measure, direction_of(self.problem.spec)

    def __str__(self) -> str:
        """Return the provider's name, with the direction if it is backward."""
        name, _, direction = self.key
        return name if direction == "forward" else f"{name} {direction}"


def _by_layer(problems: Iterable[Problem]) -> list[dict[str, Problem]]:
    """Return what is compared together: a layer and its gradients, by direction."""
    layers: list[dict[str, Problem]] = []
    for problem in dict.fromkeys(problems):
        direction = direction_of(problem.spec)
        for found in layers:
            if direction not in found and problem.forward in (other.forward for other in found.values()):
                found[direction] = problem
                break
        else:
            layers.append({direction: problem})
    return layers


def _parts(problems: Mapping[str, Problem], providers: Sequence[Provider], asked_for: bool) -> list[_Part]:
    """Return who computes which of a layer's problems.

    A provider that computes none of them has no part, or, if it was asked for by name, one that will fail. With
    the gradients alone goes the forward of the first of ours, which theirs is measured by.
    """
    parts = []
    for direction, problem in problems.items():
        for provider in providers:
            useless = not any(provider.source_of(other) for other in problems)
            if provider.source_of(direction) or (useless and asked_for):
                parts.append(_Part(provider, problem))
    if list(problems) == ["backward"]:
        ours = [p for p in providers if p.role == "ours" and p.source_of("forward") and p.source_of("backward")]
        parts[:0] = [_Part(provider, problems["backward"].forward) for provider in ours[:1]]
    return parts


class _Run:
    """The state of one comparison: its protocol, its inputs, and how its rows are made."""

    def __init__(self, protocol: Protocol, inputs: Inputs, row: Callable[..., Measurement]) -> None:
        self.protocol, self.inputs, self.row = protocol, inputs, row

    def prepare(self, worker: Worker, problem: Problem) -> _Turns:
        """Prepare a problem in a worker and check its result; raise WorkerError if either fails."""
        folder, expected = self.inputs.of(problem)
        output = folder / "output.npz"
        output.unlink(missing_ok=True)
        answer = worker.ask(
            {
                "do": "prepare",
                "spec": problem.spec.to_json(),
                "extents": vars(problem.extents),
                "tensors": str(folder),
                "output": str(output),
            },
            self.protocol.prepare_timeout,
        )
        error = None
        if answer["compared"]:
            with np.load(output, allow_pickle=False) as results:
                error, name = expected.error_of(results)
            limit = TOLERANCES[problem.spec.dtype]
            if not error <= limit:
                where = "" if name == "output" else f" of {name}"
                raise WorkerError(f"wrong result: maximum relative error{where} {error:.1e}, limit {limit:g}")
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
    command: str | None = None,
    on_row: Callable[[Measurement], object] | None = None,
    on_step: Callable[[str], object] | None = None,
) -> list[Measurement]:
    """Measure problems with several providers, in processes that take turns.

    Parameters
    ----------
    problems : sequence of Problem
        See :mod:`tvmdcn.problems`. A layer and its gradients (``Problem.backward``) are measured in one comparison.
        Gradients without their layer bring the forward of the first of ours with them.
    threads : sequence of int
        Numbers of threads; each is a comparison of its own.
    providers : sequence of Provider, optional
        Default: :func:`tvmdcn.bench.providers.default_providers`. One that has no gradients takes part in the forward
        alone; if that is not measured, its row says so.
    protocol : Protocol, optional
        Numbers of rounds and lengths.
    time_budget : float, optional
        Seconds for everything. Rounds are cut (to no fewer than two) so that every problem gets its share;
        problems for which no time is left are left out, with a warning in the log.
    seed : int
        Of the made-up tensors.
    real_layers : str or Path, optional
        Folder with the tensors of real layers, used instead of made-up ones.
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
    if len({(provider.name, provider.measure) for provider in chosen}) < len(chosen):
        raise ValueError("compare needs providers with different names.")
    layers = _by_layer(problems)
    end = math.inf if time_budget is None else time.monotonic() + time_budget
    rows: list[Measurement] = []
    left = len(threads) * len(layers)
    with tempfile.TemporaryDirectory(prefix="tvmdcn-bench-") as name:
        inputs = Inputs(Path(name), seed, None if real_layers is None else Path(real_layers))
        run = _Run(protocol or Protocol(), inputs, describe_run(command))
        for count in threads:
            with _Workers(count) as workers:
                for layer in layers:
                    now = time.monotonic()
                    if now >= end:
                        names = " and ".join(problem.name for problem in layer.values())
                        logger.warning("time budget spent: %s at %d threads left out", names, count)
                        continue
                    share = now + (end - now) / left
                    left -= 1
                    parts = _parts(layer, chosen, providers is not None)
                    for row in _measure(run, workers, parts, share, on_step or (lambda text: None)):
                        rows.append(row)
                        if on_row is not None:
                            on_row(row)
    return rows


class _Workers:
    """The processes of all providers at one number of threads, started when needed, again after a death."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._stack = ExitStack()
        self._running: dict[tuple[str, str, str], Worker] = {}
        self._versions: dict[str, Mapping[str, str]] = {}

    def __enter__(self) -> _Workers:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def get(self, part: _Part) -> Worker:
        """Return the process of a part; raises WorkerError if its package is missing."""
        provider, key = part.provider, part.key
        if not provider.installed:
            raise WorkerError(f"{provider.package} is not installed: pip install {provider.package}")
        worker = self._running.get(key)
        if worker is None or not worker.alive:
            worker = self._stack.enter_context(Worker(provider, self.threads, key[-1]))
            self._running[key] = worker
            if provider.python is not None:
                self._versions[provider.python] = worker.ask({"do": "versions"}, 60.0)["versions"]
        return worker

    def described(self, part: _Part) -> dict[str, Any]:
        """Return what a row says of its environment, where that is another than this process's."""
        versions = self._versions.get(part.provider.python or "")
        # What is not installed there plays no part in the row.
        return {} if versions is None else {"versions": {**identify_versions(), **versions}}


def _measure(
    run: _Run, workers: _Workers, parts: Sequence[_Part], until: float, on_step: Callable[[str], object]
) -> Iterator[Measurement]:
    """Measure one layer at one number of threads; yields the rows in the order of the parts."""
    if not parts:
        return
    title = f"{parts[0].problem.forward.name}, {workers.threads} thread{'s' * (workers.threads > 1)}"
    active: dict[_Part, _Turns] = {}
    failed: dict[_Part, str] = {}
    for part in parts:
        on_step(f"{title}: preparing {part}")
        try:
            active[part] = run.prepare(workers.get(part), part.problem)
        except (TvmdcnError, OSError) as error:  # a worker's reason, or inputs that cannot be made
            failed[part] = str(error)
    for index in range(run.protocol.rounds):
        if index >= 2 and time.monotonic() > until:
            break
        on_step(f"{title}: round {index + 1} of {run.protocol.rounds}")
        for part in turn_order(parts, index):
            turns = active.get(part)
            if turns is None or not turns.due(index, run.protocol.rounds):
                continue
            try:
                answer = turns.worker.ask(turns.request, run.protocol.measure_timeout)
                turns.times += answer["times_ms"]
            except WorkerError as error:
                failed[part] = str(error)
                del active[part]
    for part in parts:
        where = workers.described(part)
        if part in failed:
            logger.info("%s: %s failed: %s", title, part, failed[part])
            reason = {"status": "failed", "reason": failed[part]}
            yield run.row(part.problem, part.provider, workers.threads, **where, **reason)
            continue
        times = active[part].times
        yield run.row(
            part.problem,
            part.provider,
            workers.threads,
            median_ms=percentile(times, 0.5),
            min_ms=min(times),
            p10=percentile(times, 0.1),
            p90=percentile(times, 0.9),
            runs=len(times),
            max_rel_error=active[part].error,
            **where,
        )
