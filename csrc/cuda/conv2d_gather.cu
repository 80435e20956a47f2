// Convolution forward and grad_input as one kernel, an implicit matrix product:
//
//   forward      output[n, k, p, q]     = sum over c, r, s of weight[k, c, r, s] input[n, c, p stride - pad + r dilation, ...]
//   grad_input   grad_input[n, c, h, w] = sum over k, r, s of weight[k, c, r, s] grad_output[n, k, p, q]
//                                         where h = p stride - pad + r dilation
//
// Rows of the product are pixels of the result, columns its channels, the sum runs over taps and channels of the activation read
// (conv2d_patches.cuh says which). Weights are read as rows of one channel of the result, for each tap the channels of the sum,
// in whole vectors:
//
//   weight[channel of the result, of all groups][r S + s][channel of the sum]
//
// which is how a weight in channels_last lies in memory if it is that of forward; another is packed first. An activation whose
// channels are not whole vectors, one in NCHW say, is copied into that form too. Tiles of the sum are on their way (cp.async)
// while one is multiplied. Where the channels are whole tiles of k, those of all taps follow each other for the same channels:
// the taps read nearly the same pixels, which are in the L1 cache then. Method: S. Chetlur et al., "cuDNN: Efficient Primitives
// for Deep Learning", 2014, section 3.
#include <algorithm>

#include "conv2d_host.cuh"
#include "conv2d_patches.cuh"

