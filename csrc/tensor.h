// What the host functions of conv2d.cpp and pool2d.cpp need from a tensor, on PyTorch's stable ABI.
#pragma once

#include <sys/mman.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/shim_utils.h>

#include <array>
#include <optional>
#include <ostream>

#include "cpu/element.h"
#include "geometry.h"

#ifdef TORCHCNN_CUDA_EMULATOR
#include "emulator.h"
#endif

namespace torchcnn {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Prints the shape of a tensor in a message, only if the message is needed.
struct Shape {
  const Tensor& tensor;
  friend std::ostream& operator<<(std::ostream& out, const Shape& shape) {
    out << '[';
    for (int64_t i = 0; i < shape.tensor.dim(); ++i) out << (i == 0 ? "" : ", ") << shape.tensor.size(i);
    return out << ']';
  }
};

inline void require_rank(const char* op, const char* name, const Tensor& tensor, int64_t rank) {
  require(tensor.dim() == rank, op, name, " must have ", rank, " dimensions, got shape ", Shape{tensor});
}

// Where a tensor is, as torch writes it: cpu, cuda:1.
struct Place {
  const Tensor& tensor;
  friend std::ostream& operator<<(std::ostream& out, const Place& place) {
    if (place.tensor.is_cpu()) return out << "cpu";
    return out << (place.tensor.is_cuda() ? "cuda:" : "another:") << int(place.tensor.get_device_index());
  }
};

inline void require_same_device(const char* op, const char* a_name, const Tensor& a, const char* b_name, const Tensor& b) {
  require(a.is_cpu() == b.is_cpu() && a.is_cuda() == b.is_cuda() && a.get_device_index() == b.get_device_index(), op, a_name,
          " and ", b_name, " must be on the same device, got ", Place{a}, " and ", Place{b});
}

inline void require_same_kind(const char* op, const char* a_name, const Tensor& a, const char* b_name, const Tensor& b) {
  require_same_device(op, a_name, a, b_name, b);
  require(a.scalar_type() == b.scalar_type(), op, a_name, " and ", b_name, " must have the same dtype, got ",
          torch::headeronly::toString(a.scalar_type()), " and ", torch::headeronly::toString(b.scalar_type()));
}

// The layout that torch calls the suggested memory format: strides that fall from N over H and W to C.
inline Layout layout_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  if (strides[1] == 0) return Layout::nchw;
  int64_t least = 0;
  for (const int dim : {1, 3, 2, 0}) {
    if (sizes[dim] == 0 || strides[dim] < least) return Layout::nchw;
    // N 1 1 1 fits both layouts and counts as NCHW; so does N C 1 1 with the strides of an ordinary tensor.
    if (dim == 0 && least == strides[1]) return Layout::nchw;
    least = strides[dim];
    if (sizes[dim] > 1) least *= sizes[dim];
  }
  return Layout::channels_last;
}

inline Layout either_channels_last(const Tensor& a, const Tensor& b) {
  return layout_of(a) == Layout::channels_last ? Layout::channels_last : layout_of(b);
}

inline Layout layout_from(bool channels_last) { return channels_last ? Layout::channels_last : Layout::nchw; }

// The tensor itself where it already lies so, else a copy.
inline Tensor in_layout(const Tensor& tensor, Layout layout) {
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  const Strides wanted = activation_strides(layout, sizes[1], sizes[2], sizes[3]);
  const std::array<int64_t, 4> expected = {wanted.n, wanted.c, wanted.h, wanted.w};
  bool dense = true;
  for (int dim = 0; dim < 4; ++dim) dense &= sizes[dim] <= 1 || strides[dim] == expected[dim];
  if (dense) return tensor;
  using torch::headeronly::MemoryFormat;
  return torch::stable::contiguous(tensor, layout == Layout::nchw ? MemoryFormat::Contiguous : MemoryFormat::ChannelsLast);
}

// Asks for huge pages under a large tensor that has not been touched yet: a fresh page costs more than to fill it.
inline void advise_huge_pages(void* data, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t huge_page = uintptr_t(2) << 20;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(data) + huge_page - 1) / huge_page * huge_page;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) / huge_page * huge_page;
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

// An uninitialised activation of the dtype given, on the device of `like`.
inline Tensor empty_activation(const Tensor& like, ScalarType dtype, int64_t N, int64_t C, int64_t H, int64_t W, Layout layout) {
  const Strides s = activation_strides(layout, C, H, W);
  const std::array<int64_t, 4> sizes = {N, C, H, W}, strides = {s.n, s.c, s.h, s.w};
  int32_t device_type = 0, device_index = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(4, sizes.data(), strides.data(),
                                                  torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
                                                  device_type, device_index, &handle));
  const Tensor tensor(handle);
  constexpr int64_t worth_a_call = int64_t(4) << 20;
  const int64_t bytes = N * s.n * tensor.element_size();
  if (bytes >= worth_a_call && tensor.is_cpu()) advise_huge_pages(tensor.mutable_data_ptr(), bytes);
  return tensor;
}

inline Tensor empty_activation(const Tensor& like, int64_t N, int64_t C, int64_t H, int64_t W, Layout layout) {
  return empty_activation(like, like.scalar_type(), N, C, H, W, layout);
}

inline bool is_low_precision(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::BFloat16 || tensor.scalar_type() == ScalarType::Half;
}

inline Tensor to_dtype(const Tensor& tensor, ScalarType dtype) { return torch::stable::to(tensor, dtype); }

#ifdef TORCHCNN_CUDA_EMULATOR
// Kernels may touch what is handed out, up to the tensor's last element.
inline void declare_to_emulator(const Tensor& tensor, bool initialised) {
  int64_t last = 0;
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) last += (tensor.size(dim) - 1) * tensor.stride(dim);
  const size_t bytes = tensor.numel() == 0 ? 0 : static_cast<size_t>((last + 1) * tensor.element_size());
  emulator::declare_memory(tensor.const_data_ptr(), bytes, initialised);
}
#else
inline void declare_to_emulator(const Tensor&, bool) {}
#endif

template <class T>
const T* data_of(const Tensor& tensor) {
  declare_to_emulator(tensor, true);
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <class T>
T* mutable_data_of(const Tensor& tensor) {
  declare_to_emulator(tensor, false);
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// Calls run(T()) with the element type of the kernels.
template <class Run>
void for_float_type(const char* op, ScalarType dtype, Run run) {
  switch (dtype) {
    case ScalarType::Float: return run(float());
    case ScalarType::Double: return run(double());
    case ScalarType::BFloat16: return run(BFloat16());
    case ScalarType::Half: return run(Float16());
    default: require(false, op, "dtype must be float32, float64, bfloat16 or float16, got ", torch::headeronly::toString(dtype));
  }
}

}  // namespace torchcnn
