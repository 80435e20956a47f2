// Convolution with few channels on the broadcast side, vectorised over pixels: first layers, narrow groups, and the gradient of
// their inputs. The general kernel would spend its time packing, or leave most lanes of a panel empty.
//
//   result[k; i, j] = bias[k] + sum_{r,c,s} weight[k, c, t] source[c, i step_h + row_t, j step_w + column_t]     t = (r, s)
//
// The register tile is some filters by some vectors of pixels, wherever in a block of rows these lie; the weights, broadcast, are
// packed [(r,c,s)][filters of the tile], and the pixels are read from a padded copy of the rows (conv2d_planar_rows.h) through a
// table of offsets, one for each term of the sum.
//
// The filter row r comes first in the sum, so that the taps above and below the image are left out instead of multiplied by 0:
// the rows of a block fall into bands that meet the same filter rows. For grad_input, each phase (h mod stride_h, w mod stride_w)
// of the input is such a correlation of grad_output with step 1. Where the result cannot be written in whole vectors at once
// (several phases, channels_last, rows shorter than a vector, channels in several parts) it is kept in a tile at first.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "../geometry.h"
#include "conv2d_gemm.h"
#include "conv2d_implicit_gemm.h"
#include "conv2d_planar_rows.h"
#include "runtime.h"
#include "simd.h"

namespace torchcnn::TORCHCNN_ISA::small_channels {

using implicit_gemm::Correlation;
using implicit_gemm::Phase;
using implicit_gemm::Tap;

// Accumulators: 12 of 16 registers or 24 of 32 leave room for what is multiplied: `rows` weights and a vector of pixels, or the
// pixels and one weight, whichever are fewer.
inline constexpr int accumulators = TORCHCNN_VECTOR_REGISTERS / 4 * 3;
inline constexpr int max_rows = accumulators / 2;
constexpr int tile_vectors(int rows) { return std::min(8, accumulators / rows); }

// Terms are added in runs of at most 64, then the runs: rounding errors grow with the longer of the two instead of the depth.
inline constexpr int64_t max_run = 64;

// Source rows buffered at a time, all of their channels: 48 Ki floats are 192 KiB, and leave room in an L2 cache of 512 KiB.
inline constexpr int64_t buffer_elements = 48 * 1024;

// A sum starts at start[m] (null: 0); what is there is added, and it is rectified.
template <class T>
struct Ends {
  const T* start;
  bool add, relu;
};

// Where a product reads and writes its vectors of pixels.
template <class T>
struct Vectors {
  const T* pixels;
  const int64_t* source;
  T* result;
  const int64_t* target;
  int64_t result_row;  // from one filter to the next
};

// result[target[v] + m result_row ...] (+)= sum_d weight[d][m] pixels[source[v] + offset[d] ...], a vector each, for as many of
// the `count` vectors as make whole tiles.
template <class T, int rows, int vectors>
[[gnu::noinline]] void tile_products(int64_t count, int64_t depth, const T* weight, const int64_t* offset,
                                     const Vectors<T>& where, const Ends<T>& how) {
  constexpr int64_t L = kLanes<T>;
  const Vectors<T> at = where;  // copies: for all the compiler knows, the stores below could change the originals
  const Ends<T> ends = how;
  T total[rows * vectors * L] = {};
  const int64_t run_length = ceil_div(depth, std::max<int64_t>(1, ceil_div(depth, max_run)));
  for (int64_t first = 0; first + vectors <= count; first += vectors) {
    const T* from[vectors];
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) from[v] = at.pixels + at.source[first + v];
    const T* w = weight;
    const int64_t *o = offset, *const end = offset + depth;
    bool again = false;
    do {
      Vec<T> sum[rows][vectors];
      if (again || ends.start == nullptr) {
#pragma GCC unroll 12
        for (int m = 0; m < rows; ++m)
#pragma GCC unroll 8
          for (int v = 0; v < vectors; ++v) sum[m][v] = Vec<T>{};
      } else {
#pragma GCC unroll 12
        for (int m = 0; m < rows; ++m)
#pragma GCC unroll 8
          for (int v = 0; v < vectors; ++v) sum[m][v] = ends.start[m] - Vec<T>{};
      }
      for (const int64_t* run_end = std::min(end, o + run_length); o < run_end; ++o, w += rows) {
        if constexpr (vectors <= rows) {
          Vec<T> right[vectors];
#pragma GCC unroll 8
          for (int v = 0; v < vectors; ++v) right[v] = load(from[v] + *o);
#pragma GCC unroll 12
          for (int m = 0; m < rows; ++m)
#pragma GCC unroll 8
            for (int v = 0; v < vectors; ++v) sum[m][v] += w[m] * right[v];
        } else {
          T left[rows];
#pragma GCC unroll 12
          for (int m = 0; m < rows; ++m) left[m] = w[m];
#pragma GCC unroll 8
          for (int v = 0; v < vectors; ++v) {
            Vec<T> right = load(from[v] + *o);
            settle(right);
#pragma GCC unroll 12
            for (int m = 0; m < rows; ++m) sum[m][v] += left[m] * right;
          }
        }
      }
      if (again) {
#pragma GCC unroll 12
        for (int m = 0; m < rows; ++m)
#pragma GCC unroll 8
          for (int v = 0; v < vectors; ++v) sum[m][v] += load(total + (m * vectors + v) * L);
      }
      again = o < end;
      if (again) {
#pragma GCC unroll 12
        for (int m = 0; m < rows; ++m)
#pragma GCC unroll 8
          for (int v = 0; v < vectors; ++v) store(total + (m * vectors + v) * L, sum[m][v]);
        continue;
      }
      T* to[vectors];
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) to[v] = at.result + at.target[first + v];
      if (ends.add) {
#pragma GCC unroll 12
        for (int m = 0; m < rows; ++m)
#pragma GCC unroll 8
          for (int v = 0; v < vectors; ++v) sum[m][v] += load(to[v] + m * at.result_row);
      }
      if (ends.relu) {
#pragma GCC unroll 12
        for (int m = 0; m < rows; ++m)
#pragma GCC unroll 8
          for (int v = 0; v < vectors; ++v) sum[m][v] = rectified<T>(sum[m][v]);
      }
#pragma GCC unroll 12
      for (int m = 0; m < rows; ++m)
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v) store(to[v] + m * at.result_row, sum[m][v]);
    } while (again);
  }
}

