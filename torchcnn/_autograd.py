"""One door between the operators and autograd: every private name of PyTorch that they rely on stands in this file.

An operator (``torch.ops.torchcnn.*``, C++) gets its derivatives from a rule: a class of static methods with

    op                                  the operator
    setup_context(ctx, inputs, output)  what backward and jvp need later
    backward(ctx, saved, needs, *grad_outputs)
                                        gradients of the leading tensor arguments, None where ``needs[i]`` is False
    jvp(ctx, saved, *tangents)          forward-mode derivative
    vmap(info, in_dims, *args)          the operator over a batch of arguments

Rules call operators themselves, which are right however they are reached: eager, torch.compile, torch.func, forward-mode AD,
double backward. `attach` makes them so: it registers the rule under the operator's Autograd dispatch key. The function that it
returns is the operator again, with shortcuts for plain eager calls.
"""

import torch
from torch import _C
from torch._functorch.utils import enable_single_level_autograd_function
from torch._prims_common import suggest_memory_format
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction
from torch.compiler import is_compiling
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: F401  (for summary.py)

from torchcnn import _C as _kernels  # noqa: F401  (loading it registers the operators)

LIBRARY: torch.library.Library = torch.library.Library("torchcnn", "FRAGMENT")

_below_autograd = _C._AutoDispatchBelowAutograd
_functorch_active = _C._are_functorch_transforms_active
_autocast_enabled = _C._is_any_autocast_enabled
_any_requires_grad = _C._any_requires_grad
_AFTER_AUTOGRAD = _C._after_autograd_keyset
_will_execute = _C._will_engine_execute_node
_graph_task_id = _C._current_graph_task_id
_Leaf = _C._functions.AccumulateGrad  # type: ignore[attr-defined]


def _leading_tensors(op):
    """How many of the first arguments are tensors; no later one is."""
    is_tensor = ["Tensor" in str(argument.type) for argument in op._schema.arguments]
    return sum(is_tensor)


def _is_plain_call():
    """Whether nothing but autograd itself looks at a call: then it need not go through the dispatcher more than once."""
    return not (is_compiling() or _functorch_active() or forward_ad._current_level >= 0 or _autocast_enabled())


def wanted(ctx, needs):
    """`needs`, of the arguments of a Function from its first tensor on, without the gradients that this pass does not ask for.

    Of ``torch.autograd.grad(loss, images)`` those are the gradients of the weights. ``ctx.needs_input_grad`` still has them: it
    tells what the graph could compute.
    """
    if sum(needs) < 2 or is_compiling():
        return needs
    # An edge for each tensor; where an argument is None instead, no tensor follows it.
    edges = [node for node, _ in ctx.next_functions]
    if edges[0] is None or isinstance(edges[0], _Leaf):  # a first layer: not worth asking, see _is_wanted
        return needs
    unwanted = [i for i, node in enumerate(edges) if needs[i] and not _is_wanted(node)]
    if not unwanted or len(unwanted) == sum(needs):  # of no node backward would not run: torch.distributed.autograd does not say
        return needs
    return tuple(need and i not in unwanted for i, need in enumerate(needs))


_pass_for_leaves = -1  # the last backward pass that was found to ask for leaves


def _is_wanted(node):
    """Whether the backward pass that is running goes on to a node.

    Of a leaf that autograd.grad asks for, the engine does not say so, but raises, which takes as long as a small layer: once that
    has happened, all leaves of the pass are taken to be wanted.
    """
    global _pass_for_leaves
    if isinstance(node, _Leaf) and _graph_task_id() == _pass_for_leaves:
        return True
    try:
        return _will_execute(node)
    except RuntimeError:
        _pass_for_leaves = _graph_task_id()
        return True


def attach(rule):
    """Register `rule` as the derivative of its operator and return the function that calls the operator."""
    op = rule.op
    arguments, tensors = len(op._schema.arguments), _leading_tensors(op)

    class Node(_SingleLevelFunction):  # its `apply` is C, without the signature inspection of autograd.Function
        @staticmethod
        def _compiled_autograd_key(ctx):
            return (ctx._autograd_function_id,)

        @staticmethod
        def forward(ctx, keys, *args):
            # keys: the dispatch keys still to visit when the dispatcher called, None when `call` did.
            if keys is None:
                with _below_autograd():
                    output = op(*args)
            elif _functorch_active():
                # A Function runs with both modes off, but outer levels of functorch still need them.
                with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True), _below_autograd():
                    output = op.redispatch(keys & _AFTER_AUTOGRAD, *args)
            else:
                with _below_autograd():
                    output = op.redispatch(keys & _AFTER_AUTOGRAD, *args)
            rule.setup_context(ctx, args, output)
            return output

        @staticmethod
        def backward(ctx, *grad_outputs):
            needs = wanted(ctx, ctx.needs_input_grad[1:])
            saved = ctx.saved_tensors  # not below autograd: a checkpoint runs the forward pass again here
            if not torch.is_grad_enabled() and _is_plain_call():
                with _below_autograd():
                    grads = rule.backward(ctx, saved, needs, *grad_outputs)
            else:
                grads = rule.backward(ctx, saved, needs, *grad_outputs)
            return (None, *grads, *(None,) * (arguments - len(grads)))

        @staticmethod
        def jvp(ctx, _, *tangents):
            if not _functorch_active():
                return rule.jvp(ctx, ctx.saved_tensors, *tangents)
            # As in forward; and of what was saved, outer levels' tangents count, this level's have had their turn.
            with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
                saved = [forward_ad.unpack_dual(tensor, level=0).primal for tensor in ctx.saved_tensors]
                return rule.jvp(ctx, saved, *tangents)

    # What a profiler and grad_fn print: Conv2d and Conv2dBackward, as torch has ConvolutionBackward0.
    name = rule.__name__.strip("_").removesuffix("Rule")
    Node.__name__ = Node.__qualname__ = name
    Node._backward_cls.__name__ = Node._backward_cls.__qualname__ = f"{name}Backward"
    apply = Node.apply  # type: ignore[attr-defined]

    def autograd_kernel(keys, *args):
        if _functorch_active():
            with enable_single_level_autograd_function():
                return apply(keys, *args)
        if forward_ad._current_level >= 0 or (torch.is_grad_enabled() and _any_requires_grad(*args[:tensors])):
            return apply(keys, *args)
        with _below_autograd():
            return op.redispatch(keys & _AFTER_AUTOGRAD, *args)

    LIBRARY.impl(op._opname, autograd_kernel, "Autograd", with_keyset=True)
    torch.library.register_vmap(op._name, rule.vmap, lib=LIBRARY)

    def call(*args):
        if not _is_plain_call():
            return op(*args)
        if torch.is_grad_enabled() and _any_requires_grad(*args[:tensors]):
            return apply(None, *args)
        with _below_autograd():
            return op(*args)

    call.op = op  # type: ignore[attr-defined]
    return call


