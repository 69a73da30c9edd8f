# SPDX-License-Identifier: Apache-2.0
"""Candidates for a GPU without one: decisions, what the compiler says of them, and the search over decisions."""

from __future__ import annotations

import dataclasses
import io
import json
import math

import numpy as np
import pytest
from click.testing import CliRunner

pytest.importorskip("tvm")

from tvmdcn.cli import main
from tvmdcn.cuda_libraries import find_tool
from tvmdcn.errors import BuildError, SpecError
from tvmdcn.gpus import GPUS
from tvmdcn.problems import parse_problem
from tvmdcn.space import Decisions
from tvmdcn.spec import DeformConv2dSpec, Extents
from tvmdcn.target import resolve_target
from tvmdcn.tuning import dry_run, trial, workers
from tvmdcn.tuning.decision_search import DecisionNames, DecisionSearch

TARGET = resolve_target("cuda-sm_90")
SPEC = DeformConv2dSpec(64, 64, padding=1, dtype="float16", layout="NHWC")
needs_nvcc = pytest.mark.skipif(find_tool("nvcc") is None, reason="needs nvcc")


def row(number, reason=None, **changes):
    kernel = {"registers": 74, "spill_stores": 8, "spill_loads": 4, "stack_bytes": 16, "shared_bytes": 30720}
    kernel |= {"constant_bytes": 0, "threads": 128, "occupancy": 0.25, "limit": "shared memory"}
    kernel |= {"instructions": {"HMMA": 64, "LDL": 3}, **changes}
    found = {
        "problem": "layer",
        "target": "cuda-sm_90",
        "number": number,
        "decisions": {"variant": "mma", "values": {"a": 2}},
    }
    pack = {**kernel, "registers": 200, "shared_bytes": 0}
    return {
        **found,
        **({"reason": reason} if reason else {"kernels": {"deform_conv2d_kernel": kernel, "pack_weight_kernel": pack}}),
    }


def test_table_shows_what_candidates_take():
    from rich.console import Console

    text = io.StringIO()
    rows = [row(1), row(0, registers=255), row(2, "too much shared memory: x"), row(3, "too much shared memory: y")]
    dry_run.print_rows(rows, Console(file=text, width=140))
    lines = text.getvalue().splitlines()
    assert lines[0].strip() == "layer for cuda-sm_90: 2 of 4 compile"
    table = [line.split() for line in lines if line.split()[:1] in (["0"], ["1"])]
    assert table[0] == ["0", "255", "12", "16", "30720", "128", "25%", "shared", "memory", "64", "3"]
    assert table[1][1] == "74"
    assert "0: mma a=2" in lines
    assert "failed: 2 x too much shared memory, for example: too much shared memory: x" in lines


def test_table_shows_all_products_of_gradients():
    from rich.console import Console

    text = io.StringIO()
    found = row(0)
    kernel = found["kernels"].pop("deform_conv2d_kernel")
    product, copy = {**kernel, "registers": 91}, {**kernel, "registers": 5, "instructions": {"LDG": 1}}
    named = {"deform_conv2d_grad_kernel": copy, "deform_conv2d_grad_kernel_1": kernel}
    found["kernels"] |= {**named, "deform_conv2d_grad_kernel_3": product}
    dry_run.print_rows([found], Console(file=text, width=140))
    table = [line.split()[:3] for line in text.getvalue().splitlines() if line.split()[:1] == ["0"]]
    assert table == [["0", "1", "74"], ["0", "3", "91"]]


