# SPDX-License-Identifier: Apache-2.0
"""Compiling for GPUs on a machine without one: machine code, what it takes, and refusals in words."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tvmdcn import cuda_compiler, cuda_libraries, nvrtc
from tvmdcn.cuda_compiler import CompiledSource, KernelResources, compile_source
from tvmdcn.cuda_libraries import find_library, find_tool
from tvmdcn.errors import ArtifactError, BuildError
from tvmdcn.gpus import occupancy

needs_nvcc = pytest.mark.skipif(find_tool("nvcc") is None, reason="needs nvcc")
needs_nvdisasm = pytest.mark.skipif(find_tool("nvdisasm") is None, reason="needs nvdisasm")

SOURCE = """
#include <cuda_fp16.h>
extern "C" __global__ void __launch_bounds__(128) second(const float4* __restrict__ x, float4* y) {
  __shared__ float4 tile[128];
  tile[127 - threadIdx.x] = x[blockIdx.x * 128 + threadIdx.x];
  __syncthreads();
  y[blockIdx.x * 128 + threadIdx.x] = tile[threadIdx.x];
}
extern "C" __global__ void __launch_bounds__(64) first(float* x, int n) {
  float local[64];
  for (int i = 0; i < 64; ++i) local[i * n & 63] = x[i];
  atomicAdd(x, local[n]);
}
"""
# What ptxas of CUDA 12 said of two kernels: it also told of constant memory.
LOG = """ptxas info    : 0 bytes gmem, 24 bytes cmem[3]
ptxas info    : Compiling entry function 'one' for 'sm_80'
ptxas info    : Function properties for one
    40 bytes stack frame, 36 bytes spill stores, 44 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 40 bytes cumulative stack size, 17408 bytes smem, 400 bytes cmem[0], 8 bytes cmem[2]
ptxas info    : Compile time = 12.345 ms
ptxas info    : Compiling entry function 'other' for 'sm_80'
ptxas info    : Function properties for other
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 12 registers, 372 bytes cmem[0]
"""  # noqa: E501 - as the compiler writes it


def test_what_the_compiler_says_is_read():
    one, other = cuda_compiler._read_log(LOG)
    assert one == KernelResources("one", 255, 36, 44, 40, 17408, 408)
    assert other == KernelResources("other", 12, 0, 0, 0, 0, 372)
    assert json.loads(json.dumps(one.to_json()))["spill_loads"] == 44
    with pytest.raises(BuildError, match="does not tell what other takes"):
        cuda_compiler._read_log(LOG.replace("Used 12", "Takes 12"))


def test_instructions_are_counted_in_groups():
    listing = """MOV R1, c[0x0][0x28] ;
