"""Bad input: the exception type of torch.nn.functional, and a message that names the operator, the rule and both values.

torch is asked in the test itself. Nothing may be written and nothing may crash.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

import torchcnn.functional

HUGE = 2**62


@dataclass(frozen=True)
class Bad:
    """`call` runs an operator of the namespace it is given; every pattern in `says` has to occur in the message."""

    name: str
    call: Callable
    says: tuple
    torch_type: type | None = None  # where torch accepts the input, or complains by accident
    torch_operator: str | None = None  # min_pool2d has no counterpart: max_pool2d is asked

    def __str__(self):
        return self.name


def x(*shape, dtype=torch.float32):
    return torch.zeros(shape or (2, 4, 6, 6), dtype=dtype)


def w(*shape, dtype=torch.float32):
    return torch.zeros(shape or (8, 4, 3, 3), dtype=dtype)


def conv2d(name, *says, input=None, weight=None, bias=None, torch_type=None, **options):
    input, weight = x() if input is None else input, w() if weight is None else weight
    return Bad(f"conv2d_{name}", lambda f: f.conv2d(input, weight, bias, **options), ("^conv2d: ", *says), torch_type)


CONV2D = [
    conv2d("rank_2", "input", r"6, 6", input=x(6, 6)),
    conv2d("rank_5", "input", r"1, 2, 4, 6, 6", input=x(1, 2, 4, 6, 6)),
    conv2d("weight_rank", "weight", r"4, 3, 3", weight=w(4, 3, 3)),
    conv2d("channels", "channels", r"\b4\b", r"\b3\b", weight=w(8, 3, 3, 3)),
    conv2d("channels_of_groups", "groups", r"\b4\b", r"\b3\b", weight=w(9, 1, 3, 3), groups=3),
    conv2d("filters_of_groups", "groups", r"\b7\b", r"\b2\b", weight=w(7, 2, 3, 3), groups=2),
    conv2d("groups_0", "groups", r"\b0\b", groups=0),
    conv2d("groups_negative", "groups", "-1", groups=-1),
    conv2d("groups_float", "groups", "1.5", groups=1.5),
    conv2d("bias_size", "bias", r"\b7\b", r"\b8\b", bias=x(7)),
    conv2d("bias_rank", "bias", r"1, 8", bias=x(1, 8)),
    conv2d("bias_scalar", "bias", bias=torch.tensor(1.0)),
    conv2d("weight_dtype", "dtype", "Float|float32", "Double|float64", weight=w(dtype=torch.float64)),
    conv2d("bias_dtype", "dtype", "Float|float32", "Double|float64", bias=x(8, dtype=torch.float64)),
    conv2d("half_dtype", "dtype", "Float|float32", "BFloat16|bfloat16", weight=w(dtype=torch.bfloat16)),
    conv2d("no_filters", "channel", r"\b0\b", weight=w(0, 4, 3, 3)),
    conv2d("empty_kernel", "kernel", r"\b0\b", weight=w(8, 4, 0, 3)),
    conv2d("empty_image", "height and width", r"\b0\b", r"\b6\b", input=x(2, 4, 0, 6)),
    conv2d("large_kernel", "output size", r"\b6\b", r"\b7\b", weight=w(8, 4, 7, 7)),
    conv2d("large_dilated_kernel", "output size", r"\b6\b", r"\b7\b", dilation=3),
    conv2d("stride_0", "stride", r"\b0\b", stride=0),
    conv2d("stride_negative", "stride", "-2", stride=(1, -2)),
    conv2d("stride_triple", "stride", r"1, 2, 3", stride=(1, 2, 3)),
    conv2d("stride_empty", "stride", r"\(\)", stride=()),
    conv2d("stride_float", "stride", "1.5", stride=1.5),
    conv2d("stride_string", "stride", "2", stride="2"),
    conv2d("stride_none", "stride", "None", stride=None),
    conv2d("dilation_0", "dilation", r"\b0\b", dilation=(0, 1)),
    conv2d("dilation_negative", "dilation", "-1", dilation=-1),
    conv2d("padding_negative", "padding", "-1", padding=-1),
    conv2d("padding_word", "padding", "'foo'", padding="foo"),
    conv2d("padding_none", "padding", "None", padding=None),
    conv2d("same_with_stride", "same", r"\b2\b", stride=2, padding="same"),
    conv2d("padding_overflow", "64 bits", str(HUGE), padding=HUGE),
    conv2d("dilation_overflow", "64 bits", str(HUGE), dilation=HUGE),
    conv2d("output_overflow", "64 bits", input=x(1, 1, 1, 1).expand(2**31, 1, 2**15, 2**15), weight=w(8, 1, 1, 1)),
    conv2d("input_array", "input", "ndarray", input=x().numpy()),
    conv2d("weight_list", "weight", "list", weight=[1.0]),
    Bad("conv2d_weight_none", lambda f: f.conv2d(x(), None), ("^conv2d: ", "weight")),
    *(
        conv2d(
            str(dtype)[6:],
            str(dtype)[6:],
            "float32",
            "float64",
            "bfloat16",
            "float16",
            input=x(dtype=dtype),
            weight=w(dtype=dtype),
            torch_type=NotImplementedError,
        )
        for dtype in (torch.uint8, torch.int32, torch.int64, torch.bool, torch.complex64, torch.complex128)
    ),
]


def pools(name, *says, input=None, torch_type=None, operators=("max", "min", "avg"), **options):
    input, options = x() if input is None else input, {"kernel_size": 3, **options}
    for operator in operators:
        yield Bad(
            f"{operator}_pool2d_{name}",
            lambda f, name=f"{operator}_pool2d": getattr(f, name)(input, **options),
            (f"^{operator}_pool2d: ", *says),
            torch_type,
            torch_operator="max_pool2d" if operator == "min" else None,
        )


POOL2D = [
    *pools("rank_2", "input", "6, 6", input=x(6, 6), torch_type=RuntimeError),  # avg_pool2d: IndexError, by accident
    *pools("rank_5", "input", "1, 2, 4, 6, 6", input=x(1, 2, 4, 6, 6)),
    *pools("kernel_0", "kernel", r"\b0\b", kernel_size=0),
    *pools("kernel_negative", "kernel", "-1", kernel_size=(3, -1), stride=1),
    *pools("kernel_float", "kernel", "2.5", kernel_size=2.5),
    *pools("kernel_none", "kernel", "None", kernel_size=None),
    *pools("kernel_triple", "kernel", "2, 2, 2", kernel_size=(2, 2, 2)),
    *pools("stride_0", "stride", r"\b0\b", stride=0),
    *pools("stride_negative", "stride", "-2", stride=(-2, 1)),
    *pools("stride_triple", "stride", "1, 2, 3", stride=(1, 2, 3)),
    *pools("dilation_0", "dilation", r"\b0\b", dilation=0, operators=("max", "min")),
    *pools("padding_negative", "padding", "-1", padding=-1),
    *pools("padding_word", "padding", "same", padding="same"),
    *pools("padding_over_half", "padding", "half", r"\b2\b", r"\b3\b", padding=2),
    *pools("padding_over_half_in_width", "padding", "half", r"\b2\b", r"\b3\b", padding=(1, 2)),
    *pools(
        "padding_over_half_dilated", "padding", "half", r"\b3\b", padding=3, kernel_size=2, dilation=3, operators=("max", "min")
    ),
    # torch answers with -inf and an index outside the plane, to which its backward then writes.
    *pools(
        "window_without_pixel",
        "window",
        input=x(1, 1, 3, 3),
        kernel_size=2,
        stride=1,
        padding=1,
        dilation=4,
        operators=("max", "min"),
        torch_type=RuntimeError,
    ),
    *pools("large_kernel", "output size", r"\b6\b", r"\b7\b", kernel_size=7),
    *pools("no_channels", "channels", r"\b0\b", input=x(2, 0, 6, 6)),
    *pools("empty_image", r"height|width", r"\b0\b", input=x(2, 4, 0, 6), padding=1),
    *pools("kernel_overflow", str(HUGE), kernel_size=HUGE),
    *pools("dilation_overflow", str(HUGE), dilation=HUGE, operators=("max", "min")),
    *pools("input_list", "input", "list", input=[1.0]),
    *pools("bool", "bool", "float32", "bfloat16", "int8", "uint8", "int64", input=x(dtype=torch.bool), operators=("max", "min")),
    *pools("complex", "complex64", "float32", "float16", input=x(dtype=torch.complex64)),
    *pools("int32", "int32", "float32", "float16", input=x(dtype=torch.int32), operators=("avg",)),
    *pools("divisor_0", "divisor", r"\b0\b", divisor_override=0, operators=("avg",)),
]


def adaptive(name, *says, output_size=2, input=None, operators=("avg", "max"), **options):
    input = x() if input is None else input
    for operator in operators:
        yield Bad(
            f"adaptive_{operator}_pool2d_{name}",
            lambda f, name=f"adaptive_{operator}_pool2d": getattr(f, name)(input, output_size),
            (f"^adaptive_{operator}_pool2d: ", *says),
            **options,
        )


ADAPTIVE = [
    *adaptive("rank_2", "input", "6, 6", input=x(6, 6)),
    *adaptive("rank_5", "input", "1, 2, 4, 6, 6", input=x(1, 2, 4, 6, 6)),
    *adaptive("negative", "output_size", "-1", output_size=(3, -1)),
    *adaptive("triple", "output_size", "2, 2, 2", output_size=(2, 2, 2)),
    *adaptive("none", "output_size", "None", output_size=None),
    *adaptive("word", "output_size", "'a'", output_size="a"),
    *adaptive("float", "output_size", "2.5", output_size=2.5),
    *adaptive("overflow", "64 bits", str(2**40), output_size=2**40),
    *adaptive("empty_image", "height", r"\b0\b", input=x(2, 4, 0, 6)),
    *adaptive("no_channels", "channels", r"\b0\b", input=x(2, 0, 6, 6), operators=("max",)),
    *adaptive("int32", "int32", "float32", "float64", "bfloat16", "float16", input=x(dtype=torch.int32)),
    *adaptive("complex", "complex64", "float32", "float64", "bfloat16", "float16", input=x(dtype=torch.complex64)),
    *adaptive("list", "input", "list", input=[1.0], torch_type=TypeError),  # torch.nn.functional: AttributeError, by accident
]


def unpool(name, *says, values=None, indices=None, output_size=None, torch_type=None):
    values = x(2, 4, 3, 3) if values is None else values
    indices = torch.zeros(2, 4, 3, 3, dtype=torch.int64) if indices is None else indices
    return Bad(
        f"max_unpool2d_{name}",
        lambda f: f.max_unpool2d(values, indices, 2, output_size=output_size),
        ("^max_unpool2d: ", *says),
        torch_type,
    )


def one_index(value):
    indices = torch.zeros(2, 4, 3, 3, dtype=torch.int64)
    indices[1, 3, 2, 2] = value  # the last one: everything before it is good
    return indices


WHICH_INDEX = pytest.mark.cpu_kernels("on a GPU the kernel stops, for all operators to come, and does not say at which index")
UNPOOL = [
    unpool("rank_2", "input", "3, 3", values=x(3, 3), indices=torch.zeros(3, 3, dtype=torch.int64)),
    unpool("shape", "indices", "2, 4, 3, 3", "1, 4, 3, 3", indices=torch.zeros(1, 4, 3, 3, dtype=torch.int64)),
    unpool("indices_int32", "indices", "int64", "Int|int32", indices=torch.zeros(2, 4, 3, 3, dtype=torch.int32)),
    unpool("indices_float", "indices", "int64", "Float|float32", indices=torch.zeros(2, 4, 3, 3)),
    pytest.param(unpool("index_beyond", "indices", r"\b36\b", r"\b35\b|6 x 6", indices=one_index(36)), marks=WHICH_INDEX),
    pytest.param(unpool("index_negative", "indices", r"-1\b", r"\b35\b|6 x 6", indices=one_index(-1)), marks=WHICH_INDEX),
    pytest.param(unpool("index_far_away", "indices", str(HUGE), indices=one_index(HUGE)), marks=WHICH_INDEX),
    unpool("output_size", "output_size", r"9, 9", r"\b4\b", r"\b8\b", output_size=(9, 9)),
    unpool("output_size_length", "output_size", r"\b3\b", output_size=(4, 7, 7)),
    Bad("max_unpool2d_indices_none", lambda f: f.max_unpool2d(x(2, 4, 3, 3), None, 2), ("^max_unpool2d: ", "indices")),
]


class TorchFor:
    """torch.nn.functional, with another operator in the place of one that it does not have."""

    def __init__(self, bad):
        self.bad = bad

    def __getattr__(self, name):
        return getattr(F, self.bad.torch_operator or name)


@pytest.mark.parametrize("bad", [*CONV2D, *POOL2D, *ADAPTIVE, *UNPOOL], ids=str)
def test_same_exception_as_torch_and_a_message_that_says_why(bad):
    expected = bad.torch_type
    if expected is None:
        with pytest.raises(Exception) as of_torch:
            bad.call(TorchFor(bad))
        expected = of_torch.type
    with pytest.raises(Exception) as ours:
        bad.call(torchcnn.functional)
    message = str(ours.value)
    assert ours.type is expected, message
    for pattern in bad.says:
        assert re.search(pattern, message), f"{message!r} says nothing of {pattern!r}"


def test_numbers_beyond_64_bits():
    for call in (
        lambda f: f.conv2d(x(), w(), padding=2**63),
        lambda f: f.conv2d(x(), w(), stride=2**63),
        lambda f: f.max_pool2d(x(), 2**63),
        lambda f: f.avg_pool2d(x(), 2, stride=2**63),
    ):
        with pytest.raises((ValueError, RuntimeError, TypeError, OverflowError)):
            call(F)
        with pytest.raises((ValueError, RuntimeError, TypeError, OverflowError), match=str(2**63)):
            call(torchcnn.functional)


def test_a_stride_of_any_size_is_fine():
    assert torchcnn.functional.conv2d(x(), w(), stride=HUGE).shape == (2, 8, 1, 1)


@pytest.mark.parametrize(
    "name, arguments",
    [
        ("conv2d_grad_input", (x(2, 8, 4, 5), w(), 6, 6, 1, 1, 0, 0, 1, 1, 1, False)),
        ("conv2d_grad_input", (x(2, 7, 4, 4), w(), 6, 6, 1, 1, 0, 0, 1, 1, 1, False)),
        ("conv2d_grad_input", (x(2, 8, 4, 4), w(), 6, 6, 0, 1, 0, 0, 1, 1, 1, False)),
        ("conv2d_grad_input", (x(2, 8, 4, 4), w(), 6, HUGE, 1, 1, 0, 0, 1, 1, 1, False)),
        ("conv2d_grad_weight", (x(2, 8, 5, 4), x(), 3, 3, 1, 1, 0, 0, 1, 1, 1, False)),
        ("conv2d_grad_weight", (x(3, 8, 4, 4), x(), 3, 3, 1, 1, 0, 0, 1, 1, 1, False)),
        ("conv2d_grad_weight", (x(2, 8, 4, 4), x(), 3, 3, 1, 1, 0, 0, 1, 1, 0, False)),
        ("conv2d_grad_weight", (x(2, 8, 4, 4), x(), 3, 3, 1, 1, 0, 0, 1, 1, 3, False)),
        ("conv2d_grad_weight", (x(2, 8, 4, 4), x(dtype=torch.float64), 3, 3, 1, 1, 0, 0, 1, 1, 1, False)),
        ("conv2d_grad_bias", (x(8, 4, 4),)),
        ("conv2d_grad_weight_bias", (x(3, 8, 4, 4), x(), 3, 3, 1, 1, 0, 0, 1, 1, 1, False)),
        ("conv2d_grad_weight_bias", (x(8, 4, 4), x(), 3, 3, 1, 1, 0, 0, 1, 1, 1, False)),
        ("conv2d_grad_weight_bias", (x(0, 7, 4, 4), x(0, 4, 6, 6), 3, 3, 1, 1, 0, 0, 1, 1, 2, False)),
        ("max_pool2d_grad_input", (x(2, 4, 3, 3), one_index(36), 6, 6, False)),
        ("max_pool2d_grad_input", (x(2, 4, 3, 3), one_index(-1), 6, 6, False)),
        ("max_pool2d_grad_input", (x(2, 4, 3, 3), one_index(0), -6, 6, False)),
        ("max_pool2d_grad_input", (x(2, 4, 3, 2), one_index(0), 6, 6, False)),
        ("max_unpool2d_grad_input", (x(2, 4, 6, 6), one_index(36))),
        ("max_unpool2d_grad_input", (x(2, 3, 6, 6), one_index(0))),
        ("avg_pool2d_grad_input", (x(2, 4, 3, 4), 6, 6, 2, 2, 2, 2, 0, 0, False, True, None, False)),
        ("avg_pool2d_grad_input", (x(2, 4, 3, 3), 6, 6, 2, 2, 2, 2, 0, 0, False, True, 0, False)),
        ("adaptive_avg_pool2d_grad_input", (x(4, 3, 3), 6, 6, False)),
    ],
)
def test_operators_called_directly_check_too(name, arguments):
    """torch.ops is open to everybody: the checks stand before the kernels, not in Python alone."""
    with pytest.raises(RuntimeError, match=f"{name}: "):
        getattr(torch.ops.torchcnn, name)(*arguments)


@pytest.mark.parametrize(
    "call",
    [
        lambda: torchcnn.functional.conv2d_output_size(4, 5),
        lambda: torchcnn.functional.conv2d_output_size((6, 6), 3, stride=0),
        lambda: torchcnn.functional.conv2d_output_size((6, 6), 3, padding=-1),
        lambda: torchcnn.functional.conv2d_output_size((6, 6), 3, dilation=HUGE),
        lambda: torchcnn.functional.pool2d_output_size(4, 5),
        lambda: torchcnn.functional.pool2d_output_size((6, 6), 3, padding=2),
        lambda: torchcnn.functional.pool2d_output_size((6, 6), 0),
        lambda: torchcnn.functional.conv2d_parameter_count(4, 6, 3, groups=4),
        lambda: torchcnn.functional.conv2d_parameter_count(4, 6, 3, groups=0),
    ],
)
def test_size_functions(call):
    with pytest.raises(ValueError, match=r"^(conv2d_output_size|pool2d_output_size|conv2d_parameter_count): .*\d"):
        call()


def test_modules_report_the_operator():
    with pytest.raises(RuntimeError, match=r"^conv2d: .*\b5\b.*\b3\b"):
        torchcnn.Conv2d(3, 8, 3)(x(1, 5, 9, 9))
    with pytest.raises(RuntimeError, match=r"^max_pool2d: "):
        torchcnn.MaxPool2d(3)(x(1, 3, 2, 2))
    with pytest.raises(ValueError, match="init"):
        torchcnn.Conv2d(3, 8, 3, init="normal")
    with pytest.raises(TypeError, match="init"):
        torchcnn.Conv2d(3, 8, 3, init=3)


def test_mixed_devices(device):
    if device == "cpu":
        pytest.skip("needs two devices")
    for call in (
        lambda f: f.conv2d(x().to(device), w()),
        lambda f: f.conv2d(x(), w().to(device)),
        lambda f: f.conv2d(x().to(device), w().to(device), x(8)),
    ):
        with pytest.raises(RuntimeError):
            call(F)
        with pytest.raises(RuntimeError, match=r"^conv2d: .*cpu.*cuda|cuda.*cpu"):
            call(torchcnn.functional)


def test_operators_work_after_an_error():
    with pytest.raises(RuntimeError):
        torchcnn.functional.conv2d(x(), w(), stride=0)
    assert torchcnn.functional.conv2d(x() + 1, w() + 1).eq(36).all()


BIG = 2**61


@pytest.mark.parametrize(
    "call",
    [
        lambda f: f.conv2d(torch.ones(1, 2, 0, 0), torch.ones(2, 2, 3, 3), padding=10),
        lambda f: f.conv2d(torch.ones(1, 2, 8, 0), torch.ones(2, 2, 1, 9), padding=(0, 4)),
        lambda f: f.avg_pool2d(torch.ones(1, 1, 1, 1), 2**32, 1, 2**31),
        lambda f: f.max_pool2d(torch.ones(1, 1, 3, 1), (1, 2), 1, (0, 2**62 - 1), (1, 2**63 - 2)),
        lambda f: torch.ops.torchcnn.conv2d_grad_input(
            torch.ones(1, 2, 8, 8), torch.ones(2, 2, 3, 3), -10, -10, 1, 1, 10, 10, 1, 1, 1, False
        ),
        lambda f: torch.ops.torchcnn.max_unpool2d(
            torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2, dtype=torch.int64, device="meta"), 4, 4
        ),
    ],
)
def test_sizes_that_once_reached_a_kernel(call):
    with pytest.raises(RuntimeError, match=r"2d\w*: .*(got |64 bits|padding alone)|same device"):
        call(torchcnn.functional)


@pytest.mark.cpu_kernels("sizes of an axis have 32 bits on a GPU")
def test_windows_far_larger_than_the_input():
    """Answered by direct loops: packing such windows would take more memory than there is."""
    weight = torch.randn(2, 2, 3, 3, dtype=torch.float64)
    input = torch.randn(1, 2, 5, 5, dtype=torch.float64)
    far = torchcnn.functional.conv2d(input, weight, stride=BIG, padding=BIG)
    assert far.shape == (1, 2, 3, 3)
    # Only the middle window of each axis meets the input, at its top left corner.
    expected = torch.zeros_like(far)
    expected[0, :, 1, 1] = (weight * input[:, :, :3, :3]).sum((1, 2, 3))
    torch.testing.assert_close(far, expected)
    one = torchcnn.functional.conv2d(input[..., :1, :1], weight, padding=50000, dilation=50000)
    torch.testing.assert_close(one[0, :, 0, 0], weight[:, :, 1, 1] @ input[0, :, 0, 0])


def test_no_input_channels():
    """Every sum is empty: the bias alone, rectified if asked."""
    for width in (5, 12):
        input, weight, bias = torch.ones(1, 0, 12, width), torch.ones(2, 0, 3, 3, requires_grad=True), torch.tensor([1.5, -2.0])
        output = torchcnn.functional.conv2d(input, weight, bias, activation="relu")
        assert torch.equal(output, torch.tensor([1.5, 0.0])[:, None, None].expand(1, 2, 10, width - 2))
        output.sum().backward()
        assert weight.grad.shape == weight.shape


def test_the_least_integer_divided_by_minus_one():
    least = torch.full((1, 1, 1, 1), -(2**63))
    assert torch.equal(torchcnn.functional.avg_pool2d(least, 1, divisor_override=-1), least)
