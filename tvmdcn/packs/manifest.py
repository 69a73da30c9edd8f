# SPDX-License-Identifier: Apache-2.0
"""The manifest of a pack: what is in it, for which versions, and the digest of every file.

It is read as data from a stranger: exact fields, exact types, no duplicates, names that cannot lead out of the
pack. Nothing else of a pack is opened before its digest here is known.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from tvmdcn.cache_key import ABI
from tvmdcn.cache_key import SCHEMA as ARTIFACT_SCHEMA
from tvmdcn.errors import ArtifactError, SpecError, SpecTypeError
from tvmdcn.spec import DeformConv2dSpec, spec_from_json
from tvmdcn.target import CudaTarget, TargetInfo
from tvmdcn.validation import shown

__all__ = [
    "CUDA_LIBRARY",
    "FORMAT",
    "LIBRARIES",
    "LICENSES",
    "MANIFEST",
    "MANIFEST_LIMIT",
    "RUNTIME",
    "SCHEMA",
    "FileRecord",
    "PackManifest",
    "PackedKernel",
    "check_name",
    "check_version",
    "libraries_of",
]

FORMAT = "tvmdcn pack"
# Raise with the format of the manifest or the layout of the directory.
SCHEMA = 1
MANIFEST = "manifest.json"
MANIFEST_LIMIT = 16 << 20  # bytes; a kernel takes about 1 KB
RUNTIME, LICENSES = "runtime", "licenses"
LIBRARIES = {"libtvm_ffi.so": "tvm_ffi", "libtvm_runtime.so": "tvm"}
"""What runs kernels, in the order in which it is loaded, and the Python package that has it."""
CUDA_LIBRARY = "libtvm_runtime_cuda.so"
"""What also runs kernels for GPUs; of the package tvm."""

# A path in a pack: names that begin with a letter or a digit, so neither "..", nor hidden, nor absolute.
_PATH = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,254}(/[A-Za-z0-9][A-Za-z0-9._+-]{0,254}){0,4}")
_NAME = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")
_VERSION = re.compile(r"[0-9]+(\.[0-9]+)*((a|b|rc)[0-9]+)?(\.post[0-9]+)?(\.dev[0-9]+)?")
_DIGEST = re.compile("[0-9a-f]{64}")
_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+:_-]{0,60}")
_ARCHITECTURES = ("x86_64", "aarch64")


def check_name(name: str) -> str:
    """Return the name of a pack, which is also that of a Python package.

    Raises
    ------
    SpecError
        If it is none.
    """
    if not (isinstance(name, str) and len(name) <= 100 and _NAME.fullmatch(name)):
        raise SpecError(f"the name of a pack must be of the form [a-z][a-z0-9_]*, such as dcn_pack, got {shown(name)}.")
    return name


def check_version(version: str) -> str:
    """Return the version of a pack, of the form that Python packages have.

    Raises
    ------
    SpecError
        If it is none.
    """
    if not (isinstance(version, str) and len(version) <= 100 and _VERSION.fullmatch(version)):
        raise SpecError(f"the version of a pack must be of the form 1.2 or 1.2.post1, got {shown(version)}.")
    return version


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and SHA-256 digest (hexadecimal) of a file of a pack."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class PackedKernel:
    """A kernel of a pack.

    Parameters
    ----------
    path : str
        Its directory in the pack, with ``kernel.so`` and ``manifest.json``.
    spec : DeformConv2dSpec or DeformConv2dGradSpec
        What it computes.
    target : TargetInfo
        What it was built for.
    """

    path: str
    spec: DeformConv2dSpec
    target: TargetInfo


def libraries_of(arch: str, kernels: Iterable[PackedKernel]) -> dict[str, str]:
    """Return what runs these kernels on an architecture: libraries, and the packages that have them."""
    gpus = any(isinstance(kernel.target, CudaTarget) and kernel.target.host == arch for kernel in kernels)
    return {**LIBRARIES, CUDA_LIBRARY: "tvm"} if gpus else LIBRARIES


@dataclass(frozen=True)
class PackManifest:
    """What a pack says of itself.

    Parameters
    ----------
    name, version : str
        Of the pack.
    created : str
        When it was made (ISO 8601, UTC).
    tvmdcn : str
        Version of tvmdcn that made it.
    tvm, tvm_ffi : str
        Versions of apache-tvm and apache-tvm-ffi that its kernels were built with, and need to run.
    kernels : tuple of PackedKernel
        In the order they were asked for.
    runtime : tuple of str
        Architectures whose runtime libraries are in the pack.
    files : mapping of str to FileRecord
        Every file but the manifest, by its path in the pack.
    """

    name: str
    version: str
    created: str
    tvmdcn: str
    tvm: str
    tvm_ffi: str
    kernels: tuple[PackedKernel, ...]
    runtime: tuple[str, ...]
    files: Mapping[str, FileRecord]

    def to_text(self) -> str:
        """Return the manifest as the text of ``manifest.json``."""
        data = {
            "format": FORMAT,
            "schema": SCHEMA,
            "abi": ABI,
            "artifact_schema": ARTIFACT_SCHEMA,
            "name": self.name,
            "version": self.version,
            "created": self.created,
            "versions": {"tvmdcn": self.tvmdcn, "apache-tvm": self.tvm, "apache-tvm-ffi": self.tvm_ffi},
            "kernels": [
                {"path": kernel.path, "spec": kernel.spec.to_json(), "target": kernel.target.to_json()}
                for kernel in self.kernels
            ],
            "runtime": list(self.runtime),
            "files": {name: asdict(self.files[name]) for name in sorted(self.files)},
        }
        return json.dumps(data, indent=1) + "\n"

    @classmethod
    def from_text(cls, text: bytes) -> PackManifest:
        """Return the manifest that a text holds.

        Raises
        ------
        ArtifactError
            If it is not one, or of a version that this tvmdcn does not read.
        """
        try:
            return cls._parse(json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant))
        except (SpecError, SpecTypeError, ValueError, RecursionError) as error:
            raise ArtifactError(f"it is not the JSON of a pack: {error}") from error

    @classmethod
    def _parse(cls, data: Any) -> PackManifest:
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ArtifactError(f"its field format is not {FORMAT!r}.")
        # Before the fields: another schema may well have others.
        for field, expected, means in (
            ("schema", SCHEMA, "packs of schema"),
            ("abi", ABI, "kernels of interface"),
            ("artifact_schema", ARTIFACT_SCHEMA, "artifacts of schema"),
        ):
            if type(data.get(field)) is not int or data[field] != expected:
                raise ArtifactError(
                    f"its {field} is {shown(data.get(field))}, and this version of tvmdcn reads {means} {expected}. "
                    "Make the pack again with this version, or install the one that made it."
                )
        _check_fields("the pack", data, _FIELDS)
        _check_fields("versions", data["versions"], dict.fromkeys(("tvmdcn", "apache-tvm", "apache-tvm-ffi"), str))
        for name, word in {"created": data["created"], **data["versions"]}.items():
            if not _WORD.fullmatch(word):
                raise ArtifactError(f"its field {name} is {shown(word)}.")
        files = {_path(name): _file_record(name, record) for name, record in data["files"].items()}
        kernels = tuple(_packed_kernel(entry, files) for entry in data["kernels"])
        named = [(kernel.spec, kernel.target.tag) for kernel in kernels]
        if len(set(named)) < len(named) or len({kernel.path for kernel in kernels}) < len(kernels):
            raise ArtifactError("it names a kernel twice.")
        runtime = tuple(data["runtime"])
        if not all(arch in _ARCHITECTURES for arch in runtime) or len(set(runtime)) < len(runtime):
            raise ArtifactError(f"its field runtime is {shown(data['runtime'])}.")
        needed = {f"{kernel.path}/{name}" for kernel in kernels for name in ("kernel.so", MANIFEST)}
        needed |= {f"{RUNTIME}/{arch}/{name}" for arch in runtime for name in libraries_of(arch, kernels)}
        missing = sorted(needed - set(files))
        unknown = sorted(name for name in set(files) - needed if not name.startswith(f"{LICENSES}/"))
        if missing or unknown:
            words = f"misses {missing[0]}" if missing else f"names {unknown[0]}, which belongs to nothing in it"
            raise ArtifactError(f"its list of files {words}.")
        return cls(
            check_name(data["name"]),
            check_version(data["version"]),
            data["created"],
            data["versions"]["tvmdcn"],
            data["versions"]["apache-tvm"],
            data["versions"]["apache-tvm-ffi"],
            kernels,
            runtime,
            files,
        )


_FIELDS = {
    "format": str,
    "schema": int,
    "abi": int,
    "artifact_schema": int,
    "name": str,
    "version": str,
    "created": str,
    "versions": dict,
    "kernels": list,
    "runtime": list,
    "files": dict,
}


def _check_fields(what: str, data: Any, types: Mapping[str, type]) -> None:
    if not isinstance(data, dict):
        raise ArtifactError(f"{what} is not an object.")
    missing, unknown = sorted(set(types) - set(data)), sorted(set(data) - set(types))
    if missing or unknown:
        words = f"misses the field {missing[0]}" if missing else f"has a field {shown(unknown[0])}, which is unknown"
        raise ArtifactError(f"{what} {words}.")
    for name, expected in types.items():
        if type(data[name]) is not expected:
            raise ArtifactError(f"{what}: the field {name} is {shown(data[name])}, not of type {expected.__name__}.")


def _path(name: str) -> str:
    if not _PATH.fullmatch(name):
        raise ArtifactError(f"it names a file {shown(name)}, which could lie outside of the pack.")
    return name


def _file_record(name: str, data: Any) -> FileRecord:
    _check_fields(f"the record of {name}", data, {"bytes": int, "sha256": str})
    if not 0 <= data["bytes"] < 1 << 40 or not _DIGEST.fullmatch(data["sha256"]):
        raise ArtifactError(f"the record of {name} holds an impossible size or digest.")
    return FileRecord(data["bytes"], data["sha256"])


def _packed_kernel(data: Any, files: Mapping[str, FileRecord]) -> PackedKernel:
    _check_fields("a kernel", data, {"path": str, "spec": dict, "target": dict})
    path = _path(data["path"])
    if path.split("/")[0] in (RUNTIME, LICENSES):
        raise ArtifactError(f"it names a kernel {path}, where none belongs.")
    return PackedKernel(path, spec_from_json(data["spec"]), TargetInfo.from_json(data["target"]))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) < len(pairs):
        raise ArtifactError("a field stands in it twice.")
    return data


def _no_constant(name: str) -> Any:
    raise ArtifactError(f"{name} is no number of JSON.")
