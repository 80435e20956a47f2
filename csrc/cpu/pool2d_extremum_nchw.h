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

  // max(0, value), with a code that no tap has where that is not the value of a tap.
  void rectify() {
    const Vec<IndexOf<A>> nothing = value <= Vec<A>{};
    value = nothing ? Vec<A>{} : value;
    code = nothing ? Vec<IndexOf<A>>{} - 1 : code;
  }
};

// A lane counts positions of a plane in 32 bits beside a float, 64 beside a double.
template <class A>
inline bool index_fits_lane(const Pool2dGeometry& g) {
  const int64_t margin = g.dilation_h * g.R + g.stride_h + 2;  // codes of taps in the padding are formed, though never chosen
  return g.H + 2 * margin <= std::numeric_limits<IndexOf<A>>::max() / (g.W + g.dilation_w * g.S + g.stride_w);
}

template <class A>
struct ExtremumPlan {
  Pool2dGeometry g;
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
      if constexpr (kind == PositionKind::indices)
        store_integers<I>(static_cast<int64_t*>(positions) + to + q,
                          best.code + (lane_steps + broadcast(static_cast<I>(origin + q * step))), count);
      if constexpr (kind == PositionKind::byte_offsets)
        store_integers<I>(static_cast<uint8_t*>(positions) + to + q, best.code, count);
      if constexpr (kind == PositionKind::int_offsets)
        store_integers<I>(static_cast<int32_t*>(positions) + to + q, best.code, count);
    }
  }
}

// Two rows of 2x2 windows a vector, one in each half, from rows of the plane that are no longer than a vector and need no
// padding.
template <class A, PositionKind kind>
void extremum_row_pairs(const ExtremumPlan<A>& plan, Rows<A> rows, int64_t nc, int64_t p_begin, int64_t p_end, A* values,
                        void* positions) {
  using I = IndexOf<A>;
  constexpr int64_t L = kLanes<A>, half = L / 2;
  constexpr auto each = kEachLane<A>;
  const Pool2dGeometry& g = plan.g;
  const int64_t Q = g.Q, pitch = rows.pitch;
  Vec<I> steps = steps_of<I>(2);  // from the first window of the two rows, in the plane
  steps = steps >= static_cast<I>(L) ? steps + static_cast<I>(g.stride_h * g.W - L) : steps;
  for (int64_t p = p_begin; p < p_end; p += 2, values += 2 * Q) {
    const A* row = rows.data + (p - p_begin) * g.stride_h * pitch;
    const int64_t next = p + 1 < p_end ? g.stride_h * pitch : 0;
    prefetch_row<A>(row, 2 * g.stride_h * pitch);
    Best<A> best{};
#pragma GCC unroll 2
    for (int r = 0; r < 2; ++r) {
      const Vec<A> a = load(row + r * pitch), b = load(row + next + r * pitch);
      const I* codes = plan.codes + r * 2;
      Best<A> of_row{every_second<A>(a, b, 0, each), broadcast(codes[0])};
      of_row.offer(every_second<A>(a, b, 1, each), broadcast(codes[1]));
      if (r == 0) {
        best = of_row;
      } else {
        best.offer(of_row.value, of_row.code);
      }
    }
    if (plan.extremum.relu) best.rectify();
    if (plan.extremum.minimum) best.value = -best.value;
    if (kind == PositionKind::indices) best.code += steps + static_cast<I>(p * g.stride_h * g.W);
    const auto write = [&](A* value, int64_t to, const Best<A>& row_best, int64_t count) {
      store_partial(value, row_best.value, count);
      if constexpr (kind == PositionKind::indices) store_integers<I>(static_cast<int64_t*>(positions) + to, row_best.code, count);
      if constexpr (kind == PositionKind::byte_offsets)
        store_integers<I>(static_cast<uint8_t*>(positions) + to, row_best.code, count);
    };
    const int64_t to = (nc * g.P + p) * Q, left = (p_end - p) * Q;  // what lies beyond a row is written now, or in the next rows
    write(values, to, best, std::min(L, left));
    if (next > 0)
      write(values + Q, to + Q, {lanes_from<half, A>(best.value, each), lanes_from<half, I>(best.code, each)},
            std::min(L, left - Q));
  }
}

template <class A>
using ExtremumRows = void (*)(const ExtremumPlan<A>&, Rows<A>, int64_t, int64_t, int64_t, A*, void*);

template <class A, PositionKind kind>
ExtremumRows<A> extremum_rows_for(const Pool2dGeometry& g) {
  if constexpr (kind != PositionKind::int_offsets) {
    const bool dense = g.dilation_h == 1 && g.dilation_w == 1;
    if (dense && g.R == 2 && suits_row_pairs<A>(g) && windows_lie_inside(g)) return extremum_row_pairs<A, kind>;
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
void extremum_pool2d_sliding(const Pool2dGeometry& g, Extremum extremum, const T* input, T* output, Positions positions) {
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
  const ExtremumPlan<A> plan{g, extremum, !windows_lie_inside(g), static_cast<I>(row_code), codes, first_column};
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
