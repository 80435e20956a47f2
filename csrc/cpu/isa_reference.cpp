// The specification as a row of the kernel table.
#include "conv2d_reference.h"
#include "kernels.h"
#include "pool2d_reference.h"

namespace torchcnn {

namespace reference {

template <class T>
inline constexpr FloatKernels<T> float_kernels = {
    conv2d_forward<T>,     conv2d_grad_input<T>,  conv2d_grad_weight<T>, conv2d_grad_bias<T>,
    max_pool2d_forward<T>, min_pool2d_forward<T>, avg_pool2d_forward<T>, avg_pool2d_grad_input<T>,
};

}  // namespace reference

constinit const KernelTable reference_kernels = {"reference", reference::float_kernels<float>, reference::float_kernels<double>};

}  // namespace torchcnn
