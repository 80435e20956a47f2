// Vectors of any element type in the arithmetic of element.h, the shuffles of strided rows, and integers stored in other widths.
#pragma once

#include <algorithm>

#include "element.h"
#include "simd.h"

namespace torchcnn::TORCHCNN_ISA {

// kLanes<float> elements of 16 bits.
using Bits16 [[gnu::vector_size(TORCHCNN_VECTOR_BYTES / 2)]] = uint16_t;
using Bits32 = Vec<uint32_t>;

// Integer lanes I from kLanes<I> unsigned elements of memory.
//
// The compiler's own conversion takes a vector of bytes apart. AVX-512 has an instruction for it; in 32 bytes each element is
// copied to every byte of its lane, for which the elements are repeated until each 16-byte block has its own within it, and
// shifted down to the lowest bytes.
template <class I, class From>
inline Vec<I> load_unsigned(const From* from) {
  using Narrow [[gnu::vector_size(kLanes<I> * sizeof(From))]] = From;
  Narrow elements;
  std::memcpy(&elements, from, sizeof elements);
  if constexpr (sizeof(From) == sizeof(I)) {
    return (Vec<I>)elements;
#if TORCHCNN_VECTOR_BYTES == 64
  } else if constexpr (sizeof(From) == 1) {
    if constexpr (sizeof(I) == 4) return (Vec<I>)_mm512_maskz_cvtepu8_epi32(__mmask16(-1), (__m128i)elements);
    if constexpr (sizeof(I) == 8) return (Vec<I>)_mm512_maskz_cvtepu8_epi64(__mmask8(-1), _mm_cvtsi64_si128((int64_t)elements));
#endif
  } else if constexpr (TORCHCNN_VECTOR_BYTES != 32 || sizeof(From) > 2) {
    return __builtin_convertvector(elements, Vec<I>);
  } else {
    using Unsigned = std::conditional_t<sizeof(I) == 8, uint64_t, uint32_t>;
    Vec<uint8_t> repeated;
    if constexpr (sizeof elements == 4) {
      repeated = (Vec<uint8_t>)(Vec<uint32_t>{} + (uint32_t)elements);
    } else if constexpr (sizeof elements == 8) {
      repeated = (Vec<uint8_t>)(Vec<uint64_t>{} + (uint64_t)elements);
    } else {
      static_assert(sizeof elements == 16);
      using Halves [[gnu::vector_size(16)]] = uint64_t;
      const Halves halves = (Halves)elements;
      repeated = [&]<size_t... lane>(std::index_sequence<lane...>) {
        return (Vec<uint8_t>)Vec<uint64_t>{halves[lane % 2]...};
      }(kEachLane<uint64_t>);
    }
    const auto spread = [&]<size_t... i>(std::index_sequence<i...>) {
      constexpr size_t size = sizeof(From), wide = sizeof(I);
#if defined(__clang__)
      return __builtin_shufflevector(repeated, repeated, static_cast<int>(i / 16 * 16 + i / wide * size % 16 + i % size)...);
#else
      return __builtin_shuffle(repeated, Vec<uint8_t>{static_cast<uint8_t>(i / 16 * 16 + i / wide * size % 16 + i % size)...});
#endif
    }(std::make_index_sequence<TORCHCNN_VECTOR_BYTES>());
    return (Vec<I>)((Vec<Unsigned>)spread >> (8 * (sizeof(I) - sizeof(From))));
  }
}

// kLanes<A> elements from memory, as the type that they are computed with; the formulas stand in element.h.
template <class T>
inline Vec<Arithmetic<T>> load_wide(const T* from) {
  if constexpr (kIsLowPrecision<T>) {
    const Bits32 x = (Bits32)load_unsigned<int32_t>(reinterpret_cast<const uint16_t*>(from));
    if constexpr (std::is_same_v<T, BFloat16>) {
      return (Vec<float>)(x << 16);
    } else {
      const Bits32 magnitude = (x & 0x7fff) << 13;
      const Bits32 bits = (Bits32)((Vec<float>)magnitude * 0x1p112f);
      // Compared as signed: the unsigned comparison is two instructions, and magnitudes stay below 2^28.
      const Bits32 special = (Bits32)((Vec<int32_t>)magnitude >= (0x7c00 << 13)) & 0x7f800000u;
      return (Vec<float>)(bits | special | (x & 0x8000) << 16);
    }
  } else {
    return load(from);
  }
}

template <class T>
inline void store_narrow(T* to, Vec<Arithmetic<T>> v) {
  if constexpr (kIsLowPrecision<T>) {
    const Bits32 bits = (Bits32)v;
    const Vec<int32_t> magnitude = (Vec<int32_t>)(bits & 0x7fffffff);
    Bits32 x;
    if constexpr (std::is_same_v<T, BFloat16>) {
      const Bits32 rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
      x = magnitude > 0x7f800000 ? (bits >> 16 | 0x40) : rounded;
    } else {
      const Vec<int32_t> normal = (magnitude - (112 << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
      const Vec<int32_t> subnormal = (Vec<int32_t>)((Vec<float>)magnitude + 0.5f) - 0x3f000000;
      Vec<int32_t> half = magnitude < 0x38800000 ? subnormal : normal;
      half = magnitude >= 0x47800000 ? Vec<int32_t>{} + 0x7c00 : half;
      half = magnitude > 0x7f800000 ? Vec<int32_t>{} + 0x7e00 : half;
      x = (Bits32)half | (bits >> 16 & 0x8000);
    }
    const Bits16 narrow_bits = __builtin_convertvector(x, Bits16);
    std::memcpy(to, &narrow_bits, sizeof narrow_bits);
  } else {
    store(to, v);
  }
}

template <class T>
[[gnu::noinline]] Vec<Arithmetic<T>> load_wide_partial(const T* from, int64_t count) {  // rare: kept out of the loops
  constexpr int64_t L = kLanes<Arithmetic<T>>;
  T lanes[L] = {};
  copy_few<L / 2>(from, std::min(count, L - 1), lanes);
  return load_wide(lanes);
}

template <class T>
inline void store_narrow_partial(T* to, Vec<Arithmetic<T>> v, int64_t count) {
  if (count >= kLanes<Arithmetic<T>>) return store_narrow(to, v);
  T lanes[kLanes<Arithmetic<T>>];
  store_narrow(lanes, v);
  copy_few<kLanes<Arithmetic<T>> / 2>(lanes, count, to);
}

// to[j] = from[j], converted; in either direction.
template <class T>
inline void widen_row(const T* from, int64_t count, Arithmetic<T>* to) {
  constexpr int64_t L = kLanes<Arithmetic<T>>;
  if (count < L) {
    for (int64_t j = 0; j < count; ++j) to[j] = widen(from[j]);
    return;
  }
  int64_t j = 0;
  for (; j + L <= count; j += L) store(to + j, load_wide(from + j));
  if (j < count) store(to + count - L, load_wide(from + count - L));  // overlap the last vector instead of a scalar tail
}

template <class T>
inline void narrow_row(const Arithmetic<T>* from, int64_t count, T* to) {
  constexpr int64_t L = kLanes<Arithmetic<T>>;
  if (count < L) {
    for (int64_t j = 0; j < count; ++j) to[j] = narrow<T>(from[j]);
    return;
  }
  int64_t j = 0;
  for (; j + L <= count; j += L) store_narrow(to + j, load(from + j));
  if (j < count) store_narrow(to + count - L, load(from + count - L));
}

#if !defined(__clang__)
template <size_t... i>
inline Vec<uint8_t> low_bytes_in_blocks(Vec<uint8_t> v, std::index_sequence<i...>) {
  return __builtin_shuffle(v, Vec<uint8_t>{static_cast<uint8_t>(i / 16 * 16 + i % 4 * 4)...});
}
#endif

// Elements first, first + 1, ... of v, not negative, as 64-bit lanes: each is copied to both halves of its lane.
template <int first, size_t... lane>
inline Vec<int64_t> first_widened(Vec<int32_t> v, std::index_sequence<lane...>) {
#if defined(__clang__)
  const Vec<int32_t> twice = __builtin_shufflevector(v, v, static_cast<int>(first + lane / 2)...);
#else
  const Vec<int32_t> twice = __builtin_shuffle(v, Vec<int32_t>{static_cast<int>(first + lane / 2)...});
#endif
  return (Vec<int64_t>)((Vec<uint64_t>)twice >> 32);
}

// Integer lanes, not negative where they become wider, stored as To, the first `count` of them if count < kLanes.
template <class I, class To>
inline void store_integers(To* to, Vec<I> v, int64_t count) {
  constexpr int64_t L = kLanes<I>;
  if (count < L) {
    To lanes[L];
    store_integers<I>(lanes, v, L);
    copy_few<L / 2>(lanes, count, to);
  } else if constexpr (sizeof(To) == sizeof(I)) {
    std::memcpy(to, &v, sizeof v);
#if TORCHCNN_VECTOR_BYTES == 64
  } else if constexpr (sizeof(To) == 1 && sizeof(I) == 4) {  // the compiler's own conversion takes a shuffled vector apart
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_maskz_cvtepi32_epi8(__mmask16(-1), (__m512i)v));
#endif
  } else if constexpr (TORCHCNN_VECTOR_BYTES == 64) {  // one instruction of AVX-512, whatever the widths
    using Stored [[gnu::vector_size(L * sizeof(To))]] = To;
    const Stored stored = __builtin_convertvector(v, Stored);
    std::memcpy(to, &stored, sizeof stored);
  } else if constexpr (sizeof(To) == 8 && sizeof(I) == 4) {
    store(to, first_widened<0>(v, kEachLane<int32_t>));
    store(to + L / 2, first_widened<L / 2>(v, kEachLane<int32_t>));
  } else if constexpr (sizeof(To) == 1 && sizeof(I) == 4) {
    // The lowest bytes of the four elements of each 16-byte block, side by side.
#if defined(__clang__)
    for (int64_t lane = 0; lane < L; ++lane) to[lane] = static_cast<To>(v[lane]);
#else
    const Bits32 bytes = (Bits32)low_bytes_in_blocks((Vec<uint8_t>)v, std::make_index_sequence<TORCHCNN_VECTOR_BYTES>());
    for (int block = 0; block < TORCHCNN_VECTOR_BYTES / 16; ++block) {
      const uint32_t four = bytes[4 * block];
      std::memcpy(to + 4 * block, &four, sizeof four);
    }
#endif
  } else {
    for (int64_t lane = 0; lane < L; ++lane) to[lane] = static_cast<To>(v[lane]);
  }
}

// Every second element of two vectors, in an order that costs one instruction: within each 16-byte block those of `a` stand
// before those of `b`. in_order restores the order, once for everything that was computed in between.
//
//   8 lanes, two blocks:   a0 a2 b0 b2 | a4 a6 b4 b6   --in_order-->   a0 a2 a4 a6 b0 b2 b4 b6
template <int lanes, int block>
constexpr int blocked_source(int lane, int odd_of_a, int odd_of_b) {
  const int first = lane / block * block, within = lane % block;
  return within < block / 2 ? first + 2 * within + odd_of_a : lanes + first + 2 * (within - block / 2) + odd_of_b;
}

template <int lanes, int block>
constexpr int ordered_source(int lane) {
  const int element = 2 * (lane % (lanes / 2));
  return element / block * block + element % block / 2 + (lane < lanes / 2 ? 0 : block / 2);
}

template <int odd_of_a, int odd_of_b, class T, size_t... lane>
inline Vec<T> every_second_blocked(Vec<T> a, Vec<T> b, std::index_sequence<lane...>) {
  constexpr int L = sizeof...(lane), B = 16 / sizeof(T);
#if defined(__clang__)
  return __builtin_shufflevector(a, b, blocked_source<L, B>(lane, odd_of_a, odd_of_b)...);
#else
  return __builtin_shuffle(a, b, Vec<IndexOf<T>>{blocked_source<L, B>(lane, odd_of_a, odd_of_b)...});
#endif
}

// Elements 0, 2, 4, ... (or 1, 3, 5, ...) of the 2 kLanes elements of a, b.
template <class T>
inline Vec<T> evens_blocked(Vec<T> a, Vec<T> b) {
  return every_second_blocked<0, 0, T>(a, b, kEachLane<T>);
}
template <class T>
inline Vec<T> odds_blocked(Vec<T> a, Vec<T> b) {
  return every_second_blocked<1, 1, T>(a, b, kEachLane<T>);
}
// from[0], from[2], from[4], ...: reads nothing beyond the last of them, so the second vector starts one element early.
template <class T>
inline Vec<T> load_evens_blocked(const T* from) {
  return every_second_blocked<0, 1, T>(load(from), load(from + kLanes<T> - 1), kEachLane<T>);
}

template <class T, size_t... lane>
inline Vec<T> in_order(Vec<T> v, std::index_sequence<lane...>) {
  constexpr int L = sizeof...(lane), B = 16 / sizeof(T);
#if defined(__clang__)
  return __builtin_shufflevector(v, v, ordered_source<L, B>(lane)...);
#else
  return __builtin_shuffle(v, Vec<IndexOf<T>>{ordered_source<L, B>(lane)...});
#endif
}

// a0 b0 a1 b1 ...: the first `count` pairs.
template <class T>
inline void store_interleaved(T* to, Vec<T> a, Vec<T> b, int64_t count = kLanes<T>) {
  constexpr int64_t L = kLanes<T>;
  store_partial(to, interleave<T>(a, b, 0, kEachLane<T>), std::min(L, 2 * count));
  if (2 * count > L) store_partial(to + L, interleave<T>(a, b, 1, kEachLane<T>), 2 * count - L);
}

// The lanes of a tap of consecutive windows, `stride` elements apart: 1 and 2 vectorised, 0 stands for any other. A result of
// stride 2 is in blocked order; ordered<stride> puts it right.
template <int stride, class T>
inline Vec<T> load_tap(const T* from, int64_t step) {
  if constexpr (stride == 1) {
    return load(from);
  } else if constexpr (stride == 2) {
    return load_evens_blocked(from);
  } else {
    Vec<T> v;
    for (int64_t lane = 0; lane < kLanes<T>; ++lane) v[lane] = from[lane * step];
    return v;
  }
}

template <int stride, class T>
inline Vec<T> ordered(Vec<T> v) {
  if constexpr (stride == 2) return in_order<T>(v, kEachLane<T>);
  return v;
}

// 0, step, 2 step, ...
template <class I>
inline Vec<I> steps_of(int64_t step) {
  Vec<I> v;
  for (int64_t lane = 0; lane < kLanes<I>; ++lane) v[lane] = static_cast<I>(lane * step);
  return v;
}

}  // namespace torchcnn::TORCHCNN_ISA
