# SPDX-License-Identifier: Apache-2.0
"""The report on a terminal: what it says at which width, and that no name can take the terminal over."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest
from click.testing import CliRunner
from report_rows import HOSTILE, all_providers, backward, roofs, row
from rich.console import Console

pytest.importorskip("jsonschema")

from tvmdcn.bench.comparison import organize
from tvmdcn.bench.rows import append_row
from tvmdcn.report.command import report_command
from tvmdcn.report.terminal import show_report


def shown(rows, width=120, **content):
    """Return the lines that a terminal of that width shows."""
    console = Console(width=width, file=io.StringIO(), force_terminal=False)
    show_report(console, organize(rows), **content)
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines), default=0) <= width
    return lines


def line_of(lines, layer):
    (found,) = (line.split() for line in lines if line.startswith(f" {layer} "))
    return found


def test_wide_table_quotes_the_rows():
    lines = shown(all_providers(), roofs=roofs())
    text = "\n".join(lines)
    for words in (
        "Forward, 1 thread",
        "2.00\u00d7 as fast as the fastest peer; faster on 1 of 1 layer",
        "A cpu, llvm-a",
    ):
        assert words in text
    # ours in three kinds, the fastest peer, how many times as fast, a bar of half units, plain convolution, ...
    bar = "\u2587" * 4
    expected = ["r50_c4", "5.00", "6.00", "900", "onnxruntime", "10.0", "2.00\u00d7", bar, "4.00", "1.25\u00d7", "242"]
    # ... and the part of the roof: 242 of 250 GFLOP/s
    assert line_of(lines, "r50_c4") == [*expected, "97%", "\u2013"]


def test_narrow_table_keeps_the_verdict():
    lines = shown(all_providers(), width=80)
    assert line_of(lines, "r50_c4") == ["r50_c4", "5.00", "onnxruntime", "10.0", "2.00\u00d7", "1.25\u00d7", "\u2013"]


def test_gradients_aims_failures_and_marks_are_told():
    rows = [row(), *(backward(name) for name in ("onnxruntime", "conv2d-nchw"))]
    rows += [backward(median_ms=12.5, p90=40.0, max_rel_error=2e-6)]
    rows += [backward("torchvision", status="failed", reason="it has none")]
    text = " ".join("\n".join(shown(rows)).split())
    for words in (
        "Backward, 1 thread",
        "2.50\u00d7 the time of our own forward",
        "12.5~",
        "~ unsteady",
        "not on r50_c4 (2.50\u00d7)",
        "failed: torchvision on r50_c4: it has none",
        "1 row failed",
        "\u2713 correct, error at most 2e-06",
    ):
        assert words in text


def test_overheads_are_told():
    rows = [row(), row(measure="overhead_torch", median_ms=0.0091), row(measure="overhead_function", median_ms=0.0125)]
    text = " ".join("\n".join(shown(rows)).split())
    assert "call overhead, tvmdcn.deform_conv2d 1 0.0125 3.4" in text


def test_nothing_and_failures_only():
    assert shown([]) == []
    text = "\n".join(shown([row(status="failed", reason="why not")]))
    assert "no ratio" in text
    assert "why not" in text


def test_names_are_neither_markup_nor_control_sequences():
    rows = [row(problem=HOSTILE), row("openvino", problem=HOSTILE, status="failed", reason=f"[bold]{HOSTILE}")]
    rows += [row(problem="[red]x[/red]", machine={"cpu": HOSTILE})]
    text = "\n".join(shown(rows, notes=[HOSTILE]))
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "[red]x[/red]" in text
    assert "[bold]<script>" in text


def test_command_needs_none_of_the_packages_that_draw(tmp_path):
    path = tmp_path / "rows.jsonl"
    for found in all_providers():
        append_row(path, found)
    result = CliRunner().invoke(report_command, [str(path), "--terminal"], catch_exceptions=False)
    assert result.exit_code == 0
    assert "2.00\u00d7 as fast as the fastest peer" in result.stdout
    assert list(tmp_path.iterdir()) == [path]
    code = f"""
import sys
sys.modules.update(dict.fromkeys(["altair", "vl_convert", "jinja2", "markupsafe", "scipy", "matplotlib"]))
from tvmdcn.report.command import report_command
report_command([{str(path)!r}, "--terminal"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "r50_c4" in done.stdout
