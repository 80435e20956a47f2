"""torchcnn.summary and show_config; operations counted as torch counts them."""

import platform

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import torchcnn


def network():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Sequential(nn.Conv2d(8, 8, 3, stride=2, groups=2, bias=False), nn.BatchNorm2d(8)),
        nn.ConvTranspose2d(8, 4, 3, 2, output_padding=1, groups=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 5),
    )


def test_lines(capsys):
    model = torchcnn.convert(network())
    rows = torchcnn.summary(model, (2, 3, 16, 20))
    assert [row.name for row in rows] == ["0", "1", "2", "3.0", "3.1", "4", "5", "6", "7"]
    assert [row.type for row in rows[:3]] == ["Conv2d", "ReLU", "MaxPool2d"]
    assert rows[0].output_size == (2, 8, 16, 20) and rows[-1].output_size == (2, 5)
    assert rows[0].parameters == 8 * (3 * 9 + 1) and rows[4].parameters == 16
    assert rows[0].multiply_adds == 2 * 8 * 16 * 20 * 3 * 9
    assert rows[3].multiply_adds == 2 * 8 * 3 * 4 * 4 * 9
    assert rows[5].multiply_adds == 2 * 8 * 3 * 4 * 2 * 9  # every input pixel times its filters
    assert rows[-1].multiply_adds == 2 * 4 * 5
    assert sum(row.parameters for row in rows) == sum(p.numel() for p in model.parameters())
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split() == ["layer", "output", "parameters", "multiply-adds", "algorithm"]
    assert len(printed) == len(rows) + 2 and printed[1].startswith("0 Conv2d") and "2 x 8 x 16 x 20" in printed[1]
    assert printed[-1].split() == [
        "sum",
        f"{sum(row.parameters for row in rows):,}",
        f"{sum(row.multiply_adds for row in rows):,}",
    ]


@pytest.mark.parametrize("channels_last", [False, True])
def test_algorithms(channels_last):
    """What explain says of the layer."""
    layer = torchcnn.Conv2d(16, 32, 3, padding=1)
    up = torchcnn.ConvTranspose2d(32, 16, 4, 2, 1)
    model = nn.Sequential(layer, up, nn.Conv2d(16, 4, 1), nn.MaxPool2d(2))
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    with torchcnn.backends.flags(allow_winograd=True):
        rows = torchcnn.summary(model, [1, 16, 32, 32])
        forward = torchcnn.explain((1, 16, 32, 32), layer.weight.shape, 1, 1, channels_last=channels_last).splitlines()[0]
        options = {"stride": 2, "padding": 1, "channels_last": channels_last}
        grad_input = torchcnn.explain((1, 16, 64, 64), up.weight.shape, **options).splitlines()[1]
    assert forward.split()[1] == rows[0].algorithm and grad_input.split()[1] == rows[1].algorithm
    assert [row.algorithm for row in rows[2:]] == ["torch", ""]


def test_counts_are_those_of_torch():
    """The same number of operations for the converted model; backward only without groups, which torch forgets there."""
    input = torch.randn(2, 3, 16, 20, requires_grad=True)
    dense = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.AvgPool2d(2), nn.ConvTranspose2d(8, 4, 3, 2), nn.Flatten(), nn.LazyLinear(2))
    dense(input)
    for model, backward in ((network(), False), (dense, True)):
        counts = []
        for variant in (model, torchcnn.convert(model)):
            with FlopCounterMode(display=False) as flops:
                output = variant(input)
                if backward:
                    output.sum().backward()
            counts.append(flops.get_total_flops())
        assert counts[0] == counts[1] > 0


def test_shared_layers_flags_and_buffers():
    conv = torchcnn.Conv2d(4, 4, 3, padding=1)
    model = nn.Sequential(conv, nn.BatchNorm2d(4), conv, nn.Dropout(0.5)).train()
    model[3].eval()
    mean = model[1].running_mean.clone()
    rows = torchcnn.summary(model, (1, 4, 8, 8))
    assert [row.parameters for row in rows] == [4 * 37, 8, 0, 0] and rows[0].multiply_adds == rows[2].multiply_adds > 0
    assert [module.training for module in model.modules()] == [True, True, True, False]
    assert torch.equal(model[1].running_mean, mean) and all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_several_inputs_and_outputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.pool = torchcnn.Conv2d(2, 2, 1), torchcnn.MaxPool2d(2, return_indices=True)

        def forward(self, a, b):
            return {"pooled": self.pool(self.conv(a)), "product": a.flatten(1) @ b}

    rows = torchcnn.summary(Two().double(), [(1, 2, 4, 4), (32, 3)])
    assert [row.output_size for row in rows] == [(1, 2, 4, 4), (1, 2, 2, 2)]
    assert rows[0].multiply_adds == 2 * 2 * 16


def test_what_runs_between_layers_is_in_the_sum(capsys):
    class Functional(nn.Module):
        def forward(self, x):
            return torchcnn.functional.conv2d(x, torch.ones(5, 3, 2, 2))

    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Functional()

        def forward(self, x):
            return torchcnn.functional.conv2d(self.inner(x), torch.ones(1, 5, 1, 1))

    (row,) = torchcnn.summary(Around(), (1, 3, 5, 5))
    assert row.multiply_adds == 5 * 16 * 12
    assert capsys.readouterr().out.splitlines()[-1].split() == ["sum", "0", f"{5 * 16 * 12 + 16 * 5:,}"]


@pytest.mark.parametrize("arguments", [(None, (1, 3, 8, 8)), (nn.ReLU(), 3), (nn.ReLU(), (1.5,)), (nn.ReLU(), ())], ids=str)
def test_bad_arguments(arguments):
    with pytest.raises(TypeError, match=r"^summary: .* must be .*, got "):
        torchcnn.summary(*arguments)


def test_flags_return_after_an_error():
    model = nn.Sequential(torchcnn.Conv2d(3, 4, 3)).train()
    with pytest.raises(RuntimeError, match=r"^conv2d: "):
        torchcnn.summary(model, (1, 5, 8, 8))
    assert model.training and not model[0]._forward_hooks


def test_show_config():
    text = torchcnn.show_config()
    for fact in (torchcnn.__version__, torch.__version__, platform.python_version(), torchcnn.isa(), *torchcnn.isas()):
        assert fact in text
    assert f"threads: {torch.get_num_threads()}" in text
    for allow in (True, False):
        with torchcnn.backends.flags(allow_winograd=allow):
            assert f"allow_winograd: {allow}" in torchcnn.show_config()


def test_a_parametrized_layer_is_one_line(capsys):
    layer = torch.nn.utils.parametrizations.weight_norm(torchcnn.Conv2d(3, 4, 3))
    rows = torchcnn.summary(torch.nn.Sequential(layer, torchcnn.MaxPool2d(2)), (1, 3, 8, 8))
    assert [row.type for row in rows] == ["Conv2d", "MaxPool2d"]
    assert (rows[0].parameters, rows[0].multiply_adds) == (4 * 27 + 4 + 4, 6 * 6 * 4 * 27)
