/* SPDX-License-Identifier: Apache-2.0
 *
 * The gradients of a deformable convolution written by hand, with the interface of the compiled ones; see
 * handmade_kernel.c. On one thread, one number after another.
 */
#include <stdlib.h>

#include "handmade.h"

/* What is read and given: the specification's inputs and outputs. */
#define SAMPLED (GRAD_INPUT || GRAD_OFFSET || GRAD_WEIGHT)
#define READS_X (GRAD_OFFSET || GRAD_WEIGHT)
#define READS_WEIGHT (GRAD_INPUT || GRAD_OFFSET)
#define READS_MASK (SAMPLED && MASK)
#define GRAD_MASK (GRAD_OFFSET && MASK)
#define INPUTS (1 + READS_X + SAMPLED + READS_MASK + READS_WEIGHT)
#define OUTPUTS (GRAD_INPUT + GRAD_OFFSET + GRAD_MASK + GRAD_WEIGHT + GRAD_BIAS)
#define IN_GROUP (CIN / GROUPS)
#define OUT_GROUP (COUT / GROUPS)
#define PACKED (int64_t[]){GROUPS, TAPS, 1, OUT_GROUP, IN_GROUP}

typedef struct {
  const item *grad, *x, *offset, *mask;
  const acc *weight;
  acc *grad_x, *grad_weight, *grad_bias;
  item *grad_offset, *grad_mask;
  int64_t n, height, width, out_width, pixels;
} Call;

/* One tap of one offset group at one output pixel. */
static void add_sample(const Call *c, int64_t n, int64_t pixel, int og, int tap) {
  const int64_t size = c->height * c->width, field = (og * TAPS + tap) * 2;
  acc place[2] = {(acc)(pixel / c->out_width * SH - TOP + tap / KW * DH),
                  (acc)(pixel % c->out_width * SW - LEFT + tap % KW * DW)};
  int inside = 1, used = 1;
  for (int axis = 0; axis < 2; ++axis) {
    place[axis] += load(c->offset[element(n, field + axis, pixel, OFFSET_GROUPS * 2 * TAPS, c->pixels)]);
    const acc far = axis ? c->width : c->height;
    inside &= place[axis] > -1 && place[axis] < far;
    used &= place[axis] >= -1 && place[axis] < far;
  }
  if (MMCV) used = inside;
  const acc strength = MASK ? load(c->mask[element(n, field / 2, pixel, OFFSET_GROUPS * TAPS, c->pixels)]) : 1;
  const int64_t low[2] = {used ? (int64_t)floor(place[0]) : 0, used ? (int64_t)floor(place[1]) : 0};
  acc slopes[2] = {0, 0}, of_mask = 0;
  for (int channel = og * (CIN / OFFSET_GROUPS); used && channel < (og + 1) * (CIN / OFFSET_GROUPS); ++channel) {
    const int g = channel / IN_GROUP, i = channel % IN_GROUP;
    acc back = 0, value = 0;
    for (int o = 0; READS_WEIGHT && o < OUT_GROUP; ++o)
      back += load(c->grad[element(n, g * OUT_GROUP + o, pixel, COUT, c->pixels)]) *
              c->weight[((g * TAPS + tap) * OUT_GROUP + o) * IN_GROUP + i];
    for (int corner = 0; corner < 4; ++corner) {
      const int bits[2] = {corner / 2, corner % 2};
      const int64_t row = low[0] + bits[0], column = low[1] + bits[1];
      if (row < 0 || row >= c->height || column < 0 || column >= c->width) continue;
      acc share[2];
      for (int axis = 0; axis < 2; ++axis) {
        const acc fraction = place[axis] - low[axis];
        share[axis] = bits[axis] ? fraction : 1 - fraction;
      }
      const int64_t at = element(n, channel, row * c->width + column, CIN, size);
      const acc x = READS_X ? load(c->x[at]) : 0;
      if (inside) value += share[0] * share[1] * x;
      if (inside && GRAD_INPUT) c->grad_x[at] += share[0] * share[1] * strength * back;
      for (int axis = 0; axis < 2; ++axis) slopes[axis] += (bits[axis] ? 1 : -1) * share[1 - axis] * x * back * strength;
    }
    of_mask += value * back;
    for (int o = 0; GRAD_WEIGHT && o < OUT_GROUP; ++o)
      c->grad_weight[((g * OUT_GROUP + o) * IN_GROUP + i) * TAPS + tap] +=
          value * strength * load(c->grad[element(n, g * OUT_GROUP + o, pixel, COUT, c->pixels)]);
  }
  for (int axis = 0; GRAD_OFFSET && axis < 2; ++axis)
    c->grad_offset[element(n, field + axis, pixel, OFFSET_GROUPS * 2 * TAPS, c->pixels)] = store(slopes[axis]);
  if (GRAD_MASK) c->grad_mask[element(n, field / 2, pixel, OFFSET_GROUPS * TAPS, c->pixels)] = store(of_mask);
}

/* Convert a sum, and give its memory free. */
static void finish(acc *sum, const Tensor *out, int64_t count) {
  for (int64_t i = 0; out && i < count; ++i) ((item *)out->data)[i] = store(sum[i]);
  free(sum);
}

