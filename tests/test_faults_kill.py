# SPDX-License-Identifier: Apache-2.0
"""Kills (SIGKILL, at random moments and at every step) of building, packing, tuning and merging; and Ctrl-C.

Nothing that was measured is lost, nothing half-written is loaded, and the next run goes on.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import handmade
import pytest
from contributions import OTHER, TAG, log_text, record
from contributions import write as write_records
from fake_artifacts import build_fake, fake
from handmade import SPEC

from tvmdcn.artifact import find
from tvmdcn.cache_key import CacheKey
from tvmdcn.files import write_whole
from tvmdcn.target import detect_target
from tvmdcn.tuning.history import TrialLog, TrialRow, read_log
from tvmdcn.tuning.records import META, TuningRecords
from tvmdcn.tuning.records_merge import merge
from tvmdcn.tuning.scratch import scratch_directory

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and signals")

KILLS = {"build": 12, "pack": 10, "tune": 8, "tune with workers": 2}


def test_there_are_enough():
    assert sum(KILLS.values()) >= 30


def attempts(what: str, folder: Path, **environment: str) -> list[dict[str, Any]]:
    """Run the loop in a process of its own; return what it says of each attempt."""
    folder.chmod(0o700)
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("kill_targets.py")), what, str(folder), str(KILLS[what])],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "TVMDCN_RECORDS": str(folder), **environment},
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


# --- at random moments --------------------------------------------------------------------------------------


def test_building(tmp_path):
    *found, last = attempts("build", tmp_path)
    assert sum(attempt["killed"] for attempt in found) > len(found) / 3
    assert all(attempt["left"] <= 1 for attempt in found), "what a killed build left, the next one removes"
    name = last["last"]
    assert last["files"] == [f".{name}.lock", name]


def test_packing(tmp_path):
    *found, last = attempts("pack", tmp_path)
    assert sum(attempt["killed"] for attempt in found) > len(found) / 4
    assert all(attempt["found"] for attempt in found), "the pack is there all the time"
    assert all(attempt["left"] <= 1 for attempt in found)
    assert last["files"] == ["cache", "dcn_pack"]


def check_tuning(found: list[dict[str, Any]]) -> None:
    *tries, last = found
    assert all(attempt["killed"] for attempt in tries)
    for attempt in tries:
        assert not attempt["lost"]
        assert attempt["rows"] >= max(attempt["said"], attempt["was"]), "what was reported is on the disk"
        assert attempt["distinct"] == attempt["rows"], "nothing is measured twice"
        assert attempt["wrong"] == []
        assert attempt["began"] in (None, attempt["was"]), "it goes on where it was"
    assert tries[-1]["rows"] >= 1
    assert last == {"trials": last["was"] + 1, "new": 1, "was": tries[-1]["rows"]}


def test_tuning(tmp_path):
    check_tuning(attempts("tune", tmp_path))


def marked(mark: str) -> list[int]:
    """Return the processes whose environment holds a mark."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark.encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
    return found


def test_tuning_with_workers(tmp_path, monkeypatch):
    """Workers end when who started them is killed; what builds left goes when the next tuning begins."""
    pytest.importorskip("xgboost")
    scratch = tmp_path / "tmp"
    scratch.mkdir()
    mark = f"FAULTS_MARK={tmp_path}"
    check_tuning(attempts("tune with workers", tmp_path, TMPDIR=str(scratch), FAULTS_MARK=str(tmp_path)))
    until = time.monotonic() + 60
    while marked(mark) and time.monotonic() < until:
        time.sleep(0.1)
    assert marked(mark) == []
    left = list(scratch.glob("tvmdcn-tune-*"))
    for folder in left:
        os.utime(folder, (0, 0))  # they are young: perhaps just begun
    assert left
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    with scratch_directory():
        assert [folder for folder in left if folder.exists()] == []


def test_scratch_directories_of_the_living_stay(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with scratch_directory() as first:
        os.utime(first, (0, 0))
        with scratch_directory() as second:
            assert first.is_dir()
            assert first != second
    assert list(tmp_path.iterdir()) == []


# --- at every step ------------------------------------------------------------------------------------------


STEPS = {"open", "shutil.rmtree", "fcntl.flock", "fcntl.fcntl"} | {
    f"os.{name}"
    for name in ("chmod", "listdir", "mkdir", "remove", "rename", "rmdir", "scandir", "symlink", "truncate")
}


def killed_at(step: int, work: Callable[[], object]) -> bool:
    """Do something in a child that is killed before its n-th access to a file; return whether it came to that."""
    child = os.fork()
    if child == 0:
        count = 0

        def watch(event: str, _: object) -> None:
            nonlocal count
            if event in STEPS:
                count += 1
                if count > step:
                    os.kill(os.getpid(), signal.SIGKILL)

        with contextlib.suppress(BaseException):
            sys.addaudithook(watch)
            work()
            os._exit(0)
        os._exit(1)
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL), status
    return status != 0


