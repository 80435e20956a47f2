// Pooling with windows of one element side by side: every output is its input, and both are one row in either layout. Adaptive
// pools come to it where output and input have the same size.
//
//   extreme   output = x, or max(0, x) with relu; offset 0, 255 where relu put 0;   grad_input = grad_output where offset is 0
//   average   output = x / divisor;                                                 grad_input = grad_output / divisor
#pragma once

#include "pool2d_extremum_nchw.h"

namespace torchcnn::TORCHCNN_ISA {

inline bool is_elementwise(const Pool2dGeometry& g) {
  return !g.adaptive && g.R == 1 && g.S == 1 && g.P == g.H && g.Q == g.W && g.stride_h == 1 && g.stride_w == 1 && g.pad_h == 0 &&
         g.pad_w == 0;
}

// Calls visit(begin, count) for the pieces of the row; only the last is shorter than the others, which are whole vectors.
template <class Visit>
void for_each_piece(const Pool2dGeometry& g, Visit visit) {
  constexpr int64_t piece = 4096;
  const int64_t elements = g.N * g.C * g.H * g.W;
  parallel_for(ceil_div(elements, piece), piece / 4,
               [&](int64_t task) { visit(task * piece, std::min(piece, elements - task * piece)); });
}

template <class T>
void extremum_pool2d_elementwise(const Pool2dGeometry& g, Extremum extremum, const T* input, T* output, Positions positions) {
  using A = Arithmetic<T>;
  using I = IndexOf<A>;
  constexpr int64_t L = kLanes<A>;
  const size_t offset_bytes = positions.kind == PositionKind::none           ? 0
                              : positions.kind == PositionKind::byte_offsets ? sizeof(uint8_t)
                                                                             : sizeof(int32_t);
  for_each_piece(g, [&](int64_t begin, int64_t count) {
    if (!extremum.relu) {
      std::memcpy(output + begin, input + begin, static_cast<size_t>(count) * sizeof(T));
      if (offset_bytes > 0)
        std::memset(static_cast<char*>(positions.to) + begin * offset_bytes, 0, static_cast<size_t>(count) * offset_bytes);
      return;
    }
    for (int64_t i = 0; i < count; i += L) {
      const int64_t at = begin + i, left = count - i;
      Best<A> best{left >= L ? load_wide(input + at) : load_wide_partial(input + at, left), Vec<I>{}};
      best.rectify();
      store_narrow_partial(output + at, best.value, left);
      store_positions<I>(positions, at, best.code, left);
    }
  });
}

template <class T, class Offset>
void offset_pool2d_grad_input_elementwise(const Pool2dGeometry& g, const T* grad_output, const Offset* offsets, T* grad_input) {
  using A = Arithmetic<T>;
  using I = IndexOf<A>;
  constexpr int64_t L = kLanes<A>;
  for_each_piece(g, [&](int64_t begin, int64_t count) {
    int64_t at = begin;
    for (; at + L <= begin + count; at += L) {
      const Vec<I> passes = load_unsigned<I>(offsets + at) == 0;
      store_narrow(grad_input + at, (Vec<A>)((Vec<I>)load_wide(grad_output + at) & passes));
    }
    for (; at < begin + count; ++at) grad_input[at] = offsets[at] == 0 ? grad_output[at] : T{};
  });
}

// In either direction.
template <class T>
void avg_pool2d_elementwise(const Pool2dGeometry& g, const Divisor& divisor, const T* from, T* to) {
  using A = Arithmetic<T>;
  constexpr int64_t L = kLanes<A>;
  const A divide_by = static_cast<A>(divisor(row_window(g, 0), column_window(g, 0)));
  for_each_piece(g, [&](int64_t begin, int64_t count) {
    if (divide_by == 1) {
      std::memcpy(to + begin, from + begin, static_cast<size_t>(count) * sizeof(T));
      return;
    }
    int64_t at = begin;
    for (; at + L <= begin + count; at += L) store_narrow(to + at, load_wide(from + at) / divide_by);
    for (; at < begin + count; ++at) to[at] = narrow<T>(widen(from[at]) / divide_by);
  });
}

}  // namespace torchcnn::TORCHCNN_ISA
