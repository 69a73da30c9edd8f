# SPDX-License-Identifier: Apache-2.0
"""What a contributor sends: a root of tuning records as a directory, or as an archive, read as data from a stranger.

Nothing is unpacked. Only members of the two forms that records have are read, into memory and up to a limit; where
they are written is decided by names that are checked here.
"""

from __future__ import annotations

import re
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from tvmdcn.errors import RecordsError
from tvmdcn.tuning.records import META

__all__ = ["Contribution", "read_contribution"]

_TAG = re.compile(r"[a-z0-9]+-[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_LOG = re.compile(r"[A-Za-z0-9_.,=+-]{1,120}\.jsonl")
_FILE_LIMIT, _ALL_LIMIT, _MEMBERS = 16 << 20, 512 << 20, 20_000  # bytes, bytes, files


@dataclass
class Contribution:
    """The records of one target.

    Parameters
    ----------
    tag : str
        Of the target; a plain word.
    meta : bytes
        Content of ``meta.json``.
    logs : dict
        Contents of the logs of trials, by their plain names.
    """

    tag: str
    meta: bytes = b""
    logs: dict[str, bytes] = field(default_factory=dict)


def read_contribution(source: Path) -> list[Contribution]:
    """Return what a directory or an archive holds, by target.

    Raises
    ------
    RecordsError
        If it cannot be read, holds no records, or is larger than any honest one.
    """
    parts: dict[str, Contribution] = {}
    total = 0
    try:
        members = _members_of_directory(source) if source.is_dir() else _members_of_archive(source)
        for name, content in members:
            total += len(content)
            if len(content) > _FILE_LIMIT or total > _ALL_LIMIT:
                raise RecordsError(f"{source} holds more than records can be: {name} is too large.")
            tag, log = _place(name) or ("", "")
            part = parts.setdefault(tag, Contribution(tag))
            if log:
                part.logs[log] = content
            else:
                part.meta = content
    except (OSError, EOFError, ValueError, NotImplementedError, tarfile.TarError, zipfile.BadZipFile) as error:
        raise RecordsError(f"{source} cannot be read: {error}.") from error
    except (zlib.error, RuntimeError) as error:  # RuntimeError: an archive with a password
        raise RecordsError(f"{source} cannot be read: {error}.") from error
    found = [part for part in parts.values() if part.meta]
    if not found:
        raise RecordsError(
            f"{source} holds no tuning records: neither TARGET/{META}, nor that in an archive. Name what tvmdcn tune "
            "wrote (--output, or TVMDCN_RECORDS), or an archive of it."
        )
    return sorted(found, key=lambda part: part.tag)


def _place(name: str) -> tuple[str, str] | None:
    """Return the target of a member, and the name of its log ("" for the records); None if it is neither."""
    *_, tag, last = ("", "", *PurePosixPath(name).parts)
    if last == META and _TAG.fullmatch(tag):
        return tag, ""
    *_, tag, folder, last = ("", "", "", *PurePosixPath(name).parts)
    if folder == "trials" and _TAG.fullmatch(tag) and _LOG.fullmatch(last) and not last.startswith("."):
        return tag, last
    return None


def _members_of_directory(source: Path) -> Iterator[tuple[str, bytes]]:
    """Iterate over the records below a root, or below the directory of one target."""
    roots = [source] if (source / META).is_file() else sorted(path for path in source.iterdir() if path.is_dir())
    for root in roots:
        for path in (root / META, *sorted((root / "trials").glob("*.jsonl"))):
            name = f"{root.absolute().name}/{path.relative_to(root).as_posix()}"
            if path.is_file() and _place(name) is not None:
                with open(path, "rb") as file:
                    yield name, file.read(_FILE_LIMIT + 1)


def _members_of_archive(source: Path) -> Iterator[tuple[str, bytes]]:
    """Iterate over the records in an archive."""
    if zipfile.is_zipfile(source):
        with zipfile.ZipFile(source) as archive:
            if len(archive.infolist()) > _MEMBERS:
                raise RecordsError(f"{source} holds more than {_MEMBERS} files.")
            for entry in archive.infolist():
                if not entry.is_dir() and _place(entry.filename) is not None:
                    with archive.open(entry) as file:
                        yield entry.filename, file.read(_FILE_LIMIT + 1)
        return
    with tarfile.open(source) as tar:
        size = 0
        for number, member in enumerate(tar):
            size += member.size
            if number >= _MEMBERS or size > _ALL_LIMIT:
                raise RecordsError(f"{source} holds more than {_MEMBERS} files, or {_ALL_LIMIT >> 20} MiB.")
            if member.isreg() and _place(member.name) is not None:
                content = tar.extractfile(member)
                assert content is not None  # of a regular file
                yield member.name, content.read(_FILE_LIMIT + 1)
