# SPDX-License-Identifier: Apache-2.0
"""What a user waits for besides the kernel: the overhead of a call, and the first result of a new process."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from tvmdcn.bench_protocol import Protocol, compare, describe_run
from tvmdcn.bench_worker import save_tensors
from tvmdcn.measurement import Measurement, percentile
from tvmdcn.problems import PROBLEMS, Problem, make_tensors, parse_problem
from tvmdcn.providers import Provider

__all__ = ["TINY", "measure_overhead"]

# One channel, nine pixels, one tap: the arithmetic takes well under a microsecond, so a call is its overhead.
TINY = parse_problem("1,1,3,3,1,k=1x1")

_FIRST_RESULT = """
import time
start = time.perf_counter()
import tvmdcn
spec = tvmdcn.DeformConv2dSpec.from_json({spec!r})
kernel = tvmdcn.load(spec, schedule={schedule!r})
loaded = time.perf_counter()
import pathlib
from tvmdcn.bench_worker import load_tensors
t = load_tensors(pathlib.Path({folder!r}), spec)
again = time.perf_counter()
kernel(t.input, t.offset, t.weight, t.bias, t.mask)
print((loaded - start + time.perf_counter() - again) * 1e3)
"""


def measure_overhead(
    threads: Sequence[int] = (1,),
    *,
    schedule: str = "tuned",
    problem: Problem = PROBLEMS["r50_c4"],
    processes: int = 5,
    command: str | None = None,
    on_row: Callable[[Measurement], object] | None = None,
    on_step: Callable[[str], object] | None = None,
) -> list[Measurement]:
    """Measure the overhead of a call with NumPy and torch, and the time from import to the first result.

    Parameters
    ----------
    threads : sequence of int
        Numbers of threads.
    schedule : str
        Which of our schedules.
    problem : Problem
        Whose first result is timed. Its artifact is built before, untimed.
    processes : int
        How many new processes the median is over.
    command, on_row, on_step
        As of :func:`tvmdcn.bench_protocol.compare`.

    Returns
    -------
    list of Measurement
        Three per number of threads; failed ones with the reason.
    """
    rows: list[Measurement] = []

    def keep(row: Measurement) -> None:
        rows.append(row)
        if on_row is not None:
            on_row(row)

    for measure, source, package in (
        ("overhead_numpy", "prepare_ours", None),
        ("overhead_torch", "prepare_ours_torch", "torch"),
    ):
        provider = Provider(f"ours-{schedule}", "ours", f"tvmdcn.providers:{source}", package, schedule)
        compare([TINY], threads, [provider], measure=measure, command=command, on_row=keep, on_step=on_step)
    provider = Provider(f"ours-{schedule}", "ours", "-", schedule=schedule)
    describe = describe_run("first_result", command)
    for count in threads:
        if on_step is not None:
            on_step(f"first result of {processes} new processes, {count} threads")
        keep(_first_result(problem, provider, count, processes, describe))
    return rows


def _first_result(
    problem: Problem,
    provider: Provider,
    threads: int,
    processes: int,
    describe: Callable[..., Measurement],
) -> Measurement:
    root = str(Path(__file__).resolve().parent.parent)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH")))),
        "TVMDCN_NUM_THREADS": str(threads),
    }
    times = []
    with tempfile.TemporaryDirectory(prefix="tvmdcn-bench-") as folder:
        save_tensors(Path(folder), make_tensors(problem.spec, problem.extents))
        code = _FIRST_RESULT.format(spec=problem.spec.to_json(), schedule=provider.schedule, folder=folder)
        for index in range(processes + 1):
            try:
                done = subprocess.run(
                    [sys.executable, "-c", code],
                    env=environment,
                    capture_output=True,
                    text=True,
                    timeout=Protocol().prepare_timeout,
                )
            except subprocess.TimeoutExpired as error:
                reason = f"no result within {error.timeout:g} s"
                return describe(problem, provider, threads, status="failed", reason=reason)
            if done.returncode:
                lines = done.stderr.strip().splitlines() or [f"ended with status {done.returncode}"]
                return describe(problem, provider, threads, status="failed", reason=lines[-1][:300])
            if index:  # the first may have built the artifact
                times.append(float(done.stdout.strip().splitlines()[-1]))
    return describe(
        problem,
        provider,
        threads,
        median_ms=percentile(times, 0.5),
        min_ms=min(times),
        p10=percentile(times, 0.1),
        p90=percentile(times, 0.9),
        runs=len(times),
    )
