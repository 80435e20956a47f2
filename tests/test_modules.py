"""Modules: the same constructor, repr, state_dict, pickle and results as torch.nn, in both directions."""

import copy
import io
import pickle

import pytest
import torch
from tiers import assert_exact, small_integers

import torchcnn

# name -> constructor arguments; those that torch.nn has under the same name
MODULES = {
    "conv2d": ("Conv2d", (4, 6, 3), {}),
    "conv2d_all": (
        "Conv2d",
        (4, 6, (3, 2)),
        {"stride": (2, 1), "padding": (1, 0), "dilation": (1, 2), "groups": 2, "bias": False},
    ),
    "conv2d_same": ("Conv2d", (4, 6, (4, 3)), {"padding": "same"}),
    "conv2d_valid": ("Conv2d", (4, 6, 3), {"padding": "valid"}),
    "conv2d_reflect": ("Conv2d", (4, 6, 3), {"padding": (2, 1), "padding_mode": "reflect"}),
    "conv2d_replicate": ("Conv2d", (4, 6, 3), {"padding": 1, "padding_mode": "replicate", "stride": 2}),
    "conv2d_circular": ("Conv2d", (4, 6, 3), {"padding": (1, 2), "padding_mode": "circular", "dilation": 2}),
    "conv2d_same_even_circular": ("Conv2d", (4, 6, (4, 2)), {"padding": "same", "padding_mode": "circular"}),
    "conv_transpose": ("ConvTranspose2d", (4, 6, 3), {}),
    "conv_transpose_all": (
        "ConvTranspose2d",
        (4, 6, (3, 2)),
        {"stride": (2, 1), "padding": (1, 0), "output_padding": (1, 0), "dilation": (1, 2), "groups": 2, "bias": False},
    ),
    "max_pool": ("MaxPool2d", (2,), {}),
    "max_pool_all": ("MaxPool2d", ((3, 2),), {"stride": (2, 1), "padding": 1, "dilation": (1, 2), "ceil_mode": True}),
    "avg_pool": ("AvgPool2d", (2,), {}),
    "avg_pool_all": (
        "AvgPool2d",
        ((3, 2),),
        {"stride": 2, "padding": (1, 0), "ceil_mode": True, "count_include_pad": False, "divisor_override": 4},
    ),
    "adaptive_avg_pool": ("AdaptiveAvgPool2d", ((3, 4),), {}),
    "adaptive_avg_pool_none": ("AdaptiveAvgPool2d", ((None, 4),), {}),
    "adaptive_max_pool": ("AdaptiveMaxPool2d", (3,), {}),
}


@pytest.fixture(params=MODULES)
def pair(request):
    """(torchcnn's module, torch's module), made alike from the same seed."""
    name, args, kwargs = MODULES[request.param]
    torch.manual_seed(1)
    ours = getattr(torchcnn, name)(*args, **kwargs)
    torch.manual_seed(1)
    return ours, getattr(torch.nn, name)(*args, **kwargs)


def test_is_one_of_torch(pair):
    ours, of_torch = pair
    assert isinstance(ours, type(of_torch))
    assert repr(ours) == repr(of_torch)
    assert list(ours.state_dict()) == list(of_torch.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), of_torch.state_dict().values(), strict=True)), (
        "the initial weights for a seed are torch's"
    )


def integer_weights(*modules):
    """The same small integers in all modules, so that results are exact."""
    for name, parameter in modules[0].named_parameters():
        values = small_integers(parameter.shape).to(parameter.dtype)
        for module in modules:
            module.get_parameter(name).data.copy_(values)


def test_same_results_and_gradients(pair, layout):
    integer_weights(*pair)
    results = []
    values = small_integers((2, 4, 9, 8)) * 12  # averages of up to 12 pixels stay close to integers
    for module in pair:
        module = copy.deepcopy(module).double()
        input = layout(values.clone()).requires_grad_()
        output = module(input)
        gradients = torch.autograd.grad(output, [input, *module.parameters()], torch.ones_like(output))
        results.append((output, *gradients))
    for ours, of_torch in zip(*results, strict=True):
        torch.testing.assert_close(ours, of_torch, rtol=1e-15, atol=1e-14)


