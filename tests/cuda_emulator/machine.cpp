// SPDX-License-Identifier: Apache-2.0
// The machine that runs emulated kernels: threads as fibers, barriers and warp instructions as meeting points,
// and a shadow of each byte of shared and global memory that says who wrote and read it last.
//
// The kernels are compiled with -fsanitize=thread, but not linked with its runtime: the compiler then calls
// __tsan_readN and __tsan_writeN before each access, and those calls are answered here.
#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace {

struct Index {
  unsigned x, y, z;
};

constexpr int kWarp = 32;
constexpr size_t kStack = 256 << 10;
constexpr size_t kShared = 1 << 20;
constexpr size_t kArena = size_t(1) << 29;
// Between two arrays lies memory that belongs to none, so that an index beyond the end is seen.
constexpr size_t kGuard = 4096;

enum State { kReady, kWarpWait, kBlockWait, kDone, kFailed };
enum Collective { kSyncWarp, kShuffle, kActiveMask, kVote, kLoadMatrix, kMma };
const char* const kCollectives[] = {"__syncwarp", "shuffle", "__activemask", "vote", "ldmatrix", "mma"};

// Who touched a byte last. `epoch` counts barriers of blocks over the whole life of the machine, so that no
// shadow is ever cleared; `warp_epoch` counts __syncwarp since the last of them.
struct Stamp {
  uint32_t epoch = 0;
  uint16_t warp_epoch = 0;
  // Several threads: of one warp, or of several. Of those who touched, `thread` is the last one.
  uint16_t thread : 10, many : 1, many_in_warp : 1, unused : 4;
};
static_assert(sizeof(Stamp) == 8, "one load");
struct Cell {
  Stamp writer, reader, adder;
};

struct Region {
  std::string name;
  char* begin;
  size_t bytes;
  size_t itemsize;
  bool writable, defined;
};

struct Copy {
  char* destination;
  unsigned bytes;
  unsigned char data[16];
};

struct Fiber {
#if defined(__x86_64__)
  void* sp;
#else
  ucontext_t context;
#endif
  State state;
  Index thread;
  int number, lane, warp;
  // What the fiber waits for.
  Collective collective;
  int variant, line, width, source;
  unsigned mask;
  uint64_t value;
  void* site;
  unsigned* out[8];
  unsigned in[12];
  // Copies of cp.async that are not waited for: the groups that were committed, oldest first, and the open one.
  std::vector<std::vector<Copy>> groups;
  std::vector<Copy> open;
};

std::vector<Fiber> fibers;
Fiber* current = nullptr;
int alive = 0;
char* stacks = nullptr;
size_t stack_count = 0;
#if defined(__x86_64__)
void* scheduler_sp;
#else
ucontext_t scheduler_context;
#endif

char* shared = nullptr;
Cell* shared_cells = nullptr;
uint16_t* in_flight = nullptr;
size_t in_flight_count = 0;
std::vector<Region> shared_regions;
size_t shared_used = 0;
size_t static_bytes = 0;
size_t dynamic_bytes = 0;
char* dynamic_shared = nullptr;

char* arena = nullptr;
Cell* arena_cells = nullptr;
size_t arena_used = 0;
std::vector<Region> regions;
Region* last_region = nullptr;

uint32_t epoch = 1, block_start = 1, launch_start = 1;
std::vector<uint16_t> warp_epochs;
Index block_index, block_extent, grid_extent;
void (*entry)(void**);
void** entry_arguments;
char* image_begin = nullptr;
char* image_end = nullptr;

std::string message;
int failed_line = 0;
void* failed_site = nullptr;

#if defined(__x86_64__)
extern "C" void emulator_switch(void** save, void* load);
asm(R"(
.text
.globl emulator_switch
.hidden emulator_switch
.type emulator_switch,@function
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulator_switch,.-emulator_switch
)");
void to_scheduler() { emulator_switch(&current->sp, scheduler_sp); }
void to_fiber() { emulator_switch(&scheduler_sp, current->sp); }
#else
void to_scheduler() { swapcontext(&current->context, &scheduler_context); }
void to_fiber() { swapcontext(&scheduler_context, &current->context); }
#endif

std::string format(const char* text, ...) {
  char buffer[1024];
  va_list list;
  va_start(list, text);
  vsnprintf(buffer, sizeof buffer, text, list);
  va_end(list);
  return buffer;
}

std::string name_thread(const Fiber& f) {
  return format("thread (%u, %u, %u) of block (%u, %u, %u)", f.thread.x, f.thread.y, f.thread.z, block_index.x,
                block_index.y, block_index.z);
}
std::string name_thread(int number) {
  const Fiber& f = fibers[number];
  return format("thread (%u, %u, %u)", f.thread.x, f.thread.y, f.thread.z);
}

