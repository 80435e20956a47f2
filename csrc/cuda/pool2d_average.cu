// Average pooling and its gradient.
//
//   forward      output[n,c,p,q]     = sum of the window of (p, q) / divisor
//   grad_input   grad_input[n,c,h,w] = sum of grad_output[n,c,p,q] (1 / divisor) over the windows that contain (h, w)
//
// Both gather: what is written is written once, by one thread. Forward has a kernel for windows of 2 x 2 and 3 x 3, whose loads
// all start at once, and one for teams (pool2d.cuh). grad_input takes the windows in the order of p, then q. Where one window is
// the whole plane, there are other kernels (pool2d_planes.cuh). bfloat16 and float16 are summed in float32 and rounded once;
// int64, in forward alone, is divided as C++ divides.
#include "pool2d_planes.cuh"

namespace torchcnn::cuda {

template <class T>
__device__ T mean_of(T sum, int64_t divisor) {
  if constexpr (std::is_integral_v<T>) {
    if (divisor == -1) return static_cast<T>(-static_cast<std::make_unsigned_t<T>>(sum));  // the least integer has no quotient
  }
  return sum / static_cast<T>(divisor);
}

// What the sum of a window is divided by.
template <class I>
__device__ int64_t divide_by(const Divisor& divisor, const PoolWindow<I>& row, const PoolWindow<I>& column) {
  return divisor(Window{row.begin, row.end, row.padded_size}, Window{column.begin, column.end, column.padded_size});
}

template <class T, int V, class I>
__device__ void write(const Divisor& divisor, const PoolWindow<I>& row, const PoolWindow<I>& column, const Sum<T, V>& sum,
                      T* to) {
  const int64_t by = divide_by(divisor, row, column);
  Elements<T, V> means;
#pragma unroll
  for (int v = 0; v < V; ++v) means.of[v] = from_arithmetic<T>(mean_of(sum.of[v], by));
  store<V>(to, means);
}

template <class T, int V, int R, int S>
__global__ void __launch_bounds__(kPoolThreads, kPoolBlocks<V>)
    avg_pool2d_forward_direct(const Pool<int32_t> pool, const Divisor divisor, int items, const T* __restrict__ input,
                              T* __restrict__ output) {
  const int item = blockIdx.x * kPoolThreads + threadIdx.x;
  if (item >= items) return;
  const Place<int32_t> place = pool.output_place(item * V);
  const PoolWindow<int32_t> row = pool.rows.window(place.row), column = pool.columns.window(place.column);
  const T* const plane = input + pool.input_plane(place);
  Elements<T, V> taps[R * S];
#pragma unroll
  for (int tap = 0; tap < R * S; ++tap) {
    const int h = row.first + tap / S, w = column.first + tap % S;
    const bool inside = h >= row.begin && h < row.end && w >= column.begin && w < column.end;
    taps[tap] = inside ? load<V>(plane + (h * pool.columns.size + w) * pool.inner) : all_of<V>(zero<T>());
  }
  Sum<T, V> sum = {};
#pragma unroll
  for (int tap = 0; tap < R * S; ++tap) add(sum, taps[tap]);
  write(divisor, row, column, sum, output + item * V);
}

template <class T, int V, class I>
__global__ void __launch_bounds__(kMostPoolThreads)
    avg_pool2d_forward_by_teams(const Pool<I> pool, const Divisor divisor, const Team team, I items, const T* __restrict__ input,
                                T* __restrict__ output) {
  const Member<I> member(team);
  const bool exists = member.item < items;
  const Place<I> place = pool.output_place(exists ? member.item * V : 0);
  const PoolWindow<I> row = pool.rows.window(place.row), column = pool.columns.window(place.column);
  Sum<T, V> sum = {};
  if (exists) {
    for_taps<V>(pool, row, column, I(0), team, member.number, input + pool.input_plane(place), zero<T>(),
                [&](const Elements<T, V>(&elements)[kTaps], const I(&)[kTaps]) {
      Sum<T, V> part = {};  // a sum of few has a small error, and part and sum need not wait for each other
#pragma unroll
      for (int u = 0; u < kTaps; ++u) add(part, elements[u]);
#pragma unroll
      for (int v = 0; v < V; ++v) sum.of[v] += part.of[v];
    });
  }
  take_together(team, sum, [](const Sum<T, V>& mine, unsigned by) {
    Sum<T, V> others;
#pragma unroll
    for (int v = 0; v < V; ++v) others.of[v] = __shfl_down_sync(0xffffffff, mine.of[v], by);
    return others;
  }, [](Sum<T, V>& mine, const Sum<T, V>& others) {
#pragma unroll
    for (int v = 0; v < V; ++v) mine.of[v] += others.of[v];
  });
  if (exists && member.number == 0) write(divisor, row, column, sum, output + member.item * V);
}

template <class T, int V, int X, int rows_over, int columns_over, class I>
__global__ void __launch_bounds__(kPoolThreads, kPoolBlocks<V>)
    avg_pool2d_grad_input_gather(const Pool<I> pool, const Divisor divisor, I items, const T* __restrict__ grad_output,
                                 T* __restrict__ grad_input) {
  using A = decltype(to_arithmetic(T()));
  const I item = static_cast<I>(blockIdx.x) * kPoolThreads + threadIdx.x;
  if (item >= items) return;
  const Place<I> place = pool.input_place(item * (V * X));
  const T* const plane = grad_output + pool.output_plane(place);
  A sum[X * V] = {};
  int64_t last_divisor = 1;
  A share = 1;
  for_windows<X, rows_over, columns_over>(pool, place, [&](I p, I q, bool exists) {
    const Elements<T, V> gradients = exists ? load<V>(plane + (p * pool.columns.windows + q) * pool.inner) : Elements<T, V>{};
    const PoolWindow<I> column = pool.columns.window(q);
    const int64_t by = divide_by(divisor, pool.rows.window(p), column);
    if (exists && by != last_divisor) {
      share = A(1) / static_cast<A>(by);
      last_divisor = by;
    }
#pragma unroll
    for (int x = 0; x < X; ++x) {
      const bool contains = exists && (X == 1 || (place.column + x >= column.begin && place.column + x < column.end));
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const A more = fma(to_arithmetic(gradients.of[v]), share, sum[x * V + v]);
        if (contains) sum[x * V + v] = more;
      }
    }
  });
  Elements<T, X * V> sums;
#pragma unroll
  for (int v = 0; v < X * V; ++v) sums.of[v] = from_arithmetic<T>(sum[v]);
  store<X * V>(grad_input + item * (X * V), sums);
}

