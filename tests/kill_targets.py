# SPDX-License-Identifier: Apache-2.0
"""A process that is to be killed, again and again: what tests/test_faults_kill.py starts.

It imports the compiler once, and forks for each attempt: a child does the work and is killed at a random moment,
the parent looks at what is left. One line of JSON per attempt goes to the standard output.
"""

from __future__ import annotations

import importlib
import itertools
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tvmdcn import builder
from tvmdcn.artifact import find
from tvmdcn.cache_key import CacheKey
from tvmdcn.packs.pack import KernelPack
from tvmdcn.packs.writer import build_pack
from tvmdcn.space import Decisions
from tvmdcn.spec import DeformConv2dSpec, Extents
from tvmdcn.target import detect_target
from tvmdcn.tuning import tuner
from tvmdcn.tuning.history import read_log
from tvmdcn.tuning.records import TuningRecords
from tvmdcn.tuning.trial import TOLERANCE, Job, Outcome, build_trial, measure_trials

SPEC = DeformConv2dSpec(4, 4, 1)
# With more to try than there is time for.
TUNED, SIZE = DeformConv2dSpec(32, 32, 1), Extents(1, 6, 6)
_WANTED = 200  # trials


def forked(
    work: Callable[[Callable[[str], None]], None], delay: float, words: int = 0
) -> tuple[list[str], bool, float]:
    """Run something in a child, and kill it a moment after it has said so many words.

    Returns
    -------
    all its words, whether it had ended before, its time in seconds
    """
    reader, writer = os.pipe()
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        os.close(reader)
        status = 1
        try:
            work(lambda word: os.write(writer, f"{word}\n".encode()) and None)
            status = 0
        finally:
            os._exit(status)
    os.close(writer)
    said = b""
    while said.count(b"\n") < words and (part := os.read(reader, 4096)):
        said += part
    begin, status = time.monotonic(), None
    while time.monotonic() < begin + delay and status is None:
        done, found = os.waitpid(child, os.WNOHANG)
        status = found if done else None
        time.sleep(0.001)
    if status is None:
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    spent = time.monotonic() - start
    with open(reader, "rb") as rest:
        said += rest.read()
    assert status in (0, signal.SIGKILL), f"the child ended with status {status}"
    return said.decode().splitlines(), status == 0, spent


def delays(attempts: int, longest: float) -> Iterator[float]:
    """Iterate over moments spread over a time, in a random order."""
    rng = random.Random(attempts)
    places = [(number + rng.random()) / attempts * longest for number in range(attempts)]
    rng.shuffle(places)
    return iter(places)


def attempts(
    work: Callable[[Callable[[str], None]], None], look: Callable[[Sequence[str], bool], dict[str, Any]], count: int
) -> None:
    """Kill and look, `count` times over; the first, which is not killed, tells how long it takes."""
    words, ended, longest = forked(work, 60)
    print(json.dumps({"killed": False, "ended": ended, **look(words, ended)}), flush=True)
    for delay in delays(count, longest):
        words, ended, _ = forked(work, delay)
        print(json.dumps({"killed": not ended, "ended": ended, "delay": delay, **look(words, ended)}), flush=True)


# --- building -----------------------------------------------------------------------------------------------


def build(root: Path, count: int) -> None:
    """Build an artifact over one that is there."""
    key, turns = CacheKey.of(SPEC, detect_target(), "naive"), itertools.count()

    def work(say: Callable[[str], None]) -> None:
        builder.build(SPEC, schedule="naive", cache_dir=root, rebuild=True)

    def look(words: Sequence[str], ended: bool) -> dict[str, Any]:
        found = find(key, root)
        if found is not None:
            found.load()
        left = sorted(path.name for path in root.rglob("*") if "staging" in path.name)
        if next(turns) % 3 == 2 and found is not None:
            found.discard()  # and now and then there is none
        return {"found": found is not None, "left": len(left)}

    attempts(work, look, count)
    last = builder.build(SPEC, schedule="naive", cache_dir=root, rebuild=True)
    last.load()
    names = sorted(path.name for path in last.path.parent.iterdir())
    print(json.dumps({"files": names, "last": last.path.name}), flush=True)


