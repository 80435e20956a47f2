// Which row of the kernel table is in use.
#include <atomic>
#include <cstdlib>
#include <string>

#include "conv2d_choice.h"
#include "kernels.h"

namespace torchcnn {

namespace {
#define TORCHCNN_ROW(isa)                               \
  constexpr KernelTable isa##_row = {#isa,              \
                                     isa::vector_bytes, \
                                     isa::conv2d_f32,   \
                                     isa::conv2d_f64,   \
                                     isa::convert_bf16, \
                                     isa::convert_f16,  \
                                     isa::pool2d_f32,   \
                                     isa::pool2d_f64,   \
                                     isa::pool2d_bf16,  \
                                     isa::pool2d_f16};
TORCHCNN_ROW(reference)
TORCHCNN_ROW(scalar)
#if defined(__aarch64__)
TORCHCNN_ROW(neon)
#endif
#if defined(__x86_64__)
TORCHCNN_ROW(avx2)
TORCHCNN_ROW(avx512)
#endif
}  // namespace

std::vector<const KernelTable*> available_kernels() {
  std::vector<const KernelTable*> rows = {&reference_row, &scalar_row};
#if defined(__aarch64__)
  rows.push_back(&neon_row);
#endif
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx2) rows.push_back(&avx2_row);
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    rows.push_back(&avx512_row);
#endif
  return rows;  // from the plainest to the best
}

static const KernelTable& choose_kernels() {
  const std::vector<const KernelTable*> rows = available_kernels();
  const char* forced = std::getenv("TORCHCNN_ISA");
  if (forced == nullptr || *forced == '\0') return *rows.back();
  std::string names;
  for (const KernelTable* row : rows) {
    if (std::string(forced) == row->isa) return *row;
    names += (names.empty() ? "" : ", ") + std::string(row->isa);
  }
  throw Error("TORCHCNN_ISA: must name an instruction set of this machine (" + names + "), got '" + forced + "'");
}

const KernelTable& kernels() {
  static const KernelTable& row = choose_kernels();
  return row;
}

static std::atomic<bool> winograd_allowed{true};
bool allow_winograd() { return winograd_allowed.load(std::memory_order_relaxed); }
void set_allow_winograd(bool allow) { winograd_allowed.store(allow, std::memory_order_relaxed); }

}  // namespace torchcnn
