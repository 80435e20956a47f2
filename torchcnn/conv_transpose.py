"""Transposed convolution: the public function, its derivatives and the module.

It is the gradient of a convolution with respect to its input, as a layer of its own: what ``conv2d_grad_input`` computes, plus a
bias. Its derivatives are therefore the operators of conv.py, with input and output in each other's place.
"""

from collections.abc import Sequence
from typing import Any

import torch

from torchcnn import _C
from torchcnn._arguments import FLOATING_DTYPES, Pair, batched, check_dtype, check_tensors, integer, overridable, pair
from torchcnn._autograd import LIBRARY, attach, autocast, check_fake, empty_activation, fold_batch, is_channels_last, unfold_batch
from torchcnn.conv import _add, _fold_channels, _forward, _grad_bias, _grad_weight, _unfold_channels

_transposed = torch.ops.torchcnn.conv_transpose2d.default


def _transposed_size(size, kernel, stride, pad, dilation, output_pad):
    """The formula of csrc/geometry.h, for fake tensors; the rules are checked there."""
    return (size - 1) * stride - 2 * pad + dilation * (kernel - 1) + output_pad + 1


@torch.library.register_fake("torchcnn::conv_transpose2d", lib=LIBRARY)
def _(input, weight, bias, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, groups, output_pad_h, output_pad_w):
    options = stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, groups, output_pad_h, output_pad_w
    check_fake("conv_transpose2d", _C.check_conv_transpose2d, *options, bias=bias, input=input, weight=weight)
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != weight.shape[1] * groups):
        shapes = f"{list(bias.shape)} for weight of shape {list(weight.shape)} and groups={groups}"
        raise RuntimeError(f"conv_transpose2d: bias must have shape [weight.shape[1] * groups], got {shapes}")
    H = _transposed_size(input.shape[2], weight.shape[2], stride_h, pad_h, dilation_h, output_pad_h)
    W = _transposed_size(input.shape[3], weight.shape[3], stride_w, pad_w, dilation_w, output_pad_w)
    return empty_activation(input, (input.shape[0], weight.shape[1] * groups, H, W), is_channels_last(input, weight))


class _ConvTranspose2dRule:
    op = _transposed

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, weight, _bias, *options, _output_pad_h, _output_pad_w = inputs
        ctx.save_for_backward(input, weight)
        ctx.save_for_forward(input, weight)
        ctx.options = options
        ctx.output_pads = inputs[-2:]
        ctx.channels_last = is_channels_last(input, weight)

    @staticmethod
    def backward(ctx, saved, needs, grad_output):
        input, weight = saved
        grad_input = grad_weight = grad_bias = None
        if needs[0]:
            grad_input = _forward(grad_output, weight, None, *ctx.options, False)
        if needs[1]:
            grad_weight = _grad_weight(input, grad_output, *weight.shape[2:], *ctx.options, ctx.channels_last)
        if needs[2]:
            grad_bias = _grad_bias(grad_output)
        return grad_input, grad_weight, grad_bias

    @staticmethod
    def jvp(ctx, saved, input_tangent, weight_tangent, bias_tangent, *_):
        input, weight = saved
        options = *ctx.options, *ctx.output_pads
        tangent = None
        if input_tangent is not None:
            tangent = _transposed(input_tangent, weight, None, *options)
        if weight_tangent is not None:
            tangent = _add(tangent, _transposed(input, weight_tangent, None, *options))
        if bias_tangent is not None:
            bias_tangent = bias_tangent[:, None, None]
            if tangent is None:
                tangent = bias_tangent.expand(_transposed(input, weight, None, *options).shape)
            else:
                tangent = tangent + bias_tangent
        return tangent

    @staticmethod
    def vmap(info, in_dims, input, weight, bias, *options):
        B = info.batch_size
        input_dim, weight_dim, bias_dim = in_dims[:3]
        if weight_dim is None and bias_dim is None:
            return unfold_batch(_transposed(fold_batch(input, input_dim, B), weight, bias, *options), B), 0
        *window, groups, output_pad_h, output_pad_w = options
        if input_dim is None and weight_dim is None:
            output = _transposed(input, weight, None, *options).unsqueeze(1)
        else:
            folded = _fold_channels(input, input_dim, B), fold_batch(weight, weight_dim, B)
            output = _transposed(*folded, None, *window, groups * B, output_pad_h, output_pad_w)
            output = _unfold_channels(output, B)
        if bias is not None:
            bias = bias if bias_dim is None else bias.movedim(bias_dim, 0)
            output = output + bias[..., None, None]
        return output, 1


_conv_transpose2d = attach(_ConvTranspose2dRule)
autocast(_ConvTranspose2dRule.op, "AutocastCPU", lambda: torch.get_autocast_dtype("cpu"))
autocast(_ConvTranspose2dRule.op, "AutocastCUDA", lambda: torch.get_autocast_dtype("cuda"))


