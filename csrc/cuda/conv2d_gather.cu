// Convolution forward and grad_input as one kernel, an implicit matrix product:
//
//   forward      output[n, k, p, q]     = sum over c, r, s of weight[k, c, r, s] input[n, c, p stride - pad + r dilation, ...]
//   grad_input   grad_input[n, c, h, w] = sum over k, r, s of weight[k, c, r, s] grad_output[n, k, p, q]
//                                         where h = p stride - pad + r dilation
//
// Rows of the product are pixels of the result, columns its channels, the sum runs over taps and channels of the activation read
// (conv2d_patches.cuh says which). Weights are packed first, in the order in which tiles read them, channels innermost, padded
// with zeros to whole tiles:
//
//   packed[class of taps][group][channel of the result][(i taps_w + j) channels + c]
//
// so that one kernel serves every kernel size, stride, dilation and group. An activation whose channels are not whole vectors,
// one in NCHW say, is copied into that form first. Tiles of the sum are on their way (cp.async) while one is multiplied. Method:
// S. Chetlur et al., "cuDNN: Efficient Primitives for Deep Learning", 2014, section 3.
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
  bool to_vectors;  // whether whole vectors of channels can be written
  int64_t tiles_m;
  int tiles_n;
};

constexpr int kPackThreads = 256, kPackColumns = 4 * kPackThreads;

// A block has kPackColumns columns of one row: blockIdx.x = row * blocks_per_row + part of the row.
template <class T>
__global__ void __launch_bounds__(kPackThreads)
    conv2d_pack_weight(const GatherProblem<T> problem, bool transposed, int K_per_group, int C_per_group, unsigned blocks_per_row,
                       const T* weight, T* packed) {
  const Axis &h = problem.h, &w = problem.w;
  const unsigned row = blockIdx.x / blocks_per_row;
  const unsigned written = row % problem.channels_written, rest = row / problem.channels_written;
  const unsigned group = rest % problem.groups, taps_class = rest / problem.groups;
  const int first_h = taps_class / w.classes(), first_w = taps_class % w.classes();
  const int taps_h = h.taps(first_h), taps_w = w.taps(first_w), channels = problem.from.channels;
  const int read_channels = transposed ? K_per_group : C_per_group;
  const int64_t tap_count = int64_t(h.kernel) * w.kernel, read_step = transposed ? C_per_group * tap_count : tap_count;
  const T* from =
      weight + (int64_t(group) * K_per_group * C_per_group + written * int64_t(transposed ? 1 : C_per_group)) * tap_count;
  T* const to = packed + int64_t(row) * problem.packed_row;
  int column = blockIdx.x % blocks_per_row * kPackColumns + threadIdx.x;
  Counter at = Counter::of(column, taps_w, channels);  // tap and channel
  const Counter step = Counter::of(kPackThreads, taps_w, channels);
#pragma unroll
  for (int i = 0; i < kPackColumns / kPackThreads; ++i, column += kPackThreads, at.add(step, taps_w, channels)) {
    if (column >= problem.packed_row) return;
    T value = from_arithmetic<T>(SumOf<T>(0));  // where it fills a vector of channels or a tile
    if (at.a < taps_h && at.c < read_channels)
      value = from[at.c * read_step + int64_t(first_h + at.a * h.period) * w.kernel + first_w + at.b * w.period];
    to[column] = value;
  }
}

