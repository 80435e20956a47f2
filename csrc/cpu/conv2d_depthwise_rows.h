// Depthwise convolution of NCHW tensors by 3x3 filters with padding 1 and stride 1 or 2, the layers of mobile networks, and
// grad_input of 5x5 filters with padding 2 and stride 2: rows are read where they lie, and vectors run along them. Such a layer
// waits for memory, so that a block of output rows walks along the rows beside each other, each input is loaded for all rows of
// the block, and what comes next is prefetched.
//
//   forward     output[i][j] = sum_{r,s} weight[r][s] input[stride i - 1 + r][stride j - 1 + s]
//   grad_input  stride 1: the same of grad_output, with the filter turned by 180 degrees
//               stride 2: grad_input[2 i + a][2 j + b] = sum_{r,s} weight[r][s] grad_output[i + d][j + e]
//                         for the r with a + pad - r = 2 d, the s with b + pad - s = 2 e
//   grad_weight[r][s] = sum_{n,i,j} grad_output[i][j] input[stride i - 1 + r][stride j - 1 + s]
//
// Outside the image there are zeros: a row of them above and below, lanes left and right. In forward and grad_input they do no
// harm if the weights are finite, which the caller sees to; in grad_weight a sum that is not finite is made again without them.
// Every element is summed in an order that its place does not change.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../geometry.h"
#include "conv2d_depthwise_axes.h"
#include "conv2d_depthwise_nchw.h"
#include "conv2d_depthwise_transpose.h"
#include "conv2d_grad_bias.h"
#include "runtime.h"
#include "simd.h"

