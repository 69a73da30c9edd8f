# SPDX-License-Identifier: Apache-2.0
"""What a farm makes of its servers: which it takes, what it sends them, and what is lost with one that goes.

Tracker, links and servers only pretend here; tests/test_rpc.py has real ones.
"""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("cloudpickle")

from tvmdcn.cache_key import ABI
from tvmdcn.errors import SpecError, SpecTypeError
from tvmdcn.problems import parse_problem
from tvmdcn.target import detect_target, host_identity, resolve_target
from tvmdcn.tuning import farm as farm_module
from tvmdcn.tuning import server_side
from tvmdcn.tuning import tracker as tracker_module
from tvmdcn.tuning.farm import Farm, ServersLost
from tvmdcn.tuning.link import Link, ServerLost
from tvmdcn.tuning.server_side import PROTOCOL
from tvmdcn.tuning.servers import refusal
from tvmdcn.tuning.tracker import Grant, Tracker, TrackerLost, parse_address
from tvmdcn.tuning.trial import Job, Outcome

SMALL = parse_problem("1,8,6,7,8")
HERE = detect_target()
# Nothing waits so long here unless it hangs.
PATIENCE = 30.0


def identity(**changed: Any) -> dict[str, Any]:
    """Return what a server says that is as this machine."""
    return {
        "protocol": PROTOCOL,
        "abi": ABI,
        "target": HERE.to_json(),
        "threads": 4,
        "provenance": {**host_identity(), "cpu": "a server's"},
        **changed,
    }


class FakeRoom:
    """Servers by address: what each says it is, and what it does with candidates."""

    def __init__(self) -> None:
        self.identities: dict[str, dict[str, Any]] = {}
        self.measure: dict[str, Callable[[list[str]], list[Outcome] | None]] = {}
        self.free: list[str] = []
        self.put: list[tuple[str, str]] = []
        self.connections: list[str] = []
        self.tracker_is_there = True
        self.lock = threading.Lock()

    def add(self, address: str, measure: Callable[[list[str]], list[Outcome] | None], **changed: Any) -> None:
        with self.lock:
            self.identities[address] = identity(**changed)
            self.measure[address] = measure
            self.free.append(address)

    def remove(self, address: str) -> None:
        """The server is gone, and the tracker knows it."""
        with self.lock:
            self.identities.pop(address, None)


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> FakeRoom:
    """Servers that only pretend, in place of all real ones."""
    found = FakeRoom()

    class FakeTracker:
        def __init__(self, address: tuple[str, int], timeout: float) -> None:
            if not found.tracker_is_there:
                raise TrackerLost("no tracker answers at 10.0.0.9:9190")

        def servers(self) -> dict[str, list[str]]:
            with found.lock:
                return {"room": list(found.identities)} if found.identities else {"other": ["10.0.0.8:9090"]}

        def request(self, key: str, seconds: float) -> Grant | None:
            with found.lock:
                for address in found.free:
                    found.free.remove(address)
                    host, port = address.split(":")
                    return Grant(host, int(port), "match")
            time.sleep(0.005)
            return None

        def close(self) -> None:
            pass

    class FakeLink:
        def __init__(self, patience: float) -> None:
            self.address, self.closed = "", False
            self.rows: list[Outcome] | None = None

        def start(self) -> None:
            if self.closed:
                raise ServerLost("closed")

        def connect(self, host: str, port: int, key: str, lifetime: float) -> None:
            self.address = f"{host}:{port}"
            found.connections.append(self.address)

        def call(self, name: str, *arguments: Any, patience: float = 0.0) -> Any:
            if self.closed or self.address not in found.identities:
                raise ServerLost("connection reset")
            if name == "identify":
                return found.identities[self.address]
            if name == "begin":
                self.rows = found.measure[self.address](json.loads(arguments[1]))
                return None
            if self.rows is None:
                time.sleep(0.005)
                return None
            rows, self.rows = self.rows, None
            return [json.loads(json.dumps(asdict(row) if isinstance(row, Outcome) else row)) for row in rows]

        def put(self, name: str, path: Path) -> None:
            found.put.append((self.address, name))

        def close(self, for_good: bool = False) -> None:
            self.closed = self.closed or for_good
            with found.lock:
                if self.address in found.identities and self.address not in found.free:
                    found.free.append(self.address)

    monkeypatch.setattr(tracker_module, "Tracker", FakeTracker)
    monkeypatch.setattr(farm_module, "Link", FakeLink)
    monkeypatch.setattr(farm_module, "_LOOK", 0.02)
    monkeypatch.setattr(farm_module, "_REFUSED", 0.02)
    return found


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(SMALL.spec, SMALL.extents, HERE, 1, tmp_path / "layer0")


