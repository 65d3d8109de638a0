import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from torchfuse.naming import canonical_name, named_parameters, unwrap


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        ("layers.0.attn.weight", "layers.0.attn.weight"),
        ("_orig_mod.layers.0.weight", "layers.0.weight"),
        ("layers.0._checkpoint_wrapped_module.weight", "layers.0.weight"),
        ("_fsdp_wrapped_module._orig_mod.a._checkpoint_wrapped_module.b", "a.b"),
        # Only whole components are foreign.
        ("my_orig_mod.weight", "my_orig_mod.weight"),
        ("module.weight", "module.weight"),
    ],
)
def test_canonical_name(name, canonical):
    assert canonical_name(name) == canonical


def test_unwrap_peels_every_wrapper():
    linear = nn.Linear(3, 5)
    assert unwrap(linear) is linear
    assert unwrap(torch.compile(checkpoint_wrapper(linear))) is linear
    assert unwrap(nn.DataParallel(linear)) is linear


def test_named_parameters_are_the_same_in_and_out_of_wrappers():
    def make():
        return nn.Sequential(nn.Linear(3, 5), nn.Sequential(nn.Linear(5, 7)))

    plain = [name for name, _ in make().named_parameters()]
    wrapped = make()
    wrapped[1] = checkpoint_wrapper(wrapped[1])
    assert [name for name, _ in named_parameters(torch.compile(wrapped))] == plain
