// Winograd tiles between memory and the transforms: kLanes<T> channels at a time, one vector for each position of the tile.
//
// NCHW keeps the columns of a channel together and the channels apart, so a row of a tile is transposed on its way: groups of 16
// bytes (4 floats, 2 doubles) are loaded from one channel each, and transposing inside the groups makes lanes of the channels.
//
//   loaded      row i:     c_i: x0 x1 x2 x3 | c_{i+4}: x0 x1 x2 x3        i = 0 ... 3
//   transposed  column j:  x_j of c_0 c_1 c_2 c_3 | c_4 c_5 c_6 c_7       j = 0 ... 3
//
// channels_last needs no transposition. What lies outside the image is zero; it may be read from a neighbouring row (and then be
// dropped), but never from outside the tensor.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "../geometry.h"
#include "conv2d_winograd_transforms.h"
#include "simd.h"

namespace torchcnn::TORCHCNN_ISA::winograd {

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

// Element `at` ... of group number g of v, `count` of them.
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

// In every group: units of `width` elements from the first (half = 0) or second half of a and b, in turn.
template <int width, int half, class T, size_t... lane>
[[gnu::always_inline]] inline Vec<T> mix_groups(Vec<T> a, Vec<T> b, std::index_sequence<lane...>) {
  constexpr auto source = [](size_t l) {
    const size_t e = group<T>, unit = l % e / width;
    return l / e * e + half * (e / 2) + unit / 2 * width + l % width + unit % 2 * sizeof...(lane);
  };
#if defined(__clang__)
  return __builtin_shufflevector(a, b, source(lane)...);
#else
  return __builtin_shuffle(a, b, Vec<IndexOf<T>>{static_cast<IndexOf<T>>(source(lane))...});
#endif
}

// Element j of group g of row i becomes element i of group g of row j.
template <class T>
[[gnu::always_inline]] inline void transpose_groups(Vec<T> (&row)[group<T>]) {
  if constexpr (group<T> == 4) {
    const Vec<T> a = mix_groups<1, 0, T>(row[0], row[1], kEachLane<T>), b = mix_groups<1, 1, T>(row[0], row[1], kEachLane<T>);
    const Vec<T> c = mix_groups<1, 0, T>(row[2], row[3], kEachLane<T>), d = mix_groups<1, 1, T>(row[2], row[3], kEachLane<T>);
    row[0] = mix_groups<2, 0, T>(a, c, kEachLane<T>);
    row[1] = mix_groups<2, 1, T>(a, c, kEachLane<T>);
    row[2] = mix_groups<2, 0, T>(b, d, kEachLane<T>);
    row[3] = mix_groups<2, 1, T>(b, d, kEachLane<T>);
  } else {
    const Vec<T> a = mix_groups<1, 0, T>(row[0], row[1], kEachLane<T>);
    row[1] = mix_groups<1, 1, T>(row[0], row[1], kEachLane<T>);
    row[0] = a;
  }
}

// column[j][lane] = from[lane stride + j]. Reads whole groups: max(count, group) elements from each lane's address. The last group
// overlaps the one before it where count is no multiple of a group.
template <int count, class T>
[[gnu::always_inline]] inline void load_columns(const T* from, int64_t stride, Vec<T> (&column)[count]) {
  constexpr int e = group<T>;
  TORCHCNN_UNROLL
  for (int begin = 0; begin < count; begin += e) {
    const int at = begin + e <= count ? begin : std::max(0, count - e);
    Vec<T> row[e];
    TORCHCNN_UNROLL
    for (int i = 0; i < e; ++i) row[i] = load_groups<T>(from + i * stride + at, e * stride);
    transpose_groups<T>(row);
    TORCHCNN_UNROLL
    for (int j = 0; j < e; ++j)
      if (at + j >= begin && at + j < count) column[at + j] = row[j];
  }
}

// to[lane stride + j] = column[j][lane] for j < valid (at most count, which is a multiple of the group or below it).
template <int count, class T>
[[gnu::always_inline]] inline void store_columns(T* to, int64_t stride, const Vec<T> (&column)[count], int64_t valid) {
  constexpr int e = group<T>, width = std::min(e, count);
  static_assert(count % width == 0);
  TORCHCNN_UNROLL
  for (int begin = 0; begin < count; begin += width) {
    Vec<T> row[e] = {};
    TORCHCNN_UNROLL
    for (int j = 0; j < width; ++j) row[j] = column[begin + j];
    transpose_groups<T>(row);
    const auto store_all = [&]<size_t... g>(std::index_sequence<g...>) {
      TORCHCNN_UNROLL
      for (int i = 0; i < e; ++i) (store_group<width, int(g), T>(to + (g * e + i) * stride + begin, row[i]), ...);
    };
    const auto store_some = [&]<size_t... g>(std::index_sequence<g...>) {
      TORCHCNN_UNROLL
      for (int i = 0; i < e; ++i) {
        const auto at = [&](size_t lane_group) { return to + (lane_group * e + i) * stride + begin; };
        if (valid - begin == 1) (store_group<1, int(g), T>(at(g), row[i]), ...);
        if (valid - begin >= 2) (store_group<std::min(2, width), int(g), T>(at(g), row[i]), ...);
        if (valid - begin == 3)
          for (int lane_group = 0; lane_group < int(sizeof...(g)); ++lane_group)
            at(lane_group)[2] = row[i][lane_group * e + 2 % e];
      }
    };
    constexpr auto groups = std::make_index_sequence<TORCHCNN_VECTOR_BYTES / 16>{};
    if (valid >= begin + width)
      store_all(groups);
    else
      store_some(groups);
  }
}

// The images of a tensor of one group of channels; `before` and `after` bound what may be read, relative to data.
template <class T>
struct Images {
  const T* data;
  int64_t rows, columns;
  Strides strides;
  Layout layout;
  int64_t before, after;
};

// x[i][j] = the kLanes<T> channels from c of image n at (h + i, w + j), zero outside the image.
template <int count, class T>
[[gnu::noinline]] inline void load_edge_tile(const Images<T>& images, int64_t n, int64_t c, int64_t h, int64_t w,
                                             Vec<T> (&x)[count][count]) {
  const Strides& s = images.strides;
  using Mask = Vec<IndexOf<T>>;
  Mask inside[count];  // all bits set in the columns of the image
  TORCHCNN_UNROLL
  for (int j = 0; j < count; ++j) inside[j] = Mask{} - IndexOf<T>(w + j >= 0 && w + j < images.columns);
  for (int64_t i = 0; i < count; ++i) {
    if (h + i < 0 || h + i >= images.rows) {
      TORCHCNN_UNROLL
      for (int j = 0; j < count; ++j) x[i][j] = Vec<T>{};
      continue;
    }
    const int64_t at = n * s.n + c * s.c + (h + i) * s.h + w * s.w;
    if (images.layout == Layout::channels_last) {
      for (int64_t j = 0; j < count; ++j)
        x[i][j] = w + j >= 0 && w + j < images.columns ? load(images.data + at + j * s.w) : Vec<T>{};
      continue;
    }
    constexpr int64_t reach = std::max(count, group<T>);
    Vec<T> row[count];
    if (at >= images.before && at + (kLanes<T> - 1) * s.c + reach <= images.after) {
      load_columns(images.data + at, s.c, row);
    } else {  // at the first or last elements of the tensor
      T copied[kLanes<T> * reach] = {};
      for (int64_t lane = 0; lane < kLanes<T>; ++lane)
        for (int64_t j = std::max<int64_t>(0, -w); j < std::min<int64_t>(count, images.columns - w); ++j)
          copied[lane * reach + j] = images.data[at + lane * s.c + j];
      load_columns(copied, reach, row);
    }
    TORCHCNN_UNROLL
    for (int j = 0; j < count; ++j) x[i][j] = reinterpret_cast<Vec<T>>(reinterpret_cast<Mask>(row[j]) & inside[j]);
  }
}

// Calls transform(load_row), load_row(i, x) giving row i of that tile. There are three of them, each free of branches: the
// transform is compiled into each.
template <int count, class T, class Transform>
[[gnu::always_inline]] inline void with_tile(const Images<T>& images, int64_t n, int64_t c, int64_t h, int64_t w,
                                             Transform transform) {
  const Strides& s = images.strides;
  const int64_t at = n * s.n + c * s.c + h * s.h + w * s.w;
  constexpr int64_t reach = std::max(count, group<T>);
  const bool inside = h >= 0 && w >= 0 && h + count <= images.rows && w + count <= images.columns;
  if (inside && images.layout == Layout::channels_last) {
    transform([&](int i, Vec<T>(&x)[count]) __attribute__((always_inline)) {
      TORCHCNN_UNROLL
      for (int j = 0; j < count; ++j) x[j] = load(images.data + at + i * s.h + j * s.w);
    });
  } else if (inside && at + (count - 1) * s.h + (kLanes<T> - 1) * s.c + reach <= images.after) {
    transform([&](int i, Vec<T>(&x)[count]) __attribute__((always_inline)) { load_columns(images.data + at + i * s.h, s.c, x); });
  } else {
    Vec<T> tile[count][count];
    load_edge_tile(images, n, c, h, w, tile);
    transform([&](int i, Vec<T>(&x)[count]) __attribute__((always_inline)) {
      TORCHCNN_UNROLL
      for (int j = 0; j < count; ++j) x[j] = tile[i][j];
    });
  }
}

// to[xi position_stride] = B^T x B of one tile, for the channels c ... c + kLanes<T> - 1.
template <class F, class T>
inline void transform_input_tile(const Images<T>& images, int64_t n, int64_t c, int64_t h, int64_t w, T* to,
                                 int64_t position_stride) {
  with_tile<F::tile>(images, n, c, h, w, [&](auto load_row) __attribute__((always_inline)) {
    Vec<T> half[F::tile][F::tile];
    TORCHCNN_UNROLL
    for (int i = 0; i < F::tile; ++i) {
      Vec<T> x[F::tile];
      load_row(i, x);
      F::template input<T>(x, half[i]);
    }
    TORCHCNN_UNROLL
    for (int j = 0; j < F::tile; ++j) {
      Vec<T> column[F::tile], value[F::tile];
      TORCHCNN_UNROLL
      for (int i = 0; i < F::tile; ++i) column[i] = half[i][j];
      F::template input<T>(column, value);
      TORCHCNN_UNROLL
      for (int i = 0; i < F::tile; ++i) store(to + (i * F::tile + j) * position_stride, value[i]);
    }
  });
}

// to[xi position_stride] = A y A^T of one tile of grad_output.
template <class F, class T>
inline void transform_grad_output_tile(const Images<T>& images, int64_t n, int64_t k, int64_t p, int64_t q, T* to,
                                       int64_t position_stride) {
  with_tile<F::m>(images, n, k, p, q, [&](auto load_row) __attribute__((always_inline)) {
    Vec<T> half[F::m][F::tile];
    TORCHCNN_UNROLL
    for (int i = 0; i < F::m; ++i) {
      Vec<T> y[F::m];
      load_row(i, y);
      F::template output_transposed<T>(y, half[i]);
    }
    TORCHCNN_UNROLL
    for (int j = 0; j < F::tile; ++j) {
      Vec<T> column[F::m], value[F::tile];
      TORCHCNN_UNROLL
      for (int i = 0; i < F::m; ++i) column[i] = half[i][j];
      F::template output_transposed<T>(column, value);
      TORCHCNN_UNROLL
      for (int i = 0; i < F::tile; ++i) store(to + (i * F::tile + j) * position_stride, value[i]);
    }
  });
}

// to[xi position_stride] = G g G^T of kLanes<T> filters, of which `filters` exist; the others are zero.
template <class F, bool flipped, class T>
inline void transform_weight_tile(const T* weight, int64_t filter_stride, int64_t filters, T* to, int64_t position_stride) {
  constexpr int taps = F::r * F::r;
  Vec<T> g[taps];
  if (filters >= kLanes<T>) {
    load_columns(weight, filter_stride, g);
  } else {
    T copied[kLanes<T> * taps] = {};
    for (int64_t k = 0; k < filters; ++k) std::memcpy(copied + k * taps, weight + k * filter_stride, taps * sizeof(T));
    load_columns(copied, taps, g);
  }
  Vec<T> half[F::tile][F::r];
  TORCHCNN_UNROLL
  for (int s = 0; s < F::r; ++s) {
    Vec<T> column[F::r], value[F::tile];
    TORCHCNN_UNROLL
    for (int i = 0; i < F::r; ++i) column[i] = flipped ? g[taps - 1 - (i * F::r + s)] : g[i * F::r + s];
    F::template filter<T>(column, value);
    TORCHCNN_UNROLL
    for (int i = 0; i < F::tile; ++i) half[i][s] = value[i];
  }
  TORCHCNN_UNROLL
  for (int i = 0; i < F::tile; ++i) {
    Vec<T> value[F::tile];
    F::template filter<T>(half[i], value);
    TORCHCNN_UNROLL
    for (int j = 0; j < F::tile; ++j) store(to + (i * F::tile + j) * position_stride, value[j]);
  }
}

// grad_weight[lane filter_stride + tap] = G^T value G of `filters` (at most kLanes<T>) filters. False where one is not finite.
template <class F, class T>
inline bool store_grad_weight_tile(const T* value, int64_t position_stride, int64_t filters, T* grad_weight,
                                   int64_t filter_stride) {
  constexpr int taps = F::r * F::r;
  Vec<T> half[F::r][F::tile];
  TORCHCNN_UNROLL
  for (int j = 0; j < F::tile; ++j) {
    Vec<T> column[F::tile], result[F::r];
    TORCHCNN_UNROLL
    for (int i = 0; i < F::tile; ++i) column[i] = load(value + (i * F::tile + j) * position_stride);
    F::template filter_transposed<T>(column, result);
    TORCHCNN_UNROLL
    for (int i = 0; i < F::r; ++i) half[i][j] = result[i];
  }
  T rows[taps][kLanes<T>];
  Vec<T> zero{};  // stays zero as long as everything is finite: Inf 0 = NaN
  TORCHCNN_UNROLL
  for (int i = 0; i < F::r; ++i) {
    Vec<T> result[F::r];
    F::template filter_transposed<T>(half[i], result);
    TORCHCNN_UNROLL
    for (int s = 0; s < F::r; ++s) {
      zero += result[s] * T(0);
      store(rows[i * F::r + s], result[s]);
    }
  }
  bool finite = true;
  for (int64_t lane = 0; lane < filters; ++lane) {
    finite = finite && zero[lane] == T(0);
    for (int tap = 0; tap < taps; ++tap) grad_weight[lane * filter_stride + tap] = rows[tap][lane];
  }
  return finite;
}

// Where tiles of the result go.
template <class T>
struct Result {
  T* data;
  Strides strides;
  Layout layout;
};

// Rows and columns outside the output are left out; `bias` and relu as in the epilogue.
template <int m, class T>
[[gnu::noinline]] inline void store_edge_tile(const Vec<T> (&y)[m][m], const Result<T>& result, int64_t offset, int64_t rows,
                                              int64_t columns) {
  for (int64_t i = 0; i < std::min<int64_t>(m, rows); ++i) {
    T* to = result.data + offset + i * result.strides.h;
    if (result.layout == Layout::channels_last) {
      for (int64_t j = 0; j < std::min<int64_t>(m, columns); ++j) store(to + j * result.strides.w, y[i][j]);
    } else {
      store_columns(to, result.strides.c, y[i], columns);
    }
  }
}

// to = epilogue(A^T value A). False where a sum is not finite before the epilogue.
template <class F, class T>
inline bool store_output_tile(const T* value, int64_t position_stride, Vec<T> bias, bool relu, const Result<T>& result,
                              int64_t offset, int64_t rows, int64_t columns) {
  Vec<T> half[F::m][F::tile];
  TORCHCNN_UNROLL
  for (int j = 0; j < F::tile; ++j) {
    Vec<T> column[F::tile], y[F::m];
    TORCHCNN_UNROLL
    for (int i = 0; i < F::tile; ++i) column[i] = load(value + (i * F::tile + j) * position_stride);
    F::template output<T>(column, y);
    TORCHCNN_UNROLL
    for (int i = 0; i < F::m; ++i) half[i][j] = y[i];
  }
  Vec<T> zero{};  // stays zero as long as everything is finite: Inf 0 = NaN
  const Vec<T> least = broadcast(relu ? T(0) : -std::numeric_limits<T>::infinity());
  const auto finish = [&](auto store_row) __attribute__((always_inline)) {
    TORCHCNN_UNROLL
    for (int i = 0; i < F::m; ++i) {
      Vec<T> y[F::m];
      F::template output<T>(half[i], y);
      TORCHCNN_UNROLL
      for (int j = 0; j < F::m; ++j) {
        zero += y[j] * T(0);
        y[j] = y[j] + bias;
        y[j] = y[j] < least ? least : y[j];
      }
      store_row(i, y);
    }
  };
  const bool whole = rows >= F::m && columns >= F::m;
  T* const to = result.data + offset;
  if (whole && result.layout == Layout::channels_last) {
    finish([&](int i, const Vec<T>(&y)[F::m]) __attribute__((always_inline)) {
      TORCHCNN_UNROLL
      for (int j = 0; j < F::m; ++j) store(to + i * result.strides.h + j * result.strides.w, y[j]);
    });
  } else if (whole) {
    finish([&](int i, const Vec<T>(&y)[F::m]) __attribute__((always_inline)) {
      store_columns(to + i * result.strides.h, result.strides.c, y, std::integral_constant<int64_t, F::m>{});
    });
  } else {
    Vec<T> tile[F::m][F::m];
    finish([&](int i, const Vec<T>(&y)[F::m]) __attribute__((always_inline)) {
      TORCHCNN_UNROLL
      for (int j = 0; j < F::m; ++j) tile[i][j] = y[j];
    });
    store_edge_tile(tile, result, offset, rows, columns);
  }
  bool finite = true;
  for (int64_t lane = 0; lane < kLanes<T>; ++lane) finite &= zero[lane] == T(0);
  return finite;
}

}  // namespace torchcnn::TORCHCNN_ISA::winograd
