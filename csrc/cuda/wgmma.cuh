// Hopper's own matrix step, wgmma: the four warps of a warpgroup multiply 64 rows of A by all columns of B, both read from shared
// memory by the tensor cores themselves, while the warps go on. It exists on sm_90a alone, the only other file with inline PTX.
//
// Layouts (PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions"): D as in mma.cuh, warp w of the warpgroup holding rows
// 16 w ... 16 w + 15. An operand lies in rows of 128 bytes whose 16-byte vectors are permuted by the number of the row modulo 8,
// in memory aligned to 1024 bytes:
//
//   by index   row = one m (n), 64 values of k, 32 of TF32
//   by k       row = one k, 64 values of m (n); the next 64 lie in a panel of their own; of 16-bit values alone
#pragma once

#include "mma.cuh"

namespace torchcnn::cuda {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr bool kHasWarpgroupSteps = true;
#else
constexpr bool kHasWarpgroupSteps = false;
#endif
}  // namespace torchcnn::cuda

#ifdef TORCHCNN_CUDA_EMULATOR
#include "emulated_wgmma.h"
#else

namespace torchcnn::cuda {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define TORCHCNN_WGMMA(...) asm volatile(__VA_ARGS__)
#else
#define TORCHCNN_WGMMA(...) __trap()
#endif

// Where an operand lies; panel_bytes is the distance of the panels of an operand by k.
struct WarpgroupOperand {
  uint64_t bits;

  __device__ __forceinline__ WarpgroupOperand(const void* tile, int panel_bytes) {
    constexpr uint64_t eight_rows = 1024, permuted_in_128_bytes = uint64_t(1) << 62;
    const uint64_t address = __cvta_generic_to_shared(tile);
    bits = (address & 0x3ffff) >> 4 | uint64_t(panel_bytes >> 4) << 16 | eight_rows >> 4 << 32 | permuted_in_128_bytes;
  }
  __device__ __forceinline__ void advance(int bytes) { bits += bytes >> 4; }
};

// clang-format off
#define TORCHCNN_SUMS_4(j) "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])
#define TORCHCNN_SUMS_16(j) TORCHCNN_SUMS_4(j), TORCHCNN_SUMS_4(j + 1), TORCHCNN_SUMS_4(j + 2), TORCHCNN_SUMS_4(j + 3)
#define TORCHCNN_SUMS_32(j) TORCHCNN_SUMS_16(j), TORCHCNN_SUMS_16(j + 4)
#define TORCHCNN_SUMS_64(j) TORCHCNN_SUMS_32(j), TORCHCNN_SUMS_32(j + 8)
#define TORCHCNN_NAMES_16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define TORCHCNN_NAMES_32 TORCHCNN_NAMES_16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define TORCHCNN_NAMES_64 TORCHCNN_NAMES_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
    ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// d += a b, 64 rows by `columns` over 16 values of k, 8 of TF32. by_k says how both operands lie. `a_name` and its like are the
// names of what follows the sums, of which a thread has columns / 2.
#define TORCHCNN_STEP(T, type, columns, sums, a_name, b_name, by_k_name) \
  template <int by_k> \
  __device__ __forceinline__ void wgmma(float (&d)[columns / 8][4], const WarpgroupOperand& a, const WarpgroupOperand& b, T) { \
    TORCHCNN_WGMMA("{\n.reg .pred p;\nsetp.eq.u32 p, 0, 0;\n" \
                   "wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." type "." type " {" TORCHCNN_NAMES_##sums "}, " \
                   a_name ", " b_name ", p, 1, 1, " by_k_name ", " by_k_name ";\n}\n" \
                   : TORCHCNN_SUMS_##sums(0) \
                   : "l"(a.bits), "l"(b.bits), "n"(by_k)); \
  }
#define TORCHCNN_STEP_TF32(columns, sums, a_name, b_name) \
  template <int by_k> \
  __device__ __forceinline__ void wgmma(float (&d)[columns / 8][4], const WarpgroupOperand& a, const WarpgroupOperand& b, \
                                        float) { \
    static_assert(by_k == 0); \
    TORCHCNN_WGMMA("{\n.reg .pred p;\nsetp.eq.u32 p, 0, 0;\n" \
                   "wgmma.mma_async.sync.aligned.m64n" #columns "k8.f32.tf32.tf32 {" TORCHCNN_NAMES_##sums "}, " \
                   a_name ", " b_name ", p, 1, 1;\n}\n" \
                   : TORCHCNN_SUMS_##sums(0) \
                   : "l"(a.bits), "l"(b.bits)); \
  }
#define TORCHCNN_STEPS(T, type) \
  TORCHCNN_STEP(T, type, 32, 16, "%16", "%17", "%18") \
  TORCHCNN_STEP(T, type, 64, 32, "%32", "%33", "%34") \
  TORCHCNN_STEP(T, type, 128, 64, "%64", "%65", "%66")
TORCHCNN_STEPS(__half, "f16")
TORCHCNN_STEPS(__nv_bfloat16, "bf16")
TORCHCNN_STEP_TF32(32, 16, "%16", "%17")
TORCHCNN_STEP_TF32(64, 32, "%32", "%33")
TORCHCNN_STEP_TF32(128, 64, "%64", "%65")
// clang-format on

// What this thread has written to shared memory can be read by the tensor cores, once it has met the others at a barrier.
__device__ __forceinline__ void show_tensor_cores() { TORCHCNN_WGMMA("fence.proxy.async.shared::cta;" :: : "memory"); }

// The compiler may move no use of the sums past this.
template <int tiles>
__device__ __forceinline__ void hold(float (&d)[tiles][4]) {
#pragma unroll
  for (int i = 0; i < tiles; ++i) asm volatile("" : "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])::"memory");
}

// Before the first step that adds to sums which this thread has written.
template <int tiles>
__device__ __forceinline__ void wgmma_begin(float (&d)[tiles][4]) {
  hold(d);
  TORCHCNN_WGMMA("wgmma.fence.sync.aligned;" :: : "memory");
}
__device__ __forceinline__ void wgmma_commit() { TORCHCNN_WGMMA("wgmma.commit_group.sync.aligned;" :: : "memory"); }

// Waits until at most `under_way` committed steps are: what the others read can be written again, and after the last of them the
// sums be read.
template <int under_way, int tiles>
__device__ __forceinline__ void wgmma_wait(float (&d)[tiles][4]) {
  TORCHCNN_WGMMA("wgmma.wait_group.sync.aligned %0;" ::"n"(under_way) : "memory");
  hold(d);
}

#undef TORCHCNN_WGMMA
#undef TORCHCNN_STEP
#undef TORCHCNN_STEP_TF32
#undef TORCHCNN_STEPS
#undef TORCHCNN_SUMS_4
#undef TORCHCNN_SUMS_16
#undef TORCHCNN_SUMS_32
#undef TORCHCNN_SUMS_64
#undef TORCHCNN_NAMES_16
#undef TORCHCNN_NAMES_32
#undef TORCHCNN_NAMES_64

}  // namespace torchcnn::cuda
#endif
