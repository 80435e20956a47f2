"""Depthwise convolution beside the specification: geometries that cross the borders of its tiles, blocks, strips and windows.

Vectors hold 2 to 16 planes or channels, a register tile is 8 pixels of a row (in grad_weight 4, or 2 or 4 of two rows), a window
of columns about 512 pixels; what is cut so must not show.
"""

import math

import pytest
import torch
import torch.nn.functional as F

import torchcnn
from torchcnn import functional

LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}

# name: N, C, K, H, W, kernel, stride, padding, dilation
GEOMETRIES = {
    "one_plane": (1, 1, 1, 9, 11, (3, 3), 1, 1, 1),
    "one_pixel_planes": (3, 17, 17, 1, 1, (3, 3), 1, 1, 1),
    "few_planes": (1, 3, 3, 40, 37, (5, 5), 1, 2, 1),
    "few_planes_tall": (1, 2, 2, 131, 6, (7, 3), (3, 1), (3, 1), 1),
    "few_planes_strided": (1, 2, 2, 70, 33, (5, 5), 2, 2, 1),
    "few_planes_many_taps": (1, 3, 3, 70, 33, (11, 9), 1, (5, 4), 1),
    "few_planes_dilated": (1, 1, 1, 61, 30, (3, 3), 1, 4, 4),
    "lanes_15": (1, 15, 15, 7, 8, (3, 3), 1, 1, 1),
    "lanes_16": (1, 16, 16, 7, 8, (3, 3), 1, 1, 1),
    "lanes_17": (1, 17, 17, 7, 8, (3, 3), 1, 1, 1),
    "lanes_across_images": (7, 5, 5, 6, 9, (3, 3), 1, 1, 1),
    "channels_33": (2, 33, 33, 9, 10, (3, 3), 1, 1, 1),
    "channels_66": (2, 66, 66, 9, 10, (3, 3), 2, 1, 1),
    "channels_120": (2, 120, 120, 5, 6, (5, 5), 1, 2, 1),
    "row_of_7": (2, 20, 20, 7, 7, (7, 7), 1, 3, 1),
    "row_of_8": (2, 20, 20, 8, 8, (7, 7), 1, 3, 1),
    "row_of_9": (2, 20, 20, 9, 9, (5, 5), 1, 2, 1),
    "plane_of_196": (2, 18, 18, 14, 14, (3, 3), 1, 1, 1),
    "plane_of_399": (1, 11, 11, 57, 7, (3, 3), 1, 1, 1),
    "plane_of_413": (1, 11, 11, 59, 7, (3, 3), 1, 1, 1),
    "rows_of_5": (1, 11, 11, 20, 5, (3, 3), 1, 1, 1),
    "rows_of_21": (1, 11, 11, 19, 21, (3, 3), 1, 1, 1),
    "plane_of_one_column": (2, 18, 18, 20, 1, (3, 3), 1, 1, 1),
    "rows_of_13": (2, 18, 18, 5, 13, (3, 3), 1, 1, 1),
    "rows_of_20": (2, 18, 18, 8, 20, (3, 3), 1, 1, 1),
    "rows_of_35": (2, 18, 18, 3, 35, (3, 3), 1, 1, 1),
    "rows_of_15_to_17": (1, 18, 18, 16, 15, (4, 4), 1, 2, 1),
    "narrower_than_filter": (2, 18, 18, 3, 2, (7, 7), 1, 3, 1),
    "no_padding": (2, 18, 18, 12, 13, (3, 3), 1, 0, 1),
    "no_padding_strided": (2, 18, 18, 12, 14, (3, 3), 2, 0, 1),
    "strided_3": (2, 18, 18, 17, 18, (3, 3), 2, 1, 1),
    "strided_3_rows_of_20": (2, 18, 18, 9, 39, (3, 3), 2, 1, 1),
    "strided_3_rows_of_35": (2, 18, 18, 9, 70, (3, 3), 2, 1, 1),
    "strided_5": (2, 18, 18, 17, 18, (5, 5), 2, 2, 1),
    "strided_5_rows_of_14": (2, 18, 18, 27, 28, (5, 5), 2, 2, 1),
    "strided_5_rows_of_24": (1, 9, 9, 10, 47, (5, 5), 2, 2, 1),
    "strided_5_rows_of_30": (1, 3, 3, 5, 59, (5, 5), 2, 2, 1),
    "strided_5_rows_of_48": (3, 2, 2, 1, 96, (5, 5), 2, 2, 1),
    "strided_5_strips": (1, 3, 3, 400, 95, (5, 5), 2, 2, 1),
    "strided_7": (2, 18, 18, 19, 20, (7, 7), 2, 3, 1),
    "stride_beyond_filter": (2, 18, 18, 19, 20, (2, 3), (4, 5), 1, 1),
    "stride_mixed": (2, 18, 18, 19, 20, (3, 5), (1, 2), (1, 2), 1),
    "dilated": (2, 18, 18, 19, 20, (3, 3), 1, (2, 3), (2, 3)),
    "dilated_rows": (2, 18, 18, 19, 20, (3, 3), 1, (2, 1), (2, 1)),
    "strided_rows": (2, 18, 18, 19, 20, (3, 3), (2, 1), 1, 1),
    "dilated_strided": (2, 18, 18, 19, 20, (3, 4), (2, 3), (2, 3), (3, 2)),
    "dilation_divides_stride": (2, 18, 18, 19, 20, (5, 5), 4, 2, 2),
    "padding_beyond_filter": (2, 18, 18, 4, 3, (3, 3), 1, 5, 1),
    "row_filter": (2, 18, 18, 6, 30, (1, 9), 1, (0, 4), 1),
    "column_filter": (2, 18, 18, 30, 6, (9, 1), 1, (4, 0), 1),
    "many_taps": (1, 18, 18, 25, 26, (13, 11), 1, (6, 5), 1),
    "blocks": (2, 18, 18, 60, 61, (3, 3), 1, 1, 1),
    "strips": (1, 18, 18, 150, 100, (3, 3), 1, 1, 1),
    "strips_strided": (1, 18, 18, 151, 100, (5, 5), 2, 2, 1),
    "parts": (2, 2, 2, 210, 140, (3, 3), 1, 1, 1),
    "windows": (1, 18, 18, 4, 1100, (3, 5), 1, (1, 2), 1),
    "windows_strided": (1, 18, 18, 5, 1101, (3, 5), 2, (1, 2), 1),
    "windows_dilated": (1, 18, 18, 5, 1030, (1, 3), 1, (0, 40), (1, 40)),
    "multiplier_2": (2, 9, 18, 8, 9, (3, 3), 1, 1, 1),
    "multiplier_3_strided": (3, 7, 21, 9, 12, (5, 3), 2, (2, 1), 1),
    "multiplier_few_planes": (1, 2, 6, 37, 21, (3, 3), 1, 1, 1),
}


