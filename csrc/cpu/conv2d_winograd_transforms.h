// The one-dimensional transforms of Winograd's minimal filtering F(m, r): m outputs of a filter with r taps from a tile of
// m + r - 1 inputs, with that many products instead of m r (Winograd, Arithmetic Complexity of Computations, 1980, chapter V;
// Lavin and Gray, Fast Algorithms for Convolutional Neural Networks, 2016, section 4).
//
//   output = A^T [(G filter) (.) (B^T input)]        forward; twice, on columns and rows, for F(m x m, r x r)
//   grad_filter = G^T [(A grad_output) (.) (B^T input)]
//
// They come from multiplying polynomials at the points 0, +-p_1, ..., +-p_h and infinity (Toom and Cook). With M_i(x) the product
// of x - q over all finite points q but point i, and M(x) over all of them,
//
//   A[i][j] = point_i^j,   G[i][j] = point_i^j / M_i(point_i),   B^T[i] = coefficients of M_i;
//   infinity: A[.][m - 1] = 1,   G[.][r - 1] = 1,   B^T = coefficients of M.
//
// Six points use 5/8 and 3/2: exact in binary, as is every entry of A and B, and with half of the error of the textbook's 1 and 2.
//
// Error bound, elementwise, with L >= 16 the number of terms of the direct sum and X the largest input of the tiles around an output:
//
//   |error| <= c eps L sum X |filter|,   c = (max_j sum_i |A_ij| b_i max_s |G_is|)^2,   b_i = sum_j |B^T_ij|
//
// because X b_i b_j, and the like for G and A, bound every intermediate value, and about L / r^2 + 24 roundings follow each other.
// grad_weight has A and G exchanged. c is 16 (grad_weight 16) for F(2x2, 3x3), 205 (232) for F(4x4, 3x3) and 277 (187) for
// F(2x2, 5x5): tests/test_winograd.py derives both the matrices and c.
#pragma once

#include <cstdint>

#if defined(__clang__)
#define TORCHCNN_UNROLL _Pragma("clang loop unroll(full)")
#else
#define TORCHCNN_UNROLL _Pragma("GCC unroll 16")
#endif

namespace torchcnn::TORCHCNN_ISA::winograd {

// A product that is rounded before it is added to another: of a b + c d the compiler could contract either, differently in each
// place that a transform is compiled into, and bits would depend on where a tile lies.
template <class V>
[[gnu::always_inline]] inline V rounded(V product) {
#if defined(__x86_64__)
  asm("" : "+v"(product));
#elif defined(__aarch64__)
  asm("" : "+w"(product));
#endif
  return product;
}

// T is the element, V what is computed with: T itself or a vector of it.
template <int m_, int r_>
struct Transform {
  static constexpr int m = m_, r = r_, tile = m + r - 1, pairs = (tile - 2) / 2;
  static_assert(tile == 4 || tile == 6);
  static constexpr double point[2] = {tile == 4 ? 1.0 : 0.625, 1.5};

  struct Constants {
    double power[2][6] = {};    // [pair][exponent]
    double zero_scale = 1;      // 1 / M_i(point_i) at the point 0, up to the sign, which its row of B^T takes over
    double pair_scale[2] = {};  // and at both points of a pair
    constexpr Constants() {
      for (int pair = 0; pair < 2; ++pair) {
        power[pair][0] = 1;
        for (int j = 1; j < 6; ++j) power[pair][j] = power[pair][j - 1] * point[pair];
      }
      if (tile == 4) {
        pair_scale[0] = 0.5;
        return;
      }
      zero_scale = 1 / (power[0][2] * power[1][2]);
      for (int pair = 0; pair < 2; ++pair) pair_scale[pair] = 0.5 / (power[pair][2] * (power[pair][2] - power[1 - pair][2]));
    }
  };
  static constexpr Constants constant{};

  // The polynomial of n coefficients at every point: A. Its even part is shared by p and -p, its odd part up to the sign.
  template <class T, class V, int n>
  [[gnu::always_inline]] static inline void evaluate(const V (&coefficient)[n], V (&value)[tile]) {
    value[0] = coefficient[0];
    TORCHCNN_UNROLL
    for (int pair = 0; pair < pairs; ++pair) {
      V part[2] = {coefficient[(n - 1) / 2 * 2], coefficient[n / 2 * 2 - 1]};  // even and odd, by Horner's rule in p^2
      TORCHCNN_UNROLL
      for (int j = n - 3; j >= 0; --j) part[j % 2] = part[j % 2] * T(constant.power[pair][2]) + coefficient[j];
      value[1 + 2 * pair] = part[1] * T(constant.power[pair][1]) + part[0];
      value[2 + 2 * pair] = part[0] - part[1] * T(constant.power[pair][1]);
    }
    value[tile - 1] = coefficient[n - 1];
  }

