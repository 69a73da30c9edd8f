# SPDX-License-Identifier: Apache-2.0
"""The emulator itself: hand-written kernels, right ones by their numbers, faulty ones by what is reported."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

if shutil.which("g++") is None:
    pytest.skip("the emulator needs g++", allow_module_level=True)

from cuda_emulator import Emulated, EmulationError, UnknownInstructionError
from cuda_emulator.ptx import translate_assembly

PRELUDE = """
#include <cuda_fp16.h>
#include <cuda_bf16.h>
#define uchar unsigned char
"""


def launch(body, parameters, arguments, *, grid=(1,), block=(32,), shared=0, prelude="", undefined=(), name="kernel"):
    source = f'{PRELUDE}{prelude}\nextern "C" __global__ void {name}({parameters}) {{\n{body}\n}}\n'
    Emulated(source).launch(name, grid, block, arguments, shared, undefined)


def floats(count):
    return np.arange(count, dtype=np.float32)


# ---- what right kernels compute -----------------------------------------------------------------------------


def test_grid_and_block_in_three_dimensions():
    out = np.zeros((3, 2, 2, 2, 4, 5), np.int32)
    body = """
      int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
      int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
      out[block * 40 + thread] = block * 1000 + thread + k;"""
    launch(body, "int* __restrict__ out, int k", [out, 7], grid=(2, 2, 3), block=(5, 4, 2))
    expected = np.arange(12)[:, None] * 1000 + np.arange(40) + 7
    assert np.array_equal(out.reshape(12, 40), expected)


def test_kernels_of_one_source_and_parameter_types():
    emulated = Emulated(
        PRELUDE
        + """
