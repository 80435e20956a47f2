// Max and min pooling, with and without positions.
//
//   output[n,c,p,q] = the best of input[n,c,h,w] over the window of (p, q); a NaN is better than every number, a later NaN than
//                     an earlier one, the first of equal numbers stays. With relu: max(0, that).
//
// Windows of 2 x 2 and 3 x 3 have a kernel whose loads all start at once, and other windows one for teams (pool2d.cuh). The
// values of a window have a total order, value first, then place in the window, so teams may compare them in any order. What is
// carried along is the number of a tap, r S + s.
#include <limits>

#include "pool2d.cuh"

namespace torchcnn::cuda {

template <class T, int V, class I>
struct Best {
  using A = decltype(to_arithmetic(T()));
  A value[V];
  I tap[V];
};

// What no value is worse than.
template <class A>
__device__ A worst_of(Extremum extremum) {
  using Limits = std::numeric_limits<A>;
  if constexpr (Limits::has_infinity) {
    return extremum.minimum ? Limits::infinity() : -Limits::infinity();
  } else {
    return extremum.minimum ? Limits::max() : Limits::lowest();
  }
}

template <class A>
__device__ bool passes(Extremum extremum, A a, A b) {
  return extremum.minimum ? a < b : a > b;
}

// Compares with a later tap.
template <class T, int V, class I>
__device__ void consider(Extremum extremum, Best<T, V, I>& best, const Elements<T, V>& candidates, I tap) {
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const auto candidate = to_arithmetic(candidates.of[v]);
    if (candidate != candidate || passes(extremum, candidate, best.value[v])) {
      best.value[v] = candidate;
      best.tap[v] = tap;
    }
  }
}

// The best before the first tap: whatever is no better leaves the position at it.
template <class T, int V, class I>
__device__ Best<T, V, I> worst_at(Extremum extremum, I tap) {
  Best<T, V, I> best;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    best.value[v] = worst_of<typename Best<T, V, I>::A>(extremum);
    best.tap[v] = tap;
  }
  return best;
}

template <class T, int V, class I>
__device__ void write(const Pool<I>& pool, Extremum extremum, const PoolWindow<I>& row, const PoolWindow<I>& column, I S, I to,
                      const Best<T, V, I>& best, T* output, const Positions& positions) {
  using A = typename Best<T, V, I>::A;
  Elements<T, V> values;
  Elements<int32_t, V> offsets;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const bool nothing = extremum.relu && best.value[v] <= A(0);
    values.of[v] = from_arithmetic<T>(nothing ? A(0) : best.value[v]);
    offsets.of[v] = nothing ? -1 : static_cast<int32_t>(best.tap[v]);
  }
  store<V>(output + to, values);
  if (positions.kind == PositionKind::byte_offsets) {
    Elements<uint8_t, V> bytes;
#pragma unroll
    for (int v = 0; v < V; ++v) bytes.of[v] = static_cast<uint8_t>(offsets.of[v]);
    store<V>(static_cast<uint8_t*>(positions.to) + to, bytes);
  } else if (positions.kind == PositionKind::int_offsets) {
    store<V>(static_cast<int32_t*>(positions.to) + to, offsets);
  } else if (positions.kind == PositionKind::indices) {
    Elements<int64_t, V> indices;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const I r = best.tap[v] / S, s = best.tap[v] - r * S;
      indices.of[v] = (row.first + r * pool.rows.dilation) * pool.columns.size + column.first + s * pool.columns.dilation;
    }
    store<V>(static_cast<int64_t*>(positions.to) + to, indices);
  }
}

template <class T, int V, int R, int S>
__global__ void __launch_bounds__(kPoolThreads, kPoolBlocks<V>)
    extremum_pool2d_forward_direct(const Pool<int32_t> pool, const Extremum extremum, int items, const T* __restrict__ input,
                                   T* __restrict__ output, const Positions positions) {
  const int item = blockIdx.x * kPoolThreads + threadIdx.x;
  if (item >= items) return;
  const Place<int32_t> place = pool.output_place(item * V);
  const PoolWindow<int32_t> row = pool.rows.window(place.row), column = pool.columns.window(place.column);
  const T* const plane = input + pool.input_plane(place);
  const T otherwise = from_arithmetic<T>(worst_of<typename Best<T, V, int32_t>::A>(extremum));
  Elements<T, V> taps[R * S];
#pragma unroll
  for (int tap = 0; tap < R * S; ++tap) {
    const int h = row.first + tap / S * pool.rows.dilation, w = column.first + tap % S * pool.columns.dilation;
    const bool inside = h >= row.begin && h < row.end && w >= column.begin && w < column.end;
    taps[tap] = inside ? load<V>(plane + (h * pool.columns.size + w) * pool.inner) : all_of<V>(otherwise);
  }
  Best<T, V, int32_t> best = worst_at<T, V>(extremum, row.skipped * S + column.skipped);
#pragma unroll
  for (int tap = 0; tap < R * S; ++tap) consider(extremum, best, taps[tap], tap);
  write(pool, extremum, row, column, S, item * V, best, output, positions);
}

