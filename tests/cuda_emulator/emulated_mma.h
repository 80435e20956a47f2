// The functions of csrc/cuda/mma.cuh, where they and their layouts are described, without PTX.
#pragma once

#include "cuda_runtime.h"

namespace torchcnn::cuda {

inline void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __half,
                        emulator::Place place = emulator::Place::current()) {
  emulator::mma(emulator::Format::f16, d, a, b, place);
}
inline void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __nv_bfloat16,
                        emulator::Place place = emulator::Place::current()) {
  emulator::mma(emulator::Format::bf16, d, a, b, place);
}
inline void mma_16x8x8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                            emulator::Place place = emulator::Place::current()) {
  emulator::mma(emulator::Format::tf32, d, a, b, place);
}

// Ten bits of mantissa stay; half of the last of them, added, carries where the nearest is above.
inline uint32_t to_tf32(float x) {
  const uint32_t bits = __float_as_uint(x), exponent = 0x7f800000u, dropped = 0x1fffu;
  return ((bits & exponent) == exponent ? bits : bits + (dropped + 1) / 2) & ~dropped;
}

inline void load_matrices(uint32_t (&to)[4], const void* shared_row, emulator::Place place = emulator::Place::current()) {
  emulator::load_matrices(to, shared_row, false, place);
}
inline void load_matrices_transposed(uint32_t (&to)[4], const void* shared_row,
                                     emulator::Place place = emulator::Place::current()) {
  emulator::load_matrices(to, shared_row, true, place);
}

template <bool kCached = false>
void copy_async(void* shared, const void* from, bool copy, emulator::Place place = emulator::Place::current()) {
  emulator::copy_async(shared, from, copy, place);
}
inline void copy_async_commit() { emulator::copy_async_commit(); }
template <int groups>
void copy_async_wait() {
  emulator::copy_async_wait(groups);
}

}  // namespace torchcnn::cuda
