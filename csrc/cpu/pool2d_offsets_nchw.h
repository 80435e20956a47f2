// Backward of max and min pooling from the offsets of the extremes, NCHW: a gather. Position (h, w) looks at every window that
// contains it and takes the gradient of those whose offset points to it:
//
//   grad_input[h][w] = sum over (p, r), (q, s) with p stride_h + r = h + pad_h, q stride_w + s = w + pad_w
//                      of  grad_output[p][q]  where  offsets[p][q] = r S + s
//
// Each tap of a vector of windows is compared once, so the work is R S comparisons a window: worth it for windows of 2 and 3
// columns with strides 1 and 2. Others scatter (pool2d_indexed.h). A band of grad_output and offsets is staged, with offset -1
// around it. 2x2 windows side by side need none of that: each writes its own four elements.
#pragma once

#include "pool2d_rows.h"

namespace torchcnn::TORCHCNN_ISA {

inline bool gathers_offsets(const Pool2dGeometry& g) {
  const bool window = (g.S == 2 && g.stride_w == 2) || (g.S == 3 && g.stride_w <= 2);
  return window && g.R <= 3 && g.dilation_h == 1 && g.dilation_w == 1;
}

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
struct StagedWindows {
  const A* gradient;
  const IndexOf<A>* offset;
  int64_t pitch, first_row;
};

// A row of grad_input that lies in `rows` rows of windows, the first of them p; up to 2 kLanes elements are written beyond it.
// odd: whether pad_w is.
template <class A, int S, int stride, int odd, int rows>
void gather_row(const Pool2dGeometry& g, const StagedWindows<A>& staged, int64_t x, int64_t p, A* to) {
  using I = IndexOf<A>;
  constexpr int64_t L = kLanes<A>;
  const int64_t start = (p - staged.first_row) * staged.pitch + (g.pad_w - odd) / stride, pitch = staged.pitch;
  const A* gradient = staged.gradient + start;
  const I* offset = staged.offset + start;
  Vec<I> wanted[rows > 0 ? rows : 1][S];
#pragma GCC unroll 3
  for (int row = 0; row < rows; ++row)
#pragma GCC unroll 3
    for (int s = 0; s < S; ++s) wanted[row][s] = broadcast(static_cast<I>((x - (p + row) * g.stride_h) * S + s));
  for (int64_t w = 0; w < g.W; w += stride * L, gradient += L, offset += L) {
    Vec<A> sums[stride] = {};
#pragma GCC unroll 3
    for (int row = 0; row < rows; ++row) {
#pragma GCC unroll 2
      for (int phase = 0; phase < stride; ++phase) {
#pragma GCC unroll 3
        for (int s = (odd + phase) % stride; s < S; s += stride) {
          const int64_t q = row * pitch + (odd + phase - s) / stride;
          sums[phase] += (Vec<A>)((Vec<I>)load(gradient + q) & (load(offset + q) == wanted[row][s]));
        }
      }
    }
    if constexpr (stride == 1) {
      store(to + w, sums[0]);
    } else {
      store_interleaved<A>(to + w, sums[0], sums[1]);
    }
  }
}

template <class A, int S, int stride, int odd>
void gather_row(const Pool2dGeometry& g, const StagedWindows<A>& staged, int64_t h, A* to) {
  const int64_t x = h + g.pad_h;
  const int64_t p_end = std::min(g.P, x / g.stride_h + 1), p = std::max<int64_t>(0, ceil_div(x - g.R + 1, g.stride_h));
  switch (p_end - p) {
    case 3: return gather_row<A, S, stride, odd, 3>(g, staged, x, p, to);
    case 2: return gather_row<A, S, stride, odd, 2>(g, staged, x, p, to);
    case 1: return gather_row<A, S, stride, odd, 1>(g, staged, x, p, to);
    default: return gather_row<A, S, stride, odd, 0>(g, staged, x, staged.first_row, to);
  }
}

template <class A>
auto gather_row_for(const Pool2dGeometry& g) {
  if (g.stride_w == 1) return gather_row<A, 3, 1, 0>;
  if (g.S == 2) return g.pad_w % 2 == 0 ? gather_row<A, 2, 2, 0> : gather_row<A, 2, 2, 1>;
  return g.pad_w % 2 == 0 ? gather_row<A, 3, 2, 0> : gather_row<A, 3, 2, 1>;
}

// A row of `windows` gradients and offsets from `from` on, a vector after the start of the staged row; around them offset -1.
template <class T, class Offset>
[[gnu::noinline]] void stage_windows(const T* grad_output, const Offset* offsets, int64_t from, int64_t count, int64_t windows,
                                     Arithmetic<T>* gradient, IndexOf<Arithmetic<T>>* offset, int64_t pitch) {
  using I = IndexOf<Arithmetic<T>>;
  constexpr int64_t L = kLanes<I>, margin = L;
  const Vec<I> none = broadcast(I(-1));
  store(offset, none);
  for (int64_t q = 0; q < windows; q += L) {
    const int64_t at = from + q, to = margin + q;
    if (at + L <= count) {  // lanes of the next row are no harm: what lies beyond this one is overwritten below
      store(gradient + to, load_wide(grad_output + at));
      store(offset + to, load_unsigned<I>(offsets + at));
    } else {
      for (int64_t j = 0; j < windows - q; ++j) {
        gradient[to + j] = widen(grad_output[at + j]);
        offset[to + j] = static_cast<I>(offsets[at + j]);
      }
    }
  }
  for (int64_t j = margin + windows; j < pitch; j += L) store(offset + std::min(j, pitch - L), none);
}

template <class T, class Offset>
void offset_pool2d_grad_input_gather(const Pool2dGeometry& g, const T* grad_output, const Offset* offsets, T* grad_input) {
  using A = Arithmetic<T>;
  using I = IndexOf<A>;
  constexpr int64_t L = kLanes<A>, margin = L, beyond = 2 * L;
  const auto gather = gather_row_for<A>(g);
  // From a vector before the first window to what the last vector of a row of grad_input looks at.
  const int64_t pitch = margin + round_up_to_lanes<A>(std::max(g.Q, (g.W + g.pad_w) / g.stride_w)) + 3 * L;
  const int64_t count = g.N * g.C * g.P * g.Q;
  constexpr int64_t staged_bytes = 16 * 1024;
  const int64_t staged_rows = std::max<int64_t>(1, staged_bytes / static_cast<int64_t>(pitch * (sizeof(A) + sizeof(I))));
  const int64_t band = std::clamp<int64_t>(staged_rows * g.stride_h - g.R, 1, g.H), bands = ceil_div(g.H, band);
  parallel_for(g.N * g.C * bands, g.R * g.S * ceil_div(g.Q, L) * band / g.stride_h * 4, [&](int64_t task) {
    const int64_t nc = task / bands, h_begin = task % bands * band, h_end = std::min(g.H, h_begin + band);
    const int64_t p_begin = std::max<int64_t>(0, ceil_div(h_begin + g.pad_h - g.R + 1, g.stride_h));
    const int64_t p_end = std::max(p_begin, std::min(g.P, (h_end - 1 + g.pad_h) / g.stride_h + 1));
    A* gradient = workspace<A>(Slot::patches, (p_end - p_begin + 1) * pitch);
    I* offset = workspace<I>(Slot::partial_sums, (p_end - p_begin + 1) * pitch);
    for (int64_t p = p_begin; p < p_end; ++p)
      stage_windows(grad_output, offsets, (nc * g.P + p) * g.Q, count, g.Q, gradient + (p - p_begin) * pitch,
                    offset + (p - p_begin) * pitch, pitch);
    const StagedWindows<A> staged{gradient + margin, offset + margin, pitch, p_begin};
    A* row = workspace<A>(Slot::tile, g.W + beyond);
    for (int64_t h = h_begin; h < h_end; ++h) {
      T* to = grad_input + (nc * g.H + h) * g.W;
      if constexpr (std::is_same_v<T, A>) {
        if ((h_end - h - 1) * g.W >= beyond) {  // what is written beyond this row belongs to rows that follow
          gather(g, staged, h, to);
          continue;
        }
      }
      gather(g, staged, h, row);
      narrow_row(row, g.W, to);
    }
  });
}

}  // namespace torchcnn::TORCHCNN_ISA
