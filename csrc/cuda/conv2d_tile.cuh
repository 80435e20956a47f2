// One tile of a matrix product in the registers of a thread block, D (block_m x block_n) += A B over block_k values of k at a
// time, from operands in shared memory. The convolution kernels differ in how they fill that memory, not in this.
//
//   Storage::by_index   a row holds one m of A (one n of B) and block_k values of k: what a forward tile is made of
//   Storage::by_k       a row holds one k and block_m values of m (block_n of n): grad_weight, whose k are pixels
//
// The 16-byte vectors of a row are permuted (xor with the number of the row), so that 8 lanes which read the same vector of 8
// rows, or 8 vectors of one row, read all 32 banks.
//
// Three kinds of arithmetic, the same tiles: WarpgroupMath steps by wgmma (on Hopper float16, bfloat16 and, by index, TF32),
// TensorMath by mma.sync (the same types elsewhere, and TF32 by k), SimtMath by one multiply-add at a time (float32, float64, and
// 16-bit types before sm_80). Each adds up the products of an element of D step by step in ascending order of k, whatever the
// tile: the choice of a tile does not change a bit. Within one step of the tensor cores the order is the GPU's, and taken to be
// that of every width of B.
#pragma once

#include <utility>

#include "common.cuh"
#include "wgmma.cuh"

namespace torchcnn::cuda {

enum class Storage { by_index, by_k };

constexpr int kVectorBytes = 16;      // what a thread copies at once
constexpr int kTileDepthBytes = 128;  // of a row of k: block_k is 64 elements of 2 bytes, 32 of 4, 16 of 8

template <class T>
constexpr int kVectorSize = kVectorBytes / int(sizeof(T));

// One operand's tile in shared memory, `block` wide, and how the threads of a block share its vectors: each has one column of
// vectors and `copies` rows, rows_at_once apart.
template <class Element, int block, Storage storage_, int threads>
struct OperandShape {
  using T = Element;
  static constexpr Storage storage = storage_;
  static constexpr int block_k = kTileDepthBytes / int(sizeof(T));
  static constexpr int rows = storage == Storage::by_index ? block : block_k;
  static constexpr int row_size = storage == Storage::by_index ? block_k : block;  // elements
  static constexpr int size = rows * row_size;
  static constexpr int vectors_per_row = row_size / kVectorSize<T>;
  static constexpr int rows_at_once = threads / vectors_per_row;
  static constexpr int copies = rows / rows_at_once;
  static_assert(threads % vectors_per_row == 0 && rows % rows_at_once == 0 && vectors_per_row % 8 == 0);

  // Where a vector of a row lies: panels of 8 vectors, 128 bytes, follow each other. Four-byte elements by k are read one by one,
  // of two vectors of four rows.
  static constexpr int panel_size = rows * 8 * kVectorSize<T>;
  static __device__ __forceinline__ int offset(int row, int vector) {
    const int mixed = storage == Storage::by_k && sizeof(T) == 4 ? row % 4 * 2 : row % 8;
    return vector / 8 * panel_size + (row * 8 + (vector % 8 ^ mixed)) * kVectorSize<T>;
  }
  // Where m (or n) `index` of depth k lies.
  static __device__ __forceinline__ int offset_of(int index, int k) {
    const int row = storage == Storage::by_index ? index : k, at = storage == Storage::by_index ? k : index;
    return offset(row, at / kVectorSize<T>) + at % kVectorSize<T>;
  }
  static __device__ int own_vector() { return int(threadIdx.x) % vectors_per_row; }
  static __device__ int own_row(int copy) { return int(threadIdx.x) / vectors_per_row + copy * rows_at_once; }
  static __device__ __forceinline__ int own_offset(int copy) {
    if constexpr (rows_at_once % 8 == 0)  // the permutation is that of the first
      return offset(own_row(0), own_vector()) + copy * rows_at_once * 8 * kVectorSize<T>;
    return offset(own_row(copy), own_vector());
  }
};

// 128 x 128 are 2 x 4 warps of 64 x 32; 128 x 64 are 4 x 2 and 64 x 64 are 2 x 2 warps of 32 x 32. On tensor cores, which are
// done sooner with a tile than four warps are with copying the next, 64 x 64 by index are 4 x 2 warps of 16 x 32. A warpgroup has
// 64 rows.
template <class Element, int block_m_, int block_n_, Storage storage_, int threads_ = 2 * block_m_>
struct TileShape {
  using T = Element;
  using Sum = SumOf<T>;
  static constexpr Storage storage = storage_;
  static constexpr int block_m = block_m_, block_n = block_n_, block_k = kTileDepthBytes / int(sizeof(T));
  static constexpr int threads = threads_, warps_n = block_n / 32, warps_m = threads / 32 / warps_n;
  static constexpr int warp_m = block_m / warps_m, warp_n = block_n / warps_n;
  using A = OperandShape<T, block_m, storage, threads>;
  using B = OperandShape<T, block_n, storage, threads>;
  // Places for tiles of k. 96 KB are what a block can have on every GPU with tensor cores, 64 KB on all. Small tiles with many
  // threads are those of layers with few blocks: a multiprocessor has one, whose copies nothing else hides.
  static constexpr int stages = block_m * block_n == 128 * 128 ? 3 : threads > 2 * block_m ? 6 : 4;
  static constexpr size_t shared_bytes = size_t(stages) * (A::size + B::size) * sizeof(T);

