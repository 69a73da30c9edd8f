# SPDX-License-Identifier: Apache-2.0
"""What all tests share: where optional data lies, a cache of their own, hypothesis' settings."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import hypothesis
import pytest

# A build inside an example can take seconds on a busy machine: a time limit per example would only be noise.
hypothesis.settings.register_profile("tests", deadline=None, print_blob=True)
hypothesis.settings.load_profile("tests")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--every-schedule", action="store_true", help="all dtypes, layouts and GPUs of test_cuda_named_layers.py"
    )


@pytest.fixture(scope="session")
def shared_folder() -> Path:
    """The folder of data too large for the repository: TVMDCN_SHARED, else `../shared` of the checkout."""
    default = Path(__file__).resolve().parents[2] / "shared"
    folder = Path(os.environ.get("TVMDCN_SHARED") or default)
    if not folder.is_dir():
        if os.environ.get("TVMDCN_SHARED"):
            pytest.fail(f"TVMDCN_SHARED={folder} is no directory")
        pytest.skip(f"no shared folder at {folder}; name one in TVMDCN_SHARED")
    return folder


@pytest.fixture(scope="session")
def real_layers_folder(shared_folder: Path) -> Path:
    """The folder of `.npz` files that `tvmdcn.problems.real_layer` reads."""
    folder = shared_folder / "real_layers"
    if not folder.is_dir():
        pytest.skip(f"no real layers at {folder}")
    return folder


@pytest.fixture(scope="session", autouse=True)
def session_cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Keep every test away from the user's cache: kernels built by the tests are shared among them only."""
    folder = tmp_path_factory.mktemp("session-cache")
    folder.chmod(0o700)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TVMDCN_CACHE_DIR", str(folder))
        yield folder


@pytest.fixture(scope="session")
def compilers(session_cache_dir: Path) -> Iterator[ProcessPoolExecutor]:
    """Two processes that compile beside one another; TVM holds Python's lock while it compiles."""
    pool = ProcessPoolExecutor(2, multiprocessing.get_context("spawn"))
    yield pool
    pool.shutdown(cancel_futures=True)


@pytest.fixture
def cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache for one test."""
    folder = tmp_path / "cache"
    folder.mkdir(mode=0o700)
    monkeypatch.setenv("TVMDCN_CACHE_DIR", str(folder))
    return folder


@pytest.fixture
def no_packs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Begin, and leave, with no packs known to the process."""
    import packing

    from tvmdcn import native

    monkeypatch.delenv("TVMDCN_PACK", raising=False)
    monkeypatch.setattr(native, "_provided", {})
    packing.forget()
    yield
    packing.forget()


@pytest.fixture
def packer(cache_dir: Path, no_packs: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    """What packs kernels written by hand, into `tmp_path`."""
    import packing

    return packing.packs_kernels(monkeypatch, tmp_path)


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Cheap providers instead of those that the benchmark's command knows."""
    from bench_fakes import fake

    from tvmdcn.bench import command

    chosen = (
        fake("right", "ours", "gradients"),
        fake("noisy"),
        fake("floor", "floor", "floor"),
        fake("unsupported"),
    )
    table = {provider.name: provider for provider in chosen}
    monkeypatch.setattr(command, "PROVIDERS", table)
    return table
