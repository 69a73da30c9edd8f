# SPDX-License-Identifier: Apache-2.0
"""``tvmdcn records``: what has been tuned, by whom, and whether it still holds."""

from __future__ import annotations

import fnmatch
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tvmdcn.errors import RecordsError
from tvmdcn.tuning.records_prune import TRIALS

if TYPE_CHECKING:
    from tvmdcn.tuning.record import Record

__all__ = ["records_command"]

_root = click.option(
    "--records",
    "root",
    type=click.Path(path_type=Path, file_okay=False),
    help="Root of the records.",
)
_target = click.option("--target", "tag", help="Only this target, such as llvm-znver5.")


@click.group("records", context_settings={"help_option_names": ["-h", "--help"]})
def records_command() -> None:
    """List, show, merge, prune and verify tuning records.

    Without --records, what is shown or verified is what a build would find here: your own records (TVMDCN_RECORDS, or
    your data directory) and those that ship. What changes records changes your own.
    """


def _say(text: str, err: bool = False) -> None:
    """Print lines that may hold what a stranger wrote: nothing in it moves a cursor, or is obeyed by a terminal."""
    lines = ("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line) for line in text.split("\n"))
    click.echo("\n".join(lines), err=err)


@dataclass(frozen=True)
class _Entry:
    """A record, and where it is."""

    root: Path
    tag: str
    record: Record

    @property
    def name(self) -> str:
        """The name of its layer, or its shape as commands take it."""
        from tvmdcn.problems import PROBLEMS, problem_text
        from tvmdcn.spec import DeformConv2dGradSpec

        spec, gradients = self.record.spec, isinstance(self.record.spec, DeformConv2dGradSpec)
        layer = spec.layer if isinstance(spec, DeformConv2dGradSpec) else spec
        named = (p.name for p in PROBLEMS.values() if (p.spec, p.extents) == (layer, self.record.extents))
        return next(named, problem_text(layer, self.record.extents)) + (" backward" if gradients else "")

    def columns(self) -> dict[str, Any]:
        """Return what a list shows."""
        record, extents = self.record, self.record.extents
        return {
            "target": self.tag,
            "layer": self.name,
            "size": f"{extents.batch}x{extents.height}x{extents.width}",
            "threads": record.threads,
            "ms": round(1e3 * record.seconds, 4),
            "vs_default": round(record.default_seconds / record.seconds, 3),
            "trials": record.trials,
            "date": _text(record, "date"),
            "machine": _text(record, "cpu"),
        }


def _text(record: Record, name: str) -> str:
    value = record.provenance.get(name)
    return " ".join(value.split()) if isinstance(value, str) else "unknown"


def _roots(root: Path | None) -> list[Path]:
    from tvmdcn.cache_key import record_roots

    if root is None:
        return record_roots()
    if not root.is_dir():
        raise RecordsError(f"there are no records in {root}: no such directory. Name a root, as --output of tune.")
    return [root]


def _tags(root: Path, tag: str | None) -> list[str]:
    from tvmdcn.tuning.records_check import tags_in

    return [found for found in tags_in(root) if tag in (None, found)]


def _entries(root: Path | None, tag: str | None) -> Iterator[_Entry]:
    from tvmdcn.tuning.records import TuningRecords

    for place in _roots(root):
        for found in _tags(place, tag):
            yield from (_Entry(place, found, record) for record in TuningRecords.read(place, found).records)


@records_command.command("list")
@_root
@_target
@click.option("--json", "as_json", is_flag=True, help="Write JSON, a list of objects.")
def list_command(root: Path | None, tag: str | None, as_json: bool) -> None:
    """List records: targets, layers, best time, when, where, trials.

    Times say which schedule won on that machine on that day; measure anew before you compare machines.
    """
    rows = [entry.columns() for entry in _entries(root, tag)]
    if as_json:
        _say(json.dumps(rows, indent=1))
        return
    if not rows:
        _say("no records" + (f" of {tag}" if tag else "") + ". tvmdcn tune makes some.")
        return
    titles = {"vs_default": "vs default"}
    table = [[titles.get(name, name) for name in rows[0]]]
    for row in rows:
        cells = {**row, "ms": f"{row['ms']:.3f}", "vs_default": f"{row['vs_default']:.2f}x"}
        table.append([str(cell) for cell in cells.values()])
    _print(table, right={"threads", "ms", "vs default", "trials"})


def _print(table: list[list[str]], right: Iterable[str]) -> None:
    """Print a table, titles first; the columns in `right` hold numbers."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        cells = (
            cell.rjust(width) if title in right else cell.ljust(width)
            for title, cell, width in zip(table[0], row, widths, strict=True)
        )
        _say("  ".join(cells).rstrip())


@records_command.command("show")
@click.argument("layers", nargs=-1)
@_root
@_target
def show_command(layers: tuple[str, ...], root: Path | None, tag: str | None) -> None:
    """Show records in words: decisions, where they come from, how they compare with the default.

    LAYERS are names as in the list, or slugs, with * and ?; all without any.
    """
    from tvmdcn.te import operator_of
    from tvmdcn.tuning.words import describe_decisions

    found = [entry for entry in _entries(root, tag) if not layers or _matches(entry, layers)]
    if not found:
        raise RecordsError(f"no record matches {', '.join(layers) or tag or 'that'}. See tvmdcn records list.")
    for entry in found:
        record, provenance = entry.record, entry.record.provenance
        gain = record.default_seconds / record.seconds
        words = describe_decisions(record.decisions, operator_of(record.spec).granule)
        versions = provenance.get("versions")
        versions = versions if isinstance(versions, dict) else {}
        tuned_with = ", ".join(f"{name} {versions[name]}" for name in ("tvmdcn", "apache-tvm") if name in versions)
        size = " x ".join(map(str, (record.extents.batch, record.extents.height, record.extents.width)))
        _say(f"{entry.name} on {entry.tag}, {record.threads} thread{'s' if record.threads > 1 else ''}")
        _say(f"  {record.spec.operator} {record.spec.slug}, on {size}")
        _say(f"  schedule: {words}")
        _say(
            f"  {1e3 * record.seconds:.3f} ms, {gain:.2f}x as fast as the default "
            f"({1e3 * record.default_seconds:.3f} ms) in the same run; best of {record.trials} trials"
        )
        _say(
            f"  measured {_text(record, 'date')} on {_text(record, 'cpu')}"
            + (" (virtual machine)" if provenance.get("hypervisor") is True else "")
            + f", {_text(record, 'system')}; {tuned_with or 'versions unknown'}"
        )
        _say(f"  in {entry.root / entry.tag}")


def _matches(entry: _Entry, patterns: Iterable[str]) -> bool:
    names = (entry.name, entry.name.removesuffix(" backward"), entry.record.spec.slug)
    return any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in patterns)


@records_command.command("merge")
@click.argument("sources", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--into", type=click.Path(path_type=Path, file_okay=False), help="Root to merge into; yours by default.")
@_target
@click.option("--dry-run", is_flag=True, help="Only say what would be done.")
def merge_command(sources: tuple[Path, ...], into: Path | None, tag: str | None, dry_run: bool) -> None:
    """Take the records of SOURCES, directories or archives (tar, zip), into a root.

    Refused, each with its reason: damaged records, records of another target or of another compiler, and those whose
    decisions the design space no longer has. Of two records of one layer the one with the greater gain over the
    default schedule is kept, which was measured in turns with it: times of two machines do not compare. The status is
    1 if something was refused.
    """
    from tvmdcn.tuning.records import user_root
    from tvmdcn.tuning.records_merge import merge

    root = user_root() if into is None else into
    counts: dict[str, int] = {}
    for source in sources:
        for verdict in merge(source, root, tag, dry_run):
            counts[verdict.action] = counts.get(verdict.action, 0) + 1
            _say(f"{verdict.action}: {verdict.what}: {verdict.reason}", err=verdict.action == "refused")
    summary = ", ".join(f"{count} {action}" for action, count in counts.items()) or "nothing"
    _say(f"{'would be: ' if dry_run else ''}{summary}; records: {root}")
    sys.exit(1 if counts.get("refused") else 0)


@records_command.command("prune")
@_root
@_target
@click.option(
    "--trials",
    type=click.Choice(TRIALS),
    default="replaced",
    show_default=True,
    help="Which logs of trials go: those that a merge replaced; also those of an earlier state of the code; all.",
)
@click.option("--dry-run", is_flag=True, help="Only say what would go.")
def prune_command(root: Path | None, tag: str | None, trials: str, dry_run: bool) -> None:
    """Delete records that no look-up finds (of one layer the largest size decides), and logs of no use."""
    from tvmdcn.tuning.records import user_root
    from tvmdcn.tuning.records_prune import prune

    (place,) = _roots(user_root() if root is None else root)
    count = 0
    for found in _tags(place, tag):
        for line in prune(place, found, trials, dry_run):
            count += 1
            _say(f"{'would go' if dry_run else 'gone'}: {line}")
    _say(f"{count} {'would go' if dry_run else 'gone'}; records: {place}")


@records_command.command("verify")
@_root
@_target
@click.option("--compile", "compile_all", is_flag=True, help="Compile every schedule, too: about a second each.")
@click.option("--measure", is_flag=True, help="Measure again on this machine, and say how far times have moved.")
def verify_command(root: Path | None, tag: str | None, compile_all: bool, measure: bool) -> None:
    """Check that records are whole, and still mean what was tuned.

    After a change of the code that generates kernels, this finds the orphans: records whose decisions the design
    space no longer has. The status is 1 if something is to be done.
    """
    from tvmdcn.tuning.records_check import check_records

    serious = count = 0
    for place in _roots(root):
        for found in _tags(place, tag):
            for finding in check_records(place, found, compile_all):
                serious += finding.serious
                _say(f"{'wrong' if finding.serious else 'note'}: {finding.where}: {finding.text}")
            count += 1
            if measure:
                _measure(place, found)
    if not count:
        raise RecordsError("there are no records" + (f" of {tag}" if tag else "") + " to verify.")
    _say("all is well" if not serious else f"{serious} wrong")
    sys.exit(1 if serious else 0)


def _measure(root: Path, tag: str) -> None:
    from tvmdcn.extras import require
    from tvmdcn.target import host_identity
    from tvmdcn.tuning.records_check import remeasure
    from tvmdcn.tuning.records_merge import machine_of

    require("tune", "measuring")
    machine = machine_of(host_identity())
    for drift in remeasure(root, tag):
        record, entry = drift.record, _Entry(root, tag, drift.record)
        where = f"{tag} {entry.name} t{record.threads}"
        if drift.reason:
            _say(f"{where}: failed: {drift.reason}")
            continue
        now, then = drift.default_seconds / drift.seconds, record.default_seconds / record.seconds
        times = f"{1e3 * drift.seconds:.3f} ms now, {1e3 * record.seconds:.3f} ms recorded"
        same = machine == machine_of(record.provenance)
        moved = f"{drift.seconds / record.seconds:.2f}x" if same else "on another machine"
        _say(f"{where}: {times} ({moved}); {now:.2f}x of default now, {then:.2f}x then")
