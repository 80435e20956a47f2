// Max and min pooling, NCHW, forward, vectors over the windows of a row.
//
// Each lane keeps the best value of its window and the code of the tap where it stands; what a code is depends on what is asked
// for: r S + s, or the distance r dilation_h W + s dilation_w from tap (0, 0) in the plane. A minimum is the maximum of the
// negated values. Ties, NaN and windows are those of pool2d_reference.h: taps are offered in row-major order, a later one wins if
// it is greater or NaN.
#pragma once

#include <limits>

#include "pool2d_rows.h"

namespace torchcnn::TORCHCNN_ISA {

template <class A>
inline constexpr A kLeast = -std::numeric_limits<A>::infinity();

// The largest value so far and its code, lane by lane.
template <class A>
struct Best {
  Vec<A> value;
  Vec<IndexOf<A>> code;

  void offer(Vec<A> candidate, Vec<IndexOf<A>> candidate_code) {
    const Vec<IndexOf<A>> better = (candidate > value) | (candidate != candidate);
    value = better ? candidate : value;
    code = better ? candidate_code : code;
  }

  // The same where neither is NaN.
  void offer_number(Vec<A> candidate, Vec<IndexOf<A>> candidate_code) {
    code = candidate > value ? candidate_code : code;
    value = larger<A>(candidate, value);
  }

