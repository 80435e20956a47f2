// The kernels that follow positions into a plane: no arithmetic to vectorise, so one version serves every instruction set.
//
//   scatter_add      grad_input[n,c,indices[n,c,p,q]] += grad_output[n,c,p,q]     max, min and adaptive max pooling, backward
//   scatter_offsets  the same where offsets r S + s into the window of (p, q) stand in the place of the indices
//   scatter_assign   output[n,c,indices[n,c,p,q]] = input[n,c,p,q]                max_unpool2d; of equal indices the last stays
//   gather           output[n,c,p,q] = source[n,c,indices[n,c,p,q]]              derivative of both
//   gather_offsets   the same for offsets
//
// One thread owns a plane (in channels_last, some channels of one image), so the order of every sum is fixed and no atomics are
// needed. A position outside the plane is never touched: an index there is reported, and an offset of no tap counts for nothing,
// which is how relu_max_pool2d says that no value of the window came through. Offsets of taps in the padding, which no forward
// pass writes, count for nothing or lead to another element of the tensor.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../geometry.h"
#include "element.h"
#include "runtime.h"

namespace torchcnn {

inline constexpr int64_t kChannelsOfTask = 32;

// Calls visit(n, first channel, channels) for the parts that one thread owns.
template <class Visit>
void for_each_owned(const Pool2dGeometry& g, Visit visit) {
  const int64_t channels = g.layout == Layout::nchw || g.C == 0 ? 1 : std::min(g.C, kChannelsOfTask),
                parts = ceil_div(g.C, channels);
  parallel_for(g.N * parts, (g.P * g.Q * 2 + g.H * g.W / 8) * channels, [&](int64_t task) {
    const int64_t c = task % parts * channels;
    visit(task / parts, c, std::min(channels, g.C - c));
  });
}

// Calls visit(p, q, c, flat offset of the element (n, c, p, q)) for every window of a part.
template <class Visit>
void for_each_window(const Pool2dGeometry& g, int64_t n, int64_t c_begin, int64_t channels, Visit visit) {
  const Strides out = g.output_strides();
  if (g.layout == Layout::nchw) {  // one channel, whose windows follow each other
    int64_t at = n * out.n + c_begin * out.c;
    for (int64_t p = 0; p < g.P; ++p)
      for (int64_t q = 0; q < g.Q; ++q) visit(p, q, c_begin, at++);
    return;
  }
  for (int64_t p = 0; p < g.P; ++p)
    for (int64_t q = 0; q < g.Q; ++q)
      for (int64_t c = c_begin; c < c_begin + channels; ++c) visit(p, q, c, n * out.n + c * out.c + p * out.h + q * out.w);
}

// A zeroed plane of each channel of a part, in the tensor itself or, if sums have another type than it, beside it.
template <class T>
struct OwnedPlanes {
  using A = Arithmetic<T>;
  const Pool2dGeometry& g;
  T* tensor;  // channel c_begin of image n
  A* sums;
  int64_t c_begin, channels, tensor_step, step;

  OwnedPlanes(const Pool2dGeometry& g, T* whole, int64_t n, int64_t c_begin, int64_t channels)
      : g(g),
        tensor(whole + n * g.input_strides().n + c_begin * g.input_strides().c),
        c_begin(c_begin),
        channels(channels),
        tensor_step(g.layout == Layout::nchw ? 1 : g.C) {
    const int64_t plane = g.H * g.W;
    if constexpr (std::is_same_v<T, A>) {
      sums = tensor;
      step = tensor_step;
      for (int64_t i = 0; i < (step == channels ? 1 : plane); ++i)
        std::fill_n(sums + i * step, step == channels ? plane * channels : channels, A(0));
    } else {
      sums = workspace<A>(Slot::patches, plane * channels);
      step = channels;
      std::fill_n(sums, plane * channels, A(0));
    }
  }

  A& at(int64_t index, int64_t c) const { return sums[step == 1 ? index : index * step + c - c_begin]; }

