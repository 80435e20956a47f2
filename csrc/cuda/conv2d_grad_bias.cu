// Convolution grad_bias, the sum of each channel of the output's gradient:
//
//   grad_bias[k] = sum over n, p, q of grad_output[n, k, p, q]
//
// A thread adds up vectors of V = 16 bytes where the sizes allow it, else single elements, V sums at once. In NCHW the vectors of
// a channel belong to one block, or to as many as there are parts; in channels_last, thread t of a block takes vector t % vectors
// of every so-many-th pixel. The order of a sum depends on the geometry and the dtype alone.
#include "conv2d_parts.cuh"

namespace torchcnn::cuda {

constexpr int kBiasThreads = 256;

template <class T, int V, bool kAligned>
__global__ void __launch_bounds__(kBiasThreads)
    conv2d_grad_bias_planes(const T* gradient, int K, int plane_vectors, int64_t vectors, Strides s, int64_t part_vectors,
                            PartSums<T, SumOf<T>> to) {
  const int k = int(blockIdx.x) % K, part = int(blockIdx.x) / K;
  const int64_t begin = part * part_vectors, end = begin + part_vectors < vectors ? begin + part_vectors : vectors;
  const int count = int(end - begin);
  Counter at = Counter::of(begin + threadIdx.x, 1, plane_vectors);
  const Counter step = Counter::of(kBiasThreads, 1, plane_vectors);
  SumOf<T> sums[V] = {};
#pragma unroll 4
  for (int i = threadIdx.x; i < count; i += kBiasThreads, at.add(step, 1, plane_vectors)) {
    const auto values = load_neighbours<V, kAligned>(gradient + at.a * s.n + k * s.c + int64_t(at.c) * V);
#pragma unroll
    for (int v = 0; v < V; ++v) sums[v] += to_arithmetic(values.of[v]);
  }
  SumOf<T> sum = 0;
#pragma unroll
  for (int v = 0; v < V; ++v) sum += sums[v];
  __shared__ SumOf<T> warps[kBiasThreads / 32];
  sum = add_up_warp(sum);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x > 0) return;
  for (int warp = 1; warp < kBiasThreads / 32; ++warp) sum += warps[warp];
  to.put(part, k, sum);
}

template <class T, int V, bool kAligned>
__global__ void __launch_bounds__(kBiasThreads)
    conv2d_grad_bias_pixels(const T* gradient, int K, int channel_blocks, int vectors, int lanes, int64_t pixels,
                            int64_t part_pixels, PartSums<T, SumOf<T>> to) {
  const int part = int(blockIdx.x) / channel_blocks, vector = int(threadIdx.x) % vectors, lane = int(threadIdx.x) / vectors;
  const int first = int(blockIdx.x) % channel_blocks * vectors * V, k = first + vector * V;
  const int64_t begin = part * part_pixels, end = begin + part_pixels < pixels ? begin + part_pixels : pixels;
  SumOf<T> sums[V] = {};
  if (k < K) {
    const T* from = gradient + (begin + lane) * K + k;
    const int64_t step = int64_t(lanes) * K;
    const int count = int(end - begin);
#pragma unroll 4
    for (int i = lane; i < count; i += lanes, from += step) {
      const auto values = load_neighbours<V, kAligned>(from);
#pragma unroll
      for (int v = 0; v < V; ++v) sums[v] += to_arithmetic(values.of[v]);
    }
  }
  __shared__ SumOf<T> shared[V][kBiasThreads];
#pragma unroll
  for (int v = 0; v < V; ++v) shared[v][threadIdx.x] = sums[v];
  __syncthreads();
  for (int i = threadIdx.x; i < vectors * V; i += blockDim.x) {
    const int of = i % vectors, v = i / vectors;
    SumOf<T> sum = 0;
    for (int other = 0; other < lanes; ++other) sum += shared[v][other * vectors + of];
    if (first + of * V < K) to.put(part, first + of * V + v, sum);
  }
}

