# SPDX-License-Identifier: Apache-2.0
"""Runs a whole scheduled module on the emulated device: the host function interpreted, its kernels emulated.

The host function is taken right after TVM has split it from the kernels: allocations of intermediate arrays,
arithmetic on extents, and one launch after the other.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
import tvm_ffi
from tvm import tirx
from tvm.tirx.build import codegen_build, split_host_device_mods

from cuda_emulator.machine import DeviceMemory, Emulated

__all__ = ["DeviceProgram", "compile_for_emulation", "run_emulated"]

_COMPILE = "tvm_callback_cuda_compile"
_DYNAMIC_SHARED = "tirx.use_dyn_shared_memory"
_OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "Add": operator.add,
    "Sub": operator.sub,
    "Mul": operator.mul,
    "FloorDiv": operator.floordiv,
    "FloorMod": operator.mod,
    # Truncating; extents are never negative.
    "Div": operator.floordiv,
    "Mod": operator.mod,
    "Min": min,
    "Max": max,
    "EQ": operator.eq,
    "NE": operator.ne,
    "LT": operator.lt,
    "LE": operator.le,
    "GT": operator.gt,
    "GE": operator.ge,
    "And": lambda a, b: a and b,
    "Or": lambda a, b: a or b,
}
_CALLS: dict[str, Callable[..., Any]] = {
    "tirx.shift_right": operator.rshift,
    "tirx.shift_left": operator.lshift,
    "tirx.bitwise_and": operator.and_,
    "tirx.likely": lambda value: value,
}


@dataclass(frozen=True)
class DeviceProgram:
    """A module split for emulation: its host functions by name, and the kernels compiled for the CPU."""

    hosts: Mapping[str, Any]
    source: str
    emulated: Emulated

    @property
    def host(self) -> Any:
        """The host function of a module that has only one."""
        (host,) = self.hosts.values()
        return host


@contextmanager
def _source_only(sources: list[str]) -> Iterator[None]:
    """Let TVM generate CUDA C without compiling it."""
    before = tvm_ffi.get_global_func(_COMPILE, allow_missing=True)

    def keep(code: str) -> bytes:
        sources.append(code)
        return b"not compiled: for the emulator"

    tvm_ffi.register_global_func(_COMPILE, keep, override=True)
    try:
        yield
    finally:
        if before is None:
            tvm_ffi.registry.remove_global_func(_COMPILE)
        else:
            tvm_ffi.register_global_func(_COMPILE, before, override=True)


def compile_for_emulation(module: Any, target: Any) -> DeviceProgram:
    """Lower a scheduled module with TVM's own pipeline and compile its kernels for the CPU.

    Parameters
    ----------
    module : tvm.IRModule or tvm.tirx.PrimFunc
        With one or more host functions, whose loops are bound to blocks and threads.
    target : tvm.target.Target
        Of kind "cuda".
    """
    split: list[Any] = []

    @tvm.ir.instrument.pass_instrument
    class KeepSplit:
        def run_after_pass(self, module: Any, info: Any) -> None:
            if info.name == "tirx.SplitHostDevice":
                split.append(module)

    if not isinstance(module, tvm.IRModule):
        module = tvm.IRModule.from_expr(module)
    target = tvm.target.Target(target).with_host(tvm.target.Target("llvm"))
    pipeline, _, finalize_device = tirx.get_default_tir_pipeline(target)
    context = tvm.transform.PassContext.current()
    with (
        target,
        tvm.transform.PassContext(
            opt_level=context.opt_level,
            config=dict(context.config),
            disabled_pass=list(context.disabled_pass),
            # Those that are active stay so: schedules may bring their own.
            instruments=[*(context.instruments or ()), KeepSplit()],
        ),
    ):
        lowered = pipeline(tirx.transform.BindTarget(target)(module))
        _, device = split_host_device_mods(lowered)
        ((device_target, kernels),) = device.items()
        sources: list[str] = []
        with _source_only(sources):
            built = codegen_build(finalize_device()(kernels), device_target)
    source = sources[0] if sources else built.inspect_source()
    hosts = {
        str(name.name_hint): function
        for name, function in split[-1].functions.items()
        if "calling_conv" not in function.attrs
    }
    return DeviceProgram(hosts, source, Emulated(source))


class _Interpreter:
    """Runs a host function. Variables, of extents and of arrays, by TVM's node."""

    def __init__(self, program: DeviceProgram, memory: DeviceMemory) -> None:
        self._program, self._memory = program, memory
        self._values: dict[Any, Any] = {}

    def bind(self, parameter: Any, argument: Any) -> None:
        if not isinstance(argument, np.ndarray):
            self._values[parameter] = int(argument)
            return
        if len(parameter.shape) != argument.ndim:
            raise ValueError(f"argument {parameter.name} has {argument.ndim} dimensions, not {len(parameter.shape)}.")
        dtype = "uint16" if str(parameter.dtype) == "bfloat16" else str(parameter.dtype)
        if argument.dtype.name not in (dtype, str(parameter.dtype)):
            raise ValueError(f"argument {parameter.name} has dtype {argument.dtype}, not {parameter.dtype}.")
        self._values[parameter] = self._memory.copy_in(argument)

    def check_shape(self, parameter: Any, array: np.ndarray) -> None:
        for extent, actual in zip(parameter.shape, array.shape, strict=True):
            if isinstance(extent, tirx.Var) and extent not in self._values:
                self._values[extent] = actual
            elif self.value(extent) != actual:
                raise ValueError(f"argument {parameter.name} has shape {array.shape}, not {tuple(parameter.shape)}.")

    def value(self, node: Any) -> Any:
        if isinstance(node, int):
            return node
        kind = type(node).__name__
        if isinstance(node, tirx.Var):
            return self._values[node]
        if kind in ("IntImm", "FloatImm", "StringImm"):
            return node.value
        if kind in _OPERATORS:
            return _OPERATORS[kind](self.value(node.a), self.value(node.b))
        if kind == "Not":
            return not self.value(node.a)
        if kind == "Cast":
            return int(self.value(node.value))
        if kind == "Select":
            return self.value(node.true_value if self.value(node.condition) else node.false_value)
        if kind == "Call":
            name = node.op.name
            if name == "tirx.buffer_data":
                return self.value(node.args[0])
            if name == "tirx.if_then_else":
                return self.value(node.args[1] if self.value(node.args[0]) else node.args[2])
            if name in _CALLS:
                return _CALLS[name](*(self.value(argument) for argument in node.args))
            raise NotImplementedError(f"host call {name} is not emulated: {node}")
        raise NotImplementedError(f"host expression {kind} is not emulated: {node}")

    def run(self, node: Any) -> None:
        kind = type(node).__name__
        if kind == "SeqStmt":
            for part in node.seq:
                self.run(part)
        elif kind == "Bind":
            self._values[node.var] = self.value(node.value)
        elif kind == "AllocBuffer":
            size = int(np.prod([self.value(extent) for extent in node.buffer.shape], dtype=np.int64))
            itemsize = tvm.DataType(str(node.buffer.dtype)).itemsize
            self._values[node.buffer] = self._memory.allocate(max(size, 1) * itemsize, itemsize)
        elif kind == "DeclBuffer":
            self._values[node.buffer] = self.value(node.data)
        elif kind == "AttrStmt":
            self.run(node.body)
        elif kind == "IfThenElse":
            branch = node.then_case if self.value(node.condition) else node.else_case
            if branch is not None:
                self.run(branch)
        elif kind == "For":
            begin = self.value(node.min)
            for step in range(self.value(node.extent)):
                self._values[node.loop_var] = begin + step
                self.run(node.body)
        elif kind == "AssertStmt":
            if not self.value(node.condition):
                raise ValueError(f"the host function asserts {node.condition}.")
        elif kind == "Evaluate":
            if type(node.value).__name__ == "Call":
                self.launch(node.value)
        else:
            raise NotImplementedError(f"host statement {kind} is not emulated: {node}")

    def launch(self, call: Any) -> None:
        if call.op.name != "tirx.call_ffi_kernel":
            self.value(call)
            return
        name, *arguments = (self.value(argument) for argument in call.args)
        names = [str(tag) for tag in call.attrs.launch_params]
        extents = dict(zip(names, arguments[len(arguments) - len(names) :], strict=True))
        grid, block = ([extents.pop(f"{kind}Idx.{axis}", 1) for axis in "xyz"] for kind in ("block", "thread"))
        shared = extents.pop(_DYNAMIC_SHARED, 0)
        if extents:
            raise NotImplementedError(f"launch parameters {sorted(extents)} are not emulated.")
        values = arguments[: len(arguments) - len(names)]
        self._program.emulated.launch_at(name, grid, block, values, shared)


