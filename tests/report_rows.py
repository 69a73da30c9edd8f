# SPDX-License-Identifier: Apache-2.0
"""Rows for reports, made up: every kind of provider, gradients, sweeps, roofs, samples, and names that bite."""

from __future__ import annotations

import numpy as np

from tvmdcn.bench.measurement import Measurement
from tvmdcn.bench.roof import Roof
from tvmdcn.bench.statistics import summarize
from tvmdcn.problems import PROBLEMS
from tvmdcn.spec import Extents

HOSTILE = (
    "<script>alert(1)</script></script><!--\"'&|`$x$ \u4e16\n# [a](b) ]]> </svg> {{ 1 }} \u2028 \x07\x1b[31m"
    "<img src=x onerror=alert(2)> datum['x'] \\u003c"
)
PROVIDERS = {
    "ours-tuned": ("ours", 5.0),
    "ours-default": ("ours", 6.0),
    "ours-naive": ("ours", 900.0),
    "onnxruntime": ("peer", 10.0),
    "openvino": ("peer", 20.0),
    "conv2d-nchw": ("floor", 8.0),
    "conv2d-channels-last": ("floor", 4.0),
}
MACHINE = {"cpu": "A cpu", "target": "llvm-a", "cores": 2, "hypervisor": True, "l2_bytes": 1 << 20}
WHERE = {
    "machine": MACHINE,
    "versions": {"python": "3.11", "tvmdcn": "0.1"},
    "date": "2026-11-22T10:00:00+00:00",
    "command": "scripts/benchmark.py --problem r50_c4",
}


def row(provider="ours-tuned", problem="r50_c4", **fields):
    """Return a row; times follow from `median_ms`, or from `turns` of calls."""
    role, median = PROVIDERS.get(provider, ("peer", 30.0))
    layer = PROBLEMS.get(problem, PROBLEMS["r50_c4"])
    median = fields.pop("median_ms", median)
    turns = fields.pop("turns", None)
    times = {"median_ms": median, "min_ms": median * 0.9, "p10": median * 0.95, "p90": median * 1.1, "runs": 30}
    base = {
        "problem": problem,
        "spec": layer.spec,
        "extents": layer.extents,
        "provider": provider,
        "role": role,
        "threads": 1,
        **WHERE,
        **({} if fields.get("status") == "failed" else times if turns is None else summarize(turns)),
    }
    return Measurement(**{**base, **fields})


def all_providers(**fields):
    return [row(provider, **fields) for provider in PROVIDERS]


def backward(provider="ours-tuned", problem="r50_c4", **fields):
    return row(provider, problem, spec=PROBLEMS[problem].backward.spec, **fields)


def roof(kind="copy", level="memory", rate=20.0, **fields):
    """Return a roof of so many billions per second."""
    work = 10**9
    median = work / rate / 1e6
    base = {
        "provider": "numpy",
        "threads": 1,
        "roof": kind,
        "level": None if kind == "matmul" else level,
        "dtype": "float32" if kind == "matmul" else None,
        "work": work,
        "size": "large",
        "method": "repeated",
        **WHERE,
        **{"median_ms": median, "min_ms": median * 0.99, "p10": median * 0.995, "p90": median * 1.01, "runs": 20},
    }
    return Roof(**{**base, **fields})


def roofs():
    products = [roof("matmul", rate=rate, provider=name) for name, rate in (("torch", 250.0), ("numpy", 240.0))]
    return [roof(), roof(level="cache", rate=80.0), *products]


def sweep(provider="ours-tuned", sizes=(16, 32, 64), **fields):
    """Return rows of one layer over image sizes, of one kernel."""
    made = []
    for size in sizes:
        extents = Extents(1, size, size)
        median = PROVIDERS[provider][1] * (size / 32) ** 2
        named = {"extents": extents, "sweep": ("image_size",), "median_ms": median, "artifact": "an-artifact"}
        made.append(row(provider, **{**named, **fields}))
    return made


def run(generator: np.random.Generator, times, turns=6, calls=20, between=0.01, within=0.02, **fields):
    """Return rows of a run: a median per (provider, problem), with noise between turns and within them."""
    made = []
    for (provider, problem), median in times.items():
        levels = median * np.exp(between * generator.standard_normal(turns))
        drawn = [(level * np.exp(within * generator.standard_normal(calls))).tolist() for level in levels]
        made.append(row(provider, problem, turns=drawn, **fields))
    return made
