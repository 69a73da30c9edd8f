# SPDX-License-Identifier: Apache-2.0
"""Kernels on torch's own threads."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from handmade import run

pytest.importorskip("tvm")
torch = pytest.importorskip("torch")

from tvmdcn import openmp  # noqa: E402
from tvmdcn.spec import DeformConv2dSpec  # noqa: E402

SPEC = DeformConv2dSpec(16, 16, padding=1, mask=False)
START = """
    import os, sys, time
    import numpy as np
    import tvmdcn
    from tvmdcn.tensors import make_tensors
    spec = tvmdcn.DeformConv2dSpec(16, 16, padding=1, mask=False)
    tensors = make_tensors(spec, tvmdcn.Extents(1, 64, 64))

    def result(kernel):
        return np.asarray(kernel(tensors.input, tensors.offset, tensors.weight, tensors.bias))
"""
pytestmark = [
    pytest.mark.skipif(openmp._loaded_openmp() is None, reason="torch runs on no OpenMP that we know, here"),
    pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two processors"),
]


@pytest.fixture(scope="module", autouse=True)
def built(session_cache_dir: Path) -> None:
    from tvmdcn.builder import build

    build(SPEC, cache_dir=session_cache_dir)


def test_any_number_of_threads_gives_the_same_bits():
    code = """
    import threading, torch
    kernels = [tvmdcn.load(spec, threads=count) for count in (1, 2, 3, 1)]
    assert all(kernel._function.team is kernels[0]._function.team is not None for kernel in kernels)
    first = result(kernels[0])
    threads = lambda: len(os.listdir("/proc/self/task"))
    counts = [threads()]
    for kernel in kernels:
        assert np.array_equal(result(kernel), first)
        counts.append(threads())
    found = []
    def work(count):
        kernel = tvmdcn.load(spec, threads=count)
        for _ in range(20):
            found.append(np.array_equal(result(kernel), first))
    workers = [threading.Thread(target=work, args=(count,)) for count in (1, 2, 3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    print(all(found), len(found), [count - counts[0] for count in counts], torch.get_num_threads())
    """
    # As many threads more as the team has beside the caller.
    assert run(START, code, OMP_NUM_THREADS="2").stdout.split("\n")[0] == "True 60 [0, 0, 1, 2, 2] 2"


def test_kernel_without_parallel_loops():
    code = """
    import torch
    naive, tuned = tvmdcn.load(spec, schedule="naive", threads=2), tvmdcn.load(spec, threads=2)
    assert np.allclose(result(naive), result(tuned), atol=1e-5)
    print(naive._function.team, tuned._function.team is not None)
    """
    assert run(START, code).stdout.strip() == "None True"


def test_torch_keeps_its_number_of_threads():
    code = """
    import torch
    torch.set_num_threads(2)
    kernel = tvmdcn.load(spec, threads=1)
    result(kernel)
    assert torch.get_num_threads() == 2
    assert torch.ones(1 << 20).sum() == 1 << 20
    torch.set_num_threads(1)
    result(tvmdcn.load(spec, threads=2))
    print(torch.get_num_threads())
    """
    assert run(START, code).stdout.strip() == "1"


def test_forked_process_works_alone():
    code = """
    import logging, torch
    torch.set_num_threads(2)
    kernel = tvmdcn.load(spec)
    expected = result(kernel)
    logging.basicConfig(stream=sys.stdout, format="%(message)s")
    child = os.fork()
    if child == 0:
        same = np.array_equal(result(kernel), expected)
        print(same, len(os.listdir("/proc/self/task")), flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert np.array_equal(result(kernel), expected)
    """
    warning, told = run(START, code).stdout.splitlines()
    assert "calls from the forked thread use one" in warning
    assert told == "True 1"


@pytest.mark.parametrize("case", ["the setting", "no torch", "torch later", "forked by multiprocessing"])
def test_where_kernels_stay_with_the_pool_of_tvm(case):
    first = "" if case in ("no torch", "torch later") else "import torch"
    code = f"""
    {first}
    def look():
        kernel = tvmdcn.load(spec, threads=2)
        {"import torch" if case == "torch later" else ""}
        result(kernel)
        print(kernel._function.team, flush=True)
        return 0
    """
    if case == "forked by multiprocessing":
        code += """
    import multiprocessing
    child = multiprocessing.get_context("fork").Process(target=look)
    child.start()
    child.join()
    """
    else:
        code += "\n    look()\n"
    setting = {"TVMDCN_THREAD_POOL": "tvm"} if case == "the setting" else {}
    assert run(START, code, **setting).stdout.strip() == "None"


def test_fresh_process_of_multiprocessing_has_a_team(monkeypatch):
    import multiprocessing.process

    monkeypatch.setattr(multiprocessing.process, "parent_process", lambda: object())
    assert openmp._was_forked()
    monkeypatch.setattr(sys, "orig_argv", [*sys.orig_argv, "--multiprocessing-fork"])
    assert not openmp._was_forked()


@pytest.mark.parametrize(
    ("lines", "found"),
    [
        (["{torch}/lib/libgomp-a34b3233.so.1", "/usr/lib/libgomp.so.1.0.0"], "{torch}/lib/libgomp-a34b3233.so.1"),
        (["/opt/lib/libiomp5.so"], "/opt/lib/libiomp5.so"),
        (["/opt/lib/libiomp5.so", "/usr/lib/libgomp.so.1"], None),
        (["/opt/lib/libomptarget.so", "/opt/lib/libomp.so.txt"], None),
    ],
)
def test_which_library_is_torchs(lines, found, monkeypatch):
    folder = str(Path(torch.__file__).parent)
    maps = "".join(f"7f00-7f01 r-xp 00000000 08:02 17   {line.format(torch=folder)}\n" for line in lines)
    opened = []

    class Library:
        GOMP_parallel = omp_get_thread_num = omp_get_num_threads = None

        def __init__(self, path, mode):
            opened.append(path)

    monkeypatch.setattr(openmp.Path, "read_text", lambda self, **options: maps)
    monkeypatch.setattr(openmp.ctypes, "CDLL", Library)
    library = openmp._loaded_openmp()
    assert (library is None) == (found is None)
    assert opened == ([] if found is None else [found.format(torch=folder)])
