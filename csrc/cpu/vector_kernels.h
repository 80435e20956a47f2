// The row of the kernel table that the vector kernels make for the instruction set of the including isa_*.cpp.
#pragma once

#include "conv2d.h"
#include "kernels.h"
#include "pool2d.h"

namespace torchcnn::TORCHCNN_ISA {

// A constant: nothing of this instruction set may run at load time, on a processor that may lack it.
template <class T>
inline constexpr FloatKernels<T> vector_kernels = {
    conv2d_forward<T>,     conv2d_grad_input<T>,  conv2d_grad_weight<T>, conv2d_grad_bias<T>,
    max_pool2d_forward<T>, min_pool2d_forward<T>, avg_pool2d_forward<T>, avg_pool2d_grad_input<T>,
};

}  // namespace torchcnn::TORCHCNN_ISA
