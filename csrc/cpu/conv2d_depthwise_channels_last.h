// Depthwise convolution of channels_last tensors: vectors run along the channels, a register tile is a run of output pixels of
// one row. Taps outside the image are left out: rows for a whole output row, columns for the few pixels near an edge, which go
// one by one. Weights lie as
//
//   packed_weight[r S + s][channel]
//
// so that one load gives a tap's weights for a vector of channels.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../geometry.h"
#include "conv2d_depthwise_axes.h"
#include "runtime.h"
#include "simd.h"

namespace torchcnn::TORCHCNN_ISA::depthwise::channels_last {

// Channels worked on at a time: their weights (or sums of grad_weight) should take at most half of the 32 KiB of L1. A multiple
// of 64 elements, whole cache lines.
template <class T>
int64_t channel_chunk(int64_t channels, int64_t filter) {
  constexpr int64_t cached = 16 * 1024 / sizeof(T);
  return std::min(channels, std::max<int64_t>(64, cached / filter / 64 * 64));
}

template <class T>
inline Vec<T> load_channels(const T* from, int64_t count) {
  return count >= kLanes<T> ? load(from) : load_partial(from, count);
}

template <class T>
inline void store_channels(T* to, Vec<T> v, int64_t count) {
  if (count >= kLanes<T>)
    store(to, v);
  else
    store_partial(to, v, count);
}

// Pixels in a register tile: 8 accumulators + at most 7 weights of a filter row + 1 of 16 registers.
inline constexpr int64_t wide = 8, narrow = 4;

// One output row and phase: where its pixels are, and the taps that reach them.
template <class T>
struct Row {
  const T* source;                                               // column 0 of source row i step
  const T* weight;                                               // packed_weight
  const T* bias;                                                 // or null
  T* output;                                                     // position 0 of the row
  int64_t source_row, source_column, output_column, weight_tap;  // distances in elements
  int64_t S;
  const Axis& axis;
  const Phase& phase;  // of columns
  const Tap* taps;     // of rows: those from tap_begin on, up to tap_end, lie inside the source
  int64_t tap_begin, tap_end;
  bool relu;
};

// The pixels from j on, for whole vectors of channels, by `taps` consecutive columns at a known step. clipped: some of the input
// columns that the pixels span lie outside the source.
template <class T, int64_t pixels, int64_t taps, int64_t step, bool clipped>
void correlate_pixels(const Row<T>& row, int64_t j, int64_t c_begin, int64_t c_end) {
  constexpr int64_t columns = (pixels - 1) * step + taps;
  const int64_t first = j * step + row.phase.taps[0].offset;
  const int64_t begin = std::max<int64_t>(0, -first), end = std::min(columns, row.axis.source_size - first);
  const int64_t source_row = row.source_row, source_column = row.source_column, output_column = row.output_column;
  const int64_t tap_begin = row.tap_begin, tap_end = row.tap_end, weight_row = row.S * row.weight_tap;
  const Tap* const tap = row.taps;
  const T* const source = row.source + first * source_column;
  const T* const bias = row.bias;
  T* const output = row.output + j * output_column;
  const bool relu = row.relu;
  const T* weights[taps];
  unrolled<taps>([&](auto s)
                     __attribute__((always_inline)) { weights[s] = row.weight + row.phase.taps[s].index * row.weight_tap; });
  for (int64_t c = c_begin; c < c_end; c += kLanes<T>) {
    Vec<T> sum[pixels];
    const Vec<T> start = bias == nullptr ? Vec<T>{} : load(bias + c);
    unrolled<pixels>([&](auto v) __attribute__((always_inline)) { sum[v] = start; });
    for (int64_t a = tap_begin; a < tap_end; ++a) {
      const T* from = source + tap[a].offset * source_row + c;
      const int64_t weight_at = tap[a].index * weight_row + c;
      Vec<T> w[taps];
      unrolled<taps>([&](auto s) __attribute__((always_inline)) { w[s] = load(weights[s] + weight_at); });
      unrolled<columns>([&](auto d) __attribute__((always_inline)) {
        if (!clipped || (d >= begin && d < end)) spread<d, step>(load(from + d * source_column), w, sum);
      });
    }
    unrolled<pixels>([&](auto v) __attribute__((always_inline)) {
      store(output + v * output_column + c, relu ? rectified<T>(sum[v]) : sum[v]);
    });
  }
}

// Any taps, all of them inside the source for every pixel, or one pixel with those that are. The last vector of channels may be
// partial for one pixel.
template <class T, int64_t pixels>
void correlate_any_taps(const Row<T>& row, int64_t j, int64_t c_begin, int64_t c_end) {
  const int64_t source_step = row.axis.step * row.source_column;
  const Range columns = pixels == 1 ? taps_inside(row.axis, row.phase, j) : Range{0, row.phase.count};
  const auto load_source = [&](const T* from, int64_t count)
                               __attribute__((always_inline)) { return pixels > 1 ? load(from) : load_channels(from, count); };
  for (int64_t c = c_begin; c < c_end; c += kLanes<T>) {
    const int64_t count = c_end - c;
    Vec<T> sum[pixels];
    const Vec<T> start = row.bias == nullptr ? Vec<T>{} : load_source(row.bias + c, count);
    unrolled<pixels>([&](auto v) __attribute__((always_inline)) { sum[v] = start; });
    for (int64_t a = row.tap_begin; a < row.tap_end; ++a) {
      const T* from = row.source + j * source_step + row.taps[a].offset * row.source_row + c;
      for (int64_t b = columns.begin; b < columns.end; ++b) {
        const Tap& tap = row.phase.taps[b];
        const Vec<T> w = load(row.weight + (row.taps[a].index * row.S + tap.index) * row.weight_tap + c);
        unrolled<pixels>([&](auto v) __attribute__((always_inline)) {
          sum[v] += w * load_source(from + tap.offset * row.source_column + v * source_step, count);
        });
      }
    }
    unrolled<pixels>([&](auto v) __attribute__((always_inline)) {
      const Vec<T> result = row.relu ? rectified<T>(sum[v]) : sum[v];
      T* to = row.output + (j + v) * row.output_column + c;
      if (pixels > 1)
        store(to, result);
      else
        store_channels(to, result, count);
    });
  }
}

template <class T, int64_t taps, int64_t step>
void correlate_row(const Row<T>& row, int64_t c_begin, int64_t c_end) {
  const Phase& phase = row.phase;
  const int64_t positions = phase.positions;
  Range interior{0, positions};
  if (phase.count > 0) {
    interior.begin = inside(row.axis, phase, phase.taps[0].offset).begin;
    interior.end = std::max(interior.begin, inside(row.axis, phase, phase.taps[phase.count - 1].offset).end);
  }
  if constexpr (taps > 0) {
    const auto tile = [&]<int64_t pixels>(std::integral_constant<int64_t, pixels>, int64_t j) {
      j >= interior.begin&& j + pixels <= interior.end ? correlate_pixels<T, pixels, taps, step, false>(row, j, c_begin, c_end)
                                                       : correlate_pixels<T, pixels, taps, step, true>(row, j, c_begin, c_end);
    };
    // The last tile overlaps the one before it.
    int64_t j = 0;
    for (; j + wide <= positions; j += wide) tile(std::integral_constant<int64_t, wide>{}, j);
    if (positions - j > narrow && positions >= wide) return tile(std::integral_constant<int64_t, wide>{}, positions - wide);
    if (positions < narrow) {
      for (; j < positions; ++j) tile(std::integral_constant<int64_t, 1>{}, j);
      return;
    }
    for (; j < positions; j += narrow) tile(std::integral_constant<int64_t, narrow>{}, std::min(j, positions - narrow));
  } else {
    int64_t j = 0;
    for (; j < interior.begin; ++j) correlate_any_taps<T, 1>(row, j, c_begin, c_end);
    for (; j + narrow <= interior.end; j += narrow) correlate_any_taps<T, narrow>(row, j, c_begin, c_end);
    for (; j < positions; ++j) correlate_any_taps<T, 1>(row, j, c_begin, c_end);
  }
}

// body<taps, step>() for consecutive columns that there is a kernel for, else body<0, 0>().
template <class Body>
void for_known_taps(const Axis& axis, const Phase& phase, const Body& body) {
  if (phase.count > 0 && consecutive(phase, phase.count)) {
    if (axis.step == 1) {
      switch (phase.count) {
        case 1: return body.template operator()<1, 1>();
        case 2: return body.template operator()<2, 1>();
        case 3: return body.template operator()<3, 1>();
        case 4: return body.template operator()<4, 1>();
        case 5: return body.template operator()<5, 1>();
        case 7: return body.template operator()<7, 1>();
      }
    }
    if (axis.step == 2) {
      switch (phase.count) {
        case 3: return body.template operator()<3, 2>();
        case 5: return body.template operator()<5, 2>();
        case 7: return body.template operator()<7, 2>();
      }
    }
  }
  body.template operator()<0, 0>();
}

// to[t][c] = from[c][t]; rows of `to` are `pitch` long and end in zeros.
template <class T>
void transpose_filters(const T* from, int64_t channels, int64_t filter, int64_t pitch, T* to) {
  parallel_for(ceil_div(pitch, 64), 64 * filter, [&](int64_t task) {
    const int64_t end = std::min(pitch, (task + 1) * 64);
    for (int64_t t = 0; t < filter; ++t)
      for (int64_t c = task * 64; c < end; ++c) to[t * pitch + c] = c < channels ? from[c * filter + t] : T(0);
  });
}

template <class T>
void correlate(const Correlation<T>& c) {
  constexpr int64_t lanes = kLanes<T>;
  const Axis &h = c.axes.h, &w = c.axes.w;
  const int64_t C = c.C, filter = c.R * c.S, pitch = ceil_div(C, lanes) * lanes, chunk = channel_chunk<T>(C, filter);
  T* packed_weight = workspace<T>(Slot::packed_weight, filter * pitch);
  transpose_filters(c.weight, C, filter, pitch, packed_weight);
  const int64_t whole_channels = C / lanes * lanes;

  const int64_t task_cost = w.output_size * C * filter / (h.phases * w.phases) / lanes;
  parallel_for(c.N * h.output_size, task_cost, [&](int64_t task) {
    const int64_t n = task / h.output_size, p = task % h.output_size, i = p / h.phases;
    const Phase& phase_h = h.phase[p % h.phases];
    const Range taps = taps_inside(h, phase_h, i);
    for (int64_t c_begin = 0; c_begin < C; c_begin += chunk) {
      const int64_t c_end = std::min(C, c_begin + chunk), whole_end = std::min(whole_channels, c_end);
      for (int64_t fw = 0; fw < w.phases; ++fw) {
        const Phase& phase = w.phase[fw];
        const Row<T> row{c.source + (n * h.source_size + i * h.step) * w.source_size * C,
                         packed_weight,
                         c.epilogue.bias,
                         c.output + ((n * h.output_size + p) * w.output_size + fw) * C,
                         w.source_size * C,
                         C,
                         w.phases * C,
                         pitch,
                         c.S,
                         w,
                         phase,
                         phase_h.taps,
                         taps.begin,
                         taps.end,
                         c.epilogue.relu};
        for_known_taps(w, phase, [&]<int64_t known_taps, int64_t step>() {
          if (c_begin < whole_end) correlate_row<T, known_taps, step>(row, c_begin, whole_end);
        });
        if (whole_end < c_end)
          for (int64_t j = 0; j < phase.positions; ++j) correlate_any_taps<T, 1>(row, j, whole_end, c_end);
      }
    }
  });
}

// Where the pixels of a row of grad_output meet the source.
template <class T>
struct DotRow {
  const T* gradient;  // position 0
  const T* source;    // column 0 of source row i step
  T* sum;             // [row tap][column tap][chunk]
  int64_t C, source_row, chunk;
  const Axis& axis;
  const Phase& phase;  // of columns
  const Tap* taps;     // of rows: those inside the source
  Range tap_range;
};

// sum += grad_output * input over the pixels from j on, for channels c_begin ... c_end - 1 of the chunk; as correlate_pixels.
template <class T, int64_t pixels, int64_t taps, int64_t step, bool clipped>
void dot_pixels(const DotRow<T>& row, int64_t j, int64_t c_begin, int64_t c_end) {
  constexpr int64_t columns = (pixels - 1) * step + taps;
  const int64_t first = j * step + row.phase.taps[0].offset, C = row.C, chunk = row.chunk, source_row = row.source_row;
  const int64_t begin = std::max<int64_t>(0, -first), end = std::min(columns, row.axis.source_size - first);
  const T *const gradient = row.gradient + j * C, *const source = row.source + first * C;
  T* const sum = row.sum;
  const Tap* const tap = row.taps;
  const Range range = row.tap_range;
  for (int64_t c = c_begin; c < c_end; c += kLanes<T>) {
    Vec<T> g[pixels];
    unrolled<pixels>([&](auto v) __attribute__((always_inline)) { g[v] = load(gradient + v * C + c); });
    for (int64_t a = range.begin; a < range.end; ++a) {
      const T* from = source + tap[a].offset * source_row + c;
      T* to = sum + a * taps * chunk + c;
      Vec<T> total[taps];
      unrolled<taps>([&](auto s) __attribute__((always_inline)) { total[s] = load(to + s * chunk); });
      unrolled<columns>([&](auto d) __attribute__((always_inline)) {
        if (clipped && (d < begin || d >= end)) return;
        const Vec<T> input = load(from + d * C);
        unrolled<pixels>([&](auto v) __attribute__((always_inline)) {
          constexpr int64_t s = d - v * step;
          if constexpr (s >= 0 && s < taps) total[s] += g[v] * input;
        });
      });
      unrolled<taps>([&](auto s) __attribute__((always_inline)) { store(to + s * chunk, total[s]); });
    }
  }
}

// One pixel and any taps; the last vector of channels may be partial.
template <class T>
void dot_any_taps(const DotRow<T>& row, int64_t j, int64_t c_begin, int64_t c_end) {
  const Range columns = taps_inside(row.axis, row.phase, j);
  for (int64_t c = c_begin; c < c_end; c += kLanes<T>) {
    const int64_t count = c_end - c;
    const Vec<T> g = load_channels(row.gradient + j * row.C + c, count);
    for (int64_t a = row.tap_range.begin; a < row.tap_range.end; ++a) {
      const T* from = row.source + j * row.axis.step * row.C + row.taps[a].offset * row.source_row + c;
      for (int64_t b = columns.begin; b < columns.end; ++b) {
        T* to = row.sum + (a * row.phase.count + b) * row.chunk + c;
        store(to, load(to) + g * load_channels(from + row.phase.taps[b].offset * row.C, count));
      }
    }
  }
}

template <class T, int64_t taps, int64_t step>
void dot_row(const DotRow<T>& row, int64_t positions, const Range& interior, int64_t c_end) {
  int64_t j = 0;
  if constexpr (taps > 0) {
    const auto tiles = [&]<int64_t pixels>(std::integral_constant<int64_t, pixels>) {
      for (; j + pixels <= positions; j += pixels) {
        j >= interior.begin&& j + pixels <= interior.end ? dot_pixels<T, pixels, taps, step, false>(row, j, 0, c_end)
                                                         : dot_pixels<T, pixels, taps, step, true>(row, j, 0, c_end);
      }
    };
    tiles(std::integral_constant<int64_t, wide>{});
    tiles(std::integral_constant<int64_t, narrow>{});
    tiles(std::integral_constant<int64_t, 2>{});
    tiles(std::integral_constant<int64_t, 1>{});
  } else {
    for (; j < positions; ++j) dot_any_taps(row, j, 0, c_end);
  }
}

template <class T>
void conv2d_grad_weight(const Conv2dGeometry& g, const T* grad_output, const T* input, T* grad_weight) {
  const Axes axes = forward_axes(g);
  constexpr int64_t lanes = kLanes<T>;
  const Axis &h = axes.h, &w = axes.w;
  const Phase &phase_h = h.phase[0], &phase_w = w.phase[0];
  const int64_t C = g.C, filter = g.R * g.S, chunk = ceil_div(channel_chunk<T>(C, filter), lanes) * lanes;
  const int64_t chunks = ceil_div(C, chunk), rows = g.N * g.P;
  // A chunk of channels and a slice of the rows of all images are a task; slices are added in order at the end.
  const int64_t slices = std::min(rows, ceil_div(16, chunks));
  const int64_t flush = ceil_div(128, g.Q);  // rows that are summed on their own first, which keeps rounding errors small
  T* partial = workspace<T>(Slot::partial_sums, chunks * slices * filter * chunk);
  const Range interior{inside(w, phase_w, phase_w.taps[0].offset).begin,
                       inside(w, phase_w, phase_w.taps[phase_w.count - 1].offset).end};

  parallel_for(chunks * slices, rows / slices * g.Q * filter * chunk / lanes, [&](int64_t task) {
    const int64_t slice = task % slices, c_begin = task / slices * chunk, channels = std::min(chunk, C - c_begin);
    const int64_t whole = channels / lanes * lanes;
    T* total = partial + task * filter * chunk;
    T* sum = workspace<T>(Slot::tile, filter * chunk);
    fill(total, filter * chunk, T(0));
    const int64_t row_end = (slice + 1) * rows / slices;
    for (int64_t row_begin = slice * rows / slices; row_begin < row_end; row_begin += flush) {
      fill(sum, filter * chunk, T(0));
      for (int64_t row = row_begin; row < std::min(row_end, row_begin + flush); ++row) {
        const int64_t n = row / g.P, i = row % g.P;
        const Range taps = taps_inside(h, phase_h, i);
        const DotRow<T> dot{grad_output + row * g.Q * C + c_begin,
                            input + (n * g.H + i * h.step) * g.W * C + c_begin,
                            sum,
                            C,
                            g.W * C,
                            chunk,
                            w,
                            phase_w,
                            phase_h.taps,
                            taps};
        for_known_taps(w, phase_w,
                       [&]<int64_t known_taps, int64_t step>() { dot_row<T, known_taps, step>(dot, g.Q, interior, whole); });
        if (whole < channels)
          for (int64_t j = 0; j < g.Q; ++j) dot_any_taps(dot, j, whole, channels);
      }
      for (int64_t x = 0; x < filter * chunk; x += lanes) store(total + x, load(total + x) + load(sum + x));
    }
  });
  parallel_for(chunks, chunk * filter * slices, [&](int64_t task) {
    const T* first = partial + task * slices * filter * chunk;
    for (int64_t c = 0; c < std::min(chunk, C - task * chunk); ++c) {
      for (int64_t t = 0; t < filter; ++t) {
        T sum = first[t * chunk + c];
        for (int64_t slice = 1; slice < slices; ++slice) sum += first[(slice * filter + t) * chunk + c];
        grad_weight[(task * chunk + c) * filter + t] = sum;
      }
    }
  });
}

}  // namespace torchcnn::TORCHCNN_ISA::depthwise::channels_last
