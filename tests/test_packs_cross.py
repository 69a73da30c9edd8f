# SPDX-License-Identifier: Apache-2.0
"""Packs for a processor that is not here: linked, looked at as machine code, and run by an emulator if there is one."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Callable

import emulated
import pytest
from compiled import error_of

from tvmdcn import linking
from tvmdcn.artifact import Artifact
from tvmdcn.cuda_compiler import disassemble
from tvmdcn.cuda_libraries import find_tool
from tvmdcn.errors import ArtifactError, BuildError
from tvmdcn.linking import cross_command, linker_for
from tvmdcn.packs.manifest import CUDA_LIBRARY
from tvmdcn.packs.pack import KernelPack
from tvmdcn.reference import reference
from tvmdcn.reference_grad import expected_gradients
from tvmdcn.spec import DeformConv2dGradSpec, DeformConv2dSpec, Extents
from tvmdcn.target import detect_target, resolve_target
from tvmdcn.tensors import make_gradient_tensors, make_layer_tensors, make_tensors

LAYER = DeformConv2dSpec(12, 20, 3, padding=1, offset_groups=2)
WIDE = DeformConv2dSpec(6, 8, (3, 2), stride=(1, 2), mask=False, dtype="float64", layout="NHWC")
GRADIENTS = DeformConv2dGradSpec.of(LAYER)
TOLERANCES = {"float32": 2e-6, "float64": 1e-13}
AARCH64 = 183  # EM_AARCH64

foreign = pytest.mark.skipif(detect_target().arch == "aarch64", reason="an AArch64 machine builds for itself")


def linkers() -> dict[str, bool]:
    """Return which linkers for AArch64 are here."""
    return {
        "aarch64-linux-gnu-gcc": shutil.which("aarch64-linux-gnu-gcc") is not None,
        "ziglang": importlib.util.find_spec("ziglang") is not None,
    }


def only(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave one linker, or none."""
    which, find_spec = shutil.which, importlib.util.find_spec
    monkeypatch.setattr(linking.shutil, "which", lambda text: which(text) if text == name else None)
    monkeypatch.setattr(linking.importlib.util, "find_spec", lambda text: find_spec(text) if text == name else None)


# --- linkers -------------------------------------------------------------------------------------------------


def test_this_machine_needs_no_other_linker():
    assert linker_for(detect_target()) is None


def test_a_missing_linker_is_told_with_its_cure(monkeypatch):
    only("", monkeypatch)
    message = r"needs a linker for aarch64: .*pip install 'tvmdcn\[pack\]', or apt-get install gcc-aarch64-linux-gnu\."
    with pytest.raises(BuildError, match=message):
        cross_command("aarch64")
    with pytest.raises(BuildError, match="apt-get install gcc-x86-64-linux-gnu"):
        cross_command("x86_64")


def test_a_cross_compiler_comes_before_ziglang(monkeypatch):
    monkeypatch.setattr(linking.shutil, "which", lambda name: f"/usr/bin/{name}" if name.endswith("g++") else None)
    assert cross_command("aarch64") == ["/usr/bin/aarch64-linux-gnu-g++"]
    monkeypatch.setattr(linking.shutil, "which", lambda name: None)
    monkeypatch.setattr(linking.importlib.util, "find_spec", lambda name: object())
    assert cross_command("aarch64") == [sys.executable, "-m", "ziglang", "cc", "-target", "aarch64-linux-gnu"]


@foreign
def test_what_a_linker_says_is_passed_on(monkeypatch, tmp_path):
    monkeypatch.setattr(
        linking, "cross_command", lambda arch: [sys.executable, "-c", "raise SystemExit('no such file')"]
    )
    link = linker_for(resolve_target("neoverse-n1"))
    assert link is not None
    with pytest.raises(BuildError, match="could not link for llvm-neoverse-n1: no such file"):
        link(str(tmp_path / "kernel.so"), [str(tmp_path / "lib0.o")])
    monkeypatch.setattr(linking, "cross_command", lambda arch: [str(tmp_path / "missing")])
    link = linker_for(resolve_target("neoverse-n1"))
    assert link is not None
    with pytest.raises(BuildError, match="missing did not link"):
        link(str(tmp_path / "kernel.so"), [])


# --- what is built ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cross_built(tmp_path_factory, session_cache_dir) -> Callable[[DeformConv2dSpec, str], Artifact]:
    """What builds kernels for AArch64, each once."""
    if not any(linkers().values()):
        pytest.skip("there is no linker for aarch64: pip install ziglang, or apt-get install gcc-aarch64-linux-gnu")
    from tvmdcn.builder import build

    return lambda spec, target: build(spec, target, cache_dir=session_cache_dir)


