// Depthwise convolution of NCHW tensors: kLanes planes at a time are transposed, so that a pixel is a vector,
//
//   packed[row][column][lane]  =  plane[first plane + lane][row][column],  zeros in the columns that taps reach outside
//
// and the kernels of conv2d_depthwise_channels_last.h run on them. What a plane is cut into: windows of columns, where rows are
// long; strips of rows, whose packed source stays in L2; blocks of a strip, which stay in L1 between transposition, sums and the
// way back.
//
// Lanes are planes of any channel and image: lane l of the group that begins with plane p has the filter of channel (p + l) mod
// C, so the table of filters is continued by one vector. Where there are too few planes, lanes are parts of one plane, as many
// rows each. channels_last tensors with fewer channels than lanes come here too, an image at a time.
//
// Zeros in the padding are harmless in forward and grad_input if the weights are finite; else taps outside are left out.
// In grad_weight they may meet an infinity: a sum that is not finite is made again without them.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../geometry.h"
#include "conv2d_depthwise_axes.h"
#include "conv2d_depthwise_channels_last.h"
#include "conv2d_depthwise_transpose.h"
#include "conv2d_grad_bias.h"
#include "runtime.h"
#include "simd.h"

namespace torchcnn::TORCHCNN_ISA::depthwise::nchw {

using channels_last::dot_pixels;
using channels_last::tile_pixels;

inline Range clipped(const Range& range, int64_t size) {
  const int64_t begin = std::clamp<int64_t>(range.begin, 0, size);
  return {begin, std::clamp(range.end, begin, size)};
}

// The planes that lanes are made of: pixel x of lane l is data[l stride + x pixel]. Where lanes are parts of one plane, row r of
// lane l is row l lane_rows + r of that part of the plane that is `inside`.
template <class T>
struct Lanes {
  T* data;
  int64_t stride, pixel, count;
  int64_t lane_rows = 0;
  Range inside{0, 0};

  // The lanes that have row r.
  Range having(int64_t r) const {
    if (lane_rows == 0) return {0, count};
    const auto lanes_before = [&](int64_t row) { return row <= r ? 0 : ceil_div(row - r, lane_rows); };
    return clipped({lanes_before(inside.begin), lanes_before(inside.end)}, count);
  }
  bool all_have(const Range& rows) const {
    return lane_rows == 0 || (rows.begin >= inside.begin && (count - 1) * lane_rows + rows.end <= inside.end);
  }
};

// Where there are too few planes to fill the lanes, lanes are parts of one plane: rows of as many positions each.
struct Parts {
  int64_t lanes, positions;

  // An axis of one part. It lacks no source rows: the first part begins and the last ends with zeros.
  Axis of(const Axis& h, Phase* phases) const {
    const int64_t reads = (positions - 1) * h.step + h.span() + 1;
    for (int64_t f = 0; f < h.phases; ++f) phases[f] = h.phase[f], phases[f].positions = positions, phases[f].offset -= h.first;
    return {reads, positions * h.phases, h.step, h.phases, phases, 0, h.span()};
  }
  template <class T>
  Lanes<T> source(T* plane, const Axis& h, int64_t width) const {
    const int64_t rows = positions * h.step;
    return {plane + h.first * width, rows * width, 1, lanes, rows, {-h.first, h.source_size - h.first}};
  }
  template <class T>
  Lanes<T> output(T* plane, const Axis& h, int64_t width) const {
    const int64_t rows = positions * h.phases;
    return {plane, rows * width, 1, lanes, rows, {0, h.output_size}};
  }
};

inline bool worth_parts(int64_t planes, int64_t lanes, const Axis& h) {
  return 2 * planes <= lanes && h.phase[0].positions >= 2 * lanes;
}

template <class T>
struct Cut {
  int64_t window, windows;                // positions of columns
  int64_t strip, strips, block;           // positions of rows
  int64_t source_rows, pitch, out_pitch;  // of a strip, and pixels of a packed row
  const int32_t* place;                   // where a pixel of consecutive rows is in the packed rows, if there is one window

