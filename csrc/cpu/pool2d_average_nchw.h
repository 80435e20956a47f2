// Average pooling, NCHW.
//
// Forward: the rows of a window are added, then its columns. Where all rows must be staged, for padding or conversion, what is
// staged is the sums of rows.
//
// Backward, a gather by rows: position (h, w) receives the shares of the windows that contain it,
//
//   row_sum[q]       = sum over the p whose window contains h of  grad_output[p][q] / divisor(p, q)
//   grad_input[h][w] = sum over the q whose window contains w of  row_sum[q]
//
// Rows h that lie in the same windows p are equal and are copied. With strides 1 and 2 the second sum is one of vectors: w +
// pad_w = j stride_w + phase lies in the windows j, j - 1, ... of as many taps as the phase has.
#pragma once

#include "pool2d_rows.h"

namespace torchcnn::TORCHCNN_ISA {

// divisor(p, q) = row_divisor(p) column_divisor[q], one for lanes past the last window. If all windows have the same divisor,
// that is `uniform`; if it is a power of two besides, multiplying by `exact_factor` is exact, and faster.
template <class A>
struct Averaging {
  const Pool2dGeometry& g;
  const Divisor& divisor;
  A* column_divisor;
  A uniform, exact_factor;  // 0: there is none

  Averaging(const Pool2dGeometry& g, const Divisor& divisor, A* table)
      : g(g), divisor(divisor), column_divisor(table), uniform(0), exact_factor(0) {
    const Window one{0, 1, 1};
    const int64_t first = divisor(row_window(g, 0), column_window(g, 0));
    bool same = true;
    const bool inside = !g.adaptive && windows_lie_inside(g);  // adaptive windows differ in size
    for (int64_t p = 0; p < g.P && same && !inside; ++p) same = divisor(row_window(g, p), column_window(g, 0)) == first;
    for (int64_t q = 0; q < round_up_to_lanes<A>(g.Q); ++q) {
      const Window column = q < g.Q ? column_window(g, q) : one;
      if (q < g.Q) same = same && divisor(row_window(g, 0), column) == first;
      column_divisor[q] = static_cast<A>(divisor.override_value != 0 ? 1 : divisor(one, column));
    }
    if (same && first > 0) uniform = static_cast<A>(first);
    if (uniform != 0 && (first & (first - 1)) == 0) exact_factor = A(1) / uniform;
  }

  A row_divisor(const Window& row) const { return static_cast<A>(divisor(row, Window{0, 1, 1})); }

