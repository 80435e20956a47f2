// How a convolution kernel reads an activation as a matrix of patches: row = pixel of the result, column = tap and channel,
// (i taps_w + j) channels + c. The matrix is never in memory; 16-byte pieces of it go straight to shared memory.
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

// The activation that is read.
template <class T>
struct Activation {
  const T* data;
  int64_t stride_n, stride_h, stride_w, stride_c;
  int channels;     // of a group
  bool in_vectors;  // whether channels come in whole, aligned 16-byte vectors
};

// Where a pixel's patch begins.
struct Corner {
  int64_t image;  // offset; negative: no such pixel
  int h, w;
};

// One 16-byte piece of a patch on its way to shared memory. Vectors are copied there asynchronously by `fetch`; single elements, whose
// pixels are neighbours in memory when their channels are not, wait in registers until `store`.
template <class T>
struct Piece {
  union {
    uint4 bits;
    T elements[kVectorSize<T>];
  };
  __device__ Piece() : bits{0, 0, 0, 0} {}

  __device__ __forceinline__ void fetch(const Activation<T>& from, const Phase& h_axis, const Phase& w_axis, int height,
                                        int width, const Corner& corner, Counter tap, T* shared) {
    if (from.in_vectors) {
      const int h = corner.h + tap.a * h_axis.tap, w = corner.w + tap.b * w_axis.tap;
      const bool inside =
          corner.image >= 0 && tap.a < h_axis.taps && unsigned(h) < unsigned(height) && unsigned(w) < unsigned(width);
      copy_async(shared, inside ? from.data + corner.image + h * from.stride_h + w * from.stride_w + tap.c : from.data, inside);
      return;
    }
    bits = uint4{0, 0, 0, 0};
    if (corner.image < 0) return;
#pragma unroll
    for (int e = 0; e < kVectorSize<T>; ++e) {
      const int h = corner.h + tap.a * h_axis.tap, w = corner.w + tap.b * w_axis.tap;
      if (tap.a < h_axis.taps && unsigned(h) < unsigned(height) && unsigned(w) < unsigned(width))
        elements[e] = from.data[corner.image + h * from.stride_h + w * from.stride_w + tap.c * from.stride_c];
      if (++tap.c == from.channels) {
        tap.c = 0;
        if (++tap.b == w_axis.taps) {
          tap.b = 0;
          ++tap.a;
        }
      }
    }
  }

  __device__ __forceinline__ void store(const Activation<T>& from, T* shared) const {
    if (!from.in_vectors) *reinterpret_cast<uint4*>(shared) = bits;
  }
};

// Which vectors of an operand a thread copies: column `vector` of vectors, rows first_row, first_row + rows_at_once, ...
// Neighbouring threads take what is neighbouring in memory: vectors of a row where these are copied whole, else rows (pixels).
template <class Shape>
struct Share {
  int vector, first_row;
  __device__ explicit Share(bool in_vectors) {
    const int thread = threadIdx.x;
    vector = in_vectors ? thread % Shape::vectors_per_row : thread / Shape::rows_at_once;
    first_row = in_vectors ? thread / Shape::vectors_per_row : thread % Shape::rows_at_once;
  }
  __device__ int row(int copy) const { return first_row + copy * Shape::rows_at_once; }
  __device__ int offset(int copy) const { return row(copy) * Shape::pitch + vector * kVectorSize<typename Shape::T>; }
};

}  // namespace torchcnn::cuda
