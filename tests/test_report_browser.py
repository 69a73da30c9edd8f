# SPDX-License-Identifier: Apache-2.0
"""The report in a real browser: it opens from a file, draws its plots, answers clicks, and nothing breaks out."""

from __future__ import annotations

import io
import os
from contextlib import contextmanager

import pytest
from report_rows import HOSTILE, PROVIDERS, all_providers, backward, roof, roofs, row, sweep

pytest.importorskip("altair")
pytest.importorskip("vl_convert")
pytest.importorskip("scipy")
pytest.importorskip("playwright")

from playwright.sync_api import sync_playwright

from tvmdcn.bench.rows import append_row
from tvmdcn.problems import PROBLEMS
from tvmdcn.report.data import Trial, TuningHistory
from tvmdcn.report.page import Outputs, collect
from tvmdcn.report.provenance import read_sources
from tvmdcn.report.schedules import SchedulePair, ScheduleView
from tvmdcn.report.screenshot import ScreenshotError, find_browser, take_screenshot
from tvmdcn.report.two_runs import TwoRuns

LIMIT = 6_000_000  # bytes of a page
try:
    BROWSER = find_browser()
except ScreenshotError as missing:
    pytest.skip(str(missing), allow_module_level=True)


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as started:
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        opened = started.chromium.launch(executable_path=BROWSER, args=arguments)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def show(browser):
    """Open a page in a window of its own; when it closes, nothing may have gone wrong in it."""

    @contextmanager
    def window(path, width=1280, height=1000, scripts=True, **settings):
        context = browser.new_context(
            viewport={"width": width, "height": height}, java_script_enabled=scripts, **settings
        )
        page = context.new_page()
        wrong = []
        page.on("console", lambda message: wrong.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
        page.on("dialog", lambda dialog: (wrong.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda request: wrong.append(request.url) if not request.url.startswith("file:") else None)
        page.goto(path.as_uri())
        if scripts and page.locator("figure.chart").count():
            page.wait_for_selector("html[data-charts=drawn]", state="attached")
        yield page
        context.close()
        assert wrong == []

    return window


def history(name="r50_c4"):
    trials = [
        Trial(
            number, 2.0 + (number * 7 % 5) / 4, None, 0.5 * number, {"unroll": str(number % 3), "tile": str(number % 4)}
        )
        for number in range(24)
    ]
    return TuningHistory(name, [*trials, Trial(24, None, "wrong result", 13.0)], "a log")


def pair(name="r50_c4"):
    left = ScheduleView(
        "the default", {"target": "a"}, {"unroll": "1", "tile": "8"}, {"TIR": "for i in range(4):\n    left"}
    )
    right = ScheduleView(
        "the tuned", {"target": "a"}, {"unroll": "4", "tile": "8"}, {"TIR": "for i in range(8):\n    right"}
    )
    return SchedulePair(name, left, right)


def many(count):
    """Return that many rows, of all providers, on layers of made-up names."""
    names = list(PROBLEMS)
    made = []
    for number in range(-(-count // len(PROVIDERS))):
        layer = PROBLEMS[names[number % len(names)]]
        named = {"problem": f"layer_{number}", "spec": layer.spec, "extents": layer.extents}
        made += [
            row(provider, median_ms=PROVIDERS[provider][1] * (1 + number % 7 / 5), **named) for provider in PROVIDERS
        ]
    return made[:count]


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """Write rows to a file and a page of them; return the page."""

    def make(rows, tail="", **content):
        folder = tmp_path_factory.mktemp("report")
        path = folder / "rows.jsonl"
        path.touch()
        for found in rows:
            append_row(path, found)
        with path.open("a") as file:
            file.write(tail)
        page = folder / "report.html"
        Outputs(html=page).write(collect([path], pairs=content.pop("pairs", []), **content))
        assert page.stat().st_size < LIMIT
        return page

    return make


@pytest.fixture(scope="module")
def full(build):
    """A page with everything on it."""
    rows = [*all_providers(max_rel_error=1e-7), *all_providers(problem="deft"), *all_providers(threads=2)]
    rows += [*sweep(), *sweep("openvino"), *roofs(), roof("matmul", rate=400.0, threads=2)]
    rows += [backward(), backward("conv2d-nchw"), row("onnxruntime", "r50_c5", status="failed", reason="it has none")]
    return build(rows, histories=[history(), history("deft")], pairs=[pair(), pair("deft")])


def test_opens_from_a_file_with_all_its_plots(show, full):
    with show(full) as page:
        assert "2.00\u00d7" in page.inner_text(".cards")
        drawn = page.evaluate(
            "[...document.querySelectorAll('figure.chart')].filter(f => !f.closest('details:not([open])')).map(f => ["
            "f.dataset.drawn, f.querySelector('svg')?.getBoundingClientRect().height > 40,"
            "f.querySelectorAll('svg .role-mark path, svg .role-mark line').length"
            "])"
        )
        assert len(drawn) >= 8
        for done, tall, marks in drawn:
            assert (done, tall) == ("true", True)
            assert marks > 0
        for anchor in ("verdict", "roofline", "search", "schedules", "provenance"):
            assert page.locator(f"main > section#{anchor}").count() == 1
            assert page.locator(f"nav a[href='#{anchor}']").count() == 1
        # Every figure says what it shows and how to read it.
        for caption in page.locator("figure.chart figcaption").all():
            assert len(caption.text_content().split()) > 8


def test_hover_tells_the_figures_of_a_dot(show, full):
    with show(full) as page:
        dots = page.locator("#verdict-1 figure").first.locator("svg .mark-symbol.role-mark path")
        texts = []
        for dot in dots.all():
            dot.hover(force=True)
            page.wait_for_selector("#vg-tooltip-element.visible")
            texts.append(" ".join(page.inner_text("#vg-tooltip-element").split()))
        ours = [text for text in texts if "r50_c4" in text and "ours-tuned" in text]
        assert ours
        for words in ("median, ms 5 ", "10 %, ms 4.75", "90 %, ms 5.5", "in units of 1 1.25", "max error 1.0e-07"):
            assert words in ours[0]


def test_click_in_the_legend_singles_a_provider_out(show, full):
    with show(full) as page:
        figure = page.locator("#verdict-1 figure").first
        marks = "[...figure.querySelectorAll('.mark-symbol.role-mark path')]"
        opacities = f"figure => {marks}.map(path => getComputedStyle(path).opacity)"
        assert set(figure.evaluate(opacities)) == {"1"}
        figure.locator(".role-legend .role-legend-label text", has_text="openvino").click(force=True)
        page.wait_for_timeout(200)
        after = figure.evaluate(opacities)
        assert after.count("1") == 2  # two layers
        assert set(after) == {"1", "0.12"}


def test_numbers_of_a_figure_are_a_table_on_request(show, full):
    with show(full) as page:
        details = page.locator("#verdict-1 figure details.values").first
        assert details.locator("table").count() == 0
        details.locator("summary").click()
        table = details.locator("table").first
        table.locator("tbody tr").first.wait_for()
        assert table.locator("tbody tr").count() == 2 * 6  # two layers, six providers: the naive schedule is not drawn
        assert "median ms" in table.inner_text()


def test_click_shows_the_second_schedule(show, full):
    with show(full) as page:
        details = page.locator("#schedules details[data-text]")
        second = details.nth(1)
        assert "range(8)" not in second.inner_text()
        second.locator("summary").click()
        second.locator("table, pre, mark").first.wait_for()
        text = second.inner_text()
        assert "range(4)" in text
        assert "range(8)" in text
        assert second.locator("mark").count() > 0


def test_hidden_charts_are_drawn_when_shown(show, full):
    with show(full) as page:
        page.locator("details:not([open]) figure.chart").first.evaluate("figure => { figure.id = 'hidden'; }")
        hidden = page.locator("#hidden")
        assert hidden.locator("svg").count() == 0
        hidden.locator("xpath=ancestor::details[1]/summary").click()
        hidden.locator("svg").first.wait_for()
        assert hidden.locator("svg").first.bounding_box()["width"] > 300


COLOR = "getComputedStyle(document.querySelector('#verdict .mark-symbol.role-mark path')).fill"


def test_colours_follow_the_reader_and_print_is_light(show, full):
    with show(full, color_scheme="light") as page:
        light, paper = page.evaluate(COLOR), page.evaluate("getComputedStyle(document.body).backgroundColor")
    with show(full, color_scheme="dark") as page:
        dark, night = page.evaluate(COLOR), page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert dark != light
        assert night != paper
        page.emulate_media(media="print", color_scheme="dark")
        assert page.evaluate(COLOR) == light
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert page.evaluate("getComputedStyle(document.querySelector('nav')).display") == "none"
        assert len(page.pdf()) > 50_000


def test_narrow_window_scrolls_only_within_figures(show, full):
    with show(full, width=390) as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_reads_without_scripts(show, full):
    with show(full, scripts=False) as page:
        assert page.locator("#verdict-1 table.measured tbody tr").count() == 3
        assert "drawn by JavaScript" in page.locator("noscript").first.inner_text()


def test_policy_refuses_scripts_that_are_not_the_pages(browser, full, tmp_path):
    broken = tmp_path / "broken.html"
    text = full.read_text(encoding="utf-8")
    broken.write_text(
        text.replace("</main>", "<script>window.ran = 1</script><img src=x onerror='window.ran = 2'></main>")
    )
    page = browser.new_page()
    said = []
    page.on("console", lambda message: said.append(message.text))
    page.goto(broken.as_uri())
    page.wait_for_selector("html[data-charts=drawn]", state="attached")
    assert page.evaluate("window.ran === undefined")
    assert any("Content Security Policy" in text for text in said)
    page.close()


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], "there is no sound row"),
        ([row()], "r50_c4"),
        (many(500), "layer_71"),
        ([row(name, status="failed", reason=f"reason {n}") for n, name in enumerate(PROVIDERS)], "reason 6"),
        ([*all_providers(), row(machine={"cpu": "B"}), backward(machine={"cpu": "C"})], "rows come from 3 machines"),
        ([row(measure="overhead_torch", median_ms=0.01)], "call overhead, the kernel, torch"),
        (roofs(), "A cpu"),
    ],
    ids=["none", "one", "500", "failures", "machines", "overhead", "roofs"],
)
def test_opens_whatever_the_rows(show, build, rows, words):
    with show(build(rows)) as page:
        assert words in page.inner_text("body")
        assert "undefined" not in page.inner_text("body")
        assert "NaN" not in page.inner_text("body")


