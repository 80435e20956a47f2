// The one-dimensional transforms of Winograd's minimal filtering F(m, r): m outputs of a filter with r taps from a tile of
// m + r - 1 inputs, with that many products instead of m r (Winograd, Arithmetic Complexity of Computations, 1980, chapter V;
// Lavin and Gray, Fast Algorithms for Convolutional Neural Networks, 2016, section 4).
//
//   output = A^T [(G filter) (.) (B^T input)]        forward; on columns and rows for F(m x m, r x r)
//   grad_filter = G^T [(A grad_output) (.) (B^T input)]
//
// They come from multiplying polynomials at m + r - 2 points and infinity (Toom and Cook). With M_i(x) the product of x - q over
// all finite points q but point i, and M(x) over all of them,
//
//   A[i][j] = point_i^j,   G[i][j] = point_i^j / M_i(point_i),   B^T[i] = coefficients of M_i;
//   infinity: A[.][m - 1] = 1,   G[.][r - 1] = 1,   B^T = coefficients of M.
//
// The points are 0, 1 where there are two of them, 0, +-1 for three, 0, +-3/4, 2 for four and 0, +-5/8, +-3/2 for five: exact in
// binary, as is every entry of A and B; four and five of them have half of the error of the textbook's. Error bound, elementwise,
// with L >= 16 the number of terms of the direct sum (of phases: with the taps that they lack) and X the largest input of the
// tiles around an output:
//
//   |error| <= c eps L sum X |filter|,   c = the product over both axes of max_j sum_i |A_ij| b_i max_s |G_is|,
//                                        b_i = sum_j |B^T_ij|
//
// because X b_i b_j, and the like for G and A, bound every intermediate value, and about L / taps + 24 roundings follow each
// other. It is that of whole tiles: of those cut off at an edge (extend, below) c is smaller, by more than their first steps add.
// grad_weight has A and G exchanged. tests/test_winograd.py derives the matrices and c, and has its values.
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

// What every algorithm below says of itself, along one axis:
//
//   in, step         elements of an input tile, and how far the next tile is
//   points           of the transforms, and so products
//   out              outputs of a tile; the next tile's follow
//   r, stride        of the convolution
//   needs, extend    of a tile whose first `wanted` outputs alone count, at the edge of the result: which products it needs, and
//                    how the inputs that these outputs do not meet, which may be anything, are chosen to make the others zero
//
// T is the element, V what is computed with: T itself or a vector of it.
//
// F(m, r) cut to n outputs is F(n, r) at the first n + r - 1 points. Without the last output infinity is not needed, as the other
// rows of A^T have a zero there. Without the last two, x_4 is free: with it the product at the last point, -q, vanishes, where
// (x_4 - p^2 x_2) - q (x_3 - p^2 x_1) = 0. Without the last three, so is x_3, and both parentheses are zero.
template <int m_, int r_>
struct Transform {
  static constexpr int m = m_, r = r_, points = m + r - 1, pairs = (points - 2) / 2;
  static constexpr int in = points, out = m, step = m, stride = 1;
  static_assert(points == 4 || points == 6);
  static constexpr double point[2] = {points == 4 ? 1.0 : 0.625, 1.5};

  struct Constants {
    double power[2][6] = {};    // [pair][exponent]
    double zero_scale = 1;      // 1 / M_i(point_i) at the point 0, up to the sign, which its row of B^T takes over
    double pair_scale[2] = {};  // and at both points of a pair
    constexpr Constants() {
      for (int pair = 0; pair < 2; ++pair) {
        power[pair][0] = 1;
        for (int j = 1; j < 6; ++j) power[pair][j] = power[pair][j - 1] * point[pair];
      }
      if (points == 4) {
        pair_scale[0] = 0.5;
        return;
      }
      zero_scale = 1 / (power[0][2] * power[1][2]);
      for (int pair = 0; pair < 2; ++pair) pair_scale[pair] = 0.5 / (power[pair][2] * (power[pair][2] - power[1 - pair][2]));
    }
  };
  static constexpr Constants constant{};

