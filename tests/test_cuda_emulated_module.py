# SPDX-License-Identifier: Apache-2.0
"""A scheduled module on the emulated device: extents of the launch, arrays in between, kernels in order."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

pytest.importorskip("tvm")
if shutil.which("g++") is None:
    pytest.skip("the emulator needs g++", allow_module_level=True)

import tvm
from cuda_emulator import EmulationError, run_emulated
from cuda_emulator.host import compile_for_emulation
from tvm import s_tir, te, tirx

TARGET = tvm.target.Target({"kind": "cuda", "arch": "sm_90"})


def two_kernels(dtype="float32", columns=64):
    """Return the schedule of ``result = reverse(2 x) + 1`` over rows of a free number, with an array in between."""
    rows = tirx.Var("rows", "int32")
    x = te.placeholder((rows, columns), dtype, name="x")
    two = te.compute((rows, columns), lambda i, j: x[i, j] * tirx.const(2, dtype), name="two")
    result = te.compute((rows, columns), lambda i, j: two[i, columns - 1 - j] + tirx.const(1, dtype), name="result")
    schedule = s_tir.Schedule(te.create_prim_func([x, result, rows]))
    for name in ("two", "result"):
        row, column = schedule.get_loops(schedule.get_sblock(name))
        block, thread = schedule.split(row, [None, 4])
        schedule.bind(block, "blockIdx.x")
        schedule.bind(thread, "threadIdx.y")
        schedule.bind(column, "threadIdx.x")
    return schedule


def test_two_kernels_with_free_extents():
    program = compile_for_emulation(two_kernels().mod, TARGET)
    assert len(program.emulated.kernels) == 2
    for rows in (1, 4, 10):
        x = np.random.default_rng(rows).standard_normal((rows, 64)).astype(np.float32)
        x.flags.writeable = False
        result = np.full_like(x, np.nan)
        assert run_emulated(program, None, [x, result, rows]) is program
        assert np.array_equal(result, (2 * x)[:, ::-1] + 1)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sixteen_bits(dtype):
    x = np.arange(128).reshape(2, 64).astype(np.float32)
    result = np.zeros((2, 64), np.float16)
    if dtype == "float16":
        run_emulated(two_kernels(dtype).mod, TARGET, [x.astype(np.float16), result, 2])
        assert np.array_equal(result, (2 * x)[:, ::-1] + 1)
    else:
        result = result.view(np.uint16)
        run_emulated(two_kernels(dtype).mod, TARGET, [(x.view(np.uint32) >> 16).astype(np.uint16), result, 2])
        values = (result.astype(np.uint32) << 16).view(np.float32)
        np.testing.assert_allclose(values, (2 * x)[:, ::-1] + 1, rtol=2**-8)


def test_compiler_callback_is_put_back():
    before = tvm.get_global_func("tvm_callback_cuda_compile")
    compile_for_emulation(two_kernels(columns=32).mod, TARGET)
    assert tvm.get_global_func("tvm_callback_cuda_compile").same_as(before)


def test_array_in_between_that_is_not_written_first():
    """Swap the order of the two launches: the first then reads what nothing has written."""
    program = compile_for_emulation(two_kernels().mod, TARGET)
    statements = list(program.host.body.seq)
    launches = [s for s in statements if type(s).__name__ == "Evaluate"]
    others = [s for s in statements if type(s).__name__ != "Evaluate"]
    swapped = program.host.with_body(tirx.SeqStmt([*others, *reversed(launches)]))
    wrong = type(program)({"main": swapped}, program.source, program.emulated)
    x = np.zeros((4, 64), np.float32)
    with pytest.raises(EmulationError, match=r"main_kernel_1: read of two_ptr\[\d+\].*which nothing has written"):
        run_emulated(wrong, None, [x, np.zeros_like(x), 4])


def test_arguments_are_checked():
    program = compile_for_emulation(two_kernels().mod, TARGET)
    x, result = np.zeros((4, 64), np.float32), np.zeros((4, 64), np.float32)
    with pytest.raises(ValueError, match="takes 3 arguments, got 2"):
        run_emulated(program, None, [x, result])
    with pytest.raises(ValueError, match="argument x has dtype float64, not float32"):
        run_emulated(program, None, [x.astype(np.float64), result, 4])
    with pytest.raises(ValueError, match="argument x has 1 dimensions, not 2"):
        run_emulated(program, None, [x.ravel(), result, 4])
    with pytest.raises(ValueError, match=r"argument result has shape \(4, 32\)"):
        run_emulated(program, None, [x, result[:, :32].copy(), 4])
    with pytest.raises(ValueError, match="not contiguous"):
        run_emulated(program, None, [x[:, ::2], result, 4])
    result.flags.writeable = False
    with pytest.raises(EmulationError, match=r"write of result_ptr\[\d+\].*which is an input"):
        run_emulated(program, None, [x, result, 4])
