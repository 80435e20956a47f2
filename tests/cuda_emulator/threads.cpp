// Threads of a block as fibers, and launches.
//
// One block runs at a time. A fiber runs until it waits (at a barrier, or for other lanes of its warp) or returns; then the next
// that can run does, in ascending, descending or random order. When none can and all wait at the same barrier, it opens; anything
// else is a divergence. A launch that meets an error ends there: its fibers are left as they are and never run again.
#include <cuda_runtime_api.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "memory.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

// Saves the registers that a function has to keep on the stack, and the stack pointer in *from; continues at `to`.
extern "C" void emulator_switch(void** from, void* to);
asm(R"(
.text
.type emulator_switch, @function
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulator_switch, .-emulator_switch
)");

namespace emulator {
namespace {

constexpr size_t kStackBytes = 256 << 10, kPage = 4096;
constexpr unsigned kMostThreads = 1024;

enum class State { ready, at_barrier, meeting, returned };

struct Thread {
  unsigned number;
  uint3 index;
  State state;
  Place place;  // where it waits
  unsigned mask;
  Combine combine;
  void* operand;
  void* stack_pointer;
  unsigned char* stack;
  void* fake_stack;  // of the address sanitizer
};

std::mutex one_launch;
std::vector<Thread> threads;
Thread* running;
unsigned thread_count, returned, blocks_begun;
bool combining;  // what runs belongs to the emulator, though it may have been compiled with the kernel
Kernel kernel;
void* main_stack_pointer;
std::string error;
std::map<const void*, size_t> shared_bytes_asked;

Order order_from_environment() {
  const char* name = std::getenv("TORCHCNN_EMULATOR_ORDER");
  if (name == nullptr || std::strcmp(name, "ascending") == 0) return Order::ascending;
  if (std::strcmp(name, "descending") == 0) return Order::descending;
  if (std::strcmp(name, "random") == 0) return Order::random;
  std::fprintf(stderr, "TORCHCNN_EMULATOR_ORDER is %s: set it to ascending, descending or random\n", name);
  std::abort();
}

unsigned seed_from_environment() {
  const char* seed = std::getenv("TORCHCNN_EMULATOR_SEED");
  return seed == nullptr ? 0 : unsigned(std::strtoul(seed, nullptr, 10));
}

Order order = order_from_environment();
std::minstd_rand random_numbers(seed_from_environment() + 1);

// ------------------------------------------------------------------------------------------------------------ fibers

#ifdef __SANITIZE_ADDRESS__
const void* main_stack;
size_t main_stack_bytes;
void* main_fake_stack;

void leave(bool for_ever) {
  Thread& thread = *running;
  __sanitizer_start_switch_fiber(for_ever ? nullptr : &thread.fake_stack, main_stack, main_stack_bytes);
  emulator_switch(&thread.stack_pointer, main_stack_pointer);
  __sanitizer_finish_switch_fiber(thread.fake_stack, &main_stack, &main_stack_bytes);
}

void begin_on_fiber() { __sanitizer_finish_switch_fiber(nullptr, &main_stack, &main_stack_bytes); }

void enter(Thread& thread) {
  __sanitizer_start_switch_fiber(&main_fake_stack, thread.stack, kStackBytes);
  emulator_switch(&main_stack_pointer, thread.stack_pointer);
  __sanitizer_finish_switch_fiber(main_fake_stack, nullptr, nullptr);
}
#else
void leave(bool) { emulator_switch(&running->stack_pointer, main_stack_pointer); }
void begin_on_fiber() {}
void enter(Thread& thread) { emulator_switch(&main_stack_pointer, thread.stack_pointer); }
#endif

void resume(Thread& thread) {
  running = &thread;
  threadIdx = thread.index;
  enter(thread);
  running = nullptr;
}

[[noreturn]] void run_thread() {
  begin_on_fiber();
  kernel.entry(kernel.parameters);
  running->state = State::returned;
  ++returned;
  leave(true);
  std::abort();
}

// The stacks, with a page between them that cannot be touched.
void create_threads() {
  if (!threads.empty()) return;
  const size_t distance = kStackBytes + kPage;
  void* stacks =
      mmap(nullptr, kMostThreads * distance, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stacks == MAP_FAILED) std::abort();
  threads.resize(kMostThreads);
  for (unsigned i = 0; i < kMostThreads; ++i) {
    unsigned char* guard = static_cast<unsigned char*>(stacks) + i * distance;
    mprotect(guard, kPage, PROT_NONE);
    threads[i].number = i;
    threads[i].stack = guard + kPage;
  }
}

void reset_thread(Thread& thread) {
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(thread.stack, kStackBytes);
#endif
  const unsigned row = thread.number / blockDim.x;
  thread.index = {thread.number % blockDim.x, row % blockDim.y, row / blockDim.y};
  thread.state = State::ready;
  thread.fake_stack = nullptr;
  // Were the stacks to begin at the same offset, their upper ends would all compete for the same few lines of the cache.
  constexpr unsigned offsets = 61, line = 64;
  void** top = reinterpret_cast<void**>(thread.stack + kStackBytes - thread.number % offsets * line);
  *--top = nullptr;  // as if run_thread had been called from nowhere: a return address, and the stack aligned as after a call
  *--top = reinterpret_cast<void*>(&run_thread);
  for (int i = 0; i < 6; ++i) *--top = nullptr;  // registers
  thread.stack_pointer = top;
}

// ------------------------------------------------------------------------------------------------- waiting for others

bool same_place(const Place& a, const Place& b) {
  if (a.line() != b.line() || a.column() != b.column()) return false;
  return a.file_name() == b.file_name() || std::strcmp(a.file_name(), b.file_name()) == 0;
}

std::string text(const Place& place) {
  const char* slash = std::strrchr(place.file_name(), '/');
  return std::string(slash == nullptr ? place.file_name() : slash + 1) + ":" + std::to_string(place.line());
}

std::string text(const uint3& at) {
  return "(" + std::to_string(at.x) + ", " + std::to_string(at.y) + ", " + std::to_string(at.z) + ")";
}

void keep_error(const std::string& message) {
  if (error.empty()) error = message;
}

bool open_barrier() {
  for (unsigned i = 0; i < thread_count; ++i)
    if (threads[i].state != State::at_barrier || !same_place(threads[i].place, threads[0].place)) return false;
  for (unsigned i = 0; i < thread_count; ++i) threads[i].state = State::ready;
  begin_interval();
  return true;
}

// The places where threads wait, and how many at each.
void report_divergence() {
  std::map<std::string, int> waiting;
  for (unsigned i = 0; i < thread_count; ++i) {
    const Thread& thread = threads[i];
    if (thread.state == State::at_barrier) ++waiting["at the barrier " + text(thread.place)];
    if (thread.state == State::meeting) ++waiting["for other lanes at " + text(thread.place)];
  }
  std::string message = "divergence in block " + text(blockIdx) + ": of " + std::to_string(thread_count) + " threads ";
  for (const auto& [where, count] : waiting) message += std::to_string(count) + " wait " + where + ", ";
  keep_error(message + std::to_string(returned) + " have returned");
}

void run_block(std::vector<Thread*>& in_order) {
  returned = 0;
  ++blocks_begun;
  begin_block();
  for (unsigned i = 0; i < thread_count; ++i) reset_thread(threads[i]);
  while (error.empty() && returned < thread_count) {
    if (order == Order::random) std::shuffle(in_order.begin(), in_order.end(), random_numbers);
    bool any = false;
    for (Thread* thread : in_order) {
      if (thread->state != State::ready) continue;
      any = true;
      resume(*thread);
      if (!error.empty()) return;
    }
    if (!any && !open_barrier()) report_divergence();
  }
}

cudaError_t run_grid() {
  std::vector<Thread*> in_order(thread_count);
  for (unsigned i = 0; i < thread_count; ++i) in_order[i] = &threads[order == Order::descending ? thread_count - 1 - i : i];
  const uint64_t blocks = uint64_t(gridDim.x) * gridDim.y * gridDim.z;
  for (uint64_t i = 0; i < blocks && error.empty(); ++i) {
    const uint64_t block = order == Order::descending ? blocks - 1 - i : i, row = block / gridDim.x;
    blockIdx = {unsigned(block % gridDim.x), unsigned(row % gridDim.y), unsigned(row / gridDim.y)};
    run_block(in_order);
  }
  return error.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}

}  // namespace

// ----------------------------------------------------------------------------------------------- what kernels ask for

unsigned thread_number() { return running->number; }
bool in_a_kernel() { return running != nullptr && !combining; }
unsigned block_serial() { return blocks_begun; }

Bytes stack_of_thread() {
  const uintptr_t first = reinterpret_cast<uintptr_t>(running->stack);
  return {first, first + kStackBytes};
}

void fail_with(const char* message) {
  stop_checking();
  combining = false;
  keep_error(std::string(message) + " [thread " + text(threadIdx) + " of block " + text(blockIdx) + "]");
  leave(true);
  std::abort();
}

void fail(const Place& place, const char* format, ...) {
  char message[512];
  std::va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(message, sizeof message, format, arguments);
  va_end(arguments);
  char whole[768];  // not a std::string, which nothing would free
  const char* slash = std::strrchr(place.file_name(), '/');
  std::snprintf(whole, sizeof whole, "%s:%u: %s", slash == nullptr ? place.file_name() : slash + 1, unsigned(place.line()),
                message);
  fail_with(whole);
}

void block_barrier(const Place& place) {
  running->state = State::at_barrier;
  running->place = place;
  leave(false);
}

void meet(unsigned mask, void* operand, Combine combine, const Place& place) {
  Thread& thread = *running;
  const unsigned first = thread.number / kWarp * kWarp, lanes = std::min(kWarp, thread_count - first);
  if (lanes < kWarp) mask &= (1u << lanes) - 1;
  if (!(mask >> lane_number() & 1)) fail(place, "lane %u is not in its own mask %08x", lane_number(), mask);
  thread.state = State::meeting;
  thread.place = place;
  thread.mask = mask;
  thread.combine = combine;
  thread.operand = operand;
  for (unsigned lane = 0; lane < lanes; ++lane)
    if ((mask >> lane & 1) && threads[first + lane].state != State::meeting) return leave(false);  // until the last is here
  void* operands[kWarp] = {};
  for (unsigned lane = 0; lane < lanes; ++lane) {
    if (!(mask >> lane & 1)) continue;
    const Thread& other = threads[first + lane];
    if (other.mask != mask || other.combine != combine || !same_place(other.place, place)) return leave(false);
    operands[lane] = other.operand;
  }
  combining = true;
  combine(operands, mask, place);
  combining = false;
  for (unsigned lane = 0; lane < lanes; ++lane)
    if (mask >> lane & 1) threads[first + lane].state = State::ready;
}

// ----------------------------------------------------------------------------------------------- what the host asks for

cudaError_t launch(const cudaLaunchConfig_t& config, const Kernel& started) {
  const std::lock_guard lock(one_launch);
  error.clear();
  const dim3 grid = config.gridDim, block = config.blockDim;
  const uint64_t count = uint64_t(block.x) * block.y * block.z;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > INT32_MAX || grid.y > 65535 || grid.z > 65535)
    return cudaErrorInvalidConfiguration;
  if (count == 0 || count > kMostThreads || block.z > 64) return cudaErrorInvalidConfiguration;
  const auto asked = shared_bytes_asked.find(started.function);
  if (config.dynamicSmemBytes > (asked == shared_bytes_asked.end() ? kSharedBytesWithoutAsking : asked->second))
    return cudaErrorInvalidValue;
  create_threads();
  gridDim = grid;
  blockDim = block;
  thread_count = unsigned(count);
  kernel = started;
  begin_launch(kernel, config.dynamicSmemBytes);
  return run_grid();
}

