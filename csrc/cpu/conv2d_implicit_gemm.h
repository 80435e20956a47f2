// Convolution of any geometry as matrix products, without a patch matrix: the GEMM core reads the elements of a patch where they
// lie ("indirect convolution", Dukhan 2019).
//
// Forward and grad_input are one correlation over taps t = (row_t, column_t), with x = (n, i, j) as the rows of the product:
//
//   result[x][k] = sum_{c,t} A(x, (c,t)) B((c,t), k)     A = source[n, c, i step_h + row_t, j step_w + column_t], 0 outside
//   forward      source = input, k the filters, step = stride
//   grad_input   source = grad_output, k the input channels, step = 1, one correlation for each phase (h mod stride_h,
//                w mod stride_w) of the input: only taps with (h + pad_h - r dilation_h) divisible by stride_h reach it
//
// grad_weight stands in conv2d_implicit_gemm_grad_weight.h, what a product reads of the source in conv2d_windows.h.
//
// The positions fall into regions that meet the same taps; those in the padding are left out, where regions are large enough. A
// is read from the source itself, or from a copy of a window of it with the padding written out. The address of A(x, (c,t)) is a
// sum of two table entries, position[x] + patch[(c,t)], for every stride, dilation, group and layout. B is packed
// [k / nr][(c,t)][k % nr] in blocks of channels (SumOrder).
#pragma once

#include <algorithm>
#include <cstdint>

#include "../geometry.h"
#include "conv2d_gemm.h"
#include "conv2d_windows.h"
#include "runtime.h"
#include "simd.h"

