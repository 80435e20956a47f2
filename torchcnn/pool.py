"""Pooling: the public functions, their derivatives, the autograd Functions and the modules.

Backward of an extreme (max, min, relu and max, adaptive max) needs to know where in its window it stands, and nothing else. An
operator comes in three forms, which compute the same output: ``max_pool2d`` writes no positions, ``max_pool2d_with_offsets``
small offsets r * S + s into the window, for backward, and ``max_pool2d_with_indices`` indices h * W + w into the plane, for
whoever asks for them. Backward adds the gradient at the positions, its derivative takes values from there again::

    max_pool2d                y = x[offsets]          d/dx: offset_pool2d_grad_input(g, offsets)
    offset_pool2d_grad_input  x'[offsets] += g        d/dg: offset_pool2d(v, offsets) = v[offsets]
    max_pool2d_with_indices   y = x[indices]          d/dx: max_pool2d_grad_input(g, indices)
    max_pool2d_grad_input     x'[indices] += g        d/dg: max_unpool2d_grad_input(v, indices) = v[indices]
    max_unpool2d              y[indices] = x          d/dx: max_unpool2d_grad_input(g, indices)

Averages are linear: the derivative of ``avg_pool2d`` is ``avg_pool2d_grad_input``, whose derivative is ``avg_pool2d``. The
schemas stand in csrc/pool2d.cpp.
"""

from collections.abc import Sequence
from typing import Any, Literal, overload

import torch

from torchcnn import _C
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
    sliding_output_size,
)
from torchcnn._autograd import (
    LIBRARY,
    attach,
    attach_first,
    autocast,
    empty_activation,
    fold_batch,
    is_channels_last,
    unfold_batch,
)

_ops = torch.ops.torchcnn

OutputSize = int | Sequence[int | None] | None  # None in a pair keeps the size of the input


# --------------------------------------------------------------------------------------------------- shapes without data


def _pooled_size(input, window, ceil_mode):
    kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w = window
    return (
        *input.shape[:2],
        sliding_output_size(input.shape[2], kernel_h, stride_h, pad_h, dilation_h, ceil_mode),
        sliding_output_size(input.shape[3], kernel_w, stride_w, pad_w, dilation_w, ceil_mode),
    )


def _offset_dtype(window, relu):
    """uint8 for windows of up to 256 elements (255 if one value must say that relu let none through), else int32."""
    return torch.uint8 if window[0] * window[1] <= (255 if relu else 256) else torch.int32


def _register_fakes(name, relu=False):
    def output_alone(input, *window_and_mode):
        return empty_activation(input, _pooled_size(input, window_and_mode[:8], window_and_mode[8]), is_channels_last(input))

    def with_positions(dtype_of):
        def both(input, *window_and_mode):
            output = output_alone(input, *window_and_mode)
            return output, empty_activation(input, output.shape, is_channels_last(input), dtype_of(window_and_mode))

        return both

    torch.library.register_fake(f"torchcnn::{name}", output_alone, lib=LIBRARY)
    with_offsets = with_positions(lambda window: _offset_dtype(window, relu))
    torch.library.register_fake(f"torchcnn::{name}_with_offsets", with_offsets, lib=LIBRARY)
    if not relu:
        with_indices = with_positions(lambda window: torch.int64)
        torch.library.register_fake(f"torchcnn::{name}_with_indices", with_indices, lib=LIBRARY)


_register_fakes("max_pool2d")
_register_fakes("min_pool2d")
_register_fakes("relu_max_pool2d", relu=True)


@torch.library.register_fake("torchcnn::adaptive_max_pool2d", lib=LIBRARY)
def _(input, P, Q):
    return empty_activation(input, (*input.shape[:2], P, Q), is_channels_last(input))


@torch.library.register_fake("torchcnn::adaptive_max_pool2d_with_indices", lib=LIBRARY)
def _(input, P, Q):
    channels_last = is_channels_last(input)
    sizes = (*input.shape[:2], P, Q)
    return empty_activation(input, sizes, channels_last), empty_activation(input, sizes, channels_last, torch.int64)


@torch.library.register_fake("torchcnn::offset_pool2d", lib=LIBRARY)
def _(input, offsets, *options):
    return empty_activation(input, offsets.shape, is_channels_last(offsets))


