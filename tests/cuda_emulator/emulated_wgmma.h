// The functions of csrc/cuda/wgmma.cuh, where they and their layouts are described, without PTX.
#pragma once

#include "cuda_runtime.h"

namespace torchcnn::cuda {

struct WarpgroupOperand {
  emulator::WarpgroupOperand of;

  WarpgroupOperand(const void* tile, int panel_bytes) : of{static_cast<const char*>(tile), panel_bytes} {}
  void advance(int bytes) { of.first += bytes; }
};

template <int by_k, int tiles, class T>
void wgmma(float (&d)[tiles][4], const WarpgroupOperand& a, const WarpgroupOperand& b, T,
           emulator::Place place = emulator::Place::current()) {
  constexpr auto format = std::is_same_v<T, float>    ? emulator::Format::tf32
                          : std::is_same_v<T, __half> ? emulator::Format::f16
                                                      : emulator::Format::bf16;
  static_assert(!by_k || sizeof(T) == 2);
  emulator::wgmma(format, d[0], 8 * tiles, a.of, b.of, by_k != 0, place);
}

inline void show_tensor_cores() { emulator::show_tensor_cores(); }
template <int tiles>
void wgmma_begin(float (&)[tiles][4]) {}
inline void wgmma_commit() { emulator::wgmma_commit(); }
template <int under_way, int tiles>
void wgmma_wait(float (&)[tiles][4], emulator::Place place = emulator::Place::current()) {
  emulator::wgmma_wait(under_way, place);
}

}  // namespace torchcnn::cuda
