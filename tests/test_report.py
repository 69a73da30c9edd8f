# SPDX-License-Identifier: Apache-2.0
"""The report: what it quotes, what it flags, that nothing in it can break out of its place."""

from __future__ import annotations

import csv
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from click.testing import CliRunner
from report_rows import HOSTILE, all_providers, backward, roof, roofs, row, sweep

pytest.importorskip("altair")
pytest.importorskip("vl_convert")
pytest.importorskip("jinja2")

from tvmdcn.bench.comparison import organize
from tvmdcn.bench.measurement import MeasurementError
from tvmdcn.bench.rows import append_row, read_rows
from tvmdcn.problems import PROBLEMS
from tvmdcn.report.charts import COLORS, Numbers, chart, color_of
from tvmdcn.report.command import report_command
from tvmdcn.report.data import Trial, TuningHistory
from tvmdcn.report.exports import write_csv
from tvmdcn.report.page import benchmark_block, report, update_block
from tvmdcn.report.roofline import ceilings, column_bytes, stands
from tvmdcn.report.schedules import SchedulePair, ScheduleView

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def make(tmp_path):
    """Write rows to a file and a report of them; return the page, the Markdown and the notes."""

    def make_report(rows, tail="", **content):
        path = tmp_path / "rows.jsonl"
        path.unlink(missing_ok=True)
        for found in rows:
            append_row(path, found)
        if tail:
            with path.open("a") as file:
                file.write(tail)
        page, markdown = tmp_path / "out" / "r.html", tmp_path / "out" / "r.md"
        notes = report([path], None, page, markdown, **content)
        return page.read_text(encoding="utf-8"), markdown.read_text(encoding="utf-8"), notes

    return make_report


