// Depthwise convolution, one input channel and at most four output channels a group: too few products per element read for a
// matrix product, so that memory sets the pace.
//
//   forward      output[n, k, p, q]     = sum over r, s of weight[k, r, s] input[n, k / m, p stride - pad + r dilation, ...]
//   grad_input   grad_input[n, c, h, w] = sum over k of the m of channel c, and taps with h + pad - r dilation = p stride
//   grad_weight  grad_weight[k, r, s]   = sum over n, p, q of grad_output[n, k, p, q] input[n, k / m, ...]
//
// m = K / C is the channel multiplier. Neighbouring threads compute neighbours in memory: pixels of a row in NCHW, channels in
// channels_last; what they read twice comes from the L1 cache.
//
// Square filters of 3 and 5 rows with stride 1 or 2, and of 7 with stride 1, are computed in strips: a thread has some rows of
// one column, walks down the rows that these read, and keeps the filter in registers. Any other geometry takes a thread for each
// element. The sums of grad_weight are cut into parts of the pixels, the block's threads add theirs up in a fixed order, and a
// second kernel adds the parts in order: no atomics, the same bits every time.
#include "conv2d_parts.cuh"

namespace torchcnn::cuda::depthwise {

struct Problem {
  Axis h, w;  // forward
  int images, C, K, multiplier;
  Strides input, output;
};

// ------------------------------------------------------------------------------------------------------------ any geometry

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

// One element of forward, or of grad_input (transposed), of the products inside the image alone.
template <class T, bool kTransposed>
__device__ SumOf<T> sum_at(const Problem& problem, const T* from, const T* weight, const Element& e) {
  const Axis &h_axis = problem.h, &w_axis = problem.w;
  const Strides& strides = kTransposed ? problem.output : problem.input;
  SumOf<T> sum = 0;
  for (int m = 0; m < (kTransposed ? problem.multiplier : 1); ++m) {
    const int k = kTransposed ? e.c * problem.multiplier + m : e.c;
    const T* plane = from + e.n * strides.n + int64_t(kTransposed ? k : k / problem.multiplier) * strides.c;
    const T* filter = weight + int64_t(k) * h_axis.kernel * w_axis.kernel;
    const auto read_at = [](const Axis& axis, int to, int tap) {  // -1: nowhere
      if (!kTransposed) {
        const int at = to * axis.stride - axis.pad + tap * axis.dilation;
        return at < axis.read ? at : -1;
      }
      const int far = to + axis.pad - tap * axis.dilation, at = far / axis.stride;
      return far >= 0 && at * axis.stride == far && at < axis.written ? at : -1;
    };
    for (int i = 0; i < h_axis.kernel; ++i) {
      const int r = kTransposed ? h_axis.kernel - 1 - i : i, h = read_at(h_axis, e.h, r);  // from the top
      if (h < 0) continue;
      for (int s = 0; s < w_axis.kernel; ++s) {
        const int w = read_at(w_axis, e.w, s);
        if (w >= 0) sum += to_arithmetic(filter[r * w_axis.kernel + s]) * to_arithmetic(plane[h * strides.h + w * strides.w]);
      }
    }
  }
  return sum;
}

template <class T>
__device__ T finished(SumOf<T> sum, const T* bias, int channel, bool relu) {
  if (bias != nullptr) sum += to_arithmetic(bias[channel]);
  return from_arithmetic<T>(relu && sum < 0 ? SumOf<T>(0) : sum);
}

template <class T, bool kTransposed>
__global__ void __launch_bounds__(256) conv2d_depthwise_elements(const Problem problem, const T* from, const T* weight,
                                                                 const T* bias, bool relu, T* to, int64_t count) {
  const Strides& strides = kTransposed ? problem.input : problem.output;
  const int channels = kTransposed ? problem.C : problem.K;
  const int rows = kTransposed ? problem.h.read : problem.h.written, columns = kTransposed ? problem.w.read : problem.w.written;
  for (int64_t at = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; at < count; at += int64_t(gridDim.x) * blockDim.x) {
    const Element e = element_at(at, strides, channels, rows, columns);
    to[at] = finished(sum_at<T, kTransposed>(problem, from, weight, e), bias, e.c, relu);
  }
}

// A block of 32 x 8 threads: threadIdx.x runs over what is neighbouring in memory, channels in channels_last, pixels in NCHW. The
// threads of one channel are its lanes.
struct ChannelsAndLanes {
  int64_t channel;
  int lane, lanes;
  bool channels_last;

