# SPDX-License-Identifier: Apache-2.0
"""The directory that artifacts are kept in: whose it is, who may write now, how a write is all or nothing.

Loading an artifact runs its code, so the directory must belong to the user (or to root, for images that ship
artifacts), nobody else may be able to write into it, and nothing in it may be a symbolic link.
"""

from __future__ import annotations

import contextlib
import errno
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

__all__ = ["check_trusted", "commit", "lock", "make_private", "staging"]

_log = logging.getLogger(__name__)

_held = threading.local()


def _refusal(path: Path, reason: str, advice: str) -> ArtifactError:
    return ArtifactError(f"{path} {reason}, so kernels in it are not loaded: loading one runs its code. {advice}")


def check_trusted(path: Path, root: Path) -> None:
    """Check that nobody else can have written `path`, which lies in `root`, or a directory between them.

    Raises
    ------
    ArtifactError
        If one of them is missing, a symbolic link, somebody else's, or writable by others.
    """
    between = path.relative_to(root).parts
    for depth in range(len(between) + 1):
        part = root.joinpath(*between[:depth])
        try:
            status = part.lstat()
        except OSError as error:
            raise ArtifactError(f"{part} cannot be read: {error.strerror}.") from error
        if stat.S_ISLNK(status.st_mode):
            raise _refusal(part, "is a symbolic link", "Set TVMDCN_CACHE_DIR to the directory itself.")
        if os.name != "posix":
            continue
        if status.st_uid not in (os.geteuid(), 0):
            raise _refusal(
                part,
                f"belongs to user {status.st_uid}, not to user {os.geteuid()} who runs this",
                "Set TVMDCN_CACHE_DIR to a directory of your own.",
            )
        if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise _refusal(
                part,
                f"can be written by others (mode {stat.S_IMODE(status.st_mode):04o})",
                f"If all in it is yours: chmod -R go-w {root}",
            )


def make_private(directory: Path, root: Path) -> None:
    """Make a directory in `root`, and what is missing above it, with access for this user only.

    Raises
    ------
    ArtifactError
        If it cannot be made, or what is there already is not to be trusted (:func:`check_trusted`).
    """
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
            "with TVMDCN_LOCK_TIMEOUT=seconds, or stop that process."
        ) from error
    except (OSError, NotImplementedError) as error:
        raise ArtifactError(
            f"{file.lock_file} cannot be locked: {error}. Set TVMDCN_CACHE_DIR to a local directory."
        ) from error
    names.add(target)
    try:
        holder.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": time.time()}))
        yield
    finally:
        names.discard(target)
        holder.unlink(missing_ok=True)
        file.release()


def _holder(file: Path) -> str:
    """Return who holds a lock, in words."""
    try:
        text = json.loads(file.read_text())
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(float(text["since"])))
        return f"process {int(text['pid'])} on {str(text['host'])[:100]} (since {since})"
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return "another process"


@contextlib.contextmanager
def staging(target: Path) -> Iterator[Path]:
    """Give an empty private directory beside `target` to prepare it in; what is left of it is removed.

    Only the holder of the lock of `target` may ask for one: leftovers of builds that were killed are removed.
    """
    prefix = f".{target.name}.staging-"
    for leftover in target.parent.glob(f"{prefix}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    directory = target.with_name(prefix + secrets.token_hex(4))
    directory.mkdir(mode=0o700)
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


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


def commit(staged: Path, target: Path) -> None:
    """Put a finished directory in its place: others see all of it, or what was there before.

    Raises
    ------
    ArtifactError
        If the file system refuses.
    """
    try:
        for path in (*staged.iterdir(), staged):
            _sync(path)
        if target.is_symlink() or target.is_file():
            target.unlink()
        try:
            os.rename(staged, target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            # There is no exchange of directories in the standard library: for an instant the name is missing,
            # and a reader that comes then takes the lock and finds the new one.
            replaced = staged.with_name(f"{staged.name}-replaced")
            os.rename(target, replaced)
            os.rename(staged, target)
            shutil.rmtree(replaced, ignore_errors=True)
        _sync(target.parent)
    except OSError as error:
        raise ArtifactError(f"{target} cannot be written: {error.strerror}.") from error
    _log.debug("wrote %s", target)
