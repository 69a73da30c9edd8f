# SPDX-License-Identifier: Apache-2.0
"""Two schedules side by side: decisions, trace, scheduled program, generated code and what it uses."""

from __future__ import annotations

import base64
import json
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

from tvmdcn.report.charts import Numbers, PageSection
from tvmdcn.report.rendering import plural, render, render_markdown
from tvmdcn.report.schedule_sources import SchedulePair, ScheduleView, cached_pairs, named_pair
from tvmdcn.report.side_by_side import Difference, compare_texts

__all__ = ["SchedulePair", "ScheduleView", "cached_pairs", "named_pair", "section"]

# What means nothing: registers' numbers, distances in memory; numbered names of a trace and of TIR.
_REGISTERS = re.compile(
    r"(?<=%[xyz]mm)\d+|\(%[^)]*\)|%[re]?\w+|\b[rpvqdswxf]d?\d+\b|-?\b\d+(?=\()|(?<=#)-?\d+|0x[0-9a-f]+"
)
_NUMBERED = re.compile(r"\b(ax|l|b|v|u_?|sch_)\d+(?:_\d+)*\b")


def _sense_of_code(line: str) -> str:
    return _REGISTERS.sub("", line).strip()


def _sense_of_program(line: str) -> str:
    return _NUMBERED.sub(r"\1", line).strip()


# The texts in the order in which they are shown: heading, language, and what a line says.
_TEXTS: Mapping[str, tuple[str, str, Callable[[str], str]]] = {
    "inner loops": ("Inner loops", "gas", _sense_of_code),
    "CUDA source": ("CUDA source", "cuda", str.strip),
    "SASS": ("SASS", "text", _sense_of_code),
    "PTX": ("PTX", "ptx", _sense_of_code),
    "TIR": ("Scheduled TIR", "python", _sense_of_program),
    "trace": ("Trace", "python", _sense_of_program),
}
_MOST_BYTES = 700_000  # of the texts, as they lie in the page; beyond, pairs have their tables only


@dataclass
class _Text:
    """One kind of text of a pair."""

    anchor: str
    heading: str
    says: str


@dataclass
class _Shown:
    """A pair as the templates show it."""

    anchor: str
    pair: SchedulePair
    tables: Sequence[tuple[str, Sequence[tuple[str, Any, Any]]]]
    notes: Sequence[tuple[str, str]]
    texts: list[_Text] = field(default_factory=list)
    left_out: bool = False


def section(pairs: Sequence[SchedulePair]) -> PageSection | None:
    """Return pairs of schedules side by side.

    Parameters
    ----------
    pairs : sequence of SchedulePair
        From :func:`cached_pairs` or :func:`named_pair`.

    Returns
    -------
    PageSection or None
        None if there is no pair.
    """
    if not pairs:
        return None
    shown: list[_Shown] = []
    packed: dict[str, str] = {}
    for number, pair in enumerate(pairs):
        found = _Shown(f"schedules-{number}", pair, _tables(pair), _notes(pair))
        shown.append(found)
        for place, (name, (heading, language, sense)) in enumerate(_TEXTS.items()):
            left, right = (view.texts.get(name, "") for view in (pair.left, pair.right))
            if not left and not right:
                continue
            if sum(map(len, packed.values())) > _MOST_BYTES:
                found.left_out = True
                break
            difference = compare_texts(left, right, language, sense)
            anchor = f"{found.anchor}-{place}"
            packed[anchor] = base64.b64encode(zlib.compress(difference.html.encode(), 9)).decode()
            found.texts.append(_Text(anchor, heading, _says(difference)))
    content = {"shown": shown, "packed": packed}
    return PageSection(
        anchor="schedules",
        title="Schedules side by side",
        html=render("schedules.html.j2", **content),
        markdown=render_markdown("schedules.md.j2", **content),
        numbers=[_numbers(shown)],
        script=_template("schedules.js"),
        style=_template("schedules.css"),
    )


def _template(name: str) -> str:
    return files("tvmdcn.report").joinpath("templates", name).read_text(encoding="utf-8")


def _tables(pair: SchedulePair) -> list[tuple[str, list[tuple[str, Any, Any]]]]:
    """Return what both sides say, as (heading, rows of name, left, right); absent is None."""
    views = (pair.left, pair.right)
    tables = []
    for heading, name in (("What it is", "facts"), ("Decisions", "decisions"), ("Resources", "resources")):
        left, right = (getattr(view, name) for view in views)
        rows = _merged(left, right)
        if rows:
            tables.append((heading, rows))
    return tables


def _merged(left: Mapping[str, Any], right: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    return [(name, left.get(name), right.get(name)) for name in dict.fromkeys((*left, *right))]


def _notes(pair: SchedulePair) -> list[tuple[str, str]]:
    return [(view.title, note) for view in (pair.left, pair.right) for note in view.notes]


def _says(difference: Difference) -> str:
    left, right = difference.lines
    lines = f"{plural(left, 'line')} and {right:,}"
    if difference.left_out:
        lines += f", {difference.left_out:,} of them left out"
    if not left or not right:
        return f"{lines}: only one side has it"
    return f"{lines}: alike" if not difference.changed else f"{lines}; {difference.changed:,} of both differ"


def _numbers(shown: Sequence[_Shown]) -> Numbers:
    rows: list[list[Any]] = []
    for found in shown:
        pair = found.pair
        for heading, table in found.tables:
            rows += [
                [pair.title, pair.left.title, pair.right.title, heading, name, *(_scalar(v) for v in values)]
                for name, *values in table
            ]
    return Numbers("schedules", ("pair", "left", "right", "table", "name", "left_value", "right_value"), rows)


def _scalar(value: Any) -> str | int | float | None:
    return value if value is None or isinstance(value, (str, int, float)) else json.dumps(value)