extern "C" __global__ void __launch_bounds__(64) scale(const half* __restrict__ x, float factor, half* y);
extern "C" __global__ void __launch_bounds__(64) scale(const half* __restrict__ x, float factor, half* y) {
  y[threadIdx.x] = (half)(((float)x[threadIdx.x]) * factor);
}
extern "C" __global__ void sum(nv_bfloat16* x, int64_t n, double* total) {
  if (threadIdx.x == 0) { double s = 0; for (int64_t i = 0; i < n; ++i) s += (float)x[i]; total[0] = s; }
}"""
    )
    assert list(emulated.kernels) == ["scale", "sum"]
    scale, total = emulated.kernels.values()
    assert [scale.max_threads, total.max_threads] == [64, 0]
    assert [(p.name, p.dtype, p.pointer) for p in scale.parameters] == [
        ("x", "float16", True),
        ("factor", "float32", False),
        ("y", "float16", True),
    ]
    assert [p.dtype for p in total.parameters] == ["bfloat16", "int64", "float64"]
    x, y = floats(64).astype(np.float16), np.zeros(64, np.float16)
    emulated.launch("scale", (1,), (64,), [x, 0.5, y])
    assert np.array_equal(y, x / 2)
    bfloats = np.array([0x3F80, 0x4000, 0xC040], np.uint16)  # 1, 2, -3
    result = np.zeros(1)
    emulated.launch("sum", (1,), (32,), [bfloats, 3, result])
    assert result[0] == 0.0
    with pytest.raises(EmulationError, match=r"blocks of \(65, 1, 1\), the limit is 64"):
        emulated.launch("scale", (1,), (65,), [x, 0.5, y])
    with pytest.raises(ValueError, match="argument x of scale must be an array of float16"):
        emulated.launch("scale", (1,), (64,), [floats(64), 0.5, y])
    with pytest.raises(ValueError, match="takes 3 arguments, got 2"):
        emulated.launch("scale", (1,), (64,), [x, 0.5])


def test_conversions_round_to_nearest_even():
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.standard_normal(500), rng.standard_normal(500) * 1e5, [65520.0, np.inf, -0.0]])
    x = np.resize(x, 1024).astype(np.float32)
    # Exactly between two bfloat16 numbers, both ways.
    x[:2] = np.array([0x3F808000, 0x3F818000], np.uint32).view(np.float32)
    h, b = np.zeros(1024, np.float16), np.zeros(1024, np.uint16)
    body = "h[threadIdx.x] = __float2half_rn(x[threadIdx.x]); b[threadIdx.x] = __float2bfloat16(x[threadIdx.x]);"
    launch(body, "float* x, half* h, nv_bfloat16* b", [x, h, b], block=(1024,))
    with np.errstate(over="ignore"):
        assert np.array_equal(h, x.astype(np.float16))
    bits = x.view(np.uint32).astype(np.uint64)
    assert np.array_equal(b, ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16))
    assert b[:2].tolist() == [0x3F80, 0x3F82]


def test_shared_memory_static_and_dynamic_between_barriers():
    x, out = floats(64), np.zeros(64, np.float32)
    body = """
      __shared__ alignas(64) float turned[64];
      extern __shared__ __align__(64) uchar bytes[];
      turned[63 - threadIdx.x] = x[threadIdx.x];
      ((float*)bytes)[threadIdx.x] = 1000.0f * x[threadIdx.x];
      __syncthreads();
      out[threadIdx.x] = turned[threadIdx.x] + ((float*)bytes)[threadIdx.x ^ 1];"""
    launch(body, "float* x, float* out", [x, out], block=(64,), shared=256)
    assert np.array_equal(out, x[::-1] + 1000 * x.reshape(-1, 2)[:, ::-1].ravel())


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        ("__shfl_sync(0xffffffff, v, 5, 32)", lambda lane: 5),
        ("__shfl_sync(0xffffffff, v, 5, 16)", lambda lane: lane // 16 * 16 + 5),
        ("__shfl_sync(__activemask(), v, 9)", lambda lane: 9),
        ("__shfl_up_sync(0xffffffff, v, 3, 32)", lambda lane: lane - 3 if lane >= 3 else lane),
        ("__shfl_down_sync(0xffffffff, v, 4, 8)", lambda lane: lane + 4 if lane % 8 < 4 else lane),
        ("__shfl_xor_sync(0xffffffff, v, 16, 32)", lambda lane: lane ^ 16),
    ],
)
def test_shuffles(call, expected):
    for ctype, dtype in (("float", np.float32), ("half", np.float16), ("double", np.float64)):
        x = np.arange(64, dtype=dtype)
        out = np.zeros_like(x)
        launch(
            f"{ctype} v = x[threadIdx.x]; out[threadIdx.x] = {call};",
            f"{ctype}* x, {ctype}* out",
            [x, out],
            block=(64,),
        )
        assert out.tolist() == [expected(lane) + 32 * warp for warp in range(2) for lane in range(32)]


def test_votes_of_half_a_warp():
    out = np.zeros((32, 3), np.uint32)
    body = """
      if (threadIdx.x >= 16) {
        out[threadIdx.x * 3] = __ballot_sync(0xffff0000u, threadIdx.x % 3 == 0);
        out[threadIdx.x * 3 + 1] = __any_sync(0xffff0000u, threadIdx.x == 20);
        out[threadIdx.x * 3 + 2] = __all_sync(0xffff0000u, threadIdx.x > 16);
      }"""
    launch(body, "unsigned* out", [out])
    ballot = sum(1 << lane for lane in range(16, 32) if lane % 3 == 0)
    assert not out[:16].any()
    assert (out[16:] == [ballot, 1, 0]).all()


def _ldmatrix(count, transposed):
    registers = ", ".join(f"%{index}" for index in range(count))
    outputs = ", ".join(f'"=r"(r[{index}])' for index in range(count))
    trans = ".trans" if transposed else ""
    return f"""
      extern __shared__ uchar tile[];
      for (int i = threadIdx.x; i < {count} * 64; i += 32) ((half*)tile)[i / 8 * 16 + i % 8] = x[i];
      __syncthreads();
      unsigned r[4];
      unsigned int address = __cvta_generic_to_shared(&((half*)tile)[0] + threadIdx.x % ({count} * 8) * 16);
      __asm__ __volatile__(
        "ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16"
        "{{{registers}}}, [%{count}];\\n"
        : {outputs} : "r"(address));
      for (int m = 0; m < {count}; ++m) *(unsigned*)(out + (m * 32 + threadIdx.x) * 2) = r[m];"""


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix(count, transposed):
    x = np.arange(count * 64).astype(np.float16).reshape(count, 8, 8)
    out = np.zeros((count, 8, 4, 2), np.float16)
    launch(_ldmatrix(count, transposed), "half* x, half* out", [x, out], shared=count * 8 * 32)
    expected = x.transpose(0, 2, 1) if transposed else x
    assert np.array_equal(out.reshape(count, 8, 8), expected)


def _bfloat(values):
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def _from_bfloat(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


MMA = {
    # shape, type: ctype of elements, K, registers of A, of B
    ("m16n8k16", "f16"): ("half", 16, 4, 2),
    ("m16n8k16", "bf16"): ("nv_bfloat16", 16, 4, 2),
    ("m16n8k8", "f16"): ("half", 8, 2, 1),
    ("m16n8k8", "tf32"): ("float", 8, 4, 2),
    ("m16n8k4", "tf32"): ("float", 4, 2, 1),
}


@pytest.mark.parametrize(("shape", "kind"), MMA)
def test_mma_multiplies(shape, kind):
    """The fragments are filled by PTX's documented element positions, written out here once more."""
    ctype, depth, a_count, b_count = MMA[shape, kind]
    rng = np.random.default_rng(1)
    a, b = rng.integers(-8, 8, (16, depth)), rng.integers(-8, 8, (depth, 8))
    c = rng.standard_normal((16, 8)).astype(np.float32)
    out = np.zeros((16, 8), np.float32)
    if kind == "tf32":
        fill = f"""
          for (int i = 0; i < {a_count}; ++i)
            A[i] = __float_as_uint(a[(g + 8 * (i % 2)) * {depth} + q + 4 * (i / 2)]);
          for (int i = 0; i < {b_count}; ++i) B[i] = __float_as_uint(b[(q + 4 * i) * 8 + g]);"""
        left, right = a.astype(np.float32), b.astype(np.float32)
    else:
        fill = f"""
          for (int i = 0; i < 2 * {a_count}; ++i)
            (({ctype}*)A)[i] = a[(g + 8 * (i / 2 % 2)) * {depth} + q * 2 + i % 2 + 8 * (i / 4)];
          for (int i = 0; i < 2 * {b_count}; ++i)
            (({ctype}*)B)[i] = b[(q * 2 + i % 2 + 8 * (i / 2)) * 8 + g];"""
        left, right = (v.astype(np.float16) if kind == "f16" else _bfloat(v) for v in (a, b))
    names = [f"%{index}" for index in range(4 + a_count + b_count + 4)]
    groups = [names[:4], names[4 : 4 + a_count], names[4 + a_count : 4 + a_count + b_count], names[-4:]]
    template = ", ".join("{" + ", ".join(group) + "}" for group in groups)
    inputs = [f'"r"(A[{i}])' for i in range(a_count)] + [f'"r"(B[{i}])' for i in range(b_count)]
    body = f"""
      int g = threadIdx.x / 4, q = threadIdx.x % 4;
      alignas(16) unsigned A[4], B[2];
      float C[4];
      {fill}
      for (int i = 0; i < 4; ++i) C[i] = c[(g + 8 * (i / 2)) * 8 + q * 2 + i % 2];
      __asm__ __volatile__(
        "mma.sync.aligned.{shape}.row.col.f32.{kind}.{kind}.f32 "
        "{template};\\n"
        : "=f"(C[0]), "=f"(C[1]), "=f"(C[2]), "=f"(C[3])
        : {", ".join(inputs)}, "f"(C[0]), "f"(C[1]), "f"(C[2]), "f"(C[3]));
      for (int i = 0; i < 4; ++i) out[(g + 8 * (i / 2)) * 8 + q * 2 + i % 2] = C[i];"""
    launch(body, f"{ctype}* a, {ctype}* b, float* c, float* out", [left, right, c, out])
    np.testing.assert_allclose(out, a @ b + c, rtol=0, atol=1e-5)


