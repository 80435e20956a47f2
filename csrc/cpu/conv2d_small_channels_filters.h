// Convolution with few input channels, vectorised over filters: where rows of pixels are too short to fill vectors, and in
// channels_last, where filters are adjacent already. The general kernel looks up where each pixel of a tile lies, which costs
// more than a short sum.
//
//   forward      output[x][k] = bias[k] + sum_{c,t} input(x, (c,t)) weight[(c,t)][k]      x = (n, i, j), t = (r, s)
//   grad_weight  grad_weight[(c,t)][k] = sum_x input(x, (c,t)) grad_output[x][k]          channels_last only
//
// The input is broadcast, so it may lie as it does: its rows are read in place, or, where there are padding or groups, from a
// copy. In forward the register tile is some pixels of a row by up to two vectors of filters, in grad_weight some (c, t) by up to
// two vectors. An element of forward is summed in runs of at most max_run terms, which meet in the output; one of grad_weight
// over pieces of rows, then over these.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "../geometry.h"
#include "conv2d_gemm.h"
#include "conv2d_grad_bias.h"
#include "conv2d_implicit_gemm.h"
#include "conv2d_small_channels.h"
#include "conv2d_windows.h"
#include "runtime.h"
#include "simd.h"

namespace torchcnn::TORCHCNN_ISA::small_channels::filters {

using gemm::nr;

// Elements of a block of the output before it is transposed to NCHW: 128 KiB, for an L2 cache.
inline constexpr int64_t output_elements = 32 * 1024;
// Pixels whose products are added before they meet the rest of the sum. All terms pass by them while they are in L1.
inline constexpr int64_t gradient_pixels = 96;

// Calls run(first, std::integral_constant<int, size>) for tiles of at most max_rows that share `count` evenly.
template <class Run>
[[gnu::always_inline]] inline void for_even_tiles(int64_t count, const Run& run) {
  const int64_t tiles = ceil_div(count, max_rows);
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t first = tile * count / tiles;
    gemm::with_rows<max_rows>((tile + 1) * count / tiles - first, [&](auto size) { run(first, size); });
  }
}

// The rows of the input under `rows` rows of the output, in place or copied, and where the terms (c, t) of the sum stand in them.
template <class T>
struct Input {
  implicit_gemm::View<const T> view;
  implicit_gemm::Window window;
  int64_t pixel_step, row_step;  // in the window, from what one pixel or row of the output reads to what the next one reads

  Input(const Conv2dGeometry& g, const T* input, int64_t rows) : view{input, g.input_strides(), g.H, g.W} {
    const implicit_gemm::Tap corners[] = {{-g.pad_h, -g.pad_w, 0},
                                          {(g.R - 1) * g.dilation_h - g.pad_h, (g.S - 1) * g.dilation_w - g.pad_w, 0}};
    window = implicit_gemm::window_of(corners, 2, view.strides, g.H, g.W, g.C_per_group(), rows, g.P, g.Q, g.stride_h, g.stride_w,
                                      g.layout, sizeof(T), false);
    // In place, the channels of a group would lie far apart, often by a power of two, and share a few sets of L1.
    if (g.G > 1) implicit_gemm::copy_window(window, g.C_per_group(), g.layout, sizeof(T));
    pixel_step = g.stride_w * window.strides.w, row_step = g.stride_h * window.strides.h;
  }
  void fill_offsets(const Conv2dGeometry& g, int64_t* offset) const {
    const Strides& to = window.strides;
    for (int64_t c = 0; c < g.C_per_group(); ++c)
      for (int64_t r = 0; r < g.R; ++r)
        for (int64_t s = 0; s < g.S; ++s) *offset++ = c * to.c + r * g.dilation_h * to.h + s * g.dilation_w * to.w;
  }
  const T* read(const Conv2dGeometry& g, int64_t n, int64_t group, int64_t first_row) const {
    return implicit_gemm::read_window(view, window, n, 1, group * g.C_per_group(), g.C_per_group(), first_row * g.stride_h,
                                      g.layout);
  }
};

