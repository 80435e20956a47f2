// The vector kernels for AVX2 and FMA: 32-byte vectors, compiled for those instructions by a target region instead of flags, so
// that one binary holds every instruction set. Everything that is not a kernel is included before the region: an inline function
// of the standard library compiled inside it could be the copy that the linker keeps for processors without AVX2.
#if defined(__x86_64__)

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#include "../geometry.h"
#include "conv2d_choice.h"
#include "conv2d_reference.h"
#include "element.h"
#include "kernels.h"
#include "pool2d_indexed.h"
#include "pool2d_reference.h"
#include "runtime.h"

#define TORCHCNN_ISA avx2
#define TORCHCNN_VECTOR_BYTES 32

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif

#include "vector_kernels.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace torchcnn {

constinit const KernelTable avx2_kernels = avx2::vector_kernel_table("avx2");

}  // namespace torchcnn

#endif
