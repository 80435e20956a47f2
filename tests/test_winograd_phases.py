"""Winograd convolution of the phases of a stride: first layers of networks, forward and grad_weight.

The independent truth is the convolution of stride 1 that the phases make, built here by padding and reshaping, and torch.
"""

import pytest
import tiers
import torch
import torch.nn.functional as F
from test_winograd import (  # noqa: F401  winograd: the fixture that allows it
    BOUNDS,
    Case,
    algorithms,
    magnitudes,
    needs_winograd,
    options,
    ours,
    tensors,
    truth,
    winograd,
)

import torchcnn
from torchcnn import backends

# Few channels and many; tails of channels, of filters and of tiles; padding none, one side of a phase and beyond the filter.
CASES = [
    Case(2, 3, 64, 61, 64, 7, (3, 3), stride=2),  # ResNet
    Case(2, 3, 91, 87, 64, 11, (2, 2), stride=4),  # AlexNet
    Case(3, 3, 40, 39, 33, 8, (1, 0), stride=2),
    Case(2, 5, 31, 36, 48, 5, (2, 2), stride=2),
    Case(1, 16, 30, 33, 37, 6, (0, 5), stride=2),
    Case(2, 4, 47, 50, 65, 9, (4, 1), stride=3),
    Case(1, 2, 66, 70, 34, 12, (7, 0), stride=3),
    Case(2, 6, 40, 41, 80, 7, (3, 2), stride=2, groups=2),
    Case(1, 3, 15, 131, 40, 7, (3, 3), stride=2),
    Case(2, 3, 60, 21, 40, 7, (0, 3), stride=2),
    Case(2, 3, 34, 35, 40, 7, (9, 8), stride=2),
    Case(1, 13, 34, 33, 130, 5, (2, 2), stride=2),
    Case(8, 4, 41, 43, 37, 7, (3, 3), stride=2),  # so many tiles that they are summed in slices, grad_bias beside
]


