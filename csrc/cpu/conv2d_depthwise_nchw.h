// Depthwise convolution of NCHW tensors: vectors run along a row. A strip of output rows of a plane sees the source through a
// table of row pointers, in which rows above and below the image point to a row of zeros. Runs of columns that cross the left or
// right edge, or all of them when step is above 1, read packed rows instead: zero-padded, split by column modulo step,
//
//   packed[row][column phase f][k]  =  source[row][k step + f + first offset]
//
// so that a tap is a plain load at a fixed distance there too. The last vector of a run overlaps the one before it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "../geometry.h"
#include "conv2d_depthwise_axes.h"
#include "runtime.h"
#include "simd.h"

namespace torchcnn::TORCHCNN_ISA::depthwise::nchw {

// Output rows in a register tile, so that an input row is loaded once for several of them.
inline constexpr int64_t row_block = 4;

// Output columns begin ... end - 1, all read from packed rows or all in place.
struct Run {
  int64_t begin, end;
  bool in_place;
};

// Columns from, from + step, ... of a source row, `count` of them, go to the elements from `to` on of a packed row. Elements of
// begin ... end - 1 before and after them are zeros.
struct Copy {
  int64_t from, count, to, begin, end;
};

// How a correlation cuts planes into strips and rows into runs.
template <class T>
struct Plan {
  const Axes& axes;
  int64_t positions, strips;   // rows of phase 0 in a strip
  int64_t rows;                // source rows that a strip reads, entries of its row table
  int64_t phase_pitch, pitch;  // distances between column phases and between packed rows, in elements
  int64_t copies = 0;
  Copy* copy;
  const Run* runs;         // three for each phase of columns
  const int64_t* columns;  // where the column taps of all phases lie in a packed row; in place, the same with step = 1

  explicit Plan(const Axes& a) : axes(a) {
    constexpr int64_t lanes = kLanes<T>, tile = 2 * lanes;
    const Axis &h = axes.h, &w = axes.w;
    const int64_t positions_w = w.phase[0].positions, positions_h = h.phase[0].positions;
    const int64_t extent = std::max(positions_w, lanes) + w.span() / w.step;  // elements of a column phase that are read
    // Two vectors of slack: zeros and the last columns are stored in whole vectors.
    phase_pitch = (ceil_div(extent, lanes) + 2) * lanes;
    const int64_t packed_phases = std::min(w.step, w.span() + 1);
    pitch = phase_pitch * packed_phases;

    char* memory = workspace<char>(Slot::packed_weight,
                                   (packed_phases + 2) * sizeof(Copy) + 3 * w.phases * sizeof(Run) + w.taps() * sizeof(int64_t));
    copy = reinterpret_cast<Copy*>(memory);
    Run* run = reinterpret_cast<Run*>(copy + packed_phases + 2);
    int64_t* column = reinterpret_cast<int64_t*>(run + 3 * w.phases);
    runs = run, columns = column;
    for (int64_t t = 0; t < w.taps(); ++t) {
      const int64_t distance = w.phase[0].taps[t].offset - w.first;
      column[t] = distance % w.step * phase_pitch + distance / w.step;
    }

    // Runs in place are whole tiles; what they leave on the right is at least a vector.
    int64_t left = positions_w, right = positions_w;
    if (w.step == 1) {
      left = w.first < 0 ? ceil_div(-w.first, tile) * tile : 0;
      right = std::max<int64_t>(0, std::min(w.source_size - w.last, positions_w)) / tile * tile;
      if (right < positions_w) right = std::min(right, (positions_w - lanes) / tile * tile);
      if (left + w.span() + tile > right) left = right = positions_w;
    }
    for (int64_t f = 0; f < w.phases; ++f) {
      const int64_t end = w.phase[f].positions;
      *run++ = {0, std::min(left, end), false};
      *run++ = {std::min(left, end), std::min(right, end), true};
      // A narrower phase may end within a vector of `right`.
      *run++ = {right < end ? std::max<int64_t>(0, std::min(right, end - lanes)) : end, end, false};
    }
    if (left == positions_w) {
      for (int64_t f = 0; f < packed_phases; ++f) add_copy(f, 0, extent);
    } else {
      if (left > 0) add_copy(0, 0, left + w.span());
      if (right < positions_w) add_copy(0, right - lanes, extent);
    }

    constexpr int64_t cached = 24 * 1024 / sizeof(T);  // of the 32 KiB of L1
    positions = std::max<int64_t>(cached / pitch - h.span(), 16) / h.step / row_block * row_block;
    positions = std::clamp(positions, row_block, ceil_div(positions_h, row_block) * row_block);
    set_strips();
  }

