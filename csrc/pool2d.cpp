// The pooling operators: schema, checks, allocation, call of a kernel. The pattern is that of conv2d.cpp.
//
//   max_pool2d, min_pool2d, adaptive_max_pool2d      output and int64 indices h W + w
//   max_pool2d_grad_input                            backward of all three: adds grad_output at the indices
//   max_unpool2d                                     puts values at the indices, zero elsewhere
//   max_unpool2d_grad_input                          takes values from the indices: its backward, and the derivative of max_pool2d
//   avg_pool2d, adaptive_avg_pool2d                  and their _grad_input, of which they are the derivative in turn
//
// bfloat16 and float16 compute in float32; extremes keep the exact value whatever the dtype.
#include "cpu/kernels.h"
#include "cpu/pool2d_indexed.h"
#include "cpu/pool2d_reference.h"
#include "tensor.h"

namespace torchcnn {
namespace {

using Pooled = std::tuple<Tensor, Tensor>;

template <class Run>
void for_integer_type(const char* op, ScalarType dtype, Run run) {
  switch (dtype) {
    case ScalarType::Byte: return run(uint8_t());
    case ScalarType::Char: return run(int8_t());
    case ScalarType::Short: return run(int16_t());
    case ScalarType::Int: return run(int32_t());
    case ScalarType::Long: return run(int64_t());
    default:
      require(false, op, "dtype must be a floating-point type, int8 to int64 or uint8, got ", torch::headeronly::toString(dtype));
  }
}

bool is_floating(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Float || tensor.scalar_type() == ScalarType::Double;
}

// Bytes for the types that are only moved, never computed with.
template <class Run>
void for_any_type(const char* op, ScalarType dtype, Run run) {
  if (dtype == ScalarType::Float) return run(float());
  if (dtype == ScalarType::Double) return run(double());
  for_integer_type(op, dtype, run);
}

// ---------------------------------------------------------------------------------------------------------- extremes

Pooled extremum_pool2d(const char* op, bool maximum, const Tensor& input, const Pool2dGeometry& g) {
  if (is_low_precision(input)) {
    const auto [output, indices] = extremum_pool2d(op, maximum, to_dtype(input, ScalarType::Float), g);
    return {to_dtype(output, input.scalar_type()), indices};
  }
  const Tensor output = empty_activation(input, g.N, g.C, g.P, g.Q, g.layout);
  const Tensor indices = empty_activation(input, ScalarType::Long, g.N, g.C, g.P, g.Q, g.layout);
  if (output.numel() == 0) return {output, indices};
  const Tensor in = in_layout(input, g.layout);
  const auto run = [&]<class T>(T, auto kernel) {
    kernel(g, in.const_data_ptr<T>(), output.mutable_data_ptr<T>(), indices.mutable_data_ptr<int64_t>());
  };
  if (is_floating(input)) {
    for_floating_type(op, input.scalar_type(), [&]<class T>(T zero) {
      run(zero, maximum ? kernels_for<T>().max_pool2d_forward : kernels_for<T>().min_pool2d_forward);
    });
  } else {
    for_integer_type(op, input.scalar_type(), [&]<class T>(T zero) {
      run(zero, maximum ? reference::max_pool2d_forward<T> : reference::min_pool2d_forward<T>);
    });
  }
  return {output, indices};
}

Pool2dGeometry geometry_of(const char* op, const Tensor& input, const Pool2dOptions& options) {
  require_rank(op, "input", input, 4);
  return pool2d_geometry(op, input.size(0), input.size(1), input.size(2), input.size(3), options, layout_of(input));
}

Pool2dGeometry adaptive_geometry_of(const char* op, const Tensor& input, int64_t P, int64_t Q) {
  require_rank(op, "input", input, 4);
  return adaptive_pool2d_geometry(op, input.size(0), input.size(1), input.size(2), input.size(3), P, Q, layout_of(input));
}

Pooled max_pool2d(Tensor input, int64_t kernel_h, int64_t kernel_w, int64_t stride_h, int64_t stride_w, int64_t pad_h,
                  int64_t pad_w, int64_t dilation_h, int64_t dilation_w, bool ceil_mode) {
  const char* op = "max_pool2d";
  const Pool2dOptions options{kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, ceil_mode};
  return extremum_pool2d(op, true, input, geometry_of(op, input, options));
}

Pooled min_pool2d(Tensor input, int64_t kernel_h, int64_t kernel_w, int64_t stride_h, int64_t stride_w, int64_t pad_h,
                  int64_t pad_w, int64_t dilation_h, int64_t dilation_w, bool ceil_mode) {
  const char* op = "min_pool2d";
  const Pool2dOptions options{kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, ceil_mode};
  return extremum_pool2d(op, false, input, geometry_of(op, input, options));
}

Pooled adaptive_max_pool2d(Tensor input, int64_t P, int64_t Q) {
  const char* op = "adaptive_max_pool2d";
  return extremum_pool2d(op, true, input, adaptive_geometry_of(op, input, P, Q));
}

// ------------------------------------------------------------------------------------------------- following indices

// The geometry of a plane H x W and positions P x Q that indices connect; only sizes and layout are used.
Pool2dGeometry indexed_geometry(const char* op, const Tensor& positions, int64_t H, int64_t W, Layout layout) {
  require(H >= 0 && W >= 0, op, "plane height and width must be at least 0, got ", H, " and ", W);
  require_numel_fits(op, "number of plane bytes", positions.size(0), positions.size(1), H, W);
  return {
      positions.size(0), positions.size(1), H, W, 1, 1, positions.size(2), positions.size(3), 1, 1, 0, 0, 1, 1, false, layout};
}

void require_indices(const char* op, const char* name, const Tensor& values, const Tensor& indices) {
  require_rank(op, name, values, 4);
  require_rank(op, "indices", indices, 4);
  require(indices.scalar_type() == ScalarType::Long, op, "indices must be int64, got ",
          torch::headeronly::toString(indices.scalar_type()));
  bool same = true;
  for (int64_t dim = 0; dim < 4; ++dim) same &= values.size(dim) == indices.size(dim);
  require(same, op, "indices must have the shape of ", name, ", got ", Shape{indices}, " and ", Shape{values});
}

void require_indices_in_plane(const char* op, const int64_t* indices, int64_t count, const Pool2dGeometry& g) {
  const int64_t bad = first_bad_index(indices, count, g.H * g.W);
  require(bad < 0, op, "indices must lie in 0 ... ", g.H * g.W - 1, " (a plane of ", g.H, " x ", g.W, "), got ",
          bad < 0 ? 0 : indices[bad]);
}

Tensor max_pool2d_grad_input(Tensor grad_output, Tensor indices, int64_t H, int64_t W, bool channels_last) {
  const char* op = "max_pool2d_grad_input";
  require_indices(op, "grad_output", grad_output, indices);
  if (is_low_precision(grad_output)) {
    return to_dtype(max_pool2d_grad_input(to_dtype(grad_output, ScalarType::Float), indices, H, W, channels_last),
                    grad_output.scalar_type());
  }
  const Pool2dGeometry g = indexed_geometry(op, grad_output, H, W, layout_from(channels_last));
  const Tensor from = in_layout(grad_output, g.layout), at = in_layout(indices, g.layout);
  require_indices_in_plane(op, at.const_data_ptr<int64_t>(), at.numel(), g);
  const Tensor grad_input = empty_activation(grad_output, g.N, g.C, H, W, g.layout);
  for_floating_type(op, grad_output.scalar_type(), [&]<class T>(T) {
    pool2d_scatter_add(g, from.const_data_ptr<T>(), at.const_data_ptr<int64_t>(), grad_input.mutable_data_ptr<T>());
  });
  return grad_input;
}

Tensor max_unpool2d(Tensor input, Tensor indices, int64_t H, int64_t W) {
  const char* op = "max_unpool2d";
  require_indices(op, "input", input, indices);
  if (is_low_precision(input))
    return to_dtype(max_unpool2d(to_dtype(input, ScalarType::Float), indices, H, W), input.scalar_type());
  const Pool2dGeometry g = indexed_geometry(op, input, H, W, layout_of(input));
  const Tensor from = in_layout(input, g.layout), at = in_layout(indices, g.layout);
  require_indices_in_plane(op, at.const_data_ptr<int64_t>(), at.numel(), g);
  const Tensor output = empty_activation(input, g.N, g.C, H, W, g.layout);
  for_any_type(op, input.scalar_type(), [&]<class T>(T) {
    pool2d_scatter_assign(g, from.const_data_ptr<T>(), at.const_data_ptr<int64_t>(), output.mutable_data_ptr<T>());
  });
  return output;
}

Tensor max_unpool2d_grad_input(Tensor grad_output, Tensor indices) {
  const char* op = "max_unpool2d_grad_input";
  require_rank(op, "grad_output", grad_output, 4);
  require_rank(op, "indices", indices, 4);
  require(indices.scalar_type() == ScalarType::Long, op, "indices must be int64, got ",
          torch::headeronly::toString(indices.scalar_type()));
  require(grad_output.size(0) == indices.size(0) && grad_output.size(1) == indices.size(1), op,
          "grad_output and indices must have the same batch and channels, got ", Shape{grad_output}, " and ", Shape{indices});
  if (is_low_precision(grad_output))
    return to_dtype(max_unpool2d_grad_input(to_dtype(grad_output, ScalarType::Float), indices), grad_output.scalar_type());
  const Pool2dGeometry g = indexed_geometry(op, indices, grad_output.size(2), grad_output.size(3), layout_of(indices));
  const Tensor from = in_layout(grad_output, g.layout), at = in_layout(indices, g.layout);
  require_indices_in_plane(op, at.const_data_ptr<int64_t>(), at.numel(), g);
  const Tensor grad_input = empty_activation(grad_output, g.N, g.C, g.P, g.Q, g.layout);
  for_floating_type(op, grad_output.scalar_type(), [&]<class T>(T) {
    pool2d_gather(g, from.const_data_ptr<T>(), at.const_data_ptr<int64_t>(), grad_input.mutable_data_ptr<T>());
  });
  return grad_input;
}

// ---------------------------------------------------------------------------------------------------------- averages

Tensor average_forward(const char* op, const Tensor& input, const Pool2dGeometry& g, Divisor divisor) {
  if (is_low_precision(input))
    return to_dtype(average_forward(op, to_dtype(input, ScalarType::Float), g, divisor), input.scalar_type());
  const Tensor output = empty_activation(input, g.N, g.C, g.P, g.Q, g.layout), in = in_layout(input, g.layout);
  if (output.numel() == 0) return output;
  if (input.scalar_type() == ScalarType::Long) {
    reference::avg_pool2d_forward(g, divisor, in.const_data_ptr<int64_t>(), output.mutable_data_ptr<int64_t>());
    return output;
  }
  for_floating_type(op, input.scalar_type(), [&]<class T>(T) {
    kernels_for<T>().avg_pool2d_forward(g, divisor, in.const_data_ptr<T>(), output.mutable_data_ptr<T>());
  });
  return output;
}

Tensor average_grad_input(const char* op, const Tensor& grad_output, const Pool2dGeometry& g, Divisor divisor) {
  require(grad_output.size(2) == g.P && grad_output.size(3) == g.Q, op, "grad_output must have the shape of the output, [", g.N,
          ", ", g.C, ", ", g.P, ", ", g.Q, "], got ", Shape{grad_output});
  if (is_low_precision(grad_output))
    return to_dtype(average_grad_input(op, to_dtype(grad_output, ScalarType::Float), g, divisor), grad_output.scalar_type());
  const Tensor grad_input = empty_activation(grad_output, g.N, g.C, g.H, g.W, g.layout),
               gradient = in_layout(grad_output, g.layout);
  if (grad_input.numel() == 0) return grad_input;
  for_floating_type(op, grad_output.scalar_type(), [&]<class T>(T) {
    kernels_for<T>().avg_pool2d_grad_input(g, divisor, gradient.const_data_ptr<T>(), grad_input.mutable_data_ptr<T>());
  });
  return grad_input;
}

Divisor divisor_of(const char* op, bool count_include_pad, std::optional<int64_t> divisor_override) {
  require(!divisor_override || *divisor_override != 0, op, "divisor_override must not be 0, got ", divisor_override.value_or(0));
  return {count_include_pad, divisor_override.value_or(0)};
}

Tensor avg_pool2d(Tensor input, int64_t kernel_h, int64_t kernel_w, int64_t stride_h, int64_t stride_w, int64_t pad_h,
                  int64_t pad_w, bool ceil_mode, bool count_include_pad, std::optional<int64_t> divisor_override) {
  const char* op = "avg_pool2d";
  const Divisor divisor = divisor_of(op, count_include_pad, divisor_override);
  const Pool2dGeometry g = geometry_of(op, input, {kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, 1, 1, ceil_mode});
  return average_forward(op, input, g, divisor);
}

Tensor avg_pool2d_grad_input(Tensor grad_output, int64_t H, int64_t W, int64_t kernel_h, int64_t kernel_w, int64_t stride_h,
                             int64_t stride_w, int64_t pad_h, int64_t pad_w, bool ceil_mode, bool count_include_pad,
                             std::optional<int64_t> divisor_override, bool channels_last) {
  const char* op = "avg_pool2d_grad_input";
  require_rank(op, "grad_output", grad_output, 4);
  const Divisor divisor = divisor_of(op, count_include_pad, divisor_override);
  const Pool2dOptions options{kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, 1, 1, ceil_mode};
  const Pool2dGeometry g =
      pool2d_geometry(op, grad_output.size(0), grad_output.size(1), H, W, options, layout_from(channels_last));
  return average_grad_input(op, grad_output, g, divisor);
}

Tensor adaptive_avg_pool2d(Tensor input, int64_t P, int64_t Q) {
  const char* op = "adaptive_avg_pool2d";
  const Pool2dGeometry g = adaptive_geometry_of(op, input, P, Q);
  require(input.scalar_type() != ScalarType::Long, op, "dtype must be float32, float64, bfloat16 or float16, got Long");
  return average_forward(op, input, g, {true, 0});
}

Tensor adaptive_avg_pool2d_grad_input(Tensor grad_output, int64_t H, int64_t W, bool channels_last) {
  const char* op = "adaptive_avg_pool2d_grad_input";
  require_rank(op, "grad_output", grad_output, 4);
  const Pool2dGeometry g = adaptive_pool2d_geometry(op, grad_output.size(0), grad_output.size(1), H, W, grad_output.size(2),
                                                    grad_output.size(3), layout_from(channels_last));
  return average_grad_input(op, grad_output, g, {true, 0});
}

}  // namespace
}  // namespace torchcnn

