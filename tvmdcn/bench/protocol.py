# SPDX-License-Identifier: Apache-2.0
"""Compare our kernels with the peers: the measurement protocol.

Every provider runs in a process of its own, held to as many processors as it has threads, the same ones for all
(:mod:`tvmdcn.bench.process`). The processes take turns, one measuring while the others are stopped; a turn is a short
burst of calls after a warm-up; the order is rotated and reversed from round to round, so that a slow moment of the
machine falls on all alike (:mod:`tvmdcn.bench.turns`). The row holds the median over all rounds. Each output is first
compared with the float64 reference: a wrong result is a failed row, and so is anything else that goes wrong, with its
reason.

A layer and its gradients are measured in the same rounds, so that what the backward takes in units of the forward
rests on the same moments; and so are calls with warm and with cold caches (:mod:`tvmdcn.bench.device`).
"""

from __future__ import annotations

import datetime
import logging
import math
import secrets
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tvmdcn.bench.inputs import TOLERANCES, Inputs
from tvmdcn.bench.machine import identify_commit, identify_machine, identify_versions
from tvmdcn.bench.measurement import CACHES, Measurement, direction_of
from tvmdcn.bench.process import Worker, WorkerError
from tvmdcn.bench.provider import Provider
from tvmdcn.bench.providers import default_providers
from tvmdcn.bench.resume import Known
from tvmdcn.bench.statistics import summarize
from tvmdcn.bench.turns import Protocol, Table, Turns, take_turns
from tvmdcn.errors import TvmdcnError
from tvmdcn.problems import Problem

__all__ = ["Measurement", "Protocol", "compare", "describe_origin", "describe_run", "new_run"]

logger = logging.getLogger(__name__)


def new_run() -> str:
    """Return a name for a run of a command, unlike any other's."""
    return f"{datetime.datetime.now():%Y%m%dT%H%M%S}-{secrets.token_hex(3)}"


def describe_origin(command: str | None = None, run: str | None = None) -> dict[str, Any]:
    """Return what all rows of a run have in common."""
    return {
        "machine": identify_machine(),
        "versions": identify_versions(),
        "commit": identify_commit(),
        "command": command or shlex.join(sys.argv) or "python",
        "run": run or new_run(),
    }


def now() -> str:
    """Return the date of a row."""
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")


