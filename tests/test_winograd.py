"""Winograd convolution: its matrices, its error bound, what it does with Inf and NaN, and the switch."""

import re
import sys
import threading
from fractions import Fraction
from math import prod
from typing import NamedTuple

import pytest
import tiers
import torch
import torch.nn.functional as F

import torchcnn
from torchcnn import _C, backends


class Axis(NamedTuple):
    m: int  # results of a tile
    r: int  # taps of a filter
    stride: int = 1


ALGORITHMS = {
    "winograd_2x2_3x3": (Axis(2, 3), Axis(2, 3)),
    "winograd_4x4_3x3": (Axis(4, 3), Axis(4, 3)),
    "winograd_2x2_5x5": (Axis(2, 5), Axis(2, 5)),
    "winograd_2x2_stride_2": (Axis(2, 3, 2), Axis(2, 3, 2)),
    "winograd_4x4_stride_2": (Axis(4, 3, 2), Axis(4, 3, 2)),
    "winograd_1x4_1x3": (Axis(1, 1), Axis(4, 3)),
    "winograd_4x1_3x1": (Axis(4, 3), Axis(1, 1)),
    "winograd_1x2_1x5": (Axis(1, 1), Axis(2, 5)),
    "winograd_2x1_5x1": (Axis(2, 5), Axis(1, 1)),
    "winograd_1x3_1x7": (Axis(1, 1), Axis(3, 7)),
    "winograd_3x1_7x1": (Axis(3, 7), Axis(1, 1)),
}
OF_PHASES = {  # forward and grad_weight; test_winograd_phases.py
    "winograd_4x4_3x3_phases": (Axis(4, 3), Axis(4, 3)),
    "winograd_3x3_4x4_phases": (Axis(3, 4), Axis(3, 4)),
}
POINTS = {  # and infinity
    3: ("0", "1"),
    4: ("0", "1", "-1"),
    5: ("0", "3/4", "-3/4", "2"),
    6: ("0", "5/8", "-5/8", "3/2", "-3/2"),
}

# The constant c of tier 2, for forward, grad_input and grad_weight: conv2d_winograd_transforms.h says what it bounds.
BOUNDS = {
    "winograd_2x2_3x3": (16, 16, 16),
    "winograd_4x4_3x3": (205, 205, 232),
    "winograd_2x2_5x5": (277, 277, 187),
    "winograd_2x2_stride_2": (16, 9, 9),
    "winograd_4x4_stride_2": (125, 104, 135),
    "winograd_1x4_1x3": (15, 15, 16),
    "winograd_4x1_3x1": (15, 15, 16),
    "winograd_1x2_1x5": (17, 17, 14),
    "winograd_2x1_5x1": (17, 17, 14),
    "winograd_1x3_1x7": (30, 30, 15),
    "winograd_3x1_7x1": (30, 30, 15),
    "winograd_4x4_3x3_phases": (205, 205, 232),
    "winograd_3x3_4x4_phases": (232, 232, 205),
}


class Case(NamedTuple):
    N: int
    C: int
    H: int
    W: int
    K: int
    R: int
    padding: tuple[int, int]
    groups: int = 1
    stride: int = 1
    dilation: tuple[int, int] = (1, 1)
    S: int | None = None  # R unless given

    @property
    def kernel(self):
        return self.R, self.S or self.R


