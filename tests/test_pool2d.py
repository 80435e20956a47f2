"""Pooling, forward and gradients: maxima and indices exactly, averages by the tiers of tiers.py."""

from functools import partial

import cases
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from tiers import assert_bound, assert_exact, assert_no_worse_than_torch, small_integers

import torchcnn.functional
from torchcnn import reference

ADAPTIVE_IDS = [case[0] for case in cases.ADAPTIVE_CASES]


@pytest.fixture(params=cases.POOL2D_CASES, ids=str)
def case(request):
    return request.param


@pytest.fixture(params=cases.ADAPTIVE_CASES, ids=ADAPTIVE_IDS)
def adaptive_case(request):
    return request.param[1:]


def with_gradient(operator, input, make_grad_output):
    """(output, grad_output, grad_input); of an operator that returns indices too: (output, indices, ...)."""
    input = input.detach().requires_grad_()
    results = operator(input)
    output, *indices = results if isinstance(results, tuple) else (results,)
    grad_output = make_grad_output(output.shape).to(output)
    (grad_input,) = torch.autograd.grad(output, input, grad_output)
    return output.detach(), *indices, grad_output, grad_input


# Max and min


def scatter(grad_output, indices, input_size):
    """The gradient of max pooling by its definition: every gradient added where its maximum came from."""
    grad_input = torch.zeros(*input_size[:-2], input_size[-2] * input_size[-1], dtype=torch.float64)
    grad_input.scatter_add_(-1, indices.flatten(-2), grad_output.double().flatten(-2))
    return grad_input.unflatten(-1, input_size[-2:])


def with_special_values(shape):
    """Small integers, so ties everywhere, with NaN and both infinities among them."""
    input, die = small_integers(shape), torch.rand(shape)
    for number, value in enumerate((torch.nan, torch.inf, -torch.inf)):
        input[(number / 10 < die) & (die < (number + 1) / 10)] = value
    return input


def check_extremes(case, make, dtype, layout, device):
    truth = make(case.input)
    for name, sign in (("max_pool2d", 1), ("min_pool2d", -1)):
        pool2d = getattr(torchcnn.functional, name)
        input = layout((sign * truth).to(device, dtype))
        expected, expected_indices = F.max_pool2d(truth, **case.options, return_indices=True)
        output, indices, grad_output, grad_input = with_gradient(
            partial(pool2d, **case.options, return_indices=True), input, lambda shape: layout(small_integers(shape))
        )
        assert output.dtype == dtype and indices.dtype == torch.int64
        assert_exact(output.cpu(), sign * expected)
        assert torch.equal(indices.cpu(), expected_indices)
        assert_exact(grad_input.cpu(), scatter(grad_output.cpu(), expected_indices, case.input))
        alone = pool2d(input, **case.options)
        assert torch.equal(alone.nan_to_num(7), output.nan_to_num(7))


def test_max_and_min(case, dtype, layout, device):
    check_extremes(case, small_integers, dtype, layout, device)


def test_max_and_min_of_nan_and_infinity(case, dtype, layout, device):
    check_extremes(case, with_special_values, dtype, layout, device)