def test_unbatched(pair):
    input = torch.randn(4, 9, 8, dtype=torch.float64)
    ours, of_torch = (module.double()(input) for module in pair)
    torch.testing.assert_close(ours, of_torch, rtol=1e-14, atol=1e-14)


def test_state_dict_exchange(pair):
    ours, of_torch = pair
    for source, target in ((ours, of_torch), (of_torch, ours)):
        for parameter in source.parameters():
            parameter.data.normal_()
        target.load_state_dict(source.state_dict(), strict=True)
        for name, value in source.state_dict().items():
            assert torch.equal(target.state_dict()[name], value)


def test_state_dict_exchange_of_a_network():
    def network(nn):
        return torch.nn.Sequential(
            nn.Conv2d(1, 4, 5, padding="same"),
            torch.nn.BatchNorm2d(4),
            nn.MaxPool2d(2),
            nn.Conv2d(4, 6, 3, bias=False, padding_mode="circular", padding=1),
            nn.AvgPool2d(2),
            nn.AdaptiveMaxPool2d(1),
        ).double()

    ours, of_torch = network(torchcnn), network(torch.nn)
    input = torch.randn(2, 1, 12, 12, dtype=torch.float64)
    for source, target in ((ours, of_torch), (of_torch, ours)):
        for parameter in source.parameters():
            parameter.data.normal_()
        target.load_state_dict(source.state_dict(), strict=True)
        torch.testing.assert_close(target(input), source(input), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module)), lambda module: save_and_load(module)],
    ids=["deepcopy", "pickle", "save"],
)
@pytest.mark.parametrize(
    "make",
    [
        lambda: torchcnn.Conv2d(3, 4, 3, padding="same"),
        lambda: torchcnn.Conv2d(3, 4, 3, init="kaiming"),
        lambda: torchcnn.ConvTranspose2d(3, 4, 3, 2, output_padding=1),
        lambda: torchcnn.MaxPool2d(2, return_indices=True),
        lambda: torchcnn.MinPool2d(3, 2, 1, return_indices=True),
        lambda: torchcnn.AvgPool2d(2, divisor_override=3),
        lambda: torchcnn.AdaptiveAvgPool2d((None, 2)),
        lambda: torchcnn.AdaptiveMaxPool2d(2, return_indices=True),
        lambda: torchcnn.GlobalAvgPool2d(),
        lambda: torchcnn.GlobalMaxPool2d(),
    ],
)
def test_copies(make, duplicate):
    module = make()
    twin = duplicate(module)
    assert type(twin) is type(module) and repr(twin) == repr(module)
    input = torch.randn(2, 3, 6, 7)
    results, twins = module(input), twin(input)
    if not isinstance(results, tuple):
        results, twins = (results,), (twins,)
    assert all(torch.equal(a, b) for a, b in zip(results, twins, strict=True))
    for parameter in module.parameters():
        parameter.data.zero_()
    assert all(torch.equal(a, b) for a, b in zip(twins, as_tuple(twin(input)), strict=True)), "a copy of its own"


def as_tuple(results):
    return results if isinstance(results, tuple) else (results,)


def save_and_load(module):
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_device_and_dtype_arguments(dtype):
    module = torchcnn.Conv2d(3, 4, 3, device="cpu", dtype=dtype)
    assert module.weight.dtype == module.bias.dtype == dtype
    assert module(torch.randn(1, 3, 5, 5, dtype=dtype)).dtype == dtype
    assert torchcnn.Conv2d(3, 4, 3, device="meta").weight.is_meta
    assert torchcnn.Conv2d(3, 4, 3).to(dtype).weight.dtype == dtype


