"""What people do to a model beside calling it: operator checks, autocast, checkpoints, hooks, torch.func, compile, export."""

import copy
import functools
import io

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import torchcnn
import torchcnn.functional as ours

PLANE = (2, 4, 9, 8)
CALLS = {
    "conv2d": lambda f, x, w: f.conv2d(x, w, stride=(1, 2), padding=1, dilation=(2, 1), groups=2),
    "conv2d_bias": lambda f, x, w: f.conv2d(x, w, w[:, 0, 0, 0], padding="same", groups=2),
    "conv_transpose2d": lambda f, x, w: f.conv_transpose2d(x, w, w[0, :, 0, 0].repeat(2), 2, 1, 1, groups=2),
    "max_pool2d": lambda f, x, w: f.max_pool2d(x, 3, 2, 1),
    "max_pool2d_indices": lambda f, x, w: f.max_pool2d(x, 2, return_indices=True)[0],
    "avg_pool2d": lambda f, x, w: f.avg_pool2d(x, (3, 2), 2, (1, 0), True, False),
    "adaptive_avg_pool2d": lambda f, x, w: f.adaptive_avg_pool2d(x, (3, 2)),
    "adaptive_max_pool2d": lambda f, x, w: f.adaptive_max_pool2d(x, 5),
    "max_unpool2d": lambda f, x, w: f.max_unpool2d(x, torch.arange(72, device=x.device).expand(2, 4, 72).reshape(PLANE) * 4, 2),
}
OURS_ALONE = {
    "conv2d_relu": lambda f, x, w: f.conv2d(x, w, groups=2, activation="relu"),
    "min_pool2d": lambda f, x, w: f.min_pool2d(x, 3, 2, 1),
    "min_pool2d_indices": lambda f, x, w: f.min_pool2d(x, 2, return_indices=True)[0],
    "relu_max_pool2d": lambda f, x, w: f.relu_max_pool2d(x, 2, ceil_mode=True),
    "max_pool2d_large_window": lambda f, x, w: f.max_pool2d(x.repeat(1, 1, 2, 3), (17, 16), 1),
    "conv_transpose2d_wide_border": lambda f, x, w: f.conv_transpose2d(x, w, None, 1, 0, 2, 2, 3),
    "global_avg_pool2d": lambda f, x, w: f.global_avg_pool2d(x),
    "global_max_pool2d": lambda f, x, w: f.global_max_pool2d(x),
}


def tensors(device, dtype=torch.float64, requires_grad=True):
    input, weight = (torch.randn(size, dtype=dtype, device=device) for size in (PLANE, (4, 2, 3, 3)))
    return input.requires_grad_(requires_grad), weight.requires_grad_(requires_grad)


def value_and_gradients(function, inputs):
    output = function(*inputs)
    return output, *torch.autograd.grad(output.square().sum(), inputs, allow_unused=True)


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


class Net(torch.nn.Module):
    """One of everything; the same parameters for torchcnn and torch.nn."""

    def __init__(self, nn):
        super().__init__()
        self.conv1 = nn.Conv2d(2, 4, 3, padding=1)
        self.pool1 = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(4, 4, 3, groups=2)
        self.up = nn.ConvTranspose2d(4, 4, 2, 2)
        self.pool2 = nn.AvgPool2d(2)
        self.mean, self.max = nn.AdaptiveAvgPool2d(1), nn.AdaptiveMaxPool2d(1)
        self.fc = torch.nn.Linear(8, 3)

    def forward(self, x):
        x = self.up(torch.tanh(self.conv2(self.pool1(torch.tanh(self.conv1(x))))))
        x = self.pool2(x)
        return self.fc(torch.cat([self.mean(x), self.max(x)], 1).flatten(1))


@pytest.fixture
def nets(device):
    net, of_torch = (Net(nn).to(device, torch.float64) for nn in (torchcnn, torch.nn))
    of_torch.load_state_dict(net.state_dict(), strict=True)
    return net, of_torch


