# SPDX-License-Identifier: Apache-2.0
"""``tvmdcn pack``: build layers for several targets, and put them where they can be taken away."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterable
from pathlib import Path

import click

from tvmdcn.artifact import Artifact
from tvmdcn.problems import OPERATORS, PROBLEMS, Problem, load_problem_file, of_operators, parse_problem

__all__ = ["pack_command"]


def _chosen(
    problems: Iterable[str], files: Iterable[Path], model: str | None, inputs: tuple[str, ...]
) -> list[Problem]:
    """Return the layers that were asked for."""
    found: list[Problem] = []
    for text in problems:
        found += PROBLEMS.values() if text == "all" else [parse_problem(text)]
    for path in files:
        found += load_problem_file(path)
    if model is not None:
        from tvmdcn.tuning.models import is_onnx, load_model, parse_input, problems_of_model

        if not inputs and not is_onnx(model):
            raise click.UsageError("--model needs --input, such as --input 1x3x512x512.")
        found += problems_of_model(load_model(model), [parse_input(text) for text in inputs])
    elif inputs:
        raise click.UsageError("--input goes with --model.")
    if not found:
        raise click.UsageError(
            "say what to pack: --problem NAME (or 'all', or N,Cin,H,W,Cout,...), --file LAYERS.json, or --model "
            "MODULE:FACTORY --input SHAPE, or --model FILE.onnx."
        )
    return found


@click.command("pack", context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--problem",
    "problems",
    multiple=True,
    help="A named layer, 'all', or N,Cin,H,W,Cout[,k=3x3][,s=1]...; repeatable.",
)
@click.option(
    "--file",
    "--problem-file",
    "files",
    multiple=True,
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="A JSON or TOML file of layers; repeatable.",
)
@click.option("--model", help="MODULE:FACTORY of a torch model, or FILE.onnx, whose layers are packed.")
@click.option("--input", "inputs", multiple=True, help="Shape of an input of the model, as 1x3x512x512; repeatable.")
@click.option(
    "--operator",
    type=click.Choice(OPERATORS),
    default=OPERATORS[0],
    show_default=True,
    help="The layers, their gradients, or both.",
)
@click.option(
    "--target",
    "targets",
    multiple=True,
    help="What to build for, such as x86-64-v3 or neoverse-n1; repeatable. Default: this machine.",
)
@click.option(
    "--output",
    "-o",
    required=True,
    type=click.Path(path_type=Path, file_okay=False),
    help="The pack's directory; a pack that is there is replaced.",
)
@click.option("--wheel", type=click.Path(path_type=Path, file_okay=False), help="Also write a wheel of it, here.")
@click.option("--name", help="The pack's name, and its wheel's. Default: that of the directory.")
@click.option("--version", default="1.0", show_default=True, help="The pack's version.")
@click.option(
    "--runtime/--no-runtime",
    default=True,
    help="Carry TVM's small runtime (6 MB), so that no apache-tvm is needed (the default), or not.",
)
@click.option(
    "--runtime-wheel",
    "wheels",
    multiple=True,
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Wheels of apache-tvm and apache-tvm-ffi to take another architecture's runtime from; repeatable.",
)
def pack_command(
    problems: tuple[str, ...],
    files: tuple[Path, ...],
    model: str | None,
    inputs: tuple[str, ...],
    operator: str,
    targets: tuple[str, ...],
    output: Path,
    wheel: Path | None,
    name: str | None,
    version: str,
    runtime: bool,
    wheels: tuple[Path, ...],
) -> None:
    """Build layers for several targets into a directory that needs no compiler where it runs.

    What is built stays in the cache: a packing that was interrupted goes on where it was.
    """
    from tvmdcn.extras import require
    from tvmdcn.linking import machine_of
    from tvmdcn.packs.writer import build_pack, installed_runtime, wheel_runtime
    from tvmdcn.target import resolve_target

    # What is wrong with the arguments is told before anything is built.
    infos = [resolve_target(text) for text in targets or (None,)]
    layers = of_operators(_chosen(problems, files, model, inputs), operator)
    if wheel is not None:
        require("pack", "tvmdcn pack --wheel")
    if not runtime and wheels:
        raise click.UsageError("--runtime-wheel is for a pack that carries its runtime, not for --no-runtime.")
    sources = {source.arch: source for source in [installed_runtime(), *wheel_runtime(wheels)]} if runtime else {}
    arches = list(dict.fromkeys(machine_of(info) for info in infos))
    for arch in arches:
        if runtime and arch not in sources:
            click.echo(
                f"note: no runtime for {arch} is at hand (--runtime-wheel), so machines of that kind need "
                "apache-tvm and apache-tvm-ffi",
                err=True,
            )
    started = time.perf_counter()

    def show(artifact: Artifact) -> None:
        nonlocal started
        now = time.perf_counter()
        source = artifact.schedule.get("source", artifact.key.schedule)
        click.echo(
            f"{artifact.target.tag}: {artifact.spec.operator} {artifact.spec.slug} (schedule: {source}, "
            f"{now - started:.1f} s)"
        )
        started = now

    pack = build_pack(
        [layer.spec for layer in layers],
        infos,
        output,
        name=name,
        version=version,
        runtimes=[sources[arch] for arch in arches if arch in sources],
        on_build=show,
    )
    size = sum(record.bytes for record in pack.manifest.files.values())
    click.echo(f"{pack.path}: {len(pack.kernels)} kernels, {size / 1e6:.1f} MB, sha256 {pack.sha256}")
    if wheel is not None:
        from tvmdcn.packs.wheels import write_wheel

        click.echo(f"wheel: {write_wheel(pack, wheel)}")
    click.echo(f"next: python -m tvmdcn.packs.check {shlex.quote(str(output))}")


if __name__ == "__main__":
    pack_command()
