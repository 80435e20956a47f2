"""torchcnn.numpy: the kernels on NumPy arrays, against the specification and, bit for bit, against the tensors' path."""

import cases
import numpy as np
import pytest
import torch
from tiers import small_integers

import torchcnn
from torchcnn import reference

CONV2D_CASES = [case for case in cases.CONV2D_CASES if len(case.input) == 4 and not isinstance(case.padding, str)]
POOL2D_CASES = [case for case in cases.POOL2D_CASES if len(case.input) == 4]
AVG_OPTIONS = [{}, {"count_include_pad": False}, {"divisor_override": 3}]


@pytest.fixture(params=[np.float32, np.float64], ids=["float32", "float64"])
def np_dtype(request):
    return request.param


def small(case):
    """Whether the loops of the specification are quick enough."""
    return case.input[0] * case.input[1] * case.input[2] * case.input[3] < 3000


def conv2d_arrays(case, make):
    output = reference.conv2d_output_size(case.input[2:], case.filters[1:], case.stride, case.padding, case.dilation)
    input, weight, bias = make(case.input), make(case.weight), make(case.filters[:1]) if case.bias else None
    return input, weight, bias, make((case.input[0], case.filters[0], *output))


def assert_identical(arrays, expected):
    for array, other in zip(arrays, expected, strict=True):
        other = other.detach().numpy() if isinstance(other, torch.Tensor) else other
        np.testing.assert_array_equal(array, other, strict=True)  # dtype and shape too
        assert array.flags.c_contiguous


@pytest.mark.parametrize("case", [case for case in CONV2D_CASES if small(case)], ids=str)
def test_conv2d_is_the_specification(case, np_dtype):
    input, weight, bias, grad_output = conv2d_arrays(case, lambda shape: small_integers(shape).numpy().astype(np_dtype))
    output = torchcnn.numpy.conv2d(input, weight, bias, **case.options)
    gradients = torchcnn.numpy.conv2d_backward(grad_output, input, weight, **case.options)
    assert_identical([output], [reference.conv2d(input, weight, bias, **case.options)])
    assert_identical(gradients, reference.conv2d_backward(grad_output, input, weight, **case.options))


@pytest.mark.parametrize("case", CONV2D_CASES, ids=str)
def test_conv2d_has_the_bits_of_the_tensors(case, np_dtype):
    input, weight, bias, grad_output = conv2d_arrays(case, lambda shape: torch.randn(shape).numpy().astype(np_dtype))
    output = torchcnn.numpy.conv2d(input, weight, bias, **case.options)
    gradients = torchcnn.numpy.conv2d_backward(grad_output, input, weight, **case.options)

    leaves = [torch.from_numpy(array).requires_grad_() for array in (input, weight)]
    leaves.append(torch.zeros(case.filters[0], dtype=leaves[0].dtype) if bias is None else torch.from_numpy(bias))
    leaves[2].requires_grad_()
    expected = torchcnn.functional.conv2d(*leaves[:2], leaves[2] if case.bias else None, **case.options)
    assert_identical([output], [expected])
    with_bias = torchcnn.functional.conv2d(*leaves, **case.options)
    assert_identical(gradients, torch.autograd.grad(with_bias, leaves, torch.from_numpy(grad_output)))


@pytest.mark.parametrize("case", POOL2D_CASES, ids=str)
def test_max_pool2d(case, np_dtype):
    input = small_integers(case.input).numpy().astype(np_dtype)
    input[torch.rand(case.input).numpy() < 0.1] = np.nan
    output, indices = torchcnn.numpy.max_pool2d(input, **case.options)
    grad_output = small_integers(output.shape).numpy().astype(np_dtype)
    grad_input = torchcnn.numpy.max_pool2d_backward(grad_output, indices, case.input[2:])

    leaf = torch.from_numpy(input).requires_grad_()
    expected = torchcnn.functional.max_pool2d(leaf, **case.options, return_indices=True)
    assert_identical([output, indices], expected)
    assert_identical([grad_input], torch.autograd.grad(expected[0], leaf, torch.from_numpy(grad_output)))
    if small(case):
        assert_identical([output, indices], reference.max_pool2d(input, **case.options))
        assert_identical([grad_input], [reference.max_pool2d_backward(grad_output, indices, case.input[2:])])


@pytest.mark.parametrize("options", AVG_OPTIONS, ids=["plain", "exclude_pad", "divisor"])
@pytest.mark.parametrize("case", POOL2D_CASES, ids=str)
def test_avg_pool2d(case, options, np_dtype):
    options = {**case.avg_options, **options}
    input = small_integers(case.input).numpy().astype(np_dtype)
    output = torchcnn.numpy.avg_pool2d(input, **options)
    grad_output = torch.randn(output.shape).numpy().astype(np_dtype)
    grad_input = torchcnn.numpy.avg_pool2d_backward(grad_output, case.input[2:], **options)

    leaf = torch.from_numpy(input).requires_grad_()
    expected = torchcnn.functional.avg_pool2d(leaf, **options)
    assert_identical([output], [expected])
    assert_identical([grad_input], torch.autograd.grad(expected, leaf, torch.from_numpy(grad_output)))
    if small(case):
        eps = np.finfo(np_dtype).eps
        np.testing.assert_allclose(output, reference.avg_pool2d(input, **options), rtol=2 * eps, atol=0)
        magnitude = reference.avg_pool2d_backward(abs(grad_output), case.input[2:], **options)
        error = abs(grad_input - reference.avg_pool2d_backward(grad_output, case.input[2:], **options))
        R, S = (case.kernel, case.kernel) if isinstance(case.kernel, int) else case.kernel
        assert (error <= eps * (R * S + 1) * abs(magnitude)).all()


