// Threads and scratch memory of the kernels.
#include "runtime.h"

#include <sys/mman.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <new>

namespace torchcnn {
namespace {

std::atomic<size_t> limit{size_t(64) << 20};  // bytes that a thread keeps between operators
std::atomic<size_t> held{0};                  // by all threads

class Workspace {
 public:
  Workspace() = default;
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  ~Workspace() { release(); }

  size_t size() const { return size_; }

  void release() {
    std::free(data_);
    held -= size_;
    data_ = nullptr, size_ = 0;
  }

  void* at_least(size_t bytes) {
    if (bytes <= size_) return data_;
    constexpr size_t huge_page = size_t(2) << 20, cache_line = 64;
    const size_t alignment = bytes >= huge_page ? huge_page : cache_line;
    const size_t rounded = (bytes + alignment - 1) / alignment * alignment;
    release();
    data_ = std::aligned_alloc(alignment, rounded);
    if (data_ == nullptr) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
    if (alignment == huge_page) madvise(data_, rounded, MADV_HUGEPAGE);
#endif
    size_ = rounded;
    held += size_;
    return data_;
  }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

struct Workspaces {
  Workspace slots[static_cast<size_t>(Slot::count)];
  int operators = 0;  // that are running and hold pointers into the slots

  // The largest go first.
  void trim(size_t most) {
    if (operators > 0) return;
    size_t total = 0;
    for (const Workspace& slot : slots) total += slot.size();
    while (total > most) {
      Workspace* largest =
          std::max_element(std::begin(slots), std::end(slots), [](const auto& a, const auto& b) { return a.size() < b.size(); });
      total -= largest->size();
      largest->release();
    }
  }
};

Workspaces& mine() {
  thread_local Workspaces workspaces;
  return workspaces;
}

}  // namespace

int64_t thread_count() { return torch::stable::get_num_threads(); }

void parallel_ranges(int64_t tasks, int64_t task_cost, void (*run)(void* context, int64_t begin, int64_t end), void* context) {
  // Waking a thread takes some microseconds: a range should be worth about ten.
  constexpr int64_t range_cost = 1 << 15;
  const int64_t grain = std::max<int64_t>(1, range_cost / std::max<int64_t>(1, task_cost));
  if (tasks <= grain) return run(context, 0, tasks);
  torch::stable::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) {
    run(context, begin, end);
    mine().trim(limit);
  });
}

void* workspace_bytes(Slot slot, size_t bytes) { return mine().slots[static_cast<size_t>(slot)].at_least(bytes); }

WorkspaceUse::WorkspaceUse() { ++mine().operators; }
WorkspaceUse::~WorkspaceUse() {
  --mine().operators;
  mine().trim(limit);
}

size_t workspace_limit() { return limit; }
void set_workspace_limit(size_t bytes) { limit = bytes; }
size_t workspace_size() { return held; }

void release_workspaces() {
  const int64_t threads = thread_count();
  mine().trim(0);
  torch::stable::parallel_for(0, threads, 1, [](int64_t, int64_t) { mine().trim(0); });
}

}  // namespace torchcnn
