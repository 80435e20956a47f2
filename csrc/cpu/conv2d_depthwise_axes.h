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

// sum[v] += tap[s] * input for the outputs v and taps s with v step + s = d: how input d of a run enters a register tile.
template <int64_t d, int64_t step, class V, size_t outputs, size_t taps>
[[gnu::always_inline]] inline void spread(V input, const V (&tap)[taps], V (&sum)[outputs]) {
  unrolled<outputs>([&](auto v) __attribute__((always_inline)) {
    constexpr int64_t s = d - v * step;
    if constexpr (s >= 0 && s < int64_t(taps)) sum[v] += tap[s] * input;
  });
}

// Filter row (or column) `index`, read at source position i step + offset.
struct Tap {
  int64_t index, offset;
};

// The positions i of one phase of an axis, and the taps that reach them, by ascending offset.
struct Phase {
  int64_t positions;
  const Tap* taps;
  int64_t count;
};

struct Axis {
  int64_t source_size, output_size, step, phases;
  const Phase* phase;   // phase 0 has the most positions
  int64_t first, last;  // the smallest and the largest offset of all taps

  int64_t span() const { return last - first; }
  int64_t taps_before(int64_t f) const { return phase[f].taps - phase[0].taps; }
  int64_t taps() const {
    return taps_before(phases - 1) + phase[phases - 1].count;
  }  // fewer than the filter's if outputs are few
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
struct Range {
  int64_t begin, end;
};

inline Range inside(const Axis& axis, const Phase& phase, int64_t offset) {
  const int64_t begin = offset >= 0 ? 0 : std::min(phase.positions, ceil_div(-offset, axis.step));
  const int64_t end = offset >= axis.source_size ? 0 : ceil_div(axis.source_size - offset, axis.step);
  return {begin, std::clamp(end, begin, phase.positions)};
}

// The taps of `phase` that lie inside the source at position i.
inline Range taps_inside(const Axis& axis, const Phase& phase, int64_t i) {
  Range taps{0, phase.count};
  while (taps.begin < taps.end && i * axis.step + phase.taps[taps.begin].offset < 0) ++taps.begin;
  while (taps.begin < taps.end && i * axis.step + phase.taps[taps.end - 1].offset >= axis.source_size) --taps.end;
  return taps;
}

struct AxisSizes {
  int64_t input, output, kernel, stride, pad, dilation;
};

inline Axis forward_axis(const AxisSizes& a, Phase* phase, Tap* taps) {
  for (int64_t r = 0; r < a.kernel; ++r) taps[r] = {r, r * a.dilation - a.pad};
  phase[0] = {a.output, taps, a.kernel};
  return {a.input, a.output, a.stride, 1, phase, taps[0].offset, taps[a.kernel - 1].offset};
}

inline Axis grad_input_axis(const AxisSizes& a, Phase* phase, Tap* taps) {
  Axis axis{a.output, a.input, 1, std::min(a.stride, a.input), phase, INT64_MAX, INT64_MIN};
  for (int64_t f = 0; f < axis.phases; ++f) {
    Tap* const begin = taps;
    for (int64_t r = a.kernel - 1; r >= 0; --r) {
      const int64_t position = f + a.pad - r * a.dilation;
      if (position % a.stride == 0) *taps++ = {r, position / a.stride};
    }
    phase[f] = {ceil_div(a.input - f, a.stride), begin, taps - begin};
    if (taps == begin) continue;
    axis.first = std::min(axis.first, begin->offset);
    axis.last = std::max(axis.last, (taps - 1)->offset);
  }
  if (axis.first > axis.last) axis.first = axis.last = 0;  // no tap reaches any input
  return axis;
}

template <class AxisOf>
Axes make_axes(const Conv2dGeometry& g, int64_t phases_h, int64_t phases_w, AxisOf axis_of) {
  char* memory = workspace<char>(Slot::tables, (g.R + g.S) * sizeof(Tap) + (phases_h + phases_w) * sizeof(Phase));
  Phase* phases = reinterpret_cast<Phase*>(memory);
  Tap* taps = reinterpret_cast<Tap*>(phases + phases_h + phases_w);
  return {axis_of(AxisSizes{g.H, g.P, g.R, g.stride_h, g.pad_h, g.dilation_h}, phases, taps),
          axis_of(AxisSizes{g.W, g.Q, g.S, g.stride_w, g.pad_w, g.dilation_w}, phases + phases_h, taps + g.R)};
}

inline Axes forward_axes(const Conv2dGeometry& g) { return make_axes(g, 1, 1, forward_axis); }

inline Axes grad_input_axes(const Conv2dGeometry& g) {
  return make_axes(g, std::min(g.stride_h, g.H), std::min(g.stride_w, g.W), grad_input_axis);
}

// Whether the taps are `count` consecutive source positions.
inline bool consecutive(const Phase& phase, int64_t count) {
  return phase.count == count && phase.taps[count - 1].offset - phase.taps[0].offset == count - 1;
}

}  // namespace torchcnn::TORCHCNN_ISA::depthwise
