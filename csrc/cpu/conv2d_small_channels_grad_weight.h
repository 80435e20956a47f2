// The gradient of the weights where filters or taps are few, vectorised over pixels: first layers and narrow groups.
//
//   grad_weight[k,c,t] = sum_{n,i,j} grad_output[n,k,i,j] input[n, c, i stride_h + row_t, j stride_w + column_t]     t = (r, s)
//
// A vector of pixels of grad_output is multiplied with the vectors of input that its taps see: both are read as they lie, where
// the general kernel would transpose grad_output and leave the lanes beyond K empty. The register tile is some filters by some
// (c, t); each of its elements is a vector of partial sums over the pixels of a block of rows, which is added to
// sums[tile][element]. Lanes are added at the end. Sums within a block and over blocks are short, and so are their errors.
//
// In NCHW, rows that nearly fill their vectors, and those with wide taps beside them, are read as they lie, and the input under
// them from a padded copy (conv2d_planar_rows.h). Others are strung together, and so are the rows of input that a tap sees:
//
//   strung[n][c][line][row mod stride_h][row / stride_h][pitch]
//
// If that takes few copies, there is a line for each filter column s with the pitch of grad_output, Q, which stays where it is.
// Else there is one for each remainder of columns modulo stride_w, with a pitch that has room for the taps beside the row, and
// grad_output is copied to that pitch, with zeros between its rows. These meet inputs that no tap pairs them with: a result that
// holds a NaN is computed again by the general kernel.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "../geometry.h"
#include "conv2d_gemm.h"
#include "conv2d_grad_bias.h"
#include "conv2d_implicit_gemm_grad_weight.h"
#include "conv2d_planar_rows.h"
#include "conv2d_small_channels.h"
#include "runtime.h"
#include "simd.h"

