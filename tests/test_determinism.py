"""The same bits for any number of threads, and on every run: no reduction depends on how the work was split."""

import pytest
import torch

from torchcnn import functional

CONV2D = {  # large enough to be split among threads in every direction
    "dense": ((4, 32, 28, 30), (48, 32, 3, 3), {"padding": 1}),
    "first_layer": ((8, 3, 64, 62), (32, 3, 7, 7), {"stride": 2, "padding": 3}),
    "one_image": ((1, 64, 30, 31), (64, 64, 3, 3), {"padding": 1}),
    "few_channels": ((2, 2, 150, 151), (3, 2, 3, 3), {}),
    "pointwise": ((3, 96, 20, 21), (80, 96, 1, 1), {}),
    "patches": ((3, 20, 46, 44), (48, 20, 2, 2), {"stride": 2}),
    "strided_dilated": ((3, 24, 41, 40), (20, 24, 3, 3), {"stride": 2, "dilation": 2, "padding": 1}),
    "grouped": ((3, 32, 24, 25), (64, 8, 3, 3), {"groups": 4, "padding": 1}),
    "small_groups": ((5, 64, 15, 28), (64, 8, 3, 3), {"groups": 8, "stride": 2, "padding": 1}),
    "depthwise": ((4, 48, 33, 34), (48, 1, 5, 5), {"groups": 48, "padding": 2}),
    "depthwise_planes": ((9, 70, 14, 14), (70, 1, 3, 3), {"groups": 70, "padding": 1}),
}

POOLS = {
    "max": lambda x: functional.max_pool2d(x, 3, 2, 1),
    "max_gathered": lambda x: functional.max_pool2d(torch.cat((x, x), 3), 3, 2, 1),
    "max_around": lambda x: functional.max_pool2d(x, 3, 1, 1),
    "max_overlapping": lambda x: functional.max_pool2d(x, 5, 1, 2, return_indices=True)[0],
    "max_dilated": lambda x: functional.max_pool2d(x, 3, 1, 1, 2),
    "min": lambda x: functional.min_pool2d(x, 2),
    "avg": lambda x: functional.avg_pool2d(x, 3, 2, 1),
    "avg_overlapping": lambda x: functional.avg_pool2d(x, 5, 1, 2, count_include_pad=False),
    "adaptive_avg": lambda x: functional.adaptive_avg_pool2d(x, (7, 9)),
    "adaptive_max": lambda x: functional.adaptive_max_pool2d(x, (7, 9)),
    "global_avg": functional.global_avg_pool2d,
    "global_max": functional.global_max_pool2d,
}


def with_gradients(operator, *inputs):
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    output = operator(*inputs)
    torch.manual_seed(5)
    return output, *torch.autograd.grad(output, inputs, torch.randn(output.shape, dtype=output.dtype).to(output.device))


def assert_same_bits(operator, inputs, threads):
    results = []
    for count in (1, 2, 3, 8, 1):
        threads(count)
        results.append(with_gradients(operator, *inputs))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("name", CONV2D)
def test_conv2d(name, dtype, memory_format, threads):
    input_size, weight_size, options = CONV2D[name]
    input = torch.randn(input_size, dtype=dtype).contiguous(memory_format=memory_format)
    weight, bias = torch.randn(weight_size, dtype=dtype), torch.randn(weight_size[0], dtype=dtype)
    assert_same_bits(lambda *inputs: functional.conv2d(*inputs, **options), (input, weight, bias), threads)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("name", POOLS)
def test_pools(name, dtype, memory_format, threads, device):
    input = torch.randn(5, 40, 37, 38, dtype=dtype).to(device).contiguous(memory_format=memory_format)
    assert_same_bits(POOLS[name], (input,), threads)


def test_unpooling(threads, device):
    pooled, indices = functional.max_pool2d(torch.randn(5, 40, 60, 60).to(device), 2, return_indices=True)
    assert_same_bits(lambda pooled: functional.max_unpool2d(pooled, indices, 2), (pooled,), threads)


def test_an_image_does_not_depend_on_its_batch():
    """Forward and grad_input of one image alone have the bits that they have among others."""
    weight, bias = torch.randn(24, 16, 3, 3), torch.randn(24)
    batch = torch.randn(7, 16, 19, 18)

    def forward_and_grad_input(images):
        return with_gradients(lambda x: functional.conv2d(x, weight, bias, padding=1), images)[0], torch.autograd.grad(
            functional.conv2d(leaf := images.clone().requires_grad_(), weight, bias, padding=1).sum(), leaf
        )[0]

    together = forward_and_grad_input(batch)
    for n in (0, 3, 6):
        alone = forward_and_grad_input(batch[n : n + 1])
        assert all(torch.equal(a[n : n + 1], b) for a, b in zip(together, alone, strict=True))
