"""conv2d, forward and gradients, over every geometry, dtype and memory layout, by the three tiers of tiers.py."""

import cases
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from tiers import assert_bound, assert_exact, assert_no_worse_than_torch, small_integers

import torchcnn.functional

DIRECTIONS = ("forward", "grad_input", "grad_weight", "grad_bias")


@pytest.fixture(params=cases.CONV2D_CASES, ids=str)
def case(request):
    return request.param


def make_tensors(case, make):
    """(input, weight, bias or None, grad_output) in float64, filled by `make`."""
    output = F.conv2d(torch.empty(case.input, device="meta"), torch.empty(case.weight, device="meta"), **case.options)
    shapes = (case.input, case.weight, case.filters[:1] if case.bias else None, output.shape)
    return tuple(None if shape is None else make(shape) for shape in shapes)


def directions(conv2d, tensors, case):
    """The results of all directions: (forward, grad_input, grad_weight, grad_bias or None)."""
    *inputs, grad_output = tensors
    inputs = [None if tensor is None else tensor.detach().requires_grad_() for tensor in inputs]
    output = conv2d(*inputs, **case.options)
    gradients = torch.autograd.grad(output, [tensor for tensor in inputs if tensor is not None], grad_output)
    return (output.detach(), *gradients, None)[:4]


