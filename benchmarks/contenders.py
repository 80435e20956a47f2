"""The cases of each table: the same work by torch in both layouts and by torchcnn, and its result in float64."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import floors
import layers
import torch
import torch.nn.functional as F
from torch import nn

import torchcnn

BEST_OF = ("torch_nchw", "torch_channels_last")


@dataclass
class Case:
    group: str
    layer: str
    direction: str
    dtype: str
    contenders: dict[str, Callable]
    truth: Callable  # the result in float64
    peers: tuple[str, ...] = BEST_OF  # the contenders that torchcnn is compared with
    flops: int = 0
    bytes: int = 0  # that have to be read and written, whatever the algorithm
    algorithm: str = ""
    extras: dict[str, Callable] = field(default_factory=dict)  # what else is timed beside


def in_layout(layout, *tensors):
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    return [x.contiguous(memory_format=memory_format) if x.dim() == 4 else x for x in tensors]


def copy_of(bytes):
    """A plain copy that reads and writes so many bytes in all."""
    source = torch.zeros(max(1, bytes // 8))
    target = torch.zeros_like(source)
    return lambda: target.copy_(source)


def check(results, truth, dtype, allowed):
    """The error relative to the largest value of the truth, and whether that is more than a correct kernel makes.

    bfloat16 and float16 results may also lose one rounding, which is at least that of the smallest normal number.
    """
    limits = torch.finfo(dtype)
    rounding = limits.eps / 2 if dtype in (torch.bfloat16, torch.float16) else 0
    errors, wrong = [], False
    for result, exact in zip(tuples(results), tuples(truth), strict=True):
        scale = exact.abs().max().item() or 1.0
        difference = (result.double() - exact).abs()
        errors.append(difference.max().item() / scale)
        beyond = (difference - rounding * exact.abs().clamp(min=limits.smallest_normal)).max().item() / scale
        wrong |= result.shape != exact.shape or not beyond <= allowed
    return (math.nan if any(map(math.isnan, errors)) else max(errors)), wrong


def one_vector(gradients):
    """Of a network's gradients some are zero but for rounding, such as those of a bias before a normalisation."""
    return torch.cat([gradient.flatten() for gradient in gradients])


def tuples(value):
    return value if isinstance(value, tuple) else (value,)


# ------------------------------------------------------------------------------------------------------------ convolution


def conv_tensors(layer, dtype, device="cpu"):
    """input, weight, bias and grad_output of a layer, its output of about unit variance.

    float64 ones are integers up to 2**16: the sums stay below 2**53, so torch's are exact and can be the truth.
    """
    R, S = layer.kernel_size
    weight_size = layer.K, layer.C // layer.groups, R, S
    output_size = torchcnn.functional.conv2d_output_size(layer.size, (R, S), layer.stride, layer.padding, layer.dilation)
    sizes = (layer.N, layer.C, *layer.size), weight_size, (layer.K,), (layer.N, layer.K, *output_size)
    if dtype == torch.float64:
        return [torch.randint(-(2**16), 2**16, size, device=device).double() for size in sizes]
    input, weight, bias, grad_output = (torch.randn(size, device=device) for size in sizes)
    return [x.to(dtype) for x in (input, weight / math.sqrt(weight[0].numel()), bias, grad_output)]


def torch_conv(layer, input, weight, bias, grad_output):
    options = [layer.stride] * 2, list(layer.padding), [layer.dilation] * 2

    def backward(*mask):
        return torch.ops.aten.convolution_backward(
            grad_output, input, weight, [layer.K], *options, False, [0, 0], layer.groups, mask
        )

    return {
        floors.FORWARD: lambda: F.conv2d(input, weight, bias, *options, layer.groups),
        floors.GRAD_INPUT: lambda: backward(True, False, False)[0],
        floors.GRAD_WEIGHT: lambda: backward(False, True, True)[1:],
    }


def torchcnn_conv(layer, input, weight, bias, grad_output, layout):
    ops = torch.ops.torchcnn
    options = layer.stride, layer.stride, *layer.padding, layer.dilation, layer.dilation, layer.groups
    last = layout == "channels_last"

    return {
        floors.FORWARD: lambda: torchcnn.functional.conv2d(
            input, weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups
        ),
        floors.GRAD_INPUT: lambda: ops.conv2d_grad_input(grad_output, weight, *layer.size, *options, last),
        floors.GRAD_WEIGHT: lambda: ops.conv2d_grad_weight_bias(grad_output, input, *layer.kernel_size, *options, last),
    }


