# SPDX-License-Identifier: Apache-2.0
"""The process that one provider runs in: JSON lines in on standard input, JSON lines out on standard output.

Requests, each answered by one line with ``ok``, and with ``reason`` where that is false:

``{"do": "prepare", "spec", "extents", "tensors": FOLDER, "output": FILE or null}``
    Prepare a layer, or its gradients, and call it twice; answers ``call_ms``, the time of the second call, and
    ``compared``, whether the results were written to FILE (``.npz``, float64, by the names of the outputs).
``{"do": "measure", "seconds", "min_calls", "warmup"}``
    Time calls until both limits are reached, after untimed calls for ``warmup`` seconds (null: none); answers
    ``times_ms``.
``{"do": "versions"}``
    Answer ``versions``, of this process's environment.
``{"do": "quit"}``
    End without an answer. So does the end of standard input.

By hand: ``python -m tvmdcn.bench.worker tvmdcn.bench.providers:prepare_openvino '' 1``.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.util
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tvmdcn.bench.measurement import identify_versions
from tvmdcn.bench.providers import BackwardTensors, Prepared, Unsupported
from tvmdcn.spec import DeformConv2dGradSpec, DeformConv2dSpec, Extents, spec_from_json
from tvmdcn.tensors import Tensors, numpy_dtype

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

    def __init__(self, source: str, schedule: str | None, threads: int) -> None:
        self._source, self._schedule, self._threads = source, schedule, threads
        self._layer: Prepared | None = None

    def prepare(self, request: dict[str, Any]) -> dict[str, Any]:
        """Prepare the layer of a request, compute its output, and time a call after that."""
        self._layer = None  # the memory of the last problem is free before the next needs it
        spec = spec_from_json(request["spec"])
        extents = Extents(**request["extents"])
        tensors = load_tensors(Path(request["tensors"]), spec)
        layer = _find(self._source)(spec, extents, tensors, self._threads, self._schedule)
        result = layer.call()
        if layer.output is not None and request["output"] is not None:
            output = layer.output(result)
            named = output if isinstance(output, Mapping) else {"output": output}
            # float64 holds every dtype exactly, and NumPy's files know it.
            arrays: dict[str, Any] = {name: np.asarray(array, np.float64) for name, array in named.items()}
            np.savez(request["output"], **arrays)
        del result
        start = time.perf_counter()
        layer.call()
        elapsed = time.perf_counter() - start
        self._layer = layer
        return {"call_ms": elapsed * 1e3, "compared": layer.output is not None}

    def measure(self, request: dict[str, Any]) -> dict[str, Any]:
        """Time calls of the prepared layer."""
        if self._layer is None:
            raise ValueError("nothing is prepared")
        call, clock = self._layer.call, time.perf_counter
        if request["warmup"] is not None:  # wakes threads and fills caches after the others' turns
            ready = clock() + request["warmup"]
            call()
            while clock() < ready:
                call()
        times: list[float] = []
        begin = start = clock()
        while len(times) < request["min_calls"] or start - begin < request["seconds"]:
            call()
            end = clock()
            times.append((end - start) * 1e3)
            start = end
        return {"times_ms": times}


def _find(source: str) -> Callable[..., Prepared]:
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
    """Serve requests until told to quit; arguments are source, schedule (may be empty) and threads."""
    _end_with_parent()
    source, schedule, threads = sys.argv[1:] if arguments is None else arguments
    # Libraries print to standard output; that goes to standard error, and answers have a way of their own.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    layers = Layers(source, schedule or None, int(threads))
    actions = {
        "prepare": layers.prepare,
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
