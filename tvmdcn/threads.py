# SPDX-License-Identifier: Apache-2.0
"""How many threads a call uses.

Beside torch, kernels run on torch's threads (`tvmdcn.openmp`). Else on TVM's, which keeps one thread pool per calling
thread, of a size that is fixed when the pool is made: by default half the processors, whatever the process may use. So
the pool is made here, before the first parallel call of each calling thread, with as many workers as the process has
processors, and every call uses as many of them as it should. The caller is one of the workers.

Workers do not survive a fork. In a child that was forked by a thread with a pool, calls from that thread run
in it alone; new threads make pools of their own. Such a child must leave by ``os._exit``, as those of
:mod:`multiprocessing` do: TVM destroys its pool when a process ends normally, and mostly waits for ever for workers
that are not there. A child that ends normally all the same is told so, and does not hang: it is killed by SIGALRM.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import logging
import math
import os
import sys
import threading
from pathlib import Path

from tvmdcn import env, native
from tvmdcn.openmp import Team
from tvmdcn.target import available_processors

__all__ = ["current_count", "thread_count", "use_threads"]

_log = logging.getLogger(__name__)

# tvm::runtime::threading::SetMaxConcurrency(int). With 1, TVM runs a parallel loop in the caller and never
# touches its pool. No registered function does this without making a pool first, hence the C++ name (Itanium
# mangling).
_SET_MAX_CONCURRENCY = "_ZN3tvm7runtime9threading17SetMaxConcurrencyEi"
# ThreadGroup::kSpecifyThreadShareAllCore: workers may run on all of the processors given with it. Every other
# mode pins workers to processor numbers counted from 0, even to those that taskset or a container denies us.
_SHARE_PROCESSORS = -3
# How often an idle worker looks for work before it sleeps; TVM reads this variable of its own once. Its
# default, 300000, is 0.15 s of a processor after every call: beside our kernel, three torch convolutions on 2
# threads took 3 ms in the median but 35 to 90 ms in one of ten; with 2000 (1 ms), 6 to 14 ms (Zen 5, 2
# processors, 2026-11).
_END_SECONDS = 2  # until a forked process that waits for the workers of its parent is killed
_SPIN_VARIABLE, _SPIN_COUNT = "TVM_THREAD_POOL_SPIN_COUNT", "2000"
_FORKED = (
    "this process was forked by a thread that had used several threads for a kernel; calls from the forked thread use "
    "one. Use the start method 'spawn', or call from a new thread."
)


class _Local(threading.local):
    """What the current thread has of TVM's pool, and of OpenMP's."""

    used: int = 0  # threads that the next call will use; 0: not set yet
    pool: int = 0  # workers that the pool has; 0: there is none
    default: int = 0  # threads to use where nobody says; 0: not asked for yet
    dead: bool = False  # the process was forked, and the workers stayed behind in the parent
    of_team: int = 0  # threads of OpenMP that the next call will use; 0: not set yet
    forked: bool = False  # the process was forked by this thread, whose team stayed behind in the parent


_local = _Local()


def _after_fork_in_child() -> None:
    _local.used = _local.of_team = 0
    _local.forked = True
    if _local.pool and not _local.dead:
        _local.dead = True
        atexit.register(_explain_end, os.getpid())
        # TVM's pool is destroyed by the destructors of this thread, the last registered first. A signal is an end that
        # nobody takes for success: which status was meant, nothing tells us here.
        libc = ctypes.CDLL(None)
        register = getattr(libc, "__cxa_thread_atexit_impl", None)
        if register is not None:
            register(libc.alarm, ctypes.c_void_p(_END_SECONDS), None)


def _explain_end(process: int) -> None:
    """Say how a process will end that inherited a pool without its workers."""
    if os.getpid() == process:
        _log.warning(
            "this process was forked by a thread that had used several threads for a kernel, and ends normally: TVM "
            "waits for workers that stayed in the parent, and SIGALRM ends that in %d s. End it with os._exit(), as "
            "multiprocessing does, use the start method 'spawn', or call kernels in other threads than the one that "
            "forks.",
            _END_SECONDS,
        )


@functools.lru_cache(maxsize=1)
def _watch_forks() -> None:
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_after_fork_in_child)


def thread_count() -> int:
    """Return the number of threads that calls use unless a kernel was loaded with a number of its own.

    It is TVMDCN_NUM_THREADS, else torch's (``torch.get_num_threads()``) in a process that has imported torch,
    else the number of processors that the thread, and its container, may use.

    Raises
    ------
    SettingError
        If TVMDCN_NUM_THREADS is not a positive number.
    """
    return env.num_threads() or current_count()


def current_count() -> int:
    """Return what :func:`thread_count` does where TVMDCN_NUM_THREADS is not set; 0.1 us."""
    torch = sys.modules.get("torch")
    if torch is not None:
        try:
            count: int = torch.get_num_threads()
        except AttributeError:  # another thread is just importing it
            return 1
        return count
    if not _local.default:
        _local.default = min(len(available_processors()), _quota())
    return _local.default


def _quota() -> int:
    """Return how many processors' worth of time the container may use; a large number without a limit."""
    try:
        limit, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, math.ceil(int(limit) / int(period)))
    except (OSError, ValueError):  # no such file, or "max"
        return env.MAX_THREADS


def use_threads(count: int, team: Team | None = None) -> None:
    """Make the following calls of the current thread use `count` threads, the caller included.

    `team`: of functions that do not run on TVM's pool.
    """
    if team is not None:
        if _local.of_team != count:
            _watch_forks()
            if _local.forked and count > 1:
                _log.warning(_FORKED)
            # OpenMP would wait for threads that stayed in the parent.
            team.use_threads(1 if _local.forked else count)
            _local.of_team = count
    elif _local.used != count:
        _configure(count)
        _local.used = count


def _configure(count: int) -> None:
    runtime = native.runtime()
    set_max_concurrency = getattr(runtime.runtime, _SET_MAX_CONCURRENCY, None)
    if _local.dead:
        if count > 1:
            _log.warning(_FORKED)
        if set_max_concurrency is None:
            raise RuntimeError("kernels cannot be called after a fork here; use the start method 'spawn'.")
        set_max_concurrency(1)
        return
    if count == 1 and not _local.pool and set_max_concurrency is not None:
        set_max_concurrency(1)
        return
    processors = available_processors()
    if not _local.pool:
        _watch_forks()
        env.set_default(_SPIN_VARIABLE, _SPIN_COUNT)
        # A pool cannot grow, and torch's number of threads can.
        _local.pool = count if env.num_threads() else max(count, len(processors))
    elif count > _local.pool:
        _log.warning(
            "%d threads were asked for, but the pool of this thread was made with %d, and cannot grow: using "
            "%d. Ask for the larger number first, or call from a new thread.",
            count,
            _local.pool,
            _local.pool,
        )
        count = _local.pool
    # The list has one entry per worker of the pool: its length is what TVM makes the pool of.
    shared = [processors[index % len(processors)] for index in range(_local.pool)]
    runtime.config_threadpool(_SHARE_PROCESSORS, count, shared)
