# SPDX-License-Identifier: Apache-2.0
"""How providers take turns: in what order, how often, for how long, with warm caches and with cold ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from tvmdcn.bench.process import Worker, WorkerError

__all__ = ["Protocol", "Turns", "take_turns", "turn_order"]

_T = TypeVar("_T")


@dataclass(frozen=True)
class Protocol:
    """How long and how often is measured.

    Parameters
    ----------
    rounds : int
        How often each provider gets a turn per problem. A turn begins with a few calls that are not timed.
    burst_seconds : float
        Length of a turn; with cold caches, filling them included.
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

    def plan(self, call_ms: float, cache: str = "warm", evict_ms: float = 0.0) -> tuple[int, dict[str, Any]]:
        """Return the number of turns for a provider of this speed, and the request of a turn."""
        seconds = (call_ms + evict_ms) / 1e3
        request = {
            "do": "measure",
            "cache": cache,
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
class Turns:
    """What one provider still has to do, and what it has done: the milliseconds of its calls, turn by turn."""

    worker: Worker
    turns: int
    request: dict[str, Any]
    evicted_bytes: int | None = None
    times: list[list[float]] = field(default_factory=list)

    @property
    def cache(self) -> str:
        """Of what caches the times are."""
        return str(self.request["cache"])

    def due(self, index: int, rounds: int) -> bool:
        """Whether it takes part in a round: turns are spread evenly, the first round has all."""
        return index == 0 or (index * self.turns) // rounds != ((index - 1) * self.turns) // rounds

    @property
    def protocol(self) -> dict[str, Any]:
        """What a row says of how it was measured."""
        return {
            "rounds": max(len(self.times), 1),
            "burst_seconds": self.request["seconds"],
            "min_calls": self.request["min_calls"],
            "warmup_seconds": self.request["warmup"],
            "evicted_bytes": self.evicted_bytes,
        }


@dataclass
class Table(Generic[_T]):
    """Who is measured together: the turns of each, by cache, and why some have none."""

    active: dict[_T, list[Turns]] = field(default_factory=dict)
    failed: dict[_T, str] = field(default_factory=dict)


def take_turns(items: Sequence[_T], table: Table[_T], protocol: Protocol, on_round: Callable[[int], bool]) -> bool:
    """Measure in rounds; a provider that fails leaves the table with its reason.

    Parameters
    ----------
    items : sequence
        The order of the first round.
    table : Table
        Filled in.
    protocol : Protocol
        Its rounds.
    on_round : callable
        Called with the number of each round before it begins; False ends the measurement.

    Returns
    -------
    bool
        False if the user interrupted. Times of a round that was not finished are there, too.
    """
    try:
        for index in range(protocol.rounds):
            if not on_round(index):
                break
            for item in turn_order(items, index):
                for turns in table.active.get(item, ()):
                    if not turns.due(index, protocol.rounds):
                        continue
                    try:
                        answer = turns.worker.ask(turns.request, protocol.measure_timeout)
                    except WorkerError as error:
                        table.failed[item] = str(error)
                        break
                    turns.times.append(answer["times_ms"])
                if item in table.failed:
                    table.active.pop(item, None)
    except KeyboardInterrupt:
        return False
    return True