  // Cuts planes further until all threads have work.
  void share_out(int64_t planes) {
    while (positions > 2 * row_block && planes * strips < 4 * thread_count()) {
      positions = ceil_div(positions / 2, row_block) * row_block;
      set_strips();
    }
  }

 private:
  void add_copy(int64_t f, int64_t begin, int64_t end) {
    const Axis& w = axes.w;
    const int64_t first = f + w.first, at = f * phase_pitch;  // the column of element 0, and where that lies
    const int64_t inside_begin = first >= 0 ? begin : std::clamp(ceil_div(-first, w.step), begin, end);
    const int64_t columns_end = first >= w.source_size ? 0 : ceil_div(w.source_size - first, w.step);
    const int64_t inside_end = std::clamp(columns_end, inside_begin, end);
    copy[copies++] = {first + inside_begin * w.step, inside_end - inside_begin, at + inside_begin, at + begin, at + end};
  }

  void set_strips() {
    strips = ceil_div(axes.h.phase[0].positions, positions);
    rows = (positions - 1) * axes.h.step + axes.h.span() + 1;
  }
};

// to[j] = from[j], reading and writing whole vectors where there are `count` elements for them.
template <class T>
inline void copy_row(const T* from, int64_t count, T* to) {
  if (count >= kLanes<T>) return copy(from, count, to);
  if (count >= 4) {  // two overlapping pieces
    int64_t j = 0;
    T piece[4];
    for (; j + 4 <= count; j += 4) std::memcpy(piece, from + j, sizeof piece), std::memcpy(to + j, piece, sizeof piece);
    std::memcpy(piece, from + count - 4, sizeof piece), std::memcpy(to + count - 4, piece, sizeof piece);
    return;
  }
  for (int64_t j = 0; j < count; ++j) to[j] = from[j];
}

// even[j] = from[2 j], odd[j] = from[2 j + 1] for `count` elements of `from`.
template <class T>
inline void split_row(const T* from, int64_t count, T* even, T* odd) {
  constexpr int64_t lanes = kLanes<T>;
  const auto split = [&](int64_t j) __attribute__((always_inline)) {
    const Vec<T> low = load(from + 2 * j), high = load(from + 2 * j + lanes);
    store(even + j, every_second<T>(low, high, 0, kEachLane<T>));
    store(odd + j, every_second<T>(low, high, 1, kEachLane<T>));
  };
  const int64_t pairs = count / 2;
  int64_t j = 0;
  for (; j + lanes <= pairs; j += lanes) split(j);
  if (j < pairs && pairs >= lanes) split(pairs - lanes), j = pairs;
  for (; j < pairs; ++j) even[j] = from[2 * j], odd[j] = from[2 * j + 1];
  if (count % 2 != 0) even[pairs] = from[2 * pairs];
}

// The source rows of a strip, for `planes` planes at once. One object serves many planes: what is the same for all is kept.
template <class T>
class StripSource {
 public:
  StripSource(const Plan<T>& plan, int64_t planes) : plan_(plan), planes_(planes) {
    const int64_t table = planes * plan.rows;
    in_place_ = workspace<const T*>(Slot::row_pointers, 2 * table);
    packed_ = in_place_ + table;
    const int64_t zeros = std::max(plan.pitch, plan.axes.w.source_size + 2 * kLanes<T>);
    zeros_ = workspace<T>(Slot::patches, zeros + planes * std::min(plan.rows, plan.axes.h.source_size) * plan.pitch);
    fill(zeros_, zeros, T(0));
    packed_rows_ = zeros_ + zeros;
  }

  // Rows of position 0 of the strip and offset 0, of the s-th plane.
  const T* const* rows(int64_t s, bool in_place) const { return (in_place ? in_place_ : packed_) + s * plan_.rows - first_tap_; }

  // The strip from position i_begin on, of the planes from `source` on.
  void start(const T* source, int64_t i_begin) {
    if (i_begin != i_begin_) prepare(i_begin);
    source_ = source;
    ready_ = begin_;
  }

  // Makes the first `rows` rows of the strip ready. Bit by bit: what was read last is then still in cache.
  void pack_until(int64_t rows) {
    const Axis &h = plan_.axes.h, &w = plan_.axes.w;
    const int64_t end = std::min(rows, end_);
    const bool in_place = plan_.runs[1].begin < plan_.runs[1].end;
    for (; ready_ < end; ++ready_) {
      for (int64_t s = 0; s < planes_; ++s) {
        const T* row = source_ + (s * h.source_size + first_row_ + ready_) * w.source_size;
        if (in_place) in_place_[s * plan_.rows + ready_] = row;
        pack(row, packed_rows_ + (s * (end_ - begin_) + ready_ - begin_) * plan_.pitch);
      }
    }
  }