def test_atomics_and_reductions():
    prelude = """
__device__ __forceinline__ void red4(float* p, float a, float b, float c, float d) {
  asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};"
               :: "l"(p), "f"(a), "f"(b), "f"(c), "f"(d) : "memory");
}
__device__ __forceinline__ void red_half2(half2* p, unsigned v) {
  asm volatile("red.global.add.noftz.f16x2 [%0], %1;" :: "l"(p), "r"(v) : "memory");
}
__device__ __forceinline__ void red_bfloat2(void* p, unsigned v) {
  asm volatile("red.relaxed.gpu.global.add.noftz.bf16x2 [%0 + 4], %1;" :: "l"(p), "r"(v) : "memory");
}
__device__ __forceinline__ void red_half8(half* p, unsigned v) {
  asm volatile("red.global.add.noftz.v4.f16x2 [%0], {%1, %1, %1, %1};" :: "l"(p), "r"(v) : "memory");
}
"""
    body = """
      atomicAdd(x, 0.5f);
      int before = atomicAdd(n, 2);
      if (before == 0) first[0] = threadIdx.x;
      atomicMax((unsigned*)first + 1, threadIdx.x ^ 5);
      red4(x + 4, 1.0f, 2.0f, 3.0f, (float)threadIdx.x);
      red_half2((half2*)h, 0x3c004000u);
      red_half8(h + 8, 0x40003c00u);
      red_bfloat2(b, 0x3f804000u);"""
    x, n, first = np.zeros(8, np.float32), np.zeros(1, np.int32), np.array([-1, 0], np.int32)
    h, b = np.zeros(16, np.float16), np.zeros(4, np.uint16)
    launch(
        body, "float* x, int* n, int* first, half* h, nv_bfloat16* b", [x, n, first, h, b], grid=(3,), prelude=prelude
    )
    assert x.tolist() == [48, 0, 0, 0, 96, 192, 288, 3 * 496]
    assert n[0] == 192
    assert first[0] >= 0
    assert first[1] == 31
    assert h.tolist() == [192, 96, 0, 0, 0, 0, 0, 0, 96, 192, 96, 192, 96, 192, 96, 192]
    assert _from_bfloat(b).tolist() == [0, 0, 192, 96]


