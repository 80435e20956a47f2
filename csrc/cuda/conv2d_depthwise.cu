// Depthwise convolution, one input channel and at most four output channels a group: too few products per element read for a matrix
// product, so that memory sets the pace and each thread computes one element from what it reads.
//
//   forward      output[n, k, p, q]     = sum over r, s of weight[k, r, s] input[n, k / m, p stride - pad + r dilation, ...]
//   grad_input   grad_input[n, c, h, w] = sum over k of the m of channel c, and taps with h + pad - r dilation = p stride
//   grad_weight  grad_weight[k, r, s]   = sum over n, p, q of grad_output[n, k, p, q] input[n, k / m, ...]
//
// m = K / C is the channel multiplier. Neighbouring threads compute neighbours in memory: pixels of a row in NCHW, channels in
// channels_last; what they read twice comes from the L1 cache. grad_weight cuts the sum over pixels into parts, the block's threads
// add theirs up in a tree, and a second kernel adds the parts in order: no atomics, the same bits every time.
#include "conv2d_host.cuh"
#include "conv2d_parts.cuh"

namespace torchcnn::cuda::depthwise {

struct Problem {
  Axis h, w;  // forward
  int images, C, K, multiplier;
  Strides input, output;
};

// Which element of an activation stands at an offset of dense memory.
struct Element {
  int64_t n;
  int c, h, w;
};

__device__ inline Element element_at(int64_t at, const Strides& s, int C, int H, int W) {
  if (s.c == 1 && C > 1) {  // channels_last
    const Counter high = Counter::of(at / C, H, W);
    return {high.a, int(at % C), high.b, high.c};
  }
  const int64_t plane = at / (int64_t(H) * W);
  const Counter in_plane = Counter::of(at - plane * H * W, H, W);
  return {plane / C, int(plane % C), in_plane.b, in_plane.c};
}

template <class T>
__global__ void __launch_bounds__(256) conv2d_depthwise_forward(const Problem problem, const T* input, const T* weight,
                                                                const T* bias, bool relu, T* output, int64_t count) {
  const Axis &h_axis = problem.h, &w_axis = problem.w;
  for (int64_t at = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; at < count; at += int64_t(gridDim.x) * blockDim.x) {
    const Element e = element_at(at, problem.output, problem.K, h_axis.written, w_axis.written);
    const T* plane = input + e.n * problem.input.n + int64_t(e.c / problem.multiplier) * problem.input.c;
    const T* filter = weight + int64_t(e.c) * h_axis.kernel * w_axis.kernel;
    const int top = e.h * h_axis.stride - h_axis.pad, left = e.w * w_axis.stride - w_axis.pad;
    SumOf<T> sum = 0;
    for (int r = 0; r < h_axis.kernel; ++r) {
      const int h = top + r * h_axis.dilation;
      if (unsigned(h) >= unsigned(h_axis.read)) continue;
      for (int s = 0; s < w_axis.kernel; ++s) {
        const int w = left + s * w_axis.dilation;
        if (unsigned(w) < unsigned(w_axis.read))
          sum += to_arithmetic(filter[r * w_axis.kernel + s]) * to_arithmetic(plane[h * problem.input.h + w * problem.input.w]);
      }
    }
    if (bias != nullptr) sum += to_arithmetic(bias[e.c]);
    output[at] = from_arithmetic<T>(relu && sum < 0 ? SumOf<T>(0) : sum);
  }
}

template <class T>
__global__ void __launch_bounds__(256) conv2d_depthwise_grad_input(const Problem problem, const T* grad_output, const T* weight,
                                                                   const T* bias, bool relu, T* grad_input, int64_t count) {
  const Axis &h_axis = problem.h, &w_axis = problem.w;
  for (int64_t at = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; at < count; at += int64_t(gridDim.x) * blockDim.x) {
    const Element e = element_at(at, problem.input, problem.C, h_axis.read, w_axis.read);
    SumOf<T> sum = 0;
    for (int m = 0; m < problem.multiplier; ++m) {
      const int k = e.c * problem.multiplier + m;
      const T* plane = grad_output + e.n * problem.output.n + k * problem.output.c;
      const T* filter = weight + int64_t(k) * h_axis.kernel * w_axis.kernel;
      for (int r = 0; r < h_axis.kernel; ++r) {
        const int h = e.h + h_axis.pad - r * h_axis.dilation, p = h / h_axis.stride;
        if (h < 0 || p * h_axis.stride != h || p >= h_axis.written) continue;
        for (int s = 0; s < w_axis.kernel; ++s) {
          const int w = e.w + w_axis.pad - s * w_axis.dilation, q = w / w_axis.stride;
          if (w >= 0 && q * w_axis.stride == w && q < w_axis.written)
            sum +=
                to_arithmetic(filter[r * w_axis.kernel + s]) * to_arithmetic(plane[p * problem.output.h + q * problem.output.w]);
        }
      }
    }
    if (bias != nullptr) sum += to_arithmetic(bias[e.c]);
    grad_input[at] = from_arithmetic<T>(relu && sum < 0 ? SumOf<T>(0) : sum);
  }
}

// A block for one tap and one part of the pixels: parts[part][k][tap].
template <class T>
__global__ void __launch_bounds__(256, 1)
    conv2d_depthwise_grad_weight_parts(const Problem problem, const T* grad_output, const T* input, int64_t channel_blocks,
                                       int64_t part_pixels, SumOf<T>* parts) {
  const Axis &h_axis = problem.h, &w_axis = problem.w;
  const int taps = h_axis.kernel * w_axis.kernel, tap = int(blockIdx.x % taps);
  const int64_t part = blockIdx.x / taps / channel_blocks;
  const ChannelsAndLanes block(problem.output.c == 1, blockIdx.x / taps % channel_blocks);
  const int64_t k = block.channel;
  const int r = tap / w_axis.kernel, s = tap % w_axis.kernel, P = h_axis.written, Q = w_axis.written;
  const int64_t pixels = int64_t(problem.images) * P * Q, begin = part * part_pixels + block.lane;
  const int64_t end = (part + 1) * part_pixels < pixels ? (part + 1) * part_pixels : pixels;
  SumOf<T> sum = 0;
  if (k < problem.K && begin < end) {
    Counter at = Counter::of(begin, P, Q);
    const Counter step = Counter::of(block.lanes, P, Q);
    for (int64_t pixel = begin; pixel < end; pixel += block.lanes, at.add(step, P, Q)) {
      const int h = at.b * h_axis.stride - h_axis.pad + r * h_axis.dilation;
      const int w = at.c * w_axis.stride - w_axis.pad + s * w_axis.dilation;
      if (unsigned(h) >= unsigned(h_axis.read) || unsigned(w) >= unsigned(w_axis.read)) continue;
      const T gradient =
          grad_output[at.a * problem.output.n + k * problem.output.c + at.b * problem.output.h + at.c * problem.output.w];
      const T value =
          input[at.a * problem.input.n + k / problem.multiplier * problem.input.c + h * problem.input.h + w * problem.input.w];
      sum += to_arithmetic(gradient) * to_arithmetic(value);
    }
  }
  sum = block.add_up(sum);
  if (block.lane == 0 && k < problem.K) parts[(part * problem.K + k) * taps + tap] = sum;
}

namespace {

Problem problem_of(const char* op, const Conv2dGeometry& g) {
  as_int(op, "kernel height * kernel width", checked_mul(g.R, g.S, op, "kernel height * kernel width"));
  return {axis_of(op, "height", g.H, g.P, g.R, g.stride_h, g.pad_h, g.dilation_h, false),
          axis_of(op, "width", g.W, g.Q, g.S, g.stride_w, g.pad_w, g.dilation_w, false),
          as_int(op, "batch", g.N),
          as_int(op, "channels", g.C),
          as_int(op, "channels", g.K),
          int(g.K_per_group()),
          g.input_strides(),
          g.output_strides()};
}

constexpr int64_t kPartPixels = 8192;  // what a block's taps read of a channel stays in the L2 cache

}  // namespace

template <class T>
void conv2d_forward(const Conv2dGeometry& g, const T* input, const T* weight, const Epilogue<T>& epilogue, T* output,
                    Stream stream) {
  const int64_t count = g.N * g.K * g.P * g.Q;
  launch("conv2d", conv2d_depthwise_forward<Device<T>>, blocks_for(count, 256), 256, 0, stream, problem_of("conv2d", g),
         on_device(input), on_device(weight), on_device(epilogue.bias), epilogue.relu, on_device(output), count);
}

template <class T>
void conv2d_grad_input(const Conv2dGeometry& g, const T* grad_output, const T* weight, const Epilogue<T>& epilogue, T* grad_input,
                       Stream stream) {
  const int64_t count = g.N * g.C * g.H * g.W;
  launch("conv2d_grad_input", conv2d_depthwise_grad_input<Device<T>>, blocks_for(count, 256), 256, 0, stream,
         problem_of("conv2d_grad_input", g), on_device(grad_output), on_device(weight), on_device(epilogue.bias), epilogue.relu,
         on_device(grad_input), count);
}

template <class T>
int64_t conv2d_grad_weight_workspace(const Conv2dGeometry& g) {
  return ceil_div(g.N * g.P * g.Q, kPartPixels) * g.K * g.R * g.S * int64_t(sizeof(SumOf<Device<T>>));
}

template <class T>
void conv2d_grad_weight(const Conv2dGeometry& g, const T* grad_output, const T* input, T* grad_weight, void* workspace,
                        Stream stream) {
  const char* op = "conv2d_grad_weight";
  const Problem problem = problem_of(op, g);
  const int64_t parts = ceil_div(g.N * g.P * g.Q, kPartPixels), count = g.K * g.R * g.S;
  const int64_t blocks = channel_blocks(g.K, problem.output.c == 1);
  auto* sums = static_cast<SumOf<Device<T>>*>(workspace);
  launch(op, conv2d_depthwise_grad_weight_parts<Device<T>>,
         block_count(op, checked_mul(parts * blocks, g.R * g.S, op, "thread blocks")), dim3(32, 8), 0, stream, problem,
         on_device(grad_output), on_device(input), blocks, kPartPixels, sums);
  launch("conv2d_add_parts", conv2d_add_parts<Device<T>, SumOf<Device<T>>>, blocks_for(count, 256), 256, 0, stream, sums, parts,
         1, 1, count, on_device(grad_weight));
}

#define TORCHCNN_INSTANTIATE(T)                                                                               \
  template void conv2d_forward(const Conv2dGeometry&, const T*, const T*, const Epilogue<T>&, T*, Stream);    \
  template void conv2d_grad_input(const Conv2dGeometry&, const T*, const T*, const Epilogue<T>&, T*, Stream); \
  template int64_t conv2d_grad_weight_workspace<T>(const Conv2dGeometry&);                                    \
  template void conv2d_grad_weight(const Conv2dGeometry&, const T*, const T*, T*, void*, Stream);
TORCHCNN_INSTANTIATE(float)
TORCHCNN_INSTANTIATE(double)
TORCHCNN_INSTANTIATE(Float16)
TORCHCNN_INSTANTIATE(BFloat16)

}  // namespace torchcnn::cuda::depthwise
