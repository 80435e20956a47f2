// Which memory a kernel may touch, and in which order.
//
// In the build `check` the compiler calls the functions named __tsan_... before each access of a kernel (-fsanitize=thread,
// without its own runtime), and the ones named __ubsan_... where an index or an alignment is wrong. Bytes that were always
// accessed together share a cell: who wrote them last and who read them since. An earlier access by another thread has happened
// before this one if a barrier lies between them, or, within a warp, a __syncwarp of both (order_memory keeps for each lane what
// it has seen of the others, a vector clock). Two accesses, one of them a write, of which neither has happened before the other
// are a race, whatever order the fibers ran in.
#include "memory.h"

#include <dlfcn.h>
#include <link.h>

#include <algorithm>
#include <array>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <span>
#include <string>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

namespace torchcnn::cuda {
// What common.cuh declares; a launch may use a part of it.
alignas(1024) thread_local unsigned char dynamic_shared[emulator::kMostSharedBytes];
}  // namespace torchcnn::cuda

namespace emulator {
namespace {

#ifdef EMULATOR_CHECKS_MEMORY
constexpr bool kChecks = true;
#else
constexpr bool kChecks = false;
#endif

// ---------------------------------------------------------------------------------------------------------- accesses

// A time between two barriers of one block has a number of its own; they grow from block to block and launch to launch.
uint32_t interval, first_of_block, first_of_launch;

// What each thread has seen of each lane of its warp, since the last barrier.
using Clock = std::array<uint16_t, kWarp>;
std::array<Clock, 1024> clocks;

// Marks of an event beside the number of its thread. Whole words, since the fields of one are slow to store and then copy.
enum Mark : uint32_t { several_lanes = 1 << 10, several_warps = 1 << 11, several_blocks = 1 << 12, under_way = 1 << 13 };

struct Event {
  uint32_t interval;  // 0: never
  uint32_t by;        // the instruction, from the beginning of the module
  uint32_t clock;     // of the thread's own lane
  uint32_t who;

  unsigned thread() const { return who % several_lanes; }
  bool has(Mark mark) const { return who & mark; }
};

struct Cell {
  Event write, read;
};

struct FreeMemory {
  void operator()(Cell* cells) const { std::free(cells); }
};

struct Range : Bytes {
  bool initialised = false, shared = false;
  unsigned cell_bits = 4;  // of a cell are 2^cell_bits bytes; no access so far began or ended within one
  std::unique_ptr<Cell[], FreeMemory> cells;

  std::span<Cell> cells_at(uintptr_t at, size_t bytes) {
    if (cells == nullptr) cells = new_cells();
    while (((at - first) | bytes) & ((size_t(1) << cell_bits) - 1)) halve_cells();
    return {&cells[(at - first) >> cell_bits], bytes >> cell_bits};
  }

 private:
  size_t count() const { return ((last - first - 1) >> cell_bits) + 1; }
  std::unique_ptr<Cell[], FreeMemory> new_cells() const {
    return std::unique_ptr<Cell[], FreeMemory>(static_cast<Cell*>(std::calloc(count(), sizeof(Cell))));
  }