void note_failure(const std::string& text, int line, void* site) {
  if (!message.empty()) return;
  message = text;
  failed_line = line;
  failed_site = site;
}

// Ends the launch from within a fiber. Does not return: nothing behind it, such as a faulty access, happens.
[[noreturn]] void fail(const std::string& text, void* site, int line = 0) {
  note_failure(text + "; " + name_thread(*current), line, site);
  current->state = kFailed;
  to_scheduler();
  abort();
}

void trampoline() {
  entry(entry_arguments);
  current->state = kDone;
  --alive;
  to_scheduler();
  abort();
}

void start_fiber(Fiber& f) {
  char* stack = stacks + f.number * kStack;
#if defined(__x86_64__)
  void** top = reinterpret_cast<void**>(stack + kStack);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(&trampoline);
  top -= 6;
  std::fill(top, top + 6, nullptr);
  f.sp = top;
#else
  getcontext(&f.context);
  f.context.uc_stack.ss_sp = stack;
  f.context.uc_stack.ss_size = kStack;
  f.context.uc_link = nullptr;
  makecontext(&f.context, trampoline, 0);
#endif
}

std::string name_place(const Region& region, const char* address) {
  const long long offset = address - region.begin;
  const long long item = static_cast<long long>(region.itemsize);
  const long long index = offset >= 0 ? offset / item : -((-offset + item - 1) / item);
  return format("%s[%lld] (%zu elements of %zu bytes)", region.name.c_str(), index, region.bytes / region.itemsize,
                region.itemsize);
}

// The array that an address outside of every array is closest to.
std::string name_outside(const std::vector<Region>& list, const char* address) {
  const Region* best = nullptr;
  size_t distance = ~size_t(0);
  for (const Region& region : list) {
    const char* end = region.begin + region.bytes;
    const size_t here = address < region.begin ? region.begin - address : address < end ? 0 : address - end;
    if (here < distance) distance = here, best = &region;
  }
  if (best == nullptr) return format("address %p, and the kernel has no arrays there", address);
  return name_place(*best, address) + ", outside of the array";
}

Region* find(std::vector<Region>& list, const char* address, size_t bytes) {
  for (Region& region : list)
    if (address >= region.begin && address + bytes <= region.begin + region.bytes) return &region;
  return nullptr;
}

Stamp stamp_now() {
  Stamp now;
  now.epoch = epoch;
  now.warp_epoch = warp_epochs[current->warp];
  now.thread = current->number;
  now.many = now.many_in_warp = now.unused = 0;
  return now;
}

// Whether everything that a stamp stands for came before what `now` does, for certain. `since` is the epoch of
// the first barrier interval that matters at all.
bool ordered(const Stamp& stamp, const Stamp& now, uint32_t since) {
  if (stamp.epoch < since) return true;
  // Blocks are not ordered among themselves.
  if (stamp.epoch < block_start) return false;
  if (stamp.epoch < epoch) return true;
  if (stamp.many) return false;
  if (stamp.thread == now.thread && !stamp.many_in_warp) return true;
  return stamp.thread / kWarp == now.thread / kWarp && stamp.warp_epoch < now.warp_epoch;
}

// Adds one more access to a stamp that stands for accesses which need no order among themselves.
void add(Stamp& stamp, const Stamp& now, uint32_t since) {
  // What another block did must not be forgotten: nothing this block does is ordered behind it.
  if (stamp.epoch >= since && stamp.epoch < block_start) return;
  if (stamp.epoch < epoch || (stamp.thread == now.thread && !stamp.many && !stamp.many_in_warp)) {
    stamp = now;
  } else if (!stamp.many) {
    stamp.many = stamp.thread / kWarp != now.thread / kWarp;
    stamp.many_in_warp = !stamp.many;
    stamp.warp_epoch = now.warp_epoch;
    stamp.thread = now.thread;
  }
}

enum Access { kRead, kWrite, kAtomic };
const char* const kAccesses[] = {"read", "write", "atomic update"};

[[noreturn]] void fail_race(const Region& region, const char* address, Access access, const Stamp& other,
                            Access other_access, void* site) {
  std::string who;
  if (other.epoch < block_start) {
    who = "another block";
  } else if (other.many || other.many_in_warp) {
    who = "several threads, " + name_thread(other.thread) + " among them,";
  } else {
    who = name_thread(other.thread);
  }
  const bool local = &region >= shared_regions.data() && &region < shared_regions.data() + shared_regions.size();
  fail(format("race: %s of %s %s its %s by %s with no barrier between them", kAccesses[access],
              name_place(region, address).c_str(), local ? "in shared memory and" : "and", kAccesses[other_access],
              who.c_str()),
       site);
}

