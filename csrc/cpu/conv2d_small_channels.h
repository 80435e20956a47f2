// Convolution with few channels on the broadcast side, vectorised over pixels (NCHW): first layers, narrow groups, and the
// gradient of their inputs. The general kernel would spend its time packing, or leave most lanes of a panel empty.
//
//   result[k; i, j] = bias[k] + sum_{r,c,s} weight[k, c, t] source[c, i step_h + row_t, j step_w + column_t]     t = (r, s)
//
// It is the GEMM core with the roles turned: A is the weight, packed [(r,c,s)][rows of the tile], and B the image itself, up to
// 8 vectors of pixels of one row, found through a table of offsets. For that the rows of the source are copied once into a
// padded buffer with the columns of equal remainder modulo step_w side by side:
//
//   buffer[row][c][column mod step_w][column / step_w]      columns from the first tap's, zero outside the source
//
// The filter row r comes first in the sum, so that the taps above and below the image are left out instead of multiplied by 0.
// For grad_input, each phase (h mod stride_h, w mod stride_w) of the input is such a correlation of grad_output with step 1.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../geometry.h"
#include "conv2d_gemm.h"
#include "conv2d_implicit_gemm.h"
#include "runtime.h"
#include "simd.h"

namespace torchcnn::TORCHCNN_ISA::small_channels {

using implicit_gemm::Correlation;
using implicit_gemm::Phase;
using implicit_gemm::Tap;

// Vectors of pixels beside `rows` filters in a tile: 12 accumulators or nearly, in 16 registers.
constexpr int tile_vectors(int rows) { return rows == 1 ? 6 : rows <= 3 ? 4 : rows == 4 ? 3 : 2; }

// Source rows buffered at a time, all of their channels: 32 Ki floats are half of the smaller L2 caches.
inline constexpr int64_t buffer_elements = 32 * 1024;

// to[m to_row + x] (+)= A B, for `count` pixels x, started at `start` unless it adds.
template <class T, int rows, int vectors>
void row_tile(int64_t count, int64_t depth, const T* weight, const T* pixels, const int64_t* offset, const T* start, bool add,
              bool relu, T* to, int64_t to_row) {
  gemm::Tile<T, rows, vectors> tile;
  T spill[rows * vectors * kLanes<T>];
  const bool whole = count == vectors * kLanes<T>;
  tile.start_at(start);
  gemm::StridedA<T> left{weight, 1, rows};
  gemm::IndirectB<T> right{pixels, offset};
  tile.accumulate(depth, left, right);
  if (add) tile.add_from(to, to_row);  // into whole vectors only: sums in several parts are kept in a padded tile
  if (relu) tile.rectify();
  if (whole) return tile.store_to(to, to_row);
  tile.store_to(spill, vectors * kLanes<T>);
  for (int m = 0; m < rows; ++m) implicit_gemm::copy_row(spill + m * vectors * kLanes<T>, count, to + m * to_row);
}

template <class T, int rows, int vectors = tile_vectors(rows)>
void row_tile_of(int64_t needed, int64_t count, int64_t depth, const T* weight, const T* pixels, const int64_t* offset,
                 const T* start, bool add, bool relu, T* to, int64_t to_row) {
  if constexpr (vectors > 1) {
    if (needed < vectors)
      return row_tile_of<T, rows, vectors - 1>(needed, count, depth, weight, pixels, offset, start, add, relu, to, to_row);
  }
  row_tile<T, rows, vectors>(count, depth, weight, pixels, offset, start, add, relu, to, to_row);
}

// One row of `columns` pixels for `rows` filters. Where the last tile is narrow it overlaps the one before, unless it adds.
template <class T, int rows>
void row_product(int64_t columns, int64_t depth, const T* weight, const T* pixels, const int64_t* offset, const T* start,
                 bool add, bool relu, T* to, int64_t to_row) {
  constexpr int64_t L = kLanes<T>, width = tile_vectors(rows) * L;
  for (int64_t x = 0; x < columns;) {
    int64_t count = std::min(width, columns - x);
    const int64_t needed = ceil_div(count, L);
    if (!add && count < needed * L && columns >= needed * L) count = needed * L, x = columns - count;
    row_tile_of<T, rows>(needed, count, depth, weight, pixels + x, offset, start, add, relu, to + x, to_row);
    x += count;
  }
}

template <class T>
struct Buffer {
  int64_t first_column, columns;  // of the source, padded; one of step_w remainders holds `pitch` of them
  int64_t pitch, row;             // row: elements between the rows of the source
};

// Rows row ... row + count - 1 of channels c ... c + channels - 1 of one image.
template <class T>
void fill_buffer(const Correlation<T>& p, const Buffer<T>& b, int64_t n, int64_t c, int64_t channels, int64_t row, int64_t count,
                 T* buffer) {
  const Strides& s = p.source.strides;
  for (int64_t remainder = 0; remainder < p.step_w; ++remainder) {
    // Element x is source column first_column + remainder + x step_w; left ... end - 1 exist.
    const int64_t first = b.first_column + remainder;
    const int64_t left = std::min(b.pitch, first < 0 ? ceil_div(-first, p.step_w) : 0);
    const int64_t end =
        first >= p.source.columns ? left : std::clamp(ceil_div(p.source.columns - first, p.step_w), left, b.pitch);
    for (int64_t r = 0; r < count; ++r) {
      for (int64_t channel = 0; channel < channels; ++channel) {
        const T* from = p.source.data + n * s.n + (c + channel) * s.c + (row + r) * s.h + first + left * p.step_w;
        T* to = buffer + r * b.row + (channel * p.step_w + remainder) * b.pitch;
        implicit_gemm::zero_beyond(to, left);
        const int64_t tail = end / kLanes<T> * kLanes<T>;  // b.pitch ends a vector too
        implicit_gemm::zero_beyond(to + tail, b.pitch - tail);
        if (left == end) continue;
        if (p.step_w == 1)
          implicit_gemm::copy_row(from, end - left, to + left);
        else
          gather_strided(from, p.step_w, end - left, to + left);
      }
    }
  }
}

// to[column] = from[column % phases][column / phases] + bias, rectified if asked for.
template <class T>
void merge_phases(const T* from, int64_t phase_stride, int64_t phases, int64_t columns, T bias, bool relu, T* to) {
  constexpr int64_t L = kLanes<T>;
  const auto finish = [&](T x) { return relu && x + bias < T(0) ? T(0) : x + bias; };
  if (phases > 2) {
    for (int64_t phase = 0; phase < phases; ++phase, from += phase_stride)
      for (int64_t j = 0, column = phase; column < columns; ++j, column += phases) to[column] = finish(from[j]);
    return;
  }
  int64_t column = 0;
  if (phases == 2 && !relu && bias == T(0)) {
    for (; column + 2 * L <= columns; column += 2 * L) {
      const Vec<T> even = load(from + column / 2), odd = load(from + phase_stride + column / 2);
      store(to + column, interleave<T>(even, odd, 0, kEachLane<T>));
      store(to + column + L, interleave<T>(even, odd, 1, kEachLane<T>));
    }
  }
  for (; column < columns; ++column) to[column] = finish(from[column % phases * phase_stride + column / phases]);
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
  Buffer<T> b{first_column, (largest.columns - 1) * p.step_w + last_column - first_column + 1, 0, 0};
  // A tile may read up to a vector less one element beyond the last pixel.
  b.pitch = ceil_div(ceil_div(b.columns, p.step_w) + L - 1, L) * L;
  // Few rows in a block would be copied again and again by the blocks around: take part of the channels at a time instead.
  const int64_t channel_size = p.step_w * b.pitch, halo = last_row - first_row + 1;
  const int64_t wanted_rows = std::min<int64_t>(largest.rows, std::max<int64_t>(4, 2 * halo / p.step_h));
  const int64_t chunk = std::clamp<int64_t>(buffer_elements / (channel_size * (wanted_rows * p.step_h + halo)), 1, p.channels);
  const int64_t chunks = ceil_div(p.channels, chunk);
  b.row = chunk * channel_size;
  // Each thread should get several blocks; rows may be split at will, since that changes no sum.
  const int64_t share = ceil_div(p.N * p.groups * largest.rows, 4 * thread_count());
  const int64_t block_rows = std::clamp<int64_t>(std::min((buffer_elements / b.row - halo) / p.step_h, share),
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
      const int64_t rows = gemm::tile_rows(p.filters - k);
      const T* from = weight + group * group_stride + k * k_stride;
      int64_t column = 0;
      for (int64_t c = 0; c < p.channels; c += chunk) {
        const int64_t c_end = std::min(p.channels, c + chunk);
        for (int64_t fr = 0; fr < filter_rows; ++fr) {
          for (int64_t channel = c; channel < c_end; ++channel) {
            for (int64_t t = filter_row[fr].first_tap; t < filter_row[fr].first_tap + filter_row[fr].taps; ++t, ++column) {
              for (int64_t m = 0; m < rows; ++m) packed[at++] = from[m * k_stride + channel * c_stride + p.taps[t].weight];
              const int64_t shift = p.taps[t].column - first_column;
              offset[column] = (p.taps[t].row - first_row) * b.row + ((channel - c) * p.step_w + shift % p.step_w) * b.pitch +
                               shift / p.step_w;
            }
          }
        }
      }
      k += rows;
    }
  }

