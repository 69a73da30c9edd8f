#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""How many trials the records of similar layers save a tuning: trials until 95 % of the best, with and without them.

Each layer is tuned as if it had never been (its own records are left out), once for each seed and number of warm
starts. A schedule is measured once, and its time serves all of these searches, so that they differ in what they try
and not in the noise. All is kept in a folder: the study can be ended at any time, and continues where it was.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
import time
from collections.abc import Generator, Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import click

from tvmdcn.cache_key import source_digest
from tvmdcn.errors import TvmdcnError
from tvmdcn.problems import Problem, parse_problem
from tvmdcn.space import Decisions
from tvmdcn.target import TargetInfo, host_identity, resolve_target
from tvmdcn.tuning.allocation import best_so_far
from tvmdcn.tuning.session import Session
from tvmdcn.tuning.trial import Job, Outcome
from tvmdcn.tuning.warm_start import similar_decisions
from tvmdcn.tuning.workers import Workers


class MeasuredOnce(Workers):
    """Workers that look into a file before they build: of a schedule that is in it, they return the time there."""

    def __init__(self, path: Path, deadline: float) -> None:
        super().__init__(builders=2)
        self._path, self._deadline = path, deadline
        self._known: dict[str, Outcome] = {}
        if path.is_file():
            for line in path.read_text().splitlines():
                row = json.loads(line)
                self._known[row["decisions"]] = Outcome(tuple(row["seconds"]), row["error"], row["reason"])

    def trials(self, job: Job, candidates: Sequence[Decisions]) -> Generator[tuple[int, Outcome], None, None]:
        """Yield what is known; build and measure the rest, and keep it."""
        texts = [json.dumps(candidate.to_json(), sort_keys=True) for candidate in candidates]
        new = [place for place, text in enumerate(texts) if text not in self._known]
        measured = super().trials(job, [candidates[place] for place in new])
        for index, outcome in _until(measured, self._deadline):
            text = texts[new[index]]
            self._known[text] = outcome
            row = {"decisions": text, "seconds": outcome.seconds, "error": outcome.error, "reason": outcome.reason}
            with open(self._path, "a") as file:
                file.write(json.dumps(row) + "\n")
        # In the order of the proposals, whichever were known: the count of trials is what is asked about.
        for place, text in enumerate(texts):
            if text not in self._known:
                return
            yield place, self._known[text]


def _until(measured: Generator[tuple[int, Outcome], None, None], deadline: float) -> Iterator[tuple[int, Outcome]]:
    for item in measured:
        yield item
        if time.monotonic() > deadline:
            measured.close()


def search(
    problem: Problem, target: TargetInfo, starts: int, seed: int, trials: int, folder: Path, deadline: float
) -> list[float | None] | None:
    """Return the times of a search's trials in order, None for a failed one; None if the time is over."""
    name = f"{problem.name}-{starts}-{seed}"
    with tempfile.TemporaryDirectory() as scratch:
        session = Session(
            problem.spec,
            problem.extents,
            target,
            threads=1,
            log=folder / target.tag / f"{name}.jsonl",
            scratch=Path(scratch),
            name=name,
            weight=1.0,
            resume=True,
            seed=seed,
            starts=similar_decisions(problem.spec, target, 1, starts, own=False),
            wanted=trials,
            report=None,
        )
        times = folder / target.tag / f"{problem.name}-{source_digest()[:8]}.times"
        with MeasuredOnce(times, deadline) as workers:
            while len(session.log.rows) < trials and not session.exhausted:
                if time.monotonic() > deadline:
                    return None
                session.round(workers, trials - len(session.log.rows))
        return [row.seconds for row in session.log.rows]


def trials_until(seconds: Sequence[float | None], goal: float) -> int | None:
    """Return after how many trials a search had found a time of at most `goal`; None if it never did."""
    return next((count for count, best in enumerate(best_so_far(seconds), 1) if best <= goal), None)


def rows_of(name: str, found: dict[tuple[int, int], list[float | None]]) -> Iterator[list[Any]]:
    """Yield a row for each number of warm starts: trials to 95 % and to 99 % of the best of all searches."""
    best = min(best_so_far(seconds)[-1] for seconds in found.values())
    defaults = [seconds[0] for seconds in found.values() if seconds[0] is not None]
    share = best / defaults[0] if defaults else math.nan
    for starts in sorted({starts for starts, _ in found}):
        searches = [seconds for (other, _), seconds in found.items() if other == starts]
        counts = [[trials_until(seconds, best / part) for seconds in searches] for part in (0.95, 0.99)]
        yield [
            name,
            starts,
            f"{1e3 * best:.3f}",
            f"{100 * share:.0f} %",
            *(", ".join("-" if count is None else str(count) for count in column) for column in counts),
        ]


@click.command()
@click.option("--problem", "problems", multiple=True, required=True, help="A named layer, or its description.")
@click.option("--target", help="What to tune for; this machine by default.")
@click.option("--trials", type=click.IntRange(2), default=32, show_default=True, help="Of each search.")
@click.option("--warm-starts", "numbers", multiple=True, type=click.IntRange(0), default=(0, 1, 4), show_default=True)
@click.option("--seed", "seeds", multiple=True, type=int, default=(0, 1), show_default=True)
@click.option("--time-budget", type=float, default=math.inf, help="Seconds after which to stop; run again to go on.")
@click.option("--folder", type=click.Path(path_type=Path, file_okay=False), required=True, help="Where all is kept.")
def main(
    problems: tuple[str, ...],
    target: str | None,
    trials: int,
    numbers: tuple[int, ...],
    seeds: tuple[int, ...],
    time_budget: float,
    folder: Path,
) -> None:
    """Tune layers with and without the records of similar ones, and print a table in Markdown."""
    deadline = time.monotonic() + time_budget
    try:
        info = resolve_target(target)
        found: dict[str, dict[tuple[int, int], list[float | None]]] = {}
        for problem in map(parse_problem, problems):
            for starts in numbers:
                for seed in seeds:
                    seconds = search(problem, info, starts, seed, trials, folder, deadline)
                    if seconds is None:
                        click.echo("the time is over: run the same command again to continue")
                        sys.exit(3)
                    found.setdefault(problem.name, {})[starts, seed] = seconds
    except TvmdcnError as error:
        raise click.ClickException(str(error)) from error
    click.echo("| layer | warm starts | best ms | default's speed | trials to 95 % | trials to 99 % |")
    click.echo("|---|---|---|---|---|---|")
    for name, searches in found.items():
        for row in rows_of(name, searches):
            click.echo(f"| {' | '.join(map(str, row))} |")
    machine = host_identity()
    versions = ", ".join(f"{name} {machine['versions'][name]}" for name in ("tvmdcn", "apache-tvm", "apache-tvm-ffi"))
    today = datetime.now(timezone.utc).date().isoformat()
    which = f"{trials} trials, seeds {', '.join(map(str, seeds))}"
    click.echo(f"\n{machine['cpu']} ({info.tag}), {which}; {versions}; {today}")


if __name__ == "__main__":
    main()
