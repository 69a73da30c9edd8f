# SPDX-License-Identifier: Apache-2.0
"""Damage, by accident and on purpose, to files of JSON and others: the same for one seed, so that failures repeat."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

# What a hostile or broken writer may put in the place of a value.
HOSTILE: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    1,
    2,
    7,
    1 << 31,
    1 << 63,
    -(1 << 64),
    10**40,
    10**400,
    0.5,
    -0.0,
    1e308,
    1e-320,
    float("nan"),
    float("inf"),
    float("-inf"),
    "",
    " ",
    "1",
    "true",
    "float32",
    "NCHW",
    "\x00",
    "\ud800",
    "a\udfffb",
    "\u202e",
    "../../../../etc/passwd",
    "/etc/passwd",
    "..",
    ".",
    "~root",
    "a/b",
    "a\nb",
    "$(reboot)",
    "__class__",
    "{0.__class__}",
    "%s%n",
    "x" * 10_000,
    [],
    [[]],
    [1, 2, 3, 4],
    [0] * 1000,
    {},
    {"": None},
    {"__proto__": {}},
    [None],
    {"operator": []},
]


def nested(depth: int, kind: str) -> str:
    """Return the text of lists or objects in one another."""
    return "[" * depth + "]" * depth if kind == "list" else '{"a":' * depth + "1" + "}" * depth


def paths_of(data: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Iterate over the ways to all values below one."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield (*here, key)
        yield from paths_of(value, (*here, key))


def _owner(data: Any, path: tuple[Any, ...]) -> Any:
    for key in path[:-1]:
        data = data[key]
    return data


def restructured(data: Any, rng: random.Random) -> Any:
    """Return a copy of a value of JSON, with one to three of its parts changed, gone, moved or doubled."""
    data = copy.deepcopy(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        paths = list(paths_of(data))
        if not paths:
            return rng.choice(HOSTILE)
        # Deep values are many; each level is to have its turn.
        depth = rng.choice(sorted({len(path) for path in paths}))
        path = rng.choice([path for path in paths if len(path) == depth])
        owner, key = _owner(data, path), path[-1]
        change = rng.randrange(8)
        if change <= 3:
            owner[key] = copy.deepcopy(rng.choice(HOSTILE))
        elif change == 4:
            del owner[key]
        elif change == 5:
            owner[key] = [owner[key]] if rng.random() < 0.5 else {"a": owner[key]}
        elif change == 6:
            other = rng.choice(paths)
            owner[key] = copy.deepcopy(_owner(data, other)[other[-1]]) if other[: len(path)] != path else None
        elif isinstance(owner, dict):
            owner[rng.choice(("extra", "", "schema", "\ud800", str(key).upper()))] = owner[key]
        else:
            owner.append(owner[key])
    return data


def rewritten(text: str, rng: random.Random) -> str:
    """Return a text of JSON changed in ways that only a text can be: keys twice, deep nesting, numbers of no kind."""
    change = rng.randrange(6)
    if change == 0:
        place = text.find(":", rng.randrange(len(text)))
        end = text.rfind('"', 0, place)
        start = text.rfind('"', 0, end)
        key = text[start : end + 1] if 0 <= start < end else '"schema"'
        return text.replace("{", "{" + key + ": " + json.dumps(rng.choice(HOSTILE)) + ", ", 1)
    if change == 1:
        value = nested(rng.choice((5, 60, 300, 500, 900, 960, 985, 5000)), rng.choice(("list", "dict")))
        place = rng.choice([i for i, c in enumerate(text) if c == ":"] or [0])
        end = min((i for i in (text.find(c, place) for c in ",}\n") if i > 0), default=len(text))
        return text[: place + 1] + value + text[end:]
    if change == 2:
        return text.replace(
            rng.choice("0123456789"), rng.choice(("NaN", "-Infinity", "1e999", "0x1", "01", "9" * 5000)), 1
        )
    if change == 3:
        return rng.choice(("\ufeff", "\x00", "\u2028", "// \n", "[", "null ")) + text
    if change == 4:
        return text + rng.choice(("\x00", text, "]", " " * 100, "\\"))
    return rng.choice(("", "null", "[]", "{}", "0", '"', "\n", "{}" * 2))


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Return bytes damaged as by a disk, a network or a kill."""
    if not content:
        return b"\x00"
    place = rng.randrange(len(content))
    length = rng.choice((1, 1, 2, 4, 16, 64, 512, 4096))
    change = rng.randrange(7)
    if change <= 1:
        flipped = bytearray(content)
        for _ in range(rng.choice((1, 1, 2, 5))):
            flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
        return bytes(flipped)
    if change == 2:
        return content[:place]
    if change == 3:
        return content[:place] + bytes(min(length, len(content) - place)) + content[place + length :]
    if change == 4:
        return content[:place] + content[place + length :]
    if change == 5:
        return content[:place] + rng.randbytes(length) + content[place:]
    return content[:place] + content[place : place + length] * 2 + content[place + length :]


def mutations(data: Any, seed: int, count: int) -> Iterator[bytes]:
    """Iterate over `count` damaged forms of a value of JSON, as bytes."""
    rng = random.Random(seed)
    text = json.dumps(data, indent=1, sort_keys=True)
    for number in range(count):
        kind = number % 3
        if kind == 0:
            yield damaged(text.encode(), rng)
        elif kind == 1:
            yield json.dumps(restructured(data, rng)).encode()
        else:
            yield rewritten(text, rng).encode("utf-8", "surrogatepass")
