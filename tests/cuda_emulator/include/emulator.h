// SPDX-License-Identifier: Apache-2.0
// CUDA C as far as generated kernels use it, for a CPU compiler. Included before each kernel source.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <math.h>

struct EmulatorIndex {
  unsigned x, y, z;
};

extern "C" {
// A thread runs its kernel on one fiber from start to end, so these never change within it.
EmulatorIndex emulator_thread() __attribute__((const));
EmulatorIndex emulator_block() __attribute__((const));
EmulatorIndex emulator_block_extent() __attribute__((const));
EmulatorIndex emulator_grid_extent() __attribute__((const));
void* emulator_dynamic_shared(const char* name);
void* emulator_static_shared(const char* name, size_t bytes, size_t itemsize, size_t alignment);
unsigned emulator_shared_address(const void* pointer);
void* emulator_shared_pointer(unsigned address);
void emulator_check(void* address, size_t bytes, int is_write);
void emulator_barrier(int line);
void emulator_warp_barrier(unsigned mask, int line);
unsigned emulator_active_mask(int line);
uint64_t emulator_shuffle(int kind, unsigned mask, uint64_t value, int source, int width, int line);
unsigned emulator_vote(unsigned mask, int predicate, int line);
void emulator_load_matrix(int count, int transposed, unsigned** out, unsigned address, int line);
void emulator_mma(int kind, unsigned** out, const unsigned* in, int count, int line);
void emulator_copy_async(unsigned destination, const void* source, int bytes, int source_bytes, int line);
void emulator_commit_group();
void emulator_wait_group(int newest);
void emulator_wait_all();
void emulator_atomic_add(void* address, const void* value, int type, int count, void* old, int line);
}

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline
#define __noinline__
#define __restrict__ __restrict
#define __launch_bounds__(...)
#define __align__(N) __attribute__((aligned(N)))
#define threadIdx (emulator_thread())
#define blockIdx (emulator_block())
#define blockDim (emulator_block_extent())
#define gridDim (emulator_grid_extent())
#define warpSize 32

#define __syncthreads() emulator_barrier(__LINE__)
#define __syncwarp(...) emulator_warp_barrier(emulator_mask(__VA_ARGS__), __LINE__)
#define __activemask() emulator_active_mask(__LINE__)
#define __shfl_sync(...) emulator_shuffled(0, __LINE__, __VA_ARGS__)
#define __shfl_up_sync(...) emulator_shuffled(1, __LINE__, __VA_ARGS__)
#define __shfl_down_sync(...) emulator_shuffled(2, __LINE__, __VA_ARGS__)
#define __shfl_xor_sync(...) emulator_shuffled(3, __LINE__, __VA_ARGS__)
#define __ballot_sync(MASK, PREDICATE) emulator_vote(MASK, PREDICATE, __LINE__)
#define __any_sync(MASK, PREDICATE) (emulator_vote(MASK, PREDICATE, __LINE__) != 0)
#define __all_sync(MASK, PREDICATE) (emulator_vote(MASK, !(PREDICATE), __LINE__) == 0)
#define atomicAdd(...) emulator_added(__LINE__, __VA_ARGS__)
#define atomicMax(...) emulator_raised(__LINE__, __VA_ARGS__)
#define __threadfence() ((void)0)
#define __threadfence_block() ((void)0)
#define __trap() __builtin_trap()

static inline unsigned emulator_mask(unsigned mask = 0xffffffffu) { return mask; }
static inline unsigned __cvta_generic_to_shared(const void* pointer) { return emulator_shared_address(pointer); }

// ---- vectors, aligned as CUDA aligns them -------------------------------------------------------------------
#define EMULATOR_VECTORS(NAME, TYPE, SIZE)                                                               \
  struct alignas(2 * SIZE > 16 ? 16 : 2 * SIZE) NAME##2 { TYPE x, y; };                                  \
  struct NAME##3 { TYPE x, y, z; };                                                                      \
  struct alignas(4 * SIZE > 16 ? 16 : 4 * SIZE) NAME##4 { TYPE x, y, z, w; };                            \
  static inline NAME##2 make_##NAME##2(TYPE x, TYPE y) { return {x, y}; }                                \
  static inline NAME##3 make_##NAME##3(TYPE x, TYPE y, TYPE z) { return {x, y, z}; }                     \
  static inline NAME##4 make_##NAME##4(TYPE x, TYPE y, TYPE z, TYPE w) { return {x, y, z, w}; }
