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

// The output pixels of one row from position j on, and the taps that reach all of them.
template <class T>
struct Pixels {
  const T* source;                                               // column 0 of source row i step
  const T* weight;                                               // of channel 0 of this packed_weight
  const T* bias;                                                 // or null
  T* output;                                                     // position 0 of the row
  int64_t source_row, source_column, output_column, weight_tap;  // distances in elements
  int64_t step, S;
  const Tap* rows;
  int64_t row_begin, row_end;
  const Tap* columns;
  int64_t column_begin, column_end;
  bool relu;
};

// tap_columns > 0: that many consecutive columns, step known.
template <class T, int64_t pixels, int64_t tap_columns, int64_t known_step>
void correlate_pixels(const Pixels<T>& p, int64_t j, int64_t c_begin, int64_t c_end) {
  constexpr int64_t lanes = kLanes<T>;
  const int64_t source_step = p.step * p.source_column;
  const T* const source = p.source + j * source_step;
  T* const output = p.output + j * p.output_column;
  int64_t weight_at[tap_columns + 1];
  for (int64_t s = 0; s < tap_columns; ++s) weight_at[s] = p.columns[s].index * p.weight_tap;
  for (int64_t c = c_begin; c < c_end; c += lanes) {
    const int64_t count = c_end - c;
    Vec<T> sum[pixels];
    const Vec<T> start = p.bias == nullptr ? Vec<T>{} : load_channels(p.bias + c, count);
    unrolled<pixels>([&](auto v) __attribute__((always_inline)) { sum[v] = start; });
    for (int64_t a = p.row_begin; a < p.row_end; ++a) {
      const T* from = source + p.rows[a].offset * p.source_row + c;
      const T* weight = p.weight + p.rows[a].index * p.S * p.weight_tap + c;
      if constexpr (tap_columns > 0) {
        from += p.columns[0].offset * p.source_column;
        Vec<T> w[tap_columns];
        unrolled<tap_columns>([&](auto s) __attribute__((always_inline)) { w[s] = load(weight + weight_at[s]); });
        unrolled<(pixels - 1) * known_step + tap_columns>(
            [&](auto d) __attribute__((always_inline)) { spread<d, known_step>(load(from + d * p.source_column), w, sum); });
      } else {
        for (int64_t b = p.column_begin; b < p.column_end; ++b) {
          const Vec<T> w = load(weight + p.columns[b].index * p.weight_tap);  // padded to whole vectors
          const T* tap = from + p.columns[b].offset * p.source_column;
          unrolled<pixels>([&](auto v) __attribute__((always_inline)) {
            sum[v] += w * (pixels > 1 ? load(tap + v * source_step) : load_channels(tap, count));
          });
        }
      }
    }
    unrolled<pixels>([&](auto v) __attribute__((always_inline)) {
      store_channels(output + v * p.output_column + c, p.relu ? rectified<T>(sum[v]) : sum[v], count);
    });
  }
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

template <class T, int64_t tap_columns, int64_t known_step>
void correlate_with(const Correlation<T>& c) {
  constexpr int64_t lanes = kLanes<T>;
  const Axis &h = c.axes.h, &w = c.axes.w;
  const int64_t C = c.C, filter = c.R * c.S, pitch = ceil_div(C, lanes) * lanes, chunk = channel_chunk<T>(C, filter);
  T* packed_weight = workspace<T>(Slot::packed_weight, filter * pitch);
  transpose_filters(c.weight, C, filter, pitch, packed_weight);
  const int64_t whole_channels = C / lanes * lanes;

  const int64_t task_cost = w.output_size * C * filter / (h.phases * w.phases) / lanes;
  parallel_for(c.N * h.output_size, task_cost, [&](int64_t task) {
    const int64_t n = task / h.output_size, row = task % h.output_size, i = row / h.phases;
    const Phase& phase_h = h.phase[row % h.phases];
    const Range rows = taps_inside(h, phase_h, i);
    for (int64_t c_begin = 0; c_begin < C; c_begin += chunk) {
      const int64_t c_end = std::min(C, c_begin + chunk), whole_end = std::min(whole_channels, c_end);
      for (int64_t fw = 0; fw < w.phases; ++fw) {
        const Phase& phase_w = w.phase[fw];
        Pixels<T> p{c.source + (n * h.source_size + i * h.step) * w.source_size * C,
                    packed_weight,
                    c.epilogue.bias,
                    c.output + ((n * h.output_size + row) * w.output_size + fw) * C,
                    w.source_size * C,
                    C,
                    w.phases * C,
                    pitch,
                    w.step,
                    c.S,
                    phase_h.taps,
                    rows.begin,
                    rows.end,
                    phase_w.taps,
                    0,
                    phase_w.count,
                    c.epilogue.relu};
        Range interior{0, phase_w.positions};
        if (phase_w.count > 0) {
          interior.begin = inside(w, phase_w, phase_w.taps[0].offset).begin;
          interior.end = std::max(interior.begin, inside(w, phase_w, phase_w.taps[phase_w.count - 1].offset).end);
        }
        const auto edge = [&](int64_t j, int64_t from, int64_t to) {
          const Range columns = taps_inside(w, phase_w, j);
          p.column_begin = columns.begin, p.column_end = columns.end;
          correlate_pixels<T, 1, 0, 0>(p, j, from, to);
        };
        int64_t j = 0;
        for (; j < interior.begin; ++j) edge(j, c_begin, c_end);
        p.column_begin = 0, p.column_end = phase_w.count;
        while (j < interior.end) {
          const int64_t left = interior.end - j, j_tail = j;
          // The last tile overlaps the one before it.
          if (left >= wide || (left > narrow && interior.end - interior.begin >= wide)) {
            j = std::min(j, interior.end - wide);
            correlate_pixels<T, wide, tap_columns, known_step>(p, j, c_begin, whole_end);
            j += wide;
          } else if (interior.end - interior.begin >= narrow) {
            j = std::min(j, interior.end - narrow);
            correlate_pixels<T, narrow, tap_columns, known_step>(p, j, c_begin, whole_end);
            j += narrow;
          } else {
            correlate_pixels<T, 1, 0, 0>(p, j, c_begin, whole_end);
            ++j;
          }
          if (whole_end < c_end)
            for (int64_t pixel = j_tail; pixel < j; ++pixel) correlate_pixels<T, 1, 0, 0>(p, pixel, whole_end, c_end);
        }
        for (; j < phase_w.positions; ++j) edge(j, c_begin, c_end);
      }
    }
  });
}

template <class T>
void correlate(const Correlation<T>& c) {
  const Axis& w = c.axes.w;
  if (w.phases == 1 && w.step == 1) {
    if (consecutive(w.phase[0], 3)) return correlate_with<T, 3, 1>(c);
    if (consecutive(w.phase[0], 5)) return correlate_with<T, 5, 1>(c);
    if (consecutive(w.phase[0], 7)) return correlate_with<T, 7, 1>(c);
  }
  if (w.phases == 1 && w.step == 2) {
    if (consecutive(w.phase[0], 3)) return correlate_with<T, 3, 2>(c);
    if (consecutive(w.phase[0], 5)) return correlate_with<T, 5, 2>(c);
  }
  correlate_with<T, 0, 0>(c);
}

// sum[t][c] += grad_output * input over a run of pixels of one row; c counts within the chunk.
template <class T, int64_t pixels, int64_t tap_columns, int64_t known_step>
void dot_pixels(const T* gradient, const T* source, int64_t C, int64_t source_row, int64_t step, const Tap* rows, Range row_range,
                const Tap* columns, Range column_range, int64_t S, int64_t channels, int64_t chunk, T* sum) {
  constexpr int64_t lanes = kLanes<T>;
  for (int64_t c = 0; c < channels; c += lanes) {
    const int64_t count = channels - c;
    Vec<T> g[pixels];
    unrolled<pixels>([&](auto v) __attribute__((always_inline)) {
      g[v] = pixels > 1 ? load(gradient + v * C + c) : load_channels(gradient + c, count);
    });
    for (int64_t a = row_range.begin; a < row_range.end; ++a) {
      const T* from = source + rows[a].offset * source_row + c;
      T* to = sum + a * S * chunk + c;
      if constexpr (tap_columns > 0) {
        from += columns[0].offset * C;
        Vec<T> total[tap_columns];
        unrolled<tap_columns>([&](auto s) __attribute__((always_inline)) { total[s] = load(to + s * chunk); });
        unrolled<(pixels - 1) * known_step + tap_columns>([&](auto d) __attribute__((always_inline)) {
          const Vec<T> input = load(from + d * C);
          unrolled<pixels>([&](auto v) __attribute__((always_inline)) {
            constexpr int64_t s = d - v * known_step;
            if constexpr (s >= 0 && s < tap_columns) total[s] += g[v] * input;
          });
        });
        unrolled<tap_columns>([&](auto s) __attribute__((always_inline)) { store(to + s * chunk, total[s]); });
      } else {
        for (int64_t b = column_range.begin; b < column_range.end; ++b) {
          const T* tap = from + columns[b].offset * C;
          Vec<T> total = load(to + b * chunk);
          unrolled<pixels>([&](auto v) __attribute__((always_inline)) {
            total += g[v] * (pixels > 1 ? load(tap + v * step * C) : load_channels(tap, count));
          });
          store(to + b * chunk, total);
        }
      }
    }
  }
}

template <class T, int64_t tap_columns, int64_t known_step>
void grad_weight_with(const Conv2dGeometry& g, const Axes& axes, const T* grad_output, const T* input, T* grad_weight) {
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
        const T* source = input + (n * g.H + i * h.step) * g.W * C + c_begin;
        const T* gradient = grad_output + row * g.Q * C + c_begin;
        const auto dot = [&]<int64_t pixels, int64_t tap_count>(int64_t j, int64_t from, int64_t to) {
          const Range columns = pixels == 1 ? taps_inside(w, phase_w, j) : Range{0, phase_w.count};
          dot_pixels<T, pixels, tap_count, known_step>(gradient + j * C + from, source + j * w.step * C + from, C, g.W * C,
                                                       w.step, phase_h.taps, taps, phase_w.taps, columns, g.S, to - from, chunk,
                                                       sum + from);
        };
        int64_t j = 0;
        for (; j < interior.begin; ++j) dot.template operator()<1, 0>(j, 0, channels);
        for (; j + wide <= interior.end; j += wide) dot.template operator()<wide, tap_columns>(j, 0, whole);
        for (; j + narrow <= interior.end; j += narrow) dot.template operator()<narrow, tap_columns>(j, 0, whole);
        const int64_t tiled = j;
        for (; j < g.Q; ++j) dot.template operator()<1, 0>(j, 0, channels);
        if (whole < channels)
          for (j = interior.begin; j < tiled; ++j) dot.template operator()<1, 0>(j, whole, channels);
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

template <class T>
void conv2d_grad_weight(const Conv2dGeometry& g, const T* grad_output, const T* input, T* grad_weight) {
  const Axes axes = forward_axes(g);
  const Axis& w = axes.w;
  const auto run = [&]<int64_t tap_columns, int64_t known_step>() {
    grad_weight_with<T, tap_columns, known_step>(g, axes, grad_output, input, grad_weight);
  };
  if (w.step == 1) {
    if (consecutive(w.phase[0], 3)) return run.template operator()<3, 1>();
    if (consecutive(w.phase[0], 5)) return run.template operator()<5, 1>();
    if (consecutive(w.phase[0], 7)) return run.template operator()<7, 1>();
  }
  if (w.step == 2) {
    if (consecutive(w.phase[0], 3)) return run.template operator()<3, 2>();
    if (consecutive(w.phase[0], 5)) return run.template operator()<5, 2>();
  }
  run.template operator()<0, 0>();
}

}  // namespace torchcnn::TORCHCNN_ISA::depthwise::channels_last
