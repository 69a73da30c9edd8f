# SPDX-License-Identifier: Apache-2.0
"""``tvmdcn tune``: which layers, a live display, and what to do next."""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tvmdcn.errors import TuningError, TvmdcnError
from tvmdcn.extras import explain, require
from tvmdcn.problems import (
    OPERATORS,
    PROBLEMS,
    TEST_PROBLEMS,
    Problem,
    load_problem_file,
    of_operators,
    parse_problem,
    problem_text,
)

if TYPE_CHECKING:
    from tvmdcn.tuning.tuner import Progress, TuningResult

__all__ = ["tune_command"]

_STAGES = {
    "search": "searching",
    "build": "building",
    "measure": "measuring",
    "final": "comparing the best",
}


def _selected(
    problems: Iterable[str], files: Iterable[Path], model: str | None, inputs: tuple[str, ...]
) -> list[Problem]:
    found: list[Problem] = []
    for text in problems:
        found += PROBLEMS.values() if text == "all" else [parse_problem(text)]
    for path in files:
        found += load_problem_file(path)
    if model is not None:
        from tvmdcn.tuning.models import load_model, parse_input, problems_of_model

        if not inputs:
            raise click.UsageError("--model needs --input, such as --input 1x3x512x512.")
        shapes = [parse_input(text) for text in inputs]
        found += problems_of_model(load_model(model), shapes)
    elif inputs:
        raise click.UsageError("--input goes with --model.")
    if not found:
        raise click.UsageError(
            "say what to tune: --problem NAME (or 'all', or N,Cin,H,W,Cout,...), --file LAYERS.json, "
            "or --model MODULE:FACTORY --input SHAPE."
        )
    return list(dict.fromkeys(found))


def _next_command(tuned: Sequence[Problem], threads: int, target: str | None, output: Path | None) -> str:
    """Return a command that compares what was tuned, as it can be typed into a shell."""
    from tvmdcn.target import detect_target, resolve_target

    def text(problem: Problem) -> str:
        named = PROBLEMS.get(problem.name) or TEST_PROBLEMS.get(problem.name)
        if named is not None and (named.spec, named.extents) == (problem.spec, problem.extents):
            return problem.name
        return problem_text(problem.spec, problem.extents)

    names = list(dict.fromkeys(text(problem.forward) for problem in tuned))
    tag = resolve_target(target).tag
    words = [] if tag == detect_target().tag else [f"TVMDCN_TARGET={tag}"]
    words += [] if output is None else [f"TVMDCN_RECORDS={shlex.quote(str(output))}"]
    words += ["tvmdcn", "benchmark"]
    for name in ["all"] if set(names) == set(PROBLEMS) else names:
        words += ["--problem", shlex.quote(name)]
    return " ".join([*words, *([] if threads == 1 else ["--threads", str(threads)])])


class _Display:
    """The progress of one layer: a live line on a terminal, else a line for each round."""

    def __init__(self, name: str, budget: float | None) -> None:
        from rich.console import Console
        from rich.markup import escape
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self._name, self._budget = name, budget
        self._before: int | None = None
        console = Console(stderr=True)
        self._live = console.is_terminal
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}", markup=False),
            console=console,
            disable=not self._live,
        )
        self._task = self._progress.add_task(escape(name), total=None, state="starting")

    def __enter__(self) -> _Display:
        self._progress.__enter__()
        return self

    def __exit__(self, *details: Any) -> None:
        self._progress.__exit__(*details)

    def show(self, state: Progress) -> None:
        """Show how far the tuning is."""
        if self._before is None:
            self._before = state.trials  # of earlier runs, which say nothing about the time that is left
        words = " · ".join(self._words(state))
        if self._live:
            self._progress.update(self._task, completed=state.trials, total=state.wanted, state=words)
        elif state.stage in ("search", "final"):  # once a round, and when the rounds are over
            click.echo(f"{self._name}: {state.trials} of {state.wanted} trials · {words}", err=True)

    def _words(self, state: Progress) -> list[str]:
        parts = []
        if math.isfinite(state.best):
            parts.append(f"best {1e3 * state.best:.3f} ms")
        if math.isfinite(state.best) and math.isfinite(state.default):
            parts.append(f"{state.default / state.best:.2f}x of default")
        if state.failures:
            parts.append("failed: " + _failures(state.failures))
        new = state.trials - (self._before or 0)
        left = state.elapsed / new * max(0, state.wanted - state.trials) if new else math.inf
        if self._budget is not None:
            left = min(left, max(0.0, self._budget - state.elapsed))
        if math.isfinite(left) and state.stage != "final":
            parts.append(f"{left:.0f} s left")
        return [*parts, _STAGES.get(state.stage, state.stage)]