namespace torchcnn::cuda {

template <class T>
struct GatherProblem {
  Axis h, w;
  int images, groups, channels_written;  // of a group
  Activation<T> from;
  const T* weight;
  int weight_row;  // elements from channel to channel of the result: R S channels of the sum
  const T* bias;
  bool relu;
  T* to;
  Strides to_strides;
  bool to_vectors;  // whether whole vectors can be written, of channels in channels_last, of pixels in NCHW
  int tiles_m, tiles_n;
};

constexpr int kPackThreads = 256, kPackElements = 2048;

// How weight[k, c, r, s] becomes a row of packed weight. A block has a run of channels and taps of one output channel, `channels`
// by `taps` of them.
template <class T>
struct ForwardPacking {
  const T* weight;
  bool channels_last;
  int C, taps;       // of a group
  int row_channels;  // C with the zeros that fill a vector
  int run_channels, run_taps, channel_runs, tap_runs;
  T* to;
};

template <class T>
__global__ void __launch_bounds__(kPackThreads) conv2d_pack_weight(const ForwardPacking<T> packing) {
  using Bits = BitsOf<T>;
  __shared__ Bits run[kPackElements];
  int64_t block = blockIdx.x;
  const int first_tap = int(block % packing.tap_runs) * packing.run_taps;
  block /= packing.tap_runs;
  const int first_channel = int(block % packing.channel_runs) * packing.run_channels;
  const int64_t k = block / packing.channel_runs;
  const Bits* const from = reinterpret_cast<const Bits*>(packing.weight) + k * packing.C * packing.taps;
  Bits* const to = reinterpret_cast<Bits*>(packing.to) + k * packing.row_channels * packing.taps + first_channel;
  const int taps = min(packing.run_taps, packing.taps - first_tap);
  const int channels = min(packing.run_channels, packing.row_channels - first_channel);  // written
  const int count = max(0, min(channels, packing.C - first_channel)) * taps;             // read, one channel or all taps
  if (!packing.channels_last) {
#pragma unroll 4
    for (int i = threadIdx.x; i < count; i += kPackThreads) run[i] = from[int64_t(first_channel) * packing.taps + first_tap + i];
    __syncthreads();
  }
  for (int tap = threadIdx.x / 32; tap < taps; tap += kPackThreads / 32)
    for (int c = threadIdx.x % 32; c < channels; c += 32) {
      Bits value = 0;  // all zero bits are zero
      if (first_channel + c < packing.C)
        value = packing.channels_last ? from[int64_t(first_tap + tap) * packing.C + first_channel + c] : run[c * taps + tap];
      to[int64_t(first_tap + tap) * packing.row_channels + c] = value;
    }
}

constexpr int kTurnedRows = 64, kTurnedColumns = 32;

// For grad_input, packed[c, r, s][k]: a transposed matrix for each group, of which a block has a tile. `elements` are those of an
// output channel, as they follow each other in memory.
template <class T>
struct TransposedPacking {
  const T* weight;
  bool channels_last;
  int K, C, taps, elements;  // of a group
  int row_channels;          // K with the zeros that fill a vector
  int row_tiles, element_tiles;
  T* to;
};

template <class T>
__global__ void __launch_bounds__(kPackThreads) conv2d_pack_transposed_weight(const TransposedPacking<T> packing) {
  using Bits = BitsOf<T>;
  __shared__ Bits tile[kTurnedColumns][kTurnedRows + (sizeof(T) == 2 ? 2 : 1)];
  int64_t block = blockIdx.x;
  const int first_k = int(block % packing.row_tiles) * kTurnedRows;
  block /= packing.row_tiles;
  const int first = int(block % packing.element_tiles) * kTurnedColumns;
  const int64_t group = block / packing.element_tiles;
  const Bits* const from = reinterpret_cast<const Bits*>(packing.weight) + group * packing.K * packing.elements;
  Bits* const to = reinterpret_cast<Bits*>(packing.to) + group * packing.elements * packing.row_channels;
  const int own = threadIdx.x % 32;
#pragma unroll
  for (int k = threadIdx.x / 32; k < kTurnedRows; k += kPackThreads / 32) {
    const bool exists = first_k + k < packing.K && first + own < packing.elements;
    tile[own][k] = exists ? from[int64_t(first_k + k) * packing.elements + first + own] : Bits(0);  // all zero bits are zero
  }
  __syncthreads();
#pragma unroll
  for (int i = threadIdx.x / 32; i < kTurnedColumns; i += kPackThreads / 32) {
    const int element = first + i;
    if (element >= packing.elements) break;
    int row = element;  // c taps + tap
    if (packing.channels_last) row = element % packing.C * packing.taps + element / packing.C;
#pragma unroll
    for (int k = own; k < kTurnedRows; k += 32)
      if (first_k + k < packing.row_channels) to[int64_t(row) * packing.row_channels + first_k + k] = tile[i][k];
  }
}

// Writes a tile of results: through shared memory, so that neighbouring threads write neighbours in memory, channels or pixels.
template <class Math>
__device__ __forceinline__ void write_tile(const GatherProblem<typename Math::T>& problem, const Math& math, const Phase& h,
                                           const Phase& w, int first_pixel, int pixels, int64_t group_channel,
                                           int first_channel) {
  using Shape = typename Math::Shape;
  using T = typename Math::T;
  using Sum = typename Shape::Sum;
  constexpr int V = kVectorSize<T>, pitch_n = Shape::block_n + V, pitch_m = Shape::block_m + V;
  constexpr int tile_size = Shape::block_m * pitch_n + Shape::block_n * V;
  T* const tile = reinterpret_cast<T*>(dynamic_shared_memory());
  int64_t* const places = reinterpret_cast<int64_t*>(tile + tile_size);
  Sum* const bias = reinterpret_cast<Sum*>(places + Shape::block_m);
  static_assert(tile_size * sizeof(T) + Shape::block_m * sizeof(int64_t) + Shape::block_n * sizeof(Sum) <= Shape::shared_bytes);
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
  for (int n = threadIdx.x; n < Shape::block_n; n += Shape::threads) {
    const bool exists = problem.bias != nullptr && first_channel + n < problem.channels_written;
    bias[n] = exists ? to_arithmetic(problem.bias[group_channel + first_channel + n]) : Sum(0);
  }
  __syncthreads();
  const bool relu = problem.relu;
  const auto finished = [&](Sum sum, int n) {
    sum += bias[n];
    return from_arithmetic<T>(relu && sum < 0 ? Sum(0) : sum);
  };
  if (channels_last) {
    math.for_each_pair([&](int m, int n, Sum first, Sum second) {
      *reinterpret_cast<Run<T, 2>*>(tile + m * pitch_n + n) = {finished(first, n), finished(second, n + 1)};
    });
  } else {
    math.for_each_pair([&](int m, int n, Sum first, Sum second) {
      tile[n * pitch_m + m] = finished(first, n);
      tile[(n + 1) * pitch_m + m] = finished(second, n + 1);
    });
  }
  __syncthreads();
  if (problem.to_vectors && channels_last) {
    constexpr int vectors = Shape::block_n / V;
    for (int at = threadIdx.x; at < Shape::block_m * vectors; at += Shape::threads) {
      const int m = at / vectors, n = at % vectors * V;
      if (places[m] >= 0 && first_channel + n < problem.channels_written)
        *reinterpret_cast<Run<T, V>*>(problem.to + places[m] + n) = *reinterpret_cast<const Run<T, V>*>(tile + m * pitch_n + n);
    }
    return;
  }
  if (problem.to_vectors) {
    constexpr int vectors = Shape::block_m / V;
    for (int at = threadIdx.x; at < Shape::block_n * vectors; at += Shape::threads) {
      const int n = at / vectors, m = at % vectors * V;
      if (places[m] >= 0 && first_channel + n < problem.channels_written)
        *reinterpret_cast<Run<T, V>*>(problem.to + places[m] + n * s.c) =
            *reinterpret_cast<const Run<T, V>*>(tile + n * pitch_m + m);
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

  unsigned block = blockIdx.x;
  const int tile_n = int(block % unsigned(problem.tiles_n));
  block /= unsigned(problem.tiles_n);
  const int tile_m = int(block % unsigned(problem.tiles_m));
  block /= unsigned(problem.tiles_m);
  const int group = int(block % unsigned(problem.groups)), phase = int(block / unsigned(problem.groups));
  const Phase h = phase_of(problem.h, phase / problem.w.phases()), w = phase_of(problem.w, phase % problem.w.phases());
  const int pixels = problem.images * h.outputs * w.outputs, first_pixel = tile_m * Shape::block_m;
  if (first_pixel >= pixels) return;  // other phases have more

  // The pixels of the activation that this thread copies to shared memory, for each tap in turn. Distances are counted in
  // vectors.
  constexpr int V = kVectorSize<T>;
  const Activation<T>& from = problem.from;
  const int stride_n = int(from.stride_n / V), stride_h = int(from.stride_h / V), stride_w = int(from.stride_w / V);
  struct {
    int vector, y, x;  // where the patch of a pixel begins; y is kNowhere if there is no such pixel
  } corner[A::copies];
  Counter at = Counter::of(first_pixel + A::own_row(0), h.outputs, w.outputs);
  const Counter row_step = Counter::of(A::rows_at_once, h.outputs, w.outputs);
#pragma unroll
  for (int copy = 0; copy < A::copies; ++copy, at.add(row_step, h.outputs, w.outputs)) {
    const int y = at.b * h.step + h.origin, x = at.c * w.step + w.origin;
    corner[copy].vector = at.a * stride_n + y * stride_h + x * stride_w + group * (from.channels / V);
    corner[copy].y = first_pixel + A::own_row(copy) < pixels ? y : kNowhere;
    corner[copy].x = x;
  }
  const int first_channel = tile_n * Shape::block_n;
  const T* const weight =
      problem.weight + (int64_t(group) * problem.channels_written + first_channel + B::own_row(0)) * problem.weight_row;
  const int own_channels = problem.channels_written - first_channel - B::own_row(0);  // beyond them are zeros

  // The sum runs over chunks of channels, their taps, the channels of a chunk. Where they fill tiles of k a chunk is as deep as
  // one, else there is one chunk.
  const int depth = h.taps * w.taps * from.channels, tiles = (depth + Shape::block_k - 1) / Shape::block_k;
  const bool in_chunks = from.channels % Shape::block_k == 0;
  const int chunk = in_chunks ? Shape::block_k : from.channels;
  int first_of_chunk = 0;
  Counter tap = {}, tap_step = {};  // tap and channel of this thread's vectors
  if (tiles > 0) {
    tap = Counter::of(A::own_vector() * V, w.taps, chunk);
    tap_step = Counter::of(Shape::block_k, w.taps, chunk);
  }
  const auto fetch = [&](int, T* activation_tile, T* weight_tile) {
    const bool exists = tap.a < h.taps;
    const int y = exists ? tap.a * h.tap : kNowhere, x = tap.b * w.tap, c = first_of_chunk + tap.c;
    const int vector = (exists ? y * stride_h : 0) + x * stride_w + c / V;
#pragma unroll
    for (int copy = 0; copy < A::copies; ++copy) {
      const bool inside =
          unsigned(corner[copy].y + y) < unsigned(from.height) && unsigned(corner[copy].x + x) < unsigned(from.width);
      copy_async<true>(activation_tile + A::own_offset(copy), from.data + int64_t(corner[copy].vector + vector) * V, inside);
    }
    const int r = h.first_tap + tap.a * problem.h.period, s = w.first_tap + tap.b * problem.w.period;
    const T* const own_weight = weight + (exists ? (r * problem.w.kernel + s) * from.channels + c : 0);
#pragma unroll
    for (int copy = 0; copy < B::copies; ++copy)
      copy_async(weight_tile + B::own_offset(copy), own_weight + int64_t(copy * B::rows_at_once) * problem.weight_row,
                 exists && copy * B::rows_at_once < own_channels);
    tap.add(tap_step, w.taps, chunk);
    if (in_chunks && tap.a == h.taps) {
      tap.a = 0;
      first_of_chunk += Shape::block_k;
    }
  };
  Math math;
  add_up_tiles(math, tiles, fetch);
  write_tile(problem, math, h, w, first_pixel, pixels, int64_t(group) * problem.channels_written, first_channel);
}

namespace {

// Everything but data: sizes, strides, how long the rows of the weight are.
template <class T>
GatherProblem<T> gather_problem(const char* op, const Conv2dGeometry& g, bool transposed) {
  GatherProblem<T> problem = {};
  problem.h = axis_of(op, "height", g.H, g.P, g.R, g.stride_h, g.pad_h, g.dilation_h, transposed);
  problem.w = axis_of(op, "width", g.W, g.Q, g.S, g.stride_w, g.pad_w, g.dilation_w, transposed);
  problem.images = as_int(op, "batch", g.N);
  problem.groups = as_int(op, "groups", g.G);
  problem.channels_written = as_int(op, "channels", transposed ? g.C_per_group() : g.K_per_group());
  problem.from.channels = as_int(op, "channels", round_up(transposed ? g.K_per_group() : g.C_per_group(), kVectorSize<T>));
  problem.weight_row = as_int(op, "terms of a sum", checked_mul(g.R * g.S, problem.from.channels, op, "terms of a sum"));
  return problem;
}

// Whether a weight lies as the kernel reads it. Forward alone asks: nobody has the weight of grad_input transposed.
template <class T>
bool weight_is_there(const GatherProblem<T>& problem, const Conv2dGeometry& g, bool transposed, const T* weight, Layout layout) {
  return !transposed && (layout == Layout::channels_last || g.R * g.S == 1) && problem.from.channels == g.C_per_group() &&
         reinterpret_cast<uintptr_t>(weight) % kVectorBytes == 0;
}

template <class T>
int64_t packed_bytes(const GatherProblem<T>& problem) {
  return round_up(int64_t(problem.groups) * problem.channels_written * problem.weight_row * int64_t(sizeof(T)), kAlignment);
}

template <class T>
void pack_weight(const char* op, const Conv2dGeometry& g, bool transposed, const T* weight, Layout layout, T* packed,
                 Stream stream) {
  const int64_t taps = g.R * g.S, K = g.K_per_group(), C = g.C_per_group();
  const bool last = layout == Layout::channels_last;
  if (g.C == 0) return;  // no channel is read, and the bias is all
  if (transposed) {
    const int64_t row_channels = round_up(K, kVectorSize<T>), elements = checked_mul(C, taps, op, "weights of an output channel");
    const TransposedPacking<T> packing = {weight,
                                          last,
                                          int(K),
                                          int(C),
                                          int(taps),
                                          as_int(op, "weights of an output channel", elements),
                                          int(row_channels),
                                          int(ceil_div(row_channels, kTurnedRows)),
                                          int(ceil_div(elements, kTurnedColumns)),
                                          packed};
    const int64_t blocks = checked_mul(int64_t(packing.row_tiles) * packing.element_tiles, g.G, op, "thread blocks");
    launch(op, conv2d_pack_transposed_weight<T>, block_count(op, blocks), kPackThreads, 0, stream, packing);
  } else {
    const int64_t row_channels = round_up(C, kVectorSize<T>), run_taps = std::min<int64_t>(taps, kPackElements),
                  run_channels = std::min<int64_t>(row_channels, kPackElements / run_taps);
    const ForwardPacking<T> packing = {weight,
                                       last,
                                       int(C),
                                       int(taps),
                                       int(row_channels),
                                       int(run_channels),
                                       int(run_taps),
                                       int(ceil_div(row_channels, run_channels)),
                                       int(ceil_div(taps, run_taps)),
                                       packed};
    const int64_t blocks = checked_mul(int64_t(packing.channel_runs) * packing.tap_runs, g.K, op, "thread blocks");
    launch(op, conv2d_pack_weight<T>, block_count(op, blocks), kPackThreads, 0, stream, packing);
  }
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

// The most pixels, or vectors, of a launch. The emulator takes few, so that sizes which it can compute take several launches.
#ifdef TORCHCNN_CUDA_EMULATOR
constexpr int64_t kMostOfALaunch = 10000;
#else
constexpr int64_t kMostOfALaunch = int64_t(1) << 30;
#endif

// Launches the kernel for as many images at a time as have numbers of pixels and of vectors in 32 bits, padding included.
template <class Math>
void run_gather(const char* op, GatherProblem<typename Math::T>& problem, Stream stream) {
  using Shape = typename Math::Shape;
  const int64_t outputs_h = ceil_div(problem.h.written, problem.h.phases()),
                outputs_w = ceil_div(problem.w.written, problem.w.phases());
  const int64_t phases = int64_t(problem.h.phases()) * problem.w.phases();
  const auto padded_vectors = [&](const Axis& axis, int64_t stride) {
    const int64_t positions = axis.read + 2 * int64_t(axis.pad) + axis.kernel * int64_t(axis.dilation);
    return checked_mul(positions, stride / kVectorSize<typename Math::T>, op, "vectors of an image");
  };
  const int64_t vectors = padded_vectors(problem.h, problem.from.stride_h) + padded_vectors(problem.w, problem.from.stride_w);
  const int64_t image =
      std::max({as_int(op, "pixels of an image", outputs_h * outputs_w), as_int(op, "vectors of an image", vectors), 1});
  const int64_t images = problem.images, together = std::clamp<int64_t>(kMostOfALaunch / image, 1, std::max<int64_t>(1, images));
  problem.tiles_n = int(ceil_div(problem.channels_written, Shape::block_n));
  GatherProblem<typename Math::T> part = problem;
  for (int64_t n = 0; n < images; n += together) {
    part.images = int(std::min(together, images - n));
    part.from.data = problem.from.data + n * problem.from.stride_n;
    part.to = problem.to + n * problem.to_strides.n;
    part.tiles_m = int(ceil_div(part.images * outputs_h * outputs_w, Shape::block_m));
    const int64_t per_phase = checked_mul(int64_t(part.tiles_m) * part.tiles_n, part.groups, op, "thread blocks");
    launch(op, conv2d_gather<Math>, block_count(op, checked_mul(phases, per_phase, op, "thread blocks")), Shape::threads,
           Shape::shared_bytes, stream, part);
  }
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

// Whether kVectorSize neighbours are written at once: in NCHW pixels of one plane, which are neighbours in memory unless phases
// part them.
template <class T>
bool writes_vectors(const GatherProblem<T>& problem) {
  const bool last = problem.to_strides.c == 1;
  const int64_t pixels = int64_t(problem.h.written) * problem.w.written;
  return (last ? problem.channels_written : pixels) % kVectorSize<T> == 0 &&
         (last || (problem.h.phases() == 1 && problem.w.phases() == 1)) &&
         reinterpret_cast<uintptr_t>(problem.to) % kVectorBytes == 0;
}

template <class T>
void gather(const char* op, const Conv2dGeometry& g, bool transposed, const Device<T>* from, const Device<T>* weight,
            Layout weight_layout, const Device<T>* bias, bool relu, Device<T>* to, Float32Precision precision, void* workspace,
            Stream stream) {
  using D = Device<T>;
  char* scratch = static_cast<char*>(workspace);
  GatherProblem<D> problem = gather_problem<D>(op, g, transposed);
  problem.weight = weight;
  if (!weight_is_there(problem, g, transposed, weight, weight_layout)) {
    D* const packed = reinterpret_cast<D*>(scratch);
    scratch += packed_bytes(problem);
    pack_weight(op, g, transposed, weight, weight_layout, packed, stream);
    problem.weight = packed;
  }
  problem.from = vectors_read(op, g, transposed, from).get(op, scratch, stream);
  problem.bias = bias;
  problem.relu = relu;
  problem.to = to;
  problem.to_strides = transposed ? g.input_strides() : g.output_strides();
  problem.to_vectors = writes_vectors(problem);
  using Small = TileShape<D, 64, 64, Storage::by_index>;
  using SmallTensor = TileShape<D, 64, 64, Storage::by_index, 256>;
  if constexpr (sizeof(T) == 8) {
    run_gather<SimtMath<Small>>(op, problem, stream);
  } else if (has_warpgroup_steps() && (sizeof(T) == 2 || precision == Float32Precision::tf32)) {
    choose_gather_tile<D, WarpgroupMath, SmallTensor>(op, problem, stream);
  } else if (has_tensor_cores() && (sizeof(T) == 2 || precision == Float32Precision::tf32)) {
    choose_gather_tile<D, TensorMath, SmallTensor>(op, problem, stream);
  } else if constexpr (sizeof(T) == 2) {
    run_gather<SimtMath<Small>>(op, problem, stream);
  } else {
    choose_gather_tile<D, SimtMath, Small>(op, problem, stream);
  }
}

template <class T>
int64_t gather_workspace(const char* op, const Conv2dGeometry& g, bool transposed, const T* from, const T* weight,
                         Layout weight_layout) {
  using D = Device<T>;
  const GatherProblem<D> problem = gather_problem<D>(op, g, transposed);
  const bool packs = !weight_is_there(problem, g, transposed, on_device(weight), weight_layout);
  return (packs ? packed_bytes(problem) : 0) + vectors_read(op, g, transposed, on_device(from)).workspace();
}

}  // namespace

template <class T>
int64_t conv2d_forward_workspace(const Conv2dGeometry& g, const T* input, const T* weight, Layout weight_layout) {
  return suits_depthwise(g) || suits_direct<T>(g, false) ? 0 : gather_workspace("conv2d", g, false, input, weight, weight_layout);
}

template <class T>
void conv2d_forward(const Conv2dGeometry& g, const T* input, const T* weight, Layout weight_layout, const Epilogue<T>& epilogue,
                    T* output, Float32Precision precision, void* workspace, Stream stream) {
  if (suits_depthwise(g)) return depthwise::conv2d_forward(g, input, weight, epilogue, output, stream);
  if (suits_direct<T>(g, false)) return direct::conv2d_forward(g, input, weight, weight_layout, epilogue, output, stream);
  gather<T>("conv2d", g, false, on_device(input), on_device(weight), weight_layout, on_device(epilogue.bias), epilogue.relu,
            on_device(output), precision, workspace, stream);
}

template <class T>
int64_t conv2d_grad_input_workspace(const Conv2dGeometry& g, const T* grad_output, const T* weight, Layout weight_layout) {
  return suits_depthwise(g) || suits_direct<T>(g, true)
             ? 0
             : gather_workspace("conv2d_grad_input", g, true, grad_output, weight, weight_layout);
}

template <class T>
void conv2d_grad_input(const Conv2dGeometry& g, const T* grad_output, const T* weight, Layout weight_layout,
                       const Epilogue<T>& epilogue, T* grad_input, Float32Precision precision, void* workspace, Stream stream) {
  if (suits_depthwise(g)) return depthwise::conv2d_grad_input(g, grad_output, weight, epilogue, grad_input, stream);
  if (suits_direct<T>(g, true))
    return direct::conv2d_grad_input(g, grad_output, weight, weight_layout, epilogue, grad_input, stream);
  gather<T>("conv2d_grad_input", g, true, on_device(grad_output), on_device(weight), weight_layout, on_device(epilogue.bias),
            epilogue.relu, on_device(grad_input), precision, workspace, stream);
}

#define TORCHCNN_INSTANTIATE(T)                                                                                                \
  template int64_t conv2d_forward_workspace(const Conv2dGeometry&, const T*, const T*, Layout);                                \
  template int64_t conv2d_grad_input_workspace(const Conv2dGeometry&, const T*, const T*, Layout);                             \
  template void conv2d_forward(const Conv2dGeometry&, const T*, const T*, Layout, const Epilogue<T>&, T*, Float32Precision,    \
                               void*, Stream);                                                                                 \
  template void conv2d_grad_input(const Conv2dGeometry&, const T*, const T*, Layout, const Epilogue<T>&, T*, Float32Precision, \
                                  void*, Stream);
TORCHCNN_INSTANTIATE(float)
TORCHCNN_INSTANTIATE(double)
TORCHCNN_INSTANTIATE(Float16)
TORCHCNN_INSTANTIATE(BFloat16)

}  // namespace torchcnn::cuda
