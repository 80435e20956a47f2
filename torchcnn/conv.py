"""Convolution: the public function, its derivatives, the autograd Function and the module.

``conv2d``, ``conv2d_grad_input`` and ``conv2d_grad_weight`` are linear in each of their tensors, and the derivative of each is
made of the other two: with input x, weight w and a gradient g of the output,

    conv2d              y = x * w      d/dx: grad_input(g, w)     d/dw: grad_weight(g, x)
    conv2d_grad_input   x' = g *' w    d/dg: conv2d(v, w)         d/dw: grad_weight(g, v)      v a gradient of x'
    conv2d_grad_weight  w' = g *'' x   d/dg: conv2d(x, v)         d/dx: grad_input(g, v)       v a gradient of w'

so gradients of every order need no further kernel. ``conv2d_grad_weight_bias`` also sums g, the gradient of a bias, for the
backward pass of a layer that asks for both. The schemas stand in csrc/conv2d.cpp.
"""

from collections.abc import Callable
from typing import Any

import torch

from torchcnn import _C
from torchcnn._arguments import (
    FLOATING_DTYPES,
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
    autocast,
    check_fake,
    empty_activation,
    fold_batch,
    is_channels_last,
    unfold_batch,
)

_forward, _grad_input, _grad_weight, _grad_bias, _grad_weight_bias = (
    getattr(torch.ops.torchcnn, name).default
    for name in ("conv2d", "conv2d_grad_input", "conv2d_grad_weight", "conv2d_grad_bias", "conv2d_grad_weight_bias")
)


# --------------------------------------------------------------------------------------------------- shapes without data


@torch.library.register_fake("torchcnn::conv2d", lib=LIBRARY)
def _(input, weight, bias, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, groups, relu):
    options = stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, groups
    check_fake("conv2d", _C.check_conv2d, *options, bias=bias, input=input, weight=weight)
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != weight.shape[0]):
        shapes = f"{list(bias.shape)} for weight of shape {list(weight.shape)}"
        raise RuntimeError(f"conv2d: bias must have shape [weight.shape[0]], got {shapes}")
    P = sliding_output_size(input.shape[2], weight.shape[2], stride_h, pad_h, dilation_h)
    Q = sliding_output_size(input.shape[3], weight.shape[3], stride_w, pad_w, dilation_w)
    return empty_activation(input, (input.shape[0], weight.shape[0], P, Q), is_channels_last(input, weight))


@torch.library.register_fake("torchcnn::conv2d_grad_input", lib=LIBRARY)
def _(grad_output, weight, H, W, *options):
    groups, channels_last = options[-2:]
    return empty_activation(grad_output, (grad_output.shape[0], weight.shape[1] * groups, H, W), channels_last)


