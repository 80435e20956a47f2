// Backward of max and min pooling from the offsets of the extremes, NCHW, where offsets are bytes:
//
//   grad_input[h][w] = sum over (p, q)  of  grad_output[p][q]  where the offset r S + s of window (p, q) points to (h, w):
//                      h = p stride_h - pad_h + r dilation_h,  w = q stride_w - pad_w + s dilation_w
//
// A gather would compare every window with all its R S taps. A scatter adds once a window, one window at a time; what can be done
// in vectors is to find where: of some rows of windows the positions h W + w are written side by side, then followed. Rows of
// grad_input are zeroed just before they are needed. One thread owns a plane. 2x2 windows side by side need none of that: each
// writes its own four elements.
#pragma once

#include "pool2d_extremum_nchw.h"
#include "pool2d_indexed.h"
#include "pool2d_rows.h"

namespace torchcnn::TORCHCNN_ISA {

template <class A, class Offset>
void offset_pool2d_grad_input_tiling(const Pool2dGeometry& g, const A* grad_output, const Offset* offsets, A* grad_input) {
  using I = IndexOf<A>;
  write_tiles_2x2<A>(g, grad_input, [=](int64_t i) {
    const Vec<I> gradient = (Vec<I>)load(grad_output + i), offset = load_unsigned<I>(offsets + i);
    Tiles<A> tiles;
    for (int element = 0; element < 4; ++element) tiles.element[element] = (Vec<A>)(gradient & (offset == element));
    return tiles;
  }, [=](int64_t i, int element) { return static_cast<int64_t>(offsets[i]) == element ? grad_output[i] : A(0); });
}

template <class A>
inline bool finds_positions(const Pool2dGeometry& g) {
  return !g.adaptive && g.R * g.S <= 256 && can_be_staged<A>(g) && index_fits_lane<A>(g);
}

// The windows of one axis that lie inside the plane: begin ... end - 1.
struct InsideRange {
  int64_t begin, end;
};

inline InsideRange windows_inside(int64_t windows, int64_t size, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation) {
  const int64_t begin = std::min(windows, ceil_div(pad, stride)), room = size + pad - dilation * (kernel - 1) - 1;
  return {begin, room < 0 ? begin : std::clamp(room / stride + 1, begin, windows)};
}

// Of each window of some rows of a plane where its gradient goes, and the gradient. Where the offset points outside the window or
// the plane (relu_max_pool2d says so that nothing came through) 0 goes to an element near by.
template <class A>
struct PositionFinder {
  using I = IndexOf<A>;
  static constexpr int64_t L = kLanes<A>;
  const Pool2dGeometry& g;
  InsideRange rows, columns;
  Vec<I> first_column, step, reciprocal, taps, row_step, S, dilation_h, dilation_w;

  explicit PositionFinder(const Pool2dGeometry& g)
      : g(g),
        rows(windows_inside(g.P, g.H, g.R, g.stride_h, g.pad_h, g.dilation_h)),
        columns(windows_inside(g.Q, g.W, g.S, g.stride_w, g.pad_w, g.dilation_w)),
        first_column(steps_of<I>(g.stride_w) - static_cast<I>(g.pad_w)),
        step(broadcast(static_cast<I>(L * g.stride_w))),
        reciprocal(broadcast(static_cast<I>(ceil_div(65536, g.S)))),
        taps(broadcast(static_cast<I>(g.R * g.S))),
        row_step(broadcast(static_cast<I>(g.dilation_h * g.W - g.dilation_w * g.S))),
        S(broadcast(static_cast<I>(g.S))),
        dilation_h(broadcast(static_cast<I>(g.dilation_h))),
        dilation_w(broadcast(static_cast<I>(g.dilation_w))) {}

