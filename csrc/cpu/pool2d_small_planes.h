// Pooling of small planes, NCHW, whose rows of windows are shorter than a vector: kLanes planes are transposed as a whole, so
// that lane l belongs to plane l, and what follows is channels_last with one vector of channels.
//
//   lanes[h W + w][l] = input[l][h][w]                                        transposed
//   extreme    result[p Q + q][l] = best of lanes[h W + w][l] over the window
//   average    result[p Q + q][l] = sum / divisor(p, q)                       backward: += gradient / divisor(p, q)
//   output[l][p][q] = result[p Q + q][l]                                      transposed back
//
// Taps are taken in row-major order, windows too: the order of every sum follows from the geometry. Lanes beyond the last plane
// repeat it.
#pragma once

#include "pool2d_average_nchw.h"
#include "pool2d_channels_last.h"
#include "pool2d_planes.h"

namespace torchcnn::TORCHCNN_ISA {

// All that is kept of a group lies in the nearest cache.
template <class A>
inline bool suits_small_planes(const Pool2dGeometry& g) {
  constexpr int64_t kept = 16 * 1024 / TORCHCNN_VECTOR_BYTES;
  return g.Q < kLanes<A> && g.H <= kept && g.W <= kept && g.H * g.W <= kept && g.P * g.Q <= kept && g.N * g.C >= kLanes<A>;
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
// what the next group has in this place is asked for.
template <class A, class T, class LoadAt, class LoadEnd>
inline void planes_to_lanes(const T* from, int64_t first, int64_t planes, int64_t count, LoadAt load_at, LoadEnd load_end,
                            A* lanes) {
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
      gemm::transpose<A>(v);
#pragma GCC unroll 16
      for (int l = 0; l < L; ++l) store(lanes + (x + l) * L, v[l]);
    }
    return;
  }
  for (int64_t x = 0; x < count; x += L) {
    Vec<A> v[L];
    for (int64_t l = 0; l < L; ++l) v[l] = load_end(from + (first + std::min(l, planes - 1)) * count + x, count - x);
    gemm::transpose<A>(v);
    for (int l = 0; l < L; ++l) store(lanes + (x + l) * L, v[l]);
  }
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

// Calls visit(h W + w, r, s) for the taps of a window inside the plane, R_ x S_ of them or, where these are 0, any.
// What is visited may be stored to, so sizes are kept where no store can change them.
template <int R_, int S_, class Visit>
[[gnu::always_inline]] inline void for_each_tap(const Pool2dGeometry& g, const Window& row, const Window& column, Visit visit) {
  if constexpr (R_ > 0) {
    const int64_t W = g.W, start = row.begin * W + column.begin;
#pragma GCC unroll 3
    for (int64_t r = 0; r < R_; ++r)
#pragma GCC unroll 3
      for (int64_t s = 0; s < S_; ++s) visit(start + r * W + s, r, s);
  } else {
    const int64_t W = g.W, dilation_h = g.dilation_h, dilation_w = g.dilation_w;
    const Window rows = row, columns = column;
    for (int64_t h = rows.begin, r = 0; h < rows.end; h += dilation_h, ++r)
      for (int64_t w = columns.begin, s = 0; w < columns.end; w += dilation_w, ++s) visit(h * W + w, r, s);
  }
}

// Calls run.template operator()<R, S>() with the window size if all windows have it, and one of the common ones, else with 0, 0.
template <class Run>
inline void with_window_size(const Pool2dGeometry& g, Run run) {
  const bool plain = !g.adaptive && g.dilation_h == 1 && g.dilation_w == 1 && windows_lie_inside(g);
  if (plain && g.R == 2 && g.S == 2) return run.template operator()<2, 2>();
  if (plain && g.R == 3 && g.S == 3) return run.template operator()<3, 3>();
  run.template operator()<0, 0>();
}

// ------------------------------------------------------------------------------------------------------------------ extremes

// The code of the first tap of window (p, q) that lies inside: an index of the plane or an offset in the window.
inline int64_t first_code_of(const Pool2dGeometry& g, bool of_plane, int64_t p, int64_t q, const Window& row,
                             const Window& column) {
  if (of_plane) return row.begin * g.W + column.begin;
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
    planes_to_lanes<A>(input, first, planes, plane, [=](const T* at) { return (Vec<A>)((Vec<I>)load_wide(at) ^ sign); },
                       [=](const T* at, int64_t left) { return (Vec<A>)((Vec<I>)load_row_end(at, left, end) ^ sign); }, lanes);
    with_window_size(g, [&]<int R_, int S_>() {
      A *value = values, *code = codes;
      for (int64_t p = 0; p < g.P; ++p) {
        for (int64_t q = 0; q < g.Q; ++q, value += L, code += L) {
          const Window &row = table.row[p], &column = table.column[q];
          const I start = static_cast<I>(coded ? first_code_of(g, of_plane, p, q, row, column) : 0);
          Best<A> best{load(lanes + (row.begin * g.W + column.begin) * L), broadcast(start)};
          for_each_tap<R_, S_>(g, row, column, [&](int64_t x, int64_t r, int64_t s) {
            const I tap = static_cast<I>(r) * row_code + static_cast<I>(s) * column_code;
            if (R_ == 0 || r + s > 0) best.offer(load(lanes + x * L), broadcast(start + tap));
          });
          if (extremum.relu) best.rectify();
          store(value, (Vec<A>)((Vec<I>)best.value ^ sign));
          if (coded) store(code, (Vec<A>)best.code);
        }
      }
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
    with_window_size(g, [&]<int R_, int S_>() {
      A* mean = means;
      for (int64_t p = 0; p < g.P; ++p) {
        for (int64_t q = 0; q < g.Q; ++q, mean += L) {
          Vec<A> sum{};
          for_each_tap<R_, S_>(g, table.row[p], table.column[q],
                               [&](int64_t x, int64_t, int64_t) { sum += load(lanes + x * L); });
          store(mean, averaging.of(sum, table.row[p], q));
        }
      }
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
    with_window_size(g, [&]<int R_, int S_>() {
      const A* gradient = gradients;
      for (int64_t p = 0; p < g.P; ++p) {
        for (int64_t q = 0; q < g.Q; ++q, gradient += L) {
          const Vec<A> share = averaging.of(load(gradient), table.row[p], q);
          for_each_tap<R_, S_>(g, table.row[p], table.column[q],
                               [&](int64_t x, int64_t, int64_t) { store(sums + x * L, load(sums + x * L) + share); });
        }
      }
    });
    lanes_to_planes<A>(sums, first, planes, plane,
                       [=](int64_t to, Vec<A> v, int64_t n) { store_narrow_partial(grad_input + to, v, n); });
  });
}

}  // namespace torchcnn::TORCHCNN_ISA
