"""Worked examples as courses, books and papers on convolutional networks compute them by hand."""

import numpy as np
import pytest
import torch

import torchcnn
from torchcnn.functional import (
    adaptive_avg_pool2d,
    avg_pool2d,
    conv2d,
    conv2d_output_size,
    conv2d_parameter_count,
    max_pool2d,
    min_pool2d,
    pool2d_output_size,
)


def plane(rows):
    """A tensor 1 x 1 x H x W of the rows given."""
    return torch.tensor(rows, dtype=torch.float32)[None, None]


def test_vertical_edges_of_a_small_image():
    """A 2x2 kernel over a 4x4 input gives 3x3 outputs; it answers to what changes from left to right."""
    kernel = plane([[-1, 1], [-1, 1]])
    image = plane([[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0]])
    assert conv2d(image, kernel)[0, 0].tolist() == [[0, -2, 0]] * 3
    assert conv2d(plane([[1, 1], [1, 1]]), kernel).item() == 0
    assert conv2d(plane([[1, 0], [1, 0]]), kernel).item() == -2
    assert conv2d_output_size(4, 2) == (3, 3)


def test_horizontal_edges():
    """The filter answers where dark lies above bright, and not at all inside even regions."""
    kernel = plane([[-1, -1, -1], [0, 0, 0], [1, 1, 1]])
    image = plane([[0] * 6] * 3 + [[10] * 6] * 3)
    assert conv2d(image, kernel)[0, 0].tolist() == [[0] * 4, [30] * 4, [30] * 4, [0] * 4]
    assert not conv2d(image.mT, kernel).any()
    assert conv2d(image.flip(2), kernel)[0, 0].tolist() == [[0] * 4, [-30] * 4, [-30] * 4, [0] * 4]


@pytest.mark.parametrize("stride, side", [(1, 3), (2, 2)])
def test_five_by_five_input(stride, side):
    """A 5x5 input and a 3x3 filter give 3x3 at stride 1 and 2x2 at stride 2."""
    image = torch.arange(25.0).view(1, 1, 5, 5)
    output = conv2d(image, torch.ones(1, 1, 3, 3), stride=stride)
    assert output.shape == (1, 1, side, side)
    assert conv2d_output_size(5, 3, stride) == (side, side)
    centres = image[0, 0, 1:4:stride, 1:4:stride]  # a 3x3 sum over a linear ramp is nine times its centre
    assert torch.equal(output[0, 0], 9 * centres)


def test_padding_keeps_the_size():
    """32, kernel 3, stride 1, padding 1 gives 32."""
    assert conv2d_output_size(32, 3, 1, 1) == (32, 32)
    assert conv2d(torch.zeros(1, 1, 32, 32), torch.zeros(1, 1, 3, 3), padding=1).shape == (1, 1, 32, 32)
    assert conv2d(torch.zeros(1, 1, 32, 32), torch.zeros(1, 1, 3, 3), padding="same").shape == (1, 1, 32, 32)


def test_pools_of_two_by_two():
    """[[1, 3], [2, 4]]: the maximum is 4, the average 2.5, the minimum 1."""
    window = plane([[1, 3], [2, 4]])
    assert max_pool2d(window, 2).item() == 4
    assert avg_pool2d(window, 2).item() == 2.5
    assert min_pool2d(window, 2).item() == 1


def test_max_pooling_of_a_four_by_four_input():
    image = plane([[1, 1, 2, 4], [5, 6, 7, 8], [3, 2, 1, 0], [1, 2, 3, 4]])
    output, indices = max_pool2d(image, 2, return_indices=True)
    assert output[0, 0].tolist() == [[6, 8], [3, 4]]
    assert indices[0, 0].tolist() == [[5, 7], [8, 15]]
    assert avg_pool2d(image, 2)[0, 0].tolist() == [[3.25, 5.25], [2, 2]]


def test_gradient_of_the_pools():
    """Max pooling passes the gradient to the winner alone; average pooling spreads it evenly."""
    image = plane([[1, 3], [2, 4]]).requires_grad_()
    for pool2d, gradient in (
        (max_pool2d, [[0, 0], [0, 8]]),
        (min_pool2d, [[8, 0], [0, 0]]),
        (avg_pool2d, [[2, 2], [2, 2]]),
    ):
        assert torch.autograd.grad(8 * pool2d(image, 2).sum(), image)[0][0, 0].tolist() == gradient