template <class T, int V, class I>
__global__ void __launch_bounds__(kMostPoolThreads)
    extremum_pool2d_forward_by_teams(const Pool<I> pool, const Extremum extremum, const Team team, I items,
                                     const T* __restrict__ input, T* __restrict__ output, const Positions positions) {
  using A = typename Best<T, V, I>::A;
  const Member<I> member(team);
  const bool exists = member.item < items;
  const Place<I> place = pool.output_place(exists ? member.item * V : 0);
  const PoolWindow<I> row = pool.rows.window(place.row), column = pool.columns.window(place.column);
  const I S = pool.columns.adaptive ? column.end - column.begin : pool.columns.kernel;
  Best<T, V, I> best = worst_at<T, V>(extremum, row.skipped * S + column.skipped);
  if (exists) {
    for_taps<V>(pool, row, column, S, team, member.number, input + pool.input_plane(place),
                from_arithmetic<T>(worst_of<A>(extremum)), [&](const Elements<T, V>(&elements)[kTaps], const I(&taps)[kTaps]) {
#pragma unroll
      for (int u = 0; u < kTaps; ++u) consider(extremum, best, elements[u], taps[u]);
    });
  }
  take_together(team, best, [](const Best<T, V, I>& mine, unsigned by) {
    Best<T, V, I> others;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      others.value[v] = __shfl_down_sync(0xffffffff, mine.value[v], by);
      others.tap[v] = __shfl_down_sync(0xffffffff, mine.tap[v], by);
    }
    return others;
  }, [&](Best<T, V, I>& mine, const Best<T, V, I>& others) {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const A a = others.value[v], b = mine.value[v];
      const bool a_is_nan = a != a, b_is_nan = b != b;
      const bool later = others.tap[v] > mine.tap[v], earlier = others.tap[v] < mine.tap[v];
      if (a_is_nan ? !b_is_nan || later : !b_is_nan && (passes(extremum, a, b) || (a == b && earlier))) {
        mine.value[v] = a;
        mine.tap[v] = others.tap[v];
      }
    }
  });
  if (exists && member.number == 0) write(pool, extremum, row, column, S, member.item * V, best, output, positions);
}

template <int V, class T>
void extremum_pool2d_forward_of(const Pool2dGeometry& g, Extremum extremum, const T* input, T* output, Positions positions,
                                Stream stream) {
  using D = Device<T>;
  const int64_t items = g.N * g.C * g.P * g.Q / V;
  const char* name = extremum.minimum ? "min_pool2d" : extremum.relu ? "relu_max_pool2d" : "max_pool2d";
  if constexpr (!std::is_integral_v<T>) {
    const auto direct = [&](auto kernel) {
      launch(name, kernel, pool_blocks(items), kPoolThreads, 0, stream, Pool<int32_t>(g), extremum, items, on_device(input),
             on_device(output), positions);
    };
    if (fits_32_bits(g) && g.R == 2 && g.S == 2) return direct(extremum_pool2d_forward_direct<D, V, 2, 2>);
    if (fits_32_bits(g) && g.R == 3 && g.S == 3) return direct(extremum_pool2d_forward_direct<D, V, 3, 3>);
  }
  const Team team = team_for(g, V);
  with_index_type<V>(g, [&]<class I>(I) {
    launch(name, extremum_pool2d_forward_by_teams<D, V, I>, pool_blocks(items, team.items_of_block()), team.threads(),
           shared_bytes<Best<D, V, I>>(team), stream, Pool<I>(g), extremum, team, items, on_device(input), on_device(output),
           positions);
  });
}

template <class T>
void extremum_pool2d_forward(const Pool2dGeometry& g, Extremum extremum, const T* input, T* output, Positions positions,
                             Stream stream) {
  if (g.N * g.P * g.Q == 0) return;
  if constexpr (!std::is_integral_v<T>) {
    if (in_vectors<T>(g, input, output, positions.to))
      return extremum_pool2d_forward_of<kVector<T>>(g, extremum, input, output, positions, stream);
  }
  extremum_pool2d_forward_of<1>(g, extremum, input, output, positions, stream);
}

#define TORCHCNN_INSTANTIATE(T) \
  template void extremum_pool2d_forward<T>(const Pool2dGeometry&, Extremum, const T*, T*, Positions, Stream)
TORCHCNN_INSTANTIATE(float);
TORCHCNN_INSTANTIATE(double);
TORCHCNN_INSTANTIATE(Float16);
TORCHCNN_INSTANTIATE(BFloat16);
TORCHCNN_INSTANTIATE(uint8_t);
TORCHCNN_INSTANTIATE(int8_t);
TORCHCNN_INSTANTIATE(int16_t);
TORCHCNN_INSTANTIATE(int32_t);
TORCHCNN_INSTANTIATE(int64_t);
#undef TORCHCNN_INSTANTIATE

}  // namespace torchcnn::cuda
