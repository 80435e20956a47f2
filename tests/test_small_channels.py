"""Convolution with few channels, vectorised over pixels or filters: geometries that cross tiles, bands, vectors and blocks."""

import itertools
import random

import pytest
import torch
import torch.nn.functional as F
from tiers import assert_bound, assert_exact, assert_no_worse_than_torch, small_integers

import torchcnn

DIRECTIONS = ("forward", "grad_input", "grad_weight")
# input (N, C, H, W), weight (K, C / groups, R, S), stride, padding, dilation, groups
GEOMETRIES = {
    "lenet": ((2, 1, 28, 28), (6, 1, 5, 5), 1, 2, 1, 1),
    "lenet_second": ((3, 6, 14, 14), (16, 6, 5, 5), 1, 0, 1, 1),
    "short_sum": ((2, 1, 28, 28), (32, 1, 3, 3), 1, 0, 1, 1),
    "first_layer": ((1, 3, 40, 45), (64, 3, 3, 3), 1, 1, 1, 1),
    "stem": ((1, 3, 64, 61), (20, 3, 7, 7), 2, 3, 1, 1),
    "long_sum": ((1, 3, 90, 83), (13, 3, 11, 11), 4, 2, 1, 1),
    "patchify_4": ((2, 3, 64, 48), (24, 3, 4, 4), 4, 0, 1, 1),
    "patchify_8": ((1, 3, 64, 72), (17, 3, 8, 8), 8, 0, 1, 1),
    "patchify_16": ((1, 2, 32, 160), (12, 2, 16, 16), 16, 0, 1, 1),
    "stride_3": ((2, 3, 31, 50), (9, 3, 5, 5), 3, 1, 1, 1),
    "ragged_stride": ((2, 2, 21, 71), (7, 2, 3, 4), (1, 4), (1, 3), 1, 1),
    "padding_beyond_the_kernel": ((2, 3, 6, 20), (5, 3, 3, 3), 1, 5, 1, 1),
    "tall_padding": ((1, 2, 3, 40), (4, 2, 7, 3), 1, (6, 1), 1, 1),
    "dilated": ((2, 3, 30, 34), (8, 3, 3, 3), (1, 2), 4, (3, 4), 1),
    "one_row": ((2, 3, 1, 70), (6, 3, 1, 9), 1, (0, 4), 1, 1),
    "one_column_filter": ((2, 3, 40, 9), (6, 3, 9, 1), 1, (4, 0), 1, 1),
    "eight_pixels": ((3, 4, 8, 8), (10, 4, 3, 3), 1, 1, 1, 1),
    "narrow_groups": ((2, 128, 14, 18), (128, 4, 3, 3), 1, 1, 1, 32),
    "groups_not_of_a_bundle": ((2, 21, 10, 20), (35, 3, 3, 3), 2, 1, 1, 7),
    "wide_groups": ((2, 48, 15, 22), (36, 16, 3, 3), 2, 1, 1, 3),
    "many_source_channels": ((1, 4, 30, 200), (90, 4, 5, 5), 1, 2, 1, 1),
    "few_filters": ((2, 70, 20, 33), (3, 70, 3, 3), 1, 1, 1, 1),
    "short_rows_in_blocks": ((2, 2, 200, 20), (5, 2, 4, 3), 1, 1, 1, 1),
    "short_rows_of_images": ((5, 3, 9, 11), (11, 3, 3, 3), 1, 1, (1, 2), 1),
    "strung_rows_of_groups": ((5, 24, 27, 28), (24, 8, 3, 3), 2, 1, 1, 3),
    "strung_rows_in_blocks": ((2, 8, 200, 27), (8, 8, 3, 3), (2, 1), 1, 1, 1),
    "strung_rows_three_apart": ((3, 9, 40, 42), (5, 9, 5, 4), (3, 2), 2, (2, 1), 1),
    "taps_beside_short_rows": ((2, 8, 14, 30), (8, 8, 3, 3), 1, (1, 6), (1, 7), 1),
    "filters": ((2, 3, 21, 40), (32, 3, 3, 3), 1, 1, 1, 1),
    "filters_beside_half_a_panel": ((2, 2, 17, 25), (48, 2, 5, 3), 2, (2, 1), 1, 1),
    "filters_of_groups": ((2, 12, 14, 13), (64, 3, 3, 3), 1, 1, 1, 4),
    "filters_and_a_long_sum": ((1, 3, 50, 207), (16, 3, 11, 11), (4, 1), 2, 1, 1),
    "filters_in_place": ((2, 3, 66, 51), (32, 3, 4, 4), 4, 0, 1, 1),
    "filters_in_place_of_strides": ((2, 3, 27, 32), (32, 3, 5, 5), (3, 2), 0, 1, 1),
    "filters_in_place_in_blocks": ((1, 3, 120, 420), (16, 3, 4, 3), (3, 2), 0, 1, 1),
    "filters_of_groups_without_padding": ((2, 12, 14, 13), (64, 3, 3, 2), (1, 2), 0, (2, 1), 4),
    "filters_padded_above": ((2, 3, 20, 40), (32, 3, 3, 3), 1, (1, 0), 1, 1),
    "filters_padded_beside": ((2, 3, 20, 40), (32, 3, 3, 3), 1, (0, 1), 1, 1),
    "filters_dilated": ((2, 5, 20, 20), (16, 5, 3, 4), (1, 2), 4, (3, 2), 1),
    "odd_everything": ((3, 19, 23, 47), (41, 19, 3, 2), 3, (2, 1), 1, 1),
}
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}


