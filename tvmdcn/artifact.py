# SPDX-License-Identifier: Apache-2.0
"""Built kernels on disk: ``kernel.so`` and ``manifest.json``, found by their key.

``<cache>/v<schema>/<target tag>/<operator>-<slug>-<12 hex digits>/``. The key holds contents and versions, no
times. Nothing here imports the compiler, torch or NumPy.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Any

from tvmdcn import cache, cuda_libraries, env, native
from tvmdcn.cache_key import ABI, SCHEMA, CacheKey
from tvmdcn.errors import ArtifactError, BuildError, SpecError, SpecTypeError
from tvmdcn.kernel_interface import KernelInterface
from tvmdcn.spec import DeformConv2dSpec, spec_from_json
from tvmdcn.target import TargetInfo
from tvmdcn.validation import shown

__all__ = [
    "Artifact",
    "CacheKey",
    "DamagedArtifact",
    "build_once",
    "find",
    "nearest",
]

_log = logging.getLogger(__name__)

LIBRARY, MANIFEST = "kernel.so", "manifest.json"
_MANIFEST_LIMIT = 4 << 20  # bytes; a schedule's trace takes some tens of thousands


class DamagedArtifact(ArtifactError):  # noqa: N818 - an error, named after what is damaged
    """The compiled module is not the one that the manifest was written for."""


def _seal(manifest: Mapping[str, Any]) -> str:
    """Return the digest of a manifest's other fields, which says that none of them has changed by accident."""
    fields = {name: value for name, value in manifest.items() if name != "digest"}
    return hashlib.sha256(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


@dataclass(frozen=True)
class Artifact:
    """A built kernel on disk.

    Parameters
    ----------
    path : Path
        The directory with ``kernel.so`` and ``manifest.json``.
    key : CacheKey
        What it was built from.
    spec : DeformConv2dSpec or DeformConv2dGradSpec
        What it computes.
    target : TargetInfo
        What it runs on.
    kernel : KernelInterface
        How it is called.
    schedule : dict
        How it came to its schedule: source, decisions in words, trace.
    created : str
        When it was built (ISO 8601, UTC).
    build_seconds : float
        How long that took.
    sha256 : str
        Digest of ``kernel.so``.
    """

    path: Path
    key: CacheKey
    spec: DeformConv2dSpec
    target: TargetInfo
    kernel: KernelInterface
    schedule: Mapping[str, Any]
    created: str
    build_seconds: float
    sha256: str

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Artifact:
        """Return the artifact in a directory, with its manifest checked; :meth:`load` checks ``kernel.so``.

        Raises
        ------
        ArtifactError
            If there is none, or the manifest is damaged or of another version.
        """
        path = Path(path).absolute()
        try:
            if not stat.S_ISREG(os.stat(path / MANIFEST).st_mode):  # reading a pipe would wait for ever
                raise ArtifactError(f"{path} holds no artifact: {MANIFEST} is not a file.")
            with open(path / MANIFEST, "rb") as file:
                text = file.read(_MANIFEST_LIMIT + 1)
        except (OSError, ValueError) as error:  # ValueError: a path with a zero byte in it
            reason = getattr(error, "strerror", None) or error
            raise ArtifactError(f"{path} holds no artifact: {MANIFEST}: {reason}.") from error
        try:
            if len(text) > _MANIFEST_LIMIT:
                raise ArtifactError(f"it is larger than {_MANIFEST_LIMIT} bytes.")
            return cls._parse(path, json.loads(text))
        except (ArtifactError, SpecError, SpecTypeError, ValueError, RecursionError) as error:
            raise ArtifactError(f"{path / MANIFEST} is damaged or of another version: {error}") from error

    @classmethod
    def _parse(cls, path: Path, data: Any) -> Artifact:
        if not isinstance(data, dict):
            raise ArtifactError("it is not an object.")
        # Before the fields: another schema may well have others.
        if type(data.get("schema")) is not int or data["schema"] != SCHEMA:
            raise ArtifactError(f"its schema is {shown(data.get('schema'))}, this version reads {SCHEMA}.")
        expected = {"schema", "key", "target", "kernel", "schedule", "created", "build_seconds", "sha256", "digest"}
        if set(data) != expected:
            raise ArtifactError(f"it must have the fields {', '.join(sorted(expected))}.")
        # Its numbers say how the kernel is called: with another one it would write where it must not.
        if data["digest"] != _seal(data):
            raise ArtifactError("its content is not what its digest was made for.")
        key = CacheKey.from_json(data["key"])
        if key.abi != ABI:
            raise ArtifactError(f"its kernel has interface {key.abi}, this version calls {ABI}.")
        seconds = data["build_seconds"]
        if type(seconds) not in (int, float) or not 0 <= seconds < 1e9:
            raise ArtifactError("build_seconds is not a number of seconds.")
        if not isinstance(data["schedule"], dict):
            raise ArtifactError("schedule is not an object.")
        if not isinstance(data["created"], str) or not isinstance(data["sha256"], str):
            raise ArtifactError("created or sha256 is not a string.")
        spec, target = spec_from_json(key.spec), TargetInfo.from_json(data["target"])
        kernel = KernelInterface.from_json(data["kernel"])
        if key.operator != spec.operator:
            raise ArtifactError("its operator contradicts its specification.")
        if target.identity() != key.target or kernel.layout != spec.layout:
            raise ArtifactError("its target or layout contradicts its key.")
        if target.kind == "llvm" and kernel.packed_dtype != spec.accumulator_dtype:
            raise ArtifactError("the dtype of its packed weight contradicts its key.")
        return cls(path, key, spec, target, kernel, data["schedule"], data["created"], float(seconds), data["sha256"])

    @property
    def library(self) -> Path:
        """The path of the compiled module."""
        return self.path / LIBRARY

    def load(self) -> native.Module:
        """Load the compiled module, after checking who can have written it, that it is whole and runs here.

        Raises
        ------
        ArtifactError
            If another user can have written it, its digest is not the manifest's, it was built for another
            processor, or it cannot be loaded.
        """
        self._check_host()
        if self.target.kind == "cuda":
            cuda_libraries.load_runtime()
        try:
            self._check_trusted()
            with open(self.library, "rb") as file:
                found = _digest_of(file)
                read = os.fstat(file.fileno())
        except (cache.VanishedArtifact, OSError) as error:
            reason = f"{error.strerror}." if isinstance(error, OSError) else error
            raise DamagedArtifact(f"{self.library} cannot be read: {reason} Delete {self.path}.") from error
        if found != self.sha256:
            raise DamagedArtifact(
                f"{self.library} is not the file its manifest was written for (sha256 {found[:12]}..., "
                f"expected {self.sha256[:12]}...): it is damaged. Delete {self.path}."
            )
        try:
            module = native.load_module(self.library)
        except ArtifactError as error:
            if self.library.exists():
                raise
            raise DamagedArtifact(f"{self.library} was removed while it was loaded. Load again.") from error
        # What was loaded must be what was checked: a rebuild may have come between.
        try:
            loaded = self.library.stat()
        except OSError:
            loaded = None
        if loaded is None or (loaded.st_dev, loaded.st_ino) != (read.st_dev, read.st_ino):
            raise DamagedArtifact(f"{self.library} was replaced while it was loaded. Load again.")
        return module

    def discard(self) -> None:
        """Take the artifact out of the cache: without its manifest it is none."""
        (self.path / MANIFEST).unlink(missing_ok=True)

    def _check_trusted(self) -> None:
        cache.check_trusted(self.library, self.path)
        cache.check_trusted(self.path / MANIFEST, self.path)

    def _check_host(self) -> None:
        refusal = self.target.refusal()
        if refusal is not None:
            raise ArtifactError(f"{self.path} was built for {self.target.tag} and {refusal}.")


def _digest_of(file: IO[bytes]) -> str:
    """Return the SHA-256 of a file, which need not fit into memory."""
    state = hashlib.sha256()
    while block := file.read(1 << 20):
        state.update(block)
    return state.hexdigest()


def find(key: CacheKey, cache_dir: Path | None = None) -> Artifact | None:
    """Return the artifact with a key, None if there is none or what is there is damaged.

    Raises
    ------
    ArtifactError
        If the cache directory is not to be trusted.
    """
    root = cache_dir or env.cache_dir()
    path = key.path(root)
    try:
        cache.check_trusted(path, root)
    except cache.VanishedArtifact:
        return None
    try:
        if not (path / MANIFEST).is_file():
            return None
        artifact = Artifact.read(path)
    except OSError as error:
        raise ArtifactError(f"{path / MANIFEST} cannot be read: {error.strerror}.") from error
    except ArtifactError as error:
        _log.warning("%s It is taken for missing.", error)
        return None
    return artifact if artifact.key == key else None


def artifacts(cache_dir: Path | None = None) -> Iterator[Artifact]:
    """Iterate over the artifacts in a cache directory that can be read, newest last."""
    root = cache_dir or env.cache_dir()
    found = []
    try:
        manifests = sorted((root / f"v{SCHEMA}").glob(f"*/[!.]*/{MANIFEST}"))
    except OSError as error:  # not to be looked at, or removed meanwhile
        _log.debug("passed over: %s", error)
        manifests = []
    for manifest in manifests:
        try:
            cache.check_trusted(manifest, root)
            found.append(Artifact.read(manifest.parent))
        except ArtifactError as error:
            _log.debug("passed over: %s", error)
    return iter(sorted(found, key=lambda artifact: artifact.created))


def nearest(key: CacheKey, cache_dir: Path | None = None) -> tuple[Artifact, list[str]] | None:
    """Return the artifact that differs least from a key, the newest of those, with the differences."""
    rows = [(artifact, key.explain_difference(artifact.key)) for artifact in artifacts(cache_dir)]
    return min(reversed(rows), key=lambda row: len(row[1]), default=None)


def build_once(
    key: CacheKey,
    target: TargetInfo,
    make: Callable[[Path], tuple[KernelInterface, Mapping[str, Any]]],
    cache_dir: Path | None = None,
    rebuild: bool = False,
) -> Artifact:
    """Return the artifact with a key, building it unless another process or thread just has.

    Parameters
    ----------
    key : CacheKey
        What is wanted.
    target : TargetInfo
        The target in full, for the manifest.
    make : callable
        Writes ``kernel.so`` into the directory that it is given; returns how the kernel is called, and how it
        came to its schedule (JSON).
    cache_dir : Path, optional
        TVMDCN_CACHE_DIR by default.
    rebuild : bool
        Build even if it is there.

    Raises
    ------
    ArtifactError
        If the cache directory cannot be used, or another process does not finish in time.
    BuildError
        If `make` writes no library. What `make` raises is passed on, and nothing is left behind.
    """
    root = cache_dir or env.cache_dir()
    path = key.path(root)
    cache.make_private(path.parent, root)
    with cache.lock(path):
        found = None if rebuild else find(key, root)
        if found is not None:
            return found
        with cache.staging(path) as directory:
            start = time.perf_counter()
            kernel, schedule = make(directory)
            seconds = time.perf_counter() - start
            library = directory / LIBRARY
            if not library.is_file():
                raise BuildError(f"the build of {path.name} wrote no {LIBRARY}.")
            library.chmod(0o700)
            manifest: dict[str, Any] = {
                "schema": SCHEMA,
                "key": key.to_json(),
                "target": target.to_json(),
                "kernel": kernel.to_json(),
                "schedule": dict(schedule),
                "created": datetime.now(timezone.utc).isoformat(timespec="microseconds"),
                "build_seconds": round(seconds, 3),
                "sha256": hashlib.sha256(library.read_bytes()).hexdigest(),
            }
            manifest["digest"] = _seal(manifest)
            # The manifest is the commit marker, so it comes last; sorting keeps two of them comparable.
            (directory / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
            (directory / MANIFEST).chmod(0o600)
            for leftover in directory.iterdir():
                if leftover.is_dir():
                    shutil.rmtree(leftover)
                elif leftover.name not in (LIBRARY, MANIFEST):
                    leftover.unlink()
            cache.commit(directory, path)
        _log.info("built %s in %.1f s (schedule: %s), kept in %s", path.name, seconds, key.schedule, path)
        return Artifact.read(path)
