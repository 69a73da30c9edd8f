# SPDX-License-Identifier: Apache-2.0
"""Artifacts whose library is none: for tests that never load it."""

from __future__ import annotations

from pathlib import Path

from handmade import SPEC

from tvmdcn.artifact import Artifact, build_once
from tvmdcn.cache_key import CacheKey
from tvmdcn.kernel_interface import KernelInterface
from tvmdcn.spec import DeformConv2dSpec
from tvmdcn.target import detect_target

INTERFACE = KernelInterface(6, 3, (2, 1, 6, 3, 4), "float32", "NCHW")


def fake(directory: Path) -> tuple[KernelInterface, dict[str, str]]:
    """Write a library that is none: for tests that never load it."""
    (directory / "kernel.so").write_bytes(b"not a library")
    return INTERFACE, {"source": "test"}


def build_fake(schedule: str = "tuned", spec: DeformConv2dSpec = SPEC, make=fake, **options) -> Artifact:
    host = detect_target()
    return build_once(CacheKey.of(spec, host, schedule), host, make, **options)


def never(directory: Path):
    raise AssertionError("built again")
