// The Python module torchcnn._C: the kernels on NumPy arrays, with no tensor involved, and questions about the build. Loading it
// also registers the torch operators of conv2d.cpp and pool2d.cpp. torchcnn/numpy.py wraps these functions.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string_view>
#include <utility>

#include "cpu/conv2d_choice.h"
#include "cpu/kernels.h"
#include "cpu/pool2d_indexed.h"
#include "cpu/runtime.h"
#include "geometry.h"

// The transforms as the row `scalar` compiles them: their matrices are the same in every row.
#define TORCHCNN_ISA scalar
#include "cpu/conv2d_winograd_transforms.h"

namespace py = pybind11;

namespace torchcnn {
namespace {

using Pair = std::pair<int64_t, int64_t>;
template <class T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

template <class T>
Array<T> empty(int64_t N, int64_t C, int64_t H, int64_t W) {
  return Array<T>(std::vector<py::ssize_t>{N, C, H, W});
}

template <class T>
void require_rank(const char* op, const char* name, const Array<T>& array, int64_t rank) {
  require(array.ndim() == rank, op, name, " must have ", rank, " dimensions, got ", array.ndim());
}

template <class T>
Conv2dGeometry geometry_of(const char* op, const Array<T>& input, const Array<T>& weight, Pair stride, Pair padding,
                           Pair dilation, int64_t groups) {
  require_rank(op, "input", input, 4);
  require_rank(op, "weight", weight, 4);
  return conv2d_geometry(op, input.shape(0), input.shape(1), input.shape(2), input.shape(3), weight.shape(0), weight.shape(1),
                         weight.shape(2), weight.shape(3),
                         {stride.first, stride.second, padding.first, padding.second, dilation.first, dilation.second, groups},
                         Layout::nchw);
}

template <class T>
Array<T> conv2d(const Array<T>& input, const Array<T>& weight, const std::optional<Array<T>>& bias, Pair stride, Pair padding,
                Pair dilation, int64_t groups) {
  const Conv2dGeometry g = geometry_of("conv2d", input, weight, stride, padding, dilation, groups);
  if (bias) {
    require_rank("conv2d", "bias", *bias, 1);
    require(bias->shape(0) == g.K, "conv2d", "bias must have one element for each output channel, got ", bias->shape(0), " and ",
            g.K);
  }
  Array<T> output = empty<T>(g.N, g.K, g.P, g.Q);
  T* to = output.mutable_data();
  const T* b = bias ? bias->data() : nullptr;
  py::gil_scoped_release release;
  if (g.N > 0) conv2d_kernels_for<T>().forward(g, input.data(), weight.data(), {b, false}, to);
  return output;
}

template <class T>
py::tuple conv2d_backward(const Array<T>& grad_output, const Array<T>& input, const Array<T>& weight, Pair stride, Pair padding,
                          Pair dilation, int64_t groups) {
  const char* op = "conv2d_backward";
  const Conv2dGeometry g = geometry_of(op, input, weight, stride, padding, dilation, groups);
  require_rank(op, "grad_output", grad_output, 4);
  require(
      grad_output.shape(0) == g.N && grad_output.shape(1) == g.K && grad_output.shape(2) == g.P && grad_output.shape(3) == g.Q,
      op, "grad_output must have the shape of the output, (", g.N, ", ", g.K, ", ", g.P, ", ", g.Q, "), got (",
      grad_output.shape(0), ", ", grad_output.shape(1), ", ", grad_output.shape(2), ", ", grad_output.shape(3), ")");
  Array<T> grad_input = empty<T>(g.N, g.C, g.H, g.W), grad_weight = empty<T>(g.K, g.C_per_group(), g.R, g.S);
  Array<T> grad_bias(std::vector<py::ssize_t>{g.K});
  T *gi = grad_input.mutable_data(), *gw = grad_weight.mutable_data(), *gb = grad_bias.mutable_data();
  {
    py::gil_scoped_release release;
    if (g.N > 0 && g.C > 0) {
      conv2d_kernels_for<T>().grad_input(g, grad_output.data(), weight.data(), gi);
      conv2d_kernels_for<T>().grad_weight(g, grad_output.data(), input.data(), gw, gb);
    } else {
      std::fill(gw, gw + grad_weight.size(), T(0));
      conv2d_kernels_for<T>().grad_bias(g, grad_output.data(), gb);
    }
  }
  return py::make_tuple(grad_input, grad_weight, grad_bias);
}

template <class T>
py::tuple max_pool2d(const Array<T>& input, Pair kernel, Pair stride, Pair padding, Pair dilation, bool ceil_mode) {
  const char* op = "max_pool2d";
  require_rank(op, "input", input, 4);
  const Pool2dOptions options{kernel.first,   kernel.second,  stride.first,    stride.second, padding.first,
                              padding.second, dilation.first, dilation.second, ceil_mode};
  const Pool2dGeometry g =
      pool2d_geometry(op, input.shape(0), input.shape(1), input.shape(2), input.shape(3), options, Layout::nchw);
  Array<T> output = empty<T>(g.N, g.C, g.P, g.Q);
  Array<int64_t> indices = empty<int64_t>(g.N, g.C, g.P, g.Q);
  T* to = output.mutable_data();
  int64_t* at = indices.mutable_data();
  {
    py::gil_scoped_release release;
    if (g.N > 0) pool2d_kernels_for<T>().extremum_forward(g, {false, false}, input.data(), to, {PositionKind::indices, at});
  }
  return py::make_tuple(output, indices);
}

template <class T>
Array<T> max_pool2d_backward(const Array<T>& grad_output, const Array<int64_t>& indices, Pair input_size) {
  const char* op = "max_pool2d_backward";
  require_rank(op, "grad_output", grad_output, 4);
  require_rank(op, "indices", indices, 4);
  for (int dim = 0; dim < 4; ++dim) {
    require(indices.shape(dim) == grad_output.shape(dim), op, "indices must have the shape of grad_output, got ",
            indices.shape(dim), " and ", grad_output.shape(dim), " in dimension ", dim);
  }
  const auto [H, W] = input_size;
  const int64_t N = indices.shape(0), C = indices.shape(1);
  require(H >= 0 && W >= 0, op, "input_size must be at least 0, got ", H, " and ", W);
  require_numel_fits(op, "number of input bytes", N, C, H, W);
  const Pool2dGeometry g{N, C, H, W, 1, 1, indices.shape(2), indices.shape(3), 1, 1, 0, 0, 1, 1, false, Layout::nchw};
  Array<T> grad_input = empty<T>(N, C, H, W);
  T* to = grad_input.mutable_data();
  bool inside = false;
  {
    py::gil_scoped_release release;
    inside = pool2d_scatter_add(g, grad_output.data(), indices.data(), to);
  }
  if (!inside) {
    const int64_t* index = indices.data();
    while (*index >= 0 && *index < H * W) ++index;
    require(false, op, "indices must lie in 0 ... ", H * W - 1, ", got ", *index);
  }
  return grad_input;
}

struct Average {
  Pool2dGeometry geometry;
  Divisor divisor;
};

Average average_of(const char* op, int64_t N, int64_t C, int64_t H, int64_t W, Pair kernel, Pair stride, Pair padding,
                   bool ceil_mode, bool count_include_pad, std::optional<int64_t> divisor_override) {
  require(!divisor_override || *divisor_override != 0, op, "divisor_override must not be 0, got ", divisor_override.value_or(0));
  const Pool2dOptions options{kernel.first, kernel.second, stride.first, stride.second, padding.first, padding.second, 1, 1,
                              ceil_mode};
  return {pool2d_geometry(op, N, C, H, W, options, Layout::nchw), {count_include_pad, divisor_override.value_or(0)}};
}

template <class T>
Array<T> avg_pool2d(const Array<T>& input, Pair kernel, Pair stride, Pair padding, bool ceil_mode, bool count_include_pad,
                    std::optional<int64_t> divisor_override) {
  const char* op = "avg_pool2d";
  require_rank(op, "input", input, 4);
  const Average average = average_of(op, input.shape(0), input.shape(1), input.shape(2), input.shape(3), kernel, stride, padding,
                                     ceil_mode, count_include_pad, divisor_override);
  const Pool2dGeometry& g = average.geometry;
  Array<T> output = empty<T>(g.N, g.C, g.P, g.Q);
  T* to = output.mutable_data();
  py::gil_scoped_release release;
  if (g.N > 0) pool2d_kernels_for<T>().avg_forward(g, average.divisor, input.data(), to);
  return output;
}

template <class T>
Array<T> avg_pool2d_backward(const Array<T>& grad_output, Pair input_size, Pair kernel, Pair stride, Pair padding, bool ceil_mode,
                             bool count_include_pad, std::optional<int64_t> divisor_override) {
  const char* op = "avg_pool2d_backward";
  require_rank(op, "grad_output", grad_output, 4);
  const Average average = average_of(op, grad_output.shape(0), grad_output.shape(1), input_size.first, input_size.second, kernel,
                                     stride, padding, ceil_mode, count_include_pad, divisor_override);
  const Pool2dGeometry& g = average.geometry;
  require(grad_output.shape(2) == g.P && grad_output.shape(3) == g.Q, op, "grad_output must have the size of the output, ", g.P,
          " x ", g.Q, ", got ", grad_output.shape(2), " x ", grad_output.shape(3));
  Array<T> grad_input = empty<T>(g.N, g.C, g.H, g.W);
  T* to = grad_input.mutable_data();
  py::gil_scoped_release release;
  if (g.N > 0) pool2d_kernels_for<T>().avg_grad_input(g, average.divisor, grad_output.data(), to);
  return grad_input;
}

template <class T>
void bind(py::module_& m) {
  m.def("conv2d", &conv2d<T>);
  m.def("conv2d_backward", &conv2d_backward<T>);
  m.def("max_pool2d", &max_pool2d<T>);
  m.def("max_pool2d_backward", &max_pool2d_backward<T>);
  m.def("avg_pool2d", &avg_pool2d<T>);
  m.def("avg_pool2d_backward", &avg_pool2d_backward<T>);
}

std::vector<std::tuple<std::string, std::string, std::string>> explain_conv2d(int64_t N, int64_t C, int64_t H, int64_t W,
                                                                              int64_t K, int64_t C_per_group, int64_t R,
                                                                              int64_t S, Pair stride, Pair padding, Pair dilation,
                                                                              int64_t groups, bool channels_last) {
  const Conv2dGeometry g =
      conv2d_geometry("explain", N, C, H, W, K, C_per_group, R, S,
                      {stride.first, stride.second, padding.first, padding.second, dilation.first, dilation.second, groups},
                      channels_last ? Layout::channels_last : Layout::nchw);
  std::vector<std::tuple<std::string, std::string, std::string>> rows;
  for (const Direction direction : {Direction::forward, Direction::grad_input, Direction::grad_weight}) {
    if (std::string_view(kernels().isa) == "reference") {
      rows.emplace_back(name_of(direction), "direct", "TORCHCNN_ISA=reference: the formula, summed in double");
      continue;
    }
    const Choice choice = choose_conv2d(g, direction, kernels().vector_bytes);
    rows.emplace_back(name_of(direction), name_of(choice.algorithm), choice.reason);
  }
  return rows;
}

Pair output_size(const std::string& op, Pair size, Pair kernel, Pair stride, Pair padding, Pair dilation, bool ceil_mode,
                 bool pool) {
  const auto along = [&](const char* axis, int64_t n, int64_t k, int64_t s, int64_t pad, int64_t d) {
    const int64_t out = sliding_output_size(op.c_str(), axis, n, k, s, pad, d, ceil_mode);
    if (pool) require_pool_padding(op.c_str(), axis, pad, k, d);
    return out;
  };
  return {along("height", size.first, kernel.first, stride.first, padding.first, dilation.first),
          along("width", size.second, kernel.second, stride.second, padding.second, dilation.second)};
}

// (A, G, B^T) of one Winograd algorithm for tiles with 1, 2, ... outputs, as lists of rows.
template <class F>
py::list winograd_matrices() {
  const auto rows = []<size_t count, size_t length>(const double (&matrix)[count][length]) {
    std::vector<std::vector<double>> list;
    for (const auto& row : matrix) list.emplace_back(row, row + length);
    return list;
  };
  py::list all;
  for (int wanted = 1; wanted <= F::out; ++wanted) {
    const scalar::winograd::Matrices<F> matrices(wanted);
    all.append(py::make_tuple(rows(matrices.A), rows(matrices.G), rows(matrices.B_T)));
  }
  return all;
}

py::dict all_winograd_matrices() {
  py::dict all;
  all[name_of(Algorithm::winograd_2x2_3x3)] = winograd_matrices<scalar::winograd::Transform<2, 3>>();
  all[name_of(Algorithm::winograd_4x4_3x3)] = winograd_matrices<scalar::winograd::Transform<4, 3>>();
  all[name_of(Algorithm::winograd_2x2_5x5)] = winograd_matrices<scalar::winograd::Transform<2, 5>>();
  all[name_of(Algorithm::winograd_2x2_stride_2)] = winograd_matrices<scalar::winograd::Stride2<2>>();
  all[name_of(Algorithm::winograd_4x4_stride_2)] = winograd_matrices<scalar::winograd::Stride2<4>>();
  all[name_of(Algorithm::winograd_3x3_4x4_phases)] = winograd_matrices<scalar::winograd::Transform<3, 4>>();
  all[name_of(Algorithm::winograd_1x3_1x7)] = winograd_matrices<scalar::winograd::Halves<3, 4>>();
  all["winograd_2x2_stride_2 grad_input"] = winograd_matrices<scalar::winograd::Stride2GradInput<2>>();
  all["winograd_4x4_stride_2 grad_input"] = winograd_matrices<scalar::winograd::Stride2GradInput<4>>();
  return all;
}

}  // namespace

// Asked by CUDA operators (device.h): torch's switches are Python's. A thread without Python's lock waits for it.
bool tf32_is_allowed() {
  if (!Py_IsInitialized()) return false;
  const py::gil_scoped_acquire lock;
  try {
    return py::module_::import("torchcnn.backends").attr("_tf32_is_allowed")().cast<bool>();
  } catch (const py::error_already_set& error) {
    throw Error(error.what());
  }
}

}  // namespace torchcnn

