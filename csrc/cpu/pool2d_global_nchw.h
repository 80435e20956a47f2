// Global pooling, NCHW: one window that covers the plane, which is then a row of H W elements whatever its sides.
//
//   vectors[l] = best or sum, over the blocks of kLanes elements, of plane l          for a group of kLanes planes
//   [l][lane] -> [lane][l]                                                             transposed
//   result[l]  = best or sum, over the lanes, of [lane][l]                             by halves: lane i and lane i + kLanes / 2
//
// A plane of many blocks keeps four of them going, so that one need not wait for the other. The last block ends with the
// plane; what it shares with the one before it counts once. The order of every sum follows from H W alone. The planes of a
// group, if small, go through their blocks side by side, so that no plane waits for itself.
#pragma once

#include <cstring>

#include "conv2d_gemm.h"
#include "pool2d_extremum_nchw.h"

namespace torchcnn::TORCHCNN_ISA {

template <class A>
inline bool suits_whole_planes(const Pool2dGeometry& g) {
  return is_global(g) && g.H * g.W >= kLanes<A>;
}

// Calls visit(first plane, planes) for the groups.
template <class A, class Visit>
void for_each_group_of_planes(const Pool2dGeometry& g, int64_t cost_of_block, Visit visit) {
  constexpr int64_t L = kLanes<A>;
  const int64_t planes = g.N * g.C;
  parallel_for(ceil_div(planes, L), g.H * g.W * cost_of_block,
               [&](int64_t group) { visit(group * L, std::min(L, planes - group * L)); });
}

// The better of two candidates in any order: of equal ones that of the smaller code, of NaN that of the larger.
template <class A>
[[gnu::always_inline]] inline void offer_anywhere(Best<A>& best, Vec<A> candidate, Vec<IndexOf<A>> code) {
  const Vec<IndexOf<A>> better = (candidate > best.value) | ((candidate == best.value) & (code < best.code)) |
                                 ((candidate != candidate) & ((best.value == best.value) | (code > best.code)));
  best.value = better ? candidate : best.value;
  best.code = better ? code : best.code;
}

// The best of each lane of a plane, with its position.
template <class T>
inline Best<Arithmetic<T>> best_of_plane(const T* plane, int64_t count, const T* end, Vec<IndexOf<Arithmetic<T>>> sign) {
  using A = Arithmetic<T>;
  using I = IndexOf<A>;
  constexpr int64_t L = kLanes<A>, chains = 4;
  const Vec<I> lane = steps_of<I>(1);
  const auto at = [&](const T* from) { return (Vec<A>)((Vec<I>)load_wide(from) ^ sign); };
  Best<A> best{at(plane), lane};
  int64_t x = L;
  if (count >= 4 * chains * L) {
    Best<A> chain[chains];
#pragma GCC unroll 4
    for (int v = 0; v < chains; ++v) chain[v] = {at(plane + v * L), lane + static_cast<I>(v * L)};
    Vec<I> code = lane + static_cast<I>(chains * L);
    for (x = chains * L; x + chains * L <= count; x += chains * L) {
#pragma GCC unroll 4
      for (int v = 0; v < chains; ++v, code += static_cast<I>(L)) chain[v].offer(at(plane + x + v * L), code);
    }
    best = chain[0];
#pragma GCC unroll 3
    for (int v = 1; v < chains; ++v) offer_anywhere<A>(best, chain[v].value, chain[v].code);
  }
  for (; x + L <= count; x += L) best.offer(at(plane + x), lane + static_cast<I>(x));
  if (x < count) {
    const Vec<A> last = (Vec<A>)((Vec<I>)load_row_end(plane + x, count - x, end) ^ sign);
    best.offer(lane < static_cast<I>(count - x) ? last : broadcast(kLeast<A>), lane + static_cast<I>(x));
  }
  return best;
}

// A bit for each lane where a and b are equal.
template <class A>
[[gnu::always_inline]] inline uint64_t equal_lanes(Vec<A> a, Vec<A> b) {
#if TORCHCNN_VECTOR_BYTES == 64
  if constexpr (sizeof(A) == 4) return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_EQ_OQ);
  if constexpr (sizeof(A) == 8) return _mm512_cmp_pd_mask((__m512d)a, (__m512d)b, _CMP_EQ_OQ);
#elif TORCHCNN_VECTOR_BYTES == 32
  if constexpr (sizeof(A) == 4) return static_cast<uint32_t>(_mm256_movemask_ps((__m256)(a == b)));
  if constexpr (sizeof(A) == 8) return static_cast<uint32_t>(_mm256_movemask_pd((__m256d)(a == b)));
#endif
  const Vec<IndexOf<A>> equal = a == b;
  uint64_t bits = 0;
  for (int64_t lane = 0; lane < kLanes<A>; ++lane) bits |= static_cast<uint64_t>(equal[lane] & 1) << lane;
  return bits;
}

