// The matrix product that every dense convolution ends in: a register tile of C += A B, and the copies that feed it.
//
//   C[m][n] += sum_k A(m, k) B(k, n)         m < 6 rows (12 beside one vector), n < 2 vectors, k < depth
//
//   A   one element at a time, broadcast. It is read where it lies: IndirectA finds (m, k) at row[m] + offset[k], so that pixels
//       of an image, taps of a filter or positions of a batch need no patch matrix ("indirect convolution", Dukhan 2019,
//       section 3); StridedA at data + m row_stride + k step.
//   B   a vector at a time, packed [k][nr] (PackedB), or rows of an image at data + offset[k] (IndirectB).
//
// The method is that of BLIS (Van Zee and van de Geijn 2015, sections 2 and 5): the tile lives in registers, a depth of 384
// keeps the packed operand (24 KiB) in L1. How an element of C is summed depends on the geometry and on its place in the
// plane, not on the tile it falls into, so results do not depend on how the loops around are split among threads or on the
// neighbours in the batch.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "simd.h"

namespace torchcnn::TORCHCNN_ISA::gemm {

// 16 vector registers: 6 x 2 accumulators + 2 vectors of B + 1 broadcast element of A.
inline constexpr int64_t mr = 6;
template <class T>
inline constexpr int64_t nr = 2 * kLanes<T>;
// A packed panel has 24 KiB, three quarters of the smaller L1 caches: 384 x 16 floats, or 192 x 32.
template <class T>
inline constexpr int64_t max_depth = (24 << 10) / (nr<T> * sizeof(T));

// A panel whose filters fill one vector only takes tiles twice as tall where there are registers for them.
inline constexpr int64_t narrow_mr = TORCHCNN_VECTOR_REGISTERS == 32 ? 2 * mr : mr;

template <class T, int rows>
struct IndirectA {
  const T* row[rows];
  const int64_t* offset;
  T at(int m) const { return row[m][*offset]; }
  void next() { ++offset; }
};

template <class T>
struct StridedA {
  const T* data;
  int64_t row_stride, step;
  T at(int m) const { return data[m * row_stride]; }
  void next() { data += step; }
};

template <class T>
struct PackedB {
  const T* data;
  int64_t row;
  Vec<T> at(int v) const { return load(data + v * kLanes<T>); }
  void next() { data += row; }
};

template <class T>
struct IndirectB {
  const T* data;
  const int64_t* offset;
  Vec<T> at(int v) const { return load(data + *offset + v * kLanes<T>); }
  void next() { ++offset; }
};

// All loops over the tile are unrolled, or the accumulators would live in memory.
template <class T, int rows, int vectors>
struct Tile {
  Vec<T> sum[rows][vectors];