def test_file_cut_in_the_middle_shows_the_rest(show, build):
    with show(build(all_providers(), tail='{"schema": 3, "kind": "layer", "prob')) as page:
        assert "line 8" in page.inner_text("aside")
        assert "2.00\u00d7" in page.inner_text(".cards")


def test_hostile_names_stay_text(show, build):
    rows = [row(problem=HOSTILE), row("openvino", problem=HOSTILE, status="failed", reason=HOSTILE), *roofs()]
    rows += [row(HOSTILE, problem=HOSTILE, command=HOSTILE, versions={HOSTILE: HOSTILE}, note=HOSTILE)]
    rows += [row("conv2d-nchw", problem=HOSTILE), row(problem=HOSTILE, machine={"cpu": HOSTILE, HOSTILE: HOSTILE})]
    rows += sweep(problem=HOSTILE)
    left = ScheduleView(HOSTILE, {HOSTILE: HOSTILE}, {HOSTILE: HOSTILE}, {"TIR": HOSTILE}, {}, (HOSTILE,))
    trials = [Trial(n, 2.0 + n % 3, None, n, {HOSTILE: f"{HOSTILE}{n % 2}"}) for n in range(12)]
    histories = [TuningHistory(HOSTILE, [*trials, Trial(12, None, HOSTILE, 13.0)], HOSTILE)]
    pairs = [SchedulePair(HOSTILE, left, ScheduleView("tuned", {}, {HOSTILE: "x"}, {"TIR": "y"}))]
    with show(build(rows, histories=histories, pairs=pairs)) as page:
        for details in page.locator("details").all():
            details.evaluate("element => { element.open = true; }")
        page.wait_for_timeout(500)
        for dot in page.locator("#verdict-1 figure").first.locator(".mark-symbol.role-mark path").all():
            dot.hover(force=True)
            page.wait_for_selector("#vg-tooltip-element.visible")
            assert "<script>alert(1)" in page.inner_text("#vg-tooltip-element")
        assert page.locator("img, iframe, object, a[href^=javascript]").count() == 0
        assert page.evaluate("[...document.scripts].filter(s => s.type !== 'application/json').length") <= 6
        assert "<script>alert(1)</script>" in page.inner_text("main")


