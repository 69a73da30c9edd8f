# SPDX-License-Identifier: Apache-2.0
"""The package as users get it: built, installed elsewhere, imported, called; and the versions it needs."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest
import tomllib
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
# What goes into a build; everything else in a checkout (environments, outputs) would only slow the copy.
SOURCES = (
    "pyproject.toml",
    "MANIFEST.in",
    "README.md",
    "LICENSE",
    "CHANGELOG.md",
    "constraints.txt",
    ".ci",
    "docs",
    "examples",
    "schedules",
    "scripts",
    "tests",
    "tuning_logs",
    "tvmdcn",
)


def run(command: Sequence[str | Path], folder: Path, **environment: str) -> str:
    """Run a command in a folder, free of settings meant for this process, and return its output."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PYTHON", "TVMDCN_")) or name == "TVMDCN_CACHE_DIR"
    }
    done = subprocess.run(
        list(map(str, command)),
        cwd=folder,
        env={**inherited, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source distribution, built from a copy of the checkout."""
    folder = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)
    build = "from setuptools import build_meta; build_meta.build_sdist('dist')"
    run([sys.executable, "-c", build], folder)
    (archive,) = (folder / "dist").glob("*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel, built from the source distribution: whatever that lacks, the wheel lacks."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    run([*pip, sdist], folder)
    (archive,) = folder.glob("*.whl")
    return archive


def make_environment(folder: Path, *install: str | Path) -> Path:
    """Make an environment with one thing installed, and return its Python.

    What the package depends on is found in the environment of the tests: nothing is fetched.
    """
    run([sys.executable, "-m", "venv", "--without-pip", folder / "env"], folder)
    python = folder / "env" / "bin" / "python"
    packages = run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], folder).strip()
    # A path in a .pth file is searched, but its own .pth files are not read: an editable tvmdcn stays out.
    (Path(packages) / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index"]
    run([*pip, "--no-build-isolation", *install], folder)
    return python


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with the wheel installed."""
    return make_environment(tmp_path_factory.mktemp("installed"), wheel)


def expected_files() -> set[str]:
    """Return the files that an installed package must have, as paths under site-packages."""
    files = set()
    for folder, patterns in (
        ("tvmdcn", ("**/*.py", "py.typed", "bench/*.json", "report/templates/*")),
        ("schedules", ("**/*.py",)),
        ("tuning_logs", ("*.py", "*/*.json")),
    ):
        for pattern in patterns:
            for path in (ROOT / folder).glob(pattern):
                inner = path.relative_to(ROOT).as_posix()
                files.add(inner if folder == "tvmdcn" else f"tvmdcn/{inner}")
    return files


def test_packages_are_all_listed() -> None:
    settings = PROJECT["tool"]["setuptools"]
    found = set()
    for package, folder in settings["package-dir"].items():
        for marker in (ROOT / folder).rglob("__init__.py"):
            inner = marker.parent.relative_to(ROOT / folder).parts
            found.add(".".join((package, *inner)))
    assert set(settings["packages"]) == found


def test_wheel_holds_every_module_and_data_file(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        assert any(name.endswith("licenses/LICENSE") for name in archive.namelist())
    assert expected_files() <= names
    assert {name.split("/")[0] for name in names} == {"tvmdcn"}


def test_sdist_holds_what_its_tests_need(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "CHANGELOG.md", "constraints.txt", ".ci/run", "scripts/test"} <= names
    assert {f"tests/{path.name}" for path in (ROOT / "tests").glob("*.py")} <= names


def test_wheel_is_imported_from_where_it_was_installed(python: Path, tmp_path: Path) -> None:
    code = """
import json, tvmdcn, tvmdcn.schedules.llvm, tvmdcn.tuning_logs
from importlib import metadata, resources
records = resources.files("tvmdcn.tuning_logs")
print(json.dumps({
    "files": [tvmdcn.__file__, tvmdcn.schedules.__file__, tvmdcn.tuning_logs.__file__],
    "version": [tvmdcn.__version__, metadata.version("tvmdcn")],
    "targets": sorted(folder.name for folder in records.iterdir() if (folder / "meta.json").is_file()),
}))
"""
    seen = json.loads(run([python, "-c", code], tmp_path))
    installed = python.parents[1]
    assert all(Path(name).is_relative_to(installed) for name in seen["files"])
    assert seen["version"] == [PROJECT["project"]["version"]] * 2
    assert seen["targets"] == sorted(path.parent.name for path in (ROOT / "tuning_logs").glob("*/meta.json"))


def test_wheel_computes_outside_the_checkout(python: Path, tmp_path: Path) -> None:
    code = """
import numpy as np, tvmdcn
from tvmdcn.problems import TEST_PROBLEMS, make_tensors
from tvmdcn.reference import reference
problem = TEST_PROBLEMS["asymmetric_single"]
spec, tensors = problem.spec, make_tensors(problem.spec, problem.extents)
top, left, bottom, right = spec.padding
assert (top, left) == (bottom, right)
result = tvmdcn.deform_conv2d(
    tensors.input, tensors.offset, tensors.weight, tensors.bias,
    stride=spec.stride, padding=(top, left), dilation=spec.dilation, mask=tensors.mask,
)
expected = reference(spec, tensors)
assert result.shape == expected.shape and result.dtype == np.float32
np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
"""
    run([python, "-c", code], tmp_path)


def test_editable_install_finds_the_mapped_packages(tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    for name in ("tvmdcn", "schedules", "tuning_logs"):
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, checkout / name)
    python = make_environment(tmp_path, "--editable", checkout)
    code = (
        "import tvmdcn, tvmdcn.schedules.llvm, tvmdcn.tuning_logs as t; "
        "print(tvmdcn.__file__, tvmdcn.schedules.llvm.__file__, t.__file__, sep='\\n')"
    )
    for folder in (tmp_path, checkout):  # in the second, tvmdcn is also found as a folder beside the others
        files = list(map(Path, run([python, "-c", code], folder).split()))
        assert files == [
            checkout / "tvmdcn/__init__.py",
            checkout / "schedules/llvm/__init__.py",
            checkout / "tuning_logs/__init__.py",
        ]


def test_import_is_light(python: Path, tmp_path: Path) -> None:
    code = "import sys, tvmdcn; print(*(name for name in ('torch', 'tvm', 'tvm_ffi') if name in sys.modules))"
    assert run([python, "-c", code], tmp_path).split() == []


def test_import_leaves_no_trace(python: Path, tmp_path: Path) -> None:
    home, folder = tmp_path / "home", tmp_path / "empty"
    home.mkdir()
    folder.mkdir()
    code = """
import logging, signal, threading
before = logging.root.handlers[:], signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
import tvmdcn
assert before == (logging.root.handlers, signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))
assert not logging.getLogger("tvmdcn").handlers
assert threading.active_count() == 1
"""
    run(
        [python, "-B", "-c", code],
        folder,
        HOME=str(home),
        XDG_CACHE_HOME=str(home / "cache"),
        TVMDCN_CACHE_DIR=str(home / "kernels"),
    )
    assert not [*home.iterdir(), *folder.iterdir()]


def test_command_is_installed(python: Path, tmp_path: Path) -> None:
    command = python.parent / "tvmdcn"
    text = run([command, "--help"], tmp_path)
    listed = re.findall(r"^  ([a-z]+)  ", text.partition("Commands:")[2], re.MULTILINE)
    assert listed == ["tune", "records", "build", "pack", "benchmark", "onnx", "stages", "report", "info"]
    assert PROJECT["project"]["version"] in run([command, "--version"], tmp_path)
    assert "TVMDCN_CACHE_DIR" in run([command, "info"], tmp_path)


def test_command_refuses_in_words(python: Path, tmp_path: Path) -> None:
    command = [python.parent / "tvmdcn", "build", "--problem", "no_such_layer"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert "no_such_layer" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["apache-tvm", "apache-tvm-ffi"])
def test_installed_compiler_is_the_pinned_one(name: str) -> None:
    pins = {
        (requirement := Requirement(text)).name: requirement.specifier for text in PROJECT["project"]["dependencies"]
    }
    assert str(pins[name]) == f"=={importlib.metadata.version(name)}"


def test_compiler_and_ffi_can_save_a_function(tmp_path: Path) -> None:
    # With apache-tvm-ffi 0.1.15 this ends with signal 11, and so does every tuning; building still works.
    code = """
import tvm
from tvm import te
a = te.placeholder((4,), name="a")
function = te.create_prim_func([a, te.compute((4,), lambda i: a[i] + 1, name="b")])
tvm.ir.assert_structural_equal(function, tvm.ir.load_json(tvm.ir.save_json(function)))
"""
    run([sys.executable, "-c", code], tmp_path)


def test_constraints_pin_every_direct_dependency() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {
        requirement.name.lower().replace("_", "-"): requirement.specifier
        for requirement in (Requirement(line) for line in lines if not line.startswith("#"))
    }
    extras = PROJECT["project"]["optional-dependencies"]
    wanted = [*PROJECT["project"]["dependencies"], *(text for extra in extras.values() for text in extra)]
    for requirement in map(Requirement, wanted):
        if requirement.name == "tvmdcn":
            # CUDA's compiler and runtime are large, and a machine with a GPU has them as a rule.
            assert requirement.extras == set(extras) - {"all", "cuda"}
            continue
        (pin,) = pinned[requirement.name.lower()]
        assert pin.operator == "=="
        assert requirement.specifier.contains(pin.version), f"{requirement} excludes {pin} of constraints.txt"


def test_every_source_file_names_its_license() -> None:
    folders = ("tvmdcn", "schedules", "tuning_logs", "tests", "scripts")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    missing = [
        str(path.relative_to(ROOT))
        for path in files
        if "# SPDX-License-Identifier: Apache-2.0" not in path.read_text(encoding="utf-8").splitlines()[:2]
    ]
    assert len(files) > 20
    assert not missing
