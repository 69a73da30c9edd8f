# SPDX-License-Identifier: Apache-2.0
"""From CUDA C to machine code, with nvcc or NVRTC and without a GPU, and what the compiler says of each kernel.

TVM's own callback compiles with ``--use_fast_math``, which breaks the border rule's comparisons with infinities, and
throws away what ptxas says. Here a module is compiled to machine code of exactly one compute capability, so that
nothing is compiled, and no compiler is needed, where it runs.
"""

from __future__ import annotations

import functools
import logging
import re
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from tvmdcn import nvrtc
from tvmdcn.cuda_libraries import find_tool
from tvmdcn.errors import BuildError
from tvmdcn.gpus import MAX_REGISTERS

__all__ = ["INSTRUCTIONS", "TIMEOUT", "CompiledSource", "KernelResources", "compile_source", "disassemble"]

_log = logging.getLogger(__name__)

TIMEOUT = 300.0
"""Seconds for one source. A kernel takes two to ten; one whose loops are unrolled too far can take for ever."""

_RELAXATIONS = 3
"""How often a source whose kernels spill is compiled again, for fewer blocks at once."""

_REGISTERS = 65536  # of a multiprocessor, in all compute capabilities that we know

_MOST_SASS = 1 << 20
"""Characters; an artifact's manifest holds the assembly and must stay readable."""

# What says how good code is: groups of instructions of SASS, by the beginning of their names.
INSTRUCTIONS = {
    "HMMA": "HMMA",  # tensor cores
    "FFMA": "FFMA",
    "LDSM": "LDSM",  # ldmatrix
    "LDG.128": r"LDG\.\S*128",
    "LDG": "LDG",
    "LDGSTS": "LDGSTS",  # cp.async
    "LDS": r"LDS\b",
    "STS.128": r"STS\.\S*128",
    "STS": r"STS\b",
    "STG.128": r"STG\.\S*128",
    "STG": "STG",
    "LDL": "LDL",  # local memory: spills, and arrays with indices of run time
    "STL": "STL",
    "RED": r"REDG?\b",
    "ATOM": "ATOM",
    "SHFL": "SHFL",
    "BAR": "BAR",
}
_NAME = r"'?([\w$]+)'?"
_ENTRY = re.compile(rf"Compiling entry function {_NAME} for '(\w+)'")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers(.*)")


