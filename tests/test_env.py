# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from tvmdcn import env
from tvmdcn.errors import SettingError, TvmdcnError

READERS = {
    "TVMDCN_CACHE_DIR": env.cache_dir,
    "TVMDCN_BUILD": env.build_mode,
    "TVMDCN_NUM_THREADS": env.num_threads,
    "TVMDCN_RECORDS": env.records_dir,
    "TVMDCN_LOCK_TIMEOUT": env.lock_timeout,
    "TVMDCN_TARGET": env.target,
    "TVMDCN_THREAD_POOL": env.thread_pool,
    "TVMDCN_PACK": env.packs,
}


@pytest.fixture(autouse=True)
def _empty_environment(monkeypatch):
    for name in READERS:
        monkeypatch.delenv(name, raising=False)


def test_every_setting_has_a_reader_and_a_line_of_text():
    assert set(env.SETTINGS) == set(READERS)
    for name, setting in env.SETTINGS.items():
        assert setting.name == name
        assert setting.kind
        assert setting.default
        assert setting.doc.endswith(".")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("TVMDCN_BUILD", "auto"),
        ("TVMDCN_NUM_THREADS", None),
        ("TVMDCN_RECORDS", None),
        ("TVMDCN_LOCK_TIMEOUT", 600.0),
        ("TVMDCN_TARGET", None),
        ("TVMDCN_THREAD_POOL", "auto"),
    ],
)
def test_defaults(monkeypatch, name, expected):
    assert READERS[name]() == expected
    monkeypatch.setenv(name, "")
    assert READERS[name]() == expected


def test_default_cache_dir_is_absolute_and_not_created(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = env.cache_dir()
    assert folder.is_absolute()
    assert folder.is_relative_to(tmp_path)
    assert "tvmdcn" in folder.name
    assert not folder.exists()


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("TVMDCN_BUILD", "never", "never"),
        ("TVMDCN_BUILD", "rebuild", "rebuild"),
        ("TVMDCN_NUM_THREADS", "1", 1),
        ("TVMDCN_NUM_THREADS", "64", 64),
        ("TVMDCN_LOCK_TIMEOUT", "0", 0.0),
        ("TVMDCN_LOCK_TIMEOUT", "2.5", 2.5),
        ("TVMDCN_TARGET", "llvm-x86-64-v3", "llvm-x86-64-v3"),
    ],
)
def test_values(monkeypatch, name, value, expected):
    monkeypatch.setenv(name, value)
    assert READERS[name]() == expected


def test_directories_become_absolute(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TVMDCN_CACHE_DIR", "kernels")
    assert env.cache_dir() == tmp_path / "kernels"
    monkeypatch.setenv("TVMDCN_CACHE_DIR", "~/kernels")
    assert env.cache_dir() == tmp_path / "kernels"
    (tmp_path / "records").mkdir()
    monkeypatch.setenv("TVMDCN_RECORDS", "records")
    assert env.records_dir() == tmp_path / "records"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TVMDCN_BUILD", "always"),
        ("TVMDCN_BUILD", "Never"),
        ("TVMDCN_NUM_THREADS", "0"),
        ("TVMDCN_NUM_THREADS", "-1"),
        ("TVMDCN_NUM_THREADS", "two"),
        ("TVMDCN_NUM_THREADS", "1.5"),
        ("TVMDCN_NUM_THREADS", " 2"),
        ("TVMDCN_NUM_THREADS", "1_0"),
        ("TVMDCN_NUM_THREADS", "٢"),
        ("TVMDCN_NUM_THREADS", "1000000"),
        ("TVMDCN_THREAD_POOL", "openmp"),
        ("TVMDCN_LOCK_TIMEOUT", "-1"),
        ("TVMDCN_LOCK_TIMEOUT", "nan"),
        ("TVMDCN_LOCK_TIMEOUT", "inf"),
        ("TVMDCN_LOCK_TIMEOUT", "5 minutes"),
        ("TVMDCN_RECORDS", "~no_such_user_of_this_machine/records"),
        ("TVMDCN_PACK", "~no_such_user_of_this_machine/pack"),
    ],
)
def test_refuses_with_name_value_and_what_it_may_be(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    expected = f"{re.escape(name)}={re.escape(repr(value))} .*must be {re.escape(env.SETTINGS[name].kind)}"
    with pytest.raises(SettingError, match=expected) as caught:
        READERS[name]()
    assert isinstance(caught.value, (TvmdcnError, ValueError))
    assert "unset it" in str(caught.value)


def test_refuses_what_is_no_directory(monkeypatch, tmp_path):
    file = tmp_path / "file"
    file.touch()
    for name in ("TVMDCN_CACHE_DIR", "TVMDCN_RECORDS", "TVMDCN_PACK"):
        monkeypatch.setenv(name, str(file))
        with pytest.raises(SettingError, match=f"{name}=.*is not a directory"):
            READERS[name]()
    monkeypatch.setenv("TVMDCN_RECORDS", str(tmp_path / "missing"))
    with pytest.raises(SettingError, match="does not exist"):
        env.records_dir()


def test_several_packs_may_be_named(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("TVMDCN_PACK", os.pathsep.join(["one", "", str(tmp_path / "two")]))
    assert env.packs() == (tmp_path / "one", tmp_path / "two")
    monkeypatch.setenv("TVMDCN_PACK", os.pathsep.join(["one", "three"]))
    with pytest.raises(SettingError, match=r"TVMDCN_PACK='three' is not a directory"):
        env.packs()


def test_finds_misspelt_names():
    environ = {"TVMDCN_NUM_THREAD": "2", "TVMDCN_BUILD": "auto", "PATH": "", "TVMDCN_ZZZ": "1"}
    assert env.unknown_names(environ) == {"TVMDCN_NUM_THREAD": "TVMDCN_NUM_THREADS", "TVMDCN_ZZZ": None}


def test_no_other_module_reads_a_setting():
    package = Path(env.__file__).parent
    # Handing the environment, and the import path in it, on to a child process reads no setting.
    handed_on = re.compile(r"\*\*os\.environ\b|os\.environ\.get\(\"PYTHONPATH\"\)")
    reading = re.compile(r"\bos\.environ\b|\bgetenv\b|from os import .*environ")
    readers = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if reading.search(handed_on.sub("", path.read_text(encoding="utf-8")))
    }
    assert readers == {"env.py"}
