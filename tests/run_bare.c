// SPDX-License-Identifier: Apache-2.0
// Calls a function of a kernel.so with nothing but a C library: for processors that only an emulator has here.
//
//     run_bare KERNEL FUNCTION ARGUMENT...
//
// ARGUMENT is an integer, or FILE:CODE:BITS:SIZExSIZE... of a tensor, whose memory is read before and written after.
// What kernels ask of TVM's runtime stands below, as tvm/runtime/base.h and tvm/ffi/c_api.h of the pinned versions say.

#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MOST = 32, AXES = 8, ALIGNMENT = 64 };

typedef struct {
  int32_t type_index, padding;
  int64_t value;
} Any;

typedef struct {
  void* data;
  int32_t device_type, device_id, ndim;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t *shape, *strides;
  uint64_t byte_offset;
} Tensor;

typedef struct {
  void* sync_handle;
  int32_t num_task;
} Group;

static int parallel_launch(int (*lambda)(int, Group*, void*), void* closure, int num_task) {
  Group group = {NULL, num_task > 0 ? num_task : 3};
  for (int task = 0; task < group.num_task; ++task) {
    int failed = lambda(task, &group, closure);
    if (failed) return failed;
  }
  return 0;
}

static void* alloc_workspace(int device_type, int device_id, uint64_t bytes, int code, int bits) {
  (void)device_type, (void)device_id, (void)code, (void)bits;
  return aligned_alloc(ALIGNMENT, (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT);
}

static int free_workspace(int device_type, int device_id, void* memory) {
  (void)device_type, (void)device_id;
  free(memory);
  return 0;
}

// What kernels report wrong arguments with.
void TVMFFIErrorSetRaisedFromCStrParts(const char* kind, const char** parts, int32_t count) {
  fprintf(stderr, "%s: ", kind);
  for (int32_t i = 0; i < count; ++i) fputs(parts[i] ? parts[i] : "", stderr);
  fputc('\n', stderr);
}

static void fail(const char* what) {
  fprintf(stderr, "run_bare: %s\n", what);
  exit(1);
}

static Tensor tensors[MOST];
static int64_t sizes[MOST][2 * AXES];
static char* names[MOST];
static size_t bytes_of[MOST];

static Tensor* read_tensor(int index, char* text) {
  Tensor* tensor = &tensors[index];
  char* save = NULL;
  names[index] = strtok_r(text, ":", &save);
  tensor->device_type = 1;
  tensor->code = atoi(strtok_r(NULL, ":", &save));
  tensor->bits = atoi(strtok_r(NULL, ":", &save));
  tensor->lanes = 1;
  tensor->shape = sizes[index];
  for (char* size = strtok_r(NULL, "x", &save); size; size = strtok_r(NULL, "x", &save)) {
    if (tensor->ndim == AXES) fail("too many axes");
    tensor->shape[tensor->ndim++] = atoll(size);
  }
  tensor->strides = tensor->shape + tensor->ndim;
  int64_t count = 1;
  for (int axis = tensor->ndim; axis-- > 0; count *= tensor->shape[axis]) tensor->strides[axis] = count;
  bytes_of[index] = count * tensor->bits / 8;
  tensor->data = alloc_workspace(0, 0, bytes_of[index], 0, 0);
  FILE* file = fopen(names[index], "rb");
  if (!file || fread(tensor->data, 1, bytes_of[index], file) != bytes_of[index]) fail(names[index]);
  fclose(file);
  return tensor;
}

int main(int argc, char** argv) {
  if (argc < 4 || argc - 3 > MOST) fail("usage: run_bare KERNEL FUNCTION ARGUMENT...");
  void* library = dlopen(argv[1], RTLD_NOW);
  if (!library) fail(dlerror());
  const struct {
    const char* name;
    void* function;
  } provided[] = {{"__TVMBackendParallelLaunch", (void*)parallel_launch},
                  {"__TVMBackendAllocWorkspace", (void*)alloc_workspace},
                  {"__TVMBackendFreeWorkspace", (void*)free_workspace}};
  for (int i = 0; i < 3; ++i) {
    void** place = dlsym(library, provided[i].name);
    if (place) *place = provided[i].function;
  }
  char name[200];
  snprintf(name, sizeof name, "__tvm_ffi_%s", argv[2]);
  int (*function)(void*, const Any*, int32_t, Any*) = (int (*)(void*, const Any*, int32_t, Any*))dlsym(library, name);
  if (!function) fail(dlerror());
  Any arguments[MOST] = {{0, 0, 0}}, result = {0, 0, 0};
  int count = argc - 3;
  for (int i = 0; i < count; ++i) {
    int is_tensor = strchr(argv[3 + i], ':') != NULL;
    arguments[i].type_index = is_tensor ? 7 : 1;  // kTVMFFIDLTensorPtr, kTVMFFIInt
    arguments[i].value = is_tensor ? (int64_t)(intptr_t)read_tensor(i, argv[3 + i]) : atoll(argv[3 + i]);
  }
  if (function(NULL, arguments, count, &result)) fail("the kernel refused its arguments");
  for (int i = 0; i < count; ++i) {
    if (!names[i]) continue;
    FILE* file = fopen(names[i], "wb");
    if (!file || fwrite(tensors[i].data, 1, bytes_of[i], file) != bytes_of[i] || fclose(file)) fail(names[i]);
  }
  return 0;
}