def attach_first(op, recorded):
    """Let the derivatives of `op` be those of `recorded`, of which it is the first output, and return the function that calls it.

    `recorded`, an operator that has a rule, also returns what backward needs: it is called only where a derivative is asked for.
    """
    recorded_op, tensors = recorded.op, _leading_tensors(op)

    def autograd_kernel(keys, *args):
        asked = torch.is_grad_enabled() and _any_requires_grad(*args[:tensors])
        if asked or _functorch_active() or forward_ad._current_level >= 0:
            return recorded_op(*args)[0]
        with _below_autograd():
            return op.redispatch(keys & _AFTER_AUTOGRAD, *args)

    LIBRARY.impl(op._opname, autograd_kernel, "Autograd", with_keyset=True)

    def vmap(info, in_dims, input, *options):
        return unfold_batch(op(fold_batch(input, in_dims[0], info.batch_size), *options), info.batch_size), 0

    torch.library.register_vmap(op._name, vmap, lib=LIBRARY)

    def call(*args):
        if not _is_plain_call():
            return op(*args)
        if torch.is_grad_enabled() and _any_requires_grad(*args[:tensors]):
            return recorded(*args)[0]
        with _below_autograd():
            return op(*args)

    return call


def autocast(op, key, dtype_of):
    """Under the autocast dispatch key `key`, call `op` with its float tensors (not float64) in ``dtype_of()``."""
    keyset = _C.DispatchKeySet(getattr(_C.DispatchKey, key))

    def autocast_kernel(keys, *args):
        dtype = dtype_of()
        cast = [
            x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() and x.dtype != torch.float64 else x for x in args
        ]
        with _C._ExcludeDispatchKeyGuard(keyset):
            return op(*cast)

    LIBRARY.impl(op._opname, autocast_kernel, key, with_keyset=True)


def has_kernel(op_name, key):
    """Whether an operator, "torchcnn::conv2d" say, has a kernel of its own under a dispatch key."""
    return _C._dispatch_has_kernel_for_dispatch_key(op_name, key)


def is_channels_last(*tensors):
    """Whether any of the 4-D tensors has the strides that torch calls channels_last."""
    for tensor in tensors:
        _, channel, _, column = tensor.stride()
        # The whole rule is slow. A tensor of one channel is contiguous in both formats: its strides tell them apart.
        if channel <= column and suggest_memory_format(tensor) is torch.channels_last:
            return True
    return False


def check_fake(op, check, *options, bias=None, **tensors):
    """What an operator checks before it computes, for its fake kernel: ranks, dtypes, and sizes by a function of csrc/geometry.h.

    Of a symbolic size its value in the example counts, without a guard; where one has none yet, the operator itself will check.
    """
    (first_name, first), *others = tensors.items()
    for name, tensor in tensors.items():
        if tensor.dim() != 4:
            raise RuntimeError(f"{op}: {name} must have 4 dimensions, got shape {list(tensor.shape)}")
    for name, tensor in [*others, *([] if bias is None else [("bias", bias)])]:
        if tensor.dtype != first.dtype:
            raise RuntimeError(f"{op}: {first_name} and {name} must have the same dtype, got {first.dtype} and {tensor.dtype}")
    known = [
        (size.node.hint if size.node.has_hint() else None) if isinstance(size, torch.SymInt) else size
        for size in (*(size for tensor in tensors.values() for size in tensor.shape), *options)
    ]
    if None in known:
        return
    try:
        check(op, *known)
    except ValueError as error:
        raise RuntimeError(str(error)) from None


def empty_activation(like, sizes, channels_last, dtype=None):
    """What an operator's fake kernel returns: a tensor of the sizes, layout and dtype of the real one."""
    if like.device.type != "meta" and not isinstance(like, FakeTensor):
        # The dispatcher takes the fake kernel as soon as one tensor is a meta tensor.
        raise RuntimeError(f"torchcnn: tensors must be on the same device, got {like.device} and meta")
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(sizes, dtype=dtype or like.dtype, device=like.device, memory_format=layout)


def fold_batch(tensor, dim, batch_size):
    """(..., B, ...) -> (B * N, C, H, W): a vmapped dimension becomes part of the batch."""
    tensor = tensor.expand(batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return tensor.reshape(batch_size * tensor.shape[1], *tensor.shape[2:])


def unfold_batch(tensor, batch_size):
    """The inverse of `fold_batch`; the vmapped dimension is the first."""
    return tensor.reshape(batch_size, tensor.shape[0] // batch_size, *tensor.shape[1:])
