// What host code may ask of the emulator that runs CUDA kernels on the processor.
//
// A kernel may touch its shared memory, its own variables and what was declared here. Nothing else exists for it, which the build
// `check` holds it to. Memory is declared for the launches that follow, until it is forgotten. A declaration replaces those that
// it overlaps; the same range declared again keeps what is known of it, and is initialised if either declaration says so. New
// uninitialised memory is filled with 0xFF (NaN, -1), so that what no kernel has written is seen in the results of every build.
#pragma once

#include <cstddef>

#define EMULATOR_API __attribute__((visibility("default")))

namespace emulator {

EMULATOR_API void declare_memory(const void* first, size_t bytes, bool initialised);
EMULATOR_API void forget_memory();

// In which order the threads of a block run from one barrier to the next, and blocks after each other. At first
// TORCHCNN_EMULATOR_ORDER (ascending, descending, random) and TORCHCNN_EMULATOR_SEED say.
enum class Order { ascending, descending, random };
EMULATOR_API void set_order(Order, unsigned seed);

}  // namespace emulator