  static __device__ int warp_row() { return int(threadIdx.x) / 32 % warps_m * warp_m; }
  static __device__ int warp_column() { return int(threadIdx.x) / 32 / warps_m * warp_n; }
};

// ------------------------------------------------------------------------------------------------------- tensor cores

// Fragments of mma.m16n8k16 of 16-bit elements, and by index of mma.m16n8k8 of TF32, whose layout in bytes is the same: four
// 8 x 8 matrices at a time, a row of one being a vector.
template <class Operand>
__device__ __forceinline__ void load_a(uint32_t (&a)[4], const typename Operand::T* tile, int m, int k) {
  const int lane = threadIdx.x % 32, in_matrix = lane % 8, matrix = lane / 8;
  constexpr int V = kVectorSize<typename Operand::T>;
  if constexpr (Operand::storage == Storage::by_index)
    load_matrices(a, tile + Operand::offset(m + in_matrix + matrix % 2 * 8, k / V + matrix / 2));
  else
    load_matrices_transposed(a, tile + Operand::offset(k + in_matrix + matrix / 2 * 8, m / V + matrix % 2));
}

// Of two neighbouring n-tiles: b[0], b[1] for n ... n + 7, b[2], b[3] for n + 8 ... n + 15.
template <class Operand>
__device__ __forceinline__ void load_b(uint32_t (&b)[4], const typename Operand::T* tile, int n, int k) {
  const int lane = threadIdx.x % 32, in_matrix = lane % 8, matrix = lane / 8;
  constexpr int V = kVectorSize<typename Operand::T>;
  if constexpr (Operand::storage == Storage::by_index)
    load_matrices(b, tile + Operand::offset(n + in_matrix + matrix / 2 * 8, k / V + matrix % 2));
  else
    load_matrices_transposed(b, tile + Operand::offset(k + in_matrix + matrix % 2 * 8, n / V + matrix / 2));
}

// The same for TF32 by k, where no instruction transposes: element by element.
template <class Operand>
__device__ __forceinline__ void load_a_by_k(uint32_t (&a)[4], const float* tile, int m, int k) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int e = 0; e < 4; ++e) a[e] = __float_as_uint(tile[Operand::offset_of(m + g + e % 2 * 8, k + t + e / 2 * 4)]);
}
template <class Operand>
__device__ __forceinline__ void load_b_by_k(uint32_t (&b)[4], const float* tile, int n, int k) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int e = 0; e < 4; ++e) b[e] = __float_as_uint(tile[Operand::offset_of(n + g + e / 2 * 8, k + t + e % 2 * 4)]);
}

__device__ __forceinline__ void round_to_tf32(uint32_t (&fragment)[4]) {
#pragma unroll
  for (int e = 0; e < 4; ++e) fragment[e] = to_tf32(__uint_as_float(fragment[e]));
}