EMULATOR_VECTORS(char, signed char, 1)
EMULATOR_VECTORS(uchar, unsigned char, 1)
EMULATOR_VECTORS(short, short, 2)
EMULATOR_VECTORS(ushort, unsigned short, 2)
EMULATOR_VECTORS(int, int, 4)
EMULATOR_VECTORS(uint, unsigned, 4)
EMULATOR_VECTORS(long, long, 8)
EMULATOR_VECTORS(ulong, unsigned long, 8)
EMULATOR_VECTORS(longlong, long long, 8)
EMULATOR_VECTORS(ulonglong, unsigned long long, 8)
EMULATOR_VECTORS(float, float, 4)
EMULATOR_VECTORS(double, double, 8)
typedef EmulatorIndex dim3;

// ---- float16 and bfloat16 -----------------------------------------------------------------------------------
typedef _Float16 half;
typedef _Float16 __half;
struct alignas(4) half2 {
  half x, y;
  half2() = default;
  half2(half x, half y) : x(x), y(y) {}
};
typedef half2 __half2;

template <class To, class From>
static inline To emulator_bits(From value) {
  static_assert(sizeof(To) == sizeof(From), "a register of another size");
  To result;
  memcpy(&result, &value, sizeof result);
  return result;
}

struct __nv_bfloat16 {
  uint16_t raw;
  __nv_bfloat16() = default;
  __nv_bfloat16(float value) {
    const uint32_t bits = emulator_bits<uint32_t>(value);
    raw = value != value ? uint16_t(0x7fff) : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }
  __nv_bfloat16(double value) : __nv_bfloat16(float(value)) {}
  __nv_bfloat16(int value) : __nv_bfloat16(float(value)) {}
  __nv_bfloat16(unsigned value) : __nv_bfloat16(float(value)) {}
  operator float() const { return emulator_bits<float>(uint32_t(raw) << 16); }
};
typedef __nv_bfloat16 nv_bfloat16;
struct alignas(4) __nv_bfloat162 {
  nv_bfloat16 x, y;
  __nv_bfloat162() = default;
  __nv_bfloat162(nv_bfloat16 x, nv_bfloat16 y) : x(x), y(y) {}
};
typedef __nv_bfloat162 nv_bfloat162;

static inline float __half2float(half value) { return float(value); }
static inline half __float2half(float value) { return half(value); }
static inline half __float2half_rn(float value) { return half(value); }
static inline half __ushort_as_half(unsigned short value) { return emulator_bits<half>(value); }
static inline unsigned short __half_as_ushort(half value) { return emulator_bits<unsigned short>(value); }
static inline half2 make_half2(half x, half y) { return {x, y}; }
static inline half2 __halves2half2(half x, half y) { return {x, y}; }
static inline half2 __half2half2(half x) { return {x, x}; }
static inline half2 __floats2half2_rn(float x, float y) { return {half(x), half(y)}; }
static inline half2 __float22half2_rn(float2 v) { return {half(v.x), half(v.y)}; }
static inline float2 __half22float2(half2 v) { return {float(v.x), float(v.y)}; }
static inline float __low2float(half2 v) { return float(v.x); }
static inline float __high2float(half2 v) { return float(v.y); }
static inline half __low2half(half2 v) { return v.x; }
static inline half __high2half(half2 v) { return v.y; }
static inline bool __hgt(half a, half b) { return a > b; }
static inline bool __hlt(half a, half b) { return a < b; }
static inline half __hadd(half a, half b) { return half(float(a) + float(b)); }
static inline half __hmul(half a, half b) { return half(float(a) * float(b)); }
static inline half2 __hadd2(half2 a, half2 b) { return {__hadd(a.x, b.x), __hadd(a.y, b.y)}; }
static inline half2 __hmul2(half2 a, half2 b) { return {__hmul(a.x, b.x), __hmul(a.y, b.y)}; }
// A product of two halves is exact in double, and so is its sum with a third unless far smaller.
static inline half __hfma(half a, half b, half c) { return half(double(a) * double(b) + double(c)); }
static inline half2 __hfma2(half2 a, half2 b, half2 c) { return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)}; }

