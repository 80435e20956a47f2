// The convolution kernels of one instruction set: each call goes to the algorithm that conv2d_choice.h names.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "../geometry.h"
#include "conv2d_choice.h"
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

namespace depthwise {  // conv2d_depthwise.h, compiled by isa/*_depthwise.cpp
template <class T>
void conv2d_forward(const Conv2dGeometry& g, const T* input, const T* weight, const Epilogue<T>& epilogue, T* output);
template <class T>
void conv2d_grad_input(const Conv2dGeometry& g, const T* grad_output, const T* weight, T* grad_input);
template <class T>
void conv2d_grad_weight(const Conv2dGeometry& g, const T* grad_output, const T* input, T* grad_weight);
}  // namespace depthwise

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

template <class T>
void conv2d_forward(const Conv2dGeometry& g, const T* input, const T* weight, const Epilogue<T>& epilogue, T* output) {
  const WorkspaceUse use;
  const Algorithm algorithm = choose_conv2d(g, Direction::forward).algorithm;
  if (with_winograd_tile<false>(algorithm, [&]<class F>(F) { winograd::conv2d_forward<F>(g, input, weight, epilogue, output); }))
    return;
  switch (algorithm) {
    case Algorithm::direct: return reference::conv2d_forward(g, input, weight, epilogue, output);
    case Algorithm::pointwise: return pointwise::conv2d_forward(g, input, weight, epilogue, output);
    case Algorithm::small_channels:
      if (suits_vectors_of_filters(g, Direction::forward))
        return small_channels::filters::conv2d_forward(g, input, weight, epilogue, output);
      return small_channels::conv2d_forward(g, input, weight, epilogue, output);
    case Algorithm::depthwise: return depthwise::conv2d_forward(g, input, weight, epilogue, output);
    default: return implicit_gemm::conv2d_forward(g, input, weight, epilogue, output);
  }
}

template <class T>
void conv2d_grad_input(const Conv2dGeometry& g, const T* grad_output, const T* weight, T* grad_input) {
  const WorkspaceUse use;
  const Algorithm algorithm = choose_conv2d(g, Direction::grad_input).algorithm;
  if (with_winograd_tile<true>(algorithm,
                               [&]<class F>(F) { winograd::conv2d_grad_input<F>(g, grad_output, weight, grad_input); }))
    return;
  switch (algorithm) {
    case Algorithm::direct: return reference::conv2d_grad_input(g, grad_output, weight, grad_input);
    case Algorithm::pointwise: return pointwise::conv2d_grad_input(g, grad_output, weight, grad_input);
    case Algorithm::small_channels: return small_channels::conv2d_grad_input(g, grad_output, weight, grad_input);
    case Algorithm::depthwise: return depthwise::conv2d_grad_input(g, grad_output, weight, grad_input);
    default: return implicit_gemm::conv2d_grad_input(g, grad_output, weight, grad_input);
  }
}

template <class T>
void conv2d_grad_weight(const Conv2dGeometry& g, const T* grad_output, const T* input, T* grad_weight) {
  const WorkspaceUse use;
  const Algorithm algorithm = choose_conv2d(g, Direction::grad_weight).algorithm;
  if (with_winograd_tile<false>(algorithm,
                                [&]<class F>(F) { winograd::conv2d_grad_weight<F>(g, grad_output, input, grad_weight); }))
    return;
  switch (algorithm) {
    case Algorithm::direct: return reference::conv2d_grad_weight(g, grad_output, input, grad_weight);
    case Algorithm::small_channels:
      if (suits_vectors_of_filters(g, Direction::grad_weight))
        return small_channels::filters::conv2d_grad_weight(g, grad_output, input, grad_weight);
      return small_channels::conv2d_grad_weight(g, grad_output, input, grad_weight);
    case Algorithm::depthwise: return depthwise::conv2d_grad_weight(g, grad_output, input, grad_weight);
    case Algorithm::pointwise: return pointwise::conv2d_grad_weight(g, grad_output, input, grad_weight);
    default: return implicit_gemm::conv2d_grad_weight(g, grad_output, input, grad_weight);
  }
}