@torch.library.register_fake("torchcnn::offset_pool2d_grad_input", lib=LIBRARY)
def _(grad_output, offsets, H, W, *options):
    return empty_activation(grad_output, (*grad_output.shape[:2], H, W), options[-1])


@torch.library.register_fake("torchcnn::max_pool2d_grad_input", lib=LIBRARY)
def _(grad_output, indices, H, W, channels_last):
    return empty_activation(grad_output, (*grad_output.shape[:2], H, W), channels_last)


@torch.library.register_fake("torchcnn::max_unpool2d", lib=LIBRARY)
def _(input, indices, H, W):
    return empty_activation(input, (*input.shape[:2], H, W), is_channels_last(input))


@torch.library.register_fake("torchcnn::max_unpool2d_grad_input", lib=LIBRARY)
def _(grad_output, indices):
    return empty_activation(grad_output, indices.shape, is_channels_last(indices))


@torch.library.register_fake("torchcnn::avg_pool2d", lib=LIBRARY)
def _(
    input,
    kernel_h,
    kernel_w,
    stride_h,
    stride_w,
    pad_h,
    pad_w,
    ceil_mode,
    count_include_pad,
    divisor_override,
):
    window = (kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, 1, 1)
    return empty_activation(input, _pooled_size(input, window, ceil_mode), is_channels_last(input))


@torch.library.register_fake("torchcnn::avg_pool2d_grad_input", lib=LIBRARY)
def _(grad_output, H, W, *options):
    return empty_activation(grad_output, (*grad_output.shape[:2], H, W), options[-1])


@torch.library.register_fake("torchcnn::adaptive_avg_pool2d", lib=LIBRARY)
def _(input, P, Q):
    return empty_activation(input, (*input.shape[:2], P, Q), is_channels_last(input))


@torch.library.register_fake("torchcnn::adaptive_avg_pool2d_grad_input", lib=LIBRARY)
def _(grad_output, H, W, channels_last):
    return empty_activation(grad_output, (*grad_output.shape[:2], H, W), channels_last)


# ------------------------------------------------------------------------------------------------------------ derivatives


class _PositionsRule:
    """What the pools have in common that return positions beside their output."""

    op: Any

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, *ctx.options = inputs
        positions = output[1]
        ctx.mark_non_differentiable(positions)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(positions)
        ctx.save_for_forward(positions)
        ctx.size = input.shape[2:]
        ctx.channels_last = is_channels_last(input)

    @classmethod
    def vmap(cls, info, in_dims, input, *options):
        output, positions = cls.op(fold_batch(input, in_dims[0], info.batch_size), *options)
        return (unfold_batch(output, info.batch_size), unfold_batch(positions, info.batch_size)), (0, 0)


class _OffsetsRule(_PositionsRule):
    @staticmethod
    def backward(ctx, saved, needs, grad_output, _grad_offsets):
        if grad_output is None:
            return (None,)
        (offsets,) = saved
        return (_ops.offset_pool2d_grad_input.default(grad_output, offsets, *ctx.size, *ctx.options, ctx.channels_last),)

    @staticmethod
    def jvp(ctx, input_tangent, *_):
        (offsets,) = ctx.saved_tensors
        return _ops.offset_pool2d.default(input_tangent, offsets, *ctx.options), None


class _IndicesRule(_PositionsRule):
    @staticmethod
    def backward(ctx, saved, needs, grad_output, _grad_indices):
        if grad_output is None:
            return (None,)
        (indices,) = saved
        return (_ops.max_pool2d_grad_input.default(grad_output, indices, *ctx.size, ctx.channels_last),)

    @staticmethod
    def jvp(ctx, input_tangent, *_):
        (indices,) = ctx.saved_tensors
        return _ops.max_unpool2d_grad_input.default(input_tangent, indices), None


class _MaxPool2dRule(_OffsetsRule):
    op = _ops.max_pool2d_with_offsets.default


class _MinPool2dRule(_OffsetsRule):
    op = _ops.min_pool2d_with_offsets.default


class _ReluMaxPool2dRule(_OffsetsRule):
    op = _ops.relu_max_pool2d_with_offsets.default


class _MaxPool2dWithIndicesRule(_IndicesRule):
    op = _ops.max_pool2d_with_indices.default


