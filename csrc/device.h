// Whether an operator runs the CPU or the CUDA kernels, and on which stream. The extension is linked with no CUDA library of
// PyTorch's: the one function that it needs from there is looked up, so one binary serves every torch from 2.10 on.
#pragma once

#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include "cuda/kernels.h"
#include "tensor.h"

namespace torchcnn {

#ifdef TORCHCNN_CUDA
inline constexpr bool kHasCuda = true;
#else
inline constexpr bool kHasCuda = false;
#endif

#ifdef TORCHCNN_CUDA_EMULATOR  // tests/cuda_emulator: the CUDA kernels, compiled for the processor, on CPU tensors

struct CudaScope {
  cuda::Stream stream = nullptr;
  explicit CudaScope(const Tensor&) {}
  ~CudaScope() { emulator::forget_memory(); }
};
inline bool runs_on_cuda(const Tensor&) { return true; }

#else

// While it lives, the device of a tensor is the current one; `stream` is torch's current stream there.
struct CudaScope {
  torch::stable::accelerator::DeviceGuard guard;
  cuda::Stream stream = nullptr;

  explicit CudaScope(const Tensor& tensor) : guard(tensor.get_device_index()) {
    using GetStream = AOTITorchError (*)(int32_t device_index, void** stream);
    static const auto get_stream = [] {
      void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
      void* function = library == nullptr ? nullptr : dlsym(library, "aoti_torch_get_current_cuda_stream");
      if (function == nullptr) throw Error("torchcnn: this build of torch does not tell the current CUDA stream");
      return reinterpret_cast<GetStream>(function);
    }();
    TORCH_ERROR_CODE_CHECK(get_stream(tensor.get_device_index(), &stream));
  }
};
inline bool runs_on_cuda(const Tensor& tensor) { return tensor.is_cuda(); }

#endif

// Calls on_cuda(stream) or on_cpu(). A build without CUDA kernels has no operator for CUDA tensors and no second branch.
template <class OnCpu, class OnCuda>
void on_device_of(const Tensor& tensor, OnCpu on_cpu, [[maybe_unused]] OnCuda on_cuda) {
  if constexpr (kHasCuda) {
    if (runs_on_cuda(tensor)) {
      const CudaScope scope(tensor);
      return on_cuda(scope.stream);
    }
  }
  on_cpu();
}

// Uninitialised bytes on the device of `like`, from torch's allocator; null where none are needed.
inline Tensor empty_bytes(const Tensor& like, int64_t bytes) { return torch::stable::new_empty(like, {bytes}, ScalarType::Byte); }

// Whether torch's switches allow TF32 in a float32 convolution: torch.backends.cudnn.conv.fp32_precision (numpy.cpp asks Python).
bool tf32_is_allowed();

template <class T>
cuda::Float32Precision float32_precision() {
  const bool tf32 = std::is_same_v<T, float> && tf32_is_allowed();
  return tf32 ? cuda::Float32Precision::tf32 : cuda::Float32Precision::ieee;
}

}  // namespace torchcnn
