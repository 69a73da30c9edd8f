# SPDX-License-Identifier: Apache-2.0
"""Where schedules that are shown come from: artifacts of any version, records of any target, trials of a tuning."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tvmdcn.artifact import Artifact, artifacts
from tvmdcn.bench.measurement import Measurement
from tvmdcn.cache_key import source_digest
from tvmdcn.errors import BuildError, RecordsError, SpecError, TvmdcnError
from tvmdcn.problems import parse_problem
from tvmdcn.report.machine_code import MachineCode, disassemble
from tvmdcn.space import Decisions, space_of
from tvmdcn.spec import DeformConv2dSpec, spec_from_json
from tvmdcn.target import TargetInfo, resolve_target

__all__ = ["SchedulePair", "ScheduleView", "cached_pairs", "named_pair", "view_of"]

_log = logging.getLogger(__name__)

_SIDES = ("default", "tuned")
_SCHEDULES = ("tuned", "default", "naive")
_MANIFEST, _LIBRARY = "manifest.json", "kernel.so"
_CACHED = 12  # pairs that a report shows unasked
_LOOPS = 3  # innermost loops that are shown
_WORTH = 0.25  # of the work of the first
# Texts that a GPU's artifact may carry, in its manifest or beside its library.
_DEVICE_TEXTS = {"cuda": "CUDA source", "ptx": "PTX", "sass": "SASS"}


@dataclass(frozen=True)
class ScheduleView:
    """One schedule as it is shown.

    Parameters
    ----------
    title : str
        What tells it from the other.
    facts : mapping of str to str
        What it is a schedule of, for what, from where, made by what.
    decisions : mapping of str to str
        In words.
    texts : mapping of str to str
        ``trace``, ``TIR``, ``inner loops``, ``CUDA source``, ``PTX``, ``SASS``, as far as there are.
    resources : mapping of str to number or text
        What the code uses.
    notes : sequence of str
        What is missing, and why; what a reader must know.
    """

    title: str
    facts: Mapping[str, str] = field(default_factory=dict)
    decisions: Mapping[str, str] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)
    resources: Mapping[str, float | str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class SchedulePair:
    """Two schedules to be read side by side."""

    title: str
    left: ScheduleView
    right: ScheduleView


def cached_pairs(
    rows: Iterable[Measurement], cache_dir: Path | None = None, limit: int = _CACHED
) -> list[SchedulePair]:
    """Return pairs of the layers of ours, and of their gradients, among the rows whose two schedules are in the cache.

    At most `limit`. The newest builds count, of those that this version's generating code made for a row's target.
    """
    try:
        built = {
            (artifact.spec, artifact.target.tag, artifact.key.schedule): artifact
            for artifact in artifacts(cache_dir)
            if artifact.key.source == source_digest()
        }
    except TvmdcnError as error:
        _log.warning("no schedules are shown: %s", error)
        return []
    pairs: dict[str, SchedulePair] = {}
    for row in rows:
        found = [built.get((row.spec, str(row.machine.get("target")), side)) for side in _SIDES]
        if row.role == "ours" and row.title not in pairs and None not in found and len(pairs) < limit:
            left, right = (_view_of_artifact(artifact) for artifact in found if artifact is not None)
            pairs[row.title] = SchedulePair(row.title, left, right)
    return list(pairs.values())


def named_pair(left: str, right: str, records_dir: Path | None = None) -> SchedulePair:
    """Return the pair of two schedules that are named, see :func:`view_of`."""
    views = [view_of(name, records_dir) for name in (left, right)]
    if views[0].title == views[1].title:
        views = [
            replace(view, title=f"{view.title} ({name[-60:]})") for view, name in zip(views, (left, right), strict=True)
        ]
    layers = list(dict.fromkeys(view.facts.get("layer", "") for view in views))
    return SchedulePair(" and ".join(filter(None, layers)) or f"{left} and {right}", *views)


def view_of(name: str, records_dir: Path | None = None) -> ScheduleView:
    """Return the schedule of a name.

    Parameters
    ----------
    name : str
        A folder with a ``manifest.json``: an artifact, of any version. ``FILE.jsonl#N``: trial N of a tuning's log.
        Or ``PROBLEM[ backward][@TARGET][:tuned|default|naive]``: what this version makes of a layer for a target, with
        the best record by default; it is compiled for that, not run.
    records_dir : Path, optional
        Where records are; by default the user's, then those that ship.

    Raises
    ------
    SpecError, RecordsError, BuildError
        If the name is understood as none of these, or what it names cannot be read or compiled.
    """
    path = Path(name)
    if (path / _MANIFEST).is_file() or path.name == _MANIFEST:
        return _view_of_folder(path.parent if path.name == _MANIFEST else path)
    if "#" in name:
        return _view_of_trial(name)
    if name and path.exists():
        raise SpecError(f"schedule {name!r} is a file or folder without {_MANIFEST}: name an artifact's folder.")
    text, _, schedule = name.partition(":")
    schedule = schedule or "tuned"
    if schedule not in _SCHEDULES:
        raise SpecError(f"schedule {name!r}: behind the colon must be one of {', '.join(_SCHEDULES)}.")
    layer, _, tag = text.partition("@")
    try:
        problem = parse_problem(layer.strip().removesuffix(" backward"))
    except TvmdcnError as error:
        raise SpecError(
            f"schedule {name!r} is no folder with a {_MANIFEST}, no FILE.jsonl#N, and no layer: {error}"
        ) from error
    if layer.strip().endswith(" backward"):
        problem = problem.backward
    target = resolve_target(tag or None)
    source, decisions = schedule, None
    if schedule == "tuned":
        source, decisions = _best(problem.spec, target, records_dir)
    facts = {"layer": problem.name, "target": target.tag, "schedule": source, "made by": "this version"}
    return _made(f"{problem.name}, {target.tag}: {source}", facts, problem.spec, target, schedule, decisions, ())


def _best(spec: DeformConv2dSpec, target: TargetInfo, records_dir: Path | None) -> tuple[str, Decisions | None]:
    from tvmdcn.tuning.records import TuningRecords

    records = TuningRecords.of(target.tag) if records_dir is None else TuningRecords.read(records_dir, target.tag)
    found = records.best(spec)
    return ("default, for lack of a record", None) if found is None else (found.description, found.decisions)


def _view_of_trial(name: str) -> ScheduleView:
    from tvmdcn.tuning.history import read_log

    text, _, number = name.rpartition("#")
    header, rows = read_log(Path(text))
    if not number.isdecimal() or int(number) >= len(rows):
        raise RecordsError(f"schedule {name!r}: {text} has the trials 0 to {len(rows) - 1}.")
    row = rows[int(number)]
    try:
        spec, target = spec_from_json(header["spec"]), resolve_target(str(header["target"]))
    except (KeyError, TvmdcnError) as error:
        raise RecordsError(f"{text} says of no layer and target what they are: {error}") from error
    took = f"{1e3 * row.seconds:.4g} ms in the tuning" if row.seconds is not None else f"failed: {row.reason}"
    layer = str(header.get("name", text))
    facts = {"layer": layer, "target": target.tag, "schedule": f"trial {number}: {took}", "made by": "this version"}
    notes: tuple[str, ...] = ()
    if header.get("source") != source_digest():
        notes = ("Code that generates kernels has changed since the tuning: this is what its decisions give now.",)
    return _made(f"{layer}, {target.tag}: trial {number}", facts, spec, target, "given", row.decisions, notes)


def _made(
    title: str,
    facts: Mapping[str, str],
    spec: DeformConv2dSpec,
    target: TargetInfo,
    schedule: str,
    decisions: Decisions | None,
    notes: tuple[str, ...],
) -> ScheduleView:
    """Schedule and compile a layer, and return what came out."""
    from tvmdcn.builder import compile_kernels, compile_schedule, naive_schedule, new_schedule

    if schedule == "naive":
        sch, made, trace = naive_schedule(spec, target), Decisions("", {}), ""
    else:
        sch = new_schedule(spec, target)
        made = space_of(spec.operator, target.kind).schedule(sch, spec, target, decisions)
        trace = str(sch.trace)
    texts = {"trace": trace, "TIR": sch.mod[spec.operator].script()}
    resources: dict[str, float | str] = {}
    if target.kind == "llvm":
        assembly = compile_schedule(spec, target, sch.mod).mod.inspect_source("s")
        loops, resources = _from_code(MachineCode.of_assembly(assembly).only(spec.operator))
        texts |= loops
    else:
        try:
            device = compile_kernels(spec, target, sch.mod)[1].to_json()
        except BuildError as error:  # no compiler for it here
            notes = (*notes, f"Without generated code: {error} An artifact's folder shows it too.")
        else:
            found, resources = _from_device(None, device)
            texts |= found
    return ScheduleView(title, facts, _words(made.to_json()), _filled(texts), resources, notes)


def _view_of_artifact(artifact: Artifact) -> ScheduleView:
    return _view_of_folder(artifact.path)


def _view_of_folder(folder: Path) -> ScheduleView:
    """Return what a folder with a manifest says of itself, whatever version wrote it; its code is read, never run."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise RecordsError(f"{folder / _MANIFEST} cannot be read: {error}") from error
    key, target, schedule = (_mapping(_mapping(manifest).get(name)) for name in ("key", "target", "schedule"))
    side, source = str(key.get("schedule", "")), str(schedule.get("source", ""))
    title = source if source in ("", side) or source.startswith(side) else f"{side}: {source}"
    entry = str(_mapping(_mapping(manifest).get("kernel")).get("entry", key.get("operator", "")))
    facts = {
        "layer": _layer(key.get("spec")),
        "target": _tag(target),
        "schedule": title,
        "made by": f"TVM {key.get('tvm', 'unknown')}, generating code {str(key.get('source', 'unknown'))[:12]}",
        "built": str(_mapping(manifest).get("created", ""))[:19],
        "folder": folder.name,
    }
    texts = {"trace": schedule.get("trace"), "TIR": schedule.get("tir")}
    resources: dict[str, float | str] = {}
    notes: tuple[str, ...] = ()
    try:
        loops, resources = _from_code(disassemble(folder / _LIBRARY).only(entry))
        texts |= loops
    except TvmdcnError as error:
        notes = (f"Without generated code: {error}",)
    device_texts, device_resources = _from_device(folder, _mapping(schedule.get("device")))
    if device_texts or device_resources:  # then the library is what launches it
        texts, resources, notes = {**texts, **device_texts}, device_resources, ()
        texts.pop("inner loops", None)
    decisions = _words(schedule.get("decisions"))
    return ScheduleView(
        title or side, {k: v for k, v in facts.items() if v}, decisions, _filled(texts), resources, notes
    )


