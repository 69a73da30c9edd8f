# SPDX-License-Identifier: Apache-2.0
"""The script for a machine with a GPU, as far as it goes without one: parts, time, and going on later."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import tarfile
import zipfile
from pathlib import Path

import pytest

from tvmdcn.bench.providers_cuda import GPU_PROVIDERS
from tvmdcn.problems import OPERATORS, load_problem_file

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("gpu_session", ROOT / "scripts" / "gpu_session.py")
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules["gpu_session"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["gpu_session"]


def test_parts_run_and_are_remembered(script, tmp_path):
    session = script.Session(tmp_path / "out", tmp_path / "scratch", None)
    environment = dict(os.environ)
    assert session.run(script.Part("one", ["-c", "print('hello')"]), 60, environment) == "done"
    assert session.run(script.Part("two", ["-c", "raise SystemExit(3)"]), 60, environment) == "failed (3)"
    assert "hello" in (session.work / "one.log").read_text()
    session.note("one", "done")
    folder = session.cache / "v2" / "cuda-sm_90" / "kernel"
    folder.mkdir(parents=True)
    device = {"cuda": "// source", "kernels": {"k": {"registers": 3}}}
    (folder / "manifest.json").write_text(json.dumps({"schedule": {"device": device}}))
    script.pack(session.work, session.cache, session.output)
    packed = session.output / script.PACKED
    assert sorted(path.name for path in session.output.iterdir()) == [script.PACKED]
    with tarfile.open(packed) as archive:
        assert {"./one.log", "./state.json", "./sources/kernel.cu"} <= set(archive.getnames())
    # On another machine, later.
    again = script.Session(tmp_path / "out2", tmp_path / "scratch2", packed)
    assert again.done == {"one": "done"}
    assert (again.work / "one.log").is_file()


def test_what_takes_too_long_is_cut_short(script, tmp_path):
    session = script.Session(tmp_path / "out", tmp_path / "scratch", None)
    part = script.Part("slow", ["-c", "import time; time.sleep(60)"], share=0.0)
    waits = []

    class Process:
        def wait(self, seconds=None):
            waits.append(seconds)
            if len(waits) == 1:
                raise script.subprocess.TimeoutExpired("slow", seconds)

        def terminate(self):
            waits.append("terminated")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script.subprocess, "Popen", lambda *_, **__: Process())
        assert session.run(part, 100, dict(os.environ)) == "cut short"
    assert waits == [20.0, "terminated", 20]


def test_parts_name_what_there_is(script, tmp_path):
    session = script.Session(tmp_path / "out", tmp_path / "scratch", None)
    script.write_problems(session.work)
    listed = script.parts("cuda", 100)
    assert len({part.name for part in listed}) == len(listed)
    for part in listed:
        words = [word.format(work=session.work, seconds="60") for word in part.command]
        for option, value in itertools.pairwise(words):
            if option == "--provider":
                assert value in GPU_PROVIDERS
            if option == "--operator":
                assert value in OPERATORS
            if option in ("--file", "--problem-file"):
                problems = load_problem_file(value)
                assert {problem.spec.layout for problem in problems} == {"NHWC"}
                kind = Path(value).stem.split("-")[1]
                assert {problem.spec.tf32 for problem in problems} == {kind == "tf32"}
                assert all(problem.name.endswith(kind) for problem in problems)


def test_carried_packages_are_unpacked(script, tmp_path):
    carried = tmp_path / "carried"
    carried.mkdir()
    with zipfile.ZipFile(carried / "package-1-py3-none-any.whl", "w") as archive:
        archive.writestr("package/__init__.py", "")
    script.unpack_carried(carried, tmp_path / "site")
    assert (tmp_path / "site" / "package" / "__init__.py").is_file()
    (carried / "package-1-py3-none-any.whl").unlink()
    script.unpack_carried(carried, tmp_path / "site")  # once
