// What the NCHW pooling kernels share: the rows that windows read, and how the work is cut into bands.
//
// Vectors run over the windows q of a row: tap (r, s) of windows q, q + 1, ... is
//
//   data[(p - p_begin) stride_h + r dilation_h][q stride_w + s dilation_w],   and from there every stride_w-th element
//
// Where every window lies inside the plane, rows are read in place. Otherwise a band of rows is staged first, also to convert
// 16-bit elements, to turn signs, and at the end of the tensor, where a vector longer than the row would read beyond it; with a
// neutral value in the padding and up to a vector beyond the last window:
//
//   staged[h][j] = input[h][j - pad_w]          j = 0 ... pitch - 1,  neutral outside the plane
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "../geometry.h"
#include "runtime.h"
#include "simd_convert.h"

namespace torchcnn::TORCHCNN_ISA {

template <class A>
struct Rows {
  const A* data;
  int64_t pitch;
  bool open = false;  // read in place, though windows reach beyond the plane: what lies there must be left out
};

// Rows that are read or written two at a time are streams that break off at every row, which the processor does not foresee. So
// what lies some way ahead is asked for, in the order of memory: `at` is where the next four vectors would be if the rows were
// one. What will be written need come no nearer than L2. Always inline: GCC takes the call of a function that does nothing else
// for one without effect, and drops it.
template <int write, class A>
[[gnu::always_inline]] inline void prefetch_pair(const A* at) {
  constexpr int64_t ahead = 8192, line = 64, pair = 4 * TORCHCNN_VECTOR_BYTES;
#pragma GCC unroll 4
  for (int64_t byte = 0; byte < pair; byte += line)
    __builtin_prefetch(reinterpret_cast<const char*>(at) + ahead + byte, write, write ? 2 : 3);
}

// The same for a row of `count` elements that is read alone, half as far ahead: it needs more work. Where such rows follow each
// other in memory, the processor foresees them better itself.
template <class T>
[[gnu::always_inline]] inline void prefetch_row(const T* row, int64_t count) {
  constexpr int64_t ahead = 4096, line = 64;
  for (int64_t byte = 0; byte < count * int64_t(sizeof(T)); byte += line)
    __builtin_prefetch(reinterpret_cast<const char*>(row) + ahead + byte);
}

template <class T>
inline int64_t round_up_to_lanes(int64_t count) {
  return ceil_div(count, kLanes<T>) * kLanes<T>;
}

// A step that is never taken may be as large as it likes; here it becomes 1.
inline Pool2dGeometry with_steps_taken(Pool2dGeometry g) {
  if (g.P == 1) g.stride_h = 1;
  if (g.Q == 1) g.stride_w = 1;
  if (g.R == 1) g.dilation_h = 1;
  if (g.S == 1) g.dilation_w = 1;
  return g;
}

// A vector of a row of which `count` elements are left; the lanes after them hold anything. Only at the end of the tensor must
// they not be read.
template <class T>
inline Vec<Arithmetic<T>> load_row_end(const T* from, int64_t count, const T* end) {
  return end - from >= kLanes<Arithmetic<T>> ? load_wide(from) : load_wide_partial(from, count);
}

// The same for offsets; `until_end` of them are left in the tensor, `left` of them count.
template <class I, class Offset>
inline Vec<I> load_offsets(const Offset* from, int64_t left, int64_t until_end) {
  if (until_end >= kLanes<I>) return load_unsigned<I>(from);
  Vec<I> v{};
  for (int64_t lane = 0; lane < left; ++lane) v[lane] = static_cast<I>(from[lane]);
  return v;
}

inline bool windows_lie_inside(const Pool2dGeometry& g) {
  return g.pad_h == 0 && g.pad_w == 0 && (g.P - 1) * g.stride_h + g.dilation_h * (g.R - 1) < g.H &&
         (g.Q - 1) * g.stride_w + g.dilation_w * (g.S - 1) < g.W;
}

// One window that covers the plane.
inline bool is_global(const Pool2dGeometry& g) {
  if (g.P != 1 || g.Q != 1) return false;
  const Window row = row_window(g, 0), column = column_window(g, 0);
  const bool dense = g.adaptive || (g.pad_h == 0 && g.pad_w == 0 && g.dilation_h == 1 && g.dilation_w == 1);
  return dense && row.begin == 0 && row.end == g.H && column.begin == 0 && column.end == g.W;
}

// Whether the offset r S + s of a global window is the index h W + w. Windows can be larger than the plane.
inline bool offsets_are_indices(const Pool2dGeometry& g) { return g.adaptive || g.S == g.W || g.H == 1; }

// Rows are read in place if the elements need no conversion and no window needs padding.
template <class T>
inline bool reads_in_place(const Pool2dGeometry& g) {
  return std::is_same_v<T, Arithmetic<T>> && windows_lie_inside(g);
}

// Rows of windows of several vectors are also read in place if windows reach beyond the plane, where the kernels know to leave
// out what lies there: it is memory of the rows before and after.
template <int S, int stride>
inline constexpr bool kCanBeOpen = (S == 3 && (stride == 1 || stride == 2)) || (S == 2 && stride == 2);

template <class T>
inline bool reads_open(const Pool2dGeometry& g) {
  const bool shape = (g.S == 3 && g.stride_w <= 2) || (g.S == 2 && g.stride_w == 2);
  return std::is_same_v<T, Arithmetic<T>> && !g.adaptive && !windows_lie_inside(g) && shape && g.R == g.S && g.dilation_h == 1 &&
         g.dilation_w == 1 && 2 * g.pad_h <= g.R && 2 * g.pad_w <= g.S &&
         g.Q >= 3 * kLanes<T>;  // of fewer vectors too many are at an edge
}

// The taps r = begin ... end - 1 of window p that lie inside the plane, where that is for the kernel to see to.
struct RowsInside {
  int64_t begin, end;
};

template <class A>
inline RowsInside rows_inside(const Pool2dGeometry& g, const Rows<A>& rows, int64_t p) {
  if (!rows.open) return {0, g.R};
  const int64_t top = p * g.stride_h - g.pad_h;
  return {std::max<int64_t>(0, -top), std::min(g.R, g.H - top)};
}

// Whether a vector of windows from q on reads columns beyond the plane.
template <class A>
inline bool reaches_beyond(const Pool2dGeometry& g, int64_t q) {
  const int64_t begin = q * g.stride_w - g.pad_w;
  return begin < 0 || begin + (kLanes<A> - 1) * g.stride_w + g.S > g.W;
}

// Puts a neutral value in the lanes of a vector that lie beyond the plane; the vector starts at column `first + column`.
template <class A, bool edge>
struct InsideColumns {
  const Pool2dGeometry& g;
  int64_t first;
  A neutral;

