# SPDX-License-Identifier: Apache-2.0
"""How a part of a report hands itself to the page: charts, sections, and the numbers behind them.

A chart is a Vega-Lite specification that the browser draws. It lies in the page as inert JSON beside its
caption; one script draws all charts of a page, with the library inlined once. Colours are CSS variables, so that
one chart serves a light page, a dark page and print.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tvmdcn.report.rendering import render

if TYPE_CHECKING:
    from markupsafe import Markup

__all__ = ["COLORS", "Numbers", "PageSection", "Scalar", "chart", "color_of"]

Scalar = str | int | float | bool | None

# What may be used wherever a specification takes a colour, except in ramps, which are computed from numbers.
COLORS = {
    name: f"var(--{name})"
    for name in (
        *("ink", "faint", "grid", "card", "good", "bad", "tint"),
        *("ours", "ours-2", "ours-3", "peer-1", "peer-2", "peer-3", "floor"),
    )
}
# Control characters and halves of pairs.
_UNDRAWN = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_OURS = {"ours-tuned": "ours", "ours-default": "ours-2", "ours-naive": "ours-3"}
_PEERS = {"onnxruntime": "peer-1", "openvino": "peer-2", "torchvision": "peer-3", "torch-grid-sample": "peer-1"}


def color_of(provider: str, role: str) -> str:
    """Return the name in :data:`COLORS` of a provider's colour."""
    if role == "floor":
        return "floor"
    return (_OURS if role == "ours" else _PEERS).get(provider, "ours-2" if role == "ours" else "peer-3")


@dataclass(frozen=True)
class Numbers:
    """A table of figures that a section shows, for the exports as JSON and CSV.

    Parameters
    ----------
    name : str
        Lower-case letters, digits and underscores; unique within the report. It becomes a file's name.
    columns : sequence of str
        Names with the unit at the end, such as ``median_ms``.
    rows : sequence of sequence
        One value per column: text, number, bool or None. Numbers are unrounded.

    Raises
    ------
    ValueError
        If a row has not as many values as there are columns.
    """

    name: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Scalar]]

    def __post_init__(self) -> None:
        """Check the shape."""
        for number, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise ValueError(
                    f"row {number} of the numbers {self.name} has {len(row)} values, not {len(self.columns)}."
                )

    def records(self) -> list[dict[str, Scalar]]:
        """Return the rows as dicts."""
        return [dict(zip(self.columns, row, strict=True)) for row in self.rows]


@dataclass(frozen=True)
class PageSection:
    """One part of a report, in all the forms a report takes.

    Parameters
    ----------
    anchor : str
        Its id on the page: lower-case letters, digits and dashes. The ids within `html` begin with it.
    title : str
        The heading; the page writes it, `html` and `markdown` do not.
    html : Markup
        The content. No script elements: they would not run (the page's policy admits only its own).
    markdown : str
        The same for a pull request: tables and sentences, no figures; empty to be left out there.
    numbers : sequence of Numbers
        Every figure shown.
    notes : sequence of str
        What a reader must know before trusting it; the page shows them at its top.
    script, style : str
        JavaScript and CSS that the section needs, of which the page includes equal ones once.
    """

    anchor: str
    title: str
    html: Markup
    markdown: str = ""
    numbers: Sequence[Numbers] = field(default=())
    notes: Sequence[str] = field(default=())
    script: str = ""
    style: str = ""


def chart(spec: Any, *, says: str, read: str, title: str = "", wide: bool = True) -> Markup:
    """Return a figure: the chart, what it says and how to read it, and its numbers on request.

    Parameters
    ----------
    spec : altair.Chart or Mapping
        A chart of Altair, or a Vega-Lite specification. Its data are inline (``alt.InlineData(values=[...])``),
        their field names fixed words of ours: names from outside are values, never fields, titles of scales or
        parts of expressions. Colours are those of :data:`COLORS`. ``width="container"`` fills the page.
        No ``config``: the page has one for all charts.
    says : str
        What this figure says, of these data, in one sentence.
    read : str
        How to read it: axes, marks, what a hover or a click does.
    title : str
        A heading, where a section has more than one figure.
    wide : bool
        Whether it takes the whole width; otherwise several stand side by side inside a ``div class="charts"``.

    Returns
    -------
    Markup
        A ``figure`` element.
    """
    data = dict(spec) if isinstance(spec, Mapping) else spec.to_dict()
    # The page has one configuration, and one copy of the library that reads whatever it knows.
    for key in ("$schema", "config"):
        data.pop(key, None)
    return render("chart.html.j2", spec=_plain(data), says=says, read=read, title=title, wide=wide)


def _plain(value: Any) -> Any:
    """Return a specification with texts that can be drawn and numbers of six digits.

    Vega-Lite makes expressions of values that are sorted by, and Vega's parser of these stops at separators of lines
    that JSON allows. More digits cannot be seen, and a page holds many.
    """
    if isinstance(value, str):
        return _UNDRAWN.sub("\ufffd", " ".join(value.splitlines()))
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value
