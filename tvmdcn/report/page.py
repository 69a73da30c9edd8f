# SPDX-License-Identifier: Apache-2.0
"""Rows, records and artifacts to one report: a self-contained HTML page, Markdown, JSON and CSV.

A report quotes measured rows only: no record of a tuning run ends up in a ratio, and rows of different
machines are never set beside each other.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Protocol

from rich.console import Console

from tvmdcn.bench.comparison import Section, organize
from tvmdcn.bench.measurement import Measurement, MeasurementError
from tvmdcn.extras import require
from tvmdcn.files import write_whole
from tvmdcn.report import provenance, roofline, schedules, search, stages, verdict
from tvmdcn.report.charts import Numbers, PageSection
from tvmdcn.report.data import TuningHistory
from tvmdcn.report.exports import write_csv, write_json
from tvmdcn.report.frame import build_page
from tvmdcn.report.places import describe_machine
from tvmdcn.report.provenance import Sources, read_sources
from tvmdcn.report.rendering import render, render_markdown
from tvmdcn.report.schedules import SchedulePair
from tvmdcn.report.screenshot import take_screenshot
from tvmdcn.report.terminal import show_report
from tvmdcn.tuning.history import histories as recorded_histories

__all__ = ["Outputs", "Report", "benchmark_block", "collect", "report", "update_block"]

_TAGLINE = "deformable convolution, measured"
# What GitHub takes as one comment, less what a writer may add around it.
_COMMENT_LIMIT = 60_000


class _Written(Protocol):
    """A report in all its forms: of one run, or of two."""

    def to_html(self) -> str: ...

    def to_markdown(self) -> str: ...

    @property
    def about(self) -> dict[str, object]: ...

    @property
    def numbers(self) -> list[Numbers]: ...


@dataclass(frozen=True)
class Outputs:
    """The files to write; None for those that are not wanted. `csv` is a folder, `picture` is taken of `html`."""

    html: Path | None = None
    markdown: Path | None = None
    json: Path | None = None
    csv: Path | None = None
    picture: Path | None = None

    @property
    def wanted(self) -> bool:
        """Whether anything is to be written."""
        return any((self.html, self.markdown, self.json, self.csv, self.picture))

    def write(self, made: _Written) -> list[Path]:
        """Write a report in each form that is wanted, and return the files.

        Raises
        ------
        ScreenshotError
            If a picture is wanted and cannot be taken.
        OSError
            If a file cannot be written.
        """
        written = []
        for path, make in ((self.html, made.to_html), (self.markdown, made.to_markdown)):
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_whole(path, make())
                written.append(path)
        if self.json is not None:
            write_json(self.json, made.about, made.numbers)
            written.append(self.json)
        if self.csv is not None:
            written += write_csv(self.csv, made.numbers)
        if self.picture is not None and self.html is not None:
            take_screenshot(self.html, self.picture)
            written.append(self.picture)
        return written


@dataclass(frozen=True)
class Report:
    """What a report shows, worked out once for all forms that it takes.

    Parameters
    ----------
    sources : Sources
        The rows.
    histories : sequence of TuningHistory
        Tuning runs.
    pairs : sequence of SchedulePair
        Schedules, side by side.
    """

    sources: Sources
    histories: Sequence[TuningHistory] = field(default=())
    pairs: Sequence[SchedulePair] = field(default=())

    @cached_property
    def comparisons(self) -> list[Section]:
        """The rows beside each other, by place."""
        return organize(self.sources.measurements)

    @cached_property
    def sections(self) -> list[PageSection]:
        """The parts of the page, in their order."""
        made = [
            verdict.section(self.comparisons),
            roofline.section(self.comparisons, self.sources.roofs),
            stages.section(self.sources.others),
            search.section(self.histories),
            schedules.section(self.pairs),
            provenance.section(self.sources, self.comparisons),
        ]
        return [part for part in made if part is not None]

    @cached_property
    def notes(self) -> list[str]:
        """What a reader must know before trusting it."""
        return provenance.notes(self.sources, self.comparisons)

    @property
    def numbers(self) -> list[Numbers]:
        """Every number shown."""
        return [table for part in self.sections for table in part.numbers]

    @property
    def about(self) -> dict[str, object]:
        """What stands above the tables in an export."""
        return {"title": f"tvmdcn: {_TAGLINE}", "measured": self.sources.dates, "notes": self.notes}

    @property
    def empty(self) -> bool:
        """Whether there is nothing to show."""
        return not (self.sources.rows or self.sources.others or self.histories or self.pairs)

    def show(self, console: Console) -> None:
        """Print the verdicts."""
        show_report(console, self.comparisons, self.sources.roofs, self.notes)

    def summary(self) -> dict[str, object]:
        """Return what the templates of a report's head show."""
        first = self.comparisons[0] if self.comparisons else None
        return {
            "places": verdict.places(self.comparisons),
            "machine": None if first is None else describe_machine(first.machine),
            "versions": {} if first is None else first.versions,
            "dates": self.sources.dates,
            "covers": verdict.covers,
        }

    def to_html(self) -> str:
        """Return the page."""
        head = render("cards.html.j2", **self.summary())
        return build_page(f"tvmdcn: {_TAGLINE}", head, self.sections, self.notes, tagline=_TAGLINE)

    def to_markdown(self) -> str:
        """Return the report as a pull request takes it: the verdict, and the tables folded away.

        What does not fit into a comment on GitHub is left out from the end, and named.
        """
        parts = [(part.title, part.markdown.strip()) for part in self.sections if part.markdown.strip()]
        omitted: list[str] = []
        while True:
            text = render_markdown(
                "report.md.j2", **self.summary(), notes=self.notes, parts=parts, omitted=omitted, tagline=_TAGLINE
            )
            if len(text) <= _COMMENT_LIMIT or len(parts) <= 1:
                return text
            longest = max(parts[1:], key=lambda part: len(part[1]))
            parts.remove(longest)
            omitted.append(longest[0])


