# SPDX-License-Identifier: Apache-2.0
"""Products on tensor cores: what a warp's lanes hold, and the instructions that work on it.

A tile of 16 x 16 results is made by two ``mma.sync`` of 16 x 8, whose operands are spread over the 32 lanes of a warp
as NVIDIA's PTX manual draws them ("Matrix Fragments for mma.m16n8k16 / m16n8k8"). The left operand is read from shared
memory by ``ldmatrix``; the right one, the weight, is packed so that each lane finds its elements side by side and reads
them with one vector load.

The instructions are device functions with inline assembly; the emulator of the tests knows them by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import tirx

__all__ = [
    "BARRIER",
    "COPY_16",
    "LANES",
    "LDMATRIX",
    "ROUND_WORDS",
    "SEEN",
    "SYNC_WARP",
    "TILE",
    "TO_TF32",
    "WAIT_COPIES",
    "WORDS",
    "DeviceFunction",
    "Fragments",
    "add_in_memory",
    "address_of",
    "fragments_of",
    "sum_corners",
    "sum_lanes",
    "thread_loop",
]

Expr = Any

LANES = 32
"""Threads of a warp."""
TILE = 16
"""Rows and columns of a tile of results."""


@dataclass(frozen=True)
class DeviceFunction:
    """A CUDA device function that comes with its source.

    Attributes
    ----------
    name, source : str
    result : str
        Its dtype, or "void".
    """

    name: str
    source: str
    result: str = "void"

    def __call__(self, *args: Expr) -> Any:
        """Return the call: a statement if it has no result."""
        call = tirx.call_intrin(self.result, "tirx.cuda.func_call", self.name, *args, self.source)
        return tirx.Evaluate(call) if self.result == "void" else call


def address_of(buffer: tirx.Buffer, *index: Expr) -> Expr:
    """Return the address of an element. Unlike a pointer with an offset it survives that the buffer is made smaller."""
    return tirx.address_of(tirx.BufferLoad(buffer, list(index)))


def _mma(name: str, shape: str, kind: str) -> DeviceFunction:
    """Return the device function around ``mma.sync``: results[4] += left[4 words] * right[2 words]."""
    words = [f"unsigned {word}" for word in ("a0", "a1", "a2", "a3", "b0", "b1")]
    operands = [f'"r"({word[-2:]})' for word in words]
    return DeviceFunction(
        name,
        f"__device__ __forceinline__ void {name}(float* c, {', '.join(words)}) {{\n"
        f'  asm volatile("mma.sync.aligned.{shape}.row.col.f32.{kind}.{kind}.f32 {{%0,%1,%2,%3}}, '
        '{%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"\n'
        f'               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : {", ".join(operands)});\n'
        "}\n",
    )


LDMATRIX = DeviceFunction(
    "tvmdcn_ldmatrix",
    """\
__device__ __forceinline__ void tvmdcn_ldmatrix(unsigned* r, unsigned*, const void* row) {
  unsigned at = (unsigned)__cvta_generic_to_shared(row);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
}
""",
)
"""Reads four 8 x 8 matrices of 16-bit elements; lane ``8*m + r`` gives the address of row `r` of matrix `m`.

The first two arguments are the first and the last of the four words that it writes: TVM takes what lies between two
addresses for used."""

SEEN = DeviceFunction(
    "tvmdcn_seen",
    "template <typename T> __device__ __forceinline__ void tvmdcn_seen(T) {}\n",
)
"""Does nothing with an element of shared memory, so that no code is made of it; but TVM gives room only to what it sees
being read or written, and takes no address for that."""

COPY_16 = DeviceFunction(
    "tvmdcn_copy_16",
    """\
__device__ __forceinline__ void tvmdcn_copy_16(void* target, const void* source) {
  unsigned at = (unsigned)__cvta_generic_to_shared(target);
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" : : "r"(at), "l"(source) : "memory");
}
""",
)
"""Starts to copy 16 bytes from the device's memory to shared memory; `WAIT_COPIES` waits for it."""

WAIT_COPIES = DeviceFunction(
    "tvmdcn_wait_copies",
    """\
__device__ __forceinline__ void tvmdcn_wait_copies() {
  asm volatile("cp.async.wait_all;" : : : "memory");
  __syncthreads();
}
""",
)
"""Waits until the copies of all threads of the block have arrived: a barrier."""

BARRIER = DeviceFunction("tvmdcn_barrier", "__device__ __forceinline__ void tvmdcn_barrier() { __syncthreads(); }\n")
"""A barrier of a block."""

SYNC_WARP = DeviceFunction("tvmdcn_sync_warp", "__device__ __forceinline__ void tvmdcn_sync_warp() { __syncwarp(); }\n")
"""A barrier of a warp, for which TVM generates nothing."""

TO_TF32 = DeviceFunction(
    "tvmdcn_to_tf32",
    """\
__device__ __forceinline__ float tvmdcn_to_tf32(float value) {
  unsigned rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(value));
  return __uint_as_float(rounded);
}
""",
    "float32",
)
"""Rounds to the nearest; without it tensor cores truncate, which doubles the error."""

ROUND_WORDS = DeviceFunction(
    "tvmdcn_round_words",
    """\
__device__ __forceinline__ void tvmdcn_round_words(unsigned* r, unsigned*) {
  for (int i = 0; i < 4; ++i) asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r[i]) : "f"(__uint_as_float(r[i])));
}
""",
)
"""Rounds what `LDMATRIX` has read as `TO_TF32` does; the arguments are the first and the last of the four words."""


