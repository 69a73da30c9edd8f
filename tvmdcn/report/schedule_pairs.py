# SPDX-License-Identifier: Apache-2.0
"""The default and the tuned schedule of measured layers side by side, from artifacts' manifests."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tvmdcn.artifact import Artifact, artifacts
from tvmdcn.bench.measurement import Measurement
from tvmdcn.cache_key import source_digest
from tvmdcn.errors import TvmdcnError
from tvmdcn.report.data import SchedulePair, ScheduleView

__all__ = ["cached_pairs"]

_log = logging.getLogger(__name__)

_SIDES = ("default", "tuned")


def cached_pairs(rows: Iterable[Measurement], cache_dir: Path | None = None) -> list[SchedulePair]:
    """Return a pair for each layer of ours, and for its gradients, among the rows whose two schedules are in the cache.

    The newest builds count, of those that this version's generating code made for the target of the row.
    """
    try:
        built = {
            (artifact.spec, artifact.target.tag, artifact.key.schedule): artifact
            for artifact in artifacts(cache_dir)
            if artifact.key.source == source_digest()
        }
    except TvmdcnError as error:
        _log.warning("no schedules are shown: %s", error)
        return []
    pairs = {}
    for row in rows:
        found = [built.get((row.spec, str(row.machine.get("target")), side)) for side in _SIDES]
        if row.role == "ours" and row.title not in pairs and None not in found:
            left, right = (_view(artifact) for artifact in found if artifact is not None)
            pairs[row.title] = SchedulePair(row.title, left, right)
    return list(pairs.values())


def _view(artifact: Artifact) -> ScheduleView:
    schedule, side = artifact.schedule, artifact.key.schedule
    source = str(schedule.get("source", ""))
    title = source if source in ("", side) or source.startswith(side) else f"{side}: {source}"
    return ScheduleView(title or side, _decisions(schedule), str(schedule.get("tir", "")))


def _decisions(schedule: Mapping[str, Any]) -> dict[str, str]:
    """Return the decisions of a manifest as texts; a manifest may have been written by hand."""
    decisions = schedule.get("decisions")
    if not isinstance(decisions, Mapping) or not isinstance(decisions.get("values"), Mapping):
        return {}
    values = {str(name): str(value) for name, value in decisions["values"].items()}
    return {"variant": str(decisions.get("variant", "")), **values}
