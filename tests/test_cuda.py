"""What the CUDA kernels alone have: TF32, limits of sizes, tiles. They run on a GPU, or on the processor in the emulator
(make cuda-check); every other operator test runs on them there too."""

import cases
import pytest
import torch
from conftest import cuda_device
from test_conv2d import DIRECTIONS, directions, lengths, make_tensors, move
from tiers import assert_bound, assert_exact, small_integers

import torchcnn.functional

pytestmark = pytest.mark.skipif(cuda_device() is None, reason="no CUDA kernels")


def set_precision(precision):
    with torch.backends.__allow_nonbracketed_mutation():  # PyTorch's test helpers bar it
        torch.backends.cudnn.conv.fp32_precision = precision


@pytest.fixture
def tf32():
    set_precision("tf32")
    yield
    set_precision("ieee")


def case_named(name):
    (case,) = (case for case in cases.CONV2D_CASES if case.name == name)
    return case


TF32_CASES = ["plain_3x3", "all_mixed", "large_grouped", "block_136_filters", "pointwise", "stride_2"]


@pytest.mark.parametrize("name", TF32_CASES)
def test_tf32_exact(name, layout, tf32):
    """Small integers have few enough bits for TF32."""
    case = case_named(name)
    tensors = make_tensors(case, small_integers)
    results = directions(torchcnn.functional.conv2d, move(tensors, layout, torch.float32, cuda_device()), case)
    truths = directions(torch.nn.functional.conv2d, tensors, case)
    for direction, actual, truth in zip(DIRECTIONS, results, truths, strict=True):
        assert_exact(actual.cpu(), truth, direction)


@pytest.mark.parametrize("name", TF32_CASES)
def test_tf32_bound(name, layout, tf32):
    """Both factors are rounded to 11 bits, |error| <= (2 u + u^2) |x w| with u = 2^-11; the sum is as exact as in float32."""
    case = case_named(name)
    tensors = move(make_tensors(case, torch.randn), layout, torch.float32, cuda_device())
    results = directions(torchcnn.functional.conv2d, tensors, case)
    doubles = [tensor.cpu().double() for tensor in tensors]
    truths = directions(torch.nn.functional.conv2d, doubles, case)
    magnitudes = directions(torch.nn.functional.conv2d, [tensor.abs() for tensor in doubles], case)
    set_precision("ieee")
    ieee = directions(torchcnn.functional.conv2d, tensors, case)
    eps = torch.finfo(torch.float32).eps
    for direction, actual, truth, magnitude, length, unrounded in zip(
        DIRECTIONS, results, truths, magnitudes, lengths(case, truths[0]), ieee, strict=True
    ):
        rounding = 0 if direction == "grad_bias" else 2 * 2**-11 + 2**-22
        error = (actual.cpu().double() - truth).abs()
        assert (error <= (rounding + eps * length) * magnitude).all(), direction
        assert torch.equal(actual, unrounded) == (direction == "grad_bias"), f"{direction}: TF32 makes no difference"


def test_ieee_is_obeyed(layout):
    """Without TF32 a sum of products that need all bits is right to float32."""
    case = case_named("plain_3x3")
    tensors = move(make_tensors(case, torch.randn), layout, torch.float32, cuda_device())
    result = torchcnn.functional.conv2d(*tensors[:3], **case.options).cpu()
    doubles = [tensor.cpu().double() for tensor in tensors[:3]]
    truth = torch.nn.functional.conv2d(*doubles, **case.options)
    magnitude = torch.nn.functional.conv2d(*(tensor.abs() for tensor in doubles), **case.options)
    assert_bound(result, truth, magnitude, lengths(case, truth)[0])


@pytest.mark.skipif(cuda_device() == "cuda", reason="a GPU takes no further work from a process whose kernel has stopped")
@pytest.mark.parametrize("index", [-1, 36, 2**62])
def test_an_index_outside_the_plane_stops_the_kernel(index):
    values, indices = torch.ones(2, 4, 3, 3), torch.zeros(2, 4, 3, 3, dtype=torch.int64)
    indices[1, 2, 2, 1] = index
    for name, arguments in (
        ("max_unpool2d", (values, indices, 6, 6)),
        ("max_pool2d_grad_input", (values, indices, 6, 6, False)),
        ("max_unpool2d_grad_input", (torch.ones(2, 4, 6, 6), indices)),
    ):
        with pytest.raises(RuntimeError, match=f"^{name}: .*indices must lie in the plane"):
            getattr(torch.ops.torchcnn, name)(*arguments)


def test_sizes_beyond_a_gpu():
    """The kernels keep sizes of an axis in 32 bits."""
    input, weight = torch.ones(1, 1, 1, 5, device=cuda_device()), torch.ones(1, 1, 1, 1, device=cuda_device())
    with pytest.raises(RuntimeError, match=r"conv2d: width must be below 1073741824 on a GPU, got 1073741829"):
        torchcnn.functional.conv2d(input, weight, padding=(0, 2**29), stride=(1, 2**29))
