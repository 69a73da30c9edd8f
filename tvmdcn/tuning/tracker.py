# SPDX-License-Identifier: Apache-2.0
"""A client of TVM's RPC tracker that never waits without end.

TVM's own (``tvm.rpc.connect_tracker``) blocks until a server is free, and does not say which one it got. The messages
are those of ``tvm.rpc.tracker``: the length as four bytes, then JSON.
"""

from __future__ import annotations

import json
import select
import socket
import struct
from typing import Any, NamedTuple

from tvm.rpc.base import RPC_TRACKER_MAGIC, TrackerCode

from tvmdcn.errors import SpecError
from tvmdcn.validation import shown

__all__ = ["Grant", "Tracker", "TrackerLost", "parse_address"]

_LIMIT = 1 << 20  # bytes of a message, the tracker's own limit


class TrackerLost(Exception):  # noqa: N818 - an event, which the farm deals with
    """The tracker cannot be reached, or does not answer as one."""


class Grant(NamedTuple):
    """A server that the tracker has given us: where it is, and the word that it expects."""

    host: str
    port: int
    key: str

    @property
    def address(self) -> str:
        """Where the server is, for people."""
        return f"{self.host}:{self.port}"


def parse_address(text: str) -> tuple[str, int]:
    """Return host and port of a text such as ``10.0.0.1:9190`` or ``[::1]:9190``.

    Raises
    ------
    SpecError
        If it is not of that form.
    """
    host, _, port = str(text).rpartition(":")
    if not host or not (port.isascii() and port.isdecimal() and 0 < int(port[:6]) < 1 << 16):
        raise SpecError(f"tracker must be HOST:PORT, such as 10.0.0.1:9190, got {shown(text)}.")
    return host.removeprefix("[").removesuffix("]"), int(port)


class Tracker:
    """A connection to the tracker.

    Parameters
    ----------
    address : tuple of str and int
    timeout : float
        Seconds that it may take for an answer.

    Raises
    ------
    TrackerLost
        If there is none.
    """

    def __init__(self, address: tuple[str, int], timeout: float) -> None:
        self._timeout = timeout
        self._requested = False
        where = f"{address[0]}:{address[1]}"
        try:
            self._socket = socket.create_connection(address, timeout)
        except OSError as error:
            raise TrackerLost(f"no tracker answers at {where} ({error})") from error
        try:
            self._socket.sendall(struct.pack("<i", RPC_TRACKER_MAGIC))
            if self._receive(4) != struct.pack("<i", RPC_TRACKER_MAGIC):
                raise TrackerLost(f"what answers at {where} is no tracker of this version of TVM")
        except (OSError, TrackerLost) as error:
            self.close()
            raise TrackerLost(str(error) or f"{where} does not answer") from error

    def close(self) -> None:
        """Close the connection; a request that waits is forgotten."""
        self._socket.close()

    def servers(self) -> dict[str, list[str]]:
        """Return the addresses of the servers that are registered, by key."""
        self._send([TrackerCode.SUMMARY])
        code, summary = self._answer()
        found: dict[str, list[str]] = {}
        if code == TrackerCode.SUCCESS:
            for server in summary["server_info"]:
                host, port = server["addr"]
                found.setdefault(server["key"].removeprefix("server:"), []).append(f"{host}:{port}")
        return found

    def request(self, key: str, seconds: float) -> Grant | None:
        """Return a free server; None if none is free within so many seconds: then call again."""
        if not self._requested:
            self._send([TrackerCode.REQUEST, key, "", 1])
            self._requested = True
        if not select.select([self._socket], [], [], seconds)[0]:
            return None
        code, grant = self._answer()
        self._requested = False
        if code != TrackerCode.SUCCESS:
            raise TrackerLost(f"the tracker answered {code}")
        host, port, match = grant
        return Grant(str(host), int(port), str(match))

    def _send(self, message: Any) -> None:
        data = json.dumps(message).encode()
        try:
            self._socket.sendall(struct.pack("<i", len(data)) + data)
        except OSError as error:
            raise TrackerLost(f"the connection to the tracker broke: {error}") from error

    def _answer(self) -> Any:
        try:
            (length,) = struct.unpack("<i", self._receive(4))
            if not 0 < length <= _LIMIT:
                raise TrackerLost(f"the tracker sent a message of {length} bytes")
            return json.loads(self._receive(length))
        except (OSError, ValueError) as error:
            raise TrackerLost(f"the connection to the tracker broke: {error}") from error

    def _receive(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            part = self._socket.recv(count - len(data))
            if not part:
                raise TrackerLost("the tracker closed the connection")
            data += part
        return data