namespace torchcnn::TORCHCNN_ISA::small_channels {

// Filters and taps of a tile: 12 accumulators of 16 registers or 24 of 32.
inline constexpr int max_tile_filters = 4;
constexpr int tile_taps(int filters) { return std::min(8, TORCHCNN_VECTOR_REGISTERS / 4 * 3 / filters); }

// Elements of grad_output of a tile's filters that a block should have, 24 KiB, since all taps pass by them in L1; and the most
// of the input, which may come from L2.
inline constexpr int64_t gradient_block_elements = 6 * 1024, input_block_elements = 24 * 1024;

// In place: lane l of v[0] becomes the sum of all lanes of v[l].
template <class T, int block = int(kLanes<T> / 2)>
[[gnu::always_inline]] inline void add_lanes(Vec<T>* v) {
  if constexpr (block > 0) {
#pragma GCC unroll 8
    for (int l = 0; l < block; ++l) {
      gemm::swap_blocks<T, block>(v[l], v[l + block], kEachLane<T>);
      v[l] += v[l + block];
    }
    add_lanes<T, block / 2>(v);
  }
}

// `rows` rows, perhaps strung together, of `columns` pixels of grad_output: whole vectors and perhaps one that ends with the row
// and overlaps the one before. gradient_filter: from one filter to the next; input_row: from the input under a row to that under
// the next.
template <class T>
struct GradientBlock {
  int64_t rows, columns;
  int64_t gradient_filter, gradient_row, input_row;
};

// sums[f taps + t], a vector each, += the products over the block of gradient[f] and input[offset[t]]. `next` will be read soon.
template <class T, int filters, int taps>
[[gnu::noinline]] void gradient_tile(const GradientBlock<T>& block, const T* gradient, const T* next, const T* input,
                                     const int64_t* offset, T* sums) {
  constexpr int64_t L = kLanes<T>;
  const T* seen[taps];
  for (int t = 0; t < taps; ++t) seen[t] = input + offset[t];
  Vec<T> sum[filters][taps] = {};
  const auto add_products = [&](int64_t x, const Vec<T>* g) [[gnu::always_inline]] {
#pragma GCC unroll 8
    for (int t = 0; t < taps; ++t) {
      Vec<T> right = load(seen[t] + x);
      settle(right);
#pragma GCC unroll 4
      for (int f = 0; f < filters; ++f) sum[f][t] += g[f] * right;
    }
  };
  const int64_t whole = block.columns / L * L;
  Vec<IndexOf<T>> is_new;  // the lanes of a row's last vector that no other holds
  for (int64_t l = 0; l < L; ++l) is_new[l] = l >= L - (block.columns - whole) ? -1 : 0;
  for (int64_t i = 0; i < block.rows; ++i) {
    const T* left = gradient + i * block.gradient_row;
    const int64_t row = i * block.input_row;
    for (int64_t x = 0; x < whole; x += L) {
      __builtin_prefetch(next + i * block.gradient_row + x, 0, 2);
      Vec<T> g[filters];
#pragma GCC unroll 4
      for (int f = 0; f < filters; ++f) g[f] = load(left + x + f * block.gradient_filter);
      add_products(row + x, g);
    }
    if (whole < block.columns) {
      const int64_t x = block.columns - L;
      Vec<T> g[filters];
#pragma GCC unroll 4
      for (int f = 0; f < filters; ++f) g[f] = is_new ? load(left + x + f * block.gradient_filter) : Vec<T>{};
      add_products(row + x, g);
    }
  }
#pragma GCC unroll 4
  for (int f = 0; f < filters; ++f) {
#pragma GCC unroll 8
    for (int t = 0; t < taps; ++t) {
      T* const total = sums + (f * taps + t) * L;
      store(total, load(total) + sum[f][t]);
    }
  }
}

template <class T, int filters, int taps = tile_taps(filters)>
void gradient_tile_of(int64_t needed, const GradientBlock<T>& block, const T* gradient, const T* next, const T* input,
                      const int64_t* offset, T* sums) {
  if constexpr (taps > 1) {
    if (needed < taps) return gradient_tile_of<T, filters, taps - 1>(needed, block, gradient, next, input, offset, sums);
  }
  gradient_tile<T, filters, taps>(block, gradient, next, input, offset, sums);
}

// How many filters the next tile of `rest` takes.
inline int64_t tile_filters(int64_t rest) { return rest == 5 || rest == 6 ? 3 : std::min<int64_t>(rest, max_tile_filters); }

template <class T>
void conv2d_grad_weight(const Conv2dGeometry& g, const T* grad_output, const T* input, T* grad_weight, T* grad_bias) {
  constexpr int64_t L = kLanes<T>;
  const int64_t taps_count = g.R * g.S, C = g.C_per_group(), K = g.K_per_group(), patch_size = C * taps_count;
  Tap* taps = workspace<Tap>(Slot::tables, taps_count);
  implicit_gemm::input_taps(g, taps);
  const planar_rows::View<const T> input_view{input, g.input_strides(), g.H, g.W},
      gradient_view{grad_output, g.output_strides(), g.P, g.Q};

  const int64_t vectors = ceil_div(g.Q, L), halo = (g.R - 1) * g.dilation_h + 1;
  const bool nchw = g.layout == Layout::nchw;
  const int64_t beside = (g.S - 1) * g.dilation_w / g.stride_w;  // elements of a line that a row's taps see beyond its own
  const bool ragged = g.Q < L || 8 * g.Q <= 7 * vectors * L;
  const bool each_column = nchw && ragged && g.stride_w == 1 && C * g.S <= C + K && std::min<int64_t>(2, g.P) * g.Q >= L;
  const bool strung = !nchw || each_column || (ragged && (4 * beside <= g.Q || g.Q < L));
  const bool in_place = each_column || !strung;
  const int64_t lines = each_column ? g.S : g.stride_w, overlap = each_column ? 0 : beside;
  const int64_t pitch = strung ? g.Q + overlap : ceil_div(g.Q + overlap, L) * L;
  const int64_t input_row = C * lines * pitch;
  const int64_t wanted_rows = std::min(gradient_block_elements / (max_tile_filters * (strung ? pitch : g.Q)),
                                       (input_block_elements - halo * input_row) / (g.stride_h * input_row));
  const int64_t blocks_of_image = ceil_div(g.P, std::clamp<int64_t>(wanted_rows, std::min<int64_t>(4, g.P), 64));
  const int64_t block_rows = ceil_div(g.P, blocks_of_image), block_input_rows = (block_rows - 1) * g.stride_h + halo;
  const int64_t line_size = ceil_div(block_input_rows, g.stride_h) * pitch + overlap + 2 * L;
  const int64_t image_size = strung ? C * lines * g.stride_h * line_size : block_input_rows * input_row;
  // Small planes are taken several images at a time.
  const int64_t wanted_images = std::min(wanted_rows / g.P, input_block_elements / image_size);
  const int64_t block_images = strung && blocks_of_image == 1 ? std::clamp<int64_t>(wanted_images, 1, g.N) : 1;
  const int64_t blocks = ceil_div(g.N, block_images) * blocks_of_image;
  const int64_t gradient_image = ceil_div(block_rows * pitch, L) * L, gradient_filter = block_images * gradient_image + L;

  // Tiles of a group, in order: where their elements stand in sums, and the offset of each (c, t) into the buffer.
  int64_t* offset = workspace<int64_t>(Slot::offsets, patch_size);
  for (int64_t c = 0; c < C; ++c) {
    for (int64_t t = 0; t < taps_count; ++t) {
      const int64_t row = taps[t].row + g.pad_h, shift = taps[t].column + g.pad_w;
      const int64_t line = c * lines + (each_column ? t % g.S : shift % g.stride_w);
      offset[c * taps_count + t] = (each_column ? 0 : shift / g.stride_w) +
                                   (strung ? (line * g.stride_h + row % g.stride_h) * line_size + row / g.stride_h * pitch
                                           : row * input_row + line * pitch);
    }
  }
  // Calls visit(k, filters, first (c, t), taps, place in sums) for every tile and returns the size of sums.
  const auto each_tile = [&](auto visit) {
    int64_t place = 0;
    for (int64_t k = 0, filters = 0; k < K; k += filters) {
      filters = tile_filters(K - k);
      const int64_t tiles = ceil_div(patch_size, tile_taps(int(filters)));
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t first = tile * patch_size / tiles, count = (tile + 1) * patch_size / tiles - first;
        visit(k, filters, first, count, place);
        place += filters * count;
      }
    }
    return place;
  };

