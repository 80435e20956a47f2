// Sums over all pixels of a batch, which no single thread block adds up: parts of them go to scratch memory, then a kernel adds the
// parts in order. No atomic addition, so which block comes first does not matter.
#pragma once

#include "common.cuh"

namespace torchcnn::cuda {

// A block of 32 x 8 threads: threadIdx.x runs over what is neighbouring in memory, channels in channels_last, pixels in NCHW. The
// threads of one channel are its lanes.
struct ChannelsAndLanes {
  int64_t channel;
  int lane, lanes;
  bool channels_last;

  __device__ ChannelsAndLanes(bool channels_last, int64_t channel_block)
      : channel(channels_last ? channel_block * 32 + threadIdx.x : channel_block * 8 + threadIdx.y),
        lane(channels_last ? threadIdx.y : threadIdx.x),
        lanes(channels_last ? 8 : 32),
        channels_last(channels_last) {}

  // The sum over the lanes, in a tree; right in lane 0. All threads of the block call it.
  template <class Sum>
  __device__ Sum add_up(Sum sum) const {
    __shared__ Sum sums[32][9];
    Sum& own = sums[threadIdx.x][threadIdx.y];
    own = sum;
    for (int half = lanes / 2; half > 0; half /= 2) {
      __syncthreads();
      if (lane < half) own += channels_last ? sums[threadIdx.x][threadIdx.y + half] : sums[threadIdx.x + half][threadIdx.y];
    }
    return own;
  }
};

inline int64_t channel_blocks(int64_t channels, bool channels_last) { return ceil_div(channels, channels_last ? 32 : 8); }

// to[at], at = (k channels + c) taps + tap, is the sum of parts[0 ... part_count - 1][(k taps + tap) channels + c].
template <class T, class Sum>
__global__ void conv2d_add_parts(const Sum* parts, int64_t part_count, int channels, int taps, int64_t count, T* to) {
  for (int64_t at = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; at < count; at += int64_t(gridDim.x) * blockDim.x) {
    const int64_t tap = at % taps, c = at / taps % channels, k = at / taps / channels;
    const Sum* from = parts + (k * taps + tap) * channels + c;
    Sum sum = 0;
    for (int64_t part = 0; part < part_count; ++part) sum += from[part * count];
    to[at] = from_arithmetic<T>(sum);
  }
}

}  // namespace torchcnn::cuda