// TORCHCNN_EMULATOR_SM chooses a GPU without tensor-core steps (75), with (80), or with those of a warpgroup (90).
int capability() {
  const char* sm = std::getenv("TORCHCNN_EMULATOR_SM");
  return sm == nullptr ? 80 : std::atoi(sm);
}

size_t most_shared_bytes() { return capability() < 80 ? size_t(64) << 10 : kMostSharedBytes; }

void set_order(Order chosen, unsigned seed) {
  const std::lock_guard lock(one_launch);
  order = chosen;
  random_numbers.seed(seed + 1);
}

}  // namespace emulator

cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value < 0 || size_t(value) > emulator::most_shared_bytes()) return cudaErrorInvalidValue;
  const std::lock_guard lock(emulator::one_launch);
  emulator::shared_bytes_asked[function] = size_t(value);
  return cudaSuccess;
}

const char* cudaGetErrorString(cudaError_t code) {
  switch (code) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorLaunchFailure: return emulator::error.c_str();
    default: return "invalid argument";
  }
}

cudaError_t cudaMemsetAsync(void* first, int value, size_t bytes, cudaStream_t) {
  const std::lock_guard lock(emulator::one_launch);
  return emulator::set_memory(first, value, bytes) ? cudaSuccess : cudaErrorInvalidValue;
}

cudaError_t cudaGetLastError() { return cudaSuccess; }

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const int capability = emulator::capability();
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = capability / 10; break;
    case cudaDevAttrComputeCapabilityMinor: *value = capability % 10; break;
    case cudaDevAttrMultiProcessorCount: *value = 4; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = int(emulator::kSharedBytesWithoutAsking); break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = int(emulator::most_shared_bytes()); break;
    case cudaDevAttrMaxThreadsPerBlock: *value = int(emulator::kMostThreads); break;
    default: return cudaErrorInvalidValue;
  }
  return cudaSuccess;
}
