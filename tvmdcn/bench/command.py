# SPDX-License-Identifier: Apache-2.0
"""Compare our kernels with the peers: the command, with its options, its progress and its table.

The protocol of measurement is in :mod:`tvmdcn.bench.protocol`, the providers in :mod:`tvmdcn.bench.providers`.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tvmdcn.bench.comparison import GeometricMean, Line, Section, Verdict, organize, thread_gains
from tvmdcn.bench.measurement import DIRECTIONS, Measurement, append_row
from tvmdcn.bench.overhead import measure_overhead
from tvmdcn.bench.protocol import Protocol, compare
from tvmdcn.bench.providers import PROVIDERS, Provider, default_providers
from tvmdcn.bench.words import describe_measure
from tvmdcn.errors import TvmdcnError
from tvmdcn.problems import PROBLEMS, REAL_LAYERS, Problem, load_problem_file, parse_problem

__all__ = ["Measurement", "Protocol", "benchmark_command", "compare", "main", "section_table"]


class _ListCommand(click.Command):
    """Lets options take several values after one name: ``--threads 1 2`` is ``--threads 1 --threads 2``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        lists = {
            name
            for parameter in self.params
            if isinstance(parameter, click.Option) and parameter.multiple
            for name in parameter.opts
        }
        spread: list[str] = []
        name, values = None, 0
        for arg in args:
            if arg.startswith("-"):
                name, values = (arg if arg in lists else None), 0
                spread.append(arg)
            elif name is None:
                spread.append(arg)
            else:
                spread += [name, arg] if values else [arg]
                values += 1
        return super().parse_args(ctx, spread)


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"


def _milliseconds(value: float | None) -> str:
    if value is None:
        return "-"
    if value < 0.1:
        return f"{value:.4f}"
    return f"{value:.2f}" if value < 100 else f"{value:.0f}"


def _ratio(value: float | None, good: bool | None = None) -> Text:
    style = "" if value is None or good is None else "green" if good else "red"
    return Text("-" if value is None else f"{value:.2f}x", style)


def _cell(line: Line, provider: str) -> Text:
    row = line.rows.get(provider)
    if row is None:
        return Text("")
    if row.status == "failed":
        return Text("failed", "red")
    fastest = row in (line.fastest_peer, line.floor)
    return Text(_milliseconds(row.median_ms), "bold" if fastest or row is line.ours else "")


def section_table(section: Section) -> Table:
    """Return the terminal's table of a section: a line per problem, and the geometric means."""
    backward = section.direction == "backward"
    caption = (
        "bold: ours, the fastest peer, the faster plain convolution. "
        "vs peer: times as fast as it. vs conv2d: our time in units of the plain convolution's."
    )
    if backward:
        caption += " vs forward: our time in units of our own forward's. All gradients, against all of the peers'."
    table = Table(
        title=f"{section.machine.get('cpu', 'unknown processor')}, {section.direction}, {_threads(section.threads)}: "
        "median milliseconds per call",
        caption=caption,
    )
    table.add_column("problem", no_wrap=True)
    for provider in section.providers:
        table.add_column(provider, justify="right")
    for name in ("vs peer", "vs conv2d", *(("vs forward",) if backward else ()), "GFLOP/s", "max error"):
        table.add_column(name, justify="right", no_wrap=True)
    for line in section.lines:
        ours, speedup = line.ours, line.speedup
        error = None if ours is None else ours.max_rel_error
        table.add_row(
            Text(line.problem),
            *(_cell(line, provider) for provider in section.providers),
            _ratio(speedup, None if speedup is None else speedup >= 1),
            _ratio(line.cost),
            *((_ratio(line.growth),) if backward else ()),
            "-" if line.gflops is None else f"{line.gflops:.0f}",
            "-" if error is None else f"{error:.0e}",
        )
    table.add_section()
    table.add_row(
        "geometric mean",
        *(_against(section, provider) for provider in section.providers),
        _mean(section.speedup),
        _mean(section.cost),
        *((_mean(section.growth),) if backward else ()),
        "",
        "",
    )
    return table


