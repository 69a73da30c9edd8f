# SPDX-License-Identifier: Apache-2.0
"""Compare our kernels with the peers: the command, with its options and its progress.

The protocol of measurement is in :mod:`tvmdcn.bench.protocol`, the providers in :mod:`tvmdcn.bench.providers`, what is
printed in :mod:`tvmdcn.bench.tables`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import click
from rich.console import Console
from rich.text import Text

from tvmdcn.bench.measurement import CACHES, DIRECTIONS, Measurement
from tvmdcn.bench.options import AnyType, ListCommand, Listed, Size, option
from tvmdcn.bench.overhead import measure_overhead
from tvmdcn.bench.protocol import compare, new_run
from tvmdcn.bench.provider import Provider
from tvmdcn.bench.providers import PROVIDERS, default_providers
from tvmdcn.bench.providers_cuda import GPU_PROVIDERS
from tvmdcn.bench.roof import Roof
from tvmdcn.bench.roofs import DTYPES, measure_roofs
from tvmdcn.bench.rows import RowFile, append_row, read_row_file
from tvmdcn.bench.schema import require_validator
from tvmdcn.bench.sweep import axes_of, vary
from tvmdcn.bench.tables import milliseconds, print_rows
from tvmdcn.bench.turns import Protocol
from tvmdcn.errors import TvmdcnError
from tvmdcn.problems import PROBLEMS, REAL_LAYERS, Problem, load_problem_file, parse_problem

__all__ = ["benchmark_command", "main"]

_WHAT, _WHO, _HOW, _ROWS = "What is measured", "By whom", "How it is measured", "Rows"


def _problems(names: Sequence[str], file: Path | None, real_layers: Path | None) -> list[Problem]:
    problems: list[Problem] = []
    if file is not None:
        problems += load_problem_file(file)
    chosen = names or (() if problems else tuple(REAL_LAYERS) if real_layers else ("all",))
    for name in chosen:
        if name == "none":
            continue
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
    known = {**PROVIDERS, **GPU_PROVIDERS}
    for hint, asked in (("--provider", names), ("--python", tuple(elsewhere))):
        unknown = [name for name in asked if name not in known]
        if unknown:
            raise click.BadParameter(f"{unknown[0]!r} is not one of {', '.join(known)}.", param_hint=hint)
    chosen = dict.fromkeys(names or (*(provider.name for provider in default_providers(directions)), *elsewhere))
    return [dataclasses.replace(known[name], python=elsewhere.get(name)) for name in chosen]


def _several(of: AnyType, metavar: str | None = None) -> dict[str, Any]:
    """Return what makes an option take several values."""
    return {"multiple": True, "type": Listed(of, metavar), "callback": Listed.flat}


@click.command("benchmark", cls=ListCommand, context_settings={"help_option_names": ["-h", "--help"]})
@option(
    _WHAT,
    "--problem",
    "problems",
    multiple=True,
    help="A named problem, a description such as 1,256,32,32,256,s=2, 'all', or 'none'. Default: all named problems.",
)
@option(
    _WHAT,
    "--problem-file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A JSON or TOML list of problems.",
)
@option(
    _WHAT,
    "--direction",
    type=click.Choice([*DIRECTIONS, "all"]),
    default="forward",
    show_default=True,
    help="The layers, all their gradients (with our own forward beside them), or both in turns.",
)
@option(
    _WHAT, "--dtype", "dtypes", **_several(click.Choice(DTYPES)), help="The problems in these instead of their own."
)
@option(
    _WHAT,
    "--layout",
    "layouts",
    **_several(click.Choice(["NCHW", "NHWC"])),
    help="The problems in these instead of their own.",
)
@option(
    _WHAT,
    "--batch",
    "batches",
    **_several(click.IntRange(1), "N"),
    help="A sweep: the problems with these numbers of images.",
)
@option(
    _WHAT,
    "--image-sizes",
    **_several(Size(), "SIZE"),
    help="A sweep: the problems with these heights and widths, such as 32,64 or 48x64. One kernel serves all.",
)
@option(_WHAT, "--overhead", is_flag=True, help="Also call overhead, and the time to the first result.")
@option(_WHAT, "--roofs", is_flag=True, help="Also how fast this machine copies memory and multiplies matrices.")
@option(
    _WHAT,
    "--real-layers",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder with the tensors of the real layers, used for these instead of made-up ones.",
)
@option(_WHAT, "--seed", type=int, default=0, show_default=True, help="Of the made-up tensors.")
@option(
    _WHO,
    "--provider",
    "providers",
    multiple=True,
    help=f"Any of {', '.join((*PROVIDERS, *GPU_PROVIDERS))}. Default: all but those of GPUs.",
)
@option(
    _WHO,
    "--python",
    "pythons",
    multiple=True,
    metavar="PROVIDER=INTERPRETER",
    help="Run a provider in another environment, for a package that needs one; it must have NumPy.",
)
@option(
    _HOW,
    "--threads",
    **_several(click.IntRange(1), "N"),
    default=("1",),
    show_default=True,
    help="Threads of each provider, each held to a processor; several are measured one after the other.",
)
@option(
    _HOW,
    "--cache",
    type=click.Choice([*CACHES, "both"]),
    default="warm",
    show_default=True,
    help="Whether calls follow each other, or find the caches filled with something else.",
)
@option(
    _HOW,
    "--rounds",
    type=click.IntRange(1),
    default=Protocol.rounds,
    show_default=True,
    help="Turns that each provider has.",
)
@option(
    _HOW,
    "--burst",
    type=click.FloatRange(0),
    default=Protocol.burst_seconds,
    show_default=True,
    help="Seconds of a turn.",
)
@option(_HOW, "--time-budget", type=click.FloatRange(0), help="Seconds for all layers; default: no limit.")
@option(
    _ROWS,
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Append rows to this file, each as soon as it is known.",
)
@option(
    _ROWS,
    "--resume",
    is_flag=True,
    help="Measure only what the file lacks: comparisons of this machine and these versions that it holds are kept.",
)
def benchmark_command(
    problems: tuple[str, ...],
    problem_file: Path | None,
    direction: str,
    dtypes: tuple[str, ...],
    layouts: tuple[str, ...],
    batches: tuple[int, ...],
    image_sizes: tuple[tuple[int, int], ...],
    overhead: bool,
    roofs: bool,
    real_layers: Path | None,
    seed: int,
    providers: tuple[str, ...],
    pythons: tuple[str, ...],
    threads: tuple[int, ...],
    cache: str,
    rounds: int,
    burst: float,
    time_budget: float | None,
    output: Path | None,
    resume: bool,
) -> None:
    """Measure our kernels beside their peers and a plain convolution.

    Every provider runs in a process of its own, on the same processors; the processes take turns. Keep the machine
    idle meanwhile. Ctrl-C keeps what was measured.
    """
    notes = Console(stderr=True)
    directions = DIRECTIONS if direction == "all" else (direction,)
    if resume and output is None:
        raise click.UsageError("--resume needs --output: the file that holds what was measured.")
    try:
        chosen = _chosen(providers, pythons, directions)
        found = vary(_problems(problems, problem_file, real_layers), dtypes, layouts, batches, image_sizes)
        before = None if output is None else _open(output, resume, notes)
    except TvmdcnError as error:
        raise click.ClickException(str(error)) from error
    if not found and not (overhead or roofs):
        raise click.UsageError("there is nothing to measure: --problem none goes with --roofs or --overhead.")
    _warn(notes, threads)
    session = _Session(output, len(found) * len(threads), notes)
    protocol = Protocol(rounds=rounds, burst_seconds=burst)
    common: dict[str, Any] = {"protocol": protocol, "run": new_run(), "on_step": session.step}
    known: Sequence[Measurement] = before.measurements if before is not None and resume else ()
    layers = {**common, "known": known, "on_row": session.keep, "on_known": session.take_over}
    code = 0
    try:
        with notes.status("starting") as session.status, _termination():
            if found:
                asked = [layer if name == "forward" else layer.backward for layer in found for name in directions]
                options: dict[str, Any] = {"time_budget": time_budget, "seed": seed, "real_layers": real_layers}
                options["caches"] = CACHES if cache == "both" else (cache,)
                compare(asked, threads, chosen, sweep=axes_of(batches, image_sizes), **options, **layers)
            if overhead:
                measure_overhead(threads, **layers)
            if roofs:
                asked_kinds = ("tf32" if problem.spec.tf32 else problem.spec.dtype for problem in found)
                kinds = dtypes or tuple(dict.fromkeys(asked_kinds)) or DTYPES[:1]
                old: Sequence[Roof] = before.roofs if before is not None and resume else ()
                for device in dict.fromkeys(provider.device for provider in chosen):
                    measure_roofs(
                        threads,
                        kinds,
                        device=device,
                        known=old,
                        on_row=session.keep,
                        on_known=session.take_over,
                        **common,
                    )
    except KeyboardInterrupt as interrupt:
        code = interrupt.code if isinstance(interrupt, _Termination) else 130
    # A file, or a log, has no width to fit.
    print_rows(Console() if sys.stdout.isatty() else Console(width=220), session.rows, session.roofs)
    session.close("interrupted" if code else "the time budget was spent")
    if code:
        sys.exit(code)
    if not any(row.status == "ok" for row in (*session.rows, *session.roofs)):
        sys.exit(1)


class _Session:
    """What a run of the command has measured so far: kept, written, and told."""

    def __init__(self, output: Path | None, comparisons: int, notes: Console) -> None:
        self.rows: list[Measurement] = []
        self.roofs: list[Roof] = []
        self.status: Any = None
        self._output, self._comparisons, self._notes, self._taken = output, comparisons, notes, 0

    def keep(self, row: Measurement | Roof) -> None:
        """Write a row, then keep it and tell of it."""
        if self._output is not None:
            append_row(self._output, row)
        self._add(row)
        if not self._notes.is_terminal:
            what = f"{row.title} {row.threads} {row.provider}"
            what += " cold" if isinstance(row, Measurement) and row.cache == "cold" else ""
            result = f"{milliseconds(row.median_ms)} ms" if row.status == "ok" else f"failed: {row.reason}"
            result += f" (unsteady: {row.noise})" if row.noise else ""
            self._notes.print(f"{what}: {result}", markup=False, soft_wrap=True)

    def take_over(self, row: Measurement | Roof) -> None:
        """Keep a row that the file holds."""
        self._taken += 1
        self._add(row)

    def _add(self, row: Measurement | Roof) -> None:
        if isinstance(row, Measurement):
            self.rows.append(row)
        else:
            self.roofs.append(row)

    def step(self, text: str) -> None:
        """Tell what begins."""
        if self.status is not None:
            self.status.update(Text(f"[{self._done()} of {self._comparisons}] {text}"))

    def _done(self) -> int:
        return len({(r.problem, r.layer, r.extents, r.threads) for r in self.rows if r.measure == "call"})

    def close(self, why: str) -> None:
        """Tell what is missing, and what to do next."""
        skipped = self._comparisons - self._done()
        if skipped:
            step = "" if self._output is None else " The same command with --resume goes on."
            self._notes.print(f"{skipped} comparisons were not made: {why}.{step}", style="yellow")
        if self._taken:
            self._notes.print(f"{self._taken} rows were measured before, and were taken from {self._output}.")
        count = len(self.rows) + len(self.roofs) - self._taken
        if self._output is not None and (count or self._taken):
            text = f"{count} rows in {self._output}. Next: scripts/report.py {self._output} --output report.html"
            self._notes.print(text, markup=False, soft_wrap=True)


def _open(output: Path, resume: bool, notes: Console) -> RowFile | None:
    """Read what the file holds, before anything is measured for it."""
    require_validator()
    output.parent.mkdir(parents=True, exist_ok=True)
    if not output.exists():
        with open(output, "ab"):
            pass
        return None
    found = read_row_file(output)
    for complaint in found.complaints:
        notes.print(complaint, markup=False, soft_wrap=True, style="yellow")
    if found.entries and not resume:
        text = f"{output} holds {len(found.entries)} rows; new ones are appended, and the later of two alike counts."
        notes.print(f"{text} --resume measures only what is missing.", markup=False, soft_wrap=True)
    return found


class _Termination(KeyboardInterrupt):
    """The process was asked to end; as an interrupt, but with an exit status of its own."""

    code = 128 + signal.SIGTERM


@contextlib.contextmanager
def _termination() -> Iterator[None]:
    """Let a request to end keep what was measured, as Ctrl-C does."""

    def stop(number: int, frame: object) -> NoReturn:
        raise _Termination

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


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
