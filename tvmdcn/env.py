# SPDX-License-Identifier: Apache-2.0
"""Settings from the environment; no other module reads it.

Every variable is read when it is asked for, so a change takes effect at once. An empty variable counts as
unset. A value that cannot be understood raises :class:`~tvmdcn.errors.SettingError`: it is never guessed at
or ignored. :data:`SETTINGS` is the table of all there are.
"""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tvmdcn.errors import HomelessError, MissingExtra, SettingError
from tvmdcn.validation import shown

__all__ = [
    "SETTINGS",
    "Setting",
    "build_mode",
    "cache_dir",
    "default_directory",
    "lock_timeout",
    "num_threads",
    "packs",
    "records_dir",
    "set_default",
    "target",
    "thread_pool",
    "unknown_names",
]

BUILD_MODES = ("auto", "never", "rebuild")
THREAD_POOLS = ("auto", "tvm")
# Far above any machine's cores: a slip of the keyboard must not start a million threads.
MAX_THREADS = 4096


@dataclass(frozen=True)
class Setting:
    """One environment variable: its name, what it may hold, what holds when it is unset, what it does."""

    name: str
    kind: str
    default: str
    doc: str


SETTINGS = {
    setting.name: setting
    for setting in (
        Setting(
            "TVMDCN_CACHE_DIR",
            "directory",
            "the user's cache directory for tvmdcn",
            "Where built kernels are kept.",
        ),
        Setting(
            "TVMDCN_BUILD",
            "auto, never or rebuild",
            "auto",
            "Whether a kernel that is not in the cache is built (auto), is an error (never, for production), "
            "or is built anew even if it is there (rebuild).",
        ),
        Setting(
            "TVMDCN_NUM_THREADS",
            f"integer from 1 to {MAX_THREADS}",
            "torch's number if torch is loaded, else the processors this process may use",
            "Threads that a kernel runs on.",
        ),
        Setting(
            "TVMDCN_THREAD_POOL",
            "auto or tvm",
            "auto",
            "Whose threads a kernel runs on: torch's (OpenMP) if torch is loaded where the first kernel is, else TVM's "
            "own (auto); or always TVM's (tvm).",
        ),
        Setting(
            "TVMDCN_RECORDS",
            "directory",
            "the user's data directory for tvmdcn",
            "Your tuning records: looked up before those that ship, and where tuning puts new ones.",
        ),
        Setting(
            "TVMDCN_LOCK_TIMEOUT",
            "seconds, 0 or more",
            "600",
            "How long to wait for another process that is building the same kernel.",
        ),
        Setting(
            "TVMDCN_TARGET",
            "target, for example llvm-x86-64-v3",
            "this machine",
            "What to build for instead of the machine at hand.",
        ),
        Setting(
            "TVMDCN_PACK",
            f"directories, with {os.pathsep!r} between them",
            "the packs that are installed",
            "Packs of prebuilt kernels that are looked in before installed packs and before the cache.",
        ),
    )
}


def _text(name: str) -> str | None:
    """Return the value of a variable of the table, None where it is unset or empty."""
    return os.environ.get(SETTINGS[name].name) or None


def _refusal(name: str, value: str) -> SettingError:
    setting = SETTINGS[name]
    return SettingError(
        f"{name}={value!r} is not understood: it must be {setting.kind}. "
        f"Correct it, or unset it for the default ({setting.default})."
    )


def _directory(name: str) -> Path | None:
    value = _text(name)
    if value is None:
        return None
    try:
        path = Path(value).expanduser().absolute()
        is_other = path.exists() and not path.is_dir()
    except RuntimeError as error:  # ~name of a user who is not there
        raise _refusal(name, value) from error
    except OSError as error:  # a name that is too long, a directory that may not be looked into
        raise SettingError(f"{name}={shown(value)} cannot be used: {error.strerror}. Name another one.") from error
    if is_other:
        raise SettingError(f"{name}={value!r} is not a directory. Name a directory, or one that can be made.")
    return path


def default_directory(name: str, find: Callable[[], str]) -> Path:
    """Return the directory that holds where a setting is not set, by a function that finds it.

    Raises
    ------
    HomelessError
        If it has no place: a user without a home, as in some containers.
    """
    try:
        path = find()
    except RuntimeError:  # what newer versions of platformdirs do
        path = ""
    if not os.path.isabs(path):
        raise HomelessError(
            f"{name} is not set, and its default is in the home of the user, who has none here (HOME is not set). "
            f"Set {name} to a directory."
        )
    return Path(path)