  // A^T
  template <class T, class V, int n>
  [[gnu::always_inline]] static inline void evaluate_transposed(const V (&value)[tile], V (&coefficient)[n]) {
    V even[pairs], odd[pairs];
    TORCHCNN_UNROLL
    for (int pair = 0; pair < pairs; ++pair) {
      even[pair] = value[1 + 2 * pair] + value[2 + 2 * pair];
      odd[pair] = value[1 + 2 * pair] - value[2 + 2 * pair];
    }
    TORCHCNN_UNROLL
    for (int j = 0; j < n; ++j) {
      const V(&part)[pairs] = j % 2 == 0 ? even : odd;
      V sum = part[0];
      if (j == n - 1) {
        sum = part[0] * T(constant.power[0][j]) + value[tile - 1];
      } else if (j > 0) {
        sum = rounded(part[0] * T(constant.power[0][j]));
      }
      if (j == 0) sum = sum + value[0];
      if (pairs == 2) sum = part[pairs - 1] * T(constant.power[1][j]) + sum;
      coefficient[j] = sum;
    }
  }

  template <class T, class V>
  [[gnu::always_inline]] static inline void scale(V (&value)[tile]) {
    if (tile != 4) value[0] = value[0] * T(constant.zero_scale);
    TORCHCNN_UNROLL
    for (int pair = 0; pair < pairs; ++pair) {
      value[1 + 2 * pair] = value[1 + 2 * pair] * T(constant.pair_scale[pair]);
      value[2 + 2 * pair] = value[2 + 2 * pair] * T(constant.pair_scale[pair]);
    }
  }

  // B^T
  template <class T, class V>
  [[gnu::always_inline]] static inline void input(const V (&x)[tile], V (&value)[tile]) {
    if constexpr (tile == 4) {
      value[0] = x[0] - x[2];
      value[1] = x[2] + x[1];
      value[2] = x[2] - x[1];
      value[3] = x[3] - x[1];
    } else {
      constexpr T product = T(constant.power[0][2] * constant.power[1][2]), sum = T(constant.power[0][2] + constant.power[1][2]);
      value[0] = x[0] * product + (x[4] - x[2] * sum);
      value[tile - 1] = x[1] * product + (x[tile - 1] - x[3] * sum);
      TORCHCNN_UNROLL
      for (int pair = 0; pair < pairs; ++pair) {  // M_i = x (x +- p) (x^2 - q^2), q the point of the other pair
        const V even = x[4] - x[2] * T(constant.power[1 - pair][2]), odd = x[3] - x[1] * T(constant.power[1 - pair][2]);
        value[1 + 2 * pair] = odd * T(constant.power[pair][1]) + even;
        value[2 + 2 * pair] = even - odd * T(constant.power[pair][1]);
      }
    }
  }

  // G
  template <class T, class V>
  [[gnu::always_inline]] static inline void filter(const V (&g)[r], V (&value)[tile]) {
    evaluate<T>(g, value);
    scale<T>(value);
  }

  // G^T
  template <class T, class V>
  [[gnu::always_inline]] static inline void filter_transposed(const V (&value)[tile], V (&g)[r]) {
    V scaled[tile];
    TORCHCNN_UNROLL
    for (int i = 0; i < tile; ++i) scaled[i] = value[i];
    scale<T>(scaled);
    TORCHCNN_UNROLL
    for (int i = 0; i < tile; ++i) scaled[i] = rounded(scaled[i]);
    evaluate_transposed<T>(scaled, g);
  }

  // A^T and A
  template <class T, class V>
  [[gnu::always_inline]] static inline void output(const V (&value)[tile], V (&y)[m]) {
    evaluate_transposed<T>(value, y);
  }
  template <class T, class V>
  [[gnu::always_inline]] static inline void output_transposed(const V (&y)[m], V (&value)[tile]) {
    evaluate<T>(y, value);
  }

  // The matrices, row by row, from the transforms of unit vectors: for the error bound and the tests.
  struct Matrices {
    double A[tile][m] = {}, G[tile][r] = {}, B_T[tile][tile] = {};
  };
  static Matrices matrices() {
    Matrices all;
    double column[tile];
    for (int j = 0; j < tile; ++j) {
      double unit[tile] = {};
      unit[j] = 1;
      input<double>(unit, column);
      for (int i = 0; i < tile; ++i) all.B_T[i][j] = column[i];
    }
    for (int j = 0; j < m; ++j) {
      double unit[m] = {};
      unit[j] = 1;
      output_transposed<double>(unit, column);
      for (int i = 0; i < tile; ++i) all.A[i][j] = column[i];
    }
    for (int j = 0; j < r; ++j) {
      double unit[r] = {};
      unit[j] = 1;
      filter<double>(unit, column);
      for (int i = 0; i < tile; ++i) all.G[i][j] = column[i];
    }
    return all;
  }
};

}  // namespace torchcnn::TORCHCNN_ISA::winograd
