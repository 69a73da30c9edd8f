# SPDX-License-Identifier: Apache-2.0
"""From a specification to compiled code: algorithm, schedule, LLVM. The only module besides the tuner that compiles."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tvm
from tvm import tirx

from tvmdcn.artifact import Artifact, build_once
from tvmdcn.cache_key import CacheKey
from tvmdcn.errors import BuildError, SpecError, SpecTypeError
from tvmdcn.kernel_interface import KernelInterface
from tvmdcn.launcher import write_launcher
from tvmdcn.linking import linker_for
from tvmdcn.space import PLANES, SPLITS, TILE_UNITS, UNIT_BYTES, Decisions, space_of
from tvmdcn.spec import DeformConv2dSpec
from tvmdcn.target import TargetInfo, resolve_target
from tvmdcn.te import DeviceForm, Operator, operator_of
from tvmdcn.tuning.records import TuningRecords
from tvmdcn.validation import shown

__all__ = [
    "PACKED_ALIGNMENT",
    "OwnBarriers",
    "build",
    "compile_kernels",
    "compile_schedule",
    "device_module",
    "interface_of",
    "naive_schedule",
    "new_schedule",
    "write_library",
]

_log = logging.getLogger(__name__)

PACK = "pack_weight"
PACKED_ALIGNMENT = 64
"""Bytes; the packed weight is the runtime's own, so that its loads can be aligned ones."""

_NAIVE_TILE_UNITS = 48
_TASK_BYTES = 4 << 20
"""What a thread may take for its tile, whatever a search would like."""


def new_schedule(spec: DeformConv2dSpec, target: TargetInfo) -> Any:
    """Return a TVM ``Schedule`` of the operator, nothing scheduled yet; its function is named as the operator."""
    operator = operator_of(spec)
    func = (
        _device_form(spec).kernel(spec)
        if target.kind == "cuda"
        else operator.kernel(spec, *operator.form(spec, target))
    )
    module = tvm.IRModule({operator.name: func.with_attr("global_symbol", operator.name)})
    return tvm.s_tir.Schedule(module, debug_mask="none")


def _device_form(spec: DeformConv2dSpec) -> DeviceForm:
    form = operator_of(spec).device
    if form is None:
        raise BuildError(f"{spec.operator} has no form for GPUs. Build it for a processor (target 'llvm').")
    return form


def naive_schedule(spec: DeformConv2dSpec, target: TargetInfo) -> Any:
    """Return the plainest correct schedule, for comparison."""
    sch = new_schedule(spec, target)
    space_of(spec.operator, target.kind).naive(sch, spec)
    return sch


def _annotations(operator: Operator, module: Any) -> dict[str, int]:
    """Return what a schedule has noted about itself on its blocks."""
    found: dict[str, int] = {}
    noted = (TILE_UNITS, UNIT_BYTES, SPLITS, PLANES)

    def visit(stmt: Any) -> None:
        if isinstance(stmt, tirx.SeqStmt):
            for inner in stmt:
                visit(inner)
        elif hasattr(stmt, "block"):
            found.update({k: int(v) for k, v in stmt.block.annotations.items() if k in noted})
            visit(stmt.block.body)
        else:  # a loop, a condition, or a store, which holds no blocks
            for inner in ("body", "then_case", "else_case"):
                if getattr(stmt, inner, None) is not None:
                    visit(getattr(stmt, inner))

    visit(module[operator.name].body)
    return found


def interface_of(spec: DeformConv2dSpec, target: TargetInfo, module: Any) -> KernelInterface:
    """Return how the kernel of a scheduled module is called."""
    operator = operator_of(spec)
    if target.kind == "cuda":
        form, noted = _device_form(spec), _annotations(operator, module)
        return KernelInterface(
            granule=form.granule,
            max_tile_units=noted.get(TILE_UNITS, 1),
            packed_shape=form.packed_shape(spec),
            packed_dtype=form.packed_dtype(spec),
            layout=spec.layout,
            entry=operator.name,
            pack=PACK,
            alignment=PACKED_ALIGNMENT,
            splits=noted.get(SPLITS, 1),
            planes=bool(noted.get(PLANES, 0)),
        )
    noted = _annotations(operator, module)
    most = _TASK_BYTES // noted.get(UNIT_BYTES, 1)
    return KernelInterface(
        granule=operator.granule,
        max_tile_units=max(1, min(noted.get(TILE_UNITS, _NAIVE_TILE_UNITS), most)),
        packed_shape=operator.packed_shape(spec, *operator.form(spec, target)),
        packed_dtype=spec.accumulator_dtype,
        layout=spec.layout,
        entry=operator.name,
        pack=PACK,
        alignment=PACKED_ALIGNMENT,
    )


