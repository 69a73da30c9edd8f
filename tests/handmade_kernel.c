/* SPDX-License-Identifier: Apache-2.0
 *
 * A deformable convolution written by hand, with the interface of the compiled ones: tests of the runtime need a
 * kernel within a second, for any specification, and one that says when it is called wrongly. Slow and plain.
 *
 * Compiled with -D for every name in capitals that is not defined here (tests/handmade.py).
 */
#include "handmade.h"

#define BLOCKS ((COUT / GROUPS + LANES - 1) / LANES)

typedef struct {
  const item *x, *offset, *mask;
  const acc *weight, *bias;
  item *out;
  int64_t n, height, width, out_width, pixels, tasks, tiles, units;
} Call;

static acc corner(const Call *c, int64_t n, int64_t channel, int64_t row, int64_t column) {
  if (row < 0 || row >= c->height || column < 0 || column >= c->width) return 0;
  return load(c->x[element(n, channel, row * c->width + column, CIN, c->height * c->width)]);
}

static acc sample(const Call *c, int64_t n, int64_t channel, int64_t pixel, int tap) {
  int64_t g = channel / (CIN / OFFSET_GROUPS), first = (g * TAPS + tap) * 2;
  acc row = (acc)(pixel / c->out_width * SH - TOP + tap / KW * DH);
  acc column = (acc)(pixel % c->out_width * SW - LEFT + tap % KW * DW);
  row += load(c->offset[element(n, first, pixel, OFFSET_GROUPS * 2 * TAPS, c->pixels)]);
  column += load(c->offset[element(n, first + 1, pixel, OFFSET_GROUPS * 2 * TAPS, c->pixels)]);
  if (!(row > -1 && row < c->height && column > -1 && column < c->width)) return 0;
  int64_t r = (int64_t)floor(row), q = (int64_t)floor(column);
  acc fr = row - r, fq = column - q;
  acc value = (1 - fr) * ((1 - fq) * corner(c, n, channel, r, q) + fq * corner(c, n, channel, r, q + 1)) +
              fr * ((1 - fq) * corner(c, n, channel, r + 1, q) + fq * corner(c, n, channel, r + 1, q + 1));
  if (MASK) value *= load(c->mask[element(n, g * TAPS + tap, pixel, OFFSET_GROUPS * TAPS, c->pixels)]);
  return value;
}

static void compute_task(const Call *c, int64_t task) {
  int64_t n = task / c->tiles, first = task % c->tiles * c->units * GRANULE;
  for (int64_t pixel = first; pixel < first + c->units * GRANULE && pixel < c->pixels; ++pixel)
    for (int o = 0; o < COUT; ++o) {
      int g = o / (COUT / GROUPS), inside = o % (COUT / GROUPS);
      acc sum = c->bias[o];
      for (int tap = 0; tap < TAPS; ++tap)
        for (int i = 0; i < CIN / GROUPS; ++i)
          sum += sample(c, n, g * (CIN / GROUPS) + i, pixel, tap) *
                 c->weight[(((g * BLOCKS + inside / LANES) * TAPS + tap) * (CIN / GROUPS) + i) * LANES +
                           inside % LANES];
      c->out[element(n, o, pixel, COUT, c->pixels)] = store(sum);
    }
}

static int run(int thread, Group *group, void *data) {
  const Call *c = data;
  for (int64_t task = thread; task < c->tasks; task += group->num_task) compute_task(c, task);
  return 0;
}

int __tvm_ffi_deform_conv2d(void *self, const Any *args, int32_t count, Any *result) {
  if (count != 11 + MASK) return refuse("wrong number of arguments");
  for (int index = 5 + MASK; index < count; ++index)
    if (args[index].type_index != 1) return refuse("a size is not an integer");
  const Any *s = args + 5 + MASK;
  Call c = {.height = s[0].value.integer, .width = s[1].value.integer, .out_width = s[2].value.integer,
            .tasks = s[3].value.integer, .tiles = s[4].value.integer, .units = s[5].value.integer};
  const Tensor *out = args[4 + MASK].value.pointer;
  c.n = out->shape[0];
  c.pixels = out->shape[NHWC ? 1 : 2];
  if (c.tasks != c.n * c.tiles || c.tiles * c.units * GRANULE < c.pixels || c.pixels < GRANULE ||
      c.units > MAX_UNITS || (c.tiles - 1) * c.units * GRANULE >= c.pixels)
    return refuse("the partition does not cover the pixels");
  int next = 0;
  const int64_t size = c.height * c.width;
  const Tensor *x = NHWC ? tensor(&args[next++], DTYPE_CODE, DTYPE_BITS, 2, (int64_t[]){c.n, size * CIN})
                         : tensor(&args[next++], DTYPE_CODE, DTYPE_BITS, 3, (int64_t[]){c.n, CIN, size});
  const Tensor *offset = tensor(&args[next++], DTYPE_CODE, DTYPE_BITS, 3, IMAGE(c.n, OFFSET_GROUPS * 2 * TAPS, c.pixels));
  const Tensor *mask = MASK ? tensor(&args[next++], DTYPE_CODE, DTYPE_BITS, 3, IMAGE(c.n, OFFSET_GROUPS * TAPS, c.pixels)) : x;
  const Tensor *weight = tensor(&args[next++], 2, 8 * sizeof(acc), 5, (int64_t[]){GROUPS, BLOCKS, TAPS, CIN / GROUPS, LANES});
  const Tensor *bias = tensor(&args[next++], 2, 8 * sizeof(acc), 1, (int64_t[]){COUT});
  out = tensor(&args[next++], DTYPE_CODE, DTYPE_BITS, 3, IMAGE(c.n, COUT, c.pixels));
  if (!x || !offset || !mask || !weight || !bias || !out) return refuse("a tensor is not what it must be");
  c.x = (const item *)x->data, c.offset = (const item *)offset->data, c.mask = (const item *)mask->data;
  c.weight = (const acc *)weight->data, c.bias = (const acc *)bias->data, c.out = (item *)out->data;
  return TVMBackendParallelLaunch(run, &c, 0);
}

int __tvm_ffi_pack_weight(void *self, const Any *args, int32_t count, Any *result) {
  if (count != 2) return refuse("wrong number of arguments");
  const Tensor *from = tensor(&args[0], DTYPE_CODE, DTYPE_BITS, 2, (int64_t[]){COUT, CIN / GROUPS * KH * KW});
  const Tensor *to = tensor(&args[1], 2, 8 * sizeof(acc), 5, (int64_t[]){GROUPS, BLOCKS, TAPS, CIN / GROUPS, LANES});
  if (!from || !to) return refuse("a tensor is not what it must be");
  memset(to->data, 0, sizeof(acc) * GROUPS * BLOCKS * TAPS * (CIN / GROUPS) * LANES);
  for (int o = 0; o < COUT; ++o)
    for (int i = 0; i < CIN / GROUPS; ++i)
      for (int tap = 0; tap < TAPS; ++tap) {
        int g = o / (COUT / GROUPS), inside = o % (COUT / GROUPS);
        ((acc *)to->data)[(((g * BLOCKS + inside / LANES) * TAPS + tap) * (CIN / GROUPS) + i) * LANES +
                          inside % LANES] = load(((const item *)from->data)[(o * (CIN / GROUPS) + i) * TAPS + tap]);
      }
  return 0;
}
