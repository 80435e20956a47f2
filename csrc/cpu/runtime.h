// What kernels need from the machine around them: threads and scratch memory. Defined in runtime.cpp, so that a kernel file
// includes no framework header.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <type_traits>

namespace torchcnn {

int64_t thread_count();

// Calls run(context, begin, end) on disjoint ranges that together cover 0 ... tasks - 1, on torch's own threads. Which thread
// gets which range is not defined, so a task may not depend on another: that is what makes results independent of it.
// task_cost is a task's rough number of vector instructions; cheap tasks stay on the calling thread.
void parallel_ranges(int64_t tasks, int64_t task_cost, void (*run)(void* context, int64_t begin, int64_t end), void* context);

template <class Task>
void parallel_for(int64_t tasks, int64_t task_cost, Task&& task) {
  auto run = [](void* context, int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) (*static_cast<std::remove_reference_t<Task>*>(context))(index);
  };
  parallel_ranges(tasks, task_cost, run, const_cast<void*>(static_cast<const void*>(std::addressof(task))));
}

// Whether tensors of so many bytes together are worth asking for ahead: from here on that gains more where they have to come from
// memory than it costs where the last operator has left them in the caches.
inline bool worth_asking_ahead(int64_t bytes) { return bytes > int64_t(8) << 20; }

// Scratch memory of the calling thread, 64-byte aligned, kept from call to call because touching fresh pages costs more than
// the arithmetic of a small layer. A slot is valid until the same thread asks for it again, or the operator ends.
enum class Slot {
  tables,
  row_pointers,
  phases,
  filter_rows,
  regions,
  runs,
  offsets,
  positions,
  packed_weight,
  patches,
  gradient,
  tile,
  partial_sums,
  bias_sums,
  flags,
  weight_copy,
  wide_weight,  // bfloat16 and float16 in float32
  wide_images,
  wide_results,
  count
};
void* workspace_bytes(Slot slot, size_t bytes);

template <class T>
T* workspace(Slot slot, int64_t elements) {
  return static_cast<T*>(workspace_bytes(slot, static_cast<size_t>(elements) * sizeof(T)));
}

// Stands in every operator that keeps slots while others run tasks. When the last of a thread ends, the thread gives back what it
// holds beyond the limit.
struct WorkspaceUse {
  WorkspaceUse();
  ~WorkspaceUse();
  WorkspaceUse(const WorkspaceUse&) = delete;
  WorkspaceUse& operator=(const WorkspaceUse&) = delete;
};

size_t workspace_limit();  // bytes that a thread may keep between operators
void set_workspace_limit(size_t bytes);
size_t workspace_size();    // bytes that all threads hold
void release_workspaces();  // of this thread and of the threads that it runs tasks on

}  // namespace torchcnn