  [[gnu::always_inline]] void load_from(const T* c, int64_t c_row) {
#pragma GCC unroll 16
    for (int m = 0; m < rows; ++m)
#pragma GCC unroll 16
      for (int v = 0; v < vectors; ++v) sum[m][v] = load(c + m * c_row + v * kLanes<T>);
  }
  // What is in C is added last: the rounding errors of a long sum then grow with its pieces, not with every term.
  [[gnu::always_inline]] void add_from(const T* c, int64_t c_row) {
#pragma GCC unroll 16
    for (int m = 0; m < rows; ++m)
#pragma GCC unroll 16
      for (int v = 0; v < vectors; ++v) sum[m][v] += load(c + m * c_row + v * kLanes<T>);
  }
  [[gnu::always_inline]] void add(const Tile& other) {
#pragma GCC unroll 16
    for (int m = 0; m < rows; ++m)
#pragma GCC unroll 16
      for (int v = 0; v < vectors; ++v) sum[m][v] += other.sum[m][v];
  }
  // Row m starts at start[m], or at 0 without a start.
  [[gnu::always_inline]] void start_at(const T* start) {
#pragma GCC unroll 16
    for (int m = 0; m < rows; ++m)
#pragma GCC unroll 16
      for (int v = 0; v < vectors; ++v) sum[m][v] = start == nullptr ? Vec<T>{} : broadcast(start[m]);
  }
  // Leaves a and b behind the last term.
  template <class A, class B>
  [[gnu::always_inline]] void accumulate(int64_t depth, A& a, B& b) {
    for (int64_t k = 0; k < depth; ++k, a.next(), b.next()) {
      if constexpr (vectors <= rows) {
        Vec<T> right[vectors];
#pragma GCC unroll 16
        for (int v = 0; v < vectors; ++v) right[v] = b.at(v);
#pragma GCC unroll 16
        for (int m = 0; m < rows; ++m) {
          const T left = a.at(m);
#pragma GCC unroll 16
          for (int v = 0; v < vectors; ++v) sum[m][v] += left * right[v];
        }
      } else {  // wide and low: hold the elements of A instead
        T left[rows];
#pragma GCC unroll 16
        for (int m = 0; m < rows; ++m) left[m] = a.at(m);
#pragma GCC unroll 16
        for (int v = 0; v < vectors; ++v) {
          const Vec<T> right = b.at(v);
#pragma GCC unroll 16
          for (int m = 0; m < rows; ++m) sum[m][v] += left[m] * right;
        }
      }
    }
  }
  [[gnu::always_inline]] void rectify() {
#pragma GCC unroll 16
    for (int m = 0; m < rows; ++m)
#pragma GCC unroll 16
      for (int v = 0; v < vectors; ++v) sum[m][v] = rectified<T>(sum[m][v]);
  }
  [[gnu::always_inline]] void store_to(T* c, int64_t c_row) const {
#pragma GCC unroll 16
    for (int m = 0; m < rows; ++m)
#pragma GCC unroll 16
      for (int v = 0; v < vectors; ++v) store(c + m * c_row + v * kLanes<T>, sum[m][v]);
  }
};

// Calls run(std::integral_constant<int, rows>) for 1 <= rows <= most.
template <int most = mr, class Run>
[[gnu::always_inline]] inline void with_rows(int64_t rows, Run run) {
  if constexpr (most > 1)
    if (rows < most) return with_rows<most - 1>(rows, run);
  run(std::integral_constant<int, most>());
}

// How a tile of C begins and ends: it adds to what is there, or starts at `bias` (null: 0), one element for each column; at last
// it is rectified.
template <class T>
struct Ends {
  const T* bias;
  bool add, relu;
};

// Terms are added in runs of at most 49, then the runs: rounding errors grow with the longer of the two instead of the depth. The
// sums of grad_weight run over planes, and those of 7 x 7 and 14 x 14 pixels make whole runs.
inline constexpr int64_t max_run = 49;
struct Run {
  int64_t first, length;
};

// Cuts `length` terms from `first` on into runs of about the same length; returns how many.
inline int64_t cut_into_runs(int64_t first, int64_t length, Run* to) {
  const int64_t runs = (length + max_run - 1) / max_run;
  for (int64_t run = 0; run < runs; ++run) {
    const int64_t begin = run * length / runs;
    to[run] = {first + begin, (run + 1) * length / runs - begin};
  }
  return runs;
}

// c[rows][nr] (+)= A B over some runs of the terms, B packed; `vectors` is 1 where only the first of the two holds anything. A
// comes by reference: its rows, written one by one, would be copied two at a time, which has to wait until they have left for L1.
template <class T, int rows, int vectors>
[[gnu::noinline]] void tile_product(const Run* runs, int64_t count, const IndirectA<T, rows>& left, const T* b, T* c,
                                    int64_t c_row, const Ends<T>& ends) {
  Tile<T, rows, vectors> total;
  if (ends.bias != nullptr)
    total.load_from(ends.bias, 0);
  else
    total.start_at(nullptr);
  IndirectA<T, rows> a = left;
  for (const Run* run = runs; run < runs + count; ++run) {
    a.offset = left.offset + run->first;
    PackedB<T> right{b + run->first * nr<T>, nr<T>};
    Tile<T, rows, vectors> tile;
    tile.start_at(nullptr);
    tile.accumulate(run->length, a, right);
    total.add(tile);  // in registers where there are 32 of them
  }
  if (ends.add) total.add_from(c, c_row);
  if (ends.relu) total.rectify();
  total.store_to(c, c_row);
}

// How many rows the next tile of `rest` rows takes: `most`, but the last two share evenly what would leave a sliver.
inline int64_t tile_rows(int64_t rest, int64_t most = mr) {
  return rest >= most + most / 2 || rest <= most ? std::min(rest, most) : (rest + 1) / 2;
}

// Positions that grad_weight sums before it adds them to the rest: sums over a batch are long, and short pieces keep their
// rounding small.
inline constexpr int64_t gradient_depth = 256;

// Sums of few tasks are cut into slices, so that there are eight tasks for threads to share. The geometry alone decides how many,
// or the bits would depend on the number of threads.
inline int64_t slices_of(int64_t tasks, int64_t blocks) {
  const int64_t wanted = tasks >= 8 ? 1 : tasks >= 4 ? 2 : tasks >= 2 ? 4 : 8;
  return std::min(wanted, blocks);
}

// Sums that were cut into slices, [slice][element]: the slices are added in order.
template <class T>
inline void add_slices(const T* partial, int64_t slices, int64_t count, T* to) {
  for (int64_t i = 0; i < count; ++i) {
    T sum = partial[i];
    for (int64_t slice = 1; slice < slices; ++slice) sum += partial[slice * count + i];
    to[i] = sum;
  }
}

// Asks for `count` elements ahead of time: where one plane or row follows another at a distance, the processor does not guess it.
// They come to L2, which waits for more lines at once than L1.
template <class T>
[[gnu::always_inline]] inline void prefetch(const T* from, int64_t count) {
  for (int64_t x = 0; x < count; x += 64 / int64_t(sizeof(T))) __builtin_prefetch(from + x, 0, 2);
}

// In every 16 bytes, units of `unit` elements alternate: a0 b0 a1 b1 ... from the first half of them (half = 0) or the second.
template <class T, int unit, int half, size_t... lane>
[[gnu::always_inline]] inline Vec<T> interleave_units(Vec<T> a, Vec<T> b, std::index_sequence<lane...>) {
  constexpr int lanes = sizeof...(lane), part = 16 / sizeof(T), units = part / unit;
  constexpr auto source = [](int l) {
    const int u = l % part / unit;
    return l / part * part + (half * units / 2 + u / 2) * unit + l % unit + u % 2 * lanes;
  };
#if defined(__clang__)
  return __builtin_shufflevector(a, b, source(lane)...);
#else
  return __builtin_shuffle(a, b, Vec<IndexOf<T>>{source(lane)...});
#endif
}

// Exchanges the blocks of `block` elements at odd places of a with those at even places of b.
template <class T, int block, size_t... lane>
[[gnu::always_inline]] inline void swap_blocks(Vec<T>& a, Vec<T>& b, std::index_sequence<lane...>) {
  constexpr int lanes = sizeof...(lane);
  const Vec<T> x = a, y = b;
#if defined(__clang__)
  a = __builtin_shufflevector(x, y, (int(lane) & block ? lanes + int(lane) - block : int(lane))...);
  b = __builtin_shufflevector(x, y, (int(lane) & block ? lanes + int(lane) : int(lane) + block)...);
#else
  using Mask = Vec<IndexOf<T>>;
  a = __builtin_shuffle(x, y, Mask{(int(lane) & block ? lanes + int(lane) - block : int(lane))...});
  b = __builtin_shuffle(x, y, Mask{(int(lane) & block ? lanes + int(lane) : int(lane) + block)...});
#endif
}

template <class T, int block>
[[gnu::always_inline]] inline void swap_all_blocks(Vec<T>* v) {
  if constexpr (block < int(kLanes<T>)) {
#pragma GCC unroll 16
    for (int i = 0; i < int(kLanes<T>); ++i)
      if ((i & block) == 0) swap_blocks<T, block>(v[i], v[i + block], kEachLane<T>);
    swap_all_blocks<T, 2 * block>(v);
  }
}

// In place: v[i][j] = v[j][i]. Squares of 16 bytes first, then the squares themselves.
template <class T>
[[gnu::always_inline]] inline void transpose(Vec<T>* v) {
  constexpr int lanes = int(kLanes<T>), part = 16 / sizeof(T);
  constexpr auto each = kEachLane<T>;
#pragma GCC unroll 16
  for (int i = 0; i < lanes; i += 2) {
    const Vec<T> a = v[i], b = v[i + 1];
    v[i] = interleave_units<T, 1, 0>(a, b, each), v[i + 1] = interleave_units<T, 1, 1>(a, b, each);
  }
  if constexpr (part == 4) {
#pragma GCC unroll 16
    for (int i = 0; i < lanes; i += 4) {
      const Vec<T> a = v[i], b = v[i + 1], c = v[i + 2], d = v[i + 3];
      v[i] = interleave_units<T, 2, 0>(a, c, each), v[i + 1] = interleave_units<T, 2, 1>(a, c, each);
      v[i + 2] = interleave_units<T, 2, 0>(b, d, each), v[i + 3] = interleave_units<T, 2, 1>(b, d, each);
    }
  }
  swap_all_blocks<T, part>(v);
}

// to + row_of(x) nr: the elements from[l from_row + x] for l < lanes, then zeros up to nr.
template <class T, class RowOf>
void pack_transposed(const T* from, int64_t from_row, int64_t lanes, int64_t count, T* to, RowOf row_of) {
  constexpr int64_t L = kLanes<T>;
  for (int64_t first = 0; first < nr<T>; first += L) {
    int64_t x = 0;
    const int64_t used = std::clamp<int64_t>(lanes - first, 0, L);
    if (used > 0) {
      for (; x + L <= count; x += L) {
        Vec<T> v[L];
#pragma GCC unroll 16
        for (int64_t l = 0; l < L; ++l) {
          v[l] = l < used ? load(from + (first + l) * from_row + x) : Vec<T>{};
          __builtin_prefetch(from + (first + l + L) * from_row + x);
        }
        transpose<T>(v);
#pragma GCC unroll 16
        for (int64_t l = 0; l < L; ++l) store(to + row_of(x + l) * nr<T> + first, v[l]);
      }
    }
    for (; x < count; ++x) {
      T* row = to + row_of(x) * nr<T> + first;
      for (int64_t l = 0; l < used; ++l) row[l] = from[(first + l) * from_row + x];
      for (int64_t l = used; l < L; ++l) row[l] = T(0);
    }
  }
}

// The other way: to[l to_row + x] = finish(row_of(x)[l], l) for l < lanes. finish takes vectors: lane-wise starting at lane l.
template <class T, class RowOf, class Finish>
void unpack_transposed(RowOf row_of, int64_t lanes, int64_t count, T* to, int64_t to_row, Finish finish) {
  constexpr int64_t L = kLanes<T>;
  for (int64_t first = 0; first < lanes; first += L) {
    const int64_t used = std::min(L, lanes - first);
    int64_t x = 0;
    for (; x < count && count >= L; x += L) {
      x = std::min(x, count - L);  // the last square overlaps the one before it
      Vec<T> v[L];
#pragma GCC unroll 16
      for (int64_t l = 0; l < L; ++l) v[l] = finish(load(row_of(x + l) + first), first);
      transpose<T>(v);
      if (used == L) {
#pragma GCC unroll 16
        for (int64_t l = 0; l < L; ++l) store(to + (first + l) * to_row + x, v[l]);
      } else {
        for (int64_t l = 0; l < used; ++l) store(to + (first + l) * to_row + x, v[l]);
      }
    }
    for (; x < count; ++x) {
      const Vec<T> v = finish(load(row_of(x) + first), first);
      for (int64_t l = 0; l < used; ++l) to[(first + l) * to_row + x] = v[l];
    }
  }
}

}  // namespace torchcnn::TORCHCNN_ISA::gemm