  void halve_cells() {
    --cell_bits;
    auto halves = new_cells();
    for (size_t i = 0; i < count(); ++i) halves[i] = cells[i / 2];
    cells = std::move(halves);
  }
};

std::vector<Range> declared;
Range static_shared, dynamic_shared;  // static_shared: the whole segment, which holds the other
Bytes parameters, constants;
uintptr_t module_begin;

Bytes bytes_of(const void* first, size_t bytes) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(first);
  return {begin, begin + bytes};
}

uint32_t in_module(const void* instruction) { return uint32_t(reinterpret_cast<uintptr_t>(instruction) - module_begin); }

// The lines of an instruction, innermost first, as far as the compiler noted them.
std::string lines_of(uint32_t instruction) {
  Dl_info info;
  if (dladdr(reinterpret_cast<void*>(module_begin), &info) == 0) return "?";
  char command[1024];
  std::snprintf(command, sizeof command, "addr2line -i -e '%s' 0x%x 2>/dev/null", info.dli_fname, unsigned(instruction - 1));
  std::string lines;
  FILE* pipe = popen(command, "r");
  if (pipe == nullptr) return "?";
  char line[1024];
  while (std::fgets(line, sizeof line, pipe) != nullptr) {
    const char* slash = std::strrchr(line, '/');
    std::string name = slash == nullptr ? line : slash + 1;
    name = name.substr(0, name.find_first_of(" \n"));
    lines += (lines.empty() ? "" : " < ") + name;
  }
  pclose(pipe);
  return lines.empty() ? "?" : lines;
}

// Inline functions of the standard library may be the kernels' copies, whose accesses are checked: not while a failure is told.
bool failing = false;

[[noreturn]] __attribute__((format(printf, 2, 3))) void fail_at(uint32_t instruction, const char* format, ...) {
  stop_checking();
  static char message[4096];
  std::snprintf(message, sizeof message, "%s: ", lines_of(instruction).c_str());
  const size_t length = std::strlen(message);
  std::va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(message + length, sizeof message - length, format, arguments);
  va_end(arguments);
  fail_with(message);
}

[[noreturn]] void fail_race(const Range& range, size_t offset, bool writes, const Event& event, bool other_writes, uint32_t by) {
  stop_checking();
  static char other[1024];
  std::snprintf(other, sizeof other, "%s", lines_of(event.by).c_str());
  const bool same_block = event.interval >= first_of_block;
  fail_at(by, "race: %s byte %zu of %s memory that thread %u%s %s at %s%s", writes ? "writes" : "reads", offset,
          range.shared ? "shared" : "global", event.thread(), same_block ? "" : " of another block",
          other_writes ? "wrote" : "read", other, event.has(under_way) ? ", a copy still under way" : "");
}

// Within a block, without a barrier between.
[[gnu::noinline]] bool lanes_have_met(const Event& event, unsigned thread) {
  if (event.has(several_warps) || event.thread() / kWarp != thread / kWarp) return false;
  const Clock& seen = clocks[thread];
  if (!event.has(several_lanes)) return event.thread() == thread || seen[event.thread() % kWarp] >= event.clock;
  uint16_t least = seen[0];
  for (uint16_t each : seen) least = std::min(least, each);
  return least >= event.clock;
}

inline bool has_happened_before(const Event& event, const Event& now) {
  if (event.interval < first_of_launch) return true;
  if (event.has(several_blocks) || event.interval < first_of_block) return false;
  return event.interval < now.interval || lanes_have_met(event, now.thread());
}

void note_read(Event& read, const Event& now, bool shared) {
  const bool of_launch = read.interval >= first_of_launch && read.interval != 0;
  uint32_t who = now.who, clock = now.clock;
  if (!shared && of_launch && (read.has(several_blocks) || read.interval < first_of_block)) who |= several_blocks;
  if (read.interval == interval && !(read.thread() == now.thread() && !(read.who & (several_lanes | several_warps))) &&
      !has_happened_before(read, now)) {
    if (read.has(several_warps) || read.thread() / kWarp != now.thread() / kWarp) {
      who |= several_warps;
    } else {
      who |= several_lanes;
      clock = std::max(read.clock, clock);
    }
  }
  read = {now.interval, now.by, clock, who};
}

// What an earlier block did to shared memory is forgotten.
void access_cell(const Range& range, size_t offset, Cell& cell, Access kind, const Event& now) {
  const bool writes = kind != Access::read;
  const bool written = range.shared ? cell.write.interval >= first_of_block : cell.write.interval != 0;
  if (!written && !writes && !range.initialised)
    fail_at(now.by, "reads byte %zu of %s memory, which nothing has written so far", offset, range.shared ? "shared" : "global");
  if (written) {
    const bool arrives = kind == Access::arrival && cell.write.has(under_way) && cell.write.thread() == now.thread();
    const bool copied = cell.write.has(under_way) && cell.write.interval >= first_of_block;
    if (!arrives && (copied || !has_happened_before(cell.write, now))) fail_race(range, offset, writes, cell.write, true, now.by);
  }
  if (!writes) return note_read(cell.read, now, range.shared);
  const bool read = range.shared ? cell.read.interval >= first_of_block : cell.read.interval != 0;
  if (read && !has_happened_before(cell.read, now)) fail_race(range, offset, writes, cell.read, false, now.by);
  cell.write = {now.interval, now.by, now.clock, now.who | (kind == Access::issue ? uint32_t(under_way) : 0)};
}

void access_range(Range& range, uintptr_t at, size_t bytes, Access kind, uint32_t by) {
  const unsigned thread = thread_number();
  const Event now = {interval, by, clocks[thread][thread % kWarp], thread};
  const std::span<Cell> cells = range.cells_at(at, bytes);
  for (size_t i = 0; i < cells.size(); ++i) access_cell(range, at - range.first + (i << range.cell_bits), cells[i], kind, now);
}

bool is_launch_variable(uintptr_t at, size_t bytes) {
  return bytes_of(&threadIdx, sizeof threadIdx).hold(at, bytes) || bytes_of(&blockIdx, sizeof blockIdx).hold(at, bytes) ||
         bytes_of(&blockDim, sizeof blockDim).hold(at, bytes) || bytes_of(&gridDim, sizeof gridDim).hold(at, bytes);
}

// ----------------------------------------------------------------------------------------------------- shared memory

// The thread-local segment of this module, which holds what the kernels declare __shared__ and nothing else.
int find_module(dl_phdr_info* info, size_t, void*) {
  const uintptr_t here = reinterpret_cast<uintptr_t>(&find_module);
  Bytes whole = {UINTPTR_MAX, 0}, read_only;
  size_t shared_bytes = 0;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto& header = info->dlpi_phdr[i];
    const Bytes segment = {info->dlpi_addr + header.p_vaddr, info->dlpi_addr + header.p_vaddr + header.p_memsz};
    if (header.p_type == PT_TLS) shared_bytes = header.p_memsz;
    if (header.p_type != PT_LOAD) continue;
    whole = {std::min(whole.first, segment.first), std::max(whole.last, segment.last)};
    if (!(header.p_flags & (PF_W | PF_X))) read_only = {read_only.first == 0 ? segment.first : read_only.first, segment.last};
  }
  if (!whole.hold(here, 1)) return 0;
  module_begin = info->dlpi_addr;
  constants = read_only;
  static_cast<Bytes&>(static_shared) = bytes_of(info->dlpi_tls_data, shared_bytes);
  return 1;
}

