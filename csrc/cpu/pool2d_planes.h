// Pooling with planes side by side, NCHW: lane l of a vector belongs to plane l of a group of kLanes planes. Windows may then be
// anything: adaptive, far apart, of any size, or fewer in a row than a vector has lanes.
//
//   forward    columns[l][w] = best or sum, over the rows h of window p, of input[l][h][w]          vectors over w
//              [l][w] -> [w][l]                                                                      transposed
//              result[q][l]  = best or sum, over the columns w of window q, of columns[w][l]         vectors over l
//              [p, q][l] -> [l][p, q]                                                                transposed back
//
// A plane is read from its first row to its last before the next, as it lies in memory. Lanes beyond the last plane hold
// anything, and are not stored.
#pragma once

#include "pool2d_global_nchw.h"
#include "pool2d_rows.h"

namespace torchcnn::TORCHCNN_ISA {

// Windows of 2 columns and more whose vectors over q would be short or far apart.
template <class A>
inline bool suits_planes(const Pool2dGeometry& g) {
  return g.adaptive || g.stride_w > 2 || 4 * g.Q <= kLanes<A>;
}

// to[x kLanes + l] = from[l pitch + x] for x < count, rounded up to whole vectors.
template <class A>
inline void rows_to_lanes(const A* from, int64_t pitch, int64_t count, A* to) {
  constexpr int L = static_cast<int>(kLanes<A>);
  for (int64_t x = 0; x < count; x += L) {
    Vec<A> v[L];
#pragma GCC unroll 16
    for (int l = 0; l < L; ++l) v[l] = load(from + l * pitch + x);
    gemm::transpose<A>(v);
#pragma GCC unroll 16
    for (int l = 0; l < L; ++l) store(to + (x + l) * L, v[l]);
  }
}

// The inverse, in blocks: write(l, x, v) gets elements x, x + 1, ... of plane l. The last block overlaps the one before it.
template <class A, class Write>
inline void lanes_to_rows(const A* from, int64_t count, Write write) {
  constexpr int L = static_cast<int>(kLanes<A>);
  for (int64_t block = 0; block < count; block += L) {
    const int64_t x = count >= L ? std::min(block, count - L) : 0;
    Vec<A> v[L];
#pragma GCC unroll 16
    for (int l = 0; l < L; ++l) v[l] = load(from + (x + l) * L);
    gemm::transpose<A>(v);
#pragma GCC unroll 16
    for (int l = 0; l < L; ++l) write(l, x, v[l]);
  }
}

// How many rows of windows a task computes: what it keeps of them in lanes stays in L1, what it keeps of the rows near it.
template <class A>
inline int64_t windows_of_task(const Pool2dGeometry& g) {
  constexpr int64_t kept = 16 * 1024 / TORCHCNN_VECTOR_BYTES, kept_rows = 64 * 1024 / TORCHCNN_VECTOR_BYTES;
  return std::clamp<int64_t>(std::min(kept / g.Q, kept_rows / round_up_to_lanes<A>(g.W)), 1, g.P);
}

// Calls visit(first plane, planes, p_begin, p_end).
template <class A, class Visit>
void for_each_group(const Pool2dGeometry& g, int64_t cost_of_row, Visit visit) {
  constexpr int64_t L = kLanes<A>;
  const int64_t planes = g.N * g.C, band = windows_of_task<A>(g), bands = ceil_div(g.P, band);
  parallel_for(ceil_div(planes, L) * bands, band * cost_of_row, [&](int64_t task) {
    const int64_t first = task / bands * L, p_begin = task % bands * band;
    visit(first, std::min(L, planes - first), p_begin, std::min(g.P, p_begin + band));
  });
}

// Stores results [windows][lanes] of a group as windows begin ... begin + count - 1 of its planes.
template <class T, class Store>
inline void store_group(const Pool2dGeometry& g, const Arithmetic<T>* results, int64_t first, int64_t planes, int64_t begin,
                        int64_t count, Store store_elements) {
  using A = Arithmetic<T>;
  const int64_t plane = g.P * g.Q;
  if (plane == 1) return store_elements(first, load(results), planes);
  lanes_to_rows<A>(results, count, [=](int64_t l, int64_t x, Vec<A> v) {
    if (l < planes) store_elements((first + l) * plane + begin + x, v, std::min(kLanes<A>, count - x));
  });
}

inline const Window* windows_of_columns(const Pool2dGeometry& g) {
  Window* columns = workspace<Window>(Slot::tables, g.Q);
  for (int64_t q = 0; q < g.Q; ++q) columns[q] = column_window(g, q);
  return columns;
}

// ------------------------------------------------------------------------------------------------------------------ extremes

// The first zero of a window in row-major order, whatever its sign: the extreme of a window that has none better.
template <class T>
Arithmetic<T> first_zero(const Pool2dGeometry& g, const T* plane, const Window& row, const Window& column) {
  for (int64_t h = row.begin; h < row.end; h += g.dilation_h)
    for (int64_t w = column.begin; w < column.end; w += g.dilation_w)
      if (widen(plane[h * g.W + w]) == 0) return widen(plane[h * g.W + w]);
  return 0;
}

template <class T, PositionKind kind>
void extremum_pool2d_planes(const Pool2dGeometry& g, Extremum extremum, const T* input, T* output, void* positions) {
  using A = Arithmetic<T>;
  using I = IndexOf<A>;
  constexpr int64_t L = kLanes<A>;
  const int64_t plane_size = g.H * g.W;
  constexpr bool coded = kind != PositionKind::none, of_plane = kind == PositionKind::indices;
  const Window* columns = windows_of_columns(g);
  const T* end = input + g.N * g.C * plane_size;
  const bool whole_vectors = g.W >= L;
  const auto load_in_row = [=, W = g.W](const T* from) { return whole_vectors ? load_wide(from) : load_row_end(from, W, end); };
  const int64_t pitch = round_up_to_lanes<A>(g.W), step = g.dilation_h * g.W;
  const I row_code = static_cast<I>(of_plane ? step : g.S);
  [[maybe_unused]] const I column_code = static_cast<I>(of_plane ? g.dilation_w : 1);
  const Vec<I> sign = broadcast(extremum.minimum ? std::numeric_limits<I>::min() : I(0));  // a minimum turns the sign bits
  const int64_t window_rows = g.adaptive ? ceil_div(g.H, g.P) : g.R;
  for_each_group<A>(g, L * window_rows * ceil_div(g.W, L) * 5,
                    [&](int64_t first, int64_t planes, int64_t p_begin, int64_t p_end) {
    const int64_t results = round_up_to_lanes<A>((p_end - p_begin) * g.Q);
    const int64_t rows_size = (p_end - p_begin) * L * pitch;
    A* value_rows = workspace<A>(Slot::tile, rows_size + L * pitch + L * results);
    A *value_lanes = value_rows + rows_size, *value_result = value_lanes + L * pitch;
    I* code_rows = workspace<I>(Slot::partial_sums, coded ? rows_size + L * pitch + L * results : 1);
    I *code_lanes = code_rows + rows_size, *code_result = code_lanes + L * pitch;
    int64_t result = 0;
    Vec<I> zeros{};
    for (int64_t l = 0; l < planes; ++l) {
      for (int64_t p = p_begin; p < p_end; ++p) {
        const Window row = row_window(g, p);
        const int64_t taps = ceil_div(row.end - row.begin, g.dilation_h), to = ((p - p_begin) * L + l) * pitch;
        I first_code = static_cast<I>(row.begin * g.W);
        if (!of_plane) first_code = static_cast<I>((row.begin - p * g.stride_h + g.pad_h) / g.dilation_h * g.S);
        const T* plane = input + (first + l) * plane_size + row.begin * g.W;
        for_each_columns<A>(g.W, [&]<int vectors>(const int64_t* at) {
          Best<A> best[vectors];
#pragma GCC unroll 4
          for (int v = 0; v < vectors; ++v) {
            best[v] = {(Vec<A>)((Vec<I>)load_in_row(plane + at[v]) ^ sign), broadcast(first_code)};
          }
          const T* from = plane + step;
          I code = first_code + row_code;
          for (int64_t r = 1; r < taps; ++r, from += step, code += row_code) {
#pragma GCC unroll 4
            for (int v = 0; v < vectors; ++v) {
              best[v].offer((Vec<A>)((Vec<I>)load_in_row(from + at[v]) ^ sign), broadcast(code));
            }
          }
#pragma GCC unroll 4
          for (int v = 0; v < vectors; ++v) {
            store(value_rows + to + at[v], best[v].value);
            if (coded) store(code_rows + to + at[v], best[v].code);
          }
        });
      }
    }
    for (int64_t p = p_begin; p < p_end; ++p) {
      const int64_t from = (p - p_begin) * L * pitch;
      rows_to_lanes(value_rows + from, pitch, g.W, value_lanes);
      if (coded) rows_to_lanes(reinterpret_cast<const A*>(code_rows + from), pitch, g.W, reinterpret_cast<A*>(code_lanes));
      for (int64_t q = 0; q < g.Q; ++q, ++result) {
        const Window column = columns[q];
        Best<A> best{load(value_lanes + column.begin * L), Vec<I>{}};
        I code = static_cast<I>(column.begin);
        if (!of_plane) code = static_cast<I>((column.begin - q * g.stride_w + g.pad_w) / g.dilation_w);
        if (coded) best.code = load(code_lanes + column.begin * L) + code;
        for (int64_t w = column.begin + g.dilation_w; w < column.end; w += g.dilation_w) {
          const Vec<A> candidate = load(value_lanes + w * L);
          if constexpr (coded) {
            code += column_code;
            offer_anywhere<A>(best, candidate, load(code_lanes + w * L) + code);
          } else {
            best.offer(candidate, Vec<I>{});
          }
        }
        if (extremum.relu) {
          best.rectify();
        } else if (!coded) {
          zeros |= best.value == Vec<A>{};
        }
        store(value_result + result * L, (Vec<A>)((Vec<I>)best.value ^ sign));
        if (coded) store(code_result + result * L, best.code);
      }
    }
    // Without codes the columns were searched before the rows, so that of zeros with different signs any may have won.
    bool any_zero = false;
    for (int64_t l = 0; l < planes; ++l) any_zero |= zeros[l] != 0;
    for (int64_t i = 0; any_zero && i < result; ++i) {
      const Window row = row_window(g, p_begin + i / g.Q), &column = columns[i % g.Q];
      for (int64_t l = 0; l < planes; ++l) {
        A& value = value_result[i * L + l];
        if (value == 0) value = first_zero(g, input + (first + l) * plane_size, row, column);
      }
    }
    const int64_t begin = p_begin * g.Q, count = (p_end - p_begin) * g.Q;
    store_group<T>(g, value_result, first, planes, begin, count,
                   [=](int64_t to, Vec<A> v, int64_t n) { store_narrow_partial(output + to, v, n); });
    if constexpr (coded) {
      store_group<T>(g, reinterpret_cast<const A*>(code_result), first, planes, begin, count,
                     [=](int64_t to, Vec<A> v, int64_t n) { store_positions<kind, I>(positions, to, (Vec<I>)v, n); });
    }
  });
}

template <class T>
void extremum_pool2d_planes(const Pool2dGeometry& g, Extremum extremum, const T* input, T* output, Positions positions) {
  switch (positions.kind) {
    case PositionKind::none: return extremum_pool2d_planes<T, PositionKind::none>(g, extremum, input, output, nullptr);
    case PositionKind::indices: return extremum_pool2d_planes<T, PositionKind::indices>(g, extremum, input, output, positions.to);
    case PositionKind::byte_offsets:
      return extremum_pool2d_planes<T, PositionKind::byte_offsets>(g, extremum, input, output, positions.to);
    case PositionKind::int_offsets:
      return extremum_pool2d_planes<T, PositionKind::int_offsets>(g, extremum, input, output, positions.to);
  }
}

// ------------------------------------------------------------------------------------------------------------------ averages

template <class T>
void avg_pool2d_planes(const Pool2dGeometry& g, const Divisor& divisor, const T* input, T* output) {
  using A = Arithmetic<T>;
  constexpr int64_t L = kLanes<A>;
  const int64_t plane_size = g.H * g.W;
  const Window* columns = windows_of_columns(g);
  const T* end = input + g.N * g.C * plane_size;
  const bool whole_vectors = g.W >= L;
  const auto load_in_row = [=, W = g.W](const T* from) { return whole_vectors ? load_wide(from) : load_row_end(from, W, end); };
  const int64_t pitch = round_up_to_lanes<A>(g.W), window_rows = g.adaptive ? ceil_div(g.H, g.P) : std::min(g.R, g.H);
  for_each_group<A>(g, L * window_rows * ceil_div(g.W, L) * 2,
                    [&](int64_t first, int64_t planes, int64_t p_begin, int64_t p_end) {
    const int64_t results = round_up_to_lanes<A>((p_end - p_begin) * g.Q);
    const int64_t rows_size = (p_end - p_begin) * L * pitch;
    A* sum_rows = workspace<A>(Slot::tile, rows_size + L * pitch + L * results);
    A *sum_lanes = sum_rows + rows_size, *mean = sum_lanes + L * pitch;
    int64_t result = 0;
    for (int64_t l = 0; l < planes; ++l) {
      for (int64_t p = p_begin; p < p_end; ++p) {
        const Window row = row_window(g, p);
        const int64_t to = ((p - p_begin) * L + l) * pitch;
        const T* plane = input + (first + l) * plane_size + row.begin * g.W;
        for_each_columns<A>(g.W, [&]<int vectors>(const int64_t* at) {
          Vec<A> sum[vectors];
#pragma GCC unroll 4
          for (int v = 0; v < vectors; ++v) sum[v] = load_in_row(plane + at[v]);
          const T* from = plane + g.W;
          for (int64_t h = row.begin + 1; h < row.end; ++h, from += g.W) {
#pragma GCC unroll 4
            for (int v = 0; v < vectors; ++v) sum[v] += load_in_row(from + at[v]);
          }
#pragma GCC unroll 4
          for (int v = 0; v < vectors; ++v) store(sum_rows + to + at[v], sum[v]);
        });
      }
    }
    for (int64_t p = p_begin; p < p_end; ++p) {
      const Window row = row_window(g, p);
      rows_to_lanes(sum_rows + (p - p_begin) * L * pitch, pitch, g.W, sum_lanes);
      for (int64_t q = 0; q < g.Q; ++q, ++result) {
        const Window column = columns[q];
        Vec<A> sum = load(sum_lanes + column.begin * L);
        for (int64_t w = column.begin + 1; w < column.end; ++w) sum += load(sum_lanes + w * L);
        store(mean + result * L, (sum + A(0)) / static_cast<A>(divisor(row, column)));  // +0 of negative zeros
      }
    }
    store_group<T>(g, mean, first, planes, p_begin * g.Q, (p_end - p_begin) * g.Q,
                   [=](int64_t to, Vec<A> v, int64_t n) { store_narrow_partial(output + to, v, n); });
  });
}

}  // namespace torchcnn::TORCHCNN_ISA
