"""Fixtures: device x dtype x memory layout. The instruction set is chosen for the whole run by TORCHCNN_ISA."""

import ctypes
import os
import sys

import cases
import hypothesis
import pytest
import torch

import torchcnn

# The same examples on every run of a CI, new ones on a developer's machine.
hypothesis.settings.register_profile(
    "torchcnn",
    deadline=None,
    derandomize="CI" in os.environ,
    max_examples=int(os.environ.get("TORCHCNN_TEST_EXAMPLES", 30)),
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.function_scoped_fixture],
)
hypothesis.settings.load_profile("torchcnn")


# What a kernel leaves unwritten should be seen: glibc fills fresh memory with 0xfe, the numbers -1.7e38 and -5e303.
if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
    M_PERTURB = -6
    ctypes.CDLL(None).mallopt(M_PERTURB, 1)


# On a GPU; test_cuda.py allows it. Here, because PyTorch's own test helpers (test_torch_cases.py) bar the switch once imported.
torch.backends.cudnn.allow_tf32 = False


def has_cuda():
    return torch.cuda.is_available() and torch._C._dispatch_has_kernel_for_dispatch_key("torchcnn::conv2d", "CUDA")


def cuda_device():
    """Where the CUDA kernels run: on a GPU, or as CPU tensors in the build of tests/cuda_emulator; None: nowhere."""
    if "cuda-emulator" in torchcnn.__file__:
        return "cpu"
    return "cuda" if has_cuda() else None


@pytest.fixture(autouse=True)
def cpu_kernels(request):
    """Skips what is marked cpu_kernels(reason) where CPU tensors run the CUDA kernels."""
    mark = request.node.get_closest_marker("cpu_kernels")
    if mark and cuda_device() == "cpu":
        pytest.skip(f"only the CPU kernels: {mark.args[0]}")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def direct_sums():
    """Tiers 1 and 3 hold for direct sums; test_winograd.py turns Winograd on and has its bound."""
    with torchcnn.backends.flags(allow_winograd=False):
        yield


@pytest.fixture
def threads():
    """Sets the number of threads; the number found is restored."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not has_cuda(), reason="no CUDA kernels"))])
def device(request):
    return request.param


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def dtype(request):
    return request.param


@pytest.fixture(params=[torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def half_dtype(request):
    return request.param


@pytest.fixture(params=[torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64], ids=lambda dtype: str(dtype)[6:])
def integer_dtype(request):
    return request.param


@pytest.fixture(params=cases.LAYOUTS, ids=lambda layout: layout.__name__)
def layout(request):
    return request.param
