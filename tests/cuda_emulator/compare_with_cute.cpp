// Compares fragments.h with the layouts of CuTe (NVIDIA CUTLASS, from PyPI: nvidia-cutlass), which number matrix elements column
// by column. Prints for each fragment how many elements were compared and how many lie elsewhere.
#include <cuda_runtime.h>

#include <cstdio>
#include <cute/atom/copy_traits_sm75.hpp>
#include <cute/atom/mma_traits_sm80.hpp>
#include <cute/tensor.hpp>

#include "fragments.h"

namespace {

using emulator::At;

template <class NumberOf, class ExpectedNumber>
void compare(const char* name, int per_lane, NumberOf number, ExpectedNumber expected) {
  int compared = 0, elsewhere = 0;
  for (int lane = 0; lane < 32; ++lane)
    for (int e = 0; e < per_lane; ++e, ++compared) elsewhere += number(lane, e) != int(expected(lane, e));
  std::printf("%s: %d compared, %d elsewhere\n", name, compared, elsewhere);
}

// CuTe's B is stored as its transpose, n by k.
template <class Traits, class A, class B>
void compare_mma(const char* name, A in_a, B in_b) {
  typename Traits::ALayout a;
  typename Traits::BLayout b;
  typename Traits::CLayout d;
  constexpr int rows = 16, columns = 8;
  static_assert(cute::size<0>(typename Traits::Shape_MNK{}) == rows && cute::size<1>(typename Traits::Shape_MNK{}) == columns);
  const auto label = [&](const char* operand) { return std::string(name) + " " + operand; };
  compare(label("A").c_str(), cute::size<1>(a), [&](int lane, int e) { return in_a(lane, e).row + rows * in_a(lane, e).column; },
          a);
  compare(label("B").c_str(), cute::size<1>(b),
          [&](int lane, int e) { return in_b(lane, e).column + columns * in_b(lane, e).row; }, b);
  compare(label("D").c_str(), cute::size<1>(d),
          [](int lane, int e) { return emulator::in_d(lane, e).row + rows * emulator::in_d(lane, e).column; }, d);
}

// CuTe numbers bits: the source lane that names the address of a row, and the bits of that row; elements have 16.
template <class Traits, class In>
void compare_load(const char* name, In in_loaded) {
  typename Traits::SrcLayout source;
  typename Traits::DstLayout destination;
  compare(name, 8, [&](int lane, int e) {
    const At at = in_loaded(lane, e);
    return int(source(e / 2 * 8 + at.row, 16 * at.column));
  }, [&](int lane, int e) { return destination(lane, 16 * e); });
}

}  // namespace

int main() {
  compare_mma<cute::MMA_Traits<cute::SM80_16x8x16_F32F16F16F32_TN>>("f16", emulator::in_a_16bit, emulator::in_b_16bit);
  compare_mma<cute::MMA_Traits<cute::SM80_16x8x16_F32BF16BF16F32_TN>>("bf16", emulator::in_a_16bit, emulator::in_b_16bit);
  compare_mma<cute::MMA_Traits<cute::SM80_16x8x8_F32TF32TF32F32_TN>>("tf32", emulator::in_a_tf32, emulator::in_b_tf32);
  compare_load<cute::Copy_Traits<cute::SM75_U32x4_LDSM_N>>("ldmatrix", emulator::in_loaded);
  compare_load<cute::Copy_Traits<cute::SM75_U16x8_LDSM_T>>("ldmatrix.trans", emulator::in_loaded_transposed);
}
