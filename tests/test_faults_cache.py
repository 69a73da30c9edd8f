# SPDX-License-Identifier: Apache-2.0
"""A cache in places and states that nobody wishes for: others' users, odd paths, no home, a clock that jumps, locks."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
import socket
import stat
import subprocess
import sys
import textwrap
import threading
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import handmade
import platformdirs
import pytest
from contributions import TAG, record
from contributions import write as write_records
from fake_artifacts import build_fake, fake, never
from handmade import EXTENTS, SPEC, call, error, kernel_of

from tvmdcn import artifact as artifact_module
from tvmdcn import cache, env, native, runtime
from tvmdcn.artifact import Artifact, DamagedArtifact, _seal, artifacts, find
from tvmdcn.cache_key import ABI, SCHEMA, CacheKey, record_roots
from tvmdcn.errors import ArtifactError, ArtifactMissing, RecordsError, SettingError
from tvmdcn.packs.pack import KernelPack
from tvmdcn.target import detect_target
from tvmdcn.tensors import make_tensors
from tvmdcn.tuning.records import TuningRecords, user_root

needs_root = pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="needs root, to become others")
NOBODY, OTHER_USER = 65534, 65533


@pytest.fixture(autouse=True)
def builder(monkeypatch):
    handmade.install(monkeypatch)


def key() -> CacheKey:
    return CacheKey.of(SPEC, detect_target(), "tuned")


def right(kernel: Any) -> bool:
    tensors = make_tensors(SPEC, EXTENTS)
    return error(call(kernel, tensors), SPEC, tensors) < 1e-6


# --- users --------------------------------------------------------------------------------------------------


def as_user(user: int, work: Any, **environment: str | None) -> str:
    """Do something in a child as another user; return what it returns, or the error as "Type: message"."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            for name, value in environment.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value
            os.setgroups([])
            os.setgid(user)
            os.setuid(user)
            result = str(work())
        except BaseException as error:
            result = f"{type(error).__name__}: {error}"
        os.write(writer, result.encode()[:60_000])
        os._exit(0)
    os.close(writer)
    with open(reader) as said:
        text = said.read()
    os.waitpid(child, 0)
    return text


@pytest.fixture
def open_place():
    """A directory that every user can reach and nobody but its owner write; pytest's own are for this user alone."""
    import tempfile

    place = Path(tempfile.mkdtemp(prefix="tvmdcn-faults-"))
    place.chmod(0o755)
    yield place
    shutil.rmtree(place)


def given_to(folder: Path, user: int) -> Path:
    for path in (folder, *folder.rglob("*")):
        os.chown(path, user, user)
    return folder


@needs_root
def test_kernels_of_another_user_are_not_loaded(open_place, monkeypatch):
    runtime_of = native.runtime()  # found before: nobody may look for it
    assert runtime_of is not None
    root = open_place / "cache"
    handmade.build(SPEC, cache_dir=root)
    given_to(root, OTHER_USER)
    for path in root.rglob("*"):
        path.chmod(0o755)
    root.chmod(0o755)
    found = as_user(NOBODY, lambda: find(key(), root))
    assert found.startswith("ArtifactError: ")
    assert f"belongs to user {OTHER_USER}, not to user {NOBODY} who runs this" in found
    assert "Set TVMDCN_CACHE_DIR to a directory of your own." in found
    assert "belongs to user" in as_user(NOBODY, lambda: handmade.build(SPEC, cache_dir=root))


@needs_root
def test_kernels_of_root_are_loaded(open_place):
    native.runtime()
    root = open_place / "cache"
    handmade.build(SPEC, cache_dir=root)
    for path in (root, *root.rglob("*")):
        path.chmod(0o755)
    assert as_user(NOBODY, lambda: find(key(), root).load().path.name) == "kernel.so"


@needs_root
def test_private_cache_of_another_user_is_refused_in_words(open_place):
    root = open_place / "cache"
    handmade.build(SPEC, cache_dir=root)
    given_to(root, OTHER_USER)
    for work in (
        lambda: find(key(), root),
        lambda: list(artifacts(root)),
        lambda: handmade.build(SPEC, cache_dir=root),
    ):
        found = as_user(NOBODY, work)
        assert found.startswith("ArtifactError: ") or found == "[]"
        assert "Traceback" not in found


