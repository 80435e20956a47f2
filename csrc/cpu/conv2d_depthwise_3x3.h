// Depthwise convolution of NCHW tensors by 3x3 filters with padding 1 and stride 1 or 2, the layers of mobile networks. They wait
// for memory and for whatever is done besides multiplying, so rows are read where they lie: vectors run along a row, and lanes
// that reach over its ends, into the row before or after, are masked to zero. Rows above and below the image are a row of zeros;
// rows at the ends of the whole tensor, which a vector could leave, are copied first.
//
//   forward     output[i][j] = sum_{r,s} weight[r][s] input[stride i - 1 + r][stride j - 1 + s]
//   grad_input  stride 1: the same of grad_output, with the filter turned by 180 degrees. Stride 2, with a, b = grad_output[i][j],
//               [i][j + 1] and c, d below them and w = weight: grad_input[2 i + (0, 1)][2 j + (0, 1)] =
//                 w11 a            w10 b + w12 a
//                 w01 c + w21 a    w00 d + w02 c + w20 b + w22 a
//
// Stride 2 reads 16-byte pieces of two vectors in turn, which costs one instruction, and puts lanes in order at the end:
//
//   every second element of  0 1 2 3 4 5 6 7 | 8 9 a b c d e f   is   0 2 8 a 4 6 c e
#pragma once

#include <algorithm>
#include <cstdint>

#include "../geometry.h"
#include "conv2d_depthwise_axes.h"
#include "conv2d_depthwise_nchw.h"
#include "runtime.h"
#include "simd.h"