// The first element of a row that equals `value`, which one does; count >= kLanes.
template <class T>
inline int64_t first_equal(const T* row, int64_t count, Vec<Arithmetic<T>> value) {
  using A = Arithmetic<T>;
  constexpr int64_t L = kLanes<A>, block = 64;
  for (int64_t x = 0;; x += block) {
    uint64_t equal = 0;
#pragma GCC unroll 32
    for (int64_t v = 0; v < block; v += L) equal |= equal_lanes<A>(load_wide(row + std::min(x + v, count - L)), value) << v;
    if (equal == 0) continue;
    const int64_t bit = __builtin_ctzll(equal);
    return std::min(x + bit / L * L, count - L) + bit % L;
  }
}

// Vectors of a plane that are searched side by side, and the blocks that they go through, so that the largest value need not be
// looked for in all of the plane.
inline constexpr int64_t kChains = 4;
template <class A>
inline constexpr int64_t kBlock = 8 * kChains * kLanes<A>;

// The largest value of each lane of kLanes rows without NaN, with the signs turned. `trace` becomes NaN if there is one after
// all.
template <class T>
inline void largest_of_rows(const T* row, int64_t count, Vec<IndexOf<Arithmetic<T>>> sign, Vec<Arithmetic<T>>* largest,
                            Vec<Arithmetic<T>>& trace) {
  using A = Arithmetic<T>;
  constexpr int L = static_cast<int>(kLanes<A>), traces = 4;
  const auto at = [&](int l, int64_t x) { return (Vec<A>)((Vec<IndexOf<A>>)load_wide(row + l * count + x) ^ sign); };
  Vec<A> value[L], sum[traces] = {};
#pragma GCC unroll 16
  for (int l = 0; l < L; ++l) {
    value[l] = at(l, 0);
    sum[l % traces] += value[l];
  }
  for (int64_t next = L; next < count; next += L) {
    const int64_t x = std::min(next, count - L);  // the last vector overlaps the one before it
#pragma GCC unroll 16
    for (int l = 0; l < L; ++l) {
      const Vec<A> candidate = at(l, x);
      value[l] = larger<A>(candidate, value[l]);
      sum[l % traces] += candidate;
    }
  }
  trace = (sum[0] + sum[1]) + (sum[2] + sum[3]);
#pragma GCC unroll 16
  for (int l = 0; l < L; ++l) largest[l] = value[l];
}

// The largest value of each lane of one such row.
template <class T>
inline Vec<Arithmetic<T>> largest_of_row(const T* row, int64_t count, Vec<IndexOf<Arithmetic<T>>> sign,
                                         Vec<Arithmetic<T>>& trace) {
  using A = Arithmetic<T>;
  constexpr int64_t L = kLanes<A>;
  Vec<A> largest = (Vec<A>)((Vec<IndexOf<A>>)load_wide(row) ^ sign);
  trace += largest;
  for (int64_t x = L; x < count; x += L) {
    const Vec<A> candidate = (Vec<A>)((Vec<IndexOf<A>>)load_wide(row + std::min(x, count - L)) ^ sign);
    largest = larger<A>(candidate, largest);
    trace += candidate;
  }
  return largest;
}