def _from_code(code: MachineCode) -> tuple[dict[str, str], dict[str, float | str]]:
    """Return the text of the innermost loops that compute most, and what the code and the first loop use."""
    loops = code.innermost_loops()
    uses: dict[str, float | str] = {f"all code: {name}": count for name, count in code.uses.items()}
    shown: list[str] = []
    for number, loop in enumerate(loops[:_LOOPS], 1):
        if loop.work and loop.work >= _WORTH * loops[0].work:
            shown += [f"# innermost loop {number}", *loop.lines, ""]
    if loops and loops[0].work:
        uses |= {f"inner loop: {name}": count for name, count in loops[0].uses.items()}
    return {"inner loops": "\n".join(shown)}, uses


def _from_device(folder: Path | None, device: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, float | str]]:
    """Return what an artifact for a GPU carries besides: source, code, and what the compiler said it uses."""
    texts = {}
    for name, title in _DEVICE_TEXTS.items():
        beside = None if folder is None else folder / f"kernel.{'cu' if name == 'cuda' else name}"
        if isinstance(device.get(name), str):
            texts[title] = device[name]
        elif beside is not None and beside.is_file():
            texts[title] = beside.read_text(encoding="utf-8", errors="replace")
    return texts, _flat({name: value for name, value in device.items() if name not in _DEVICE_TEXTS})