def images(device, batch=3, size=12):
    return torch.randn(batch, 2, size, size, dtype=torch.float64, device=device)


# Operators


class Record(TorchDispatchMode):
    """Keeps the calls of torchcnn's operators."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "torchcnn":
            copies = tuple(x.detach().clone() if isinstance(x, torch.Tensor) else x for x in args)
            self.calls.append((func, copies))
        return func(*args, **(kwargs or {}))


@functools.cache
def operator_calls(device):
    """{operator name: calls with real arguments}: those that the functions and their first and second derivatives make."""
    torch.manual_seed(0)
    record = Record()
    for function in (CALLS | OURS_ALONE).values():
        with record:
            with torch.no_grad():
                function(ours, *tensors(device))
            value_and_gradients(lambda x, w, f=function: f(ours, x, w), tensors(device))
            leaves = tensors(device)
            gradients = torch.autograd.grad(function(ours, *leaves).square().sum(), leaves, create_graph=True, allow_unused=True)
            sum(gradient.square().sum() for gradient in gradients if gradient is not None).backward()
            primals, tangents = (tensors(device, requires_grad=False) for _ in range(2))
            torch.func.jvp(lambda x, w, f=function: f(ours, x, w), primals, tangents)
    by_name = {}
    for func, args in record.calls:
        by_name.setdefault(func._opname, []).append((func, args))
    return by_name


ALL_OPERATORS = sorted(
    name.removeprefix("torchcnn::").split(".")[0]
    for name in torch._C._dispatch_get_all_op_names()
    if name.startswith("torchcnn::")
)


def distinct(calls, most):
    """Calls of which no two have the same argument shapes and options."""
    seen = {}
    for func, args in calls:
        seen.setdefault(str([x.shape if isinstance(x, torch.Tensor) else x for x in args]), (func, args))
    return list(seen.values())[:most]


@pytest.mark.parametrize("name", ALL_OPERATORS)
def test_opcheck(name, device):
    """torch's own examination of a registered operator: schema, fake kernel, autograd registration, tracing."""
    assert name in operator_calls(device), "no function calls this operator"
    for func, args in distinct(operator_calls(device)[name], most=3):
        leaves = tuple(x.requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in args)
        torch.library.opcheck(func, leaves)
        channels_last = tuple(
            x.detach().contiguous(memory_format=torch.channels_last) if isinstance(x, torch.Tensor) and x.dim() == 4 else x
            for x in args
        )
        torch.library.opcheck(func, channels_last, test_utils=("test_schema", "test_faketensor"))


ATEN_NAMES = {
    "conv2d": "conv2d",
    "conv_transpose2d": "conv_transpose2d.input",
    "max_pool2d": "max_pool2d",
    "max_pool2d_with_indices": "max_pool2d_with_indices",
    "avg_pool2d": "avg_pool2d",
    "adaptive_avg_pool2d": "adaptive_avg_pool2d",
    "adaptive_max_pool2d": "adaptive_max_pool2d",
    "max_unpool2d": "max_unpool2d",
}


@pytest.mark.parametrize("key", ["AutocastCPU", "AutocastCUDA"])
def test_autocast_lists_are_those_of_torch(key):
    """The operators that autocast treats at all are the same ones."""

    def has(name):
        return torch._C._dispatch_has_kernel_for_dispatch_key(name, key)

    for name in ALL_OPERATORS:
        assert has(f"torchcnn::{name}") == (name in ATEN_NAMES and has(f"aten::{ATEN_NAMES[name]}")), name


