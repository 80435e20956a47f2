// Convolution for NEON, the baseline of aarch64: 16-byte vectors, 32 registers.
#if defined(__aarch64__)

#define TORCHCNN_ISA neon
#define TORCHCNN_KERNELS "../conv2d.h"
#include "region.h"

namespace torchcnn::neon {

constinit const Conv2dKernels<float> conv2d_f32 = conv2d_kernels<float>;
constinit const Conv2dKernels<double> conv2d_f64 = conv2d_kernels<double>;
constinit const ConvertKernels<BFloat16> convert_bf16 = convert_kernels<BFloat16>;
constinit const ConvertKernels<Float16> convert_f16 = convert_kernels<Float16>;

}  // namespace torchcnn::neon

#endif