def of_phases(x, w, case):
    """Input and weight of the convolution of stride 1 and without padding: phases (a, b) as channels."""
    s, taps = case.stride, -(-case.R // case.stride)
    P, Q = F.conv2d(x[:1, : w.shape[1]], w[:1], None, s, case.padding).shape[2:]
    rows, columns = (P + taps - 1) * s, (Q + taps - 1) * s
    (ph, pw), (H, W) = case.padding, x.shape[2:]
    x = F.pad(x, (pw, max(0, columns - W - pw), ph, max(0, rows - H - ph)))[..., :rows, :columns]
    w = F.pad(w, (0, taps * s - case.R, 0, taps * s - case.R))

    def phases(t):
        n, c, height, width = t.shape
        t = t.reshape(n, c, height // s, s, width // s, s).permute(0, 1, 3, 5, 2, 4)
        return t.reshape(n, c * s * s, height // s, width // s)

    x, w = phases(x), phases(w)
    folded = Case(case.N, x.shape[1], *x.shape[2:], case.K, taps, (0, 0), groups=case.groups)
    return x, w, folded


def test_the_phases_are_the_same_convolution():
    for case in CASES:
        x, w, b, _ = tensors(case, torch.float64, lambda *shape: tiers.small_integers(shape))
        folded_x, folded_w, folded = of_phases(x, w, case)
        assert torch.equal(F.conv2d(folded_x, folded_w, b, groups=folded.groups), F.conv2d(x, w, b, *options(case)))


@needs_winograd
def test_cases_take_both_algorithms():
    taken = [(forward, grad_weight) for forward, _, grad_weight in map(algorithms, CASES)]
    names = {"winograd_4x4_3x3_phases", "winograd_3x3_4x4_phases"}
    assert {forward for forward, _ in taken if forward.endswith("phases")} == names
    assert {grad_weight for _, grad_weight in taken} == names


@pytest.mark.parametrize("case", CASES, ids=str)
def test_small_integers(case, dtype, layout):
    x, w, b, dy = tensors(case, torch.float64, lambda *shape: tiers.small_integers(shape))
    if dtype == torch.float32:
        dy = dy * (torch.rand(dy.shape) < 0.3)  # short sums in grad_weight, too
    expected = truth(x, w, b, dy, case)
    x, w, b, dy = (t.to(dtype) for t in (x, w, b, dy))
    for result, exact in zip(ours(layout(x), w, b, layout(dy), case), expected, strict=True):
        assert (result - exact).abs().max() < 0.25
        tiers.assert_exact(result.round(), exact)


@pytest.mark.parametrize(
    ("input_size", "weight_size", "stride", "padding"),
    [
        ((2, 8, 36, 41), (64, 8, 7, 4), (2, 1), (3, 1)),
        ((2, 3, 40, 77), (40, 3, 4, 15), (1, 4), (0, 2)),
        ((1, 8, 51, 42), (72, 4, 12, 6), (4, 2), (1, 5)),  # in two groups
        ((2, 3, 44, 39), (33, 3, 6, 3), (2, 1), (1, 0)),
        ((1, 8, 30, 28), (64, 8, 3, 5), (1, 2), (1, 2)),
    ],
    ids=str,
)
def test_axes_are_not_exchanged(input_size, weight_size, stride, padding, layout):
    """Kernels, strides and paddings that differ along height and width; few phases, fewer than a vector."""
    groups = input_size[1] // weight_size[1]
    if torchcnn.isa() != "reference":
        text = torchcnn.explain(input_size, weight_size, stride, padding, groups=groups)
        assert "phases" in text.splitlines()[2], text
    x, w = tiers.small_integers(input_size), tiers.small_integers(weight_size)

    def directions(conv2d, x, w):
        w = w.detach().requires_grad_()
        output = conv2d(x, w, None, stride, padding, 1, groups)
        torch.manual_seed(0)
        dy = (tiers.small_integers(output.shape) * (torch.rand(output.shape) < 0.3)).to(output.dtype)
        return output.detach(), torch.autograd.grad(output, w, dy)[0]

    actual = directions(torchcnn.functional.conv2d, layout(x.float()), w.float())
    for result, exact in zip(actual, directions(F.conv2d, x, w), strict=True):
        tiers.assert_exact(result.round(), exact)


@pytest.mark.parametrize(("kernel", "stride"), [(7, 2), (5, 2), (11, 4)])
def test_tiles_cut_to_every_size(kernel, stride, layout):
    large = Case(2, 3, 80, 80, 64, kernel, (3, 3), stride=stride)
    ours(*(torch.full_like(t, torch.nan) for t in tensors(large, torch.float32)), large)  # leaves NaN in scratch memory
    taken = set()
    for step in range(4 * stride):
        H, W = 16 * stride + kernel + step, 14 * stride + kernel + 7 * step % (4 * stride)
        case = Case(2, 8, H, W, 36, kernel, (2, 3), stride=stride)
        x, w, b, dy = tensors(case, torch.float64, lambda *shape: tiers.small_integers(shape))
        expected = truth(x, w, b, dy, case)
        for result, exact in zip(ours(layout(x.float()), w.float(), b.float(), layout(dy.float()), case), expected, strict=True):
            tiers.assert_exact(result.round(), exact)
        taken |= {name.endswith("phases") for name in algorithms(case)[::2]}
    assert taken == {torchcnn.isa() != "reference"}


@needs_winograd
@pytest.mark.parametrize("outliers", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_error_bound(case, dtype, outliers):
    x, w, b, dy = tensors(case, dtype)
    if outliers:
        for t in (x, dy):
            t[torch.rand(t.shape) < 0.02] *= 1000
    b.zero_()
    folded_x, folded_w, folded = of_phases(x, w, case)
    name = "winograd_4x4_3x3_phases" if folded.R == 3 else "winograd_3x3_4x4_phases"
    forward, _, grad_weight = magnitudes(folded_x, folded_w, dy, folded, [name] * 3)
    # from the folded filter's taps to those of the weight, which are fewer
    K, C, (R, S), s = case.K, x.shape[1] // case.groups, case.kernel, case.stride
    grad_weight = grad_weight.reshape(K, C, s, s, folded.R, folded.R).permute(0, 1, 4, 2, 5, 3).reshape(K, C, s * folded.R, -1)
    actual, expected = ours(x, w, b, dy, case), truth(x, w, b, dy, case)
    terms = folded_w[0].numel()
    tiers.assert_bound(actual[0], expected[0], BOUNDS[name][0] * forward, max(16, terms))
    positions = max(16, case.N * dy.shape[2] * dy.shape[3])
    tiers.assert_bound(actual[2], expected[2], BOUNDS[name][2] * grad_weight[..., :R, :S], positions)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_same_bits_for_every_thread_count_layout_and_neighbour(case, dtype):
    x, w, b, dy = tensors(case, dtype)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = ours(x, w, b, dy, case)
        last = {"memory_format": torch.channels_last}
        other_layout = ours(*(t.contiguous(**last) for t in (x, w)), b, dy.contiguous(**last), case)
        for direction, name in enumerate(algorithms(case)):
            if name.endswith("phases"):
                assert torch.equal(other_layout[direction], one[direction])
        for count in (2, 3, 8):
            torch.set_num_threads(count)
            for result, expected in zip(ours(x, w, b, dy, case), one, strict=True):
                assert torch.equal(result, expected)
    finally:
        torch.set_num_threads(threads)
    for n in range(len(x)):
        assert torch.equal(ours(x[n : n + 1], w, b, dy[n : n + 1], case)[0][0], one[0][n])


@needs_winograd
@pytest.mark.parametrize("value", [torch.inf, torch.nan, 1e38])
@pytest.mark.parametrize("where", ["input", "weight", "grad_output"])
@pytest.mark.parametrize("case", [CASES[0], CASES[1], CASES[7]], ids=str)
def test_not_finite(case, where, value, layout):
    """Stays where the direct kernel has it."""
    x, w, b, dy = tensors(case, torch.float32)
    {"input": x, "weight": w, "grad_output": dy}[where][-1, -1, 2, 3] = value
    actual = ours(layout(x), layout(w), b, layout(dy), case)
    with backends.flags(allow_winograd=False):
        direct = ours(layout(x), layout(w), b, layout(dy), case)
    for result, expected in zip(actual, direct, strict=True):
        assert torch.equal(result.isinf(), expected.isinf())
        finite = result.isfinite() & expected.isfinite()
        assert finite.any() or where == "weight" or value == 1e38
        if where == "weight" or value == 1e38:
            continue  # which zeros of the padding an infinite weight meets is up to the kernel
        assert torch.equal(result.isfinite(), expected.isfinite())


@needs_winograd
@pytest.mark.parametrize(
    ("size", "weight", "stride", "dilation"),
    [
        ((1, 1, 64, 64), (64, 1, 5, 5), 2, 1),  # too few channels for so much around them
        ((1, 3, 64, 64), (16, 3, 7, 7), 2, 1),  # too few filters
        ((1, 3, 64, 64), (64, 3, 7, 7), 2, 2),
        ((1, 3, 64, 64), (64, 3, 7, 3), 2, 1),
        ((1, 3, 64, 64), (64, 3, 9, 9), 2, 1),
        ((1, 3, 64, 64), (64, 3, 4, 4), 4, 1),
        ((1, 3, 9, 9), (64, 3, 7, 7), 2, 1),  # a few tiles
        ((1, 17, 64, 64), (64, 17, 7, 7), 2, 1),  # so many channels that weights could cost more than tiles
    ],
    ids=str,
)
def test_other_geometries_do_not(size, weight, stride, dilation):
    case = Case(*size, weight[0], weight[2], (0, 0), stride=stride, dilation=(dilation, dilation), S=weight[3])
    assert not any(name.endswith("phases") for name in algorithms(case)[::2])
