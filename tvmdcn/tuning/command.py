# SPDX-License-Identifier: Apache-2.0
"""``tvmdcn tune``: which layers, a live display, and what to do next."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tvmdcn import env
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
from tvmdcn.tuning.display import Display, describe_failures

if TYPE_CHECKING:
    from tvmdcn.tuning.tuner import Farm, TuningResult

__all__ = ["tune_command"]

_TRIALS = 64  # for each layer, where nobody says how many
_DRY_TRIALS = 8


def _selected(
    problems: Iterable[str], files: Iterable[Path], model: str | None, inputs: tuple[str, ...]
) -> list[Problem]:
    found: list[Problem] = []
    for text in problems:
        found += PROBLEMS.values() if text == "all" else [parse_problem(text)]
    for path in files:
        found += load_problem_file(path)
    if model is not None:
        from tvmdcn.tuning.models import is_onnx, load_model, parse_input, problems_of_model

        if not inputs and not is_onnx(model):
            raise click.UsageError("--model needs --input, such as --input 1x3x512x512.")
        shapes = [parse_input(text) for text in inputs]
        found += problems_of_model(load_model(model), shapes)
    elif inputs:
        raise click.UsageError("--input goes with --model.")
    if not found:
        raise click.UsageError(
            "say what to tune: --problem NAME (or 'all', or N,Cin,H,W,Cout,...), --file LAYERS.json, "
            "or --model MODULE:FACTORY --input SHAPE, or --model FILE.onnx."
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
        f"  {result.trials} trials ({result.new_trials} new), failed: {describe_failures(result.failures)}"
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
@click.option("--model", help="MODULE:FACTORY of a torch model, or FILE.onnx, whose deformable layers are tuned.")
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
    help="Schedules to measure, of all layers together, those of earlier runs included; by default 64 for each. They "
    "are spent where the layers' total time is expected to fall fastest.",
)
@click.option("--threads", type=click.IntRange(1), help="Threads of a call; by default all that the process may use.")
@click.option(
    "--time-budget",
    type=click.FloatRange(0, min_open=True),
    help="Seconds after which the search ends, of all layers together.",
)
@click.option("--resume/--fresh", default=True, help="Continue earlier trials (the default), or forget them.")
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    help="Root of the records; the user's by default.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the search.")
@click.option(
    "--warm-starts",
    type=click.IntRange(0),
    default=4,
    show_default=True,
    help="Schedules to try first that were found for similar layers.",
)
@click.option("--tracker", help="HOST:PORT of a tracker of TVM's RPC: build here, measure on its servers.")
@click.option("--key", help="Which of the tracker's servers to use; all of them machines of one kind.")
@click.option("--parallel", type=click.IntRange(1), help="Servers to use at a time, at most; by default 8.")
@click.option(
    "--dry-run",
    is_flag=True,
    help="Measure nothing: compile candidates for a GPU (--target cuda-sm_90), which need not be there, and tell what "
    "they take of it. --trials counts for each layer then, 8 by default.",
)
@click.option(
    "--rows",
    type=click.Path(path_type=Path, dir_okay=False),
    help="With --dry-run: a file of JSON lines to add to, one for each candidate.",
)
def tune_command(
    problems: tuple[str, ...],
    files: tuple[Path, ...],
    model: str | None,
    inputs: tuple[str, ...],
    operator: str,
    target: str | None,
    trials: int | None,
    threads: int | None,
    time_budget: float | None,
    resume: bool,
    output: Path | None,
    seed: int,
    warm_starts: int,
    tracker: str | None,
    key: str | None,
    parallel: int | None,
    dry_run: bool,
    rows: Path | None,
) -> None:
    """Search the best schedules of layers, for this machine or for those of a tracker, and keep them.

    Ctrl-C keeps the best so far. A tuning that was killed has lost nothing: run the same command again.
    """
    options: dict[str, Any] = {
        "threads": threads,
        "time_budget": time_budget,
        "resume": resume,
        "records": output,
        "seed": seed,
        "warm_starts": warm_starts,
    }
    try:
        chosen = of_operators(_selected(problems, files, model, inputs), operator)
        if rows is not None and not dry_run:
            raise click.UsageError("--rows goes with --dry-run.")
        if dry_run:
            _dry_run(chosen, target, trials or _DRY_TRIALS, seed, rows)
            return
        options["trials"] = _TRIALS * len(chosen) if trials is None else trials
        named = target or env.target() or ""
        require("tune", "tuning", ("xgboost",) if named.startswith(("cuda", "sm_")) else ())
        options["farm"] = _farm(tracker, key, parallel)
        status = _tune(chosen, target, options)
    except (TvmdcnError, OSError) as error:
        raise click.ClickException(str(error)) from error
    except ImportError as error:
        message = explain(error, "tuning")
        if message is None:
            raise
        raise click.ClickException(message) from error
    sys.exit(status)


def _dry_run(chosen: Sequence[Problem], target: str | None, trials: int, seed: int, path: Path | None) -> None:
    """Compile candidates for a GPU and print what they take."""
    from rich.progress import Progress as Bar

    from tvmdcn.target import available_processors
    from tvmdcn.tuning.dry_run import dry_run, print_rows, write_rows

    with Bar(transient=True) as bar:
        task = bar.add_task("compiling", total=len(chosen) * trials)

        def advance(problem: Problem, done: int, wanted: int) -> None:
            bar.update(task, advance=1, description=f"{problem.name} {done}/{wanted}")

        rows = dry_run(
            chosen,
            target,
            trials=trials,
            seed=seed,
            processes=len(available_processors()),
            progress=advance,
        )
        found = write_rows(rows, path)
    print_rows(found)


def _farm(tracker: str | None, key: str | None, parallel: int | None) -> Farm | None:
    if tracker is None:
        if key is not None or parallel is not None:
            raise click.UsageError("--key and --parallel go with --tracker.")
        return None
    if key is None:
        raise click.UsageError("--tracker needs --key, the one that the servers were started with.")
    from tvmdcn.tuning.farm import Farm

    return Farm(tracker, key) if parallel is None else Farm(tracker, key, parallel)


def _tune(chosen: Sequence[Problem], target: str | None, options: dict[str, Any]) -> int:
    """Tune the layers; print how each went, and what to do next; return the exit status."""
    from tvmdcn.tuning.tuner import Layer, tune_together

    layers = [Layer(problem.spec, problem.extents, problem.name, problem.count) for problem in chosen]
    farm: Farm | None = options["farm"]
    try:
        with Display([problem.name for problem in chosen], options["time_budget"]) as display:
            if farm is not None:
                farm.report = display.show_servers
            results = tune_together(layers, target, progress=display.show, **options)
    except KeyboardInterrupt:
        click.echo("interrupted before anything was measured", err=True)
        return 130
    done: list[tuple[Problem, TuningResult]] = []
    for problem, result in zip(chosen, results, strict=True):
        if isinstance(result, TuningError):  # this layer's trouble: the others may have done better
            click.echo(f"Error: {problem.name}: {result}", err=True)
        else:
            done.append((problem, result))
            click.echo(_summary(problem, result))
    if len(done) > 1:
        click.echo(_total(done))
    if any(result.interrupted for _, result in done):
        click.echo("interrupted; run the same command again to continue")
    if done:
        click.echo(f"records: {done[-1][1].path}")
        tuned, threads = [problem for problem, _ in done], done[-1][1].record.threads
        click.echo(f"next: {_next_command(tuned, threads, target, options['records'])}")
    return 0 if len(done) == len(chosen) else 1


def _total(done: Sequence[tuple[Problem, TuningResult]]) -> str:
    """Return what was gained in all, each layer as often as a model calls it."""
    calls = sum(problem.count for problem, _ in done)
    now = sum(problem.count * result.record.seconds for problem, result in done)
    before = sum(problem.count * result.record.default_seconds for problem, result in done)
    return (
        f"all {len(done)} layers, {calls} calls: {1e3 * now:.3f} ms, {before / now:.2f}x as fast as the defaults "
        f"({1e3 * before:.3f} ms)"
    )


if __name__ == "__main__":
    tune_command()
