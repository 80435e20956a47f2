// Convolution with filters of 3x3, 5x5, or 3, 5 or 7 taps along one axis by Winograd's minimal filtering: the result is cut into
// tiles, tiles and filters are transformed (conv2d_winograd_transforms.h), and at each position xi of a transformed tile what is
// left is a matrix product (Lavin and Gray 2016, section 4; equation 12 and algorithm 1):
//
//   forward      M[xi][tile][k] = sum_c V[xi][tile][c] U[xi][c][k]         V = B^T x B, U = G g G^T, output tile = A^T M A
//   grad_input   the same of grad_output, with every filter turned by 180 degrees and c and k exchanged
//
//   V[xi][tile][C + pad]    M[xi][tile][K + pad]    U[xi][k / nr][c][k % nr]
//
// The strides of tiles and positions are kept off the powers of two, which would fall into few cache sets. A dilated convolution
// is one of stride 1 for each phase (p mod dilation_h, q mod dilation_w), whose tiles have their elements so far apart. Tiles
// that the right or the bottom edge cuts off take part in the products that the rest of them needs. Large filters of a stride s
// above 1, as first layers have them, are filters of stride 1 on the phases (a, b) of the input, which are channels then:
//
//   output[p][q] = sum_{a,b} sum_{t,u} weight[t s + a][u s + b] input[(p + t) s + a - pad][(q + u) s + b - pad]
//
// Tiles do not cross images and every element is summed over c in one order, so results depend neither on the number of threads
// nor, for an image, on the others. Intermediate values mix all elements of a tile, so that one Inf or NaN would spread over it:
// a tile whose result is not finite is computed again by implicit GEMM. The caller guarantees the filter and stride of F and at
// least kLanes<T> filters in a group, and as many channels but for phases. grad_weight: conv2d_winograd_grad_weight.h.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "../geometry.h"
#include "conv2d_implicit_gemm.h"
#include "conv2d_winograd_tiles.h"
#include "conv2d_winograd_transforms.h"
#include "runtime.h"
#include "simd.h"

