// Average pooling and its gradient.
//
//   forward      output[n,c,p,q]     = sum of the window of (p, q) / divisor
//   grad_input   grad_input[n,c,h,w] = sum of grad_output[n,c,p,q] (1 / divisor) over the windows that contain (h, w)
//
// Both gather: what is written is written once, by one thread. Forward adds up rows and then their sums, in teams where windows are
// large (pool2d.cuh); grad_input takes the windows in the order of p, then q. bfloat16 and float16 are summed in float32 and
// rounded once; int64, in forward alone, is divided as C++ divides.
#include "pool2d.cuh"

namespace torchcnn::cuda {

template <class T>
__device__ T mean_of(T sum, int64_t divisor) {
  if constexpr (std::is_integral_v<T>) {
    if (divisor == -1) return static_cast<T>(-static_cast<std::make_unsigned_t<T>>(sum));  // the least integer has no quotient
  }
  return sum / static_cast<T>(divisor);
}

template <class T, int V>
struct Sum {
  decltype(to_arithmetic(T())) of[V];
};

template <class T, int V>
__global__ void __launch_bounds__(kPoolThreads, kPoolBlocks)
    avg_pool2d_forward_by_teams(const Pool2dGeometry g, const Divisor divisor, const Team team, int64_t items, const T* input,
                                T* output) {
  const Strides in = g.input_strides();
  for (int64_t block = blockIdx.x; block * team.items_of_block() < items; block += gridDim.x) {
    const Member member(team, block);
    const bool exists = member.item < items;
    Sum<T, V> sum = {};
    int64_t divide_by = 1;
    if (exists) {
      const Place place = place_of(member.item * V, g.layout, g.C, g.P, g.Q);
      const Window row = row_window(g, place.row), column = column_window(g, place.column);
      divide_by = divisor(row, column);
      const T* const from = input + place.n * in.n + place.c * in.c;
      for (int64_t h = row.begin + member.row; h < row.end; h += int64_t(1) << team.rows_log) {
        Sum<T, V> row_sum = {};
        for (int64_t w = column.begin + member.column; w < column.end; w += int64_t(1) << team.columns_log) {
          const Elements<T, V> values = load<V>(from + h * in.h + w * in.w);
#pragma unroll
          for (int v = 0; v < V; ++v) row_sum.of[v] += to_arithmetic(values.of[v]);
        }
#pragma unroll
        for (int v = 0; v < V; ++v) sum.of[v] += row_sum.of[v];
      }
    }
    take_together(team, member, sum, [&](Sum<T, V>& mine, const Sum<T, V>& others) {
#pragma unroll
      for (int v = 0; v < V; ++v) mine.of[v] += others.of[v];
    });
    if (!exists || member.number != 0) continue;
    Elements<T, V> means;
#pragma unroll
    for (int v = 0; v < V; ++v) means.of[v] = from_arithmetic<T>(mean_of(sum.of[v], divide_by));
    store<V>(output + member.item * V, means);
  }
}

template <class T, int V>
__global__ void __launch_bounds__(kPoolThreads, kPoolBlocks)
    avg_pool2d_grad_input_gather(const Pool2dGeometry g, const Divisor divisor, int64_t items, const T* grad_output,
                                 T* grad_input) {
  using A = decltype(to_arithmetic(T()));
  const Strides out = g.output_strides();
  for (int64_t block = blockIdx.x; block * kPoolThreads < items; block += gridDim.x) {
    const int64_t item = block * kPoolThreads + threadIdx.x;
    if (item >= items) return;
    const Place place = place_of(item * V, g.layout, g.C, g.H, g.W);
    const WindowRange rows = row_windows_over(g, place.row), columns = column_windows_over(g, place.column);
    const T* const from = grad_output + place.n * out.n + place.c * out.c;
    Sum<T, V> sum = {};
    for (int64_t p = rows.begin; p < rows.end; ++p) {
      const Window row = row_window(g, p);
      for (int64_t q = columns.begin; q < columns.end; ++q) {
        const A share = A(1) / static_cast<A>(divisor(row, column_window(g, q)));
        const Elements<T, V> gradients = load<V>(from + p * out.h + q * out.w);
#pragma unroll
        for (int v = 0; v < V; ++v) sum.of[v] += to_arithmetic(gradients.of[v]) * share;
      }
    }
    Elements<T, V> sums;
#pragma unroll
    for (int v = 0; v < V; ++v) sums.of[v] = from_arithmetic<T>(sum.of[v]);
    store<V>(grad_input + item * V, sums);
  }
}

template <int V, class T>
void avg_pool2d_forward_of(const Pool2dGeometry& g, Divisor divisor, const T* input, T* output, Stream stream) {
  using D = Device<T>;
  const Team team = team_for(g, V);
  const int64_t items = g.N * g.C * g.P * g.Q / V;
  launch("avg_pool2d", avg_pool2d_forward_by_teams<D, V>, pool_blocks(items, team), kPoolThreads, shared_bytes<Sum<D, V>>(team),
         stream, g, divisor, team, items, on_device(input), on_device(output));
}

template <class T>
void avg_pool2d_forward(const Pool2dGeometry& g, Divisor divisor, const T* input, T* output, Stream stream) {
  if (g.N * g.P * g.Q == 0) return;
  if constexpr (!std::is_integral_v<T>) {
    if (in_vectors<T>(g, input, output)) return avg_pool2d_forward_of<kVector<T>>(g, divisor, input, output, stream);
  }
  avg_pool2d_forward_of<1>(g, divisor, input, output, stream);
}

template <int V, class T>
void avg_pool2d_grad_input_of(const Pool2dGeometry& g, Divisor divisor, const T* grad_output, T* grad_input, Stream stream) {
  const int64_t items = g.N * g.C * g.H * g.W / V;
  launch("avg_pool2d_grad_input", avg_pool2d_grad_input_gather<Device<T>, V>, pool_blocks(items, kSingle), kPoolThreads, 0,
         stream, g, divisor, items, on_device(grad_output), on_device(grad_input));
}

template <class T>
void avg_pool2d_grad_input(const Pool2dGeometry& g, Divisor divisor, const T* grad_output, T* grad_input, Stream stream) {
  if (g.N == 0) return;
  if (in_vectors<T>(g, grad_output, grad_input))
    return avg_pool2d_grad_input_of<kVector<T>>(g, divisor, grad_output, grad_input, stream);
  avg_pool2d_grad_input_of<1>(g, divisor, grad_output, grad_input, stream);
}

template void avg_pool2d_forward<int64_t>(const Pool2dGeometry&, Divisor, const int64_t*, int64_t*, Stream);

#define TORCHCNN_INSTANTIATE(T)                                                              \
  template void avg_pool2d_forward<T>(const Pool2dGeometry&, Divisor, const T*, T*, Stream); \
  template void avg_pool2d_grad_input<T>(const Pool2dGeometry&, Divisor, const T*, T*, Stream)
TORCHCNN_INSTANTIATE(float);
TORCHCNN_INSTANTIATE(double);
TORCHCNN_INSTANTIATE(Float16);
TORCHCNN_INSTANTIATE(BFloat16);
#undef TORCHCNN_INSTANTIATE

}  // namespace torchcnn::cuda
