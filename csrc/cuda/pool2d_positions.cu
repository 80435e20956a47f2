// The kernels that follow positions into a plane.
//
//   offset_pool2d_grad_input  grad_input[n,c,h,w] = sum of grad_output[n,c,p,q] over the windows whose offset r S + s says (h, w)
//   pool2d_gather_offsets     output[n,c,p,q] = source[n,c, where the offset of (p, q) points]
//   pool2d_gather             output[n,c,p,q] = source[n,c,indices[n,c,p,q]]
//   pool2d_scatter_add        grad_input[n,c,indices[n,c,p,q]] += grad_output[n,c,p,q]
//   pool2d_scatter_assign     output[n,c,indices[n,c,p,q]] = input[n,c,p,q]; of equal indices the last stays
//
// The first gathers over the windows that contain a position. Indices know nothing of windows, and equal ones may stand anywhere:
// there one warp owns a plane, or one of `parts` equal ranges of it, and walks through the indices, 32 at a time. Lanes with the same
// index find each other; the first adds up for all of them in the order of the windows, or the last one writes. No atomics, and the
// order is that of the CPU kernels. Sums of bfloat16 and float16 stand in a float32 plane beside the tensor until all are there.
//
// An offset outside the window or the plane counts for nothing; an index outside the plane stops the kernel, as in torch.
#undef NDEBUG
#include <cassert>

#include "pool2d.cuh"

