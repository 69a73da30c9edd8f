# SPDX-License-Identifier: Apache-2.0
"""Vectors in TIR, and what is done to square blocks of numbers held in them: transpose, and add up lanes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tvm import tirx

__all__ = [
    "bits_dtype",
    "broadcast",
    "cast_vector",
    "from_bits",
    "lanes_at",
    "strips",
    "sum_lanes",
    "to_bits",
    "transpose_into",
    "vector_dtype",
]

Expr = Any


def vector_dtype(dtype: str, lanes: int) -> str:
    """Return the TIR name of a vector type."""
    return dtype if lanes == 1 else f"{dtype}x{lanes}"


def lanes_at(first: Expr, count: int) -> Expr:
    """Return the index of `count` consecutive elements."""
    return first if count == 1 else tirx.Ramp(first, tirx.const(1, "int32"), count)


def cast_vector(value: Expr, source: str, target: str, lanes: int) -> Expr:
    """Convert a vector, where needed."""
    return value if source == target else tirx.Cast(vector_dtype(target, lanes), value)


def bits_dtype(dtype: str) -> str:
    """Return the type in which elements are moved about: TVM 0.27 lowers no shuffle of bfloat16."""
    return "uint16" if dtype == "bfloat16" else dtype


def to_bits(value: Expr, dtype: str, lanes: int) -> Expr:
    """Return elements just loaded as `bits_dtype`.

    Also because of the binding of a variable, in which TVM does not see a load of bfloat16 and leaves it as it is.
    """
    return tirx.reinterpret(vector_dtype("uint16", lanes), value) if dtype == "bfloat16" else value


def from_bits(value: Expr, dtype: str, target: str, lanes: int) -> Expr:
    """Convert what `to_bits` returned to another type."""
    if dtype != "bfloat16":
        return cast_vector(value, dtype, target, lanes)
    if target == dtype:
        return tirx.reinterpret(vector_dtype(dtype, lanes), value)
    wide = tirx.Cast(vector_dtype("uint32", lanes), value)
    shifted = tirx.shift_left(wide, broadcast(tirx.const(16, "uint32"), lanes))
    return cast_vector(tirx.reinterpret(vector_dtype("float32", lanes), shifted), "float32", target, lanes)


def broadcast(value: Expr, lanes: int) -> Expr:
    """Return a vector of equal lanes."""
    return value if lanes == 1 else tirx.Broadcast(value, lanes)


def _exchange(first: Expr, second: Expr, size: int, distance: int) -> tuple[Expr, Expr]:
    """Return the two vectors that swap the off-diagonal blocks, of `distance` lanes, of a pair of rows."""
    keep = [c if not c & distance else size + c - distance for c in range(size)]
    cross = [c + distance if not c & distance else size + c for c in range(size)]
    return tirx.Shuffle([first, second], keep), tirx.Shuffle([first, second], cross)


def transpose_into(
    rows: Sequence[Expr], dtype: str, emit: Callable[[int, Expr], tirx.Stmt], name: str = "r"
) -> list[tirx.Stmt]:
    """Transpose a square block held in vectors.

    Parameters
    ----------
    rows : sequence of expressions
        ``S`` vectors of ``S`` lanes, S a power of two.
    dtype : str
        Element type.
    emit : callable
        ``emit(j, vector)`` is the statement that consumes column ``j``.

    Returns
    -------
    list of tirx.Stmt
        ``S * log2(S)`` shuffles between the loads and the consumers: 64 for 16 x 16, a quarter of one per element.
    """
    size = len(rows)
    statements: list[tirx.Stmt] = []

    def bind(stage: int, row: int, value: Expr) -> tirx.Var:
        var = tirx.Var(f"{name}_{stage}_{row}", vector_dtype(dtype, size))
        statements.append(tirx.Bind(var, value))
        return var

    current = [bind(0, i, row) for i, row in enumerate(rows)]
    distance = size // 2
    while distance:
        following = list(current)
        for low in range(size):
            if low & distance:
                continue
            high = low + distance
            kept, crossed = _exchange(current[low], current[high], size, distance)
            following[low], following[high] = bind(distance, low, kept), bind(distance, high, crossed)
        current = following
        distance //= 2
    return statements + [emit(j, column) for j, column in enumerate(current)]


def sum_lanes(rows: Sequence[Expr], dtype: str, lanes: int, name: str) -> tuple[list[tirx.Stmt], Expr]:
    """Add up the lanes of each of several vectors.

    Parameters
    ----------
    rows : sequence of expressions
        ``S`` vectors of `lanes` lanes, both powers of two, S no more than `lanes`.
    dtype : str
        Element type.
    lanes : int
    name : str
        Prefix of the variables.

    Returns
    -------
    statements : list of tirx.Stmt
        About three instructions per row: each step adds the halves of two rows in one vector.
    sums : expression
        A vector of S lanes: the sum of each row.
    """
    statements: list[tirx.Stmt] = []

    def bind(label: str, value: Expr, width: int) -> tirx.Var:
        var = tirx.Var(f"{name}_{label}", vector_dtype(dtype, width))
        statements.append(tirx.Bind(var, value))
        return var

    current = [bind(f"row_{i}", row, lanes) for i, row in enumerate(rows)]
    while lanes > len(rows):
        lanes //= 2

        def half(row: Expr, first: int, width: int = lanes) -> Expr:
            return tirx.Shuffle([row], list(range(first, first + width)))

        current = [bind(f"half_{lanes}_{i}", half(row, 0) + half(row, lanes), lanes) for i, row in enumerate(current)]
    distance = len(rows) // 2
    while distance:
        pairs = [_exchange(current[i], current[i + distance], lanes, distance) for i in range(distance)]
        current = [bind(f"sum_{distance}_{i}", a + b, lanes) for i, (a, b) in enumerate(pairs)]
        distance //= 2
    return statements, current[0]


def strips(count: int, lanes: int) -> list[tuple[int, int]]:
    """Split `count` elements into (first, size) strips of powers of two, none longer than `lanes`."""
    found, first = [], 0
    size = lanes
    while first < count:
        while size > count - first:
            size //= 2
        found.append((first, size))
        first += size
    return found
