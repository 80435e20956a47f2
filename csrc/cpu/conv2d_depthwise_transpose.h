// Planes to vectors of channels and back, for depthwise convolution:
//
//   packed[pixel][lane]  =  plane[lane][pixel]
//
// by the transposition of kLanes vectors in registers.
#pragma once

#include <algorithm>
#include <cstdint>

#include "conv2d_depthwise_axes.h"
#include "simd.h"

namespace torchcnn::TORCHCNN_ISA::depthwise {

// Lane j of the result is lane index(j) of a, or of b after the lanes of a.
template <class T, class Index, size_t... lane>
[[gnu::always_inline]] inline Vec<T> shuffled(Vec<T> a, Vec<T> b, Index index, std::index_sequence<lane...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, index(lane)...);
#else
  return __builtin_shuffle(a, b, Vec<IndexOf<T>>{IndexOf<T>(index(lane))...});
#endif
}

// Vectors r and r + distance of every 2 distance give vectors 2 r and 2 r + 1.
template <class T, int64_t distance, class First, class Second>
[[gnu::always_inline]] inline void shuffle_pairs(Vec<T> (&v)[kLanes<T>], First first, Second second) {
  Vec<T> out[kLanes<T>];
  unrolled<kLanes<T> / 2>([&](auto r) __attribute__((always_inline)) {
    constexpr int64_t a = r / distance * 2 * distance + r % distance;
    out[2 * r] = shuffled<T>(v[a], v[a + distance], first, kEachLane<T>);
    out[2 * r + 1] = shuffled<T>(v[a], v[a + distance], second, kEachLane<T>);
  });
  unrolled<kLanes<T>>([&](auto r) __attribute__((always_inline)) { v[r] = out[r]; });
}

// Transposes kLanes vectors, in shuffles that are one instruction each: elements within pieces of 16 bytes, then the pieces.
// Vector r of the result is v[place_of_row(r)].
template <class T>
inline constexpr int64_t kPiece = 16 / sizeof(T);
template <class T>
inline constexpr int64_t kPieces = kLanes<T> / kPiece<T>;

template <class T>
constexpr int64_t place_of_row(int64_t r) {
  return r % kPiece<T> * kPieces<T> + r / kPiece<T>;
}

template <class T>
[[gnu::always_inline]] inline void transpose(Vec<T> (&v)[kLanes<T>]) {
  constexpr int64_t lanes = kLanes<T>, piece = kPiece<T>, pieces = kPieces<T>;
  static_assert((piece == 2 || piece == 4) && (pieces == 1 || pieces == 2 || pieces == 4));
  const auto low = [](int64_t j) { return j / piece * piece + j % piece / 2 + j % 2 * lanes; };
  const auto high = [](int64_t j) { return j / piece * piece + piece / 2 + j % piece / 2 + j % 2 * lanes; };
  shuffle_pairs<T, piece / 2>(v, low, high);
  if constexpr (piece == 4) shuffle_pairs<T, piece / 2>(v, low, high);
  if constexpr (pieces > 1) {
    shuffle_pairs<T, piece>(v, [](int64_t j) { return j + j / (lanes / 2) * (lanes / 2); },
                            [](int64_t j) { return j + j / (lanes / 2) * (lanes / 2) + lanes / 2; });
  }
  if constexpr (pieces > 2) {
    shuffle_pairs<T, 2 * piece>(v, [](int64_t j) { return 2 * (j / piece) * piece + j % piece; },
                                [](int64_t j) { return (2 * (j / piece) + 1) * piece + j % piece; });
  }
}

// How many elements ahead of use planes are prefetched, to L2: the planes of the next vector, unless they are too far away.
template <class T>
int64_t elements_ahead(int64_t stride) {
  const int64_t next = kLanes<T> * stride;
  return next * int64_t(sizeof(T)) <= 128 << 10 ? next : 2048 / sizeof(T);
}

// `count` planes, at most kLanes, `stride` elements apart.
template <class T>
struct Planes {
  T* data;
  int64_t stride, count;
};

// place(x)[lane] = planes[lane][x] for x < pixels; lanes beyond the last plane repeat it.
template <class T, class Place>
[[gnu::always_inline]] inline void pack_planes(const Planes<const T>& planes, int64_t pixels, const Place& place) {
  constexpr int64_t lanes = kLanes<T>;
  const int64_t stride = planes.stride, count = planes.count, ahead = elements_ahead<T>(stride);
  if (pixels < lanes) {
    for (int64_t x = 0; x < pixels; ++x)
      for (int64_t lane = 0; lane < lanes; ++lane) place(x)[lane] = planes.data[std::min(lane, count - 1) * stride + x];
    return;
  }
  for (int64_t x = 0; x < pixels; x += lanes) {
    const int64_t begin = std::min(x, pixels - lanes);
    const T* at = planes.data + begin;
    Vec<T> v[lanes];
    unrolled<lanes>([&](auto l) __attribute__((always_inline)) {
      v[l] = load_once(at);
      __builtin_prefetch(at + ahead, 0, 2);
      if (l + 1 < count) advance(at, stride);
    });
    transpose<T>(v);
    unrolled<lanes>([&](auto r) __attribute__((always_inline)) { store(place(begin + r), v[place_of_row<T>(r)]); });
  }
}

// planes[lane][x] = from[x][lane] for x < pixels.
template <class T>
[[gnu::noinline]] void unpack_planes(const T* from, int64_t pixels, const Planes<T>& planes) {
  constexpr int64_t lanes = kLanes<T>;
  const int64_t stride = planes.stride, count = planes.count, ahead = elements_ahead<T>(stride);
  if (pixels < lanes) {
    for (int64_t lane = 0; lane < count; ++lane)
      for (int64_t x = 0; x < pixels; ++x) planes.data[lane * stride + x] = from[x * lanes + lane];
    return;
  }
  for (int64_t x = 0; x < pixels; x += lanes) {
    const int64_t begin = std::min(x, pixels - lanes);
    Vec<T> v[lanes];
    unrolled<lanes>([&](auto l) __attribute__((always_inline)) { v[l] = load_once(from + (begin + l) * lanes); });
    transpose<T>(v);
    T* at = planes.data + begin;
    unrolled<lanes>([&](auto r) __attribute__((always_inline)) {
      if (r >= count) return;
      store(at, v[place_of_row<T>(r)]);
      __builtin_prefetch(at + ahead, 1, 2);
      advance(at, stride);
    });
  }
}

}  // namespace torchcnn::TORCHCNN_ISA::depthwise
