"""The matrix-product kernels of convolution: indirect GEMM, 1x1 on the planes, pixel vectors for few channels.

The truth is torch in float64, and small integers, for which every order of summation is exact.
"""

import pytest
import torch

import torchcnn

OPS = torch.ops.torchcnn

# (N, C, H, W), K, (R, S), stride, padding, dilation, groups: a reason each.
CASES = {
    "1x1": ((2, 64, 14, 14), 24, (1, 1), 1, 0, 1, 1),
    "1x1, vectors span images": ((3, 20, 7, 7), 30, (1, 1), 1, 0, 1, 1),
    "1x1, sum longer than one depth": ((2, 900, 5, 5), 17, (1, 1), 1, 0, 1, 1),
    "1x1, more filters than a block": ((1, 10, 6, 6), 300, (1, 1), 1, 0, 1, 1),
    "1x1 strided": ((2, 40, 13, 12), 30, (1, 1), (3, 2), 0, 1, 1),
    "1x1 padded": ((2, 8, 9, 40), 16, (1, 1), 1, 1, 1, 1),
    "1x1 grouped": ((2, 32, 9, 9), 48, (1, 1), 1, 0, 1, 2),
    "1x1, one piece of positions, uneven chunks": ((2, 288, 7, 7), 300, (1, 1), 1, 0, 1, 1),
    "1x1, many pieces, grad_weight in slices": ((3, 20, 23, 24), 330, (1, 1), 1, 0, 1, 1),
    "1x1, a piece of many positions": ((3, 9, 20, 21), 15, (1, 1), 1, 0, 1, 1),
    "1x1 strided, columns left over": ((2, 20, 7, 6), 24, (1, 1), (1, 2), 0, 1, 1),
    "1x1 strided, rows left over": ((2, 20, 9, 8), 24, (1, 1), (3, 2), 0, 1, 1),
    "1x1 strided, one column": ((3, 20, 5, 1), 24, (1, 1), 2, 0, 1, 1),
    "1x1 strided, two columns": ((3, 20, 5, 2), 24, (1, 1), (2, 2), 0, 1, 1),
    "1x1 strided, wide": ((3, 150, 14, 31), 20, (1, 1), (1, 2), 0, 1, 1),
    "1x1, sum over filters longer than one depth": ((1, 30, 5, 6), 800, (1, 1), 2, 0, 1, 1),
    "1x1, a few positions beyond the last panel": ((1, 30, 6, 6), 31, (1, 1), 1, 0, 1, 1),
    "1x1, larger than the caches": ((9, 520, 22, 21), 10, (1, 1), 1, 0, 1, 1),
    "1x1 strided, larger than the caches": ((3, 390, 44, 43), 9, (1, 1), 2, 0, 1, 1),
    "one channel": ((3, 1, 28, 28), 6, (5, 5), 1, 2, 1, 1),
    "few channels, wide": ((2, 3, 9, 70), 7, (3, 3), 1, 1, 1, 1),
    "few channels, stride 2": ((2, 3, 33, 35), 10, (7, 7), 2, 3, 1, 1),
    "few channels, stride 4": ((1, 3, 64, 63), 9, (11, 11), 4, 2, 1, 1),
    "few channels of the input, many filters": ((2, 5, 20, 24), 70, (3, 3), 1, 1, 1, 1),
    "narrow rows": ((3, 6, 14, 14), 16, (5, 5), 1, 0, 1, 1),
    "stride 2": ((2, 32, 15, 17), 40, (3, 3), 2, 1, 1, 1),
    "patches side by side": ((2, 12, 16, 16), 20, (4, 4), 4, 0, 1, 1),
    "patches with pixels left over, grouped": ((3, 22, 13, 20), 18, (2, 3), (2, 3), 0, 1, 2),
    "patches of whole vectors": ((2, 3, 50, 67), 20, (16, 16), 16, 0, 1, 1),
    "patches of parts of vectors": ((3, 3, 37, 58), 18, (18, 18), 18, 0, 1, 1),
    "patches whose rows a depth cuts": ((2, 13, 15, 22), 17, (7, 7), 7, 0, 1, 1),
    "wide patches": ((2, 2, 9, 170), 17, (4, 80), (4, 80), 0, 1, 1),
    "patches of one row": ((2, 9, 4, 77), 18, (1, 5), (1, 5), 0, 1, 1),
    "stride above the kernel": ((2, 12, 17, 19), 20, (2, 1), (3, 4), 0, 1, 1),
    "dilated and grouped": ((2, 24, 12, 12), 36, (3, 3), 1, 2, 2, 3),
    "padding beyond the kernel": ((2, 9, 5, 4), 18, (2, 3), 1, 6, 1, 1),
    "taps between the pixels": ((2, 17, 2, 2), 18, (2, 2), (4, 3), (5, 4), (3, 5), 1),
    "single pixel": ((3, 8, 1, 1), 5, (3, 3), 1, 1, 1, 1),
    "long sum, small plane": ((1, 130, 6, 6), 20, (3, 3), 1, 1, 1, 1),
    "many narrow groups": ((2, 64, 16, 16), 64, (3, 3), 1, 1, 1, 16),
    "partial panels": ((5, 19, 9, 11), 21, (3, 2), 1, 1, 1, 1),
    "large odd image": ((1, 18, 61, 67), 18, (3, 3), 1, 1, 1, 1),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
layouts = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])


def both(value):
    return value if isinstance(value, tuple) else (value, value)


def options_of(case):
    _, _, _, stride, padding, dilation, groups = case
    return (*both(stride), *both(padding), *both(dilation), groups)