def operands(name, dtype, memory_format, integers=True):
    N, C, K, H, W, kernel, stride, padding, dilation = GEOMETRIES[name]
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": C}
    generator = torch.Generator().manual_seed(len(name))

    def tensor(*size):
        if integers:
            return torch.randint(-3, 4, size, generator=generator).to(dtype)
        return torch.randn(size, generator=generator).to(dtype)

    input, weight, bias = tensor(N, C, H, W), tensor(K, 1, *kernel), tensor(K)
    grad_output = tensor(*F.conv2d(input, weight, **options).shape)
    return (
        input.contiguous(memory_format=memory_format),
        weight,
        bias,
        grad_output.contiguous(memory_format=memory_format),
        options,
    )


def results(conv2d, input, weight, bias, grad_output, options):
    leaves = [tensor.detach().requires_grad_() for tensor in (input, weight, bias)]
    output = conv2d(*leaves, **options)
    return dict(
        zip(
            ("output", "grad_input", "grad_weight", "grad_bias"),
            (output.detach(), *torch.autograd.grad(output, leaves, grad_output)),
            strict=True,
        )
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_small_integers_are_exact(name, dtype, layout, device):
    *tensors, options = operands(name, dtype, LAYOUTS[layout])
    ours = results(functional.conv2d, *(tensor.to(device) for tensor in tensors), options)
    exact = results(F.conv2d, *(tensor.double() for tensor in tensors), options)
    for key, value in ours.items():
        assert torch.equal(value.cpu(), exact[key].to(dtype)), key


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "name", ["few_planes", "row_of_7", "plane_of_196", "plane_of_399", "strided_5", "multiplier_2", "windows"]
)
def test_relu_and_no_bias(name, layout):
    input, weight, bias, _, options = operands(name, torch.float32, LAYOUTS[layout])
    for b in (bias, None):
        ours = functional.conv2d(input, weight, b, **options, activation="relu")
        exact = F.conv2d(input.double(), weight.double(), None if b is None else b.double(), **options).relu()
        assert torch.equal(ours.double(), exact)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_grad_bias_adds_little_in_float32(layout):
    """The rest in double: of sums of 16,000 terms in the lanes of float32 alone one is wrong by 1.4e-6 and more."""
    torch.manual_seed(0)
    grad_output = torch.randn(2, 18, 40, 200).contiguous(memory_format=LAYOUTS[layout])
    input, weight = torch.randn_like(grad_output), torch.randn(18, 1, 3, 3)
    bias = torch.zeros(18, requires_grad=True)
    output = functional.conv2d(input, weight.requires_grad_(), bias, padding=1, groups=18)
    _, grad_bias = torch.autograd.grad(output, (weight, bias), grad_output)
    exact = grad_output.double().sum((0, 2, 3))
    scale = grad_output.double().square().sum((0, 2, 3)).sqrt().max()  # what such a sum is expected to be
    assert ((grad_bias.double() - exact).abs().max() / scale).item() < 1e-6