  __device__ ChannelsAndLanes(bool channels_last, int64_t channel_block)
      : channel(channels_last ? channel_block * 32 + threadIdx.x : channel_block * 8 + threadIdx.y),
        lane(channels_last ? threadIdx.y : threadIdx.x),
        lanes(channels_last ? 8 : 32),
        channels_last(channels_last) {}

  // The sum over the lanes, in a tree; right in lane 0. All threads of the block call it.
  template <class Sum>
  __device__ Sum add_up(Sum sum) const {
    __shared__ Sum sums[32][9];
    Sum& own = sums[threadIdx.x][threadIdx.y];
    own = sum;
    for (int half = lanes / 2; half > 0; half /= 2) {
      __syncthreads();
      if (lane < half) own += channels_last ? sums[threadIdx.x][threadIdx.y + half] : sums[threadIdx.x + half][threadIdx.y];
    }
    return own;
  }
};

// A block for one tap and one part of the pixels.
template <class T>
__global__ void __launch_bounds__(256, 1)
    conv2d_depthwise_grad_weight_taps(const Problem problem, const T* grad_output, const T* input, int64_t channel_blocks,
                                      int64_t part_pixels, PartSums<T, SumOf<T>> to) {
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
  if (block.lane == 0 && k < problem.K) to.put(part, k * taps + tap, sum);
}

// ------------------------------------------------------------------------------------------------------------------ strips

constexpr int kStripThreads = 128;

// Of a multiprocessor at once, which leaves a thread 128, 168 or 255 registers.
template <int kKernel>
constexpr int kStripBlocks = kKernel == 3   ? 4
                             : kKernel == 5 ? 3
                                            : 2;

// Channels of a thread in channels_last, read at once; of 5 x 5 taps 2 channels would take 50 registers, with what they need.
template <int kKernel, bool kLast>
constexpr int kStripChannels = kLast && kKernel == 3 ? 2 : 1;
constexpr int kStripBlockChannels = 32;  // of a block in channels_last: 128 bytes of float32

// What a thread writes, `rows` rows of a column, and what it reads for that: `read_rows` rows of `columns` columns. Which tap
// takes row j to row i is known to the compiler: in grad_input with a stride, because strips begin where h + pad is a multiple of
// it.
template <int kKernel, int kStride, bool kTransposed>
struct Strip {
  static constexpr int rows = kStride == 1 ? 7 : kTransposed ? 8 : 4;  // 7 divides 14, 28, 56, 112
  static constexpr int before = (kKernel - 1) / kStride;
  static constexpr int columns = kTransposed ? before + 1 : kKernel;
  static constexpr int read_rows = kTransposed ? (rows - 1) / kStride + before + 1 : (rows - 1) * kStride + kKernel;

  static constexpr __host__ __device__ int tap(int i, int j) {
    return kTransposed ? i - (j - before) * kStride : j - i * kStride;
  }
  static __host__ __device__ int overhang(int pad) { return kTransposed ? pad % kStride : 0; }  // of the first strip
  static int strips(int written, int pad) { return int(ceil_div(written + overhang(pad), rows)); }

  int first, top;      // rows: the first one written, the first one read; both may lie outside
  int left, tap_left;  // column and tap; the others follow at distances -1 and stride in grad_input, 1 and 1 in forward

  __device__ Strip(int strip, int column, int h_pad, int w_pad) {
    first = strip * rows - overhang(h_pad);
    top = kTransposed ? (first + h_pad) / kStride - before : first * kStride - h_pad;
    left = kTransposed ? (column + w_pad) / kStride : column * kStride - w_pad;
    tap_left = kTransposed ? (column + w_pad) % kStride : 0;
  }
  __device__ int column(int c) const { return kTransposed ? left - c : left + c; }
  __device__ int column_tap(int c) const { return kTransposed ? tap_left + c * kStride : c; }
  __device__ bool has_column(int c, int width) const { return column_tap(c) < kKernel && unsigned(column(c)) < unsigned(width); }

