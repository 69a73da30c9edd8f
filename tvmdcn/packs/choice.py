# SPDX-License-Identifier: Apache-2.0
"""Which of a layer's kernels, built for several targets, runs best on a machine."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, TypeVar

from tvmdcn.target import CpuTarget, TargetInfo, detect_target, host_features

__all__ = ["best_processor", "built_for", "runs_here"]


class _Built(Protocol):
    @property
    def target(self) -> TargetInfo: ...


Built = TypeVar("Built", bound=_Built)


def runs_here(target: TargetInfo) -> bool:
    """Return whether this machine can run code for a target."""
    if isinstance(target, CpuTarget):
        host = detect_target()
        # A system that does not say what it has is taken at its processor's name.
        return target.arch == host.arch and target.features <= (host_features() or host.features)
    return target.refusal() is None


def best_processor(built: Iterable[Built]) -> Built | None:
    """Return the kernel that suits this machine's processor best: its own, else of those that run the widest.

    Of equally wide vectors the target that uses most of what the machine has; the first, if there are several. None if
    there is no kernel for processors that runs here.
    """
    host = detect_target().identity()
    running = [kernel for kernel in built if isinstance(kernel.target, CpuTarget) and runs_here(kernel.target)]
    exact = (kernel for kernel in running if kernel.target.identity() == host)
    best = max(running, key=lambda kernel: (kernel.target.vector_bits, len(kernel.target.features)), default=None)
    return next(exact, best)


def built_for(built: Iterable[Built], target: TargetInfo) -> Built | None:
    """Return the kernel that was built for exactly this target."""
    return next((kernel for kernel in built if kernel.target.identity() == target.identity()), None)
