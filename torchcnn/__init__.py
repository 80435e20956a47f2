"""Convolution and pooling for PyTorch, with hand-written kernels: ``torchcnn.Conv2d`` in the place of ``torch.nn.Conv2d``."""

import torch  # noqa: F401  (its libraries must be loaded before torchcnn._C)

from torchcnn import backends, functional, numpy, reference
from torchcnn._pool_rules import AvgPool2dFunction, MaxPool2dFunction
from torchcnn.backends import explain, isa, isas, show_config
from torchcnn.conv import Conv2d, Conv2dFunction
from torchcnn.conv_transpose import ConvTranspose2d
from torchcnn.convert import convert
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
from torchcnn.summary import LayerSummary, summary

__version__ = "0.1.0"

__all__ = [
    "AdaptiveAvgPool2d",
    "AdaptiveMaxPool2d",
    "AvgPool2d",
    "AvgPool2dFunction",
    "Conv2d",
    "Conv2dFunction",
    "ConvTranspose2d",
    "GlobalAvgPool2d",
    "GlobalMaxPool2d",
    "LayerSummary",
    "MaxPool2d",
    "MaxPool2dFunction",
    "MaxUnpool2d",
    "MinPool2d",
    "backends",
    "convert",
    "explain",
    "functional",
    "isa",
    "isas",
    "numpy",
    "reference",
    "show_config",
    "summary",
]