  // sum / divisor(p, q), with the window of p.
  Vec<A> of(Vec<A> sum, const Window& row, int64_t q) const {
    if (exact_factor != 0) return sum * exact_factor;
    return sum / (uniform != 0 ? uniform : row_divisor(row) * column_divisor[q]);
  }
};

template <class A, int S_, int stride_>
void average_rows(const Pool2dGeometry& g, const Averaging<A>& averaging, Rows<A> rows, int64_t p_begin, int64_t p_end,
                  A* values) {
  constexpr int64_t L = kLanes<A>;
  const int64_t S = S_ ? S_ : g.S, step = stride_ ? stride_ : g.stride_w, Q = g.Q, pitch = rows.pitch;
  for (int64_t p = p_begin; p < p_end; ++p, values += Q) {
    const A* row = rows.data + (p - p_begin) * g.stride_h * pitch;
    const A row_divisor = averaging.exact_factor != 0 ? A(1) : averaging.row_divisor(row_window(averaging.g, p));
    const RowsInside inside = rows_inside(g, rows, p);
    const auto sum_at = [&]<bool edge>(int64_t q) __attribute__((always_inline)) {
      const InsideColumns<A, edge> in{g, q * step - g.pad_w, A(0)};
      const A* at = row + q * step + inside.begin * pitch;
      const int64_t R = inside.end - inside.begin;
      if constexpr (stride_ == 2 && S_ >= 2) {
        Vec<A> a{}, b{}, c{}, d{};
        for (int64_t r = 0; r < R; ++r, at += pitch) {
          a += load(at);
          b += load(at + L);
          if constexpr (S_ == 3) {
            c += load(at + 2);
            d += load(at + L + 1);
          }
        }
        a = in(a, 0), b = in(b, L);
        Vec<A> sum = evens_blocked<A>(a, b) + odds_blocked<A>(a, b);
        if constexpr (S_ == 3) sum += every_second_blocked<0, 1, A>(in(c, 2), in(d, L + 1), kEachLane<A>);
        return sum;
      } else {
        Vec<A> sum{};
        for (int64_t r = 0; r < R; ++r, at += pitch)
          for (int64_t s = 0; s < S; ++s) sum += in(load_tap<stride_>(at + s, step), s);
        return sum;
      }
    };
    for (int64_t q = 0; q < Q; q += L) {
      if (q + L > Q && Q >= L) q = Q - L;
      if constexpr (stride_ == 2 && S_ >= 2)
        if (Q >= L) prefetch_pair<0, A>(row + 4 * q);
      Vec<A> sum;
      if (kCanBeOpen<S_, stride_> && rows.open && reaches_beyond<A>(g, q)) {
        sum = sum_at.template operator()<true>(q);
      } else {
        sum = sum_at.template operator()<false>(q);
      }
      sum = ordered<stride_, A>(sum);
      const Vec<A> mean =
          averaging.exact_factor != 0 ? sum * averaging.exact_factor : sum / (load(averaging.column_divisor + q) * row_divisor);
      store_partial(values + q, mean, std::min(L, (p_end - p) * Q - q));  // beyond a short row lie rows that are written later
    }
  }
}

// 2x2 windows that need no padding and have one divisor. What is stored beyond a row shorter than a vector is written later.
template <class A>
void average_rows_2x2(const Pool2dGeometry& g, const Averaging<A>& averaging, Rows<A> rows, int64_t p_begin, int64_t p_end,
                      A* values) {
  constexpr int64_t L = kLanes<A>;
  constexpr auto each = kEachLane<A>;
  const int64_t Q = g.Q, pitch = rows.pitch, step = g.stride_h * pitch;
  const A *row = rows.data, factor = averaging.exact_factor, divide_by = averaging.uniform;
  const auto mean_of = [=](Vec<A> sum) {
    sum += A(0);  // of negative zeros the mean is +0, as if the sum had started there
    return factor != 0 ? sum * factor : sum / divide_by;
  };
  int64_t left = (p_end - p_begin) * Q;
  if (2 * Q <= L) {  // two rows a vector
    for (; left >= L + Q; left -= 2 * Q, row += 2 * step, values += 2 * Q) {
      const Vec<A> a = load(row) + load(row + pitch), b = load(row + step) + load(row + step + pitch);
      const Vec<A> mean = mean_of(every_second<A>(a, b, 0, each) + every_second<A>(a, b, 1, each));
      store(values, mean);
      store(values + Q, upper_half_first(mean));
    }
  }
  const auto mean_at = [=](const A* at) __attribute__((always_inline)) {
    const Vec<A> a = load(at) + load(at + pitch), b = load(at + L) + load(at + pitch + L);
    return mean_of(ordered<2, A>(evens_blocked<A>(a, b) + odds_blocked<A>(a, b)));
  };
  if (Q < L) {
    for (; left > 0; left -= Q, row += step, values += Q) store_partial(values, mean_at(row), std::min(L, left));
  } else {
    for (; left > 0; left -= Q, row += step, values += Q) {
      for_each_vector_of_row<L>(Q, [&](int64_t q) __attribute__((always_inline)) {
        prefetch_pair<0, A>(row + 4 * q);
        store(values + q, mean_at(row + 2 * q));
      });
    }
  }
}

template <class A>
auto average_rows_for(const Pool2dGeometry& g) {
  if (g.stride_w == 2) return g.S == 2 ? average_rows<A, 2, 2> : g.S == 3 ? average_rows<A, 3, 2> : average_rows<A, 0, 2>;
  if (g.stride_w == 1) return g.S == 3 ? average_rows<A, 3, 1> : average_rows<A, 0, 1>;
  return average_rows<A, 0, 0>;
}

// The sums of the rows of windows p_begin ... p_end - 1, in the workspace of the calling thread, with zeros in the padding.
template <class T>
Rows<Arithmetic<T>> stage_row_sums(const Pool2dGeometry& g, const T* plane, int64_t p_begin, int64_t p_end) {
  using A = Arithmetic<T>;
  constexpr int64_t L = kLanes<A>;
  const int64_t pitch = staged_pitch<A>(g), margin = round_up_to_lanes<A>(g.pad_w), columns = std::min(g.W, pitch - margin);
  A* staged = workspace<A>(Slot::patches, (p_end - p_begin) * pitch);
  for (int64_t p = p_begin; p < p_end; ++p) {
    const Window row = row_window(g, p);
    const T* from = plane + row.begin * g.W;
    const int64_t rows = row.end - row.begin;
    A* to = staged + (p - p_begin) * pitch;
    fill_margins(to, margin, columns, pitch, A(0));
    for (int64_t r = std::max<int64_t>(0, rows - g.stride_h); r < rows; ++r) prefetch_row(from + r * g.W, g.W);
    if (columns < L) {
      for (int64_t w = 0; w < columns; ++w) {
        A sum = 0;
        for (int64_t r = 0; r < rows; ++r) sum += widen(from[r * g.W + w]);
        to[margin + w] = sum;
      }
      continue;
    }
    for (int64_t block = 0; block < columns; block += L) {
      const int64_t w = std::min(block, columns - L);
      Vec<A> sum = load_wide(from + w);
      for (int64_t r = 1; r < rows; ++r) sum += load_wide(from + r * g.W + w);
      store(to + margin + w, sum);
    }
  }
  return {staged + margin - g.pad_w, pitch};
}

template <class T>
void avg_pool2d_sliding(const Pool2dGeometry& g, const Divisor& divisor, const T* input, T* output) {
  using A = Arithmetic<T>;
  const Averaging<A> averaging(g, divisor, workspace<A>(Slot::tables, round_up_to_lanes<A>(g.Q)));
  if constexpr (std::is_same_v<T, A>) {
    if (reads_in_place<T>(g) || reads_open<T>(g)) {
      const auto rows_kernel = is_plain_2x2(g) && averaging.uniform != 0 ? average_rows_2x2<A> : average_rows_for<A>(g);
      for_each_band(g, input, A(0), false, reads_open<T>(g), 2, [&](int64_t nc, int64_t p_begin, int64_t p_end, Rows<A> rows) {
        rows_kernel(g, averaging, rows, p_begin, p_end, output + (nc * g.P + p_begin) * g.Q);
      });
      return;
    }
  }
  Pool2dGeometry one_row = g;  // what is left of the windows once their rows are added
  one_row.R = 1, one_row.stride_h = 1;
  const auto rows_kernel = average_rows_for<A>(one_row);
  constexpr int64_t band_outputs = 8192, staged_bytes = 16 * 1024;
  const int64_t by_rows = staged_bytes / static_cast<int64_t>(staged_pitch<A>(g) * sizeof(A));
  const int64_t band = std::clamp<int64_t>(std::min(by_rows, band_outputs / g.Q), 1, g.P), bands = ceil_div(g.P, band);
  parallel_for(g.N * g.C * bands, (g.R + g.S) * ceil_div(g.Q, kLanes<A>) * band * 2, [&](int64_t task) {
    const int64_t nc = task / bands, p_begin = task % bands * band, p_end = std::min(g.P, p_begin + band);
    const Rows<A> sums = stage_row_sums(g, input + nc * g.H * g.W, p_begin, p_end);
    T* to = output + (nc * g.P + p_begin) * g.Q;
    if constexpr (std::is_same_v<T, A>) {
      rows_kernel(one_row, averaging, sums, p_begin, p_end, to);
    } else {
      const int64_t count = (p_end - p_begin) * g.Q;
      A* values = workspace<A>(Slot::tile, count);
      rows_kernel(one_row, averaging, sums, p_begin, p_end, values);
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

inline constexpr int64_t kLongestSpread = 32;

// A row of grad_input, two vectors at a time, from the windows of stride 2 that a vector of row_sum stands for, kept in
// registers: what is stored and loaded again at another offset waits for all stores before it. odd: pad_w, 0 or 1. Up to two
// vectors are written beyond W.
template <class T, int S, int odd>
[[gnu::noinline]] void spread_rows(int64_t W, int64_t Q, int64_t first, int64_t last, const T* grad_output, const T* end,
                                   const Arithmetic<T>* row_factors, const Arithmetic<T>* column_factors, T* to) {
  using A = Arithmetic<T>;
  using I = IndexOf<A>;
  constexpr int64_t L = kLanes<A>;
  constexpr auto each = kEachLane<A>;
  const int64_t rows = last - first + 1;
  const T* row = grad_output + first * Q;
  row_factors += first;
  const auto row_sum = [&](int64_t q) __attribute__((always_inline)) {
    Vec<A> sum{};
    if (q + L <= Q) {
      for (int64_t i = 0; i < rows; ++i) sum += load_wide(row + i * Q + q) * row_factors[i];
      return sum * load(column_factors + q);
    }
    if (q >= Q) return sum;
    for (int64_t i = 0; i < rows; ++i) sum += load_row_end(row + i * Q + q, Q - q, end) * row_factors[i];
    return (Vec<A>)((Vec<I>)(sum * load(column_factors + q)) & (steps_of<I>(1) < static_cast<I>(Q - q)));
  };
  // Lanes i - 1 and i + 1 of what stands side by side.
  const auto before = [&](Vec<A> previous, Vec<A> v) __attribute__((always_inline)) {
    return shuffled<A, L>(previous, v, [](int i) { return i + static_cast<int>(kLanes<A>) - 1; }, each);
  };
  const auto after = [&](Vec<A> v, Vec<A> next)
                         __attribute__((always_inline)) { return shuffled<A, L>(v, next, [](int i) { return i + 1; }, each); };
  Vec<A> previous{}, current = row_sum(0);
  for (int64_t w = 0, q = L; w < W; w += 2 * L, q += L) {
    const Vec<A> next = row_sum(q);
    Vec<A> evens = current, odds = current;
    if constexpr (odd == 0 && S == 3) evens = current + before(previous, current);
    if constexpr (odd == 1) odds = S == 3 ? after(current, next) + current : after(current, next);
    store_narrow(to + w, interleave<A>(evens, odds, 0, each));
    store_narrow(to + w + L, interleave<A>(evens, odds, 1, each));
    previous = current, current = next;
  }
}

template <class T>
auto spread_rows_for(const Pool2dGeometry& g) {
  using Function = decltype(&spread_rows<T, 2, 0>);
  if (g.stride_w != 2 || g.pad_w > 1 || g.S < 2 || g.S > 3) return Function(nullptr);
  if (g.S == 2) return g.pad_w == 0 ? spread_rows<T, 2, 0> : spread_rows<T, 2, 1>;
  return g.pad_w == 0 ? spread_rows<T, 3, 0> : spread_rows<T, 3, 1>;
}

inline bool suits_spread(const Pool2dGeometry& g) { return !g.adaptive && g.S <= kLongestSpread && g.stride_w <= 2; }

template <class A>
auto spread_row_for(const Pool2dGeometry& g) {
  if (g.stride_w == 1) return g.S == 3 ? spread_row<A, 3, 1> : spread_row<A, 0, 1>;
  return spread_row<A, 0, 2>;
}

// row_sum[q] = sum of grad_output[p][q] / divisor(p, q) over the p from first to last; zero in the lanes after the last window.
// Not inline: what it keeps in registers would otherwise be kept in memory.
template <class T, class A>
[[gnu::noinline]] void sum_of_rows(int64_t Q, int64_t first, int64_t last, const T* grad_output, const T* end,
                                   const A* row_factors, const A* column_factors, A* row_sum) {
  constexpr int64_t L = kLanes<A>;
  const int64_t rows = last - first + 1;
  const T* row = grad_output + first * Q;
  row_factors += first;
  int64_t q = 0;
  if (rows == 1) {
    for (; q + L <= Q; q += L) store(row_sum + q, load_wide(row + q) * row_factors[0] * load(column_factors + q));
  } else if (rows == 2) {
    for (; q + L <= Q; q += L) {
      const Vec<A> sum = load_wide(row + q) * row_factors[0] + load_wide(row + Q + q) * row_factors[1];
      store(row_sum + q, sum * load(column_factors + q));
    }
  }
  for (; q < Q; q += L) {
    const T* at = row + q;
    Vec<A> sum{};
    for (int64_t i = 0; i < rows; ++i, at += Q) sum += load_row_end(at, Q - q, end) * row_factors[i];
    sum *= load(column_factors + q);
    if (Q - q < L) sum = (Vec<A>)((Vec<IndexOf<A>>)sum & (steps_of<IndexOf<A>>(1) < static_cast<IndexOf<A>>(Q - q)));
    store(row_sum + q, sum);
  }
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

  const auto at_once = spread_rows_for<T>(g);
  const auto spread = spread_row_for<A>(g);
  const T* end = grad_output + g.N * g.C * g.P * g.Q;
  constexpr int64_t margin = kLongestSpread, beyond = 2 * L;
  const int64_t sums = margin + std::max(windows, (g.W + g.pad_w) / g.stride_w) + 4 * L;
  const int64_t band = std::clamp<int64_t>(16384 / g.W, 1, g.H), bands = ceil_div(g.H, band);
  parallel_for(g.N * g.C * bands, band * ceil_div(g.W, L) * 6, [&](int64_t task) {
    const int64_t nc = task / bands, h_begin = task % bands * band, h_end = std::min(g.H, h_begin + band);
    // A few rows are summed before the first is spread: what was stored just now cannot be loaded at another offset right away.
    constexpr int64_t most_rows = 4;
    A* row_sums = workspace<A>(Slot::tile, most_rows * sums + g.W + beyond) + margin;
    A* spread_out = row_sums - margin + most_rows * sums;
    std::fill(row_sums - margin, spread_out, A(0));
    const T* gradient = grad_output + nc * g.P * g.Q;
    const auto same_windows = [&](int64_t h) { return rows.first[h] == rows.first[h - 1] && rows.last[h] == rows.last[h - 1]; };
    int64_t block = h_begin;
    for (; at_once != nullptr && (h_end - block - 1) * g.W >= beyond; ++block) {
      T* to = grad_input + (nc * g.H + block) * g.W;
      if (block > h_begin && same_windows(block)) {
        copy_row(to - g.W, g.W, to);
      } else {
        at_once(g.W, g.Q, rows.first[block], rows.last[block], gradient, end, row_factors, column_factors, to);
      }
    }
    for (; block < h_end; block += most_rows) {
      const int64_t block_end = std::min(h_end, block + most_rows);
      for (int64_t h = block; h < block_end; ++h) {
        if (h > h_begin && same_windows(h)) continue;
        A* row_sum = row_sums + (h - block) * sums;
        sum_of_rows(g.Q, rows.first[h], rows.last[h], grad_output + nc * g.P * g.Q, end, row_factors, column_factors, row_sum);
        store(row_sum + g.Q, Vec<A>{});
      }
      for (int64_t h = block; h < block_end; ++h) {
        T* to = grad_input + (nc * g.H + h) * g.W;
        if (h > h_begin && same_windows(h)) {
          copy_row(to - g.W, g.W, to);
          continue;
        }
        const A* row_sum = row_sums + (h - block) * sums;
        if constexpr (std::is_same_v<T, A>) {
          if ((h_end - h - 1) * g.W >= beyond) {  // what is written beyond this row belongs to rows that follow
            spread(g, row_sum, to);
            continue;
          }
        }
        spread(g, row_sum, spread_out);
        narrow_row(spread_out, g.W, to);
      }
    }
  });
}

// Lane j is lane index[j] of a, b side by side: where there are instructions for it.
template <class A>
inline constexpr bool kCanPick = TORCHCNN_VECTOR_BYTES == 64 || (TORCHCNN_VECTOR_BYTES == 32 && sizeof(A) == 4);

template <class A>
inline Vec<A> picked([[maybe_unused]] Vec<A> a, [[maybe_unused]] Vec<A> b, [[maybe_unused]] Vec<IndexOf<A>> index) {
#if TORCHCNN_VECTOR_BYTES == 64
  if constexpr (sizeof(A) == 4) return (Vec<A>)_mm512_permutex2var_ps((__m512)a, (__m512i)index, (__m512)b);
  if constexpr (sizeof(A) == 8) return (Vec<A>)_mm512_permutex2var_pd((__m512d)a, (__m512i)index, (__m512d)b);
#elif TORCHCNN_VECTOR_BYTES == 32
  if constexpr (sizeof(A) == 4) {
    const Vec<A> from_a = (Vec<A>)_mm256_permutevar8x32_ps((__m256)a, (__m256i)index);
    const Vec<A> from_b = (Vec<A>)_mm256_permutevar8x32_ps((__m256)b, (__m256i)index);
    return index < static_cast<IndexOf<A>>(kLanes<A>) ? from_a : from_b;
  }
#endif
  return a;
}

// Windows of any size and distance. A row is written once for all rows that lie in the same windows: where the windows of a
// row fit two vectors, each column picks those that it lies in; else it is written as runs of columns that lie in the same ones.
template <class T>
void avg_pool2d_grad_input_runs(const Pool2dGeometry& g, const Divisor& divisor, const T* grad_output, T* grad_input) {
  using A = Arithmetic<T>;
  using I = IndexOf<A>;
  constexpr int64_t L = kLanes<A>;
  const int64_t windows = round_up_to_lanes<A>(g.Q);
  const int64_t pick_pitch = round_up_to_lanes<A>(g.W);
  constexpr int64_t deepest = 4;  // windows that a column lies in
  int64_t* table = workspace<int64_t>(Slot::tables, 3 * g.W + 2 * g.H + windows + g.P);
  const Cover rows = cover_of(g.H, g.P, table, [&](int64_t p) { return row_window(g, p); });
  const Cover columns = cover_of(g.W, g.Q, table + 2 * g.H, [&](int64_t q) { return column_window(g, q); });
  int64_t* run_begin = table + 2 * g.H + 2 * g.W;
  int64_t runs = 0;
  int64_t depth = 0;
  for (int64_t w = 0; w < g.W; w = end_of_run(columns, w, g.W)) {
    run_begin[runs++] = w;
    depth = std::max(depth, columns.last[w] - columns.first[w] + 1);
  }
  const bool picks = kCanPick<A> && g.Q < 2 * L && depth <= deepest;
  I* pick = workspace<I>(Slot::positions, picks ? depth * pick_pitch : 1);
  for (int64_t i = 0; picks && i < depth * pick_pitch; ++i) {
    const int64_t w = std::min(i % pick_pitch, g.W - 1), q = columns.first[w] + i / pick_pitch;
    pick[i] = static_cast<I>(q <= columns.last[w] ? q : 2 * L - 1);  // the last lane is zero
  }
  A* column_factors = reinterpret_cast<A*>(run_begin + g.W);
  A* row_factors = column_factors + windows;
  const Averaging<A> averaging(g, divisor, column_factors);
  for (int64_t p = 0; p < g.P; ++p) row_factors[p] = A(1) / averaging.row_divisor(row_window(g, p));
  for (int64_t q = 0; q < windows; ++q) column_factors[q] = A(1) / column_factors[q];

  const T* end = grad_output + g.N * g.C * g.P * g.Q;
  const int64_t band = std::clamp<int64_t>(16384 / g.W, 1, g.H), bands = ceil_div(g.H, band);
  parallel_for(g.N * g.C * bands, band * ceil_div(g.W, L) * 3, [&](int64_t task) {
    const int64_t nc = task / bands, h_begin = task % bands * band, h_end = std::min(g.H, h_begin + band);
    A* row_sum = workspace<A>(Slot::tile, windows + g.W + L);
    A* line = row_sum + windows;
    for (int64_t h = h_begin, run_end; h < h_end; h = run_end) {
      run_end = std::min(h_end, end_of_run(rows, h, g.H));
      sum_of_rows(g.Q, rows.first[h], rows.last[h], grad_output + nc * g.P * g.Q, end, row_factors, column_factors, row_sum);
      if (!picks) {
        for (int64_t i = 0; i < runs; ++i) {
          const int64_t w_begin = run_begin[i], w_end = i + 1 < runs ? run_begin[i + 1] : g.W;
          A sum = 0;
          for (int64_t q = columns.first[w_begin]; q <= columns.last[w_begin]; ++q) sum += row_sum[q];
          for (int64_t w = w_begin; w < w_end; w += L) store(line + w, broadcast(sum));  // beyond it the next run is written
        }
      }
      const Vec<A> low = load(row_sum), high = g.Q > L ? load(row_sum + L) : Vec<A>{};
      const auto columns_from = [&](int64_t w) {
        if (!picks) return load(line + w);
        Vec<A> sum{};
        for (int64_t i = 0; i < depth; ++i) sum += picked<A>(low, high, load(pick + i * pick_pitch + w));
        return sum;
      };
      T* to = grad_input + (nc * g.H + h) * g.W;
      if (g.W < L) {  // what is written beyond a row belongs to rows that follow
        const Vec<A> v = columns_from(0);
        for (int64_t row = h; row < run_end; ++row, to += g.W) store_narrow_partial(to, v, std::min(L, (h_end - row) * g.W));
        continue;
      }
      const int64_t copies = run_end - h, W = g.W;
      for_each_columns<A>(W, [&]<int vectors>(const int64_t* at) {
        Vec<A> v[vectors];
#pragma GCC unroll 4
        for (int i = 0; i < vectors; ++i) v[i] = columns_from(at[i]);
        T* row = to;
        for (int64_t copy = 0; copy < copies; ++copy, row += W)
#pragma GCC unroll 4
          for (int i = 0; i < vectors; ++i) store_narrow(row + at[i], v[i]);
      });
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
