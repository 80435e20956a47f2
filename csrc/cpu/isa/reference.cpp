// The specification as a row of the kernel table.
#include "../conv2d_reference.h"
#include "../kernels.h"
#include "../pool2d_indexed.h"
#include "../pool2d_reference.h"

namespace torchcnn::reference {

template <class T>
void conv2d_grad_weight_and_bias(const Conv2dGeometry& g, const T* grad_output, const T* input, T* grad_weight, T* grad_bias) {
  conv2d_grad_weight(g, grad_output, input, grad_weight);
  if (grad_bias != nullptr) conv2d_grad_bias(g, grad_output, grad_bias);
}

template <class T>
inline constexpr Conv2dKernels<T> conv2d_kernels = {
    conv2d_forward<T>,
    conv2d_grad_input<T>,
    conv2d_grad_weight_and_bias<T>,
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

template <class S>
void widen_all(const S* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = widen(from[i]);
}
template <class S>
void narrow_all(const float* from, int64_t count, S* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = narrow<S>(from[i]);
}

constinit const Conv2dKernels<float> conv2d_f32 = conv2d_kernels<float>;
constinit const Conv2dKernels<double> conv2d_f64 = conv2d_kernels<double>;
constinit const ConvertKernels<BFloat16> convert_bf16 = {widen_all<BFloat16>, narrow_all<BFloat16>};
constinit const ConvertKernels<Float16> convert_f16 = {widen_all<Float16>, narrow_all<Float16>};
constinit const Pool2dKernels<float> pool2d_f32 = pool2d_kernels<float>;
constinit const Pool2dKernels<double> pool2d_f64 = pool2d_kernels<double>;
constinit const Pool2dKernels<BFloat16> pool2d_bf16 = pool2d_kernels<BFloat16>;
constinit const Pool2dKernels<Float16> pool2d_f16 = pool2d_kernels<Float16>;

}  // namespace torchcnn::reference
