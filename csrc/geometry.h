// Every size rule of torchcnn, stated once: the names of the sizes, what a legal operator is, and the output-size formulas.
//
//   convolution   P = floor((H + 2 pad_h - dilation_h (R - 1) - 1) / stride_h) + 1,   Q likewise from W and S
//   pooling       the same; with ceil_mode the division rounds up, but a window must start inside the input or its left padding
//   transposed    H = (P - 1) stride_h - 2 pad_h + dilation_h (R - 1) + output_pad_h + 1
//   adaptive      window p of P covers the rows floor(p H / P) ... ceil((p + 1) H / P) - 1
//
// A rule that does not hold throws Error, whose message names the operator, the rule and both values. Nothing has been
// computed or allocated by then. Sums and products that could leave 64 bits are checked.
#pragma once

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>

namespace torchcnn {

// Reaches Python as RuntimeError from the torch operators and as ValueError from torchcnn.numpy.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

template <class... Parts>
void require(bool holds, const char* op, const Parts&... parts) {
  if (holds) return;
  std::ostringstream message;
  message << op << ": ";
  (message << ... << parts);
  throw Error(message.str());
}

inline int64_t checked_mul(int64_t a, int64_t b, const char* op, const char* what) {
  int64_t product = 0;
  require(!__builtin_mul_overflow(a, b, &product), op, what, " must fit in 64 bits, but ", a, " * ", b, " does not");
  return product;
}

inline int64_t checked_add(int64_t a, int64_t b, const char* op, const char* what) {
  int64_t sum = 0;
  require(!__builtin_add_overflow(a, b, &sum), op, what, " must fit in 64 bits, but ", a, " + ", b, " does not");
  return sum;
}

constexpr int64_t ceil_div(int64_t a, int64_t b) { return a / b + (a % b > 0); }  // b > 0; a + b - 1 could overflow

// How an activation (input, output and their gradients) lies in memory. Weights are always K C/G R S, on CUDA in either layout.
enum class Layout { nchw, channels_last };

// Element strides of an activation.
struct Strides {
  int64_t n, c, h, w;
};

constexpr Strides activation_strides(Layout layout, int64_t C, int64_t H, int64_t W) {
  if (layout == Layout::nchw) return {C * H * W, H * W, W, 1};
  return {C * H * W, 1, W * C, C};
}

// One axis of a sliding window: `size` input positions, `kernel` taps, one window every `stride` positions.
inline int64_t sliding_output_size(const char* op, const char* axis, int64_t size, int64_t kernel, int64_t stride, int64_t pad,
                                   int64_t dilation, bool ceil_mode) {
  require(kernel > 0, op, "kernel size must be at least 1, got ", kernel, " in ", axis);
  require(stride > 0, op, "stride must be at least 1, got ", stride, " in ", axis);
  require(dilation > 0, op, "dilation must be at least 1, got ", dilation, " in ", axis);
  require(pad >= 0, op, "padding must be at least 0, got ", pad, " in ", axis);
  const int64_t padded = checked_add(size, checked_mul(2, pad, op, "padded input size"), op, "padded input size");
  const int64_t window = checked_add(checked_mul(dilation, kernel - 1, op, "dilated kernel size"), 1, op, "dilated kernel size");
  require(window <= padded || (ceil_mode && window - padded < stride), op,
          "output size must be at least 1, but the padded input (", padded, ") is smaller than the dilated kernel (", window,
          ") in ", axis);
  const int64_t span = padded - window;  // may be negative, down to 1 - stride, with ceil_mode only
  int64_t out = (ceil_mode ? checked_add(span, stride - 1, op, "output size") : span) / stride + 1;
  if (ceil_mode && (out - 1) * stride >= size + pad) --out;
  require(out > 0, op, "output size must be at least 1, got ", out, " in ", axis);
  return out;
}

inline void require_numel_fits(const char* op, const char* what, int64_t a, int64_t b, int64_t c, int64_t d) {
  // 8 bytes is the widest element: the size in bytes must fit too.
  int64_t bytes = 8;
  for (int64_t size : {a, b, c, d}) {
    if (size == 0) return;
    bytes = checked_mul(bytes, size, op, what);
  }
}

struct Conv2dGeometry {
  int64_t N, C, H, W;  // input
  int64_t K, R, S;     // output channels, filter height and width
  int64_t P, Q;        // output
  int64_t G;           // groups
  int64_t stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  Layout layout;
  Layout weight_layout = Layout::nchw;  // on the CPU channels_last only for the kernels that reads_any_weight_layout names

