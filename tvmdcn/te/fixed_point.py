# SPDX-License-Identifier: Apache-2.0
"""The input's gradient in fixed point, for results that do not depend on the order in which threads add.

Additions of integers do not. So a contribution is rounded to a whole number of units and added as an integer of 64
bits. The unit is a power of two, found on the device: with the largest exponents of the output's gradient, the weight
and the mask, no sum can be too large for its integer, since an element of the image gets at most one contribution of
each sample (output pixel and tap) of its image. What is not finite is left out of the exponents and added to floats:
sums of infinities and NaN do not depend on their order either.

Stages, in order: ``fixed_zero``, ``bound_zero``, ``bound_rows``, ``bound_weight``, ``bound_mask``, ``bound_unit``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import TYPE_CHECKING, Any

from tvm import tirx

from tvmdcn.te.fragments import DeviceFunction, address_of
from tvmdcn.te.nests import block_nest, region, serial
from tvmdcn.te.products import product_of
from tvmdcn.te.tiles import cast

if TYPE_CHECKING:
    from tvmdcn.spec import DeformConv2dGradSpec

__all__ = ["THREADS", "add_fixed", "bound_stages", "from_fixed", "unit_of"]

Expr = Any

THREADS = 256
"""Of a block that looks for the largest exponent."""
_ROWS = 16
"""Pixels that such a block looks at."""
# What is added to exponents where they are kept as unsigned integers; 0 is less than any.
_BIAS = 2048
_UNIT = 3
_KINDS = {"float32": "float", "float64": "double"}

_RAISE = DeviceFunction(
    "tvmdcn_raise",
    """\
__device__ __forceinline__ void tvmdcn_raise(unsigned* bound, unsigned value) {
  for (int apart = 16; apart > 0; apart /= 2) value = max(value, __shfl_xor_sync(0xffffffffu, value, apart));
  if ((threadIdx.x & 31) == 0) atomicMax(bound, value);
}
""",
)
"""Raises a bound to the largest value of a warp, all of whose lanes take part."""

_SET_UNIT = DeviceFunction(
    "tvmdcn_set_unit",
    f"""\
