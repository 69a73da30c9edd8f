# SPDX-License-Identifier: Apache-2.0
"""What a benchmark prints of its rows: tables, doubts, notes, failures."""

from __future__ import annotations

import io

from bench_rows import roof, row
from rich.console import Console

from tvmdcn.bench.comparison import organize
from tvmdcn.bench.tables import print_rows, section_table, sweep_table
from tvmdcn.problems import parse_problem
from tvmdcn.spec import Extents


def printed(*rows, roofs=()):
    console = Console(width=250, record=True, file=io.StringIO())
    print_rows(console, rows, roofs)
    return console.export_text()


def test_unsteady_rows_are_named():
    steady = row(provider="openvino", p25=1.9375, p75=2.0625)
    shown = printed(row(p90=3.0), row(p90=3.0, measure="overhead_torch", role="ours", cache="cold"), steady)
    assert "unsteady: onnxruntime on r50_c4, 1 thread: one call in ten takes 1.50 times the median or more" in shown
    assert "unsteady: onnxruntime on r50_c4, cold caches, 1 thread: one call in ten" in shown
    assert "2 of 3 rows are unsteady: measure again on an idle machine" in shown
    assert "2.00 ~" in shown
    assert "~" not in printed(steady)
    assert "unsteady" not in printed(steady)
    many = printed(*(row(provider=f"peer{n}", p90=3.0) for n in range(20)))
    assert many.count("unsteady: peer") == 8
    assert "20 of 20 rows are unsteady" in many


def test_memory_is_a_table():
    known = {"memory_resolution_bytes": 2 << 20, "memory_prepare_bytes": 0}
    shown = printed(row(provider="openvino", memory_bytes=5 << 19, **known), row(memory_bytes=None))
    assert "peak MiB beyond inputs and outputs" in shown
    assert "known to 2.0 MiB" in shown
    assert "2.5" in shown
    assert "MiB" not in printed(row())


def test_notes_and_failures_are_told_once():
    shown = printed(
        row(note="computed in NCHW"),
        row(note="computed in NCHW", threads=2),
        row(provider="openvino", status="failed", reason="it <cannot>", spec=parse_problem("float16").spec),
    )
    assert shown.count("onnxruntime: computed in NCHW") == 1
    assert "failed: openvino on r50_c4, float16, 1 thread: it <cannot>" in shown


def test_roofs_are_a_table():
    failed = roof(roof="matmul", level=None, dtype="float32", status="failed", reason="no <library>", work=None)
    shown = printed(roofs=[roof(work=6_000_000_000), failed])
    assert "3000 (6000) GB/s" in shown
    assert "numpy.copyto, 128 MiB" in shown
    assert "failed: numpy on matmul float32, 1 thread: no <library>" in shown


def test_sweep_with_several_kernels_says_how_many():
    sizes = [Extents(1, 8, size) for size in (8, 16, 32)]
    named = {"provider": "ours-tuned", "role": "ours", "sweep": ("image_size",)}
    rows = [row(extents=extents, artifact=f"kernel-{extents.width // 16}", **named) for extents in sizes]
    rows.append(row(extents=sizes[0], sweep=("image_size",), status="failed", reason="why"))
    (section,) = organize(rows)
    (sweep,) = section.sweeps
    assert sweep.artifacts("ours-tuned") == ["kernel-0", "kernel-1", "kernel-2"]
    assert [found and found.status for found in sweep.rows["onnxruntime"]] == ["failed", None, None]
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(sweep_table(section, sweep))
    shown = console.export_text()
    assert "ours-tuned: 3 kernels for 3 sizes." in shown
    assert "2.00 (31.2)" in shown  # 2 ms for 64 pixels


def test_table_shows_hostile_names_as_they_are():
    (section,) = organize([row(problem="[red]x[/nothing]", provider="ours-tuned", role="ours")])
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(section_table(section))
    assert "[red]x[/nothing]" in console.export_text()