namespace torchcnn::TORCHCNN_ISA::implicit_gemm {

using gemm::max_depth;
using gemm::mr;
using gemm::nr;

// Positions computed together: 320 rows of 16 floats of the result (20 KiB) stay in L1 beside a panel of weights.
inline constexpr int64_t block_positions = 320;
// So many panels of weights pass by so many positions before the next: what a position reads lies far apart and should come to L1
// once, while panels are read in order and come from L2 fast enough.
inline constexpr int64_t panels_together = 8, positions_together = 8 * mr;

// The order of the sum over channels and taps: blocks of channels, in each tap by tap. The taps that a position meets are then
// few stretches of it, and a block of the packed weights stays in L1.
struct SumOrder {
  int64_t channels, taps, block;
  int64_t width(int64_t c_begin) const { return std::min(block, channels - c_begin); }
  int64_t at(int64_t c, int64_t t) const {
    const int64_t begin = c / block * block;
    return begin * taps + t * width(begin) + c - begin;
  }
  // Calls visit(place, c, t) for all of it, in order.
  template <class Visit>
  void for_each(Visit visit) const {
    int64_t place = 0;
    for (int64_t begin = 0; begin < channels; begin += block)
      for (int64_t t = 0; t < taps; ++t)
        for (int64_t c = begin; c < begin + width(begin); ++c) visit(place++, c, t);
  }
};

// most_taps: of any position.
template <class T>
SumOrder sum_order(int64_t channels, int64_t taps, int64_t most_taps) {
  const int64_t block = std::clamp<int64_t>(max_depth<T> / std::max<int64_t>(most_taps, 1), 1, channels);
  return {channels, taps, ceil_div(channels, ceil_div(channels, block))};
}

// Small planes are taken several images at a time, large ones some rows at a time.
struct Blocks {
  int64_t images, rows, along_n, along_rows;
  int64_t count() const { return along_n * along_rows; }
};
inline Blocks blocks_of(int64_t N, int64_t rows, int64_t columns, int64_t block_positions) {
  const int64_t block_rows = ceil_div(rows, ceil_div(rows, std::clamp<int64_t>(block_positions / columns, 1, rows)));
  const int64_t images = block_rows < rows ? 1 : std::clamp<int64_t>(block_positions / (rows * columns), 1, N);
  return {images, block_rows, ceil_div(N, images), ceil_div(rows, block_rows)};
}

template <class T>
struct Correlation {
  int64_t N, groups, channels, filters;  // channels and filters of one group
  Layout layout;
  View<const T> source;
  View<T> result;
  int64_t step_h, step_w;      // in the source, from one position to the next
  int64_t phases_h, phases_w;  // result row h belongs to phase row h % phases_h
  const Tap* taps;             // by phase
  const Phase* phases;
  int64_t tap_count;
};

// Positions begin ... end - 1 along an axis meet taps first ... first + taps - 1 of it: the others fall into the padding.
struct Interval {
  int64_t begin, end, first, taps;
};

// Tap t of position x is at x step + offset_of(t), which rises or falls with t.
template <class OffsetOf>
int64_t intervals_of(int64_t positions, int64_t step, int64_t size, int64_t taps, OffsetOf offset_of, Interval* to) {
  int64_t count = 0;
  for (int64_t x = 0; x < positions; ++x) {
    const auto outside = [&](int64_t t) { return x * step + offset_of(t) < 0 || x * step + offset_of(t) >= size; };
    int64_t first = 0, last = taps;
    while (first < last && outside(first)) ++first;
    while (first < last && outside(last - 1)) --last;
    if (count > 0 && to[count - 1].first == first && to[count - 1].taps == last - first)
      to[count - 1].end = x + 1;
    else
      to[count++] = {x, x + 1, first, last - first};
  }
  return count;
}

// A rectangle of the positions of a phase, and the taps that they meet.
struct Region {
  int64_t phase, first_tap, row_taps;  // of the phase; row_taps: in a row of the filter
  Interval h, w;
};
struct Regions {
  const Region* data;
  int64_t count;
  bool inside;  // no position of any meets a tap in the padding
};

// So many positions a region are worth the taps that they leave out; else a phase is one region, which reads zeros.
inline constexpr int64_t region_positions = 2 * mr;

template <class T>
Regions regions_of(const Correlation<T>& p) {
  const int64_t phases = p.phases_h * p.phases_w;
  const auto row_taps = [&](const Phase& phase) {
    int64_t count = 0;
    while (count < phase.taps && p.taps[phase.first_tap + count].row == p.taps[phase.first_tap].row) ++count;
    return count;
  };
  // Along an axis each tap begins and ends to be met once.
  int64_t bound = 0;
  for (int64_t f = 0; f < phases; ++f) {
    const Phase& phase = p.phases[f];
    const int64_t columns = row_taps(phase), rows = columns == 0 ? 0 : phase.taps / columns;
    bound += std::min(phase.rows, 2 * rows + 1) * std::min(phase.columns, 2 * columns + 1);
  }
  Region* region = workspace<Region>(Slot::regions, bound);
  Interval* h = workspace<Interval>(Slot::runs, p.phases[0].rows + p.phases[0].columns);
  Interval* w = h + p.phases[0].rows;
  Regions regions{region, 0, true};
  for (int64_t f = 0; f < phases; ++f) {
    const Phase& phase = p.phases[f];
    const Tap* tap = p.taps + phase.first_tap;
    const int64_t columns = row_taps(phase), rows = columns == 0 ? 0 : phase.taps / columns;
    int64_t along_h = intervals_of(phase.rows, p.step_h, p.source.rows, rows, [&](int64_t t) { return tap[t * columns].row; }, h);
    int64_t along_w =
        intervals_of(phase.columns, p.step_w, p.source.columns, columns, [&](int64_t t) { return tap[t].column; }, w);
    if (along_h * along_w > 1 && phase.rows * phase.columns < along_h * along_w * region_positions) {
      along_h = along_w = 1;
      h[0] = {0, phase.rows, 0, rows}, w[0] = {0, phase.columns, 0, columns};
      regions.inside = false;
    }
    for (int64_t a = 0; a < along_h; ++a)
      for (int64_t b = 0; b < along_w; ++b) region[regions.count++] = {f, phase.first_tap, columns, h[a], w[b]};
  }
  return regions;
}

// The runs that the positions of a region sum up, of the channels from c on and of some rows of the filter.
inline int64_t fill_runs(const Region& region, const SumOrder& order, int64_t c, int64_t first_row, int64_t rows, gemm::Run* to) {
  const int64_t width = order.width(c), row_size = region.row_taps * width, size = region.w.taps * width;
  const int64_t first = c * order.taps + (region.first_tap + first_row * region.row_taps + region.w.first) * width;
  if (size == row_size) return gemm::cut_into_runs(first, rows * size, to);
  int64_t count = 0;
  for (int64_t r = 0; r < rows; ++r) count += gemm::cut_into_runs(first + r * row_size, size, to + count);
  return count;
}

// Adds the bias, rectifies.
template <class T>
struct Finish {
  const T* bias;  // of the panel's first filter
  int64_t lanes;
  bool relu;
  Vec<T> operator()(Vec<T> v, int64_t first) const {
    if (bias != nullptr) v += first + kLanes<T> <= lanes ? load(bias + first) : load_partial(bias + first, lanes - first);
    return relu ? rectified<T>(v) : v;
  }
};

// Runs the correlation with packed weights [group][panel][SumOrder][nr].
template <class T>
void correlate(const Correlation<T>& p, const SumOrder& order, const T* packed_weight, const Epilogue<T>& epilogue) {
  const Phase& largest = p.phases[0];
  const int64_t phases = p.phases_h * p.phases_w, patch_size = p.channels * p.tap_count;
  const int64_t panels = ceil_div(p.filters, nr<T>);
  const Blocks blocks = blocks_of(p.N, largest.rows, largest.columns * phases, block_positions);
  const Regions regions = regions_of(p);
  const Window w = window_of(p.taps, p.tap_count, p.source.strides, p.source.rows, p.source.columns, p.channels, blocks.rows,
                             largest.rows, largest.columns, p.step_h, p.step_w, p.layout, sizeof(T), regions.inside);
  const int64_t row_step = p.step_h / w.step_h * w.strides.h, column_step = p.step_w / w.step_w * w.strides.w;
  int64_t* patch = workspace<int64_t>(Slot::offsets, patch_size);
  order.for_each([&](int64_t place, int64_t c, int64_t t) {
    const Tap& tap = p.taps[t];
    patch[place] = (tap.row - w.first_row) * w.strides.h + (tap.column - w.first_column) * w.strides.w + c * w.strides.c;
  });

  // A task takes a block through all panels of all groups, or some of them where there are few blocks.
  const int64_t all_panels = p.groups * panels;
  const int64_t parts =
      blocks.count() < 4 * thread_count() ? std::min(all_panels, ceil_div(4 * thread_count(), blocks.count())) : 1;
  const int64_t part_panels = ceil_div(all_panels, parts);
  const int64_t positions_bound = blocks.images * blocks.rows * largest.columns * phases;
  parallel_for(blocks.count() * parts, positions_bound * patch_size / phases * part_panels * 2, [&](int64_t task) {
    const int64_t begin = task % parts * part_panels, end = std::min(all_panels, begin + part_panels), block = task / parts;
    const int64_t n = block / blocks.along_rows * blocks.images, images = std::min(blocks.images, p.N - n);
    const int64_t i_begin = block % blocks.along_rows * blocks.rows, i_end = i_begin + blocks.rows;
    const int64_t h_begin = i_begin * p.phases_h,
                  image_size = (std::min(p.result.rows, i_end * p.phases_h) - h_begin) * p.result.columns;
    if (begin >= end) return;

    // For each region: where its positions read and, in the same order, the rows of `tile` that they fill. For each element of
    // the result, in its order: its row of `tile`.
    int64_t* position = workspace<int64_t>(Slot::positions, 2 * positions_bound + regions.count + 1);
    int64_t* tile_row = position + positions_bound;
    int64_t* first_position = tile_row + positions_bound;
    int64_t count = 0;
    for (int64_t f = 0; f < regions.count; ++f) {
      const Region& region = regions.data[f];
      const int64_t h = region.phase / p.phases_w - h_begin, column = region.phase % p.phases_w;
      first_position[f] = count;
      for (int64_t image = 0; image < images; ++image)
        for (int64_t i = std::max(region.h.begin, i_begin); i < std::min(region.h.end, i_end); ++i) {
          const int64_t from = image * w.strides.n + (i - i_begin) * row_step;
          int64_t* row = tile_row + image * image_size + (i * p.phases_h + h) * p.result.columns + column;
          for (int64_t j = region.w.begin; j < region.w.end; ++j) {
            row[j * p.phases_w] = count;
            position[count++] = from + j * column_step;
          }
        }
    }
    first_position[regions.count] = count;
    gemm::Run* runs = workspace<gemm::Run>(Slot::runs, p.tap_count * (order.block / gemm::max_run + 2));
    T* tiles = workspace<T>(Slot::tile, count * panels_together * nr<T>);

    const T* window = nullptr;
    for (int64_t next = begin, set_end = 0; next < end; next = next / panels * panels + set_end) {
      const int64_t group = next / panels, set = next - group * panels;
      set_end = std::min({panels, set + panels_together, end - group * panels});
      if (next == begin || set == 0)
        window = read_window(p.source, w, n, images, group * p.channels, p.channels, i_begin * p.step_h, p.layout);
      const auto lanes_of = [&](int64_t panel) { return std::min(nr<T>, p.filters - panel * nr<T>); };
      const auto filter_of = [&](int64_t panel) { return group * p.filters + panel * nr<T>; };
      const auto bias_of = [&](int64_t panel) { return epilogue.bias == nullptr ? nullptr : epilogue.bias + filter_of(panel); };
      // Where the positions of a block follow each other in the result, and the filters too, it is the tile.
      const auto direct = [&](int64_t panel) {
        return p.layout == Layout::channels_last && regions.count == 1 && lanes_of(panel) % kLanes<T> == 0;
      };
      const auto rows_of = [&](int64_t panel) {
        return direct(panel) ? p.result.data + n * p.result.strides.n + h_begin * p.result.strides.h + filter_of(panel)
                             : tiles + (panel - set) * count * nr<T>;
      };
      for (int64_t f = 0; f < regions.count; ++f) {
        const Region& region = regions.data[f];
        // The sum is cut into blocks of channels and, if one is still too long, some rows of the filter.
        const int64_t row_depth = order.block * region.row_taps,
                      most_rows = std::max<int64_t>(1, max_depth<T> / std::max<int64_t>(1, row_depth));
        const int64_t row_parts = std::max<int64_t>(1, ceil_div(region.h.taps, most_rows)),
                      filter_rows = ceil_div(region.h.taps, row_parts);
        const int64_t depths = region.h.taps * region.w.taps == 0 ? 1 : row_parts * ceil_div(p.channels, order.block);
        for (int64_t d = 0; d < depths; ++d) {
          const int64_t first_row = d % row_parts * filter_rows, rows = std::min(filter_rows, region.h.taps - first_row);
          const int64_t run_count = fill_runs(region, order, d / row_parts * order.block, region.h.first + first_row, rows, runs);
          for (int64_t x_begin = first_position[f]; x_begin < first_position[f + 1]; x_begin += positions_together) {
            const int64_t x_end = std::min(first_position[f + 1], x_begin + positions_together);
            for (int64_t panel = set; panel < set_end; ++panel) {
              const bool narrow = lanes_of(panel) <= kLanes<T>;
              const int64_t row_size = direct(panel) ? p.result.strides.w : nr<T>;
              const gemm::Ends<T> ends{direct(panel) && d == 0 ? bias_of(panel) : nullptr, d > 0,
                                       direct(panel) && epilogue.relu && d + 1 == depths};
              const T* weight = packed_weight + (group * panels + panel) * patch_size * nr<T>;
              T* rows_at = rows_of(panel);
              const auto multiply = [&]<int count, int vectors>(int64_t x) {
                gemm::IndirectA<T, count> a{{}, patch};
                for (int m = 0; m < count; ++m) a.row[m] = window + position[x + m];
                gemm::tile_product<T, count, vectors>(runs, run_count, a, weight, rows_at + x * row_size, row_size, ends);
              };
              for (int64_t x = x_begin, rows = 0; x < x_end; x += rows) {
                rows = gemm::tile_rows(x_end - x, narrow ? gemm::narrow_mr : mr);
                if (narrow)
                  gemm::with_rows<gemm::narrow_mr>(rows, [&](auto m) { multiply.template operator()<m, 1>(x); });
                else
                  gemm::with_rows<mr>(rows, [&](auto m) { multiply.template operator()<m, 2>(x); });
              }
            }
          }
        }
      }

      for (int64_t panel = set; panel < set_end; ++panel) {
        if (direct(panel)) continue;
        const T* tile = rows_of(panel);
        const int64_t lanes = lanes_of(panel), filter = filter_of(panel);
        const Finish<T> finish{bias_of(panel), lanes, epilogue.relu};
        const Strides& s = p.result.strides;
        for (int64_t image = 0; image < images; ++image) {
          T* to = p.result.data + (n + image) * s.n + filter * s.c + h_begin * s.h;
          const auto row_of = [&](int64_t x) { return tile + tile_row[image * image_size + x] * nr<T>; };
          if (p.layout == Layout::nchw) {
            gemm::unpack_transposed<T>(row_of, lanes, image_size, to, s.c, finish);
            continue;
          }
          for (int64_t x = 0; x < image_size; ++x)
            for (int64_t first = 0; first < lanes; first += kLanes<T>)
              store_partial(to + x * s.w + first, finish(load(row_of(x) + first), first), lanes - first);
        }
      }
    }
  });
}

template <class T>
void conv2d_forward(const Conv2dGeometry& g, const T* input, const T* weight, const Epilogue<T>& epilogue, T* output) {
  const int64_t taps_count = g.R * g.S, C = g.C_per_group(), K = g.K_per_group();
  const int64_t patch_size = C * taps_count, panels = ceil_div(K, nr<T>);
  Tap* taps = workspace<Tap>(Slot::tables, taps_count);
  input_taps(g, taps);
  const Phase phase{0, taps_count, g.P, g.Q};

  const SumOrder order = sum_order<T>(C, taps_count, taps_count);
  T* packed_weight = workspace<T>(Slot::packed_weight, g.G * panels * patch_size * nr<T>);
  int64_t* place_of = workspace<int64_t>(Slot::positions, patch_size);
  order.for_each([&](int64_t place, int64_t c, int64_t t) { place_of[c * taps_count + t] = place; });
  parallel_for(g.G * panels, patch_size * 2, [&](int64_t task) {
    const int64_t group = task / panels, panel = task % panels, lanes = std::min(nr<T>, K - panel * nr<T>);
    const T* from = weight + (group * K + panel * nr<T>)*patch_size;
    gemm::pack_transposed(from, patch_size, lanes, patch_size, packed_weight + task * patch_size * nr<T>,
                          [&](int64_t x) { return place_of[x]; });
  });
  correlate<T>({g.N,
                g.G,
                C,
                K,
                g.layout,
                {input, g.input_strides(), g.H, g.W},
                {output, g.output_strides(), g.P, g.Q},
                g.stride_h,
                g.stride_w,
                1,
                1,
                taps,
                &phase,
                taps_count},
               order, packed_weight, epilogue);
}

// The phases (h mod stride_h, w mod stride_w) of the input and the taps by which grad_output reaches each. The first tap exists
// even if there is none.
struct InputPhases {
  int64_t along_h, along_w;
  const Phase* data;
  const Tap* taps;
  int64_t tap_count;
  int64_t count() const { return along_h * along_w; }
};

inline InputPhases input_phases(const Conv2dGeometry& g) {
  const int64_t along_h = std::min(g.stride_h, g.H), along_w = std::min(g.stride_w, g.W);
  Tap* taps = workspace<Tap>(Slot::tables, g.R * g.S + 1);
  Phase* phases = workspace<Phase>(Slot::phases, along_h * along_w);
  taps[0] = {0, 0, 0};
  int64_t tap_count = 0;
  for (int64_t f = 0; f < along_h * along_w; ++f) {
    const int64_t h = f / along_w, w = f % along_w;
    phases[f] = {tap_count, 0, ceil_div(g.H - h, g.stride_h), ceil_div(g.W - w, g.stride_w)};
    for (int64_t r = 0; r < g.R; ++r) {
      const int64_t row = h + g.pad_h - r * g.dilation_h;
      if (row % g.stride_h != 0) continue;
      for (int64_t s = 0; s < g.S; ++s) {
        const int64_t column = w + g.pad_w - s * g.dilation_w;
        if (column % g.stride_w == 0) taps[tap_count++] = {row / g.stride_h, column / g.stride_w, r * g.S + s};
      }
    }
    phases[f].taps = tap_count - phases[f].first_tap;
  }
  return {along_h, along_w, phases, taps, tap_count};
}

template <class T>
void conv2d_grad_input(const Conv2dGeometry& g, const T* grad_output, const T* weight, T* grad_input) {
  const int64_t taps_count = g.R * g.S, C = g.C_per_group(), K = g.K_per_group();
  const InputPhases p = input_phases(g);
  const int64_t patch_size = K * p.tap_count, panels = ceil_div(C, nr<T>);
  int64_t most_taps = 0;
  for (int64_t f = 0; f < p.count(); ++f) most_taps = std::max(most_taps, p.data[f].taps);
  const SumOrder order = sum_order<T>(K, p.tap_count, most_taps);
  T* packed_weight = workspace<T>(Slot::packed_weight, g.G * panels * patch_size * nr<T>);
  int64_t* tap_of = workspace<int64_t>(Slot::positions, taps_count);  // of element r S + s of a filter; -1: it meets nothing
  std::fill(tap_of, tap_of + taps_count, -1);
  for (int64_t t = 0; t < p.tap_count; ++t) tap_of[p.taps[t].weight] = t;
  parallel_for(g.G * panels, patch_size * 2, [&](int64_t task) {
    const int64_t group = task / panels, c = task % panels * nr<T>, lanes = std::min(nr<T>, C - c);
    T* to = packed_weight + task * patch_size * nr<T>;
    if (taps_count == 1 && p.tap_count == 1) {  // in the order of k. Rows lie pages apart, which the processor does not guess.
      const T* from = weight + group * K * C + c;
      for (int64_t k = 0; k < K; ++k, from += C, to += nr<T>) {
        __builtin_prefetch(from + 16 * C, 0, 2);
        copy_row(from, lanes, to);
        for (int64_t lane = lanes; lane < nr<T>; ++lane) to[lane] = T(0);
      }
      return;
    }
    for (int64_t k = 0; k < K; ++k) {
      const T* from = weight + ((group * K + k) * C + c) * taps_count;
      const int64_t first = order.at(k, 0), step = order.width(k / order.block * order.block);
      const auto place_of = [&](int64_t t) { return first + tap_of[t] * step; };
      if (p.tap_count == taps_count) {
        gemm::pack_transposed(from, taps_count, lanes, taps_count, to, place_of);
      } else {
        for (int64_t t = 0; t < taps_count; ++t)
          if (tap_of[t] >= 0) gemm::pack_transposed(from + t, taps_count, lanes, 1, to, [&](int64_t) { return place_of(t); });
      }
    }
  });
  correlate<T>({g.N,
                g.G,
                K,
                C,
                g.layout,
                {grad_output, g.output_strides(), g.P, g.Q},
                {grad_input, g.input_strides(), g.H, g.W},
                1,
                1,
                p.along_h,
                p.along_w,
                p.taps,
                p.data,
                p.tap_count},
               order, packed_weight, {nullptr, false});
}

}  // namespace torchcnn::TORCHCNN_ISA::implicit_gemm
