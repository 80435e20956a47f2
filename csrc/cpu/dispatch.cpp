// Which row of the kernel table is in use, and the threads and scratch memory that kernels run with.
#include <sys/mman.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <new>

#include "conv2d_choice.h"
#include "kernels.h"
#include "runtime.h"

namespace torchcnn {

namespace {
#define TORCHCNN_ROW(isa)             \
  constexpr KernelTable isa##_row = { \
      #isa, isa::conv2d_f32, isa::conv2d_f64, isa::pool2d_f32, isa::pool2d_f64, isa::pool2d_bf16, isa::pool2d_f16};
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

int64_t thread_count() { return torch::stable::get_num_threads(); }

void parallel_ranges(int64_t tasks, int64_t task_cost, void (*run)(void* context, int64_t begin, int64_t end), void* context) {
  // Waking a thread takes some microseconds: a range should be worth about ten.
  constexpr int64_t range_cost = 1 << 15;
  const int64_t grain = std::max<int64_t>(1, range_cost / std::max<int64_t>(1, task_cost));
  if (tasks <= grain) return run(context, 0, tasks);
  torch::stable::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) { run(context, begin, end); });
}

namespace {

class Workspace {
 public:
  Workspace() = default;
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  ~Workspace() { std::free(data_); }

  void* at_least(size_t bytes) {
    if (bytes <= size_) return data_;
    constexpr size_t huge_page = size_t(2) << 20, cache_line = 64;
    const size_t alignment = bytes >= huge_page ? huge_page : cache_line;
    const size_t rounded = (bytes + alignment - 1) / alignment * alignment;
    std::free(data_);
    size_ = 0;
    data_ = std::aligned_alloc(alignment, rounded);
    if (data_ == nullptr) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
    if (alignment == huge_page) madvise(data_, rounded, MADV_HUGEPAGE);
#endif
    size_ = rounded;
    return data_;
  }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace

void* workspace_bytes(Slot slot, size_t bytes) {
  thread_local Workspace slots[static_cast<size_t>(Slot::count)];
  return slots[static_cast<size_t>(slot)].at_least(bytes);
}

}  // namespace torchcnn
