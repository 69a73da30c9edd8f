# SPDX-License-Identifier: Apache-2.0
"""Where kernels come from: memory, packs, the cache on disk, or a build. The compiler is imported only to build."""

from __future__ import annotations

import functools
import logging
import os
import threading
from collections.abc import Hashable
from dataclasses import replace
from pathlib import Path
from typing import overload

from tvmdcn import cache, env, native
from tvmdcn.artifact import Artifact, DamagedArtifact, find, nearest
from tvmdcn.cache_key import CacheKey
from tvmdcn.compiled import CompiledKernel
from tvmdcn.cuda_grad_kernel import CudaGradKernel
from tvmdcn.cuda_kernel import CudaKernel
from tvmdcn.errors import ArtifactError, ArtifactMissing, BuildError, MissingExtra, SpecError, SpecTypeError
from tvmdcn.grad_kernel import GradKernel
from tvmdcn.kernel import Kernel
from tvmdcn.packs import active
from tvmdcn.spec import DeformConv2dGradSpec, DeformConv2dSpec
from tvmdcn.target import TargetInfo, device_target, resolve_target
from tvmdcn.validation import shown

__all__ = ["KERNELS", "load", "load_for", "open_kernel"]

_log = logging.getLogger(__name__)

KERNELS: dict[str, type[CompiledKernel]] = {kernel.operator: kernel for kernel in (Kernel, GradKernel)}
"""How the compiled functions of an operator are called."""
_CUDA_KERNELS: dict[str, type[CompiledKernel]] = {kernel.operator: kernel for kernel in (CudaKernel, CudaGradKernel)}

_loaded: dict[Hashable, CompiledKernel] = {}
_locks: dict[Hashable, threading.RLock] = {}


@functools.lru_cache(maxsize=1)
def _watch_forks() -> None:
    """Have forked children make locks of their own: a thread that holds one, building, is not there."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_locks.clear)


def open_kernel(artifact: Artifact, threads: int | None = None) -> CompiledKernel:
    """Return the kernel of an artifact, of the kind of its operator.

    Raises
    ------
    ArtifactError
        If the artifact is refused or cannot be loaded.
    """
    if artifact.target.kind == "cuda":
        return _CUDA_KERNELS[artifact.spec.operator](artifact, threads)
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
    """Return the kernel of a layer: from memory, a pack, the cache on disk, or built now (see TVMDCN_BUILD).

    Parameters
    ----------
    spec : DeformConv2dSpec or DeformConv2dGradSpec
        What to compute.
    target : str or TargetInfo, optional
        This machine by default (or TVMDCN_TARGET).
    schedule : str
        "tuned" (the best record of the target, else the default decisions), "default" or "naive". Only for "tuned" are
        packs looked in.
    threads : int, optional
        Threads of each call; see :class:`Kernel`.
    cache_dir : Path, optional
        TVMDCN_CACHE_DIR by default. If given, packs are not looked in.

    Returns
    -------
    Kernel or GradKernel

    Raises
    ------
    SpecError, SpecTypeError
        If an argument is not understood.
    ArtifactMissing
        If TVMDCN_BUILD=never and there is no artifact; names the nearest one and how it differs, and what packs have.
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
    in_packs = schedule == "tuned" and cache_dir is None and env.build_mode() != "rebuild"
    packed = active.find(spec, info) if in_packs else None
    if packed is not None:
        root = packed.path
    elif cache_dir is not None:
        root = Path(cache_dir).absolute()
    else:
        root = _cache(spec, info)
    identity = (spec, info, schedule, root, threads, env.num_threads())
    _watch_forks()
    with _locks.setdefault(identity, threading.RLock()):
        kernel = _loaded.get(identity)
        if kernel is None and packed is not None:
            try:
                kernel = _loaded[identity] = open_kernel(packed, threads)
            except ArtifactError as error:
                active.pass_over(packed.pack, error)
        elif kernel is None:
            kernel = _loaded[identity] = _obtain(spec, info, schedule, threads, root)
    # Without the pack that failed.
    return load(spec, info, schedule, threads) if kernel is None else kernel