@pytest.mark.parametrize("planes", [(2, 17), (1, 16), (5, 7)], ids=str)
@pytest.mark.parametrize(
    "size, options",
    [
        ((13, 13), {"kernel_size": 3, "stride": 2}),
        ((7, 7), {"kernel_size": 3, "stride": 1, "padding": 1}),
        ((9, 6), {"kernel_size": 2, "stride": 2, "padding": 1}),
        ((5, 7), {"kernel_size": 2, "stride": 1}),
        ((8, 5), {"kernel_size": (4, 2), "stride": 1, "dilation": 2}),
        ((2, 3), {"kernel_size": 3, "stride": 2, "padding": 1}),
        ((7, 7), {"kernel_size": 7}),
        ((4, 4), {"kernel_size": 4}),
        ((23, 29), {"kernel_size": (23, 29)}),
    ],
    ids=str,
)
def test_max_and_min_beside_a_nan(planes, size, options, dtype, device):
    """Planes that are searched together, one of which has a NaN, and then none; zeros of either sign, -inf, ties."""
    for nans in (1, 0):
        truth = small_integers((*planes, *size), low=-2, high=1).to(dtype)
        truth[torch.rand(truth.shape) < 0.2] = -0.0
        truth[torch.rand(truth.shape) < 0.2] = -torch.inf
        truth[0, 1] = -torch.inf
        truth[0, 2] = torch.where(torch.rand(size) < 0.5, 0.0, -0.0)
        truth[planes[0] - 1, -1].view(-1)[-nans:][:nans] = torch.nan
        for name, sign in (("max_pool2d", 1), ("min_pool2d", -1)):
            pool2d = getattr(torchcnn.functional, name)
            expected, expected_indices = F.max_pool2d(truth, **options, return_indices=True)
            output, indices = pool2d((sign * truth).to(device), **options, return_indices=True)
            bits = torch.int64 if dtype == torch.float64 else torch.int32
            numbers = ~expected.isnan()
            assert torch.equal(output.cpu().isnan(), ~numbers)
            assert torch.equal(output.cpu()[numbers].view(bits), (sign * expected)[numbers].view(bits))
            assert torch.equal(indices.cpu(), expected_indices)
            alone = pool2d((sign * truth).to(device), **options)
            assert torch.equal(alone.cpu()[numbers].view(bits), output.cpu()[numbers].view(bits))


def test_max_and_min_half(case, half_dtype, layout, device):
    check_extremes(case, with_special_values, half_dtype, layout, device)


def test_all_minus_infinity(case, dtype, device):
    """The first pixel of the window wins, though nothing is greater than what a search starts from."""
    for name, sign in (("max_pool2d", 1), ("min_pool2d", -1)):
        input = torch.full(case.input, -torch.inf, dtype=dtype)
        output, indices = getattr(torchcnn.functional, name)((sign * input).to(device), **case.options, return_indices=True)
        assert (output == -sign * torch.inf).all()
        assert torch.equal(indices.cpu(), F.max_pool2d(input, **case.options, return_indices=True)[1])


def test_max_and_min_of_integers(case, integer_dtype, device):
    """Extreme values included: there is no -x of INT_MIN, nor of anything unsigned."""
    info = torch.iinfo(integer_dtype)
    values = torch.tensor([info.min, info.min + 1, 0, 1, info.max - 1, info.max], dtype=integer_dtype)
    input = values[torch.randint(len(values), case.input)]
    expected, expected_indices = F.max_pool2d(input, **case.options, return_indices=True)
    moved = input.to(device)
    output, indices = torchcnn.functional.max_pool2d(moved, **case.options, return_indices=True)
    assert output.dtype == integer_dtype
    assert torch.equal(output.cpu(), expected) and torch.equal(indices.cpu(), expected_indices)
    # ~x = -1 - x turns the order around within the dtype, for unsigned integers too.
    expected, expected_indices = F.max_pool2d(~input, **case.options, return_indices=True)
    output, indices = torchcnn.functional.min_pool2d(moved, **case.options, return_indices=True)
    assert torch.equal(output.cpu(), ~expected) and torch.equal(indices.cpu(), expected_indices)


def test_smallest_integer_everywhere(integer_dtype, layout, device):
    info = torch.iinfo(integer_dtype)
    for pool2d, value in ((torchcnn.functional.max_pool2d, info.min), (torchcnn.functional.min_pool2d, info.max)):
        input = layout(torch.full((1, 2, 5, 5), value, dtype=integer_dtype, device=device))
        output, indices = pool2d(input, 3, 2, 1, return_indices=True)
        assert (output == value).all()
        assert indices[0, 0].tolist() == [[0, 1, 3], [5, 6, 8], [15, 16, 18]]


