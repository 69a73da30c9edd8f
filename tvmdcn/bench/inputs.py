# SPDX-License-Identifier: Apache-2.0
"""What providers compute on and what must come out: tensors in files, exact results, the error of a result."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tvmdcn.bench.provider import BackwardTensors
from tvmdcn.bench.worker import save_tensors
from tvmdcn.problems import PROBLEMS, REAL_LAYERS, Problem, real_layer
from tvmdcn.reference import expected_output
from tvmdcn.reference_grad import expected_gradients
from tvmdcn.spec import DeformConv2dGradSpec, DeformConv2dSpec
from tvmdcn.tensors import Tensors, make_gradient_tensors, make_tensors, numpy_dtype

__all__ = ["TOLERANCES", "Expected", "Inputs", "relative_error"]

# Above these a result is wrong, not inexact. Correct kernels stay far below: about 1e-6 for float32.
TOLERANCES = {"float64": 1e-9, "float32": 1e-4, "tf32": 1e-2, "float16": 2e-2, "bfloat16": 1e-1}

# The offset's gradient jumps where a sample lies on a row or column of pixels. Nearer than this, in pixels, rounding
# of the place decides the side, and libraries round places differently: each is right.
_JUMP = 1e-4


def relative_error(output: np.ndarray, expected: np.ndarray) -> float:
    """Return the largest absolute difference over the largest absolute value expected.

    Infinite where the shapes differ, or where only one of the two is not finite.
    """
    if output.shape != expected.shape:
        return math.inf
    if not expected.size:
        return 0.0
    same = (output == expected) | (np.isnan(output) & np.isnan(expected))
    with np.errstate(invalid="ignore"):
        difference = np.where(same, 0.0, np.abs(output - expected))
    worst = float(difference.max())
    finite = np.abs(expected[np.isfinite(expected)])
    scale = float(finite.max()) if finite.size else 0.0
    if not math.isfinite(worst):
        return math.inf
    return worst / scale if scale else (0.0 if worst == 0 else math.inf)


@dataclass(frozen=True)
class Expected:
    """The exact results of a problem, by the names of the outputs.

    Parameters
    ----------
    results : mapping of str to ndarray
        float64.
    jumps : ndarray of bool, optional
        Where the offset's gradient is not compared.
    """

    results: Mapping[str, np.ndarray]
    jumps: np.ndarray | None = None

    def error_of(self, found: Mapping[str, np.ndarray]) -> tuple[float, str]:
        """Return the worst of the relative errors of results, each in units of its own, and whose it is.

        Infinite if one is missing.
        """
        errors = {name: self._error(name, found.get(name)) for name in self.results}
        worst = max(errors, key=lambda name: errors[name])
        return errors[worst], worst

    def _error(self, name: str, found: np.ndarray | None) -> float:
        exact = self.results[name]
        if found is None or found.shape != exact.shape:
            return math.inf
        if name == "grad_offset" and self.jumps is not None:
            found = np.where(self.jumps, exact, found)
        return relative_error(found, exact)

    def save(self, path: Path) -> None:
        """Write the results to a file."""
        arrays: dict[str, Any] = {**self.results} if self.jumps is None else {**self.results, "jumps": self.jumps}
        np.savez(path, **arrays)

    @classmethod
    def read(cls, path: Path) -> Expected:
        """Read what :meth:`save` wrote."""
        with np.load(path, allow_pickle=False) as data:
            arrays = dict(data)
        return cls({name: array for name, array in arrays.items() if name != "jumps"}, arrays.get("jumps"))


class Inputs:
    """The tensors of the problems of one comparison, made once and written to files.

    Parameters
    ----------
    folder : Path
        Where the files go.
    seed : int
        Of the made-up tensors.
    real_layers : Path, optional
        Folder with the tensors of the real layers, used for these instead of made-up ones.
    """

    def __init__(self, folder: Path, seed: int, real_layers: Path | None) -> None:
        self._folder, self._seed, self._real_layers = folder, seed, real_layers
        self._made: dict[Problem, Path] = {}

    def of(self, problem: Problem) -> tuple[Path, Expected]:
        """Return the folder of a problem's tensors, and its exact results.

        Raises
        ------
        SpecError, OSError
            If the tensors cannot be made, or not be read.
        """
        if problem not in self._made:
            tensors = self._tensors(problem)
            folder = self._folder / str(len(self._made))
            folder.mkdir()
            save_tensors(folder, BackwardTensors(**{**dict.fromkeys(("mask", "bias", "grad_output")), **tensors}))
            _expect(problem, tensors).save(folder / "expected.npz")
            self._made[problem] = folder
        # The results of a sweep's larger images would fill the memory.
        return self._made[problem], Expected.read(self._made[problem] / "expected.npz")

    def kind_of(self, problem: Problem) -> str:
        """Return whether a problem's tensors are ``real`` or ``made`` up: a real layer's are of one size."""
        named = PROBLEMS.get(problem.forward.name)
        if self._real_layers is None or problem.forward.name not in REAL_LAYERS or named is None:
            return "made"
        same = dataclasses.replace(problem.forward.spec, dtype=named.spec.dtype, layout=named.spec.layout)
        return "real" if (same, problem.extents) == (named.spec, named.extents) else "made"

    def _tensors(self, problem: Problem) -> dict[str, Any]:
        layer, backward = problem.forward, isinstance(problem.spec, DeformConv2dGradSpec)
        if self.kind_of(problem) == "real":
            assert self._real_layers is not None
            tensors = _converted(real_layer(layer.name, self._real_layers)[0], layer.spec)
        else:
            tensors = vars(make_tensors(layer.spec, layer.extents, self._seed))
        if backward:
            drawn = make_gradient_tensors(problem.spec, problem.extents, self._seed)
            tensors = {**tensors, "grad_output": drawn["grad_output"]}
        return {name: array for name, array in tensors.items() if array is not None}


def _converted(tensors: Tensors, spec: DeformConv2dSpec) -> dict[str, Any]:
    """Return NCHW tensors in the dtype and the layout of a specification."""
    arrays = {}
    for name, array in vars(tensors).items():
        moved = array is not None and spec.layout == "NHWC" and name in ("input", "offset", "mask")
        ordered = array.transpose(0, 2, 3, 1) if moved else array
        arrays[name] = None if ordered is None else np.ascontiguousarray(ordered, numpy_dtype(spec.dtype))
    return arrays


def _expect(problem: Problem, tensors: Mapping[str, np.ndarray]) -> Expected:
    spec = problem.spec
    if not isinstance(spec, DeformConv2dGradSpec):
        return Expected(expected_output(spec, tensors))
    # All that is added to an offset to give a place is whole.
    offset = tensors["offset"].astype(np.float64)
    return Expected(expected_gradients(spec, tensors), np.abs(offset - np.rint(offset)) < _JUMP)
