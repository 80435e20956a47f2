// Convolution of any geometry as matrix products, without ever writing the whole patch matrix ("implicit GEMM"; Chellapilla,
// Puri, Simard 2006 write it whole, Chetlur et al. 2014, section 3, block by block).
//
// All three directions see the source activation through one formula, a correlation over taps t = (row_t, column_t):
//
//   patch(c, t; i, j)    = source[c, i step_h + row_t, j step_w + column_t], or 0 outside the source
//   forward              output[k; i, j]      = bias[k] + sum_{c,t} weight[k, c, t] patch(c, t; i, j)
//   grad_weight          grad_weight[k, c, t] = sum_{n,i,j} grad_output[k; i, j] patch(c, t; i, j)
//   grad_input           a forward correlation of grad_output for each phase (h mod stride_h, w mod stride_w) of the input:
//                        only taps with (h + pad_h - r dilation_h) divisible by stride_h reach it, at source row i + row_t.
//
// A block of patches is packed as a matrix whose rows are (c, t) and whose columns are consecutive positions x = i columns + j,
// zero outside the source and in the last, partial vector:
//
//   patches[(c, t)][x]       gemm_k x gemm_n for forward and grad_input; grad_weight reads the same rows as dot products
//   packed_weight[k / mr][(c, t)][k % mr]
//
// Every output element is summed in the order c, t (grad_weight: n, i, j in fixed blocks), whatever thread computes it.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../geometry.h"
#include "runtime.h"
#include "simd.h"

namespace torchcnn::TORCHCNN_ISA::implicit_gemm {

// Register tile of the forward microkernel, in 16 vector registers: 6 x 2 accumulators + 2 patch vectors + 1 broadcast weight.
inline constexpr int64_t mr = 6;
template <class T>
inline constexpr int64_t nr = 2 * kLanes<T>;

// Cache blocks. A patch block of kc x nc floats is 196 KiB and a weight block of mc x kc floats 96 KiB: both live in L2, and a
// kc x nr slice of the patches (16 KiB) in L1. The odd multiple of 64 bytes between patch rows spreads them over all L1 sets.
inline constexpr int64_t kc = 256;
inline constexpr int64_t mc = 16 * mr;
template <class T>
inline constexpr int64_t nc = 12 * 64 / sizeof(T);
template <class T>
inline constexpr int64_t patch_row = nc<T> + 64 / sizeof(T);

struct Tap {
  int64_t row, column;  // offset into the source
  int64_t weight;       // offset r S + s into one filter plane
};

template <class T>
struct Source {
  const T* data;  // channel 0 of one image and group
  int64_t rows, columns;
  int64_t channel_stride, row_stride, column_stride;
};

// The positions (i, j) of a correlation: rows x columns of them, step apart in the source.
struct Grid {
  int64_t rows, columns, step_h, step_w;
  int64_t size() const { return rows * columns; }
};

struct Taps {
  const Tap* data;
  int64_t count;
};

// patch(c, tap) at the positions x_begin ... x_end - 1, to consecutive elements of `to`.
template <class T>
void pack_patch_row(const Source<T>& source, const Grid& grid, const Tap& tap, int64_t c, int64_t x_begin, int64_t x_end, T* to) {
  // j step_w + column must lie in 0 ... columns - 1; that range of j is the same for every row.
  const int64_t j_first = tap.column >= 0 ? 0 : std::min(grid.columns, ceil_div(-tap.column, grid.step_w));
  const int64_t j_last = tap.column >= source.columns
                             ? j_first
                             : std::max(j_first, std::min(grid.columns, ceil_div(source.columns - tap.column, grid.step_w)));
  int64_t i = x_begin / grid.columns, j = x_begin % grid.columns;
  for (int64_t x = x_begin; x < x_end; ++i, j = 0) {
    const int64_t j_end = std::min(grid.columns, j + (x_end - x));
    const int64_t h = i * grid.step_h + tap.row;
    int64_t inside_begin = std::clamp(j_first, j, j_end), inside_end = std::clamp(j_last, inside_begin, j_end);
    if (h < 0 || h >= source.rows) inside_begin = inside_end = j_end;
    const T* row = source.data + c * source.channel_stride + h * source.row_stride;
    fill(to, inside_begin - j, T(0));
    if (inside_begin < inside_end) {
      gather_strided(row + (inside_begin * grid.step_w + tap.column) * source.column_stride, grid.step_w * source.column_stride,
                     inside_end - inside_begin, to + (inside_begin - j));
    }
    fill(to + (inside_end - j), j_end - inside_end, T(0));
    to += j_end - j;
    x += j_end - j;
  }
}

// tile[mr][nr] += packed_weight[gemm_k][mr]^T patches[gemm_k][nr]
template <class T>
inline void microkernel(int64_t gemm_k, const T* weight, const T* patches, T* tile, int64_t tile_row) {
  Vec<T> sum[mr][2];
  for (int m = 0; m < mr; ++m)
    for (int v = 0; v < 2; ++v) sum[m][v] = load(tile + m * tile_row + v * kLanes<T>);
  for (int64_t k = 0; k < gemm_k; ++k) {
    const Vec<T> patch[2] = {load(patches), load(patches + kLanes<T>)};
    for (int m = 0; m < mr; ++m)
      for (int v = 0; v < 2; ++v) sum[m][v] += weight[m] * patch[v];
    weight += mr;
    patches += patch_row<T>;
  }
  for (int m = 0; m < mr; ++m)
    for (int v = 0; v < 2; ++v) store(tile + m * tile_row + v * kLanes<T>, sum[m][v]);
}

// How a correlation reads its weights (element (k, c, t) at k k_stride + c c_stride + tap.weight) and writes its result
// (element (k, i, j) at k k_stride + i row_stride + j column_stride).
struct WeightView {
  int64_t k_stride, c_stride;
};
template <class T>
struct OutputView {
  T* data;  // channel 0 of one image and group
  int64_t k_stride, row_stride, column_stride;
};

template <class T>
void pack_weight_panel(const T* weight, const WeightView& view, const Taps& taps, int64_t channels, int64_t k_begin,
                       int64_t k_end, T* packed) {
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t t = 0; t < taps.count; ++t, packed += mr) {
      const T* from = weight + c * view.c_stride + taps.data[t].weight;
      for (int64_t m = 0; m < mr; ++m) packed[m] = k_begin + m < k_end ? from[(k_begin + m) * view.k_stride] : T(0);
    }
  }
}

