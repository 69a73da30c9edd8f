# SPDX-License-Identifier: Apache-2.0
"""Directories for builds and inputs of a tuning, which do not pile up where tunings are killed."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

__all__ = ["scratch_directory"]

_PREFIX = "tvmdcn-tune-"
_LOCK = "lock"
_YOUNG = 60  # seconds


@contextlib.contextmanager
def scratch_directory() -> Iterator[Path]:
    """Give an empty private directory; it is removed at the end, and those of processes that were killed are now.

    Raises
    ------
    OSError
        If it cannot be made.
    """
    _sweep(Path(tempfile.gettempdir()))
    # The lock of a process that dies is free.
    with tempfile.TemporaryDirectory(prefix=_PREFIX) as name, open(Path(name, _LOCK), "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield Path(name)


def _sweep(place: Path) -> None:
    """Remove the directories of this user whose owner has ended."""
    for leftover in place.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):  # another's, or being removed by another
            status = leftover.lstat()
            young = abs(time.time() - status.st_mtime) < _YOUNG  # perhaps its lock is just being taken
            if status.st_uid != os.geteuid() or leftover.is_symlink() or young:
                continue
            with open(leftover / _LOCK, "rb") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(leftover, ignore_errors=True)
