// Average pooling, NCHW.
//
// Forward: the rows of a window are added as vectors over q, then its columns.
//
// Backward, a gather by rows: position (h, w) receives the shares of the windows that contain it,
//
//   row_sum[q]       = sum over the p whose window contains h of  grad_output[p][q] / divisor(p, q)
//   grad_input[h][w] = sum over the q whose window contains w of  row_sum[q]
//
// Rows h that lie in the same windows p are equal and are copied. With strides 1 and 2 the second sum is one of vectors: w + pad_w
// = j stride_w + phase lies in the windows j, j - 1, ... of as many taps as the phase has.
#pragma once

#include "pool2d_rows.h"

namespace torchcnn::TORCHCNN_ISA {

// divisor(p, q) = row_divisor(p) column_divisor[q], one for lanes past the last window. `divides_by` is the divisor of all windows
// if that is one power of two: then multiplying is exact, and faster.
template <class A>
struct Averaging {
  const Divisor& divisor;
  A* column_divisor;
  A exact_factor;  // 0: there is none

  Averaging(const Pool2dGeometry& g, const Divisor& divisor, A* table)
      : divisor(divisor), column_divisor(table), exact_factor(0) {
    const Window one{0, 1, 1};
    const int64_t first = divisor(row_window(g, 0), column_window(g, 0));
    bool uniform = (first & (first - 1)) == 0;
    const bool inside = windows_lie_inside(g);
    for (int64_t p = 0; p < g.P && uniform && !inside; ++p) uniform = divisor(row_window(g, p), column_window(g, 0)) == first;
    for (int64_t q = 0; q < round_up_to_lanes<A>(g.Q); ++q) {
      const Window column = q < g.Q ? column_window(g, q) : one;
      if (q < g.Q) uniform = uniform && divisor(row_window(g, 0), column) == first;
      column_divisor[q] = static_cast<A>(divisor.override_value != 0 ? 1 : divisor(one, column));
    }
    if (uniform && first > 0) exact_factor = A(1) / static_cast<A>(first);
  }

  A row_divisor(const Window& row) const { return static_cast<A>(divisor(row, Window{0, 1, 1})); }