static inline float __bfloat162float(nv_bfloat16 value) { return float(value); }
static inline nv_bfloat16 __float2bfloat16(float value) { return nv_bfloat16(value); }
static inline nv_bfloat16 __float2bfloat16_rn(float value) { return nv_bfloat16(value); }
static inline nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {nv_bfloat16(x), nv_bfloat16(y)}; }
static inline nv_bfloat162 __float22bfloat162_rn(float2 v) { return {nv_bfloat16(v.x), nv_bfloat16(v.y)}; }
static inline float2 __bfloat1622float2(nv_bfloat162 v) { return {float(v.x), float(v.y)}; }
static inline nv_bfloat162 make_bfloat162(nv_bfloat16 x, nv_bfloat16 y) { return {x, y}; }
static inline nv_bfloat162 __halves2bfloat162(nv_bfloat16 x, nv_bfloat16 y) { return {x, y}; }
static inline nv_bfloat16 __ushort_as_bfloat16(unsigned short value) { return emulator_bits<nv_bfloat16>(value); }
static inline unsigned short __bfloat16_as_ushort(nv_bfloat16 value) { return value.raw; }
static inline bool __hgt(nv_bfloat16 a, nv_bfloat16 b) { return float(a) > float(b); }
static inline bool __hlt(nv_bfloat16 a, nv_bfloat16 b) { return float(a) < float(b); }
static inline nv_bfloat16 __hadd(nv_bfloat16 a, nv_bfloat16 b) { return nv_bfloat16(float(a) + float(b)); }
static inline nv_bfloat16 __hmul(nv_bfloat16 a, nv_bfloat16 b) { return nv_bfloat16(float(a) * float(b)); }

// ---- scalars ------------------------------------------------------------------------------------------------
#define EMULATOR_MIN_MAX(TYPE)                                                \
  static inline TYPE max(TYPE a, TYPE b) { return a > b ? a : b; }            \
  static inline TYPE min(TYPE a, TYPE b) { return a < b ? a : b; }
EMULATOR_MIN_MAX(int)
EMULATOR_MIN_MAX(unsigned)
EMULATOR_MIN_MAX(long)
EMULATOR_MIN_MAX(unsigned long)
EMULATOR_MIN_MAX(long long)
EMULATOR_MIN_MAX(unsigned long long)
// As on the device: the other operand where one is not a number.
static inline float max(float a, float b) { return fmaxf(a, b); }
static inline float min(float a, float b) { return fminf(a, b); }
static inline double max(double a, double b) { return fmax(a, b); }
static inline double min(double a, double b) { return fmin(a, b); }
#define EMULATOR_MIXED(A, B, R)                                               \
  static inline R max(A a, B b) { return max((R)a, (R)b); }                   \
  static inline R max(B a, A b) { return max((R)a, (R)b); }                   \
  static inline R min(A a, B b) { return min((R)a, (R)b); }                   \
  static inline R min(B a, A b) { return min((R)a, (R)b); }
EMULATOR_MIXED(int, unsigned, unsigned)
EMULATOR_MIXED(int, long, long)
EMULATOR_MIXED(int, long long, long long)
EMULATOR_MIXED(float, double, double)