def pack(root: Path, count: int) -> None:
    """Make a pack over one that is there; its kernels are built before."""
    place, cache = root / "dcn_pack", root / "cache"
    target = detect_target()

    def work(say: Callable[[str], None]) -> None:
        build_pack([SPEC], [target], place, version=f"1.{time.monotonic_ns()}", cache_dir=cache)

    def look(words: Sequence[str], ended: bool) -> dict[str, Any]:
        found = KernelPack.read(place)
        found.verify()
        found.load(SPEC)
        return {"found": True, "left": sum("staging" in path.name for path in root.iterdir())}

    build_pack([SPEC], [target], place, cache_dir=cache)
    attempts(work, look, count)
    build_pack([SPEC], [target], place, cache_dir=cache)
    print(json.dumps({"files": sorted(path.name for path in root.iterdir())}), flush=True)


# --- tuning -------------------------------------------------------------------------------------------------


class HereWorkers:
    """Builds and measures in this very process, so that a tuning begins at once."""

    def __init__(self, *arguments: Any) -> None:
        self._numbers = itertools.count()

    def __enter__(self) -> HereWorkers:
        return self

    def __exit__(self, *details: object) -> None:
        pass

    def trials(self, job: Job, candidates: Sequence[Decisions]) -> Iterator[tuple[int, Outcome]]:
        for place, decisions in enumerate(candidates):
            yield place, self._outcomes(job, [decisions], 1)[0]

    def compare(self, job: Job, candidates: Sequence[Decisions], rounds: int) -> list[Outcome]:
        return self._outcomes(job, candidates, rounds)

    def _outcomes(self, job: Job, candidates: Sequence[Decisions], rounds: int) -> list[Outcome]:
        names = [f"trial{next(self._numbers)}" for _ in candidates]
        for name, decisions in zip(names, candidates, strict=True):
            assert not build_trial(job.to_json(), decisions.to_json(), name)
        rows = measure_trials(job.to_json(), names, rounds)
        assert all(error < TOLERANCE[job.spec.dtype] for _, error in rows)
        return [Outcome(tuple(times), error) for times, error in rows]


def tune(root: Path, count: int, inside: bool) -> None:
    """Tune; `inside` one process, or with workers as a user has them."""
    importlib.import_module("xgboost")  # half a second, once
    if inside:
        tuner.Workers = HereWorkers  # type: ignore[misc,assignment]
    target = detect_target()
    before: list[Any] = []

    def work(say: Callable[[str], None]) -> None:
        options: dict[str, Any] = {"trials": _WANTED, "threads": 1, "records": root, "name": "layer"}
        told = [""]

        def tell(now: Any) -> None:
            told.append(f"{now.stage} {now.trials}")
            if told[-1] != told[-2]:  # on a busy machine the same is told more than once
                say(told[-1])

        result = tuner.tune(TUNED, SIZE, progress=tell, **options)
        say(f"kept {result.trials}")

    def look(words: Sequence[str], ended: bool) -> dict[str, Any]:
        told = [word.split() for word in words]
        said = max((int(number) for stage, number in told if stage == "measure"), default=0)
        first = next((int(number) for _, number in told), None)
        records = TuningRecords.read(root, target.tag).records
        logs = sorted(root.rglob("*.jsonl"))
        rows = [row.to_json() for row in read_log(logs[0])[1]] if logs else []
        lost = rows[: len(before)] != before
        was = len(before)
        before[:] = rows
        return {
            "said": said,
            "was": was,
            "rows": len(rows),
            "distinct": len({json.dumps(row["decisions"], sort_keys=True) for row in rows}),
            "lost": lost,
            "began": first,
            "records": len(records),
            "wrong": [row["reason"] for row in rows if row["reason"]],
        }

    rng = random.Random(count)
    for number in range(count):
        # While it begins, and after so many words: two for the begin of a round, one for each trial.
        said = 3 * number + 1 if not inside else 0 if number % 4 == 0 else rng.randrange(1, 7)
        words, ended, _ = forked(work, rng.random() * 0.6, said)
        print(json.dumps({"killed": not ended, **look(words, ended)}), flush=True)
    tuner.Workers = HereWorkers  # type: ignore[misc,assignment]
    result = tuner.tune(TUNED, SIZE, trials=len(before) + 1, threads=1, records=root, name="layer")
    print(json.dumps({"trials": result.trials, "new": result.new_trials, "was": len(before)}), flush=True)


if __name__ == "__main__":
    what, folder, number = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    {
        "build": build,
        "pack": pack,
        "tune": lambda root, count: tune(root, count, True),
        "tune with workers": lambda root, count: tune(root, count, False),
    }[what](folder, number)
