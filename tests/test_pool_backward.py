"""What max pooling keeps for backward, and the fused rectifier."""

import pytest
import torch

import torchcnn

WINDOWS = [
    {"kernel_size": 2},
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": (3, 2), "stride": 1, "dilation": (1, 2), "ceil_mode": True},
]


def saved_tensors(run):
    kept = []

    def pack(tensor):
        kept.append((tensor.dtype, tuple(tensor.shape)))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return kept


@pytest.mark.parametrize("operator", ["max_pool2d", "min_pool2d", "relu_max_pool2d"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_one_byte_an_output_element_and_not_the_input(operator, memory_format):
    input = torch.randn(2, 5, 9, 8).to(memory_format=memory_format).requires_grad_()
    kept = saved_tensors(lambda: getattr(torchcnn.functional, operator)(input, 3, 2, 1))
    assert kept == [(torch.uint8, (2, 5, 5, 4))]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_windows_above_256_taps_take_four_bytes(memory_format, device):
    results = []
    for max_pool2d in (torchcnn.functional.max_pool2d, torch.nn.functional.max_pool2d):
        torch.manual_seed(0)
        input = torch.randn(1, 8, 40, 40, device=device).to(memory_format=memory_format).requires_grad_()
        results.append([])
        kept = saved_tensors(lambda max_pool2d=max_pool2d, input=input: results[-1].append(max_pool2d(input, 17, 20)))
        results[-1].append(torch.autograd.grad(results[-1][0].sum(), input)[0])
        if max_pool2d is torchcnn.functional.max_pool2d:
            assert kept == [(torch.int32, (1, 8, 2, 2))]
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.parametrize("output_size, dtype", [(7, torch.uint8), (6, torch.uint8), (1, torch.uint8), (5, torch.int64)])
def test_adaptive_max_keeps_offsets_where_its_windows_slide(output_size, dtype):
    """13 = 6 x 2 + 1 slides, 14 = 7 x 2 too; of 13 rows in 5 windows some are 3 high, some 4."""
    size = 14 if output_size == 7 else 13
    input = torch.randn(2, 3, size, size, requires_grad=True)
    kept = saved_tensors(lambda: torchcnn.functional.adaptive_max_pool2d(input, output_size))
    assert kept == [(dtype, (2, 3, output_size, output_size))]


@pytest.mark.parametrize("kernel_size, padding", [((2**32, 1), (2**31, 0)), ((1, 2**32), (0, 2**31))], ids=["high", "wide"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_window_far_larger_than_the_plane(memory_format, kernel_size, padding, device):
    """The work is that of the plane, not of the 2 ** 32 positions of a window that is padding but for one of them."""
    input = torch.ones(1, 2, 1, 1, device=device).to(memory_format=memory_format).requires_grad_()
    output = torchcnn.functional.avg_pool2d(input, kernel_size, 1, padding, divisor_override=4)
    assert torch.equal(output.cpu(), torch.full((1, 2, 1 + (padding[0] > 0), 1 + (padding[1] > 0)), 0.25))
    assert torch.equal(torch.autograd.grad(output.sum(), input)[0].cpu(), torch.full((1, 2, 1, 1), 0.5))


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("C", [7, 16])
def test_fused_relu_is_relu_then_max_pool(window, memory_format, dtype, C, device):
    values = torch.randn(3, C, 11, 10).to(device, dtype).to(memory_format=memory_format)
    values[0, 0, :4, :4] = -1.0  # a window with nothing above zero passes no gradient
    values[1, 1, 2, 2] = torch.nan
    results = []
    for run in (
        lambda x: torchcnn.functional.relu_max_pool2d(x, **window),
        lambda x: torch.nn.functional.max_pool2d(x.relu(), **window),
    ):
        input = values.clone(memory_format=torch.preserve_format).requires_grad_()
        output = run(input)
        # Small integers: overlapping windows add up exactly in any order.
        output.backward(torch.arange(output.numel(), device=device).remainder(5).reshape(output.shape).to(dtype))
        results.append((output.detach(), input.grad))
    for ours, torchs in zip(*results, strict=True):
        torch.testing.assert_close(ours, torchs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_fused_relu_gradients(window, device):
    input = ((torch.randperm(2 * 2 * 6 * 7).reshape(2, 2, 6, 7).double() - 80.5) / 10).to(device)
    input.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: torchcnn.functional.relu_max_pool2d(x, **window), input, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda x: torchcnn.functional.relu_max_pool2d(x, **window), input)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("C", [1, 32, 33, 65])
def test_indices_of_channels_last_planes(C, dtype, device):
    """The last channels of a channels_last tensor may be a single one, whose elements are nevertheless C apart."""
    input = torch.randn(2, C, 8, 8).to(device, dtype).contiguous(memory_format=torch.channels_last)
    gradients = []
    for function in (torchcnn.functional.max_pool2d, torch.nn.functional.max_pool2d):
        leaf = input.clone(memory_format=torch.preserve_format).requires_grad_()
        output, _ = function(leaf, 2, return_indices=True)
        weights = torch.arange(output.numel(), device=device).remainder(7).reshape(output.shape).to(dtype)
        gradients.append(torch.autograd.grad((output * weights).sum(), leaf)[0])
    assert torch.equal(*gradients)


GATHERED = [
    (3, 1, 1),
    (3, 1, 0),
    (3, 2, 1),
    (3, 2, 0),
    (2, 1, 1),
    (2, 1, 0),
    (2, 2, 1),
    ((1, 3), 2, (0, 1)),
    ((3, 2), (2, 1), (1, 1)),
]


@pytest.mark.parametrize("window", GATHERED, ids=str)
@pytest.mark.parametrize("size", [(67, 97), (6, 100), (3, 13), (1, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("operator", ["max_pool2d", "relu_max_pool2d"])
@pytest.mark.parametrize("ceil_mode", [False, True])
def test_gradients_of_rows_of_several_vectors(operator, dtype, size, window, ceil_mode):
    """Sums of small integers, exact in any order, against the indices that torch finds; ties and negative windows among them."""
    values = torch.randint(-6, 5, (2, 3, *size)).to(dtype)
    kernel, stride, padding = window
    try:
        expected, indices = torch.nn.functional.max_pool2d(
            values.double(), kernel, stride, padding, ceil_mode=ceil_mode, return_indices=True
        )
    except RuntimeError:
        pytest.skip("a window larger than the padded plane")
    leaf = values.requires_grad_()
    output = getattr(torchcnn.functional, operator)(leaf, kernel, stride, padding, ceil_mode=ceil_mode)
    weights = torch.arange(output.numel()).remainder(7).sub(3).reshape(output.shape)
    shares = weights.double() * (expected > 0) if operator == "relu_max_pool2d" else weights.double()
    gradient = torch.zeros(2, 3, size[0] * size[1], dtype=torch.float64)
    gradient.scatter_add_(-1, indices.flatten(-2), shares.flatten(-2))
    assert torch.equal(torch.autograd.grad(output, leaf, weights.to(dtype))[0].double(), gradient.reshape(values.shape))


@pytest.mark.parametrize("window", [(3, 1, 1), (3, 2, 1), (3, 3, 0), (5, 2, 2)], ids=str)
@pytest.mark.parametrize("size", [9, 64])
def test_gradients_do_not_depend_on_the_place_in_the_batch(size, window):
    input = torch.randn(5, 3, size, size)
    output = torchcnn.functional.max_pool2d(input, *window)
    weights = torch.randn_like(output)

    def gradient(images):
        leaf = input[images].clone().requires_grad_()
        return torch.autograd.grad(torchcnn.functional.max_pool2d(leaf, *window), leaf, weights[images])[0]

    assert torch.equal(gradient(slice(0, 5)), torch.cat([gradient(slice(i, i + 1)) for i in range(5)]))


@pytest.mark.parametrize("operator", ["avg_pool2d", "adaptive_avg_pool2d"])
@pytest.mark.parametrize("size", [(5, 5), (9, 4), (30, 6), (15, 15)], ids=str)
@pytest.mark.parametrize(
    "C, memory_format", [(1, torch.contiguous_format), (3, torch.contiguous_format), (3, torch.channels_last)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_averages_do_not_depend_on_the_batch(operator, size, C, memory_format, dtype):
    input = torch.randn(17, C, *size, dtype=dtype)  # with few channels in each image, vectors may hold planes of several

    def average(images, gradient=None):
        leaf = input[images].contiguous(memory_format=memory_format).requires_grad_()
        output = getattr(torchcnn.functional, operator)(leaf, 3)
        return output if gradient is None else torch.autograd.grad(output, leaf, gradient[images])[0]

    together = average(slice(None))
    gradient = torch.randn_like(together)
    images = [slice(i, i + 1) for i in range(17)]
    assert torch.equal(together, torch.cat([average(image) for image in images]))
    assert torch.equal(average(slice(None), gradient), torch.cat([average(image, gradient) for image in images]))


# Whole planes above and below a vector, of several blocks and with a rest; rows below a vector, whose planes are transposed.
PLANES = [
    ((3, 41, 7, 7), (7, 1)),
    ((2, 19, 17, 19), (1, 3)),
    ((2, 3, 40, 33), (1,)),
    ((5, 37, 13, 13), (6, 5)),
    ((3, 33, 14, 14), (7,)),
]


@pytest.mark.parametrize("shape, output_size", [(shape, size) for shape, sizes in PLANES for size in sizes], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_adaptive_extremes_of_many_planes(shape, output_size, memory_format, dtype):
    """Ties, NaN and infinities; the gradient of max_pool2d from offsets against the indices that torch finds."""
    values = torch.randint(-3, 4, shape).to(dtype)
    values[torch.rand(shape) < 0.02] = torch.nan
    values[torch.rand(shape) < 0.1] = -torch.inf
    values[:, 2] = -torch.inf
    leaf = values.contiguous(memory_format=memory_format).requires_grad_()
    expected, indices = torch.nn.functional.adaptive_max_pool2d(values.double(), output_size, return_indices=True)
    output = torchcnn.functional.adaptive_max_pool2d(leaf, output_size)
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=0, equal_nan=True)
    weights = torch.arange(output.numel()).remainder(5).reshape(output.shape)
    gradient = torch.zeros(*shape[:2], shape[2] * shape[3], dtype=torch.float64)
    gradient.scatter_add_(-1, indices.flatten(-2), weights.double().flatten(-2))
    assert torch.equal(torch.autograd.grad(output, leaf, weights.to(dtype))[0].double(), gradient.reshape(shape))
    with torch.no_grad():
        assert torch.equal(torchcnn.functional.adaptive_max_pool2d(leaf, output_size).nan_to_num(7), output.nan_to_num(7))


@pytest.mark.parametrize("size", [(4, 6), (8, 8), (1, 9), (5, 3)], ids=str)
@pytest.mark.parametrize("kernel_size", [7, (9, 12), (3, 16)], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_offsets_in_a_window_larger_than_the_plane(size, kernel_size, memory_format):
    """With ceil_mode one window can cover more than there is; its offsets count in its own columns, not in the plane's."""
    input = torch.randn(2, 19, *size).contiguous(memory_format=memory_format)
    tangent, kernel = torch.randn_like(input), kernel_size if isinstance(kernel_size, tuple) else (kernel_size, kernel_size)
    expected, indices = torch.nn.functional.max_pool2d(input, kernel, ceil_mode=True, return_indices=True)
    output, change = torch.func.jvp(lambda x: torchcnn.functional.max_pool2d(x, kernel, ceil_mode=True), (input,), (tangent,))
    assert torch.equal(output, expected)
    assert torch.equal(change, tangent.flatten(-2).gather(-1, indices.flatten(-2)).reshape(expected.shape))
    window = (*kernel, *kernel, 0, 0, 1, 1, True)
    offsets = torch.ops.torchcnn.max_pool2d_with_offsets(input, *window)[1]
    gradient = torch.ops.torchcnn.offset_pool2d_grad_input(expected, offsets, *size, *window, False)
    sums = torch.zeros(2, 19, size[0] * size[1]).scatter_add_(-1, indices.flatten(-2), expected.flatten(-2))
    torch.testing.assert_close(gradient, sums.reshape(input.shape))


@pytest.mark.parametrize(
    "size, window",
    [
        ((5, 3), (1, 2, 1, 2**63 - 1, 0, 0, 1, 2**63 - 2, True)),
        ((6, 4), (3, 1, 1, 1, 2**61, 0, 2**61, 1, False)),
    ],
    ids=["stride", "dilation"],
)
def test_offsets_of_windows_beyond_any_plane(size, window):
    """What the sizes of a window would overflow, is found out before; offsets that point nowhere add nothing."""
    input = torch.randn(1, 1, *size)
    output, offsets = torch.ops.torchcnn.max_pool2d_with_offsets(input, *window)
    gradient = torch.ops.torchcnn.offset_pool2d_grad_input(torch.ones_like(output), offsets, *size, *window, False)
    assert gradient.sum() == output.numel()
    moved = torch.ops.torchcnn.offset_pool2d_grad_input(
        torch.ones_like(output), torch.full_like(offsets, 200), *size, *window, False
    )
    assert moved.abs().sum() == 0


@pytest.mark.parametrize("window", [(1, 1, 0), (7, 7, 0), (2, 2, 0), (5, 4, 2)], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_fused_relu_of_many_planes(window, memory_format):
    """Elementwise, global and small: a window with nothing above zero keeps no position."""
    values = torch.randint(-4, 3, (3, 37, 7, 7)).float()
    results = []
    for run in (torchcnn.functional.relu_max_pool2d, lambda x, *window: torch.nn.functional.max_pool2d(x.relu(), *window)):
        leaf = values.contiguous(memory_format=memory_format).requires_grad_()
        output = run(leaf, *window)
        weights = torch.arange(output.numel()).remainder(5).reshape(output.shape).float()
        results.append((output.detach(), torch.autograd.grad(output, leaf, weights)[0]))
    for ours, torchs in zip(*results, strict=True):
        assert torch.equal(ours, torchs)


@pytest.mark.parametrize("output_size", [1, 2, 6, 7, (3, 5)], ids=str)
@pytest.mark.parametrize("size", [6, 13, 40])
def test_the_sign_of_zero_is_that_of_the_first(size, output_size):
    """Of 0 and -0 the first in row-major order stays, whether positions are asked for or not."""
    input = -torch.randint(0, 3, (2, 35, size, size)).float()
    input = torch.where(torch.rand(input.shape) < 0.3, torch.zeros(()), input)
    pool = torchcnn.functional.adaptive_max_pool2d
    output, indices = pool(input, output_size, return_indices=True)
    first = input.flatten(-2).gather(-1, indices.flatten(-2)).reshape(output.shape)
    for values in (output, pool(input, output_size), pool(input.clone().requires_grad_(), output_size)):
        assert torch.equal(values, first) and torch.equal(values.signbit(), first.signbit())
