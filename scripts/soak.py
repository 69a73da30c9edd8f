#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Call random layers on random images for a long time, and see that nothing grows and every number is right.

    python scripts/soak.py                                   # 20,000 calls of 200 layers, 10 to 20 minutes
    python scripts/soak.py --signatures 20 --calls 2000      # a minute or two

Layers of all kinds and dtypes, drawn from a seed, are compiled first, by processes of their own. Then one process
calls them, each time with other sizes and values, as NumPy and as torch, directly and through the dispatcher, with
packed weights and with gradients, from several threads and with wrong arguments. Now and then all kernels are dropped
and loaded anew from disk, or an artifact is thrown away and built again. Every result is compared with the float64
reference, and what the process holds (resident memory, file descriptors, threads) is noted every few hundred calls:
the median of the last quarter of the run may be above that of the second quarter only by the bounds.

The exit status is 1 if something grew, and an error is raised for a wrong number.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import gc
import json
import multiprocessing
import os
import random
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from soak_calls import (
    CALLERS,
    Case,
    WrongResult,
    call_numpy,
    call_packed,
    call_torch,
    draw_layers,
    gradient_of,
)

from tvmdcn import api, gradient, runtime
from tvmdcn.artifact import find
from tvmdcn.bench.machine import identify_machine, identify_versions
from tvmdcn.cache_key import CacheKey
from tvmdcn.spec import DeformConv2dSpec
from tvmdcn.target import detect_target

BOUNDS = {"memory": 16 << 20, "descriptors": 2, "threads": 2}
"""What may be added between the second and the last quarter: bytes, and numbers."""
WITH_GRADIENTS = 4  # every fourth layer


THREADS = 4


# --- the run ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """What the process holds after some calls."""

    calls: int
    seconds: float
    memory: int
    descriptors: int
    threads: int


def measure(calls: int, seconds: float) -> Sample:
    """Look at this process, after everything that is free has been given back."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # glibc's: what is free stays resident otherwise, or not, as chance has it
        trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    descriptors = len(os.listdir("/proc/self/fd"))
    return Sample(calls, round(seconds, 1), pages * os.sysconf("SC_PAGE_SIZE"), descriptors, count_threads())


def count_threads() -> int:
    """Return the number of threads, those left out that are just ending: TVM's workers end after their caller."""
    fewest, unchanged = sys.maxsize, 0
    while unchanged < 5:
        found = len(os.listdir("/proc/self/task"))
        unchanged = unchanged + 1 if found >= fewest else 0
        fewest = min(fewest, found)
        time.sleep(0.01)
    return fewest


def build(spec: DeformConv2dSpec, cache_dir: Path) -> None:
    """Compile a kernel if it is not in the cache; the work of another process."""
    from tvmdcn.builder import build

    if find(CacheKey.of(spec, detect_target(), "tuned"), cache_dir) is None:
        build(spec, cache_dir=cache_dir)


