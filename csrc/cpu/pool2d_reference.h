// Pooling as the formulas write it: the executable specification, and the kernels of the integer types.
//
//   max  output[n,c,p,q] = max of input[n,c,h,w] over the window of (p, q); indices = h W + w of the first maximum in row-major
//        order. A NaN beats every number, and a later NaN an earlier one, as in torch. Min likewise. With relu the output is
//        max(0, that), and no position is given where that changes it or where it is 0.
//   avg  output[n,c,p,q] = sum of the window / divisor
//   grad grad_input[n,c,h,w] = sum of grad_output[n,c,p,q] / divisor over the windows that contain (h, w)
//
// The windows and positions are those of geometry.h; sums of floating-point values are in double, of integers in int64.
#pragma once

#include <cstdint>
#include <type_traits>
#include <vector>

#include "../geometry.h"
#include "element.h"
#include "runtime.h"

namespace torchcnn::reference {

template <class T>
void extremum_pool2d_forward(const Pool2dGeometry& g, Extremum extremum, const T* input, T* output, Positions positions) {
  const Strides in = g.input_strides(), out = g.output_strides();
  const auto better = [&](auto candidate, auto best) {
    if (candidate != candidate) return true;                        // NaN
    return extremum.minimum ? candidate < best : candidate > best;  // false for ties, so that the first value stays
  };
  parallel_for(g.N * g.C, g.H * g.W, [&](int64_t plane) {
    const int64_t n = plane / g.C, c = plane % g.C;
    const T* from = input + n * in.n + c * in.c;
    for (int64_t p = 0; p < g.P; ++p) {
      const Window row = row_window(g, p);
      for (int64_t q = 0; q < g.Q; ++q) {
        const Window column = column_window(g, q);
        int64_t best_h = row.begin, best_w = column.begin;
        T best = from[best_h * in.h + best_w * in.w];
        for (int64_t h = row.begin; h < row.end; h += g.dilation_h) {
          for (int64_t w = column.begin; w < column.end; w += g.dilation_w) {
            const T candidate = from[h * in.h + w * in.w];
            if (!better(widen(candidate), widen(best))) continue;
            best = candidate;
            best_h = h;
            best_w = w;
          }
        }
        const int64_t to = n * out.n + c * out.c + p * out.h + q * out.w;
        const bool nothing = extremum.relu && widen(best) <= 0;
        output[to] = nothing ? narrow<T>(0) : best;
        int64_t offset = -1;
        if (!nothing && !g.adaptive) {
          const int64_t r = (best_h - p * g.stride_h + g.pad_h) / g.dilation_h;
          offset = r * g.S + (best_w - q * g.stride_w + g.pad_w) / g.dilation_w;
        }
        switch (positions.kind) {
          case PositionKind::none: break;
          case PositionKind::indices: static_cast<int64_t*>(positions.to)[to] = best_h * g.W + best_w; break;
          case PositionKind::byte_offsets: static_cast<uint8_t*>(positions.to)[to] = static_cast<uint8_t>(offset); break;
          case PositionKind::int_offsets: static_cast<int32_t*>(positions.to)[to] = static_cast<int32_t>(offset); break;
        }
      }
    }
  });
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
          for (int64_t w = column.begin; w < column.end; ++w) sum += static_cast<Sum>(widen(from[h * in.h + w * in.w]));
        const Sum by = static_cast<Sum>(divisor(row, column));
        // The least integer divided by -1 would trap.
        const Sum mean = std::is_integral_v<Sum> && by == -1
                             ? static_cast<Sum>(-static_cast<std::conditional_t<std::is_integral_v<Sum>, uint64_t, double>>(sum))
                             : sum / by;
        output[n * out.n + c * out.c + p * out.h + q * out.w] = narrow<T>(static_cast<Arithmetic<T>>(mean));
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
        const double share =
            double(widen(grad_output[n * out.n + c * out.c + p * out.h + q * out.w])) / double(divisor(row, column));
        for (int64_t h = row.begin; h < row.end; ++h)
          for (int64_t w = column.begin; w < column.end; ++w) sum[h * g.W + w] += share;
      }
    }
    T* to = grad_input + n * in.n + c * in.c;
    for (int64_t h = 0; h < g.H; ++h)
      for (int64_t w = 0; w < g.W; ++w) to[h * in.h + w * in.w] = narrow<T>(static_cast<Arithmetic<T>>(sum[h * g.W + w]));
  });
}

}  // namespace torchcnn::reference
