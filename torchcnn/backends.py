"""What runs underneath: the instruction set in use, the algorithm that a geometry takes, the switch for Winograd, scratch memory.

`torchcnn.backends.allow_winograd` is a bool to read and to assign, True at import, of the whole process. Where it is True,
3x3 and 5x5 convolutions of stride 1, those of stride 1 with 3, 5 or 7 taps along one axis, and 3x3 ones of stride 2, with enough
channels, and first layers (at most 16 channels, stride 2 and above, 3 or 4 taps for each step of it: 7x7 of stride 2, 11x11 of
stride 4) use Winograd's algorithm: up to four times fewer multiplications, and an error bounded by the largest input near an
output instead of the inputs that the output is made of, so that outputs beside a much larger value lose relative accuracy. Where
it is False, they are direct sums, as in torch's own error bound.

`torchcnn.backends.workspace_limit` is the number of bytes of scratch memory that each thread may keep between operators, 64 MiB
at import, of the whole process. An operator that needs more gives the rest back at its end.

On a GPU, float32 convolutions use TF32 where torch's own switch `torch.backends.cudnn.conv.fp32_precision` says "tf32".
"""

import contextlib
import os
import platform
import sys
import types
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from torchcnn import _C
from torchcnn._arguments import Pair, integer, pair
from torchcnn._autograd import has_kernel


def isa() -> str:
    """Name of the row of CPU kernels in use; the environment variable TORCHCNN_ISA, read at import, forces one of `isas`."""
    return _C.isa()


def isas() -> list[str]:
    """Names of the rows of CPU kernels that this machine can run, from the plainest to the best."""
    return _C.isas()


def explain(
    input_size: Sequence[int],
    weight_size: Sequence[int],
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
    channels_last: bool = False,
) -> str:
    """Which algorithm a convolution takes in each direction, and why.

    Args:
        input_size: (N, C, H, W).
        weight_size: (K, C / groups, R, S).
        stride, padding, dilation, groups: as in `torchcnn.functional.conv2d`.
        channels_last: whether the tensors are in that layout.

    Returns:
        A text of three lines: forward, grad_input, grad_weight.

    Raises:
        ValueError: sizes that do not fit each other.
        TypeError: a tensor in the place of its size, or an argument of the wrong kind.
    """
    op = "explain"
    for name, size in (("input_size", input_size), ("weight_size", weight_size)):
        if isinstance(size, torch.Tensor):
            raise TypeError(f"{op}: {name} must be 4 ints, got a tensor; its size is {tuple(size.shape)}")
        if len(size) != 4:
            raise ValueError(f"{op}: {name} must have 4 elements, got {len(size)}: {tuple(size)}")
    rows = _C.explain_conv2d(
        *(integer(op, "input_size", size) for size in input_size),
        *(integer(op, "weight_size", size) for size in weight_size),
        pair(op, "stride", stride),
        pair(op, "padding", padding),
        pair(op, "dilation", dilation),
        integer(op, "groups", groups),
        channels_last,
    )
    return "\n".join(f"{direction:11} {algorithm} ({isa()}): {reason}" for direction, algorithm, reason in rows)


def show_config() -> str:
    """What is installed and in use, as text: for a bug report. As ``torch.__config__.show()``."""
    import torchcnn  # complete by now

    forced = os.environ.get("TORCHCNN_ISA")
    lines = (
        f"torchcnn {torchcnn.__version__}",
        f"torch {torch.__version__} (any from 2.10 on), Python {platform.python_version()}, {platform.machine()}",
        f"CPU kernels: {isa()}{' (TORCHCNN_ISA)' if forced else ''}; this machine can run {', '.join(isas())}",
        f"CUDA kernels: {'yes' if has_kernel('torchcnn::conv2d', 'CUDA') else 'no'}",
        f"threads: {torch.get_num_threads()}",
        f"allow_winograd: {_C.allow_winograd()}",
    )
    return "\n".join(lines)


@contextlib.contextmanager
def flags(allow_winograd: bool) -> Iterator[None]:
    """Within it, `torchcnn.backends.allow_winograd` has the given value; then the former one again."""
    former = _C.allow_winograd()
    _C.set_allow_winograd(allow_winograd)
    try:
        yield
    finally:
        _C.set_allow_winograd(former)


def workspace_size() -> int:
    """Bytes of scratch memory that all threads hold now."""
    return _C.workspace_size()


def release_workspaces() -> None:
    """Give back the scratch memory of the calling thread and of the threads that work for it; it comes back as needed."""
    _C.release_workspaces()


def _tf32_is_allowed() -> bool:
    """Whether a float32 convolution on a GPU may round its factors to TF32; as torch has it, that is so unless switched off."""
    return getattr(torch.backends.cudnn, "conv").fp32_precision == "tf32"  # noqa: B009  (mypy does not see it)


# A module has no properties of its own; its class may.
if TYPE_CHECKING:
    allow_winograd: bool
    workspace_limit: int


class _Backends(types.ModuleType):
    @property
    def allow_winograd(self):
        return _C.allow_winograd()

    @allow_winograd.setter
    def allow_winograd(self, allow):
        _C.set_allow_winograd(allow)

    @property
    def workspace_limit(self):
        return _C.workspace_limit()

    @workspace_limit.setter
    def workspace_limit(self, bytes):
        if not isinstance(bytes, int) or isinstance(bytes, bool):
            raise TypeError(f"workspace_limit: must be an int, a number of bytes, got {bytes!r}")
        if bytes < 0:
            raise ValueError(f"workspace_limit: must not be negative, got {bytes}")
        _C.set_workspace_limit(bytes)


sys.modules[__name__].__class__ = _Backends
