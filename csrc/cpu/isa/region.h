// Compiles TORCHCNN_KERNELS, a header of vector kernels, for one instruction set: TORCHCNN_ISA, the name of the row and of the
// namespace that keeps the copies of the kernels apart. Both are defined by the including file. A target region instead of
// compiler flags lets one binary hold every instruction set. Everything that is not a kernel is included before the region: an
// inline function of the standard library compiled inside it could be the copy that the linker keeps for older processors.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../../geometry.h"
#include "../conv2d_choice.h"
#include "../conv2d_reference.h"
#include "../element.h"
#include "../kernels.h"
#include "../pool2d_indexed.h"
#include "../pool2d_reference.h"
#include "../runtime.h"

#define TORCHCNN_ISA_IS_scalar 1
#define TORCHCNN_ISA_IS_neon 2
#define TORCHCNN_ISA_IS_avx2 3
#define TORCHCNN_ISA_IS_avx512 4
#define TORCHCNN_PASTE(a, b) a##b
#define TORCHCNN_NUMBER(isa) TORCHCNN_PASTE(TORCHCNN_ISA_IS_, isa)

// Bytes of a vector, and how many vectors there are to hold: the register tiles are cut to fit.
#if TORCHCNN_NUMBER(TORCHCNN_ISA) == TORCHCNN_ISA_IS_avx512
#define TORCHCNN_VECTOR_BYTES 64
#define TORCHCNN_VECTOR_REGISTERS 32
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")
#endif
#elif TORCHCNN_NUMBER(TORCHCNN_ISA) == TORCHCNN_ISA_IS_avx2
#define TORCHCNN_VECTOR_BYTES 32
#define TORCHCNN_VECTOR_REGISTERS 16
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#elif TORCHCNN_NUMBER(TORCHCNN_ISA) == TORCHCNN_ISA_IS_neon
#define TORCHCNN_VECTOR_BYTES 16
#define TORCHCNN_VECTOR_REGISTERS 32
#else
#define TORCHCNN_VECTOR_BYTES 16
#define TORCHCNN_VECTOR_REGISTERS 16
#endif

#include TORCHCNN_KERNELS

#if TORCHCNN_NUMBER(TORCHCNN_ISA) >= TORCHCNN_ISA_IS_avx2
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
