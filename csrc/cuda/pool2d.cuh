// How the pooling kernels share a tensor out among threads.
//
// An item is what is written at once: one element, X neighbouring elements of a row, or in channels_last V neighbouring channels
// (16 bytes). Items are numbered as they lie in memory, and neighbouring threads have neighbouring items. Pool<I> holds the
// geometry as kernels read it, in numbers of type I: of 32 bits wherever every number fits them, of 64 where not.
//
// The forward kernels share a large window out among a team of L threads, which take every L-th position of it each and then add
// up (or compare) pairwise in a fixed tree. Teams stand in blocks as L x B threads, B of them for neighbouring items:
//
//   thread t:  item (block teams / B + t / (L B)) B + t % B,   member t / B % L
//
// so that neighbouring threads read neighbouring addresses: along the window in NCHW (B = 1), along the channels in
// channels_last.
#pragma once

#include <algorithm>

#include "common.cuh"

namespace torchcnn::cuda {

// Three blocks at once leave a thread 80 registers; vectors need more.
inline constexpr int kPoolThreads = 256, kMostPoolThreads = 512;
template <int V>
inline constexpr int kPoolBlocks = V == 1 ? 3 : 2;

template <class T, int V>
struct alignas(std::min<size_t>(16, sizeof(T) * V)) Elements {
  T of[V];
};

template <int V, class T>
__device__ Elements<T, V> load(const T* from) {
  return *reinterpret_cast<const Elements<T, V>*>(from);
}

template <int V, class T>
__device__ void store(T* to, const Elements<T, V>& elements) {
  *reinterpret_cast<Elements<T, V>*>(to) = elements;
}

template <class T>
__device__ T zero() {
  return from_arithmetic<T>(decltype(to_arithmetic(T()))(0));
}

template <int V, class T>
__device__ Elements<T, V> all_of(T value) {
  Elements<T, V> elements;
#pragma unroll
  for (int v = 0; v < V; ++v) elements.of[v] = value;
  return elements;
}

// The channels of an item where they are read as vectors.
template <class T>
inline constexpr int kVector = 16 / sizeof(T);

template <class... Pointers>
bool aligned(const Pointers*... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

// ------------------------------------------------------------------------------------------------------ geometry of a kernel

// floor(n / divisor) for n >= 0. In 32 bits: n m / 2^(31 + s), where 2^s is the first power of 2 that is no less than the divisor
// and m = ceil(2^(31 + s) / divisor); m divisor - 2^(31 + s) < 2^s is too little to change the quotient of an n below 2^31.
template <class I>
struct Divider {
  I divisor;

  explicit Divider(int64_t by) : divisor(by) {}
  __device__ I operator()(I n) const { return n / divisor; }
};

template <>
struct Divider<int32_t> {
  uint32_t factor = 1u << 31;
  int shift = 31;

  explicit Divider(int64_t by) {
    while (by > int64_t(1) << (shift - 31)) ++shift;
    if (by > 0) factor = static_cast<uint32_t>(ceil_div(int64_t(1) << shift, by));
  }
  __device__ int32_t operator()(int32_t n) const {
    return static_cast<int32_t>(uint64_t(static_cast<uint32_t>(n)) * factor >> shift);
  }
};

// The window of geometry.h, and where its first tap stands: `skipped` taps before `begin`, in the padding.
template <class I>
struct PoolWindow {
  I first, skipped, begin, end, padded_size;
};

template <class I>
struct PoolRange {
  I begin, end;
};

// One axis of a pool, with the rules of geometry.h.
template <class I>
struct Axis {
  I size, windows, kernel, stride, pad, dilation;
  bool adaptive;
  Divider<I> by_size, by_windows, by_stride;

  Axis(const Pool2dGeometry& g, int64_t size, int64_t windows, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation)
      : size(size),
        windows(windows),
        kernel(kernel),
        stride(stride),
        pad(pad),
        dilation(dilation),
        adaptive(g.adaptive),
        by_size(size),
        by_windows(windows),
        by_stride(stride) {}

  __device__ PoolWindow<I> window(I p) const {
    if (adaptive) {
      const I begin = by_windows(p * size), end = by_windows((p + 1) * size + windows - 1);
      return {begin, 0, begin, end, end - begin};
    }
    const I first = p * stride - pad, last = first + dilation * (kernel - 1) + 1;
    const I skipped = first >= 0 ? 0 : dilation == 1 ? -first : (dilation - 1 - first) / dilation;
    return {first, skipped, first + skipped * dilation, min(last, size), min(last, size + pad) - first};
  }

  // Of the windows that contain one of `count` neighbouring positions, the first, and the one behind the last.
  __device__ PoolRange<I> windows_over(I position, I count = 1) const {
    if (adaptive) return {by_size(position * windows), by_size((position + count) * windows + size - 1)};
    const I first_begin = position + pad - dilation * (kernel - 1);
    return {first_begin > 0 ? by_stride(first_begin + stride - 1) : 0, min(by_stride(position + count - 1 + pad) + 1, windows)};
  }

  // On the host: the number of windows that windows_over can find.
  int64_t most_windows_over(int64_t count) const {
    const int64_t most = adaptive ? (count * windows + size - 1) / size + 1 : (count + dilation * (kernel - 1) - 1) / stride + 1;
    return std::min<int64_t>(most, windows);
  }
};

// What stands at an element: position (row, column) of a plane, and the number of the outer unit that the plane is in with c, the
// first channel. In NCHW the outer units are planes and c is 0, in channels_last they are images.
template <class I>
struct Place {
  I outer, row, column, c;
};

template <class I>
struct Pool {
  Axis<I> rows, columns;
  I inner;  // elements from one position of a plane to the next
  Divider<I> by_inner;

  explicit Pool(const Pool2dGeometry& g)
      : rows(g, g.H, g.P, g.R, g.stride_h, g.pad_h, g.dilation_h),
        columns(g, g.W, g.Q, g.S, g.stride_w, g.pad_w, g.dilation_w),
        inner(g.layout == Layout::nchw ? 1 : g.C),
        by_inner(inner) {}

  __device__ Place<I> place(I element, I row_count, I column_count, Divider<I> by_rows, Divider<I> by_columns) const {
    const I position = inner == 1 ? element : by_inner(element), row = by_columns(position), outer = by_rows(row);
    return {outer, row - outer * row_count, position - row * column_count, element - position * inner};
  }
  __device__ Place<I> input_place(I element) const {
    return place(element, rows.size, columns.size, rows.by_size, columns.by_size);
  }
  __device__ Place<I> output_place(I element) const {
    return place(element, rows.windows, columns.windows, rows.by_windows, columns.by_windows);
  }
  __device__ I input_plane(const Place<I>& place) const { return place.outer * rows.size * columns.size * inner + place.c; }
  __device__ I output_plane(const Place<I>& place) const {
    return place.outer * rows.windows * columns.windows * inner + place.c;
  }
};

// Whether a Pool<int32_t> and the numbers of all elements fit 32 bits; the number of a thread may lie beyond them a little.
inline bool fits_32_bits(const Pool2dGeometry& g) {
  constexpr int64_t most = INT32_MAX - (1 << 16);
  const auto axis_fits = [&](int64_t size, int64_t windows, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation) {
    if (g.adaptive) return size <= INT32_MAX && windows <= INT32_MAX && size * windows + 4 * (size + windows) <= most;
    for (int64_t part : {size, windows, kernel, stride, pad, dilation})
      if (part > most / 8) return false;
    return size + 2 * pad + dilation * kernel + stride <= most / 2;
  };
  return g.N * g.C * g.H * g.W <= most && g.N * g.C * g.P * g.Q <= most &&
         axis_fits(g.H, g.P, g.R, g.stride_h, g.pad_h, g.dilation_h) &&
         axis_fits(g.W, g.Q, g.S, g.stride_w, g.pad_w, g.dilation_w) && g.R * g.S <= most;
}

template <class T, class... Pointers>
bool in_vectors(const Pool2dGeometry& g, const Pointers*... pointers) {
  return g.layout == Layout::channels_last && g.C % kVector<T> == 0 && aligned(pointers...) && fits_32_bits(g);
}

// Calls run(I()) for a kernel with vectors of V channels.
template <int V, class Run>
void with_index_type(const Pool2dGeometry& g, Run run) {
  if (V > 1 || fits_32_bits(g)) return run(int32_t());
  if constexpr (V == 1) run(int64_t());
}

// A device has no memory for the items of 2^31 blocks.
inline unsigned pool_blocks(int64_t items, int64_t items_of_block = kPoolThreads) {
  return static_cast<unsigned>(ceil_div(items, items_of_block));
}

// -------------------------------------------------------------------------------------------------------------- gathering

// Calls visit(p, q, exists) for the windows over X neighbouring positions of a row, in their order. With rows_over and
// columns_over above 0, which no more windows than these can be along an axis, the loops are unrolled and their loads start at
// once.
template <int X, int rows_over, int columns_over, class I, class Visit>
__device__ void for_windows(const Pool<I>& pool, const Place<I>& place, Visit visit) {
  const PoolRange<I> rows = pool.rows.windows_over(place.row), columns = pool.columns.windows_over(place.column, X);
  if constexpr (rows_over == 0) {
    for (I p = rows.begin; p < rows.end; ++p)
      for (I q = columns.begin; q < columns.end; ++q) visit(p, q, true);
  } else {
#pragma unroll(rows_over* columns_over <= 9 ? rows_over : 1)
    for (int i = 0; i < rows_over; ++i)
#pragma unroll
      for (int j = 0; j < columns_over; ++j)
        visit(rows.begin + i, columns.begin + j, rows.begin + i < rows.end && columns.begin + j < columns.end);
  }
}

// Calls run<V, X, rows_over, columns_over, I>() for a gradient that is gathered over the windows of its positions.
template <class T, class Run>
void with_gather_shape(const Pool2dGeometry& g, const T* grad_input, bool vectors, Run run) {
  constexpr int V = kVector<T>, X = 4;
  if (!fits_32_bits(g)) return run.template operator()<1, 1, 0, 0, int64_t>();
  const Pool<int64_t> pool(g);
  const bool dense = g.dilation_h == 1 && g.dilation_w == 1;
  const auto at_most = [&](int64_t rows, int64_t columns, int64_t count) {
    return dense && pool.rows.most_windows_over(1) <= rows && pool.columns.most_windows_over(count) <= columns;
  };
  if (vectors) {
    if (at_most(1, 1, 1)) return run.template operator()<V, 1, 1, 1, int32_t>();
    if (at_most(2, 2, 1)) return run.template operator()<V, 1, 2, 2, int32_t>();
    if (at_most(3, 3, 1)) return run.template operator()<V, 1, 3, 3, int32_t>();
    return run.template operator()<V, 1, 0, 0, int32_t>();
  }
  if (g.layout == Layout::nchw && g.W % X == 0 && aligned(grad_input)) {
    if (at_most(1, 3, X)) return run.template operator()<1, X, 1, 3, int32_t>();
    if (at_most(2, 3, X)) return run.template operator()<1, X, 2, 3, int32_t>();
    if (at_most(3, 6, X)) return run.template operator()<1, X, 3, 6, int32_t>();
  }
  if (at_most(1, 1, 1)) return run.template operator()<1, 1, 1, 1, int32_t>();
  if (at_most(2, 2, 1)) return run.template operator()<1, 1, 2, 2, int32_t>();
  if (at_most(3, 3, 1)) return run.template operator()<1, 1, 3, 3, int32_t>();
  run.template operator()<1, 1, 0, 0, int32_t>();
}

// ----------------------------------------------------------------------------------------------------------------- teams

struct Team {
  int size_log, neighbours_log;

  constexpr int together() const { return size_log + neighbours_log; }
  constexpr int threads() const { return std::max(kPoolThreads, 1 << together()); }
  constexpr int items_of_block() const { return threads() >> size_log; }
};

// Teams for the windows of a pool, from the geometry of one image alone: sums have the same order in every batch, on every
// device. A member has 8 to 16 taps, of vectors half as many; more where the team is a block. A vector of channels that has a
// block to itself has one of its own, since planes so large come with few channels.
inline Team team_for(const Pool2dGeometry& g, int V) {
  constexpr int64_t least_taps = 16, large = 1024;
  const int64_t rows = g.adaptive ? ceil_div(g.H, g.P) : std::min(g.R, g.H),
                columns = g.adaptive ? ceil_div(g.W, g.Q) : std::min(g.S, g.W), taps = rows * columns;
  const bool last = g.layout == Layout::channels_last, shared_out = taps >= least_taps && taps <= 2 * g.H * g.W / (g.P * g.Q);
  Team team{0, 0};
  if (last && !(shared_out && taps >= large))
    while (team.neighbours_log < 3 && 1 << team.neighbours_log < g.C / V) ++team.neighbours_log;
  const int least_per_member = V == 1 ? 16 : 8;
  while (shared_out && 1 << team.together() < kMostPoolThreads && least_per_member << team.size_log <= taps) ++team.size_log;
  return team;
}

// The part of a thread.
template <class I>
struct Member {
  I item;
  int number;

  __device__ explicit Member(const Team& team) {
    const int thread = threadIdx.x, together = team.together();
    const I group = static_cast<I>(blockIdx.x) * (static_cast<int>(blockDim.x) >> together) + (thread >> together);
    item = (group << team.neighbours_log) + (thread & ((1 << team.neighbours_log) - 1));
    number = thread >> team.neighbours_log & ((1 << team.size_log) - 1);
  }
};

// Calls take(elements, taps) for kTaps taps of a window after another, those of one member of a team. A tap is r S + s. The
// elements of a tap that does not exist are `otherwise`. No load waits for what is done with another one of the same round.
inline constexpr int kTaps = 8;

template <int V, class I, class T, class Take>
__device__ void for_taps(const Pool<I>& pool, const PoolWindow<I>& row, const PoolWindow<I>& column, I S, const Team& team,
                         int number, const T* plane, T otherwise, Take take) {
  const I h_step = pool.rows.dilation, w_step = pool.columns.dilation;
  const I width = w_step == 1 ? column.end - column.begin : (column.end - column.begin + w_step - 1) / w_step;
  const I height = h_step == 1 ? row.end - row.begin : (row.end - row.begin + h_step - 1) / h_step;
  const I team_size = I(1) << team.size_log;
  const I rows_on = team_size == 1 ? I(width == 1) : team_size / width, columns_on = team_size - rows_on * width;
  I r = number == 0 ? I(0) : number / width, s = number - r * width;
  while (r < height) {
    Elements<T, V> elements[kTaps];
    I taps[kTaps];
#pragma unroll
    for (int u = 0; u < kTaps; ++u) {
      taps[u] = (row.skipped + r) * S + column.skipped + s;
      const T* const from = plane + ((row.begin + r * h_step) * pool.columns.size + column.begin + s * w_step) * pool.inner;
      elements[u] = r < height ? load<V>(from) : all_of<V>(otherwise);
      r += rows_on;
      s += columns_on;
      if (s >= width) {
        s -= width;
        ++r;
      }
    }
    take(elements, taps);
  }
}

// Takes the values of a team together in member 0: in a warp, then those of its warps. All threads of the block call it.
// `receive` gives what a lane so many lanes on has.
template <class Value, class Receive, class Take>
__device__ void take_together(const Team& team, Value& mine, Receive receive, Take take) {
  constexpr int warp_log = 5;
  for (int together = min(team.together(), warp_log) - 1; together >= team.neighbours_log; --together)
    take(mine, receive(mine, 1 << together));
  if (team.together() <= warp_log) return;
  Value* const shared = reinterpret_cast<Value*>(dynamic_shared_memory());
  const int warps_log = team.together() - warp_log, warp = (threadIdx.x >> warp_log) & ((1 << warps_log) - 1);
  const int lane = threadIdx.x & 31, at = (threadIdx.x >> warp_log << team.neighbours_log) + lane;
  const bool leads = lane < 1 << team.neighbours_log;
  if (leads) shared[at] = mine;
  __syncthreads();
  for (int half = 1 << warps_log >> 1; half > 0; half >>= 1) {
    if (leads && warp < half) {
      take(mine, shared[at + (half << team.neighbours_log)]);
      shared[at] = mine;
    }
    __syncthreads();
  }
}

template <class Value>
size_t shared_bytes(const Team& team) {
  return team.together() <= 5 ? 0 : (team.threads() / 32 << team.neighbours_log) * sizeof(Value);
}

}  // namespace torchcnn::cuda