@needs_root
def test_two_users_with_caches_of_their_own(open_place):
    native.runtime()
    shared = open_place / "shared"
    shared.mkdir()
    shared.chmod(0o1777)  # as /tmp is

    def build() -> str:
        root = shared / str(os.getuid())
        return f"{handmade.build(SPEC, cache_dir=root).load().path.relative_to(root).name} {root.stat().st_mode:o}"

    for user in (NOBODY, OTHER_USER):
        assert as_user(user, build) == "kernel.so 40700"
    found = as_user(NOBODY, lambda: find(key(), shared / str(OTHER_USER)))
    assert found.startswith("ArtifactError: ")


@needs_root
def test_cache_below_a_directory_that_all_can_write(open_place):
    shared = open_place / "shared"
    shared.mkdir()
    shared.chmod(0o777)  # without the bit that /tmp has, anybody may rename what is in it
    found = as_user(NOBODY, lambda: handmade.build(SPEC, cache_dir=shared / "cache"))
    assert f"lies in {shared}, which everybody can write (mode 0777)" in found
    assert f"chmod +t {shared}" in found
    shared.chmod(0o1777)
    assert "kernel.so" in as_user(NOBODY, lambda: handmade.build(SPEC, cache_dir=shared / "cache").library)


@needs_root
def test_read_only_cache(open_place, monkeypatch):
    """What is in it is used; what is not is an error that says so; nobody waits for a lock."""
    native.runtime()
    root = open_place / "cache"
    handmade.build(SPEC, cache_dir=root)
    for path in (root, *root.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    assert as_user(NOBODY, lambda: right(kernel_of(cache_dir=root))) == "True"
    found = as_user(NOBODY, lambda: kernel_of(handmade.variant(dtype="float64"), cache_dir=root))
    assert found.startswith("ArtifactError: ")
    assert "cannot be written. Set TVMDCN_CACHE_DIR to one that can, or TVMDCN_BUILD=never" in found


@needs_root
def test_read_only_file_system(tmp_path):
    place = tmp_path / "disk"
    place.mkdir()
    options = "size=1m,mode=0700"
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], capture_output=True).returncode:
        pytest.skip("mounting a small file system is not allowed here")
    try:
        root = place / "cache"
        artifact = handmade.build(SPEC, cache_dir=root)
        write_records(place / "records", record())
        subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
        assert right(kernel_of(cache_dir=root))
        with pytest.raises(ArtifactError, match=r"cannot be (made|written)"):
            kernel_of(handmade.variant(dtype="float64"), cache_dir=root)
        with pytest.raises(RecordsError, match="cannot be written: Read-only file system"):
            TuningRecords.keep(place / "records", TAG, record(threads=2))
        assert find(key(), root) == artifact
        assert len(TuningRecords.read(place / "records", TAG).records) == 1
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


@needs_root
def test_records_that_may_not_be_read(open_place, monkeypatch):
    root = write_records(open_place / "records", record(), tag=detect_target().tag)
    (root / detect_target().tag / "meta.json").chmod(0o000)
    found = as_user(NOBODY, key, TVMDCN_RECORDS=str(root))
    assert found.startswith("RecordsError: the tuning records of ")
    assert "Set TVMDCN_RECORDS to a directory that can be." in found
    root.chmod(0o000)
    found = as_user(NOBODY, key, TVMDCN_RECORDS=str(root))
    assert found.startswith(("RecordsError", "SettingError", "CacheKey"))


# --- links and modes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pipe", "socket", "directory"])
@pytest.mark.parametrize("name", ["kernel.so", "manifest.json"])
def test_neither_file_nor_directory(kind, name, cache_dir, tmp_path, monkeypatch):
    """A pipe in the place of a file must not be waited for."""
    artifact = handmade.build(SPEC)
    place = artifact.path / name
    place.unlink()
    if kind == "pipe":
        os.mkfifo(place)
    elif kind == "socket":
        monkeypatch.chdir(artifact.path)  # names of sockets are short
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(name)
    else:
        place.mkdir()
    if name == "manifest.json":
        assert find(artifact.key) is None
        with pytest.raises(ArtifactError, match=r"manifest\.json is not a file|holds no artifact"):
            Artifact.read(artifact.path)
    else:
        with pytest.raises(ArtifactError, match=r"kernel\.so (is neither a file nor a directory|cannot be read)"):
            artifact.load()


def test_link_in_every_place(cache_dir, tmp_path):
    artifact = handmade.build(SPEC)
    places = [artifact.library, artifact.path / "manifest.json", artifact.path, artifact.path.parent, cache_dir / "v2"]
    for number, place in enumerate(places):
        moved = tmp_path / f"moved{number}"
        place.rename(moved)
        place.symlink_to(moved)
        with pytest.raises(ArtifactError, match="is a symbolic link, so kernels in it are not loaded"):
            kernel_of()
        place.unlink()
        moved.rename(place)
    assert right(kernel_of())