def _against(section: Section, provider: str) -> str:
    mean = section.against(provider)
    return "" if mean is None or provider == section.subject else f"{mean.value:.2f}x ours"


def _mean(mean: GeometricMean | None) -> str:
    if mean is None:
        return "-"
    return f"{mean.value:.2f}x" + (f" ({mean.count}/{mean.total})" if mean.count < mean.total else "")


def _verdict(verdict: Verdict) -> Text:
    misses, count = verdict.misses, len(verdict.ratios)
    text = f"{verdict.aim.text}: {count - len(misses)} of {count}"
    if misses:
        text += "; not " + ", ".join(f"{line.problem} ({ratio:.2f}x)" for line, ratio in misses)
    return Text(text, "red" if misses else "green")


def _show(console: Console, rows: Sequence[Measurement]) -> None:
    sections = organize(rows)
    for section in sections:
        if section.lines:
            console.print(section_table(section))
        for verdict in section.verdicts:
            console.print(_verdict(verdict))
        for row in section.extra:
            if row.status == "ok":
                above = section.above_kernel(row)
                more = "" if above is None else f", {above * 1e3:.1f} us above the kernel"
                console.print(
                    f"{describe_measure(row)}: {_milliseconds(row.median_ms)} ms "
                    f"(median of {row.runs}, {_threads(row.threads)}){more}",
                    markup=False,
                )
    for line, gains in thread_gains(sections):
        text = ", ".join(f"{gain:.2f}x at {threads}" for threads, gain in gains.items())
        console.print(f"{line.title} ({line.spec.flops(line.extents) / 1e9:.1f} GFLOP): {text} threads", markup=False)
    for row in rows:
        if row.status == "failed":
            console.print(
                f"failed: {row.provider} on {row.title}, {_threads(row.threads)}: {row.reason}",
                markup=False,
            )


def _problems(names: Sequence[str], file: Path | None, real_layers: Path | None) -> list[Problem]:
    problems: list[Problem] = []
    if file is not None:
        problems += load_problem_file(file)
    chosen = names or (() if problems else tuple(REAL_LAYERS) if real_layers else ("all",))
    for name in chosen:
        problems += PROBLEMS.values() if name == "all" else [parse_problem(name)]
    return list(dict.fromkeys(problems))


def _chosen(names: Sequence[str], pythons: Sequence[str], directions: Sequence[str]) -> list[Provider]:
    """Return the providers that were asked for, or all, in the environments that were asked for."""
    elsewhere = {}
    for text in pythons:
        name, separator, path = text.partition("=")
        if not separator or not path:
            raise click.BadParameter(f"{text!r} is not of the form PROVIDER=INTERPRETER.", param_hint="--python")
        elsewhere[name] = path
    for hint, asked in (("--provider", names), ("--python", tuple(elsewhere))):
        unknown = [name for name in asked if name not in PROVIDERS]
        if unknown:
            raise click.BadParameter(f"{unknown[0]!r} is not one of {', '.join(PROVIDERS)}.", param_hint=hint)
    chosen = dict.fromkeys(names or (*(provider.name for provider in default_providers(directions)), *elsewhere))
    return [dataclasses.replace(PROVIDERS[name], python=elsewhere.get(name)) for name in chosen]