def compile_schedule(spec: DeformConv2dSpec, target: TargetInfo, module: Any) -> Any:
    """Compile a scheduled module, with the function that packs the weight.

    Returns
    -------
    tvm.runtime.Executable
        Exports the operator and ``pack_weight``.

    Raises
    ------
    BuildError
        If TVM refuses.
    """
    return _compile(spec, target, module)[0]


def _compile(spec: DeformConv2dSpec, target: TargetInfo, module: Any) -> tuple[Any, dict[str, Any] | None]:
    """Return the executable, and for a GPU what its compiler said (:meth:`CompiledSource.to_json`)."""
    if target.kind == "cuda":
        executable, compiled = compile_kernels(spec, target, module)
        return executable, compiled.to_json()
    operator = operator_of(spec)
    pack = operator.pack(spec, *operator.form(spec, target)).with_attr("global_symbol", PACK)
    functions = {operator.name: module[operator.name], PACK: pack}
    try:
        return tvm.compile(tvm.IRModule(functions), target=target.to_tvm()), None
    except Exception as error:
        # TVM raises RuntimeError, ValueError and its own classes alike.
        raise _refused(spec, target, error) from error


def compile_kernels(spec: DeformConv2dSpec, target: TargetInfo, module: Any, sass: bool = True) -> tuple[Any, Any]:
    """Compile a scheduled module for a GPU, with the function that packs the weight.

    Returns
    -------
    tvm.runtime.Executable, tvmdcn.cuda_compiler.CompiledSource

    Raises
    ------
    BuildError
        If TVM or CUDA's compiler refuses.
    """
    from tvmdcn.cuda_module import compile_module

    try:
        return compile_module(
            device_module(spec, target, module), target.to_tvm(), instruments=(OwnBarriers(),), sass=sass
        )
    except BuildError:
        raise
    except Exception as error:
        raise _refused(spec, target, error) from error


def device_module(spec: DeformConv2dSpec, target: TargetInfo, module: Any) -> Any:
    """Return a scheduled module as it is compiled for a GPU: with its barriers, and ``pack_weight``."""
    operator = operator_of(spec)
    finish = space_of(operator.name, target.kind).finish
    kernel = module[operator.name]
    pack = _device_form(spec).pack(spec).with_attr("global_symbol", PACK)
    return tvm.IRModule({operator.name: kernel if finish is None else finish(kernel), PACK: pack})


@tvm.instrument.pass_instrument
class OwnBarriers:
    """Keeps TVM from adding barriers to kernels whose design space has placed them itself.

    TVM takes any two accesses to shared memory for a conflict, so that a double-buffered pipeline has two or more a
    step where it needs one; and it does not see what a device function reads.
    """

    def should_run(self, module: Any, info: Any) -> bool:
        """Return whether a pass is to run."""
        del module
        return str(info.name) != "s_tir.ThreadSync"


def _refused(spec: DeformConv2dSpec, target: TargetInfo, error: Exception) -> BuildError:
    return BuildError(f"TVM could not compile {spec.operator} {spec.slug} for {target.tag}: {_last_line(error)}")


