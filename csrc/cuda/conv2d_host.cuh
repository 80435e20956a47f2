// What the launchers of the convolution kernels share: from a checked geometry to the numbers that kernels take, and the rules
// that choose a kernel. Kernels keep sizes of single axes in 32 bits and offsets in 64; what does not fit is an error here.
#pragma once

#include <numeric>

#include "conv2d_patches.cuh"

namespace torchcnn::cuda {

inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

inline int as_int(const char* op, const char* what, int64_t value) {
  constexpr int64_t limit = int64_t(1) << 30;  // sums of two stay below 2^31
  require(value < limit, op, what, " must be below ", limit, " on a GPU, got ", value);
  return int(value);
}

// In forward the input is read and the output written; in grad_input (transposed) the output's gradient is read. A stride beyond
// the padded input, or the dilation of a single tap, can be any number and changes nothing.
inline Axis axis_of(const char* op, const char* name, int64_t input, int64_t output, int64_t kernel, int64_t stride, int64_t pad,
                    int64_t dilation, bool transposed) {
  const int64_t padded = as_int(op, name, input + 2 * pad);
  stride = std::min(stride, padded);
  dilation = kernel == 1 ? 1 : dilation;
  const int64_t period = transposed ? stride / std::gcd(stride, dilation) : 1;
  return {int(transposed ? output : input),
          int(transposed ? input : output),
          int(kernel),
          int(stride),
          int(pad),
          int(dilation),
          transposed,
          int(period)};
}

constexpr int64_t kAlignment = 256;  // of parts of the scratch memory, in bytes

inline unsigned block_count(const char* op, int64_t blocks) {
  require(blocks <= INT32_MAX, op, "a launch has at most ", INT32_MAX, " thread blocks, but needs ", blocks);
  return unsigned(blocks);
}

// An activation of `groups` times `from_channels` channels, as the kernels get it: where it lies, if there its channels are
// whole, aligned vectors, else in scratch memory.
template <class T>
struct Vectors {
  const T* data;
  Strides strides;
  int64_t images;
  int height, width, groups, from_channels;

  int channels() const { return int(round_up(from_channels, kVectorSize<T>)); }
  bool are_there() const {
    return strides.c == 1 && channels() == from_channels && reinterpret_cast<uintptr_t>(data) % kVectorBytes == 0;
  }
  int64_t pixels() const { return images * height * width; }
  int64_t workspace() const {
    return are_there() ? 0 : round_up(pixels() * groups * channels() * int64_t(sizeof(T)), kAlignment);
  }

