// Convolution without padding in NCHW whose windows do not overlap: 1x1 of any stride, and kernels as large as the stride
// (patches). It is the plain product of the weight matrix and the planes of the tensor, of which taps y = (c, r, s) see the
// pixels (p stride + r, q stride + s):
//
//   forward      output[k][x]     = bias[k] + sum_y weight[k][y] input[y][x]          x = (n, p, q)
//   grad_input   grad_input[y][x] =           sum_k weight[k][y] grad_output[k][x]    and 0 at pixels that no window has
//   grad_weight  grad_weight[k][y] =          sum_x grad_output[k][x] input[y][x]
//
// Forward and grad_input: A is the weight, in place in forward, in grad_input packed [y / 12][k][y % 12], ahead or, where each
// panel of it serves few blocks of positions, just before it is used, which saves a trip to memory. B is packed
// [x / nr][y][x % nr] from the planes, a panel at a time, so that pixels of several small images share a vector. A block of
// panels is taken through a whole row of tiles before the next, since neighbouring panels read and write neighbouring pixels of
// the planes, which lie pages apart.
//
// grad_weight: A is grad_output, in place. B is packed [y / nr][x][y % nr] from the planes of the input. Rows of the product then
// are rows of grad_weight.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "../geometry.h"
#include "conv2d_gemm.h"
#include "conv2d_grad_bias.h"
#include "conv2d_implicit_gemm.h"
#include "runtime.h"
#include "simd.h"

