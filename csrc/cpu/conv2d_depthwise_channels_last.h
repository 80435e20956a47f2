// Depthwise convolution where vectors run along the channels: of channels_last tensors, and of NCHW tensors whose planes were put
// into that order (conv2d_depthwise_nchw.h). A register tile is a run of output pixels of a row, in grad_weight of one or two.
// Taps outside the image are left out: rows for a whole output row, columns for the tiles near an edge. Weights lie as
//
//   packed_weight[r S + s][channel]
//
// so that one load gives a tap's weights for a vector of channels. There are at least kLanes channels; the last vector overlaps
// the one before it.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../geometry.h"
#include "conv2d_depthwise_axes.h"
#include "conv2d_depthwise_transpose.h"
#include "conv2d_grad_bias.h"
#include "runtime.h"
#include "simd.h"

namespace torchcnn::TORCHCNN_ISA::depthwise::channels_last {

// Output pixels in a register tile: 8 accumulators, enough to hide the latency of a multiply-add, + at most 7 weights of a filter
// row + 1 of 16 registers.
inline constexpr int64_t tile_pixels = 8;
// Rows of 7, 14, 28, ... are cut into tiles of 7 where so few still hide the latency: vectors of 64 bytes take two cycles each.
// With 3 taps the sums wait for memory in any case.
inline constexpr int64_t tile_of_7 = TORCHCNN_VECTOR_BYTES == 64 ? 7 : tile_pixels;

// The vectors of `channels` channels.
template <class T>
struct Vectors {
  int64_t channels;
  int64_t count() const { return ceil_div(channels, kLanes<T>); }
  int64_t first_channel(int64_t v) const { return std::min(v * kLanes<T>, channels - kLanes<T>); }
};

// Vectors of channels that are worked on at a time: their weights (or sums of grad_weight) should take at most half of L1.
template <class T>
int64_t vectors_at_once(int64_t channels, int64_t filter) {
  constexpr int64_t cached = 16 * 1024 / TORCHCNN_VECTOR_BYTES;
  return std::min(Vectors<T>{channels}.count(), std::max<int64_t>(1, cached / filter));
}

// body<taps, step>() for consecutive columns that there is a kernel for, else body<0, 0>().
template <class Body>
void for_known_taps(const Axis& axis, const Phase& phase, const Body& body) {
  if (phase.offset_step == 1 && axis.step == 1) {
    switch (phase.count) {
      case 1: return body.template operator()<1, 1>();
      case 2: return body.template operator()<2, 1>();
      case 3: return body.template operator()<3, 1>();
      case 4: return body.template operator()<4, 1>();
      case 5: return body.template operator()<5, 1>();
      case 7: return body.template operator()<7, 1>();
    }
  }
  if (phase.offset_step == 1 && axis.step == 2) {
    switch (phase.count) {
      case 3: return body.template operator()<3, 2>();
      case 5: return body.template operator()<5, 2>();
      case 7: return body.template operator()<7, 2>();
    }
  }
  body.template operator()<0, 0>();
}

// How many elements ahead of use rows of large channels_last tensors are prefetched, whole pixels: to L2, which waits for more
// lines at once than L1, for reading and for writing. At stride 2, which reads four times what it writes, and for the sums of
// grad_weight, for reading alone.
inline constexpr int64_t correlate_ahead = 12 << 10, dot_ahead = 96 << 10;  // bytes
template <class T>
int64_t pixels_ahead(int64_t bytes, int64_t channels, int64_t elements) {
  return worth_asking_ahead(elements * int64_t(sizeof(T))) ? ceil_div(bytes, channels * int64_t(sizeof(T))) * channels : 0;
}

// An image in the order of this file, or a part of it. Pointers are to row 0 and column 0, distances in elements.
template <class T>
struct Image {
  const T* source;
  T* output;
  const T* weight;  // packed
  const T* bias;    // or null
  int64_t channels, source_row, output_row, weight_pitch;
  int64_t ahead;  // elements, or 0: nothing is prefetched
  bool padded;    // the columns that taps reach outside the source, and those of a last tile, can be read, and are harmless
  bool accumulate, relu;
};

// Row positions `i` of phase fh, column positions `j` of phase fw and vectors v of channels. known_column: the number of
// channels, or 0 if that is known only when this runs.
template <class T, int64_t taps, int64_t step, int64_t known_column, int64_t pixels_of_tile>
[[gnu::noinline]] void correlate_tiles(const Axes& axes, int64_t S, const Image<T>& image, int64_t fh, int64_t fw,
                                       const Range& i_range, const Range& j_range, const Range& v_range) {
  constexpr int64_t columns = (pixels_of_tile - 1) * step + taps;
  const Axis &h = axes.h, &w = axes.w;
  const Phase phase_h = h.phase[fh], phase_w = w.phase[fw];
  const int64_t column = known_column > 0 ? known_column : image.channels, column_step = taps > 0 ? step : w.step;
  const int64_t output_column = w.phases * column, width = w.source_size;
  const int64_t source_tap = phase_h.offset_step * image.source_row;
  const int64_t weight_row = phase_h.index_step * S * image.weight_pitch, weight_column = phase_w.index_step * image.weight_pitch;
  const T* const bias = image.bias;
  const bool accumulate = image.accumulate, relu = image.relu, padded = image.padded;
  const Vectors<T> vectors{image.channels};
  const int64_t ahead = image.ahead;

  for (int64_t i = i_range.begin; i < i_range.end; ++i) {
    const Range range = taps_inside(h, phase_h, i);
    const T* const source = image.source + (i * h.step + phase_h.offset + range.begin * phase_h.offset_step) * image.source_row +
                            phase_w.offset * column;
    const T* const weights =
        image.weight + ((phase_h.index + range.begin * phase_h.index_step) * S + phase_w.index) * image.weight_pitch;
    T* const outputs = image.output + (i * h.phases + fh) * image.output_row + fw * column;
    for (int64_t j = j_range.begin; j < j_range.end; j += pixels_of_tile) {
      const int64_t first = j * column_step + phase_w.offset, count = std::min(pixels_of_tile, j_range.end - j);
      const int64_t begin = std::max<int64_t>(0, -first), end = std::min(columns, width - first);
      // Strides above 1 read several new rows at once: where one of them ends, the one below it has been read as well.
      const bool in_row = step == 1 || j * column_step * column + ahead < image.source_row;
      const int64_t read_ahead = in_row ? ahead : ahead + (h.step - 1) * image.source_row;
      const auto tile = [&](int64_t c, auto clipped) __attribute__((always_inline)) {
        T* const output = outputs + j * output_column + c;
        Vec<T> sum[pixels_of_tile];
        const Vec<T> start = bias == nullptr ? Vec<T>{} : load(bias + c);
        unrolled<pixels_of_tile>([&](auto v) __attribute__((always_inline)) { sum[v] = start; });
        if (accumulate)
          unrolled<pixels_of_tile>([&](auto v) __attribute__((always_inline)) {
            if (v < count) sum[v] = load(output + v * output_column);
          });
        const T* from = source + j * column_step * column + c;
        const T* weight = weights + c;
        for (int64_t a = range.begin; a < range.end; ++a, from += source_tap, weight += weight_row) {
          if constexpr (taps > 0) {
            Vec<T> tap[taps];
            const T* at = weight;
            unrolled<taps>([&](auto s) __attribute__((always_inline)) { tap[s] = load(at), advance(at, weight_column); });
            at = from;
            if (known_column == 0 && ahead > 0 && a + h.step >= range.end)
              unrolled<pixels_of_tile * step>(
                  [&](auto d) __attribute__((always_inline)) { __builtin_prefetch(at + d * column + read_ahead, 0, 2); });
            unrolled<columns>([&](auto d) __attribute__((always_inline)) {
              if (!clipped || (d >= begin && d < end)) {
                const Vec<T> input = load_once(at);
                unrolled<pixels_of_tile>([&](auto v) __attribute__((always_inline)) {
                  constexpr int64_t s = d - v * step;
                  if constexpr (s >= 0 && s < taps) sum[v] += tap[s] * input;
                });
              }
              known_column > 0 ? void(at += column) : advance(at, column);
            });
          } else {
            for (int64_t b = 0; b < phase_w.count; ++b) {
              const Range valid =
                  padded ? Range{j, j + pixels_of_tile} : inside(w, phase_w, phase_w.offset + b * phase_w.offset_step);
              const T* at = from + b * phase_w.offset_step * column;
              const Vec<T> tap = load(weight + b * weight_column);
              const auto add = [&](auto v)
                                   __attribute__((always_inline)) { sum[v] += tap * load(at + v * column_step * column); };
              if (valid.begin <= j && j + pixels_of_tile <= valid.end)
                unrolled<pixels_of_tile>(add);
              else
                unrolled<pixels_of_tile>([&](auto v) __attribute__((always_inline)) {
                  if (j + v >= valid.begin && j + v < std::min(valid.end, j + count)) add(v);
                });
            }
          }
        }
        unrolled<pixels_of_tile>([&](auto v) __attribute__((always_inline)) {
          if (v < count) {
            store(output + v * output_column, relu ? rectified<T>(sum[v]) : sum[v]);
            if (known_column == 0 && step != 2 && ahead > 0) __builtin_prefetch(output + v * output_column + ahead, 1, 2);
          }
        });
      };
      const bool whole = taps > 0 && (padded || (begin == 0 && end == columns && count == pixels_of_tile));
      if constexpr (known_column == kLanes<T>) {
        whole ? tile(0, std::false_type{}) : tile(0, std::true_type{});
      } else if (whole) {
        for (int64_t v = v_range.begin; v < v_range.end; ++v) tile(vectors.first_channel(v), std::false_type{});
      } else {
        for (int64_t v = v_range.begin; v < v_range.end; ++v) tile(vectors.first_channel(v), std::true_type{});
      }
    }
  }
}

template <class T, int64_t taps, int64_t step, int64_t known_column>
void correlate_rows(const Axes& axes, int64_t S, const Image<T>& image, int64_t fh, int64_t fw, const Range& i_range,
                    const Range& j_range, const Range& v_range) {
  constexpr int64_t seven = taps == 5 || taps == 7 ? tile_of_7 : tile_pixels;
  if constexpr (seven != tile_pixels) {
    if ((j_range.end - j_range.begin) % seven == 0)
      return correlate_tiles<T, taps, step, known_column, seven>(axes, S, image, fh, fw, i_range, j_range, v_range);
  }
  correlate_tiles<T, taps, step, known_column, tile_pixels>(axes, S, image, fh, fw, i_range, j_range, v_range);
}

// to[t][x] = from[x / repeated mod channels][t] for x < pitch, `from` with filters channel_stride apart.
template <class T>
void pack_filters(const T* from, int64_t channels, int64_t repeated, int64_t channel_stride, int64_t filter, int64_t pitch,
                  T* to) {
  constexpr int64_t lanes = kLanes<T>;
  const int64_t blocks = repeated == 1 ? channels / lanes : 0;
  parallel_for(blocks, lanes * filter, [&](int64_t task) {
    const int64_t x = task * lanes;
    pack_planes<T>({from + x * channel_stride, channel_stride, lanes}, filter, [&](int64_t t) { return to + t * pitch + x; });
  });
  for (int64_t x = blocks * lanes; x < pitch; ++x)
    for (int64_t t = 0; t < filter; ++t) to[t * pitch + x] = from[x / repeated % channels * channel_stride + t];
}

template <class T>
void correlate(const Correlation<T>& c) {
  const Axis &h = c.axes.h, &w = c.axes.w;
  const int64_t C = c.C, filter = c.R * c.S, chunk = vectors_at_once<T>(C, filter), vectors = Vectors<T>{C}.count();
  T* packed_weight = workspace<T>(Slot::packed_weight, filter * C);
  pack_filters(c.weight, C, 1, filter, filter, C, packed_weight);
  const int64_t task_cost = w.output_size * vectors * filter / (h.phases * w.phases);
  const int64_t ahead =
      pixels_ahead<T>(correlate_ahead, C, c.N * C * (h.source_size * w.source_size + h.output_size * w.output_size));
  parallel_for(c.N * h.output_size, task_cost, [&](int64_t task) {
    const int64_t n = task / h.output_size, p = task % h.output_size, i = p / h.phases;
    const Image<T> image{c.source + n * h.source_size * w.source_size * C,
                         c.output + n * h.output_size * w.output_size * C,
                         packed_weight,
                         c.epilogue.bias,
                         C,
                         w.source_size * C,
                         w.output_size * C,
                         C,
                         ahead,
                         false,
                         false,
                         c.epilogue.relu};
    for (int64_t v = 0; v < vectors; v += chunk)
      for (int64_t f = 0; f < w.phases; ++f)
        for_known_taps(w, w.phase[f], [&]<int64_t taps, int64_t step>() {
          correlate_rows<T, taps, step, 0>(c.axes, c.S, image, p % h.phases, f, {i, i + 1}, {0, w.phase[f].positions},
                                           {v, std::min(v + chunk, vectors)});
        });
  });
}

// Pixels of grad_output in a register tile of grad_weight: 3 x 3 sums + 4 pixels + 1 of 16 registers. Where rows of windows are
// next to each other the tile has two: what it loads of the source then meets two rows of taps.
inline constexpr int64_t dot_pixels = 4;
template <int64_t rows>
inline constexpr int64_t dot_columns = rows == 1 || TORCHCNN_VECTOR_REGISTERS >= 32 ? dot_pixels : dot_pixels / 2;

// Rows of grad_output and the source for grad_weight, as Image.
template <class T>
struct Pair {
  const T* gradient;
  const T* source;
  T* sum;                                                      // [row tap][column tap][vector]
  int64_t channels, gradient_row, source_row, sum_tap, ahead;  // as in Image
  bool padded;  // rows of grad_output end in zeros up to a whole tile, and source columns outside can be read
};

// sum += grad_output * source for tap rows a ... a + tap_rows - 1, whose source rows are inside for all row positions of
// `i_range`, `rows` of them at a time, of which it is a multiple.
template <class T, int64_t tap_rows, int64_t taps, int64_t step, int64_t known_column, int64_t rows = 1>
[[gnu::noinline]] void dot_rows(const Axes& axes, const Pair<T>& pair, int64_t a, const Range& i_range, const Range& j_range,
                                const Range& v_range) {
  const Axis &h = axes.h, &w = axes.w;
  const Phase &phase_h = h.phase[0], &phase_w = w.phase[0];
  const int64_t column = known_column > 0 ? known_column : pair.channels, offset = phase_w.offset, width = w.source_size;
  const int64_t source_tap = phase_h.offset_step * pair.source_row, sum_tap = pair.sum_tap;
  const int64_t ahead = pair.ahead;
  constexpr int64_t source_rows = tap_rows + rows - 1, pixels_of_tile = dot_columns<rows>;
  Range tiles{j_range.begin, j_range.begin + ceil_div(j_range.end - j_range.begin, dot_pixels) * dot_pixels};
  if (!pair.padded) {
    tiles.begin = std::clamp(inside(w, phase_w, offset).begin, j_range.begin, j_range.end);
    tiles.end = std::clamp(inside(w, phase_w, phase_w.last_offset()).end, tiles.begin, j_range.end);
  }
  for (int64_t v = v_range.begin; v < v_range.end; ++v) {
    const int64_t c = Vectors<T>{pair.channels}.first_channel(v);
    T* const to = pair.sum + a * taps * sum_tap + (v - v_range.begin) * kLanes<T>;
    Vec<T> sum[tap_rows][taps];
    unrolled<tap_rows>([&](auto r) __attribute__((always_inline)) {
      unrolled<taps>([&](auto s) __attribute__((always_inline)) { sum[r][s] = load(to + (r * taps + s) * sum_tap); });
    });
    for (int64_t i = i_range.begin; i < i_range.end; i += rows) {
      const T* const gradient = pair.gradient + i * pair.gradient_row + c;
      const T* const source =
          pair.source + (i * h.step + phase_h.offset + a * phase_h.offset_step) * pair.source_row + offset * column + c;
      const auto tile = [&](int64_t j, auto pixels) __attribute__((always_inline)) {
        constexpr int64_t columns = (pixels - 1) * step + taps;
        const int64_t begin = -j * step - offset, end = begin + width;
        Vec<T> g[rows][pixels];
        unrolled<rows * pixels>([&](auto x) __attribute__((always_inline)) {
          g[x / pixels][x % pixels] = load(gradient + x / pixels * pair.gradient_row + (j + x % pixels) * column);
        });
        const T* from = source + j * step * column;
        if (known_column == 0 && pixels > 1 && ahead > 0) {
          unrolled<rows * pixels>([&](auto x) __attribute__((always_inline)) {
            __builtin_prefetch(gradient + x / pixels * pair.gradient_row + (j + x % pixels) * column + ahead, 0, 2);
          });
          unrolled<pixels * step>([&](auto x) __attribute__((always_inline)) {
            __builtin_prefetch(from + (source_rows - 1) * source_tap + x * column + ahead, 0, 2);
            if (source_rows > 3 || (step == 2 && source_rows > 1))
              __builtin_prefetch(from + (source_rows - 2) * source_tap + x * column + ahead, 0, 2);
          });
        }
        unrolled<source_rows>([&](auto y) __attribute__((always_inline)) {
          const T* at = from + y * source_tap;
          unrolled<columns>([&](auto d) __attribute__((always_inline)) {
            if (pixels > 1 || (d >= begin && d < end)) {
              const Vec<T> input = load_once(at);
              unrolled<rows * pixels>([&](auto x) __attribute__((always_inline)) {
                constexpr int64_t r = y - x / pixels, s = d - x % pixels * step;
                if constexpr (r >= 0 && r < tap_rows && s >= 0 && s < taps) sum[r][s] += g[x / pixels][x % pixels] * input;
              });
            }
            known_column > 0 ? void(at += column) : advance(at, column);
          });
        });
      };
      const std::integral_constant<int64_t, 1> one;
      int64_t j = j_range.begin;
      for (; j < tiles.begin; ++j) tile(j, one);
      for (; j + pixels_of_tile <= tiles.end; j += pixels_of_tile) tile(j, std::integral_constant<int64_t, pixels_of_tile>{});
      for (; j < j_range.end; ++j) tile(j, one);
    }
    unrolled<tap_rows>([&](auto r) __attribute__((always_inline)) {
      unrolled<taps>([&](auto s) __attribute__((always_inline)) { store(to + (r * taps + s) * sum_tap, sum[r][s]); });
    });
  }
}

// The same for any one tap.
template <class T>
void dot_any(const Axes& axes, const Pair<T>& pair, int64_t a, const Range& i_range, const Range& j_range, const Range& v_range) {
  const Axis &h = axes.h, &w = axes.w;
  const Phase &phase_h = h.phase[0], &phase_w = w.phase[0];
  for (int64_t b = 0; b < phase_w.count; ++b) {
    const int64_t offset = phase_w.offset + b * phase_w.offset_step;
    const Range valid = inside(w, phase_w, offset);
    for (int64_t v = v_range.begin; v < v_range.end; ++v) {
      const int64_t c = Vectors<T>{pair.channels}.first_channel(v);
      T* const to = pair.sum + (a * phase_w.count + b) * pair.sum_tap + (v - v_range.begin) * kLanes<T>;
      Vec<T> sum = load(to);
      for (int64_t i = i_range.begin; i < i_range.end; ++i) {
        const T* gradient = pair.gradient + i * pair.gradient_row + c;
        const T* source =
            pair.source + (i * h.step + phase_h.offset + a * phase_h.offset_step) * pair.source_row + offset * pair.channels + c;
        for (int64_t j = std::max(valid.begin, j_range.begin); j < std::min(valid.end, j_range.end); ++j)
          sum += load(gradient + j * pair.channels) * load(source + j * w.step * pair.channels);
      }
      store(to, sum);
    }
  }
}

// All taps, for row positions of `rows`.
template <class T, int64_t known_column>
void dot(const Axes& axes, const Pair<T>& pair, const Range& rows, const Range& positions, const Range& v_range) {
  const Axis &h = axes.h, &w = axes.w;
  const Phase &phase_h = h.phase[0], &phase_w = w.phase[0];
  const auto rows_of = [&](int64_t a) {
    const Range valid = inside(h, phase_h, phase_h.offset + a * phase_h.offset_step);
    const int64_t begin = std::clamp(valid.begin, rows.begin, rows.end);
    return Range{begin, std::clamp(valid.end, begin, rows.end)};
  };
  for_known_taps(w, phase_w, [&]<int64_t taps, int64_t step>() {
    if constexpr (taps == 0) {
      for (int64_t a = 0; a < phase_h.count; ++a) dot_any(axes, pair, a, rows_of(a), positions, v_range);
    } else {
      // Pixels that stay in cache while the vectors of their channels pass.
      const int64_t cached = 32 * 1024 / (pair.channels * int64_t(sizeof(T))) / dot_pixels * dot_pixels;
      const int64_t span = known_column > 0 ? positions.end : std::max(4 * dot_pixels, cached);
      for (int64_t j = positions.begin; j < positions.end; j += span) {
        const Range j_range{j, std::min(j + span, positions.end)};
        const auto one_row = [&](int64_t a, int64_t begin, int64_t end) {
          if (begin < end) dot_rows<T, 1, taps, step, known_column>(axes, pair, a, {begin, end}, j_range, v_range);
        };
        int64_t a = 0;
        if constexpr (taps == 3) {
          for (; a + 3 <= phase_h.count; a += 3) {
            const Range top = rows_of(a), bottom = rows_of(a + 2);
            const Range all{top.begin, std::max(top.begin, bottom.end)};
            int64_t i = all.begin;
            if constexpr (step == 1 && known_column == 0) {
              if (h.step == 1 && phase_h.offset_step == 1) i += (all.end - all.begin) / 2 * 2;
              if (all.begin < i) dot_rows<T, 3, taps, step, known_column, 2>(axes, pair, a, {all.begin, i}, j_range, v_range);
            }
            if (i < all.end) dot_rows<T, 3, taps, step, known_column>(axes, pair, a, {i, all.end}, j_range, v_range);
            for (int64_t r = a; r < a + 3; ++r) {
              const Range valid = rows_of(r);
              one_row(r, valid.begin, std::min(valid.end, all.begin));
              one_row(r, std::max(valid.begin, all.end), valid.end);
            }
          }
        }
        for (; a < phase_h.count; ++a) one_row(a, rows_of(a).begin, rows_of(a).end);
      }
    }
  });
}

template <class T>
void add_to(T* total, const T* sum, int64_t count) {
  for (int64_t x = 0; x < count; x += kLanes<T>) store(total + x, load(total + x) + load(sum + x));
}

template <class T>
void conv2d_grad_weight(const Conv2dGeometry& g, const T* grad_output, const T* input, T* grad_weight, T* grad_bias) {
  const Axes axes = forward_axes(g);
  constexpr int64_t lanes = kLanes<T>;
  const int64_t C = g.C, filter = g.R * g.S, rows = g.N * g.P;
  const Vectors<T> vectors{C};
  const int64_t chunk = vectors_at_once<T>(C, filter), chunks = ceil_div(vectors.count(), chunk);
  // A chunk of channels and a slice of the rows of all images are a task; slices are added in order at the end.
  const int64_t slices = std::min(rows, ceil_div(16, chunks)), size = filter * chunk * lanes;
  const int64_t flush = ceil_div(128, g.Q);  // rows that are summed on their own first, which keeps rounding errors small
  T* partial = workspace<T>(Slot::partial_sums, chunks * slices * size);
  const int64_t ahead = pixels_ahead<T>(dot_ahead, C, g.N * C * (g.H * g.W + g.P * g.Q));
  const BiasSums<T> bias_sums(slices, C, grad_bias);
  const int64_t bias_rows = ceil_div(32, g.Q);  // that are summed together, soon after the products have read them

  parallel_for(chunks * slices, rows / slices * g.Q * filter * chunk, [&](int64_t task) {
    const int64_t slice = task % slices, v_begin = task / slices * chunk, v_end = std::min(v_begin + chunk, vectors.count());
    T* total = partial + task * size;
    T* sum = workspace<T>(Slot::tile, size);
    fill(total, size, T(0));
    const int64_t row_end = (slice + 1) * rows / slices;
    for (int64_t row = slice * rows / slices; row < row_end;) {
      fill(sum, size, T(0));
      for (const int64_t flush_end = std::min(row_end, row + flush); row < flush_end;) {
        const int64_t first = row;
        for (int64_t count; row < std::min(flush_end, first + bias_rows); row += count) {
          const int64_t n = row / g.P, i = row % g.P;
          count = i == 0 ? 1 : std::min<int64_t>(2, std::min(row_end - row, g.P - i));  // two may be one more than asked for
          const Pair<T> pair{
              grad_output + n * g.P * g.Q * C, input + n * g.H * g.W * C, sum, C, g.Q * C, g.W * C, chunk * lanes, ahead, false};
          dot<T, 0>(axes, pair, {i, i + count}, {0, g.Q}, {v_begin, v_end});
        }
        const int64_t c = v_begin * lanes, channels = std::min(C, v_end * lanes) - c;
        bias_sums.add_pixels(slice, c, channels, grad_output + first * g.Q * C + c, C, (row - first) * g.Q);
      }
      add_to(total, sum, size);
    }
  });
  parallel_for(chunks, chunk * lanes * filter * slices, [&](int64_t task) {
    const T* first = partial + task * slices * size;
    for (int64_t v = task * chunk; v < std::min((task + 1) * chunk, vectors.count()); ++v) {
      const int64_t c = vectors.first_channel(v);
      for (int64_t lane = v * lanes - c; lane < lanes; ++lane) {
        for (int64_t t = 0; t < filter; ++t) {
          T sum = 0;
          for (int64_t slice = 0; slice < slices; ++slice)
            sum += first[slice * size + (t * chunk + v - task * chunk) * lanes + lane];
          grad_weight[(c + lane) * filter + t] = sum;
        }
      }
    }
  });
  bias_sums.finish();
}

}  // namespace torchcnn::TORCHCNN_ISA::depthwise::channels_last
