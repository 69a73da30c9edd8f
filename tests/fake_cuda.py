# SPDX-License-Identifier: Apache-2.0
"""A driver's library of two GPUs that are not there, to test what is asked of it."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from tvmdcn import cuda_driver, target

__all__ = ["pretend_gpus"]

# name, and the attributes that the driver numbers 39, 16, 38, 75, 76, 81, 82, 97
GPUS = {
    "NVIDIA H200": (2048, 132, 62914560, 9, 0, 233472, 65536, 232448),
    "NVIDIA L4": (1536, 58, 50331648, 8, 9, 102400, 65536, 101376),
    "Tesla K80": (2048, 13, 1572864, 3, 7, 114688, 131072, 49152),
}
_NUMBERS = (39, 16, 38, 75, 76, 81, 82, 97)
_LIBRARY = """
#include <stddef.h>
#include <stdio.h>
#define COUNT {count}
static const char* const names[] = {{{names} 0}};
static const int values[][8] = {{{values} {{0}}}};
static const int numbers[] = {{{numbers}}};
int cuInit(unsigned flags) {{ return COUNT ? 0 : 100; }}
int cuGetErrorName(int status, const char** text) {{ *text = "CUDA_ERROR_NO_DEVICE"; return 0; }}
int cuDriverGetVersion(int* version) {{ *version = 13010; return 0; }}
int cuDeviceGetCount(int* count) {{ *count = COUNT; return 0; }}
int cuDeviceGet(int* device, int index) {{ *device = index + 7; return 0; }}
int cuDeviceGetName(char* name, int size, int device) {{ snprintf(name, size, "%s", names[device - 7]); return 0; }}
int cuDeviceTotalMem_v2(size_t* bytes, int device) {{ *bytes = (size_t)(device - 6) << 36; return 0; }}
int cuDeviceGetAttribute(int* value, int number, int device) {{
  for (int i = 0; i < 8; ++i)
    if (numbers[i] == number) {{ *value = values[device - 7][i]; return 0; }}
  return 1;
}}
"""


@contextmanager
def pretend_gpus(folder: Path, monkeypatch: pytest.MonkeyPatch, names: Sequence[str]) -> Iterator[None]:
    """Let the driver have the GPUs of these names, of :data:`GPUS`."""
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("the stand-in for NVIDIA's driver needs gcc")
    text = _LIBRARY.format(
        count=len(names),
        names="".join(f'"{name}", ' for name in names),
        values="".join("{" + ", ".join(map(str, GPUS[name])) + "}, " for name in names),
        numbers=", ".join(map(str, _NUMBERS)),
    )
    number = len(list(folder.glob("driver*.c")))
    source, library = folder / f"driver{number}.c", folder / f"driver{number}.so"
    source.write_text(text)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True, timeout=60)
    monkeypatch.setattr(cuda_driver, "_LIBRARY", str(library))
    _forget()
    try:
        yield
    finally:
        _forget()


def _forget() -> None:
    cuda_driver._driver.cache_clear()
    cuda_driver.device.cache_clear()
    target.device_target.cache_clear()