@given(case=cases.pool2d_cases())
def test_random_max_and_min(case, dtype, layout, device):
    check_extremes(case, with_special_values, dtype, layout, device)


# Planes, many and small, that kernels may take for one tall plane, and rows from shorter than half a vector to several vectors.
MANY_PLANES = [
    (1, 3000, 8, 4),
    (1, 900, 14, 14),
    (3, 300, 6, 2),
    (1, 700, 10, 31),
    (2, 250, 9, 15),
    (3, 1, 4001, 5),
    (1, 90, 20, 46),
]


@pytest.mark.cpu_kernels("how planes are shared out")
@pytest.mark.parametrize("count", [1, 3], ids=["one_thread", "three_threads"])
@pytest.mark.parametrize("size", MANY_PLANES, ids=str)
def test_2x2_windows_of_many_planes(size, count, dtype, device, threads):
    threads(count)
    truth = small_integers(size)
    maxima, indices = F.max_pool2d(truth, 2, return_indices=True)
    for pool2d, sign in ((torchcnn.functional.max_pool2d, 1), (torchcnn.functional.min_pool2d, -1)):
        input = (sign * truth).to(device, dtype)
        output, positions = pool2d(input, 2, return_indices=True)
        assert_exact(output.cpu(), sign * maxima)
        assert torch.equal(positions.cpu(), indices)
        output, grad_output, grad_input = with_gradient(partial(pool2d, kernel_size=2), input, small_integers)
        assert_exact(output.cpu(), sign * maxima)
        assert_exact(grad_input.cpu(), scatter(grad_output.cpu(), indices, size))
    mean = partial(torchcnn.functional.avg_pool2d, kernel_size=2)
    output, grad_output, grad_input = with_gradient(mean, truth.to(device, dtype), small_integers)
    expected, _, gradient = with_gradient(partial(F.avg_pool2d, kernel_size=2), truth.double(), lambda _: grad_output.cpu())
    assert_exact(output.cpu(), expected)
    assert_exact(grad_input.cpu(), gradient)


# Averages


@pytest.mark.cpu_kernels("the sign of a zero")
@pytest.mark.parametrize("size", [(2, 3, 8, 8), (1, 17, 14, 14), (2, 3, 9, 64), (1, 16, 7, 7), (1, 9, 60, 60)], ids=str)
def test_the_mean_of_negative_zeros_is_zero(size, dtype, layout):
    """As of torch: a sum starts at zero, and 0 + -0 is 0."""
    input = layout(torch.full(size, -0.0, dtype=dtype))
    pools = torchcnn.functional
    for output in (
        pools.avg_pool2d(input, 2),
        pools.avg_pool2d(input, 3, 2, 1),
        pools.avg_pool2d(input, 3, 1),
        pools.adaptive_avg_pool2d(input, (3, 2)),
        pools.global_avg_pool2d(input),
    ):
        assert not output.signbit().any()


def check_average(operator, torch_operator, input_size, dtype, layout, device, terms, overlap, against_torch=True):
    """Tiers 2 and 3 for an average of at most `terms` pixels, where a pixel lies in at most `overlap` windows."""
    input = layout(torch.randn(input_size).to(device, dtype))
    output, grad_output, grad_input = with_gradient(operator, input, lambda shape: layout(torch.randn(shape)))
    assert output.dtype == grad_input.dtype == dtype

    def of_torch(convert):
        return with_gradient(torch_operator, convert(input.cpu()), lambda shape: convert(grad_output.cpu()))[::2]

    truths = of_torch(torch.Tensor.double)
    magnitudes = of_torch(lambda tensor: tensor.double().abs())
    for actual, torchs, truth, magnitude, length in zip(
        (output, grad_input), of_torch(lambda tensor: tensor), truths, magnitudes, (terms, overlap), strict=True
    ):
        # One more than the terms: the division rounds once.
        assert_bound(actual.cpu(), truth, magnitude.abs(), length + 1)
        if against_torch and dtype != torch.float64:
            assert_no_worse_than_torch(actual.cpu(), torchs, truth)