  // load_offset(q) and load_gradient(q) give those of windows q, q + 1, ... of row p. A vector beyond the row is written, too.
  template <class LoadOffset, class LoadGradient>
  [[gnu::always_inline]] void operator()(int64_t p, LoadOffset load_offset, LoadGradient load_gradient, I* positions,
                                         A* gradients) const {
    const int64_t top = p * g.stride_h - g.pad_h;
    const bool row_inside = p >= rows.begin && p < rows.end;
    const Vec<I> near_by = broadcast(static_cast<I>(std::clamp<int64_t>(top, 0, g.H - 1) * g.W));
    Vec<I> begin = first_column, start = first_column + static_cast<I>(top * g.W);
    for (int64_t q = 0; q < g.Q; q += L, begin += step, start += step) {
      const Vec<I> offset = load_offset(q), r = offset * reciprocal >> 16;  // offset / S, rounded down, for any offset below 256
      const Vec<I> position = r * row_step + offset * dilation_w + start;
      Vec<I> valid = offset < taps;
      if (!row_inside) {
        const Vec<I> h = r * dilation_h + static_cast<I>(top);
        valid &= (h >= 0) & (h < static_cast<I>(g.H));
      }
      if (q < columns.begin || q + L > columns.end) {
        const Vec<I> w = (offset - r * S) * dilation_w + begin;
        valid &= (w >= 0) & (w < static_cast<I>(g.W));
      }
      store(positions + q, valid ? position : near_by);
      store(gradients + q, (Vec<A>)((Vec<I>)load_gradient(q) & valid));
    }
  }
};

template <class T>
void offset_pool2d_grad_input_scatter(const Pool2dGeometry& g, const T* grad_output, const uint8_t* offsets, T* grad_input) {
  using A = Arithmetic<T>;
  using I = IndexOf<A>;
  constexpr int64_t found_together = 256;
  const int64_t plane = g.H * g.W, windows = g.P * g.Q, band = std::clamp<int64_t>(found_together / g.Q, 1, g.P);
  const T* end = grad_output + g.N * g.C * windows;
  const uint8_t* offsets_end = offsets + g.N * g.C * windows;
  const PositionFinder<A> find(g);
  parallel_for(g.N * g.C, windows * 3 + plane / 8, [&](int64_t nc) {
    A* sums;
    if constexpr (std::is_same_v<T, A>) {
      sums = grad_input + nc * plane;
    } else {
      sums = workspace<A>(Slot::patches, plane);
    }
    I* positions = workspace<I>(Slot::positions, band * g.Q + kLanes<I>);
    A* gradients = workspace<A>(Slot::gradient, band * g.Q + kLanes<A>);
    int64_t zeroed = 0;  // rows
    for (int64_t p_begin = 0; p_begin < g.P; p_begin += band) {
      const int64_t p_end = std::min(g.P, p_begin + band), count = (p_end - p_begin) * g.Q;
      const int64_t reached = (p_end - 1) * g.stride_h - g.pad_h + (g.R - 1) * g.dilation_h + 1;
      const int64_t needed = p_end == g.P ? g.H : std::clamp(reached, std::max<int64_t>(zeroed, 1), g.H);
      std::memset(static_cast<void*>(sums + zeroed * g.W), 0, static_cast<size_t>((needed - zeroed) * g.W) * sizeof(A));
      zeroed = needed;
      const T* gradient = grad_output + nc * windows + p_begin * g.Q;
      const uint8_t* offset = offsets + nc * windows + p_begin * g.Q;
      int64_t found = 0;
      if (end - gradient >= count + kLanes<A>) {
        for (int64_t p = p_begin; p < p_end; ++p, gradient += g.Q, offset += g.Q, found += g.Q)
          find(p, [=](int64_t q) { return load_unsigned<I>(offset + q); }, [=](int64_t q) { return load_wide(gradient + q); },
               positions + found, gradients + found);
      } else {  // the end of the tensor, beyond which nothing may be read
        for (int64_t p = p_begin; p < p_end; ++p, gradient += g.Q, offset += g.Q, found += g.Q)
          find(p, [=](int64_t q) { return load_offsets<I>(offset + q, g.Q - q, offsets_end - (offset + q)); },
               [=](int64_t q) { return load_row_end(gradient + q, g.Q - q, end); }, positions + found, gradients + found);
      }
      in_four_parts(count, [=](int64_t i) { sums[positions[i]] += gradients[i]; });
    }
    if constexpr (!std::is_same_v<T, A>) narrow_row(sums, plane, grad_input + nc * plane);
  });
}

}  // namespace torchcnn::TORCHCNN_ISA
