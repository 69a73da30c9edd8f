# SPDX-License-Identifier: Apache-2.0
"""Whether tuning records are whole and still mean what was tuned; and how fast they are on this machine today."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from tvmdcn.cache_key import installed_compiler, source_digest
from tvmdcn.errors import BuildError, RecordsError, TvmdcnError
from tvmdcn.space import Decisions
from tvmdcn.target import TargetInfo, detect_target, resolve_target
from tvmdcn.tuning.history import read_log
from tvmdcn.tuning.record import Record
from tvmdcn.tuning.records import META, TuningRecords

__all__ = ["Drift", "Finding", "check_records", "orphaned", "remeasure", "tags_in"]

_ROUNDS = 5


@dataclass(frozen=True)
class Finding:
    """Something that was found.

    Parameters
    ----------
    where : str
        File, and record or line.
    text : str
    serious : bool
        Whether something is to be done; otherwise it is only worth knowing.
    """

    where: str
    text: str
    serious: bool = True


@dataclass(frozen=True)
class Drift:
    """What a record's schedule takes today; times in seconds.

    Parameters
    ----------
    record : Record
    seconds, default_seconds : float
        Median times of a call now, measured in turns. Infinite if the run failed.
    reason : str
        Why it failed; empty otherwise.
    """

    record: Record
    seconds: float
    default_seconds: float
    reason: str = ""


def tags_in(root: Path) -> list[str]:
    """Return the targets that a root has records or logs of."""
    if not root.is_dir():
        return []
    return sorted(path.name for path in root.iterdir() if (path / META).exists() or (path / "trials").is_dir())


def orphaned(record: Record, target: TargetInfo) -> str:
    """Return why a record no longer means the schedule that was tuned; empty if it does. Imports the compiler."""
    from tvmdcn.builder import new_schedule
    from tvmdcn.space import space_of

    try:
        space = space_of(record.spec.operator, target.kind)
        names = space.variants(record.spec, target)
        if record.decisions.variant not in names:
            return f"the design space has no variant {record.decisions.variant!r}, but {', '.join(names)}"
        made = space.schedule(new_schedule(record.spec, target), record.spec, target, record.decisions)
    except (TvmdcnError, RuntimeError, ValueError) as error:  # TVM's own among them
        return f"its decisions cannot be applied: {str(error).strip().splitlines()[-1][:200]}"
    if made == record.decisions:
        return ""
    wanted, found = record.decisions.values, made.values
    both = [name for name in wanted if name in found and wanted[name] != found[name]]
    changes = [f"{name} was {wanted[name]}, becomes {found[name]}" for name in both]
    changes += [f"{name} is unknown" for name in wanted if name not in found]
    changes += [f"{name} is new ({found[name]})" for name in found if name not in wanted]
    return f"the design space no longer has its decisions: {'; '.join(changes)}"


def check_records(root: Path, tag: str, compile_all: bool = False) -> Iterator[Finding]:
    """Check the records of a target, and their logs of trials.

    Parameters
    ----------
    root : Path
    tag : str
        The target.
    compile_all : bool
        Compile each record's schedule, too, about a second each.

    Yields
    ------
    Finding
    """
    where = f"{tag}/{META}"
    try:
        target = resolve_target(tag)
        if target.tag != tag:
            raise RecordsError(f"the directory must be named {target.tag}.")
        records = TuningRecords.read(root, tag).records
    except TvmdcnError as error:
        yield Finding(where, str(error))
        return
    if records:
        digest = hashlib.sha256((root / tag / META).read_bytes()).hexdigest()
        yield Finding(where, f"{len(records)} records, sha256 {digest[:16]}...", serious=False)
    for signature, count in Counter(record.signature for record in records).items():
        if count > 1:
            yield Finding(where, f"{count} records of {signature[0].slug} for {signature[1:]}: tvmdcn records prune")
    older = 0
    for record in records:
        older += record.provenance.get("source") != source_digest()
        for finding in _check_record(record, target, compile_all):
            yield Finding(f"{where}: {record.spec.operator} {record.spec.slug} t{record.threads}", *finding)
    if older:
        yield Finding(
            where,
            f"{older} of {len(records)} records were tuned with an earlier state of the code that generates kernels",
            serious=False,
        )
    yield from _check_logs(root / tag, records)


def _check_record(record: Record, target: TargetInfo, compile_all: bool) -> Iterator[tuple[str, bool]]:
    """Iterate over what is found about one record: words, and whether it is serious."""
    found = record.provenance
    missing = [name for name in ("cpu", "date", "versions", "source") if not found.get(name)]
    if missing:
        yield f"it does not say where it comes from: {', '.join(missing)} missing", True
    versions = found.get("versions")
    tuned = versions.get("apache-tvm") if isinstance(versions, dict) else None
    if tuned is not None and tuned != installed_compiler()[0]:
        yield f"tuned with apache-tvm {tuned}, and {installed_compiler()[0]} is installed", False
    if record.seconds > record.default_seconds:
        yield f"slower than the default in its own run, {record.default_seconds / record.seconds:.2f}x", False
    reason = orphaned(record, target)
    if reason:
        yield f"{reason}: tune it again", True
    elif compile_all:
        from tvmdcn.builder import compile_schedule, new_schedule
        from tvmdcn.space import space_of

        sch = new_schedule(record.spec, target)
        space_of(record.spec.operator, target.kind).schedule(sch, record.spec, target, record.decisions)
        try:
            compile_schedule(record.spec, target, sch.mod)
        except BuildError as error:
            yield str(error), True


def _check_logs(folder: Path, records: list[Record]) -> Iterator[Finding]:
    logs, old = sorted((folder / "trials").glob("*.jsonl")), 0
    known = {_key(record.spec.to_json(), asdict(record.extents), record.threads) for record in records}
    for log in logs:
        where = f"{folder.name}/trials/{log.name}"
        try:
            header, rows = read_log(log)
        except RecordsError as error:
            yield Finding(where, str(error))
            continue
        if header.get("target") != folder.name:
            yield Finding(where, f"it is of target {str(header.get('target'))[:80]!r}")
            continue
        old += header.get("source") != source_digest()
        if _key(header.get("spec"), header.get("extents"), header.get("threads")) not in known:
            text = f"{len(rows)} trials and no record: its tuning has not ended; the same command goes on with it"
            yield Finding(where, text, serious=False)
    if old:
        text = f"{old} of {len(logs)} logs measured an earlier state of the code; tuning would not go on with them"
        yield Finding(f"{folder.name}/trials", text, serious=False)


def _key(*parts: object) -> str:
    return repr([sorted(part.items()) if isinstance(part, dict) else part for part in parts])


def remeasure(root: Path, tag: str) -> Iterator[Drift]:
    """Measure the records of a target on this machine, each in turns with its default schedule.

    Raises
    ------
    RecordsError
        If the target's kernels cannot run here, or its records cannot be read.
    """
    from tvmdcn.builder import new_schedule
    from tvmdcn.space import space_of
    from tvmdcn.te import operator_of
    from tvmdcn.tuning.scratch import scratch_directory
    from tvmdcn.tuning.trial import Job, save_inputs
    from tvmdcn.tuning.workers import Workers

    target, here = resolve_target(tag), detect_target()
    same_kind = (target.kind, target.arch) == (here.kind, here.arch)
    if target.tag != here.tag and not (same_kind and target.features <= here.features):
        raise RecordsError(f"records of {tag} cannot be measured on this machine, which is {here.tag}. Do it there.")
    with Workers(builders=1) as workers:
        for record in TuningRecords.read(root, tag).records:
            spec = record.spec
            default: Decisions = space_of(spec.operator, target.kind).schedule(new_schedule(spec, target), spec, target)
            with scratch_directory() as scratch:
                job = Job(spec, record.extents, target, record.threads, scratch)
                operator = operator_of(spec)
                tensors = operator.tensors(spec, record.extents)
                save_inputs(job, tensors, operator.expected(spec, tensors))
                candidates = [record.decisions] if default == record.decisions else [record.decisions, default]
                outcomes = workers.compare(job, candidates, _ROUNDS)
            first, last = outcomes[0], outcomes[-1]
            yield Drift(record, first.median, last.median, first.reason or last.reason)
