# SPDX-License-Identifier: Apache-2.0
"""The search for a schedule: MetaSchedule's evolution and cost model over our design spaces.

Kernels are free in N, H and W. MetaSchedule wants functions of fixed shapes, but looks only at the signature
of the entry function: so its module holds the kernel as it ships, and beside it an empty ``main`` with the
representative sizes. What is tuned is what is built.

MetaSchedule's database is kept in memory and filled from the log of trials (:mod:`tvmdcn.tuning.history`). On disk
it would be a second truth, and reading a damaged one ends the process with a segmentation fault.
"""

from __future__ import annotations

import contextlib
import math
import random
import signal
import sys
import threading
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
from tvm import tirx
from tvm.ir.utils import derived_object
from tvm.s_tir import meta_schedule as ms

from tvmdcn.builder import new_schedule
from tvmdcn.space import VARIANT, Decisions, DesignSpace, space_of
from tvmdcn.spec import DeformConv2dSpec, Extents
from tvmdcn.target import TargetInfo

__all__ = ["Candidate", "Search", "uninterrupted"]

_FAILED = [1e10]  # seconds; MetaSchedule's own mark of a failed measurement
_WARM_UP = 12  # measurements before the cost model is trusted


@dataclass(frozen=True)
class Candidate:
    """A schedule to try: its decisions, and MetaSchedule's form of it."""

    decisions: Decisions
    measurable: Any

    @property
    def identity(self) -> tuple[Any, ...]:
        """What makes two candidates the same."""
        return self.decisions.variant, tuple(sorted(self.decisions.values.items()))


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold Ctrl-C back until the block ends.

    MetaSchedule calls Python back from C++. An exception there, and KeyboardInterrupt is one, becomes an
    unrelated RuntimeError, or ends the process with a segmentation fault (seen with TVM 0.27).
    """
    previous = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(previous):
        yield  # signals go to the main thread; and where they are ignored nothing is to be held back
        return
    held: list[Any] = []
    signal.signal(signal.SIGINT, lambda number, frame: held.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
        if held:
            previous(*held[0])


def _without_intrinsics() -> None:
    """Keep ``TuneContext`` from importing every tensor intrinsic: half a minute, and none is used here."""
    name = "tvm.s_tir.tensor_intrin"
    if name not in sys.modules:
        sys.modules[name] = types.ModuleType(name)


def _decided(trace: Any) -> tuple[str, list[int]]:
    """Return the variant that a trace belongs to, and its decisions in order."""
    variant, values = "", []
    for inst in trace.insts:
        if inst.kind.name == "Annotate" and str(inst.attrs[0]) == VARIANT:
            variant = str(inst.inputs[1])
        elif inst.kind.name == "SamplePerfectTile":
            values.append(int(trace.decisions[inst][-1]))
        elif inst.kind.name == "SampleCategorical":
            values.append(int(inst.attrs[0][int(trace.decisions[inst])]))
    return variant, values


@derived_object
class _Features(ms.feature_extractor.PyFeatureExtractor):
    """Describes a candidate to the cost model by its decisions.

    MetaSchedule's own features are counts of loop iterations, which a kernel of free extents does not have.
    """

    def __init__(self, space: _Names) -> None:
        super().__init__()
        self._space = space

    def extract_from(self, context: Any, candidates: Any) -> Any:
        """Return one row per candidate: which variant, and the logarithm of each decision."""
        return [tvm.runtime.tensor(self._space.row(candidate.sch.trace)[None, :]) for candidate in candidates]


@derived_object
class _MutateCategorical(ms.mutator.PyMutator):
    """Moves one categorical decision to a neighbour; MetaSchedule's own mutators leave them alone."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._seed = seed
        self._random = random.Random(seed)

    def _initialize_with_tune_context(self, context: Any) -> None:
        del context

    def apply(self, trace: Any, *_: Any) -> Any:
        """Return the changed trace, or None if it has no such decision."""
        found = [inst for inst in trace.insts if inst.kind.name == "SampleCategorical"]
        if not found:
            return None
        inst = self._random.choice(found)
        count, now = len(inst.attrs[0]), int(trace.decisions[inst])
        near = [i for i in (now - 2, now - 1, now + 1, now + 2) if 0 <= i < count]
        if not near:
            return None
        return trace.with_decision(inst, self._random.choice(near), True)

    def clone(self) -> Any:
        """Return a copy."""
        return _MutateCategorical(self._seed)


class _Names:
    """The design space of one layer: its variants and the names of their choices."""

    def __init__(self, space: DesignSpace, spec: DeformConv2dSpec, target: TargetInfo) -> None:
        self.variants = space.variants(spec, target)
        self.defaults: dict[str, Decisions] = {}
        for variant in self.variants:
            sch = new_schedule(spec, target)
            self.defaults[variant] = space.schedule(sch, spec, target, Decisions(variant, {}))
        self.columns = sorted({name for made in self.defaults.values() for name in made.values})

    def decisions(self, trace: Any) -> Decisions:
        variant, values = _decided(trace)
        return Decisions(variant, dict(zip(self.defaults[variant].values, values, strict=True)))

    def row(self, trace: Any) -> np.ndarray:
        made = self.decisions(trace)
        one_hot = [float(made.variant == variant) for variant in self.variants]
        parts = [float(made.variant.split("-")[0] == v.split("-")[0]) for v in self.variants[:1]]
        return np.array([*one_hot, *parts, *(math.log2(made.values.get(name, 1)) for name in self.columns)], "float64")


