// bfloat16 and float16 from and to float32, for operators that compute some images of a batch at a time in float32.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels.h"
#include "runtime.h"
#include "simd_convert.h"

namespace torchcnn::TORCHCNN_ISA {

inline constexpr int64_t convert_block = 16 << 10;  // elements; a block that was widened is still in L2 for the next

template <class S>
void widen_all(const S* from, int64_t count, float* to) {
  parallel_for(ceil_div(count, convert_block), convert_block / kLanes<float>, [&](int64_t block) {
    const int64_t begin = block * convert_block;
    widen_row(from + begin, std::min(convert_block, count - begin), to + begin);
  });
}

template <class S>
void narrow_all(const float* from, int64_t count, S* to) {
  parallel_for(ceil_div(count, convert_block), 2 * convert_block / kLanes<float>, [&](int64_t block) {
    const int64_t begin = block * convert_block;
    narrow_row(from + begin, std::min(convert_block, count - begin), to + begin);
  });
}

template <class S>
inline constexpr ConvertKernels<S> convert_kernels = {widen_all<S>, narrow_all<S>};

}  // namespace torchcnn::TORCHCNN_ISA