def check_avg_pool2d(case, dtype, layout, device, against_torch=True, **options):
    options = {**case.avg_options, **options}
    R, S = (case.kernel, case.kernel) if isinstance(case.kernel, int) else case.kernel
    check_average(
        lambda input: torchcnn.functional.avg_pool2d(input, **options),
        lambda input: F.avg_pool2d(input, **options),
        case.input,
        dtype,
        layout,
        device,
        R * S,
        R * S,
        against_torch,
    )


AVG_OPTIONS = [{}, {"count_include_pad": False}, {"divisor_override": -3}]


@pytest.mark.parametrize("options", AVG_OPTIONS, ids=["plain", "exclude_pad", "divisor"])
def test_avg_pool2d(case, options, dtype, layout, device):
    check_avg_pool2d(case, dtype, layout, device, **options)


def test_avg_pool2d_half(case, half_dtype, layout, device):
    check_avg_pool2d(case, half_dtype, layout, device, count_include_pad=False)


def test_avg_pool2d_exact(case, dtype, layout, device):
    """Tier 1: a divisor of 4 is exact, so sums of small integers are."""
    options = {**case.avg_options, "divisor_override": 4}
    truth = small_integers(case.input)
    output, grad_output, grad_input = with_gradient(
        lambda input: torchcnn.functional.avg_pool2d(input, **options),
        layout(truth.to(device, dtype)),
        lambda shape: layout(small_integers(shape)),
    )
    expected, _, expected_grad_input = with_gradient(
        lambda input: F.avg_pool2d(input, **options), truth, lambda shape: grad_output.cpu()
    )
    assert_exact(output.cpu(), expected)
    assert_exact(grad_input.cpu(), expected_grad_input)


def test_avg_pool2d_of_integers(case, layout, device):
    """int64 alone, as torch has it: the quotient rounded to zero."""
    input = torch.randint(-1000, 1000, case.input)
    for options in AVG_OPTIONS:
        expected = F.avg_pool2d(input, **{**case.avg_options, **options})
        output = torchcnn.functional.avg_pool2d(layout(input.to(device)), **{**case.avg_options, **options})
        assert torch.equal(output.cpu(), expected)


@given(case=cases.pool2d_cases(max_dilation=1))
def test_random_avg_pool2d(case, dtype, layout, device):
    for options in AVG_OPTIONS:
        check_avg_pool2d(case, dtype, layout, device, against_torch=False, **options)


@pytest.mark.slow
@pytest.mark.parametrize("repeat", range(40))
@given(case=cases.pool2d_cases(), without_dilation=cases.pool2d_cases(max_dilation=1))
def test_many_random_poolings(repeat, case, without_dilation, dtype, layout, device):
    check_extremes(case, with_special_values, dtype, layout, device)
    for options in AVG_OPTIONS:
        check_avg_pool2d(without_dilation, dtype, layout, device, against_torch=False, **options)


# Adaptive and global


def test_adaptive_avg_pool2d(adaptive_case, dtype, layout, device):
    check_adaptive_avg_pool2d(adaptive_case, dtype, layout, device)


def test_adaptive_avg_pool2d_half(adaptive_case, half_dtype, layout, device):
    check_adaptive_avg_pool2d(adaptive_case, half_dtype, layout, device)


