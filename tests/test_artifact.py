# SPDX-License-Identifier: Apache-2.0
"""Artifacts and their cache: keys, damage, trust, locks, and writes that are all or nothing."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import multiprocessing
import os
import re
import signal
import stat
import threading
import time
from pathlib import Path

import handmade
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tvmdcn import cache, target
from tvmdcn.artifact import (
    Artifact,
    DamagedArtifact,
    KernelInterface,
    artifacts,
    build_once,
    find,
    nearest,
)
from tvmdcn.cache_key import CacheKey, records_digest, source_digest
from tvmdcn.errors import ArtifactError, BuildError, SpecError
from tvmdcn.spec import DeformConv2dSpec
from tvmdcn.target import detect_target, resolve_target

SPEC = DeformConv2dSpec(6, 2, (3, 2), (2, 1), (1, 0), (2, 1), groups=2, offset_groups=3)
INTERFACE = KernelInterface(6, 3, (2, 1, 6, 3, 4), "float32", "NCHW")
needs_posix = pytest.mark.skipif(os.name != "posix", reason="owners and modes are POSIX's")


def fake(directory: Path) -> tuple[KernelInterface, dict[str, str]]:
    """Write a library that is none: for tests that never load it."""
    (directory / "kernel.so").write_bytes(b"not a library")
    return INTERFACE, {"source": "test"}


def build_fake(schedule: str = "tuned", spec: DeformConv2dSpec = SPEC, make=fake, **options) -> Artifact:
    host = detect_target()
    return build_once(CacheKey.of(spec, host, schedule), host, make, **options)


def never(directory: Path):
    raise AssertionError("built again")


# --- keys ------------------------------------------------------------------------------------------------------


def test_every_ingredient_changes_the_key():
    key = CacheKey.of(SPEC, detect_target(), "tuned")
    changes = {
        "operator": "other",
        "spec": {**key.spec, "in_channels": 12},
        "target": resolve_target("x86-64-v2").identity(),
        "schedule": "default",
        "decisions": "0" * 64,
        "records": "1" * 64,
        "source": "2" * 64,
        "tvm": "0.28.0",
        "tvm_ffi": "0.1.15",
        "abi": 99,
        "schema": 99,
    }
    assert set(changes) == {field.name for field in dataclasses.fields(key)}
    digests = {key.digest()}
    for name, value in changes.items():
        other = dataclasses.replace(key, **{name: value})
        digests.add(other.digest())
        lines = key.explain_difference(other)
        assert lines, name
        assert all(line.startswith(name) for line in lines)
    assert len(digests) == len(changes) + 1
    assert key.explain_difference(key) == []


def test_differences_are_explained_in_words():
    key = CacheKey.of(SPEC, detect_target(), "tuned")
    other = dataclasses.replace(key, spec={**key.spec, "dtype": "float16"}, tvm="0.28.0", records="a" * 64)
    spec, records, tvm = key.explain_difference(other)
    assert spec == "spec.dtype: 'float16', wanted 'float32'"
    assert re.fullmatch(r"records: aaaaaaaaaaaa\.\.\., wanted [0-9a-f]{12}\.\.\.", records)
    assert tvm == f"tvm: '0.28.0', wanted {key.tvm!r}"


def test_key_survives_json():
    key = CacheKey.of(SPEC, detect_target(), "tuned")
    again = CacheKey.from_json(json.loads(json.dumps(key.to_json())))
    assert again == key
    assert again.digest() == key.digest()


def test_key_is_path_of_readable_name(tmp_path):
    path = CacheKey.of(SPEC, resolve_target("cascadelake"), "default").path(tmp_path)
    assert path.parent == tmp_path / "v1" / "llvm-cascadelake"
    assert re.fullmatch(rf"deform_conv2d-{re.escape(SPEC.slug)}-[0-9a-f]{{12}}", path.name)


def test_unknown_schedule_is_refused():
    with pytest.raises(SpecError, match="schedule must be one of tuned, default, naive, decisions, got 'best'"):
        CacheKey.of(SPEC, detect_target(), "best")


def test_records_are_part_of_tuned_keys_only(monkeypatch, tmp_path):
    tag = detect_target().tag
    before = {name: CacheKey.of(SPEC, detect_target(), name) for name in ("tuned", "default")}
    (tmp_path / tag).mkdir()
    (tmp_path / tag / "database_workload.json").write_text("[]")
    monkeypatch.setenv("TVMDCN_RECORDS", str(tmp_path))
    after = {name: CacheKey.of(SPEC, detect_target(), name) for name in ("tuned", "default")}
    assert before["default"] == after["default"]
    difference = before["tuned"].explain_difference(after["tuned"])
    assert [line.split(":")[0] for line in difference] == ["records"]
    assert records_digest(tag) != records_digest("llvm-of-another-kind")


def test_source_digest_is_of_contents():
    assert re.fullmatch("[0-9a-f]{64}", source_digest())
    assert source_digest() != hashlib.sha256().hexdigest()


# --- writing and finding ----------------------------------------------------------------------------------------


def test_built_once_and_found(cache_dir):
    artifact = build_fake()
    assert artifact == Artifact.read(artifact.path) == find(artifact.key)
    assert artifact.path.is_relative_to(cache_dir)
    assert artifact.spec == SPEC
    assert artifact.target == detect_target()
    assert artifact.kernel == INTERFACE
    assert artifact.schedule == {"source": "test"}
    assert build_fake(make=never) == artifact
    assert list(artifacts()) == [artifact]
    assert find(CacheKey.of(SPEC, detect_target(), "naive")) is None


def test_rebuild_replaces(cache_dir):
    first = build_fake()

    def other(directory: Path):
        (directory / "kernel.so").write_bytes(b"another")
        (directory / "kernel.o").write_bytes(b"left by a compiler")
        return INTERFACE, {}

    second = build_fake(make=other, rebuild=True)
    assert second.path == first.path
    assert second.sha256 == hashlib.sha256(b"another").hexdigest()
    assert sorted(path.name for path in second.path.iterdir()) == ["kernel.so", "manifest.json"]
    assert [path.name for path in cache_dir.rglob("*staging*")] == []


@needs_posix
def test_written_for_this_user_only(cache_dir):
    before = os.umask(0o002)
    try:
        artifact = build_fake()
    finally:
        os.umask(before)
    assert find(artifact.key) == artifact
    for path in (artifact.path.parent, artifact.path, artifact.library, artifact.path / "manifest.json"):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path


def test_failed_build_leaves_nothing(cache_dir):
    def fail(directory: Path):
        (directory / "kernel.so").write_bytes(b"half")
        raise BuildError("no")

    with pytest.raises(BuildError, match="no"):
        build_fake(make=fail)
    with pytest.raises(BuildError, match=r"wrote no kernel\.so"):
        build_fake(make=lambda directory: (INTERFACE, {}))
    assert list(artifacts()) == []
    assert list(cache_dir.rglob("*.so")) == []
    assert build_fake().path.is_dir()


def test_leftovers_of_killed_builds_are_removed(cache_dir):
    path = CacheKey.of(SPEC, detect_target(), "tuned").path(cache_dir)
    cache.make_private(path.parent, cache_dir)
    left = path.with_name(f".{path.name}.staging-0badc0de")
    left.mkdir()
    (left / "kernel.so").write_bytes(b"half")
    assert find(CacheKey.of(SPEC, detect_target(), "tuned")) is None
    build_fake()
    assert not left.exists()


def test_something_else_in_the_place_is_replaced(cache_dir):
    path = CacheKey.of(SPEC, detect_target(), "tuned").path(cache_dir)
    cache.make_private(path.parent, cache_dir)
    path.write_text("a file")
    assert build_fake().path == path


def test_nearest_is_explained(cache_dir):
    other = dataclasses.replace(SPEC, dtype="float16")
    build_fake("default", other)
    artifact = build_fake("default")
    found = nearest(CacheKey.of(SPEC, detect_target(), "naive"))
    assert found is not None
    assert found == (artifact, ["schedule: 'default', wanted 'naive'"])


def test_nearest_of_nothing(cache_dir):
    assert nearest(CacheKey.of(SPEC, detect_target(), "naive")) is None


# --- damage ----------------------------------------------------------------------------------------------------


def damage(artifact: Artifact, change) -> None:
    manifest = artifact.path / "manifest.json"
    data = json.loads(manifest.read_text())
    text = change(data)
    manifest.write_text(text if isinstance(text, str) else json.dumps(data))


def put(*path, value):
    def change(data):
        for name in path[:-1]:
            data = data[name]
        data[path[-1]] = value

    return change


DAMAGES = {
    "empty": lambda data: "",
    "truncated": lambda data: json.dumps(data)[:-20],
    "binary": lambda data: "\x00\x01",
    "list": lambda data: "[]",
    "number": lambda data: "1" * 5000,
    "deep": lambda data: "[" * 100_000,
    "oversized": lambda data: json.dumps(data) + " " * (5 << 20),
    "missing_field": lambda data: data.pop("kernel") and None,
    "unknown_field": put("more", value=1),
    "schema": put("schema", value=2),
    "schema_text": put("schema", value="1"),
    "abi": put("key", "abi", value=0),
    "key_list": put("key", value=[]),
    "key_field": put("key", "tvm", value=1),
    "spec_channels": put("key", "spec", "in_channels", value=-1),
    "spec_text": put("key", "spec", value="x"),
    "spec_dtype": put("key", "spec", "dtype", value={}),
    "target": put("target", value=None),
    "target_of_another": put("target", "mcpu", value="z80"),
    "granule_zero": put("kernel", "granule", value=0),
    "granule_float": put("kernel", "granule", value=6.0),
    "granule_bool": put("kernel", "granule", value=True),
    "packed_shape": put("kernel", "packed_shape", value=[1, -1]),
    "packed_shape_text": put("kernel", "packed_shape", value="12"),
    "packed_dtype": put("kernel", "packed_dtype", value="float64"),
    "packed_dtype_list": put("kernel", "packed_dtype", value=[]),
    "layout": put("kernel", "layout", value="NHWC"),
    "entry": put("kernel", "entry", value="../x"),
    "entry_number": put("kernel", "entry", value=3),
    "seconds": put("build_seconds", value="long"),
    "sha256": put("sha256", value=None),
    "schedule": put("schedule", value="tuned"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_manifest_is_a_miss(cache_dir, caplog, name):
    artifact = build_fake()
    damage(artifact, DAMAGES[name])
    with pytest.raises(ArtifactError, match=r"manifest\.json is damaged or of another version"):
        Artifact.read(artifact.path)
    assert find(artifact.key) is None
    assert "It is taken for missing." in caplog.text
    assert list(artifacts()) == []
    assert build_fake() == find(artifact.key)


@given(data=st.data())
def test_no_manifest_crashes_the_reader(tmp_path_factory, data):
    """Any part of a manifest replaced by any JSON value is read, or refused in our words."""
    folder = tmp_path_factory.mktemp("any", numbered=True)
    artifact = build_fake(cache_dir=folder)
    values = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=5,
    )

    def change(manifest):
        part = manifest
        while True:
            name = data.draw(st.sampled_from(sorted(part)))
            if isinstance(part[name], dict) and part[name] and data.draw(st.booleans()):
                part = part[name]
                continue
            part[name] = data.draw(values)
            return

    damage(artifact, change)
    try:
        Artifact.read(artifact.path)
    except ArtifactError as error:
        assert "damaged or of another version" in str(error)


def test_missing_artifact_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match=r"holds no artifact: manifest\.json: No such file"):
        Artifact.read(tmp_path)


def test_changed_library_is_not_loaded(cache_dir):
    artifact = handmade.build(SPEC)
    content = bytearray(artifact.library.read_bytes())
    content[len(content) // 2] ^= 1
    artifact.library.write_bytes(content)
    with pytest.raises(DamagedArtifact, match=r"is not the file its manifest was written for .*Delete "):
        artifact.load()


def test_missing_library_is_reported(cache_dir):
    artifact = build_fake()
    artifact.library.unlink()
    with pytest.raises(ArtifactError, match=r"kernel\.so cannot be read"):
        artifact.load()


def test_library_that_is_none(cache_dir):
    with pytest.raises(ArtifactError, match=r"kernel\.so cannot be loaded: .*(invalid ELF|too short|not a)"):
        build_fake().load()


def test_library_without_the_functions(cache_dir):
    def renamed(directory: Path):
        interface = handmade.compile_library(SPEC, directory / "kernel.so")
        return dataclasses.replace(interface, entry="another_function"), {}

    with pytest.raises(ArtifactError, match="has no function another_function"):
        build_fake(make=renamed).load().function("another_function")


def test_library_for_a_greater_processor_is_not_loaded(cache_dir, monkeypatch):
    artifact = build_fake()
    fewer = sorted(artifact.target.features)[1:]
    monkeypatch.setattr("tvmdcn.artifact.host_features", lambda: frozenset(fewer))
    lacking = min(artifact.target.features)
    with pytest.raises(ArtifactError, match=f"needs {re.escape(lacking)}, which this machine lacks"):
        artifact.load()


# --- trust -----------------------------------------------------------------------------------------------------


@needs_posix
@pytest.mark.parametrize("mode", [0o770, 0o777, 0o702])
@pytest.mark.parametrize("depth", range(4))
def test_directories_that_others_can_write_are_refused(cache_dir, mode, depth):
    artifact = build_fake()
    path = [cache_dir, cache_dir / "v1", artifact.path.parent, artifact.path][depth]
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


# --- locks -----------------------------------------------------------------------------------------------------


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


def test_host_features_hold_for_the_host():
    assert detect_target().features <= (target.host_features() or detect_target().features)