  static constexpr bool needs(int point, int wanted) { return point < wanted + r - 1; }
  template <class T, class V>
  [[gnu::always_inline]] static inline void extend(V (&x)[in], int wanted) {
    constexpr T p2 = T(constant.power[0][2]), q = T(constant.power[1][1]);
    if (points == 4 || wanted + r > 5) return;
    if (wanted + r == 4) x[3] = x[1] * p2;
    x[points - 2] = (x[3] - x[1] * p2) * q + rounded(x[2] * p2);
  }

  // The polynomial of n coefficients at every point: A. Its even part is shared by p and -p, its odd part up to the sign.
  template <class T, class V, int n>
  [[gnu::always_inline]] static inline void evaluate(const V (&coefficient)[n], V (&value)[points]) {
    value[0] = coefficient[0];
    TORCHCNN_UNROLL
    for (int pair = 0; pair < pairs; ++pair) {
      V part[2] = {coefficient[(n - 1) / 2 * 2], coefficient[n / 2 * 2 - 1]};  // even and odd, by Horner's rule in p^2
      TORCHCNN_UNROLL
      for (int j = n - 3; j >= 0; --j) part[j % 2] = part[j % 2] * T(constant.power[pair][2]) + coefficient[j];
      value[1 + 2 * pair] = part[1] * T(constant.power[pair][1]) + part[0];
      value[2 + 2 * pair] = part[0] - part[1] * T(constant.power[pair][1]);
    }
    value[points - 1] = coefficient[n - 1];
  }

