# SPDX-License-Identifier: Apache-2.0
"""Where and how rows were measured, in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tvmdcn.bench.comparison import Section
from tvmdcn.report.rendering import plural

__all__ = ["describe_machine", "describe_place", "describe_size", "plain_convolution"]


def plain_convolution(direction: str) -> str:
    """Return what the plain convolution beside a layer is called."""
    return "plain conv2d" if direction == "forward" else "plain conv2d's backward"


def describe_place(section: Section) -> str:
    """Return direction, threads and whatever is not usual: caches, dtype, layout, device."""
    text = f"{section.direction.capitalize()}, {plural(section.threads, 'thread')}"
    if section.device != "cpu":
        text = f"{section.direction.capitalize()}, {section.device}"
    if section.cache != "warm":
        text += f", {section.cache} caches"
    if section.dtype != "float32":
        text += f", {section.dtype}"
    if section.layout != "NCHW":
        text += f", {section.layout}"
    return text


def describe_size(count: float) -> str:
    """Write a number of bytes."""
    if not count:
        return "unknown"
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.4g} {unit}"
    return f"{count:g} bytes"


def describe_machine(machine: Mapping[str, Any]) -> str:
    """Return a machine on one line, of the fields it has."""
    parts = [str(machine.get("cpu", "unknown processor"))]
    if "target" in machine:
        parts.append(str(machine["target"]))
    if "cores" in machine:
        parts.append(f"{machine['cores']} cores")
    if machine.get("hypervisor"):
        parts.append("virtual machine")
    if isinstance(machine.get("l2_bytes"), int):
        parts.append(f"L2 {describe_size(machine['l2_bytes'])}")
    if "system" in machine:
        parts.append(str(machine["system"]))
    return ", ".join(parts)
