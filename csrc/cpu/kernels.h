// The table of kernels: one row for each instruction set, one column for each operator and direction. Every row is tested by the
// same tests; TORCHCNN_ISA chooses one, else the best that the processor has is taken (dispatch.cpp).
#pragma once

#include <cstdint>
#include <vector>

#include "../geometry.h"
#include "element.h"

namespace torchcnn {

template <class T>
struct FloatKernels {
  void (*conv2d_forward)(const Conv2dGeometry&, const T* input, const T* weight, const Epilogue<T>&, T* output);
  void (*conv2d_grad_input)(const Conv2dGeometry&, const T* grad_output, const T* weight, T* grad_input);
  void (*conv2d_grad_weight)(const Conv2dGeometry&, const T* grad_output, const T* input, T* grad_weight);
  void (*conv2d_grad_bias)(const Conv2dGeometry&, const T* grad_output, T* grad_bias);
};

template <class T>
struct Pool2dKernels {
  void (*extremum_pool2d_forward)(const Pool2dGeometry&, Extremum, const T* input, T* output, Positions);
  void (*offset_pool2d_grad_input)(const Pool2dGeometry&, const T* grad_output, Positions offsets, T* grad_input);
  void (*avg_pool2d_forward)(const Pool2dGeometry&, Divisor, const T* input, T* output);
  void (*avg_pool2d_grad_input)(const Pool2dGeometry&, Divisor, const T* grad_output, T* grad_input);
};

struct KernelTable {
  const char* isa;
  FloatKernels<float> f32;
  FloatKernels<double> f64;
  Pool2dKernels<float> pool2d_f32;
  Pool2dKernels<double> pool2d_f64;
  Pool2dKernels<BFloat16> pool2d_bf16;
  Pool2dKernels<Float16> pool2d_f16;
};

extern const KernelTable reference_kernels;  // direct loops, sums in double: the specification
extern const KernelTable scalar_kernels;     // what the compiler makes of 16-byte vectors on the baseline processor
#if defined(__x86_64__)
extern const KernelTable avx2_kernels;  // AVX2 and FMA
#endif

const KernelTable& kernels();                         // the row in use
std::vector<const KernelTable*> available_kernels();  // the rows that this machine can run, from the plainest to the best

template <class T>
const FloatKernels<T>& kernels_for();
template <>
inline const FloatKernels<float>& kernels_for<float>() {
  return kernels().f32;
}
template <>
inline const FloatKernels<double>& kernels_for<double>() {
  return kernels().f64;
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
