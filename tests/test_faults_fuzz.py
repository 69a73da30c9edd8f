# SPDX-License-Identifier: Apache-2.0
"""Files that others wrote, or that broke: over 10,000 of them, each read, or refused in our words, or a miss.

No other exception, no crash, and no code of a file that is not the one its manifest was written for.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
import tarfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import handmade
import pytest
from bench_rows import row as make_row
from contributions import OTHER, log_text, record
from contributions import write as write_records
from fake_artifacts import build_fake
from handmade import SPEC
from mutations import damaged, mutations, restructured

from tvmdcn import cache, native
from tvmdcn.artifact import Artifact, DamagedArtifact, _seal, artifacts, find, nearest
from tvmdcn.bench.rows import read_rows
from tvmdcn.cache_key import CacheKey
from tvmdcn.errors import ArtifactError, RecordsError, TvmdcnError
from tvmdcn.packs.manifest import PackManifest
from tvmdcn.packs.pack import KernelPack
from tvmdcn.space import Decisions
from tvmdcn.spec import spec_from_json
from tvmdcn.target import detect_target
from tvmdcn.tuning.contribution import read_contribution
from tvmdcn.tuning.history import TrialLog, histories, read_log
from tvmdcn.tuning.record import Record
from tvmdcn.tuning.records import META, TuningRecords, read_each
from tvmdcn.tuning.records_merge import refusal
from tvmdcn.tuning.words import describe_decisions

TAG = "llvm-znver4"
COUNTS = {
    "manifest": 2400,
    "sealed manifest": 2100,
    "library": 400,
    "records": 2400,
    "signed records": 900,
    "log": 1500,
    "pack": 1500,
    "rows": 600,
    "holder": 300,
    "archive": 600,
}


def test_there_are_enough():
    assert sum(COUNTS.values()) > 10_000


def said(error: BaseException) -> str:
    """Check that a message can be printed, and is no page; return it."""
    text = str(error)
    assert text
    text.encode("utf-8")
    assert len(text) < 2000, text[:300]
    return text


def survives(action: Callable[[], Any], *refusals: type[BaseException]) -> Any:
    """Return what an action returns, None if it refuses in our words; any other exception is a failure."""
    try:
        return action()
    except refusals as error:
        said(error)
        return None


def put(path: Path, content: bytes | str) -> None:
    """Write a file anew: ext4 brings one that is truncated to the disk at once, 4 ms each time."""
    path.unlink(missing_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


# --- artifacts ----------------------------------------------------------------------------------------------


@pytest.fixture
def no_loading(monkeypatch):
    """Fail as soon as a library would be loaded."""
    monkeypatch.setattr(native, "load_module", lambda path: pytest.fail(f"{path} would have been loaded"))


def check_artifact(artifact: Artifact, original: Artifact) -> None:
    found = survives(lambda: Artifact.read(artifact.path), ArtifactError)
    again = survives(lambda: find(original.key), ArtifactError)
    assert again is None or again.key == original.key
    assert survives(lambda: list(artifacts()), ArtifactError) is not None
    if found is not None:
        repr(found)
        survives(found.load, ArtifactError)


def test_manifests(cache_dir, no_loading, caplog):
    caplog.set_level("CRITICAL")
    artifact = build_fake()
    manifest = artifact.path / "manifest.json"
    data, sound = json.loads(manifest.read_text()), 0
    put(artifact.library, b"another one")
    for content in mutations(data, 1, COUNTS["manifest"]):
        put(manifest, content)
        check_artifact(artifact, artifact)
        with contextlib.suppress(ArtifactError):
            # What is not refused is what was written: white space and keys that stand twice apart.
            assert Artifact.read(artifact.path) == artifact
            sound += 1
    assert sound < COUNTS["manifest"] / 20


def test_manifests_whose_digest_is_right(cache_dir, no_loading, caplog):
    """A hostile writer makes the digest, too: then the fields decide."""
    caplog.set_level("CRITICAL")
    artifact = build_fake()
    manifest = artifact.path / "manifest.json"
    data, rng = json.loads(manifest.read_text()), random.Random(2)
    put(artifact.library, b"another one")
    for _ in range(COUNTS["sealed manifest"]):
        changed = restructured(data, rng)
        if isinstance(changed, dict):
            changed["digest"] = _seal(changed)
        put(manifest, json.dumps(changed))
        check_artifact(artifact, artifact)
        survives(lambda: nearest(CacheKey.of(SPEC, detect_target(), "naive")), ArtifactError)
        if isinstance(changed, dict) and "key" in changed:
            key = survives(lambda key=changed["key"]: CacheKey.from_json(key), ArtifactError)
            place = key and survives(lambda key=key: key.path(cache_dir), TvmdcnError)
            assert not place or cache_dir in place.resolve().parents


def test_libraries_are_loaded_only_if_they_are_the_ones(cache_dir, no_loading):
    artifact = handmade.build(SPEC)
    content, rng = artifact.library.read_bytes(), random.Random(3)
    for _ in range(COUNTS["library"]):
        changed = damaged(content, rng)
        if changed == content:
            continue
        put(artifact.library, changed)
        with pytest.raises(DamagedArtifact) as caught:
            artifact.load()
        said(caught.value)


def test_notes_of_holders(cache_dir):
    path = cache_dir / "kernel"
    note = {"pid": 1, "host": "here", "since": 1.0, "start": 3}
    for content in mutations(note, 4, COUNTS["holder"]):
        put(cache_dir / ".kernel.holder", content)
        cache._holder(cache_dir / ".kernel.holder").encode()
    with cache.lock(path, timeout=0):
        pass


# --- records ------------------------------------------------------------------------------------------------


def use_records(found: TuningRecords) -> None:
    """Do with records what a build, a tuning and the commands do."""
    for wanted in (OTHER, SPEC, record().spec):
        found.best(wanted, 3)
    for entry in found.records:
        describe_decisions(entry.decisions, 24).encode("utf-8", "replace")
        assert entry.pixels > 0
        said(RecordsError(refusal(entry, "llvm-unheard_of") or "fine"))
    texts = [json.dumps(entry.to_json()) for entry in found.records]
    assert [Record.from_json(json.loads(text)) for text in texts] == found.records


def test_records(tmp_path):
    root = write_records(tmp_path / "root", record(), record(OTHER, threads=4), record(threads=2))
    meta, sound = root / TAG / META, 0
    data = json.loads(meta.read_text())
    for content in mutations(data, 5, COUNTS["records"]):
        put(meta, content)
        found = survives(lambda: TuningRecords.read(root, TAG), RecordsError)
        survives(lambda content=content: read_each(content, TAG), RecordsError)
        if found is not None:
            sound += 1
            use_records(found)
    assert sound < COUNTS["records"] / 4


def test_records_whose_digest_is_right(tmp_path):
    root = write_records(tmp_path / "root", record(), record(OTHER))
    meta, rng, sound = root / TAG / META, random.Random(6), 0
    data = json.loads(meta.read_text())
    for row in data["records"]:
        del row["digest"]  # a record without one is of the first version
    for _ in range(COUNTS["signed records"]):
        put(meta, json.dumps(restructured(data, rng)))
        found = survives(lambda: TuningRecords.read(root, TAG), RecordsError)
        if found is not None:
            sound += 1
            use_records(found)
    assert sound > 50, "most changes of provenance are harmless"


def test_logs_of_trials(tmp_path):
    folder = tmp_path / TAG / "trials"
    folder.mkdir(parents=True)
    lines = [json.loads(line) for line in log_text(record(), [2e-3, 3e-3, 1e-3]).splitlines()]
    log, rng = folder / "layer-t1.jsonl", random.Random(7)
    header = {name: value for name, value in lines[0].items() if name != "schema"}
    for number, content in enumerate(mutations(lines, 7, COUNTS["log"])):
        rows = [json.dumps(line).encode() for line in lines]
        if number % 2:
            rows[rng.randrange(len(rows))] = content.replace(b"\n", b"")
        else:
            rows = [damaged(b"\n".join(rows) + b"\n", rng)]
        put(log, b"\n".join(rows) + rng.choice((b"\n", b"")))
        survives(lambda: read_log(log), RecordsError)
        survives(lambda: [repr(found) for found in histories(tmp_path)], RecordsError)
        opened = survives(lambda: TrialLog(log, header), RecordsError)
        if opened is not None:
            assert len(read_log(log)[1]) == len(opened.rows)


def test_archives(tmp_path):
    root = write_records(tmp_path / "root", record(), log=log_text(record(), [2e-3]))
    members = {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*.json*")}
    archive, rng = tmp_path / "archive", random.Random(8)
    contents = []
    for mode in ("w:gz", "w:xz", "w"):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode=mode) as tar:
            for name, content in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        contents.append(buffer.getvalue())
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, content in members.items():
            packed.writestr(name, content)
    contents.append(buffer.getvalue())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of zipfile, for names that stand twice
        for number in range(COUNTS["archive"]):
            put(archive, damaged(contents[number % 4], rng))
            for part in survives(lambda: read_contribution(archive), RecordsError) or ():
                survives(lambda part=part: read_each(part.meta, part.tag), RecordsError)


def test_values_that_stand_in_files():
    rng = random.Random(9)
    for data, read in (
        (SPEC.to_json(), spec_from_json),
        ({"variant": "full", "values": {"a": 1}}, Decisions.from_json),
    ):
        for _ in range(500):
            survives(lambda data=data, read=read: read(restructured(data, rng)), TvmdcnError)


# --- packs and rows -----------------------------------------------------------------------------------------


def test_manifests_of_packs(tmp_path):
    target, digest = detect_target(), "0" * 64
    path = f"{target.tag}/kernel"
    data = {
        "format": "tvmdcn pack",
        **json.loads(_pack_text(target, path, digest)),
    }
    PackManifest.from_text(json.dumps(data).encode())
    tmp_path.chmod(0o700)
    for content in mutations(data, 10, COUNTS["pack"]):
        found = survives(lambda content=content: PackManifest.from_text(content), ArtifactError)
        put(tmp_path / "manifest.json", content)
        survives(lambda: repr(KernelPack.read(tmp_path)), ArtifactError)
        if found is not None:
            for name in found.files:
                assert tmp_path in (tmp_path / name).resolve().parents
            found.to_text().encode()


def _pack_text(target: Any, path: str, digest: str) -> str:
    from tvmdcn.packs.manifest import FileRecord, PackedKernel

    files = {f"{path}/{name}": FileRecord(10, digest) for name in ("kernel.so", "manifest.json")}
    kernels = (PackedKernel(path, SPEC, target),)
    manifest = PackManifest("dcn", "1.0", "2026-11-22", "0.1.0", "0.27.0", "0.1.14", kernels, (), files)
    return manifest.to_text()


def test_rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    data = make_row().to_json()
    line = json.dumps(data).encode()
    for content in mutations(data, 11, COUNTS["rows"]):
        put(path, line + b"\n" + content.replace(b"\n", b"") + b"\n" + line + b"\n")
        rows, complaints = read_rows(path)
        assert len(rows) >= 2, "the sound lines are used"
        for complaint in complaints:
            said(RecordsError(complaint))
