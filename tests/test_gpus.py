# SPDX-License-Identifier: Apache-2.0
"""The table of GPUs: occupancy is what CUDA's own calculator says."""

from __future__ import annotations

import itertools
import shutil
import subprocess
from pathlib import Path

import pytest

from tvmdcn.gpus import GPUS, occupancy

CALCULATOR = """
#include "cuda_occupancy.h"
#include <stdio.h>
int main() {
  int major, minor, threads, shared_kib, optin_kib, block, registers, bytes;
  while (scanf("%d %d %d %d %d %d %d %d", &major, &minor, &threads, &shared_kib, &optin_kib, &block, &registers,
               &bytes) == 8) {
    cudaOccDeviceProp p;
    p.computeMajor = major; p.computeMinor = minor; p.maxThreadsPerBlock = 1024;
    p.maxThreadsPerMultiprocessor = threads; p.regsPerBlock = p.regsPerMultiprocessor = 65536; p.warpSize = 32;
    p.sharedMemPerBlock = 48 << 10; p.sharedMemPerMultiprocessor = (size_t)shared_kib << 10; p.numSms = 1;
    p.sharedMemPerBlockOptin = (size_t)optin_kib << 10; p.reservedSharedMemPerBlock = major >= 8 ? 1024 : 0;
    cudaOccFuncAttributes a;
    a.maxThreadsPerBlock = 1024; a.numRegs = registers; a.sharedSizeBytes = 0;
    a.partitionedGCConfig = PARTITIONED_GC_OFF; a.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
    a.maxDynamicSharedSizeBytes = (size_t)optin_kib << 10; a.numBlockBarriers = 1; a.virtualResourceCount = 0;
    cudaOccDeviceState s;
    cudaOccResult r;
    cudaOccError e = cudaOccMaxActiveBlocksPerMultiprocessor(&r, &p, &a, &s, block, bytes);
    printf("%d\\n", e ? -1 - (int)e : r.activeBlocksPerMultiprocessor);
  }
}
"""


def header() -> Path | None:
    nvcc = shutil.which("nvcc")
    places = [Path("/usr/local/cuda/include")]
    if nvcc:
        places.append(Path(nvcc).resolve().parent.parent / "include")
    return next((place for place in places if (place / "cuda_occupancy.h").is_file()), None)


def test_occupancy_is_what_cuda_says(tmp_path):
    include = header()
    if include is None or shutil.which("g++") is None:
        pytest.skip("needs g++ and CUDA's cuda_occupancy.h")
    (tmp_path / "calculator.cpp").write_text(CALCULATOR)
    program = tmp_path / "calculator"
    subprocess.run(
        ["g++", "-w", f"-I{include}", "-o", program, tmp_path / "calculator.cpp"],
        check=True,
        capture_output=True,
        timeout=120,
    )
    cases = [
        (arch, threads, registers, shared)
        for arch, threads, registers in itertools.product(
            GPUS, (32, 64, 96, 128, 224, 256, 384, 512, 768, 1024), (1, 16, 32, 33, 63, 74, 128, 168, 255)
        )
        for shared in (0, 100, 1024, 17408, 49152, 65536, 99 << 10, 101000, 163 << 10, 227 << 10, 228 << 10)
    ]
    lines = []
    for arch, threads, registers, shared in cases:
        major, minor = divmod(int(arch.removeprefix("sm_")), 10)
        gpu = GPUS[arch]
        sizes = (gpu.threads, gpu.shared_kib, gpu.shared_block_kib, threads, registers, shared)
        lines.append(" ".join(map(str, (major, minor, *sizes))))
    done = subprocess.run([program], input="\n".join(lines), capture_output=True, text=True, check=True, timeout=60)
    expected = [int(line) for line in done.stdout.split()]
    assert len(expected) == len(cases)
    assert min(expected) >= 0
    for case, blocks in zip(cases, expected, strict=True):
        assert occupancy(*case).blocks == blocks, case


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        # 64 warps, 74 registers (80 with rounding): 65536 / (80 * 32) = 25.6, in quarters 24 warps.
        (("sm_90", 256, 74, 17408), (3, 24 / 64, "registers")),
        (("sm_90", 128, 32, 100 << 10), (2, 8 / 64, "shared memory")),
        (("sm_90", 1024, 32, 0), (2, 1.0, "warps")),
        (("sm_86", 32, 16, 0), (16, 16 / 48, "blocks")),
        (("sm_86", 128, 32, 100 << 10), (0, 0.0, "shared memory")),
        (("sm_80", 1024, 80, 0), (0, 0.0, "registers")),
    ],
)
def test_what_limits_occupancy(arguments, expected):
    assert occupancy(*arguments) == expected


def test_names_and_sizes():
    for name, gpu in GPUS.items():
        assert name.startswith("sm_")
        assert gpu.threads % 32 == 0
        assert gpu.shared_block_kib <= gpu.shared_kib
        assert gpu.l2_bytes == gpu.l2_mib * 1024 * 1024
