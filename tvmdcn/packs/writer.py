# SPDX-License-Identifier: Apache-2.0
"""Making packs: build what is missing, copy it beside its place, and put it there in one step."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import logging
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

from tvmdcn import cache, native
from tvmdcn.artifact import Artifact
from tvmdcn.errors import ArtifactError, SpecError
from tvmdcn.packs.manifest import (
    CUDA_LIBRARY,
    LIBRARIES,
    LICENSES,
    MANIFEST,
    RUNTIME,
    FileRecord,
    PackedKernel,
    PackManifest,
    check_name,
    check_version,
    libraries_of,
)
from tvmdcn.packs.pack import KernelPack
from tvmdcn.spec import DeformConv2dSpec
from tvmdcn.target import TargetInfo, detect_target, resolve_target

__all__ = ["Source", "build_pack", "installed_runtime", "wheel_runtime"]

_log = logging.getLogger(__name__)

_PACKAGES = {**LIBRARIES, CUDA_LIBRARY: "tvm"}


class Source:
    """Runtime libraries of one architecture, with the licenses that they are distributed under.

    Parameters
    ----------
    arch : str
        "x86_64" or "aarch64".

    Attributes
    ----------
    versions : dict
        Versions by package ("tvm", "tvm_ffi").
    files : dict
        Contents by their path in a pack, each a function that reads it.
    """

    def __init__(self, arch: str) -> None:
        self.arch = arch
        self.versions: dict[str, str] = {}
        self.files: dict[str, Callable[[], bytes]] = {}

    @property
    def missing(self) -> list[str]:
        """The distributions whose library is not here."""
        names = (f"{RUNTIME}/{self.arch}/{name}" for name in LIBRARIES)
        return [
            native.DISTRIBUTIONS[package]
            for name, package in zip(names, LIBRARIES.values(), strict=True)
            if name not in self.files
        ]

    def _add(self, package: str, file: str, read: Callable[[], bytes]) -> None:
        """Take a file of a distribution if it is a library or a license."""
        name = file.rpartition("/")[2]
        if _PACKAGES.get(name) == package and file == f"{package}/lib/{name}":
            self.files[f"{RUNTIME}/{self.arch}/{name}"] = read
        elif ".dist-info/" in file and name in ("LICENSE", "NOTICE"):
            self.files[f"{LICENSES}/{native.DISTRIBUTIONS[package]}/{name}"] = read
        elif file == "tvm_ffi/3rdparty/libbacktrace/LICENSE":  # linked into libtvm_ffi.so
            self.files[f"{LICENSES}/libbacktrace/{name}"] = read


def installed_runtime() -> Source:
    """Return the runtime libraries of this machine, from the installed apache-tvm and apache-tvm-ffi.

    Raises
    ------
    ArtifactError
        If one of them is not installed.
    """
    source = Source(detect_target().arch)
    for package in LIBRARIES.values():
        name = native.DISTRIBUTIONS[package]
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError as error:
            raise ArtifactError(f"{name} is not installed, whose runtime library a pack carries.") from error
        source.versions[package] = distribution.version
        for file in distribution.files or ():
            source._add(package, file.as_posix(), Path(str(distribution.locate_file(file))).read_bytes)
    if source.missing:
        raise ArtifactError(f"the installed {source.missing[0]} has no runtime library. Install it from its wheel.")
    return source


def wheel_runtime(wheels: Iterable[Path]) -> list[Source]:
    """Return the runtime libraries that wheels of apache-tvm and apache-tvm-ffi hold, by architecture.

    Raises
    ------
    SpecError
        If a file is no such wheel, or of one architecture one of the two is missing.
    """
    found: dict[str, Source] = {}
    packages = {name.replace("-", "_"): package for package, name in native.DISTRIBUTIONS.items()}
    for wheel in wheels:
        name, _, rest = wheel.name.partition("-")
        arch = next((arch for arch in ("x86_64", "aarch64") if wheel.name.endswith(f"{arch}.whl")), None)
        if name not in packages or arch is None or not zipfile.is_zipfile(wheel):
            raise SpecError(
                f"{wheel} is no wheel of apache-tvm or apache-tvm-ffi for Linux. Fetch one with: pip download "
                "--no-deps --only-binary=:all: --platform manylinux_2_28_aarch64 apache-tvm==VERSION"
            )
        source = found.setdefault(arch, Source(arch))
        source.versions[packages[name]] = rest.partition("-")[0]
        with zipfile.ZipFile(wheel) as archive:
            for file in archive.namelist():
                source._add(packages[name], file, functools.partial(_zipped, wheel, file))
    for source in found.values():
        if source.missing:
            raise SpecError(f"a wheel of {source.missing[0]} for {source.arch} is missing: a pack needs both.")
    return list(found.values())


def _zipped(wheel: Path, file: str) -> bytes:
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(file)


def build_pack(
    specs: Iterable[DeformConv2dSpec],
    targets: Iterable[str | TargetInfo],
    output: str | os.PathLike[str],
    *,
    name: str | None = None,
    version: str = "1.0",
    runtimes: Sequence[Source] = (),
    cache_dir: Path | None = None,
    on_build: Callable[[Artifact], object] | None = None,
) -> KernelPack:
    """Build layers for targets, and write the pack of them.

    Everything is prepared beside `output` and renamed: others see all of a pack, or what was there before. What was
    built stays in the cache, so a packing that was interrupted goes on where it was.

    Parameters
    ----------
    specs : iterable of DeformConv2dSpec or DeformConv2dGradSpec
        The layers; for each the tuned schedule is taken, or the default where there is no record.
    targets : iterable of str or TargetInfo
        As of :func:`tvmdcn.build`.
    output : path
        The pack's directory. A pack that is there is replaced; anything else is left, with an error.
    name, version : str
        Of the pack; its name is by default that of `output`.
    runtimes : sequence of Source
        Runtime libraries to carry.
    cache_dir : Path, optional
        Where kernels are built; TVMDCN_CACHE_DIR by default.
    on_build : callable, optional
        Called with each artifact.

    Raises
    ------
    SpecError
        If a name or a target is not understood, or there is nothing to pack.
    BuildError
        If a kernel cannot be built, or no linker is there for a target.
    ArtifactError
        If `output` holds something that is no pack, or cannot be written; or a runtime is of another version than what
        kernels are built with.
    """
    place = Path(output).expanduser().absolute()
    name = check_name(place.name.replace("-", "_") if name is None else name)
    check_version(version)
    infos = list({info.tag: info for info in map(resolve_target, targets)}.values())
    layers = list(dict.fromkeys(specs))
    if not layers or not infos:
        raise SpecError("a pack needs at least one layer and one target.")
    _check_place(place)
    from tvmdcn.builder import build

    artifacts = []
    for info in infos:
        for spec in layers:
            artifacts.append(build(spec, info, cache_dir=cache_dir))
            if on_build is not None:
                on_build(artifacts[-1])
    versions = artifacts[0].key.tvm, artifacts[0].key.tvm_ffi
    for source in runtimes:
        if (source.versions["tvm"], source.versions["tvm_ffi"]) != versions:
            raise ArtifactError(
                f"the runtime for {source.arch} is of apache-tvm {source.versions['tvm']} and apache-tvm-ffi "
                f"{source.versions['tvm_ffi']}, and kernels are built with {versions[0]} and {versions[1]}."
            )
    with _alone(place.parent):
        _check_place(place)
        try:
            with cache.staging(place) as staged:
                manifest = _fill(staged, artifacts, runtimes, name, version)
                # The manifest is what makes it a pack, so it comes last.
                (staged / MANIFEST).write_text(manifest.to_text(), encoding="utf-8")
                _open_to_all(staged)
                cache.commit(staged, place)
        except OSError as error:
            raise ArtifactError(f"{place} cannot be written: {error.strerror}. Nothing of it was changed.") from error
        pack = KernelPack.read(place)
        pack.verify()
    _log.info("wrote %r", pack)
    return pack


def _check_place(place: Path) -> None:
    """Refuse a place that holds something else than a pack."""
    if not os.path.lexists(place) or (place.is_dir() and not place.is_symlink() and not any(place.iterdir())):
        return
    try:
        KernelPack.read(place)
    except ArtifactError as error:
        # A pack of another version may be replaced too.
        if '"format": "tvmdcn pack"' not in _beginning(place / MANIFEST):
            raise ArtifactError(f"{place} is there, and is no pack: it is left. Name another directory.") from error
    if place.is_symlink():
        raise ArtifactError(f"{place} is a symbolic link: it is left. Name the directory itself.")


def _beginning(path: Path) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read(200)
    except OSError:
        return ""


@contextlib.contextmanager
def _alone(parent: Path) -> Iterator[None]:
    """Let one process at a time write packs in a directory; one that is killed holds nothing."""
    try:
        parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(parent, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise ArtifactError(f"{parent} cannot be written: {error.strerror}.") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _fill(
    staged: Path, artifacts: Sequence[Artifact], runtimes: Sequence[Source], name: str, version: str
) -> PackManifest:
    """Copy artifacts and runtimes; return the manifest for them."""
    files: dict[str, FileRecord] = {}

    def put(path: str, data: bytes) -> None:
        file = staged / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
        files[path] = FileRecord(len(data), hashlib.sha256(data).hexdigest())

    kernels = []
    for artifact in artifacts:
        path = f"{artifact.target.tag}/{artifact.path.name}"
        for file in (artifact.library, artifact.path / MANIFEST):
            put(f"{path}/{file.name}", file.read_bytes())
        if files[f"{path}/{artifact.library.name}"].sha256 != artifact.sha256:
            raise ArtifactError(f"{artifact.library} is damaged. Delete {artifact.path}, and pack again.")
        kernels.append(PackedKernel(path, artifact.spec, artifact.target))
    for source in runtimes:
        libraries = {f"{RUNTIME}/{source.arch}/{name}" for name in libraries_of(source.arch, kernels)}
        for path, read in source.files.items():
            if path in libraries or path.startswith(f"{LICENSES}/"):
                put(path, read())
    key = artifacts[0].key
    return PackManifest(
        name,
        version,
        datetime.now(timezone.utc).isoformat(timespec="seconds"),
        metadata.version("tvmdcn"),
        key.tvm,
        key.tvm_ffi,
        tuple(kernels),
        tuple(source.arch for source in runtimes),
        files,
    )


def _open_to_all(staged: Path) -> None:
    """Let everybody read a pack, and nobody but its owner write, whatever the umask is."""
    for path in (staged, *staged.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