def write_library(executable: Any, target: TargetInfo, library: Path) -> None:
    """Link what :func:`compile_schedule` returns.

    Beside `library`, a directory is left with the object files, or with links to nothing; none in the system's
    directory of temporary files, where those of a build that is killed would stay.

    Raises
    ------
    BuildError
        If there is no linker for the target, or it fails.
    OSError
        If the directory cannot be made.
    """
    linker = linker_for(target)
    objects = library.with_name("objects")
    objects.mkdir()
    memory = []
    try:
        if hasattr(os, "memfd_create"):
            # LLVM ends the process when it cannot write a file, on a full disk for example. Object files are small.
            for name in ("lib0.o", "devc.o", "launcher.o"):
                memory.append(os.memfd_create(name))
                (objects / name).symlink_to(f"/proc/{os.getpid()}/fd/{memory[-1]}")
        more = []
        if target.kind == "llvm":
            more.append(str(objects / "launcher.o"))
            write_launcher(target.to_tvm(), objects / "launcher.ll", Path(more[0]))
        executable.export_library(str(library), fcompile=linker, workspace_dir=str(objects), addons=more)
    except BuildError:
        raise
    except (RuntimeError, ValueError) as error:  # what TVM and the compiler that it calls say
        # The last line is the command, a long one.
        lines = [line.strip() for line in str(error).splitlines() if line.strip() and "Command line:" not in line]
        raise BuildError(f"{library.name} could not be linked: {' '.join(lines)[:400]}") from error
    finally:
        for descriptor in memory:
            os.close(descriptor)


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:400] if lines else type(error).__name__


def build(
    spec: DeformConv2dSpec,
    target: str | TargetInfo | None = None,
    schedule: str | Decisions = "tuned",
    cache_dir: Path | None = None,
    rebuild: bool = False,
) -> Artifact:
    """Build the kernel of a layer, or find it built.

    Parameters
    ----------
    spec : DeformConv2dSpec or DeformConv2dGradSpec
        What to compute.
    target : str or TargetInfo, optional
        What to compute it on; this machine by default.
    schedule : {"tuned", "default", "naive"} or Decisions
        "tuned": the best record of this signature on the target; else the decisions of the nearest tuned
        signature; else as "default". "default": the design space's own decisions. "naive": the algorithm as it is
        written. Or decisions of your own.
    cache_dir : Path, optional
        TVMDCN_CACHE_DIR by default.
    rebuild : bool
        Compile even if the artifact exists.

    Returns
    -------
    Artifact
        Loads without the compiler.

    Raises
    ------
    SpecError, SpecTypeError
        If an argument is not understood.
    BuildError
        If TVM refuses, or there is no design space for the target.
    ArtifactError
        If the cache directory cannot be used.
    RecordsError
        If the target's records cannot be read.
    """
    if not isinstance(spec, DeformConv2dSpec):
        raise SpecTypeError(
            f"spec must be a DeformConv2dSpec or DeformConv2dGradSpec, got {shown(spec)} of type {type(spec).__name__}."
        )
    if isinstance(schedule, Decisions):
        source, digest = "decisions", _digest(schedule.to_json())
    elif schedule in ("tuned", "default", "naive"):
        source, digest = schedule, ""
    else:
        raise SpecError(f"schedule must be 'tuned', 'default', 'naive' or Decisions, got {shown(schedule)}.")
    info = resolve_target(target)
    key = CacheKey.of(spec, info, source, digest)

    def make(directory: Path) -> tuple[KernelInterface, Mapping[str, Any]]:
        sch, description = _scheduled(spec, info, schedule)
        executable, device = _compile(spec, info, sch.mod)
        write_library(executable, info, directory / "kernel.so")
        if device is not None:
            description["device"] = device
        description["tir"] = sch.mod[operator_of(spec).name].script()
        return interface_of(spec, info, sch.mod), description

    return build_once(key, info, make, cache_dir, rebuild)


def _digest(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def _scheduled(spec: DeformConv2dSpec, target: TargetInfo, schedule: str | Decisions) -> tuple[Any, dict[str, Any]]:
    """Return the scheduled module, and how it came to its schedule, for the manifest."""
    if schedule == "naive":
        return naive_schedule(spec, target), {"source": "naive", "decisions": {}, "trace": ""}
    decisions, source = (schedule, "given") if isinstance(schedule, Decisions) else (None, "default")
    if schedule == "tuned":
        found = TuningRecords.of(target.tag).best(spec)
        if found is not None:
            decisions, source = found.decisions, found.description
        else:
            _log.info("no tuning record for %s %s on %s: default decisions", spec.operator, spec.slug, target.tag)
    sch = new_schedule(spec, target)
    made = space_of(spec.operator, target.kind).schedule(sch, spec, target, decisions)
    return sch, {"source": source, "decisions": made.to_json(), "trace": str(sch.trace)}
