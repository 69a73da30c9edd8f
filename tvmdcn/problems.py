# SPDX-License-Identifier: Apache-2.0
"""Named layers: what tests, tuning and benchmarks share.

:data:`PROBLEMS` holds the layers that figures are quoted for, each with where its shape comes from;
:data:`TEST_PROBLEMS` small ones in which nothing is symmetric. A problem can also be written as text, see
:func:`parse_problem`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from tvmdcn.errors import SpecError
from tvmdcn.spec import DeformConv2dGradSpec, DeformConv2dSpec, Extents
from tvmdcn.tensors import Tensors, make_tensors, numpy_dtype
from tvmdcn.validation import check_int, shown

__all__ = [
    "PROBLEMS",
    "REAL_LAYERS",
    "TEST_PROBLEMS",
    "Problem",
    "Tensors",
    "load_problem_file",
    "make_tensors",
    "numpy_dtype",
    "of_operators",
    "parse_problem",
    "problem_text",
    "real_layer",
]


@dataclass(frozen=True)
class Problem:
    """A layer, or its gradients, and the size of image it is asked about.

    Parameters
    ----------
    name : str
    spec, extents
        What is computed, of which size.
    source : str
        Where it comes from, in words.
    count : int
        How often a model calls it; no part of what the layer is.
    """

    name: str
    spec: DeformConv2dSpec
    extents: Extents
    source: str
    count: int = field(default=1, compare=False)

    @property
    def backward(self) -> Problem:
        """All gradients of the layer."""
        return replace(self, name=f"{self.name} backward", spec=DeformConv2dGradSpec.of(self.spec))

    @property
    def forward(self) -> Problem:
        """The layer, of its gradients too."""
        if not isinstance(self.spec, DeformConv2dGradSpec):
            return self
        return replace(self, name=self.name.removesuffix(" backward"), spec=self.spec.layer)


OPERATORS = ("deform_conv2d", "deform_conv2d_grad", "all")
"""What commands may be asked to do with the layers they are given."""


def of_operators(problems: Iterable[Problem], operator: str) -> list[Problem]:
    """Return the problems of one operator, or each as it is and then backward, for a list of layers."""
    return [
        asked
        for problem in problems
        for name, asked in ((OPERATORS[0], problem), (OPERATORS[1], problem.backward))
        if operator in (name, "all")
    ]


def _table(*rows: tuple[str, tuple[int, int, int, int, int], dict[str, Any], str]) -> dict[str, Problem]:
    """Return problems by name, from (name, (N, Cin, H, W, Cout), other fields of the spec, source)."""
    table = {}
    for name, (batch, in_channels, height, width, out_channels), fields, source in rows:
        spec = DeformConv2dSpec(in_channels, out_channels, **{"padding": 1, **fields})
        table[name] = Problem(name, spec, Extents(batch, height, width), source)
    return table


# Maps of real layers whose tensors are shared beside the repository, by the stem of their file.
REAL_LAYERS = {
    "aliked_b3c1": "aliked_n16_tum_block3_conv1",
    "aliked_b3c2": "aliked_n16_tum_block3_conv2",
    "aliked_b4c1": "aliked_n16_tum_block4_conv1",
    "aliked_b4c2": "aliked_n16_tum_block4_conv2",
}

PROBLEMS = _table(
    ("r50_c3", (1, 128, 64, 64, 128), {}, "ResNet-50-DCN stage c3 (stride 8) of a 512x512 image"),
    ("r50_c4", (1, 256, 32, 32, 256), {}, "ResNet-50-DCN stage c4 (stride 16) of a 512x512 image"),
    ("r50_c5", (1, 512, 16, 16, 512), {}, "ResNet-50-DCN stage c5 (stride 32) of a 512x512 image"),
    ("r50_c4_det", (1, 256, 50, 84, 256), {}, "ResNet-50-DCN stage c4 of a detector's 800x1344 image"),
    (
        "r50_c3_s2",
        (1, 128, 64, 64, 128),
        {"stride": 2},
        "a downsampling layer of ResNet-50-DCN, 64x64 to 32x32",
    ),
    ("yolact_p3", (1, 128, 69, 69, 128), {}, "YOLACT++ ResNet-50, 69x69 map (stride 8) of a 550x550 image"),
    (
        "edvr_align",
        (1, 64, 128, 128, 64),
        {"offset_groups": 8},
        "EDVR alignment of 64 channels, 128x128 frames",
    ),
    (
        "basicvsr_align",
        (1, 128, 64, 64, 64),
        {"offset_groups": 16},
        "BasicVSR++ second-order alignment, 2 x 64 channels, 64x64 frames",
    ),
    ("rpn_dcnv1", (1, 256, 64, 64, 256), {"mask": False}, "DCNv1 on a 256-channel pyramid level (stride 8)"),
    ("grouped32", (1, 256, 32, 32, 256), {"groups": 32}, "ResNeXt-style 32 groups at stage c4"),
    ("batch8_c5", (8, 512, 16, 16, 512), {}, "ResNet-50-DCN stage c5, eight 512x512 images"),
    ("deft", (1, 64, 64, 64, 64), {}, "a narrow layer of 64 channels, as in upsampling heads of detectors"),
    (
        "yolact_c3",
        (1, 128, 138, 138, 128),
        {"stride": 2},
        "YOLACT++ ResNet-50 stage c3, first block, 550x550",
    ),
    ("yolact_c4", (1, 256, 35, 35, 256), {}, "YOLACT++ ResNet-50 stage c4 of a 550x550 image"),
    ("yolact_c5", (1, 512, 18, 18, 512), {}, "YOLACT++ ResNet-50 stage c5 of a 550x550 image"),
    ("aliked_b3c1", (1, 32, 60, 80, 64), {"mask": False}, "ALIKED-n16 block 3 conv 1 on a 640x480 image"),
    ("aliked_b3c2", (1, 64, 60, 80, 64), {"mask": False}, "ALIKED-n16 block 3 conv 2 on a 640x480 image"),
    ("aliked_b4c1", (1, 64, 15, 20, 128), {"mask": False}, "ALIKED-n16 block 4 conv 1 on a 640x480 image"),
    ("aliked_b4c2", (1, 128, 15, 20, 128), {"mask": False}, "ALIKED-n16 block 4 conv 2 on a 640x480 image"),
)

# torchvision's own test problem: no two sizes of it are alike, so that no exchange of axes goes unseen.
_ASYMMETRIC: dict[str, Any] = {
    "kernel_size": (3, 2),
    "stride": (2, 1),
    "padding": (1, 0),
    "dilation": (2, 1),
    "groups": 2,
    "offset_groups": 3,
}
# Sixteen channels and more let vectorised code paths run; the rest of the shape stays small and uneven.
_WIDE: dict[str, Any] = {"padding": (1, 2, 0, 1), "stride": (1, 2)}

TEST_PROBLEMS = _table(
    ("asymmetric", (33, 6, 5, 4, 2), _ASYMMETRIC, "torchvision's test of the operator, batch 33"),
    ("asymmetric_single", (1, 6, 5, 4, 2), _ASYMMETRIC, "torchvision's test of the operator, batch 1"),
    ("asymmetric_empty", (0, 6, 5, 4, 2), _ASYMMETRIC, "torchvision's test of the operator, batch 0"),
    ("asymmetric_v1", (2, 6, 5, 4, 2), {**_ASYMMETRIC, "mask": False}, "the same without a mask"),
    ("asymmetric_nhwc", (2, 6, 5, 4, 2), {**_ASYMMETRIC, "layout": "NHWC"}, "the same, channels last"),
    ("uneven_padding", (2, 8, 7, 9, 12), _WIDE, "padding that differs on all four sides"),
    ("row", (1, 3, 1, 11, 5), {"kernel_size": (1, 3), "padding": (0, 1)}, "an image of one row"),
    ("column", (2, 3, 11, 1, 5), {"kernel_size": (3, 1), "padding": (1, 0)}, "an image of one column"),
    ("pixel", (3, 4, 1, 1, 4), {"kernel_size": 1, "padding": 0}, "one pixel, one tap"),
    ("pointwise", (1, 20, 6, 7, 33), {"kernel_size": 1, "padding": 0}, "one tap, 33 output channels"),
    ("depthwise", (1, 24, 9, 8, 24), {"groups": 24}, "one channel per group"),
    ("depthwise_double", (2, 5, 8, 9, 10), {"groups": 5, "kernel_size": (5, 3)}, "two outputs per group"),
    ("grouped", (1, 32, 9, 10, 48), {"groups": 4, "offset_groups": 2}, "groups that hold no offset group"),
    ("many_offset_groups", (1, 32, 9, 10, 16), {"offset_groups": 16}, "two channels per offset group"),
    ("offset_group_each", (1, 7, 9, 10, 4), {"offset_groups": 7}, "one channel per offset group"),
    ("straddling", (1, 12, 6, 5, 8), {"groups": 4, "offset_groups": 3}, "offset groups across group borders"),
    ("wide", (1, 80, 13, 11, 72), {"stride": (2, 1)}, "channels that are no power of two"),
    ("dilated", (1, 17, 12, 14, 19), {"dilation": (3, 2), "padding": (3, 2)}, "prime channels, dilation"),
    ("large_kernel", (1, 4, 11, 9, 6), {"kernel_size": (7, 5), "padding": (3, 2)}, "35 taps"),
    ("wide_nhwc", (2, 48, 9, 7, 40), {"layout": "NHWC", **_WIDE}, "channels last, uneven padding"),
    ("float64", (2, 10, 7, 6, 9), {"dtype": "float64"}, "double precision"),
    ("float16", (1, 32, 9, 11, 24), {"dtype": "float16"}, "half precision in memory"),
    ("bfloat16", (1, 32, 9, 11, 24), {"dtype": "bfloat16"}, "bfloat16 in memory"),
)


def real_layer(name: str, folder: str | Path) -> tuple[Tensors, np.ndarray]:
    """Read the tensors of a real layer and its exact output.

    Parameters
    ----------
    name : str
        One of :data:`REAL_LAYERS`; its specification is ``PROBLEMS[name]``.
    folder : str or Path
        Where the ``.npz`` files are.

    Returns
    -------
    Tensors
        float32, NCHW, without mask and bias.
    ndarray
        The output, computed in float64 and rounded to float32.

    Raises
    ------
    SpecError
        If there is no such layer, or its tensors are not of the layer's shapes.
    FileNotFoundError
        If its file is not in the folder.
    """
    if name not in REAL_LAYERS:
        raise SpecError(f"{name!r} is no real layer; there are {', '.join(REAL_LAYERS)}.")
    problem = PROBLEMS[name]
    with np.load(Path(folder) / f"{REAL_LAYERS[name]}.npz") as data:
        tensors = Tensors(data["input"], data["offset"], data["weight"], None, None)
        output = data["output_float64_rounded"]
    found = (tensors.input.shape, tensors.offset.shape, tensors.weight.shape, output.shape)
    spec, extents = problem.spec, problem.extents
    expected = (
        spec.input_shape(extents),
        spec.offset_shape(extents),
        spec.weight_shape,
        spec.output_shape(extents),
    )
    if found != expected:
        raise SpecError(f"the tensors of real layer {name} have shapes {found}, expected {expected}.")
    return tensors, output


_FORM = (
    "'N,Cin,H,W,Cout' with optional ',k=3x3,s=1x1,p=1,d=1,g=1,og=1,mask=1,dtype=float32,layout=NCHW', "
    "for example '1,256,32,32,256,p=1,og=4'"
)
_OPTIONS = {
    "k": "kernel_size",
    "s": "stride",
    "p": "padding",
    "d": "dilation",
    "g": "groups",
    "og": "offset_groups",
    "mask": "mask",
    "dtype": "dtype",
    "layout": "layout",
    "tf32": "tf32",
}


def parse_problem(text: str) -> Problem:
    """Return the problem that a text names or describes.

    Parameters
    ----------
    text : str
        A name of :data:`PROBLEMS` or :data:`TEST_PROBLEMS`, or ``N,Cin,H,W,Cout`` followed by any of
        ``k=3x3`` (kernel), ``s`` (stride), ``p`` (padding: one number, ``1x0``, or top, left, bottom, right
        as ``1x0x1x0``), ``d`` (dilation), ``g`` (groups), ``og`` (offset groups), ``mask`` (0 or 1),
        ``dtype``, ``layout``. Left out, the kernel is 3x3, the padding keeps the size at stride 1 for odd
        kernels, and there is a mask.

    Raises
    ------
    SpecError, SpecTypeError
        If the text is neither, or describes no possible layer.
    """
    text = text.strip()
    for table in (PROBLEMS, TEST_PROBLEMS):
        if text in table:
            return table[text]
    parts = [part.strip() for part in text.split(",")]
    sizes = [part for part in parts if "=" not in part]
    if len(parts) == 1 or len(sizes) != 5 or parts[:5] != sizes or not all(map(_is_number, sizes)):
        names = ", ".join(PROBLEMS)
        raise SpecError(f"problem {shown(text)} is neither a name nor of the form {_FORM}. Names: {names}.")
    batch, in_channels, height, width, out_channels = map(int, sizes)
    fields: dict[str, Any] = {}
    for part in parts[5:]:
        key, _, value = part.partition("=")
        if key not in _OPTIONS or _OPTIONS[key] in fields:
            what = "given twice" if key in _OPTIONS else f"not one of {', '.join(_OPTIONS)}"
            raise SpecError(f"{key} in problem {shown(text)} is {what}. The form is {_FORM}.")
        fields[_OPTIONS[key]] = _option(key, value, text)
    if "padding" not in fields:
        kernel, dilation = (fields.get(name, default) for name, default in (("kernel_size", 3), ("dilation", 1)))
        pairs = [(value, value) if isinstance(value, int) else value for value in (kernel, dilation)]
        fields["padding"] = _same_padding(*pairs)
    spec = DeformConv2dSpec(in_channels, out_channels, **fields)
    extents = Extents(batch, height, width)
    spec.output_size(height, width)
    return Problem(text, spec, extents, "described on request")


def problem_text(spec: DeformConv2dSpec, extents: Extents) -> str:
    """Return the description from which :func:`parse_problem` makes the same layer."""
    top, left, bottom, right = spec.padding
    padding = (top, left, bottom, right) if (top, left) != (bottom, right) else (top, left)
    given = {
        "k": (spec.kernel_size, (3, 3)),
        "s": (spec.stride, (1, 1)),
        "p": (padding, _same_padding(spec.kernel_size, spec.dilation)),
        "d": (spec.dilation, (1, 1)),
        "g": (spec.groups, 1),
        "og": (spec.offset_groups, 1),
        "mask": (int(spec.mask), 1),
        "dtype": (spec.dtype, "float32"),
        "layout": (spec.layout, "NCHW"),
        "tf32": (int(spec.tf32), 0),
    }
    sizes = (extents.batch, spec.in_channels, extents.height, extents.width, spec.out_channels)
    options = (
        f"{key}={'x'.join(map(str, value)) if isinstance(value, tuple) else value}"
        for key, (value, default) in given.items()
        if value != default
    )
    return ",".join((*map(str, sizes), *options))


def _same_padding(kernel: tuple[int, int], dilation: tuple[int, int]) -> tuple[int, int]:
    """Return the padding that keeps the size at stride 1 for odd kernels."""
    vertical, horizontal = (max(d * (k - 1) // 2, 0) for k, d in zip(kernel, dilation, strict=True))
    return vertical, horizontal


def _is_number(text: str) -> bool:
    """Whether a text is a number that fits an index; Python refuses to convert thousands of digits."""
    return re.fullmatch(r"[0-9]{1,18}", text) is not None


def _option(key: str, value: str, text: str) -> Any:
    """Return the value of one ``key=value`` of a problem's description."""
    if key in ("dtype", "layout"):
        return value
    if key in ("mask", "tf32"):
        if value not in ("0", "1"):
            raise SpecError(f"{key} in problem {shown(text)} must be 0 or 1, got {value!r}.")
        return value == "1"
    counts = (1,) if key in ("g", "og") else (1, 2) if key != "p" else (1, 2, 4)
    parts = value.split("x")
    if len(parts) not in counts or not all(map(_is_number, parts)):
        raise SpecError(f"{key} in problem {shown(text)} must look like 1 or 2x1, got {value!r}. The form is {_FORM}.")
    numbers = tuple(map(int, parts))
    return numbers if len(numbers) > 1 else numbers[0]