class Search:
    """Proposes candidates, and learns from how they did.

    Parameters
    ----------
    spec, extents, target
        The layer, its representative sizes, and the target.
    seed : int
    """

    def __init__(self, spec: DeformConv2dSpec, extents: Extents, target: TargetInfo, seed: int) -> None:
        _without_intrinsics()
        self._spec, self._target = spec, target
        self._space = space_of(spec.operator, target.kind)
        self.names = _Names(self._space, spec, target)
        self._tvm_target = target.to_tvm()
        module = new_schedule(spec, target).mod
        module.update(tvm.IRModule({"main": _entry(spec, extents)}))
        self._module = module
        self._args_info = ms.arg_info.ArgInfo.from_entry_func(module)
        self._database = ms.database.MemoryDatabase()
        self._workload = self._database.commit_workload(module)
        self._model = ms.cost_model.XGBModel(
            extractor=_Features(self.names),
            num_warmup_samples=_WARM_UP,
            adaptive_training=False,
            num_tuning_cores=1,
        )
        self._context = ms.TuneContext(
            mod=module,
            target=self._tvm_target,
            space_generator=ms.space_generator.ScheduleFn(
                self._variants,
                sch_rules=[],
                postprocs=[],
                mutator_probs={ms.mutator.MutateTileSize(): 0.6, _MutateCategorical(seed): 0.4},
            ),
            search_strategy=ms.search_strategy.EvolutionarySearch(
                population_size=48,
                init_measured_ratio=0.4,
                init_min_unmeasured=16,
                genetic_num_iters=2,
                genetic_mutate_prob=0.85,
                eps_greedy=0.15,
            ),
            num_threads=1,
            rand_state=seed,
            task_name=spec.slug,
        )
        self._started = False
        self._pending: list[Any] = []

    def _variants(self, sch: Any) -> list[Any]:
        schedules = []
        for variant in self.names.variants:
            copy = sch.copy()
            self._space.schedule(copy, self._spec, self._target, Decisions(variant, {}))
            schedules.append(copy)
        return schedules

    def candidate(self, decisions: Decisions) -> Candidate:
        """Return the candidate of given decisions."""
        sch = tvm.s_tir.Schedule(self._module, debug_mask="none")
        made = self._space.schedule(sch, self._spec, self._target, decisions)
        return Candidate(made, ms.MeasureCandidate(sch, self._args_info))

    def propose(self, count: int, trials_left: int) -> list[Candidate]:
        """Return up to `count` candidates that the cost model thinks well of; none if there are no more."""
        if not self._started:
            self._context.pre_tuning(
                max_trials=1 << 20,
                num_trials_per_iter=count,
                design_spaces=None,
                database=self._database,
                cost_model=self._model,
            )
            self._started = True
        proposed = self._context.generate_measure_candidates()
        self._pending = list(proposed or [])
        return [Candidate(self.names.decisions(c.sch.trace), c) for c in self._pending][:trials_left]

    def predict(self, candidates: Sequence[Candidate]) -> list[float | None]:
        """Return the cost model's scores: about the best time so far over the candidate's, so higher is better.

        None while the model has not seen enough; it would give random numbers.
        """
        if not candidates or self._model.booster is None or self._model.data_size < _WARM_UP:
            return [None] * len(candidates)
        return [float(s) for s in self._model.predict(self._context, [c.measurable for c in candidates])]

    def learn(self, outcomes: Mapping[Any, Sequence[float] | None], candidates: Sequence[Candidate]) -> None:
        """Take in measurements.

        Parameters
        ----------
        outcomes : mapping
            From a candidate's identity to its times in seconds, None if it failed.
        candidates : sequence of Candidate
            Those that were measured; `outcomes` may hold more.
        """
        results = []
        for candidate in candidates:
            seconds = outcomes[candidate.identity]
            times = [float(s) for s in seconds] if seconds else _FAILED
            results.append(ms.runner.RunnerResult(times, None))
            self._database.commit_tuning_record(
                ms.database.TuningRecord(
                    candidate.measurable.sch.trace, self._workload, times, self._tvm_target, self._args_info
                )
            )
        if candidates:
            self._model.update(self._context, [c.measurable for c in candidates], results)

    def recall(self, trials: Iterable[tuple[Decisions, float | None]]) -> None:
        """Take in the trials of earlier runs: decisions, and seconds or None for a failure."""
        outcomes: dict[Any, list[float] | None] = {}
        candidates = []
        for decisions, seconds in trials:
            candidate = self.candidate(decisions)
            outcomes[candidate.identity] = None if seconds is None else [seconds]
            candidates.append(candidate)
        self.learn(outcomes, candidates)

    def end_round(self, outcomes: Mapping[Any, Sequence[float] | None]) -> None:
        """Tell the evolution how the candidates of the last `propose` did, the skipped ones included."""
        if not self._pending:
            return
        results = []
        for measurable in self._pending:
            seconds = outcomes.get(Candidate(self.names.decisions(measurable.sch.trace), measurable).identity)
            results.append(ms.runner.RunnerResult([float(s) for s in seconds] if seconds else _FAILED, None))
        self._context.notify_runner_results(self._pending, results)
        self._pending = []


def _entry(spec: DeformConv2dSpec, extents: Extents) -> tirx.PrimFunc:
    """Return an empty function with the signature of the layer at its representative sizes."""
    names = (*spec.inputs, *spec.outputs)
    buffers = [tirx.decl_buffer(spec.shape_of(name, extents), spec.dtype, name=name) for name in names]
    return tirx.PrimFunc(buffers, tirx.Evaluate(0)).with_attr("global_symbol", "main")