template <class T>
static inline T __ldg(const T* pointer) {
  return *pointer;
}
static inline int __float_as_int(float value) { return emulator_bits<int>(value); }
static inline unsigned __float_as_uint(float value) { return emulator_bits<unsigned>(value); }
static inline long long __double_as_longlong(double value) { return emulator_bits<long long>(value); }
static inline double __longlong_as_double(long long value) { return emulator_bits<double>(value); }
static inline float __int_as_float(int value) { return emulator_bits<float>(value); }
static inline float __uint_as_float(unsigned value) { return emulator_bits<float>(value); }
static inline int __float2int_rd(float value) { return int(floorf(value)); }
static inline int __float2int_rz(float value) { return int(value); }
static inline int __float2int_rn(float value) { return int(rintf(value)); }
static inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
static inline float __fadd_rn(float a, float b) { return a + b; }
static inline float __fsub_rn(float a, float b) { return a - b; }
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline float __fdividef(float a, float b) { return a / b; }
static inline float __frcp_rn(float a) { return 1.0f / a; }
// glibc has functions of these names.
#define __expf(A) expf(A)
#define __logf(A) logf(A)
static inline float __saturatef(float a) { return a > 0.0f ? (a < 1.0f ? a : 1.0f) : 0.0f; }
static inline float rsqrtf(float a) { return 1.0f / sqrtf(a); }
static inline int __mul24(int a, int b) { return a * b; }
static inline int __popc(unsigned a) { return __builtin_popcount(a); }
static inline int __clz(int a) { return a ? __builtin_clz(unsigned(a)) : 32; }
static inline int __ffs(int a) { return __builtin_ffs(a); }
static inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }
static inline int __mulhi(int a, int b) { return int(int64_t(a) * b >> 32); }

// ---- warp and memory instructions ---------------------------------------------------------------------------
template <class T>
static inline T emulator_shuffled(int kind, int line, unsigned mask, T value, int source, int width = 32) {
  static_assert(sizeof(T) <= 8, "shuffles move up to 8 bytes");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  bits = emulator_shuffle(kind, mask, bits, source, width, line);
  memcpy(&value, &bits, sizeof value);
  return value;
}

template <class T>
struct EmulatorElement;
#define EMULATOR_ELEMENT(TYPE, NUMBER, COUNT) \
  template <>                                 \
  struct EmulatorElement<TYPE> {              \
    enum { type = NUMBER, count = COUNT };    \
  };
EMULATOR_ELEMENT(float, 0, 1)
EMULATOR_ELEMENT(float2, 0, 2)
EMULATOR_ELEMENT(float4, 0, 4)
EMULATOR_ELEMENT(double, 1, 1)
EMULATOR_ELEMENT(int, 2, 1)
EMULATOR_ELEMENT(unsigned, 2, 1)
EMULATOR_ELEMENT(unsigned long long, 3, 1)
EMULATOR_ELEMENT(half, 4, 1)
EMULATOR_ELEMENT(half2, 4, 2)
EMULATOR_ELEMENT(nv_bfloat16, 5, 1)
EMULATOR_ELEMENT(nv_bfloat162, 5, 2)
template <class T, class V>
static inline T emulator_added(int line, T* address, V value) {
  const T operand = value;
  T old;
  emulator_atomic_add(address, &operand, EmulatorElement<T>::type, EmulatorElement<T>::count, &old, line);
  return old;
}

static inline unsigned emulator_raised(int line, unsigned* address, unsigned value) {
  unsigned old;
  emulator_atomic_add(address, &value, 6, 1, &old, line);
  return old;
}

// Registers of inline assembly.
template <class To, class From>
static inline To emulator_register(From value) {
  if constexpr (sizeof(To) == sizeof(From)) {
    To result;
    memcpy(&result, &value, sizeof result);
    return result;
  } else {
    return To(value);
  }
}
template <class T>
static inline uint64_t emulator_register64(T* pointer) {
  return reinterpret_cast<uint64_t>(pointer);
}
static inline uint64_t emulator_register64(uint64_t value) { return value; }
template <class T>
static inline void emulator_load(T* out, uint64_t address, int count) {
  emulator_check(reinterpret_cast<void*>(address), sizeof(T) * count, 0);
  memcpy(out, reinterpret_cast<void*>(address), sizeof(T) * count);
}
template <class T>
static inline void emulator_store(const T* in, uint64_t address, int count) {
  emulator_check(reinterpret_cast<void*>(address), sizeof(T) * count, 1);
  memcpy(reinterpret_cast<void*>(address), in, sizeof(T) * count);
}
// cvt.rna.tf32.f32: to nearest, ties away from zero.
static inline unsigned emulator_tf32(float value) {
  const unsigned bits = emulator_bits<unsigned>(value);
  return (bits & 0x7f800000u) == 0x7f800000u ? bits : (bits + 0x1000u) & ~0x1fffu;
}
