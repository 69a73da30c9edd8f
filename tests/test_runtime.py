# SPDX-License-Identifier: Apache-2.0
"""Where kernels come from: memory, disk, a build; once, whoever asks at the same time."""

from __future__ import annotations

import json
import sys
import threading

import handmade
import numpy as np
import pytest
from call_counts import functions_entered
from handmade import EXTENTS, SPEC, call, error, kernel_of, run, torch_of, variant

import tvmdcn
from tvmdcn import native, runtime
from tvmdcn.artifact import artifacts
from tvmdcn.cache_key import CacheKey
from tvmdcn.errors import ArtifactError, ArtifactMissing, BuildError
from tvmdcn.spec import DeformConv2dSpec, Extents
from tvmdcn.target import detect_target
from tvmdcn.tensors import make_tensors


@pytest.fixture(autouse=True)
def builder(monkeypatch):
    handmade.install(monkeypatch)


def test_threads_load_one_kernel_at_once(cache_dir, monkeypatch):
    builds = []
    build = handmade.build
    monkeypatch.setattr(handmade, "build", lambda *a, **k: builds.append(1) or build(*a, **k))
    found = []
    workers = [threading.Thread(target=lambda: found.append(kernel_of())) for _ in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(builds) == 1
    assert len(found) == 6
    assert len(set(map(id, found))) == 1


def test_processes_load_one_kernel_at_once(cache_dir):
    code = """
    import threading
    handmade_builder()
    import tvmdcn, handmade, numpy as np
    build, builds = handmade.compile_library, []
    def counted(*arguments):
        builds.append(1)
        return build(*arguments)
    handmade.compile_library = counted
    from tvmdcn.tensors import make_tensors
    spec = tvmdcn.DeformConv2dSpec(6, 2, (3, 2), (2, 1), (1, 0), (2, 1), groups=2, offset_groups=3)
    tensors = make_tensors(spec, tvmdcn.Extents(3, 5, 4))
    sums = []
    def work():
        kernel = tvmdcn.load(spec)
        result = kernel(tensors.input, tensors.offset, tensors.weight, tensors.bias, tensors.mask)
        sums.append(float(result.sum()))
    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    print(len(builds), len(sums), len(set(sums)), sums[0])
    """
    found = []
    workers = [threading.Thread(target=lambda: found.append(run(code, timeout=120).stdout.split())) for _ in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(found) == 8
    assert sum(int(builds) for builds, *_ in found) == 1
    assert {tuple(rest) for _, *rest in found} == {("3", "1", found[0][3])}


def test_memory_then_disk_then_build(cache_dir, monkeypatch, caplog):
    caplog.set_level("INFO")
    first = kernel_of()
    assert "built deform_conv2d-" in caplog.text
    assert caplog.text.count(" s (schedule: tuned), kept in ") == 1
    assert kernel_of() is first
    monkeypatch.setattr(runtime, "_loaded", {})
    monkeypatch.setattr(handmade, "build", lambda *a, **k: pytest.fail("built again"))
    assert kernel_of() is not first
    assert kernel_of(threads=3).threads == 3


def test_never_build_names_the_nearest(cache_dir, monkeypatch):
    monkeypatch.setenv("TVMDCN_BUILD", "never")
    with pytest.raises(ArtifactMissing, match=r"no artifact for deform_conv2d-.*TVMDCN_BUILD=never forbids.*Build it"):
        kernel_of()
    near = handmade.build(variant(dtype="float16"), schedule="default")
    with pytest.raises(ArtifactMissing) as caught:
        kernel_of()
    message = str(caught.value)
    assert f"The nearest is {near.path}; it differs in spec.dtype: 'float16', wanted 'float32'; " in message
    assert "schedule: 'default', wanted 'tuned'" in message


def test_never_build_takes_other_records(cache_dir, monkeypatch, tmp_path, caplog):
    caplog.set_level("INFO")
    handmade.build(SPEC)
    folder = tmp_path / "records" / detect_target().tag
    folder.mkdir(parents=True)
    (folder / "database_workload.json").write_text("[]")
    monkeypatch.setenv("TVMDCN_RECORDS", str(folder.parent))
    monkeypatch.setenv("TVMDCN_BUILD", "never")
    tensors = make_tensors(SPEC, EXTENTS)
    assert error(call(kernel_of(), tensors), SPEC, tensors) < 1e-6
    assert "was built with other tuning records" in caplog.text


def test_new_records_are_followed(cache_dir, monkeypatch, tmp_path):
    first = kernel_of()
    folder = tmp_path / "records" / detect_target().tag
    folder.mkdir(parents=True)
    (folder / "database_workload.json").write_text("[]")
    monkeypatch.setenv("TVMDCN_RECORDS", str(folder.parent))
    monkeypatch.setattr(runtime, "_loaded", {})
    assert kernel_of().artifact.path != first.artifact.path


def test_rebuild_builds_although_it_is_there(cache_dir, monkeypatch):
    first = handmade.build(SPEC)
    monkeypatch.setenv("TVMDCN_BUILD", "rebuild")
    assert kernel_of().artifact.created > first.created
    assert len(list(artifacts())) == 1


def test_damaged_library_is_built_anew(cache_dir, caplog, monkeypatch):
    artifact = handmade.build(SPEC)
    artifact.library.write_bytes(artifact.library.read_bytes()[:-100])
    monkeypatch.setenv("TVMDCN_BUILD", "never")
    with pytest.raises(ArtifactError, match="it is damaged"):
        kernel_of()
    monkeypatch.delenv("TVMDCN_BUILD")
    tensors = make_tensors(SPEC, EXTENTS)
    assert error(call(kernel_of(), tensors), SPEC, tensors) < 1e-6
    assert "It is built anew." in caplog.text


def test_missing_compiler_is_said(cache_dir, monkeypatch):
    monkeypatch.delattr(tvmdcn, "builder", raising=False)
    monkeypatch.delitem(sys.modules, "tvmdcn.builder", raising=False)
    for name in [name for name in sys.modules if name == "tvm" or name.startswith("tvm.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tvm", None)
    with pytest.raises(BuildError, match=r"the compiler is missing .*Install apache-tvm"):
        kernel_of()


def test_failing_build_is_not_remembered(cache_dir, monkeypatch):
    def fail(*arguments, **options):
        raise BuildError("no luck")

    with monkeypatch.context() as patch:
        patch.setattr(handmade, "build", fail)
        with pytest.raises(BuildError, match="no luck"):
            kernel_of()
    assert kernel_of().spec == SPEC


def test_missing_runtime_library_is_said(monkeypatch):
    monkeypatch.setattr(native.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ArtifactError, match=r"libtvm_runtime\S* was not found in the package tvm.*Install apache-tvm"):
        native.library("tvm", "tvm_runtime")


def test_runtime_of_another_version_is_said():
    with pytest.raises(ArtifactError, match=r"has no function runtime\.of_the_future: it is another version"):
        native.runtime().global_function("runtime.of_the_future")


def test_messages_of_compiled_functions_arrive():
    function = kernel_of().artifact.load().function("pack_weight")
    frame = native.Frame(function, [3])
    with pytest.raises(RuntimeError, match="pack_weight failed: ValueError: wrong number of arguments"):
        frame.run()


def test_only_the_small_runtime_is_loaded(cache_dir):
    handmade.build(SPEC)
    code = """
    import tvmdcn
    before = set(sys.modules)
    spec = tvmdcn.DeformConv2dSpec(6, 2, (3, 2), (2, 1), (1, 0), (2, 1), groups=2, offset_groups=3)
    kernel = tvmdcn.load(spec)
    import numpy as np
    shapes = (3, 6, 5, 4), (3, 36, 2, 3), (2, 3, 3, 2), (2,), (3, 18, 2, 3)
    kernel(*(np.ones(shape, "f") for shape in shapes))
    import json
    maps = open("/proc/self/maps").read() if sys.platform == "linux" else ""
    heavy = [name for name in ("tvm", "tvm_ffi", "torch", "numpy.ma") if name in sys.modules]
    print(json.dumps([heavy, "tvm_compiler" in maps, "numpy" in before]))
    """
    assert json.loads(run(code, TVMDCN_BUILD="never").stdout) == [[], False, False]


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_a_call_that_was_made_before_does_little(kind):
    """About 20 functions; `tvmdcn benchmark --overhead` says how long they take."""
    spec = DeformConv2dSpec(1, 1, (1, 1))
    kernel = kernel_of(spec, threads=1)
    tensors = make_tensors(spec, Extents(1, 3, 3))
    arguments = [tensors.input, tensors.offset, kernel.pack(tensors.weight), tensors.bias, tensors.mask]
    if kind == "torch":
        pytest.importorskip("torch")
        arguments = [torch_of(a) if isinstance(a, np.ndarray) else a for a in arguments]
    assert len(functions_entered(lambda: kernel(*arguments))) <= 25


def test_key_needs_no_compiler():
    code = """
    import tvmdcn
    from tvmdcn.cache_key import CacheKey
    key = CacheKey.of(tvmdcn.DeformConv2dSpec(1, 1), tvmdcn.detect_target(), "tuned")
    print(key.digest(), "tvm" in sys.modules)
    """
    key = CacheKey.of(DeformConv2dSpec(1, 1), detect_target(), "tuned")
    assert run(code).stdout.split() == [key.digest(), "False"]