@pytest.fixture(params=LAYOUTS)
def memory_format(request):
    return LAYOUTS[request.param]


def results(conv2d, tensors, options):
    """(output, grad_input, grad_weight)"""
    input, weight, bias, grad_output = tensors
    input, weight = input.detach().requires_grad_(), weight.detach().requires_grad_()
    output = conv2d(input, weight, bias, *options)
    return (output.detach(), *torch.autograd.grad(output, (input, weight), grad_output))


def make_tensors(input_size, weight_size, options, make):
    output = F.conv2d(torch.empty(input_size, device="meta"), torch.empty(weight_size, device="meta"), None, *options)
    return [make(size) for size in (input_size, weight_size, weight_size[:1], output.shape)]


def move(tensors, dtype, memory_format):
    return [x.to(dtype).contiguous(memory_format=memory_format) if x.dim() == 4 else x.to(dtype) for x in tensors]


def check_exact(input_size, weight_size, options, dtype, memory_format):
    tensors = make_tensors(input_size, weight_size, options, small_integers)
    actual = results(torchcnn.functional.conv2d, move(tensors, dtype, memory_format), options)
    for direction, result, truth in zip(DIRECTIONS, actual, results(F.conv2d, tensors, options), strict=True):
        assert_exact(result, truth, direction)


def test_rule_sends_few_channels_here():
    """Else the tests below would say nothing about these kernels."""
    if torchcnn.isa() == "reference":
        pytest.skip("the reference row knows one algorithm")
    for channels_last in (False, True):
        lines = torchcnn.explain((2, 1, 28, 28), (6, 1, 5, 5), 1, 2, 1, 1, channels_last).splitlines()
        for direction in DIRECTIONS:
            assert any(line.split()[:2] == [direction, "small_channels"] for line in lines), lines
    for name, channels_last, directions in (
        ("filters", True, ("forward", "grad_weight")),
        ("filters_of_groups", True, ("forward", "grad_weight")),
        ("filters_and_a_long_sum", False, ("forward",)),
        ("filters_in_place", True, ("forward", "grad_weight")),
        ("filters_in_place_of_strides", True, ("forward", "grad_weight")),
        ("filters_in_place_of_strides", False, ("forward",)),
        ("filters_in_place_in_blocks", True, ("forward", "grad_weight")),
        ("filters_of_groups_without_padding", True, ("forward", "grad_weight")),
        ("filters_padded_above", True, ("forward", "grad_weight")),
        ("filters_padded_beside", True, ("forward", "grad_weight")),
    ):
        lines = torchcnn.explain(*GEOMETRIES[name], channels_last).splitlines()
        for direction in directions:
            assert any(line.startswith(direction) and "vectors of filters" in line for line in lines), lines


@pytest.mark.parametrize("name", GEOMETRIES)
def test_exact(name, dtype, memory_format):
    input_size, weight_size, *options = GEOMETRIES[name]
    check_exact(input_size, weight_size, options, dtype, memory_format)