def load_problem_file(path: str | Path) -> list[Problem]:
    """Read a list of problems from a JSON or TOML file.

    Parameters
    ----------
    path : str or Path
        ``.json``: a list, or an object with the list as ``problems``. ``.toml``: an array ``problems``.
        Each item is a text for :func:`parse_problem`, or a table of ``problem`` (such a text) and, if wanted,
        ``name`` and ``count`` (how often a model calls it).

    Raises
    ------
    SpecError, SpecTypeError
        If the file is not of this form, with the item that is wrong.
    OSError
        If the file cannot be read.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        data = _parse_toml(text) if path.suffix == ".toml" else json.loads(text)
    except SpecError:
        raise
    except (ValueError, RecursionError) as error:  # also TOMLDecodeError and UnicodeDecodeError
        raise SpecError(f"{path} is not valid {path.suffix.lstrip('.') or 'json'}: {error}") from error
    items = data.get("problems") if isinstance(data, Mapping) else data
    if not isinstance(items, list) or not items:
        raise SpecError(f"{path} must hold a list of problems, not empty, as itself or under 'problems'.")
    problems = []
    for index, item in enumerate(items):
        entry = {"problem": item} if isinstance(item, str) else item
        if (
            not isinstance(entry, Mapping)
            or not {"problem"} <= set(entry) <= {"problem", "name", "count"}
            or not all(isinstance(entry.get(name, ""), str) for name in ("problem", "name"))
        ):
            raise SpecError(
                f"{path}, item {index}: expected a text or {{'name', 'problem', 'count'}}, got {shown(item)}."
            )
        problem = parse_problem(entry["problem"])
        name, source = entry.get("name", problem.name), f"{path.name}, item {index}"
        count = check_int(f"{path}, item {index}: count", entry.get("count", 1), 1)
        problems.append(Problem(name, problem.spec, problem.extents, source, count))
    return problems


def _parse_toml(text: str) -> dict[str, Any]:
    try:
        import tomllib
    except ImportError as error:
        raise SpecError("reading .toml needs Python 3.11 or newer; write the list as .json.") from error
    return tomllib.loads(text)
