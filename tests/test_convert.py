"""torchcnn.convert: which layers change, and that nothing but their class does."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import torchcnn

LAYERS = {
    "Conv2d": lambda nn: nn.Conv2d(4, 4, 3, padding="same", padding_mode="circular"),
    "ConvTranspose2d": lambda nn: nn.ConvTranspose2d(4, 4, 3, 2, output_padding=1),
    "MaxPool2d": lambda nn: nn.MaxPool2d(3, 2, 1, ceil_mode=True, return_indices=True),
    "AvgPool2d": lambda nn: nn.AvgPool2d(3, 2, 1, count_include_pad=False, divisor_override=2),
    "AdaptiveAvgPool2d": lambda nn: nn.AdaptiveAvgPool2d((None, 3)),
    "AdaptiveMaxPool2d": lambda nn: nn.AdaptiveMaxPool2d(2, return_indices=True),
    "MaxUnpool2d": lambda nn: nn.MaxUnpool2d(2),
}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2))
        self.blocks = nn.ModuleList([nn.Conv2d(4, 4, 3, padding=1, groups=2), nn.AvgPool2d(2)])
        self.up = nn.ConvTranspose2d(4, 4, 2, 2)
        self.heads = nn.ModuleDict({"mean": nn.AdaptiveAvgPool2d(1), "max": nn.AdaptiveMaxPool2d(1)})
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        x = self.up(x)
        return self.fc(torch.cat([head(x).flatten(1) for head in self.heads.values()], 1))


def types(model):
    return [type(module) for module in model.modules()]


def of_torchcnn(model):
    return [name for name, module in model.named_modules() if type(module).__module__.startswith("torchcnn")]


def assert_same_step(model, other, input=None):
    """The same output and the same gradients by name."""
    input = torch.randn(2, 3, 16, 16) if input is None else input
    results = []
    for module in (model, other):
        output = module(input)
        gradients = torch.autograd.grad(output.square().sum(), list(module.parameters()))
        results.append({"": output, **dict(zip(dict(module.named_parameters()), gradients, strict=True))})
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_there_and_back(name):
    layer = LAYERS[name](nn)
    ours = torchcnn.convert(layer)
    assert type(ours) is getattr(torchcnn, name) and type(layer) is getattr(nn, name)
    assert repr(ours) == repr(layer) and vars(ours).keys() == vars(layer).keys()
    back = torchcnn.convert(ours, inverse=True)
    assert type(back) is type(layer) and vars(back).keys() == vars(layer).keys()
    if name != "MaxUnpool2d":
        input = torch.randn(2, 4, 7, 8)
        expected = layer(input)
        for module in (ours, back):
            torch.testing.assert_close(module(input), expected, rtol=1e-5, atol=1e-5)


def test_a_model():
    model = Net()
    before = types(model)
    ours = torchcnn.convert(model)
    assert types(model) == before and not of_torchcnn(model)
    assert of_torchcnn(ours) == ["stem.0", "stem.3", "blocks.0", "blocks.1", "up", "heads.mean", "heads.max"]
    assert_same_step(ours, model)
    back = torchcnn.convert(ours, inverse=True)
    assert types(back) == before and of_torchcnn(ours)
    assert_same_step(back, model)


def test_a_copy_shares_nothing():
    model = Net()
    ours = torchcnn.convert(model)
    pointers = {parameter.data_ptr() for parameter in model.parameters()}
    assert not pointers & {parameter.data_ptr() for parameter in ours.parameters()}
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), model.parameters(), strict=True))


def test_in_place_keeps_every_object():
    """An optimizer made before goes on training the model."""
    model = Net()
    parameters, modules = list(model.parameters()), list(model.modules())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    result = torchcnn.convert(model, inplace=True)
    assert result is model and of_torchcnn(model)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    weight = model.stem[0].weight.detach().clone()
    model(torch.randn(2, 3, 16, 16)).sum().backward()
    optimizer.step()
    assert not torch.equal(weight, model.stem[0].weight)
    assert torchcnn.convert(model, inplace=True, inverse=True) is model and not of_torchcnn(model)


def test_converting_twice_changes_nothing_more():
    ours = torchcnn.convert(Net())
    assert types(torchcnn.convert(ours)) == types(ours)
    assert types(torchcnn.convert(Net(), inverse=True)) == types(Net())


def test_subclasses_of_others_stay():
    class Mine(nn.Conv2d):
        pass

    class Ours(torchcnn.Conv2d):
        pass

    model = nn.Sequential(Mine(3, 4, 3), nn.LazyConv2d(4, 3), nn.Conv1d(3, 4, 3), nn.MaxPool3d(2), nn.Conv2d(3, 4, 3))
    assert types(torchcnn.convert(model))[1:] == [Mine, nn.LazyConv2d, nn.Conv1d, nn.MaxPool3d, torchcnn.Conv2d]
    assert types(torchcnn.convert(nn.Sequential(Ours(3, 4, 3)), inverse=True))[1:] == [Ours]
    lazy = nn.Sequential(nn.LazyConv2d(4, 3))
    lazy(torch.randn(1, 3, 8, 8))  # now it is a Conv2d
    assert types(torchcnn.convert(lazy))[1:] == [torchcnn.Conv2d]


def test_state_dicts_are_exchanged():
    model = Net()
    ours = torchcnn.convert(model)
    assert list(ours.state_dict()) == list(model.state_dict())
    for source, target in ((model, ours), (ours, model)):
        for parameter in source.parameters():
            parameter.data.normal_()
        target.load_state_dict(source.state_dict(), strict=True)
        assert all(torch.equal(a, b) for a, b in zip(source.parameters(), target.parameters(), strict=True))


@pytest.mark.parametrize("inplace", [False, True])
def test_hooks_stay(inplace):
    model, calls = Net(), []
    conv = model.stem[0]
    conv.register_forward_pre_hook(lambda module, args: calls.append(("pre", type(module))))
    conv.register_forward_hook(lambda module, args, output: calls.append(("post", type(module))))
    conv.register_full_backward_hook(lambda module, grad_input, grad_output: calls.append(("back", type(module))))
    conv.register_state_dict_post_hook(lambda module, *_: calls.append(("state", type(module))))
    conv.weight.register_hook(lambda gradient: calls.append(("weight", None)))
    ours = torchcnn.convert(model, inplace)
    ours(torch.randn(1, 3, 16, 16)).sum().backward()
    ours.state_dict()
    expected = [(name, torchcnn.Conv2d) for name in ("pre", "post", "back", "state")]
    assert [call for call in calls if call[1]] == expected
    assert (("weight", None) in calls) is inplace  # a tensor's hook is not copied with it


def test_shared_layers_stay_shared():
    conv = nn.Conv2d(4, 4, 3, padding=1)
    model = nn.Sequential(conv, nn.ReLU(), conv, nn.Sequential(conv))
    model.tied = nn.Conv2d(4, 4, 3, padding=1)
    model.tied.weight = conv.weight
    for inplace in (False, True):
        ours = torchcnn.convert(model, inplace)
        assert ours[0] is ours[2] is ours[3][0] and type(ours[0]) is torchcnn.Conv2d
        assert ours.tied.weight is ours[0].weight


def test_flags_stay():
    model = Net().eval()
    model.blocks.train()
    model.up.weight.requires_grad_(False)
    model.half()
    model.stem.to(memory_format=torch.channels_last)
    ours = torchcnn.convert(model)
    for a, b in zip(model.modules(), ours.modules(), strict=True):
        assert a.training == b.training
    for a, b in zip(model.parameters(), ours.parameters(), strict=True):
        assert (a.dtype, a.requires_grad, a.stride()) == (b.dtype, b.requires_grad, b.stride())


class Symmetric(nn.Module):
    def forward(self, weight):
        return weight + weight.flip(-1)

    def right_inverse(self, weight):
        return weight / 2


@pytest.mark.parametrize("inplace", [False, True])
def test_parametrizations_stay(inplace):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 3, 3))
    parametrize.register_parametrization(model[0], "weight", Symmetric())
    parametrizations.weight_norm(model[1])
    input = torch.randn(1, 3, 8, 8)
    expected, names = model(input), list(model.state_dict())
    original = copy.deepcopy(model)
    ours = torchcnn.convert(model, inplace)
    if not inplace:  # the class that holds the property of the copy is its own
        assert [parametrize.type_before_parametrizations(layer) for layer in model] == [nn.Conv2d, nn.ConvTranspose2d]
    assert isinstance(ours[0], torchcnn.Conv2d) and isinstance(ours[1], torchcnn.ConvTranspose2d)
    assert all(parametrize.is_parametrized(layer, "weight") for layer in ours)
    assert list(ours.state_dict()) == names
    torch.testing.assert_close(ours(input), expected)
    assert_same_step(copy.deepcopy(ours), original, input)
    ours[0].parametrizations.weight.original.data.zero_()
    assert not ours[0].weight.any(), "the weight is still computed"
    back = torchcnn.convert(ours, inverse=True)
    assert [parametrize.type_before_parametrizations(layer) for layer in back] == [nn.Conv2d, nn.ConvTranspose2d]
    parametrize.register_parametrization(ours[0], "bias", nn.Identity())
    for layer, name in ((ours[0], "weight"), (ours[0], "bias"), (ours[1], "weight")):
        parametrize.remove_parametrizations(layer, name)
    assert types(ours)[1:] == [torchcnn.Conv2d, torchcnn.ConvTranspose2d]


def test_old_style_norms_and_pruning_stay():
    """They compute the weight in a forward pre-hook and keep attributes beside it."""
    model = nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.Conv2d(6, 4, 3))
    nn.utils.spectral_norm(model[0])
    prune.l1_unstructured(model[1], "weight", amount=0.5)
    model.eval()
    input = torch.randn(1, 3, 8, 8)
    expected = model(input)
    ours = torchcnn.convert(model, inplace=True)
    assert of_torchcnn(ours) == ["0", "1"]
    torch.testing.assert_close(ours(input), expected)
    prune.remove(ours[1], "weight")
    torch.testing.assert_close(ours(input), expected)


def test_layers_that_torch_lacks():
    model = nn.Sequential(torchcnn.Conv2d(3, 4, 3, init="kaiming"), torchcnn.GlobalAvgPool2d())
    model.max = torchcnn.GlobalMaxPool2d()
    back = torchcnn.convert(model, inverse=True)
    assert repr(back[1:]).count("AdaptiveAvgPool2d(output_size=1)") == 1 and repr(back[2]) == "AdaptiveMaxPool2d(output_size=1)"
    assert "init" not in vars(back[0]) and repr(back[0]) == repr(nn.Conv2d(3, 4, 3))
    input = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(back(input), model(input))
    for layer, says in (
        (torchcnn.MinPool2d(2), "MinPool2d, got one at '1'"),
        (torchcnn.Conv2d(4, 4, 1, activation="relu"), "Conv2d with activation='relu', got one at '1'"),
    ):
        model = nn.Sequential(torchcnn.Conv2d(3, 4, 3), layer)
        with pytest.raises(ValueError, match=f"^convert: .*{says}"):
            torchcnn.convert(model, inplace=True, inverse=True)
        assert type(model[0]) is torchcnn.Conv2d, "nothing has changed"
    with pytest.raises(ValueError, match="at the root"):
        torchcnn.convert(torchcnn.MinPool2d(2), inverse=True)


@pytest.mark.parametrize("model", [None, nn.Conv2d, [nn.Conv2d(1, 1, 1)], torch.ones(1)], ids=["None", "class", "list", "tensor"])
def test_no_module(model):
    with pytest.raises(TypeError, match=r"^convert: model must be a torch\.nn\.Module, got "):
        torchcnn.convert(model)


def test_compiled_after_conversion():
    model = Net().eval()
    torch._dynamo.reset()
    compiled = torch.compile(torchcnn.convert(model), backend="aot_eager", fullgraph=True)
    assert_same_step(compiled._orig_mod, model)
    input = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(compiled(input), model(input), rtol=1e-4, atol=1e-5)


def test_a_users_attributes_keep_their_names_and_mean_nothing():
    """torch.nn.Conv2d has no activation and no init: what a user calls so is the user's."""
    for activation, init in (("relu", True), (torch.nn.GELU(), "xavier"), ("swish", None)):
        layer = torch.nn.Conv2d(2, 3, 3)
        layer.activation, layer.init = activation, init
        input = torch.randn(1, 2, 5, 5)
        converted = torchcnn.convert(layer, inplace=True)
        assert type(converted) is torchcnn.Conv2d
        torch.testing.assert_close(converted(input), torch.nn.functional.conv2d(input, layer.weight, layer.bias))
        assert (converted.activation, converted.init) == (activation, init)
        converted.reset_parameters()
        assert "activation=" not in repr(converted).splitlines()[0]
        back = torchcnn.convert(converted, inverse=True, inplace=True)
        assert type(back) is torch.nn.Conv2d
        assert (back.activation, back.init) == (activation, init)
