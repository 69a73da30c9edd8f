# SPDX-License-Identifier: Apache-2.0
"""``tvmdcn tune --dry-run``: what candidates for a GPU would take of it, without one.

Each candidate is scheduled and compiled for the GPU; nothing is run. The compiler's account of registers, spills and
shared memory, and the count of instructions, tell much of what a schedule will do, and whether it can run at all.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, as_completed
from pathlib import Path
from typing import Any

import numpy as np
from tvm.support.popen_pool import PopenPoolExecutor

from tvmdcn.errors import BuildError, SpecError, TvmdcnError
from tvmdcn.problems import Problem
from tvmdcn.space import Decisions
from tvmdcn.spec import DeformConv2dSpec, spec_from_json
from tvmdcn.target import TargetInfo, resolve_target

__all__ = ["compile_candidate", "dry_run", "print_rows", "write_rows"]

_TIMEOUT = 300.0  # seconds for one candidate
_WIDTH = 150  # columns of a log
_ATTEMPTS = 6  # wishes for each candidate that is wanted: many are rounded to the same decisions


def compile_candidate(
    spec_data: Mapping[str, Any], target_data: Mapping[str, Any], decisions_data: Mapping[str, Any]
) -> dict[str, Any]:
    """Compile one candidate; runs in a process of its own.

    Returns
    -------
    dict
        "decisions"; "kernels" (:meth:`KernelResources.to_json` by name) and "compiler", or "reason" why it failed:
        "too much shared memory", "too many registers", "build" or "schedule", with a detail after a colon.
    """
    from tvmdcn.builder import compile_kernels
    from tvmdcn.tuning.decision_search import DecisionNames
    from tvmdcn.tuning.workers import OVER_LIMITS

    spec, target = spec_from_json(spec_data), TargetInfo.from_json(target_data)
    wish = Decisions.from_json(decisions_data)
    row: dict[str, Any] = {"decisions": wish.to_json()}
    try:
        sch, made = DecisionNames(spec, target).scheduled(wish)
        row["decisions"] = made.to_json()
    except (BuildError, RuntimeError, ValueError) as error:  # what TVM says of impossible moves
        return {**row, "reason": f"schedule: {_last_line(error)}"}
    try:
        _, compiled = compile_kernels(spec, target, sch.mod)
    except BuildError as error:
        message = str(error)
        return {**row, "reason": message if message.startswith(OVER_LIMITS) else f"build: {message[:400]}"}
    kernels = {kernel.name: kernel.to_json() for kernel in compiled.kernels}
    return {**row, "kernels": kernels, "compiler": compiled.compiler}


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:200] if lines else type(error).__name__


def _wishes(spec: DeformConv2dSpec, target: TargetInfo, count: int, seed: int) -> list[Decisions]:
    """Return the defaults of all variants, then random decisions, no two the same."""
    from tvmdcn.tuning.decision_search import DecisionNames

    names, random = DecisionNames(spec, target), np.random.default_rng(seed)
    found = {json.dumps(made.to_json(), sort_keys=True): made for made in names.defaults.values()}
    for _ in range(_ATTEMPTS * count):
        if len(found) >= count:
            break
        wish = names.drawn(random)
        try:
            _, made = names.scheduled(wish)
        except (BuildError, RuntimeError, ValueError):
            made = wish  # its row says why not
        found.setdefault(json.dumps(made.to_json(), sort_keys=True), made)
    return list(found.values())[:count]


def dry_run(
    problems: Sequence[Problem],
    target: str | TargetInfo | None,
    *,
    trials: int,
    seed: int = 0,
    processes: int = 1,
    progress: Callable[[Problem, int, int], None] | None = None,
) -> Iterator[dict[str, Any]]:
    """Compile candidates of layers for a GPU; yield a row for each as it is done.

    Parameters
    ----------
    problems : sequence of Problem
    target : str or TargetInfo
        A GPU, such as "cuda-sm_90".
    trials : int
        Candidates of each layer; the defaults of all variants first.
    seed : int
    processes : int
        How many to compile at a time.
    progress : callable, optional
        ``progress(problem, done, all)``.

    Raises
    ------
    SpecError
        If the target is no GPU: there is no such account for processors.
    """
    info = resolve_target(target)
    if info.kind != "cuda":
        raise SpecError(
            f"--dry-run tells what candidates take of a GPU, and the target is {info.tag}. Name a GPU, for example "
            "--target cuda-sm_90."
        )
    # As the tuner's own: a process that hangs or crashes takes nothing with it.
    pool = PopenPoolExecutor(max_workers=processes, timeout=_TIMEOUT)
    try:
        for problem in problems:
            candidates = _wishes(problem.spec, info, trials, seed)
            futures = {
                pool.submit(compile_candidate, problem.spec.to_json(), info.to_json(), decisions.to_json()): number
                for number, decisions in enumerate(candidates)
            }
            for done, future in enumerate(as_completed(futures), 1):
                number = futures[future]
                row = {"problem": problem.name, "target": info.tag, "number": number}
                yield {**row, **_result(future, candidates[number])}
                if progress is not None:
                    progress(problem, done, len(candidates))
    finally:
        pool.shutdown()


def _result(future: Future[dict[str, Any]], decisions: Decisions) -> dict[str, Any]:
    """Return what a process found, or how it ended."""
    try:
        return future.result()
    except TimeoutError:
        return {"decisions": decisions.to_json(), "reason": f"time-out: more than {_TIMEOUT:.0f} s"}
    except Exception as error:  # whatever a process ends with is the candidate's failure
        return {"decisions": decisions.to_json(), "reason": f"crash: {_last_line(error)}"}


def write_rows(rows: Iterator[dict[str, Any]], path: Path | None) -> list[dict[str, Any]]:
    """Append rows to a file of JSON lines as they come, and return all."""
    found = []
    for row in rows:
        found.append(row)
        if path is not None:
            try:
                with path.open("a") as file:
                    file.write(json.dumps(row, sort_keys=True) + "\n")
            except OSError as error:
                raise TvmdcnError(f"{path} cannot be written: {error.strerror}.") from error
    return found


def _main_kernels(row: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return the kernels that do the work, in order: those that multiply, or the largest; packing is left out."""
    kernels = {name: kernel for name, kernel in row["kernels"].items() if not name.startswith("pack_weight")}
    found = {name: kernels[name] for name in sorted(kernels) if any(map(kernels[name]["instructions"].get, _PRODUCTS))}
    if found:
        return found
    name = max(kernels, key=lambda name: (kernels[name]["shared_bytes"], kernels[name]["registers"]))
    return {name: kernels[name]}