  void write_back() const {
    if constexpr (!std::is_same_v<T, A>) {
      for (int64_t i = 0; i < g.H * g.W; ++i)
        for (int64_t c = 0; c < channels; ++c) tensor[i * tensor_step + c] = narrow<T>(sums[i * step + c]);
    }
  }
};

// Calls visit(i) for i < count, of four parts in turn: neighbours often choose the same element, where the second addition must
// wait for the first.
template <class Visit>
[[gnu::always_inline]] inline void in_four_parts(int64_t count, Visit visit) {
  const int64_t part = count / 4;
  for (int64_t i = 0; i < part; ++i) {
    visit(i);
    visit(part + i);
    visit(2 * part + i);
    visit(3 * part + i);
  }
  for (int64_t i = 4 * part; i < count; ++i) visit(i);
}

// Where planes follow each other: as many as the nearest cache holds are zeroed together, or the next one where only few elements
// are touched again: an addition waits until what memset wrote has arrived. indices_of(nc)(i) is the index of window i of plane
// nc, of any integer type; one outside the plane as an unsigned number is not touched. Whether there was none such.
template <class T, class IndicesOf>
bool pool2d_scatter_add_planes(const Pool2dGeometry& g, const T* grad_output, IndicesOf indices_of, T* grad_input) {
  using A = Arithmetic<T>;
  std::atomic<bool> inside = true;
  const int64_t plane = g.H * g.W, windows = g.P * g.Q, planes = g.N * g.C;
  const int64_t zeroed_bytes = (16 * windows < plane ? 128 : 16) * 1024;
  const int64_t together = std::clamp<int64_t>(zeroed_bytes / static_cast<int64_t>(plane * sizeof(A)), 1, planes);
  parallel_for(ceil_div(planes, together), (windows * 2 + plane / 8) * together, [&](int64_t task) {
    const int64_t first = task * together, end = std::min(planes, first + together), elements = (end - first) * plane;
    A* to;
    if constexpr (std::is_same_v<T, A>) {
      to = grad_input + first * plane;
    } else {
      to = workspace<A>(Slot::patches, elements);
    }
    std::memset(static_cast<void*>(to), 0, static_cast<size_t>(elements) * sizeof(A));
    bool all_inside = true;
    for (int64_t nc = first; nc < end; ++nc) {
      A* sums = to + (nc - first) * plane;
      const T* gradient = grad_output + nc * windows;
      const auto index_of = indices_of(nc);
      in_four_parts(windows, [&](int64_t i) {
        const auto index = index_of(i);
        const bool is_inside = static_cast<std::make_unsigned_t<decltype(index_of(i))>>(index) < static_cast<uint64_t>(plane);
        if (is_inside) sums[index] += widen(gradient[i]);
        all_inside &= is_inside;
      });
    }
    if constexpr (!std::is_same_v<T, A>) {
      for (int64_t i = 0; i < elements; ++i) grad_input[first * plane + i] = narrow<T>(to[i]);
    }
    if (!all_inside) inside.store(false, std::memory_order_relaxed);
  });
  return inside;
}

// Whether every index lay in the plane.
template <class T>
bool pool2d_scatter_add(const Pool2dGeometry& g, const T* grad_output, const int64_t* indices, T* grad_input) {
  const WorkspaceUse use;
  if (g.N * g.C * g.H * g.W == 0) return g.N * g.C * g.P * g.Q == 0;
  if (g.layout == Layout::nchw || g.C == 1) {
    const auto indices_of = [=, windows = g.P * g.Q](int64_t nc) {
      return [index = indices + nc * windows](int64_t i) { return index[i]; };
    };
    return pool2d_scatter_add_planes(g, grad_output, indices_of, grad_input);
  }
  std::atomic<bool> inside = true;
  const uint64_t plane = static_cast<uint64_t>(g.H * g.W);
  for_each_owned(g, [&](int64_t n, int64_t c_begin, int64_t channels) {
    const OwnedPlanes<T> planes(g, grad_input, n, c_begin, channels);
    bool all_inside = true;
    for_each_window(g, n, c_begin, channels, [&](int64_t, int64_t, int64_t c, int64_t from) {
      const uint64_t index = static_cast<uint64_t>(indices[from]);
      if (index < plane) planes.at(static_cast<int64_t>(index), c) += widen(grad_output[from]);
      all_inside &= index < plane;
    });
    planes.write_back();
    if (!all_inside) inside.store(false, std::memory_order_relaxed);
  });
  return inside;
}

template <class T>
bool pool2d_scatter_assign(const Pool2dGeometry& g, const T* input, const int64_t* indices, T* output) {
  static_assert(!kIsLowPrecision<T>);  // their bits are moved
  std::atomic<bool> inside = true;
  const uint64_t plane = static_cast<uint64_t>(g.H * g.W);
  for_each_owned(g, [&](int64_t n, int64_t c_begin, int64_t channels) {
    const OwnedPlanes<T> planes(g, output, n, c_begin, channels);
    bool all_inside = true;
    for_each_window(g, n, c_begin, channels, [&](int64_t, int64_t, int64_t c, int64_t from) {
      const int64_t index = indices[from];
      if (static_cast<uint64_t>(index) < plane) {
        planes.at(index, c) = input[from];
      } else {
        all_inside = false;
      }
    });
    if (!all_inside) inside.store(false, std::memory_order_relaxed);
  });
  return inside;
}

template <class T>
bool pool2d_gather(const Pool2dGeometry& g, const T* source, const int64_t* indices, T* output) {
  std::atomic<bool> inside = true;
  const uint64_t plane = static_cast<uint64_t>(g.H * g.W);
  const Strides in = g.input_strides();
  const int64_t step = g.layout == Layout::nchw ? 1 : g.C;
  for_each_owned(g, [&](int64_t n, int64_t c_begin, int64_t channels) {
    bool all_inside = true;
    for_each_window(g, n, c_begin, channels, [&](int64_t, int64_t, int64_t c, int64_t to) {
      const int64_t index = indices[to];
      const bool is_inside = static_cast<uint64_t>(index) < plane;
      output[to] = is_inside ? source[n * in.n + c * in.c + index * step] : T(0);
      all_inside &= is_inside;
    });
    if (!all_inside) inside.store(false, std::memory_order_relaxed);
  });
  return inside;
}

// Where the taps of a window stand relative to tap (0, 0).
struct Tap {
  int64_t h, w, index;  // index = h W + w
};

inline const Tap* taps_of(const Pool2dGeometry& g) {
  Tap* taps = workspace<Tap>(Slot::tables, g.R * g.S);
  for (int64_t r = 0; r < g.R; ++r) {
    for (int64_t s = 0; s < g.S; ++s) {
      const int64_t h = r * g.dilation_h, w = s * g.dilation_w;
      taps[r * g.S + s] = {h, w, h * g.W + w};
    }
  }
  return taps;
}

// The index h W + w of an offset in the window of (p, q), or -1 if it lies outside the window or the plane.
inline int64_t index_of_offset(const Pool2dGeometry& g, const Tap* taps, int64_t p, int64_t q, int64_t offset) {
  if (static_cast<uint64_t>(offset) >= static_cast<uint64_t>(g.R * g.S)) return -1;
  const int64_t h = p * g.stride_h - g.pad_h + taps[offset].h, w = q * g.stride_w - g.pad_w + taps[offset].w;
  const bool inside =
      static_cast<uint64_t>(h) < static_cast<uint64_t>(g.H) && static_cast<uint64_t>(w) < static_cast<uint64_t>(g.W);
  return inside ? h * g.W + w : -1;
}

// The index of an offset is that of the window's tap (0, 0), which may lie in the padding, and what the tap adds to it: a table
// each, of numbers below kFar. A byte that stands for no tap leads out of every plane.
class OffsetTables {
 public:
  static constexpr int64_t kBytes = 256, kFar = int64_t(1) << 29;

