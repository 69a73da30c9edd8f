# SPDX-License-Identifier: Apache-2.0
"""The command ``tvmdcn report``: pages, tables and pictures of measurements, and two runs compared."""

from __future__ import annotations

import sys
from pathlib import Path

import click
from rich.console import Console

from tvmdcn.errors import TvmdcnError
from tvmdcn.extras import require
from tvmdcn.report.page import Outputs, Report, collect, update_block
from tvmdcn.report.provenance import read_sources
from tvmdcn.report.two_runs import TwoRuns

__all__ = ["main", "report_command"]

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_NEW_FILE = click.Path(dir_okay=False, path_type=Path)
_DEFAULT_PAGE = Path("report.html")


class _Incomparable(click.ClickException):
    """Two runs that cannot be compared: the exit code tells it from a run that got slower."""

    exit_code = 2


@click.command("report", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("rows", nargs=-1, type=_FILE)
@click.option(
    "--records",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Tuning records whose history is shown.",
)
@click.option(
    "--schedules",
    nargs=2,
    multiple=True,
    metavar="A B",
    help="Two schedules side by side, repeatable: each a folder with a manifest.json, "
    "PROBLEM[@TARGET][:tuned|default|naive] such as r50_c3@x86-64-v3:default, or TRIALS.jsonl#N, a trial of a "
    "tuning log.",
)
@click.option(
    "--compare",
    nargs=2,
    type=_FILE,
    metavar="A B",
    help="Two files of rows, before and after: what got faster or slower beyond noise. Exit code 0: nothing of ours is "
    "slower; 1: something is, or fails now; 2: they cannot be compared.",
)
@click.option(
    "--threshold",
    type=click.FloatRange(0, 10),
    default=0.03,
    show_default=True,
    help="With --compare: changes up to this part of the time are no findings.",
)
@click.option(
    "--level",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=0.05,
    show_default=True,
    help="With --compare: the accepted chance of any false finding.",
)
@click.option("--terminal", is_flag=True, help="Print the verdicts as tables.")
@click.option(
    "--output",
    type=_NEW_FILE,
    help=f"The page. Default: {_DEFAULT_PAGE}, or none with --terminal or --compare.",
)
@click.option("--markdown", type=_NEW_FILE, help="Write Markdown for a pull request.")
@click.option("--json", "json_file", type=_NEW_FILE, help="Write every number shown as JSON.")
@click.option(
    "--csv",
    "csv_folder",
    type=click.Path(file_okay=False, path_type=Path),
    help="Write every number shown into this folder, a file per table.",
)
@click.option("--screenshot", type=_NEW_FILE, help="Write a picture of the page's top (PNG), with Chromium.")
@click.option(
    "--update",
    type=_FILE,
    help="Replace the tables between the marks benchmark:begin and benchmark:end of this Markdown file.",
)
def report_command(
    rows: tuple[Path, ...],
    records: Path | None,
    schedules: tuple[tuple[str, str], ...],
    compare: tuple[Path, Path] | None,
    threshold: float,
    level: float,
    terminal: bool,
    output: Path | None,
    markdown: Path | None,
    json_file: Path | None,
    csv_folder: Path | None,
    screenshot: Path | None,
    update: Path | None,
) -> None:
    """Make one HTML page, Markdown and tables of measured ROWS, or compare two runs."""
    if compare is not None and (rows or records or schedules or update):
        raise click.UsageError("--compare A B takes two files and no ROWS, --records, --schedules or --update.")
    if compare is None and not (rows or records or schedules):
        raise click.UsageError("Missing argument 'ROWS...': files that scripts/benchmark.py --output wrote.")
    if output is None and (screenshot is not None or (compare is None and not terminal)):
        output = _DEFAULT_PAGE
    outputs = Outputs(output, markdown, json_file, csv_folder, screenshot)
    try:
        if outputs.wanted or update is not None:
            require("report", "a report")
        if compare is not None:
            _compare(compare, outputs, level, threshold)
            return
        made = collect(rows, records, named=schedules)
        written = outputs.write(made)
        if update is not None:
            update_block(update, made.sources.measurements)
            written.append(update)
    except (TvmdcnError, OSError) as error:
        raise click.ClickException(str(error)) from error
    _tell(made, terminal, written)


def _tell(made: Report, terminal: bool, written: list[Path]) -> None:
    """Print what was asked for, and what a reader must know."""
    if terminal:
        made.show(Console())
    else:
        for note in made.notes:
            click.echo(f"note: {note}", err=True)
    _list(written)
    if made.empty:
        raise click.ClickException(made.notes[-1] if made.notes else "there is nothing to show.")


def _compare(files: tuple[Path, Path], outputs: Outputs, level: float, threshold: float) -> None:
    require("report", "comparing two runs")
    try:
        runs = TwoRuns.of(*(read_sources([path]) for path in files), level=level, threshold=threshold)
    except (TvmdcnError, OSError) as error:
        raise _Incomparable(str(error)) from error
    runs.show(Console())
    _list(outputs.write(runs))
    sys.exit(runs.changes.exit_code)


def _list(written: list[Path]) -> None:
    for path in written:
        click.echo(f"{path} ({path.stat().st_size / 2**10:.0f} KiB)" if path.suffix == ".html" else str(path))


main = report_command

if __name__ == "__main__":
    main()
