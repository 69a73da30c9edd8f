# SPDX-License-Identifier: Apache-2.0
"""How object files for another architecture become a library here.

For this machine TVM finds the C compiler by itself. For another one a linker that knows the architecture is
needed, and nothing else: compiled kernels use no C library. Debian's cross compilers are one, ``ziglang``, a
wheel that links for every architecture, is another.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

from tvmdcn.errors import BuildError
from tvmdcn.target import CudaTarget, TargetInfo, detect_target

__all__ = ["cross_command", "linker_for", "machine_of"]

# Architectures by the names that Debian's packages have.
_DEBIAN = {"x86_64": "x86-64", "aarch64": "aarch64"}
_TIMEOUT = 300  # seconds; it takes a fraction of one


def cross_command(arch: str) -> list[str]:
    """Return the command that links a library for Linux on another architecture, without its files.

    Raises
    ------
    BuildError
        If there is no linker for it.
    """
    triple = f"{arch}-linux-gnu"
    for name in (f"{triple}-gcc", f"{triple}-g++", f"{triple}-clang"):
        found = shutil.which(name)
        if found is not None:
            return [found]
    if importlib.util.find_spec("ziglang") is not None:
        return [sys.executable, "-m", "ziglang", "cc", "-target", triple]
    raise BuildError(
        f"linking for {arch} on this machine needs a linker for {arch}: {triple}-gcc was not found, nor ziglang. "
        f"pip install 'tvmdcn[pack]', or apt-get install gcc-{_DEBIAN.get(arch, arch)}-linux-gnu."
    )


def machine_of(target: TargetInfo) -> str:
    """Return the architecture of the processor that a library for a target is loaded on: of a GPU its host's."""
    return target.host if isinstance(target, CudaTarget) else target.arch


def linker_for(target: TargetInfo) -> Callable[..., None] | None:
    """Return what TVM's ``export_library`` is to link with; None, which is its default, for this machine's kind.

    Raises
    ------
    BuildError
        If the target is of another architecture, and there is no linker for it.
    """
    arch = machine_of(target)
    if arch == detect_target().arch:
        return None
    command = cross_command(arch)

    def link(output: str, files: Sequence[str], **_: Any) -> None:
        words = [*command, "-shared", "-nostdlib", "-o", str(output), *map(str, files)]
        try:
            done = subprocess.run(words, capture_output=True, text=True, timeout=_TIMEOUT, stdin=subprocess.DEVNULL)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise BuildError(f"{command[0]} did not link for {target.tag}: {error}") from error
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"ended with status {done.returncode}"]
            raise BuildError(f"{' '.join(command)} could not link for {target.tag}: {lines[-1][:400]}")

    return link
