"""Published architectures, randomly initialised, converted: `make test-models` runs this where torchvision and timm are.

In float64 the converted model is the original, in eval and in train mode. In float32 it is compared with float64, and may err
twice as much as the original does (tier 3 of tiers.py, in the 2-norm). The gradient of a network of rectifiers jumps where a
rounding moves a value across zero, which makes errors of 1e-2 in torch's own gradients, or none, by chance: the original's error
is therefore the largest of a few runs, on inputs that differ by a rounding.
"""

import copy

import pytest
import torch

import torchcnn

torchvision = pytest.importorskip("torchvision", reason="`make test-models` has an environment with it")
timm = pytest.importorskip("timm", reason="`make test-models` has an environment with it")

# name: (maker, side of the image); sides are the smallest that keep every layer's output above one pixel
MODELS = {
    "resnet18": (lambda: torchvision.models.resnet18(), 64),
    "resnet50": (lambda: torchvision.models.resnet50(), 64),
    "vgg11": (lambda: torchvision.models.vgg11(), 64),
    "alexnet": (lambda: torchvision.models.alexnet(), 96),
    "googlenet": (lambda: torchvision.models.googlenet(aux_logits=True, init_weights=False), 96),
    "densenet121": (lambda: torchvision.models.densenet121(), 64),
    "mobilenet_v2": (lambda: torchvision.models.mobilenet_v2(), 64),
    "efficientnet_b0": (lambda: torchvision.models.efficientnet_b0(), 64),
    "convnext_atto": (lambda: timm.create_model("convnext_atto"), 64),
    "regnetx_002": (lambda: timm.create_model("regnetx_002"), 64),
    "resnext26ts": (lambda: timm.create_model("resnext26ts"), 64),
}


def without_chance(model):
    """Dropout and stochastic depth would differ from run to run in train mode."""
    for module in model.modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):
            module.p = 0.0
        if type(module).__name__ in ("StochasticDepth", "DropPath"):
            module.p = module.drop_prob = 0.0
    return model


def first(output):
    """The logits; googlenet in train mode also returns those of two auxiliary classifiers."""
    return output if isinstance(output, torch.Tensor) else torch.cat(list(output), 1)


def outputs_and_gradients(model, input):
    """Logits, gradient of the input, and of every parameter, for a loss that weighs the classes differently."""
    input = input.clone().requires_grad_()
    logits = first(model(input))
    loss = (logits * torch.linspace(-1, 1, logits.shape[1], dtype=logits.dtype)).mean()
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad(loss, [input, *parameters.values()], allow_unused=True)
    named = zip(("input", *parameters), gradients, strict=True)
    return {"logits": logits.detach(), **{name: gradient for name, gradient in named if gradient is not None}}


@pytest.fixture(params=MODELS, scope="module")
def model(request):
    torch.manual_seed(0)
    maker, side = MODELS[request.param]
    return without_chance(maker()), torch.randn(2, 3, side, side)


def errors(result, truth):
    """Norms of the errors of the logits, of the gradient of the input, and of all parameters in units of each one's size."""

    def norm(names):
        parts = [(result[name].double() - truth[name]) / truth[name].norm().clamp(min=1e-12) for name in names]
        return torch.cat([part.flatten() for part in parts]).norm().item()

    return {
        "logits": norm(["logits"]),
        "input": norm(["input"]),
        "parameters": norm([name for name in truth if name not in ("logits", "input")]),
    }


def check_conversion(original, converted):
    assert not any(type(module) is torch.nn.Conv2d for module in converted.modules())
    assert any(type(module) is torchcnn.Conv2d for module in converted.modules())
    assert all(a.training == b.training for a, b in zip(original.modules(), converted.modules(), strict=True))


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_single_precision(model, training):
    original, input = model
    original = copy.deepcopy(original).train(training)
    converted = torchcnn.convert(original)
    check_conversion(original, converted)
    truth = outputs_and_gradients(copy.deepcopy(original).double(), input.double())
    ours = outputs_and_gradients(converted, input)
    with torchcnn.backends.flags(allow_winograd=True):
        winograd = outputs_and_gradients(converted, input)
    torchs = [outputs_and_gradients(original, input)]
    for _ in range(4):
        rounding = torch.finfo(input.dtype).eps * torch.randint_like(input, -1, 2)
        torchs.append(outputs_and_gradients(original, input * (1 + rounding)))
    assert ours.keys() == torchs[0].keys() == truth.keys()
    of_torch = [errors(result, truth) for result in torchs]
    for what, error in errors(ours, truth).items():
        allowed = 2 * max(result[what] for result in of_torch) + torch.finfo(torch.float32).eps
        assert error <= allowed, f"{what}: error {error:.3g}, torch's {[f'{result[what]:.3g}' for result in of_torch]}"
    # Winograd's algorithm has a bound of its own for a layer; in a network, its logits must be good to three digits.
    assert errors(winograd, truth)["logits"] <= 1e-3


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_double_precision(model, training):
    original, input = model
    original = copy.deepcopy(original).double().train(training)
    converted = torchcnn.convert(original)
    check_conversion(original, converted)
    expected, actual = (outputs_and_gradients(module, input.double()) for module in (original, converted))
    for name, value in expected.items():
        # Batch normalisation over few pixels divides by small deviations: seven of the sixteen digits are left for that.
        assert (actual[name] - value).norm() <= 1e-9 * value.norm() + 1e-12, name
    for name, buffer in original.named_buffers():  # the running statistics
        torch.testing.assert_close(dict(converted.named_buffers())[name], buffer, rtol=1e-9, atol=1e-12)


def test_state_dict_round_trip(model):
    original, input = model
    original = copy.deepcopy(original).eval()
    converted = torchcnn.convert(original)
    assert list(converted.state_dict()) == list(original.state_dict())
    for parameter in converted.parameters():
        parameter.data.mul_(1.01)
    original.load_state_dict(converted.state_dict(), strict=True)
    back = torchcnn.convert(converted, inverse=True)
    assert [type(module) for module in back.modules()] == [type(module) for module in original.modules()]
    with torch.no_grad():
        expected, actual = first(original(input)), first(back(input))
    assert torch.equal(actual, expected)


def test_channels_last(model):
    original, input = model
    original = copy.deepcopy(original).eval().to(memory_format=torch.channels_last)
    converted = torchcnn.convert(original)
    with torch.no_grad():
        expected, actual = (first(module(input.to(memory_format=torch.channels_last))) for module in (original, converted))
    assert (actual - expected).norm() <= 1e-3 * expected.norm()