CP_ASYNC = """
__forceinline__ __device__ void copy16(void* dst, void* src) {
  unsigned int to = __cvta_generic_to_shared(dst);
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], %2;" :: "r"(to), "l"(src), "n"(16));
}
__forceinline__ __device__ void copy16_or_zero(void* dst, void* src, int predicate) {
  unsigned int to = __cvta_generic_to_shared(dst);
  __asm__ __volatile__(
    "{\\n"
    " .reg .pred p;\\n"
    " setp.eq.u32 p, %3, 1;\\n"
    " @p cp.async.cg.shared.global [%0], [%1], %2;\\n"
    " @!p st.shared.v4.u32 [%0], {%4, %4, %4, %4};\\n"
    "}\\n"
    :: "r"(to), "l"(src), "n"(16), "r"(predicate), "r"(0)
  );
}
__forceinline__ __device__ void copy16_first(void* dst, void* src, int size) {
  unsigned int to = __cvta_generic_to_shared(dst);
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" :: "r"(to), "l"(src), "r"(size));
}
"""


def test_cp_async_pipeline():
    x, out = floats(3 * 128), np.zeros(3 * 128, np.float32)
    body = """
      __shared__ float stage[2][128];
      copy16(&stage[0][threadIdx.x * 4], x + threadIdx.x * 4);
      asm volatile("cp.async.commit_group;");
      for (int i = 0; i < 3; ++i) {
        if (i < 2) copy16(&stage[(i + 1) % 2][threadIdx.x * 4], x + (i + 1) * 128 + threadIdx.x * 4);
        asm volatile("cp.async.commit_group;");
        asm volatile("cp.async.wait_group 1;");
        __syncthreads();
        for (int j = 0; j < 4; ++j) out[i * 128 + threadIdx.x + 32 * j] = stage[i % 2][threadIdx.x + 32 * j];
        __syncthreads();
      }"""
    body = body.replace("float stage[2][128]", "float stage_[256]").replace("&stage[0][", "&stage_[")
    body = body.replace("&stage[(i + 1) % 2][", "&stage_[(i + 1) % 2 * 128 + ").replace(
        "stage[i % 2][", "stage_[i % 2 * 128 + "
    )
    launch(body, "float* x, float* out", [x, out], prelude=CP_ASYNC)
    assert np.array_equal(out, x)


def test_cp_async_predicated_and_with_zeros():
    x, out = floats(128) + 1, np.zeros((2, 128), np.float32)
    body = """
      __shared__ float a[128];
      __shared__ float b[128];
      copy16_or_zero(a + threadIdx.x * 4, x + threadIdx.x * 4, threadIdx.x % 2);
      copy16_first(b + threadIdx.x * 4, x + threadIdx.x * 4, 8);
      asm volatile("cp.async.wait_all;");
      __syncthreads();
      for (int i = threadIdx.x; i < 128; i += 32) { out[i] = a[i]; out[128 + i] = b[i]; }"""
    launch(body, "float* x, float* out", [x, out], prelude=CP_ASYNC)
    keep = np.arange(128) // 4 % 2 == 1
    assert np.array_equal(out[0], np.where(keep, x, 0))
    assert np.array_equal(out[1], np.where(np.arange(128) % 4 < 2, x, 0))


