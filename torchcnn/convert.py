"""Layers of a model swapped for their namesakes: torch.nn's for torchcnn's, and back.

Only the class of a layer changes, from one that has a forward to one that has another: the object stays, and with it whatever
hangs on it or refers to it (parameters that an optimizer holds, hooks, buffers, the training flag, other places of the model).
"""

import copy
from typing import TypeVar

import torch
from torch.nn.utils import parametrize

from torchcnn.conv import Conv2d
from torchcnn.conv_transpose import ConvTranspose2d
from torchcnn.pool import (
    AdaptiveAvgPool2d,
    AdaptiveMaxPool2d,
    AvgPool2d,
    GlobalAvgPool2d,
    GlobalMaxPool2d,
    MaxPool2d,
    MaxUnpool2d,
    MinPool2d,
)

Model = TypeVar("Model", bound=torch.nn.Module)

_NAMESAKES = (AdaptiveAvgPool2d, AdaptiveMaxPool2d, AvgPool2d, Conv2d, ConvTranspose2d, MaxPool2d, MaxUnpool2d)
_TO_OURS: dict[type, type] = {getattr(torch.nn, ours.__name__): ours for ours in _NAMESAKES}
_TO_TORCHS: dict[type, type] = {
    **{ours: torchs for torchs, ours in _TO_OURS.items()},
    GlobalAvgPool2d: torch.nn.AdaptiveAvgPool2d,
    GlobalMaxPool2d: torch.nn.AdaptiveMaxPool2d,
}


def convert(model: Model, inplace: bool = False, inverse: bool = False) -> Model:
    """Make the convolution and pooling layers of a torch.nn model those of torchcnn, or (`inverse`) the other way round.

    Layers whose type is exactly one of torch.nn's Conv2d, ConvTranspose2d, MaxPool2d, AvgPool2d, AdaptiveAvgPool2d,
    AdaptiveMaxPool2d and MaxUnpool2d change; subclasses that others made of them, and everything else, stay as they are. A
    layer keeps its parameters, hooks, parametrizations, training flag and place, also if it has several places; the names in
    state_dict stay the same, so that state_dicts are exchanged between model and result in both directions.

    Args:
        model: a ``torch.nn.Module``; it may itself be such a layer.
        inplace: change `model` itself instead of a deep copy; an optimizer that holds its parameters goes on working.
        inverse: from torchcnn to torch.nn, for tools that know only those layers. GlobalAvgPool2d and GlobalMaxPool2d become
            adaptive pools of output size 1.

    Returns:
        The converted model.

    Raises:
        TypeError: `model` is no Module.
        ValueError: with `inverse`, a layer that torch.nn does not have: MinPool2d, or Conv2d with an activation. Nothing has
            changed by then.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"convert: model must be a torch.nn.Module, got {type(model).__name__}")
    if inverse:
        _require_inverse(model)
    if not inplace:
        model = copy.deepcopy(model)
    classes = _TO_TORCHS if inverse else _TO_OURS
    for layer in model.modules():
        target = classes.get(parametrize.type_before_parametrizations(layer))
        if target is None:
            continue
        if isinstance(layer, GlobalAvgPool2d):
            vars(layer).update(output_size=1)
        elif isinstance(layer, GlobalMaxPool2d):
            vars(layer).update(output_size=1, return_indices=False)
        elif inverse and isinstance(layer, Conv2d) and vars(layer).pop("_has_options", False):
            del layer.init, layer.activation
        layer.__class__ = _parametrized(type(layer), target) if parametrize.is_parametrized(layer) else target
    return model


def _require_inverse(model: torch.nn.Module) -> None:
    for name, layer in model.named_modules():
        kind = parametrize.type_before_parametrizations(layer)
        lacking = (
            "MinPool2d"
            if kind is MinPool2d
            else f"Conv2d with activation={layer.activation!r}"
            if kind is Conv2d and layer._has_options and layer.activation is not None
            else None
        )
        if lacking:
            raise ValueError(
                f"convert: torch.nn must have the layer, but it has no {lacking}, got one at {repr(name) if name else 'the root'}"
            )


def _parametrized(cls: type, base: type) -> type:
    """The class that register_parametrization made of a layer's class, remade on `base`: it holds the parametrized properties."""
    made_for_cls = ("__dict__", "__doc__", "__module__", "__weakref__")
    return type(f"Parametrized{base.__name__}", (base,), {k: v for k, v in vars(cls).items() if k not in made_for_cls})
