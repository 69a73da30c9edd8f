# SPDX-License-Identifier: Apache-2.0
"""What ``tvmdcn tune`` shows while it runs: a live table on a terminal, else a line for each round."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from tvmdcn.tuning.farm import ServerState
    from tvmdcn.tuning.session import Progress

__all__ = ["Display", "describe_failures"]

_STAGES = {
    "search": "searching",
    "build": "building",
    "measure": "measuring",
    "final": "comparing the best",
}


def describe_failures(failures: Mapping[str, int]) -> str:
    """Return how many trials failed for which reason."""
    return ", ".join(f"{count} {reason}" for reason, count in failures.items()) or "none"


class Display:
    """The progress of a tuning: a row for each layer, one for all of them, and one for each server.

    Parameters
    ----------
    names : sequence of str
        The layers.
    budget : float, optional
        Seconds that the search may take.
    """

    def __init__(self, names: Sequence[str], budget: float | None) -> None:
        from rich.console import Console, Group
        from rich.live import Live
        from rich.markup import escape
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as Bars
        from rich.table import Table

        self._names, self._budget = list(names), budget
        self._before: dict[str, int] = {}
        self._latest: dict[str, Progress] = {}
        console = Console(stderr=True)
        self._progress = Bars(
            TextColumn("[bold]{task.description}"),
            BarColumn(20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}", markup=False),
            console=console,
        )
        self._tasks = {
            name: self._progress.add_task(escape(name), total=None, state="waiting")
            for name in (["all layers"] if len(self._names) > 1 else []) + self._names
        }
        self._group, self._table = Group, Table
        self._live = Live(self._progress, console=console) if console.is_terminal else None

    def __enter__(self) -> Display:
        """Begin to show."""
        if self._live is not None:
            self._live.__enter__()
        return self

    def __exit__(self, *details: Any) -> None:
        """Leave the last state on the screen."""
        if self._live is not None:
            self._live.__exit__(*details)

    def show(self, state: Progress) -> None:
        """Show how far the tuning of a layer is."""
        name = state.name if state.name in self._names else self._names[0]
        self._before.setdefault(name, state.trials)  # of earlier runs, which say nothing about the time that is left
        self._latest[name] = state
        one = len(self._names) == 1
        words = " · ".join([*self._words(state), *(self._time_left() if one else []), _stage(state)])
        if self._live is not None:
            self._progress.update(self._tasks[name], completed=state.trials, total=state.wanted, state=words)
            if not one:
                everything = " · ".join([*self._sums(), *self._time_left()])
                self._progress.update(
                    self._tasks["all layers"], completed=self._trials(), total=state.wanted, state=everything
                )
        elif state.stage in ("search", "final"):  # once a round, and when the rounds are over
            counts = f"{state.trials} trials, {self._trials()} of {state.wanted} in all"
            click.echo(f"{name}: {f'{state.trials} of {state.wanted} trials' if one else counts} · {words}", err=True)

    def show_servers(self, states: Sequence[ServerState]) -> None:
        """Show what each server is doing; without a terminal, only what goes wrong is logged, by the farm."""
        if self._live is None:
            return
        table = self._table(box=None, padding=(0, 2, 0, 0), show_header=False)
        for state in states:
            colour = {"lost": "red", "refused": "red", "measuring": "green"}.get(state.state, "default")
            table.add_row(state.address, f"[{colour}]{state.state}", f"{state.measured} measured", _plain(state.detail))
        self._live.update(self._group(self._progress, table))

    def _trials(self) -> int:
        return sum(state.trials for state in self._latest.values())

    def _words(self, state: Progress) -> list[str]:
        parts = []
        if math.isfinite(state.best):
            parts.append(f"best {1e3 * state.best:.3f} ms")
        if math.isfinite(state.best) and math.isfinite(state.default):
            parts.append(f"{state.default / state.best:.2f}x of default")
        if state.failures:
            parts.append("failed: " + describe_failures(state.failures))
        return parts

    def _sums(self) -> list[str]:
        """Return how much faster the layers are together that have times."""
        timed = [s for s in self._latest.values() if math.isfinite(s.best) and math.isfinite(s.default)]
        if not timed:
            return []
        gain = sum(s.weight * s.default for s in timed) / sum(s.weight * s.best for s in timed)
        return [f"{gain:.2f}x of default"]

    def _time_left(self) -> list[str]:
        states = self._latest.values()
        elapsed, wanted = sum(state.elapsed for state in states), max(state.wanted for state in states)
        new = self._trials() - sum(self._before.values())
        left = elapsed / new * max(0, wanted - self._trials()) if new else math.inf
        if self._budget is not None:
            left = min(left, max(0.0, self._budget - elapsed))
        over = any(state.stage == "final" for state in states)
        return [f"{left:.0f} s left"] if math.isfinite(left) and not over else []


def _stage(state: Progress) -> str:
    return _STAGES.get(state.stage, state.stage)


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)