class _MinPool2dWithIndicesRule(_IndicesRule):
    op = _ops.min_pool2d_with_indices.default


class _AdaptiveMaxPool2dRule(_IndicesRule):
    op = _ops.adaptive_max_pool2d_with_indices.default


class _OffsetPool2dRule:
    op = _ops.offset_pool2d.default

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, offsets, *ctx.options = inputs
        ctx.save_for_backward(offsets)
        ctx.save_for_forward(offsets)
        ctx.size = input.shape[2:]
        ctx.channels_last = is_channels_last(input)

    @staticmethod
    def backward(ctx, saved, needs, v):
        (offsets,) = saved
        return (_ops.offset_pool2d_grad_input.default(v, offsets, *ctx.size, *ctx.options, ctx.channels_last),)

    @staticmethod
    def jvp(ctx, input_tangent, *_):
        (offsets,) = ctx.saved_tensors
        return _ops.offset_pool2d.default(input_tangent, offsets, *ctx.options)

    @staticmethod
    def vmap(info, in_dims, input, offsets, *options):
        folded = (fold_batch(x, dim, info.batch_size) for x, dim in zip((input, offsets), in_dims, strict=False))
        return unfold_batch(_ops.offset_pool2d.default(*folded, *options), info.batch_size), 0


class _OffsetPool2dGradInputRule:
    op = _ops.offset_pool2d_grad_input.default

    @staticmethod
    def setup_context(ctx, inputs, output):
        _grad_output, offsets, *ctx.options = inputs
        ctx.save_for_backward(offsets)
        ctx.save_for_forward(offsets)

    @staticmethod
    def backward(ctx, saved, needs, v):
        (offsets,) = saved
        return (_ops.offset_pool2d.default(v, offsets, *ctx.options[2:-1]),)

    @staticmethod
    def jvp(ctx, grad_output_tangent, *_):
        (offsets,) = ctx.saved_tensors
        return _ops.offset_pool2d_grad_input.default(grad_output_tangent, offsets, *ctx.options)

    @staticmethod
    def vmap(info, in_dims, grad_output, offsets, *options):
        folded = (fold_batch(x, dim, info.batch_size) for x, dim in zip((grad_output, offsets), in_dims, strict=False))
        return unfold_batch(_ops.offset_pool2d_grad_input.default(*folded, *options), info.batch_size), 0


class _MaxPool2dGradInputRule:
    op = _ops.max_pool2d_grad_input.default

    @staticmethod
    def setup_context(ctx, inputs, output):
        _grad_output, indices, *ctx.options = inputs
        ctx.save_for_backward(indices)
        ctx.save_for_forward(indices)

    @staticmethod
    def backward(ctx, saved, needs, v):
        (indices,) = saved
        return (_ops.max_unpool2d_grad_input.default(v, indices),)

    @staticmethod
    def jvp(ctx, grad_output_tangent, *_):
        (indices,) = ctx.saved_tensors
        return _ops.max_pool2d_grad_input.default(grad_output_tangent, indices, *ctx.options)

    @staticmethod
    def vmap(info, in_dims, grad_output, indices, *options):
        folded = (fold_batch(x, dim, info.batch_size) for x, dim in zip((grad_output, indices), in_dims, strict=False))
        return unfold_batch(_ops.max_pool2d_grad_input.default(*folded, *options), info.batch_size), 0


class _MaxUnpool2dRule:
    op = _ops.max_unpool2d.default

    @staticmethod
    def setup_context(ctx, inputs, output):
        _input, indices, *ctx.size = inputs
        ctx.save_for_backward(indices)
        ctx.save_for_forward(indices)

    @staticmethod
    def backward(ctx, saved, needs, grad_output):
        (indices,) = saved
        return (_ops.max_unpool2d_grad_input.default(grad_output, indices),)

    @staticmethod
    def jvp(ctx, input_tangent, *_):
        (indices,) = ctx.saved_tensors
        return _ops.max_unpool2d.default(input_tangent, indices, *ctx.size)

    @staticmethod
    def vmap(info, in_dims, input, indices, *size):
        folded = (fold_batch(x, dim, info.batch_size) for x, dim in zip((input, indices), in_dims, strict=False))
        return unfold_batch(_ops.max_unpool2d.default(*folded, *size), info.batch_size), 0