@torch.library.register_fake("torchcnn::conv2d_grad_weight", lib=LIBRARY)
def _fake_grad_weight(grad_output, input, R, S, *options):
    groups, channels_last = options[-2:]
    return empty_activation(grad_output, (grad_output.shape[1], input.shape[1] // groups, R, S), channels_last)


@torch.library.register_fake("torchcnn::conv2d_grad_bias", lib=LIBRARY)
def _fake_grad_bias(grad_output):
    return grad_output.new_empty(grad_output.shape[1])


@torch.library.register_fake("torchcnn::conv2d_grad_weight_bias", lib=LIBRARY)
def _(grad_output, *rest):
    return _fake_grad_weight(grad_output, *rest), _fake_grad_bias(grad_output)


# ------------------------------------------------------------------------------------------------------------ derivatives


def _add(a, b):
    return b if a is None else a if b is None else a + b


def _fold_channels(tensor, dim, batch_size):
    """(..., B, ...) -> (N, B * C, H, W): a vmapped dimension of an activation becomes groups."""
    tensor = tensor.unsqueeze(1).expand(-1, batch_size, -1, -1, -1) if dim is None else tensor.movedim(dim, 1)
    return tensor.reshape(tensor.shape[0], batch_size * tensor.shape[2], *tensor.shape[3:])


def _unfold_channels(tensor, batch_size):
    return tensor.reshape(tensor.shape[0], batch_size, tensor.shape[1] // batch_size, *tensor.shape[2:])


def _through_relu(gradient, output=None):
    """The derivative of the fused rectifier, which the sign of its output tells; without one the gradient as it is."""
    return gradient if output is None else torch.ops.aten.threshold_backward(gradient, output, 0)


class _Conv2dRule:
    op = _forward

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, weight, _bias, *options, relu = inputs
        saved = (input, weight, output) if relu else (input, weight)
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)
        ctx.options = options
        ctx.channels_last = is_channels_last(input, weight)

    @staticmethod
    def backward(ctx, saved, needs, grad_output):
        input, weight, *output = saved
        grad_output = _through_relu(grad_output, *output)
        grad_input = grad_weight = grad_bias = None
        if needs[0]:
            grad_input = _grad_input(grad_output, weight, *input.shape[2:], *ctx.options, ctx.channels_last)
        of_weight = grad_output, input, *weight.shape[2:], *ctx.options, ctx.channels_last
        if needs[1] and needs[2]:
            grad_weight, grad_bias = _grad_weight_bias(*of_weight)
        elif needs[1]:
            grad_weight = _grad_weight(*of_weight)
        elif needs[2]:
            grad_bias = _grad_bias(grad_output)
        return grad_input, grad_weight, grad_bias

    @staticmethod
    def jvp(ctx, saved, input_tangent, weight_tangent, bias_tangent, *_):
        input, weight, *output = saved
        tangent = None
        if input_tangent is not None:
            tangent = _forward(input_tangent, weight, None, *ctx.options, False)
        if weight_tangent is not None:
            tangent = _add(tangent, _forward(input, weight_tangent, None, *ctx.options, False))
        if bias_tangent is not None:
            bias_tangent = bias_tangent[:, None, None]
            if tangent is None:
                tangent = bias_tangent.expand(_forward(input, weight, None, *ctx.options, False).shape)
            else:
                tangent = tangent + bias_tangent
        return _through_relu(tangent, *output)

    @staticmethod
    def vmap(info, in_dims, input, weight, bias, *options):
        B = info.batch_size
        input_dim, weight_dim, bias_dim = in_dims[:3]
        if weight_dim is None and bias_dim is None:
            return unfold_batch(_forward(fold_batch(input, input_dim, B), weight, bias, *options), B), 0
        *window, groups, relu = options
        if input_dim is None and weight_dim is None:
            output = _forward(input, weight, None, *window, groups, False).unsqueeze(1)
        else:
            folded = _fold_channels(input, input_dim, B), fold_batch(weight, weight_dim, B)
            output = _unfold_channels(_forward(*folded, None, *window, groups * B, False), B)
        if bias is not None:
            bias = bias if bias_dim is None else bias.movedim(bias_dim, 0)
            output = output + bias[..., None, None]
        return output.relu() if relu else output, 1


class _Conv2dGradInputRule:
    op = _grad_input

    @staticmethod
    def setup_context(ctx, inputs, output):
        grad_output, weight, *ctx.options = inputs
        ctx.save_for_backward(grad_output, weight)
        ctx.save_for_forward(grad_output, weight)

    @staticmethod
    def backward(ctx, saved, needs, v):
        grad_output, weight = saved
        _, _, *options, channels_last = ctx.options
        return (
            _forward(v, weight, None, *options, False) if needs[0] else None,
            _grad_weight(grad_output, v, *weight.shape[2:], *options, channels_last) if needs[1] else None,
        )

    @staticmethod
    def jvp(ctx, saved, grad_output_tangent, weight_tangent, *_):
        grad_output, weight = saved
        tangent = None
        if grad_output_tangent is not None:
            tangent = _grad_input(grad_output_tangent, weight, *ctx.options)
        if weight_tangent is not None:
            tangent = _add(tangent, _grad_input(grad_output, weight_tangent, *ctx.options))
        return tangent

    @staticmethod
    def vmap(info, in_dims, grad_output, weight, *options):
        B = info.batch_size
        if in_dims[1] is None:
            return unfold_batch(_grad_input(fold_batch(grad_output, in_dims[0], B), weight, *options), B), 0
        *sizes, groups, channels_last = options
        result = _grad_input(
            _fold_channels(grad_output, in_dims[0], B),
            fold_batch(weight, in_dims[1], B),
            *sizes,
            groups * B,
            channels_last,
        )
        return _unfold_channels(result, B), 1


class _Conv2dGradWeightRule:
    op = _grad_weight

    @staticmethod
    def setup_context(ctx, inputs, output):
        grad_output, input, *ctx.options = inputs
        ctx.save_for_backward(grad_output, input)
        ctx.save_for_forward(grad_output, input)

    @staticmethod
    def backward(ctx, saved, needs, v, v_bias=None):  # v_bias: of the operator that has grad_bias beside
        grad_output, input = saved
        _, _, *options, channels_last = ctx.options
        return (
            _forward(input, v, v_bias, *options, False) if needs[0] else None,
            _grad_input(grad_output, v, *input.shape[2:], *options, channels_last) if needs[1] else None,
        )

    @staticmethod
    def jvp(ctx, saved, grad_output_tangent, input_tangent, *_):
        grad_output, input = saved
        tangent = None
        if grad_output_tangent is not None:
            tangent = _grad_weight(grad_output_tangent, input, *ctx.options)
        if input_tangent is not None:
            tangent = _add(tangent, _grad_weight(grad_output, input_tangent, *ctx.options))
        return tangent

    @staticmethod
    def vmap(info, in_dims, grad_output, input, *options):
        B = info.batch_size
        *sizes, groups, channels_last = options
        result = _grad_weight(
            _fold_channels(grad_output, in_dims[0], B),
            _fold_channels(input, in_dims[1], B),
            *sizes,
            groups * B,
            channels_last,
        )
        return unfold_batch(result, B), 0


class _Conv2dGradWeightBiasRule:
    op = _grad_weight_bias
    setup_context = _Conv2dGradWeightRule.setup_context
    backward = _Conv2dGradWeightRule.backward

    @staticmethod
    def jvp(ctx, saved, grad_output_tangent, input_tangent, *_):
        tangent = _Conv2dGradWeightRule.jvp(ctx, saved, grad_output_tangent, input_tangent)
        if grad_output_tangent is None:
            return tangent, saved[0].new_zeros(saved[0].shape[1])
        return tangent, _grad_bias(grad_output_tangent)

    @staticmethod
    def vmap(info, in_dims, grad_output, input, *options):
        grad_weight, weight_dim = _Conv2dGradWeightRule.vmap(info, in_dims, grad_output, input, *options)
        grad_bias, bias_dim = _Conv2dGradBiasRule.vmap(info, in_dims, grad_output)
        return (grad_weight, grad_bias), (weight_dim, bias_dim)


class _Conv2dGradBiasRule:
    op = _grad_bias

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.shape = inputs[0].shape

    @staticmethod
    def backward(ctx, saved, needs, v):
        return (v[:, None, None].expand(ctx.shape),)

    @staticmethod
    def jvp(ctx, saved, grad_output_tangent):
        return _grad_bias(grad_output_tangent)

    @staticmethod
    def vmap(info, in_dims, grad_output):
        folded = _fold_channels(grad_output, in_dims[0], info.batch_size)
        return _grad_bias(folded).reshape(info.batch_size, -1), 0


_conv2d = attach(_Conv2dRule)
for _rule in (_Conv2dGradInputRule, _Conv2dGradWeightRule, _Conv2dGradBiasRule, _Conv2dGradWeightBiasRule):
    attach(_rule)
autocast(_Conv2dRule.op, "AutocastCPU", lambda: torch.get_autocast_dtype("cpu"))
autocast(_Conv2dRule.op, "AutocastCUDA", lambda: torch.get_autocast_dtype("cuda"))


class Conv2dFunction(torch.autograd.Function):
    """Convolution as a ``torch.autograd.Function``.

    ``Conv2dFunction.apply(input, weight, bias, stride, padding, dilation, groups)``

    Equivalent to: ``torch.nn.functional.conv2d(input, weight, bias, stride, padding, dilation, groups)`` with every argument
    given, `input` of shape (N, C, H, W) and `stride`, `padding`, `dilation` pairs of ints.
    """

    @staticmethod
    def forward(input, weight, bias, stride, padding, dilation, groups):
        return _Conv2dRule.op(input, weight, bias, *stride, *padding, *dilation, groups, False)

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, weight, bias, stride, padding, dilation, groups = inputs
        _Conv2dRule.setup_context(ctx, (input, weight, bias, *stride, *padding, *dilation, groups, False), output)

    @staticmethod
    def backward(ctx, grad_output):
        return (*_Conv2dRule.backward(ctx, ctx.saved_tensors, ctx.needs_input_grad, grad_output), None, None, None, None)

    @classmethod
    def apply(  # type: ignore[override]
        cls,
        input: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        stride: tuple[int, int],
        padding: tuple[int, int],
        dilation: tuple[int, int],
        groups: int,
    ) -> torch.Tensor:
        # Dynamo traces forward and backward above (and tells by the number of parameters whether forward takes a ctx: no
        # defaults there); everything else goes through the operator, which also has jvp and vmap.
        return _conv2d(input, weight, bias, *stride, *padding, *dilation, groups, False)


def _is_relu(activation):
    if activation is None or activation == "relu":
        return activation is not None
    raise ValueError(f"conv2d: activation must be 'relu' or None, got {activation!r}")


# ---------------------------------------------------------------------------------------------------------- public functions


@overridable
def conv2d(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Pair = 1,
    padding: Pair | str = 0,
    dilation: Pair = 1,
    groups: int = 1,
    activation: str | None = None,
) -> torch.Tensor:
    """2-D convolution (cross-correlation) of a batch of images with a bank of filters.

    Equivalent to: ``torch.nn.functional.conv2d(input, weight, bias, stride, padding, dilation, groups)``

    With h = p * stride_h - pad_h + r * dilation_h and w = q * stride_w - pad_w + s * dilation_w::

        output[n, k, p, q] = bias[k] + sum over c, r, s of input[n, c, h, w] * weight[k, c, r, s]

    Args:
        input: (N, C, H, W), or (C, H, W) without a batch; float32, float64, bfloat16 or float16.
        weight: (K, C / groups, R, S), same dtype.
        bias: (K,), same dtype, or None.
        stride, padding, dilation: an int or a (height, width) pair, in pixels. `padding` may also be "valid" (none) or, for
            stride 1, "same" (output as large as the input; an odd total puts the extra row below and column right).
        groups: input and output channels are split into so many groups that do not see each other.
        activation: "relu" to rectify the output in the same pass; backward then also keeps the output, for its sign.

    Returns:
        (N, K, P, Q) with P = floor((H + 2 pad_h - dilation_h (R - 1) - 1) / stride_h) + 1 and Q likewise; in channels_last if
        input or weight is. Differentiable to any order in input, weight and bias.

    Raises:
        RuntimeError: sizes that do not fit each other, different dtypes or devices.
        NotImplementedError: an integer or complex dtype.
        TypeError: an argument of the wrong kind. ValueError: another activation.

    Numerics: sums are in the dtype of the input (float32 for bfloat16 and float16, rounded once), in an order that depends on
    the geometry, the instruction set and `torchcnn.backends.allow_winograd` alone (the bias's gradient also on whether the
    weight's is asked for): the result has the same bits for any number of threads, and an image the same in any batch. Where a
    weight is infinite or NaN, its product with the zeros of the padding is NaN or left out, as the geometry's kernel has it.

    Source: Dumoulin and Visin, "A guide to convolution arithmetic for deep learning", 2016, sections 2 and 5.1.
    """
    check_tensors("conv2d", input=input, weight=weight, bias=bias)
    if input.dtype == weight.dtype:
        check_dtype("conv2d", input.dtype, FLOATING_DTYPES)
    input, unbatched = batched("conv2d", "input", input)
    stride_h, stride_w = pair("conv2d", "stride", stride)
    dilation_h, dilation_w = pair("conv2d", "dilation", dilation)
    if isinstance(padding, str):
        input, pad_h, pad_w = _named_padding(padding, input, weight, (stride_h, stride_w), (dilation_h, dilation_w))
    else:
        pad_h, pad_w = pair("conv2d", "padding", padding)
    groups = integer("conv2d", "groups", groups)
    options = stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, groups, _is_relu(activation)
    output = _conv2d(input, weight, bias, *options)
    return output.squeeze(0) if unbatched else output


def _named_padding(padding, input, weight, stride, dilation):
    """The input (one row or column larger where "same" is uneven) and the padding to call the operator with."""
    if padding == "valid":
        return input, 0, 0
    if padding != "same":
        raise RuntimeError(f"conv2d: padding must be 'valid', 'same', an int or a pair of ints, got {padding!r}")
    if stride != (1, 1):
        raise RuntimeError(f"conv2d: padding='same' needs stride 1, got stride {stride}")
    if weight.dim() != 4:
        raise RuntimeError(f"conv2d: weight must have 4 dimensions, got {weight.dim()}: {list(weight.shape)}")
    total_h, total_w = (d * (size - 1) for d, size in zip(dilation, weight.shape[2:], strict=True))
    if total_h % 2 or total_w % 2:
        input = torch.nn.functional.pad(input, (0, total_w % 2, 0, total_h % 2))
    return input, total_h // 2, total_w // 2


def conv2d_output_size(
    input_size: Pair, kernel_size: Pair, stride: Pair = 1, padding: Pair | str = 0, dilation: Pair = 1
) -> tuple[int, int]:
    """Height and width (P, Q) of the output of `conv2d`.

    Equivalent to: ``tuple(torch.nn.functional.conv2d(input, weight, None, stride, padding, dilation).shape[2:])``

    Args:
        input_size, kernel_size: (H, W) and (R, S), or an int for a square.
        stride, padding, dilation: as in `conv2d`; `padding` may be "valid" or "same".

    Raises:
        ValueError: a size below 1, or a kernel that does not fit into the padded input.
    """
    op = "conv2d_output_size"
    size, kernel, stride, dilation = (
        pair(op, name, value)
        for name, value in (
            ("input_size", input_size),
            ("kernel_size", kernel_size),
            ("stride", stride),
            ("dilation", dilation),
        )
    )
    if padding == "same":
        if stride != (1, 1):
            raise ValueError(f"{op}: padding='same' needs stride 1, got stride {stride}")
        return size
    pad = (0, 0) if padding == "valid" else pair(op, "padding", padding)
    return _C.sliding_output_size(op, size, kernel, stride, pad, dilation, False, False)


def conv2d_parameter_count(in_channels: int, out_channels: int, kernel_size: Pair, bias: bool = True, groups: int = 1) -> int:
    """Number of learnable parameters of a `Conv2d`: K (C / groups R S + 1), without the 1 if there is no bias.

    Equivalent to: the sum of ``p.numel()`` over the parameters of
    ``torch.nn.Conv2d(in_channels, out_channels, kernel_size, bias=bias, groups=groups)``

    Raises:
        ValueError: channels that are not divisible by `groups`.
    """
    R, S = pair("conv2d_parameter_count", "kernel_size", kernel_size)
    if groups < 1 or in_channels % groups or out_channels % groups:
        raise ValueError(
            "conv2d_parameter_count: in_channels and out_channels must be divisible by groups, got "
            f"{in_channels}, {out_channels} and groups={groups}"
        )
    return out_channels * (in_channels // groups * R * S + bool(bias))


# ------------------------------------------------------------------------------------------------------------------- module


def _init_kaiming(weight):
    torch.nn.init.kaiming_normal_(weight, nonlinearity="relu")


_INITS = {"kaiming": _init_kaiming, "xavier": torch.nn.init.xavier_uniform_}


class Conv2d(torch.nn.Conv2d):
    """2-D convolution layer.

    Equivalent to: ``torch.nn.Conv2d`` with the same arguments: parameters, state_dict, repr and the initial weights for a seed
    are the same.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype: as in
            ``torch.nn.Conv2d``.
        init: how the weight starts. None: torch's default, uniform within +- 1 / sqrt(fan_in). "kaiming": normal with variance
            2 / fan_in, for layers before a ReLU (He et al., 2015, section 2.2). "xavier": uniform with variance
            2 / (fan_in + fan_out) (Glorot and Bengio, 2010, section 4.2.1). Or a function that fills the weight in place.
            The last three set the bias to zero.
        activation: "relu" to rectify the output in the same pass, or None.
    """

    init: str | Callable[[torch.Tensor], object] | None
    activation: str | None
    # False where the constructor was torch's: attributes of these names are then the user's, as on any layer of torch.nn.
    _has_options = False

    def __init__(
        self,
        *args: Any,
        init: str | Callable[[torch.Tensor], object] | None = None,
        activation: str | None = None,
        **kwargs: Any,
    ) -> None:
        if isinstance(init, str) and init not in _INITS:
            raise ValueError(f"Conv2d: init must be 'kaiming', 'xavier', a function or None, got {init!r}")
        if init is not None and not isinstance(init, str) and not callable(init):
            raise TypeError(f"Conv2d: init must be 'kaiming', 'xavier', a function or None, got {init!r}")
        # Before torch's constructor, which calls reset_parameters; a plain attribute set that early would be refused.
        vars(self).update(init=init, _has_options=True)
        super().__init__(*args, **kwargs)
        _is_relu(activation)
        self.activation = activation

    def reset_parameters(self) -> None:
        if not self._has_options or self.init is None:
            super().reset_parameters()
            return
        with torch.no_grad():
            (_INITS[self.init] if isinstance(self.init, str) else self.init)(self.weight)
            if self.bias is not None:
                self.bias.zero_()

    def extra_repr(self) -> str:
        text = super().extra_repr()
        if not self._has_options:
            return text
        if self.init is not None:
            text += f", init={self.init if isinstance(self.init, str) else getattr(self.init, '__name__', repr(self.init))}"
        return text if self.activation is None else f"{text}, activation={self.activation}"

    def _conv_forward(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            input = torch.nn.functional.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        return conv2d(
            input, weight, bias, self.stride, padding, self.dilation, self.groups, self.activation if self._has_options else None
        )
