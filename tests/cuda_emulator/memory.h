// Between the parts of the emulator: what threads.cpp tells memory.cpp of a launch, and what the checks need.
#pragma once

#include "threads.h"

namespace emulator {

struct Bytes {
  uintptr_t first = 0, last = 0;  // [first, last)
  bool hold(uintptr_t at, size_t bytes) const { return at >= first && at + bytes <= last; }
  bool hold(const void* at, size_t bytes) const { return hold(reinterpret_cast<uintptr_t>(at), bytes); }
};

bool in_a_kernel();
unsigned block_serial();  // a number for each block of each launch
Bytes stack_of_thread();

// Finds the shared memory of the host thread that launches.
void begin_launch(const Kernel&, size_t dynamic_shared_bytes);
// Fills shared memory with 0xFF.
void begin_block();
// All accesses before it come before all accesses after it.
void begin_interval();

// Until the next launch.
void stop_checking();

// Whether the memory was declared.
bool set_memory(void* first, int value, size_t bytes);

bool is_shared(const void* at, size_t bytes);

// An access of the running thread; `by` is the instruction. An asynchronous write has an issue and an arrival. Checks in the
// build `check` alone.
enum class Access { read, write, issue, arrival };
void access(const void* at, size_t bytes, Access, const void* by);

}  // namespace emulator
