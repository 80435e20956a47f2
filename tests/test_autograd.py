"""Derivatives: finite differences of first and second order, gradients that nobody needs, torch.func, autocast, torch.compile."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

import torchcnn
from torchcnn.functional import conv2d

CONV2D = {
    "plain": ((1, 2, 4, 5), (3, 2, 3, 2), True, {}),
    "no_bias": ((1, 2, 4, 4), (2, 2, 3, 3), False, {"padding": 1}),
    "pointwise": ((2, 3, 2, 3), (2, 3, 1, 1), True, {}),
    "strided": ((1, 2, 5, 6), (2, 2, 2, 3), True, {"stride": (2, 3), "padding": (1, 2)}),
    "dilated": ((1, 2, 5, 6), (2, 2, 2, 2), True, {"dilation": (2, 3), "padding": 1}),
    "grouped": ((1, 4, 4, 4), (6, 2, 2, 3), True, {"groups": 2, "padding": (0, 1)}),
    "depthwise": ((2, 3, 4, 4), (3, 1, 3, 3), True, {"groups": 3, "padding": 1}),
    "all": ((2, 4, 5, 5), (2, 2, 2, 2), True, {"stride": (1, 2), "padding": (2, 1), "dilation": (2, 1), "groups": 2}),
    "relu": ((1, 2, 4, 4), (2, 2, 3, 3), True, {"padding": 1, "activation": "relu"}),
    "same_even": ((1, 2, 4, 3), (2, 2, 2, 4), True, {"padding": "same"}),
    "unbatched": ((2, 4, 5), (3, 2, 3, 2), True, {}),
}

POOLS = {
    "max": lambda f: lambda x: f.max_pool2d(x, 2, 1),
    "max_all": lambda f: lambda x: f.max_pool2d(x, (3, 2), (2, 1), 1, (1, 2), True),
    "max_return_indices": lambda f: lambda x: f.max_pool2d(x, 3, 2, 1, return_indices=True)[0],
    "min": lambda f: lambda x: f.min_pool2d(x, (2, 3), (1, 2), (1, 0), ceil_mode=True),
    "avg": lambda f: lambda x: f.avg_pool2d(x, 2, 1),
    "avg_all": lambda f: lambda x: f.avg_pool2d(x, (3, 2), 2, (1, 0), True, False),
    "avg_divisor": lambda f: lambda x: f.avg_pool2d(x, 3, 1, 1, divisor_override=-2),
    "adaptive_avg": lambda f: lambda x: f.adaptive_avg_pool2d(x, (3, 2)),
    "adaptive_max": lambda f: lambda x: f.adaptive_max_pool2d(x, (2, 3)),
    "global_avg": lambda f: lambda x: f.global_avg_pool2d(x),
    "global_max": lambda f: lambda x: f.global_max_pool2d(x),
    "unpool": lambda f: lambda x: f.max_unpool2d(x, torch.arange(40, device=x.device).view(1, 2, 4, 5) % 20 * 4, 2),
}


def conv2d_inputs(device, name, requires_grad=True):
    input_size, weight_size, bias, options = CONV2D[name]
    shapes = (input_size, weight_size, weight_size[:1])[: 2 + bias]
    inputs = tuple(torch.randn(shape, dtype=torch.float64, device=device, requires_grad=requires_grad) for shape in shapes)
    return inputs, options


def distinct(device, *shape, requires_grad=True):
    """Values far enough apart that a finite difference never changes which of them is the largest."""
    count = torch.Size(shape).numel()
    return (torch.randperm(count, device=device).double() / 8 - count / 16).view(shape).requires_grad_(requires_grad)


# Finite differences, with forward mode and batched gradients

CHECKS = {"check_forward_ad": True, "check_batched_grad": True, "check_batched_forward_grad": True}


@pytest.mark.parametrize("name", CONV2D)
def test_gradcheck_conv2d(name, device):
    inputs, options = conv2d_inputs(device, name)
    assert gradcheck(lambda *inputs: conv2d(*inputs, **options), inputs, **CHECKS)


@pytest.mark.parametrize("name", CONV2D)
def test_gradgradcheck_conv2d(name, device):
    inputs, options = conv2d_inputs(device, name)
    assert gradgradcheck(lambda *inputs: conv2d(*inputs, **options), inputs, check_batched_grad=True)


def test_third_derivative_of_conv2d(device):
    """Of a cube: the three operators are closed under differentiation, so there is no last order."""

    def third(conv2d):
        torch.manual_seed(0)
        inputs, options = conv2d_inputs(device, "all")
        result = conv2d(*inputs, **options)
        for _ in range(3):
            scalar = result.pow(3).sum() if torch.is_tensor(result) else sum(part.pow(3).sum() for part in result)
            result = torch.autograd.grad(scalar, inputs, create_graph=True)
        return result

    for ours, of_torch in zip(third(conv2d), third(F.conv2d), strict=True):
        torch.testing.assert_close(ours, of_torch, rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", POOLS)
def test_gradcheck_pools(name, device):
    assert gradcheck(POOLS[name](torchcnn.functional), (distinct(device, 1, 2, 4, 5),), **CHECKS)


@pytest.mark.parametrize("name", POOLS)
def test_gradgradcheck_pools(name, device):
    assert gradgradcheck(POOLS[name](torchcnn.functional), (distinct(device, 1, 2, 4, 5),), check_batched_grad=True)


@pytest.mark.parametrize("name", ["max", "avg", "adaptive_avg", "min"])
def test_gradcheck_of_unbatched_pools(name, device):
    assert gradcheck(POOLS[name](torchcnn.functional), (distinct(device, 2, 4, 5),))


def test_gradcheck_of_functions(device):
    pairs = ((2, 1), (1, 1), (1, 2))
    inputs, _ = conv2d_inputs(device, "grouped")

    def function(*inputs):
        return torchcnn.Conv2dFunction.apply(*inputs, *pairs, 2)

    assert torch.equal(function(*inputs), conv2d(*inputs, *pairs, 2))
    assert gradcheck(function, inputs) and gradgradcheck(function, inputs)
    without_bias = torchcnn.Conv2dFunction.apply(*inputs[:2], None, *pairs, 2)
    assert torch.equal(without_bias, conv2d(*inputs[:2], None, *pairs, 2))

    plane = distinct(device, 1, 2, 4, 5)

    def max_pool(x):
        return torchcnn.MaxPool2dFunction.apply(x, (2, 2), (2, 1), (1, 1), (1, 1), True)

    output, indices = max_pool(plane)
    expected = F.max_pool2d(plane, 2, (2, 1), 1, 1, True, return_indices=True)
    assert torch.equal(output, expected[0]) and torch.equal(indices, expected[1])
    assert not indices.requires_grad
    assert gradcheck(lambda x: max_pool(x)[0], (plane,)) and gradgradcheck(lambda x: max_pool(x)[0], (plane,))

    def avg_pool(x):
        return torchcnn.AvgPool2dFunction.apply(x, (2, 2), (2, 1), (1, 1), True, False, None)

    torch.testing.assert_close(avg_pool(plane), F.avg_pool2d(plane, 2, (2, 1), 1, True, False))
    assert gradcheck(avg_pool, (plane,)) and gradgradcheck(avg_pool, (plane,))
    for function in (torchcnn.Conv2dFunction, torchcnn.MaxPool2dFunction, torchcnn.AvgPool2dFunction):
        assert issubclass(function, torch.autograd.Function)


# What is computed, and when


class Calls(TorchDispatchMode):
    """Notes the torchcnn operators that are reached."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "torchcnn":
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