namespace torchcnn::TORCHCNN_ISA::depthwise::filter3x3 {

inline bool applies(const Conv2dGeometry& g) {
  return g.R == 3 && g.S == 3 && g.pad_h == 1 && g.pad_w == 1 && g.dilation_h == 1 && g.dilation_w == 1 &&
         g.stride_h == g.stride_w && g.stride_h <= 2;
}

// Output rows in a register tile of one vector: 9 weights + 4 accumulators + 2 of 16 registers.
template <int64_t stride>
inline constexpr int64_t tile_rows = stride == 1 ? 4 : 2;

// What will be needed a microsecond later: planes follow each other in memory, so this may be the next one.
template <class T>
inline void prefetch(const T* from, int64_t count, bool to_write) {
  constexpr int64_t distance = 2048, cache_line = 64;
  const char* at = reinterpret_cast<const char*>(from) + distance;
  for (int64_t byte = 0; byte < count * int64_t(sizeof(T)); byte += cache_line)
    to_write ? __builtin_prefetch(at + byte, 1) : __builtin_prefetch(at + byte, 0);
}

// Where lane l of pieces comes from in order, and the reverse.
template <class T>
constexpr int64_t order_of_piece(int64_t lane) {
  constexpr int64_t piece = 16 / sizeof(T), half = piece / 2;
  return lane / piece * half + lane % half + (lane % piece < half ? 0 : kLanes<T> / 2);
}
template <class T>
constexpr int64_t piece_of_order(int64_t j) {
  constexpr int64_t piece = 16 / sizeof(T), half = piece / 2, lanes = kLanes<T>;
  return j % (lanes / 2) / half * piece + j % half + (j < lanes / 2 ? 0 : half);
}

template <class T, size_t... lane>
inline Vec<T> from_pieces(Vec<T> v, std::index_sequence<lane...>) {
#if defined(__clang__)
  return __builtin_shufflevector(v, v, piece_of_order<T>(lane)...);
#else
  return __builtin_shuffle(v, Vec<IndexOf<T>>{IndexOf<T>(piece_of_order<T>(lane))...});
#endif
}

template <class T, size_t... lane>
inline Vec<T> to_pieces(Vec<T> v, std::index_sequence<lane...>) {
#if defined(__clang__)
  return __builtin_shufflevector(v, v, order_of_piece<T>(lane)...);
#else
  return __builtin_shuffle(v, Vec<IndexOf<T>>{IndexOf<T>(order_of_piece<T>(lane))...});
#endif
}

// Elements odd, odd + 2, ... of the 2 kLanes elements of a, b, in pieces.
template <class T, size_t... lane>
inline Vec<T> every_second_in_pieces(Vec<T> a, Vec<T> b, std::index_sequence<lane...>, int64_t odd) {
#if defined(__clang__)
  return odd ? __builtin_shufflevector(a, b, (2 * order_of_piece<T>(lane) + 1)...)
             : __builtin_shufflevector(a, b, (2 * order_of_piece<T>(lane))...);
#else
  using Mask = Vec<IndexOf<T>>;
  return odd ? __builtin_shuffle(a, b, Mask{IndexOf<T>(2 * order_of_piece<T>(lane) + 1)...})
             : __builtin_shuffle(a, b, Mask{IndexOf<T>(2 * order_of_piece<T>(lane))...});
#endif
}

template <class T>
using Mask = Vec<IndexOf<T>>;

template <class T>
inline Vec<T> masked(Vec<T> v, Mask<T> mask) {
  return reinterpret_cast<Vec<T>>(reinterpret_cast<Mask<T>>(v) & mask);
}

// Keeps the lanes of outputs begin ... end - 1 of a tile.
template <class T, int64_t stride>
inline Mask<T> lanes_between(int64_t begin, int64_t end) {
  Mask<T> mask{};
  for (int64_t lane = 0; lane < kLanes<T>; ++lane) {
    const int64_t j = stride == 1 ? lane : order_of_piece<T>(lane);
    mask[lane] = j >= begin && j < end ? -1 : 0;
  }
  return mask;
}

// The inputs of filter columns 0, 1, 2 for a vector of outputs, from the input column under the first of them.
template <class T, int64_t stride>
[[gnu::always_inline]] inline void load_columns(const T* from, Vec<T> (&column)[3]) {
  if constexpr (stride == 1) {
    unrolled<3>([&](auto s) __attribute__((always_inline)) { column[s] = load(from - 1 + s); });
  } else {
    constexpr int64_t lanes = kLanes<T>;
    const Vec<T> low = load(from), high = load(from + lanes);
    column[0] = every_second_in_pieces<T>(load(from - 1), load(from - 1 + lanes), kEachLane<T>, 0);
    column[1] = every_second_in_pieces<T>(low, high, kEachLane<T>, 0);
    column[2] = every_second_in_pieces<T>(low, high, kEachLane<T>, 1);
  }
}

// The rows of the planes of a tensor. A tile reads from one element before a row to `reach` elements after its start.
template <class T>
class Rows {
 public:
  Rows(const T* data, int64_t planes, int64_t height, int64_t width, int64_t reach)
      : begin_(data), end_(data + planes * height * width), height_(height), width_(width), reach_(reach) {
    pitch_ = std::max(reach, width) + 2 * kLanes<T>;
    zeros_ = workspace<T>(Slot::patches, (slots + 1) * pitch_);
    fill(zeros_, (slots + 1) * pitch_, T(0));
  }

  // The first `count` rows from h on. In a copy, what lies past the row's end is zeros.
  template <size_t count>
  [[gnu::always_inline]] void get(const T* plane, int64_t h, const T* (&row)[count]) const {
    static_assert(count <= slots);
    unrolled<count>([&](auto d) __attribute__((always_inline)) {
      const T* at = plane + (h + d) * width_;
      if (h + d < 0 || h + d >= height_)
        at = zeros_ + kLanes<T>;
      else if (at == begin_ || end_ - at < reach_)
        at = copied(at, d);
      row[d] = at;
    });
  }

 private:
  static constexpr int64_t slots = tile_rows<1> + 2;

  [[gnu::noinline]] const T* copied(const T* row, int64_t slot) const {
    T* copy = zeros_ + (slot + 1) * pitch_ + kLanes<T>;
    for (int64_t w = 0; w < width_; ++w) copy[w] = row[w];
    return copy;
  }

  const T *begin_, *end_;
  int64_t height_, width_, reach_, pitch_;
  T* zeros_;
};

// The vectors of a row of `width` outputs: the last overlaps the one before it, and the edges are masked.
template <class T, int64_t stride>
struct Columns {
  static constexpr int64_t lanes = kLanes<T>;
  int64_t width, last, reach;
  Mask<T> all, not_first, not_last;