// The same of a plane of several blocks, and in which of them it stands first.
template <class T>
inline Best<Arithmetic<T>> largest_of_plane(const T* plane, int64_t count, Vec<IndexOf<Arithmetic<T>>> sign,
                                            Vec<Arithmetic<T>>& trace) {
  using A = Arithmetic<T>;
  using I = IndexOf<A>;
  constexpr int64_t L = kLanes<A>;
  const auto at = [&](int64_t x) { return (Vec<A>)((Vec<I>)load_wide(plane + x) ^ sign); };
  Best<A> best{at(0), Vec<I>{}};
  const auto offer_block = [&](Vec<A> largest, int64_t block) {
    const Vec<I> better = largest > best.value;
    best.value = better ? largest : best.value;
    best.code = better ? broadcast(static_cast<I>(block)) : best.code;
  };
  int64_t x = 0;
  for (; x + kBlock<A> <= count; x += kBlock<A>) {
    Vec<A> chain[kChains], sum[kChains];
#pragma GCC unroll 4
    for (int v = 0; v < kChains; ++v) chain[v] = sum[v] = at(x + v * L);
    for (int64_t next = x + kChains * L; next < x + kBlock<A>; next += kChains * L) {
#pragma GCC unroll 4
      for (int v = 0; v < kChains; ++v) {
        const Vec<A> candidate = at(next + v * L);
        chain[v] = larger<A>(candidate, chain[v]);
        sum[v] += candidate;
      }
    }
    chain[0] = larger<A>(chain[0], chain[1]);
    chain[2] = larger<A>(chain[2], chain[3]);
    offer_block(larger<A>(chain[0], chain[2]), x / kBlock<A>);
    trace += (sum[0] + sum[1]) + (sum[2] + sum[3]);
  }
  if (x == count) return best;
  const int64_t rest = std::min(x, count - L);  // at least a vector
  offer_block(largest_of_row(plane + rest, count - rest, sign, trace), x / kBlock<A>);
  return best;
}

// The first element of a plane that equals `value`, the largest of its lanes.
template <class T>
inline int64_t first_largest(const T* plane, int64_t count, const Best<Arithmetic<T>>& lanes, Arithmetic<T> turned,
                             Arithmetic<T> value) {
  using A = Arithmetic<T>;
  using I = IndexOf<A>;
  int64_t start = 0;
  if (count > kBlock<A>) {
    const Vec<I> block = lanes.value == turned ? lanes.code : broadcast(std::numeric_limits<I>::max());
    I first = block[0];
    for (int64_t lane = 1; lane < kLanes<A>; ++lane) first = std::min(first, block[lane]);
    start = std::min(first * kBlock<A>, count - kLanes<A>);
  }
  return start + first_equal(plane + start, count - start, broadcast(value));
}

// The first elements of kLanes rows that equal `values`, one of each: from the last vector to the first, each lane keeps the last
// that it finds.
template <class T>
inline void first_equals(const T* row, int64_t count, const Arithmetic<T>* values, IndexOf<Arithmetic<T>>* positions) {
  using A = Arithmetic<T>;
  using I = IndexOf<A>;
  constexpr int64_t L = kLanes<A>, together = std::min<int64_t>(L, 4);
  Vec<A> found[L];
  for (int64_t first = 0; first < L; first += together) {
    Vec<A> value[together];
    Vec<I> at[together];
#pragma GCC unroll 4
    for (int l = 0; l < together; ++l) {
      value[l] = broadcast(values[first + l]);
      at[l] = broadcast(std::numeric_limits<I>::max());
    }
    for (int64_t next = round_up_to_lanes<A>(count) - L; next >= 0; next -= L) {
      const int64_t x = std::min(next, count - L);
      const Vec<I> here = steps_of<I>(1) + static_cast<I>(x);
#pragma GCC unroll 4
      for (int l = 0; l < together; ++l) at[l] = load_wide(row + (first + l) * count + x) == value[l] ? here : at[l];
    }
#pragma GCC unroll 4
    for (int l = 0; l < together; ++l) found[first + l] = (Vec<A>)at[l];
  }
  gemm::transpose<A>(found);
  Vec<I> least = (Vec<I>)found[0];
#pragma GCC unroll 16
  for (int64_t lane = 1; lane < L; ++lane) {
    const Vec<I> other = (Vec<I>)found[lane];
    least = other < least ? other : least;
  }
  store(positions, least);
}

