"""A program that uses the public names as a typed one does; `make lint` checks it with mypy --strict. Nobody runs it."""

from typing import Any

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor
from typing_extensions import assert_type

import torchcnn
import torchcnn.functional as F

x, w = torch.zeros(1, 4, 8, 8), torch.zeros(4, 4, 3, 3)

assert_type(F.conv2d(x, w, None, stride=1, padding="same", dilation=(1, 1), groups=1, activation="relu"), Tensor)
assert_type(F.conv_transpose2d(x, w, w[:, 0, 0, 0], 2, (1, 1), output_padding=[1, 0]), Tensor)
assert_type(F.max_pool2d(x, 2), Tensor)
assert_type(F.max_pool2d(x, (2, 2), return_indices=False), Tensor)
assert_type(F.max_pool2d(x, 2, 2, 0, 1, False, return_indices=True), tuple[Tensor, Tensor])
assert_type(F.min_pool2d(x, 2), Tensor)
assert_type(F.min_pool2d(x, 2, return_indices=True)[1], Tensor)
assert_type(F.relu_max_pool2d(x, 2, stride=[2, 2]), Tensor)
assert_type(F.avg_pool2d(x, 2, count_include_pad=False, divisor_override=3), Tensor)
assert_type(F.adaptive_avg_pool2d(x, (None, 2)), Tensor)
assert_type(F.adaptive_max_pool2d(x, 1), Tensor)
assert_type(F.adaptive_max_pool2d(x, 1, True), tuple[Tensor, Tensor])
assert_type(F.global_avg_pool2d(x), Tensor)
assert_type(F.global_max_pool2d(x), Tensor)
assert_type(F.max_unpool2d(x, x.long(), 2, output_size=(16, 16)), Tensor)
assert_type(F.conv2d_output_size((8, 8), 3, padding="same"), tuple[int, int])
assert_type(F.pool2d_output_size(8, 3), tuple[int, int])
assert_type(F.conv2d_parameter_count(4, 4, (3, 3), bias=False), int)


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = torchcnn.Conv2d(4, 8, 3, padding="same", init="kaiming", activation="relu")
        self.filled = torchcnn.Conv2d(8, 8, 3, init=lambda weight: weight.fill_(1))
        self.up = torchcnn.ConvTranspose2d(8, 4, 2, stride=2)
        self.pools = torch.nn.Sequential(
            torchcnn.MaxPool2d(2),
            torchcnn.MinPool2d(2),
            torchcnn.AvgPool2d(2),
            torchcnn.AdaptiveAvgPool2d((None, 2)),
            torchcnn.AdaptiveMaxPool2d(1),
            torchcnn.GlobalAvgPool2d(),
            torchcnn.GlobalMaxPool2d(),
        )
        self.unpool = torchcnn.MaxUnpool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.pools(self.up(self.filled(self.conv(x))))
        return y


net = Net()
assert_type(torchcnn.convert(net, inplace=True, inverse=False), Net)
assert_type(net.up.forward(x, output_size=[16, 16]), Tensor)
assert_type(torchcnn.summary(net, (1, 4, 64, 64)), list[torchcnn.LayerSummary])
assert_type(torchcnn.summary(net, [(1, 4, 64, 64)])[0].multiply_adds, int)
assert_type(torchcnn.isa(), str)
assert_type(torchcnn.isas(), list[str])
assert_type(torchcnn.explain(x.shape, w.shape, padding=1), str)
assert_type(torchcnn.show_config(), str)
assert_type(torchcnn.__version__, str)
assert_type(torchcnn.backends.allow_winograd, bool)
with torchcnn.backends.flags(allow_winograd=False):
    pass
torchcnn.backends.workspace_limit = 1 << 20
assert_type(torchcnn.backends.workspace_size(), int)
torchcnn.backends.release_workspaces()
assert_type(torchcnn.Conv2dFunction.apply(x, w, None, (1, 1), (0, 0), (1, 1), 1), Tensor)
assert_type(torchcnn.MaxPool2dFunction.apply(x, (2, 2), (2, 2), (0, 0), (1, 1), False), tuple[Tensor, Tensor])
assert_type(torchcnn.AvgPool2dFunction.apply(x, (2, 2), (2, 2), (0, 0), False, True, None), Tensor)
array = numpy.zeros((1, 4, 8, 8))
assert_type(torchcnn.numpy.conv2d(array, numpy.zeros((4, 4, 3, 3)), padding=(1, 1)), NDArray[Any])
assert_type(torchcnn.numpy.max_pool2d(array, 2, stride=None), tuple[NDArray[Any], NDArray[Any]])
assert_type(torchcnn.reference.conv2d(array, numpy.zeros((4, 4, 3, 3)), stride=(1, 2)), NDArray[Any])
assert_type(torchcnn.reference.max_pool2d(array, 2), tuple[NDArray[Any], NDArray[Any]])
assert_type(torchcnn.reference.conv2d_output_size((8, 8), 3), tuple[int, int])