  Vec<A> operator()(Vec<A> v, int64_t column) const {
    if constexpr (!edge) return v;
    using I = IndexOf<A>;
    const Vec<I> w = steps_of<I>(1) + static_cast<I>(first + column);
    return (w >= 0) & (w < static_cast<I>(g.W)) ? v : broadcast(neutral);
  }
};

template <class A>
inline int64_t staged_pitch(const Pool2dGeometry& g) {
  return round_up_to_lanes<A>(round_up_to_lanes<A>(g.Q) * g.stride_w + g.dilation_w * (g.S - 1) + 2 * kLanes<A>);
}

// A window can be much larger than the plane if it is mostly padding: beyond 64 MiB it is not staged.
template <class A>
inline bool can_be_staged(const Pool2dGeometry& g) {
  const double columns = static_cast<double>(g.dilation_w) * (g.S - 1) + static_cast<double>(g.Q + kLanes<A>) * g.stride_w;
  const double rows = static_cast<double>(g.dilation_h) * (g.R - 1) + 1;
  return rows * columns * sizeof(A) < 64 * 1024 * 1024;
}

// Rows of windows that a task computes: outputs and staged rows stay in the caches next to the core. Where bands are staged at
// the ends of the tensor alone, the outputs decide.
template <class T>
inline int64_t windows_of_band(const Pool2dGeometry& g, bool staged) {
  constexpr int64_t band_outputs = 8192, staged_bytes = 16 * 1024;
  const int64_t by_outputs = std::max<int64_t>(1, band_outputs / g.Q);
  if (!staged) return std::min(g.P, by_outputs);
  const int64_t rows = staged_bytes / static_cast<int64_t>(staged_pitch<Arithmetic<T>>(g) * sizeof(Arithmetic<T>));
  const int64_t by_rows = (rows - g.dilation_h * (g.R - 1) - 1) / g.stride_h + 1;
  return std::clamp<int64_t>(by_rows, 1, std::min(g.P, by_outputs));
}

// Of any type: elements are moved in blocks of a vector, the last overlapping the one before it.
template <class T>
inline void copy_row(const T* from, int64_t count, T* to) {
  constexpr int64_t L = kLanes<T>;
  struct Block {
    char bytes[TORCHCNN_VECTOR_BYTES];
  };
  if (count < L) {
    for (int64_t j = 0; j < count; ++j) to[j] = from[j];
    return;
  }
  for (int64_t j = 0; j < count; j += L) {
    Block block;
    std::memcpy(&block, from + std::min(j, count - L), sizeof block);
    std::memcpy(to + std::min(j, count - L), &block, sizeof block);
  }
}

template <class A>
inline void fill_row(A* to, int64_t count, A value) {  // count: a multiple of kLanes
  for (int64_t j = 0; j < count; j += kLanes<A>) store(to + j, broadcast(value));
}

// Writes the neutral value left and right of `count` elements that are to be written at row[pad ...].
template <class A>
inline void fill_margins(A* row, int64_t pad, int64_t count, int64_t pitch, A neutral) {
  for (int64_t j = 0; j < pad; j += kLanes<A>) store(row + j, broadcast(neutral));
  for (int64_t j = (pad + count) / kLanes<A> * kLanes<A>; j < pitch; j += kLanes<A>) store(row + j, broadcast(neutral));
}

// The rows of windows p_begin ... p_end - 1, in the workspace of the calling thread; with the sign changed if `negate`.
template <class T>
Rows<Arithmetic<T>> stage_rows(const Pool2dGeometry& g, const T* plane, int64_t p_begin, int64_t p_end, Arithmetic<T> neutral,
                               bool negate) {
  using A = Arithmetic<T>;
  const int64_t first = p_begin * g.stride_h - g.pad_h, pitch = staged_pitch<A>(g);
  const int64_t rows = (p_end - 1 - p_begin) * g.stride_h + g.dilation_h * (g.R - 1) + 1;
  const int64_t columns = std::min(g.W, pitch - round_up_to_lanes<A>(g.pad_w));
  // The left padding ends where a vector does, so that the copies are aligned.
  const int64_t margin = round_up_to_lanes<A>(g.pad_w), start = margin - g.pad_w;
  A* staged = workspace<A>(Slot::patches, rows * pitch);
  for (int64_t row = 0; row < rows; ++row) {
    A* to = staged + row * pitch;
    const int64_t h = first + row;
    if (h < 0 || h >= g.H) {
      fill_row(to, pitch, neutral);
      continue;
    }
    fill_margins(to, margin, columns, pitch, neutral);
    prefetch_row(plane + h * g.W, g.W);
    widen_row(plane + h * g.W, columns, to + margin);
    if (!negate) continue;
    for (int64_t w = 0; w < columns; ++w) to[margin + w] = -to[margin + w];
  }
  return {staged + start, pitch};
}

// The upper half of the lanes, then the lower.
template <class V>
inline V upper_half_first(V v) {
  using T = std::remove_cvref_t<decltype(v[0])>;
  constexpr int lanes = sizeof(V) / sizeof(T);
  return shuffled<T, lanes>(v, v, [](int lane) { return (lane + lanes / 2) % lanes; }, std::make_index_sequence<lanes>{});
}

// 2x2 windows that need no padding, side by side in a row.
inline bool is_plain_2x2(const Pool2dGeometry& g) {
  return g.R == 2 && g.S == 2 && g.stride_w == 2 && g.dilation_h == 1 && g.dilation_w == 1 && windows_lie_inside(g);
}

// Calls visit(q) for the vectors of a row of `count` elements, one vector at least; the last overlaps the one before it.
template <int64_t lanes, class Visit>
[[gnu::always_inline]] inline void for_each_vector_of_row(int64_t count, Visit visit) {
  for (int64_t next = 0; next < count; next += lanes) visit(std::min(next, count - lanes));
}

// Calls visit(nc, p_begin, p_end, rows) for bands of windows that together cover every plane. `tap_cost` is the number of
// instructions that a tap of a vector of windows costs, roughly. may_be_open: whether rows that windows reach beyond may be open.
template <class T, class Visit>
void for_each_band(const Pool2dGeometry& g, const T* input, Arithmetic<T> neutral, bool negate, bool may_be_open,
                   int64_t tap_cost, Visit visit) {
  using A = Arithmetic<T>;
  const bool in_place = reads_in_place<T>(g) && !negate;
  const int64_t band = windows_of_band<T>(g, !in_place && !may_be_open), bands = ceil_div(g.P, band);
  parallel_for(g.N * g.C * bands, g.R * g.S * ceil_div(g.Q, kLanes<A>) * band * tap_cost, [&](int64_t task) {
    const int64_t nc = task / bands, p_end = std::min(g.P, (task % bands + 1) * band);
    int64_t p_begin = task % bands * band;
    const T* plane = input + nc * g.H * g.W;
    if constexpr (std::is_same_v<T, A>) {
      const int64_t reach = (g.Q - 1) * g.stride_w + g.dilation_w * (g.S - 1) + 1;
      if (in_place) {
        // The vector of a row that is shorter than it reads beyond: into the next plane, but not beyond the last.
        const int64_t beyond = std::max<int64_t>(0, kLanes<A> - g.Q) * g.stride_w + 1;
        const int64_t spare = ((g.N * g.C - nc) * g.H - g.dilation_h * (g.R - 1)) * g.W - reach - beyond;
        int64_t readable = p_end;
        if (g.Q < kLanes<A>) readable = spare < 0 ? p_begin : std::clamp(spare / (g.stride_h * g.W) + 1, p_begin, p_end);
        if (readable > p_begin) visit(nc, p_begin, readable, Rows<A>{plane + p_begin * g.stride_h * g.W, g.W});
        if (readable == p_end) return;
        p_begin = readable;
      }
      // Not at the ends of the tensor, beyond which nothing may be read.
      const int64_t top = p_begin * g.stride_h - g.pad_h,
                    bottom = std::min(g.H - 1, (p_end - 1) * g.stride_h - g.pad_h + g.R - 1);
      if (may_be_open && (nc > 0 || top > 0) && (nc * g.H + bottom) * g.W - g.pad_w + reach <= g.N * g.C * g.H * g.W)
        return visit(nc, p_begin, p_end, Rows<A>{plane + top * g.W - g.pad_w, g.W, true});
    }
    visit(nc, p_begin, p_end, stage_rows(g, plane, p_begin, p_end, neutral, negate));
  });
}

// The windows that contain a position of one axis: first[i] ... last[i], none if first[i] > last[i]. Without dilation they follow
// each other.
struct Cover {
  const int64_t* first;
  const int64_t* last;
};

template <class WindowOf>
Cover cover_of(int64_t size, int64_t windows, int64_t* table, WindowOf window_of) {  // table: 2 size elements
  int64_t *first = table, *last = table + size;
  for (int64_t i = 0; i < size; ++i) {
    first[i] = 1;
    last[i] = 0;
  }
  for (int64_t p = windows - 1; p >= 0; --p) {
    const Window window = window_of(p);
    for (int64_t i = window.begin; i < window.end; ++i) {
      if (first[i] > last[i]) last[i] = p;
      first[i] = p;
    }
  }
  return {first, last};
}

// The end of the positions from w on that lie in the same windows.
inline int64_t end_of_run(const Cover& columns, int64_t w, int64_t W) {
  int64_t end = w + 1;
  while (end < W && columns.first[end] == columns.first[w] && columns.last[end] == columns.last[w]) ++end;
  return end;
}

// Calls visit.template operator()<vectors>(at) for up to four vectors of a row at once; vector v starts at column at[v], the last
// at W - kLanes to end with the row.
template <class A, class Visit>
inline void for_each_columns(int64_t W, Visit visit) {
  constexpr int64_t L = kLanes<A>;
  const int64_t last = std::max<int64_t>(0, W - L);
  for (int64_t w = 0; w < W; w += 4 * L) {
    const int64_t at[4] = {w, std::min(w + L, last), std::min(w + 2 * L, last), std::min(w + 3 * L, last)};
    switch (std::min<int64_t>(4, ceil_div(W - w, L))) {
      case 1: {
        const int64_t only[1] = {std::min(w, last)};
        visit.template operator()<1>(only);
        break;
      }
      case 2: visit.template operator()<2>(at); break;
      case 3: visit.template operator()<3>(at); break;
      default: visit.template operator()<4>(at);
    }
  }
}

// Windows of 2x2 that tile the plane; a row and a column may be left over.
inline bool is_tiling_2x2(const Pool2dGeometry& g) {
  return !g.adaptive && g.R == 2 && g.S == 2 && g.stride_h == 2 && g.stride_w == 2 && g.dilation_h == 1 && g.dilation_w == 1 &&
         windows_lie_inside(g);
}

// Planes of which nothing is left over are one tall plane: a short row may then be written with a whole vector everywhere but at
// the end of a task. Positions in the plane would count on: their kernel has to know where a plane ends.
inline Pool2dGeometry as_one_plane(Pool2dGeometry g) {
  g.H *= g.N * g.C, g.P *= g.N * g.C;
  g.N = g.C = 1;
  return g;
}

inline bool is_one_plane_2x2(const Pool2dGeometry& g) { return g.layout == Layout::nchw && is_tiling_2x2(g) && 2 * g.P == g.H; }

// grad_input of windows that tile the plane. vector(i, element) gives what windows i, i + 1, ... (flat positions in grad_output)
// put into their element r S + s; scalar(i, element) the same for one.
template <class A, class VectorOf, class ScalarOf>
void write_tiles_2x2(const Pool2dGeometry& g, A* grad_input, VectorOf vector, ScalarOf scalar) {
  constexpr int64_t L = kLanes<A>;
  constexpr auto each = kEachLane<A>;
  const int64_t band = std::clamp<int64_t>(8192 / g.W, 1, g.P), bands = ceil_div(g.P, band), windows = g.N * g.C * g.P * g.Q;
  const int64_t Q = g.Q, W = g.W;
  const bool half = 2 * Q <= L, odd = 2 * Q < W, overlaps = (half ? L : 2 * L) <= 3 * W;
  parallel_for(g.N * g.C * bands, band * ceil_div(g.Q, L) * 22, [&](int64_t task) {
    const int64_t nc = task / bands, p_begin = task % bands * band, p_end = std::min(g.P, p_begin + band);
    A* plane = grad_input + nc * g.H * g.W;
    int64_t p = p_begin, row = (nc * g.P + p) * Q;
    A* top = plane + 2 * p * W;
    const auto write = [=](A* top, int64_t row) __attribute__((always_inline)) {
      const auto elements = vector(row);
      A* bottom = top + W;
      store(top, interleave<A>(elements[0], elements[1], 0, each));
      if (!half) store(top + L, interleave<A>(elements[0], elements[1], 1, each));
      if (odd && Q < L) bottom[-1] = 0;
      store(bottom, interleave<A>(elements[2], elements[3], 0, each));
      if (!half) store(bottom + L, interleave<A>(elements[2], elements[3], 1, each));
      if (odd && Q < L) bottom[W - 1] = 0;
    };
    if (Q < L && overlaps && windows >= L) {
      // A vector longer than a row writes into the rows below, which are written later: not at the end of the task, nor, where
      // nothing may be read beyond it, of the tensor.
      const int64_t whole = std::min(p_end - 1, (windows - L) / Q + 1 - nc * g.P);
      for (; p < whole; ++p, row += Q, top += 2 * W) write(top, row);
    }
    for (; Q >= L && p < p_end; ++p, row += Q, top += 2 * W) {
      for_each_vector_of_row<L>(Q, [&](int64_t q) __attribute__((always_inline)) {
        prefetch_pair<1, A>(top + 4 * q);
        write(top + 2 * q, row + q);
      });
      if (odd) top[W - 1] = top[2 * W - 1] = 0;
    }
    for (; p < p_end; ++p, row += Q, top += 2 * W) {
      A* bottom = top + W;
      if (row + L <= windows) {
        const auto elements = vector(row);
        store_interleaved<A>(top, elements[0], elements[1], Q);
        store_interleaved<A>(bottom, elements[2], elements[3], Q);
      } else {
        for (int64_t q = 0; q < Q; ++q) {
          for (int s = 0; s < 2; ++s) {
            top[2 * q + s] = scalar(row + q, s);
            bottom[2 * q + s] = scalar(row + q, 2 + s);
          }
        }
      }
      if (odd) top[W - 1] = bottom[W - 1] = 0;
    }
    if (p_end == g.P && 2 * g.P < g.H) std::fill_n(plane + 2 * g.P * g.W, g.W, A(0));
  });
}

template <class A>
struct Tiles {
  Vec<A> element[4];
  Vec<A> operator[](int i) const { return element[i]; }
};

}  // namespace torchcnn::TORCHCNN_ISA
