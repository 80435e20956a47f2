"""What a model consists of: a line for each layer, with its output, parameters, multiply-adds and algorithm.

The model runs once, on zeros. A dispatch mode sees every operator below the layers: torch's own count of floating-point
operations, to which torchcnn's operators are added here, and the arguments from which the algorithm of a convolution follows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

from torchcnn import _C
from torchcnn._autograd import TorchDispatchMode, is_channels_last

_ops = torch.ops.torchcnn


# A multiply-add counts as two operations, as torch has it. Every gradient of a convolution has as many as the convolution.
@register_flop_formula(_ops.conv2d)
def _(input: Any, weight: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return 2 * math.prod(out_shape) * math.prod(weight[1:])


@register_flop_formula([_ops.conv2d_grad_input, _ops.conv_transpose2d])
def _(grad_output: Any, weight: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return 2 * math.prod(grad_output) * math.prod(weight[1:])


@register_flop_formula(_ops.conv2d_grad_weight)
def _(grad_output: Any, input: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return 2 * math.prod(grad_output) * math.prod(out_shape[1:])


@register_flop_formula(_ops.conv2d_grad_weight_bias)
def _(grad_output: Any, input: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return 2 * math.prod(grad_output) * math.prod(out_shape[0][1:])  # additions alone do not count


class LayerSummary(NamedTuple):
    """A call of a layer."""

    name: str
    type: str
    output_size: tuple[int, ...]  # of the first tensor that it returns
    parameters: int  # that no earlier line has counted
    multiply_adds: int
    algorithm: str  # of the forward pass; empty for layers without a choice


class _Algorithms(TorchDispatchMode):
    """Notes the algorithm of each convolution of torchcnn, and the name of torch's."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func in (_ops.conv2d.default, _ops.conv_transpose2d.default) and output.is_cuda:
            self.names.append("cuda")
        elif func is _ops.conv2d.default:
            self.names.append(_algorithm("forward", args[0], args[1], args[3:10]))
        elif func is _ops.conv_transpose2d.default:
            self.names.append(_algorithm("grad_input", output, args[1], args[3:10]))
        elif func is torch.ops.aten.convolution.default:
            self.names.append("torch")
        return output


def _algorithm(direction: str, input: torch.Tensor, weight: torch.Tensor, options: Sequence[int]) -> str:
    stride, padding, dilation = (tuple(options[i : i + 2]) for i in (0, 2, 4))
    rows = _C.explain_conv2d(*input.shape, *weight.shape, stride, padding, dilation, options[6], is_channels_last(input, weight))
    return next(algorithm for name, algorithm, _reason in rows if name == direction)


def _first_size(output: Any) -> tuple[int, ...]:
    if isinstance(output, torch.Tensor):
        return tuple(output.shape)
    values = output.values() if isinstance(output, dict) else output if isinstance(output, (tuple, list)) else ()
    return next((size for size in map(_first_size, values) if size), ())


def summary(model: torch.nn.Module, input_size: Sequence[int] | Sequence[Sequence[int]]) -> list[LayerSummary]:
    """Print a line for each layer of a model, in the order in which they run, and the sums.

    Args:
        model: a ``torch.nn.Module``. It runs once, in eval mode and without gradients, on zeros of the dtype and device of its
            first floating-point parameter; its flags are then as before.
        input_size: the shape of its input, (N, C, H, W) for an image; or several shapes, for several inputs.

    Returns:
        The lines, as a list of `LayerSummary`. A layer that runs twice has two lines, its parameters in the first; what runs
        between layers counts in the sums that are printed alone.

    Raises:
        TypeError: no Module, or no shape.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"summary: model must be a torch.nn.Module, got {type(model).__name__}")
    given: list[Any] = list(input_size) if isinstance(input_size, (tuple, list)) else [None]
    sizes = [list(size) for size in given] if all(isinstance(size, (tuple, list)) for size in given) else [given]
    if not sizes or not all(isinstance(n, int) for size in sizes for n in size):
        raise TypeError(f"summary: input_size must be a shape or a sequence of shapes, got {input_size!r}")
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    inputs = [torch.zeros(size, dtype=like.dtype, device=like.device) for size in sizes]

    rows: list[LayerSummary] = []
    counted: set[int] = set()
    begun: list[tuple[int, int]] = []
    flops, algorithms = FlopCounterMode(display=False), _Algorithms()

    def begin(layer: torch.nn.Module, args: Any) -> None:
        begun.append((flops.get_total_flops(), len(algorithms.names)))

    def end(name: str, layer: torch.nn.Module, output: Any) -> None:
        flops_before, algorithms_before = begun.pop()
        new = {id(p): p.numel() for p in layer.parameters() if id(p) not in counted}
        counted.update(new)
        macs = (flops.get_total_flops() - flops_before) // 2
        chosen = ", ".join(dict.fromkeys(algorithms.names[algorithms_before:]))
        kind = parametrize.type_before_parametrizations(layer).__name__
        rows.append(LayerSummary(name, kind, _first_size(output), sum(new.values()), macs, chosen))

    training = {module: module.training for module in model.modules()}
    hooks = []
    for name, layer in model.named_modules():
        # What computes a parametrized weight belongs to the layer that uses it.
        parts = [part for part, _ in layer.named_children() if part != "parametrizations"]
        if not parts and "parametrizations" not in name.split("."):
            hooks.append(layer.register_forward_pre_hook(begin))
            hooks.append(layer.register_forward_hook(lambda layer, args, output, name=name: end(name, layer, output)))
    try:
        model.eval()
        with torch.no_grad(), flops, algorithms:
            model(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
        for module, flag in training.items():
            module.training = flag
    parameters = sum(p.numel() for p in model.parameters())
    print(_table(rows, parameters, flops.get_total_flops() // 2))
    return rows


def _table(rows: list[LayerSummary], parameters: int, multiply_adds: int) -> str:
    cells = [("layer", "output", "parameters", "multiply-adds", "algorithm")]
    for row in rows:
        layer = f"{row.name} {row.type}".strip()
        output = " x ".join(map(str, row.output_size))
        cells.append((layer, output, f"{row.parameters:,}", f"{row.multiply_adds:,}", row.algorithm))
    cells.append(("sum", "", f"{parameters:,}", f"{multiply_adds:,}", ""))
    widths = [max(len(line[column]) for line in cells) for column in range(5)]
    return "\n".join(
        f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c:>{widths[2]}}  {d:>{widths[3]}}  {e}".rstrip() for a, b, c, d, e in cells
    )