def describe_run(command: str | None = None, run: str | None = None) -> Callable[..., Measurement]:
    """Return a function (problem, provider, threads, **result) that makes rows, where and how filled in."""
    common = describe_origin(command, run)

    def row(problem: Problem, provider: Provider, threads: int, **result: Any) -> Measurement:
        values = {
            "problem": problem.forward.name,
            "spec": problem.spec,
            "extents": problem.extents,
            "provider": provider.name,
            "role": provider.role,
            "device": provider.device,
            "schedule": provider.schedule if provider.role == "ours" else None,
            "measure": provider.measure,
            "threads": threads,
            "date": now(),
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

    def __init__(
        self, protocol: Protocol, inputs: Inputs, row: Callable[..., Measurement], caches: Sequence[str]
    ) -> None:
        self.protocol, self.inputs, self.row, self.caches = protocol, inputs, row, caches
        self.described: dict[_Part, dict[str, Any]] = {}

    def prepare(self, worker: Worker, part: _Part) -> list[Turns]:
        """Prepare a problem in a worker and check its result; raise WorkerError if either fails."""
        problem = part.problem
        folder, expected = self.inputs.of(problem)
        output = folder / "output.npz"
        output.unlink(missing_ok=True)
        request = {
            "do": "prepare",
            "spec": problem.spec.to_json(),
            "extents": vars(problem.extents),
            "tensors": str(folder),
            "output": str(output),
        }
        answer = worker.ask(request, self.protocol.prepare_timeout)
        described = answer["described"]
        described["affinity"] = described["affinity"] and tuple(described["affinity"])
        if part.provider.measure != "call":  # of a tiny layer it says nothing
            described |= dict.fromkeys(("memory_bytes", "memory_prepare_bytes", "memory_resolution_bytes"))
        described["tensors"] = self.inputs.kind_of(problem)
        if answer["compared"]:
            with np.load(output, allow_pickle=False) as results:
                error, name = expected.error_of(results)
            output.unlink()
            limit = TOLERANCES["tf32" if problem.spec.tf32 else problem.spec.dtype]
            if not error <= limit:
                where = "" if name == "output" else f" of {name}"
                raise WorkerError(f"wrong result: maximum relative error{where} {error:.1e}, limit {limit:g}")
            described["max_rel_error"] = error
        self.described[part] = described
        return [self._turns(worker, answer["call_ms"], cache) for cache in self.caches]

    def _turns(self, worker: Worker, call_ms: float, cache: str) -> Turns:
        if cache == "warm":
            return Turns(worker, *self.protocol.plan(call_ms))
        answer = worker.ask({"do": "evict"}, self.protocol.measure_timeout)
        return Turns(worker, *self.protocol.plan(call_ms, cache, answer["evict_ms"]), answer["evicted_bytes"])

    def row_of(self, part: _Part, threads: int, turns: Turns, **where: Any) -> Measurement:
        """Return the row of one provider's turns."""
        fields = {**self.described[part], **summarize(turns.times), "cache": turns.cache, "protocol": turns.protocol}
        return self.row(part.problem, part.provider, threads, **fields, **where)


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
    run: str | None = None,
    caches: Sequence[str] = CACHES[:1],
    sweep: Sequence[str] = (),
    known: Sequence[Measurement] = (),
    on_known: Callable[[Measurement], object] = lambda row: None,
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
    run : str, optional
        What the rows have in common with others; default: a new name.
    caches : sequence of str
        ``warm``, ``cold`` or both, a row for each.
    sweep : sequence of str
        Along what the problems' sizes were varied, see :class:`~tvmdcn.bench.measurement.Measurement`.
    known : sequence of Measurement
        Rows measured before. A comparison all of whose rows are among them, made on this machine with these versions,
        is not made again; its rows are not among the results.
    on_known : callable
        Called with each of these rows.
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
    KeyboardInterrupt
        If the user interrupts; the rows of the layer at hand have been given to `on_row`, if two rounds were made.
    """
    chosen = default_providers() if providers is None else list(providers)
    if not problems or not threads or not chosen:
        raise ValueError("compare needs at least one problem, one number of threads and one provider.")
    if len({(provider.name, provider.measure) for provider in chosen}) < len(chosen):
        raise ValueError("compare needs providers with different names.")
    if not caches or not set(caches) <= set(CACHES):
        raise ValueError(f"caches must be some of {', '.join(CACHES)}, got {', '.join(caches) or 'none'}.")
    layers = _by_layer(problems)
    end = math.inf if time_budget is None else time.monotonic() + time_budget
    rows: list[Measurement] = []
    left = len(threads) * len(layers)
    with tempfile.TemporaryDirectory(prefix="tvmdcn-bench-") as name:
        inputs = Inputs(Path(name), seed, None if real_layers is None else Path(real_layers))
        describe = describe_run(command, run)
        state = _Run(protocol or Protocol(), inputs, partial(describe, sweep=tuple(sweep)), list(dict.fromkeys(caches)))
        before = Known(known)
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
                    taken = before.all_of(parts, count, state.caches)
                    if taken:
                        for row in taken:
                            on_known(row)
                        continue
                    for row in _measure(state, workers, parts, share, on_step or (lambda text: None)):
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
    table: Table[_Part] = Table()
    for part in parts:
        on_step(f"{title}: preparing {part}")
        try:
            table.active[part] = run.prepare(workers.get(part), part)
        except (TvmdcnError, OSError) as error:  # a worker's reason, or inputs that cannot be made
            table.failed[part] = str(error)

    def begin(index: int) -> bool:
        if index >= 2 and time.monotonic() > until:
            return False
        on_step(f"{title}: round {index + 1} of {run.protocol.rounds}")
        return True

    whole = take_turns(parts, table, run.protocol, begin)
    for part in parts:
        where = workers.described(part)
        if part in table.failed:
            reason = table.failed[part]
            logger.info("%s: %s failed: %s", title, part, reason)
            for cache in run.caches:
                yield run.row(
                    part.problem, part.provider, workers.threads, **where, cache=cache, status="failed", reason=reason
                )
            continue
        for turns in table.active[part]:
            # A first round and its reverse give everyone the same mean place.
            if whole or len(turns.times) >= min(2, turns.turns):
                yield run.row_of(part, workers.threads, turns, **where)
    if not whole:
        raise KeyboardInterrupt