  // max(0, value), with a code that no tap has where that is not the value of a tap.
  void rectify() {
    const Vec<IndexOf<A>> nothing = value <= Vec<A>{};
    value = nothing ? Vec<A>{} : value;
    code = nothing ? Vec<IndexOf<A>>{} - 1 : code;
  }
};

// Stores codes as positions at, at + 1, ... of a tensor, the first `count` of them if count < kLanes.
template <PositionKind kind, class I>
[[gnu::always_inline]] inline void store_positions(void* positions, int64_t at, Vec<I> codes, int64_t count) {
  if constexpr (kind == PositionKind::indices) store_integers<I>(static_cast<int64_t*>(positions) + at, codes, count);
  if constexpr (kind == PositionKind::byte_offsets) store_integers<I>(static_cast<uint8_t*>(positions) + at, codes, count);
  if constexpr (kind == PositionKind::int_offsets) store_integers<I>(static_cast<int32_t*>(positions) + at, codes, count);
}

template <class I>
[[gnu::always_inline]] inline void store_positions(Positions positions, int64_t at, Vec<I> codes, int64_t count) {
  switch (positions.kind) {
    case PositionKind::none: return;
    case PositionKind::indices: return store_positions<PositionKind::indices, I>(positions.to, at, codes, count);
    case PositionKind::byte_offsets: return store_positions<PositionKind::byte_offsets, I>(positions.to, at, codes, count);
    case PositionKind::int_offsets: return store_positions<PositionKind::int_offsets, I>(positions.to, at, codes, count);
  }
}

// A lane counts positions of a plane in 32 bits beside a float, 64 beside a double.
template <class A>
inline bool index_fits_lane(const Pool2dGeometry& g) {
  const int64_t margin = g.dilation_h * g.R + g.stride_h + 2;  // codes of taps in the padding are formed, though never chosen
  return g.H + 2 * margin <= std::numeric_limits<IndexOf<A>>::max() / (g.W + g.dilation_w * g.S + g.stride_w);
}

template <class A>
struct ExtremumPlan {
  Pool2dGeometry g;
  int64_t rows_of_plane;  // g.P, or less where several planes are taken for one: for extremum_rows_2x2 alone
  Extremum extremum;
  bool padded;                     // some window reaches beyond the plane
  IndexOf<A> row_code;             // what a step down adds to a code
  const IndexOf<A>* codes;         // of tap r S + s
  const IndexOf<A>* first_column;  // code of the first column of window q that lies inside
};

// Of windows p_begin ... p_end - 1 of plane nc. values: of window (p_begin, 0).
template <class A, int R_, int S_, int stride_, PositionKind kind>
void extremum_rows(const ExtremumPlan<A>& plan, Rows<A> rows, int64_t nc, int64_t p_begin, int64_t p_end, A* values,
                   void* positions) {
  using I = IndexOf<A>;
  constexpr int64_t L = kLanes<A>;
  const Pool2dGeometry& g = plan.g;
  const int64_t R = R_ ? R_ : g.R, S = S_ ? S_ : g.S, step = stride_ ? stride_ : g.stride_w, Q = g.Q;
  const int64_t row_step = g.dilation_h * rows.pitch, column_step = S_ ? 1 : g.dilation_w;
  const Vec<I> lane_steps = steps_of<I>(step);
  for (int64_t p = p_begin; p < p_end; ++p, values += Q) {
    const A* row = rows.data + (p - p_begin) * g.stride_h * rows.pitch;
    const int64_t to = (nc * g.P + p) * Q, origin = (p * g.stride_h - g.pad_h) * g.W - g.pad_w;
    const int64_t top = p * g.stride_h - g.pad_h;
    const RowsInside inside = rows_inside(g, rows, p);
    const bool cut = inside.end - inside.begin < R;
    const I first_row = top < 0 ? static_cast<I>(ceil_div(-top, g.dilation_h)) * plan.row_code : 0;
    // Rows are searched on their own, so that one search need not wait for the other; then the best of each is offered.
    const auto best_at = [&]<bool edge>(int64_t q) __attribute__((always_inline)) {
      const InsideColumns<A, edge> in{g, q * step - g.pad_w, kLeast<A>};
      const int64_t r_begin = edge ? inside.begin : 0, r_end = edge ? inside.end : R;
      const A* at = row + q * step + r_begin * row_step;
      Best<A> best{};
      for (int64_t r = r_begin; r < r_end; ++r, at += row_step) {
        const I* codes = plan.codes + r * S;
        Best<A> of_row;
        if constexpr (stride_ == 2 && S_ >= 2) {
          const Vec<A> a = in(load(at), 0), b = in(load(at + L), L);
          of_row = {evens_blocked<A>(a, b), broadcast(codes[0])};
          of_row.offer(odds_blocked<A>(a, b), broadcast(codes[1]));
          if constexpr (S_ == 3)
            of_row.offer(every_second_blocked<0, 1, A>(in(load(at + 2), 2), in(load(at + L + 1), L + 1), kEachLane<A>),
                         broadcast(codes[2]));
        } else {
          of_row = {in(load_tap<stride_>(at, step), 0), broadcast(codes[0])};
          for (int64_t s = 1; s < S; ++s) of_row.offer(in(load_tap<stride_>(at + s * column_step, step), s), broadcast(codes[s]));
        }
        if (r == r_begin) {
          best = of_row;
        } else {
          best.offer(of_row.value, of_row.code);
        }
      }
      return best;
    };
    for (int64_t q = 0; q < Q; q += L) {
      if (q + L > Q && Q >= L) q = Q - L;  // overlap the last vector instead of a scalar tail
      if constexpr (stride_ == 2 && S_ >= 2)
        if (Q >= L) prefetch_pair<0, A>(row + 4 * q);
      Best<A> best;
      if (kCanBeOpen<S_, stride_> && rows.open && (cut || reaches_beyond<A>(g, q))) {
        best = best_at.template operator()<true>(q);
      } else {
        best = best_at.template operator()<false>(q);
      }
      best = {ordered<stride_, A>(best.value), ordered<stride_, I>(best.code)};
      // A window of nothing but -inf points to its first value, not to the padding.
      if (kind != PositionKind::none && plan.padded)
        best.code = best.value == kLeast<A> ? load(plan.first_column + q) + first_row : best.code;
      if (plan.extremum.relu) best.rectify();
      if (plan.extremum.minimum) best.value = -best.value;
      const int64_t count = std::min(L, (p_end - p) * Q - q);  // beyond a short row lie rows that are written later
      store_partial(values + q, best.value, count);
      if constexpr (kind == PositionKind::indices) best.code += lane_steps + broadcast(static_cast<I>(origin + q * step));
      store_positions<kind, I>(positions, to + q, best.code, count);
    }
  }
}

// 2x2 windows that need no padding. What is stored beyond a row shorter than a vector is written later.
template <class A, PositionKind kind>
void extremum_rows_2x2(const ExtremumPlan<A>& plan, Rows<A> rows, int64_t nc, int64_t p_begin, int64_t p_end, A* values,
                       void* positions) {
  using I = IndexOf<A>;
  constexpr int64_t L = kLanes<A>;
  constexpr auto each = kEachLane<A>;
  const Pool2dGeometry& g = plan.g;
  const int64_t Q = g.Q, pitch = rows.pitch, step = g.stride_h * pitch;
  const bool relu = plan.extremum.relu, minimum = plan.extremum.minimum;
  Vec<I> codes[4];
  for (int tap = 0; tap < 4; ++tap) codes[tap] = broadcast(plan.codes[tap]);
  const auto best_of = [=](Vec<A> a, Vec<A> b, Vec<A> c, Vec<A> d) __attribute__((always_inline)) {
    Best<A> best{a, codes[0]}, lower{c, codes[2]};
    best.offer(b, codes[1]);
    lower.offer(d, codes[3]);
    best.offer(lower.value, lower.code);
    if (relu) best.rectify();
    if (minimum) best.value = -best.value;
    return best;
  };
  // Where tap (0, 0) of the first window of a row stands in its plane.
  const I row_distance = static_cast<I>(g.stride_h * g.W);
  int64_t p = p_begin % plan.rows_of_plane;
  I origin = static_cast<I>(p) * row_distance;
  const auto next_origin = [&] {
    const I now = origin;
    origin += row_distance;
    if (++p == plan.rows_of_plane) p = 0, origin = 0;
    return now;
  };
  const Vec<I> lane = steps_of<I>(2);
  const A* row = rows.data;
  int64_t left = (p_end - p_begin) * Q, to = (nc * g.P + p_begin) * Q;
  if (2 * Q <= L) {  // two rows a vector
    const Vec<I> upper = lane >= static_cast<I>(L);
    for (; left >= L + Q; left -= 2 * Q, row += 2 * step, values += 2 * Q, to += 2 * Q) {
      const Vec<A> a = load(row), b = load(row + step), c = load(row + pitch), d = load(row + step + pitch);
      Best<A> best = best_of(every_second<A>(a, b, 0, each), every_second<A>(a, b, 1, each), every_second<A>(c, d, 0, each),
                             every_second<A>(c, d, 1, each));
      if constexpr (kind == PositionKind::indices) {
        const I first = next_origin(), second = next_origin() - static_cast<I>(L);
        best.code += lane + (upper ? broadcast(second) : broadcast(first));
      }
      store(values, best.value);
      store(values + Q, upper_half_first(best.value));
      store_positions<kind, I>(positions, to, best.code, L);
      store_positions<kind, I>(positions, to + Q, upper_half_first(best.code), L);
    }
  }
  const auto write = [=](const A* at, I first, A* value, int64_t position, int64_t count) __attribute__((always_inline)) {
    const Vec<A> a = load(at), b = load(at + L), c = load(at + pitch), d = load(at + pitch + L);
    Best<A> best = best_of(evens_blocked<A>(a, b), odds_blocked<A>(a, b), evens_blocked<A>(c, d), odds_blocked<A>(c, d));
    best = {ordered<2, A>(best.value), ordered<2, I>(best.code)};
    if constexpr (kind == PositionKind::indices) best.code += lane + first;
    store_partial(value, best.value, count);
    store_positions<kind, I>(positions, position, best.code, count);
  };
  if (Q < L) {
    for (; left > 0; left -= Q, row += step, values += Q, to += Q) write(row, next_origin(), values, to, std::min(L, left));
  } else {
    for (; left > 0; left -= Q, row += step, values += Q, to += Q) {
      const I first = next_origin();
      for_each_vector_of_row<L>(Q, [&](int64_t q) __attribute__((always_inline)) {
        prefetch_pair<0, A>(row + 4 * q);
        write(row + 2 * q, first + static_cast<I>(2 * q), values + q, to + q, L);
      });
    }
  }
}

template <class A>
using ExtremumRows = void (*)(const ExtremumPlan<A>&, Rows<A>, int64_t, int64_t, int64_t, A*, void*);

template <class A, PositionKind kind>
ExtremumRows<A> extremum_rows_for(const Pool2dGeometry& g) {
  if constexpr (kind != PositionKind::int_offsets) {
    const bool dense = g.dilation_h == 1 && g.dilation_w == 1;
    if (is_plain_2x2(g)) return extremum_rows_2x2<A, kind>;
    if (dense && g.R == 2 && g.S == 2 && g.stride_w == 2) return extremum_rows<A, 2, 2, 2, kind>;
    if (dense && g.R == 3 && g.S == 3 && g.stride_w == 2) return extremum_rows<A, 3, 3, 2, kind>;
    if (dense && g.R == 3 && g.S == 3 && g.stride_w == 1) return extremum_rows<A, 3, 3, 1, kind>;
  }
  if (g.stride_w == 1) return extremum_rows<A, 0, 0, 1, kind>;
  if (g.stride_w == 2) return extremum_rows<A, 0, 0, 2, kind>;
  return extremum_rows<A, 0, 0, 0, kind>;
}

template <class A>
ExtremumRows<A> extremum_rows_for(const Pool2dGeometry& g, PositionKind kind) {
  switch (kind) {
    case PositionKind::indices: return extremum_rows_for<A, PositionKind::indices>(g);
    case PositionKind::byte_offsets: return extremum_rows_for<A, PositionKind::byte_offsets>(g);
    case PositionKind::int_offsets: return extremum_rows_for<A, PositionKind::int_offsets>(g);
    default: return extremum_rows_for<A, PositionKind::none>(g);
  }
}

template <class T>
void extremum_pool2d_sliding(const Pool2dGeometry& g, int64_t rows_of_plane, Extremum extremum, const T* input, T* output,
                             Positions positions) {
  using A = Arithmetic<T>;
  using I = IndexOf<A>;
  const bool of_plane = positions.kind == PositionKind::indices;
  const int64_t row_code = of_plane ? g.dilation_h * g.W : g.S, column_code = of_plane ? g.dilation_w : 1;
  const int64_t windows = round_up_to_lanes<A>(g.Q);
  I* first_column = workspace<I>(Slot::tables, windows + g.R * g.S);
  I* codes = first_column + windows;
  for (int64_t q = 0; q < windows; ++q) {
    const int64_t left = q * g.stride_w - g.pad_w;
    first_column[q] = left < 0 ? static_cast<I>(ceil_div(-left, g.dilation_w) * column_code) : 0;
  }
  for (int64_t r = 0; r < g.R; ++r)
    for (int64_t s = 0; s < g.S; ++s) codes[r * g.S + s] = static_cast<I>(r * row_code + s * column_code);
  const ExtremumPlan<A> plan{g, rows_of_plane, extremum, !windows_lie_inside(g), static_cast<I>(row_code), codes, first_column};
  const ExtremumRows<A> rows_kernel = extremum_rows_for<A>(g, positions.kind);
  const bool may_be_open = reads_open<T>(g) && !extremum.minimum && positions.kind != PositionKind::int_offsets;
  for_each_band(g, input, kLeast<A>, extremum.minimum, may_be_open, 5,
                [&](int64_t nc, int64_t p_begin, int64_t p_end, Rows<A> rows) {
    T* to = output + (nc * g.P + p_begin) * g.Q;
    if constexpr (std::is_same_v<T, A>) {
      rows_kernel(plan, rows, nc, p_begin, p_end, to, positions.to);
    } else {
      const int64_t count = (p_end - p_begin) * g.Q;
      A* values = workspace<A>(Slot::tile, count);
      rows_kernel(plan, rows, nc, p_begin, p_end, values, positions.to);
      narrow_row(values, count, to);
    }
  });
}

}  // namespace torchcnn::TORCHCNN_ISA
