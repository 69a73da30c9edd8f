# SPDX-License-Identifier: Apache-2.0
"""Roofs: what is copied and multiplied is what the rows say, and what fails has a reason. No rate is asserted."""

from __future__ import annotations

import json

import numpy as np
import pytest
from bench_fakes import QUICK

from tvmdcn.bench import roofs as bench_roofs
from tvmdcn.bench.roof import Roof
from tvmdcn.bench.roofs import measure_roofs
from tvmdcn.bench.rows import parse_row

MIB = 1 << 20


@pytest.fixture
def small(monkeypatch):
    """Matrices and caches that are small: what is computed matters here."""
    monkeypatch.setattr(bench_roofs, "_SIZE", 48)
    monkeypatch.setattr(bench_roofs, "_PRODUCTS_PER_CALL", 3)
    monkeypatch.setattr(bench_roofs, "_REPEATED", 3 * MIB)
    monkeypatch.setattr(bench_roofs, "last_level_bytes", lambda: 2 * MIB)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("level", "total", "repeats"), [("memory", 8, 1), ("cache", 1, 3)])
def test_copy_moves_what_it_says(small, threads, level, total, repeats):
    ready = getattr(bench_roofs, f"prepare_{level}_copy")(None, threads)
    pairs = ready.call()
    assert len(pairs) == threads
    moved = 2 * sum(source.nbytes for source, _ in pairs)
    assert moved == pytest.approx(total * MIB, rel=0.01 * threads)
    assert ready.work == pytest.approx(moved * repeats, abs=moved)
    assert ready.work % moved == 0
    for source, target in pairs:
        assert target.base is None  # memory of its own
        assert not np.shares_memory(source, target)
        np.testing.assert_array_equal(target, source)
        assert source.all()


@pytest.mark.parametrize("dtype", bench_roofs.DTYPES)
@pytest.mark.parametrize("library", ["numpy", "torch", "onnxruntime"])
def test_product_is_one(small, monkeypatch, library, dtype):
    if dtype not in bench_roofs._PRODUCTS[library]:
        return
    pytest.importorskip(library)
    torch = pytest.importorskip("torch") if library == "torch" else None
    count = torch.get_num_threads() if torch else None
    ready = getattr(bench_roofs, f"prepare_{library}_matmul")(dtype, 1)
    assert (ready.work, ready.size) == (2 * 48**3, "48 x 48 x 48")
    found = ready.call()
    if torch:
        torch.set_num_threads(count)
        found = found.double().numpy()
    np.testing.assert_array_equal(np.asarray(found).squeeze(), np.full((48, 48), 48.0))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_compiled_product_is_one(small, dtype, threads):
    ready = bench_roofs.prepare_compiled_matmul(dtype, threads)
    found = ready.call().numpy()
    tasks, products, rows, columns = found.shape
    assert (tasks, products, found.dtype) == (threads, 3, dtype)
    assert ready.work == 2 * threads * 3 * rows * 128 * columns
    np.testing.assert_array_equal(found, 128.0)


@pytest.fixture
def asked(monkeypatch):
    """Two roofs that are soon measured, and one that cannot be."""
    roofs = bench_roofs._asked(["float64"], "cpu")
    numpy = next(roof for roof in roofs if roof.roof == "matmul")
    missing = numpy._replace(provider=bench_roofs.Provider("nobody", "peer", None, "no_such_package"))
    lost = numpy._replace(provider=bench_roofs.Provider("lost", "peer", "tvmdcn.bench.roofs:nothing"))
    chosen = [numpy, missing, lost]
    monkeypatch.setattr(bench_roofs, "_asked", lambda dtypes, device: chosen)
    return chosen


def test_roofs_become_rows_and_failures_too(asked):
    seen = []
    rows = measure_roofs([1], ["float64"], protocol=QUICK, run="a run", command="a command", on_row=seen.append)
    assert seen == rows
    assert [parse_row(json.loads(json.dumps(found.to_json()))) for found in rows] == rows
    product, missing, lost = rows
    assert (product.title, product.provider, product.dtype, product.unit) == (
        "matmul float64",
        "numpy",
        "float64",
        "GFLOP/s",
    )
    assert (product.run, product.command, product.threads, product.status) == ("a run", "a command", 1, "ok")
    assert product.work == 2 * 1536**3
    assert product.runs == QUICK.rounds * QUICK.min_calls
    assert product.rate == pytest.approx(product.work / product.median_ms / 1e6)
    assert product.best_rate == pytest.approx(product.work / product.min_ms / 1e6)
    assert len(product.affinity) == 1
    assert f"numpy {np.__version__}" in product.method
    assert missing.reason == "no_such_package is not installed: pip install no_such_package"
    assert "has no attribute 'nothing'" in lost.reason
    assert (lost.work, lost.rate, lost.best_rate) == (None, None, None)


def test_roofs_measured_before_are_taken_over(asked):
    rows = measure_roofs([1], ["float64"], protocol=QUICK)
    taken = []
    assert measure_roofs([1], ["float64"], protocol=QUICK, known=rows, on_known=taken.append) == []
    assert taken == rows
    other = [Roof(**{**vars(found), "versions": {"numpy": "0"}}) for found in rows]
    assert len(measure_roofs([1], ["float64"], protocol=QUICK, known=other)) == len(asked)


def test_every_dtype_has_a_roof_and_two_copies_come_with_it():
    asked = bench_roofs._asked(bench_roofs.DTYPES, "cpu")
    assert {roof.dtype for roof in asked} == {None, *bench_roofs.DTYPES}
    assert [(roof.roof, roof.level) for roof in asked[:2]] == [("copy", "memory"), ("copy", "cache")]
    for roof in asked:
        module, _, name = roof.provider.source.partition(":")
        assert module == bench_roofs.__name__
        assert name in bench_roofs.__all__
