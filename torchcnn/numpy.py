"""The CPU kernels on NumPy arrays, without a tensor in sight.

Arrays are (N, C, H, W), float32 or float64, all of one dtype; results are new C-contiguous arrays of that dtype. Arguments mean
what they mean in `torchcnn.functional`, which runs the same kernels: values and bits agree with it. Sizes that do not fit raise
ValueError, arguments of the wrong kind TypeError.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from torchcnn import _C
from torchcnn._arguments import Pair, integer, pair
from torchcnn.backends import explain, isa, isas

Array = NDArray[Any]

__all__ = [
    "avg_pool2d",
    "avg_pool2d_backward",
    "conv2d",
    "conv2d_backward",
    "explain",
    "isa",
    "isas",
    "max_pool2d",
    "max_pool2d_backward",
]


def _kernels_for(op, **arrays):
    """The functions of the dtype that all arrays share."""
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray):
            raise TypeError(f"{op}: {name} must be a numpy.ndarray, got {type(array).__name__}")
    dtypes = {name: array.dtype.name for name, array in arrays.items()}
    if len(set(dtypes.values())) != 1 or next(iter(dtypes.values())) not in ("float32", "float64"):
        described = ", ".join(f"{name} {dtype}" for name, dtype in dtypes.items())
        raise TypeError(f"{op}: arrays must all be float32 or all float64, got {described}")
    return getattr(_C, next(iter(dtypes.values())))


def _optional_integer(op, name, value):
    return None if value is None else integer(op, name, value)


def conv2d(
    input: Array,
    weight: Array,
    bias: Array | None = None,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
) -> Array:
    """2-D convolution: input (N, C, H, W), weight (K, C / groups, R, S), bias (K,) or None -> (N, K, P, Q).

    Equivalent to: ``torchcnn.functional.conv2d`` on tensors of the same data.
    """
    op = "conv2d"
    arrays = {"input": input, "weight": weight} | ({} if bias is None else {"bias": bias})
    return _kernels_for(op, **arrays).conv2d(
        input,
        weight,
        bias,
        pair(op, "stride", stride),
        pair(op, "padding", padding),
        pair(op, "dilation", dilation),
        integer(op, "groups", groups),
    )


def conv2d_backward(
    grad_output: Array,
    input: Array,
    weight: Array,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
) -> tuple[Array, Array, Array]:
    """Gradients of `conv2d`: grad_output (N, K, P, Q) -> (grad_input, grad_weight, grad_bias).

    Equivalent to: ``torch.autograd.grad(conv2d(input, weight, bias, ...), (input, weight, bias), grad_output)``
    """
    op = "conv2d_backward"
    return _kernels_for(op, grad_output=grad_output, input=input, weight=weight).conv2d_backward(
        grad_output,
        input,
        weight,
        pair(op, "stride", stride),
        pair(op, "padding", padding),
        pair(op, "dilation", dilation),
        integer(op, "groups", groups),
    )


def max_pool2d(
    input: Array,
    kernel_size: Pair,
    stride: Pair | None = None,
    padding: Pair = 0,
    dilation: Pair = 1,
    ceil_mode: bool = False,
) -> tuple[Array, Array]:
    """Largest value of each window, and its index h * W + w: input (N, C, H, W) -> (output, indices), both (N, C, P, Q).

    Equivalent to: ``torchcnn.functional.max_pool2d(..., return_indices=True)``
    """
    op = "max_pool2d"
    kernel = pair(op, "kernel_size", kernel_size)
    return _kernels_for(op, input=input).max_pool2d(
        input,
        kernel,
        kernel if stride is None else pair(op, "stride", stride),
        pair(op, "padding", padding),
        pair(op, "dilation", dilation),
        bool(ceil_mode),
    )


def max_pool2d_backward(
    grad_output: Array,
    indices: Array,
    input_size: Sequence[int],
) -> Array:
    """Gradient of `max_pool2d`: grad_output and indices (N, C, P, Q), input_size (H, W) -> grad_input (N, C, H, W)."""
    op = "max_pool2d_backward"
    if not isinstance(indices, np.ndarray) or indices.dtype != np.int64:
        raise TypeError(f"{op}: indices must be an int64 numpy.ndarray, got {getattr(indices, 'dtype', type(indices))}")
    kernels = _kernels_for(op, grad_output=grad_output)
    return kernels.max_pool2d_backward(grad_output, indices, pair(op, "input_size", input_size))


def avg_pool2d(
    input: Array,
    kernel_size: Pair,
    stride: Pair | None = None,
    padding: Pair = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Array:
    """Mean of each window: input (N, C, H, W) -> (N, C, P, Q).

    Equivalent to: ``torchcnn.functional.avg_pool2d`` on a tensor of the same data.
    """
    op = "avg_pool2d"
    kernel = pair(op, "kernel_size", kernel_size)
    return _kernels_for(op, input=input).avg_pool2d(
        input,
        kernel,
        kernel if stride is None else pair(op, "stride", stride),
        pair(op, "padding", padding),
        bool(ceil_mode),
        bool(count_include_pad),
        _optional_integer(op, "divisor_override", divisor_override),
    )


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
    """Gradient of `avg_pool2d`: grad_output (N, C, P, Q), input_size (H, W) -> grad_input (N, C, H, W)."""
    op = "avg_pool2d_backward"
    kernel = pair(op, "kernel_size", kernel_size)
    return _kernels_for(op, grad_output=grad_output).avg_pool2d_backward(
        grad_output,
        pair(op, "input_size", input_size),
        kernel,
        kernel if stride is None else pair(op, "stride", stride),
        pair(op, "padding", padding),
        bool(ceil_mode),
        bool(count_include_pad),
        _optional_integer(op, "divisor_override", divisor_override),
    )
