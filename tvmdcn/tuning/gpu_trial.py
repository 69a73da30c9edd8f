# SPDX-License-Identifier: Apache-2.0
"""Measuring on a GPU: the gate of correctness, then times by the GPU's own clock, with a cold second-level cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

__all__ = ["Stopwatch", "measure_kernels", "on_host"]

_FEWEST_CALLS, _MOST_CALLS, _BURST = 5, 40, 0.05  # seconds of a candidate's turn
# Filling this much takes longer than a call takes to be launched, so that the GPU never waits for the host.
_LEAST_FLUSH = 256 << 20


class Stopwatch:
    """Times calls on the current GPU by its events, each with the second-level cache full of something else.

    A call is captured as a graph, so that the time is the GPU's and not the host's; one that cannot be captured is
    launched.
    """

    def __init__(self) -> None:
        import torch

        self._torch = torch
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        cache = int(getattr(properties, "L2_cache_size", 0) or 64 << 20)
        self._other = torch.empty(max(4 * cache, _LEAST_FLUSH), dtype=torch.int8, device="cuda")

    def prepared(self, call: Callable[[], Any]) -> Callable[[], Any]:
        """Return a call's graph."""
        torch = self._torch
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            call()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                call()
        except RuntimeError:
            torch.cuda.synchronize()
            return call
        replay: Callable[[], Any] = graph.replay
        return replay

    def times(self, call: Callable[[], Any], count: int) -> list[float]:
        """Return the seconds that each of `count` calls takes."""
        torch = self._torch
        events = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(count)]
        for first, last in events:
            self._other.fill_(1)
            first.record()
            call()
            last.record()
        torch.cuda.synchronize()
        return [first.elapsed_time(last) / 1e3 for first, last in events]


def on_host(outputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return outputs on a GPU as arrays, of the precision that error is computed in."""
    return {name: tensor.double().cpu().numpy() for name, tensor in outputs.items()}


def measure_kernels(
    kernels: Sequence[Any],
    tensors: Mapping[str, np.ndarray],
    error_of: Callable[[Mapping[str, np.ndarray]], float],
    rounds: int,
) -> list[tuple[list[float], float]]:
    """Check and measure kernels on the current GPU, taking turns for `rounds`.

    Parameters
    ----------
    kernels : sequence of CompiledKernel
    tensors : mapping of str to ndarray
        The arguments.
    error_of : callable
        Returns the error of outputs.
    rounds : int

    Returns
    -------
    list of (times in seconds, error)
    """
    watch = Stopwatch()
    calls, results = [], []
    for kernel in kernels:
        call = kernel.bind(tensors)
        results.append((list[float](), error_of(on_host(call()))))
        calls.append(watch.prepared(call))
    for turn in range(rounds):
        # Rotated, and reversed every other time: no candidate always runs behind the same neighbour.
        order = [(turn + i) % len(calls) for i in range(len(calls))][:: 1 if turn % 2 == 0 else -1]
        for i in order:
            (once,) = watch.times(calls[i], 1)
            wanted = min(max(int(_BURST / max(once, 1e-9)), _FEWEST_CALLS), _MOST_CALLS)
            results[i][0].extend(watch.times(calls[i], wanted))
    return results
