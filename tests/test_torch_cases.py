"""PyTorch's own cases, which come with the torch package, run on torchcnn's functions and modules.

OpInfo: samples and bad inputs of every operator. ModuleInfo: constructor and forward arguments of every module. common_nn: tests
of the convolution modules. `make test` takes every so manieth of the many pooling samples, `make test-full` all.

Where torchcnn differs on purpose, it stands here:

    dtypes      convolutions of integers and of complex numbers raise NotImplementedError
    messages    bad input is refused in torchcnn's own words; the type of the exception is torch's
    ranks       adaptive pools raise RuntimeError for an input of 2 dimensions, as every other function; torch's raise ValueError
                if the output size is a pair, RuntimeError if it is an int
    unpooling   samples with equal indices have no derivative that finite differences could find: torch does not check them
                either, but has a variant of the samples without
"""

import functools
import itertools
import zlib

import pytest
import torch
from tiers import assert_bound
from torch.autograd import gradcheck, gradgradcheck

pytest.importorskip("expecttest", reason="torch.testing._internal needs it")

from torch.testing._internal import common_modules, common_nn
from torch.testing._internal.common_methods_invocations import op_db

import torchcnn

OPERATORS = (
    "adaptive_avg_pool2d",
    "adaptive_max_pool2d",
    "avg_pool2d",
    "conv2d",
    "conv_transpose2d",
    "max_pool2d",
    "max_unpool2d",
)
OPINFOS = {
    name + info.variant_test_name: info
    for info in op_db
    for name in (info.name.removeprefix("nn.functional."),)
    if name in OPERATORS
}
WITHOUT_DERIVATIVE = ("max_unpool2d",)
FORWARD_DTYPES = [(name, dtype) for name, info in OPINFOS.items() for dtype in sorted(info.dtypes, key=str)]
PARTS = ["some", pytest.param("all", marks=pytest.mark.slow)]

for_every_operator = pytest.mark.parametrize("name", OPINFOS)
for_every_derivative = pytest.mark.parametrize("name", [name for name in OPINFOS if name not in WITHOUT_DERIVATIVE])
for_parts = pytest.mark.parametrize("part", PARTS)


def test_nothing_is_left_out():
    assert {name.removesuffix("grad") for name in OPINFOS} == set(OPERATORS)
    assert set(WITHOUT_DERIVATIVE) < set(OPINFOS) and "max_unpool2dgrad" in OPINFOS
    assert all(len(list(info.sample_inputs("cpu", torch.float64))) > 5 for info in OPINFOS.values())


@functools.cache
def all_samples(name, dtype):
    return list(OPINFOS[name].sample_inputs("cpu", dtype))