@needs_nvcc
def test_command_compiles_and_keeps_rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    words = ["tune", "--problem", "1,64,12,13,64,dtype=float16,layout=NHWC", "--dry-run", "--target", "cuda-sm_80"]
    result = CliRunner().invoke(main, [*words, "--trials", "2", "--rows", str(path)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "for cuda-sm_80: 2 of 2 compile" in result.output
    rows = sorted((json.loads(line) for line in path.read_text().splitlines()), key=lambda row: row["number"])
    assert [row["number"] for row in rows] == [0, 1]
    assert rows[0]["decisions"] != rows[1]["decisions"]
    for found in rows:
        kernel = found["kernels"]["deform_conv2d_kernel"]
        assert 16 <= kernel["registers"] <= 255
        assert 0 < kernel["shared_bytes"] <= GPUS["sm_80"].shared_block_bytes
        assert kernel["threads"] % 32 == 0
        if find_tool("nvdisasm") is not None:
            assert kernel["instructions"]["HMMA"] > 0


@needs_nvcc
def test_command_compiles_gradients():
    words = ["tune", "--problem", "1,64,12,13,64,dtype=float16,layout=NHWC", "--dry-run", "--target", "cuda-sm_90"]
    words += ["--operator", "deform_conv2d_grad", "--trials", "1"]
    result = CliRunner().invoke(main, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "backward for cuda-sm_90: 1 of 1 compile" in result.output


def test_processors_have_no_dry_run():
    with pytest.raises(SpecError, match=r"--dry-run tells what candidates take of a GPU, and the target is llvm-"):
        next(dry_run.dry_run([parse_problem("r50_c4")], "llvm", trials=1))
    result = CliRunner().invoke(main, ["tune", "--problem", "r50_c4", "--rows", "x"])
    assert result.exit_code == 2
    assert "--rows goes with --dry-run" in result.output


def test_failures_are_told_by_reason(monkeypatch):
    for text in ("too much shared memory: a block takes", "too many registers: 255", "TVM could not"):

        def fail(*_, text=text):
            raise BuildError(text)

        monkeypatch.setattr("tvmdcn.builder.compile_kernels", fail)
        found = dry_run.compile_candidate(SPEC.to_json(), TARGET.to_json(), Decisions("", {}).to_json())
        assert found["reason"] == (text if text.startswith("too") else f"build: {text}")
        assert found["decisions"]["variant"] in DecisionNames(SPEC, TARGET).variants


@needs_nvcc
def test_schedules_beyond_a_gpus_memory_are_refused():
    """Compiled for a GPU with little shared memory, a schedule for one with much is told apart from a broken one."""
    names = DecisionNames(SPEC, TARGET)
    most = {name: max(values) for name, values in names.options[names.variants[0]].items()}
    small = resolve_target("cuda-sm_86")
    wish = Decisions(names.variants[0], most)
    found = dry_run.compile_candidate(
        dataclasses.replace(SPEC, in_channels=512, out_channels=512).to_json(), small.to_json(), wish.to_json()
    )
    if "kernels" in found:
        kernel = found["kernels"]["deform_conv2d_kernel"]
        assert kernel["shared_bytes"] <= small.shared_block_bytes
        assert kernel["occupancy"] > 0
    else:
        assert found["reason"].startswith(workers.OVER_LIMITS)


# ---- the search over decisions ------------------------------------------------------------------------------


def test_wishes_are_rounded_to_what_is_possible():
    names = DecisionNames(SPEC, TARGET)
    assert set(names.defaults) == set(names.variants)
    random = np.random.default_rng(0)
    made = set()
    for _ in range(6):
        wish = names.drawn(random)
        _, decisions = names.scheduled(wish)
        assert decisions.variant in names.variants
        # What was decided is decided again.
        assert names.scheduled(decisions)[1] == decisions
        for name, value in decisions.values.items():
            assert value in names.options[decisions.variant][name]
        made.add(json.dumps(decisions.to_json()))
        assert len(names.row(decisions)) == len(names.variants) + len(names.columns)
    assert len(made) > 2
    default = names.defaults[names.variants[0]]
    moves = [names.moved(default, random) for _ in range(30)]
    changed = [sum(a != b for a, b in zip(default.values.values(), m.values.values(), strict=False)) for m in moves]
    assert max(changed) <= 2
    assert any(move != default for move in moves)


def test_search_finds_better_decisions():
    """On a made-up cost: the further from a secret choice, the slower; one choice fails."""
    pytest.importorskip("xgboost")
    search = DecisionSearch(SPEC, Extents(1, 20, 20), TARGET, seed=3)
    first = search.names.variants[0]
    secret = {name: max(values) for name, values in search.names.options[first].items()}

    def cost(decisions):
        if decisions.variant != first:
            return 3e-3
        if min(decisions.values.values()) < 0:
            return None
        away = sum(abs(math.log2(1 + decisions.values[n]) - math.log2(1 + v)) for n, v in secret.items())
        return 1e-4 * (1 + away)

    candidates = [search.candidate(decisions) for decisions in search.names.defaults.values()]
    assert search.predict(candidates) == [None] * len(candidates)
    known = {}
    for _ in range(4):
        for candidate in candidates:
            known[candidate.identity] = cost(candidate.decisions)
        outcomes = {identity: None if seconds is None else [seconds] for identity, seconds in known.items()}
        search.learn(outcomes, candidates)
        search.end_round(outcomes)
        candidates = search.propose(4, 100)
        assert candidates
        assert len({c.identity for c in candidates}) == len(candidates) <= 4
        assert not known.keys() & {c.identity for c in candidates}
    best = min(seconds for seconds in known.values() if seconds is not None)
    assert best < cost(search.names.defaults[first])
    scores = search.predict([search.candidate(d) for d in (Decisions(first, secret), search.names.defaults[first])])
    assert scores[0] > scores[1]
    again = DecisionSearch(SPEC, Extents(1, 20, 20), TARGET, seed=3)
    again.recall((Decisions(i[0], dict(i[1])), seconds) for i, seconds in known.items())
    assert again.predict(candidates) == pytest.approx(search.predict(candidates), rel=1e-6)
    assert len(search.propose(4, 2)) <= 2


def test_outcomes_of_a_tuning_for_a_gpu(monkeypatch, tmp_path):
    assert trial.tolerance_of(SPEC) == trial.TOLERANCE["float16"]
    tf32 = DeformConv2dSpec(4, 4, tf32=True)
    assert trial.tolerance_of(tf32) == trial.TOLERANCE["tf32"] > trial.TOLERANCE["float32"]
    job = trial.Job(SPEC, Extents(1, 5, 5), TARGET, 1, tmp_path)
    assert trial.Job.from_json(json.loads(json.dumps(job.to_json()))) == job

    class Pool:
        made = 0

        def __init__(self, **_):
            Pool.made += 1

        def submit(self, *_):
            raise RuntimeError("deform_conv2d failed: CUDA_ERROR_ILLEGAL_ADDRESS")

        def shutdown(self):
            pass

    monkeypatch.setattr(workers, "PopenPoolExecutor", Pool)
    measuring = workers.LocalMeasuring()
    (outcome,) = measuring.submit(job, ["trial1"], 1).result()
    assert outcome.reason == "launch failure: deform_conv2d failed: CUDA_ERROR_ILLEGAL_ADDRESS"
    assert Pool.made == 2  # the process's GPU is of no use any more
    measuring.close()
