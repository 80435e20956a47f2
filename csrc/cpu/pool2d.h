// Vectorised pooling, in three shapes of loop:
//
// NCHW, sliding windows: vectors run over the windows q of a row. A band of input rows is packed first, so that any tap of
// consecutive windows is contiguous whatever the stride, with a neutral value in the padding (up to stride kMaxPackedStride):
//
//   packed[h][phase][j] = input[h][j stride_w + phase - pad_w]            phase = 0 ... stride_w - 1
//   tap s of windows q, q + 1, ... = packed[h][(s dilation_w) mod stride_w][q + (s dilation_w) div stride_w], ...
//
// The gradient of an average is the adjoint: shares are added into a packed band, which is unpacked at the end.
//
// NCHW, adaptive windows and longer strides: the rows of a window are added as vectors over w, its columns one by one.
//
// channels_last: vectors run over the channels, which lie side by side.
//
// Ties, NaN and windows are those of pool2d_reference.h; sums are in the type of the tensor.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "../geometry.h"
#include "pool2d_reference.h"
#include "runtime.h"
#include "simd.h"

namespace torchcnn::TORCHCNN_ISA {

inline constexpr int64_t kMaxPackedStride = 8;

inline bool is_packed(const Pool2dGeometry& g) {
  return g.layout == Layout::nchw && !g.adaptive && g.stride_w <= kMaxPackedStride;
}

// A vector lane counts positions of a plane in 32 bits beside a float, 64 beside a double.
template <class T>
bool index_fits_lane(const Pool2dGeometry& g) {
  return g.H <= std::numeric_limits<IndexOf<T>>::max() / g.W;
}

template <class T>
inline int64_t round_up_to_lanes(int64_t count) {
  return ceil_div(count, kLanes<T>) * kLanes<T>;
}

// Rows first_row ... first_row + rows - 1 of one plane, packed.
template <class T>
struct PackedBand {
  T* data;
  int64_t first_row, rows, phases, phase_size;

