# SPDX-License-Identifier: Apache-2.0
"""The packs that this process looks for kernels in: loaded by the program, named in TVMDCN_PACK, installed.

Installed packs are directories of the namespace package ``tvmdcn_packs``. The import system finds it in 0.06 ms;
reading the entry points of all that is installed takes 24 ms (89 packages, Zen 5, Python 3.11, 2026-11), and every
program would wait for it, with packs or without.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import threading
from pathlib import Path

from tvmdcn import env
from tvmdcn.errors import ArtifactError
from tvmdcn.packs.manifest import MANIFEST
from tvmdcn.packs.pack import KernelPack, PackedArtifact
from tvmdcn.spec import DeformConv2dSpec
from tvmdcn.target import TargetInfo, detect_target, resolve_target

__all__ = ["NAMESPACE", "active_packs", "describe", "find", "load_pack", "pass_over"]

_log = logging.getLogger(__name__)

NAMESPACE = "tvmdcn_packs"
"""The package in which wheels put their packs, each a directory."""

_loaded: list[KernelPack] = []
_passed_over: dict[Path, str] = {}
_lock = threading.Lock()


def load_pack(path: str | os.PathLike[str], sha256: str | None = None) -> KernelPack:
    """Read a pack, and take kernels from it from now on, before any other pack and before the cache.

    :func:`tvmdcn.load`, :func:`tvmdcn.deform_conv2d`, its gradients and the layers all do, wherever it has the layer
    for a target that this machine can run. Load packs before the first call: a layer that has been called keeps the
    kernel that it has.

    Parameters
    ----------
    path : path
        The directory that ``tvmdcn pack`` wrote.
    sha256 : str, optional
        The digest that the command printed. With it, the pack is that one or refused; without it, its files are
        checked against its manifest, and the manifest is trusted because of who can have written it.

    Returns
    -------
    KernelPack
        What it has, and kernels from it alone (``load``). ``verify`` checks every file now, rather than at its use.

    Raises
    ------
    ArtifactError
        If it is no pack, is damaged, of another version, another one, or somebody else can have written it.
    """
    pack = KernelPack.read(path, sha256)
    with _lock:
        _loaded[:] = [pack, *(known for known in _loaded if known.path != pack.path)]
    return pack


@functools.lru_cache(maxsize=16)
def _named(path: Path) -> KernelPack:
    return KernelPack.read(path)


@functools.lru_cache(maxsize=1)
def _installed() -> tuple[KernelPack, ...]:
    """Return the installed packs that can be used."""
    spec = importlib.util.find_spec(NAMESPACE)
    found = []
    for root in (spec.submodule_search_locations or ()) if spec else ():
        for manifest in sorted(Path(root).glob(f"*/{MANIFEST}")):
            try:
                found.append(KernelPack.read(manifest.parent, installed=True))
            except ArtifactError as error:
                _pass_over(manifest.parent, error)
    return tuple(found)


def _pass_over(path: Path, error: ArtifactError) -> None:
    if path not in _passed_over:
        _passed_over[path] = str(error)
        _log.warning("%s It is passed over.", error)


def pass_over(pack: KernelPack, error: ArtifactError) -> None:
    """Do without a pack from now on, with a warning, if it is only installed; raise the error if it was named."""
    if not pack.installed:
        raise error
    _pass_over(pack.path, error)


def active_packs() -> list[KernelPack]:
    """Return the packs in force, in the order in which they are looked in.

    Raises
    ------
    ArtifactError
        If a pack that TVMDCN_PACK names cannot be used.
    SettingError
        If TVMDCN_PACK names what is no directory.
    """
    packs = [*_loaded, *map(_named, env.packs()), *_installed()]
    return [pack for pack in packs if pack.path not in _passed_over]


def find(spec: DeformConv2dSpec, target: str | TargetInfo | None) -> PackedArtifact | None:
    """Return the kernel of a layer from the first pack that has one for a target; None if none has.

    Parameters
    ----------
    spec : DeformConv2dSpec or DeformConv2dGradSpec
        What to compute.
    target : str, TargetInfo or None
        As of :func:`tvmdcn.load`. A target other than this machine must be matched exactly; for this machine the best
        one that it can run is taken.

    Raises
    ------
    ArtifactError, SettingError
        As of :func:`active_packs`; also if the kernel's manifest is damaged.
    """
    packs = active_packs()
    if not packs:
        return None
    wanted = resolve_target(target)
    exact = None if wanted.identity() == detect_target().identity() else wanted
    for pack in packs:
        try:
            found = pack.find(spec, exact)
        except ArtifactError as error:
            pass_over(pack, error)
            continue
        if found is not None:
            return found
    return None


def describe(spec: DeformConv2dSpec, target: str | TargetInfo | None) -> str:
    """Return what the packs have instead of a kernel, in words; empty if there are no packs."""
    wanted = resolve_target(target)
    exact = None if wanted.identity() == detect_target().identity() else wanted
    words = [pack.describe(spec, exact) for pack in active_packs()]
    words += [f"An installed pack was passed over: {reason}" for reason in _passed_over.values()]
    return " ".join(words)