  Cut(const Axes& axes, int64_t groups, int64_t sources) {
    constexpr int64_t vector = TORCHCNN_VECTOR_BYTES, long_row = 512;
    const Axis &h = axes.h, &w = axes.w;
    const int64_t positions_h = h.phase[0].positions, positions_w = w.phase[0].positions;
    window = positions_w * std::max(w.step, w.phases) <= long_row
                 ? positions_w
                 : std::max(dot_pixels, long_row / std::max(w.step, w.phases) / tile_pixels * tile_pixels);
    windows = ceil_div(positions_w, window);
    const Range reads = w.reads(0, window);
    pitch = windows > 1 ? reads.end - reads.begin : std::max(reads.end, w.source_size) - std::min<int64_t>(reads.begin, 0);
    out_pitch = std::min(window * w.phases, w.output_size);
    block = std::clamp<int64_t>(16 * 1024 / vector / (out_pitch * h.phases), 1, positions_h);
    const int64_t rows = 160 * 1024 / vector / (pitch * sources);
    strip = std::clamp<int64_t>((rows - h.span() - 1) / h.step + 1, block, positions_h);
    while (strip > block && groups * windows * ceil_div(positions_h, strip) < 4 * thread_count()) strip = ceil_div(strip, 2);
    strips = ceil_div(positions_h, strip);
    source_rows = std::min((strip - 1) * h.step + h.span() + 1, h.source_size);
    place = windows > 1 ? nullptr : place_of(Slot::offsets, source_rows, w.source_size, pitch);
  }

  // The column of the first packed pixel of a window.
  int64_t first_column(const Axes& axes, int64_t j_begin) const {
    return windows > 1 ? axes.w.reads(j_begin, 0).begin : std::min<int64_t>(axes.w.first, 0);
  }