def conv_cases(group, layer, dtype, layout, directions):
    tensors = conv_tensors(layer, dtype)
    nchw, last = (torch_conv(layer, *in_layout(name, *tensors)) for name in ("nchw", "channels_last"))
    ours = torchcnn_conv(layer, *in_layout(layout, *tensors), layout)
    extras = {}
    if dtype in (torch.bfloat16, torch.float16):
        extras = torchcnn_conv(layer, *in_layout(layout, *(x.float() for x in tensors)), layout)
    exact = torch_conv(layer, *(x.double() for x in tensors))

    input, weight, _, grad_output = tensors
    explained = torchcnn.explain(
        input.shape,
        weight.shape,
        layer.stride,
        layer.padding,
        layer.dilation,
        layer.groups,
        layout == "channels_last",
    )
    algorithms = dict(line.split()[:2] for line in explained.splitlines())
    for direction in directions:
        yield Case(
            group,
            layer.name,
            direction,
            str(dtype).removeprefix("torch."),
            {"torch_nchw": nchw[direction], "torch_channels_last": last[direction], "torchcnn": ours[direction]},
            exact[direction],
            flops=2 * grad_output.numel() * weight[0].numel(),
            bytes=sum(x.numel() * x.element_size() for x in (input, weight, grad_output)),
            algorithm=algorithms[direction.removesuffix("+bias")],
            extras={"float32": extras[direction]} if extras else {},
        )


def conv_table(groups, layout, quick, dtype=torch.float32):
    for group in groups:
        directions = floors.CONV[group]
        for layer in layers.CONV[group]:
            if not (quick and too_large_to_be_quick(layer)):
                yield from conv_cases(group, layer, dtype, layout, directions)


def dtypes_table(groups, layout, quick):
    for group in groups:
        for layer in layers.DTYPES[group]:
            if not (quick and too_large_to_be_quick(layer)):
                yield from conv_cases(group, layer, getattr(torch, group.split()[0]), layout, floors.DTYPES[group])


def too_large_to_be_quick(layer):
    H, W = layer.size
    R, S = layer.kernel_size
    return layer.N * layer.K * H * W // layer.stride**2 * layer.C // layer.groups * R * S > 1e9


# ---------------------------------------------------------------------------------------------------------------- pooling


def pools(group, layer):
    """A pool as torch has it, as torchcnn has it, and what torch's is called with to return its indices, if it can."""
    kind = group.split()[1] if group.endswith(("max", "avg")) else group.split()[0]
    if layer.output:
        name = f"adaptive_{kind}_pool2d"
        ours = f"global_{kind}_pool2d" if group.startswith("global") else name
        sizes = () if group.startswith("global") else (layer.output,)
        return (
            lambda x: getattr(F, name)(x, layer.output),
            lambda x: getattr(torchcnn.functional, ours)(x, *sizes),
            {},
        )
    window = layer.kernel, layer.stride, layer.pad
    return (
        lambda x, **options: getattr(F, f"{kind}_pool2d")(x, *window, **options),
        lambda x, **options: getattr(torchcnn.functional, f"{kind}_pool2d")(x, *window, **options),
        {"return_indices": True} if kind == "max" else {},
    )


def pool_calls(pool, options, input, grad_output):
    """Each direction of a pool, the derivatives as autograd computes them."""
    leaf = input.detach().requires_grad_()
    output = pool(leaf)

    def forward():
        with torch.no_grad():
            return pool(input, **options)

    return {
        floors.FORWARD: forward,
        "backward": lambda: torch.autograd.grad(output, leaf, grad_output, retain_graph=True),
        floors.TRAIN: lambda: torch.autograd.grad(pool(leaf), leaf, grad_output),
    }


def pool_cases(group, layer, layout):
    theirs, ours, options = pools(group, layer)
    input = torch.randn(layer.N, layer.C, layer.H, layer.H)
    grad_output = torch.randn_like(theirs(input))
    nchw, last = (pool_calls(theirs, options, *in_layout(name, input, grad_output)) for name in ("nchw", "channels_last"))
    calls = pool_calls(ours, options, *in_layout(layout, input, grad_output))
    exact = pool_calls(theirs, options, input.double(), grad_output.double())
    index_bytes = {floors.FORWARD: 8, "backward": 1} if options else {}  # offsets in the window are enough for backward
    for direction in floors.POOL[group]:
        large = 4 * input.numel() >= floors.LARGE_POOL_BYTES and not layer.output and direction != floors.TRAIN
        bytes = 4 * input.numel() + (4 + index_bytes.get(direction, 0)) * grad_output.numel()
        yield Case(
            group,
            layer.name,
            direction,
            "float32",
            {"torch_nchw": nchw[direction], "torch_channels_last": last[direction], "torchcnn": calls[direction]},
            exact[direction],
            peers=BEST_OF if layer.output or direction == floors.TRAIN or layout != "nchw" else BEST_OF[:1],
            bytes=bytes,
            extras={"copy": copy_of(bytes)} if large else {},
        )


