// Convolution of stride 1 by Winograd's minimal filtering F(m x m, r x r): the result is cut into m x m tiles, tiles and filters
// are transformed (conv2d_winograd_transforms.h), and at each of the (m + r - 1)^2 positions xi of a transformed tile what is left
// is a matrix product (Lavin and Gray 2016, section 4; equation 12 and algorithm 1):
//
//   forward      M[xi][tile][k] = sum_c V[xi][tile][c] U[xi][c][k]         V = B^T x B, U = G g G^T, output tile = A^T M A
//   grad_input   the forward of grad_output with every filter turned by 180 degrees, c and k exchanged, padding r - 1 - padding
//   grad_weight  U[xi][c][k] = sum_tile V[xi][tile][c] D[xi][tile][k]      D = A dy A^T, grad_weight = G^T U G: the adjoint
//
//   V[xi][tile][C + pad]    D, M[xi][tile][K + pad]    U[xi][k / nr][c][k % nr]
//
// The strides of tiles and positions are kept off the powers of two, which would fall into few cache sets.
//
// Tiles do not cross images and every element is summed over c (grad_weight: over tiles, in fixed blocks) in one order, so results
// depend neither on the number of threads nor, for an image, on the others. Intermediate values mix all elements of a tile, so that
// one Inf or NaN would spread over it: an image whose result is not finite is computed again by implicit GEMM, and so is
// grad_weight. The caller guarantees stride and dilation 1, r x r filters and at least kLanes<T> channels and filters in a group.
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

// Cache blocks. kc x nr floats of U are 16 KiB, half of L1. Up to max_tiles tiles are multiplied by up to max_filters filters at a
// time: at 256 channels V is 36 x 96 x 272 floats = 3.6 MiB, of which one position (102 KiB) is in use, and M 1.1 MiB.
inline constexpr int64_t kc = 256;
inline constexpr int64_t max_tiles = 16 * mr;
template <class T>
inline constexpr int64_t max_filters = 4 * nr<T>;
// Of U and V, the larger is streamed: made in parts, each multiplied with all of the smaller, unless U is small enough for the
// caches anyway. Neither may be larger than resident_bytes as a whole.
inline constexpr int64_t small_bytes = int64_t(4) << 20, resident_bytes = int64_t(16) << 20;
// Tiles are transformed in runs: NCHW rows of neighbouring tiles share cache lines.
inline constexpr int64_t run = 14;

template <class T>
int64_t padded_stride(int64_t elements) {
  constexpr int64_t line = 64 / sizeof(T);
  return (ceil_div(elements, line) | 1) * line;
}

// sum[rows][nr] (+)= sum_i left[row row_step + i left_step] right[i right_step ... + nr]
template <int64_t rows, class T>
[[gnu::always_inline]] inline void microkernel(int64_t length, const T* left, int64_t row_step, int64_t left_step, const T* right,
                                               int64_t right_step, bool accumulate, T* sums, int64_t sums_row) {
  Vec<T> sum[rows][2] = {};
  for (int64_t i = 0; i < length; ++i) {
    const Vec<T> b[2] = {load(right), load(right + kLanes<T>)};
    TORCHCNN_UNROLL
    for (int row = 0; row < rows; ++row) {
      const T a = left[row * row_step];
      sum[row][0] += a * b[0];
      sum[row][1] += a * b[1];
    }
    if (left_step != 1) __builtin_prefetch(left + 24);  // of the next rows: they come from L2 or beyond, a line at a time
    left += left_step;
    right += right_step;
  }
  TORCHCNN_UNROLL
  for (int row = 0; row < rows; ++row) {
    TORCHCNN_UNROLL
    for (int v = 0; v < 2; ++v) {
      T* to = sums + row * sums_row + v * kLanes<T>;
      store(to, accumulate ? load(to) + sum[row][v] : sum[row][v]);
    }
  }
}