  static const int32_t* place_of(Slot slot, int64_t rows, int64_t width, int64_t pitch) {
    int32_t* to = workspace<int32_t>(slot, rows * width);
    for (int64_t row = 0, x = 0; row < rows; ++row)
      for (int64_t column = 0; column < width; ++column) to[x++] = static_cast<int32_t>((row * pitch + column) * kLanes<T>);
    return to;
  }
};

// Rows of planes of width `width`, columns x_begin ... x_begin + pitch - 1, to packed rows.
template <class T>
[[gnu::noinline]] void pack_rows(const Lanes<const T>& planes, int64_t width, const Range& rows, int64_t x_begin, int64_t pitch,
                                 const int32_t* place, T* to) {
  constexpr int64_t lanes = kLanes<T>;
  if (rows.begin >= rows.end) return;
  const int64_t begin = std::clamp<int64_t>(-x_begin, 0, pitch), end = std::clamp<int64_t>(width - x_begin, begin, pitch);
  for (int64_t row = 0; row < rows.end - rows.begin; ++row) {
    fill_vectors(to + row * pitch * lanes, begin);
    fill_vectors(to + (row * pitch + end) * lanes, pitch - end);
  }
  const T* from = planes.data + (rows.begin * width + x_begin + begin) * planes.pixel;
  T* const first = to + begin * lanes;
  if (planes.pixel == 1 && place != nullptr && planes.all_have(rows))
    return pack_planes<T>({from, planes.stride, planes.count}, (rows.end - rows.begin) * width,
                          [=](int64_t x) { return first + place[x]; });
  for (int64_t row = 0; row < rows.end - rows.begin; ++row, from += width * planes.pixel) {
    T* const at = first + row * pitch * lanes;
    const Range having = planes.having(rows.begin + row);
    if (planes.pixel == 1 && having.begin == 0 && having.end == planes.count) {
      pack_planes<T>({from, planes.stride, planes.count}, end - begin, [=](int64_t x) { return at + x * lanes; });
    } else if (planes.stride == 1) {
      for (int64_t x = 0; x < end - begin; ++x) {
        store(at + x * lanes, load_partial(from + x * planes.pixel, planes.count));
        __builtin_prefetch(from + x * planes.pixel + lanes);  // of the next vector of channels
      }
    } else {
      fill_vectors(at, end - begin);
      for (int64_t x = 0; x < end - begin; ++x)
        for (int64_t lane = having.begin; lane < having.end; ++lane)
          at[x * lanes + lane] = from[x * planes.pixel + lane * planes.stride];
    }
  }
}

// And back, from a buffer of rows `pitch` apart to columns x_begin ... x_begin + pitch - 1 of a plane.
template <class T>
void unpack_rows(const T* from, int64_t pitch, const Lanes<T>& planes, int64_t width, const Range& rows, int64_t x_begin) {
  constexpr int64_t lanes = kLanes<T>;
  T* to = planes.data + (rows.begin * width + x_begin) * planes.pixel;
  const int64_t count = std::min(pitch, width - x_begin);
  if (planes.pixel == 1 && pitch == width && planes.all_have(rows))
    return unpack_planes<T>(from, (rows.end - rows.begin) * width, {to, planes.stride, planes.count});
  for (int64_t row = rows.begin; row < rows.end; ++row, from += pitch * lanes, to += width * planes.pixel) {
    const int64_t having = planes.having(row).end;
    if (planes.pixel == 1) {
      unpack_planes<T>(from, count, {to, planes.stride, having});
    } else if (planes.stride == 1) {
      for (int64_t x = 0; x < count; ++x) store_partial(to + x * planes.pixel, load(from + x * lanes), having);
    } else {
      for (int64_t x = 0; x < count; ++x)
        for (int64_t lane = 0; lane < having; ++lane) to[x * planes.pixel + lane * planes.stride] = from[x * lanes + lane];
    }
  }
}

template <class T>
void correlate(const Correlation<T>& c, Layout layout) {
  constexpr int64_t lanes = kLanes<T>;
  const Axis &whole_h = c.axes.h, &w = c.axes.w;
  const int64_t M = c.sources * c.outputs, filter = c.R * c.S, planes = c.N * c.C;
  // Zero columns do no harm if the weights are finite: 0 * inf is not 0.
  const bool padded = all_finite(c.weight, c.C * M * filter);
  const bool last = layout == Layout::channels_last, in_parts = !last && padded && worth_parts(planes, lanes, whole_h);
  const Parts parts{lanes, ceil_div(whole_h.phase[0].positions, lanes)};
  const Axes axes{in_parts ? parts.of(whole_h, workspace<Phase>(Slot::tables, whole_h.phases)) : whole_h, w};
  const Axis& h = axes.h;
  const int64_t groups = in_parts ? planes : last ? c.N : ceil_div(planes, lanes);

  // Lane l of a group takes the filter of column `first column + l`.
  const int64_t repeated = in_parts ? lanes : 1, weight_pitch = in_parts ? c.C * lanes : c.C + lanes - 1;
  T* const packed_weight = workspace<T>(Slot::packed_weight, M * (filter + 1) * weight_pitch);
  T* const packed_bias = packed_weight + M * filter * weight_pitch;
  for (int64_t m = 0; m < M; ++m) {
    channels_last::pack_filters(c.weight + m * filter, c.C, repeated, M * filter, filter, weight_pitch,
                                packed_weight + m * filter * weight_pitch);
    for (int64_t x = 0; x < weight_pitch && c.epilogue.bias != nullptr; ++x)
      packed_bias[m * weight_pitch + x] = c.epilogue.bias[x / repeated % c.C * M + m];
  }
  const auto first_column = [&](int64_t group) { return in_parts ? group % c.C * lanes : last ? 0 : group * lanes % c.C; };
  const int64_t source_plane = whole_h.source_size * w.source_size, output_plane = whole_h.output_size * w.output_size;
  const auto source_lanes = [&](int64_t group, int64_t s) -> Lanes<const T> {
    if (in_parts) return parts.source(c.source + (group * c.sources + s) * source_plane, whole_h, w.source_size);
    if (last) return {c.source + group * c.C * source_plane, 1, c.C, c.C};
    const int64_t first = group * lanes;
    return {c.source + (first * c.sources + s) * source_plane, c.sources * source_plane, 1, std::min(lanes, planes - first)};
  };
  const auto output_lanes = [&](int64_t group, int64_t m) -> Lanes<T> {
    if (in_parts) return parts.output(c.output + (group * c.outputs + m) * output_plane, whole_h, w.output_size);
    if (last) return {c.output + group * c.C * output_plane, 1, c.C, c.C};
    const int64_t first = group * lanes;
    return {c.output + (first * c.outputs + m) * output_plane, c.outputs * output_plane, 1, std::min(lanes, planes - first)};
  };

  const Cut<T> cut(axes, groups, c.sources);
  const int64_t source_row = cut.pitch * lanes, output_row = cut.out_pitch * lanes;
  const int64_t source_size = cut.source_rows * source_row, slack = tile_pixels * w.step * lanes;
  const int64_t task_cost = cut.strip * cut.window * M * filter * h.phases;
  parallel_for(groups * cut.windows * cut.strips, task_cost, [&](int64_t task) {
    const int64_t group = task / cut.strips / cut.windows, column = first_column(group);
    const int64_t i_begin = task % cut.strips * cut.strip, i_end = std::min(i_begin + cut.strip, h.phase[0].positions);
    const int64_t j_begin = task / cut.strips % cut.windows * cut.window, x_begin = cut.first_column(axes, j_begin);
    const Range rows = clipped(h.reads(i_begin, i_end), h.source_size);
    T* const source = workspace<T>(Slot::patches, c.sources * source_size + slack);
    T* const output = workspace<T>(Slot::tile, cut.block * h.phases * output_row);
    int64_t ready = rows.begin;
    for (int64_t i = i_begin; i < i_end; i += cut.block) {
      const Range block{i, std::min(i + cut.block, i_end)};
      const int64_t needed = std::max(ready, clipped(h.reads(block.begin, block.end), h.source_size).end);
      for (int64_t s = 0; s < c.sources; ++s)
        pack_rows<T>(source_lanes(group, s), w.source_size, {ready, needed}, x_begin, cut.pitch, cut.place,
                     source + s * source_size + (ready - rows.begin) * source_row);
      ready = needed;
      const Range out_rows{block.begin * h.phases, std::min(block.end * h.phases, h.output_size)};
      for (int64_t m = 0; m < M; ++m) {
        const int64_t s = c.sources == 1 ? 0 : m;
        const channels_last::Image<T> image{source + s * source_size - rows.begin * source_row - x_begin * lanes,
                                            output - out_rows.begin * output_row - j_begin * w.phases * lanes,
                                            packed_weight + m * filter * weight_pitch + column,
                                            c.epilogue.bias == nullptr ? nullptr : packed_bias + m * weight_pitch + column,
                                            lanes,
                                            source_row,
                                            output_row,
                                            weight_pitch,
                                            0,
                                            padded,
                                            s > 0,
                                            c.epilogue.relu};
        for (int64_t fh = 0; fh < h.phases; ++fh) {
          for (int64_t fw = 0; fw < w.phases; ++fw) {
            const Range is{block.begin, std::min(block.end, h.phase[fh].positions)};
            const Range js{j_begin, std::min(j_begin + cut.window, w.phase[fw].positions)};
            channels_last::for_known_taps(w, w.phase[fw], [&]<int64_t taps, int64_t step>() {
              channels_last::correlate_rows<T, taps, step, lanes>(axes, c.S, image, fh, fw, is, js, {0, 1});
            });
          }
        }
        if (c.outputs == 1 && m + 1 < M) continue;
        unpack_rows<T>(output, cut.out_pitch, output_lanes(group, c.outputs == 1 ? 0 : m), w.output_size, out_rows,
                       j_begin * w.phases);
      }
    }
  });
}

// One element over the positions whose tap lies inside the image.
template <class T>
T grad_weight_element(const Conv2dGeometry& g, const Axes& axes, const T* grad_output, const T* input, int64_t k, int64_t r,
                      int64_t s) {
  const Axis &h = axes.h, &w = axes.w;
  const int64_t row = h.first + r * g.dilation_h, column = w.first + s * g.dilation_w;
  const Range i = inside(h, h.phase[0], row), j = inside(w, w.phase[0], column);
  const Strides in = g.input_strides(), out = g.output_strides();
  T sum = 0;
  for (int64_t n = 0; n < g.N; ++n) {
    const T* gradient = grad_output + n * out.n + k * out.c;
    const T* source = input + n * in.n + k / g.K_per_group() * in.c;
    for (int64_t p = i.begin; p < i.end; ++p)
      for (int64_t q = j.begin; q < j.end; ++q)
        sum += gradient[p * out.h + q * out.w] * source[(p * h.step + row) * in.h + (q * w.step + column) * in.w];
  }
  return sum;
}

template <class T>
void conv2d_grad_weight(const Conv2dGeometry& g, const T* grad_output, const T* input, T* grad_weight, T* grad_bias) {
  constexpr int64_t lanes = kLanes<T>;
  const Axes whole = forward_axes(g);
  const bool last = g.layout == Layout::channels_last, in_parts = !last && worth_parts(g.C, lanes, whole.h);
  const Parts parts{lanes, ceil_div(g.P, lanes)};
  const Axes axes{in_parts ? parts.of(whole.h, workspace<Phase>(Slot::tables, 1)) : whole.h, whole.w};
  const Axis &h = axes.h, &w = axes.w;
  const int64_t M = g.K_per_group(), filter = g.R * g.S, size = M * filter * lanes, rows_h = h.phase[0].positions;
  // Lanes are channels of one image, or parts of one channel, so that images can be summed where they are.
  const int64_t groups = in_parts ? g.C : ceil_div(g.C, lanes);
  const Strides in = g.input_strides(), out = g.output_strides();
  const auto source_lanes = [&](int64_t group, int64_t n) -> Lanes<const T> {
    if (in_parts) return parts.source(input + n * in.n + group * in.c, whole.h, g.W);
    return {input + n * in.n + group * lanes * in.c, in.c, in.w, std::min(lanes, g.C - group * lanes)};
  };
  const auto gradient_lanes = [&](int64_t group, int64_t n, int64_t m) -> Lanes<const T> {
    if (in_parts) return parts.output(grad_output + n * out.n + (group * M + m) * out.c, whole.h, g.Q);
    return {grad_output + n * out.n + (group * lanes * M + m) * out.c, M * out.c, out.w, std::min(lanes, g.C - group * lanes)};
  };

  const Cut<T> cut(axes, INT64_MAX / 8 / rows_h / w.phase[0].positions, 1);  // whatever the number of threads
  const int64_t gradient_pitch = ceil_div(cut.window, dot_pixels) * dot_pixels;
  const int32_t* gradient_place = cut.windows > 1 ? nullptr : Cut<T>::place_of(Slot::positions, cut.block, g.Q, gradient_pitch);
  const int64_t units = g.N * cut.strips * cut.windows, slices = std::min(units, ceil_div(16, groups));
  const int64_t flush = ceil_div(32, cut.window);  // rows that are summed on their own first, which keeps rounding errors small
  T* const partial = workspace<T>(Slot::partial_sums, groups * slices * size);
  const BiasSums<T> bias_sums(slices, g.K, grad_bias);
  parallel_for(groups * slices, units * cut.strip * cut.window * M * filter / slices, [&](int64_t task) {
    const int64_t slice = task % slices, group = task / slices;
    T* const total = partial + task * size;
    const int64_t source_size = cut.source_rows * cut.pitch, slack = tile_pixels * w.step;
    T* const source = workspace<T>(Slot::patches, (source_size + slack) * lanes);
    T* const gradient = workspace<T>(Slot::gradient, cut.block * gradient_pitch * lanes);
    T* const sum = workspace<T>(Slot::tile, filter * lanes);
    fill_vectors(total, M * filter);
    // Tiles read past the last row that is packed, where a number left by others could be one that 0 does not silence.
    fill_vectors(source, source_size + slack);
    for (int64_t unit = slice * units / slices; unit < (slice + 1) * units / slices; ++unit) {
      const int64_t n = unit / cut.strips / cut.windows;
      const int64_t i_begin = unit % cut.strips * cut.strip, i_end = std::min(i_begin + cut.strip, rows_h);
      const int64_t j_begin = unit / cut.strips % cut.windows * cut.window, j_end = std::min(j_begin + cut.window, g.Q);
      const int64_t x_begin = cut.first_column(axes, j_begin);
      const Range rows = clipped(h.reads(i_begin, i_end), h.source_size);
      int64_t ready = rows.begin;
      for (int64_t i = i_begin; i < i_end; i += cut.block) {
        const Range block{i, std::min(i + cut.block, i_end)};
        const int64_t needed = std::max(ready, clipped(h.reads(block.begin, block.end), h.source_size).end);
        pack_rows<T>(source_lanes(group, n), g.W, {ready, needed}, x_begin, cut.pitch, cut.place,
                     source + (ready - rows.begin) * cut.pitch * lanes);
        ready = needed;
        for (int64_t m = 0; m < M; ++m) {
          pack_rows<T>(gradient_lanes(group, n, m), g.Q, block, j_begin, gradient_pitch, gradient_place, gradient);
          for (int64_t row = 0; row < block.end - block.begin; ++row)
            bias_sums.add_vectors(slice, gradient + row * gradient_pitch * lanes, lanes, j_end - j_begin, [&](int64_t lane) {
              const int64_t c = in_parts ? group : group * lanes + lane;
              return c < g.C ? c * M + m : -1;
            });
          const channels_last::Pair<T> pair{gradient - (i * gradient_pitch + j_begin) * lanes,
                                            source - (rows.begin * cut.pitch + x_begin) * lanes,
                                            sum,
                                            lanes,
                                            gradient_pitch * lanes,
                                            cut.pitch * lanes,
                                            lanes,
                                            0,
                                            true};
          for (int64_t row = block.begin; row < block.end; row += flush) {
            fill_vectors(sum, filter);
            channels_last::dot<T, lanes>(axes, pair, {row, std::min(row + flush, block.end)}, {j_begin, j_end}, {0, 1});
            channels_last::add_to(total + m * filter * lanes, sum, filter * lanes);
          }
        }
      }
    }
  });
  parallel_for(g.K, slices * filter, [&](int64_t k) {
    const int64_t c = k / M, group = in_parts ? c : c / lanes;
    const Range used = in_parts ? Range{0, lanes} : Range{c % lanes, c % lanes + 1};
    for (int64_t t = 0; t < filter; ++t) {
      T sum = 0;
      for (int64_t slice = 0; slice < slices; ++slice)
        for (int64_t lane = used.begin; lane < used.end; ++lane)
          sum += partial[(group * slices + slice) * size + (k % M * filter + t) * lanes + lane];
      grad_weight[k * filter + t] = sum;
    }
    // A zero of the padding may have met an infinity.
    if (all_finite(grad_weight + k * filter, filter)) return;
    for (int64_t t = 0; t < filter; ++t)
      grad_weight[k * filter + t] = grad_weight_element(g, whole, grad_output, input, k, t / g.S, t % g.S);
  });
  bias_sums.finish();
}

}  // namespace torchcnn::TORCHCNN_ISA::depthwise::nchw
