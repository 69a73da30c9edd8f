# SPDX-License-Identifier: Apache-2.0
"""Two runs compared: what is found, what is not, and on what it rests."""

from __future__ import annotations

import dataclasses
import json
import math
import re

import numpy as np
import pytest
from click.testing import CliRunner
from report_rows import HOSTILE, PROVIDERS, row, run

pytest.importorskip("altair")
pytest.importorskip("vl_convert")
pytest.importorskip("scipy")

from scipy import special

from tvmdcn.bench.rows import append_row
from tvmdcn.report.changes import ChangeError, ExitCode, Kind, compare_runs
from tvmdcn.report.command import report_command
from tvmdcn.report.significance import Drift, Estimate, difference, drift_of, estimate, holm, interval

LAYERS = ("r50_c3", "r50_c4", "r50_c5", "yolact_p3", "deft", "grouped32")
TIMES = {(provider, layer): PROVIDERS[provider][1] for layer in LAYERS for provider in PROVIDERS}


def times(factor=1.0, **changed):
    """Return the medians of a run, all by one factor, single ones by another: r50_c3="ours-tuned:1.2"."""
    found = {key: median * factor for key, median in TIMES.items()}
    for layer, text in changed.items():
        provider, by = text.split(":")
        found[provider, layer] *= float(by)
    return found


def runs(a, b, seed=0, **fields):
    generator = np.random.default_rng(seed)
    return run(generator, a, **fields), run(generator, b, **fields)


# --- the statistics ----------------------------------------------------------------------------------------


def test_holm_corrects_as_published():
    # 0.01 x 4, 0.02 x 3, then never below what came before
    assert holm([0.03, 0.01, 0.02, 0.04]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.9, 0.5]) == [1.0, 1.0]
    assert holm([]) == []


def test_error_of_a_median_counts_turns_and_not_calls():
    generator = np.random.default_rng(1)
    found = []
    for _ in range(150):
        levels = np.exp(0.05 * generator.standard_normal(8))
        turns = [(level * np.exp(0.001 * generator.standard_normal(40))).tolist() for level in levels]
        found.append(estimate(row(turns=turns), generator))
    # Of turns that differ, calls within them tell nothing: what one run says is how medians of many runs scatter. Few
    # turns make it too large rather than too small.
    scatter = np.std([one.value for one in found])
    assert 0.95 < math.sqrt(np.mean([one.variance for one in found])) / scatter < 1.35
    assert {one.freedom for one in found} == {7}
    assert not any(one.rough for one in found)


def test_row_without_samples_has_the_error_of_a_single_call():
    found = estimate(row(median_ms=10.0), np.random.default_rng(0))
    assert found.rough
    assert found.value == math.log(10.0)
    assert math.sqrt(found.variance) == pytest.approx(math.log(1.1 / 0.95) / 2.563)


def test_difference_has_welchs_degrees_of_freedom():
    found = difference(Estimate(1.0, 4.0, 5), Estimate(3.0, 1.0, 10))
    assert (found.value, found.variance) == (-2.0, 5.0)
    assert found.freedom == pytest.approx(25 / (16 / 5 + 1 / 10))


def test_interval_is_students():
    found = interval(Estimate(0.3, 0.01, 9), None, 0.05)
    # t of 9 degrees of freedom: 2.262 at 97.5 %
    assert (found.low, found.high) == pytest.approx((0.3 - 0.2262, 0.3 + 0.2262), abs=1e-4)
    assert found.p == pytest.approx(2 * special.stdtr(9, -3.0))
    moved = interval(Estimate(0.3, 0.01, 9), Drift(0.3, 0.0, 50), 0.05)
    assert moved.p == pytest.approx(1.0)
    wider = interval(Estimate(0.3, 0.01, 9), Drift(0.0, 0.1, 50), 0.05)
    assert wider.high - wider.low > found.high - found.low
    assert wider.p > found.p
    assert interval(Estimate(0.0, 0.0, 3), None, 0.05).p == 1.0
    assert interval(Estimate(0.1, 0.0, 3), None, 0.05).p == 0.0


def test_drift_is_the_median_of_controls_and_its_spread_beyond_samples():
    few = [Estimate(0.1, 0.0, 5)] * 4
    assert drift_of(few) is None
    generator = np.random.default_rng(0)
    scattered = [Estimate(0.1 + 0.02 * value, 1e-4, 5) for value in generator.standard_normal(2000)]
    found = drift_of(scattered)
    assert found.value == pytest.approx(0.1, abs=0.002)
    assert found.spread == pytest.approx(math.sqrt(0.02**2 - 1e-4), rel=0.06)
    explained = drift_of([Estimate(0.1 + 0.02 * value, 4e-2, 5) for value in generator.standard_normal(200)])
    assert explained.spread == 0.0


