// Depthwise convolution (C / G = 1; output channel k reads input channel k / M, M = K / G) by direct sums. It does 2 R S
// operations for every two elements of memory traffic, so that touching memory once and in order is most of the work.
//
// forward and grad_input are one correlation. Along an axis, outputs fall into phases: position i of phase f is the output
// i phases + f, and each tap t of the phase reads the source at i step + offset[t].
//
//   forward       output      = epilogue(sum_t weight[t] input)    phases = 1,      step = stride, offset = r dilation - pad
//   grad_input    grad_input  = sum_t weight[t] grad_output        phases = stride, step = 1,      for the taps r of phase f,
//                                                                  offset = (f + pad - r dilation) / stride
//   grad_weight[t] = sum_{n,i,j} grad_output[i,j] input(i,j,t)     over the positions and taps of forward
//
// Vectors run along the channels (conv2d_depthwise_channels_last.h): no lane is lost where rows are short, and no tap is computed
// that lies outside the image. NCHW planes, and channels_last tensors of fewer channels than lanes, are put into that order piece
// by piece (conv2d_depthwise_nchw.h, conv2d_depthwise_transpose.h), but for 3x3 filters, and 5x5 ones in strided grad_input: they
// meet rows, or small planes, where they lie (conv2d_depthwise_rows.h, conv2d_depthwise_flat.h). Every element is summed in an
// order that the geometry alone decides. 0 * inf never enters a sum: taps outside the image are left out, or read zeros where
// that does no harm.
#pragma once

#include "conv2d_depthwise_channels_last.h"
#include "conv2d_depthwise_flat.h"
#include "conv2d_depthwise_nchw.h"
#include "conv2d_depthwise_rows.h"
#include "conv2d_grouped.h"

namespace torchcnn::TORCHCNN_ISA::depthwise {

// Whether a vector of channels can be read where it is.
template <class T>
bool wide(const Conv2dGeometry& g) {
  return g.layout == Layout::channels_last && g.C >= kLanes<T>;
}

template <class T>
void conv2d_forward(const Conv2dGeometry& g, const T* input, const T* weight, const Epilogue<T>& epilogue, T* output) {
  const Correlation<T> c{forward_axes(g), g.N, g.C, 1, g.K_per_group(), g.R, g.S, input, weight, epilogue, output};
  if (flat::applies<T>(g) && all_finite(weight, g.K * 9)) return flat::correlate(c, false);
  if (rows::applies<T>(g) && all_finite(weight, g.K * 9)) return rows::conv2d_forward(c, g.stride_h);
  wide<T>(g) ? channels_last::correlate(c) : nchw::correlate(c, g.layout);
}

template <class T>
void conv2d_grad_input(const Conv2dGeometry& g, const T* grad_output, const T* weight, T* grad_input) {
  const Correlation<T> c{grad_input_axes(g), g.N,       g.C, g.K_per_group(), 1, g.R, g.S, grad_output, weight,
                         {nullptr, false},   grad_input};
  if (flat::applies<T>(g) && all_finite(weight, g.K * 9)) return flat::correlate(c, true);
  if (rows::applies_to_grad_input<T>(g) && all_finite(weight, g.K * g.R * g.S)) return rows::conv2d_grad_input(c, g.stride_h);
  wide<T>(g) ? channels_last::correlate(c) : nchw::correlate(c, g.layout);
}

template <class T>
void conv2d_grad_weight(const Conv2dGeometry& g, const T* grad_output, const T* input, T* grad_weight, T* grad_bias) {
  // With few channels the sums of one have to be shared out among threads, which the general kernel does.
  if (rows::applies<T>(g) && g.C >= 8) return rows::conv2d_grad_weight(g, grad_output, input, grad_weight, grad_bias);
  wide<T>(g) ? channels_last::conv2d_grad_weight(g, grad_output, input, grad_weight, grad_bias)
             : nchw::conv2d_grad_weight(g, grad_output, input, grad_weight, grad_bias);
}

#define TORCHCNN_INSTANTIATE(T)                                                                    \
  template void conv2d_forward(const Conv2dGeometry&, const T*, const T*, const Epilogue<T>&, T*); \
  template void conv2d_grad_input(const Conv2dGeometry&, const T*, const T*, T*);                  \
  template void conv2d_grad_weight(const Conv2dGeometry&, const T*, const T*, T*, T*);
TORCHCNN_INSTANTIATE(float)
TORCHCNN_INSTANTIATE(double)

}  // namespace torchcnn::TORCHCNN_ISA::depthwise
