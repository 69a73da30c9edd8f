# SPDX-License-Identifier: Apache-2.0
"""`tvmdcn pack`, the wheel it writes, and a machine that has nothing but that, the package and NumPy."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from handmade import ROOT, SPEC
from packing import GRADIENTS, OTHER

from tvmdcn.cli import main
from tvmdcn.errors import ArtifactError, SpecError
from tvmdcn.packs.check import first_results
from tvmdcn.packs.check import main as check_command
from tvmdcn.packs.manifest import LIBRARIES, MANIFEST
from tvmdcn.packs.pack import KernelPack
from tvmdcn.packs.wheels import write_wheel
from tvmdcn.packs.writer import installed_runtime, wheel_runtime
from tvmdcn.problems import parse_problem
from tvmdcn.target import detect_target
from tvmdcn.tensors import make_tensors

ARCH = detect_target().arch
LAYER = "1,6,9,8,10"
# What a pack of each architecture would hold; any other than this machine's.
FOREIGN, FOREIGN_ARCH = ("neoverse-n1", "aarch64") if ARCH == "x86_64" else ("x86-64-v3", "x86_64")


def call(*arguments: str | Path) -> Result:
    result = CliRunner().invoke(main, ["pack", *map(str, arguments)], prog_name="tvmdcn")
    assert isinstance(result.exception, (SystemExit, type(None))), result.exc_info
    assert "Traceback" not in result.output
    return result


# --- the command -------------------------------------------------------------------------------------------------


def test_the_command_says_what_it_made_and_what_is_next(packer, tmp_path):
    place = tmp_path / "dcn_pack"
    result = call("--problem", LAYER, "--operator", "all", "--target", FOREIGN, "--target", "llvm", "-o", place)
    assert result.exit_code == 0, result.output
    pack = KernelPack.read(place)
    assert [(kernel.spec.operator, kernel.target.tag) for kernel in pack.kernels] == [
        (operator, tag)
        for tag in (f"llvm-{FOREIGN}", detect_target().tag)
        for operator in ("deform_conv2d", "deform_conv2d_grad")
    ]
    assert pack.manifest.runtime == (ARCH,)
    lines = result.stdout.splitlines()
    assert len(lines) == 6
    assert lines[0].startswith(f"llvm-{FOREIGN}: deform_conv2d c6x10_k3x3")
    assert re.fullmatch(rf"{place}: 4 kernels, \d+\.\d MB, sha256 {pack.sha256}", lines[4])
    assert lines[5] == f"next: python -m tvmdcn.packs.check {place}"
    assert f"note: no runtime for {FOREIGN_ARCH} is at hand (--runtime-wheel)" in result.stderr


def test_layers_of_a_model_and_of_a_file(packer, tmp_path, monkeypatch):
    pytest.importorskip("torch")
    (tmp_path / "pack_models.py").write_text(
        "import torch, tvmdcn\n"
        "def make():\n"
        "    first = tvmdcn.ModulatedDeformConv2dPack(3, 8, 3, padding=1)\n"
        "    return torch.nn.Sequential(first, tvmdcn.DeformConv2dPack(8, 8, 3, stride=2))\n"
    )
    (tmp_path / "layers.json").write_text(json.dumps([{"name": "mine", "problem": LAYER}]))
    monkeypatch.syspath_prepend(str(tmp_path))
    model = ("--model", "pack_models:make", "--input", "1x3x16x16")
    result = call(*model, "--no-runtime", "-o", tmp_path / "of_model", "--name", "mine", "--version", "3.1")
    assert result.exit_code == 0, result.output
    pack = KernelPack.read(tmp_path / "of_model")
    assert [(k.spec.in_channels, k.spec.mask, k.spec.stride) for k in pack.kernels] == [
        (3, True, (1, 1)),
        (8, False, (2, 2)),
    ]
    assert (pack.manifest.name, pack.manifest.version, pack.manifest.runtime) == ("mine", "3.1", ())
    assert not (pack.path / "runtime").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--problem", LAYER], "Missing option '--output'"),
        (["-o", "pack"], "say what to pack: --problem NAME"),
        (["-o", "pack", "--problem", "no_such_layer"], "no_such_layer"),
        (["-o", "pack", "--problem", LAYER, "--target", "z80"], "target 'z80' is not known"),
        (["-o", "pack", "--model", "a:b"], "--model needs --input"),
        (["-o", "pack", "--input", "1x3x8x8", "--problem", LAYER], "--input goes with --model"),
        (["-o", "My-Pack!", "--problem", LAYER], "the name of a pack must be of the form"),
        (["-o", "pack", "--problem", LAYER, "--version", "first"], "the version of a pack must be of the form"),
        (
            ["-o", "pack", "--problem", LAYER, "--runtime-wheel", "{file}"],
            "is no wheel of apache-tvm or apache-tvm-ffi",
        ),
        (["-o", "pack", "--problem", LAYER, "--no-runtime", "--runtime-wheel", "{file}"], "not for --no-runtime"),
        (["-o", "{folder}", "--problem", LAYER], "is there, and is no pack: it is left"),
    ],
)
def test_refusals_come_before_anything_is_built(packer, monkeypatch, tmp_path, arguments, message):
    import handmade

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(handmade, "build", lambda *a, **k: pytest.fail("built"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file.whl").touch()
    result = call(*(text.format(file=tmp_path / "other" / "file.whl", folder=tmp_path / "other") for text in arguments))
    assert result.exit_code in (1, 2)
    assert message in " ".join(result.stderr.split())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "other"]


# --- runtimes ------------------------------------------------------------------------------------------------------


def test_the_installed_runtime_comes_with_its_licenses():
    source = installed_runtime()
    assert source.arch == ARCH
    assert {f"runtime/{ARCH}/{name}" for name in LIBRARIES} <= set(source.files)
    licenses = {name for name in source.files if name.startswith("licenses/")}
    assert {f"licenses/{name}/LICENSE" for name in ("apache-tvm", "apache-tvm-ffi", "libbacktrace")} <= licenses
    assert all(source.files[name]() for name in licenses)


def fake_wheel(folder: Path, distribution: str, package: str, library: str, version: str = "0.27.0.post1") -> Path:
    """Write a wheel with a library that is none."""
    name = distribution.replace("-", "_")
    path = folder / f"{name}-{version}-py3-none-manylinux_2_28_{FOREIGN_ARCH}.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{package}/lib/{library}", f"{library} of {FOREIGN_ARCH}")
        archive.writestr(f"{package}/lib/libother.so", "something else")
        archive.writestr(f"{name}-{version}.dist-info/licenses/LICENSE", "the license")
        archive.writestr(f"{name}-{version}.dist-info/METADATA", "")
    return path


def test_the_runtime_of_another_architecture_is_taken_from_wheels(packer, tmp_path):
    source = installed_runtime()
    tvm = fake_wheel(tmp_path, "apache-tvm", "tvm", "libtvm_runtime.so", source.versions["tvm"])
    ffi = fake_wheel(tmp_path, "apache-tvm-ffi", "tvm_ffi", "libtvm_ffi.so", source.versions["tvm_ffi"])
    with pytest.raises(SpecError, match=f"a wheel of apache-tvm for {FOREIGN_ARCH} is missing"):
        wheel_runtime([ffi])
    wheels = ("--runtime-wheel", tvm, "--runtime-wheel", ffi)
    place = tmp_path / "dcn_pack"
    result = call("--problem", LAYER, "--target", FOREIGN, "-o", place, *wheels)
    assert result.exit_code == 0, result.output
    assert "note" not in result.stderr
    pack = KernelPack.read(place)
    assert pack.manifest.runtime == (FOREIGN_ARCH,)
    folder = place / "runtime" / FOREIGN_ARCH
    assert {path.name: path.read_text() for path in folder.iterdir()} == {
        name: f"{name} of {FOREIGN_ARCH}" for name in LIBRARIES
    }
    assert (place / "licenses" / "apache-tvm" / "LICENSE").read_text() == "the license"


def test_a_runtime_of_another_version_is_not_packed(packer, tmp_path):
    source = installed_runtime()
    source.versions["tvm"] = "0.26.0"
    with pytest.raises(ArtifactError, match=r"is of apache-tvm 0\.26\.0 .*, and kernels are built with 0\.27"):
        packer(runtimes=[source])
    assert not (tmp_path / "dcn_pack").exists()


# --- wheels --------------------------------------------------------------------------------------------------------


def test_a_wheel_holds_the_pack(packer, tmp_path):
    pytest.importorskip("wheel")
    pack = packer(targets=("llvm", FOREIGN), version="1.5")
    path = write_wheel(pack, tmp_path / "dist")
    assert path.name == "dcn_pack-1.5-py3-none-manylinux_2_28_aarch64.manylinux_2_28_x86_64.whl"
    assert [found.name for found in path.parent.iterdir()] == [path.name]
    with zipfile.ZipFile(path) as archive:
        names = set(archive.namelist())
        text = archive.read("dcn_pack-1.5.dist-info/METADATA").decode()
        assert archive.read(f"tvmdcn_packs/dcn_pack/{MANIFEST}") == (pack.path / MANIFEST).read_bytes()
    information = {f"dcn_pack-1.5.dist-info/{name}" for name in ("METADATA", "WHEEL", "RECORD")}
    assert names == information | {f"tvmdcn_packs/dcn_pack/{name}" for name in (*pack.manifest.files, MANIFEST)}
    assert "Name: dcn-pack\nVersion: 1.5\n" in text
    assert f"Requires-Dist: tvmdcn>={pack.manifest.tvmdcn}" in text
    (pack.path / pack.kernels[0].path / "kernel.so").write_bytes(b"damaged")
    with pytest.raises(ArtifactError, match="is not the file that its pack was made with"):
        write_wheel(pack, tmp_path / "dist")
    (tmp_path / "file").touch()
    with pytest.raises(ArtifactError, match="cannot be written"):
        write_wheel(packer(name="other"), tmp_path / "file" / "dist")


# --- the check -----------------------------------------------------------------------------------------------------


def test_the_check_says_that_all_is_well(packer, capsys):
    pack = packer(SPEC, GRADIENTS, OTHER)
    assert check_command([str(pack.path), "--sha256", pack.sha256, "--processes", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith(f"{pack.path}: all 6 files are right")
    assert pack.sha256 in lines[1]
    tag = detect_target().tag
    assert [line.partition(":")[0].split()[0] for line in lines[2:5]] == [
        spec.operator for spec in (SPEC, GRADIENTS, OTHER)
    ]
    assert all(re.search(rf": {tag}, max error \de-\d\d$", line) for line in lines[2:5])
    assert re.match(r"first result \d\.\d{3} s after the first import \(median of 1 new processes", lines[5])


def test_the_check_says_what_is_not(packer, capsys, monkeypatch, tmp_path):
    def failed(*arguments: str) -> str:
        assert check_command([*arguments, "--processes", "0"]) == 1
        said = capsys.readouterr()
        return said.out + said.err

    foreign = packer(targets=(FOREIGN,), name="foreign")
    assert f"none of llvm-{FOREIGN} runs on this {detect_target().tag}" in failed(str(foreign.path))
    pack = packer()
    assert "which was asked for" in failed(str(pack.path), "--sha256", "0" * 64)
    real = KernelPack.artifact

    def other_epsilon(self, kernel):
        from tvmdcn.packs import check

        monkeypatch.setitem(check._TOLERANCES, "float32", 0.0)
        return real(self, kernel)

    monkeypatch.setattr(KernelPack, "artifact", other_epsilon)
    assert "IS TOO LARGE" in failed(str(pack.path))
    (pack.path / pack.kernels[0].path / "kernel.so").write_bytes(b"damaged")
    assert "error: " in failed(str(pack.path))
    assert "no pack is installed, and TVMDCN_PACK is not set" in failed()


def test_a_first_result_that_fails_is_an_error(packer, monkeypatch):
    pack = packer()
    assert len(first_results(pack, 2)) == 2
    library = pack.path / pack.kernels[0].path / "kernel.so"
    library.write_bytes(library.read_bytes() + b"\0")
    with pytest.raises(ArtifactError, match=r"a new process found no result: .*it is damaged"):
        first_results(pack, 1)


# --- a machine with nothing but the package, NumPy and the wheel ------------------------------------------------------


def links(folder: Path, *packages: str) -> Path:
    """Make a directory with nothing but links to these packages, for an import path."""
    import importlib.util

    folder.mkdir()
    for package in packages:
        spec = importlib.util.find_spec(package)
        assert spec is not None
        assert spec.submodule_search_locations
        home = Path(spec.submodule_search_locations[0])
        beside = [
            home,
            *home.parent.glob(f"{package}.libs"),
            *home.parent.glob(f"{package.replace('_', '[-_]')}-*.dist-info"),
        ]
        if package == "tvm_ffi":
            beside += home.parent.glob("apache_tvm_ffi-*.dist-info")
        for path in beside:
            (folder / path.name).symlink_to(path)
    return folder


class Machine:
    """A Python environment without this one's packages."""

    def __init__(self, folder: Path, wheel: Path, *packages: str) -> None:
        self.folder = folder
        folder.mkdir()
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "env"], check=True, timeout=60)
        self.python = folder / "env" / "bin" / "python"
        (self.site,) = (folder / "env" / "lib").glob("python*/site-packages")
        (self.site / "some.pth").write_text(f"{links(folder / 'packages', *packages)}\n")
        (self.site / "tvmdcn").symlink_to(ROOT / "tvmdcn")
        install = ["-m", "pip", "--python", self.python, "install", "--quiet", "--no-deps", "--no-index", wheel]
        subprocess.run([sys.executable, *map(str, install)], check=True, timeout=120)

    def run(self, *arguments: str | Path, status: int = 0, **environment: str) -> str:
        inherited = {
            name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR", "OMP_NUM_THREADS") if name in os.environ
        }
        done = subprocess.run(
            [self.python, *map(str, arguments)],
            env={**inherited, "PYTHONDONTWRITEBYTECODE": "1", **environment},
            cwd=self.folder,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory, session_cache_dir) -> Path:
    """A wheel of a layer and its gradients, built by the real compiler, with its runtime."""
    pytest.importorskip("wheel")
    folder = tmp_path_factory.mktemp("wheel")
    result = call("--problem", LAYER, "--operator", "all", "-o", folder / "dcn_pack", "--wheel", folder)
    assert result.exit_code == 0, result.output
    (found,) = folder.glob("*.whl")
    assert f"wheel: {found}" in result.stdout
    return found