  // Brings them there; takes its scratch memory from the front of `workspace`.
  Activation<T> get(const char* op, char*& workspace, Stream stream) const {
    const int64_t all = as_int(op, "channels in whole vectors", int64_t(groups) * channels());
    as_int(op, "channels of a row of pixels", all * width);
    const T* from = data;
    if (!are_there()) {
      T* to = reinterpret_cast<T*>(workspace);
      workspace += this->workspace();
      const int vectors = int(all / kVectorSize<T>);
      const VectorCopy<T> copy = {data, strides, from_channels, channels(), vectors, int64_t(height) * width, pixels(), to};
      const bool turn = strides.c != 1 && vectors > 4;
      const int64_t channel_tiles = ceil_div(vectors, 8), count = checked_mul(pixels(), vectors, op, "vectors of channels");
      const int64_t blocks = turn ? channel_tiles * ceil_div(pixels(), kTurnPixels) : ceil_div(count, kTurnThreads);
      const auto turned = [&](auto kernel) {
        launch(op, kernel, block_count(op, blocks), kTurnThreads, 0, stream, copy, int(channel_tiles));
      };
      constexpr int V = kVectorSize<T>, half = V == 8 ? 4 : 1;
      const auto in_runs = [&](int run) {
        return copy.plane % run == 0 && reinterpret_cast<uintptr_t>(data) % (run * sizeof(T)) == 0;
      };
      if (blocks > 0 && turn)
        in_runs(V)      ? turned(conv2d_turn_to_vectors<T, V>)
        : in_runs(half) ? turned(conv2d_turn_to_vectors<T, half>)
                        : turned(conv2d_turn_to_vectors<T, 1>);
      else if (blocks > 0)
        launch(op, conv2d_to_vectors<T>, block_count(op, blocks), kTurnThreads, 0, stream, copy);
      from = to;
    }
    return {from, height, width, all * width * height, all * width, all, channels()};
  }
};

// For kernels whose threads stride over a count.
inline unsigned blocks_for(int64_t count, int threads) {
  constexpr int64_t enough = 1 << 16;
  return unsigned(std::min(enough, ceil_div(count, threads)));
}

// One block for each multiprocessor of an H100. A constant, so that results do not depend on the GPU. The emulator takes few, so
// that sizes which it can compute take every kernel.
#ifdef TORCHCNN_CUDA_EMULATOR
constexpr int64_t kBlocksThatFillAGpu = 3;
#else
constexpr int64_t kBlocksThatFillAGpu = 132;
#endif

inline int attribute_of_device(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
  return value;
}

// mma.sync with 16 deep steps, cp.async and TF32 came with sm_80.
inline bool has_tensor_cores() { return attribute_of_device(cudaDevAttrComputeCapabilityMajor) >= 8; }

// wgmma is Hopper's alone. setup.py says whether that architecture's own code is part of the build.
inline bool has_warpgroup_steps() {
#ifdef TORCHCNN_SM90A
  return attribute_of_device(cudaDevAttrComputeCapabilityMajor) == 9;
#else
  return false;
#endif
}

inline int64_t most_shared_bytes() { return attribute_of_device(cudaDevAttrMaxSharedMemoryPerBlockOptin); }

// A group of one input channel and few output channels is no matrix product.
inline bool suits_depthwise(const Conv2dGeometry& g) { return g.C_per_group() == 1 && g.K_per_group() <= 4; }

namespace depthwise {
template <class T>
void conv2d_forward(const Conv2dGeometry&, const T* input, const T* weight, const Epilogue<T>&, T* output, Stream);
template <class T>
void conv2d_grad_input(const Conv2dGeometry&, const T* grad_output, const T* weight, const Epilogue<T>&, T* grad_input, Stream);
template <class T>
int64_t conv2d_grad_weight_workspace(const Conv2dGeometry&);
template <class T>
void conv2d_grad_weight(const Conv2dGeometry&, const T* grad_output, const T* input, T* grad_weight, void* workspace, Stream);
}  // namespace depthwise

namespace direct {
// Whether what a tile reads of a channel has room in shared memory.
template <class T>
bool fits(const Conv2dGeometry&, bool transposed);
template <class T>
void conv2d_forward(const Conv2dGeometry&, const T* input, const T* weight, Layout weight_layout, const Epilogue<T>&, T* output,
                    Stream);
template <class T>
void conv2d_grad_input(const Conv2dGeometry&, const T* grad_output, const T* weight, Layout weight_layout, const Epilogue<T>&,
                       T* grad_input, Stream);
}  // namespace direct

// A group that writes few channels fills few columns of a matrix product's tile, one that reads few little of its depth. The
// tensor cores of 16-bit types are so fast that few channels read do not count if many are written.
template <class T>
bool suits_direct(const Conv2dGeometry& g, bool transposed) {
  constexpr int64_t few_read = 4, few_written = 8, not_many = sizeof(T) == 2 ? 16 : INT64_MAX;
  const int64_t read = transposed ? g.K_per_group() : g.C_per_group(), written = transposed ? g.C_per_group() : g.K_per_group();
  return (written <= few_written || (read <= few_read && written <= not_many)) && direct::fits<T>(g, transposed);
}

}  // namespace torchcnn::cuda
