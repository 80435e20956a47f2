// Pooling in channels_last: vectors run over the channels, which lie side by side, so windows need no special cases. Backward
// gathers: a position adds up the windows that contain it, and is written once.
//
// Fewer channels than a vector has lanes are treated as a vector all the same: its other lanes are the next position's, which is
// written later, and only at the end of a row, or of the tensor for what is read, must they be left alone.
//
// A task has a copy of the geometry: what it only refers to is read again after every store, and the loops are short.
#pragma once

#include "pool2d_average_nchw.h"
#include "pool2d_extremum_nchw.h"

namespace torchcnn::TORCHCNN_ISA {

// Calls visit.template operator()<vectors>(c) for channels c ... c + vectors kLanes - 1 that together cover 0 ... C - 1. Several
// vectors at once share the work that goes with a tap.
template <class A, class Visit>
inline void for_each_channels(int64_t C, Visit visit) {
  constexpr int64_t L = kLanes<A>;
  int64_t c = 0;
  for (; c + 4 * L <= C; c += 4 * L) visit.template operator()<4>(c);
  for (; c < C; c += L) {
    if (c + L > C && C >= L) c = C - L;
    visit.template operator()<1>(c);
  }
}

template <class T>
inline Vec<Arithmetic<T>> load_channels(const T* from, int64_t left, int64_t until_end) {
  return until_end >= kLanes<Arithmetic<T>> ? load_wide(from) : load_wide_partial(from, left);
}

template <class T>
inline void store_channels(T* to, Vec<Arithmetic<T>> v, int64_t until_end) {
  if (until_end >= kLanes<Arithmetic<T>>) {
    store_narrow(to, v);
  } else {
    store_narrow_partial(to, v, until_end);
  }
}

template <class T, PositionKind kind>
void extremum_pool2d_channels_last(const Pool2dGeometry& geometry, Extremum extremum, const T* input, T* output,
                                   void* positions) {
  const Pool2dGeometry& g = geometry;
  using A = Arithmetic<T>;
  using I = IndexOf<A>;
  constexpr int64_t L = kLanes<A>;
  constexpr bool of_plane = kind == PositionKind::indices;
  const I row_code = static_cast<I>(of_plane ? g.dilation_h * g.W : g.S);
  const I column_code = static_cast<I>(of_plane ? g.dilation_w : 1);
  const Vec<I> sign = broadcast(extremum.minimum ? std::numeric_limits<I>::min() : I(0));  // a minimum turns the sign bits
  const int64_t input_size = g.N * g.H * g.W * g.C;
  parallel_for(g.N * g.P, ceil_div(g.H, g.P) * g.W * ceil_div(g.C, L) * 6, [&](int64_t np) {
    const Pool2dGeometry g = geometry;
    const int64_t n = np / g.P, p = np % g.P, row_step = g.dilation_h * g.W * g.C, column_step = g.dilation_w * g.C;
    const Window row = row_window(g, p);
    for (int64_t q = 0; q < g.Q; ++q) {
      const Window column = column_window(g, q);
      const int64_t first = ((n * g.H + row.begin) * g.W + column.begin) * g.C;
      // Of the first tap that lies inside.
      int64_t first_code = 0;
      if (of_plane) {
        first_code = row.begin * g.W + column.begin;
      } else if (!g.adaptive) {
        const int64_t above = row.begin - p * g.stride_h + g.pad_h, left = column.begin - q * g.stride_w + g.pad_w;
        if (above != 0 || left != 0) first_code = above / g.dilation_h * g.S + left / g.dilation_w;
      }
      for_each_channels<A>(g.C, [&]<int vectors>(int64_t c) __attribute__((always_inline)) {
        Best<A> best[vectors];
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) best[v] = {broadcast(kLeast<A>), broadcast(static_cast<I>(first_code))};
        I row_start = static_cast<I>(first_code);
        int64_t from = first + c;
        for (int64_t h = row.begin; h < row.end; h += g.dilation_h, from += row_step, row_start += row_code) {
          I code = row_start;
          int64_t tap = from;
          for (int64_t w = column.begin; w < column.end; w += g.dilation_w, tap += column_step, code += column_code) {
#pragma GCC unroll 4
            for (int v = 0; v < vectors; ++v) {
              const Vec<A> x =
                  vectors > 1 ? load_wide(input + tap + v * L) : load_channels(input + tap, g.C - c, input_size - tap);
              best[v].offer((Vec<A>)((Vec<I>)x ^ sign), broadcast(code));
            }
          }
        }
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) {
          if (extremum.relu) best[v].rectify();
          const int64_t to = (np * g.Q + q) * g.C + c + v * L, until_end = (np + 1) * g.Q * g.C - to;
          store_channels(output + to, (Vec<A>)((Vec<I>)best[v].value ^ sign), until_end);
          store_positions<kind, I>(positions, to, best[v].code, until_end);
        }
      });
    }
  });
}

