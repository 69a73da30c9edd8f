# SPDX-License-Identifier: Apache-2.0
"""What a worker measures with: processors it is held to, cold caches, memory, and the seam for other devices.

No time is ever asserted, but for those of a device whose clock a test sets.
"""

from __future__ import annotations

import os
import sys

import numpy as np
import pytest
from bench_fakes import FAKES, QUICK, SMALL, fake

from tvmdcn.bench import device as bench_device
from tvmdcn.bench import machine as bench_machine
from tvmdcn.bench.device import DEVICES, CpuDevice, last_level_bytes
from tvmdcn.bench.inputs import Inputs
from tvmdcn.bench.machine import choose_processors, held_to
from tvmdcn.bench.protocol import compare
from tvmdcn.bench.worker import Layers, _small
from tvmdcn.problems import PROBLEMS, TEST_PROBLEMS, parse_problem
from tvmdcn.spec import Extents

linux = pytest.mark.skipif(sys.platform != "linux", reason="Linux alone tells this")
# Larger than the small image that comes before it.
LARGER = parse_problem("1,2,256,256,2,k=1x1,mask=0")
MIB = 1 << 20

# --- processors ------------------------------------------------------------------------------------------------


@pytest.fixture
def eight_processors(monkeypatch, tmp_path):
    """Four cores with two processors each: 0 and 4, 1 and 5, 2 and 6, 3 and 7."""
    for processor in range(8):
        folder = tmp_path / f"cpu{processor}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{processor % 4},{processor % 4 + 4}\n")
    monkeypatch.setattr(bench_machine, "_PROCESSORS", tmp_path)
    monkeypatch.setattr(bench_machine, "available_processors", lambda: list(range(8)))


@linux
@pytest.mark.parametrize(
    ("count", "chosen"), [(1, [3]), (2, [2, 3]), (4, [0, 1, 2, 3]), (5, [0, 1, 2, 3, 7]), (8, list(range(8)))]
)
def test_cores_are_used_before_their_second_threads(eight_processors, count, chosen):
    assert choose_processors(count) == chosen


@linux
def test_no_more_processors_than_there_are(eight_processors):
    assert choose_processors(99) == list(range(8))


@linux
def test_processors_that_may_not_be_used_are_not_chosen(eight_processors, monkeypatch):
    monkeypatch.setattr(bench_machine, "available_processors", lambda: [1, 4, 5])
    assert choose_processors(2) == [1, 4]
    assert choose_processors(3) == [1, 4, 5]


def test_where_nothing_can_be_held_nothing_is(monkeypatch):
    monkeypatch.delattr(os, "sched_setaffinity", raising=False)
    assert choose_processors(1) is None
    with held_to(None):
        pass


@linux
def test_thread_is_held_and_let_go():
    before = os.sched_getaffinity(0)
    with held_to([max(before)]):
        assert os.sched_getaffinity(0) == {max(before)}
    assert os.sched_getaffinity(0) == before


@linux
def test_providers_are_held_to_the_same_processors_and_rows_say_which():
    threads = [1, 2] if len(os.sched_getaffinity(0)) > 1 else [1]
    rows = compare([SMALL], threads, [fake("right", "ours"), fake("noisy"), fake("raises")], protocol=QUICK)
    for found in rows:
        expected = None if found.status == "failed" else tuple(choose_processors(found.threads))
        assert found.affinity == expected


@linux
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="there is one processor only")
def test_rows_say_where_a_provider_really_ran():
    (found,) = compare([SMALL], [1], [fake("escaping")], protocol=QUICK)
    assert set(found.affinity) >= os.sched_getaffinity(0) > set(choose_processors(1))


# --- cold caches -----------------------------------------------------------------------------------------------


class Clockwork:
    """A device whose calls take 1, 2, 3... milliseconds, and which notes what it is asked for."""

    evicted_bytes = 12345
    resolution = 4096

    def __init__(self):
        self.asked = []
        self.taken = 0
        DEVICES["clockwork"].made.append(self)

    def time(self, call):
        call()
        self.asked.append("time")
        self.taken += 1
        return float(self.taken)

    def evict(self):
        self.asked.append("evict")

    def release(self):
        self.asked.append("release")

    def held(self):
        return 1 << 30

    def reset_peak(self):
        self.asked.append("reset")

    def peak(self):
        return (1 << 30) + 1000 * (1 + self.asked.count("reset"))