namespace torchcnn::TORCHCNN_ISA::pointwise {

using gemm::max_depth;
using gemm::mr;
using gemm::nr;

inline constexpr int64_t block_panels = 16;  // A is read from memory once for so many
template <class T>
inline constexpr int64_t panel_size = max_depth<T> * nr<T> + 64 / sizeof(T);  // not all panels in the same sets of L1
template <class T>
inline constexpr int64_t most_lines = (64 << 10) / (block_panels * nr<T> * sizeof(T));  // pixels sorted by the taps that see them
inline constexpr int64_t a_panel = 2 * mr;  // 12 x 384 floats of A are 18 KiB, which stay in L1 while B passes from L2

// Planes with one element for each position (p, q) of the smaller side; the pixels of the larger side are step apart. A channel
// is as many planes as windows have taps, R x S of them.
template <class T>
struct Planes {
  T* data;
  Strides strides;
  int64_t step_h, step_w;
  int64_t R = 1, S = 1;
  T* at(int64_t y) const {
    if (R * S == 1) return data + y * strides.c;  // divisions take longer than gathering a few pixels
    return data + y / (R * S) * strides.c + y % (R * S) / S * strides.h + y % S * strides.w;
  }
};

// Element (m, k) of A is at (m / panel) panel_stride + (m % panel) row_stride + k step.
template <class T>
struct Weights {
  const T* data;
  int64_t panel_stride, row_stride, step;
  const T* at(int64_t m, int64_t k) const { return data + m / a_panel * panel_stride + m % a_panel * row_stride + k * step; }
  bool is_row_by_row() const { return row_stride == 1 && step != a_panel; }  // the weight itself, rows k, to be packed
};

// to[k][m] = A(m, k) for the panel of so many rows m at `from`, whose terms are step apart.
template <class T>
inline void pack_weights(const T* from, int64_t rows, int64_t step, int64_t depth, T* to) {
  for (int64_t k = 0; k < depth; ++k) {
    __builtin_prefetch(from + (k + 16) * step, 0, 2);  // rows lie pages apart, which the processor does not guess
    if (rows == a_panel)
      std::memcpy(to + k * a_panel, from + k * step, a_panel * sizeof(T));
    else
      for (int64_t m = 0; m < rows; ++m) to[k * a_panel + m] = from[k * step + m];
  }
}

// What the tiles of a block have in common. With it a tile has six arguments, which pass in registers: a sum of 64 terms is so
// short that more would cost a tenth of it.
struct Terms {
  int64_t depth, a_row, a_step;
  bool add, relu;
};

template <class T, int rows, int vectors>
[[gnu::noinline]] void tile_product(const Terms& terms, const T* a, const T* b, T* c, int64_t c_row, const T* start) {
  gemm::Tile<T, rows, vectors> tile;
  tile.start_at(start);
  gemm::StridedA<T> left{a, terms.a_row, terms.a_step};
  gemm::PackedB<T> right{b, nr<T>};
  tile.accumulate(terms.depth, left, right);
  if (terms.add) tile.add_from(c, c_row);
  if (terms.relu) tile.rectify();
  tile.store_to(c, c_row);
}

// to[t to_row + x] = from[x step + t]: taps side by side of `count` windows. Writes whole vectors, beyond the last window too.
template <class T>
void gather_taps(const T* from, int64_t step, int64_t taps, int64_t count, T* to, int64_t to_row) {
  constexpr int64_t L = kLanes<T>;
  for (int64_t t = 0; t < taps; t += L)
    for (int64_t x = 0; x < count; x += L) {
      Vec<T> v[L];
#pragma GCC unroll 16
      for (int64_t l = 0; l < L; ++l) v[l] = load_partial(from + std::min(x + l, count - 1) * step + t, taps - t);
      gemm::transpose<T>(v);
      for (int64_t l = 0; l < std::min(L, taps - t); ++l) store(to + (t + l) * to_row + x, v[l]);
    }
}

// Positions of a block whose pixels are step apart: parts of rows or, where nothing is skipped, of planes.
struct Piece {
  int64_t at, x, width;          // offset in a plane, first position
  bool ends_before_gap = false;  // of the result: a pixel of its row follows that no window has
};

// The channels k ... k + depth - 1 of a block's positions to its panels, b[panel][channel][position]. Plane by plane: the panels
// of a block are one stretch of it.
template <class T>
void pack_block(const Planes<const T>& source, const Piece* piece, int64_t pieces, int64_t positions, int64_t panels, int64_t k,
                int64_t depth, T* b) {
  // Lines of one channel, or of as many as windows have taps side by side.
  const int64_t line_size = panels * nr<T> + kLanes<T>, lines = source.S > 2 ? std::min(source.S, most_lines<T>) : 1;
  T* line = workspace<T>(Slot::gradient, lines * line_size);
  std::fill(line, line + lines * line_size, T(0));
  const bool in_place = source.step_h == 1 && source.step_w == 1 && pieces == 1 && positions == panels * nr<T>;
  for (int64_t c = 0, taps = 0; c < depth; c += taps) {
    const int64_t s = source.S == 1 ? 0 : (k + c) % source.S;
    taps = std::min({lines, source.S - s, depth - c});
    const T* const from = source.at(k + c);
    if (s == 0) {  // taps side by side see the same pixels
      const T* const ahead = source.at(k + c + 4 * source.S);
      for (int64_t i = 0; i < pieces; ++i) gemm::prefetch(ahead + piece[i].at, piece[i].width * source.step_w);
    }
    for (int64_t i = 0; i < (in_place ? 0 : pieces); ++i) {
      if (lines > 1)
        gather_taps(from + piece[i].at, source.step_w, taps, piece[i].width, line + piece[i].x, line_size);
      else
        gather_strided(from + piece[i].at, source.step_w, piece[i].width, line + piece[i].x);
    }
    for (int64_t t = 0; t < taps; ++t) {
      const T* pixels = in_place ? from + piece[0].at : line + t * line_size;
      T* to = b + (c + t) * nr<T>;
      for (int64_t j = 0; j < panels; ++j, to += panel_size<T>)
        for (int64_t v = 0; v < nr<T>; v += kLanes<T>) store(to + v, load(pixels + j * nr<T> + v));
    }
  }
}

// What is packed next: it comes from memory while the present channels are multiplied, a share of it beside every panel that
// meets a chunk of the filters.
template <class T>
struct Upcoming {
  const Planes<const T>& source;
  const Piece* piece;
  int64_t pieces, channel, channels, next = 0;

