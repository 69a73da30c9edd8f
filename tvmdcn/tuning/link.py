# SPDX-License-Identifier: Apache-2.0
"""The connection to one RPC server, in a process of its own: a call that never returns can only be killed.

``python -m tvmdcn.tuning.link`` reads a request a line, calls the server and writes an answer a line, all JSON. It
ends with its standard input, and so with the tuner, however that ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from tvmdcn.tuning.server_side import PREFIX

__all__ = ["Link", "ServerLost"]

_START_SECONDS = 120.0  # importing TVM takes 3 s; much more where many processes do it at once
_UPLOAD_SPEED = 1e6  # bytes a second, at least; on loopback it is 30e6


class ServerLost(Exception):  # noqa: N818 - an event, which the farm deals with
    """The server does not answer, or the connection broke."""


class Link:
    """A process that holds the connection to one server at a time.

    Parameters
    ----------
    patience : float
        Seconds that a server may take for an answer.
    """

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self._process: subprocess.Popen[bytes] | None = None
        self._closed = False
        self._answers: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def start(self) -> None:
        """Start the process if there is none, and wait until it can be used.

        Raises
        ------
        ServerLost
            If it does not start.
        """
        if self._process is not None:
            return
        if self._closed:
            raise ServerLost("closed")
        self._answers = queue.SimpleQueue()
        # A session of its own: Ctrl-C is for the tuner to deal with.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tvmdcn.tuning.link"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        threading.Thread(target=_read_lines, args=(self._process.stdout, self._answers), daemon=True).start()
        self._ask(["start"], _START_SECONDS)

    def connect(self, host: str, port: int, key: str, lifetime: float) -> None:
        """Connect to a server that the tracker has given us.

        Parameters
        ----------
        host, port, key
            As the tracker said.
        lifetime : float
            Seconds after which the server ends the connection, whatever has become of us.
        """
        self.start()
        self._ask(["connect", host, port, key, lifetime], self._patience)

    def call(self, name: str, *arguments: Any, patience: float = 0.0) -> Any:
        """Call one of the functions of :mod:`tvmdcn.tuning.server_side` and return its answer.

        Raises
        ------
        ServerLost
            If there is no answer within the time, or it is an error.
        """
        return self._ask(["call", PREFIX + name, *arguments], self._patience + patience)

    def put(self, name: str, path: Path) -> None:
        """Copy a file to the server."""
        self._ask(["put", PREFIX + "put", name, str(path)], self._patience + path.stat().st_size / _UPLOAD_SPEED)

    def _ask(self, request: list[Any], seconds: float) -> Any:
        process = self._process
        if process is None or process.stdin is None:
            raise ServerLost("closed")
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
            line = self._answers.get(timeout=seconds)
        except queue.Empty:
            self.close()
            raise ServerLost(f"no answer for {seconds:.0f} s") from None
        except (OSError, ValueError):  # the process has ended, or close() was quicker
            line = b""
        try:
            answer = json.loads(line)
        except ValueError:
            self.close()
            raise ServerLost("the connection's process ended") from None
        if "error" in answer:
            self.close()
            raise ServerLost(answer["error"])
        return answer["value"]

    def close(self, for_good: bool = False) -> None:
        """End the process, and with it the connection; from any thread."""
        self._closed = self._closed or for_good
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            if process.stdin is not None:
                with contextlib.suppress(OSError):  # what it was sent last, it will not read
                    process.stdin.close()


def _read_lines(stream: Any, lines: queue.SimpleQueue[bytes]) -> None:
    """Pass lines on, and an empty one at the end."""
    for line in stream:
        lines.put(line)
    lines.put(b"")
    stream.close()


# --- in the process ---------------------------------------------------------------------------------------------


class _Calls:
    """What the process does for each request, by its first word."""

    def __init__(self) -> None:
        from tvm import rpc

        self._rpc = rpc
        self._session: Any = None
        self._functions: dict[str, Any] = {}

    def start(self) -> None:
        """Do nothing, once TVM is imported."""

    def connect(self, host: str, port: int, key: str, lifetime: float) -> None:
        """Open the connection, in place of any other."""
        self._functions.clear()
        self._session = None
        self._session = self._rpc.connect(host, port, key, session_timeout=lifetime)

    def call(self, name: str, *arguments: Any) -> Any:
        """Call a function of the server; what it answers is JSON."""
        if name not in self._functions:
            self._functions[name] = self._session.get_function(name)
        answer = json.loads(str(self._functions[name](*arguments)))
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["value"]

    def put(self, function: str, name: str, path: str) -> Any:
        """Send a file."""
        return self.call(function, name, Path(path).read_bytes())


def _end_with(requests: queue.SimpleQueue[bytes], stream: Any) -> None:
    """Pass requests on; end the process with their stream, also in the middle of a call."""
    for line in stream:
        requests.put(line)
    os._exit(0)


def main() -> None:
    """Answer requests until there are no more."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what TVM prints is no answer
    requests: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_end_with, args=(requests, sys.stdin.buffer), daemon=True).start()
    calls: _Calls | None = None
    while True:
        name, *arguments = json.loads(requests.get())
        try:
            calls = calls or _Calls()
            answer = {"value": getattr(calls, name)(*arguments)}
        except Exception as error:  # it is for the tuner to say what it means
            answer = {"error": _described(error)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _described(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:300]


if __name__ == "__main__":
    main()