def at_every_step(work: Callable[[], object], check: Callable[[], object]) -> int:
    """Kill at one step after the other, check each time, and return how many there are."""
    for step in range(1000):
        killed = killed_at(step, work)
        check()
        if not killed:
            return step
    raise AssertionError("it never ends")


def test_new_artifact_at_every_step(cache_dir):
    key = CacheKey.of(SPEC, detect_target(), "tuned")

    def check() -> None:
        found = find(key)
        if found is not None:
            assert found.library.read_bytes() == b"not a library"
            assert sorted(p.name for p in found.path.iterdir()) == ["kernel.so", "manifest.json"]
            found.discard()

    assert at_every_step(build_fake, check) > 20
    artifact = build_fake()
    assert [p.name for p in artifact.path.parent.iterdir() if "staging" in p.name] == []


def test_artifact_that_is_replaced_at_every_step(cache_dir):
    before = build_fake()

    def other(directory: Path) -> Any:
        interface, _ = fake(directory)
        (directory / "kernel.so").write_bytes(b"another")
        return interface, {}

    def check() -> None:
        found = find(before.key)
        assert found is not None, "there is one at all times"
        content = found.library.read_bytes()
        assert content in (b"not a library", b"another")
        assert hashlib.sha256(content).hexdigest() == found.sha256, "manifest and library are of one build"

    def replace() -> None:
        build_fake(make=other, rebuild=True)

    assert at_every_step(replace, check) > 20
    assert find(before.key).library.read_bytes() == b"another"


def test_records_at_every_step(tmp_path):
    root = write_records(tmp_path / "root", record())

    def check() -> None:
        found = TuningRecords.read(root, TAG).records
        assert record() in found
        assert len(found) <= 2
        TuningRecords(TAG, [record()]).write(root)

    assert at_every_step(lambda: TuningRecords.keep(root, TAG, record(OTHER)), check) > 8
    TuningRecords.keep(root, TAG, record(OTHER))
    assert sorted(p.name for p in (root / TAG).iterdir()) == [".meta.lock", META]


def test_log_at_every_step(tmp_path):
    path, row = tmp_path / "trials" / "layer.jsonl", TrialRow(record().decisions, 1e-3, "", 1.0)
    rows = 0

    def check() -> None:
        nonlocal rows
        if path.exists():
            found = len(read_log(path)[1])
            assert found >= rows
            rows = found

    at_every_step(lambda: TrialLog(path, {"name": "x"}).add(row), check)
    assert rows >= 1


def test_merge_at_every_step(tmp_path):
    new = record(default=9e-3)
    yours = write_records(tmp_path / "yours", new, record(OTHER), log=log_text(new, [1e-3]))
    mine = tmp_path / "mine"
    write_records(mine, record(), log=log_text(record(), [2e-3]))
    logs = {log_text(record(), [2e-3]), log_text(new, [1e-3])}
    list(merge(yours, tmp_path / "first"))  # what is imported is imported

    def check() -> None:
        found = TuningRecords.read(mine, TAG).records
        assert record() in found or new in found
        texts = {path.read_text() for path in (mine / TAG).rglob("*.jsonl")}
        assert log_text(record(), [2e-3]) in texts, "no trial is lost"
        assert texts <= logs

    assert at_every_step(lambda: list(merge(yours, mine)), check) > 20
    assert {found.spec: found for found in TuningRecords.read(mine, TAG).records} == {
        new.spec: new,
        OTHER: record(OTHER),
    }


def test_page_at_every_step(tmp_path):
    page = tmp_path / "page"
    page.write_text("before")

    def check() -> None:
        assert page.read_text() in ("before", "after")

    at_every_step(lambda: write_whole(page, "after"), check)
    assert page.read_text() == "after"


# --- Ctrl-C -------------------------------------------------------------------------------------------------

_BUILD = """
import sys, time
sys.path[:0] = [{tests!r}, {root!r}]
import handmade
compile_library = handmade.compile_library
def slow(spec, library):
    library.write_bytes(b"half")
    print("building", flush=True)
    time.sleep(30)
    return compile_library(spec, library)
handmade.compile_library = slow
handmade.build(handmade.SPEC)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_during_a_build(number, cache_dir):
    code = _BUILD.format(tests=str(handmade.ROOT / "tests"), root=str(handmade.ROOT))
    # A shell that started this in the background has interrupts ignored, and children inherit that.
    process = subprocess.Popen(
        [sys.executable, "-c", "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n" + code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "building\n"
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == -number
    if number == signal.SIGINT:
        assert "KeyboardInterrupt" in errors
        assert list(cache_dir.rglob("*staging*")) == [], "Ctrl-C leaves nothing behind"
        assert list(cache_dir.rglob("*.holder")) == []
    assert find(CacheKey.of(SPEC, detect_target(), "tuned")) is None
    artifact = handmade.build(SPEC)
    artifact.load()
    assert list(cache_dir.rglob("*staging*")) == []
