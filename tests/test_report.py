# SPDX-License-Identifier: Apache-2.0
"""The report: what it quotes, what it flags, that nothing in it can break out of its place."""

from __future__ import annotations

import html
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from click.testing import CliRunner

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

from tvmdcn.bench.comparison import organize
from tvmdcn.bench.measurement import Measurement, MeasurementError, append_row, read_rows
from tvmdcn.problems import PROBLEMS
from tvmdcn.report.data import SchedulePair, ScheduleView, Trial, TuningHistory
from tvmdcn.report.figures import draw_bars, draw_tuning
from tvmdcn.report.page import benchmark_block, report, report_command, update_block

ROOT = Path(__file__).resolve().parents[1]
HOSTILE = "<script>alert(1)</script>\"'&|`$x$ \u4e16\n# [a](b) ]]> </svg> {{ 1 }} \x07"
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


def row(provider="ours-tuned", problem="r50_c4", **fields):
    role, median = PROVIDERS.get(provider, ("peer", 30.0))
    layer = PROBLEMS.get(problem, PROBLEMS["r50_c4"])
    median = fields.pop("median_ms", median)
    times = {
        "median_ms": median,
        "min_ms": median * 0.9,
        "p10": median * 0.95,
        "p90": median * 1.1,
        "runs": 30,
    }
    base = {
        "problem": problem,
        "spec": layer.spec,
        "extents": layer.extents,
        "provider": provider,
        "role": role,
        "threads": 1,
        "machine": MACHINE,
        "versions": {"python": "3.11", "tvmdcn": "0.1"},
        "date": "2026-11-22T10:00:00+00:00",
        "command": "scripts/benchmark.py --problem r50_c4",
        **({} if fields.get("status") == "failed" else times),
    }
    return Measurement(**{**base, **fields})


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
        self.open, self.tags, self.links, self.text = [], set(), [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
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
        self.text.append(data)

    @property
    def words(self):
        return " ".join(" ".join(self.text).split())


def all_providers(**fields):
    return [row(provider, **fields) for provider in PROVIDERS]


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
    line = next(line for line in markdown.splitlines() if line.startswith("| r50_c4 |"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[1:9] == ["**5.00**", "6.00", "900", "**10.0**", "20.0", "8.00", "**4.00**", "2.00\u00d7"]
    assert "2.00\u00d7" in page.split("More threads")[1]  # two threads against one


def backward(provider="ours-tuned", problem="r50_c4", **fields):
    return row(provider, problem, spec=PROBLEMS[problem].backward.spec, **fields)


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
    headings = re.findall("<h2>(.*?)</h2>", page)
    assert headings[:2] == ["Forward, 1 thread", "Backward, 1 thread"]
    assert page.count("<svg") == 2
    assert "plain conv2d&#39;s backward" in page


def test_marks_are_explained_where_they_stand(make):
    odd = row("openvino", versions={"python": "3.12", "tvmdcn": "0.1"}, p90=40.0)
    _, markdown, _ = make([row(), row("onnxruntime"), odd, row(threads=2)])
    one, two = markdown.split("## Forward, 2 threads")
    assert "\\~ unsteady: the 90th percentile" in one
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
    histories = [TuningHistory("r50_c4", [Trial(0, 2.0), Trial(1, None, "build"), Trial(2, 1.5)])]
    pair = SchedulePair("r50_c4", ScheduleView("default", {}, "a\nb"), ScheduleView("tuned", {}, "a\nc"))
    page, _, _ = make(all_providers(), histories=histories, schedules=[pair])
    parsed = Page(page)
    assert not parsed.tags & {"script", "link", "img", "iframe", "object", "base"}
    assert all(link.startswith("#") for link in parsed.links)
    assert not re.findall(r"@import|url\((?!#)", page)
    assert "default-src 'none'" in page
    assert {"svg", "table", "details", "mark"} <= parsed.tags
    assert len(page) < 6_000_000


def test_hostile_names_stay_text(make):
    rows = [
        row(problem=HOSTILE),
        row("openvino", problem=HOSTILE, status="failed", reason=HOSTILE),
        row(HOSTILE, problem=HOSTILE, command=HOSTILE, versions={HOSTILE: HOSTILE}),
        row("conv2d-nchw", problem=HOSTILE),
        row(problem=HOSTILE, machine={"cpu": HOSTILE, "system": HOSTILE}),
    ]
    histories = [TuningHistory(HOSTILE, [Trial(0, 2.0), Trial(1, None, HOSTILE)], HOSTILE)]
    left = ScheduleView(HOSTILE, {HOSTILE: HOSTILE}, f"``` \n{HOSTILE}")
    right = ScheduleView("tuned", {HOSTILE: "x"}, "y")
    page, markdown, _ = make(rows, histories=histories, schedules=[SchedulePair(HOSTILE, left, right)])
    parsed = Page(page)
    assert "script" not in parsed.tags
    assert parsed.tags.isdisjoint({"a", "img"})
    assert "<script" not in page
    assert "alert(1)" in parsed.words
    outside = re.sub(r"^(`{3,})python\n.*?^\1$", "", markdown, flags=re.DOTALL | re.MULTILINE)
    assert "<script" not in "\n".join(line for line in outside.splitlines() if not line.startswith("    "))
    assert "````python" in markdown  # longer than the fence within
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
    assert "<svg" in page


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
    words = Page(page).words
    assert "Another cpu, 64 cores" in words
    assert "as fast as the fastest peer of each layer" not in words
    assert "\u00d7** as fast" not in markdown


def test_unsteady_figures_are_marked(make):
    page, markdown, _ = make([row(), row("openvino", p90=40.0)])
    assert page.count("<sup>~</sup>") == 1
    assert "20.0** ~ |" in markdown


def test_broken_line_is_reported_and_the_rest_used(make):
    page, _, notes = make(all_providers(), tail='{"schema": 1}\nnot json\n')
    assert [re.search(r"line (\d+)", note)[1] for note in notes] == ["8", "9"]
    assert "line 9: not a line of JSON" in Page(page).words
    assert "2.00\u00d7" in page


def test_no_row_is_an_error(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("{}\n")
    with pytest.raises(MeasurementError, match=r"no sound row in .*line 1: schema must be 1 or 2"):
        report([path], None, tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


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
    assert "77" not in re.sub("<style>.*</style>", "", page, flags=re.DOTALL).split("<table>")[1]
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


def test_tuning_history(make):
    trials = [
        Trial(0, 4.0, elapsed_s=1.0),
        Trial(1, None, "wrong result", 2.0),
        Trial(2, 3.0, elapsed_s=3.0),
        Trial(3, None, "time-out", 4.0),
        Trial(4, None, "wrong result", 5.0),
        Trial(5, 3.5, elapsed_s=61.0),
    ]
    history = TuningHistory("r50_c4", trials, "tuning_logs/llvm-a")
    assert history.best_so_far() == [4.0, 4.0, 3.0, 3.0, 3.0, 3.0]
    assert history.failures == {"wrong result": 2, "time-out": 1}
    nothing = TuningHistory("r50_c5", [Trial(0, None)])
    assert nothing.best_so_far() == [None]
    page, markdown, _ = make(all_providers(), histories=[history, nothing])
    words = Page(page).words
    for text in (
        "6 trials in 61 s",
        "3.00 ms at trial 2",
        "the first took 4.00 ms",
        "Failed: 2 wrong result, 1 time-out.",
    ):
        assert text in words
    assert "None could be measured" in words
    assert "| r50_c4 | 6 | 3 | 4.00 | 3.00 | 2 |" in markdown
    assert "| r50_c5 | 1 | 1 | \u2013 | \u2013 | \u2013 |" in markdown


def test_schedules_side_by_side_mark_what_differs(make):
    left = ScheduleView("default", {"tile": "24 x 4", "unroll": "yes"}, "for i in range(4):\n    a <b>\n    c")
    right = ScheduleView("tuned", {"tile": "24 x 8", "unroll": "yes"}, "for i in range(8):\n    a <b>\n    c")
    page, markdown, _ = make(all_providers(), schedules=[SchedulePair("r50_c4", left, right)])
    assert re.findall("<mark>(.*?)</mark>", page) == ["for i in range(4):", "for i in range(8):"]
    assert html.escape("    a <b>") in page
    assert page.count('class="differs"') == 1
    assert "| tile | 24 x 4 | 24 x 8 |" in markdown
    assert "for i in range(8):\n    a <b>\n" in markdown


def test_very_long_programs_are_cut(make):
    program = "\n".join(f"line {index} of {'x' * 100}" for index in range(20_000))
    pair = SchedulePair("r50_c4", ScheduleView("a", {}, program), ScheduleView("b", {}, program))
    page, markdown, _ = make(all_providers(), schedules=[pair])
    assert len(page) < 6_000_000
    assert "(18500 lines more)" in page
    assert "(18500 lines more)" in markdown


def test_figures_are_drawn_or_left_out():
    (section,) = organize(all_providers())
    svg = draw_bars(section, "bars")
    assert svg.startswith("<svg")
    assert "<title>r50_c4, ours-tuned: 5 ms, 1.25x</title>" in svg
    assert "ours-naive" not in svg
    assert "#a1b2" not in svg
    assert "var(--ours)" in svg
    (section,) = organize([row(status="failed", reason="why")])
    assert draw_bars(section, "bars") is None
    assert draw_tuning(TuningHistory("x", [Trial(0, None)]), "t") is None


def test_figures_of_one_page_share_no_ids(make):
    histories = [TuningHistory(f"p{index}", [Trial(0, 2.0), Trial(1, 1.0)]) for index in range(3)]
    page, _, _ = make(all_providers() + all_providers(threads=2), histories=histories)
    ids = re.findall(r' id="([^"]+)"', page)
    assert ids
    assert len(ids) == len(set(ids))


def test_equal_rows_give_equal_pages(make):
    assert make(all_providers()) == make(all_providers())


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