// The result of one image and group at positions x_begin ... x_end - 1 (at most nc) for the filters of panels
// panel_begin ... panel_end - 1.
template <class T>
void correlate_block(const Source<T>& source, const Grid& grid, const Taps& taps, int64_t channels, const T* packed_weight,
                     int64_t panel_begin, int64_t panel_end, int64_t filters, const Epilogue<T>& epilogue, int64_t x_begin,
                     int64_t x_end, const OutputView<T>& output) {
  const int64_t gemm_k = channels * taps.count, width = x_end - x_begin;
  const int64_t padded_width = ceil_div(width, nr<T>) * nr<T>;
  const int64_t first = panel_begin * mr, last = std::min(filters, panel_end * mr);
  T* patches = workspace<T>(Slot::patches, kc * patch_row<T>);
  T* tile = workspace<T>(Slot::tile, (panel_end - panel_begin) * mr * nc<T>);

  for (int64_t k = first; k < panel_end * mr; ++k) {
    const Vec<T> start = broadcast(epilogue.bias != nullptr && k < last ? epilogue.bias[k] : T(0));
    for (int64_t x = 0; x < padded_width; x += kLanes<T>) store(tile + (k - first) * nc<T> + x, start);
  }
  for (int64_t k_begin = 0; k_begin < gemm_k; k_begin += kc) {
    const int64_t k_count = std::min(kc, gemm_k - k_begin);
    int64_t c = k_begin / taps.count, t = k_begin % taps.count;
    for (int64_t k = 0; k < k_count; ++k) {
      T* row = patches + k * patch_row<T>;
      pack_patch_row(source, grid, taps.data[t], c, x_begin, x_end, row);
      fill(row + width, padded_width - width, T(0));
      if (++t == taps.count) t = 0, ++c;
    }
    for (int64_t panel_chunk = panel_begin; panel_chunk < panel_end; panel_chunk += mc / mr) {
      const int64_t chunk_end = std::min(panel_end, panel_chunk + mc / mr);
      for (int64_t x = 0; x < padded_width; x += nr<T>) {
        for (int64_t panel = panel_chunk; panel < chunk_end; ++panel) {
          microkernel(k_count, packed_weight + (panel * gemm_k + k_begin) * mr, patches + x,
                      tile + (panel - panel_begin) * mr * nc<T> + x, nc<T>);
        }
      }
    }
  }
  const bool contiguous = output.column_stride == 1 && output.row_stride == grid.columns;
  for (int64_t k = first; k < last; ++k) {
    T* from = tile + (k - first) * nc<T>;
    if (epilogue.relu) {
      for (int64_t x = 0; x < padded_width; x += kLanes<T>) store(from + x, rectified<T>(load(from + x)));
    }
    T* to = output.data + k * output.k_stride;
    if (contiguous) {
      copy(from, width, to + x_begin);
      continue;
    }
    int64_t i = x_begin / grid.columns, j = x_begin % grid.columns;
    for (int64_t x = 0; x < width; ++x) {
      to[i * output.row_stride + j * output.column_stride] = from[x];
      if (++j == grid.columns) j = 0, ++i;
    }
  }
}

