"""conv_transpose2d and its module: values by the three tiers of tiers.py, derivatives, torch.func, autocast, compile."""

import cases
import pytest
import torch
import torch.nn.functional as F
from tiers import assert_bound, assert_exact, assert_no_worse_than_torch, small_integers
from torch.autograd import gradcheck, gradgradcheck

import torchcnn
from torchcnn.functional import conv_transpose2d

DIRECTIONS = ("forward", "grad_input", "grad_weight", "grad_bias")
# The transposes of the convolutions that have a symmetric padding; "large" covers several blocks.
CASES = [case for case in cases.CONV2D_CASES if not isinstance(case.padding, str)]

# name: (input, weight, whether there is a bias, options); output padding below and above the stride
SMALL = {
    "plain": ((1, 3, 3, 4), (3, 2, 3, 2), True, {}),
    "no_bias": ((2, 2, 3, 3), (2, 2, 3, 3), False, {"padding": 1}),
    "strided": ((1, 2, 3, 2), (2, 3, 2, 3), True, {"stride": (2, 3), "padding": (0, 1), "output_padding": (1, 2)}),
    "all": ((2, 4, 2, 3), (4, 2, 2, 2), True, {"stride": (2, 1), "padding": (1, 0), "dilation": (1, 2), "groups": 2}),
    "depthwise": ((1, 3, 3, 3), (3, 1, 3, 3), True, {"groups": 3, "stride": 2, "padding": 1, "output_padding": 1}),
    "wide_border": ((1, 2, 2, 3), (2, 2, 2, 2), True, {"dilation": 3, "padding": (1, 0), "output_padding": (2, 1)}),
    "unbatched": ((2, 3, 4), (2, 3, 3, 2), True, {"stride": 2}),
}


def transposed_options(case):
    """The options of the layer that gives back the size of the case's input."""
    stride, padding, dilation = (
        pair if isinstance(pair, tuple) else (pair, pair) for pair in (case.stride, case.padding, case.dilation)
    )
    output_padding = tuple(
        (size + 2 * pad - d * (r - 1) - 1) % s
        for size, r, s, pad, d in zip(case.input[-2:], case.weight[2:], stride, padding, dilation, strict=True)
    )
    return {**case.options, "output_padding": output_padding}


def case_tensors(case, make):
    """(input, weight, bias or None, grad_output): the first as large as the output of the convolution, the last as its input."""
    meta = torch.empty(case.input, device="meta"), torch.empty(case.weight, device="meta")
    shape = F.conv2d(*meta, **case.options).shape
    channels = case.input[-3]
    return make(shape), make(case.weight), make((channels,)) if case.bias else None, make(case.input)


def directions(function, tensors, options):
    *inputs, grad_output = tensors
    inputs = [None if tensor is None else tensor.detach().requires_grad_() for tensor in inputs]
    output = function(*inputs, **options)
    gradients = torch.autograd.grad(output, [tensor for tensor in inputs if tensor is not None], grad_output)
    return (output.detach(), *gradients, None)[:4]


def cast(tensors, layout, dtype, device="cpu"):
    return tuple(None if tensor is None else layout(tensor.to(device, dtype)) for tensor in tensors)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_exact(case, dtype, layout, device):
    tensors, options = case_tensors(case, small_integers), transposed_options(case)
    results = directions(conv_transpose2d, cast(tensors, layout, dtype, device), options)
    truths = directions(F.conv_transpose2d, tensors, options)
    for direction, actual, truth in zip(DIRECTIONS, results, truths, strict=True):
        if truth is not None:
            assert_exact(actual.cpu(), truth, direction)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype)[6:])
def test_rounding(case, dtype):
    """Tier 2, and tier 3 over several draws together: one small output may have torch lucky."""
    options = transposed_options(case)
    # Of large outputs two draws are enough, and an emulated kernel takes a second for each.
    count = 8 if case_tensors(case, torch.empty)[3].numel() < 1000 else 2
    draws = [cast(case_tensors(case, torch.randn), cases.contiguous, dtype) for _ in range(count)]
    doubles = [cast(tensors, cases.contiguous, torch.float64) for tensors in draws]
    absolute = [[tensor if tensor is None else tensor.abs() for tensor in tensors] for tensors in doubles]
    K, C_g, R, S = case.weight
    pixels, output_pixels = draws[0][0].numel() // K, draws[0][3].numel() // case.input[-3]
    lengths = K // case.groups * R * S + case.bias, C_g * R * S, pixels, output_pixels
    results = [
        [directions(function, tensors, options) for tensors in samples]
        for function, samples in (
            (conv_transpose2d, draws),
            (F.conv_transpose2d, draws),
            (F.conv_transpose2d, doubles),
            (F.conv_transpose2d, absolute),
        )
    ]
    for index, (direction, length) in enumerate(zip(DIRECTIONS, lengths, strict=True)):
        if results[0][0][index] is not None:
            actual, of_torch, truth, magnitude = (torch.stack([draw[index] for draw in result]) for result in results)
            assert_bound(actual, truth, magnitude, length, direction)
            assert_no_worse_than_torch(actual, of_torch, truth, direction)


