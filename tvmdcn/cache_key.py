# SPDX-License-Identifier: Apache-2.0
"""The key of an artifact: every ingredient by name, contents and versions, no times.

It can be computed, and so an artifact be found, without the compiler.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from tvmdcn import env
from tvmdcn.errors import ArtifactError, HomelessError, RecordsError, SpecError
from tvmdcn.spec import DeformConv2dSpec, spec_from_json
from tvmdcn.target import TargetInfo

__all__ = [
    "ABI",
    "SCHEDULES",
    "SCHEMA",
    "CacheKey",
    "installed_compiler",
    "record_roots",
    "records_digest",
    "source_digest",
    "user_records",
]

# Raise with the manifest's format; artifacts of another schema lie in another directory.
SCHEMA = 2
# Raise with the signature or the meaning of the compiled functions (see tvmdcn.compiled).
ABI = 2
SCHEDULES = ("tuned", "default", "naive", "decisions")
# What stands in paths: operators, and what names of targets are made of.
_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,63}")


@functools.lru_cache(maxsize=1)
def installed_compiler() -> tuple[str, str]:
    """Return the versions of apache-tvm and apache-tvm-ffi, without importing either.

    Raises
    ------
    ArtifactError
        If one of them is not installed.
    """
    from importlib import metadata  # 30 ms

    try:
        return metadata.version("apache-tvm"), metadata.version("apache-tvm-ffi")
    except metadata.PackageNotFoundError as error:
        raise ArtifactError(f"{error.name} is not installed. pip install tvmdcn installs the pinned one.") from error


def _digest(files: list[tuple[str, bytes]]) -> str:
    state = hashlib.sha256()
    for name, content in files:
        state.update(f"{name}\0{len(content)}\0".encode())
        state.update(content)
    return state.hexdigest()


def package_directory(name: str) -> Path:
    """Return the directory of ``tvmdcn.<name>``, which stands beside the package in a checkout."""
    spec = importlib.util.find_spec(f"tvmdcn.{name}")
    if spec is not None and spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations)))
    return Path(__file__).parent.parent / name


@functools.lru_cache(maxsize=1)
def source_digest() -> str:
    """Return the digest of the code that generates kernels: ``te/``, ``schedules/`` and what builds them."""
    here = Path(__file__).parent
    compilers = ("builder.py", "launcher.py", "space.py", "cuda_compiler.py", "cuda_module.py", "nvrtc.py")
    files = [*(here / name for name in compilers), *sorted((here / "te").rglob("*.py"))]
    named = [(str(path.relative_to(here)), path) for path in files if path.is_file()]
    schedules = package_directory("schedules")
    named += [(f"schedules/{path.relative_to(schedules)}", path) for path in sorted(schedules.rglob("*.py"))]
    return _digest([(name, path.read_bytes()) for name, path in named])


def record_roots() -> list[Path]:
    """Return where tuning records lie: the user's (:func:`user_records`), if he has a place for them, then ours."""
    ours = package_directory("tuning_logs")
    try:
        user = user_records()
        os.stat(user)
    except HomelessError:
        return [ours]
    except PermissionError:  # the home of another, as sudo may leave it; what was named is an error
        return [ours] if env.records_dir() is None else [user, ours]
    except OSError:  # not there yet
        pass
    return [user, ours]


def user_records() -> Path:
    """Return where the user's records lie: TVMDCN_RECORDS, or in his data directory.

    Raises
    ------
    SettingError
        If TVMDCN_RECORDS names no directory, or is not set and the user has no home.
    """
    user = env.records_dir()
    if user is None:
        import platformdirs  # only the default needs it, and imports must stay cheap

        user = env.default_directory("TVMDCN_RECORDS", lambda: platformdirs.user_data_dir("tvmdcn", appauthor=False))
        user /= "tuning_logs"
    return user


def records_digest(tag: str) -> str:
    """Return the digest of the tuning records of a target tag, wherever they lie.

    Raises
    ------
    RecordsError
        If they are there and cannot be read.
    """
    try:
        files = [path for root in record_roots() for path in sorted((root / tag).glob("*.json"))]
        return _digest([(path.name, path.read_bytes()) for path in files if path.is_file()])
    except OSError as error:
        raise RecordsError(
            f"the tuning records of {tag} cannot be read: {error}. Set TVMDCN_RECORDS to a directory that can be."
        ) from error


