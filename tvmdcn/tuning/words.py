# SPDX-License-Identifier: Apache-2.0
"""Schedules in words, for people who have not read the design space."""

from __future__ import annotations

from tvmdcn.space import Decisions

__all__ = ["describe_decisions", "variant_parts"]

# What the variants and the choices of schedules/llvm, and some of schedules/cuda, mean; what is not listed stands for
# itself. By how the name of a variant begins: what it does, and what the other parts of the name say.
_OUTPUTS = ("{} vectors of output channels in registers", "sampling plan per {}")
_INPUTS = ("{} vectors of input channels in registers",)
_VARIANTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "full": ("all taps and channels sampled before the product", _OUTPUTS),
    "split": ("taps and channels sampled in chunks, whose products are added up", _OUTPUTS),
    "depthwise": ("sampled and multiplied in one step", ()),
    # gradients
    "stored": ("sampling plan and output gradients prepared once, for the whole call", _INPUTS),
    "own": ("sampling plan and output gradients prepared by each block of channels", _INPUTS),
    "shared": ("sampling plan and output gradients prepared tile by tile for all channels", _INPUTS),
    "bias": ("sums of the output's gradient only", ()),
}
_CHOICES = {
    "register_pixels": "{} pixels in a register tile",
    "register_blocks": "{} vectors of channels in registers",
    "tile_units": "tiles of up to {} units of {granule} pixels",
    "taps": "{} taps sampled at a time",
    "channels": "{} channels sampled at a time",
    "unroll": "reduction unrolled {} times",
    "weight_vectors": "weight's gradient with {} vectors of channels in registers",
    "register_outputs": "weight's gradient with {} output channels in registers",
    "unroll_pixels": "weight's gradient with its sum over pixels unrolled {} times",
    "splits": "sums in {} parts",
}
# What the parts of a variant's name decide, by its first part.
_PARTS = {
    **dict.fromkeys(("full", "split"), ("reduction", "vectors", "plan per")),
    **dict.fromkeys(("stored", "own", "shared"), ("order", "vectors")),
    **dict.fromkeys(("mma", "simt", "gather"), ("product", "plan per")),
}


def variant_parts(variant: str) -> dict[str, str]:
    """Return what the name of a variant decides, part by part; the whole name where its parts mean nothing here."""
    parts = variant.split("-")
    names = _PARTS.get(parts[0], ())
    if parts[-1] == "planes":
        names = (*names, "corners from")
    return dict(zip(names, parts, strict=True)) if len(names) == len(parts) else {"variant": variant}


def describe_decisions(decisions: Decisions, granule: int) -> str:
    """Return what a schedule does, in one sentence.

    Parameters
    ----------
    decisions : Decisions
    granule : int
        Pixels in a unit.
    """
    first, *rest = decisions.variant.split("-")
    words = [f"variant {decisions.variant}"]
    if first in _VARIANTS:
        what, parts = _VARIANTS[first]
        words.append(what)
        if len(rest) == len(parts) and rest[:1] and rest[0].isdecimal():
            words += [part.format(value) for part, value in zip(parts, rest, strict=True)]
    for name, value in decisions.values.items():
        words.append(_CHOICES.get(name, f"{name} {{}}").format(value, granule=granule))
    return "; ".join(words)
