// The axes of a depthwise correlation (conv2d_depthwise.h): phases, taps and where they read.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "../geometry.h"
#include "runtime.h"
#include "simd.h"

namespace torchcnn::TORCHCNN_ISA::depthwise {

// body(0), ..., body(count - 1), each index a constant: what is written to an array by such indices stays in registers.
template <class Body, int64_t... index>
[[gnu::always_inline]] inline void unrolled(const Body& body, std::integer_sequence<int64_t, index...>) {
  (body(std::integral_constant<int64_t, index>{}), ...);
}
template <int64_t count, class Body>
[[gnu::always_inline]] inline void unrolled(const Body& body) {
  unrolled(body, std::make_integer_sequence<int64_t, count>{});
}

// As load, in a register.
template <class T>
[[gnu::always_inline]] inline Vec<T> load_once(const T* from) {
  Vec<T> v = load(from);
  settle(v);
  return v;
}

struct Range {
  int64_t begin, end;
};

// The positions i of one phase of an axis. Tap a of those that reach them is the filter row (or column) index + a index_step and
// is read at source position i step + offset + a offset_step; offset_step > 0.
struct Phase {
  int64_t positions, count, index, index_step, offset, offset_step;

  int64_t last_offset() const { return offset + (count - 1) * offset_step; }
};

struct Axis {
  int64_t source_size, output_size, step, phases;
  const Phase* phase;   // phase 0 has the most positions
  int64_t first, last;  // the smallest and the largest offset of all taps

  int64_t span() const { return last - first; }
  // Source positions that the positions begin ... end - 1 read, whether or not there are such.
  Range reads(int64_t begin, int64_t end) const { return {begin * step + first, (end - 1) * step + last + 1}; }
};

struct Axes {
  Axis h, w;
};

// A correlation over all images: `sources` planes (of consecutive channels) are summed to one, or one is read for `outputs` of
// them; sources * outputs = M, and the m-th of channel c uses the filter c M + m.
template <class T>
struct Correlation {
  Axes axes;
  int64_t N, C, sources, outputs, R, S;
  const T* source;
  const T* weight;
  Epilogue<T> epilogue;
  T* output;
};

// Positions of `phase` whose tap at `offset` lies inside the source.
inline Range inside(const Axis& axis, const Phase& phase, int64_t offset) {
  const int64_t begin = offset >= 0 ? 0 : std::min(phase.positions, ceil_div(-offset, axis.step));
  const int64_t end = offset >= axis.source_size ? 0 : ceil_div(axis.source_size - offset, axis.step);
  return {begin, std::clamp(end, begin, phase.positions)};
}

// The taps of `phase` that lie inside the source at position i.
inline Range taps_inside(const Axis& axis, const Phase& phase, int64_t i) {
  const int64_t first = i * axis.step + phase.offset, size = axis.source_size;
  if (first >= 0 && first + (phase.count - 1) * phase.offset_step < size) return {0, phase.count};
  const int64_t begin = first >= 0 ? 0 : std::min(phase.count, ceil_div(-first, phase.offset_step));
  const int64_t end = first >= size ? 0 : std::min(phase.count, ceil_div(size - first, phase.offset_step));
  return {begin, std::max(begin, end)};
}

struct AxisSizes {
  int64_t input, output, kernel, stride, pad, dilation;
};

inline Axis forward_axis(const AxisSizes& a, Phase* phase) {
  phase[0] = {a.output, a.kernel, 0, 1, -a.pad, a.dilation};
  return {a.input, a.output, a.stride, 1, phase, phase->offset, phase->last_offset()};
}

inline Axis grad_input_axis(const AxisSizes& a, Phase* phase) {
  Axis axis{a.output, a.input, 1, std::min(a.stride, a.input), phase, INT64_MAX, INT64_MIN};
  for (int64_t f = 0; f < axis.phases; ++f) {
    Phase& to = phase[f];
    to = {ceil_div(a.input - f, a.stride), 0, 0, 1, 0, 1};
    for (int64_t r = a.kernel - 1; r >= 0; --r) {
      const int64_t position = f + a.pad - r * a.dilation;
      if (position % a.stride != 0) continue;
      if (to.count == 0) to.index = r, to.offset = position / a.stride;
      if (to.count == 1) to.index_step = r - to.index, to.offset_step = position / a.stride - to.offset;
      ++to.count;
    }
    if (to.count == 0) continue;
    axis.first = std::min(axis.first, to.offset);
    axis.last = std::max(axis.last, to.last_offset());
  }
  if (axis.first > axis.last) axis.first = axis.last = 0;  // no tap reaches any input
  return axis;
}

template <class T>
void fill_vectors(T* to, int64_t count) {
  for (int64_t v = 0; v < count; ++v) store(to + v * kLanes<T>, Vec<T>{});
}

template <class T>
bool all_finite(const T* values, int64_t count) {
  Vec<T> sum{};  // of zeros, or NaN
  T rest = 0;
  int64_t x = 0;
  for (; x + kLanes<T> <= count; x += kLanes<T>) sum += load(values + x) - load(values + x);
  for (; x < count; ++x) rest += values[x] - values[x];
  return horizontal_sum<T>(sum) + rest == T(0);
}

template <class AxisOf>
Axes make_axes(const Conv2dGeometry& g, int64_t phases_h, int64_t phases_w, AxisOf axis_of) {
  Phase* phases = workspace<Phase>(Slot::phases, phases_h + phases_w);
  return {axis_of(AxisSizes{g.H, g.P, g.R, g.stride_h, g.pad_h, g.dilation_h}, phases),
          axis_of(AxisSizes{g.W, g.Q, g.S, g.stride_w, g.pad_w, g.dilation_w}, phases + phases_h)};
}

inline Axes forward_axes(const Conv2dGeometry& g) { return make_axes(g, 1, 1, forward_axis); }

inline Axes grad_input_axes(const Conv2dGeometry& g) {
  return make_axes(g, std::min(g.stride_h, g.H), std::min(g.stride_w, g.W), grad_input_axis);
}

}  // namespace torchcnn::TORCHCNN_ISA::depthwise