# --- findings ----------------------------------------------------------------------------------------------


def test_same_code_gives_no_finding_whatever_the_machine_does():
    # Twelve pairs of runs, the machine up to 11 % slower in B: at level 0.05 less than one false finding is expected.
    findings = 0
    for seed in range(12):
        a, b = runs(times(), times(factor=1 + seed / 100), seed=seed, turns=5)
        found = compare_runs(a, b)
        assert found.controls == 4 * len(LAYERS)
        assert math.exp(found.drift.value) == pytest.approx(1 + seed / 100, rel=0.02)
        findings += found.exit_code is not ExitCode.SAME or bool(found.of(Kind.FASTER))
    assert findings <= 2


def test_changes_are_found_through_a_slower_machine():
    a, b = runs(times(), times(factor=1.1, r50_c3="ours-tuned:1.2", deft="ours-default:0.8"))
    found = compare_runs(a, b)
    assert [(c.row.problem, c.row.provider) for c in found.of(Kind.SLOWER)] == [("r50_c3", "ours-tuned")]
    assert [(c.row.problem, c.row.provider) for c in found.of(Kind.FASTER)] == [("deft", "ours-default")]
    (slower,) = found.of(Kind.SLOWER)
    assert slower.low < 1.2 < slower.high
    assert slower.ratio == pytest.approx(1.2, rel=0.03)
    assert slower.p < 0.05
    assert found.exit_code is ExitCode.SLOWER
    assert found.verdict == "Of 18 rows of ours: 1 slower, 1 faster, 16 unchanged beyond noise."
    assert "24 rows of other libraries, equal in both runs, took 1.10" in found.basis


def test_a_change_below_the_threshold_is_no_finding():
    a, b = runs(times(), times(r50_c3="ours-tuned:1.2"), between=0.001, within=0.001)
    assert compare_runs(a, b).exit_code is ExitCode.SLOWER
    assert compare_runs(a, b, threshold=0.25).exit_code is ExitCode.SAME


def test_a_change_of_a_peer_is_told_and_fails_nothing():
    a, b = runs(times(), times(r50_c3="onnxruntime:1.5"))
    newer = {"python": "3.12", "tvmdcn": "0.1"}
    b = [row_b if row_b.provider != "onnxruntime" else dataclasses.replace(row_b, versions=newer) for row_b in b]
    found = compare_runs(a, b)
    assert [c.row.provider for c in found.of(Kind.SLOWER)] == ["onnxruntime"]
    assert found.controls == 3 * len(LAYERS)
    assert found.exit_code is ExitCode.SAME


def test_a_row_that_fails_now_is_as_bad_as_a_slower_one():
    a, b = runs(times(), times())
    broken = row("ours-tuned", "deft", status="failed", reason="wrong result")
    others = [found for found in b if (found.provider, found.problem) != ("ours-tuned", "deft")]
    found = compare_runs(a, [*others, broken])
    assert [c.b.reason for c in found.of(Kind.BROKEN)] == ["wrong result"]
    assert found.exit_code is ExitCode.SLOWER
    assert found.verdict.endswith("17 unchanged beyond noise, 1 failing now.")
    repaired = compare_runs([*others, broken], b)
    assert (repaired.count(Kind.REPAIRED), repaired.exit_code) == (1, ExitCode.SAME)
    still = compare_runs([*others, broken], [*others, broken])
    assert (still.count(Kind.FAILED), still.exit_code) == (1, ExitCode.SAME)


def test_rows_of_one_run_only_are_listed():
    a, b = runs(times(), times())
    found = compare_runs(a[:-1], b[1:])
    assert [c.row.provider for c in found.of(Kind.ONLY_A)] == [a[0].provider]
    assert [c.row.provider for c in found.of(Kind.ONLY_B)] == [b[-1].provider]
    assert len(found.rows) == len(TIMES)


def test_the_latest_row_counts_whatever_the_order():
    old = row(date="2026-11-20T00:00:00+00:00", median_ms=50.0)
    for a in ([old, row()], [row(), old]):
        (found,) = compare_runs(a, [row()]).rows
        assert found.a.median_ms == 5.0


def test_without_controls_and_samples_it_says_so():
    found = compare_runs([row()], [row(median_ms=5.2)])
    assert found.rows[0].kind is Kind.SAME
    assert found.rows[0].rough
    assert "1 row without samples" in found.notes[0]
    assert "0 rows cannot have changed, too few" in found.basis
    assert compare_runs([row()], [row(median_ms=15.0)]).exit_code is ExitCode.SLOWER