_PRODUCTS = ("HMMA", "FFMA")
_COUNTED = ("HMMA", "FFMA", "LDSM", "LDGSTS", "LDG.128", "STS.128", "RED", "LDL", "STL", "BAR")


def print_rows(rows: Sequence[Mapping[str, Any]], console: Any = None) -> None:
    """Print a table of the candidates of each layer, their schedules, and the failures by reason.

    A candidate with several kernels that multiply, such as one of gradients, has a line for each. Sizes are bytes;
    "warps" are those at once, of all that a multiprocessor can hold, and "limit" is what keeps more out; then come
    counts of instructions (:data:`tvmdcn.cuda_compiler.INSTRUCTIONS`).
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    if console is None:
        console = Console()
        console = console if console.is_terminal else Console(width=_WIDTH)
    for problem in dict.fromkeys(row["problem"] for row in rows):
        mine = sorted((row for row in rows if row["problem"] == problem), key=lambda row: int(row["number"]))
        good = [row for row in mine if "kernels" in row]
        main = [(row["number"], name, kernel) for row in good for name, kernel in _main_kernels(row).items()]
        counted = [name for name in _COUNTED if any(kernel["instructions"].get(name) for _, _, kernel in main)]
        several = len(main) > len(good)
        title = f"{problem} for {mine[0]['target']}: {len(good)} of {len(mine)} compile"
        table = Table(title=title, title_justify="left", box=box.SIMPLE, padding=(0, 1))
        headings = ("regs", "spill", "stack", "shared", "threads", "warps", "limit", *counted)
        for heading in ("", *(["kernel"] if several else []), *headings):
            table.add_column(heading, justify="right")
        for number, name, kernel in main:
            sizes = [kernel["registers"], kernel["spill_stores"] + kernel["spill_loads"], kernel["stack_bytes"]]
            sizes += [kernel["shared_bytes"], kernel["threads"], f"{kernel['occupancy']:.0%}", kernel["limit"]]
            counts = [kernel["instructions"].get(name, 0) for name in counted]
            shown = [name.rpartition("kernel_")[2]] if several else []
            table.add_row(*map(str, (number, *shown, *sizes, *counts)))
        if good:
            console.print(table)
        for row in good:
            decisions = Decisions.from_json(row["decisions"])
            values = " ".join(f"{name}={value}" for name, value in decisions.values.items())
            console.print(f"{row['number']}: {decisions.variant} {values}", highlight=False)
        failures = Counter(row["reason"].split(":")[0] for row in mine if "reason" in row)
        for reason, count in failures.most_common():
            example = next(row["reason"] for row in mine if row.get("reason", "").startswith(reason))
            console.print(f"failed: {count} x {reason}, for example: {example}", highlight=False)
        if good and not counted:
            console.print("no instructions are counted without nvdisasm: pip install nvidia-cuda-nvdisasm")