def operators_of(gradients):
    """Of input, weight, bias: 0, 1, 2. Weight and bias have one operator together."""
    names = [("conv2d_grad_input", "conv2d_grad_weight", "conv2d_grad_bias")[i] for i in gradients]
    return [*names[:-2], "conv2d_grad_weight_bias"] if names[-2:] == ["conv2d_grad_weight", "conv2d_grad_bias"] else names


@pytest.mark.parametrize("needs", [(a, b, c) for a in (0, 1) for b in (0, 1) for c in (0, 1) if a + b + c], ids=str)
def test_gradients_nobody_needs_are_not_computed(needs, device):
    inputs = [
        torch.randn(shape, device=device, requires_grad=bool(need))
        for shape, need in zip(((1, 2, 4, 4), (3, 2, 3, 3), (3,)), needs, strict=True)
    ]
    with Calls() as calls:
        conv2d(*inputs).sum().backward()
    assert calls.names == ["conv2d", *operators_of(i for i in range(3) if needs[i])]
    assert [tensor.grad is not None for tensor in inputs] == [bool(need) for need in needs]


@pytest.mark.parametrize("leaves", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
def test_gradients_not_asked_for_are_not_computed(leaves, with_bias, device):
    """All inputs require gradients, a pass asks for some of them. (Leaves that autograd.grad asks for bring the others along.)"""
    inputs = [torch.randn(shape, device=device, requires_grad=True) for shape in ((1, 2, 4, 4), (3, 2, 3, 3), (3,))]
    used = [2 * inputs[0], *(inputs[1:] if leaves else [2 * tensor for tensor in inputs[1:]])]
    output = conv2d(used[0], used[1], used[2] if with_bias else None).sum()
    full = torch.autograd.grad(output, used[: 2 + with_bias], retain_graph=True)
    for subset in ((0,), (1,), (2,), (0, 1), (0, 2), (1, 2)):
        if not with_bias and 2 in subset:
            continue
        asked = operators_of(subset)
        for of in (inputs, used):
            with Calls() as calls:
                gradients = torch.autograd.grad(output, [of[i] for i in subset], retain_graph=True)
            if leaves and subset != (0,):
                assert "conv2d_grad_input" in calls.names or 0 not in subset
                assert any(asked[-1] in name for name in calls.names)
            else:
                assert asked == calls.names
            for i, gradient in zip(subset, gradients, strict=True):
                assert torch.equal(gradient, full[i] if of[i] is used[i] else 2 * full[i])
        with Calls() as calls:
            output.backward(inputs=[inputs[i] for i in subset], retain_graph=True)
        assert calls.names == asked
        assert [tensor.grad is not None for tensor in inputs] == [i in subset for i in range(3)]
        for tensor in inputs:
            tensor.grad = None


def test_gradients_of_images_alone(device):
    """What adversarial examples and pictures of features do: no layer computes a gradient of weights, but the first."""
    images = torch.randn(1, 2, 8, 8, device=device, requires_grad=True)
    model = torch.nn.Sequential(torchcnn.Conv2d(2, 3, 3), torchcnn.Conv2d(3, 4, 3), torchcnn.Conv2d(4, 2, 3)).to(device)
    loss = model(images).sum()
    with Calls() as calls:
        torch.autograd.grad(loss, images, retain_graph=True)
    assert calls.names == ["conv2d_grad_input"] * 3 + ["conv2d_grad_weight_bias"]
    loss = model(images.detach()).sum()
    with Calls() as calls:
        torch.autograd.grad(loss, list(model[1:].parameters()))
    assert sorted(calls.names) == ["conv2d_grad_input"] + ["conv2d_grad_weight_bias"] * 2


def test_an_engine_that_does_not_say_what_it_wants_gets_all(device, monkeypatch):
    """torch.distributed.autograd answers for every node that it will not run."""
    monkeypatch.setattr(torchcnn._autograd, "_will_execute", lambda node: False)
    inputs = [torch.randn(shape, device=device, requires_grad=True) for shape in ((1, 2, 4, 4), (3, 2, 3, 3), (3,))]
    conv2d(2 * inputs[0], *inputs[1:]).sum().backward()
    assert all(tensor.grad is not None for tensor in inputs)


def test_no_graph_without_gradients(device):
    input, weight = torch.randn(1, 2, 4, 4, device=device), torch.randn(3, 2, 3, 3, device=device, requires_grad=True)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            output = conv2d(input, weight)
            assert not output.requires_grad and output.grad_fn is None
            assert torchcnn.functional.max_pool2d(output, 2).grad_fn is None
    assert conv2d(input, weight).requires_grad
    assert not conv2d(input, weight.detach()).requires_grad
    indices = torchcnn.functional.max_pool2d(conv2d(input, weight), 2, return_indices=True)[1]
    assert not indices.requires_grad


def test_a_changed_input_is_noticed(device):
    """What was saved for backward must not be written to in between."""
    input, weight = torch.randn(1, 2, 4, 4, device=device), torch.randn(3, 2, 3, 3, device=device, requires_grad=True)
    output = conv2d(input, weight)
    input.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_gradients_accumulate_and_graphs_are_kept(device):
    input, weight = torch.ones(1, 1, 3, 3, device=device), torch.ones(1, 1, 2, 2, device=device, requires_grad=True)
    output = conv2d(input, weight).sum()
    output.backward(retain_graph=True)
    output.backward()
    assert (weight.grad == 8).all()
    with pytest.raises(RuntimeError, match="second time"):
        output.backward()


def test_the_same_tensor_twice(device):
    """Input and weight one tensor: both gradients add up."""
    x = torch.randn(3, 3, 3, 3, dtype=torch.float64, device=device, requires_grad=True)
    assert gradcheck(lambda x: conv2d(x, x, padding=1), (x,))


def test_hooks_and_checkpoint(device):
    from torch.utils.checkpoint import checkpoint

    inputs, options = conv2d_inputs(device, "all")
    expected = torch.autograd.grad(conv2d(*inputs, **options).sum(), inputs)
    recomputed = torch.autograd.grad(
        checkpoint(lambda *inputs: conv2d(*inputs, **options), *inputs, use_reentrant=False).sum(), inputs
    )
    assert all(torch.equal(a, b) for a, b in zip(expected, recomputed, strict=True))
    output = conv2d(*inputs, **options)
    output.register_hook(lambda gradient: 2 * gradient)
    doubled = torch.autograd.grad(output.sum(), inputs)
    assert all(torch.equal(2 * a, b) for a, b in zip(expected, doubled, strict=True))


# torch.func, forward mode


def assert_close(ours, of_torch):
    torch.testing.assert_close(ours, of_torch, rtol=1e-10, atol=1e-10)


def loss(conv2d, options):
    return lambda *inputs: conv2d(*inputs, **options).pow(2).sum()


@pytest.mark.parametrize("name", ["all", "no_bias"])
def test_func_grad_and_jvp(name, device):
    inputs, options = conv2d_inputs(device, name, requires_grad=False)
    tangents = tuple(torch.randn_like(tensor) for tensor in inputs)
    argnums = tuple(range(len(inputs)))
    results = []
    for function in (conv2d, F.conv2d):
        scalar = loss(function, options)
        results.append(
            (
                torch.func.grad(scalar, argnums)(*inputs),
                torch.func.jvp(lambda *x, f=function: f(*x, **options), inputs, tangents),
                torch.func.vjp(lambda *x, f=function: f(*x, **options), *inputs)[1](
                    torch.ones_like(function(*inputs, **options))
                ),
                torch.func.hessian(scalar, argnums=1)(*inputs),
            )
        )
    assert_close(*results)


@pytest.mark.parametrize("dims", [(0, None, None), (None, 1, None), (None, None, 0), (0, 0, 0), (1, 1, None)], ids=str)
def test_vmap(dims, device):
    inputs, options = conv2d_inputs(device, "all", requires_grad=False)
    batched = tuple(
        tensor if dim is None else torch.stack([tensor, -tensor, 2 * tensor], dim)
        for tensor, dim in zip(inputs, dims, strict=True)
    )
    results = []
    for function in (conv2d, F.conv2d):
        results.append(
            (
                torch.vmap(lambda *x, f=function: f(*x, **options), dims)(*batched),
                torch.vmap(torch.func.grad(loss(function, options), (0, 1, 2)), dims)(*batched),
            )
        )
    assert_close(*results)


@pytest.mark.parametrize("name", [name for name in POOLS if name not in ("min", "global_avg", "global_max")])
def test_func_of_pools(name, device):
    planes = distinct(device, 3, 1, 2, 4, 5, requires_grad=False)
    tangent = torch.randn(1, 2, 4, 5, dtype=torch.float64)
    results = []
    for functional in (torchcnn.functional, F):
        pool = POOLS[name](functional)

        def scalar(x, pool=pool):
            return pool(x).pow(2).sum()

        results.append(
            (
                torch.func.grad(scalar)(planes[0]),
                torch.vmap(pool)(planes),
                torch.vmap(torch.func.grad(scalar))(planes),
                torch.func.jvp(pool, (planes[0],), (tangent,)),
            )
        )
    assert_close(*results)


def test_forward_mode_is_never_silently_zero(device):
    inputs, options = conv2d_inputs(device, "all", requires_grad=False)
    tangents = [torch.randn_like(tensor) for tensor in inputs]
    for which in range(3):
        results = []
        for function in (conv2d, F.conv2d):
            with forward_ad.dual_level():
                duals = list(inputs)
                duals[which] = forward_ad.make_dual(inputs[which], tangents[which])
                results.append(forward_ad.unpack_dual(function(*duals, **options)).tangent)
        assert results[0] is not None
        assert_close(*results)


# Autocast, torch.compile, subclasses, operator registration


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype, device):
    """Dtypes under autocast are torch's: convolutions go down, pools stay where they are, gradients come back in float32."""
    input, weight, bias = (torch.randn(size, device=device) for size in ((1, 2, 6, 6), (3, 2, 3, 3), (3,)))
    results = []
    for functional in (torchcnn.functional, F):
        leaves = [tensor.clone().requires_grad_() for tensor in (input, weight, bias)]
        with torch.autocast(device, dtype=dtype):
            output = functional.conv2d(leaves[0], leaves[1].to(dtype), leaves[2])
            pooled = (
                functional.max_pool2d(output, 2),
                functional.avg_pool2d(leaves[0], 2),
                functional.adaptive_avg_pool2d(output, 1),
            )
        gradients = torch.autograd.grad(output.float().sum(), leaves)
        results.append((output, *pooled, *gradients))
    for ours, of_torch in zip(*results, strict=True):
        assert ours.dtype == of_torch.dtype
        torch.testing.assert_close(ours, of_torch, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)