def pool_table(groups, layout, quick):
    for group in groups:
        kind = {"global": layers.GLOBAL_POOL, "adaptive": layers.ADAPTIVE_POOL}.get(group.split()[0], layers.POOL)
        for layer in kind:
            yield from pool_cases(group, layer, layout)


# ----------------------------------------------------------------------------------------------------- calls and networks


class BasicBlock(nn.Module):
    """Two 3x3 layers around which the input is added again (He et al., "Deep residual learning", 2016, figure 2)."""

    def __init__(self, channels):
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2))
        self.bn1, self.bn2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + x)


def network(name):
    if name in floors.MODELS:
        return torchvision_model(name)
    if name == "ResNet-18 block":
        return BasicBlock(layers.NETWORKS[name][1])
    convolution = [nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(
        *convolution, nn.Flatten(), nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)
    )


def torchvision_model(name):
    try:
        import torchvision
    except ImportError as error:
        raise SystemExit(f"run.py: models are those of torchvision, which cannot be imported: {error}") from error
    model = torchvision.models.get_model(name, weights=None)
    for module in model.modules():  # what is dropped at random would differ from one call to the next
        if isinstance(module, (nn.Dropout, torchvision.ops.StochasticDepth)):
            module.p = 0.0
    return model


def network_calls(model, input, grad_output, compiled):
    """Outputs in eval mode; and the gradients of all parameters, which every optimizer then uses in the same way."""
    evaluated, trained = (copy.deepcopy(model).train(mode) for mode in (False, True))
    parameters = list(trained.parameters())
    if compiled:
        evaluated, trained = torch.compile(evaluated, fullgraph=True), torch.compile(trained, fullgraph=True)

    def inference():
        with torch.no_grad():
            return evaluated(input)

    calls = {
        floors.INFERENCE: inference,
        floors.STEP: lambda: torch.autograd.grad(trained(input), parameters, grad_output),
    }
    if compiled:  # now, not in the first turn that is timed
        for call in calls.values():
            call()
    return calls


def network_cases(group, name, size, layout):
    model, input = network(name), torch.randn(size)
    grad_output = torch.randn_like(model(input))

    def calls(model, layout):
        memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
        moved = copy.deepcopy(model).to(memory_format=memory_format)
        return network_calls(moved, *in_layout(layout, input, grad_output), group == "compiled")

    contenders = {"torch_nchw": calls(model, "nchw"), "torch_channels_last": calls(model, "channels_last")}
    contenders["torchcnn"] = calls(torchcnn.convert(model), layout)
    exact = network_calls(copy.deepcopy(model).double(), input.double(), grad_output.double(), False)
    for direction in (floors.INFERENCE, floors.STEP):
        each = {who: directions[direction] for who, directions in contenders.items()}
        yield Case(group, f"{name}, {len(input)} images", direction, "float32", each, exact[direction])


def one_call_cases(group, layer, layout):
    input, weight, bias, grad_output = conv_tensors(layer, torch.float32)

    def calls(conv2d, *tensors):
        x, w, b, g = tensors
        leaves = [tensor.detach().requires_grad_() for tensor in (x, w, b)]

        def forward():
            with torch.no_grad():
                return conv2d(x, w, b, padding=layer.pad)

        return {
            floors.FORWARD: forward,
            floors.TRAIN: lambda: torch.autograd.grad(conv2d(*leaves, padding=layer.pad), leaves, g),
        }

    tensors = input, weight, bias, grad_output
    nchw, last = (calls(F.conv2d, *in_layout(name, *tensors)) for name in ("nchw", "channels_last"))
    ours = calls(torchcnn.functional.conv2d, *in_layout(layout, *tensors))
    exact = calls(F.conv2d, *(x.double() for x in tensors))
    for direction in floors.NETWORKS[group]:
        each = {"torch_nchw": nchw[direction], "torch_channels_last": last[direction], "torchcnn": ours[direction]}
        yield Case(group, layer.name, direction, "float32", each, exact[direction])


def networks_table(groups, layout, quick):
    for group in groups:
        if group == "one call":
            for layer in layers.ONE_CALL:
                yield from one_call_cases(group, layer, layout)
        else:
            for name, size in layers.NETWORKS.items():
                if not (quick and name != "LeNet-5"):
                    yield from network_cases(group, name, size, layout)


def models_table(groups, layout, quick):
    for name in groups:
        if not (quick and name != "resnet18"):
            yield from network_cases(name, name, layers.MODEL_INPUT, layout)


TABLES = {
    "conv": (conv_table, floors.CONV, torch.inference_mode),
    "pool": (pool_table, floors.POOL, torch.enable_grad),
    "dtypes": (dtypes_table, floors.DTYPES, torch.inference_mode),
    "networks": (networks_table, floors.NETWORKS, torch.enable_grad),
    "models": (models_table, floors.MODELS, torch.enable_grad),
}