# --- paths --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["with spaces", "ünïcödé 变形 🎯", "quote'\"$(x);`&", "-rf", "a" * 200, "percent%s{0}", "new\nline"],
    ids=ascii,
)
def test_odd_names(name, tmp_path, monkeypatch):
    root = tmp_path / name / "cache"
    monkeypatch.setenv("TVMDCN_CACHE_DIR", str(root))
    assert right(kernel_of())
    monkeypatch.setattr(runtime, "_loaded", {})
    monkeypatch.setenv("TVMDCN_BUILD", "never")
    assert right(kernel_of())


def test_odd_names_with_the_compiler(tmp_path):
    from tvmdcn.builder import build
    from tvmdcn.spec import DeformConv2dSpec

    root = tmp_path / "ünïcödé 'and' spaces; 变形"
    build(DeformConv2dSpec(4, 4, 1), schedule="naive", cache_dir=root).load()


def test_name_that_is_no_text(tmp_path):
    root = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe"))
    with pytest.raises(ArtifactError, match="has a name that is not UTF-8"):
        handmade.build(SPEC, cache_dir=root)
    assert find(key(), root) is None


def test_path_that_is_long(tmp_path):
    """Up to the limit of the system it works; from there on it is refused, wherever the limit is met."""
    outcomes, refusals = set(), []
    for length in (1000, 3000, 3700, 3900, 3990, 4100, 9000):
        root = tmp_path
        while len(str(root)) < length:
            root /= "d" * min(200, length - len(str(root)))
        try:
            outcomes.add(handmade.build(SPEC, cache_dir=root).load() is not None)
        except (ArtifactError, handmade.BuildError) as refusal:
            outcomes.add(type(refusal).__name__)
        try:
            find(key(), root)
        except ArtifactError as refusal:
            refusals.append("File name too long" in str(refusal))
    assert True in outcomes
    assert "ArtifactError" in outcomes
    assert refusals
    assert all(refusals)


@pytest.mark.parametrize("name", ["TVMDCN_CACHE_DIR", "TVMDCN_RECORDS"])
def test_setting_that_is_too_long(name, monkeypatch):
    monkeypatch.setenv(name, "/" + "d" * 5000)
    with pytest.raises(SettingError, match=f"{name}=.* cannot be used: File name too long"):
        kernel_of()


def in_a_process(code: str, **environment: str | None) -> subprocess.CompletedProcess:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("TVMDCN_", "XDG_"))}
    for name, value in environment.items():
        kept.pop(name, None)
        if value is not None:
            kept[name] = value
    prelude = f"import sys; sys.path[:0] = [{str(handmade.ROOT / 'tests')!r}, {str(handmade.ROOT)!r}]\n"
    return subprocess.run(
        [sys.executable, "-c", prelude + textwrap.dedent(code)], capture_output=True, text=True, env=kept
    )


def test_home_that_does_not_exist(tmp_path):
    """It is made if it can be; where it cannot, the message names the setting."""
    code = "import handmade; print(handmade.build(handmade.SPEC).path)"
    home = tmp_path / "no" / "home"
    done = in_a_process(code, HOME=str(home))
    assert Path(done.stdout.strip()).is_relative_to(home), done.stderr
    assert stat.S_IMODE((home / ".cache" / "tvmdcn").stat().st_mode) == 0o700
    done = in_a_process(code, HOME="/dev/null/home")
    assert "cannot be made: Not a directory. Set TVMDCN_CACHE_DIR to a directory that can be written." in done.stderr


@needs_root
def test_user_without_a_home(tmp_path):
    """As in containers that run as any number: nothing is put into the working directory."""
    nameless = 4321
    gone = {"HOME": None, "TVMDCN_CACHE_DIR": None, "TVMDCN_RECORDS": None, "XDG_CACHE_HOME": None}
    platformdirs.user_cache_dir("tvmdcn")  # what it imports is imported: others may not read it
    found = as_user(nameless, env.cache_dir, **gone)
    assert found.startswith("HomelessError: TVMDCN_CACHE_DIR is not set, and its default is in the home of the user")
    found = as_user(nameless, user_root, **gone)
    assert found.startswith("HomelessError: TVMDCN_RECORDS is not set")
    assert as_user(nameless, lambda: len(record_roots()), **gone) == "1", "the records that ship are used"