  // A^T
  template <class T, class V, int n>
  [[gnu::always_inline]] static inline void evaluate_transposed(const V (&value)[points], V (&coefficient)[n]) {
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
        sum = part[0] * T(constant.power[0][j]) + value[points - 1];
      } else if (j > 0) {
        sum = rounded(part[0] * T(constant.power[0][j]));
      }
      if (j == 0) sum = sum + value[0];
      if (pairs == 2) sum = part[pairs - 1] * T(constant.power[1][j]) + sum;
      coefficient[j] = sum;
    }
  }

  template <class T, class V>
  [[gnu::always_inline]] static inline void scale(V (&value)[points]) {
    if (points != 4) value[0] = value[0] * T(constant.zero_scale);
    TORCHCNN_UNROLL
    for (int pair = 0; pair < pairs; ++pair) {
      value[1 + 2 * pair] = value[1 + 2 * pair] * T(constant.pair_scale[pair]);
      value[2 + 2 * pair] = value[2 + 2 * pair] * T(constant.pair_scale[pair]);
    }
  }

  // B^T
  template <class T, class V>
  [[gnu::always_inline]] static inline void input(const V (&x)[points], V (&value)[points]) {
    if constexpr (points == 4) {
      value[0] = x[0] - x[2];
      value[1] = x[2] + x[1];
      value[2] = x[2] - x[1];
      value[3] = x[3] - x[1];
    } else {
      constexpr T product = T(constant.power[0][2] * constant.power[1][2]), sum = T(constant.power[0][2] + constant.power[1][2]);
      value[0] = x[0] * product + (x[4] - x[2] * sum);
      value[points - 1] = x[1] * product + (x[points - 1] - x[3] * sum);
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
  [[gnu::always_inline]] static inline void filter(const V (&g)[r], V (&value)[points]) {
    evaluate<T>(g, value);
    scale<T>(value);
  }

  // G^T
  template <class T, class V>
  [[gnu::always_inline]] static inline void filter_transposed(const V (&value)[points], V (&g)[r]) {
    V scaled[points];
    TORCHCNN_UNROLL
    for (int i = 0; i < points; ++i) scaled[i] = value[i];
    scale<T>(scaled);
    TORCHCNN_UNROLL
    for (int i = 0; i < points; ++i) scaled[i] = rounded(scaled[i]);
    evaluate_transposed<T>(scaled, g);
  }

  // A^T and A
  template <class T, class V>
  [[gnu::always_inline]] static inline void output(const V (&value)[points], V (&y)[m]) {
    evaluate_transposed<T>(value, y);
  }
  template <class T, class V>
  [[gnu::always_inline]] static inline void output_transposed(const V (&y)[m], V (&value)[points]) {
    evaluate<T>(y, value);
  }
};

// Two taps, as the even and the odd samples of a stride of 2 leave them. F(2, 2) at 0, 1 and infinity only adds:
//
//   y_0 = (x_0 - x_1) g_0 + x_1 (g_0 + g_1),   y_1 = x_1 (g_0 + g_1) + (x_2 - x_1) g_1
template <>
struct Transform<2, 2> {
  static constexpr int m = 2, r = 2, points = 3, in = points, out = m, step = m, stride = 1;

  static constexpr bool needs(int point, int wanted) { return point < wanted + 1; }
  template <class T, class V>
  [[gnu::always_inline]] static inline void extend(V (&)[in], int) {}

  // B^T
  template <class T, class V>
  [[gnu::always_inline]] static inline void input(const V (&x)[3], V (&value)[3]) {
    value[0] = x[0] - x[1];
    value[1] = x[1];
    value[2] = x[2] - x[1];
  }
  // G and A
  template <class V>
  [[gnu::always_inline]] static inline void evaluate(const V (&coefficient)[2], V (&value)[3]) {
    value[0] = coefficient[0];
    value[1] = coefficient[0] + coefficient[1];
    value[2] = coefficient[1];
  }
  // G^T and A^T
  template <class V>
  [[gnu::always_inline]] static inline void evaluate_transposed(const V (&value)[3], V (&coefficient)[2]) {
    coefficient[0] = value[0] + value[1];
    coefficient[1] = value[1] + value[2];
  }
  template <class T, class V>
  [[gnu::always_inline]] static inline void filter(const V (&g)[2], V (&value)[3]) {
    evaluate(g, value);
  }
  template <class T, class V>
  [[gnu::always_inline]] static inline void filter_transposed(const V (&value)[3], V (&g)[2]) {
    evaluate_transposed(value, g);
  }
  template <class T, class V>
  [[gnu::always_inline]] static inline void output(const V (&value)[3], V (&y)[2]) {
    evaluate_transposed(value, y);
  }
  template <class T, class V>
  [[gnu::always_inline]] static inline void output_transposed(const V (&y)[2], V (&value)[3]) {
    evaluate(y, value);
  }
};

// F(4, 2) at 0, +-3/4, 2 and infinity.
template <>
struct Transform<4, 2> {
  static constexpr int m = 4, r = 2, points = 5, in = points, out = m, step = m, stride = 1;
  static constexpr double p = 0.75, h = 2, p2 = p * p;

  static constexpr bool needs(int point, int wanted) { return point < wanted + 1; }
  template <class T, class V>
  [[gnu::always_inline]] static inline void extend(V (&x)[in], int wanted) {
    if (wanted < 2) x[2] = x[1] * T(p);
    if (wanted < 3) x[3] = x[1] * T(p2);
  }

  // B^T: M_i = f_2 - p^2 f_0, f_2 +- p f_1, ..., where f_j are the coefficients of x^j (x - h).
  template <class T, class V>
  [[gnu::always_inline]] static inline void input(const V (&x)[5], V (&value)[5]) {
    const V f0 = x[1] - x[0] * T(h), f1 = x[2] - x[1] * T(h), f2 = x[3] - x[2] * T(h), f3 = x[4] - x[3] * T(h);
    value[0] = f2 - f0 * T(p2);
    value[1] = f1 * T(p) + f2;
    value[2] = f2 - f1 * T(p);
    value[3] = x[3] - x[1] * T(p2);
    value[4] = f3 - f1 * T(p2);
  }
  // G
  template <class T, class V>
  [[gnu::always_inline]] static inline void filter(const V (&g)[2], V (&value)[5]) {
    value[0] = g[0] * T(1 / (p2 * h));
    value[1] = (g[1] * T(p) + g[0]) * T(0.5 / (p2 * (p - h)));
    value[2] = (g[0] - g[1] * T(p)) * T(-0.5 / (p2 * (p + h)));
    value[3] = (g[1] * T(h) + g[0]) * T(1 / (h * (h * h - p2)));
    value[4] = g[1];
  }
  // G^T
  template <class T, class V>
  [[gnu::always_inline]] static inline void filter_transposed(const V (&value)[5], V (&g)[2]) {
    const V plus = rounded(value[1] * T(0.5 / (p2 * (p - h)))), minus = rounded(value[2] * T(-0.5 / (p2 * (p + h))));
    const V single = rounded(value[3] * T(1 / (h * (h * h - p2))));
    g[0] = value[0] * T(1 / (p2 * h)) + (plus + minus + single);
    g[1] = (plus - minus) * T(p) + (single * T(h) + value[4]);
  }
  // A^T
  template <class T, class V>
  [[gnu::always_inline]] static inline void output(const V (&value)[5], V (&y)[4]) {
    const V even = value[1] + value[2], odd = value[1] - value[2];
    y[0] = value[0] + even + value[3];
    y[1] = value[3] * T(h) + rounded(odd * T(p));
    y[2] = value[3] * T(h * h) + rounded(even * T(p2));
    y[3] = value[3] * T(h * h * h) + (odd * T(p2 * p) + value[4]);
  }
  // A
  template <class T, class V>
  [[gnu::always_inline]] static inline void output_transposed(const V (&y)[4], V (&value)[5]) {
    const V even = y[2] * T(p2) + y[0], odd = y[3] * T(p2) + y[1];
    value[0] = y[0];
    value[1] = odd * T(p) + even;
    value[2] = even - odd * T(p);
    value[3] = ((y[3] * T(h) + y[2]) * T(h) + y[1]) * T(h) + y[0];
    value[4] = y[3];
  }
};

// Stride 2 with three taps: taps 0 and 2 meet the even inputs of a tile, a filter of two taps and stride 1, and tap 1 the odd
// ones, a plain product. With m = 4, 5 + 4 products make 4 outputs instead of 12; in two dimensions 81 make 16 instead of 144,
// and with m = 2, 25 make 4 instead of 36.
//
//   y_j = (w_0 e_j + w_2 e_{j+1}) + w_1 o_j        e = x_0 x_2 ... x_2m, o = x_1 x_3 ... x_{2m-1}
template <int m>
struct Stride2 {
  using Even = Transform<m, 2>;
  static constexpr int r = 3, even = Even::points, in = 2 * m + 1, points = even + m, out = m, step = 2 * m, stride = 2;

  static constexpr bool needs(int point, int wanted) { return point < even ? Even::needs(point, wanted) : point - even < wanted; }
  template <class T, class V>
  [[gnu::always_inline]] static inline void extend(V (&x)[in], int wanted) {
    V sample[even];
    TORCHCNN_UNROLL
    for (int i = 0; i < even; ++i) sample[i] = x[2 * i];
    Even::template extend<T>(sample, wanted);
    TORCHCNN_UNROLL
    for (int i = 0; i < even; ++i) x[2 * i] = sample[i];
  }

  template <class T, class V>
  [[gnu::always_inline]] static inline void input(const V (&x)[in], V (&value)[points]) {
    V sample[even], product[even];
    TORCHCNN_UNROLL
    for (int i = 0; i < even; ++i) sample[i] = x[2 * i];
    Even::template input<T>(sample, product);
    TORCHCNN_UNROLL
    for (int i = 0; i < points; ++i) value[i] = i < even ? product[i] : x[2 * (i - even) + 1];
  }
  template <class T, class V>
  [[gnu::always_inline]] static inline void filter(const V (&g)[3], V (&value)[points]) {
    const V outer[2] = {g[0], g[2]};
    V product[even];
    Even::template filter<T>(outer, product);
    TORCHCNN_UNROLL
    for (int i = 0; i < points; ++i) value[i] = i < even ? product[i] : g[1];
  }
  template <class T, class V>
  [[gnu::always_inline]] static inline void filter_transposed(const V (&value)[points], V (&g)[3]) {
    V product[even], outer[2];
    TORCHCNN_UNROLL
    for (int i = 0; i < even; ++i) product[i] = value[i];
    Even::template filter_transposed<T>(product, outer);
    g[0] = outer[0], g[1] = value[even], g[2] = outer[1];
    TORCHCNN_UNROLL
    for (int i = even + 1; i < points; ++i) g[1] = g[1] + value[i];
  }
  template <class T, class V>
  [[gnu::always_inline]] static inline void output(const V (&value)[points], V (&y)[m]) {
    V product[even];
    TORCHCNN_UNROLL
    for (int i = 0; i < even; ++i) product[i] = value[i];
    Even::template output<T>(product, y);
    TORCHCNN_UNROLL
    for (int j = 0; j < m; ++j) y[j] = y[j] + value[even + j];
  }
  template <class T, class V>
  [[gnu::always_inline]] static inline void output_transposed(const V (&y)[m], V (&value)[points]) {
    V product[even];
    Even::template output_transposed<T>(y, product);
    TORCHCNN_UNROLL
    for (int i = 0; i < points; ++i) value[i] = i < even ? product[i] : y[i - even];
  }
};

// Its grad_input, of filters turned around (w_2 w_1 w_0): results under tap 1 alone alternate with those under taps 2 and 0.
//
//   dx_{2j} = w_1 dy_j,   dx_{2j+1} = w_2 dy_j + w_0 dy_{j+1}        2m elements of grad_input from m + 1 of grad_output
template <int m>
struct Stride2GradInput {
  using Odd = Transform<m, 2>;
  static constexpr int r = 3, odd = Odd::points, in = m + 1, points = odd + m, out = 2 * m, step = m, stride = 2;

  static constexpr bool needs(int point, int wanted) {
    return point < odd ? wanted > 1 && Odd::needs(point, wanted / 2) : 2 * (point - odd) < wanted;
  }
  template <class T, class V>
  [[gnu::always_inline]] static inline void extend(V (&x)[in], int wanted) {
    Odd::template extend<T>(x, wanted / 2);
  }

  template <class T, class V>
  [[gnu::always_inline]] static inline void input(const V (&x)[in], V (&value)[points]) {
    V product[odd];
    Odd::template input<T>(x, product);
    TORCHCNN_UNROLL
    for (int i = 0; i < points; ++i) value[i] = i < odd ? product[i] : x[i - odd];
  }
  template <class T, class V>
  [[gnu::always_inline]] static inline void filter(const V (&g)[3], V (&value)[points]) {
    Stride2<m>::template filter<T>(g, value);
  }
  template <class T, class V>
  [[gnu::always_inline]] static inline void output(const V (&value)[points], V (&y)[out]) {
    V product[odd], result[m];
    TORCHCNN_UNROLL
    for (int i = 0; i < odd; ++i) product[i] = value[i];
    Odd::template output<T>(product, result);
    TORCHCNN_UNROLL
    for (int j = 0; j < m; ++j) y[2 * j] = value[odd + j], y[2 * j + 1] = result[j];
  }
};

// More taps than a transform is accurate for: the filter is cut in two, the second half with a tap less, and both meet the
// input on their own.
//
//   y_j = sum_{s < h} g_s x_{j+s} + sum_{s < h-1} g_{h+s} x_{j+h+s}        h: taps of the first half
template <int m_, int h>
struct Halves {
  using Half = Transform<m_, h>;
  static constexpr int m = m_, r = 2 * h - 1, half = Half::points, points = 2 * half;
  static constexpr int in = m + r - 1, out = m, step = m, stride = 1;

  // The halves share inputs: none is free for both, and infinity alone is left out.
  static constexpr bool needs(int point, int wanted) { return Half::needs(point % half, wanted < m ? m - 1 : m); }
  template <class T, class V>
  [[gnu::always_inline]] static inline void extend(V (&)[in], int) {}

  template <class T, class V>
  [[gnu::always_inline]] static inline void input(const V (&x)[in], V (&value)[points]) {
    V part[half], product[half];
    TORCHCNN_UNROLL
    for (int k = 0; k < 2; ++k) {
      TORCHCNN_UNROLL
      for (int i = 0; i < half; ++i) part[i] = k * h + i < in ? x[k * h + i] : V{};  // the last meets the tap that is not there
      Half::template input<T>(part, product);
      TORCHCNN_UNROLL
      for (int i = 0; i < half; ++i) value[k * half + i] = product[i];
    }
  }
  template <class T, class V>
  [[gnu::always_inline]] static inline void filter(const V (&g)[r], V (&value)[points]) {
    V part[h], product[half];
    TORCHCNN_UNROLL
    for (int k = 0; k < 2; ++k) {
      TORCHCNN_UNROLL
      for (int s = 0; s < h; ++s) part[s] = k * h + s < r ? g[k * h + s] : V{};
      Half::template filter<T>(part, product);
      TORCHCNN_UNROLL
      for (int i = 0; i < half; ++i) value[k * half + i] = product[i];
    }
  }
  template <class T, class V>
  [[gnu::always_inline]] static inline void filter_transposed(const V (&value)[points], V (&g)[r]) {
    V part[h], product[half];
    TORCHCNN_UNROLL
    for (int k = 0; k < 2; ++k) {
      TORCHCNN_UNROLL
      for (int i = 0; i < half; ++i) product[i] = value[k * half + i];
      Half::template filter_transposed<T>(product, part);
      TORCHCNN_UNROLL
      for (int s = 0; s < h; ++s)
        if (k * h + s < r) g[k * h + s] = part[s];
    }
  }
  template <class T, class V>
  [[gnu::always_inline]] static inline void output(const V (&value)[points], V (&y)[m]) {
    V sum[half];
    TORCHCNN_UNROLL
    for (int i = 0; i < half; ++i) sum[i] = value[i] + value[half + i];
    Half::template output<T>(sum, y);
  }
  template <class T, class V>
  [[gnu::always_inline]] static inline void output_transposed(const V (&y)[m], V (&value)[points]) {
    V product[half];
    Half::template output_transposed<T>(y, product);
    TORCHCNN_UNROLL
    for (int i = 0; i < points; ++i) value[i] = product[i % half];
  }
};

// The other axis of a filter of one row or one column: nothing to transform.
struct OneTap {
  static constexpr int r = 1, points = 1, in = 1, out = 1, step = 1, stride = 1;

  static constexpr bool needs(int, int) { return true; }
  template <class T, class V>
  [[gnu::always_inline]] static inline void extend(V (&)[in], int) {}

  template <class T, class V>
  [[gnu::always_inline]] static inline void input(const V (&x)[1], V (&value)[1]) {
    value[0] = x[0];
  }
  template <class T, class V>
  [[gnu::always_inline]] static inline void filter(const V (&g)[1], V (&value)[1]) {
    value[0] = g[0];
  }
  template <class T, class V>
  [[gnu::always_inline]] static inline void filter_transposed(const V (&value)[1], V (&g)[1]) {
    g[0] = value[0];
  }
  template <class T, class V>
  [[gnu::always_inline]] static inline void output(const V (&value)[1], V (&y)[1]) {
    y[0] = value[0];
  }
  template <class T, class V>
  [[gnu::always_inline]] static inline void output_transposed(const V (&y)[1], V (&value)[1]) {
    value[0] = y[0];
  }
};

// What the kernels work with: a transform for each axis.
template <class H_, class W_ = H_>
struct Tile {
  using H = H_;
  using W = W_;
  static constexpr int positions = H::points * W::points, taps = H::r * W::r;
};

// The matrices of tiles with `wanted` outputs, row by row, from transforms of unit vectors: for the error bound and the tests.
template <class F>
struct Matrices {
  double A[F::points][F::out] = {}, G[F::points][F::r] = {}, B_T[F::points][F::in] = {};
  explicit Matrices(int wanted) {
    double column[F::points], y[F::out];
    for (int j = 0; j < F::in; ++j) {
      double unit[F::in] = {};
      unit[j] = 1;
      if (wanted + 1 < F::out) F::template extend<double>(unit, wanted);
      F::template input<double>(unit, column);
      for (int i = 0; i < F::points; ++i) B_T[i][j] = F::needs(i, wanted) ? column[i] : 0;
    }
    for (int i = 0; i < F::points; ++i) {
      double unit[F::points] = {};
      unit[i] = 1;
      F::template output<double>(unit, y);
      for (int j = 0; j < F::out; ++j) A[i][j] = y[j];
    }
    for (int j = 0; j < F::r; ++j) {
      double unit[F::r] = {};
      unit[j] = 1;
      F::template filter<double>(unit, column);
      for (int i = 0; i < F::points; ++i) G[i][j] = column[i];
    }
  }
};

}  // namespace torchcnn::TORCHCNN_ISA::winograd