  static bool suit(const Pool2dGeometry& g) {
    const double rows = static_cast<double>(g.H) + g.pad_h + static_cast<double>(g.dilation_h) * g.R;
    const double columns = static_cast<double>(g.W) + g.pad_w + static_cast<double>(g.dilation_w) * g.S;
    constexpr int64_t most_windows = 1 << 20;  // the table is kept with the other scratch memory
    return !g.adaptive && g.R * g.S <= kBytes && g.P <= most_windows / g.Q && rows * static_cast<double>(g.W) + columns < kFar;
  }

  explicit OffsetTables(const Pool2dGeometry& g) : added(workspace<int32_t>(Slot::tables, kBytes + g.P * g.Q)) {
    origin = added + kBytes;
    for (int64_t offset = 0; offset < kBytes; ++offset) {
      const int64_t r = offset / g.S, s = offset % g.S;
      added[offset] = static_cast<int32_t>(r < g.R ? r * g.dilation_h * g.W + s * g.dilation_w : -2 * kFar);
    }
    for (int64_t p = 0; p < g.P; ++p)
      for (int64_t q = 0; q < g.Q; ++q)
        origin[p * g.Q + q] = static_cast<int32_t>((p * g.stride_h - g.pad_h) * g.W + q * g.stride_w - g.pad_w);
  }

  int32_t index(int64_t window, uint8_t offset) const { return origin[window] + added[offset]; }

 private:
  int32_t *added, *origin;
};

template <class T, class Offset>
void pool2d_scatter_offsets(const Pool2dGeometry& g, const T* grad_output, const Offset* offsets, T* grad_input) {
  const WorkspaceUse use;
  if constexpr (std::is_same_v<Offset, uint8_t>) {
    if (g.layout == Layout::nchw && g.N * g.C * g.H * g.W > 0 && OffsetTables::suit(g)) {
      const OffsetTables tables(g);
      const auto indices_of = [=, windows = g.P * g.Q](int64_t nc) {
        return [tables, offset = offsets + nc * windows](int64_t i) { return tables.index(i, offset[i]); };
      };
      pool2d_scatter_add_planes(g, grad_output, indices_of, grad_input);
      return;
    }
  }
  const Tap* taps = taps_of(g);
  for_each_owned(g, [&](int64_t n, int64_t c_begin, int64_t channels) {
    const OwnedPlanes<T> planes(g, grad_input, n, c_begin, channels);
    for_each_window(g, n, c_begin, channels, [&](int64_t p, int64_t q, int64_t c, int64_t from) {
      const int64_t index = index_of_offset(g, taps, p, q, offsets[from]);
      if (index >= 0) planes.at(index, c) += widen(grad_output[from]);
    });
    planes.write_back();
  });
}

template <class T, class Offset>
void pool2d_gather_offsets(const Pool2dGeometry& g, const T* source, const Offset* offsets, T* output) {
  const WorkspaceUse use;
  const Tap* taps = taps_of(g);
  const Strides in = g.input_strides();
  const int64_t step = g.layout == Layout::nchw ? 1 : g.C;
  for_each_owned(g, [&](int64_t n, int64_t c_begin, int64_t channels) {
    for_each_window(g, n, c_begin, channels, [&](int64_t p, int64_t q, int64_t c, int64_t to) {
      const int64_t index = index_of_offset(g, taps, p, q, offsets[to]);
      output[to] = index >= 0 ? source[n * in.n + c * in.c + index * step] : T(0);
    });
  });
}

}  // namespace torchcnn
