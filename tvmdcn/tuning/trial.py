# SPDX-License-Identifier: Apache-2.0
"""One trial of a tuning: build a schedule, check its numbers, measure it. Runs in worker processes.

A worker can be killed when a trial hangs, and dies alone when generated code crashes. Candidates travel as
decisions, not as programs: what is measured is what a build with these decisions gives a user.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tvmdcn.space import Decisions
from tvmdcn.spec import DeformConv2dSpec, Extents, spec_from_json
from tvmdcn.target import TargetInfo
from tvmdcn.tensors import numpy_dtype

__all__ = [
    "NO_ROOM",
    "TOLERANCE",
    "Job",
    "Outcome",
    "build_trial",
    "measure_trials",
    "save_inputs",
    "tolerance_of",
]

TOLERANCE = {"float64": 1e-11, "float32": 2e-5, "tf32": 4e-3, "float16": 4e-3, "bfloat16": 3e-2}
"""Largest error of an output that may win, relative to the largest value of the reference's."""

NO_ROOM = "no room: "
"""How a message begins that says that the disk is full."""
_ROOM = 1 << 20  # bytes; a kernel takes some tens of thousands
_BURST = 0.12  # seconds of calls in a measurement, at least
_MOST_CALLS, _FEWEST_CALLS = 200, 5


