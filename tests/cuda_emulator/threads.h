// The emulator as kernels see it: the threads of one block, each a fiber, and the places where they meet.
#pragma once

#include <driver_types.h>
#include <vector_types.h>

#include <cstddef>
#include <cstdint>
#include <source_location>

#include "emulator.h"

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace emulator {

using Place = std::source_location;

constexpr unsigned kWarp = 32, kAllLanes = 0xffffffffu;

// What a multiprocessor of every GPU from sm_80 on can give to a block; a kernel has to ask for more than 48 KiB.
constexpr size_t kMostSharedBytes = 99 << 10, kSharedBytesWithoutAsking = 48 << 10;

// The number of the thread that runs, and of its lane.
unsigned thread_number();
inline unsigned lane_number() { return thread_number() % kWarp; }

// Ends the launch with an error; of several, the first counts.
[[noreturn]] void fail(const Place&, const char* format, ...) __attribute__((format(printf, 2, 3)));
[[noreturn]] void fail_with(const char* message);

// All threads of the block come here.
void block_barrier(const Place&);

// All lanes of `mask` come here; the last calls combine(operands, mask), where operands[lane] is the lane's operand. Lanes that
// the block does not have are taken from the mask.
using Combine = void (*)(void* const* operands, unsigned mask, const Place&);
void meet(unsigned mask, void* operand, Combine combine, const Place&);

// A launch: entry(parameters) is what each thread runs.
struct Kernel {
  const void* function;
  void (*entry)(const void* parameters);
  const void* parameters;
  size_t parameter_bytes;
};
EMULATOR_API cudaError_t launch(const cudaLaunchConfig_t&, const Kernel&);

// Orders the memory accesses of lanes: __syncwarp.
void order_memory(void* const*, unsigned mask, const Place&);

// Asynchronous copies of 16 bytes to shared memory, of which a null source gives zeros.
void copy_async(void* shared, const void* from, bool copy, const Place&);
void copy_async_commit();
void copy_async_wait(int groups);

// Tensor-core steps; the layouts stand in csrc/cuda/mma.cuh.
enum class Format { f16, bf16, tf32 };
void mma(Format, float* d, const uint32_t* a, const uint32_t* b, const Place&);
void load_matrices(uint32_t* to, const void* shared_row, bool transposed, const Place&);

// Steps of a warpgroup (csrc/cuda/wgmma.cuh): each thread adds up its own elements of d when it waits, and reads both times.
struct WarpgroupOperand {
  const char* first;
  int panel_bytes;
};
void wgmma(Format, float* d, int columns, const WarpgroupOperand& a, const WarpgroupOperand& b, bool by_k, const Place&);
void wgmma_commit();
void wgmma_wait(int under_way, const Place&);
void show_tensor_cores();

}  // namespace emulator
