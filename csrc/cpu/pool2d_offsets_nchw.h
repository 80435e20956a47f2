// Backward of max and min pooling from the offsets of the extremes, NCHW, where offsets are bytes:
//
//   grad_input[h][w] = sum over (p, q)  of  grad_output[p][q]  where the offset r S + s of window (p, q) points to (h, w):
//                      h = p stride_h - pad_h + r dilation_h,  w = q stride_w - pad_w + s dilation_w
//
// A gather compares every window with all its R S taps, in vectors; it pays for small windows of strides 1 and 2, whose rows it
// keeps in registers, one vector of grad_output for each column s of the taps:
//
//   tap_s[q]         = sum over the p whose window contains h of  grad_output[p][q]  where the offset is r S + s,
//                      r = h + pad_h - p stride_h
//   grad_input[h][w] = sum over s of tap_s[(w + pad_w - s) / stride_w],   for the s where that is a whole number
//
// 3x3 windows around every element need not even know where a row or a plane ends: what lies beyond it was chosen by no window.
//
// 2x2 windows side by side each write their own four elements. All other windows are scattered, see pool2d_indexed.h.
#pragma once

#include "pool2d_extremum_nchw.h"
#include "pool2d_indexed.h"
#include "pool2d_rows.h"

namespace torchcnn::TORCHCNN_ISA {

template <class A, class Offset>
void offset_pool2d_grad_input_tiling(const Pool2dGeometry& g, const A* grad_output, const Offset* offsets, A* grad_input) {
  using I = IndexOf<A>;
  write_tiles_2x2<A>(g, grad_input, [=](int64_t i) {
    const Vec<I> gradient = (Vec<I>)load(grad_output + i), offset = load_unsigned<I>(offsets + i);
    Tiles<A> tiles;
    for (int element = 0; element < 4; ++element) tiles.element[element] = (Vec<A>)(gradient & (offset == element));
    return tiles;
  }, [=](int64_t i, int element) { return static_cast<int64_t>(offsets[i]) == element ? grad_output[i] : A(0); });
}

// 3x3 windows around every element of the plane.
inline bool is_around_3x3(const Pool2dGeometry& g) {
  return !g.adaptive && g.R == 3 && g.S == 3 && g.stride_h == 1 && g.stride_w == 1 && g.pad_h == 1 && g.pad_w == 1 &&
         g.dilation_h == 1 && g.dilation_w == 1 && g.P == g.H && g.Q == g.W;
}

// grad_input[i] = sum over the taps of grad_output[j] where offsets[j] == 3 r + s, j = i + (1 - r) W + 1 - s, for the elements i
// of all planes in one row. The window of an offset that the forward pass has written does not point out of its plane, so a j in
// another row or plane than its tap adds nothing. Only beyond the tensor must nothing be read.
template <class T>
void offset_pool2d_grad_input_around_3x3(const Pool2dGeometry& g, const T* grad_output, const uint8_t* offsets, T* grad_input) {
  using A = Arithmetic<T>;
  using I = IndexOf<A>;
  constexpr int64_t L = kLanes<A>, elements_of_task = 16384;
  const int64_t W = g.W, count = g.N * g.C * g.H * W;
  parallel_for(ceil_div(count, elements_of_task), elements_of_task / L * 40, [&](int64_t task) {
    const int64_t begin = task * elements_of_task, end = std::min(count, begin + elements_of_task);
    const auto at_the_ends = [&](int64_t i_begin, int64_t i_end) {
      for (int64_t i = i_begin; i < i_end; ++i) {
        A row_sums[3];
        for (int64_t r = 0; r < 3; ++r) {
          for (int64_t s = 0; s < 3; ++s) {
            const int64_t j = i + (1 - r) * W + 1 - s;
            const A chosen = j >= 0 && j < count && offsets[j] == 3 * r + s ? widen(grad_output[j]) : A(0);
            row_sums[r] = s == 0 ? chosen : row_sums[r] + chosen;  // as in vectors, of zeros too
          }
        }
        grad_input[i] = narrow<T>(row_sums[0] + row_sums[1] + row_sums[2]);
      }
    };
    int64_t i = std::clamp(W + 1, begin, end);
    at_the_ends(begin, i);
    for (const int64_t last = std::min(end, count - W - 1) - L; i <= last; i += L) {
      Vec<A> row_sums[3];
#pragma GCC unroll 3
      for (int r = 0; r < 3; ++r) {
#pragma GCC unroll 3
        for (int s = 0; s < 3; ++s) {
          const int64_t j = i + (1 - r) * W + 1 - s;
          const Vec<I> offset = load_unsigned<I>(offsets + j), gradient = (Vec<I>)load_wide(grad_output + j);
          const Vec<A> chosen = (Vec<A>)(gradient & (offset == 3 * r + s));
          row_sums[r] = s == 0 ? chosen : row_sums[r] + chosen;
        }
      }
      store_narrow(grad_input + i, row_sums[0] + row_sums[1] + row_sums[2]);
    }
    at_the_ends(i, end);
  });
}

// Element i of the result is element i + distance of the current vector, with the previous and the next beside it.
template <int distance, class A>
[[gnu::always_inline]] inline Vec<A> shifted(Vec<A> previous, Vec<A> current, Vec<A> next) {
  constexpr int L = static_cast<int>(kLanes<A>);
  if constexpr (distance < 0) {
    return shuffled<A, L>(previous, current, [](int i) { return i + L + distance; }, kEachLane<A>);
  } else if constexpr (distance > 0) {
    return shuffled<A, L>(current, next, [](int i) { return i + distance; }, kEachLane<A>);
  } else {
    return current;
  }
}

template <class A, int S>
struct Taps {
  Vec<A> of[S];
};

// The sum of what windows give to columns w, w + stride, ..., where w = phase before the first column of the current vector.
template <int S, int stride, int pad, int phase, int s = 0, class A>
[[gnu::always_inline]] inline Vec<A> sum_of_taps(const Taps<A, S>& previous, const Taps<A, S>& current, const Taps<A, S>& next) {
  constexpr int distance = phase + pad - s;
  Vec<A> sum{};
  if constexpr (distance % stride == 0) sum = shifted<distance / stride, A>(previous.of[s], current.of[s], next.of[s]);
  if constexpr (s + 1 < S) {
    const Vec<A> others = sum_of_taps<S, stride, pad, phase, s + 1>(previous, current, next);
    return distance % stride == 0 ? sum + others : others;
  }
  return sum;
}

// Row h of grad_input from `count` rows of windows, of which the first has h in row r of its taps. `codes`: the offsets of that
// row, those of the rows above before them. Up to two vectors are written beyond W.
template <class T, int S, int stride, int pad, int count>
[[gnu::noinline]] void gather_row(const Pool2dGeometry& g, const Vec<IndexOf<Arithmetic<T>>>* codes, const T* grad_output,
                                  const T* end, const uint8_t* offsets, const uint8_t* offsets_end, T* to) {
  using A = Arithmetic<T>;
  using I = IndexOf<A>;
  constexpr int64_t L = kLanes<A>;
  const int64_t W = g.W, Q = g.Q, row_step = g.stride_h * S;
  const auto add = [&](Taps<A, S>& taps, Vec<I> gradient, Vec<I> code, int p) __attribute__((always_inline)) {
    settle(gradient);  // else it is read for each column again, under a mask
#pragma GCC unroll 4
    for (int s = 0; s < S; ++s) {
      const Vec<A> chosen = (Vec<A>)(gradient & (code == codes[s - p * row_step]));
      taps.of[s] = p == 0 ? chosen : taps.of[s] + chosen;
    }
  };
  const auto taps_of_windows = [&](int64_t q) __attribute__((always_inline)) {
    Taps<A, S> taps{};
    if (q + L <= Q) {
#pragma GCC unroll 4
      for (int p = 0; p < count; ++p)
        add(taps, (Vec<I>)load_wide(grad_output + p * Q + q), load_unsigned<I>(offsets + p * Q + q), p);
    } else if (q < Q) {
      const Vec<I> in_row = steps_of<I>(1) < static_cast<I>(Q - q);
#pragma GCC unroll 4
      for (int p = 0; p < count; ++p) {
        const T* gradients = grad_output + p * Q + q;
        const uint8_t* from = offsets + p * Q + q;
        add(taps, (Vec<I>)load_row_end(gradients, Q - q, end) & in_row, load_offsets<I>(from, Q - q, offsets_end - from), p);
      }
    }
    return taps;
  };
  Taps<A, S> previous{}, current = taps_of_windows(0);
  for (int64_t w = 0, q = L; w < W; w += stride * L, q += L) {
    const Taps<A, S> next = taps_of_windows(q);
    const Vec<A> first = sum_of_taps<S, stride, pad, 0>(previous, current, next);
    if constexpr (stride == 1) {
      store_narrow(to + w, first);
    } else {
      const Vec<A> second = sum_of_taps<S, stride, pad, 1>(previous, current, next);
      store_narrow(to + w, interleave<A>(first, second, 0, kEachLane<A>));
      store_narrow(to + w + L, interleave<A>(first, second, 1, kEachLane<A>));
    }
    previous = current, current = next;
  }
}

inline constexpr int kMostGatheredRows = 3;  // of windows that contain a row of the plane
inline constexpr int kMostTaps = 48;         // of a window

// By the number of rows of windows, from 1 on.
template <class T>
struct GatherRow {
  decltype(&gather_row<T, 2, 1, 0, 1>) of_rows[kMostGatheredRows] = {};
};

template <class T>
GatherRow<T> gather_row_for(const Pool2dGeometry& g) {
  const bool dense = !g.adaptive && g.dilation_h == 1 && g.dilation_w == 1;
  if (!dense || ceil_div(g.R, g.stride_h) > kMostGatheredRows || g.pad_w > 1 || g.R * g.S > kMostTaps) return {};
  const auto of = []<int S, int stride, int pad>() {
    return GatherRow<T>{{gather_row<T, S, stride, pad, 1>, gather_row<T, S, stride, pad, 2>, gather_row<T, S, stride, pad, 3>}};
  };
  const auto of_pad = [&]<int S, int stride>() {
    return g.pad_w == 0 ? of.template operator()<S, stride, 0>() : of.template operator()<S, stride, 1>();
  };
  if (g.S == 2 && g.stride_w == 1) return of_pad.template operator()<2, 1>();
  if (g.S == 2 && g.stride_w == 2) return of_pad.template operator()<2, 2>();
  if (g.S == 3 && g.stride_w == 1) return of_pad.template operator()<3, 1>();
  if (g.S == 3 && g.stride_w == 2) return of_pad.template operator()<3, 2>();
  return {};
}

// Rows are written one after the other, of all planes that a task has: what one writes beyond its end the next ones write again.
template <class T>
void offset_pool2d_grad_input_gather(const Pool2dGeometry& g, const T* grad_output, const uint8_t* offsets, T* grad_input) {
  using I = IndexOf<Arithmetic<T>>;
  constexpr int64_t beyond = 2 * kLanes<I>, elements_of_task = 16384;
  const Cover windows =
      cover_of(g.H, g.P, workspace<int64_t>(Slot::tables, 2 * g.H), [&](int64_t p) { return row_window(g, p); });
  const auto gather = gather_row_for<T>(g);
  const int64_t planes = g.N * g.C, rows = planes * g.H, rows_of_task = std::clamp<int64_t>(elements_of_task / g.W, 1, rows);
  const T* end = grad_output + planes * g.P * g.Q;
  const uint8_t* offsets_end = offsets + planes * g.P * g.Q;
  Vec<I> codes[kMostTaps];
  for (int64_t i = 0; i < g.R * g.S; ++i) codes[i] = broadcast(static_cast<I>(i));
  parallel_for(ceil_div(rows, rows_of_task), rows_of_task * ceil_div(g.W, kLanes<I>) * 30, [&](int64_t task) {
    T* last_rows = workspace<T>(Slot::tile, g.W + beyond);
    const int64_t row_end = std::min(rows, (task + 1) * rows_of_task);
    int64_t row = task * rows_of_task, nc = row / g.H, h = row % g.H;
    for (T* to = grad_input + row * g.W; row < row_end; ++row, to += g.W) {
      const int64_t p = windows.first[h], count = windows.last[h] - p + 1, from = (nc * g.P + p) * g.Q;
      const bool has_room = (row_end - row - 1) * g.W >= beyond;
      if (count > 0) {
        const int64_t r = h + g.pad_h - p * g.stride_h;
        gather.of_rows[count - 1](g, codes + r * g.S, grad_output + from, end, offsets + from, offsets_end,
                                  has_room ? to : last_rows);
        if (!has_room) copy_row(last_rows, g.W, to);
      } else {
        std::fill_n(to, g.W, T{});
      }
      if (++h == g.H) h = 0, ++nc;
    }
  });
}

}  // namespace torchcnn::TORCHCNN_ISA
