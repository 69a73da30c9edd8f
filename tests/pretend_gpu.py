# SPDX-License-Identifier: Apache-2.0
"""Kernels for GPUs without one: torch tensors on the CPU pass for tensors on a GPU, and an emulator runs the kernels.

What is not pretended is all between the caller's arguments and the compiled function: checks, layouts, packed
weights, the arguments' order, shapes and addresses. Streams are numbers; what waits for what is written down.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import tvm
from cuda_emulator import run_emulated
from cuda_emulator.host import DeviceProgram, compile_for_emulation

from tvmdcn import builder, cuda_calls, runtime
from tvmdcn.cuda_arrays import TorchCudaArrays
from tvmdcn.cuda_compiled import CompiledCudaKernel
from tvmdcn.native import Tensor
from tvmdcn.space import space_of

__all__ = ["GPU", "PretendArrays", "install", "kernel_of", "program_of"]

GPU = 0
_DTYPES = {"float16": np.float16, "bfloat16": np.uint16, "float32": np.float32, "float64": np.float64}
_DTYPES |= {"uint32": np.uint32, "int64": np.int64, "uint8": np.uint8}


class PretendArrays(TorchCudaArrays):
    """Tensors on the CPU as if they were on GPU 0; those that `elsewhere` names on GPU 1."""

    def __init__(self) -> None:
        super().__init__(torch)
        self.current, self.capturing = 7, False
        self.elsewhere: set[int] = set()
        self.waits: list[Any] = []

    def place(self, array: Any) -> int:
        return 1 if id(array) in self.elsewhere else GPU

    def gpu(self, array: Any) -> tuple[int, bool]:
        return self.place(array), False

    def key(self, *arrays: Any) -> tuple[Any, ...]:
        return (*super().key(*arrays), *[None if a is None else self.place(a) for a in arrays])

    def _check_place(self, name: str, array: Any) -> None:
        pass

    def stream(self, index: int) -> int:
        return self.current

    def is_capturing(self) -> bool:
        return self.capturing

    def on(self, index: int) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def memory(self, like: Any, count: int, dtype: str) -> Any:
        # As torch's allocator for GPUs does, and filled with what is no number.
        item = np.dtype(_DTYPES[dtype]).itemsize
        bytes_ = torch.full((count * item + 512,), 255, dtype=torch.uint8)
        first = -bytes_.data_ptr() % 512
        return bytes_[first : first + count * item].view(getattr(torch, dtype.replace("uint32", "int32")))

    def zeros(self, like: Any, count: int, dtype: str) -> Any:
        return self.memory(like, count, dtype).zero_()

    def empty(self, like: Any, shape: tuple[int, ...], layout: str) -> Any:
        dtype = str(like.dtype).removeprefix("torch.")
        memory = self.memory(like, math.prod(shape), dtype)
        if layout == "NCHW":
            return memory.view(shape)
        batch, channels, height, width = shape
        return memory.view(batch, height, width, channels).permute(0, 3, 1, 2)

    def record_event(self) -> Any:
        return SimpleNamespace(stream=self.current)

    def wait_for(self, event: Any, memory: Any) -> None:
        self.waits.append((self.current, event.stream))


class _Frame:
    """What `tvmdcn.native.Frame` is, for an emulated function."""

    run_function: Callable[[str, list[Any]], object]

    def __init__(self, function: Any, arguments: Sequence[Tensor | int], gpu: int | None = None) -> None:
        assert gpu == GPU
        self._name, self._arguments = function.name, arguments
        tensors = [index for index, argument in enumerate(arguments) if isinstance(argument, Tensor)]
        self.words = [0] * len(arguments)
        self.pointers = tensors

    def run(self) -> None:
        values: list[Any] = []
        for argument, word in zip(self._arguments, self.words, strict=True):
            if isinstance(argument, int):
                values.append(argument)
                continue
            memory = (ctypes.c_char * argument.bytes).from_address(word)
            values.append(np.frombuffer(memory, _DTYPES[argument.dtype]).reshape(argument.shape))
        self.run_function(self._name, values)


class _Runtime:
    """The part of `tvmdcn.native.runtime()` that launches use."""

    def __init__(self) -> None:
        self.stream, self.used = 0, []

    def exchange_stream(self, gpu: int, stream: int) -> int:
        before, self.stream = self.stream, stream
        self.used.append((gpu, stream))
        return before


def install(
    monkeypatch: Any, program: DeviceProgram | Callable[[str, list[Any]], object]
) -> tuple[PretendArrays, _Runtime]:
    """Let calls on GPUs run the functions of a program, by the names of the compiled ones.

    A program in Python is called with the name and the arguments, arrays (bfloat16's bits) and ints.
    """

    def run_function(name: str, values: list[Any]) -> None:
        if isinstance(program, DeviceProgram):
            run_emulated(program, None, values, name)
        else:
            program(name, values)

    arrays, stand_in = PretendArrays(), _Runtime()
    frame = type("Frame", (_Frame,), {"run_function": staticmethod(run_function)})
    monkeypatch.setattr(cuda_calls, "Frame", frame)
    monkeypatch.setattr(cuda_calls.native, "runtime", lambda: stand_in)
    monkeypatch.setattr(CompiledCudaKernel, "_arrays", lambda self, array: arrays)
    monkeypatch.setattr(CompiledCudaKernel, "_check_gpu", lambda self, gpu: None)
    return arrays, stand_in


@functools.cache
def program_of(spec: Any, target: Any) -> tuple[DeviceProgram, Any]:
    """Return the functions of a specification's default schedule, compiled for the emulator, and their interface."""
    schedule = builder.new_schedule(spec, target)
    space_of(spec.operator, "cuda").schedule(schedule, spec, target, None)
    module = builder.device_module(spec, target, schedule.mod)
    with tvm.transform.PassContext(instruments=[builder.OwnBarriers()]):
        program = compile_for_emulation(module, target.to_tvm())
    return program, builder.interface_of(spec, target, schedule.mod)


def kernel_of(spec: Any, target: Any, interface: Any) -> Any:
    """Return a kernel whose functions have names and no code of their own."""
    artifact: Any = SimpleNamespace(
        spec=spec,
        target=target,
        kernel=interface,
        key=SimpleNamespace(schedule="default"),
        path=SimpleNamespace(name=f"{spec.operator}-pretended"),
        load=lambda: SimpleNamespace(function=lambda name: SimpleNamespace(name=name)),
    )
    return runtime._CUDA_KERNELS[spec.operator](artifact)