def tensors(case, layout, dtype, integers=False):
    """input, weight, bias, grad_output"""
    shape, K, kernel, stride, padding, dilation, groups = case
    generator = torch.Generator().manual_seed(3)

    def make(*sizes):
        values = torch.randint(-4, 5, sizes, generator=generator) if integers else torch.randn(sizes, generator=generator)
        return values.to(dtype)

    input, weight, bias = make(*shape), make(K, shape[1] // groups, *kernel), make(K)
    output = torch.nn.functional.conv2d(input, weight, None, stride, padding, dilation, groups)
    return input.contiguous(memory_format=layout), weight, bias, make(*output.shape).contiguous(memory_format=layout)


def results(case, layout, input, weight, bias, grad_output, relu=False):
    options, last = options_of(case), layout is torch.channels_last
    return (
        OPS.conv2d(input, weight, bias, *options, relu),
        OPS.conv2d_grad_input(grad_output, weight, *input.shape[2:], *options, last),
        *OPS.conv2d_grad_weight_bias(grad_output, input, *weight.shape[2:], *options, last),
    )


def truth(case, input, weight, bias, grad_output):
    _, K, _, stride, padding, dilation, groups = case
    input, weight, bias, grad_output = (t.double().contiguous() for t in (input, weight, bias, grad_output))
    output = torch.nn.functional.conv2d(input, weight, bias, stride, padding, dilation, groups)
    arguments = [both(x) for x in (stride, padding, dilation)]
    grads = torch.ops.aten.convolution_backward(
        grad_output, input, weight, [K], *arguments, False, [0, 0], groups, [True, True, True]
    )
    return (output, *grads)


@cases
@layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_small_integers_are_exact(case, layout, dtype):
    input, weight, _, grad_output = arguments = tensors(case, layout, dtype, integers=True)
    exact = truth(case, *arguments)
    for result, expected in zip(results(case, layout, *arguments), exact, strict=True):
        assert torch.equal(result.double(), expected)
    of_weight = grad_output, input, *weight.shape[2:], *options_of(case), layout is torch.channels_last
    alone = OPS.conv2d_grad_weight(*of_weight), OPS.conv2d_grad_bias(grad_output)
    assert all(torch.equal(result.double(), expected) for result, expected in zip(alone, exact[2:], strict=True))


@cases
@layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_error_is_bounded_by_the_length_of_the_sum(case, layout, dtype):
    arguments = tensors(case, layout, dtype)
    magnitudes = truth(case, *(t.abs() for t in arguments))
    shape, K, kernel, *_, groups = case
    taps = kernel[0] * kernel[1]
    positions = arguments[3].numel() // K
    lengths = (shape[1] // groups * taps + 1, K // groups * taps, positions, positions)
    # float64 has no wider truth here: both sides are rounded.
    eps = torch.finfo(dtype).eps * (2 if dtype == torch.float64 else 1)
    for result, expected, magnitude, length in zip(
        results(case, layout, *arguments), truth(case, *arguments), magnitudes, lengths, strict=True
    ):
        assert ((result.double() - expected).abs() <= eps * length * magnitude).all()


@cases
@layouts
def test_bits_do_not_depend_on_threads(case, layout):
    arguments = tensors(case, layout, torch.float32)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = results(case, layout, *arguments)
        for count in (2, 3, 8):
            torch.set_num_threads(count)
            for result, reference in zip(results(case, layout, *arguments), expected, strict=True):
                assert torch.equal(result, reference)
    finally:
        torch.set_num_threads(threads)


@cases
@layouts
def test_bits_do_not_depend_on_the_neighbours_in_the_batch(case, layout):
    input, weight, bias, grad_output = tensors(case, layout, torch.float32)
    output, grad_input, *_ = results(case, layout, input, weight, bias, grad_output)
    for n in range(input.shape[0]):
        alone = [t[n : n + 1].contiguous(memory_format=layout) for t in (input, grad_output)]
        one_output, one_grad_input, *_ = results(case, layout, alone[0], weight, bias, alone[1])
        assert torch.equal(one_output[0], output[n])
        assert torch.equal(one_grad_input[0], grad_input[n])


@cases
@layouts
def test_fused_relu_is_the_relu_of_the_output(case, layout):
    arguments = tensors(case, layout, torch.float32)
    output = results(case, layout, *arguments)[0]
    assert torch.equal(results(case, layout, *arguments, relu=True)[0], output.relu())
    no_bias = OPS.conv2d(*arguments[:2], None, *options_of(case), False)
    zero_bias = OPS.conv2d(*arguments[:2], torch.zeros_like(arguments[2]), *options_of(case), False)
    assert torch.equal(no_bias, zero_bias)


@pytest.mark.skipif(torchcnn.isa() == "reference", reason="products with padding are NaN there, the reference leaves them out")
@cases
@layouts
def test_a_nan_reaches_its_neighbourhood_only(case, layout):
    input, weight, bias, grad_output = tensors(case, layout, torch.float32)
    input[0, 0, input.shape[2] // 2, input.shape[3] // 2] = torch.nan
    grad_output[-1, -1, -1, 0] = torch.nan
    expected = truth(case, input, weight, bias, grad_output)
    for result, reference in zip(results(case, layout, input, weight, bias, grad_output), expected, strict=True):
        assert torch.equal(result.isnan(), reference.isnan())


def test_views_give_what_copies_give():
    base = torch.randn(4, 20, 18, 22)
    weight = torch.randn(24, 10, 3, 3)
    view = base[::2, 3:13, 1:-1, ::2]
    expected = torchcnn.functional.conv2d(view.contiguous(), weight, padding=1)
    assert torch.equal(torchcnn.functional.conv2d(view, weight, padding=1), expected)