def lengths(case, output):
    """How many terms each direction adds up."""
    K, C_g, R, S = case.weight
    pixels = output.numel() // K  # N P Q
    return (C_g * R * S + case.bias, K // case.groups * R * S, pixels, pixels)


def move(tensors, layout, dtype, device):
    return tuple(None if tensor is None else layout(tensor.to(device, dtype)) for tensor in tensors)


def check_exact(case, dtype, layout, device):
    tensors = make_tensors(case, small_integers)
    results = directions(torchcnn.functional.conv2d, move(tensors, layout, dtype, device), case)
    truths = directions(F.conv2d, tensors, case)
    for direction, actual, truth in zip(DIRECTIONS, results, truths, strict=True):
        if truth is not None:
            assert actual.dtype == dtype
            assert_exact(actual.cpu(), truth, direction)


def check_rounding(case, dtype, layout, device, against_torch=True):
    against_torch &= device == "cpu"  # cuDNN chooses its algorithm, and with it the error, by time
    tensors = move(make_tensors(case, torch.randn), layout, dtype, device)
    results = directions(torchcnn.functional.conv2d, tensors, case)
    # Not for random geometries: on some of them torch's own float32 kernel reads where it must not.
    torchs = directions(F.conv2d, tensors, case) if against_torch else (None,) * len(results)
    doubles = tuple(None if tensor is None else tensor.cpu().double() for tensor in tensors)
    truths = directions(F.conv2d, doubles, case)
    magnitudes = directions(F.conv2d, [None if tensor is None else tensor.abs() for tensor in doubles], case)
    for direction, actual, of_torch, truth, magnitude, length in zip(
        DIRECTIONS, results, torchs, truths, magnitudes, lengths(case, truths[0]), strict=True
    ):
        if truth is not None:
            assert_bound(actual.cpu(), truth, magnitude, length, direction)
            if against_torch and dtype != torch.float64:  # float64 is the truth itself
                assert_no_worse_than_torch(actual.cpu(), of_torch.cpu(), truth, direction)


def test_exact(case, dtype, layout, device):
    check_exact(case, dtype, layout, device)


def test_rounding(case, dtype, layout, device):
    check_rounding(case, dtype, layout, device)


def test_half_exact(case, half_dtype, device):
    check_exact(case, half_dtype, cases.contiguous, device)


def test_half_rounding(case, half_dtype, device):
    check_rounding(case, half_dtype, cases.contiguous, device)


@given(case=cases.conv2d_cases())
def test_random_geometry(case, dtype, layout, device):
    check_exact(case, dtype, layout, device)
    check_rounding(case, dtype, layout, device, against_torch=False)


@pytest.mark.slow
@pytest.mark.parametrize("repeat", range(40))
@given(case=cases.conv2d_cases())
def test_many_random_geometries(repeat, case, dtype, layout, device):
    check_exact(case, dtype, layout, device)
    check_rounding(case, dtype, layout, device, against_torch=False)


def test_nan_stays_in_its_windows(case, layout, device):
    """A NaN reaches the outputs that see it and no other: blocks are padded with zeros, never with neighbours."""
    input, weight, bias, _ = make_tensors(case, lambda shape: torch.ones(shape, dtype=torch.float64))
    if input.numel() == 0:
        pytest.skip("nowhere to put a NaN")
    marked = torch.zeros_like(input)
    marked.view(-1)[marked.numel() // 2] = 1
    sees = F.conv2d(marked, weight, **case.options) > 0
    tensors = move((input.masked_fill(marked == 1, torch.nan), weight, bias), layout, torch.float32, device)
    output = torchcnn.functional.conv2d(*tensors, **case.options).cpu()
    assert torch.equal(output.isnan(), sees)
    whole = F.conv2d(input, weight, bias, **case.options)
    assert torch.equal(output[~sees].double(), whole[~sees])


@pytest.mark.parametrize("name", ["plain_3x3", "no_bias", "all_mixed", "tile_17_filters", "depthwise_strided", "unbatched"])
def test_activation(name, dtype, layout, device):
    """A fused ReLU has the bits of one that follows, gradients too; zero at zero, NaN stays."""
    (case,) = (case for case in cases.CONV2D_CASES if case.name == name)
    tensors = make_tensors(case, small_integers)  # many outputs are exactly zero
    tensors[0].view(-1)[7] = torch.nan
    tensors = move(tensors, layout, dtype, device)

    def fused(*inputs, **options):
        return torchcnn.functional.conv2d(*inputs, **options, activation="relu")

    def followed(*inputs, **options):
        return torchcnn.functional.conv2d(*inputs, **options).relu()

    for ours, expected in zip(directions(fused, tensors, case), directions(followed, tensors, case), strict=True):
        if expected is not None:
            assert_exact(ours, expected)


FORMAT_CASES = [
    ("dense", (2, 4, 7, 8), (6, 4, 3, 3), 1),
    ("grouped", (2, 4, 7, 8), (6, 2, 3, 3), 2),
    ("depthwise", (2, 6, 7, 8), (6, 1, 3, 3), 6),
    ("pointwise", (2, 4, 7, 8), (6, 4, 1, 1), 1),
]


@pytest.mark.parametrize("grad_layout", cases.LAYOUTS, ids=lambda layout: f"grad_{layout.__name__}")
@pytest.mark.parametrize("weight_layout", cases.LAYOUTS, ids=lambda layout: f"weight_{layout.__name__}")
@pytest.mark.parametrize("name, input_size, weight_size, groups", FORMAT_CASES, ids=[case[0] for case in FORMAT_CASES])
def test_memory_format(name, input_size, weight_size, groups, layout, weight_layout, grad_layout, device):
    """channels_last where input or weight is, as torch has it, whatever the format of grad_output."""
    results = {}
    for conv2d in (torchcnn.functional.conv2d, F.conv2d):
        input = layout(torch.ones(input_size, device=device)).requires_grad_()
        weight = weight_layout(torch.ones(weight_size, device=device)).requires_grad_()
        output = conv2d(input, weight, padding=1, groups=groups)
        grad_input, grad_weight = torch.autograd.grad(output, (input, weight), grad_layout(torch.ones_like(output)))
        results[conv2d] = [tensor.stride() for tensor in (output, grad_input)]
        # A weight with one channel a group or one tap is in both formats: its strides are free, its format is not.
        results[conv2d] += [
            grad_weight.is_contiguous(memory_format=memory_format)
            for memory_format in (torch.contiguous_format, torch.channels_last)
        ]
    assert results[torchcnn.functional.conv2d] == results[F.conv2d]


def test_fake_tensors_have_the_sizes_and_strides_of_real_ones(case, layout):
    """The sizes are computed twice: in C++ for real tensors, in Python for torch.compile. They have to agree."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    tensors = move(make_tensors(case, torch.zeros), layout, torch.float32, "cpu")
    real = directions(torchcnn.functional.conv2d, tensors, case)
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        tensors = [None if tensor is None else mode.from_tensor(tensor) for tensor in tensors]
        fake = directions(torchcnn.functional.conv2d, tensors, case)
    for real_tensor, fake_tensor in zip(real, fake, strict=True):
        if real_tensor is not None:
            assert cases.layout_of(real_tensor) == cases.layout_of(fake_tensor)


def test_output_size(case):
    if isinstance(case.padding, str):
        pytest.skip("'same' and 'valid' belong to conv2d")
    P, Q = torchcnn.functional.conv2d_output_size(case.input[-2:], case.filters[1:], case.stride, case.padding, case.dilation)
    input, weight = torch.empty(case.input, device="meta"), torch.empty(case.weight, device="meta")
    assert F.conv2d(input, weight, **case.options).shape[-2:] == (P, Q)


def test_arguments_by_position_and_as_lists():
    input, weight, bias = torch.randn(1, 4, 9, 9), torch.randn(6, 2, 3, 3), torch.randn(6)
    for arguments in ((2, 1, 2, 2), ([2, 1], [1, 0], [1, 2], 2), ((2,), (1,), (1,), 2)):
        expected = F.conv2d(input, weight, bias, *arguments)
        torch.testing.assert_close(torchcnn.functional.conv2d(input, weight, bias, *arguments), expected)


def test_inputs_are_not_written_and_output_is_fresh():
    input, weight, bias = torch.randn(2, 3, 6, 6), torch.randn(4, 3, 1, 1), torch.randn(4)
    before = [tensor.clone() for tensor in (input, weight, bias)]
    first = torchcnn.functional.conv2d(input, weight, bias)
    second = torchcnn.functional.conv2d(input, weight, bias)
    assert first.data_ptr() != second.data_ptr()
    assert all(torch.equal(now, then) for now, then in zip((input, weight, bias), before, strict=True))


def test_gradient_of_an_expanded_grad_output():
    """output.sum().backward() hands over a grad_output whose strides are all zero."""
    gradients = []
    for conv2d in (torchcnn.functional.conv2d, F.conv2d):
        input, weight = torch.ones(2, 3, 6, 7, requires_grad=True), torch.ones(4, 3, 3, 3, requires_grad=True)
        conv2d(input, weight, stride=2, padding=1).sum().backward()
        gradients.append((input.grad, weight.grad))
    assert all(torch.equal(ours, torchs) for ours, torchs in zip(*gradients, strict=True))


def test_expanded_and_overlapping_input():
    """Stride 0 (expand) and overlapping windows (as_strided) are ordinary inputs."""
    weight = small_integers((4, 3, 3, 3)).float()
    for input in (torch.ones(1, 1, 1, 9).expand(2, 3, 8, 9), torch.arange(40.0).as_strided((2, 3, 5, 6), (3, 2, 4, 1))):
        assert torch.equal(torchcnn.functional.conv2d(input, weight), F.conv2d(input.double(), weight.double()).float())


@pytest.mark.cpu_kernels("which read either layout into the same sums")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_weights_in_channels_last_where_kernels_read_them_so(dtype):
    """Of any instruction set: Winograd kernels and those of reference do, the others get a copy."""
    x, w, dy = (torch.randn(size, dtype=dtype) for size in ((2, 18, 9, 10), (20, 18, 3, 3), (2, 20, 9, 10)))

    def directions(weight):
        leaves = x.requires_grad_(), weight.detach().requires_grad_()
        with torchcnn.backends.flags(allow_winograd=True):
            output = torchcnn.functional.conv2d(*leaves, padding=1)
            return output.detach(), *torch.autograd.grad(output, leaves, dy)

    last = directions(w.contiguous(memory_format=torch.channels_last))
    assert last[2].is_contiguous(memory_format=torch.channels_last)
    for result, expected in zip(last, directions(w), strict=True):
        assert torch.equal(result, expected)
