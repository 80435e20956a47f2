"""The table of instruction sets: what there is, what is chosen, and that every row computes the same integers."""

import os
import re
import subprocess
import sys

import pytest
import torch

import torchcnn

# Runs in a fresh interpreter, for the row is chosen at import. Every algorithm and direction, exact integers, one digest.
DIGEST = """
import hashlib, torch, torchcnn
from torchcnn import functional as f
torch.manual_seed(0)
integers = lambda *shape: torch.randint(-3, 4, shape).float()
digest = hashlib.sha256()
def note(operator, *inputs):
    inputs = [tensor.requires_grad_() for tensor in inputs]
    output = operator(*inputs)
    gradients = torch.autograd.grad(output, inputs, torch.ones_like(output))
    for tensor in (output, *gradients):
        digest.update((tensor.detach() + 0.0).numpy().tobytes())  # + 0.0: -0 becomes 0
for size, weight, options in (
    ((2, 9, 13, 14), (17, 9, 3, 3), dict(padding=1)),
    ((2, 9, 13, 14), (17, 9, 3, 2), dict(stride=(2, 3), dilation=(1, 2))),
    ((1, 261, 5, 7), (8, 261, 1, 1), dict()),
    ((2, 12, 13, 14), (12, 1, 3, 3), dict(groups=12, padding=1)),
    ((2, 12, 9, 9), (18, 4, 3, 3), dict(groups=3)),
    ((2, 48, 9, 14), (48, 8, 3, 3), dict(groups=6, padding=1)),
):
    for layout in (torch.contiguous_format, torch.channels_last):
        input = integers(*size).contiguous(memory_format=layout)
        note(lambda x, w, b: f.conv2d(x, w, b, **options), input, integers(*weight), integers(weight[0]))
for pool in (
    lambda x: f.max_pool2d(x, 3, 2, 1), lambda x: f.min_pool2d(x, 3, 1, 1, 2), lambda x: f.avg_pool2d(x, 2),
    lambda x: f.max_pool2d(x, 3, 1, 1),
    lambda x: f.avg_pool2d(x, 3, 1, 1, divisor_override=4), lambda x: f.adaptive_max_pool2d(x, (5, 4)),
    lambda x: f.max_pool2d(x, 2, 1, return_indices=True)[1].float() * x[:, :, 1:, 1:],
):
    note(pool, integers(2, 19, 12, 21))
    note(pool, integers(1, 3, 40, 150))
print(torchcnn.isa(), digest.hexdigest())
"""


def run(program, isa=None):
    environment = {name: value for name, value in os.environ.items() if name != "TORCHCNN_ISA"}
    if isa is not None:
        environment["TORCHCNN_ISA"] = isa
    return subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)


def test_isas():
    names = torchcnn.isas()
    assert names[:2] == ["reference", "scalar"], "from the plainest to the best"
    assert set(names) <= {"reference", "scalar", "avx2", "avx512", "neon"}
    assert torchcnn.isa() == (os.environ.get("TORCHCNN_ISA") or names[-1])
    assert torchcnn.backends.isa() == torchcnn.numpy.isa() == torchcnn.isa()


def test_every_row_can_be_forced_and_computes_the_same():
    results = {}
    for isa in torchcnn.isas():
        result = run(DIGEST, isa)
        assert result.returncode == 0, result.stderr
        name, results[isa] = result.stdout.split()
        assert name == isa
    assert len(set(results.values())) == 1, results


def test_the_best_row_is_the_default():
    for isa in (None, ""):
        result = run("import torchcnn; print(torchcnn.isa())", isa)
        assert result.stdout.strip() == torchcnn.isas()[-1], result.stderr


def test_an_unknown_row_is_refused_by_name():
    result = run("import torchcnn", "sse9")
    assert result.returncode != 0
    last_line = result.stderr.strip().splitlines()[-1]
    assert "TORCHCNN_ISA" in last_line and "sse9" in last_line and all(isa in last_line for isa in torchcnn.isas())


@pytest.mark.parametrize(
    "arguments",
    [
        ((1, 3, 32, 32), (8, 3, 3, 3)),
        ((1, 8, 32, 32), (8, 1, 3, 3), 2, 1, 1, 8),
        ((2, 16, 9, 9), (4, 16, 1, 1), 1, 0, 1, 1, True),
    ],
)
def test_explain(arguments):
    """A line a direction: the algorithm, the row, and why."""
    lines = torchcnn.explain(*arguments).splitlines()
    assert [line.split()[0] for line in lines] == ["forward", "grad_input", "grad_weight"]
    for line in lines:
        assert re.fullmatch(rf"\w+ +\w+ \({torchcnn.isa()}\): .{{10,}}", line)


def test_explain_refuses_what_the_operator_refuses():
    with pytest.raises(ValueError, match=r"explain: .*channels.*\b3\b.*\b4\b"):
        torchcnn.explain((1, 3, 32, 32), (8, 4, 3, 3))
    with pytest.raises(ValueError, match="input_size must have 4 elements, got 3"):
        torchcnn.explain((3, 32, 32), (8, 3, 3, 3))
    with pytest.raises(TypeError, match=r"weight_size must be 4 ints, got a tensor; its size is \(8, 3, 3, 3\)"):
        torchcnn.explain((1, 3, 32, 32), torch.empty(8, 3, 3, 3))
