# SPDX-License-Identifier: Apache-2.0
"""Where kernels come from: memory, the cache on disk, or a build. The compiler is imported only to build."""

from __future__ import annotations

import logging
import threading
from collections.abc import Hashable
from pathlib import Path
from typing import overload

from tvmdcn import cache, env
from tvmdcn.artifact import Artifact, DamagedArtifact, find, nearest
from tvmdcn.cache_key import CacheKey
from tvmdcn.compiled import CompiledKernel
from tvmdcn.errors import ArtifactMissing, BuildError, SpecError, SpecTypeError
from tvmdcn.grad_kernel import GradKernel
from tvmdcn.kernel import Kernel
from tvmdcn.spec import DeformConv2dGradSpec, DeformConv2dSpec
from tvmdcn.target import TargetInfo, resolve_target
from tvmdcn.validation import shown

__all__ = ["KERNELS", "load", "open_kernel"]

_log = logging.getLogger(__name__)

KERNELS: dict[str, type[CompiledKernel]] = {kernel.operator: kernel for kernel in (Kernel, GradKernel)}
"""How the compiled functions of an operator are called."""

_loaded: dict[Hashable, CompiledKernel] = {}
_locks: dict[Hashable, threading.RLock] = {}


def open_kernel(artifact: Artifact, threads: int | None = None) -> CompiledKernel:
    """Return the kernel of an artifact, of the kind of its operator.

    Raises
    ------
    ArtifactError
        If the artifact is refused or cannot be loaded.
    """
    return KERNELS[artifact.spec.operator](artifact, threads)


@overload
def load(  # type: ignore[overload-overlap]
    spec: DeformConv2dGradSpec,
    target: str | TargetInfo | None = ...,
    schedule: str = ...,
    threads: int | None = ...,
    cache_dir: Path | None = ...,
) -> GradKernel: ...


@overload
def load(
    spec: DeformConv2dSpec,
    target: str | TargetInfo | None = ...,
    schedule: str = ...,
    threads: int | None = ...,
    cache_dir: Path | None = ...,
) -> Kernel: ...


def load(
    spec: DeformConv2dSpec,
    target: str | TargetInfo | None = None,
    schedule: str = "tuned",
    threads: int | None = None,
    cache_dir: Path | None = None,
) -> CompiledKernel:
    """Return the kernel of a layer: from memory, else from the cache on disk, else built (see TVMDCN_BUILD).

    Parameters
    ----------
    spec : DeformConv2dSpec or DeformConv2dGradSpec
        What to compute.
    target : str or TargetInfo, optional
        This machine by default (or TVMDCN_TARGET).
    schedule : str
        "tuned" (the best record of the target, else the default decisions), "default" or "naive".
    threads : int, optional
        Threads of each call; see :class:`Kernel`.
    cache_dir : Path, optional
        TVMDCN_CACHE_DIR by default.

    Returns
    -------
    Kernel or GradKernel

    Raises
    ------
    SpecError, SpecTypeError
        If an argument is not understood.
    ArtifactMissing
        If TVMDCN_BUILD=never and there is no artifact; names the nearest one and how it differs.
    ArtifactError
        If the cache is refused, or the runtime cannot be loaded.
    BuildError
        If the build fails.
    """
    if not isinstance(spec, DeformConv2dSpec):
        raise SpecTypeError(
            f"spec must be a DeformConv2dSpec or DeformConv2dGradSpec, got {shown(spec)} of type {type(spec).__name__}."
        )
    if schedule not in ("tuned", "default", "naive"):
        raise SpecError(
            f"schedule must be 'tuned', 'default' or 'naive', got {shown(schedule)}. For decisions of your "
            f"own: tvmdcn.{KERNELS[spec.operator].__name__}(tvmdcn.build(spec, schedule=decisions))."
        )
    info = resolve_target(target)
    root = env.cache_dir() if cache_dir is None else Path(cache_dir).absolute()
    identity = (spec, info, schedule, root, threads, env.num_threads())
    with _locks.setdefault(identity, threading.RLock()):
        kernel = _loaded.get(identity)
        if kernel is None:
            kernel = _loaded[identity] = _obtain(spec, info, schedule, threads, root)
    return kernel


def _obtain(
    spec: DeformConv2dSpec, target: TargetInfo, schedule: str, threads: int | None, root: Path
) -> CompiledKernel:
    mode = env.build_mode()
    key = CacheKey.of(spec, target, schedule)
    if mode != "rebuild":
        artifact = find(key, root)
        if artifact is None and mode == "never":
            artifact = _substitute(key, root)
        if artifact is not None:
            try:
                return open_kernel(artifact, threads)
            except DamagedArtifact as error:
                if mode == "never":
                    raise
                _log.warning("%s It is built anew.", error)
                return open_kernel(_build(key, spec, target, schedule, root, artifact), threads)
    return open_kernel(_build(key, spec, target, schedule, root, None), threads)


def _substitute(key: CacheKey, root: Path) -> Artifact:
    """Return an artifact that differs in nothing but the records it was tuned with, or say what there is."""
    near = nearest(key, root)
    if near is not None and all(line.startswith("records:") for line in near[1]):
        _log.info("%s was built with other tuning records than are here; TVMDCN_BUILD=never, so used", near[0].path)
        return near[0]
    message = (
        f"there is no artifact for {key.path(root).name} (schedule {key.schedule!r}) in {root}, and "
        "TVMDCN_BUILD=never forbids to build one. "
    )
    if near is not None:
        message += f"The nearest is {near[0].path}; it differs in {'; '.join(near[1])}. "
    raise ArtifactMissing(
        message + "Build it where a compiler is (tvmdcn.build), copy the cache here, or set TVMDCN_BUILD=auto."
    )


def _build(
    key: CacheKey,
    spec: DeformConv2dSpec,
    target: TargetInfo,
    schedule: str,
    root: Path,
    damaged: Artifact | None,
) -> Artifact:
    path = key.path(root)
    cache.make_private(path.parent, root)
    # Taken before the compiler is imported: of many processes that start at once, one imports it (2 s) and
    # builds.
    with cache.lock(path):
        found = find(key, root) if env.build_mode() != "rebuild" else None
        if found is not None and (damaged is None or found.sha256 != damaged.sha256):
            return found
        if damaged is not None:
            damaged.discard()
        _log.info("building %s for %s (schedule: %s)", path.name, target.tag, schedule)
        try:
            from tvmdcn import builder
        except (ModuleNotFoundError, OSError) as error:
            if isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] == __package__:
                raise
            raise BuildError(
                f"{path.name} is not in {root}, and cannot be built: the compiler is missing ({error}). "
                "Install apache-tvm as tvmdcn pins it, or copy the cache of a machine that has it."
            ) from error
        rebuild = env.build_mode() == "rebuild"
        return builder.build(spec, target, schedule, cache_dir=root, rebuild=rebuild)