@pytest.fixture(scope="module")
def machine(wheel, tmp_path_factory) -> Machine:
    return Machine(tmp_path_factory.mktemp("bare") / "machine", wheel, "numpy")


_COMPUTE = """
import numpy as np, sys, tvmdcn
arrays = np.load(sys.argv[1])
x, offset, weight, bias, mask = (arrays[name] for name in ("input", "offset", "weight", "bias", "mask"))
y = tvmdcn.deform_conv2d(x, offset, weight, bias, padding=1, mask=mask)
np.save(sys.argv[2], y)
maps = open("/proc/self/maps").read() if sys.platform == "linux" else ""
print(*{line.split("/", 1)[1] for line in maps.splitlines() if "libtvm" in line})
print(*(name for name in ("tvm", "tvm_ffi", "click", "filelock", "platformdirs") if name in sys.modules))
"""


@pytest.mark.parametrize("packages", [("numpy",), ("numpy", "tvm_ffi")], ids=["numpy", "numpy-and-ffi"])
def test_a_machine_without_tvm_computes(wheel, machine, tmp_path, packages):
    from tvmdcn.reference import reference

    here = machine if packages == ("numpy",) else Machine(tmp_path / "machine", wheel, *packages)
    problem = parse_problem(LAYER)
    tensors = make_tensors(problem.spec, problem.extents)
    np.savez(tmp_path / "in.npz", **vars(tensors))
    said = here.run("-c", _COMPUTE, tmp_path / "in.npz", tmp_path / "out.npy", TVMDCN_BUILD="never").splitlines()
    expected = reference(problem.spec, tensors)
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
    if sys.platform == "linux":
        loaded = {Path(path).name: path for path in said[0].split()}
        assert set(loaded) == set(LIBRARIES)
        own = f"tvmdcn_packs/dcn_pack/runtime/{ARCH}/"
        assert own in loaded["libtvm_runtime.so"]
        # An installed apache-tvm-ffi is the one that a process has; only without it the pack's own is loaded.
        assert (own in loaded["libtvm_ffi.so"]) == (packages == ("numpy",))
    assert said[1:] in ([], [""])


