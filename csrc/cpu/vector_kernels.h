// The row of the kernel table that the vector kernels make for the instruction set of the including isa_*.cpp.
#pragma once

#include "conv2d.h"
#include "kernels.h"
#include "pool2d.h"

namespace torchcnn::TORCHCNN_ISA {

// A constant: nothing of this instruction set may run at load time, on a processor that may lack it.
template <class T>
inline constexpr FloatKernels<T> vector_kernels = {
    conv2d_forward<T>,
    conv2d_grad_input<T>,
    conv2d_grad_weight<T>,
    conv2d_grad_bias<T>,
};

template <class T>
inline constexpr Pool2dKernels<T> vector_pool2d_kernels = {
    extremum_pool2d_forward<T>,
    offset_pool2d_grad_input<T>,
    avg_pool2d_forward<T>,
    avg_pool2d_grad_input<T>,
};

inline constexpr KernelTable vector_kernel_table(const char* isa) {
  return {isa,
          vector_kernels<float>,
          vector_kernels<double>,
          vector_pool2d_kernels<float>,
          vector_pool2d_kernels<double>,
          vector_pool2d_kernels<BFloat16>,
          vector_pool2d_kernels<Float16>};
}

}  // namespace torchcnn::TORCHCNN_ISA