# Odd sizes, tails of channels and filters, padding beyond the kernel, single rows; tiles cut off at every side.
CASES = [
    Case(2, 16, 7, 7, 16, 3, (1, 1)),
    Case(3, 17, 9, 11, 35, 3, (0, 0)),
    Case(2, 36, 5, 6, 20, 3, (2, 2)),
    Case(2, 24, 4, 4, 19, 3, (1, 2)),
    Case(3, 36, 2, 2, 20, 3, (1, 1)),
    Case(2, 20, 4, 3, 24, 3, (2, 2), dilation=(2, 2)),
    Case(1, 270, 10, 6, 40, 3, (1, 0)),
    Case(2, 34, 10, 10, 48, 3, (1, 1), groups=2),
    Case(1, 16, 2, 40, 16, 3, (1, 1)),
    Case(12, 20, 19, 18, 40, 3, (1, 1)),
    Case(5, 260, 30, 31, 250, 3, (1, 1)),  # tiles in chunks, and their sums in several blocks
    Case(1, 16, 38, 70, 16, 3, (5, 4)),
    Case(2, 32, 13, 12, 48, 5, (2, 2)),
    Case(1, 16, 8, 6, 16, 5, (0, 0)),
    Case(2, 20, 8, 9, 40, 5, (6, 1)),
    Case(2, 32, 16, 16, 32, 3, (1, 1), stride=2),
    Case(1, 33, 23, 31, 35, 3, (0, 0), stride=2),
    Case(2, 36, 14, 15, 40, 3, (2, 1), stride=2),
    Case(1, 270, 29, 28, 40, 3, (1, 0), stride=2),
    Case(2, 66, 18, 20, 72, 3, (1, 1), groups=2, stride=2),
    Case(3, 34, 40, 70, 36, 3, (3, 2), stride=2),
    Case(2, 164, 16, 16, 160, 3, (1, 1), stride=2),
    Case(1, 170, 19, 22, 155, 3, (2, 2), stride=2),
    Case(2, 16, 16, 16, 16, 3, (2, 2), dilation=(2, 2)),
    Case(1, 17, 23, 31, 35, 3, (0, 1), dilation=(3, 2)),
    Case(2, 36, 9, 40, 20, 3, (1, 4), dilation=(1, 4)),
    Case(2, 34, 20, 21, 48, 3, (5, 0), groups=2, dilation=(5, 1)),
    Case(1, 20, 26, 22, 24, 5, (8, 4), dilation=(4, 2)),
    Case(2, 50, 9, 23, 53, 1, (0, 1), S=3),
    Case(2, 53, 18, 19, 50, 3, (0, 3), S=1),
    Case(1, 96, 6, 41, 102, 1, (2, 2), groups=2, S=5),
    Case(3, 51, 21, 8, 49, 5, (6, 0), S=1),
    Case(8, 64, 17, 17, 96, 1, (0, 3), S=7),
    Case(1, 60, 3, 40, 270, 1, (1, 8), S=7),
    Case(2, 51, 31, 18, 49, 7, (0, 1), S=1),
    Case(1, 300, 26, 20, 60, 7, (9, 0), dilation=(3, 2), S=1),
    Case(1, 513, 16, 180, 500, 1, (0, 1), S=3),  # chunks of few positions, shared among threads by filters too
    Case(47, 1300, 4, 4, 32, 3, (1, 1)),  # in float64 too much to keep at once, though fewer tiles than a block
]


