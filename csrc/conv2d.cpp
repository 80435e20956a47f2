// The convolution operators: schema, checks, allocation, call of a kernel.
//
//   conv2d              forward
//   conv2d_grad_input   with respect to the input
//   conv2d_grad_weight  with respect to the weight
//   conv2d_grad_bias    with respect to the bias
//   conv2d_grad_weight_bias   both at once, which reads grad_output once
//   conv_transpose2d    conv2d_grad_input as a layer of its own, with a bias
//
// Each of the first three is linear in both its tensors and its derivatives are the other two, so derivatives of every order are
// made of them (torchcnn/conv.py). Results have the layout that the caller asks for.
#include <algorithm>
#include <tuple>

#include "cpu/conv2d_choice.h"
#include "cpu/kernels.h"
#include "cpu/runtime.h"
#include "device.h"

namespace torchcnn {
namespace {

// The shape checks that come before conv2d_geometry, for the weight as conv2d receives it.
void require_conv2d_tensors(const char* op, const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias) {
  require_rank(op, "input", input, 4);
  require_rank(op, "weight", weight, 4);
  require_same_kind(op, "input", input, "weight", weight);
  if (!bias) return;
  require(bias->dim() == 1 && bias->size(0) == weight.size(0), op, "bias must have shape [weight.shape[0]], got ", Shape{*bias},
          " for weight of shape ", Shape{weight});
  require_same_kind(op, "input", input, "bias", *bias);
}

void require_grad_output(const char* op, const Tensor& grad_output, const Conv2dGeometry& g) {
  require(grad_output.size(0) == g.N && grad_output.size(1) == g.K && grad_output.size(2) == g.P && grad_output.size(3) == g.Q,
          op, "grad_output must have the shape of the output, [", g.N, ", ", g.K, ", ", g.P, ", ", g.Q, "], got ",
          Shape{grad_output});
}

// The kernels for an element type. bfloat16 and float16 are computed in float32, with the weight as a whole and as many images at
// a time as 8 MiB hold, so that what is widened is still in the caches when it is used.
template <class T>
struct Run {
  static void forward(const Conv2dGeometry& g, const T* input, const T* weight, const T* bias, bool relu, T* output) {
    conv2d_kernels_for<T>().forward(g, input, weight, {bias, relu}, output);
  }
  static void grad_input(const Conv2dGeometry& g, const T* grad_output, const T* weight, T* grad_input) {
    conv2d_kernels_for<T>().grad_input(g, grad_output, weight, grad_input);
  }
  static void grad_weight(const Conv2dGeometry& g, const T* grad_output, const T* input, T* grad_weight, T* grad_bias) {
    conv2d_kernels_for<T>().grad_weight(g, grad_output, input, grad_weight, grad_bias);
  }
  static void grad_bias(const Conv2dGeometry& g, const T* grad_output, T* grad_bias) {
    conv2d_kernels_for<T>().grad_bias(g, grad_output, grad_bias);
  }
};

// Calls run(part, first): the geometry of some images, and the number of the first of them. Where they are cut depends on their
// size alone, and so do the sums of grad_weight and grad_bias over the parts.
template <class RunPart>
void for_images_together(const Conv2dGeometry& g, RunPart run) {
  constexpr int64_t elements = (int64_t(8) << 20) / sizeof(float);
  const int64_t together = std::max<int64_t>(1, elements / std::max<int64_t>(1, g.C * g.H * g.W + g.K * g.P * g.Q));
  Conv2dGeometry part = g;
  for (int64_t n = 0; n < g.N; n += together) {
    part.N = std::min(together, g.N - n);
    run(part, n);
  }
}

template <class S>
const float* widened(Slot slot, const S* from, int64_t count) {
  float* to = workspace<float>(slot, count);
  convert_kernels_for<S>().widen(from, count, to);
  return to;
}

template <class S>
  requires kIsLowPrecision<S>
struct Run<S> {
  static void forward(const Conv2dGeometry& g, const S* input, const S* weight, const S* bias, bool relu, S* output) {
    const WorkspaceUse use;
    const int64_t weights = g.K * g.C_per_group() * g.R * g.S, image = g.C * g.H * g.W, result = g.K * g.P * g.Q;
    float* w = workspace<float>(Slot::wide_weight, weights + g.K);
    convert_kernels_for<S>().widen(weight, weights, w);
    if (bias != nullptr) convert_kernels_for<S>().widen(bias, g.K, w + weights);
    for_images_together(g, [&](const Conv2dGeometry& part, int64_t n) {
      const float* in = widened(Slot::wide_images, input + n * image, part.N * image);
      float* out = workspace<float>(Slot::wide_results, part.N * result);
      Run<float>::forward(part, in, w, bias == nullptr ? nullptr : w + weights, relu, out);
      convert_kernels_for<S>().narrow(out, part.N * result, output + n * result);
    });
  }
  static void grad_input(const Conv2dGeometry& g, const S* grad_output, const S* weight, S* grad_input) {
    const WorkspaceUse use;
    const int64_t image = g.C * g.H * g.W, result = g.K * g.P * g.Q;
    const float* w = widened(Slot::wide_weight, weight, g.K * g.C_per_group() * g.R * g.S);
    for_images_together(g, [&](const Conv2dGeometry& part, int64_t n) {
      const float* gradient = widened(Slot::wide_results, grad_output + n * result, part.N * result);
      float* in = workspace<float>(Slot::wide_images, part.N * image);
      Run<float>::grad_input(part, gradient, w, in);
      convert_kernels_for<S>().narrow(in, part.N * image, grad_input + n * image);
    });
  }
  static void grad_weight(const Conv2dGeometry& g, const S* grad_output, const S* input, S* grad_weight, S* grad_bias) {
    const WorkspaceUse use;
    const int64_t weights = g.K * g.C_per_group() * g.R * g.S, image = g.C * g.H * g.W, result = g.K * g.P * g.Q;
    const int64_t sums = weights + (grad_bias == nullptr ? 0 : g.K);  // the bias after the weights
    float* sum = workspace<float>(Slot::wide_weight, 2 * sums);
    for_images_together(g, [&](const Conv2dGeometry& part, int64_t n) {
      const float* in = widened(Slot::wide_images, input + n * image, part.N * image);
      const float* gradient = widened(Slot::wide_results, grad_output + n * result, part.N * result);
      float* of_part = sum + (n == 0 ? 0 : sums);
      Run<float>::grad_weight(part, gradient, in, of_part, grad_bias == nullptr ? nullptr : of_part + weights);
      for (int64_t i = 0; n > 0 && i < sums; ++i) sum[i] += of_part[i];
    });
    convert_kernels_for<S>().narrow(sum, weights, grad_weight);
    if (grad_bias != nullptr) convert_kernels_for<S>().narrow(sum + weights, g.K, grad_bias);
  }
  static void grad_bias(const Conv2dGeometry& g, const S* grad_output, S* grad_bias) {
    const WorkspaceUse use;
    const int64_t result = g.K * g.P * g.Q;
    float* sum = workspace<float>(Slot::wide_weight, 2 * g.K);
    std::fill(sum, sum + g.K, 0.0f);
    for_images_together(g, [&](const Conv2dGeometry& part, int64_t n) {
      Run<float>::grad_bias(part, widened(Slot::wide_results, grad_output + n * result, part.N * result), sum + g.K);
      for (int64_t k = 0; k < g.K; ++k) sum[k] += sum[g.K + k];
    });
    convert_kernels_for<S>().narrow(sum, g.K, grad_bias);
  }
};

// The layout in which kernels on the device of `like` read the weights, or write their gradient, that a tensor has or wants.
Layout weight_layout_for(const Conv2dGeometry& g, Direction direction, const Tensor& like, Layout layout) {
  return (kHasCuda && runs_on_cuda(like)) || reads_any_weight_layout(g, direction) ? layout : Layout::nchw;
}

Tensor conv2d(Tensor input, Tensor weight, std::optional<Tensor> bias, int64_t stride_h, int64_t stride_w, int64_t pad_h,
              int64_t pad_w, int64_t dilation_h, int64_t dilation_w, int64_t groups, bool relu) {
  const char* op = "conv2d";
  require_conv2d_tensors(op, input, weight, bias);
  const Layout layout = either_channels_last(input, weight);
  Conv2dGeometry g =
      conv2d_geometry(op, input.size(0), input.size(1), input.size(2), input.size(3), weight.size(0), weight.size(1),
                      weight.size(2), weight.size(3), {stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, groups}, layout);
  g.weight_layout = weight_layout_for(g, Direction::forward, weight, layout_of(weight));
  Tensor output;
  for_float_type(op, input.scalar_type(), [&]<class T>(T) {
    output = empty_activation(input, g.N, g.K, g.P, g.Q, layout);
    if (g.N == 0) return;
    const Tensor in = in_layout(input, layout), w = in_layout(weight, g.weight_layout);
    const Tensor b = bias ? torch::stable::contiguous(*bias) : w;
    const T* bias_data = bias ? data_of<T>(b) : nullptr;
    on_device_of(input, [&] { Run<T>::forward(g, data_of<T>(in), data_of<T>(w), bias_data, relu, mutable_data_of<T>(output)); },
                 [&](cuda::Stream stream) {
      const Layout w_layout = g.weight_layout;
      const Tensor workspace = empty_bytes(input, cuda::conv2d_forward_workspace<T>(g, data_of<T>(in), data_of<T>(w), w_layout));
      cuda::conv2d_forward<T>(g, data_of<T>(in), data_of<T>(w), w_layout, {bias_data, relu}, mutable_data_of<T>(output),
                              float32_precision<T>(), mutable_data_of<void>(workspace), stream);
    });
  });
  return output;
}

template <class T>
void grad_input_on_cuda(const Conv2dGeometry& g, const Tensor& grad_output, const Tensor& weight, const T* bias,
                        const Tensor& grad_input, cuda::Stream stream) {
  const Layout layout = layout_of(weight);
  const Tensor workspace =
      empty_bytes(grad_output, cuda::conv2d_grad_input_workspace<T>(g, data_of<T>(grad_output), data_of<T>(weight), layout));
  cuda::conv2d_grad_input<T>(g, data_of<T>(grad_output), data_of<T>(weight), layout, {bias, false},
                             mutable_data_of<T>(grad_input), float32_precision<T>(), mutable_data_of<void>(workspace), stream);
}

Tensor conv2d_grad_input(Tensor grad_output, Tensor weight, int64_t H, int64_t W, int64_t stride_h, int64_t stride_w,
                         int64_t pad_h, int64_t pad_w, int64_t dilation_h, int64_t dilation_w, int64_t groups,
                         bool channels_last) {
  const char* op = "conv2d_grad_input";
  require_rank(op, "grad_output", grad_output, 4);
  require_rank(op, "weight", weight, 4);
  require_same_kind(op, "grad_output", grad_output, "weight", weight);
  const Layout layout = layout_from(channels_last);
  Conv2dGeometry g = conv2d_geometry(op, grad_output.size(0), checked_mul(weight.size(1), groups, op, "input channels"), H, W,
                                     weight.size(0), weight.size(1), weight.size(2), weight.size(3),
                                     {stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, groups}, layout);
  g.weight_layout = weight_layout_for(g, Direction::grad_input, weight, layout_of(weight));
  require_grad_output(op, grad_output, g);
  require_numel_fits(op, "number of input bytes", g.N, g.C, g.H, g.W);
  Tensor grad_input;
  for_float_type(op, grad_output.scalar_type(), [&]<class T>(T) {
    grad_input = empty_activation(grad_output, g.N, g.C, g.H, g.W, layout);
    if (g.N == 0 || g.C == 0) return;
    const Tensor gradient = in_layout(grad_output, layout), w = in_layout(weight, g.weight_layout);
    on_device_of(grad_output, [&] { Run<T>::grad_input(g, data_of<T>(gradient), data_of<T>(w), mutable_data_of<T>(grad_input)); },
                 [&](cuda::Stream stream) { grad_input_on_cuda<T>(g, gradient, w, nullptr, grad_input, stream); });
  });
  return grad_input;
}

// Adds the bias of its channel to every element of an activation.
template <class T>
void add_bias(const Conv2dGeometry& g, const T* bias, T* activation) {
  const int64_t pixels = g.H * g.W;
  if (g.layout == Layout::nchw) {
    parallel_for(g.N * g.C, pixels / 4 + 1, [&](int64_t plane) {
      T* to = activation + plane * pixels;
      const T value = bias[plane % g.C];
      for (int64_t i = 0; i < pixels; ++i) to[i] += value;
    });
  } else {
    parallel_for(g.N * g.H, g.W * (g.C / 4 + 1), [&](int64_t row) {
      T* to = activation + row * g.W * g.C;
      for (int64_t w = 0; w < g.W; ++w, to += g.C)
        for (int64_t c = 0; c < g.C; ++c) to[c] += bias[c];
    });
  }
}

Tensor conv_transpose2d(Tensor input, Tensor weight, std::optional<Tensor> bias, int64_t stride_h, int64_t stride_w,
                        int64_t pad_h, int64_t pad_w, int64_t dilation_h, int64_t dilation_w, int64_t groups,
                        int64_t output_pad_h, int64_t output_pad_w) {
  const char* op = "conv_transpose2d";
  require_rank(op, "input", input, 4);
  require_rank(op, "weight", weight, 4);
  require_same_kind(op, "input", input, "weight", weight);
  const Layout layout = either_channels_last(input, weight);
  const Conv2dGeometry g = conv_transpose2d_geometry(
      op, input.size(0), input.size(1), input.size(2), input.size(3), weight.size(0), weight.size(1), weight.size(2),
      weight.size(3), {stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, groups}, output_pad_h, output_pad_w, layout);
  if (bias) {
    require(bias->dim() == 1 && bias->size(0) == g.C, op, "bias must have shape [weight.shape[1] * groups], got ", Shape{*bias},
            " for weight of shape ", Shape{weight}, " and groups=", groups);
    require_same_kind(op, "input", input, "bias", *bias);
  }
  if (kHasCuda && bias && runs_on_cuda(input)) {  // the bias is added in the kernel
    Tensor output;
    for_float_type(op, input.scalar_type(), [&]<class T>(T) {
      output = empty_activation(input, g.N, g.C, g.H, g.W, layout);
      if (output.numel() == 0) return;
      const Tensor in = in_layout(input, layout), w = in_layout(weight, layout_of(weight)), b = torch::stable::contiguous(*bias);
      on_device_of(input, [] {}, [&](cuda::Stream stream) { grad_input_on_cuda<T>(g, in, w, data_of<T>(b), output, stream); });
    });
    return output;
  }
  if (bias && is_low_precision(input)) {  // rounded once, after the bias
    const ScalarType wide = ScalarType::Float;
    return to_dtype(conv_transpose2d(to_dtype(input, wide), to_dtype(weight, wide), to_dtype(*bias, wide), stride_h, stride_w,
                                     pad_h, pad_w, dilation_h, dilation_w, groups, output_pad_h, output_pad_w),
                    input.scalar_type());
  }
  const Tensor output = conv2d_grad_input(input, weight, g.H, g.W, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w,
                                          groups, layout == Layout::channels_last);
  if (!bias || output.numel() == 0) return output;
  const Tensor b = torch::stable::contiguous(*bias);
  if (input.scalar_type() == ScalarType::Float)
    add_bias(g, data_of<float>(b), mutable_data_of<float>(output));
  else
    add_bias(g, data_of<double>(b), mutable_data_of<double>(output));
  return output;
}

// On the CPU `grad_bias`, if not null, is filled beside.
Tensor grad_weight_of(const char* op, const Tensor& grad_output, const Tensor& input, int64_t R, int64_t S,
                      const Conv2dOptions& options, bool channels_last, const Tensor* grad_bias) {
  require_rank(op, "grad_output", grad_output, 4);
  require_rank(op, "input", input, 4);
  require_same_kind(op, "grad_output", grad_output, "input", input);
  require(options.groups > 0, op, "groups must be at least 1, got ", options.groups);
  const Layout layout = layout_of(input.size(1) == 1 ? grad_output : input);  // one channel fits both layouts
  Conv2dGeometry g = conv2d_geometry(op, input.size(0), input.size(1), input.size(2), input.size(3), grad_output.size(1),
                                     input.size(1) / options.groups, R, S, options, layout);
  g.weight_layout = weight_layout_for(g, Direction::grad_weight, input, layout_from(channels_last));
  require_grad_output(op, grad_output, g);
  require_numel_fits(op, "number of weight bytes", g.K, g.C_per_group(), g.R, g.S);
  Tensor grad_weight;
  for_float_type(op, grad_output.scalar_type(), [&]<class T>(T) {
    grad_weight = empty_activation(grad_output, g.K, g.C_per_group(), g.R, g.S, g.weight_layout);
    if (g.C == 0) return;
    T* to = mutable_data_of<T>(grad_weight);
    if (g.N == 0) {
      torch::stable::zero_(grad_weight);
      return;
    }
    const Tensor gradient = in_layout(grad_output, layout), in = in_layout(input, layout);
    T* bias = grad_bias == nullptr ? nullptr : mutable_data_of<T>(*grad_bias);
    on_device_of(input, [&] { Run<T>::grad_weight(g, data_of<T>(gradient), data_of<T>(in), to, bias); },
                 [&](cuda::Stream stream) {
      const Tensor workspace = empty_bytes(input, cuda::conv2d_grad_weight_workspace<T>(g, data_of<T>(gradient), data_of<T>(in)));
      cuda::conv2d_grad_weight<T>(g, data_of<T>(gradient), data_of<T>(in), to, g.weight_layout, float32_precision<T>(),
                                  mutable_data_of<void>(workspace), stream);
    });
  });
  return in_layout(grad_weight, layout_from(channels_last));
}

Tensor conv2d_grad_weight(Tensor grad_output, Tensor input, int64_t R, int64_t S, int64_t stride_h, int64_t stride_w,
                          int64_t pad_h, int64_t pad_w, int64_t dilation_h, int64_t dilation_w, int64_t groups,
                          bool channels_last) {
  return grad_weight_of("conv2d_grad_weight", grad_output, input, R, S,
                        {stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, groups}, channels_last, nullptr);
}

Tensor conv2d_grad_bias(Tensor grad_output) {
  const char* op = "conv2d_grad_bias";
  require_rank(op, "grad_output", grad_output, 4);
  const Layout layout = layout_of(grad_output);
  const int64_t K = grad_output.size(1);
  Tensor grad_bias;
  for_float_type(op, grad_output.scalar_type(), [&]<class T>(T) {
    grad_bias = torch::stable::new_empty(grad_output, {K});
    const Conv2dGeometry g{
        grad_output.size(0), 0, 0, 0, K, 0, 0, grad_output.size(2), grad_output.size(3), 1, 1, 1, 0, 0, 1, 1, layout};
    const Tensor gradient = in_layout(grad_output, layout);
    on_device_of(grad_output, [&] { Run<T>::grad_bias(g, data_of<T>(gradient), mutable_data_of<T>(grad_bias)); },
                 [&](cuda::Stream stream) {
      if (grad_output.numel() == 0) {
        torch::stable::zero_(grad_bias);
        return;
      }
      const Tensor workspace = empty_bytes(grad_output, cuda::conv2d_grad_bias_workspace<T>(g));
      cuda::conv2d_grad_bias<T>(g, data_of<T>(gradient), mutable_data_of<T>(grad_bias), mutable_data_of<void>(workspace), stream);
    });
  });
  return grad_bias;
}

std::tuple<Tensor, Tensor> conv2d_grad_weight_bias(Tensor grad_output, Tensor input, int64_t R, int64_t S, int64_t stride_h,
                                                   int64_t stride_w, int64_t pad_h, int64_t pad_w, int64_t dilation_h,
                                                   int64_t dilation_w, int64_t groups, bool channels_last) {
  const char* op = "conv2d_grad_weight_bias";
  const Conv2dOptions options{stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, groups};
  const bool beside = !(kHasCuda && runs_on_cuda(grad_output)) && grad_output.numel() > 0 && input.numel() > 0;
  if (!beside) {
    const Tensor grad_weight = grad_weight_of(op, grad_output, input, R, S, options, channels_last, nullptr);
    return {grad_weight, conv2d_grad_bias(grad_output)};
  }
  require_rank(op, "grad_output", grad_output, 4);
  const Tensor grad_bias = torch::stable::new_empty(grad_output, {grad_output.size(1)});
  return {grad_weight_of(op, grad_output, input, R, S, options, channels_last, &grad_bias), grad_bias};
}

}  // namespace
}  // namespace torchcnn

