// What a convolution reads: the taps of a filter, and the window of the source that a block of results needs, in place where that
// is possible, else a copy with the padding written out.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../geometry.h"
#include "conv2d_gemm.h"
#include "runtime.h"
#include "simd.h"

namespace torchcnn::TORCHCNN_ISA::implicit_gemm {

struct Tap {
  int64_t row, column;  // offset into the source
  int64_t weight;       // r S + s
};

// Positions of the result that see the same taps, taps[first_tap ... first_tap + taps - 1].
struct Phase {
  int64_t first_tap, taps, rows, columns;
};

template <class T>
struct View {
  T* data;
  Strides strides;
  int64_t rows, columns;
};

// The part of the source that a block reads, rows x columns of it from (first_row, first_column) for a block at row 0.
struct Window {
  int64_t first_row, first_column, rows, columns;
  bool in_place;
  Strides strides;
  int64_t step_h, step_w;  // from one element of it to the next in the source
};

// Has the window copied: as densely as `channels` channels lie.
inline void copy_window(Window& w, int64_t channels, Layout layout, int64_t element_size) {
  w.in_place = false;
  if (layout == Layout::channels_last) {
    w.strides = {w.rows * w.columns * channels, 1, w.columns * channels, channels};
  } else {
    int64_t plane = w.rows * w.columns;
    if (plane * element_size % 1024 == 0) plane += 64 / element_size;  // or every channel would fall into the same sets of L1
    w.strides = {channels * plane, plane, w.columns, 1};
  }
}

// The window for blocks of `rows` rows of a grid of grid_rows x grid_columns positions. `inside`: no position reads the padding.
inline Window window_of(const Tap* taps, int64_t tap_count, const Strides& source, int64_t source_rows, int64_t source_columns,
                        int64_t channels, int64_t rows, int64_t grid_rows, int64_t grid_columns, int64_t step_h, int64_t step_w,
                        Layout layout, int64_t element_size, bool inside) {
  Window w{taps[0].row, taps[0].column, 0, 0, false, source, 1, 1};
  int64_t last_row = taps[0].row, last_column = taps[0].column;
  for (int64_t t = 1; t < tap_count; ++t) {
    w.first_row = std::min(w.first_row, taps[t].row), last_row = std::max(last_row, taps[t].row);
    w.first_column = std::min(w.first_column, taps[t].column), last_column = std::max(last_column, taps[t].column);
  }
  // Of 1x1 filters that skip columns, whole cache lines would be read for parts of them, once for every panel.
  if (tap_count == 1 && step_w > 1 && layout == Layout::nchw) w.step_h = step_h, w.step_w = step_w;
  w.rows = (rows - 1) * step_h / w.step_h + last_row - w.first_row + 1;
  w.columns = (grid_columns - 1) * step_w / w.step_w + last_column - w.first_column + 1;
  const bool no_padding = w.first_row >= 0 && w.first_column >= 0 && (grid_rows - 1) * step_h + last_row < source_rows &&
                          (grid_columns - 1) * step_w + last_column < source_columns;
  const bool spread = layout == Layout::channels_last || source.c * element_size % 1024 != 0;
  w.in_place = w.step_w == 1 && (no_padding || (inside && spread));
  if (!w.in_place) copy_window(w, channels, layout, element_size);
  return w;
}

// Not a constant on purpose: of a loop that stores one the compiler would make a call of memset, which costs more than a short
// row.
template <class T>
inline Vec<T> zero_vector{};

// Writes whole vectors, up to a vector less one element too many: what comes after is written later.
template <class T>
inline void zero_beyond(T* to, int64_t count) {
  const Vec<T> zero = zero_vector<T>;
  for (int64_t x = 0; x < count; x += kLanes<T>) store(to + x, zero);
}

template <class T, int64_t piece = kLanes<T> / 2>
inline void copy_pieces(const T* from, int64_t count, T* to) {
  if (count & piece) {
    std::memcpy(to, from, piece * sizeof(T));
    from += piece, to += piece;
  }
  if constexpr (piece > 1) copy_pieces<T, piece / 2>(from, count, to);
}

template <class T>
inline void copy_row(const T* from, int64_t count, T* to) {
  if (count >= kLanes<T>) return copy(from, count, to);
  copy_pieces(from, count, to);
}

// The window of images n ... n + images - 1, channels c ... c + channels - 1, from source row `row`: the tensor or a padded copy.
template <class T>
const T* read_window(const View<const T>& source, const Window& w, int64_t n, int64_t images, int64_t c, int64_t channels,
                     int64_t row, Layout layout) {
  const Strides &s = source.strides, &to = w.strides;
  const T* from = source.data + n * s.n + c * s.c;
  if (w.in_place) return from + (row + w.first_row) * s.h + w.first_column * s.w;
  T* copy_of = workspace<T>(Slot::patches, images * to.n + 2 * kLanes<T>);
  const int64_t left = std::clamp<int64_t>(w.first_column < 0 ? ceil_div(-w.first_column, w.step_w) : 0, 0, w.columns);
  const int64_t after = w.first_column < source.columns ? ceil_div(source.columns - w.first_column, w.step_w) : 0;
  const int64_t inside = std::clamp<int64_t>(after, left, w.columns) - left;
  const bool channels_last = layout == Layout::channels_last;
  const int64_t planes = channels_last ? 1 : channels, unit = w.strides.w;
  for (int64_t image = 0; image < images; ++image) {
    for (int64_t plane = 0; plane < planes; ++plane) {
      for (int64_t r = 0; r < w.rows; ++r) {
        T* line = copy_of + image * to.n + plane * to.c + r * to.h;
        const int64_t h = row + w.first_row + r * w.step_h;
        if (h < 0 || h >= source.rows || inside == 0) {
          zero_beyond(line, w.columns * unit);
          continue;
        }
        const T* start = from + image * s.n + plane * s.c + h * s.h + (w.first_column + left * w.step_w) * s.w;
        zero_beyond(line, left * unit);
        if (!channels_last) gemm::prefetch(start + 4 * s.c, inside * w.step_w);
        if (w.step_w > 1) {
          gather_strided(start, w.step_w, inside, line + left);
        } else if (s.w == unit) {
          copy_row(start, inside * unit, line + left * unit);
        } else {
          for (int64_t x = 0; x < inside; ++x) copy_row(start + x * s.w, channels, line + (left + x) * unit);
        }
        zero_beyond(line + (left + inside) * unit, (w.columns - left - inside) * unit);
      }
    }
  }
  return copy_of;
}

// The taps of a filter over the input: forward and grad_weight.
inline void input_taps(const Conv2dGeometry& g, Tap* taps) {
  for (int64_t r = 0; r < g.R; ++r)
    for (int64_t s = 0; s < g.S; ++s) *taps++ = {r * g.dilation_h - g.pad_h, s * g.dilation_w - g.pad_w, r * g.S + s};
}

}  // namespace torchcnn::TORCHCNN_ISA::implicit_gemm
