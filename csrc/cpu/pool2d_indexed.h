// The kernels that follow indices h W + w into a plane: no arithmetic to vectorise, so one version serves every instruction set.
//
//   scatter_add     grad_input[n,c,indices[n,c,p,q]] += grad_output[n,c,p,q]      max, min and adaptive max pooling, backward
//   scatter_assign  output[n,c,indices[n,c,p,q]]      = input[n,c,p,q]            max_unpool2d; of equal indices the last stays
//   gather          output[n,c,p,q] = source[n,c,indices[n,c,p,q]]               derivative of both
//
// One thread owns a plane (in channels_last, a range of channels of one image), so the order of every sum is fixed and no
// atomics are needed. The caller has checked the indices.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../geometry.h"
#include "runtime.h"

namespace torchcnn {

// Calls visit(flat offset among the (p, q) positions, offset of channel c of image n with h W + w = 0, stride of h W + w) for
// every output position, in the order that one thread owns.
template <class Visit>
void for_each_indexed(const Pool2dGeometry& g, Visit visit) {
  const int64_t positions = g.P * g.Q, plane = g.H * g.W;
  if (g.layout == Layout::nchw) {
    parallel_for(g.N * g.C, positions, [&](int64_t nc) {
      for (int64_t x = 0; x < positions; ++x) visit(nc * positions + x, nc * plane, int64_t(1));
    });
    return;
  }
  constexpr int64_t chunk = 32;
  const int64_t chunks = ceil_div(g.C, chunk);
  parallel_for(g.N * chunks, positions * chunk, [&](int64_t task) {
    const int64_t n = task / chunks, c_begin = task % chunks * chunk, c_end = std::min(g.C, c_begin + chunk);
    for (int64_t x = 0; x < positions; ++x)
      for (int64_t c = c_begin; c < c_end; ++c) visit((n * positions + x) * g.C + c, n * plane * g.C + c, g.C);
  });
}

// The first index outside 0 ... H W - 1, or -1.
inline int64_t first_bad_index(const int64_t* indices, int64_t count, int64_t plane) {
  for (int64_t i = 0; i < count; ++i)
    if (indices[i] < 0 || indices[i] >= plane) return i;
  return -1;
}

template <class T>
void zero(T* data, int64_t count) {
  constexpr int64_t block = 1 << 16;
  parallel_for(ceil_div(count, block), block / 8,
               [&](int64_t task) { std::fill(data + task * block, data + std::min(count, (task + 1) * block), T(0)); });
}

template <class T>
void pool2d_scatter_add(const Pool2dGeometry& g, const T* grad_output, const int64_t* indices, T* grad_input) {
  zero(grad_input, g.N * g.C * g.H * g.W);
  for_each_indexed(
      g, [&](int64_t from, int64_t to, int64_t stride) { grad_input[to + indices[from] * stride] += grad_output[from]; });
}

template <class T>
void pool2d_scatter_assign(const Pool2dGeometry& g, const T* input, const int64_t* indices, T* output) {
  zero(output, g.N * g.C * g.H * g.W);
  for_each_indexed(g, [&](int64_t from, int64_t to, int64_t stride) { output[to + indices[from] * stride] = input[from]; });
}

template <class T>
void pool2d_gather(const Pool2dGeometry& g, const T* source, const int64_t* indices, T* output) {
  for_each_indexed(g, [&](int64_t from, int64_t to, int64_t stride) { output[from] = source[to + indices[from] * stride]; });
}

}  // namespace torchcnn
