// grad_weight by Winograd's minimal filtering, the adjoint of what conv2d_winograd.h does with filters:
//
//   U[xi][c][k] = sum_tile V[xi][tile][c] D[xi][tile][k]     V = B^T x B, D = A dy A^T, grad_weight = G^T U G
//
// Every element is summed over the tiles in fixed blocks. Where one is not finite, which Inf or NaN at one tap does to all of
// them, the whole is computed again by implicit GEMM.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../geometry.h"
#include "conv2d_grad_bias.h"
#include "conv2d_implicit_gemm_grad_weight.h"
#include "conv2d_winograd.h"
#include "runtime.h"
#include "simd.h"

namespace torchcnn::TORCHCNN_ISA::winograd {

// D of some tiles, as conv2d_winograd.h makes V of them. Their sums are added to bias_sums, unless it is null: a vector for each
// one of for_each_vector, of which the last may repeat filters.
template <class F, class T>
void transform_grad_outputs(const Images<const T>& images, const Tiling& tiling, int64_t filters, int64_t begin, int64_t end,
                            const Places& places, T* to, int64_t row, int64_t position_stride, double* bias_sums) {
  constexpr int64_t L = kLanes<T>;
  alignas(64) T band[band_out<F, T>];
  for_each_run<F>(tiling, begin, end, [&](int64_t tile, const Run& run) {
    const int64_t columns = run.count * F::W::out;
    const Patch patch(images, run.n, run.result_h, run.result_w, F::H::out, columns);
    const auto place = places.of_run(tile, run.count);
    for_each_vector<T>(filters, [&](int64_t k) {
      read_band(images, patch, k, band);
      if (bias_sums != nullptr) {
        double* const total = bias_sums + ceil_div(k, L) * L;
        int64_t x = 0;
        for (; x + 4 <= F::H::out * columns; x += 4) add_in_double<T>(sum_of_four(band + x * L, L), total);
        for (; x < F::H::out * columns; ++x) add_in_double<T>(load(band + x * L), total);
      }
      for (int64_t t = 0; t < run.count; ++t)
        transform_tile<F, false>(band + t * F::W::out * L, columns * L, to + place(t) * row + k, position_stride);
    });
  });
}

// Sums run over up to `block` tiles in registers, then from block to block in U; in slices over half as many, whose V and D stay
// in L2.
inline constexpr int64_t block = 96, slice_block = 48;
inline constexpr int64_t slices_bytes = int64_t(10) << 20;  // of the sums of all slices: four times 128 x 128 filters
inline constexpr int64_t part_channels = 16 * mr;
inline constexpr int64_t sum_bytes = int64_t(40) << 20;  // of U: more is computed in parts of the filters

struct Accumulated {
  bool finite = true, bias = true;  // whether grad_weight is finite, and grad_bias was added up
};

// grad_weight of K filters of C channels, in the layout wanted, and grad_bias, unless null, where the tiles are summed in slices.
template <class F, class T, class Source>
Accumulated accumulate_grad_weight(int64_t N, int64_t C, int64_t K, const Tiling& tiling, const Source& x,
                                   const Images<const T>& dy, T* grad_weight, Layout wanted, T* grad_bias) {
  constexpr int64_t positions = F::positions, taps = F::taps;
  const int64_t tiles = N * tiling.per_image(), panels = ceil_div(K, nr<T>), V_channels = std::max(C, kLanes<T>);
  const int64_t V_row = padded_stride<T>(V_channels), D_row = padded_stride<T>(panels * nr<T>);

  // U of channels c_begin ... c_end - 1 and panels panel_begin ... panel_end - 1: U + xi position + ((panel - panel_begin) rows +
  // (c - c_begin)) nr.
  struct Part {
    int64_t c_begin, c_end, panel_begin, panel_end, rows, position;
  };
  const auto multiply = [&](const Part& part, int64_t xi_begin, int64_t xi_end, const T* V, int64_t V_position, const T* D,
                            int64_t D_position, const Places& places, bool in_L2, bool accumulate, T* U) {
    // V and D of one position and some tiles. Both are read in strips, which look like no stream: the sums that a strip goes on
    // with are asked for just before it and, where V and D are not in L2 anyway, the next block while one is multiplied.
    struct Block {
      const T *V, *D;
      int64_t tiles;
    };
    const int64_t channels = part.c_end - part.c_begin, part_panels = part.panel_end - part.panel_begin;
    const int64_t strips = ceil_div(channels, mr) * part_panels;
    const auto blocks_of = [&](const Places::Range& range) {  // where no tile needs the position, one of no tiles
      return std::max<int64_t>(1, ceil_div(range.end - range.begin, block));
    };
    const auto block_at = [&](int64_t xi, int64_t index) {
      if (xi == positions) return Block{V, D, 0};
      const Places::Range range = places.needing<F>(xi);
      const int64_t count = range.end - range.begin, blocks = blocks_of(range);
      const int64_t begin = range.begin + index * count / blocks, end = range.begin + (index + 1) * count / blocks;
      return Block{V + xi * V_position + begin * V_row + part.c_begin,
                   D + xi * D_position + begin * D_row + part.panel_begin * nr<T>, end - begin};
    };
    for (int64_t xi = xi_begin; xi < xi_end; ++xi) {
      const int64_t blocks = blocks_of(places.needing<F>(xi));
      for (int64_t index = 0; index < blocks; ++index) {
        const Block now = block_at(xi, index), next = index + 1 < blocks ? block_at(xi, index + 1) : block_at(xi + 1, 0);
        const bool goes_on = accumulate || index > 0;
        int64_t strip = 0, asked_for = 0;
        for (int64_t panel = 0; panel < part_panels; ++panel) {
          for (int64_t c = 0; c < channels; c += mr) {
            for (++strip; !in_L2 && asked_for * strips < strip * next.tiles; ++asked_for) {
              gemm::prefetch(next.V + asked_for * V_row, channels);
              gemm::prefetch(next.D + asked_for * D_row, part_panels * nr<T>);
            }
            T* to = U + xi * part.position + (panel * part.rows + c) * nr<T>;
            for (int64_t e = 0; goes_on && e < mr * nr<T>; e += 64 / int64_t(sizeof(T))) __builtin_prefetch(to + e, 1);
            multiply_rows<false>(std::min(mr, channels - c), now.tiles, now.V + c, V_row, now.D + panel * nr<T>, D_row, goes_on,
                                 to, nr<T>);
          }
        }
      }
    }
  };
  unsigned char not_finite = 0;
  const auto finish = [&](const Part& part, const T* U) {
    constexpr int64_t L = kLanes<T>, row = together_row<T, F::taps>;
    alignas(64) T together[std::max(L * row, line_channels<T> * taps * L)];
    bool finite = true;
    for (int64_t panel = part.panel_begin; panel < part.panel_end; ++panel) {
      for (int64_t k = panel * nr<T>; k < std::min(K, (panel + 1) * nr<T>); k += L) {
        Vec<T> zero{};
        const auto value = [&](int64_t c) {
          return U + ((panel - part.panel_begin) * part.rows + (c - part.c_begin)) * nr<T> + (k - panel * nr<T>);
        };
        for (int64_t c = part.c_begin; wanted == Layout::channels_last && c < part.c_end; c += line_channels<T>) {
          const int64_t channels = std::min(line_channels<T>, part.c_end - c);
          for (int64_t i = 0; i < channels; ++i)  // [channel][tap][filter]
            transform_grad_weight_lanes<F>(value(c + i), part.position, together + i * taps * L, zero);
          const implicit_gemm::Finish<T> as_it_is{nullptr, L, false};
          for (int64_t t = 0; t < taps; ++t)
            gemm::unpack_transposed<T>([&](int64_t i) { return together + (i * taps + t) * L; }, std::min(L, K - k), channels,
                                       grad_weight + (k * taps + t) * C + c, taps * C, as_it_is);
        }
        for (int64_t c = wanted == Layout::nchw ? part.c_begin : part.c_end; c < part.c_end; c += channels_together) {
          const int64_t channels = std::min(channels_together, part.c_end - c);
          for (int64_t i = 0; i < channels; ++i)
            transform_grad_weight_tile<F>(value(c + i), part.position, together + i * taps, row, zero);
          for (int64_t lane = 0; lane < std::min(L, K - k); ++lane)
            implicit_gemm::copy_row(together + lane * row, channels * taps, grad_weight + ((k + lane) * C + c) * taps);
        }
        for (int64_t lane = 0; lane < std::min(L, K - k); ++lane) finite &= zero[lane] == T(0);
      }
    }
    if (!finite) __atomic_store_n(&not_finite, 1, __ATOMIC_RELAXED);
  };

  const int64_t all_rows = ceil_div(C, mr) * mr, U_position = panels * all_rows * nr<T> + 16, U_size = positions * U_position;
  const Part whole{0, C, 0, panels, all_rows, U_position};
  // Adds the slices of the sums, in order, and finishes them.
  const auto finish_all = [&](T* partial, int64_t slices) {
    constexpr int64_t some = 4 * channels_together;
    const int64_t c_parts = ceil_div(C, some);
    parallel_for(panels * c_parts, some * nr<T> * positions * slices / kLanes<T>, [&](int64_t part) {
      const int64_t panel = part / c_parts, c = part % c_parts * some, channels = std::min(some, C - c);
      T* U = partial + (panel * all_rows + c) * nr<T>;
      for (int64_t xi = 0; xi < positions; ++xi) {
        T* sum = U + xi * U_position;
        for (int64_t slice = 1; slice < slices; ++slice)
          for (int64_t e = 0; e < channels * nr<T>; e += kLanes<T>)
            store(sum + e, load(sum + e) + load(sum + slice * U_size + e));
      }
      finish({c, c + channels, panel, panel + 1, all_rows, U_position}, U);
    });
  };

  // A small U: slices of the tiles, each with a U of its own, so that a thread uses the tiles that it transformed itself, from
  // its own caches. How many is decided by the sizes alone: a power of two, which threads share evenly.
  const int64_t fitting = std::min({int64_t(8), tiles / block, slices_bytes / (U_size * int64_t(sizeof(T)))});
  const int64_t slices = fitting >= 8 ? 8 : fitting >= 4 ? 4 : fitting >= 2 ? 2 : 1;
  if (slices > 1) {
    T* partial = workspace<T>(Slot::partial_sums, slices * U_size);
    const int64_t bias_size = ceil_div(K, kLanes<T>) * kLanes<T>;
    double* bias_sums = grad_bias == nullptr ? nullptr : workspace<double>(Slot::bias_sums, slices * bias_size);
    if (grad_bias != nullptr) fill(bias_sums, slices * bias_size, 0.0);
    parallel_for(slices, tiles / slices * positions * C * panels, [&](int64_t slice) {
      const int64_t begin = slice * tiles / slices, end = (slice + 1) * tiles / slices;
      for (int64_t tile = begin; tile < end; tile += slice_block) {
        const int64_t count = std::min(slice_block, end - tile), V_position = count * V_row + 16, D_position = count * D_row + 16;
        const Places places(tiling, tile, tile + count);
        T* V = workspace<T>(Slot::patches, positions * (V_position + D_position));
        T* D = V + positions * V_position;
        transform_inputs<F>(x, tiling, V_channels, tile, tile + count, places, V, V_row, V_position);
        transform_grad_outputs<F>(dy, tiling, K, tile, tile + count, places, D, D_row, D_position,
                                  grad_bias == nullptr ? nullptr : bias_sums + slice * bias_size);
        multiply(whole, 0, positions, V, V_position, D, D_position, places, true, tile > begin, partial + slice * U_size);
      }
    });
    finish_all(partial, slices);
    for (int64_t k = 0; grad_bias != nullptr && k < K; ++k) {
      const int64_t v = k / kLanes<T>, lane = k - std::min(v * kLanes<T>, K - kLanes<T>);
      double sum = 0;
      for (int64_t slice = 0; slice < slices; ++slice) sum += bias_sums[slice * bias_size + v * kLanes<T> + lane];
      grad_bias[k] = static_cast<T>(sum);
    }
    return {not_finite == 0, true};
  }

  // All of V and D where they are small; else a chunk at a time.
  const int64_t tile_bytes = positions * (V_row + D_row) * int64_t(sizeof(T));
  const int64_t largest = std::max(block, resident_bytes / 4 / tile_bytes);
  const int64_t chunks = tiles * tile_bytes <= resident_bytes ? 1 : std::max<int64_t>(1, (tiles + largest / 2) / largest),
                chunk = ceil_div(tiles, chunks);
  T* U = chunks > 1 ? workspace<T>(Slot::partial_sums, U_size) : nullptr;
  for (int64_t chunk_begin = 0; chunk_begin < tiles; chunk_begin += chunk) {
    const int64_t count = std::min(tiles - chunk_begin, chunk), V_position = count * V_row + 16, D_position = count * D_row + 16;
    const Places places(tiling, chunk_begin, chunk_begin + count);
    T* V = workspace<T>(Slot::patches, positions * (V_position + D_position));
    T* D = V + positions * V_position;
    const int64_t runs = ceil_div(count, max_run<F>);
    parallel_for(runs, max_run<F> * (C + K) / kLanes<T> * positions * 8, [&](int64_t index) {
      const int64_t begin = chunk_begin + index * max_run<F>, end = std::min(chunk_begin + count, begin + max_run<F>);
      transform_inputs<F>(x, tiling, V_channels, begin, end, places, V, V_row, V_position);
      transform_grad_outputs<F>(dy, tiling, K, begin, end, places, D, D_row, D_position, nullptr);
    });

    if (chunks > 1) {  // each thread takes some of the positions, of which nothing is needed for the others
      const int64_t groups = std::min(panels, ceil_div(4 * thread_count(), positions));
      parallel_for(positions * groups, count * C * panels * 2 / groups, [&](int64_t task) {
        const int64_t xi = task / groups, group_of_panels = task % groups;
        Part part = whole;
        part.panel_begin = group_of_panels * panels / groups, part.panel_end = (group_of_panels + 1) * panels / groups;
        multiply(part, xi, xi + 1, V, V_position, D, D_position, places, false, chunk_begin > 0,
                 U + part.panel_begin * all_rows * nr<T>);
      });
      continue;
    }
    // Of a single chunk: parts of U that stay in L2 until they are finished.
    const int64_t c_parts = parts_of(ceil_div(C, mr), part_channels / mr), k_parts = ceil_div(panels, max_filters<T> / nr<T>);
    const int64_t c_part = ceil_div(ceil_div(C, mr), c_parts) * mr, k_part = ceil_div(panels, k_parts);
    parallel_for(c_parts * k_parts, count * positions * c_part * k_part, [&](int64_t index) {
      const int64_t c = index % c_parts * c_part, panel = index / c_parts * k_part, position = k_part * c_part * nr<T> + 16;
      const Part part{c, std::min(C, c + c_part), panel, std::min(panels, panel + k_part), c_part, position};
      if (part.c_begin >= part.c_end || part.panel_begin >= part.panel_end) return;
      T* part_of_U = workspace<T>(Slot::packed_weight, positions * position);
      multiply(part, 0, positions, V, V_position, D, D_position, places, false, false, part_of_U);
      finish(part, part_of_U);
    });
  }
  if (chunks > 1) finish_all(U, 1);
  return {not_finite == 0, false};
}

// Calls accumulate(group, first_k, filters) for the filters of every group, so many at a time that U has at most sum_bytes.
template <class F, class T, class Accumulate>
Accumulated accumulate_groups(int64_t groups, int64_t C, int64_t K, const Accumulate& accumulate) {
  const int64_t parts = std::min(ceil_div(F::positions * C * K * int64_t(sizeof(T)), sum_bytes), full_panels<T>(K));
  Accumulated all;
  for (int64_t group = 0; group < groups; ++group) {
    for (int64_t part = 0; part < parts; ++part) {
      const Panels of = panels_of<T>(part, parts, K);
      const int64_t first = of.begin * nr<T>;
      const Accumulated some = accumulate(group, group * K + first, std::min(K, of.end * nr<T>) - first);
      all.finite &= some.finite, all.bias &= some.bias;
    }
  }
  return all;
}

// By implicit GEMM, which writes NCHW.
template <class T>
void grad_weight_once_more(const Conv2dGeometry& g, const T* grad_output, const T* input, T* grad_weight) {
  if (g.weight_layout == Layout::nchw) return implicit_gemm::conv2d_grad_weight<T>(g, grad_output, input, grad_weight, nullptr);
  T* const from = workspace<T>(Slot::weight_copy, g.K * g.weight_strides().n);
  implicit_gemm::conv2d_grad_weight<T>(g, grad_output, input, from, nullptr);
  for_each_weight(g, [&](int64_t place, int64_t in_nchw) { grad_weight[place] = from[in_nchw]; });
}

// Of the bias too, where grad_bias is not null and this returns true.
template <class F, class T>
bool conv2d_grad_weight(const Conv2dGeometry& g, const T* grad_output, const T* input, T* grad_weight, T* grad_bias) {
  const int64_t C = g.C_per_group(), K = g.K_per_group(), taps = g.R * g.S;
  const Tiling tiling{output_axis<typename F::H>(g.P, g.dilation_h, g.pad_h),
                      output_axis<typename F::W>(g.Q, g.dilation_w, g.pad_w)};
  const Strides in = g.input_strides(), out = g.output_strides();
  const Accumulated done = accumulate_groups<F, T>(g.G, C, K, [&](int64_t group, int64_t k, int64_t filters) {
    const Images<const T> x{input + group * C * in.c, g.H, g.W, in, g.layout, g.dilation_h, g.dilation_w};
    const Images<const T> dy{grad_output + k * out.c, g.P, g.Q, out, g.layout, g.dilation_h, g.dilation_w};
    return accumulate_grad_weight<F>(g.N, C, filters, tiling, x, dy, grad_weight + k * C * taps, g.weight_layout,
                                     grad_bias == nullptr ? nullptr : grad_bias + k);
  });
  if (!done.finite) grad_weight_once_more(g, grad_output, input, grad_weight);
  return done.bias;
}

// For strides above 1, as conv2d_forward_of_phases.
template <class F, class T>
bool conv2d_grad_weight_of_phases(const Conv2dGeometry& g, const T* grad_output, const T* input, T* grad_weight, T* grad_bias) {
  const int64_t K = g.K_per_group(), C = g.C_per_group() * g.stride_h * g.stride_w;
  const Tiling tiling{output_axis<typename F::H>(g.P, 1, 0), output_axis<typename F::W>(g.Q, 1, 0)};
  const Strides out = g.output_strides();
  T* const of_phases = workspace<T>(Slot::filter_rows, g.K * C * F::taps);
  const Accumulated done = accumulate_groups<F, T>(g.G, C, K, [&](int64_t group, int64_t k, int64_t filters) {
    const Images<const T> dy{grad_output + k * out.c, g.P, g.Q, out, g.layout, 1, 1};
    return accumulate_grad_weight<F>(g.N, C, filters, tiling, phase_images(g, input, group), dy, of_phases + k * C * F::taps,
                                     Layout::nchw, grad_bias == nullptr ? nullptr : grad_bias + k);
  });
  if (done.finite)
    for_each_tap_of_phases<F>(g, [&](int64_t of_weight, int64_t of_phase) { grad_weight[of_weight] = of_phases[of_phase]; });
  else
    grad_weight_once_more(g, grad_output, input, grad_weight);
  return done.bias;
}

}  // namespace torchcnn::TORCHCNN_ISA::winograd
