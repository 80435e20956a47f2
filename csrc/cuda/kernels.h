// The CUDA kernels as the operators see them: raw device pointers, a geometry, a stream. No CUDA header is needed to call them,
// and no PyTorch header to compile them.
//
// T is float, double, Float16 or BFloat16. Where a function needs scratch memory, `..._workspace` says how many bytes, 16-byte
// aligned (256 for convolution, it may depend on how tensors are aligned); its contents need not be initialised. Nothing is
// allocated, nothing waits, so that a CUDA graph can record every call. A sum has the same order on every run: one build gives
// the same bits every time on GPUs of one architecture. Tensors that are not aligned to vectors may take another kernel, in
// depthwise grad_weight and average pools of channels_last with another order.
#pragma once

#include <cstdint>

#include "../cpu/element.h"
#include "../geometry.h"

namespace torchcnn::cuda {

using Stream = void*;  // a cudaStream_t

// Whether float32 convolutions may round their factors to TF32 (10 bits of mantissa) for the tensor cores.
enum class Float32Precision { ieee, tf32 };

// A weight and its gradient lie as an activation of K images would, in either layout.

template <class T>
int64_t conv2d_forward_workspace(const Conv2dGeometry&, const T* input, const T* weight, Layout weight_layout);
template <class T>
void conv2d_forward(const Conv2dGeometry&, const T* input, const T* weight, Layout weight_layout, const Epilogue<T>&, T* output,
                    Float32Precision, void* workspace, Stream);

template <class T>
int64_t conv2d_grad_input_workspace(const Conv2dGeometry&, const T* grad_output, const T* weight, Layout weight_layout);
// The epilogue serves conv_transpose2d, whose forward this is.
template <class T>
void conv2d_grad_input(const Conv2dGeometry&, const T* grad_output, const T* weight, Layout weight_layout, const Epilogue<T>&,
                       T* grad_input, Float32Precision, void* workspace, Stream);

template <class T>
int64_t conv2d_grad_weight_workspace(const Conv2dGeometry&, const T* grad_output, const T* input);
template <class T>
void conv2d_grad_weight(const Conv2dGeometry&, const T* grad_output, const T* input, T* grad_weight, Layout weight_layout,
                        Float32Precision, void* workspace, Stream);

template <class T>
int64_t conv2d_grad_bias_workspace(const Conv2dGeometry&);
template <class T>
void conv2d_grad_bias(const Conv2dGeometry&, const T* grad_output, T* grad_bias, void* workspace, Stream);

// Pooling. Windows are those of geometry.h, NaN and ties as in cpu/pool2d_reference.h.

template <class T>  // the integers of 8 to 64 bits and uint8 too
void extremum_pool2d_forward(const Pool2dGeometry&, Extremum, const T* input, T* output, Positions, Stream);

template <class T>  // int64 too
int64_t avg_pool2d_forward_workspace(const Pool2dGeometry&);
template <class T>  // int64 too
void avg_pool2d_forward(const Pool2dGeometry&, Divisor, const T* input, T* output, void* workspace, Stream);
template <class T>
void avg_pool2d_grad_input(const Pool2dGeometry&, Divisor, const T* grad_output, T* grad_input, Stream);

// Offsets are of one of the two kinds.
template <class T>
void offset_pool2d_grad_input(const Pool2dGeometry&, const T* grad_output, Positions offsets, T* grad_input, Stream);
template <class T>
void pool2d_scatter_add(const Pool2dGeometry&, const T* grad_output, const int64_t* indices, T* grad_input, Stream);

// Elements that are moved, never computed with: T is the unsigned integer of their size.
template <class T>
void pool2d_gather_offsets(const Pool2dGeometry&, const T* source, Positions offsets, T* output, Stream);
template <class T>
void pool2d_gather(const Pool2dGeometry&, const T* source, const int64_t* indices, T* output, Stream);
template <class T>
void pool2d_scatter_assign(const Pool2dGeometry&, const T* input, const int64_t* indices, T* output, Stream);

}  // namespace torchcnn::cuda
