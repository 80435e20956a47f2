"""What the binding takes from torch's private side; a new torch that lacks one of these is told here by name."""

import pkgutil
import re
from pathlib import Path

import pytest

AUTOGRAD = Path(__file__).resolve().parents[1] / "torchcnn" / "_autograd.py"
NAMES = """
    torch._C: _AutoDispatchBelowAutograd _are_functorch_transforms_active _is_any_autocast_enabled _any_requires_grad
        _after_autograd_keyset _dispatch_has_kernel_for_dispatch_key _ExcludeDispatchKeyGuard DispatchKeySet DispatchKey
        _will_engine_execute_node _current_graph_task_id _functions
    torch._C._functions: AccumulateGrad
    torch._functorch.utils: enable_single_level_autograd_function
    torch._prims_common: suggest_memory_format
    torch._subclasses.fake_tensor: FakeTensor
    torch.autograd.forward_ad: _current_level _set_fwd_grad_enabled unpack_dual
    torch.autograd.function: _SingleLevelFunction
    torch.utils._python_dispatch: TorchDispatchMode
    torch.nn.modules.pooling: _MaxPoolNd
"""
OWNERS = {owner: names.split() for owner, names in re.findall(r"(\S+): ((?:[\w]+\s+)+)(?=\S+:|$)", NAMES)}


@pytest.mark.parametrize("owner", OWNERS)
def test_private_names_are_there(owner):
    module = pkgutil.resolve_name(owner)
    assert [name for name in OWNERS[owner] if not hasattr(module, name)] == []


def test_the_list_is_complete():
    """Every name that _autograd.py takes from torch._C or forward_ad, and every import of a private module."""
    text = AUTOGRAD.read_text()
    assert set(re.findall(r"(?<!torchcnn import )\b_C\.(\w+)", text)) <= set(OWNERS["torch._C"])
    assert set(re.findall(r"\bforward_ad\.(\w+)", text)) <= set(OWNERS["torch.autograd.forward_ad"])
    for owner, name in re.findall(r"^from (torch\.\S*) import (\w+)", text, re.MULTILINE):
        if "._" in owner or name.startswith("_"):
            assert name in OWNERS[owner]
