# SPDX-License-Identifier: Apache-2.0
"""A provider's process seen from the parent: started on its processors, stopped while another measures.

In one process the spinning thread pools of ONNX Runtime, OpenMP and TVM take each other's processors, and
figures for more than one thread become worthless. Even idle processes of their own spin for a while after a
call. So a worker is held by SIGSTOP except while it answers a request. All workers of one number of threads are held
to the same processors, as many as threads (:func:`tvmdcn.bench.machine.choose_processors`).
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tvmdcn.bench.machine import choose_processors, held_to
from tvmdcn.bench.provider import Provider
from tvmdcn.errors import TvmdcnError

__all__ = ["Worker", "WorkerError"]


_NO_SOURCE = {
    "forward": "{} is measured for its gradients only: --direction backward",
    "backward": "{} has no gradients: it only infers",
}


class WorkerError(TvmdcnError, RuntimeError):
    """A provider's process refused a request, died, or did not answer in time; the message is the reason."""


class Worker:
    """The process of one provider at one number of threads.

    Parameters
    ----------
    provider : Provider
        What it computes with.
    threads : int
        How many threads its libraries are told to use.
    direction : str
        What it computes, see :data:`tvmdcn.bench.measurement.DIRECTIONS`.

    Raises
    ------
    WorkerError
        If the provider cannot compute that.
    OSError
        If its interpreter cannot be started.
    """

    def __init__(self, provider: Provider, threads: int, direction: str = "forward") -> None:
        source = provider.source_of(direction)
        if source is None:
            raise WorkerError(_NO_SOURCE[direction].format(provider.name))
        self.provider, self.threads = provider, threads
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed in close()
        count = str(threads)
        root = str(Path(__file__).resolve().parent.parent.parent)
        environment = {
            **os.environ,
            # The same package as the parent's, also in a checkout that is not installed.
            "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH")))),
            "PYTHONUNBUFFERED": "1",
            **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), count),
            "TVM_NUM_THREADS": count,
            "TVMDCN_NUM_THREADS": count,
        }
        command = (
            provider.python or sys.executable,
            "-m",
            "tvmdcn.bench.worker",
            source,
            provider.schedule or "",
            count,
            provider.device,
        )
        with held_to(choose_processors(threads)):
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                env=environment,
                bufsize=0,
                start_new_session=True,  # an interrupt at the terminal is the parent's to handle
            )
        self._stopped = False
        self._pending = b""

    def __enter__(self) -> Worker:
        """Return the worker; it ends with the block."""
        return self

    def __exit__(self, *exc: object) -> None:
        """End the process."""
        self.close()

    @property
    def alive(self) -> bool:
        """Whether the process can take a request."""
        return self._process.poll() is None

    def ask(self, request: dict[str, Any], timeout: float) -> dict[str, Any]:
        """Let the process run, send a request, wait for its answer, and stop the process again.

        Parameters
        ----------
        request : dict
            See :mod:`tvmdcn.bench.worker`.
        timeout : float
            Seconds to wait; after that the process is killed.

        Raises
        ------
        WorkerError
            If the provider failed, died, or did not answer in time.
        """
        assert self._process.stdin is not None
        if self._process.stdin.closed:
            raise WorkerError("the process has been ended")
        try:
            self._resume()
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            answer = self._read(timeout)
        except (BrokenPipeError, ProcessLookupError):
            raise WorkerError(self._death()) from None
        self._pause()
        if not answer.pop("ok"):
            raise WorkerError(answer["reason"])
        return answer

    def _read(self, timeout: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        deadline = time.monotonic() + timeout
        with selectors.DefaultSelector() as selector:
            selector.register(descriptor, selectors.EVENT_READ)
            while b"\n" not in self._pending:
                if not selector.select(max(deadline - time.monotonic(), 0)):
                    self.close()
                    raise WorkerError(f"no answer within {timeout:g} s")
                chunk = os.read(descriptor, 1 << 16)
                if not chunk:
                    raise BrokenPipeError
                self._pending += chunk
        line, _, self._pending = self._pending.partition(b"\n")
        return json.loads(line)

    def _resume(self) -> None:
        if self._stopped:
            os.killpg(self._process.pid, signal.SIGCONT)
            self._stopped = False

    def _pause(self) -> None:
        if not self._stopped and hasattr(signal, "SIGSTOP"):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGSTOP)
                self._stopped = True

    def _death(self) -> str:
        """Return how the process ended, with the last line it printed."""
        try:
            code = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:  # it closed its output and lives on
            self.close()
            return "the process closed its output"
        try:
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
        except ValueError:
            how = f"was killed by signal {-code}"
        self._log.seek(max(self._log.seek(0, os.SEEK_END) - 4096, 0))
        last = self._log.read().decode(errors="replace").strip().splitlines()
        return f"the process {how}" + (f": {last[-1][:300]}" if last else "")

    def close(self) -> None:
        """End the process; a stopped one too, and what it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