@pytest.mark.parametrize("autocast_dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CALLS)
def test_autocast_dtypes(name, dtype, autocast_dtype, device):
    """What comes out, and what the gradients are in, whatever goes in."""
    dtypes = []
    for functional in (ours, F):
        leaves = tensors(device, dtype)
        with torch.autocast(device, autocast_dtype):
            output = CALLS[name](functional, *leaves)
        gradients = torch.autograd.grad(output.float().sum(), leaves, allow_unused=True)
        dtypes.append([tensor.dtype for tensor in (output, *gradients) if tensor is not None])
    assert dtypes[0] == dtypes[1]


@pytest.mark.parametrize("name", CALLS | OURS_ALONE)
def test_deterministic_algorithms_are_all_there_is(name, device):
    function = (CALLS | OURS_ALONE)[name]
    torch.use_deterministic_algorithms(True)
    try:
        torch.manual_seed(0)
        first = value_and_gradients(lambda x, w: function(ours, x, w), tensors(device))
        torch.manual_seed(0)
        second = value_and_gradients(lambda x, w: function(ours, x, w), tensors(device))
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b in zip(first, second, strict=True):
        assert a is b is None or torch.equal(a, b)


# Autograd


@pytest.mark.parametrize("name", [*CALLS, "conv2d_relu"])
def test_a_tensor_modified_after_it_was_saved(name, device):
    """Whatever backward needs is guarded: a change in place is an error where torch's is one, never a wrong gradient."""
    function = (CALLS | OURS_ALONE)[name]
    for which in (0, 1, "output"):
        leaves = tensors(device)
        inputs = [leaf * 1 for leaf in leaves]  # leaves refuse any change in place
        expected = torch.autograd.grad(function(ours, *inputs).sum(), leaves, allow_unused=True)
        inputs = [leaf * 1 for leaf in leaves]
        output = function(ours, *inputs)
        total = output.sum()
        with torch.no_grad():
            (output if which == "output" else inputs[which]).mul_(2)
        try:
            gradients = torch.autograd.grad(total, leaves, allow_unused=True)
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error)
        else:
            assert all(a is b is None or torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))
    for which, noticed in ((0, name.startswith("conv")), (1, name.startswith("conv")), ("output", name == "conv2d_relu")):
        leaves = tensors(device)
        inputs = [leaf * 1 for leaf in leaves]
        output = function(ours, *inputs)
        with torch.no_grad():
            (output if which == "output" else inputs[which]).mul_(2)
        if noticed:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                output.sum().backward()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(nets, use_reentrant, device):
    from torch.utils.checkpoint import checkpoint

    net, _ = nets
    input = images(device).requires_grad_()
    expected = value_and_gradients(net, (input,))
    net.zero_grad()
    output = checkpoint(net, input, use_reentrant=use_reentrant)
    output.square().sum().backward()
    assert torch.equal(output, expected[0]) and torch.equal(input.grad, expected[1])
    assert all(parameter.grad is not None for parameter in net.parameters())


def test_selective_checkpoint_keeps_our_operators(nets, device):
    """A policy may name torchcnn's operators: convolutions kept, everything else computed anew."""
    from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

    net, _ = nets
    input = images(device).requires_grad_()
    expected = value_and_gradients(net, (input,))
    calls = []

    def policy(context, func, *args, **kwargs):
        keep = func in (torch.ops.torchcnn.conv2d.default, torch.ops.torchcnn.conv_transpose2d.default)
        calls.append((func, context.is_recompute))
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    actual = value_and_gradients(lambda x: checkpoint(net, x, use_reentrant=False, context_fn=contexts), (input,))
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert (torch.ops.torchcnn.conv2d.default, False) in calls


def test_saved_tensor_hooks(nets, device):
    """What is kept for backward passes through the hooks: it can be moved away and brought back."""
    net, _ = nets
    input = images(device).requires_grad_()
    expected = value_and_gradients(net, (input,))
    packed = []

    def pack(tensor):
        packed.append(tensor.shape)
        return tensor.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        actual = value_and_gradients(net, (input,))
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert net.conv1.weight.shape in packed and net.up.weight.shape in packed