// Writes a tile of results: through shared memory, so that neighbouring threads write neighbours in memory, channels or pixels.
template <class Math>
__device__ __forceinline__ void write_tile(const GatherProblem<typename Math::T>& problem, const Math& math, const Phase& h,
                                           const Phase& w, int64_t first_pixel, int64_t pixels, int64_t group_channel,
                                           int first_channel) {
  using Shape = typename Math::Shape;
  using T = typename Math::T;
  constexpr int V = kVectorSize<T>, pitch_n = Shape::block_n + V, pitch_m = Shape::block_m + V;
  T* const tile = reinterpret_cast<T*>(dynamic_shared_memory());
  int64_t* const places = reinterpret_cast<int64_t*>(tile + Shape::block_m * pitch_n + Shape::block_n * V);
  static_assert((Shape::block_m * pitch_n + Shape::block_n * V) * sizeof(T) + Shape::block_m * 8 <= Shape::shared_bytes);
  const Strides& s = problem.to_strides;
  const bool channels_last = s.c == 1;
  __syncthreads();  // all have read the last tile of the sum
  for (int m = threadIdx.x; m < Shape::block_m; m += Shape::threads) {
    const Counter at = Counter::of(first_pixel + m, h.outputs, w.outputs);
    places[m] = first_pixel + m < pixels
                    ? at.a * s.n + (int64_t(at.b) * h.written_step + h.written_origin) * s.h +
                          (int64_t(at.c) * w.written_step + w.written_origin) * s.w + (group_channel + first_channel) * s.c
                    : -1;
  }
  const auto finished = [&](auto sum, int n) {
    if (problem.bias != nullptr && first_channel + n < problem.channels_written)
      sum += to_arithmetic(problem.bias[group_channel + first_channel + n]);
    return from_arithmetic<T>(problem.relu && sum < 0 ? decltype(sum)(0) : sum);
  };
  math.for_each_pair([&](int m, int n, auto first, auto second) {
    if (channels_last) {
      *reinterpret_cast<Run<T, 2>*>(tile + m * pitch_n + n) = {finished(first, n), finished(second, n + 1)};
    } else {
      tile[n * pitch_m + m] = finished(first, n);
      tile[(n + 1) * pitch_m + m] = finished(second, n + 1);
    }
  });
  __syncthreads();
  if (channels_last && problem.to_vectors) {
    constexpr int vectors = Shape::block_n / V;
    for (int at = threadIdx.x; at < Shape::block_m * vectors; at += Shape::threads) {
      const int m = at / vectors, n = at % vectors * V;
      if (places[m] >= 0 && first_channel + n < problem.channels_written)
        *reinterpret_cast<Run<T, V>*>(problem.to + places[m] + n) = *reinterpret_cast<const Run<T, V>*>(tile + m * pitch_n + n);
    }
    return;
  }
  for (int at = threadIdx.x; at < Shape::block_m * Shape::block_n; at += Shape::threads) {
    const int m = channels_last ? at / Shape::block_n : at % Shape::block_m;
    const int n = channels_last ? at % Shape::block_n : at / Shape::block_m;
    if (places[m] >= 0 && first_channel + n < problem.channels_written)
      problem.to[places[m] + n * s.c] = tile[channels_last ? m * pitch_n + n : n * pitch_m + m];
  }
}

template <class Math>
__global__ void __launch_bounds__(Math::Shape::threads, Math::blocks_at_once)
    conv2d_gather(const GatherProblem<typename Math::T> problem) {
  using Shape = typename Math::Shape;
  using A = typename Shape::A;
  using B = typename Shape::B;
  using T = typename Math::T;
  if constexpr (!Math::is_compiled) {
    __trap();
    return;
  }

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
  Corner<T> corner[A::copies];
#pragma unroll
  for (int copy = 0; copy < A::copies; ++copy) {
    const int64_t pixel = first_pixel + A::own_row(copy);
    const Counter at = Counter::of(pixel, h.outputs, w.outputs);
    const int y = at.b * h.step + h.origin, x = at.c * w.step + w.origin;
    corner[copy] = {from.data + at.a * from.stride_n + y * from.stride_h + x * from.stride_w + int64_t(group) * from.channels,
                    pixel < pixels ? y : kNowhere, x};
  }
  const int depth = h.taps * w.taps * from.channels, tiles = (depth + Shape::block_k - 1) / Shape::block_k;
  Counter tap = {}, tap_step = {};
  if (tiles > 0) {
    tap = Counter::of(A::own_vector() * kVectorSize<T>, w.taps, from.channels);
    tap_step = Counter::of(Shape::block_k, w.taps, from.channels);
  }
  const int first_channel = tile_n * Shape::block_n;
  const int64_t packed_class = int64_t(h.first_tap) * problem.w.classes() + w.first_tap;
  const T* weight = problem.packed_weight +
                    ((packed_class * problem.groups + group) * problem.channels_written + first_channel + B::own_row(0)) *
                        int64_t(problem.packed_row) +
                    B::own_vector() * kVectorSize<T>;
  const int own_channels = problem.channels_written - first_channel - B::own_row(0);  // beyond them are zeros

  const auto fetch = [&](int, T* activation_tile, T* weight_tile) {
    const TapOffset offset = tap_offset(from, h, w, tap);
#pragma unroll
    for (int copy = 0; copy < A::copies; ++copy) copy_vector(from, corner[copy], offset, activation_tile + A::own_offset(copy));
#pragma unroll
    for (int copy = 0; copy < B::copies; ++copy) {
      const bool exists = copy * B::rows_at_once < own_channels;
      copy_async(weight_tile + B::own_offset(copy),
                 exists ? weight + int64_t(copy * B::rows_at_once) * problem.packed_row : problem.packed_weight, exists);
    }
    weight += Shape::block_k;
    tap.add(tap_step, w.taps, from.channels);
  };
  Math math;
  add_up_tiles(math, tiles, fetch);
  write_tile(problem, math, h, w, first_pixel, pixels, int64_t(group) * problem.channels_written, first_channel);
}

