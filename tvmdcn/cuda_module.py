# SPDX-License-Identifier: Apache-2.0
"""From a scheduled module to a library that holds machine code of a GPU, on any machine with CUDA's compiler."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import tvm
import tvm_ffi

from tvmdcn.cuda_compiler import TIMEOUT, CompiledSource, KernelResources, compile_source
from tvmdcn.cuda_libraries import load_runtime_to_build
from tvmdcn.errors import BuildError
from tvmdcn.gpus import GPUS, occupancy

__all__ = ["compile_module"]

_CALLBACK = "tvm_callback_cuda_compile"
_DYNAMIC_SHARED = "tirx.use_dyn_shared_memory"


@contextlib.contextmanager
def _compiling_with(compile_one: Any) -> Iterator[None]:
    """Let TVM compile CUDA C with a function of ours meanwhile."""
    before = tvm_ffi.get_global_func(_CALLBACK, allow_missing=True)
    tvm_ffi.register_global_func(_CALLBACK, compile_one, override=True)
    try:
        yield
    finally:
        if before is None:
            tvm_ffi.registry.remove_global_func(_CALLBACK)
        else:
            tvm_ffi.register_global_func(_CALLBACK, before, override=True)


_callback_lock = threading.Lock()


def compile_module(
    module: Any, target: Any, *, instruments: Any = (), timeout: float = TIMEOUT, sass: bool = True
) -> tuple[Any, CompiledSource]:
    """Compile a scheduled module for a GPU.

    Parameters
    ----------
    module : tvm.IRModule
        With at least one kernel.
    target : tvm.target.Target
        Of kind "cuda", with its host.
    instruments : sequence of tvm.ir.instrument.PassInstrument
        Active while TVM lowers the module.
    timeout, sass
        As in :func:`compile_source`.

    Returns
    -------
    tvm.runtime.Executable
        Its library holds machine code; loading it needs no compiler.
    CompiledSource

    Raises
    ------
    BuildError
        If TVM or the compiler refuses.
    """
    load_runtime_to_build()
    arch = str(target.attrs["arch"])
    compiled: list[CompiledSource] = []
    failures: list[BuildError] = []
    launches: dict[str, tuple[int, int]] = {}

    def compile_one(code: str) -> bytes:
        try:
            compiled.append(compile_source(code, arch, timeout=timeout, sass=sass))
        except BuildError as error:
            failures.append(error)
            raise
        return compiled[-1].binary

    @tvm.ir.instrument.pass_instrument
    class ReadLaunches:
        def run_after_pass(self, lowered: Any, info: Any) -> None:
            if info.name == "tirx.SplitHostDevice":
                launches.update(_launches(lowered))

    context = tvm.transform.PassContext(config={}, instruments=[*instruments, ReadLaunches()])
    try:
        with _callback_lock, _compiling_with(compile_one), target, context:
            executable = tvm.compile(module, target=target)
    except Exception as error:
        # TVM raises RuntimeError, ValueError and its own classes alike; ours went through its interface.
        if failures:
            raise failures[0] from error
        raise BuildError(f"TVM could not compile for {arch}: {_last_line(error)}") from error
    if len(compiled) != 1:
        raise BuildError(
            f"TVM compiled {len(compiled)} CUDA sources for {arch}, where 1 was expected: it may have kept the source "
            "because its CUDA runtime is not loaded, or the module has no kernel."
        )
    (source,) = compiled
    return executable, replace(
        source, kernels=tuple(_with_launch(kernel, launches.get(kernel.name), arch) for kernel in source.kernels)
    )


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:400] if lines else type(error).__name__


def _statements(node: Any) -> Iterator[Any]:
    """Yield the expressions that a host function evaluates."""
    if type(node).__name__ == "Evaluate":
        yield node.value
    for child in getattr(node, "seq", ()):
        yield from _statements(child)
    for name in ("body", "then_case", "else_case"):
        child = getattr(node, name, None)
        if child is not None:
            yield from _statements(child)


def _launches(module: Any) -> dict[str, tuple[int, int]]:
    """Return threads of a block, and dynamic shared memory, of each kernel that is launched with constants."""
    found: dict[str, tuple[int, int]] = {}
    hosts = [function for function in module.functions.values() if "calling_conv" not in function.attrs]
    for call in (expression for host in hosts for expression in _statements(host.body)):
        if type(call).__name__ != "Call" or call.op.name != "tirx.call_ffi_kernel":
            continue
        tags = [str(tag) for tag in call.attrs.launch_params]
        extents = {
            tag: int(extent)
            for tag, extent in zip(tags, list(call.args)[-len(tags) :], strict=True)
            if type(extent).__name__ == "IntImm"
        }
        if all(tag in extents or tag.startswith("blockIdx") for tag in tags):
            threads = math.prod(extent for tag, extent in extents.items() if tag.startswith("threadIdx"))
            found[str(call.args[0].value)] = threads, extents.get(_DYNAMIC_SHARED, 0)
    return found


def _with_launch(kernel: KernelResources, launch: tuple[int, int] | None, arch: str) -> KernelResources:
    if launch is None:
        return kernel
    threads, shared = launch[0], kernel.shared_bytes + launch[1]
    held = occupancy(arch, threads, kernel.registers, shared)
    if not held.blocks and held.limit == "shared memory":
        raise BuildError(
            f"too much shared memory: a block of {kernel.name} takes {shared} bytes, and {arch} has "
            f"{GPUS[arch].shared_block_bytes} for one."
        )
    if not held.blocks:
        raise BuildError(
            f"too many registers: {kernel.name} takes {kernel.registers} for each of {threads} threads of a block, and "
            f"{arch} has {GPUS[arch].registers}."
        )
    return replace(kernel, threads=threads, shared_bytes=shared, occupancy=held.fraction, limit=held.limit)