void check_cells(Cell* cell, const Region& region, char* address, size_t bytes, Access access, bool is_shared,
                 void* site) {
  const Stamp now = stamp_now();
  // What another block left in shared memory is of no meaning.
  const uint32_t since = is_shared ? block_start : launch_start;
  for (size_t i = 0; i < bytes; ++i, ++cell) {
    // What most accesses are, first: read again what was written before the last barrier.
    if (access == kRead && memcmp(&cell->reader, &now, sizeof now) == 0 && cell->writer.epoch < epoch &&
        cell->writer.epoch >= block_start && cell->adder.epoch == 0)
      continue;
    if (access != kWrite && (is_shared ? cell->writer.epoch < since : !region.defined && cell->writer.epoch == 0))
      fail(format("%s of %s, which nothing has written", kAccesses[access], name_place(region, address + i).c_str()),
           site);
    if (!ordered(cell->writer, now, since)) fail_race(region, address + i, access, cell->writer, kWrite, site);
    if (access != kAtomic && !ordered(cell->adder, now, since))
      fail_race(region, address + i, access, cell->adder, kAtomic, site);
    if (access != kRead && !ordered(cell->reader, now, since))
      fail_race(region, address + i, access, cell->reader, kRead, site);
    if (access == kRead) {
      add(cell->reader, now, since);
    } else if (access == kAtomic) {
      add(cell->adder, now, since);
    } else {
      *cell = {now, Stamp{}, Stamp{}};
    }
  }
}

void check(char* address, size_t bytes, size_t alignment, Access access, void* site, int line = 0) {
  if (address >= shared && address < shared + kShared) {
    Region* region = find(shared_regions, address, bytes);
    if (region == nullptr)
      fail(format("%s of %zu bytes at %s", kAccesses[access], bytes, name_outside(shared_regions, address).c_str()),
           site, line);
    if (reinterpret_cast<uintptr_t>(address) % alignment)
      fail(format("misaligned %s of %zu bytes at %s", kAccesses[access], bytes, name_place(*region, address).c_str()),
           site, line);
    const size_t offset = address - shared;
    if (in_flight_count)
      for (size_t i = 0; i < bytes; ++i)
        if (in_flight[offset + i])
          fail(format("%s of %s while a cp.async of %s to it is not waited for", kAccesses[access],
                      name_place(*region, address + i).c_str(), name_thread(in_flight[offset + i] - 1).c_str()),
               site, line);
    check_cells(shared_cells + offset, *region, address, bytes, access, true, site);
    return;
  }
  if (address >= arena && address < arena + kArena) {
    Region* region = last_region;
    if (region == nullptr || address < region->begin || address + bytes > region->begin + region->bytes) {
      region = find(regions, address, bytes);
      if (region == nullptr)
        fail(format("%s of %zu bytes at %s", kAccesses[access], bytes, name_outside(regions, address).c_str()), site,
             line);
      last_region = region;
    }
    if (reinterpret_cast<uintptr_t>(address) % alignment)
      fail(format("misaligned %s of %zu bytes at %s", kAccesses[access], bytes, name_place(*region, address).c_str()),
           site, line);
    if (access != kRead && !region->writable)
      fail(format("%s of %s, which is an input", kAccesses[access], name_place(*region, address).c_str()), site, line);
    check_cells(arena_cells + (address - arena), *region, address, bytes, access, false, site);
    return;
  }
  // Constants of the kernel's own image.
  if (access == kRead && address >= image_begin && address + bytes <= image_end) return;
  fail(format("%s of %zu bytes at %s", kAccesses[access], bytes, name_outside(regions, address).c_str()), site, line);
}

inline void hook(void* address, size_t bytes, size_t alignment, Access access, void* site) {
  // A sanitised static constructor, outside of a launch.
  if (current == nullptr) return;
  char* a = static_cast<char*>(address);
  // The stack of the fiber: its own variables.
  if (static_cast<size_t>(a - (stacks + current->number * kStack)) < kStack) return;
  check(a, bytes, alignment, access, site);
}

char* add_shared(const std::string& name, size_t bytes, size_t itemsize, size_t alignment) {
  // An odd multiple of the alignment asked for, so that no stricter one is relied on by luck.
  alignment = std::max<size_t>(alignment, 16);
  size_t begin = (shared_used + kGuard + 2 * alignment - 1) / (2 * alignment) * (2 * alignment) + alignment;
  if (begin + bytes + kGuard > kShared) return nullptr;
  shared_used = begin + bytes;
  shared_regions.push_back({name, shared + begin, bytes, itemsize, true, false});
  return shared + begin;
}

// ---- warp instructions --------------------------------------------------------------------------------------

