# SPDX-License-Identifier: Apache-2.0
"""Providers of :mod:`fake_providers` as the benchmark knows them, and a protocol that is soon over."""

from __future__ import annotations

from pathlib import Path

from click.testing import CliRunner

from tvmdcn.bench.command import benchmark_command
from tvmdcn.bench.provider import Provider
from tvmdcn.bench.turns import Protocol
from tvmdcn.problems import TEST_PROBLEMS

FAKES = Path(__file__).with_name("fake_providers.py")
SMALL = TEST_PROBLEMS["asymmetric_single"]
QUICK = Protocol(rounds=2, burst_seconds=0.001, min_calls=2)


def fake(name, role="peer", backward=None, **fields):
    """Return a provider; `backward` names its function for gradients."""
    gradients = None if backward is None else f"{FAKES}:{backward}"
    return Provider(name.replace("_", "-"), role, f"{FAKES}:{name}", backward=gradients, **fields)


def invoke(*arguments, code=0):
    quick = ["--rounds", "1", "--burst", "0.001"]
    result = CliRunner().invoke(benchmark_command, [*map(str, arguments), *quick], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result
