# SPDX-License-Identifier: Apache-2.0
"""The kinds of targets: a processor by LLVM's name, a GPU of NVIDIA's by its compute capability."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from tvmdcn import cuda_driver
from tvmdcn.errors import DeviceError, SpecError
from tvmdcn.gpus import WARP
from tvmdcn.host_cpu import host_arch, host_features

__all__ = ["CpuTarget", "CudaTarget", "TargetInfo"]

# The architectures that code for the host of a GPU is built for, without asking for more than all of them have.
_HOSTS = {"x86_64": "x86-64", "aarch64": "generic"}
_THREADS_PER_BLOCK = 1024


class TargetInfo(ABC):
    """A target: what kernels are built for. A frozen dataclass for each kind: :class:`CpuTarget`, :class:`CudaTarget`.

    All have the fields `kind` ("llvm" or "cuda"), `arch` and `features` (what code for the target may use).
    """

    kind: str
    arch: str
    features: frozenset[str]
    _sizes: ClassVar[tuple[str, ...]]
    _texts: ClassVar[tuple[str, ...]]

    @property
    @abstractmethod
    def tag(self) -> str:
        """The name of the target in paths, such as "llvm-znver5" or "cuda-sm_90"."""

    @property
    @abstractmethod
    def vector_bits(self) -> int:
        """The width of a vector that one instruction loads."""

    @abstractmethod
    def identity(self) -> dict[str, str]:
        """Return what decides which machine code is generated, and so belongs in the key of an artifact."""

    @abstractmethod
    def to_tvm(self) -> Any:
        """Return the target as TVM's ``Target``. Imports TVM's compiler."""

    @abstractmethod
    def refusal(self) -> str | None:
        """Return what this machine lacks to run code for the target; None if it can."""

    @staticmethod
    def tag_of(identity: Mapping[str, str]) -> str:
        """Return the tag of what :meth:`identity` returns."""
        if identity["kind"] == "cuda":
            return f"cuda-{identity['arch']}"
        name = identity["arch"] if identity["mcpu"] == "generic" else identity["mcpu"]
        return f"{identity['kind']}-{name}"

    def to_json(self) -> dict[str, Any]:
        """Return the target as a dict of JSON types."""
        values = {name: getattr(self, name) for name in (*self._texts, *self._sizes)}
        return {**values, "features": sorted(self.features)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TargetInfo:
        """Return the target that :meth:`to_json` wrote.

        Raises
        ------
        SpecError
            If a field is missing, unknown, or of another type than was written.
        """
        kind = data.get("kind") if isinstance(data, Mapping) else None
        form = _FORMS.get(kind) if isinstance(kind, str) else None
        valid = (
            form is not None
            and set(data) == {*form._sizes, *form._texts, "features"}
            and all(isinstance(data[name], str) for name in form._texts)
            and all(type(data[name]) is int and data[name] >= 0 for name in form._sizes)
            and isinstance(data["features"], list)
            and all(isinstance(feature, str) for feature in data["features"])
        )
        if form is None or not valid:
            raise SpecError(f"not a target as TargetInfo.to_json writes it: {str(data)[:200]}.")
        return form(**{**data, "features": frozenset(data["features"])})


@dataclass(frozen=True)
class CpuTarget(TargetInfo):
    """A processor.

    Parameters
    ----------
    kind : str
        "llvm".
    mcpu : str
        LLVM's name of the processor: one of :data:`tvmdcn.cpus.CPUS`.
    arch : str
        "x86_64" or "aarch64".
    features : frozenset of str
        What code for `mcpu` may use, in LLVM's spelling ("avx2", "avx512f", "neon", ...).
    l1d_bytes, l2_bytes, l3_bytes : int
        Caches that one core has: its data cache, its share of the second level, the whole third level (0:
        unknown).
    cores : int
        Processors that a process on the target may use (0: unknown).
    """

    kind: str
    mcpu: str
    arch: str
    features: frozenset[str]
    l1d_bytes: int
    l2_bytes: int
    l3_bytes: int = 0
    cores: int = 0

    _sizes = ("l1d_bytes", "l2_bytes", "l3_bytes", "cores")
    _texts = ("kind", "arch", "mcpu")

    @property
    def tag(self) -> str:
        """The name of the target in paths, such as "llvm-znver5"."""
        return self.tag_of(self.identity())

    @property
    def vector_bits(self) -> int:
        """The width of a vector register: 512, 256 or 128."""
        if {"avx512f", "avx512vl"} <= self.features:
            return 512
        return 256 if "avx" in self.features else 128

    @property
    def vector_registers(self) -> int:
        """The number of vector registers: 32 with AVX-512 and on ARM, else 16."""
        return 32 if self.vector_bits == 512 or self.arch == "aarch64" else 16

    def identity(self) -> dict[str, str]:
        """Return architecture and processor."""
        return {"kind": self.kind, "arch": self.arch, "mcpu": self.mcpu}

    def to_tvm(self) -> Any:
        """Return the target as TVM's ``Target``. Imports TVM's compiler."""
        import tvm

        config: dict[str, Any] = {"kind": self.kind, "mcpu": self.mcpu}
        if self.cores:
            config["num-cores"] = self.cores
        if self.arch != host_arch():
            config["mtriple"] = f"{self.arch}-linux-gnu"
        return tvm.target.Target(config)

    def refusal(self) -> str | None:
        """Return which features this machine lacks; None if none, or if the system does not say what it has."""
        features = host_features()
        missing = sorted(self.features - features)
        if not features or not missing:
            return None
        return (
            f"needs {', '.join(missing)}, which this machine lacks: it would end in an illegal instruction. Build for "
            "this machine ('llvm')"
        )


@dataclass(frozen=True)
class CudaTarget(TargetInfo):
    """A GPU of NVIDIA's.

    Code runs on GPUs of exactly this compute capability; a kernel's code for the host asks for no more than every
    processor of the architecture has.

    Parameters
    ----------
    kind : str
        "cuda".
    arch : str
        Compute capability: one of :data:`tvmdcn.gpus.GPUS`, for example "sm_90".
    host : str
        Architecture of the processor that launches kernels: "x86_64" or "aarch64".
    features : frozenset of str
        What code may use ("mma.f16", "cp.async", ...; see :mod:`tvmdcn.gpus`).
    shared_bytes, shared_block_bytes : int
        Shared memory of a multiprocessor, and what of it a block may have.
    registers, threads : int
        What a multiprocessor has, and how many threads it holds.
    l2_bytes : int
        The second-level cache.
    multiprocessors : int
        How many the GPU has.
    """

    kind: str
    arch: str
    host: str
    features: frozenset[str]
    shared_bytes: int
    shared_block_bytes: int
    registers: int
    threads: int
    l2_bytes: int
    multiprocessors: int

    _sizes = ("shared_bytes", "shared_block_bytes", "registers", "threads", "l2_bytes", "multiprocessors")
    _texts = ("kind", "arch", "host")

    @property
    def tag(self) -> str:
        """The name of the target in paths, such as "cuda-sm_90"."""
        return self.tag_of(self.identity())

    @property
    def vector_bits(self) -> int:
        """The widest load of a thread: 128."""
        return 128

    def identity(self) -> dict[str, str]:
        """Return compute capability and the architecture of the host."""
        return {"kind": self.kind, "arch": self.arch, "host": self.host}

    def to_tvm(self) -> Any:
        """Return the target as TVM's ``Target``, with its host. Imports TVM's compiler."""
        import tvm

        host: dict[str, Any] = {"kind": "llvm", "mcpu": _HOSTS[self.host]}
        if self.host != host_arch():
            host["mtriple"] = f"{self.host}-linux-gnu"
        config = {
            "kind": self.kind,
            "arch": self.arch,
            "max_shared_memory_per_block": self.shared_block_bytes,
            "max_threads_per_block": _THREADS_PER_BLOCK,
            "thread_warp_size": WARP,
            "registers_per_block": self.registers,
            "l2_cache_size_bytes": self.l2_bytes,
        }
        return tvm.target.Target(config, host=host)

    def refusal(self) -> str | None:
        """Return what is the matter with this machine's GPUs; None if one of them is of this compute capability."""
        if self.host != host_arch():
            return f"needs a host of {self.host}, and this machine is {host_arch()}. Build for 'cuda'"
        try:
            count = cuda_driver.device_count()
            found = [cuda_driver.device(index) for index in range(count)] or [cuda_driver.device(0)]
        except DeviceError as error:
            return f"needs an NVIDIA GPU of compute capability {self.arch}: {str(error).rstrip('.')}"
        if any(gpu.arch == self.arch for gpu in found):
            return None
        names = ", ".join(f"{gpu.name} ({gpu.arch})" for gpu in found)
        return f"needs an NVIDIA GPU of compute capability {self.arch}, and this machine has {names}. Build for 'cuda'"


_FORMS: dict[str, type[TargetInfo]] = {"llvm": CpuTarget, "cuda": CudaTarget}
