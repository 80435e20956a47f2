"""The public functions, gathered: ``torchcnn.functional`` is to torchcnn what ``torch.nn.functional`` is to torch."""

from torchcnn.conv import conv2d, conv2d_output_size, conv2d_parameter_count
from torchcnn.conv_transpose import conv_transpose2d
from torchcnn.pool import (
    adaptive_avg_pool2d,
    adaptive_max_pool2d,
    avg_pool2d,
    global_avg_pool2d,
    global_max_pool2d,
    max_pool2d,
    max_unpool2d,
    min_pool2d,
    pool2d_output_size,
    relu_max_pool2d,
)

__all__ = [
    "adaptive_avg_pool2d",
    "adaptive_max_pool2d",
    "avg_pool2d",
    "conv2d",
    "conv2d_output_size",
    "conv2d_parameter_count",
    "conv_transpose2d",
    "global_avg_pool2d",
    "global_max_pool2d",
    "max_pool2d",
    "max_unpool2d",
    "min_pool2d",
    "pool2d_output_size",
    "relu_max_pool2d",
]
