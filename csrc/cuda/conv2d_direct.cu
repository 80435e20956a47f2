// Convolution forward and grad_input of groups that write or read few channels, by sums in registers: of a matrix product's tiles
// (conv2d_gather.cu) such a group would leave most columns, or most of the depth, empty.
//
//   result[n, k, y, x] = sum over c, i, j of weight[k, c, i, j] read[n, c, y step_h + i tap_h + origin_h, x step_w + ...]
//
// for each phase of the result (conv2d_patches.cuh): forward has one, grad_input one for each pair of remainders of h and w
// modulo the strides, with its share of the taps. A thread block has a tile of pixels of one phase, image and group, and
// kChannels of the channels written; a thread has kPixels pixels, one below the other. What the tile reads of some channels, with
// zeros outside the image, and their weights come to shared memory first, in the type that sums have: then nothing is left to
// check or convert.
//
// Each sum is added up in ascending order of the channel, then the row, then the column of what is read, by one thread. Neither
// the tile nor the number of channels staged at a time changes that order: the bits of a result depend on its geometry alone.
#include "conv2d_host.cuh"

namespace torchcnn::cuda::direct {

constexpr int kThreads = 128;  // of a block at most; small planes take fewer

// Of a multiprocessor at once, which leaves a thread 128 registers, or 168.
template <class Sum>
constexpr int kBlocks = sizeof(Sum) == 4 ? 4 : 3;

// Elements from row to row in shared memory. A constant, so that a thread reads its pixels at constant distances. Of a tile that
// is 16 wide the lanes of a warp have two rows kPixels apart: their banks differ by 16.
template <int kPixels>
constexpr int kPitch = kPixels == 4 ? 44 : 40;

template <class T>
struct Problem {
  Axis h, w;
  int groups, channels_read, channels_written;  // channels of a group
  int width, thread_rows;                       // of a tile: 8, 16 or 32 pixels wide, thread_rows kPixels high
  int columns, rows;                            // how many tiles cover a phase
  int chunks;                                   // of kChannels channels written; the last may have fewer
  int read_at_once;                             // channels that are staged at a time
  int read_vector;                              // channels of a pixel that one access reads, 1 in NCHW
  bool write_vectors;                           // whether vectors of channels can be written
  bool relu;
  int plane;  // staged elements of a channel, of the phase with most
  int shared_bytes;
  int taps_at, weights_at, planes_at, lines_at;  // where the parts of shared memory begin, in bytes; weights come first
  const T* from;
  Strides from_strides;
  const T* weight;
  int64_t weight_group, weight_written, weight_read, weight_tap;  // elements from one to the next
  const T* bias;
  T* to;
  Strides to_strides;
};

// One axis of what a tile reads. Taps are numbered as they lie in the activation, which in grad_input is backwards.
//
// Positions with the same remainder modulo the step are staged together, so that neighbouring pixels read neighbours and all
// banks: position p stands at p / step of part p % step. Beyond the last tap there are no parts: a 1x1 kernel has one.
struct Reach {
  int first;  // its position 0 in the activation, may be outside
  int tap;    // from tap to tap
  int step, parts, part_size;
  int first_weight, next_weight;

  __device__ Reach(const Axis& axis, const Phase& phase, int first_output, int outputs) {
    const int last = (phase.taps - 1) * phase.tap, span = axis.transposed ? -last : last;
    first = first_output * phase.step + phase.origin + (axis.transposed ? last : 0);
    tap = axis.transposed ? -phase.tap : phase.tap;
    step = phase.step;
    parts = min(step, span + 1);
    part_size = outputs + span / step;
    first_weight = axis.transposed ? phase.first_tap + (phase.taps - 1) * axis.period : 0;
    next_weight = axis.transposed ? -axis.period : 1;
  }
};

// Where a row or a column of a channel is: its offset in memory, -1 outside the image, and among the staged.
struct Line {
  int from, to;
};

// Which elements of a channel a thread stages: those of the block in turn.
struct Share {
  Counter first, step;  // row and column
  int columns, count;

