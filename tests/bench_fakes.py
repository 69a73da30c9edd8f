# SPDX-License-Identifier: Apache-2.0
"""Providers of :mod:`fake_providers` as the benchmark knows them, and a protocol that is soon over."""

from __future__ import annotations

from pathlib import Path

from tvmdcn.bench.protocol import Protocol
from tvmdcn.bench.providers import Provider
from tvmdcn.problems import TEST_PROBLEMS

FAKES = Path(__file__).with_name("fake_providers.py")
SMALL = TEST_PROBLEMS["asymmetric_single"]
QUICK = Protocol(rounds=2, burst_seconds=0.001, min_calls=2)


def fake(name, role="peer", backward=None, **fields):
    """Return a provider; `backward` names its function for gradients."""
    gradients = None if backward is None else f"{FAKES}:{backward}"
    return Provider(name.replace("_", "-"), role, f"{FAKES}:{name}", backward=gradients, **fields)
