// Convolution for AVX2 and FMA: 32-byte vectors, 16 registers.
#if defined(__x86_64__)

#define TORCHCNN_ISA avx2
#define TORCHCNN_KERNELS "../conv2d.h"
#include "region.h"

namespace torchcnn::avx2 {

constinit const Conv2dKernels<float> conv2d_f32 = conv2d_kernels<float>;
constinit const Conv2dKernels<double> conv2d_f64 = conv2d_kernels<double>;
constinit const ConvertKernels<BFloat16> convert_bf16 = convert_kernels<BFloat16>;
constinit const ConvertKernels<Float16> convert_f16 = convert_kernels<Float16>;

}  // namespace torchcnn::avx2

#endif