// A correlation over all images and groups. source_of(n, group) and output_of(n, group) give the views; the weights of a group
// start at weight + group * group_stride, its filters at epilogue.bias + group * filters.
template <class T, class SourceOf, class OutputOf>
void correlate(int64_t N, int64_t groups, int64_t channels, int64_t filters, const Grid& grid, const Taps& taps, const T* weight,
               int64_t group_stride, const WeightView& weight_view, const Epilogue<T>& epilogue, SourceOf source_of,
               OutputOf output_of) {
  const int64_t panels = ceil_div(filters, mr), panel_size = channels * taps.count * mr;
  T* packed_weight = workspace<T>(Slot::packed_weight, groups * panels * panel_size);
  parallel_for(groups * panels, panel_size, [&](int64_t task) {
    const int64_t group = task / panels, panel = task % panels;
    pack_weight_panel(weight + group * group_stride, weight_view, taps, channels, panel * mr, filters,
                      packed_weight + task * panel_size);
  });

  // Where images, groups and blocks of positions are fewer than the threads, the filters are split as well (each part packs the
  // patches anew). Which tile an element falls into does not change the order of its sum.
  const int64_t x_blocks = ceil_div(grid.size(), nc<T>), tasks = N * groups * x_blocks;
  const int64_t parts = tasks < 2 * thread_count() ? std::min(panels, ceil_div(2 * thread_count(), tasks)) : 1;
  const int64_t part_panels = ceil_div(panels, parts);
  const int64_t block_cost = channels * taps.count * part_panels * std::min(nc<T>, grid.size());
  parallel_for(tasks * parts, block_cost, [&](int64_t task) {
    const int64_t part = task % parts, x_block = task / parts % x_blocks, image = task / parts / x_blocks;
    const int64_t n = image / groups, group = image % groups;
    const int64_t panel_begin = part * part_panels, panel_end = std::min(panels, panel_begin + part_panels);
    if (panel_begin >= panel_end) return;
    correlate_block(source_of(n, group), grid, taps, channels, packed_weight + group * panels * panel_size, panel_begin,
                    panel_end, filters,
                    Epilogue<T>{epilogue.bias == nullptr ? nullptr : epilogue.bias + group * filters, epilogue.relu},
                    x_block * nc<T>, std::min(grid.size(), (x_block + 1) * nc<T>), output_of(n, group));
  });
}

template <class T>
Source<T> source_view(const T* data, const Strides& strides, int64_t n, int64_t first_channel, int64_t rows, int64_t columns) {
  return {data + n * strides.n + first_channel * strides.c, rows, columns, strides.c, strides.h, strides.w};
}

// The taps of a filter over the input: forward and grad_weight.
inline void input_taps(const Conv2dGeometry& g, Tap* taps) {
  for (int64_t r = 0; r < g.R; ++r)
    for (int64_t s = 0; s < g.S; ++s) *taps++ = {r * g.dilation_h - g.pad_h, s * g.dilation_w - g.pad_w, r * g.S + s};
}

template <class T>
void conv2d_forward(const Conv2dGeometry& g, const T* input, const T* weight, const Epilogue<T>& epilogue, T* output) {
  const Strides in = g.input_strides(), out = g.output_strides();
  Tap* taps = workspace<Tap>(Slot::tables, g.R * g.S);
  input_taps(g, taps);
  const int64_t filter_size = g.R * g.S, C = g.C_per_group(), K = g.K_per_group();
  correlate<T>(g.N, g.G, C, K, {g.P, g.Q, g.stride_h, g.stride_w}, {taps, filter_size}, weight, K * C * filter_size,
               {C * filter_size, filter_size}, epilogue, [&](int64_t n, int64_t group) {
    return source_view(input, in, n, group * C, g.H, g.W);
  }, [&](int64_t n, int64_t group) { return OutputView<T>{output + n * out.n + group * K * out.c, out.c, out.h, out.w}; });
}