@dataclass(frozen=True)
class Fragments:
    """How operands of one dtype are spread over a warp.

    Attributes
    ----------
    dtype : str
        Of the operands in memory; float32 are rounded to tf32.
    depth : int
        Products that one instruction sums up (its K).
    packing : int
        Elements in a word of 32 bits.
    mma : DeviceFunction
        ``mma(results, a0, a1, a2, a3, b0, b1)`` adds the product of a 16 x `depth` and a `depth` x 8 fragment, in
        words, to four results.
    """

    dtype: str
    depth: int
    packing: int
    mma: DeviceFunction

    def right_element(self, lane: Expr, word: Expr, part: int) -> tuple[Expr, Expr]:
        """Return the row and column, of `depth` x 16, of a part of one of the four words that a lane holds."""
        half, rest = word // 2, word % 2
        return self.depth // 2 * rest + lane % 4 * self.packing + part, half * 8 + lane // 4

    @staticmethod
    def result_element(lane: Expr, element: Expr) -> tuple[Expr, Expr]:
        """Return the row and column, of 16 x 16, of one of the eight results that a lane holds."""
        return lane // 4 + 8 * (element % 4 // 2), 8 * (element // 4) + 2 * (lane % 4) + element % 2

    def left_row(self, lane: Expr) -> tuple[Expr, Expr]:
        """Return the row and column, of 16 x `depth`, whose address a lane gives to `LDMATRIX`."""
        return lane % 16, lane // 16 * (self.depth // 2)


WORDS = 4
"""Words of 32 bits that a lane holds of an operand of 16 x `depth` elements."""


def fragments_of(dtype: str) -> Fragments:
    """Return the fragments of an operand dtype: float16, bfloat16, or float32 (rounded to tf32)."""
    if dtype == "float32":
        return Fragments(dtype, 8, 1, _mma("tvmdcn_mma_tf32", "m16n8k8", "tf32"))
    kind = {"float16": "f16", "bfloat16": "bf16"}[dtype]
    return Fragments(dtype, 16, 2, _mma(f"tvmdcn_mma_{kind}", "m16n8k16", kind))


def thread_loop(var: tirx.Var, extent: int, tag: str, body: tirx.Stmt) -> tirx.Stmt:
    """Return a loop that is spread over threads."""
    axis = tirx.IterVar(None, tirx.Var(tag, "int32"), tirx.IterVar.ThreadIndex, tag)
    return tirx.For(var, 0, extent, tirx.ForKind.THREAD_BINDING, body, axis)


def add_in_memory(dtype: str, count: int) -> DeviceFunction:
    """Return ``add(target, values)``, which adds 1, 2 or 4 neighbours in the device's memory, each atomically.

    Vectors are of float32; architectures before Hopper add them one by one.
    """
    kind = {"float32": "float", "float64": "double"}[dtype]
    name = f"tvmdcn_add_{kind}_{count}"
    if count == 1:
        body = "  atomicAdd(target, value);\n"
    else:
        parts = "xyzw"[:count]
        operands = ", ".join(f"%{i + 1}" for i in range(count))
        values = ", ".join(f'"f"(value.{part})' for part in parts)
        single = " ".join(f"atomicAdd(target + {i}, value.{part});" for i, part in enumerate(parts))
        body = (
            "#if __CUDA_ARCH__ >= 900\n"
            f'  asm volatile("red.relaxed.gpu.global.add.v{count}.f32 [%0], {{{operands}}};"\n'
            f'               : : "l"(target), {values} : "memory");\n'
            f"#else\n  {single}\n#endif\n"
        )
    vector = kind if count == 1 else f"{kind}{count}"
    return DeviceFunction(
        name, f"__device__ __forceinline__ void {name}({kind}* target, {vector} value) {{\n{body}}}\n"
    )


def sum_lanes(dtype: str) -> DeviceFunction:
    """Return ``total(value, lanes)``: the sum over neighbouring lanes of a warp, a power of two, which all get it."""
    kind = {"float32": "float", "float64": "double"}[dtype]
    name = f"tvmdcn_sum_lanes_{kind}"
    return DeviceFunction(
        name,
        f"__device__ __forceinline__ {kind} {name}({kind} value, int lanes) {{\n"
        "  for (int apart = lanes / 2; apart > 0; apart /= 2) {\n"
        "    value += __shfl_xor_sync(0xffffffffu, value, apart);\n"
        "  }\n"
        "  return value;\n"
        "}\n",
        dtype,
    )


def sum_corners(dtype: str) -> DeviceFunction:
    """Return ``total(corner_0, ..., corner_3, lane, lanes)``: of four sums over neighbouring lanes, one each.

    The first lane gets the first, and so on, again and again. `lanes` is a power of two, at least 4; each exchange
    halves what a lane still has, so that it takes a third of the shuffles that four sums would.
    """
    kind = {"float32": "float", "float64": "double"}[dtype]
    name = f"tvmdcn_sum_corners_{kind}"
    return DeviceFunction(
        name,
        f"__device__ __forceinline__ {kind} {name}("
        f"{kind} a, {kind} b, {kind} c, {kind} d, int lane, int lanes) {{\n"
        f"  const unsigned all = 0xffffffffu;\n"
        f"  {kind} even = (lane & 1 ? b : a) + __shfl_xor_sync(all, lane & 1 ? a : b, 1);\n"
        f"  {kind} odd = (lane & 1 ? d : c) + __shfl_xor_sync(all, lane & 1 ? c : d, 1);\n"
        f"  {kind} total = (lane & 2 ? odd : even) + __shfl_xor_sync(all, lane & 2 ? even : odd, 2);\n"
        "  for (int apart = 4; apart < lanes; apart *= 2) total += __shfl_xor_sync(all, total, apart);\n"
        "  return total;\n"
        "}\n",
        dtype,
    )