def test_hooks_of_modules_and_tensors(nets, device):
    results = []
    for net in nets:
        seen = []
        net.conv1.register_full_backward_hook(lambda module, before, after, s=seen: s.extend((*before, *after)))
        net.pool1.register_full_backward_pre_hook(lambda module, after, s=seen: s.extend(after))
        net.up.weight.register_post_accumulate_grad_hook(lambda parameter, s=seen: s.append(parameter.grad.clone()))
        net.conv2.register_forward_hook(lambda module, args, output, s=seen: s.append(output.detach()))
        torch.manual_seed(1)
        net(images(device).requires_grad_()).square().sum().backward()
        results.append(seen)
    assert len(results[0]) == 5
    assert_close(*results)


def test_anomaly_mode(device):
    """It names the forward call whose backward made a NaN, and passes where there is none."""
    with pytest.warns(UserWarning, match="Anomaly Detection"), torch.autograd.detect_anomaly():
        input, weight = tensors(device)
        ours.max_pool2d(ours.conv2d(input, weight, groups=2), 2).sum().backward()
        weight = torch.full((4, 2, 3, 3), torch.nan, dtype=torch.float64, device=device)
        with pytest.raises(RuntimeError, match=r"Conv2dBackward.* returned nan"):
            ours.conv2d(input, weight, groups=2).sum().backward()


def test_grad_mode_and_detach(device):
    input, weight = tensors(device)
    with torch.inference_mode():
        inference = ours.conv2d(input, weight, groups=2)
    with pytest.raises(RuntimeError, match=r"[Ii]nference tensors"):
        ours.max_pool2d(ours.conv2d(inference, weight.detach()[:, :1].requires_grad_(), groups=4), 2)
    assert not ours.conv2d(input.detach(), weight.detach(), groups=2).requires_grad
    with torch.set_grad_enabled(False):
        assert not ours.conv_transpose2d(input, weight, groups=2).requires_grad


def test_gradient_scaler(nets, device):
    """Mixed precision as it is trained with: what is too large for float16 makes the scaler skip a step and halve its scale."""
    net = nets[0].float()
    x = images(device).float()
    expected = torch.autograd.grad(net(x).square().sum(), list(net.parameters()))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for initial, skipped in ((2.0**10, False), (2.0**40, True)):
        scaler = torch.amp.GradScaler(device, init_scale=initial, backoff_factor=0.5)
        before = net.conv1.weight.detach().clone()
        optimizer.zero_grad()
        with torch.autocast(device, torch.float16):
            output = net(x)
        scaler.scale(output.float().square().sum()).backward()
        scaler.unscale_(optimizer)
        if not skipped:
            for parameter, gradient in zip(net.parameters(), expected, strict=True):
                assert (parameter.grad - gradient).norm() <= 0.1 * gradient.norm()  # pools may choose otherwise
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(net.conv1.weight, before) == skipped
        assert scaler.get_scale() == (initial / 2 if skipped else initial)


# torch.func


def test_per_sample_gradients(nets, device):
    """vmap(grad) over functional_call: a gradient of every parameter for every image."""
    x, target = images(device, 4), torch.tensor([0, 1, 2, 1], device=device)
    results = []
    for net in nets:
        parameters = {name: parameter.detach() for name, parameter in net.named_parameters()}

        def loss(parameters, image, label, net=net):
            output = torch.func.functional_call(net, parameters, (image[None],))
            return F.cross_entropy(output, label[None])

        results.append(torch.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, x, target))
    assert_close(*results)


def test_ensembles(nets, device):
    """vmap over stacked parameters: several networks at once."""
    net, _ = nets
    others = [net, *(Net(torchcnn).to(device, torch.float64) for _ in range(2))]
    parameters, buffers = torch.func.stack_module_state(others)
    skeleton = copy.deepcopy(net).to("meta")

    def forward(parameters, buffers, x):
        return torch.func.functional_call(skeleton, (parameters, buffers), (x,))

    x = images(device)
    outputs = torch.vmap(forward, (0, 0, None))(parameters, buffers, x)
    assert_close(outputs, torch.stack([other(x) for other in others]))


