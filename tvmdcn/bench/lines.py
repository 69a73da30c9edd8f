# SPDX-License-Identifier: Apache-2.0
"""One problem with everybody's rows: the ratios between them, and which of our aims they meet."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from tvmdcn.bench.measurement import Measurement
from tvmdcn.spec import DeformConv2dSpec, Extents

__all__ = ["Aim", "Line", "Verdict", "ratio_of", "verdicts_of"]


@dataclass(frozen=True)
class Line:
    """One problem of a section: its rows by provider, and the ratios.

    `forward` are, of gradients, the rows of the layer itself.
    """

    problem: str
    spec: DeformConv2dSpec
    extents: Extents
    rows: Mapping[str, Measurement]
    subject: str | None
    forward: Mapping[str, Measurement] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """The layer's name, with the direction if it is backward."""
        return next(iter(self.rows.values())).title

    def _fastest(self, role: str) -> Measurement | None:
        usable = [row for row in self.rows.values() if row.role == role and row.median_ms is not None]
        return min(usable, key=lambda row: row.median_ms or 0.0, default=None)

    @property
    def ours(self) -> Measurement | None:
        """The row that stands for us, unless it failed."""
        row = self.rows.get(self.subject or "")
        return row if row is not None and row.median_ms is not None else None

    @property
    def fastest_peer(self) -> Measurement | None:
        """The fastest of those that compute the same."""
        return self._fastest("peer")

    @property
    def floor(self) -> Measurement | None:
        """The faster of the plain convolutions."""
        return self._fastest("floor")

    @property
    def speedup(self) -> float | None:
        """How many times as fast as the fastest peer we are."""
        return ratio_of(self.fastest_peer, self.ours)

    @property
    def cost(self) -> float | None:
        """Our time in units of the plain convolution's."""
        return ratio_of(self.ours, self.floor)

    @property
    def growth(self) -> float | None:
        """Our time in units of our own forward's; of gradients only."""
        return ratio_of(self.ours, self.forward.get(self.subject or ""))

    def against(self, provider: str) -> float | None:
        """Return a provider's time in units of ours."""
        return ratio_of(self.rows.get(provider), self.ours)

    @property
    def gflops(self) -> float | None:
        """Our billions of operations per second, sampling not counted."""
        ours = self.ours
        return None if ours is None or not ours.median_ms else ours.operations / ours.median_ms / 1e6


def ratio_of(above: Measurement | None, below: Measurement | None) -> float | None:
    """Return the ratio of two times; None if one is not known."""
    if above is None or below is None or above.median_ms is None or not below.median_ms:
        return None
    return above.median_ms / below.median_ms


@dataclass(frozen=True)
class Aim:
    """A ratio to stay below, or to reach, on some of the layers."""

    text: str
    limit: float
    ratio: Callable[[Line], float | None]
    layers: Callable[[DeformConv2dSpec], bool]
    at_least: bool = False

    def met_by(self, ratio: float) -> bool:
        """Whether a ratio is as good as the limit."""
        return ratio >= self.limit if self.at_least else ratio <= self.limit


@dataclass(frozen=True)
class Verdict:
    """An aim, and the ratio of each layer it is for."""

    aim: Aim
    ratios: Sequence[tuple[Line, float]]

    @property
    def misses(self) -> list[tuple[Line, float]]:
        """The layers that fall short."""
        return [(line, ratio) for line, ratio in self.ratios if not self.aim.met_by(ratio)]

    @property
    def worst(self) -> float:
        """The ratio farthest from the aim, or nearest to missing it."""
        ratios = [ratio for _, ratio in self.ratios]
        return min(ratios) if self.aim.at_least else max(ratios)


_AIMS = {
    "forward": (),
    "backward": (
        Aim(
            "at most 2.2\u00d7 our own forward, on layers with one offset group",
            2.2,
            lambda line: line.growth,
            lambda spec: spec.offset_groups == 1,
        ),
        Aim(
            "at most 1.5\u00d7 a plain convolution's backward, on layers with one offset group and one group",
            1.5,
            lambda line: line.cost,
            lambda spec: spec.offset_groups == spec.groups == 1,
        ),
        Aim(
            "at least 8\u00d7 as fast as torchvision's backward",
            8.0,
            lambda line: line.against("torchvision"),
            lambda spec: True,
            at_least=True,
        ),
    ),
}


def verdicts_of(direction: str, lines: Sequence[Line]) -> list[Verdict]:
    """Return the aims of a direction that something was measured for."""
    found = []
    for aim in _AIMS[direction]:
        ratios = [(line, aim.ratio(line)) for line in lines if aim.layers(line.spec)]
        known = [(line, ratio) for line, ratio in ratios if ratio is not None]
        found += [Verdict(aim, known)] if known else []
    return found
