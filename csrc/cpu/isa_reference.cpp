// The specification as a row of the kernel table.
#include "conv2d_reference.h"
#include "kernels.h"
#include "pool2d_indexed.h"
#include "pool2d_reference.h"

namespace torchcnn {

namespace reference {

template <class T>
inline constexpr FloatKernels<T> float_kernels = {
    conv2d_forward<T>,
    conv2d_grad_input<T>,
    conv2d_grad_weight<T>,
    conv2d_grad_bias<T>,
};

template <class T>
void offset_pool2d_grad_input(const Pool2dGeometry& g, const T* grad_output, Positions offsets, T* grad_input) {
  if (offsets.kind == PositionKind::byte_offsets)
    return pool2d_scatter_offsets(g, grad_output, static_cast<const uint8_t*>(offsets.to), grad_input);
  pool2d_scatter_offsets(g, grad_output, static_cast<const int32_t*>(offsets.to), grad_input);
}

template <class T>
inline constexpr Pool2dKernels<T> pool2d_kernels = {
    extremum_pool2d_forward<T>,
    offset_pool2d_grad_input<T>,
    avg_pool2d_forward<T>,
    avg_pool2d_grad_input<T>,
};

}  // namespace reference

constinit const KernelTable reference_kernels = {
    "reference",
    reference::float_kernels<float>,
    reference::float_kernels<double>,
    reference::pool2d_kernels<float>,
    reference::pool2d_kernels<double>,
    reference::pool2d_kernels<BFloat16>,
    reference::pool2d_kernels<Float16>,
};

}  // namespace torchcnn
