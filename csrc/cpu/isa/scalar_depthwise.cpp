// Depthwise convolution for 16-byte vectors on the baseline of any processor: SSE2 on x86-64.
#define TORCHCNN_ISA scalar
#define TORCHCNN_KERNELS "../conv2d_depthwise.h"
#include "region.h"