// The same for any number of vectors: what is left after tiles of `vectors` goes to tiles of half as many.
template <class T, int rows, int vectors = tile_vectors(rows)>
void row_product(int64_t count, int64_t depth, const T* weight, const int64_t* offset, Vectors<T> at, const Ends<T>& ends) {
  if (count >= vectors) tile_products<T, rows, vectors>(count, depth, weight, offset, at, ends);
  if constexpr (vectors > 1) {
    const int64_t done = count / vectors * vectors;
    if (done == count) return;
    at.source += done, at.target += done;
    row_product<T, rows, vectors / 2>(count - done, depth, weight, offset, at, ends);
  }
}

// Runs the correlation; element (k, c, t) of a group's weights is at group group_stride + k k_stride + c c_stride + t.weight.
template <class T>
void correlate(const Correlation<T>& p, const T* weight, int64_t group_stride, int64_t k_stride, int64_t c_stride,
               const Epilogue<T>& epilogue) {
  constexpr int64_t L = kLanes<T>;
  const int64_t phases = p.phases_h * p.phases_w, patch_size = p.channels * p.tap_count;
  const Phase& largest = p.phases[0];
  int64_t first_row = p.taps[0].row, last_row = first_row, first_column = p.taps[0].column, last_column = first_column;
  for (int64_t t = 1; t < p.tap_count; ++t) {
    first_row = std::min(first_row, p.taps[t].row), last_row = std::max(last_row, p.taps[t].row);
    first_column = std::min(first_column, p.taps[t].column), last_column = std::max(last_column, p.taps[t].column);
  }
  // A tile may read up to a vector less one element beyond the last pixel.
  const int64_t columns = (largest.columns - 1) * p.step_w + last_column - first_column + 1;
  const int64_t width = ceil_div(ceil_div(columns, p.step_w) + L - 1, L) * L;
  planar_rows::Buffer b{first_column, p.step_w, width, width, 0, p.step_w * width};
  // Few rows in a block would be copied again and again by the blocks around: take part of the channels at a time instead.
  const int64_t halo = last_row - first_row + 1;
  const int64_t wanted_rows = std::min<int64_t>(largest.rows, std::max<int64_t>(4, 2 * halo / p.step_h));
  const int64_t capacity = buffer_elements / (b.channel_stride * (wanted_rows * p.step_h + halo));
  const int64_t chunk = std::clamp<int64_t>(capacity, 1, p.channels), chunks = ceil_div(p.channels, chunk);
  // In channels_last several narrow groups share the transposition of a vector of channels.
  const int64_t bundle =
      p.layout == Layout::nchw
          ? 1
          : std::clamp<int64_t>(std::min(L / std::max(p.channels, p.filters), capacity / p.channels), 1, p.groups);
  const int64_t bundles = ceil_div(p.groups, bundle);
  b.row_stride = bundle * chunk * b.channel_stride;
  // Each thread should get several blocks; rows may be split at will, since that changes no sum.
  const int64_t share = ceil_div(p.N * bundles * largest.rows, 4 * thread_count());
  const int64_t block_rows = std::clamp<int64_t>(std::min((buffer_elements / b.row_stride - halo) / p.step_h, share),
                                                 std::min<int64_t>(4, largest.rows), largest.rows);
  const int64_t blocks = ceil_div(largest.rows, block_rows);

  // [chunk][phase][(r, c, s)], and for each phase the list of its filter rows.
  struct FilterRow {
    int64_t source_row, first_tap, taps;
  };
  int64_t* offset = workspace<int64_t>(Slot::offsets, patch_size);
  FilterRow* filter_row = workspace<FilterRow>(Slot::filter_rows, p.tap_count + phases + 1);
  int64_t* first_filter_row = workspace<int64_t>(Slot::positions, phases + 1);
  int64_t filter_rows = 0;
  for (int64_t f = 0; f < phases; ++f) {
    first_filter_row[f] = filter_rows;
    const int64_t end = p.phases[f].first_tap + p.phases[f].taps;
    for (int64_t t = p.phases[f].first_tap; t < end; ++t) {
      if (t == p.phases[f].first_tap || p.taps[t].row != p.taps[t - 1].row) filter_row[filter_rows++] = {p.taps[t].row, t, 0};
      ++filter_row[filter_rows - 1].taps;
    }
  }
  first_filter_row[phases] = filter_rows;

  // Weights [group][tile of filters][chunk][tap row][channel][tap][rows of the tile], all tiles of a group side by side.
  T* packed = workspace<T>(Slot::packed_weight, p.groups * p.filters * patch_size);
  for (int64_t group = 0, at = 0; group < p.groups; ++group) {
    for (int64_t k = 0; k < p.filters;) {
      const int64_t rows = gemm::tile_rows(p.filters - k, max_rows);
      const T* from = weight + group * group_stride + k * k_stride;
      int64_t column = 0;
      for (int64_t c = 0; c < p.channels; c += chunk) {
        const int64_t c_end = std::min(p.channels, c + chunk);
        for (int64_t fr = 0; fr < filter_rows; ++fr) {
          for (int64_t channel = c; channel < c_end; ++channel) {
            for (int64_t t = filter_row[fr].first_tap; t < filter_row[fr].first_tap + filter_row[fr].taps; ++t, ++column) {
              for (int64_t m = 0; m < rows; ++m) packed[at++] = from[m * k_stride + channel * c_stride + p.taps[t].weight];
              const int64_t shift = p.taps[t].column - first_column;
              offset[column] = (p.taps[t].row - first_row) * b.row_stride + (channel - c) * b.channel_stride +
                               shift % p.step_w * b.remainder_stride + shift / p.step_w;
            }
          }
        }
      }
      k += rows;
    }
  }

  const bool direct = p.layout == Layout::nchw && phases == 1 && chunks == 1 && largest.columns >= L;
  const int64_t tile_pitch = ceil_div(largest.columns, L) * L;  // a row of the result before it is merged
  const int64_t cost = block_rows * bundle * patch_size * p.filters * tile_pitch / L;
  parallel_for(p.N * bundles * blocks, cost, [&](int64_t task) {
    const int64_t i_begin = task % blocks * block_rows, i_end = std::min(largest.rows, i_begin + block_rows);
    const int64_t n = task / blocks / bundles, first_group = task / blocks % bundles * bundle;
    const int64_t groups = std::min(bundle, p.groups - first_group), filters = groups * p.filters;
    // The rows of the source that exist; row r of the buffer is source row i_begin step_h + first_row + r.
    const int64_t buffer_row = i_begin * p.step_h + first_row;
    const int64_t read_begin = std::clamp<int64_t>(buffer_row, 0, p.source.rows);
    const int64_t read_end = std::clamp<int64_t>((i_end - 1) * p.step_h + last_row + 1, read_begin, p.source.rows);
    T* buffer = workspace<T>(Slot::patches, (block_rows * p.step_h + halo) * b.row_stride + 8 * L);
    T* tile = direct ? nullptr : workspace<T>(Slot::tile, block_rows * phases * filters * tile_pitch);
    int64_t* source = workspace<int64_t>(Slot::row_pointers, 2 * block_rows * (tile_pitch / L));
    int64_t* target = source + block_rows * (tile_pitch / L);
    const Strides& s = p.result.strides;
    T* result = p.result.data + n * s.n + first_group * p.filters * s.c;
    const int64_t filter_stride = direct ? s.c : tile_pitch;

    for (int64_t c = 0; c < p.channels; c += chunk) {
      const int64_t channels = std::min(chunk, p.channels - c);
      planar_rows::fill(p.source, p.N, n, first_group * p.channels + c, groups * channels, read_begin, 1, read_end - read_begin,
                        b, buffer + (read_begin - buffer_row) * b.row_stride);
      for (int64_t f = 0; f < phases; ++f) {
        const int64_t rows_of_phase = std::min(i_end, p.phases[f].rows) - i_begin;
        for (int64_t i = 0; i < rows_of_phase;) {
          // A band: rows that meet the same filter rows, which are a range, since their source rows are in order.
          const auto meets = [&](int64_t row, int64_t fr) {
            const int64_t h = (i_begin + row) * p.step_h + filter_row[fr].source_row;
            return h >= 0 && h < p.source.rows;
          };
          int64_t begin = first_filter_row[f], end = first_filter_row[f + 1];
          while (begin < end && !meets(i, begin)) ++begin;
          while (begin < end && !meets(i, end - 1)) --end;
          const auto in_band = [&](int64_t row) {
            if (begin == end) return false;
            return meets(row, begin) && meets(row, end - 1) && (begin == first_filter_row[f] || !meets(row, begin - 1)) &&
                   (end == first_filter_row[f + 1] || !meets(row, end));
          };
          int64_t count = 0;
          do {
            const int64_t columns = direct ? largest.columns : tile_pitch;
            for (int64_t x = 0; x < columns; x += L) {
              const int64_t column = std::min(x, columns - L);  // the last vector of a row overlaps the one before
              source[count] = i * p.step_h * b.row_stride + column;
              target[count++] = (direct ? (i_begin + i) * s.h : (i * phases + f) * filters * tile_pitch) + column;
            }
          } while (++i < rows_of_phase && in_band(i));

          const int64_t tap_begin = begin < end ? filter_row[begin].first_tap : 0;
          const int64_t taps = begin < end ? filter_row[end - 1].first_tap + filter_row[end - 1].taps - tap_begin : 0;
          const int64_t first = c * p.tap_count + tap_begin * channels;
          for (int64_t k = 0, rows = 0; k < filters; k += rows) {
            const int64_t in_bundle = k / p.filters, filter = first_group * p.filters + k;
            rows = gemm::tile_rows((in_bundle + 1) * p.filters - k, max_rows);
            const T* start = c == 0 && epilogue.bias != nullptr ? epilogue.bias + filter : nullptr;
            const Ends<T> ends{start, c > 0, epilogue.relu && c + channels == p.channels};
            const T* panel = packed + filter * patch_size + first * rows;
            const Vectors<T> at{buffer + in_bundle * p.channels * b.channel_stride, source,
                                (direct ? result : tile) + k * filter_stride, target, filter_stride};
            gemm::with_rows<max_rows>(rows, [&]<int tile_filters>(std::integral_constant<int, tile_filters>) {
              row_product<T, tile_filters>(count, taps * channels, panel, offset + first, at, ends);
            });
          }
        }
      }
    }
    if (direct) return;
    for (int64_t i = 0; i < i_end - i_begin; ++i) {
      for (int64_t f_h = 0; f_h < p.phases_h; ++f_h) {
        const int64_t h = (i_begin + i) * p.phases_h + f_h;
        if (h >= p.result.rows) break;
        const T* from = tile + (i * phases + f_h * p.phases_w) * filters * tile_pitch;
        if (p.layout == Layout::nchw) {
          for (int64_t k = 0; k < filters; ++k)
            planar_rows::merge_phases(from + k * tile_pitch, filters * tile_pitch, p.phases_w, p.result.columns,
                                      result + k * s.c + h * s.h);
          continue;
        }
        for (int64_t f_w = 0; f_w < p.phases_w; ++f_w)
          planar_rows::join_pixels(from + f_w * filters * tile_pitch, tile_pitch, filters, p.phases[f_w].columns,
                                   result + h * s.h + f_w * s.w, p.phases_w * s.w);
      }
    }
  });
}