def samples_of(name, dtype, part, most=64):
    """All samples, or about `most`. The step is odd: the samples are a product of options of which many have an even number."""
    samples = all_samples(name, dtype)
    step = 1 if part == "all" else max(1, len(samples) // most) | 1
    chosen = samples[zlib.crc32(name.encode()) % step :: step]
    assert chosen
    return chosen


def ours(name):
    return getattr(torchcnn.functional, name.removesuffix("grad"))


def call(function, sample):
    return function(sample.input, *sample.args, **sample.kwargs)


def as_tuple(results):
    return results if isinstance(results, tuple) else (results,)


def is_float(tensor):
    return isinstance(tensor, torch.Tensor) and tensor.is_floating_point()


def tensors_of(sample):
    """The tensors among the arguments, each with a function that puts others in their place and calls."""
    arguments = [sample.input, *sample.args, *sample.kwargs.values()]
    places = [index for index, argument in enumerate(arguments) if isinstance(argument, torch.Tensor)]

    def call_with(function, tensors):
        filled = list(arguments)
        for index, tensor in zip(places, tensors, strict=True):
            filled[index] = tensor
        positional = 1 + len(sample.args)
        return function(*filled[:positional], **dict(zip(sample.kwargs, filled[positional:], strict=True)))

    return [arguments[index] for index in places], call_with


def floats_of(sample):
    """(leaves that require a gradient, function of them alone that returns the floating-point outputs)."""
    tensors, call_with = tensors_of(sample)
    places = [index for index, tensor in enumerate(tensors) if tensor.is_floating_point()]
    leaves = tuple(tensors[index].detach().clone().requires_grad_() for index in places)

    def make(function):
        def of_floats(*values):
            filled = list(tensors)
            for index, value in zip(places, values, strict=True):
                filled[index] = value
            outputs = tuple(output for output in as_tuple(call_with(function, filled)) if output.is_floating_point())
            return outputs if len(outputs) > 1 else outputs[0]

        return of_floats

    return leaves, make


# OpInfo


@for_parts
@pytest.mark.parametrize("name, dtype", FORWARD_DTYPES, ids=lambda value: str(value).removeprefix("torch."))
def test_forward(name, dtype, part):
    """Against torch in float64 (integers: in the same dtype): convolutions by tier 2 of tiers.py, pools by torch.testing."""
    for sample in samples_of(name, dtype, part):
        if "conv" in name and not dtype.is_floating_point:
            with pytest.raises(NotImplementedError, match="dtype must be one of"):
                call(ours(name), sample)
            continue
        wide = sample.transform(lambda x: x.double() if is_float(x) else torch.float64 if x is dtype and is_float(x) else x)
        expected = as_tuple(call(OPINFOS[name].op, wide))
        for actual, truth in zip(as_tuple(call(ours(name), sample)), expected, strict=True):
            assert actual.dtype == (dtype if truth.is_floating_point() else truth.dtype)
            if "conv" in name:
                magnitude = call(OPINFOS[name].op, wide.transform(lambda x: x.abs() if is_float(x) else x))
                weight = tensors_of(sample)[0][1]
                terms = weight[:, 0] if name == "conv_transpose2d" else weight[0]
                assert_bound(actual, truth, magnitude, terms.numel() + 1)
            else:
                torch.testing.assert_close(actual, truth.to(actual.dtype))


@for_parts
@for_every_operator
def test_gradients(name, part):
    """Against torch's own, for the same random gradient of the output."""
    for sample in samples_of(name, torch.float64, part):
        leaves, make = floats_of(sample)
        results = []
        for function in (ours(name), OPINFOS[name].op):
            output = make(function)(*leaves)
            grad_output = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)
            results.append((output, *torch.autograd.grad(output, leaves, grad_output)))
        torch.testing.assert_close(*results)


@for_parts
@for_every_operator
def test_non_contiguous(name, part):
    for sample in samples_of(name, torch.float32, part):
        results = []
        for variant in (sample, sample.noncontiguous()):
            leaves, make = floats_of(variant)
            if variant is not sample:  # clone() has made them dense
                leaves = tuple(strided.detach().requires_grad_() for strided in tensors_of(variant)[0] if is_float(strided))
            output = make(ours(name))(*leaves)
            results.append((output, *torch.autograd.grad(output.square().sum(), leaves)))
        torch.testing.assert_close(*results)


@for_parts
@for_every_operator
def test_channels_last(name, part):
    """The same values, and the memory format that torch's operator gives."""

    def convert(tensor):
        four = isinstance(tensor, torch.Tensor) and tensor.dim() == 4
        return tensor.contiguous(memory_format=torch.channels_last) if four else tensor

    for sample in samples_of(name, torch.float32, part):
        converted = sample.transform(convert)
        expected, of_torch = call(ours(name), sample), call(OPINFOS[name].op, converted)
        for actual, value, torchs in zip(*map(as_tuple, (call(ours(name), converted), expected, of_torch)), strict=True):
            torch.testing.assert_close(actual, value)
            if actual.dim() == 4:
                assert actual.is_contiguous(memory_format=torch.channels_last) or not torchs.is_contiguous(
                    memory_format=torch.channels_last
                )


@for_parts
@for_every_operator
def test_meta(name, part):
    for sample in samples_of(name, torch.float32, part):
        on_meta = sample.transform(lambda x: x.to("meta") if isinstance(x, torch.Tensor) else x)
        pairs = zip(as_tuple(call(ours(name), on_meta)), as_tuple(call(ours(name), sample)), strict=True)
        for meta, real in pairs:
            assert meta.is_meta
            assert (meta.shape, meta.stride(), meta.dtype) == (real.shape, real.stride(), real.dtype)


