// Depthwise convolution for AVX2 and FMA: 32-byte vectors, 16 registers.
#if defined(__x86_64__)

#define TORCHCNN_ISA avx2
#define TORCHCNN_KERNELS "../conv2d_depthwise.h"
#include "region.h"

#endif