namespace torchcnn::TORCHCNN_ISA::depthwise::rows {

template <class T>
bool applies(const Conv2dGeometry& g, int64_t size = 3) {
  return g.layout == Layout::nchw && g.K == g.C && g.R == size && g.S == size && g.pad_h == size / 2 && g.pad_w == size / 2 &&
         g.dilation_h == 1 && g.dilation_w == 1 && g.stride_h == g.stride_w && g.stride_h <= 2 && 4 * g.Q >= 3 * kLanes<T>;
}

// 5x5 filters too, where rows have more than a vector and leave no more than a quarter of their lanes empty.
template <class T>
bool applies_to_grad_input(const Conv2dGeometry& g) {
  const bool full = g.Q > kLanes<T> && 4 * g.Q >= 3 * ceil_div(g.Q, kLanes<T>) * kLanes<T>;
  return applies<T>(g) || (applies<T>(g, 5) && g.stride_h == 2 && full);
}

// Output rows of a block, of 9 weights or sums, as many vectors and 3 more of the registers there are.
inline constexpr int64_t correlate_rows = 4, dot_rows = TORCHCNN_VECTOR_REGISTERS >= 32 ? 4 : 2;

// What is used a few hundred cycles later, to L2, which waits for more lines at once than L1. Planes follow each other in memory,
// so that this may be the next one. Rows of a few lines are a stream that the processor sees through itself; forward and
// grad_input leave them to it.
template <class T>
[[gnu::always_inline]] inline void prefetch(const T* at) {
  __builtin_prefetch(at + 8192 / sizeof(T), 0, 2);
}
template <class T>
bool prefetched_rows(int64_t width) {
  return width * int64_t(sizeof(T)) > 256;
}
// A tile's share of `rows` rows of input, in the order of memory: `rows` times what the tile at input column x has of a row.
template <int64_t rows, int64_t stride, class T>
[[gnu::always_inline]] inline void prefetch_share(const T* from, int64_t x) {
  constexpr int64_t line = std::max<int64_t>(1, 64 / TORCHCNN_VECTOR_BYTES) * kLanes<T>;
  unrolled<std::max<int64_t>(1, rows * stride * kLanes<T> / line)>(
      [&](auto i) __attribute__((always_inline)) { prefetch(from + x * rows + i * line); });
}

// before[last lane], v[0], v[1], ...
template <class T>
[[gnu::always_inline]] inline Vec<T> shifted_right(Vec<T> before, Vec<T> v) {
  return shuffled<T>(before, v, [](int64_t lane) { return lane + kLanes<T> - 1; }, kEachLane<T>);
}
// v[1], v[2], ..., after[0]
template <class T>
[[gnu::always_inline]] inline Vec<T> shifted_left(Vec<T> v, Vec<T> after) {
  return shuffled<T>(v, after, [](int64_t lane) { return lane + 1; }, kEachLane<T>);
}

template <class T, bool partial>
[[gnu::always_inline]] inline Vec<T> load_some(const T* from, int64_t count) {
  return partial ? load_partial(from, std::max<int64_t>(0, count)) : load(from);
}

// What filter columns 0, 1, 2 read for a vector of outputs: at[stride lane - 1 + column]. first, last: the vector is the first or
// the last of its row, of which `rest` elements are left.
template <class T, int64_t stride, bool first, bool last>
[[gnu::always_inline]] inline void load_columns(const T* at, int64_t rest, Vec<T> (&column)[3]) {
  if constexpr (stride == 1) {
    column[1] = load_some<T, last>(at, rest);
    column[0] = first ? shifted_right<T>(Vec<T>{}, column[1]) : load_some<T, last>(at - 1, rest + 1);
    column[2] = last ? shifted_left<T>(column[1], Vec<T>{}) : load(at + 1);
  } else {
    const Vec<T> low = load_some<T, last>(at, rest), high = load_some<T, last>(at + kLanes<T>, rest - kLanes<T>);
    column[1] = every_second<T>(low, high, 0, kEachLane<T>);
    column[2] = every_second<T>(low, high, 1, kEachLane<T>);
    column[0] = shifted_right<T>(first ? Vec<T>{} : broadcast(at[-1]), column[2]);
  }
}

// tile(j, vectors, first, last) for a row of Q outputs, in tiles of `vectors` vectors; the last may have fewer.
template <class T, int64_t vectors, class Tile>
[[gnu::always_inline]] inline void for_tiles(int64_t Q, const Tile& tile) {
  static_assert(vectors == 1 || vectors == 2);
  constexpr int64_t size = vectors * kLanes<T>;
  const std::integral_constant<int64_t, vectors> all;
  const std::true_type yes;
  const std::false_type no;
  const auto end = [&](int64_t j, auto first) __attribute__((always_inline)) {
    if constexpr (vectors == 2)
      if (Q - j <= kLanes<T>) return tile(j, std::integral_constant<int64_t, 1>{}, first, yes);
    tile(j, all, first, yes);
  };
  if (Q <= size) return end(0, yes);
  tile(0, all, yes, no);
  int64_t j = size;
  for (; j + size < Q; j += size) tile(j, all, no, no);
  end(j, no);
}

// block(first row, number of rows) for blocks of at most `rows` rows.
template <int64_t rows, class Block>
[[gnu::always_inline]] inline void for_blocks(int64_t begin, int64_t end, const Block& block) {
  for (; begin + rows <= end; begin += rows) block(begin, std::integral_constant<int64_t, rows>{});
  if constexpr (rows > 1) for_blocks<rows / 2>(begin, end, block);
}

// run(plane, first row, end): whole planes, or strips of rows where there are few of them. Strips begin at multiples of 4.
template <class Run>
void for_strips(int64_t planes, int64_t rows, int64_t row_cost, const Run& run) {
  const int64_t wanted = 4 * thread_count();
  const int64_t strip = planes >= wanted ? rows : ceil_div(ceil_div(rows * planes, wanted), 4) * 4;
  const int64_t strips = ceil_div(rows, strip);
  parallel_for(planes * strips, strip * row_cost, [&](int64_t task) {
    const int64_t row = task % strips * strip;
    run(task / strips, row, std::min(rows, row + strip));
  });
}

// The rows h, h + 1, ... of a plane, zeros where it has none.
template <class T>
struct Plane {
  const T* data;
  int64_t height, width;
  const T* zeros;

