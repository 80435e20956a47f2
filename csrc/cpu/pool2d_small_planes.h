// Pooling of small planes, NCHW, whose rows of windows are shorter than a vector: kLanes planes are transposed as a whole, so
// that lane l belongs to plane l, and what follows is channels_last with one vector of channels.
//
//   lanes[h W + w][l] = input[l][h][w]                                        transposed
//   extreme    result[p Q + q][l] = best of lanes[h W + w][l] over the window
//   average    result[p Q + q][l] = sum / divisor(p, q)                       backward: += gradient / divisor(p, q)
//   output[l][p][q] = result[p Q + q][l]                                      transposed back
//
// Taps are taken in row-major order, windows too: the order of every sum follows from the geometry. Lanes beyond the last plane
// repeat it. To mind NaN costs a comparison two or three instructions of five, and is left out for a group whose elements have a
// sum that is not NaN.
#pragma once

#include "pool2d_average_nchw.h"
#include "pool2d_channels_last.h"
#include "pool2d_planes.h"

namespace torchcnn::TORCHCNN_ISA {

// All that is kept of a group lies in the nearest cache.
template <class A>
inline bool suits_small_planes(const Pool2dGeometry& g) {
  constexpr int64_t kept = 16 * 1024 / TORCHCNN_VECTOR_BYTES;
  return g.Q < kLanes<A> && g.H <= kept && g.W <= kept && g.H * g.W <= kept && g.P * g.Q <= kept;
}

struct WindowTables {
  const Window *row, *column;