@pytest.mark.parametrize("name", CALLS)
def test_jacobians_and_hessians(name, device):
    inputs = tuple(tensor.detach() for tensor in tensors(device))
    inputs = inputs[0][:1] / 3, inputs[1] / 3
    if name == "max_unpool2d":
        inputs = torch.randn(PLANE, dtype=torch.float64, device=device), inputs[1]
    results = []
    for functional in (ours, F):

        def function(x, w, functional=functional):
            return CALLS[name](functional, x, w)

        def scalar(w, x, function=function):
            return function(x, w).pow(3).mean()

        pullback = torch.func.vjp(function, *inputs)[1]
        results.append(
            (
                torch.func.jacrev(function, 1)(*inputs),
                torch.func.jacfwd(function, 1)(*inputs),
                torch.func.hessian(scalar)(inputs[1], inputs[0]),
                torch.func.jacfwd(torch.func.jacfwd(scalar, 0), 1)(inputs[1], inputs[0]),
                torch.func.jvp(lambda x, w, f=function: torch.func.jvp(f, (x, w), (w.sum() * x, x.sum() * w))[1], inputs, inputs),
                pullback(torch.ones_like(function(*inputs))),
                torch.func.linearize(function, *inputs)[1](*inputs),
            )
        )
    assert_close(*results)


# torch.compile and export


def training_step(net, input):
    for parameter in net.parameters():
        parameter.grad = None
    output = net(input)
    output.square().sum().backward()
    return output, *(parameter.grad for parameter in net.parameters())


def test_compiled_training_step(nets, device):
    net, of_torch = nets
    torch._dynamo.reset()
    x = images(device)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    assert_close(training_step(compiled, x), training_step(of_torch, x))


def test_two_sizes_make_two_graphs(nets, device):
    """With its default settings compile makes sizes dynamic at the second one, and stays with that."""
    net, of_torch = nets
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    for batch, size in ((3, 12), (5, 14), (7, 18), (6, 22), (11, 26)):
        x = images(device, batch, size)
        assert_close(training_step(compiled, x), training_step(of_torch, x))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


def test_compiled_transforms(nets, device):
    """compile around vmap(grad), autocast and checkpoint."""
    from torch.utils.checkpoint import checkpoint

    torch._dynamo.reset()
    input, weight = (tensor.detach() for tensor in tensors(device))

    def per_sample(functional):
        def loss(weight, image):
            return functional.max_pool2d(functional.conv2d(image[None], weight, groups=2), 2).square().sum()

        return torch.vmap(torch.func.grad(loss), (None, 0))

    compiled = torch.compile(per_sample(ours), backend="aot_eager", fullgraph=True)
    assert_close(compiled(weight, input), per_sample(F)(weight, input))

    def cast(functional):
        def function(x, w):
            with torch.autocast(device, torch.bfloat16):
                return functional.conv_transpose2d(functional.conv2d(x, w, groups=2), w, groups=2)

        return function

    compiled = torch.compile(cast(ours), backend="aot_eager", fullgraph=True)
    actual, eager = compiled(input.float(), weight.float()), cast(ours)(input.float(), weight.float())
    assert actual.dtype == torch.bfloat16 and torch.equal(actual, eager)

    net = Net(torchcnn).to(device, torch.float64)
    x = images(device).requires_grad_()
    compiled = torch.compile(lambda x: checkpoint(net, x, use_reentrant=False), backend="aot_eager", fullgraph=True)
    assert_close(value_and_gradients(compiled, (x,)), value_and_gradients(net, (x,)))


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
def test_inductor(nets, dynamic, device):
    """The default backend, which writes C++ around the operators."""
    net, of_torch = nets
    torch._dynamo.reset()
    compiled = torch.compile(net, fullgraph=True, dynamic=dynamic)
    for batch, size in ((3, 12), (5, 14)):
        x = images(device, batch, size)
        assert_close(training_step(compiled, x), training_step(of_torch, x))
        with torch.no_grad():
            assert_close(compiled(x), of_torch(x))