def _failures(failures: Any) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in failures.items()) or "none"


def _summary(problem: Problem, result: TuningResult) -> str:
    from tvmdcn.te import operator_of
    from tvmdcn.tuning.words import describe_decisions

    record = result.record
    threads = "1 thread" if record.threads == 1 else f"{record.threads} threads"
    gain = record.default_seconds / record.seconds
    return (
        f"{problem.name}: {1e3 * record.seconds:.3f} ms on {threads}, {gain:.2f}x as fast as the default "
        f"({1e3 * record.default_seconds:.3f} ms)\n"
        f"  schedule: {describe_decisions(record.decisions, operator_of(problem.spec).granule)}\n"
        f"  {result.trials} trials ({result.new_trials} new), failed: {_failures(result.failures)}"
    )


@click.command("tune", context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--problem",
    "problems",
    multiple=True,
    help="A named layer, 'all', or N,Cin,H,W,Cout[,k=3x3][,s=1]...; repeatable.",
)
@click.option(
    "--file",
    "--problem-file",
    "files",
    multiple=True,
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="A JSON or TOML file of layers; repeatable.",
)
@click.option("--model", help="MODULE:FACTORY of a torch model, whose deformable layers are tuned.")
@click.option(
    "--input",
    "inputs",
    multiple=True,
    help="Shape of an input of the model, such as 1x3x512x512; repeatable.",
)
@click.option(
    "--operator",
    type=click.Choice(OPERATORS),
    default=OPERATORS[0],
    show_default=True,
    help="The layers, their gradients, or both.",
)
@click.option("--target", help="What to tune for; this machine by default.")
@click.option(
    "--trials",
    type=click.IntRange(1),
    default=64,
    show_default=True,
    help="Schedules to measure for each layer.",
)
@click.option("--threads", type=click.IntRange(1), help="Threads of a call; by default all that the process may use.")
@click.option(
    "--time-budget",
    type=click.FloatRange(0, min_open=True),
    help="Seconds for each layer, after which its search ends.",
)
@click.option("--resume/--fresh", default=True, help="Continue earlier trials (the default), or forget them.")
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    help="Root of the records; the user's by default.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the search.")
def tune_command(
    problems: tuple[str, ...],
    files: tuple[Path, ...],
    model: str | None,
    inputs: tuple[str, ...],
    operator: str,
    target: str | None,
    trials: int,
    threads: int | None,
    time_budget: float | None,
    resume: bool,
    output: Path | None,
    seed: int,
) -> None:
    """Search the best schedule of layers for this machine, and keep it.

    Ctrl-C keeps the best so far. A tuning that was killed has lost nothing: run the same command again.
    """
    options = {
        "trials": trials,
        "threads": threads,
        "time_budget": time_budget,
        "resume": resume,
        "records": output,
        "seed": seed,
    }
    try:
        chosen = of_operators(_selected(problems, files, model, inputs), operator)
        require("tune", "tuning")
        status = _tune_all(chosen, target, options)
    except (TvmdcnError, OSError) as error:
        raise click.ClickException(str(error)) from error
    except ImportError as error:
        message = explain(error, "tuning")
        if message is None:
            raise
        raise click.ClickException(message) from error
    sys.exit(status)


def _tune_all(chosen: Sequence[Problem], target: str | None, options: dict[str, Any]) -> int:
    """Tune layer after layer; print how each went, and at the end what to do next; return the exit status."""
    from tvmdcn.tuning.tuner import tune

    done: list[tuple[Problem, TuningResult]] = []
    status, stopped = 0, False
    try:
        for position, problem in enumerate(chosen, 1):
            try:
                with _Display(f"{problem.name} ({position}/{len(chosen)})", options["time_budget"]) as display:
                    result = tune(
                        problem.spec,
                        problem.extents,
                        target,
                        name=problem.name,
                        progress=display.show,
                        **options,
                    )
            except TuningError as error:  # this layer's trouble: the others may do better
                click.echo(f"Error: {problem.name}: {error}", err=True)
                status = 1
                continue
            except KeyboardInterrupt:
                click.echo(f"{problem.name}: interrupted before anything was measured", err=True)
                status, stopped = 130, True
                break
            done.append((problem, result))
            click.echo(_summary(problem, result))
            if result.interrupted:
                stopped = True
                break
    finally:
        if stopped:
            click.echo("interrupted; run the same command again to continue")
        if done:
            click.echo(f"records: {done[-1][1].path}")
            tuned, threads = [problem for problem, _ in done], done[-1][1].record.threads
            click.echo(f"next: {_next_command(tuned, threads, target, options['records'])}")
    return status


if __name__ == "__main__":
    tune_command()
