// Max and min pooling, with and without positions.
//
//   output[n,c,p,q] = the best of input[n,c,h,w] over the window of (p, q); a NaN is better than every number and a later NaN than
//                     an earlier one, the first of equal numbers stays. With relu: max(0, that).
//
// The values of a window have a total order, value first, then place in the window, so teams may compare them in any order. What
// is carried along as the position is what will be written, an index h W + w or an offset r S + s: both grow along the window, by
// a fixed step for a tap and another for a row. 32 bits hold it where V > 1, which asks for planes of less than 2^31 elements.
#include "pool2d.cuh"

namespace torchcnn::cuda {

template <class T, int V>
struct Best {
  using A = decltype(to_arithmetic(T()));
  using Position = std::conditional_t<V == 1, uint64_t, uint32_t>;
  A value[V];
  Position at[V];
};

// The steps of a position along one axis, and where it stands at the first tap of a window.
struct PositionSteps {
  int64_t first, step;
};

__device__ inline PositionSteps position_steps(bool of_plane, int64_t p, const Window& window, int64_t stride, int64_t pad,
                                               int64_t dilation, int64_t row_size_of_plane, int64_t row_size_of_window) {
  if (of_plane) return {window.begin * row_size_of_plane, dilation * row_size_of_plane};
  return {(window.begin + pad - p * stride) / dilation * row_size_of_window, row_size_of_window};
}

template <class T, int V>
__global__ void __launch_bounds__(kPoolThreads, kPoolBlocks)
    extremum_pool2d_forward_by_teams(const Pool2dGeometry g, const Extremum extremum, const Team team, int64_t items,
                                     const T* input, T* output, const Positions positions) {
  using A = typename Best<T, V>::A;
  using Position = typename Best<T, V>::Position;
  const Strides in = g.input_strides();
  const bool of_plane = positions.kind == PositionKind::none || positions.kind == PositionKind::indices;
  const auto passes = [&](A a, A b) { return extremum.minimum ? a < b : a > b; };
  for (int64_t block = blockIdx.x; block * team.items_of_block() < items; block += gridDim.x) {
    const Member member(team, block);
    const bool exists = member.item < items;
    Best<T, V> best = {};
    if (exists) {
      const Place place = place_of(member.item * V, g.layout, g.C, g.P, g.Q);
      const Window row = row_window(g, place.row), column = column_window(g, place.column);
      const PositionSteps by_row = position_steps(of_plane, place.row, row, g.stride_h, g.pad_h, g.dilation_h, g.W, g.S),
                          by_column = position_steps(of_plane, place.column, column, g.stride_w, g.pad_w, g.dilation_w, 1, 1);
      const T* const from = input + place.n * in.n + place.c * in.c;
      const Elements<T, V> first = load<V>(from + row.begin * in.h + column.begin * in.w);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        best.value[v] = to_arithmetic(first.of[v]);
        best.at[v] = static_cast<Position>(by_row.first + by_column.first);
      }
      const int64_t h_step = g.dilation_h << team.rows_log, w_step = g.dilation_w << team.columns_log;
      const Position row_step = static_cast<Position>(by_row.step << team.rows_log),
                     column_step = static_cast<Position>(by_column.step << team.columns_log);
      Position row_at = best.at[0] + static_cast<Position>(member.row * by_row.step + member.column * by_column.step);
      for (int64_t h = row.begin + member.row * g.dilation_h; h < row.end; h += h_step, row_at += row_step) {
        Position at = row_at;
        for (int64_t w = column.begin + member.column * g.dilation_w; w < column.end; w += w_step, at += column_step) {
          const Elements<T, V> candidates = load<V>(from + h * in.h + w * in.w);
#pragma unroll
          for (int v = 0; v < V; ++v) {
            const A candidate = to_arithmetic(candidates.of[v]);
            if (candidate != candidate || passes(candidate, best.value[v])) {
              best.value[v] = candidate;
              best.at[v] = at;
            }
          }
        }
      }
    }
    take_together(team, member, best, [&](Best<T, V>& mine, const Best<T, V>& others) {
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const A a = others.value[v], b = mine.value[v];
        const bool a_is_nan = a != a, b_is_nan = b != b;
        const bool later = others.at[v] > mine.at[v], earlier = others.at[v] < mine.at[v];
        if (a_is_nan ? !b_is_nan || later : !b_is_nan && (passes(a, b) || (a == b && earlier))) {
          mine.value[v] = a;
          mine.at[v] = others.at[v];
        }
      }
    });
    if (!exists || member.number != 0) continue;
    const int64_t to = member.item * V;
    Elements<T, V> values;
    Elements<int64_t, V> indices;
    Elements<int32_t, V> offsets;
    Elements<uint8_t, V> byte_offsets;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const bool nothing = extremum.relu && best.value[v] <= A(0);
      values.of[v] = from_arithmetic<T>(nothing ? A(0) : best.value[v]);
      indices.of[v] = static_cast<int64_t>(best.at[v]);
      offsets.of[v] = nothing ? -1 : static_cast<int32_t>(best.at[v]);
      byte_offsets.of[v] = static_cast<uint8_t>(offsets.of[v]);
    }
    store<V>(output + to, values);
    switch (positions.kind) {
      case PositionKind::none: break;
      case PositionKind::indices: store<V>(static_cast<int64_t*>(positions.to) + to, indices); break;
      case PositionKind::byte_offsets: store<V>(static_cast<uint8_t*>(positions.to) + to, byte_offsets); break;
      case PositionKind::int_offsets: store<V>(static_cast<int32_t*>(positions.to) + to, offsets); break;
    }
  }
}

template <int V, class T>
void extremum_pool2d_forward_of(const Pool2dGeometry& g, Extremum extremum, const T* input, T* output, Positions positions,
                                Stream stream) {
  using D = Device<T>;
  const Team team = team_for(g, V);
  const int64_t items = g.N * g.C * g.P * g.Q / V;
  const char* name = extremum.minimum ? "min_pool2d" : extremum.relu ? "relu_max_pool2d" : "max_pool2d";
  launch(name, extremum_pool2d_forward_by_teams<D, V>, pool_blocks(items, team), kPoolThreads, shared_bytes<Best<D, V>>(team),
         stream, g, extremum, team, items, on_device(input), on_device(output), positions);
}

template <class T>
void extremum_pool2d_forward(const Pool2dGeometry& g, Extremum extremum, const T* input, T* output, Positions positions,
                             Stream stream) {
  if (g.N * g.P * g.Q == 0) return;
  if constexpr (!std::is_integral_v<T>) {
    if (g.H <= INT32_MAX / g.W && in_vectors<T>(g, input, output, positions.to))
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
