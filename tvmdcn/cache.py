# SPDX-License-Identifier: Apache-2.0
"""The directory that artifacts are kept in: whose it is, who may write now, how a write is all or nothing.

Loading an artifact runs its code, so the directory must belong to the user (or to root, for images that ship
artifacts), nobody else may be able to write into it, and nothing in it may be a symbolic link.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import glob
import json
import logging
import os
import secrets
import shutil
import socket
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from tvmdcn import env
from tvmdcn.errors import ArtifactError

__all__ = ["VanishedArtifact", "check_trusted", "commit", "lock", "make_private", "staging"]

_log = logging.getLogger(__name__)

_held = threading.local()


class VanishedArtifact(ArtifactError):  # noqa: N818 - named after what happened to it
    """Something that was there, or was about to be, is not: somebody has removed it."""


def _refusal(path: Path, reason: str, advice: str) -> ArtifactError:
    return ArtifactError(f"{path} {reason}, so kernels in it are not loaded: loading one runs its code. {advice}")


def check_trusted(path: Path, root: Path, advice: str | None = None) -> None:
    """Check that nobody else can have written `path`, which lies in `root`, or a directory between them.

    Parameters
    ----------
    path, root : Path
    advice : str, optional
        What to do where a link or an owner is the trouble; by default, to set TVMDCN_CACHE_DIR.

    Raises
    ------
    VanishedArtifact
        If one of them is missing.
    ArtifactError
        If one of them is a symbolic link, neither a file nor a directory, somebody else's, or writable by others; or if
        anybody could put another directory in the place of `root`.
    """
    _check_above(root)
    between = path.relative_to(root).parts
    for depth in range(len(between) + 1):
        part = root.joinpath(*between[:depth])
        try:
            status = part.lstat()
        except (FileNotFoundError, NotADirectoryError) as error:
            raise VanishedArtifact(f"{part} cannot be read: {error.strerror}.") from error
        except OSError as error:
            raise ArtifactError(f"{part} cannot be read: {error.strerror}.") from error
        if not (stat.S_ISLNK(status.st_mode) or stat.S_ISDIR(status.st_mode) or stat.S_ISREG(status.st_mode)):
            raise _refusal(part, "is neither a file nor a directory", "Remove it.")
        if stat.S_ISLNK(status.st_mode):
            raise _refusal(part, "is a symbolic link", advice or "Set TVMDCN_CACHE_DIR to the directory itself.")
        if os.name != "posix":
            continue
        if status.st_uid not in (os.geteuid(), 0):
            raise _refusal(
                part,
                f"belongs to user {status.st_uid}, not to user {os.geteuid()} who runs this",
                advice or "Set TVMDCN_CACHE_DIR to a directory of your own.",
            )
        if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise _refusal(
                part,
                f"can be written by others (mode {stat.S_IMODE(status.st_mode):04o})",
                f"If all in it is yours: chmod -R go-w {root}",
            )


def _check_above(root: Path) -> None:
    """Refuse a root that lies where everybody may rename directories: between a check and its use it could change.

    Owners of directories above are trusted: a home, a mounted volume of a container.
    """
    if os.name != "posix":
        return
    try:
        above = root.parent.resolve()
        modes = [(part, part.stat().st_mode) for part in (above, *above.parents)]
    except (OSError, RuntimeError):  # missing, or not to be looked at: the root itself tells
        return
    for part, mode in modes:
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            raise _refusal(
                root,
                f"lies in {part}, which everybody can write (mode {stat.S_IMODE(mode):04o})",
                f"If that is meant: chmod +t {part}, so that only owners can rename what is in it.",
            )


def make_private(directory: Path, root: Path) -> None:
    """Make a directory in `root`, and what is missing above it, with access for this user only.

    Raises
    ------
    ArtifactError
        If it cannot be made, or what is there already is not to be trusted (:func:`check_trusted`).
    """
    if os.fsencode(directory).decode(errors="replace") != str(directory):
        raise ArtifactError(
            f"the cache directory {str(directory)!r} has a name that is not UTF-8, which the compiler cannot write to. "
            "Set TVMDCN_CACHE_DIR to another one."
        )
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        for part in (root, *reversed([p for p in directory.parents if root in p.parents]), directory):
            with contextlib.suppress(FileExistsError):
                part.mkdir(mode=0o700)
    except OSError as error:
        raise ArtifactError(
            f"the cache directory {directory} cannot be made: {error.strerror}. "
            "Set TVMDCN_CACHE_DIR to a directory that can be written."
        ) from error
    check_trusted(directory, root)
    if not os.access(directory, os.W_OK | os.X_OK):
        raise ArtifactError(
            f"the cache directory {directory} cannot be written. Set TVMDCN_CACHE_DIR to one that can, or "
            "TVMDCN_BUILD=never to use only what is in it."
        )


@contextlib.contextmanager
def lock(target: Path, timeout: float | None = None) -> Iterator[None]:
    """Hold the lock of an artifact's path; other processes and threads that want to build it wait.

    The thread that holds a lock may take it again. The lock of a process that dies is free.

    Parameters
    ----------
    target : Path
        The artifact's directory, whose parent exists; the lock lies beside it.
    timeout : float, optional
        Seconds to wait; TVMDCN_LOCK_TIMEOUT by default.

    Raises
    ------
    ArtifactError
        If the time is over; the message names who holds the lock.
    """
    import filelock  # 10 ms, and only builds need it

    names: set[Path] = _held.__dict__.setdefault("names", set())
    if target in names:
        yield
        return
    seconds = env.lock_timeout() if timeout is None else timeout
    file = filelock.FileLock(target.with_name(f".{target.name}.lock"), timeout=seconds, mode=0o600)
    holder = target.with_name(f".{target.name}.holder")
    try:
        file.acquire()
    except filelock.Timeout as error:
        raise ArtifactError(
            f"{_holder(holder)} has been building {target.name}; waited {seconds:g} s for it. Wait longer "
            f"with TVMDCN_LOCK_TIMEOUT=seconds, or stop that process (fuser {file.lock_file} names it, too)."
        ) from error
    except (OSError, NotImplementedError) as error:
        raise ArtifactError(
            f"{file.lock_file} cannot be locked: {error}. Set TVMDCN_CACHE_DIR to a local directory."
        ) from error
    names.add(target)
    try:
        with contextlib.suppress(OSError):  # a full disk: the lock holds all the same, only its holder has no name
            pid = os.getpid()
            note = {"pid": pid, "host": socket.gethostname(), "since": time.time(), "start": _start(pid)}
            holder.write_text(json.dumps(note))
        yield
    finally:
        names.discard(target)
        with contextlib.suppress(OSError):
            holder.unlink(missing_ok=True)
        file.release()


def _start(pid: int) -> int:
    """Return when a process of this machine began, in ticks since the machine did; 0 if there is none, or no /proc."""
    try:
        # The name of the program, in parentheses, may hold anything.
        return int(Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return 0


def _holder(file: Path) -> str:
    """Return who holds a lock, in words."""
    try:
        note = json.loads(file.read_text())
        pid, host, start = int(note["pid"]), str(note["host"])[:100], int(note.get("start", 0))
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(float(note["since"])))
        host.encode()
        # Who was killed left his name; or its number is another process's by now.
        if host == socket.gethostname() and start and _start(pid) != start:
            return f"another process (not {pid}, which took the lock at {since} and has ended)"
        return f"process {pid} on {host} (since {since})"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return "another process"


@contextlib.contextmanager
def staging(target: Path) -> Iterator[Path]:
    """Give an empty private directory beside `target` to prepare it in; what is left of it is removed.

    Only the holder of the lock of `target` may ask for one: leftovers of builds that were killed are removed.

    Raises
    ------
    ArtifactError
        If the system refuses to write: a full disk, for example. Nothing is left behind then.
    """
    prefix = f".{target.name}.staging-"
    for leftover in target.parent.glob(f"{glob.escape(prefix)}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    directory = target.with_name(prefix + secrets.token_hex(4))
    try:
        directory.mkdir(mode=0o700)
        yield directory
    except OSError as error:
        raise _unwritable(target, error) from error
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _unwritable(target: Path, error: OSError) -> ArtifactError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    advice = f" Make room in {target.parent}, or name another directory." if full else ""
    reason = str(error) if error.filename is not None or error.strerror is None else error.strerror
    return ArtifactError(f"{target} cannot be written: {reason}.{advice}")


def _sync(path: Path) -> None:
    """Bring a file or a directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that cannot, for a directory
            raise
    finally:
        os.close(descriptor)


def _exchange(one: Path, other: Path) -> bool:
    """Give each of two directories the name of the other, in one step; return whether the system can."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if os.name == "posix" else None
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename is not None and rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def commit(staged: Path, target: Path) -> None:
    """Put a finished directory in its place: others see all of it, or what was there before.

    Raises
    ------
    ArtifactError
        If the file system refuses.
    """
    try:
        for path in (*staged.rglob("*"), staged):
            _sync(path)
        if target.is_symlink() or target.is_file():
            target.unlink()
        try:
            os.rename(staged, target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            if not _exchange(staged, target):
                # For an instant the name is missing; a reader that comes then takes the lock and finds the new one.
                os.rename(target, staged.with_name(f"{staged.name}-replaced"))
                os.rename(staged, target)
        for replaced in target.parent.glob(f"{glob.escape(staged.name)}*"):
            shutil.rmtree(replaced, ignore_errors=True)
        _sync(target.parent)
    except OSError as error:
        raise _unwritable(target, error) from error
    _log.debug("wrote %s", target)