def cache_dir() -> Path:
    """Return the directory of built kernels, TVMDCN_CACHE_DIR, as an absolute path; it may not exist yet.

    Raises
    ------
    SettingError
        If it names something that is not a directory, or it is not set and the user has no home.
    MissingExtra
        If it is not set, and the package that knows the default is not installed.
    """
    path = _directory("TVMDCN_CACHE_DIR")
    if path is None:
        try:
            import platformdirs  # only the default needs it, and imports must stay cheap
        except ModuleNotFoundError as error:
            raise MissingExtra(
                "TVMDCN_CACHE_DIR is not set, and its default needs platformdirs, not installed here: set it, or "
                "pip install platformdirs",
                name="platformdirs",
            ) from error
        path = default_directory("TVMDCN_CACHE_DIR", lambda: platformdirs.user_cache_dir("tvmdcn", appauthor=False))
    return path


def _one_of(name: str, words: tuple[str, ...]) -> str:
    """Return the value of a variable that holds one of some words, the first where it is unset."""
    value = _text(name)
    if value is None:
        return words[0]
    if value not in words:
        raise _refusal(name, value)
    return value


def build_mode() -> str:
    """Return TVMDCN_BUILD: auto, never or rebuild.

    Raises
    ------
    SettingError
        If it is anything else.
    """
    return _one_of("TVMDCN_BUILD", BUILD_MODES)


def num_threads() -> int | None:
    """Return TVMDCN_NUM_THREADS, None where it is unset.

    Raises
    ------
    SettingError
        If it is not an integer from 1 to 4096.
    """
    value = _text("TVMDCN_NUM_THREADS")
    if value is None:
        return None
    # int() would also take '1_000' and ' 4 '.
    if not (value.isascii() and value.isdecimal() and 1 <= int(value) <= MAX_THREADS):
        raise _refusal("TVMDCN_NUM_THREADS", value)
    return int(value)


def thread_pool() -> str:
    """Return TVMDCN_THREAD_POOL: auto or tvm.

    Raises
    ------
    SettingError
        If it is anything else.
    """
    return _one_of("TVMDCN_THREAD_POOL", THREAD_POOLS)


def records_dir() -> Path | None:
    """Return TVMDCN_RECORDS as an absolute path, None where it is unset.

    Raises
    ------
    SettingError
        If there is no such directory.
    """
    path = _directory("TVMDCN_RECORDS")
    if path is not None and not path.is_dir():
        raise SettingError(
            f"TVMDCN_RECORDS={str(path)!r} does not exist. Name a directory of tuning records, or unset it."
        )
    return path


def lock_timeout() -> float:
    """Return TVMDCN_LOCK_TIMEOUT in seconds.

    Raises
    ------
    SettingError
        If it is not a number of 0 or more.
    """
    value = _text("TVMDCN_LOCK_TIMEOUT")
    if value is None:
        return 600.0
    try:
        seconds = float(value)
    except ValueError:
        seconds = math.nan
    if not (math.isfinite(seconds) and seconds >= 0):
        raise _refusal("TVMDCN_LOCK_TIMEOUT", value)
    return seconds


def target() -> str | None:
    """Return TVMDCN_TARGET, None where it is unset; :mod:`tvmdcn.target` says what it may be."""
    return _text("TVMDCN_TARGET")


def packs() -> tuple[Path, ...]:
    """Return the directories of TVMDCN_PACK as absolute paths, none where it is unset.

    Raises
    ------
    SettingError
        If one of them is not a directory.
    """
    found = []
    for part in (_text("TVMDCN_PACK") or "").split(os.pathsep):
        if not part:
            continue
        try:
            path = Path(part).expanduser().absolute()
        except RuntimeError as error:  # ~name of a user who is not there
            raise _refusal("TVMDCN_PACK", part) from error
        if not path.is_dir():
            raise SettingError(
                f"TVMDCN_PACK={part!r} is not a directory. Name the directory that tvmdcn pack wrote, or unset it."
            )
        found.append(path)
    return tuple(found)


def unknown_names(environ: Mapping[str, str] | None = None) -> dict[str, str | None]:
    """Return the variables TVMDCN_... that are none of ours, each with the one that may be meant.

    For a command to warn of: a misspelt name is otherwise ignored without a word.
    """
    names = sorted(os.environ if environ is None else environ)
    return {
        name: next(iter(difflib.get_close_matches(name, SETTINGS, n=1, cutoff=0.8)), None)
        for name in names
        if name.startswith("TVMDCN_") and name not in SETTINGS
    }


def set_default(name: str, value: str) -> None:
    """Set a variable that another library reads, unless the user has."""
    os.environ.setdefault(name, value)
