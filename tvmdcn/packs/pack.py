# SPDX-License-Identifier: Apache-2.0
"""A pack on disk: read, checked, and its kernels loaded, in that order.

What is loaded runs its code, so a file is opened only at a path that the manifest allows, and used only if its
digest is the manifest's. The digests say that the files are those the manifest was written for; whose manifest
it is, only the digest of the manifest itself can say, which one may give (`sha256`).
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from tvmdcn import cache, native
from tvmdcn.artifact import Artifact, DamagedArtifact
from tvmdcn.errors import ArtifactError, ArtifactMissing
from tvmdcn.packs.choice import best_processor, built_for
from tvmdcn.packs.manifest import (
    MANIFEST,
    MANIFEST_LIMIT,
    RUNTIME,
    PackedKernel,
    PackManifest,
    libraries_of,
)
from tvmdcn.spec import DeformConv2dSpec
from tvmdcn.target import TargetInfo, detect_target, resolve_target

if TYPE_CHECKING:
    from tvmdcn.compiled import CompiledKernel

__all__ = ["KernelPack", "PackedArtifact"]

_ADVICE = "Copy the pack, without links, to a directory that belongs to you or to root."


def _content(path: Path, size: int) -> bytes:
    """Return what a file holds, up to one byte more than the size that it should have.

    Raises
    ------
    OSError
        If it cannot be read, or is no file.
    """
    # A pipe in the place of a file would be waited for.
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "it is not a file")
        return file.read(size + 1)


@dataclass(frozen=True, eq=False)
class KernelPack:
    """A pack whose manifest is read and checked; its files are checked when they are loaded, or by :meth:`verify`.

    Parameters
    ----------
    path : Path
        Its directory.
    manifest : PackManifest
        What it says of itself.
    sha256 : str
        Digest of ``manifest.json``, which stands for all of the pack.
    installed : bool
        Whether it was found among the installed Python packages. Whoever may write there can make this process run
        what he likes, so owners and modes of its files are not looked at.
    """

    path: Path
    manifest: PackManifest
    sha256: str
    installed: bool = False
    _artifacts: dict[str, PackedArtifact] = field(default_factory=dict, repr=False)

    @classmethod
    def read(cls, path: str | os.PathLike[str], sha256: str | None = None, installed: bool = False) -> KernelPack:
        """Return the pack in a directory.

        Parameters
        ----------
        path : path
            The directory; it may be reached through links, but hold none.
        sha256 : str, optional
            The digest that the manifest must have, as ``tvmdcn pack`` printed it.
        installed : bool
            See :class:`KernelPack`.

        Raises
        ------
        ArtifactError
            If there is no pack, it is damaged, of another version, not the one of this digest, or somebody else can
            have written it.
        """
        given = Path(path).expanduser().absolute()
        try:
            root = given.resolve(strict=True)
        except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links
            reason = error.strerror if isinstance(error, OSError) else "its path is a loop of links"
            raise ArtifactError(f"{given} holds no pack: {reason}.") from error
        if not installed:
            cache.check_trusted(root / MANIFEST, root, _ADVICE)
        try:
            text = _content(root / MANIFEST, MANIFEST_LIMIT)
        except OSError as error:
            raise ArtifactError(f"{given} holds no pack: {MANIFEST}: {error.strerror}.") from error
        found = hashlib.sha256(text).hexdigest()
        if sha256 is not None and found != sha256.lower():
            raise ArtifactError(
                f"{root / MANIFEST} has the digest {found}, not {sha256}, which was asked for: it is another pack."
            )
        try:
            if len(text) > MANIFEST_LIMIT:
                raise ArtifactError(f"it is larger than {MANIFEST_LIMIT} bytes.")
            return cls(root, PackManifest.from_text(text), found, installed)
        except ArtifactError as error:
            raise ArtifactError(f"{root} is no pack that can be used: {error}") from error

    @property
    def kernels(self) -> tuple[PackedKernel, ...]:
        """What is in the pack."""
        return self.manifest.kernels

    def __repr__(self) -> str:
        """Return name, version, path and what is in it."""
        targets = ", ".join(dict.fromkeys(kernel.target.tag for kernel in self.kernels)) or "nothing"
        name = f"{self.manifest.name} {self.manifest.version}"
        return f"KernelPack({name}, {str(self.path)!r}, {len(self.kernels)} kernels: {targets})"

    # --- kernels -------------------------------------------------------------------------------------------

    @cached_property
    def _by_spec(self) -> dict[DeformConv2dSpec, list[PackedKernel]]:
        found: dict[DeformConv2dSpec, list[PackedKernel]] = {}
        for kernel in self.kernels:
            found.setdefault(kernel.spec, []).append(kernel)
        return found

    def of_layer(self, spec: DeformConv2dSpec) -> Sequence[PackedKernel]:
        """Return the kernels of a layer, for whatever targets."""
        return self._by_spec.get(spec, ())

    def find(self, spec: DeformConv2dSpec, target: TargetInfo | None = None) -> PackedArtifact | None:
        """Return the kernel of a layer for a target, None if there is none.

        Parameters
        ----------
        spec : DeformConv2dSpec or DeformConv2dGradSpec
            What to compute.
        target : TargetInfo, optional
            Exactly this one. Otherwise what suits this machine's processor best: its own, else the target with the
            widest vectors of those whose features it has.

        Raises
        ------
        ArtifactError
            If the manifest of the kernel is damaged.
        """
        built = self.of_layer(spec)
        chosen = best_processor(built) if target is None else built_for(built, target)
        return None if chosen is None else self.artifact(chosen)

    def load(
        self, spec: DeformConv2dSpec, target: str | TargetInfo | None = None, threads: int | None = None
    ) -> CompiledKernel:
        """Return the kernel of a layer from this pack; arguments as of :func:`tvmdcn.load`.

        Raises
        ------
        ArtifactMissing
            If the pack has none that runs here; the message says what it has.
        ArtifactError
            If a file is damaged, or the installed runtime is of another version.
        """
        from tvmdcn.runtime import open_kernel

        artifact = self.find(spec, None if target is None else resolve_target(target))
        if artifact is None:
            raise ArtifactMissing(f"{self.describe(spec, target)} Add the target or the layer to tvmdcn pack.")
        return open_kernel(artifact, threads)

    def describe(self, spec: DeformConv2dSpec, target: str | TargetInfo | None = None) -> str:
        """Return in a sentence what the pack has of a layer, or instead of it."""
        name = f"The pack {self.manifest.name} {self.manifest.version} ({self.path})"
        tags = [kernel.target.tag for kernel in self.of_layer(spec)]
        if tags:
            wanted = resolve_target(target)
            reason = f"none is for {wanted.tag}" if target is not None else f"this machine, {wanted.tag}, can run none"
            return f"{name} has {spec.operator} {spec.slug} for {', '.join(tags)}; {reason}."
        layers = sorted({f"{kernel.spec.operator} {kernel.spec.slug}" for kernel in self.kernels})
        shown = ", ".join(layers[:4]) + (f" and {len(layers) - 4} more" if len(layers) > 4 else "")
        return f"{name} has no {spec.operator} {spec.slug}; it has {shown or 'no kernels'}."

    def artifact(self, kernel: PackedKernel) -> PackedArtifact:
        """Return a kernel of the pack as an artifact.

        Raises
        ------
        ArtifactError
            If its manifest is not the one that the pack was made with, or says something else than the pack's.
        """
        known = self._artifacts.get(kernel.path)
        return self._artifacts.setdefault(kernel.path, self._read_artifact(kernel)) if known is None else known

    def _read_artifact(self, kernel: PackedKernel) -> PackedArtifact:
        self.check(f"{kernel.path}/{MANIFEST}")
        plain = Artifact.read(self.path / kernel.path)
        library = self.manifest.files[f"{kernel.path}/kernel.so"].sha256
        versions = plain.key.tvm, plain.key.tvm_ffi
        if (plain.spec, plain.target, plain.sha256) != (kernel.spec, kernel.target, library) or versions != (
            self.manifest.tvm,
            self.manifest.tvm_ffi,
        ):
            raise DamagedArtifact(f"{plain.path / MANIFEST} contradicts the manifest of its pack. {self._remedy}")
        return PackedArtifact(**vars(plain), pack=self)

    # --- files ---------------------------------------------------------------------------------------------

    @property
    def _remedy(self) -> str:
        return f"Install {self.manifest.name} again." if self.installed else "Copy the pack here again."

    def check_trusted(self, name: str) -> None:
        """Check that nobody else can have written a file of the pack, unless it is installed.

        Raises
        ------
        ArtifactError
            If somebody can.
        """
        if not self.installed:
            cache.check_trusted(self.path / name, self.path, _ADVICE)

    def check(self, name: str) -> Path:
        """Check that a file is there, trusted, and the one of the manifest; return its path.

        Raises
        ------
        ArtifactError
            If it is not.
        """
        record, path = self.manifest.files[name], self.path / name
        self.check_trusted(name)
        try:
            data = _content(path, record.bytes)
        except OSError as error:
            raise DamagedArtifact(f"{path} cannot be read: {error.strerror}. {self._remedy}") from error
        found = hashlib.sha256(data).hexdigest()
        if len(data) != record.bytes or found != record.sha256:
            raise DamagedArtifact(
                f"{path} is not the file that its pack was made with (sha256 {found[:12]}..., expected "
                f"{record.sha256[:12]}...): it is damaged, or was changed. {self._remedy}"
            )
        return path

    def verify(self) -> None:
        """Check every file of the pack against its digest, and every kernel's manifest against the pack's.

        Raises
        ------
        ArtifactError
            At the first file that is missing, damaged or not trusted.
        """
        for name in self.manifest.files:
            self.check(name)
        for kernel in self.kernels:
            self._read_artifact(kernel)

    # --- what runs kernels ------------------------------------------------------------------------------------

    def provide_runtime(self) -> None:
        """Make sure that this process runs kernels with the versions they were built with, perhaps the pack's own.

        An installed apache-tvm or apache-tvm-ffi comes first, so that a process that also uses them by other ways has
        one of each; where it is missing, the pack's library is used.

        Raises
        ------
        ArtifactError
            If another version is installed or in use, or a library is neither installed nor in the pack.
        """
        wanted = {"tvm": self.manifest.tvm, "tvm_ffi": self.manifest.tvm_ffi}
        arch = detect_target().arch
        libraries: dict[str, native.Provided] = {}
        for name, package in libraries_of(arch, self.kernels).items():
            version, distribution = native.installed_version(package), native.DISTRIBUTIONS[package]
            short = name.removeprefix("lib").removesuffix(".so")
            if version is None and arch in self.manifest.runtime:
                path = f"{RUNTIME}/{arch}/{name}"
                libraries[short] = native.Provided(self.path / path, wanted[package], self._checker(path))
            elif version is None and not native.is_provided(short):
                raise ArtifactError(
                    f"{name} is needed to run kernels: {distribution} is not installed, and the pack "
                    f"{self.manifest.name} ({self.path}) carries no runtime for {arch}. Install "
                    f"{distribution}=={wanted[package]}, or make the pack with its runtime (tvmdcn pack --runtime)."
                )
            elif version is not None and version != wanted[package]:
                raise ArtifactError(
                    f"the pack {self.manifest.name} ({self.path}) was built with {distribution} {wanted[package]}, "
                    f"and {distribution} {version} is installed. Install {distribution}=={wanted[package]}, or make "
                    "the pack again."
                )
        native.provide(libraries)

    def _checker(self, name: str) -> Callable[[], object]:
        return lambda: self.check(name)


@dataclass(frozen=True)
class PackedArtifact(Artifact):
    """An artifact that lies in a pack.

    Parameters
    ----------
    pack : KernelPack
        Where it lies; the others are :class:`Artifact`'s.
    """

    pack: KernelPack = field(repr=False, compare=False)

    def load(self) -> native.Module:
        """Load the compiled module, after checking its file, who can have written it, and what it is to run with.

        Raises
        ------
        ArtifactError
            If any of these is not as it should be.
        """
        self.pack.provide_runtime()
        self.pack.check(self._name(self.library.name))
        return super().load()

    def _name(self, file: str) -> str:
        return f"{self.path.relative_to(self.pack.path).as_posix()}/{file}"

    def _check_trusted(self) -> None:
        for file in (self.library.name, MANIFEST):
            self.pack.check_trusted(self._name(file))
