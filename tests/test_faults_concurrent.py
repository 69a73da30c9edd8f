# SPDX-License-Identifier: Apache-2.0
"""Many at once: processes that build, threads that call, children that a fork made of a process with kernels."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import handmade
import numpy as np
import pytest
from handmade import SPEC, kernel_of, run

from tvmdcn.grad_kernel import GradKernel
from tvmdcn.kernel import Kernel
from tvmdcn.problems import make_tensors
from tvmdcn.reference import reference
from tvmdcn.reference_grad import expected_gradients
from tvmdcn.runtime import open_kernel
from tvmdcn.spec import DeformConv2dGradSpec, DeformConv2dSpec, Extents
from tvmdcn.tensors import make_gradient_tensors

PLAIN = DeformConv2dSpec(4, 4, 1)


# --- processes ----------------------------------------------------------------------------------------------

_BUILD = """
import os, sys
sys.path[:0] = [{tests!r}, {root!r}]
import numpy as np
import tvmdcn
from tvmdcn.tensors import make_tensors
spec = tvmdcn.DeformConv2dSpec(4, 4, 1)
tensors = make_tensors(spec, tvmdcn.Extents(2, 9, 10))
ready, go = {folder!r} + "/ready", {folder!r} + "/go"
os.mkdir(ready + str(os.getpid()))
import time
while not os.path.exists(go):
    time.sleep(0.001)
