"""The specification: convolution, pooling and their gradients in NumPy, as a textbook writes them.

    Z[n, k, p, q] = sum(A_slice * W[k]) + b[k]         convolution
    dW[k] += A_slice * dZ[n, k, p, q]                  its gradients, each window in turn
    dA_slice += W[k] * dZ[n, k, p, q]
    db[k] += dZ[n, k, p, q]
    dA[the maximum] += dZ                              max pooling: the gradient goes to the maximum only
    dA_slice += dZ / size of the window                average pooling: it is spread evenly

A is the input, Z the output and A_slice the window of A that one output pixel sees. The loop indices n, c, h, w run over the
input N x C x H x W, k, r, s over the K filters of R x S taps, and p, q over the P x Q output pixels. Arrays have four
dimensions, sizes and steps are ints or pairs (height, width), nothing is checked and nothing is fast. The arithmetic is done
in the dtype of the arrays, so small integers give exact results. Only NumPy is needed.
"""

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Pair = int | Sequence[int]

# Sizes and windows


def conv2d_output_size(
    input_size: Sequence[int], kernel_size: Pair, stride: Pair = 1, padding: Pair = 0, dilation: Pair = 1
) -> tuple[int, int]:
    """Size of a convolution's output: P = floor((H + 2 padding - dilation (R - 1) - 1) / stride) + 1, and Q likewise.

    A kernel of R taps spans dilation (R - 1) + 1 pixels; it starts at 0, stride, 2 stride, ... as long as it fits.
    """

    def size(length, taps, step, pad, gap):
        return (length + 2 * pad - gap * (taps - 1) - 1) // step + 1

    return tuple(map(size, input_size, *map(_pair, (kernel_size, stride, padding, dilation))))


