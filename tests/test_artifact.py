# SPDX-License-Identifier: Apache-2.0
"""Artifacts and their cache: keys, damage, and writes that are all or nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import stat
from pathlib import Path

import handmade
import pytest
from fake_artifacts import INTERFACE, build_fake, never
from handmade import SPEC
from hypothesis import given
from hypothesis import strategies as st

from tvmdcn import cache, native
from tvmdcn.artifact import (
    Artifact,
    DamagedArtifact,
    _seal,
    artifacts,
    find,
    nearest,
)
from tvmdcn.cache_key import CacheKey, records_digest, source_digest
from tvmdcn.errors import ArtifactError, BuildError, SpecError
from tvmdcn.target import detect_target, resolve_target

needs_posix = pytest.mark.skipif(os.name != "posix", reason="owners and modes are POSIX's")


# --- keys -----------------------------------------------------------------------------------------------


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
    assert path.parent == tmp_path / "v2" / "llvm-cascadelake"
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


# --- writing and finding --------------------------------------------------------------------------------


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


# --- damage ---------------------------------------------------------------------------------------------


def damage(artifact: Artifact, change) -> None:
    manifest = artifact.path / "manifest.json"
    data = json.loads(manifest.read_text())
    text = change(data)
    data["digest"] = _seal(data)  # the fields are checked, too, and not only that they are those that were written
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
    "schema": put("schema", value=1),
    "schema_text": put("schema", value="1"),
    "abi": put("key", "abi", value=0),
    "key_list": put("key", value=[]),
    "key_field": put("key", "tvm", value=1),
    "operator": put("key", "operator", value="deform_conv2d_grad"),
    "operator_of_spec": put("key", "spec", "operator", value="deform_conv2d_grad"),
    "operator_unknown": put("key", "spec", "operator", value="conv2d"),
    "operator_list": put("key", "spec", "operator", value=[]),
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
    with contextlib.suppress(ArtifactError):
        Artifact.read(artifact.path)
    find(artifact.key, folder)


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
    monkeypatch.setattr("tvmdcn.target_kinds.host_features", lambda: frozenset(fewer))
    lacking = min(artifact.target.features)
    with pytest.raises(ArtifactError, match=f"needs {re.escape(lacking)}, which this machine lacks"):
        artifact.load()


def test_a_library_is_loaded_once(cache_dir):
    """Each time it is loaded it would take memory for ever: modules are never unloaded."""
    artifact = handmade.build(SPEC)
    module = artifact.load()
    assert artifact.load() is module
    assert module.function(artifact.kernel.entry) is module.function(artifact.kernel.entry)
    # Another file in its place is another module, and so is the same file elsewhere.
    content = artifact.library.read_bytes()
    artifact.library.unlink()
    artifact.library.write_bytes(content)
    again = artifact.load()
    assert again is not module
    assert artifact.load() is again
    elsewhere = cache_dir / "elsewhere.so"
    elsewhere.write_bytes(content)
    assert native.load_module(elsewhere).path == elsewhere
