// Tensor-core steps, matrix loads and asynchronous copies.
#include <immintrin.h>

#include <array>
#include <cstring>
#include <vector>

#include "fragments.h"
#include "memory.h"

namespace emulator {
namespace {

struct Fragments {
  float* d;
  const uint32_t *a, *b;
};

uint16_t half_of(const uint32_t* registers, int e) { return uint16_t(registers[e / 2] >> (e % 2 * 16)); }

float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

template <Format format>
float element(const uint32_t* registers, int e) {
  if constexpr (format == Format::f16) return _cvtsh_ss(half_of(registers, e));
  if constexpr (format == Format::bf16) return from_bits(uint32_t(half_of(registers, e)) << 16);
  return from_bits(registers[e] & ~0x1fffu);  // the hardware ignores these bits
}

template <Format format>
void multiply(void* const* operands, unsigned mask, const Place& place) {
  if (mask != kAllLanes) fail(place, "mma needs all 32 lanes of the warp, its mask is %08x", mask);
  constexpr bool is_16bit = format != Format::tf32;
  constexpr int depth = is_16bit ? 16 : 8;
  float a[16][depth], b[depth][8];
  for (int lane = 0; lane < int(kWarp); ++lane) {
    const Fragments& of = *static_cast<Fragments*>(operands[lane]);
    for (int e = 0; e < depth / 2; ++e) {
      const At at = is_16bit ? in_a_16bit(lane, e) : in_a_tf32(lane, e);
      a[at.row][at.column] = element<format>(of.a, e);
    }
    for (int e = 0; e < depth / 4; ++e) {
      const At at = is_16bit ? in_b_16bit(lane, e) : in_b_tf32(lane, e);
      b[at.row][at.column] = element<format>(of.b, e);
    }
  }
  float product[16][8] = {};
  for (int row = 0; row < 16; ++row)
    for (int k = 0; k < depth; ++k)
      for (int column = 0; column < 8; ++column) product[row][column] += a[row][k] * b[k][column];
  for (int lane = 0; lane < int(kWarp); ++lane)
    for (int e = 0; e < 4; ++e) {
      const At at = in_d(lane, e);
      static_cast<Fragments*>(operands[lane])->d[e] += product[at.row][at.column];
    }
}

struct Load {
  uint32_t* to;
  const void* row;
};

template <bool transposed>
void load(void* const* operands, unsigned mask, const Place& place) {
  if (mask != kAllLanes) fail(place, "ldmatrix needs all 32 lanes of the warp, its mask is %08x", mask);
  for (int lane = 0; lane < int(kWarp); ++lane)
    for (int i = 0; i < 4; ++i) {
      uint32_t pair = 0;
      for (int half = 0; half < 2; ++half) {
        const At at = transposed ? in_loaded_transposed(lane, half) : in_loaded(lane, half);
        uint16_t bits;
        std::memcpy(&bits, static_cast<const uint16_t*>(static_cast<Load*>(operands[8 * i + at.row])->row) + at.column,
                    sizeof bits);
        pair |= uint32_t(bits) << (16 * half);
      }
      static_cast<Load*>(operands[lane])->to[i] = pair;
    }
}

constexpr size_t kCopyBytes = 16;

bool is_aligned(const void* at) { return reinterpret_cast<uintptr_t>(at) % kCopyBytes == 0; }

struct Copy {
  void* to;
  const void* from;  // null: zeros
};

// A thread's groups of copies under way; the last is not committed yet.
struct Groups {
  unsigned of_launch_block = 0;
  std::vector<std::vector<Copy>> groups = {{}};
};

std::array<Groups, 1024> all_groups;

Groups& groups_of_thread() {
  Groups& of_thread = all_groups[thread_number()];
  if (of_thread.of_launch_block != block_serial()) of_thread = {block_serial(), {{}}};  // what an earlier thread left under way
  return of_thread;
}

// A step of a warpgroup that one thread has begun; `group` counts the commits before it.
struct Step {
  int group;
  Format format;
  float* d;
  int columns;
  WarpgroupOperand a, b;
  bool by_k;
};

struct Steps {
  unsigned of_launch_block = 0;
  std::vector<Step> steps;
  int committed = 0;  // groups of steps
  bool shown = true;  // whether the tensor cores can see what the thread's copies have written
};

std::array<Steps, 1024> all_steps;

Steps& steps_of_thread() {
  Steps& of_thread = all_steps[thread_number()];
  if (of_thread.of_launch_block != block_serial()) of_thread = {block_serial(), {}, 0, true};
  return of_thread;
}

// Where element k of row (or column) i of an operand lies.
const char* place_of(const WarpgroupOperand& operand, int i, int k, bool by_k, int size) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(operand.first) +
                       (by_k ? i / 64 * operand.panel_bytes + k * 128 + i % 64 * size : i * 128 + k * size);
  return reinterpret_cast<const char*>(at ^ (at >> 7 & 7) << 4);
}

constexpr int kMostDepth = 16;

int size_of(Format format) { return format == Format::tf32 ? 4 : 2; }
int depth_of(Format format) { return 32 / size_of(format); }

// The values of one row or column.
void read_operand(const Step& step, const WarpgroupOperand& operand, int i, float (&values)[kMostDepth], const Place& place) {
  const int size = size_of(step.format);
  for (int k = 0; k < depth_of(step.format); ++k) {
    const char* from = place_of(operand, i, k, step.by_k, size);
    if (!is_shared(from, size)) fail(place, "an operand of wgmma is not in shared memory: %p", from);
    access(from, size, Access::read, __builtin_return_address(0));
    uint32_t bits = 0;
    std::memcpy(&bits, from, size);
    values[k] = step.format == Format::tf32  ? element<Format::tf32>(&bits, 0)
                : step.format == Format::f16 ? element<Format::f16>(&bits, 0)
                                             : element<Format::bf16>(&bits, 0);
  }
}

// Reads what the thread's part of the step needs; adds it up, or not yet.
void run(const Step& step, bool add, const Place& place) {
  const int lane = int(lane_number()), warp = int(thread_number()) / int(kWarp) % 4;
  float a[2][kMostDepth], b[kMostDepth];
  for (int half = 0; half < 2; ++half) read_operand(step, step.a, 16 * warp + in_d(lane, 2 * half).row, a[half], place);
  for (int tile = 0; tile < step.columns / 8; ++tile)
    for (int e = 0; e < 2; ++e) {
      read_operand(step, step.b, 8 * tile + in_d(lane, e).column, b, place);
      for (int half = 0; add && half < 2; ++half) {
        float sum = 0;
        for (int k = 0; k < depth_of(step.format); ++k) sum += a[half][k] * b[k];
        step.d[4 * tile + 2 * half + e] += sum;
      }
    }
}

}  // namespace

