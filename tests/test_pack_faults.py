# SPDX-License-Identifier: Apache-2.0
"""Packing that is killed, and packing by several at once: what is there is always a whole pack, or none."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from handmade import ROOT, SPEC

from tvmdcn.packs.pack import KernelPack

KILLS = 12

_PACK = """
import sys
sys.path[:0] = [{tests!r}, {root!r}]
import pytest, handmade, packing
handmade.install(pytest.MonkeyPatch())
from pathlib import Path
from tvmdcn.packs.writer import build_pack, installed_runtime
runtimes = [installed_runtime()]  # 6 MB, so that writing takes a while
for version in range({rounds} + 1):
    build_pack(
        [handmade.SPEC, packing.OTHER],
        ["llvm"],
        {place!r},
        version=str(version),
        runtimes=runtimes,
        cache_dir=Path({cache!r}),
    )
    print("go", flush=True)  # from now on it only writes
"""


@pytest.fixture
def packing_process(tmp_path):
    """What starts a process that packs again and again into one place."""
    cache = tmp_path / "cache"
    cache.mkdir(mode=0o700)

    def start(rounds: int) -> subprocess.Popen[str]:
        place = str(tmp_path / "dcn_pack")
        code = _PACK.format(tests=str(ROOT / "tests"), root=str(ROOT), place=place, cache=str(cache), rounds=rounds)
        return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    return start


def others(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name not in ("dcn_pack", "cache"))


def test_a_packing_that_is_killed_leaves_a_whole_pack(packing_process, tmp_path):
    rng = random.Random(12)
    interrupted = 0
    for _ in range(KILLS):
        process = packing_process(1000)
        assert process.stdout is not None
        assert process.stdout.readline() == "go\n", process.communicate()
        time.sleep(rng.uniform(0, 0.2))
        process.kill()
        process.communicate()
        pack = KernelPack.read(tmp_path / "dcn_pack")
        pack.verify()
        assert pack.load(SPEC).spec == SPEC
        interrupted += bool(others(tmp_path))
    assert interrupted  # or nothing was tested
    last = packing_process(1)
    _, said = last.communicate(timeout=60)
    assert last.returncode == 0, said
    assert others(tmp_path) == []  # what the killed ones left is gone
    assert KernelPack.read(tmp_path / "dcn_pack").manifest.version == "1"


def test_several_may_pack_into_one_place_at_once(packing_process, tmp_path):
    processes = [packing_process(5) for _ in range(4)]
    seen = set()
    while any(process.poll() is None for process in processes):
        if (tmp_path / "dcn_pack").exists():
            seen.add(KernelPack.read(tmp_path / "dcn_pack").manifest.version)
        time.sleep(0.01)
    for process in processes:
        _, said = process.communicate()
        assert process.returncode == 0, said
    KernelPack.read(tmp_path / "dcn_pack").verify()
    assert others(tmp_path) == []
    assert len(seen) > 1
