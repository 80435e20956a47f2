// The vector type that the kernels are written in: Vec<T> holds kLanes<T> elements and has the arithmetic of T, lane by lane.
//
// It is the compiler's own vector extension (GCC and Clang), so that +, *, <, ?: need no wrapper, a * b + c becomes one fused
// multiply-add where the instruction set has it (-ffp-contract=fast), and the same kernels serve every instruction set: only
// the width, TORCHCNN_VECTOR_BYTES, differs, and the number of registers. isa/region.h sets them, and TORCHCNN_ISA, the namespace
// that keeps the copies of the kernels apart.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

namespace torchcnn::TORCHCNN_ISA {

template <class T>
struct VecOf {
  using type [[gnu::vector_size(TORCHCNN_VECTOR_BYTES)]] = T;
};
template <class T>
using Vec = typename VecOf<T>::type;

template <class T>
inline constexpr int64_t kLanes = TORCHCNN_VECTOR_BYTES / sizeof(T);

// The integer of the width of T: a comparison of Vec<T> gives Vec<IndexOf<T>>, all bits set where it holds.
template <class T>
using IndexOf = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;

template <class T>
inline Vec<T> load(const T* from) {
  Vec<T> v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

template <class T>
inline void store(T* to, Vec<T> v) {
  std::memcpy(to, &v, sizeof v);
}

template <class T>
inline Vec<T> broadcast(T x) {
  return Vec<T>{} + x;
}

// to[j] = from[j] for j < count < 2 part, in halves of halves: a loop over single elements, or lanes, costs many times more.
template <int64_t part, class T>
[[gnu::always_inline]] inline void copy_few(const T* from, int64_t count, T* to) {
  if constexpr (part > 0) {
    const bool taken = (count & part) != 0;
    if (taken) std::memcpy(to, from, part * sizeof(T));
    copy_few<part / 2>(taken ? from + part : from, count, taken ? to + part : to);
  }
}

// The first `count` lanes; the others are zero, or left alone in memory. Masked instructions where they are quick: stores of AVX2
// are not.
template <class T, size_t... lane>
inline Vec<IndexOf<T>> first_lanes(int64_t count, std::index_sequence<lane...>) {
  return Vec<IndexOf<T>>{IndexOf<T>(lane)...} < IndexOf<T>(count);
}

template <class T>
inline Vec<T> load_partial(const T* from, int64_t count) {
  if (count >= kLanes<T>) return load(from);
#if TORCHCNN_VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 4) return (Vec<T>)_mm512_maskz_loadu_epi32(__mmask16((1 << count) - 1), from);
  if constexpr (sizeof(T) == 8) return (Vec<T>)_mm512_maskz_loadu_epi64(__mmask8((1 << count) - 1), from);
#elif TORCHCNN_VECTOR_BYTES == 32
  const auto mask = [&]() __attribute__((always_inline)) {
    return (__m256i)first_lanes<T>(count, std::make_index_sequence<kLanes<T>>{});
  };
  if constexpr (sizeof(T) == 4) return (Vec<T>)_mm256_maskload_epi32(reinterpret_cast<const int*>(from), mask());
  if constexpr (sizeof(T) == 8) return (Vec<T>)_mm256_maskload_epi64(reinterpret_cast<const long long*>(from), mask());
#endif
  T lanes[kLanes<T>] = {};
  copy_few<kLanes<T> / 2>(from, count, lanes);
  return load(lanes);
}

template <class T>
inline void store_partial(T* to, Vec<T> v, int64_t count) {
  if (count >= kLanes<T>) return store(to, v);
#if TORCHCNN_VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 4) return _mm512_mask_storeu_epi32(to, __mmask16((1 << count) - 1), (__m512i)v);
  if constexpr (sizeof(T) == 8) return _mm512_mask_storeu_epi64(to, __mmask8((1 << count) - 1), (__m512i)v);
#endif
  T lanes[kLanes<T>];
  store(lanes, v);
  copy_few<kLanes<T> / 2>(lanes, count, to);
}

// v is computed here, and in a register: GCC would rather read memory again for every use, or put off a sum until it is stored.
template <class V>
[[gnu::always_inline]] inline void settle(V& v) {
#if defined(__x86_64__)
  asm("" : "+v"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#endif
}

// at += distance, out of the compiler's sight: else it keeps a register, or memory, for every multiple of the distance.
template <class T>
[[gnu::always_inline]] inline void advance(T*& at, int64_t distance) {
  at += distance;
  asm("" : "+r"(at));
}

// Lanes 0, 2, 4, ... (odd = 0) or 1, 3, 5, ... (odd = 1) of the 2 kLanes elements of a, b.
template <class T, size_t... lane>
inline Vec<T> every_second(Vec<T> a, Vec<T> b, int odd, std::index_sequence<lane...>) {
#if defined(__clang__)
  return odd ? __builtin_shufflevector(a, b, (2 * lane + 1)...) : __builtin_shufflevector(a, b, (2 * lane)...);
#else
  using Mask = Vec<IndexOf<T>>;
  if constexpr (sizeof(Vec<T>) == 32) {  // first within halves of 16 bytes, then across: GCC finds only a way with three shuffles
    constexpr size_t lanes = sizeof...(lane), half = lanes / 2, quarter = lanes / 4;
    const auto within = [](size_t l) { return l / half * half + l % quarter * 2 + (l % half < quarter ? 0 : lanes); };
    const Vec<T> v = odd ? __builtin_shuffle(a, b, Mask{IndexOf<T>(within(lane) + 1)...})
                         : __builtin_shuffle(a, b, Mask{IndexOf<T>(within(lane))...});
    return __builtin_shuffle(v, Mask{IndexOf<T>((lane / quarter == 1 || lane / quarter == 2 ? lane ^ (3 * quarter) : lane))...});
  }
  return odd ? __builtin_shuffle(a, b, Mask{(2 * lane + 1)...}) : __builtin_shuffle(a, b, Mask{(2 * lane)...});
#endif
}

// a0 b0 a1 b1 ...: the first half of that (half = 0) or the second (half = 1).
template <class T, size_t... lane>
inline Vec<T> interleave(Vec<T> a, Vec<T> b, int half, std::index_sequence<lane...>) {
  constexpr int lanes = sizeof...(lane);
#if defined(__clang__)
  return half ? __builtin_shufflevector(a, b, (lanes / 2 + lane / 2 + lane % 2 * lanes)...)
              : __builtin_shufflevector(a, b, (lane / 2 + lane % 2 * lanes)...);
#else
  using Mask = Vec<IndexOf<T>>;
  if constexpr (sizeof(Vec<T>) == 32) {  // the same
    constexpr size_t half_lanes = lanes / 2, quarter = lanes / 4;
    const auto within = [](size_t l) { return l / half_lanes * half_lanes + l % half_lanes / 2 + l % 2 * lanes; };
    const Vec<T> low = __builtin_shuffle(a, b, Mask{IndexOf<T>(within(lane))...});
    const Vec<T> high = __builtin_shuffle(a, b, Mask{IndexOf<T>(within(lane) + quarter)...});
    const auto joined = [](size_t l) { return l % half_lanes + l / half_lanes * lanes; };
    return half ? __builtin_shuffle(low, high, Mask{IndexOf<T>(joined(lane) + half_lanes)...})
                : __builtin_shuffle(low, high, Mask{IndexOf<T>(joined(lane))...});
  }
  return half ? __builtin_shuffle(a, b, Mask{(lanes / 2 + lane / 2 + lane % 2 * lanes)...})
              : __builtin_shuffle(a, b, Mask{(lane / 2 + lane % 2 * lanes)...});
#endif
}

template <class T>
inline constexpr auto kEachLane = std::make_index_sequence<kLanes<T>>{};

// to[j] = from[j]
template <class T>
inline void copy(const T* from, int64_t count, T* to) {
  int64_t j = 0;
  for (; j + kLanes<T> <= count; j += kLanes<T>) store(to + j, load(from + j));
  if (j == count) return;
  if (count >= kLanes<T>) {  // overlap the last vector instead of a scalar tail
    store(to + count - kLanes<T>, load(from + count - kLanes<T>));
    return;
  }
  for (; j < count; ++j) to[j] = from[j];
}

template <class T, int lanes>
struct ShortVecOf {
  using type [[gnu::vector_size(lanes * sizeof(T))]] = T;
};

// The lanes source(0), source(1), ... of a (from 0 on) and b (from `lanes` on).
template <class T, int lanes, class V, class Source, size_t... lane>
[[gnu::always_inline]] inline V shuffled(V a, V b, Source source, std::index_sequence<lane...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, source(int(lane))...);
#else
  return __builtin_shuffle(a, b, typename ShortVecOf<IndexOf<T>, lanes>::type{source(int(lane))...});
#endif
}

// to[j] = from[2 j], in vectors as short as `count` needs; the last overlaps the one before it. Nothing beyond the last is read:
// the second vector of each pair starts one element early.
template <class T, int lanes = int(kLanes<T>)>
inline void gather_even(const T* from, int64_t count, T* to) {
  if constexpr (lanes < 4) {
    for (int64_t j = 0; j < count; ++j) to[j] = from[2 * j];
  } else {
    if (count < lanes) return gather_even<T, lanes / 2>(from, count, to);
    for (int64_t next = 0; next < count; next += lanes) {
      const int64_t j = std::min(next, count - lanes);
      typename ShortVecOf<T, lanes>::type a, b;
      std::memcpy(&a, from + 2 * j, sizeof a);
      std::memcpy(&b, from + 2 * j + lanes - 1, sizeof b);
      constexpr auto source = [](int lane) { return lane < lanes / 2 ? 2 * lane : 2 * lane + 1; };
      const auto even = shuffled<T, lanes>(a, b, source, std::make_index_sequence<lanes>{});
      std::memcpy(to + j, &even, sizeof even);
    }
  }
}

// to[2 j] = from[j]; what lies between becomes zero, nothing beyond the last is written.
template <class T, int lanes = int(kLanes<T>)>
inline void scatter_even(const T* from, int64_t count, T* to) {
  if constexpr (lanes < 4) {
    for (int64_t j = 0; j < count; ++j) {
      to[2 * j] = from[j];
      if (j + 1 < count) to[2 * j + 1] = T(0);
    }
  } else {
    if (count < lanes) return scatter_even<T, lanes / 2>(from, count, to);
    for (int64_t next = 0; next < count; next += lanes) {
      const int64_t j = std::min(next, count - lanes);
      typename ShortVecOf<T, lanes>::type v;
      std::memcpy(&v, from + j, sizeof v);
      constexpr auto first = [](int lane) { return lane % 2 == 0 ? lane / 2 : lanes; };
      constexpr auto second = [](int lane) { return lane % 2 == 0 ? lanes : lanes / 2 + lane / 2; };
      const auto a = shuffled<T, lanes>(v, decltype(v){}, first, std::make_index_sequence<lanes>{});
      const auto b = shuffled<T, lanes>(v, decltype(v){}, second, std::make_index_sequence<lanes>{});
      std::memcpy(to + 2 * j, &a, sizeof a);
      std::memcpy(to + 2 * j + lanes - 1, &b, sizeof b);
      if (j > 0) to[2 * j - 1] = T(0);
    }
  }
}

// to[j] = from[j step]
template <class T>
inline void gather_strided(const T* from, int64_t step, int64_t count, T* to) {
  if (step == 1) return copy(from, count, to);
  if (step == 2) return gather_even(from, count, to);
  for (int64_t j = 0; j < count; ++j) to[j] = from[j * step];
}

// to[j step] = from[j]; what lies between is zero already, or becomes so.
template <class T>
inline void scatter_strided(const T* from, int64_t step, int64_t count, T* to) {
  if (step == 1) return copy(from, count, to);
  if (step == 2) return scatter_even(from, count, to);
  for (int64_t j = 0; j < count; ++j) to[j * step] = from[j];
}

template <class T>
inline void fill(T* to, int64_t count, T value) {
  for (int64_t j = 0; j < count; ++j) to[j] = value;
}

// max(0, v); NaN stays NaN.
template <class T>
inline Vec<T> rectified(Vec<T> v) {
  return v < Vec<T>{} ? Vec<T>{} : v;
}

// a > b ? a : b, in the one instruction that compilers do not find where b may be NaN. (GCC 12 warns of its own header, but for
// masked ones.)
template <class T>
[[gnu::always_inline]] inline Vec<T> larger(Vec<T> a, Vec<T> b) {
#if TORCHCNN_VECTOR_BYTES == 64
  if constexpr (std::is_same_v<T, float>) return (Vec<T>)_mm512_maskz_max_ps(__mmask16(-1), (__m512)a, (__m512)b);
  if constexpr (std::is_same_v<T, double>) return (Vec<T>)_mm512_maskz_max_pd(__mmask8(-1), (__m512d)a, (__m512d)b);
#elif TORCHCNN_VECTOR_BYTES == 32
  if constexpr (std::is_same_v<T, float>) return (Vec<T>)_mm256_max_ps((__m256)a, (__m256)b);
  if constexpr (std::is_same_v<T, double>) return (Vec<T>)_mm256_max_pd((__m256d)a, (__m256d)b);
#endif
  return a > b ? a : b;
}

// Lanes added in a fixed order, first to last.
template <class T>
inline T horizontal_sum(Vec<T> v) {
  T sum = v[0];
  for (int64_t lane = 1; lane < kLanes<T>; ++lane) sum += v[lane];
  return sum;
}

}  // namespace torchcnn::TORCHCNN_ISA