void wgmma(Format format, float* d, int columns, const WarpgroupOperand& a, const WarpgroupOperand& b, bool by_k,
           const Place& place) {
  // Copies that have arrived are shown by each thread, then all meet: what this thread has not shown, others have not either.
  if (!steps_of_thread().shown) fail(place, "wgmma reads what was copied before fence.proxy.async");
  const Step step = {steps_of_thread().committed, format, d, columns, a, b, by_k};
  run(step, false, place);
  steps_of_thread().steps.push_back(step);
}

void wgmma_commit() { ++steps_of_thread().committed; }

void wgmma_wait(int under_way, const Place& place) {
  Steps& of_thread = steps_of_thread();
  while (!of_thread.steps.empty() && of_thread.steps.front().group < of_thread.committed - under_way) {
    run(of_thread.steps.front(), true, place);
    of_thread.steps.erase(of_thread.steps.begin());
  }
}

void show_tensor_cores() { steps_of_thread().shown = true; }

void mma(Format format, float* d, const uint32_t* a, const uint32_t* b, const Place& place) {
  Fragments fragments = {d, a, b};
  const Combine combine = format == Format::f16    ? multiply<Format::f16>
                          : format == Format::bf16 ? multiply<Format::bf16>
                                                   : multiply<Format::tf32>;
  meet(kAllLanes, &fragments, combine, place);
}

void load_matrices(uint32_t* to, const void* shared_row, bool transposed, const Place& place) {
  if (!is_aligned(shared_row)) fail(place, "the address of a row for ldmatrix is not 16-byte aligned: %p", shared_row);
  if (!is_shared(shared_row, kCopyBytes)) fail(place, "the row for ldmatrix is not in shared memory: %p", shared_row);
  access(shared_row, kCopyBytes, Access::read, __builtin_return_address(0));
  Load operand = {to, shared_row};
  meet(kAllLanes, &operand, transposed ? load<true> : load<false>, place);
}

void copy_async(void* shared, const void* from, bool copy, const Place& place) {
  if (!is_aligned(shared) || !is_aligned(from))
    fail(place, "an address of an asynchronous copy is not 16-byte aligned: from %p to %p", from, shared);
  if (!is_shared(shared, kCopyBytes)) fail(place, "an asynchronous copy writes outside of shared memory: %p", shared);
  const void* by = __builtin_return_address(0);
  if (copy) access(from, kCopyBytes, Access::read, by);
  access(shared, kCopyBytes, Access::issue, by);
  std::memset(shared, 0xff, kCopyBytes);  // whoever reads it too early shall see that
  groups_of_thread().groups.back().push_back({shared, copy ? from : nullptr});
}

void copy_async_commit() { groups_of_thread().groups.emplace_back(); }

void copy_async_wait(int under_way) {
  auto& groups = groups_of_thread().groups;
  while (int(groups.size()) - 1 > under_way) {
    if (!groups.front().empty()) steps_of_thread().shown = false;
    for (const Copy& copy : groups.front()) {
      access(copy.to, kCopyBytes, Access::arrival, __builtin_return_address(0));
      if (copy.from == nullptr)
        std::memset(copy.to, 0, kCopyBytes);
      else
        std::memcpy(copy.to, copy.from, kCopyBytes);
    }
    groups.erase(groups.begin());
  }
}

}  // namespace emulator
