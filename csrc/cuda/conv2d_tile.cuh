// One tile of a matrix product in the registers of a thread block, D (block_m x block_n) += A B over block_k values of k at a time,
// from operands in shared memory. The convolution kernels differ in how they fill that memory, not in this.
//
// A row of shared memory is followed by padding that lets 8 lanes read 16 bytes of 8 rows, or 4 x 8 words, from different banks.
//
//   Storage::by_index   a row holds one m of A (one n of B) and block_k values of k: what a forward tile is made of
//   Storage::by_k       a row holds one k and block_m values of m (block_n of n): grad_weight, whose k are pixels
//
// Two kinds of arithmetic, the same tiles: TensorMath steps by mma.sync (float16, bfloat16, TF32), SimtMath by one multiply-add at a
// time (float32, float64, and 16-bit types before sm_80). Either adds up the products of an element of D in ascending order of k,
// whatever the tile: the choice of a tile does not change a bit.
#pragma once

#include <utility>

#include "common.cuh"
#include "mma.cuh"

namespace torchcnn::cuda {

enum class Storage { by_index, by_k };

constexpr int kVectorBytes = 16;     // what a thread copies at once
constexpr int kTileDepthBytes = 64;  // of a row of k: block_k is 32 elements of 2 bytes, 16 of 4, 8 of 8

template <class T>
constexpr int kVectorSize = kVectorBytes / int(sizeof(T));

// Sizes of a tile and where its elements lie. 2 x 2 warps of 32 x 32 make 64 x 64, 2 x 4 of 64 x 32 make 128 x 128.
template <class Element, int block, Storage storage_>
struct TileShape {
  using T = Element;
  using Sum = SumOf<T>;
  static constexpr Storage storage = storage_;
  static constexpr int block_m = block, block_n = block, block_k = kTileDepthBytes / int(sizeof(T));
  static constexpr int warps_m = 2, warps_n = block / 32, threads = 32 * warps_m * warps_n;
  static constexpr int warp_m = block_m / warps_m, warp_n = block_n / warps_n;
  static constexpr int rows = storage == Storage::by_index ? block : block_k;      // of either operand
  static constexpr int row_size = storage == Storage::by_index ? block_k : block;  // elements
  static constexpr int padding = storage == Storage::by_k && sizeof(T) == 4 ? 8 : kVectorSize<T>;
  static constexpr int pitch = row_size + padding;  // elements from row to row
  static constexpr int operand_size = rows * pitch;
  static constexpr int stages = 3;  // tiles of k in flight
  static constexpr size_t shared_bytes = size_t(stages) * 2 * operand_size * sizeof(T);

  // How a block's threads share the 16-byte vectors of an operand: each has one column of vectors and `copies` rows.
  static constexpr int vectors_per_row = row_size / kVectorSize<T>;
  static constexpr int rows_at_once = threads / vectors_per_row;
  static constexpr int copies = rows / rows_at_once;
  static_assert(threads % vectors_per_row == 0 && rows % rows_at_once == 0);

  static __device__ int warp_row() { return int(threadIdx.x) / 32 % warps_m * warp_m; }
  static __device__ int warp_column() { return int(threadIdx.x) / 32 / warps_m * warp_n; }
};

// ------------------------------------------------------------------------------------------------------- tensor cores

// Fragments of 16-bit elements (mma.m16n8k16), four 8 x 8 matrices at a time.
template <class Shape>
__device__ __forceinline__ void load_a(uint32_t (&a)[4], const typename Shape::T* tile, int m, int k) {
  const int lane = threadIdx.x % 32, in_matrix = lane % 8, matrix = lane / 8;
  if constexpr (Shape::storage == Storage::by_index)
    load_matrices(a, tile + (m + in_matrix + matrix % 2 * 8) * Shape::pitch + k + matrix / 2 * 8);
  else
    load_matrices_transposed(a, tile + (k + in_matrix + matrix / 2 * 8) * Shape::pitch + m + matrix % 2 * 8);
}

// Of two neighbouring n-tiles: b[0], b[1] for n ... n + 7, b[2], b[3] for n + 8 ... n + 15.
template <class Shape>
__device__ __forceinline__ void load_b(uint32_t (&b)[4], const typename Shape::T* tile, int n, int k) {
  const int lane = threadIdx.x % 32, in_matrix = lane % 8, matrix = lane / 8;
  if constexpr (Shape::storage == Storage::by_index)
    load_matrices(b, tile + (n + in_matrix + matrix / 2 * 8) * Shape::pitch + k + matrix % 2 * 8);
  else
    load_matrices_transposed(b, tile + (k + in_matrix + matrix % 2 * 8) * Shape::pitch + n + matrix / 2 * 8);
}

// One element, at row `index` of the operand and depth k.
template <class Shape>
__device__ __forceinline__ typename Shape::T element(const typename Shape::T* tile, int index, int k) {
  return Shape::storage == Storage::by_index ? tile[index * Shape::pitch + k] : tile[k * Shape::pitch + index];
}

template <class Shape_>
struct TensorMath {
  using Shape = Shape_;
  using T = typename Shape::T;
  static constexpr bool is_compiled = kHasTensorSteps;
  static constexpr int tiles_m = Shape::warp_m / 16, tiles_n = Shape::warp_n / 8;
  float sum[tiles_m][tiles_n][4] = {};