template <class Shape_>
struct TensorMath {
  using Shape = Shape_;
  using T = typename Shape::T;
  using A = typename Shape::A;
  using B = typename Shape::B;
  static constexpr bool is_compiled = kHasTensorSteps, is_asynchronous = false;
  static constexpr int blocks_at_once = 1;
  static constexpr int tiles_m = Shape::warp_m / 16, tiles_n = Shape::warp_n / 8;
  static constexpr bool is_tf32 = sizeof(T) == 4;
  static constexpr int depth = is_tf32 ? 8 : 16;  // of one step
  float sum[tiles_m][tiles_n][4] = {};

  // Adds the products of one tile of k.
  __device__ __forceinline__ void step(const T* a_tile, const T* b_tile) {
    const int m0 = Shape::warp_row(), n0 = Shape::warp_column();
#pragma unroll
    for (int k = 0; k < Shape::block_k; k += depth) {
      uint32_t a[tiles_m][4], b[tiles_n / 2][4];
#pragma unroll
      for (int i = 0; i < tiles_m; ++i) {
        if constexpr (is_tf32 && A::storage == Storage::by_k)
          load_a_by_k<A>(a[i], a_tile, m0 + 16 * i, k);
        else
          load_a<A>(a[i], a_tile, m0 + 16 * i, k);
        if constexpr (is_tf32) round_to_tf32(a[i]);
      }
#pragma unroll
      for (int j = 0; j < tiles_n / 2; ++j) {
        if constexpr (is_tf32 && B::storage == Storage::by_k)
          load_b_by_k<B>(b[j], b_tile, n0 + 16 * j, k);
        else
          load_b<B>(b[j], b_tile, n0 + 16 * j, k);
        if constexpr (is_tf32) round_to_tf32(b[j]);
      }
#pragma unroll
      for (int i = 0; i < tiles_m; ++i)
#pragma unroll
        for (int j = 0; j < tiles_n; ++j) {
          const uint32_t pair[2] = {b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]};
          if constexpr (is_tf32)
            mma_16x8x8_tf32(sum[i][j], a[i], pair);
          else
            mma_16x8x16(sum[i][j], a[i], pair, T());
        }
    }
  }

  // Calls write(m, n, value, value at n + 1) for all that this thread has summed; n is even.
  template <class Write>
  __device__ __forceinline__ void for_each_pair(Write write) const {
    const int lane = threadIdx.x % 32, m0 = Shape::warp_row() + lane / 4, n0 = Shape::warp_column() + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < tiles_m; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int j = 0; j < tiles_n; ++j) write(m0 + 16 * i + 8 * half, n0 + 8 * j, sum[i][j][2 * half], sum[i][j][2 * half + 1]);
  }
};

// ------------------------------------------------------------------------------------------------ one product at a time

template <class T, int size>
struct alignas(size * sizeof(T)) Run {
  T of[size];
};

// The lanes of a warp stand 8 x 4 on its tile; each has warp_m / 8 rows and warp_n / 4 columns. By index a lane reads vectors
// along k, of rows that follow those of its neighbours; by k it reads runs of its own rows and columns.
template <class Shape_>
struct SimtMath {
  using Shape = Shape_;
  using T = typename Shape::T;
  using Sum = typename Shape::Sum;
  using A = typename Shape::A;
  using B = typename Shape::B;
  static constexpr bool is_compiled = true, is_asynchronous = false;
  static constexpr int blocks_at_once = 1;
  static constexpr int lanes_m = 8, lanes_n = 4;
  static constexpr int thread_m = Shape::warp_m / lanes_m, thread_n = Shape::warp_n / lanes_n;
  static constexpr bool by_index = Shape::storage == Storage::by_index;
  static constexpr int run = kVectorSize<T> < 4 ? kVectorSize<T> : 4;
  static constexpr int run_m = by_index ? 1 : run, run_n = by_index ? 2 : run;  // columns are written in pairs
  static_assert(thread_m % run_m == 0 && thread_n % run_n == 0);
  Sum sum[thread_m][thread_n] = {};