def network(functional):
    def forward(input, weight, bias, point):
        hidden = functional.conv2d(input, weight, bias, stride=(1, 2), padding=1, dilation=(2, 1), groups=2)
        hidden = functional.max_pool2d(torch.tanh(hidden), 2, 1)
        hidden = functional.conv2d(hidden, point) + functional.avg_pool2d(hidden, 3, 1, 1).mean()
        return functional.adaptive_avg_pool2d(hidden, 2) + functional.adaptive_max_pool2d(hidden, 2)

    return forward


def network_inputs(device, batch=2, height=9):
    shapes = (batch, 4, height, 8), (6, 2, 3, 3), (6,), (3, 6, 1, 1)
    return tuple(torch.randn(shape, dtype=torch.float64, device=device, requires_grad=True) for shape in shapes)


def value_and_gradients(function, inputs):
    output = function(*inputs)
    return output, *torch.autograd.grad(output.pow(2).sum(), inputs)


def test_compile(device):
    compiled = torch.compile(network(torchcnn.functional), backend="aot_eager", fullgraph=True)
    inputs = network_inputs(device)
    assert_close(value_and_gradients(compiled, inputs), value_and_gradients(network(F), inputs))


def test_compile_with_dynamic_sizes(device):
    """One graph for every size: no size is burnt into it."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(network(torchcnn.functional), backend="aot_eager", fullgraph=True, dynamic=True)
    for size in ((5, 11), (7, 13), (9, 17)):  # none equal to another size of the network, nor twice it
        inputs = network_inputs(device, *size)
        assert_close(value_and_gradients(compiled, inputs), value_and_gradients(network(F), inputs))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_compile_of_functions_and_modules(device):
    inputs, _ = conv2d_inputs(device, "all")

    def function(*inputs):
        return torchcnn.Conv2dFunction.apply(*inputs, (1, 2), (2, 1), (2, 1), 2)

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    assert_close(value_and_gradients(compiled, inputs), value_and_gradients(function, inputs))
    model = torch.nn.Sequential(torchcnn.Conv2d(2, 3, 3, padding="same"), torchcnn.MinPool2d(2), torchcnn.GlobalMaxPool2d())
    model, input = model.to(device), torch.randn(2, 2, 6, 6, device=device)
    torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(input), model(input))


def test_export(device):
    model = torch.nn.Sequential(torchcnn.Conv2d(2, 3, 3), torchcnn.MaxPool2d(2), torchcnn.AvgPool2d(2)).to(device)
    input = torch.randn(2, 2, 12, 12, device=device)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (input,), dynamic_shapes=({0: batch},))
    larger = torch.randn(5, 2, 12, 12, device=device)
    torch.testing.assert_close(program.module()(larger), model(larger))