@pytest.fixture
def clockwork(monkeypatch):
    """The device, and the devices that were made."""

    def make():
        return Clockwork()

    make.made = []
    monkeypatch.setitem(DEVICES, "clockwork", make)
    return make.made


@pytest.fixture
def prepared(tmp_path, clockwork):
    folder, _ = Inputs(tmp_path, 0, None).of(SMALL)
    layers = Layers(f"{FAKES}:right", None, 1, "clockwork")
    request = {"spec": SMALL.spec.to_json(), "extents": vars(SMALL.extents), "tensors": str(folder), "output": None}
    answer = layers.prepare(request)
    (device,) = clockwork
    return layers, device, answer


def test_a_device_measures_in_ways_of_its_own(prepared):
    _, device, answer = prepared
    assert device.asked == ["release", "reset", "release", "reset", "time"]
    assert answer["call_ms"] == 1.0
    output = np.prod(SMALL.spec.output_shape(SMALL.extents)) * 4
    described = answer["described"]
    # Of 2000 bytes above what was held when it was prepared, and of 3000 when it was called, results are not its own.
    assert described["memory_prepare_bytes"] == 2000
    assert described["memory_bytes"] == 3000 - output
    assert described["memory_resolution_bytes"] == 4096


@pytest.mark.parametrize(("cache", "asked"), [("warm", ["time"] * 3), ("cold", ["evict", "time"] * 3)])
def test_caches_are_filled_before_each_cold_call(prepared, cache, asked):
    layers, device, _ = prepared
    device.asked.clear()
    request = {"cache": cache, "seconds": 0, "min_calls": 3, "warmup": None}
    assert layers.measure(request) == {"times_ms": [2.0, 3.0, 4.0]}
    assert device.asked == asked


def test_eviction_is_timed_when_it_has_what_to_read(prepared):
    layers, device, _ = prepared
    device.asked.clear()
    assert layers.evict({}) == {"evict_ms": 2.0, "evicted_bytes": 12345}
    assert device.asked == ["evict", "evict", "time"]


def test_cold_and_warm_are_rows_of_their_own():
    rows = compare([SMALL], [1], [fake("right", "ours"), fake("raises")], protocol=QUICK, caches=["warm", "cold"])
    assert [(found.provider, found.cache, found.status) for found in rows] == [
        *(("right", cache, "ok") for cache in ("warm", "cold")),
        *(("raises", cache, "failed") for cache in ("warm", "cold")),
    ]
    warm, cold = (found.protocol for found in rows[:2])
    assert warm == {"rounds": 2, "burst_seconds": 0.001, "min_calls": 2, "warmup_seconds": 0.005, "evicted_bytes": None}
    assert cold == {**warm, "evicted_bytes": 2 * last_level_bytes()}
    assert rows[0].max_rel_error == rows[1].max_rel_error
    with pytest.raises(ValueError, match="caches must be some of warm, cold, got tepid"):
        compare([SMALL], [1], [fake("right")], caches=["tepid"])


def test_more_is_read_than_the_caches_hold_by_each_processor(monkeypatch):
    device = CpuDevice()
    assert device.evicted_bytes == 2 * last_level_bytes() > last_level_bytes()
    device.evicted_bytes = 1 << 16
    held = []
    read = CpuDevice._read

    def note(self, barrier):
        held.append(tuple(os.sched_getaffinity(0)))
        read(self, barrier)

    monkeypatch.setattr(CpuDevice, "_read", note)
    device.evict()
    assert device._buffer.nbytes == 1 << 16
    if len(device._processors) > 1:
        device.evict()
        assert sorted(held) == sorted(2 * [(processor,) for processor in device._processors])


def test_cache_of_unknown_size_is_taken_for_a_large_one(monkeypatch):
    class Target:
        l2_bytes = l3_bytes = 0

    monkeypatch.setattr(bench_device, "detect_target", Target)
    assert last_level_bytes() == 32 * MIB
    Target.l2_bytes = 3 * MIB
    assert last_level_bytes() == 3 * MIB
    Target.l3_bytes = 48 * MIB
    assert last_level_bytes() == 48 * MIB


def test_device_that_is_not_known_is_a_reason():
    (found,) = compare([SMALL], [1], [fake("right", device="abacus")], protocol=QUICK)
    assert (found.device, found.reason) == ("abacus", "nothing times calls on the device 'abacus'; there are cpu, cuda")


# --- memory ----------------------------------------------------------------------------------------------------