@!P0 LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;
@P1 LDG.E R4, desc[UR4][R2.64] ;
LDGSTS.E.BYPASS.128 [R3], desc[UR4][R2.64] ;
@UP0 STS.128 [R1], R4 ;
STS [R1], R4 ;
.L_x_1:
HMMA.16816.F32 R4, R8, R2, R4 ;
RED.E.ADD.F32.FTZ.RN.STRONG.GPU desc[UR4][R2.64], R5 ;
REDG.E.ADD.F32.FTZ.RN.STRONG.GPU desc[UR4][R2.64], R5 ;
REDUX.SUM UR4, R2 ;
BAR.SYNC.DEFER_BLOCKING 0x0 ;"""
    counts = {"HMMA": 1, "LDG": 2, "LDG.128": 1, "LDGSTS": 1, "STS": 2, "STS.128": 1, "RED": 2, "BAR": 1}
    assert cuda_compiler._count(listing) == counts


@needs_nvcc
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_source_is_compiled_and_measured(arch):
    compiled = compile_source(SOURCE, arch)
    assert compiled.binary.startswith(b"\x7fELF")
    assert compiled.compiler.startswith("nvcc 1")
    second, first = compiled.kernels
    assert [second.name, first.name] == ["second", "first"]
    assert second.shared_bytes == 2048
    assert second.stack_bytes == second.spill_stores == second.spill_loads == 0
    assert 8 <= second.registers <= 32
    # An array that is indexed at run time lives in local memory.
    assert first.stack_bytes >= 256
    assert first.shared_bytes == 0
    data = json.loads(json.dumps(compiled.to_json()))
    assert data["cuda"] == SOURCE
    assert data["kernels"]["second"]["registers"] == second.registers
    if find_tool("nvdisasm") is not None:
        assert second.instructions["LDG.128"] == second.instructions["STS.128"] == second.instructions["STG.128"] == 1
        assert second.instructions["BAR"] == 1
        assert first.instructions["STL"] > 0
        assert "STS.128" in data["sass"]


def _spilling(blocks_wanted, registers):
    """Return a compiler whose kernel spills while it aims at more blocks than it should."""

    def compile_(source, arch, timeout):
        found = re.search(r"__launch_bounds__\(128(?:, (\d+))?\) hungry\(", source)
        blocks = int(found[1]) if found[1] else 7
        spills = 12 * (blocks > blocks_wanted)
        hungry = KernelResources("hungry", registers or 65536 // (128 * blocks), spills, spills, spills, 0, 0)
        return b"", [hungry, KernelResources("content", 32, 0, 0, 0, 0, 0)], "nvcc 13.0"

    return compile_


BOUNDS = """extern "C" __global__ void __launch_bounds__(128) hungry(float* x);
extern "C" __global__ void __launch_bounds__(256) content(float* x);
extern "C" __global__ void __launch_bounds__(128) hungry(float* x) {}
extern "C" __global__ void __launch_bounds__(256) content(float* x) {}
"""


@pytest.mark.parametrize(
    ("blocks", "registers", "bounds"),
    [
        (7, None, "128"),  # nothing to do
        (6, None, "128, 6"),
        (5, None, "128, 5"),
        (1, None, "128, 4"),  # after three attempts
        (1, 255, "128"),  # no more can be had
    ],
)
def test_a_kernel_that_spills_is_compiled_for_fewer_blocks(monkeypatch, blocks, registers, bounds):
    monkeypatch.setattr(cuda_compiler, "_compile", _spilling(blocks, registers))
    compiled = compile_source(BOUNDS, "sm_90", sass=False)
    assert compiled.source == BOUNDS.replace("__launch_bounds__(128)", f"__launch_bounds__({bounds})")
    assert {kernel.name: kernel.spill_stores for kernel in compiled.kernels}["hungry"] == 12 * (blocks == 1)


@needs_nvcc
def test_fast_math_is_off():
    """Numbers below the smallest normal one stay what they are, and infinity times zero is no number."""
    source = """extern "C" __global__ void kernel(float* x) { x[0] = x[1] * x[2] + x[3]; }"""
    names = compile_source(source, "sm_90").sass.get("kernel", "")
    if not names:
        pytest.skip("needs nvdisasm")
    assert ".FTZ" not in names


@needs_nvcc
def test_refusals_name_the_line(monkeypatch):
    with pytest.raises(
        BuildError, match=r'nvcc does not compile for sm_90: .*"undeclared" is undefined in: undeclared;'
    ):
        compile_source('extern "C" __global__ void kernel() {\nundeclared;\n}', "sm_90")
    with pytest.raises(BuildError, match=r"nvcc does not compile for sm_35: .*[Uu]nsupported gpu architecture"):
        compile_source(SOURCE, "sm_35")
    with pytest.raises(BuildError, match="nvcc took more than 0 s for sm_90"):
        compile_source(SOURCE, "sm_90", timeout=0.01)


def test_without_a_compiler(monkeypatch):
    monkeypatch.setattr(cuda_compiler, "find_tool", lambda name: None)
    monkeypatch.setattr(nvrtc, "_NAME", "libnone.so.13")
    nvrtc._library.cache_clear()
    with pytest.raises(
        BuildError, match=r"needs nvcc, or libnone.so.13, and neither was found. Install .* tvmdcn pack"
    ):
        compile_source(SOURCE, "sm_90")
    nvrtc._library.cache_clear()


@pytest.mark.skipif(find_library(nvrtc._NAME) is None, reason="needs NVRTC")
def test_nvrtc(monkeypatch):
    monkeypatch.setattr(cuda_compiler, "find_tool", lambda name: None)
    compiled = compile_source(SOURCE, "sm_90")
    assert compiled.binary.startswith(b"\x7fELF")
    assert compiled.compiler.startswith("NVRTC 13.")
    assert [kernel.name for kernel in compiled.kernels] == ["second", "first"]
    assert compiled.kernels[0].shared_bytes == 2048
    assert compiled.sass == {}
    with pytest.raises(BuildError, match=r"NVRTC does not compile for sm_90: .*undeclared"):
        compile_source('extern "C" __global__ void kernel() {\nundeclared;\n}', "sm_90")


MODULE = """
import sys
from pathlib import Path
import tvm
from tvm import te, s_tir
from tvmdcn.cuda_module import compile_module
from tvmdcn.target import resolve_target
rows = 64
x = te.placeholder((rows, 64), "float32", name="x")
y = te.compute((rows, 64), lambda i, j: x[i, j] * 2.0, name="y")
schedule = s_tir.Schedule(te.create_prim_func([x, y]))
row, column = schedule.get_loops(schedule.get_sblock("y"))
block, thread = schedule.split(row, [None, 4])
for loop, axis in ((block, "blockIdx.x"), (thread, "threadIdx.y"), (column, "threadIdx.x")):
    schedule.bind(loop, axis)