def check_adaptive_avg_pool2d(adaptive_case, dtype, layout, device):
    input_size, output_size = adaptive_case
    if output_size == (0, 2):
        pytest.skip("torch refuses the gradient of an output without elements")
    plane = F.adaptive_avg_pool2d(torch.ones(input_size), output_size).shape[-2:]
    terms = (input_size[-2] // plane[0] + 2) * (input_size[-1] // plane[1] + 2)
    overlap = (plane[0] // input_size[-2] + 2) * (plane[1] // input_size[-1] + 2)
    check_average(
        lambda input: torchcnn.functional.adaptive_avg_pool2d(input, output_size),
        lambda input: F.adaptive_avg_pool2d(input, output_size),
        input_size,
        dtype,
        layout,
        device,
        terms,
        overlap,
    )


def test_adaptive_max_pool2d(adaptive_case, dtype, layout, device):
    check_adaptive_max_pool2d(adaptive_case, dtype, layout, device)


def test_adaptive_max_pool2d_half(adaptive_case, half_dtype, layout, device):
    check_adaptive_max_pool2d(adaptive_case, half_dtype, layout, device)


def check_adaptive_max_pool2d(adaptive_case, dtype, layout, device):
    input_size, output_size = adaptive_case
    truth = with_special_values(input_size)
    expected, expected_indices = F.adaptive_max_pool2d(truth, output_size, return_indices=True)
    output, indices, grad_output, grad_input = with_gradient(
        lambda input: torchcnn.functional.adaptive_max_pool2d(input, output_size, return_indices=True),
        layout(truth.to(device, dtype)),
        lambda shape: layout(small_integers(shape)),
    )
    assert_exact(output.cpu(), expected)
    assert torch.equal(indices.cpu(), expected_indices)
    assert_exact(grad_input.cpu(), scatter(grad_output.cpu(), expected_indices, input_size))
    alone = torchcnn.functional.adaptive_max_pool2d(layout(truth.to(device, dtype)), output_size)
    assert torch.equal(alone.nan_to_num(7), output.nan_to_num(7))


@pytest.mark.parametrize("size", [(2, 3, 7, 5), (1, 1, 1, 1), (2, 17, 4, 40), (0, 2, 3, 3), (3, 6, 5)], ids=str)
def test_global_pooling(size, dtype, layout, device):
    """Shape (N, C, 1, 1), as a layer that a classifier flattens."""
    terms = size[-2] * size[-1]
    check_average(
        torchcnn.functional.global_avg_pool2d,
        lambda input: input.mean((-2, -1), keepdim=True),
        size,
        dtype,
        layout,
        device,
        terms,
        1,
    )
    truth = small_integers(size)
    output, grad_output, grad_input = with_gradient(
        torchcnn.functional.global_max_pool2d, layout(truth.to(device, dtype)), small_integers
    )
    assert_exact(output.cpu(), truth.amax((-2, -1), keepdim=True))
    first_maximum = truth.flatten(-2).argmax(-1)[..., None, None]  # of the first, should there be several
    assert_exact(grad_input.cpu(), scatter(grad_output.cpu(), first_maximum, size))


@pytest.mark.parametrize("size", [(1, 5, 70, 72), (3, 41, 7, 7)], ids=str)
def test_gradient_of_global_maximum_is_zero_elsewhere(size, dtype, layout, device):
    """Planes that are zeroed one by one and several at a time, in memory that held something else."""
    truth = small_integers(size)
    torch.full(size, torch.nan, dtype=dtype, device=device)  # freed at once: what comes next is likely to get its memory
    _, grad_output, grad_input = with_gradient(
        torchcnn.functional.global_max_pool2d, layout(truth.to(device, dtype)), small_integers
    )
    first_maximum = truth.flatten(-2).argmax(-1)[..., None, None]
    assert_exact(grad_input.cpu(), scatter(grad_output.cpu(), first_maximum, size))


# Planes of odd sizes and of whole vectors, of one part and of several, of a warp and of a block; channels that fill no block.
@pytest.mark.parametrize("layout", [cases.contiguous, cases.channels_last], ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("size", [(3, 40, 7, 7), (2, 24, 25, 23), (1, 56, 5, 16)], ids=str)
def test_whole_planes_exact(size, layout, device):
    """Aligned or not, of every dtype: sums of small integers are exact, and a divisor of 4 is."""
    truth = small_integers(size)
    options = {"kernel_size": size[-2:], "divisor_override": 4}
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        aligned = layout(truth.to(device, dtype))
        unaligned = torch.empty(aligned.numel() + 1, dtype=dtype, device=device)[1:].as_strided(aligned.size(), aligned.stride())
        for input in (aligned, unaligned.copy_(aligned)):
            output, grad_output, grad_input = with_gradient(
                partial(torchcnn.functional.avg_pool2d, **options), input, lambda shape: layout(small_integers(shape))
            )
            expected, _, gradient = with_gradient(
                partial(F.avg_pool2d, **options), truth, lambda _, grad_output=grad_output: grad_output.cpu()
            )
            assert_exact(output.cpu(), expected.to(dtype))
            assert_exact(grad_input.cpu(), gradient)


# Max unpooling


@pytest.mark.parametrize("kernel_size, stride, padding", [(2, None, 0), (3, 3, 1), ((2, 3), (4, 3), (1, 0))])
@pytest.mark.parametrize("size", [(2, 3, 11, 12), (1, 17, 6, 30), (3, 8, 9), (0, 2, 6, 6)], ids=str)
def test_max_unpool2d(size, kernel_size, stride, padding, dtype, layout, device):
    pooled, indices = F.max_pool2d(small_integers(size), kernel_size, stride, padding, return_indices=True)

    def unpool(function, input, indices):
        return function(input, indices, kernel_size, stride, padding, output_size=size[-2:])

    output, grad_output, grad_input = with_gradient(
        lambda input: unpool(torchcnn.functional.max_unpool2d, input, layout(indices.to(device))),
        layout(pooled.to(device, dtype)),
        lambda shape: layout(small_integers(shape)),
    )
    expected, _, expected_grad_input = with_gradient(
        lambda input: unpool(F.max_unpool2d, input, indices), pooled, lambda shape: grad_output.cpu()
    )
    assert_exact(output.cpu(), expected)
    assert_exact(grad_input.cpu(), expected_grad_input)


@pytest.mark.parametrize("output_size", [None, (9, 8), [8, 9], (2, 3, 9, 9), torch.Size((8, 9))], ids=str)
def test_max_unpool2d_output_size(output_size):
    pooled, indices = F.max_pool2d(small_integers((2, 3, 8, 8)), 2, return_indices=True)
    expected = F.max_unpool2d(pooled, indices, 2, output_size=output_size)
    assert torch.equal(torchcnn.functional.max_unpool2d(pooled, indices, 2, output_size=output_size), expected)


def test_max_unpool2d_half(half_dtype, device):
    pooled, indices = F.max_pool2d(small_integers((2, 3, 8, 8)).to(half_dtype), 2, return_indices=True)
    output = torchcnn.functional.max_unpool2d(pooled.to(device), indices.to(device), 2)
    assert torch.equal(output.cpu(), F.max_unpool2d(pooled, indices, 2))


@pytest.mark.parametrize("places", [1, 7, 36], ids=lambda places: f"{places}_places")
def test_max_unpool2d_keeps_the_last_of_equal_indices(places, dtype, layout, device):
    """Equal indices stand next to each other, and far from each other."""
    input, indices = torch.randn(2, 5, 9, 13, dtype=dtype), torch.randint(places, (2, 5, 9, 13))
    output = torch.ops.torchcnn.max_unpool2d(layout(input.to(device)), layout(indices.to(device)), 6, 6)
    assert np.array_equal(output.cpu(), reference.max_unpool2d(input.numpy(), indices.numpy(), (6, 6)))


@pytest.mark.parametrize("places", [1, 7, 36], ids=lambda places: f"{places}_places")
def test_gradients_with_equal_indices(places, dtype, layout, device):
    grad_output, indices = small_integers((2, 5, 9, 13)), torch.randint(places, (2, 5, 9, 13))
    tensors = layout(grad_output.to(device, dtype)), layout(indices.to(device))
    grad_input = torch.ops.torchcnn.max_pool2d_grad_input(*tensors, 6, 6, layout is cases.channels_last)
    assert_exact(grad_input.cpu(), scatter(grad_output, indices, (2, 5, 6, 6)))


def test_gradients_with_equal_indices_are_rounded_once(half_dtype, layout, device):
    """The largest number above which ones are lost, and many ones: a sum that was rounded at each step would stay there."""
    large = 2 / torch.finfo(half_dtype).eps
    grad_output = torch.ones(2, 8, 9, 13)
    grad_output[:, :, 0, 0] = large
    indices = torch.randint(3, grad_output.shape) * 5
    tensors = layout(grad_output.to(device, half_dtype)), layout(indices.to(device))
    grad_input = torch.ops.torchcnn.max_pool2d_grad_input(*tensors, 6, 6, layout is cases.channels_last)
    assert_exact(grad_input.cpu(), scatter(grad_output, indices, (2, 8, 6, 6)).to(half_dtype))


# Formats, sizes, arguments


def test_channels_last_at_any_address(device):
    """Dense, but not at a multiple of 16 bytes: nothing may be read as a whole vector there."""
    for dtype in (torch.float32, torch.float64, torch.float16):
        values = small_integers((2, 3, 9, 10, 16)).to(device, dtype)
        unaligned = torch.empty(values[0].numel() + 1, dtype=dtype, device=device)[1:].view(3, 9, 10, 16).movedim(-1, 1)
        for aligned in values.movedim(-1, 2):
            unaligned.copy_(aligned)
            for operator in (
                lambda input: torchcnn.functional.max_pool2d(input, 3, 2, 1),
                lambda input: torchcnn.functional.avg_pool2d(input, 3, 2, 1),
                torchcnn.functional.global_max_pool2d,
            ):
                results = [with_gradient(operator, input, torch.ones) for input in (aligned, unaligned)]
                assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


OPERATORS = {
    "max_pool2d": (2, 2),
    "avg_pool2d": (2, 2),
    "adaptive_avg_pool2d": (3,),
    "adaptive_max_pool2d": (3,),
}


@pytest.mark.parametrize("grad_layout", cases.LAYOUTS, ids=lambda layout: f"grad_{layout.__name__}")
@pytest.mark.parametrize("name", OPERATORS)
def test_memory_format(name, layout, grad_layout, device):
    """channels_last where the input is, as torch has it, whatever the format of grad_output."""
    results = []
    for functional in (torchcnn.functional, F):
        operator = getattr(functional, name)
        output, _, grad_input = with_gradient(
            lambda input, operator=operator: operator(input, *OPERATORS[name]),
            layout(torch.rand(2, 4, 7, 8, device=device)),
            lambda shape: grad_layout(torch.ones(shape)),
        )
        results.append([output.stride(), grad_input.stride()])
        if "max" in name:
            input = layout(torch.rand(2, 4, 7, 8, device=device))
            results[-1].append(operator(input, *OPERATORS[name], return_indices=True)[1].stride())
    assert results[0] == results[1]


def test_memory_format_of_min_and_unpool(layout, device):
    input = layout(torch.rand(2, 4, 6, 8, device=device))
    of_max = torchcnn.functional.max_pool2d(input, 2, return_indices=True)
    of_min = torchcnn.functional.min_pool2d(input, 2, return_indices=True)
    assert [tensor.stride() for tensor in of_min] == [tensor.stride() for tensor in of_max]
    restored = torchcnn.functional.max_unpool2d(*of_max, 2)
    # torch's, on a GPU, is always contiguous.
    assert restored.stride() == F.max_unpool2d(*(tensor.cpu() for tensor in of_max), 2).stride()


def fake_and_real(operator, input):
    """The strides and sizes of operator(input) and its gradient, for a real and for a fake tensor."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    yield [cases.layout_of(tensor) for tensor in with_gradient(operator, input, torch.zeros)]
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        results = with_gradient(operator, mode.from_tensor(input), torch.zeros)
        yield [cases.layout_of(tensor) for tensor in results]


@pytest.mark.parametrize("name", ["max_pool2d", "min_pool2d", "avg_pool2d"])
def test_fake_tensors_have_the_sizes_and_strides_of_real_ones(name, case, layout):
    options = case.avg_options if name == "avg_pool2d" else {**case.options, "return_indices": True}
    operator = getattr(torchcnn.functional, name)
    real, fake = fake_and_real(lambda input: operator(input, **options), layout(torch.zeros(case.input)))
    assert real == fake


@pytest.mark.parametrize("name", ["adaptive_avg_pool2d", "adaptive_max_pool2d"])
def test_fake_tensors_of_adaptive_pooling(name, adaptive_case, layout):
    input_size, output_size = adaptive_case
    operator = getattr(torchcnn.functional, name)
    real, fake = fake_and_real(lambda input: operator(input, output_size), layout(torch.zeros(input_size)))
    assert real == fake


def test_fake_tensors_of_global_pooling_and_unpooling(layout):
    for operator in (torchcnn.functional.global_avg_pool2d, torchcnn.functional.global_max_pool2d):
        real, fake = fake_and_real(operator, layout(torch.zeros(2, 3, 4, 5)))
        assert real == fake

    def there_and_back(input):
        return torchcnn.functional.max_unpool2d(*torchcnn.functional.max_pool2d(input, 2, return_indices=True), 2)

    real, fake = fake_and_real(there_and_back, layout(torch.zeros(2, 3, 4, 6)))
    assert real == fake


def test_output_size(case):
    size = torchcnn.functional.pool2d_output_size(
        case.input[-2:], case.kernel, case.stride, case.padding, case.dilation, case.ceil_mode
    )
    assert F.max_pool2d(torch.empty(case.input, device="meta"), **case.options).shape[-2:] == size


@pytest.mark.parametrize("stride", [(), [], None])
def test_stride_defaults_to_the_kernel(stride):
    input = torch.randn(1, 2, 7, 9)
    for name in ("max_pool2d", "avg_pool2d"):
        expected = getattr(F, name)(input, (2, 3), stride)
        torch.testing.assert_close(getattr(torchcnn.functional, name)(input, (2, 3), stride), expected)


def test_arguments_by_position_and_as_lists():
    input = torch.randn(1, 4, 9, 9)
    for arguments in (([3, 2], [2, 1], [1, 0], [1, 2], True), ((3,), (2,), (1,), (2,), False)):
        assert torch.equal(torchcnn.functional.max_pool2d(input, *arguments), F.max_pool2d(input, *arguments))
    for arguments in (([3, 2], [2, 1], [1, 0], True, False, 5), ((3,), (2,), (1,), False, True, None)):
        expected = F.avg_pool2d(input, *arguments)
        torch.testing.assert_close(torchcnn.functional.avg_pool2d(input, *arguments), expected)


def test_numbers_of_numpy_are_strides():
    np = pytest.importorskip("numpy")
    x = torch.randn(1, 2, 8, 8)
    two = np.int64(2)
    expected = torch.nn.functional.avg_pool2d(x, 2)
    torch.testing.assert_close(torchcnn.functional.avg_pool2d(x, 2, two), expected)
    assert torch.equal(torchcnn.MaxPool2d(two)(x), torch.nn.functional.max_pool2d(x, 2))
    assert torchcnn.functional.pool2d_output_size(8, 3, two) == (3, 3)
    output, indices = torchcnn.functional.max_pool2d(x, 2, return_indices=True)
    assert torchcnn.functional.max_unpool2d(output, indices, 2, two).shape == x.shape
