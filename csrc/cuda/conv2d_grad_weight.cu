// Convolution grad_weight: sums over all pixels.
//
//   grad_weight[k, c, r, s] = sum over n, p, q of grad_output[n, k, p, q] input[n, c, p stride - pad + r dilation, ...]
//
// grad_weight is a matrix product whose rows are output channels, whose columns are taps and input channels, (r S + s) C + c, and
// whose long sum runs over pixels. The sum is cut into as many parts of whole tiles as fill a GPU (split-K); each part goes to
// scratch memory of its own and a second kernel adds the parts in order, so that no atomic addition makes the result depend on
// which block came first. Where the cuts lie depends on the geometry, the dtype and the kind of arithmetic, not on how
// many multiprocessors there are.
//
// A row of shared memory holds one pixel and the channels of the block (Storage::by_k), as channels_last lies in memory; ldmatrix
// transposes on the way to the tensor cores.
#include "conv2d_host.cuh"
#include "conv2d_parts.cuh"

namespace torchcnn::cuda {

template <class T>
struct GradWeightProblem {
  Axis h, w;
  int images, groups, K_per_group;
  int columns;  // R S C/G
  Activation<T> gradient, input;
  SumOf<T>* parts;      // [part][group][output channel][column]
  int64_t part_pixels;  // a multiple of block_k
  int tiles_m, tiles_n;
};

template <class Math>
__global__ void __launch_bounds__(Math::Shape::threads, 1)
    conv2d_grad_weight_parts(const GradWeightProblem<typename Math::T> problem) {
  using Shape = typename Math::Shape;
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

  // grad_output is read as it is: one tap, at the pixel itself.
  const Phase itself{0, 1, 1, 0, 0, 1, 0, 0}, h = phase_of(problem.h, 0), w = phase_of(problem.w, 0);
  const Activation<T>&gradient = problem.gradient, &input = problem.input;
  const Share<Shape> gradient_share(gradient.in_vectors), input_share(input.in_vectors);
  const int first_k = tile_m * Shape::block_m, first_column = tile_n * Shape::block_n;
  const Counter channel = Counter::of(first_k + gradient_share.vector * kVectorSize<T>, 1, gradient.channels);
  const Counter tap = Counter::of(first_column + input_share.vector * kVectorSize<T>, w.taps, input.channels);
  const int64_t gradient_group = int64_t(group) * gradient.channels * gradient.stride_c,
                input_group = int64_t(group) * input.channels * input.stride_c;
  const Counter pixel_step = Counter::of(Shape::block_k, P, Q);
  Counter gradient_pixel[Shape::copies], input_pixel[Shape::copies];
#pragma unroll
  for (int copy = 0; copy < Shape::copies; ++copy) {
    gradient_pixel[copy] = Counter::of(first_pixel + gradient_share.row(copy), P, Q);
    input_pixel[copy] = Counter::of(first_pixel + input_share.row(copy), P, Q);
  }

  Piece<T> gradient_piece[Shape::copies], input_piece[Shape::copies];
  const auto fetch = [&](int, T* gradient_tile, T* input_tile) {
#pragma unroll
    for (int copy = 0; copy < Shape::copies; ++copy) {
      Counter& at = gradient_pixel[copy];
      const Corner here{at.a < problem.images ? at.a * gradient.stride_n + gradient_group : -1, at.b, at.c};
      gradient_piece[copy].fetch(gradient, itself, itself, P, Q, here, channel, gradient_tile + gradient_share.offset(copy));
      at.add(pixel_step, P, Q);
      Counter& of = input_pixel[copy];
      const Corner corner{of.a < problem.images ? of.a * input.stride_n + input_group : -1, of.b * h.step + h.origin,
                          of.c * w.step + w.origin};
      input_piece[copy].fetch(input, h, w, problem.h.read, problem.w.read, corner, tap, input_tile + input_share.offset(copy));
      of.add(pixel_step, P, Q);
    }
  };
  const auto store = [&](T* gradient_tile, T* input_tile) {
#pragma unroll
    for (int copy = 0; copy < Shape::copies; ++copy) {
      gradient_piece[copy].store(gradient, gradient_tile + gradient_share.offset(copy));
      input_piece[copy].store(input, input_tile + input_share.offset(copy));
    }
  };

  Math math;
  add_up_tiles(math, tiles, fetch, store);

  auto* to = problem.parts + (part * problem.groups + group) * problem.K_per_group * problem.columns;
  math.for_each_pair([&](int m, int n, auto first, auto second) {
    const int k = first_k + m, column = first_column + n;
    if (k >= problem.K_per_group) return;
    auto* at = to + int64_t(k) * problem.columns + column;
    if (column < problem.columns) at[0] = first;
    if (column + 1 < problem.columns) at[1] = second;
  });
}

namespace {

// How the sum over pixels is cut: into parts of at least 16 tiles, and no more than fill a GPU twice.
struct Parts {
  int tiles_m, tiles_n;
  int64_t count, pixels;
};

Parts parts_of(const Conv2dGeometry& g, int block, int block_k) {
  const int tiles_m = int(ceil_div(g.K_per_group(), block)), tiles_n = int(ceil_div(g.C_per_group() * g.R * g.S, block));
  const int64_t tiles_k = ceil_div(g.N * g.P * g.Q, block_k), wanted = ceil_div(2 * kBlocksThatFillAGpu, tiles_m * tiles_n * g.G);
  const int64_t part_tiles = std::max<int64_t>(16, ceil_div(tiles_k, wanted));
  return {tiles_m, tiles_n, ceil_div(tiles_k, part_tiles), part_tiles * block_k};
}

int grad_weight_block(const Conv2dGeometry& g) { return g.K_per_group() > 64 && g.C_per_group() * g.R * g.S > 64 ? 128 : 64; }

template <class Math>
void run_grad_weight(const Conv2dGeometry& g, GradWeightProblem<typename Math::T>& problem, const Parts& parts, Stream stream) {
  using Shape = typename Math::Shape;
  const char* op = "conv2d_grad_weight";
  const int64_t tiles = checked_mul(int64_t(parts.tiles_m) * parts.tiles_n, g.G, op, "thread blocks");
  launch(op, conv2d_grad_weight_parts<Math>, block_count(op, checked_mul(tiles, parts.count, op, "thread blocks")),
         Shape::threads, Shape::shared_bytes, stream, problem);
}

template <class T, template <class> class Math>
void choose_grad_weight_tile(const Conv2dGeometry& g, GradWeightProblem<T>& problem, const Parts& parts, Stream stream) {
  if (grad_weight_block(g) == 128)
    run_grad_weight<Math<TileShape<T, 128, Storage::by_k>>>(g, problem, parts, stream);
  else
    run_grad_weight<Math<TileShape<T, 64, Storage::by_k>>>(g, problem, parts, stream);
}

// One arithmetic for 16-bit types before sm_80 and one for float64: 64 x 64.
template <class T>
int block_in_use(const Conv2dGeometry& g) {
  return sizeof(T) == 8 || (sizeof(T) == 2 && !has_tensor_cores()) ? 64 : grad_weight_block(g);
}

}  // namespace

template <class T>
int64_t conv2d_grad_weight_workspace(const Conv2dGeometry& g) {
  if (suits_depthwise(g)) return depthwise::conv2d_grad_weight_workspace<T>(g);
  const Parts parts = parts_of(g, block_in_use<T>(g), kTileDepthBytes / int(sizeof(T)));
  return parts.count * g.K * g.C_per_group() * g.R * g.S * int64_t(sizeof(SumOf<T>));
}

template <class T>
void conv2d_grad_weight(const Conv2dGeometry& g, const T* grad_output, const T* input, T* grad_weight, Float32Precision precision,
                        void* workspace, Stream stream) {
  if (suits_depthwise(g)) return depthwise::conv2d_grad_weight(g, grad_output, input, grad_weight, workspace, stream);
  using D = Device<T>;
  const char* op = "conv2d_grad_weight";
  const Parts parts = parts_of(g, block_in_use<T>(g), kTileDepthBytes / int(sizeof(T)));
  GradWeightProblem<D> problem = {};
  problem.h = axis_of(op, "height", g.H, g.P, g.R, g.stride_h, g.pad_h, g.dilation_h, false);
  problem.w = axis_of(op, "width", g.W, g.Q, g.S, g.stride_w, g.pad_w, g.dilation_w, false);
  problem.images = as_int(op, "batch", g.N);
  problem.groups = as_int(op, "groups", g.G);
  problem.K_per_group = as_int(op, "output channels", g.K_per_group());
  problem.columns = as_int(op, "weights of an output channel", g.C_per_group() * g.R * g.S);
  problem.gradient = activation(on_device(grad_output), g.output_strides(), problem.K_per_group);
  problem.input = activation(on_device(input), g.input_strides(), as_int(op, "input channels", g.C_per_group()));
  problem.parts = static_cast<SumOf<T>*>(workspace);
  problem.part_pixels = parts.pixels;
  problem.tiles_m = parts.tiles_m;
  problem.tiles_n = parts.tiles_n;
  if constexpr (sizeof(T) == 8) {
    run_grad_weight<SimtMath<TileShape<D, 64, Storage::by_k>>>(g, problem, parts, stream);
  } else if (has_tensor_cores() && (sizeof(T) == 2 || precision == Float32Precision::tf32)) {
    choose_grad_weight_tile<D, TensorMath>(g, problem, parts, stream);
  } else if constexpr (sizeof(T) == 2) {
    run_grad_weight<SimtMath<TileShape<D, 64, Storage::by_k>>>(g, problem, parts, stream);
  } else {
    choose_grad_weight_tile<D, SimtMath>(g, problem, parts, stream);
  }
  const int64_t count = g.K * g.C_per_group() * g.R * g.S;
  launch("conv2d_add_parts", conv2d_add_parts<D, SumOf<T>>, blocks_for(count, 256), 256, 0, stream, problem.parts, parts.count,
         int(g.C_per_group()), int(g.R * g.S), count, on_device(grad_weight));
}

#define TORCHCNN_INSTANTIATE(T)                                                                                     \
  template int64_t conv2d_grad_weight_workspace<T>(const Conv2dGeometry&);                                          \
  template void conv2d_grad_weight(const Conv2dGeometry&, const T*, const T*, T*, Float32Precision, void*, Stream);
TORCHCNN_INSTANTIATE(float)
TORCHCNN_INSTANTIATE(double)
TORCHCNN_INSTANTIATE(Float16)
TORCHCNN_INSTANTIATE(BFloat16)

}  // namespace torchcnn::cuda
