# SPDX-License-Identifier: Apache-2.0
"""The command ``tvmdcn``: one subcommand per stage of the pipeline, each imported only when it runs."""

from __future__ import annotations

import errno
import importlib
import os
import platform
import time
from importlib import metadata

import click

from tvmdcn.errors import TvmdcnError
from tvmdcn.extras import explain

__all__ = ["main"]

# Subcommand: the click command that does the work, and its line in `tvmdcn --help`, which must stay fast.
_COMMANDS = {
    "tune": (
        "tvmdcn.tuning.command:tune_command",
        "Search the best schedule of a layer for this machine, and keep it.",
    ),
    "records": ("tvmdcn.tuning.records_command:records_command", "List, show, merge, prune and verify what was tuned."),
    "build": ("tvmdcn.cli:build_command", "Compile a layer to an artifact that loads without the compiler."),
    "pack": ("tvmdcn.packs.command:pack_command", "Build layers for several targets, to run where no compiler is."),
    "benchmark": ("tvmdcn.bench.command:benchmark_command", "Measure layers beside other libraries."),
    "onnx": ("tvmdcn.onnx.command:onnx_command", "Run a model in ONNX with our kernels, beside onnxruntime alone."),
    "stages": ("tvmdcn.bench.stages:stages_command", "Measure where the time of a layer goes, stage by stage."),
    "report": ("tvmdcn.report.command:report_command", "Make a page and tables of measurements, or compare two runs."),
    "info": ("tvmdcn.cli:info_command", "Show versions, this machine's target and the settings in force."),
}
# Whose versions decide what is built and measured.
_VERSIONS = ("tvmdcn", "apache-tvm", "apache-tvm-ffi", "numpy", "torch", "onnxruntime", "openvino")
# Settings, and the function of tvmdcn.env that reads each.
_SETTINGS = {
    "TVMDCN_CACHE_DIR": "cache_dir",
    "TVMDCN_BUILD": "build_mode",
    "TVMDCN_NUM_THREADS": "num_threads",
    "TVMDCN_RECORDS": "records_dir",
    "TVMDCN_LOCK_TIMEOUT": "lock_timeout",
    "TVMDCN_TARGET": "target",
    "TVMDCN_PACK": "packs",
}


class _LazyGroup(click.Group):
    """A group that knows its subcommands by name, and imports the one that is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names, in the order of the pipeline."""
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return a subcommand, or None for an unknown name."""
        if cmd_name not in _COMMANDS:
            return None
        module, name = _COMMANDS[cmd_name][0].split(":")
        command = getattr(importlib.import_module(module), name)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of subcommands from the table, importing none of them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in _COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> object:
        """Run a subcommand; report errors that a user can mend as a message, not as a traceback."""
        try:
            return super().invoke(ctx)
        except TvmdcnError as error:
            raise click.ClickException(str(error)) from error
        except ImportError as error:
            message = explain(error, f"tvmdcn {ctx.invoked_subcommand or ''}".rstrip())
            if message is None:
                raise
            raise click.ClickException(message) from error
        except OSError as error:  # a file that cannot be written, a full disk
            if error.errno == errno.EPIPE:
                raise
            raise click.ClickException(str(error)) from error


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="tvmdcn")
def main() -> None:
    """Deformable convolutions as tuned native kernels: describe a layer, tune, build, call, compare."""


@click.command("build")
@click.option("--problem", "problems", multiple=True, required=True, help="A named problem, or N,Cin,H,W,Cout,...")
@click.option(
    "--operator",
    type=click.Choice(["deform_conv2d", "deform_conv2d_grad", "all"]),
    default="deform_conv2d",
    show_default=True,
    help="The layers, their gradients, or both.",
)
@click.option("--target", help="LLVM processor name. Default: this machine.")
@click.option(
    "--schedule",
    type=click.Choice(["tuned", "default", "naive"]),
    default="tuned",
    show_default=True,
    help="Tuned falls back on default where there is no record.",
)
def build_command(problems: tuple[str, ...], operator: str, target: str | None, schedule: str) -> None:
    """Compile layers to artifacts in the cache, and print where they are."""
    from tvmdcn.problems import of_operators, parse_problem

    # A slip of the keyboard is told before TVM is imported.
    found = of_operators([parse_problem(text) for text in problems], operator)
    from tvmdcn.builder import build

    for problem in found:
        started = time.perf_counter()
        artifact = build(problem.spec, target, schedule)
        click.echo(f"{problem.name}: {artifact.path} ({time.perf_counter() - started:.1f} s)")


@click.command("info")
def info_command() -> None:
    """Show versions, this machine's target and the settings in force."""
    from tvmdcn import env
    from tvmdcn.packs.active import active_packs
    from tvmdcn.target import detect_target

    click.echo(f"python {platform.python_version()} on {platform.platform()}")
    for name in _VERSIONS:
        try:
            click.echo(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            click.echo(f"{name} is not installed")
    target = detect_target()
    click.echo(f"target {target.tag}: {target.vector_bits}-bit vectors, {target.cores} cores")
    for name, read in _SETTINGS.items():
        value = getattr(env, read)()
        if isinstance(value, tuple):
            value = os.pathsep.join(map(str, value)) or None
        click.echo(f"{name} = {'not set' if value is None else value}  ({env.SETTINGS[name].doc})")
    for pack in active_packs():
        click.echo(f"pack {pack.manifest.name} {pack.manifest.version}: {len(pack.kernels)} kernels ({pack.path})")
    for name, meant in env.unknown_names().items():
        hint = f"; did you mean {meant}?" if meant else ""
        click.echo(f"warning: {name} is set, and is no setting of tvmdcn{hint}", err=True)


if __name__ == "__main__":
    main()
