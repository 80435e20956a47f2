// Averages whose one window is the whole plane, as the last pool of a classifier has it, and their gradient.
//
//   NCHW           a plane is one piece of memory: a team of 1 to 512 lanes adds it up, the lanes of a warp or those of a block
//   channels_last  a block adds up 4 vectors of neighbouring channels, 64 bytes of each pixel; 32 lanes share the pixels out
//
// In channels_last the planes of few channels would make few blocks. Large ones are therefore cut into parts, a block for each:
// their sums go to scratch memory, where they lie as planes with one pixel for each part, and those are averaged in turn.
//
// How planes are cut and shared out follows from the size of a plane and from the dtype alone, so do the bits of a sum.
#pragma once

#include <bit>

#include "pool2d.cuh"

namespace torchcnn::cuda {

template <class T>
using Arithmetic = decltype(to_arithmetic(T()));

template <class T, int V>
struct Sum {
  Arithmetic<T> of[V];
};

template <class T, int V>
__device__ void add(Sum<T, V>& sum, const Elements<T, V>& elements) {
#pragma unroll
  for (int v = 0; v < V; ++v) sum.of[v] += to_arithmetic(elements.of[v]);
}

// The same. Of bfloat16 taken apart one by one ptxas makes code for sm_90a that waits for one load before it starts the next.
template <class T, int V>
__device__ void add_by_words(Sum<T, V>& sum, const Elements<T, V>& elements) {
  if constexpr (std::is_same_v<T, __nv_bfloat16> && V > 1) {
    const auto words = std::bit_cast<Elements<uint32_t, V / 2>>(elements);
#pragma unroll
    for (int v = 0; v < V; ++v) sum.of[v] += __uint_as_float(v % 2 == 0 ? words.of[v / 2] << 16 : words.of[v / 2] & 0xffff0000);
  } else {
    add(sum, elements);
  }
}

inline bool is_whole_plane(const Pool2dGeometry& g) {
  if (g.P != 1 || g.Q != 1) return false;
  const Window row = row_window(g, 0), column = column_window(g, 0);
  return row.begin == 0 && row.end == g.H && column.begin == 0 && column.end == g.W;
}

// V neighbours, or zeros where there are none. A vector is chosen in words of 32 bits: the compiler would take numbers of 16 bits
// apart to choose each for itself, and then let few loads run at once.
template <int V, bool kAligned, class T>
__device__ Elements<T, V> load_or_zeros(const T* from, bool exists) {
  if constexpr (kAligned && V == kVector<T>) {
    return std::bit_cast<Elements<T, V>>(exists ? *reinterpret_cast<const uint4*>(from) : make_uint4(0, 0, 0, 0));
  } else {
    Elements<T, V> elements;
#pragma unroll
    for (int v = 0; v < V; ++v) elements.of[v] = exists ? from[v] : zero<T>();
    return elements;
  }
}

// The sum of the vectors first, first + step, ... < end, which lie `stride` elements apart; kAtOnce are loaded at once. As a sum
// of few has a small error, each round has its own.
inline constexpr int kAtOnce = 4;

template <int V, bool kAligned, class T>
__device__ Sum<T, V> add_up(const T* from, int64_t first, int64_t end, int step, int64_t stride) {
  Sum<T, V> sum = {};
  for (int64_t at = first; at < end; at += kAtOnce * step) {
    Elements<T, V> elements[kAtOnce];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u)
      elements[u] = load_or_zeros<V, kAligned>(from + (at + u * step) * stride, at + u * step < end);
    Sum<T, V> part = {};
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) add_by_words(part, elements[u]);
#pragma unroll
    for (int v = 0; v < V; ++v) sum.of[v] += part.of[v];
  }
  return sum;
}

// The sum over neighbouring lanes of a warp, a power of 2 of them; right in the first.
template <class A>
__device__ A add_up_lanes(A sum, int lanes) {
  for (int by = lanes / 2; by > 0; by /= 2) sum += __shfl_down_sync(0xffffffff, sum, by);
  return sum;
}

// ------------------------------------------------------------------------------------------------------------------ NCHW

inline constexpr int kPlaneThreads = 128, kMostLanes = 512;