def test_the_check_runs_on_such_a_machine(machine):
    said = machine.run("-m", "tvmdcn.packs.check", "--processes", "1")
    assert said.count(", max error ") == 2
    assert detect_target().tag in said
    assert "first result 0." in said or "first result 1." in said


def test_what_the_pack_has_not_is_told_on_such_a_machine(machine):
    code = "import numpy as np, tvmdcn\ntvmdcn.deform_conv2d(np.ones((1, 2, 5, 5), 'f'), np.ones((1, 18, 5, 5), 'f'), "
    code += "np.ones((2, 2, 3, 3), 'f'), padding=1)"
    for mode in ("never", "auto"):
        said = machine.run("-c", code, status=1, TVMDCN_BUILD=mode)
        assert "ArtifactMissing: there is no kernel of deform_conv2d c2x2_k3x3" in said
        assert "The pack dcn_pack 1.0" in said
        assert "apache-tvm is not installed (pip install tvmdcn, without --no-deps" in said


def test_what_needs_the_compiler_says_so_on_such_a_machine(machine):
    code = "import tvmdcn\ntry:\n    tvmdcn.build\nexcept tvmdcn.MissingExtra as error:\n    print(error)"
    said = machine.run("-c", code)
    assert said == "tvmdcn.build needs tvm, not installed here: pip install tvmdcn, without --no-deps\n"
    said = machine.run("-m", "tvmdcn", "tune", status=1)
    assert said == "Error: the command tvmdcn needs click, not installed here: pip install tvmdcn, without --no-deps\n"