// Rows of the output whose input, padded, has at most so many elements; at least one.
inline int64_t rows_over(const Conv2dGeometry& g, int64_t elements) {
  const int64_t row = ((g.Q - 1) * g.stride_w + (g.S - 1) * g.dilation_w + 1) * g.C_per_group();
  return std::max<int64_t>(1, (elements / row - (g.R - 1) * g.dilation_h - 1) / g.stride_h + 1);
}

// How far before their tile pixels of the output are fetched, and vectors to a cache line.
inline constexpr int64_t pixels_ahead = 24;
inline constexpr int line_vectors = std::max(1, 64 / TORCHCNN_VECTOR_BYTES);

// to[p][...] = bias + sum_d pixel[offset[d] + p pixel_step] weight[d][...], rectified if need be.
template <class T, int pixels, int vectors>
[[gnu::noinline]] void output_tile(int64_t depth, const T* pixel, int64_t pixel_step, const int64_t* offset, const T* weight,
                                   const T* bias, bool relu, T* to, int64_t to_row) {
  constexpr int64_t L = kLanes<T>;
  const int64_t run_length = ceil_div(depth, ceil_div(depth, max_run));
#pragma GCC unroll 12
  for (int p = 0; p < pixels; ++p)  // what is written soon: lines of a few filters each, which look like no stream
#pragma GCC unroll 2
    for (int v = 0; v < vectors; v += line_vectors) __builtin_prefetch(to + (p + pixels_ahead) * to_row + v * L, 1);
  for (int64_t first = 0; first < depth; first += run_length) {
    const int64_t end = std::min(depth, first + run_length);
    Vec<T> sum[pixels][vectors];
#pragma GCC unroll 12
    for (int p = 0; p < pixels; ++p)
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v) sum[p][v] = first == 0 && bias != nullptr ? load(bias + v * L) : Vec<T>{};
    for (int64_t d = first; d < end; ++d) {
      const T *at = pixel + offset[d], *w = weight + d * nr<T>;
      Vec<T> right[vectors];
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v) right[v] = load(w + v * L);
#pragma GCC unroll 12
      for (int p = 0; p < pixels; ++p, advance(at, pixel_step))
#pragma GCC unroll 2
        for (int v = 0; v < vectors; ++v) sum[p][v] += *at * right[v];
    }
    T* out = to;
#pragma GCC unroll 12
    for (int p = 0; p < pixels; ++p, out += to_row) {
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v) {
        if (first > 0) sum[p][v] += load(out + v * L);
        store(out + v * L, relu && end == depth ? rectified<T>(sum[p][v]) : sum[p][v]);
      }
    }
  }
}

