# SPDX-License-Identifier: Apache-2.0
"""Measuring on other machines: what is built here travels to the servers of TVM's RPC, and times come back.

``python -m tvm.exec.rpc_tracker`` knows which servers are free, ``python -m tvm.exec.rpc_server`` is one, with tvmdcn
installed beside it (:mod:`tvmdcn.tuning.server_side`). A server that dies, or stops to answer, costs nothing but the
candidates that it held: they are measured by another, and given up when they have cost two servers.

TVM's RPC asks nobody for a password, and runs what it is sent. It belongs into a network that one trusts.
"""

from __future__ import annotations

import contextlib
import json
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

from tvmdcn.errors import SpecError
from tvmdcn.target import TargetInfo
from tvmdcn.tuning.link import Link, ServerLost
from tvmdcn.tuning.server_side import PREFIX
from tvmdcn.tuning.servers import Machine, ServersLost, ServerState, refusal
from tvmdcn.tuning.trial import Job, Outcome
from tvmdcn.validation import check_int, shown

__all__ = ["Farm", "Machine", "ServerState", "ServersLost"]

_log = logging.getLogger(__name__)

_LIFETIME = 1800.0  # seconds after which a server is given back, so that others have their turn
_LOOK = 2.0  # seconds between two looks at the tracker, and two questions to an idle server
_REFUSED = 10.0  # seconds before a server that cannot be used is asked for again
_MOST_LOSSES = 2  # servers that a candidate may cost: more, and it may be the cause


@dataclass
class _Task:
    """Candidates that are measured together."""

    job: Job
    names: list[str]
    rounds: int
    future: Future[list[Outcome]] = field(default_factory=Future)
    lost: list[str] = field(default_factory=list)  # servers that were lost over it

    def begin(self) -> bool:
        """Say whether it is still wanted."""
        return bool(self.lost) or self.future.set_running_or_notify_cancel()


