// The kernels that follow positions into a plane.
//
//   offset_pool2d_grad_input  grad_input[n,c,h,w] = sum of grad_output[n,c,p,q] over the windows whose offset r S + s says (h, w)
//   pool2d_gather_offsets     output[n,c,p,q] = source[n,c, where the offset of (p, q) points]
//   pool2d_gather             output[n,c,p,q] = source[n,c,indices[n,c,p,q]]
//   pool2d_scatter_add        grad_input[n,c,indices[n,c,p,q]] += grad_output[n,c,p,q]
//   pool2d_scatter_assign     output[n,c,indices[n,c,p,q]] = input[n,c,p,q]; of equal indices the last stays
//
// The first gathers over the windows that contain a position. Indices know nothing of windows, and equal ones may stand anywhere:
// there one warp owns a part of a plane, or of 32 neighbouring channels in channels_last, keeps it in shared memory, and walks
// through the indices in the order of the windows, as the CPU kernels do. No atomics, and every element is written once.
//
// An offset outside the window or the plane counts for nothing; an index outside the plane stops the kernel, as in torch.
#undef NDEBUG
#include <cassert>

#include "pool2d.cuh"

namespace torchcnn::cuda {

template <class T, int V, int X, int rows_over, int columns_over, class Offset, class I>
__global__ void __launch_bounds__(kPoolThreads, kPoolBlocks<V>)
    offset_pool2d_grad_input_gather(const Pool<I> pool, I items, const T* __restrict__ grad_output,
                                    const Offset* __restrict__ offsets, T* __restrict__ grad_input) {
  using A = decltype(to_arithmetic(T()));
  const I item = static_cast<I>(blockIdx.x) * kPoolThreads + threadIdx.x;
  if (item >= items) return;
  const Place<I> place = pool.input_place(item * (V * X));
  const I plane = pool.output_plane(place), S = pool.columns.kernel;
  // The tap at which a window meets a position `distance` after its first tap: -1 if it steps over it.
  const auto tap_at = [](I distance, I dilation) {
    if (rows_over > 0 || dilation == 1) return distance;
    const I tap = distance / dilation;
    return tap * dilation == distance ? tap : I(-1);
  };
  A sum[X * V] = {};
  for_windows<X, rows_over, columns_over>(pool, place, [&](I p, I q, bool exists) {
    const I r = tap_at(place.row + pool.rows.pad - p * pool.rows.stride, pool.rows.dilation);
    const I s = tap_at(place.column + pool.columns.pad - q * pool.columns.stride, pool.columns.dilation);
    exists &= r >= 0 && (X > 1 || s >= 0);
    const I window = plane + (p * pool.columns.windows + q) * pool.inner;
    const Elements<Offset, V> given = exists ? load<V>(offsets + window) : Elements<Offset, V>{};
    const Elements<T, V> gradients = exists ? load<V>(grad_output + window) : all_of<V>(zero<T>());
#pragma unroll
    for (int x = 0; x < X; ++x) {
      const bool contains = exists && (X == 1 || (s + x >= 0 && s + x < S));
      const int wanted = static_cast<int>(r * S + s + x);
#pragma unroll
      for (int v = 0; v < V; ++v) sum[x * V + v] += contains && given.of[v] == wanted ? to_arithmetic(gradients.of[v]) : A(0);
    }
  });
  Elements<T, X * V> sums;
#pragma unroll
  for (int v = 0; v < X * V; ++v) sums.of[v] = from_arithmetic<T>(sum[v]);
  store<X * V>(grad_input + item * (X * V), sums);
}

template <class T, class Offset, class I>
__global__ void __launch_bounds__(kPoolThreads, kPoolBlocks<1>)
    pool2d_gather_by_offset(const Pool<I> pool, I items, const T* source, const Offset* offsets, T* output) {
  const I item = static_cast<I>(blockIdx.x) * kPoolThreads + threadIdx.x;
  if (item >= items) return;
  const Place<I> place = pool.output_place(item);
  const I offset = offsets[item], r = offset / pool.columns.kernel, s = offset - r * pool.columns.kernel;
  const I h = place.row * pool.rows.stride - pool.rows.pad + r * pool.rows.dilation,
          w = place.column * pool.columns.stride - pool.columns.pad + s * pool.columns.dilation;
  const bool inside = offset >= 0 && r < pool.rows.kernel && h >= 0 && h < pool.rows.size && w >= 0 && w < pool.columns.size;
  output[item] = inside ? source[pool.input_plane(place) + (h * pool.columns.size + w) * pool.inner] : T(0);
}

template <class T, class I>
__global__ void __launch_bounds__(kPoolThreads, kPoolBlocks<1>)
    pool2d_gather_by_index(const Pool<I> pool, I items, const T* source, const int64_t* indices, T* output) {
  const I item = static_cast<I>(blockIdx.x) * kPoolThreads + threadIdx.x;
  if (item >= items) return;
  const Place<I> place = pool.output_place(item);
  const int64_t index = indices[item], plane_size = pool.rows.size * pool.columns.size;
  assert(index >= 0 && index < plane_size && "indices must lie in the plane");
  output[item] = source[pool.input_plane(place) + index * pool.inner];
}

// ------------------------------------------------------------------------------------------------------------- scattering

inline constexpr int kScatterWarps = 4, kScatterBytes = 8 << 10;  // of shared memory a warp

// What stands in shared memory while equal indices are added up, or what is written last.
template <bool adds, class T>
using Kept = std::conditional_t<adds, decltype(to_arithmetic(T())), T>;

// The sum, in the order of the lanes, of `start` and the values of the lanes in `peers`. All lanes of the warp call it.
template <class A>
__device__ A sum_over(unsigned peers, A value, A start) {
  constexpr unsigned all = 0xffffffff;
  while (__any_sync(all, peers != 0)) {
    const A other = __shfl_sync(all, value, peers != 0 ? __ffs(peers) - 1 : 0);
    if (peers != 0) start += other;
    peers &= peers - 1;
  }
  return start;
}

// The sizes of a scatter. Of each plane, or 32 planes side by side, a warp has `part` positions.
struct Scatter {
  int64_t N, C, plane, windows, inner, part;
  unsigned parts, tasks;