@linux
@pytest.mark.parametrize("amount", [0, 1, 8, 64])
def test_memory_of_a_call_is_what_it_used(amount):
    (found,) = compare([LARGER], [1], [fake("hungry", schedule=str(amount), role="ours")], protocol=QUICK)
    assert found.status == "ok"
    assert 4096 <= found.memory_resolution_bytes <= 64 * MIB
    slack = min(found.memory_resolution_bytes, 2 * MIB)
    assert found.memory_bytes == pytest.approx(amount * MIB, abs=slack)
    # What the reference takes while it is prepared is the fake's own.
    assert found.memory_prepare_bytes >= 0


@linux
def test_memory_that_is_kept_counts_at_each_call():
    (found,) = compare([LARGER], [1], [fake("greedy", schedule="64", role="ours")], protocol=QUICK)
    assert found.memory_bytes == pytest.approx(32 * MIB, abs=2 * MIB)
    assert found.memory_prepare_bytes == pytest.approx(64 * MIB, abs=16 * MIB)


@linux
def test_results_and_copies_of_inputs_are_not_counted():
    problem = parse_problem("1,16,512,512,16,k=1x1,mask=0")  # 16 MiB of image, and of result
    (found,) = compare([problem], [1], [fake("copying", role="ours")], protocol=QUICK)
    assert found.status == "ok"
    # It holds the result that it copies: 16 MiB, beside the copy of the image and the result itself.
    assert found.memory_bytes == pytest.approx(16 * MIB, abs=2 * MIB)


def test_memory_is_not_known_everywhere(monkeypatch, tmp_path):
    monkeypatch.setattr(bench_device, "_PROCESS", tmp_path)
    device = CpuDevice()
    device.reset_peak()
    assert (device.held(), device.peak(), device.resolution) == (None, None, None)


@pytest.mark.parametrize("name", [*PROBLEMS, *TEST_PROBLEMS])
def test_first_call_is_of_a_small_image_that_the_layer_takes(name):
    problem = {**PROBLEMS, **TEST_PROBLEMS}[name]
    small = _small(problem.spec, problem.extents)
    assert min(problem.spec.output_size(small.height, small.width)) >= 1
    assert small.batch <= 1
    assert small.height <= min(problem.extents.height, 8)
    assert small.width <= min(problem.extents.width, 8)


def test_small_image_grows_to_what_the_kernel_spans():
    problem = parse_problem("1,1,40,50,1,k=7x7,d=3,p=0")
    assert _small(problem.spec, Extents(4, 40, 50)) == Extents(1, 32, 32)
    assert _small(problem.spec, Extents(4, 19, 24)) == Extents(1, 19, 24)


# --- what a provider says --------------------------------------------------------------------------------------


def test_artifact_and_note_stand_in_the_row():
    (found,) = compare([SMALL], [1], [fake("named", "ours")], protocol=QUICK)
    assert (found.artifact, found.note, found.tensors) == ("an-artifact", "it sees <this> its own way", "made")


def test_rows_of_a_run_have_its_name_and_its_commit(tmp_path):
    rows = compare([SMALL], [1], [fake("right", "ours"), fake("raises")], protocol=QUICK, run="a run")
    assert {found.run for found in rows} == {"a run"}
    assert {found.commit for found in rows} == {bench_machine.identify_commit()}
    (other,) = compare([SMALL], [1], [fake("right", "ours")], protocol=QUICK)
    assert other.run not in (None, "a run")


def test_commit_is_that_of_the_checkout(monkeypatch, tmp_path):
    monkeypatch.setattr(bench_machine, "_CHECKOUT", tmp_path)
    assert bench_machine.identify_commit() is None
    assert "commit" not in bench_machine.identify_versions().get("tvmdcn", "")


def test_commit_has_a_mark_where_something_was_changed(monkeypatch, tmp_path):
    import subprocess

    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e@example.org"]
    (tmp_path / "tvmdcn").mkdir()
    code = tmp_path / "tvmdcn" / "code.py"
    code.write_text("1\n")
    try:
        for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "m"]):
            subprocess.run([*git, *command], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"git: {error}")
    monkeypatch.setattr(bench_machine, "_CHECKOUT", tmp_path)
    commit = bench_machine.identify_commit()
    assert len(commit) == 10
    (tmp_path / "rows.jsonl").write_text("beside the code\n")
    assert bench_machine.identify_commit() == commit
    code.write_text("2\n")
    assert bench_machine.identify_commit() == f"{commit}+"
    assert bench_machine.identify_versions()["tvmdcn"].endswith(f"(commit {commit}, changed)")