  int64_t share(int64_t some_channels, int64_t calls) const { return ceil_div(pieces * some_channels, calls); }
  void ask_for(int64_t share) {
    for (int64_t i = 0; i < share && channel < channels; ++i) {
      gemm::prefetch(source.at(channel) + piece[next].at, piece[next].width * source.step_w);
      if (++next == pieces) ++channel, next = 0;
    }
  }
};

// result[m][x] = sum_k A(m, k) source[k][x] over x = (n, i, j), for one group of so many planes on either side.
template <class T>
void product(int64_t N, int64_t rows, int64_t columns, int64_t filters, int64_t channels, const Weights<T>& weight,
             const Planes<const T>& source, const Planes<T>& result, const Epilogue<T>& epilogue) {
  const int64_t plane = rows * columns, positions = N * plane, panels = ceil_div(positions, nr<T>);
  const auto offset_of = [&](const auto& planes, int64_t x) {
    const int64_t n = x / plane, i = x % plane / columns, j = x % columns;
    return n * planes.strides.n + i * planes.step_h * planes.strides.h + j * planes.step_w * planes.strides.w;
  };
  const bool source_dense = source.step_h == 1 && source.step_w == 1, result_dense = result.step_h == 1 && result.step_w == 1;

  const int64_t blocks = ceil_div(panels, block_panels), a_panels = ceil_div(filters, a_panel);
  // Each part of the filters packs B again: no more parts than give every thread as many tasks.
  const int64_t threads = thread_count();
  int64_t parts = 1;
  while (parts < a_panels && blocks * parts < 4 * threads && blocks * parts % threads != 0) ++parts;
  const int64_t part_filters = ceil_div(a_panels, parts) * a_panel;
  // A source beyond the caches is asked for a block ahead. Of patches that would be too much: it pushes out what is in use.
  const bool prefetches =
      source.R * source.S == 1 && source.step_w <= 2 && N * source.strides.n * int64_t(sizeof(T)) > int64_t(8) << 20;
  parallel_for(blocks * parts, block_panels * 2 * part_filters * channels, [&](int64_t task) {
    const int64_t block = task / parts, first_panel = block * panels / blocks,
                  count = (block + 1) * panels / blocks - first_panel;
    const int64_t m_begin = task % parts * part_filters, m_end = std::min(filters, m_begin + part_filters);
    if (m_begin >= m_end) return;
    const int64_t x_begin = first_panel * nr<T>, x_end = std::min(positions, x_begin + count * nr<T>);
    const auto in_result = [&](int64_t j) {
      const int64_t x = x_begin + j * nr<T>;
      return result_dense && x + nr<T> <= x_end && x / plane == (x + nr<T> - 1) / plane;
    };
    const auto cut_source = [&](int64_t begin, int64_t end, Piece* to) {
      int64_t pieces = 0;
      for (int64_t x = begin, longest = source_dense ? plane : columns, width = 0; x < end; x += width) {
        width = std::min(longest - x % longest, end - x);
        to[pieces++] = {offset_of(source, x), x - begin, width};
      }
      return pieces;
    };
    // The pieces of the result leave out the panels that lie in one plane of it: they are stored straight.
    Piece* from_piece = workspace<Piece>(Slot::tables, 3 * block_panels * nr<T>);
    Piece* after_piece = from_piece + block_panels * nr<T>;  // of the next block
    Piece* to_piece = after_piece + block_panels * nr<T>;
    const int64_t from_pieces = cut_source(x_begin, x_end, from_piece);
    const int64_t after_pieces = cut_source(x_end, std::min(positions, x_end + count * nr<T>), after_piece);
    int64_t to_pieces = 0;
    for (int64_t x = x_begin, longest = result_dense ? plane : columns, width = 0; x < x_end; x += width) {
      width = std::min({longest - x % longest, nr<T> - (x - x_begin) % nr<T>, x_end - x});
      const bool gap = result.S == 1 && result.step_w == 2 && 2 * (x % columns + width) - 1 < result.strides.h;
      if (!in_result((x - x_begin) / nr<T>)) to_piece[to_pieces++] = {offset_of(result, x), x - x_begin, width, gap};
    }

    T* b = workspace<T>(Slot::patches, block_panels * panel_size<T>);
    T* tiles = workspace<T>(Slot::tile, count * part_filters * nr<T> + kLanes<T>);
    struct Target {  // of a panel: row m of it at first + m row
      T* first;
      int64_t row;
    } target[block_panels];
    for (int64_t j = 0; j < count; ++j)
      target[j] = in_result(j) ? Target{result.data + offset_of(result, x_begin + j * nr<T>), result.strides.c}
                               : Target{tiles + (j * part_filters - m_begin) * nr<T>, nr<T>};
    const int64_t depths = ceil_div(channels, max_depth<T>);
    for (int64_t d = 0; d < depths; ++d) {
      const int64_t k = d * channels / depths, depth = (d + 1) * channels / depths - k;
      pack_block(source, from_piece, from_pieces, x_end - x_begin, count, k, depth, b);
      const bool same_block = d + 1 < depths;
      Upcoming<T> upcoming{source, same_block ? from_piece : after_piece, same_block ? from_pieces : after_pieces,
                           same_block ? k + depth : 0, channels};
      const int64_t share =
          !prefetches ? 0 : upcoming.share(ceil_div(channels, depths), count * ceil_div(m_end - m_begin, a_panel));
      const bool packs = weight.is_row_by_row();
      T* const packed = packs ? workspace<T>(Slot::packed_weight, max_depth<T> * a_panel) : nullptr;
      const Terms terms{depth, weight.row_stride, packs ? a_panel : weight.step, d > 0, epilogue.relu && d + 1 == depths};
      for (int64_t chunk = m_begin; chunk < m_end; chunk += a_panel) {
        const int64_t chunk_end = std::min(m_end, chunk + a_panel);
        const T* const a = weight.at(chunk, k);
        if (packs) pack_weights(a, chunk_end - chunk, weight.step, depth, packed);
        const auto multiply = [&]<int most, int vectors>(const Target& to, const T* panel) {
          for (int64_t m = chunk, rows = 0; m < chunk_end; m += rows) {
            rows = gemm::tile_rows(chunk_end - m, most);
            for (int64_t i = m; i < (depth > 96 && to.row != nr<T> ? m + rows : m); ++i) {  // lines that come meanwhile
              __builtin_prefetch(to.first + i * to.row, 1);
              __builtin_prefetch(to.first + i * to.row + vectors * kLanes<T> - 1, 1);
            }
            const T* start = epilogue.bias == nullptr || d > 0 ? nullptr : epilogue.bias + m;
            gemm::with_rows<most>(rows, [&]<int count>(std::integral_constant<int, count>) {
              tile_product<T, count, vectors>(terms, (packs ? packed : a) + (m - chunk) * weight.row_stride, panel,
                                              to.first + m * to.row, to.row, start);
            });
          }
        };
        for (int64_t j = 0; j < count; ++j) {
          upcoming.ask_for(share);
          if (x_end - x_begin - j * nr<T> > kLanes<T>)
            multiply.template operator()<mr, 2>(target[j], b + j * panel_size<T>);
          else  // the last panel of all
            multiply.template operator()<gemm::narrow_mr, 1>(target[j], b + j * panel_size<T>);
        }
      }
    }
    for (int64_t m = m_begin; m < m_end; ++m) {
      const bool pairs = result.S == 2 && m + 1 < m_end;  // taps side by side
      for (int64_t i = 0; i < to_pieces; ++i) {
        const Piece& piece = to_piece[i];
        const T* from = tiles + (piece.x / nr<T> * part_filters + m - m_begin) * nr<T> + piece.x % nr<T>;
        T* to = result.at(m) + piece.at;
        if (result.S == 1) {
          scatter_strided(from, result.step_w, piece.width, to);
          if (piece.ends_before_gap) to[2 * piece.width - 1] = T(0);
        } else if (pairs) {
          for (int64_t x = 0; x < piece.width; x += kLanes<T>) {
            const Vec<T> even = load(from + x), odd = load(from + nr<T> + x);
            const int64_t left = 2 * (piece.width - x);
            store_partial(to + 2 * x, interleave<T>(even, odd, 0, kEachLane<T>), left);
            if (left > kLanes<T>)
              store_partial(to + 2 * x + kLanes<T>, interleave<T>(even, odd, 1, kEachLane<T>), left - kLanes<T>);
          }
        } else {  // what lies between belongs to other taps
          for (int64_t x = 0; x < piece.width; ++x) to[x * result.step_w] = from[x];
        }
      }
      m += pairs;
    }
  });
}

template <class T>
void conv2d_forward(const Conv2dGeometry& g, const T* input, const T* weight, const Epilogue<T>& epilogue, T* output) {
  const Strides in = g.input_strides(), out = g.output_strides();
  const int64_t C = g.C_per_group(), K = g.K_per_group(), terms = C * g.R * g.S;
  for (int64_t group = 0; group < g.G; ++group) {
    product<T>(g.N, g.P, g.Q, K, terms, {weight + group * K * terms, a_panel * terms, terms, 1},
               {input + group * C * in.c, in, g.stride_h, g.stride_w, g.R, g.S}, {output + group * K * out.c, out, 1, 1},
               {epilogue.bias == nullptr ? nullptr : epilogue.bias + group * K, epilogue.relu});
  }
}

template <class T>
void conv2d_grad_input(const Conv2dGeometry& g, const T* grad_output, const T* weight, T* grad_input) {
  const Strides in = g.input_strides(), out = g.output_strides();
  const int64_t C = g.C_per_group(), K = g.K_per_group(), terms = C * g.R * g.S, panels = ceil_div(terms, a_panel);
  if (g.P * g.R < g.H || g.Q * g.S < g.W)
    parallel_for(g.N * g.C, in.c / kLanes<T>, [&](int64_t i) {
      T* const to = grad_input + i * in.c;
      if (g.S > 1 || g.stride_w != 2) return fill(to, in.c, T(0));
      for (int64_t h = 0; h < g.H; ++h)  // the product writes whole rows
        if (h % g.stride_h > 0 || h / g.stride_h >= g.P) fill(to + h * in.h, g.W, T(0));
    });
  const bool packs_ahead = g.N * g.P * g.Q > 2 * block_panels * nr<T>;
  T* packed = packs_ahead ? workspace<T>(Slot::packed_weight, panels * K * a_panel + kLanes<T>) : nullptr;
  for (int64_t group = 0; group < g.G; ++group) {
    const T* from = weight + group * K * terms;
    if (packs_ahead)
      parallel_for(panels, K * 2, [&](int64_t panel) {
        const int64_t y = panel * a_panel;
        pack_weights(from + y, std::min(a_panel, terms - y), terms, K, packed + panel * K * a_panel);
      });
    product<T>(g.N, g.P, g.Q, terms, K,
               packs_ahead ? Weights<T>{packed, K * a_panel, 1, a_panel} : Weights<T>{from, a_panel, 1, terms},
               {grad_output + group * K * out.c, out, 1, 1},
               {grad_input + group * C * in.c, in, g.stride_h, g.stride_w, g.R, g.S}, {nullptr, false});
  }
}

// grad_weight is cut into tasks of some filters by some taps, whose sums, 288 x 128 of them or 144 KiB, stay in L2.
inline constexpr int64_t chunk_filters = 288, chunk_taps = 128;

// to[(x, lane)] = the pixels that taps y ... y + lanes - 1 see at the positions of rows i_begin ... i_begin + rows - 1 of one
// image, and zeros in the lanes after them. `line` is room for a panel.
template <class T>
void pack_taps(const Planes<const T>& image, int64_t y, int64_t lanes, int64_t i_begin, int64_t rows, int64_t columns, T* line,
               T* to) {
  const int64_t count = rows * columns, first = i_begin * image.step_h * image.strides.h;
  const auto in_order = [](int64_t x) { return x; };
  if (image.R * image.S == 1 && image.step_h == 1 && image.step_w == 1)  // the taps are planes, which lie side by side
    return gemm::pack_transposed(image.at(y) + first, image.strides.c, lanes, count, to, in_order);
  const int64_t row_step = image.step_h * image.strides.h;
  if (image.S > 2) {  // as far as taps lie side by side in the image, they do so in the panel
    int64_t lane = 0;
    for (int64_t taps = 0; lane < lanes; lane += taps) {
      const int64_t s = (y + lane) % image.S;
      taps = std::min(lanes - lane, image.S - s);
      const T *from = image.at(y + lane) + first, *ahead = image.at(y + lane + 4 * image.S) + first;
      T* row = to + lane;
      for (int64_t i = 0; i < rows; ++i, from += row_step, ahead += row_step) {
        if (s == 0) gemm::prefetch(ahead, columns * image.step_w);
        for (int64_t j = 0; j < columns; ++j, row += nr<T>) implicit_gemm::copy_row(from + j * image.step_w, taps, row);
      }
    }
    for (; lane < nr<T>; ++lane)
      for (int64_t x = 0; x < count; ++x) to[x * nr<T> + lane] = T(0);
    return;
  }
  for (int64_t lane = 0; lane < lanes; ++lane) {
    const T *from = image.at(y + lane) + first, *ahead = image.at(y + lane + 4) + first;
    for (int64_t i = 0; i < rows; ++i, from += row_step, ahead += row_step) {
      gemm::prefetch(ahead, columns * image.step_w);
      gather_strided(from, image.step_w, columns, line + lane * count + i * columns);
    }
  }
  gemm::pack_transposed(line, count, lanes, count, to, in_order);
}

template <class T>
void conv2d_grad_weight(const Conv2dGeometry& g, const T* grad_output, const T* input, T* grad_weight, T* grad_bias) {
  const Strides in = g.input_strides(), out = g.output_strides();
  const int64_t C = g.C_per_group(), K = g.K_per_group(), terms = C * g.R * g.S;
  const int64_t k_chunks = ceil_div(K, chunk_filters), y_chunks = ceil_div(terms, chunk_taps);
  const int64_t filters = ceil_div(K, k_chunks), width = ceil_div(ceil_div(terms, y_chunks), nr<T>) * nr<T>;
  // The fewer the taps, the more positions fit into 128 KiB of L2.
  const int64_t wanted = (int64_t(128) << 10) / (std::min(ceil_div(terms, nr<T>) * nr<T>, width) * int64_t(sizeof(T)));
  const implicit_gemm::Blocks blocks = implicit_gemm::blocks_of(g.N, g.P, g.Q, wanted);
  const int64_t chunks = g.G * k_chunks * y_chunks, slices = gemm::slices_of(chunks, blocks.count()), weights = g.K * terms;
  T* partial = slices == 1 ? grad_weight : workspace<T>(Slot::partial_sums, slices * weights);
  const BiasSums<T> bias_sums(slices, g.K, grad_bias);
  parallel_for(chunks * slices, filters * width / kLanes<T> * (g.N * g.P * g.Q / slices), [&](int64_t task) {
    const int64_t slice = task % slices, y_chunk = task / slices % y_chunks, k_chunk = task / slices / y_chunks % k_chunks;
    const int64_t group = task / slices / y_chunks / k_chunks;
    const int64_t k_begin = k_chunk * filters, rows = std::min(filters, K - k_begin);
    const int64_t y_begin = y_chunk * width, taps = std::min(width, terms - y_begin), panels = ceil_div(taps, nr<T>);
    if (rows <= 0 || taps <= 0) return;

    const int64_t most_positions = blocks.images * blocks.rows * g.Q;
    const int64_t panel_step = most_positions * nr<T> + 64 / sizeof(T);  // not all panels in the same sets of L1
    T* packed = workspace<T>(Slot::patches, panels * panel_step);
    const bool gathers = g.S <= 2 && (g.R * g.S > 1 || g.stride_h > 1 || g.stride_w > 1);
    T* line = gathers ? workspace<T>(Slot::gradient, blocks.rows * g.Q * nr<T>) : nullptr;
    T* sums = workspace<T>(Slot::tile, panels * rows * nr<T>);
    int64_t* position = workspace<int64_t>(Slot::offsets, most_positions);
    T* const to = partial + slice * weights + (group * K + k_begin) * terms + y_begin;
    // Sums of one or two pieces go straight to grad_weight, a row of tiles at a time, if they are whole vectors.
    const int64_t first_block = slice * blocks.count() / slices, end_block = (slice + 1) * blocks.count() / slices;
    const bool straight = end_block - first_block <= 2 && most_positions <= gemm::gradient_depth && taps % nr<T> == 0;
    bool add = false;
    for (int64_t block = first_block; block < end_block; ++block) {
      const int64_t n = block / blocks.along_rows * blocks.images, images = std::min(blocks.images, g.N - n);
      const int64_t i_begin = block % blocks.along_rows * blocks.rows, i_count = std::min(blocks.rows, g.P - i_begin);
      const int64_t image_positions = i_count * g.Q, positions = images * image_positions;
      for (int64_t image = 0, x = 0; image < images; ++image) {
        const Planes<const T> planes{input + (n + image) * in.n + group * C * in.c, in, g.stride_h, g.stride_w, g.R, g.S};
        for (int64_t panel = 0; panel < panels; ++panel)
          pack_taps(planes, y_begin + panel * nr<T>, std::min(nr<T>, taps - panel * nr<T>), i_begin, i_count, g.Q, line,
                    packed + panel * panel_step + image * image_positions * nr<T>);
        for (int64_t j = 0; j < image_positions; ++j) position[x++] = image * out.n + j;
      }
      const T* left = grad_output + n * out.n + (group * K + k_begin) * out.c + i_begin * g.Q;
      const int64_t depths = ceil_div(positions, gemm::gradient_depth);
      for (int64_t d = 0; d < depths; ++d, add = true) {
        const int64_t x = d * positions / depths;
        gemm::Run runs[gemm::gradient_depth / gemm::max_run + 1];
        const int64_t run_count = gemm::cut_into_runs(x, (d + 1) * positions / depths - x, runs);
        // Computes a tile and returns how many rows it has.
        const auto multiply = [&](int64_t panel, int64_t m) {
          const bool narrow = taps - panel * nr<T> <= kLanes<T>;
          const int64_t tile_rows = gemm::tile_rows(rows - m, narrow ? gemm::narrow_mr : mr);
          T* const c = straight ? to + m * terms + panel * nr<T> : sums + (panel * rows + m) * nr<T>;
          const auto tile = [&]<int count, int vectors>() {
            gemm::IndirectA<T, count> a{{}, position};
            for (int i = 0; i < count; ++i) a.row[i] = left + (m + i) * out.c;
            gemm::tile_product<T, count, vectors>(runs, run_count, a, packed + panel * panel_step, c, straight ? terms : nr<T>,
                                                  {nullptr, add, false});
          };
          if (narrow)
            gemm::with_rows<gemm::narrow_mr>(tile_rows, [&](auto count) { tile.template operator()<count, 1>(); });
          else
            gemm::with_rows<mr>(tile_rows, [&](auto count) { tile.template operator()<count, 2>(); });
          return tile_rows;
        };
        if (straight) {
          for (int64_t m = 0, tile_rows = 0; m < rows; m += tile_rows)
            for (int64_t panel = 0; panel < panels; ++panel) tile_rows = multiply(panel, m);
        } else {
          for (int64_t panel = 0; panel < panels; ++panel)
            for (int64_t m = 0; m < rows;) m += multiply(panel, m);
        }
      }
      if (y_chunk == 0) bias_sums.add(slice, group * K + k_begin, rows, left, out.c, images, out.n, image_positions);
    }
    for (int64_t m = 0; m < (straight ? 0 : rows); ++m)
      for (int64_t panel = 0; panel < panels; ++panel)
        copy(sums + (panel * rows + m) * nr<T>, std::min(nr<T>, taps - panel * nr<T>), to + m * terms + panel * nr<T>);
  });
  if (slices > 1) gemm::add_slices(partial, slices, weights, grad_weight);
  bias_sums.finish();
}

}  // namespace torchcnn::TORCHCNN_ISA::pointwise