def test_arrays_of_any_strides():
    """Reversed, transposed and sliced arrays are copied as needed; what is not native float is refused."""
    input = np.asfortranarray(small_integers((2, 3, 9, 8)).numpy())[::-1, :, ::2, ::-1]
    weight = small_integers((3, 4, 3, 2)).numpy().transpose(1, 0, 2, 3)
    assert_identical(
        [torchcnn.numpy.conv2d(input, weight, padding=1)],
        [reference.conv2d(np.ascontiguousarray(input), np.ascontiguousarray(weight), padding=1)],
    )
    read_only = input.copy()
    read_only.flags.writeable = False
    assert_identical(torchcnn.numpy.max_pool2d(read_only, 2), torchcnn.numpy.max_pool2d(input, 2))
    swapped = input.astype(input.dtype.newbyteorder())
    assert_identical([torchcnn.numpy.avg_pool2d(swapped, 2)], [torchcnn.numpy.avg_pool2d(input, 2)])


A, W = np.zeros((2, 3, 6, 6), np.float32), np.zeros((4, 3, 3, 3), np.float32)


@pytest.mark.parametrize(
    "call, error, says",
    [
        (lambda n: n.conv2d(A[0], W), ValueError, "conv2d: input.*4.*3"),
        (lambda n: n.conv2d(A, W[0]), ValueError, "conv2d: weight.*4.*3"),
        (lambda n: n.conv2d(A, W[:, :2]), ValueError, "conv2d: .*channels.*3.*2"),
        (lambda n: n.conv2d(A, W, groups=2), ValueError, "conv2d: .*groups"),
        (lambda n: n.conv2d(A, W, A[0, 0, 0]), ValueError, "conv2d: bias.*6.*4"),
        (lambda n: n.conv2d(A, W, A[0, 0]), ValueError, "conv2d: bias.*1.*2"),
        (lambda n: n.conv2d(A, W, stride=0), ValueError, "conv2d: stride.*0"),
        (lambda n: n.conv2d(A, W, padding=-1), ValueError, "conv2d: padding.*-1"),
        (lambda n: n.conv2d(A, W, dilation=3), ValueError, "conv2d: output size.*6.*7"),
        (lambda n: n.conv2d(A, W, padding=2**62), ValueError, "conv2d: .*64 bits"),
        (lambda n: n.conv2d(A, W, stride=1.5), TypeError, "conv2d: stride.*1.5"),
        (lambda n: n.conv2d(A, W.astype(np.float64)), TypeError, "conv2d: .*float32.*float64"),
        (lambda n: n.conv2d(A.astype(int), W.astype(int)), TypeError, "conv2d: .*int64"),
        (lambda n: n.conv2d(A.astype(np.float16), W.astype(np.float16)), TypeError, "conv2d: .*float16"),
        (lambda n: n.conv2d(A.astype(complex), W.astype(complex)), TypeError, "conv2d: .*complex128"),
        (lambda n: n.conv2d(A.tolist(), W), TypeError, "conv2d: input.*list"),
        (lambda n: n.conv2d(torch.from_numpy(A), W), TypeError, "conv2d: input.*Tensor"),
        (lambda n: n.conv2d(A, None), TypeError, "conv2d: weight.*NoneType"),
        (lambda n: n.conv2d_backward(A, A, W), ValueError, "conv2d_backward: grad_output.*2, 4, 4, 4.*2, 3, 6, 6"),
        (lambda n: n.max_pool2d(A, 0), ValueError, "max_pool2d: kernel.*0"),
        (lambda n: n.max_pool2d(A, 3, padding=2), ValueError, "max_pool2d: padding.*half.*2.*3"),
        (lambda n: n.max_pool2d(A, 7), ValueError, "max_pool2d: output size.*6.*7"),
        (lambda n: n.max_pool2d(A[0], 2), ValueError, "max_pool2d: input.*4.*3"),
        (lambda n: n.avg_pool2d(A, 2, divisor_override=0), ValueError, "avg_pool2d: divisor.*0"),
        (lambda n: n.avg_pool2d(A.astype(np.int64), 2), TypeError, "avg_pool2d: .*int64"),
        (
            lambda n: n.max_pool2d_backward(A, np.full(A.shape, 36), (6, 6)),
            ValueError,
            "max_pool2d_backward: indices.*35.*36",
        ),
        (lambda n: n.max_pool2d_backward(A, np.full(A.shape, -1), (6, 6)), ValueError, "max_pool2d_backward: indices.*-1"),
        (
            lambda n: n.max_pool2d_backward(A, np.zeros((2, 3, 6, 5), int), (6, 6)),
            ValueError,
            "max_pool2d_backward: indices.*5.*6",
        ),
        (lambda n: n.max_pool2d_backward(A, A, (6, 6)), TypeError, "max_pool2d_backward: indices.*int64.*float32"),
        (lambda n: n.avg_pool2d_backward(A, (6, 6), 2), ValueError, "avg_pool2d_backward: grad_output.*3.*6"),
    ],
)
def test_wrong_arrays(call, error, says):
    with pytest.raises(error, match=f"^{says}"):
        call(torchcnn.numpy)