float half_to_float(uint16_t bits) {
  _Float16 value;
  memcpy(&value, &bits, 2);
  return static_cast<float>(value);
}
float bfloat_to_float(uint16_t bits) {
  const uint32_t wide = uint32_t(bits) << 16;
  float value;
  memcpy(&value, &wide, 4);
  return value;
}
float bits_to_float(unsigned bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

// m16n8kK with float32 accumulators. `in` holds the registers of A, then of B, then of C.
struct MmaShape {
  int depth, a_registers, b_registers, kind;  // kind: 0 float16, 1 bfloat16, 2 tf32
};
const MmaShape kMmaShapes[] = {{16, 4, 2, 0}, {16, 4, 2, 1}, {8, 2, 1, 0}, {8, 2, 1, 1}, {8, 4, 2, 2}, {4, 2, 1, 2}};

bool run_mma(Fiber** lanes) {
  const MmaShape& shape = kMmaShapes[lanes[0]->variant];
  static float a[16][16], b[8][16];
  for (int t = 0; t < kWarp; ++t) {
    const int row = t >> 2, quad = t & 3;
    const unsigned* in = lanes[t]->in;
    if (shape.kind == 2) {
      for (int r = 0; r < shape.a_registers + shape.b_registers; ++r)
        if (in[r] & 0x1fff && (in[r] & 0x7f800000) != 0x7f800000) {
          current = lanes[t];
          note_failure(format("mma on tf32 got operand %c = %a, which is not rounded to tf32 (cvt.rna.tf32.f32); ",
                              r < shape.a_registers ? 'A' : 'B', double(bits_to_float(in[r]))) +
                           name_thread(*lanes[t]),
                       lanes[t]->line, lanes[t]->site);
          return false;
        }
      for (int r = 0; r < shape.a_registers; ++r) a[row + 8 * (r & 1)][quad + 4 * (r >> 1)] = bits_to_float(in[r]);
      for (int r = 0; r < shape.b_registers; ++r) b[row][quad + 4 * r] = bits_to_float(in[shape.a_registers + r]);
      continue;
    }
    auto value = [&](unsigned bits) {
      return shape.kind == 0 ? half_to_float(uint16_t(bits)) : bfloat_to_float(uint16_t(bits));
    };
    for (int r = 0; r < shape.a_registers; ++r)
      for (int half = 0; half < 2; ++half)
        a[row + 8 * (r & 1)][2 * quad + 8 * (r >> 1) + half] = value(in[r] >> (16 * half));
    for (int r = 0; r < shape.b_registers; ++r)
      for (int half = 0; half < 2; ++half)
        b[row][2 * quad + 8 * r + half] = value(in[shape.a_registers + r] >> (16 * half));
  }
  const int c_at = shape.a_registers + shape.b_registers;
  for (int t = 0; t < kWarp; ++t) {
    const int row = t >> 2, quad = t & 3;
    for (int r = 0; r < 4; ++r) {
      const float* left = a[row + 8 * (r >> 1)];
      const float* right = b[2 * quad + (r & 1)];
      double sum = bits_to_float(lanes[t]->in[c_at + r]);
      for (int k = 0; k < shape.depth; ++k) sum += double(left[k]) * double(right[k]);
      const float rounded = static_cast<float>(sum);
      memcpy(lanes[t]->out[r], &rounded, 4);
    }
  }
  return true;
}

// Each lane's address was checked when it arrived.
void run_load_matrix(Fiber** lanes) {
  const bool transposed = lanes[0]->variant & 8;
  const int count = lanes[0]->variant & 7;
  for (int m = 0; m < count; ++m)
    for (int t = 0; t < kWarp; ++t) {
      uint16_t pair[2];
      for (int e = 0; e < 2; ++e) {
        int row = t / 4, column = 2 * (t % 4) + e;
        if (transposed) std::swap(row, column);
        memcpy(&pair[e], shared + lanes[8 * m + row]->in[0] + 2 * column, 2);
      }
      memcpy(lanes[t]->out[m], pair, 4);
    }
}

bool run_shuffle(Fiber** lanes, unsigned mask) {
  uint64_t values[kWarp];
  for (int t = 0; t < kWarp; ++t)
    if (mask >> t & 1) values[t] = lanes[t]->value;
  for (int t = 0; t < kWarp; ++t) {
    if (!(mask >> t & 1)) continue;
    Fiber& f = *lanes[t];
    const int begin = t / f.width * f.width, end = begin + f.width;
    int source = t;
    switch (f.variant) {
      case 0: source = begin + (unsigned(f.source) & (f.width - 1)); break;
      case 1: source = t - f.source < begin ? t : t - f.source; break;
      case 2: source = t + f.source >= end ? t : t + f.source; break;
      // A lane of a later segment may not be read, one of an earlier segment may.
      case 3: source = (t ^ f.source) >= end ? t : t ^ f.source; break;
    }
    if (!(mask >> source & 1)) {
      note_failure(format("shuffle reads lane %d, which is not in its mask 0x%08x; ", source, mask) + name_thread(f),
                   f.line, f.site);
      return false;
    }
    f.value = values[source];
  }
  return true;
}

void run_vote(Fiber** lanes, unsigned mask) {
  uint64_t ballot = 0;
  for (int t = 0; t < kWarp; ++t)
    if (mask >> t & 1) ballot |= uint64_t(lanes[t]->value != 0) << t;
  for (int t = 0; t < kWarp; ++t)
    if (mask >> t & 1) lanes[t]->value = ballot;
}

// Lets the lanes pass that wait for `first`'s instruction. Returns 1 when they passed, 0 when some have not come
// yet, -1 on failure.
int resolve(Fiber** lanes, int first) {
  const Fiber& f = *lanes[first];
  unsigned waiting = 0;
  for (int t = 0; t < kWarp; ++t) {
    const Fiber* other = lanes[t];
    if (other && other->state == kWarpWait && other->collective == f.collective && other->mask == f.mask &&
        other->variant == f.variant &&
        ((f.collective != kLoadMatrix && f.collective != kMma && f.collective != kActiveMask) ||
         other->site == f.site))
      waiting |= 1u << t;
  }
  if (f.collective == kActiveMask) {
    for (int t = 0; t < kWarp; ++t)
      if (waiting >> t & 1) lanes[t]->value = waiting;
  } else {
    if ((waiting & f.mask) != f.mask) return 0;
    waiting = f.mask;
    bool passed = true;
    switch (f.collective) {
      case kSyncWarp:
        if (warp_epochs[f.warp] != 0xffff) ++warp_epochs[f.warp];
        break;
      case kShuffle: passed = run_shuffle(lanes, waiting); break;
      case kVote: run_vote(lanes, waiting); break;
      case kLoadMatrix: run_load_matrix(lanes); break;
      case kMma: passed = run_mma(lanes); break;
      default: break;
    }
    if (!passed) return -1;
  }
  for (int t = 0; t < kWarp; ++t)
    if (waiting >> t & 1) lanes[t]->state = kReady;
  return 1;
}

void fail_divergent(Fiber** lanes) {
  for (int t = 0; t < kWarp; ++t) {
    if (!lanes[t] || lanes[t]->state != kWarpWait) continue;
    const Fiber& f = *lanes[t];
    for (int other = 0; other < kWarp; ++other) {
      if (!(f.mask >> other & 1) || other == t) continue;
      const Fiber* o = lanes[other];
      const bool here = o && o->state == kWarpWait && o->collective == f.collective && o->line == f.line;
      if (here && o->mask == f.mask) continue;
      std::string what;
      if (!o) {
        what = format("lane %d, which its mask names, does not exist", other);
      } else if (o->state == kDone) {
        what = name_thread(other + f.warp * kWarp) + " has ended";
      } else if (o->state == kBlockWait) {
        what = name_thread(o->number) + format(" waits at __syncthreads in line %d", o->line);
      } else {
        what = name_thread(o->number) + format(" waits at %s in line %d", kCollectives[o->collective], o->line);
      }
      note_failure(format("divergent %s: ", kCollectives[f.collective]) + name_thread(f) + " waits, but " + what,
                   f.line, f.site);
      return;
    }
  }
  note_failure("deadlock within a warp", 0, nullptr);
}

// Runs a warp until each lane has ended or waits at a barrier of the block.
bool run_warp(Fiber** lanes) {
  for (;;) {
    for (int t = 0; t < kWarp; ++t) {
      if (!lanes[t] || lanes[t]->state != kReady) continue;
      current = lanes[t];
      to_fiber();
      if (lanes[t]->state == kFailed) return false;
    }
    bool waits = false, passed = false;
    // What each lane names exactly comes before __activemask, which takes who is there.
    for (int round = 0; round < 2 && !passed; ++round)
      for (int t = 0; t < kWarp && !passed; ++t) {
        if (!lanes[t] || lanes[t]->state != kWarpWait) continue;
        waits = true;
        if ((lanes[t]->collective == kActiveMask) != (round == 1)) continue;
        const int result = resolve(lanes, t);
        if (result < 0) return false;
        passed = result > 0;
      }
    if (!waits) return true;
    if (!passed) {
      fail_divergent(lanes);
      return false;
    }
  }
}

bool run_block(int threads) {
  const int warps = (threads + kWarp - 1) / kWarp;
  block_start = ++epoch;
  shared_used = 0;
  shared_regions.clear();
  static_bytes = 0;
  if (in_flight_count) memset(in_flight, 0, kShared * sizeof *in_flight);
  in_flight_count = 0;
  dynamic_shared = dynamic_bytes ? add_shared("dynamic shared memory", dynamic_bytes, 1, 16) : nullptr;
  std::fill(warp_epochs.begin(), warp_epochs.end(), 0);
  alive = threads;
  for (int i = 0; i < threads; ++i) {
    Fiber& f = fibers[i];
    f.state = kReady;
    f.groups.clear();
    f.open.clear();
    start_fiber(f);
  }
  for (;;) {
    for (int w = 0; w < warps; ++w) {
      Fiber* lanes[kWarp] = {};
      bool ready = false;
      for (int t = 0; t < kWarp && w * kWarp + t < threads; ++t) {
        lanes[t] = &fibers[w * kWarp + t];
        ready |= lanes[t]->state == kReady;
      }
      if (ready && !run_warp(lanes)) return false;
    }
    if (alive == 0) return true;
    const Fiber* waiting = nullptr;
    for (int i = 0; i < threads && !waiting; ++i)
      if (fibers[i].state == kBlockWait) waiting = &fibers[i];
    for (int i = 0; i < threads; ++i) {
      const Fiber& f = fibers[i];
      if (f.state == kBlockWait && f.line == waiting->line) continue;
      note_failure("divergent __syncthreads: " + name_thread(*waiting) + " waits, but " + name_thread(i) +
                       (f.state == kDone ? std::string(" has ended")
                                         : format(" waits at another one, in line %d", f.line)),
                   waiting->line, nullptr);
      return false;
    }
    ++epoch;
    std::fill(warp_epochs.begin(), warp_epochs.end(), 0);
    for (int i = 0; i < threads; ++i) fibers[i].state = kReady;
  }
}

void* map(size_t bytes) {
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) {
    fprintf(stderr, "the emulator cannot reserve %zu bytes of address space\n", bytes);
    abort();
  }
  return memory;
}

