// Global pooling, NCHW: one window that covers the plane, which is then a row of H W elements whatever its sides.
//
//   vectors[l] = best or sum, over the blocks of kLanes elements, of plane l          for a group of kLanes planes
//   [l][lane] -> [lane][l]                                                             transposed
//   result[l]  = best or sum, over the lanes, of [lane][l]                             by halves: lane i and lane i + kLanes / 2
//
// A plane of many blocks keeps four of them going, so that one need not wait for the other. The elements after the last whole
// block are a block of their own, filled up with a neutral value. The order of every sum follows from H W alone.
#pragma once

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

template <class T>
void extremum_pool2d_global(const Pool2dGeometry& g, Extremum extremum, const T* input, T* output, Positions positions) {
  using A = Arithmetic<T>;
  using I = IndexOf<A>;
  constexpr int64_t L = kLanes<A>;
  const int64_t count = g.H * g.W;
  const T* end = input + g.N * g.C * count;
  const Vec<I> sign = broadcast(extremum.minimum ? std::numeric_limits<I>::min() : I(0));  // a minimum turns the sign bits
  for_each_group_of_planes<A>(g, 6, [&](int64_t first, int64_t planes) {
    Vec<A> value[L] = {};
    Vec<A> code[L] = {};
    for (int64_t l = 0; l < planes; ++l) {
      const Best<A> best = best_of_plane(input + (first + l) * count, count, end, sign);
      value[l] = best.value;
      code[l] = (Vec<A>)best.code;
    }
    gemm::transpose<A>(value);
    gemm::transpose<A>(code);
#pragma GCC unroll 4
    for (int64_t half = L / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
      for (int64_t i = 0; i < half; ++i) {
        Best<A> best{value[i], (Vec<I>)code[i]};
        offer_anywhere<A>(best, value[i + half], (Vec<I>)code[i + half]);
        value[i] = best.value;
        code[i] = (Vec<A>)best.code;
      }
    }
    Best<A> best{value[0], (Vec<I>)code[0]};
    if (extremum.relu) best.rectify();
    store_narrow_partial(output + first, (Vec<A>)((Vec<I>)best.value ^ sign), planes);
    switch (positions.kind) {
      case PositionKind::none: break;
      case PositionKind::indices: store_integers<I>(static_cast<int64_t*>(positions.to) + first, best.code, planes); break;
      case PositionKind::byte_offsets: store_integers<I>(static_cast<uint8_t*>(positions.to) + first, best.code, planes); break;
      case PositionKind::int_offsets: store_integers<I>(static_cast<int32_t*>(positions.to) + first, best.code, planes); break;
    }
  });
}

template <class T>
void fill_plane(T* to, int64_t count, T value) {  // count >= kLanes
  using A = Arithmetic<T>;
  const Vec<A> wide = broadcast(widen(value));
  for (int64_t x = 0; x < count; x += kLanes<A>) store_narrow(to + std::min(x, count - kLanes<A>), wide);
}

// The plane is zero but for the one element.
template <class T, class Offset>
void offset_pool2d_grad_input_global(const Pool2dGeometry& g, const T* grad_output, const Offset* offsets, T* grad_input) {
  const int64_t count = g.H * g.W;
  parallel_for(g.N * g.C, count / kLanes<Arithmetic<T>> + 4, [&](int64_t nc) {
    T* plane = grad_input + nc * count;
    fill_plane(plane, count, T{});
    const uint64_t offset = static_cast<uint64_t>(offsets[nc]);
    if (offset < static_cast<uint64_t>(count)) plane[offset] = grad_output[nc];
  });
}

template <class T>
inline Vec<Arithmetic<T>> sum_of_plane(const T* plane, int64_t count, const T* end) {
  using A = Arithmetic<T>;
  using I = IndexOf<A>;
  constexpr int64_t L = kLanes<A>, chains = 4;
  Vec<A> sum = load_wide(plane);
  int64_t x = L;
  if (count >= 2 * chains * L) {
    Vec<A> chain[chains];
#pragma GCC unroll 4
    for (int v = 0; v < chains; ++v) chain[v] = load_wide(plane + v * L);
    for (x = chains * L; x + chains * L <= count; x += chains * L) {
#pragma GCC unroll 4
      for (int v = 0; v < chains; ++v) chain[v] += load_wide(plane + x + v * L);
    }
    sum = (chain[0] + chain[1]) + (chain[2] + chain[3]);
  }
  for (; x + L <= count; x += L) sum += load_wide(plane + x);
  if (x < count) {
    const Vec<A> last = load_row_end(plane + x, count - x, end);
    sum += (Vec<A>)((Vec<I>)last & (steps_of<I>(1) < static_cast<I>(count - x)));
  }
  return sum;
}

template <class T>
void avg_pool2d_global(const Pool2dGeometry& g, const Divisor& divisor, const T* input, T* output) {
  using A = Arithmetic<T>;
  constexpr int64_t L = kLanes<A>;
  const int64_t count = g.H * g.W;
  const T* end = input + g.N * g.C * count;
  const A divide_by = static_cast<A>(divisor(row_window(g, 0), column_window(g, 0)));
  for_each_group_of_planes<A>(g, 2, [&](int64_t first, int64_t planes) {
    Vec<A> sum[L] = {};
    for (int64_t l = 0; l < planes; ++l) sum[l] = sum_of_plane(input + (first + l) * count, count, end);
    gemm::transpose<A>(sum);
#pragma GCC unroll 4
    for (int64_t half = L / 2; half > 0; half /= 2)
#pragma GCC unroll 8
      for (int64_t i = 0; i < half; ++i) sum[i] += sum[i + half];
    store_narrow_partial(output + first, sum[0] / divide_by, planes);
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