  const int64_t slices = gemm::slices_of(g.G, blocks), weights = g.K * patch_size;
  T* partial = slices == 1 ? grad_weight : workspace<T>(Slot::partial_sums, slices * weights);
  const BiasSums<T> bias_sums(slices, g.K, grad_bias);
  parallel_for(g.G * slices, K * patch_size * vectors * g.P * g.N / slices, [&](int64_t task) {
    const int64_t slice = task % slices, group = task / slices;
    T* buffer = workspace<T>(Slot::patches, block_images * image_size);
    T* gradient_copy = in_place ? nullptr : workspace<T>(Slot::gradient, max_tile_filters * gradient_filter);
    const int64_t elements = ceil_div(K * patch_size, L) * L;  // add_lanes takes L of them at a time
    T* sums = workspace<T>(Slot::tile, elements * L);
    for (int64_t x = 0; x < elements; ++x) store(sums + x * L, Vec<T>{});

    for (int64_t block = slice * blocks / slices; block < (slice + 1) * blocks / slices; ++block) {
      const int64_t n = block / blocks_of_image * block_images, images = std::min(block_images, g.N - n);
      const int64_t part = block % blocks_of_image, i_begin = part * g.P / blocks_of_image;
      const int64_t rows = (part + 1) * g.P / blocks_of_image - i_begin, row = i_begin * g.stride_h - g.pad_h;
      const int64_t input_rows = (rows - 1) * g.stride_h + halo;
      if (!strung) {
        const planar_rows::Buffer b{-g.pad_w, g.stride_w, pitch, pitch, input_row, lines * pitch};
        planar_rows::fill_padded(input_view, g.N, n, group * C, C, row, 1, input_rows, b, buffer);
      }
      for (int64_t x = 0; strung && x < images * g.stride_h; ++x) {
        const int64_t image = x / g.stride_h, remainder = x % g.stride_h;
        const int64_t count = std::max<int64_t>(0, ceil_div(input_rows - remainder, g.stride_h));
        planar_rows::Buffer b{-g.pad_w, g.stride_w, pitch, g.stride_h * line_size, pitch, lines * g.stride_h * line_size};
        T* to = buffer + image * image_size + remainder * line_size;
        for (int64_t s = 0; s < (each_column ? g.S : 1); ++s, b.first_column += g.dilation_w)
          planar_rows::fill_padded(input_view, g.N, n + image, group * C, C, row + remainder, g.stride_h, count, b,
                                   to + s * b.remainder_stride);
        for (int64_t line = 0; line < C * lines; ++line)
          implicit_gemm::zero_beyond(to + line * g.stride_h * line_size + count * pitch, overlap + L);
      }

      int64_t copied = -1, tile = 0;
      const T *gradient = nullptr, *source = nullptr;
      GradientBlock<T> shape{rows, g.Q, g.P * g.Q, g.Q, g.stride_h * input_row};
      if (each_column) shape = {images, rows * g.Q, g.P * g.Q, gradient_view.strides.n, image_size};
      if (!in_place) shape = {images, ceil_div(rows * pitch, L) * L, gradient_filter, gradient_image, image_size};
      each_tile([&](int64_t k, int64_t filters, int64_t first, int64_t count_of_taps, int64_t place) {
        if (k != copied) {
          copied = k, tile = 0;
          source = gradient = grad_output + n * gradient_view.strides.n + (group * K + k) * gradient_view.strides.c +
                              i_begin * gradient_view.strides.h;
          if (!in_place) {
            gradient = gradient_copy;
            const planar_rows::Buffer b{0, 1, pitch, 0, pitch, gradient_filter};
            for (int64_t image = 0; image < images; ++image) {
              T* to = gradient_copy + image * gradient_image;
              planar_rows::fill(gradient_view, g.N, n + image, group * K + k, filters, i_begin, 1, rows, b, to);
              for (int64_t f = 0; f < filters; ++f) store(to + f * gradient_filter + rows * pitch, Vec<T>{});
            }
          }
        }
        // Each tile fetches one of the filters that come after these, if they lie in memory as the tile takes them.
        const bool fetches = in_place || (nchw && images == 1);
        const T* next = fetches ? source + (filters + tile++ % filters) * gradient_view.strides.c : gradient;
        const auto multiply = [&]<int count>() {
          gradient_tile_of<T, count>(count_of_taps, shape, gradient, next, buffer, offset + first, sums + place * L);
        };
        switch (filters) {
          case 4: multiply.template operator()<4>(); break;
          case 3: multiply.template operator()<3>(); break;
          case 2: multiply.template operator()<2>(); break;
          default: multiply.template operator()<1>();
        }
        if (first == 0)  // what the tile has read is in L1
          bias_sums.add(slice, group * K + k, filters, gradient, shape.gradient_filter, shape.rows, shape.gradient_row,
                        shape.columns);
      });
    }
    for (int64_t x = 0; x < elements; x += L) {
      Vec<T> v[L];
#pragma GCC unroll 16
      for (int64_t l = 0; l < L; ++l) v[l] = load(sums + (x + l) * L);
      add_lanes<T>(v);
      store(sums + x, v[0]);
    }
    each_tile([&](int64_t k, int64_t filters, int64_t first, int64_t count, int64_t place) {
      T* to = partial + slice * weights + (group * K + k) * patch_size + first;
      for (int64_t f = 0; f < filters; ++f)
        for (int64_t t = 0; t < count; ++t) to[f * patch_size + t] = sums[place + f * count + t];
    });
  });
  if (slices > 1) gemm::add_slices(partial, slices, weights, grad_weight);
  bias_sums.finish();
  for (int64_t i = 0; i < weights; ++i)
    if (grad_weight[i] != grad_weight[i])
      return implicit_gemm::conv2d_grad_weight<T>(g, grad_output, input, grad_weight, nullptr);
}

}  // namespace torchcnn::TORCHCNN_ISA::small_channels
