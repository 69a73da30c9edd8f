# SPDX-License-Identifier: Apache-2.0
"""The page around the sections: one HTML file that needs no network and runs no script but its own."""

from __future__ import annotations

import base64
import functools
import hashlib
from collections.abc import Sequence
from importlib.resources import files
from typing import TYPE_CHECKING

from tvmdcn.report.charts import PageSection
from tvmdcn.report.rendering import render

if TYPE_CHECKING:
    from markupsafe import Markup

__all__ = ["build_page"]

# Every chart is a figure with this class, see templates/chart.html.j2.
_CHART = '<figure class="chart'


@functools.cache
def _library() -> str:
    """Return Vega, Vega-Lite and Vega-Embed as one script that sets ``window.vegaEmbed``."""
    import vl_convert

    bundle = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    # It was written as a module: strict, and with names of its own.
    return f'(() => {{"use strict";\n{bundle}\n}})();'


@functools.cache
def _own_script() -> str:
    return files("tvmdcn.report").joinpath("templates", "charts.js").read_text(encoding="utf-8")


def _wrapped(script: str) -> str:
    return f'(() => {{"use strict";\n{script}\n}})();'


def build_page(
    title: str,
    header: Markup,
    sections: Sequence[PageSection],
    notes: Sequence[str] = (),
    *,
    tagline: str = "",
) -> str:
    """Return a page.

    Parameters
    ----------
    title, tagline : str
        What it is.
    header : Markup
        What a reader sees first.
    sections : sequence of PageSection
        The rest, in order.
    notes : sequence of str
        What a reader must know before trusting it; those of the sections are added.

    Returns
    -------
    str
        HTML. The same content gives the same page.

    Notes
    -----
    The page's policy (CSP) admits nothing from a network and only scripts with the digests it names, so that not even
    a name that broke out of its place could run.
    """
    from markupsafe import Markup

    content = [header, *(section.html for section in sections)]
    scripts = [_library(), _wrapped(_own_script())] if any(_CHART in html for html in content) else []
    own = dict.fromkeys(section.script for section in sections if section.script)
    scripts += [_wrapped(script) for script in own]
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    return str(
        render(
            "page.html.j2",
            title=title,
            tagline=tagline,
            header=header,
            sections=sections,
            notes=[*notes, *(note for section in sections for note in section.notes)],
            styles=[Markup(style) for style in dict.fromkeys(section.style for section in sections if section.style)],
            scripts=[Markup(script) for script in scripts],
            policy=" ".join(f"'sha256-{digest}'" for digest in digests) or "'none'",
        )
    )