// As many elements as Vec<double> has.
template <class T>
struct NarrowOf {
  using type [[gnu::vector_size(kLanes<double> * sizeof(T))]] = T;
};

template <class T>
Vec<double> load_as_double(const T* from) {
  typename NarrowOf<T>::type v;
  std::memcpy(&v, from, sizeof v);
  return __builtin_convertvector(v, Vec<double>);
}

// sum[lane] += v[lane]; doubles are stored so that each needs no order.
template <class T>
[[gnu::always_inline]] inline void add_in_double(Vec<T> v, double* sum) {
  T lane[kLanes<T>];
  store(lane, v);
  for (int64_t l = 0; l < kLanes<T>; l += kLanes<double>) store(sum + l, load(sum + l) + load_as_double(lane + l));
}

// Four vectors, `stride` apart. They are added before the sum is taken to double, which costs more than the sum.
template <class T>
[[gnu::always_inline]] inline Vec<T> sum_of_four(const T* from, int64_t stride) {
  return (load(from) + load(from + stride)) + (load(from + 2 * stride) + load(from + 3 * stride));
}

template <class T>
double sum_of_planes(const T* plane, int64_t planes, int64_t plane_stride, int64_t size) {
  constexpr int64_t L = kLanes<T>;
  double sum[L] = {}, total = 0.0;
  for (int64_t n = 0; n < planes; ++n, plane += plane_stride) {
    int64_t x = 0;
    for (; x + 4 * L <= size; x += 4 * L) add_in_double<T>(sum_of_four(plane + x, L), sum);
    for (; x + L <= size; x += L) add_in_double<T>(load(plane + x), sum);
    for (; x < size; ++x) total += double(plane[x]);
  }
  for (int64_t l = 0; l < L; ++l) total += sum[l];
  return total;
}

// Sums over a whole batch of planes are in double: they are long, and the loop waits for memory anyway.
template <class T>
void conv2d_grad_bias(const Conv2dGeometry& g, const T* grad_output, T* grad_bias) {
  const WorkspaceUse use;
  const Strides out = g.output_strides();
  constexpr int64_t lanes = kLanes<T>;
  if (g.layout == Layout::nchw) {
    parallel_for(g.K, g.N * g.P * g.Q / lanes, [&](int64_t k) {
      grad_bias[k] = static_cast<T>(sum_of_planes(grad_output + k * out.c, g.N, out.n, g.P * g.Q));
    });
    return;
  }
  // channels_last: slices of the pixels, as many on any number of threads, each with all of its channels in the order of memory.
  const int64_t pixels = g.N * g.P * g.Q, slices = std::clamp<int64_t>(pixels / 64, 1, 8), whole = g.K / lanes * lanes;
  double* const partial = workspace<double>(Slot::partial_sums, slices * g.K);
  parallel_for(slices, pixels / slices * g.K / lanes, [&](int64_t slice) {
    double* sum = partial + slice * g.K;
    std::memset(sum, 0, size_t(g.K) * sizeof(double));
    int64_t x = slice * pixels / slices;
    const int64_t end = (slice + 1) * pixels / slices;
    const T* from = grad_output + x * g.K;
    for (; x + 4 <= end; x += 4, from += 4 * g.K) {
      gemm::prefetch(from + 8 * g.K, 4 * g.K);  // four rows at once look like no stream
      for (int64_t k = 0; k < whole; k += lanes) add_in_double<T>(sum_of_four(from + k, g.K), sum + k);
      for (int64_t k = whole; k < g.K; ++k)
        sum[k] += (double(from[k]) + double(from[k + g.K])) + (double(from[k + 2 * g.K]) + double(from[k + 3 * g.K]));
    }
    for (; x < end; ++x, from += g.K)
      for (int64_t k = 0; k < g.K; ++k) sum[k] += double(from[k]);
  });
  for (int64_t k = 0; k < g.K; ++k) {
    double sum = 0.0;
    for (int64_t slice = 0; slice < slices; ++slice) sum += partial[slice * g.K + k];
    grad_bias[k] = static_cast<T>(sum);
  }
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
