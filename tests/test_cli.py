# SPDX-License-Identifier: Apache-2.0
"""The commands: their help, what they refuse and how, what they say at the end, what they need installed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import click
import pytest
import tomllib
from click.testing import CliRunner, Result
from packaging.requirements import Requirement

from tvmdcn import extras
from tvmdcn.cli import main
from tvmdcn.extras import EXTRAS
from tvmdcn.target import detect_target

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
    # Without the first line, which names the program; lines may end elsewhere.
    texts = ["".join(text.partition("\n")[2].split()) for text in (done.stdout, call(script, "--help").stdout)]
    assert texts[0] == texts[1] != ""


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
    (["tune", "--problem", "row", "--target", "cuda"], 1, "this machine has no NVIDIA driver"),
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
        (["altair"], ["report", ROWS], "a report needs altair, not installed here: "),
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

    monkeypatch.setattr(target, "detect_target", fail("altair.vegalite"))
    result = call("info")
    assert result.exit_code == 1
    assert "tvmdcn info needs altair, not installed here: pip install 'tvmdcn[report]'" in result.stderr
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
        # jinja2 brings markupsafe; one module is not named as its package is
        packages = {"vl-convert-python" if name == "vl_convert" else name for name in modules}
        assert packages - {"markupsafe"} <= declared[extra]