#define WINDOW "int kernel_h, int kernel_w, int stride_h, int stride_w, int pad_h, int pad_w"
#define EXTREMUM_OPTIONS WINDOW ", int dilation_h, int dilation_w, bool ceil_mode"
#define AVERAGE_OPTIONS WINDOW ", bool ceil_mode, bool count_include_pad, int? divisor_override"

STABLE_TORCH_LIBRARY_FRAGMENT(torchcnn, m) {
  m.def("max_pool2d(Tensor input, " EXTREMUM_OPTIONS ") -> (Tensor, Tensor)");
  m.def("min_pool2d(Tensor input, " EXTREMUM_OPTIONS ") -> (Tensor, Tensor)");
  m.def("adaptive_max_pool2d(Tensor input, SymInt P, SymInt Q) -> (Tensor, Tensor)");
  m.def("max_pool2d_grad_input(Tensor grad_output, Tensor indices, SymInt H, SymInt W, bool channels_last) -> Tensor");
  m.def("max_unpool2d(Tensor input, Tensor indices, SymInt H, SymInt W) -> Tensor");
  m.def("max_unpool2d_grad_input(Tensor grad_output, Tensor indices) -> Tensor");
  m.def("avg_pool2d(Tensor input, " AVERAGE_OPTIONS ") -> Tensor");
  m.def("avg_pool2d_grad_input(Tensor grad_output, SymInt H, SymInt W, " AVERAGE_OPTIONS ", bool channels_last) -> Tensor");
  m.def("adaptive_avg_pool2d(Tensor input, SymInt P, SymInt Q) -> Tensor");
  m.def("adaptive_avg_pool2d_grad_input(Tensor grad_output, SymInt H, SymInt W, bool channels_last) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(torchcnn, CPU, m) {
  m.impl("max_pool2d", TORCH_BOX(&torchcnn::max_pool2d));
  m.impl("min_pool2d", TORCH_BOX(&torchcnn::min_pool2d));
  m.impl("adaptive_max_pool2d", TORCH_BOX(&torchcnn::adaptive_max_pool2d));
  m.impl("max_pool2d_grad_input", TORCH_BOX(&torchcnn::max_pool2d_grad_input));
  m.impl("max_unpool2d", TORCH_BOX(&torchcnn::max_unpool2d));
  m.impl("max_unpool2d_grad_input", TORCH_BOX(&torchcnn::max_unpool2d_grad_input));
  m.impl("avg_pool2d", TORCH_BOX(&torchcnn::avg_pool2d));
  m.impl("avg_pool2d_grad_input", TORCH_BOX(&torchcnn::avg_pool2d_grad_input));
  m.impl("adaptive_avg_pool2d", TORCH_BOX(&torchcnn::adaptive_avg_pool2d));
  m.impl("adaptive_avg_pool2d_grad_input", TORCH_BOX(&torchcnn::adaptive_avg_pool2d_grad_input));
}
