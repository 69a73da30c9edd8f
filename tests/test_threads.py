# SPDX-License-Identifier: Apache-2.0
"""How many threads a call uses, and calls from many of them."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

import handmade
import numpy as np
import pytest
from handmade import SPEC, call, kernel_of, run

from tvmdcn import threads as thread_pool
from tvmdcn.spec import Extents
from tvmdcn.tensors import make_tensors


@pytest.fixture(autouse=True)
def builder(monkeypatch):
    handmade.install(monkeypatch)


BUSY = """
    import os, time
    import numpy as np
    handmade_builder()
    import tvmdcn
    from tvmdcn.tensors import make_tensors
    from tvmdcn import threads
    spec = tvmdcn.DeformConv2dSpec(8, 8, (3, 3), padding=1)
    tensors = make_tensors(spec, tvmdcn.Extents(1, 64, 64))

    def ticks():
        found = {}
        for task in os.listdir("/proc/self/task"):
            fields = open(f"/proc/self/task/{task}/stat").read().rsplit(")", 1)[1].split()
            found[int(task)] = int(fields[11]) + int(fields[12])
        return found

    def busy(kernel, seconds=0.4):
        '''The number of threads that worked: those with a third of the work of the busiest.'''
        time.sleep(0.3)  # idle workers of the last calls go to sleep
        packed = kernel.pack(tensors.weight)
        before, end = ticks(), time.monotonic() + seconds
        while time.monotonic() < end:
            kernel(tensors.input, tensors.offset, packed, tensors.bias, tensors.mask)
        spent = [after - before.get(task, 0) for task, after in ticks().items()]
        return sum(time > max(spent) / 3 for time in spent)
"""
needs_proc = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's /proc")
needs_two = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two processors")


@needs_proc
@needs_two
def test_number_of_threads_is_exact():
    code = "print([busy(tvmdcn.load(spec, threads=n)) for n in (1, 2, 1, 2)])"
    assert run(BUSY, code).stdout.split("\n")[0] == "[1, 2, 1, 2]"


@needs_proc
@needs_two
def test_number_of_threads_follows_the_setting():
    code = "print(busy(tvmdcn.load(spec)))"
    assert run(BUSY, code, TVMDCN_NUM_THREADS="1").stdout.strip() == "1"
    assert run(BUSY, code, TVMDCN_NUM_THREADS="2").stdout.strip() == "2"


@needs_proc
@needs_two
def test_number_of_threads_follows_torch():
    pytest.importorskip("torch")
    code = """
    import torch
    kernel = tvmdcn.load(spec)
    counts = []
    for n in (2, 1, 2):
        torch.set_num_threads(n)
        counts.append(busy(kernel))
    print(counts)
    """
    assert run(BUSY, code).stdout.strip() == "[2, 1, 2]"


@needs_proc
@needs_two
def test_calls_leave_the_processors_of_the_caller_alone():
    code = """
    before = os.sched_getaffinity(0)
    busy(tvmdcn.load(spec, threads=2))
    assert os.sched_getaffinity(0) == before
    one = {min(before)}
    def pinned():
        os.sched_setaffinity(0, one)
        assert threads.thread_count() == 1
        busy(tvmdcn.load(spec, threads=2))
        assert os.sched_getaffinity(0) == one
    import threading
    thread = threading.Thread(target=pinned)
    thread.start()
    thread.join()
    print("done")
    """
    assert run(BUSY, code).stdout.strip() == "done"


def test_a_pool_that_cannot_grow_says_so():
    code = """
    import logging
    logging.basicConfig()
    few, many = tvmdcn.load(spec, threads=2), tvmdcn.load(spec, threads=len(os.sched_getaffinity(0)) + 3)
    arguments = tensors.input, tensors.offset, tensors.weight, tensors.bias, tensors.mask
    results = [kernel(*arguments) for kernel in (few, many)]
    assert np.array_equal(*results)
    """
    assert "threads were asked for, but the pool of this thread was made with" in run(BUSY, code).stderr


def test_number_of_threads_where_nobody_says(monkeypatch):
    monkeypatch.delenv("TVMDCN_NUM_THREADS", raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)
    assert 1 <= thread_pool.thread_count() <= len(os.sched_getaffinity(0))
    monkeypatch.setenv("TVMDCN_NUM_THREADS", "7")
    assert thread_pool.thread_count() == 7


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_calls_after_a_fork_return():
    code = """
    import logging, multiprocessing, threading
    logging.basicConfig()
    kernel = tvmdcn.load(spec, threads=2)
    arguments = tensors.input, tensors.offset, tensors.weight, tensors.bias, tensors.mask
    expected = kernel(*arguments)
    def child():
        assert np.array_equal(kernel(*arguments), expected)
        thread = threading.Thread(target=lambda: [kernel(*arguments) for _ in range(10)])
        thread.start()
        thread.join()
    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(30)
    print(process.exitcode)
    assert np.array_equal(kernel(*arguments), expected)
    """
    done = run(BUSY, code)
    assert done.stdout.strip() == "0"
    assert "this process was forked by a thread that had used several threads" in done.stderr


def test_threads_call_one_kernel_at_once():
    kernel = kernel_of(threads=2)
    problems = [make_tensors(SPEC, Extents(1 + n % 3, 5 + n % 4, 4 + n % 5), seed=n) for n in range(24)]
    expected = [call(kernel, tensors) for tensors in problems]
    wrong = []

    def work(first: int) -> None:
        for turn in range(200):
            index = (first + turn) % len(problems)
            if not np.array_equal(call(kernel, problems[index]), expected[index]):
                wrong.append(index)

    workers = [threading.Thread(target=work, args=(5 * n,)) for n in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []
