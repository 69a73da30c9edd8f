# SPDX-License-Identifier: Apache-2.0
"""The commands: their help, what they refuse and how, what they say at the end, what they need installed."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import pytest
import tomllib
from click.testing import CliRunner, Result
from packaging.requirements import Requirement

from tvmdcn import extras
from tvmdcn.bench.command import benchmark_command
from tvmdcn.cli import main
from tvmdcn.errors import SpecError, TuningError
from tvmdcn.extras import EXTRAS
from tvmdcn.problems import OPERATORS, PROBLEMS, TEST_PROBLEMS, Problem, load_problem_file, parse_problem
from tvmdcn.space import Decisions
from tvmdcn.target import detect_target
from tvmdcn.tuning.command import _Display, _next_command
from tvmdcn.tuning.records import Record
from tvmdcn.tuning.session import Progress, TuningResult
from tvmdcn.tuning.words import describe_decisions

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = main.list_commands(click.Context(main))


def call(*arguments: str | Path) -> Result:
    """Run a command; what it raises, other than its exit, is the test's failure."""
    result = CliRunner().invoke(main, list(map(str, arguments)), prog_name="tvmdcn")
    assert isinstance(result.exception, (SystemExit, type(None))), result.exc_info
    assert "Traceback" not in result.output
    return result


# -- help ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["--help", "-h"])
@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)], ids=" ".join)
def test_help(command: list[str], option: str) -> None:
    result = call(*command, option)
    assert result.exit_code == 0
    assert result.stdout.startswith(f"Usage: {' '.join(['tvmdcn', *command])}")
    for name in COMMANDS if not command else ():
        assert f"  {name} " in result.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_explained(name: str) -> None:
    command = main.get_command(click.Context(main), name)
    assert command is not None
    assert command.help
    options = [parameter for parameter in command.params if isinstance(parameter, click.Option)]
    assert [option.name for option in options if not option.help] == []


@pytest.mark.parametrize("script", ["tune", "benchmark", "report"])
def test_scripts_are_the_commands(script: str) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / f"{script}.py", "--help"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    texts = [text.partition("Options:")[2].split() for text in (done.stdout, call(script, "--help").stdout)]
    assert texts[0] == texts[1] != []


# -- refusals ------------------------------------------------------------------------------------------