  __device__ Share(int rows, int columns)
      : first(Counter::of(int(threadIdx.x), 1, columns)),
        step(Counter::of(int(blockDim.x), 1, columns)),
        columns(columns),
        count(rows * columns) {}
};

// Stages `channels` channels of which V are neighbours in memory; kElements kVectors loads are on their way at once.
template <int V, int kElements, int kVectors, class T, class Sum>
__device__ __forceinline__ void stage_channels(const T* from, int64_t next_channel, int channels, const Share& share,
                                               const Line* rows, const Line* columns, int plane, Sum* to) {
  Counter at = share.first;
  for (int first = threadIdx.x; first < share.count; first += kElements * blockDim.x) {
    int source[kElements], target[kElements];
#pragma unroll
    for (int e = 0; e < kElements; ++e, at.add(share.step, 1, share.columns)) {
      source[e] = target[e] = -1;
      if (first + e * int(blockDim.x) < share.count) {
        const Line row = rows[at.a], column = columns[at.c];
        source[e] = (row.from | column.from) < 0 ? -1 : row.from + column.from;
        target[e] = row.to + column.to;
      }
    }
    const T* channel = from;
    Sum* staged = to;
    for (int c = 0; c < channels; c += kVectors * V, channel += kVectors * V * next_channel, staged += kVectors * V * plane) {
      Run<T, V> values[kElements][kVectors];
#pragma unroll
      for (int e = 0; e < kElements; ++e)
#pragma unroll
        for (int i = 0; i < kVectors; ++i) {
#pragma unroll
          for (int v = 0; v < V; ++v) values[e][i].of[v] = from_arithmetic<T>(Sum(0));
          if (source[e] >= 0 && c + i * V < channels)
            values[e][i] = *reinterpret_cast<const Run<T, V>*>(channel + i * V * next_channel + source[e]);
        }
#pragma unroll
      for (int e = 0; e < kElements; ++e)
#pragma unroll
        for (int i = 0; i < kVectors; ++i)
          if (target[e] >= 0 && c + i * V < channels) {
#pragma unroll
            for (int v = 0; v < V; ++v) staged[(i * V + v) * plane + target[e]] = to_arithmetic(values[e][i].of[v]);
          }
    }
  }
}

template <class T, int kChannels, int kPixels>
__global__ void __launch_bounds__(kThreads, kBlocks<SumOf<T>>) conv2d_direct(const Problem<T> problem) {
  using Sum = SumOf<T>;
  constexpr int pitch = kPitch<kPixels>;
  // Neighbouring blocks read the same pixels, and in channels_last the same cache lines.
  unsigned block = blockIdx.x;
  const auto digit = [&](int radix) {
    const int value = int(block % unsigned(radix));
    block /= unsigned(radix);
    return value;
  };
  const int first_channel = digit(problem.chunks) * kChannels;
  const int phase_w = digit(problem.w.phases()), phase_h = digit(problem.h.phases()), group = digit(problem.groups);
  const int x0 = digit(problem.columns) * problem.width, y0 = digit(problem.rows) * problem.thread_rows * kPixels;
  const int64_t image = block;
  const Phase h = phase_of(problem.h, phase_h), w = phase_of(problem.w, phase_w);
  if (y0 >= h.outputs || x0 >= w.outputs) return;  // other phases have more

  const int x = int(threadIdx.x) % problem.width, y = int(threadIdx.x) / problem.width * kPixels;
  const int taps = h.taps * w.taps;
  Sum sums[kPixels][kChannels] = {};
  if (taps > 0) {
    unsigned char* const shared = dynamic_shared_memory();
    Sum* const weights = reinterpret_cast<Sum*>(shared);                             // [channel][tap][kChannels]
    int* const tap_places = reinterpret_cast<int*>(shared + problem.taps_at);        // [channel][tap], in bytes of planes
    Sum* const planes = reinterpret_cast<Sum*>(shared + problem.planes_at);          // [channel][part w][part h][row][column]
    int* const weight_places = reinterpret_cast<int*>(shared + problem.weights_at);  // [channel][tap], in memory
    Line* const lines = reinterpret_cast<Line*>(shared + problem.lines_at);          // rows, then columns, of every part
    const Reach rows(problem.h, h, y0, problem.thread_rows * kPixels), columns(problem.w, w, x0, problem.width);
    const int all_rows = rows.parts * rows.part_size, all_columns = columns.parts * columns.part_size;
    for (int i = threadIdx.x; i < all_rows + all_columns; i += blockDim.x) {
      const bool is_row = i < all_rows;
      const Reach& reach = is_row ? rows : columns;
      const int line = is_row ? i : i - all_rows, part = line / reach.part_size, in_part = line - part * reach.part_size;
      const int place = in_part * reach.step + part;
      const bool inside = unsigned(reach.first + place) < unsigned(is_row ? problem.h.read : problem.w.read);
      lines[i] = {inside ? place * int(is_row ? problem.from_strides.h : problem.from_strides.w) : -1,
                  is_row ? line * pitch : part * all_rows * pitch + in_part};
    }
    for (int i = threadIdx.x; i < problem.read_at_once * taps; i += blockDim.x) {
      const Counter tap = Counter::of(i, h.taps, w.taps);
      const int row = tap.b * rows.tap, column = tap.c * columns.tap;
      const int r = rows.first_weight + tap.b * rows.next_weight, s = columns.first_weight + tap.c * columns.next_weight;
      weight_places[i] = tap.a * int(problem.weight_read) + (r * problem.w.kernel + s) * int(problem.weight_tap);
      tap_places[i] = int(sizeof(Sum)) *
                      (tap.a * problem.plane +
                       ((column % columns.step * rows.parts + row % rows.step) * rows.part_size + row / rows.step) * pitch +
                       column / columns.step);
    }

    const Share share(all_rows, all_columns);
    const T* from = problem.from + image * problem.from_strides.n +
                    int64_t(group) * problem.channels_read * problem.from_strides.c + rows.first * problem.from_strides.h +
                    columns.first * problem.from_strides.w;
    const int own_written = int(threadIdx.x) % kChannels;  // whose weights this thread stages
    const bool own_exists = first_channel + own_written < problem.channels_written;
    const T* own_weight = problem.weight + group * problem.weight_group + (first_channel + own_written) * problem.weight_written;
    const unsigned char* const own = reinterpret_cast<const unsigned char*>(planes + y * pitch + x);

    for (int first_read = 0; first_read < problem.channels_read; first_read += problem.read_at_once) {
      const int count = min(problem.read_at_once, problem.channels_read - first_read);
      __syncthreads();          // the places are there, the channels before have been used
      constexpr int loads = 4;  // on their way at once
      const int weight_count = count * taps * kChannels;
      for (int first = threadIdx.x; first < weight_count; first += loads * blockDim.x) {
        T values[loads];
#pragma unroll
        for (int i = 0; i < loads; ++i) {
          const int at = first + i * int(blockDim.x);
          values[i] = from_arithmetic<T>(Sum(0));
          if (own_exists && at < weight_count) values[i] = own_weight[weight_places[at / kChannels]];
        }
#pragma unroll
        for (int i = 0; i < loads; ++i) {
          const int at = first + i * int(blockDim.x);
          if (at < weight_count) weights[at] = to_arithmetic(values[i]);
        }
      }
      own_weight += problem.read_at_once * problem.weight_read;
      const auto stage = [&](auto vector, auto elements) {
        stage_channels<vector(), elements(), 4 / elements()>(from, problem.from_strides.c, count, share, lines, lines + all_rows,
                                                             problem.plane, planes);
      };
      using One = std::integral_constant<int, 1>;
      using Two = std::integral_constant<int, 2>;
      using Four = std::integral_constant<int, 4>;
      if (problem.read_vector == 1 && count == 1)
        stage(One(), Four());
      else if (problem.read_vector == 1)
        stage(One(), Two());
      else if (problem.read_vector == kVectorSize<T>)
        stage(std::integral_constant<int, kVectorSize<T>>(), Two());
      else if constexpr (kVectorSize<T> > 4)
        stage(Four(), Two());
      from += problem.read_at_once * problem.from_strides.c;
      __syncthreads();

      constexpr int V = kChannels < kVectorSize<Sum> ? kChannels : kVectorSize<Sum>;
      const Run<Sum, V>* weight = reinterpret_cast<const Run<Sum, V>*>(weights);
      const auto add = [&](int place) {
        const Sum* const values = reinterpret_cast<const Sum*>(own + place);
        Run<Sum, V> factors[kChannels / V];
#pragma unroll
        for (int v = 0; v < kChannels / V; ++v) factors[v] = weight[v];
        weight += kChannels / V;
#pragma unroll
        for (int p = 0; p < kPixels; ++p) {
          const Sum value = values[p * pitch];
#pragma unroll
          for (int k = 0; k < kChannels; ++k) sums[p][k] += factors[k / V].of[k % V] * value;
        }
      };
      constexpr int at_once = 4;
      int i = 0;
#pragma unroll 1
      for (; i + at_once <= count * taps; i += at_once) {
        const Run<int, at_once> next = *reinterpret_cast<const Run<int, at_once>*>(tap_places + i);
#pragma unroll
        for (int n = 0; n < at_once; ++n) add(next.of[n]);
      }
#pragma unroll 1
      for (; i < count * taps; ++i) add(tap_places[i]);
    }
  }

  if (x0 + x >= w.outputs) return;
  const Strides& s = problem.to_strides;
  const int64_t channel = int64_t(group) * problem.channels_written + first_channel;
  const int channels = problem.channels_written - first_channel;  // if more than kChannels, then kChannels
  T* const to = problem.to + image * s.n + channel * s.c + (int64_t(x0 + x) * w.written_step + w.written_origin) * s.w;
  if (problem.bias != nullptr) {
#pragma unroll
    for (int k = 0; k < kChannels; ++k) {
      const Sum bias = k < channels ? to_arithmetic(problem.bias[channel + k]) : Sum(0);
#pragma unroll
      for (int p = 0; p < kPixels; ++p) sums[p][k] += bias;
    }
  }
#pragma unroll
  for (int p = 0; p < kPixels; ++p) {
    if (y0 + y + p >= h.outputs) break;
    T* const pixel = to + (int64_t(y0 + y + p) * h.written_step + h.written_origin) * s.h;
    const auto finished = [&](int k) {
      const Sum sum = sums[p][k];
      return from_arithmetic<T>(problem.relu && sum < 0 ? Sum(0) : sum);
    };
    constexpr int V = kChannels < kVectorSize<T> ? kChannels : kVectorSize<T>;
    if (problem.write_vectors) {
#pragma unroll
      for (int v = 0; v < kChannels; v += V) {
        Run<T, V> run;
#pragma unroll
        for (int k = 0; k < V; ++k) run.of[k] = finished(v + k);
        if (v < channels) *reinterpret_cast<Run<T, V>*>(pixel + v) = run;
      }
    } else {
#pragma unroll
      for (int k = 0; k < kChannels; ++k)
        if (k < channels) pixel[k * s.c] = finished(k);
    }
  }
}

namespace {

// Four blocks of kThreads have room in the 164 KB of an A100, with the 1 KB that each takes beside its own; smaller blocks get
// less. What a block can have without asking is the most.
constexpr int64_t kSharedBytes = 38 << 10, kMostSharedBytes = 48 << 10;

// Columns of a tile at most 15% more than the narrowest would have are worth a wider one, which reads longer rows.
constexpr int64_t kWiderPercent = 115;
// Rows likewise: a thread with few pixels loads more for each multiply-add.
constexpr int64_t kTallerPercent = 125;

// An axis as the phase with most results and taps has it.
struct Extent {
  int64_t outputs, step, reach;  // reach: positions from the first tap to the last

