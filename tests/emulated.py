# SPDX-License-Identifier: Apache-2.0
"""Kernels for a processor that is not here: an emulator runs them, with `run_bare.c` in the place of TVM's runtime."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from tvmdcn.artifact import Artifact
from tvmdcn.native import Tensor
from tvmdcn.runtime import KERNELS
from tvmdcn.spec import Extents

SOURCE = Path(__file__).with_name("run_bare.c")
COMPILER, EMULATOR = shutil.which("aarch64-linux-gnu-gcc"), shutil.which("qemu-aarch64")
# Debian's cross compiler has its C library there.
SYSROOT = Path("/usr/aarch64-linux-gnu")
MISSING = next(
    (
        f"there is no {name}: apt-get install {package}"
        for name, package, found in (
            ("aarch64-linux-gnu-gcc", "gcc-aarch64-linux-gnu libc6-dev-arm64-cross", COMPILER),
            ("qemu-aarch64", "qemu-user", EMULATOR),
            (SYSROOT, "libc6-dev-arm64-cross", SYSROOT.is_dir()),
        )
        if not found
    ),
    None,
)


def compile_runner(folder: Path) -> Path:
    """Compile what calls kernels, for the emulated processor."""
    assert COMPILER is not None
    runner = folder / "run_bare"
    words = [COMPILER, "-O1", "-std=gnu11", "-Wall", "-Werror", "-rdynamic", str(SOURCE), "-o", str(runner), "-ldl"]
    subprocess.run(words, check=True, timeout=60)
    return runner


def emulate(runner: Path, artifact: Artifact, extents: Extents, tensors: Mapping[str, np.ndarray], folder: Path):
    """Compute what a kernel computes; return the outputs by name.

    Parameters
    ----------
    runner : Path
        What :func:`compile_runner` returned.
    artifact : Artifact
        A kernel of float32 or float64.
    extents, tensors
        The sizes, at least as many pixels as the kernel computes at once, and the arguments by name.
    folder : Path
        Where tensors are exchanged.
    """
    spec, interface = artifact.spec, artifact.kernel
    # A kernel that is not loaded, for what it says of the arguments of a call.
    kernel = object.__new__(KERNELS[spec.operator])
    kernel.artifact, kernel.spec = artifact, spec
    height, width = spec.output_size(extents.height, extents.width)
    assert height * width >= interface.granule

    def call(function: str, *arguments: tuple[str, Tensor] | int) -> None:
        words = []
        for argument in arguments:
            if isinstance(argument, int):
                words.append(str(argument))
            else:
                name, tensor = argument
                bits = np.dtype(tensor.dtype).itemsize * 8
                words.append(f"{folder / name}:2:{bits}:{'x'.join(map(str, tensor.shape))}")
        done = subprocess.run(
            [EMULATOR, "-cpu", "max", "-L", SYSROOT, runner, artifact.library, function, *words],
            capture_output=True,
            text=True,
            check=False,
            timeout=100,
        )
        assert done.returncode == 0, done.stderr

    plan = kernel._plan(extents, height * width, width, 1)
    names = [*spec.inputs, *spec.outputs]
    for name, tensor in zip(names, plan, strict=False):
        if name in spec.outputs:
            np.full(tensor.shape, np.nan, tensor.dtype).tofile(folder / name)
        elif name != "weight":
            tensors[name].astype(tensor.dtype).tofile(folder / name)
    if "weight" in spec.inputs:
        rows = tensors["weight"].reshape(spec.out_channels, -1)
        rows.tofile(folder / "rows")
        np.zeros(interface.packed_shape, interface.packed_dtype).tofile(folder / "weight")
        packed = Tensor(interface.packed_shape, interface.packed_dtype)
        call(interface.pack, ("rows", Tensor(rows.shape, spec.dtype)), ("weight", packed))
    call(interface.entry, *(item if isinstance(item, int) else (names[i], item) for i, item in enumerate(plan)))
    return {name: np.fromfile(folder / name, spec.dtype) for name in spec.outputs}


def machine_of(library: Path) -> tuple[int, bytes]:
    """Return the processor of an ELF file (``e_machine``), and its executable part."""
    data = library.read_bytes()
    assert data[:6] == b"\x7fELF\x02\x01", f"{library} is no ELF file of 64 bits"
    machine = struct.unpack_from("<H", data, 18)[0]
    table, size, count = (*struct.unpack_from("<Q", data, 32), *struct.unpack_from("<2H", data, 54))
    for index in range(count):
        kind, flags, offset, _, _, length = struct.unpack_from("<IIQQQQ", data, table + index * size)
        if kind == 1 and flags & 1:  # PT_LOAD, PF_X
            return machine, data[offset : offset + length]
    raise AssertionError(f"{library} has no code")


def vector_multiplications(code: bytes, lanes: int) -> int:
    """Return how many FMLA instructions of AArch64 on float32 (4 lanes) or float64 (2) stand in a code."""
    words = np.frombuffer(code[: len(code) // 4 * 4], "<u4")
    double = 1 << 22 if lanes == 2 else 0
    whole = (words & 0xFFE0FC00) == 0x4E20CC00 | double  # Vd, Vn, Vm
    element = (words & 0xFFC0F400) == 0x4F801000 | double  # Vd, Vn, one lane of Vm
    return int((whole | element).sum())


def device_code(library: Path) -> tuple[int, bytes]:
    """Return the machine code for a GPU that a library holds, a cubin, and its compute capability, as 90 for sm_90."""
    data = library.read_bytes()
    places = [found.start() for found in re.finditer(b"\x7fELF", data)][1:]
    cubins = [at for at in places if struct.unpack_from("<H", data, at + 18)[0] == 190]  # EM_CUDA
    assert len(cubins) == 1, f"{library} holds {len(cubins)} cubins"
    at = cubins[0]
    flags = struct.unpack_from("<I", data, at + 48)[0]
    programs, sections = struct.unpack_from("<2Q", data, at + 32)
    program_size, programs_count, section_size, sections_count = struct.unpack_from("<4H", data, at + 54)
    end = max(programs + program_size * programs_count, sections + section_size * sections_count)
    # CUDA 13's cubins (ABI 8) have the capability in the second byte, older ones in the first.
    capability = flags >> 8 & 0xFF if data[at + 8] >= 8 else flags & 0xFF
    return capability, data[at : at + end]
