# SPDX-License-Identifier: Apache-2.0
"""Arrays of CuPy and JAX: exchanged by DLPack, without a copy, on a GPU with torch, which brings streams and memory.

DLPack's exchange orders the streams: the arrays are ready before the kernel reads them, and the result before its
framework does. Nothing waits on the host.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from tvmdcn.errors import SpecTypeError

__all__ = ["call_with", "framework_of"]

_DL_CUDA = 2
_FRAMEWORKS = {"cupy": "cupy", "jax": "jax", "jaxlib": "jax"}


def framework_of(array: Any) -> str | None:
    """Return "cupy" or "jax" for an array of theirs, None for anything else."""
    return _FRAMEWORKS.get(type(array).__module__.partition(".")[0]) if hasattr(array, "__dlpack__") else None


def call_with(framework: str, arrays: dict[str, Any], call: Callable[..., Any]) -> Any:
    """Call a function with arrays of a framework, and return its result as one.

    Parameters
    ----------
    framework : str
        Of :func:`framework_of`.
    arrays : dict
        The arguments that are arrays, by name; None stays None.
    call : callable
        ``call(**arrays)`` with torch tensors (on a GPU) or NumPy arrays.

    Raises
    ------
    SpecTypeError
        If an array is another framework's, is traced, or is on a GPU where torch is not installed.
    """
    given = {}
    devices = set()
    for name, array in arrays.items():
        if array is None:
            continue
        if framework_of(array) != framework:
            raise SpecTypeError(f"{name} must be an array of {framework}, as input is, got {type(array).__name__}.")
        tracer = getattr(getattr(sys.modules.get("jax"), "core", None), "Tracer", ())
        if isinstance(array, tracer):
            raise SpecTypeError(f"{name} is traced by jax: call outside of jax.jit and of jax's transformations.")
        devices.add(int(array.__dlpack_device__()[0]) == _DL_CUDA)
        given[name] = array
    if devices == {True}:
        return _on_gpu(framework, given, arrays, call)
    if devices != {False}:
        raise SpecTypeError("some arrays are on a GPU, and others are not. Bring all to one device.")
    found = call(**{name: None if array is None else np.asarray(array) for name, array in arrays.items()})
    module = sys.modules[framework]
    return (module.numpy if framework == "jax" else module).asarray(found)


def _on_gpu(framework: str, given: dict[str, Any], arrays: dict[str, Any], call: Callable[..., Any]) -> Any:
    try:
        import torch
    except ImportError as error:
        raise SpecTypeError(
            f"arrays of {framework} on a GPU go through torch, which is not installed: pip install torch."
        ) from error
    tensors = {name: torch.from_dlpack(array) for name, array in given.items()}
    found = call(**{name: tensors.get(name) for name in arrays})
    module = sys.modules[framework]
    return module.from_dlpack(found) if framework == "cupy" else module.numpy.from_dlpack(found)
