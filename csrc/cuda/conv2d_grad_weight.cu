// Convolution grad_weight: sums over all pixels.
//
//   grad_weight[k, c, r, s] = sum over n, p, q of grad_output[n, k, p, q] input[n, c, p stride - pad + r dilation, ...]
//
// grad_weight is a matrix product whose rows are output channels, whose columns are taps and input channels, (r S + s) C + c, and
// whose long sum runs over pixels. The sum is cut into parts of whole tiles (split-K), as many as an estimate of the time says;
// each part goes to scratch memory of its own and a second kernel adds the parts in order, so that no atomic addition makes the
// result depend on which block came first. Where the cuts lie depends on the geometry, the dtype and the kind of arithmetic, not
// on how many multiprocessors there are.
//
// A row of shared memory holds one pixel and the channels of the block (Storage::by_k), as channels_last lies in memory; ldmatrix
// transposes on the way to the tensor cores.
#include <algorithm>

#include "conv2d_host.cuh"
#include "conv2d_parts.cuh"

namespace torchcnn::cuda {

template <class T>
struct GradWeightProblem {
  Axis h, w;
  int images, groups, K_per_group, C_per_group;
  int columns, read_columns;  // R S C/G; the same with the zeros that fill vectors of channels
  Activation<T> gradient, input;
  SumOf<T>* parts;      // [part][group][output channel][column]
  int64_t part_pixels;  // a multiple of block_k
  int tiles_m, tiles_n;
};

template <class Math>
__global__ void __launch_bounds__(Math::Shape::threads, Math::blocks_at_once)
    conv2d_grad_weight_parts(const GradWeightProblem<typename Math::T> problem) {
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
  const int tile_m = int(block % problem.tiles_m);
  block /= problem.tiles_m;
  const int group = int(block % problem.groups);
  const int64_t part = block / problem.groups;
  const int P = problem.h.written, Q = problem.w.written;
  const int64_t pixels = int64_t(problem.images) * P * Q, first_pixel = part * problem.part_pixels;
  const int64_t end_pixel = first_pixel + problem.part_pixels < pixels ? first_pixel + problem.part_pixels : pixels;
  const int tiles = int((end_pixel - first_pixel + Shape::block_k - 1) / Shape::block_k);

  // grad_output is read as it lies: a row of the tile is a pixel.
  const Activation<T>&gradient = problem.gradient, &input = problem.input;
  const int first_k = tile_m * Shape::block_m, own_k = first_k + A::own_vector() * kVectorSize<T>;
  const T* from_gradient =
      gradient.data + int64_t(group) * gradient.channels + own_k + (first_pixel + A::own_row(0)) * gradient.stride_w;
  int gradient_left = int(end_pixel - first_pixel) - A::own_row(0);  // pixels; none where the tile has more output channels
  if (own_k >= gradient.channels) gradient_left = 0;

  // Of input a thread reads one tap and vector of channels for each of its pixels, which move on by block_k from tile to tile.
  const Phase h = phase_of(problem.h, 0), w = phase_of(problem.w, 0);
  const int first_column = tile_n * Shape::block_n, own_column = first_column + B::own_vector() * kVectorSize<T>;
  const TapOffset tap = tap_offset(input, h, w, Counter::of(own_column, w.taps, input.channels));
  const Counter step = Counter::of(Shape::block_k, P, Q);
  const int64_t on_w = h.step * input.stride_h - Q * (w.step * input.stride_w),
                on_h = input.stride_n - P * (h.step * input.stride_h);
  const int64_t onward = step.a * input.stride_n + step.b * (h.step * input.stride_h) + step.c * (w.step * input.stride_w);
  int input_left = int(end_pixel - first_pixel) - B::own_row(0);
  const T* from_input[B::copies];
  Counter input_pixel[B::copies];  // the image counts no further: its number is in the pointer
  Counter at = Counter::of(first_pixel + B::own_row(0), P, Q);
  const Counter row_step = Counter::of(B::rows_at_once, P, Q);
#pragma unroll
  for (int copy = 0; copy < B::copies; ++copy, at.add(row_step, P, Q)) {
    input_pixel[copy] = at;
    from_input[copy] = input.data + int64_t(group) * input.channels + at.a * input.stride_n +
                       (at.b * h.step + h.origin) * input.stride_h + (at.c * w.step + w.origin) * input.stride_w;
  }

  const auto fetch = [&](int, T* gradient_tile, T* input_tile) {
#pragma unroll
    for (int copy = 0; copy < A::copies; ++copy) {
      const bool exists = copy * A::rows_at_once < gradient_left;
      copy_async(gradient_tile + A::own_offset(copy),
                 exists ? from_gradient + copy * A::rows_at_once * gradient.stride_w : gradient.data, exists);
    }
    from_gradient += Shape::block_k * gradient.stride_w;
    gradient_left -= Shape::block_k;
#pragma unroll
    for (int copy = 0; copy < B::copies; ++copy) {
      Counter& at = input_pixel[copy];
      const bool exists = copy * B::rows_at_once < input_left;
      copy_vector<T>(input, {from_input[copy], exists ? at.b * h.step + h.origin : kNowhere, at.c * w.step + w.origin}, tap,
                     input_tile + B::own_offset(copy));
      at.c += step.c;
      const bool next_row = at.c >= Q;
      at.c -= next_row ? Q : 0;
      at.b += step.b + next_row;
      const bool next_image = at.b >= P;
      at.b -= next_image ? P : 0;
      from_input[copy] += onward + (next_row ? on_w : 0) + (next_image ? on_h : 0);
    }
    input_left -= Shape::block_k;
  };
  Math math;
  add_up_tiles(math, tiles, fetch);

  auto* to = problem.parts + (part * problem.groups + group) * problem.K_per_group * problem.columns;
  const bool as_read = problem.columns == problem.read_columns;
  math.for_each_pair([&](int m, int n, auto first, auto second) {
    const int column = first_column + n;
    if (first_k + m >= problem.K_per_group || column >= problem.read_columns) return;
    auto* const row = to + int64_t(first_k + m) * problem.columns;
    if (as_read) {
      *reinterpret_cast<Run<SumOf<T>, 2>*>(row + column) = {first, second};
      return;
    }
    // Both are of one tap: its channels are whole vectors.
    const int c = column % input.channels;
    auto* const at = row + column / input.channels * problem.C_per_group + c;
    if (c < problem.C_per_group) at[0] = first;
    if (c + 1 < problem.C_per_group) at[1] = second;
  });
}

namespace {

// How the sum over pixels is cut.
struct Parts {
  int tiles_m, tiles_n;
  int64_t count, pixels;
};

template <class T>
int64_t read_columns(const Conv2dGeometry& g) {
  return g.R * g.S * round_up(g.C_per_group(), kVectorSize<Device<T>>);
}

// The tile: 128 x 128 where both sides fill it. Float64 has no such kernel, GPUs before sm_80 no such shared memory.
template <class T>
int grad_weight_block(const Conv2dGeometry& g) {
  if (sizeof(T) == 8 || !has_tensor_cores()) return 64;
  return g.K_per_group() > 64 && read_columns<T>(g) > 64 ? 128 : 64;
}

// Thread blocks that a GPU runs at once, of wgmma's kernels.
constexpr int64_t blocks_at_once(int block) { return (block == 128 ? 2 : 3) * kBlocksThatFillAGpu; }

// Into so many parts that the estimated time is least. It is counted in sixteenths of a tile's: of the longest row of parts that
// one place for a block gets, each with about six tiles' time to begin and end, and of the weights of each part, written and
// read.
template <class T>
Parts parts_of(const Conv2dGeometry& g) {
  const int block = grad_weight_block<T>(g), block_k = kTileDepthBytes / int(sizeof(T));
  const int64_t tiles_m = ceil_div(g.K_per_group(), block), tiles_n = ceil_div(read_columns<T>(g), block);
  const int64_t tiles = tiles_m * tiles_n * g.G, tiles_k = ceil_div(g.N * g.P * g.Q, block_k), at_once = blocks_at_once(block);
  constexpr int64_t of_a_tile = 16, begin_and_end = 6, weights_in_a_tiles_time = 1 << (sizeof(T) == 2 ? 17 : 19);
  const int64_t part_time = ceil_div(g.K * g.C_per_group() * g.R * g.S, weights_in_a_tiles_time / of_a_tile);
  int64_t best_tiles = tiles_k, best_time = INT64_MAX;
  const auto consider = [&](int64_t parts) {
    parts = std::clamp<int64_t>(parts, 1, tiles_k);
    const int64_t part_tiles = ceil_div(tiles_k, parts);
    const int64_t time = ceil_div(tiles * parts, at_once) * (part_tiles + begin_and_end) * of_a_tile + parts * part_time;
    if (time < best_time) {
      best_time = time;
      best_tiles = part_tiles;
    }
  };
  for (int64_t rounds = 1; rounds <= 4; ++rounds) consider(rounds * at_once / tiles);
  for (int64_t parts = at_once / tiles / 2; parts > 0; parts /= 2) consider(parts);
  return {int(tiles_m), int(tiles_n), ceil_div(tiles_k, best_tiles), best_tiles * block_k};
}

template <class T>
int64_t parts_bytes(const Conv2dGeometry& g) {
  return round_up(parts_of<T>(g).count * g.K * g.C_per_group() * g.R * g.S * int64_t(sizeof(SumOf<T>)), kAlignment);
}

template <class T>
Vectors<Device<T>> gradient_vectors(const char* op, const Conv2dGeometry& g, const T* data) {
  return {on_device(data), g.output_strides(), g.N, int(g.P), int(g.Q), int(g.G), as_int(op, "output channels", g.K_per_group())};
}
template <class T>
Vectors<Device<T>> input_vectors(const char* op, const Conv2dGeometry& g, const T* data) {
  return {on_device(data), g.input_strides(), g.N, int(g.H), int(g.W), int(g.G), as_int(op, "input channels", g.C_per_group())};
}

template <class Math>
void run_grad_weight(const Conv2dGeometry& g, GradWeightProblem<typename Math::T>& problem, int64_t parts, Stream stream) {
  using Shape = typename Math::Shape;
  const char* op = "conv2d_grad_weight";
  const int64_t tiles = checked_mul(int64_t(problem.tiles_m) * problem.tiles_n, g.G, op, "thread blocks");
  launch(op, conv2d_grad_weight_parts<Math>, block_count(op, checked_mul(tiles, parts, op, "thread blocks")), Shape::threads,
         Shape::shared_bytes, stream, problem);
}

template <class T, template <class> class Math>
void choose_grad_weight_tile(const Conv2dGeometry& g, GradWeightProblem<T>& problem, int block, int64_t parts, Stream stream) {
  if (block == 128)
    run_grad_weight<Math<TileShape<T, 128, 128, Storage::by_k>>>(g, problem, parts, stream);
  else
    run_grad_weight<Math<TileShape<T, 64, 64, Storage::by_k>>>(g, problem, parts, stream);
}

}  // namespace

template <class T>
int64_t conv2d_grad_weight_workspace(const Conv2dGeometry& g, const T* grad_output, const T* input) {
  if (suits_depthwise(g)) return depthwise::conv2d_grad_weight_workspace<T>(g);
  const char* op = "conv2d_grad_weight";
  return parts_bytes<T>(g) + gradient_vectors(op, g, grad_output).workspace() + input_vectors(op, g, input).workspace();
}

template <class T>
void conv2d_grad_weight(const Conv2dGeometry& g, const T* grad_output, const T* input, T* grad_weight, Layout weight_layout,
                        Float32Precision precision, void* workspace, Stream stream) {
  if (suits_depthwise(g)) return depthwise::conv2d_grad_weight(g, grad_output, input, grad_weight, workspace, stream);
  using D = Device<T>;
  const char* op = "conv2d_grad_weight";
  const Parts parts = parts_of<T>(g);
  as_int(op, "pixels of a part", parts.pixels);
  const int block = grad_weight_block<T>(g);
  char* scratch = static_cast<char*>(workspace);
  GradWeightProblem<D> problem = {};
  problem.h = axis_of(op, "height", g.H, g.P, g.R, g.stride_h, g.pad_h, g.dilation_h, false);
  problem.w = axis_of(op, "width", g.W, g.Q, g.S, g.stride_w, g.pad_w, g.dilation_w, false);
  problem.images = as_int(op, "batch", g.N);
  problem.groups = as_int(op, "groups", g.G);
  problem.K_per_group = as_int(op, "output channels", g.K_per_group());
  problem.C_per_group = as_int(op, "input channels", g.C_per_group());
  problem.columns = as_int(op, "weights of an output channel", g.C_per_group() * g.R * g.S);
  problem.read_columns = as_int(op, "weights of an output channel", read_columns<T>(g));
  problem.parts = reinterpret_cast<SumOf<T>*>(scratch);
  scratch += parts_bytes<T>(g);
  problem.gradient = gradient_vectors(op, g, grad_output).get(op, scratch, stream);
  problem.input = input_vectors(op, g, input).get(op, scratch, stream);
  problem.part_pixels = parts.pixels;
  problem.tiles_m = parts.tiles_m;
  problem.tiles_n = parts.tiles_n;
  using Small = TileShape<D, 64, 64, Storage::by_k>;
  if constexpr (sizeof(T) == 8) {
    run_grad_weight<SimtMath<Small>>(g, problem, parts.count, stream);
  } else if (sizeof(T) == 2 && has_warpgroup_steps()) {
    if constexpr (sizeof(T) == 2) choose_grad_weight_tile<D, WarpgroupMath>(g, problem, block, parts.count, stream);
  } else if (has_tensor_cores() && (sizeof(T) == 2 || precision == Float32Precision::tf32)) {
    choose_grad_weight_tile<D, TensorMath>(g, problem, block, parts.count, stream);
  } else if constexpr (sizeof(T) == 2) {
    run_grad_weight<SimtMath<Small>>(g, problem, parts.count, stream);
  } else {
    choose_grad_weight_tile<D, SimtMath>(g, problem, block, parts.count, stream);
  }
  const int64_t count = g.K * g.C_per_group() * g.R * g.S;
  add_parts(problem.parts, parts.count, int(g.C_per_group()), int(g.R * g.S), weight_layout, count, on_device(grad_weight),
            stream);
}

#define TORCHCNN_INSTANTIATE(T)                                                             \
  template int64_t conv2d_grad_weight_workspace(const Conv2dGeometry&, const T*, const T*); \
  template void conv2d_grad_weight(const Conv2dGeometry&, const T*, const T*, T*, Layout, Float32Precision, void*, Stream);
TORCHCNN_INSTANTIATE(float)
TORCHCNN_INSTANTIATE(double)
TORCHCNN_INSTANTIATE(Float16)
TORCHCNN_INSTANTIATE(BFloat16)

}  // namespace torchcnn::cuda