  // sum / divisor(p, q), with the window of p.
  Vec<A> of(Vec<A> sum, const Window& row, int64_t q) const {
    return exact_factor != 0 ? sum * exact_factor : sum / (row_divisor(row) * column_divisor[q]);
  }
};

template <class A, int S_, int stride_>
void average_rows(const Pool2dGeometry& g, const Averaging<A>& averaging, Rows<A> rows, int64_t p_begin, int64_t p_end,
                  A* values) {
  constexpr int64_t L = kLanes<A>;
  const int64_t S = S_ ? S_ : g.S, step = stride_ ? stride_ : g.stride_w, Q = g.Q, R = g.R, pitch = rows.pitch;
  for (int64_t p = p_begin; p < p_end; ++p, values += Q) {
    const A* row = rows.data + (p - p_begin) * g.stride_h * pitch;
    const A row_divisor = averaging.exact_factor != 0 ? A(1) : averaging.row_divisor(row_window(g, p));
    for (int64_t q = 0; q < Q; q += L) {
      if (q + L > Q && Q >= L) q = Q - L;
      const A* at = row + q * step;
      Vec<A> sum{};
      if constexpr (stride_ == 2 && S_ >= 2) {
        if (Q >= L) prefetch_pair<0, A>(row + 4 * q);
        Vec<A> a{}, b{}, last{};
        for (int64_t r = 0; r < R; ++r) {
          a += load(at + r * pitch);
          b += load(at + r * pitch + L);
        }
        sum = evens_blocked<A>(a, b) + odds_blocked<A>(a, b);
        if constexpr (S_ == 3) {
          for (int64_t r = 0; r < R; ++r) last += load_evens_blocked(at + r * pitch + 2);
          sum += last;
        }
      } else {
        for (int64_t r = 0; r < R; ++r)
          for (int64_t s = 0; s < S; ++s) sum += load_tap<stride_>(at + r * pitch + s, step);
      }
      sum = ordered<stride_, A>(sum);
      const Vec<A> mean =
          averaging.exact_factor != 0 ? sum * averaging.exact_factor : sum / (load(averaging.column_divisor + q) * row_divisor);
      store_partial(values + q, mean, std::min(L, (p_end - p) * Q - q));  // beyond a short row lie rows that are written later
    }
  }
}

template <class A>
auto average_rows_for(const Pool2dGeometry& g) {
  if (g.stride_w == 2) return g.S == 2 ? average_rows<A, 2, 2> : g.S == 3 ? average_rows<A, 3, 2> : average_rows<A, 0, 2>;
  if (g.stride_w == 1) return g.S == 3 ? average_rows<A, 3, 1> : average_rows<A, 0, 1>;
  return average_rows<A, 0, 0>;
}

template <class T>
void avg_pool2d_sliding(const Pool2dGeometry& g, const Divisor& divisor, const T* input, T* output) {
  using A = Arithmetic<T>;
  const Averaging<A> averaging(g, divisor, workspace<A>(Slot::tables, round_up_to_lanes<A>(g.Q)));
  const auto rows_kernel = average_rows_for<A>(g);
  for_each_band(g, input, A(0), false, 2, [&](int64_t nc, int64_t p_begin, int64_t p_end, Rows<A> rows) {
    T* to = output + (nc * g.P + p_begin) * g.Q;
    if constexpr (std::is_same_v<T, A>) {
      rows_kernel(g, averaging, rows, p_begin, p_end, to);
    } else {
      const int64_t count = (p_end - p_begin) * g.Q;
      A* values = workspace<A>(Slot::tile, count);
      rows_kernel(g, averaging, rows, p_begin, p_end, values);
      narrow_row(values, count, to);
    }
  });
}

// ------------------------------------------------------------------------------------------------------------------ backward

// to[w] = sum of row_sum[q] over the windows q that contain w. row_sum is zero outside the windows, S elements to the left and
// three vectors beyond what the last w needs to the right; up to two vectors are written beyond W. S_, stride_: as above.
template <class A, int S_, int stride_>
void spread_row(const Pool2dGeometry& g, const A* row_sum, A* to) {
  constexpr int64_t L = kLanes<A>;
  const int64_t S = S_ ? S_ : g.S;
  if constexpr (stride_ == 1) {
    for (int64_t w = 0; w < g.W; w += L) {
      Vec<A> sum{};
      for (int64_t s = 0; s < S; ++s) sum += load(row_sum + w + g.pad_w - s);
      store(to + w, sum);
    }
  } else {
    // Elements w, w + 2, ... and w + 1, w + 3, ...: taps s = phase, phase + 2, ...
    const auto phase_sum = [&](int64_t x) {
      Vec<A> sum{};
      for (int64_t s = x % 2; s < S; s += 2) sum += load(row_sum + (x - s) / 2);
      return sum;
    };
    for (int64_t w = 0; w < g.W; w += 2 * L) store_interleaved<A>(to + w, phase_sum(w + g.pad_w), phase_sum(w + g.pad_w + 1));
  }
}

// The same for windows of any size and distance.
template <class A>
void spread_row_any(const Pool2dGeometry& g, const A* row_sum, A* to) {
  std::fill_n(to, g.W, A(0));
  for (int64_t q = 0; q < g.Q; ++q) {
    const Window column = column_window(g, q);
    for (int64_t w = column.begin; w < column.end; ++w) to[w] += row_sum[q];
  }
}

inline constexpr int64_t kLongestSpread = 32;

template <class A>
auto spread_row_for(const Pool2dGeometry& g) {
  if (g.S > kLongestSpread || g.stride_w > 2) return spread_row_any<A>;
  if (g.stride_w == 1) return g.S == 3 ? spread_row<A, 3, 1> : spread_row<A, 0, 1>;
  return g.S == 2 ? spread_row<A, 2, 2> : g.S == 3 ? spread_row<A, 3, 2> : spread_row<A, 0, 2>;
}

template <class T>
void avg_pool2d_grad_input_rows(const Pool2dGeometry& g, const Divisor& divisor, const T* grad_output, T* grad_input) {
  using A = Arithmetic<T>;
  constexpr int64_t L = kLanes<A>;
  const int64_t windows = round_up_to_lanes<A>(g.Q);
  int64_t* table = workspace<int64_t>(Slot::tables, 2 * g.H + windows + g.P);
  const Cover rows = cover_of(g.H, g.P, table, [&](int64_t p) { return row_window(g, p); });
  A* column_factors = reinterpret_cast<A*>(table + 2 * g.H);
  A* row_factors = column_factors + windows;
  const Averaging<A> averaging(g, divisor, column_factors);
  for (int64_t p = 0; p < g.P; ++p) row_factors[p] = A(1) / averaging.row_divisor(row_window(g, p));
  for (int64_t q = 0; q < windows; ++q) column_factors[q] = A(1) / column_factors[q];

  const auto spread = spread_row_for<A>(g);
  const T* end = grad_output + g.N * g.C * g.P * g.Q;
  constexpr int64_t margin = kLongestSpread, beyond = 2 * L;
  // Windows of at most kLongestSpread columns have little padding; what larger ones have is never read.
  const int64_t vectors_reach = g.S > kLongestSpread || g.stride_w > 2 ? 0 : (g.W + g.pad_w) / g.stride_w;
  const int64_t sums = margin + std::max(windows, vectors_reach) + 4 * L;
  const int64_t band = std::clamp<int64_t>(16384 / g.W, 1, g.H), bands = ceil_div(g.H, band);
  parallel_for(g.N * g.C * bands, band * ceil_div(g.W, L) * 6, [&](int64_t task) {
    const int64_t nc = task / bands, h_begin = task % bands * band, h_end = std::min(g.H, h_begin + band);
    A* row_sum = workspace<A>(Slot::tile, sums + g.W + beyond) + margin;
    A* spread_out = row_sum - margin + sums;
    std::fill(row_sum - margin, spread_out, A(0));
    T* to = grad_input + (nc * g.H + h_begin) * g.W;
    for (int64_t h = h_begin; h < h_end; ++h, to += g.W) {
      if (h > h_begin && rows.first[h] == rows.first[h - 1] && rows.last[h] == rows.last[h - 1]) {
        copy_row(to - g.W, g.W, to);
        continue;
      }
      for (int64_t q = 0; q < g.Q; q += L) {
        Vec<A> sum{};
        for (int64_t p = rows.first[h]; p <= rows.last[h]; ++p)
          sum += load_row_end(grad_output + (nc * g.P + p) * g.Q + q, g.Q - q, end) * row_factors[p];
        store(row_sum + q, sum * load(column_factors + q));
      }
      store(row_sum + g.Q, Vec<A>{});
      if constexpr (std::is_same_v<T, A>) {
        if ((h_end - h - 1) * g.W >= beyond) {  // what is written beyond this row belongs to rows that follow
          spread(g, row_sum, to);
          continue;
        }
      }
      spread(g, row_sum, spread_out);
      narrow_row(spread_out, g.W, to);
    }
  });
}

template <class A>
void avg_pool2d_grad_input_tiling(const Pool2dGeometry& g, const Divisor& divisor, const A* grad_output, A* grad_input) {
  const A factor = A(1) / static_cast<A>(divisor(row_window(g, 0), column_window(g, 0)));  // that of every window
  write_tiles_2x2<A>(g, grad_input, [=](int64_t i) {
    const Vec<A> share = load(grad_output + i) * factor;
    return Tiles<A>{{share, share, share, share}};
  }, [=](int64_t i, int) { return grad_output[i] * factor; });
}

}  // namespace torchcnn::TORCHCNN_ISA
