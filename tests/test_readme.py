# SPDX-License-Identifier: Apache-2.0
"""The README keeps its word: its Python runs, its commands, options, files and settings exist."""

from __future__ import annotations

import re
import shlex
import subprocess
from importlib.util import find_spec
from pathlib import Path

import click
import pytest

from tvmdcn import env
from tvmdcn.cli import main
from tvmdcn.problems import parse_problem

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = ("README.md", "tuning_logs/README.md", "docs/tuning-farm.md", "CHANGELOG.md")


def blocks(language: str) -> list[str]:
    """Return the fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def commands() -> list[list[str]]:
    """Return the commands of the shell blocks, and of the text, as words."""
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    lines += re.findall(r"`((?:tvmdcn |scripts/|python scripts/)[^`]*)`", README)
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def subcommand(name: str) -> click.Command:
    command = main.get_command(click.Context(main), name)
    assert command is not None, f"README names `tvmdcn {name}`, which does not exist"
    return command


@pytest.mark.parametrize("code", blocks("python"), ids=lambda code: code.partition("(")[0][-20:])
def test_python_runs(code: str) -> None:
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})


def test_commands_exist() -> None:
    named = commands()
    assert len(named) > 8
    for words in named:
        program, *arguments = words[1:] if words[0] == "python" else words
        if program == "tvmdcn":
            command = subcommand(arguments[0])
            options = {name for parameter in command.params for name in (*parameter.opts, "--help")}
            used = {word.partition("=")[0] for word in arguments[1:] if word.startswith("-")}
            assert used <= options, f"`{shlex.join(words)}`: no such option as {used - options}"
        elif program == "-m":
            assert find_spec(arguments[0]) is not None, f"`{shlex.join(words)}`: there is no module {arguments[0]}"
        else:
            assert (ROOT / program).exists(), f"`{shlex.join(words)}`: there is no {program}"


def test_named_options_of_tune_exist() -> None:
    known = {name for parameter in subcommand("tune").params for name in parameter.opts}
    section = README.partition("## Tune for your machine")[2].partition("\n## ")[0]
    assert set(re.findall(r"`(--[a-z-]+)`", section)) <= known


def test_named_problems_are_understood() -> None:
    named = [
        words[place + 1]
        for words in commands()
        for place, word in enumerate(words)
        if word == "--problem" and words[0] == "tvmdcn"
    ]
    assert named
    for text in named:
        parse_problem(text)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if not target.startswith("https://"):
            assert (ROOT / page).parent.joinpath(target).exists(), f"{page} links to {target}"


def test_table_of_settings_is_complete() -> None:
    table = README.partition("## Settings")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| (.*) \| (.*) \| (.*) \|$", table, re.MULTILINE)
    assert rows == [(setting.name, setting.kind, setting.default, setting.doc) for setting in env.SETTINGS.values()]


def test_pinned_versions_are_those_of_the_package() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for name in ("apache-tvm", "apache-tvm-ffi"):
        (pin,) = re.findall(rf'"{name}==([^"]+)"', project)
        assert re.search(rf"^\| {name} \| exactly {re.escape(pin)}\b", README, re.MULTILINE)


def test_benchmark_table_has_its_place() -> None:
    assert re.search(r"^<!-- benchmark:begin .*-->$.*^<!-- benchmark:end -->$", README, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("script", ["scripts/test", "scripts/demo", "scripts/environment.sh", ".ci/run"])
def test_scripts_are_valid_shell(script: str) -> None:
    shell = "bash" if script == ".ci/run" else "sh"
    done = subprocess.run([shell, "-n", ROOT / script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert script.endswith(".sh") or (ROOT / script).stat().st_mode & 0o111, f"{script} is not executable"


def test_scripts_refuse_an_old_python_in_words(tmp_path: Path) -> None:
    old = tmp_path / "python3"
    old.write_text('#!/bin/sh\ncase "$2" in *print*) echo 3.8;; *) exit 1;; esac\n', encoding="utf-8")
    old.chmod(0o755)
    for script in ("scripts/test", "scripts/demo"):
        done = subprocess.run(
            [ROOT / script],
            env={"PATH": "/usr/bin:/bin", "PYTHON": str(old)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert done.returncode == 1
        assert "is Python 3.8" in done.stderr
        assert "3.11 or newer" in done.stderr
