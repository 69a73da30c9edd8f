# SPDX-License-Identifier: Apache-2.0
"""The example in C++: compiled as its page says, it computes what Python does."""

from __future__ import annotations

import importlib.util
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from compiled import error_of

from tvmdcn.packs.writer import build_pack, installed_runtime
from tvmdcn.problems import parse_problem
from tvmdcn.reference import reference
from tvmdcn.spec import DeformConv2dSpec, Extents
from tvmdcn.tensors import Tensors

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "cpp"
LAYERS = {
    "dcnv2": parse_problem("1,12,9,11,20,og=2").spec,
    "dcnv1": DeformConv2dSpec(6, 8, (3, 2), (1, 2), (1, 0, 2, 1), groups=2, mask=False),
    "wrong dtype": DeformConv2dSpec(4, 4, 1, dtype="float64"),
}
pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++: apt-get install g++")


def fractions(shape, a: int, b: int) -> np.ndarray:
    """What the example calls its input."""
    count = np.arange(np.prod(shape), dtype=np.int64)
    return (((a * count + b) % 101 - 50).astype(np.float32) / np.float32(50)).reshape(shape)


def tensors_of(spec: DeformConv2dSpec, extents: Extents) -> Tensors:
    return Tensors(
        fractions(spec.input_shape(extents), 37, 11),
        fractions(spec.offset_shape(extents), 29, 5),
        fractions(spec.weight_shape, 41, 7),
        fractions(spec.mask_shape(extents), 53, 3) if spec.mask else None,
        fractions((spec.out_channels,), 19, 13),
    )


@pytest.fixture(scope="module")
def pack(tmp_path_factory, session_cache_dir):
    """A pack of the layers, with the runtime that the example is linked to."""
    place = tmp_path_factory.mktemp("cpp") / "dcn_pack"
    return build_pack(LAYERS.values(), ["llvm"], place, runtimes=[installed_runtime()], cache_dir=session_cache_dir)


@pytest.fixture(scope="module")
def program(pack) -> Path:
    """The example, compiled in the folder of the pack by the command of its page."""
    folder = pack.path.parent
    shutil.copy(EXAMPLE / "run_kernel.cpp", folder)
    (text,) = re.findall(r"^```sh\n(g\+\+ .*?)^```$", (EXAMPLE / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    spec = importlib.util.find_spec("tvm_ffi")
    assert spec is not None
    assert spec.submodule_search_locations
    ffi = Path(spec.submodule_search_locations[0])
    # What `tvm-ffi-config --cxxflags` prints; it is not run, for it imports torch.
    flags = f"-I{ffi / 'include'} -I{ffi / '3rdparty' / 'dlpack' / 'include'} -std=c++17"
    assert "$(tvm-ffi-config --cxxflags)" in text
    command = shlex.split(
        text.replace("$(tvm-ffi-config --cxxflags)", flags).replace("\\\n", " ").replace("-O2", "-O1")
    )
    arch = pack.manifest.runtime[0]
    done = subprocess.run(
        [word.replace("x86_64", arch) for word in command],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return folder / "run_kernel"


def run(program: Path, *arguments) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=60)


def directory(pack, name: str) -> Path:
    (kernel,) = pack.of_layer(LAYERS[name])
    return pack.path / kernel.path


@pytest.mark.parametrize("name", ["dcnv2", "dcnv1"])
def test_it_computes_what_python_does(pack, program, tmp_path, name):
    spec, extents = LAYERS[name], Extents(1, 12, 19)
    done = run(program, directory(pack, name), extents.height, extents.width, tmp_path / "output")
    assert done.returncode == 0, done.stderr
    tensors = tensors_of(spec, extents)
    found = np.fromfile(tmp_path / "output", np.float32).reshape(spec.output_shape(extents))
    assert error_of(found, reference(spec, tensors)) < 2e-6
    ours = pack.load(spec)(tensors.input, tensors.offset, tensors.weight, tensors.bias, tensors.mask)
    np.testing.assert_array_equal(found, ours)
    _, channels, height, width = spec.output_shape(extents)
    assert done.stdout.startswith(f"output of {channels} x {height} x {width}: ")
    printed = [float(text) for text in done.stdout.partition(": ")[2].split()[:4]]
    np.testing.assert_allclose(printed, found.ravel()[:4], rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("dcnv2", (1, 2), "this image is too small: the kernel computes at least"),
        ("wrong dtype", (9, 9), "is not of a layer of float32 in NCHW"),
        ("dcnv2", (9, 9, "/nowhere/output"), "cannot write /nowhere/output"),
    ],
)
def test_it_says_what_is_wrong(pack, program, name, arguments, message):
    done = run(program, directory(pack, name), *arguments)
    assert done.returncode == 1
    assert message in done.stderr


def test_it_says_how_it_is_called(program, tmp_path):
    assert run(program).returncode == 2
    assert "cannot read" in run(program, tmp_path, 9, 9).stderr


def test_it_loads_no_compiler(program):
    needed = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
    assert "libtvm_runtime.so" in needed
    assert "libtvm_compiler" not in needed