def test_init():
    torch.manual_seed(2)
    he = torchcnn.Conv2d(16, 500, 3, init="kaiming")
    assert abs(he.weight.std() / (2 / (16 * 9)) ** 0.5 - 1) < 0.02  # 72,000 samples: the deviation is known to 0.3%
    xavier = torchcnn.Conv2d(16, 500, 3, init="xavier")
    assert abs(xavier.weight.std() / (2 / (9 * (16 + 500))) ** 0.5 - 1) < 0.02
    filled = torchcnn.Conv2d(2, 3, 3, init=lambda weight: weight.fill_(7))
    assert (filled.weight == 7).all() and isinstance(filled.weight, torch.nn.Parameter) and filled.weight.requires_grad
    torch.manual_seed(3)
    default = torchcnn.Conv2d(2, 3, 3, init=None)
    torch.manual_seed(3)
    assert torch.equal(default.weight, torch.nn.Conv2d(2, 3, 3).weight)
    he.weight.data.zero_()
    he.reset_parameters()
    assert he.weight.abs().sum() > 0


def test_activation():
    layer = torchcnn.Conv2d(2, 3, 3, activation="relu")
    plain = torchcnn.Conv2d(2, 3, 3)
    plain.load_state_dict(layer.state_dict(), strict=True)
    input = torch.randn(2, 2, 6, 6)
    assert torch.equal(layer(input), plain(input).relu())
    assert repr(layer) == repr(plain)[:-1] + ", activation=relu)"
    with pytest.raises(ValueError, match="activation must be 'relu' or None, got 'tanh'"):
        torchcnn.Conv2d(2, 3, 3, activation="tanh")


def test_return_indices_and_unpooling():
    input = small_integers((2, 3, 6, 8))
    for name in ("MaxPool2d", "AdaptiveMaxPool2d"):
        output, indices = getattr(torchcnn, name)(2, return_indices=True)(input)
        expected, expected_indices = getattr(torch.nn, name)(2, return_indices=True)(input)
        assert torch.equal(output, expected) and torch.equal(indices, expected_indices)
    output, indices = torch.nn.MaxPool2d(2, return_indices=True)(input)
    assert isinstance(torchcnn.MaxUnpool2d(2), torch.nn.MaxUnpool2d)
    assert repr(torchcnn.MaxUnpool2d(2)) == repr(torch.nn.MaxUnpool2d(2))
    for output_size in (None, (7, 8)):
        expected = torch.nn.MaxUnpool2d(2)(output, indices, output_size)
        assert torch.equal(torchcnn.MaxUnpool2d(2)(output, indices, output_size), expected)


def test_modules_that_torch_does_not_have():
    input = small_integers((2, 3, 6, 8))
    assert torch.equal(torchcnn.MinPool2d(3, 2, 1)(input), -torch.nn.MaxPool2d(3, 2, 1)(-input))
    output, indices = torchcnn.MinPool2d(2, return_indices=True)(input)
    expected, expected_indices = torch.nn.MaxPool2d(2, return_indices=True)(-input)
    assert torch.equal(output, -expected) and torch.equal(indices, expected_indices)
    assert repr(torchcnn.MinPool2d(2)) == repr(torch.nn.MaxPool2d(2)).replace("Max", "Min")
    assert_exact(torchcnn.GlobalAvgPool2d()(input), input.mean((2, 3), keepdim=True))
    assert_exact(torchcnn.GlobalMaxPool2d()(input), input.amax((2, 3), keepdim=True))
    assert repr(torchcnn.GlobalAvgPool2d()) == "GlobalAvgPool2d()"
    assert torchcnn.GlobalMaxPool2d()(input[0]).shape == (3, 1, 1)


def test_training_step_matches_torch():
    """Three steps of SGD in float64: the whole chain of modules, losses and weights."""

    def train(nn):
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1),
            torch.nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(4, 8, 3),
            nn.AvgPool2d(2),
            torch.nn.Flatten(),
        ).double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        input, target = torch.randn(4, 1, 12, 12, dtype=torch.float64), torch.randint(0, 32, (4,))
        losses = []
        for _ in range(3):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(input), target)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return torch.stack(losses), *model.parameters()

    for ours, of_torch in zip(train(torchcnn), train(torch.nn), strict=True):
        torch.testing.assert_close(ours.detach(), of_torch.detach(), rtol=1e-11, atol=1e-12)