@dataclass(frozen=True)
class KernelResources:
    """What one kernel takes of a multiprocessor, as the compiler tells it.

    Parameters
    ----------
    name : str
    registers : int
        Of a thread.
    spill_stores, spill_loads : int
        Bytes that a thread writes to and reads from local memory because registers ran out.
    stack_bytes : int
        Local memory of a thread: spills, and arrays that are indexed at run time.
    shared_bytes : int
        Shared memory of a block, static and dynamic.
    constant_bytes : int
    threads : int
        Threads of a block; 0 where they are not known.
    occupancy : float
        Warps at once, of all that a multiprocessor can hold; 0 where `threads` is not known, or no block fits.
    limit : str
        What keeps another block out: "registers", "shared memory", "warps" or "blocks".
    instructions : mapping of str to int
        How many instructions of each group (:data:`INSTRUCTIONS`) the kernel has; empty without a disassembler.
    """

    name: str
    registers: int
    spill_stores: int
    spill_loads: int
    stack_bytes: int
    shared_bytes: int
    constant_bytes: int
    threads: int = 0
    occupancy: float = 0.0
    limit: str = ""
    instructions: Mapping[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the fields but the name."""
        data = asdict(self)
        del data["name"]
        return {**data, "instructions": dict(self.instructions), "occupancy": round(self.occupancy, 4)}


@dataclass(frozen=True)
class CompiledSource:
    """A source and what became of it.

    Parameters
    ----------
    source : str
        CUDA C, with the launch bounds that it was compiled with.
    binary : bytes
        Machine code (a cubin).
    kernels : tuple of KernelResources
        In the order of the source.
    sass : dict of str to str
        Assembly by kernel; empty without a disassembler.
    compiler : str
        "nvcc 13.0" or "NVRTC 13.0".
    """

    source: str
    binary: bytes
    kernels: tuple[KernelResources, ...]
    sass: Mapping[str, str]
    compiler: str

    def to_json(self) -> dict[str, Any]:
        """Return what a manifest keeps: source, assembly (if it is not too long), kernels by name, compiler."""
        listing = "\n".join(f"// {name}\n{text}\n" for name, text in self.sass.items())
        return {
            "cuda": self.source,
            **({"sass": listing} if listing and len(listing) <= _MOST_SASS else {}),
            "compiler": self.compiler,
            "kernels": {kernel.name: kernel.to_json() for kernel in self.kernels},
        }


def compile_source(source: str, arch: str, *, timeout: float = TIMEOUT, sass: bool = True) -> CompiledSource:
    """Compile CUDA C for one compute capability.

    A kernel that spills registers only because the compiler wants more blocks at once is compiled for fewer.

    Parameters
    ----------
    source : str
        CUDA C.
    arch : str
        For example "sm_90".
    timeout : float
        Seconds.
    sass : bool
        Whether to disassemble, where nvdisasm is installed (0.1 s).

    Raises
    ------
    BuildError
        If there is no compiler, it refuses, or takes too long.
    """
    binary, kernels, compiler = _compile(source, arch, timeout)
    for _ in range(_RELAXATIONS):
        relaxed = _relax(source, kernels)
        if relaxed == source:
            break
        source = relaxed
        binary, kernels, compiler = _compile(source, arch, timeout)
    listing = disassemble(binary) if sass else {}
    order = {name: source.find(f" {name}(") for name in re.findall(r"\b(\w+)\(", source)}
    kernels = [
        replace(kernel, instructions=_count(listing[kernel.name]) if kernel.name in listing else {})
        for kernel in kernels
    ]
    kernels.sort(key=lambda kernel: order.get(kernel.name, 0))
    return CompiledSource(source, binary, tuple(kernels), listing, compiler)


def _compile(source: str, arch: str, timeout: float) -> tuple[bytes, list[KernelResources], str]:
    """Return machine code, what ptxas says of each kernel, and the compiler's name."""
    nvcc = find_tool("nvcc")
    if nvcc is not None:
        binary, log, compiler = _run_nvcc(nvcc, source, arch, timeout)
    else:
        binary, log, compiler = nvrtc.compile_source(source, arch)
    return binary, _read_log(log), compiler


def _relax(source: str, kernels: Iterable[KernelResources]) -> str:
    """Ask for one block less on a multiprocessor where a kernel spills to make room for it.

    ptxas aims at an occupancy of its own, and now and then spills a few registers to reach it, far below the limit of
    a thread. A second number in ``__launch_bounds__`` says how many blocks are wanted.
    """
    for kernel in kernels:
        if not kernel.spill_stores + kernel.spill_loads or kernel.registers >= MAX_REGISTERS:
            continue
        bounds = re.compile(rf"__launch_bounds__\((\d+)(?:, \d+)?\)(?= {kernel.name}\()")
        found = bounds.search(source)
        if found is not None:
            blocks = _REGISTERS // (int(found[1]) * kernel.registers) - 1
            if blocks >= 1:
                source = bounds.sub(rf"__launch_bounds__(\1, {blocks})", source)
    return source


def _run_nvcc(nvcc: Path, source: str, arch: str, timeout: float) -> tuple[bytes, str, str]:
    """Return machine code, what ptxas says, and the compiler's name."""
    number = arch.removeprefix("sm_")
    with tempfile.TemporaryDirectory(prefix="tvmdcn-") as directory:
        text, cubin = Path(directory, "kernel.cu"), Path(directory, "kernel.cubin")
        text.write_text(source)
        command = [str(nvcc), "-cubin", "-O3", "-std=c++17", "-gencode", f"arch=compute_{number},code={arch}"]
        command += ["-Xptxas", "-v", "-Xptxas", "--warn-on-local-memory-usage", "--expt-relaxed-constexpr"]
        # TVM writes arithmetic of 16-bit numbers with operators.
        command += [f"-U__CUDA_NO_{name}__" for name in ("HALF_OPERATORS", "HALF_CONVERSIONS")]
        command += [f"-U__CUDA_NO_{name}__" for name in ("BFLOAT16_OPERATORS", "BFLOAT16_CONVERSIONS")]
        # Of variables that TVM declares and does not use.
        command += ["-diag-suppress", "177", "-o", str(cubin), str(text)]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise BuildError(
                f"nvcc took more than {timeout:.0f} s for {arch}: loops may be unrolled too far."
            ) from error
        except OSError as error:
            raise BuildError(f"{nvcc} cannot be run: {error}") from error
        if done.returncode or not cubin.is_file():
            raise BuildError(f"nvcc does not compile for {arch}: {_first_error(done.stderr or done.stdout, source)}")
        return cubin.read_bytes(), done.stderr, f"nvcc {nvcc_version(nvcc)}"


def _first_error(log: str, source: str) -> str:
    """Return the first error of a compiler, with the line of the source that it names."""
    errors = [line for line in log.splitlines() if re.search(r"\berror\b|fatal", line, re.IGNORECASE)]
    message = (errors or log.strip().splitlines() or ["no message"])[0]
    found = re.search(r"\((\d+)\)", message)
    lines = source.splitlines()
    if found and 0 < int(found[1]) <= len(lines):
        message += f" in: {lines[int(found[1]) - 1].strip()[:200]}"
    return message[:600]


@functools.lru_cache(maxsize=8)
def nvcc_version(nvcc: Path) -> str:
    """Return the version of nvcc, such as "13.0"; empty where it does not say."""
    try:
        done = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    found = re.search(r"release (\d+\.\d+)", done.stdout)
    return found[1] if found else ""


def _read_log(log: str) -> list[KernelResources]:
    """Return what ptxas -v says of each kernel."""
    kernels = []
    parts = _ENTRY.split(log)
    for name, text in zip(parts[1::3], parts[3::3], strict=True):
        stack, used = _STACK.search(text), _USED.search(text)
        if stack is None or used is None:
            raise BuildError(f"the compiler does not tell what {name} takes: {text.strip()[:200]}")
        shared = re.search(r"(\d+) bytes smem", used[2])
        kernels.append(
            KernelResources(
                name=name,
                registers=int(used[1]),
                stack_bytes=int(stack[1]),
                spill_stores=int(stack[2]),
                spill_loads=int(stack[3]),
                shared_bytes=int(shared[1]) if shared else 0,
                constant_bytes=sum(int(size) for size in re.findall(r"(\d+) bytes cmem", used[2])),
            )
        )
    return kernels


def disassemble(binary: bytes) -> dict[str, str]:
    """Return the assembly of each kernel, without addresses and encodings; empty where nvdisasm is missing."""
    nvdisasm = find_tool("nvdisasm")
    if nvdisasm is None:
        _log.debug("no nvdisasm, so instructions are not counted: pip install nvidia-cuda-nvdisasm")
        return {}
    with tempfile.TemporaryDirectory(prefix="tvmdcn-") as directory:
        cubin = Path(directory, "kernel.cubin")
        cubin.write_bytes(binary)
        command = [str(nvdisasm), "--print-code", str(cubin)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            _log.warning("%s failed: %s", nvdisasm, error)
            return {}
    if done.returncode:
        _log.warning("%s does not read what was compiled: %s", nvdisasm, done.stderr.strip()[:200])
        return {}
    listing: dict[str, str] = {}
    for section in re.split(r"^//-+ \.text\.", done.stdout, flags=re.MULTILINE)[1:]:
        name = section.split()[0]
        lines = [re.sub(r"/\*.*?\*/", "", line).strip() for line in section.splitlines()]
        listing[name] = "\n".join(line for line in lines[1:] if line.endswith(";") or line.startswith(".L_"))
    return listing


def _count(listing: str) -> dict[str, int]:
    """Return how many instructions of each group an assembly text has."""
    # "@!P0 LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;"
    names = re.findall(r"^(?:@!?U?P\w+ )?\s*([A-Z][\w.]*)", listing, flags=re.MULTILINE)
    counts = {group: sum(bool(re.match(pattern, name)) for name in names) for group, pattern in INSTRUCTIONS.items()}
    counts["LDG"] -= counts["LDGSTS"]
    return {group: count for group, count in counts.items() if count}
