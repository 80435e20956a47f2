"""Public functions on tensors of another device and without data: fake cuda tensors, in a build that says it has kernels."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import torchcnn
import torchcnn.functional as F
from torchcnn import _arguments

CALLS = {
    "conv2d": lambda x, w: F.conv2d(x, w, x.new_empty(4), 1, "same", activation="relu"),
    "conv_transpose2d": lambda x, w: F.conv_transpose2d(x, w, x.new_empty(4), 2, 1, 1),
    "max_pool2d": lambda x, w: F.max_pool2d(x, 2),
    "max_pool2d with indices": lambda x, w: F.max_pool2d(x, 2, return_indices=True)[1],
    "min_pool2d": lambda x, w: F.min_pool2d(x, 2),
    "relu_max_pool2d": lambda x, w: F.relu_max_pool2d(x, 2),
    "avg_pool2d": lambda x, w: F.avg_pool2d(x, 2),
    "adaptive_avg_pool2d": lambda x, w: F.adaptive_avg_pool2d(x, 3),
    "adaptive_max_pool2d": lambda x, w: F.adaptive_max_pool2d(x, 3),
    "global_avg_pool2d": lambda x, w: F.global_avg_pool2d(x),
    "global_max_pool2d": lambda x, w: F.global_max_pool2d(x),
    "max_unpool2d": lambda x, w: F.max_unpool2d(x, x.long(), 2),
}


@pytest.fixture
def kernels(request, monkeypatch):
    monkeypatch.setattr(_arguments, "HAS_CUDA_KERNELS", request.param)


def tensors(device):
    return torch.empty(2, 4, 8, 8, device=device), torch.empty(4, 4, 3, 3, device=device)


@pytest.mark.parametrize("kernels", [True], indirect=True)
@pytest.mark.parametrize("name", CALLS)
def test_a_build_with_cuda_kernels_takes_cuda_tensors(name, kernels):
    with FakeTensorMode():
        result, expected = CALLS[name](*tensors("cuda")), CALLS[name](*tensors("cpu"))
    assert result.device.type == "cuda"
    assert (result.shape, result.dtype) == (expected.shape, expected.dtype)


@pytest.mark.parametrize("kernels", [True], indirect=True)
def test_the_question_for_kernels_can_be_traced(kernels):
    """check_tensors by itself: without a CUDA build of torch, Dynamo traces no more than that of a cuda tensor."""
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="eager")
    def checked(x):
        _arguments.check_tensors("conv2d", input=x, weight=x)
        return x + 1

    with FakeTensorMode(), torch.no_grad():
        assert checked(torch.empty(2, 2, device="cuda")).device.type == "cuda"


@pytest.mark.parametrize("kernels", [False], indirect=True)
@pytest.mark.parametrize("name", CALLS)
def test_a_build_without_them_says_so(name, kernels):
    with FakeTensorMode(), pytest.raises(NotImplementedError, match=r"device must be cpu or cuda, got cuda.*no CUDA kernels"):
        CALLS[name](*tensors("cuda"))


@pytest.mark.parametrize("kernels", [True], indirect=True)
def test_other_devices_are_refused(kernels):
    with FakeTensorMode(), pytest.raises(NotImplementedError, match=r"^conv2d: device must be cpu or cuda, got xpu"):
        F.conv2d(*tensors("xpu"))


@pytest.mark.parametrize("kernels", [True], indirect=True)
def test_devices_must_agree(kernels):
    with FakeTensorMode(), pytest.raises(RuntimeError, match=r"^conv2d: input and weight must be on the same device"):
        F.conv2d(tensors("cuda")[0], tensors("cpu")[1])


# Rules of sizes and dtypes hold for tensors without data too, with the words of the operator.

BAD = {
    "channels": lambda x, w: F.conv2d(x[:, 1:], w),
    "kernel": lambda x, w: F.conv2d(x[:, :, :2], w),
    "dilation": lambda x, w: F.conv2d(x, w, dilation=0),
    "stride": lambda x, w: F.conv2d(x, w, stride=0),
    "groups": lambda x, w: F.conv2d(x, w, groups=3),
    "bias": lambda x, w: F.conv2d(x, w, w[0, 0, 0]),
    "dtype": lambda x, w: F.conv2d(x, w.double()),
    "dtype of bias": lambda x, w: F.conv2d(x, w, w[:, 0, 0, 0].double()),
    "rank": lambda x, w: F.conv2d(x, w[0]),
    "transposed channels": lambda x, w: F.conv_transpose2d(x[:, 1:], w),
    "transposed stride": lambda x, w: F.conv_transpose2d(x, w, stride=0),
    "transposed bias": lambda x, w: F.conv_transpose2d(x, w, w[0, 0, 0]),
    "pool kernel": lambda x, w: F.max_pool2d(x, 9),
    "pool kernel 0": lambda x, w: F.min_pool2d(x, 0),
    "pool stride": lambda x, w: F.avg_pool2d(x, 2, 0),
    "pool padding": lambda x, w: F.max_pool2d(x, 2, padding=2),
    "relu pool padding": lambda x, w: F.relu_max_pool2d(x, 2, padding=2),
    "pool with indices": lambda x, w: F.max_pool2d(x, 2, dilation=0, return_indices=True),
    "divisor": lambda x, w: F.avg_pool2d(x, 2, divisor_override=0),
    "no channels": lambda x, w: F.adaptive_avg_pool2d(x[:, :0], 2),
    "adaptive size": lambda x, w: F.adaptive_max_pool2d(x, -1),
    "indices": lambda x, w: F.max_unpool2d(x, x.int(), 2),
    "shape of indices": lambda x, w: F.max_unpool2d(x, x[:1].long(), 2),
}


@pytest.mark.parametrize("name", BAD)
def test_meta_tensors_are_refused_as_others_are(name):
    with pytest.raises(RuntimeError) as real:
        BAD[name](*(torch.zeros_like(tensor) for tensor in tensors("cpu")))
    with pytest.raises(RuntimeError) as meta:
        BAD[name](*tensors("meta"))
    said, of_meta = (str(error.value).replace("torch.", "").lower() for error in (real, meta))
    names = {"double": "float64", "float": "float32", "int": "int32"}  # as C++ calls the dtypes
    assert [names.get(word, word) for word in said.split()] == [names.get(word, word) for word in of_meta.split()]


def test_export_refuses_a_model_that_cannot_run():
    model = torch.nn.Sequential(torchcnn.Conv2d(3, 4, 3), torchcnn.Conv2d(5, 6, 3))
    batch = torch.export.Dim("batch", min=2, max=8)
    with pytest.raises(Exception, match="input channels must equal"):
        torch.export.export(model, (torch.randn(4, 3, 8, 8),), dynamic_shapes=({0: batch},))