  // Calls use(j, values) for each row j inside a plane of which `plane` is this strip's first column and pitches are the
  // distances of rows and columns. Rows are read some rows ahead of their use; values outside are 0.
  template <int V, class T, class Use>
  __device__ __forceinline__ void for_each_row(const T* plane, int row_pitch, int column_pitch, int height,
                                               const bool (&inside)[columns], Use use) const {
    constexpr int ahead = kKernel == 3 ? 3 : 1;
    Neighbours<T, V> values[ahead + 1][columns];
    const auto is_inside = [&](int j) { return unsigned(top + j) < unsigned(height); };
    const auto read = [&](int j) {
      const T* const row = plane + (top + j) * row_pitch;
#pragma unroll
      for (int c = 0; c < columns; ++c) {
        values[j % (ahead + 1)][c] = {};
        if (is_inside(j) && inside[c])
          values[j % (ahead + 1)][c] = *reinterpret_cast<const Neighbours<T, V>*>(row + (kTransposed ? -c : c) * column_pitch);
      }
    };
#pragma unroll
    for (int j = 0; j < ahead; ++j) read(j);
#pragma unroll
    for (int j = 0; j < read_rows; ++j) {
      if (j + ahead < read_rows) read(j + ahead);
      if (is_inside(j)) use(j, values[j % (ahead + 1)]);
    }
  }
};

// How strips are dealt out. NCHW: a thread has one strip of one channel. channels_last: thread t of a block has channels
// t % vectors V ... of the block and strip t / vectors, the strips of the same channels are its lanes.
struct Deal {
  int strips;  // of a column
  int vectors, lanes, channel_blocks;
};

template <class T, int kKernel, int kStride, bool kTransposed, bool kLast>
__global__ void __launch_bounds__(kStripThreads, kStripBlocks<kKernel>)
    conv2d_depthwise_strips(const Problem problem, const Deal deal, const T* from, const T* weight, const T* bias, bool relu,
                            T* to) {
  using Strip = Strip<kKernel, kStride, kTransposed>;
  constexpr int V = kStripChannels<kKernel, kLast>, taps = kKernel * kKernel, pitch = kStripBlockChannels + 1;
  const int height = kTransposed ? problem.h.written : problem.h.read, width = kTransposed ? problem.w.written : problem.w.read;
  const int rows = kTransposed ? problem.h.read : problem.h.written, columns = kTransposed ? problem.w.read : problem.w.written;
  const Strides &source = kTransposed ? problem.output : problem.input, &target = kTransposed ? problem.input : problem.output;
  const int C = problem.C, channels = problem.images * (kLast ? 1 : C);

  __shared__ float staged[kLast ? taps * pitch : 1];
  const int block_channels = deal.vectors * V, first_channel = kLast ? int(blockIdx.x) % deal.channel_blocks * block_channels : 0;
  int c = first_channel + (kLast ? int(threadIdx.x) % deal.vectors * V : 0);
  unsigned at = blockIdx.x * unsigned(kStripThreads) + threadIdx.x;
  if constexpr (kLast) {
    at = blockIdx.x / deal.channel_blocks * deal.lanes + threadIdx.x / deal.vectors;
    for (int i = threadIdx.x; i < block_channels * taps; i += blockDim.x)
      if (first_channel + i / taps < C) staged[i % taps * pitch + i / taps] = to_arithmetic(weight[first_channel * taps + i]);
    __syncthreads();
  }
  const int column = int(at % columns);
  at /= columns;
  const Strip strip(int(at % deal.strips), column, problem.h.pad, problem.w.pad);
  int n = int(at / deal.strips);
  if (n >= channels || c >= C) return;
  if constexpr (!kLast) {
    c = n % C;
    n /= C;
  }

  // Where a column lies outside, both factors are 0, so that an infinite one makes no NaN of the other.
  bool inside[Strip::columns];
  SumOf<T> filter[kKernel][Strip::columns][V];
#pragma unroll
  for (int j = 0; j < Strip::columns; ++j) {
    inside[j] = strip.has_column(j, width);
#pragma unroll
    for (int r = 0; r < kKernel; ++r)
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const int tap = r * kKernel + strip.column_tap(j);
        filter[r][j][v] = 0;
        if (inside[j])
          filter[r][j][v] = kLast ? staged[tap * pitch + c - first_channel + v] : to_arithmetic(weight[c * taps + tap]);
      }
  }