  Scatter(const Pool2dGeometry& g, bool by_channels, int64_t kept_bytes)
      : N(g.N),
        C(g.C),
        plane(g.H * g.W),
        windows(g.P * g.Q),
        inner(g.layout == Layout::nchw ? 1 : g.C),
        part(std::clamp<int64_t>(plane, 1, kScatterBytes / kept_bytes / (by_channels ? 32 : 1))),
        parts(ceil_div(plane, part)),
        tasks(parts * N * (by_channels ? ceil_div(C, 32) : C)) {}
};

// Lanes with the same index find each other; the first adds up for all of them in the order of the windows, or the last one
// writes.
template <bool adds, class T>
__global__ void __launch_bounds__(kScatterWarps * 32, 4)
    pool2d_scatter_by_planes(const Scatter sizes, const T* __restrict__ from, const int64_t* __restrict__ indices,
                             T* __restrict__ to) {
  using K = Kept<adds, T>;
  constexpr unsigned all = 0xffffffff;
  const int lane = threadIdx.x % 32;
  const unsigned task = blockIdx.x * kScatterWarps + threadIdx.x / 32, plane_number = task / sizes.parts;
  if (task >= sizes.tasks) return;
  const int64_t nc = plane_number, begin = (task - plane_number * sizes.parts) * sizes.part;
  const int count = static_cast<int>(min(sizes.part, sizes.plane - begin));
  // The number of a plane's first element is this times the plane's size, less c (size - 1) where channels stand side by side.
  const int64_t c = sizes.inner == 1 ? 0 : nc % sizes.C, first = nc * sizes.windows - c * (sizes.windows - 1);
  K* const kept = reinterpret_cast<K*>(dynamic_shared_memory()) + threadIdx.x / 32 * sizes.part;
  for (int i = lane; i < count; i += 32) kept[i] = K(0);
  __syncwarp();
  bool inside = true;
  int64_t next_index = -1;
  T next_value = zero<T>();
  const auto read = [&](int64_t window) {
    if (window >= sizes.windows) return;
    next_index = indices[first + window * sizes.inner];
    next_value = from[first + window * sizes.inner];
  };
  read(lane);
  for (int64_t base = 0; base < sizes.windows; base += 32) {
    const bool exists = base + lane < sizes.windows;
    const int64_t index = exists ? next_index : -1;
    const T value = next_value;
    read(base + 32 + lane);  // ahead of its turn
    inside &= !exists || (index >= 0 && index < sizes.plane);
    const bool owned = index >= begin && index - begin < count;
    const int mine = owned ? static_cast<int>(index - begin) : -1;
    if (!__any_sync(all, owned)) continue;
    const unsigned peers = __match_any_sync(all, static_cast<unsigned>(mine));
    if constexpr (adds) {
      const bool leads = owned && lane == __ffs(peers) - 1;
      const K sum = sum_over<K>(leads ? peers : 0, to_arithmetic(value), leads ? kept[mine] : K(0));
      if (leads) kept[mine] = sum;
    } else {
      if (owned && lane == 31 - __clz(peers)) kept[mine] = value;
    }
    __syncwarp();  // other lanes may add to, or write over, what has been written
  }
  assert(inside && "indices must lie in the plane");
  T* const plane = to + nc * sizes.plane - c * (sizes.plane - 1);
  for (int i = lane; i < count; i += 32) plane[(begin + i) * sizes.inner] = from_arithmetic<T>(kept[i]);
}

// In channels_last: a lane has a channel.
template <bool adds, class T>
__global__ void __launch_bounds__(kScatterWarps * 32, 4)
    pool2d_scatter_by_channels(const Scatter sizes, const T* __restrict__ from, const int64_t* __restrict__ indices,
                               T* __restrict__ to) {
  using K = Kept<adds, T>;
  constexpr int unroll = 16;
  const int lane = threadIdx.x % 32;
  const unsigned task = blockIdx.x * kScatterWarps + threadIdx.x / 32, groups = (sizes.C + 31) / 32;
  const int64_t n = task / groups / sizes.parts, c = task % groups * 32 + lane, begin = task / groups % sizes.parts * sizes.part;
  if (task >= sizes.tasks || c >= sizes.C) return;
  const int count = static_cast<int>(min(sizes.part, sizes.plane - begin));
  K* const kept = reinterpret_cast<K*>(dynamic_shared_memory()) + threadIdx.x / 32 * sizes.part * 32 + lane;
  for (int i = 0; i < count; ++i) kept[i * 32] = K(0);
  const int64_t first = n * sizes.windows * sizes.C + c;
  bool inside = true;
  for (int64_t base = 0; base < sizes.windows; base += unroll) {
    int mine[unroll];  // -1: of another warp
    T values[unroll];
#pragma unroll
    for (int u = 0; u < unroll; ++u) {
      const bool exists = base + u < sizes.windows;
      const int64_t index = exists ? indices[first + (base + u) * sizes.C] : -1;
      values[u] = exists ? from[first + (base + u) * sizes.C] : zero<T>();
      inside &= !exists || (index >= 0 && index < sizes.plane);
      mine[u] = index >= begin && index - begin < count ? static_cast<int>(index - begin) : -1;
    }
#pragma unroll
    for (int u = 0; u < unroll; ++u) {
      if (mine[u] < 0) continue;
      K& sum = kept[mine[u] * 32];
      if constexpr (adds) {
        sum += to_arithmetic(values[u]);
      } else {
        sum = values[u];
      }
    }
  }
  assert(inside && "indices must lie in the plane");
  T* const plane = to + (n * sizes.plane + begin) * sizes.C + c;
  for (int i = 0; i < count; ++i) plane[i * sizes.C] = from_arithmetic<T>(kept[i * 32]);
}

// A warp reads all indices of its planes for each part: for many windows the parts of a single plane, which are larger, are
// better.
template <bool adds, class T>
void scatter(const char* name, const Pool2dGeometry& g, const T* from, const int64_t* indices, T* to, Stream stream) {
  if (g.N * g.C * g.H * g.W == 0) return;
  const bool by_channels = g.layout == Layout::channels_last && g.P * g.Q <= 256;
  const Scatter sizes(g, by_channels, sizeof(Kept<adds, T>));
  const int64_t limit = UINT32_MAX, tasks = ceil_div(sizes.plane, sizes.part) * g.N * (by_channels ? ceil_div(g.C, 32) : g.C);
  require(tasks <= limit, name, "planes and their parts must be at most ", limit, " on a GPU, got ", tasks);
  const size_t shared = kScatterWarps * sizes.part * (by_channels ? 32 : 1) * sizeof(Kept<adds, T>);
  launch(name, by_channels ? pool2d_scatter_by_channels<adds, T> : pool2d_scatter_by_planes<adds, T>,
         pool_blocks(sizes.tasks, kScatterWarps), kScatterWarps * 32, shared, stream, sizes, from, indices, to);
}

template <class T>
void offset_pool2d_grad_input(const Pool2dGeometry& g, const T* grad_output, Positions offsets, T* grad_input, Stream stream) {
  if (g.N == 0) return;
  const char* name = "offset_pool2d_grad_input";
  if (offsets.kind == PositionKind::int_offsets) {
    return with_index_type<1>(g, [&]<class I>(I) {
      const int64_t items = g.N * g.C * g.H * g.W;
      launch(name, offset_pool2d_grad_input_gather<Device<T>, 1, 1, 0, 0, int32_t, I>, pool_blocks(items), kPoolThreads, 0,
             stream, Pool<I>(g), items, on_device(grad_output), static_cast<const int32_t*>(offsets.to), on_device(grad_input));
    });
  }
  const uint8_t* bytes = static_cast<const uint8_t*>(offsets.to);
  with_gather_shape<T>(g, grad_input, in_vectors<T>(g, grad_output, bytes, grad_input),
                       [&]<int V, int X, int rows_over, int columns_over, class I>() {
    const int64_t items = g.N * g.C * g.H * g.W / (V * X);
    launch(name, offset_pool2d_grad_input_gather<Device<T>, V, X, rows_over, columns_over, uint8_t, I>, pool_blocks(items),
           kPoolThreads, 0, stream, Pool<I>(g), items, on_device(grad_output), bytes, on_device(grad_input));
  });
}

template <class T>
void pool2d_gather_offsets(const Pool2dGeometry& g, const T* source, Positions offsets, T* output, Stream stream) {
  const int64_t items = g.N * g.C * g.P * g.Q;
  if (items == 0) return;
  const auto gather = [&]<class Offset>(const Offset* from) {
    with_index_type<1>(g, [&]<class I>(I) {
      launch("offset_pool2d", pool2d_gather_by_offset<T, Offset, I>, pool_blocks(items), kPoolThreads, 0, stream, Pool<I>(g),
             items, source, from, output);
    });
  };
  if (offsets.kind == PositionKind::int_offsets) return gather(static_cast<const int32_t*>(offsets.to));
  gather(static_cast<const uint8_t*>(offsets.to));
}

template <class T>
void pool2d_gather(const Pool2dGeometry& g, const T* source, const int64_t* indices, T* output, Stream stream) {
  const int64_t items = g.N * g.C * g.P * g.Q;
  if (items == 0) return;
  with_index_type<1>(g, [&]<class I>(I) {
    launch("max_unpool2d_grad_input", pool2d_gather_by_index<T, I>, pool_blocks(items), kPoolThreads, 0, stream, Pool<I>(g),
           items, source, indices, output);
  });
}

template <class T>
void pool2d_scatter_add(const Pool2dGeometry& g, const T* grad_output, const int64_t* indices, T* grad_input, Stream stream) {
  scatter<true>("max_pool2d_grad_input", g, on_device(grad_output), indices, on_device(grad_input), stream);
}

template <class T>
void pool2d_scatter_assign(const Pool2dGeometry& g, const T* input, const int64_t* indices, T* output, Stream stream) {
  scatter<false>("max_unpool2d", g, input, indices, output, stream);
}

#define TORCHCNN_INSTANTIATE(T)                                                                      \
  template void offset_pool2d_grad_input<T>(const Pool2dGeometry&, const T*, Positions, T*, Stream); \
  template void pool2d_scatter_add<T>(const Pool2dGeometry&, const T*, const int64_t*, T*, Stream)
TORCHCNN_INSTANTIATE(float);
TORCHCNN_INSTANTIATE(double);
TORCHCNN_INSTANTIATE(Float16);
TORCHCNN_INSTANTIATE(BFloat16);
#undef TORCHCNN_INSTANTIATE

#define TORCHCNN_INSTANTIATE(T)                                                                   \
  template void pool2d_gather_offsets<T>(const Pool2dGeometry&, const T*, Positions, T*, Stream); \
  template void pool2d_gather<T>(const Pool2dGeometry&, const T*, const int64_t*, T*, Stream);    \
  template void pool2d_scatter_assign<T>(const Pool2dGeometry&, const T*, const int64_t*, T*, Stream)
TORCHCNN_INSTANTIATE(uint8_t);
TORCHCNN_INSTANTIATE(uint16_t);
TORCHCNN_INSTANTIATE(uint32_t);
TORCHCNN_INSTANTIATE(uint64_t);
#undef TORCHCNN_INSTANTIATE

}  // namespace torchcnn::cuda
