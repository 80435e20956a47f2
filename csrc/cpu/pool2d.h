// Vectorised pooling: which kernel serves which geometry. Every choice is made here, that of averages from the geometry alone,
// without N: their last bits would depend on it. Extremes are the same in any kernel.
//
//   layout          windows              forward                                   backward
//   either          of one element       element by element (pool2d_elementwise.h) the same
//   NCHW            global               vectors over a plane                      filled (pool2d_global_nchw.h)
//                   in small planes      lanes are planes (pool2d_small_planes.h)  the same (average), others scatter by offsets
//                   sliding, stride 1, 2 vectors over the windows of a row         by rows of the input; extremes of 2 or 3
//                                        (pool2d_extremum_nchw.h,                  columns (pool2d_offsets_nchw.h), others
//                                        pool2d_average_nchw.h)                    scatter by offsets (pool2d_indexed.h)
//                   any other, few       vectors over planes (pool2d_planes.h)     runs of columns (average), scatter by offsets
//   channels_last   any                  vectors over the channels                 gather (pool2d_channels_last.h)
//
// Planes whose positions leave a lane run the loops of pool2d_reference.h.
#pragma once

#include "kernels.h"
#include "pool2d_average_nchw.h"
#include "pool2d_channels_last.h"
#include "pool2d_elementwise.h"
#include "pool2d_extremum_nchw.h"
#include "pool2d_global_nchw.h"
#include "pool2d_indexed.h"
#include "pool2d_offsets_nchw.h"
#include "pool2d_planes.h"
#include "pool2d_reference.h"
#include "pool2d_small_planes.h"

