"""Pooling beneath its public functions: shapes without data, derivatives, vmap, and the autograd Functions.

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

from typing import Any

import torch

from torchcnn import _C
from torchcnn._arguments import sliding_output_size
from torchcnn._autograd import (
    LIBRARY,
    attach,
    attach_first,
    autocast,
    check_fake,
    empty_activation,
    fold_batch,
    is_channels_last,
    unfold_batch,
)

_ops = torch.ops.torchcnn

# --------------------------------------------------------------------------------------------------- shapes without data


def _pooled_size(op, input, window, ceil_mode):
    check_fake(op, _C.check_pool2d, *window, bool(ceil_mode), input=input)
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
        size = _pooled_size(name, input, window_and_mode[:8], window_and_mode[8])
        return empty_activation(input, size, is_channels_last(input))

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
    check_fake("adaptive_max_pool2d", _C.check_adaptive_pool2d, P, Q, input=input)
    return empty_activation(input, (*input.shape[:2], P, Q), is_channels_last(input))


@torch.library.register_fake("torchcnn::adaptive_max_pool2d_with_indices", lib=LIBRARY)
def _(input, P, Q):
    check_fake("adaptive_max_pool2d", _C.check_adaptive_pool2d, P, Q, input=input)
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
    if indices.dtype != torch.int64:
        raise RuntimeError(f"max_unpool2d: indices must be int64, got {indices.dtype}")
    if input.shape != indices.shape:
        shapes = f"{list(indices.shape)} and {list(input.shape)}"
        raise RuntimeError(f"max_unpool2d: indices must have the shape of input, got {shapes}")
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
    if divisor_override == 0:
        raise RuntimeError("avg_pool2d: divisor_override must not be 0, got 0")
    return empty_activation(input, _pooled_size("avg_pool2d", input, window, ceil_mode), is_channels_last(input))


@torch.library.register_fake("torchcnn::avg_pool2d_grad_input", lib=LIBRARY)
def _(grad_output, H, W, *options):
    return empty_activation(grad_output, (*grad_output.shape[:2], H, W), options[-1])


@torch.library.register_fake("torchcnn::adaptive_avg_pool2d", lib=LIBRARY)
def _(input, P, Q):
    check_fake("adaptive_avg_pool2d", _C.check_adaptive_pool2d, P, Q, input=input)
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
    def jvp(ctx, saved, input_tangent, *_):
        (offsets,) = saved
        return _ops.offset_pool2d.default(input_tangent, offsets, *ctx.options), None


class _IndicesRule(_PositionsRule):
    @staticmethod
    def backward(ctx, saved, needs, grad_output, _grad_indices):
        if grad_output is None:
            return (None,)
        (indices,) = saved
        return (_ops.max_pool2d_grad_input.default(grad_output, indices, *ctx.size, ctx.channels_last),)

    @staticmethod
    def jvp(ctx, saved, input_tangent, *_):
        (indices,) = saved
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


class _FixedPositionsRule:
    """An operator that moves values to or from given positions: linear in its first tensor, so jvp is the operator itself."""

    op: Any

    @staticmethod
    def setup_context(ctx, inputs, output):
        values, positions, *ctx.options = inputs
        ctx.save_for_backward(positions)
        ctx.save_for_forward(positions)
        ctx.size = values.shape[2:]
        ctx.channels_last = is_channels_last(values)

    @classmethod
    def jvp(cls, ctx, saved, tangent, *_):
        return cls.op(tangent, *saved, *ctx.options)

    @classmethod
    def vmap(cls, info, in_dims, values, positions, *options):
        folded = (fold_batch(x, dim, info.batch_size) for x, dim in zip((values, positions), in_dims, strict=False))
        return unfold_batch(cls.op(*folded, *options), info.batch_size), 0


class _OffsetPool2dRule(_FixedPositionsRule):
    op = _ops.offset_pool2d.default

    @staticmethod
    def backward(ctx, saved, needs, v):
        return (_ops.offset_pool2d_grad_input.default(v, *saved, *ctx.size, *ctx.options, ctx.channels_last),)


class _OffsetPool2dGradInputRule(_FixedPositionsRule):
    op = _ops.offset_pool2d_grad_input.default

    @staticmethod
    def backward(ctx, saved, needs, v):
        return (_ops.offset_pool2d.default(v, *saved, *ctx.options[2:-1]),)


class _MaxPool2dGradInputRule(_FixedPositionsRule):
    op = _ops.max_pool2d_grad_input.default

    @staticmethod
    def backward(ctx, saved, needs, v):
        return (_ops.max_unpool2d_grad_input.default(v, *saved),)


class _MaxUnpool2dRule(_FixedPositionsRule):
    op = _ops.max_unpool2d.default

    @staticmethod
    def backward(ctx, saved, needs, grad_output):
        return (_ops.max_unpool2d_grad_input.default(grad_output, *saved),)


class _MaxUnpool2dGradInputRule(_FixedPositionsRule):
    op = _ops.max_unpool2d_grad_input.default

    @staticmethod
    def backward(ctx, saved, needs, v):
        return (_ops.max_pool2d_grad_input.default(v, *saved, *ctx.size, ctx.channels_last),)


class _LinearPoolRule:
    """A pool that is linear in its input: jvp and vmap are the operator itself."""

    op: Any

    @classmethod
    def jvp(cls, ctx, saved, tangent, *_):
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


max_pool2d_with_indices, min_pool2d_with_indices, adaptive_max_pool2d_with_indices = map(
    attach, (_MaxPool2dWithIndicesRule, _MinPool2dWithIndicesRule, _AdaptiveMaxPool2dRule)
)
max_pool2d = attach_first(_ops.max_pool2d.default, attach(_MaxPool2dRule))
min_pool2d = attach_first(_ops.min_pool2d.default, attach(_MinPool2dRule))
relu_max_pool2d = attach_first(_ops.relu_max_pool2d.default, attach(_ReluMaxPool2dRule))
adaptive_max_pool2d = attach_first(_ops.adaptive_max_pool2d.default, adaptive_max_pool2d_with_indices)
max_unpool2d, avg_pool2d, adaptive_avg_pool2d = map(attach, (_MaxUnpool2dRule, _AvgPool2dRule, _AdaptiveAvgPool2dRule))
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
    def apply(  # type: ignore[override]
        cls,
        input: torch.Tensor,
        kernel_size: tuple[int, int],
        stride: tuple[int, int],
        padding: tuple[int, int],
        dilation: tuple[int, int],
        ceil_mode: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return max_pool2d_with_indices(input, *kernel_size, *stride, *padding, *dilation, ceil_mode)


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
    def apply(  # type: ignore[override]
        cls,
        input: torch.Tensor,
        kernel_size: tuple[int, int],
        stride: tuple[int, int],
        padding: tuple[int, int],
        ceil_mode: bool,
        count_include_pad: bool,
        divisor_override: int | None,
    ) -> torch.Tensor:
        return avg_pool2d(input, *kernel_size, *stride, *padding, ceil_mode, count_include_pad, divisor_override)