  explicit Extent(const Axis& axis)
      : outputs(ceil_div(axis.written, axis.phases())),
        step(axis.transposed ? 1 : axis.stride),
        reach((axis.taps(0) - 1) * (axis.transposed ? int64_t(axis.period) * axis.dilation / axis.stride : axis.dilation)) {}
  int64_t parts() const { return std::min(step, reach + 1); }
  int64_t part_size(int64_t tile) const { return tile + reach / step; }
};

// Sizes, strides, what does not depend on the tile.
template <class T>
Problem<T> direct_problem(const char* op, const Conv2dGeometry& g, bool transposed, Layout weight_layout) {
  Problem<T> problem = {};
  problem.h = axis_of(op, "height", g.H, g.P, g.R, g.stride_h, g.pad_h, g.dilation_h, transposed);
  problem.w = axis_of(op, "width", g.W, g.Q, g.S, g.stride_w, g.pad_w, g.dilation_w, transposed);
  problem.groups = as_int(op, "groups", g.G);
  problem.channels_read = as_int(op, "channels", transposed ? g.K_per_group() : g.C_per_group());
  problem.channels_written = as_int(op, "channels", transposed ? g.C_per_group() : g.K_per_group());
  problem.from_strides = transposed ? g.output_strides() : g.input_strides();
  problem.to_strides = transposed ? g.input_strides() : g.output_strides();
  const bool last = weight_layout == Layout::channels_last;
  const int64_t taps = g.R * g.S, filter = g.C_per_group() * taps, channel = last ? 1 : taps;
  problem.weight_group = g.K_per_group() * filter;
  problem.weight_written = transposed ? channel : filter;
  problem.weight_read = transposed ? filter : channel;
  problem.weight_tap = last ? g.C_per_group() : 1;
  return problem;
}

// Chooses a tile of kPixels rows a thread and what is staged at a time; false where that is too much.
template <int kChannels, int kPixels, class T>
bool choose_tile(Problem<T>& problem) {
  const Extent h(problem.h), w(problem.w);
  int64_t narrowest = 0;
  for (int width : {8, 16, 32}) {
    if (w.part_size(width) > kPitch<kPixels>) break;
    const int64_t padded = round_up(w.outputs, width);
    narrowest = narrowest == 0 ? padded : std::min(narrowest, padded);
    if (padded * 100 <= narrowest * kWiderPercent) problem.width = width;
  }
  if (narrowest == 0) return false;
  problem.columns = int(ceil_div(w.outputs, problem.width));
  const int64_t thread_rows = ceil_div(h.outputs, kPixels);
  problem.rows = int(ceil_div(thread_rows, kThreads / problem.width));
  problem.thread_rows = int(round_up(ceil_div(thread_rows, problem.rows), 32 / problem.width));  // whole warps
  problem.rows = int(ceil_div(thread_rows, problem.thread_rows));
  problem.chunks = int(ceil_div(problem.channels_written, kChannels));

  const int64_t tile_rows = h.part_size(problem.thread_rows * kPixels);
  const int64_t taps = int64_t(problem.h.taps(0)) * problem.w.taps(0);
  if (h.parts() * tile_rows > kMostSharedBytes || w.parts() > kMostSharedBytes || taps > kMostSharedBytes) return false;
  const int64_t plane = w.parts() * h.parts() * tile_rows * kPitch<kPixels>;
  const int64_t lines = h.parts() * tile_rows + w.parts() * w.part_size(problem.width);
  if (plane > kMostSharedBytes) return false;
  const auto bytes = [&](int64_t channels) {  // of shared memory, as the kernel lays it out
    const int64_t weights = round_up(channels * taps * kChannels * int64_t(sizeof(SumOf<T>)), 16);
    const int64_t table = round_up(channels * taps * int64_t(sizeof(int)), 16);
    problem.taps_at = int(weights);
    problem.weights_at = int(weights + table);
    problem.planes_at = int(weights + 2 * table);
    problem.lines_at = int(problem.planes_at + round_up(channels * plane * int64_t(sizeof(SumOf<T>)), 16));
    return problem.lines_at + lines * int64_t(sizeof(Line));
  };
  const int64_t wanted_bytes = kSharedBytes * problem.width * problem.thread_rows / kThreads;
  int64_t at_once = 1;
  while (at_once < problem.channels_read && bytes(at_once + 1) <= wanted_bytes) ++at_once;
  problem.read_vector = 1;
  for (int vector : {4, kVectorSize<T>})
    if (vector <= kVectorSize<T> && problem.from_strides.c == 1 && problem.channels_read % vector == 0 && vector <= at_once)
      problem.read_vector = vector;
  // As many at a time as the last chunk has, nearly.
  at_once = at_once / problem.read_vector * problem.read_vector;
  const int64_t times = std::max<int64_t>(1, ceil_div(problem.channels_read, at_once));
  problem.read_at_once = int(round_up(ceil_div(std::max(problem.channels_read, 1), times), problem.read_vector));
  problem.plane = int(plane);
  problem.shared_bytes = int(bytes(problem.read_at_once));
  // Offsets from the corner of a tile, and of the weights of a chunk, have 32 bits.
  constexpr int64_t limit = 1 << 30;
  const int64_t height = h.step * tile_rows, width = w.step * w.part_size(problem.width);
  return problem.shared_bytes <= kMostSharedBytes && problem.read_at_once * problem.weight_read < limit &&
         height < limit / std::max<int64_t>(1, problem.from_strides.h) &&
         width < limit / std::max<int64_t>(1, problem.from_strides.w);
}

template <class T>
int64_t blocks_of(const char* op, const Problem<T>& problem, int64_t images) {
  const int64_t phases = int64_t(problem.h.phases()) * problem.w.phases();
  const int64_t tiles = checked_mul(int64_t(problem.columns) * problem.rows, images, op, "thread blocks");
  return checked_mul(tiles, checked_mul(phases * problem.chunks, problem.groups, op, "thread blocks"), op, "thread blocks");
}

constexpr int kLowPixels = 2;  // of a thread at least

// Calls use(channels, pixels...), each the type of a constant: the kernels for a group that writes so many channels, those of
// tall tiles first. The fewest columns that stay empty decide, then the largest vector.
template <class T, class Use>
auto with_channels(int written, Use use) {
  constexpr std::integral_constant<int, 1> one;
  constexpr std::integral_constant<int, kLowPixels> low;
  constexpr std::integral_constant<int, 4> four;
  constexpr std::integral_constant<int, 8> eight;
  if (written <= 1) return use(one, four, low);
  if (written <= 4) return use(four, four, low);
  if constexpr (sizeof(T) == 8) {  // sums take two registers each
    return use(eight, four, low);
  } else {
    if (round_up(written, 16) == round_up(written, 8)) return use(std::integral_constant<int, 16>(), four, low);
    return use(eight, four, low);
  }
}

template <class T>
void run(const char* op, const Conv2dGeometry& g, bool transposed, const T* from, const T* weight, Layout weight_layout,
         const T* bias, bool relu, T* to, Stream stream) {
  Problem<T> problem = direct_problem<T>(op, g, transposed, weight_layout);
  problem.from = from;
  problem.weight = weight;
  problem.bias = bias;
  problem.relu = relu;
  problem.to = to;
  with_channels<T>(problem.channels_written, [&](auto channels, auto... pixels) {
    // The tallest tiles that fill the GPU, and whose rows the result fills; low ones otherwise.
    Problem<T> low_tiles = problem;
    choose_tile<channels(), kLowPixels>(low_tiles);
    const auto start = [&](auto pixels) {
      Problem<T> tiles = problem;
      const bool fits = choose_tile<channels(), pixels()>(tiles);
      const int64_t blocks = blocks_of(op, tiles, g.N), threads = tiles.width * tiles.thread_rows;
      const int64_t rows = int64_t(tiles.rows) * tiles.thread_rows * pixels();
      if (pixels() > kLowPixels && (!fits || blocks < ceil_div(2 * kBlocksThatFillAGpu * kThreads, threads) ||
                                    rows * 100 > int64_t(low_tiles.rows) * low_tiles.thread_rows * kLowPixels * kTallerPercent))
        return false;
      if (reinterpret_cast<uintptr_t>(from) % (tiles.read_vector * sizeof(T)) != 0) tiles.read_vector = 1;
      constexpr int V = std::min<int>(channels(), kVectorSize<T>);
      tiles.write_vectors =
          tiles.to_strides.c == 1 && tiles.channels_written % V == 0 && reinterpret_cast<uintptr_t>(to) % (V * sizeof(T)) == 0;
      if (blocks > 0)
        launch(op, conv2d_direct<T, channels(), pixels()>, block_count(op, blocks), tiles.width * tiles.thread_rows,
               tiles.shared_bytes, stream, tiles);
      return true;
    };
    (start(pixels) || ...);
  });
}

}  // namespace

template <class T>
bool fits(const Conv2dGeometry& g, bool transposed) {
  using D = Device<T>;
  if (g.C_per_group() * g.R * g.S >= int64_t(1) << 30) return false;
  Problem<D> problem = direct_problem<D>(transposed ? "conv2d_grad_input" : "conv2d", g, transposed, Layout::nchw);
  return with_channels<D>(problem.channels_written,
                          [&](auto channels, auto...) { return choose_tile<channels(), kLowPixels>(problem); });
}

template <class T>
void conv2d_forward(const Conv2dGeometry& g, const T* input, const T* weight, Layout weight_layout, const Epilogue<T>& epilogue,
                    T* output, Stream stream) {
  run("conv2d", g, false, on_device(input), on_device(weight), weight_layout, on_device(epilogue.bias), epilogue.relu,
      on_device(output), stream);
}

template <class T>
void conv2d_grad_input(const Conv2dGeometry& g, const T* grad_output, const T* weight, Layout weight_layout,
                       const Epilogue<T>& epilogue, T* grad_input, Stream stream) {
  run("conv2d_grad_input", g, true, on_device(grad_output), on_device(weight), weight_layout, on_device(epilogue.bias),
      epilogue.relu, on_device(grad_input), stream);
}

#define TORCHCNN_INSTANTIATE(T)                                                                                    \
  template bool fits<T>(const Conv2dGeometry&, bool);                                                              \
  template void conv2d_forward(const Conv2dGeometry&, const T*, const T*, Layout, const Epilogue<T>&, T*, Stream); \
  template void conv2d_grad_input(const Conv2dGeometry&, const T*, const T*, Layout, const Epilogue<T>&, T*, Stream);
TORCHCNN_INSTANTIATE(float)
TORCHCNN_INSTANTIATE(double)
TORCHCNN_INSTANTIATE(Float16)
TORCHCNN_INSTANTIATE(BFloat16)

}  // namespace torchcnn::cuda::direct
