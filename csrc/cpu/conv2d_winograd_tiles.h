// Winograd tiles between memory and the transforms: kLanes<T> channels at a time, one vector for each element of a tile.
//
// Tiles are taken in runs: neighbours in a row of tiles. The part of the image under a run is first brought into a band,
//
//   band[row][column][lane]      lane = channel
//
// which takes the padding as zeros, the dilation as a step, and the layout: channels_last has vectors of channels already, NCHW
// is transposed in squares on its way. Each element is moved once a run, though tiles overlap, and the transforms know one
// layout. Results take the same way back. Nothing outside the tensor is ever read.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "../geometry.h"
#include "conv2d_gemm.h"
#include "conv2d_winograd_transforms.h"
#include "simd.h"

namespace torchcnn::TORCHCNN_ISA::winograd {

// Some channels of all images. T is const for what is read.
template <class T>
struct Images {
  T* data;
  int64_t rows, columns;
  Strides strides;
  Layout layout;
  int64_t dilation_h, dilation_w;  // between neighbours in a tile
};

// The phases of a stride, as channels of images that a filter of stride 1 meets: channel (a, c, b) has at (i, j) the element
// (i stride_h + a - pad_h, j stride_w + b - pad_w) of channel c < C, zero outside.
template <class T>
struct PhaseImages {
  T* data;
  int64_t rows, columns;
  Strides strides;
  int64_t stride_h, stride_w, pad_h, pad_w, C;
};

// Tiles in a run: 8 tiles of 4x4 are two vectors of 16 columns wide, and their band of 6 x 34 vectors has 13 KiB.
// Of 3x3 outputs from 4x4 taps (phases), and of single rows or columns, 16: more of the lines that they write are whole.
template <class F>
inline constexpr int64_t max_run = F::W::points == 1 || F::W::r == 4 ? 16 : 32 / std::max({4, F::W::step, F::W::out});

template <class F, class T>
inline constexpr int64_t band_in = F::H::in * ((max_run<F> - 1) * F::W::step + F::W::in) * kLanes<T>;
template <class F, class T>
inline constexpr int64_t band_out = F::H::out * max_run<F> * F::W::out * kLanes<T>;

template <class T>
inline constexpr int group = 16 / sizeof(T);  // elements of a 16-byte group

template <class T, int bytes>
struct PieceOf {
  using type [[gnu::vector_size(bytes)]] = T;
};
template <class T, int bytes>
using Piece = typename PieceOf<T, bytes>::type;

// One 16-byte group from each of from, from + stride, ...
template <class T, int bytes = TORCHCNN_VECTOR_BYTES>
[[gnu::always_inline]] inline Piece<T, bytes> load_groups(const T* from, int64_t stride) {
  Piece<T, bytes> v;
  if constexpr (bytes == 16) {
    std::memcpy(&v, from, 16);
  } else {
    const Piece<T, bytes / 2> half[2] = {load_groups<T, bytes / 2>(from, stride),
                                         load_groups<T, bytes / 2>(from + bytes / 32 * stride, stride)};
#if defined(__clang__) || __GNUC__ >= 12
    v = [&]<size_t... lane>(std::index_sequence<lane...>) {
      return __builtin_shufflevector(half[0], half[1], lane...);
    }(std::make_index_sequence<bytes / sizeof(T)>{});
#else
    std::memcpy(&v, half, bytes);
#endif
  }
  return v;
}

// The first `count` elements of group number g of v.
template <int count, int g, class T>
[[gnu::always_inline]] inline void store_group(T* to, Vec<T> v) {
#if defined(__clang__) || __GNUC__ >= 12
  const Piece<T, 16> piece = [&]<size_t... lane>(std::index_sequence<lane...>) {
    return __builtin_shufflevector(v, v, (g * group<T> + lane)...);
  }(std::make_index_sequence<group<T>>{});
  std::memcpy(to, &piece, count * sizeof(T));
#else
  std::memcpy(to, reinterpret_cast<const char*>(&v) + 16 * g, count * sizeof(T));
#endif
}

// Element j of group g of row i becomes element i of group g of row j.
template <class T>
[[gnu::always_inline]] inline void transpose_groups(Vec<T> (&row)[group<T>]) {
  constexpr auto each = kEachLane<T>;
  if constexpr (group<T> == 4) {
    const Vec<T> a = gemm::interleave_units<T, 1, 0>(row[0], row[1], each),
                 b = gemm::interleave_units<T, 1, 1>(row[0], row[1], each);
    const Vec<T> c = gemm::interleave_units<T, 1, 0>(row[2], row[3], each),
                 d = gemm::interleave_units<T, 1, 1>(row[2], row[3], each);
    row[0] = gemm::interleave_units<T, 2, 0>(a, c, each);
    row[1] = gemm::interleave_units<T, 2, 1>(a, c, each);
    row[2] = gemm::interleave_units<T, 2, 0>(b, d, each);
    row[3] = gemm::interleave_units<T, 2, 1>(b, d, each);
  } else {
    const Vec<T> a = gemm::interleave_units<T, 1, 0>(row[0], row[1], each);
    row[1] = gemm::interleave_units<T, 1, 1>(row[0], row[1], each);
    row[0] = a;
  }
}

// column[j][lane] = from[lane stride + j] for one 16-byte group of columns.
template <class T>
[[gnu::always_inline]] inline void load_group_columns(const T* from, int64_t stride, Vec<T> (&column)[group<T>]) {
  TORCHCNN_UNROLL
  for (int i = 0; i < group<T>; ++i) column[i] = load_groups<T>(from + i * stride, group<T> * stride);
  transpose_groups<T>(column);
}

// to[column][lane] = from[lane stride + column step]
template <class T>
inline void read_columns(const T* from, int64_t stride, int64_t step, int64_t columns, T* to) {
  constexpr int64_t L = kLanes<T>, e = group<T>;
  if (step != 1 || columns < e) {
    for (int64_t lane = 0; lane < L; ++lane)
      for (int64_t x = 0; x < columns; ++x) to[x * L + lane] = from[lane * stride + x * step];
    return;
  }
  int64_t x = 0;
  for (; x + L <= columns; x += L) {
    Vec<T> square[L];
    TORCHCNN_UNROLL
    for (int64_t lane = 0; lane < L; ++lane) square[lane] = load(from + lane * stride + x);
    gemm::transpose<T>(square);
    TORCHCNN_UNROLL
    for (int64_t lane = 0; lane < L; ++lane) store(to + (x + lane) * L, square[lane]);
  }
  while (x < columns) {  // the last group overlaps the one before it
    x = std::min(x, columns - e);
    Vec<T> column[e];
    load_group_columns(from + x, stride, column);
    TORCHCNN_UNROLL
    for (int64_t j = 0; j < e; ++j) store(to + (x + j) * L, column[j]);
    x += e;
  }
}

// to[lane stride + column step] = from[column][lane]
template <class T>
inline void write_columns(const T* from, T* to, int64_t stride, int64_t step, int64_t columns) {
  constexpr int64_t L = kLanes<T>, e = group<T>;
  if (step != 1 || columns < e) {
    for (int64_t lane = 0; lane < L; ++lane)
      for (int64_t x = 0; x < columns; ++x) to[lane * stride + x * step] = from[x * L + lane];
    return;
  }
  int64_t x = 0;
  for (; x + L <= columns; x += L) {
    Vec<T> square[L];
    TORCHCNN_UNROLL
    for (int64_t lane = 0; lane < L; ++lane) square[lane] = load(from + (x + lane) * L);
    gemm::transpose<T>(square);
    TORCHCNN_UNROLL
    for (int64_t lane = 0; lane < L; ++lane) store(to + lane * stride + x, square[lane]);
  }
  while (x < columns) {
    x = std::min(x, columns - e);
    Vec<T> row[e];
    TORCHCNN_UNROLL
    for (int64_t j = 0; j < e; ++j) row[j] = load(from + (x + j) * L);
    transpose_groups<T>(row);
    [&]<size_t... g>(std::index_sequence<g...>) __attribute__((always_inline)) {
      TORCHCNN_UNROLL
      for (int i = 0; i < e; ++i) (store_group<int(e), int(g), T>(to + (int64_t(g) * e + i) * stride + x, row[i]), ...);
    }(std::make_index_sequence<TORCHCNN_VECTOR_BYTES / 16>{});
    x += e;
  }
}

// Of `count` places from `first` on, step apart, those that lie in 0 ... size - 1: begin ... end - 1.
struct Inside {
  int64_t begin, end;
  Inside(int64_t first, int64_t step, int64_t count, int64_t size) {
    begin = std::clamp<int64_t>(first < 0 ? ceil_div(-first, step) : 0, 0, count);
    end = std::clamp<int64_t>(first < size ? ceil_div(size - first, step) : 0, begin, count);
  }
};

// rows x columns elements from (h, w) on of image n, which may lie outside the image in part. Found out once, for all channels.
struct Patch {
  int64_t rows, columns;
  Inside row, column;
  int64_t origin;

