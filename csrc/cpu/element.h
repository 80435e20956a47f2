// What a tensor holds and what is computed with it: bfloat16 and float16 are kept as their bits and computed with as float,
// every other type is computed with as it is. widen and narrow convert one element; simd_convert.h converts vectors the same way.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace torchcnn {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class T>
inline constexpr bool kIsLowPrecision = std::is_same_v<T, BFloat16> || std::is_same_v<T, Float16>;

// The type that a T is computed with.
template <class T>
using Arithmetic = std::conditional_t<kIsLowPrecision<T>, float, T>;

template <class To, class From>
inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

inline float widen(BFloat16 x) { return bits_as<float>(uint32_t(x.bits) << 16); }

// Exponent and mantissa move to float's place and 2^112 corrects the bias (127 - 15), subnormals included; the largest
// exponent, that of infinity and NaN, becomes float's largest.
inline float widen(Float16 x) {
  const uint32_t magnitude = uint32_t(x.bits & 0x7fff) << 13;
  uint32_t bits = bits_as<uint32_t>(bits_as<float>(magnitude) * 0x1p112f);
  if (magnitude >= 0x7c00u << 13) bits |= 0x7f800000u;
  return bits_as<float>(bits | uint32_t(x.bits & 0x8000) << 16);
}

template <class T>
inline T widen(T x) {
  return x;
}

// Both round to nearest, ties to even.
template <class T>
inline T narrow(Arithmetic<T> x) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    const uint32_t bits = bits_as<uint32_t>(x);
    if ((bits & 0x7fffffff) > 0x7f800000) return {static_cast<uint16_t>(bits >> 16 | 0x40)};  // NaN stays NaN
    return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
  } else if constexpr (std::is_same_v<T, Float16>) {
    const uint32_t bits = bits_as<uint32_t>(x), magnitude = bits & 0x7fffffff;
    uint32_t half;
    if (magnitude > 0x7f800000) {
      half = 0x7e00;  // NaN
    } else if (magnitude >= 0x47800000) {
      half = 0x7c00;  // 65536 and more
    } else if (magnitude < 0x38800000) {
      half = bits_as<uint32_t>(bits_as<float>(magnitude) + 0.5f) - 0x3f000000;  // below 2^-14: the addition rounds to 2^-24
    } else {
      half = (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
    }
    return {static_cast<uint16_t>(half | (bits >> 16 & 0x8000))};
  } else {
    return x;
  }
}

}  // namespace torchcnn
