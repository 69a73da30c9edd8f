# SPDX-License-Identifier: Apache-2.0
"""``tvmdcn stages``: where the time of a layer goes, stage by stage, measured.

The kernel is compiled once more with a switch for each stage (:mod:`tvmdcn.bench.switches`), must give the results of
the one that ships, and is called with more and more of its stages switched on, in two orders, in turns with the one
that ships. What that says is worked out in :mod:`tvmdcn.bench.breakdown`.

Before each turn the whole kernel runs once, so that a stage whose predecessor is off finds what that left in memory.
The runtime hands out memory by size: in tiny layers, whose buffers are alike, it may be another buffer's. Places in
memory are never read so: a stage that reads them is not run without the one that computes them.
"""

from __future__ import annotations

import contextlib
import datetime
import shlex
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from tvmdcn import threads as thread_pool
from tvmdcn.arrays import NumpyArrays
from tvmdcn.bench.breakdown import KIND, Breakdown
from tvmdcn.errors import BuildError, TvmdcnError
from tvmdcn.native import Frame, Tensor, load_module
from tvmdcn.problems import OPERATORS, PROBLEMS, Problem, of_operators, parse_problem
from tvmdcn.runtime import open_kernel

if TYPE_CHECKING:
    from tvmdcn.artifact import Artifact
    from tvmdcn.bench.switches import SwitchedProgram

__all__ = ["SwitchedKernel", "measure_stages", "stages_command"]

_ROUNDS = 15
_BURST = 0.02  # seconds of calls in a turn
_FEWEST_CALLS, _MOST_CALLS = 3, 50
_SLOW = 40.0  # seconds for a layer, beyond which there are fewer rounds
_FEWEST_ROUNDS = 5


class SwitchedKernel:
    """A kernel whose stages can be switched off, and the shipped one, both ready to be called on the same tensors.

    Parameters
    ----------
    artifact : Artifact
        Of the shipped kernel; the other is compiled, for this process only, with the same decisions.
    tensors : mapping of str to ndarray
        The arguments by name.
    threads : int

    Raises
    ------
    BuildError
        If the stages of its operator are not known, TVM refuses, or the image is too small.
    """

    def __init__(self, artifact: Artifact, tensors: Mapping[str, np.ndarray], threads: int) -> None:
        from tvmdcn.bench.switches import SLOTS

        if artifact.target.kind != "llvm":
            raise BuildError(
                f"stages are measured on processors, not on {artifact.target.tag}: a GPU works on all at once. "
                "What its kernel uses is in a report (--schedules)."
            )
        spec, kernel = artifact.spec, open_kernel(artifact, threads)
        self._threads = threads
        self.shipped = kernel.bind(tensors)
        self.outputs = self.shipped()
        (call,) = kernel._calls.values()  # the division into tiles, which depends on the threads
        pixels = tensors["offset" if "offset" in spec.inputs else "grad_output"].shape
        if np.prod(pixels[2:] if spec.layout == "NCHW" else pixels[1:3]) < artifact.kernel.granule:
            raise BuildError(f"an image of fewer than {artifact.kernel.granule} output pixels is not taken apart.")
        self.program = _switched(artifact)
        self.stages = self.program.stages
        self._table = np.zeros((len(self.stages), SLOTS), np.float32)
        function = _compile(artifact, self.program)
        arguments = dict(tensors)
        if "bias" in spec.inputs:
            bias = tensors.get("bias", np.zeros(spec.out_channels))
            arguments["bias"] = np.ascontiguousarray(bias, spec.accumulator_dtype)
        packed = kernel.pack(tensors["weight"]) if "weight" in spec.inputs else None
        self._kept = (kernel, packed, arguments)  # their memory is used by every call
        self._frame = Frame(function, [*call.plan, Tensor(self._table.shape, "float32")])
        arrays = [arguments.get(name) for name in spec.inputs] + [self.outputs[name] for name in spec.outputs]
        for place, name, array in zip(self._frame.pointers, (*spec.inputs, *spec.outputs), arrays, strict=False):
            weight = packed.pointer if name == "weight" and packed is not None else 0
            self._frame.words[place] = weight or NumpyArrays.pointer(array)
        self._frame.words[self._frame.pointers[-1]] = NumpyArrays.pointer(self._table)

    def switch(self, on: Iterable[str]) -> None:
        """Switch these stages on and all others off.

        Raises
        ------
        BuildError
            If a stage lacks one without which it would read wherever its memory happens to say.
        """
        chosen = set(on)
        for stage in chosen:
            if missing := self.program.needs[stage] - chosen:
                raise BuildError(f"stage {stage} cannot run without {', '.join(sorted(missing))}.")
        thread_pool.use_threads(self._threads)
        self._table[:] = 0
        for stage in chosen:
            self._table[self.stages.index(stage)] = 1

    def run(self) -> None:
        """Call the kernel with the stages that are switched on."""
        self._frame.run()

    def same_results(self) -> bool:
        """Return whether all stages together give, bit for bit, what the shipped kernel gives."""
        expected = {name: array.copy() for name, array in self.shipped().items()}
        for array in self.outputs.values():
            array[...] = np.nan
        self.switch(self.stages)
        self.run()
        return all(np.array_equal(array, expected[name], equal_nan=True) for name, array in self.outputs.items())