// K / G is a multiple of a vector.
template <class T>
void conv2d_forward(const Conv2dGeometry& g, const T* input, const T* weight, const Epilogue<T>& epilogue, T* output) {
  const int64_t K = g.K_per_group(), depth = g.C_per_group() * g.R * g.S, panels = ceil_div(K, nr<T>);
  const bool nchw = g.layout == Layout::nchw;
  const Strides out = g.output_strides();
  // Rows may be split at will, since that changes no sum.
  const int64_t share = ceil_div(g.N * g.G * g.P, 4 * thread_count());
  const int64_t wanted = std::min({rows_over(g, buffer_elements), output_elements / (K * g.Q), share, g.P});
  const int64_t blocks = ceil_div(g.P, std::max<int64_t>(1, wanted));
  const Input<T> source(g, input, ceil_div(g.P, blocks));
  int64_t* offset = workspace<int64_t>(Slot::offsets, depth);
  source.fill_offsets(g, offset);
  T* packed = workspace<T>(Slot::packed_weight, g.G * panels * depth * nr<T>);
  for (int64_t group = 0; group < g.G; ++group)
    for (int64_t panel = 0; panel < panels; ++panel)
      gemm::pack_transposed(weight + (group * K + panel * nr<T>)*depth, depth, std::min(nr<T>, K - panel * nr<T>), depth,
                            packed + (group * panels + panel) * depth * nr<T>, [](int64_t d) { return d; });

  parallel_for(g.N * g.G * blocks, g.P / blocks * g.Q * depth * panels * 2, [&](int64_t task) {
    const int64_t block = task % blocks, n = task / blocks / g.G, group = task / blocks % g.G;
    const int64_t begin = block * g.P / blocks, rows = (block + 1) * g.P / blocks - begin;
    const T* buffer = source.read(g, n, group, begin);
    T* result = output + n * out.n + group * K * out.c + begin * out.h;
    T* tile = nchw ? workspace<T>(Slot::tile, panels * rows * g.Q * nr<T>) : nullptr;
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t panel = 0; panel < panels; ++panel) {
        const int64_t k = panel * nr<T>;
        const T* w = packed + (group * panels + panel) * depth * nr<T>;
        const T* bias = epilogue.bias == nullptr ? nullptr : epilogue.bias + group * K + k;
        T* const to = nchw ? tile + (panel * rows + i) * g.Q * nr<T> : result + i * out.h + k;
        const int64_t to_row = nchw ? nr<T> : out.w;
        const T* row = buffer + i * source.row_step;
        for_even_tiles(g.Q, [&]<int pixels>(int64_t j, std::integral_constant<int, pixels>) {
          if (K - k > kLanes<T>)
            output_tile<T, pixels, 2>(depth, row + j * source.pixel_step, source.pixel_step, offset, w, bias, epilogue.relu,
                                      to + j * to_row, to_row);
          else
            output_tile<T, pixels, 1>(depth, row + j * source.pixel_step, source.pixel_step, offset, w, bias, epilogue.relu,
                                      to + j * to_row, to_row);
        });
      }
    }
    if (!nchw) return;
    for (int64_t panel = 0; panel < panels; ++panel) {
      const T* from = tile + panel * rows * g.Q * nr<T>;
      const int64_t k = panel * nr<T>, lanes = std::min(nr<T>, K - k);
      gemm::unpack_transposed<T>([&](int64_t x) { return from + x * nr<T>; }, lanes, rows * g.Q, result + k * out.c, out.c,
                                 implicit_gemm::Finish<T>{nullptr, lanes, false});
    }
  });
}

// Rows of pixels of grad_output and of the input under them.
struct GradientRows {
  int64_t rows, columns, gradient_row, gradient_step, input_row, input_step;
};

// sums[t][...] += sum_x input[offset[t] + x input_step] gradient[x][...] over some rows.
template <class T, int taps, int vectors>
[[gnu::noinline]] void weight_tile(const GradientRows& at, const T* gradient, const T* input, const int64_t* offset, T* sums) {
  constexpr int64_t L = kLanes<T>;
  Vec<T> sum[taps][vectors] = {};
  for (int64_t i = 0; i < at.rows; ++i) {
    const T* seen[taps];
#pragma GCC unroll 12
    for (int t = 0; t < taps; ++t) seen[t] = input + i * at.input_row + offset[t];
    const T* right = gradient + i * at.gradient_row;
    for (int64_t x = 0; x < at.columns; ++x, right += at.gradient_step) {
      Vec<T> g[vectors];
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v) g[v] = load(right + v * L);
#pragma GCC unroll 12
      for (int t = 0; t < taps; ++t)
#pragma GCC unroll 2
        for (int v = 0; v < vectors; ++v) sum[t][v] += seen[t][x * at.input_step] * g[v];
    }
  }
#pragma GCC unroll 12
  for (int t = 0; t < taps; ++t)
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) store(sums + t * nr<T> + v * L, load(sums + t * nr<T> + v * L) + sum[t][v]);
}