class _MaxUnpool2dGradInputRule:
    op = _ops.max_unpool2d_grad_input.default

    @staticmethod
    def setup_context(ctx, inputs, output):
        grad_output, indices = inputs
        ctx.save_for_backward(indices)
        ctx.save_for_forward(indices)
        ctx.size = grad_output.shape[2:]
        ctx.channels_last = is_channels_last(grad_output)

    @staticmethod
    def backward(ctx, saved, needs, v):
        (indices,) = saved
        return (_ops.max_pool2d_grad_input.default(v, indices, *ctx.size, ctx.channels_last),)

    @staticmethod
    def jvp(ctx, grad_output_tangent, *_):
        (indices,) = ctx.saved_tensors
        return _ops.max_unpool2d_grad_input.default(grad_output_tangent, indices)

    @staticmethod
    def vmap(info, in_dims, grad_output, indices):
        folded = (fold_batch(x, dim, info.batch_size) for x, dim in zip((grad_output, indices), in_dims, strict=True))
        return unfold_batch(_ops.max_unpool2d_grad_input.default(*folded), info.batch_size), 0


class _LinearPoolRule:
    """A pool that is linear in its input: jvp and vmap are the operator itself."""

    op: Any

    @classmethod
    def jvp(cls, ctx, tangent, *_):
        return cls.op(tangent, *ctx.options)

    @classmethod
    def vmap(cls, info, in_dims, tensor, *options):
        return unfold_batch(cls.op(fold_batch(tensor, in_dims[0], info.batch_size), *options), info.batch_size), 0


class _AvgPool2dRule(_LinearPoolRule):
    op = _ops.avg_pool2d.default

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, *ctx.options = inputs
        ctx.size = input.shape[2:]
        ctx.channels_last = is_channels_last(input)

    @staticmethod
    def backward(ctx, saved, needs, grad_output):
        return (_ops.avg_pool2d_grad_input.default(grad_output, *ctx.size, *ctx.options, ctx.channels_last),)


class _AvgPool2dGradInputRule(_LinearPoolRule):
    op = _ops.avg_pool2d_grad_input.default

    @staticmethod
    def setup_context(ctx, inputs, output):
        _grad_output, *ctx.options = inputs

    @staticmethod
    def backward(ctx, saved, needs, v):
        return (_ops.avg_pool2d.default(v, *ctx.options[2:-1]),)


class _AdaptiveAvgPool2dRule(_LinearPoolRule):
    op = _ops.adaptive_avg_pool2d.default

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, *ctx.options = inputs
        ctx.size = input.shape[2:]
        ctx.channels_last = is_channels_last(input)

    @staticmethod
    def backward(ctx, saved, needs, grad_output):
        return (_ops.adaptive_avg_pool2d_grad_input.default(grad_output, *ctx.size, ctx.channels_last),)


class _AdaptiveAvgPool2dGradInputRule(_LinearPoolRule):
    op = _ops.adaptive_avg_pool2d_grad_input.default

    @staticmethod
    def setup_context(ctx, inputs, output):
        grad_output, *ctx.options = inputs
        ctx.output_size = grad_output.shape[2:]

    @staticmethod
    def backward(ctx, saved, needs, v):
        return (_ops.adaptive_avg_pool2d.default(v, *ctx.output_size),)


_max_pool2d_with_indices, _min_pool2d_with_indices, _adaptive_max_pool2d_with_indices = map(
    attach, (_MaxPool2dWithIndicesRule, _MinPool2dWithIndicesRule, _AdaptiveMaxPool2dRule)
)
_max_pool2d = attach_first(_ops.max_pool2d.default, attach(_MaxPool2dRule))
_min_pool2d = attach_first(_ops.min_pool2d.default, attach(_MinPool2dRule))
_relu_max_pool2d = attach_first(_ops.relu_max_pool2d.default, attach(_ReluMaxPool2dRule))
_adaptive_max_pool2d = attach_first(_ops.adaptive_max_pool2d.default, _adaptive_max_pool2d_with_indices)
_max_unpool2d, _avg_pool2d, _adaptive_avg_pool2d = map(attach, (_MaxUnpool2dRule, _AvgPool2dRule, _AdaptiveAvgPool2dRule))
for _rule in (
    _MaxPool2dGradInputRule,
    _OffsetPool2dRule,
    _OffsetPool2dGradInputRule,
    _MaxUnpool2dGradInputRule,
    _AvgPool2dGradInputRule,
    _AdaptiveAvgPool2dGradInputRule,
):
    attach(_rule)
