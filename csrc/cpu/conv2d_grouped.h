// Grouped convolution by 3x3 filters, with as many filters as input channels in each group: M, a small power of two.
//
// A vector runs along the channels and holds whole groups: channel k needs the channels k ^ d, d < M, which share the upper bits
// of its number. So the convolution is a sum of M depthwise ones, each of channels that have changed places:
//
//   output[k] = bias[k] + sum_d sum_t weight[k][k ^ d][t] input[k ^ d]             t = (r, s)
//
// The sums change places instead of the input, which would have to for every tap: in the frame of d, lane l sums output[l ^ d]
// and meets input[l] as it is loaded. From frame to frame d follows a Gray code, in which one bit changes (Knuth, The Art of
// Computer Programming, volume 4A, section 7.2.1.1), so that a step is one shuffle of each sum, every 9 products.
//
//   grad_input    the same of grad_output, along the axes of conv2d_depthwise_axes.h
//   grad_weight[l ^ d][l][t] = sum_{n,i,j} grad_output[l ^ d] input[l]     here the lanes of grad_output change places
//
// If M is above the number of lanes, a group is several vectors, and the upper bits of d choose among these. Both layouts are
// brought into rows of vectors with zeros around (conv2d_depthwise_nchw.h), which is little work beside M depthwise convolutions.
// The zeros of the padding are multiplied, as in all kernels that copy rows: 0 * inf is NaN.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../geometry.h"
#include "conv2d_depthwise_axes.h"
#include "conv2d_depthwise_channels_last.h"
#include "conv2d_depthwise_nchw.h"
#include "conv2d_depthwise_transpose.h"
#include "conv2d_grad_bias.h"
#include "runtime.h"
#include "simd.h"

namespace torchcnn::TORCHCNN_ISA::grouped {

using depthwise::Axes;
using depthwise::Axis;
using depthwise::Phase;
using depthwise::Range;
using depthwise::unrolled;

// Sums in a register tile, neighbours in a row: 8 hide the latency of a multiply-add, and leave 16 registers room for 3 weights;
// 14 divide the rows of the usual networks (224, 112, 56, 28, 14).
inline constexpr int64_t short_tile = 8, longest_tile = 14;

// Of 16 registers 2 are left then: few taps only, and the input is read for each of them.
template <int64_t taps>
inline constexpr int64_t long_tile = TORCHCNN_VECTOR_REGISTERS == 32 || taps == 1 || taps == 2 ? longest_tile : short_tile;

// The tile that wastes the fewest sums.
template <int64_t taps>
inline bool suits_long_tile(int64_t positions) {
  return ceil_div(positions, long_tile<taps>) * long_tile<taps> <= ceil_div(positions, short_tile) * short_tile;
}

constexpr int64_t gray(int64_t frame) { return frame ^ (frame >> 1); }

// Lane l becomes lane l ^ (1 << bit).
template <class T, int bit>
[[gnu::always_inline]] inline Vec<T> exchanged(Vec<T> v) {
  return depthwise::shuffled<T>(v, v, [](int64_t lane) { return lane ^ (int64_t(1) << bit); }, kEachLane<T>);
}

// All of `count` vectors.
template <class T, int64_t count>
[[gnu::always_inline]] inline void exchange(Vec<T> (&v)[count], int bit) {
  const auto all = [&](auto b) __attribute__((always_inline)) {
    unrolled<count>([&](auto x) __attribute__((always_inline)) { v[x] = exchanged<T, b>(v[x]); });
  };
  constexpr int64_t L = kLanes<T>;
  if (bit == 0) return all(std::integral_constant<int, 0>{});
  if constexpr (L > 2)
    if (bit == 1) return all(std::integral_constant<int, 1>{});
  if constexpr (L > 4)
    if (bit == 2) return all(std::integral_constant<int, 2>{});
  if constexpr (L > 8) all(std::integral_constant<int, 3>{});
}

// How the channels of a group lie in vectors.
template <class T>
struct Blocks {
  int64_t members, frames, parts;  // M = frames * parts: lanes that change places, vectors that do
  int64_t channels, width, count;  // all channels, those of a block of `parts` vectors, and blocks