@needs_root
def test_home_of_somebody_else(open_place):
    """As sudo may leave it: no records of one's own, and a cache that must be named."""
    home = open_place / "home"
    (home / ".local").mkdir(parents=True)
    home.chmod(0o700)
    gone = {"HOME": str(home), "TVMDCN_CACHE_DIR": None, "TVMDCN_RECORDS": None}
    assert as_user(NOBODY, lambda: len(record_roots()), **gone) == "1"
    assert as_user(NOBODY, lambda: type(key()).__name__, **gone) == "CacheKey"
    found = as_user(NOBODY, lambda: handmade.build(SPEC), **gone)
    assert found.startswith("ArtifactError: the cache directory ")
    assert "cannot be made: Permission denied. Set TVMDCN_CACHE_DIR to a directory that can be written." in found


# --- locks --------------------------------------------------------------------------------------------------


def test_note_of_a_holder_that_died(cache_dir, monkeypatch):
    """Its lock is free; and somebody else's is not said to be its."""
    path = cache_dir / "kernel"
    note = cache_dir / ".kernel.holder"
    dead = subprocess.Popen([sys.executable, "-c", "pass"])
    dead.wait()
    old = {"pid": dead.pid, "host": socket.gethostname(), "since": time.time(), "start": 12345}
    note.write_text(json.dumps(old))
    with cache.lock(path, timeout=0):
        assert json.loads(note.read_text())["pid"] == os.getpid()
        said = cache._holder(note)
        assert f"process {os.getpid()} on {socket.gethostname()}" in said
    assert not note.exists()
    # Its number is another's by now: this very process's, which began at another time.
    for pid in (dead.pid, os.getpid()):
        note.write_text(json.dumps({**old, "pid": pid}))
        assert cache._holder(note).startswith(f"another process (not {pid}, which took the lock at ")
    # Of another machine nothing can be known.
    note.write_text(json.dumps({**old, "host": "elsewhere"}))
    assert cache._holder(note).startswith(f"process {dead.pid} on elsewhere (since ")


def test_time_out_names_the_holder_and_what_to_do(cache_dir, monkeypatch):
    ready, done, said = threading.Event(), threading.Event(), []

    def hold() -> None:
        with cache.lock(key().path(cache_dir)):
            ready.set()
            done.wait(30)

    cache.make_private(key().path(cache_dir).parent, cache_dir)
    thread = threading.Thread(target=hold)
    thread.start()
    ready.wait()
    monkeypatch.setenv("TVMDCN_LOCK_TIMEOUT", "0.1")
    try:
        with pytest.raises(ArtifactError) as caught:
            kernel_of()
        said.append(str(caught.value))
    finally:
        done.set()
        thread.join()
    assert f"process {os.getpid()} on {socket.gethostname()} (since 2" in said[0]
    assert "waited 0.1 s for it. Wait longer with TVMDCN_LOCK_TIMEOUT=seconds, or stop that process" in said[0]
    assert right(kernel_of())


def test_lock_file_that_is_left_is_no_lock(cache_dir):
    folder = key().path(cache_dir).parent
    cache.make_private(folder, cache_dir)
    (folder / f".{key().path(cache_dir).name}.lock").write_text("12345")
    assert build_fake().path.is_dir()


def test_lock_that_cannot_be_made(cache_dir):
    folder = key().path(cache_dir).parent
    cache.make_private(folder, cache_dir)
    (folder / f".{key().path(cache_dir).name}.lock").mkdir()
    with pytest.raises(ArtifactError, match=r"cannot be locked: .* Set TVMDCN_CACHE_DIR to a local directory"):
        build_fake()


def test_fork_of_a_process_that_builds(cache_dir):
    """A child must not wait for a thread that only its parent has, nor hold its lock when that is gone."""
    building, go = threading.Event(), threading.Event()

    def slow(directory: Path) -> Any:
        building.set()
        go.wait(60)
        return handmade.compile_library(SPEC, directory / "kernel.so"), {}

    thread = threading.Thread(target=lambda: build_fake(make=slow))
    with runtime._locks.setdefault("a kernel", threading.RLock()):
        thread.start()
        building.wait()
    runtime._watch_forks()
    held = threading.Thread(target=lambda: runtime._locks["a kernel"].acquire())
    held.start()
    held.join()
    child = os.fork()
    if child == 0:
        free = runtime._locks.setdefault("a kernel", threading.RLock()).acquire(blocking=False)
        os._exit(0 if free else 3)
    assert os.waitpid(child, 0)[1] == 0
    sleeper = os.fork()
    if sleeper == 0:
        time.sleep(60)
        os._exit(0)
    go.set()
    thread.join()
    try:
        with cache.lock(key().path(cache_dir), timeout=5):
            pass
    finally:
        os.kill(sleeper, 9)
        os.waitpid(sleeper, 0)
    assert find(key()) is not None
    runtime._locks.clear()


