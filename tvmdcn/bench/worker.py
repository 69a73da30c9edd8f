# SPDX-License-Identifier: Apache-2.0
"""The process that one provider runs in: JSON lines in on standard input, JSON lines out on standard output.

Requests, each answered by one line with ``ok``, and with ``reason`` where that is false:

``{"do": "prepare", "spec", "extents", "tensors": FOLDER, "output": FILE or null}``
    Prepare a layer, or its gradients, and call it twice; answers ``call_ms``, the time of the second call,
    ``compared``, whether the results were written to FILE (``.npz``, float64, by the names of the outputs), and
    ``described``, what a row says of it: memory, processors, artifact, note.
``{"do": "prepare_roof", "dtype"}``
    Prepare what a roof is measured by; answers ``call_ms``, and as ``described`` the fields of its row.
``{"do": "evict"}``
    Fill the caches with something else; answers ``evict_ms`` and ``evicted_bytes``.
``{"do": "measure", "cache": "warm" or "cold", "seconds", "min_calls", "warmup"}``
    Time calls until both limits are reached, after untimed calls for ``warmup`` seconds (null: none); answers
    ``times_ms``.
``{"do": "versions"}``
    Answer ``versions``, of this process's environment.
``{"do": "quit"}``
    End without an answer. So does the end of standard input.

By hand: ``python -m tvmdcn.bench.worker tvmdcn.bench.providers:prepare_openvino '' 1 cpu``.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import importlib.util
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tvmdcn.bench.device import Device, open_device
from tvmdcn.bench.machine import identify_versions
from tvmdcn.bench.provider import BackwardTensors, Prepared, Unsupported
from tvmdcn.errors import SpecError
from tvmdcn.spec import DeformConv2dGradSpec, DeformConv2dSpec, Extents, spec_from_json
from tvmdcn.tensors import Tensors, make_gradient_tensors, make_tensors, numpy_dtype

if TYPE_CHECKING:
    from tvmdcn.bench.roofs import Ready

__all__ = ["load_tensors", "main", "save_tensors"]

_NAMES = ("input", "offset", "weight", "mask", "bias")


def save_tensors(folder: Path, tensors: Tensors) -> None:
    """Write the tensors of a problem to a folder, for the workers to read."""
    for name, array in vars(tensors).items():
        if array is not None:
            # NumPy's files know no bfloat16: its bits are kept.
            np.save(folder / f"{name}.npy", array.view(np.uint16) if array.dtype.kind == "V" else array)


def load_tensors(folder: Path, spec: DeformConv2dSpec) -> Tensors:
    """Read what :func:`save_tensors` wrote; for gradients these are :class:`BackwardTensors`."""
    arrays: dict[str, Any] = {}
    backward = isinstance(spec, DeformConv2dGradSpec)
    for name in (*_NAMES, "grad_output") if backward else _NAMES:
        path = folder / f"{name}.npy"
        array = np.load(path, allow_pickle=False) if path.exists() else None
        if array is not None and spec.dtype == "bfloat16":
            array = array.view(numpy_dtype("bfloat16"))
        arrays[name] = array
    return BackwardTensors(**arrays) if backward else Tensors(**arrays)


class Layers:
    """Answers requests for one provider, holding one prepared layer at a time."""

    def __init__(self, source: str, schedule: str | None, threads: int, device: str = "cpu") -> None:
        self._source, self._schedule, self._threads, self._name = source, schedule, threads, device
        # The whole of it: a call may use memory that only the other parts keep.
        self._ready: Prepared | Ready | None = None

    @functools.cached_property
    def _device(self) -> Device:
        return open_device(self._name)

    def prepare(self, request: dict[str, Any]) -> dict[str, Any]:
        """Prepare the layer of a request, compute its output, and time a call after that."""
        self._ready = None  # the memory of the last problem is free before the next needs it
        spec = spec_from_json(request["spec"])
        extents = Extents(**request["extents"])
        find, device = _find(self._source), self._device
        with contextlib.suppress(Exception):  # whatever it is, the layer itself will fail alike
            small = _small(spec, extents)
            ready = find(spec, small, _make(spec, small), self._threads, self._schedule)
            ready.call()
        ready = None
        tensors = load_tensors(Path(request["tensors"]), spec)
        before = self._settle()
        layer = find(spec, extents, tensors, self._threads, self._schedule)
        prepared = device.peak()
        self._settle()
        result = layer.call()
        called = device.peak()
        results = sum(math.prod(spec.shape_of(name, extents)) for name in spec.outputs) * tensors.input.itemsize
        if layer.output is not None and request["output"] is not None:
            output = layer.output(result)
            named = output if isinstance(output, Mapping) else {"output": output}
            # float64 holds every dtype exactly, and NumPy's files know it.
            arrays: dict[str, Any] = {name: np.asarray(array, np.float64) for name, array in named.items()}
            np.savez(request["output"], **arrays)
        del result
        self._ready = layer
        return {
            "call_ms": device.time(layer.call),
            "compared": layer.output is not None,
            "described": {
                "memory_bytes": _beyond(called, before, results + layer.copied_bytes),
                "memory_prepare_bytes": _beyond(prepared, before, layer.copied_bytes),
                "memory_resolution_bytes": device.resolution,
                "affinity": _affinity(),
                "artifact": layer.artifact,
                "note": layer.note,
            },
        }

    def _settle(self) -> int | None:
        """Give free memory back and begin a new peak; return what is in use."""
        self._device.release()
        self._device.reset_peak()
        return self._device.held()

    def prepare_roof(self, request: dict[str, Any]) -> dict[str, Any]:
        """Prepare what a roof is measured by."""
        self._ready = None
        ready = _find(self._source)(request["dtype"], self._threads)
        ready.call()
        self._ready = ready
        described = {"work": ready.work, "size": ready.size, "method": ready.method, "affinity": _affinity()}
        return {"call_ms": self._device.time(ready.call), "described": described}

    def evict(self, request: dict[str, Any]) -> dict[str, Any]:
        """Fill the caches with something else."""
        self._device.evict()  # the first makes what the next ones read
        return {"evict_ms": self._device.time(self._device.evict), "evicted_bytes": self._device.evicted_bytes}

    def measure(self, request: dict[str, Any]) -> dict[str, Any]:
        """Time calls of what is prepared."""
        if self._ready is None:
            raise ValueError("nothing is prepared")
        call, device, clock = self._ready.call, self._device, time.perf_counter
        cold = request["cache"] == "cold"
        if request["warmup"] is not None:  # wakes threads and fills caches after the others' turns
            warm = clock() + request["warmup"]
            call()
            while clock() < warm:
                call()
        times: list[float] = []
        end = clock() + request["seconds"]
        while len(times) < request["min_calls"] or clock() < end:
            if cold:
                device.evict()
            times.append(device.time(call))
        return {"times_ms": times}


def _small(spec: DeformConv2dSpec, extents: Extents) -> Extents:
    """Return the extents of one small image that the layer takes, no larger than the given ones."""
    size = 8
    while True:
        small = Extents(min(extents.batch, 1), min(extents.height, size), min(extents.width, size))
        if size >= max(extents.height, extents.width):
            return small
        try:
            spec.output_size(small.height, small.width)
        except SpecError:  # smaller than the kernel
            size *= 2
        else:
            return small


def _make(spec: DeformConv2dSpec, extents: Extents) -> Tensors:
    if not isinstance(spec, DeformConv2dGradSpec):
        return make_tensors(spec, extents)
    arrays: dict[str, Any] = {"mask": None, "bias": None, **make_gradient_tensors(spec, extents)}
    return BackwardTensors(**arrays)


def _beyond(peak: int | None, before: int | None, known: int) -> int | None:
    return None if peak is None or before is None else max(peak - before - known, 0)


def _affinity() -> list[int] | None:
    """Return the processors that any thread of this process may run on."""
    if not hasattr(os, "sched_getaffinity"):
        return None
    found = set(os.sched_getaffinity(0))
    for thread in Path("/proc/self/task").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has just ended
            found |= os.sched_getaffinity(int(thread.name))
    return sorted(found)


def _find(source: str) -> Callable[..., Any]:
    """Return the function that ``module:function`` or ``path/to/file.py:function`` names."""
    place, _, name = source.rpartition(":")
    if not place.endswith(".py"):
        return getattr(importlib.import_module(place), name)
    found = importlib.util.spec_from_file_location(Path(place).stem, place)
    if found is None or found.loader is None:
        raise ImportError(f"{place} is not a Python file")
    module = importlib.util.module_from_spec(found)
    sys.modules[found.name] = module
    found.loader.exec_module(module)
    return getattr(module, name)


def _end_with_parent() -> None:
    """Ask Linux to kill this process when its parent ends, even while it is stopped."""
    if sys.platform == "linux":
        parent = os.getppid()
        with contextlib.suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # it ended in between
            sys.exit(1)


def main(arguments: list[str] | None = None) -> None:
    """Serve requests until told to quit; arguments are source, schedule (may be empty), threads and device."""
    _end_with_parent()
    source, schedule, threads, device = sys.argv[1:] if arguments is None else arguments
    # Libraries print to standard output; that goes to standard error, and answers have a way of their own.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    layers = Layers(source, schedule or None, int(threads), device)
    actions = {
        "prepare": layers.prepare,
        "prepare_roof": layers.prepare_roof,
        "evict": layers.evict,
        "measure": layers.measure,
        "versions": lambda request: {"versions": identify_versions()},
    }
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "quit":
            return
        answer: dict[str, Any]
        try:
            answer = {"ok": True, **actions[request["do"]](request)}
        except Unsupported as error:
            answer = {"ok": False, "reason": str(error)}
        except Exception as error:  # a provider may raise anything; the row says what
            message = " ".join(str(error).split())[:300] or "no message"
            answer = {"ok": False, "reason": f"{type(error).__name__}: {message}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