def times(*seconds: float) -> Callable[[list[str]], list[Outcome]]:
    """Return a server that takes these times, one after the other."""
    following = iter(seconds)
    return lambda names: [Outcome((next(following),), 1e-7) for _ in names]


def dies(names: list[str]) -> list[Outcome]:
    """A server that does not survive what it is given."""
    raise ServerLost("connection reset")


def farm_of(parallel: int = 8, **options: Any) -> Farm:
    return Farm("10.0.0.9:9190", "room", parallel, **{"patience": PATIENCE, "wait": PATIENCE, **options})


def result(future: Future[list[Outcome]]) -> list[Outcome]:
    return future.result(PATIENCE)


def states_of(farm: Farm, count: int) -> dict[str, str]:
    """Wait until so many servers were seen, and none is busy; return the state of each."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        states = {state.address: state.state for state in farm.states()}
        if len(states) >= count and "measuring" not in states.values():
            return states
        time.sleep(0.005)
    pytest.fail(f"no {count} servers in {PATIENCE} s")


def test_outcomes_say_who_measured(room: FakeRoom, job: Job) -> None:
    room.add("10.0.0.1:9090", times(1e-3, 2e-3, 3e-3))
    farm = farm_of()
    with farm.opened(None) as machine:
        assert (machine.target, machine.threads, machine.provenance["cpu"]) == (HERE, 4, "a server's")
        (first,) = result(farm.submit(job, ["trial1"], 1))
        second, third = result(farm.submit(job, ["trial2", "trial3"], 5))
    assert [outcome.seconds for outcome in (first, second, third)] == [(1e-3,), (2e-3,), (3e-3,)]
    assert all(outcome.machine["cpu"] == "a server's" for outcome in (first, second, third))
    # The inputs may be large: they go once, whatever the number of candidates.
    names = [f"trial{n}/{file}" for n in (1, 2, 3) for file in ("kernel.so", "manifest.json")]
    assert [name for _, name in room.put] == ["layer0/inputs.npz", *(f"layer0/{name}" for name in names)]
    (state,) = farm.states()
    assert (state.address, state.state, state.measured) == ("10.0.0.1:9090", "waiting", 3)


def test_inputs_of_each_layer_go_to_each_server_once(room: FakeRoom, job: Job) -> None:
    for number in (1, 2):
        room.add(f"10.0.0.{number}:9090", lambda names: time.sleep(0.05) or times(*[1e-3] * len(names))(names))
    farm = farm_of()
    other = replace(job, directory=job.directory.with_name("layer1"))
    with farm.opened(None):
        for future in [farm.submit(which, [f"trial{n}"], 1) for n in range(6) for which in (job, other)]:
            result(future)
    inputs = [entry for entry in room.put if entry[1].endswith("inputs.npz")]
    assert len(set(inputs)) == len(inputs)
    assert {name for _, name in inputs} == {"layer0/inputs.npz", "layer1/inputs.npz"}
    assert sum(state.measured for state in farm.states()) == 12


def test_candidates_of_a_lost_server_are_measured_by_another(room: FakeRoom, job: Job) -> None:
    def dies_for_good(names: list[str]) -> list[Outcome]:
        room.remove("10.0.0.1:9090")
        return dies(names)

    room.add("10.0.0.1:9090", dies_for_good)
    farm = farm_of()
    with farm.opened(None):
        future = farm.submit(job, ["trial1"], 1)
        while room.identities:
            time.sleep(0.005)
        room.add("10.0.0.2:9090", times(1e-3))
        (outcome,) = result(future)
    assert outcome.seconds == (1e-3,)
    assert {state.address: state.state for state in farm.states()} == {
        "10.0.0.1:9090": "lost",
        "10.0.0.2:9090": "waiting",
    }


def test_candidates_that_cost_two_servers_are_given_up(room: FakeRoom, job: Job) -> None:
    def selective(names: list[str]) -> list[Outcome]:
        return dies(names) if names == ["deadly"] else times(1e-3)(names)

    room.add("10.0.0.1:9090", selective)
    room.add("10.0.0.2:9090", selective)
    farm = farm_of()
    with farm.opened(None):
        (outcome,) = result(farm.submit(job, ["deadly"], 1))
        (other,) = result(farm.submit(job, ["harmless"], 1))
    assert outcome.reason.startswith("server lost: 10.0.0.")
    assert outcome.reason.count("10.0.0.") == 2
    assert not outcome.seconds
    assert other.seconds == (1e-3,), "the servers that came back measure again"


def test_what_cannot_be_understood_does_not_hang_the_tuning(room: FakeRoom, job: Job) -> None:
    room.add("10.0.0.1:9090", lambda names: [["no outcome"]])
    farm = farm_of()
    with farm.opened(None):
        assert isinstance(farm.submit(job, ["trial1"], 1).exception(PATIENCE), TypeError)


def test_without_servers_a_tuning_ends(room: FakeRoom, job: Job) -> None:
    room.add("10.0.0.1:9090", dies)
    farm = farm_of(wait=0.3)
    with farm.opened(None):
        room.remove("10.0.0.1:9090")
        with pytest.raises(ServersLost, match=r"no server can be used: the tracker 10\.0\.0\.9:9190 knows no server"):
            result(farm.submit(job, ["trial1"], 1))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"protocol": 0}, "its tvmdcn is another version than here"),
        ({"abi": ABI + 1}, "its tvmdcn is another version than here"),
        ({"provenance": {**host_identity(), "versions": {}}}, "it has apache-tvm not at all, not"),
        (
            {"provenance": {"versions": {**host_identity()["versions"], "apache-tvm-ffi": "0.1.15"}}},
            r"it has apache-tvm-ffi 0\.1\.15, not .*\. Install the same",
        ),
        ({"target": resolve_target("apple-m1").to_json()}, f"it is llvm-apple-m1, not {HERE.tag}, and cannot even run"),
        ({"provenance": None}, "it does not say what it is as this version does"),
        ({"target": {"kind": "abacus"}}, "it does not say what it is as this version does"),
        ({"threads": 1}, "it has 1 processors, and 2 threads are to be measured"),
    ],
)
def test_servers_that_would_mislead_are_refused(room: FakeRoom, changed: Mapping[str, Any], message: str) -> None:
    room.add("10.0.0.1:9090", times(), **changed)
    with (
        pytest.raises(ServersLost, match=r"no server can be used: 10\.0\.0\.1:9090: " + message),
        farm_of().opened(HERE, 2),
    ):
        pass


def test_a_commit_does_not_make_another_version(room: FakeRoom) -> None:
    versions = {**host_identity()["versions"]}
    versions["tvmdcn"] += " (commit 0123456789, changed)"
    room.add("10.0.0.1:9090", times(), provenance={**host_identity(), "versions": versions})
    with farm_of().opened(HERE) as machine:
        assert machine.target == HERE


def test_one_that_is_refused_does_not_stop_the_others(room: FakeRoom, job: Job) -> None:
    room.add("10.0.0.1:9090", times(), target=resolve_target("apple-m1").to_json())
    room.add("10.0.0.2:9090", times(1e-3))
    farm = farm_of()
    with farm.opened(HERE):
        assert result(farm.submit(job, ["trial1"], 1))[0].seconds == (1e-3,)
        states = states_of(farm, 2)
    assert states == {"10.0.0.1:9090": "refused", "10.0.0.2:9090": "waiting"}


def test_the_first_server_decides_what_the_others_must_be(room: FakeRoom, job: Job) -> None:
    room.add("10.0.0.1:9090", times(1e-3, 1e-3))
    farm = farm_of()
    with farm.opened(None) as machine:
        assert machine.target == HERE
        room.add("10.0.0.2:9090", times(), target=resolve_target("apple-m1").to_json())
        assert list(states_of(farm, 2).values()) == ["waiting", "refused"]


def test_no_more_servers_are_taken_than_asked_for(room: FakeRoom, job: Job) -> None:
    for number in range(5):
        room.add(f"10.0.0.{number}:9090", times(*[1e-3] * 9))
    farm = farm_of(2)
    with farm.opened(None):
        for future in [farm.submit(job, [f"trial{n}"], 1) for n in range(9)]:
            result(future)
        assert len(set(room.connections)) <= 2


def test_servers_are_given_back_after_a_while(room: FakeRoom, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(farm_module, "_LIFETIME", 0.1)
    room.add("10.0.0.1:9090", lambda names: times(1e-3)(names))
    farm = farm_of(run_timeout=0.0001)
    monkeypatch.setattr(farm, "_measure", lambda link, task, sent: [Outcome((1e-3,), 0.0)])
    with farm.opened(None):
        end = time.monotonic() + PATIENCE
        while len(room.connections) < 3 and time.monotonic() < end:
            result(farm.submit(job, ["trial1"], 1))
    assert room.connections[:3] == ["10.0.0.1:9090"] * 3


def test_closing_does_not_wait_for_what_is_measured(room: FakeRoom, job: Job) -> None:
    room.add("10.0.0.1:9090", lambda names: None)  # it never has an outcome
    farm = farm_of()
    with farm.opened(None):
        future = farm.submit(job, ["trial1"], 1)
        while "measuring" not in {state.state for state in farm.states()}:
            time.sleep(0.005)
        start = time.monotonic()
    assert time.monotonic() - start < PATIENCE / 3
    assert isinstance(future.exception(0), ServersLost)


def test_a_farm_can_be_used_again(room: FakeRoom, job: Job) -> None:
    room.add("10.0.0.1:9090", times(1e-3, 2e-3))
    farm = farm_of()
    for seconds in (1e-3, 2e-3):
        with farm.opened(None):
            assert result(farm.submit(job, ["trial1"], 1))[0].seconds == (seconds,)


def test_without_a_tracker_it_says_how_to_start_one(room: FakeRoom) -> None:
    room.tracker_is_there = False
    message = r"no tracker answers at 10\.0\.0\.9:9190\. Start one: python -m tvm\.exec\.rpc_tracker --port 9190"
    with pytest.raises(ServersLost, match=message), farm_of().opened(None):
        pass


def test_states_are_reported(room: FakeRoom, job: Job) -> None:
    seen: list[str] = []
    room.add("10.0.0.1:9090", times(1e-3))
    farm = farm_of(report=lambda states: seen.append(states[0].state))
    with farm.opened(None):
        result(farm.submit(job, ["trial1"], 1))
    assert seen[:2] == ["waiting", "measuring"]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("10.0.0.1", "room"), SpecError, "tracker must be HOST:PORT"),
        (("10.0.0.1:0", "room"), SpecError, "tracker must be HOST:PORT"),
        ((":9190", "room"), SpecError, "tracker must be HOST:PORT"),
        (("10.0.0.1:9190", "a:b"), SpecError, "key must be a word"),
        (("10.0.0.1:9190", 7), SpecError, "key must be a word"),
        (("10.0.0.1:9190", "room", 0), SpecError, "parallel must be at least 1"),
        (("10.0.0.1:9190", "room", 1.5), SpecTypeError, "parallel must be made of ints"),
    ],
)
def test_bad_arguments_are_refused(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Farm(*arguments)


# --- the tracker's messages ---------------------------------------------------------------------------------------


@pytest.fixture
def answering() -> Iterator[Callable[[bytes], tuple[str, int]]]:
    """Return the address of one that answers every connection with the same bytes, and closes it."""
    sockets: list[socket.socket] = []

    def start(answer: bytes) -> tuple[str, int]:
        server = socket.create_server(("127.0.0.1", 0))
        sockets.append(server)

        def serve() -> None:
            connection, _ = server.accept()
            connection.recv(4)
            connection.sendall(answer)
            connection.close()

        threading.Thread(target=serve, daemon=True).start()
        host, port = server.getsockname()
        return host, port

    yield start
    for server in sockets:
        server.close()


MAGIC = struct.pack("<i", 0x2F271)


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 400", MAGIC[:2]])
def test_what_is_no_tracker_is_not_taken_for_one(answering: Callable[..., Any], answer: bytes) -> None:
    with pytest.raises(TrackerLost):
        Tracker(answering(answer), 2.0)


@pytest.mark.parametrize(
    "answer", [b"", b"\0\0", struct.pack("<i", 1 << 30), struct.pack("<i", -1), struct.pack("<i", 4) + b"{{{{"]
)
def test_broken_answers_lose_the_tracker(answering: Callable[..., Any], answer: bytes) -> None:
    tracker = Tracker(answering(MAGIC + answer), 2.0)
    with pytest.raises(TrackerLost):
        tracker.servers()


def test_addresses_are_understood() -> None:
    assert parse_address("room.example:9190") == ("room.example", 9190)
    assert parse_address("[fe80::1]:1") == ("fe80::1", 1)


# --- the two ends of a connection ---------------------------------------------------------------------------------


def answer_of(name: str, *arguments: Any) -> dict[str, Any]:
    """Call a registered function as a client does."""
    tvm_ffi = pytest.importorskip("tvm_ffi")
    found: dict[str, Any] = json.loads(str(tvm_ffi.get_global_func(server_side.PREFIX + name)(*arguments)))
    return found


@pytest.fixture
def session(tmp_path: Path) -> Path:
    """The directory of a connection, as a server gives it to its process."""
    import tvm_ffi

    server_side.register()
    folder = tmp_path / "session"
    folder.mkdir()
    tvm_ffi.register_global_func("tvm.rpc.server.workpath", lambda name: str(folder / name), override=True)
    return folder


def test_a_server_says_what_it_is(session: Path) -> None:
    found = answer_of("identify", "llvm")["value"]
    assert (found["protocol"], found["abi"], found["target"]) == (PROTOCOL, ABI, HERE.to_json())
    assert found["provenance"]["target"] == HERE.to_json()
    assert {"cpu", "system", "versions"} <= set(found["provenance"])
    assert not refusal(found, HERE, 1), "it is this very machine"


def test_files_stay_in_the_connections_directory(session: Path) -> None:
    assert answer_of("put", "layer0/trial1/kernel.so", b"\0code") == {"value": None}
    path = session / "layer0" / "trial1" / "kernel.so"
    assert path.read_bytes() == b"\0code"
    assert path.stat().st_mode & 0o777 == 0o600
    for name in ("../outside", "/etc/outside", "layer0/../../outside"):
        assert "is no name of a file" in answer_of("put", name, b"")["error"]
    assert sorted(p.name for p in session.parent.iterdir()) == ["session"]


def test_a_failure_at_the_server_is_an_answer(session: Path) -> None:
    assert answer_of("poll", 0.0) == {"value": None}, "nothing was begun"
    assert answer_of("begin", "{", "[]", 1, 1.0)["error"].startswith("JSONDecodeError: ")
    assert answer_of("identify", "abacus")["error"].startswith("SpecError: target 'abacus' is not known")


def test_a_link_that_breaks_is_told_at_once() -> None:
    link = Link(PATIENCE)
    with pytest.raises(ServerLost, match="closed"):
        link.call("poll", 0.0)
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        host, port = nobody.getsockname()
    with pytest.raises(ServerLost):
        link.connect(host, port, "room:0.5", 10.0)
    link.start()
    threading.Timer(0.2, lambda: link.close(for_good=True)).start()
    start = time.monotonic()
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(ServerLost):
        link.connect(*silent.getsockname(), "room:0.5", 10.0)  # it accepts, and never says a word
    assert time.monotonic() - start < PATIENCE / 2
    with pytest.raises(ServerLost, match="closed"):
        link.start()


def test_a_silent_server_is_lost_after_the_time_it_is_given() -> None:
    link = Link(1.0)
    link.start()
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(ServerLost, match="no answer for 1 s"):
        link.connect(*silent.getsockname(), "room:0.5", 10.0)
    link.close()