shared = schedule.cache_read(schedule.get_sblock("y"), 0, "shared.dyn")
schedule.compute_at(shared, block)
fused = schedule.fuse(*schedule.get_loops(shared)[-2:])
rest, thread, lane = schedule.split(fused, [None, 4, 64])
schedule.bind(thread, "threadIdx.y")
schedule.bind(lane, "threadIdx.x")
executable, compiled = compile_module(schedule.mod, resolve_target("cuda-sm_90").to_tvm())
(kernel,) = compiled.kernels
executable.export_library(sys.argv[1])
print(kernel.name, kernel.threads, kernel.shared_bytes, kernel.occupancy, kernel.limit)
assert compiled.binary in Path(sys.argv[1]).read_bytes()
try:
    compile_module(tvm.IRModule({"main": te.create_prim_func([x, y])}), resolve_target("cuda-sm_90").to_tvm())
except Exception as error:
    print(type(error).__name__, error)
"""


@needs_nvcc
def test_module_holds_machine_code_and_loads_without_a_compiler(tmp_path):
    """In processes of their own: TVM's CUDA runtime, or the stand-in for a driver, stays loaded."""
    pytest.importorskip("tvm")
    if shutil.which("cc") is None:
        pytest.skip("needs a C compiler")
    library = tmp_path / "kernel.so"
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(
        [sys.executable, "-c", MODULE, str(library)], cwd=root, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    first, error = done.stdout.strip().splitlines()[-2:]
    name, threads, shared, fraction, limit = first.split(maxsplit=4)
    assert (name, threads, shared) == ("main_kernel", "256", "1024")
    assert float(fraction) == 1.0 == occupancy("sm_90", 256, 16, 1024).fraction
    assert limit == "warps"
    assert error.startswith("BuildError TVM compiled 0 CUDA sources for sm_90")

    load = (
        "import sys; from pathlib import Path; from tvmdcn import cuda_libraries, native;"
        "cuda_libraries.load_runtime_to_build(); module = native.load_module(Path(sys.argv[1]));"
        "print(module.function('main').name, 'tvm' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", load, str(library)], cwd=root, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.split() == ["main", "False"], done.stderr


def test_without_a_driver_nothing_is_run(monkeypatch):
    monkeypatch.setattr(cuda_libraries, "_DRIVER", "libnone.so.1")
    monkeypatch.setattr(cuda_libraries, "_loaded", [])
    with pytest.raises(ArtifactError, match="kernels for GPUs need NVIDIA's driver, and this machine has none"):
        cuda_libraries.load_runtime()


def test_what_to_install_for_cudas_runtime(monkeypatch):
    monkeypatch.setattr(cuda_libraries, "_RUNTIME", "libnone.so.13")
    monkeypatch.setattr(cuda_libraries, "_driver_library", lambda: None)
    monkeypatch.setattr(cuda_libraries, "_loaded", [])
    with pytest.raises(ArtifactError, match=r"libnone.so.13 was not found.* pip install 'nvidia-cuda-runtime>=13,<14'"):
        cuda_libraries.load_runtime()


def test_long_assembly_stays_out_of_manifests(monkeypatch):
    compiled = CompiledSource("text", b"", (), {"a": "NOP ;", "b": "EXIT ;"}, "nvcc 13.0")
    assert compiled.to_json()["sass"] == "// a\nNOP ;\n\n// b\nEXIT ;\n"
    monkeypatch.setattr(cuda_compiler, "_MOST_SASS", 10)
    assert "sass" not in compiled.to_json()
