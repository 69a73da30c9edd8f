# SPDX-License-Identifier: Apache-2.0
"""The figures of a report, drawn by matplotlib as SVG that follows the page's colours.

Colours are drawn as stand-ins and replaced by CSS variables, so one figure serves a light page, a dark page
and print. Texts stay texts, and marks carry their figures as tooltips.
"""

from __future__ import annotations

import io
import re
import warnings
from typing import TYPE_CHECKING, Any

from tvmdcn.bench.comparison import Line, Section
from tvmdcn.bench.measurement import Measurement
from tvmdcn.report.data import TuningHistory

if TYPE_CHECKING:
    from markupsafe import Markup

__all__ = ["color_of", "draw_bars", "draw_tuning"]

# CSS variable by what is drawn; the page's style sheet gives each a value for light and for dark.
_OURS = {"ours-tuned": "ours", "ours-default": "ours-2", "ours-naive": "ours-3"}
_PEERS = {"onnxruntime": "peer-1", "openvino": "peer-2", "torchvision": "peer-3", "torch-grid-sample": "peer-1"}
_FLOOR = "floor"
_VARIABLES = ("ink", "faint", "grid", "bad", "ours", "ours-2", "ours-3", "peer-1", "peer-2", "peer-3", _FLOOR)
# Stand-ins no other part of a drawing uses.
_STAND_INS = {name: f"#a1b2{index:02x}" for index, name in enumerate(_VARIABLES)}


def color_of(provider: str, role: str) -> str:
    """Return the CSS variable of a provider's colour, without its dashes."""
    if role == "floor":
        return _FLOOR
    return (_OURS if role == "ours" else _PEERS).get(provider, "ours-2" if role == "ours" else "peer-3")


class _Drawing:
    """A matplotlib figure with one pair of axes, and the tooltips of its marks."""

    def __init__(self, name: str, width: float, height: float) -> None:
        import matplotlib
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure

        ink, faint, grid = (_STAND_INS[variable] for variable in ("ink", "faint", "grid"))
        self._name = name
        self._settings = matplotlib.rc_context(
            {
                "svg.fonttype": "none",
                "svg.hashsalt": name,  # ids of two figures on one page must differ
                "text.parse_math": False,  # a dollar in a problem's name is a dollar
                "font.family": "DejaVu Sans",
                "font.size": 9,
                "axes.labelcolor": faint,
                "axes.edgecolor": grid,
                "axes.spines.top": False,
                "axes.spines.right": False,
                "axes.axisbelow": True,
                "axes.grid": True,
                "axes.grid.axis": "y",
                "grid.color": grid,
                "grid.linewidth": 0.7,
                "xtick.color": grid,
                "ytick.color": grid,
                "xtick.labelcolor": ink,
                "ytick.labelcolor": faint,
                "figure.constrained_layout.use": True,
            }
        )
        self._tips: dict[str, str] = {}
        with self._settings:
            self.figure = Figure(figsize=(width / 72, height / 72))
            FigureCanvasSVG(self.figure)
            self.axes: Any = self.figure.add_subplot()
        self.axes.patch.set_visible(False)
        self.figure.patch.set_visible(False)

    def tip(self, artist: Any, text: str) -> None:
        """Give a mark a tooltip."""
        gid = f"{self._name}-{len(self._tips)}"
        artist.set_gid(gid)
        self._tips[gid] = text

    def to_svg(self, label: str) -> Markup:
        """Return the figure as an SVG element for a page; `label` says in words what it shows."""
        import matplotlib
        from markupsafe import Markup, escape

        buffer = io.StringIO()
        with (
            matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": self._name}),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")  # letters that the font lacks: the page's font has them
            nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
            self.figure.savefig(buffer, format="svg", metadata=nothing)
        svg = buffer.getvalue()
        svg = svg[svg.index("<svg") :]
        width, height = re.findall(r'(?:width|height)="([\d.]+)pt"', svg)[:2]
        opening = (
            f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}" '
            'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink">'
        )
        svg = opening + svg[svg.index(">") + 1 :]
        # A style sheet inside an SVG element holds for the whole page.
        svg = re.sub(r"\s*<(metadata|style)\b.*?</\1>", "", svg, flags=re.DOTALL)
        for gid, text in self._tips.items():
            svg = svg.replace(f'<g id="{gid}">', f'<g id="{gid}"><title>{escape(text)}</title>')
        used = set(re.findall(r"#([\w.-]+)", svg))
        svg = re.sub(r' id="([\w.-]+)"', lambda found: found[0] if found[1] in used else "", svg)
        for variable, color in _STAND_INS.items():
            svg = svg.replace(color, f"var(--{variable})")
        return Markup(svg)


def _short(name: str, limit: int = 28) -> str:
    """Return a name on one line, cut to what a label can bear, of letters that can be drawn."""
    text = "".join(letter if letter.isprintable() else "?" for letter in " ".join(name.split()))
    return text if len(text) <= limit else text[: limit - 1] + "\u2026"