def test_two_runs_on_a_page(show, tmp_path):
    files = []
    for name, factor in (("a", 1.0), ("b", 3.0)):
        files.append(tmp_path / f"{name}.jsonl")
        for found in all_providers():
            changed = factor if found.provider == "ours-tuned" else 1.0
            append_row(files[-1], row(found.provider, median_ms=found.median_ms * changed))
    page_file = tmp_path / "changes.html"
    Outputs(html=page_file).write(TwoRuns.of(*(read_sources([file]) for file in files), level=0.05, threshold=0.03))
    with show(page_file) as page:
        assert page.inner_text(".hero.bad b") == "1"
        assert page.locator("#changes svg .mark-symbol.role-mark path").count() == 7
        assert page.locator("#changes table").first.locator("td.loss").inner_text() == "slower"


def test_picture_is_not_empty(full, tmp_path):
    image = pytest.importorskip("PIL.Image")
    picture = tmp_path / "deep" / "page.png"
    take_screenshot(full, picture, width=1100, height=1500)
    with image.open(io.BytesIO(picture.read_bytes())) as found:
        assert found.size == (1100, 1500)
        colors = found.convert("RGB").getcolors(maxcolors=1 << 24)
        background = max(colors)[0] / (1100 * 1500)
        # Green of ours and the colours of the peers, so the plots are there, and not only the text.
        assert {(0, 131, 107), (217, 120, 45), (91, 106, 196)} <= {color for _, color in colors}
    assert 0.3 < background < 0.95


def test_no_picture_without_a_browser(full, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ScreenshotError, match=r"none of chromium, .* is on the PATH: install it"):
        take_screenshot(full, tmp_path / "x.png")
    failing = tmp_path / "chromium"
    failing.write_text("#!/bin/sh\necho it fell over >&2\nexit 3\n")
    failing.chmod(0o755)
    with pytest.raises(ScreenshotError, match=r"gave no picture of .* \(exit code 3\): it fell over"):
        take_screenshot(full, tmp_path / "x.png")
