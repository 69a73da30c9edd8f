# SPDX-License-Identifier: Apache-2.0
"""Templates, and how figures are written in them."""

from __future__ import annotations

import functools
import re
from typing import TYPE_CHECKING, Any

from tvmdcn.bench.comparison import GeometricMean

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

__all__ = ["escape_markdown", "fence", "milliseconds", "plural", "ratio", "render", "render_markdown", "significant"]

ABSENT = "\u2013"


def plural(count: int, noun: str) -> str:
    """Return a count and its noun, which takes an s."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def milliseconds(value: float | None) -> str:
    """Write a time with three significant digits, or more where they stand before the point."""
    if value is None:
        return ABSENT
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 0.1 else f"{value:.4f}"


def ratio(value: GeometricMean | float | None) -> str:
    """Write a ratio, or a mean of ratios."""
    if value is None:
        return ABSENT
    number = value.value if isinstance(value, GeometricMean) else value
    return f"{number:.2f}\u00d7"


def significant(value: float | None, digits: int = 3) -> str:
    """Write a number with so many significant digits and no exponent, unless it is very small or large."""
    return ABSENT if value is None else f"{value:,.{digits}g}" if abs(value) < 1e4 else f"{value:,.0f}"


def escape_markdown(value: object) -> str:
    """Escape a text for a cell of a Markdown table: nothing in it is markup, and it stays on its line."""
    text = " ".join(str(value).split())
    for plain, entity in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;")):
        text = text.replace(plain, entity)
    # An underscore within a word is none of Markdown's, and names are full of them.
    return re.sub(r"([\\`*\[\]|~]|(?<!\w)_|_(?!\w))", r"\\\1", text)


def fence(text: str) -> str:
    """Return a fence that is longer than any within the text."""
    return "`" * max(3, *(len(run) + 1 for run in re.findall("`+", text)), 3)


@functools.cache
def _environment(html: bool) -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("tvmdcn.report", "templates"),
        autoescape=html,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        ms=milliseconds,
        ratio=ratio,
        sig=significant,
        md=escape_markdown,
        fence=fence,
        plural=plural,
    )
    return environment


def render(template: str, **context: Any) -> Markup:
    """Fill a template of HTML; whatever is not Markup already is escaped, ``|tojson`` is safe inside a script."""
    from markupsafe import Markup

    return Markup(_environment(True).get_template(template).render(context))


def render_markdown(template: str, **context: Any) -> str:
    """Fill a template of Markdown; texts from outside go through the filters ``md`` and, as code, ``fence``."""
    return _environment(False).get_template(template).render(context)