int __tvm_ffi_deform_conv2d_grad(void *self, const Any *args, int32_t count, Any *result) {
  if (count != INPUTS + OUTPUTS + 6) return refuse("wrong number of arguments");
  const Any *s = args + INPUTS + OUTPUTS;
  for (int index = 0; index < 6; ++index)
    if (s[index].type_index != 1) return refuse("a size is not an integer");
  Call c = {.height = s[0].value.integer, .width = s[1].value.integer, .out_width = s[2].value.integer};
  const int64_t tasks = s[3].value.integer, tiles = s[4].value.integer, units = s[5].value.integer;
  const Tensor *grad = args[0].value.pointer;
  c.n = grad->shape[0];
  c.pixels = grad->shape[NHWC ? 1 : 2];
  if (tasks != c.n * tiles || tiles * units * GRANULE < c.pixels || c.pixels < GRANULE || units > MAX_UNITS ||
      (tiles - 1) * units * GRANULE >= c.pixels)
    return refuse("the partition does not cover the pixels");
  const int64_t size = c.height * c.width;
  const int64_t kernel[] = {COUT, IN_GROUP * TAPS}, channels[] = {COUT};
  const Tensor *t[10] = {0};
  int next = 0, wrong = 0;
#define TAKE(place, asked, code, bits, ndim, shape) \
  if (asked) wrong |= !(t[place] = tensor(&args[next++], code, bits, ndim, shape))
  TAKE(0, 1, DTYPE_CODE, DTYPE_BITS, 3, IMAGE(c.n, COUT, c.pixels));
  TAKE(1, READS_X, DTYPE_CODE, DTYPE_BITS, 3, IMAGE(c.n, CIN, size));
  TAKE(2, SAMPLED, DTYPE_CODE, DTYPE_BITS, 3, IMAGE(c.n, OFFSET_GROUPS * 2 * TAPS, c.pixels));
  TAKE(3, READS_MASK, DTYPE_CODE, DTYPE_BITS, 3, IMAGE(c.n, OFFSET_GROUPS * TAPS, c.pixels));
  TAKE(4, READS_WEIGHT, 2, 8 * sizeof(acc), 5, PACKED);
  TAKE(5, GRAD_INPUT, DTYPE_CODE, DTYPE_BITS, 3, IMAGE(c.n, CIN, size));
  TAKE(6, GRAD_OFFSET, DTYPE_CODE, DTYPE_BITS, 3, IMAGE(c.n, OFFSET_GROUPS * 2 * TAPS, c.pixels));
  TAKE(7, GRAD_MASK, DTYPE_CODE, DTYPE_BITS, 3, IMAGE(c.n, OFFSET_GROUPS * TAPS, c.pixels));
  TAKE(8, GRAD_WEIGHT, DTYPE_CODE, DTYPE_BITS, 2, kernel);
  TAKE(9, GRAD_BIAS, DTYPE_CODE, DTYPE_BITS, 1, channels);
  if (wrong) return refuse("a tensor is not what it must be");
#define DATA(place) (t[place] ? t[place]->data : 0)
  c.grad = (const item *)DATA(0), c.x = (const item *)DATA(1), c.offset = (const item *)DATA(2);
  c.mask = (const item *)DATA(3), c.weight = (const acc *)DATA(4);
  c.grad_offset = (item *)DATA(6), c.grad_mask = (item *)DATA(7);
  c.grad_x = calloc(c.n * CIN * size, sizeof(acc));
  c.grad_weight = calloc(COUT * IN_GROUP * TAPS, sizeof(acc));
  c.grad_bias = calloc(COUT, sizeof(acc));
  for (int64_t n = 0; n < c.n; ++n)
    for (int64_t pixel = 0; pixel < c.pixels; ++pixel) {
      for (int o = 0; o < COUT; ++o) c.grad_bias[o] += load(c.grad[element(n, o, pixel, COUT, c.pixels)]);
      for (int og = 0; SAMPLED && og < OFFSET_GROUPS; ++og)
        for (int tap = 0; tap < TAPS; ++tap) add_sample(&c, n, pixel, og, tap);
    }
  finish(c.grad_x, t[5], c.n * CIN * size);
  finish(c.grad_weight, t[8], COUT * IN_GROUP * TAPS);
  finish(c.grad_bias, t[9], COUT);
  return 0;
}

int __tvm_ffi_pack_weight(void *self, const Any *args, int32_t count, Any *result) {
  if (count != 2) return refuse("wrong number of arguments");
  const Tensor *from = tensor(&args[0], DTYPE_CODE, DTYPE_BITS, 2, (int64_t[]){COUT, IN_GROUP * KH * KW});
  const Tensor *to = tensor(&args[1], 2, 8 * sizeof(acc), 5, PACKED);
  if (!from || !to) return refuse("a tensor is not what it must be");
  for (int o = 0; o < COUT; ++o)
    for (int i = 0; i < IN_GROUP; ++i)
      for (int tap = 0; tap < TAPS; ++tap)
        ((acc *)to->data)[((o / OUT_GROUP * TAPS + tap) * OUT_GROUP + o % OUT_GROUP) * IN_GROUP + i] =
            load(((const item *)from->data)[(o * IN_GROUP + i) * TAPS + tap]);
  return 0;
}
