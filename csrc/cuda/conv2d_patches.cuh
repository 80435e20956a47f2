// How a convolution kernel reads an activation as a matrix of patches: row = pixel of the result, column = tap and channel,
// (i taps_w + j) channels + c. The matrix is never in memory; 16-byte vectors of channels go straight to shared memory.
//
// Along one axis, result position y meets tap i at position  y step + i tap + origin  of the activation that is read.
//
//   forward      reads input:        step = stride, tap = dilation, origin = -pad, taps = R
//   grad_input   reads grad_output:  h = p stride - pad + r dilation, so of the rows h = phase (mod stride) only the taps r = r0
//                (mod period), period = stride / gcd(stride, dilation), are met, at steps of one: each phase is a forward
//                convolution of stride 1 with its share of the taps. No product with a zero between strides is computed.
#pragma once

#include "common.cuh"
#include "conv2d_tile.cuh"

namespace torchcnn::cuda {

// One axis of a geometry, in either direction.
struct Axis {
  int read, written;  // sizes of the activation read and of the one written
  int kernel, stride, pad, dilation;
  bool transposed;  // grad_input
  int period;       // taps r, r + period, ... meet the same rows: stride / gcd(stride, dilation); forward: 1

  __host__ __device__ int phases() const { return transposed ? stride : 1; }
  __host__ __device__ int classes() const { return kernel < period ? kernel : period; }  // sets of taps; a phase has one or none
  __host__ __device__ int taps(int first) const { return (kernel - first - 1) / period + 1; }
};

// What one phase of an axis reads and writes: result y stands at y written_step + written_origin.
struct Phase {
  int outputs, taps, step, tap, origin, written_step, written_origin;
  int first_tap;  // also the number of its class
};

__device__ inline Phase phase_of(const Axis& axis, int phase) {
  if (!axis.transposed) return {axis.written, axis.kernel, axis.stride, axis.dilation, -axis.pad, 1, 0, 0};
  int first = 0;
  while (first < axis.classes() && (int64_t(phase) + axis.pad - int64_t(first) * axis.dilation) % axis.stride != 0) ++first;
  const bool met = first < axis.classes();
  return {phase < axis.written ? (axis.written - phase - 1) / axis.stride + 1 : 0,
          met ? axis.taps(first) : 0,
          1,
          -int(int64_t(axis.period) * axis.dilation / axis.stride),
          met ? int((int64_t(phase) + axis.pad - int64_t(first) * axis.dilation) / axis.stride) : 0,
          axis.stride,
          phase,
          met ? first : 0};
}

// Three digits of mixed radix that count in constant steps: (n, y, x) from pixel to pixel, (i, j, c) from column to column.
// Division happens once, for the first number; the first digit has no bound.
struct Counter {
  int a, b, c;

  __device__ static Counter of(int64_t number, int radix_b, int radix_c) {
    if (number <= INT32_MAX) {  // much faster
      const int low = int(number), high = low / radix_c;
      return {high / radix_b, high % radix_b, low % radix_c};
    }
    const int64_t high = number / radix_c;
    return {int(high / radix_b), int(high % radix_b), int(number % radix_c)};
  }
  __device__ void add(const Counter& step, int radix_b, int radix_c) {
    c += step.c;
    const int carry_c = c >= radix_c;
    c -= carry_c ? radix_c : 0;
    b += step.b + carry_c;
    const int carry_b = b >= radix_b;
    b -= carry_b ? radix_b : 0;
    a += step.a + carry_b;
  }
};

// The activation that is read: channels innermost, those of each group in whole, aligned 16-byte vectors. Others are brought into
// that form first, in scratch memory.
template <class T>
struct Activation {
  const T* data;
  int height, width;
  int64_t stride_n, stride_h, stride_w;
  int channels;  // of a group, zeros at its end included
};

// Far outside every activation, also after a tap has been added.
constexpr int kNowhere = -(1 << 30);

// Where the patch of a pixel begins; h is kNowhere if there is no such pixel.
template <class T>
struct Corner {
  const T* data;
  int h, w;
};

// Where a tap lies from the corner, and how far in memory, with its channel.
struct TapOffset {
  int h, w;
  int64_t elements;
};

template <class T>
__device__ __forceinline__ TapOffset tap_offset(const Activation<T>& from, const Phase& h_axis, const Phase& w_axis,
                                                const Counter& tap) {
  const int h = tap.a < h_axis.taps ? tap.a * h_axis.tap : kNowhere, w = tap.b * w_axis.tap;
  return {h, w, h * from.stride_h + w * from.stride_w + tap.c};
}

// Starts the copy of one vector of a patch; zeros where the tap lies in the padding.
template <class T>
__device__ __forceinline__ void copy_vector(const Activation<T>& from, const Corner<T>& corner, const TapOffset& tap, T* shared) {
  const bool inside = unsigned(corner.h + tap.h) < unsigned(from.height) && unsigned(corner.w + tap.w) < unsigned(from.width);
  copy_async(shared, inside ? corner.data + tap.elements : from.data, inside);
}

// ------------------------------------------------------------------------------------------- activations in vectors of channels

constexpr int kTransposeTile = 32;  // pixels and channels, by a block of 32 x 8 threads

// to[pixel][group][channel], zeros after the last channel of a group.
template <class T>
__global__ void __launch_bounds__(256) conv2d_to_vectors(const T* from, Strides s, int groups, int from_channels, int channels,
                                                         int64_t plane, int64_t pixels, int64_t channel_tiles, T* to) {
  __shared__ T tile[kTransposeTile][kTransposeTile + 1];  // [channel][pixel]
  const bool along_channels = s.c == 1;                   // what lies together in `from`, and goes to neighbouring threads
  const int64_t all_channels = int64_t(groups) * channels, first_channel = blockIdx.x % channel_tiles * kTransposeTile;
  const int64_t first_pixel = blockIdx.x / channel_tiles * kTransposeTile;
  const auto element = [&](int64_t pixel, int64_t channel) {
    const T zero = from_arithmetic<T>(SumOf<T>(0));
    if (pixel >= pixels || channel >= all_channels) return zero;
    const int64_t image = pixels <= INT32_MAX ? int64_t(unsigned(pixel) / unsigned(plane)) : pixel / plane;
    const int group = int(channel) / channels, c = int(channel) % channels;
    if (c >= from_channels) return zero;
    return from[image * s.n + (pixel - image * plane) * s.w + (int64_t(group) * from_channels + c) * s.c];
  };
#pragma unroll
  for (int y = threadIdx.y; y < kTransposeTile; y += 8) {
    if (along_channels)
      tile[threadIdx.x][y] = element(first_pixel + y, first_channel + threadIdx.x);
    else
      tile[y][threadIdx.x] = element(first_pixel + threadIdx.x, first_channel + y);
  }
  __syncthreads();
#pragma unroll
  for (int y = threadIdx.y; y < kTransposeTile; y += 8) {
    const int64_t pixel = first_pixel + y, channel = first_channel + threadIdx.x;
    if (pixel < pixels && channel < all_channels) to[pixel * all_channels + channel] = tile[threadIdx.x][y];
  }
}

}  // namespace torchcnn::cuda