def tensors(case, dtype, make=torch.randn):
    x, w, b = make(case.N, case.C, case.H, case.W), make(case.K, case.C // case.groups, *case.kernel), make(case.K)
    return [t.to(dtype) for t in (x, w, b, make(*F.conv2d(x, w, None, *options(case)).shape))]


def options(case):
    return case.stride, case.padding, case.dilation, case.groups


def directions(conv2d, x, w, b, dy, case):
    """output, grad_input, grad_weight"""
    x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
    output = conv2d(x, w, b, *options(case))
    return output.detach(), *torch.autograd.grad(output, (x, w), dy)


def ours(*arguments):
    return directions(torchcnn.functional.conv2d, *arguments)


def truth(x, w, b, dy, case):
    return directions(F.conv2d, x.double(), w.double(), b.double(), dy.double(), case)


def algorithms(case):
    """The algorithm of each direction, as explained."""
    size, weight = (case.N, case.C, case.H, case.W), (case.K, case.C // case.groups, *case.kernel)
    text = torchcnn.explain(size, weight, *options(case))
    return [line.split()[1] for line in text.splitlines()]


def magnitudes(x, w, dy, case, names=None):
    """What c eps L multiplies: sums of absolute values, the largest source of any tile around a result in place of each."""
    kernel, (pad_h, pad_w), d, groups = case.kernel, case.padding, case.dilation, case.groups
    forward, grad_input, grad_weight = ([axis.m for axis in (ALGORITHMS | OF_PHASES)[name]] for name in names or algorithms(case))
    tap_sum = w.double().abs().sum((2, 3), keepdim=True)

    def largest(t, m, padding, stride):
        """For every result: results share a tile with up to m - 1 to each side, and all taps belong to each."""
        around = [p + (m_axis - 1) * stride * step for p, m_axis, step in zip(padding, m, d, strict=True)]
        cut = [max(0, -a) for a in around]
        t = t.double().abs()[..., cut[0] : t.shape[2] - cut[0], cut[1] : t.shape[3] - cut[1]]
        padded = F.pad(t, [max(0, around[1])] * 2 + [max(0, around[0])] * 2)
        window = [2 * (m_axis - 1) * stride + taps for m_axis, taps in zip(m, kernel, strict=True)]
        return F.max_pool2d(padded, window, stride, 0, d)

    yield F.conv2d(largest(x, forward, case.padding, case.stride), tap_sum, groups=groups)
    if case.stride == 1:
        flipped = [(taps - 1) * step - p for taps, p, step in zip(kernel, case.padding, d, strict=True)]
        back = largest(dy, grad_input, flipped, 1)
    else:  # a tile mixes m + 1 neighbours of grad_output, and h meets about (h + padding) / 2
        m = grad_input[0]
        back = F.max_pool2d(F.pad(dy.double().abs(), [m] * 4), 2 * m + 1, 1)
        for dim, pad in ((2, pad_h), (3, pad_w)):
            back = back.index_select(dim, ((torch.arange(x.shape[dim]) + pad) // 2).clamp(max=back.shape[dim] - 1))
    yield F.conv_transpose2d(back, tap_sum, groups=groups)
    x_max, dy_abs = largest(x, grad_weight, case.padding, case.stride), dy.double().abs()
    per_group = [
        torch.einsum("nkpq,ncpq->kc", d, m) for d, m in zip(dy_abs.chunk(groups, 1), x_max.chunk(groups, 1), strict=True)
    ]
    yield torch.cat(per_group)[:, :, None, None].expand(w.shape)


def assert_within_bounds(actual, true, x, w, dy, case):
    taps = case.kernel[0] * case.kernel[1]
    lengths = [case.C // case.groups * taps, case.K // case.groups * taps, max(16, case.N * dy.shape[2] * dy.shape[3])]
    constants = [BOUNDS[name][direction] for direction, name in enumerate(algorithms(case))]
    for result, expected, magnitude, length, c in zip(actual, true, magnitudes(x, w, dy, case), lengths, constants, strict=True):
        tiers.assert_bound(result, expected, c * magnitude, length)


def toom_cook(m, r, wanted):
    """A and G evaluate at the points, B^T interpolates; a pair of rows of G and B^T may change its sign.

    Of a tile cut to `wanted` outputs B^T interpolates at the first points alone, and its other rows are zero; rows of G are not
    divided by what these points contribute, so that B^T is multiplied by it.
    """
    points = [Fraction(p) for p in POINTS[m + r - 1]]
    kept = len(points) if wanted == m else wanted + r - 1

    def product_without(skipped):
        coefficients = [Fraction(1)]
        for i, q in enumerate(points[:kept]):
            if i != skipped:
                shifted = [Fraction(0), *coefficients]
                coefficients = [high - q * low for high, low in zip(shifted, [*coefficients, Fraction(0)], strict=True)]
        return coefficients

    A, G, B_T = [], [], []
    for i, p in enumerate(points):
        scale = prod(p - q for q in points if q != p)
        left_out = prod(p - q for q in points[kept:])
        A.append([p**j for j in range(m)])
        G.append([p**j / scale for j in range(r)])
        row = [c * left_out for c in product_without(i)] if i < kept else []
        B_T.append(row + [Fraction(0)] * (m + r - 1 - len(row)))
    A.append([Fraction(int(j == m - 1)) for j in range(m)])
    G.append([Fraction(int(j == r - 1)) for j in range(r)])
    B_T.append(product_without(None) if wanted == m else [Fraction(0)] * (m + r - 1))
    if m + r <= 5:  # the textbook's signs
        G[0], B_T[0] = [-g for g in G[0]], [-b for b in B_T[0]]
    return A, G, B_T


def outputs(axis, of_grad_input=False):
    """Of a whole tile."""
    return 2 * axis.m if of_grad_input and axis.stride == 2 else axis.m


def exact_matrices(axis, of_grad_input=False, wanted=None):
    """A, G, B^T of tiles with `wanted` outputs, and which input meets which tap in an output: taken[output][tap], or None."""
    m, r, stride = axis
    wanted = wanted or outputs(axis, of_grad_input)

    def spread(row, length, first, step=1):
        wide = [Fraction(0)] * length
        wide[first : first + step * len(row) : step] = row
        return wide

    def unit(length, place):
        return spread([Fraction(1)], length, place)

    def unit_if(needed, length, place):
        return unit(length, place) if needed else [Fraction(0)] * length

    if r == 1:
        one = [[Fraction(1)]]
        return one, one, one, [[0]]
    if r == 7:  # two filters of four taps, the second, of which the last tap is missing, on the input from x_4 on
        A, G, B_T = toom_cook(m, 4, max(wanted, m - 1))  # which share inputs
        G = [spread(g, 7, 0) for g in G] + [spread(g[:3], 7, 4) for g in G]
        B_T = [spread(row, m + 6, 0) for row in B_T] + [spread(row[: m + 2], m + 6, 4) for row in B_T]
        return A + A, G, B_T, [[p + s for s in range(7)] for p in range(wanted)]
    if stride == 1:
        return *toom_cook(m, r, wanted), [[p + s for s in range(r)] for p in range(wanted)]
    if of_grad_input:
        A, G, B_T = toom_cook(m, 2, max(1, wanted // 2))  # taps 0 and 2; tap 1 is a plain product
        if wanted == 1:
            B_T = [[Fraction(0)] * (m + 1) for _ in B_T]
        A = [spread(row, 2 * m, 1, 2) for row in A] + [unit(2 * m, 2 * j) for j in range(m)]
        B_T = B_T + [unit_if(2 * j < wanted, m + 1, j) for j in range(m)]
        taken = [[None if (h + s) % 2 == 0 else (h + s - 1) // 2 for s in range(3)] for h in range(wanted)]
    else:
        A, G, B_T = toom_cook(m, 2, wanted)
        A = A + [unit(m, j) for j in range(m)]
        B_T = [spread(row, 2 * m + 1, 0, 2) for row in B_T] + [unit_if(j < wanted, 2 * m + 1, 2 * j + 1) for j in range(m)]
        taken = [[2 * p + s for s in range(3)] for p in range(wanted)]
    return A, [[g[0], Fraction(0), g[1]] for g in G] + [unit(3, 1)] * m, B_T, taken


# The axes of all algorithms, once each, by the names of algorithms that have them.
AXES = {name: next(axis for axis in (ALGORITHMS | OF_PHASES)[name.split()[0]] if axis.r > 1) for name in _C.winograd_matrices()}


@pytest.fixture(autouse=True)
def winograd():
    with backends.flags(allow_winograd=True):
        yield


needs_winograd = pytest.mark.skipif(torchcnn.isa() == "reference", reason="the reference row has no Winograd")


@pytest.mark.parametrize("name", AXES)
def test_matrices(name):
    axis, of_grad_input = AXES[name], name.endswith("grad_input")
    tiles = _C.winograd_matrices()[name]
    assert len(tiles) == outputs(axis, of_grad_input)
    for wanted, compiled in enumerate(tiles, 1):
        A, G, B_T, taken = exact_matrices(axis, of_grad_input, wanted)
        points, inputs = range(len(B_T)), range(len(B_T[0]))
        for p, taps in enumerate(taken):  # output p takes tap s at one input, and nothing else
            for s, place in enumerate(taps):
                assert [sum(A[i][p] * G[i][s] * B_T[i][j] for i in points) for j in inputs] == [int(j == place) for j in inputs]
        assert [[Fraction(v) for v in row] for row in compiled[0]] == A
        assert [[Fraction(v) for v in row] for row in compiled[2]] == B_T
        for row, exact_row in zip(compiled[1], G, strict=True):
            assert all(abs(Fraction(v) - g) <= abs(g) * Fraction(1, 2**51) for v, g in zip(row, exact_row, strict=True))


@pytest.mark.parametrize("name", AXES)
def test_products_of_cut_tiles(name):
    """An output less is a product less, two where the stride has two plain ones; a half of seven taps spares infinity alone."""
    axis, of_grad_input = AXES[name], name.endswith("grad_input")
    products = [sum(any(row) for row in B_T) for _, _, B_T in _C.winograd_matrices()[name]]
    if axis.r == 7:
        assert products == [10, 10, 12]
    elif of_grad_input:
        assert products == [1, *range(3, 2 * axis.m + 2)]
    else:
        assert products == [axis.stride * wanted + axis.r - axis.stride for wanted in range(1, axis.m + 1)]


def test_axes_are_those_of_all_algorithms():
    assert {"winograd_2x2_stride_2 grad_input", "winograd_4x4_stride_2 grad_input"} <= set(AXES)
    assert {axis for axes in (ALGORITHMS | OF_PHASES).values() for axis in axes if axis.r > 1} == set(AXES.values())


@pytest.mark.parametrize("name", ALGORITHMS | OF_PHASES)
def test_bounds_follow_from_matrices(name):
    def amplification(outer, inner, B_T):
        rows = zip(outer, B_T, inner, strict=True)
        per_row = [[abs(v) * sum(map(abs, b)) * max(map(abs, inner_row)) for v in row] for row, b, inner_row in rows]
        return max(map(sum, zip(*per_row, strict=True)))

    def largest(axis, of_grad_input, of_grad_weight=False):
        amplifications = []
        for wanted in range(1, outputs(axis, of_grad_input) + 1):
            A, G, B_T, _ = exact_matrices(axis, of_grad_input, wanted)
            A = [row[:wanted] for row in A]
            amplifications.append(amplification(G, A, B_T) if of_grad_weight else amplification(A, G, B_T))
        return max(amplifications)

    exact = [1, 1, 1]
    for axis in (ALGORITHMS | OF_PHASES)[name]:
        exact[0] *= largest(axis, False)
        exact[1] *= largest(axis, True)
        exact[2] *= largest(axis, False, of_grad_weight=True)
    assert all(c - 1 < value <= c for c, value in zip(BOUNDS[name], exact, strict=True)), [float(value) for value in exact]


@needs_winograd
def test_cases_take_every_algorithm():
    taken = [set(names) for names in zip(*map(algorithms, CASES), strict=True)]
    assert all(names == set(ALGORITHMS) for names in taken), taken


@pytest.mark.parametrize("case", CASES, ids=str)
def test_small_integers(case, dtype, layout):
    """An error below 1/2 is no error of indices: rounded, the sums of integers are exact."""
    x, w, b, dy = tensors(case, torch.float64, lambda *shape: tiers.small_integers(shape))
    if case.N * dy.shape[2] * dy.shape[3] > 1000 and dtype == torch.float32:
        dy = dy * (torch.rand(dy.shape) < 0.1)  # short sums in grad_weight, too
    expected = truth(x, w, b, dy, case)
    x, w, b, dy = (t.to(dtype) for t in (x, w, b, dy))
    actual = ours(layout(x), w, b, layout(dy), case)
    for result, exact in zip(actual, expected, strict=True):
        assert (result - exact).abs().max() < 0.25
        tiers.assert_exact(result.round(), exact)


@pytest.mark.parametrize(
    ("kernel", "stride", "dilation"),
    [
        ((3, 3), 1, (1, 1)),
        ((3, 3), 1, (2, 3)),  # phases shorter than the longest
        ((3, 3), 2, (1, 1)),
        ((5, 5), 1, (1, 1)),
        ((1, 3), 1, (1, 1)),
        ((5, 1), 1, (1, 1)),
        ((7, 1), 1, (2, 1)),
    ],
    ids=str,
)
def test_tiles_cut_to_every_size(kernel, stride, dilation, layout):
    """Small integers again, where the last tiles have 1, 2, ... rows and columns: neither memory nor neighbours show through."""
    taken = set()
    large = Case(2, 64, 30, 30, 64, 3, (1, 1))
    ours(*(torch.full_like(t, torch.nan) for t in tensors(large, torch.float32)), large)  # leaves NaN in scratch memory
    for H in range(2, 20):
        for W in {H, 7 * H % 18 + 2}:
            padding = tuple(k // 2 * d for k, d in zip(kernel, dilation, strict=True))
            case = Case(2, 50, H, W, 49, kernel[0], padding, stride=stride, dilation=dilation, S=kernel[1])
            x, w, b, dy = tensors(case, torch.float64, lambda *shape: tiers.small_integers(shape))
            expected = truth(x, w, b, dy, case)
            x, w, b, dy = (t.float() for t in (x, w, b, dy))
            for result, exact in zip(ours(layout(x), w, b, layout(dy), case), expected, strict=True):
                tiers.assert_exact(result.round(), exact)
            taken |= {(direction, name) for direction, name in enumerate(algorithms(case)) if name.startswith("winograd")}
    assert {direction for direction, _ in taken} == (set() if torchcnn.isa() == "reference" else {0, 1, 2})


@needs_winograd
@pytest.mark.parametrize("outliers", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_error_bound(case, dtype, outliers):
    x, w, b, dy = tensors(case, dtype)
    if outliers:
        for t in (x, dy):
            t[torch.rand(t.shape) < 0.02] *= 1000
    b.zero_()
    assert_within_bounds(ours(x, w, b, dy, case), truth(x, w, b, dy, case), x, w, dy, case)


def test_error_beside_torch():
    """On ordinary data, about 64 channels: no direction above 1e-5 of the largest result (textbook points are)."""
    case = Case(2, 64, 28, 28, 64, 3, (1, 1))
    x, w, b, dy = tensors(case, torch.float32)
    for result, expected in zip(ours(x, w, b, dy, case), truth(x, w, b, dy, case), strict=True):
        assert (result - expected).abs().max() <= 5e-6 * expected.abs().max()


@needs_winograd  # the reference row rounds once, after the bias
@pytest.mark.parametrize("relu", [False, True])
def test_bias_and_relu(layout, relu):
    x, w, b, _ = tensors(CASES[1], torch.float32)
    sizes = (1, 1, 0, 0, 1, 1, 1)
    plain = torch.ops.torchcnn.conv2d(layout(x), w, None, *sizes, False) + b[:, None, None]
    actual = torch.ops.torchcnn.conv2d(layout(x), w, b, *sizes, relu)
    assert torch.equal(actual, plain.relu() if relu else plain)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_same_bits_for_every_thread_count_layout_and_neighbour(case, dtype):
    x, w, b, dy = tensors(case, dtype)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = ours(x, w, b, dy, case)
        last = {"memory_format": torch.channels_last}
        laid_out = [t.contiguous(**last) for t in (x, w, dy)]
        for weight in (w, laid_out[1]):
            results = ours(laid_out[0], weight, b, laid_out[2], case)
            for result, expected in zip(results, one, strict=True):
                assert torch.equal(result, expected)
            assert results[2].is_contiguous(**last)
        for count in (2, 3, 8):
            torch.set_num_threads(count)
            for weight in (w, laid_out[1]):
                for result, expected in zip(ours(x, weight, b, dy, case), one, strict=True):
                    assert torch.equal(result, expected)
    finally:
        torch.set_num_threads(threads)
    for n in range(min(3, len(x))):
        alone = ours(x[n : n + 1], w, b, dy[n : n + 1], case)
        assert torch.equal(alone[0][0], one[0][n])
        assert torch.equal(alone[1][0], one[1][n])


@needs_winograd  # of the reference row both sides would be the same kernel, slow on these sizes
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan, 1e38])
@pytest.mark.parametrize(  # in a whole tile, and in some that an edge cuts off
    ("where", "place"),
    [("weight", (2, 1)), *((where, place) for where in ("input", "grad_output") for place in ((2, 1), (-1, -1), (-2, 0)))],
    ids=str,
)
@pytest.mark.parametrize(
    "case",
    [
        Case(3, 24, 17, 18, 22, 3, (1, 1)),
        Case(2, 32, 15, 17, 32, 5, (2, 2), groups=2),
        Case(2, 40, 24, 16, 33, 3, (1, 1), stride=2),
        Case(2, 161, 24, 16, 161, 3, (1, 1), stride=2),
        Case(2, 24, 20, 18, 21, 3, (2, 2), dilation=(2, 2)),
        Case(2, 48, 14, 21, 49, 1, (0, 1), S=3),
        Case(2, 48, 22, 19, 49, 7, (3, 0), S=1),
    ],
    ids=str,
)
def test_not_finite(case, where, place, value, layout):
    """Inf and NaN, and overflow of intermediate values, stay where the direct kernel has them."""
    x, w, b, dy = tensors(case, torch.float32)
    clean = ours(layout(x), w, b, layout(dy), case)
    hit = {"input": x[1, 3], "weight": w[5, 2], "grad_output": dy[1, 4]}[where]
    hit[min(place[0], len(hit) - 1) % len(hit), min(place[1], len(hit[0]) - 1) % len(hit[0])] = value
    actual = ours(layout(x), layout(w), b, layout(dy), case)
    with backends.flags(allow_winograd=False):
        direct = ours(layout(x), layout(w), b, layout(dy), case)
    for result, expected, before in zip(actual, direct, clean, strict=True):
        assert torch.equal(result.isnan(), expected.isnan())
        assert torch.equal(result.isinf(), expected.isinf())
        assert torch.equal(result[result.isinf()], expected[expected.isinf()])
        if value != 1e38 and not result.isfinite().all():
            assert result.isfinite().any()
        if where != "weight" and len(result) == case.N:
            far = slice(12, None) if place[0] > 0 else slice(None, -12)  # other images and tiles keep their bits
            assert torch.equal(result[0], before[0]) and torch.equal(result[:, :, far, far], before[:, :, far, far])
            assert result[:, :, far, far].numel() > 0 or min(result.shape[2:]) <= 12
    if value != 1e38:
        reached = {"input": (0, 2), "weight": (0, 1), "grad_output": (1, 2)}[where]
        assert all(not actual[direction].isfinite().all() for direction in reached)


@needs_winograd
@pytest.mark.parametrize(
    "case",
    [
        Case(3, 17, 40, 37, 21, 3, (1, 1)),  # tiles enough for slices, which add up grad_bias; filters no multiple of a vector
        Case(2, 40, 41, 36, 42, 3, (1, 1), groups=2),
        Case(4, 36, 44, 40, 37, 3, (1, 1), stride=2),
        Case(2, 48, 33, 40, 50, 1, (0, 1), S=3),
        Case(2, 3, 60, 64, 37, 7, (3, 3), stride=2),
        Case(3, 8, 70, 66, 66, 11, (2, 2), groups=2, stride=4),
        Case(1, 16, 7, 7, 21, 3, (1, 1)),  # few tiles, where it is a sum of its own
    ],
    ids=str,
)
def test_grad_bias_beside_grad_weight(case, dtype, layout):
    x, w, b, dy = tensors(case, dtype)
    assert algorithms(case)[2].startswith("winograd")

    def grad_bias(dy):
        leaves = w.detach().requires_grad_(), b.detach().requires_grad_()
        return torch.autograd.grad(torchcnn.functional.conv2d(layout(x), *leaves, *options(case)), leaves, layout(dy))[1]

    positions = dy.numel() // case.K
    tiers.assert_bound(grad_bias(dy), dy.double().sum((0, 2, 3)), dy.double().abs().sum((0, 2, 3)), positions)
    if dtype == torch.float32:  # summed in double: all errors of a float32 sum would have one sign
        constant = torch.full_like(dy, 0.1)
        exact = constant.double().sum((0, 2, 3))
        assert ((grad_bias(constant) - exact).abs() <= 2 * torch.finfo(dtype).eps * exact).all()
    integers = torch.randint(-3, 4, dy.shape).to(dtype)
    tiers.assert_exact(grad_bias(integers), integers.double().sum((0, 2, 3)))
    integers[-1, 3, 1, 2] = torch.inf
    spoilt = grad_bias(integers)
    assert spoilt[3] == torch.inf and spoilt.isfinite().sum() == case.K - 1


@needs_winograd
def test_switch_while_an_operator_runs():
    """Which kernel it takes is decided once: weights in channels_last, which not all read, would be taken for NCHW."""
    x, w = torch.randn(1, 16, 8, 8), torch.randn(16, 16, 3, 3).contiguous(memory_format=torch.channels_last)
    arguments = (x, w, None, 1, 1, 1, 1, 1, 1, 1, False)
    either, stop, interval = [], threading.Event(), sys.getswitchinterval()
    for allow in (False, True):
        with backends.flags(allow_winograd=allow):
            either.append(torch.ops.torchcnn.conv2d(*arguments))

    def switch():
        while not stop.is_set():
            _C.set_allow_winograd(False)
            _C.set_allow_winograd(True)

    other = threading.Thread(target=switch)
    sys.setswitchinterval(1e-6)
    other.start()
    try:
        for _ in range(30000):
            output = torch.ops.torchcnn.conv2d(*arguments)
            assert any(torch.equal(output, expected) for expected in either)
    finally:
        stop.set()
        other.join()
        sys.setswitchinterval(interval)


@needs_winograd
def test_switch():
    case = CASES[0]
    assert backends.allow_winograd is True
    assert all(name.startswith("winograd") for name in algorithms(case))
    x, w, b, dy = tensors(case, torch.float32)
    with backends.flags(allow_winograd=False):
        assert backends.allow_winograd is False
        assert not any(name.startswith("winograd") for name in algorithms(case))
        direct = ours(x, w, b, dy, case)
    assert backends.allow_winograd is True
    for result, expected, magnitude in zip(direct, truth(x, w, b, dy, case), magnitudes(x, w, dy, case), strict=True):
        tiers.assert_bound(result, expected, magnitude, 144)
    with pytest.raises(KeyError), backends.flags(allow_winograd=False):
        raise KeyError
    assert backends.allow_winograd is True
    try:
        torchcnn.backends.allow_winograd = False
        assert backends.allow_winograd is False
        with backends.flags(allow_winograd=True):
            assert backends.allow_winograd is True
        assert backends.allow_winograd is False
    finally:
        torchcnn.backends.allow_winograd = True
    with pytest.raises(TypeError):
        backends.allow_winograd = "no"


@needs_winograd
def test_rule_reads_neither_batch_nor_threads():
    threads = torch.get_num_threads()
    try:
        texts = set()
        for count in (1, 4):
            torch.set_num_threads(count)
            texts |= {torchcnn.explain((N, 64, 14, 14), (64, 64, 3, 3), padding=1) for N in (1, 2, 64)}
        assert len(texts) == 1
    finally:
        torch.set_num_threads(threads)


@needs_winograd
@pytest.mark.parametrize(
    "geometry",
    [
        {"stride": 3},
        {"stride": (1, 2)},
        {"stride": 2, "dilation": 2},
        {"groups": 8},
        {"weight": (3, 5)},
        {"weight": (1, 1)},
        {"weight": (1, 3), "stride": 2},
        {"weight": (1, 3), "stride": (2, 1)},
        {"weight": (7, 1), "stride": (1, 2)},
        {"weight": (1, 3), "groups": 2},  # too few channels
        {"weight": (1, 2)},
        {"weight": (4, 1)},
        {"weight": (1, 9)},
    ],
    ids=str,
)
def test_other_geometries_are_direct(geometry):
    geometry = dict(geometry)
    weight = geometry.pop("weight", (3, 3))
    text = torchcnn.explain((1, 64, 20, 20), (64, 64 // geometry.get("groups", 1), *weight), **geometry)
    assert not re.search("winograd", text)


@needs_winograd
@pytest.mark.parametrize("weight, dilation", [((1, 3), (5, 1)), ((7, 1), (1, 4)), ((5, 1), (2, 2))], ids=str)
def test_dilation_of_one_tap_is_none(weight, dilation):
    """It neither parts the tiles nor changes a bit."""
    x, w = torch.randn(2, 50, 31, 29), torch.randn(52, 50, *weight)
    kept = tuple(d if taps > 1 else 1 for taps, d in zip(weight, dilation, strict=True))
    text, expected = (torchcnn.explain(x.shape, w.shape, dilation=d) for d in (dilation, kept))
    assert text == expected and "winograd" in text
    results = (torchcnn.functional.conv2d(x, w, dilation=d) for d in (dilation, kept))
    assert torch.equal(*results)
