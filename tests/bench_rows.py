# SPDX-License-Identifier: Apache-2.0
"""Rows of measurements, made up."""

from __future__ import annotations

from tvmdcn.bench.measurement import Measurement
from tvmdcn.bench.roof import Roof
from tvmdcn.problems import PROBLEMS

GRADIENTS = PROBLEMS["r50_c4"].backward.spec


def common(fields):
    times = {"median_ms": 2.0, "min_ms": 1.0, "p10": 1.25, "p90": 2.25, "runs": 9}
    return {
        "threads": 1,
        "machine": {"cpu": "a cpu", "cores": 2},
        "versions": {"python": "3.11", "tvmdcn": "0.1"},
        "date": "2026-11-22T10:00:00+00:00",
        "command": "scripts/benchmark.py",
        **({} if fields.get("status") == "failed" else times),
    }


def row(**fields):
    problem = PROBLEMS["r50_c4"]
    base = {
        "problem": problem.name,
        "spec": problem.spec,
        "extents": problem.extents,
        "provider": "onnxruntime",
        "role": "peer",
    }
    return Measurement(**{**base, **common(fields), **fields})


def roof(**fields):
    base = {"roof": "copy", "level": "memory", "dtype": None, "provider": "numpy", "work": 1 << 27}
    base |= {"size": "128 MiB", "method": "numpy.copyto"}
    return Roof(**{**base, **common(fields), **fields})


def backward_rows(ours=4.0, forward=2.0, conv2d=3.0, torchvision=40.0, problem="r50_c4", **fields):
    layer = PROBLEMS[problem]
    shared = {"problem": problem, "extents": layer.extents, "min_ms": 0.5, "p10": 0.5, "p90": 99.0, **fields}
    gradients = layer.backward.spec
    rows = [row(provider="ours-tuned", role="ours", median_ms=ours, spec=gradients, **shared)]
    rows += [row(provider="ours-tuned", role="ours", median_ms=forward, spec=layer.spec, **shared)] if forward else []
    rows += [row(provider="conv2d-nchw", role="floor", median_ms=conv2d, spec=gradients, **shared)]
    rows += [row(provider="torchvision", median_ms=torchvision, spec=gradients, **shared)] if torchvision else []
    return rows
