// Hopper's own matrix step, wgmma: the four warps of a warpgroup multiply 64 rows of A by all columns of B, both read from shared
// memory by the tensor cores themselves, while the warps go on. It exists on sm_90a alone, the only other file with inline PTX.
//
// Layouts (PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions"): D as in mma.cuh, warp w of the warpgroup holding rows
// 16 w ... 16 w + 15. An operand lies in rows of 128 bytes whose 16-byte vectors are permuted by the number of the row modulo 8,
// in memory aligned to 1024 bytes:
//
//   by index   row = one m (n), 64 values of k
//   by k       row = one k, 64 values of m (n); the next 64 lie in a panel of their own
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

// d += a b, 64 x 32 over 16 values of k. by_k says how both operands lie.
template <int by_k>
__device__ __forceinline__ void wgmma(float (&d)[4][4], const WarpgroupOperand& a, const WarpgroupOperand& b, __half) {
  TORCHCNN_WGMMA(
      "{\n.reg .pred p;\nsetp.eq.u32 p, 0, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n32k16.f32.f16.f16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, "
      "%15}, %16, %17, p, 1, 1, %18, %18;\n}\n" : "+f"(d[0][0]),
      "+f"(d[0][1]), "+f"(d[0][2]), "+f"(d[0][3]), "+f"(d[1][0]), "+f"(d[1][1]), "+f"(d[1][2]), "+f"(d[1][3]), "+f"(d[2][0]),
      "+f"(d[2][1]), "+f"(d[2][2]), "+f"(d[2][3]), "+f"(d[3][0]), "+f"(d[3][1]), "+f"(d[3][2]), "+f"(d[3][3]) : "l"(a.bits),
      "l"(b.bits), "n"(by_k));
}
template <int by_k>
__device__ __forceinline__ void wgmma(float (&d)[4][4], const WarpgroupOperand& a, const WarpgroupOperand& b, __nv_bfloat16) {
  TORCHCNN_WGMMA(
      "{\n.reg .pred p;\nsetp.eq.u32 p, 0, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, "
      "%15}, %16, %17, p, 1, 1, %18, %18;\n}\n" : "+f"(d[0][0]),
      "+f"(d[0][1]), "+f"(d[0][2]), "+f"(d[0][3]), "+f"(d[1][0]), "+f"(d[1][1]), "+f"(d[1][2]), "+f"(d[1][3]), "+f"(d[2][0]),
      "+f"(d[2][1]), "+f"(d[2][2]), "+f"(d[2][3]), "+f"(d[3][0]), "+f"(d[3][1]), "+f"(d[3][2]), "+f"(d[3][3]) : "l"(a.bits),
      "l"(b.bits), "n"(by_k));
}