void prepare() {
  if (arena != nullptr) return;
  arena = static_cast<char*>(map(kArena));
  arena_cells = static_cast<Cell*>(map(kArena * sizeof(Cell)));
  shared = static_cast<char*>(map(kShared));
  shared_cells = static_cast<Cell*>(map(kShared * sizeof(Cell)));
  in_flight = static_cast<uint16_t*>(map(kShared * sizeof *in_flight));
}

void wait_collective(Collective collective, int variant, unsigned mask, int line, void* site) {
  Fiber& f = *current;
  f.collective = collective;
  f.variant = variant;
  f.mask = mask;
  f.line = line;
  f.site = site;
  f.state = kWarpWait;
  if (collective != kActiveMask && !(mask >> f.lane & 1))
    fail(format("%s with mask 0x%08x, which does not name the calling lane %d", kCollectives[collective], mask,
                f.lane),
         site, line);
  to_scheduler();
}

void finish(std::vector<Copy>& copies) {
  for (const Copy& copy : copies) {
    const size_t offset = copy.destination - shared;
    memcpy(copy.destination, copy.data, copy.bytes);
    const Stamp now = stamp_now();
    for (unsigned i = 0; i < copy.bytes; ++i) {
      in_flight[offset + i] = 0;
      shared_cells[offset + i] = {now, Stamp{}, Stamp{}};
    }
    in_flight_count -= copy.bytes;
  }
}

}  // namespace