@for_parts
@for_every_derivative
def test_gradcheck(name, part):
    """nondet_tol=0: twice the same bits. Forward mode and batched gradients too."""
    checks = {
        "check_forward_ad": True,
        "check_batched_grad": True,
        "check_batched_forward_grad": True,
        "fast_mode": True,
        "nondet_tol": 0.0,
    }
    for sample in samples_of(name, torch.float64, part, most=32):
        leaves, make = floats_of(sample)
        assert gradcheck(make(ours(name)), leaves, **checks)


@for_parts
@for_every_derivative
def test_gradgradcheck(name, part):
    checks = {"check_batched_grad": True, "check_fwd_over_rev": True, "check_rev_over_rev": True}
    for sample in samples_of(name, torch.float64, part, most=32):
        leaves, make = floats_of(sample)
        assert gradgradcheck(make(ours(name)), leaves, **checks, gen_non_contig_grad_outputs=True, fast_mode=True, nondet_tol=0.0)


@for_parts
@for_every_derivative
def test_forward_mode(name, part):
    """A dual number gives torch's tangent, for every argument alone: right, and never silently none."""
    for sample in samples_of(name, torch.float64, part):
        leaves, make = floats_of(sample)
        for which in range(len(leaves)):
            tangents = [torch.zeros_like(leaf) for leaf in leaves]
            tangents[which] = torch.randn_like(leaves[which])
            primals = tuple(leaf.detach() for leaf in leaves)
            results = [torch.func.jvp(make(function), primals, tuple(tangents)) for function in (ours(name), OPINFOS[name].op)]
            torch.testing.assert_close(*results)


@for_parts
@for_every_operator
def test_vmap(name, part):
    """Every selection of tensors batched, the batch first or last, is a loop over the batch."""
    for sample in samples_of(name, torch.float64, part, most=32):
        tensors, call_with = tensors_of(sample)
        for selection in itertools.product((False, True), repeat=len(tensors)):
            if not any(selection):
                continue
            for where in (0, -1):
                dims = tuple(where if selected else None for selected in selection)
                batched = [
                    # Floats vary within the batch, indices stay what they are.
                    torch.stack([tensor, 2 * tensor] if tensor.is_floating_point() else [tensor] * 2, where)
                    if dim is not None
                    else tensor
                    for tensor, dim in zip(tensors, dims, strict=True)
                ]
                actual = torch.vmap(lambda *args, c=call_with: c(ours(name), args), dims)(*batched)
                loop = [
                    call_with(ours(name), [x if dim is None else x.select(dim, b) for x, dim in zip(batched, dims, strict=True)])
                    for b in range(2)
                ]
                expected = tuple(torch.stack(parts) for parts in zip(*map(as_tuple, loop), strict=True))
                torch.testing.assert_close(as_tuple(actual), expected)


ERROR_INPUTS = [
    (name, index)
    for name, info in OPINFOS.items()
    if info.error_inputs_func
    for index in range(len(list(info.error_inputs("cpu"))))
]


@pytest.mark.parametrize("name, index", ERROR_INPUTS, ids=lambda value: str(value))
def test_error_inputs(name, index):
    bad = list(OPINFOS[name].error_inputs("cpu"))[index]
    error_type = bad.error_type
    if name.startswith("adaptive") and bad.sample_input.input.dim() == 2:
        assert error_type is ValueError
        error_type = RuntimeError
    with pytest.raises(error_type, match=rf"^{name.removesuffix('grad')}: "):
        call(ours(name), bad.sample_input)


# ModuleInfo


MODULE_INFOS = {
    info.name.removeprefix("nn."): info
    for info in common_modules.module_db
    if hasattr(torchcnn, info.module_cls.__name__) and info.module_cls.__module__.startswith("torch.nn")
}


def test_no_module_is_left_out():
    assert MODULE_INFOS.keys() == {
        "AdaptiveAvgPool2d",
        "AdaptiveMaxPool2d",
        "AvgPool2d",
        "Conv2d",
        "ConvTranspose2d",
        "MaxPool2d",
    }


def module_inputs(name, dtype):
    info = MODULE_INFOS[name]
    for training in (False, True):
        yield from info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=True, training=training)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", MODULE_INFOS)
