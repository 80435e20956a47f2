// Compares one row of the kernel table with the reference row, without PyTorch and on one thread: for processors that are at hand
// as a cross compiler and an emulator only. Built and run by `make cross-check`; ROW is the row's name.
//
// The tensors hold small integers, so that the sums are exact and one wrong index shows; Winograd rounds on its way, by far less
// than the 1/4 that is allowed here, and every other algorithm not at all.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

#include "../../csrc/cpu/conv2d_choice.h"
#include "../../csrc/cpu/kernels.h"
#include "../../csrc/cpu/runtime.h"

namespace torchcnn {

// What dispatch.cpp and runtime.cpp define on PyTorch's threads.
bool allow_winograd() { return true; }
int64_t thread_count() { return 1; }
void parallel_ranges(int64_t tasks, int64_t, void (*run)(void*, int64_t, int64_t), void* context) { run(context, 0, tasks); }
void* workspace_bytes(Slot slot, size_t bytes) {
  static std::unique_ptr<char[]> slots[static_cast<size_t>(Slot::count)];
  auto& memory = slots[static_cast<size_t>(slot)];
  memory.reset(new char[bytes + 64]);
  return memory.get() + (64 - reinterpret_cast<uintptr_t>(memory.get()) % 64);
}
WorkspaceUse::WorkspaceUse() {}
WorkspaceUse::~WorkspaceUse() {}

namespace {

std::mt19937 random_bits(0);
int64_t between(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(random_bits); }

template <class T>
std::vector<T> integers(int64_t count) {
  std::vector<T> values(count);
  for (T& value : values) value = T(between(-3, 3));
  return values;
}

template <class T>
bool same(const std::vector<T>& a, const std::vector<T>& b) {
  for (size_t i = 0; i < a.size(); ++i)
    if (!(std::abs(double(a[i]) - double(b[i])) < 0.25)) return false;
  return true;
}

const char* algorithm_of(const Conv2dGeometry& g, Direction direction) {
  return name_of(choose_conv2d(g, direction, ROW::vector_bytes).algorithm);
}

bool check(bool holds, const char* what, const char* algorithm, const Conv2dGeometry& g) {
  if (!holds)
    std::printf("%s by %s differs: N %ld C %ld %ldx%ld K %ld %ldx%ld stride %ld %ld pad %ld %ld dilation %ld %ld groups %ld %s\n",
                what, algorithm, long(g.N), long(g.C), long(g.H), long(g.W), long(g.K), long(g.R), long(g.S), long(g.stride_h),
                long(g.stride_w), long(g.pad_h), long(g.pad_w), long(g.dilation_h), long(g.dilation_w), long(g.G),
                g.layout == Layout::nchw ? "nchw" : "channels_last");
  return holds;
}

// A model in channels_last has its weights so too.
Conv2dGeometry with_weight_layout(const Conv2dGeometry& g, Direction direction) {
  Conv2dGeometry result = g;
  if (reads_any_weight_layout(g, direction)) result.weight_layout = g.layout;
  return result;
}

template <class T>
bool compare_conv2d(const Conv2dGeometry& g, const Conv2dKernels<T>& row, const Conv2dKernels<T>& reference) {
  const Conv2dGeometry forward = with_weight_layout(g, Direction::forward),
                       of_input = with_weight_layout(g, Direction::grad_input),
                       of_weight = with_weight_layout(g, Direction::grad_weight);
  const auto x = integers<T>(g.N * g.C * g.H * g.W), w = integers<T>(g.K * g.C_per_group() * g.R * g.S), b = integers<T>(g.K);
  const auto dy = integers<T>(g.N * g.K * g.P * g.Q);
  bool good = true;
  for (const bool relu : {false, true}) {
    std::vector<T> actual(dy.size()), expected(dy.size());
    row.forward(forward, x.data(), w.data(), {b.data(), relu}, actual.data());
    reference.forward(forward, x.data(), w.data(), {b.data(), relu}, expected.data());
    good &= check(same(actual, expected), "forward", algorithm_of(g, Direction::forward), g);
  }
  std::vector<T> actual(x.size()), expected(x.size());
  row.grad_input(of_input, dy.data(), w.data(), actual.data());
  reference.grad_input(of_input, dy.data(), w.data(), expected.data());
  good &= check(same(actual, expected), "grad_input", algorithm_of(g, Direction::grad_input), g);
  actual.assign(w.size(), 0), expected.assign(w.size(), 0);
  std::vector<T> beside(b.size());
  row.grad_weight(of_weight, dy.data(), x.data(), actual.data(), nullptr);
  reference.grad_weight(of_weight, dy.data(), x.data(), expected.data(), nullptr);
  good &= check(same(actual, expected), "grad_weight", algorithm_of(g, Direction::grad_weight), g);
  actual.assign(b.size(), 0), expected.assign(b.size(), 0);
  row.grad_bias(g, dy.data(), actual.data());
  reference.grad_bias(g, dy.data(), expected.data());
  good &= check(same(actual, expected), "grad_bias", "sums", g);
  actual.assign(w.size(), 0);
  row.grad_weight(of_weight, dy.data(), x.data(), actual.data(), beside.data());
  return check(same(beside, expected), "grad_bias", "beside grad_weight", g) && good;
}

template <class T>
bool compare_pool2d(const Pool2dGeometry& g, const Pool2dKernels<T>& row, const Pool2dKernels<T>& reference) {
  const auto x = integers<T>(g.N * g.C * g.H * g.W), dy = integers<T>(g.N * g.C * g.P * g.Q);
  bool good = true;
  for (const bool minimum : {false, true}) {
    std::vector<T> actual(dy.size()), expected(dy.size());
    std::vector<int64_t> at(dy.size()), expected_at(dy.size());
    row.extremum_forward(g, {minimum, false}, x.data(), actual.data(), {PositionKind::indices, at.data()});
    reference.extremum_forward(g, {minimum, false}, x.data(), expected.data(), {PositionKind::indices, expected_at.data()});
    good &= actual == expected && at == expected_at;
    std::vector<uint8_t> offsets(dy.size());
    std::vector<T> gradient(x.size()), expected_gradient(x.size());
    row.extremum_forward(g, {minimum, false}, x.data(), actual.data(), {PositionKind::byte_offsets, offsets.data()});
    row.offset_grad_input(g, dy.data(), {PositionKind::byte_offsets, offsets.data()}, gradient.data());
    reference.offset_grad_input(g, dy.data(), {PositionKind::byte_offsets, offsets.data()}, expected_gradient.data());
    good &= gradient == expected_gradient;
  }
  const Divisor divisor{true, 1};  // the sums themselves, which are exact
  std::vector<T> actual(dy.size()), expected(dy.size()), gradient(x.size()), expected_gradient(x.size());
  row.avg_forward(g, divisor, x.data(), actual.data());
  reference.avg_forward(g, divisor, x.data(), expected.data());
  row.avg_grad_input(g, divisor, dy.data(), gradient.data());
  reference.avg_grad_input(g, divisor, dy.data(), expected_gradient.data());
  good &= actual == expected && gradient == expected_gradient;
  if (!good)
    std::printf("a pool differs: N %ld C %ld %ldx%ld window %ldx%ld stride %ld %ld pad %ld %ld %s\n", long(g.N), long(g.C),
                long(g.H), long(g.W), long(g.R), long(g.S), long(g.stride_h), long(g.stride_w), long(g.pad_h), long(g.pad_w),
                g.layout == Layout::nchw ? "nchw" : "channels_last");
  return good;
}

Conv2dGeometry random_conv2d(Layout layout) {
  for (;;) {
    const bool depthwise = between(0, 4) == 0, wide = between(0, 2) == 0;
    const int64_t groups = depthwise ? between(1, 20) : between(1, 3);
    const int64_t C = depthwise ? 1
                      : wide    ? between(16, 40)
                                : between(1, 12),
                  K = depthwise ? between(1, 2)
                      : wide    ? between(16, 40)
                                : between(1, 20);
    const int64_t R = between(1, 5), S = between(0, 1) ? R : between(1, 5), stride = between(1, 3), dilation = between(1, 2);
    try {
      return conv2d_geometry(
          "compare", between(1, 3), C * groups, between(1, 20), between(1, 24), K * groups, C, R, S,
          {stride, between(0, 3) ? stride : between(1, 3), between(0, 3), between(0, 3), dilation, dilation, groups}, layout);
    } catch (const Error&) {  // the filter does not fit
    }
  }
}

// What chance seldom meets: layers whose algorithms have paths of their own. Each is large enough for several blocks and panels.
std::vector<Conv2dGeometry> named_conv2d(Layout layout) {
  const auto layer = [&](int64_t N, int64_t C, int64_t H, int64_t W, int64_t K, int64_t R, int64_t S, const Conv2dOptions& o) {
    return conv2d_geometry("compare", N, C, H, W, K, C / o.groups, R, S, o, layout);
  };
  return {
      layer(2, 24, 15, 19, 40, 1, 1, {2, 2, 0, 0, 1, 1, 1}),  // 1x1 of stride 2, where rows end between two steps
      layer(3, 20, 17, 14, 28, 1, 1, {2, 3, 0, 0, 1, 1, 1}),
      layer(2, 160, 7, 7, 300, 1, 1, {1, 1, 0, 0, 1, 1, 1}),     // one piece of positions, several chunks of filters and of taps
      layer(3, 20, 23, 24, 100, 1, 1, {1, 1, 0, 0, 1, 1, 1}),    // several pieces
      layer(2, 24, 12, 12, 40, 1, 1, {2, 2, 1, 1, 1, 1, 1}),     // with padding it is not pointwise
      layer(3, 20, 27, 38, 28, 2, 2, {2, 2, 0, 0, 1, 1, 1}),     // patches, in pairs of taps
      layer(2, 24, 17, 41, 36, 3, 4, {3, 4, 0, 0, 1, 1, 2}),     // and not
      layer(2, 48, 20, 20, 48, 3, 3, {2, 2, 1, 1, 1, 1, 3}),     // narrow groups of stride 2: regions along two edges
      layer(2, 40, 23, 21, 40, 3, 3, {2, 2, 1, 1, 1, 1, 5}),     // and along four
      layer(2, 17, 17, 17, 35, 1, 7, {1, 1, 0, 3, 1, 1, 1}),     // regions of one column
      layer(2, 17, 17, 17, 35, 7, 1, {1, 1, 3, 0, 1, 1, 1}),     // of one row
      layer(1, 18, 26, 28, 20, 4, 3, {1, 1, 4, 2, 1, 2, 1}),     // positions that meet no tap at all
      layer(1, 3, 40, 38, 35, 19, 18, {1, 1, 0, 0, 1, 1, 1}),    // a filter of one channel deeper than a block
      layer(2, 32, 16, 16, 33, 5, 3, {1, 1, 2, 1, 1, 1, 1}),     // planes of a power of two: a copied window
      layer(3, 21, 14, 12, 37, 2, 2, {2, 2, 0, 0, 1, 1, 1}),     // patches
      layer(2, 3, 35, 50, 20, 16, 16, {16, 16, 0, 0, 1, 1, 1}),  // of whole vectors, and of parts of them
      layer(2, 13, 15, 22, 17, 7, 7, {7, 7, 0, 0, 1, 1, 1}),
      layer(1, 30, 6, 6, 31, 1, 1, {1, 1, 0, 0, 1, 1, 1}),   // a few positions beyond the last panel
      layer(2, 49, 9, 23, 52, 1, 3, {1, 1, 0, 1, 1, 1, 1}),  // Winograd along one axis: filters shorter than what is read
      layer(1, 100, 22, 9, 98, 3, 1, {1, 1, 4, 0, 1, 1, 2}),
      layer(1, 50, 22, 9, 49, 5, 1, {1, 1, 2, 1, 1, 1, 1}),
      layer(2, 52, 6, 45, 60, 1, 7, {1, 1, 0, 5, 1, 2, 1}),
      layer(1, 49, 26, 18, 50, 7, 1, {1, 1, 3, 0, 1, 1, 1}),
      layer(2, 3, 31, 42, 64, 7, 7, {2, 2, 3, 3, 1, 1, 1}),  // Winograd of the phases of a stride: 4x4 taps each, 3x3 taps
      layer(1, 3, 47, 51, 36, 11, 11, {4, 4, 2, 1, 1, 1, 1}),
      layer(2, 30, 33, 37, 70, 5, 6, {2, 2, 2, 4, 1, 1, 2}),
      layer(1, 3, 44, 39, 33, 6, 3, {2, 1, 1, 0, 1, 1, 1}),   // fewer phases than a vector has lanes
      layer(2, 48, 9, 15, 48, 3, 3, {1, 1, 1, 1, 1, 1, 24}),  // groups of 2, 4, 8 and 16 whose lanes change places
      layer(2, 56, 14, 9, 56, 3, 3, {1, 1, 1, 0, 1, 1, 14}),
      layer(2, 56, 19, 33, 56, 3, 3, {2, 2, 1, 1, 1, 1, 7}),
      layer(2, 32, 12, 10, 32, 3, 3, {3, 2, 1, 2, 1, 1, 2}),
  };
}

Pool2dGeometry random_pool2d(Layout layout) {
  for (;;) {
    const int64_t R = between(1, 4), S = between(1, 4), H = between(1, 20), W = between(1, 40), stride_h = between(1, 3),
                  stride_w = between(1, 3);
    const int64_t pad_h = between(0, R / 2), pad_w = between(0, S / 2);
    const int64_t P = (H + 2 * pad_h - R) / stride_h + 1, Q = (W + 2 * pad_w - S) / stride_w + 1;
    if (H + 2 * pad_h >= R && W + 2 * pad_w >= S)
      return {between(1, 3), between(1, 20), H, W, R, S, P, Q, stride_h, stride_w, pad_h, pad_w, 1, 1, false, layout};
  }
}

// 2x2 windows side by side: rows of all lengths about a vector, also of few planes, and planes that make one tall plane.
std::vector<Pool2dGeometry> named_pool2d() {
  std::vector<Pool2dGeometry> pools;
  for (const int64_t planes : {1, 3, 18})
    for (const int64_t H : {2, 3, 14, 15})
      for (const int64_t W : {2, 3, 4, 5, 6, 7, 8, 10, 11, 14, 15, 16, 18, 22, 28, 31, 33, 34, 63})
        pools.push_back({1, planes, H, W, 2, 2, H / 2, W / 2, 2, 2, 0, 0, 1, 1, false, Layout::nchw});
  return pools;
}

}  // namespace
}  // namespace torchcnn