 private:
  void prepare(int64_t i_begin) {
    const Axis& h = plan_.axes.h;
    i_begin_ = i_begin;
    first_tap_ = h.first;
    first_row_ = i_begin * h.step + h.first;
    begin_ = std::clamp<int64_t>(-first_row_, 0, plan_.rows);
    end_ = std::clamp<int64_t>(h.source_size - first_row_, begin_, plan_.rows);
    for (int64_t s = 0; s < planes_; ++s) {
      for (int64_t entry = 0; entry < plan_.rows; ++entry) {
        T* to = zeros_;
        if (entry >= begin_ && entry < end_) {
          to = packed_rows_ + (s * (end_ - begin_) + entry - begin_) * plan_.pitch;
          // Whole vectors: what they cover of the inside is written afterwards, for every plane.
          for (int64_t i = 0; i < plan_.copies; ++i) {
            const Copy& c = plan_.copy[i];
            for (int64_t k = c.begin; k < c.to; k += kLanes<T>) store(to + k, Vec<T>{});
            for (int64_t k = c.to + c.count; k < c.end; k += kLanes<T>) store(to + k, Vec<T>{});
          }
        }
        in_place_[s * plan_.rows + entry] = packed_[s * plan_.rows + entry] = to;
      }
    }
  }

  void pack(const T* row, T* to) const {
    const int64_t step = plan_.axes.w.step;
    if (step == 2 && plan_.copies == 2) {
      const Copy &a = plan_.copy[0], &b = plan_.copy[1];
      const Copy &even = a.from < b.from ? a : b, &odd = a.from < b.from ? b : a;
      if (odd.from == even.from + 1) return split_row(row + even.from, even.count + odd.count, to + even.to, to + odd.to);
    }
    for (int64_t i = 0; i < plan_.copies; ++i) {
      const Copy& c = plan_.copy[i];
      if (step == 1)
        copy_row(row + c.from, c.count, to + c.to);
      else
        for (int64_t j = 0; j < c.count; ++j) to[c.to + j] = row[c.from + j * step];
    }
  }