namespace torchcnn::cuda {

template <class T, int V, class Offset>
__global__ void __launch_bounds__(kPoolThreads, kPoolBlocks)
    offset_pool2d_grad_input_gather(const Pool2dGeometry g, int64_t items, const T* grad_output, const Offset* offsets,
                                    T* grad_input) {
  using A = decltype(to_arithmetic(T()));
  const Strides out = g.output_strides();
  // The tap at which a window meets a position `distance` after its first tap: -1 if it steps over it.
  const auto tap_at = [](int64_t distance, int64_t dilation) {
    if (dilation == 1) return distance;
    const int64_t tap = distance / dilation;
    return tap * dilation == distance ? tap : -1;
  };
  for (int64_t block = blockIdx.x; block * kPoolThreads < items; block += gridDim.x) {
    const int64_t item = block * kPoolThreads + threadIdx.x;
    if (item >= items) return;
    const Place place = place_of(item * V, g.layout, g.C, g.H, g.W);
    const WindowRange rows = row_windows_over(g, place.row), columns = column_windows_over(g, place.column);
    const int64_t plane = place.n * out.n + place.c * out.c;
    A sum[V] = {};
    for (int64_t p = rows.begin; p < rows.end; ++p) {
      const int64_t r = tap_at(place.row + g.pad_h - p * g.stride_h, g.dilation_h);
      if (r < 0) continue;
      for (int64_t q = columns.begin; q < columns.end; ++q) {
        const int64_t s = tap_at(place.column + g.pad_w - q * g.stride_w, g.dilation_w);
        const int64_t window = plane + p * out.h + q * out.w;
        const int32_t wanted = static_cast<int32_t>(r * g.S + s);
        const Elements<Offset, V> given = load<V>(offsets + window);
        bool chosen = false;
#pragma unroll
        for (int v = 0; v < V; ++v) chosen |= given.of[v] == wanted;
        if (s < 0 || !chosen) continue;
        const Elements<T, V> gradients = load<V>(grad_output + window);
#pragma unroll
        for (int v = 0; v < V; ++v) sum[v] += given.of[v] == wanted ? to_arithmetic(gradients.of[v]) : A(0);
      }
    }
    Elements<T, V> sums;
#pragma unroll
    for (int v = 0; v < V; ++v) sums.of[v] = from_arithmetic<T>(sum[v]);
    store<V>(grad_input + item * V, sums);
  }
}

template <class T, class Offset>
__global__ void __launch_bounds__(kPoolThreads, kPoolBlocks)
    pool2d_gather_by_offset(const Pool2dGeometry g, int64_t items, const T* source, const Offset* offsets, T* output) {
  const Strides in = g.input_strides();
  for (int64_t block = blockIdx.x; block * kPoolThreads < items; block += gridDim.x) {
    const int64_t item = block * kPoolThreads + threadIdx.x;
    if (item >= items) return;
    const Place place = place_of(item, g.layout, g.C, g.P, g.Q);
    const int64_t offset = offsets[item];
    const int64_t h = place.row * g.stride_h - g.pad_h + offset / g.S * g.dilation_h,
                  w = place.column * g.stride_w - g.pad_w + offset % g.S * g.dilation_w;
    const bool inside = offset >= 0 && offset < g.R * g.S && h >= 0 && h < g.H && w >= 0 && w < g.W;
    output[item] = inside ? source[place.n * in.n + place.c * in.c + h * in.h + w * in.w] : T(0);
  }
}

template <class T>
__global__ void __launch_bounds__(kPoolThreads, kPoolBlocks)
    pool2d_gather_by_index(const Pool2dGeometry g, int64_t items, const T* source, const int64_t* indices, T* output) {
  const Strides in = g.input_strides();
  for (int64_t block = blockIdx.x; block * kPoolThreads < items; block += gridDim.x) {
    const int64_t item = block * kPoolThreads + threadIdx.x;
    if (item >= items) return;
    const Place place = place_of(item, g.layout, g.C, g.P, g.Q);
    const int64_t index = indices[item];
    assert(index >= 0 && index < g.H * g.W && "indices must lie in the plane");
    output[item] = source[place.n * in.n + place.c * in.c + index * (g.layout == Layout::nchw ? 1 : g.C)];
  }
}

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

template <bool adds, class T, class Kept>
__global__ void __launch_bounds__(kPoolThreads, kPoolBlocks)
    pool2d_scatter_by_warps(const Pool2dGeometry g, int64_t parts, const T* from, const int64_t* indices, Kept* planes) {
  constexpr unsigned all = 0xffffffff;
  const Strides in = g.input_strides(), out = g.output_strides();
  const int lane = threadIdx.x % 32;
  const int64_t plane_size = g.H * g.W, part_size = ceil_div(plane_size, parts), windows = g.P * g.Q,
                step = g.layout == Layout::nchw ? 1 : g.C, warps = int64_t(gridDim.x) * (kPoolThreads / 32);
  for (int64_t task = (int64_t(blockIdx.x) * kPoolThreads + threadIdx.x) / 32; task < parts * g.N * g.C; task += warps) {
    const int64_t part = task / (g.N * g.C), n = task % (g.N * g.C) / g.C, c = task % g.C;
    const int64_t begin = part * part_size, end = begin + part_size;
    const int64_t first = n * out.n + c * out.c;
    Kept* const plane = planes + n * in.n + c * in.c;
    for (int64_t base = 0; base < windows; base += 32) {
      const bool exists = base + lane < windows;
      const int64_t at = first + (base + lane) * step, index = exists ? indices[at] : -1;
      assert((!exists || (index >= 0 && index < plane_size)) && "indices must lie in the plane");
      const bool owned = exists && index >= begin && index < end;
      if (!__any_sync(all, owned)) continue;
      const unsigned peers = __match_any_sync(all, static_cast<unsigned long long>(owned ? index : -1));
      if constexpr (adds) {
        const bool leads = owned && lane == __ffs(peers) - 1;
        const Kept sum =
            sum_over<Kept>(leads ? peers : 0, owned ? to_arithmetic(from[at]) : Kept(0), leads ? plane[index * step] : Kept(0));
        if (leads) plane[index * step] = sum;
      } else {
        if (owned && lane == 31 - __clz(peers)) plane[index * step] = from[at];
      }
      __syncwarp();  // other lanes of this warp may add to, or write over, what has been written
    }
  }
}

template <class T, class A>
__global__ void __launch_bounds__(kPoolThreads, kPoolBlocks) pool2d_narrow(int64_t items, const A* sums, T* to) {
  for (int64_t block = blockIdx.x; block * kPoolThreads < items; block += gridDim.x) {
    const int64_t item = block * kPoolThreads + threadIdx.x;
    if (item < items) to[item] = from_arithmetic<T>(sums[item]);
  }
}

template <int V, class T, class Offset>
void offset_pool2d_grad_input_of(const Pool2dGeometry& g, const T* grad_output, const Offset* offsets, T* grad_input,
                                 Stream stream) {
  const int64_t items = g.N * g.C * g.H * g.W / V;
  launch("offset_pool2d_grad_input", offset_pool2d_grad_input_gather<Device<T>, V, Offset>, pool_blocks(items, kSingle),
         kPoolThreads, 0, stream, g, items, on_device(grad_output), offsets, on_device(grad_input));
}

template <class T>
void offset_pool2d_grad_input(const Pool2dGeometry& g, const T* grad_output, Positions offsets, T* grad_input, Stream stream) {
  if (g.N == 0) return;
  if (offsets.kind == PositionKind::int_offsets)
    return offset_pool2d_grad_input_of<1>(g, grad_output, static_cast<const int32_t*>(offsets.to), grad_input, stream);
  const uint8_t* bytes = static_cast<const uint8_t*>(offsets.to);
  if (in_vectors<T>(g, grad_output, bytes, grad_input))
    return offset_pool2d_grad_input_of<kVector<T>>(g, grad_output, bytes, grad_input, stream);
  offset_pool2d_grad_input_of<1>(g, grad_output, bytes, grad_input, stream);
}

template <class T>
void pool2d_gather_offsets(const Pool2dGeometry& g, const T* source, Positions offsets, T* output, Stream stream) {
  const int64_t items = g.N * g.C * g.P * g.Q;
  if (items == 0) return;
  const auto gather = [&]<class Offset>(const Offset* from) {
    launch("offset_pool2d", pool2d_gather_by_offset<T, Offset>, pool_blocks(items, kSingle), kPoolThreads, 0, stream, g, items,
           source, from, output);
  };
  if (offsets.kind == PositionKind::int_offsets) return gather(static_cast<const int32_t*>(offsets.to));
  gather(static_cast<const uint8_t*>(offsets.to));
}

template <class T>
void pool2d_gather(const Pool2dGeometry& g, const T* source, const int64_t* indices, T* output, Stream stream) {
  const int64_t items = g.N * g.C * g.P * g.Q;
  if (items == 0) return;
  launch("max_unpool2d_grad_input", pool2d_gather_by_index<T>, pool_blocks(items, kSingle), kPoolThreads, 0, stream, g, items,
         source, indices, output);
}

template <bool adds, class T, class Kept>
void zero_and_scatter(const char* name, const Pool2dGeometry& g, const T* from, const int64_t* indices, Kept* planes,
                      Stream stream) {
  const int64_t count = g.N * g.C * g.H * g.W;
  if (count > 0) check(cudaMemsetAsync(planes, 0, count * sizeof(Kept), static_cast<cudaStream_t>(stream)), name);
  if (g.N * g.C * g.P * g.Q == 0) return;
  // Every part reads all indices of its plane: only as many as a large GPU has warps to run at once.
  constexpr int64_t enough_warps = 4096, most_parts = 32;
  const int64_t parts = std::clamp<int64_t>(enough_warps / (g.N * g.C), 1, most_parts), threads = 32 * parts * g.N * g.C;
  launch(name, pool2d_scatter_by_warps<adds, T, Kept>, pool_blocks(threads, kSingle), kPoolThreads, 0, stream, g, parts, from,
         indices, planes);
}

template <class T>
int64_t pool2d_scatter_add_workspace(const Pool2dGeometry& g) {
  return kIsLowPrecision<T> ? g.N * g.C * g.H * g.W * static_cast<int64_t>(sizeof(float)) : 0;
}

template <class T>
void pool2d_scatter_add(const Pool2dGeometry& g, const T* grad_output, const int64_t* indices, T* grad_input, void* workspace,
                        Stream stream) {
  const char* name = "max_pool2d_grad_input";
  if constexpr (kIsLowPrecision<T>) {
    float* const sums = static_cast<float*>(workspace);
    zero_and_scatter<true>(name, g, on_device(grad_output), indices, sums, stream);
    const int64_t items = g.N * g.C * g.H * g.W;
    if (items == 0) return;
    launch(name, pool2d_narrow<Device<T>, float>, pool_blocks(items, kSingle), kPoolThreads, 0, stream, items, sums,
           on_device(grad_input));
  } else {
    zero_and_scatter<true>(name, g, grad_output, indices, grad_input, stream);
  }
}

template <class T>
void pool2d_scatter_assign(const Pool2dGeometry& g, const T* input, const int64_t* indices, T* output, Stream stream) {
  zero_and_scatter<false>("max_unpool2d", g, input, indices, output, stream);
}

#define TORCHCNN_INSTANTIATE(T)                                                                      \
  template void offset_pool2d_grad_input<T>(const Pool2dGeometry&, const T*, Positions, T*, Stream); \
  template int64_t pool2d_scatter_add_workspace<T>(const Pool2dGeometry&);                           \
  template void pool2d_scatter_add<T>(const Pool2dGeometry&, const T*, const int64_t*, T*, void* workspace, Stream)
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
