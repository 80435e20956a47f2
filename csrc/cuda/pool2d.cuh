// How the pooling kernels share a tensor out among threads.
//
// An item is what is written at once: one element, or in channels_last V neighbouring channels (16 bytes). Items are numbered as
// they lie in memory, so item i begins at element i V in both layouts.
//
// A team of 2^rows_log x 2^columns_log threads shares an item: its members take every so-many-th row and column of the window,
// then add up (or compare) pairwise in a fixed tree. Teams of one are the rule; large windows that hardly overlap, as those of a
// global pool, have larger ones. A block of 256 threads, for teams of L threads and 2^neighbours_log = B:
//
//   thread t:  item (block 256 / (L B) + t / (L B)) B + t % B,   member t / B % L
//
// so that neighbouring threads read neighbouring addresses: along a row in NCHW (B = 1), along the channels in channels_last.
#pragma once

#include <algorithm>

#include "common.cuh"

namespace torchcnn::cuda {

// Three blocks at once leave a thread 80 registers: enough for every kernel here, while the loads of 24 warps hide each other.
inline constexpr int kPoolThreads = 256, kPoolThreadsLog = 8, kPoolBlocks = 3;

template <class T, int V>
struct alignas(std::min<size_t>(16, sizeof(T) * V)) Elements {
  T of[V];
};

template <int V, class T>
__device__ Elements<T, V> load(const T* from) {
  return *reinterpret_cast<const Elements<T, V>*>(from);
}

template <int V, class T>
__device__ void store(T* to, const Elements<T, V>& elements) {
  *reinterpret_cast<Elements<T, V>*>(to) = elements;
}

// The channels of an item where they are read as vectors.
template <class T>
inline constexpr int kVector = 16 / sizeof(T);

template <class T, class... Pointers>
bool in_vectors(const Pool2dGeometry& g, const Pointers*... pointers) {
  const auto aligned = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; };
  return g.layout == Layout::channels_last && g.C % kVector<T> == 0 && (aligned(pointers) && ...);
}

// Where an item of an activation N x C x rows x columns stands; c is its first channel.
struct Place {
  int64_t n, c, row, column;
};

__device__ inline Place place_of(int64_t element, Layout layout, int64_t C, int64_t rows, int64_t columns) {
  Place place;
  const auto next = [&](int64_t size) {
    const int64_t rest = element / size, remainder = element - rest * size;
    element = rest;
    return remainder;
  };
  if (layout == Layout::channels_last) place.c = next(C);
  place.column = next(columns);
  place.row = next(rows);
  if (layout == Layout::nchw) place.c = next(C);
  place.n = element;
  return place;
}

struct Team {
  int rows_log, columns_log, neighbours_log;

  constexpr int size_log() const { return rows_log + columns_log; }
  constexpr int items_of_block() const { return kPoolThreads >> size_log(); }
};

inline constexpr Team kSingle{0, 0, kPoolThreadsLog};

// Teams for the windows of a pool, from the geometry of one image alone.
inline Team team_for(const Pool2dGeometry& g, int V) {
  constexpr int64_t least_taps = 32;
  const int64_t rows = g.adaptive ? ceil_div(g.H, g.P) : std::min(g.R, g.H),
                columns = g.adaptive ? ceil_div(g.W, g.Q) : std::min(g.S, g.W);
  if (rows * columns < least_taps || rows * columns > 2 * g.H * g.W / (g.P * g.Q)) return kSingle;
  Team team{0, 0, 0};
  if (g.layout == Layout::channels_last)
    while (team.neighbours_log < 3 && 1 << team.neighbours_log < g.C / V) ++team.neighbours_log;
  while (team.columns_log < kPoolThreadsLog - 3 && 1 << team.columns_log < columns) ++team.columns_log;
  const int most = kPoolThreadsLog - team.neighbours_log;
  while (team.size_log() < most && 4 << team.rows_log <= rows) ++team.rows_log;
  return team;
}

// The part of a thread in block `block`.
struct Member {
  int64_t item;
  int number, row, column;

  __device__ Member(const Team& team, int64_t block) {
    const int thread = threadIdx.x, together = team.neighbours_log + team.size_log();
    const int64_t group = (block << (kPoolThreadsLog - together)) + (thread >> together);
    item = (group << team.neighbours_log) + (thread & ((1 << team.neighbours_log) - 1));
    number = thread >> team.neighbours_log & ((1 << team.size_log()) - 1);
    row = number >> team.columns_log;
    column = number & ((1 << team.columns_log) - 1);
  }
};

// Takes the values of a team together in member 0. All threads of the block call it.
template <class Value, class Take>
__device__ void take_together(const Team& team, const Member& member, Value& mine, Take take) {
  if (team.size_log() == 0) return;
  Value* const shared = reinterpret_cast<Value*>(dynamic_shared_memory());
  shared[threadIdx.x] = mine;
  __syncthreads();
  for (int half = 1 << team.size_log() >> 1; half > 0; half >>= 1) {
    if (member.number < half) {
      take(mine, shared[threadIdx.x + (half << team.neighbours_log)]);
      shared[threadIdx.x] = mine;
    }
    __syncthreads();
  }
}

template <class Value>
size_t shared_bytes(const Team& team) {
  return team.size_log() == 0 ? 0 : kPoolThreads * sizeof(Value);
}

inline unsigned pool_blocks(int64_t items, const Team& team) {
  return static_cast<unsigned>(std::min<int64_t>(ceil_div(items, team.items_of_block()), INT32_MAX));
}

}  // namespace torchcnn::cuda
