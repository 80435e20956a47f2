"""What the CUDA kernels alone have: TF32, limits of sizes, tiles. They run on a GPU, or on the processor in the emulator
(make cuda-check); every other operator test runs on them there too."""

import cases
import pytest
import torch
from conftest import cuda_device
from test_conv2d import DIRECTIONS, directions, lengths, make_tensors, move
from tiers import assert_bound, assert_exact, small_integers

import torchcnn
import torchcnn.functional

pytestmark = pytest.mark.skipif(cuda_device() is None, reason="no CUDA kernels")
on_a_gpu = pytest.mark.skipif(cuda_device() != "cuda", reason="no GPU")
HAS_TENSOR_CORES = cuda_device() != "cuda" or torch.cuda.get_device_capability() >= (8, 0)  # for TF32


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


TF32_CASES = [
    "plain_3x3",
    "all_mixed",
    "large_grouped",
    "block_136_filters",
    "pointwise",
    "stride_2",
    "chunks_128",
    "gather_mixed",
]


@pytest.mark.parametrize("name", TF32_CASES)
def test_tf32_exact(name, layout, tf32):
    """Small integers have few enough bits for TF32."""
    case = case_named(name)
    tensors = make_tensors(case, small_integers)
    results = directions(torchcnn.functional.conv2d, move(tensors, layout, torch.float32, cuda_device()), case)
    truths = directions(torch.nn.functional.conv2d, tensors, case)
    for direction, actual, truth in zip(DIRECTIONS, results, truths, strict=True):
        assert_exact(actual.cpu(), truth, direction)


def goes_without_tensor_cores(case, direction):
    """suits_direct of csrc/cuda/conv2d_host.cuh; a bias needs no product."""
    filters, channels = case.weight[0] // case.groups, case.weight[1]
    read, written = {"forward": (channels, filters), "grad_input": (filters, channels)}.get(direction, (64, 64))
    return direction == "grad_bias" or written <= 8 or read <= 4


@pytest.mark.parametrize("name", TF32_CASES)
def test_tf32_bound(name, layout, tf32):
    """Tensor cores round both factors to 11 bits, |error| <= (2 u + u^2) |x w| with u = 2^-11; the sum is as exact as in float32.

    Groups of few channels go without them.
    """
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
        if HAS_TENSOR_CORES:
            assert torch.equal(actual, unrounded) == goes_without_tensor_cores(case, direction), direction


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


# What an emulator does not have: streams, graphs, several devices, torch's own state of a GPU.


def a_net_and_images():
    net = torch.nn.Sequential(
        torchcnn.Conv2d(3, 8, 3, activation="relu"),
        torchcnn.MaxPool2d(2),
        torchcnn.Conv2d(8, 8, 3, groups=8),
        torchcnn.AvgPool2d(2),
    )
    return net.cuda(), torch.randn(4, 3, 18, 18, device="cuda")


def step(net, images):
    output = net(images)
    return output, *torch.autograd.grad(output.square().sum(), list(net.parameters()))


@on_a_gpu
def test_work_joins_the_current_stream():
    """The operator comes after what the stream was given before it: elsewhere it would find zeros."""
    input, weight = torch.zeros(1, 1, 8, 8, device="cuda"), torch.ones(1, 1, 3, 3, device="cuda")
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        input.fill_(1)
        output = torchcnn.functional.conv2d(input, weight)
    stream.synchronize()
    assert (output == 9).all()


@on_a_gpu
def test_a_graph_captures_forward_and_backward():
    net, images = a_net_and_images()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # as torch asks for: memory and libraries are there before the capture
        step(net, images)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(net, images)
    images.copy_(torch.randn_like(images))
    graph.replay()
    for of_graph, eager in zip(captured, step(net, images), strict=True):
        assert torch.equal(of_graph, eager)


@on_a_gpu
def test_the_same_bits_again():
    net, images = a_net_and_images()
    for first, again in zip(step(net, images), step(net, images), strict=True):
        assert torch.equal(first, again)


@on_a_gpu
def test_derivatives_by_finite_differences():
    inputs = torch.randn(1, 2, 5, 6), torch.randn(4, 1, 3, 3), torch.randn(4)
    inputs = [tensor.double().cuda().requires_grad_() for tensor in inputs]
    options = {"stride": (2, 1), "padding": 1, "groups": 2}
    assert torch.autograd.gradcheck(lambda *t: torchcnn.functional.conv2d(*t, **options), inputs, nondet_tol=0)
    assert torch.autograd.gradgradcheck(lambda *t: torchcnn.functional.conv2d(*t, **options), inputs, nondet_tol=0)
    inputs[1] = torch.randn(2, 2, 3, 3).double().cuda().requires_grad_()
    assert torch.autograd.gradcheck(lambda *t: torchcnn.functional.conv_transpose2d(*t, **options), inputs, nondet_tol=0)
    for pool in ("max", "avg"):
        function = getattr(torchcnn.functional, f"{pool}_pool2d")
        assert torch.autograd.gradcheck(lambda x, function=function: function(x, 3, 2, 1), inputs[:1], nondet_tol=0)


@on_a_gpu
def test_autocast():
    net, images = a_net_and_images()
    with torch.autocast("cuda", torch.bfloat16):
        assert torchcnn.functional.conv2d(images, net[0].weight).dtype == torch.bfloat16
        assert torchcnn.functional.conv_transpose2d(images, net[0].weight.transpose(0, 1)).dtype == torch.bfloat16
        assert torchcnn.functional.max_pool2d(images, 2).dtype == torch.float32


@on_a_gpu
def test_compiled():
    net, images = a_net_and_images()
    torch._dynamo.reset()
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    for of_compiled, eager in zip(step(compiled, images), step(net, images), strict=True):
        torch.testing.assert_close(of_compiled, eager)


@pytest.mark.skipif(cuda_device() != "cuda" or torch.cuda.device_count() < 2, reason="no second GPU")
def test_a_second_gpu():
    net, images = a_net_and_images()
    expected = step(net, images)
    results = step(net.to("cuda:1"), images.to("cuda:1"))
    assert torch.cuda.current_device() == 0
    for result, of_first in zip(results, expected, strict=True):
        assert result.get_device() == 1
        assert torch.equal(result.cpu(), of_first.cpu())
    with pytest.raises(RuntimeError, match="input and weight must be on the same device, got cuda:0 and cuda:1"):
        torchcnn.functional.conv2d(images, net[0].weight)
