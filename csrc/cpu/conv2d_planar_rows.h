// Rows of an image, channel by channel, with the padding written out: what the kernels that compute vectors of pixels read
// (conv2d_small_channels.h and _grad_weight.h). For a stride above 1 the columns of equal remainder lie side by side, so that the
// pixels under one tap are a vector whatever the stride:
//
//   buffer[row row_stride + c channel_stride + (column mod step) remainder_stride + column / step]    columns from first_column
//
// A channels_last image is transposed on the way in, and results on the way out, in squares of a vector's lanes.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "../geometry.h"
#include "conv2d_gemm.h"
#include "conv2d_windows.h"
#include "simd.h"

namespace torchcnn::TORCHCNN_ISA::planar_rows {

using implicit_gemm::View;

struct Buffer {
  int64_t first_column, step, width;  // width: elements of each remainder
  int64_t remainder_stride, row_stride, channel_stride;
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

// Lanes l for which column + l step is a column of the image.
template <class T>
[[gnu::always_inline]] inline Vec<IndexOf<T>> lanes_inside(int64_t column, int64_t step, int64_t columns) {
  constexpr int64_t L = kLanes<T>;
  const int64_t begin = std::clamp<int64_t>(ceil_div(-column, step), 0, L);
  const int64_t end = std::clamp<int64_t>(ceil_div(columns - column, step), 0, L);
  Vec<IndexOf<T>> lane;
  for (int l = 0; l < L; ++l) lane[l] = l;
  return (lane >= IndexOf<T>(begin)) & (lane < IndexOf<T>(end));
}

// Some rows of a plane of NCHW, from the element `row` of a tensor of `size` elements on.
template <class T>
struct Rows {
  const T* data;
  int64_t size, row, row_stride, count, columns;
};

// One channel of `fill`, in NCHW, where step has a kernel.
template <class T, int step>
void split_rows(const Rows<T>& from, const Buffer& b, T* to) {
  constexpr int64_t L = kLanes<T>, span = step * L;
  const auto [data, size, row, from_row, count, columns] = from;  // copies: stores could change the originals
  const int64_t first_column = b.first_column, remainder_stride = b.remainder_stride, to_row = b.row_stride;
  // Vectors before `begin` and from `end` on lie beside the image; of the others the first and the last may reach beyond it.
  const int64_t vectors = ceil_div(b.width, L), begin = first_column < 0 ? std::min(vectors, -first_column / span) : 0;
  const int64_t end = std::clamp(ceil_div(columns - first_column, span), begin, vectors);
  Vec<IndexOf<T>> in_first[step], in_last[step];
  for (int remainder = 0; remainder < step; ++remainder) {
    in_first[remainder] = lanes_inside<T>(first_column + begin * span + remainder, step, columns);
    in_last[remainder] = lanes_inside<T>(first_column + (end - 1) * span + remainder, step, columns);
  }
  for (int64_t r = 0; r < count; ++r, to += to_row) {
    const int64_t at = row + r * from_row + first_column;
    if (begin > 0 || end < vectors) {
      for (int remainder = 0; remainder < step; ++remainder) {
        implicit_gemm::zero_beyond(to + remainder * remainder_stride, begin * L);
        implicit_gemm::zero_beyond(to + remainder * remainder_stride + end * L, (vectors - end) * L);
      }
      if (begin == end) continue;
    }
    if (at + begin * span < 0 || at + end * span > size) {  // the first and last rows of the tensor
      for (int remainder = 0; remainder < step; ++remainder) {
        for (int64_t x = begin * L; x < end * L; ++x) {
          const int64_t column = first_column + x * step + remainder;
          to[remainder * remainder_stride + x] = column >= 0 && column < columns ? data[at + x * step + remainder] : T{};
        }
      }
      continue;
    }
    const auto move = [&](int64_t vector, const Vec<IndexOf<T>>* inside) [[gnu::always_inline]] {
      Vec<T> v[step];
#pragma GCC unroll 16
      for (int i = 0; i < step; ++i) v[i] = load(data + at + vector * span + i * L);
      split_remainders<T, step>(v);
#pragma GCC unroll 16
      for (int remainder = 0; remainder < step; ++remainder) {
        const Vec<T> moved = v[reversed_bits(remainder, step)];
        store(to + remainder * remainder_stride + vector * L, inside == nullptr ? moved : inside[remainder] ? moved : Vec<T>{});
      }
    };
    move(begin, in_first);
    for (int64_t vector = begin + 1; vector < end - 1; ++vector) move(vector, nullptr);
    if (end - begin > 1) move(end - 1, in_last);
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

// Rows row, row + row_step, ... of channels c, c + 1, ... of image n, all of which exist, to buffer row 0 and on. Writes whole
// vectors: what is too much of a row, the next one replaces, and after the last there must be room for it.
template <class T>
void fill(const View<const T>& source, int64_t N, int64_t n, int64_t c, int64_t channels, int64_t row, int64_t row_step,
          int64_t count, const Buffer& b, T* buffer) {
  const Strides& s = source.strides;
  const int64_t size = N * s.n, at = n * s.n + c * s.c + row * s.h, to_next = row_step * s.h;
  const auto split = [&]<int step>(std::integral_constant<int, step>) {
    for (int64_t channel = 0; channel < channels; ++channel)
      split_rows<T, step>({source.data, size, at + channel * s.c, to_next, count, source.columns}, b,
                          buffer + channel * b.channel_stride);
  };
  if (s.w == 1) {
    switch (b.step) {
      case 1: return split(std::integral_constant<int, 1>{});
      case 2: return split(std::integral_constant<int, 2>{});
      case 4: return split(std::integral_constant<int, 4>{});
      case 8: return split(std::integral_constant<int, 8>{});
      case 16: return split(std::integral_constant<int, 16>{});
    }
  }
  for (int64_t remainder = 0; remainder < b.step; ++remainder) {
    // Element x is source column first_column + remainder + x step; left ... end - 1 exist.
    const int64_t first = b.first_column + remainder;
    const int64_t left = std::min(b.width, first < 0 ? ceil_div(-first, b.step) : 0);
    const int64_t end = first >= source.columns ? left : std::clamp(ceil_div(source.columns - first, b.step), left, b.width);
    const int64_t tail = end / kLanes<T> * kLanes<T>;
    for (int64_t r = 0; r < count; ++r) {
      T* to = buffer + r * b.row_stride + remainder * b.remainder_stride;
      for (int64_t channel = 0; channel < channels; ++channel) {
        implicit_gemm::zero_beyond(to + channel * b.channel_stride, left);
        implicit_gemm::zero_beyond(to + channel * b.channel_stride + tail, b.width - tail);
      }
      if (left == end) continue;
      const T* start = source.data + at + r * to_next + (first + left * b.step) * s.w;
      if (s.w == 1)
        for (int64_t channel = 0; channel < channels; ++channel)
          gather_strided(start + channel * s.c, b.step, end - left, to + channel * b.channel_stride + left);
      else
        split_pixels(start, b.step * s.w, channels, end - left, source.data + size, to + left, b.channel_stride);
    }
  }
}

// The same, with zeros for rows that do not exist.
template <class T>
void fill_padded(const View<const T>& source, int64_t N, int64_t n, int64_t c, int64_t channels, int64_t row, int64_t row_step,
                 int64_t count, const Buffer& b, T* buffer) {
  const int64_t begin = std::clamp<int64_t>(ceil_div(-row, row_step), 0, count);
  const int64_t end = std::clamp<int64_t>(ceil_div(source.rows - row, row_step), begin, count);
  const auto clear = [&](int64_t first, int64_t last) {
    for (int64_t channel = 0; channel < channels; ++channel)
      for (int64_t r = first; r < last; ++r)
        for (int64_t remainder = 0; remainder < b.step; ++remainder)
          implicit_gemm::zero_beyond(buffer + r * b.row_stride + channel * b.channel_stride + remainder * b.remainder_stride,
                                     b.width);
  };
  clear(0, begin);
  fill(source, N, n, c, channels, row + begin * row_step, row_step, end - begin, b, buffer + begin * b.row_stride);
  clear(end, count);
}

}  // namespace torchcnn::TORCHCNN_ISA::planar_rows
