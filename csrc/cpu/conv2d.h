// The convolution kernels of one instruction set: each call goes to the algorithm that conv2d_choice.h names.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../geometry.h"
#include "conv2d_choice.h"
#include "conv2d_grad_bias.h"
#include "conv2d_implicit_gemm.h"
#include "conv2d_implicit_gemm_grad_weight.h"
#include "conv2d_pointwise.h"
#include "conv2d_reference.h"
#include "conv2d_small_channels.h"
#include "conv2d_small_channels_filters.h"
#include "conv2d_small_channels_grad_weight.h"
#include "conv2d_winograd.h"
#include "conv2d_winograd_grad_weight.h"
#include "convert.h"
#include "kernels.h"
#include "runtime.h"
#include "simd.h"

namespace torchcnn::TORCHCNN_ISA {

static_assert(vector_bytes == TORCHCNN_VECTOR_BYTES);

namespace depthwise {  // conv2d_depthwise.h, compiled by isa/*_depthwise.cpp
template <class T>
void conv2d_forward(const Conv2dGeometry& g, const T* input, const T* weight, const Epilogue<T>& epilogue, T* output);
template <class T>
void conv2d_grad_input(const Conv2dGeometry& g, const T* grad_output, const T* weight, T* grad_input);
template <class T>
void conv2d_grad_weight(const Conv2dGeometry& g, const T* grad_output, const T* input, T* grad_weight, T* grad_bias);
}  // namespace depthwise

namespace grouped {  // conv2d_grouped.h, likewise
template <class T>
void conv2d_forward(const Conv2dGeometry& g, const T* input, const T* weight, const Epilogue<T>& epilogue, T* output);
template <class T>
void conv2d_grad_input(const Conv2dGeometry& g, const T* grad_output, const T* weight, T* grad_input);
template <class T>
void conv2d_grad_weight(const Conv2dGeometry& g, const T* grad_output, const T* input, T* grad_weight, T* grad_bias);
}  // namespace grouped

// Calls call(tile) with the tile of a Winograd algorithm, false if `algorithm` is none.
template <bool of_grad_input, class Call>
bool with_winograd_tile(Algorithm algorithm, Call call) {
  using namespace winograd;
  const auto stride_2 = [&]<int m>(std::integral_constant<int, m>) {
    if constexpr (of_grad_input) {
      call(Tile<Stride2GradInput<m>>{});
    } else {
      call(Tile<Stride2<m>>{});
    }
  };
  switch (algorithm) {
    case Algorithm::winograd_2x2_3x3: call(Tile<Transform<2, 3>>{}); return true;
    case Algorithm::winograd_4x4_3x3: call(Tile<Transform<4, 3>>{}); return true;
    case Algorithm::winograd_2x2_5x5: call(Tile<Transform<2, 5>>{}); return true;
    case Algorithm::winograd_2x2_stride_2: stride_2(std::integral_constant<int, 2>{}); return true;
    case Algorithm::winograd_4x4_stride_2: stride_2(std::integral_constant<int, 4>{}); return true;
    case Algorithm::winograd_1x4_1x3: call(Tile<OneTap, Transform<4, 3>>{}); return true;
    case Algorithm::winograd_4x1_3x1: call(Tile<Transform<4, 3>, OneTap>{}); return true;
    case Algorithm::winograd_1x2_1x5: call(Tile<OneTap, Transform<2, 5>>{}); return true;
    case Algorithm::winograd_2x1_5x1: call(Tile<Transform<2, 5>, OneTap>{}); return true;
    case Algorithm::winograd_1x3_1x7: call(Tile<OneTap, Halves<3, 4>>{}); return true;
    case Algorithm::winograd_3x1_7x1: call(Tile<Halves<3, 4>, OneTap>{}); return true;
    default: return false;
  }
}

// The same for those of the phases of a stride.
template <class Call>
bool with_winograd_tile_of_phases(Algorithm algorithm, Call call) {
  using namespace winograd;
  switch (algorithm) {
    case Algorithm::winograd_4x4_3x3_phases: call(Tile<Transform<4, 3>>{}); return true;
    case Algorithm::winograd_3x3_4x4_phases: call(Tile<Transform<3, 4>>{}); return true;
    default: return false;
  }
}

template <class T>
void conv2d_forward(const Conv2dGeometry& g, const T* input, const T* weight, const Epilogue<T>& epilogue, T* output) {
  const WorkspaceUse use;
  const Algorithm algorithm = choose_conv2d(g, Direction::forward, vector_bytes).algorithm;
  if (with_winograd_tile<false>(algorithm, [&]<class F>(F) { winograd::conv2d_forward<F>(g, input, weight, epilogue, output); }))
    return;
  if (with_winograd_tile_of_phases(
          algorithm, [&]<class F>(F) { winograd::conv2d_forward_of_phases<F>(g, input, weight, epilogue, output); }))
    return;
  switch (algorithm) {
    case Algorithm::direct: return reference::conv2d_forward(g, input, weight, epilogue, output);
    case Algorithm::pointwise: return pointwise::conv2d_forward(g, input, weight, epilogue, output);
    case Algorithm::small_channels:
      if (suits_vectors_of_filters(g, Direction::forward))
        return small_channels::filters::conv2d_forward(g, input, weight, epilogue, output);
      return small_channels::conv2d_forward(g, input, weight, epilogue, output);
    case Algorithm::depthwise: return depthwise::conv2d_forward(g, input, weight, epilogue, output);
    case Algorithm::grouped: return grouped::conv2d_forward(g, input, weight, epilogue, output);
    default: return implicit_gemm::conv2d_forward(g, input, weight, epilogue, output);
  }
}

template <class T>
void conv2d_grad_input(const Conv2dGeometry& g, const T* grad_output, const T* weight, T* grad_input) {
  const WorkspaceUse use;
  const Algorithm algorithm = choose_conv2d(g, Direction::grad_input, vector_bytes).algorithm;
  if (with_winograd_tile<true>(algorithm,
                               [&]<class F>(F) { winograd::conv2d_grad_input<F>(g, grad_output, weight, grad_input); }))
    return;
  switch (algorithm) {
    case Algorithm::direct: return reference::conv2d_grad_input(g, grad_output, weight, grad_input);
    case Algorithm::pointwise: return pointwise::conv2d_grad_input(g, grad_output, weight, grad_input);
    case Algorithm::small_channels: return small_channels::conv2d_grad_input(g, grad_output, weight, grad_input);
    case Algorithm::depthwise: return depthwise::conv2d_grad_input(g, grad_output, weight, grad_input);
    case Algorithm::grouped: return grouped::conv2d_grad_input(g, grad_output, weight, grad_input);
    default: return implicit_gemm::conv2d_grad_input(g, grad_output, weight, grad_input);
  }
}

// The kernels that pass by grad_output in blocks add up grad_bias beside, while a block is in the caches; it is null where nobody
// asks for it.
template <class T>
void conv2d_grad_weight(const Conv2dGeometry& g, const T* grad_output, const T* input, T* grad_weight, T* grad_bias) {
  const WorkspaceUse use;
  const Algorithm algorithm = choose_conv2d(g, Direction::grad_weight, vector_bytes).algorithm;
  bool bias_done = grad_bias == nullptr;
  const bool by_winograd = with_winograd_tile<false>(algorithm, [&]<class F>(F) {
    bias_done |= winograd::conv2d_grad_weight<F>(g, grad_output, input, grad_weight, grad_bias);
  }) || with_winograd_tile_of_phases(algorithm, [&]<class F>(F) {
    bias_done |= winograd::conv2d_grad_weight_of_phases<F>(g, grad_output, input, grad_weight, grad_bias);
  });
  if (!by_winograd) {
    switch (algorithm) {
      case Algorithm::direct: reference::conv2d_grad_weight(g, grad_output, input, grad_weight); break;
      case Algorithm::grouped: return grouped::conv2d_grad_weight(g, grad_output, input, grad_weight, grad_bias);
      case Algorithm::small_channels:
        if (suits_vectors_of_filters(g, Direction::grad_weight))
          return small_channels::filters::conv2d_grad_weight(g, grad_output, input, grad_weight, grad_bias);
        return small_channels::conv2d_grad_weight(g, grad_output, input, grad_weight, grad_bias);
      case Algorithm::depthwise: return depthwise::conv2d_grad_weight(g, grad_output, input, grad_weight, grad_bias);
      case Algorithm::pointwise: return pointwise::conv2d_grad_weight(g, grad_output, input, grad_weight, grad_bias);
      default: return implicit_gemm::conv2d_grad_weight(g, grad_output, input, grad_weight, grad_bias);
    }
  }
  if (!bias_done) conv2d_grad_bias(g, grad_output, grad_bias);
}

// A constant: nothing of this instruction set may run at load time, on a processor that may lack it.
template <class T>
inline constexpr Conv2dKernels<T> conv2d_kernels = {
    conv2d_forward<T>,
    conv2d_grad_input<T>,
    conv2d_grad_weight<T>,
    conv2d_grad_bias<T>,
};

}  // namespace torchcnn::TORCHCNN_ISA
