# SPDX-License-Identifier: Apache-2.0
"""Packs for tests: kernels written by hand in C, which are compiled in a moment, for whatever targets."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import handmade
import pytest
from handmade import SPEC, variant

from tvmdcn.packs import active
from tvmdcn.packs.manifest import MANIFEST
from tvmdcn.packs.pack import KernelPack
from tvmdcn.packs.writer import build_pack
from tvmdcn.spec import DeformConv2dGradSpec, DeformConv2dSpec
from tvmdcn.target import detect_target

GRADIENTS = DeformConv2dGradSpec.of(SPEC)
OTHER = variant(dtype="float64")


def forget() -> None:
    """Forget the packs that this process knows."""
    active._loaded.clear()
    active._passed_over.clear()
    active._named.cache_clear()
    active._installed.cache_clear()


def packs_kernels(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Callable[..., KernelPack]:
    """Return what packs handmade kernels: by default of one layer for this machine, in `folder / "dcn_pack"`."""
    handmade.install(monkeypatch)

    def pack(
        *specs: DeformConv2dSpec, targets: tuple[Any, ...] = (), name: str = "dcn_pack", **options: Any
    ) -> KernelPack:
        return build_pack(specs or (SPEC,), targets or (detect_target(),), folder / name, **options)

    return pack


def edit(pack: KernelPack, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest of a pack."""
    data = json.loads((pack.path / MANIFEST).read_text())
    change(data)
    (pack.path / MANIFEST).write_text(json.dumps(data))