template <class T>
void conv2d_forward(const Conv2dGeometry& g, const T* input, const T* weight, const Epilogue<T>& epilogue, T* output) {
  const int64_t taps_count = g.R * g.S, C = g.C_per_group(), K = g.K_per_group();
  Tap* taps = workspace<Tap>(Slot::tables, taps_count);
  implicit_gemm::input_taps(g, taps);
  const Phase phase{0, taps_count, g.P, g.Q};
  correlate<T>({g.N,
                g.G,
                C,
                K,
                g.layout,
                {input, g.input_strides(), g.H, g.W},
                {output, g.output_strides(), g.P, g.Q},
                g.stride_h,
                g.stride_w,
                1,
                1,
                taps,
                &phase,
                taps_count},
               weight, K * C * taps_count, C * taps_count, taps_count, epilogue);
}

template <class T>
void conv2d_grad_input(const Conv2dGeometry& g, const T* grad_output, const T* weight, T* grad_input) {
  const int64_t taps_count = g.R * g.S, C = g.C_per_group(), K = g.K_per_group();
  const implicit_gemm::InputPhases phases = implicit_gemm::input_phases(g);
  correlate<T>({g.N,
                g.G,
                K,
                C,
                g.layout,
                {grad_output, g.output_strides(), g.P, g.Q},
                {grad_input, g.input_strides(), g.H, g.W},
                1,
                1,
                phases.along_h,
                phases.along_w,
                phases.taps,
                phases.data,
                phases.tap_count},
               weight, K * C * taps_count, taps_count, C * taps_count, {nullptr, false});
}

}  // namespace torchcnn::TORCHCNN_ISA::small_channels
