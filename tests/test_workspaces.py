"""Scratch memory: kept within a limit, given back when asked for, the same results without it."""

import os
import platform
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import torchcnn
from torchcnn import backends


@pytest.fixture(autouse=True)
def restore():
    limit = backends.workspace_limit
    yield
    backends.workspace_limit = limit


def layer():
    x, w = torch.randn(2, 64, 40, 40), torch.randn(64, 64, 3, 3)
    return torchcnn.functional.conv2d(x.requires_grad_(), w.requires_grad_(), padding=1), (x, w)


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or platform.machine() != "x86_64" or "LD_PRELOAD" in os.environ,
    reason="conftest.py fills the memory of glibc, and torch may have an allocator of its own",
)
def test_fresh_memory_shows_what_is_not_written():
    assert (torch.empty(1000) < -1e38).all() and (torch.empty(1 << 22)[-1000:] < -1e38).all()


needs_workspaces = pytest.mark.skipif(torchcnn.isa() == "reference", reason="the reference row has no scratch memory")


@needs_workspaces
@pytest.mark.parametrize("winograd", [True, False])
def test_limit_and_release(winograd):
    with backends.flags(allow_winograd=winograd):
        backends.release_workspaces()
        others = backends.workspace_size()  # of threads that other tests had work for them
        torch.manual_seed(1)
        output, leaves = layer()
        expected = output.detach(), *torch.autograd.grad(output, leaves, torch.ones_like(output))
        assert backends.workspace_size() > others
        backends.release_workspaces()
        assert backends.workspace_size() == others
        backends.workspace_limit = 0
        torch.manual_seed(1)
        output, leaves = layer()
        actual = output.detach(), *torch.autograd.grad(output, leaves, torch.ones_like(output))
        assert all(map(torch.equal, actual, expected))
        backends.workspace_limit = 1 << 20
        output, _ = layer()
        assert backends.workspace_size() <= others + (torch.get_num_threads() << 20)


@needs_workspaces
def test_pools_keep_what_their_threads_read():
    """With nothing kept between operators, tables must outlast the threads that read them."""
    x = torch.randn(64, 64, 37, 37, requires_grad=True)
    expected = F.adaptive_avg_pool2d(x, 7)
    expected_grad = torch.autograd.grad(expected.sum(), x)[0]
    backends.workspace_limit = 0
    for _ in range(20):
        output = torchcnn.functional.adaptive_avg_pool2d(x, 7)
        torch.testing.assert_close(output, expected)
        torch.testing.assert_close(torch.autograd.grad(output.sum(), x)[0], expected_grad)
    last = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    expected_grad = torch.autograd.grad(F.max_pool2d(last, 3, 2).sum(), last)[0]
    for _ in range(20):
        assert torch.equal(torch.autograd.grad(torchcnn.functional.max_pool2d(last, 3, 2).sum(), last)[0], expected_grad)


@needs_workspaces
def test_bits_do_not_depend_on_what_scratch_memory_held():
    x, dy = torch.randn(2, 64, 57, 57), torch.randn(2, 64, 57, 57)

    def grad_weight():
        return torch.ops.torchcnn.conv2d_grad_weight(dy, x, 3, 3, 1, 1, 1, 1, 1, 1, 64, False)

    backends.release_workspaces()
    expected = grad_weight()
    with backends.flags(allow_winograd=True):
        nan = torch.full((8, 64, 57, 57), torch.nan)
        torchcnn.functional.conv2d(nan, torch.randn(64, 64, 3, 3), padding=1)  # leaves NaN in scratch memory
    assert torch.equal(grad_weight(), expected)


def test_errors():
    assert backends.workspace_limit == 64 << 20
    for wrong in (1.5, "1", True, None):
        with pytest.raises(TypeError, match="number of bytes"):
            backends.workspace_limit = wrong
    with pytest.raises(ValueError, match="negative, got -1"):
        backends.workspace_limit = -1


@needs_workspaces
def test_training_step_needs_no_more_than_torch_and_the_workspaces():
    """Peak resident memory of a step, each library in a process of its own."""
    program = """
import resource, sys, torch, torchcnn
library = torch.nn if sys.argv[1] == "torch" else torchcnn
torch.set_num_threads(2)
model = torch.nn.Sequential(library.Conv2d(16, 64, 3, padding=1), torch.nn.ReLU(), library.Conv2d(64, 64, 3, padding=1),
                            torch.nn.ReLU(), library.Conv2d(64, 32, 1), library.MaxPool2d(2), library.Conv2d(32, 32, 3, 2, 1))
x = torch.randn(8, 16, 112, 112, requires_grad=True)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for _ in range(3):
    model(x).square().sum().backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    kilobytes = [
        int(subprocess.run([sys.executable, "-c", program, name], capture_output=True, text=True, check=True).stdout)
        for name in ("torch", "torchcnn")
    ]
    assert kilobytes[1] <= kilobytes[0] + 3 * (64 << 10), kilobytes  # two threads and autograd's own


@needs_workspaces
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("size", "kernel", "stride", "padding"),
    [((1, 2, 3, 3), (3, 3), (4120, 1025), (0, 4100)), ((8, 16, 5, 28), (5, 3), (1000, 1), (0, 1))],
)
def test_large_strides_need_no_more_memory_than_small_ones(size, kernel, stride, padding, memory_format):
    """Rows that grad_weight sorts by their remainder modulo the stride: most of the remainders have no row at all."""
    backends.release_workspaces()
    backends.workspace_limit = 1 << 40
    others = backends.workspace_size()
    x, w = torch.randint(-3, 4, size).float(), torch.randint(-3, 4, (2, size[1], *kernel)).float().requires_grad_()
    output = torchcnn.functional.conv2d(x.contiguous(memory_format=memory_format), w, None, stride, padding)
    (actual,) = torch.autograd.grad(output.sum(), w)
    assert backends.workspace_size() - others < 2 << 20
    (expected,) = torch.autograd.grad(F.conv2d(x, w, None, stride, padding).sum(), w)
    assert torch.equal(actual, expected)
