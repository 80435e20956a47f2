// Pooling for NEON, the baseline of aarch64: 16-byte vectors, 32 registers.
#if defined(__aarch64__)

#define TORCHCNN_ISA neon
#define TORCHCNN_KERNELS "../pool2d.h"
#include "region.h"

namespace torchcnn::neon {

constinit const Pool2dKernels<float> pool2d_f32 = pool2d_kernels<float>;
constinit const Pool2dKernels<double> pool2d_f64 = pool2d_kernels<double>;
constinit const Pool2dKernels<BFloat16> pool2d_bf16 = pool2d_kernels<BFloat16>;
constinit const Pool2dKernels<Float16> pool2d_f16 = pool2d_kernels<Float16>;

}  // namespace torchcnn::neon

#endif