def run_emulated(module: Any, target: Any, arguments: Sequence[Any], function: str | None = None) -> DeviceProgram:
    """Run a scheduled module on the emulated device, all kernels in order.

    Parameters
    ----------
    module : tvm.IRModule, tvm.tirx.PrimFunc or DeviceProgram
        What to run; a program that was compiled before (:func:`compile_for_emulation`) saves the compilation.
    target : tvm.target.Target or dict
        Of kind "cuda"; not used for a program.
    arguments : sequence
        One per parameter of the host function: a contiguous array (uint16 for bfloat16) or an int. What the
        kernels wrote is in the arrays afterwards. Arrays that are read-only may only be read. Arrays that
        only live in between are allocated as the host function does, and hold nothing until they are written.
    function : str, optional
        Name of the host function, where there are several.

    Returns
    -------
    DeviceProgram
        To run again, and with the generated CUDA C in `source`.

    Raises
    ------
    EmulationError
        If a kernel does something that is a fault, or not certain to work, on a GPU.
    ValueError
        If arguments do not fit.
    """
    program = module if isinstance(module, DeviceProgram) else compile_for_emulation(module, target)
    host = program.host if function is None else program.hosts[function]
    parameters = list(host.params)
    if len(parameters) != len(arguments):
        raise ValueError(f"the function takes {len(parameters)} arguments, got {len(arguments)}.")
    with DeviceMemory() as memory:
        interpreter = _Interpreter(program, memory)
        pairs = list(zip(parameters, arguments, strict=True))
        for parameter, argument in pairs:
            interpreter.bind(parameter, argument)
        for parameter, argument in pairs:
            if isinstance(argument, np.ndarray):
                interpreter.check_shape(parameter, argument)
        interpreter.run(host.body)
        memory.copy_out()
    return program