  int64_t C_per_group() const { return C / G; }
  int64_t K_per_group() const { return K / G; }
  Strides input_strides() const { return activation_strides(layout, C, H, W); }
  Strides output_strides() const { return activation_strides(layout, K, P, Q); }
  Strides weight_strides() const { return activation_strides(weight_layout, C_per_group(), R, S); }  // n: one filter
};

// What happens to an output element before it is written: the bias of its channel is added (null: none), then
// max(0, x) if relu; a NaN stays one.
template <class T>
struct Epilogue {
  const T* bias;
  bool relu;
};

// The stride, padding, dilation and groups of a convolution as the operators receive them.
struct Conv2dOptions {
  int64_t stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, groups;
};

inline Conv2dGeometry conv2d_geometry(const char* op, int64_t N, int64_t C, int64_t H, int64_t W, int64_t K, int64_t C_per_group,
                                      int64_t R, int64_t S, const Conv2dOptions& o, Layout layout) {
  require(o.groups > 0, op, "groups must be at least 1, got ", o.groups);
  require(N >= 0 && C >= 0, op, "batch and channels must be at least 0, got ", N, " and ", C);
  require(H > 0 && W > 0, op, "input height and width must be at least 1, got ", H, " and ", W);
  require(K > 0, op, "weight must have at least 1 output channel, got ", K);
  require(K % o.groups == 0, op, "output channels must be divisible by groups, got ", K, " channels and groups=", o.groups);
  require(C == checked_mul(C_per_group, o.groups, op, "weight channels * groups"), op,
          "input channels must equal weight.shape[1] * groups, got ", C, " channels and ", C_per_group, " * ", o.groups);
  const int64_t dilation_h = R == 1 ? 1 : o.dilation_h, dilation_w = S == 1 ? 1 : o.dilation_w;  // no tap is next to another
  Conv2dGeometry g{N, C, H, W, K, R, S, 0, 0, o.groups, o.stride_h, o.stride_w, o.pad_h, o.pad_w, dilation_h, dilation_w, layout};
  g.P = sliding_output_size(op, "height", H, R, o.stride_h, o.pad_h, o.dilation_h, false);
  g.Q = sliding_output_size(op, "width", W, S, o.stride_w, o.pad_w, o.dilation_w, false);
  require_numel_fits(op, "number of output bytes", N, K, g.P, g.Q);
  return g;
}

// One axis of a transposed convolution: the size that a convolution with these options makes `size` of. There are `stride` such
// sizes; output_pad chooses one.
inline int64_t transposed_output_size(const char* op, const char* axis, int64_t size, int64_t kernel, int64_t stride, int64_t pad,
                                      int64_t dilation, int64_t output_pad) {
  require(size > 0, op, "input height and width must be at least 1, got ", size, " in ", axis);
  require(kernel > 0, op, "kernel size must be at least 1, got ", kernel, " in ", axis);
  require(stride > 0, op, "stride must be at least 1, got ", stride, " in ", axis);
  require(dilation > 0, op, "dilation must be at least 1, got ", dilation, " in ", axis);
  require(pad >= 0, op, "padding must be at least 0, got ", pad, " in ", axis);
  require(output_pad >= 0 && output_pad < stride, op, "output_padding must be at least 0 and below stride or dilation, got ",
          output_pad, " with stride ", stride, " and dilation ", dilation, " in ", axis);
  const char* what = "output size";
  int64_t out = checked_mul(size - 1, stride, op, what);
  out = checked_add(out, checked_mul(dilation, kernel - 1, op, what), op, what);
  out = checked_add(out, output_pad + 1, op, what) - checked_mul(2, pad, op, what);
  require(out > 0, op, "output size must be at least 1, got ", out, " in ", axis);
  return out;
}

// The convolution of which a transposed one is the grad_input: what goes into the latter is the output of the former.
inline Conv2dGeometry conv_transpose2d_geometry(const char* op, int64_t N, int64_t K, int64_t P, int64_t Q,
                                                int64_t weight_channels, int64_t C_per_group, int64_t R, int64_t S,
                                                const Conv2dOptions& o, int64_t output_pad_h, int64_t output_pad_w,
                                                Layout layout) {
  require(o.groups > 0, op, "groups must be at least 1, got ", o.groups);
  require(K > 0, op, "input must have at least 1 channel, got ", K);
  require(K == weight_channels, op, "input channels must equal weight.shape[0], got ", K, " and ", weight_channels);
  require(K % o.groups == 0, op, "input channels must be divisible by groups, got ", K, " channels and groups=", o.groups);
  const int64_t H = transposed_output_size(op, "height", P, R, o.stride_h, o.pad_h, o.dilation_h, output_pad_h);
  const int64_t W = transposed_output_size(op, "width", Q, S, o.stride_w, o.pad_w, o.dilation_w, output_pad_w);
  const int64_t C = checked_mul(C_per_group, o.groups, op, "output channels");
  require_numel_fits(op, "number of output bytes", N, C, H, W);
  return conv2d_geometry(op, N, C, H, W, K, C_per_group, R, S, o, layout);
}

struct Pool2dGeometry {
  int64_t N, C, H, W;  // input
  int64_t R, S;        // window height and width
  int64_t P, Q;        // output
  int64_t stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  bool adaptive;  // windows from the adaptive rule; R, S, stride, padding and dilation are then unused
  Layout layout;

