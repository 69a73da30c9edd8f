# SPDX-License-Identifier: Apache-2.0
"""``tvmdcn tune``: which layers it hands to the tuner, what it shows meanwhile, and what it says in the end."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from tvmdcn.bench.command import benchmark_command
from tvmdcn.cli import main
from tvmdcn.errors import SpecError, TuningError
from tvmdcn.problems import OPERATORS, PROBLEMS, TEST_PROBLEMS, Problem, load_problem_file, parse_problem
from tvmdcn.space import Decisions
from tvmdcn.target import detect_target
from tvmdcn.tuning.command import _next_command
from tvmdcn.tuning.display import Display
from tvmdcn.tuning.farm import ServerState
from tvmdcn.tuning.records import Record
from tvmdcn.tuning.session import Progress, TuningResult
from tvmdcn.tuning.tuner import Layer
from tvmdcn.tuning.words import describe_decisions


def call(*arguments: str | Path) -> Result:
    """Run a command; what it raises, other than its exit, is the test's failure."""
    result = CliRunner().invoke(main, list(map(str, arguments)), prog_name="tvmdcn")
    assert isinstance(result.exception, (SystemExit, type(None))), result.exc_info
    assert "Traceback" not in result.output
    return result


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

        def tune_together(layers: Any, target: Any, *, progress: Any, **options: Any) -> list[Any]:
            asked.append({"layers": layers, "target": target, **options})
            for layer in layers:
                for trials, stage in ((0, "search"), (0, "build"), (1, "measure"), (2, "measure"), (2, "search")):
                    progress(Progress(trials, 2, 1e-3, 2e-3, {"crash": 1}, 4.0, stage, layer.name, layer.weight))
            results = []
            for layer in layers:
                progress(Progress(2, 2, 1e-3, 2e-3, {}, 5.0, "final", layer.name, layer.weight))
                answer = (answers or {}).get(layer.name, {})
                if isinstance(answer, TuningError):
                    results.append(answer)
                elif isinstance(answer, BaseException):
                    raise answer
                else:
                    results.append(result_of(Problem(layer.name, layer.spec, layer.extents, ""), tmp_path, **answer))
            return results

        monkeypatch.setattr("tvmdcn.tuning.tuner.tune_together", tune_together)
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
    ((layers,),) = ([found["layers"]] for found in asked)
    assert [layer.name for layer in layers] == names
    for layer in layers:
        problem = TEST_PROBLEMS[layer.name.removesuffix(" backward")]
        problem = problem.backward if layer.name.endswith("backward") else problem
        assert (layer.spec, layer.extents) == (problem.spec, problem.extents)
        assert f"{layer.name}: 1.000 ms" in result.stdout
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
        f"row: 0 of 2 trials · {best} · failed: 1 crash · searching",
        f"row: 2 of 2 trials · {best} · failed: 1 crash · 0 s left · searching",
        f"row: 2 of 2 trials · {best} · comparing the best",
    ]


def test_progress_of_several_layers_says_how_many_trials_there_are_in_all(pretend: Callable[..., Any]) -> None:
    pretend()
    lines = call("tune", "--problem", "row", "--problem", "pixel").stderr.splitlines()
    assert lines[0].startswith("row: 0 trials, 0 of 2 in all · best 1.000 ms")
    assert lines[3].startswith("pixel: 2 trials, 4 of 2 in all · best 1.000 ms")


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wide terminal."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "150")


@pytest.mark.usefixtures("terminal")
def test_display_on_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with Display(["[red]x[/nothing]"], 60.0) as display:
        display.show(Progress(10, 20, 1e-3, 2e-3, {}, 0.1, "search"))
        display.show(Progress(12, 20, 1e-3, 2e-3, {"[b]odd": 2}, 6.0, "measure"))
    shown = capsys.readouterr().err
    assert "[red]x[/nothing]" in shown
    assert "failed: 2 [b]odd" in shown
    assert "24 s left" in shown, "two trials took 6 s, eight are left; those of earlier runs took none of it"


@pytest.mark.usefixtures("terminal")
def test_display_of_several_layers_and_servers(capsys: pytest.CaptureFixture[str]) -> None:
    with Display(["one", "two"], None) as display:
        display.show(Progress(10, 40, 1e-3, 2e-3, {}, 0.0, "search", "one", 3.0))
        display.show(Progress(14, 40, 1e-3, 2e-3, {}, 8.0, "measure", "one", 3.0))
        display.show(Progress(2, 40, 5e-3, 5e-3, {}, 1.0, "build", "two", 1.0))
        display.show_servers(
            [
                ServerState("10.0.0.1:9090", "measuring", "c8x8", 7),
                ServerState("10.0.0.2:9090", "lost", "no [b]answer", 3),
            ]
        )
    shown = capsys.readouterr().err
    last = shown[shown.rindex("all layers") :]
    assert "16/40" in last
    assert "1.38x of default" in last, "three calls of 2 ms and one of 5 are now three of 1 ms and one of 5"
    assert "54 s left" in last, "four trials took 9 s, 24 are left"
    for words in ("10.0.0.1:9090", "measuring", "7 measured", "10.0.0.2:9090", "lost", "no [b]answer"):
        assert words in last


