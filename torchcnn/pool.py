"""Pooling: the public functions and the modules. What autograd, compile and vmap have to know stands in _pool_rules.py."""

from collections.abc import Sequence
from typing import Any, Literal, overload

import torch

from torchcnn import _C, _pool_rules
from torchcnn._arguments import (
    FLOATING_DTYPES,
    INTEGER_DTYPES,
    Pair,
    batched,
    check_dtype,
    check_tensors,
    integer,
    overridable,
    pair,
    stride_or_kernel,
)

OutputSize = int | Sequence[int | None] | None  # None in a pair keeps the size of the input


def _window(op, kernel_size, stride, padding, dilation=1):
    """The eight ints of a sliding window as the operators take them."""
    kernel = pair(op, "kernel_size", kernel_size)
    stride = stride_or_kernel(op, stride, kernel)
    return *kernel, *stride, *pair(op, "padding", padding), *pair(op, "dilation", dilation)


def _extremum(op, alone, with_indices, input, arguments, dtypes, return_indices):
    check_tensors(op, input=input)
    check_dtype(op, input.dtype, dtypes)
    input, unbatched = batched(op, "input", input)
    if not return_indices:
        output = alone(input, *arguments)
        return output.squeeze(0) if unbatched else output
    output, indices = with_indices(input, *arguments)
    return (output.squeeze(0), indices.squeeze(0)) if unbatched else (output, indices)


