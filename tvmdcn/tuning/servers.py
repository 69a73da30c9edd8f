# SPDX-License-Identifier: Apache-2.0
"""The servers of a farm: what they are, what they do, and which must not be used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tvmdcn.cache_key import ABI
from tvmdcn.errors import TuningError
from tvmdcn.target import TargetInfo, host_identity
from tvmdcn.tuning.server_side import PROTOCOL

__all__ = ["Machine", "ServerState", "ServersLost", "refusal"]

_SAME = ("apache-tvm", "apache-tvm-ffi", "tvmdcn")  # versions that must be the same here and there


class ServersLost(TuningError):  # noqa: N818 - an event, which ends a search early
    """No server is left to measure on."""


@dataclass(frozen=True)
class ServerState:
    """What a server is doing, for display.

    Parameters
    ----------
    address : str
    state : str
        "waiting", "measuring", "lost" or "refused".
    detail : str
        What is measured, or why it is lost or refused.
    measured : int
        Candidates that it has measured in this run.
    """

    address: str
    state: str
    detail: str = ""
    measured: int = 0


@dataclass(frozen=True)
class Machine:
    """What the servers are, as the first one says: all are of one target.

    Parameters
    ----------
    target : TargetInfo
    threads : int
        Threads of a call, where nobody says how many.
    provenance : mapping
        Processor, system and versions, as in the provenance of a record.
    """

    target: TargetInfo
    threads: int
    provenance: Mapping[str, Any]


def refusal(identity: Mapping[str, Any], wanted: TargetInfo | None, threads: int) -> str:
    """Return why a server must not be used; empty if it may.

    Parameters
    ----------
    identity : mapping
        What the server says of itself, see :func:`tvmdcn.tuning.server_side.identify`.
    wanted : TargetInfo, optional
        What it must be.
    threads : int
        Threads that it must have, at least.
    """
    if (identity["protocol"], identity["abi"]) != (PROTOCOL, ABI):
        return "its tvmdcn is another version than here. Install the same"
    here, there = (_numbers(found["versions"]) for found in (host_identity(), identity["provenance"]))
    pairs = [(name, here.get(name), there.get(name)) for name in _SAME]
    differing = [f"{name} {other or 'not at all'}, not {own}" for name, own, other in pairs if own != other]
    if differing:
        return f"it has {', '.join(differing)}. Install the same"
    target = TargetInfo.from_json(identity["target"])
    if wanted is not None and target.tag != wanted.tag:
        how = "" if wanted.features <= target.features else ", and cannot even run its code"
        return f"it is {target.tag}, not {wanted.tag}{how}. Give it a key of its own"
    if identity["threads"] < threads:
        return f"it has {identity['threads']} processors, and {threads} threads are to be measured"
    return ""


def _numbers(versions: Mapping[str, str]) -> dict[str, str]:
    """Return versions without what stands behind them, such as a commit."""
    return {name: version.split()[0] for name, version in versions.items()}