__device__ __forceinline__ void tvmdcn_set_unit(unsigned* bounds, int masked, int beyond, long long samples) {{
  int exponent = (int)bounds[0] + (int)bounds[1] - {2 * _BIAS} + beyond;
  if (masked) exponent += (int)bounds[2] - {_BIAS};
  while (samples > 1) {{ exponent += 1; samples = (samples + 1) / 2; }}
  bounds[{_UNIT}] = (unsigned)(min(max(62 - exponent, -1000), 1000) + {_BIAS});
}}
""",
)
"""Sets how many times a number is doubled to be counted in units. `beyond`: of the sum that a contribution is."""


def _exponent(dtype: str) -> DeviceFunction:
    """Return ``exponent(x)``: of the least power of two above `x`, plus `_BIAS`; 0 if `x` is not finite."""
    kind = _KINDS[dtype]
    name = f"tvmdcn_exponent_{kind}"
    bits, shift, most = ("__float_as_uint(x)", 23, 255) if kind == "float" else ("__double_as_longlong(x)", 52, 2047)
    return DeviceFunction(
        name,
        f"__device__ __forceinline__ unsigned {name}({kind} x) {{\n"
        f"  int exponent = (int)({bits} >> {shift}) & {most};\n"
        f"  return exponent == {most} ? 0u : (unsigned)(exponent + {_BIAS - most // 2 + 1});\n"
        "}\n",
        "uint32",
    )


def add_fixed(dtype: str) -> DeviceFunction:
    """Return ``add(fixed, whole, value, unit)``: adds to the integer, or to the float what is not finite."""
    kind = _KINDS[dtype]
    name = f"tvmdcn_add_fixed_{kind}"
    return DeviceFunction(
        name,
        f"__device__ __forceinline__ void {name}(void* fixed, {kind}* whole, {kind} value, unsigned unit) {{\n"
        "  if (value - value == 0) {\n"
        f"    double scale = __longlong_as_double((long long)(unit - {_BIAS - 1023}) << 52);\n"
        "    atomicAdd((unsigned long long*)fixed, (unsigned long long)(long long)rint((double)value * scale));\n"
        "  } else {\n"
        "    atomicAdd(whole, value);\n"
        "  }\n"
        "}\n",
    )


def from_fixed(dtype: str) -> DeviceFunction:
    """Return ``value(fixed, whole, unit)``: the sum of both."""
    kind = _KINDS[dtype]
    name = f"tvmdcn_from_fixed_{kind}"
    return DeviceFunction(
        name,
        f"__device__ __forceinline__ {kind} {name}(long long fixed, {kind} whole, unsigned unit) {{\n"
        f"  return whole + ({kind})((double)fixed * __longlong_as_double((long long)({_BIAS + 1023} - unit) << 52));\n"
        "}\n",
        dtype,
    )


def unit_of(bounds: tirx.Buffer) -> Expr:
    """Return the unit, as the functions above take it."""
    return tirx.BufferLoad(bounds, [_UNIT])


def bound_stages(spec: DeformConv2dGradSpec, at: Mapping[str, tirx.Buffer]) -> list[tirx.Stmt]:
    """Return the stages that find the unit.

    Parameters
    ----------
    spec : DeformConv2dGradSpec
    at : mapping of str to Buffer
        "rows", "weight" (packed), "mask", "bounds", and the sizes of the call.
    """
    bounds, offset, total = at["bounds"], at["offset"], at["total"]
    nchw = spec.layout == "NCHW"
    pixels = offset.shape[2 if nchw else 1]
    whole = region(bounds, (0, 4))
    taps = spec.offset_groups * spec.taps

    def row(r: Expr, c: Expr) -> list[Expr]:
        return [cast(tirx.BufferLoad(at["rows"], [r.astype("int64"), c]), spec.dtype, spec.accumulator_dtype)]

    def modulation(r: Expr, c: Expr) -> list[Expr]:
        number = r // pixels.astype("int32")
        q = r - number * pixels.astype("int32")
        value = tirx.BufferLoad(at["mask"], [number, c, q] if nchw else [number, q, c])
        return [cast(value, spec.dtype, spec.accumulator_dtype)]

    weight = at["weight"]
    columns = prod(int(extent) for extent in weight.shape[2:])
    found = [
        block_nest(
            "bound_zero",
            [("i", 4)],
            lambda i: [],
            lambda i: [region(bounds, i)],
            lambda i: tirx.BufferStore(bounds, tirx.const(0, "uint32"), [i]),
        ),
        _largest(spec, "bound_rows", bounds, 0, total, spec.out_channels, row),
        _largest(
            spec,
            "bound_weight",
            bounds,
            1,
            int(weight.shape[0]) * int(weight.shape[1]),
            columns,
            lambda r, c: _weights(spec, weight, r, c),
        ),
    ]
    if spec.mask:
        found.append(_largest(spec, "bound_mask", bounds, 2, total, taps, modulation))
    # A sum over the output channels of a group, and one more for what roundings may add.
    beyond = (spec.out_channels // spec.groups - 1).bit_length() + 1
    samples = pixels.astype("int64") * spec.taps
    found.append(
        block_nest(
            "bound_unit",
            [("i", 1)],
            lambda i: [whole],
            lambda i: [],
            lambda i: _SET_UNIT(address_of(bounds, i), int(spec.mask), beyond, samples),
        )
    )
    return found


def _weights(spec: DeformConv2dGradSpec, weight: tirx.Buffer, r: Expr, c: Expr) -> list[Expr]:
    """Return the numbers of an element of the packed weight."""
    index, rest = [r // int(weight.shape[1]), r % int(weight.shape[1])], c
    for axis in range(2, len(weight.shape)):
        below = prod(int(extent) for extent in weight.shape[axis + 1 :])
        index.append(rest // below)
        rest = rest % below
    value = tirx.BufferLoad(weight, index)
    fragments = product_of(spec).fragments
    if fragments is None:
        return [value]
    if fragments.packing == 1:
        return [tirx.reinterpret("float32", value)]
    half, low = tirx.const(16, "uint32"), tirx.const(0xFFFF, "uint32")
    if spec.dtype == "bfloat16":
        return [tirx.reinterpret("float32", value << half), tirx.reinterpret("float32", value & (low << half))]
    parts = [value & low, value >> half]
    return [tirx.reinterpret("float16", part.astype("uint16")).astype("float32") for part in parts]


def _largest(
    spec: DeformConv2dGradSpec,
    name: str,
    bounds: tirx.Buffer,
    slot: int,
    rows: Expr,
    columns: int,
    values: Callable[[Expr, Expr], list[Expr]],
) -> tirx.Stmt:
    """Return the stage that raises a bound to the largest exponent of ``values(row, column)``."""
    best = tirx.decl_buffer((1,), "uint32", name="largest", scope="local")
    exponent = _exponent(spec.accumulator_dtype)
    size = _ROWS * columns

    def body(i: Expr, t: Expr) -> tirx.Stmt:
        e = tirx.Var("e", "int32")
        within = e * THREADS + t
        row, column = i * _ROWS + within // columns, within % columns
        there = tirx.all(within < size, row < rows) if size % THREADS else row < rows
        code = [
            tirx.BufferStore(best, tirx.max(tirx.BufferLoad(best, [0]), exponent(value)), [0])
            for value in values(row, column)
        ]
        step = tirx.IfThenElse(there, tirx.SeqStmt(code) if len(code) > 1 else code[0], None)
        return tirx.SeqStmt(
            [
                tirx.BufferStore(best, tirx.const(0, "uint32"), [0]),
                serial(e, -(-size // THREADS), step),
                _RAISE(address_of(bounds, slot), tirx.BufferLoad(best, [0])),
            ]
        )

    axes = [("i", (rows + _ROWS - 1) // _ROWS), ("t", THREADS)]
    return block_nest(name, axes, lambda *_: [], lambda *_: [], body, [best])