void fill(uintptr_t first, uintptr_t last) {
  if (last > first) std::memset(reinterpret_cast<void*>(first), 0xff, last - first);
}

uintptr_t end_of_dynamic_shared() { return dynamic_shared.first + kMostSharedBytes; }

}  // namespace

void stop_checking() { failing = true; }

void begin_launch(const Kernel& kernel, size_t dynamic_shared_bytes) {
  failing = false;
  torchcnn::cuda::dynamic_shared[0] = 0;  // only then does the segment exist for this host thread
  static_cast<Bytes&>(dynamic_shared) = bytes_of(torchcnn::cuda::dynamic_shared, dynamic_shared_bytes);
  dl_iterate_phdr(find_module, nullptr);
  for (Range* range : {&static_shared, &dynamic_shared}) {
    range->shared = true;
    range->cells.reset();
    range->cell_bits = 4;
  }
  parameters = bytes_of(kernel.parameters, kernel.parameter_bytes);
  first_of_launch = interval + 1;
#ifdef __SANITIZE_ADDRESS__
  unsigned char* memory = torchcnn::cuda::dynamic_shared;
  __asan_unpoison_memory_region(memory, kMostSharedBytes);
  const size_t used = (dynamic_shared_bytes + 7) / 8 * 8;
  __asan_poison_memory_region(memory + used, kMostSharedBytes - used);
#endif
}

void begin_block() {
  fill(static_shared.first, dynamic_shared.first);
  fill(dynamic_shared.first, dynamic_shared.last);
  fill(end_of_dynamic_shared(), static_shared.last);
  first_of_block = interval + 1;
  begin_interval();
}

void begin_interval() {
  ++interval;
  if (!kChecks) return;
  for (unsigned thread = 0; thread < blockDim.x * blockDim.y * blockDim.z; ++thread) {
    clocks[thread].fill(0);
    clocks[thread][thread % kWarp] = 1;
  }
}

void order_memory(void* const*, unsigned mask, const Place&) {
  if (!kChecks) return;
  const unsigned first = thread_number() / kWarp * kWarp;
  Clock all = {};
  for (unsigned lane = 0; lane < kWarp; ++lane)
    for (unsigned of = 0; (mask >> lane & 1) && of < kWarp; ++of) all[of] = std::max(all[of], clocks[first + lane][of]);
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if (!(mask >> lane & 1)) continue;
    clocks[first + lane] = all;
    ++clocks[first + lane][lane];
  }
}

bool is_shared(const void* at, size_t bytes) {
  const uintptr_t first = reinterpret_cast<uintptr_t>(at);
  if (dynamic_shared.hold(first, bytes)) return true;
  return static_shared.hold(first, bytes) && (first + bytes <= dynamic_shared.first || first >= end_of_dynamic_shared());
}