// The two uses: the sum runs along a row of V, or down its columns.
template <bool along_row, class T>
void multiply_rows(int64_t rows, int64_t length, const T* left, int64_t left_row, const T* right, int64_t right_step,
                   bool accumulate, T* sums, int64_t sums_row) {
  const int64_t row_step = along_row ? left_row : 1, left_step = along_row ? 1 : left_row;
  const auto call = [&]<int64_t count>(std::integral_constant<int64_t, count>) {
    microkernel<count>(length, left, row_step, left_step, right, right_step, accumulate, sums, sums_row);
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

// Numbering of tiles: of all images, row by row.
template <class F>
struct Tiling {
  int64_t P, Q;
  int64_t rows() const { return ceil_div(P, F::m); }
  int64_t columns() const { return ceil_div(Q, F::m); }
  int64_t per_image() const { return rows() * columns(); }
};
struct TilePosition {
  int64_t n, p, q;
};
template <class F>
TilePosition position_of(const Tiling<F>& tiling, int64_t tile) {
  const int64_t n = tile / tiling.per_image(), in_image = tile % tiling.per_image();
  return {n, in_image / tiling.columns() * F::m, in_image % tiling.columns() * F::m};
}

// visit(c, tile) for tiles begin ... end - 1 and all vectors of channels. A cache line of the result is completed at once. In NCHW
// the next tile comes before the next channels: it shares their cache lines.
template <class T, class Visit>
void for_each_tile_vector(Layout layout, int64_t begin, int64_t end, int64_t channels, Visit visit) {
  constexpr int64_t line = std::max<int64_t>(kLanes<T>, 64 / sizeof(T));
  const int64_t length = layout == Layout::nchw ? run : 1;
  for (int64_t first = begin; first < end; first += length)
    for (int64_t c_line = 0; c_line < channels; c_line += line)
      for (int64_t tile = first; tile < std::min(end, first + length); ++tile)
        for (int64_t c = c_line; c < std::min(channels, c_line + line); c += kLanes<T>)
          visit(std::min(c, channels - kLanes<T>), tile);
}

// How many parts of at most `largest` units to cut `units` into: at least one a thread where there are enough units.
inline int64_t parts_of(int64_t units, int64_t largest) {
  const int64_t threads = thread_count(), parts = ceil_div(units, largest);
  return std::min(units, ceil_div(parts, threads) * threads);
}

// Part `part` of the panels of K filters. A last panel with fewer than nr filters stays with the one before it, so that every part
// fills a vector.
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

// One group of channels of a forward correlation, of N images.
template <class T>
struct Correlation {
  int64_t N, C, K, pad_h, pad_w;
  Images<T> input;
  const T* weight;
  int64_t k_stride, c_stride;
  bool flipped;
  Epilogue<T> epilogue;
  Result<T> output;
  unsigned char* not_finite;  // one for each image
};

// U of some panels, at U + xi position_stride.
template <class F, bool flipped, class T>
void transform_weight_panels(const Correlation<T>& x, const Panels& of, T* U, int64_t position_stride) {
  for (int64_t panel = of.begin; panel < of.end; ++panel) {
    for (int64_t c = 0; c < x.C; ++c) {
      for (int64_t k = panel * nr<T>; k < (panel + 1) * nr<T>; k += kLanes<T>) {
        const T* weight = x.weight + std::min(k, x.K - 1) * x.k_stride + c * x.c_stride;
        transform_weight_tile<F, flipped>(weight, x.k_stride, std::clamp<int64_t>(x.K - k, 0, kLanes<T>), U, position_stride);
        U += kLanes<T>;
      }
    }
  }
}
template <class F, class T>
void transform_weights(const Correlation<T>& x, const Panels& of, T* U, int64_t position_stride) {
  if (x.flipped) return transform_weight_panels<F, true>(x, of, U, position_stride);
  transform_weight_panels<F, false>(x, of, U, position_stride);
}

template <class F, class T>
void transform_inputs(const Correlation<T>& x, const Tiling<F>& tiling, int64_t begin, int64_t end, T* V, int64_t row,
                      int64_t position_stride) {
  for_each_tile_vector<T>(x.input.layout, begin, end, x.C, [&](int64_t c, int64_t tile) {
    const TilePosition at = position_of(tiling, tile);
    transform_input_tile<F>(x.input, at.n, c, at.p - x.pad_h, at.q - x.pad_w, V + (tile - begin) * row + c, position_stride);
  });
}

// The outputs of the filters of some panels at tiles begin ... end - 1. V and U point to those tiles and panels.
template <class F, class T>
void multiply_and_store(const Correlation<T>& x, const Tiling<F>& tiling, int64_t begin, int64_t end, const T* V, int64_t V_row,
                        int64_t V_position, const Panels& of, const T* U, int64_t U_position) {
  constexpr int64_t positions = F::tile * F::tile;
  const int64_t k_begin = of.begin * nr<T>, panels = of.end - of.begin;
  const int64_t tiles = end - begin, M_row = padded_stride<T>(panels * nr<T>), M_position = tiles * M_row + 16;
  T* M = workspace<T>(Slot::tile, positions * M_position);
  for (int64_t xi = 0; xi < positions; ++xi) {
    for (int64_t c = 0; c < x.C; c += kc) {
      for (int64_t panel = 0; panel < panels; ++panel) {
        for (int64_t tile = 0; tile < tiles; tile += mr) {
          multiply_rows<true>(std::min(mr, tiles - tile), std::min(kc, x.C - c), V + xi * V_position + tile * V_row + c, V_row,
                              U + xi * U_position + (panel * x.C + c) * nr<T>, nr<T>, c > 0,
                              M + xi * M_position + tile * M_row + panel * nr<T>, M_row);
        }
      }
    }
  }
  const int64_t filters = std::min(panels * nr<T>, x.K - k_begin);
  for (int64_t tile = begin; tile < end; ++tile) {
    const TilePosition at = position_of(tiling, tile);
    bool finite = true;
    const auto store_vector = [&](int64_t k) {
      const Strides& s = x.output.strides;
      const Vec<T> bias = x.epilogue.bias == nullptr ? Vec<T>{} : load(x.epilogue.bias + k_begin + k);
      finite &=
          store_output_tile<F>(M + (tile - begin) * M_row + k, M_position, bias, x.epilogue.relu, x.output,
                               at.n * s.n + (k_begin + k) * s.c + at.p * s.h + at.q * s.w, tiling.P - at.p, tiling.Q - at.q);
    };
    for_each_vector<T>(filters, store_vector);
    if (!finite) __atomic_store_n(x.not_finite + at.n, 1, __ATOMIC_RELAXED);
  }
}

template <class F, class T>
void correlate(const Correlation<T>& x, const Tiling<F>& tiling) {
  constexpr int64_t positions = F::tile * F::tile;
  const int64_t tiles = x.N * tiling.per_image(), panels = ceil_div(x.K, nr<T>), panel_size = x.C * nr<T>;
  const int64_t V_row = padded_stride<T>(x.C), threads = thread_count();
  const int64_t transform_cost = positions * 8;  // of one tile and vector of channels, about
  const int64_t U_bytes = positions * panels * panel_size * int64_t(sizeof(T)),
                V_bytes = positions * tiles * V_row * int64_t(sizeof(T));
  const bool tiles_outside = U_bytes <= small_bytes || (U_bytes <= V_bytes && U_bytes <= resident_bytes);

  if (tiles_outside && tiles >= 2 * mr * threads) {
    const int64_t U_position = panels * panel_size + 16;
    T* U = workspace<T>(Slot::packed_weight, positions * U_position);
    parallel_for(panels, x.C * transform_cost,
                 [&](int64_t panel) { transform_weights<F>(x, {panel, panel + 1}, U + panel * panel_size, U_position); });
    const int64_t parts = parts_of(tiles, max_tiles);
    parallel_for(parts, tiles / parts * x.C * x.K * positions / kLanes<T>, [&](int64_t part) {
      const int64_t begin = part * tiles / parts, end = (part + 1) * tiles / parts, V_position = (end - begin) * V_row + 16;
      T* V = workspace<T>(Slot::patches, positions * V_position);
      transform_inputs(x, tiling, begin, end, V, V_row, V_position);
      const int64_t k_parts = ceil_div(full_panels<T>(x.K), max_filters<T> / nr<T>);
      for (int64_t k_part = 0; k_part < k_parts; ++k_part) {
        const Panels of = panels_of<T>(k_part, k_parts, x.K);
        multiply_and_store(x, tiling, begin, end, V, V_row, V_position, of, U + of.begin * panel_size, U_position);
      }
    });
    return;
  }

  // As many tiles as V may hold, transformed once; then each part of the filters is transformed and multiplied with all of them.
  const int64_t chunk =
      std::max<int64_t>(max_tiles, resident_bytes / (positions * V_row * int64_t(sizeof(T))) / max_tiles * max_tiles);
  for (int64_t chunk_begin = 0; chunk_begin < tiles; chunk_begin += chunk) {
    const int64_t chunk_end = std::min(tiles, chunk_begin + chunk), V_position = (chunk_end - chunk_begin) * V_row + 16;
    T* V = workspace<T>(Slot::patches, positions * V_position);
    const int64_t runs = ceil_div(chunk_end - chunk_begin, run);
    parallel_for(runs, run * x.C * transform_cost / kLanes<T>, [&](int64_t index) {
      const int64_t begin = chunk_begin + index * run, end = std::min(chunk_end, begin + run);
      transform_inputs(x, tiling, begin, end, V + index * run * V_row, V_row, V_position);
    });
    const int64_t parts = parts_of(full_panels<T>(x.K), chunk_end - chunk_begin < 4 * mr ? 1 : max_filters<T> / nr<T>);
    parallel_for(parts, ceil_div(panels, parts) * panel_size * positions, [&](int64_t part) {
      const Panels of = panels_of<T>(part, parts, x.K);
      const int64_t U_position = (of.end - of.begin) * panel_size + 16;
      T* U = workspace<T>(Slot::packed_weight, positions * U_position);
      transform_weights<F>(x, of, U, U_position);
      for (int64_t begin = chunk_begin; begin < chunk_end; begin += max_tiles)
        multiply_and_store(x, tiling, begin, std::min(chunk_end, begin + max_tiles), V + (begin - chunk_begin) * V_row, V_row,
                           V_position, of, U, U_position);
    });
  }
}

// The channels of one group, and how far before and after its first element the tensor reaches.
template <class T>
Images<T> images_of(const T* data, int64_t N, int64_t rows, int64_t columns, const Strides& strides, Layout layout,
                    int64_t first_channel) {
  const int64_t before = first_channel * strides.c;
  return {data + before, rows, columns, strides, layout, -before, N * strides.n - before};
}

// Calls compute(not_finite), then recompute(n) for every image that it marked.
template <class Compute, class Recompute>
void with_finite_images(int64_t N, Compute compute, Recompute recompute) {
  unsigned char* not_finite = workspace<unsigned char>(Slot::flags, N);
  std::fill(not_finite, not_finite + N, 0);
  compute(not_finite);
  for (int64_t n = 0; n < N; ++n)
    if (not_finite[n]) recompute(n);
}

inline Conv2dGeometry one_image(Conv2dGeometry g) {
  g.N = 1;
  return g;
}

template <class F, class T>
void conv2d_forward(const Conv2dGeometry& g, const T* input, const T* weight, const Epilogue<T>& epilogue, T* output) {
  const Strides in = g.input_strides(), out = g.output_strides();
  const int64_t C = g.C_per_group(), K = g.K_per_group(), taps = g.R * g.S;
  with_finite_images(g.N, [&](unsigned char* not_finite) {
    for (int64_t group = 0; group < g.G; ++group) {
      correlate(Correlation<T>{g.N,
                               C,
                               K,
                               g.pad_h,
                               g.pad_w,
                               images_of(input, g.N, g.H, g.W, in, g.layout, group * C),
                               weight + group * K * C * taps,
                               C * taps,
                               taps,
                               false,
                               {epilogue.bias == nullptr ? nullptr : epilogue.bias + group * K, epilogue.relu},
                               {output + group * K * out.c, out, g.layout},
                               not_finite},
                Tiling<F>{g.P, g.Q});
    }
  }, [&](int64_t n) { implicit_gemm::conv2d_forward(one_image(g), input + n * in.n, weight, epilogue, output + n * out.n); });
}

template <class F, class T>
void conv2d_grad_input(const Conv2dGeometry& g, const T* grad_output, const T* weight, T* grad_input) {
  const Strides in = g.input_strides(), out = g.output_strides();
  const int64_t C = g.C_per_group(), K = g.K_per_group(), taps = g.R * g.S;
  with_finite_images(g.N, [&](unsigned char* not_finite) {
    for (int64_t group = 0; group < g.G; ++group) {
      correlate(Correlation<T>{g.N,
                               K,
                               C,
                               g.R - 1 - g.pad_h,
                               g.S - 1 - g.pad_w,
                               images_of(grad_output, g.N, g.P, g.Q, out, g.layout, group * K),
                               weight + group * K * C * taps,
                               taps,
                               C * taps,
                               true,
                               {nullptr, false},
                               {grad_input + group * C * in.c, in, g.layout},
                               not_finite},
                Tiling<F>{g.H, g.W});
    }
  }, [&](int64_t n) { implicit_gemm::conv2d_grad_input(one_image(g), grad_output + n * out.n, weight, grad_input + n * in.n); });
}

// grad_weight: sums run over `block` tiles in registers, then from block to block in U.
inline constexpr int64_t block = 96;
inline constexpr int64_t part_channels = 16 * mr;
inline constexpr int64_t sum_bytes = int64_t(40) << 20;  // of U: more is computed in parts of the filters

// grad_weight of K filters from first_k, all in one group. False where it is not finite.
template <class F, class T>
bool accumulate_grad_weight(const Conv2dGeometry& g, const T* grad_output, const T* input, int64_t first_k, int64_t K,
                            T* grad_weight) {
  constexpr int64_t positions = F::tile * F::tile;
  const int64_t C = g.C_per_group(), taps = g.R * g.S, group = first_k / g.K_per_group();
  const Tiling<F> tiling{g.P, g.Q};
  const Images<T> x = images_of(input, g.N, g.H, g.W, g.input_strides(), g.layout, group * C);
  const Images<T> dy = images_of(grad_output, g.N, g.P, g.Q, g.output_strides(), g.layout, first_k);
  const int64_t tiles = g.N * tiling.per_image(), panels = ceil_div(K, nr<T>);
  const int64_t V_row = padded_stride<T>(C), D_row = padded_stride<T>(panels * nr<T>);

  // All of V and D where they are small; else a chunk at a time, with U of all parts kept in between.
  const int64_t tile_bytes = positions * (V_row + D_row) * int64_t(sizeof(T));
  const int64_t chunk =
      tiles * tile_bytes <= resident_bytes ? tiles : std::max<int64_t>(1, resident_bytes / 4 / tile_bytes / block) * block;
  // Each thread takes some of the channels; of a single chunk, in parts of U that stay in L2.
  const bool keep = chunk < tiles;
  const int64_t c_parts = parts_of(ceil_div(C, mr), keep ? C : part_channels / mr);
  const int64_t k_parts = keep ? 1 : ceil_div(panels, max_filters<T> / nr<T>), parts = c_parts * k_parts;
  const int64_t c_part = ceil_div(ceil_div(C, mr), c_parts) * mr, k_part = ceil_div(panels, k_parts);
  const int64_t U_position = k_part * c_part * nr<T> + 16, U_part = positions * U_position;
  T* kept = keep ? workspace<T>(Slot::partial_sums, parts * U_part) : nullptr;
  unsigned char not_finite = 0;

  for (int64_t chunk_begin = 0; chunk_begin < tiles; chunk_begin += chunk) {
    const int64_t chunk_end = std::min(tiles, chunk_begin + chunk), count = chunk_end - chunk_begin;
    const int64_t V_position = count * V_row + 16, D_position = count * D_row + 16;
    T* V = workspace<T>(Slot::patches, positions * (V_position + D_position));
    T* D = V + positions * V_position;
    const int64_t runs = ceil_div(count, run);
    parallel_for(runs, run * (C + K) / kLanes<T> * positions * 8, [&](int64_t index) {
      const int64_t begin = chunk_begin + index * run, end = std::min(chunk_end, begin + run);
      for_each_tile_vector<T>(g.layout, begin, end, C, [&](int64_t c, int64_t tile) {
        const TilePosition at = position_of(tiling, tile);
        transform_input_tile<F>(x, at.n, c, at.p - g.pad_h, at.q - g.pad_w, V + (tile - chunk_begin) * V_row + c, V_position);
      });
      for_each_tile_vector<T>(g.layout, begin, end, K, [&](int64_t k, int64_t tile) {
        const TilePosition at = position_of(tiling, tile);
        transform_grad_output_tile<F>(dy, at.n, k, at.p, at.q, D + (tile - chunk_begin) * D_row + k, D_position);
      });
    });

    parallel_for(parts, count * positions * c_part * k_part, [&](int64_t part) {
      const int64_t c_begin = part % c_parts * c_part, c_end = std::min(C, c_begin + c_part);
      const int64_t panel_begin = part / c_parts * k_part, panel_end = std::min(panels, panel_begin + k_part);
      if (c_begin >= c_end || panel_begin >= panel_end) return;
      T* U = keep ? kept + part * U_part : workspace<T>(Slot::packed_weight, U_part);
      for (int64_t xi = 0; xi < positions; ++xi) {
        for (int64_t tile = 0; tile < count; tile += block) {
          for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
            for (int64_t c = c_begin; c < c_end; c += mr) {
              multiply_rows<false>(std::min(mr, c_end - c), std::min(block, count - tile), V + xi * V_position + tile * V_row + c,
                                   V_row, D + xi * D_position + tile * D_row + panel * nr<T>, D_row, chunk_begin + tile > 0,
                                   U + xi * U_position + ((panel - panel_begin) * c_part + (c - c_begin)) * nr<T>, nr<T>);
            }
          }
        }
      }
      if (chunk_end < tiles) return;
      bool finite = true;
      for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
        for (int64_t k = panel * nr<T>; k < std::min(K, (panel + 1) * nr<T>); k += kLanes<T>) {
          for (int64_t c = c_begin; c < c_end; ++c) {
            const T* sums = U + ((panel - panel_begin) * c_part + (c - c_begin)) * nr<T> + (k - panel * nr<T>);
            finite &= store_grad_weight_tile<F>(sums, U_position, std::min(kLanes<T>, K - k),
                                                grad_weight + ((first_k + k) * C + c) * taps, C * taps);
          }
        }
      }
      if (!finite) __atomic_store_n(&not_finite, 1, __ATOMIC_RELAXED);
    });
  }
  return not_finite == 0;
}

template <class F, class T>
void conv2d_grad_weight(const Conv2dGeometry& g, const T* grad_output, const T* input, T* grad_weight) {
  const int64_t C = g.C_per_group(), K = g.K_per_group();
  const int64_t parts = ceil_div(F::tile * F::tile * C * K * int64_t(sizeof(T)), sum_bytes);
  bool finite = true;
  for (int64_t group = 0; group < g.G; ++group) {
    for (int64_t part = 0; part < std::min(parts, full_panels<T>(K)); ++part) {
      const Panels of = panels_of<T>(part, std::min(parts, full_panels<T>(K)), K);
      const int64_t first = of.begin * nr<T>;
      finite &=
          accumulate_grad_weight<F>(g, grad_output, input, group * K + first, std::min(K, of.end * nr<T>) - first, grad_weight);
    }
  }
  if (!finite) implicit_gemm::conv2d_grad_weight(g, grad_output, input, grad_weight);
}

}  // namespace torchcnn::TORCHCNN_ISA::winograd
