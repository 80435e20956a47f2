// Depthwise convolution of small NCHW planes by 3x3 filters with padding 1 and stride 1: a plane is one row of H W elements, so
// that vectors need not end where its rows do.
//
//   output[i] = sum_s inside_s[i] ? sum_r weight[r][s] source[i + (r - 1) W + s - 1] : 0          i = h W + w
//   inside_s[i]: whether column w + s - 1 lies inside the plane; the sum has met the end of the row above or below otherwise
//
// grad_input is the same of grad_output with the filter turned by 180 degrees. Rows above and below the plane are zeros, between
// which the plane is copied; they do no harm if the weights are finite, which the caller sees to.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../geometry.h"
#include "conv2d_depthwise_axes.h"
#include "runtime.h"
#include "simd.h"

namespace torchcnn::TORCHCNN_ISA::depthwise::flat {

// Where rows are shorter than a vector, or leave more than a quarter of two empty, until the planes are so large that this costs
// less than the copy. Only with vectors of 32 bytes: those of 64 would cross a cache line at almost every load, and shorter ones
// have not been measured.
template <class T>
bool applies(const Conv2dGeometry& g) {
  constexpr int64_t most_elements = 400;
  return TORCHCNN_VECTOR_BYTES == 32 && g.layout == Layout::nchw && g.K == g.C && g.R == 3 && g.S == 3 && g.pad_h == 1 &&
         g.pad_w == 1 && g.stride_h == 1 && g.stride_w == 1 && g.dilation_h == 1 && g.dilation_w == 1 && g.H <= most_elements &&
         g.W != kLanes<T> && g.W < 3 * kLanes<T> / 2 && g.H * g.W >= kLanes<T> && g.H * g.W <= most_elements;
}

template <class T>
void correlate(const Correlation<T>& c, bool turned) {
  using I = IndexOf<T>;
  constexpr int64_t L = kLanes<T>, at_once = 4, planes_of_task = 8;
  const int64_t W = c.axes.w.source_size, count = c.axes.h.source_size * W, planes = c.N * c.C;
  const int64_t margin = ceil_div(W + 1, L) * L, buffer_size = 2 * margin + ceil_div(count, L) * L;
  I* const inside = workspace<I>(Slot::tables, 3 * count);  // [s][i]
  for (int64_t i = 0; i < 3 * count; ++i) {
    const int64_t column = i % W + i / count - 1;
    inside[i] = column >= 0 && column < W ? I(-1) : I(0);
  }
  parallel_for(ceil_div(planes, planes_of_task), planes_of_task * 13 * ceil_div(count, L), [&](int64_t task) {
    T* const buffers = workspace<T>(Slot::patches, 2 * buffer_size);
    std::fill_n(buffers, 2 * buffer_size, T(0));
    const int64_t begin = task * planes_of_task, end = std::min(planes, begin + planes_of_task);
    const auto buffer_of = [=](int64_t plane) { return buffers + (plane - begin) % 2 * buffer_size + margin; };
    copy(c.source + begin * count, count, buffer_of(begin));
    for (int64_t plane = begin; plane < end; ++plane) {
      // Before this plane is computed: what was stored just now cannot be loaded at another offset right away.
      if (plane + 1 < end) copy(c.source + (plane + 1) * count, count, buffer_of(plane + 1));
      T weight[9];
      for (int64_t t = 0; t < 9; ++t) weight[t] = c.weight[plane % c.C * 9 + (turned ? 8 - t : t)];
      const Vec<T> start = broadcast(c.epilogue.bias == nullptr ? T(0) : c.epilogue.bias[plane % c.C]);
      const T* const source = buffer_of(plane) - W - 1;
      T* const output = c.output + plane * count;
      const bool relu = c.epilogue.relu;
      const auto compute = [=, &weight](int64_t i, auto vectors) __attribute__((always_inline)) {
        constexpr int64_t n = vectors;
        Vec<T> sum[n];
        unrolled<n>([&](auto v) __attribute__((always_inline)) { sum[v] = start; });
        unrolled<3>([&](auto s) __attribute__((always_inline)) {
          Vec<T> column[n] = {};
          unrolled<3>([&](auto r) __attribute__((always_inline)) {
            const T* const from = source + i + r * W + s;
            const Vec<T> factor = broadcast(weight[r * 3 + s]);
            unrolled<n>([&](auto v) __attribute__((always_inline)) { column[v] += factor * load(from + v * L); });
          });
          const I* const here = inside + s * count + i;
          unrolled<n>([&](auto v) __attribute__((always_inline)) {
            sum[v] += s == 1 ? column[v] : (Vec<T>)((Vec<I>)column[v] & load(here + v * L));
          });
        });
        unrolled<n>([&](auto v)
                        __attribute__((always_inline)) { store(output + i + v * L, relu ? rectified<T>(sum[v]) : sum[v]); });
      };
      int64_t i = 0;
      for (; i + at_once * L <= count; i += at_once * L) compute(i, std::integral_constant<int64_t, at_once>{});
      for (; i < count; i += L) compute(std::min(i, count - L), std::integral_constant<int64_t, 1>{});
    }
  });
}

}  // namespace torchcnn::TORCHCNN_ISA::depthwise::flat