// d += a b, 64 x 64 over 16 values of k. by_k says how both operands lie.
template <int by_k>
__device__ __forceinline__ void wgmma(float (&d)[8][4], const WarpgroupOperand& a, const WarpgroupOperand& b, __half) {
  TORCHCNN_WGMMA(
      "{\n.reg .pred p;\nsetp.eq.u32 p, 0, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, %32, %33, p, 1, 1, %34, %34;\n}\n" : "+f"(
          d[0][0]),
      "+f"(d[0][1]), "+f"(d[0][2]), "+f"(d[0][3]), "+f"(d[1][0]), "+f"(d[1][1]), "+f"(d[1][2]), "+f"(d[1][3]), "+f"(d[2][0]),
      "+f"(d[2][1]), "+f"(d[2][2]), "+f"(d[2][3]), "+f"(d[3][0]), "+f"(d[3][1]), "+f"(d[3][2]), "+f"(d[3][3]), "+f"(d[4][0]),
      "+f"(d[4][1]), "+f"(d[4][2]), "+f"(d[4][3]), "+f"(d[5][0]), "+f"(d[5][1]), "+f"(d[5][2]), "+f"(d[5][3]), "+f"(d[6][0]),
      "+f"(d[6][1]), "+f"(d[6][2]), "+f"(d[6][3]), "+f"(d[7][0]), "+f"(d[7][1]), "+f"(d[7][2]), "+f"(d[7][3]) : "l"(a.bits),
      "l"(b.bits), "n"(by_k));
}
template <int by_k>
__device__ __forceinline__ void wgmma(float (&d)[8][4], const WarpgroupOperand& a, const WarpgroupOperand& b, __nv_bfloat16) {
  TORCHCNN_WGMMA(
      "{\n.reg .pred p;\nsetp.eq.u32 p, 0, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, %32, %33, p, 1, 1, %34, %34;\n}\n"
      : "+f"(d[0][0]), "+f"(d[0][1]), "+f"(d[0][2]), "+f"(d[0][3]), "+f"(d[1][0]), "+f"(d[1][1]), "+f"(d[1][2]), "+f"(d[1][3]), "+f"(d[2][0]), "+f"(d[2][1]), "+f"(d[2][2]), "+f"(d[2][3]), "+f"(d[3][0]), "+f"(d[3][1]), "+f"(d[3][2]), "+f"(d[3][3]), "+f"(d[4][0]), "+f"(d[4][1]), "+f"(d[4][2]), "+f"(d[4][3]), "+f"(d[5][0]), "+f"(d[5][1]), "+f"(d[5][2]), "+f"(d[5][3]), "+f"(d[6][0]), "+f"(d[6][1]), "+f"(d[6][2]), "+f"(d[6][3]), "+f"(d[7][0]), "+f"(d[7][1]), "+f"(d[7][2]), "+f"(d[7][3])
      : "l"(a.bits), "l"(b.bits), "n"(by_k));
}

