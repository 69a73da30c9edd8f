# SPDX-License-Identifier: Apache-2.0
"""``tvmdcn records``: what it shows, what it deletes, what it finds wrong; and a measurement for real."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from contributions import OTHER, SPEC, TAG, default_of, log_text, provenance, record, write

from tvmdcn.cli import main
from tvmdcn.errors import RecordsError
from tvmdcn.problems import PROBLEMS
from tvmdcn.space import Decisions
from tvmdcn.spec import DeformConv2dGradSpec, DeformConv2dSpec, Extents
from tvmdcn.target import detect_target, host_identity
from tvmdcn.tuning.records import META, TuningRecords, shipped_root
from tvmdcn.tuning.records_check import check_records, remeasure
from tvmdcn.tuning.records_merge import REPLACED

NAMED = PROBLEMS["r50_c4"]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["records", *map(str, arguments)])


@pytest.fixture
def root(tmp_path: Path) -> Path:
    named = record(NAMED.spec, extents=NAMED.extents, seconds=4e-3, default=5e-3)
    return write(tmp_path / "root", named, record(threads=2), log=log_text(record(threads=2), [2e-3, 4e-3]))


# --- list and show ------------------------------------------------------------------------------------------


def test_list_is_a_table(root):
    found = run("list", "--records", root)
    assert found.exit_code == 0, found.output
    title, *rows = found.output.splitlines()
    assert title.split() == ["target", "layer", "size", "threads", "ms", "vs", "default", "trials", "date", "machine"]
    assert [row.split(maxsplit=8) for row in rows] == [
        [TAG, "r50_c4", "1x32x32", "1", "4.000", "1.25x", "40", "2026-11-22", "AMD EPYC 9004"],
        [TAG, "1,64,32,32,96", "1x32x32", "2", "2.000", "1.50x", "40", "2026-11-22", "AMD EPYC 9004"],
    ]
    assert len({row.index("2026-11-22") for row in rows}) == 1, "columns stand below one another"


def test_list_as_json(root):
    first, _ = json.loads(run("list", "--records", root, "--json").output)
    assert first == {
        "target": TAG,
        "layer": "r50_c4",
        "size": "1x32x32",
        "threads": 1,
        "ms": 4.0,
        "vs_default": 1.25,
        "trials": 40,
        "date": "2026-11-22",
        "machine": "AMD EPYC 9004",
    }


def test_list_of_one_target(root):
    write(root, record(OTHER), tag="llvm-znver5")
    assert len(json.loads(run("list", "--records", root, "--json").output)) == 3
    assert len(json.loads(run("list", "--records", root, "--target", "llvm-znver5", "--json").output)) == 1
    assert (
        "no records of llvm-haswell. tvmdcn tune makes some."
        in run("list", "--records", root, "--target", "llvm-haswell").output
    )


def test_list_shows_ones_own_and_those_that_ship(root, monkeypatch):
    monkeypatch.setenv("TVMDCN_RECORDS", str(root))
    rows = json.loads(run("list", "--json").output)
    assert len(rows) == 2 + sum(len(TuningRecords.read(shipped_root(), p.parent.name).records) for p in _shipped())


def _shipped() -> list[Path]:
    return sorted(shipped_root().glob(f"*/{META}"))


def test_show_speaks_in_words(root):
    text = run("show", "r50_c4", "--records", root).output
    assert text.startswith(f"r50_c4 on {TAG}, 1 thread\n")
    assert f"schedule: variant {default_of(NAMED.spec).variant}; " in text
    assert "4.000 ms, 1.25x as fast as the default (5.000 ms) in the same run; best of 40 trials" in text
    assert "measured 2026-11-22 on AMD EPYC 9004, Linux 6.1; tvmdcn 0.1.0, apache-tvm " in text
    assert str(root / TAG) in text


def test_show_takes_patterns(root):
    write(root, record(DeformConv2dGradSpec.of(NAMED.spec), extents=NAMED.extents), tag="llvm-znver5")
    assert run("show", "r50*", "--records", root).output.count("schedule:") == 2
    assert "r50_c4 backward on llvm-znver5" in run("show", "r50_c4", "--records", root).output
    assert run("show", SPEC.slug, "--records", root).output.count("schedule:") == 1
    assert run("show", "--records", root).output.count("schedule:") == 3
    found = run("show", "edvr", "--records", root)
    assert found.exit_code == 1
    assert "no record matches edvr. See tvmdcn records list." in found.output


def test_show_of_hostile_provenance(tmp_path):
    strange = {"cpu": ["x"], "date": 7, "versions": "none", "hypervisor": "yes", "system": {}}
    root = write(tmp_path / "root", record(provenance=strange))
    found = run("show", "--records", root)
    assert found.exit_code == 0, found.output
    assert "measured unknown on unknown, unknown; versions unknown" in found.output


def test_terminal_obeys_no_stranger(tmp_path):
    clear = "\x1b[2J\x07"
    decisions = Decisions(f"x{clear}", {f"y{clear}": 1})
    strange = provenance(cpu=f"a{clear}b", date=clear, versions={"apache-tvm": clear, "tvmdcn": clear})
    root = write(tmp_path / "root", record(provenance=strange, decisions=decisions))
    for command in (("list",), ("show",), ("verify",)):
        found = run(*command, "--records", root)
        assert found.stdout
        assert not {"\x1b", "\x07"} & set(found.output)
    found = run("merge", root, "--into", tmp_path / "other")
    assert "refused" in found.output
    assert "\x1b" not in found.output


def test_missing_root_is_told(tmp_path):
    for command in ("list", "show", "verify", "prune"):
        found = run(command, "--records", tmp_path / "nowhere")
        assert found.exit_code == 1
        assert "no such directory" in found.output


# --- merge --------------------------------------------------------------------------------------------------


def test_merge_says_what_became_of_each(root, tmp_path):
    versions = {**provenance()["versions"], "apache-tvm": "0.1"}
    yours = write(tmp_path / "yours", record(OTHER), record(threads=9, provenance=provenance(versions=versions)))
    found = run("merge", yours, "--into", root)
    assert found.exit_code == 1, "something was refused"
    assert f"added: {TAG} deform_conv2d {OTHER.slug} 1x32x32 t1: 40 trials, 1.50x of default" in found.output
    assert f"refused: {TAG} deform_conv2d {SPEC.slug} 1x32x32 t9: it was tuned with apache-tvm 0.1, " in found.output
    assert f"1 added, 1 refused; records: {root}" in found.output
    assert run("merge", root, "--into", tmp_path / "new").exit_code == 0
    assert "would be: 3 added" in run("merge", root, "--into", tmp_path / "newer", "--dry-run").output


def test_merge_goes_to_ones_own(root, tmp_path, monkeypatch):
    (tmp_path / "own").mkdir()
    monkeypatch.setenv("TVMDCN_RECORDS", str(tmp_path / "own"))
    assert run("merge", root).exit_code == 0
    assert len(TuningRecords.read(tmp_path / "own", TAG).records) == 2


# --- prune --------------------------------------------------------------------------------------------------


def test_prune_keeps_what_is_looked_up(tmp_path):
    sizes = [record(extents=Extents(1, n, n)) for n in (16, 64, 32)]
    root = write(tmp_path / "root", *sizes, record(threads=2))
    assert "2 would go" in run("prune", "--records", root, "--dry-run").output
    assert len(TuningRecords.read(root, TAG).records) == 4
    before = [TuningRecords.read(root, TAG).best(SPEC, threads) for threads in (None, 1, 2, 8)]
    found = run("prune", "--records", root)
    assert found.exit_code == 0
    assert found.output.count(f"gone: record of deform_conv2d {SPEC.slug} t1 on 1 x ") == 2
    assert sorted(TuningRecords.read(root, TAG).records, key=repr) == sorted([sizes[1], record(threads=2)], key=repr)
    assert [TuningRecords.read(root, TAG).best(SPEC, threads) for threads in (None, 1, 2, 8)] == before
    assert "0 gone" in run("prune", "--records", root).output


def test_prune_deletes_the_logs_asked_for(root):
    folder = root / TAG / "trials"
    (folder / REPLACED).mkdir()
    for name, source in ((f"{REPLACED}/layer-t1-1", None), ("old-t1", "0" * 64), ("new-t1", None)):
        header = {} if source is None else {"source": source}
        (folder / f"{name}.jsonl").write_text(log_text(record(), [2e-3], **header))
    (folder / "damaged-t1.jsonl").write_text("x\n")

    def left() -> set[str]:
        return {path.relative_to(folder).as_posix() for path in folder.rglob("*.jsonl")}

    everything = left()
    run("prune", "--records", root, "--trials", "none")
    assert left() == everything
    run("prune", "--records", root)
    assert left() == everything - {f"{REPLACED}/layer-t1-1.jsonl"}
    run("prune", "--records", root, "--trials", "outdated", "--dry-run")
    assert "old-t1.jsonl" in left()
    run("prune", "--records", root, "--trials", "outdated")
    assert left() == {"layer-t1.jsonl", "new-t1.jsonl", "damaged-t1.jsonl"}
    run("prune", "--records", root, "--trials", "all")
    assert left() == set()
    assert len(TuningRecords.read(root, TAG).records) == 2


# --- verify -------------------------------------------------------------------------------------------------


def wrong(root: Path, tag: str = TAG, **options: bool) -> list[str]:
    return [f"{found.where}: {found.text}" for found in check_records(root, tag, **options) if found.serious]


def test_sound_records_are_well(root):
    found = run("verify", "--records", root, "--compile")
    assert (found.exit_code, found.output.splitlines()[-1]) == (0, "all is well"), found.output
    assert f"note: {TAG}/{META}: 2 records, sha256 " in found.output


def test_records_that_ship_are_well():
    for path in _shipped():
        assert wrong(path.parents[1], path.parent.name) == []


def test_verify_finds_orphans(tmp_path):
    values = default_of(SPEC).values
    gone = record(decisions=Decisions("gone", values))
    changed = record(threads=2, decisions=Decisions(default_of(SPEC).variant, {**values, "unroll": 3}))
    renamed = record(threads=3, decisions=Decisions(default_of(SPEC).variant, {"new_name": 1}))
    root = write(tmp_path / "root", gone, changed, renamed, record(OTHER))
    found = run("verify", "--records", root)
    assert found.exit_code == 1
    assert "3 wrong" in found.output
    assert f"wrong: {TAG}/{META}: deform_conv2d {SPEC.slug} t1: the design space has no variant 'gone'" in found.output
    assert "t2: the design space no longer has its decisions: unroll was 3, becomes " in found.output
    assert "new_name is unknown; register_pixels is new" in found.output


def test_verify_finds_damage(root):
    meta, log = root / TAG / META, root / TAG / "trials" / "layer-t1.jsonl"
    data = json.loads(meta.read_text())
    data["records"][0]["seconds"] /= 2
    whole = meta.read_text()
    meta.write_text(json.dumps(data))
    assert "is not what its digest" in wrong(root)[0]
    meta.write_text(whole)
    log.write_text(log.read_text().replace('"elapsed": 1.0', '"elapsed": -1'))
    assert wrong(root) == [
        f"{TAG}/trials/layer-t1.jsonl: {log}, line 3 cannot be read: a time is not a positive number. "
        "Delete it and tune again."
    ]


def test_verify_finds_what_is_elsewhere(root):
    (root / TAG).rename(root / "llvm-znver5")
    assert "it is of target 'llvm-znver4', not 'llvm-znver5'" in wrong(root, "llvm-znver5")[0]
    (root / "llvm-znver5" / META).unlink()
    assert wrong(root, "llvm-znver5") == ["llvm-znver5/trials/layer-t1.jsonl: it is of target 'llvm-znver4'"]
    (root / "llvm-znver5").rename(root / "pentium")
    assert "target 'pentium' is not known" in wrong(root, "pentium")[0]


def test_verify_finds_two_of_one_kind_and_none_of_whom(tmp_path):
    root = write(tmp_path / "root", record(), record(seconds=1e-3), record(OTHER, provenance={"cpu": "x"}))
    first, second = wrong(root)
    assert f"2 records of {SPEC.slug} for " in first
    assert "it does not say where it comes from: date, versions, source missing" in second


def test_verify_notes_what_is_worth_knowing(root):
    older = provenance(source="0" * 64, versions={**provenance()["versions"], "apache-tvm": "0.1"})
    write(root, record(seconds=4e-3, provenance=older), log=log_text(record(OTHER), [1e-3], source="0" * 64))
    notes = [found.text for found in check_records(root, TAG) if not found.serious]
    assert wrong(root) == []
    assert any(text.startswith("tuned with apache-tvm 0.1, and ") for text in notes)
    assert "slower than the default in its own run, 0.75x" in notes
    assert "1 of 1 records were tuned with an earlier state of the code that generates kernels" in notes
    assert "1 trials and no record: its tuning has not ended; the same command goes on with it" in notes
    assert "1 of 1 logs measured an earlier state of the code; tuning would not go on with them" in notes


def test_nothing_to_verify_is_told(tmp_path):
    (tmp_path / "root").mkdir()
    found = run("verify", "--records", tmp_path / "root")
    assert found.exit_code == 1
    assert "there are no records to verify" in found.output


# --- measuring again ----------------------------------------------------------------------------------------


def test_records_are_measured_again(tmp_path):
    pytest.importorskip("xgboost")
    here, spec, size = detect_target(), DeformConv2dSpec(8, 8, 1), Extents(1, 8, 8)
    usual = default_of(spec, here.tag)
    mine = record(
        spec, extents=size, decisions=usual, provenance={**provenance(), **host_identity()}, seconds=10.0, default=20.0
    )
    foreign = dataclasses.replace(mine, threads=2, provenance=provenance())
    root = write(tmp_path / "root", mine, foreign, tag=here.tag)
    found = run("verify", "--records", root, "--measure")
    assert found.exit_code == 0, found.output
    first, second = (line for line in found.output.splitlines() if " now, " in line)
    assert first.startswith(f"{here.tag} 1,8,8,8,8,k=1x1 t1: ")
    assert "10000.000 ms recorded (0.00x); 1.00x of default now, 2.00x then" in first
    assert "recorded (on another machine)" in second


def test_records_of_another_processor_are_not_measured(tmp_path):
    other = "llvm-cortex-a76" if detect_target().arch == "x86_64" else "llvm-znver5"
    root = write(tmp_path / "root", record(), tag=other)
    with pytest.raises(RecordsError, match="cannot be measured on this machine"):
        next(remeasure(root, other))