template <int V, class T>
void avg_pool2d_forward_of(const Pool2dGeometry& g, Divisor divisor, const T* input, T* output, Stream stream) {
  using D = Device<T>;
  const int64_t items = g.N * g.C * g.P * g.Q / V;
  const char* name = "avg_pool2d";
  if constexpr (!std::is_integral_v<T>) {
    const auto direct = [&](auto kernel) {
      launch(name, kernel, pool_blocks(items), kPoolThreads, 0, stream, Pool<int32_t>(g), divisor, items, on_device(input),
             on_device(output));
    };
    if (fits_32_bits(g) && g.R == 2 && g.S == 2) return direct(avg_pool2d_forward_direct<D, V, 2, 2>);
    if (fits_32_bits(g) && g.R == 3 && g.S == 3) return direct(avg_pool2d_forward_direct<D, V, 3, 3>);
  }
  const Team team = team_for(g, V);
  with_index_type<V>(g, [&]<class I>(I) {
    launch(name, avg_pool2d_forward_by_teams<D, V, I>, pool_blocks(items, team.items_of_block()), team.threads(),
           shared_bytes<Sum<D, V>>(team), stream, Pool<I>(g), divisor, team, items, on_device(input), on_device(output));
  });
}

template <class T>
int64_t avg_pool2d_forward_workspace(const Pool2dGeometry& g) {
  if (std::is_integral_v<T> || g.layout == Layout::nchw || g.C % kVector<T> != 0 || !is_whole_plane(g)) return 0;
  const int64_t parts = parts_of(g.H * g.W).count;
  return parts == 1 ? 0 : g.N * parts * g.C * static_cast<int64_t>(sizeof(SumOf<T>));
}

template <class T>
void avg_pool2d_forward(const Pool2dGeometry& g, Divisor divisor, const T* input, T* output, void* workspace, Stream stream) {
  if (g.N * g.P * g.Q == 0) return;
  if constexpr (!std::is_integral_v<T>) {
    if (is_whole_plane(g)) {
      const int64_t by = divisor(row_window(g, 0), column_window(g, 0));
      if (g.layout == Layout::nchw) return average_planes(g, by, input, output, stream);
      if (g.C % kVector<T> == 0 && aligned(input)) return average_channels(g, by, input, output, workspace, stream);
    }
    if (in_vectors<T>(g, input, output)) return avg_pool2d_forward_of<kVector<T>>(g, divisor, input, output, stream);
  }
  avg_pool2d_forward_of<1>(g, divisor, input, output, stream);
}

template <class T>
void avg_pool2d_grad_input(const Pool2dGeometry& g, Divisor divisor, const T* grad_output, T* grad_input, Stream stream) {
  if (g.N == 0) return;
  if (grad_in_whole_planes(g, grad_input))
    return share_among_planes(g, divisor(row_window(g, 0), column_window(g, 0)), grad_output, grad_input, stream);
  with_gather_shape<T>(g, grad_input, in_vectors<T>(g, grad_output, grad_input),
                       [&]<int V, int X, int rows_over, int columns_over, class I>() {
    const int64_t items = g.N * g.C * g.H * g.W / (V * X);
    launch("avg_pool2d_grad_input", avg_pool2d_grad_input_gather<Device<T>, V, X, rows_over, columns_over, I>, pool_blocks(items),
           kPoolThreads, 0, stream, Pool<I>(g), divisor, items, on_device(grad_output), on_device(grad_input));
  });
}

#define TORCHCNN_INSTANTIATE_FORWARD(T)                                    \
  template int64_t avg_pool2d_forward_workspace<T>(const Pool2dGeometry&); \
  template void avg_pool2d_forward<T>(const Pool2dGeometry&, Divisor, const T*, T*, void*, Stream)
#define TORCHCNN_INSTANTIATE(T)    \
  TORCHCNN_INSTANTIATE_FORWARD(T); \
  template void avg_pool2d_grad_input<T>(const Pool2dGeometry&, Divisor, const T*, T*, Stream)
TORCHCNN_INSTANTIATE_FORWARD(int64_t);
TORCHCNN_INSTANTIATE(float);
TORCHCNN_INSTANTIATE(double);
TORCHCNN_INSTANTIATE(Float16);
TORCHCNN_INSTANTIATE(BFloat16);
#undef TORCHCNN_INSTANTIATE
#undef TORCHCNN_INSTANTIATE_FORWARD

}  // namespace torchcnn::cuda