def _switched(artifact: Artifact) -> SwitchedProgram:
    """Return the program of an artifact, with switches."""
    from tvmdcn.bench.switches import switched_program
    from tvmdcn.builder import naive_schedule, new_schedule
    from tvmdcn.space import Decisions, space_of

    spec, target = artifact.spec, artifact.target
    if artifact.schedule.get("decisions"):
        sch = new_schedule(spec, target)
        decisions = Decisions.from_json(artifact.schedule["decisions"])
        space_of(spec.operator, target.kind).schedule(sch, spec, target, decisions)
    else:
        sch = naive_schedule(spec, target)
    return switched_program(sch.mod[spec.operator], spec.operator)


def _compile(artifact: Artifact, program: SwitchedProgram) -> Any:
    """Return the compiled function of a program with switches."""
    import tvm

    from tvmdcn.builder import compile_schedule

    spec, name = artifact.spec, artifact.kernel.entry
    module = tvm.IRModule({name: program.function.with_attr("global_symbol", name)})
    with tempfile.TemporaryDirectory(prefix="tvmdcn-stages-") as folder:
        path = Path(folder) / "kernel.so"
        compile_schedule(spec, artifact.target, module).export_library(str(path))
        return load_module(path).function(name)


def _time(run: Callable[[], object], calls: int) -> float:
    """Return the median milliseconds of a call."""
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return 1e3 * float(np.median(times))


def _settings(program: SwitchedProgram) -> list[list[str]]:
    """Return what is switched on in each setting: the beginnings of both orders."""
    found = {frozenset(order[:end]): None for order in program.orders() for end in range(len(program.stages) + 1)}
    return [[stage for stage in program.stages if stage in setting] for setting in found]


def measure_stages(
    problem: Problem, schedule: str = "tuned", threads: int = 1, rounds: int = _ROUNDS
) -> dict[str, Any]:
    """Measure what each stage of a layer, or of its gradients, costs on this machine.

    Parameters
    ----------
    problem : Problem
    schedule : {"tuned", "default", "naive"}
    threads : int
    rounds : int
        Turns of each setting; fewer, but at least 5, if a call is very slow.

    Returns
    -------
    dict
        The fields of a row of the kind "stages" that say what was measured, see :class:`tvmdcn.bench.breakdown.
        Breakdown`: ``stages``, ``orders`` (two), ``settings`` (``on``, and ``turns_ms``, the median call of each
        turn), ``shipped_ms`` (likewise), ``runs`` (timed calls), ``decisions``.

    Raises
    ------
    BuildError, ArtifactError
        If the kernel cannot be built or loaded.
    BuildError
        If the kernel with switches gives other results than the one that ships.
    """
    from tvmdcn.bench.turns import turn_order
    from tvmdcn.builder import build
    from tvmdcn.te import operator_of

    spec = problem.spec
    artifact = build(spec, None, schedule)
    kernel = SwitchedKernel(artifact, operator_of(spec).tensors(spec, problem.extents), threads)
    if not kernel.same_results():
        raise BuildError(f"{problem.name}: with switches the results are others than those of the shipped kernel.")
    settings = _settings(kernel.program)
    kernel.switch(kernel.stages)
    # With fewer stages a call is no slower; a turn has two more, which are not timed.
    call_seconds = max(_time(kernel.run, 3), 1e-3) / 1e3
    calls = min(max(round(_BURST / call_seconds), _FEWEST_CALLS), _MOST_CALLS)
    turn_seconds = call_seconds * (calls + 2) * (len(settings) + 1)
    rounds = min(rounds, max(_FEWEST_ROUNDS, round(_SLOW / turn_seconds)))
    turns: list[list[float]] = [[] for _ in range(len(settings) + 1)]
    for index in range(rounds):
        for place in turn_order(range(len(turns)), index):
            run: Callable[[], object] = kernel.shipped
            if place < len(settings):
                # Once as a whole, so that what the stages read is what they would find.
                kernel.switch(kernel.stages)
                kernel.run()
                kernel.switch(settings[place])
                run = kernel.run
            run()
            turns[place].append(_time(run, calls))
    return {
        "stages": list(kernel.stages),
        "orders": [list(order) for order in kernel.program.orders()],
        "settings": [
            {"on": on, "turns_ms": [float(f"{value:.6g}") for value in times]}
            for on, times in zip(settings, turns[:-1], strict=True)
        ],
        "shipped_ms": [float(f"{value:.6g}") for value in turns[-1]],
        "runs": rounds * calls * len(turns),
        "decisions": artifact.schedule.get("decisions") or None,
        "artifact": artifact.path.name,
    }


