# SPDX-License-Identifier: Apache-2.0
"""Every number of a report as tables for other programs: JSON in one file, CSV in one file per table."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tvmdcn.bench.comparison import Line, Section
from tvmdcn.bench.measurement import Measurement
from tvmdcn.bench.words import describe_layer, describe_measure
from tvmdcn.errors import TvmdcnError
from tvmdcn.files import write_whole
from tvmdcn.report.charts import Numbers, Scalar
from tvmdcn.report.places import describe_machine

__all__ = ["EXPORT_SCHEMA", "ExportError", "measurement_numbers", "write_csv", "write_json"]

EXPORT_SCHEMA = 1
_PLACE = ("machine", "device", "direction", "threads", "cache", "dtype", "layout")
_ROW = (
    *("layer", "description", "provider", "role", "status", "reason", "median_ms", "min_ms", "p10_ms", "p90_ms"),
    *("spread", "noisy", "runs", "max_rel_error", "gflops", "memory_bytes", "date"),
)


class ExportError(TvmdcnError, ValueError):
    """The tables of a report do not fit together."""


def measurement_numbers(sections: Sequence[Section]) -> list[Numbers]:
    """Return the tables of measured rows: calls, sweeps, what lies around the kernel, and the means.

    Times are in milliseconds, ratios are how many times as long a row takes: ``to_fastest_peer`` and ``to_plain``
    below 1 are faster than these.
    """
    calls: list[list[Scalar]] = []
    around: list[list[Scalar]] = []
    means: list[list[Scalar]] = []
    for section in sections:
        place = _place(section)
        for line in section.lines:
            calls += [[*place, *_row(row), *_ratios(row, line)] for row in line.rows.values()]
        calls += [
            [*place, *_row(row), None, None]
            for sweep in section.sweeps
            for series in sweep.rows.values()
            for row in series
            if row is not None
        ]
        around += [[*place, describe_measure(row), *_row(row), section.above_kernel(row)] for row in section.extra]
        wins = sum(line.speedup >= 1 for line in section.lines if line.speedup is not None)
        for name in ("speedup", "cost", "growth"):
            mean = getattr(section, name)
            if mean is not None:
                means.append([*place, name, mean.value, mean.lowest, mean.highest, mean.count, mean.total, wins])
    return [
        Numbers("calls", (*_PLACE, *_ROW, "to_fastest_peer", "to_plain"), calls),
        Numbers("around_the_kernel", (*_PLACE, "what", *_ROW, "above_kernel_ms"), around),
        Numbers("means", (*_PLACE, "ratio", "geometric_mean", "lowest", "highest", "count", "total", "wins"), means),
    ]


def _place(section: Section) -> list[Scalar]:
    where = (section.device, section.direction, section.threads, section.cache, section.dtype, section.layout)
    return [describe_machine(section.machine), *where]


def _row(row: Measurement) -> list[Scalar]:
    gflops = None if row.median_ms is None else row.operations / row.median_ms / 1e6
    times = (row.median_ms, row.min_ms, row.p10, row.p90, row.spread, row.noisy, row.runs, row.max_rel_error)
    name = (row.problem, describe_layer(row.spec, row.extents), row.provider, row.role, row.status, row.reason)
    return [*name, *times, gflops, row.memory_bytes, row.date]


def _ratios(row: Measurement, line: Line) -> list[Scalar]:
    peers = (line.fastest_peer, line.floor)
    return [
        None if row.median_ms is None or peer is None or not peer.median_ms else row.median_ms / peer.median_ms
        for peer in peers
    ]


def write_json(path: Path, about: Mapping[str, Any], tables: Sequence[Numbers]) -> None:
    """Write all tables as one JSON object: ``schema``, what `about` says, and ``tables``, lists of objects by name.

    Raises
    ------
    ExportError
        If two tables share a name.
    OSError
        If the file cannot be written.
    """
    data = {"schema": EXPORT_SCHEMA, **about, "tables": {table.name: table.records() for table in _distinct(tables)}}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(data, indent=1) + "\n")


def write_csv(folder: Path, tables: Sequence[Numbers]) -> list[Path]:
    """Write each table that has rows as ``NAME.csv`` into a folder, and return the files.

    Raises
    ------
    ExportError
        If two tables share a name.
    OSError
        If a file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for table in _distinct(tables):
        if table.rows:
            written.append(folder / f"{table.name}.csv")
            with written[-1].open("w", encoding="utf-8", errors="replace", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(table.columns)
                writer.writerows(table.rows)
    return written


def _distinct(tables: Sequence[Numbers]) -> Sequence[Numbers]:
    names = [table.name for table in tables]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ExportError(f"the names of a report's tables must differ, got {', '.join(repeated)} more than once.")
    return tables
