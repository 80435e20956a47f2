// grad_weight of any geometry as matrix products whose sums run over the pixels of the batch:
//
//   grad_weight[(c,t)][k] = sum_x A(x, (c,t)) grad_output[x][k]     A as in conv2d_implicit_gemm.h, x = (n, i, j)
//
// grad_output is packed [k / nr][x][k % nr], and in channels_last the input of 1x1 filters likewise.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../geometry.h"
#include "conv2d_grad_bias.h"
#include "conv2d_implicit_gemm.h"
#include "conv2d_windows.h"
#include "runtime.h"
#include "simd.h"

namespace torchcnn::TORCHCNN_ISA::implicit_gemm {

// grad_weight is cut into tasks of chunk_rows rows (c,t) by most_chunk_filters filters: 144 KiB of sums, which stay in L2.
inline constexpr int64_t chunk_rows = 288, most_chunk_filters = 128;

// channels_last: the channels of some pixels, step apart, to[c / width][pixel][c % width], and zeros after the last channel.
template <int64_t width, class T>
void pack_pixels(const T* from, int64_t step, int64_t pixels, int64_t channels, T* to, int64_t panel_stride) {
  constexpr int64_t together = 16;  // both sides then go through a few lines at a time
  for (int64_t begin = 0; begin < pixels; begin += together, from += together * step, to += together * width) {
    const int64_t count = std::min(together, pixels - begin);
    T* panel = to;
    int64_t c = 0;
    for (; c + width <= channels; c += width, panel += panel_stride)
      for (int64_t x = 0; x < count; ++x) {
        __builtin_prefetch(from + (together + x) * step + c, 0, 2);
        copy_row(from + x * step + c, width, panel + x * width);
      }
    for (int64_t x = 0; c < channels && x < count; ++x) {
      copy_row(from + x * step + c, channels - c, panel + x * width);
      for (int64_t empty = channels - c; empty < width; ++empty) panel[x * width + empty] = T(0);
    }
  }
}

// The input is packed too where each pixel is seen once, by 1x1 filters: tiles of a few of its many channels would use cache
// lines in parts. Not where a block, which has whole rows, is too long for L2.
inline constexpr int64_t channel_panel = 2 * mr, longest_packed = 1024;
inline bool packs_channels(const Conv2dGeometry& g, int64_t block_positions) {
  return g.layout == Layout::channels_last && g.R * g.S == 1 && g.pad_h == 0 && g.pad_w == 0 && block_positions <= longest_packed;
}

// What is packed next: of tensors beyond the caches it is asked for while the present block is multiplied, some pixels a tile.
template <class T>
struct UpcomingPixels {
  const T* from;
  int64_t step, channels, pixels;
  void ask_for(int64_t share) {
    for (; share > 0 && pixels > 0; --share, --pixels, from += step) gemm::prefetch(from, channels);
  }
};

template <class T>
void conv2d_grad_weight(const Conv2dGeometry& g, const T* grad_output, const T* input, T* grad_weight, T* grad_bias) {
  const int64_t taps_count = g.R * g.S, C = g.C_per_group(), K = g.K_per_group(), patch_size = C * taps_count;
  const Strides in = g.input_strides(), out = g.output_strides();
  Tap* taps = workspace<Tap>(Slot::tables, taps_count);
  input_taps(g, taps);
  const int64_t c_chunks = ceil_div(C, std::clamp<int64_t>(chunk_rows / taps_count, 1, C)),
                k_chunks = ceil_div(K, most_chunk_filters);
  const int64_t chunk_channels = ceil_div(C, c_chunks), chunk_filters = ceil_div(ceil_div(K, k_chunks), nr<T>) * nr<T>;
  // The fewer the filters, the more positions of grad_output fit into 128 KiB of L2, which saves halo and short reads.
  const int64_t packed_filters = ceil_div(std::min(K, chunk_filters), nr<T>) * nr<T>;
  const Blocks blocks = blocks_of(g.N, g.P, g.Q, (int64_t(128) << 10) / (packed_filters * int64_t(sizeof(T))));
  const Window w = window_of(taps, taps_count, in, g.H, g.W, chunk_channels, blocks.rows, g.P, g.Q, g.stride_h, g.stride_w,
                             g.layout, sizeof(T), false);

  const int64_t chunks = g.G * c_chunks * k_chunks, slices = gemm::slices_of(chunks, blocks.count());
  const int64_t weights = g.K * patch_size;
  T* partial = slices == 1 ? grad_weight : workspace<T>(Slot::partial_sums, slices * weights);
  const BiasSums<T> bias_sums(slices, g.K, grad_bias);
  const int64_t task_cost = chunk_channels * taps_count * std::min(K, chunk_filters) / kLanes<T> * (g.N * g.P * g.Q / slices);
  parallel_for(chunks * slices, task_cost, [&](int64_t task) {
    const int64_t slice = task % slices, c_chunk = task / slices % c_chunks, k_chunk = task / slices / c_chunks % k_chunks;
    const int64_t group = task / slices / c_chunks / k_chunks;
    const int64_t c_begin = c_chunk * chunk_channels, channels = std::min(chunk_channels, C - c_begin);
    const int64_t k_begin = k_chunk * chunk_filters, filters = std::min(chunk_filters, K - k_begin);
    const int64_t rows = channels * taps_count, panels = ceil_div(filters, nr<T>);
    const int64_t max_positions = blocks.images * blocks.rows * g.Q;

    int64_t* patch = workspace<int64_t>(Slot::offsets, rows + max_positions);
    int64_t* position = patch + rows;
    int64_t known_positions = 0;
    const bool channels_first = g.layout == Layout::nchw || taps_count == 1;
    const int64_t channel_step = channels_first ? taps_count : 1, tap_step = channels_first ? 1 : channels;
    const bool packs = packs_channels(g, max_positions);
    const bool asks =
        packs && g.stride_h == 1 && g.stride_w == 1 && worth_asking_ahead(g.N * (out.n + in.n) * int64_t(sizeof(T)));
    // Panels that are written side by side: not all in the same sets of L1.
    const int64_t input_panel = max_positions * channel_panel + 64 / sizeof(T),
                  gradient_panel = max_positions * nr<T> + 64 / sizeof(T);
    for (int64_t t = 0; t < taps_count; ++t)
      for (int64_t c = 0; c < channels; ++c)
        patch[c * channel_step + t * tap_step] =
            packs ? c / channel_panel * input_panel + c % channel_panel
                  : (taps[t].row - w.first_row) * w.strides.h + (taps[t].column - w.first_column) * w.strides.w + c * w.strides.c;
    T* gradient = workspace<T>(Slot::gradient, panels * gradient_panel);
    T* sums = workspace<T>(Slot::tile, panels * rows * nr<T>);
    for (int64_t i = 0; i < panels * rows * nr<T>; i += kLanes<T>) store(sums + i, Vec<T>{});

    for (int64_t block = slice * blocks.count() / slices; block < (slice + 1) * blocks.count() / slices; ++block) {
      const int64_t n = block / blocks.along_rows * blocks.images, images = std::min(blocks.images, g.N - n);
      const int64_t i_begin = block % blocks.along_rows * blocks.rows, i_count = std::min(blocks.rows, g.P - i_begin);
      const int64_t image_positions = i_count * g.Q, positions = images * image_positions;
      if (positions != known_positions)  // they differ at the ends of a plane or of the batch only, then in number too
        for (int64_t x = 0, image = 0; image < images; ++image)
          for (int64_t i = 0; i < i_count; ++i)
            for (int64_t j = 0; j < g.Q; ++j, ++x)
              position[x] =
                  packs ? x * channel_panel
                        : image * w.strides.n + i * g.stride_h / w.step_h * w.strides.h + j * g.stride_w / w.step_w * w.strides.w;
      known_positions = positions;
      const int64_t c = group * C + c_begin, h = i_begin * g.stride_h;
      const T* window = nullptr;
      if (packs) {
        T* to = workspace<T>(Slot::patches, ceil_div(channels, channel_panel) * input_panel);
        window = to;
        for (int64_t image = 0; image < images; ++image)
          for (int64_t i = 0; i < i_count; ++i, to += g.Q * channel_panel)
            pack_pixels<channel_panel>(input + (n + image) * in.n + c * in.c + (h + i * g.stride_h) * in.h, g.stride_w * in.w,
                                       g.Q, channels, to, input_panel);
      } else {
        window = read_window(View<const T>{input, in, g.H, g.W}, w, n, images, c, channels, h, g.layout);
      }

      for (int64_t image = 0; image < images; ++image) {
        const T* from = grad_output + (n + image) * out.n + (group * K + k_begin) * out.c + i_begin * out.h;
        T* to = gradient + image * image_positions * nr<T>;
        if (g.layout == Layout::channels_last) {
          pack_pixels<nr<T>>(from, out.w, image_positions, filters, to, gradient_panel);
          if (c_chunk == 0) bias_sums.add_pixels(slice, group * K + k_begin, filters, from, out.w, image_positions);
          continue;
        }
        for (int64_t panel = 0; panel < panels; ++panel)
          gemm::pack_transposed(from + panel * nr<T> * out.c, out.c, std::min(nr<T>, filters - panel * nr<T>), image_positions,
                                to + panel * gradient_panel, [](int64_t x) { return x; });
        if (c_chunk == 0) bias_sums.add(slice, group * K + k_begin, filters, from, out.c, 1, 0, image_positions);
      }
      const int64_t depths = ceil_div(positions, gemm::gradient_depth);
      UpcomingPixels<T> next_gradient{grad_output + n * out.n + i_begin * out.h + positions * out.w + group * K + k_begin, out.w,
                                      filters, positions};
      UpcomingPixels<T> next_input{input + n * in.n + h * in.h + positions * in.w + c, in.w, channels, positions};
      const int64_t share = asks ? ceil_div(positions, depths * panels * ceil_div(rows, mr)) : 0;
      for (int64_t d = 0; d < depths; ++d) {
        const int64_t x = d * positions / depths;
        gemm::Run runs[gemm::gradient_depth / gemm::max_run + 1];
        const int64_t run_count = gemm::cut_into_runs(x, (d + 1) * positions / depths - x, runs);
        for (int64_t panel = 0; panel < panels; ++panel) {
          const T* b = gradient + panel * gradient_panel;
          const bool narrow = filters - panel * nr<T> <= kLanes<T>;
          for (int64_t row = 0, tile_rows = 0; row < rows; row += tile_rows) {
            T* c = sums + (panel * rows + row) * nr<T>;
            next_gradient.ask_for(share), next_input.ask_for(share);
            const auto multiply = [&]<int count, int vectors>() {
              gemm::IndirectA<T, count> a{{}, position};
              for (int m = 0; m < count; ++m) a.row[m] = window + patch[row + m];
              gemm::tile_product<T, count, vectors>(runs, run_count, a, b, c, nr<T>, {nullptr, true, false});
            };
            tile_rows = gemm::tile_rows(rows - row, narrow ? gemm::narrow_mr : mr);
            if (narrow)
              gemm::with_rows<gemm::narrow_mr>(tile_rows, [&](auto m) { multiply.template operator()<m, 1>(); });
            else
              gemm::with_rows<mr>(tile_rows, [&](auto m) { multiply.template operator()<m, 2>(); });
          }
        }
      }
    }

    for (int64_t panel = 0; panel < panels; ++panel) {
      const int64_t k = panel * nr<T>, lanes = std::min(nr<T>, filters - k);
      T* to = partial + slice * weights + (group * K + k_begin + k) * patch_size + c_begin * taps_count;
      const T* from = sums + panel * rows * nr<T>;
      const Finish<T> as_it_is{nullptr, lanes, false};
      if (channels_first) {
        gemm::unpack_transposed<T>([&](int64_t x) { return from + x * nr<T>; }, lanes, rows, to, patch_size, as_it_is);
      } else {
        for (int64_t c = 0; c < channels; ++c)
          gemm::unpack_transposed<T>([&](int64_t t) { return from + (t * channels + c) * nr<T>; }, lanes, taps_count,
                                     to + c * taps_count, patch_size, as_it_is);
      }
    }
  });
  if (slices > 1) gemm::add_slices(partial, slices, weights, grad_weight);
  bias_sums.finish();
}

}  // namespace torchcnn::TORCHCNN_ISA::implicit_gemm
