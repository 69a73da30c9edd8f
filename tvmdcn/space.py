# SPDX-License-Identifier: Apache-2.0
"""Design spaces: which schedules an operator has on a kind of target, and how one of them is chosen.

A design space is a plain function that transforms a TVM ``Schedule``. Where it has a choice it asks a `Choices`,
naming the choice and its default. The same function so serves three purposes: called with no decisions it gives the
default schedule; under MetaSchedule each choice is a sampling instruction that the search varies; with the decisions
of a record, which may be another layer's, it repeats that schedule.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tvmdcn.errors import BuildError
from tvmdcn.target import TargetInfo

__all__ = [
    "SPLITS",
    "TILE_UNITS",
    "UNIT_BYTES",
    "VARIANT",
    "Choices",
    "Decisions",
    "DesignSpace",
    "design_space",
    "space_of",
]

VARIANT = "tvmdcn.variant"
"""Annotation of the first block: which structural variant a trace belongs to."""
TILE_UNITS = "tvmdcn.tile_units"
"""Annotation of the first block: the largest tile that a call should use."""
UNIT_BYTES = "tvmdcn.unit_bytes"
"""Annotation of the first block: memory that a task takes per unit of its tile."""
PLANES = "tvmdcn.planes"
"""Annotation of the first block: 1 if the input is read as planes, without a channels-last copy."""
SPLITS = "tvmdcn.splits"
"""Annotation of the first block: into how many parts sums are divided, which a call has memory for."""

_SPACES: dict[tuple[str, str], DesignSpace] = {}


@dataclass(frozen=True)
class Decisions:
    """A schedule in words: a structural variant and the value of each choice.

    Parameters
    ----------
    variant : str
        One of the design space's variants, such as "split-2-tap".
    values : mapping of str to int
    """

    variant: str
    values: Mapping[str, int]

    def to_json(self) -> dict[str, Any]:
        """Return the decisions as a dict of JSON types."""
        return {"variant": self.variant, "values": dict(self.values)}

    @classmethod
    def from_json(cls, data: Any) -> Decisions:
        """Return the decisions that :meth:`to_json` wrote.

        Raises
        ------
        BuildError
            If it is not of that form.
        """
        if (
            not isinstance(data, Mapping)
            or not isinstance(data.get("variant"), str)
            or not isinstance(data.get("values"), Mapping)
            or not all(isinstance(k, str) and type(v) is int for k, v in data["values"].items())
        ):
            raise BuildError(f"not decisions as Decisions.to_json writes them: {str(data)[:200]}.")
        return cls(data["variant"], dict(data["values"]))


@dataclass
class Choices:
    """What a design space asks.

    Parameters
    ----------
    sch : tvm.s_tir.Schedule
    given : mapping of str to int
        Decisions to repeat; one that is impossible here (another layer's) gives way to the default.
    made : dict of str to int
        After the space has run: what was decided, by name, in order.
    """

    sch: Any
    given: Mapping[str, int] = field(default_factory=dict)
    made: dict[str, int] = field(default_factory=dict)

    def tile(self, name: str, loop: Any, default: int, limit: int | None = None) -> list[Any]:
        """Split `loop` in two; the choice is the inner extent, a divisor of at most `limit`.

        Returns
        -------
        list of two loops, outer and inner
        """
        extent = int(self.sch.get(loop).extent)
        limit = extent if limit is None else min(limit, extent)

        def fits(value: int) -> bool:
            return 0 < value <= limit and extent % value == 0

        value = self.given.get(name, default)
        value = value if fits(value) else default
        # Of the divisors that are possible, the largest that is not above the wish.
        value = next(v for v in range(min(max(value, 1), limit), 0, -1) if fits(v))
        self.made[name] = value
        factors = self.sch.sample_perfect_tile(loop, n=2, max_innermost_factor=limit, decision=[extent // value, value])
        return list(self.sch.split(loop, list(factors)))

    def pick(self, name: str, candidates: Sequence[int], default: int) -> Any:
        """Return one of `candidates` as a random variable of the schedule."""
        wish = self.given.get(name, default)
        index = min(range(len(candidates)), key=lambda i: abs(candidates[i] - wish))
        self.made[name] = candidates[index]
        return self.sch.sample_categorical(list(candidates), [1.0 / len(candidates)] * len(candidates), decision=index)


Apply = Callable[[Any, Any, TargetInfo, str, Choices], None]


@dataclass(frozen=True)
class DesignSpace:
    """A registered design space.

    Parameters
    ----------
    operator, kind : str
        Operator and kind of target.
    variants : callable
        ``variants(spec, target)``: names of the structural variants, the default first.
    apply : callable
        ``apply(sch, spec, target, variant, choices)`` schedules the function named as the operator.
    naive : callable
        ``naive(sch, spec)``: the plainest correct schedule, for comparison.
    finish : callable, optional
        ``finish(function)`` is the scheduled function as it is compiled, with what is no move of a schedule.
    """

    operator: str
    kind: str
    variants: Callable[[Any, TargetInfo], list[str]]
    apply: Apply
    naive: Callable[[Any, Any], None]
    finish: Callable[[Any], Any] | None = None

    def schedule(self, sch: Any, spec: Any, target: TargetInfo, decisions: Decisions | None = None) -> Decisions:
        """Schedule with `decisions`, or with the space's own defaults, and return what was decided.

        A variant or a value that this layer does not have gives way to the default.
        """
        names = self.variants(spec, target)
        variant = decisions.variant if decisions is not None and decisions.variant in names else names[0]
        choices = Choices(sch, decisions.values if decisions is not None else {})
        self.apply(sch, spec, target, variant, choices)
        return Decisions(variant, choices.made)


def design_space(
    operator: str,
    kind: str,
    *,
    variants: Callable[[Any, TargetInfo], list[str]],
    naive: Callable[[Any, Any], None],
    finish: Callable[[Any], Any] | None = None,
) -> Callable[[Apply], Apply]:
    """Register the decorated function as the design space of an operator on a kind of target."""

    def register(apply: Apply) -> Apply:
        _SPACES[operator, kind] = DesignSpace(operator, kind, variants, apply, naive, finish)
        return apply

    return register


def space_of(operator: str, kind: str) -> DesignSpace:
    """Return the design space of an operator on a kind of target.

    ``tvmdcn.schedules.<kind>.<operator>`` is imported unless something is registered already, so a space of your
    own takes precedence once its module is imported.

    Raises
    ------
    BuildError
        If there is none.
    """
    if (operator, kind) not in _SPACES:
        module = f"tvmdcn.schedules.{kind}.{operator}"
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is None or not module.startswith(error.name):
                raise
            raise BuildError(
                f"there is no design space for {operator} on targets of kind {kind!r}. Write "
                f"schedules/{kind}/{operator}.py, or register one with tvmdcn.space.design_space."
            ) from error
    return _SPACES[operator, kind]
