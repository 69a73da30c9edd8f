# SPDX-License-Identifier: Apache-2.0
"""Tuning records as somebody might send them, with decisions that the design space has."""

from __future__ import annotations

import functools
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tvmdcn.builder import new_schedule
from tvmdcn.cache_key import installed_compiler, source_digest
from tvmdcn.space import Decisions, space_of
from tvmdcn.spec import DeformConv2dSpec, Extents
from tvmdcn.target import resolve_target
from tvmdcn.tuning.record import Record
from tvmdcn.tuning.records import TuningRecords

TAG = "llvm-znver4"
SPEC = DeformConv2dSpec(64, 96, padding=1)
OTHER = DeformConv2dSpec(16, 32, padding=1, mask=False)
SIZE = Extents(1, 32, 32)


@functools.cache
def default_of(spec: DeformConv2dSpec, tag: str = TAG) -> Decisions:
    target = resolve_target(tag)
    return space_of(spec.operator, target.kind).schedule(new_schedule(spec, target), spec, target)


def provenance(cpu: str = "AMD EPYC 9004", date: str = "2026-11-22", tag: str = TAG, **fields: Any) -> dict[str, Any]:
    tvm, tvm_ffi = installed_compiler()
    base = {
        "cpu": cpu,
        "date": date,
        "hypervisor": False,
        "processors": 8,
        "source": source_digest(),
        "system": "Linux 6.1",
        "target": {**resolve_target(tag).to_json(), "cores": 8},
        "versions": {"apache-tvm": tvm, "apache-tvm-ffi": tvm_ffi, "tvmdcn": "0.1.0"},
    }
    return {**base, **fields}


def record(
    spec: DeformConv2dSpec = SPEC, seconds: float = 2e-3, default: float = 3e-3, threads: int = 1, **fields: Any
) -> Record:
    base = {"extents": SIZE, "decisions": default_of(spec), "trials": 40, "provenance": provenance()}
    return Record(spec=spec, threads=threads, seconds=seconds, default_seconds=default, **{**base, **fields})


def log_text(found: Record, seconds: list[float], tag: str = TAG, **header: Any) -> str:
    first = {
        "schema": 1,
        "name": "layer",
        "spec": found.spec.to_json(),
        "extents": asdict(found.extents),
        "target": tag,
        "threads": found.threads,
        "source": source_digest(),
        **header,
    }
    rows = [
        {"decisions": found.decisions.to_json(), "seconds": s, "reason": "", "elapsed": float(n)}
        for n, s in enumerate(seconds)
    ]
    return "".join(json.dumps(line) + "\n" for line in (first, *rows))


def write(root: Path, *records: Record, tag: str = TAG, log: str | None = None, name: str = "layer-t1") -> Path:
    TuningRecords(tag, records).write(root)
    if log is not None:
        folder = root / tag / "trials"
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.jsonl").write_text(log)
    return root


def read(root: Path, tag: str = TAG) -> list[Record]:
    return TuningRecords.read(root, tag).records
