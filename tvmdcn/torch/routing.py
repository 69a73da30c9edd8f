# SPDX-License-Identifier: Apache-2.0
"""Calls of torchvision's function in code that one cannot edit, led to tvmdcn's."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator
from typing import Any

from tvmdcn.api import deform_conv2d
from tvmdcn.errors import MissingExtra
from tvmdcn.tuning.models import names_of

__all__ = ["route_torchvision"]


class _Route:
    """Torchvision's function and what stands in its place, while any thread is inside the context."""

    lock = threading.Lock()
    depth = 0
    original: Any = None
    routed: Any = None


@contextlib.contextmanager
def route_torchvision() -> Iterator[None]:
    """Let ``torchvision.ops.deform_conv2d`` be :func:`tvmdcn.deform_conv2d`, for code that one cannot edit.

    Inside the ``with`` block, or inside a function that this decorates, every name of an imported module that is
    torchvision's function is ours: in ``torchvision.ops``, in ``torchvision.ops.deform_conv`` (where the layer
    ``torchvision.ops.DeformConv2d`` finds it), and in modules with ``from torchvision.ops import deform_conv2d``.
    Afterwards, and if the block raises, they are torchvision's again. Blocks may be nested.

    Names are the process's, not a thread's: other threads' calls go to ours too, from the first block that is
    entered in any thread to the last one that is left.

    Not routed are references that are no names of a module (a default argument, an attribute of a class, a
    ``functools.partial``), and calls of the operator ``torch.ops.torchvision.deform_conv2d`` by itself, as models
    make that were scripted, traced or exported before: they look up no name. What is compiled, traced or exported
    inside calls ``torch.ops.tvmdcn.deform_conv2d``, and what is traced or exported does so ever after.
    ``torch.jit.script`` fails inside, as it cannot read ours.

    Calls that ours refuses, such as those with tensors on other devices than CPUs and NVIDIA GPUs, raise; they are
    not handed to torchvision.

    Raises
    ------
    MissingExtra
        If torchvision cannot be imported.
    """
    _enter()
    try:
        yield
    finally:
        _leave()


def _enter() -> None:
    with _Route.lock:
        if not _Route.depth:
            _Route.original = _torchvisions_function()
            _Route.routed = _routed(_Route.original)
            _rebind(_Route.original, _Route.routed)
        _Route.depth += 1


def _leave() -> None:
    with _Route.lock:
        _Route.depth -= 1
        if not _Route.depth:
            # Also names that were bound in the meantime, by modules imported inside.
            _rebind(_Route.routed, _Route.original)
            _Route.original = _Route.routed = None


def _rebind(old: Any, new: Any) -> None:
    for module, name, _ in names_of(old):
        setattr(module, name, new)


def _torchvisions_function() -> Any:
    try:
        from torchvision.ops import deform_conv
    except (ImportError, OSError, RuntimeError) as error:  # RuntimeError: a build for another torch
        raise MissingExtra(
            f"route_torchvision needs torchvision, which cannot be imported ({type(error).__name__}: {error}). "
            "Install the torchvision that belongs to this torch; without it there are no calls to route, and "
            "tvmdcn.deform_conv2d takes the same arguments.",
            name="torchvision",
        ) from error
    return deform_conv.deform_conv2d


def _routed(original: Any) -> Any:
    @functools.wraps(original)
    def routed(
        input: Any,
        offset: Any,
        weight: Any,
        bias: Any = None,
        stride: Any = (1, 1),
        padding: Any = (0, 0),
        dilation: Any = (1, 1),
        mask: Any = None,
    ) -> Any:
        return deform_conv2d(input, offset, weight, bias, stride, padding, dilation, mask)

    return routed