namespace torchcnn::TORCHCNN_ISA::winograd {

// Register tile: 6 x 2 accumulators + 2 vectors of U or D + 1 broadcast element of V in 16 registers.
inline constexpr int64_t mr = 6;
template <class T>
inline constexpr int64_t nr = 2 * kLanes<T>;

// Cache blocks. kc x nr elements of U are 16 KiB, half of L1. Up to max_tiles tiles are multiplied by up to max_filters filters
// at a time: at 256 channels V is 36 x 24 x 272 floats = 0.9 MiB, of which one position (26 KiB) is in use, and M 0.3 MiB. Of
// tiles of one row or column, with fewer positions, four times as many.
template <class T>
inline constexpr int64_t kc = (16 << 10) / (nr<T> * sizeof(T));
template <class F>
inline constexpr int64_t max_tiles = (F::positions <= 12 ? 16 : 4) * mr;
template <class T>
inline constexpr int64_t max_filters = 64 / nr<T> * nr<T>;
// Of U and V, the larger is streamed: made in parts, each multiplied with all of the smaller, unless U is small enough for the
// caches anyway. Neither may be larger than resident_bytes as a whole.
inline constexpr int64_t small_bytes = int64_t(4) << 20, resident_bytes = int64_t(16) << 20;
// A part of U that is made, used and forgotten should stay in L2 in between.
inline constexpr int64_t streamed_bytes = int64_t(1) << 19;
// Filters of so many channels are transformed, or their gradients put together, at a time: filters can lie powers of two apart,
// which would fall into few cache sets.
inline constexpr int64_t channels_together = 8;
template <class T>
inline constexpr int64_t line_channels = 64 / sizeof(T);  // of a cache line, in channels_last weights
template <class T, int taps>
inline constexpr int64_t together_row = (channels_together * taps * sizeof(T) / 64 + 1) * 64 / sizeof(T) + 16 / sizeof(T);

template <class T>
int64_t padded_stride(int64_t elements) {
  constexpr int64_t line = 64 / sizeof(T);
  return (ceil_div(elements, line) | 1) * line;
}

// sums[rows][nr] (+)= sum_i left[row row_step + i left_step] right[i right_step ... + nr]. Over channels (along_row: the sum runs
// along a row of V) it goes on where it stopped, so that it does not matter where the blocks end; over tiles (down the columns of
// V), which can be many, blocks are summed up first.
template <int64_t rows, bool along_row, class T>
[[gnu::always_inline]] inline void microkernel(int64_t length, const T* left, int64_t left_row, const T* right,
                                               int64_t right_step, bool accumulate, T* sums, int64_t sums_row) {
  const int64_t row_step = along_row ? left_row : 1, left_step = along_row ? 1 : left_row;
  Vec<T> sum[rows][2] = {};
  if (along_row && accumulate) {
    TORCHCNN_UNROLL
    for (int row = 0; row < rows; ++row) {
      TORCHCNN_UNROLL
      for (int v = 0; v < 2; ++v) sum[row][v] = load(sums + row * sums_row + v * kLanes<T>);
    }
  }
  for (int64_t i = 0; i < length; ++i) {
    const Vec<T> b[2] = {load(right), load(right + kLanes<T>)};
    TORCHCNN_UNROLL
    for (int row = 0; row < rows; ++row) {
      const T a = left[row * row_step];
      sum[row][0] += a * b[0];
      sum[row][1] += a * b[1];
    }
    if (!along_row) __builtin_prefetch(left + 24);  // of the next rows: they come from L2 or beyond, a line at a time
    left += left_step;
    right += right_step;
  }
  TORCHCNN_UNROLL
  for (int row = 0; row < rows; ++row) {
    TORCHCNN_UNROLL
    for (int v = 0; v < 2; ++v) {
      T* to = sums + row * sums_row + v * kLanes<T>;
      store(to, !along_row && accumulate ? load(to) + sum[row][v] : sum[row][v]);
    }
  }
}

template <bool along_row, class T>
void multiply_rows(int64_t rows, int64_t length, const T* left, int64_t left_row, const T* right, int64_t right_step,
                   bool accumulate, T* sums, int64_t sums_row) {
  const auto call = [&]<int64_t count>(std::integral_constant<int64_t, count>) {
    microkernel<count, along_row>(length, left, left_row, right, right_step, accumulate, sums, sums_row);
  };
  switch (rows) {
    case 1: return call(std::integral_constant<int64_t, 1>{});
    case 2: return call(std::integral_constant<int64_t, 2>{});
    case 3: return call(std::integral_constant<int64_t, 3>{});
    case 4: return call(std::integral_constant<int64_t, 4>{});
    case 5: return call(std::integral_constant<int64_t, 5>{});
    default: return call(std::integral_constant<int64_t, 6>{});
  }
}

// Calls visit(c) for the first channel of vectors that cover 0 ... channels - 1; the last may overlap the one before it.
template <class T, class Visit>
void for_each_vector(int64_t channels, Visit visit) {
  for (int64_t c = 0; c < channels; c += kLanes<T>) visit(std::min(c, channels - kLanes<T>));
}

// Along an axis, tile i of phase a computes elements a + (first + i out) dilation, + dilation, ... of the result, from those of
// the source at a - pad + i step dilation, + dilation, .... `wanted`: outputs of the last tile, in the longest phase.
struct Axis {
  int64_t phases, dilation, first, pad, tiles, wanted;
  bool cut;  // wanted < out
};
template <class Along>
Axis axis_of(int64_t size, int64_t dilation, int64_t first, int64_t pad) {
  const int64_t results = ceil_div(size, dilation) - first, tiles = ceil_div(results, Along::out);
  const int64_t wanted = results - (tiles - 1) * Along::out;
  return {std::min(size, dilation), dilation, first, pad, tiles, wanted, wanted < Along::out};
}

// The axes of the outputs: of forward and grad_weight.
template <class Along>
Axis output_axis(int64_t size, int64_t dilation, int64_t pad) {
  return axis_of<Along>(size, dilation, 0, pad);
}
// The axis of grad_input. At stride 2 tiles start where h + pad is odd.
template <class Along>
Axis input_axis(int64_t size, int64_t dilation, int64_t pad) {
  if (Along::stride == 1) return axis_of<Along>(size, dilation, 0, (Along::r - 1) * dilation - pad);
  const int64_t first = pad % 2 - 1;
  return axis_of<Along>(size, 1, first, (1 - first - pad) / 2);
}

// Numbering of tiles: of all images, phase by phase, row by row.
struct Tiling {
  Axis h, w;
  int64_t per_image() const { return h.phases * w.phases * h.tiles * w.tiles; }
  bool is_right(int64_t tile) const { return w.cut && tile % w.tiles == w.tiles - 1; }
  bool is_bottom(int64_t tile) const { return h.cut && tile / w.tiles % h.tiles == h.tiles - 1; }
};

// Where tiles begin ... end - 1 have their rows in V, D and M. Those cut off by the right or the bottom edge do not need all
// positions; sorted so that the tiles of every position follow each other:
//
//   cut at the right | whole | cut at the bottom | cut at both
struct Places {
  int64_t start[5], shift[4];  // of each kind: its first place, and from a tile's number in its kind to its place
  Tiling tiling;

  Places(const Tiling& tiling, int64_t begin, int64_t end) : start{}, tiling(tiling) {
    int64_t before[4], until[4];
    count(begin, before), count(end, until);
    for (int kind = 0; kind < 4; ++kind) {
      start[kind + 1] = start[kind] + until[kind] - before[kind];
      shift[kind] = start[kind] - before[kind];
    }
  }
  int64_t operator()(int64_t tile) const {
    int64_t before[4];
    count(tile, before);
    const int kind = tiling.is_bottom(tile) ? (tiling.is_right(tile) ? 3 : 2) : (tiling.is_right(tile) ? 0 : 1);
    return before[kind] + shift[kind];
  }
  int64_t size() const { return start[4]; }