  const int column_pitch = kLast ? C : 1;
  SumOf<T> sums[Strip::rows][V] = {};
  strip.template for_each_row<V>(from + n * source.n + c * source.c + strip.left * column_pitch, int(source.h), column_pitch,
                                 height, inside, [&](int j, const auto& values) {
#pragma unroll
    for (int i = 0; i < Strip::rows; ++i) {
      const int r = Strip::tap(i, j);
      if (r < 0 || r >= kKernel) continue;
#pragma unroll
      for (int s = 0; s < Strip::columns; ++s)
#pragma unroll
        for (int v = 0; v < V; ++v) sums[i][v] += filter[r][s][v] * to_arithmetic(values[s].of[v]);
    }
  });
  T* const result = to + n * target.n + c * target.c + int64_t(column) * target.w;
#pragma unroll
  for (int i = 0; i < Strip::rows; ++i) {
    const int y = strip.first + i;
    if (unsigned(y) >= unsigned(rows)) continue;
    Neighbours<T, V> written;
#pragma unroll
    for (int v = 0; v < V; ++v) written.of[v] = finished(sums[i][v], bias, c + v, relu);
    *reinterpret_cast<Neighbours<T, V>*>(result + y * int(target.h)) = written;
  }
}

// A thread adds up the products of all taps over its strips; a block has one part of the strips of its channels.
template <class T, int kKernel, int kStride, bool kLast>
__global__ void __launch_bounds__(kStripThreads, kStripBlocks<kKernel>)
    conv2d_depthwise_grad_weight_strips(const Problem problem, const Deal deal, const T* grad_output, const T* input,
                                        int part_strips, PartSums<T, SumOf<T>> to) {
  using Strip = Strip<kKernel, kStride, false>;
  constexpr int V = kStripChannels<kKernel, kLast>, taps = kKernel * kKernel;
  const int height = problem.h.read, width = problem.w.read, P = problem.h.written, Q = problem.w.written, C = problem.C;
  const int part = int(blockIdx.x) / deal.channel_blocks,
            first_channel = int(blockIdx.x) % deal.channel_blocks * deal.vectors * V;
  const int c = first_channel + int(threadIdx.x) % deal.vectors * V, lane = int(threadIdx.x) / deal.vectors;
  const int column_pitch = kLast ? C : 1, row_pitch = int(problem.input.h), gradient_pitch = int(problem.output.h);
  const int all = problem.images * deal.strips * Q, begin = part * part_strips;
  const int end = c < C ? begin + min(part_strips, all - begin) : 0;

  SumOf<T> sums[kKernel][kKernel][V] = {};
  for (int at = begin + lane; at < end; at += deal.lanes) {
    const int column = at % Q, high = at / Q, n = high / deal.strips;
    const Strip strip(high % deal.strips, column, problem.h.pad, problem.w.pad);
    const T* const gradient = grad_output + n * problem.output.n + c * problem.output.c + column * column_pitch;
    const T* const plane = input + n * problem.input.n + c * problem.input.c + strip.left * column_pitch;
    Neighbours<T, V> gradients[Strip::rows] = {};
    bool inside[kKernel], all_inside = true;
    SumOf<T> nothing = 0;
#pragma unroll
    for (int i = 0; i < Strip::rows; ++i) {
      if (strip.first + i < P)
        gradients[i] = *reinterpret_cast<const Neighbours<T, V>*>(gradient + (strip.first + i) * gradient_pitch);
#pragma unroll
      for (int v = 0; v < V; ++v) nothing += 0 * to_arithmetic(gradients[i].of[v]);
    }
#pragma unroll
    for (int s = 0; s < kKernel; ++s) {
      inside[s] = strip.has_column(s, width);
      all_inside = all_inside && inside[s];
    }
    // Zeros stand for what lies outside, but must not make a NaN of an infinite factor.
    const int count = min(Strip::rows, P - strip.first);
    const auto add = [&](auto guarded) {
      strip.template for_each_row<V>(plane, row_pitch, column_pitch, height, inside, [&](int j, const auto& values) {
#pragma unroll
        for (int i = 0; i < Strip::rows; ++i) {
          const int r = Strip::tap(i, j);
          if (r < 0 || r >= kKernel || (guarded && i >= count)) continue;
#pragma unroll
          for (int s = 0; s < kKernel; ++s) {
            if (guarded && !inside[s]) continue;
#pragma unroll
            for (int v = 0; v < V; ++v) sums[r][s][v] += to_arithmetic(gradients[i].of[v]) * to_arithmetic(values[s].of[v]);
          }
        }
      });
    };
    if (count == Strip::rows && (all_inside || nothing == 0))
      add(std::false_type());
    else
      add(std::true_type());
  }

  __shared__ SumOf<T> shared[taps * V][kStripThreads];
#pragma unroll
  for (int tap = 0; tap < taps; ++tap)
#pragma unroll
    for (int v = 0; v < V; ++v) shared[tap * V + v][threadIdx.x] = sums[tap / kKernel][tap % kKernel][v];
  __syncthreads();
  if constexpr (kLast) {
    for (int i = threadIdx.x; i < taps * V * deal.vectors; i += blockDim.x) {
      const int vector = i % deal.vectors, row = i / deal.vectors, channel = first_channel + vector * V + row % V;
      SumOf<T> sum = 0;
      for (int other = 0; other < deal.lanes; ++other) sum += shared[row][other * deal.vectors + vector];
      if (channel < C) to.put(part, int64_t(channel) * taps + row / V, sum);
    }
  } else {
    for (int tap = threadIdx.x / 32; tap < taps; tap += kStripThreads / 32) {
      SumOf<T> sum = 0;
#pragma unroll
      for (int i = threadIdx.x % 32; i < kStripThreads; i += 32) sum += shared[tap][i];
      sum = add_up_warp(sum);
      if (threadIdx.x % 32 == 0) to.put(part, int64_t(c) * taps + tap, sum);
    }
  }
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

constexpr int64_t kPartPixels = 8192;  // of the taps; what a block reads of a channel stays in the L2 cache

bool is_last(const Conv2dGeometry& g) { return g.layout == Layout::channels_last && g.C > 1; }

// Offsets of strips have 32 bits.
template <class T>
bool suits_strips(const Conv2dGeometry& g) {
  constexpr int64_t limit = INT32_MAX;
  return sizeof(T) <= 4 && (g.R == 3 || g.R == 5 || g.R == 7) && g.S == g.R && g.stride_h <= (g.R < 7 ? 2 : 1) &&
         g.stride_w == g.stride_h && g.dilation_h == 1 && g.dilation_w == 1 && g.K == g.C &&
         (g.R > 3 || !is_last(g) || g.C % 2 == 0) && g.N * g.C * g.H * g.W <= limit && g.N * g.K * g.P * g.Q <= limit &&
         g.K * g.R * g.S <= limit;
}

// Channels that are read in pairs must be aligned for that.
template <class T>
bool suits_strips(const Conv2dGeometry& g, const T* one, const T* other) {
  return suits_strips<T>(g) && (g.R > 3 || !is_last(g) || (is_aligned<2>(one) && is_aligned<2>(other)));
}

// Calls run(kernel, stride, channels_last), each the type of a constant.
template <class Run>
void run_strips(const Conv2dGeometry& g, Run run) {
  const auto with_kernel = [&](auto kernel) {
    const auto with_stride = [&](auto stride) {
      if (is_last(g))
        run(kernel, stride, std::true_type());
      else
        run(kernel, stride, std::false_type());
    };
    if (g.stride_h == 1)
      with_stride(std::integral_constant<int, 1>());
    else if constexpr (kernel() < 7)
      with_stride(std::integral_constant<int, 2>());
  };
  if (g.R == 3)
    with_kernel(std::integral_constant<int, 3>());
  else if (g.R == 5)
    with_kernel(std::integral_constant<int, 5>());
  else
    with_kernel(std::integral_constant<int, 7>());
}

template <int V, bool kLast>
Deal deal_of(const Conv2dGeometry& g, int strips) {
  if (!kLast) return {strips, 1, kStripThreads, int(g.C)};
  const int64_t vectors = g.C / V, channel_blocks = ceil_div(vectors, kStripBlockChannels / V);
  const int block_vectors = int(ceil_div(vectors, channel_blocks));
  return {strips, block_vectors, kStripThreads / block_vectors, int(channel_blocks)};
}

template <bool kTransposed, class T>
void run(const char* op, const Conv2dGeometry& g, const T* from, const T* weight, const T* bias, bool relu, T* to,
         Stream stream) {
  const Problem problem = problem_of(op, g);
  if constexpr (sizeof(T) <= 4) {
    if (suits_strips(g, from, to)) {
      return run_strips(g, [&](auto kernel, auto stride, auto last) {
        constexpr int V = kStripChannels<kernel(), last()>;
        const int rows = kTransposed ? problem.h.read : problem.h.written;
        const int64_t columns = kTransposed ? g.W : g.Q;
        const int strips = Strip<kernel(), stride(), kTransposed>::strips(rows, problem.h.pad);
        const Deal deal = deal_of<V, last()>(g, strips);
        const int64_t work = g.N * strips * columns * (last() ? 1 : g.C);
        const int64_t blocks = ceil_div(work, deal.lanes) * (last() ? deal.channel_blocks : 1);
        launch(op, conv2d_depthwise_strips<T, kernel(), stride(), kTransposed, last()>, block_count(op, blocks),
               deal.vectors * deal.lanes, 0, stream, problem, deal, from, weight, bias, relu, to);
      });
    }
  }
  const int64_t count = kTransposed ? g.N * g.C * g.H * g.W : g.N * g.K * g.P * g.Q;
  launch(op, conv2d_depthwise_elements<T, kTransposed>, blocks_for(count, 256), 256, 0, stream, problem, from, weight, bias, relu,
         to, count);
}

// How the sums of grad_weight are cut: in pixels, or in rounds of the lanes.
Cut taps_cut(const Conv2dGeometry& g) { return {ceil_div(g.N * g.P * g.Q, kPartPixels), kPartPixels}; }

Cut strips_cut(const Conv2dGeometry& g) {
  Cut cut;
  run_strips(g, [&](auto kernel, auto stride, auto last) {
    const int64_t strips = Strip<kernel(), stride(), false>::strips(int(g.P), 0);
    const Deal deal = deal_of<kStripChannels<kernel(), last()>, last()>(g, int(strips));
    cut = cut_of(ceil_div(g.N * strips * g.Q, deal.lanes), 1, deal.channel_blocks);
  });
  return cut;
}

}  // namespace