def test_modules(name, dtype):
    """Built from the same arguments and parameters: the same outputs and gradients as torch's module, and as its reference."""
    count = 0
    for sample in module_inputs(name, dtype):
        arguments = sample.constructor_input
        torchs = MODULE_INFOS[name].module_cls(*arguments.args, **arguments.kwargs).to(dtype)
        module = getattr(torchcnn, name)(*arguments.args, **arguments.kwargs).to(dtype)
        assert repr(module) == repr(torchs)
        module.load_state_dict(torchs.state_dict(), strict=True)
        args, kwargs = sample.forward_input.args, sample.forward_input.kwargs
        results = []
        for layer in (module, torchs):
            outputs = as_tuple(layer(*args, **kwargs))
            leaves = [args[0], *layer.parameters()]
            results.append((*outputs, *torch.autograd.grad(outputs[0].square().sum(), leaves)))
        torch.testing.assert_close(
            *results, rtol=1e-4 if dtype == torch.float32 else 1e-9, atol=1e-4 if dtype == torch.float32 else 1e-9
        )
        if sample.reference_fn is not None:
            torch.testing.assert_close(module(*args, **kwargs), sample.reference_fn(module, *args, **kwargs))
        count += 1
    assert count > 3


@pytest.mark.parametrize("name", [name for name, info in MODULE_INFOS.items() if info.module_error_inputs_func])
def test_error_inputs_of_modules(name):
    info = MODULE_INFOS[name]
    bad_inputs = list(info.module_error_inputs_func(info, device="cpu", dtype=torch.float32, requires_grad=False, training=False))
    assert bad_inputs
    for bad in bad_inputs:
        arguments, forward = bad.module_error_input.constructor_input, bad.module_error_input.forward_input
        if bad.error_on == common_modules.ModuleErrorEnum.CONSTRUCTION_ERROR:
            with pytest.raises(bad.error_type):
                getattr(torchcnn, name)(*arguments.args, **arguments.kwargs)
            continue
        module = getattr(torchcnn, name)(*arguments.args, **arguments.kwargs)
        with pytest.raises(bad.error_type, match=r"^\w+2d: "):
            module(*forward.args, **forward.kwargs)


# common_nn


class NNTest(common_nn.NNTestCase):
    """What common_nn's tests ask of the test case that runs them."""

    __test__ = False  # not for pytest to collect

    def runTest(self):
        raise NotImplementedError

    def _forward(self, module, input):
        return module(*input) if isinstance(input, tuple) else module(input)

    def _backward(self, module, input, output, grad_output, create_graph=False):
        output.backward(grad_output, retain_graph=True, create_graph=create_graph)
        inputs = input if isinstance(input, tuple) else (input,)
        gradients = tuple(None if tensor.grad is None else tensor.grad.data for tensor in inputs)
        return gradients if isinstance(input, tuple) else gradients[0]

    def _get_parameters(self, module):
        parameters = list(module.parameters())
        return parameters, [parameter.grad for parameter in parameters]

    def _zero_grad_parameters(self, module):
        for parameter in module.parameters():
            parameter.grad = None


def nn_test(arguments):
    arguments = dict(arguments)
    name = arguments.pop("module_name", None)
    constructor = arguments.pop("constructor", None) or getattr(torch.nn, name)

    @functools.wraps(constructor)
    def converted(*args, **kwargs):
        return torchcnn.convert(constructor(*args, **kwargs), inplace=True)

    return common_nn.NewModuleTest(constructor=converted, **arguments)


NN_TESTS = [
    nn_test(arguments)
    for arguments in common_nn.get_new_module_tests()
    if (arguments.get("fullname") or arguments.get("module_name", "")).split("_")[0] in ("Conv2d", "ConvTranspose2d")
]


@pytest.mark.parametrize("test", NN_TESTS, ids=lambda test: test.get_name())
def test_common_nn(test):
    module = test.constructor(*test.constructor_args)
    assert isinstance(module, torchcnn.Conv2d | torchcnn.ConvTranspose2d)
    # Its default dtype is that of finite differences.
    test.default_dtype = torch.float64
    threads = torch.get_num_threads()
    try:
        test(NNTest())
    finally:
        torch.set_num_threads(threads)


def test_common_nn_has_its_tests():
    assert len(NN_TESTS) >= 20
