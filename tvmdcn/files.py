# SPDX-License-Identifier: Apache-2.0
"""Files that are written whole or not at all: a full disk or a kill leaves what was there before."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

__all__ = ["leftovers", "write_whole"]


def write_whole(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file as UTF-8: others see all of it, or what was there before; so does the disk after a crash.

    What cannot be encoded becomes a question mark. A link is followed; a pipe or a device is just written to.

    Raises
    ------
    OSError
        If it cannot be written.
    """
    place, data = Path(os.path.realpath(path)), text.encode("utf-8", "replace")
    if place.exists() and not place.is_file():
        place.write_bytes(data)
        return
    staged = place.with_name(f".{place.name}.{secrets.token_hex(4)}.new")
    try:
        with open(staged, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if place.exists():
            staged.chmod(place.stat().st_mode & 0o7777)
        staged.replace(place)
    finally:
        staged.unlink(missing_ok=True)
    directory = os.open(place.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    except OSError:  # a file system that cannot, for a directory: the name may then be lost, the content not
        pass
    finally:
        os.close(directory)


def leftovers(path: Path) -> list[Path]:
    """Return what processes that were killed in :func:`write_whole` have left; also what others are just writing."""
    return [file for file in path.parent.iterdir() if file.name.startswith(f".{path.name}.") and file.suffix == ".new"]