  explicit WindowTables(const Pool2dGeometry& g) {
    Window* table = workspace<Window>(Slot::positions, g.P + g.Q);
    row = table, column = table + g.P;
    for (int64_t p = 0; p < g.P; ++p) table[p] = row_window(g, p);
    for (int64_t q = 0; q < g.Q; ++q) table[g.P + q] = column_window(g, q);
  }
};

// lanes[x kLanes + l] = element x of plane l. load_at(at) gives the elements from `at` on, load_end(at, left) does not read
// beyond the tensor, and only `left` of its elements count. Each plane is a stream too short for the processor to foresee, so
// what the next group has in this place is asked for. Returns a sum that is NaN if any element is.
template <class A, class T, class LoadAt, class LoadEnd>
inline Vec<A> planes_to_lanes(const T* from, int64_t first, int64_t planes, int64_t count, LoadAt load_at, LoadEnd load_end,
                              A* lanes) {
  Vec<A> trace{};
  const auto trace_square = [&](const Vec<A>* v) __attribute__((always_inline)) {
    Vec<A> sum[kLanes<A>];
#pragma GCC unroll 16
    for (int l = 0; l < static_cast<int>(kLanes<A>); ++l) sum[l] = v[l];
#pragma GCC unroll 4
    for (int half = static_cast<int>(kLanes<A>) / 2; half > 0; half /= 2)
#pragma GCC unroll 8
      for (int l = 0; l < half; ++l) sum[l] += sum[l + half];
    trace += sum[0];
  };
  constexpr int L = static_cast<int>(kLanes<A>);
  if (count >= L && planes == L) {
    for (int64_t block = 0; block < count; block += L) {
      const int64_t x = std::min(block, count - L);
      const T* at = from + first * count + x;
      Vec<A> v[L];
#pragma GCC unroll 16
      for (int l = 0; l < L; ++l) {
        v[l] = load_at(at + l * count);
        __builtin_prefetch(at + (l + L) * count, 0, 2);
      }
      trace_square(v);
      gemm::transpose<A>(v);
#pragma GCC unroll 16
      for (int l = 0; l < L; ++l) store(lanes + (x + l) * L, v[l]);
    }
    return trace;
  }
  for (int64_t x = 0; x < count; x += L) {
    Vec<A> v[L];
    for (int64_t l = 0; l < L; ++l) v[l] = load_end(from + (first + std::min(l, planes - 1)) * count + x, count - x);
    trace_square(v);
    gemm::transpose<A>(v);
    for (int l = 0; l < L; ++l) store(lanes + (x + l) * L, v[l]);
  }
  return trace;
}

// The inverse: store_to(i, v, n) stores n elements at i of the tensor. What is stored beyond a plane shorter than a vector
// belongs to planes that follow.
template <class A, class StoreTo>
inline void lanes_to_planes(const A* lanes, int64_t first, int64_t planes, int64_t count, StoreTo store_to) {
  if (count >= kLanes<A> && planes == kLanes<A>) {
    lanes_to_rows<A>(lanes, count, [=](int64_t l, int64_t x, Vec<A> v) { store_to((first + l) * count + x, v, kLanes<A>); });
    return;
  }
  lanes_to_rows<A>(lanes, count, [=](int64_t l, int64_t x, Vec<A> v) {
    if (l < planes) store_to((first + l) * count + x, v, std::min(kLanes<A>, (planes - l) * count - x));
  });
}

// Calls visit(first plane, planes) for the groups.
template <class A, class Visit>
void for_each_small_group(const Pool2dGeometry& g, Visit visit) {
  constexpr int64_t L = kLanes<A>;
  const int64_t planes = g.N * g.C;
  parallel_for(ceil_div(planes, L), g.H * g.W * 8, [&](int64_t group) { visit(group * L, std::min(L, planes - group * L)); });
}

// Calls visit(h W + w, r, s) for the taps of a window inside the plane, the first of which is `start`: R_ x S_ of them or, where
// these are 0, those of row and column. What is visited may be stored to, so sizes are kept where no store can change them.
template <int R_, int S_, class Visit>
[[gnu::always_inline]] inline void for_each_tap(const Pool2dGeometry& g, int64_t W, int64_t start, const Window* row,
                                                const Window* column, Visit visit) {
  if constexpr (R_ > 0) {
#pragma GCC unroll 3
    for (int64_t r = 0; r < R_; ++r)
#pragma GCC unroll 3
      for (int64_t s = 0; s < S_; ++s) visit(start + r * W + s, r, s);
  } else {
    const int64_t dilation_h = g.dilation_h, dilation_w = g.dilation_w;
    const Window rows = *row, columns = *column;
    for (int64_t h = rows.begin, r = 0; h < rows.end; h += dilation_h, ++r)
      for (int64_t w = columns.begin, s = 0; w < columns.end; w += dilation_w, ++s) visit(h * W + w, r, s);
  }
}

// Calls visit.template operator()<R, S>(row, column, first tap inside the plane) for the windows: with R_, S_ where a window of
// that size lies inside the plane as a whole, else with 0, 0.
template <int R_, int S_, class Visit>
[[gnu::always_inline]] inline void for_each_window(const Pool2dGeometry& g, const WindowTables& table, Visit visit) {
  const int64_t P = g.P, Q = g.Q, W = g.W, step = g.stride_w;
  const Window *row = table.row, *columns = table.column;
  const auto visit_others = [&](int64_t q, int64_t end) __attribute__((always_inline)) {
    for (; q < end; ++q) visit.template operator()<0, 0>(row, columns + q, row->begin * W + columns[q].begin);
  };
  // Windows whole_begin ... whole_end - 1 of a row are whole, if the row is.
  int64_t whole_begin = 0, whole_end = 0;
  if (R_ > 0) {
    whole_begin = std::min(Q, ceil_div(g.pad_w, step));
    whole_end = g.W + g.pad_w < S_ ? whole_begin : std::clamp((g.W + g.pad_w - S_) / step + 1, whole_begin, Q);
  }
  for (int64_t p = 0; p < P; ++p, ++row) {
    const bool whole = R_ > 0 && row->end - row->begin == R_;
    visit_others(0, whole ? whole_begin : Q);
    if (!whole) continue;
    int64_t start = row->begin * W + whole_begin * step - g.pad_w;
    for (int64_t q = whole_begin; q < whole_end; ++q, start += step) visit.template operator()<R_, S_>(row, columns + q, start);
    visit_others(whole_end, Q);
  }
}

// Calls run.template operator()<R, S>() with the window size if it is one of the common ones, else with 0, 0.
template <class Run>
inline void with_window_size(const Pool2dGeometry& g, Run run) {
  const bool dense = !g.adaptive && g.dilation_h == 1 && g.dilation_w == 1;
  if (dense && g.R == 2 && g.S == 2) return run.template operator()<2, 2>();
  if (dense && g.R == 3 && g.S == 3) return run.template operator()<3, 3>();
  run.template operator()<0, 0>();
}

// ------------------------------------------------------------------------------------------------------------------ extremes

// The offset in window (p, q) of its first tap inside the plane.
inline int64_t first_offset_of(const Pool2dGeometry& g, int64_t p, int64_t q, const Window& row, const Window& column) {
  if (g.adaptive) return 0;
  const int64_t above = row.begin - p * g.stride_h + g.pad_h, left = column.begin - q * g.stride_w + g.pad_w;
  return above == 0 && left == 0 ? 0 : above / g.dilation_h * g.S + left / g.dilation_w;
}

template <class T, bool coded>
void extremum_pool2d_small_planes(const Pool2dGeometry& g, Extremum extremum, const T* input, T* output, Positions positions) {
  using A = Arithmetic<T>;
  using I = IndexOf<A>;
  constexpr int64_t L = kLanes<A>;
  const int64_t plane = g.H * g.W, windows = g.P * g.Q;
  const bool of_plane = positions.kind == PositionKind::indices;
  const I row_code = static_cast<I>(of_plane ? g.dilation_h * g.W : g.S);
  const I column_code = static_cast<I>(of_plane ? g.dilation_w : 1);
  const Vec<I> sign = broadcast(extremum.minimum ? std::numeric_limits<I>::min() : I(0));  // a minimum turns the sign bits
  const T* end = input + g.N * g.C * plane;
  const WindowTables table(g);
  for_each_small_group<A>(g, [&](int64_t first, int64_t planes) {
    A* lanes = workspace<A>(Slot::patches, L * round_up_to_lanes<A>(plane));
    A* values = workspace<A>(Slot::tile, 2 * L * round_up_to_lanes<A>(windows));
    A* codes = values + L * round_up_to_lanes<A>(windows);
    const Vec<A> trace = planes_to_lanes<A>(input, first, planes, plane, [=](const T* at) {
      return (Vec<A>)((Vec<I>)load_wide(at) ^ sign);
    }, [=](const T* at, int64_t left) { return (Vec<A>)((Vec<I>)load_row_end(at, left, end) ^ sign); }, lanes);
    bool numbers = true;
    for (int64_t l = 0; l < L; ++l) numbers &= trace[l] == trace[l];
    const auto search = [&]<int R, int S, bool all_numbers>() {
      A *value = values, *code = codes;
      const int64_t W = g.W;
      const I row_step = row_code, column_step = column_code;
      const bool relu = extremum.relu;
      Vec<I> tap_codes[R > 0 ? R * S : 1];
      for (int tap = 0; tap < R * S; ++tap)
        tap_codes[tap] = broadcast(static_cast<I>(tap / S) * row_step + static_cast<I>(tap % S) * column_step);
      for_each_window<R, S>(g, table, [&]<int R_, int S_>(const Window* row, const Window* column, int64_t start) {
        I first_code = static_cast<I>(start);
        if (coded && !of_plane)
          first_code = R_ > 0 ? 0 : static_cast<I>(first_offset_of(g, row - table.row, column - table.column, *row, *column));
        Best<A> best{load(lanes + start * L), Vec<I>{}};
        for_each_tap<R_, S_>(g, W, start, row, column, [&](int64_t x, int64_t r, int64_t s) {
          if (R_ > 0 && r + s == 0) return;
          const Vec<A> candidate = load(lanes + x * L);
          Vec<I> tap{};
          if constexpr (coded) {
            if constexpr (R_ > 0) tap = tap_codes[r * S_ + s];
            if constexpr (R_ == 0) tap = broadcast(static_cast<I>(r) * row_step + static_cast<I>(s) * column_step);
          }
          if constexpr (all_numbers) best.offer_number(candidate, tap);
          if constexpr (!all_numbers) best.offer(candidate, tap);
        });
        if (coded) best.code += first_code;
        if (relu) best.rectify();
        store(value, (Vec<A>)((Vec<I>)best.value ^ sign));
        if (coded) store(code, (Vec<A>)best.code);
        value += L, code += L;
      });
    };
    with_window_size(g, [&]<int R, int S>() {
      if (numbers) return search.template operator()<R, S, true>();
      search.template operator()<R, S, false>();
    });
    lanes_to_planes<A>(values, first, planes, windows,
                       [=](int64_t to, Vec<A> v, int64_t n) { store_narrow_partial(output + to, v, n); });
    if constexpr (coded) {
      lanes_to_planes<A>(codes, first, planes, windows,
                         [=](int64_t to, Vec<A> v, int64_t n) { store_positions<I>(positions, to, (Vec<I>)v, n); });
    }
  });
}

template <class T>
void extremum_pool2d_small_planes(const Pool2dGeometry& g, Extremum extremum, const T* input, T* output, Positions positions) {
  if (positions.kind == PositionKind::none) return extremum_pool2d_small_planes<T, false>(g, extremum, input, output, positions);
  extremum_pool2d_small_planes<T, true>(g, extremum, input, output, positions);
}

// ------------------------------------------------------------------------------------------------------------------ averages

template <class T>
void avg_pool2d_small_planes(const Pool2dGeometry& g, const Divisor& divisor, const T* input, T* output) {
  using A = Arithmetic<T>;
  constexpr int64_t L = kLanes<A>;
  const int64_t plane = g.H * g.W, windows = g.P * g.Q;
  const T* end = input + g.N * g.C * plane;
  const WindowTables table(g);
  const Averaging<A> averaging(g, divisor, workspace<A>(Slot::tables, round_up_to_lanes<A>(g.Q)));
  for_each_small_group<A>(g, [&](int64_t first, int64_t planes) {
    A* lanes = workspace<A>(Slot::patches, L * round_up_to_lanes<A>(plane));
    A* means = workspace<A>(Slot::tile, L * round_up_to_lanes<A>(windows));
    planes_to_lanes<A>(input, first, planes, plane, [=](const T* at) { return load_wide(at); },
                       [=](const T* at, int64_t left) { return load_row_end(at, left, end); }, lanes);
    with_window_size(g, [&]<int R, int S>() {
      A* mean = means;
      const int64_t W = g.W;
      const Averaging<A> local = averaging;
      for_each_window<R, S>(g, table, [&]<int R_, int S_>(const Window* row, const Window* column, int64_t start) {
        Vec<A> sum{};
        for_each_tap<R_, S_>(g, W, start, row, column, [&](int64_t x, int64_t, int64_t) { sum += load(lanes + x * L); });
        store(mean, local.of(sum, *row, column - table.column));
        mean += L;
      });
    });
    lanes_to_planes<A>(means, first, planes, windows,
                       [=](int64_t to, Vec<A> v, int64_t n) { store_narrow_partial(output + to, v, n); });
  });
}

template <class T>
void avg_pool2d_grad_input_small_planes(const Pool2dGeometry& g, const Divisor& divisor, const T* grad_output, T* grad_input) {
  using A = Arithmetic<T>;
  constexpr int64_t L = kLanes<A>;
  const int64_t plane = g.H * g.W, windows = g.P * g.Q;
  const T* end = grad_output + g.N * g.C * windows;
  const WindowTables table(g);
  const Averaging<A> averaging(g, divisor, workspace<A>(Slot::tables, round_up_to_lanes<A>(g.Q)));
  for_each_small_group<A>(g, [&](int64_t first, int64_t planes) {
    A* sums = workspace<A>(Slot::patches, L * round_up_to_lanes<A>(plane));
    A* gradients = workspace<A>(Slot::tile, L * round_up_to_lanes<A>(windows));
    planes_to_lanes<A>(grad_output, first, planes, windows, [=](const T* at) { return load_wide(at); },
                       [=](const T* at, int64_t left) { return load_row_end(at, left, end); }, gradients);
    fill_row(sums, L * plane, A(0));
    with_window_size(g, [&]<int R, int S>() {
      const A* gradient = gradients;
      const int64_t W = g.W;
      const Averaging<A> local = averaging;
      for_each_window<R, S>(g, table, [&]<int R_, int S_>(const Window* row, const Window* column, int64_t start) {
        const Vec<A> share = local.of(load(gradient), *row, column - table.column);
        for_each_tap<R_, S_>(g, W, start, row, column,
                             [&](int64_t x, int64_t, int64_t) { store(sums + x * L, load(sums + x * L) + share); });
        gradient += L;
      });
    });
    lanes_to_planes<A>(sums, first, planes, plane,
                       [=](int64_t to, Vec<A> v, int64_t n) { store_narrow_partial(grad_input + to, v, n); });
  });
}

}  // namespace torchcnn::TORCHCNN_ISA
