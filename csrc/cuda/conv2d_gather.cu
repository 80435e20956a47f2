// Convolution forward and grad_input as one kernel, an implicit matrix product:
//
//   forward      output[n, k, p, q]     = sum over c, r, s of weight[k, c, r, s] input[n, c, p stride - pad + r dilation, ...]
//   grad_input   grad_input[n, c, h, w] = sum over k, r, s of weight[k, c, r, s] grad_output[n, k, p, q],  h = p stride - pad + r dilation
//
// Rows of the product are pixels of the result, columns its channels, the sum runs over taps and channels of the activation read
// (conv2d_patches.cuh says which). Weights are packed first, in the order in which tiles read them, channels innermost, padded
// with zeros to whole tiles:
//
//   packed[class of taps][group][channel of the result][(i taps_w + j) channels + c]
//
// so that one kernel serves every kernel size, stride, dilation, group and both layouts. Three tiles of the sum are in flight
// (cp.async) while one is multiplied. Method: S. Chetlur et al., "cuDNN: Efficient Primitives for Deep Learning", 2014, section 3.
#include "conv2d_host.cuh"
#include "conv2d_patches.cuh"

namespace torchcnn::cuda {

template <class T>
struct GatherProblem {
  Axis h, w;
  int images, groups, channels_written;  // of a group
  Activation<T> from;
  const T* packed_weight;
  int packed_row;  // elements from channel to channel of the packed weight
  const T* bias;
  bool relu;
  T* to;
  Strides to_strides;
  bool to_pairs;  // whether two neighbouring channels can be written at once
  int64_t tiles_m;
  int tiles_n;
};

template <class T>
struct alignas(2 * sizeof(T)) Pair {
  T first, second;
};

template <class T>
__global__ void conv2d_pack_weight(const GatherProblem<T> problem, bool transposed, int K_per_group, int C_per_group,
                                   const T* weight, T* packed, int64_t count) {
  const Axis &h = problem.h, &w = problem.w;
  const int channels = problem.from.channels;
  for (int64_t at = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; at < count; at += int64_t(gridDim.x) * blockDim.x) {
    const int column = int(at % problem.packed_row);
    int64_t rest = at / problem.packed_row;
    const int written = int(rest % problem.channels_written);
    rest /= problem.channels_written;
    const int group = int(rest % problem.groups), first_h = int(rest / problem.groups) / w.classes(),
              first_w = int(rest / problem.groups) % w.classes();
    const int taps_w = w.taps(first_w), read = column % channels, i = column / channels / taps_w, j = column / channels % taps_w;
    const int r = first_h + i * h.period, s = first_w + j * w.period;
    const int64_t k = int64_t(group) * K_per_group + (transposed ? read : written);
    const int c = transposed ? written : read;
    packed[at] = r < h.kernel ? weight[((k * C_per_group + c) * h.kernel + r) * w.kernel + s] : from_arithmetic<T>(SumOf<T>(0));
  }
}

template <class Math>
__global__ void __launch_bounds__(Math::Shape::threads, 1) conv2d_gather(const GatherProblem<typename Math::T> problem) {
  using Shape = typename Math::Shape;
  using T = typename Math::T;
  if constexpr (!Math::is_compiled) {
    __trap();
    return;
  }
  constexpr int stages = Shape::stages;
  T* const shared = reinterpret_cast<T*>(dynamic_shared_memory());

  int64_t block = blockIdx.x;
  const int tile_n = int(block % problem.tiles_n);
  block /= problem.tiles_n;
  const int64_t tile_m = block % problem.tiles_m;
  block /= problem.tiles_m;
  const int group = int(block % problem.groups), phase = int(block / problem.groups);
  const Phase h = phase_of(problem.h, phase / problem.w.phases()), w = phase_of(problem.w, phase % problem.w.phases());
  const int64_t pixels = int64_t(problem.images) * h.outputs * w.outputs, first_pixel = tile_m * Shape::block_m;
  if (first_pixel >= pixels) return;  // other phases have more

  const Activation<T>& from = problem.from;
  const Share<Shape> share(from.in_vectors), weight_share(true);
  Corner corner[Shape::copies];
#pragma unroll
  for (int copy = 0; copy < Shape::copies; ++copy) {
    const int64_t pixel = first_pixel + share.row(copy);
    const Counter at = Counter::of(pixel, h.outputs, w.outputs);
    corner[copy] = {pixel < pixels ? at.a * from.stride_n + int64_t(group) * from.channels * from.stride_c : -1,
                    at.b * h.step + h.origin, at.c * w.step + w.origin};
  }
  const int depth = h.taps * w.taps * from.channels, tiles = (depth + Shape::block_k - 1) / Shape::block_k;
  Counter tap = {}, tap_step = {};
  if (tiles > 0) {
    tap = Counter::of(share.vector * kVectorSize<T>, w.taps, from.channels);
    tap_step = Counter::of(Shape::block_k, w.taps, from.channels);
  }
  const int first_channel = tile_n * Shape::block_n;
  const int64_t packed_class = int64_t(h.first_tap) * problem.w.classes() + w.first_tap;
  const T* weight = problem.packed_weight +
                    ((packed_class * problem.groups + group) * problem.channels_written + first_channel) * problem.packed_row +
                    weight_share.vector * kVectorSize<T>;

  Piece<T> piece[Shape::copies];
  const auto activation_tile = [&](int tile) { return shared + tile % stages * 2 * Shape::operand_size; };
  const auto weight_tile = [&](int tile) { return activation_tile(tile) + Shape::operand_size; };
  const auto fetch = [&](int tile) {
#pragma unroll
    for (int copy = 0; copy < Shape::copies; ++copy) {
      piece[copy].fetch(from, h, w, problem.h.read, problem.w.read, corner[copy], tap,
                        activation_tile(tile) + share.offset(copy));
      const int row = weight_share.row(copy);
      const bool exists = first_channel + row < problem.channels_written;
      copy_async(weight_tile(tile) + weight_share.offset(copy),
                 weight + (exists ? int64_t(row) * problem.packed_row + tile * Shape::block_k : 0), exists);
    }
    tap.add(tap_step, w.taps, from.channels);
  };
  const auto store = [&](int tile) {
#pragma unroll
    for (int copy = 0; copy < Shape::copies; ++copy) piece[copy].store(from, activation_tile(tile) + share.offset(copy));
  };

  for (int tile = 0; tile < stages - 1; ++tile) {
    if (tile < tiles) {
      fetch(tile);
      store(tile);
    }
    copy_async_commit();
  }
  Math math;
  for (int tile = 0; tile < tiles; ++tile) {
    copy_async_wait<stages - 2>();
    __syncthreads();  // tile has arrived for all, and all have read the one before it, whose place the next to come takes
    const int coming = tile + stages - 1;
    if (coming < tiles) fetch(coming);
    math.step(activation_tile(tile), weight_tile(tile));
    if (coming < tiles) store(coming);
    copy_async_commit();
  }

  const int group_channel = group * problem.channels_written;
  const Strides& s = problem.to_strides;
  math.for_each_pair([&](int m, int n, auto first, auto second) {
    const int64_t pixel = first_pixel + m;
    const int channel = first_channel + n;
    if (pixel >= pixels || channel >= problem.channels_written) return;
    const Counter at = Counter::of(pixel, h.outputs, w.outputs);
    T* to = problem.to + at.a * s.n + (int64_t(at.b) * h.written_step + h.written_origin) * s.h +
            (int64_t(at.c) * w.written_step + w.written_origin) * s.w + int64_t(group_channel + channel) * s.c;
    const auto finished = [&](auto sum, int of_channel) {
      if (problem.bias != nullptr) sum += to_arithmetic(problem.bias[group_channel + of_channel]);
      return from_arithmetic<T>(problem.relu && sum < 0 ? decltype(sum)(0) : sum);
    };
    const bool both = channel + 1 < problem.channels_written;
    if (problem.to_pairs) {
      *reinterpret_cast<Pair<T>*>(to) = {finished(first, channel), finished(second, channel + 1)};
    } else {
      *to = finished(first, channel);
      if (both) to[s.c] = finished(second, channel + 1);
    }
  });
}

namespace {

template <class T>
GatherProblem<T> gather_problem(const char* op, const Conv2dGeometry& g, bool transposed) {
  GatherProblem<T> problem = {};
  problem.h = axis_of(op, "height", g.H, g.P, g.R, g.stride_h, g.pad_h, g.dilation_h, transposed);
  problem.w = axis_of(op, "width", g.W, g.Q, g.S, g.stride_w, g.pad_w, g.dilation_w, transposed);
  problem.images = as_int(op, "batch", g.N);
  problem.groups = as_int(op, "groups", g.G);
  problem.channels_written = as_int(op, "channels", transposed ? g.C_per_group() : g.K_per_group());
  problem.from.channels = as_int(op, "channels", transposed ? g.K_per_group() : g.C_per_group());
  const int64_t depth = checked_mul(int64_t(problem.h.taps(0)) * problem.w.taps(0), problem.from.channels, op, "terms of a sum");
  problem.packed_row = as_int(op, "terms of a sum", round_up(depth, kTileDepthBytes / int64_t(sizeof(T))));
  return problem;
}

template <class T>
int64_t packed_size(const GatherProblem<T>& problem) {
  return int64_t(problem.h.classes()) * problem.w.classes() * problem.groups * problem.channels_written * problem.packed_row;
}

template <class Math>
void run_gather(const char* op, GatherProblem<typename Math::T>& problem, Stream stream) {
  using Shape = typename Math::Shape;
  const int64_t outputs_h = ceil_div(problem.h.written, problem.h.phases()),
                outputs_w = ceil_div(problem.w.written, problem.w.phases());
  problem.tiles_m = ceil_div(checked_mul(outputs_h * outputs_w, problem.images, op, "pixels"), Shape::block_m);
  problem.tiles_n = int(ceil_div(problem.channels_written, Shape::block_n));
  const int64_t phases = int64_t(problem.h.phases()) * problem.w.phases();
  const int64_t per_phase = checked_mul(problem.tiles_m * problem.tiles_n, problem.groups, op, "thread blocks");
  launch(op, conv2d_gather<Math>, block_count(op, checked_mul(phases, per_phase, op, "thread blocks")), Shape::threads,
         Shape::shared_bytes, stream, problem);
}

// The rule for tiles: 128 x 128 where it fills the GPU and the channels fill it. Neither changes a bit of the result.
template <class T, template <class> class Math>
void choose_gather_tile(const char* op, GatherProblem<T>& problem, Stream stream) {
  using Large = TileShape<T, 128, Storage::by_index>;
  const int64_t pixels = int64_t(problem.images) * problem.h.written * problem.w.written;
  const int64_t blocks = ceil_div(pixels, 128) * ceil_div(problem.channels_written, 128) * problem.groups;
  if (problem.channels_written > 64 && blocks >= kBlocksThatFillAGpu)
    run_gather<Math<Large>>(op, problem, stream);
  else
    run_gather<Math<TileShape<T, 64, Storage::by_index>>>(op, problem, stream);
}

template <class T>
void gather(const char* op, const Conv2dGeometry& g, bool transposed, const Device<T>* from, const Device<T>* weight,
            const Device<T>* bias, bool relu, Device<T>* to, Float32Precision precision, void* workspace, Stream stream) {
  using D = Device<T>;
  GatherProblem<D> problem = gather_problem<D>(op, g, transposed);
  problem.from = activation(from, transposed ? g.output_strides() : g.input_strides(), problem.from.channels);
  problem.bias = bias;
  problem.relu = relu;
  problem.to = to;
  problem.to_strides = transposed ? g.input_strides() : g.output_strides();
  problem.to_pairs = problem.to_strides.c == 1 && problem.channels_written % 2 == 0;
  D* packed = static_cast<D*>(workspace);
  problem.packed_weight = packed;
  const int64_t count = packed_size(problem);
  if (count > 0)  // else no channel is read, and the bias is all
    launch("conv2d_pack_weight", conv2d_pack_weight<D>, blocks_for(count, 256), 256, 0, stream, problem, transposed,
           int(g.K_per_group()), int(g.C_per_group()), weight, packed, count);
  if constexpr (sizeof(T) == 8) {
    run_gather<SimtMath<TileShape<D, 64, Storage::by_index>>>(op, problem, stream);
  } else if (has_tensor_cores() && (sizeof(T) == 2 || precision == Float32Precision::tf32)) {
    choose_gather_tile<D, TensorMath>(op, problem, stream);
  } else if constexpr (sizeof(T) == 2) {
    run_gather<SimtMath<TileShape<D, 64, Storage::by_index>>>(op, problem, stream);
  } else {
    choose_gather_tile<D, SimtMath>(op, problem, stream);
  }
}

}  // namespace

template <class T>
int64_t gather_workspace(const char* op, const Conv2dGeometry& g, bool transposed) {
  return packed_size(gather_problem<Device<T>>(op, g, transposed)) * int64_t(sizeof(T));
}

template <class T>
int64_t conv2d_forward_workspace(const Conv2dGeometry& g) {
  return suits_depthwise(g) ? 0 : gather_workspace<T>("conv2d", g, false);
}

template <class T>
void conv2d_forward(const Conv2dGeometry& g, const T* input, const T* weight, const Epilogue<T>& epilogue, T* output,
                    Float32Precision precision, void* workspace, Stream stream) {
  if (suits_depthwise(g)) return depthwise::conv2d_forward(g, input, weight, epilogue, output, stream);
  gather<T>("conv2d", g, false, on_device(input), on_device(weight), on_device(epilogue.bias), epilogue.relu, on_device(output),
            precision, workspace, stream);
}

template <class T>
int64_t conv2d_grad_input_workspace(const Conv2dGeometry& g) {
  return suits_depthwise(g) ? 0 : gather_workspace<T>("conv2d_grad_input", g, true);
}

template <class T>
void conv2d_grad_input(const Conv2dGeometry& g, const T* grad_output, const T* weight, const Epilogue<T>& epilogue, T* grad_input,
                       Float32Precision precision, void* workspace, Stream stream) {
  if (suits_depthwise(g)) return depthwise::conv2d_grad_input(g, grad_output, weight, epilogue, grad_input, stream);
  gather<T>("conv2d_grad_input", g, true, on_device(grad_output), on_device(weight), on_device(epilogue.bias), epilogue.relu,
            on_device(grad_input), precision, workspace, stream);
}

#define TORCHCNN_INSTANTIATE(T)                                                                                               \
  template int64_t conv2d_forward_workspace<T>(const Conv2dGeometry&);                                                        \
  template int64_t conv2d_grad_input_workspace<T>(const Conv2dGeometry&);                                                     \
  template void conv2d_forward(const Conv2dGeometry&, const T*, const T*, const Epilogue<T>&, T*, Float32Precision, void*,    \
                               Stream);                                                                                       \
  template void conv2d_grad_input(const Conv2dGeometry&, const T*, const T*, const Epilogue<T>&, T*, Float32Precision, void*, \
                                  Stream);
TORCHCNN_INSTANTIATE(float)
TORCHCNN_INSTANTIATE(double)
TORCHCNN_INSTANTIATE(Float16)
TORCHCNN_INSTANTIATE(BFloat16)

}  // namespace torchcnn::cuda
