# SPDX-License-Identifier: Apache-2.0
"""A full disk: what is there stays, what is new is refused in words, and the next attempt with room goes on."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import handmade
import pytest
from bench_rows import row
from contributions import OTHER, log_text, record
from contributions import write as write_records
from handmade import SPEC

from tvmdcn import cache
from tvmdcn.artifact import find
from tvmdcn.bench.rows import append_row, read_rows
from tvmdcn.cache_key import CacheKey
from tvmdcn.errors import ArtifactError, BuildError, RecordsError, TuningError
from tvmdcn.files import leftovers, write_whole
from tvmdcn.packs.pack import KernelPack
from tvmdcn.packs.writer import build_pack
from tvmdcn.spec import DeformConv2dSpec
from tvmdcn.target import detect_target
from tvmdcn.tuning.history import TrialLog, TrialRow, read_log
from tvmdcn.tuning.records import META, TuningRecords
from tvmdcn.tuning.records_merge import merge

TAG = "llvm-znver4"
FULL = "No space left on device"


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A small file system of its own."""
    place = tmp_path_factory.mktemp("disk")
    options = f"size=512k,mode=0700,uid={os.geteuid()}"
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"mounting a small file system needs root: {mounted.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.fixture
def fill(disk: Path) -> Iterator:
    """Return a function that leaves so many bytes free on the disk, which is empty again after the test."""
    ballast = disk / "ballast"

    def leave(free: int) -> None:
        ballast.unlink(missing_ok=True)
        room = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
        with open(ballast, "wb") as file:
            file.write(bytes(max(0, room - free)))

    yield leave
    for path in disk.iterdir():
        subprocess.run(["rm", "-rf", str(path)], check=True)