kernel = tvmdcn.load(spec, schedule="naive")
result = kernel(tensors.input, tensors.offset, tensors.weight, tensors.bias, tensors.mask)
print(float(np.abs(result).sum()), "tvm" in sys.modules)
"""


def test_eight_processes_build_one_kernel_once(cache_dir, tmp_path):
    """With the compiler itself: seven wait without having imported it, and load what the eighth has built."""
    code = _BUILD.format(tests=str(handmade.ROOT / "tests"), root=str(handmade.ROOT), folder=str(tmp_path))
    workers = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(8)
    ]
    while len(list(tmp_path.glob("ready*"))) < 8:
        assert all(worker.poll() is None for worker in workers)
    (tmp_path / "go").touch()
    found = [worker.communicate(timeout=300) for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * 8, found
    results = [output.split() for output, _ in found]
    assert len({number for number, _ in results}) == 1
    assert sorted(compiled for _, compiled in results) == ["False"] * 7 + ["True"], "one has compiled"
    folders = [path for path in cache_dir.rglob("*") if path.is_dir() and path.name.startswith("deform")]
    assert len(folders) == 1


def test_eight_processes_build_eight_kernels(cache_dir):
    """They do not wait for one another."""
    code = (
        "import handmade, sys; print(handmade.build(handmade.variant(out_channels=2 * int(sys.argv[1]))).load().path)"
    )
    prelude = f"import sys; sys.path[:0] = [{str(handmade.ROOT / 'tests')!r}, {str(handmade.ROOT)!r}]\n"
    workers = [
        subprocess.Popen([sys.executable, "-c", prelude + code, str(number)], stdout=subprocess.PIPE, text=True)
        for number in range(1, 9)
    ]
    paths = {worker.communicate(timeout=120)[0].strip() for worker in workers}
    assert len(paths) == 8
    assert all(Path(path).is_file() for path in paths)


# --- threads ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    """Generated kernels of several kinds, with arguments of several sizes and the right results."""
    from tvmdcn.builder import build

    root = tmp_path_factory.mktemp("kernels")
    root.chmod(0o700)
    found = []
    specs = (
        DeformConv2dSpec(6, 8, 3, padding=1, offset_groups=2),
        DeformConv2dSpec(4, 6, (3, 2), (2, 1), (1, 0), mask=False, dtype="float64"),
        DeformConv2dGradSpec.of(DeformConv2dSpec(4, 4, 1)),
    )
    for spec in specs:
        kernel = open_kernel(build(spec, schedule="default", cache_dir=root), 2)
        for seed, extents in enumerate((Extents(1, 9, 8), Extents(2, 14, 11), Extents(3, 5, 6))):
            found.append((kernel, *_problem(kernel, extents, seed)))
    return found


def _problem(kernel: Kernel | GradKernel, extents: Extents, seed: int):
    spec = kernel.spec
    if isinstance(spec, DeformConv2dGradSpec):
        arguments = make_gradient_tensors(spec, extents, seed)
        return arguments, expected_gradients(spec, arguments)
    tensors = make_tensors(spec, extents, seed)
    return {n: a for n, a in vars(tensors).items() if a is not None}, {"output": reference(spec, tensors)}


def use(kernel, arguments) -> dict[str, np.ndarray]:
    if isinstance(kernel, GradKernel):
        names = ("grad_output", "input", "offset", "weight", "mask")
        found = kernel(*(arguments.get(name) for name in names))
        return {f"grad_{name}": value for name, value in found._asdict().items() if value is not None}
    return {"output": kernel(*(arguments.get(n) for n in ("input", "offset", "weight", "bias", "mask")))}


def is_right(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> bool:
    return set(found) == set(expected) and all(
        np.abs(found[name].astype("float64") - right).max() <= 2e-5 * max(1e-3, np.abs(right).max())
        for name, right in expected.items()
    )


def test_sixteen_threads_and_many_kernels(kernels):
    for kernel, arguments, expected in kernels:
        assert is_right(use(kernel, arguments), expected)
    wrong, done, barrier = [], [], threading.Barrier(16)

    def work(first: int) -> None:
        barrier.wait()
        for turn in range(60):
            # Some threads keep to one kernel, others change at each call.
            place = first % len(kernels) if first < 4 else (first + turn) % len(kernels)
            kernel, arguments, expected = kernels[place]
            if not is_right(use(kernel, arguments), expected):
                wrong.append((first, turn))
        done.append(first)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert sorted(done) == list(range(16))
    assert wrong == []


def tasks() -> int:
    """Return the number of threads of this process, those that Python does not know included."""
    return len(os.listdir("/proc/self/task"))


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's /proc")
def test_sixteen_threads_that_come_and_go(kernels):
    """Each has a pool of its own, which goes with it."""
    before = tasks()
    wrong = []

    def work(number: int) -> None:
        kernel, arguments, expected = kernels[number % len(kernels)]
        if not is_right(use(kernel, arguments), expected):
            wrong.append(number)

    for _ in range(8):
        threads = [threading.Thread(target=work, args=(number,)) for number in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []
    # A thread's pool ends after what Python knows of the thread.
    until = time.monotonic() + 20
    while tasks() > before and time.monotonic() < until:
        time.sleep(0.01)
    assert tasks() <= before


def test_weights_that_change_under_sixteen_threads(cache_dir, monkeypatch):
    """One kernel, one torch weight per thread, all of one address sooner or later."""
    torch = pytest.importorskip("torch")
    handmade.install(monkeypatch)
    kernel, tensors = kernel_of(threads=1), make_tensors(SPEC, Extents(1, 5, 4))
    image, offset, mask = (torch.from_numpy(a) for a in (tensors.input, tensors.offset, tensors.mask))
    wrong = []

    def work(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(40):
            weight = torch.randn(SPEC.weight_shape, generator=generator)
            expected = kernel(tensors.input, tensors.offset, weight.numpy().copy(), None, tensors.mask)
            if not np.array_equal(kernel(image, offset, weight, None, mask).numpy(), expected):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# --- forks --------------------------------------------------------------------------------------------------

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

_LOADED = """
import logging, multiprocessing, os, signal, threading, time
logging.basicConfig()
handmade_builder()
import numpy as np
import tvmdcn
from tvmdcn.tensors import make_tensors
spec = tvmdcn.DeformConv2dSpec(8, 8, (3, 3), padding=1)
tensors = make_tensors(spec, tvmdcn.Extents(1, 32, 32))
arguments = tensors.input, tensors.offset, tensors.weight, tensors.bias, tensors.mask

def end_of(child):
    '''Its exit status, or minus the signal that ended it; None if it has not ended in 20 s.'''
    until = time.monotonic() + 20
    while time.monotonic() < until:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)

def forked(work, leave):
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException as error:
            print(repr(error), flush=True)
            os._exit(1)
        leave(7)
    return end_of(child)
