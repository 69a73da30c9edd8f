# SPDX-License-Identifier: Apache-2.0
"""The search for a schedule of a GPU: evolution over decisions, with a model of what they cost.

A design space of a GPU lays out threads, shared memory and registers in numbers that depend on one another, so its
choices are no instructions that MetaSchedule could change in a trace: a candidate is made by running the space anew
with other wishes, which it rounds to what is possible. Trials, log, correctness gate and records are those of every
tuning.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from tvmdcn.builder import new_schedule
from tvmdcn.errors import BuildError
from tvmdcn.space import Choices, Decisions, space_of
from tvmdcn.spec import DeformConv2dSpec, Extents
from tvmdcn.target import TargetInfo
from tvmdcn.tuning.search import Candidate

__all__ = ["DecisionNames", "DecisionSearch"]

_WARM_UP = 12  # measurements before the cost model is trusted
_POOL = 400  # wishes that the model ranks for a round
_ELITE = 10
_RANDOM = 0.15  # share of a round that is not the model's
_ROUNDS = 60  # of boosting


class _Noted(Choices):
    """Choices that note what could have been chosen."""

    def __init__(self, sch: Any, given: Mapping[str, int]) -> None:
        super().__init__(sch, given)
        self.options: dict[str, list[int]] = {}

    def pick(self, name: str, candidates: Sequence[int], default: int) -> Any:
        self.options[name] = sorted(candidates)
        return super().pick(name, candidates, default)

    def tile(self, name: str, loop: Any, default: int, limit: int | None = None) -> list[Any]:
        extent = int(self.sch.get(loop).extent)
        most = extent if limit is None else min(limit, extent)
        self.options[name] = [value for value in range(1, most + 1) if extent % value == 0]
        return super().tile(name, loop, default, limit)


class DecisionNames:
    """The design space of one layer: its variants, the names of their choices, and the defaults.

    Parameters
    ----------
    spec, target
        The layer, and what it is for.

    Attributes
    ----------
    variants : list of str
    defaults : dict of str to Decisions
        What each variant decides by itself.
    options : dict
        For each variant and choice the values that have been possible, with the wishes so far.
    """

    def __init__(self, spec: DeformConv2dSpec, target: TargetInfo) -> None:
        self._spec, self._target = spec, target
        self._space = space_of(spec.operator, target.kind)
        self.variants = self._space.variants(spec, target)
        self.options: dict[str, dict[str, set[int]]] = {variant: {} for variant in self.variants}
        self.defaults = {variant: self.scheduled(Decisions(variant, {}))[1] for variant in self.variants}
        self.columns = sorted({name for made in self.defaults.values() for name in made.values})

    def scheduled(self, wish: Decisions) -> tuple[Any, Decisions]:
        """Return the schedule that is nearest to a wish, and what was decided.

        Raises
        ------
        BuildError
            If the space refuses.
        """
        sch = new_schedule(self._spec, self._target)
        variant = wish.variant if wish.variant in self.variants else self.variants[0]
        noted = _Noted(sch, wish.values)
        self._space.apply(sch, self._spec, self._target, variant, noted)
        for name, values in noted.options.items():
            self.options[variant].setdefault(name, set()).update(values)
        return sch, Decisions(variant, noted.made)

    def drawn(self, random: np.random.Generator) -> Decisions:
        """Return a random wish."""
        variant = str(random.choice(self.variants))
        values = {name: int(random.choice(sorted(options))) for name, options in self.options[variant].items()}
        return Decisions(variant, values)

    def moved(self, decisions: Decisions, random: np.random.Generator) -> Decisions:
        """Return a wish that differs in one choice or two from decisions."""
        options = self.options[decisions.variant]
        values = dict(decisions.values)
        names = [name for name in values if len(options.get(name, ())) > 1]
        if not names or random.random() < 0.1:
            return Decisions(str(random.choice(self.variants)), values)
        for name in random.choice(names, size=min(len(names), 1 + (random.random() < 0.4)), replace=False):
            possible = sorted(options[name])
            at = min(range(len(possible)), key=lambda i: abs(possible[i] - values[name]))
            step = int(random.choice([-2, -1, 1, 2]))
            values[str(name)] = possible[min(max(at + step, 0), len(possible) - 1)]
        return Decisions(decisions.variant, values)

    def row(self, decisions: Decisions) -> list[float]:
        """Return decisions as numbers for a cost model: which variant, and the logarithm of each choice."""
        one_hot = [float(decisions.variant == variant) for variant in self.variants]
        return [*one_hot, *(math.log2(1 + decisions.values.get(name, 0)) for name in self.columns)]


class DecisionSearch:
    """Proposes candidates, and learns from how they did. Of the form of :class:`tvmdcn.tuning.search.Search`.

    Parameters
    ----------
    spec, extents, target
        The layer, its representative sizes, and the target.
    seed : int
    """

    def __init__(self, spec: DeformConv2dSpec, extents: Extents, target: TargetInfo, seed: int) -> None:
        del extents  # decisions do not depend on them
        self.names = DecisionNames(spec, target)
        self._random = np.random.default_rng(seed)
        self._seen: dict[Any, tuple[Decisions, float | None]] = {}
        self._proposed: set[Any] = set()
        self._model: Any = None

    def candidate(self, decisions: Decisions) -> Candidate:
        """Return the candidate of given decisions."""
        return Candidate(self.names.scheduled(decisions)[1], None)

    def propose(self, count: int, trials_left: int) -> list[Candidate]:
        """Return up to `count` new candidates that the cost model thinks well of; none if there are no more."""
        best = sorted((seconds, i) for i, (_, seconds) in enumerate(self._seen.values()) if seconds is not None)
        known = [decisions for decisions, _ in self._seen.values()]
        elite = [known[i] for _, i in best[:_ELITE]]
        wishes = []
        for _ in range(_POOL):
            if elite and self._random.random() < 0.7:
                wishes.append(self.names.moved(elite[int(self._random.integers(len(elite)))], self._random))
            else:
                wishes.append(self.names.drawn(self._random))
        scores = self._scores(wishes)
        if scores is not None:
            ranked = sorted(range(len(wishes)), key=lambda i: -scores[i])
            chance = [i for i in range(len(wishes)) if self._random.random() < _RANDOM]
            wishes = [wishes[i] for i in [*ranked[: 4 * count], *chance]]
            self._random.shuffle(wishes[-len(chance) :])
        found: list[Candidate] = []
        # Wishes that are rounded to the same decisions take time, too: not for ever.
        for wish in wishes[: 8 * count]:
            if len(found) >= min(count, trials_left):
                break
            try:
                candidate = self.candidate(wish)
            except BuildError:
                continue
            if candidate.identity not in self._proposed and candidate.identity not in self._seen:
                self._proposed.add(candidate.identity)
                found.append(candidate)
        return found

    def predict(self, candidates: Sequence[Candidate]) -> list[float | None]:
        """Return the cost model's scores, higher is better; None while the model has not seen enough."""
        scores = self._scores([candidate.decisions for candidate in candidates])
        return [None] * len(candidates) if scores is None else [float(score) for score in scores]

    def _scores(self, decisions: Sequence[Decisions]) -> np.ndarray | None:
        """Return about the best time so far over the time expected of each."""
        if self._model is None or not decisions:
            return None
        import xgboost

        scores: np.ndarray = self._model.predict(xgboost.DMatrix(np.array([self.names.row(d) for d in decisions])))
        return np.exp2(scores)

    def learn(self, outcomes: Mapping[Any, Sequence[float] | None], candidates: Sequence[Candidate]) -> None:
        """Take in measurements: times in seconds by a candidate's identity, None if it failed."""
        for candidate in candidates:
            seconds = outcomes[candidate.identity]
            self._seen[candidate.identity] = candidate.decisions, min(seconds) if seconds else None
        self._fit()

    def recall(self, trials: Iterable[tuple[Decisions, float | None]]) -> None:
        """Take in the trials of earlier runs: decisions, and seconds or None for a failure."""
        for decisions, seconds in trials:
            self._seen[Candidate(decisions, None).identity] = decisions, seconds
        self._fit()

    def end_round(self, outcomes: Mapping[Any, Sequence[float] | None]) -> None:
        """Do nothing: :meth:`learn` has all it needs."""

    def _fit(self) -> None:
        good = [seconds for _, seconds in self._seen.values() if seconds is not None]
        # Optional here: a machine that has a GPU may have no network, and the evolution alone gets far.
        if len(self._seen) < _WARM_UP or not good or importlib.util.find_spec("xgboost") is None:
            return
        import xgboost

        # What failed is as bad as the worst, and more.
        fastest, failed = min(good), 4 * max(good)
        rows = np.array([self.names.row(decisions) for decisions, _ in self._seen.values()])
        labels = [math.log2(fastest / (failed if seconds is None else seconds)) for _, seconds in self._seen.values()]
        parameters = {"max_depth": 6, "eta": 0.2, "nthread": 1, "seed": 0, "verbosity": 0}
        self._model = xgboost.train(parameters, xgboost.DMatrix(rows, np.array(labels)), _ROUNDS)
