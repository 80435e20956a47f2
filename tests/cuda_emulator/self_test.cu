// Small kernels, each correct and with one mistake at a time, that the emulator has to find (tests/test_cuda_emulator.py).
#include <cassert>
#include <cstdio>
#include <map>
#include <vector>

#include "cuda/common.cuh"
#include "cuda/mma.cuh"
#include "emulator.h"

namespace torchcnn::cuda {
namespace {

enum class Bug {
  none,
  no_barrier_after_write,
  no_barrier_before_overwrite,
  uninitialised_shared_read,
  shared_index_overflow,
  exit_before_barrier,
  divergent_barrier,
  read_past_the_end,
  write_past_the_end,
  uninitialised_global_read,
  write_by_two_blocks,
  read_of_another_block,
  misaligned_vector,
  failed_assert,
  no_syncwarp,
  syncwarp_of_half,
  no_wait,
  no_commit,
  copy_over_a_copy,
  copy_over_a_read,
  read_before_barrier,
  misaligned_copy,
  copy_past_the_end,
  too_little_shared_memory,
  partial_warp,
  misaligned_row,
  no_barrier_before_matrices
};

constexpr int kThreads = 64;

// Each block moves its values by two places, in two steps through shared memory.
template <Bug bug>
__global__ void rotate(const float* in, float* out) {
  __shared__ float values[kThreads];
  const int thread = threadIdx.x, at = blockIdx.x * kThreads + thread;
  if (bug == Bug::exit_before_barrier && thread == 5) return;
  float value = in[at];
  for (int step = 0; step < 2; ++step) {
    const int to = bug == Bug::shared_index_overflow && thread == kThreads - 1 ? kThreads : thread;
    if (bug != Bug::uninitialised_shared_read || thread != 7) values[to] = value;
    if (bug == Bug::divergent_barrier && thread < 32) {
      __syncthreads();
    } else if (bug != Bug::no_barrier_after_write) {
      __syncthreads();
    }
    value = values[(thread + 1) % kThreads];
    if (bug != Bug::no_barrier_before_overwrite) __syncthreads();
  }
  out[at] = value;
}

// out = 2 in + what the block's first thread has read.
template <Bug bug>
__global__ void scale(const float* in, float* out, int count) {
  const int at = blockIdx.x * blockDim.x + threadIdx.x;
  assert(bug != Bug::failed_assert || at != 3);
  if (at >= count + (bug == Bug::write_past_the_end)) return;
  if constexpr (bug == Bug::misaligned_vector) {
    if (at == 0) *reinterpret_cast<float4*>(out + 1) = *reinterpret_cast<const float4*>(in + 1);
  }
  const float* from = bug == Bug::uninitialised_global_read ? out : in;
  const float value = from[bug == Bug::write_past_the_end ? 0 : at + (bug == Bug::read_past_the_end)];
  out[bug == Bug::write_by_two_blocks ? int(threadIdx.x) : at] = 2 * value;
  if (bug == Bug::read_of_another_block && at == int(blockDim.x)) out[at] = out[0];
}

// Each warp turns its values around, through shared memory, without a barrier of the block.
template <Bug bug>
__global__ void reverse_warps(const float* in, float* out) {
  __shared__ float values[kThreads];
  const int thread = threadIdx.x, lane = thread % warpSize, at = blockIdx.x * kThreads + thread;
  values[thread] = in[at];
  if (bug == Bug::syncwarp_of_half)
    __syncwarp(lane < 16 ? 0x0000ffffu : 0xffff0000u);
  else if (bug != Bug::no_syncwarp)
    __syncwarp();
  const float reversed = values[thread ^ (warpSize - 1)];
  const float same = __shfl_xor_sync(0xffffffffu, in[at], warpSize - 1);
  const unsigned lanes = __ballot_sync(0xffffffffu, reversed == same);
  out[at] = __popc(lanes) == warpSize && __all_sync(0xffffffffu, lane < warpSize) ? reversed : -1.0f;
}

// Sums of tiles that come by asynchronous copies, one under way while another is read. Thread i copies four values and sums up
// those of thread i + 1.
constexpr int kTiles = 5, kTileSize = 4 * kThreads;

template <Bug bug>
__global__ void sum_tiles(const float* in, float* out) {
  float* const shared = reinterpret_cast<float*>(dynamic_shared_memory());
  const int own = 4 * threadIdx.x, next = 4 * ((threadIdx.x + 1) % kThreads);
  in += blockIdx.x * kTiles * kTileSize;
  const auto stage = [&](int tile) { return shared + tile % 2 * kTileSize; };
  const auto copy = [&](int tile) {
    float* const to = bug == Bug::copy_over_a_copy ? shared : stage(tile);
    const bool exists = tile < kTiles;
    const int past = bug == Bug::copy_past_the_end ? 4 : 0, misaligned = bug == Bug::misaligned_copy;
    copy_async(to + own + misaligned, exists ? in + tile * kTileSize + own + past : in, exists);
    if (bug != Bug::no_commit) copy_async_commit();
  };
  float sum[4] = {};
  copy(0);
  for (int tile = 0; tile < kTiles; ++tile) {
    copy(tile + 1);
    copy_async_wait<bug == Bug::no_wait ? 2 : 1>();
    if (bug != Bug::read_before_barrier) __syncthreads();
    for (int i = 0; i < 4; ++i) sum[i] += stage(tile)[next + i];
    if (bug != Bug::copy_over_a_read) __syncthreads();
  }
  for (int i = 0; i < 4; ++i) out[blockIdx.x * kTileSize + own + i] = sum[i];
}

// D = A B of 16 x 16 and 16 x 8 by one warp, in the format of T; float stands for TF32.
template <class T, Bug bug>
__global__ void multiply(const float* in, float* out) {
  T(*const a)[16] = reinterpret_cast<T(*)[16]>(dynamic_shared_memory());
  T(*const b)[8] = reinterpret_cast<T(*)[8]>(a + 16);
  const int lane = threadIdx.x, group = lane / 4, in_group = lane % 4;
  for (int i = lane; i < 16 * 16; i += warpSize) a[i / 16][i % 16] = from_arithmetic<T>(in[i]);
  for (int i = lane; i < 16 * 8; i += warpSize) b[i / 8][i % 8] = from_arithmetic<T>(in[16 * 16 + i]);
  if (bug != Bug::no_barrier_before_matrices) __syncthreads();
  float d[4] = {};
  if (bug == Bug::partial_warp && lane == 31) return;
  if constexpr (sizeof(T) == 2) {
    uint32_t a_fragment[4], b_fragment[4];
    const int row = lane % 8, matrix = lane / 8;
    load_matrices(a_fragment, &a[row + matrix % 2 * 8][matrix / 2 * 8 + (bug == Bug::misaligned_row)]);
    load_matrices_transposed(b_fragment, &b[row + matrix % 2 * 8][0]);
    mma_16x8x16(d, a_fragment, {b_fragment[0], b_fragment[1]}, T());
  } else {
    for (int k = 0; k < 16; k += 8) {
      uint32_t a_fragment[4], b_fragment[2];
      for (int i = 0; i < 4; ++i) a_fragment[i] = to_tf32(a[group + i % 2 * 8][k + in_group + i / 2 * 4]);
      for (int i = 0; i < 2; ++i) b_fragment[i] = to_tf32(b[k + in_group + i * 4][group]);
      mma_16x8x8_tf32(d, a_fragment, b_fragment);
    }
  }
  for (int i = 0; i < 4; ++i) out[(group + i / 2 * 8) * 8 + in_group * 2 + i % 2] = d[i];
}

constexpr unsigned kBlocks = 3;

template <Bug bug>
void run_rotate(const float* in, float* out, size_t) {
  launch("rotate", rotate<bug>, kBlocks, kThreads, 0, nullptr, in, out);
}
template <Bug bug>
void run_scale(const float* in, float* out, size_t count) {
  launch("scale", scale<bug>, unsigned(count / kThreads + 1), kThreads, 0, nullptr, in, out, int(count));
}
template <Bug bug>
void run_reverse(const float* in, float* out, size_t) {
  launch("reverse_warps", reverse_warps<bug>, kBlocks, kThreads, 0, nullptr, in, out);
}
template <Bug bug>
void run_sum(const float* in, float* out, size_t) {
  const size_t stages = bug == Bug::too_little_shared_memory ? 1 : 2;
  launch("sum_tiles", sum_tiles<bug>, kBlocks, kThreads, stages * kTileSize * sizeof(float), nullptr, in, out);
}
template <class T, Bug bug>
void run_multiply(const float* in, float* out, size_t) {
  constexpr size_t shared_size = bug == Bug::too_little_shared_memory ? 16 * 16 : 16 * 16 + 16 * 8;
  launch("multiply", multiply<T, bug>, 1, warpSize, shared_size * sizeof(T), nullptr, in, out);
}

using Run = void (*)(const float*, float*, size_t);

const std::map<std::string, Run> kRuns = {
    {"rotate", run_rotate<Bug::none>},
    {"rotate: no barrier after write", run_rotate<Bug::no_barrier_after_write>},
    {"rotate: no barrier before overwrite", run_rotate<Bug::no_barrier_before_overwrite>},
    {"rotate: uninitialised shared read", run_rotate<Bug::uninitialised_shared_read>},
    {"rotate: shared index overflow", run_rotate<Bug::shared_index_overflow>},
    {"rotate: exit before barrier", run_rotate<Bug::exit_before_barrier>},
    {"rotate: divergent barrier", run_rotate<Bug::divergent_barrier>},
    {"scale", run_scale<Bug::none>},
    {"scale: read past the end", run_scale<Bug::read_past_the_end>},
    {"scale: write past the end", run_scale<Bug::write_past_the_end>},
    {"scale: uninitialised global read", run_scale<Bug::uninitialised_global_read>},
    {"scale: write by two blocks", run_scale<Bug::write_by_two_blocks>},
    {"scale: read of another block", run_scale<Bug::read_of_another_block>},
    {"scale: misaligned vector", run_scale<Bug::misaligned_vector>},
    {"scale: failed assert", run_scale<Bug::failed_assert>},
    {"reverse", run_reverse<Bug::none>},
    {"reverse: no syncwarp", run_reverse<Bug::no_syncwarp>},
    {"reverse: syncwarp of half", run_reverse<Bug::syncwarp_of_half>},
    {"sum", run_sum<Bug::none>},
    {"sum: no wait", run_sum<Bug::no_wait>},
    {"sum: no commit", run_sum<Bug::no_commit>},
    {"sum: copy over a copy", run_sum<Bug::copy_over_a_copy>},
    {"sum: copy over a read", run_sum<Bug::copy_over_a_read>},
    {"sum: read before barrier", run_sum<Bug::read_before_barrier>},
    {"sum: misaligned copy", run_sum<Bug::misaligned_copy>},
    {"sum: copy past the end", run_sum<Bug::copy_past_the_end>},
    {"sum: too little shared memory", run_sum<Bug::too_little_shared_memory>},
    {"multiply f16", run_multiply<__half, Bug::none>},
    {"multiply bf16", run_multiply<__nv_bfloat16, Bug::none>},
    {"multiply tf32", run_multiply<float, Bug::none>},
    {"multiply f16: partial warp", run_multiply<__half, Bug::partial_warp>},
    {"multiply tf32: partial warp", run_multiply<float, Bug::partial_warp>},
    {"multiply bf16: too little shared memory", run_multiply<__nv_bfloat16, Bug::too_little_shared_memory>},
    {"multiply f16: misaligned row", run_multiply<__half, Bug::misaligned_row>},
    {"multiply f16: no barrier before matrices", run_multiply<__half, Bug::no_barrier_before_matrices>},
};

}  // namespace
}  // namespace torchcnn::cuda

// Runs a kernel on copies of exactly these sizes; 0, or 1 with the message of an error.
extern "C" int self_test(const char* name, int order, unsigned seed, const float* input, size_t input_size, float* output,
                         size_t output_size, char* message, size_t message_size) {
  const std::vector<float> in(input, input + input_size);
  std::vector<float> out(output_size);
  emulator::set_order(emulator::Order(order), seed);
  emulator::declare_memory(in.data(), in.size() * sizeof(float), true);
  emulator::declare_memory(out.data(), out.size() * sizeof(float), false);
  int failed = 0;
  try {
    torchcnn::cuda::kRuns.at(name)(in.data(), out.data(), out.size());
  } catch (const std::exception& error) {
    std::snprintf(message, message_size, "%s", error.what());
    failed = 1;
  }
  emulator::forget_memory();
  std::copy(out.begin(), out.end(), output);
  return failed;
}
