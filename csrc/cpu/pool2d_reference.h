// Pooling as the formulas write it: the executable specification, and the kernels of the integer types.
//
//   max  output[n,c,p,q] = max of input[n,c,h,w] over the window of (p, q); indices = h W + w of the first maximum in row-major
//        order. A NaN beats every number, and a later NaN an earlier one, as in torch. Min likewise.
//   avg  output[n,c,p,q] = sum of the window / divisor
//   grad grad_input[n,c,h,w] = sum of grad_output[n,c,p,q] / divisor over the windows that contain (h, w)
//
// The windows are those of geometry.h; sums of floating-point values are in double, of integers in int64.
#pragma once

#include <cstdint>
#include <type_traits>
#include <vector>

#include "../geometry.h"
#include "runtime.h"

namespace torchcnn {

// Which extreme of a window a pool keeps.
struct Max {};
struct Min {};

namespace reference {

// False for ties, so that the first value stays.
template <class Extremum, class T>
bool better(T candidate, T best) {
  if (candidate != candidate) return true;  // NaN
  return std::is_same_v<Extremum, Max> ? candidate > best : candidate < best;
}

template <class Extremum, class T>
void extremum_pool2d_forward(const Pool2dGeometry& g, const T* input, T* output, int64_t* indices) {
  const Strides in = g.input_strides(), out = g.output_strides();
  parallel_for(g.N * g.C, g.H * g.W, [&](int64_t plane) {
    const int64_t n = plane / g.C, c = plane % g.C;
    const T* from = input + n * in.n + c * in.c;
    for (int64_t p = 0; p < g.P; ++p) {
      const Window row = row_window(g, p);
      for (int64_t q = 0; q < g.Q; ++q) {
        const Window column = column_window(g, q);
        int64_t best_index = row.begin * g.W + column.begin;
        T best = from[row.begin * in.h + column.begin * in.w];
        for (int64_t h = row.begin; h < row.end; h += g.dilation_h) {
          for (int64_t w = column.begin; w < column.end; w += g.dilation_w) {
            const T candidate = from[h * in.h + w * in.w];
            if (better<Extremum>(candidate, best)) {
              best = candidate;
              best_index = h * g.W + w;
            }
          }
        }
        const int64_t to = n * out.n + c * out.c + p * out.h + q * out.w;
        output[to] = best;
        indices[to] = best_index;
      }
    }
  });
}

template <class T>
void max_pool2d_forward(const Pool2dGeometry& g, const T* input, T* output, int64_t* indices) {
  extremum_pool2d_forward<Max>(g, input, output, indices);
}

template <class T>
void min_pool2d_forward(const Pool2dGeometry& g, const T* input, T* output, int64_t* indices) {
  extremum_pool2d_forward<Min>(g, input, output, indices);
}

template <class T>
void avg_pool2d_forward(const Pool2dGeometry& g, Divisor divisor, const T* input, T* output) {
  using Sum = std::conditional_t<std::is_integral_v<T>, int64_t, double>;
  const Strides in = g.input_strides(), out = g.output_strides();
  parallel_for(g.N * g.C, g.H * g.W, [&](int64_t plane) {
    const int64_t n = plane / g.C, c = plane % g.C;
    const T* from = input + n * in.n + c * in.c;
    for (int64_t p = 0; p < g.P; ++p) {
      const Window row = row_window(g, p);
      for (int64_t q = 0; q < g.Q; ++q) {
        const Window column = column_window(g, q);
        Sum sum = 0;
        for (int64_t h = row.begin; h < row.end; ++h)
          for (int64_t w = column.begin; w < column.end; ++w) sum += static_cast<Sum>(from[h * in.h + w * in.w]);
        output[n * out.n + c * out.c + p * out.h + q * out.w] = static_cast<T>(sum / static_cast<Sum>(divisor(row, column)));
      }
    }
  });
}

template <class T>
void avg_pool2d_grad_input(const Pool2dGeometry& g, Divisor divisor, const T* grad_output, T* grad_input) {
  const Strides in = g.input_strides(), out = g.output_strides();
  parallel_for(g.N * g.C, g.H * g.W, [&](int64_t plane) {
    const int64_t n = plane / g.C, c = plane % g.C;
    std::vector<double> sum(g.H * g.W, 0.0);
    for (int64_t p = 0; p < g.P; ++p) {
      const Window row = row_window(g, p);
      for (int64_t q = 0; q < g.Q; ++q) {
        const Window column = column_window(g, q);
        const double share = double(grad_output[n * out.n + c * out.c + p * out.h + q * out.w]) / double(divisor(row, column));
        for (int64_t h = row.begin; h < row.end; ++h)
          for (int64_t w = column.begin; w < column.end; ++w) sum[h * g.W + w] += share;
      }
    }
    T* to = grad_input + n * in.n + c * in.c;
    for (int64_t h = 0; h < g.H; ++h)
      for (int64_t w = 0; w < g.W; ++w) to[h * in.h + w * in.w] = static_cast<T>(sum[h * g.W + w]);
  });
}

}  // namespace reference
}  // namespace torchcnn