template <class T>
void conv2d_grad_input(const Conv2dGeometry& g, const T* grad_output, const T* weight, T* grad_input) {
  const Strides in = g.input_strides(), out = g.output_strides();
  Tap* taps = workspace<Tap>(Slot::tables, g.R * g.S);
  const int64_t filter_size = g.R * g.S, C = g.C_per_group(), K = g.K_per_group();
  for (int64_t phase_h = 0; phase_h < std::min(g.stride_h, g.H); ++phase_h) {
    for (int64_t phase_w = 0; phase_w < std::min(g.stride_w, g.W); ++phase_w) {
      int64_t tap_count = 0;
      for (int64_t r = 0; r < g.R; ++r) {
        const int64_t row = phase_h + g.pad_h - r * g.dilation_h;
        if (row % g.stride_h != 0) continue;
        for (int64_t s = 0; s < g.S; ++s) {
          const int64_t column = phase_w + g.pad_w - s * g.dilation_w;
          if (column % g.stride_w == 0) taps[tap_count++] = {row / g.stride_h, column / g.stride_w, r * g.S + s};
        }
      }
      const Grid grid{ceil_div(g.H - phase_h, g.stride_h), ceil_div(g.W - phase_w, g.stride_w), 1, 1};
      correlate<T>(g.N, g.G, K, C, grid, {taps, tap_count}, weight, K * C * filter_size, {filter_size, C * filter_size},
                   {nullptr, false}, [&](int64_t n, int64_t group) {
        return source_view(grad_output, out, n, group * K, g.P, g.Q);
      }, [&](int64_t n, int64_t group) {
        T* first = grad_input + n * in.n + group * C * in.c + phase_h * in.h + phase_w * in.w;
        return OutputView<T>{first, in.c, g.stride_h * in.h, g.stride_w * in.w};
      });
    }
  }
}

// grad_weight: rows of grad_output times rows of patches, both running along x, as 3 x 4 dot products at a time (12 accumulators
// + 3 grad_output vectors + 1 patch vector in 16 registers). Positions of all images are one long axis cut into blocks of
// `x_block` elements, so that 7x7 planes fill vectors too.
inline constexpr int64_t dot_m = 3, dot_n = 4;
template <class T>
inline constexpr int64_t x_block = 2048 / sizeof(T);
template <class T>
inline constexpr int64_t x_row = x_block<T> + 64 / sizeof(T);
inline constexpr int64_t filter_chunk = 96;  // rows of grad_output packed at a time: 96 x 512 floats = 192 KiB
inline constexpr int64_t patch_chunk = 96;   // rows of patches packed at a time, likewise

template <class T>
inline void dot_tile(int64_t length, const T* grad_output, const T* patches, T sums[dot_m][dot_n]) {
  Vec<T> sum[dot_m][dot_n] = {};
  for (int64_t x = 0; x < length; x += kLanes<T>) {
    Vec<T> gradient[dot_m];
    for (int m = 0; m < dot_m; ++m) gradient[m] = load(grad_output + m * x_row<T> + x);
    for (int n = 0; n < dot_n; ++n) {
      const Vec<T> patch = load(patches + n * x_row<T> + x);
      for (int m = 0; m < dot_m; ++m) sum[m][n] += gradient[m] * patch;
    }
  }
  for (int m = 0; m < dot_m; ++m)
    for (int n = 0; n < dot_n; ++n) sums[m][n] = horizontal_sum<T>(sum[m][n]);
}

