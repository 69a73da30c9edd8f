# SPDX-License-Identifier: Apache-2.0
"""What is known of similar layers and targets, as the first schedules to try."""

from __future__ import annotations

import logging
import math

from tvmdcn.cache_key import record_roots
from tvmdcn.errors import RecordsError
from tvmdcn.space import Decisions
from tvmdcn.spec import DeformConv2dSpec
from tvmdcn.target import TargetInfo
from tvmdcn.tuning.records import Record, TuningRecords, distance, structure

__all__ = ["similar_decisions"]

_log = logging.getLogger(__name__)


def similar_decisions(
    spec: DeformConv2dSpec, target: TargetInfo, threads: int, limit: int, own: bool = True
) -> list[Decisions]:
    """Return the decisions of the records that are nearest to a layer, the nearest first.

    Only layers that are built alike count (groups, offset groups, kernel, dtype, layout): the schedules of others were
    slower than a layer's own default (8 offset groups on Zen 5, with those of 16 and of 1: 13.2 to 13.6 ms, default
    10.4 ms; 2026-11-22). Records of the target come before those of other targets of its kind; then the nearest in
    channels, and in threads.

    Parameters
    ----------
    spec : DeformConv2dSpec or DeformConv2dGradSpec
    target : TargetInfo
    threads : int
    limit : int
        How many, at most; no two are the same.
    own : bool
        Whether records of the very signature count, on whichever target: without them it is as if the layer had never
        been tuned.

    Raises
    ------
    RecordsError
        If the target's own records cannot be read. Others that cannot are passed over.
    """
    tags = {path.name for root in record_roots() for path in root.glob(f"{target.kind}-*") if path.is_dir()}
    ranked: list[tuple[tuple[float, ...], Record]] = []
    for tag in sorted({target.tag, *tags}):
        for record in _records(tag, required=tag == target.tag):
            if structure(record.spec) == structure(spec) and (own or record.spec != spec):
                rank = (float(tag != target.tag), *_difference(spec, threads, record))
                ranked.append((rank, record))
    ranked.sort(key=lambda entry: entry[0])
    found: list[Decisions] = []
    for _, record in ranked:
        if len(found) < limit and record.decisions not in found:
            found.append(record.decisions)
    return found


def _records(tag: str, required: bool) -> list[Record]:
    try:
        return TuningRecords.of(tag).records
    except RecordsError as error:
        if required:
            raise
        _log.warning("records of another target are passed over: %s", error)
        return []


def _difference(spec: DeformConv2dSpec, threads: int, record: Record) -> tuple[float, ...]:
    """Return how little a record has to say about a layer, the most important first."""
    nearness = distance(spec, record.spec)
    return (record.spec != spec, *nearness, abs(math.log(record.threads / threads)), -record.pixels)
