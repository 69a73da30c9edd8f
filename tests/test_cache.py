# SPDX-License-Identifier: Apache-2.0
"""The cache directory: whom it is trusted from, and who may write now."""

from __future__ import annotations

import multiprocessing
import os
import signal
import stat
import threading
import time
from pathlib import Path

import handmade
import pytest
from fake_artifacts import build_fake, fake
from handmade import SPEC

from tvmdcn import cache
from tvmdcn.artifact import (
    find,
)
from tvmdcn.errors import ArtifactError

needs_posix = pytest.mark.skipif(os.name != "posix", reason="owners and modes are POSIX's")


# --- trust ----------------------------------------------------------------------------------------------


@needs_posix
@pytest.mark.parametrize("mode", [0o770, 0o777, 0o702])
@pytest.mark.parametrize("depth", range(4))
def test_directories_that_others_can_write_are_refused(cache_dir, mode, depth):
    artifact = build_fake()
    path = [cache_dir, cache_dir / "v2", artifact.path.parent, artifact.path][depth]
    path.chmod(mode)
    with pytest.raises(ArtifactError, match=rf"can be written by others \(mode {mode:04o}\).*chmod -R go-w"):
        find(artifact.key)
    with pytest.raises(ArtifactError, match="loading one runs its code"):
        build_fake()


@needs_posix
@pytest.mark.parametrize("name", ["kernel.so", "manifest.json"])
def test_files_that_others_can_write_are_refused(cache_dir, name):
    artifact = handmade.build(SPEC)
    (artifact.path / name).chmod(0o722)
    with pytest.raises(ArtifactError, match=rf"{name} can be written by others"):
        artifact.load()


@needs_posix
def test_directory_of_somebody_else_is_refused(cache_dir, monkeypatch):
    artifact = build_fake()
    mine = os.geteuid()
    if mine == 0:  # root's own files are trusted by everybody: pretend that they are not root's
        real = Path.lstat

        class Status:
            def __init__(self, status):
                self.st_mode, self.st_uid = status.st_mode, 4321

        monkeypatch.setattr(Path, "lstat", lambda self: Status(real(self)))
    else:
        monkeypatch.setattr(os, "geteuid", lambda: mine + 1)
    with pytest.raises(ArtifactError, match=r"belongs to user \d+, not to user \d+ who runs this"):
        find(artifact.key)


@needs_posix
def test_symbolic_links_are_refused(cache_dir, tmp_path):
    artifact = build_fake()
    moved = tmp_path / "moved"
    artifact.path.rename(moved)
    artifact.path.symlink_to(moved)
    with pytest.raises(ArtifactError, match="is a symbolic link"):
        find(artifact.key)


@needs_posix
def test_symbolic_link_to_a_cache_is_refused(cache_dir, tmp_path, monkeypatch):
    artifact = build_fake()
    link = tmp_path / "link"
    link.symlink_to(cache_dir)
    monkeypatch.setenv("TVMDCN_CACHE_DIR", str(link))
    with pytest.raises(ArtifactError, match=r"link is a symbolic link.*Set TVMDCN_CACHE_DIR to the directory itself"):
        find(artifact.key)


@needs_posix
def test_symbolic_link_to_a_library_is_refused(cache_dir, tmp_path):
    artifact = handmade.build(SPEC)
    moved = tmp_path / "kernel.so"
    artifact.library.rename(moved)
    artifact.library.symlink_to(moved)
    with pytest.raises(ArtifactError, match=r"kernel\.so is a symbolic link"):
        artifact.load()


def test_cache_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match=r"cannot be made: .*Set TVMDCN_CACHE_DIR"):
        build_fake(cache_dir=tmp_path / "file" / "cache")


def test_new_cache_is_private(tmp_path):
    root = tmp_path / "some" / "cache"
    build_fake(cache_dir=root)
    assert stat.S_IMODE(root.stat().st_mode) == 0o700


# --- locks ----------------------------------------------------------------------------------------------


def hold(path: Path, ready, seconds: float) -> None:
    with cache.lock(path):
        ready.set()
        time.sleep(seconds)


@pytest.fixture
def held(cache_dir):
    """A lock that another process holds; yields its path and that process."""
    path = cache_dir / "kernel"
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    process = context.Process(target=hold, args=(path, ready, 60))
    process.start()
    assert ready.wait(30)
    yield path, process
    process.kill()
    process.join()


def test_lock_names_its_holder(held, monkeypatch):
    path, process = held
    monkeypatch.setenv("TVMDCN_LOCK_TIMEOUT", "0.2")
    message = rf"process {process.pid} on .* has been building kernel; waited 0.2 s .*TVMDCN_LOCK_TIMEOUT"
    with pytest.raises(ArtifactError, match=message), cache.lock(path):
        pass


def test_lock_of_a_killed_process_is_free(held):
    path, process = held
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with cache.lock(path, timeout=10):
        pass


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": "x"}', '{"pid": 1, "host": "h", "since": 1e300}'])
def test_holder_that_cannot_be_read(held, text):
    path, _ = held
    (path.parent / ".kernel.holder").write_text(text)
    with pytest.raises(ArtifactError, match="another process has been building"), cache.lock(path, timeout=0):
        pass


def test_lock_may_be_taken_again_by_its_thread(cache_dir):
    path = cache_dir / "kernel"
    with cache.lock(path):
        with cache.lock(path, timeout=0):
            pass
        failures = []

        def take():
            try:
                with cache.lock(path, timeout=0):
                    pass
            except ArtifactError as error:
                failures.append(error)

        thread = threading.Thread(target=take)
        thread.start()
        thread.join()
        assert len(failures) == 1
    with cache.lock(path, timeout=0):
        pass


def test_lock_is_released_after_an_error(cache_dir):
    path = cache_dir / "kernel"
    with pytest.raises(KeyError), cache.lock(path):
        raise KeyError
    with cache.lock(path, timeout=0):
        pass


def test_threads_build_once(cache_dir):
    calls = []

    def slow(directory: Path):
        calls.append(1)
        time.sleep(0.2)
        return fake(directory)

    found = []
    threads = [threading.Thread(target=lambda: found.append(build_fake(make=slow))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert len(found) == 4
    assert len(set(map(id, found))) == 4
    assert all(artifact == found[0] for artifact in found)
