// Rows of an image, channel by channel, with the padding written out: what the kernels that compute vectors of pixels read
// (conv2d_small_channels*.h). For a stride above 1 the columns of equal remainder lie side by side, so that the pixels under one
// tap are a vector whatever the stride:
//
//   buffer[row row_stride + c channel_stride + (column mod step) pitch + column / step]    columns from first_column
//
// A channels_last image is transposed on the way in, and results on the way out, in squares of a vector's lanes.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../geometry.h"
#include "conv2d_gemm.h"
#include "conv2d_windows.h"
#include "simd.h"

namespace torchcnn::TORCHCNN_ISA::planar_rows {

using implicit_gemm::View;

// Keeps v in a register: else GCC reads what has only few uses from memory again for each, and the loads become the limit.
template <class V>
[[gnu::always_inline]] inline void hold(V& v) {
#if defined(__x86_64__)
  asm("" : "+v"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#endif
}

struct Buffer {
  int64_t first_column, columns, step;  // columns of the source, padded
  int64_t pitch;                        // whole vectors
  int64_t row_stride, channel_stride;
};

// to[c channel_stride + x] = from[x pixel_stride + c]. Reads whole vectors where that stays below `limit`, the end of the tensor.
template <class T>
void split_pixels(const T* from, int64_t pixel_stride, int64_t channels, int64_t count, const T* limit, T* to,
                  int64_t channel_stride) {
  constexpr int64_t L = kLanes<T>;
  for (int64_t c = 0; c < channels; c += L) {
    const int64_t used = std::min(L, channels - c);
    for (int64_t x = 0; x < count;) {
      if (used >= 4 && count >= L) {
        x = std::min(x, count - L);  // the last square overlaps the one before
        const T* corner = from + x * pixel_stride + c;
        if (limit - corner >= (L - 1) * pixel_stride + L) {
          Vec<T> v[L];
#pragma GCC unroll 16
          for (int64_t l = 0; l < L; ++l) v[l] = load(corner + l * pixel_stride);
          gemm::transpose<T>(v);
#pragma GCC unroll 16
          for (int64_t l = 0; l < L; ++l)
            if (l < used) store(to + (c + l) * channel_stride + x, v[l]);
          x += L;
          continue;
        }
      }
      const int64_t end = std::min(count, x + L);
      for (int64_t l = 0; l < used; ++l)
        for (int64_t j = x; j < end; ++j) to[(c + l) * channel_stride + j] = from[j * pixel_stride + c + l];
      x = end;
    }
  }
}

// The other way: to[x pixel_stride + c] = from[c channel_stride + x]; reads whole vectors of pixels.
template <class T>
void join_pixels(const T* from, int64_t channel_stride, int64_t channels, int64_t count, T* to, int64_t pixel_stride) {
  constexpr int64_t L = kLanes<T>;
  if (channels < 4) {
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t x = 0; x < count; ++x) to[x * pixel_stride + c] = from[c * channel_stride + x];
    return;
  }
  for (int64_t c = 0; c < channels; c += L) {
    const int64_t used = std::min(L, channels - c);
    for (int64_t x = 0; x < count; x += L) {
      Vec<T> v[L];
#pragma GCC unroll 16
      for (int64_t l = 0; l < L; ++l) v[l] = l < used ? load(from + (c + l) * channel_stride + x) : Vec<T>{};
      gemm::transpose<T>(v);
      T* pixel = to + x * pixel_stride + c;
      const int64_t pixels = std::min(L, count - x);
      if (used == L) {
#pragma GCC unroll 16
        for (int64_t l = 0; l < L; ++l)
          if (l < pixels) store(pixel + l * pixel_stride, v[l]);
      } else {
        T square[L * L];
#pragma GCC unroll 16
        for (int64_t l = 0; l < L; ++l) store(square + l * L, v[l]);
        for (int64_t l = 0; l < pixels; ++l) implicit_gemm::copy_row(square + l * L, used, pixel + l * pixel_stride);
      }
    }
  }
}

// v[i], i < step: step kLanes elements in order; step is a power of two. Afterwards v[reversed_bits(remainder)] holds those with
// that remainder modulo step.
template <class T, int step>
[[gnu::always_inline]] inline void split_remainders(Vec<T>* v) {
  if constexpr (step > 1) {
    Vec<T> even[step / 2], odd[step / 2];
#pragma GCC unroll 8
    for (int i = 0; i < step / 2; ++i) {
      even[i] = every_second<T>(v[2 * i], v[2 * i + 1], 0, kEachLane<T>);
      odd[i] = every_second<T>(v[2 * i], v[2 * i + 1], 1, kEachLane<T>);
    }
    split_remainders<T, step / 2>(even);
    split_remainders<T, step / 2>(odd);
#pragma GCC unroll 8
    for (int i = 0; i < step / 2; ++i) v[i] = even[i], v[step / 2 + i] = odd[i];
  }
}

constexpr int reversed_bits(int x, int step) { return step == 1 ? 0 : x % 2 * (step / 2) + reversed_bits(x / 2, step / 2); }

// to[remainder pitch + x] = from[x step + remainder] for x < count. There are `readable` elements at from, and `room` at to.
template <class T, int step>
void split_line(const T* from, int64_t count, int64_t readable, T* to, int64_t room, int64_t pitch) {
  constexpr int64_t L = kLanes<T>;
  if (count < L && (readable < step * L || room < L)) {
    for (int remainder = 0; remainder < step; ++remainder)
      for (int64_t x = 0; x < count; ++x) to[remainder * pitch + x] = from[x * step + remainder];
    return;
  }
  Vec<IndexOf<T>> wanted;
  for (int64_t l = 0; l < L; ++l) wanted[l] = l < count ? -1 : 0;
  for (int64_t x = 0; x < count; x += L) {
    x = std::max<int64_t>(0, std::min(x, count - L));  // the last block overlaps the one before
    Vec<T> v[step];
#pragma GCC unroll 16
    for (int i = 0; i < step; ++i) v[i] = load(from + x * step + i * L);
    split_remainders<T, step>(v);
#pragma GCC unroll 16
    for (int remainder = 0; remainder < step; ++remainder) {
      const Vec<T> line = v[reversed_bits(remainder, step)];
      store(to + remainder * pitch + x, wanted ? line : Vec<T>{});
    }
  }
}

// The other way: v[remainder] holds the elements with that remainder; afterwards all of them are in order.
template <class T, int step>
[[gnu::always_inline]] inline void join_remainders(Vec<T>* v) {
  if constexpr (step > 1) {
    Vec<T> even[step / 2], odd[step / 2];
#pragma GCC unroll 8
    for (int i = 0; i < step / 2; ++i) even[i] = v[2 * i], odd[i] = v[2 * i + 1];
    join_remainders<T, step / 2>(even);
    join_remainders<T, step / 2>(odd);
#pragma GCC unroll 8
    for (int i = 0; i < step / 2; ++i) {
      v[2 * i] = interleave<T>(even[i], odd[i], 0, kEachLane<T>);
      v[2 * i + 1] = interleave<T>(even[i], odd[i], 1, kEachLane<T>);
    }
  }
}

// to[x step + remainder] = from[remainder pitch + x] for the first `columns` of them; reads whole vectors.
template <class T, int step>
void join_line(const T* from, int64_t pitch, int64_t columns, T* to) {
  constexpr int64_t L = kLanes<T>;
  for (int64_t column = 0; column < columns; column += step * L, from += L) {
    Vec<T> v[step];
#pragma GCC unroll 16
    for (int remainder = 0; remainder < step; ++remainder) v[remainder] = load(from + remainder * pitch);
    join_remainders<T, step>(v);
#pragma GCC unroll 16
    for (int i = 0; i < step; ++i) {
      const int64_t rest = columns - column - i * L;
      if (rest >= L) {
        store(to + column + i * L, v[i]);
      } else if (rest > 0) {
        T last[L];
        store(last, v[i]);
        implicit_gemm::copy_pieces(last, rest, to + column + i * L);
      }
    }
  }
}

// to[column] = from[column % phases][column / phases]
template <class T>
void merge_phases(const T* from, int64_t phase_stride, int64_t phases, int64_t columns, T* to) {
  switch (phases) {
    case 1: return implicit_gemm::copy_row(from, columns, to);
    case 2: return join_line<T, 2>(from, phase_stride, columns, to);
    case 4: return join_line<T, 4>(from, phase_stride, columns, to);
    case 8: return join_line<T, 8>(from, phase_stride, columns, to);
    case 16: return join_line<T, 16>(from, phase_stride, columns, to);
    default:
      for (int64_t phase = 0; phase < phases; ++phase)
        for (int64_t j = 0, at = phase; at < columns; ++j, at += phases) to[at] = from[phase * phase_stride + j];
  }
}

// Rows of NCHW planes: the columns of a row are adjacent. step is 0 where it is none of those that have a kernel.
template <class T, int known_step>
void fill_lines(const T* from, const T* limit, const Strides& s, int64_t source_columns, int64_t channels, int64_t count,
                const Buffer& b, T* buffer) {
  const int64_t step = known_step > 0 ? known_step : b.step;
  // Elements whole ... whole_end - 1 exist for every remainder; those beside them, for some.
  const int64_t whole = std::min(b.pitch, b.first_column < 0 ? ceil_div(-b.first_column, step) : 0);
  const int64_t rest = source_columns - b.first_column;
  const int64_t whole_end = std::clamp(rest < 0 ? 0 : rest / step, whole, b.pitch);
  const int64_t tail = whole_end / kLanes<T> * kLanes<T>;
  const bool ragged = b.first_column % step != 0 || rest % step != 0;
  for (int64_t channel = 0; channel < channels; ++channel) {
    const T* row = from + channel * s.c;
    T* line = buffer + channel * b.channel_stride;
    for (int64_t r = 0; r < count; ++r, row += s.h, line += b.row_stride) {
      for (int64_t remainder = 0; remainder < step; ++remainder) {
        implicit_gemm::zero_beyond(line + remainder * b.pitch, whole);
        implicit_gemm::zero_beyond(line + remainder * b.pitch + tail, b.pitch - tail);
      }
      const T* first = row + b.first_column + whole * step;
      if (whole_end > whole) {
        if constexpr (known_step == 1)
          implicit_gemm::copy_row(first, whole_end - whole, line + whole);
        else if constexpr (known_step > 1)
          split_line<T, known_step>(first, whole_end - whole, limit - first, line + whole, b.pitch - whole, b.pitch);
        else
          for (int64_t remainder = 0; remainder < step; ++remainder)
            gather_strided(first + remainder, step, whole_end - whole, line + remainder * b.pitch + whole);
      }
      if (!ragged) continue;
      for (const int64_t x : {whole - 1, whole_end}) {
        if (x < 0 || x >= b.pitch) continue;
        for (int64_t remainder = 0; remainder < step; ++remainder) {
          const int64_t column = b.first_column + x * step + remainder;
          if (column >= 0 && column < source_columns) line[remainder * b.pitch + x] = row[column];
        }
      }
    }
  }
}

// Rows row ... row + count - 1 of channels c ... c + channels - 1 of image n, all of which exist, to buffer row 0 and on.
template <class T>
void fill(const View<const T>& source, int64_t N, int64_t n, int64_t c, int64_t channels, int64_t row, int64_t count,
          const Buffer& b, T* buffer) {
  const Strides& s = source.strides;
  const T *from = source.data + n * s.n + c * s.c + row * s.h, *const limit = source.data + N * s.n;
  if (s.w == 1) {
    switch (b.step) {
      case 1: return fill_lines<T, 1>(from, limit, s, source.columns, channels, count, b, buffer);
      case 2: return fill_lines<T, 2>(from, limit, s, source.columns, channels, count, b, buffer);
      case 4: return fill_lines<T, 4>(from, limit, s, source.columns, channels, count, b, buffer);
      case 8: return fill_lines<T, 8>(from, limit, s, source.columns, channels, count, b, buffer);
      case 16: return fill_lines<T, 16>(from, limit, s, source.columns, channels, count, b, buffer);
      default: return fill_lines<T, 0>(from, limit, s, source.columns, channels, count, b, buffer);
    }
  }
  for (int64_t remainder = 0; remainder < b.step; ++remainder) {
    // Element x is source column first_column + remainder + x step; left ... end - 1 exist.
    const int64_t first = b.first_column + remainder;
    const int64_t left = std::min(b.pitch, first < 0 ? ceil_div(-first, b.step) : 0);
    const int64_t end = first >= source.columns ? left : std::clamp(ceil_div(source.columns - first, b.step), left, b.pitch);
    const int64_t tail = end / kLanes<T> * kLanes<T>;
    for (int64_t r = 0; r < count; ++r) {
      T* to = buffer + r * b.row_stride + remainder * b.pitch;
      for (int64_t channel = 0; channel < channels; ++channel) {
        implicit_gemm::zero_beyond(to + channel * b.channel_stride, left);
        implicit_gemm::zero_beyond(to + channel * b.channel_stride + tail, b.pitch - tail);
      }
      if (left < end)
        split_pixels(from + r * s.h + (first + left * b.step) * s.w, b.step * s.w, channels, end - left, limit, to + left,
                     b.channel_stride);
    }
  }
}

// Rows that do not exist.
template <class T>
void clear(int64_t channels, int64_t count, const Buffer& b, T* buffer) {
  for (int64_t channel = 0; channel < channels; ++channel)
    for (int64_t r = 0; r < count; ++r)
      implicit_gemm::zero_beyond(buffer + r * b.row_stride + channel * b.channel_stride, b.step * b.pitch);
}

}  // namespace torchcnn::TORCHCNN_ISA::planar_rows
