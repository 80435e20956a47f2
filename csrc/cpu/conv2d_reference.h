// Convolution as the formulas write it: the executable specification that every other kernel is tested against.
//
//   output[n,k,p,q]      = bias[k] + sum_{c,r,s}   input[n,c,h,w] weight[k,c,r,s], rectified if the epilogue asks for it
//   grad_input[n,c,h,w]  =           sum_{k,p,q,r,s} grad_output[n,k,p,q] weight[k,c,r,s]
//   grad_weight[k,c,r,s] =           sum_{n,p,q}   grad_output[n,k,p,q] input[n,c,h,w]
//   grad_bias[k]         =           sum_{n,p,q}   grad_output[n,k,p,q]
//
//   where  h = p stride_h - pad_h + r dilation_h,   w = q stride_w - pad_w + s dilation_w,
//
// k and c are in the same group, and taps outside the input contribute nothing. Loops are direct, sums are in double.
#pragma once

#include <cstdint>
#include <vector>

#include "../geometry.h"

namespace torchcnn::reference {

// Calls visit(input offset, weight offset, output offset, k) for every product of the sums above.
template <class Visit>
void conv2d_products(const Conv2dGeometry& g, Visit visit) {
  const Strides in = g.input_strides(), out = g.output_strides(), of_weight = g.weight_strides();
  for (int64_t n = 0; n < g.N; ++n) {
    for (int64_t k = 0; k < g.K; ++k) {
      const int64_t first_channel = k / g.K_per_group() * g.C_per_group();
      for (int64_t p = 0; p < g.P; ++p) {
        for (int64_t q = 0; q < g.Q; ++q) {
          const int64_t output = n * out.n + k * out.c + p * out.h + q * out.w;
          for (int64_t c = 0; c < g.C_per_group(); ++c) {
            for (int64_t r = 0; r < g.R; ++r) {
              const int64_t h = p * g.stride_h - g.pad_h + r * g.dilation_h;
              if (h < 0 || h >= g.H) continue;
              for (int64_t s = 0; s < g.S; ++s) {
                const int64_t w = q * g.stride_w - g.pad_w + s * g.dilation_w;
                if (w < 0 || w >= g.W) continue;
                const int64_t input = n * in.n + (first_channel + c) * in.c + h * in.h + w * in.w;
                const int64_t weight = k * of_weight.n + c * of_weight.c + r * of_weight.h + s * of_weight.w;
                visit(input, weight, output, k);
              }
            }
          }
        }
      }
    }
  }
}

template <class T>
void round_to(const std::vector<double>& sums, T* to) {
  for (size_t i = 0; i < sums.size(); ++i) to[i] = static_cast<T>(sums[i]);
}

template <class T>
void conv2d_forward(const Conv2dGeometry& g, const T* input, const T* weight, const Epilogue<T>& epilogue, T* output) {
  std::vector<double> sum(g.N * g.K * g.P * g.Q, 0.0);
  conv2d_products(g, [&](int64_t i, int64_t w, int64_t o, int64_t) { sum[o] += double(input[i]) * double(weight[w]); });
  const Strides out = g.output_strides();
  for (int64_t n = 0; n < g.N; ++n) {
    for (int64_t k = 0; k < g.K; ++k) {
      for (int64_t p = 0; p < g.P; ++p) {
        for (int64_t q = 0; q < g.Q; ++q) {
          double& element = sum[n * out.n + k * out.c + p * out.h + q * out.w];
          if (epilogue.bias != nullptr) element += double(epilogue.bias[k]);
          if (epilogue.relu && element < 0.0) element = 0.0;
        }
      }
    }
  }
  round_to(sum, output);
}

template <class T>
void conv2d_grad_input(const Conv2dGeometry& g, const T* grad_output, const T* weight, T* grad_input) {
  std::vector<double> sum(g.N * g.C * g.H * g.W, 0.0);
  conv2d_products(g, [&](int64_t i, int64_t w, int64_t o, int64_t) { sum[i] += double(grad_output[o]) * double(weight[w]); });
  round_to(sum, grad_input);
}

template <class T>
void conv2d_grad_weight(const Conv2dGeometry& g, const T* grad_output, const T* input, T* grad_weight) {
  std::vector<double> sum(g.K * g.C_per_group() * g.R * g.S, 0.0);
  conv2d_products(g, [&](int64_t i, int64_t w, int64_t o, int64_t) { sum[w] += double(grad_output[o]) * double(input[i]); });
  round_to(sum, grad_weight);
}

template <class T>
void conv2d_grad_bias(const Conv2dGeometry& g, const T* grad_output, T* grad_bias) {
  const Strides out = g.output_strides();
  for (int64_t k = 0; k < g.K; ++k) {
    double sum = 0.0;
    for (int64_t n = 0; n < g.N; ++n)
      for (int64_t p = 0; p < g.P; ++p)
        for (int64_t q = 0; q < g.Q; ++q) sum += double(grad_output[n * out.n + k * out.c + p * out.h + q * out.w]);
    grad_bias[k] = static_cast<T>(sum);
  }
}

}  // namespace torchcnn::reference
