"""The tolerance policy: three tiers, the same for every operator, never tuned for a test.

Tier 1, exact: small integers. Every product and partial sum is an integer that the dtype holds, so the order of summation does
not matter and one wrong index shows. bfloat16 and float16 are computed in float32 and rounded once, so they are exact up to
that rounding.

Tier 2, bound: |error| <= c eps L conv(|x|, |w|), element by element, against float64. L is the number of terms that are added
up and conv(|x|, |w|) the same sum over absolute values. c = 1: L products and L additions in any order err by at most
gamma_L sum |x||w|, gamma_L = L u / (1 - L u) with u = eps / 2 (Higham, Accuracy and Stability of Numerical Algorithms, 3.1).
That is half the bound; the other half is for the reference, which for float64 rounds just as much.

Tier 3, torch: the largest error at most twice that of torch against float64, plus eps times the largest output, for torch's
error can be zero. For named geometries and fixed seeds only: the ratio of two errors has no bound over all inputs, and a
search through random geometries would find the unlucky one. For convolution on CPUs only: cuDNN chooses its algorithm by time.
"""

import torch

import torchcnn

C = 1


def assert_exact(actual, truth, what=""):
    """Tier 1: `truth` is exact in float64 or int64; `actual` has to be its rounding to the dtype, NaN where it is NaN."""
    expected = truth.to(actual.dtype)
    assert actual.shape == expected.shape
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    assert same.all(), f"{what} {(~same).sum()} of {same.numel()} elements differ, first at {first(~same)}"


def assert_bound(actual, truth, magnitude, length, what=""):
    """Tier 2. A half dtype is allowed one rounding of its own, of a result that is within the float32 bound."""
    half = torch.finfo(actual.dtype).bits == 16
    accumulated_in = torch.float32 if half else actual.dtype
    bound = C * torch.finfo(accumulated_in).eps * length * magnitude
    if half:
        info = torch.finfo(actual.dtype)
        bound = bound + info.eps / 2 * (truth.abs() + bound).clamp(min=info.smallest_normal)
    assert actual.shape == truth.shape
    error = (actual.double() - truth).abs()
    within = error <= bound  # False for NaN
    assert within.all(), (
        f"{what} {(~within).sum()} of {within.numel()} elements beyond the bound, first at {first(~within)}: "
        f"error {error[~within][0]:.3g}, bound {bound[~within][0]:.3g}"
    )


def assert_no_worse_than_torch(actual, torchs, truth, what=""):
    """Tier 3, where torch's kernels for the same device are there: the CUDA kernels in an emulator have none beside them."""
    if truth.numel() == 0 or "cuda-emulator" in torchcnn.__file__:
        return
    eps = torch.finfo(actual.dtype).eps
    error, torch_error = ((result.double() - truth).abs().max() for result in (actual, torchs))
    allowed = 2 * torch_error + eps * truth.abs().max()
    assert error <= allowed, f"{what} largest error {error:.3g}, torch's {torch_error:.3g}, allowed {allowed:.3g}"


def first(mask):
    return tuple(mask.nonzero()[0].tolist())


def small_integers(shape, low=-3, high=3):
    """float64 integers: products of two stay below 10, sums of a million of them are exact in float32."""
    return torch.randint(low, high + 1, shape, dtype=torch.float64)