def test_inline_assembly_registers():
    out = np.zeros(32, np.uint32)
    body = """
      unsigned packed, tf32; float low = 1.0f, high = -2.0f, parts = 0.0f;
      asm volatile("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
      asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(tf32) : "f"(1.0f + 3.0f / 2048));
      asm volatile("{ .reg .b16 lo, hi; .reg .b32 t; mov.b32 {lo, hi}, %1; mov.b32 t, {hi, lo}; mov.b32 %0, t; }"
                   : "=r"(out[threadIdx.x]) : "r"(packed));
      asm volatile("{ .reg .pred p; setp.ge.s32 p, %2, -1; @p fma.rn.f32 %0, %1, %1, 0f3F800000; }"
                   : "+f"(parts) : "f"(high), "r"((int)threadIdx.x - 16));
      if (threadIdx.x == 1) out[1] = tf32;
      if (threadIdx.x > 1) out[threadIdx.x] = (unsigned)parts;"""
    launch(body, "unsigned* out", [out])
    assert out[0] == 0x3C00C000
    # Half way between two tf32 numbers: away from zero.
    assert out[1] == np.float32(1 + 4 / 2048).view(np.uint32)
    assert out[2:].tolist() == [0] * 13 + [5] * 17


# ---- faults -------------------------------------------------------------------------------------------------


def fault(match, body, parameters="float* x, float* out", arguments=None, **options):
    if arguments is None:
        arguments = [floats(64), np.zeros(64, np.float32)]
    with pytest.raises(EmulationError, match=match) as raised:
        launch(body, parameters, arguments, **options)
    return str(raised.value)


def test_read_beyond_the_end():
    message = fault(
        r"kernel kernel: read of 4 bytes at x\[64\] \(64 elements of 4 bytes\), outside of the array; "
        r"thread \(31, 0, 0\) of block \(1, 0, 0\), line \d+: out\[",
        "out[blockIdx.x * 32 + threadIdx.x] = x[blockIdx.x * 32 + threadIdx.x + 1];",
        grid=(2,),
    )
    assert message.count("line") == 1


def test_write_before_the_beginning_leaves_memory_alone():
    out = np.zeros(64, np.float32)
    fault(
        r"write of 4 bytes at out\[-1\]",
        "out[(int)threadIdx.x - 1] = 1.0f;",
        arguments=[floats(64), out],
    )
    assert not out.any()


def test_vector_that_ends_beyond_the_end():
    fault(
        r"read of 16 bytes at x\[60\] \(62 elements",
        "*(float4*)(out + threadIdx.x * 4) = *(float4*)(x + threadIdx.x * 4);",
        arguments=[floats(62), np.zeros(64, np.float32)],
        block=(16,),
    )


def test_misaligned_vectors():
    fault(
        r"misaligned read of 16 bytes at x\[1\]",
        "*(float4*)(out) = *(float4*)(x + 1);",
        block=(1,),
    )
    fault(
        r"misaligned read of 8 bytes at x\[0\]",
        "*(float2*)(out) = *(float2*)(x);",
        arguments=[floats(65)[1:], np.zeros(64, np.float32)],
        block=(1,),
    )
    fault(
        r"misaligned write of 16 bytes at bytes\[8\]",
        "extern __shared__ uchar bytes[]; *(uint4*)(bytes + 8) = *(uint4*)x;",
        block=(1,),
        shared=64,
    )


def test_shared_memory_bounds():
    fault(
        r"write of 4 bytes at tile\[32\] \(32 elements of 4 bytes\), outside of the array; thread \(31, 0, 0\)",
        "__shared__ float tile[32]; tile[threadIdx.x + 1] = x[threadIdx.x];",
    )
    fault(
        r"write of 4 bytes at bytes\[64\]",
        "extern __shared__ uchar bytes[]; ((float*)bytes)[threadIdx.x] = x[threadIdx.x];",
        shared=64,
    )
    fault("bytes is dynamic shared memory, and the launch gave none", "extern __shared__ uchar bytes[]; bytes[0] = 1;")
    fault("49156 bytes of static shared memory", "__shared__ float tile[12289]; tile[threadIdx.x] = x[0];")
    fault("300000 bytes of dynamic shared memory, the limit is", "out[0] = 1;", shared=300000)