  const Plan<T>& plan_;
  const int64_t planes_;
  const T** in_place_;
  const T** packed_;
  T* zeros_;
  T* packed_rows_;
  const T* source_ = nullptr;
  int64_t ready_ = 0, i_begin_ = -1, first_tap_ = 0, first_row_ = 0, begin_ = 0, end_ = 0;
};

// The taps of one pair of phases.
template <class T>
struct Taps {
  const Tap* rows;
  int64_t row_count;
  const int64_t* columns;
  int64_t column_count;
  const Vec<T>* weight;  // [row][column], each in all lanes
};

// sum[v][i] += the taps at rows i step and vectors v, `second` apart. tap_rows > 1: that many consecutive rows, step 1.
template <class T, int64_t tap_rows, size_t vectors, size_t rows>
[[gnu::always_inline]] inline void add_taps(const T* const* row, int64_t step, const Taps<T>& taps, int64_t x, int64_t second,
                                            Vec<T> (&sum)[vectors][rows]) {
  if constexpr (tap_rows == 1) {
    for (int64_t a = 0; a < taps.row_count; ++a) {
      const T* from[rows];
      unrolled<rows>([&](auto i) __attribute__((always_inline)) { from[i] = row[i * step + taps.rows[a].offset] + x; });
      for (int64_t b = 0; b < taps.column_count; ++b) {
        const Vec<T> weight = taps.weight[a * taps.column_count + b];
        const int64_t column = taps.columns[b];
        unrolled<vectors>([&](auto v) __attribute__((always_inline)) {
          unrolled<rows>([&](auto i)
                             __attribute__((always_inline)) { sum[v][i] += weight * load(from[i] + column + v * second); });
        });
      }
    }
  } else {
    row += taps.rows[0].offset;
    for (int64_t b = 0; b < taps.column_count; ++b) {
      Vec<T> weight[tap_rows];
      unrolled<tap_rows>([&](auto r) __attribute__((always_inline)) { weight[r] = taps.weight[r * taps.column_count + b]; });
      const int64_t column = x + taps.columns[b];
      unrolled<rows - 1 + tap_rows>([&](auto d) __attribute__((always_inline)) {
        const T* from = row[d] + column;
        unrolled<vectors>([&](auto v) __attribute__((always_inline)) { spread<d, 1>(load(from + v * second), weight, sum[v]); });
      });
    }
  }
}

template <class T, size_t vectors, size_t rows>
[[gnu::always_inline]] inline void store_tile(const Vec<T> (&sum)[vectors][rows], bool relu, T* const (&to)[rows], int64_t j,
                                              int64_t second, int64_t count) {
  unrolled<vectors>([&](auto v) __attribute__((always_inline)) {
    unrolled<rows>([&](auto i) __attribute__((always_inline)) {
      const Vec<T> result = relu ? rectified<T>(sum[v][i]) : sum[v][i];
      if (count >= kLanes<T>)
        store(to[i] + j + v * second, result);
      else
        store_partial(to[i] + j, result, count);
    });
  });
}

// One run of columns of `rows` output rows. Two vectors of columns at a time: 8 accumulators, enough to hide the latency of a
// multiply-add, + at most 7 weights of a filter column + 1 of 16 registers.
template <class T, int64_t tap_rows, size_t rows>
[[gnu::always_inline]] inline void correlate_run(const StripSource<T>& source, int64_t sources, int64_t row, int64_t step,
                                                 const Taps<T>& taps, int64_t source_taps, const Run& run, int64_t x, T start,
                                                 bool relu, T* const (&to)[rows], int64_t count) {
  constexpr int64_t lanes = kLanes<T>;
  const auto tile = [&]<size_t vectors>(const Vec<T>(&)[vectors], int64_t j, int64_t second) __attribute__((always_inline)) {
    Vec<T> sum[vectors][rows];
    unrolled<vectors>([&](auto v) __attribute__((always_inline)) {
      unrolled<rows>([&](auto i) __attribute__((always_inline)) { sum[v][i] = broadcast(start); });
    });
    Taps<T> of_source = taps;
    for (int64_t s = 0; s < sources; ++s, of_source.weight += source_taps)
      add_taps<T, tap_rows>(source.rows(s, run.in_place) + row, step, of_source, x + j, second, sum);
    store_tile<T>(sum, relu, to, j, second, count);
  };
  constexpr Vec<T> one[1] = {}, two[2] = {};
  int64_t j = run.begin;
  for (; j + 2 * lanes <= run.end; j += 2 * lanes) tile(two, j, lanes);
  if (j + lanes < run.end)
    tile(two, j, run.end - lanes - j);
  else if (j < run.end)
    tile(one, std::max<int64_t>(0, run.end - lanes), 0);
}

// to[j phases + f] = from[f][j] for a row of `size` elements.
template <class T>
void interleave_phases(const T* from, int64_t pitch, int64_t phases, int64_t size, T* to) {
  constexpr int64_t lanes = kLanes<T>;
  int64_t x = 0;
  if (phases == 2 && size >= 2 * lanes) {
    const auto pair = [&](int64_t j) __attribute__((always_inline)) {
      const Vec<T> even = load(from + j), odd = load(from + pitch + j);
      store(to + 2 * j, interleave<T>(even, odd, 0, kEachLane<T>));
      store(to + 2 * j + lanes, interleave<T>(even, odd, 1, kEachLane<T>));
    };
    for (; x + 2 * lanes <= size; x += 2 * lanes) pair(x / 2);
    if (x < size) pair((size - 2 * lanes) / 2);
    x = size - size % 2;
  }
  for (; x < size; ++x) to[x] = from[x % phases * pitch + x / phases];
}

// One strip of an output plane. `weight` holds each tap in all lanes: [source][phase of h][phase of w][taps].
template <class T, int64_t tap_rows>
void correlate_strip(const Correlation<T>& c, const Plan<T>& plan, StripSource<T>& source, const Vec<T>* weight, T start,
                     int64_t i_begin, int64_t i_end, T* output, T* buffer) {
  const Axis &h = c.axes.h, &w = c.axes.w;
  const int64_t width = w.output_size, phases_w = w.phases, phase_pitch = plan.phase_pitch, taps_w = w.taps(),
                taps = h.taps() * taps_w;
  const bool relu = c.epilogue.relu;
  for (int64_t fh = 0; fh < h.phases; ++fh) {
    const Phase phase_h = h.phase[fh];
    const auto block = [&]<size_t rows>(const T(&)[rows], int64_t i) __attribute__((always_inline)) {
      const int64_t row = (i - i_begin) * h.step;
      source.pack_until(row + (int64_t(rows) - 1) * h.step + h.span() + 1);
      for (int64_t fw = 0; fw < phases_w; ++fw) {
        T* to[rows];
        unrolled<rows>([&](auto b) __attribute__((always_inline)) {
          to[b] = phases_w == 1 ? output + ((i + b) * h.phases + fh) * width : buffer + (b * phases_w + fw) * phase_pitch;
        });
        // In a row narrower than a vector, what a whole one spills into the next row of the strip is overwritten by that.
        const int64_t spilled = (i + int64_t(rows) - 1) * width + kLanes<T>;
        const bool whole = phases_w > 1 || (h.phases == 1 && spilled <= i_end * width);
        const int64_t count = whole ? kLanes<T> : std::min(width, kLanes<T>);
        for (int64_t r = 0; r < 3; ++r) {
          const Run run = plan.runs[3 * fw + r];
          if (run.begin >= run.end) continue;
          const int64_t x = run.in_place ? w.first : 0;
          const int64_t taps_before = w.taps_before(fw);
          const Taps<T> at{phase_h.taps, phase_h.count, plan.columns + taps_before, w.phase[fw].count,
                           weight + h.taps_before(fh) * taps_w + phase_h.count * taps_before};
          correlate_run<T, tap_rows, rows>(source, c.sources, row, h.step, at, taps, run, x, start, relu, to, count);
        }
      }
      if (phases_w == 1) return;
      for (int64_t b = 0; b < int64_t(rows); ++b) {
        interleave_phases(buffer + b * phases_w * phase_pitch, phase_pitch, phases_w, width,
                          output + ((i + b) * h.phases + fh) * width);
      }
    };
    constexpr T one[1] = {}, four[row_block] = {};
    const int64_t end = std::min(i_end, phase_h.positions);
    int64_t i = i_begin;
    if (end - i_begin >= row_block) {
      for (; i < end; i += row_block) block(four, std::min(i, end - row_block));
    }
    for (; i < end; ++i) block(one, i);
  }
}

template <class T>
bool all_finite(const T* values, int64_t count) {
  bool finite = true;
  for (int64_t i = 0; i < count; ++i) finite &= values[i] - values[i] == T(0);
  return finite;
}

// The same strip over taps inside the image alone.
template <class T>
void correlate_strip_clipped(const Correlation<T>& c, const T* source, const T* weight, T start, int64_t i_begin, int64_t i_end,
                             T* output) {
  const Axis &h = c.axes.h, &w = c.axes.w;
  for (int64_t fh = 0; fh < h.phases; ++fh) {
    const Phase& phase_h = h.phase[fh];
    for (int64_t i = i_begin; i < std::min(i_end, phase_h.positions); ++i) {
      const Range rows = taps_inside(h, phase_h, i);
      for (int64_t x = 0; x < w.output_size; ++x) {
        const Phase& phase_w = w.phase[x % w.phases];
        const int64_t j = x / w.phases;
        const Range columns = taps_inside(w, phase_w, j);
        T sum = start;
        for (int64_t plane = 0; plane < c.sources; ++plane) {
          for (int64_t a = rows.begin; a < rows.end; ++a) {
            for (int64_t b = columns.begin; b < columns.end; ++b) {
              const Tap &tap_h = phase_h.taps[a], &tap_w = phase_w.taps[b];
              sum += source[(plane * h.source_size + i * h.step + tap_h.offset) * w.source_size + j * w.step + tap_w.offset] *
                     weight[(plane * c.R + tap_h.index) * c.S + tap_w.index];
            }
          }
        }
        output[(i * h.phases + fh) * w.output_size + x] = c.epilogue.relu && sum < T(0) ? T(0) : sum;
      }
    }
  }
}

// Planes (or channels) in a task, so that setting up a StripSource is small beside the work.
inline int64_t planes_per_task(int64_t planes, int64_t plane_size) {
  return std::clamp(std::min(ceil_div(16384, plane_size), planes / (4 * thread_count())), int64_t(1), planes);
}

template <class T, int64_t tap_rows>
void correlate_with(const Correlation<T>& c) {
  const Axis &h = c.axes.h, &w = c.axes.w;
  const int64_t M = c.sources * c.outputs, filter = c.R * c.S, planes = c.N * c.C;
  const int64_t source_plane = h.source_size * w.source_size, output_plane = h.output_size * w.output_size;
  Plan<T> plan(c.axes);
  plan.share_out(planes);
  const int64_t group = plan.strips > 1 ? 1 : planes_per_task(planes, output_plane);
  const int64_t task_cost = group * plan.positions * w.output_size * M * filter / w.phases / kLanes<T>;
  parallel_for(ceil_div(planes, group) * plan.strips, task_cost, [&](int64_t task) {
    const int64_t i_begin = task % plan.strips * plan.positions, i_end = std::min(h.phase[0].positions, i_begin + plan.positions);
    StripSource<T> strip(plan, c.sources);
    const int64_t buffer_size = row_block * w.phases * plan.phase_pitch;
    T* buffer = workspace<T>(Slot::tile, buffer_size + c.sources * filter * kLanes<T>);
    Vec<T>* vectors = reinterpret_cast<Vec<T>*>(buffer + buffer_size);
    const int64_t begin = task / plan.strips * group;
    for (int64_t plane = begin; plane < std::min(planes, begin + group); ++plane) {
      const int64_t channel = plane % c.C;
      const T* source = c.source + plane * c.sources * source_plane;
      const T* weight = c.weight + channel * M * filter;
      T* output = c.output + plane * c.outputs * output_plane;
      strip.start(source, i_begin);
      for (int64_t m = 0; m < c.outputs; ++m, output += output_plane, weight += filter) {
        const T start = c.epilogue.bias == nullptr ? T(0) : c.epilogue.bias[channel * c.outputs + m];
        if (!all_finite(weight, c.sources * filter)) {
          correlate_strip_clipped(c, source, weight, start, i_begin, i_end, output);
          continue;
        }
        Vec<T>* to = vectors;
        for (int64_t s = 0; s < c.sources; ++s)
          for (int64_t fh = 0; fh < h.phases; ++fh)
            for (int64_t fw = 0; fw < w.phases; ++fw)
              for (int64_t a = 0; a < h.phase[fh].count; ++a)
                for (int64_t b = 0; b < w.phase[fw].count; ++b)
                  *to++ = broadcast(weight[(s * c.R + h.phase[fh].taps[a].index) * c.S + w.phase[fw].taps[b].index]);
        correlate_strip<T, tap_rows>(c, plan, strip, vectors, start, i_begin, i_end, output, buffer);
      }
    }
  });
}

template <class T>
void correlate(const Correlation<T>& c) {
  const Axis& h = c.axes.h;
  if (h.phases == 1 && h.step == 1) {
    if (consecutive(h.phase[0], 3)) return correlate_with<T, 3>(c);
    if (consecutive(h.phase[0], 5)) return correlate_with<T, 5>(c);
    if (consecutive(h.phase[0], 7)) return correlate_with<T, 7>(c);
  }
  correlate_with<T, 1>(c);
}

// sum[s][r] += gradient[i] * the source at row i step + r, column tap s. known_step 0: rows of taps anywhere.
template <class T, int64_t known_step, size_t rows, size_t tap_columns, size_t tap_rows>
[[gnu::always_inline]] inline void dot_taps(const T* const* row, int64_t step, const Tap* taps,
                                            const int64_t (&columns)[tap_columns], int64_t x, const Vec<T> (&gradient)[rows],
                                            Vec<T> (&sum)[tap_columns][tap_rows]) {
  if constexpr (known_step == 0) {
    unrolled<rows>([&](auto i) __attribute__((always_inline)) {
      unrolled<tap_rows>([&](auto r) __attribute__((always_inline)) {
        const T* from = row[i * step + taps[r].offset] + x;
        unrolled<tap_columns>([&](auto s) __attribute__((always_inline)) { sum[s][r] += gradient[i] * load(from + columns[s]); });
      });
    });
  } else {
    row += taps[0].offset;
    unrolled<(rows - 1) * known_step + tap_rows>([&](auto d) __attribute__((always_inline)) {
      const T* from = row[d] + x;
      unrolled<tap_columns>([&](auto s) __attribute__((always_inline)) {
        const Vec<T> input = load(from + columns[s]);
        unrolled<rows>([&](auto i) __attribute__((always_inline)) {
          constexpr int64_t r = d - i * known_step;
          if constexpr (r >= 0 && r < int64_t(tap_rows)) sum[s][r] += gradient[i] * input;
        });
      });
    });
  }
}

// The lanes of a mask table from `count` on: the last `count` lanes kept, or (from 2 lanes - count on) the first.
template <class T>
inline Vec<T> masked(Vec<T> v, int64_t count, bool keep_last) {
  using Index = IndexOf<T>;
  constexpr int64_t lanes = kLanes<T>;
  struct Table {
    Index keep[3 * lanes];
  };
  static constexpr Table table = [] {
    Table t{};
    for (int64_t lane = lanes; lane < 2 * lanes; ++lane) t.keep[lane] = -1;
    return t;
  }();
  const Vec<Index> mask = load(table.keep + (keep_last ? count : 2 * lanes - count));
  return reinterpret_cast<Vec<T>>(reinterpret_cast<Vec<Index>>(v) & mask);
}

// grad_weight over one strip: vectors of partial sums of every tap, added to total[R][S].
template <class T>
struct DotStrip {
  const Plan<T>& plan;
  const StripSource<T>& source;
  const T* grad_output;  // the whole plane
  int64_t i_begin, i_end;