"""


@needs_fork
def test_child_of_a_process_that_has_only_loaded():
    """Nothing has been called: the child does whatever it likes, on all threads."""
    code = """
    kernel = tvmdcn.load(spec, threads=2)
    def work():
        assert np.isfinite(kernel(*arguments)).all()
        assert len(os.listdir("/proc/self/task")) == 2
    print([forked(work, sys.exit) for _ in range(5)])
    """
    assert run(textwrap.dedent(_LOADED), textwrap.dedent(code)).stdout.strip() == "[7, 7, 7, 7, 7]"


@needs_fork
@pytest.mark.parametrize("threads", [1, 2])
def test_child_of_a_process_that_has_called(threads):
    """As multiprocessing's children, it leaves by os._exit; it may load more kernels, and use threads of its own."""
    code = f"""
    kernel = tvmdcn.load(spec, threads={threads})
    expected = kernel(*arguments)
    other = tvmdcn.DeformConv2dSpec(4, 4, (1, 1))
    def work():
        for _ in range(20):
            assert np.array_equal(kernel(*arguments), expected)
        assert np.array_equal(tvmdcn.load(spec, threads=3)(*arguments), expected)
        few = make_tensors(other, tvmdcn.Extents(1, 5, 5))
        assert np.isfinite(tvmdcn.load(other)(few.input, few.offset, few.weight, few.bias, few.mask)).all()
        results = []
        ts = [threading.Thread(target=lambda: results.append(kernel(*arguments))) for _ in range(4)]
        for t in ts: t.start()
        for t in ts: t.join(20)
        assert len(results) == 4 and all(np.array_equal(r, expected) for r in results)
    print([forked(work, os._exit) for _ in range(5)])
    assert np.array_equal(kernel(*arguments), expected)
    """
    assert run(textwrap.dedent(_LOADED), textwrap.dedent(code)).stdout.strip() == "[7, 7, 7, 7, 7]"


@needs_fork
def test_child_that_ends_normally_is_told_and_does_not_hang():
    """TVM would wait for ever for workers that only the parent has; a signal is an end that is no success."""
    code = """
    kernel = tvmdcn.load(spec, threads=2)
    ends = []
    for _ in range(3):
        kernel(*arguments)
        time.sleep(0.05)  # idle workers sleep: that is when it would hang
        ends.append(forked(lambda: None, sys.exit))
    print(sorted(set(ends)))
    """
    done = run(textwrap.dedent(_LOADED), textwrap.dedent(code))
    assert eval(done.stdout) in ([-signal.SIGALRM], [-signal.SIGALRM, 7], [7]), done.stdout
    assert "TVM waits for workers that stayed in the parent, and SIGALRM ends that in " in done.stderr
    assert "End it with os._exit(), as multiprocessing does, use the start method 'spawn'" in done.stderr


@needs_fork
def test_child_of_a_thread_that_has_called_nothing_ends_as_it_likes():
    code = """
    kernel = tvmdcn.load(spec, threads=2)
    expected = []
    worker = threading.Thread(target=lambda: expected.append(kernel(*arguments)))
    worker.start()
    worker.join()
    def work():
        assert np.array_equal(kernel(*arguments), expected[0])
    print([forked(work, sys.exit) for _ in range(3)])
    """
    assert run(textwrap.dedent(_LOADED), textwrap.dedent(code)).stdout.strip() == "[7, 7, 7]"


@needs_fork
def test_children_of_children_and_pools_of_processes():
    code = """
    kernel = tvmdcn.load(spec, threads=2)
    expected = kernel(*arguments)
    def right(_):
        return bool(np.array_equal(kernel(*arguments), expected))
    def work():
        assert forked(lambda: right(0) or os._exit(9), os._exit) == 7
    print(forked(work, os._exit))
    with multiprocessing.get_context("fork").Pool(3) as pool:
        print(all(pool.map(right, range(12))))
    """
    assert run(textwrap.dedent(_LOADED), textwrap.dedent(code)).stdout.split() == ["7", "True"]


@needs_fork
def test_fork_while_other_threads_call():
    code = """
    kernel = tvmdcn.load(spec, threads=2)
    expected = kernel(*arguments)
    stop = threading.Event()
    def busy():
        while not stop.is_set():
            assert np.array_equal(kernel(*arguments), expected)
    ts = [threading.Thread(target=busy) for _ in range(4)]
    for t in ts: t.start()
    def work():
        assert np.array_equal(kernel(*arguments), expected)
    ends = [forked(work, os._exit) for _ in range(10)]
    stop.set()
    for t in ts: t.join()
    print(set(ends))
    """
    assert run(textwrap.dedent(_LOADED), textwrap.dedent(code)).stdout.strip() == "{7}"
