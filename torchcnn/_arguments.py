"""What every public function does to its arguments before the operator is called: pairs, ranks, devices, dtypes.

The exception types are those of torch.nn.functional. Rules about sizes are checked in C++ (csrc/geometry.h).
"""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar

import torch
from torch.overrides import handle_torch_function, has_torch_function

from torchcnn._autograd import has_kernel

Pair = int | Sequence[int]  # (height, width), or one value for both
P = ParamSpec("P")
R = TypeVar("R")

HAS_CUDA_KERNELS = has_kernel("torchcnn::conv2d", "CUDA")  # once: torch.compile cannot trace the question
FLOATING_DTYPES = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})
INTEGER_DTYPES = frozenset({torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64})


def overridable(function: Callable[P, R]) -> Callable[P, R]:
    """`function` for every kind of argument: one whose type overrides torch's functions (a proxy of torch.fx, say) is asked."""

    @functools.wraps(function)
    def public(*args: P.args, **kwargs: P.kwargs) -> R:
        if has_torch_function(args) or (kwargs and has_torch_function(tuple(kwargs.values()))):
            return handle_torch_function(public, (*args, *kwargs.values()), *args, **kwargs)
        return function(*args, **kwargs)

    return public


def integer(op, name, value):
    """`value` as an int, or TypeError."""
    if isinstance(value, (int, torch.SymInt)):
        return value
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{op}: {name} must be an int or a pair of ints, got {value!r}") from None


def pair(op, name, value):
    """An int, or a sequence of one or two ints, as (height, width)."""
    if isinstance(value, (int, torch.SymInt)):
        return value, value
    if isinstance(value, (tuple, list)):
        if len(value) == 2:
            if type(value[0]) is type(value[1]) is int:
                return tuple(value)
            return integer(op, name, value[0]), integer(op, name, value[1])
        if len(value) == 1:
            return (integer(op, name, value[0]),) * 2
        raise RuntimeError(f"{op}: {name} must be an int or a pair of ints, got {len(value)} values: {value!r}")
    return (integer(op, name, value),) * 2


def check_tensors(op, **tensors):
    """Every argument is a tensor (`bias` may be None) and all are on one device that has kernels."""
    first_name = first = None
    for name, tensor in tensors.items():
        if tensor is None and name == "bias":
            continue
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(tensor).__name__}")
        if tensor.is_cpu and (first is None or first.is_cpu):
            first_name, first = name, tensor
            continue
        if first is not None and tensor.device != first.device:
            raise RuntimeError(
                f"{op}: {first_name} and {name} must be on the same device, got {first.device} and {tensor.device}"
            )
        first_name, first = name, tensor
        if tensor.device.type not in ("cpu", "meta") and not (tensor.is_cuda and HAS_CUDA_KERNELS):
            built = "" if HAS_CUDA_KERNELS else "; this build of torchcnn has no CUDA kernels"
            raise NotImplementedError(f"{op}: device must be cpu or cuda, got {tensor.device}{built}")


def check_dtype(op, dtype, supported):
    if dtype not in supported:
        names = ", ".join(sorted(str(d).removeprefix("torch.") for d in supported))
        raise NotImplementedError(f"{op}: dtype must be one of {names}, got {str(dtype).removeprefix('torch.')}")


def batched(op, name, tensor):
    """The tensor with a batch dimension, and whether one had to be added."""
    if tensor.dim() == 4:
        return tensor, False
    if tensor.dim() == 3:
        return tensor.unsqueeze(0), True
    raise RuntimeError(
        f"{op}: {name} must have 4 dimensions (N, C, H, W), or 3 without a batch, got {tensor.dim()}: {list(tensor.shape)}"
    )


def stride_or_kernel(op, stride, kernel):
    """The stride of a pool as a pair; without one, that of the kernel."""
    return kernel if stride is None or (isinstance(stride, (tuple, list)) and not stride) else pair(op, "stride", stride)


def sliding_output_size(size, kernel, stride, pad, dilation, ceil_mode=False):
    """The formula of csrc/geometry.h, for fake tensors; the rules are checked there."""
    span = size + 2 * pad - dilation * (kernel - 1) - 1
    out = (span + (stride - 1 if ceil_mode else 0)) // stride + 1
    if ceil_mode and (out - 1) * stride >= size + pad:
        out = out - 1
    return out