  // Adds the products of one tile of k.
  __device__ __forceinline__ void step(const T* a_tile, const T* b_tile) {
    const int m0 = Shape::warp_row(), n0 = Shape::warp_column();
    if constexpr (sizeof(T) == 2) {
#pragma unroll
      for (int k = 0; k < Shape::block_k; k += 16) {
        uint32_t a[tiles_m][4], b[tiles_n / 2][4];
#pragma unroll
        for (int i = 0; i < tiles_m; ++i) load_a<Shape>(a[i], a_tile, m0 + 16 * i, k);
#pragma unroll
        for (int j = 0; j < tiles_n / 2; ++j) load_b<Shape>(b[j], b_tile, n0 + 16 * j, k);
#pragma unroll
        for (int i = 0; i < tiles_m; ++i)
#pragma unroll
          for (int j = 0; j < tiles_n; ++j) {
            const uint32_t pair[2] = {b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]};
            mma_16x8x16(sum[i][j], a[i], pair, T());
          }
      }
    } else {
      const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
      for (int k = 0; k < Shape::block_k; k += 8) {
        uint32_t a[tiles_m][4], b[tiles_n][2];
#pragma unroll
        for (int i = 0; i < tiles_m; ++i)
#pragma unroll
          for (int e = 0; e < 4; ++e) a[i][e] = to_tf32(element<Shape>(a_tile, m0 + 16 * i + g + e % 2 * 8, k + t + e / 2 * 4));
#pragma unroll
        for (int j = 0; j < tiles_n; ++j)
#pragma unroll
          for (int e = 0; e < 2; ++e) b[j][e] = to_tf32(element<Shape>(b_tile, n0 + 8 * j + g, k + t + e * 4));
#pragma unroll
        for (int i = 0; i < tiles_m; ++i)
#pragma unroll
          for (int j = 0; j < tiles_n; ++j) mma_16x8x8_tf32(sum[i][j], a[i], b[j]);
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

// The lanes of a warp stand 8 x 4 on its tile; each has warp_m / 8 rows and warp_n / 4 columns.
template <class Shape_>
struct SimtMath {
  using Shape = Shape_;
  using T = typename Shape::T;
  using Sum = typename Shape::Sum;
  static constexpr bool is_compiled = true;
  static constexpr int lanes_m = 8, lanes_n = 4;
  static constexpr int thread_m = Shape::warp_m / lanes_m, thread_n = Shape::warp_n / lanes_n;
  Sum sum[thread_m][thread_n] = {};

  // Rows from lane to lane read different banks; columns come in pairs, and so are written.
  static __device__ __forceinline__ int row(int i) { return Shape::warp_row() + int(threadIdx.x) % 32 / lanes_n + lanes_m * i; }
  static __device__ __forceinline__ int column(int j) {
    return Shape::warp_column() + int(threadIdx.x) % lanes_n * 2 + j % 2 + j / 2 * 2 * lanes_n;
  }

  __device__ __forceinline__ void step(const T* a_tile, const T* b_tile) {
#pragma unroll 4
    for (int k = 0; k < Shape::block_k; ++k) {
      Sum a[thread_m], b[thread_n];
#pragma unroll
      for (int i = 0; i < thread_m; ++i) a[i] = to_arithmetic(element<Shape>(a_tile, row(i), k));
#pragma unroll
      for (int j = 0; j < thread_n; ++j) b[j] = to_arithmetic(element<Shape>(b_tile, column(j), k));
#pragma unroll
      for (int i = 0; i < thread_m; ++i)
#pragma unroll
        for (int j = 0; j < thread_n; ++j) sum[i][j] += a[i] * b[j];
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

}  // namespace torchcnn::cuda
