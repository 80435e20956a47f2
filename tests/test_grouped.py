"""Groups of 2, 4, 8 and 16 channels whose lanes change places: geometries that cross tiles, strips, blocks and vectors.

Vectors hold 2 to 16 channels, so a group is a part of one or several; a register tile is 8 or 14 pixels of a row (4 in
grad_weight), a strip of grad_weight about 256 pixels.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from test_small_channels import DIRECTIONS, LAYOUTS, check_exact, check_rounding, make_tensors, move, results
from tiers import assert_exact, small_integers

import torchcnn

# input (N, C, H, W), weight (K, C / groups, 3, 3), stride, padding, dilation, groups
GEOMETRIES = {
    "pairs": ((2, 32, 9, 10), (32, 2, 3, 3), 1, 1, 1, 16),
    "fours": ((2, 48, 14, 14), (48, 4, 3, 3), 1, 1, 1, 12),
    "eights": ((3, 64, 7, 7), (64, 8, 3, 3), 1, 1, 1, 8),
    "sixteens": ((2, 64, 5, 6), (64, 16, 3, 3), 2, 1, 1, 4),
    "half_a_vector": ((2, 56, 8, 9), (56, 8, 3, 3), 1, 1, 1, 7),
    "an_eighth_of_a_vector": ((1, 114, 6, 13), (114, 2, 3, 3), 1, 1, 1, 57),
    "one_pixel": ((3, 16, 1, 1), (16, 4, 3, 3), 1, 1, 1, 4),
    "one_row": ((2, 32, 1, 15), (32, 8, 3, 3), 1, 1, 1, 4),
    "one_column": ((2, 32, 20, 1), (32, 4, 3, 3), 1, 1, 1, 8),
    "no_padding": ((2, 32, 11, 16), (32, 8, 3, 3), 1, 0, 1, 4),
    "a_tile_and_one": ((1, 32, 5, 9), (32, 8, 3, 3), 1, 1, 1, 4),
    "a_long_tile_and_one": ((1, 32, 5, 15), (32, 8, 3, 3), 1, 1, 1, 4),
    "long_rows": ((1, 16, 4, 301), (16, 8, 3, 3), 2, 1, 1, 2),
    "strips": ((1, 32, 90, 28), (32, 4, 3, 3), 2, 1, 1, 8),
    "stride_2": ((2, 32, 28, 29), (32, 8, 3, 3), 2, 1, 1, 4),
    "stride_2_odd": ((2, 32, 27, 30), (32, 8, 3, 3), 2, 0, 1, 4),
    "pairs_stride_2": ((2, 32, 14, 41), (32, 2, 3, 3), 2, 1, 1, 16),
    "fours_stride_3": ((1, 32, 20, 61), (32, 4, 3, 3), 3, 1, 1, 8),
    "eights_of_long_rows": ((1, 32, 5, 40), (32, 8, 3, 3), 1, 1, 1, 4),
    "sixteens_stride_2": ((2, 32, 19, 30), (32, 16, 3, 3), 2, 1, 1, 2),
    "stride_3": ((2, 32, 17, 19), (32, 8, 3, 3), 3, 1, 1, 4),
    "stride_4": ((2, 48, 18, 21), (48, 2, 3, 3), 4, 2, 1, 24),
    "stride_mixed": ((2, 32, 17, 18), (32, 8, 3, 3), (1, 2), 1, 1, 4),
    "stride_mixed_tall": ((2, 64, 17, 14), (64, 16, 3, 3), (3, 1), (0, 1), 1, 4),
    "padding_beyond_the_filter": ((2, 32, 4, 3), (32, 4, 3, 3), 1, 5, 1, 8),
    "padding_of_one_axis": ((2, 32, 6, 7), (32, 8, 3, 3), 2, (0, 4), 1, 4),
}


def direction_of(lines):
    return {line.split()[0]: line.split()[1] for line in lines.splitlines() if line.startswith(DIRECTIONS)}


def test_rule_sends_small_groups_here():
    """Else the tests below would say nothing about these kernels."""
    if torchcnn.isa() == "reference":
        pytest.skip("the reference row knows one algorithm")
    for geometry in GEOMETRIES.values():
        assert set(direction_of(torchcnn.explain(*geometry, True)).values()) == {"grouped"}, geometry
    assert set(direction_of(torchcnn.explain(*GEOMETRIES["fours"], False)).values()) == {"grouped"}
    assert direction_of(torchcnn.explain(*GEOMETRIES["strips"], False))["grad_weight"] == "grouped"
    assert direction_of(torchcnn.explain(*GEOMETRIES["stride_2"], False))["grad_input"] == "grouped"
    assert direction_of(torchcnn.explain(*GEOMETRIES["long_rows"], False))["forward"] == "grouped"
    for name in ("pairs_stride_2", "fours_stride_3"):
        assert direction_of(torchcnn.explain(*GEOMETRIES[name], False))["grad_input"] == "grouped"
    for name in ("eights_of_long_rows", "sixteens_stride_2"):  # in vectors of 64 bytes alone
        algorithms = list(direction_of(torchcnn.explain(*GEOMETRIES[name], False)).values())
        assert algorithms.count("grouped") == (3 if torchcnn.isa() == "avx512" else 0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_exact(name, dtype, layout):
    input_size, weight_size, *options = GEOMETRIES[name]
    check_exact(input_size, weight_size, options, dtype, LAYOUTS[layout])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_rounding(name, layout):
    input_size, weight_size, *options = GEOMETRIES[name]
    check_rounding(input_size, weight_size, options, LAYOUTS[layout])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["eights", "half_a_vector", "sixteens", "strips"])
def test_bias_and_relu(name, dtype, layout):
    input_size, weight_size, *options = GEOMETRIES[name]
    tensors = make_tensors(input_size, weight_size, options, small_integers)
    input, weight, bias, _ = move(tensors, dtype, LAYOUTS[layout])
    for b in (bias, None):
        expected = F.conv2d(tensors[0], tensors[1], None if b is None else tensors[2], *options).relu()
        assert_exact(torchcnn.functional.conv2d(input, weight, b, *options, activation="relu"), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["pairs", "fours", "half_a_vector", "stride_2", "sixteens"])
def test_what_is_not_finite_stays_in_its_group(name, layout):
    """All other groups have the bits that they have without it."""
    input_size, weight_size, *options = GEOMETRIES[name]
    tensors = make_tensors(input_size, weight_size, options, torch.randn)
    members, groups = weight_size[1], options[-1]
    for which in (0, 1, 3):
        spoilt = [x.clone() for x in tensors]
        channel = spoilt[which].size(1 if which != 1 else 0) - 1
        spoilt[which].select(1 if which != 1 else 0, channel).fill_(math.nan)
        clean, found = (
            results(torchcnn.functional.conv2d, move(x, torch.float32, LAYOUTS[layout]), options) for x in (tensors, spoilt)
        )
        last = slice((groups - 1) * members, None)
        for direction, a, b in zip(DIRECTIONS, clean, found, strict=True):
            axis = 0 if direction == "grad_weight" else 1
            others = torch.arange((groups - 1) * members)
            assert torch.equal(a.index_select(axis, others), b.index_select(axis, others)), direction
        spoils = {0: ("forward", "grad_weight"), 1: ("forward", "grad_input"), 3: ("grad_input", "grad_weight")}[which]
        for direction, b in zip(DIRECTIONS, found, strict=True):
            group = b[last] if direction == "grad_weight" else b[:, last]
            assert group.isnan().any() == (direction in spoils), direction


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("W", [10, 21, 29])
def test_an_input_that_no_gradient_meets_does_not_enter(W, layout):
    input, grad_output = torch.ones(1, 32, 6, W), torch.ones(1, 32, 4, W - 2)
    input[:, :, 2, -1] = math.inf  # tap column 2 alone sees the last column
    weight = torch.ones(32, 8, 3, 3, requires_grad=True)
    output = torchcnn.functional.conv2d(input.contiguous(memory_format=LAYOUTS[layout]), weight, groups=4)
    (grad_weight,) = torch.autograd.grad(output, weight, grad_output)
    assert (grad_weight[..., :2] == 4 * (W - 2)).all()
    assert not grad_weight[..., 2].isfinite().any()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_image_does_not_depend_on_its_batch(layout):
    torch.manual_seed(0)
    images = torch.randn(7, 64, 9, 14).contiguous(memory_format=LAYOUTS[layout])
    weight = torch.randn(64, 8, 3, 3)

    def both(x):
        x = x.detach().requires_grad_()
        output = torchcnn.functional.conv2d(x, weight, None, 1, 1, 1, 8)
        return output.detach(), torch.autograd.grad(output.square().sum(), x)[0]

    together = both(images)
    for n in (0, 3, 6):
        assert all(torch.equal(a[n : n + 1], b) for a, b in zip(together, both(images[n : n + 1]), strict=True))