@overload
def load_for(  # type: ignore[overload-overlap]
    spec: DeformConv2dGradSpec, gpu: tuple[int, bool] | None
) -> GradKernel: ...


@overload
def load_for(spec: DeformConv2dSpec, gpu: tuple[int, bool] | None) -> Kernel: ...


def load_for(spec: DeformConv2dSpec, gpu: tuple[int, bool] | None) -> CompiledKernel:
    """Return the kernel of a layer for arrays of the host, or of a GPU.

    Parameters
    ----------
    spec : DeformConv2dSpec or DeformConv2dGradSpec
        What to compute.
    gpu : (int, bool) or None
        Number of the GPU, and whether float32 may be rounded to tf32. None: the host.

    Raises
    ------
    ArtifactError, BuildError, DeviceError
        As :func:`load`; DeviceError if there are no kernels for the GPU.
    """
    if gpu is None:
        return load(spec)
    number, tf32 = gpu
    return load(replace(spec, tf32=True) if tf32 else spec, device_target(number))


def _cache(spec: DeformConv2dSpec, target: TargetInfo) -> Path:
    """Return the cache directory, where no pack has a kernel."""
    try:
        return env.cache_dir()
    except MissingExtra as error:
        raise _missing(spec, target, str(error)) from error


def _missing(spec: DeformConv2dSpec, target: TargetInfo, reason: str) -> ArtifactMissing:
    """Return the error of a machine that can neither build kernels nor know those of a cache."""
    if native.installed_version("tvm") is None:
        reason = "apache-tvm is not installed (pip install tvmdcn, without --no-deps, installs the pinned one)"
    packs = active.describe(spec, target) or "No pack is loaded or installed, and TVMDCN_PACK is not set."
    return ArtifactMissing(
        f"there is no kernel of {spec.operator} {spec.slug} here. {packs} Nor can one be built: {reason.rstrip('.')}."
    )


def _obtain(
    spec: DeformConv2dSpec, target: TargetInfo, schedule: str, threads: int | None, root: Path
) -> CompiledKernel:
    mode = env.build_mode()
    try:
        key = CacheKey.of(spec, target, schedule)
    except ArtifactError as error:  # what builds kernels, and names them, is not installed
        raise _missing(spec, target, str(error)) from error
    if mode != "rebuild":
        artifact = find(key, root)
        if artifact is None and mode == "never":
            artifact = _substitute(key, root, active.describe(spec, target))
        if artifact is not None:
            try:
                return open_kernel(artifact, threads)
            except DamagedArtifact as error:
                again = find(key, root) if mode == "never" else None
                if again not in (None, artifact):  # it was replaced while it was read
                    return open_kernel(again, threads)
                if mode == "never":
                    raise
                _log.debug("%s", error)
    return _build(key, spec, target, schedule, threads, root)


def _substitute(key: CacheKey, root: Path, packs: str) -> Artifact:
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
    message += f"{packs} " if packs else ""
    raise ArtifactMissing(
        message + "Build it where a compiler is (tvmdcn.build), copy the cache here, or set TVMDCN_BUILD=auto."
    )


def _build(
    key: CacheKey, spec: DeformConv2dSpec, target: TargetInfo, schedule: str, threads: int | None, root: Path
) -> CompiledKernel:
    path = key.path(root)
    cache.make_private(path.parent, root)
    # Taken before the compiler is imported: of many processes that start at once, one imports it (2 s) and
    # builds. Kept until the kernel is loaded: others may be about to replace it.
    with cache.lock(path):
        found = find(key, root) if env.build_mode() != "rebuild" else None
        if found is not None:
            try:
                return open_kernel(found, threads)
            except DamagedArtifact as error:
                _log.warning("%s It is built anew.", error)
                found.discard()
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
        return open_kernel(builder.build(spec, target, schedule, cache_dir=root, rebuild=rebuild), threads)