@pytest.mark.parametrize("name", ["libtvm_runtime.so", "kernel.so"])
def test_changed_files_are_not_loaded_on_such_a_machine(wheel, tmp_path, name):
    here = Machine(tmp_path / "machine", wheel, "numpy")
    for file in (here.site / "tvmdcn_packs").rglob(name):
        file.write_bytes(file.read_bytes() + b"\0")
    problem = parse_problem(LAYER)
    np.savez(tmp_path / "in.npz", **vars(make_tensors(problem.spec, problem.extents)))
    said = here.run("-c", _COMPUTE, tmp_path / "in.npz", tmp_path / "out.npy", status=1, TVMDCN_BUILD="never")
    assert "ArtifactMissing" in said
    assert f"{name} is not the file that its pack was made with" in said
    assert not (tmp_path / "out.npy").exists()
    assert "error: " in here.run("-m", "tvmdcn.packs.check", "--processes", "0", status=1)


def test_info_names_the_packs_in_force(packer, monkeypatch):
    pack = packer(version="1.7")
    monkeypatch.setenv("TVMDCN_PACK", str(pack.path))
    result = CliRunner().invoke(main, ["info"], prog_name="tvmdcn")
    assert result.exit_code == 0, result.output
    assert f"TVMDCN_PACK = {pack.path}  (" in result.stdout
    assert f"pack dcn_pack 1.7: 1 kernels ({pack.path})" in result.stdout