namespace {

// Everything but data: sizes, strides, what the packed weight is like.
template <class T>
GatherProblem<T> gather_problem(const char* op, const Conv2dGeometry& g, bool transposed) {
  GatherProblem<T> problem = {};
  problem.h = axis_of(op, "height", g.H, g.P, g.R, g.stride_h, g.pad_h, g.dilation_h, transposed);
  problem.w = axis_of(op, "width", g.W, g.Q, g.S, g.stride_w, g.pad_w, g.dilation_w, transposed);
  problem.images = as_int(op, "batch", g.N);
  problem.groups = as_int(op, "groups", g.G);
  problem.channels_written = as_int(op, "channels", transposed ? g.C_per_group() : g.K_per_group());
  problem.from.channels = as_int(op, "channels", round_up(transposed ? g.K_per_group() : g.C_per_group(), kVectorSize<T>));
  const int64_t depth = checked_mul(int64_t(problem.h.taps(0)) * problem.w.taps(0), problem.from.channels, op, "terms of a sum");
  problem.packed_row = as_int(op, "terms of a sum", round_up(depth, kTileDepthBytes / int64_t(sizeof(T))));
  return problem;
}

template <class T>
int64_t packed_rows(const GatherProblem<T>& problem) {
  return int64_t(problem.h.classes()) * problem.w.classes() * problem.groups * problem.channels_written;
}

template <class T>
int64_t packed_bytes(const GatherProblem<T>& problem) {
  return round_up(packed_rows(problem) * problem.packed_row * int64_t(sizeof(T)), kAlignment);
}

template <class T>
Vectors<T> vectors_read(const char* op, const Conv2dGeometry& g, bool transposed, const T* data) {
  const int channels = as_int(op, "channels", transposed ? g.K_per_group() : g.C_per_group());
  if (transposed) return {data, g.output_strides(), g.N, int(g.P), int(g.Q), int(g.G), channels};
  return {data, g.input_strides(), g.N, int(g.H), int(g.W), int(g.G), channels};
}

template <class T>
int64_t blocks_of(const GatherProblem<T>& problem, int block_m, int block_n) {
  const int64_t pixels = int64_t(problem.images) * problem.h.written * problem.w.written;
  return ceil_div(pixels, block_m) * ceil_div(problem.channels_written, block_n) * problem.groups;
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

// The rule for tiles: the largest that fills the GPU and that the channels fill. None changes a bit of the result.
template <class T, template <class> class Math, class Small>
void choose_gather_tile(const char* op, GatherProblem<T>& problem, Stream stream) {
  using Large = TileShape<T, 128, 128, Storage::by_index>;
  using Tall = TileShape<T, 128, 64, Storage::by_index>;
  if (problem.channels_written > 64 && blocks_of(problem, 128, 128) >= kBlocksThatFillAGpu &&
      most_shared_bytes() >= int64_t(Large::shared_bytes))
    run_gather<Math<Large>>(op, problem, stream);
  else if (blocks_of(problem, 128, 64) >= kBlocksThatFillAGpu && most_shared_bytes() >= int64_t(Tall::shared_bytes))
    run_gather<Math<Tall>>(op, problem, stream);
  else
    run_gather<Math<Small>>(op, problem, stream);
}

template <class T>
void gather(const char* op, const Conv2dGeometry& g, bool transposed, const Device<T>* from, const Device<T>* weight,
            const Device<T>* bias, bool relu, Device<T>* to, Float32Precision precision, void* workspace, Stream stream) {
  using D = Device<T>;
  char* scratch = static_cast<char*>(workspace);
  GatherProblem<D> problem = gather_problem<D>(op, g, transposed);
  D* packed = reinterpret_cast<D*>(scratch);
  scratch += packed_bytes(problem);
  problem.from = vectors_read(op, g, transposed, from).get(op, scratch, stream);
  problem.packed_weight = packed;
  problem.bias = bias;
  problem.relu = relu;
  problem.to = to;
  problem.to_strides = transposed ? g.input_strides() : g.output_strides();
  problem.to_vectors = problem.to_strides.c == 1 && problem.channels_written % kVectorSize<D> == 0 &&
                       reinterpret_cast<uintptr_t>(to) % kVectorBytes == 0;
  const int64_t rows = packed_rows(problem), per_row = ceil_div(problem.packed_row, kPackColumns);
  if (rows * per_row > 0)  // else no channel is read, and the bias is all
    launch(op, conv2d_pack_weight<D>, block_count(op, checked_mul(rows, per_row, op, "thread blocks")), kPackThreads, 0, stream,
           problem, transposed, int(g.K_per_group()), int(g.C_per_group()), unsigned(per_row), weight, packed);
  using Small = TileShape<D, 64, 64, Storage::by_index>;
  using SmallTensor = TileShape<D, 64, 64, Storage::by_index, 256>;
  if constexpr (sizeof(T) == 8) {
    run_gather<SimtMath<Small>>(op, problem, stream);
  } else if (sizeof(T) == 2 && has_warpgroup_steps()) {
    if constexpr (sizeof(T) == 2) choose_gather_tile<D, WarpgroupMath, SmallTensor>(op, problem, stream);
  } else if (has_tensor_cores() && (sizeof(T) == 2 || precision == Float32Precision::tf32)) {
    choose_gather_tile<D, TensorMath, SmallTensor>(op, problem, stream);
  } else if constexpr (sizeof(T) == 2) {
    run_gather<SimtMath<Small>>(op, problem, stream);
  } else {
    choose_gather_tile<D, SimtMath, Small>(op, problem, stream);
  }
}

template <class T>
int64_t gather_workspace(const char* op, const Conv2dGeometry& g, bool transposed, const T* from) {
  using D = Device<T>;
  return packed_bytes(gather_problem<D>(op, g, transposed)) + vectors_read(op, g, transposed, on_device(from)).workspace();
}

}  // namespace

template <class T>
int64_t conv2d_forward_workspace(const Conv2dGeometry& g, const T* input) {
  return suits_depthwise(g) ? 0 : gather_workspace("conv2d", g, false, input);
}

template <class T>
void conv2d_forward(const Conv2dGeometry& g, const T* input, const T* weight, const Epilogue<T>& epilogue, T* output,
                    Float32Precision precision, void* workspace, Stream stream) {
  if (suits_depthwise(g)) return depthwise::conv2d_forward(g, input, weight, epilogue, output, stream);
  gather<T>("conv2d", g, false, on_device(input), on_device(weight), on_device(epilogue.bias), epilogue.relu, on_device(output),
            precision, workspace, stream);
}

template <class T>
int64_t conv2d_grad_input_workspace(const Conv2dGeometry& g, const T* grad_output) {
  return suits_depthwise(g) ? 0 : gather_workspace("conv2d_grad_input", g, true, grad_output);
}

template <class T>
void conv2d_grad_input(const Conv2dGeometry& g, const T* grad_output, const T* weight, const Epilogue<T>& epilogue, T* grad_input,
                       Float32Precision precision, void* workspace, Stream stream) {
  if (suits_depthwise(g)) return depthwise::conv2d_grad_input(g, grad_output, weight, epilogue, grad_input, stream);
  gather<T>("conv2d_grad_input", g, true, on_device(grad_output), on_device(weight), on_device(epilogue.bias), epilogue.relu,
            on_device(grad_input), precision, workspace, stream);
}

#define TORCHCNN_INSTANTIATE(T)                                                                                               \
  template int64_t conv2d_forward_workspace(const Conv2dGeometry&, const T*);                                                 \
  template int64_t conv2d_grad_input_workspace(const Conv2dGeometry&, const T*);                                              \
  template void conv2d_forward(const Conv2dGeometry&, const T*, const T*, const Epilogue<T>&, T*, Float32Precision, void*,    \
                               Stream);                                                                                       \
  template void conv2d_grad_input(const Conv2dGeometry&, const T*, const T*, const Epilogue<T>&, T*, Float32Precision, void*, \
                                  Stream);
TORCHCNN_INSTANTIATE(float)
TORCHCNN_INSTANTIATE(double)
TORCHCNN_INSTANTIATE(Float16)
TORCHCNN_INSTANTIATE(BFloat16)

}  // namespace torchcnn::cuda
