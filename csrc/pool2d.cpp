// The pooling operators: schema, checks, allocation, call of a kernel. The pattern is that of conv2d.cpp.
//
//   max_pool2d, min_pool2d, relu_max_pool2d, adaptive_max_pool2d       the output alone
//   ..._with_indices                                                   and int64 indices h W + w into the plane
//   ..._with_offsets                                                   and offsets r S + s into the window, uint8 or int32
//
//   max_pool2d_grad_input                            backward from indices: adds grad_output where they point
//   max_unpool2d                                     puts values at the indices, zero elsewhere
//   max_unpool2d_grad_input                          takes values from the indices: its backward, the derivative of max_pool2d
//   offset_pool2d                                    takes from each window the value at its offset: the derivative of max_pool2d
//   offset_pool2d_grad_input                         backward from offsets, of which offset_pool2d is the derivative in turn
//   avg_pool2d, adaptive_avg_pool2d                  and their _grad_input, of which they are the derivative in turn
//
// bfloat16 and float16 are summed in float32 and rounded once; extremes keep the exact value whatever the dtype.
#include <algorithm>

#include "cpu/kernels.h"
#include "cpu/pool2d_indexed.h"
#include "cpu/pool2d_reference.h"
#include "device.h"

namespace torchcnn {
namespace {

using Pair = std::tuple<Tensor, Tensor>;

bool is_float(const Tensor& tensor) {
  return is_low_precision(tensor) || tensor.scalar_type() == ScalarType::Float || tensor.scalar_type() == ScalarType::Double;
}

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

// Calls run(T()) with an integer of the element's size: for elements that are moved, never computed with.
template <class Run>
void for_element_size(const char* op, ScalarType dtype, Run run) {
  const auto of_size = [&](auto element) {
    if constexpr (sizeof element == 1) run(uint8_t());
    if constexpr (sizeof element == 2) run(uint16_t());
    if constexpr (sizeof element == 4) run(uint32_t());
    if constexpr (sizeof element == 8) run(uint64_t());
  };
  switch (dtype) {
    case ScalarType::Float:
    case ScalarType::Double:
    case ScalarType::BFloat16:
    case ScalarType::Half: return for_float_type(op, dtype, of_size);
    default: return for_integer_type(op, dtype, of_size);
  }
}

// ---------------------------------------------------------------------------------------------------------- extremes

constexpr Extremum kMax{false, false}, kMin{true, false}, kReluMax{false, true};

void run_extremum(const char* op, Extremum extremum, const Tensor& input, const Pool2dGeometry& g, const Tensor& output,
                  Positions positions) {
  if (output.numel() == 0) return;
  const Tensor in = in_layout(input, g.layout);
  const auto run = [&]<class T>(T) {
    const T* from = data_of<T>(in);
    T* to = mutable_data_of<T>(output);
    on_device_of(input, [&] {
      if constexpr (std::is_integral_v<T>) {
        reference::extremum_pool2d_forward<T>(g, extremum, from, to, positions);
      } else {
        pool2d_kernels_for<T>().extremum_forward(g, extremum, from, to, positions);
      }
    }, [&](cuda::Stream stream) { cuda::extremum_pool2d_forward(g, extremum, from, to, positions, stream); });
  };
  if (is_float(input)) return for_float_type(op, input.scalar_type(), run);
  for_integer_type(op, input.scalar_type(), run);
}

Tensor extremum_pool2d(const char* op, Extremum extremum, const Tensor& input, const Pool2dGeometry& g) {
  const Tensor output = empty_activation(input, g.N, g.C, g.P, g.Q, g.layout);
  run_extremum(op, extremum, input, g, output, {PositionKind::none, nullptr});
  return output;
}

Pair extremum_pool2d_with_indices(const char* op, Extremum extremum, const Tensor& input, const Pool2dGeometry& g) {
  const Tensor output = empty_activation(input, g.N, g.C, g.P, g.Q, g.layout);
  const Tensor indices = empty_activation(input, ScalarType::Long, g.N, g.C, g.P, g.Q, g.layout);
  run_extremum(op, extremum, input, g, output, {PositionKind::indices, mutable_data_of<int64_t>(indices)});
  return {output, indices};
}

void require_taps_fit(const char* op, const Pool2dGeometry& g) {
  require(g.R <= INT32_MAX / g.S, op, "a window must have fewer than 2^31 elements for its offsets, got ", g.R, " x ", g.S);
}

Pair extremum_pool2d_with_offsets(const char* op, Extremum extremum, const Tensor& input, const Pool2dGeometry& g) {
  require_taps_fit(op, g);
  const bool bytes = offsets_fit_bytes(g.R, g.S, extremum.relu);
  const Tensor output = empty_activation(input, g.N, g.C, g.P, g.Q, g.layout);
  const Tensor offsets = empty_activation(input, bytes ? ScalarType::Byte : ScalarType::Int, g.N, g.C, g.P, g.Q, g.layout);
  run_extremum(op, extremum, input, g, output,
               bytes ? Positions{PositionKind::byte_offsets, mutable_data_of<uint8_t>(offsets)}
                     : Positions{PositionKind::int_offsets, mutable_data_of<int32_t>(offsets)});
  return {output, offsets};
}

Pool2dGeometry geometry_of(const char* op, const Tensor& input, const Pool2dOptions& options) {
  require_rank(op, "input", input, 4);
  return pool2d_geometry(op, input.size(0), input.size(1), input.size(2), input.size(3), options, layout_of(input));
}

Pool2dGeometry adaptive_geometry_of(const char* op, const Tensor& input, int64_t P, int64_t Q) {
  require_rank(op, "input", input, 4);
  return adaptive_pool2d_geometry(op, input.size(0), input.size(1), input.size(2), input.size(3), P, Q, layout_of(input));
}

const char* name_of(Extremum extremum) {
  return extremum.minimum ? "min_pool2d" : extremum.relu ? "relu_max_pool2d" : "max_pool2d";
}

template <const Extremum& extremum, auto run>
auto sliding(Tensor input, int64_t kernel_h, int64_t kernel_w, int64_t stride_h, int64_t stride_w, int64_t pad_h, int64_t pad_w,
             int64_t dilation_h, int64_t dilation_w, bool ceil_mode) {
  const Pool2dOptions options{kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, ceil_mode};
  return run(name_of(extremum), extremum, input, geometry_of(name_of(extremum), input, options));
}

Tensor adaptive_max_pool2d(Tensor input, int64_t P, int64_t Q) {
  const char* op = "adaptive_max_pool2d";
  return extremum_pool2d(op, kMax, input, adaptive_geometry_of(op, input, P, Q));
}

Pair adaptive_max_pool2d_with_indices(Tensor input, int64_t P, int64_t Q) {
  const char* op = "adaptive_max_pool2d";
  return extremum_pool2d_with_indices(op, kMax, input, adaptive_geometry_of(op, input, P, Q));
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
  require_same_device(op, name, values, "indices", indices);
  require(indices.scalar_type() == ScalarType::Long, op, "indices must be int64, got ",
          torch::headeronly::toString(indices.scalar_type()));
  bool same = true;
  for (int64_t dim = 0; dim < 4; ++dim) same &= values.size(dim) == indices.size(dim);
  require(same, op, "indices must have the shape of ", name, ", got ", Shape{indices}, " and ", Shape{values});
}

// The CPU kernels say whether every index lay in the plane; only where not is it looked for. The CUDA kernels, for which nobody
// waits, stop at such an index themselves.
void require_inside(const char* op, bool inside, const Tensor& indices, const Pool2dGeometry& g) {
  if (inside) return;
  const int64_t* index = data_of<int64_t>(indices);
  while (*index >= 0 && *index < g.H * g.W) ++index;
  require(false, op, "indices must lie in 0 ... ", g.H * g.W - 1, " (a plane of ", g.H, " x ", g.W, "), got ", *index);
}

Tensor max_pool2d_grad_input(Tensor grad_output, Tensor indices, int64_t H, int64_t W, bool channels_last) {
  const char* op = "max_pool2d_grad_input";
  require_indices(op, "grad_output", grad_output, indices);
  const Pool2dGeometry g = indexed_geometry(op, grad_output, H, W, layout_from(channels_last));
  const Tensor from = in_layout(grad_output, g.layout), at = in_layout(indices, g.layout);
  const Tensor grad_input = empty_activation(grad_output, g.N, g.C, H, W, g.layout);
  for_float_type(op, grad_output.scalar_type(), [&]<class T>(T) {
    const T* gradient = data_of<T>(from);
    const int64_t* index = data_of<int64_t>(at);
    T* to = mutable_data_of<T>(grad_input);
    on_device_of(grad_output, [&] { require_inside(op, pool2d_scatter_add(g, gradient, index, to), at, g); },
                 [&](cuda::Stream stream) { cuda::pool2d_scatter_add(g, gradient, index, to, stream); });
  });
  return grad_input;
}

Tensor max_unpool2d(Tensor input, Tensor indices, int64_t H, int64_t W) {
  const char* op = "max_unpool2d";
  require_indices(op, "input", input, indices);
  const Pool2dGeometry g = indexed_geometry(op, input, H, W, layout_of(input));
  const Tensor from = in_layout(input, g.layout), at = in_layout(indices, g.layout);
  const Tensor output = empty_activation(input, g.N, g.C, H, W, g.layout);
  for_element_size(op, input.scalar_type(), [&]<class T>(T) {
    const T* values = data_of<T>(from);
    const int64_t* index = data_of<int64_t>(at);
    T* to = mutable_data_of<T>(output);
    on_device_of(input, [&] { require_inside(op, pool2d_scatter_assign(g, values, index, to), at, g); },
                 [&](cuda::Stream stream) { cuda::pool2d_scatter_assign(g, values, index, to, stream); });
  });
  return output;
}

Tensor max_unpool2d_grad_input(Tensor grad_output, Tensor indices) {
  const char* op = "max_unpool2d_grad_input";
  require_rank(op, "grad_output", grad_output, 4);
  require_rank(op, "indices", indices, 4);
  require_same_device(op, "grad_output", grad_output, "indices", indices);
  require(indices.scalar_type() == ScalarType::Long, op, "indices must be int64, got ",
          torch::headeronly::toString(indices.scalar_type()));
  require(grad_output.size(0) == indices.size(0) && grad_output.size(1) == indices.size(1), op,
          "grad_output and indices must have the same batch and channels, got ", Shape{grad_output}, " and ", Shape{indices});
  const Pool2dGeometry g = indexed_geometry(op, indices, grad_output.size(2), grad_output.size(3), layout_of(indices));
  const Tensor from = in_layout(grad_output, g.layout), at = in_layout(indices, g.layout);
  const Tensor grad_input = empty_activation(grad_output, g.N, g.C, g.P, g.Q, g.layout);
  for_element_size(op, grad_output.scalar_type(), [&]<class T>(T) {
    const T* gradient = data_of<T>(from);
    const int64_t* index = data_of<int64_t>(at);
    T* to = mutable_data_of<T>(grad_input);
    on_device_of(grad_output, [&] { require_inside(op, pool2d_gather(g, gradient, index, to), at, g); },
                 [&](cuda::Stream stream) { cuda::pool2d_gather(g, gradient, index, to, stream); });
  });
  return grad_input;
}

// ------------------------------------------------------------------------------------------------- following offsets

void require_grad_output_shape(const char* op, const Tensor& grad_output, const Pool2dGeometry& g) {
  require(grad_output.size(2) == g.P && grad_output.size(3) == g.Q, op, "grad_output must have the shape of the output, [", g.N,
          ", ", g.C, ", ", g.P, ", ", g.Q, "], got ", Shape{grad_output});
}

void require_offsets(const char* op, const Tensor& offsets, const Pool2dGeometry& g) {
  require_rank(op, "offsets", offsets, 4);
  require(offsets.size(0) == g.N && offsets.size(1) == g.C && offsets.size(2) == g.P && offsets.size(3) == g.Q, op,
          "offsets must have the shape of the output, [", g.N, ", ", g.C, ", ", g.P, ", ", g.Q, "], got ", Shape{offsets});
  require(offsets.scalar_type() == ScalarType::Byte || offsets.scalar_type() == ScalarType::Int, op,
          "offsets must be uint8 or int32, got ", torch::headeronly::toString(offsets.scalar_type()));
  require_taps_fit(op, g);
}

// The offsets as kernels read them; they do not write them.
Positions positions_of(const Tensor& offsets) {
  if (offsets.scalar_type() == ScalarType::Byte)
    return {PositionKind::byte_offsets, const_cast<uint8_t*>(data_of<uint8_t>(offsets))};
  return {PositionKind::int_offsets, const_cast<int32_t*>(data_of<int32_t>(offsets))};
}

Tensor offset_pool2d(Tensor input, Tensor offsets, int64_t kernel_h, int64_t kernel_w, int64_t stride_h, int64_t stride_w,
                     int64_t pad_h, int64_t pad_w, int64_t dilation_h, int64_t dilation_w, bool ceil_mode) {
  const char* op = "offset_pool2d";
  Pool2dGeometry g =
      geometry_of(op, input, {kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, ceil_mode});
  require_same_device(op, "input", input, "offsets", offsets);
  require_offsets(op, offsets, g);
  g.layout = layout_of(offsets);
  const Tensor from = in_layout(input, g.layout), at = in_layout(offsets, g.layout);
  const Tensor output = empty_activation(input, g.N, g.C, g.P, g.Q, g.layout);
  for_element_size(op, input.scalar_type(), [&]<class T>(T) {
    const T* source = data_of<T>(from);
    T* to = mutable_data_of<T>(output);
    const Positions positions = positions_of(at);
    on_device_of(input, [&] {
      if (positions.kind == PositionKind::byte_offsets) {
        pool2d_gather_offsets(g, source, static_cast<const uint8_t*>(positions.to), to);
      } else {
        pool2d_gather_offsets(g, source, static_cast<const int32_t*>(positions.to), to);
      }
    }, [&](cuda::Stream stream) { cuda::pool2d_gather_offsets(g, source, positions, to, stream); });
  });
  return output;
}

Tensor offset_pool2d_grad_input(Tensor grad_output, Tensor offsets, int64_t H, int64_t W, int64_t kernel_h, int64_t kernel_w,
                                int64_t stride_h, int64_t stride_w, int64_t pad_h, int64_t pad_w, int64_t dilation_h,
                                int64_t dilation_w, bool ceil_mode, bool channels_last) {
  const char* op = "offset_pool2d_grad_input";
  require_rank(op, "grad_output", grad_output, 4);
  const Pool2dOptions options{kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, ceil_mode};
  const Pool2dGeometry g =
      pool2d_geometry(op, grad_output.size(0), grad_output.size(1), H, W, options, layout_from(channels_last));
  require_grad_output_shape(op, grad_output, g);
  require_same_device(op, "grad_output", grad_output, "offsets", offsets);
  require_offsets(op, offsets, g);
  const Tensor from = in_layout(grad_output, g.layout), at = in_layout(offsets, g.layout);
  const Tensor grad_input = empty_activation(grad_output, g.N, g.C, H, W, g.layout);
  if (grad_input.numel() == 0) return grad_input;
  for_float_type(op, grad_output.scalar_type(), [&]<class T>(T) {
    const T* gradient = data_of<T>(from);
    T* to = mutable_data_of<T>(grad_input);
    const Positions positions = positions_of(at);
    on_device_of(grad_output, [&] { pool2d_kernels_for<T>().offset_grad_input(g, gradient, positions, to); },
                 [&](cuda::Stream stream) { cuda::offset_pool2d_grad_input(g, gradient, positions, to, stream); });
  });
  return grad_input;
}

// ---------------------------------------------------------------------------------------------------------- averages

Tensor average_forward(const char* op, const Tensor& input, const Pool2dGeometry& g, Divisor divisor) {
  const Tensor output = empty_activation(input, g.N, g.C, g.P, g.Q, g.layout), in = in_layout(input, g.layout);
  if (output.numel() == 0) return output;
  const auto run = [&]<class T>(T) {
    const T* from = data_of<T>(in);
    T* to = mutable_data_of<T>(output);
    on_device_of(input, [&] {
      if constexpr (std::is_integral_v<T>) {
        reference::avg_pool2d_forward(g, divisor, from, to);
      } else {
        pool2d_kernels_for<T>().avg_forward(g, divisor, from, to);
      }
    }, [&](cuda::Stream stream) {
      const int64_t bytes = cuda::avg_pool2d_forward_workspace<T>(g);
      if (bytes == 0) return cuda::avg_pool2d_forward(g, divisor, from, to, nullptr, stream);
      const Tensor workspace = empty_bytes(input, bytes);
      cuda::avg_pool2d_forward(g, divisor, from, to, mutable_data_of<void>(workspace), stream);
    });
  };
  if (input.scalar_type() == ScalarType::Long) {
    run(int64_t());
  } else {
    for_float_type(op, input.scalar_type(), run);
  }
  return output;
}

Tensor average_grad_input(const char* op, const Tensor& grad_output, const Pool2dGeometry& g, Divisor divisor) {
  require_grad_output_shape(op, grad_output, g);
  const Tensor grad_input = empty_activation(grad_output, g.N, g.C, g.H, g.W, g.layout),
               gradient = in_layout(grad_output, g.layout);
  if (grad_input.numel() == 0) return grad_input;
  for_float_type(op, grad_output.scalar_type(), [&]<class T>(T) {
    const T* from = data_of<T>(gradient);
    T* to = mutable_data_of<T>(grad_input);
    on_device_of(grad_output, [&] {
      if (grad_output.numel() == 0) {
        std::fill_n(to, grad_input.numel(), T{});
      } else {
        pool2d_kernels_for<T>().avg_grad_input(g, divisor, from, to);
      }
    }, [&](cuda::Stream stream) { cuda::avg_pool2d_grad_input(g, divisor, from, to, stream); });
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
  m.def("max_pool2d(Tensor input, " EXTREMUM_OPTIONS ") -> Tensor");
  m.def("max_pool2d_with_indices(Tensor input, " EXTREMUM_OPTIONS ") -> (Tensor, Tensor)");
  m.def("max_pool2d_with_offsets(Tensor input, " EXTREMUM_OPTIONS ") -> (Tensor, Tensor)");
  m.def("min_pool2d(Tensor input, " EXTREMUM_OPTIONS ") -> Tensor");
  m.def("min_pool2d_with_indices(Tensor input, " EXTREMUM_OPTIONS ") -> (Tensor, Tensor)");
  m.def("min_pool2d_with_offsets(Tensor input, " EXTREMUM_OPTIONS ") -> (Tensor, Tensor)");
  m.def("relu_max_pool2d(Tensor input, " EXTREMUM_OPTIONS ") -> Tensor");
  m.def("relu_max_pool2d_with_offsets(Tensor input, " EXTREMUM_OPTIONS ") -> (Tensor, Tensor)");
  m.def("adaptive_max_pool2d(Tensor input, SymInt P, SymInt Q) -> Tensor");
  m.def("adaptive_max_pool2d_with_indices(Tensor input, SymInt P, SymInt Q) -> (Tensor, Tensor)");
  m.def("max_pool2d_grad_input(Tensor grad_output, Tensor indices, SymInt H, SymInt W, bool channels_last) -> Tensor");
  m.def("max_unpool2d(Tensor input, Tensor indices, SymInt H, SymInt W) -> Tensor");
  m.def("max_unpool2d_grad_input(Tensor grad_output, Tensor indices) -> Tensor");
  m.def("offset_pool2d(Tensor input, Tensor offsets, " EXTREMUM_OPTIONS ") -> Tensor");
  m.def("offset_pool2d_grad_input(Tensor grad_output, Tensor offsets, SymInt H, SymInt W, " EXTREMUM_OPTIONS
        ", bool channels_last) -> Tensor");
  m.def("avg_pool2d(Tensor input, " AVERAGE_OPTIONS ") -> Tensor");
  m.def("avg_pool2d_grad_input(Tensor grad_output, SymInt H, SymInt W, " AVERAGE_OPTIONS ", bool channels_last) -> Tensor");
  m.def("adaptive_avg_pool2d(Tensor input, SymInt P, SymInt Q) -> Tensor");
  m.def("adaptive_avg_pool2d_grad_input(Tensor grad_output, SymInt H, SymInt W, bool channels_last) -> Tensor");
}

static void register_kernels(torch::stable::detail::StableLibrary& m) {
  using namespace torchcnn;
  m.impl("max_pool2d", TORCH_BOX((&sliding<kMax, extremum_pool2d>)));
  m.impl("max_pool2d_with_indices", TORCH_BOX((&sliding<kMax, extremum_pool2d_with_indices>)));
  m.impl("max_pool2d_with_offsets", TORCH_BOX((&sliding<kMax, extremum_pool2d_with_offsets>)));
  m.impl("min_pool2d", TORCH_BOX((&sliding<kMin, extremum_pool2d>)));
  m.impl("min_pool2d_with_indices", TORCH_BOX((&sliding<kMin, extremum_pool2d_with_indices>)));
  m.impl("min_pool2d_with_offsets", TORCH_BOX((&sliding<kMin, extremum_pool2d_with_offsets>)));
  m.impl("relu_max_pool2d", TORCH_BOX((&sliding<kReluMax, extremum_pool2d>)));
  m.impl("relu_max_pool2d_with_offsets", TORCH_BOX((&sliding<kReluMax, extremum_pool2d_with_offsets>)));
  m.impl("adaptive_max_pool2d", TORCH_BOX(&adaptive_max_pool2d));
  m.impl("adaptive_max_pool2d_with_indices", TORCH_BOX(&adaptive_max_pool2d_with_indices));
  m.impl("max_pool2d_grad_input", TORCH_BOX(&max_pool2d_grad_input));
  m.impl("max_unpool2d", TORCH_BOX(&max_unpool2d));
  m.impl("max_unpool2d_grad_input", TORCH_BOX(&max_unpool2d_grad_input));
  m.impl("offset_pool2d", TORCH_BOX(&offset_pool2d));
  m.impl("offset_pool2d_grad_input", TORCH_BOX(&offset_pool2d_grad_input));
  m.impl("avg_pool2d", TORCH_BOX(&avg_pool2d));
  m.impl("avg_pool2d_grad_input", TORCH_BOX(&avg_pool2d_grad_input));
  m.impl("adaptive_avg_pool2d", TORCH_BOX(&adaptive_avg_pool2d));
  m.impl("adaptive_avg_pool2d_grad_input", TORCH_BOX(&adaptive_avg_pool2d_grad_input));
}

STABLE_TORCH_LIBRARY_IMPL(torchcnn, CPU, m) { register_kernels(m); }
#ifdef TORCHCNN_CUDA
STABLE_TORCH_LIBRARY_IMPL(torchcnn, CUDA, m) { register_kernels(m); }
#endif