template <class T>
void conv2d_grad_weight(const Conv2dGeometry& g, const T* grad_output, const T* input, T* grad_weight) {
  const Strides in = g.input_strides(), out = g.output_strides();
  const int64_t taps_count = g.R * g.S, C = g.C_per_group(), K = g.K_per_group();
  Tap* taps = workspace<Tap>(Slot::tables, taps_count);
  input_taps(g, taps);
  const Grid grid{g.P, g.Q, g.stride_h, g.stride_w};
  const Grid whole{g.P, g.Q, 1, 1};  // grad_output seen as its own patches
  const Tap here{0, 0, 0};

  const int64_t patch_rows = C * taps_count, patch_chunks = ceil_div(patch_rows, patch_chunk), positions = g.N * grid.size();
  const int64_t blocks = ceil_div(positions, x_block<T>), weights = g.K * patch_rows;
  // Too few chunks to share out among threads: cut the sum over positions into slices as well, added in order at the end. How
  // many is decided by the geometry alone, or the bits would depend on the number of threads.
  const int64_t chunks = g.G * patch_chunks, slices = chunks >= 8 ? 1 : std::min<int64_t>(8, blocks);
  T* partial = slices == 1 ? grad_weight : workspace<T>(Slot::partial_sums, slices * weights);

  const int64_t task_cost = K * std::min(patch_rows, patch_chunk) * (positions / slices) / kLanes<T>;
  parallel_for(chunks * slices, task_cost, [&](int64_t task) {
    const int64_t slice = task % slices, chunk = task / slices % patch_chunks, group = task / slices / patch_chunks;
    const int64_t row_begin = chunk * patch_chunk, rows = std::min(patch_chunk, patch_rows - row_begin);
    const int64_t padded_rows = ceil_div(rows, dot_n) * dot_n;
    T* result = partial + slice * weights + group * K * patch_rows + row_begin;
    for (int64_t k = 0; k < K; ++k) fill(result + k * patch_rows, rows, T(0));
    T* patches = workspace<T>(Slot::patches, patch_chunk * x_row<T>);
    T* gradient = workspace<T>(Slot::tile, filter_chunk * x_row<T>);
    for (int64_t row = rows; row < padded_rows; ++row) fill(patches + row * x_row<T>, x_block<T>, T(0));

    // Packs `row` of positions x_begin ... x_end - 1 of the long axis: a piece of each image it crosses.
    const auto pack_row = [&](const auto& source_of, const Grid& of_grid, const Tap& tap, int64_t c, int64_t x_begin,
                              int64_t x_end, T* to) {
      for (int64_t x = x_begin; x < x_end;) {
        const int64_t n = x / grid.size(), end = std::min(x_end, (n + 1) * grid.size());
        pack_patch_row(source_of(n), of_grid, tap, c, x - n * grid.size(), end - n * grid.size(), to + (x - x_begin));
        x = end;
      }
    };
    const auto input_of = [&](int64_t n) { return source_view(input, in, n, group * C, g.H, g.W); };
    const auto grad_output_of = [&](int64_t n) { return source_view(grad_output, out, n, group * K, g.P, g.Q); };

    for (int64_t block = slice * blocks / slices; block < (slice + 1) * blocks / slices; ++block) {
      const int64_t x_begin = block * x_block<T>, x_end = std::min(positions, x_begin + x_block<T>), width = x_end - x_begin;
      const int64_t padded_width = ceil_div(width, kLanes<T>) * kLanes<T>;
      for (int64_t row = 0; row < rows; ++row) {
        T* to = patches + row * x_row<T>;
        pack_row(input_of, grid, taps[(row_begin + row) % taps_count], (row_begin + row) / taps_count, x_begin, x_end, to);
        fill(to + width, padded_width - width, T(0));
      }
      for (int64_t k_begin = 0; k_begin < K; k_begin += filter_chunk) {
        const int64_t filters = std::min(filter_chunk, K - k_begin), padded_filters = ceil_div(filters, dot_m) * dot_m;
        for (int64_t k = 0; k < padded_filters; ++k) {
          T* to = gradient + k * x_row<T>;
          if (k < filters) pack_row(grad_output_of, whole, here, k_begin + k, x_begin, x_end, to);
          fill(to + (k < filters ? width : 0), padded_width - (k < filters ? width : 0), T(0));
        }
        for (int64_t row = 0; row < rows; row += dot_n) {
          for (int64_t k = 0; k < filters; k += dot_m) {
            T sums[dot_m][dot_n];
            dot_tile(padded_width, gradient + k * x_row<T>, patches + row * x_row<T>, sums);
            for (int64_t m = 0; m < std::min(dot_m, filters - k); ++m)
              for (int64_t n = 0; n < std::min(dot_n, rows - row); ++n)
                result[(k_begin + k + m) * patch_rows + row + n] += sums[m][n];
          }
        }
      }
    }
  });
  if (slices == 1) return;
  for (int64_t i = 0; i < weights; ++i) {
    T sum = partial[i];
    for (int64_t slice = 1; slice < slices; ++slice) sum += partial[slice * weights + i];
    grad_weight[i] = sum;
  }
}

}  // namespace torchcnn::TORCHCNN_ISA::implicit_gemm