# --- removed, replaced and other versions -------------------------------------------------------------------


@pytest.mark.parametrize("what", ["kernel.so", "manifest.json", "directory", "cache"])
def test_removed_between_finding_and_loading(what, cache_dir, monkeypatch):
    artifact = handmade.build(SPEC)
    real, removed = artifact_module.find, []

    def find_and_remove(*arguments: Any) -> Any:
        found = real(*arguments)
        if found is not None and not removed:
            removed.append(1)
            place = {"directory": artifact.path, "cache": cache_dir / "v2"}.get(what, artifact.path / what)
            shutil.rmtree(place) if place.is_dir() else place.unlink()
        return found

    monkeypatch.setattr(runtime, "find", find_and_remove)
    assert right(kernel_of()), "it is built again"
    assert removed


def test_removed_while_it_is_read(cache_dir, monkeypatch):
    artifact = handmade.build(SPEC)
    real = native.load_module

    def load_and_remove(path: Path) -> Any:
        path.unlink()
        return real(path)

    with monkeypatch.context() as patch:
        patch.setattr(native, "load_module", load_and_remove)
        with pytest.raises(DamagedArtifact, match=r"was removed while it was loaded\. Load again"):
            artifact.load()
    assert right(kernel_of())


def test_replaced_while_it_is_read(cache_dir, monkeypatch):
    """With TVMDCN_BUILD=never, too: a rebuild next door is no damage."""
    first = handmade.build(SPEC)
    real, turns = Artifact.read.__func__, []

    def read_and_replace(cls: Any, path: Path) -> Artifact:
        found = real(cls, path)
        if not turns:
            turns.append(1)
            shutil.copy(found.library, found.path.parent / "copy")
            handmade.build(handmade.variant(), rebuild=True)
        return found

    monkeypatch.setenv("TVMDCN_BUILD", "never")
    monkeypatch.setattr(handmade, "compile_library", _with_another_digest(handmade.compile_library))
    monkeypatch.setattr(Artifact, "read", classmethod(read_and_replace))
    assert right(kernel_of())
    assert find(key()).sha256 != first.sha256


def _with_another_digest(compile_library: Any) -> Any:
    def compiled(spec: Any, library: Path) -> Any:
        interface = compile_library(spec, library)
        with open(library, "ab") as file:
            file.write(b"another")
        return interface

    return compiled


def test_builds_that_replace_one_another_all_load(cache_dir, monkeypatch):
    monkeypatch.setenv("TVMDCN_BUILD", "rebuild")
    code = "import pytest, handmade; handmade.install(pytest.MonkeyPatch()); handmade.kernel_of(); print('loaded')"
    found = []
    workers = [threading.Thread(target=lambda: found.append(_rebuilding(code, cache_dir))) for _ in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [done.stdout for done in found] == ["loaded\n"] * 6, [done.stderr for done in found]


def _rebuilding(code: str, root: Path) -> subprocess.CompletedProcess:
    return in_a_process(code, TVMDCN_CACHE_DIR=str(root), TVMDCN_BUILD="rebuild")


VERSIONS = {
    "tvm": "0.99.0",
    "tvm_ffi": "9.9.9",
    "source": "0" * 64,
}


@pytest.mark.parametrize("field", VERSIONS)
def test_artifact_of_another_version_is_a_miss(field, cache_dir, monkeypatch):
    other = dataclasses.replace(key(), **{field: VERSIONS[field]})
    artifact_module.build_once(other, detect_target(), fake)
    assert find(key()) is None
    monkeypatch.setenv("TVMDCN_BUILD", "never")
    with pytest.raises(ArtifactMissing, match=f"it differs in {field}: "):
        kernel_of()
    # in the place of the right one it is none, either
    (found,) = artifacts()
    found.path.rename(key().path(cache_dir))
    assert find(key()) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": SCHEMA + 1}, f"its schema is {SCHEMA + 1}, this version reads {SCHEMA}"),
        ({"schema": SCHEMA + 1, "new_field": 1}, f"its schema is {SCHEMA + 1}, this version reads {SCHEMA}"),
        ({"schema": float(SCHEMA)}, "its schema is 2.0"),
        ({"schema": None}, "its schema is None"),
        ({"new_field": 1}, "it must have the fields "),
        ({"key": {"abi": ABI + 1}}, f"its kernel has interface {ABI + 1}, this version calls {ABI}"),
    ],
)
def test_manifest_of_another_version(change, message, cache_dir, caplog):
    artifact = build_fake()
    manifest = artifact.path / "manifest.json"
    data = json.loads(manifest.read_text())
    for name, value in change.items():
        data[name] = {**data[name], **value} if isinstance(value, dict) else value
    data["digest"] = _seal(data)
    manifest.write_text(json.dumps(data))
    with pytest.raises(ArtifactError, match=message):
        Artifact.read(artifact.path)
    assert find(artifact.key) is None
    assert "It is taken for missing." in caplog.text
    assert build_fake().created != artifact.created