// A plane is `vectors` times X elements. More lanes than a warp has are a block.
template <class T, bool kAligned, int X>
__global__ void __launch_bounds__(kMostLanes)
    avg_pool2d_forward_planes(int64_t planes, int64_t vectors, int lanes_log, Arithmetic<T> divisor, const T* __restrict__ input,
                              T* __restrict__ output) {
  constexpr int kWarp = 32;
  __shared__ Arithmetic<T> of_warps[kMostLanes / kWarp];
  const int lanes = 1 << lanes_log, lane = static_cast<int>(threadIdx.x) & (lanes - 1);
  const int64_t plane = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) >> lanes_log;
  Sum<T, X> neighbours = {};
  if (plane < planes) neighbours = add_up<X, kAligned>(input + plane * vectors * X, lane, vectors, lanes, X);
#pragma unroll
  for (int half = X / 2; half > 0; half /= 2)
#pragma unroll
    for (int x = 0; x < half; ++x) neighbours.of[x] += neighbours.of[x + half];
  Arithmetic<T> sum = add_up_lanes(neighbours.of[0], min(lanes, kWarp));
  if (lanes > kWarp) {
    if (lane % kWarp == 0) of_warps[lane / kWarp] = sum;
    __syncthreads();
    if (lane >= kWarp) return;
    sum = add_up_lanes(lane < lanes / kWarp ? of_warps[lane] : 0, kWarp);
  }
  if (lane == 0 && plane < planes) output[plane] = from_arithmetic<T>(sum / divisor);
}

template <class T>
void average_planes(const Pool2dGeometry& g, int64_t divisor, const T* input, T* output, Stream stream) {
  constexpr int V = kVector<T>;
  const int64_t planes = g.N * g.C, pixels = g.H * g.W;
  const auto run = [&](auto kernel, int X) {
    int lanes_log = 0;
    while (1 << lanes_log < kMostLanes && int64_t(kAtOnce) << lanes_log < pixels / X) ++lanes_log;
    const int threads = std::max(1 << lanes_log, lanes_log > 5 ? 0 : kPlaneThreads);
    launch("avg_pool2d", kernel, pool_blocks(planes, threads >> lanes_log), threads, 0, stream, planes, pixels / X, lanes_log,
           divisor, on_device(input), on_device(output));
  };
  if (pixels % V != 0) return run(avg_pool2d_forward_planes<Device<T>, true, 1>, 1);
  if (aligned(input)) return run(avg_pool2d_forward_planes<Device<T>, true, V>, V);
  run(avg_pool2d_forward_planes<Device<T>, false, V>, V);  // slower, in the same order
}

// A thread writes a vector of neighbours, which lie in one plane or in several.
template <class T>
__global__ void __launch_bounds__(kPoolThreads)
    avg_pool2d_grad_input_planes(Divider<int32_t> by_pixels, int vectors, Arithmetic<T> share, const T* __restrict__ grad_output,
                                 T* __restrict__ grad_input) {
  constexpr int V = kVector<T>;
  const int vector = blockIdx.x * kPoolThreads + threadIdx.x;
  if (vector >= vectors) return;
  Elements<T, V> gradients;
#pragma unroll
  for (int v = 0; v < V; ++v) gradients.of[v] = from_arithmetic<T>(to_arithmetic(grad_output[by_pixels(vector * V + v)]) * share);
  store<V>(grad_input + static_cast<int64_t>(vector) * V, gradients);
}

template <class T>
bool grad_in_whole_planes(const Pool2dGeometry& g, const T* grad_input) {
  return g.layout == Layout::nchw && is_whole_plane(g) && g.N * g.C * g.H * g.W % kVector<T> == 0 && aligned(grad_input) &&
         fits_32_bits(g);
}

template <class T>
void share_among_planes(const Pool2dGeometry& g, int64_t divisor, const T* grad_output, T* grad_input, Stream stream) {
  const int64_t vectors = g.N * g.C * g.H * g.W / kVector<T>;
  launch("avg_pool2d_grad_input", avg_pool2d_grad_input_planes<Device<T>>, pool_blocks(vectors), kPoolThreads, 0, stream,
         Divider<int32_t>(g.H * g.W), vectors, SumOf<T>(1) / static_cast<SumOf<T>>(divisor), on_device(grad_output),
         on_device(grad_input));
}

