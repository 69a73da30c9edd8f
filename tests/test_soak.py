# SPDX-License-Identifier: Apache-2.0
"""scripts/soak.py: a short run of it, and that it finds what it is there to find."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

from tvmdcn.spec import BORDERS

ROOT = Path(__file__).resolve().parents[1]
# As many as a CI run has time for: the script's default is the real one.
LAYERS, CALLS = 4, 800


@pytest.fixture(scope="module", autouse=True)
def scripts() -> Iterator[None]:
    """Let the scripts be imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "scripts"))
        yield


@pytest.fixture(scope="module")
def builders(scripts: None) -> Iterator[ProcessPoolExecutor]:
    """Processes that can import the script: those that all tests share may have begun before its folder was known."""
    pool = ProcessPoolExecutor(2, multiprocessing.get_context("spawn"))
    yield pool
    pool.shutdown(cancel_futures=True)


@pytest.fixture
def soak() -> Any:
    import soak

    return soak


@pytest.fixture
def calls() -> Any:
    import soak_calls

    return soak_calls


def test_short_run(soak: Any, builders: ProcessPoolExecutor, session_cache_dir: Path, monkeypatch) -> None:
    layers = soak.draw_layers(LAYERS, 1)
    soak.build_all(layers, session_cache_dir, builders)
    monkeypatch.setenv("TVMDCN_BUILD", "never")
    run = soak.Soak(layers, CALLS, session_cache_dir, 0, builders)
    run.run()
    result = run.report()
    assert result["passed"], result["growth"]
    assert result["calls"] >= CALLS
    assert result["signatures"] == LAYERS
    done = result["done"]
    assert sum(done[name] for name in (*soak.CALLERS, "threads")) == result["calls"]
    assert all(done[name] > 0 for name in (*soak.CALLERS, "threads", "forgotten"))
    json.dumps(result)


def test_artifact_in_use_is_built_again(soak: Any, builders: ProcessPoolExecutor, session_cache_dir: Path) -> None:
    layers = soak.draw_layers(LAYERS, 1)[:1]
    soak.build_all(layers, session_cache_dir, builders)
    run = soak.Soak(layers, 4, session_cache_dir, 0, builders)
    run.run()
    run._rebuild(random.Random(0))
    run._forget()
    run.run()
    assert run.done["rebuilt"] == 1


class Leak:
    """A caller that keeps something at every call."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.kept: list[Any] = []
        self.end = threading.Event()

    def __call__(self, case: Any, rng: random.Random) -> None:
        if self.kind == "memory":
            self.kept.append(np.ones(1 << 16))
        elif self.kind == "descriptors" and rng.random() < 0.2:
            self.kept.append(os.open(os.devnull, os.O_RDONLY))
        elif self.kind == "threads" and rng.random() < 0.2:
            self.kept.append(threading.Thread(target=self.end.wait))
            self.kept[-1].start()

    def stop(self) -> None:
        self.end.set()
        for thing in self.kept:
            if isinstance(thing, int):
                os.close(thing)
            elif isinstance(thing, threading.Thread):
                thing.join()


@pytest.mark.parametrize("kind", ["memory", "descriptors", "threads", "nothing"])
def test_growth_is_found(soak: Any, kind: str, session_cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leak = Leak(kind)
    monkeypatch.setitem(soak.CALLERS, "numpy", (leak, 1))
    for name in soak.CALLERS.keys() - {"numpy"}:
        monkeypatch.setitem(soak.CALLERS, name, (leak, 0))
    monkeypatch.setattr(soak.Soak, "_call_from_threads", lambda self, rng: 1)
    monkeypatch.setattr(soak.Soak, "_rebuild", lambda self, rng: None)
    run = soak.Soak(soak.draw_layers(2, 0), 200, session_cache_dir, 0, None)
    try:
        run.run()
        result = run.report()
    finally:
        leak.stop()
    assert result["passed"] == (kind == "nothing"), result["growth"]
    if kind != "nothing":
        assert result["growth"][kind] > soak.BOUNDS[kind]


@pytest.mark.parametrize("change", ["value", "nan", "shape"])
def test_wrong_number_is_found(calls: Any, change: str) -> None:
    rng = random.Random(0)
    layer = next(layer for layer in calls.draw_layers(50, 0) if layer.dtype == "float32")
    case = calls.Case.draw(layer, rng)
    right = calls.reference(layer, case.tensors)
    case.check(right)
    grad_output = np.ones(right.shape, np.float32)
    gradients = calls.reference_grad(calls.gradient_of(layer), case.tensors, grad_output)
    case.check_gradients(grad_output, {"weight": gradients.weight, "bias": gradients.bias})
    for array, check in (
        (right, case.check),
        (gradients.weight, lambda found: case.check_gradients(grad_output, {"weight": found})),
    ):
        wrong = np.array(array)
        if change == "shape":
            wrong = wrong[..., None]
        else:
            wrong.flat[wrong.size // 2] += 1e-2 if change == "value" else np.nan
        with pytest.raises(calls.WrongResult, match=r"wrong by|is of the shape"):
            check(wrong)


def test_error_of_a_thread_ends_the_run(soak: Any, session_cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(case: Any, rng: random.Random) -> None:
        raise soak.WrongResult("in a thread")

    for name in ("call_numpy", "call_torch", "call_packed"):
        monkeypatch.setattr(soak, name, fail)
    run = soak.Soak(soak.draw_layers(2, 0), 400, session_cache_dir, 0, None)
    with pytest.raises(soak.WrongResult, match="in a thread"):
        run._call_from_threads(random.Random(0))


def test_layers_are_of_all_kinds(calls: Any) -> None:
    layers = calls.draw_layers(200, 0)
    assert len(set(layers)) == 200
    assert {layer.dtype for layer in layers} == set(calls.TOLERANCES)
    assert {layer.layout for layer in layers} == {"NCHW", "NHWC"}
    assert {layer.mask for layer in layers} == {True, False}
    assert any(layer.groups > 1 and layer.offset_groups > 1 for layer in layers)
    assert any(layer.in_channels == 1 for layer in layers)
    assert {calls.gradient_of(layer).border for layer in layers} == {BORDERS[0]}
    assert layers[:50] == calls.draw_layers(50, 0)


def test_memory_is_measured(soak: Any) -> None:
    before = soak.measure(1, 0.0)
    ballast = np.ones(1 << 22)
    file = os.open(os.devnull, os.O_RDONLY)
    after = soak.measure(2, 0.0)
    os.close(file)
    assert after.memory - before.memory > 0.9 * ballast.nbytes
    assert after.descriptors == before.descriptors + 1
    assert after.threads >= threading.active_count() >= 1


@pytest.mark.parametrize("arguments", [["--calls", "10", "--signatures", "5"], ["--signatures", "0"], ["--calls", "x"]])
def test_bad_arguments_are_refused(soak: Any, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        soak.main(arguments)
    assert error.value.code == 2
    assert "--calls" in capsys.readouterr().err


def test_script(
    soak: Any,
    session_cache_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("TVMDCN_CACHE_DIR", "elsewhere")  # so that both are as before after the test
    monkeypatch.setenv("TVMDCN_BUILD", "auto")
    output = tmp_path / "soak.json"
    options = ["--signatures", "1", "--seed", "1", "--calls", "40", "--jobs", "1"]
    assert soak.main([*options, "--cache-dir", str(session_cache_dir), "--output", str(output)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "passed"
    assert json.loads(output.read_text())["calls"] >= 40