@contextlib.contextmanager
def _describing(threads: int, command: str | None) -> Iterator[Callable[..., dict[str, Any]]]:
    """Hold the process to as many processors as threads, and give a function that makes rows."""
    from tvmdcn.bench.machine import choose_processors, held_to, identify_commit, identify_machine, identify_versions
    from tvmdcn.bench.schema import SCHEMA

    common = {
        "schema": SCHEMA,
        "kind": KIND,
        "run": uuid.uuid4().hex[:12],
        "device": "cpu",
        "machine": identify_machine(),
        "versions": identify_versions(),
        "commit": identify_commit(),
        "command": command or shlex.join(sys.argv) or "python",
    }
    processors = choose_processors(threads)

    def row(problem: Problem, schedule: str, **result: Any) -> dict[str, Any]:
        return {
            **common,
            "problem": problem.forward.name,
            "spec": problem.spec.to_json(),
            "extents": asdict(problem.extents),
            "provider": f"ours-{schedule}",
            "role": "ours",
            "schedule": schedule,
            "threads": threads,
            "affinity": processors,
            "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
            "status": "ok",
            "reason": None,
            "note": None,
            **result,
        }

    with held_to(processors):
        yield row


def _show(row: Mapping[str, Any]) -> None:
    found = Breakdown.of(row)
    click.echo(
        f"{found.title}: {found.shipped_ms:.3f} ms, {found.overhead:.2f}x of that with switches "
        f"({found.schedule}, {found.threads} thread{'s' if found.threads > 1 else ''})"
    )
    for stage in found.stages:
        share, low, high = (100 * value / found.whole_ms for value in (stage.ms, stage.low_ms, stage.high_ms))
        click.echo(f"  {stage.name:18} {stage.ms:9.4f} ms {share:5.1f} %  ({low:.1f} to {high:.1f})")
    click.echo(f"  {'rest':18} {found.rest_ms:9.4f} ms {100 * found.rest_ms / found.whole_ms:5.1f} %")


@click.command("stages", context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--problem", "names", multiple=True, required=True, help="A named layer, 'all', or N,Cin,H,W,Cout,...")
@click.option(
    "--operator",
    type=click.Choice(OPERATORS),
    default=OPERATORS[0],
    show_default=True,
    help="The layers, their gradients, or both.",
)
@click.option(
    "--schedule",
    type=click.Choice(["tuned", "default", "naive"]),
    default="tuned",
    show_default=True,
    help="Tuned falls back on default where there is no record.",
)
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="Threads of a call.")
@click.option("--rounds", type=click.IntRange(1), default=_ROUNDS, show_default=True, help="Turns of each setting.")
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="A file of rows (JSON lines) to append to, for a report.",
)
def stages_command(
    names: tuple[str, ...], operator: str, schedule: str, threads: int, rounds: int, output: Path | None
) -> None:
    """Measure where the time of layers goes, stage by stage, on this machine."""
    problems: list[Problem] = []
    for name in names:
        problems += PROBLEMS.values() if name == "all" else [parse_problem(name)]
    sys.exit(_measure_all(of_operators(dict.fromkeys(problems), operator), schedule, threads, rounds, output))


def _measure_all(problems: Sequence[Problem], schedule: str, threads: int, rounds: int, output: Path | None) -> int:
    from tvmdcn.bench.rows import append_row

    status = 0
    with _describing(threads, None) as describe:
        for problem in problems:
            try:
                row = describe(problem, schedule, **measure_stages(problem, schedule, threads, rounds))
                _show(row)
            except TvmdcnError as error:  # this layer's trouble: the others may do better
                click.echo(f"Error: {problem.name}: {error}", err=True)
                row = describe(problem, schedule, status="failed", reason=str(error))
                status = 1
            if output is not None:
                append_row(output, row)
    return status


if __name__ == "__main__":
    stages_command()