@foreign
@pytest.mark.parametrize("linker", list(linkers()))
def test_either_linker_makes_a_library_of_neon_code(monkeypatch, tmp_path, linker):
    if not linkers()[linker]:
        pytest.skip(f"there is no {linker}")
    from tvmdcn.builder import build

    only(linker, monkeypatch)
    folder = tmp_path / "cache"
    folder.mkdir(mode=0o700)
    artifact = build(LAYER, "neoverse-n1", cache_dir=folder)
    machine, code = emulated.machine_of(artifact.library)
    assert machine == AARCH64
    assert emulated.vector_multiplications(code, 4) > 50
    assert emulated.vector_multiplications(code, 2) == 0
    with pytest.raises(ArtifactError, match=r"was built for llvm-neoverse-n1 and needs .*which this machine lacks"):
        artifact.load()


@foreign
@pytest.mark.skipif(emulated.MISSING is not None, reason=str(emulated.MISSING))
@pytest.mark.parametrize(
    ("spec", "target"),
    [(LAYER, "neoverse-n1"), (WIDE, "generic"), (GRADIENTS, "generic"), (LAYER, "neoverse-v1")],
    ids=["float32", "float64-nhwc", "gradients", "sve"],
)
def test_an_emulated_processor_computes_the_same(cross_built, tmp_path, spec, target):
    artifact = cross_built(spec, target)
    machine, code = emulated.machine_of(artifact.library)
    assert machine == AARCH64
    if target != "neoverse-v1":
        assert emulated.vector_multiplications(code, 2 if spec.dtype == "float64" else 4) > 10
    runner, extents = emulated.compile_runner(tmp_path), Extents(2, 11, 13)
    if isinstance(spec, DeformConv2dGradSpec):
        tensors = make_gradient_tensors(spec, extents)
        expected = expected_gradients(spec, tensors)
    else:
        tensors = make_layer_tensors(spec, extents)
        expected = {"output": reference(spec, make_tensors(spec, extents))}
    found = emulated.emulate(runner, artifact, extents, tensors, tmp_path)
    for name, right in expected.items():
        assert error_of(found[name].reshape(right.shape), right) < TOLERANCES[spec.dtype]


@foreign
def test_a_pack_holds_both_architectures(cross_built, tmp_path, session_cache_dir, no_packs):
    from tvmdcn.packs.writer import build_pack

    cross_built(LAYER, "neoverse-n1")
    pack = build_pack([LAYER], ["llvm", "neoverse-n1"], tmp_path / "dcn_pack")
    native, cross = (emulated.machine_of(pack.path / kernel.path / "kernel.so")[0] for kernel in pack.kernels)
    assert native != cross == AARCH64
    assert pack.load(LAYER).target == detect_target()
    assert KernelPack.read(pack.path).load(LAYER).target == detect_target()


def test_object_files_are_all_that_is_needed(tmp_path, cross_built):
    """A kernel asks nothing of a C library, so it runs with any that the machine has."""
    artifact = cross_built(LAYER, "neoverse-n1" if detect_target().arch != "aarch64" else "llvm")
    readelf = shutil.which("readelf")
    if readelf is None:
        pytest.skip("there is no readelf: apt-get install binutils")
    text = subprocess.run([readelf, "-Wd", artifact.library], capture_output=True, text=True, check=True).stdout
    assert "NEEDED" not in text


# --- GPUs that are not here ------------------------------------------------------------------------------------------


def test_a_pack_for_gpus_holds_machine_code_of_each(tmp_path, session_cache_dir, no_packs):
    """Built in a process of its own: on a machine without a driver, a stand-in for it is loaded."""
    if find_tool("nvcc") is None:
        pytest.skip("there is no nvcc: install a CUDA toolkit")
    place = tmp_path / "dcn_pack"
    layer = ("--problem", "1,32,16,16,32,dtype=float16")
    targets = ("--target", "cuda-sm_80", "--target", "cuda-sm_90")
    command = [sys.executable, "-m", "tvmdcn", "pack", *layer, *targets, "-o", place]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    pack = KernelPack.read(place)
    pack.verify()
    assert [kernel.target.tag for kernel in pack.kernels] == ["cuda-sm_80", "cuda-sm_90"]
    assert (place / "runtime" / detect_target().arch / CUDA_LIBRARY).is_file()
    for kernel, expected in zip(pack.kernels, (80, 90), strict=True):
        capability, code = emulated.device_code(place / kernel.path / "kernel.so")
        assert capability == expected
        if find_tool("nvdisasm") is not None:
            assert any("HMMA" in text for text in disassemble(code).values())  # tensor cores