int main(int argc, char** argv) {
  using namespace torchcnn;
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 200;
  int failures = 0, comparisons = 8 * rounds;
  for (const Layout layout : {Layout::nchw, Layout::channels_last}) {
    for (const Conv2dGeometry& conv : named_conv2d(layout)) {
      failures += !compare_conv2d<float>(conv, ROW::conv2d_f32, reference::conv2d_f32);
      failures += !compare_conv2d<double>(conv, ROW::conv2d_f64, reference::conv2d_f64);
      comparisons += 2;
    }
  }
  for (const Pool2dGeometry& pool : named_pool2d()) {
    failures += !compare_pool2d<float>(pool, ROW::pool2d_f32, reference::pool2d_f32);
    failures += !compare_pool2d<double>(pool, ROW::pool2d_f64, reference::pool2d_f64);
    comparisons += 2;
  }
  for (int round = 0; round < rounds; ++round) {
    for (const Layout layout : {Layout::nchw, Layout::channels_last}) {
      const Conv2dGeometry conv = random_conv2d(layout);
      failures += !compare_conv2d<float>(conv, ROW::conv2d_f32, reference::conv2d_f32);
      failures += !compare_conv2d<double>(conv, ROW::conv2d_f64, reference::conv2d_f64);
      const Pool2dGeometry pool = random_pool2d(layout);
      failures += !compare_pool2d<float>(pool, ROW::pool2d_f32, reference::pool2d_f32);
      failures += !compare_pool2d<double>(pool, ROW::pool2d_f64, reference::pool2d_f64);
    }
  }
  std::printf("%d comparisons, %d failed\n", comparisons, failures);
  return failures != 0;
}
