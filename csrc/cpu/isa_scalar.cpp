// The vector kernels on a processor's baseline: 16-byte vectors, which the compiler maps to SSE2, NEON or scalar code.
#define TORCHCNN_ISA scalar
#define TORCHCNN_VECTOR_BYTES 16

#include "vector_kernels.h"

namespace torchcnn {

constinit const KernelTable scalar_kernels = scalar::vector_kernel_table("scalar");

}  // namespace torchcnn