  Blocks(const Conv2dGeometry& g)
      : members(g.C_per_group()),
        frames(std::min(members, kLanes<T>)),
        parts(members / frames),
        channels(g.C),
        width(parts * kLanes<T>),
        count(ceil_div(g.C, width)) {}
  // The lanes that vector v of a block has.
  int64_t lanes(int64_t block, int64_t v) const { return std::min(kLanes<T>, channels - block * width - v * kLanes<T>); }
};

// One row of the output of one phase, for one vector of channels.
template <class T>
struct Row {
  const T* source;  // what the first tap reads at position 0, in the first vector of the block
  int64_t source_tap_row, source_part;
  const T* weight;  // of the first tap in the first frame and part
  int64_t weight_tap_row, weight_tap, weight_part;
  int64_t tap_rows, part;  // part: which vector of the block this is
  T* output;
  int64_t output_pixel, lanes;
  int64_t ahead;  // where the next block writes, to be fetched, or 0
};

// taps, step: of a row of the filter, and how many columns apart its positions read; 0, 0: any.
template <class T, int64_t taps, int64_t step, int64_t tile_pixels>
[[gnu::noinline]] void sum_row(const Blocks<T>& blocks, const Row<T>& row, const Phase& phase, int64_t any_step, Vec<T> bias,
                               bool relu) {
  constexpr int64_t L = kLanes<T>, columns = (tile_pixels - 1) * step + taps;
  const int64_t positions = phase.positions, column_step = (taps > 0 ? step : any_step) * L;
  const int last_bit = __builtin_ctzll(blocks.frames) - 1;
  for (int64_t next = 0; next < positions; next += tile_pixels) {
    const int64_t j = std::max<int64_t>(0, std::min(next, positions - tile_pixels)), count = std::min(positions, tile_pixels);
    Vec<T> sum[tile_pixels];
    unrolled<tile_pixels>([&](auto x) __attribute__((always_inline)) { sum[x] = bias; });
    const T* weight_of_frame = row.weight;
    for (int64_t frame = 0; frame < blocks.frames; ++frame) {
      if (frame > 0) exchange<T>(sum, __builtin_ctzll(frame));
      for (int64_t part = 0; part < blocks.parts; ++part, weight_of_frame += row.weight_part) {
        const T* from = row.source + (row.part ^ part) * row.source_part + j * column_step;
        const T* weight = weight_of_frame;
        for (int64_t r = 0; r < row.tap_rows; ++r, from += row.source_tap_row, weight += row.weight_tap_row) {
          if constexpr (taps > 0) {
            Vec<T> tap[taps];
            unrolled<taps>([&](auto s) __attribute__((always_inline)) { tap[s] = load(weight + s * row.weight_tap); });
            unrolled<columns>([&](auto d) __attribute__((always_inline)) {
              const bool once = tile_pixels <= 8 || TORCHCNN_VECTOR_REGISTERS == 32;
              const Vec<T> input = once ? depthwise::load_once(from + d * L) : load(from + d * L);
              unrolled<tile_pixels>([&](auto x) __attribute__((always_inline)) {
                constexpr int64_t s = d - x * step;
                if constexpr (s >= 0 && s < taps) sum[x] += tap[s] * input;
              });
            });
          } else {
            for (int64_t s = 0; s < phase.count; ++s) {
              const Vec<T> tap = load(weight + s * row.weight_tap);
              const T* const at = from + s * phase.offset_step * L;
              unrolled<tile_pixels>([&](auto x) __attribute__((always_inline)) { sum[x] += tap * load(at + x * column_step); });
            }
          }
        }
      }
    }
    exchange<T>(sum, last_bit);
    T* const output = row.output + j * row.output_pixel;
    unrolled<tile_pixels>([&](auto x) __attribute__((always_inline)) {
      if (x >= count) return;
      store_partial(output + x * row.output_pixel, relu ? rectified<T>(sum[x]) : sum[x], row.lanes);
      if (row.ahead > 0) __builtin_prefetch(output + x * row.output_pixel + row.ahead, 1);
    });
  }
}

// Rows of the source, packed: [part][row][column][lane], zeros in the columns outside and in lanes beyond the channels.
template <class T>
struct PackedRows {
  int64_t first_column, pitch, rows;  // `rows` of each part
  const int32_t* place;

