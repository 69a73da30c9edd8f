# SPDX-License-Identifier: Apache-2.0
"""Which comparisons were made before: a run that was interrupted goes on where it was."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from tvmdcn.bench.machine import identify_machine, identify_versions
from tvmdcn.bench.measurement import Measurement
from tvmdcn.bench.provider import Provider
from tvmdcn.problems import Problem

__all__ = ["Known"]


class _Part(Protocol):
    """Who computes what."""

    @property
    def provider(self) -> Provider: ...

    @property
    def problem(self) -> Problem: ...


class Known:
    """Rows measured before; those of this machine, and of these versions of everything, count.

    A row that failed counts too: the same versions on the same machine would fail again. Rows of a provider in another
    environment count if they are of the same tvmdcn.
    """

    def __init__(self, rows: Iterable[Measurement]) -> None:
        machine, self._versions = identify_machine(), identify_versions()
        self._rows = {self._key(row): row for row in rows if row.machine == machine}

    @staticmethod
    def _key(row: Measurement) -> tuple[object, ...]:
        return row.problem, row.spec, row.extents, row.provider, row.measure, row.threads, row.cache

    def of(self, provider: Provider, problem: Problem, threads: int, cache: str = "warm") -> Measurement | None:
        """Return the latest row of a provider, or None."""
        name, spec, extents = problem.forward.name, problem.spec, problem.extents
        row = self._rows.get((name, spec, extents, provider.name, provider.measure, threads, cache))
        if row is None:
            return None
        compared = ["tvmdcn"] if provider.python is not None else {**row.versions, **self._versions}
        same = all(row.versions.get(package) == self._versions.get(package) for package in compared)
        return row if same else None

    def all_of(self, parts: Sequence[_Part], threads: int, caches: Iterable[str]) -> list[Measurement]:
        """Return the rows of a comparison; none if one is missing: ratios rest on rows of the same moments."""
        rows = [self.of(part.provider, part.problem, threads, cache) for part in parts for cache in caches]
        found = [row for row in rows if row is not None]
        return found if len(found) == len(rows) else []
