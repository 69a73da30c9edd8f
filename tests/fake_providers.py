# SPDX-License-Identifier: Apache-2.0
"""Providers for tests of the benchmark's protocol: cheap, and each wrong in one way of its own."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np

from tvmdcn.bench.provider import Prepared, Unsupported, copied_bytes
from tvmdcn.reference import reference
from tvmdcn.reference_grad import expected_gradients


def right(spec, extents, tensors, threads, schedule):
    result = reference(spec, tensors).astype(tensors.input.dtype)
    return Prepared(lambda: result, lambda value: value)


def floor(spec, extents, tensors, threads, schedule):
    return Prepared(lambda: None, None)


def wrong(spec, extents, tensors, threads, schedule):
    result = reference(spec, tensors)
    result.flat[-1] += 1
    return Prepared(lambda: result, lambda value: value)


def not_finite(spec, extents, tensors, threads, schedule):
    result = reference(spec, tensors)
    result.flat[0] = np.nan
    return Prepared(lambda: result, lambda value: value)


def unsupported(spec, extents, tensors, threads, schedule):
    raise Unsupported("it cannot do <this> & that")


def raises(spec, extents, tensors, threads, schedule):
    raise ZeroDivisionError("divided\nby nothing")


def killed(spec, extents, tensors, threads, schedule):
    os.kill(os.getpid(), signal.SIGKILL)


def exits(spec, extents, tensors, threads, schedule):
    print("a last word", file=sys.stderr)
    os._exit(3)


def dies_when_measured(spec, extents, tensors, threads, schedule):
    prepared = right(spec, extents, tensors, threads, schedule)
    calls = iter(range(3))
    return Prepared(lambda: prepared.call() if next(calls, None) is not None else os._exit(4), prepared.output)


def hangs(spec, extents, tensors, threads, schedule):
    time.sleep(3600)


def slow(spec, extents, tensors, threads, schedule):
    prepared = right(spec, extents, tensors, threads, schedule)

    def call():
        time.sleep(0.05)
        return prepared.call()

    return Prepared(call, prepared.output)


def noisy(spec, extents, tensors, threads, schedule):
    """Print to standard output, where answers travel."""
    print("hello from a library")
    os.write(1, b"and from its C code\n")
    return right(spec, extents, tensors, threads, schedule)


def environment(spec, extents, tensors, threads, schedule):
    names = ("OMP_NUM_THREADS", "TVMDCN_NUM_THREADS")
    raise Unsupported(f"{threads} {schedule} " + " ".join(f"{name}={os.environ[name]}" for name in names))


def ticking(spec, extents, tensors, threads, schedule):
    """Write the time to the file named by `schedule` every millisecond, as a spinning thread pool would."""
    file = Path(schedule).open("a", buffering=1)  # noqa: SIM115 - open as long as the process

    def tick():
        while True:
            file.write(f"{time.monotonic()}\n")
            time.sleep(0.001)

    threading.Thread(target=tick, daemon=True).start()
    return right(spec, extents, tensors, threads, schedule)


def gradients(spec, extents, tensors, threads, schedule):
    given = {name: array for name, array in vars(tensors).items() if array is not None}
    result = {name: array.astype(tensors.input.dtype) for name, array in expected_gradients(spec, given).items()}
    return Prepared(lambda: result, lambda value: value)


def wrong_gradients(spec, extents, tensors, threads, schedule):
    """Give one gradient, small beside the others, that is off by half of its largest value."""
    prepared = gradients(spec, extents, tensors, threads, schedule)
    bias = prepared.call()["grad_bias"]
    bias[-1] += np.abs(bias).max() / 2
    return prepared


def without_mask(spec, extents, tensors, threads, schedule):
    """Leave out the mask's gradient."""
    prepared = gradients(spec, extents, tensors, threads, schedule)
    return Prepared(prepared.call, lambda value: {name: value[name] for name in value if name != "grad_mask"})


def without_gradients(spec, extents, tensors, threads, schedule):
    raise Unsupported("it has no gradients of <this>")


MEGABYTES = 1 << 20


def hungry(spec, extents, tensors, threads, schedule):
    """Use as many MiB as `schedule` says while it is called, and give them back."""
    prepared = right(spec, extents, tensors, threads, schedule)

    def call():
        used = np.ones(int(schedule) * MEGABYTES, np.uint8)
        return prepared.call() if used.all() else None

    return Prepared(call, prepared.output)


def greedy(spec, extents, tensors, threads, schedule):
    """Use as many MiB as `schedule` says while it is prepared, and keep half of them."""
    prepared = right(spec, extents, tensors, threads, schedule)
    kept, given_back = (np.ones(int(schedule) * MEGABYTES // 2, np.uint8) for _ in range(2))
    return Prepared(lambda: prepared.call() if kept[-1] else None, prepared.output) if given_back[-1] else None


def copying(spec, extents, tensors, threads, schedule):
    """Hold the image a second time, and say so; give the result anew at each call."""
    result = reference(spec, tensors).astype(tensors.input.dtype)
    image = tensors.input.copy()
    held = copied_bytes(tensors, (image, tensors.offset))
    return Prepared(lambda: result.copy() if image.size else None, lambda value: value, held)


def named(spec, extents, tensors, threads, schedule):
    """Say what a row should hold: an artifact and a note."""
    prepared = right(spec, extents, tensors, threads, schedule)
    return Prepared(prepared.call, prepared.output, artifact="an-artifact", note="it sees <this> its own way")


def escaping(spec, extents, tensors, threads, schedule):
    """Let a thread run where the process was not to."""
    prepared = right(spec, extents, tensors, threads, schedule)
    everywhere = range(os.cpu_count())

    def run():
        os.sched_setaffinity(0, everywhere)
        time.sleep(3600)

    threading.Thread(target=run, daemon=True).start()
    return prepared


def patient(spec, extents, tensors, threads, schedule):
    """Take 20 ms."""
    prepared = right(spec, extents, tensors, threads, schedule)

    def call():
        time.sleep(0.02)
        return prepared.call()

    return Prepared(call, prepared.output)
