// The rule that chooses an algorithm for a convolution, in one place: the kernels follow it and torchcnn.explain prints it.
// It reads the geometry, the length of a vector and the switch allow_winograd, never N or the number of threads, so that results
// do not depend on them.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../geometry.h"

namespace torchcnn {

enum class Direction { forward, grad_input, grad_weight };

inline const char* name_of(Direction direction) {
  switch (direction) {
    case Direction::forward: return "forward";
    case Direction::grad_input: return "grad_input";
    default: return "grad_weight";
  }
}

enum class Algorithm {
  direct,
  implicit_gemm,
  depthwise,
  grouped,
  pointwise,
  small_channels,
  winograd_2x2_3x3,
  winograd_4x4_3x3,
  winograd_2x2_5x5,
  winograd_2x2_stride_2,
  winograd_4x4_stride_2,
  winograd_4x4_3x3_phases,
  winograd_3x3_4x4_phases,
  winograd_1x4_1x3,
  winograd_4x1_3x1,
  winograd_1x2_1x5,
  winograd_2x1_5x1,
  winograd_1x3_1x7,
  winograd_3x1_7x1
};

inline const char* name_of(Algorithm algorithm) {
  switch (algorithm) {
    case Algorithm::direct: return "direct";
    case Algorithm::depthwise: return "depthwise";
    case Algorithm::grouped: return "grouped";
    case Algorithm::pointwise: return "pointwise";
    case Algorithm::small_channels: return "small_channels";
    case Algorithm::winograd_2x2_3x3: return "winograd_2x2_3x3";
    case Algorithm::winograd_4x4_3x3: return "winograd_4x4_3x3";
    case Algorithm::winograd_2x2_5x5: return "winograd_2x2_5x5";
    case Algorithm::winograd_2x2_stride_2: return "winograd_2x2_stride_2";
    case Algorithm::winograd_4x4_stride_2: return "winograd_4x4_stride_2";
    case Algorithm::winograd_4x4_3x3_phases: return "winograd_4x4_3x3_phases";
    case Algorithm::winograd_3x3_4x4_phases: return "winograd_3x3_4x4_phases";
    case Algorithm::winograd_1x4_1x3: return "winograd_1x4_1x3";
    case Algorithm::winograd_4x1_3x1: return "winograd_4x1_3x1";
    case Algorithm::winograd_1x2_1x5: return "winograd_1x2_1x5";
    case Algorithm::winograd_2x1_5x1: return "winograd_2x1_5x1";
    case Algorithm::winograd_1x3_1x7: return "winograd_1x3_1x7";
    case Algorithm::winograd_3x1_7x1: return "winograd_3x1_7x1";
    default: return "implicit_gemm";
  }
}

inline bool is_winograd(Algorithm algorithm) { return algorithm >= Algorithm::winograd_2x2_3x3; }

struct Choice {
  Algorithm algorithm;
  const char* reason;
};

// The switch torchcnn.backends.allow_winograd, of the whole process; defined in dispatch.cpp.
bool allow_winograd();
void set_allow_winograd(bool allow);

// Products along an axis by Winograd's algorithm, from tiles of `out` results and `points` products for each phase of the
// dilation; the last tile spares `each` products for every result that it does not have (or one more: 7 taps, and a single result
// of grad_input at stride 2). `extra`: results before the first.
inline int64_t winograd_products(int64_t size, int64_t dilation, int64_t out, int64_t points, int64_t each = 1,
                                 int64_t extra = 0) {
  const int64_t results = ceil_div(size, dilation) + extra, tiles = ceil_div(results, out);
  return std::min(size, dilation) * (tiles * points - (tiles * out - results) * each);
}

// Filters of one row or one column: tiles of results along it alone.
inline Choice choose_winograd_of_one_axis(const Conv2dGeometry& g, int64_t rows, int64_t columns) {
  const Choice none{Algorithm::implicit_gemm, nullptr};
  const bool across = g.R == 1;
  const int64_t taps = across ? g.S : g.R, size = across ? columns : rows, dilation = across ? g.dilation_w : g.dilation_h;
  if (g.stride_h != 1 || g.stride_w != 1) return none;
  const int64_t C = g.C_per_group(), K = g.K_per_group();
  if (C * K < 24 * (C + K)) return none;  // products cost as much as C K, transforms as C + K
  const auto pays = [&](int64_t out, int64_t points) {
    return winograd_products(size, dilation, out, points) * 4 <= size * taps * 3;
  };
  if (taps == 3 && pays(4, 6))
    return {across ? Algorithm::winograd_1x4_1x3 : Algorithm::winograd_4x1_3x1,
            "3 taps along one axis, stride 1: 6 products for 4 outputs instead of 12"};
  if (taps == 5 && pays(2, 6))
    return {across ? Algorithm::winograd_1x2_1x5 : Algorithm::winograd_2x1_5x1,
            "5 taps along one axis, stride 1: 6 products for 2 outputs instead of 10"};
  if (taps == 7 && pays(3, 12))
    return {across ? Algorithm::winograd_1x3_1x7 : Algorithm::winograd_3x1_7x1,
            "7 taps along one axis, stride 1: 12 products for 3 outputs instead of 21"};
  return none;
}

// Filters whose stride leaves 3 or 4 taps a phase, the phases as channels of a convolution of stride 1: the first layers of
// networks, with few channels and so many tiles that transforming the filters costs little. What a tile costs beside its products
// counts then: about 300 of them for every filter, and more in forward, where all of its outputs are written.
inline Choice choose_winograd_of_phases(const Conv2dGeometry& g, Direction direction) {
  const Choice none{Algorithm::implicit_gemm, nullptr};
  const int64_t taps = ceil_div(g.R, g.stride_h), stride = g.stride_h * g.stride_w;
  if (direction == Direction::grad_input || g.dilation_h > 1 || g.dilation_w > 1 || stride == 1 || stride > 256) return none;
  if (g.K_per_group() < 32 || taps != ceil_div(g.S, g.stride_w) || (taps != 3 && taps != 4)) return none;
  const int64_t C = g.C_per_group(), m = taps == 3 ? 4 : 3, tiles = ceil_div(g.P, m) * ceil_div(g.Q, m);
  if (C > 16 || tiles < 16 || tiles > int64_t(1) << 32) return none;
  const int64_t products = winograd_products(g.P, 1, m, 6) * winograd_products(g.Q, 1, m, 6) * C * stride;
  const int64_t work = products + 300 * tiles, direct = g.P * g.Q * C * g.R * g.S;
  if (direction == Direction::forward ? work * 5 > direct * 3 : work * 4 > direct * 3) return none;
  if (taps == 3)
    return {Algorithm::winograd_4x4_3x3_phases, "3x3 taps a phase of the stride: 36 products for 4x4 outputs instead of 144"};
  return {Algorithm::winograd_3x3_4x4_phases, "4x4 taps a phase of the stride: 36 products for 3x3 outputs instead of 144"};
}

// The Winograd algorithm with the fewest products, if it has few enough to pay for its transforms; at stride 2 with many filters
// the one with fewer transformed weights.
inline Choice choose_winograd(const Conv2dGeometry& g, Direction direction) {
  const Choice none{Algorithm::implicit_gemm, nullptr};
  const bool dilated = g.dilation_h > 1 || g.dilation_w > 1, back = direction == Direction::grad_input;
  // The switch counts when an operator begins: weights in channels_last are there because Winograd has been chosen already.
  if (!allow_winograd() && g.weight_layout == Layout::nchw) return none;
  if (const Choice phases = choose_winograd_of_phases(g, direction); phases.reason != nullptr) return phases;
  if (g.C_per_group() < 16 || g.K_per_group() < 16) return none;
  const int64_t rows = back ? g.H : g.P, columns = back ? g.W : g.Q;
  if ((g.R == 1) != (g.S == 1)) return choose_winograd_of_one_axis(g, rows, columns);
  if (g.R != g.S || (g.R != 3 && g.R != 5) || g.stride_h != g.stride_w) return none;
  // A single row or column spares no products along its short axis, and often meets taps in the padding, left out elsewhere.
  if (rows <= g.dilation_h || columns <= g.dilation_w) return none;
  const int64_t direct = rows * columns * g.R * g.S / (back ? g.stride_h * g.stride_w : 1);
  if (g.R == 3 && g.stride_h == 2 && !dilated) {
    if (std::min(g.C_per_group(), g.K_per_group()) < 32) return none;  // the transforms would cost more than they save
    const auto products = [&](int64_t m, int64_t points) {
      return back ? winograd_products(rows, 1, 2 * m, points, 1, 1 - g.pad_h % 2) *
                        winograd_products(columns, 1, 2 * m, points, 1, 1 - g.pad_w % 2)
                  : winograd_products(rows, 1, m, points, 2) * winograd_products(columns, 1, m, points, 2);
    };
    const int64_t two = products(2, 5), four = products(4, 9);
    // The 81 numbers of every filter and channel pay only while all of them stay in the caches, and, with transforms of whole
    // tiles, for a sixth of the products: as many as are spared where no tile or hardly any of one is cut off.
    const bool fits = g.C_per_group() <= (int64_t(8) << 20) / (81 * int64_t(sizeof(float))) / g.K_per_group();
    if (fits && four * 6 < two * 5 && four * 4 <= direct * 3)
      return {Algorithm::winograd_4x4_stride_2, "3x3, stride 2: 81 products for 4x4 outputs instead of 144"};
    if (two * 16 > direct * 13) return none;  // these transforms only add
    return {Algorithm::winograd_2x2_stride_2, "3x3, stride 2: 25 products for 2x2 outputs instead of 36"};
  }
  if (g.stride_h != 1) return none;
  const auto products = [&](int64_t out, int64_t points) {
    return winograd_products(rows, g.dilation_h, out, points) * winograd_products(columns, g.dilation_w, out, points);
  };
  if (g.R == 5) {
    if (products(2, 6) * 4 > direct * 3) return none;
    return {Algorithm::winograd_2x2_5x5, "5x5, stride 1: 36 products for 2x2 outputs instead of 100"};
  }
  const int64_t large = products(4, 6), small = products(2, 4);
  if (std::min(large, small) * 4 > direct * 3) return none;
  if (large < small) return {Algorithm::winograd_4x4_3x3, "3x3, stride 1: 36 products for 4x4 outputs instead of 144"};
  return {Algorithm::winograd_2x2_3x3, "3x3, stride 1, few outputs: 16 products for 2x2 outputs instead of 36"};
}

// Whether the input has so few channels that filters, in whole vectors, meet it straight from its rows
// (conv2d_small_channels_filters.h): in channels_last, where filters are adjacent, and, of one group, where rows are too short or
// sums too long for vectors of pixels.
inline bool suits_vectors_of_filters(const Conv2dGeometry& g, Direction direction) {
  const int64_t C = g.C_per_group(), terms = C * g.R * g.S;
  if (g.K_per_group() % 16 != 0 || C < 1 || C > 16 || g.R * g.S == 1 || terms > 512) return false;
  if (g.layout == Layout::channels_last) return direction != Direction::grad_input;
  return direction == Direction::forward && g.G == 1 && g.Q >= 8 && (g.Q < 16 || terms > 160);
}

// Whether vectors of pixels beat vectors of channels (conv2d_small_channels*.h): rows long enough to fill vectors, and either so
// few channels on the other side that most lanes of a panel would be empty, or so short a sum that moving panels around would
// cost more than the products. channels_last with many filters has its vectors of channels in memory already.
inline bool suits_small_channels(const Conv2dGeometry& g, Direction direction) {
  const int64_t C = g.C_per_group(), K = g.K_per_group();
  const bool nchw = g.layout == Layout::nchw;
  switch (direction) {
    case Direction::forward:  // a block's rows are copied, those between the windows too
      if (g.stride_h > 256 / g.stride_w) return false;
      return (g.Q >= 8 && K <= 12) || (g.Q >= 16 && C <= 16 && C * g.R * g.S <= 160 && (nchw || (K <= 32 && g.stride_w == 1)));
    case Direction::grad_input:  // of 16 channels, panels are full, which pays where each phase has few taps
      return g.W / g.stride_w >= 8 && (g.stride_w == 1 ? C <= 20 || K <= 4 : C <= 20 && C != 16);
    default: {
      // Rows may be sorted by their remainder modulo the stride, and get room for the taps beside them.
      const bool compact = g.stride_h <= 16 / g.stride_w && ((nchw && g.Q >= 16) || (g.S - 1) * g.dilation_w <= g.Q * g.stride_w);
      return compact && ((g.Q >= 8 && K <= 12 && C <= 256) || (g.Q >= 16 && C <= 16 && g.stride_w == 1 && nchw));
    }
  }
}

// Whether stride, padding or the dilated filter dwarf an axis of the input.
inline bool outsizes(int64_t size, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation) {
  const int64_t limit = size < (int64_t(1) << 40) ? 8 * size + 4096 : size;
  return stride > limit || pad > limit || dilation * (kernel - 1) > limit;
}

// Whether windows without padding lie side by side: the larger side then is a matrix of taps and positions.
inline bool are_patches(const Conv2dGeometry& g) {
  return g.pad_h == 0 && g.pad_w == 0 && g.R == g.stride_h && g.S == g.stride_w && g.dilation_h == 1 && g.dilation_w == 1;
}

// Whether vectors of channels that hold whole groups, or hold one together, beat the kernels for few channels: in channels_last,
// and in NCHW where rows are short, or strides spoil vectors of pixels (grad_input has phases for these, which pay where a group
// has some channels and a phase some taps). Of 64 bytes, in 32 registers, they also beat them for all but the longest rows, and,
// at stride 2, for groups of a whole vector, in forward and grad_input unless rows are very short.
inline bool suits_grouped(const Conv2dGeometry& g, Direction direction, int64_t vector_bytes) {
  const int64_t M = g.C_per_group();
  if (g.C != g.K || M < 2 || M > 16 || (M & (M - 1)) != 0 || g.R != 3 || g.S != 3) return false;
  if (g.dilation_h > 1 || g.dilation_w > 1 || g.stride_h > 4 || g.stride_w > 4) return false;
  if (std::max(g.W, g.Q) > 2048) return false;             // whole rows are packed
  if (ceil_div(g.C, 16) * 16 * 7 > g.C * 8) return false;  // more than an eighth of the lanes would be empty
  if (g.layout == Layout::channels_last) return true;
  if (vector_bytes == 64 && M <= 8) return g.Q <= 128 || g.stride_w > 1;
  if (vector_bytes == 64) return g.stride_w == 2 && (g.Q > 8 || direction == Direction::grad_weight);
  const bool phases_pay = direction == Direction::grad_input && M > 2 && (M > 4 || g.stride_w == 2);
  return M <= 8 && (g.Q <= 16 || (g.stride_w > 1 && !phases_pay));
}

// vector_bytes: of the row of kernels that computes.
inline Choice choose_conv2d(const Conv2dGeometry& g, Direction direction, int64_t vector_bytes) {
  if (g.C == 0) return {Algorithm::direct, "no input channels: the sums are empty"};
  if (outsizes(g.H, g.R, g.stride_h, g.pad_h, g.dilation_h) || outsizes(g.W, g.S, g.stride_w, g.pad_w, g.dilation_w))
    return {Algorithm::direct, "windows far larger than the input: packing them would take more memory than the tensors"};
  if (g.C == g.G && (g.K == g.G || (g.G > 1 && g.layout == Layout::nchw)))
    return {Algorithm::depthwise, "one input channel in each group: direct sums, bound by memory"};
  if (const Choice winograd = choose_winograd(g, direction); winograd.reason != nullptr) return winograd;
  if (suits_grouped(g, direction, vector_bytes))
    return {Algorithm::grouped, "small groups: vectors of channels, in which the members of a group change places"};
  const bool few = suits_small_channels(g, direction);
  if (g.layout == Layout::nchw && g.pad_h == 0 && g.pad_w == 0 && g.C_per_group() * g.R * g.S >= 8 && g.K_per_group() >= 8) {
    if (g.R * g.S == 1 && !(few && direction == Direction::grad_weight))
      return {Algorithm::pointwise, direction == Direction::grad_weight
                                        ? "1x1 without padding: the planes of grad_output times those of the input"
                                        : "1x1 without padding: the weight matrix times the planes of the tensor"};
    if (are_patches(g) && !(few && direction != Direction::grad_input))
      return {Algorithm::pointwise, direction == Direction::grad_weight
                                        ? "kernel and stride alike: the planes of grad_output times patches side by side"
                                        : "kernel and stride alike: the weight matrix times the patches side by side"};
  }
  if (suits_vectors_of_filters(g, direction))
    return {Algorithm::small_channels, "few channels: vectors of filters, the input straight from its rows"};
  if (few) return {Algorithm::small_channels, "few channels: vectors of pixels, straight from the rows of the image"};
  if (direction == Direction::grad_input && (g.stride_h > 1 || g.stride_w > 1))
    return {Algorithm::implicit_gemm, "stride above 1: one correlation of grad_output for each phase of the input"};
  if (direction == Direction::grad_weight)
    return {Algorithm::implicit_gemm, "dot products of grad_output and packed patches, for any geometry"};
  return {Algorithm::implicit_gemm, "weights times packed patches, for any geometry"};
}

// Whether the kernels take weights in channels_last too (reference kernels always do), and write their gradients so. Those are
// Winograd's, for vectors of any length.
inline bool reads_any_weight_layout(const Conv2dGeometry& g, Direction direction) {
  return is_winograd(choose_conv2d(g, direction, 16).algorithm);
}

}  // namespace torchcnn
