// grad_bias, the sum of each channel of grad_output: on its own, and beside a kernel of grad_weight, which has a block of
// grad_output in the caches. (Depthwise rows, which have it in registers, sum it themselves.)
//
//   grad_bias[k] = sum_{n,p,q} grad_output[n,k,p,q]
//
// Sums over a whole batch of planes are in double: they are long, and the loop waits for memory anyway.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "../geometry.h"
#include "conv2d_gemm.h"
#include "runtime.h"
#include "simd.h"

namespace torchcnn::TORCHCNN_ISA {

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

template <class T>
double sum_of_lanes(const double* sum) {
  double total = 0.0;
  for (int64_t l = 0; l < kLanes<T>; ++l) total += sum[l];
  return total;
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
  return total + sum_of_lanes<T>(sum);
}

// sum[k] += the channels k of some pixels, `stride` apart: in the order of memory.
template <class T>
void add_pixels(const T* from, int64_t stride, int64_t pixels, int64_t channels, double* sum) {
  constexpr int64_t L = kLanes<T>;
  const int64_t whole = channels / L * L;
  int64_t x = 0;
  for (; x + 4 <= pixels; x += 4, from += 4 * stride) {
    for (int64_t row = 8; row < 12; ++row) gemm::prefetch(from + row * stride, channels);  // four at once look like no stream
    for (int64_t k = 0; k < whole; k += L) add_in_double<T>(sum_of_four(from + k, stride), sum + k);
    for (int64_t k = whole; k < channels; ++k)
      sum[k] += (double(from[k]) + double(from[k + stride])) + (double(from[k + 2 * stride]) + double(from[k + 3 * stride]));
  }
  for (; x < pixels; ++x, from += stride)
    for (int64_t k = 0; k < channels; ++k) sum[k] += double(from[k]);
}

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
  const int64_t pixels = g.N * g.P * g.Q, slices = std::clamp<int64_t>(pixels / 64, 1, 8);
  double* const partial = workspace<double>(Slot::partial_sums, slices * g.K);
  parallel_for(slices, pixels / slices * g.K / lanes, [&](int64_t slice) {
    double* sum = partial + slice * g.K;
    std::memset(sum, 0, size_t(g.K) * sizeof(double));
    const int64_t begin = slice * pixels / slices, end = (slice + 1) * pixels / slices;
    add_pixels(grad_output + begin * g.K, g.K, end - begin, g.K, sum);
  });
  for (int64_t k = 0; k < g.K; ++k) {
    double sum = 0.0;
    for (int64_t slice = 0; slice < slices; ++slice) sum += partial[slice * g.K + k];
    grad_bias[k] = static_cast<T>(sum);
  }
}

// Sums beside grad_weight: [slice][channel], each written by one task. Without `grad_bias` nothing is done.
template <class T>
class BiasSums {
 public:
  BiasSums(int64_t slices, int64_t K, T* grad_bias) : slices_(slices), K_(K), grad_bias_(grad_bias) {
    if (grad_bias == nullptr) return;
    sums_ = workspace<double>(Slot::bias_sums, slices * K);
    std::memset(sums_, 0, size_t(slices * K) * sizeof(double));
  }

  // Adds `planes` runs of `size` elements, plane_stride apart, of each of `channels` channels, channel_stride apart.
  void add(int64_t slice, int64_t k, int64_t channels, const T* from, int64_t channel_stride, int64_t planes,
           int64_t plane_stride, int64_t size) const {
    if (grad_bias_ == nullptr) return;
    for (int64_t c = 0; c < channels; ++c)
      sums_[slice * K_ + k + c] += sum_of_planes(from + c * channel_stride, planes, plane_stride, size);
  }

  // The same of `channels` adjacent ones: `pixels` pixels, `stride` apart.
  void add_pixels(int64_t slice, int64_t k, int64_t channels, const T* from, int64_t stride, int64_t pixels) const {
    if (grad_bias_ != nullptr) TORCHCNN_ISA::add_pixels(from, stride, pixels, channels, sums_ + slice * K_ + k);
  }

  // Adds `pixels` vectors, `stride` apart. channel_of(lane): the channel, or -1 if the lane has none.
  template <class ChannelOf>
  void add_vectors(int64_t slice, const T* from, int64_t stride, int64_t pixels, ChannelOf channel_of) const {
    if (grad_bias_ == nullptr) return;
    double sum[kLanes<T>] = {};
    int64_t x = 0;
    for (; x + 4 <= pixels; x += 4) add_in_double<T>(sum_of_four(from + x * stride, stride), sum);
    for (; x < pixels; ++x) add_in_double<T>(load(from + x * stride), sum);
    for (int64_t lane = 0; lane < kLanes<T>; ++lane)
      if (const int64_t k = channel_of(lane); k >= 0) sums_[slice * K_ + k] += sum[lane];
  }

  void finish() const {
    for (int64_t k = 0; grad_bias_ != nullptr && k < K_; ++k) {
      double sum = 0.0;
      for (int64_t slice = 0; slice < slices_; ++slice) sum += sums_[slice * K_ + k];
      grad_bias_[k] = static_cast<T>(sum);
    }
  }

 private:
  int64_t slices_, K_;
  T* grad_bias_;
  double* sums_ = nullptr;
};

}  // namespace torchcnn::TORCHCNN_ISA
