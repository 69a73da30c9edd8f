# SPDX-License-Identifier: Apache-2.0
"""The benchmark's command, with cheap providers: what it takes, writes, prints, and does when it is stopped.

No time is ever asserted.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from bench_fakes import fake, invoke
from bench_rows import roof
from click.testing import CliRunner

from tvmdcn.bench import command as bench
from tvmdcn.bench.command import benchmark_command
from tvmdcn.bench.comparison import organize
from tvmdcn.bench.rows import read_row_file, read_rows
from tvmdcn.bench.sweep import axes_of, vary
from tvmdcn.problems import PROBLEMS, parse_problem
from tvmdcn.spec import Extents


def test_command_measures_writes_and_shows(tmp_path, fakes):
    output = tmp_path / "new" / "rows.jsonl"
    arguments = [
        "--problem",
        "asymmetric_single",
        "row",
        "--threads",
        "1",
        "2",
        "--rounds",
        "1",
        "--burst",
        "0.001",
    ]
    result = CliRunner().invoke(
        benchmark_command, [*arguments, "--provider", *fakes, "--output", str(output)], catch_exceptions=False
    )
    assert result.exit_code == 0
    rows, complaints = read_rows(output)
    assert complaints == []
    assert len(rows) == 2 * 2 * len(fakes)
    assert {(found.problem, found.threads) for found in rows} == {
        (problem, threads) for problem in ("asymmetric_single", "row") for threads in (1, 2)
    }
    for text in ("geometric mean", "vs peer", "2 threads", "it cannot do <this> & that"):
        assert text in result.stdout
    assert f"16 rows in {output}" in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("direction", "parts"),
    [
        ("backward", [("forward", "right"), ("backward", "right"), ("backward", "floor")]),
        ("all", [("forward", "right"), ("forward", "floor"), ("backward", "right"), ("backward", "floor")]),
    ],
)
def test_command_measures_gradients(tmp_path, fakes, direction, parts):
    output = tmp_path / "rows.jsonl"
    arguments = ["--problem", "row", "--rounds", "1", "--burst", "0.001", "--direction", direction]
    result = CliRunner().invoke(
        benchmark_command,
        [*arguments, "--provider", "right", "floor", "--output", str(output)],
        catch_exceptions=False,
    )
    assert result.exit_code == 0
    assert [(found.direction, found.provider) for found in read_rows(output)[0]] == parts
    for text in ("backward, 1 thread", "vs forward", "at most 2.2\u00d7 our own forward"):
        assert text in result.stdout
    assert "row backward 1 right: " in result.stderr


def test_command_runs_a_provider_elsewhere(fakes):
    arguments = ["--problem", "row", "--rounds", "1", "--burst", "0.001", "--provider", "right"]
    result = CliRunner().invoke(benchmark_command, [*arguments, "--python", "right=/no/such/python"])
    assert result.exit_code == 1
    assert "/no/such/python" in result.stdout


def test_command_fails_when_all_fails(fakes):
    arguments = ["--problem", "row", "--provider", "unsupported", "--rounds", "1"]
    assert CliRunner().invoke(benchmark_command, arguments).exit_code == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--provider", "mmcv"], "'mmcv' is not one of ours-tuned, ours-default"),
        (["--problem", "r51"], "problem 'r51' is neither a name nor of the form"),
        (["--threads", "0"], "0 is not in the range x>=1"),
        (["--direction", "sideways"], "'sideways' is not one of 'forward', 'backward', 'all'"),
        (["--python", "torchvision"], "'torchvision' is not of the form PROVIDER=INTERPRETER"),
        (["--python", "mmcv=/usr/bin/python3"], "'mmcv' is not one of ours-tuned"),
        (["--rounds", "none"], "'none' is not a valid integer"),
        (["--problem-file", "no-such-file.json"], "does not exist"),
        (["stray"], "unexpected extra argument"),
        (["--resume"], "--resume needs --output"),
        (["--problem", "none"], "--problem none goes with --roofs or --overhead"),
        (["--dtype", "int8"], "'int8' is not one of 'float32', 'float64', 'bfloat16', 'float16'"),
        (["--layout", "CHWN"], "'CHWN' is not one of 'NCHW', 'NHWC'"),
        (["--batch", "1,0"], "0 is not in the range x>=1"),
        (["--image-sizes", "32,64x"], "'64x' is neither a size such as 64 nor a height and a width such as 48x64"),
        (["--image-sizes", "0"], "'0' is neither a size"),
        (["--problem", "1,1,9,9,1,p=0", "--image-sizes", "9,2"], "at 2x2: the kernel is larger than the padded input"),
        (["--cache", "tepid"], "'tepid' is not one of 'warm', 'cold', 'both'"),
    ],
)
def test_command_refuses_in_words(arguments, message):
    result = CliRunner().invoke(benchmark_command, arguments)
    assert result.exit_code in (1, 2)
    assert message in result.stderr


def test_all_means_the_named_problems():
    assert bench._problems((), None, None) == list(PROBLEMS.values())
    assert bench._problems(("all", "deft"), None, None) == list(PROBLEMS.values())
    assert [p.name for p in bench._problems((), None, Path("."))][:1] == ["aliked_b3c1"]


# --- other dtypes, layouts and sizes -----------------------------------------------------------------------------


def test_problems_are_varied():
    layer = parse_problem("r50_c3_s2")
    varied = vary([layer], ["float16", "float64"], ["NHWC"], [1, 4], [(32, 48)])
    assert [(p.spec.dtype, p.spec.layout, p.extents) for p in varied] == [
        (dtype, "NHWC", Extents(batch, 32, 48)) for dtype in ("float16", "float64") for batch in (1, 4)
    ]
    assert {(p.name, p.spec.stride) for p in varied} == {("r50_c3_s2", (2, 2))}
    assert vary([layer]) == [layer]
    assert vary([layer], batches=[1, 1]) == [layer]


@pytest.mark.parametrize(
    ("batches", "sizes", "axes"),
    [
        ((), (), ()),
        ((1,), (), ("batch",)),
        ((), ((2, 2),), ("image_size",)),
        ((1,), ((2, 2),), ("batch", "image_size")),
    ],
)
def test_rows_know_along_what_they_were_varied(batches, sizes, axes):
    assert axes_of(batches, sizes) == axes


def test_sweep_is_a_table_with_the_time_of_a_pixel(tmp_path, fakes, monkeypatch):
    monkeypatch.setitem(fakes, "named", fake("named", "ours"))
    output = tmp_path / "rows.jsonl"
    arguments = ("--problem", "asymmetric_single", "--batch", "1,3", "--image-sizes", "9x7", "6")
    result = invoke(*arguments, "--provider", "named", "noisy", "unsupported", "--output", output)
    rows, complaints = read_rows(output)
    assert complaints == []
    assert {found.sweep for found in rows} == {("batch", "image_size")}
    (section,) = organize(rows)
    assert section.lines == []
    (sweep,) = section.sweeps
    sizes = [Extents(1, 6, 6), Extents(1, 9, 7), Extents(3, 6, 6), Extents(3, 9, 7)]
    assert (sweep.problem, sweep.axes, sweep.extents) == ("asymmetric_single", ("batch", "image_size"), sizes)
    assert list(sweep.rows) == ["named", "noisy", "unsupported"]
    assert [found.extents for found in sweep.rows["named"]] == sizes
    assert (sweep.artifacts("named"), sweep.artifacts("noisy")) == (["an-artifact"], [])
    shown = " ".join(result.stdout.split())
    for text in ("microseconds per output pixel", "3 x 9 x 7", "named: one kernel for 4 sizes, an-artifact", "failed"):
        assert text in shown
    (first, *_) = sweep.rows["named"]
    assert f"({first.median_ms * 1e3 / first.pixels:.3g})" in shown


def test_dtypes_and_layouts_are_sections_of_their_own(tmp_path, fakes):
    output = tmp_path / "rows.jsonl"
    arguments = ("--problem", "row", "--dtype", "float32,float64", "--layout", "NHWC,NCHW", "--provider", "right")
    result = invoke(*arguments, "--output", output)
    rows, _ = read_rows(output)
    sections = organize(rows)
    assert [(section.layout, section.dtype) for section in sections] == [
        (layout, dtype) for layout in ("NCHW", "NHWC") for dtype in ("float32", "float64")
    ]
    assert [section.title for section in sections] == [
        "forward, 1 thread",
        "forward, 1 thread, float64",
        "forward, 1 thread, NHWC",
        "forward, 1 thread, float64, NHWC",
    ]
    assert all(len(section.lines) == 1 and not section.sweeps for section in sections)
    assert "forward, 1 thread, float64, NHWC: median milliseconds" in result.stdout
    for found in rows:
        assert found.max_rel_error < (1e-12 if found.spec.dtype == "float64" else 1e-6)


def test_cold_caches_are_a_section_of_their_own(tmp_path, fakes):
    output = tmp_path / "rows.jsonl"
    result = invoke("--problem", "row", "--cache", "both", "--provider", "right", "floor", "--output", output)
    warm, cold = organize(read_rows(output)[0])
    assert (warm.title, cold.title) == ("forward, 1 thread", "forward, 1 thread, cold caches")
    assert "row 1 right cold: " in result.stderr
    assert result.stdout.count("peak MiB beyond inputs and outputs") == 1


def test_roofs_without_layers(tmp_path, monkeypatch):
    asked = []

    def measure_roofs(threads, dtypes, *, on_row, **options):
        asked.append((threads, dtypes, options["known"]))
        on_row(roof())

    monkeypatch.setattr(bench, "measure_roofs", measure_roofs)
    output = tmp_path / "rows.jsonl"
    result = invoke("--problem", "none", "--roofs", "--threads", "1,2", "--output", output)
    assert asked == [((1, 2), ("float32",), ())]
    assert read_row_file(output).roofs == [roof()]
    assert "what this machine can do" in result.stdout
    invoke("--problem", "none", "--roofs", "--dtype", "float64", "--output", output, "--resume")
    assert asked[1] == ((1,), ("float64",), [roof()])


# --- help ----------------------------------------------------------------------------------------------------------


def test_help_is_in_groups():
    shown = CliRunner().invoke(benchmark_command, ["--help"]).stdout
    places = [shown.index(f"\n{name}:\n") for name in ("What is measured", "By whom", "How it is measured", "Rows")]
    assert places == sorted(places)
    assert places[0] < shown.index("--image-sizes SIZE,...") < places[1] < shown.index("--provider") < places[2]
    assert places[2] < shown.index("--threads N,...") < places[3] < shown.index("--resume")


@pytest.mark.parametrize("texts", [["1", "2"], ["1,2"], ["1", "--threads", "2"], ["1,2,1"], ["1, 2"]])
def test_lists_are_written_in_several_ways(texts):
    context = benchmark_command.make_context("benchmark", ["--threads", *texts])
    assert context.params["threads"] == (1, 2)


def test_default_is_quick_and_small():
    params = benchmark_command.make_context("benchmark", []).params
    assert (params["threads"], params["cache"], params["direction"]) == ((1,), "warm", "forward")
    assert (params["dtypes"], params["batches"], params["image_sizes"], params["roofs"]) == ((), (), (), False)