class Page(HTMLParser):
    """Collects what a page consists of, and that every element is closed in its place."""

    VOID = frozenset({"meta", "br", "link", "img", "hr", "input"})

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.links, self.text, self.scripts = [], set(), [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.scripts += [dict(attrs).get("type")] if tag == "script" else []
        self.links += [value for name, value in attrs if name in ("href", "src", "xlink:href", "action")]
        assert not [name for name, _ in attrs if name.startswith("on")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"script", "style"} & set(self.open):
            self.text.append(data)

    @property
    def words(self):
        return " ".join(" ".join(self.text).split())


def test_verdict_and_table_quote_the_rows(make):
    rows = all_providers() + all_providers(problem="r50_c5", threads=1)
    rows += [row(name, threads=2, median_ms=median) for name, median in (("ours-tuned", 2.5), ("openvino", 6))]
    page, markdown, notes = make(rows)
    assert notes == []
    words = Page(page).words
    for text in (
        "2.00\u00d7 as fast as the fastest peer",
        "1.25\u00d7 the time of a plain convolution",
        "2.40\u00d7",
    ):
        assert text in words
        assert text.split()[0] in markdown
    assert "geometric mean of 2 layers" in words
    assert "faster on 2 of 2 layers" in words
    line = next(line for line in markdown.splitlines() if line.startswith("| r50_c4 |"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[1:9] == ["**5.00**", "6.00", "900", "**10.0**", "20.0", "8.00", "**4.00**", "2.00\u00d7"]
    assert "2.00\u00d7" in page.split("More threads")[1]  # two threads against one


def test_gradients_have_tables_and_verdicts_of_their_own(make):
    rows = all_providers() + all_providers(problem="deft")
    rows += [backward(name) for name in ("onnxruntime", "conv2d-nchw")]
    rows += [backward(median_ms=11.0), backward("torchvision", median_ms=132.0)]
    rows += [backward(problem="deft", median_ms=12.0), backward("torchvision", "deft", median_ms=84.0)]
    page, markdown, notes = make(rows)
    assert notes == []
    words = Page(page).words
    for text in (
        "2.30\u00d7 the time of our own forward",
        "1.38\u00d7 the time of a plain convolution's backward of the same shape",
        "Met on 1 of 2; not on deft (2.40\u00d7).",
        "Met on 1 of 1, the highest 1.38\u00d7.",
        "Met on 1 of 2; not on deft (7.00\u00d7).",
    ):
        assert text in words
        assert text in markdown.replace("**", "")
    forward, gradients = markdown.split("## Backward, 1 thread")
    assert "Aim: " not in forward
    assert "vs forward" not in forward
    (line,) = (line for line in gradients.splitlines() if line.startswith("| deft |"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells == ["deft", "**12.0**", "", "**84.0**", "", "7.00\u00d7", "\u2013", "2.40\u00d7", "50", "\u2013"]
    headings = re.findall(r'<section id="verdict-\d">\n<h3>(.*?) <small>', page)
    assert headings == ["Forward, 1 thread", "Backward, 1 thread"]
    assert "plain conv2d\\u0027s backward = 1" in page


def test_marks_are_explained_where_they_stand(make):
    odd = row("openvino", versions={"python": "3.12", "tvmdcn": "0.1"}, p90=40.0)
    _, markdown, _ = make([row(), row("onnxruntime"), odd, row(threads=2)])
    one, two = markdown.split("## Forward, 2 threads")
    assert "\\~ unsteady: times spread so far" in one
    assert "\u2020 other versions: python 3.12 instead of 3.11." in one
    assert "unsteady" not in two
    assert "other versions" not in two


# --- a block of another page -------------------------------------------------------------------------------


def test_block_is_replaced_and_the_rest_is_kept(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- benchmark:begin (how) -->\nold\n<!-- benchmark:end -->\nafter \\1 `x`\n")
    update_block(page, all_providers())
    text = page.read_text(encoding="utf-8")
    block = benchmark_block(all_providers())
    kept = "before\n<!-- benchmark:begin (how) -->\n", "<!-- benchmark:end -->\nafter \\1 `x`\n"
    assert text == kept[0] + block + kept[1]
    assert "### Forward, 1 thread" in block
    assert "2.00\u00d7" in block
    update_block(page, all_providers())
    assert page.read_text(encoding="utf-8") == text


@pytest.mark.parametrize(
    "text", ["", "<!-- benchmark:begin -->\n", "<!-- benchmark:end -->\n<!-- benchmark:begin -->\n"]
)
def test_page_without_a_place_is_refused(tmp_path, text):
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises(MeasurementError, match="has no place for a benchmark: a line <!-- benchmark:begin -->"):
        update_block(page, all_providers())
    assert page.read_text() == text


def test_block_without_rows_is_refused(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- benchmark:begin -->\n<!-- benchmark:end -->\n")
    with pytest.raises(MeasurementError, match="there are no rows for"):
        update_block(page, [])


def test_readme_shows_the_rows_that_were_published(monkeypatch):
    monkeypatch.chdir(ROOT)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(
        r"^<!-- benchmark:begin \(generated: (.*?), from .*-->\n(.*?)^<!-- benchmark:end", readme, re.M | re.S
    )
    command, block = found.groups()
    program, *arguments = command.split()
    assert Path(program).exists()
    context = report_command.make_context("report", arguments)
    assert context.params["update"] == Path("README.md")
    rows = [row for path in context.params["rows"] for row in read_rows(path)[0]]
    assert block == benchmark_block(rows), f"the tables are not those of the rows: {command}"


# --- the page ----------------------------------------------------------------------------------------------


def test_page_is_one_file_without_network(make):
    histories = [TuningHistory("r50_c4", [Trial(0, 2.0), Trial(1, None, "build", 2.0), Trial(2, 1.5)])]
    pair = SchedulePair(
        "r50_c4", ScheduleView("default", texts={"TIR": "a\nb"}), ScheduleView("tuned", texts={"TIR": "c"})
    )
    page, _, _ = make(all_providers() + roofs(), histories=histories, pairs=[pair])
    parsed = Page(page)
    assert not parsed.tags & {"link", "img", "iframe", "object", "base"}
    assert all(link.startswith("#") for link in parsed.links)
    outside = re.sub("<script.*?</script>", "", page, flags=re.DOTALL)
    assert not re.findall(r"@import|url\((?!#)", outside)
    policy = re.search('content="(default-src.*?)"', page)[1]
    assert "default-src 'none'" in policy
    assert "unsafe-eval" not in policy
    assert "unsafe-inline" not in policy.split("script-src")[1]
    # One digest per script that runs: the library, the charts, and the schedules' own.
    assert policy.count("sha256-") == parsed.scripts.count(None) == 3
    assert {"table", "details", "figure"} <= parsed.tags
    assert len(page) < 6_000_000


def test_page_without_charts_carries_no_library(make):
    page, _, _ = make([row(status="failed", reason="why")])
    assert Page(page).scripts == []
    assert len(page) < 40_000


def test_hostile_names_stay_text(make):
    rows = [
        row(problem=HOSTILE),
        row("openvino", problem=HOSTILE, status="failed", reason=HOSTILE),
        row(HOSTILE, problem=HOSTILE, command=HOSTILE, versions={HOSTILE: HOSTILE}),
        row("conv2d-nchw", problem=HOSTILE),
        row(problem=HOSTILE, machine={"cpu": HOSTILE, "system": HOSTILE}),
        *sweep(problem=HOSTILE),
    ]
    histories = [TuningHistory(HOSTILE, [Trial(0, 2.0), Trial(1, None, HOSTILE)], HOSTILE)]
    left = ScheduleView(HOSTILE, decisions={HOSTILE: HOSTILE}, texts={"TIR": f"``` \n{HOSTILE}"})
    right = ScheduleView("tuned", decisions={HOSTILE: "x"}, texts={"TIR": "y"})
    page, markdown, _ = make(rows, histories=histories, pairs=[SchedulePair(HOSTILE, left, right)])
    parsed = Page(page)
    assert set(parsed.scripts) == {None, "application/json"}
    assert parsed.tags.isdisjoint({"img", "base"})
    assert "<script>alert" not in page
    assert "alert(1)" in parsed.words
    for text in re.findall('<script type="application/json"[^>]*>(.*?)</script>', page, re.DOTALL):
        assert not set("<>&'") & set(text)
        json.loads(text)
    outside = re.sub(r"^(`{3,})\w*\n.*?^\1$", "", markdown, flags=re.DOTALL | re.MULTILINE)
    assert "<script" not in "\n".join(line for line in outside.splitlines() if not line.startswith("    "))
    tables = [line for line in outside.splitlines() if line.startswith("|") and "alert" in line]
    assert tables
    for line in tables:
        assert not re.search(r"(?<!\\)\|(x|`)", line)
        assert "\\[a\\](b)" in line


def test_lone_surrogate_in_a_file_does_not_stop_a_report(tmp_path):
    data = row().to_json()
    data["problem"] = "bad \ud800 name"
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(data) + "\n")
    report([path], None, tmp_path / "r.html", tmp_path / "r.md")
    assert "bad ? name" in (tmp_path / "r.html").read_text(encoding="utf-8")


def test_failed_rows_give_their_reasons(make):
    rows = [row(), row("onnxruntime"), row("openvino", status="failed", reason="it has no such kernel")]
    page, markdown, notes = make(rows)
    assert notes == ["1 row failed; the reasons are below each table."]
    assert "it has no such kernel" in Page(page).words
    assert "- failed: openvino on r50_c4: it has no such kernel" in markdown
    assert "2.00\u00d7" in markdown  # against the peer that is left


def test_only_failures_still_make_a_report(make):
    page, markdown, _ = make([row(status="failed", reason="why")])
    assert "no ratio" in Page(page).words
    assert "why" in markdown


def test_without_a_plain_convolution_there_is_no_such_verdict(make):
    page, markdown, _ = make([row(), row("openvino")])
    assert "plain convolution of the same shape" not in Page(page).words
    assert "the time of a plain convolution" not in markdown
    assert '<figure class="chart' in page


def test_rows_of_other_versions_are_flagged(make):
    odd = row("openvino", versions={"python": "3.12", "tvmdcn": "0.1"})
    page, markdown, notes = make([row(), row("onnxruntime"), odd])
    assert notes == ["Other versions in 1 row: python 3.12 instead of 3.11. They are marked \u2020."]
    assert "20.0<sup>\u2020</sup>" in page
    assert "20.0 \u2020 |" in markdown


def test_machines_are_never_compared(make):
    other = {"cpu": "Another cpu", "cores": 64}
    page, markdown, notes = make([row(), row("onnxruntime", machine=other)])
    assert notes[0].startswith("The rows come from 2 machines.")
    assert any(re.search(r"rows\.jsonl, line 2: .*another machine", note) for note in notes)
    words = Page(page).words
    assert "Another cpu, 64 cores" in words
    assert "as fast as the fastest peer of each layer" not in words
    assert "\u00d7** as fast" not in markdown


def test_unsteady_figures_are_marked(make):
    page, markdown, notes = make([row(), row("openvino", p90=40.0)])
    assert page.count("<sup>~</sup>") == 1
    assert "20.0** ~ |" in markdown
    assert any(
        "1 of 2 rows are unsteady and marked ~; the widest, openvino on r50_c4, spans 95% to 200%" in n for n in notes
    )


def test_cold_caches_have_a_place_of_their_own(make):
    page, markdown, _ = make([*all_providers(), *all_providers(cache="cold")])
    assert "Forward, 1 thread, cold caches" in Page(page).words
    assert "### Forward, 1 thread, cold caches, A cpu" in markdown


def test_broken_line_is_reported_and_the_rest_used(make):
    page, _, notes = make(all_providers(), tail='{"schema": 1}\nnot json\n{"schema": 3, "kind": "la')
    assert [re.search(r"line (\d+)", note)[1] for note in notes[:3]] == ["8", "9", "10"]
    assert "line 9: not a line of JSON" in Page(page).words
    assert "2.00\u00d7" in page


def test_older_rows_are_shown_and_named(make, tmp_path):
    data = json.loads((ROOT / "tests/row_of_schema_1.json").read_text())
    assert data["schema"] == 1
    page, _, notes = make(all_providers(), tail=json.dumps(data) + "\n")
    assert any(re.search(r"line 8: of schema 1, without samples", note) for note in notes)
    assert "r50_c3" in Page(page).words


def test_no_row_is_shown_and_told(tmp_path):
    path, page = tmp_path / "rows.jsonl", tmp_path / "r.html"
    path.write_text("{}\n")
    notes = report([path], None, page)
    assert re.search(r"rows\.jsonl, line 1: schema must be 1 to 3", notes[0])
    assert notes[1].startswith("there is no sound row in")
    assert "there is no sound row in" in Page(page.read_text(encoding="utf-8")).words


def test_overheads_and_superseded_rows(make):
    rows = [
        row(),
        row(date="2026-11-21T10:00:00+00:00", median_ms=77.0),
        row(measure="overhead_numpy", median_ms=0.0081),
        row(measure="overhead_torch", median_ms=0.0091),
        row(measure="overhead_function", median_ms=0.0125),
        row(measure="first_result", median_ms=321.0, threads=2),
    ]
    page, markdown, notes = make(rows)
    assert notes == ["1 row left out: the same was measured again later."]
    assert " 77" not in Page(page).words
    for text in (
        "call overhead, the kernel, NumPy",
        "0.0081",
        "call overhead, tvmdcn.deform_conv2d",
        "3.4",  # us above the kernel
        "import to first result",
        "321",
    ):
        assert text in Page(page).words
        assert text in markdown


def test_rows_of_overhead_alone_make_a_report(make):
    page, _, _ = make([row(measure="overhead_torch", median_ms=0.01)])
    assert "call overhead, the kernel, torch" in Page(page).words


def test_memory_and_sweeps_are_shown(make):
    page, _, _ = make([row(memory_bytes=3 << 19), row("openvino", memory_bytes=5 << 20), *sweep(), *sweep("openvino")])
    words = Page(page).words
    assert "Memory beyond inputs and outputs" in words
    assert "r50_c4 1.5 5.0" in words
    assert "ours-tuned keeps 242 to 242 GFLOP/s over 3 sizes, with one kernel." in words


def test_equal_rows_give_equal_pages(make):
    assert make(all_providers()) == make(all_providers())


def test_markdown_fits_into_a_comment(make):
    rows = [found for index in range(100) for found in all_providers(problem=f"a_layer_with_a_long_name_{index}")]
    long = "\n".join(f"line {index} of a program" for index in range(4000))
    pair = SchedulePair("r50_c4", ScheduleView("a", texts={"TIR": long}), ScheduleView("b", texts={"TIR": long + "!"}))
    _, markdown, _ = make(rows, pairs=[pair])
    assert markdown.count("\n| a_layer") == 100  # the verdict stays whole
    _, small, _ = make(all_providers(), pairs=[pair])
    assert len(small) < 65_536


# --- the roofline ------------------------------------------------------------------------------------------


def test_fused_and_unfused_traffic_of_a_layer():
    layer = PROBLEMS["r50_c4"]
    spec, extents = layer.spec, layer.extents
    # 256 channels, 32 x 32 pixels, 3 x 3 taps, float32: image, offset, mask, weight, bias, output; each once
    elements = 256 * 1024 + 18 * 1024 + 9 * 1024 + 256 * 256 * 9 + 256 + 256 * 1024
    assert spec.bytes_moved(extents) == 4 * elements
    # the columns are written, and read again
    assert column_bytes(spec, extents) == 4 * elements + 2 * 4 * 256 * 9 * 1024


def test_schedules_stand_under_the_roofs_of_their_machine():
    other = roof(rate=9000.0, machine={"cpu": "B"})
    slower = roof(rate=10.0, provider="torch")
    (section,) = organize(all_providers())
    ceiling = ceilings([*roofs(), other, slower, roof("matmul", rate=400.0, threads=2)], section)
    assert ceiling.memory.rate == pytest.approx(20.0)
    assert ceiling.cache.rate == pytest.approx(80.0)
    assert (ceiling.matmul.rate, ceiling.matmul.provider) == (pytest.approx(250.0), "torch")
    assert ceiling.ridges == pytest.approx([12.5, 3.125])
    assert ceiling.at(5.0) == pytest.approx(100.0)
    assert ceiling.at(500.0) == pytest.approx(250.0)
    found = {stand.row.provider: stand for stand in stands(section, ceiling)}
    assert set(found) == {"ours-tuned", "ours-default", "ours-naive", "conv2d-channels-last"}
    layer = PROBLEMS["r50_c4"]
    ours = found["ours-tuned"]
    assert ours.intensity == layer.spec.flops(layer.extents) / layer.spec.bytes_moved(layer.extents)
    assert ours.gflops == pytest.approx(layer.spec.flops(layer.extents) / 5e6)
    assert ours.share == pytest.approx(ours.gflops / 250.0)
    # A plain convolution reads neither offset nor mask.
    moved = layer.spec.bytes_moved(layer.extents) - 4 * 27 * 1024
    assert found["conv2d-channels-last"].intensity == pytest.approx(layer.spec.flops(layer.extents) / moved)


def test_roofline_says_what_is_missing(make):
    page, _, _ = make(all_providers())
    assert "The roofs of this machine were not measured: run scripts/benchmark.py --roofs" in Page(page).words
    page, markdown, _ = make([*all_providers(), *roofs()])
    assert "reaches 97% to 97% of the rate of a matrix product" in Page(page).words
    assert "reaches 97% to 97%" in markdown


# --- charts and exports ------------------------------------------------------------------------------------


def test_chart_is_a_figure_with_its_explanation():
    html = chart({"mark": "point", "data": {"values": [{"a": 1.23456789}]}}, says="<it>", read="so", title="&")
    assert "&lt;it&gt;" in html
    assert "<h3>&amp;</h3>" in html
    assert "1.23457" in html
    assert Page(str(html)).scripts == ["application/json"]


def test_texts_of_a_chart_can_be_drawn():
    html = str(chart({"data": {"values": [{"a": "x\u2028y\nz\x07\ud800"}]}}, says="a", read="b"))
    (spec,) = re.findall(r'<script type="application/json">(.*?)</script>', html)
    assert json.loads(spec) == {"data": {"values": [{"a": "x y z\ufffd\ufffd"}]}}


def test_every_provider_has_a_colour():
    names = [("ours-tuned", "ours"), ("ours-new", "ours"), ("onnxruntime", "peer"), ("new", "peer"), ("any", "floor")]
    assert {color_of(*name) for name in names} <= set(COLORS)
    style = (ROOT / "tvmdcn/report/templates/report.css").read_text(encoding="utf-8")
    for name in COLORS:
        assert style.count(f"--{name}:") >= 2  # light and dark


def test_numbers_hold_a_value_per_column(tmp_path):
    with pytest.raises(ValueError, match="row 1 of the numbers x has 1 values, not 2"):
        Numbers("x", ("a", "b"), [(1, 2), (3,)])
    with pytest.raises(ValueError, match="got x more than once"):
        write_csv(tmp_path, [Numbers("x", ("a",), [(1,)])] * 2)


def test_every_number_is_exported(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [*all_providers(max_rel_error=1e-7), *roofs(), *sweep(), row(measure="overhead_torch", median_ms=0.01)]
    for found in rows:
        append_row(path, found)
    out, folder = tmp_path / "deep" / "r.json", tmp_path / "tables"
    arguments = [str(path), "--json", str(out), "--csv", str(folder), "--output", str(tmp_path / "r.html")]
    result = CliRunner().invoke(report_command, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    data = json.loads(out.read_text(encoding="utf-8"))
    assert data["schema"] == 1
    assert set(data["tables"]) == {"calls", "around_the_kernel", "means", "roofline", "roofs", "provenance"}
    (ours,) = (r for r in data["tables"]["calls"] if r["provider"] == "ours-tuned" and r["to_plain"] is not None)
    assert (ours["median_ms"], ours["to_fastest_peer"], ours["to_plain"], ours["max_rel_error"]) == (
        5.0,
        0.5,
        1.25,
        1e-7,
    )
    (speedup,) = (r for r in data["tables"]["means"] if r["ratio"] == "speedup")
    assert (speedup["geometric_mean"], speedup["wins"], speedup["count"]) == (2.0, 1, 1)
    assert len(data["tables"]["roofs"]) == 4
    with (folder / "calls.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert len(table) == 10
    assert float(table[0]["median_ms"]) == 5.0
    assert {file.stem for file in folder.iterdir()} == set(data["tables"])


# --- the command -------------------------------------------------------------------------------------------


def test_command(tmp_path):
    rows, page, markdown = tmp_path / "rows.jsonl", tmp_path / "r.html", tmp_path / "r.md"
    for found in all_providers():
        append_row(rows, found)
    with rows.open("a") as file:
        file.write("broken\n")
    arguments = [str(rows), "--output", str(page), "--markdown", str(markdown)]
    result = CliRunner().invoke(report_command, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert f"{page} (" in result.stdout
    place = tmp_path / "place.md"
    place.write_text("<!-- benchmark:begin -->\n<!-- benchmark:end -->\n")
    again = CliRunner().invoke(report_command, [*arguments, "--update", str(place)], catch_exceptions=False)
    assert again.exit_code == 0
    assert again.stdout.splitlines()[-1] == str(place)
    assert "| r50_c4 |" in place.read_text(encoding="utf-8")
    assert "line 8: not a line of JSON" in result.stderr
    assert markdown.exists()
    rows.write_text("")
    result = CliRunner().invoke(report_command, [str(rows), "--output", str(page)])
    assert result.exit_code == 1
    assert "there is no sound row" in result.stderr
    assert "there is no sound row" in page.read_text(encoding="utf-8")


def test_schedules_alone_make_a_report(tmp_path):
    page, sides = tmp_path / "r.html", []
    for number, name in enumerate(("first", "second")):
        sides.append(tmp_path / name)
        sides[-1].mkdir()
        decisions = {"variant": name, "values": {"unroll": number}}
        manifest = {"schedule": {"source": name, "tir": f"for i in range({number})", "decisions": decisions}}
        (sides[-1] / "manifest.json").write_text(json.dumps(manifest))
    arguments = ["--schedules", *map(str, sides), "--output", str(page)]
    result = CliRunner().invoke(report_command, arguments)
    assert result.exit_code == 0, result.output
    words = Page(page.read_text(encoding="utf-8")).words
    assert "variant first second" in words
    assert "unroll 0 1" in words
    wrong = CliRunner().invoke(report_command, ["--schedules", str(tmp_path / "none"), "r51", "--output", str(page)])
    assert wrong.exit_code == 1
    assert "none" in wrong.stderr


def test_nothing_to_report_is_a_usage_error():
    result = CliRunner().invoke(report_command, [])
    assert result.exit_code == 2
    assert "Missing argument 'ROWS...'" in result.stderr