void access(const void* address, size_t bytes, Access kind, const void* by) {
  if (!kChecks || failing || !in_a_kernel()) return;
  const uintptr_t at = reinterpret_cast<uintptr_t>(address);
  if (stack_of_thread().hold(at, bytes)) return;
  if (dynamic_shared.hold(at, bytes)) return access_range(dynamic_shared, at, bytes, kind, in_module(by));
  if (is_shared(address, bytes)) return access_range(static_shared, at, bytes, kind, in_module(by));
  for (Range& range : declared)
    if (range.hold(at, bytes)) return access_range(range, at, bytes, kind, in_module(by));
  if (kind == Access::read && (is_launch_variable(at, bytes) || parameters.hold(at, bytes) || constants.hold(at, bytes))) return;
  const bool shared = static_shared.hold(at, 1);
  fail_at(
      in_module(by), "out of bounds: %s %zu bytes of %s at %p", kind == Access::read ? "reads" : "writes", bytes,
      shared ? "shared memory that the launch has not asked for" : "memory that is neither an argument's nor the thread's own",
      address);
}

void declare_memory(const void* first, size_t bytes, bool initialised) {
  if (bytes == 0 || first == nullptr) return;
  const Bytes added = bytes_of(first, bytes);
  for (Range& range : declared)
    if (range.first == added.first && range.last == added.last) {
      range.initialised |= initialised;
      return;
    }
  std::erase_if(declared, [&](const Range& range) { return range.first < added.last && added.first < range.last; });
  Range range;
  static_cast<Bytes&>(range) = added;
  range.initialised = initialised;
  declared.push_back(std::move(range));
  if (!initialised) fill(added.first, added.last);
}

void forget_memory() { declared.clear(); }

// A launch of its own, which writes: cudaMemsetAsync.
bool set_memory(void* first, int value, size_t bytes) {
  const Bytes set = bytes_of(first, bytes);
  const auto range = std::ranges::find_if(declared, [&](const Range& declared) { return declared.hold(set.first, bytes); });
  if (range == declared.end()) return false;
  std::memset(first, value, bytes);
  if (!kChecks) return true;
  ++interval;
  for (Cell& cell : range->cells_at(set.first, bytes)) cell.write = {interval, 0, 0, 0};
  return true;
}

}  // namespace emulator

// --------------------------------------------------------------------------------------- what the compiler calls

extern "C" {

#define CALLER __builtin_return_address(0)
#define EMULATOR_HOOKS(bytes)                                                                                  \
  void __tsan_read##bytes(void* at) { emulator::access(at, bytes, emulator::Access::read, CALLER); }           \
  void __tsan_write##bytes(void* at) { emulator::access(at, bytes, emulator::Access::write, CALLER); }         \
  void __tsan_unaligned_read##bytes(void* at) { emulator::access(at, bytes, emulator::Access::read, CALLER); } \
  void __tsan_unaligned_write##bytes(void* at) { emulator::access(at, bytes, emulator::Access::write, CALLER); }
EMULATOR_HOOKS(1)
EMULATOR_HOOKS(2)
EMULATOR_HOOKS(4)
EMULATOR_HOOKS(8)
EMULATOR_HOOKS(16)
#undef EMULATOR_HOOKS

void __tsan_read_range(void* at, size_t bytes) { emulator::access(at, bytes, emulator::Access::read, CALLER); }
void __tsan_write_range(void* at, size_t bytes) { emulator::access(at, bytes, emulator::Access::write, CALLER); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void*, void*) {}
void __tsan_vptr_read(void*) {}
// The only atomic accesses: whether a local static variable of a host function has been initialised.
unsigned char __tsan_atomic8_load(const volatile unsigned char* at, int) { return __atomic_load_n(at, __ATOMIC_ACQUIRE); }

// The compiler describes the place first.
struct SourceLocation {
  const char* file;
  uint32_t line, column;
};

static void fail_in_source(const SourceLocation& at, const char* what, unsigned long value) {
  static char message[1024];
  const char* slash = std::strrchr(at.file, '/');
  std::snprintf(message, sizeof message, "%s:%u: %s %#lx", slash == nullptr ? at.file : slash + 1, at.line, what, value);
  if (emulator::in_a_kernel()) emulator::fail_with(message);
  std::fprintf(stderr, "%s\n", message);
  std::abort();
}

void __ubsan_handle_out_of_bounds(const SourceLocation* at, unsigned long index) {
  fail_in_source(*at, "index out of bounds:", index);
}
void __ubsan_handle_type_mismatch_v1(const SourceLocation* at, unsigned long address) {
  fail_in_source(*at, "misaligned or null address:", address);
}

void __assert_fail(const char* condition, const char* file, unsigned line, const char* function) noexcept {
  static char message[1024];
  const char* slash = std::strrchr(file, '/');
  std::snprintf(message, sizeof message, "%s:%u: assert(%s) in %s", slash == nullptr ? file : slash + 1, line, condition,
                function);
  if (emulator::in_a_kernel()) emulator::fail_with(message);
  std::fprintf(stderr, "%s\n", message);
  std::abort();
}
}