  template <class T>
  Patch(const Images<T>& images, int64_t n, int64_t h, int64_t w, int64_t rows, int64_t columns)
      : rows(rows),
        columns(columns),
        row(h, images.dilation_h, rows, images.rows),
        column(w, images.dilation_w, columns, images.columns),
        origin(n * images.strides.n + h * images.strides.h + w * images.strides.w) {}
};

// band = the patch, of channels c ... c + kLanes<T> - 1.
template <class T>
void read_band(const Images<const T>& images, const Patch& patch, int64_t c, T* band) {
  constexpr int64_t L = kLanes<T>;
  const Strides& s = images.strides;
  const int64_t columns = patch.columns;
  for (int64_t i = 0; i < patch.rows; ++i, band += columns * L) {
    const bool outside = i < patch.row.begin || i >= patch.row.end;
    const int64_t left = outside ? columns : patch.column.begin, right = outside ? columns : patch.column.end;
    for (int64_t j = 0; j < left; ++j) store(band + j * L, Vec<T>{});
    for (int64_t j = right; j < columns; ++j) store(band + j * L, Vec<T>{});
    if (left == right) continue;
    const T* from = images.data + (patch.origin + c * s.c + i * images.dilation_h * s.h + left * images.dilation_w * s.w);
    if (images.layout == Layout::nchw) {
      read_columns(from, s.c, images.dilation_w, right - left, band + left * L);
    } else {
      for (int64_t j = left; j < right; ++j, from += images.dilation_w * s.w) store(band + j * L, load(from));
    }
  }
}

// Which part of them: rows x columns elements from (h, w) on of image n.
struct PhasePatch {
  int64_t n, h, w, rows, columns;
};
template <class T>
PhasePatch patch_of(const PhaseImages<T>&, int64_t n, int64_t h, int64_t w, int64_t rows, int64_t columns) {
  return {n, h, w, rows, columns};
}
template <class T>
Patch patch_of(const Images<T>& images, int64_t n, int64_t h, int64_t w, int64_t rows, int64_t columns) {
  return {images, n, h, w, rows, columns};
}

// to[j to_step ...] = from[j from_step ...], `size` elements each: those of one row that the phases of a window's columns take.
template <class T, int64_t size>
void copy_units(const T* from, int64_t count, T* to, int64_t to_step) {
  for (int64_t j = 0; j < count; ++j) std::memcpy(to + j * to_step, from + j * size, size * sizeof(T));
}

// band = the patch, of kLanes<T> channels of phases; lanes beyond the last are zeros. In NCHW the phases of neighbouring columns
// lie side by side.
template <class T>
void read_band(const PhaseImages<const T>& images, const PhasePatch& patch, int64_t channel, T* band) {
  constexpr int64_t L = kLanes<T>;
  const Strides& s = images.strides;
  const int64_t S = images.stride_w, channels = images.stride_h * images.C * S, first = patch.w * S - images.pad_w;
  const bool inside = s.w == 1 && first >= 0 && first + patch.columns * S <= images.columns;
  for (int64_t x = 0; x < patch.rows * patch.columns; ++x) store(band + x * L, Vec<T>{});
  for (int64_t lane = 0, together = 1; lane < std::min(L, channels - channel); lane += together) {
    const int64_t b = (channel + lane) % S, c = (channel + lane) / S % images.C, a = (channel + lane) / S / images.C;
    const int64_t first_row = patch.h * images.stride_h + a - images.pad_h;
    const Inside row(first_row, images.stride_h, patch.rows, images.rows), column(first + b, S, patch.columns, images.columns);
    const T* from = images.data + patch.n * s.n + c * s.c + first_row * s.h + (first + b) * s.w;
    together = inside && b == 0 && lane + S <= L && (S == 2 || S == 4) ? S : 1;
    for (int64_t i = row.begin; i < row.end; ++i) {
      const T* at = from + i * images.stride_h * s.h;
      T* to = band + i * patch.columns * L + lane;
      switch (together) {
        case 2: copy_units<T, 2>(at, patch.columns, to, L); break;
        case 4: copy_units<T, 4>(at, patch.columns, to, L); break;
        default:
          for (int64_t j = column.begin; j < column.end; ++j) to[j * L] = at[j * S * s.w];
      }
    }
  }
}

// The way back: what lies outside the images is dropped.
template <class T>
void write_band(const T* band, const Images<T>& images, const Patch& patch, int64_t c) {
  constexpr int64_t L = kLanes<T>;
  const Strides& s = images.strides;
  const Inside& column = patch.column;
  for (int64_t i = patch.row.begin; i < patch.row.end; ++i) {
    const T* from = band + (i * patch.columns + column.begin) * L;
    T* to = images.data + (patch.origin + c * s.c + i * images.dilation_h * s.h + column.begin * images.dilation_w * s.w);
    if (images.layout == Layout::nchw) {
      write_columns(from, to, s.c, images.dilation_w, column.end - column.begin);
    } else {
      for (int64_t j = column.begin; j < column.end; ++j, from += L, to += images.dilation_w * s.w) store(to, load(from));
    }
  }
}

// Chooses what the first `wanted` outputs of a tile do not meet, in `lines` lines of its band: of elements `step` apart.
template <class Along, class T>
[[gnu::noinline]] void extend_tile(T* band, int64_t step, int64_t lines, int64_t line_step, int64_t wanted) {
  if (wanted + 1 >= Along::out) return;  // infinity alone is left out, where no input has to be chosen
  for (int64_t line = 0; line < lines; ++line, band += line_step) {
    Vec<T> x[Along::in];
    TORCHCNN_UNROLL
    for (int i = 0; i < Along::in; ++i) x[i] = load(band + i * step);
    Along::template extend<T>(x, int(wanted));
    TORCHCNN_UNROLL
    for (int i = 0; i < Along::in; ++i) store(band + i * step, x[i]);
  }
}

// Along one axis: B^T of a tile of the input, or A of a tile of grad_output.
template <class Along, bool is_input, class T, int in>
[[gnu::always_inline]] inline void transform_along(const Vec<T> (&x)[in], Vec<T> (&value)[Along::points]) {
  if constexpr (is_input) {
    Along::template input<T>(x, value);
  } else {
    Along::template output_transposed<T>(x, value);
  }
}

// to[xi position_stride] = B^T x B of a tile of the input, or A y A^T of one of grad_output.
template <class F, bool is_input, class T>
[[gnu::noinline]] void transform_tile(const T* band, int64_t band_row, T* to, int64_t position_stride) {
  constexpr int rows = is_input ? F::H::in : F::H::out, columns = is_input ? F::W::in : F::W::out;
  Vec<T> half[rows][F::W::points];
  TORCHCNN_UNROLL
  for (int i = 0; i < rows; ++i) {
    Vec<T> x[columns];
    TORCHCNN_UNROLL
    for (int j = 0; j < columns; ++j) x[j] = load(band + i * band_row + j * kLanes<T>);
    transform_along<typename F::W, is_input, T>(x, half[i]);
  }
  TORCHCNN_UNROLL
  for (int j = 0; j < F::W::points; ++j) {
    Vec<T> column[rows], value[F::H::points];
    TORCHCNN_UNROLL
    for (int i = 0; i < rows; ++i) column[i] = half[i][j];
    transform_along<typename F::H, is_input, T>(column, value);
    TORCHCNN_UNROLL
    for (int i = 0; i < F::H::points; ++i) store(to + (i * F::W::points + j) * position_stride, value[i]);
  }
}

// to[xi position_stride] = G g G^T
template <class F, class T>
[[gnu::always_inline]] inline void transform_filter(const Vec<T> (&g)[F::taps], T* to, int64_t position_stride) {
  Vec<T> half[F::H::points][F::W::r];
  TORCHCNN_UNROLL
  for (int s = 0; s < F::W::r; ++s) {
    Vec<T> column[F::H::r], value[F::H::points];
    TORCHCNN_UNROLL
    for (int i = 0; i < F::H::r; ++i) column[i] = g[i * F::W::r + s];
    F::H::template filter<T>(column, value);
    TORCHCNN_UNROLL
    for (int i = 0; i < F::H::points; ++i) half[i][s] = value[i];
  }
  TORCHCNN_UNROLL
  for (int i = 0; i < F::H::points; ++i) {
    Vec<T> value[F::W::points];
    F::W::template filter<T>(half[i], value);
    TORCHCNN_UNROLL
    for (int j = 0; j < F::W::points; ++j) store(to + (i * F::W::points + j) * position_stride, value[j]);
  }
}

// G g G^T of kLanes<T> filters, filter_stride elements apart; each may be turned by 180 degrees. At least 16 bytes of each are
// read.
template <class F, bool flipped, class T>
[[gnu::noinline]] void transform_weight_tile(const T* weight, int64_t filter_stride, T* to, int64_t position_stride) {
  constexpr int taps = F::taps, e = group<T>, columns = std::min(e, taps);
  Vec<T> g[taps];
  TORCHCNN_UNROLL
  for (int begin = 0; begin < taps; begin += e) {  // the last group overlaps the one before it
    const int at = std::min(begin, taps - columns);
    Vec<T> column[e];
    load_group_columns(weight + at, filter_stride, column);
    TORCHCNN_UNROLL
    for (int j = 0; j < columns; ++j) g[flipped ? taps - 1 - at - j : at + j] = column[j];
  }
  transform_filter<F, T>(g, to, position_stride);
}

// The same of filters that are lanes in memory already, their taps tap_stride elements apart.
template <class F, bool flipped, class T>
[[gnu::noinline]] void transform_weight_lanes(const T* weight, int64_t tap_stride, T* to, int64_t position_stride) {
  Vec<T> g[F::taps];
  TORCHCNN_UNROLL
  for (int t = 0; t < F::taps; ++t) g[flipped ? F::taps - 1 - t : t] = load(weight + t * tap_stride);
  transform_filter<F, T>(g, to, position_stride);
}

// to[tap kLanes<T> + lane] = G^T value G of kLanes<T> filters. `zero` stays zero as long as all of it is finite: Inf 0 = NaN.
template <class F, class T>
[[gnu::noinline]] void transform_grad_weight_lanes(const T* value, int64_t position_stride, T* to, Vec<T>& zero) {
  Vec<T> half[F::H::r][F::W::points];
  TORCHCNN_UNROLL
  for (int j = 0; j < F::W::points; ++j) {
    Vec<T> column[F::H::points], result[F::H::r];
    TORCHCNN_UNROLL
    for (int i = 0; i < F::H::points; ++i) column[i] = load(value + (i * F::W::points + j) * position_stride);
    F::H::template filter_transposed<T>(column, result);
    TORCHCNN_UNROLL
    for (int i = 0; i < F::H::r; ++i) half[i][j] = result[i];
  }
  TORCHCNN_UNROLL
  for (int i = 0; i < F::H::r; ++i) {
    Vec<T> result[F::W::r];
    F::W::template filter_transposed<T>(half[i], result);
    TORCHCNN_UNROLL
    for (int s = 0; s < F::W::r; ++s) {
      zero += result[s] * T(0);
      store(to + (i * F::W::r + s) * kLanes<T>, result[s]);
    }
  }
}

// to[lane stride + tap] of it.
template <class F, class T>
[[gnu::noinline]] void transform_grad_weight_tile(const T* value, int64_t position_stride, T* to, int64_t stride, Vec<T>& zero) {
  alignas(64) T lanes[F::taps * kLanes<T>];
  transform_grad_weight_lanes<F>(value, position_stride, lanes, zero);
  write_columns(lanes, to, stride, 1, F::taps);
}

// band = epilogue(A^T value A), a tile of it. `zero` stays zero as long as every sum is finite: Inf 0 = NaN.
template <class F, class T>
[[gnu::noinline]] void transform_output_tile(const T* value, int64_t position_stride, const T* bias, bool relu, T* band,
                                             int64_t band_row, Vec<T>& zero) {
  Vec<T> half[F::H::out][F::W::points];
  TORCHCNN_UNROLL
  for (int j = 0; j < F::W::points; ++j) {
    Vec<T> column[F::H::points], y[F::H::out];
    TORCHCNN_UNROLL
    for (int i = 0; i < F::H::points; ++i) column[i] = load(value + (i * F::W::points + j) * position_stride);
    F::H::template output<T>(column, y);
    TORCHCNN_UNROLL
    for (int i = 0; i < F::H::out; ++i) half[i][j] = y[i];
  }
  Vec<T> product{};
  const Vec<T> start = bias == nullptr ? Vec<T>{} : load(bias);
  const Vec<T> least = broadcast(relu ? T(0) : -std::numeric_limits<T>::infinity());
  TORCHCNN_UNROLL
  for (int i = 0; i < F::H::out; ++i) {
    Vec<T> y[F::W::out];
    F::W::template output<T>(half[i], y);
    TORCHCNN_UNROLL
    for (int j = 0; j < F::W::out; ++j) {
      product += y[j] * T(0);
      y[j] = y[j] + start;
      store(band + i * band_row + j * kLanes<T>, y[j] < least ? least : y[j]);
    }
  }
  zero += product;
}

}  // namespace torchcnn::TORCHCNN_ISA::winograd