@dataclass(frozen=True)
class Job:
    """What all trials of a tuning share.

    Parameters
    ----------
    spec : DeformConv2dSpec
    extents : Extents
    target : TargetInfo
    threads : int
    directory : Path
        Private scratch directory; holds the inputs and the builds.
    """

    spec: DeformConv2dSpec
    extents: Extents
    target: TargetInfo
    threads: int
    directory: Path

    def to_json(self) -> dict[str, Any]:
        """Return the job as a dict of JSON types."""
        return {
            "spec": self.spec.to_json(),
            "extents": asdict(self.extents),
            "target": self.target.to_json(),
            "threads": self.threads,
            "directory": str(self.directory),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Job:
        """Return the job that :meth:`to_json` wrote."""
        return cls(
            spec_from_json(data["spec"]),
            Extents(**data["extents"]),
            TargetInfo.from_json(data["target"]),
            data["threads"],
            Path(data["directory"]),
        )


@dataclass(frozen=True)
class Outcome:
    """How a trial ended.

    Parameters
    ----------
    seconds : tuple of float
        Times of single calls; empty if the trial failed.
    error : float
        Largest error relative to the reference's largest value; NaN if nothing was computed.
    reason : str
        Empty, or why it failed: "build", "too much shared memory", "too many registers", "crash", "launch failure",
        "time-out", "wrong result" or "server lost", with a detail after a colon.
    machine : mapping
        Who measured it, as provenance of a record says it; empty for this machine.
    """

    seconds: tuple[float, ...] = ()
    error: float = math.nan
    reason: str = ""
    machine: Mapping[str, Any] = field(default_factory=dict)

    @property
    def median(self) -> float:
        """The median time in seconds; infinite if the trial failed."""
        return statistics.median(self.seconds) if self.seconds else math.inf

    @property
    def quiet(self) -> float:
        """The lower quartile, which a busy neighbour disturbs less; infinite if the trial failed."""
        return statistics.quantiles(self.seconds, n=4)[0] if len(self.seconds) > 1 else self.median


def tolerance_of(spec: DeformConv2dSpec) -> float:
    """Return the largest error, relative to the largest value, with which a schedule may win."""
    return TOLERANCE["tf32" if spec.tf32 else spec.dtype]


def build_trial(job_data: Mapping[str, Any], decisions_data: Mapping[str, Any], name: str) -> str:
    """Compile a candidate into ``<scratch>/<name>``; return an error, or an empty text. Runs in a worker.

    An error that begins with :data:`NO_ROOM` is not the candidate's.
    """
    from tvmdcn.errors import BuildError

    job, decisions = Job.from_json(job_data), Decisions.from_json(decisions_data)
    directory = job.directory / name
    try:
        _build(job, decisions, directory)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        return f"{NO_ROOM}{error}"
    except BuildError as error:
        full = shutil.disk_usage(job.directory).free < _ROOM
        return f"{NO_ROOM}{directory}: {os.strerror(errno.ENOSPC)}" if full else str(error)
    return ""


def _build(job: Job, decisions: Decisions, directory: Path) -> None:
    from tvmdcn.builder import compile_schedule, interface_of, new_schedule, write_library
    from tvmdcn.space import space_of

    directory.mkdir(mode=0o700, exist_ok=True)
    sch = new_schedule(job.spec, job.target)
    space_of(job.spec.operator, job.target.kind).schedule(sch, job.spec, job.target, decisions)
    write_library(compile_schedule(job.spec, job.target, sch.mod), job.target, directory / "kernel.so")
    manifest = directory / "manifest.json"
    manifest.write_text(json.dumps(asdict(interface_of(job.spec, job.target, sch.mod))))
    manifest.chmod(0o600)


def _load(job: Job, name: str) -> Any:
    """Return the kernel of a built candidate, as a user would have it."""
    from tvmdcn.artifact import Artifact
    from tvmdcn.cache_key import CacheKey
    from tvmdcn.kernel_interface import KernelInterface
    from tvmdcn.runtime import open_kernel

    directory = job.directory / name
    library = directory / "kernel.so"
    library.chmod(0o700)
    interface = KernelInterface.from_json(json.loads((directory / "manifest.json").read_text()))
    digest = hashlib.sha256(library.read_bytes()).hexdigest()
    key = CacheKey.of(job.spec, job.target, "default")
    return open_kernel(Artifact(directory, key, job.spec, job.target, interface, {}, "", 0.0, digest), job.threads)


_EXPECTED = "expected."  # before the name of an output in the file of inputs
_INPUTS: dict[Path, dict[str, np.ndarray]] = {}


def save_inputs(job: Job, tensors: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> None:
    """Write the arguments of all trials' calls, and the outputs that they must have, into the scratch directory."""
    # numpy.savez does not know bfloat16; its bits travel.
    raw: dict[str, Any] = {n: array.view("uint16") if array.itemsize == 2 else array for n, array in tensors.items()}
    raw |= {_EXPECTED + name: array for name, array in expected.items()}
    np.savez(job.directory / "inputs.npz", **raw)


def _inputs(job: Job) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return what :func:`save_inputs` wrote."""
    if job.directory not in _INPUTS:
        with np.load(job.directory / "inputs.npz") as data:
            _INPUTS[job.directory] = {name: data[name] for name in data.files}
    dtype, arrays = numpy_dtype(job.spec.dtype), _INPUTS[job.directory]
    tensors = {name: array.view(dtype) for name, array in arrays.items() if not name.startswith(_EXPECTED)}
    expected = {n.removeprefix(_EXPECTED): array for n, array in arrays.items() if n.startswith(_EXPECTED)}
    return tensors, expected


def _error(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> float:
    """Return the largest error of the outputs, each relative to its own largest value; infinite for a NaN."""
    worst = 0.0
    for name, wanted in expected.items():
        scale = float(np.abs(wanted).max()) or 1.0
        error = float(np.abs(found[name].astype("float64") - wanted).max()) / scale
        worst = max(worst, error if math.isfinite(error) else math.inf)
    return worst


def measure_trials(
    job_data: Mapping[str, Any], names: Sequence[str], rounds: int = 1
) -> list[tuple[list[float], float]]:
    """Check and measure built candidates, taking turns for `rounds`. Runs in a worker.

    Returns
    -------
    list of (times in seconds, relative error)
    """
    job = Job.from_json(job_data)
    tensors, expected = _inputs(job)
    if job.target.kind == "cuda":
        from tvmdcn.tuning.gpu_trial import measure_kernels

        return measure_kernels([_load(job, name) for name in names], tensors, lambda o: _error(o, expected), rounds)
    calls: list[Callable[[], Mapping[str, np.ndarray]]] = []
    results: list[tuple[list[float], float]] = []
    for name in names:
        call = _load(job, name).bind(tensors)
        calls.append(call)
        results.append(([], _error(call(), expected)))
    for turn in range(rounds):
        # Rotated, and reversed every other time: no candidate always runs behind the same neighbour.
        order = [(turn + i) % len(calls) for i in range(len(calls))][:: 1 if turn % 2 == 0 else -1]
        for i in order:
            calls[i]()
            spent = 0.0
            times = results[i][0]
            first = len(times)
            while len(times) - first < _FEWEST_CALLS or (spent < _BURST and len(times) - first < _MOST_CALLS):
                start = time.perf_counter()
                calls[i]()
                times.append(time.perf_counter() - start)
                spent += times[-1]
                if spent > 10 * _BURST:
                    break
    return results