def draw_bars(section: Section, name: str) -> Markup | None:
    """Draw the time of every provider per problem, in units of the plain convolution's.

    Without a plain convolution among the rows the unit is our own time. The naive schedule, far off any
    scale, is drawn only if there is nothing else of ours.

    Parameters
    ----------
    section : Section
        One machine and number of threads.
    name : str
        Unique on the page; made of letters, digits and dashes.

    Returns
    -------
    Markup or None
        An SVG element; None if there is nothing to draw.
    """
    use_floor = any(line.floor is not None for line in section.lines)
    lines = [line for line in section.lines if (line.floor if use_floor else line.ours) is not None]
    timed = {row.provider for line in lines for row in line.rows.values() if row.status == "ok"}
    shown = [
        provider
        for provider in section.providers
        if provider in timed
        and section.roles[provider] != "floor"
        and (provider != "ours-naive" or section.subject == provider)
    ]
    if not lines or not shown:
        return None

    def height(line: Line, row: Measurement) -> float:
        unit = line.floor if use_floor else line.ours
        assert unit is not None
        assert unit.median_ms is not None
        assert row.median_ms is not None
        return row.median_ms / unit.median_ms

    # A bar beyond any peer that competes would flatten all the others: it is cut, and says its height.
    contenders = [height(line, row) for line in lines for row in (line.ours, line.fastest_peer) if row is not None]
    limit = 1.18 * max([*contenders, 1.0])
    plain = "plain conv2d" if section.direction == "forward" else "plain conv2d's backward"
    drawing = _Drawing(name, max(42.0 * len(lines) + 120, 700.0), 300)
    axes = drawing.axes
    width = 0.8 / len(shown)
    for place, provider in enumerate(shown):
        color = _STAND_INS[color_of(provider, section.roles[provider])]
        label = _short(provider) + (" (ours)" if provider == section.subject else "")
        for index, line in enumerate(lines):
            row = line.rows.get(provider)
            if row is None or row.status != "ok":
                continue
            value = height(line, row)
            at = index + (place - (len(shown) - 1) / 2) * width
            (bar,) = axes.bar(at, min(value, limit), width * 0.9, color=color, label=label)
            label = "_nolegend_"
            drawing.tip(bar, f"{line.problem}, {provider}: {row.median_ms:.3g} ms, {value:.2f}x")
            if value > limit or provider == section.subject:
                text = f"{value:.0f}" if value >= 10 else f"{value:.1f}"
                axes.text(at, min(value, limit), text, ha="center", va="bottom", fontsize=7, color=_STAND_INS["ink"])
    if use_floor:
        axes.axhline(1.0, color=_STAND_INS[_FLOOR], linewidth=1.4, linestyle=(0, (4, 2)), label=plain)
    axes.set_xticks(range(len(lines)), [_short(line.problem) for line in lines], rotation=32, ha="right")
    axes.tick_params(axis="x", length=0)
    axes.set_xlim(-0.6, len(lines) - 0.4)
    axes.set_ylim(0, limit * 1.04)
    unit = f"{plain} = 1" if use_floor else f"{_short(section.subject or '')} = 1"
    axes.set_ylabel(f"time, {unit} (shorter is faster)")
    axes.legend(
        ncols=6,
        loc="lower left",
        bbox_to_anchor=(0, 1.0),
        borderaxespad=0.2,
        handlelength=1.2,
        frameon=False,
        labelcolor=_STAND_INS["ink"],
    )
    return drawing.to_svg(f"Bar chart: time per problem and provider, {unit}.")


def draw_tuning(history: TuningHistory, name: str) -> Markup | None:
    """Draw the trials of a tuning in their order, and the best so far.

    Parameters
    ----------
    history : TuningHistory
        The trials of one problem.
    name : str
        Unique on the page; made of letters, digits and dashes.

    Returns
    -------
    Markup or None
        An SVG element; None if no trial was measured.
    """
    best = history.best
    if best is None or best.time_ms is None:
        return None
    drawing = _Drawing(name, 500, 230)
    axes = drawing.axes
    # Trials far above the best say nothing but that they lost: they stand at the upper edge.
    measured = sorted(trial.time_ms for trial in history.trials if trial.time_ms is not None)
    top = max(min(measured[-1], 6 * best.time_ms), best.time_ms * 1.2) * 1.05
    floor = best.time_ms * 0.8
    dots = [(t.index, min(t.time_ms, top)) for t in history.trials if t.time_ms is not None]
    axes.scatter(*zip(*dots, strict=True), s=9, color=_STAND_INS["faint"], alpha=0.55, linewidths=0, label="trial")
    failures = [trial.index for trial in history.trials if trial.time_ms is None]
    if failures:
        axes.scatter(
            failures,
            [floor] * len(failures),
            s=14,
            marker="x",
            color=_STAND_INS["bad"],
            linewidths=1,
            label="failed",
        )
    steps = [
        (trial.index, value)
        for trial, value in zip(history.trials, history.best_so_far(), strict=True)
        if value is not None
    ]
    axes.step(
        [index for index, _ in steps],
        [min(value, top) for _, value in steps],
        where="post",
        color=_STAND_INS["ours"],
        linewidth=2,
        label="best so far",
    )
    mark = axes.scatter([best.index], [best.time_ms], s=34, color=_STAND_INS["ours"], zorder=4)
    drawing.tip(mark, f"trial {best.index}: {best.time_ms:.3g} ms")
    axes.set_ylim(floor * 0.94, top * 1.03)
    axes.set_xlabel("trial")
    axes.set_ylabel("ms per call")
    axes.legend(
        ncols=3,
        loc="lower left",
        bbox_to_anchor=(0, 1.0),
        borderaxespad=0.2,
        handlelength=1.2,
        frameon=False,
        labelcolor=_STAND_INS["ink"],
    )
    return drawing.to_svg(f"Tuning curve: best {best.time_ms:.3g} ms at trial {best.index}.")
