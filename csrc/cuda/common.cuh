// What every .cu file needs: element types, launches, checks, dynamic shared memory.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <string>

#include "kernels.h"

namespace torchcnn::cuda {

// The CUDA type with the bits of T, and the type that it is computed with.
template <class T>
struct DeviceType {
  using type = T;
};
template <>
struct DeviceType<Float16> {
  using type = __half;
};
template <>
struct DeviceType<BFloat16> {
  using type = __nv_bfloat16;
};
template <class T>
using Device = typename DeviceType<T>::type;

template <class T>
const Device<T>* on_device(const T* pointer) {
  return reinterpret_cast<const Device<T>*>(pointer);
}
template <class T>
Device<T>* on_device(T* pointer) {
  return reinterpret_cast<Device<T>*>(pointer);
}

__device__ inline float to_arithmetic(__half x) { return __half2float(x); }
__device__ inline float to_arithmetic(__nv_bfloat16 x) { return __bfloat162float(x); }
template <class T>
__device__ T to_arithmetic(T x) {
  return x;
}

// What products of T are added up in.
template <class T>
using SumOf = std::conditional_t<sizeof(T) == 8, double, float>;

// An unsigned integer of the size of T, for elements that are moved alone. All zero bits are zero.
template <class T>
using BitsOf = std::conditional_t<sizeof(T) == 2, uint16_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>>;

// Rounds to nearest, ties to even.
template <class T, class A>
__device__ T from_arithmetic(A x) {
  if constexpr (sizeof(T) == sizeof(A)) {
    return x;
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(x);
  } else {
    return __float2bfloat16_rn(x);
  }
}

// A kernel has one block of dynamic shared memory at most; this is it. wgmma.cuh asks for the alignment.
__device__ inline unsigned char* dynamic_shared_memory() {
  extern __shared__ __align__(1024) unsigned char dynamic_shared[];
  return dynamic_shared;
}

inline void check(cudaError_t error, const char* kernel) {
  if (error != cudaSuccess) throw Error(std::string(kernel) + ": CUDA error: " + cudaGetErrorString(error));
}

// Starts a kernel whose name the error message gives. A launch takes at most 2^31 - 1 blocks in x and 65535 in y and z.
template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 blocks, dim3 threads, size_t shared_bytes, Stream stream,
            const Arguments&... arguments) {
  constexpr size_t without_asking = 48 << 10;
  if (shared_bytes > without_asking)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)), name);
  cudaLaunchConfig_t config = {};
  config.gridDim = blocks;
  config.blockDim = threads;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...), name);
}

}  // namespace torchcnn::cuda