def test_export_save_load(nets, device):
    net, _ = nets
    batch, height = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("height", min=8, max=64)
    program = torch.export.export(net, (images(device),), dynamic_shapes=({0: batch, 2: height},))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer)
    for x in (images(device), images(device, 5)[:, :, :10]):
        assert_close(loaded.module()(x), net(x))
    names = {node.target for node in program.graph.nodes if node.op == "call_function"}
    assert torch.ops.torchcnn.conv2d.default in names and torch.ops.torchcnn.conv_transpose2d.default in names
    x = images(device)
    assert_close(program.run_decompositions().module()(x), net(x))


def test_symbolic_trace(nets, device):
    net, _ = nets
    traced = torch.fx.symbolic_trace(net)
    assert {ours.conv2d, ours.conv_transpose2d, ours.max_pool2d} < {node.target for node in traced.graph.nodes}
    x = images(device)
    assert_close(training_step(traced, x), training_step(net, x))


def test_subclasses_and_modes_see_the_function(device):
    """__torch_function__, as torch.nn.functional has it."""

    class Meter(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            seen.append(func)
            return super().__torch_function__(func, types, args, kwargs or {})

    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    input, weight = tensors(device)
    expected = ours.conv2d(input, weight, groups=2)
    for arguments, options in (
        ((input.as_subclass(Meter), weight), {}),
        ((input,), {"weight": weight.as_subclass(Meter)}),
    ):
        seen = []
        output = ours.conv2d(*arguments, groups=2, **options)
        assert seen == [ours.conv2d] and type(output) is Meter and torch.equal(output.as_subclass(torch.Tensor), expected)
    seen = []
    with Mode():
        ours.max_pool2d(input, 2)
    assert seen[0] is ours.max_pool2d


def test_two_threads_at_once(nets, device):
    """Modules are called from several Python threads, as torch.nn.DataParallel or a server does."""
    from concurrent.futures import ThreadPoolExecutor

    net, _ = nets
    batches = [images(device) for _ in range(8)]
    expected = [training_step(copy.deepcopy(net), x) for x in batches]
    with ThreadPoolExecutor(4) as pool:
        actual = list(pool.map(lambda x: training_step(copy.deepcopy(net), x), batches))
    assert all(torch.equal(a, b) for ours, them in zip(actual, expected, strict=True) for a, b in zip(ours, them, strict=True))


def test_vmap_without_images():
    v = torch.randn(3, 4, 2, 3, 3)
    ours_, theirs = (torch.vmap(lambda a, w, f=f: f.conv_transpose2d(a, w))(torch.empty(3, 0, 4, 9, 8), v) for f in (ours, F))
    assert ours_.shape == theirs.shape

    def gradient(f):
        return torch.vmap(torch.func.grad(lambda w, a: f.conv2d(a, w).sum()))(v, torch.empty(3, 0, 2, 9, 8))

    assert_close(gradient(ours), gradient(F))


def test_compiled_autograd(device):
    net = torch.nn.Sequential(torchcnn.Conv2d(2, 3, 3), torchcnn.MaxPool2d(2)).to(device)
    x = torch.randn(1, 2, 8, 8, device=device)
    net(x).sum().backward()
    expected = [parameter.grad.clone() for parameter in net.parameters()]
    net.zero_grad()
    torch._dynamo.reset()

    with torch._dynamo.config.patch(compiled_autograd=True):

        @torch.compile(backend="eager")
        def backward(loss):
            loss.backward()
            return loss + 1  # Dynamo does not compile a function without an operation of its own

        backward(net(x).sum())
    assert_close([parameter.grad for parameter in net.parameters()], expected)


def test_names_of_nodes():
    w = torch.ones(1, 1, 1, 1, requires_grad=True)
    output = torchcnn.functional.conv2d(torch.ones(1, 1, 2, 2), w)
    assert output.grad_fn.name() == "Conv2dBackward"
    assert "Conv2dBackward" in repr(output.grad_fn)