template <class T>
void conv2d_forward(const Conv2dGeometry& g, const T* input, const T* weight, const Epilogue<T>& epilogue, T* output,
                    Stream stream) {
  run<false>("conv2d", g, on_device(input), on_device(weight), on_device(epilogue.bias), epilogue.relu, on_device(output),
             stream);
}

template <class T>
void conv2d_grad_input(const Conv2dGeometry& g, const T* grad_output, const T* weight, const Epilogue<T>& epilogue, T* grad_input,
                       Stream stream) {
  run<true>("conv2d_grad_input", g, on_device(grad_output), on_device(weight), on_device(epilogue.bias), epilogue.relu,
            on_device(grad_input), stream);
}

template <class T>
int64_t conv2d_grad_weight_workspace(const Conv2dGeometry& g) {
  const int64_t parts = std::max(taps_cut(g).parts, suits_strips<T>(g) ? strips_cut(g).parts : 0);
  return parts == 1 ? 0 : parts * g.K * g.R * g.S * int64_t(sizeof(SumOf<T>));
}

template <class T>
void conv2d_grad_weight(const Conv2dGeometry& g, const T* grad_output, const T* input, T* grad_weight, void* workspace,
                        Stream stream) {
  using D = Device<T>;
  const char* op = "conv2d_grad_weight";
  const Problem problem = problem_of(op, g);
  const D *gradient = on_device(grad_output), *in = on_device(input);
  const bool strips = suits_strips(g, gradient, in);
  const Cut cut = strips ? strips_cut(g) : taps_cut(g);
  const PartSums<D, SumOf<D>> to{on_device(grad_weight), static_cast<SumOf<D>*>(workspace), cut.parts, g.K * g.R * g.S};
  if (strips) {
    if constexpr (sizeof(T) <= 4)
      run_strips(g, [&](auto kernel, auto stride, auto last) {
        constexpr int V = kStripChannels<kernel(), last()>;
        const Deal deal = deal_of<V, last()>(g, Strip<kernel(), stride(), false>::strips(problem.h.written, 0));
        launch(op, conv2d_depthwise_grad_weight_strips<D, kernel(), stride(), last()>,
               block_count(op, cut.parts * deal.channel_blocks), deal.vectors * deal.lanes, 0, stream, problem, deal, gradient,
               in, int(cut.size * deal.lanes), to);
      });
  } else {
    const bool last = problem.output.c == 1;
    const int64_t blocks = ceil_div(g.K, last ? 32 : 8);
    launch(op, conv2d_depthwise_grad_weight_taps<D>,
           block_count(op, checked_mul(cut.parts * blocks, g.R * g.S, op, "thread blocks")), dim3(32, 8), 0, stream, problem,
           gradient, in, blocks, cut.size, to);
  }
  if (cut.parts > 1) add_parts(to.parts, cut.parts, 1, int(g.R * g.S), Layout::nchw, to.count, to.result, stream);
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