class Farm:
    """Servers of TVM's RPC that measure; a :class:`tvmdcn.tuning.workers.Measuring`.

    Parameters
    ----------
    tracker : str
        ``HOST:PORT`` of the tracker.
    key : str
        Which of its servers to use; all must be machines of one kind.
    parallel : int
        Servers to use at a time, at most.
    patience : float
        Seconds that a server may be silent before it counts as lost.
    wait : float
        Seconds without any server after which a tuning ends.
    run_timeout : float
        Seconds after which a measurement is given up.
    report : callable, optional
        Called with all :class:`ServerState` when one changes, from any thread.

    Raises
    ------
    SpecError, SpecTypeError
        If an argument is not understood.
    """

    alone = False

    def __init__(
        self,
        tracker: str,
        key: str,
        parallel: int = 8,
        *,
        patience: float = 20.0,
        wait: float = 300.0,
        run_timeout: float = 60.0,
        report: Callable[[tuple[ServerState, ...]], None] | None = None,
    ) -> None:
        from tvmdcn.tuning.tracker import parse_address

        self.address = parse_address(tracker)
        if not (isinstance(key, str) and key and not any(c.isspace() or c == ":" for c in key)):
            raise SpecError(f"key must be a word without ':', as given to the servers, got {shown(key)}.")
        self.key, self.parallel = key, check_int("parallel", parallel, 1)
        self._patience, self._wait, self._run_timeout, self.report = patience, wait, run_timeout, report
        self._reset()

    def _reset(self) -> None:
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._closing = threading.Event()
        self._tasks: queue.SimpleQueue[_Task] = queue.SimpleQueue()
        self._states: dict[str, ServerState] = {}
        self._machine: Machine | None = None
        self._wanted: TargetInfo | None = None
        self._threads = 0
        self._links: list[tuple[threading.Thread, Link]] = []
        self._connected: set[str] = set()
        self._last_connected = time.monotonic()
        self._trouble = ""
        self._found = 0  # servers that the tracker knows

    # --- for the tuner ----------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def opened(self, target: TargetInfo | None, threads: int | None = None) -> Iterator[Machine]:
        """Wait for the first server, and say what it is; the end of the block gives all of them back.

        Parameters
        ----------
        target : TargetInfo, optional
            What the servers must be; by default what the first one is.
        threads : int, optional
            Threads that they must have at least.

        Raises
        ------
        ServersLost
            If there is none that can be used; the message says why.
        """
        self._reset()
        self._wanted, self._threads = target, threads or 1
        threading.Thread(target=self._watch, daemon=True).start()
        try:
            with self._changed:
                self._changed.wait_for(lambda: self._machine is not None or self._is_hopeless(), self._wait)
            if self._machine is None:
                raise ServersLost(self._why_none())
            yield self._machine
        finally:
            self.close()

    def submit(self, job: Job, names: Sequence[str], rounds: int) -> Future[list[Outcome]]:
        """Check and measure built candidates on one server, taking turns for `rounds`."""
        task = _Task(job, list(names), rounds)
        self._tasks.put(task)
        return task.future

    def close(self) -> None:
        """Give all servers back, whatever they are doing."""
        self._closing.set()
        with self._lock:
            links = list(self._links)
        for _, link in links:
            link.close(for_good=True)
        for thread, _ in links:
            thread.join(5.0)
        self._fail_tasks("the farm was closed")

    def states(self) -> tuple[ServerState, ...]:
        """Return what each server is doing that was seen in this run."""
        with self._lock:
            return tuple(self._states[address] for address in sorted(self._states))

    # --- threads ----------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        """Look at the tracker from time to time: begin a thread for each server that may be used."""
        from tvmdcn.tuning.tracker import Tracker, TrackerLost

        tracker: Tracker | None = None
        while not self._closing.is_set():
            try:
                tracker = tracker or Tracker(self.address, self._patience)
                servers = tracker.servers()
                found = servers.get(self.key, [])
                self._trouble, self._found = "" if found else self._no_server(servers), len(found)
                for _ in range(min(self.parallel, len(found)) - len(self._links)):
                    self._add_link()
            except TrackerLost as error:
                self._trouble = f"{error}. Start one: python -m tvm.exec.rpc_tracker --port {self.address[1]}"
                tracker = None
            with self._lock:
                if self._connected:
                    self._last_connected = time.monotonic()
                elif time.monotonic() - self._last_connected > self._wait:
                    self._fail_tasks(self._why_none())
                self._changed.notify_all()
            self._closing.wait(_LOOK)
        if tracker is not None:
            tracker.close()

    def _is_hopeless(self) -> bool:
        """Say whether waiting is of no use: no tracker, no server, or none that can be used."""
        states = {state.state for state in self._states.values()}
        return bool(self._trouble) or (states == {"refused"} and len(self._states) == self._found)

    def _no_server(self, servers: Mapping[str, list[str]]) -> str:
        others = f" (there are: {', '.join(sorted(servers))})" if servers else ""
        where = f"{self.address[0]}:{self.address[1]}"
        return (
            f"the tracker {where} knows no server with the key {self.key!r}{others}. Start one: "
            f"python -m tvm.exec.rpc_server --tracker {where} --key {self.key}"
        )

    def _why_none(self) -> str:
        refused = [f"{s.address}: {s.detail}" for s in self.states() if s.state in ("refused", "lost")]
        why = self._trouble or "; ".join(refused) or f"all are busy, for {self._wait:.0f} s"
        return f"no server can be used: {why}."

    def _fail_tasks(self, why: str) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                task = self._tasks.get_nowait()
                if task.begin():
                    task.future.set_exception(ServersLost(why))

    def _add_link(self) -> None:
        link = Link(self._patience)
        thread = threading.Thread(target=self._use, args=(link,), daemon=True)
        with self._lock:
            self._links.append((thread, link))
        thread.start()

    def _use(self, link: Link) -> None:
        """Measure on one server after the other."""
        from tvmdcn.tuning.tracker import Tracker, TrackerLost

        while not self._closing.is_set():
            address, tracker = "", None
            try:
                link.start()  # before a server is asked for: it waits some seconds only for us to come
                tracker = Tracker(self.address, self._patience)
                grant = None
                while grant is None and not self._closing.is_set():
                    grant = tracker.request(self.key, 1.0)
                if grant is None:
                    return
                address = grant.address
                link.connect(*grant, _LIFETIME)
                self._serve(link, address)
            except TrackerLost:
                self._closing.wait(_LOOK)  # _watch says so
            except ServerLost as error:
                if self._closing.is_set():
                    return
                self._note_loss(address, str(error))
            finally:
                if tracker is not None:
                    tracker.close()
                link.close()
                with self._lock:
                    self._connected.discard(address)

    def _note_loss(self, address: str, why: str) -> None:
        if not address:
            self._closing.wait(_LOOK)
        elif PREFIX in why:
            self._set(address, "refused", "it has no tvmdcn: install it there, and start the server again")
            self._closing.wait(_REFUSED)
        else:
            _log.warning("server %s is lost: %s", address, why)
            self._set(address, "lost", why)

    def _serve(self, link: Link, address: str) -> None:
        """Measure on a connected server until it is lost, time to give it back, or the end."""
        kind = self._wanted.kind if self._wanted is not None else "llvm"
        identity = link.call("identify", kind)
        wanted = self._machine.target if self._machine is not None else self._wanted
        try:
            why = refusal(identity, wanted, self._threads)
        except (KeyError, TypeError, ValueError, AttributeError):
            why = "it does not say what it is as this version does. Install the same"
        if why:
            _log.warning("server %s is not used: %s", address, why)
            self._set(address, "refused", why)
            link.close()
            self._closing.wait(_REFUSED)
            return
        end = time.monotonic() + _LIFETIME - 2 * self._run_timeout
        with self._changed:
            self._connected.add(address)
            self._last_connected = time.monotonic()
            if self._machine is None:
                target = TargetInfo.from_json(identity["target"])
                self._machine = Machine(target, identity["threads"], identity["provenance"])
            self._changed.notify_all()
        self._set(address, "waiting")
        sent: set[str] = set()
        while not self._closing.is_set() and time.monotonic() < end:
            try:
                task = self._tasks.get(timeout=_LOOK)
            except queue.Empty:
                link.call("poll", 0.0)  # is it still there?
                continue
            if not task.begin():
                continue
            self._set(address, "measuring", task.job.spec.slug)
            try:
                rows = self._measure(link, task, sent)
            except ServerLost:
                self._take_back(task, address)
                raise
            except Exception as error:  # a file of ours that is gone, or an answer that cannot be understood
                task.future.set_exception(error)
                raise ServerLost(f"{type(error).__name__}: {error}") from error
            outcomes = [replace(outcome, machine=identity["provenance"]) for outcome in rows]
            self._set(address, "waiting", measured=len(task.names))
            task.future.set_result(outcomes)

    def _take_back(self, task: _Task, address: str) -> None:
        """Give a lost server's candidates to another, or give them up."""
        task.lost.append(address)
        if len(task.lost) < _MOST_LOSSES:
            self._tasks.put(task)
            return
        reason = f"server lost: {' and '.join(task.lost)} while measuring it"
        task.future.set_result([Outcome(reason=reason)] * len(task.names))

    def _measure(self, link: Link, task: _Task, sent: set[str]) -> list[Outcome]:
        folder = task.job.directory
        files = [f"{name}/{file}" for name in task.names for file in ("kernel.so", "manifest.json")]
        if folder.name not in sent:  # once for all candidates: they may be large
            files.insert(0, "inputs.npz")
        for file in files:
            link.put(f"{folder.name}/{file}", folder / file)
        sent.add(folder.name)
        data = json.dumps({**task.job.to_json(), "directory": folder.name})
        link.call("begin", data, json.dumps(task.names), task.rounds, self._run_timeout)
        end = time.monotonic() + 2 * self._run_timeout
        while time.monotonic() < end:
            rows = link.call("poll", 1.0, patience=1.0)
            if rows is not None:
                return [Outcome(**{**row, "seconds": tuple(row["seconds"])}) for row in rows]
        raise ServerLost(f"no times for {2 * self._run_timeout:.0f} s")

    def _set(self, address: str, state: str, detail: str = "", measured: int = 0) -> None:
        with self._lock:
            known = self._states.get(address)
            count = measured + (known.measured if known is not None else 0)
            self._states[address] = ServerState(address, state, detail, count)
            self._changed.notify_all()
        if self.report is not None:
            self.report(self.states())