BAD_CALLS: list[tuple[list[str], int, str]] = [
    (["tunee"], 2, "No such command 'tunee'"),
    (["--tune"], 2, "No such option"),
    (["tune"], 2, "say what to tune: --problem NAME"),
    (["tune", "r50_c4"], 2, "unexpected extra argument"),
    (["tune", "--problem", "r51"], 1, "problem 'r51' is neither a name nor of the form"),
    (["tune", "--problem", ""], 1, "problem '' is neither"),
    (["tune", "--problem", "1,2,3"], 1, "is neither a name nor of the form"),
    (["tune", "--problem", "1,8,6,7,8,x=1"], 1, "x in problem '1,8,6,7,8,x=1' is not one of"),
    (["tune", "--problem", "1,8,6,7,8,k=0"], 1, "kernel_size must be at least 1"),
    (["tune", "--problem", "1,8,6,7,8,s=1x1x1"], 1, "s in problem '1,8,6,7,8,s=1x1x1' must look like"),
    (["tune", "--problem", "1,8,6,7,8,g=3"], 1, "groups"),
    (["tune", "--problem", "1,8,1,1,8,k=9,p=0"], 1, "kernel"),
    (["tune", "--problem", "0,8,6,7,8"], 1, "extents.batch must be at least 1"),
    (["tune", "--problem", f"1,{'9' * 5000},6,7,8"], 1, "is neither a name nor of the form"),
    (["tune", "--problem", "row", "--trials", "0"], 2, "0 is not in the range x>=1"),
    (["tune", "--problem", "row", "--trials", "many"], 2, "'many' is not a valid integer"),
    (["tune", "--problem", "row", "--threads", "0"], 2, "0 is not in the range x>=1"),
    (["tune", "--problem", "row", "--time-budget", "0"], 2, "0.0 is not in the range x>0"),
    (["tune", "--problem", "row", "--time-budget", "nan"], 1, "time_budget must be a positive number"),
    (["tune", "--problem", "row", "--operator", "conv2d"], 2, "'conv2d' is not one of 'deform_conv2d', 'deform_"),
    (["tune", "--problem", "row", "--seed", "x"], 2, "'x' is not a valid integer"),
    (["tune", "--problem", "row", "--target", "pentium"], 1, "target 'pentium' is not known"),
    (["tune", "--problem", "row", "--target", "cuda"], 1, "this version builds for CPUs only"),
    (["tune", "--problem", "row", "--output", "{file}"], 2, "is a file"),
    (["tune", "--problem", "row", "--output", "/proc/nowhere"], 1, "/proc/nowhere"),
    (["tune", "--file", "absent.json"], 2, "does not exist"),
    (["tune", "--file", "{folder}"], 2, "is a directory"),
    (["tune", "--file", "{file}"], 1, "is not valid json"),
    (["tune", "--file", "{binary}"], 1, "is not valid"),
    (["tune", "--file", "{deep}"], 1, "is not valid"),
    (["tune", "--file", "{wrong}"], 1, "item 1: expected a text"),
    (["tune", "--file", "{empty}"], 1, "must hold a list of problems, not empty"),
    (["tune", "--model", "m:f"], 2, "--model needs --input, such as"),
    (["tune", "--input", "1x3"], 2, "--input goes with --model"),
    (["tune", "--model", "m", "--input", "1x3"], 1, "--model must be MODULE:FACTORY"),
    (["tune", "--model", "no_such:f", "--input", "1x3"], 1, "module no_such cannot be imported"),
    (["tune", "--model", "json:loads", "--input", "1x3"], 1, "loads() failed: TypeError"),
    (["tune", "--model", "json:loads", "--input", "1,3"], 1, "--input must be sizes joined by x"),
    (["build"], 2, "Missing option '--problem'"),
    (["build", "--problem", "r51"], 1, "problem 'r51' is neither"),
    (["build", "--problem", "row", "--operator", "backward"], 2, "'backward' is not one of 'deform_conv2d',"),
    (["build", "--problem", "row", "--target", "pentium"], 1, "target 'pentium' is not known"),
    (
        ["build", "--problem", "row", "--schedule", "best"],
        2,
        "'best' is not one of 'tuned', 'default', 'naive'",
    ),
    (["benchmark", "--provider", "mmcv"], 2, "'mmcv' is not one of ours-tuned"),
    (["benchmark", "--threads", "0"], 2, "0 is not in the range x>=1"),
    (["benchmark", "--problem", "r51"], 1, "problem 'r51' is neither"),
    (["benchmark", "--problem", "row", "--output", "/proc/nowhere/rows"], 1, "/proc/nowhere"),
    (["report"], 2, "Missing argument 'ROWS...'"),
    (["report", "absent.jsonl"], 2, "does not exist"),
    (["report", "{file}"], 1, "there is no sound row in"),
    (["report", "{file}", "--records", "absent"], 2, "does not exist"),
    (["info", "more"], 2, "unexpected extra argument"),
]


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """What bad calls name: a file that is no list of layers, and others."""
    contents = {
        "file": b"not json\n",
        "binary": b"\xff\xfe\x00",
        "deep": b"[" * 200_000,
        "wrong": b'["row", 7]',
        "empty": b"[]",
    }
    for name, content in contents.items():
        (tmp_path / f"{name}.json").write_bytes(content)
    (tmp_path / "folder").mkdir()
    return {**{name: str(tmp_path / f"{name}.json") for name in contents}, "folder": str(tmp_path / "folder")}


