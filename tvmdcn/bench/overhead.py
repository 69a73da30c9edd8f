# SPDX-License-Identifier: Apache-2.0
"""What a user waits for besides the kernel: the overhead of a call, and the first result of a new process."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tvmdcn.bench.machine import choose_processors, held_to
from tvmdcn.bench.measurement import Measurement
from tvmdcn.bench.protocol import compare, describe_run
from tvmdcn.bench.provider import Prepared, Provider, from_nchw
from tvmdcn.bench.providers_backward import named_results, torch_tensors
from tvmdcn.bench.resume import Known
from tvmdcn.bench.statistics import summarize
from tvmdcn.bench.turns import Protocol
from tvmdcn.bench.worker import save_tensors
from tvmdcn.problems import PROBLEMS, Problem, make_tensors, parse_problem
from tvmdcn.spec import DeformConv2dSpec, Extents
from tvmdcn.tensors import Gradients, Tensors

__all__ = [
    "TINY",
    "measure_first_result",
    "measure_overhead",
    "prepare_autograd",
    "prepare_function",
    "prepare_module",
    "prepare_nothing",
    "prepare_operator",
]

# One channel, one tap, as few pixels as make a whole unit of a kernel: the arithmetic takes well under a microsecond,
# so a call is its overhead.
TINY = parse_problem("1,1,8,8,1,k=1x1")

_FIRST_RESULT = """
import time
start = time.perf_counter()
import tvmdcn
spec = tvmdcn.DeformConv2dSpec.from_json({spec!r})
kernel = tvmdcn.load(spec, schedule={schedule!r})
loaded = time.perf_counter()
import pathlib
from tvmdcn.bench.worker import load_tensors
t = load_tensors(pathlib.Path({folder!r}), spec)
again = time.perf_counter()
kernel(t.input, t.offset, t.weight, t.bias, t.mask)
print((loaded - start + time.perf_counter() - again) * 1e3)
"""


def _providers(schedule: str) -> list[Provider]:
    """Return who calls the tiny layer, and its gradients, how. Users' functions take the tuned schedule."""
    kernels, backward, here = "tvmdcn.bench.providers", "tvmdcn.bench.providers_backward", "tvmdcn.bench.overhead"
    calls = (
        ("overhead_numpy", f"{kernels}:prepare_ours", f"{backward}:prepare_ours_numpy", None),
        ("overhead_torch", f"{kernels}:prepare_ours_torch", f"{backward}:prepare_ours_torch", "torch"),
        ("overhead_function", f"{here}:prepare_function", f"{here}:prepare_function", "torch"),
        ("overhead_operator", f"{here}:prepare_operator", f"{here}:prepare_operator", "torch"),
        ("overhead_module", f"{here}:prepare_module", None, "torch"),
        ("overhead_autograd", f"{here}:prepare_autograd", f"{here}:prepare_autograd", "torch"),
    )
    nothing = f"{here}:prepare_nothing"
    return [
        *(
            Provider(f"ours-{schedule}", "ours", forward, package, schedule, backward=gradients, measure=measure)
            for measure, forward, gradients, package in calls
        ),
        Provider("torch-function", "floor", nothing, "torch", backward=nothing, measure="overhead_autograd"),
    ]


def measure_overhead(
    threads: Sequence[int] = (1,),
    *,
    schedule: str = "tuned",
    problem: Problem = PROBLEMS["r50_c4"],
    processes: int = 5,
    protocol: Protocol | None = None,
    command: str | None = None,
    run: str | None = None,
    known: Sequence[Measurement] = (),
    on_known: Callable[[Measurement], object] = lambda row: None,
    on_row: Callable[[Measurement], object] | None = None,
    on_step: Callable[[str], object] | None = None,
) -> list[Measurement]:
    """Measure the overhead of calls, forward and backward, and the time from import to the first result.

    Parameters
    ----------
    threads : sequence of int
        Numbers of threads.
    schedule : str
        Which of our schedules, where a kernel is called by itself.
    problem : Problem
        Whose first result is timed. Its artifact is built before, untimed.
    processes : int
        How many new processes the median is over.
    protocol, command, run, known, on_known, on_row, on_step
        As of :func:`tvmdcn.bench.protocol.compare`.

    Returns
    -------
    list of Measurement
        Fourteen per number of threads; failed ones with the reason.
    """
    options: dict[str, Any] = {"command": command, "run": run, "on_row": on_row, "on_step": on_step}
    options |= {"known": known, "on_known": on_known}
    rows = compare([TINY, TINY.backward], threads, _providers(schedule), protocol=protocol, **options)
    return rows + measure_first_result(threads, schedule=schedule, problem=problem, processes=processes, **options)