def test_input_that_is_written():
    x = floats(64)
    x.flags.writeable = False
    fault(r"write of x\[0\].*which is an input", "x[threadIdx.x] = 1.0f;", arguments=[x, np.zeros(64, np.float32)])


def test_reads_of_what_nothing_has_written():
    fault(
        r"read of tile\[1\].*which nothing has written",
        "__shared__ float tile[33]; tile[threadIdx.x * 0] = 0.0f; out[threadIdx.x] = tile[1];",
        block=(1,),
    )
    fault(r"read of out\[5\].*which nothing has written", "out[0] = out[5];", block=(1,), undefined=(1,))
    # Shared memory does not outlive a block.
    fault(
        r"read of tile\[0\].*nothing has written; thread \(0, 0, 0\) of block \(1",
        "__shared__ float tile[32]; if (blockIdx.x == 0) tile[0] = 1.0f; out[blockIdx.x] = tile[0];",
        block=(1,),
        grid=(2,),
    )


def test_local_variables_start_as_rubbish():
    out = np.zeros(32, np.float32)
    launch(
        "float sum[2]; for (int i = 0; i < k; ++i) sum[i] = 0; out[threadIdx.x] = sum[0] + sum[1];",
        "float* out, int k",
        [out, 1],
    )
    assert (np.abs(out) > 1e30).all()


def test_local_array_index():
    fault(
        "index 4 outside of a local array",
        "float parts[4]; for (int i = 0; i < k; ++i) parts[i] = x[i]; out[0] = parts[k % 4];",
        parameters="float* x, float* out, int k",
        arguments=[floats(64), np.zeros(64, np.float32), 5],
        block=(1,),
    )


def test_missing_barrier():
    body = """
      __shared__ float tile[64];
      tile[threadIdx.x] = x[threadIdx.x];
      {barrier}
      out[threadIdx.x] = tile[63 - threadIdx.x];"""
    # Both orders of the two warps are looked at: the second reads what the first wrote.
    fault(
        r"race: read of tile\[31\].* its write by thread \(31, 0, 0\) with no barrier|nothing has written",
        body.format(barrier=""),
        block=(64,),
    )
    launch(
        body.format(barrier="__syncthreads();"),
        "float* x, float* out",
        [floats(64), np.zeros(64, np.float32)],
        block=(64,),
    )


def test_write_after_read_race():
    body = """
      __shared__ float tile[64];
      tile[threadIdx.x] = x[threadIdx.x];
      __syncthreads();
      float v = tile[{read}];
      {barrier}
      tile[threadIdx.x] = v;
      __syncthreads();
      out[threadIdx.x] = tile[threadIdx.x];"""
    arguments = [floats(64), np.zeros(64, np.float32)]
    for read, match in {
        "(threadIdx.x + 1) % 64": r"race: write of tile\[1\].* its read by thread \(0, 0, 0\)",
        "63 - threadIdx.x": r"race: read of tile\[31\].* its write by thread \(31, 0, 0\)",
        "63": r"race: write of tile\[63\].* its read by several threads",
        "threadIdx.x < 32 ? 31 : threadIdx.x": r"race: write of tile\[31\].* its read by several threads",
    }.items():
        fault(match, body.format(read=read, barrier=""), block=(64,))
        launch(body.format(read=read, barrier="__syncthreads();"), "float* x, float* out", arguments, block=(64,))


def test_barrier_of_a_warp_orders_that_warp_only():
    body = """
      __shared__ float tile[64];
      tile[threadIdx.x] = x[threadIdx.x];
      {barrier}
      out[threadIdx.x] = tile[threadIdx.x ^ {distance}];
      {barrier}
      tile[threadIdx.x] = 0.0f;"""
    arguments = [floats(64), np.zeros(64, np.float32)]
    launch(body.format(barrier="__syncwarp();", distance=1), "float* x, float* out", arguments, block=(64,))
    assert np.array_equal(arguments[1], arguments[0].reshape(-1, 2)[:, ::-1].ravel())
    fault(
        r"race: read of tile\[\d+\].* write by thread|which nothing has written",
        body.format(barrier="", distance=1),
        block=(64,),
    )
    fault(
        r"race: .* of tile\[\d+\]|which nothing has written",
        body.format(barrier="__syncwarp();", distance=32),
        block=(64,),
    )
    # A shuffle is no barrier.
    fault(
        r"race: read of tile|which nothing has written",
        body.format(barrier="__shfl_sync(0xffffffffu, 1, 0, 32);", distance=1),
        block=(64,),
    )


