# SPDX-License-Identifier: Apache-2.0
"""``tvmdcn onnx``: the layers of a model in ONNX, and its numbers and time beside onnxruntime alone."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from tvmdcn.extras import require

__all__ = ["onnx_command"]


@click.command("onnx")
@click.argument("model", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--input", "inputs", multiple=True, help="Shape of an input, such as 1x3x512x512; for each that varies.")
@click.option("--threads", type=click.IntRange(1), help="Threads of both; by default all that the process may use.")
@click.option("--repeat", type=click.IntRange(1), default=5, show_default=True, help="Runs of each, in turns.")
def onnx_command(model: Path, inputs: tuple[str, ...], threads: int | None, repeat: int) -> None:
    """Run a model in ONNX, once in onnxruntime alone and once with tvmdcn's kernels for its DeformConv nodes.

    Inputs are random. Prints the layers, the largest difference of each output, and the median time of both.
    """
    require("onnx", "tvmdcn onnx")
    import onnxruntime

    from tvmdcn.onnx.layers import example_inputs, find_layers
    from tvmdcn.onnx.session import InferenceSession, load_model
    from tvmdcn.threads import thread_count
    from tvmdcn.tuning.models import parse_input

    proto = load_model(model)
    shapes = [parse_input(text) for text in inputs] or None
    for problem in find_layers(proto, shapes):
        click.echo(f"{problem.name}  ({problem.source})")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or thread_count()
    options.log_severity_level = 3
    options.add_session_config_entry("session.force_spinning_stop", "1")
    arguments: dict[str, Any] = {"providers": ["CPUExecutionProvider"]}
    ours = InferenceSession(proto, options, **arguments)
    feeds = example_inputs(ours.get_inputs(), shapes)
    runs: dict[str, Callable[[], Any]] = {"with tvmdcn": lambda: ours.run(None, feeds)}
    results = ours.run(None, feeds)
    try:
        alone = onnxruntime.InferenceSession(str(model), options, **arguments)
        others = alone.run(None, feeds)
    except Exception as error:  # what onnxruntime cannot run; its exceptions have no base of their own
        click.echo(f"onnxruntime {onnxruntime.__version__} alone cannot run it: {str(error).strip()[:300]}")
    else:
        runs["onnxruntime alone"] = lambda: alone.run(None, feeds)
        for value, found, expected in zip(ours.get_outputs(), results, others, strict=True):
            click.echo(f"{value.name}: {_difference(found, expected)}")
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeat):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    for name, taken in seconds.items():
        click.echo(f"{name}: {1e3 * statistics.median(taken):.3g} ms")


def _difference(found: Any, expected: Any) -> str:
    """Return the largest difference of two outputs, in words."""
    import numpy as np

    if not isinstance(found, np.ndarray) or found.dtype.kind not in "fiub":
        return f"{type(found).__name__}, not compared"
    if found.shape != expected.shape:
        return f"shape {found.shape}, not {expected.shape}"
    exact, other = found.astype(np.float64), expected.astype(np.float64)
    difference = float(np.abs(exact - other).max(initial=0))
    return f"largest difference {difference:.1e}, of values up to {float(np.abs(other).max(initial=0)):.1e}"