  const bool direct = phases == 1 && chunks == 1;
  const int64_t tile_pitch = ceil_div(largest.columns, L) * L;  // a row of the result before it is interleaved
  const int64_t cost = block_rows * phases * patch_size * p.filters / phases * tile_pitch / L;
  parallel_for(p.N * p.groups * blocks, cost, [&](int64_t task) {
    const int64_t i_begin = task % blocks * block_rows, image = task / blocks, n = image / p.groups, group = image % p.groups;
    const int64_t i_end = std::min(largest.rows, i_begin + block_rows);
    // The rows of the source that exist; row r of the buffer is source row i_begin step_h + first_row + r.
    const int64_t buffer_row = i_begin * p.step_h + first_row;
    const int64_t read_begin = std::clamp<int64_t>(buffer_row, 0, p.source.rows);
    const int64_t read_end = std::clamp<int64_t>((i_end - 1) * p.step_h + last_row + 1, read_begin, p.source.rows);
    T* buffer = workspace<T>(Slot::patches, (block_rows * p.step_h + halo) * b.row + 8 * L);
    T* tile = direct ? nullptr : workspace<T>(Slot::tile, block_rows * phases * p.filters * tile_pitch);
    const Strides& s = p.result.strides;
    T* result = p.result.data + n * s.n + group * p.filters * s.c;

    for (int64_t c = 0; c < p.channels; c += chunk) {
      const int64_t channels = std::min(chunk, p.channels - c);
      fill_buffer(p, b, n, group * p.channels + c, channels, read_begin, read_end - read_begin,
                  buffer + (read_begin - buffer_row) * b.row);
      for (int64_t k = 0, rows = 0; k < p.filters; k += rows) {
        rows = gemm::tile_rows(p.filters - k);
        const T* panel = packed + (group * p.filters + k) * patch_size;
        for (int64_t f = 0; f < phases; ++f) {
          const int64_t i_count = std::min(i_end, p.phases[f].rows) - i_begin;
          for (int64_t i = 0; i < i_count; ++i) {
            // The filter rows that meet the source: a range of them, since their source rows are in order.
            int64_t begin = first_filter_row[f], end = first_filter_row[f + 1];
            const int64_t h = (i_begin + i) * p.step_h;
            const auto outside = [&](int64_t fr) {
              return h + filter_row[fr].source_row < 0 || h + filter_row[fr].source_row >= p.source.rows;
            };
            while (begin < end && outside(begin)) ++begin;
            while (begin < end && outside(end - 1)) --end;
            const int64_t tap_begin = begin < end ? filter_row[begin].first_tap : 0;
            const int64_t taps = begin < end ? filter_row[end - 1].first_tap + filter_row[end - 1].taps - tap_begin : 0;
            const int64_t first = c * p.tap_count + tap_begin * channels;
            const T* start = direct && epilogue.bias != nullptr ? epilogue.bias + group * p.filters + k : nullptr;
            T* to = direct ? result + k * s.c + (i_begin + i) * s.h : tile + ((i * phases + f) * p.filters + k) * tile_pitch;
            const T* pixels = buffer + i * p.step_h * b.row;
            gemm::with_rows(rows, [&]<int count>(std::integral_constant<int, count>) {
              row_product<T, count>(direct ? p.phases[f].columns : tile_pitch, taps * channels, panel + first * count, pixels,
                                    offset + first, start, c > 0, direct && epilogue.relu, to, direct ? s.c : tile_pitch);
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
        for (int64_t k = 0; k < p.filters; ++k) {
          T* to = result + k * s.c + h * s.h;
          const T* from = tile + ((i * phases + f_h * p.phases_w) * p.filters + k) * tile_pitch;
          const T bias = epilogue.bias == nullptr ? T(0) : epilogue.bias[group * p.filters + k];
          merge_phases(from, p.filters * tile_pitch, p.phases_w, p.result.columns, bias, epilogue.relu, to);
        }
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