def check_rounding(input_size, weight_size, options, memory_format):
    """Tiers 2 and 3, float32."""
    tensors = move(make_tensors(input_size, weight_size, options, torch.randn), torch.float32, memory_format)
    doubles = [x.double() for x in tensors]
    K, C, R, S = weight_size
    lengths = (C * R * S + 1, K // options[-1] * R * S, tensors[3].numel() // K)
    for direction, result, of_torch, truth, magnitude, length in zip(
        DIRECTIONS,
        results(torchcnn.functional.conv2d, tensors, options),
        results(F.conv2d, tensors, options),
        results(F.conv2d, doubles, options),
        results(F.conv2d, [x.abs() for x in doubles], options),
        lengths,
        strict=True,
    ):
        assert_bound(result, truth, magnitude, length, direction)
        assert_no_worse_than_torch(result, of_torch, truth, direction)


@pytest.mark.parametrize("name", GEOMETRIES)
def test_rounding(name, memory_format):
    input_size, weight_size, *options = GEOMETRIES[name]
    check_rounding(input_size, weight_size, options, memory_format)


@pytest.mark.parametrize("seed", range(8))
def test_random_sweep(seed, dtype, memory_format):
    """Kernels 1 to 11, strides 1 to 4, few channels and filters from 1 up, W from 1 up."""
    rng = random.Random(seed)
    for _ in range(6):
        groups = rng.choice([1, 1, 1, 2, 5, 18])
        C, K = (rng.randint(1, 4) if groups > 2 else rng.randint(1, 21) for _ in "CK")
        kernel = rng.randint(1, 11), rng.randint(1, 11)
        if rng.random() < 0.25:
            stride, padding, dilation = kernel, (0, 0), (1, 1)
        else:
            stride, padding, dilation = ((rng.randint(a, b), rng.randint(a, b)) for a, b in ((1, 4), (0, 6), (1, 2)))
        size = [
            max(rng.choice([1, 9, 17, 40, 75]), d * (k - 1) + 1 - 2 * p)
            for k, p, d in zip(kernel, padding, dilation, strict=True)
        ]
        options = (stride, padding, dilation, groups)
        check_exact((rng.randint(1, 3), C * groups, *size), (K * groups, C, *kernel), options, dtype, memory_format)


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_what_is_not_finite_stays_where_it_belongs(value, memory_format):
    """An input that no grad_output meets does not enter grad_weight, although vectors at the end of a row reach over it."""
    for W, C in itertools.product((10, 21, 37), (2, 9)):
        input, grad_output = torch.ones(1, C, 6, W), torch.ones(1, 4, 4, W - 2)
        input[:, :, 2, -1] = value  # tap column 2 alone sees the last column
        input, grad_output = (x.contiguous(memory_format=memory_format) for x in (input, grad_output))
        weight = torch.ones(4, C, 3, 3, requires_grad=True)
        (grad_weight,) = torch.autograd.grad(torchcnn.functional.conv2d(input, weight), weight, grad_output)
        assert (grad_weight[..., :2] == 4 * (W - 2)).all()
        assert not grad_weight[..., 2].isfinite().any()


@pytest.mark.parametrize("name", [name for name in GEOMETRIES if name.startswith(("strung", "short_rows", "lenet"))])
def test_what_scratch_memory_held_does_not_matter(name, memory_format):
    """Lanes of zeros meet what lies between rows: a NaN left there would send grad_weight to the general kernel, other bits."""
    input_size, weight_size, *options = GEOMETRIES[name]
    tensors = move(make_tensors(input_size, weight_size, options, torch.randn), torch.float32, memory_format)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)  # so that the same scratch memory is used again
        input, weight, bias, grad_output = tensors
        weight.requires_grad_()
        output = torchcnn.functional.conv2d(input, weight, bias, *options)
        (expected,) = torch.autograd.grad(output, weight, grad_output, retain_graph=True)
        N, C, H, W = input_size
        nans = make_tensors((N, C, 2 * H, 2 * W), weight_size, options, lambda size: torch.full(size, torch.nan))
        results(torchcnn.functional.conv2d, move(nans, torch.float32, memory_format), options)
        (actual,) = torch.autograd.grad(output, weight, grad_output)
        assert torch.equal(actual, expected)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("relu", [False, True])
def test_bias_and_relu(relu, dtype, memory_format):
    """Also through a tile (rows shorter than a vector, channels_last), and by vectors of filters, in one run and in several."""
    for W, K, C in ((9, 7, 3), (30, 7, 3), (9, 16, 3), (30, 48, 3), (30, 48, 9), (14, 16, 9)):
        input, weight, bias, _ = move(make_tensors((2, C, 9, W), (K, C, 3, 3), (1, 1), small_integers), dtype, memory_format)
        expected = F.conv2d(input.double(), weight.double(), bias.double(), 1, 1)
        actual = torchcnn.functional.conv2d(input, weight, bias, 1, 1, activation="relu" if relu else None)
        assert_exact(actual, expected.relu() if relu else expected)


@pytest.mark.parametrize(
    "name",
    [
        "lenet",
        "stem",
        "filters",
        "filters_in_place",
        "filters_in_place_in_blocks",
        "narrow_groups",
        "patchify_4",
        "many_source_channels",
        "few_filters",
        "strung_rows_of_groups",
    ],
)
def test_bits_do_not_depend_on_threads(name, memory_format):
    input_size, weight_size, *options = GEOMETRIES[name]
    tensors = move(make_tensors(input_size, weight_size, options, torch.randn), torch.float32, memory_format)
    threads = torch.get_num_threads()
    try:
        bits = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            bits.append(results(torchcnn.functional.conv2d, tensors, options))
    finally:
        torch.set_num_threads(threads)
    for other in bits[1:]:
        assert all(torch.equal(a, b) for a, b in zip(bits[0], other, strict=True))