def benchmark_block(rows: Sequence[Measurement]) -> str:
    """Return the verdicts and the tables of rows in Markdown, for a page that has its own frame."""
    require("report", "a report")
    made = Report(Sources([], rows, [], [], [], []))
    tables = verdict.section(made.comparisons, full=False)
    summary = render_markdown("verdicts.md.j2", **made.summary())
    return f"{summary.strip()}\n\n\n{'' if tables is None else tables.markdown.strip()}\n"


def update_block(page: str | Path, rows: Sequence[Measurement]) -> None:
    """Replace what stands in a page between the two marks of a benchmark.

    Raises
    ------
    MeasurementError
        If the page has not the two marks, or there are no rows.
    OSError
        If the page cannot be read or written.
    """
    text = Path(page).read_text(encoding="utf-8")
    begin, end = (re.search(rf"^<!-- benchmark:{mark}\b.*-->$", text, re.MULTILINE) for mark in ("begin", "end"))
    if begin is None or end is None or end.start() < begin.end():
        raise MeasurementError(
            f"{page} has no place for a benchmark: a line <!-- benchmark:begin --> and below it <!-- benchmark:end -->."
        )
    if not rows:
        raise MeasurementError(f"there are no rows for {page}.")
    write_whole(page, f"{text[: begin.end()]}\n{benchmark_block(rows)}{text[end.start() :]}")


def collect(
    rows_files: Iterable[str | Path],
    records_dir: str | Path | None = None,
    *,
    histories: Sequence[TuningHistory] = (),
    pairs: Sequence[SchedulePair] | None = None,
    named: Sequence[tuple[str, str]] = (),
) -> Report:
    """Read what a report shows.

    Parameters
    ----------
    rows_files : iterable of str or Path
        Files of rows (JSON lines), as ``scripts/benchmark.py`` writes them. Broken lines become notes.
    records_dir : str or Path, optional
        Tuning records, whose histories are shown beside `histories`.
    histories : sequence of TuningHistory
        Tuning runs to show.
    pairs : sequence of SchedulePair, optional
        Schedules to show side by side; by default those of the rows' layers that are in the cache
        (:func:`tvmdcn.report.schedules.cached_pairs`).
    named : sequence of (str, str)
        Schedules to show side by side instead, by name (:func:`tvmdcn.report.schedules.named_pair`).

    Raises
    ------
    TvmdcnError
        If a tuning history cannot be read, or the name of a schedule is not understood.
    OSError
        If a file cannot be read.
    """
    sources = read_sources([Path(path) for path in rows_files])
    if records_dir is not None:
        histories = [*histories, *recorded_histories(Path(records_dir))]
    if named:
        pairs = [schedules.named_pair(a, b, None if records_dir is None else Path(records_dir)) for a, b in named]
    elif pairs is None:
        pairs = schedules.cached_pairs(sources.measurements)
    return Report(sources, list(histories), list(pairs))


def report(
    rows_files: Iterable[str | Path],
    records_dir: str | Path | None,
    output_html: str | Path,
    output_markdown: str | Path | None = None,
    *,
    histories: Sequence[TuningHistory] = (),
    pairs: Sequence[SchedulePair] | None = None,
) -> list[str]:
    """Write a report as a page, and as Markdown if asked; the arguments are those of :func:`collect`.

    Returns
    -------
    list of str
        What a reader must know before trusting it: broken lines, no rows at all, rows of other versions, noise. It
        is in the report too.
    """
    require("report", "a report")
    made = collect(rows_files, records_dir, histories=histories, pairs=pairs)
    Outputs(Path(output_html), None if output_markdown is None else Path(output_markdown)).write(made)
    return made.notes