// --------------------------------------------------------------------------------------------------------- channels_last

inline constexpr int kBlockVectors = 4, kBlockLanes = 32, kBlockWarps = kBlockVectors * kBlockLanes / 32;

// The parts of a plane: planes of few pixels are one.
struct PlaneParts {
  int64_t count, size;
};

inline PlaneParts parts_of(int64_t pixels) {
  constexpr int64_t round = kBlockLanes * kAtOnce, most_parts = 256;
  if (pixels <= 4 * round) return {1, pixels};
  const int64_t size = round * ceil_div(pixels, round * most_parts);
  return {ceil_div(pixels, size), size};
}

// Block (row, group): the group of channels of a part. The rows of the output are parts, those of an image after another.
template <class From, class To>
__global__ void __launch_bounds__(kBlockVectors* kBlockLanes)
    avg_pool2d_forward_channels(Divider<int32_t> by_groups, int groups, Divider<int32_t> by_parts, const PlaneParts parts,
                                int64_t pixels, int64_t channels, Arithmetic<From> divisor, const From* __restrict__ input,
                                To* __restrict__ output) {
  constexpr int V = kVector<From>, kChannels = kBlockVectors * V;
  __shared__ Arithmetic<From> of_warps[kBlockWarps][kChannels];
  const int thread = threadIdx.x, row = by_groups(static_cast<int>(blockIdx.x)), image = by_parts(row);
  const int64_t first_channel = static_cast<int64_t>(static_cast<int>(blockIdx.x) - row * groups) * kChannels;
  const int64_t c = first_channel + thread % kBlockVectors * V;
  const int64_t begin = (row - image * parts.count) * parts.size, end = min(begin + parts.size, pixels);
  Sum<From, V> sum = {};
  if (c < channels) {
    sum = add_up<V, true>(input + image * pixels * channels + c, begin + thread / kBlockVectors, end, kBlockLanes, channels);
  }
#pragma unroll
  for (int by = 16; by >= kBlockVectors; by /= 2)
#pragma unroll
    for (int v = 0; v < V; ++v) sum.of[v] += __shfl_down_sync(0xffffffff, sum.of[v], by);
  if (thread % 32 < kBlockVectors) {
#pragma unroll
    for (int v = 0; v < V; ++v) of_warps[thread / 32][thread % kBlockVectors * V + v] = sum.of[v];
  }
  __syncthreads();
  if (thread >= kChannels || first_channel + thread >= channels) return;
  const Arithmetic<From> total = (of_warps[0][thread] + of_warps[1][thread]) + (of_warps[2][thread] + of_warps[3][thread]);
  output[row * channels + first_channel + thread] = from_arithmetic<To>(total / divisor);
}

// Averages `images` images of C channels. From or To may be the type of sums.
template <class From, class To>
void average_channels(int64_t images, int64_t C, int64_t pixels, PlaneParts parts, int64_t divisor, const From* input, To* output,
                      Stream stream) {
  const int64_t groups = ceil_div(C, kBlockVectors * kVector<From>);
  launch("avg_pool2d", avg_pool2d_forward_channels<Device<From>, Device<To>>, pool_blocks(images * parts.count * groups, 1),
         kBlockVectors * kBlockLanes, 0, stream, Divider<int32_t>(groups), groups, Divider<int32_t>(parts.count), parts, pixels,
         C, divisor, on_device(input), on_device(output));
}

template <class T>
void average_channels(const Pool2dGeometry& g, int64_t divisor, const T* input, T* output, void* workspace, Stream stream) {
  const int64_t pixels = g.H * g.W;
  const PlaneParts parts = parts_of(pixels);
  if (parts.count == 1) return average_channels(g.N, g.C, pixels, parts, divisor, input, output, stream);
  SumOf<T>* const sums = static_cast<SumOf<T>*>(workspace);
  average_channels(g.N, g.C, pixels, parts, 1, input, sums, stream);
  average_channels(g.N, g.C, parts.count, {1, parts.count}, divisor, sums, output, stream);
}

}  // namespace torchcnn::cuda
