# SPDX-License-Identifier: Apache-2.0
"""Schedules in words, for people who have not read the design space."""

from __future__ import annotations

from tvmdcn.space import Decisions

__all__ = ["describe_decisions"]

# What the variants and the choices of schedules/llvm mean; what is not listed stands for itself.
_REDUCTIONS = {
    "full": "all taps and channels sampled before the product",
    "split": "taps and channels sampled in chunks, whose products are added up",
    "depthwise": "sampled and multiplied in one step",
}
_CHOICES = {
    "register_pixels": "{} pixels in a register tile",
    "register_blocks": "{} vectors of channels in registers",
    "tile_units": "tiles of up to {} units of {granule} pixels",
    "taps": "{} taps sampled at a time",
    "channels": "{} channels sampled at a time",
    "unroll": "reduction unrolled {} times",
}


def describe_decisions(decisions: Decisions, granule: int) -> str:
    """Return what a schedule does, in one sentence.

    Parameters
    ----------
    decisions : Decisions
    granule : int
        Pixels in a unit.
    """
    reduction, *rest = decisions.variant.split("-")
    words = [f"variant {decisions.variant}"]
    if reduction in _REDUCTIONS:
        words.append(_REDUCTIONS[reduction])
        if len(rest) == 2 and rest[0].isdecimal():
            words.append(f"{rest[0]} vectors of output channels in registers")
            words.append(f"sampling plan per {rest[1]}")
    for name, value in decisions.values.items():
        words.append(_CHOICES.get(name, f"{name} {{}}").format(value, granule=granule))
    return "; ".join(words)