def test_options_reach_the_tuner(pretend: Callable[..., Any], tmp_path: Path) -> None:
    asked = pretend()
    options = ["--trials", "5", "--threads", "3", "--time-budget", "2.5", "--fresh", "--seed", "7"]
    assert call("tune", "--problem", "row", *options, "--output", tmp_path, "--target", "llvm").exit_code == 0
    (found,) = asked
    row = TEST_PROBLEMS["row"]
    assert found == {
        "layers": [Layer(row.spec, row.extents, "row", 1)],
        "target": "llvm",
        "warm_starts": 4,
        "farm": None,
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
    path.write_text(json.dumps(["pixel", {"name": "mine", "problem": "1,4,5,5,4", "count": 5}]))
    result = call("tune", "--problem", "row", "--problem", "1,3,9,9,4,k=1", "--problem", "row", "--file", path)
    assert [layer.name for layer in asked[0]["layers"]] == ["row", "1,3,9,9,4,k=1", "pixel", "mine"]
    assert [layer.weight for layer in asked[0]["layers"]] == [1, 1, 1, 5]
    assert result.stdout.splitlines()[-1] == (
        "next: tvmdcn benchmark --problem row --problem 1,3,9,9,4,k=1x1 --problem pixel --problem 1,4,5,5,4 --threads 2"
    )


def test_all_means_the_named_layers(pretend: Callable[..., Any]) -> None:
    asked = pretend()
    result = call("tune", "--problem", "all", "--problem", "r50_c4")
    assert [layer.name for layer in asked[0]["layers"]] == list(PROBLEMS)
    assert asked[0]["trials"] == 64 * len(PROBLEMS)
    assert result.stdout.splitlines()[-1] == "next: tvmdcn benchmark --problem all --threads 2"


def test_failing_layer_does_not_stop_the_others(pretend: Callable[..., Any]) -> None:
    asked = pretend({"row": TuningError("none of 3 schedules could be built")})
    result = call("tune", "--problem", "row", "--problem", "column")
    assert result.exit_code == 1
    assert len(asked) == 1
    assert "Error: row: none of 3 schedules could be built" in result.stderr
    assert "next: tvmdcn benchmark --problem column" in result.stdout


def test_error_that_concerns_all_stops(pretend: Callable[..., Any]) -> None:
    pretend({"column": SpecError("target x cannot be measured")})
    result = call("tune", "--problem", "row", "--problem", "column", "--problem", "pixel")
    assert result.exit_code == 1
    assert "Error: target x cannot be measured" in result.stderr
    assert "next:" not in result.stdout


def test_several_layers_are_summed_up_as_often_as_they_are_called(pretend: Callable[..., Any], tmp_path: Path) -> None:
    pretend()
    path = tmp_path / "layers.json"
    path.write_text(json.dumps(["pixel", {"name": "mine", "problem": "1,4,5,5,4", "count": 5}]))
    assert (
        "all 2 layers, 6 calls: 6.000 ms, 1.50x as fast as the defaults (9.000 ms)"
        in call("tune", "--file", path).stdout.splitlines()
    )


def test_interruption_stops_and_keeps_the_best(pretend: Callable[..., Any]) -> None:
    pretend({"row": {"interrupted": True}, "column": TuningError("nothing was tried")})
    result = call("tune", "--problem", "row", "--problem", "column")
    assert result.exit_code == 1
    assert "interrupted; run the same command again to continue" in result.stdout
    assert result.stdout.splitlines()[-1] == "next: tvmdcn benchmark --problem row --threads 2"


def test_interruption_before_anything_was_measured(pretend: Callable[..., Any]) -> None:
    pretend({"row": KeyboardInterrupt()})
    result = call("tune", "--problem", "row", "--problem", "column")
    assert result.exit_code == 130
    assert "interrupted before anything was measured" in result.stderr
    assert "next:" not in result.stdout


def test_servers_are_asked_for_by_their_key(pretend: Callable[..., Any]) -> None:
    asked = pretend()
    server = ["--tracker", "[::1]:9190", "--key", "room"]
    assert call("tune", "--problem", "row", *server, "--parallel", "3").exit_code == 0
    assert call("tune", "--problem", "row", *server).exit_code == 0
    farms = [found["farm"] for found in asked]
    assert [(farm.address, farm.key, farm.parallel) for farm in farms] == [
        (("::1", 9190), "room", 3),
        (("::1", 9190), "room", 8),
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tracker", "10.0.0.1:9190"], "--tracker needs --key"),
        (["--key", "room"], "--key and --parallel go with --tracker"),
        (["--parallel", "2"], "--key and --parallel go with --tracker"),
        (["--tracker", "10.0.0.1", "--key", "room"], "tracker must be HOST:PORT, such as 10.0.0.1:9190"),
        (["--tracker", "h:99999999999", "--key", "room"], "tracker must be HOST:PORT"),
        (["--tracker", "h:1", "--key", "a b"], "key must be a word"),
        (["--tracker", "h:1", "--key", ""], "key must be a word"),
        (["--tracker", "h:1", "--key", "room", "--parallel", "0"], "0 is not in the range"),
    ],
)
def test_bad_options_of_a_farm_are_refused(options: list[str], message: str) -> None:
    result = call("tune", "--problem", "row", *options)
    assert result.exit_code in (1, 2)
    assert message in result.stderr


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