#define SITE __builtin_return_address(0)
#define EXPORT extern "C" __attribute__((visibility("default")))

// ---- what compiled kernels call -----------------------------------------------------------------------------

EXPORT void __tsan_init() {}
EXPORT void __tsan_func_entry(void*) {}
EXPORT void __tsan_func_exit() {}
#define HOOKS(N)                                                                                    \
  EXPORT void __tsan_read##N(void* a) { hook(a, N, N, kRead, SITE); }                               \
  EXPORT void __tsan_write##N(void* a) { hook(a, N, N, kWrite, SITE); }                             \
  EXPORT void __tsan_unaligned_read##N(void* a) { hook(a, N, 1, kRead, SITE); }                     \
  EXPORT void __tsan_unaligned_write##N(void* a) { hook(a, N, 1, kWrite, SITE); }                   \
  EXPORT void __tsan_volatile_read##N(void* a) { hook(a, N, N, kRead, SITE); }                      \
  EXPORT void __tsan_volatile_write##N(void* a) { hook(a, N, N, kWrite, SITE); }
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)
// Structures larger than 16 bytes: CUDA's own (longlong4, double4) want 16 bytes.
EXPORT void __tsan_read_range(void* a, size_t n) { hook(a, n, n % 16 ? 1 : 16, kRead, SITE); }
EXPORT void __tsan_write_range(void* a, size_t n) { hook(a, n, n % 16 ? 1 : 16, kWrite, SITE); }
EXPORT void __tsan_vptr_update(void**, void*) {}
EXPORT void __tsan_vptr_read(void**) {}
EXPORT void __ubsan_handle_out_of_bounds(void*, uintptr_t index) {
  fail(format("index %lld outside of a local array", static_cast<long long>(index)), SITE);
}

EXPORT Index emulator_thread() { return current->thread; }
EXPORT Index emulator_block() { return block_index; }
EXPORT Index emulator_block_extent() { return block_extent; }
EXPORT Index emulator_grid_extent() { return grid_extent; }