  constexpr Strides input_strides() const { return activation_strides(layout, C, H, W); }
  constexpr Strides output_strides() const { return activation_strides(layout, C, P, Q); }
};

// The input positions begin, begin + dilation, ... < end of one window along one axis, and how many positions an average
// that counts the padding divides by.
struct Window {
  int64_t begin, end, padded_size;
};

constexpr Window sliding_window(int64_t p, int64_t size, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation) {
  int64_t begin = p * stride - pad;
  int64_t end = begin + dilation * (kernel - 1) + 1;
  const int64_t padded_size = (end < size + pad ? end : size + pad) - begin;
  if (begin < 0) begin += ceil_div(-begin, dilation) * dilation;
  if (end > size) end = size;
  return {begin, end, padded_size};
}

// The taps of a dilated window can all step over a short input.
inline void require_windows_meet_input(const char* op, const char* axis, int64_t windows, int64_t size, int64_t kernel,
                                       int64_t stride, int64_t pad, int64_t dilation) {
  if (dilation == 1) return;
  for (int64_t p = 0; p < windows; ++p) {
    const Window window = sliding_window(p, size, kernel, stride, pad, dilation);
    require(window.begin < window.end, op, "every window must cover an input position, but window ", p, " of ", windows, " in ",
            axis, " lies in the padding alone");
  }
}

// Window, stride, padding and dilation of a pool as the operators receive them; average pools have dilation 1.
struct Pool2dOptions {
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  bool ceil_mode;
};

inline void require_pool_input(const char* op, int64_t C, int64_t H, int64_t W) {
  require(C > 0 && H > 0 && W > 0, op, "input must have non-empty channels, height and width, got ", C, ", ", H, " and ", W);
}

// More padding could leave a window without input. The dilated kernel size is known to fit in 64 bits by then.
inline void require_pool_padding(const char* op, const char* axis, int64_t pad, int64_t kernel, int64_t dilation) {
  const int64_t window = dilation * (kernel - 1) + 1;
  require(pad <= window / 2, op, "padding must be at most half of the dilated kernel size, got padding ", pad,
          " and dilated kernel size ", window, " in ", axis);
}

inline Pool2dGeometry pool2d_geometry(const char* op, int64_t N, int64_t C, int64_t H, int64_t W, const Pool2dOptions& o,
                                      Layout layout) {
  require_pool_input(op, C, H, W);
  Pool2dGeometry g{N,          C,          H,       W,       o.kernel_h,   o.kernel_w,   0,     0,
                   o.stride_h, o.stride_w, o.pad_h, o.pad_w, o.dilation_h, o.dilation_w, false, layout};
  g.P = sliding_output_size(op, "height", H, o.kernel_h, o.stride_h, o.pad_h, o.dilation_h, o.ceil_mode);
  g.Q = sliding_output_size(op, "width", W, o.kernel_w, o.stride_w, o.pad_w, o.dilation_w, o.ceil_mode);
  require_pool_padding(op, "height", o.pad_h, o.kernel_h, o.dilation_h);
  require_pool_padding(op, "width", o.pad_w, o.kernel_w, o.dilation_w);
  require_numel_fits(op, "number of output bytes", N, C, g.P, g.Q);
  checked_mul(o.kernel_h, o.kernel_w, op, "kernel height * kernel width");
  require_windows_meet_input(op, "height", g.P, H, o.kernel_h, o.stride_h, o.pad_h, o.dilation_h);
  require_windows_meet_input(op, "width", g.Q, W, o.kernel_w, o.stride_w, o.pad_w, o.dilation_w);
  return g;
}

inline Pool2dGeometry adaptive_pool2d_geometry(const char* op, int64_t N, int64_t C, int64_t H, int64_t W, int64_t P, int64_t Q,
                                               Layout layout) {
  require_pool_input(op, C, H, W);
  require(P >= 0 && Q >= 0, op, "output_size must be at least 0, got ", P, " and ", Q);
  require_numel_fits(op, "number of output bytes", N, C, P, Q);
  checked_mul(P, H, op, "output height * input height");
  checked_mul(Q, W, op, "output width * input width");
  return {N, C, H, W, 0, 0, P, Q, 0, 0, 0, 0, 1, 1, true, layout};
}

constexpr Window adaptive_window(int64_t p, int64_t size, int64_t windows) {
  const int64_t begin = p * size / windows;
  const int64_t end = ceil_div((p + 1) * size, windows);
  return {begin, end, end - begin};
}

constexpr Window row_window(const Pool2dGeometry& g, int64_t p) {
  return g.adaptive ? adaptive_window(p, g.H, g.P) : sliding_window(p, g.H, g.R, g.stride_h, g.pad_h, g.dilation_h);
}

constexpr Window column_window(const Pool2dGeometry& g, int64_t q) {
  return g.adaptive ? adaptive_window(q, g.W, g.Q) : sliding_window(q, g.W, g.S, g.stride_w, g.pad_w, g.dilation_w);
}

// The other way round: among the windows begin ... end - 1 along one axis are those that contain a position, and only those if
// the dilation is 1. Of adaptive windows, p contains h if floor(p H / P) <= h < ceil((p + 1) H / P), which is to say if
// floor(h P / H) <= p < ceil((h + 1) P / H).
struct WindowRange {
  int64_t begin, end;
};

constexpr WindowRange sliding_windows_over(int64_t position, int64_t windows, int64_t kernel, int64_t stride, int64_t pad,
                                           int64_t dilation) {
  const int64_t last_begin = position + pad, first_begin = last_begin - dilation * (kernel - 1);
  const int64_t end = last_begin / stride + 1;
  return {first_begin > 0 ? ceil_div(first_begin, stride) : 0, end < windows ? end : windows};
}

constexpr WindowRange adaptive_windows_over(int64_t position, int64_t size, int64_t windows) {
  const Window covered = adaptive_window(position, windows, size);
  return {covered.begin, covered.end};
}

constexpr WindowRange row_windows_over(const Pool2dGeometry& g, int64_t h) {
  return g.adaptive ? adaptive_windows_over(h, g.H, g.P) : sliding_windows_over(h, g.P, g.R, g.stride_h, g.pad_h, g.dilation_h);
}

constexpr WindowRange column_windows_over(const Pool2dGeometry& g, int64_t w) {
  return g.adaptive ? adaptive_windows_over(w, g.W, g.Q) : sliding_windows_over(w, g.Q, g.S, g.stride_w, g.pad_w, g.dilation_w);
}

// Which value of each window an extreme pool keeps: the largest or the smallest. With relu the largest, but no less than 0.
struct Extremum {
  bool minimum, relu;
};

// Where that value stands, if it is asked for.
//   indices        h W + w in the plane, int64
//   byte_offsets   r S + s in the window, uint8; 255 where relu put 0 in the place of every value
//   int_offsets    the same as int32, with -1, for windows of more taps than a byte can tell apart
enum class PositionKind { none, indices, byte_offsets, int_offsets };

struct Positions {
  PositionKind kind;
  void* to;
};

inline bool offsets_fit_bytes(int64_t R, int64_t S, bool relu) {
  const int64_t taps = relu ? 255 : 256;
  return R <= taps && S <= taps && R * S <= taps;
}

// What an average divides by.
struct Divisor {
  bool count_include_pad;
  int64_t override_value;  // 0: none

  constexpr int64_t operator()(const Window& row, const Window& column) const {
    if (override_value != 0) return override_value;
    if (count_include_pad) return row.padded_size * column.padded_size;
    return (row.end - row.begin) * (column.end - column.begin);
  }
};

}  // namespace torchcnn