  Columns(int64_t width_, int64_t input_width)
      : width(width_),
        last(std::max<int64_t>(0, width_ - lanes)),
        reach((last + lanes) * stride + 1),
        all(lanes_between<T, stride>(0, lanes)),
        not_first(lanes_between<T, stride>(1, lanes)),
        not_last(lanes_between<T, stride>(0, (input_width + stride - 2) / stride - last)) {}

  // tile(j, masks of filter columns 0 and 2, is an edge)
  template <class Tile>
  [[gnu::always_inline]] void each(const Tile& tile) const {
    const auto edge = std::true_type{};
    if (last == 0) return tile(0, not_first, not_last, edge);
    tile(0, not_first, all, edge);
    for (int64_t j = lanes; j < last; j += lanes) tile(j, all, all, std::false_type{});
    tile(last, all, not_last, edge);
  }
};

// Splits planes into strips of rows where there are few of them, else takes several at a time.
// run(first plane, end, first row, end).
template <class Run>
void for_strips(int64_t planes, int64_t rows, int64_t row_size, int64_t filter_cost, int64_t multiple, const Run& run) {
  const int64_t wanted = 4 * thread_count();
  const int64_t strip = planes >= wanted ? rows : ceil_div(ceil_div(rows * planes, wanted), multiple) * multiple;
  const int64_t strips = ceil_div(rows, strip), group = strips > 1 ? 1 : nchw::planes_per_task(planes, rows * row_size);
  parallel_for(ceil_div(planes, group) * strips, group * strip * row_size * filter_cost, [&](int64_t task) {
    const int64_t plane = task / strips * group, row = task % strips * strip;
    run(plane, std::min(planes, plane + group), row, std::min(rows, row + strip));
  });
}

// block(row, number of rows as an array) for tiles of at most `rows` rows.
template <size_t rows, class Block>
[[gnu::always_inline]] inline void for_blocks(int64_t begin, int64_t end, const Block& block) {
  for (; begin + int64_t(rows) <= end; begin += rows) block(begin, std::integral_constant<size_t, rows>{});
  if constexpr (rows > 1) for_blocks<rows / 2>(begin, end, block);
}

// Forward, and grad_input of stride 1.
template <class T, int64_t stride>
void correlate(const Correlation<T>& c, bool turned) {
  const int64_t H = c.axes.h.source_size, W = c.axes.w.source_size, P = c.axes.h.output_size, Q = c.axes.w.output_size;
  const int64_t M = c.outputs, planes = c.N * c.C * M;
  for_strips(planes, P, Q, 9 / kLanes<T> + 1, 4, [&](int64_t plane_begin, int64_t plane_end, int64_t row_begin, int64_t row_end) {
    const Columns<T, stride> columns(Q, W);
    const Rows<T> rows(c.source, c.N * c.C, H, W, columns.reach);
    const bool relu = c.epilogue.relu;
    for (int64_t plane = plane_begin; plane < plane_end; ++plane) {
      const int64_t k = plane % (c.C * M);
      const T start = c.epilogue.bias == nullptr ? T(0) : c.epilogue.bias[k];
      const T *source = c.source + plane / M * H * W, *filter = c.weight + k * 9;
      T* const output = c.output + plane * P * Q;
      if (!nchw::all_finite(filter, 9)) {
        nchw::correlate_strip_clipped(c, source, filter, start, row_begin, row_end, output);
        continue;
      }
      Vec<T> weight[3][3];  // [column][row]
      unrolled<9>([&](auto t)
                      __attribute__((always_inline)) { weight[t % 3][t / 3] = broadcast(filter[turned ? 8 - t : int64_t(t)]); });
      for_blocks<tile_rows<stride>>(row_begin, row_end, [&](int64_t i, auto block_rows) __attribute__((always_inline)) {
        constexpr int64_t count = block_rows, input_rows = (count - 1) * stride + 3;
        prefetch(source + i * stride * W, count * stride * W, false);
        prefetch(output + i * Q, count * Q, true);
        const T* from[input_rows];
        rows.get(source, i * stride - 1, from);
        // In rows narrower than a vector, what one spills into the next row of the strip is overwritten by that.
        const int64_t stored = (i + count - 1) * Q + kLanes<T> <= row_end * Q ? kLanes<T> : std::min(Q, kLanes<T>);
        columns.each([&](int64_t j, Mask<T> left, Mask<T> right, auto edge) __attribute__((always_inline)) {
          Vec<T> sum[count];
          unrolled<count>([&](auto v) __attribute__((always_inline)) { sum[v] = broadcast(start); });
          unrolled<input_rows>([&](auto d) __attribute__((always_inline)) {
            Vec<T> input[3];
            load_columns<T, stride>(from[d] + j * stride, input);
            if constexpr (edge) input[0] = masked<T>(input[0], left), input[2] = masked<T>(input[2], right);
            unrolled<3>([&](auto s) __attribute__((always_inline)) { spread<d, stride>(input[s], weight[s], sum); });
          });
          unrolled<count>([&](auto v) __attribute__((always_inline)) {
            if (relu) sum[v] = rectified<T>(sum[v]);
            if constexpr (stride == 2) sum[v] = from_pieces<T>(sum[v], kEachLane<T>);
            T* to = output + (i + v) * Q + j;
            if (stored == kLanes<T>)
              store(to, sum[v]);
            else
              store_partial(to, sum[v], stored);
          });
        });
      });
    }
  });
}

// grad_input of stride 2, of one filter a channel.
template <class T>
void grad_input_stride2(const Correlation<T>& c) {
  constexpr int64_t lanes = kLanes<T>;
  const int64_t P = c.axes.h.source_size, Q = c.axes.w.source_size, H = c.axes.h.output_size, W = c.axes.w.output_size;
  for_strips(c.N * c.C, P, 4 * Q, 3, 4, [&](int64_t plane_begin, int64_t plane_end, int64_t row_begin, int64_t row_end) {
    const Columns<T, 1> columns(Q, Q);
    const Rows<T> rows(c.source, c.N * c.C, P, Q, columns.reach);
    for (int64_t plane = plane_begin; plane < plane_end; ++plane) {
      const T *source = c.source + plane * P * Q, *filter = c.weight + plane % c.C * 9;
      T* const output = c.output + plane * H * W;
      if (!nchw::all_finite(filter, 9)) {
        nchw::correlate_strip_clipped(c, source, filter, T(0), row_begin, row_end, output);
        continue;
      }
      Vec<T> w[9];
      unrolled<9>([&](auto t) __attribute__((always_inline)) { w[t] = broadcast(filter[t]); });
      for (int64_t i = row_begin; i < row_end; ++i) {
        prefetch(source + i * Q, Q, false);
        prefetch(output + 2 * i * W, 2 * W, true);
        const T* from[2];
        rows.get(source, i, from);
        T* const to = output + 2 * i * W;
        const auto store_pairs = [&](Vec<T> even, Vec<T> odd, T* row, int64_t j) __attribute__((always_inline)) {
          const Vec<T> low = interleave<T>(even, odd, 0, kEachLane<T>), high = interleave<T>(even, odd, 1, kEachLane<T>);
          const int64_t count = W - 2 * j;
          if (count >= 2 * lanes) {
            store(row + 2 * j, low), store(row + 2 * j + lanes, high);
          } else {
            store_partial(row + 2 * j, low, std::min(count, lanes));
            if (count > lanes) store_partial(row + 2 * j + lanes, high, count - lanes);
          }
        };
        const auto tile = [&](int64_t j, Mask<T> right, auto edge) __attribute__((always_inline)) {
          const Vec<T> a_ = load(from[0] + j), c_ = load(from[1] + j);
          Vec<T> b_ = load(from[0] + j + 1), d_ = load(from[1] + j + 1);
          if constexpr (edge) b_ = masked<T>(b_, right), d_ = masked<T>(d_, right);
          store_pairs(w[4] * a_, w[5] * a_ + w[3] * b_, to, j);
          if (2 * i + 1 < H) store_pairs(w[7] * a_ + w[1] * c_, w[8] * a_ + w[6] * b_ + w[2] * c_ + w[0] * d_, to + W, j);
        };
        for (int64_t j = 0; j < columns.last; j += lanes) tile(j, columns.all, std::false_type{});
        tile(columns.last, columns.not_last, std::true_type{});
      }
    }
  });
}

// A thread owns a channel: sums are vectors of partial sums over the rows of a strip, added up strip by strip.
template <class T, int64_t stride>
void grad_weight_with(const Conv2dGeometry& g, const Axes& axes, const T* grad_output, const T* input, T* grad_weight) {
  constexpr int64_t lanes = kLanes<T>, strip = 32;
  const int64_t M = g.K_per_group(), P = g.P, Q = g.Q;
  const int64_t group = nchw::planes_per_task(g.K, g.N * P * Q);
  parallel_for(ceil_div(g.K, group), group * g.N * P * Q * 9 / lanes, [&](int64_t task) {
    const Columns<T, stride> columns(Q, g.W);
    const Rows<T> inputs(input, g.N * g.C, g.H, g.W, columns.reach);
    const Mask<T> kept =
        lanes_between<T, 1>(columns.last == 0 ? 0 : ceil_div(Q, lanes) * lanes - Q, columns.last == 0 ? Q : lanes);
    const T* const gradients_end = grad_output + g.N * g.K * P * Q;
    for (int64_t k = task * group; k < std::min(g.K, (task + 1) * group); ++k) {
      Vec<T> total[9] = {};
      for (int64_t n = 0; n < g.N; ++n) {
        const T* source = input + (n * g.C + k / M) * g.H * g.W;
        const T* gradients = grad_output + (n * g.K + k) * P * Q;
        for (int64_t row_begin = 0; row_begin < P; row_begin += strip) {
          Vec<T> sum[3][3] = {};  // [column][row]
          for_blocks<tile_rows<stride>>(row_begin, std::min(P, row_begin + strip),
                                        [&](int64_t i, auto block_rows) __attribute__((always_inline)) {
            constexpr int64_t count = block_rows, input_rows = (count - 1) * stride + 3;
            prefetch(source + i * stride * g.W, count * stride * g.W, false);
            prefetch(gradients + i * Q, count * Q, false);
            const T* from[input_rows];
            inputs.get(source, i * stride - 1, from);
            columns.each([&](int64_t j, Mask<T> left, Mask<T> right, auto edge) __attribute__((always_inline)) {
              Vec<T> gradient[count];
              unrolled<count>([&](auto v) __attribute__((always_inline)) {
                const T* at = gradients + (i + v) * Q + j;
                gradient[v] = !edge || gradients_end - at >= lanes ? load(at) : load_partial(at, gradients_end - at);
                if constexpr (edge)
                  if (j == columns.last) gradient[v] = masked<T>(gradient[v], kept);
                if constexpr (stride == 2) gradient[v] = to_pieces<T>(gradient[v], kEachLane<T>);
              });
              unrolled<input_rows>([&](auto d) __attribute__((always_inline)) {
                Vec<T> x[3];
                load_columns<T, stride>(from[d] + j * stride, x);
                if constexpr (edge) x[0] = masked<T>(x[0], left), x[2] = masked<T>(x[2], right);
                unrolled<count>([&](auto v) __attribute__((always_inline)) {
                  constexpr int64_t r = d - v * stride;
                  if constexpr (r >= 0 && r < 3)
                    unrolled<3>([&](auto s) __attribute__((always_inline)) { sum[s][r] += gradient[v] * x[s]; });
                });
              });
            });
          });
          unrolled<9>([&](auto t) __attribute__((always_inline)) { total[t] += sum[t % 3][t / 3]; });
        }
      }
      unrolled<9>([&](auto t) __attribute__((always_inline)) { grad_weight[k * 9 + t] = horizontal_sum<T>(total[t]); });
      nchw::sum_again_unless_finite(g, axes, grad_output, input, k, grad_weight);
    }
  });
}

template <class T>
void conv2d_forward(const Correlation<T>& c, int64_t stride) {
  stride == 1 ? correlate<T, 1>(c, false) : correlate<T, 2>(c, false);
}

template <class T>
void conv2d_grad_input(const Correlation<T>& c, int64_t stride) {
  stride == 1 ? correlate<T, 1>(c, true) : grad_input_stride2(c);
}

template <class T>
void conv2d_grad_weight(const Conv2dGeometry& g, const T* grad_output, const T* input, T* grad_weight) {
  const Axes axes = forward_axes(g);
  g.stride_h == 1 ? grad_weight_with<T, 1>(g, axes, grad_output, input, grad_weight)
                  : grad_weight_with<T, 2>(g, axes, grad_output, input, grad_weight);
}

}  // namespace torchcnn::TORCHCNN_ISA::depthwise::filter3x3
