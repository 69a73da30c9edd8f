# SPDX-License-Identifier: Apache-2.0
"""The report of two runs: the same forms as that of one, about what changed between them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property

from rich.console import Console

from tvmdcn.bench.comparison import organize
from tvmdcn.report import changes_section, provenance
from tvmdcn.report.changes import Changes, ExitCode, Kind, compare_runs
from tvmdcn.report.charts import Numbers, PageSection
from tvmdcn.report.frame import build_page
from tvmdcn.report.provenance import Sources
from tvmdcn.report.rendering import render, render_markdown
from tvmdcn.report.terminal import show_changes

__all__ = ["TwoRuns"]

_TAGLINE = "two runs compared"


@dataclass(frozen=True)
class TwoRuns:
    """Two files of rows and what changed from one to the other."""

    a: Sources
    b: Sources
    changes: Changes

    @classmethod
    def of(cls, a: Sources, b: Sources, *, level: float, threshold: float) -> TwoRuns:
        """Compare two runs; raises ChangeError if that cannot be done."""
        return cls(a, b, compare_runs(a.measurements, b.measurements, level=level, threshold=threshold))

    @cached_property
    def notes(self) -> list[str]:
        """What a reader must know before trusting it."""
        files = [*self.a.complaints, *self.b.complaints, *self.a.warnings, *self.b.warnings]
        return [*self.changes.notes, *files]

    @cached_property
    def sections(self) -> list[PageSection]:
        """The parts of the page."""
        parts = [changes_section.section(self.changes)]
        for name, sources in (("a", self.a), ("b", self.b)):
            part = provenance.section(sources, organize(sources.measurements))
            if part is not None:
                tables = [dataclasses.replace(table, name=f"{table.name}_{name}") for table in part.numbers]
                title = f"Run {name.upper()}"
                parts.append(dataclasses.replace(part, anchor=f"provenance-{name}", title=title, numbers=tables))
        return parts

    @property
    def numbers(self) -> list[Numbers]:
        """Every number shown."""
        return [table for part in self.sections for table in part.numbers]

    @property
    def about(self) -> dict[str, object]:
        """What stands above the tables in an export."""
        return {
            "title": f"tvmdcn: {_TAGLINE}",
            "verdict": self.changes.verdict,
            "basis": self.changes.basis,
            "exit_code": int(self.changes.exit_code),
            "notes": self.notes,
        }

    def _summary(self) -> dict[str, object]:
        slower, faster = self.changes.count(Kind.SLOWER, Kind.BROKEN), self.changes.count(Kind.FASTER, Kind.REPAIRED)
        return {
            "verdict": self.changes.verdict,
            "cards": [
                (slower, "slower, or failing now", "bad" if slower else "plain"),
                (faster, "faster, or working now", "" if faster else "plain"),
                (self.changes.count(Kind.SAME), "unchanged beyond noise", "plain"),
            ],
            "runs": [
                (name, f"{', '.join(map(str, sources.paths))}, measured {sources.dates}")
                for name, sources in (("A", self.a), ("B", self.b))
            ],
            "slower": self.changes.exit_code is ExitCode.SLOWER,
        }

    def to_html(self) -> str:
        """Return the page."""
        head = render("changes_cards.html.j2", **self._summary())
        return build_page(f"tvmdcn: {_TAGLINE}", head, self.sections, self.notes, tagline=_TAGLINE)

    def to_markdown(self) -> str:
        """Return the comparison as a pull request takes it."""
        parts = [(part.title, part.markdown.strip()) for part in self.sections]
        return render_markdown(
            "two_runs.md.j2", **self._summary(), notes=self.notes, parts=parts, omitted=[], tagline=_TAGLINE
        )

    def show(self, console: Console) -> None:
        """Print the findings."""
        show_changes(
            console, self.changes, [*self.a.complaints, *self.b.complaints, *self.a.warnings, *self.b.warnings]
        )