EXPORT void* emulator_dynamic_shared(const char* name) {
  if (dynamic_shared == nullptr) fail(format("%s is dynamic shared memory, and the launch gave none", name), SITE);
  shared_regions.front().name = name;
  return dynamic_shared;
}

EXPORT void* emulator_static_shared(const char* name, size_t bytes, size_t itemsize, size_t alignment) {
  for (const Region& region : shared_regions)
    if (region.name == name) return region.begin;
  static_bytes += bytes;
  char* place = add_shared(name, bytes, itemsize, std::max(alignment, itemsize));
  if (static_bytes > 48 << 10 || place == nullptr)
    fail(format("%zu bytes of static shared memory with %s; the limit is 49152", static_bytes, name), SITE);
  return place;
}

EXPORT unsigned emulator_shared_address(const void* pointer) {
  const char* p = static_cast<const char*>(pointer);
  if (p < shared || p >= shared + kShared)
    fail("__cvta_generic_to_shared of an address outside of shared memory", SITE);
  return static_cast<unsigned>(p - shared);
}

EXPORT void* emulator_shared_pointer(unsigned address) {
  if (address >= kShared) fail(format("0x%x is no address in shared memory", address), SITE);
  return shared + address;
}

EXPORT void emulator_check(void* address, size_t bytes, int is_write) {
  hook(address, bytes, bytes, is_write ? kWrite : kRead, SITE);
}

EXPORT void emulator_barrier(int line) {
  current->line = line;
  current->state = kBlockWait;
  to_scheduler();
}

EXPORT void emulator_warp_barrier(unsigned mask, int line) { wait_collective(kSyncWarp, 0, mask, line, SITE); }

EXPORT unsigned emulator_active_mask(int line) {
  wait_collective(kActiveMask, 0, ~0u, line, SITE);
  return static_cast<unsigned>(current->value);
}

EXPORT uint64_t emulator_shuffle(int kind, unsigned mask, uint64_t value, int source, int width, int line) {
  current->value = value;
  current->source = source;
  current->width = width;
  if (width < 1 || width > kWarp || (width & (width - 1)))
    fail(format("shuffle of width %d; it must be a power of two up to 32", width), SITE, line);
  wait_collective(kShuffle, kind, mask, line, SITE);
  return current->value;
}

EXPORT unsigned emulator_vote(unsigned mask, int predicate, int line) {
  current->value = predicate != 0;
  wait_collective(kVote, 0, mask, line, SITE);
  return static_cast<unsigned>(current->value);
}

EXPORT void emulator_load_matrix(int count, int transposed, unsigned** out, unsigned address, int line) {
  // Only the first 8 lanes per matrix give an address.
  if (current->lane < 8 * count) check(shared + address % kShared, 16, 16, kRead, SITE, line);
  std::copy(out, out + count, current->out);
  current->in[0] = address;
  wait_collective(kLoadMatrix, count | (transposed ? 8 : 0), ~0u, line, SITE);
}

EXPORT void emulator_mma(int kind, unsigned** out, const unsigned* in, int count, int line) {
  std::copy(out, out + 4, current->out);
  std::copy(in, in + count, current->in);
  wait_collective(kMma, kind, ~0u, line, SITE);
}

EXPORT void emulator_copy_async(unsigned destination, const void* source, int bytes, int source_bytes, int line) {
  char* to = shared + destination % kShared;
  if ((bytes != 4 && bytes != 8 && bytes != 16) || source_bytes < 0 || source_bytes > bytes)
    fail(format("cp.async of %d bytes from %d", bytes, source_bytes), SITE, line);
  if (source_bytes) check(static_cast<char*>(const_cast<void*>(source)), source_bytes, source_bytes, kRead, SITE, line);
  check(to, bytes, bytes, kWrite, SITE, line);
  Copy copy{to, static_cast<unsigned>(bytes), {}};
  memcpy(copy.data, source, source_bytes);
  // The data arrives at the wait and no sooner; until then the place holds rubbish.
  memset(to, 0xff, bytes);
  std::fill(in_flight + (to - shared), in_flight + (to - shared) + bytes, uint16_t(current->number + 1));
  in_flight_count += bytes;
  current->open.push_back(copy);
}

EXPORT void emulator_commit_group() {
  current->groups.push_back(std::move(current->open));
  current->open.clear();
}

EXPORT void emulator_wait_group(int newest) {
  auto& groups = current->groups;
  while (groups.size() > static_cast<size_t>(newest)) {
    finish(groups.front());
    groups.erase(groups.begin());
  }
}

EXPORT void emulator_wait_all() {
  emulator_wait_group(0);
  finish(current->open);
  current->open.clear();
}