def direct(input, weight, grad_output, options):
    """The three directions of one depthwise layer by sums over the taps inside the image alone, in float64."""
    N, C, H, W = input.shape
    K, _, R, S = weight.shape
    P, Q = grad_output.shape[2:]
    pair = lambda value: (value, value) if isinstance(value, int) else value  # noqa: E731
    (sh, sw), (ph, pw), (dh, dw) = pair(options["stride"]), pair(options["padding"]), pair(options["dilation"])
    output, grad_input = torch.zeros(N, K, P, Q).double(), torch.zeros(N, C, H, W).double()
    grad_weight = torch.zeros(K, 1, R, S).double()
    x, w, g = input.double(), weight.double(), grad_output.double()
    for r in range(R):
        for s in range(S):
            ps = [p for p in range(P) if 0 <= p * sh + r * dh - ph < H]
            qs = [q for q in range(Q) if 0 <= q * sw + s * dw - pw < W]
            if not ps or not qs:
                continue
            rows = torch.tensor(ps)[:, None], torch.tensor(qs)[None]
            at = rows[0] * sh + r * dh - ph, rows[1] * sw + s * dw - pw
            for k in range(K):
                c = k * C // K
                output[:, k][:, rows[0], rows[1]] += w[k, 0, r, s] * x[:, c][:, at[0], at[1]]
                grad_input[:, c][:, at[0], at[1]] += w[k, 0, r, s] * g[:, k][:, rows[0], rows[1]]
                grad_weight[k, 0, r, s] += (g[:, k][:, rows[0], rows[1]] * x[:, c][:, at[0], at[1]]).sum()
    return output, grad_input, grad_weight


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("where", ["input", "weight", "grad_output"])
@pytest.mark.parametrize(
    "name", ["few_planes", "lanes_17", "row_of_7", "strided_3", "strided_5_rows_of_24", "dilated", "multiplier_2", "one_plane"]
)
def test_non_finite_values_stay_where_the_sum_has_them(name, where, layout):
    """An infinity next to the padding: 0 * inf must not enter through zeros outside the image, nor from other planes."""
    if name == "multiplier_2" and layout == "channels_last":
        pytest.skip("not a depthwise kernel")
    input, weight, _, grad_output, options = operands(name, torch.float32, LAYOUTS[layout])
    tensor = {"input": input, "weight": weight, "grad_output": grad_output}[where]
    tensor[0, 0, 0, 0], tensor[-1, -1, -1, -1] = math.inf, math.nan
    output, grad_input, grad_weight = direct(input, weight, grad_output, options)
    ours = results(functional.conv2d, input, weight, torch.zeros(len(weight)), grad_output, options)
    assert torch.equal(ours["output"].double().nan_to_num(1e9), output.nan_to_num(1e9))
    assert torch.equal(ours["grad_input"].double().nan_to_num(1e9), grad_input.nan_to_num(1e9))
    assert torch.equal(ours["grad_weight"].double().nan_to_num(1e9), grad_weight.nan_to_num(1e9))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "name",
    [
        "few_planes",
        "few_planes_strided",
        "strided_5_strips",
        "lanes_across_images",
        "channels_33",
        "strips",
        "windows",
        "multiplier_2",
    ],
)
def test_threads_do_not_change_a_bit(name, layout):
    *tensors, options = operands(name, torch.float32, LAYOUTS[layout], integers=False)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            found.append(results(functional.conv2d, *tensors, options))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(value, other[key]) for key, value in found[0].items())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [(33, 5, 7, 9), (9, 20, 8, 8), (18, 1, 40, 30)])
def test_an_image_does_not_depend_on_its_batch(size, layout):
    """Lanes mix the planes of several images; each keeps the bits that it has alone."""
    torch.manual_seed(0)
    images = torch.randn(size).contiguous(memory_format=LAYOUTS[layout])
    weight = torch.randn(size[1], 1, 3, 3)

    def both(x):
        x = x.detach().requires_grad_()
        output = functional.conv2d(x, weight, padding=1, groups=size[1])
        return output.detach(), torch.autograd.grad(output.square().sum(), x)[0]

    together = both(images)
    for n in (0, 3, size[0] - 1):
        alone = both(images[n : n + 1])
        assert all(torch.equal(a[n : n + 1], b) for a, b in zip(together, alone, strict=True))


def test_these_layers_are_depthwise():
    if torchcnn.isa() == "reference":
        pytest.skip("the reference row knows one algorithm")
    assert "depthwise" in torchcnn.explain((2, 18, 8, 8), (18, 1, 3, 3), 1, 1, 1, 18)
