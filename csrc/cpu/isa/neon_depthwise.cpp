// Depthwise convolution for NEON, the baseline of aarch64: 16-byte vectors, 32 registers.
#if defined(__aarch64__)

#define TORCHCNN_ISA neon
#define TORCHCNN_KERNELS "../conv2d_depthwise.h"
#include "region.h"

#endif
