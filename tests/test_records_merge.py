# SPDX-License-Identifier: Apache-2.0
"""Records of several contributors: what is taken, what is refused, and which of two is kept."""

from __future__ import annotations

import dataclasses
import io
import json
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
from contributions import OTHER, SIZE, SPEC, TAG, default_of, log_text, provenance, read, record, write
from filelock import FileLock

from tvmdcn.errors import RecordsError
from tvmdcn.space import Decisions
from tvmdcn.spec import Extents
from tvmdcn.tuning.records import META
from tvmdcn.tuning.records_merge import REPLACED, Verdict, better, merge


def merged(source: Path, root: Path, **options: Any) -> list[Verdict]:
    return list(merge(source, root, **options))


def actions(verdicts: list[Verdict]) -> list[str]:
    return [verdict.action for verdict in verdicts]


# --- what is taken ------------------------------------------------------------------------------------------


def test_two_contributors_become_one(tmp_path):
    mine = write(tmp_path / "mine", record(), record(threads=2))
    yours = write(tmp_path / "yours", record(OTHER), record(OTHER, threads=4), tag=TAG)
    write(tmp_path / "yours", record(OTHER, provenance=provenance(tag="llvm-znver5")), tag="llvm-znver5")
    found = merged(yours, mine)
    assert actions(found) == ["added"] * 3
    assert {r.signature for r in read(mine)} == {
        (s, SIZE, t) for s, t in ((SPEC, 1), (SPEC, 2), (OTHER, 1), (OTHER, 4))
    }
    assert [r.spec for r in read(mine, "llvm-znver5")] == [OTHER]
    assert actions(merged(yours, mine)) == ["same"] * 3


def test_directory_of_one_target_is_understood(tmp_path):
    source = write(tmp_path / "a", record(), log=log_text(record(), [2e-3]))
    assert actions(merged(source / TAG, tmp_path / "b")) == ["added"]
    assert (tmp_path / "b" / TAG / "trials" / "layer-t1.jsonl").is_file()


def test_only_the_target_asked_for(tmp_path):
    source = write(tmp_path / "a", record())
    write(source, record(provenance=provenance(tag="llvm-znver5")), tag="llvm-znver5")
    found = merged(source, tmp_path / "b", tag="llvm-znver5")
    assert actions(found) == ["refused", "added"]
    assert "another target than llvm-znver5" in found[0].reason
    assert read(tmp_path / "b") == []


def test_dry_run_changes_nothing(tmp_path):
    source = write(tmp_path / "a", record())
    assert actions(merged(source, tmp_path / "b", dry_run=True)) == ["added"]
    assert not (tmp_path / "b").exists()


def test_merge_waits_for_nobody(tmp_path, monkeypatch):
    source = write(tmp_path / "a", record(), log=log_text(record(), [2e-3]))
    monkeypatch.setattr("tvmdcn.tuning.records._LOCK_SECONDS", 0.05)
    (tmp_path / "b" / TAG / "trials").mkdir(parents=True)
    with FileLock(tmp_path / "b" / TAG / ".meta.lock"), pytest.raises(RecordsError, match="locked by another process"):
        merged(source, tmp_path / "b")
    with FileLock(tmp_path / "b" / TAG / "trials" / ".layer-t1.lock"), pytest.raises(RecordsError, match="by a tuning"):
        merged(source, tmp_path / "b")
    assert read(tmp_path / "b") == []


# --- what is refused ----------------------------------------------------------------------------------------