@dataclass(frozen=True)
class CacheKey:
    """All that decides what an artifact is; two artifacts with one key are interchangeable.

    Parameters
    ----------
    operator : str
        Name of the operator.
    spec, target : mapping
        The specification as JSON, and :meth:`TargetInfo.identity`.
    schedule : str
        "tuned", "default", "naive" or "decisions".
    decisions : str
        For "decisions": the digest of the decisions given; else empty.
    records : str
        For "tuned": the digest of the target's tuning records; else empty.
    source : str
        The digest of the code that generates kernels.
    tvm, tvm_ffi : str
        Versions of apache-tvm and apache-tvm-ffi.
    abi, schema : int
        Versions of the compiled functions' interface and of the manifest.
    """

    operator: str
    spec: Mapping[str, Any]
    target: Mapping[str, Any]
    schedule: str
    decisions: str
    records: str
    source: str
    tvm: str
    tvm_ffi: str
    abi: int = ABI
    schema: int = SCHEMA

    @classmethod
    def of(cls, spec: DeformConv2dSpec, target: TargetInfo, schedule: str, decisions: str = "") -> CacheKey:
        """Return the key of the artifact that this installation would build now.

        Raises
        ------
        SpecError
            If `schedule` is none of the four.
        """
        if schedule not in SCHEDULES:
            raise SpecError(f"schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}.")
        tvm, tvm_ffi = installed_compiler()
        return cls(
            operator=spec.operator,
            spec=spec.to_json(),
            target=target.identity(),
            schedule=schedule,
            decisions=decisions,
            records=records_digest(target.tag) if schedule == "tuned" else "",
            source=source_digest(),
            tvm=tvm,
            tvm_ffi=tvm_ffi,
        )

    @classmethod
    def from_json(cls, data: Any) -> CacheKey:
        """Return the key that :meth:`to_json` wrote.

        Raises
        ------
        ArtifactError
            If a field is missing, unknown, or of another type.
        """
        types = {"spec": dict, "target": dict, "abi": int, "schema": int}
        names = {field.name for field in fields(cls)}
        if not isinstance(data, dict) or set(data) != names:
            raise ArtifactError(f"the key must have the fields {', '.join(sorted(names))}.")
        for name, value in data.items():
            if type(value) is not types.get(name, str):
                raise ArtifactError(f"the key's field {name} is {str(value)[:80]!r}.")
        words = {"operator": data["operator"], **{f"target.{name}": value for name, value in data["target"].items()}}
        for name, value in words.items():
            if not (isinstance(value, str) and _WORD.fullmatch(value)):
                raise ArtifactError(f"the key's field {name} is {str(value)[:80]!r}.")
        try:
            TargetInfo.tag_of(data["target"])
        except KeyError as error:
            raise ArtifactError(f"the key's field target has no {error}.") from error
        return cls(**data)

    def to_json(self) -> dict[str, Any]:
        """Return the key as a dict of JSON types."""
        return asdict(self)

    def digest(self) -> str:
        """Return 12 hexadecimal digits that stand for the key in names."""
        text = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def path(self, cache_dir: Path) -> Path:
        """Return the artifact's directory in a cache directory."""
        spec = spec_from_json(self.spec)
        name = f"{self.operator}-{spec.slug}-{self.digest()}"
        return tag_directory(cache_dir, TargetInfo.tag_of(self.target)) / name

    def explain_difference(self, other: CacheKey) -> list[str]:
        """Return one line per ingredient in which `other` differs from this key, both values in it."""
        lines = []
        for field in fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            if isinstance(mine, Mapping) and isinstance(theirs, Mapping):
                lines += [
                    f"{field.name}.{name}: {theirs.get(name)!r}, wanted {mine.get(name)!r}"
                    for name in sorted({*mine, *theirs})
                    if mine.get(name) != theirs.get(name)
                ]
            elif mine != theirs:
                lines.append(f"{field.name}: {_short(theirs)}, wanted {_short(mine)}")
        return lines


def _short(value: Any) -> str:
    """Return a value for a message; of a digest only the beginning."""
    text = str(value)
    return f"{text[:12]}..." if len(text) == 64 else repr(value)


def tag_directory(cache_dir: Path, tag: str) -> Path:
    """Return the directory of a target's artifacts."""
    return cache_dir / f"v{SCHEMA}" / tag