def pool2d_output_size(
    input_size: Sequence[int],
    kernel_size: Pair,
    stride: Pair | None = None,
    padding: Pair = 0,
    dilation: Pair = 1,
    ceil_mode: bool = False,
) -> tuple[int, int]:
    """Size of a pooling's output: that of a convolution, or rounded up where ceil_mode lets a last window run over the edge.

    ceil_mode: P = ceil((H + 2 padding - dilation (R - 1) - 1) / stride) + 1, and one less when the last window would start
    beyond the input and its first padding: (P - 1) stride >= H + padding.
    """

    def size(length, taps, step, pad, gap):
        free = length + 2 * pad - gap * (taps - 1) - 1
        if not ceil_mode:
            return free // step + 1
        count = -(-free // step) + 1
        return count - 1 if (count - 1) * step >= length + pad else count

    return tuple(map(size, input_size, *map(_pair, (kernel_size, stride or kernel_size, padding, dilation))))


def max_unpool2d_output_size(
    input_size: Sequence[int], kernel_size: Pair, stride: Pair | None = None, padding: Pair = 0
) -> tuple[int, int]:
    """Size of the plane that a max pooling came from, if its windows fitted: H = (P - 1) stride - 2 padding + R."""

    def size(length, taps, step, pad):
        return (length - 1) * step - 2 * pad + taps

    return tuple(map(size, input_size, *map(_pair, (kernel_size, stride or kernel_size, padding))))


def _pair(value):
    return (value, value) if isinstance(value, int) else tuple(value)


def _window(p, taps, stride, dilation):
    """The rows (or columns) of the padded input that output row p sees: `taps` of them, `dilation` apart."""
    start = p * stride
    return slice(start, start + dilation * (taps - 1) + 1, dilation)


def _pool_window(p, taps, stride, padding, dilation, length):
    """The same in the unpadded input: those rows that lie in 0 .. length - 1, for padding takes no part in a maximum."""
    start = p * stride - padding
    return [h for h in range(start, start + dilation * taps, dilation) if 0 <= h < length]


def _adaptive_window(p, P, length):
    """Adaptive pooling cuts the rows into P windows: from floor(p H / P) to ceil((p + 1) H / P), the end excluded."""
    return slice(p * length // P, -(-(p + 1) * length // P))


# Convolution


def conv2d(
    input: Array,
    weight: Array,
    bias: Array | None = None,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
) -> Array:
    """Convolution: Z[n, k, p, q] = sum(A_slice * W[k]) + b[k].

    A_slice holds the C / groups channels that filter k sees: group g = k // (K / groups) reads the g-th part of the channels.
    (Strictly this is the cross-correlation: the filter is not flipped.)
    """
    (N, _, H, W), (K, group_channels, R, S) = input.shape, weight.shape
    (stride_h, stride_w), (dilation_h, dilation_w) = _pair(stride), _pair(dilation)
    P, Q = conv2d_output_size((H, W), (R, S), stride, padding, dilation)
    A = _pad(input, padding)
    output = np.zeros((N, K, P, Q), input.dtype)
    for n in range(N):
        for k in range(K):
            channels = _group_channels(k, K, group_channels, groups)
            for p in range(P):
                rows = _window(p, R, stride_h, dilation_h)
                for q in range(Q):
                    columns = _window(q, S, stride_w, dilation_w)
                    A_slice = A[n, channels, rows, columns]
                    output[n, k, p, q] = np.sum(A_slice * weight[k])
                    if bias is not None:
                        output[n, k, p, q] += bias[k]
    return output


def conv2d_backward(
    grad_output: Array, input: Array, weight: Array, stride: Pair = 1, padding: Pair = 0, dilation: Pair = 1, groups: int = 1
) -> tuple[Array, Array, Array]:
    """Gradients of the convolution, every output pixel in turn, dZ = grad_output[n, k, p, q]:

    dA_slice += W[k] * dZ,  dW[k] += A_slice * dZ,  db[k] += dZ.  Returns (grad_input, grad_weight, grad_bias).
    """
    (_, _, H, W), (K, group_channels, R, S) = input.shape, weight.shape
    (stride_h, stride_w), (dilation_h, dilation_w) = _pair(stride), _pair(dilation)
    N, _, P, Q = grad_output.shape
    A = _pad(input, padding)
    dA = np.zeros_like(A)
    grad_weight = np.zeros_like(weight)
    grad_bias = np.zeros(K, weight.dtype)
    for n in range(N):
        for k in range(K):
            channels = _group_channels(k, K, group_channels, groups)
            for p in range(P):
                rows = _window(p, R, stride_h, dilation_h)
                for q in range(Q):
                    columns = _window(q, S, stride_w, dilation_w)
                    dZ = grad_output[n, k, p, q]
                    dA[n, channels, rows, columns] += weight[k] * dZ
                    grad_weight[k] += A[n, channels, rows, columns] * dZ
                    grad_bias[k] += dZ
    padding_h, padding_w = _pair(padding)
    grad_input = dA[:, :, padding_h : padding_h + H, padding_w : padding_w + W]  # what fell on the padding is dropped
    return grad_input, grad_weight, grad_bias


def _pad(input, padding):
    padding_h, padding_w = _pair(padding)
    return np.pad(input, ((0, 0), (0, 0), (padding_h, padding_h), (padding_w, padding_w)))


def _group_channels(k, K, group_channels, groups):
    group = k // (K // groups)
    return slice(group * group_channels, (group + 1) * group_channels)


# Max and min pooling


def max_pool2d(
    input: Array, kernel_size: Pair, stride: Pair | None = None, padding: Pair = 0, dilation: Pair = 1, ceil_mode: bool = False
) -> tuple[Array, Array]:
    """Maximum of every window, and where it is: Z[n, c, p, q] = max(A_slice). Returns (output, indices).

    The index is h W + w, a position in the input plane. Among equals the first in row-major order wins; a NaN is greater than
    everything and the last NaN wins. Padding takes no part.
    """
    return _extreme_pool2d(input, operator.gt, kernel_size, stride, padding, dilation, ceil_mode)


def min_pool2d(
    input: Array, kernel_size: Pair, stride: Pair | None = None, padding: Pair = 0, dilation: Pair = 1, ceil_mode: bool = False
) -> tuple[Array, Array]:
    """Minimum of every window, and where it is: Z[n, c, p, q] = min(A_slice). Returns (output, indices).

    The rules are those of max_pool2d with the comparison turned around; a NaN wins here too. It is not -max(-A): -A does not
    exist for unsigned integers, nor for the smallest signed one.
    """
    return _extreme_pool2d(input, operator.lt, kernel_size, stride, padding, dilation, ceil_mode)


def _extreme_pool2d(input, beats, kernel_size, stride, padding, dilation, ceil_mode):
    (N, C, H, W), (R, S) = input.shape, _pair(kernel_size)
    (stride_h, stride_w), (padding_h, padding_w) = _pair(stride or kernel_size), _pair(padding)
    dilation_h, dilation_w = _pair(dilation)
    P, Q = pool2d_output_size((H, W), kernel_size, stride, padding, dilation, ceil_mode)
    output = np.zeros((N, C, P, Q), input.dtype)
    indices = np.zeros((N, C, P, Q), np.int64)
    for n in range(N):
        for c in range(C):
            for p in range(P):
                rows = _pool_window(p, R, stride_h, padding_h, dilation_h, H)
                for q in range(Q):
                    columns = _pool_window(q, S, stride_w, padding_w, dilation_w, W)
                    best_h, best_w = rows[0], columns[0]
                    for h in rows:
                        for w in columns:
                            value = input[n, c, h, w]
                            is_nan = value != value
                            if beats(value, input[n, c, best_h, best_w]) or is_nan:
                                best_h, best_w = h, w
                    output[n, c, p, q] = input[n, c, best_h, best_w]
                    indices[n, c, p, q] = best_h * W + best_w
    return output, indices


def max_pool2d_backward(grad_output: Array, indices: Array, input_size: Sequence[int]) -> Array:
    """Gradient of max and min pooling: dA[n, c, indices[n, c, p, q]] += dZ[n, c, p, q], to the chosen pixel only.

    input_size is (H, W). Windows that overlap may choose the same pixel: their gradients add up.
    """
    N, C, P, Q = grad_output.shape
    H, W = input_size
    grad_input = np.zeros((N, C, H, W), grad_output.dtype)
    for n in range(N):
        for c in range(C):
            for p in range(P):
                for q in range(Q):
                    index = indices[n, c, p, q]
                    grad_input[n, c, index // W, index % W] += grad_output[n, c, p, q]
    return grad_input


def max_unpool2d(input: Array, indices: Array, output_size: Sequence[int]) -> Array:
    """Puts every value back where its maximum came from: output[n, c, indices[n, c, p, q]] = input[n, c, p, q], zero elsewhere.

    output_size is (H, W). When an index occurs twice the last value in row-major order stays.
    """
    N, C, P, Q = input.shape
    H, W = output_size
    output = np.zeros((N, C, H, W), input.dtype)
    for n in range(N):
        for c in range(C):
            for p in range(P):
                for q in range(Q):
                    index = indices[n, c, p, q]
                    output[n, c, index // W, index % W] = input[n, c, p, q]
    return output


def max_unpool2d_backward(grad_output: Array, indices: Array) -> Array:
    """Gradient of max unpooling: grad_input[n, c, p, q] = grad_output[n, c, indices[n, c, p, q]]."""
    N, C, P, Q = indices.shape
    W = grad_output.shape[3]
    grad_input = np.zeros((N, C, P, Q), grad_output.dtype)
    for n in range(N):
        for c in range(C):
            for p in range(P):
                for q in range(Q):
                    index = indices[n, c, p, q]
                    grad_input[n, c, p, q] = grad_output[n, c, index // W, index % W]
    return grad_input


# Average pooling


def avg_pool2d(
    input: Array,
    kernel_size: Pair,
    stride: Pair | None = None,
    padding: Pair = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Array:
    """Average of every window: Z[n, c, p, q] = sum(A_slice) / divisor.

    The divisor is divisor_override if given; else the number of pixels of the window, those of the padding included
    (count_include_pad) or not. The part of a ceil_mode window beyond the padding never counts.
    """
    (N, C, H, W), (P, Q) = (
        input.shape,
        pool2d_output_size(input.shape[2:], kernel_size, stride, padding, 1, ceil_mode),
    )
    output = np.zeros((N, C, P, Q), input.dtype)
    for p in range(P):
        for q in range(Q):
            rows, columns, divisor = _avg_window(p, q, H, W, kernel_size, stride, padding, count_include_pad, divisor_override)
            for n in range(N):
                for c in range(C):
                    output[n, c, p, q] = np.sum(input[n, c, rows, columns]) / divisor
    return output


def avg_pool2d_backward(
    grad_output: Array,
    input_size: Sequence[int],
    kernel_size: Pair,
    stride: Pair | None = None,
    padding: Pair = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Array:
    """Gradient of average pooling: dA_slice += dZ[n, c, p, q] / divisor, spread evenly. input_size is (H, W)."""
    (N, C, P, Q), (H, W) = grad_output.shape, input_size
    grad_input = np.zeros((N, C, H, W), grad_output.dtype)
    for p in range(P):
        for q in range(Q):
            rows, columns, divisor = _avg_window(p, q, H, W, kernel_size, stride, padding, count_include_pad, divisor_override)
            for n in range(N):
                for c in range(C):
                    grad_input[n, c, rows, columns] += grad_output[n, c, p, q] / divisor
    return grad_input


def _avg_window(p, q, H, W, kernel_size, stride, padding, count_include_pad, divisor_override):
    """Rows and columns of the input under window (p, q), and what their sum is divided by."""
    (R, S), (stride_h, stride_w) = _pair(kernel_size), _pair(stride or kernel_size)
    padding_h, padding_w = _pair(padding)
    top, left = p * stride_h - padding_h, q * stride_w - padding_w
    bottom, right = min(top + R, H + padding_h), min(left + S, W + padding_w)
    rows, columns = slice(max(top, 0), min(bottom, H)), slice(max(left, 0), min(right, W))
    if divisor_override is not None:
        divisor = divisor_override
    elif count_include_pad:
        divisor = (bottom - top) * (right - left)
    else:
        divisor = (rows.stop - rows.start) * (columns.stop - columns.start)
    return rows, columns, divisor


# Adaptive and global pooling


def adaptive_avg_pool2d(input: Array, output_size: Pair) -> Array:
    """Average of each of P x Q windows that cover the input: Z[n, c, p, q] = mean(A_slice)."""
    (N, C, H, W), (P, Q) = input.shape, _pair(output_size)
    output = np.zeros((N, C, P, Q), input.dtype)
    for n in range(N):
        for c in range(C):
            for p in range(P):
                for q in range(Q):
                    A_slice = input[n, c, _adaptive_window(p, P, H), _adaptive_window(q, Q, W)]
                    output[n, c, p, q] = np.sum(A_slice) / A_slice.size
    return output


def adaptive_avg_pool2d_backward(grad_output: Array, input_size: Sequence[int]) -> Array:
    """Gradient of adaptive average pooling: dA_slice += dZ[n, c, p, q] / size of the window. input_size is (H, W)."""
    (N, C, P, Q), (H, W) = grad_output.shape, input_size
    grad_input = np.zeros((N, C, H, W), grad_output.dtype)
    for n in range(N):
        for c in range(C):
            for p in range(P):
                for q in range(Q):
                    dA_slice = grad_input[n, c, _adaptive_window(p, P, H), _adaptive_window(q, Q, W)]
                    dA_slice += grad_output[n, c, p, q] / dA_slice.size
    return grad_input


def adaptive_max_pool2d(input: Array, output_size: Pair) -> tuple[Array, Array]:
    """Maximum of each of P x Q windows that cover the input, and its index h W + w; ties and NaN as in max_pool2d.

    Its gradient is max_pool2d_backward.
    """
    (N, C, H, W), (P, Q) = input.shape, _pair(output_size)
    output = np.zeros((N, C, P, Q), input.dtype)
    indices = np.zeros((N, C, P, Q), np.int64)
    for n in range(N):
        for c in range(C):
            for p in range(P):
                rows = _adaptive_window(p, P, H)
                for q in range(Q):
                    columns = _adaptive_window(q, Q, W)
                    # One window is a pooling whose kernel is the whole slice.
                    A_slice = input[n : n + 1, c : c + 1, rows, columns]
                    best, index = max_pool2d(A_slice, A_slice.shape[2:])
                    h, w = divmod(index.item(), A_slice.shape[3])
                    output[n, c, p, q] = best.item()
                    indices[n, c, p, q] = (rows.start + h) * W + columns.start + w
    return output, indices


def global_avg_pool2d(input: Array) -> Array:
    """Average of every plane, N x C x 1 x 1: adaptive average pooling to one pixel."""
    return adaptive_avg_pool2d(input, 1)


def global_max_pool2d(input: Array) -> Array:
    """Maximum of every plane, N x C x 1 x 1: adaptive max pooling to one pixel."""
    return adaptive_max_pool2d(input, 1)[0]
