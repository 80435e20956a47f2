// Tensor-core and asynchronous-copy steps as functions on pointers and arrays: inline PTX stands here and in wgmma.cuh alone.
//
// Layouts (PTX ISA, "Matrix fragments for mma.m16n8k8 / m16n8k16"), lane = thread of the warp, g = lane / 4, t = lane % 4:
//
//   D, 16 x 8 float     d[i] = D[g + 8 (i / 2)][2 t + i % 2]
//   A, 16 x 16 16-bit   a[i] = A[g + 8 (i % 2)][2 t + 8 (i / 2) ...] (two elements)     B, 16 x 8:  b[i] = B[2 t + 8 i ...][g]
//   A, 16 x 8  tf32     a[i] = A[g + 8 (i % 2)][t + 4 (i / 2)]                         B, 8 x 8:   b[i] = B[t + 4 i][g]
//
// The mma and ldmatrix functions are called by all 32 lanes of a warp together. Below sm_80 most of these steps are missing:
// kernels made of them are then compiled to a trap, the launchers never start them (setup.py bars PTX of such an architecture,
// which a later GPU would run), and copies are plain ones.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace torchcnn::cuda {
// Whether the device that is compiled for has these steps.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr bool kHasTensorSteps = false;
#else
constexpr bool kHasTensorSteps = true;
#endif
}  // namespace torchcnn::cuda

#ifdef TORCHCNN_CUDA_EMULATOR
#include "emulated_mma.h"
#else

namespace torchcnn::cuda {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#define TORCHCNN_SM80(...) __trap()
#else
#define TORCHCNN_SM80(...) asm volatile(__VA_ARGS__)
#endif

// d += a b
__device__ __forceinline__ void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __half) {
  TORCHCNN_SM80(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};" : "+f"(d[0]),
      "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __nv_bfloat16) {
  TORCHCNN_SM80(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};" : "+f"(d[0]),
      "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ void mma_16x8x8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  TORCHCNN_SM80(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};" : "+f"(d[0]),
      "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// To the nearest TF32, ties away from zero.
__device__ __forceinline__ uint32_t to_tf32(float x) {
  uint32_t bits = 0;
  TORCHCNN_SM80("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}

// Four 8 x 8 matrices of 16-bit elements: lane l names the address of row l % 8 of matrix l / 8, 16-byte aligned, and receives in
// to[i] elements 2 t and 2 t + 1 of row g of matrix i. Transposed: of column g.
__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], const void* shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(shared_row)))
               : "memory");
}

__device__ __forceinline__ void load_matrices_transposed(uint32_t (&to)[4], const void* shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(shared_row)))
               : "memory");
}

// Copies 16 bytes from global to shared memory, or writes 16 zero bytes; both addresses 16-byte aligned, `from` valid or unread:
// it may lie anywhere where nothing is copied. The bytes have arrived once the thread has waited for the group of copies that it
// committed them in. kCached: by way of the L1 cache, for what other copies read soon.
template <bool kCached = false>
__device__ __forceinline__ void copy_async(void* shared, const void* from, bool copy) {
#if __CUDA_ARCH__ < 800
  *static_cast<uint4*>(shared) = copy ? *static_cast<const uint4*>(from) : uint4{0, 0, 0, 0};
#else
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  const int bytes = copy ? 16 : 0;
  if constexpr (kCached)
    asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
  else
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
#endif
}

__device__ __forceinline__ void copy_async_commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most `groups` of the thread's latest groups are under way.
template <int groups>
__device__ __forceinline__ void copy_async_wait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(groups) : "memory");
#endif
}

#undef TORCHCNN_SM80

}  // namespace torchcnn::cuda
#endif