@overridable
def conv_transpose2d(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Pair = 1,
    padding: Pair = 0,
    output_padding: Pair = 0,
    groups: int = 1,
    dilation: Pair = 1,
) -> torch.Tensor:
    """2-D transposed convolution: every input pixel adds its multiple of the filters to a window of the output.

    Equivalent to: ``torch.nn.functional.conv_transpose2d`` with the same arguments.

    With h = p * stride_h - pad_h + r * dilation_h and w = q * stride_w - pad_w + s * dilation_w::

        output[n, c, h, w] = bias[c] + sum over k, p, q, r, s of input[n, k, p, q] * weight[k, c, r, s]

    Args:
        input: (N, K, P, Q), or (K, P, Q) without a batch; float32, float64, bfloat16 or float16.
        weight: (K, C / groups, R, S), same dtype.
        bias: (C,), same dtype, or None.
        stride, padding, dilation: those of the convolution that this is the transpose of: an int or a (height, width) pair.
            Padding takes so many rows and columns away from the output on each side.
        output_padding: more rows below and columns right, below stride or dilation: a strided convolution makes the same size of
            several.
        groups: input and output channels are split into so many groups that do not see each other.

    Returns:
        (N, C, H, W) with H = (P - 1) stride_h - 2 pad_h + dilation_h (R - 1) + output_padding_h + 1 and W likewise; in
        channels_last if input or weight is. Differentiable to any order in input, weight and bias.

    Errors and numerics are those of `conv2d`.

    Source: Dumoulin and Visin, "A guide to convolution arithmetic for deep learning", 2016, section 4; Zeiler et al.,
    "Deconvolutional networks", 2010.
    """
    op = "conv_transpose2d"
    check_tensors(op, input=input, weight=weight, bias=bias)
    if input.dtype == weight.dtype:
        check_dtype(op, input.dtype, FLOATING_DTYPES)
    input, unbatched = batched(op, "input", input)
    strides, pads, dilations, extras = (
        pair(op, name, value)
        for name, value in (
            ("stride", stride),
            ("padding", padding),
            ("dilation", dilation),
            ("output_padding", output_padding),
        )
    )
    groups = integer(op, "groups", groups)
    axes = tuple(zip(extras, strides, dilations, strict=True))
    if any(s <= extra for extra, s, _ in axes) and all(extra < max(s, d) for extra, s, d in axes) and min(pads) >= 0:
        output = _with_wide_border(input, weight, bias, strides, pads, dilations, groups, extras)
    else:
        output = _conv_transpose2d(input, weight, bias, *strides, *pads, *dilations, groups, *extras)
    return output.squeeze(0) if unbatched else output


def _with_wide_border(input, weight, bias, strides, pads, dilations, groups, extras):
    """An output padding of a whole stride or more: no convolution of such a size has the input for its output.

    So compute what all windows cover, and then take off the border, or put one of bias alone there.
    """
    output = _conv_transpose2d(input, weight, bias, *strides, 0, 0, *dilations, groups, 0, 0)
    (pad_h, pad_w), (extra_h, extra_w) = pads, extras
    H, W = output.shape[2] - 2 * pad_h + extra_h, output.shape[3] - 2 * pad_w + extra_w
    if min(H, W) < 1:
        raise RuntimeError(f"conv_transpose2d: output size must be at least 1, got {H} x {W}")
    covered = torch.ones(output.shape[2:], dtype=torch.bool, device=output.device)
    output, covered = (
        torch.nn.functional.pad(plane, (0, extra_w, 0, extra_h))[..., pad_h : pad_h + H, pad_w : pad_w + W]
        for plane in (output, covered)
    )
    return output.clone() if bias is None else torch.where(covered, output, bias.to(output.dtype)[:, None, None])


class ConvTranspose2d(torch.nn.ConvTranspose2d):
    """Transposed convolution layer; see `conv_transpose2d`.

    Equivalent to: ``torch.nn.ConvTranspose2d`` with the same arguments: parameters, state_dict, repr and the initial weights for
    a seed are the same.
    """

    def forward(self, input: torch.Tensor, output_size: Sequence[int] | None = None) -> torch.Tensor:
        if self.padding_mode != "zeros":
            raise ValueError(f"conv_transpose2d: padding_mode must be 'zeros', got {self.padding_mode!r}")
        window: Any = self.stride, self.padding, self.kernel_size, 2, self.dilation
        output_padding: Any = self._output_padding(input, output_size, *window)  # type: ignore[arg-type]
        options: Any = self.stride, self.padding, output_padding, self.groups, self.dilation
        return conv_transpose2d(input, self.weight, self.bias, *options)