def test_two_threads_write_one_element():
    fault(
        r"race: write of tile\[0\].* its write by thread \(0, 0, 0\)",
        "__shared__ float tile[1]; tile[0] = (float)threadIdx.x;",
    )
    fault(r"race: write of out\[3\].* its write by thread \(0, 0, 0\)", "out[3] = 1.0f;")
    fault(
        r"race: write of out\[0\].* its write by another block",
        "if (threadIdx.x == 0) out[0] = (float)blockIdx.x;",
        grid=(2,),
    )
    fault(
        r"race: read of out\[0\].* its write by another block",
        "if (threadIdx.x == 0) { if (blockIdx.x == 0) out[0] = 1.0f; else out[1] = out[0]; }",
        grid=(2,),
    )
    fault(
        r"race: write of x\[0\].* its read by another block",
        "if (threadIdx.x == 0) { if (blockIdx.x == 1) x[0] = 1.0f; else out[1] = x[0]; }",
        grid=(2,),
    )


def test_atomic_and_plain_access():
    fault(
        r"race: atomic update of out\[0\].* its write by thread \(0, 0, 0\)",
        "if (threadIdx.x == 0) out[0] = 0.0f; atomicAdd(out, 1.0f);",
    )
    fault(
        r"race: read of out\[0\].* its atomic update by several threads",
        "atomicAdd(out, 1.0f); if (threadIdx.x == 31) x[blockIdx.x] = out[0];",
    )
    fault(
        r"race: read of out\[0\].* its atomic update by another block",
        "if (blockIdx.x == 0) atomicAdd(out, 1.0f); else if (threadIdx.x == 0) x[0] = out[0];",
        grid=(2,),
    )


def test_half_words_of_one_word_are_apart():
    out = np.zeros(64, np.float16)
    launch("__shared__ half t[64]; t[threadIdx.x] = (half)1.0f; out[threadIdx.x] = t[threadIdx.x];", "half* out", [out])
    assert out[:32].tolist() == [1.0] * 32


def test_divergent_barriers():
    fault(
        r"divergent __syncthreads: thread \(0, 0, 0\) of .* waits, but thread \(32, 0, 0\) has ended",
        "if (threadIdx.x < 32) __syncthreads();",
        block=(64,),
    )
    message = fault(
        r"divergent __syncthreads: .* waits at another one, in line \d+",
        "if (threadIdx.x < 32) {\n__syncthreads();\n} else {\n__syncthreads();\n}",
        block=(64,),
    )
    assert "__syncthreads();" in message


def test_divergent_warp_instructions():
    fault(
        r"divergent shuffle: thread \(0, 0, 0\) of .* waits, but thread \(16, 0, 0\) has ended",
        "if (threadIdx.x < 16) out[threadIdx.x] = __shfl_sync(0xffffffffu, 1.0f, 0, 32);",
    )
    fault(
        r"divergent __syncwarp: .* waits, but thread \(1, 0, 0\) waits at shuffle in line",
        "if (threadIdx.x == 0) __syncwarp(); else out[threadIdx.x] = __shfl_sync(0xffffffffu, 1.0f, 0, 32);",
    )
    fault(
        r"divergent shuffle: .* waits, but thread \(16, 0, 0\) waits at __syncthreads",
        "if (threadIdx.x < 16) out[threadIdx.x] = __shfl_sync(0xffffffffu, 1.0f, 0, 32); __syncthreads();",
    )
    fault(
        r"shuffle with mask 0x000000ff, which does not name the calling lane 8",
        "out[threadIdx.x] = __shfl_sync(0xffu, 1.0f, 0, 32);",
    )
    fault(
        r"shuffle reads lane 16, which is not in its mask",
        "if (threadIdx.x < 16) out[threadIdx.x] = __shfl_sync(0xffffu, 1.0f, 16, 32);",
    )
    fault(
        r"divergent shuffle: .* lane 16, which its mask names, does not exist",
        "out[threadIdx.x] = __shfl_sync(0xffffffffu, 1.0f, 0, 32);",
        block=(16,),
    )