def _flat(uses: Mapping[str, Any], prefix: str = "") -> dict[str, float | str]:
    """Return numbers and short texts of a nested object by the names on the way to them."""
    found: dict[str, float | str] = {}
    for name, value in uses.items():
        words = f"{prefix}{str(name).replace('_', ' ')}"
        if isinstance(value, Mapping):
            found |= _flat(value, prefix if name == "kernels" else f"{prefix}{name}: ")
        elif type(value) in (int, float) or (isinstance(value, str) and len(value) < 80):
            found[words] = value
    return found


def _mapping(value: Any) -> Mapping[str, Any]:
    """Return a mapping; an empty one for what is none, since a manifest may have been written by hand."""
    return value if isinstance(value, Mapping) else {}


def _words(decisions: Any) -> dict[str, str]:
    """Return decisions as texts."""
    values = _mapping(_mapping(decisions).get("values"))
    variant = _mapping(decisions).get("variant")
    return {**({} if not variant else {"variant": str(variant)}), **{str(k): str(v) for k, v in values.items()}}


def _filled(texts: Mapping[str, Any]) -> dict[str, str]:
    return {name: text for name, text in texts.items() if isinstance(text, str) and text.strip()}


def _tag(target: Mapping[str, Any]) -> str:
    try:
        return TargetInfo.from_json(target).tag
    except (TvmdcnError, KeyError, TypeError, ValueError):
        return str(target.get("mcpu") or target.get("kind") or "")


def _layer(spec: Any) -> str:
    try:
        found = spec_from_json(spec)
    except (TvmdcnError, KeyError, TypeError, ValueError):
        return json.dumps(spec, sort_keys=True)[:200] if spec else ""
    return f"{found.operator} {found.slug}"
