// How a convolution kernel reads an activation as a matrix of patches: row = pixel of the result, column = tap and channel
// (in grad_weight (i taps_w + j) channels + c; conv2d_gather.cu has chunks of channels outermost). The matrix is never in memory;
// 16-byte vectors of channels go straight to shared memory.
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
  // Distances along the padded axis fit 32 bits (conv2d_host.cuh); stride / period is what stride and dilation have in common.
  int first = 0;
  while (first < axis.classes() && (phase + axis.pad - first * axis.dilation) % axis.stride != 0) ++first;
  const bool met = first < axis.classes();
  return {phase < axis.written ? (axis.written - phase - 1) / axis.stride + 1 : 0,
          met ? axis.taps(first) : 0,
          1,
          -(axis.dilation / (axis.stride / axis.period)),
          met ? (phase + axis.pad - first * axis.dilation) / axis.stride : 0,
          axis.stride,
          phase,
          met ? first : 0};
}

// Three digits of mixed radix that count in constant steps: (n, y, x) from pixel to pixel, (i, j, c) from column to column.
// Division happens once, for the first number; the first digit has no bound.
struct Counter {
  int a, b, c;

  __device__ static Counter of(int number, int radix_b, int radix_c) {
    const int high = number / radix_c, a = high / radix_b;
    return {a, high - a * radix_b, number - high * radix_c};
  }
  __device__ static Counter of(int64_t number, int radix_b, int radix_c) {
    if (number <= INT32_MAX) return of(int(number), radix_b, radix_c);  // much faster
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

// to[pixel][group][channel], zeros after the last channel of a group. Two kernels: a thread for each vector, where neighbouring
// threads read neighbours that way, and tiles that are turned in shared memory, for NCHW with many channels.

constexpr int kTurnThreads = 256, kTurnPixels = 64;

// What a kernel below copies.
template <class T>
struct VectorCopy {
  const T* from;
  Strides strides;
  int from_channels, channels;  // of a group
  int vectors;                  // of a pixel, all groups
  int64_t plane, pixels;
  T* to;

  // Where a pixel lies.
  __device__ __forceinline__ const T* place(int64_t pixel) const {
    const int64_t image = pixels <= INT32_MAX ? int64_t(unsigned(pixel) / unsigned(plane)) : pixel / plane;
    return from + image * strides.n + (pixel - image * plane) * strides.w;
  }
  // Of channel `c` of all groups with their zeros: the channel in `from`, or -1.
  __device__ __forceinline__ int64_t source_of(int c) const {
    if (channels == from_channels) return c;
    const int group = c / channels, in_group = c - group * channels;
    return in_group < from_channels ? int64_t(group) * from_channels + in_group : -1;
  }
};

template <class T>
__global__ void __launch_bounds__(kTurnThreads) conv2d_to_vectors(const VectorCopy<T> copy) {
  const int64_t at = int64_t(blockIdx.x) * kTurnThreads + threadIdx.x;
  if (at >= copy.pixels * copy.vectors) return;
  int64_t pixel, vector;
  if (copy.strides.c == 1) {
    pixel = at / copy.vectors;
    vector = at - pixel * copy.vectors;
  } else {
    vector = at / copy.pixels;
    pixel = at - vector * copy.pixels;
  }
  constexpr int V = kVectorSize<T>;
  const T* const from = copy.place(pixel);
  int64_t source = copy.source_of(int(vector) * V);
  const int64_t group_end = source < 0 ? 0 : (source / copy.from_channels + 1) * copy.from_channels;
  Run<T, V> run;
#pragma unroll
  for (int e = 0; e < V; ++e, ++source)
    run.of[e] = source >= 0 && source < group_end ? from[source * copy.strides.c] : from_arithmetic<T>(SumOf<T>(0));
  *reinterpret_cast<Run<T, V>*>(copy.to + (pixel * copy.vectors + vector) * V) = run;
}

// Reads X neighbouring pixels of a channel at once.
template <class T, int X>
__global__ void __launch_bounds__(kTurnThreads) conv2d_turn_to_vectors(const VectorCopy<T> copy, int channel_tiles) {
  constexpr int V = kVectorSize<T>, channels = 8 * V;         // of a tile
  constexpr int pitch = channels + (sizeof(T) == 2 ? 2 : 1);  // in either direction neighbours lie in different banks
  constexpr int runs = kTurnPixels / X, pair = sizeof(T) == 2 ? 2 : 1;
  using Bits = BitsOf<T>;
  __shared__ __align__(8) Bits tile[kTurnPixels * pitch];  // all zero bits are zero
  const int first_channel = int(blockIdx.x % channel_tiles) * channels;
  const int64_t first_pixel = int64_t(blockIdx.x / channel_tiles) * kTurnPixels;
  const int own = threadIdx.x % runs * X;
  if (first_pixel + own < copy.pixels) {
    const Bits* const from = reinterpret_cast<const Bits*>(copy.place(first_pixel + own));
#pragma unroll
    for (int i = 0; i < channels * runs / kTurnThreads; ++i) {
      const int c = int(threadIdx.x) / runs + i * (kTurnThreads / runs);
      const int64_t source = first_channel + c < copy.vectors * V ? copy.source_of(first_channel + c) : -1;
      Run<Bits, X> run = {};
      if (source >= 0) run = *reinterpret_cast<const Run<Bits, X>*>(from + source * copy.strides.c);
#pragma unroll
      for (int x = 0; x < X; ++x) tile[(own + x) * pitch + c] = run.of[x];
    }
  }
  __syncthreads();
#pragma unroll
  for (int at = threadIdx.x; at < kTurnPixels * 8; at += kTurnThreads) {
    const int pixel = at / 8, vector = at % 8;
    if (first_pixel + pixel >= copy.pixels || first_channel / V + vector >= copy.vectors) continue;
    Run<Run<Bits, pair>, V / pair> run;
#pragma unroll
    for (int e = 0; e < V / pair; ++e)
      run.of[e] = *reinterpret_cast<const Run<Bits, pair>*>(tile + pixel * pitch + vector * V + e * pair);
    *reinterpret_cast<Run<Run<Bits, pair>, V / pair>*>(
        copy.to + ((first_pixel + pixel) * copy.vectors + first_channel / V + vector) * V) = run;
  }
}

}  // namespace torchcnn::cuda
