"""The specification itself: torchcnn/reference.py against torch, exactly, on small integers in float64."""

import cases
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiers import small_integers

from torchcnn import reference

# Python loops: only what is quick. Strings and 3-D input belong to the functional forms.
CONV2D_CASES = [
    case
    for case in cases.CONV2D_CASES
    if len(case.input) == 4 and not isinstance(case.padding, str) and case.input[2] * case.input[3] * case.filters[0] < 4000
]
POOL2D_CASES = [case for case in cases.POOL2D_CASES if len(case.input) == 4 and case.name != "large"]
ADAPTIVE_CASES = [case for case in cases.ADAPTIVE_CASES if len(case[1]) == 4 and case[0] not in ("keep_height", "empty_output")]


def assert_equal(actual, expected):
    np.testing.assert_array_equal(actual, expected.detach().numpy(), strict=True)


@pytest.mark.parametrize("case", CONV2D_CASES, ids=str)
def test_conv2d(case):
    input, weight = small_integers(case.input).requires_grad_(), small_integers(case.weight).requires_grad_()
    bias = small_integers(case.filters[:1]).requires_grad_() if case.bias else None
    output = F.conv2d(input, weight, bias, **case.options)
    arrays = [None if tensor is None else tensor.detach().numpy() for tensor in (input, weight, bias)]
    assert_equal(reference.conv2d(*arrays, **case.options), output)
    assert reference.conv2d_output_size(case.input[2:], case.filters[1:], case.stride, case.padding, case.dilation) == tuple(
        output.shape[2:]
    )

    grad_output = small_integers(output.shape)
    output.backward(grad_output)
    gradients = reference.conv2d_backward(grad_output.numpy(), *arrays[:2], **case.options)
    assert_equal(gradients[0], input.grad)
    assert_equal(gradients[1], weight.grad)
    assert_equal(gradients[2], grad_output.sum((0, 2, 3)))


def test_integers_stay_exact():
    input, weight = (np.full(shape, 2**30, np.int64) for shape in ((1, 1, 3, 3), (1, 1, 2, 2)))
    assert (reference.conv2d(input, weight) == 2**62).all()
    # float64 would lose the ones
    output, _ = reference.max_pool2d(np.array([[[[2**62, 2**62 + 1]]]]), (1, 2))
    assert output.item() == 2**62 + 1


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.int32])
@pytest.mark.parametrize("case", POOL2D_CASES, ids=str)
def test_max_and_min_pool2d(case, dtype):
    input = small_integers(case.input).numpy().astype(dtype)  # ties everywhere
    if input.dtype.kind == "f":
        input[torch.rand(case.input).numpy() < 0.1] = np.nan
        input[torch.rand(case.input).numpy() < 0.1] = np.inf
    for pool2d, sign in ((reference.max_pool2d, 1), (reference.min_pool2d, -1)):
        output, indices = pool2d(input, **case.options)
        expected, expected_indices = F.max_pool2d(sign * torch.from_numpy(input), **case.options, return_indices=True)
        assert_equal(output, sign * expected)
        assert_equal(indices, expected_indices)
        assert reference.pool2d_output_size(
            case.input[2:], case.kernel, case.stride, case.padding, case.dilation, case.ceil_mode
        ) == tuple(expected.shape[2:])


@pytest.mark.parametrize("case", POOL2D_CASES, ids=str)
def test_max_pool2d_backward(case):
    input = small_integers(case.input).requires_grad_()
    output = F.max_pool2d(input, **case.options)
    grad_output = small_integers(output.shape)
    output.backward(grad_output)
    indices = reference.max_pool2d(input.detach().numpy(), **case.options)[1]
    assert_equal(reference.max_pool2d_backward(grad_output.numpy(), indices, case.input[2:]), input.grad)


@pytest.mark.parametrize("divisor_override", [None, 3])
@pytest.mark.parametrize("count_include_pad", [True, False])
@pytest.mark.parametrize("case", POOL2D_CASES, ids=str)
def test_avg_pool2d(case, count_include_pad, divisor_override):
    options = {**case.avg_options, "count_include_pad": count_include_pad, "divisor_override": divisor_override}
    input = small_integers(case.input).requires_grad_()
    output = F.avg_pool2d(input, **options)
    assert_equal(reference.avg_pool2d(input.detach().numpy(), **options), output)
    grad_output = small_integers(output.shape)
    output.backward(grad_output)
    grad_input = reference.avg_pool2d_backward(grad_output.numpy(), case.input[2:], **options)
    np.testing.assert_allclose(grad_input, input.grad, rtol=1e-14, atol=1e-14)  # sums of thirds are not exact


@pytest.mark.parametrize("name, size, output_size", ADAPTIVE_CASES, ids=[case[0] for case in ADAPTIVE_CASES])
def test_adaptive_pooling(name, size, output_size):
    input = small_integers(size).requires_grad_()
    array = input.detach().numpy()

    output = F.adaptive_avg_pool2d(input, output_size)
    grad_output = small_integers(output.shape)
    output.backward(grad_output)
    np.testing.assert_allclose(reference.adaptive_avg_pool2d(array, output_size), output.detach(), rtol=1e-15)
    grad_input = reference.adaptive_avg_pool2d_backward(grad_output.numpy(), size[2:])
    np.testing.assert_allclose(grad_input, input.grad, rtol=1e-14, atol=1e-14)

    input.grad = None
    output, indices = F.adaptive_max_pool2d(input, output_size, return_indices=True)
    output.backward(grad_output)
    actual, actual_indices = reference.adaptive_max_pool2d(array, output_size)
    assert_equal(actual, output)
    assert_equal(actual_indices, indices)
    assert_equal(reference.max_pool2d_backward(grad_output.numpy(), indices.numpy(), size[2:]), input.grad)


def test_global_pooling():
    input = small_integers((2, 3, 4, 8))
    assert_equal(reference.global_avg_pool2d(input.numpy()), input.mean((2, 3), keepdim=True))
    assert_equal(reference.global_max_pool2d(input.numpy()), input.amax((2, 3), keepdim=True))


@pytest.mark.parametrize("kernel_size, stride, padding", [(2, None, 0), (3, 3, 1), ((2, 3), (4, 3), (1, 0))])
def test_max_unpool2d(kernel_size, stride, padding):
    pooled, indices = F.max_pool2d(small_integers((2, 3, 11, 12)), kernel_size, stride, padding, return_indices=True)
    input = pooled.clone().requires_grad_()
    output = F.max_unpool2d(input, indices, kernel_size, stride, padding, output_size=(11, 12))
    assert_equal(reference.max_unpool2d(pooled.numpy(), indices.numpy(), (11, 12)), output)
    grad_output = small_integers(output.shape)
    output.backward(grad_output)
    assert_equal(reference.max_unpool2d_backward(grad_output.numpy(), indices.numpy()), input.grad)

    size = reference.max_unpool2d_output_size(pooled.shape[2:], kernel_size, stride, padding)
    assert F.max_unpool2d(pooled, 0 * indices, kernel_size, stride, padding).shape[2:] == size