def measure_first_result(
    threads: Sequence[int] = (1,),
    *,
    schedule: str = "tuned",
    problem: Problem = PROBLEMS["r50_c4"],
    processes: int = 5,
    command: str | None = None,
    run: str | None = None,
    known: Sequence[Measurement] = (),
    on_known: Callable[[Measurement], object] = lambda row: None,
    on_row: Callable[[Measurement], object] | None = None,
    on_step: Callable[[str], object] | None = None,
) -> list[Measurement]:
    """Measure the time from import to the first result.

    Parameters
    ----------
    threads, schedule, problem, processes, command, run, known, on_known, on_row, on_step
        As of :func:`measure_overhead`.

    Returns
    -------
    list of Measurement
        One per number of threads; a failed one with the reason.
    """
    provider = Provider(f"ours-{schedule}", "ours", None, schedule=schedule, measure="first_result")
    describe, before = describe_run(command, run), Known(known)
    rows = []
    for count in threads:
        row = before.of(provider, problem, count)
        if row is not None:
            on_known(row)
            continue
        if on_step is not None:
            on_step(f"first result of {processes} new processes, {count} threads")
        rows.append(_first_result(problem, provider, count, processes, describe))
        if on_row is not None:
            on_row(rows[-1])
    return rows


# --- what users call, in the workers ------------------------------------------------------------------------


def prepare_function(
    spec: DeformConv2dSpec, extents: Extents, tensors: Tensors, threads: int, schedule: str | None
) -> Prepared:
    """Prepare ``tvmdcn.deform_conv2d``, or ``tvmdcn.deform_conv2d_backward``."""
    import tvmdcn

    return _prepare(spec, tensors, threads, tvmdcn.deform_conv2d, tvmdcn.deform_conv2d_backward)


def prepare_operator(
    spec: DeformConv2dSpec, extents: Extents, tensors: Tensors, threads: int, schedule: str | None
) -> Prepared:
    """Prepare ``torch.ops.tvmdcn.deform_conv2d``, or its backward."""
    import torch

    import tvmdcn.torch.ops  # noqa: F401 - registers them

    operators = torch.ops.tvmdcn
    return _prepare(spec, tensors, threads, operators.deform_conv2d, operators.deform_conv2d_backward)


def prepare_module(
    spec: DeformConv2dSpec, extents: Extents, tensors: Tensors, threads: int, schedule: str | None
) -> Prepared:
    """Prepare ``tvmdcn.DeformConv2d`` with frozen parameters."""
    import torch

    import tvmdcn

    torch.set_num_threads(threads)
    given = torch_tensors(spec, tensors)
    shape = (spec.in_channels, spec.out_channels, spec.kernel_size, spec.stride, spec.padding, spec.dilation)
    module = tvmdcn.DeformConv2d(*shape, spec.groups, dtype=given["weight"].dtype).requires_grad_(False)
    module.weight.copy_(given["weight"])
    module.bias.copy_(given["bias"])
    arguments = (given["input"], given["offset"], given.get("mask"))
    return Prepared(lambda: module(*arguments), lambda result: _array(result, spec))