  template <int64_t count>
  [[gnu::always_inline]] void get(int64_t h, const T* (&row)[count]) const {
    unrolled<count>(
        [&](auto d) __attribute__((always_inline)) { row[d] = h + d < 0 || h + d >= height ? zeros : data + (h + d) * width; });
  }
};

template <class T>
const T* row_of_zeros(int64_t width) {
  T* zeros = workspace<T>(Slot::patches, width + kLanes<T>);
  for (int64_t x = 0; x < width; x += kLanes<T>) store(zeros + x, Vec<T>{});
  return zeros;
}

// Forward, and grad_input of stride 1. The last vector of a row begins in the one before, if there is one, and computes some
// outputs again: whole loads and stores cost less than partial ones. one_vector: no row of outputs has a second.
template <class T, int64_t stride, bool one_vector>
void correlate(const Correlation<T>& c, bool turned) {
  const int64_t all_rows = c.axes.h.output_size, row_cost = 9 * ceil_div(c.axes.w.output_size, kLanes<T>);
  for_strips(c.N * c.C, all_rows, row_cost, [&](int64_t plane, int64_t row_begin, int64_t row_end) {
    // Here and not outside, where every store to memory might change them.
    const int64_t H = c.axes.h.source_size, W = c.axes.w.source_size, P = c.axes.h.output_size, Q = c.axes.w.output_size;
    if (one_vector != (Q <= kLanes<T>)) __builtin_unreachable();
    const Plane<T> source{c.source + plane * H * W, H, W, row_of_zeros<T>(W)};
    const T* const filter = c.weight + plane % c.C * 9;
    const Vec<T> start = broadcast(c.epilogue.bias == nullptr ? T(0) : c.epilogue.bias[plane % c.C]);
    const bool relu = c.epilogue.relu, ahead = prefetched_rows<T>(W);
    T* const output = c.output + plane * P * Q;
    Vec<T> weight[9];
    unrolled<9>([&](auto t) __attribute__((always_inline)) { weight[t] = broadcast(filter[turned ? 8 - t : int64_t(t)]); });
    for_blocks<correlate_rows>(row_begin, row_end, [&](int64_t i, auto rows) __attribute__((always_inline)) {
      constexpr int64_t count = rows, input_rows = (count - 1) * stride + 3;
      const T* from[input_rows];
      source.template get<input_rows>(i * stride - 1, from);
      for_tiles<T, 1>(Q, [&](int64_t at, auto, auto first, auto last) __attribute__((always_inline)) {
        const int64_t j = last && !first ? Q - kLanes<T> : at;
        if (ahead) prefetch_share<count * stride, stride>(source.data + i * stride * W, j * stride);
        Vec<T> sum[count];
        unrolled<count>([&](auto v) __attribute__((always_inline)) { sum[v] = start; });
        unrolled<input_rows>([&](auto d) __attribute__((always_inline)) {
          Vec<T> column[3];
          load_columns<T, stride, first, last>(from[d] + j * stride, W - j * stride, column);
          unrolled<3>([&](auto s) __attribute__((always_inline)) {
            unrolled<count>([&](auto v) __attribute__((always_inline)) {
              constexpr int64_t r = d - v * stride;
              if constexpr (r >= 0 && r < 3) sum[v] += weight[r * 3 + s] * column[s];
            });
          });
        });
        unrolled<count>([&](auto v) __attribute__((always_inline)) {
          T* const to = output + (i + v) * Q + j;
          if (ahead) prefetch(to);
          if (relu) sum[v] = rectified<T>(sum[v]);
          one_vector ? store_partial(to, sum[v], Q) : store(to, sum[v]);
        });
      });
    });
  });
}

template <class T, int64_t stride>
void correlate(const Correlation<T>& c, bool turned) {
  c.axes.w.output_size <= kLanes<T> ? correlate<T, stride, true>(c, turned) : correlate<T, stride, false>(c, turned);
}

// grad_input of stride 2: the four elements (2 i + a, 2 j + b) together, which read the same of grad_output. Tiles are two
// vectors where weights have to be read from memory.
template <class T, int64_t R>
void grad_input_stride2(const Correlation<T>& c) {
  constexpr int64_t lanes = kLanes<T>, pad = R / 2, low = -(R / 4), offsets = 2 - low, vectors = R == 3 ? 1 : 2;
  const int64_t all_rows = c.axes.h.source_size, row_cost = (R * R + 3) * ceil_div(c.axes.w.source_size, lanes);
  for_strips(c.N * c.C, all_rows, row_cost, [&](int64_t plane, int64_t row_begin, int64_t row_end) {
    const int64_t P = c.axes.h.source_size, Q = c.axes.w.source_size, H = c.axes.h.output_size, W = c.axes.w.output_size;
    const Plane<T> source{c.source + plane * P * Q, P, Q, row_of_zeros<T>(Q)};
    const T* const filter = c.weight + plane % c.C * R * R;
    T* const output = c.output + plane * H * W;
    const bool ahead = prefetched_rows<T>(W);
    Vec<T> weight[R * R];
    unrolled<R * R>([&](auto t) __attribute__((always_inline)) { weight[t] = broadcast(filter[t]); });
    for (int64_t i = row_begin; i < row_end; ++i) {
      const T* from[offsets];
      source.template get<offsets>(i + low, from);
      for_tiles<T, vectors>(Q, [&](int64_t j, auto tile, auto first, auto last) __attribute__((always_inline)) {
        constexpr int64_t count = tile;
        if (ahead) prefetch(from[-low] + j);
        Vec<T> sum[2][2][count] = {};
        unrolled<offsets>([&](auto d) __attribute__((always_inline)) {
          Vec<T> column[offsets][count];
          unrolled<count>([&](auto v) __attribute__((always_inline)) {
            constexpr bool first_of_row = first && v == 0, last_of_row = last && v == count - 1;
            const T* const at = from[d] + j + v * lanes;
            const int64_t rest = Q - j - v * lanes;
            const Vec<T> here = load_some<T, last_of_row>(at, rest);
            if constexpr (low < 0)
              column[0][v] = first_of_row ? shifted_right<T>(Vec<T>{}, here) : load_some<T, last_of_row>(at - 1, rest + 1);
            column[-low][v] = here;
            column[1 - low][v] = last_of_row ? shifted_left<T>(here, Vec<T>{}) : load(at + 1);
          });
          unrolled<offsets>([&](auto e) __attribute__((always_inline)) {
            unrolled<4>([&](auto phase) __attribute__((always_inline)) {
              constexpr int64_t a = phase / 2, b = phase % 2, r = a + pad - 2 * (d + low), s = b + pad - 2 * (e + low);
              if constexpr (r >= 0 && r < R && s >= 0 && s < R)
                unrolled<count>([&](auto v) __attribute__((always_inline)) { sum[a][b][v] += weight[r * R + s] * column[e][v]; });
            });
          });
          if (R > 3) unrolled<4 * count>([&](auto v) __attribute__((always_inline)) { settle(sum[v / 2 % 2][v % 2][v / 4]); });
        });
        unrolled<2>([&](auto a) __attribute__((always_inline)) {
          if (2 * i + a == H) return;
          unrolled<2 * count>([&](auto half) __attribute__((always_inline)) {
            const int64_t w = 2 * j + half * lanes;
            T* const to = output + (2 * i + a) * W + w;
            const Vec<T> pairs = interleave<T>(sum[a][0][half / 2], sum[a][1][half / 2], half % 2, kEachLane<T>);
            if (ahead) prefetch(to);
            constexpr bool partial = last && half / 2 == count - 1;
            partial ? store_partial(to, pairs, std::max<int64_t>(0, W - w)) : store(to, pairs);
          });
        });
      });
    }
  });
}

// A task is a channel. Lanes and strips of rows are summed on their own first, which keeps rounding errors small; what strips
// give to the bias is added in double.
template <class T, int64_t stride, bool one_vector>
void grad_weight_with(const Conv2dGeometry& g, const T* grad_output, const T* input, T* grad_weight, T* grad_bias) {
  constexpr int64_t most_vectors = 128;  // of a strip
  const int64_t strip = std::clamp<int64_t>(most_vectors / ceil_div(g.Q, kLanes<T>) / dot_rows, 1, 8) * dot_rows;
  const Axes axes = forward_axes(g);
  parallel_for(g.C, g.N * g.P * ceil_div(g.Q, kLanes<T>) * 9, [&](int64_t k) {
    const int64_t H = g.H, W = g.W, P = g.P, Q = g.Q;
    if (one_vector != (Q <= kLanes<T>)) __builtin_unreachable();
    const T* const zeros = row_of_zeros<T>(W);
    const bool has_bias = grad_bias != nullptr;
    Vec<T> total[9] = {};
    double bias[kLanes<T>] = {};
    for (int64_t n = 0; n < g.N; ++n) {
      const Plane<T> source{input + (n * g.C + k) * H * W, H, W, zeros};
      const T* const gradients = grad_output + (n * g.C + k) * P * Q;
      for (int64_t begin = 0; begin < P; begin += strip) {
        Vec<T> sum[9] = {}, bias_sum = {};
        for_blocks<dot_rows>(begin, std::min(P, begin + strip), [&](int64_t i, auto rows) __attribute__((always_inline)) {
          constexpr int64_t count = rows, input_rows = (count - 1) * stride + 3;
          const T* from[input_rows];
          source.template get<input_rows>(i * stride - 1, from);
          for_tiles<T, 1>(Q, [&](int64_t j, auto, auto first, auto last) __attribute__((always_inline)) {
            Vec<T> gradient[count];
            prefetch_share<count * stride, stride>(source.data + i * stride * W, j * stride);
            unrolled<count>([&](auto v) __attribute__((always_inline)) {
              const T* const at = gradients + (i + v) * Q + j;
              prefetch(at);
              gradient[v] = load_some<T, last>(at, Q - j);
              if (has_bias) bias_sum += gradient[v];
            });
            unrolled<input_rows>([&](auto d) __attribute__((always_inline)) {
              Vec<T> column[3];
              load_columns<T, stride, first, last>(from[d] + j * stride, W - j * stride, column);
              unrolled<count>([&](auto v) __attribute__((always_inline)) {
                constexpr int64_t r = d - v * stride;
                if constexpr (r >= 0 && r < 3)
                  unrolled<3>([&](auto s) __attribute__((always_inline)) { sum[r * 3 + s] += gradient[v] * column[s]; });
              });
            });
          });
        });
        unrolled<9>([&](auto t) __attribute__((always_inline)) { total[t] += sum[t]; });
        add_in_double<T>(bias_sum, bias);
      }
    }
    if (has_bias) grad_bias[k] = static_cast<T>(sum_of_lanes<T>(bias));
    T* const to = grad_weight + k * 9;
    unrolled<9>([&](auto t) __attribute__((always_inline)) { to[t] = horizontal_sum<T>(total[t]); });
    if (all_finite(to, 9)) return;
    for (int64_t t = 0; t < 9; ++t) to[t] = nchw::grad_weight_element(g, axes, grad_output, input, k, t / 3, t % 3);
  });
}

template <class T, int64_t stride>
void grad_weight_with(const Conv2dGeometry& g, const T* grad_output, const T* input, T* grad_weight, T* grad_bias) {
  g.Q <= kLanes<T> ? grad_weight_with<T, stride, true>(g, grad_output, input, grad_weight, grad_bias)
                   : grad_weight_with<T, stride, false>(g, grad_output, input, grad_weight, grad_bias);
}

template <class T>
void conv2d_forward(const Correlation<T>& c, int64_t stride) {
  stride == 1 ? correlate<T, 1>(c, false) : correlate<T, 2>(c, false);
}

template <class T>
void conv2d_grad_input(const Correlation<T>& c, int64_t stride) {
  stride == 1 ? correlate<T, 1>(c, true) : c.R == 3 ? grad_input_stride2<T, 3>(c) : grad_input_stride2<T, 5>(c);
}

template <class T>
void conv2d_grad_weight(const Conv2dGeometry& g, const T* grad_output, const T* input, T* grad_weight, T* grad_bias) {
  g.stride_h == 1 ? grad_weight_with<T, 1>(g, grad_output, input, grad_weight, grad_bias)
                  : grad_weight_with<T, 2>(g, grad_output, input, grad_weight, grad_bias);
}

}  // namespace torchcnn::TORCHCNN_ISA::depthwise::rows