@pytest.mark.parametrize(
    ("arguments", "status", "message"), BAD_CALLS, ids=[" ".join(call[0])[:50] for call in BAD_CALLS]
)
def test_bad_call_is_refused_in_words(
    arguments: list[str],
    status: int,
    message: str,
    files: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TVMDCN_RECORDS", files["folder"])
    result = call(*(argument.format(**files) if "{" in argument else argument for argument in arguments))
    assert result.exit_code == status, result.output
    assert message in " ".join(result.stderr.split())
    assert "Error: " in result.stderr
    assert len(result.stderr) < 2000


@pytest.mark.parametrize(
    ("name", "value"),
    [("TVMDCN_NUM_THREADS", "many"), ("TVMDCN_RECORDS", "/no/such/folder"), ("TVMDCN_CACHE_DIR", __file__)],
)
def test_bad_setting_is_refused_in_words(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    result = call("info")
    assert result.exit_code == 1
    assert f"Error: {name}={value!r}" in result.stderr


def test_damaged_records_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    damaged = tmp_path / detect_target().tag / "meta.json"
    damaged.parent.mkdir()
    damaged.write_text("{")
    monkeypatch.setenv("TVMDCN_RECORDS", str(tmp_path))
    for arguments in (["build", "--problem", "row"], ["tune", "--problem", "row"]):
        result = call(*arguments)
        assert result.exit_code == 1
        assert f"{damaged} cannot be used" in result.stderr


def test_a_process_of_its_own_ends_in_words(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "tune.py", "--problem", "r51"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("Error: problem 'r51'")


# -- what is not installed -----------------------------------------------------------------------------


@pytest.fixture
def hide(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let packages seem not to be installed."""

    def hide_modules(*names: str) -> None:
        for loaded in list(sys.modules):
            if loaded.partition(".")[0] in names:
                monkeypatch.setitem(sys.modules, loaded, None)
        for name in names:
            monkeypatch.setitem(sys.modules, name, None)

    return hide_modules


ROWS = str(ROOT / "pyproject.toml")  # any file that exists


@pytest.mark.parametrize(
    ("hidden", "arguments", "message"),
    [
        (["xgboost"], ["tune", "--problem", "row"], "tuning needs xgboost, not installed here: "),
        (["psutil"], ["tune", "--problem", "row"], "tuning needs psutil, not installed here: "),
        (["cloudpickle"], ["tune", "--problem", "row"], "tuning needs cloudpickle, not installed here: "),
        (
            ["xgboost", "psutil", "cloudpickle"],
            ["tune", "--problem", "row"],
            "tuning needs xgboost and psutil and cloudpickle, not installed here: pip install 'tvmdcn[tune]'",
        ),
        (
            ["torch"],
            ["tune", "--model", "m:f", "--input", "1x3"],
            "--model needs torch, not installed here: ",
        ),
        (["matplotlib"], ["report", ROWS], "a report needs matplotlib, not installed here: "),
        (["jinja2", "markupsafe"], ["report", ROWS], "pip install 'tvmdcn[report]'"),
        (
            ["onnxruntime"],
            ["benchmark", "--problem", "row", "--provider", "onnxruntime", "--rounds", "1"],
            "onnxruntime is not installed: pip install onnxruntime",
        ),
        (
            ["openvino"],
            ["benchmark", "--problem", "row", "--provider", "openvino", "--rounds", "1"],
            "openvino is not installed: pip install openvino",
        ),
    ],
    ids=lambda value: "-".join(value)[:40] if isinstance(value, list) else "",
)
def test_missing_package_is_named_with_its_cure(
    hidden: Sequence[str], arguments: list[str], message: str, hide: Callable[..., None]
) -> None:
    hide(*hidden)
    result = call(*arguments)
    assert result.exit_code == 1
    assert message in " ".join(result.output.split())


def test_missing_package_is_an_import_error_for_programs() -> None:
    code = f"""
import sys
sys.modules.update(dict.fromkeys({EXTRAS["tune"]!r}))
import tvmdcn
spec, extents = tvmdcn.DeformConv2dSpec(4, 4), tvmdcn.Extents(1, 5, 5)
try:
    tvmdcn.tune(spec, extents)
except ImportError as error:
    assert isinstance(error, tvmdcn.MissingExtra) and error.name == "xgboost", repr(error)
    assert "pip install 'tvmdcn[tune]'" in str(error), error
else:
    raise AssertionError("it tuned")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr


def test_help_needs_no_extra() -> None:
    hidden = sorted({name for names in EXTRAS.values() for name in names})
    code = f"""
import sys
sys.modules.update(dict.fromkeys({hidden!r}))
from click.testing import CliRunner
from tvmdcn.cli import main
for name in {COMMANDS!r}:
    result = CliRunner().invoke(main, [name, "--help"])
    assert result.exit_code == 0, (name, result.output, result.exc_info)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr


def test_import_that_fails_deep_inside_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    from tvmdcn import target

    def fail(name: str) -> Callable[[], None]:
        def detect() -> None:
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)

        return detect

    monkeypatch.setattr(target, "detect_target", fail("matplotlib.figure"))
    result = call("info")
    assert result.exit_code == 1
    assert "tvmdcn info needs matplotlib, not installed here: pip install 'tvmdcn[report]'" in result.stderr
    # A module that no extra brings is a fault of ours or of the installation: it is not explained away.
    monkeypatch.setattr(target, "detect_target", fail("tvmdcn.gone"))
    result = CliRunner().invoke(main, ["info"])
    assert isinstance(result.exception, ModuleNotFoundError)


def test_table_of_extras_is_that_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    declared = {
        extra: {Requirement(text).name.lower() for text in requirements}
        for extra, requirements in project["project"]["optional-dependencies"].items()
    }
    for extra, modules in extras.EXTRAS.items():
        # jinja2 brings markupsafe
        assert set(modules) - {"markupsafe"} <= declared[extra]


# -- what tune says ------------------------------------------------------------------------------------


def result_of(problem: Problem, folder: Path, **fields: Any) -> TuningResult:
    decisions = Decisions("full-2-tap", {"unroll": 4, "register_pixels": 12, "tile_units": 8, "new_choice": 3})
    record = Record(problem.spec, problem.extents, 2, decisions, 1e-3, 1.5e-3, 9, {})
    base = {"failures": {"build": 1}, "interrupted": False, "trials": 9, "new_trials": 7}
    return TuningResult(record, folder / "meta.json", **{**base, **fields})


@pytest.fixture
def pretend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[dict[str, Any]]]:
    """Replace the tuner; a call sets what it answers, by the layer's name, and returns what it was asked."""

    def set_answers(answers: dict[str, Any] | None = None) -> list[dict[str, Any]]:
        asked = []

        def tune(spec: Any, extents: Any, target: Any, *, name: str, progress: Any, **options: Any) -> Any:
            asked.append({"name": name, "spec": spec, "extents": extents, "target": target, **options})
            for trials, stage in ((0, "search"), (0, "build"), (1, "measure"), (2, "measure"), (2, "search")):
                progress(Progress(trials, 2, 1e-3, 2e-3, {"crash": 1}, 4.0, stage))
            progress(Progress(2, 2, 1e-3, 2e-3, {}, 5.0, "final"))
            answer = (answers or {}).get(name, {})
            if isinstance(answer, BaseException):
                raise answer
            return result_of(Problem(name, spec, extents, ""), tmp_path, **answer)

        monkeypatch.setattr("tvmdcn.tuning.tuner.tune", tune)
        return asked

    return set_answers


def test_summary_ends_with_the_schedule_and_the_next_command(pretend: Callable[..., Any], tmp_path: Path) -> None:
    pretend()
    result = call("tune", "--problem", "row", "--threads", "2")
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [
        "row: 1.000 ms on 2 threads, 1.50x as fast as the default (1.500 ms)",
        "  schedule: variant full-2-tap; all taps and channels sampled before the product; "
        "2 vectors of output channels in registers; sampling plan per tap; reduction unrolled 4 times; "
        "12 pixels in a register tile; tiles of up to 8 units of 24 pixels; new_choice 3",
        "  9 trials (7 new), failed: 1 build",
        f"records: {tmp_path / 'meta.json'}",
        "next: tvmdcn benchmark --problem row --threads 2",
    ]


@pytest.mark.parametrize(
    ("operator", "names"),
    [
        (None, ["row", "pixel"]),
        ("deform_conv2d", ["row", "pixel"]),
        ("deform_conv2d_grad", ["row backward", "pixel backward"]),
        ("all", ["row", "row backward", "pixel", "pixel backward"]),
    ],
)
def test_layers_are_tuned_for_the_operators_asked_for(
    pretend: Callable[..., Any], operator: str | None, names: list[str]
) -> None:
    asked = pretend()
    options = [] if operator is None else ["--operator", operator]
    result = call("tune", "--problem", "row", "--problem", "pixel", "--problem", "row", *options)
    assert result.exit_code == 0
    assert [found["name"] for found in asked] == names
    for found in asked:
        problem = TEST_PROBLEMS[found["name"].removesuffix(" backward")]
        problem = problem.backward if found["name"].endswith("backward") else problem
        assert (found["spec"], found["extents"]) == (problem.spec, problem.extents)
        assert f"{found['name']}: 1.000 ms" in result.stdout
    # Benchmarks measure layers, whichever of their operators was tuned.
    assert result.stdout.endswith("next: tvmdcn benchmark --problem row --problem pixel --threads 2\n")


def test_both_commands_know_all_operators() -> None:
    for name in ("tune", "build"):
        command = main.get_command(click.Context(main), name)
        assert command is not None
        (option,) = (p for p in command.params if p.name == "operator")
        assert list(option.type.choices) == list(OPERATORS)
        assert option.default == OPERATORS[0]


def test_progress_without_a_terminal_is_a_line_for_each_round(pretend: Callable[..., Any]) -> None:
    pretend()
    best = "best 1.000 ms · 2.00x of default"
    assert call("tune", "--problem", "row").stderr.splitlines() == [
        f"row (1/1): 0 of 2 trials · {best} · failed: 1 crash · searching",
        f"row (1/1): 2 of 2 trials · {best} · failed: 1 crash · 0 s left · searching",
        f"row (1/1): 2 of 2 trials · {best} · comparing the best",
    ]


def test_display_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "150")
    with _Display("[red]x[/nothing]", 60.0) as display:
        display.show(Progress(10, 20, 1e-3, 2e-3, {}, 0.1, "search"))
        display.show(Progress(12, 20, 1e-3, 2e-3, {"[b]odd": 2}, 6.0, "measure"))
    shown = capsys.readouterr().err
    assert "[red]x[/nothing]" in shown
    assert "failed: 2 [b]odd" in shown
    assert "24 s left" in shown, "two trials took 6 s, eight are left; those of earlier runs took none of it"


def test_options_reach_the_tuner(pretend: Callable[..., Any], tmp_path: Path) -> None:
    asked = pretend()
    options = ["--trials", "5", "--threads", "3", "--time-budget", "2.5", "--fresh", "--seed", "7"]
    assert call("tune", "--problem", "row", *options, "--output", tmp_path, "--target", "llvm").exit_code == 0
    (found,) = asked
    row = TEST_PROBLEMS["row"]
    assert found == {
        "name": "row",
        "spec": row.spec,
        "extents": row.extents,
        "target": "llvm",
        "trials": 5,
        "threads": 3,
        "time_budget": 2.5,
        "resume": False,
        "records": tmp_path,
        "seed": 7,
    }


def test_layers_come_from_everywhere_once_each(pretend: Callable[..., Any], tmp_path: Path) -> None:
    asked = pretend()
    path = tmp_path / "layers.json"
    path.write_text(json.dumps(["pixel", {"name": "mine", "problem": "1,4,5,5,4"}]))
    result = call("tune", "--problem", "row", "--problem", "1,3,9,9,4,k=1", "--problem", "row", "--file", path)
    assert [found["name"] for found in asked] == ["row", "1,3,9,9,4,k=1", "pixel", "mine"]
    assert result.stdout.splitlines()[-1] == (
        "next: tvmdcn benchmark --problem row --problem 1,3,9,9,4,k=1x1 --problem pixel --problem 1,4,5,5,4 --threads 2"
    )


def test_all_means_the_named_layers(pretend: Callable[..., Any]) -> None:
    asked = pretend()
    result = call("tune", "--problem", "all", "--problem", "r50_c4")
    assert [found["name"] for found in asked] == list(PROBLEMS)
    assert result.stdout.splitlines()[-1] == "next: tvmdcn benchmark --problem all --threads 2"


def test_failing_layer_does_not_stop_the_others(pretend: Callable[..., Any]) -> None:
    asked = pretend({"row": TuningError("none of 3 schedules could be built")})
    result = call("tune", "--problem", "row", "--problem", "column")
    assert result.exit_code == 1
    assert len(asked) == 2
    assert "Error: row: none of 3 schedules could be built" in result.stderr
    assert "next: tvmdcn benchmark --problem column" in result.stdout


def test_error_that_concerns_all_stops(pretend: Callable[..., Any]) -> None:
    asked = pretend({"column": SpecError("target x cannot be measured")})
    result = call("tune", "--problem", "row", "--problem", "column", "--problem", "pixel")
    assert result.exit_code == 1
    assert len(asked) == 2
    assert "Error: target x cannot be measured" in result.stderr
    assert "next: tvmdcn benchmark --problem row" in result.stdout, "what was tuned is not lost"


def test_interruption_stops_and_keeps_the_best(pretend: Callable[..., Any]) -> None:
    asked = pretend({"row": {"interrupted": True}})
    result = call("tune", "--problem", "row", "--problem", "column")
    assert result.exit_code == 0
    assert len(asked) == 1
    assert "interrupted; run the same command again to continue" in result.stdout
    assert result.stdout.splitlines()[-1] == "next: tvmdcn benchmark --problem row --threads 2"


def test_interruption_before_anything_was_measured(pretend: Callable[..., Any]) -> None:
    pretend({"row": KeyboardInterrupt()})
    result = call("tune", "--problem", "row", "--problem", "column")
    assert result.exit_code == 130
    assert "row: interrupted before anything was measured" in result.stderr
    assert "next:" not in result.stdout


def understood(command: str) -> tuple[dict[str, str], list[Problem], dict[str, Any]]:
    """Parse a next command as a shell and the command would: settings, layers, the other options."""
    words = shlex.split(command)
    settings = dict(word.split("=", 1) for word in words[: words.index("tvmdcn")])
    program, name, *arguments = words[len(settings) :]
    assert (program, name) == ("tvmdcn", "benchmark")
    context = benchmark_command.make_context("benchmark", arguments)
    problems = context.params.pop("problems")
    assert problems
    found = [p for text in problems for p in (PROBLEMS.values() if text == "all" else [parse_problem(text)])]
    return settings, found, context.params


FILE = """[
    "row",
    {"name": "r50_c4", "problem": "1,3,9,9,4"},
    {"name": "odd; rm -rf name", "problem": "2,3,5,7,4,mask=0"}
]"""


@pytest.mark.parametrize(
    "texts",
    [
        ["r50_c4"],
        ["row", "r50_c4"],
        ["1,8,6,7,8"],
        ["1,8,6,7,8,p=0x1x2x3,mask=0,dtype=float64"],
        list(PROBLEMS),
    ],
    ids=lambda texts: texts[0] if len(texts) < 3 else "all",
)
def test_next_command_names_what_was_tuned(texts: list[str]) -> None:
    tuned = [parse_problem(text) for text in texts]
    settings, found, options = understood(_next_command(tuned, 1, None, None))
    assert [(p.spec, p.extents) for p in found] == [(p.spec, p.extents) for p in tuned]
    assert settings == {}
    assert options["threads"] == (1,)


def test_next_command_after_a_file_with_names_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "layers.json"
    path.write_text(FILE)
    tuned = load_problem_file(path)
    _, found, _ = understood(_next_command(tuned, 1, None, None))
    # "r50_c4" of the file is another layer than ours of that name.
    assert [(p.spec, p.extents) for p in found] == [(p.spec, p.extents) for p in tuned]


def test_next_command_looks_where_the_records_are() -> None:
    output = Path("my records; $HOME")
    other = "x86-64-v2" if detect_target().mcpu != "x86-64-v2" else "x86-64-v3"
    settings, _, options = understood(_next_command([parse_problem("row")], 4, other, output))
    assert settings == {"TVMDCN_RECORDS": str(output), "TVMDCN_TARGET": f"llvm-{other}"}
    assert options["threads"] == (4,)


@pytest.mark.parametrize(
    ("variant", "words"),
    [
        ("depthwise", "variant depthwise; sampled and multiplied in one step; a 1"),
        (
            "split-4-run",
            "variant split-4-run; taps and channels sampled in chunks, whose products are added up; "
            "4 vectors of output channels in registers; sampling plan per run; a 1",
        ),
        ("my-own", "variant my-own; a 1"),
        ("full", "variant full; all taps and channels sampled before the product; a 1"),
        ("bias", "variant bias; sums of the output's gradient only; a 1"),
        (
            "own-2",
            "variant own-2; sampling plan and output gradients prepared by each block of channels; "
            "2 vectors of input channels in registers; a 1",
        ),
    ],
)
def test_schedules_of_any_space_have_words(variant: str, words: str) -> None:
    assert describe_decisions(Decisions(variant, {"a": 1}), 24) == words