// Planes are searched for their largest value first, then for where it stands. That does not find a NaN: a group that has one is
// searched for both at once.
template <class T>
void extremum_pool2d_global(const Pool2dGeometry& g, Extremum extremum, const T* input, T* output, Positions positions) {
  using A = Arithmetic<T>;
  using I = IndexOf<A>;
  constexpr int64_t L = kLanes<A>;
  const int64_t count = g.H * g.W;
  const T* end = input + g.N * g.C * count;
  const Vec<I> sign = broadcast(extremum.minimum ? std::numeric_limits<I>::min() : I(0));  // a minimum turns the sign bits
  for_each_group_of_planes<A>(g, 3, [&](int64_t first, int64_t planes) {
    Vec<A> value[L], trace{};
    Best<A> lanes[L];
    const bool side_by_side = planes == L && count <= kBlock<A>;
    if (side_by_side) {
      largest_of_rows(input + first * count, count, sign, value, trace);
    } else {
      for (int64_t l = 0; l < L; ++l) value[l] = Vec<A>{};
      for (int64_t l = 0; l < planes; ++l) {
        const T* plane = input + (first + l) * count;
        if (count <= kBlock<A>) {
          value[l] = largest_of_row(plane, count, sign, trace);
        } else {
          lanes[l] = largest_of_plane(plane, count, sign, trace);
          value[l] = lanes[l].value;
        }
      }
    }
    Best<A> best;
    if (equal_lanes<A>(trace, trace) == equal_lanes<A>(Vec<A>{}, Vec<A>{})) {
      gemm::transpose<A>(value);
#pragma GCC unroll 4
      for (int64_t half = L / 2; half > 0; half /= 2)
#pragma GCC unroll 8
        for (int64_t i = 0; i < half; ++i) value[i] = larger<A>(value[i], value[i + half]);
      const Vec<A> untreated = (Vec<A>)((Vec<I>)value[0] ^ sign);
      const uint64_t zeros = equal_lanes<A>(untreated, Vec<A>{});
      A found[L];
      I position[L] = {};
      store(found, untreated);
      if (positions.kind != PositionKind::none || zeros != 0) {
        const T* plane = input + first * count;
        if (side_by_side) first_equals(plane, count, found, position);
        for (int64_t l = 0; !side_by_side && l < planes; ++l)
          position[l] = static_cast<I>(first_largest(plane + l * count, count, lanes[l], value[0][l], found[l]));
        for (int64_t l = 0; zeros != 0 && l < planes; ++l)  // of either sign, which are equal
          if (found[l] == 0) found[l] = widen(plane[l * count + position[l]]);
      }
      best = {(Vec<A>)((Vec<I>)load(found) ^ sign), load(position)};
    } else {
      Vec<A> code[L] = {};
      for (int64_t l = 0; l < planes; ++l) {
        const Best<A> of_plane = best_of_plane(input + (first + l) * count, count, end, sign);
        value[l] = of_plane.value;
        code[l] = (Vec<A>)of_plane.code;
      }
      gemm::transpose<A>(value);
      gemm::transpose<A>(code);
#pragma GCC unroll 4
      for (int64_t half = L / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
        for (int64_t i = 0; i < half; ++i) {
          Best<A> pair{value[i], (Vec<I>)code[i]};
          offer_anywhere<A>(pair, value[i + half], (Vec<I>)code[i + half]);
          value[i] = pair.value;
          code[i] = (Vec<A>)pair.code;
        }
      }
      best = {value[0], (Vec<I>)code[0]};
    }
    if (extremum.relu) best.rectify();
    store_narrow_partial(output + first, (Vec<A>)((Vec<I>)best.value ^ sign), planes);
    store_positions<I>(positions, first, best.code, planes);
  });
}

template <class T>
void fill_plane(T* to, int64_t count, T value) {  // count >= kLanes
  using A = Arithmetic<T>;
  const Vec<A> wide = broadcast(widen(value));
  for (int64_t x = 0; x < count; x += kLanes<A>) store_narrow(to + std::min(x, count - kLanes<A>), wide);
}

// Planes are zero but for one element each. Those that fit into L1 together are zeroed together, by memset, which beats stores of
// 32 bytes.
template <class T, class Offset>
void offset_pool2d_grad_input_global(const Pool2dGeometry& g, const T* grad_output, const Offset* offsets, T* grad_input) {
  const int64_t count = g.H * g.W, planes = g.N * g.C;
  const int64_t together = std::max<int64_t>(1, 16 * 1024 / (count * int64_t(sizeof(T))));
  parallel_for(ceil_div(planes, together), together * count / kLanes<Arithmetic<T>>, [&](int64_t task) {
    const int64_t first = task * together, end = std::min(planes, first + together);
    std::memset(static_cast<void*>(grad_input + first * count), 0, static_cast<size_t>((end - first) * count) * sizeof(T));
    for (int64_t nc = first; nc < end; ++nc) {
      const uint64_t offset = static_cast<uint64_t>(offsets[nc]);
      if (offset < static_cast<uint64_t>(count)) grad_input[nc * count + static_cast<int64_t>(offset)] = grad_output[nc];
    }
  });
}

// Rows from this size on are summed in eight vectors side by side, others in one.
template <class A>
inline constexpr int64_t kLongRow = 16 * kLanes<A>;

