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
    "merge_lanes",
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


def merge_lanes(
    rows: Sequence[Expr], dtype: str, lanes: int, name: str, within: int | None = None
) -> tuple[list[tirx.Stmt], Expr]:
    """Add up lanes of several vectors until the sums fit side by side into one.

    Parameters
    ----------
    rows : sequence of expressions
        ``S`` vectors of `lanes` lanes, both powers of two.
    dtype : str
        Element type.
    lanes : int
    name : str
        Prefix of the variables.
    within : int, optional
        Add up only within groups of so many lanes, at least S; all lanes by default.

    Returns
    -------
    statements : list of tirx.Stmt
        Three instructions for each row but one: each step adds the halves of two rows in one vector.
    merged : expression
        A vector of `lanes` lanes. Of each group, the first ``within / S`` lanes add up to the sum of that group in the
        first row, the next to that in the second, and so on.
    """
    statements: list[tirx.Stmt] = []

    def bind(label: str, value: Expr) -> tirx.Var:
        var = tirx.Var(f"{name}_{label}", vector_dtype(dtype, lanes))
        statements.append(tirx.Bind(var, value))
        return var

    current = [bind(f"row_{i}", row) for i, row in enumerate(rows)]
    distance = lanes if within is None else within
    while len(current) > 1:
        distance //= 2
        half = len(current) // 2
        pairs = [_exchange(current[i], current[i + half], lanes, distance) for i in range(half)]
        current = [bind(f"merged_{distance}_{i}", a + b) for i, (a, b) in enumerate(pairs)]
    return statements, current[0]


def sum_lanes(value: Expr, dtype: str, lanes: int, name: str) -> tuple[list[tirx.Stmt], Expr]:
    """Add up the lanes of a vector, a power of two; return the statements and the sum."""
    statements: list[tirx.Stmt] = []
    while lanes > 1:
        lanes //= 2
        halves = [tirx.Shuffle([value], list(range(first, first + lanes))) for first in (0, lanes)]
        value = tirx.Var(f"{name}_{lanes}", vector_dtype(dtype, lanes))
        statements.append(tirx.Bind(value, halves[0] + halves[1]))
    return statements, value


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