def test_three_convolutions_and_two_pools():
    """32 x 32 x 3 through 32, 64 and 64 filters of 3 x 3 and two pools ends in 4 x 4 x 64 = 1024 features."""
    network = torch.nn.Sequential(
        torchcnn.Conv2d(3, 32, 3),
        torchcnn.MaxPool2d(2),
        torchcnn.Conv2d(32, 64, 3),
        torchcnn.MaxPool2d(2),
        torchcnn.Conv2d(64, 64, 3),
        torch.nn.Flatten(),
    )
    x, sides = torch.zeros(1, 3, 32, 32), []
    for layer in network:
        x = layer(x)
        sides.append(x.shape[-1])
    assert sides == [30, 15, 13, 6, 4, 1024]
    assert [sum(p.numel() for p in network[i].parameters()) for i in (0, 2, 4)] == [896, 18496, 36928]


@pytest.mark.parametrize(
    "arguments, count",
    [
        ((3, 50, 3), 1400),  # fifty 3 x 3 x 3 filters
        ((1, 6, 5), 156),  # LeNet-5, C1
        ((6, 16, 5), 2416),  # its C3, fully connected
        ((3, 96, 11), 34944),  # AlexNet
        ((3, 64, 3), 1792),  # VGG
        ((64, 64, 3, False), 36864),  # ResNet, no bias before batch normalisation
        ((32, 32, 3, False, 32), 288),  # MobileNet, depthwise
    ],
)
def test_parameter_count(arguments, count):
    assert conv2d_parameter_count(*arguments) == count
    names = ("in_channels", "out_channels", "kernel_size", "bias", "groups")
    layer = torchcnn.Conv2d(**dict(zip(names, arguments, strict=False)))
    assert sum(parameter.numel() for parameter in layer.parameters()) == count


@pytest.mark.parametrize(
    "size, kernel, stride, padding, output",
    [
        (227, 11, 4, 0, 55),  # AlexNet, first layer
        (224, 7, 2, 3, 112),  # ResNet, first layer
        (224, 16, 16, 0, 14),  # vision transformer, patches
        (28, 5, 1, 2, 28),  # LeNet-5 on MNIST
        (7, 3, 2, 0, 3),
        (6, 3, 2, 0, 2),  # the last column is not reached
    ],
)
def test_sizes_of_well_known_layers(size, kernel, stride, padding, output):
    assert conv2d_output_size(size, kernel, stride, padding) == (output, output)


def test_sizes_of_well_known_pools():
    assert pool2d_output_size(55, 3, 2) == (27, 27)  # AlexNet, overlapping
    assert pool2d_output_size(112, 3, 2, 1) == (56, 56)  # ResNet
    assert pool2d_output_size(112, 3, 2, ceil_mode=True) == (56, 56)  # GoogLeNet
    assert adaptive_avg_pool2d(torch.zeros(1, 2, 7, 7), 1).shape == (1, 2, 1, 1)  # any image size to one vector


def test_several_channels_add_up():
    """Three channels, one filter: products over all channels and one bias, the sum -25."""
    image = torch.stack([plane([[156, 155], [153, 154]])[0, 0], plane([[167, 166], [160, 162]])[0, 0]])[None]
    weight = torch.stack([plane([[-1, -1], [0, 1]])[0, 0], plane([[1, 0], [1, -1]])[0, 0]])[None]
    expected = (-156 - 155 + 154) + (167 + 160 - 162) + 1
    assert conv2d(image, weight, torch.ones(1)).item() == expected == 9


def test_backward_by_hand():
    """dW is the correlation of the input with dZ, dA the full correlation of dZ with the flipped filter, db the sum of dZ."""
    image = plane([[1, 2, 3], [4, 5, 6], [7, 8, 9]]).requires_grad_()
    weight = plane([[1, 0], [-1, 2]]).requires_grad_()
    bias = torch.zeros(1, requires_grad=True)
    output = conv2d(image, weight, bias)
    assert output[0, 0].tolist() == [[7, 9], [13, 15]]
    output.backward(plane([[1, 0], [0, 2]]))
    assert weight.grad[0, 0].tolist() == [[1 + 2 * 5, 2 + 2 * 6], [4 + 2 * 8, 5 + 2 * 9]]
    assert image.grad[0, 0].tolist() == [[1, 0, 0], [-1, 2 + 2, 0], [0, -2, 4]]
    assert bias.grad.tolist() == [3]
    arrays = [tensor.detach().numpy() for tensor in (image, weight)]
    gradients = torchcnn.reference.conv2d_backward(np.array([[[[1, 0], [0, 2]]]], np.float32), *arrays)
    for array, tensor in zip(gradients, (image, weight, bias), strict=True):
        np.testing.assert_array_equal(array, tensor.grad)