@click.command("benchmark", cls=_ListCommand, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--problem",
    "problems",
    multiple=True,
    help="A named problem, a description such as 1,256,32,32,256,s=2, or 'all'. Default: all named problems.",
)
@click.option(
    "--problem-file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A JSON or TOML list of problems.",
)
@click.option(
    "--threads",
    multiple=True,
    type=click.IntRange(1),
    default=(1,),
    show_default=True,
    help="Threads of each provider; several are measured one after the other.",
)
@click.option(
    "--direction",
    type=click.Choice([*DIRECTIONS, "all"]),
    default="forward",
    show_default=True,
    help="The layers, all their gradients (with our own forward beside them), or both in turns.",
)
@click.option("--provider", "providers", multiple=True, help=f"Any of {', '.join(PROVIDERS)}. Default: all.")
@click.option(
    "--python",
    "pythons",
    multiple=True,
    metavar="PROVIDER=INTERPRETER",
    help="Run a provider in another environment, for a package that needs one; it must have NumPy.",
)
@click.option(
    "--rounds",
    type=click.IntRange(1),
    default=Protocol.rounds,
    show_default=True,
    help="Turns that each provider has.",
)
@click.option(
    "--burst",
    type=click.FloatRange(0),
    default=Protocol.burst_seconds,
    show_default=True,
    help="Seconds of a turn.",
)
@click.option("--time-budget", type=click.FloatRange(0), help="Seconds for everything; default: no limit.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the made-up tensors.")
@click.option(
    "--real-layers",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder with the tensors of the real layers, used for these instead of made-up ones.",
)
@click.option("--overhead", is_flag=True, help="Also measure call overhead and the time to the first result.")
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="Append rows to this file.")
def benchmark_command(
    problems: tuple[str, ...],
    problem_file: Path | None,
    threads: tuple[int, ...],
    direction: str,
    providers: tuple[str, ...],
    pythons: tuple[str, ...],
    rounds: int,
    burst: float,
    time_budget: float | None,
    seed: int,
    real_layers: Path | None,
    overhead: bool,
    output: Path | None,
) -> None:
    """Measure our kernels beside their peers and a plain convolution.

    Every provider runs in a process of its own; the processes take turns. Keep the machine idle meanwhile.
    """
    console, notes = Console(), Console(stderr=True)
    rows: list[Measurement] = []
    arguments: dict[str, Any] = {
        "protocol": Protocol(rounds=rounds, burst_seconds=burst),
        "time_budget": time_budget,
        "seed": seed,
        "real_layers": real_layers,
    }
    counts = list(dict.fromkeys(threads))
    directions = DIRECTIONS if direction == "all" else (direction,)
    try:
        chosen, found = _chosen(providers, pythons, directions), _problems(problems, problem_file, real_layers)
    except TvmdcnError as error:
        raise click.ClickException(str(error)) from error
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
    _warn(notes, counts)

    def keep(row: Measurement) -> None:
        rows.append(row)
        if output is not None:
            append_row(output, row)
        if not notes.is_terminal:
            result = f"{_milliseconds(row.median_ms)} ms" if row.status == "ok" else f"failed: {row.reason}"
            notes.print(f"{row.title} {row.threads} {row.provider}: {result}", markup=False, soft_wrap=True)

    interrupted = False
    with notes.status("starting") as status:

        def step(text: str) -> None:
            done = {(row.problem, row.threads) for row in rows}
            status.update(Text(f"[{len(done)} of {len(found) * len(counts)}] {text}"))

        try:
            asked = [layer if name == "forward" else layer.backward for layer in found for name in directions]
            compare(asked, counts, chosen, on_row=keep, on_step=step, **arguments)
            if overhead:
                measure_overhead(counts, on_row=keep, on_step=step)
        except KeyboardInterrupt:
            interrupted = True
    if not sys.stdout.isatty():
        console = Console(width=220)  # a file, or a log, has no width to fit
    _show(console, rows)
    skipped = len(found) * len(counts) - len({(r.problem, r.threads) for r in rows if r.measure == "call"})
    if skipped:
        why = "interrupted" if interrupted else "the time budget was spent"
        notes.print(f"{skipped} comparisons were not made: {why}.", style="yellow")
    if output is not None and rows:
        text = f"{len(rows)} rows in {output}. Next: scripts/report.py {output} --output report.html"
        notes.print(text, markup=False, soft_wrap=True)
    if interrupted:
        sys.exit(130)
    if not any(row.status == "ok" for row in rows):
        sys.exit(1)


def _warn(notes: Console, threads: Sequence[int]) -> None:
    """Say what will make the figures worthless, as far as it can be known beforehand."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if max(threads) > cores:
        notes.print(f"{max(threads)} threads on {cores} processors: expect no gain.", style="yellow")
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load > 0.3:
        notes.print(f"the machine is busy (load {load:.1f}): figures will be too high and unsteady.", style="yellow")


main = benchmark_command

if __name__ == "__main__":
    main()