  // Those of tile, tile + 1, ... of a run, of which only the last can be cut at the right.
  auto of_run(int64_t tile, int64_t count) const {
    return
        [first = (*this)(tile), last = (*this)(tile + count - 1), count](int64_t t) { return t < count - 1 ? first + t : last; };
  }

  // The places of the tiles that need position xi.
  struct Range {
    int64_t begin, end;
  };
  template <class F>
  Range needing(int64_t xi) const {
    const bool bottom = F::H::needs(int(xi / F::W::points), int(tiling.h.wanted)),
               right = F::W::needs(int(xi % F::W::points), int(tiling.w.wanted));
    return {right ? 0 : start[1], !bottom ? start[2] : right ? start[4] : start[3]};
  }

 private:
  // Of the tiles before `tile`, how many are of each kind.
  void count(int64_t tile, int64_t (&of)[4]) const {
    const int64_t columns = tiling.w.tiles, rows = tile / columns, rest = tile % columns;
    const int64_t bottom_rows = tiling.h.cut ? rows / tiling.h.tiles : 0, right = tiling.w.cut;
    of[0] = (rows - bottom_rows) * right, of[1] = (rows - bottom_rows) * (columns - right);
    of[2] = bottom_rows * (columns - right), of[3] = bottom_rows * right;
    of[tiling.is_bottom(tile) ? 2 : 1] += rest;
  }
};

// Neighbouring tiles in a row, and where the first has its first element in the source and in the result.
struct Run {
  int64_t n, source_h, source_w, result_h, result_w, count;
};
template <class F>
Run run_at(const Tiling& t, int64_t tile, int64_t end) {
  const int64_t j = tile % t.w.tiles, i = tile / t.w.tiles % t.h.tiles, phase = tile / t.w.tiles / t.h.tiles;
  const int64_t a = phase / t.w.phases % t.h.phases, b = phase % t.w.phases;
  return {phase / (t.h.phases * t.w.phases),
          a - t.h.pad + i * F::H::step * t.h.dilation,
          b - t.w.pad + j * F::W::step * t.w.dilation,
          a + (t.h.first + i * F::H::out) * t.h.dilation,
          b + (t.w.first + j * F::W::out) * t.w.dilation,
          std::min({max_run<F>, t.w.tiles - j, end - tile})};
}

// Calls visit(tile, run) for the runs that tiles begin ... end - 1 fall into.
template <class F, class Visit>
void for_each_run(const Tiling& tiling, int64_t begin, int64_t end, Visit visit) {
  for (int64_t tile = begin; tile < end;) {
    const Run run = run_at<F>(tiling, tile, end);
    visit(tile, run);
    tile += run.count;
  }
}

// How many parts of at most `largest` units to cut `units` into: at least one a thread where there are enough units.
inline int64_t parts_of(int64_t units, int64_t largest) {
  const int64_t threads = thread_count(), parts = ceil_div(units, largest);
  return std::min(units, ceil_div(parts, threads) * threads);
}

// Part `part` of the panels of K filters. A last panel with fewer than nr filters stays with the one before it, so that every
// part fills a vector.
struct Panels {
  int64_t begin, end;
};
template <class T>
int64_t full_panels(int64_t K) {
  return std::max<int64_t>(1, K / nr<T>);
}
template <class T>
Panels panels_of(int64_t part, int64_t parts, int64_t K) {
  const int64_t full = full_panels<T>(K);
  return {part * full / parts, part + 1 == parts ? ceil_div(K, nr<T>) : (part + 1) * full / parts};
}

// One group of channels, of N images: forward, or grad_input with source = grad_output.
template <class T, class Source = Images<const T>>
struct Correlation {
  int64_t N, C, K;
  Tiling tiling;
  Source source;
  Images<T> result;
  const T* weight;
  int64_t k_stride, c_stride, tap_stride;
  Epilogue<T> epilogue;
  unsigned char* not_finite;  // one for each tile
};

// to + place row + xi position_stride = B^T x B of tiles begin ... end - 1, for all channels.
template <class F, class T, class Source>
void transform_inputs(const Source& images, const Tiling& tiling, int64_t channels, int64_t begin, int64_t end,
                      const Places& places, T* to, int64_t row, int64_t position_stride) {
  constexpr int64_t L = kLanes<T>, beside = std::max<int64_t>(1, 64 / TORCHCNN_VECTOR_BYTES);  // vectors of a cache line
  alignas(64) T band[beside][band_in<F, T>];
  for_each_run<F>(tiling, begin, end, [&](int64_t tile, const Run& run) {
    const int64_t columns = (run.count - 1) * F::W::step + F::W::in;
    const auto patch = patch_of(images, run.n, run.source_h, run.source_w, F::H::in, columns);
    const auto place = places.of_run(tile, run.count);
    const int64_t last = run.count - 1;
    const bool bottom = tiling.is_bottom(tile), right = tiling.is_right(tile + last);
    for (int64_t c_line = 0; c_line < channels; c_line += beside * L) {
      for (int64_t v = 0; v < beside && c_line + v * L < channels; ++v) {
        read_band(images, patch, std::min(c_line + v * L, channels - L), band[v]);
        if (bottom) extend_tile<typename F::H>(band[v], columns * L, columns, L, tiling.h.wanted);
        if (right) extend_tile<typename F::W>(band[v] + last * F::W::step * L, L, F::H::in, columns * L, tiling.w.wanted);
      }
      for (int64_t t = 0; t < run.count; ++t)
        for (int64_t v = 0; v < beside && c_line + v * L < channels; ++v)
          transform_tile<F, true>(band[v] + t * F::W::step * L, columns * L,
                                  to + place(t) * row + std::min(c_line + v * L, channels - L), position_stride);
    }
  });
}

// transform_weights for weights in channels_last. Lanes lie side by side in grad_input; in forward they are brought there, a line
// of the cache of each filter and tap at a time.
template <class F, bool flipped, class T, class Source>
void transform_channels_last_weights(const Correlation<T, Source>& x, const Panels& of, int64_t c_begin, int64_t c_end, T* to,
                                     int64_t position_stride) {
  constexpr int64_t L = kLanes<T>, taps = F::taps;
  const auto U = [&](int64_t panel, int64_t c) { return to + ((panel - of.begin) * (c_end - c_begin) + c - c_begin) * nr<T>; };
  const int64_t k_begin = of.begin * nr<T>, k_end = std::min(of.end * nr<T>, x.K);
  if constexpr (flipped) {
    alignas(64) T copied[taps * L];
    for (int64_t c = c_begin; c < c_end; ++c) {
      const T* const from = x.weight + c * x.c_stride;
      for (int64_t t = 0; t < taps; ++t) gemm::prefetch(from + 2 * x.c_stride + t * x.tap_stride + k_begin, k_end - k_begin);
      for (int64_t k = k_begin; k < of.end * nr<T>; k += L) {
        const bool whole = k + L <= k_end;
        for (int64_t t = 0; t < (whole ? 0 : taps); ++t)
          store(copied + t * L, k < k_end ? load_partial(from + t * x.tap_stride + k, k_end - k) : Vec<T>{});
        transform_weight_lanes<F, flipped>(whole ? from + k : copied, whole ? x.tap_stride : L, U(k / nr<T>, c) + k % nr<T>,
                                           position_stride);
      }
    }
  } else {
    alignas(64) T lanes[line_channels<T> * taps * nr<T>];  // [channel][tap][filter]
    for (int64_t panel = of.begin; panel < of.end; ++panel)
      for (int64_t c = c_begin; c < c_end; c += line_channels<T>) {
        const int64_t count = std::min(line_channels<T>, c_end - c), k = panel * nr<T>;
        const int64_t filters = std::min(nr<T>, k_end - k);
        for (int64_t t = 0; t < taps; ++t) {
          const T* const from = x.weight + k * x.k_stride + t * x.tap_stride + c;
          for (int64_t lane = 0; lane < filters; ++lane)  // the next line of each: too far from the others to be guessed
            __builtin_prefetch(from + lane * x.k_stride + line_channels<T>, 0, 2);
          gemm::pack_transposed(from, x.k_stride, filters, count, lanes, [&](int64_t i) { return i * taps + t; });
        }
        for (int64_t i = 0; i < count; ++i)
          for (int64_t v = 0; v < nr<T>; v += L)
            transform_weight_lanes<F, flipped>(lanes + i * taps * nr<T> + v, nr<T>, U(panel, c + i) + v, position_stride);
      }
  }
}

// U of some panels, for channels c_begin ... c_end - 1, at to + xi position_stride + ((panel - of.begin) channels + c - c_begin)
// nr. In grad_input the filters of one channel follow each other, and are read as they lie; but not the last ones where a filter
// is shorter than what is read of it.
template <class F, bool flipped, class T, class Source>
void transform_weights(const Correlation<T, Source>& x, const Panels& of, int64_t c_begin, int64_t c_end, T* to,
                       int64_t position_stride) {
  constexpr int64_t L = kLanes<T>, taps = F::taps;
  constexpr int64_t together = channels_together, row = together_row<T, taps>;
  const int64_t k_begin = of.begin * nr<T>, k_end = of.end * nr<T>;
  if (x.tap_stride > 1) return transform_channels_last_weights<F, flipped>(x, of, c_begin, c_end, to, position_stride);
  const auto U = [&](int64_t k, int64_t c) {
    return to + ((k / nr<T> - of.begin) * (c_end - c_begin) + c - c_begin) * nr<T> + k % nr<T>;
  };
  const int64_t k_whole = flipped ? std::min(k_end, (x.K - (taps < group<T>)) / L * L) : k_begin;
  for (int64_t c = c_begin; flipped && c < c_end; ++c)
    for (int64_t k = k_begin; k < k_whole; k += L)
      transform_weight_tile<F, flipped>(x.weight + k * x.k_stride + c * x.c_stride, x.k_stride, U(k, c), position_stride);

  alignas(64) T copied[L * row];
  for (int64_t k = k_whole; k < k_end; k += L) {
    const int64_t filters = std::clamp<int64_t>(x.K - k, 0, L);
    std::fill(copied + filters * row, copied + L * row, T(0));
    for (int64_t c = c_begin; c < c_end; c += together) {
      const int64_t count = std::min(together, c_end - c);
      for (int64_t lane = 0; lane < filters; ++lane) {
        const T* from = x.weight + (k + lane) * x.k_stride + c * x.c_stride;
        if (x.c_stride == taps)
          implicit_gemm::copy_row(from, count * taps, copied + lane * row);
        else
          for (int64_t i = 0; i < count; ++i)
            std::memcpy(copied + lane * row + i * taps, from + i * x.c_stride, taps * sizeof(T));
      }
      for (int64_t i = 0; i < count; ++i) transform_weight_tile<F, flipped>(copied + i * taps, row, U(k, c + i), position_stride);
    }
  }
}

// M (+)= V U at every position, for channels c_begin ... c_end - 1 (V starts at the first of them, U too).
template <class F, class T>
void multiply(const Places& places, int64_t panels, int64_t channels, const T* V, int64_t V_row, int64_t V_position, const T* U,
              int64_t U_row, int64_t U_position, bool accumulate, T* M, int64_t M_row, int64_t M_position) {
  for (int64_t xi = 0; xi < F::positions; ++xi) {
    const auto [begin, end] = places.needing<F>(xi);
    if (!accumulate) {
      T* to = M + xi * M_position;
      std::fill(to, to + begin * M_row, T(0));
      std::fill(to + end * M_row, to + places.size() * M_row, T(0));
    }
    for (int64_t c = 0; c < channels; c += kc<T>)
      for (int64_t panel = 0; panel < panels; ++panel)
        for (int64_t place = begin, rows = 0; place < end; place += rows) {
          rows = gemm::tile_rows(end - place);
          multiply_rows<true>(rows, std::min(kc<T>, channels - c), V + xi * V_position + place * V_row + c, V_row,
                              U + xi * U_position + panel * U_row + c * nr<T>, nr<T>, accumulate || c > 0,
                              M + xi * M_position + place * M_row + panel * nr<T>, M_row);
        }
  }
}

// The results of `filters` filters from k_begin on at tiles begin ... end - 1.
template <class F, class T, class Source>
void store_outputs(const Correlation<T, Source>& x, int64_t begin, int64_t end, const Places& places, int64_t k_begin,
                   int64_t filters, const T* M, int64_t M_row, int64_t M_position) {
  constexpr int64_t L = kLanes<T>;
  alignas(64) T band[band_out<F, T>];
  for_each_run<F>(x.tiling, begin, end, [&](int64_t tile, const Run& run) {
    const int64_t columns = run.count * F::W::out;
    const Patch patch(x.result, run.n, run.result_h, run.result_w, F::H::out, columns);
    const auto place = places.of_run(tile, run.count);
    Vec<T> zero[max_run<F>] = {};
    for_each_vector<T>(filters, [&](int64_t k) {
      const T* bias = x.epilogue.bias == nullptr ? nullptr : x.epilogue.bias + k_begin + k;
      for (int64_t t = 0; t < run.count; ++t)
        transform_output_tile<F>(M + place(t) * M_row + k, M_position, bias, x.epilogue.relu, band + t * F::W::out * L,
                                 columns * L, zero[t]);
      write_band(band, x.result, patch, k_begin + k);
    });
    for (int64_t t = 0; t < run.count; ++t)
      if (horizontal_sum<T>(zero[t]) != T(0)) __atomic_store_n(x.not_finite + tile + t, 1, __ATOMIC_RELAXED);
  });
}

template <class F, bool flipped, class T, class Source>
void correlate(const Correlation<T, Source>& x) {
  constexpr int64_t positions = F::positions;
  const int64_t tiles = x.N * x.tiling.per_image(), panels = ceil_div(x.K, nr<T>), panel_size = x.C * nr<T>;
  const int64_t channels = std::max(x.C, kLanes<T>);  // of V, whose vectors are whole
  const int64_t V_row = padded_stride<T>(channels), threads = thread_count();
  const int64_t transform_cost = positions * 8;  // of one tile and vector of channels, about
  const int64_t U_bytes = positions * panels * panel_size * int64_t(sizeof(T)),
                V_bytes = positions * tiles * V_row * int64_t(sizeof(T));
  const bool tiles_outside = U_bytes <= small_bytes || (U_bytes <= V_bytes && U_bytes <= resident_bytes);

  if (tiles_outside && tiles >= 2 * mr * threads) {
    const int64_t U_position = panels * panel_size + 16;
    T* U = workspace<T>(Slot::packed_weight, positions * U_position);
    parallel_for(panels, x.C * transform_cost, [&](int64_t panel) {
      transform_weights<F, flipped>(x, {panel, panel + 1}, 0, x.C, U + panel * panel_size, U_position);
    });
    const int64_t parts = parts_of(tiles, max_tiles<F>);
    parallel_for(parts, tiles / parts * x.C * x.K * positions / kLanes<T>, [&](int64_t part) {
      const int64_t begin = part * tiles / parts, end = (part + 1) * tiles / parts, V_position = (end - begin) * V_row + 16;
      const Places places(x.tiling, begin, end);
      T* V = workspace<T>(Slot::patches, positions * V_position);
      transform_inputs<F>(x.source, x.tiling, channels, begin, end, places, V, V_row, V_position);
      const int64_t k_parts = ceil_div(full_panels<T>(x.K), max_filters<T> / nr<T>);
      for (int64_t k_part = 0; k_part < k_parts; ++k_part) {
        const Panels of = panels_of<T>(k_part, k_parts, x.K);
        const int64_t M_row = padded_stride<T>((of.end - of.begin) * nr<T>), M_position = (end - begin) * M_row + 16;
        T* M = workspace<T>(Slot::tile, positions * M_position);
        multiply<F>(places, of.end - of.begin, x.C, V, V_row, V_position, U + of.begin * panel_size, panel_size, U_position,
                    false, M, M_row, M_position);
        store_outputs<F>(x, begin, end, places, of.begin * nr<T>, std::min(of.end * nr<T>, x.K) - of.begin * nr<T>, M, M_row,
                         M_position);
      }
    });
    return;
  }

  // As many tiles as V may hold, transformed once; then each part of the filters is transformed, some channels at a time, and
  // multiplied with all of them.
  const int64_t chunk =
      std::max<int64_t>(max_tiles<F>, resident_bytes / (positions * V_row * int64_t(sizeof(T))) / max_tiles<F> * max_tiles<F>);
  for (int64_t chunk_begin = 0; chunk_begin < tiles; chunk_begin += chunk) {
    const int64_t chunk_end = std::min(tiles, chunk_begin + chunk), count = chunk_end - chunk_begin;
    const int64_t V_position = count * V_row + 16;
    const Places places(x.tiling, chunk_begin, chunk_end);
    T* V = workspace<T>(Slot::patches, positions * V_position);
    const int64_t runs = ceil_div(count, max_run<F>);
    parallel_for(runs, max_run<F> * x.C * transform_cost / kLanes<T>, [&](int64_t index) {
      const int64_t begin = chunk_begin + index * max_run<F>, end = std::min(chunk_end, begin + max_run<F>);
      transform_inputs<F>(x.source, x.tiling, channels, begin, end, places, V, V_row, V_position);
    });
    const int64_t parts = parts_of(full_panels<T>(x.K), max_filters<T> / nr<T>);
    parallel_for(parts, ceil_div(panels, parts) * panel_size * positions, [&](int64_t part) {
      const Panels of = panels_of<T>(part, parts, x.K);
      const int64_t part_panels = of.end - of.begin;
      const int64_t M_row = padded_stride<T>(part_panels * nr<T>), M_position = count * M_row + 16;
      // M is gone through once for each block of channels: worth it only where it stays in L2 as well.
      const int64_t fitting = streamed_bytes / (positions * part_panels * nr<T> * int64_t(sizeof(T)));
      const bool M_stays = positions * M_position * int64_t(sizeof(T)) <= streamed_bytes;
      const int64_t at_once = M_stays ? std::min(x.C, std::max<int64_t>(8, fitting / 8 * 8)) : x.C;
      const int64_t U_position = part_panels * at_once * nr<T> + 16;
      T* M = workspace<T>(Slot::tile, positions * M_position);
      T* U = workspace<T>(Slot::packed_weight, positions * U_position);
      for (int64_t c = 0; c < x.C; c += at_once) {
        const int64_t c_count = std::min(at_once, x.C - c);
        transform_weights<F, flipped>(x, of, c, c + c_count, U, U_position);
        multiply<F>(places, part_panels, c_count, V + c, V_row, V_position, U, c_count * nr<T>, U_position, c > 0, M, M_row,
                    M_position);
      }
      store_outputs<F>(x, chunk_begin, chunk_end, places, of.begin * nr<T>, std::min(of.end * nr<T>, x.K) - of.begin * nr<T>, M,
                       M_row, M_position);
    });
  }
}

// Puts into the tiles whose results are not finite what implicit GEMM gives: direct(n, image) computes all of image n by it.
// not_finite[group][tile].
template <class F, class T, class Direct>
void recompute_tiles(int64_t N, int64_t groups, int64_t channels, const Tiling& tiling, const Images<T>& result,
                     const unsigned char* not_finite, Direct direct) {
  const int64_t per_image = tiling.per_image();
  const Strides& s = result.strides;
  for (int64_t n = 0; n < N; ++n) {
    T* image = nullptr;
    for (int64_t group = 0; group < groups; ++group) {
      for (int64_t tile = n * per_image; tile < (n + 1) * per_image; ++tile) {
        if (!not_finite[group * N * per_image + tile]) continue;
        if (image == nullptr) direct(n, image = workspace<T>(Slot::gradient, s.n));
        const Run run = run_at<F>(tiling, tile, tile + 1);
        const Patch patch(result, 0, run.result_h, run.result_w, F::H::out, F::W::out);
        for (int64_t k = group * channels; k < (group + 1) * channels; ++k)
          for (int64_t i = patch.row.begin; i < patch.row.end; ++i)
            for (int64_t j = patch.column.begin; j < patch.column.end; ++j) {
              const int64_t at = patch.origin + k * s.c + i * result.dilation_h * s.h + j * result.dilation_w * s.w;
              result.data[n * s.n + at] = image[at];
            }
      }
    }
  }
}

// Calls visit(place, place in NCHW) for every weight.
template <class Visit>
void for_each_weight(const Conv2dGeometry& g, const Visit& visit) {
  const Strides s = g.weight_strides();
  const int64_t C = g.C_per_group(), taps = g.R * g.S;
  for (int64_t k = 0; k < g.K; ++k)
    for (int64_t c = 0; c < C; ++c)
      for (int64_t t = 0; t < taps; ++t) visit(k * s.n + c * s.c + t * s.w, (k * C + c) * taps + t);
}

// The weights in NCHW, for implicit GEMM.
template <class T>
const T* weight_in_nchw(const Conv2dGeometry& g, const T* weight) {
  if (g.weight_layout == Layout::nchw) return weight;
  T* const to = workspace<T>(Slot::weight_copy, g.K * g.weight_strides().n);
  for_each_weight(g, [&](int64_t place, int64_t in_nchw) { to[in_nchw] = weight[place]; });
  return to;
}

template <class T>
unsigned char* cleared_flags(int64_t count) {
  unsigned char* flags = workspace<unsigned char>(Slot::flags, count);
  std::fill(flags, flags + count, 0);
  return flags;
}

// All groups: filters[k][C], with the strides `of_filters`, on the channels that source_of(group) has; where an output is not
// finite, weight on input.
template <class F, class T, class SourceOf>
void correlate_groups(const Conv2dGeometry& g, const Tiling& tiling, int64_t C, const SourceOf& source_of, const T* filters,
                      const Strides& of_filters, const T* input, const T* weight, const Epilogue<T>& epilogue, T* output) {
  const Strides out = g.output_strides();
  const int64_t K = g.K_per_group(), tiles = g.N * tiling.per_image();
  unsigned char* not_finite = cleared_flags<T>(g.G * tiles);
  const auto images = [&](T* data) { return Images<T>{data, g.P, g.Q, out, g.layout, g.dilation_h, g.dilation_w}; };
  for (int64_t group = 0; group < g.G; ++group) {
    const Epilogue<T> end{epilogue.bias == nullptr ? nullptr : epilogue.bias + group * K, epilogue.relu};
    const auto source = source_of(group);
    const Correlation<T, std::remove_const_t<decltype(source)>> x{g.N,
                                                                  C,
                                                                  K,
                                                                  tiling,
                                                                  source,
                                                                  images(output + group * K * out.c),
                                                                  filters + group * K * of_filters.n,
                                                                  of_filters.n,
                                                                  of_filters.c,
                                                                  of_filters.w,
                                                                  end,
                                                                  not_finite + group * tiles};
    correlate<F, false>(x);
  }
  Conv2dGeometry one = g;
  one.N = 1;
  const T* in_nchw = nullptr;
  recompute_tiles<F>(g.N, g.G, K, tiling, images(output), not_finite, [&](int64_t n, T* image) {
    if (in_nchw == nullptr) in_nchw = weight_in_nchw(g, weight);
    implicit_gemm::conv2d_forward(one, input + n * g.input_strides().n, in_nchw, epilogue, image);
  });
}

template <class F, class T>
void conv2d_forward(const Conv2dGeometry& g, const T* input, const T* weight, const Epilogue<T>& epilogue, T* output) {
  const Strides in = g.input_strides();
  const int64_t C = g.C_per_group();
  const Tiling tiling{output_axis<typename F::H>(g.P, g.dilation_h, g.pad_h),
                      output_axis<typename F::W>(g.Q, g.dilation_w, g.pad_w)};
  const auto source_of = [&](int64_t group) {
    return Images<const T>{input + group * C * in.c, g.H, g.W, in, g.layout, g.dilation_h, g.dilation_w};
  };
  correlate_groups<F>(g, tiling, C, source_of, weight, g.weight_strides(), input, weight, epilogue, output);
}

// The phases of a stride as channels.
template <class T>
PhaseImages<const T> phase_images(const Conv2dGeometry& g, const T* input, int64_t group) {
  const Strides in = g.input_strides();
  const int64_t C = g.C_per_group();
  return {input + group * C * in.c, g.H, g.W, in, g.stride_h, g.stride_w, g.pad_h, g.pad_w, C};
}

// Calls visit(place in the weight, place in the filters of the phases) for every tap of every filter. The latter have more taps,
// zeros, unless the stride divides the kernel.
template <class F, class Visit>
void for_each_tap_of_phases(const Conv2dGeometry& g, const Visit& visit) {
  const int64_t C = g.C_per_group(), stride_h = g.stride_h, stride_w = g.stride_w;
  const Strides of_weight = g.weight_strides();
  parallel_for(g.K, C * g.R * g.S, [&](int64_t k) {
    for (int64_t c = 0; c < C; ++c)
      for (int64_t r = 0; r < g.R; ++r)
        for (int64_t s = 0; s < g.S; ++s) {
          const int64_t channel = ((k * stride_h + r % stride_h) * C + c) * stride_w + s % stride_w;
          visit(k * of_weight.n + c * of_weight.c + r * of_weight.h + s * of_weight.w,
                (channel * F::H::r + r / stride_h) * F::W::r + s / stride_w);
        }
  });
}

template <class F, class T>
void conv2d_forward_of_phases(const Conv2dGeometry& g, const T* input, const T* weight, const Epilogue<T>& epilogue, T* output) {
  const int64_t C = g.C_per_group() * g.stride_h * g.stride_w, size = g.K * C * F::taps;
  const Tiling tiling{output_axis<typename F::H>(g.P, 1, 0), output_axis<typename F::W>(g.Q, 1, 0)};
  T* const filters = workspace<T>(Slot::filter_rows, size);
  fill(filters, size, T(0));
  for_each_tap_of_phases<F>(g, [&](int64_t of_weight, int64_t of_phase) { filters[of_phase] = weight[of_weight]; });
  const auto source_of = [&](int64_t group) { return phase_images(g, input, group); };
  const Strides of_filters = activation_strides(Layout::nchw, C, F::H::r, F::W::r);
  correlate_groups<F>(g, tiling, C, source_of, static_cast<const T*>(filters), of_filters, input, weight, epilogue, output);
}

template <class F, class T>
void conv2d_grad_input(const Conv2dGeometry& g, const T* grad_output, const T* weight, T* grad_input) {
  const Strides in = g.input_strides(), out = g.output_strides();
  const Strides of_weight = g.weight_strides();
  const int64_t C = g.C_per_group(), K = g.K_per_group();
  const Tiling tiling{input_axis<typename F::H>(g.H, g.dilation_h, g.pad_h),
                      input_axis<typename F::W>(g.W, g.dilation_w, g.pad_w)};
  const int64_t tiles = g.N * tiling.per_image();
  unsigned char* not_finite = cleared_flags<T>(g.G * tiles);
  const Images<T> result{grad_input, g.H, g.W, in, g.layout, g.dilation_h, g.dilation_w};
  for (int64_t group = 0; group < g.G; ++group) {
    const Correlation<T> x{g.N,
                           K,
                           C,
                           tiling,
                           {grad_output + group * K * out.c, g.P, g.Q, out, g.layout, g.dilation_h, g.dilation_w},
                           {grad_input + group * C * in.c, g.H, g.W, in, g.layout, g.dilation_h, g.dilation_w},
                           weight + group * K * of_weight.n,
                           of_weight.c,
                           of_weight.n,
                           of_weight.w,
                           {nullptr, false},
                           not_finite + group * tiles};
    correlate<F, true>(x);
  }
  Conv2dGeometry one = g;
  one.N = 1;
  const T* in_nchw = nullptr;
  recompute_tiles<F>(g.N, g.G, C, tiling, result, not_finite, [&](int64_t n, T* image) {
    if (in_nchw == nullptr) in_nchw = weight_in_nchw(g, weight);
    implicit_gemm::conv2d_grad_input(one, grad_output + n * out.n, in_nchw, image);
  });
}

}  // namespace torchcnn::TORCHCNN_ISA::winograd