template <class T>
void extremum_pool2d_channels_last(const Pool2dGeometry& g, Extremum extremum, const T* input, T* output, Positions positions) {
  switch (positions.kind) {
    case PositionKind::none: return extremum_pool2d_channels_last<T, PositionKind::none>(g, extremum, input, output, nullptr);
    case PositionKind::indices:
      return extremum_pool2d_channels_last<T, PositionKind::indices>(g, extremum, input, output, positions.to);
    case PositionKind::byte_offsets:
      return extremum_pool2d_channels_last<T, PositionKind::byte_offsets>(g, extremum, input, output, positions.to);
    case PositionKind::int_offsets:
      return extremum_pool2d_channels_last<T, PositionKind::int_offsets>(g, extremum, input, output, positions.to);
  }
}

// Windows without dilation.
template <class T, class Offset>
void offset_pool2d_grad_input_channels_last(const Pool2dGeometry& geometry, const T* grad_output, const Offset* offsets,
                                            T* grad_input) {
  const Pool2dGeometry& g = geometry;
  using A = Arithmetic<T>;
  using I = IndexOf<A>;
  constexpr int64_t L = kLanes<A>;
  const int64_t output_size = g.N * g.P * g.Q * g.C;
  const Cover columns =
      cover_of(g.W, g.Q, workspace<int64_t>(Slot::tables, 2 * g.W), [&](int64_t q) { return column_window(g, q); });
  parallel_for(g.N * g.H, ceil_div(g.R, g.stride_h) * g.S * g.Q * ceil_div(g.C, L) * 6, [&](int64_t nh) {
    const Pool2dGeometry g = geometry;
    const int64_t n = nh / g.H, x = nh % g.H + g.pad_h;
    const int64_t p_begin = std::max<int64_t>(0, ceil_div(x - g.R + 1, g.stride_h)), p_end = std::min(g.P, x / g.stride_h + 1);
    for (int64_t w = 0, run_end; w < g.W; w = run_end) {
      const int64_t q_begin = columns.first[w], q_end = columns.last[w] + 1;
      run_end = end_of_run(columns, w, g.W);
      // Of positions that lie in one window, the same, only the offset differs.
      const bool alone = p_end - p_begin == 1 && q_end - q_begin == 1;
      if (!alone) run_end = w + 1;
      const int64_t to_row = (nh + 1) * g.W * g.C;
      for_each_channels<A>(g.C, [&]<int vectors>(int64_t c) __attribute__((always_inline)) {
        const auto offset_of = [&](int64_t p, int64_t q, int64_t x_w) {
          return static_cast<I>((x - p * g.stride_h) * g.S + x_w + g.pad_w - q * g.stride_w);
        };
        if (alone) {
          const int64_t from = ((n * g.P + p_begin) * g.Q + q_begin) * g.C + c;
          Vec<I> offset[vectors], gradient[vectors];
#pragma GCC unroll 4
          for (int v = 0; v < vectors; ++v) {
            const int64_t until_end = vectors > 1 ? L : output_size - from;
            offset[v] = load_offsets<I>(offsets + from + v * L, g.C - c, until_end);
            gradient[v] = (Vec<I>)load_channels(grad_output + from + v * L, g.C - c, until_end);
          }
          Vec<I> wanted = broadcast(offset_of(p_begin, q_begin, w));
          int64_t to = (nh * g.W + w) * g.C + c;
          for (int64_t i = w; i < run_end; ++i, to += g.C, wanted += 1) {
#pragma GCC unroll 4
            for (int v = 0; v < vectors; ++v)
              store_channels(grad_input + to + v * L, (Vec<A>)(gradient[v] & (offset[v] == wanted)), to_row - to - v * L);
          }
          return;
        }
        Vec<A> sum[vectors] = {};
        for (int64_t p = p_begin; p < p_end; ++p) {
          for (int64_t q = q_begin; q < q_end; ++q) {
            const int64_t from = ((n * g.P + p) * g.Q + q) * g.C + c;
            const Vec<I> wanted = broadcast(offset_of(p, q, w));
#pragma GCC unroll 4
            for (int v = 0; v < vectors; ++v) {
              const int64_t until_end = vectors > 1 ? L : output_size - from;
              const Vec<I> offset = load_offsets<I>(offsets + from + v * L, g.C - c, until_end);
              const Vec<A> gradient = load_channels(grad_output + from + v * L, g.C - c, until_end);
              sum[v] += (Vec<A>)((Vec<I>)gradient & (offset == wanted));
            }
          }
        }
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) {
          const int64_t to = (nh * g.W + w) * g.C + c + v * L;
          store_channels(grad_input + to, sum[v], to_row - to);
        }
      });
    }
  });
}