def prepare_autograd(
    spec: DeformConv2dSpec, extents: Extents, tensors: Tensors, threads: int, schedule: str | None
) -> Prepared:
    """Prepare ``tvmdcn.deform_conv2d`` on tensors that all require gradients, or the backward of such a call."""
    import torch

    import tvmdcn

    torch.set_num_threads(threads)
    given = torch_tensors(spec, tensors)
    grad_output = given.pop("grad_output", None)
    for tensor in given.values():
        tensor.requires_grad_()
    arguments = (given["input"], given["offset"], given["weight"], given["bias"])
    geometry = {**_geometry(spec), "mask": given.get("mask")}
    if grad_output is None:
        return Prepared(
            lambda: tvmdcn.deform_conv2d(*arguments, **geometry), lambda result: _array(result.detach(), spec)
        )
    output = tvmdcn.deform_conv2d(*arguments, **geometry)
    asked = [name.removeprefix("grad_") for name in spec.outputs]
    inputs = [given[name] for name in asked]
    return Prepared(
        lambda: torch.autograd.grad(output, inputs, grad_output, retain_graph=True),
        lambda found: named_results(spec, dict(zip(asked, found, strict=True))),
    )


def prepare_nothing(
    spec: DeformConv2dSpec, extents: Extents, tensors: Tensors, threads: int, schedule: str | None
) -> Prepared:
    """Prepare what autograd takes by itself: as :func:`prepare_autograd` of a function that computes nothing."""
    import torch

    torch.set_num_threads(threads)
    given = torch_tensors(spec, tensors)
    grad_output = given.pop("grad_output", None)
    size = spec.output_size(extents.height, extents.width)
    output = torch.zeros(extents.batch, spec.out_channels, *size, dtype=given["input"].dtype)
    gradients = tuple(torch.zeros_like(tensor) for tensor in given.values())
    inputs = tuple(tensor.requires_grad_() for tensor in given.values())

    class Nothing(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *tensors: Any) -> Any:
            ctx.save_for_backward(*tensors)
            return output.detach()

        @staticmethod
        def backward(ctx: Any, *grad_outputs: Any) -> Any:
            _ = ctx.saved_tensors
            return gradients

    if grad_output is None:
        return Prepared(lambda: Nothing.apply(*inputs), None)
    recorded = Nothing.apply(*inputs)
    return Prepared(lambda: torch.autograd.grad(recorded, inputs, grad_output, retain_graph=True), None)


def _prepare(
    spec: DeformConv2dSpec, tensors: Tensors, threads: int, forward: Callable[..., Any], backward: Callable[..., Any]
) -> Prepared:
    """Prepare a function on torch tensors that require no gradients, or the one of gradients."""
    import torch

    torch.set_num_threads(threads)
    given = torch_tensors(spec, tensors)
    images, geometry = (given["input"], given["offset"], given["weight"]), _geometry(spec)
    bias, mask, grad_output = given["bias"], given.get("mask"), given.get("grad_output")
    if grad_output is None:
        return Prepared(lambda: forward(*images, bias, **geometry, mask=mask), lambda result: _array(result, spec))
    return Prepared(
        lambda: backward(grad_output, *images, mask, **geometry),
        lambda found: named_results(spec, dict(zip(Gradients._fields, found, strict=True))),
    )


def _geometry(spec: DeformConv2dSpec) -> dict[str, Any]:
    """Return stride, padding and dilation as users write them: an int where all are equal."""
    values = {"stride": spec.stride, "padding": spec.padding, "dilation": spec.dilation}
    return {name: value[0] if len(set(value)) == 1 else value for name, value in values.items()}


def _array(result: Any, spec: DeformConv2dSpec) -> np.ndarray:
    return from_nchw(result.double().numpy(), spec)


# --- the first result -----------------------------------------------------------------------------------------


def _first_result(
    problem: Problem,
    provider: Provider,
    threads: int,
    processes: int,
    describe: Callable[..., Measurement],
) -> Measurement:
    root = str(Path(__file__).resolve().parent.parent.parent)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH")))),
        "TVMDCN_NUM_THREADS": str(threads),
    }
    processors = choose_processors(threads)
    times = []
    with tempfile.TemporaryDirectory(prefix="tvmdcn-bench-") as folder:
        save_tensors(Path(folder), make_tensors(problem.spec, problem.extents))
        code = _FIRST_RESULT.format(spec=problem.spec.to_json(), schedule=provider.schedule, folder=folder)
        for index in range(processes + 1):
            try:
                with held_to(processors):
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
        affinity=processors and tuple(processors),
        **summarize([[time] for time in times]),
    )