  static __device__ __forceinline__ int row(int i) {
    return Shape::warp_row() + int(threadIdx.x) % 32 / lanes_n * run_m + i % run_m + i / run_m * run_m * lanes_m;
  }
  static __device__ __forceinline__ int column(int j) {
    return Shape::warp_column() + int(threadIdx.x) % lanes_n * run_n + j % run_n + j / run_n * run_n * lanes_n;
  }

  __device__ __forceinline__ void step(const T* a_tile, const T* b_tile) {
    if constexpr (by_index) {
      constexpr int V = kVectorSize<T>;
#pragma unroll 2
      for (int vector = 0; vector < A::vectors_per_row; ++vector) {
        Run<T, V> a[thread_m], b[thread_n];
#pragma unroll
        for (int i = 0; i < thread_m; ++i) a[i] = *reinterpret_cast<const Run<T, V>*>(a_tile + A::offset(row(i), vector));
#pragma unroll
        for (int j = 0; j < thread_n; ++j) b[j] = *reinterpret_cast<const Run<T, V>*>(b_tile + B::offset(column(j), vector));
#pragma unroll
        for (int k = 0; k < V; ++k)
#pragma unroll
          for (int i = 0; i < thread_m; ++i)
#pragma unroll
            for (int j = 0; j < thread_n; ++j) sum[i][j] += to_arithmetic(a[i].of[k]) * to_arithmetic(b[j].of[k]);
      }
    } else {
#pragma unroll 4
      for (int k = 0; k < Shape::block_k; ++k) {
        Run<T, run> a[thread_m / run], b[thread_n / run];
#pragma unroll
        for (int i = 0; i < thread_m / run; ++i)
          a[i] = *reinterpret_cast<const Run<T, run>*>(a_tile + A::offset_of(row(i * run), k));
#pragma unroll
        for (int j = 0; j < thread_n / run; ++j)
          b[j] = *reinterpret_cast<const Run<T, run>*>(b_tile + B::offset_of(column(j * run), k));
#pragma unroll
        for (int i = 0; i < thread_m; ++i)
#pragma unroll
          for (int j = 0; j < thread_n; ++j)
            sum[i][j] += to_arithmetic(a[i / run].of[i % run]) * to_arithmetic(b[j / run].of[j % run]);
      }
    }
  }

  template <class Write>
  __device__ __forceinline__ void for_each_pair(Write write) const {
#pragma unroll
    for (int i = 0; i < thread_m; ++i)
#pragma unroll
      for (int j = 0; j < thread_n; j += 2) write(row(i), column(j), sum[i][j], sum[i][j + 1]);
  }
};

// --------------------------------------------------------------------------------------------------- steps of a warpgroup

template <class Shape_>
struct WarpgroupMath {
  using Shape = Shape_;
  using T = typename Shape::T;
  using A = typename Shape::A;
  using B = typename Shape::B;
  static constexpr bool is_compiled = kHasWarpgroupSteps, is_asynchronous = true;
  static constexpr int blocks_at_once = 2;  // of a multiprocessor: one multiplies while the other waits
  static constexpr bool by_k = Shape::storage == Storage::by_k;
  static constexpr int groups_m = Shape::block_m / 64, groups_n = Shape::threads / 128 / groups_m;
  static constexpr int columns = Shape::block_n / groups_n, tiles_n = columns / 8;
  static_assert(groups_n == 1 || !by_k);
  float sum[tiles_n][4] = {};

  static __device__ __forceinline__ int first_row() {
    return (groups_n == 1 ? int(threadIdx.x) / 128 : int(threadIdx.x) / 128 % groups_m) * 64;
  }
  static __device__ __forceinline__ int first_column() { return groups_n == 1 ? 0 : int(threadIdx.x) / 128 / groups_m * columns; }

