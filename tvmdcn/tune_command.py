# SPDX-License-Identifier: Apache-2.0
"""``tvmdcn tune``: which layers, a live display, and what to do next."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

from tvmdcn.errors import TvmdcnError
from tvmdcn.problems import PROBLEMS, Problem, load_problem_file, parse_problem

__all__ = ["tune_command"]


def _selected(
    problems: Iterable[str], files: Iterable[Path], model: str | None, inputs: tuple[str, ...]
) -> list[Problem]:
    found: list[Problem] = []
    for text in problems:
        found += PROBLEMS.values() if text == "all" else [parse_problem(text)]
    for path in files:
        found += load_problem_file(path)
    if model is not None:
        from tvmdcn.models import load_model, parse_input, problems_of_model

        if not inputs:
            raise click.UsageError("--model needs --input, such as --input 1x3x512x512.")
        found += problems_of_model(load_model(model), [parse_input(text) for text in inputs])
    elif inputs:
        raise click.UsageError("--input goes with --model.")
    if not found:
        raise click.UsageError(
            "say what to tune: --problem NAME (or 'all', or N,Cin,H,W,Cout,...), --file LAYERS.json, or --model."
        )
    return found


def _words(values: dict[str, int], granule: int) -> str:
    known = {
        "register_pixels": "{} pixels in a register tile",
        "tile_units": "tiles of up to {} units of " + f"{granule} pixels",
        "taps": "{} taps sampled at a time",
        "channels": "{} channels sampled at a time",
        "unroll": "reduction unrolled {} times",
        "register_blocks": "{} vectors of channels in registers",
    }
    return "; ".join(known.get(name, name + " {}").format(value) for name, value in values.items())


class _Display:
    """The live line of one layer: trials, best so far, speed-up, time left."""

    def __init__(self, name: str, budget: float | None) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self._budget, self._start = budget, time.monotonic()
        self._progress = Progress(
            TextColumn("[bold]{task.description}"), BarColumn(20), MofNCompleteColumn(), TextColumn("{task.fields[state]}")
        )
        self._task = self._progress.add_task(name, total=None, state="")

    def __enter__(self) -> _Display:
        self._progress.__enter__()
        return self

    def __exit__(self, *details: Any) -> None:
        self._progress.__exit__(*details)

    def show(self, state: Any) -> None:
        parts = []
        if math.isfinite(state.best):
            parts.append(f"best {1e3 * state.best:.3f} ms")
        if math.isfinite(state.best) and math.isfinite(state.default):
            parts.append(f"{state.default / state.best:.2f}x of default")
        failed = sum(state.failures.values())
        if failed:
            parts.append("failed: " + ", ".join(f"{n} {reason}" for reason, n in state.failures.items()))
        spent = time.monotonic() - self._start
        left = math.inf
        if state.trials:
            left = spent / state.trials * max(0, state.wanted - state.trials)
        if self._budget is not None:
            left = min(left, max(0.0, self._budget - spent))
        if math.isfinite(left):
            parts.append(f"{left:.0f} s left")
        parts.append(state.stage)
        self._progress.update(self._task, completed=state.trials, total=state.wanted, state=" · ".join(parts))


@click.command("tune")
@click.option("--problem", "problems", multiple=True, help="A named layer, 'all', or N,Cin,H,W,Cout[,k=3x3][,s=1]...; repeatable.")
@click.option("--file", "files", multiple=True, type=click.Path(path_type=Path, exists=True), help="A JSON or TOML file of layers.")
@click.option("--model", help="MODULE:FACTORY of a torch model, whose deformable layers are tuned.")
@click.option("--input", "inputs", multiple=True, help="Shape of an input of the model, such as 1x3x512x512; repeatable.")
@click.option("--target", help="What to tune for; this machine by default.")
@click.option("--trials", default=64, show_default=True, help="Schedules to measure for each layer.")
@click.option("--threads", type=int, help="Threads of a call; by default all that the process may use.")
@click.option("--time-budget", type=float, help="Seconds for each layer, after which its search ends.")
@click.option("--resume/--fresh", default=True, help="Continue earlier trials (the default), or forget them.")
@click.option("--output", type=click.Path(path_type=Path, file_okay=False), help="Root of the records; the user's by default.")
@click.option("--seed", default=0, show_default=True, help="Of the search.")
def tune_command(
    problems: tuple[str, ...],
    files: tuple[Path, ...],
    model: str | None,
    inputs: tuple[str, ...],
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
    from tvmdcn.te import operator_of
    from tvmdcn.tuner import tune

    try:
        chosen = _selected(problems, files, model, inputs)
        for position, problem in enumerate(chosen, 1):
            with _Display(f"{problem.name} ({position}/{len(chosen)})", time_budget) as display:
                result = tune(
                    problem.spec,
                    problem.extents,
                    target,
                    trials=trials,
                    threads=threads,
                    time_budget=time_budget,
                    resume=resume,
                    records=output,
                    name=problem.name,
                    seed=seed,
                    progress=display.show,
                )
            record = result.record
            click.echo(
                f"{problem.name}: {1e3 * record.seconds:.3f} ms on {record.threads} thread(s), default "
                f"{1e3 * record.default_seconds:.3f} ms; variant {record.decisions.variant}: "
                f"{_words(dict(record.decisions.values), operator_of(problem.spec).granule)}"
            )
            failed = ", ".join(f"{n} {reason}" for reason, n in result.failures.items()) or "none"
            click.echo(f"  {result.trials} trials ({result.new_trials} new), failed: {failed}")
            if result.interrupted:
                click.echo("  interrupted; run the same command again to continue")
                break
    except TvmdcnError as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"records: {result.path}")
    where = f"TVMDCN_RECORDS={output} " if output is not None else ""
    click.echo(f"next: {where}tvmdcn benchmark --problem {chosen[0].name if chosen[0].name in PROBLEMS else 'all'}")


if __name__ == "__main__":
    tune_command()
