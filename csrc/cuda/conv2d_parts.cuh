// Sums over all pixels of a batch, which no single thread block adds up: parts of them go to scratch memory, then a kernel adds
// the parts in order. No atomic addition, so which block comes first does not matter. Where one block is enough for a result,
// there is one part, which is the result.
#pragma once

#include "conv2d_host.cuh"

namespace torchcnn::cuda {

// How a sum is cut: into parts of `size` rounds of a block, of so many that all blocks together fill an H100, but no smaller than
// makes a block worthwhile.
struct Cut {
  int64_t parts, size;
};

inline Cut cut_of(int64_t rounds, int64_t least_rounds, int64_t blocks_of_a_part) {
  constexpr int64_t enough_blocks = 528;  // four for each of 132 multiprocessors
  const int64_t size = std::max(least_rounds, ceil_div(rounds * blocks_of_a_part, enough_blocks));
  return {ceil_div(rounds, size), size};
}

// Where the blocks' sums go: to `result` if there is one part, else to parts[part][at], for `count` sums.
template <class T, class Sum>
struct PartSums {
  T* result;
  Sum* parts;
  int64_t part_count, count;

  __device__ void put(int64_t part, int64_t at, Sum sum) const {
    if (part_count == 1)
      result[at] = from_arithmetic<T>(sum);
    else
      parts[part * count + at] = sum;
  }
};

// The sum over the threads of a warp, in a tree; right in lane 0.
template <class Sum>
__device__ Sum add_up_warp(Sum sum) {
#pragma unroll
  for (int by = 16; by > 0; by /= 2) sum += __shfl_down_sync(0xffffffffu, sum, by);
  return sum;
}

// Neighbours in memory, which a thread reads at once if they are aligned for that.
template <class T, int V>
struct alignas(sizeof(T) * V) Neighbours {
  T of[V];
};

template <int V, bool kAligned, class T>
__device__ __forceinline__ Neighbours<T, V> load_neighbours(const T* from) {
  if constexpr (kAligned) {
    return *reinterpret_cast<const Neighbours<T, V>*>(from);
  } else {
    Neighbours<T, V> neighbours;
#pragma unroll
    for (int v = 0; v < V; ++v) neighbours.of[v] = from[v];
    return neighbours;
  }
}

template <int V, class T>
bool is_aligned(const T* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % (sizeof(T) * V) == 0;
}

constexpr int kAddThreads = 256;

// Threads of a block that share sums over parts. Their number must not depend on the GPU: it decides the order of a sum.
__host__ __device__ inline int sharers_of(int64_t part_count) { return part_count > 64 ? 32 : part_count > 16 ? 8 : 1; }

// A sum of parts[0 ... part_count - 1][at], at = (k taps + tap) channels + c, is element at of the result, or if it is in NCHW,
// element (k channels + c) taps + tap. A thread adds up V neighbours; of S sharers, number i adds the parts i, i + S, ..., and
// the first adds up what the S have found.
template <class T, int V, class Sum>
__global__ void __launch_bounds__(kAddThreads)
    conv2d_add_parts(const Sum* parts, int64_t part_count, int channels, int taps, bool channels_last, int64_t count, T* to) {
  __shared__ Sum sums[V][kAddThreads];
  const int sharers = sharers_of(part_count), width = kAddThreads / sharers;
  const int number = int(threadIdx.x) / width, column = int(threadIdx.x) % width;
  for (int64_t first = int64_t(blockIdx.x) * width * V; first < count; first += int64_t(gridDim.x) * width * V) {
    const int64_t at = first + column * V;
    Sum sum[V] = {};
    if (at < count) {
      const Sum* from = parts + number * count + at;
#pragma unroll(V > 1 ? 4 : 8)
      for (int64_t part = number; part < part_count; part += sharers, from += sharers * count) {
        const auto values = load_neighbours<V, true>(from);
#pragma unroll
        for (int v = 0; v < V; ++v) sum[v] += values.of[v];
      }
    }
    if (sharers > 1) {
      __syncthreads();  // the sums of the round before have been read
#pragma unroll
      for (int v = 0; v < V; ++v) sums[v][threadIdx.x] = sum[v];
      __syncthreads();
      if (number > 0) continue;
      for (int other = 1; other < sharers; ++other)
#pragma unroll
        for (int v = 0; v < V; ++v) sum[v] += sums[v][other * width + column];
    }
    if (at >= count) continue;
    if (channels_last) {
      Neighbours<T, V> written;
#pragma unroll
      for (int v = 0; v < V; ++v) written.of[v] = from_arithmetic<T>(sum[v]);
      *reinterpret_cast<Neighbours<T, V>*>(to + at) = written;
      continue;
    }
    Counter place = Counter::of(at, taps, channels);
#pragma unroll
    for (int v = 0; v < V; ++v, place.add({0, 0, 1}, taps, channels))
      to[(int64_t(place.a) * channels + place.c) * taps + place.b] = from_arithmetic<T>(sum[v]);
  }
}

// The order of a sum is the same for every V.
template <class T, class Sum>
void add_parts(const Sum* parts, int64_t part_count, int channels, int taps, Layout layout, int64_t count, T* to, Stream stream) {
  constexpr int V = 16 / sizeof(Sum);
  const int64_t threads = count * sharers_of(part_count);
  const bool last = layout == Layout::channels_last;
  const auto run = [&](auto kernel, int64_t neighbours) {
    launch("conv2d_add_parts", kernel, blocks_for(ceil_div(threads, neighbours), kAddThreads), kAddThreads, 0, stream, parts,
           part_count, channels, taps, last, count, to);
  };
  if (count % V == 0 && is_aligned<V>(parts) && is_aligned<V>(to))
    run(conv2d_add_parts<T, V, Sum>, V);
  else
    run(conv2d_add_parts<T, 1, Sum>, 1);
}

}  // namespace torchcnn::cuda
