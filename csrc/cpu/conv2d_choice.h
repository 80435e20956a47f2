// The rule that chooses an algorithm for a convolution, in one place: the kernels follow it and torchcnn.explain prints it.
// It reads the geometry alone, never N or the number of threads, so that results do not depend on them.
#pragma once

#include "../geometry.h"
#include "kernels.h"

namespace torchcnn {

enum class Direction { forward, grad_input, grad_weight };

inline const char* direction_name(Direction direction) {
  switch (direction) {
    case Direction::forward: return "forward";
    case Direction::grad_input: return "grad_input";
    default: return "grad_weight";
  }
}

struct Choice {
  const char* algorithm;
  const char* reason;
};

inline Choice choose_conv2d(const Conv2dGeometry& g, Direction direction) {
  if (&kernels() == &reference_kernels) return {"direct", "TORCHCNN_ISA=reference: the formula, summed in double"};
  if (direction == Direction::grad_input && (g.stride_h > 1 || g.stride_w > 1))
    return {"implicit_gemm", "stride above 1: one correlation of grad_output for each phase of the input"};
  if (direction == Direction::grad_weight)
    return {"implicit_gemm", "dot products of grad_output and packed patches, for any geometry"};
  return {"implicit_gemm", "weights times packed patches, for any geometry"};
}

}  // namespace torchcnn
