# SPDX-License-Identifier: Apache-2.0
"""Two texts side by side, coloured, with what differs marked and what is alike folded."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from markupsafe import Markup

__all__ = ["Difference", "compare_texts"]

_CONTEXT = 3  # lines that are alike, shown around a difference
_MOST_LINES = 4000  # of a text; what lies behind is left out
_WORDS = re.compile(r"\w+|\s+|.")
# What is coloured, by the beginning of the name of a token of Pygments.
_CLASSES = (
    ("Comment", "c"),
    ("Keyword", "k"),
    ("Literal.String", "s"),
    ("Literal.Number", "m"),
    ("Name.Label", "l"),
    ("Name.Variable", "v"),
    ("Name.Decorator", "k"),
    ("Name.Builtin", "k"),
    ("Name.Function", "f"),
)

_Token = tuple[str, str]  # class, text


@dataclass(frozen=True)
class Difference:
    """How two texts differ.

    Parameters
    ----------
    html : Markup
        A table, empty if there is no text.
    changed : int
        Lines that the other does not have, but for names, of both sides together.
    lines : tuple of int
        How long both are.
    left_out : int
        Lines, of both sides together, that are not shown.
    """

    html: Markup
    changed: int
    lines: tuple[int, int]
    left_out: int


def compare_texts(left: str, right: str, language: str, sense: Callable[[str], str] = str.strip) -> Difference:
    """Return two texts side by side.

    Parameters
    ----------
    left, right : str
    language : str
        One that Pygments knows, such as "python"; else nothing is coloured.
    sense : callable
        ``sense(line)`` is what a line says without names that mean nothing, such as a register's number: lines of the
        same sense are set beside each other, and count as alike.
    """
    from markupsafe import Markup

    sides = [_tokens(text, language) for text in (left, right)]
    lengths = (len(sides[0]), len(sides[1]))
    left_out = sum(max(0, length - _MOST_LINES) for length in lengths)
    a, b = (side[:_MOST_LINES] for side in sides)
    plain = [[sense("".join(text for _, text in line)) for line in side] for side in (a, b)]
    rows: list[Markup] = []
    changed = 0
    codes = difflib.SequenceMatcher(None, plain[0], plain[1], autojunk=False).get_opcodes()
    for place, (kind, a0, a1, b0, b1) in enumerate(codes):
        if kind == "equal":
            rows += _alike_rows(a[a0:a1], b[b0:b1], (a0, b0), place == 0, place == len(codes) - 1)
            continue
        changed += (a1 - a0) + (b1 - b0)
        rows += _changed_rows(a[a0:a1], b[b0:b1], a0, b0)
    table = (
        Markup('<table class="diff"><tbody>{}</tbody></table>').format(Markup("").join(rows)) if rows else Markup("")
    )
    return Difference(table, changed, lengths, left_out)


def _tokens(text: str, language: str) -> list[list[_Token]]:
    """Return the tokens of each line."""
    from pygments import lex
    from pygments.lexers import get_lexer_by_name
    from pygments.util import ClassNotFound

    text = text.rstrip("\n")
    if not text:
        return []
    try:
        found: Iterator[tuple[object, str]] = iter(
            lex(text, get_lexer_by_name(language, stripnl=False, stripall=False, ensurenl=False))
        )
    except ClassNotFound:
        found = iter([("", text)])
    lines: list[list[_Token]] = [[]]
    for kind, value in found:
        name = str(kind).removeprefix("Token.")
        style = next((short for start, short in _CLASSES if name.startswith(start)), "")
        for number, part in enumerate(value.split("\n")):
            if number:
                lines.append([])
            if part:
                lines[-1].append((style, part))
    return lines


def _code(tokens: Sequence[tuple[str, str, bool]]) -> Markup:
    """Return a line of (class, text, whether it differs)."""
    from markupsafe import Markup, escape

    parts: list[Markup] = []
    open_mark = False
    for style, text, differs in tokens:
        if differs is not open_mark:
            parts.append(Markup("<mark>") if differs else Markup("</mark>"))
            open_mark = differs
        parts.append(Markup('<i class="{}">{}</i>').format(style, text) if style else escape(text))
    if open_mark:
        parts.append(Markup("</mark>"))
    return Markup("").join(parts)


def _row(cells: Sequence[tuple[int | None, Markup]], style: str = "") -> Markup:
    from markupsafe import Markup

    inner = Markup("").join(
        Markup("<td>{}</td><td>{}</td>").format("" if number is None else number + 1, code) for number, code in cells
    )
    return Markup('<tr class="{}">{}</tr>').format(style, inner) if style else Markup("<tr>{}</tr>").format(inner)


def _alike_rows(
    a: Sequence[list[_Token]], b: Sequence[list[_Token]], starts: tuple[int, int], first: bool, last: bool
) -> list[Markup]:
    """Return lines that both have, but for names; those far from any difference are folded."""
    from markupsafe import Markup

    def row(index: int) -> Markup:
        marked = _marked(a[index], b[index])
        return _row([(start + index, _code(side)) for start, side in zip(starts, marked, strict=True)])

    before, after = (0 if first and not last else _CONTEXT), (0 if last else _CONTEXT)
    hidden = range(before, len(a) - after)
    if len(hidden) <= 2:
        return [row(index) for index in range(len(a))]
    fold = Markup(
        '</tbody><tbody class="fold"><tr><td colspan="4"><button type="button">{} lines alike</button></td></tr>'
        "</tbody><tbody hidden>{}</tbody><tbody>"
    ).format(len(hidden), Markup("").join(map(row, hidden)))
    return [*map(row, range(before)), fold, *map(row, range(hidden.stop, len(a)))]


def _changed_rows(a: Sequence[list[_Token]], b: Sequence[list[_Token]], a0: int, b0: int) -> list[Markup]:
    """Return lines that differ; those that stand beside each other have the words marked that do."""
    from markupsafe import Markup

    rows = []
    for index in range(max(len(a), len(b))):
        left, right = (side[index] if index < len(side) else None for side in (a, b))
        if left is not None and right is not None:
            marked = _marked(left, right)
            rows.append(_row([(a0 + index, _code(marked[0])), (b0 + index, _code(marked[1]))], "differs"))
            continue
        cells: list[tuple[int | None, Markup]] = [
            (None, Markup("")) if line is None else (start + index, _code([(s, t, True) for s, t in line]))
            for line, start in ((left, a0), (right, b0))
        ]
        rows.append(_row(cells, "differs"))
    return rows


def _marked(a: Sequence[_Token], b: Sequence[_Token]) -> list[list[tuple[str, str, bool]]]:
    """Return the tokens of two lines, in words, with whether the other lacks them."""
    words = [[(style, word) for style, text in side for word in _WORDS.findall(text)] for side in (a, b)]
    texts = [[word for _, word in side] for side in words]
    differs = [[True] * len(side) for side in words]
    for block in difflib.SequenceMatcher(None, texts[0], texts[1], autojunk=False).get_matching_blocks():
        differs[0][block.a : block.a + block.size] = [False] * block.size
        differs[1][block.b : block.b + block.size] = [False] * block.size
    return [
        [(s, w, d) for (s, w), d in zip(side, flags, strict=True)] for side, flags in zip(words, differs, strict=True)
    ]