namespace torchcnn::TORCHCNN_ISA {

// The same windows, said more simply: adaptive ones as sliding ones where they are, and 1x1 windows as one row of them.
//
// Window p covers floor(p H / P) ... ceil((p + 1) H / P) - 1. With H = P stride + rest, that is p stride + floor(p rest / P) and
// so on: all windows have the same distance and size, stride + rest, if rest is 0 or 1.
inline Pool2dGeometry simplified(Pool2dGeometry g) {
  if (g.adaptive && g.P <= g.H && g.Q <= g.W && (g.P == 1 || g.H % g.P <= 1) && (g.Q == 1 || g.W % g.Q <= 1)) {
    g.adaptive = false;
    g.stride_h = g.H / g.P, g.stride_w = g.W / g.Q;
    g.R = g.stride_h + g.H % g.P, g.S = g.stride_w + g.W % g.Q;
  }
  g = with_steps_taken(g);
  if (is_elementwise(g)) {
    g.W = g.Q = g.H * g.W;
    g.H = g.P = 1;
  }
  return g;
}

// Forward takes planes for one where its rows are then read in place. Where they have to be staged, converted or with the signs
// turned, small planes are better transposed.
template <class T>
inline bool suits_one_plane(const Pool2dGeometry& g, bool turned) {
  using A = Arithmetic<T>;
  const bool in_place = std::is_same_v<T, A> && !turned;
  return is_one_plane_2x2(g) && (in_place || (!suits_small_planes<A>(g) && can_be_staged<A>(g)));
}

template <class T>
void extremum_pool2d_forward(const Pool2dGeometry& geometry, Extremum extremum, const T* input, T* output, Positions positions) {
  using A = Arithmetic<T>;
  const WorkspaceUse use;
  const Pool2dGeometry g = simplified(geometry);
  if (g.H > std::numeric_limits<IndexOf<A>>::max() / 2 / g.W)
    return reference::extremum_pool2d_forward(geometry, extremum, input, output, positions);
  if (is_elementwise(g) && positions.kind != PositionKind::indices)
    return extremum_pool2d_elementwise(g, extremum, input, output, positions);
  if (g.layout == Layout::channels_last) return extremum_pool2d_channels_last(g, extremum, input, output, positions);
  const bool indices_do = positions.kind == PositionKind::none || positions.kind == PositionKind::indices;
  if (suits_whole_planes<A>(g) && (indices_do || offsets_are_indices(g)))
    return extremum_pool2d_global(g, extremum, input, output, positions);
  if (suits_one_plane<T>(g, extremum.minimum))
    return extremum_pool2d_sliding(as_one_plane(g), g.P, extremum, input, output, positions);
  if (suits_small_planes<A>(g) && 4 * g.N * g.C >= kLanes<A>)  // of fewer planes most lanes would be idle
    return extremum_pool2d_small_planes(g, extremum, input, output, positions);
  if (!suits_planes<A>(g) && can_be_staged<A>(g) && index_fits_lane<A>(g))
    return extremum_pool2d_sliding(g, g.P, extremum, input, output, positions);
  extremum_pool2d_planes(g, extremum, input, output, positions);
}

template <class T, class Offset>
void offset_pool2d_grad_input(const Pool2dGeometry& geometry, const T* grad_output, const Offset* offsets, T* grad_input) {
  const WorkspaceUse use;
  const Pool2dGeometry g = simplified(geometry);
  if (is_elementwise(g)) return offset_pool2d_grad_input_elementwise(g, grad_output, offsets, grad_input);
  constexpr int64_t most_gathered_windows = 16;  // that contain a position
  const int64_t windows = std::min(g.P, ceil_div(g.R, g.stride_h)) * std::min(g.Q, ceil_div(g.S, g.stride_w));
  const bool dense = g.dilation_h == 1 && g.dilation_w == 1;
  if (g.layout == Layout::channels_last && dense && windows <= most_gathered_windows)
    return offset_pool2d_grad_input_channels_last(g, grad_output, offsets, grad_input);
  if (g.layout == Layout::nchw && suits_whole_planes<Arithmetic<T>>(g) && offsets_are_indices(g))
    return offset_pool2d_grad_input_global(g, grad_output, offsets, grad_input);
  if constexpr (std::is_same_v<T, Arithmetic<T>>) {
    if (is_one_plane_2x2(g)) return offset_pool2d_grad_input_tiling(as_one_plane(g), grad_output, offsets, grad_input);
    if (g.layout == Layout::nchw && is_tiling_2x2(g)) return offset_pool2d_grad_input_tiling(g, grad_output, offsets, grad_input);
  }
  constexpr int64_t shortest_gathered_row = 24;  // windows: below, a row costs more than they do one by one
  if constexpr (std::is_same_v<Offset, uint8_t>) {
    if (g.layout == Layout::nchw && is_around_3x3(g))
      return offset_pool2d_grad_input_around_3x3(g, grad_output, offsets, grad_input);
    if (g.layout == Layout::nchw && g.Q >= shortest_gathered_row && gather_row_for<T>(g).of_rows[0] != nullptr)
      return offset_pool2d_grad_input_gather(g, grad_output, offsets, grad_input);
  }
  pool2d_scatter_offsets(g, grad_output, offsets, grad_input);
}

template <class T>
void offset_pool2d_grad_input(const Pool2dGeometry& g, const T* grad_output, Positions positions, T* grad_input) {
  if (positions.kind == PositionKind::byte_offsets)
    return offset_pool2d_grad_input(g, grad_output, static_cast<const uint8_t*>(positions.to), grad_input);
  offset_pool2d_grad_input(g, grad_output, static_cast<const int32_t*>(positions.to), grad_input);
}

template <class T>
void avg_pool2d_forward(const Pool2dGeometry& geometry, Divisor divisor, const T* input, T* output) {
  const WorkspaceUse use;
  const Pool2dGeometry g = simplified(geometry);
  if (is_elementwise(g)) return avg_pool2d_elementwise(g, divisor, input, output);
  if (g.layout == Layout::channels_last) return avg_pool2d_channels_last(g, divisor, input, output);
  if (suits_whole_planes<Arithmetic<T>>(g)) return avg_pool2d_global(g, divisor, input, output);
  if (suits_one_plane<T>(g, false)) return avg_pool2d_sliding(as_one_plane(g), divisor, input, output);
  if (suits_small_planes<Arithmetic<T>>(g)) return avg_pool2d_small_planes(g, divisor, input, output);
  if (!suits_planes<Arithmetic<T>>(g) && can_be_staged<Arithmetic<T>>(g)) return avg_pool2d_sliding(g, divisor, input, output);
  avg_pool2d_planes(g, divisor, input, output);
}

template <class T>
void avg_pool2d_grad_input(const Pool2dGeometry& geometry, Divisor divisor, const T* grad_output, T* grad_input) {
  const WorkspaceUse use;
  const Pool2dGeometry g = simplified(geometry);
  if (is_elementwise(g)) return avg_pool2d_elementwise(g, divisor, grad_output, grad_input);
  if (g.layout == Layout::channels_last) return avg_pool2d_channels_last_grad_input(g, divisor, grad_output, grad_input);
  if (suits_whole_planes<Arithmetic<T>>(g)) return avg_pool2d_global_grad_input(g, divisor, grad_output, grad_input);
  if constexpr (std::is_same_v<T, Arithmetic<T>>) {
    if (is_one_plane_2x2(g)) return avg_pool2d_grad_input_tiling(as_one_plane(g), divisor, grad_output, grad_input);
    if (is_tiling_2x2(g)) return avg_pool2d_grad_input_tiling(g, divisor, grad_output, grad_input);
  }
  if (suits_small_planes<Arithmetic<T>>(g)) return avg_pool2d_grad_input_small_planes(g, divisor, grad_output, grad_input);
  if (suits_spread(g)) return avg_pool2d_grad_input_rows(g, divisor, grad_output, grad_input);
  avg_pool2d_grad_input_runs(g, divisor, grad_output, grad_input);
}

template <class T>
inline constexpr Pool2dKernels<T> pool2d_kernels = {
    extremum_pool2d_forward<T>,
    offset_pool2d_grad_input<T>,
    avg_pool2d_forward<T>,
    avg_pool2d_grad_input<T>,
};

}  // namespace torchcnn::TORCHCNN_ISA