template <class T>
void avg_pool2d_channels_last(const Pool2dGeometry& geometry, const Divisor& divisor, const T* input, T* output) {
  const Pool2dGeometry& g = geometry;
  using A = Arithmetic<T>;
  constexpr int64_t L = kLanes<A>;
  const int64_t input_size = g.N * g.H * g.W * g.C;
  parallel_for(g.N * g.P, ceil_div(g.H, g.P) * g.W * ceil_div(g.C, L) * 2, [&](int64_t np) {
    const Pool2dGeometry g = geometry;
    const int64_t n = np / g.P;
    const Window row = row_window(g, np % g.P);
    for (int64_t q = 0; q < g.Q; ++q) {
      const Window column = column_window(g, q);
      const A divide_by = static_cast<A>(divisor(row, column));
      for_each_channels<A>(g.C, [&]<int vectors>(int64_t c) __attribute__((always_inline)) {
        Vec<A> sum[vectors] = {};
        for (int64_t h = row.begin; h < row.end; ++h) {
          Vec<A> row_sum[vectors] = {};  // sums of sums: large windows lose less to rounding
          int64_t from = ((n * g.H + h) * g.W + column.begin) * g.C + c;
          for (int64_t w = column.begin; w < column.end; ++w, from += g.C) {
#pragma GCC unroll 4
            for (int v = 0; v < vectors; ++v)
              row_sum[v] +=
                  vectors > 1 ? load_wide(input + from + v * L) : load_channels(input + from, g.C - c, input_size - from);
          }
#pragma GCC unroll 4
          for (int v = 0; v < vectors; ++v) sum[v] += row_sum[v];
        }
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) {
          const int64_t to = (np * g.Q + q) * g.C + c + v * L;
          store_channels(output + to, sum[v] / divide_by, (np + 1) * g.Q * g.C - to);
        }
      });
    }
  });
}

template <class T>
void avg_pool2d_channels_last_grad_input(const Pool2dGeometry& geometry, const Divisor& divisor, const T* grad_output,
                                         T* grad_input) {
  const Pool2dGeometry& g = geometry;
  using A = Arithmetic<T>;
  constexpr int64_t L = kLanes<A>;
  const int64_t output_size = g.N * g.P * g.Q * g.C;
  int64_t* table = workspace<int64_t>(Slot::tables, 2 * (g.H + g.W) + g.P + g.Q);
  const Cover rows = cover_of(g.H, g.P, table, [&](int64_t p) { return row_window(g, p); });
  const Cover columns = cover_of(g.W, g.Q, table + 2 * g.H, [&](int64_t q) { return column_window(g, q); });
  // 1 / divisor(p, q) = row_factors[p] column_factors[q]
  A* row_factors = reinterpret_cast<A*>(table + 2 * (g.H + g.W));
  A* column_factors = row_factors + g.P;
  const Window one{0, 1, 1};
  for (int64_t p = 0; p < g.P; ++p) row_factors[p] = A(1) / static_cast<A>(divisor(row_window(g, p), one));
  for (int64_t q = 0; q < g.Q; ++q)
    column_factors[q] = A(1) / static_cast<A>(divisor.override_value != 0 ? 1 : divisor(one, column_window(g, q)));
  parallel_for(g.N * g.H, g.W * ceil_div(g.C, L) * 4, [&](int64_t nh) {
    const Pool2dGeometry g = geometry;
    const int64_t n = nh / g.H, h = nh % g.H;
    for (int64_t w = 0, run_end; w < g.W; w = run_end) {
      run_end = end_of_run(columns, w, g.W);
      for_each_channels<A>(g.C, [&]<int vectors>(int64_t c) __attribute__((always_inline)) {
        Vec<A> sum[vectors] = {};
        for (int64_t p = rows.first[h]; p <= rows.last[h]; ++p) {
          for (int64_t q = columns.first[w]; q <= columns.last[w]; ++q) {
            const A factor = row_factors[p] * column_factors[q];
            const int64_t from = ((n * g.P + p) * g.Q + q) * g.C + c;
#pragma GCC unroll 4
            for (int v = 0; v < vectors; ++v) {
              const T* at = grad_output + from + v * L;
              sum[v] += (vectors > 1 ? load_wide(at) : load_channels(at, g.C - c, output_size - from)) * factor;
            }
          }
        }
        for (int64_t i = w; i < run_end; ++i) {
#pragma GCC unroll 4
          for (int v = 0; v < vectors; ++v) {
            const int64_t to = (nh * g.W + i) * g.C + c + v * L;
            store_channels(grad_input + to, sum[v], (nh + 1) * g.W * g.C - to);
          }
        }
      });
    }
  });
}

}  // namespace torchcnn::TORCHCNN_ISA
