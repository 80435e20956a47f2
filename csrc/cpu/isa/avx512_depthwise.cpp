// Depthwise convolution for AVX-512 (F, BW, DQ and VL): 64-byte vectors, 32 registers.
#if defined(__x86_64__)

#define TORCHCNN_ISA avx512
#define TORCHCNN_KERNELS "../conv2d_depthwise.h"
#include "region.h"

#endif