@pytest.mark.parametrize("name", SMALL)
def test_same_sizes_and_values_as_torch(name, layout):
    input_size, weight_size, bias, options = SMALL[name]
    channels = weight_size[1] * options.get("groups", 1)
    tensors = [small_integers(input_size), small_integers(weight_size), small_integers((channels,)) if bias else None]
    tensors = [layout(tensor) if tensor is not None else None for tensor in tensors]
    assert torch.equal(conv_transpose2d(*tensors, **options), F.conv_transpose2d(*tensors, **options))


def test_layout_and_fakes():
    """channels_last where input or weight is, and the fake kernel says the same."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    for layouts in ((a, b) for a in cases.LAYOUTS for b in cases.LAYOUTS):
        tensors = [layout(torch.ones(size)) for layout, size in zip(layouts, ((2, 4, 3, 5), (4, 6, 3, 2)), strict=True)]
        options = {"stride": 2, "padding": 1, "output_padding": (1, 0)}
        grad_output = torch.ones_like(F.conv_transpose2d(*tensors, **options))
        ours, torchs = (directions(f, (*tensors, None, grad_output), options) for f in (conv_transpose2d, F.conv_transpose2d))
        for a, b in zip(ours[:2], torchs[:2], strict=True):
            assert cases.layout_of(a) == cases.layout_of(b)
        with FakeTensorMode(allow_non_fake_inputs=False) as mode:
            fakes = [mode.from_tensor(tensor) for tensor in tensors]
            fake = directions(conv_transpose2d, (*fakes, None, mode.from_tensor(grad_output)), options)
        for a, b in zip(ours[:3], fake[:3], strict=True):
            assert cases.layout_of(a) == cases.layout_of(b)


@pytest.mark.cpu_kernels("on a GPU padding is a zero that is multiplied")
def test_infinity_stays_in_its_windows():
    """No product with a zero that stands for padding: 0 * inf would be NaN."""
    weight = torch.ones(1, 1, 3, 3)
    weight[0, 0, 0, 0] = torch.inf
    for options in ({"stride": 2, "padding": 1, "output_padding": 1}, {"dilation": 3, "output_padding": 2}):
        input = torch.ones(1, 1, 3, 3)
        assert torch.equal(conv_transpose2d(input, weight, **options), F.conv_transpose2d(input, weight, **options))


def inputs_of(name, requires_grad=True):
    input_size, weight_size, bias, options = SMALL[name]
    shapes = (input_size, weight_size, (weight_size[1] * options.get("groups", 1),))[: 2 + bias]
    return tuple(torch.randn(shape, dtype=torch.float64, requires_grad=requires_grad) for shape in shapes), options


@pytest.mark.parametrize("name", SMALL)
def test_gradcheck(name):
    inputs, options = inputs_of(name)

    def function(*inputs):
        return conv_transpose2d(*inputs, **options)

    assert gradcheck(function, inputs, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True)
    assert gradgradcheck(function, inputs, check_batched_grad=True)


@pytest.mark.parametrize("dims", [(0, None, None), (None, 1, None), (None, None, 0), (0, 0, 0), (1, 1, None)], ids=str)
@pytest.mark.parametrize("name", ["all", "wide_border"])
def test_vmap(name, dims):
    inputs, options = inputs_of(name, requires_grad=False)
    inputs = tuple(
        tensor if dim is None else torch.stack([tensor, -tensor, 2 * tensor], dim)
        for tensor, dim in zip(inputs, dims, strict=True)
    )
    results = []
    for function in (conv_transpose2d, F.conv_transpose2d):

        def scalar(*inputs, function=function):
            return function(*inputs, **options).pow(2).sum()

        whole = torch.vmap(lambda *inputs, f=function: f(*inputs, **options), dims)(*inputs)
        results.append((whole, torch.vmap(torch.func.grad(scalar, (0, 1, 2)), dims)(*inputs)))
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["strided", "wide_border"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(name, dtype):
    inputs, options = inputs_of(name, requires_grad=False)
    results = []
    for function in (conv_transpose2d, F.conv_transpose2d):
        leaves = [tensor.float().requires_grad_() for tensor in inputs]
        with torch.autocast("cpu", dtype=dtype):
            output = function(*leaves, **options)
            assert function(*inputs, **options).dtype == torch.float64
        results.append((output, *torch.autograd.grad(output.float().sum(), leaves)))
    for ours, of_torch in zip(*results, strict=True):
        assert ours.dtype == of_torch.dtype
        torch.testing.assert_close(ours, of_torch, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)


def test_compile_with_dynamic_sizes():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    layer, of_torch = torchcnn.ConvTranspose2d(4, 6, 3, 2, 1, groups=2), torch.nn.ConvTranspose2d(4, 6, 3, 2, 1, groups=2)
    of_torch.load_state_dict(layer.state_dict())
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    for size in ((3, 4, 5, 7), (5, 4, 9, 11), (7, 4, 13, 15)):
        results = []
        for module in (compiled, of_torch):
            input = torch.linspace(-1, 1, torch.Size(size).numel()).view(size).requires_grad_()
            output = module(input, output_size=(2 * size[2], 2 * size[3]))
            results.append((output, *torch.autograd.grad(output.pow(2).sum(), input)))
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_module_with_output_size():
    down, up = torch.nn.Conv2d(3, 5, 3, 2, 1), torchcnn.ConvTranspose2d(5, 3, 3, 2, 1)
    of_torch = torch.nn.ConvTranspose2d(5, 3, 3, 2, 1)
    of_torch.load_state_dict(up.state_dict(), strict=True)
    for size in ((2, 3, 8, 9), (3, 7, 10)):
        small = down(torch.randn(size))
        for wanted in (size, size[-2:], list(size[-2:])):
            assert up(small, wanted).shape == torch.Size(size)
            torch.testing.assert_close(up(small, output_size=wanted), of_torch(small, output_size=wanted))
        with pytest.raises(ValueError, match="output size"):
            up(small, (80, 80))
    with pytest.raises(ValueError, match="zeros"):
        torchcnn.ConvTranspose2d(5, 3, 3, padding_mode="reflect")


@pytest.mark.parametrize(
    "options, says",
    [
        ({"stride": 0}, r"stride must be at least 1, got 0"),
        (
            {"stride": 2, "output_padding": 2},
            r"output_padding must be at least 0 and below stride or dilation, got 2 with stride 2",
        ),
        ({"dilation": 2, "output_padding": (1, 2)}, r"output_padding .* got (1|2) with stride 1 and dilation 2"),
        ({"output_padding": -1}, r"output_padding .* got -1"),
        ({"padding": -1}, r"padding must be at least 0, got -1"),
        ({"padding": -1, "dilation": 2, "output_padding": 1}, r"padding must be at least 0, got -1"),
        ({"padding": 9}, r"output size must be at least 1, got -"),
        ({"padding": 9, "dilation": 2, "output_padding": 1}, r"output size must be at least 1, got -"),
        ({"groups": 0}, r"groups must be at least 1, got 0"),
        ({"groups": 3}, r"input channels must be divisible by groups, got 4 channels and groups=3"),
        ({"weight": torch.ones(5, 2, 3, 3)}, r"input channels must equal weight.shape\[0\], got 4 and 5"),
        ({"weight": torch.ones(4, 2, 3)}, r"weight must have 4 dimensions"),
        ({"weight": torch.ones(4, 2, 3, 3).double()}, r"same dtype, got Float and Double"),
        ({"bias": torch.ones(3)}, r"bias must have shape .* got \[3\]"),
        ({"bias": torch.ones(3), "dilation": 2, "output_padding": 1}, r"bias must have shape .* got \[3\]"),
        ({"input": torch.ones(4, 5)}, r"input must have 4 dimensions .* got 2"),
        ({"input": torch.ones(1, 4, 0, 5)}, r"input height and width must be at least 1, got 0"),
        ({"padding": 2**62}, r"64 bits"),
        ({"stride": 2**62}, r"64 bits"),
    ],
    ids=str,
)
def test_bad_arguments(options, says):
    arguments = {"input": torch.ones(1, 4, 5, 5), "weight": torch.ones(4, 2, 3, 3), **options}
    with pytest.raises(RuntimeError, match=rf"^conv_transpose2d: .*{says}"):
        conv_transpose2d(**arguments)
    with pytest.raises(RuntimeError):
        F.conv_transpose2d(**arguments)
    with pytest.raises(NotImplementedError, match="conv_transpose2d: dtype"):
        conv_transpose2d(torch.ones(1, 4, 5, 5, dtype=torch.int64), torch.ones(4, 2, 3, 3, dtype=torch.int64))


def test_same_bits_for_any_number_of_threads():
    tensors = torch.randn(2, 24, 17, 19), torch.randn(24, 40, 3, 3), torch.randn(40), torch.randn(2, 40, 34, 38)
    options = {"stride": 2, "padding": 1, "output_padding": 1}
    before, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            results.append(directions(conv_transpose2d, tensors, options))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_border_wider_than_what_the_windows_cover(bias, layout):
    """More padding than there is to take away from, before the output padding is added."""
    input = torch.randn(2, 3, 1, 1).contiguous(memory_format=layout)
    weight, bias = torch.randn(3, 4, 1, 1), torch.randn(4) if bias else None
    arguments = weight, bias, 1, 2, 4, 1, 5
    expected = torch.nn.functional.conv_transpose2d(input, *arguments)
    output = torchcnn.functional.conv_transpose2d(input, *arguments)
    torch.testing.assert_close(output, expected)
    assert output.is_contiguous(memory_format=layout)


def test_a_padding_mode_set_later_is_refused():
    layer = torchcnn.ConvTranspose2d(1, 1, 1)
    layer.padding_mode = "reflect"
    with pytest.raises(ValueError, match="conv_transpose2d: padding_mode must be 'zeros', got 'reflect'"):
        layer(torch.zeros(1, 1, 2, 2))
