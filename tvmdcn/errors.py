# SPDX-License-Identifier: Apache-2.0
"""The exceptions of the package.

All derive from :class:`TvmdcnError`, and each also from the built-in exception that a caller would expect,
so that ``except ValueError`` keeps working. A message names the argument, its value, the limit and the
next step.
"""

from __future__ import annotations

__all__ = [
    "ArtifactError",
    "ArtifactMissing",
    "BuildError",
    "DeviceError",
    "HomelessError",
    "MissingExtra",
    "RecordsError",
    "SettingError",
    "SpecError",
    "SpecTypeError",
    "TuningError",
    "TvmdcnError",
]


class TvmdcnError(Exception):
    """Base of every exception that the package raises on purpose."""

    def __str__(self) -> str:
        """Return the message, which can always be printed: half characters, which JSON may hold, are written out."""
        return super().__str__().encode("utf-8", "backslashreplace").decode("utf-8")


class SpecError(TvmdcnError, ValueError):
    """An argument of an operator has a value or a shape that it cannot have."""


class SpecTypeError(TvmdcnError, TypeError):
    """An argument of an operator is of a type, or of a dtype, that it cannot be."""


class SettingError(TvmdcnError, ValueError):
    """An environment variable of the package has a value that it cannot have."""


class HomelessError(SettingError):
    """A setting has no value, and its default would be in the home of a user who has none."""


class BuildError(TvmdcnError, RuntimeError):
    """A kernel could not be scheduled, compiled or sealed."""


class DeviceError(TvmdcnError, RuntimeError):
    """The device that a kernel is for is not there, or does not do what is asked of it."""


class ArtifactError(TvmdcnError, RuntimeError):
    """An artifact, or the directory that holds it, is damaged, of another version, or refused."""


class ArtifactMissing(ArtifactError):  # noqa: N818 - a miss is an answer; only `TVMDCN_BUILD=never` makes it fatal
    """No artifact matches, and none may be built."""


class TuningError(TvmdcnError, RuntimeError):
    """A tuning run could not start, or produced nothing usable."""


class RecordsError(TvmdcnError, RuntimeError):
    """A database of tuning records is damaged, or does not fit what is asked of it."""


class MissingExtra(TvmdcnError, ImportError):  # noqa: N818 - named after what is missing
    """A package that only some commands need is not installed."""