def files_in(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# --- artifacts and packs ------------------------------------------------------------------------------------


def test_artifacts(disk, fill, monkeypatch):
    root = disk / "cache"
    monkeypatch.setenv("TVMDCN_CACHE_DIR", str(root))
    key = CacheKey.of(SPEC, detect_target(), "tuned")
    for free in (0, 4096, 8192, 12288, 16384):
        fill(free)
        with pytest.raises((ArtifactError, BuildError), match=FULL):
            handmade.build(SPEC)
        (disk / "ballast").unlink()
        assert find(key) is None
        assert [path for path in root.rglob("*") if "staging" in path.name] == []
    artifact = handmade.build(SPEC)
    before = files_in(artifact.path)
    for free in (0, 8192):
        fill(free)
        with pytest.raises((ArtifactError, BuildError), match=FULL):
            handmade.build(SPEC, rebuild=True)
        assert files_in(artifact.path) == before
        assert find(key) == artifact
        artifact.load()


def test_generated_kernels(disk, fill, monkeypatch):
    """LLVM ends the process if it cannot write a file."""
    from tvmdcn.builder import build

    monkeypatch.setenv("TVMDCN_CACHE_DIR", str(disk / "cache"))
    spec = DeformConv2dSpec(4, 4, 1)
    for free in (0, 20480):
        fill(free)
        with pytest.raises((ArtifactError, BuildError), match=FULL):
            build(spec, schedule="naive")
    (disk / "ballast").unlink()
    build(spec, schedule="naive").load()


def test_packs(disk, fill, cache_dir):
    specs, place = [DeformConv2dSpec(4, 4, 1)], disk / "dcn_pack"
    pack = build_pack(specs, ["llvm"], place, cache_dir=cache_dir)
    before = files_in(place)
    for free in (0, 8192, 16384):
        fill(free)
        with pytest.raises(ArtifactError, match=FULL):
            build_pack(specs, ["llvm"], place, version="2.0", cache_dir=cache_dir)
        assert files_in(place) == before
        assert KernelPack.read(place).sha256 == pack.sha256
        assert sorted(p.name for p in disk.iterdir()) == ["ballast", "dcn_pack"]
    (disk / "ballast").unlink()
    assert build_pack(specs, ["llvm"], place, version="2.0", cache_dir=cache_dir).manifest.version == "2.0"


# --- records ------------------------------------------------------------------------------------------------


def test_records(disk, fill):
    root = write_records(disk / "root", record())
    before = (root / TAG / META).read_bytes()
    for free in (0, 1):
        fill(free)
        with pytest.raises(RecordsError, match=f"{FULL}. The trials are kept: make room"):
            TuningRecords.keep(root, TAG, record(OTHER))
        assert (root / TAG / META).read_bytes() == before
        assert leftovers(root / TAG / META) == []
    (disk / "ballast").unlink()
    TuningRecords.keep(root, TAG, record(OTHER))
    assert len(TuningRecords.read(root, TAG).records) == 2


def test_logs_of_trials(disk, fill):
    path = disk / "trials" / "layer-t1.jsonl"
    log, row = TrialLog(path, {"name": "layer"}), TrialRow(record().decisions, 1e-3, "", 1.0)
    log.add(row)
    fill(0)

    def fill_up() -> None:
        while os.statvfs(disk).f_bavail >= 0:
            log.add(row)

    with pytest.raises(RecordsError, match=FULL):
        fill_up()
    written = len(log.rows)
    assert len(read_log(path)[1]) == written
    assert path.read_bytes().endswith(b"\n"), "no torn line is left"
    with pytest.raises(RecordsError, match="What was logged before is kept"):
        fill_up()
    (disk / "ballast").unlink()
    again = TrialLog(path, {"name": "layer"})
    again.add(row)
    assert len(read_log(path)[1]) == len(log.rows) + 1


def test_merging(disk, fill, tmp_path):
    mine = write_records(disk / "mine", record(), log=log_text(record(), [2e-3]))
    new = record(default=9e-3)
    yours = write_records(tmp_path / "yours", new, log=log_text(new, [1e-3] * 200))
    before = files_in(mine)
    fill(0)
    with pytest.raises(RecordsError, match=FULL):
        list(merge(yours, mine))
    after = files_in(mine)
    assert after[f"{TAG}/{META}"] == before[f"{TAG}/{META}"]
    assert before[f"{TAG}/trials/layer-t1.jsonl"] in after.values(), "no trial is lost"
    (disk / "ballast").unlink()
    assert [verdict.action for verdict in merge(yours, mine)] == ["replaced"]


def test_no_room_for_builds_is_no_failure_of_candidates(disk, fill, monkeypatch):
    """Failures are remembered and not tried again, so what failed for want of room must not be one."""
    pytest.importorskip("xgboost")
    from tvmdcn.spec import Extents
    from tvmdcn.tuning.tuner import tune

    spec = DeformConv2dSpec(4, 4, 1)
    monkeypatch.setattr("tempfile.tempdir", str(disk))
    records = disk.parent / "records-of-a-full-disk"
    fill(24576)
    with pytest.raises((TuningError, OSError), match=FULL):
        tune(spec, Extents(1, 3, 3), trials=2, threads=1, records=records)
    (log,) = records.rglob("*.jsonl")
    assert [row.reason for row in read_log(log)[1] if row.reason] == []
    assert sorted(p.name for p in disk.iterdir()) == ["ballast"]


# --- measurements and reports -------------------------------------------------------------------------------


def test_rows_of_a_benchmark(disk, fill):
    path, written = disk / "rows.jsonl", []
    append_row(path, row())
    fill(0)

    def fill_up() -> None:
        while os.statvfs(disk).f_bavail >= 0:
            append_row(path, row())
            written.append(1)

    with pytest.raises(OSError, match=FULL):
        fill_up()
    rows, complaints = read_rows(path)
    assert len(rows) == 1 + len(written)
    before = len(complaints)
    assert before <= 1, "at most the line that was cut"
    (disk / "ballast").unlink()
    append_row(path, row())
    rows, complaints = read_rows(path)
    assert (len(rows), len(complaints)) == (2 + len(written), before)


def test_pages(disk, fill):
    page = disk / "report.html"
    write_whole(page, "before")
    fill(0)
    with pytest.raises(OSError, match=FULL):
        write_whole(page, "x" * 5000)
    assert page.read_text() == "before"
    assert leftovers(page) == []
    (disk / "ballast").unlink()
    write_whole(page, "x" * 5000)
    assert page.read_text() == "x" * 5000


def test_report_on_a_full_disk(disk, fill, tmp_path):
    pytest.importorskip("altair")
    from click.testing import CliRunner

    from tvmdcn.cli import main

    rows, page = tmp_path / "rows.jsonl", disk / "report.html"
    append_row(rows, row())
    page.write_text("the report of yesterday")
    fill(4096)
    found = CliRunner().invoke(main, ["report", str(rows), "--output", str(page)])
    assert found.exit_code == 1
    assert FULL in found.output
    assert page.read_text() == "the report of yesterday"
    assert sorted(p.name for p in disk.iterdir()) == ["ballast", "report.html"]


def test_whole_files_keep_modes_links_and_devices(tmp_path):
    page, link = tmp_path / "page", tmp_path / "link"
    page.write_text("before")
    page.chmod(0o640)
    link.symlink_to(page)
    write_whole(link, "after \ud800")
    assert page.read_text() == "after ?"
    assert link.is_symlink()
    assert page.stat().st_mode & 0o777 == 0o640
    write_whole("/dev/null", "x")
    assert not Path("/dev/null").is_file()
    with pytest.raises(OSError, match=FULL):
        write_whole("/dev/full", "x")


# --- where nothing can be mounted ---------------------------------------------------------------------------

_LIMITED = """
import resource, sys
sys.path[:0] = [{tests!r}, {root!r}]
import handmade
from pathlib import Path
from tvmdcn.errors import TvmdcnError
from tvmdcn.space import Decisions
from tvmdcn.spec import Extents
from tvmdcn.tuning.records import Record, TuningRecords
record = Record(handmade.SPEC, Extents(1, 3, 3), 1, Decisions("x", {{}}), 1.0, 2.0, 3, {{"system": "x" * 3000}})
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
for action in (
    lambda: handmade.build(handmade.SPEC),
    lambda: TuningRecords.keep(Path(sys.argv[1]) / "records", "llvm-znver4", record),
):
    try:
        action()
        print("written")
    except TvmdcnError as error:
        print(type(error).__name__, repr(str(error)))
"""


@pytest.mark.parametrize("limit", [100, 2000])
def test_files_that_may_not_grow(limit, cache_dir, tmp_path):
    """``ulimit -f``, a quota: the same by another name, and no root is needed."""
    code = _LIMITED.format(tests=str(handmade.ROOT / "tests"), root=str(handmade.ROOT))
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path), str(limit)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first.startswith(("ArtifactError", "BuildError"))
    assert second.startswith("RecordsError")
    assert "File too large" in second
    left = [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".lock"]
    assert left == []


@pytest.mark.parametrize("call", ["fsync", "rename", "mkdir"])
def test_every_step_may_fail(call, cache_dir, monkeypatch):
    """Whatever the system call that fails, nothing half-written is there, and the next build goes well."""
    real, failures = getattr(os, call), []

    def fail(*arguments, **options):
        if "staging" in str(arguments[0]) or (call == "fsync" and not failures):
            failures.append(1)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(ArtifactError, match=f"cannot be written: .*{FULL}.* Make room in "):
            handmade.build(SPEC)
    assert failures
    assert list(cache_dir.rglob("*.so")) == []
    assert list(cache_dir.rglob("*staging*")) == []
    artifact = handmade.build(SPEC)
    cache.check_trusted(artifact.library, cache_dir)
    artifact.load()