  static int64_t pitch_of(const Axis& w) {
    return std::max(w.reads(0, std::max(w.phase[0].positions, longest_tile)).end, w.source_size) - std::min<int64_t>(w.first, 0);
  }
  PackedRows(const Axes& axes, int64_t strip, Layout layout) {
    const Axis& w = axes.w;
    first_column = std::min<int64_t>(w.first, 0);
    pitch = pitch_of(w);
    rows = (strip - 1) * axes.h.step + axes.h.span() + 1;
    place = layout == Layout::channels_last
                ? nullptr
                : depthwise::nchw::Cut<T>::place_of(Slot::offsets, std::min(rows, axes.h.source_size), w.source_size, pitch);
  }
  int64_t row() const { return pitch * kLanes<T>; }
  int64_t part() const { return rows * row(); }
};

// The planes that lanes of vector v of a block are made of.
template <class T>
depthwise::nchw::Lanes<T> lanes_of(T* image, Layout layout, int64_t plane, const Blocks<std::remove_const_t<T>>& blocks,
                                   int64_t block, int64_t v) {
  const int64_t first = block * blocks.width + v * kLanes<std::remove_const_t<T>>, count = blocks.lanes(block, v);
  if (layout == Layout::channels_last) return {image + first, 1, blocks.channels, count};
  return {image + first * plane, plane, 1, count};
}

// to[block][v][frame][part][t][lane]: in that frame, lane l of vector v sums channel k = v L + (l ^ gray(frame)) of the block, of
// what comes from channel c = (v ^ part) L + l; the filter is weight[k][c], or weight[c][k] if that is `turned`.
template <class T>
void pack_weight(const Blocks<T>& blocks, const T* weight, int64_t filter, bool turned, T* to) {
  constexpr int64_t L = kLanes<T>;
  parallel_for(blocks.count * blocks.parts * blocks.frames, blocks.parts * filter * L * 4, [&](int64_t task) {
    const int64_t frame = task % blocks.frames, v = task / blocks.frames % blocks.parts;
    const int64_t first = task / blocks.frames / blocks.parts * blocks.width;
    T* at = to + task * blocks.parts * filter * L;
    for (int64_t part = 0; part < blocks.parts; ++part, at += filter * L) {
      for (int64_t lane = 0; lane < L; ++lane) {
        const int64_t k = first + v * L + (lane ^ gray(frame)), c = first + (v ^ part) * L + lane;
        if (k >= blocks.channels) {
          for (int64_t t = 0; t < filter; ++t) at[t * L + lane] = 0;
          continue;
        }
        const T* from = weight + ((turned ? c : k) * blocks.members + (turned ? k : c) % blocks.members) * filter;
        for (int64_t t = 0; t < filter; ++t) at[t * L + lane] = from[t];
      }
    }
  });
}

// Calls body<taps, step>() for strides 1 and 2, of grad_input too, else body<0, 0>().
template <class Body>
void for_known_taps(const Axis& axis, const Phase& phase, const Body& body) {
  if (phase.offset_step == 1 || phase.count == 1) {
    if (phase.count == 3 && axis.step == 1) return body.template operator()<3, 1>();
    if (phase.count == 3 && axis.step == 2) return body.template operator()<3, 2>();
    if (phase.count == 2 && axis.step == 1) return body.template operator()<2, 1>();
    if (phase.count == 1 && axis.step == 1) return body.template operator()<1, 1>();
  }
  body.template operator()<0, 0>();
}

// Forward along forward_axes, grad_input along grad_input_axes with the weight turned.
template <class T>
void correlate(const Conv2dGeometry& g, const Axes& axes, const T* source, const T* weight, bool turned,
               const Epilogue<T>& epilogue, T* output) {
  constexpr int64_t L = kLanes<T>;
  const Axis &h = axes.h, &w = axes.w;
  const Blocks<T> blocks(g);
  const int64_t filter = g.R * g.S, rows = h.phase[0].positions;
  const int64_t source_plane = h.source_size * w.source_size, output_plane = h.output_size * w.output_size;
  const bool nchw = g.layout == Layout::nchw;
  T* const packed = workspace<T>(Slot::packed_weight, blocks.count * blocks.parts * blocks.members * filter * L);
  pack_weight(blocks, weight, filter, turned, packed);

  // Rows of a task: as many as leave their packed source in a part of L2; rows may be split at will, since that changes no sum.
  const int64_t row_bytes = PackedRows<T>::pitch_of(w) * blocks.width * int64_t(sizeof(T)) * h.step;
  const int64_t share = ceil_div(g.N * blocks.count * rows, 4 * thread_count());
  const int64_t strip = std::clamp<int64_t>(std::min((64 << 10) / row_bytes, share), 1, rows), strips = ceil_div(rows, strip);
  const PackedRows<T> from(axes, strip, g.layout);
  const int64_t to_rows = strip * h.phases, to_part = to_rows * w.output_size * L;
  parallel_for(g.N * strips * blocks.count, strip * w.output_size * blocks.members * filter * blocks.parts, [&](int64_t task) {
    const int64_t block = task % blocks.count, n = task / blocks.count / strips;
    const int64_t i_begin = task / blocks.count % strips * strip, i_end = std::min(i_begin + strip, rows);
    const Range reads = depthwise::nchw::clipped(h.reads(i_begin, i_end), h.source_size);
    const Range writes{i_begin * h.phases, std::min(i_end * h.phases, h.output_size)};
    T* const patch = workspace<T>(Slot::patches, blocks.parts * from.part());
    for (int64_t v = 0; v < blocks.parts; ++v)
      depthwise::nchw::pack_rows<T>(
          lanes_of(source + n * blocks.channels * source_plane, g.layout, source_plane, blocks, block, v), w.source_size, reads,
          from.first_column, from.pitch, from.place, patch + v * from.part());
    T* const image = output + n * blocks.channels * output_plane;
    T* const tile = nchw ? workspace<T>(Slot::tile, blocks.parts * to_part) : nullptr;
    for (int64_t v = 0; v < blocks.parts; ++v) {
      const int64_t first = block * blocks.width + v * L, lanes = blocks.lanes(block, v);
      const Vec<T> bias = epilogue.bias == nullptr ? Vec<T>{} : load_partial(epilogue.bias + first, lanes);
      const T* const filters = packed + (block * blocks.parts + v) * blocks.members * filter * L;
      for (int64_t i = writes.begin; i < writes.end; ++i) {
        const Phase& phase_h = h.phase[i % h.phases];
        const int64_t position = i / h.phases;
        const Range taps_h = depthwise::taps_inside(h, phase_h, position);
        const int64_t row = position * h.step + phase_h.offset + taps_h.begin * phase_h.offset_step;
        for (int64_t fw = 0; fw < w.phases; ++fw) {
          const Phase& phase_w = w.phase[fw];
          Row<T> at;
          at.source = patch + (row - reads.begin) * from.row() + (phase_w.offset - from.first_column) * L;
          at.source_tap_row = phase_h.offset_step * from.row();
          at.source_part = from.part();
          at.weight = filters + ((phase_h.index + taps_h.begin * phase_h.index_step) * g.S + phase_w.index) * L;
          at.weight_tap_row = phase_h.index_step * g.S * L;
          at.weight_tap = phase_w.index_step * L;
          at.weight_part = filter * L;
          at.tap_rows = phase_w.count > 0 ? taps_h.end - taps_h.begin : 0;
          at.part = v;
          at.output = nchw ? tile + v * to_part + ((i - writes.begin) * w.output_size + fw) * L
                           : image + (i * w.output_size + fw) * blocks.channels + first;
          at.output_pixel = w.phases * (nchw ? L : blocks.channels);
          at.lanes = nchw ? L : lanes;
          at.ahead = nchw ? 0 : blocks.width;
          for_known_taps(w, phase_w, [&]<int64_t taps, int64_t step>() {
            if (suits_long_tile<taps>(phase_w.positions))
              sum_row<T, taps, step, long_tile<taps>>(blocks, at, phase_w, w.step, bias, epilogue.relu);
            else
              sum_row<T, taps, step, short_tile>(blocks, at, phase_w, w.step, bias, epilogue.relu);
          });
        }
      }
      if (nchw)
        depthwise::nchw::unpack_rows<T>(tile + v * to_part, w.output_size,
                                        lanes_of(image, g.layout, output_plane, blocks, block, v), w.output_size, writes, 0);
    }
  });
}

template <class T>
void conv2d_forward(const Conv2dGeometry& g, const T* input, const T* weight, const Epilogue<T>& epilogue, T* output) {
  correlate(g, depthwise::forward_axes(g), input, weight, false, epilogue, output);
}

template <class T>
void conv2d_grad_input(const Conv2dGeometry& g, const T* grad_output, const T* weight, T* grad_input) {
  correlate(g, depthwise::grad_input_axes(g), grad_output, weight, true, {nullptr, false}, grad_input);
}

// Pixels of grad_output in a register tile of grad_weight: 3 x 3 sums + 4 pixels + 1 of 16 registers.
inline constexpr int64_t dot_pixels = 4;
// Pixels whose products are added before they meet the rest of the sum, which keeps rounding errors small; whole rows, if short.
inline constexpr int64_t run_pixels = 48;

// Rows of grad_output and of the input under them.
template <class T>
struct Dot {
  const T* gradient;
  const T* source;
  int64_t rows, columns;              // of grad_output
  int64_t source_row, source_column;  // from position to position, in elements
  int64_t tap_row;                    // from tap to tap
  T* sum;                             // [r][s][lane]
};

// sum[t][l] += grad_output[l ^ d] input[l]. step: source_column in vectors; 0: any.
template <class T, int64_t step>
[[gnu::noinline]] void dot_3x3(const Dot<T>& at, int64_t d) {
  constexpr int64_t L = kLanes<T>;
  Vec<T> sum[3][3];
  const auto add = [&](const T* gradient, const T* source, auto pixels) __attribute__((always_inline)) {
    Vec<T> g[pixels];
    unrolled<pixels>([&](auto x) __attribute__((always_inline)) { g[x] = load(gradient + x * L); });
    unrolled<4>([&](auto bit) __attribute__((always_inline)) {
      if constexpr ((1 << bit) < L)
        if (d >> bit & 1) unrolled<pixels>([&](auto x) __attribute__((always_inline)) { g[x] = exchanged<T, bit>(g[x]); });
    });
    unrolled<3>([&](auto r) __attribute__((always_inline)) {
      const T* const from = source + r * at.tap_row;
      if constexpr (step > 0) {
        unrolled<(pixels - 1) * step + 3>([&](auto column) __attribute__((always_inline)) {
          const Vec<T> input = depthwise::load_once(from + column * L);
          unrolled<pixels>([&](auto x) __attribute__((always_inline)) {
            constexpr int64_t s = column - x * step;
            if constexpr (s >= 0 && s < 3) sum[r][s] += g[x] * input;
          });
        });
      } else {
        unrolled<3>([&](auto s) __attribute__((always_inline)) {
          unrolled<pixels>([&](auto x)
                               __attribute__((always_inline)) { sum[r][s] += g[x] * load(from + s * L + x * at.source_column); });
        });
      }
    });
  };
  const int64_t rows_together = std::max<int64_t>(1, run_pixels / at.columns), pieces = ceil_div(at.columns, run_pixels);
  for (int64_t i_begin = 0; i_begin < at.rows; i_begin += rows_together) {
    for (int64_t piece = 0; piece < pieces; ++piece) {
      unrolled<9>([&](auto t) __attribute__((always_inline)) { sum[t / 3][t % 3] = Vec<T>{}; });
      for (int64_t i = i_begin; i < std::min(at.rows, i_begin + rows_together); ++i) {
        const T *gradient = at.gradient + i * at.columns * L, *source = at.source + i * at.source_row;
        const int64_t end = (piece + 1) * at.columns / pieces;
        int64_t j = piece * at.columns / pieces;
        for (; j + dot_pixels <= end; j += dot_pixels)
          add(gradient + j * L, source + j * at.source_column, std::integral_constant<int64_t, dot_pixels>{});
        for (; j < end; ++j) add(gradient + j * L, source + j * at.source_column, std::integral_constant<int64_t, 1>{});
      }
      unrolled<9>([&](auto t)
                      __attribute__((always_inline)) { store(at.sum + t * L, load(at.sum + t * L) + sum[t / 3][t % 3]); });
    }
  }
}

template <class T>
void conv2d_grad_weight(const Conv2dGeometry& g, const T* grad_output, const T* input, T* grad_weight, T* grad_bias) {
  constexpr int64_t L = kLanes<T>, filter = 9;
  const Axes axes = depthwise::forward_axes(g);
  const Axis &h = axes.h, &w = axes.w;
  const Blocks<T> blocks(g);
  const int64_t size = blocks.parts * blocks.members * filter * L;
  const int64_t strips = ceil_div(g.P, std::clamp<int64_t>(256 / g.Q, 1, g.P)), strip = ceil_div(g.P, strips);
  const int64_t units = g.N * strips;
  const PackedRows<T> from(axes, strip, g.layout);
  const int64_t gradient_part = strip * g.Q * L;
  const int32_t* const place =
      from.place == nullptr ? nullptr : depthwise::nchw::Cut<T>::place_of(Slot::positions, strip, g.Q, g.Q);
  // In channels_last a task takes neighbouring blocks, which share cache lines and pages.
  const int64_t line_blocks = std::max<int64_t>(1, 256 / (blocks.width * int64_t(sizeof(T))));
  const int64_t bundle = g.layout == Layout::nchw ? 1 : line_blocks, bundles = ceil_div(blocks.count, bundle);
  const int64_t slices = std::min(units, ceil_div(16, bundles));
  T* const partial = workspace<T>(Slot::partial_sums, blocks.count * slices * size);
  const BiasSums<T> bias_sums(slices, g.K, grad_bias);
  parallel_for(bundles * slices, units / slices * strip * g.Q * bundle * blocks.members * filter * blocks.parts,
               [&](int64_t task) {
    const int64_t slice = task % slices, first = task / slices * bundle, last = std::min(first + bundle, blocks.count);
    T* const source = workspace<T>(Slot::patches, blocks.parts * from.part());
    T* const gradient = workspace<T>(Slot::gradient, blocks.parts * gradient_part);
    for (int64_t block = first; block < last; ++block)
      depthwise::fill_vectors(partial + (block * slices + slice) * size, size / L);
    for (int64_t unit = slice * units / slices; unit < (slice + 1) * units / slices; ++unit) {
      const int64_t n = unit / strips;
      const Range rows{unit % strips * g.P / strips, (unit % strips + 1) * g.P / strips};
      const Range wanted = h.reads(rows.begin, rows.end), inside = depthwise::nchw::clipped(wanted, g.H);
      const int64_t wanted_rows = wanted.end - wanted.begin;
      const int64_t above = std::clamp<int64_t>(-wanted.begin, 0, wanted_rows), below = above + inside.end - inside.begin;
      for (int64_t block = first; block < last; ++block) {
        for (int64_t v = 0; v < blocks.parts; ++v) {
          T* const to = source + v * from.part();
          depthwise::fill_vectors(to, above * from.pitch);
          depthwise::nchw::pack_rows<T>(lanes_of(input + n * g.C * g.H * g.W, g.layout, g.H * g.W, blocks, block, v), g.W, inside,
                                        from.first_column, from.pitch, from.place, to + above * from.row());
          depthwise::fill_vectors(to + below * from.row(), (wanted_rows - below) * from.pitch);
          depthwise::nchw::pack_rows<T>(lanes_of(grad_output + n * g.C * g.P * g.Q, g.layout, g.P * g.Q, blocks, block, v), g.Q,
                                        rows, 0, g.Q, place, gradient + v * gradient_part);
          bias_sums.add_vectors(slice, gradient + v * gradient_part, L, (rows.end - rows.begin) * g.Q, [&](int64_t lane) {
            return lane < blocks.lanes(block, v) ? block * blocks.width + v * L + lane : -1;
          });
        }
        Dot<T> at;
        at.rows = rows.end - rows.begin, at.columns = g.Q;
        at.source_row = h.step * from.row(), at.source_column = w.step * L, at.tap_row = from.row();
        at.sum = partial + (block * slices + slice) * size;
        for (int64_t d = 0; d < blocks.frames; ++d) {
          for (int64_t v = 0; v < blocks.parts; ++v) {
            for (int64_t part = 0; part < blocks.parts; ++part, at.sum += filter * L) {
              at.gradient = gradient + (v ^ part) * gradient_part;
              at.source = source + v * from.part() + (w.first - from.first_column) * L;
              switch (w.step) {
                case 1: dot_3x3<T, 1>(at, d); break;
                case 2: dot_3x3<T, 2>(at, d); break;
                default: dot_3x3<T, 0>(at, d);
              }
            }
          }
        }
      }
    }
  });
  // grad_weight[k][c] is in lane c, in the frame and part in which k met it.
  parallel_for(g.C, blocks.members * filter * slices, [&](int64_t channel) {
    const int64_t block = channel / blocks.width, v = channel % blocks.width / L, lane = channel % L;
    const T* const first = partial + block * slices * size;
    for (int64_t frame = 0; frame < blocks.frames; ++frame) {
      for (int64_t part = 0; part < blocks.parts; ++part) {
        const int64_t k = block * blocks.width + (v ^ part) * L + (lane ^ frame);
        const T* at = first + ((frame * blocks.parts + v) * blocks.parts + part) * filter * L + lane;
        T* to = grad_weight + (k * blocks.members + channel % blocks.members) * filter;
        for (int64_t t = 0; t < filter; ++t) {
          T sum = 0;
          for (int64_t slice = 0; slice < slices; ++slice) sum += at[slice * size + t * L];
          to[t] = sum;
        }
      }
    }
  });
  bias_sums.finish();
}

#define TORCHCNN_INSTANTIATE_GROUPED(T)                                                            \
  template void conv2d_forward(const Conv2dGeometry&, const T*, const T*, const Epilogue<T>&, T*); \
  template void conv2d_grad_input(const Conv2dGeometry&, const T*, const T*, T*);                  \
  template void conv2d_grad_weight(const Conv2dGeometry&, const T*, const T*, T*, T*);
TORCHCNN_INSTANTIATE_GROUPED(float)
TORCHCNN_INSTANTIATE_GROUPED(double)

}  // namespace torchcnn::TORCHCNN_ISA::grouped
