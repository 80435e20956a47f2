// The rule that chooses an algorithm for a convolution, in one place: the kernels follow it and torchcnn.explain prints it.
// It reads the geometry and the element size alone, never N or the number of threads, so that results do not depend on them.
#pragma once

#include <cstddef>

#include "../geometry.h"

namespace torchcnn {

enum class Direction { forward, grad_input, grad_weight };

inline const char* name_of(Direction direction) {
  switch (direction) {
    case Direction::forward: return "forward";
    case Direction::grad_input: return "grad_input";
    default: return "grad_weight";
  }
}

enum class Algorithm { implicit_gemm, depthwise };

inline const char* name_of(Algorithm algorithm) {
  switch (algorithm) {
    case Algorithm::depthwise: return "depthwise";
    default: return "implicit_gemm";
  }
}

struct Choice {
  Algorithm algorithm;
  const char* reason;
};

inline Choice choose_conv2d(const Conv2dGeometry& g, Direction direction, [[maybe_unused]] size_t element_size) {
  if (g.C == g.G && (g.K == g.G || (g.G > 1 && g.layout == Layout::nchw)))
    return {Algorithm::depthwise, "one input channel in each group: direct sums, bound by memory"};
  if (direction == Direction::grad_input && (g.stride_h > 1 || g.stride_w > 1))
    return {Algorithm::implicit_gemm, "stride above 1: one correlation of grad_output for each phase of the input"};
  if (direction == Direction::grad_weight)
    return {Algorithm::implicit_gemm, "dot products of grad_output and packed patches, for any geometry"};
  return {Algorithm::implicit_gemm, "weights times packed patches, for any geometry"};
}

}  // namespace torchcnn
