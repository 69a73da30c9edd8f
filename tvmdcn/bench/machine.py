# SPDX-License-Identifier: Apache-2.0
"""Where and with what was measured: the machine, the versions, the processors that providers are held to."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tvmdcn import cuda_driver
from tvmdcn.target import available_processors, detect_target, host_identity

__all__ = ["choose_processors", "held_to", "identify_commit", "identify_machine", "identify_versions"]

_DISTRIBUTIONS = (
    "apache-tvm",
    "apache-tvm-ffi",
    "numpy",
    "onnxruntime",
    "openvino",
    "torch",
    "torchvision",
)
_PROCESSORS = Path("/sys/devices/system/cpu")
_CHECKOUT = Path(__file__).resolve().parent.parent.parent


def identify_machine() -> dict[str, Any]:
    """Return what tells this machine from others as far as speed goes, and stays the same from run to run."""
    host, target = host_identity(), detect_target()
    # Only where there are any: machines without are the same as before there were GPUs in rows.
    gpus = {"gpus": [gpu["name"] for gpu in host["gpus"]]} if "gpus" in host else {}
    return {
        **gpus,
        "cpu": host["cpu"],
        "target": target.tag,
        "cores": target.cores,
        "l1d_bytes": target.l1d_bytes,
        "l2_bytes": target.l2_bytes,
        "l3_bytes": target.l3_bytes,
        "hypervisor": host["hypervisor"],
        "system": host["system"],
    }


def identify_versions() -> dict[str, str]:
    """Return the versions of Python, of this package (in a checkout with the commit) and of its peers."""
    versions = {"python": platform.python_version()}
    for name in ("tvmdcn", *_DISTRIBUTIONS):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if cuda_driver.device_count():
        versions["cuda driver"] = cuda_driver.driver_version()
    commit = identify_commit()
    if commit:
        text = f"commit {commit.removesuffix('+')}" + (", changed" if commit.endswith("+") else "")
        versions["tvmdcn"] = f"{versions.get('tvmdcn', 'uninstalled')} ({text})"
    return versions


def identify_commit() -> str | None:
    """Return the commit of the checkout that this package runs from, with a ``+`` if it was changed since.

    None outside of a checkout. Only changes of what can change a kernel's speed count: a benchmark must not call
    itself changed by the rows it writes.
    """
    if not (_CHECKOUT / ".git").exists():
        return None
    git = ["git", "-C", str(_CHECKOUT)]
    options: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 10}
    try:
        head = subprocess.run([*git, "rev-parse", "--short=10", "HEAD"], **options)
        changed = subprocess.run([*git, "status", "--porcelain", "--", "tvmdcn", "schedules", "tuning_logs"], **options)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if head.returncode or changed.returncode:
        return None
    return str(head.stdout).strip() + ("+" if changed.stdout.strip() else "")


def choose_processors(count: int) -> list[int] | None:
    """Return the processors that `count` threads are held to, the same for every provider.

    One per core as far as there are cores, the highest numbers first: the lowest serve the machine's interrupts, and
    neighbouring numbers share caches and memory. All that may be used, if there are not enough. None where the system
    cannot hold a process to processors.
    """
    if not hasattr(os, "sched_setaffinity"):
        return None
    cores: dict[str, list[int]] = {}
    for processor in available_processors():
        try:
            core = (_PROCESSORS / f"cpu{processor}/topology/thread_siblings_list").read_text().strip()
        except OSError:
            core = str(processor)
        cores.setdefault(core, []).append(processor)
    first = [siblings[0] for siblings in cores.values()]
    others = [processor for siblings in cores.values() for processor in siblings[1:]]
    return sorted([*first[::-1], *others[::-1]][:count])


@contextlib.contextmanager
def held_to(processors: Sequence[int] | None) -> Iterator[None]:
    """Hold this thread, and the processes that it starts meanwhile, to some processors (None: to no fewer).

    A process must be held before it begins: libraries make threads, and count processors, when they are imported.
    """
    if not processors:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, processors)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