// channels_last; K / G is a multiple of a vector.
template <class T>
void conv2d_grad_weight(const Conv2dGeometry& g, const T* grad_output, const T* input, T* grad_weight, T* grad_bias) {
  const int64_t K = g.K_per_group(), depth = g.C_per_group() * g.R * g.S, panels = ceil_div(K, nr<T>), weights = g.K * depth;
  const Strides out = g.output_strides();
  const int64_t blocks_of_image = ceil_div(g.P, rows_over(g, buffer_elements / 2)), blocks = g.N * blocks_of_image;
  const Input<T> source(g, input, ceil_div(g.P, blocks_of_image));
  int64_t* offset = workspace<int64_t>(Slot::offsets, depth);
  source.fill_offsets(g, offset);
  const int64_t rows_together = std::max<int64_t>(1, gradient_pixels / g.Q), pieces = ceil_div(g.Q, gradient_pixels);

  const int64_t slices = gemm::slices_of(g.G, blocks);
  T* partial = slices == 1 ? grad_weight : workspace<T>(Slot::partial_sums, slices * weights);
  const BiasSums<T> bias_sums(slices, g.K, grad_bias);
  parallel_for(g.G * slices, depth * panels * 2 * g.N * g.P * g.Q / slices, [&](int64_t task) {
    const int64_t slice = task % slices, group = task / slices;
    T* sums = workspace<T>(Slot::tile, panels * depth * nr<T>);
    for (int64_t x = 0; x < panels * depth * nr<T>; x += kLanes<T>) store(sums + x, Vec<T>{});
    for (int64_t block = slice * blocks / slices; block < (slice + 1) * blocks / slices; ++block) {
      const int64_t n = block / blocks_of_image, part = block % blocks_of_image;
      const int64_t begin = part * g.P / blocks_of_image, rows = (part + 1) * g.P / blocks_of_image - begin;
      const T* buffer = source.read(g, n, group, begin);
      for (int64_t i = 0; i < rows; i += rows_together) {
        for (int64_t piece = 0; piece < pieces; ++piece) {
          const int64_t j = piece * g.Q / pieces, columns = (piece + 1) * g.Q / pieces - j;
          const GradientRows at{std::min(rows_together, rows - i), columns, out.h, out.w, source.row_step, source.pixel_step};
          const T* const pixels = grad_output + n * out.n + (begin + i) * out.h + j * out.w + group * K;
          for (int64_t row = 0; row < at.rows; ++row)
            bias_sums.add_pixels(slice, group * K, K, pixels + row * out.h, out.w, columns);
          for (int64_t panel = 0; panel < panels; ++panel) {
            const int64_t k = panel * nr<T>;
            const T* gradient = pixels + k;
            const T* seen = buffer + i * at.input_row + j * at.input_step;
            for_even_tiles(depth, [&]<int taps>(int64_t first, std::integral_constant<int, taps>) {
              T* to = sums + (panel * depth + first) * nr<T>;
              if (K - k > kLanes<T>)
                weight_tile<T, taps, 2>(at, gradient, seen, offset + first, to);
              else
                weight_tile<T, taps, 1>(at, gradient, seen, offset + first, to);
            });
          }
        }
      }
    }
    for (int64_t panel = 0; panel < panels; ++panel) {
      const T* from = sums + panel * depth * nr<T>;
      const int64_t k = panel * nr<T>, lanes = std::min(nr<T>, K - k);
      gemm::unpack_transposed<T>([&](int64_t d) { return from + d * nr<T>; }, lanes, depth,
                                 partial + slice * weights + (group * K + k) * depth, depth,
                                 implicit_gemm::Finish<T>{nullptr, lanes, false});
    }
  });
  if (slices > 1) gemm::add_slices(partial, slices, weights, grad_weight);
  bias_sums.finish();
}

}  // namespace torchcnn::TORCHCNN_ISA::small_channels::filters