namespace {

// A round is what a block reads at once; its threads should have several loads under way.
constexpr int64_t kLeastRounds = 4;

struct Plan {
  bool channels_last, in_vectors;
  int vectors, lanes, channel_blocks;  // of a block: vectors of channels and pixels of each
  Cut cut;
};

template <class T>
Plan plan_of(const char* op, const Conv2dGeometry& g) {
  constexpr int64_t V = kVectorSize<T>, block_vectors = 8;
  const int64_t pixels = g.P * g.Q;
  const bool last = g.output_strides().c == 1 && g.K > 1, in_vectors = (last ? g.K : pixels) % V == 0;
  const int64_t all = ceil_div(last ? g.K : g.N * pixels, in_vectors ? V : 1);
  if (!last)
    return {
        last, in_vectors, 1, kBiasThreads, as_int(op, "channels", g.K), cut_of(ceil_div(all, kBiasThreads), kLeastRounds, g.K)};
  const int64_t channel_blocks = ceil_div(all, in_vectors ? block_vectors : 32), vectors = ceil_div(all, channel_blocks);
  const int64_t lanes = kBiasThreads / vectors;
  return {last,
          in_vectors,
          int(vectors),
          int(lanes),
          as_int(op, "channels", channel_blocks),
          cut_of(ceil_div(g.N * pixels, lanes), kLeastRounds, channel_blocks)};
}

template <int V, bool kAligned, class T>
void run_grad_bias(const char* op, const Conv2dGeometry& g, const Plan& plan, const T* gradient, const PartSums<T, SumOf<T>>& to,
                   Stream stream) {
  const unsigned blocks = block_count(op, checked_mul(plan.cut.parts, plan.channel_blocks, op, "thread blocks"));
  const int K = as_int(op, "channels", g.K);
  if (plan.channels_last)
    launch(op, conv2d_grad_bias_pixels<T, V, kAligned>, blocks, plan.vectors * plan.lanes, 0, stream, gradient, K,
           plan.channel_blocks, plan.vectors, plan.lanes, g.N * g.P * g.Q, plan.cut.size * plan.lanes, to);
  else
    launch(op, conv2d_grad_bias_planes<T, V, kAligned>, blocks, kBiasThreads, 0, stream, gradient, K,
           as_int(op, "output height * output width", g.P * g.Q / V), g.N * g.P * g.Q / V, g.output_strides(),
           plan.cut.size * kBiasThreads, to);
}

}  // namespace

template <class T>
int64_t conv2d_grad_bias_workspace(const Conv2dGeometry& g) {
  const int64_t parts = plan_of<Device<T>>("conv2d_grad_bias", g).cut.parts;
  return parts == 1 ? 0 : parts * g.K * int64_t(sizeof(SumOf<T>));
}

template <class T>
void conv2d_grad_bias(const Conv2dGeometry& g, const T* grad_output, T* grad_bias, void* workspace, Stream stream) {
  using D = Device<T>;
  const char* op = "conv2d_grad_bias";
  const Plan plan = plan_of<D>(op, g);
  const PartSums<D, SumOf<D>> to{on_device(grad_bias), static_cast<SumOf<D>*>(workspace), plan.cut.parts, g.K};
  const D* gradient = on_device(grad_output);
  if (!plan.in_vectors)
    run_grad_bias<1, true>(op, g, plan, gradient, to, stream);
  else if (is_aligned<kVectorSize<D>>(gradient))
    run_grad_bias<kVectorSize<D>, true>(op, g, plan, gradient, to, stream);
  else
    run_grad_bias<kVectorSize<D>, false>(op, g, plan, gradient, to, stream);
  if (plan.cut.parts > 1) add_parts(to.parts, to.part_count, 1, 1, Layout::nchw, to.count, to.result, stream);
}

#define TORCHCNN_INSTANTIATE(T)                                          \
  template int64_t conv2d_grad_bias_workspace<T>(const Conv2dGeometry&); \
  template void conv2d_grad_bias(const Conv2dGeometry&, const T*, T*, void*, Stream);
TORCHCNN_INSTANTIATE(float)
TORCHCNN_INSTANTIATE(double)
TORCHCNN_INSTANTIATE(Float16)
TORCHCNN_INSTANTIATE(BFloat16)

}  // namespace torchcnn::cuda
