/* SPDX-License-Identifier: Apache-2.0
 *
 * What the handmade kernels share: the C interface of tvm-ffi, dtypes, checks of arguments.
 *
 * Compiled with -D for every name in capitals that is not defined here (tests/handmade.py).
 */
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

typedef struct {
  int32_t type_index;
  uint32_t padding;
  union {
    int64_t integer;
    void *pointer;
  } value;
} Any;

typedef struct {
  char *data;
  int32_t device_type, device_id, ndim;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t *shape, *strides;
  uint64_t byte_offset;
} Tensor;

typedef struct {
  void *sync;
  int32_t num_task;
} Group;

extern void TVMFFIErrorSetRaisedFromCStr(const char *kind, const char *message);
extern int TVMBackendParallelLaunch(int (*task)(int, Group *, void *), void *data, int num_task);

#define TAPS (KH * KW)

#if DTYPE_CODE == 4 /* bfloat16: the upper half of a float */
typedef uint16_t item;
static float load(item x) {
  uint32_t bits = (uint32_t)x << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
static item store(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
#elif DTYPE_BITS == 16
typedef _Float16 item;
#define load(x) ((float)(x))
#define store(x) ((_Float16)(x))
#elif DTYPE_BITS == 32
typedef float item;
#define load(x) (x)
#define store(x) (x)
#else
typedef double item;
#define load(x) (x)
#define store(x) (x)
#endif
#if DTYPE_BITS == 64
typedef double acc;
#else
typedef float acc;
#endif

static int refuse(const char *what) {
  TVMFFIErrorSetRaisedFromCStr("ValueError", what);
  return -1;
}

/* The tensor of an argument if it is what it must be: on the CPU, of the dtype and shape, and compact. */
static const Tensor *tensor(const Any *any, int code, int bits, int ndim, const int64_t *shape) {
  const Tensor *t = any->value.pointer;
  if (any->type_index != 7 || t->device_type != 1 || t->ndim != ndim || t->code != code || t->bits != bits ||
      t->lanes != 1 || t->byte_offset || !t->data)
    return 0;
  int64_t step = 1;
  for (int axis = ndim - 1; axis >= 0; --axis) {
    if (t->shape[axis] != shape[axis] || t->strides[axis] != step) return 0;
    step *= shape[axis];
  }
  return t;
}

/* Where an element of an image lies. */
static int64_t element(int64_t n, int64_t channel, int64_t pixel, int64_t channels, int64_t pixels) {
  return NHWC ? (n * pixels + pixel) * channels + channel : (n * channels + channel) * pixels + pixel;
}

/* The shape of an image whose channels and pixels are those of `batch` images. */
#define IMAGE(batch, channels, pixels) \
  NHWC ? (int64_t[]){batch, pixels, channels} : (int64_t[]){batch, channels, pixels}
