// Convolution for 16-byte vectors on the baseline of any processor: SSE2 on x86-64.
#define TORCHCNN_ISA scalar
#define TORCHCNN_KERNELS "../conv2d.h"
#include "region.h"

namespace torchcnn::scalar {

constinit const Conv2dKernels<float> conv2d_f32 = conv2d_kernels<float>;
constinit const Conv2dKernels<double> conv2d_f64 = conv2d_kernels<double>;
constinit const ConvertKernels<BFloat16> convert_bf16 = convert_kernels<BFloat16>;
constinit const ConvertKernels<Float16> convert_f16 = convert_kernels<Float16>;

}  // namespace torchcnn::scalar