autocast(_MaxUnpool2dRule.op, "AutocastCPU", lambda: torch.float32)  # as torch's own list has it


class MaxPool2dFunction(torch.autograd.Function):
    """Max pooling as a ``torch.autograd.Function``: ``apply(input, kernel_size, stride, padding, dilation, ceil_mode)``.

    Equivalent to: ``torch.nn.functional.max_pool2d(..., return_indices=True)`` with every argument given, `input` of shape
    (N, C, H, W) and the others pairs of ints. Returns the output and the indices.
    """

    @staticmethod
    def forward(input, kernel_size, stride, padding, dilation, ceil_mode):
        return _MaxPool2dWithIndicesRule.op(input, *kernel_size, *stride, *padding, *dilation, ceil_mode)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _MaxPool2dWithIndicesRule.setup_context(ctx, inputs, output)

    @staticmethod
    def backward(ctx, grad_output, grad_indices):
        return (
            *_MaxPool2dWithIndicesRule.backward(ctx, ctx.saved_tensors, ctx.needs_input_grad, grad_output, grad_indices),
            *(None,) * 5,
        )

    @classmethod
    def apply(cls, input, kernel_size, stride, padding, dilation, ceil_mode):
        return _max_pool2d_with_indices(input, *kernel_size, *stride, *padding, *dilation, ceil_mode)


class AvgPool2dFunction(torch.autograd.Function):
    """Average pooling as a ``torch.autograd.Function``.

    ``apply(input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)``

    Equivalent to: ``torch.nn.functional.avg_pool2d`` with every argument given, `input` of shape (N, C, H, W) and
    `kernel_size`, `stride`, `padding` pairs of ints.
    """

    @staticmethod
    def forward(input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override):
        return _AvgPool2dRule.op(input, *kernel_size, *stride, *padding, ceil_mode, count_include_pad, divisor_override)

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, kernel_size, stride, padding, *rest = inputs
        _AvgPool2dRule.setup_context(ctx, (input, *kernel_size, *stride, *padding, *rest), output)

    @staticmethod
    def backward(ctx, grad_output):
        return (*_AvgPool2dRule.backward(ctx, ctx.saved_tensors, ctx.needs_input_grad, grad_output), *(None,) * 6)

    @classmethod
    def apply(cls, input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override):
        return _avg_pool2d(input, *kernel_size, *stride, *padding, ceil_mode, count_include_pad, divisor_override)


# ---------------------------------------------------------------------------------------------------------- public functions


def _window(op, kernel_size, stride, padding, dilation=1):
    """The eight ints of a sliding window as the operators take them."""
    kernel = pair(op, "kernel_size", kernel_size)
    stride = kernel if stride is None or stride in ([], ()) else pair(op, "stride", stride)
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
        _max_pool2d,
        _max_pool2d_with_indices,
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
        _min_pool2d,
        _min_pool2d_with_indices,
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
    output = _relu_max_pool2d(input, *_window(op, kernel_size, stride, padding, dilation), bool(ceil_mode))
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
    output = _avg_pool2d(input, *window, bool(ceil_mode), bool(count_include_pad), divisor_override)
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
    output = _adaptive_avg_pool2d(input, *_adaptive_size(op, output_size, input))
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
        output, indices = _adaptive_max_pool2d_with_indices(input, *size)
        return (output.squeeze(0), indices.squeeze(0)) if unbatched else (output, indices)
    # The operator for adaptive windows itself refuses input without channels, so that the message names it.
    plain = input.shape[1] != 0 and not torch.compiler.is_compiling()
    window = _sliding_window(input.shape[2:], size) if plain else None
    output = _adaptive_max_pool2d(input, *size) if window is None else _max_pool2d(input, *window, False)
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
    strides = kernel if stride is None or stride in ([], ()) else pair(op, "stride", stride)
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
    output = _max_unpool2d(input, indices.unsqueeze(0) if unbatched else indices, *size)
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