// d += a b, 64 x 128 over 16 values of k. by_k says how both operands lie.
template <int by_k>
__device__ __forceinline__ void wgmma(float (&d)[16][4], const WarpgroupOperand& a, const WarpgroupOperand& b, __half) {
  TORCHCNN_WGMMA(
      "{\n.reg .pred p;\nsetp.eq.u32 p, 0, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, "
      "%15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, "
      "%39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, "
      "%63}, %64, %65, p, 1, 1, %66, %66;\n}\n" : "+f"(d[0][0]),
      "+f"(d[0][1]), "+f"(d[0][2]), "+f"(d[0][3]), "+f"(d[1][0]), "+f"(d[1][1]), "+f"(d[1][2]), "+f"(d[1][3]), "+f"(d[2][0]),
      "+f"(d[2][1]), "+f"(d[2][2]), "+f"(d[2][3]), "+f"(d[3][0]), "+f"(d[3][1]), "+f"(d[3][2]), "+f"(d[3][3]), "+f"(d[4][0]),
      "+f"(d[4][1]), "+f"(d[4][2]), "+f"(d[4][3]), "+f"(d[5][0]), "+f"(d[5][1]), "+f"(d[5][2]), "+f"(d[5][3]), "+f"(d[6][0]),
      "+f"(d[6][1]), "+f"(d[6][2]), "+f"(d[6][3]), "+f"(d[7][0]), "+f"(d[7][1]), "+f"(d[7][2]), "+f"(d[7][3]), "+f"(d[8][0]),
      "+f"(d[8][1]), "+f"(d[8][2]), "+f"(d[8][3]), "+f"(d[9][0]), "+f"(d[9][1]), "+f"(d[9][2]), "+f"(d[9][3]), "+f"(d[10][0]),
      "+f"(d[10][1]), "+f"(d[10][2]), "+f"(d[10][3]), "+f"(d[11][0]), "+f"(d[11][1]), "+f"(d[11][2]), "+f"(d[11][3]),
      "+f"(d[12][0]), "+f"(d[12][1]), "+f"(d[12][2]), "+f"(d[12][3]), "+f"(d[13][0]), "+f"(d[13][1]), "+f"(d[13][2]),
      "+f"(d[13][3]), "+f"(d[14][0]), "+f"(d[14][1]), "+f"(d[14][2]), "+f"(d[14][3]), "+f"(d[15][0]), "+f"(d[15][1]),
      "+f"(d[15][2]), "+f"(d[15][3]) : "l"(a.bits), "l"(b.bits), "n"(by_k));
}
template <int by_k>
__device__ __forceinline__ void wgmma(float (&d)[16][4], const WarpgroupOperand& a, const WarpgroupOperand& b, __nv_bfloat16) {
  TORCHCNN_WGMMA(
      "{\n.reg .pred p;\nsetp.eq.u32 p, 0, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, "
      "%15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, "
      "%39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, "
      "%63}, %64, %65, p, 1, 1, %66, %66;\n}\n" : "+f"(d[0][0]),
      "+f"(d[0][1]), "+f"(d[0][2]), "+f"(d[0][3]), "+f"(d[1][0]), "+f"(d[1][1]), "+f"(d[1][2]), "+f"(d[1][3]), "+f"(d[2][0]),
      "+f"(d[2][1]), "+f"(d[2][2]), "+f"(d[2][3]), "+f"(d[3][0]), "+f"(d[3][1]), "+f"(d[3][2]), "+f"(d[3][3]), "+f"(d[4][0]),
      "+f"(d[4][1]), "+f"(d[4][2]), "+f"(d[4][3]), "+f"(d[5][0]), "+f"(d[5][1]), "+f"(d[5][2]), "+f"(d[5][3]), "+f"(d[6][0]),
      "+f"(d[6][1]), "+f"(d[6][2]), "+f"(d[6][3]), "+f"(d[7][0]), "+f"(d[7][1]), "+f"(d[7][2]), "+f"(d[7][3]), "+f"(d[8][0]),
      "+f"(d[8][1]), "+f"(d[8][2]), "+f"(d[8][3]), "+f"(d[9][0]), "+f"(d[9][1]), "+f"(d[9][2]), "+f"(d[9][3]), "+f"(d[10][0]),
      "+f"(d[10][1]), "+f"(d[10][2]), "+f"(d[10][3]), "+f"(d[11][0]), "+f"(d[11][1]), "+f"(d[11][2]), "+f"(d[11][3]),
      "+f"(d[12][0]), "+f"(d[12][1]), "+f"(d[12][2]), "+f"(d[12][3]), "+f"(d[13][0]), "+f"(d[13][1]), "+f"(d[13][2]),
      "+f"(d[13][3]), "+f"(d[14][0]), "+f"(d[14][1]), "+f"(d[14][2]), "+f"(d[14][3]), "+f"(d[15][0]), "+f"(d[15][1]),
      "+f"(d[15][2]), "+f"(d[15][3]) : "l"(a.bits), "l"(b.bits), "n"(by_k));
}

// What this thread has written to shared memory can be read by the tensor cores, once it has met the others at a barrier.
__device__ __forceinline__ void show_tensor_cores() { TORCHCNN_WGMMA("fence.proxy.async.shared::cta;" :: : "memory"); }

// Before the first step that adds to registers which this thread has written.
__device__ __forceinline__ void wgmma_begin() { TORCHCNN_WGMMA("wgmma.fence.sync.aligned;" :: : "memory"); }
__device__ __forceinline__ void wgmma_commit() { TORCHCNN_WGMMA("wgmma.commit_group.sync.aligned;" :: : "memory"); }

// Waits for all steps: shared memory can be written again, and the sums be read.
template <int tiles>
__device__ __forceinline__ void wgmma_wait(float (&d)[tiles][4]) {
  TORCHCNN_WGMMA("wgmma.wait_group.sync.aligned 0;" :: : "memory");
#pragma unroll
  for (int i = 0; i < tiles; ++i)  // the compiler may not move a use of them before the wait
    asm volatile("" : "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])::"memory");
}

#undef TORCHCNN_WGMMA

}  // namespace torchcnn::cuda
#endif