  T* row(int64_t h) const { return data + (h - first_row) * phases * phase_size; }
  // Where tap s of window 0 lies in a packed row; that of window q is q elements further.
  int64_t tap(const Pool2dGeometry& g, int64_t s) const {
    return s * g.dilation_w % phases * phase_size + s * g.dilation_w / phases;
  }
};

template <class T>
int64_t packed_phase_size(const Pool2dGeometry& g) {
  return round_up_to_lanes<T>(g.Q) + g.dilation_w * (g.S - 1) / g.stride_w + 1;
}

// How many packed rows fit into half of a usual L2 cache.
template <class T>
int64_t band_rows(const Pool2dGeometry& g) {
  constexpr int64_t band_bytes = 128 * 1024;
  return std::max<int64_t>(1, band_bytes / static_cast<int64_t>(g.stride_w * packed_phase_size<T>(g) * sizeof(T)));
}

// In the workspace of the calling thread, uninitialised.
template <class T>
PackedBand<T> packed_band(const Pool2dGeometry& g, int64_t first_row, int64_t rows) {
  const int64_t phase_size = packed_phase_size<T>(g);
  return {workspace<T>(Slot::patches, rows * g.stride_w * phase_size), first_row, rows, g.stride_w, phase_size};
}

// The part of a packed phase that holds input columns: j = begin ... end - 1, the first of them column `first`.
struct PhaseColumns {
  int64_t begin, end, first;
};

inline PhaseColumns phase_columns(const Pool2dGeometry& g, int64_t phase, int64_t phase_size) {
  const int64_t begin = g.pad_w > phase ? ceil_div(g.pad_w - phase, g.stride_w) : 0;
  const int64_t end = std::min(phase_size, ceil_div(std::max<int64_t>(0, g.W + g.pad_w - phase), g.stride_w));
  return {std::min(begin, end), end, begin * g.stride_w + phase - g.pad_w};
}

template <class T>
void pack_band(const Pool2dGeometry& g, const T* plane, T neutral, const PackedBand<T>& band) {
  for (int64_t h = band.first_row; h < band.first_row + band.rows; ++h) {
    for (int64_t phase = 0; phase < band.phases; ++phase) {
      const PhaseColumns columns = phase_columns(g, phase, band.phase_size);
      T* to = band.row(h) + phase * band.phase_size;
      fill(to, columns.begin, neutral);
      gather_strided(plane + h * g.W + columns.first, g.stride_w, columns.end - columns.begin, to + columns.begin);
      fill(to + columns.end, band.phase_size - columns.end, neutral);
    }
  }
}

template <class T>
void unpack_band(const Pool2dGeometry& g, const PackedBand<T>& band, T* plane) {
  for (int64_t h = band.first_row; h < band.first_row + band.rows; ++h) {
    T* to = plane + h * g.W;
    fill(to, g.W, T(0));  // columns that no window reads
    for (int64_t phase = 0; phase < band.phases; ++phase) {
      const PhaseColumns columns = phase_columns(g, phase, band.phase_size);
      const T* from = band.row(h) + phase * band.phase_size;
      for (int64_t j = columns.begin; j < columns.end; ++j) to[columns.first + (j - columns.begin) * g.stride_w] = from[j];
    }
  }
}

// Vector instructions of one row of windows, roughly.
template <class T>
int64_t window_cost(const Pool2dGeometry& g) {
  return g.R * g.S * ceil_div(g.Q, kLanes<T>);
}

// Calls visit(plane, band, p_begin, p_end) for bands of windows, packed, that together cover every plane.
template <class T, class Visit>
void for_each_packed_band(const Pool2dGeometry& g, const T* input, T neutral, Visit visit) {
  const int64_t window = g.dilation_h * (g.R - 1) + 1;
  const int64_t band_windows = std::max<int64_t>(1, (band_rows<T>(g) - window) / g.stride_h + 1),
                bands = ceil_div(g.P, band_windows);
  parallel_for(g.N * g.C * bands, window_cost<T>(g) * std::min(g.P, band_windows), [&](int64_t task) {
    const int64_t plane = task / bands, p_begin = task % bands * band_windows, p_end = std::min(g.P, p_begin + band_windows);
    // Not row_window(g, p_begin).begin: a dilated window that starts in the padding begins below the next one.
    const int64_t first_row = std::max<int64_t>(0, p_begin * g.stride_h - g.pad_h);
    const PackedBand<T> band = packed_band<T>(g, first_row, row_window(g, p_end - 1).end - first_row);
    pack_band(g, input + plane * g.H * g.W, neutral, band);
    visit(plane, band, p_begin, p_end);
  });
}

// The best value of a window so far, and where in the plane it stands, lane by lane.
template <class Extremum, class T>
struct Best {
  Vec<T> value;
  Vec<IndexOf<T>> index;

  void offer(Vec<T> candidate, int64_t candidate_index) {
    Vec<IndexOf<T>> better = candidate != candidate;  // NaN
    if constexpr (std::is_same_v<Extremum, Max>) {
      better |= candidate > value;
    } else {
      better |= candidate < value;
    }
    value = better ? candidate : value;
    index = better ? broadcast(static_cast<IndexOf<T>>(candidate_index)) : index;
  }

