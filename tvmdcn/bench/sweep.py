# SPDX-License-Identifier: Apache-2.0
"""Layers in other dtypes, other layouts, and at several sizes."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from tvmdcn.errors import SpecError
from tvmdcn.problems import Problem
from tvmdcn.spec import Extents

__all__ = ["axes_of", "parse_size", "vary"]


def parse_size(text: str) -> tuple[int, int]:
    """Return the height and the width that a text such as ``64`` or ``48x64`` names.

    Raises
    ------
    ValueError
        If it names none.
    """
    found = re.fullmatch(r"(\d{1,6})(?:x(\d{1,6}))?", text.strip())
    sizes = [int(part or found[1]) for part in found.groups()] if found else []
    if not sizes or min(sizes) < 1:
        raise ValueError(f"{text!r} is neither a size such as 64 nor a height and a width such as 48x64.")
    return sizes[0], sizes[1]


def axes_of(batches: Sequence[int], image_sizes: Sequence[tuple[int, int]]) -> tuple[str, ...]:
    """Return along what sizes are varied, as rows name it."""
    return (*(("batch",) if batches else ()), *(("image_size",) if image_sizes else ()))


def vary(
    problems: Sequence[Problem],
    dtypes: Sequence[str] = (),
    layouts: Sequence[str] = (),
    batches: Sequence[int] = (),
    image_sizes: Sequence[tuple[int, int]] = (),
) -> list[Problem]:
    """Return the problems in each dtype and layout, at each batch and image size; what is not given stays.

    Raises
    ------
    SpecError
        If an image is too small for a layer.
    """
    varied = []
    for problem in problems:
        for dtype in dtypes or (problem.spec.dtype,):
            for layout in layouts or (problem.spec.layout,):
                spec = dataclasses.replace(problem.spec, dtype=dtype, layout=layout)
                for batch in batches or (problem.extents.batch,):
                    for height, width in image_sizes or ((problem.extents.height, problem.extents.width),):
                        extents = Extents(batch, height, width)
                        try:
                            spec.output_size(height, width)
                        except SpecError as error:
                            raise SpecError(f"{problem.name} at {height}x{width}: {error}") from error
                        varied.append(dataclasses.replace(problem, spec=spec, extents=extents))
    return list(dict.fromkeys(varied))