def test_two_machines_are_compared_and_named():
    a, b = runs(times(), times(factor=2.0))
    b = [dataclasses.replace(found, machine={"cpu": "B cpu"}) for found in b]
    found = compare_runs(a, b)
    assert found.controls == 0
    assert found.count(Kind.SLOWER) == 18
    assert found.notes == [
        "The runs are of two machines: A of A cpu, llvm-a, 2 cores, virtual machine, L2 1 MiB; B of B cpu. Faster and "
        "slower say as much of these as of the code."
    ]
    third = dataclasses.replace(b[0], machine={"cpu": "C cpu"})
    with pytest.raises(ChangeError, match="A holds rows of 1 machine and B of 2 others: compare files of one machine"):
        compare_runs(a, [*b, third])
    # A machine that both have is compared with itself only.
    assert {c.kind for c in compare_runs(a, [*a, third]).rows if c.row.machine == third.machine} == {Kind.ONLY_B}


def test_runs_without_a_common_row_cannot_be_compared():
    with pytest.raises(ChangeError, match=r"A holds r50_c4 \(threads 1\), B holds deft \(threads 2\)"):
        compare_runs([row()], [row(problem="deft", threads=2)])
    with pytest.raises(ChangeError, match="B holds no sound row"):
        compare_runs([row()], [])


# --- the command -------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path):
    """Write two runs to files, and return the paths."""

    def write(a, b, tail=""):
        for name, rows in (("a", a), ("b", b)):
            path = tmp_path / f"{name}.jsonl"
            path.unlink(missing_ok=True)
            path.touch()
            for found in rows:
                append_row(path, found)
            with path.open("a") as file:
                file.write(tail)
        return [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]

    return write


def call(*arguments):
    return CliRunner().invoke(report_command, [str(argument) for argument in arguments], catch_exceptions=False)


def test_exit_codes(files):
    a, b = runs(times(), times(r50_c3="ours-tuned:1.3"))
    same = call("--compare", *files(a, a))
    assert (same.exit_code, "0 slower" in same.stdout) == (0, True)
    slower = call("--compare", *files(a, b))
    assert slower.exit_code == 1
    assert "r50_c3" in slower.stdout
    assert "Of 18 rows of ours: 1 slower" in slower.stdout
    assert call("--compare", *files(a, b), "--threshold", "0.5").exit_code == 0
    other = call("--compare", *files(a, [row(threads=8)]))
    assert other.exit_code == 2
    assert "no row in common" in other.stderr
    empty = call("--compare", *files(a, []))
    assert (empty.exit_code, "B holds no sound row" in empty.stderr) == (2, True)
    mixed = call("--compare", *files(a, a), files(a, a)[0])
    assert mixed.exit_code == 2
    assert "takes two files and no ROWS" in mixed.stderr


def test_every_form_of_a_comparison(files, tmp_path):
    a, b = runs(times(), times(r50_c3="ours-tuned:1.3", deft="ours-default:0.7"))
    b = [*b, row(problem=HOSTILE, status="failed", reason=HOSTILE)]
    a = [*a, row(problem=HOSTILE)]
    paths = files(a, b, tail="broken\n")
    page, markdown, numbers, folder = (tmp_path / name for name in ("c.html", "c.md", "c.json", "csv"))
    outputs = ["--output", page, "--markdown", markdown, "--json", numbers, "--csv", folder]
    result = call("--compare", *paths, *outputs)
    assert result.exit_code == 1
    assert "\x1b[31m<img" not in result.stdout
    assert "line 44: not a line of JSON" in " ".join(result.stdout.split())
    text = re.sub("<script.*?</script>", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert "<script>alert" not in text
    assert "<img" not in text
    for words in ("1 slower, 1 faster, 16 unchanged beyond noise, 1 failing now", "Run A", "Run B", "line 44"):
        assert words in text
    table = [line for line in markdown.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[0] for line in table[2:4]] == ["| deft", "| r50_c3"]
    assert table[4].startswith("| &lt;script&gt;alert(1)")
    data = json.loads(numbers.read_text(encoding="utf-8"))
    assert data["exit_code"] == 1
    (slower,) = (found for found in data["tables"]["changes"] if found["finding"] == "slower")
    assert (slower["layer"], slower["provider"]) == ("r50_c3", "ours-tuned")
    assert slower["low"] < slower["ratio"] < slower["high"]
    assert {"changes.csv", "provenance_a.csv", "provenance_b.csv"} <= {path.name for path in folder.iterdir()}
