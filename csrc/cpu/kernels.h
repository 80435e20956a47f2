// The table of kernels: one row for each instruction set, one column for each operator and direction. Every row is tested by the
// same tests; TORCHCNN_ISA chooses one, else the best that the processor has is taken (dispatch.cpp).
#pragma once

#include <cstdint>
#include <type_traits>
#include <vector>

#include "../geometry.h"
#include "element.h"

namespace torchcnn {

template <class T>
struct Conv2dKernels {
  void (*forward)(const Conv2dGeometry&, const T* input, const T* weight, const Epilogue<T>&, T* output);
  void (*grad_input)(const Conv2dGeometry&, const T* grad_output, const T* weight, T* grad_input);
  // With the sum of grad_output beside, unless grad_bias is null.
  void (*grad_weight)(const Conv2dGeometry&, const T* grad_output, const T* input, T* grad_weight, T* grad_bias);
  void (*grad_bias)(const Conv2dGeometry&, const T* grad_output, T* grad_bias);
};

template <class T>
struct Pool2dKernels {
  void (*extremum_forward)(const Pool2dGeometry&, Extremum, const T* input, T* output, Positions);
  void (*offset_grad_input)(const Pool2dGeometry&, const T* grad_output, Positions offsets, T* grad_input);
  void (*avg_forward)(const Pool2dGeometry&, Divisor, const T* input, T* output);
  void (*avg_grad_input)(const Pool2dGeometry&, Divisor, const T* grad_output, T* grad_input);
};

template <class S>
struct ConvertKernels {
  void (*widen)(const S* from, int64_t count, float* to);
  void (*narrow)(const float* from, int64_t count, S* to);  // rounds to nearest, ties to even
};

struct KernelTable {
  const char* isa;
  int64_t vector_bytes;
  const Conv2dKernels<float>& conv2d_f32;
  const Conv2dKernels<double>& conv2d_f64;
  const ConvertKernels<BFloat16>& convert_bf16;
  const ConvertKernels<Float16>& convert_f16;
  const Pool2dKernels<float>& pool2d_f32;
  const Pool2dKernels<double>& pool2d_f64;
  const Pool2dKernels<BFloat16>& pool2d_bf16;
  const Pool2dKernels<Float16>& pool2d_f16;
};

// What isa/*.cpp define; dispatch.cpp makes rows of it.
#define TORCHCNN_DECLARE_ROW(isa, bytes)              \
  namespace isa {                                     \
  inline constexpr int64_t vector_bytes = bytes;      \
  extern const Conv2dKernels<float> conv2d_f32;       \
  extern const Conv2dKernels<double> conv2d_f64;      \
  extern const ConvertKernels<BFloat16> convert_bf16; \
  extern const ConvertKernels<Float16> convert_f16;   \
  extern const Pool2dKernels<float> pool2d_f32;       \
  extern const Pool2dKernels<double> pool2d_f64;      \
  extern const Pool2dKernels<BFloat16> pool2d_bf16;   \
  extern const Pool2dKernels<Float16> pool2d_f16;     \
  }
TORCHCNN_DECLARE_ROW(reference, 0)  // direct loops, sums in double: the specification
TORCHCNN_DECLARE_ROW(scalar, 16)    // 16-byte vectors on the baseline processor
TORCHCNN_DECLARE_ROW(neon, 16)
TORCHCNN_DECLARE_ROW(avx2, 32)
TORCHCNN_DECLARE_ROW(avx512, 64)

const KernelTable& kernels();                         // the row in use
std::vector<const KernelTable*> available_kernels();  // the rows that this machine can run, from the plainest to the best

template <class T>
const Conv2dKernels<T>& conv2d_kernels_for() {
  if constexpr (sizeof(T) == 8)
    return kernels().conv2d_f64;
  else
    return kernels().conv2d_f32;
}

template <class S>
const ConvertKernels<S>& convert_kernels_for() {
  if constexpr (std::is_same_v<S, BFloat16>)
    return kernels().convert_bf16;
  else
    return kernels().convert_f16;
}

template <class T>
const Pool2dKernels<T>& pool2d_kernels_for();
template <>
inline const Pool2dKernels<float>& pool2d_kernels_for<float>() {
  return kernels().pool2d_f32;
}
template <>
inline const Pool2dKernels<double>& pool2d_kernels_for<double>() {
  return kernels().pool2d_f64;
}
template <>
inline const Pool2dKernels<BFloat16>& pool2d_kernels_for<BFloat16>() {
  return kernels().pool2d_bf16;
}
template <>
inline const Pool2dKernels<Float16>& pool2d_kernels_for<Float16>() {
  return kernels().pool2d_f16;
}

}  // namespace torchcnn
