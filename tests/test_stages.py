# SPDX-License-Identifier: Apache-2.0
"""Where the time goes: programs with switches compute what the shipped ones do, and times become shares that add up."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from tvmdcn.bench import stages
from tvmdcn.bench.breakdown import KIND, Breakdown
from tvmdcn.bench.rows import append_row, read_row_file
from tvmdcn.bench.schema import MeasurementError
from tvmdcn.bench.stages import SwitchedKernel, measure_stages, stages_command
from tvmdcn.bench.switches import STAGES, switched_program
from tvmdcn.builder import build, naive_schedule, new_schedule
from tvmdcn.cli import main
from tvmdcn.errors import BuildError
from tvmdcn.problems import Problem
from tvmdcn.report.stages import section
from tvmdcn.space import Decisions, space_of
from tvmdcn.spec import DeformConv2dGradSpec, DeformConv2dSpec, Extents
from tvmdcn.target import detect_target
from tvmdcn.te import operator_of

FORWARD = tuple(STAGES[DeformConv2dSpec.operator])
LAYER = DeformConv2dSpec(24, 32, padding=1, offset_groups=2)
DEPTHWISE = DeformConv2dSpec(16, 16, groups=16, padding=1, layout="NHWC", mask=False)
EXTENTS = Extents(2, 7, 9)


@pytest.fixture(autouse=True)
def _own_cache(cache_dir: Path) -> None:
    pass


def scheduled(spec: DeformConv2dSpec, variant: str | None = None) -> Any:
    target = detect_target()
    sch = new_schedule(spec, target)
    decisions = None if variant is None else Decisions(variant, {})
    space_of(spec.operator, target.kind).schedule(sch, spec, target, decisions)
    return sch.mod[spec.operator]


# --- switches ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["full-2-unit", "split-2-tap"])
def test_every_block_stands_behind_the_switch_of_its_stage(variant: str) -> None:
    program = switched_program(scheduled(LAYER, variant), LAYER.operator)
    assert program.stages == FORWARD
    text = program.function.script()
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    blocks = [index for index, line in enumerate(lines) if "T.sblock(" in line and "root" not in line]
    indents = {index: len(line) - len(line.lstrip()) for index, line in enumerate(text.splitlines()) if line.strip()}
    originals = [index for index, line in enumerate(text.splitlines()) if line.strip()]
    for index in blocks:
        depth = indents[originals[index]]
        guards = []
        for before in range(index - 1, -1, -1):
            if indents[originals[before]] < depth:
                depth = indents[originals[before]]
                if "stage_switches[" in lines[before]:
                    guards.append(int(lines[before].split("stage_switches[")[1].split(",")[0]))
        assert len(guards) == 1, lines[index]
        name = lines[index].split('"')[1]
        stage = program.stages[guards[0]]
        assert any(name == block or name.startswith(block + "_") for block in STAGES[LAYER.operator][stage]), name


def test_switches_are_read_at_the_number_of_the_loop_around_them() -> None:
    text = switched_program(scheduled(LAYER), LAYER.operator).function.script()
    read = [line.split("stage_switches[")[1].split("]")[0] for line in text.splitlines() if "if stage_switches" in line]
    assert "0, 0" in read, "the layout has no loop around it"
    inside = [place for place in read if "%" in place]
    assert len(inside) >= 4, "and all others have: the compiler must not take two switches for one"


def test_stages_that_read_places_need_the_plan() -> None:
    program = switched_program(scheduled(LAYER), LAYER.operator)
    assert program.needs == {stage: frozenset({"plan"} if stage == "sampling" else ()) for stage in FORWARD}
    assert program.orders() == (list(FORWARD), ["epilogue", "product", "plan", "sampling", "layout"])
    gradients = DeformConv2dGradSpec.of(LAYER)
    program = switched_program(scheduled(gradients), gradients.operator)
    assert program.needs["samples"] == program.needs["layout"] == {"plan"}, "rows are copied as far as places lead"
    assert not any(needed for stage, needed in program.needs.items() if stage not in ("samples", "layout"))
    depthwise = switched_program(scheduled(DEPTHWISE), DEPTHWISE.operator)
    assert depthwise.stages == ("plan", "product", "epilogue"), "sampled while it is multiplied; no layout in NHWC"
    assert depthwise.orders()[1] == ["epilogue", "plan", "product"]


def test_the_plainest_schedule_has_switches_too() -> None:
    program = switched_program(naive_schedule(LAYER, detect_target()).mod[LAYER.operator], LAYER.operator)
    assert program.stages == FORWARD


def test_what_is_not_known_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    function = scheduled(LAYER)
    with pytest.raises(BuildError, match=r"the stages of attention are not known: add its blocks to .*STAGES"):
        switched_program(function, "attention")
    monkeypatch.setitem(STAGES, LAYER.operator, {k: v for k, v in STAGES[LAYER.operator].items() if k != "epilogue"})
    with pytest.raises(BuildError, match=r"block output belongs to no stage of deform_conv2d"):
        switched_program(function, LAYER.operator)


@pytest.fixture(scope="module")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cache")
    path.chmod(0o700)
    return path


def kernel_of(spec: DeformConv2dSpec, cache: Path, threads: int = 1, extents: Extents = EXTENTS) -> SwitchedKernel:
    artifact = build(spec, None, "default", cache)
    return SwitchedKernel(artifact, operator_of(spec).tensors(spec, extents), threads)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("spec", [LAYER, DEPTHWISE, DeformConv2dGradSpec.of(LAYER)], ids=lambda spec: spec.slug)
def test_all_stages_together_give_the_shipped_results(spec: DeformConv2dSpec, threads: int, shared_cache: Path) -> None:
    kernel = kernel_of(spec, shared_cache, threads)
    assert kernel.same_results()
    for order in kernel.program.orders():  # every setting that is measured can run
        for end in range(len(order) + 1):
            kernel.switch(order[:end])
            kernel.run()
    assert kernel.same_results(), "and leaves nothing behind"


def test_a_stage_that_is_off_does_nothing(shared_cache: Path) -> None:
    # In a thread of its own: the runtime pools memory by thread, and what other tests left in a pool may be handed out
    # for one buffer in one call and for another in the next.
    with ThreadPoolExecutor(1) as thread:
        thread.submit(_check_switches, shared_cache).result()


def _check_switches(cache: Path) -> None:
    # So large that the runtime's pool cannot mistake the memory of one buffer for another's.
    kernel = kernel_of(LAYER, cache, extents=Extents(1, 40, 50))
    (output,) = kernel.outputs.values()
    kernel.switch(kernel.stages)
    kernel.run()
    whole = output.copy()
    output[...] = np.nan
    kernel.switch(())
    kernel.run()
    assert np.isnan(output).all()
    kernel.switch(set(FORWARD) - {"epilogue"})
    kernel.run()
    assert np.isnan(output).all()
    # The kernel's copy of the image is that of the call before, whatever the image is now.
    image = kernel._kept[2]["input"]
    image *= -1
    kernel.switch(set(FORWARD) - {"layout"})
    kernel.run()
    np.testing.assert_array_equal(output, whole)
    kernel.switch(FORWARD)
    kernel.run()
    assert not np.allclose(output, whole)


def test_a_stage_without_its_places_is_refused(shared_cache: Path) -> None:
    kernel = kernel_of(LAYER, shared_cache)
    with pytest.raises(BuildError, match="stage sampling cannot run without plan"):
        kernel.switch(["layout", "sampling"])


def test_images_smaller_than_a_unit_are_refused(shared_cache: Path) -> None:
    with pytest.raises(BuildError, match="fewer than 24 output pixels is not taken apart"):
        kernel_of(LAYER, shared_cache, extents=Extents(1, 3, 4))


def test_other_results_are_no_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SwitchedKernel, "same_results", lambda self: False)
    with pytest.raises(BuildError, match="with switches the results are others"):
        measure_stages(Problem("small", LAYER, EXTENTS, "test"), "default", rounds=1)


# --- from times to shares ----------------------------------------------------------------------------------

ORDERS = (FORWARD, ("epilogue", "product", "plan", "sampling", "layout"))


def row(times: Mapping[frozenset[str], Iterable[float]], shipped: Iterable[float], **changed: Any) -> dict[str, Any]:
    return {
        "schema": 3,
        "kind": KIND,
        "run": "a",
        "device": "cpu",
        "threads": 1,
        "affinity": [0],
        "machine": {"cpu": "a processor", "target": "llvm-a"},
        "versions": {"python": "3.11"},
        "commit": None,
        "date": "2026-11-22T10:00:00+00:00",
        "command": "tvmdcn stages",
        "status": "ok",
        "reason": None,
        "note": None,
        "provider": "ours-tuned",
        "role": "ours",
        "problem": "layer",
        "spec": LAYER.to_json(),
        "extents": {"batch": 1, "height": 8, "width": 8},
        "schedule": "tuned",
        "decisions": None,
        "artifact": "x",
        "stages": list(FORWARD),
        "orders": [list(order) for order in ORDERS],
        "settings": [{"on": sorted(on), "turns_ms": list(turns)} for on, turns in times.items()],
        "shipped_ms": list(shipped),
        "runs": 100,
        **changed,
    }


def settings() -> list[frozenset[str]]:
    return list({frozenset(order[:end]): None for order in ORDERS for end in range(len(order) + 1)})


COSTS = {"layout": 1.0, "plan": 0.5, "sampling": 2.0, "product": 6.0, "epilogue": 0.25}


def test_costs_that_add_up_are_found_exactly() -> None:
    times = {on: [0.125 + sum(COSTS[stage] for stage in on)] * 5 for on in settings()}
    found = Breakdown.of(row(times, [10.0] * 5))
    assert [stage.name for stage in found.stages] == list(FORWARD)
    for stage in found.stages:
        expected = COSTS[stage.name]
        assert (stage.running_ms, stage.reverse_ms, stage.ms) == (expected,) * 3
        assert (stage.low_ms, stage.high_ms) == (expected, expected)
    assert (found.rest_ms, found.whole_ms, found.shipped_ms) == (0.125, 9.875, 10.0)
    assert found.overhead == 0.9875


def test_stages_that_overlap_show_both_orders() -> None:
    def time(on: frozenset[str]) -> float:
        # What the product waits for, the epilogue does meanwhile: together they save 0.2.
        return 0.1 + sum(COSTS[stage] for stage in on) - (0.2 if {"product", "epilogue"} <= on else 0)

    found = {
        stage.name: stage for stage in Breakdown.of(row({on: [time(on)] * 3 for on in settings()}, [9] * 3)).stages
    }
    assert found["epilogue"].running_ms == pytest.approx(0.05)
    assert found["epilogue"].reverse_ms == pytest.approx(0.25)
    assert found["product"].running_ms == pytest.approx(6.0)
    assert found["product"].reverse_ms == pytest.approx(5.8)
    assert found["product"].ms == pytest.approx(5.9)
    assert (found["epilogue"].low_ms, found["epilogue"].high_ms) == pytest.approx((0.05, 0.25))
    assert found["plan"].ms == pytest.approx(0.5)


def test_parts_add_up_whatever_was_measured() -> None:
    random = np.random.default_rng(0)
    for _ in range(20):
        times = {on: random.uniform(0.5, 3, 7) for on in settings()}
        found = Breakdown.of(row(times, random.uniform(1, 2, 7)))
        assert sum(stage.ms for stage in found.stages) + found.rest_ms == pytest.approx(found.whole_ms, abs=1e-12)
        for stage in found.stages:
            assert stage.low_ms <= min(stage.running_ms, stage.reverse_ms)
            assert stage.high_ms >= max(stage.running_ms, stage.reverse_ms)


def test_noise_widens_the_range_and_a_shared_disturbance_does_not() -> None:
    random = np.random.default_rng(1)
    base = {on: 1 + sum(COSTS[stage] for stage in on) for on in settings()}
    own = Breakdown.of(row({on: t + random.normal(0, 0.1, 15) for on, t in base.items()}, [9] * 15))
    disturbed = 1 + random.normal(0, 0.1, 15)
    shared = Breakdown.of(row({on: t + disturbed for on, t in base.items()}, [9] * 15))
    for noisy, paired in zip(own.stages, shared.stages, strict=True):
        assert noisy.low_ms <= COSTS[noisy.name] <= noisy.high_ms
        assert noisy.high_ms - noisy.low_ms > 0.05
        assert paired.high_ms - paired.low_ms < 1e-9, "all settings of a turn were disturbed alike"


GOOD = row({on: [1.0 + len(on)] * 3 for on in settings()}, [6.0] * 3)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"stages": None}, "TypeError"),
        ({"spec": {}}, "a row of stages cannot be read"),
        ({"settings": GOOD["settings"][1:]}, "settings lacks the one with"),
        ({"settings": [{**s, "turns_ms": [1.0]} for s in GOOD["settings"]]}, "as many turns as the shipped kernel"),
        ({"shipped_ms": []}, "turns must be positive times"),
        ({"shipped_ms": [1.0, -1.0, 1.0]}, "turns must be positive times"),
        ({"shipped_ms": [1.0, float("nan"), 1.0]}, "turns must be positive times"),
        ({"orders": [list(FORWARD)]}, "orders must be two orders of the stages"),
        ({"orders": [list(FORWARD), list(FORWARD)[:-1]]}, "orders must be two orders of the stages"),
    ],
)
def test_rows_that_are_none_are_refused(changed: dict[str, Any], message: str) -> None:
    Breakdown.of(GOOD)
    with pytest.raises(MeasurementError, match=message):
        Breakdown.of({**GOOD, **changed})
    for name in ("stages", "orders", "settings", "shipped_ms", "spec", "problem", "machine"):
        with pytest.raises(MeasurementError, match=name):
            Breakdown.of({key: value for key, value in GOOD.items() if key != name})


# --- the command -------------------------------------------------------------------------------------------


def test_command_writes_rows_that_reports_read(tmp_path: Path) -> None:
    output = tmp_path / "rows.jsonl"
    arguments = ["stages", "--problem", "1,16,6,7,16", "--operator", "all", "--rounds", "2", "--output", str(output)]
    result = CliRunner().invoke(main, [*arguments, "--schedule", "default"])
    assert result.exit_code == 0, result.output
    assert "1,16,6,7,16: " in result.output
    assert "product" in result.output
    found = read_row_file(output)
    assert found.complaints == []
    forward, backward = (Breakdown.of(line) for line in found.others)
    assert (forward.direction, backward.direction) == ("forward", "backward")
    assert [stage.name for stage in forward.stages] == list(FORWARD)
    assert [stage.name for stage in backward.stages] == list(STAGES[DeformConv2dGradSpec.operator])
    for breakdown in (forward, backward):
        parts = sum(stage.ms for stage in breakdown.stages) + breakdown.rest_ms
        assert parts == pytest.approx(breakdown.whole_ms)
        assert 0 < breakdown.rest_ms < breakdown.whole_ms
    assert all(len(setting["turns_ms"]) == 2 for line in found.others for setting in line["settings"])
    shown = section(found.others)
    assert shown is not None
    assert "1,16,6,7,16 backward" in shown.html


def test_a_layer_that_cannot_be_taken_apart_does_not_stop_the_others(tmp_path: Path) -> None:
    output = tmp_path / "rows.jsonl"
    arguments = ["--problem", "1,16,2,2,16", "--problem", "1,16,6,7,16", "--rounds", "1", "--output", str(output)]
    result = CliRunner().invoke(stages_command, [*arguments, "--schedule", "default"])
    assert result.exit_code == 1
    assert "fewer than 24 output pixels" in result.output
    failed, measured = read_row_file(output).others
    assert (failed["status"], measured["status"]) == ("failed", "ok")
    assert "fewer than 24" in failed["reason"]


def test_settings_that_are_measured_are_the_beginnings_of_both_orders() -> None:
    program = switched_program(scheduled(LAYER), LAYER.operator)
    found = [frozenset(on) for on in stages._settings(program)]
    expected = {frozenset(order[:end]) for order in ORDERS for end in range(6)}
    assert set(found) == expected
    assert len(found) == len(expected) == 10


def test_layers_are_asked_for_by_name() -> None:
    result = CliRunner().invoke(stages_command, ["--problem", "nonsense"])
    assert result.exit_code != 0


# --- the report --------------------------------------------------------------------------------------------


def test_section_shows_every_layer_and_stage() -> None:
    times = {on: [0.125 + sum(COSTS[stage] for stage in on)] * 3 for on in settings()}
    rows = [row(times, [10.0] * 3), row(times, [10.0] * 3, problem="<b>other</b>")]
    found = section([*rows, {"kind": "roof"}])
    assert found is not None
    assert (found.anchor, found.notes) == ("stages", [])
    assert "<b>other" not in found.html
    assert "product in 2" in found.html
    records = found.numbers[0].records()
    assert len(records) == 2 * len(FORWARD)
    assert {record["stage"]: record["mean_ms"] for record in records} == COSTS
    assert "| layer | 10.0 | 1 (10 %) | 0.5 (5 %) | 2 (20 %) | 6 (61 %) | 0.25 (3 %) | 0.125 |" in found.markdown
    charted = found.html.split('<script type="application/json">')[1].split("</script>")[0]
    values = json.loads(charted)
    (data,) = (
        (rows for name, rows in values["datasets"].items()) if "datasets" in values else (values["data"]["values"],)
    )
    shares = [value["share"] for value in data if value["layer"] == "layer"]
    assert sum(shares) == pytest.approx(1)
    assert max(value["ms"] for value in data) == 6.0


def test_the_latest_of_equal_rows_is_shown_and_places_stay_apart() -> None:
    times = {on: [1.0 + len(on)] * 3 for on in settings()}
    old = row({on: [2 * t for t in turns] for on, turns in times.items()}, [9] * 3)
    new = row(times, [6] * 3, date="2026-11-23T10:00:00+00:00")
    threads, machine = row(times, [6] * 3, threads=2), row(times, [6] * 3, machine={"cpu": "another"})
    for order in itertools.permutations([old, new, threads, machine], 4):
        found = section(order)
        assert found is not None
        assert len(found.numbers[0].rows) == 3 * len(FORWARD)
        assert max(record["with_switches_ms"] for record in found.numbers[0].records()) == 6.0
    assert found.html.count("<figure") == 3


def test_schedules_of_one_layer_are_told_apart() -> None:
    times = {on: [1.0 + len(on)] * 3 for on in settings()}
    found = section([row(times, [6] * 3), row(times, [6] * 3, schedule="default")])
    assert found is not None
    assert "layer, tuned" in found.html
    assert "layer, default" in found.html


def test_broken_and_failed_rows_are_told() -> None:
    failed = row({}, [], status="failed", reason="no compiler <i>here</i>")
    found = section([failed, row({}, [1.0]), GOOD])
    assert found is not None
    assert "no compiler &lt;i&gt;here&lt;/i&gt;" in found.html
    assert len(found.notes) == 1
    assert "settings lacks" in found.notes[0]
    only = section([failed])
    assert only is not None
    assert "no compiler" in only.markdown
    assert section([{"kind": "roof"}]) is None


def test_rows_survive_a_file(tmp_path: Path) -> None:
    append_row(tmp_path / "rows.jsonl", GOOD)
    (found,) = read_row_file(tmp_path / "rows.jsonl").others
    assert Breakdown.of(found) == Breakdown.of(GOOD)