  // The tap_rows x tap_columns taps from (a, b) on.
  template <size_t tap_rows, size_t tap_columns, int64_t known_step>
  void dot(int64_t a, int64_t b, Vec<T>* total) const {
    const Axis &h = plan.axes.h, &w = plan.axes.w;
    constexpr int64_t lanes = kLanes<T>;
    const int64_t positions = w.output_size, S = w.phase[0].count, step = h.step;
    const Tap* const taps = h.phase[0].taps + a;
    int64_t columns[tap_columns];
    unrolled<tap_columns>([&](auto s) __attribute__((always_inline)) { columns[s] = plan.columns[b + s]; });
    const T* const plane_end = grad_output + h.output_size * positions;
    Vec<T> sum[tap_columns][tap_rows] = {};
    for (int64_t i = i_begin; i < i_end; i += row_block) {
      const T* gradients = grad_output + i * positions;
      const bool whole_block = i + row_block <= i_end;
      for (int64_t r = 0; r < 3; ++r) {
        const Run run = plan.runs[r];
        const T* const* row = source.rows(0, run.in_place) + (i - i_begin) * step;
        const int64_t x = run.in_place ? w.first : 0;
        // The third run may begin before the second ends.
        const int64_t run_begin = r == 2 ? plan.runs[1].end : run.begin;
        int64_t j = run_begin;
        if (whole_block) {
          for (; j + lanes <= run.end; j += lanes) {
            Vec<T> gradient[row_block];
            unrolled<row_block>([&](auto n)
                                    __attribute__((always_inline)) { gradient[n] = load(gradients + n * positions + j); });
            dot_taps<T, known_step>(row, step, taps, columns, x + j, gradient, sum);
          }
        }
        for (; j < run.end; j += lanes) {
          const int64_t begin = std::max<int64_t>(0, std::min(j, positions - lanes)), kept = positions - j;
          Vec<T> gradient[row_block];
          unrolled<row_block>([&](auto n) __attribute__((always_inline)) {
            const T* from = gradients + n * positions + begin;
            gradient[n] = Vec<T>{};
            if (i + n < i_end) gradient[n] = from + lanes <= plane_end ? load(from) : load_partial(from, plane_end - from);
            if (kept < lanes) gradient[n] = masked<T>(gradient[n], kept, positions >= lanes);
          });
          dot_taps<T, known_step>(row, step, taps, columns, x + begin, gradient, sum);
        }
      }
    }
    unrolled<tap_rows>([&](auto r) __attribute__((always_inline)) {
      unrolled<tap_columns>([&](auto s) __attribute__((always_inline)) { total[(a + r) * S + b + s] += sum[s][r]; });
    });
  }

