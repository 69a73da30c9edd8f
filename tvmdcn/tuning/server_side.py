# SPDX-License-Identifier: Apache-2.0
"""What a server of TVM's RPC does for a farm (:mod:`tvmdcn.tuning.farm`): says what machine it is, and measures.

TVM imports what packages declare as an entry point of the group "tvm.backends", and so :func:`register` runs in every
process that imports TVM where tvmdcn is installed: a plain ``python -m tvm.exec.rpc_server`` can measure for us.
There is a process for each connection, in which all functions here are called, one at a time; they answer with JSON
and never raise, so that a client takes any exception for a broken connection.

Candidates run in a process of their own below that one, as when tuning on one machine. A connection's process that
crashes would take the server with it: TVM 0.27 then ends the thread that listens, and the server stays deaf.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from concurrent.futures import Future

    from tvmdcn.tuning.trial import Outcome
    from tvmdcn.tuning.workers import LocalMeasuring

__all__ = ["PREFIX", "PROTOCOL", "register"]

PREFIX = "tvmdcn.farm."
"""How the names of the registered functions begin."""
PROTOCOL = 1
"""Raise with the names, the arguments or the answers of the registered functions."""


def register() -> None:
    """Offer the functions of this module to the clients of TVM's RPC servers; light, and safe to call again."""
    import tvm_ffi

    for function in (identify, put, begin, poll):
        tvm_ffi.register_global_func(PREFIX + function.__name__, _answering(function), override=True)


def _answering(function: Callable[..., Any]) -> Callable[..., str]:
    @functools.wraps(function)
    def answer(*arguments: Any) -> str:
        try:
            return json.dumps({"value": function(*arguments)})
        except Exception as error:  # whatever it is, it is no fault of the connection
            return json.dumps({"error": f"{type(error).__name__}: {str(error)[:500]}"})

    return answer


def identify(kind: str) -> dict[str, Any]:
    """Return what machine this is, and what is installed.

    Parameters
    ----------
    kind : str
        The kind of targets that are asked for, such as "llvm".
    """
    from tvmdcn.bench.machine import identify_versions
    from tvmdcn.cache_key import ABI
    from tvmdcn.target import host_identity, resolve_target
    from tvmdcn.threads import thread_count

    target = resolve_target(kind).to_json()
    return {
        "protocol": PROTOCOL,
        "abi": ABI,
        "target": target,
        "threads": thread_count(),
        "provenance": {**host_identity(), "target": target, "versions": identify_versions()},
    }


class _Session:
    """What the process of a connection holds."""

    measuring: LocalMeasuring | None = None
    running: Future[list[Outcome]] | None = None
    finished: tuple[Path, ...] = ()  # directories to delete when the outcomes are known


def _directory(name: str) -> Path:
    """Return a path in the private directory of the connection, which the server deletes when that ends."""
    import tvm_ffi

    root = Path(str(tvm_ffi.get_global_func("tvm.rpc.server.workpath")(""))).resolve()
    path = (root / name).resolve()
    if not path.is_relative_to(root):
        raise ValueError(f"{name!r} is no name of a file.")
    return path


def put(name: str, content: Any) -> None:
    """Write a file into the connection's directory."""
    path = _directory(name)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.write_bytes(bytes(content))
    path.chmod(0o600)


def begin(job_data: str, names: str, rounds: int, run_timeout: float) -> None:
    """Begin to check and measure candidates; their files, and the job's inputs, have been put.

    Parameters
    ----------
    job_data, names : str
        A job and a list of names, as JSON. The job's directory is a name in the connection's.
    rounds : int
    run_timeout : float
        Seconds after which a measurement is given up. That of the connection's first call holds.
    """
    from tvmdcn.tuning.trial import Job
    from tvmdcn.tuning.workers import LocalMeasuring

    job = Job.from_json(json.loads(job_data))
    job = replace(job, directory=_directory(str(job.directory)))
    if _Session.measuring is None:
        _Session.measuring = LocalMeasuring(run_timeout)
    wanted = json.loads(names)
    _Session.finished = tuple(job.directory / name for name in wanted)
    _Session.running = _Session.measuring.submit(job, wanted, rounds)


def poll(seconds: float) -> list[dict[str, Any]] | None:
    """Return the outcomes of what was begun; None if they are not there within so many seconds."""
    if _Session.running is None:
        return None
    try:
        outcomes = _Session.running.result(seconds)
    except TimeoutError:
        return None
    _Session.running = None
    for folder in _Session.finished:
        shutil.rmtree(folder, ignore_errors=True)
    return [asdict(outcome) for outcome in outcomes]