  // The tensor cores would drop the bits that TF32 has not. Each thread rounds what it has copied.
  static constexpr bool rounds = sizeof(T) == 4;
  static_assert(!rounds || !by_k, "no instruction transposes TF32");
  template <class Operand>
  static __device__ __forceinline__ void round_own(T* tile) {
#pragma unroll
    for (int copy = 0; copy < Operand::copies; ++copy) {
      uint4& vector = *reinterpret_cast<uint4*>(tile + Operand::own_offset(copy));
      vector = {to_tf32(__uint_as_float(vector.x)), to_tf32(__uint_as_float(vector.y)), to_tf32(__uint_as_float(vector.z)),
                to_tf32(__uint_as_float(vector.w))};
    }
  }

  // Begins the products of one tile of k.
  __device__ __forceinline__ void step(const T* a_tile, const T* b_tile) {
    constexpr int depth = 32 / int(sizeof(T)), row_bytes = 128;
    static_assert(A::block_k * int(sizeof(T)) == row_bytes);
    WarpgroupOperand a(a_tile + (by_k ? first_row() / 64 * A::panel_size : first_row() * A::row_size), A::panel_size * sizeof(T));
    WarpgroupOperand b(b_tile + first_column() * B::row_size, B::panel_size * sizeof(T));
    wgmma_begin(sum);
#pragma unroll
    for (int k = 0; k < Shape::block_k; k += depth) {
      wgmma<by_k>(sum, a, b, T());
      a.advance(depth * (by_k ? row_bytes : int(sizeof(T))));
      b.advance(depth * (by_k ? row_bytes : int(sizeof(T))));
    }
    wgmma_commit();
  }
  template <int under_way>
  __device__ __forceinline__ void wait() {
    wgmma_wait<under_way>(sum);
  }

  template <class Write>
  __device__ __forceinline__ void for_each_pair(Write write) const {
    const int lane = threadIdx.x % 32, m = first_row() + int(threadIdx.x) / 32 % 4 * 16 + lane / 4,
              n = first_column() + lane % 4 * 2;
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int j = 0; j < tiles_n; ++j) write(m + 8 * half, n + 8 * j, sum[j][2 * half], sum[j][2 * half + 1]);
  }
};

// ---------------------------------------------------------------------------------------------------------- the pipeline

// The whole sum over `tiles` tiles of k, `ahead` of them on their way while one is multiplied. fetch(tile, a, b) starts the
// copies of a tile's operands to a and b, and is called for each tile in ascending order. With many stages the step before may
// still be under way when an asynchronous one begins: its place is then freed one tile later.
template <class Math, class Fetch>
__device__ __forceinline__ void add_up_tiles(Math& math, int tiles, Fetch fetch) {
  using Shape = typename Math::Shape;
  using T = typename Math::T;
  constexpr int stages = Shape::stages, stage_size = Shape::A::size + Shape::B::size;
  constexpr int under_way = Math::is_asynchronous && stages > 4 ? 1 : 0, ahead = stages - 1 - under_way;
  T* const shared = reinterpret_cast<T*>(dynamic_shared_memory());
  const auto fetch_to = [&](int tile, int stage) {
    T* const a = shared + stage * stage_size;
    if (tile < tiles) fetch(tile, a, a + Shape::A::size);
    copy_async_commit();
  };
  for (int tile = 0; tile < ahead; ++tile) fetch_to(tile, tile);
  int stage = 0, freed = ahead;
  for (int tile = 0; tile < tiles; ++tile) {
    T* const a = shared + stage * stage_size;
    copy_async_wait<ahead - 1>();
    if constexpr (Math::is_asynchronous) {
      if constexpr (Math::rounds) {
        Math::template round_own<typename Shape::A>(a);
        Math::template round_own<typename Shape::B>(a + Shape::A::size);
      }
      show_tensor_cores();
    }
    __syncthreads();  // tile has arrived for all, and all have read the one whose place the next to come takes
    if constexpr (Math::is_asynchronous) {
      math.step(a, a + Shape::A::size);
      fetch_to(tile + ahead, freed);
      math.template wait<under_way>();
    } else {
      fetch_to(tile + ahead, freed);
      math.step(a, a + Shape::A::size);
    }
    stage = stage + 1 == stages ? 0 : stage + 1;
    freed = freed + 1 == stages ? 0 : freed + 1;
  }
  if constexpr (under_way > 0) math.template wait<0>();
}

}  // namespace torchcnn::cuda