PYBIND11_MODULE(_C, m) {
  using namespace torchcnn;
  py::register_local_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const Error& error) {
      PyErr_SetString(PyExc_ValueError, error.what());
    }
  });
  kernels();  // a wrong TORCHCNN_ISA is refused here, at import
  py::module_ float32 = m.def_submodule("float32"), float64 = m.def_submodule("float64");
  bind<float>(float32);
  bind<double>(float64);
  m.def("isa", [] { return kernels().isa; });
  m.def("isas", [] {
    std::vector<std::string> names;
    for (const KernelTable* row : available_kernels()) names.emplace_back(row->isa);
    return names;
  });
  m.def("allow_winograd", &allow_winograd);
  m.def("set_allow_winograd", &set_allow_winograd, py::arg("allow").noconvert());
  m.def("workspace_limit", &workspace_limit);
  m.def("set_workspace_limit", &set_workspace_limit, py::arg("bytes").noconvert());
  m.def("workspace_size", &workspace_size);
  m.def("release_workspaces", &release_workspaces);
  m.def("winograd_matrices", &all_winograd_matrices);
  m.def("sliding_output_size", &output_size);
  // The rules alone, for tensors without data. What the tensors' own sizes are followed by are the options of the operators.
  m.def("check_conv2d", [](const std::string& op, int64_t N, int64_t C, int64_t H, int64_t W, int64_t K, int64_t C_per_group,
                           int64_t R, int64_t S, int64_t stride_h, int64_t stride_w, int64_t pad_h, int64_t pad_w,
                           int64_t dilation_h, int64_t dilation_w, int64_t groups) {
    conv2d_geometry(op.c_str(), N, C, H, W, K, C_per_group, R, S,
                    {stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, groups}, Layout::nchw);
  });
  m.def("check_conv_transpose2d",
        [](const std::string& op, int64_t N, int64_t K, int64_t P, int64_t Q, int64_t weight_channels, int64_t C_per_group,
           int64_t R, int64_t S, int64_t stride_h, int64_t stride_w, int64_t pad_h, int64_t pad_w, int64_t dilation_h,
           int64_t dilation_w, int64_t groups, int64_t output_pad_h, int64_t output_pad_w) {
    conv_transpose2d_geometry(op.c_str(), N, K, P, Q, weight_channels, C_per_group, R, S,
                              {stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, groups}, output_pad_h, output_pad_w,
                              Layout::nchw);
  });
  m.def("check_pool2d", [](const std::string& op, int64_t N, int64_t C, int64_t H, int64_t W, int64_t kernel_h, int64_t kernel_w,
                           int64_t stride_h, int64_t stride_w, int64_t pad_h, int64_t pad_w, int64_t dilation_h,
                           int64_t dilation_w, bool ceil_mode) {
    const Pool2dOptions options{kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, ceil_mode};
    pool2d_geometry(op.c_str(), N, C, H, W, options, Layout::nchw);
  });
  m.def("check_adaptive_pool2d", [](const std::string& op, int64_t N, int64_t C, int64_t H, int64_t W, int64_t P, int64_t Q) {
    adaptive_pool2d_geometry(op.c_str(), N, C, H, W, P, Q, Layout::nchw);
  });
  m.def("explain_conv2d", &explain_conv2d);
}
