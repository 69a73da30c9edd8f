# SPDX-License-Identifier: Apache-2.0
"""Tuning on servers of TVM's RPC, for real: a tracker and two servers on this machine, of which one is killed while
it measures and the other stops to answer; and tuners that are interrupted and killed.

What the farm makes of every other event is tested without servers in test_tuning_farm.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

pytest.importorskip("xgboost")
pytest.importorskip("cloudpickle")
pytest.importorskip("tornado", reason="TVM's tracker needs tornado: pip install 'tvmdcn[rpc]'")

from tvmdcn.problems import parse_problem
from tvmdcn.target import available_processors, detect_target
from tvmdcn.tuning.farm import Farm, ServersLost, ServerState
from tvmdcn.tuning.records import TuningRecords
from tvmdcn.tuning.tracker import Tracker, parse_address
from tvmdcn.tuning.tuner import tune

TAG = detect_target().tag
# A layer with many variants of schedules: much to try before the slow search begins.
LAYER = "1,32,9,10,32,og=4"
MANY = parse_problem(LAYER)
TRIALS = 6
KEY = "room"
# A server that does not answer for so long is lost; on a busy machine one that is well may take seconds.
SILENCE = 8.0
# What takes seconds takes a minute on a busy machine; more means that something hangs.
PATIENCE = 240.0


def wait_for(what: Callable[[], object], words: str) -> object:
    """Wait until something is there, and return it."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        found = what()
        if found:
            return found
        time.sleep(0.05)
    pytest.fail(f"not in {PATIENCE:.0f} s: {words}")


class Room:
    """A tracker and servers, each with its own group of processes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._started: list[subprocess.Popen[bytes]] = []
        self._processes: dict[str, subprocess.Popen[bytes]] = {}  # by address, which one may have after another
        self.tracker = self._start("tracker", "tvm.exec.rpc_tracker", 9190)

    def add_server(self, key: str = KEY, **settings: str) -> str:
        """Start a server on one processor; return its address."""
        words = ("--tracker", self.tracker, "--key", key)
        address = self._start(f"server{len(self._started)}", "tvm.exec.rpc_server", 9390, *words, **settings)
        tracker = Tracker(parse_address(self.tracker), PATIENCE)
        wait_for(lambda: address in tracker.servers().get(key, []), f"{address} is registered")
        tracker.close()
        return address

    def _start(self, name: str, module: str, port: int, *words: str, **settings: str) -> str:
        log = self.folder / f"{name}.log"
        folder = self.folder / name
        folder.mkdir()
        command = [
            sys.executable,
            "-m",
            module,
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            "--port-end",
            str(port + 200),
        ]
        with open(log, "wb") as file:
            process = subprocess.Popen(
                [*command, *words],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env={**os.environ, "TMPDIR": str(folder), **settings},
                start_new_session=True,
            )
        self._started.append(process)
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(process.pid, available_processors()[:1])  # before it has imported anything

        def address() -> str | None:
            text = log.read_text()
            assert process.poll() is None, text
            bound = [line.split()[-1] for line in text.splitlines() if "bind to" in line]
            return bound[0] if bound else None

        found = str(wait_for(address, f"{name} is there"))
        self._processes[found] = process
        return found

    def signal(self, address: str, number: int) -> None:
        """Send a signal to all processes of a server."""
        os.killpg(self._processes[address].pid, number)

    def close(self) -> None:
        """End all."""
        for process in self._started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Room]:
    """A tracker without servers."""
    found = Room(tmp_path_factory.mktemp("room"))
    yield found
    found.close()


class Mischief:
    """Kills the first server that measures, stops the other when it has measured once, and lets it go on when lost."""

    def __init__(self, room: Room) -> None:
        self.room = room
        self.killed = self.stopped = ""
        self.lost: dict[str, str] = {}
        self.measured: dict[str, int] = {}

    def __call__(self, states: tuple[ServerState, ...]) -> None:
        for state in states:
            self.measured[state.address] = state.measured
            if state.state == "lost" and state.address not in self.lost:
                self.lost[state.address] = state.detail
                if state.address == self.stopped:
                    self.room.signal(state.address, signal.SIGCONT)
            if state.state != "measuring":
                continue
            if not self.killed and len(states) == 2:
                self.killed = state.address
                self.room.signal(state.address, signal.SIGKILL)
            elif state.address != self.killed and state.measured and not self.stopped:
                self.stopped = state.address
                self.room.signal(state.address, signal.SIGSTOP)


def rows_of(root: Path, name: str) -> list[dict]:
    path = root / TAG / "trials" / f"{name}-t1.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()[1:]] if path.is_file() else []


def test_servers_that_die_or_hang_cost_only_what_they_held(room: Room, tmp_path: Path) -> None:
    servers = {room.add_server(), room.add_server()}
    mischief = Mischief(room)
    farm = Farm(room.tracker, KEY, 2, patience=SILENCE, wait=PATIENCE, report=mischief)
    result = tune(MANY.spec, MANY.extents, trials=TRIALS, records=tmp_path, name="many", farm=farm)

    assert {mischief.killed, mischief.stopped} == servers == set(mischief.lost), "both were lost while they measured"
    assert mischief.lost[mischief.stopped] == f"no answer for {SILENCE:.0f} s"
    rows = rows_of(tmp_path, "many")
    assert len(rows) == result.trials == TRIALS
    assert len({json.dumps(row["decisions"], sort_keys=True) for row in rows}) == TRIALS, "a trial was logged twice"
    failed = [row["reason"] for row in rows if row["seconds"] is None]
    # Only a candidate that both of them held is given up.
    assert len(failed) <= 1
    assert all(reason.startswith("server lost: ") for reason in failed)
    assert mischief.measured[mischief.stopped] >= TRIALS - 2, "it measures again after it was lost"

    (record,) = TuningRecords.read(tmp_path, TAG).records
    assert record == result.record
    # The servers have one processor each, and say so: it is not this process that is asked.
    assert record.provenance["target"]["cores"] == record.threads == 1
    assert record.provenance["target"]["mcpu"] == detect_target().mcpu
    assert {"cpu", "system", "date", "source", "target", "versions"} <= set(record.provenance)
    assert 0 < record.seconds <= record.default_seconds
    assert farm.states() == tuple(sorted(farm.states(), key=lambda state: state.address))


def test_servers_without_tvmdcn_are_refused(room: Room, tmp_path: Path) -> None:
    address = room.add_server("bare", TVM_DEVICE_BACKEND_AUTOLOAD="0")
    farm = Farm(room.tracker, "bare", 2, patience=SILENCE, wait=PATIENCE)
    with pytest.raises(ServersLost, match=f"{address}: it has no tvmdcn: install it there"):
        tune(MANY.spec, MANY.extents, trials=1, records=tmp_path, name="many", farm=farm)
    assert not list(tmp_path.iterdir())


# A child of a shell's background job inherits that Ctrl-C is ignored: said explicitly, it is not.
_COMMAND = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from tvmdcn.cli import main
main(prog_name="tvmdcn")
"""