namespace {
template <class T>
T read_as(const void* p) {
  T value;
  memcpy(&value, p, sizeof value);
  return value;
}
template <class T>
void add_as(void* p, const void* v) {
  const T sum = read_as<T>(p) + read_as<T>(v);
  memcpy(p, &sum, sizeof sum);
}
void add_bfloat(void* p, const void* v) {
  const float sum = bfloat_to_float(read_as<uint16_t>(p)) + bfloat_to_float(read_as<uint16_t>(v));
  uint32_t bits;
  memcpy(&bits, &sum, 4);
  const uint16_t rounded =
      (bits & 0x7fffffff) > 0x7f800000 ? uint16_t(bits >> 16 | 0x40) : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  memcpy(p, &rounded, 2);
}
}  // namespace

// `count` elements of a type (0 float32, 1 float64, 2 int32, 3 uint64, 4 float16, 5 bfloat16; 6 uint32, of which the
// larger is kept), as one vector.
EXPORT void emulator_atomic_add(void* address, const void* value, int type, int count, void* old, int line) {
  const size_t sizes[] = {4, 8, 4, 8, 2, 2, 4};
  const size_t bytes = sizes[type] * count;
  char* a = static_cast<char*>(address);
  check(a, bytes, bytes, kAtomic, SITE, line);
  if (old) memcpy(old, a, bytes);
  for (int i = 0; i < count; ++i) {
    void* p = a + i * sizes[type];
    const void* v = static_cast<const char*>(value) + i * sizes[type];
    switch (type) {
      case 0: add_as<float>(p, v); break;
      case 1: add_as<double>(p, v); break;
      case 2: add_as<uint32_t>(p, v); break;
      case 3: add_as<uint64_t>(p, v); break;
      case 4: add_as<_Float16>(p, v); break;
      case 5: add_bfloat(p, v); break;
      case 6: if (*(const uint32_t*)v > *(uint32_t*)p) memcpy(p, v, 4); break;
    }
  }
}

// ---- what Python calls --------------------------------------------------------------------------------------

EXPORT void emulator_reset() {
  prepare();
  // The pages go back to the system; the shadow's become zero: never written.
  madvise(arena, arena_used, MADV_DONTNEED);
  madvise(arena_cells, arena_used * sizeof(Cell), MADV_DONTNEED);
  arena_used = 0;
  regions.clear();
  last_region = nullptr;
}

// Returns memory whose address is `phase` modulo 256, or null when there is none left.
EXPORT void* emulator_allocate(size_t bytes, size_t phase, size_t itemsize, int writable, int defined) {
  prepare();
  const size_t begin = (arena_used + kGuard + 255) / 256 * 256 + phase;
  if (begin + bytes + kGuard > kArena) return nullptr;
  arena_used = begin + bytes;
  regions.push_back({"array", arena + begin, bytes, itemsize, writable != 0, defined != 0});
  last_region = nullptr;
  return arena + begin;
}

EXPORT void emulator_name(void* begin, const char* name, size_t itemsize) {
  for (Region& region : regions)
    if (region.begin == begin) region.name = name, region.itemsize = itemsize;
}

EXPORT int emulator_launch(void* kernel, void** arguments, const unsigned* grid, const unsigned* block, size_t dynamic,
                           void* image, void* image_last) {
  prepare();
  const int threads = block[0] * block[1] * block[2];
  message.clear();
  failed_line = 0;
  failed_site = nullptr;
  entry = reinterpret_cast<void (*)(void**)>(kernel);
  entry_arguments = arguments;
  image_begin = static_cast<char*>(image);
  image_end = static_cast<char*>(image_last);
  dynamic_bytes = dynamic;
  grid_extent = {grid[0], grid[1], grid[2]};
  block_extent = {block[0], block[1], block[2]};
  if (stack_count < static_cast<size_t>(threads)) {
    if (stacks) munmap(stacks, stack_count * kStack);
    stack_count = threads;
    stacks = static_cast<char*>(map(stack_count * kStack));
  }
  fibers.resize(threads);
  warp_epochs.assign((threads + kWarp - 1) / kWarp, 0);
  for (int i = 0; i < threads; ++i) {
    Fiber& f = fibers[i];
    f.number = i;
    f.lane = i % kWarp;
    f.warp = i / kWarp;
    f.thread = {i % block[0], i / block[0] % block[1], i / (block[0] * block[1])};
  }
  launch_start = epoch + 1;
  bool passed = true;
  for (unsigned z = 0; z < grid[2] && passed; ++z)
    for (unsigned y = 0; y < grid[1] && passed; ++y)
      for (unsigned x = 0; x < grid[0] && passed; ++x) {
        block_index = {x, y, z};
        passed = run_block(threads);
      }
  ++epoch;
  current = nullptr;
  return passed ? 0 : 1;
}

EXPORT const char* emulator_message() { return message.c_str(); }
EXPORT int emulator_line() { return failed_line; }
EXPORT void* emulator_site() { return failed_site; }