// The sums of eight vectors side by side over the first `count` elements, a multiple of eight vectors and more than one. Not
// inline: planes of a few vectors are better off without these registers.
template <class T>
[[gnu::noinline]] Vec<Arithmetic<T>> sum_of_long_row(const T* row, int64_t count) {
  using A = Arithmetic<T>;
  constexpr int64_t L = kLanes<A>, chains = 8;
  Vec<A> chain[chains];
#pragma GCC unroll 8
  for (int v = 0; v < chains; ++v) chain[v] = load_wide(row + v * L);
  for (int64_t x = chains * L; x < count; x += chains * L) {
#pragma GCC unroll 8
    for (int v = 0; v < chains; ++v) chain[v] += load_wide(row + x + v * L);
  }
  return ((chain[0] + chain[1]) + (chain[2] + chain[3])) + ((chain[4] + chain[5]) + (chain[6] + chain[7]));
}

// The last vector overlaps the one before it: `fresh` are its lanes that do not.
template <class T>
inline Vec<Arithmetic<T>> sum_of_plane(const T* plane, int64_t count, Vec<IndexOf<Arithmetic<T>>> fresh) {
  using A = Arithmetic<T>;
  using I = IndexOf<A>;
  constexpr int64_t L = kLanes<A>, block = 8 * L;
  int64_t x = count >= kLongRow<A> ? count / block * block : L;
  Vec<A> sum = x > L ? sum_of_long_row(plane, x) : load_wide(plane);
  for (; x + L <= count; x += L) sum += load_wide(plane + x);
  return x < count ? sum + (Vec<A>)((Vec<I>)load_wide(plane + count - L) & fresh) : sum;
}

// The same of kLanes planes of short rows.
template <class T>
inline void sums_of_planes(const T* plane, int64_t count, Vec<IndexOf<Arithmetic<T>>> fresh, Vec<Arithmetic<T>>* sum) {
  using A = Arithmetic<T>;
  constexpr int L = static_cast<int>(kLanes<A>);
  Vec<A> value[L];
#pragma GCC unroll 16
  for (int l = 0; l < L; ++l) value[l] = load_wide(plane + l * count);
  int64_t x = L;
  for (; x + L <= count; x += L)
#pragma GCC unroll 16
    for (int l = 0; l < L; ++l) value[l] += load_wide(plane + l * count + x);
  if (x < count)
#pragma GCC unroll 16
    for (int l = 0; l < L; ++l) value[l] += (Vec<A>)((Vec<IndexOf<A>>)load_wide(plane + l * count + count - L) & fresh);
#pragma GCC unroll 16
  for (int l = 0; l < L; ++l) sum[l] = value[l];
}

template <class T>
void avg_pool2d_global(const Pool2dGeometry& g, const Divisor& divisor, const T* input, T* output) {
  using A = Arithmetic<T>;
  constexpr int64_t L = kLanes<A>;
  const int64_t count = g.H * g.W;
  const Vec<IndexOf<A>> fresh = steps_of<IndexOf<A>>(1) >= static_cast<IndexOf<A>>(L - count % L);
  const A divide_by = static_cast<A>(divisor(row_window(g, 0), column_window(g, 0)));
  for_each_group_of_planes<A>(g, 2, [&](int64_t first, int64_t planes) {
    Vec<A> sum[L] = {};
    if (planes == L && count < kLongRow<A>) {
      sums_of_planes(input + first * count, count, fresh, sum);
    } else {
      for (int64_t l = 0; l < planes; ++l) sum[l] = sum_of_plane(input + (first + l) * count, count, fresh);
    }
    gemm::transpose<A>(sum);
#pragma GCC unroll 4
    for (int64_t half = L / 2; half > 0; half /= 2)
#pragma GCC unroll 8
      for (int64_t i = 0; i < half; ++i) sum[i] += sum[i + half];
    store_narrow_partial(output + first, (sum[0] + A(0)) / divide_by, planes);  // +0 of negative zeros
  });
}

template <class T>
void avg_pool2d_global_grad_input(const Pool2dGeometry& g, const Divisor& divisor, const T* grad_output, T* grad_input) {
  using A = Arithmetic<T>;
  const int64_t count = g.H * g.W;
  const A divide_by = static_cast<A>(divisor(row_window(g, 0), column_window(g, 0)));
  parallel_for(g.N * g.C, count / kLanes<A> + 4,
               [&](int64_t nc) { fill_plane(grad_input + nc * count, count, narrow<T>(widen(grad_output[nc]) / divide_by)); });
}

}  // namespace torchcnn::TORCHCNN_ISA
