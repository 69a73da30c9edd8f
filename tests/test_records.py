# SPDX-License-Identifier: Apache-2.0
"""Tuning records: read and written whole, looked up by likeness, refused when they are not what they say.

And the records that ship: each still means the schedule that was tuned.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from tvmdcn.cache_key import CacheKey
from tvmdcn.errors import RecordsError
from tvmdcn.problems import PROBLEMS
from tvmdcn.space import Decisions
from tvmdcn.spec import DeformConv2dGradSpec, DeformConv2dSpec, Extents
from tvmdcn.target import resolve_target
from tvmdcn.tuning import records as records_module
from tvmdcn.tuning.records import META, Record, TuningRecords, shipped_root, user_root
from tvmdcn.tuning.records_check import orphaned

TAG = "llvm-znver5"
SPEC = DeformConv2dSpec(64, 96, padding=1)


def record(spec: DeformConv2dSpec = SPEC, threads: int = 1, unroll: int = 1, **fields: Any) -> Record:
    decisions = Decisions("full-2-tap", {"unroll": unroll, "tile_units": 8})
    base = {
        "extents": Extents(1, 32, 32),
        "seconds": 2e-3,
        "default_seconds": 3e-3,
        "trials": 40,
        "provenance": {"date": "2026-11-22"},
    }
    return Record(spec=spec, threads=threads, decisions=decisions, **{**base, **fields})


def changed(spec: DeformConv2dSpec = SPEC, **fields: Any) -> DeformConv2dSpec:
    return dataclasses.replace(spec, **fields)


def grad(layer: DeformConv2dSpec = SPEC, **flags: Any) -> DeformConv2dGradSpec:
    return DeformConv2dGradSpec.of(layer, **flags)


# -- files ------------------------------------------------------------------------------------------


def test_records_survive_a_file(tmp_path: Path) -> None:
    kept = [record(), record(threads=2), record(changed(in_channels=32, dtype="float16"), unroll=4)]
    kept += [record(grad()), record(grad(grad_input=False, border="mmcv"))]
    path = TuningRecords(TAG, kept).write(tmp_path)
    assert path == tmp_path / TAG / META
    found = TuningRecords.read(tmp_path, TAG)
    assert found.tag == TAG
    assert sorted(found.records, key=repr) == sorted(kept, key=repr)
    data = json.loads(path.read_text())
    assert data["generated"].endswith("do not edit")
    assert [file.name for file in path.parent.iterdir()] == [META], "nothing staged is left"


def test_equal_records_give_equal_files(tmp_path: Path) -> None:
    kept = [record(threads=2), record(), record(changed(out_channels=8))]
    first = TuningRecords(TAG, kept).write(tmp_path / "a").read_bytes()
    assert TuningRecords(TAG, reversed(kept)).write(tmp_path / "b").read_bytes() == first


def test_no_file_means_no_records(tmp_path: Path) -> None:
    assert TuningRecords.read(tmp_path, TAG).records == []
    assert TuningRecords.read(tmp_path / "nowhere", TAG).best(SPEC) is None


def test_changed_file_is_read_anew(tmp_path: Path) -> None:
    TuningRecords(TAG, [record()]).write(tmp_path)
    assert len(TuningRecords.read(tmp_path, TAG).records) == 1
    TuningRecords(TAG, [record(), record(threads=2)]).write(tmp_path)
    assert len(TuningRecords.read(tmp_path, TAG).records) == 2


def test_callers_cannot_change_each_others_records(tmp_path: Path) -> None:
    TuningRecords(TAG, [record()]).write(tmp_path)
    TuningRecords.read(tmp_path, TAG).records.clear()
    assert len(TuningRecords.read(tmp_path, TAG).records) == 1


def test_records_of_another_target_are_refused(tmp_path: Path) -> None:
    path = TuningRecords("llvm-haswell", [record()]).write(tmp_path)
    (tmp_path / TAG).mkdir()
    path.rename(tmp_path / TAG / META)
    with pytest.raises(RecordsError, match=r"it is of target 'llvm-haswell', not 'llvm-znver5': refused"):
        TuningRecords.read(tmp_path, TAG)


DAMAGE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "not an object": lambda data: [],
    "another schema": lambda data: {**data, "schema": 2},
    "no schema": lambda data: {k: v for k, v in data.items() if k != "schema"},
    "no list": lambda data: {**data, "records": {"a": 1}},
    "a number": lambda data: {**data, "records": [7]},
    "null": lambda data: {**data, "records": [None]},
    "an empty record": lambda data: {**data, "records": [{}]},
}
FIELDS: dict[str, list[Any]] = {
    "seconds": [0, -1, float("nan"), float("inf"), "1", True, None, [1]],
    "default_seconds": [0, -1e-3, float("nan"), "fast"],
    "threads": [0, -1, 1.5, "2", True, None, float("inf"), 1 << 40],
    "trials": [0, -4, "many", None],
    "provenance": [None, "here", [["a", 1]]],
    "decisions": [
        None,
        {},
        {"variant": "x"},
        {"variant": "x", "values": {"a": "b"}},
        {"variant": 1, "values": {}},
    ],
    "extents": [
        None,
        {},
        {"batch": -1, "height": 1, "width": 1},
        {"batch": 1, "height": 1, "width": 1, "depth": 1},
    ],
    "spec": [None, {}, {"in_channels": 0}],
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_file_is_refused(name: str, tmp_path: Path) -> None:
    path = TuningRecords(TAG, [record()]).write(tmp_path)
    path.write_text(json.dumps(DAMAGE[name](json.loads(path.read_text()))))
    with pytest.raises(RecordsError, match=r"meta\.json cannot be used: .* Restore it, or delete it and tune again"):
        TuningRecords.read(tmp_path, TAG)


@pytest.mark.parametrize(("field", "value"), [(name, value) for name, values in FIELDS.items() for value in values])
def test_hostile_value_is_refused(field: str, value: Any, tmp_path: Path) -> None:
    path = TuningRecords(TAG, [record()]).write(tmp_path)
    data = json.loads(path.read_text())
    data["records"][0][field] = value
    path.write_text(json.dumps(data))
    with pytest.raises(RecordsError, match=r"meta\.json cannot be used: not a tuning record"):
        TuningRecords.read(tmp_path, TAG)


@pytest.mark.parametrize("text", [b"", b"{", b"\xff\x00", b"[" * 200_000, b'{"a": 1e999}'])
def test_file_that_is_no_json_is_refused(text: bytes, tmp_path: Path) -> None:
    path = tmp_path / TAG / META
    path.parent.mkdir()
    path.write_bytes(text)
    with pytest.raises(RecordsError, match="cannot be used"):
        TuningRecords.read(tmp_path, TAG)


def test_file_that_is_too_large_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records_module, "_LIMIT", 100)
    TuningRecords(TAG, [record()]).write(tmp_path)
    with pytest.raises(RecordsError, match="it is larger than 100 bytes"):
        TuningRecords.read(tmp_path, TAG)


def test_impossible_decisions_are_harmless() -> None:
    # Integers of any size pass the check of a file: only the space knows what is possible.
    from tvmdcn.builder import new_schedule
    from tvmdcn.space import space_of

    target = resolve_target(TAG)
    space = space_of(SPEC.operator, target.kind)
    default = space.schedule(new_schedule(SPEC, target), SPEC, target)
    for variant in ("no-such-variant", "", default.variant):
        for value in (0, -1, 10**40, -(10**40), 7):
            wish = Decisions(variant, {name: value for name in default.values} | {"unheard_of": 1})
            made = space.schedule(new_schedule(SPEC, target), SPEC, target, wish)
            assert made.variant == default.variant
            assert list(made.values) == list(default.values)
            assert all(0 < made.values[name] < 10**6 for name in made.values)


def test_record_with_fields_of_a_later_version_is_sound(tmp_path: Path) -> None:
    path = TuningRecords(TAG, [record()]).write(tmp_path)
    data = json.loads(path.read_text())
    row = data["records"][0]
    row["later"] = {"a": 1}
    path.write_text(json.dumps(data))
    with pytest.raises(RecordsError, match="is not what its digest"):
        TuningRecords.read(tmp_path, TAG)
    del row["digest"]
    text = json.dumps(row, sort_keys=True, separators=(",", ":"))
    row["digest"] = hashlib.sha256(text.encode()).hexdigest()[:16]
    path.write_text(json.dumps(data))
    assert TuningRecords.read(tmp_path, TAG).records == [record()]


def test_record_of_the_first_version_has_no_digest(tmp_path: Path) -> None:
    path = TuningRecords(TAG, [record()]).write(tmp_path)
    data = json.loads(path.read_text())
    del data["records"][0]["digest"]
    path.write_text(json.dumps(data))
    assert TuningRecords.read(tmp_path, TAG).records == [record()]


# -- look-up ----------------------------------------------------------------------------------------


def test_own_record_is_best() -> None:
    other = record(changed(in_channels=128), unroll=2)
    found = TuningRecords(TAG, [other, record(unroll=4)]).best(SPEC)
    assert found is not None
    assert (found.exact, found.description, found.decisions.values["unroll"]) == (True, "tuned: 40 trials", 4)


def test_nearest_in_channels_is_next() -> None:
    near, far = record(changed(in_channels=128), unroll=2), record(changed(in_channels=1024), unroll=4)
    found = TuningRecords(TAG, [far, near]).best(SPEC)
    assert found is not None
    assert (found.exact, found.decisions) == (False, near.decisions)
    assert found.description == f"as tuned for {near.spec.slug}"


@pytest.mark.parametrize(
    "fields",
    [
        {"stride": (2, 1)},
        {"padding": (0, 0, 0, 0)},
        {"dilation": (2, 2)},
        {"mask": False},
        {"out_channels": 8},
    ],
    ids=str,
)
def test_alike_layers_share_decisions(fields: dict[str, Any]) -> None:
    found = TuningRecords(TAG, [record(changed(**fields), unroll=4)]).best(SPEC)
    assert found is not None
    assert (found.exact, found.decisions.values["unroll"]) == (False, 4)


@pytest.mark.parametrize(
    "fields",
    [
        {"kernel_size": (5, 5)},
        {"groups": 2},
        {"offset_groups": 4},
        {"dtype": "float16"},
        {"dtype": "float64"},
        {"layout": "NHWC"},
    ],
    ids=str,
)
def test_layers_that_are_built_otherwise_do_not(fields: dict[str, Any]) -> None:
    assert TuningRecords(TAG, [record(changed(**fields))]).best(SPEC) is None


def test_operators_do_not_share_decisions() -> None:
    assert TuningRecords(TAG, [record(), record(changed(in_channels=128))]).best(grad()) is None
    assert TuningRecords(TAG, [record(grad()), record(grad(grad_bias=False))]).best(SPEC) is None
    both = TuningRecords(TAG, [record(unroll=2), record(grad(), unroll=4)])
    assert len(both.records) == 2
    for spec, unroll in ((SPEC, 2), (grad(), 4)):
        found = both.best(spec)
        assert found is not None
        assert (found.exact, found.decisions.values["unroll"]) == (True, unroll)


def test_gradients_share_decisions_with_other_gradients() -> None:
    everything, without_input = record(grad(), unroll=2), record(grad(grad_input=False), unroll=4)
    far = record(grad(changed(in_channels=128), grad_input=False, grad_bias=False), unroll=8)

    def chosen(*known: Record, **flags: Any) -> int:
        found = TuningRecords(TAG, known).best(grad(**flags))
        assert found is not None
        return found.decisions.values["unroll"]

    assert chosen(everything, grad_input=False) == 2
    assert chosen(without_input) == 4
    assert chosen(everything, border="mmcv") == 2
    # Of the same layer those whose flags differ least; another layer's only where there is none.
    assert chosen(everything, without_input, grad_input=False, grad_bias=False) == 4
    assert chosen(everything, without_input, grad_bias=False, border="mmcv") == 2
    assert chosen(far, everything, grad_input=False, grad_bias=False) == 2
    assert chosen(far, grad_weight=False) == 8


def test_number_of_threads_decides_among_equals() -> None:
    several = TuningRecords(TAG, [record(threads=count, unroll=count) for count in (1, 2, 8)])

    def chosen(threads: int | None) -> int:
        found = several.best(SPEC, threads)
        assert found is not None
        return found.decisions.values["unroll"]

    assert [chosen(threads) for threads in (1, 2, 3, 6, 100, None)] == [1, 2, 2, 8, 8, 8]


def test_largest_sizes_decide_among_equals() -> None:
    sizes = {1: Extents(1, 32, 32), 2: Extents(8, 32, 32), 4: Extents(1, 64, 64)}
    found = TuningRecords(TAG, [record(unroll=n, extents=extents) for n, extents in sizes.items()]).best(SPEC)
    assert found is not None
    assert found.decisions.values["unroll"] == 2


def test_users_records_come_before_those_that_ship(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    user, shipped = tmp_path / "user", tmp_path / "shipped"
    TuningRecords(TAG, [record(unroll=1)]).write(shipped)
    user.mkdir()
    monkeypatch.setenv("TVMDCN_RECORDS", str(user))
    real = records_module.record_roots
    monkeypatch.setattr(records_module, "record_roots", lambda: [real()[0], shipped])
    assert (user_root(), shipped_root()) == (user, shipped)
    assert TuningRecords.of(TAG).best(SPEC).decisions.values["unroll"] == 1
    # also when it was tuned on smaller images and for another number of threads
    TuningRecords(TAG, [record(unroll=4, extents=Extents(1, 9, 9), threads=8)]).write(user)
    for threads in (None, 1, 8):
        assert TuningRecords.of(TAG).best(SPEC, threads).decisions.values["unroll"] == 4
    assert len(TuningRecords.of(TAG).records) == 1
    # and what it says nothing about still comes from those that ship
    other = changed(kernel_size=(5, 5))
    TuningRecords(TAG, [record(unroll=1), record(other, unroll=2)]).write(shipped)
    assert TuningRecords.of(TAG).best(other).decisions.values["unroll"] == 2


def test_new_record_changes_the_key_of_tuned_artifacts_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TVMDCN_RECORDS", str(tmp_path))
    target = resolve_target(TAG)
    before = [CacheKey.of(SPEC, target, schedule).digest() for schedule in ("tuned", "default")]
    TuningRecords.keep(tmp_path, TAG, record())
    after = [CacheKey.of(SPEC, target, schedule).digest() for schedule in ("tuned", "default")]
    assert before[0] != after[0]
    assert before[1] == after[1]


# -- adding -----------------------------------------------------------------------------------------


def test_newer_run_replaces_and_slower_one_of_the_same_does_not() -> None:
    kept = TuningRecords(TAG, [record(seconds=2e-3, unroll=1)])
    assert not kept.add(record(seconds=3e-3, unroll=2))
    assert kept.add(record(seconds=1e-3, unroll=4))
    assert kept.add(record(seconds=9e-3, unroll=8, provenance={"date": "2027-01-01"}))
    assert kept.add(record(threads=2))
    assert kept.add(record(extents=Extents(1, 9, 9)))
    assert [(r.threads, r.extents.height, r.decisions.values["unroll"]) for r in kept.records] == [
        (1, 32, 8),
        (2, 32, 1),
        (1, 9, 1),
    ]


def test_many_at_once_lose_no_record(tmp_path: Path) -> None:
    specs = [changed(in_channels=count) for count in range(1, 13)]
    threads = [threading.Thread(target=TuningRecords.keep, args=(tmp_path, TAG, record(spec))) for spec in specs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = TuningRecords.read(tmp_path, TAG).records
    assert sorted(r.spec.in_channels for r in found) == list(range(1, 13))


def test_lock_that_is_never_given_free_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records_module, "_LOCK_SECONDS", 0.05)
    (tmp_path / TAG).mkdir()
    with (
        FileLock(tmp_path / TAG / ".meta.lock"),
        pytest.raises(RecordsError, match=r"is locked by another process .*run the same command again"),
    ):
        TuningRecords.keep(tmp_path, TAG, record())


# -- what ships -------------------------------------------------------------------------------------


SHIPPED = [
    (path.parent.name, found)
    for path in sorted(shipped_root().glob("*/meta.json"))
    for found in TuningRecords.read(path.parents[1], path.parent.name).records
]


@pytest.mark.parametrize(
    ("tag", "found"),
    SHIPPED,
    ids=[f"{tag}-{found.spec.operator}-{found.spec.slug}-{found.pixels}-t{found.threads}" for tag, found in SHIPPED],
)
def test_shipped_record_still_means_what_was_tuned(tag: str, found: Record) -> None:
    target = resolve_target(tag)
    assert target.tag == tag
    assert orphaned(found, target) == ""
    assert {"cpu", "date", "versions", "source"} <= set(found.provenance)
    assert found.seconds <= found.default_seconds


def test_shipped_records_are_of_named_layers_once_each() -> None:
    named = {(problem.spec, problem.extents) for problem in PROBLEMS.values()}
    layers = [f.spec.layer if isinstance(f.spec, DeformConv2dGradSpec) else f.spec for _, f in SHIPPED]
    assert all((layer, found.extents) in named for layer, (_, found) in zip(layers, SHIPPED, strict=True))
    keys = [(tag, found.spec, found.extents, found.threads) for tag, found in SHIPPED]
    assert len(set(keys)) == len(keys)


def test_orphans_would_be_found() -> None:
    target = resolve_target(TAG)
    from tvmdcn.builder import new_schedule
    from tvmdcn.space import space_of

    default = space_of(SPEC.operator, "llvm").schedule(new_schedule(SPEC, target), SPEC, target)
    sound = dataclasses.replace(record(), decisions=default)
    assert not orphaned(sound, target)
    name, value = next(iter(default.values.items()))
    for decisions in (
        Decisions("renamed", default.values),
        Decisions(default.variant, {**default.values, "renamed": 1}),
        Decisions(default.variant, {k: v for k, v in default.values.items() if k != name}),
        Decisions(default.variant, {**default.values, name: 1000 * value + 1}),
    ):
        assert orphaned(dataclasses.replace(sound, decisions=decisions), target)