VERSIONS = provenance()["versions"]
REFUSALS = {
    "compiler": ({"versions": {**VERSIONS, "apache-tvm": "0.26.0"}}, "it was tuned with apache-tvm 0.26.0, and "),
    "ffi": ({"versions": {**VERSIONS, "apache-tvm-ffi": "0.1.15"}}, "it was tuned with apache-tvm-ffi 0.1.15, and "),
    "no versions": ({"versions": None}, "it does not say where it comes from: versions missing"),
    "versions of another form": ({"versions": ["0.27"]}, "it was tuned with apache-tvm None"),
    "no machine": ({"cpu": "", "target": None}, "it does not say where it comes from: cpu, target missing"),
    "weaker machine": (
        {"target": provenance(tag="llvm-haswell")["target"]},
        "it was measured on haswell, which cannot run code for llvm-znver4",
    ),
    "other architecture": (
        {"target": {**provenance()["target"], "arch": "aarch64"}},
        "which cannot run code for llvm-znver4",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_record_of_something_else_is_refused(name, tmp_path):
    fields, reason = REFUSALS[name]
    source = write(tmp_path / "a", record(provenance=provenance(**fields)), record(OTHER))
    found = merged(source, tmp_path / "b")
    assert sorted(actions(found)) == ["added", "refused"]
    assert reason in next(verdict.reason for verdict in found if verdict.action == "refused")
    assert [r.spec for r in read(tmp_path / "b")] == [OTHER]


def test_orphan_is_refused(tmp_path):
    values = default_of(SPEC).values
    for decisions, reason in (
        (Decisions("renamed", values), "the design space has no variant 'renamed', but "),
        (
            Decisions(default_of(SPEC).variant, {**values, "renamed": 1}),
            "no longer has its decisions: renamed is unknown",
        ),
        (Decisions(default_of(SPEC).variant, {**values, "tile_units": 10**9}), "tile_units was 1000000000, becomes "),
    ):
        source = write(tmp_path / "a", record(decisions=decisions))
        (found,) = merged(source, tmp_path / "b")
        assert found.action == "refused"
        assert reason in found.reason


def test_file_of_another_target_is_refused(tmp_path):
    source = write(tmp_path / "a", record())
    (source / TAG).rename(source / "llvm-znver5")
    (found,) = merged(source, tmp_path / "b")
    assert (found.action, found.what) == ("refused", f"llvm-znver5/{META}")
    assert "it is of target 'llvm-znver4', not 'llvm-znver5'" in found.reason


def test_unknown_target_is_refused(tmp_path):
    source = write(tmp_path / "a", record(), tag="llvm-pentium99")
    (found,) = merged(source, tmp_path / "b")
    assert found.action == "refused"
    assert "target 'llvm-pentium99' is not known" in found.reason


def test_damaged_record_is_refused_alone(tmp_path):
    source = write(tmp_path / "a", record(), record(OTHER))
    meta = source / TAG / META
    data = json.loads(meta.read_text())
    data["records"][0]["decisions"]["values"]["tile_units"] += 1
    meta.write_text(json.dumps(data))
    found = merged(source, tmp_path / "b")
    assert sorted(actions(found)) == ["added", "refused"]
    assert "is not what its digest" in found[0].reason
    assert len(read(tmp_path / "b")) == 1


def test_damaged_log_is_refused_and_its_record_taken(tmp_path):
    source = write(tmp_path / "a", record(), log="x" + log_text(record(), [2e-3]))
    (source / TAG / "trials" / "of_another-t1.jsonl").write_text(log_text(record(), [2e-3], tag="llvm-znver5"))
    found = merged(source, tmp_path / "b")
    assert actions(found) == ["refused", "refused", "added"]
    assert "line 1 cannot be read" in found[0].reason
    assert "it is of target 'llvm-znver5'" in found[1].reason
    assert not (tmp_path / "b" / TAG / "trials").exists()


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04rest", b"\x1f\x8b\x08rest"])
def test_file_that_is_no_archive(content, tmp_path):
    source = tmp_path / "archive.tar.gz"
    source.write_bytes(content)
    with pytest.raises(RecordsError, match=r"archive\.tar\.gz (cannot be read|holds no tuning records)"):
        merged(source, tmp_path / "b")


def test_directory_without_records(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(RecordsError, match=r"holds no tuning records: .*Name what tvmdcn tune wrote"):
        merged(tmp_path / "a", tmp_path / "b")


# --- archives -----------------------------------------------------------------------------------------------


def tar_of(members: dict[str, bytes], path: Path, **fields: Any) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            for field, value in fields.items():
                setattr(info, field, value)
            archive.addfile(info, io.BytesIO(content))
    return path


def zip_of(members: dict[str, bytes], path: Path) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


@pytest.mark.parametrize("pack", [tar_of, zip_of])
@pytest.mark.parametrize("prefix", ["", "tuning_logs/", "./some/where/"])
def test_archive_is_as_good_as_a_directory(pack, prefix, tmp_path):
    source = write(tmp_path / "a", record(), log=log_text(record(), [2e-3, 4e-3]))
    members = {f"{prefix}{path.relative_to(source).as_posix()}": path.read_bytes() for path in source.rglob("*.json*")}
    (found,) = merged(pack(members, tmp_path / "archive"), tmp_path / "b")
    assert found.action == "added"
    assert found.reason.endswith("; 2 trials in layer-t1.jsonl")
    assert read(tmp_path / "b") == read(source)


@pytest.mark.parametrize("pack", [tar_of, zip_of])
def test_hostile_names_lead_nowhere(pack, tmp_path):
    meta = (write(tmp_path / "a", record()) / TAG / META).read_bytes()
    log = log_text(record(), [2e-3]).encode()
    names = {
        f"../../{TAG}/{META}": meta,  # the parents are left out
        f"/{TAG}/trials/../../x.jsonl": log,
        f"{TAG}/trials/..jsonl": log,
        f"{TAG}/trials/.hidden.jsonl": log,
        f"{TAG}/trials/a b.jsonl": log,
        f"../trials/{META}": meta,
        f"{TAG}/trials/deep/x.jsonl": log,
        f"..-x/{META}": meta,
    }
    root = tmp_path / "inner" / "b"
    found = merged(pack(names, tmp_path / "archive"), root)
    assert actions(found) == ["added"]
    written = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert {p for p in written if not p.startswith(("a/", "archive"))} == {
        f"inner/b/{TAG}/{META}",
        f"inner/b/{TAG}/.meta.lock",
    }


def test_links_in_an_archive_are_not_followed(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("{}")
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE):
        members = {f"{TAG}/{META}": b""}
        path = tar_of(members, tmp_path / "archive", type=kind, linkname=str(secret))
        with pytest.raises(RecordsError, match="holds no tuning records"):
            merged(path, tmp_path / "b")


@pytest.mark.parametrize("pack", [tar_of, zip_of])
def test_archive_that_is_too_large(pack, tmp_path, monkeypatch):
    monkeypatch.setattr("tvmdcn.tuning.contribution._FILE_LIMIT", 1000)
    path = pack({f"{TAG}/{META}": b" " * 5000}, tmp_path / "archive")
    with pytest.raises(RecordsError, match=r"holds more than records can be: llvm-znver4/meta\.json is too large"):
        merged(path, tmp_path / "b")
    monkeypatch.setattr("tvmdcn.tuning.contribution._MEMBERS", 3)
    path = pack({f"x{n}": b"" for n in range(5)}, tmp_path / "archive")
    with pytest.raises(RecordsError, match="holds more than 3 files"):
        merged(path, tmp_path / "b")


# --- of two, one --------------------------------------------------------------------------------------------

HERE, ELSEWHERE = provenance(), provenance(cpu="AMD Ryzen 9")
OLD, OLDER = {"source": "0" * 64}, {"source": "1" * 64}
PAIRS = {
    "greater gain": (record(default=3e-3), record(default=4e-3), True, "2.00x as fast as the default, and 1.50x there"),
    "smaller gain, though faster": (
        record(seconds=2e-3, default=3e-3),
        record(seconds=1e-3, default=1.1e-3, provenance=ELSEWHERE),
        False,
        "1.10x as fast as the default, and 1.50x there",
    ),
    "greater gain, though slower": (
        record(seconds=2e-3, default=3e-3),
        record(seconds=4e-3, default=8e-3, provenance=ELSEWHERE),
        True,
        "2.00x as fast",
    ),
    "a tie": (record(), record(provenance=provenance(date="2027-01-01")), False, "1.50x as fast"),
    "other code, same machine, faster": (
        record(seconds=2e-3),
        record(seconds=1e-3, default=1e-3, provenance={**HERE, **OLD}),
        True,
        "1.000 ms, and 2.000 ms there, on the same machine",
    ),
    "other code, same machine, slower": (
        record(seconds=2e-3),
        record(seconds=3e-3, default=9e-3, provenance={**HERE, **OLD}),
        False,
        "on the same machine",
    ),
    "code that is installed": (
        record(provenance={**HERE, **OLD}),
        record(seconds=9e-3, provenance=ELSEWHERE),
        True,
        "the one of the code that is installed",
    ),
    "code that is not": (record(), record(seconds=1e-6, provenance={**ELSEWHERE, **OLD}), False, "that is installed"),
    "newer": (
        record(provenance={**HERE, **OLD}),
        record(seconds=9e-3, provenance={**ELSEWHERE, **OLDER, "date": "2027-01-01"}),
        True,
        "2027-01-01, and 2026-11-22 there",
    ),
    "older": (
        record(provenance={**HERE, **OLD}),
        record(seconds=1e-6, provenance={**ELSEWHERE, **OLDER, "date": "2025-01-01"}),
        False,
        "2025-01-01, and 2026-11-22 there",
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_the_better_of_two(name, tmp_path):
    known, new, taken, why = PAIRS[name]
    found, reason = better(known, new)
    assert found is taken
    assert why in reason
    mine, yours = write(tmp_path / "mine", known, record(OTHER)), write(tmp_path / "yours", new)
    assert actions(merged(yours, mine)) == ["replaced" if taken else "kept"]
    assert {r.spec: r for r in read(mine)} == {SPEC: new if taken else known, OTHER: record(OTHER)}


def test_order_of_merging_does_not_matter(tmp_path):
    parts = [
        record(seconds=s, default=d, provenance=provenance(cpu=cpu))
        for s, d, cpu in ((2e-3, 3e-3, "a"), (1e-3, 1.2e-3, "b"), (4e-3, 8e-3, "c"))
    ]
    results = []
    for order in ((0, 1, 2), (2, 1, 0), (1, 2, 0)):
        root = tmp_path / f"root{order}"
        for index in order:
            merged(write(tmp_path / f"source{index}", parts[index]), root)
        results.append(read(root))
    assert results[0] == results[1] == results[2] == [parts[2]]


# --- logs ---------------------------------------------------------------------------------------------------


def test_log_goes_with_its_record_and_loses_nothing(tmp_path):
    mine = write(tmp_path / "mine", record(), log=log_text(record(), [2e-3, 5e-3]))
    new = record(seconds=1e-3)
    yours = write(tmp_path / "yours", new, log=log_text(new, [1e-3, 3e-3, 4e-3]))
    before = (mine / TAG / "trials" / "layer-t1.jsonl").read_text()
    (found,) = merged(yours, mine)
    assert found.action == "replaced"
    folder = mine / TAG / "trials"
    assert (folder / "layer-t1.jsonl").read_text() == log_text(new, [1e-3, 3e-3, 4e-3])
    assert (folder / REPLACED / "layer-t1-1.jsonl").read_text() == before


def test_log_of_a_record_that_is_not_taken_stays_away(tmp_path):
    mine = write(tmp_path / "mine", record(), log=log_text(record(), [2e-3]))
    yours = write(tmp_path / "yours", record(seconds=2.9e-3), log=log_text(record(), [9e-3]))
    assert actions(merged(yours, mine)) == ["kept"]
    assert (mine / TAG / "trials" / "layer-t1.jsonl").read_text() == log_text(record(), [2e-3])


def test_longer_log_of_one_tuning_replaces_the_shorter(tmp_path):
    mine = write(tmp_path / "mine", record(seconds=2e-3), log=log_text(record(), [2e-3]))
    yours = write(tmp_path / "yours", record(seconds=1e-3), log=log_text(record(), [2e-3, 1e-3]))
    assert actions(merged(yours, mine)) == ["replaced"]
    assert sorted(p.name for p in (mine / TAG / "trials").glob("[!.]*")) == ["layer-t1.jsonl"]
    assert (mine / TAG / "trials" / "layer-t1.jsonl").read_text() == log_text(record(), [2e-3, 1e-3])


def test_name_that_another_layer_has_is_not_taken(tmp_path):
    mine = write(tmp_path / "mine", record(OTHER), log=log_text(record(OTHER), [2e-3]))
    yours = write(tmp_path / "yours", record(), log=log_text(record(), [2e-3]))
    (found,) = merged(yours, mine)
    assert found.reason.endswith(f"1 trials in {SPEC.slug}-t1.jsonl")
    assert (mine / TAG / "trials" / "layer-t1.jsonl").read_text() == log_text(record(OTHER), [2e-3])


def test_other_sizes_are_other_records(tmp_path):
    mine = write(tmp_path / "mine", record())
    yours = write(tmp_path / "yours", record(extents=Extents(1, 64, 64)))
    assert actions(merged(yours, mine)) == ["added"]
    assert len(read(mine)) == 2


def test_digest_says_what_changed():
    found = record()
    assert found.digest() == dataclasses.replace(found).digest()
    changes = {"seconds": 1e-4, "trials": 41, "threads": 2, "provenance": provenance(cpu="x"), "spec": OTHER}
    digests = {dataclasses.replace(found, **{name: value}).digest() for name, value in changes.items()}
    assert len(digests | {found.digest()}) == 1 + len(changes)
