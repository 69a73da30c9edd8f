# SPDX-License-Identifier: Apache-2.0
"""The study of warm starts: what it counts, and that a schedule is measured once for all of its searches."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from click.testing import CliRunner

pytest.importorskip("xgboost")
pytest.importorskip("cloudpickle")

from tvmdcn.builder import new_schedule
from tvmdcn.cache_key import source_digest
from tvmdcn.problems import parse_problem
from tvmdcn.space import Decisions, space_of
from tvmdcn.target import detect_target
from tvmdcn.tuning.warm_start import similar_decisions

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "warm_start_study.py"
LAYER = "1,8,6,7,8"


@pytest.fixture(scope="module")
def study() -> ModuleType:
    spec = importlib.util.spec_from_file_location("warm_start_study", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_trials_are_counted_until_the_goal_is_reached(study: ModuleType) -> None:
    assert study.trials_until([None, 3.0, 4.0, 2.0], 3.0) == 2
    assert study.trials_until([None, 3.0, 4.0, 2.0], 2.5) == 4
    assert study.trials_until([None, 3.0], 2.5) is None


def test_rows_compare_with_the_best_of_all_searches(study: ModuleType) -> None:
    searches = {
        (0, 0): [2.0, 1.5, 1.04, 1.0],
        (0, 1): [2.0, 1.5, 1.5, 1.2],
        (4, 0): [2.0, 1.0, None, 1.3],
        (4, 1): [2.0, 1.03, 1.005, 1.3],
    }
    assert list(study.rows_of("a", searches)) == [
        ["a", 0, "1000.000", "50 %", "3, -", "4, -"],
        ["a", 4, "1000.000", "50 %", "2, 2", "2, 3"],
    ]


def test_what_is_known_is_not_measured_again(study: ModuleType, tmp_path: Path) -> None:
    problem, target = parse_problem(LAYER), detect_target()
    space, known = space_of(problem.spec.operator, target.kind), []
    starts = similar_decisions(problem.spec, target, 1, 2, own=False)
    for wish in [*(Decisions(variant, {}) for variant in space.variants(problem.spec, target)), *starts]:
        made = space.schedule(new_schedule(problem.spec, target), problem.spec, target, wish)
        known.append(json.dumps(made.to_json(), sort_keys=True))
    times = tmp_path / target.tag / f"{LAYER}-{source_digest()[:8]}.times"
    times.parent.mkdir()
    lines = [
        json.dumps({"decisions": text, "seconds": [(9 - place) * 1e-3], "error": 0.0, "reason": ""})
        for place, text in enumerate(known)
    ]
    times.write_text("\n".join(lines) + "\n")
    before = times.read_bytes()
    options = ["--problem", LAYER, "--trials", "2", "--warm-starts", "0", "--warm-starts", "2", "--seed", "0"]
    found = CliRunner().invoke(study.main, [*options, "--folder", str(tmp_path)])
    assert found.exit_code == 0, found.output
    assert times.read_bytes() == before
    table = [line for line in found.stdout.splitlines() if line.startswith(f"| {LAYER} ")]
    assert [line.split(" | ")[1] for line in table] == ["0", "2"]
    # Without time for anything it says so, and what is there counts the next time.
    late = CliRunner().invoke(study.main, [*options, "--seed", "1", "--folder", str(tmp_path), "--time-budget", "0"])
    assert (late.exit_code, "run the same command again" in late.output) == (3, True)
