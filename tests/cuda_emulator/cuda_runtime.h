// Stands before the toolkit's header of this name in the include path and makes CUDA C++ a C++ that g++ compiles for the
// processor.
//
// In the build `check` everything is inlined into kernels: g++ does not instrument the store of a struct that a call returns.
//
// The types (dim3, float4, __half, cudaLaunchConfig_t) and the C functions are declared by the toolkit's own headers. Here are
// the words of the language that g++ lacks, and the functions of device code. __shared__ becomes thread_local: that allows arrays
// within functions and one `extern` array of unknown size, and lays all of them into one segment that can be found and poisoned.
// Arrays of __half and other classes with constructors are not for it, because g++ would construct them: `check` refuses them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>
#include <math.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <tuple>
#include <type_traits>

#include "threads.h"

#undef __shared__
#define __shared__ thread_local
#define __launch_bounds__(...)
#ifdef __SANITIZE_THREAD__
#undef __global__
#define __global__ __attribute__((flatten))
#endif

constexpr int warpSize = 32;

inline void __syncthreads(emulator::Place place = emulator::Place::current()) { emulator::block_barrier(place); }

inline void __syncwarp(unsigned mask = emulator::kAllLanes, emulator::Place place = emulator::Place::current()) {
  emulator::meet(mask, nullptr, emulator::order_memory, place);
}

[[noreturn]] inline void __trap(emulator::Place place = emulator::Place::current()) { emulator::fail(place, "__trap()"); }

namespace emulator {

// The last lane to come looks into the variables of the others: the exchange itself, no access of the kernel's to be checked.
#define EMULATOR_UNCHECKED __attribute__((no_sanitize("thread")))

// Each lane of the mask receives the value of lane `from`, or its own if that is not one of `width` lanes that belong together.
template <class T>
T shuffle(unsigned mask, T value, unsigned from, int width, const Place& place) {
  struct Operand {
    T value, received;
    unsigned from;
  };
  const unsigned lane = lane_number(), first = lane & ~unsigned(width - 1);
  Operand operand = {value, value, from >= first && from < first + unsigned(width) ? from : lane};
  meet(mask, &operand, [](void* const* operands, unsigned lanes, const Place& at) EMULATOR_UNCHECKED {
    for (unsigned i = 0; i < kWarp; ++i) {
      if (!(lanes >> i & 1)) continue;
      Operand& to = *static_cast<Operand*>(operands[i]);
      if (!(lanes >> to.from & 1)) fail(at, "lane %u reads lane %u, which takes no part", i, to.from);
      to.received = static_cast<Operand*>(operands[to.from])->value;
    }
  }, place);
  return operand.received;
}

inline unsigned ballot(unsigned mask, bool predicate, const Place& place) {
  struct Operand {
    bool predicate;
    unsigned result;
  };
  Operand operand = {predicate, 0};
  meet(mask, &operand, [](void* const* operands, unsigned lanes, const Place&) EMULATOR_UNCHECKED {
    unsigned result = 0;
    for (unsigned i = 0; i < kWarp; ++i)
      if (lanes >> i & 1) result |= unsigned(static_cast<Operand*>(operands[i])->predicate) << i;
    for (unsigned i = 0; i < kWarp; ++i)
      if (lanes >> i & 1) static_cast<Operand*>(operands[i])->result = result;
  }, place);
  return operand.result;
}

}  // namespace emulator

template <class T>
T __shfl_sync(unsigned mask, T value, int from, int width = warpSize, emulator::Place place = emulator::Place::current()) {
  const int first = int(emulator::lane_number()) & ~(width - 1);
  return emulator::shuffle(mask, value, first + (from & (width - 1)), width, place);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = warpSize, emulator::Place place = emulator::Place::current()) {
  return emulator::shuffle(mask, value, emulator::lane_number() ^ unsigned(bits), width, place);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = warpSize,
                   emulator::Place place = emulator::Place::current()) {
  return emulator::shuffle(mask, value, emulator::lane_number() + by, width, place);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = warpSize, emulator::Place place = emulator::Place::current()) {
  return emulator::shuffle(mask, value, emulator::lane_number() - by, width, place);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, emulator::Place place = emulator::Place::current()) {
  return emulator::ballot(mask, predicate != 0, place);
}
inline int __any_sync(unsigned mask, int predicate, emulator::Place place = emulator::Place::current()) {
  return emulator::ballot(mask, predicate != 0, place) != 0;
}
inline int __all_sync(unsigned mask, int predicate, emulator::Place place = emulator::Place::current()) {
  return emulator::ballot(mask, predicate == 0, place) == 0;
}

// The lanes that have the same value.
template <class T>
unsigned __match_any_sync(unsigned mask, T value, emulator::Place place = emulator::Place::current()) {
  struct Operand {
    T value;
    unsigned result;
  };
  Operand operand = {value, 0};
  emulator::meet(mask, &operand, [](void* const* operands, unsigned lanes, const emulator::Place&) EMULATOR_UNCHECKED {
    for (unsigned i = 0; i < emulator::kWarp; ++i) {
      if (!(lanes >> i & 1)) continue;
      Operand& of = *static_cast<Operand*>(operands[i]);
      of.result = 0;
      for (unsigned j = 0; j < emulator::kWarp; ++j)
        if (lanes >> j & 1 && static_cast<Operand*>(operands[j])->value == of.value) of.result |= 1u << j;
    }
  }, place);
  return operand.result;
}

template <class T>
T __ldg(const T* from) {
  return *from;
}

template <class A, class B>
  requires(std::is_arithmetic_v<A> && std::is_arithmetic_v<B>)
constexpr std::common_type_t<A, B> min(A a, B b) {
  return std::min<std::common_type_t<A, B>>(a, b);
}
template <class A, class B>
  requires(std::is_arithmetic_v<A> && std::is_arithmetic_v<B>)
constexpr std::common_type_t<A, B> max(A a, B b) {
  return std::max<std::common_type_t<A, B>>(a, b);
}

inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(unsigned(x)); }
inline int __ffs(int x) { return x == 0 ? 0 : std::countr_zero(unsigned(x)) + 1; }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }

template <class... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute attribute, int value) {
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), attribute, value);
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... arguments) {
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<Parameters...> parameters;
  };
  const Call call = {kernel, {static_cast<Parameters>(arguments)...}};
  const auto run = [](const void* of) {
    const Call& made = *static_cast<const Call*>(of);
    std::apply(made.kernel, made.parameters);
  };
  return emulator::launch(*config, {reinterpret_cast<const void*>(kernel), run, &call, sizeof call});
}