  template <size_t tap_rows, int64_t known_step, size_t tap_columns>
  void dot_rows(int64_t a, Vec<T>* total) const {
    const int64_t S = plan.axes.w.phase[0].count, columns = tap_columns;
    int64_t b = 0;
    for (; b + columns <= S; b += columns) dot<tap_rows, tap_columns, known_step>(a, b, total);
    for (; b < S; ++b) dot<tap_rows, 1, known_step>(a, b, total);
  }

  // 16 registers: tap_rows x tap_columns accumulators + 4 of grad_output + 1.
  void operator()(Vec<T>* total) const {
    const Phase& rows = plan.axes.h.phase[0];
    if (plan.axes.h.step == 1) {
      if (consecutive(rows, 3)) return dot_rows<3, 1, 3>(0, total);
      if (consecutive(rows, 5)) return dot_rows<5, 1, 2>(0, total);
      if (consecutive(rows, 7)) return dot_rows<7, 1, 1>(0, total);
    }
    if (plan.axes.h.step == 2) {
      if (consecutive(rows, 3)) return dot_rows<3, 2, 3>(0, total);
      if (consecutive(rows, 5)) return dot_rows<5, 2, 2>(0, total);
    }
    int64_t a = 0;
    for (; a + 3 <= rows.count; a += 3) dot_rows<3, 0, 3>(a, total);
    for (; a < rows.count; ++a) dot_rows<1, 0, 3>(a, total);
  }
};

// One element over the positions whose tap lies inside the image.
template <class T>
T grad_weight_element(const Conv2dGeometry& g, const Axes& axes, const T* grad_output, const T* input, int64_t k, int64_t r,
                      int64_t s) {
  const Axis &h = axes.h, &w = axes.w;
  const int64_t row = h.phase[0].taps[r].offset, column = w.phase[0].taps[s].offset;
  const Range i = inside(h, h.phase[0], row), j = inside(w, w.phase[0], column);
  T sum = 0;
  for (int64_t n = 0; n < g.N; ++n) {
    const T* gradient = grad_output + (n * g.K + k) * g.P * g.Q;
    const T* source = input + (n * g.C + k / g.K_per_group()) * g.H * g.W;
    for (int64_t p = i.begin; p < i.end; ++p)
      for (int64_t q = j.begin; q < j.end; ++q)
        sum += gradient[p * g.Q + q] * source[(p * h.step + row) * g.W + q * w.step + column];
  }
  return sum;
}

template <class T>
void sum_again_unless_finite(const Conv2dGeometry& g, const Axes& axes, const T* grad_output, const T* input, int64_t k,
                             T* grad_weight) {
  T* filter = grad_weight + k * g.R * g.S;
  if (all_finite(filter, g.R * g.S)) return;
  for (int64_t r = 0; r < g.R; ++r)
    for (int64_t s = 0; s < g.S; ++s) filter[r * g.S + s] = grad_weight_element(g, axes, grad_output, input, k, r, s);
}

template <class T>
void conv2d_grad_weight(const Conv2dGeometry& g, const T* grad_output, const T* input, T* grad_weight) {
  const Axes axes = forward_axes(g);
  const Plan<T> plan(axes);
  const int64_t M = g.K_per_group(), filter = g.R * g.S, weights = g.K * filter;
  // A thread owns a channel. Where channels are few, the strips of all images are cut into slices too, added in order at the end.
  const int64_t units = g.N * plan.strips, slices = g.C >= 8 ? 1 : std::min<int64_t>(8, units);
  T* partial = slices == 1 ? grad_weight : workspace<T>(Slot::partial_sums, slices * weights);
  const int64_t group = slices > 1 ? 1 : planes_per_task(g.C, g.N * g.P * g.Q);
  const int64_t task_cost = group * units * plan.positions * g.Q * M * filter / kLanes<T> / slices;
  parallel_for(ceil_div(g.C, group) * slices, task_cost, [&](int64_t task) {
    const int64_t slice = task % slices, c_begin = task / slices * group;
    StripSource<T> strip(plan, 1);
    Vec<T>* total = reinterpret_cast<Vec<T>*>(workspace<T>(Slot::tile, M * filter * kLanes<T>));
    for (int64_t c = c_begin; c < std::min(g.C, c_begin + group); ++c) {
      for (int64_t t = 0; t < M * filter; ++t) total[t] = Vec<T>{};
      for (int64_t unit = slice * units / slices; unit < (slice + 1) * units / slices; ++unit) {
        const int64_t n = unit / plan.strips, i_begin = unit % plan.strips * plan.positions;
        strip.start(input + (n * g.C + c) * g.H * g.W, i_begin);
        strip.pack_until(plan.rows);
        for (int64_t m = 0; m < M; ++m) {
          const T* plane = grad_output + (n * g.K + c * M + m) * g.P * g.Q;
          DotStrip<T>{plan, strip, plane, i_begin, std::min(g.P, i_begin + plan.positions)}(total + m * filter);
        }
      }
      T* to = partial + slice * weights + c * M * filter;
      for (int64_t t = 0; t < M * filter; ++t) to[t] = horizontal_sum<T>(total[t]);
    }
  });
  parallel_for(g.K, slices * filter, [&](int64_t k) {
    for (int64_t t = k * filter; t < (k + 1) * filter && slices > 1; ++t) {
      T sum = partial[t];
      for (int64_t slice = 1; slice < slices; ++slice) sum += partial[slice * weights + t];
      grad_weight[t] = sum;
    }
    sum_again_unless_finite(g, axes, grad_output, input, k, grad_weight);
  });
}

}  // namespace torchcnn::TORCHCNN_ISA::depthwise::nchw