  void write(T* output, int64_t* indices, int64_t count) const {
    if (count >= kLanes<T>) {
      store(output, value);
      for (int64_t lane = 0; lane < kLanes<T>; ++lane) indices[lane] = index[lane];
    } else {
      store_partial(output, value, count);
      for (int64_t lane = 0; lane < count; ++lane) indices[lane] = index[lane];
    }
  }
};

template <class Extremum, class T>
inline constexpr T kNeutral =
    std::is_same_v<Extremum, Max> ? -std::numeric_limits<T>::infinity() : std::numeric_limits<T>::infinity();

template <class Extremum, class T>
void extremum_pool2d_nchw(const Pool2dGeometry& g, const T* input, T* output, int64_t* indices) {
  using Index = IndexOf<T>;
  // Index of tap (0, 0) of window q in row 0 of the plane, and the first column of it that is inside: where an all-neutral
  // window points.
  const int64_t windows = round_up_to_lanes<T>(g.Q);
  Index* origin = workspace<Index>(Slot::tables, 2 * windows);
  Index* first_column = origin + windows;
  for (int64_t q = 0; q < windows; ++q) {
    origin[q] = static_cast<Index>(q * g.stride_w - g.pad_w);
    first_column[q] = static_cast<Index>(q < g.Q ? column_window(g, q).begin - origin[q] : 0);
  }
  for_each_packed_band(g, input, kNeutral<Extremum, T>,
                       [&](int64_t nc, const PackedBand<T>& band, int64_t p_begin, int64_t p_end) {
    for (int64_t p = p_begin; p < p_end; ++p) {
      const Window row = row_window(g, p);
      for (int64_t q = 0; q < g.Q; q += kLanes<T>) {
        Best<Extremum, T> best{broadcast(kNeutral<Extremum, T>), load(first_column + q) + static_cast<Index>(row.begin * g.W)};
        for (int64_t h = row.begin; h < row.end; h += g.dilation_h) {
          for (int64_t s = 0; s < g.S; ++s) best.offer(load(band.row(h) + band.tap(g, s) + q), h * g.W + s * g.dilation_w);
        }
        best.index += load(origin + q);
        const int64_t to = (nc * g.P + p) * g.Q + q;
        best.write(output + to, indices + to, g.Q - q);
      }
    }
  });
}

template <class Extremum, class T>
void extremum_pool2d_channels_last(const Pool2dGeometry& g, const T* input, T* output, int64_t* indices) {
  parallel_for(g.N * g.P, ceil_div(g.H, g.P) * g.W * g.C / kLanes<T>, [&](int64_t np) {
    const T* image = input + np / g.P * g.H * g.W * g.C;
    const Window row = row_window(g, np % g.P);
    for (int64_t q = 0; q < g.Q; ++q) {
      const Window column = column_window(g, q);
      const int64_t to = (np * g.Q + q) * g.C;
      for (int64_t c = 0; c < g.C; c += kLanes<T>) {
        const int64_t channels = std::min(kLanes<T>, g.C - c);
        Best<Extremum, T> best{broadcast(kNeutral<Extremum, T>),
                               broadcast(static_cast<IndexOf<T>>(row.begin * g.W + column.begin))};
        for (int64_t h = row.begin; h < row.end; h += g.dilation_h) {
          for (int64_t w = column.begin; w < column.end; w += g.dilation_w) {
            const T* from = image + (h * g.W + w) * g.C + c;
            best.offer(channels == kLanes<T> ? load(from) : load_partial(from, channels), h * g.W + w);
          }
        }
        best.write(output + to + c, indices + to + c, channels);
      }
    }
  });
}

template <class Extremum, class T>
void extremum_pool2d_forward(const Pool2dGeometry& g, const T* input, T* output, int64_t* indices) {
  if (!index_fits_lane<T>(g)) return reference::extremum_pool2d_forward<Extremum>(g, input, output, indices);
  if (g.layout == Layout::channels_last) return extremum_pool2d_channels_last<Extremum>(g, input, output, indices);
  if (is_packed(g)) return extremum_pool2d_nchw<Extremum>(g, input, output, indices);
  return reference::extremum_pool2d_forward<Extremum>(g, input, output, indices);
}

template <class T>
void max_pool2d_forward(const Pool2dGeometry& g, const T* input, T* output, int64_t* indices) {
  extremum_pool2d_forward<Max>(g, input, output, indices);
}

template <class T>
void min_pool2d_forward(const Pool2dGeometry& g, const T* input, T* output, int64_t* indices) {
  extremum_pool2d_forward<Min>(g, input, output, indices);
}

// divisor(p, q) = row_factor(p) column_factor[q], one for lanes past the last window.
template <class T>
T* column_factors(const Pool2dGeometry& g, const Divisor& divisor) {
  const Window one{0, 1, 1};
  T* factors = workspace<T>(Slot::tables, round_up_to_lanes<T>(g.Q));
  for (int64_t q = 0; q < round_up_to_lanes<T>(g.Q); ++q)
    factors[q] = static_cast<T>(divisor.override_value != 0 || q >= g.Q ? 1 : divisor(one, column_window(g, q)));
  return factors;
}

template <class T>
T row_factor(const Divisor& divisor, const Window& row) {
  return static_cast<T>(divisor(row, Window{0, 1, 1}));
}

template <class T>
void avg_pool2d_packed(const Pool2dGeometry& g, const Divisor& divisor, const T* input, T* output) {
  const T* column_factor = column_factors<T>(g, divisor);
  for_each_packed_band(g, input, T(0), [&](int64_t nc, const PackedBand<T>& band, int64_t p_begin, int64_t p_end) {
    for (int64_t p = p_begin; p < p_end; ++p) {
      const Window row = row_window(g, p);
      const T factor = row_factor<T>(divisor, row);
      for (int64_t q = 0; q < g.Q; q += kLanes<T>) {
        Vec<T> sum{};
        for (int64_t h = row.begin; h < row.end; ++h)
          for (int64_t s = 0; s < g.S; ++s) sum += load(band.row(h) + band.tap(g, s) + q);
        const Vec<T> mean = sum / (load(column_factor + q) * factor);
        T* to = output + (nc * g.P + p) * g.Q + q;
        if (g.Q - q >= kLanes<T>) {
          store(to, mean);
        } else {
          store_partial(to, mean, g.Q - q);
        }
      }
    }
  });
}

template <class T>
void avg_pool2d_packed_grad_input(const Pool2dGeometry& g, const Divisor& divisor, const T* grad_output, T* grad_input) {
  const T* column_factor = column_factors<T>(g, divisor);
  const int64_t rows = band_rows<T>(g), bands = ceil_div(g.H, rows);
  parallel_for(g.N * g.C * bands, window_cost<T>(g) * g.P / bands, [&](int64_t task) {
    const int64_t nc = task / bands, h_begin = task % bands * rows, h_end = std::min(g.H, h_begin + rows);
    const PackedBand<T> band = packed_band<T>(g, h_begin, h_end - h_begin);
    fill(band.data, band.rows * band.phases * band.phase_size, T(0));
    for (int64_t p = 0; p < g.P; ++p) {
      const Window row = row_window(g, p);
      const int64_t row_begin = std::max(row.begin, h_begin), row_end = std::min(row.end, h_end);
      if (row_begin >= row_end) continue;
      const T factor = row_factor<T>(divisor, row);
      for (int64_t q = 0; q < g.Q; q += kLanes<T>) {
        const T* from = grad_output + (nc * g.P + p) * g.Q + q;
        const Vec<T> gradient = g.Q - q >= kLanes<T> ? load(from) : load_partial(from, g.Q - q);
        const Vec<T> share = gradient / (load(column_factor + q) * factor);
        for (int64_t h = row_begin; h < row_end; ++h) {
          for (int64_t s = 0; s < g.S; ++s) {
            T* to = band.row(h) + band.tap(g, s) + q;
            store(to, load(to) + share);
          }
        }
      }
    }
    unpack_band(g, band, grad_input + nc * g.H * g.W);
  });
}

// to[j] += from[j]
template <class T>
inline void add(const T* from, int64_t count, T* to) {
  int64_t j = 0;
  for (; j + kLanes<T> <= count; j += kLanes<T>) store(to + j, load(to + j) + load(from + j));
  for (; j < count; ++j) to[j] += from[j];
}

template <class T>
void avg_pool2d_separable(const Pool2dGeometry& g, const Divisor& divisor, const T* input, T* output) {
  parallel_for(g.N * g.C, g.H * g.W / kLanes<T> + g.P * g.W, [&](int64_t nc) {
    T* column_sum = workspace<T>(Slot::patches, g.W);
    for (int64_t p = 0; p < g.P; ++p) {
      const Window row = row_window(g, p);
      fill(column_sum, g.W, T(0));
      for (int64_t h = row.begin; h < row.end; ++h) add(input + (nc * g.H + h) * g.W, g.W, column_sum);
      for (int64_t q = 0; q < g.Q; ++q) {
        const Window column = column_window(g, q);
        T sum = 0;
        for (int64_t w = column.begin; w < column.end; ++w) sum += column_sum[w];
        output[(nc * g.P + p) * g.Q + q] = sum / static_cast<T>(divisor(row, column));
      }
    }
  });
}

template <class T>
void avg_pool2d_separable_grad_input(const Pool2dGeometry& g, const Divisor& divisor, const T* grad_output, T* grad_input) {
  parallel_for(g.N * g.C, g.H * g.W / kLanes<T> + g.P * g.W, [&](int64_t nc) {
    T* row_share = workspace<T>(Slot::patches, g.W);
    fill(grad_input + nc * g.H * g.W, g.H * g.W, T(0));
    for (int64_t p = 0; p < g.P; ++p) {
      const Window row = row_window(g, p);
      fill(row_share, g.W, T(0));
      for (int64_t q = 0; q < g.Q; ++q) {
        const Window column = column_window(g, q);
        const T share = grad_output[(nc * g.P + p) * g.Q + q] / static_cast<T>(divisor(row, column));
        for (int64_t w = column.begin; w < column.end; ++w) row_share[w] += share;
      }
      for (int64_t h = row.begin; h < row.end; ++h) add(row_share, g.W, grad_input + (nc * g.H + h) * g.W);
    }
  });
}

template <class T>
void avg_pool2d_channels_last(const Pool2dGeometry& g, const Divisor& divisor, const T* input, T* output) {
  parallel_for(g.N * g.P, ceil_div(g.H, g.P) * g.W * g.C / kLanes<T>, [&](int64_t np) {
    const T* image = input + np / g.P * g.H * g.W * g.C;
    const Window row = row_window(g, np % g.P);
    for (int64_t q = 0; q < g.Q; ++q) {
      const Window column = column_window(g, q);
      T* sum = output + (np * g.Q + q) * g.C;
      fill(sum, g.C, T(0));
      for (int64_t h = row.begin; h < row.end; ++h)
        for (int64_t w = column.begin; w < column.end; ++w) add(image + (h * g.W + w) * g.C, g.C, sum);
      const T count = static_cast<T>(divisor(row, column));
      for (int64_t c = 0; c < g.C; ++c) sum[c] /= count;
    }
  });
}

// A thread owns a row of grad_input and visits the windows p = first[h] ... last[h] that contain it.
template <class T>
void avg_pool2d_channels_last_grad_input(const Pool2dGeometry& g, const Divisor& divisor, const T* grad_output, T* grad_input) {
  int64_t* first = workspace<int64_t>(Slot::tables, 2 * g.H);
  int64_t* last = first + g.H;
  fill(first, g.H, int64_t(1));
  fill(last, g.H, int64_t(0));  // first > last: no window
  for (int64_t p = g.P - 1; p >= 0; --p) {
    const Window row = row_window(g, p);
    for (int64_t h = row.begin; h < row.end; ++h) {
      if (first[h] > last[h]) last[h] = p;
      first[h] = p;
    }
  }
  parallel_for(g.N * g.H, g.W * g.C / kLanes<T>, [&](int64_t nh) {
    const int64_t n = nh / g.H, h = nh % g.H;
    T* to = grad_input + nh * g.W * g.C;
    fill(to, g.W * g.C, T(0));
    T* share = workspace<T>(Slot::patches, g.C);
    for (int64_t p = first[h]; p <= last[h]; ++p) {
      const Window row = row_window(g, p);
      for (int64_t q = 0; q < g.Q; ++q) {
        const Window column = column_window(g, q);
        const T* from = grad_output + ((n * g.P + p) * g.Q + q) * g.C;
        const T count = static_cast<T>(divisor(row, column));
        for (int64_t c = 0; c < g.C; ++c) share[c] = from[c] / count;
        for (int64_t w = column.begin; w < column.end; ++w) add(share, g.C, to + w * g.C);
      }
    }
  });
}

template <class T>
void avg_pool2d_forward(const Pool2dGeometry& g, Divisor divisor, const T* input, T* output) {
  if (g.layout == Layout::channels_last) return avg_pool2d_channels_last(g, divisor, input, output);
  return is_packed(g) ? avg_pool2d_packed(g, divisor, input, output) : avg_pool2d_separable(g, divisor, input, output);
}

template <class T>
void avg_pool2d_grad_input(const Pool2dGeometry& g, Divisor divisor, const T* grad_output, T* grad_input) {
  if (g.layout == Layout::channels_last) return avg_pool2d_channels_last_grad_input(g, divisor, grad_output, grad_input);
  return is_packed(g) ? avg_pool2d_packed_grad_input(g, divisor, grad_output, grad_input)
                      : avg_pool2d_separable_grad_input(g, divisor, grad_output, grad_input);
}

}  // namespace torchcnn::TORCHCNN_ISA
