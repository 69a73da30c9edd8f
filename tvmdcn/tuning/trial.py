# SPDX-License-Identifier: Apache-2.0
"""One trial of a tuning: build a schedule, check its numbers, measure it. Runs in worker processes.

A worker can be killed when a trial hangs, and dies alone when generated code crashes. Candidates travel as
decisions, not as programs: what is measured is what a build with these decisions gives a user.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tvmdcn.space import Decisions
from tvmdcn.spec import DeformConv2dSpec, Extents, spec_from_json
from tvmdcn.target import TargetInfo
from tvmdcn.tensors import numpy_dtype

__all__ = ["TOLERANCE", "Job", "Outcome", "Workers", "save_inputs"]

TOLERANCE = {"float64": 1e-11, "float32": 2e-5, "float16": 4e-3, "bfloat16": 3e-2}
"""Largest error of an output that may win, relative to the largest value of the reference's."""

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
        Empty, or why it failed: "build", "crash", "time-out" or "wrong result", with a detail after a colon.
    """

    seconds: tuple[float, ...] = ()
    error: float = math.nan
    reason: str = ""

    @property
    def median(self) -> float:
        """The median time in seconds; infinite if the trial failed."""
        return statistics.median(self.seconds) if self.seconds else math.inf

    @property
    def quiet(self) -> float:
        """The lower quartile, which a busy neighbour disturbs less; infinite if the trial failed."""
        return statistics.quantiles(self.seconds, n=4)[0] if len(self.seconds) > 1 else self.median


def build_trial(job_data: Mapping[str, Any], decisions_data: Mapping[str, Any], name: str) -> str:
    """Compile a candidate into ``<scratch>/<name>``; return an error, or an empty text. Runs in a worker."""
    from tvmdcn.builder import compile_schedule, interface_of, new_schedule
    from tvmdcn.errors import BuildError
    from tvmdcn.space import space_of

    job, decisions = Job.from_json(job_data), Decisions.from_json(decisions_data)
    directory = job.directory / name
    directory.mkdir(mode=0o700, exist_ok=True)
    sch = new_schedule(job.spec, job.target)
    space_of(job.spec.operator, job.target.kind).schedule(sch, job.spec, job.target, decisions)
    try:
        compile_schedule(job.spec, job.target, sch.mod).export_library(str(directory / "kernel.so"))
    except BuildError as error:
        return str(error)
    interface = asdict(interface_of(job.spec, job.target, sch.mod))
    manifest = directory / "manifest.json"
    manifest.write_text(json.dumps(interface))
    manifest.chmod(0o600)
    return ""


def _load(job: Job, name: str) -> Any:
    """Return the kernel of a built candidate, as a user would have it."""
    from tvmdcn.artifact import Artifact, KernelInterface
    from tvmdcn.cache_key import CacheKey
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


class Workers:
    """The processes of a tuning: some that build, one that measures while nothing else runs.

    Parameters
    ----------
    job : Job
    builders : int
    build_timeout, run_timeout : float
        Seconds after which a trial is given up, and its process killed.
    """

    def __init__(self, job: Job, builders: int, build_timeout: float = 60.0, run_timeout: float = 60.0) -> None:
        from tvm.support.popen_pool import PopenPoolExecutor

        self.job = job
        self._data = job.to_json()
        self._builders = PopenPoolExecutor(max_workers=builders, timeout=build_timeout)
        self._runner = PopenPoolExecutor(max_workers=1, timeout=run_timeout)
        self._count = 0

    def __enter__(self) -> Workers:
        """Return the workers; the end of the block ends their processes."""
        return self

    def __exit__(self, *details: object) -> None:
        """End the processes, whatever they are doing."""
        for pool in (self._builders, self._runner):
            pool.shutdown()

    def build(self, candidates: Sequence[Decisions]) -> list[tuple[str, str]]:
        """Compile candidates; return (name, reason of failure) for each."""
        futures: list[tuple[str, Any]] = []
        try:
            return self._build(candidates, futures)
        finally:
            # After Ctrl-C, what has not begun must not begin: the pool would wait for it in the end.
            for _, future in futures:
                future.cancel()

    def _build(self, candidates: Sequence[Decisions], futures: list[tuple[str, Any]]) -> list[tuple[str, str]]:
        for decisions in candidates:
            self._count += 1
            name = f"trial{self._count}"
            futures.append((name, self._builders.submit(build_trial, self._data, decisions.to_json(), name)))
        results = []
        for name, future in futures:
            try:
                message = future.result()
                results.append((name, f"build: {message}" if message else ""))
            except TimeoutError:
                results.append((name, "time-out: build"))
            except Exception as error:  # whatever a worker ends with is the trial's failure, not the tuning's
                results.append((name, f"build: {_last_line(error)}"))
        return results

    def measure(self, name: str) -> Outcome:
        """Check and measure one built candidate."""
        return self.measure_together([name], 1)[0]

    def measure_together(self, names: Sequence[str], rounds: int) -> list[Outcome]:
        """Check and measure built candidates in turns, for a fair comparison."""
        limit = TOLERANCE[self.job.spec.dtype]
        try:
            rows = self._runner.submit(measure_trials, self._data, list(names), rounds).result()
        except TimeoutError:
            return [Outcome(reason="time-out: run")] * len(names)
        except Exception as error:  # the worker died, or the call raised: the trial's failure
            return [Outcome(reason=f"crash: {_last_line(error)}")] * len(names)
        return [
            Outcome(tuple(times), error)
            if error <= limit
            else Outcome(error=error, reason=f"wrong result: relative error {error:.1e} above {limit:.0e}")
            for times, error in rows
        ]

    def discard(self, name: str) -> None:
        """Delete a built candidate."""
        shutil.rmtree(self.job.directory / name, ignore_errors=True)


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # A traceback from a worker ends with what happened.
    return lines[-1][:200] if lines else type(error).__name__