#define CONV2D_OPTIONS "int stride_h, int stride_w, int pad_h, int pad_w, int dilation_h, int dilation_w, int groups"

STABLE_TORCH_LIBRARY_FRAGMENT(torchcnn, m) {
  m.def("conv2d(Tensor input, Tensor weight, Tensor? bias, " CONV2D_OPTIONS ", bool relu) -> Tensor");
  m.def("conv2d_grad_input(Tensor grad_output, Tensor weight, SymInt H, SymInt W, " CONV2D_OPTIONS
        ", bool channels_last) -> Tensor");
  m.def("conv2d_grad_weight(Tensor grad_output, Tensor input, SymInt R, SymInt S, " CONV2D_OPTIONS
        ", bool channels_last) -> Tensor");
  m.def("conv2d_grad_bias(Tensor grad_output) -> Tensor");
  m.def("conv2d_grad_weight_bias(Tensor grad_output, Tensor input, SymInt R, SymInt S, " CONV2D_OPTIONS
        ", bool channels_last) -> (Tensor, Tensor)");
  m.def("conv_transpose2d(Tensor input, Tensor weight, Tensor? bias, " CONV2D_OPTIONS
        ", SymInt output_pad_h, SymInt output_pad_w) -> Tensor");
}

static void register_kernels(torch::stable::detail::StableLibrary& m) {
  m.impl("conv2d", TORCH_BOX(&torchcnn::conv2d));
  m.impl("conv2d_grad_input", TORCH_BOX(&torchcnn::conv2d_grad_input));
  m.impl("conv2d_grad_weight", TORCH_BOX(&torchcnn::conv2d_grad_weight));
  m.impl("conv2d_grad_bias", TORCH_BOX(&torchcnn::conv2d_grad_bias));
  m.impl("conv2d_grad_weight_bias", TORCH_BOX(&torchcnn::conv2d_grad_weight_bias));
  m.impl("conv_transpose2d", TORCH_BOX(&torchcnn::conv_transpose2d));
}

STABLE_TORCH_LIBRARY_IMPL(torchcnn, CPU, m) { register_kernels(m); }
#ifdef TORCHCNN_CUDA
STABLE_TORCH_LIBRARY_IMPL(torchcnn, CUDA, m) { register_kernels(m); }
#endif