@overload
def max_pool2d(
    input: torch.Tensor,
    kernel_size: Pair,
    stride: Pair | None = ...,
    padding: Pair = ...,
    dilation: Pair = ...,
    ceil_mode: bool = ...,
    return_indices: Literal[False] = ...,
) -> torch.Tensor: ...
@overload
def max_pool2d(
    input: torch.Tensor,
    kernel_size: Pair,
    stride: Pair | None = ...,
    padding: Pair = ...,
    dilation: Pair = ...,
    ceil_mode: bool = ...,
    *,
    return_indices: Literal[True],
) -> tuple[torch.Tensor, torch.Tensor]: ...
@overload
def max_pool2d(
    input: torch.Tensor,
    kernel_size: Pair,
    stride: Pair | None = ...,
    padding: Pair = ...,
    dilation: Pair = ...,
    ceil_mode: bool = ...,
    return_indices: bool = ...,
) -> Any: ...
@overridable
def max_pool2d(
    input: torch.Tensor,
    kernel_size: Pair,
    stride: Pair | None = None,
    padding: Pair = 0,
    dilation: Pair = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """Largest value of each window.

    Equivalent to: ``torch.nn.functional.max_pool2d(input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)``

    Args:
        input: (N, C, H, W), or (C, H, W) without a batch; float32, float64, bfloat16, float16, uint8 or int8 to int64.
        kernel_size, stride, padding, dilation: an int or a (height, width) pair, in pixels; `stride` defaults to
            `kernel_size`, `padding` is at most half of the dilated kernel and never the maximum.
        ceil_mode: round the output size up, as long as the last window starts inside the input or its left padding.
        return_indices: also return where each maximum stands.

    Returns:
        (N, C, P, Q) in the layout of the input; with `return_indices` a pair of it and an int64 tensor of h * W + w. Of equal
        maxima the first in row-major order counts; a NaN beats every number, and the last NaN of a window counts.
        Differentiable to any order in input. For backward is kept, and not the input: one byte an output element (an offset
        into the window; 4 bytes for windows of more than 256 elements), or with `return_indices` the indices, 8 bytes each.

    Raises:
        RuntimeError: sizes that do not fit each other, or padding above half the kernel.
        NotImplementedError: any other dtype.
        TypeError: an argument of the wrong kind.

    Numerics: exact, the same bits for any number of threads.

    Source: LeCun et al., "Gradient-based learning applied to document recognition", 1998, section II.A (subsampling);
    Scherer, Müller and Behnke, 2010, section 3 (maximum instead of average).
    """
    window = _window("max_pool2d", kernel_size, stride, padding, dilation)
    return _extremum(
        "max_pool2d",
        _pool_rules.max_pool2d,
        _pool_rules.max_pool2d_with_indices,
        input,
        (*window, bool(ceil_mode)),
        FLOATING_DTYPES | INTEGER_DTYPES,
        return_indices,
    )


@overload
def min_pool2d(
    input: torch.Tensor,
    kernel_size: Pair,
    stride: Pair | None = ...,
    padding: Pair = ...,
    dilation: Pair = ...,
    ceil_mode: bool = ...,
    return_indices: Literal[False] = ...,
) -> torch.Tensor: ...
@overload
def min_pool2d(
    input: torch.Tensor,
    kernel_size: Pair,
    stride: Pair | None = ...,
    padding: Pair = ...,
    dilation: Pair = ...,
    ceil_mode: bool = ...,
    *,
    return_indices: Literal[True],
) -> tuple[torch.Tensor, torch.Tensor]: ...
@overload
def min_pool2d(
    input: torch.Tensor,
    kernel_size: Pair,
    stride: Pair | None = ...,
    padding: Pair = ...,
    dilation: Pair = ...,
    ceil_mode: bool = ...,
    return_indices: bool = ...,
) -> Any: ...
@overridable
def min_pool2d(
    input: torch.Tensor,
    kernel_size: Pair,
    stride: Pair | None = None,
    padding: Pair = 0,
    dilation: Pair = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """Smallest value of each window.

    Equivalent to: ``-torch.nn.functional.max_pool2d(-input, ...)`` for floating-point input; integers compare as they are, so
    that uint8 and the least int work too.

    Arguments, results, errors and numerics are those of `max_pool2d`.
    """
    window = _window("min_pool2d", kernel_size, stride, padding, dilation)
    return _extremum(
        "min_pool2d",
        _pool_rules.min_pool2d,
        _pool_rules.min_pool2d_with_indices,
        input,
        (*window, bool(ceil_mode)),
        FLOATING_DTYPES | INTEGER_DTYPES,
        return_indices,
    )


@overridable
def relu_max_pool2d(
    input: torch.Tensor,
    kernel_size: Pair,
    stride: Pair | None = None,
    padding: Pair = 0,
    dilation: Pair = 1,
    ceil_mode: bool = False,
) -> torch.Tensor:
    """The larger of 0 and the largest value of each window, in one pass over the input, and one backward.

    Equivalent to: ``torch.nn.functional.max_pool2d(torch.relu(input), kernel_size, stride, padding, dilation, ceil_mode)``

    Args:
        input: (N, C, H, W), or (C, H, W) without a batch; float32, float64, bfloat16 or float16.
        kernel_size, stride, padding, dilation, ceil_mode: as in `max_pool2d`.

    Returns:
        (N, C, P, Q) in the layout of the input. Differentiable to any order in input, with the gradient of ``torch.relu``: none
        where the output is 0. For backward one byte an output element is kept (4 for windows of more than 255 elements), neither
        the input nor what relu makes of it.

    Errors and numerics are those of `max_pool2d`; a NaN stays NaN.

    Source: Nair and Hinton, "Rectified linear units improve restricted Boltzmann machines", 2010, section 2; see `max_pool2d`.
    """
    op = "relu_max_pool2d"
    check_tensors(op, input=input)
    check_dtype(op, input.dtype, FLOATING_DTYPES)
    input, unbatched = batched(op, "input", input)
    output = _pool_rules.relu_max_pool2d(input, *_window(op, kernel_size, stride, padding, dilation), bool(ceil_mode))
    return output.squeeze(0) if unbatched else output


@overridable
def avg_pool2d(
    input: torch.Tensor,
    kernel_size: Pair,
    stride: Pair | None = None,
    padding: Pair = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> torch.Tensor:
    """Mean of each window.

    Equivalent to: ``torch.nn.functional.avg_pool2d`` with the same arguments.

    Args:
        input: (N, C, H, W), or (C, H, W) without a batch; float32, float64, bfloat16, float16 or int64 (rounded to zero).
        kernel_size, stride, padding, ceil_mode: as in `max_pool2d`; padding holds zeros.
        count_include_pad: divide by the whole window, padding included, or by the part of it inside the input.
        divisor_override: divide by this instead.

    Returns:
        (N, C, P, Q) in the layout of the input. Differentiable to any order in input; backward keeps no tensor.

    Raises:
        RuntimeError: sizes that do not fit each other, padding above half the kernel, a zero divisor.
        NotImplementedError: any other dtype.
        TypeError: an argument of the wrong kind.

    Numerics: sums are in the dtype of the input (float32 for bfloat16 and float16) in a fixed order: the same bits for any
    number of threads.

    Source: LeCun et al., "Gradient-based learning applied to document recognition", 1998, section II.A (subsampling).
    """
    op = "avg_pool2d"
    check_tensors(op, input=input)
    check_dtype(op, input.dtype, FLOATING_DTYPES | {torch.int64})
    input, unbatched = batched(op, "input", input)
    window = _window(op, kernel_size, stride, padding)[:6]
    if divisor_override is not None:
        divisor_override = integer(op, "divisor_override", divisor_override)
    output = _pool_rules.avg_pool2d(input, *window, bool(ceil_mode), bool(count_include_pad), divisor_override)
    return output.squeeze(0) if unbatched else output


def _adaptive_size(op, output_size, input):
    """(P, Q); None in the place of one stands for the size of the input."""
    if type(output_size) is int:
        return output_size, output_size
    if output_size is None:
        raise TypeError(f"{op}: output_size must be an int or a pair of ints, got None")
    sizes = output_size if isinstance(output_size, (tuple, list)) else (output_size, output_size)
    if len(sizes) == 1:
        sizes = (*sizes, *sizes)
    if len(sizes) != 2:
        raise RuntimeError(f"{op}: output_size must be an int or a pair of ints, got {len(sizes)} values: {output_size!r}")
    return tuple(
        given if size is None else integer(op, "output_size", size) for size, given in zip(sizes, input.shape[2:], strict=True)
    )


def _sliding_window(size: tuple[int, ...], output_size: tuple[int, ...]) -> tuple[int, ...] | None:
    """The eight ints of the sliding windows that adaptive ones are, or None where these differ in size or distance.

    With H = P stride + rest all windows are stride apart and stride + rest long if rest is 0 or 1 (csrc/cpu/pool2d.h).
    """
    (H, W), (P, Q) = size, output_size
    if not type(H) is type(W) is type(P) is type(Q) is int:
        return None
    if not (0 < P <= H and 0 < Q <= W and H % P <= 1 and W % Q <= 1):
        return None
    return H // P + H % P, W // Q + W % Q, H // P, W // Q, 0, 0, 1, 1


@overridable
def adaptive_avg_pool2d(input: torch.Tensor, output_size: OutputSize) -> torch.Tensor:
    """Mean of each of P x Q windows that together cover the input, whatever its size.

    Equivalent to: ``torch.nn.functional.adaptive_avg_pool2d(input, output_size)``

    Window p covers the rows floor(p H / P) to ceil((p + 1) H / P) - 1, and likewise the columns.

    Args:
        input: (N, C, H, W), or (C, H, W) without a batch; float32, float64, bfloat16 or float16.
        output_size: an int or a pair (P, Q); None in the place of one keeps the size of the input.

    Returns:
        (N, C, P, Q) in the layout of the input. Differentiable to any order in input; backward keeps no tensor.

    Raises:
        RuntimeError: a negative size or an empty plane. NotImplementedError: any other dtype.

    Numerics: as `avg_pool2d`.

    Source: He et al., "Spatial pyramid pooling in deep convolutional networks", 2014, section 2.2 (windows from the size).
    """
    op = "adaptive_avg_pool2d"
    check_tensors(op, input=input)
    check_dtype(op, input.dtype, FLOATING_DTYPES)
    input, unbatched = batched(op, "input", input)
    output = _pool_rules.adaptive_avg_pool2d(input, *_adaptive_size(op, output_size, input))
    return output.squeeze(0) if unbatched else output


@overload
def adaptive_max_pool2d(input: torch.Tensor, output_size: OutputSize, return_indices: Literal[False] = ...) -> torch.Tensor: ...
@overload
def adaptive_max_pool2d(
    input: torch.Tensor, output_size: OutputSize, return_indices: Literal[True]
) -> tuple[torch.Tensor, torch.Tensor]: ...
@overload
def adaptive_max_pool2d(input: torch.Tensor, output_size: OutputSize, return_indices: bool = ...) -> Any: ...
@overridable
def adaptive_max_pool2d(input: torch.Tensor, output_size: OutputSize, return_indices: bool = False) -> Any:
    """Largest value of each of P x Q windows that together cover the input, whatever its size.

    Equivalent to: ``torch.nn.functional.adaptive_max_pool2d(input, output_size, return_indices)``

    Windows are those of `adaptive_avg_pool2d`; ties, NaN, indices and numerics those of `max_pool2d`. Dtypes: float32,
    float64, bfloat16 and float16. For backward is kept what `max_pool2d` keeps where all windows have the same size and distance
    (H mod P and W mod Q are 0 or 1), else the indices, 8 bytes an output element; never the input.
    """
    op = "adaptive_max_pool2d"
    check_tensors(op, input=input)
    check_dtype(op, input.dtype, FLOATING_DTYPES)
    input, unbatched = batched(op, "input", input)
    size = _adaptive_size(op, output_size, input)
    if return_indices:
        output, indices = _pool_rules.adaptive_max_pool2d_with_indices(input, *size)
        return (output.squeeze(0), indices.squeeze(0)) if unbatched else (output, indices)
    # The operator for adaptive windows itself refuses input without channels, so that the message names it.
    plain = input.shape[1] != 0 and not torch.compiler.is_compiling()
    window = _sliding_window(input.shape[2:], size) if plain else None
    output = _pool_rules.adaptive_max_pool2d(input, *size) if window is None else _pool_rules.max_pool2d(input, *window, False)
    return output.squeeze(0) if unbatched else output


@overridable
def global_avg_pool2d(input: torch.Tensor) -> torch.Tensor:
    """Mean of each channel.

    Equivalent to: ``torch.nn.functional.adaptive_avg_pool2d(input, 1)``

    Returns:
        (N, C, 1, 1), or (C, 1, 1) without a batch.

    Source: Lin, Chen and Yan, "Network in network", 2013, section 3.2.
    """
    return adaptive_avg_pool2d(input, 1)


@overridable
def global_max_pool2d(input: torch.Tensor) -> torch.Tensor:
    """Largest value of each channel.

    Equivalent to: ``torch.nn.functional.adaptive_max_pool2d(input, 1)``

    Returns:
        (N, C, 1, 1), or (C, 1, 1) without a batch.
    """
    return adaptive_max_pool2d(input, 1)


@overridable
def max_unpool2d(
    input: torch.Tensor,
    indices: torch.Tensor,
    kernel_size: Pair,
    stride: Pair | None = None,
    padding: Pair = 0,
    output_size: Sequence[int] | None = None,
) -> torch.Tensor:
    """The partial inverse of `max_pool2d`: values go back to where the maxima stood, zero elsewhere.

    Equivalent to: ``torch.nn.functional.max_unpool2d(input, indices, kernel_size, stride, padding, output_size)``

    Args:
        input: (N, C, P, Q), or (C, P, Q) without a batch; float32, float64, bfloat16 or float16.
        indices: int64, the shape of input, as `max_pool2d` returns them. Of equal indices the last in row-major order counts.
        kernel_size, stride, padding: those of the pool; they give the size (P - 1) stride - 2 padding + kernel.
        output_size: the size instead, where the pool rounded; at most one stride away from it, exclusive.

    Returns:
        (N, C, H, W) in the layout of the input. Differentiable to any order in input.

    Raises:
        RuntimeError: an index outside the plane, shapes that differ, indices that are not int64.
        ValueError: an `output_size` that such a pool cannot have had.
        NotImplementedError: any other dtype.

    Source: Zeiler and Fergus, "Visualizing and understanding convolutional networks", 2014, section 2.1.
    """
    op = "max_unpool2d"
    check_tensors(op, input=input, indices=indices)
    check_dtype(op, input.dtype, FLOATING_DTYPES)
    kernel = pair(op, "kernel_size", kernel_size)
    strides = stride_or_kernel(op, stride, kernel)
    pad = pair(op, "padding", padding)
    if indices.shape != input.shape:
        raise RuntimeError(f"{op}: indices must have the shape of input, got {list(indices.shape)} and {list(input.shape)}")
    input, unbatched = batched(op, "input", input)
    if min(strides) < 1:
        raise RuntimeError(f"{op}: stride must be at least 1, got {strides}")
    if min(input.shape[1:]) < 1:
        raise RuntimeError(f"{op}: input must have non-empty channels, height and width, got {list(input.shape)}")
    default = tuple((size - 1) * s - 2 * p + k for size, s, p, k in zip(input.shape[2:], strides, pad, kernel, strict=True))
    size = default if output_size is None else _unpool_size(op, output_size, default, strides)
    if min(size) < 1:
        raise RuntimeError(f"{op}: output size must be at least 1, got {size[0]} x {size[1]}")
    output = _pool_rules.max_unpool2d(input, indices.unsqueeze(0) if unbatched else indices, *size)
    return output.squeeze(0) if unbatched else output


def _unpool_size(op, output_size, default, stride):
    size = tuple(integer(op, "output_size", s) for s in output_size)
    if len(size) == 4:
        size = size[-2:]  # a whole shape is accepted as well
    if len(size) != 2:
        raise ValueError(f"{op}: output_size must have 2 elements, or be a whole shape, got {len(size)}: {output_size}")
    for given, expected, s in zip(size, default, stride, strict=True):
        if not expected - s < given < expected + s:
            raise ValueError(f"{op}: output_size must be above {expected - s} and below {expected + s}, got {given} in {size}")
    return size


def pool2d_output_size(
    input_size: Pair,
    kernel_size: Pair,
    stride: Pair | None = None,
    padding: Pair = 0,
    dilation: Pair = 1,
    ceil_mode: bool = False,
) -> tuple[int, int]:
    """Height and width (P, Q) of the output of a pool.

    Equivalent to: ``tuple(torch.nn.functional.max_pool2d(input, kernel_size, stride, padding, dilation, ceil_mode).shape[2:])``

    Args:
        input_size, kernel_size: (H, W) and (R, S), or an int for a square.
        stride, padding, dilation, ceil_mode: as in `max_pool2d`.

    Raises:
        ValueError: a size below 1, or a kernel that does not fit into the padded input.
    """
    op = "pool2d_output_size"
    window = _window(op, kernel_size, stride, padding, dilation)
    kernel, stride, pad, dilation = (window[i : i + 2] for i in (0, 2, 4, 6))
    size = pair(op, "input_size", input_size)
    return _C.sliding_output_size(op, size, kernel, stride, pad, dilation, bool(ceil_mode), True)


# ------------------------------------------------------------------------------------------------------------------ modules


class MaxPool2d(torch.nn.MaxPool2d):
    """Max pooling layer; see `max_pool2d`. Equivalent to: ``torch.nn.MaxPool2d`` with the same arguments."""

    def forward(self, input: torch.Tensor) -> Any:
        return max_pool2d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.ceil_mode,
            self.return_indices,
        )


class MinPool2d(torch.nn.modules.pooling._MaxPoolNd):
    """Min pooling layer; see `min_pool2d`. Arguments are those of ``torch.nn.MaxPool2d``."""

    def forward(self, input: torch.Tensor) -> Any:
        return min_pool2d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.ceil_mode,
            self.return_indices,
        )


class AvgPool2d(torch.nn.AvgPool2d):
    """Average pooling layer; see `avg_pool2d`. Equivalent to: ``torch.nn.AvgPool2d`` with the same arguments."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return avg_pool2d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.ceil_mode,
            self.count_include_pad,
            self.divisor_override,
        )


class AdaptiveAvgPool2d(torch.nn.AdaptiveAvgPool2d):
    """Adaptive average pooling layer; see `adaptive_avg_pool2d`. Equivalent to: ``torch.nn.AdaptiveAvgPool2d``."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return adaptive_avg_pool2d(input, self.output_size)


class AdaptiveMaxPool2d(torch.nn.AdaptiveMaxPool2d):
    """Adaptive max pooling layer; see `adaptive_max_pool2d`. Equivalent to: ``torch.nn.AdaptiveMaxPool2d``."""

    def forward(self, input: torch.Tensor) -> Any:
        return adaptive_max_pool2d(input, self.output_size, self.return_indices)


class GlobalAvgPool2d(torch.nn.Module):
    """Mean of each channel; see `global_avg_pool2d`. Equivalent to: ``torch.nn.AdaptiveAvgPool2d(1)``."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return global_avg_pool2d(input)


class GlobalMaxPool2d(torch.nn.Module):
    """Largest value of each channel; see `global_max_pool2d`. Equivalent to: ``torch.nn.AdaptiveMaxPool2d(1)``."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return global_max_pool2d(input)


class MaxUnpool2d(torch.nn.MaxUnpool2d):
    """Partial inverse of max pooling; see `max_unpool2d`. Equivalent to: ``torch.nn.MaxUnpool2d`` with the same arguments."""

    def forward(self, input: torch.Tensor, indices: torch.Tensor, output_size: Sequence[int] | None = None) -> torch.Tensor:
        return max_unpool2d(input, indices, self.kernel_size, self.stride, self.padding, output_size)