def test_newer_schema_has_a_place_of_its_own(cache_dir, monkeypatch):
    monkeypatch.setattr("tvmdcn.cache_key.SCHEMA", SCHEMA + 1)
    newer = dataclasses.replace(key(), schema=SCHEMA + 1)
    assert newer.path(cache_dir).parts[-3] == f"v{SCHEMA + 1}"


def test_pack_and_records_of_another_version(tmp_path):
    (tmp_path / "manifest.json").write_text(json.dumps({"format": "tvmdcn pack", "schema": 2, "new": 1}))
    tmp_path.chmod(0o700)
    with pytest.raises(ArtifactError, match="its schema is 2, and this version of tvmdcn reads packs of schema 1"):
        KernelPack.read(tmp_path)
    (tmp_path / TAG).mkdir()
    (tmp_path / TAG / "meta.json").write_text(json.dumps({"schema": 2, "target": TAG, "records": {}}))
    with pytest.raises(RecordsError, match="its schema is not 1"):
        TuningRecords.read(tmp_path, TAG)


# --- clocks -------------------------------------------------------------------------------------------------


class _Jumping(datetime):
    """A clock that goes a year forth or back at each look."""

    turns = 0

    @classmethod
    def now(cls, tz: Any = None) -> datetime:
        cls.turns += 1
        return datetime(2026 + (-1) ** cls.turns, 1, 1, tzinfo=timezone.utc)


def test_clock_that_jumps(cache_dir, tmp_path, monkeypatch):
    times = iter([1e9, -5.0, 4e9, 0.0] * 1000)
    monkeypatch.setattr("tvmdcn.artifact.datetime", _Jumping)
    monkeypatch.setattr(time, "time", lambda: next(times))
    first = build_fake()
    assert build_fake(make=never) == first
    second = build_fake(rebuild=True)
    assert find(first.key) == second
    assert len(list(artifacts())) == 1
    for _ in range(4):
        with cache.lock(cache_dir / "kernel", timeout=1):
            assert "process" in cache._holder(cache_dir / ".kernel.holder")


def test_files_of_one_time_and_size_are_told_apart(tmp_path):
    """A clock that stands still, or a coarse one: two contents with one time."""
    root = write_records(tmp_path / "root", record(seconds=1e-3))
    meta = root / TAG / "meta.json"
    status = meta.stat()
    assert TuningRecords.read(root, TAG).records[0].seconds == 1e-3
    write_records(root, record(seconds=2e-3))
    assert meta.stat().st_size == status.st_size
    os.utime(meta, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert TuningRecords.read(root, TAG).records[0].seconds == 2e-3


def test_files_from_the_future(cache_dir):
    artifact = handmade.build(SPEC)
    for path in (artifact.library, artifact.path / "manifest.json", artifact.path):
        os.utime(path, (4e9, 4e9))
    assert find(artifact.key) == artifact
    assert right(kernel_of())


def test_logging_bears_what_stands_in_files(cache_dir, caplog):
    caplog.set_level(logging.DEBUG)
    artifact = build_fake()
    data = json.loads((artifact.path / "manifest.json").read_text())
    data["target"]["mcpu"] = "\ud800\x1b[31m"
    data["digest"] = _seal(data)
    (artifact.path / "manifest.json").write_text(json.dumps(data))
    assert find(artifact.key) is None
    for entry in caplog.records:
        entry.getMessage().encode()
        assert "\x1b" not in entry.getMessage()