def test_mma_with_operands_that_are_not_tf32():
    body = """
      float a = x[threadIdx.x] + 0.1f, c[4] = {0, 0, 0, 0};
      asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
        "{%0,%1,%2,%3}, {%4,%4,%4,%4}, {%5,%5}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(__float_as_uint(a)), "r"(0));
      out[threadIdx.x] = c[0];"""
    fault(r"mma on tf32 got operand A = 0x1.99999ap-4, which is not rounded", body)


def test_cp_async_faults():
    start = "__shared__ float tile[128]; copy16(tile + threadIdx.x * 4, x + threadIdx.x * 4);"
    arguments = [floats(128), np.zeros(128, np.float32)]
    finish = "for (int i = 0; i < 4; ++i) out[threadIdx.x + 32 * i] = tile[threadIdx.x + 32 * i];"
    wait = 'asm volatile("cp.async.wait_all;");'
    one_group = 'asm volatile("cp.async.commit_group;"); asm volatile("cp.async.wait_group 1;"); __syncthreads();'
    options = {"arguments": arguments, "prelude": CP_ASYNC}
    fault(
        r"read of tile\[0\].* while a cp.async of thread \(0, 0, 0\) to it is not waited for", start + finish, **options
    )
    fault(r"while a cp.async", start + "__syncthreads();" + finish, **options)
    fault(r"while a cp.async", start + one_group + finish, **options)
    fault(r"write of tile\[0\].* while a cp.async", start + "tile[threadIdx.x * 4] = 0.0f;" + wait, **options)
    # The one who waits sees its own copies; the others need a barrier behind the wait.
    fault(r"race: read of tile|nothing has written", start + wait + finish, **options)
    fault(r"while a cp.async", start + "__syncthreads();" + finish + wait, **options)
    launch(start + wait + "__syncthreads();" + finish, "float* x, float* out", arguments, prelude=CP_ASYNC)
    assert np.array_equal(arguments[1], arguments[0])
    fault(
        r"read of 16 bytes at x\[124\]",
        start + wait,
        arguments=[floats(126), np.zeros(4, np.float32)],
        prelude=CP_ASYNC,
    )
    fault(
        r"misaligned write of 16 bytes at tile\[2\]",
        "__shared__ float tile[160]; copy16(tile + 2, x);",
        block=(1,),
        **options,
    )


def test_ldmatrix_faults():
    body = _ldmatrix(4, False)
    x, out = np.zeros(256, np.float16), np.zeros(256, np.float16)
    launch(body, "half* x, half* out", [x, out], shared=4 * 256)
    options = {"parameters": "half* x, half* out", "arguments": [x, out], "shared": 4 * 256}
    fault(r"misaligned read of 16 bytes at tile\[", body.replace("% (4 * 8) * 16", "% (4 * 8) * 12"), **options)
    fault(r"race: read of tile\[|which nothing", body.replace("__syncthreads();", ""), **options)
    fault(r"read of tile\[\d+\].*nothing has written", body.replace("% (4 * 8) * 16", "% (4 * 8) * 16 + 8"), **options)


def test_launch_limits():
    fault(r"a grid of \(0, 1, 1\), outside of CUDA's limits", "out[0] = 1;", grid=(0,))
    fault(r"a grid of \(1, 70000, 1\)", "out[0] = 1;", grid=(1, 70000))
    fault(r"blocks of \(2048, 1, 1\), the limit is 1024", "out[0] = 1;", block=(2048,))


def test_what_is_not_emulated_is_refused():
    with pytest.raises(UnknownInstructionError, match=r"PTX instruction 'wgmma\.fence\.sync\.aligned' is not emulated"):
        translate_assembly('"wgmma.fence.sync.aligned;\\n" ::: "memory"')
    with pytest.raises(UnknownInstructionError, match=r"mma\.sync\.aligned\.m16n8k32"):
        launch(
            'asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0}, {%0}, {%0}, {%0};" : "+r"(n[0]));',
            "int* n",
            [np.zeros(1, np.int32)],
        )
    with pytest.raises(ValueError, match="shared memory is declared in a form"):
        launch("__shared__ float tile[2][2];", "float* x", [floats(1)])
    with pytest.raises(ValueError, match="has no kernel"):
        Emulated("int f() { return 1; }")
    with pytest.raises(EmulationError, match="g\\+\\+ does not compile the kernels"):
        launch("undeclared = 1;", "float* x", [floats(1)])
    assert translate_assembly('"" ::: "memory"') == "{  }"