@dataclass
class Soak:
    """A run.

    Parameters
    ----------
    layers : sequence of DeformConv2dSpec
        What is called; their kernels are in the cache.
    calls : int
    cache_dir : Path
        TVMDCN_CACHE_DIR.
    seed : int
    builders : Executor
        Processes that build an artifact again.
    """

    layers: Sequence[DeformConv2dSpec]
    calls: int
    cache_dir: Path
    seed: int
    builders: Executor
    samples: list[Sample] = field(default_factory=list)
    done: Counter[str] = field(default_factory=Counter)
    called: set[DeformConv2dSpec] = field(default_factory=set)

    def run(self, show: Callable[[Sample], None] = lambda sample: None) -> None:
        """Make the calls."""
        rng, started = random.Random(self.seed), time.perf_counter()
        names, weights = zip(*((name, weight) for name, (_, weight) in CALLERS.items()), strict=True)
        made = measured = 0
        every = max(1, min(250, self.calls // 16))
        while made < self.calls:
            # Every layer once before any is called again.
            layer = self.layers[made] if made < len(self.layers) else rng.choice(self.layers)
            if rng.random() < 0.03:
                made += self._call_from_threads(rng)
            else:
                self._call(layer, rng.choices(names, weights)[0], rng)
                made += 1
            if rng.random() < 0.004:
                self._forget()
            if rng.random() < 0.001:
                self._rebuild(rng)
            if made - measured >= every or made >= self.calls:
                measured = made
                self.samples.append(measure(made, time.perf_counter() - started))
                show(self.samples[-1])

    def _call(self, layer: DeformConv2dSpec, caller: str, rng: random.Random) -> None:
        if caller == "gradients" and not self._has_gradients(layer):
            caller = "torch"
        CALLERS[caller][0](Case.draw(layer, rng), rng)
        self.done[caller] += 1
        self.called.add(layer)

    def _has_gradients(self, layer: DeformConv2dSpec) -> bool:
        return layer in self.layers[::WITH_GRADIENTS]

    def _call_from_threads(self, rng: random.Random) -> int:
        """Call one layer from several threads at once."""
        layer, errors = rng.choice(self.layers), list[BaseException]()

        def work(seed: int) -> None:
            try:
                own = random.Random(seed)
                (call_numpy, call_torch, call_packed)[seed % 3](Case.draw(layer, own), own)
            except BaseException as error:  # told by the thread that waits
                errors.append(error)

        threads = [threading.Thread(target=work, args=(rng.randrange(1 << 30),)) for _ in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        self.done["threads"] += THREADS
        return THREADS

    def _forget(self) -> None:
        """Drop every kernel, so that the next calls load them from disk."""
        for memory in (runtime._loaded, api._kernels, gradient._kernels):
            memory.clear()
        self.done["forgotten"] += 1

    def _rebuild(self, rng: random.Random) -> None:
        """Throw an artifact away that may be in use, and build it again."""
        layer = rng.choice(self.layers)
        found = find(CacheKey.of(layer, detect_target(), "tuned"), self.cache_dir)
        if found is None:
            raise WrongResult(f"{layer.slug}: its artifact is gone.")
        found.discard()
        self.builders.submit(build, layer, self.cache_dir).result()
        self.done["rebuilt"] += 1

    def growth(self) -> dict[str, int]:
        """Return how much more the process held in the last quarter than in the second, in the median."""
        quarters: list[list[Sample]] = [[], [], [], []]
        for sample in self.samples:
            quarters[min(3, 4 * (sample.calls - 1) // self.calls)].append(sample)
        held = {
            name: [statistics.median_low(getattr(sample, name) for sample in quarter) for quarter in quarters]
            for name in BOUNDS
        }
        return {name: last - second for name, (_, second, _, last) in held.items()}

    def report(self) -> dict[str, Any]:
        """Return the result as a dict of JSON types."""
        growth = self.growth()
        return {
            "passed": all(growth[name] <= bound for name, bound in BOUNDS.items()),
            "calls": self.samples[-1].calls,
            "signatures": len(self.called),
            "signatures_with_gradients": len(self.called.intersection(self.layers[::WITH_GRADIENTS])),
            "seconds": self.samples[-1].seconds,
            "growth": growth,
            "bounds": BOUNDS,
            "done": dict(self.done),
            "seed": self.seed,
            "date": datetime.date.today().isoformat(),
            "machine": identify_machine(),
            "versions": identify_versions(),
            "samples": [asdict(sample) for sample in self.samples],
        }


def build_all(layers: Sequence[DeformConv2dSpec], cache_dir: Path, builders: Executor) -> None:
    """Compile every kernel that the run may call."""
    wanted = [*layers, *(gradient_of(layer) for layer in layers[::WITH_GRADIENTS])]
    for future in [builders.submit(build, spec, cache_dir) for spec in wanted]:
        future.result()


def show(sample: Sample) -> None:
    """Print a sample."""
    print(
        f"{sample.calls:7d} calls {sample.seconds:7.1f} s  {sample.memory / 2**20:7.1f} MiB  "
        f"{sample.descriptors} descriptors  {sample.threads} threads",
        flush=True,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--signatures", type=int, default=200, help="layers to draw (200)")
    parser.add_argument("--calls", type=int, default=20_000, help="calls to make (20000)")
    parser.add_argument("--seed", type=int, default=0, help="of layers and calls (0)")
    parser.add_argument("--jobs", type=int, default=2, help="processes that compile (2)")
    parser.add_argument("--cache-dir", type=Path, help="where kernels are kept for the next run; else thrown away")
    parser.add_argument("--output", type=Path, help="a JSON file for the result")
    options = parser.parse_args(arguments)
    if options.signatures < 1 or options.calls < max(40, 4 * options.signatures):
        parser.error("--calls must be at least 40 and four times --signatures, and that at least 1.")
    folder = options.cache_dir or Path(tempfile.mkdtemp(prefix="tvmdcn-soak-"))
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.environ |= {"TVMDCN_CACHE_DIR": str(folder), "TVMDCN_BUILD": "auto"}
    layers = draw_layers(options.signatures, options.seed)
    try:
        with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as builders:
            started = time.perf_counter()
            build_all(layers, folder, builders)
            print(f"{len(layers)} layers are compiled ({time.perf_counter() - started:.0f} s)", flush=True)
            os.environ["TVMDCN_BUILD"] = "never"  # here; the processes that build were made before
            soak = Soak(layers, options.calls, folder, options.seed, builders)
            soak.run(show)
    finally:
        if options.cache_dir is None:
            shutil.rmtree(folder)
    result = soak.report()
    if options.output is not None:
        options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for name, grown in result["growth"].items():
        print(f"{name}: {grown:+d} (bound {BOUNDS[name]})")
    print("passed" if result["passed"] else "something grew beyond its bound")
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
