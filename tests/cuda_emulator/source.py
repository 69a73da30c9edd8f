# SPDX-License-Identifier: Apache-2.0
"""Reads CUDA C as TVM generates it: finds its kernels and rewrites what a C++ compiler does not know.

Line numbers stay as they are, so that a fault is reported at the line of the original.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from cuda_emulator.ptx import translate_assembly

__all__ = ["Kernel", "Parameter", "find_kernels", "translate_source"]

# C types of parameters, without const and pointers: NumPy's names.
_DTYPES = {
    "float": "float32",
    "double": "float64",
    "half": "float16",
    "__half": "float16",
    "nv_bfloat16": "bfloat16",
    "__nv_bfloat16": "bfloat16",
    "bool": "bool",
    "char": "int8",
    "signed char": "int8",
    "int8_t": "int8",
    "uchar": "uint8",
    "unsigned char": "uint8",
    "uint8_t": "uint8",
    "short": "int16",
    "int16_t": "int16",
    "ushort": "uint16",
    "unsigned short": "uint16",
    "uint16_t": "uint16",
    "int": "int32",
    "int32_t": "int32",
    "uint": "uint32",
    "unsigned": "uint32",
    "unsigned int": "uint32",
    "uint32_t": "uint32",
    "int64_t": "int64",
    "long long": "int64",
    "uint64_t": "uint64",
    "unsigned long long": "uint64",
}
_KERNEL = re.compile(
    r'extern\s+"C"\s+__global__\s+void\s+(?:__launch_bounds__\(\s*(\d+)[^)]*\)\s*)?(\w+)\s*\(([^)]*)\)\s*([{;])'
)
_DYNAMIC = re.compile(r"extern\s+__shared__\s+(?:__align__\(\d+\)|alignas\(\d+\))?\s*([\w ]+?)\s+(\w+)\s*\[\s*\]\s*;")
_STATIC = re.compile(
    r"(?<!extern )__shared__\s+(?:(?:__align__|alignas)\((\d+)\))?\s*([\w ]+?)\s+(\w+)\s*\[([^\]]+)\]\s*;"
)
_ASM = re.compile(r"\b(?:asm|__asm__)\s*(?:volatile|__volatile__)?\s*\(")
_MAIN = re.compile(r"/\*.*?\*/|//[^\n]*", re.DOTALL)


@dataclass(frozen=True)
class Parameter:
    """A parameter of a kernel: its name, the dtype of it or of what it points to."""

    name: str
    ctype: str
    dtype: str
    pointer: bool


@dataclass(frozen=True)
class Kernel:
    """A kernel of a source: name, parameters in order, and the most threads it may be launched with (0: any)."""

    name: str
    parameters: tuple[Parameter, ...]
    max_threads: int


def _parameter(text: str) -> Parameter:
    words = re.sub(r"__restrict__|\bconst\b|\b__grid_constant__\b", " ", text).strip()
    match = re.fullmatch(r"([\w ]+?)\s*(\*?)\s*(\w+)", words)
    if match is None or match[1] not in _DTYPES:
        raise ValueError(f"parameter {text!r} of a kernel has a type that is not emulated.")
    return Parameter(match[3], match[1], _DTYPES[match[1]], bool(match[2]))


def find_kernels(source: str) -> dict[str, Kernel]:
    """Return the kernels that a source defines, by name."""
    kernels = {}
    for match in _KERNEL.finditer(source):
        if match[4] == "{":
            parameters = tuple(_parameter(text) for text in match[3].split(",") if text.strip())
            kernels[match[2]] = Kernel(match[2], parameters, int(match[1] or 0))
    return kernels


def _closing(source: str, begin: int) -> int:
    """Return the position behind the bracket that closes the one before `begin`."""
    depth, quoted = 1, False
    for index in range(begin, len(source)):
        letter = source[index]
        if letter == '"' and source[index - 1] != "\\":
            quoted = not quoted
        elif not quoted and letter in "()":
            depth += 1 if letter == "(" else -1
            if depth == 0:
                return index + 1
    raise ValueError("an asm statement of the source does not end.")


def _translate_asm(source: str) -> str:
    parts, at = [], 0
    for match in _ASM.finditer(source):
        if match.start() < at or source[: match.start()].rpartition("\n")[2].lstrip().startswith(("#", "//")):
            continue
        end = _closing(source, match.end())
        lines = source.count("\n", match.start(), end)
        parts += [source[at : match.start()], translate_assembly(source[match.end() : end - 1]), "\n" * lines]
        at = end
    return "".join([*parts, source[at:]])


def translate_source(source: str) -> str:
    """Return C++ that a host compiler takes, with one entry `emulated_NAME(void**)` per kernel.

    Raises
    ------
    UnknownInstructionError
        If inline assembly holds an instruction that is not emulated.
    ValueError
        If the source has no kernel, or a parameter of an unknown type.
    """
    kernels = find_kernels(source)
    if not kernels:
        raise ValueError('the source has no kernel (extern "C" __global__ void ...).')
    code = _DYNAMIC.sub(r'\1* \2 = (\1*)emulator_dynamic_shared("\2");', source)
    code = _STATIC.sub(
        lambda match: (
            f"{match[2]}* {match[3]} = ({match[2]}*)emulator_static_shared("
            f'"{match[3]}", sizeof({match[2]}) * ({match[4]}), sizeof({match[2]}), {match[1] or 1});'
        ),
        code,
    )
    if remaining := re.search(r"[^\n]*__shared__[^\n]*", _MAIN.sub("", code)):
        raise ValueError(f"shared memory is declared in a form that is not emulated: {remaining[0].strip()}")
    code = _translate_asm(code)
    entries = []
    for kernel in kernels.values():
        arguments = ", ".join(
            f"({parameter.ctype}*)a[{index}]" if parameter.pointer else f"*({parameter.ctype}*)a[{index}]"
            for index, parameter in enumerate(kernel.parameters)
        )
        entries.append(
            f'extern "C" __attribute__((visibility("default"), no_sanitize("thread"))) '
            f"void emulated_{kernel.name}(void** a) {{ {kernel.name}({arguments}); }}"
        )
    image = (
        "extern char __ehdr_start, _end; "
        'extern "C" __attribute__((visibility("default"))) void* emulated_image(int last) '
        "{ return last ? &_end : &__ehdr_start; }"
    )
    return "\n".join([code, *entries, image, ""])
