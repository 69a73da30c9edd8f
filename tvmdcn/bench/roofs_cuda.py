# SPDX-License-Identifier: Apache-2.0
"""How fast a GPU copies its memory and multiplies matrices: the roofs of :mod:`tvmdcn.bench.roofs` there."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tvmdcn.bench.provider import Provider, Unsupported
from tvmdcn.bench.roof import Asked, Ready

__all__ = ["asked_of_gpus", "prepare_copy", "prepare_matmul"]

_COPIED = 2 << 30  # bytes; far more than any second-level cache
_SIZE = 8192


def asked_of_gpus(dtypes: Iterable[str]) -> list[Asked]:
    """Return the roofs of a GPU: a copy of its memory, and products by torch."""

    def provider(function: str) -> Provider:
        return Provider("torch-cuda", "peer", f"tvmdcn.bench.roofs_cuda:{function}", "torch", device="cuda")

    products = [Asked("matmul", None, dtype, provider("prepare_matmul")) for dtype in dtypes]
    return [Asked("copy", "memory", None, provider("prepare_copy")), *products]


def _torch() -> Any:
    import torch

    if not torch.cuda.is_available():
        raise Unsupported("torch finds no NVIDIA GPU.")
    return torch


def prepare_copy(dtype: str | None, threads: int) -> Ready:
    """Prepare a copy of memory of the GPU."""
    torch = _torch()
    source, target = (torch.ones(_COPIED, dtype=torch.int8, device="cuda") for _ in range(2))
    size = f"{2 * _COPIED >> 20} MiB read and written"
    return Ready(lambda: target.copy_(source), 2 * _COPIED, size, f"Tensor.copy_, torch {torch.__version__}")


def prepare_matmul(dtype: str, threads: int) -> Ready:
    """Prepare torch's product of two square matrices of random numbers, with which a GPU is slower than with ones."""
    torch = _torch()
    torch.backends.cuda.matmul.allow_tf32 = dtype == "tf32"
    kind = torch.float32 if dtype == "tf32" else getattr(torch, dtype)
    left, right, out = (torch.randn(_SIZE, _SIZE, device="cuda").to(kind) for _ in range(3))
    method = f"torch.mm, torch {torch.__version__}"
    return Ready(lambda: torch.mm(left, right, out=out), 2 * _SIZE**3, f"{_SIZE} x {_SIZE}", method)