def start_tuner(room: Room, root: Path) -> subprocess.Popen[str]:
    words = ["tune", "--problem", LAYER, "--trials", "500", "--output", str(root)]
    return subprocess.Popen(
        [sys.executable, "-c", _COMMAND, *words, "--tracker", room.tracker, "--key", "ends"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "TMPDIR": str(root)},  # what a killed process leaves behind goes with the test's
        text=True,
        start_new_session=True,
    )


def end_tuner(room: Room, root: Path, number: int) -> tuple[int, str]:
    """Start a tuner, end it by a signal after two new trials, and return its status and what it wrote."""
    before = len(rows_of(root, LAYER))
    tuner = start_tuner(room, root)
    try:
        wait_for(lambda: len(rows_of(root, LAYER)) > before + 1 or tuner.poll() is not None, "two trials")
        helpers = psutil.Process(tuner.pid).children(recursive=True)
        assert any("tvmdcn.tuning.link" in process.cmdline() for process in helpers)
        kept = rows_of(root, LAYER)
        os.killpg(tuner.pid, number)
        written = "".join(tuner.communicate(timeout=PATIENCE))
    finally:
        if tuner.poll() is None:
            os.killpg(tuner.pid, signal.SIGKILL)
            tuner.communicate()
    assert rows_of(root, LAYER)[: len(kept)] == kept
    wait_for(lambda: not any(process.is_running() for process in helpers), "no helper is left")
    return tuner.returncode, written


def test_tuners_that_end_leave_the_servers_to_others(room: Room, tmp_path: Path) -> None:
    room.add_server("ends")
    status, written = end_tuner(room, tmp_path, signal.SIGINT)
    assert status == 0, written
    assert "Traceback" not in written
    assert "interrupted; run the same command again to continue" in written
    status, _ = end_tuner(room, tmp_path, signal.SIGKILL)
    assert status == -signal.SIGKILL
    tracker = Tracker(parse_address(room.tracker), PATIENCE)
    assert tracker.request("ends", PATIENCE) is not None, "the server is there for the next one"
    tracker.close()
