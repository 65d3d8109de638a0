import pytest
import torch
from support import IMAGE, TinyEncoder, tiny_decoder
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers import Trainer

from torchfuse import fuse, get_fusion_params
from torchfuse.naming import canonical_name, named_parameters, unwrap


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        ("layers.0.attn.weight", "layers.0.attn.weight"),
        ("_orig_mod.layers.0.weight", "layers.0.weight"),
        ("layers.0._checkpoint_wrapped_module.weight", "layers.0.weight"),
        ("_fsdp_wrapped_module._orig_mod.a._checkpoint_wrapped_module.b", "a.b"),
        # Only whole components are removed.
        ("my_orig_mod.weight", "my_orig_mod.weight"),
        ("module.weight", "module.weight"),
    ],
)
def test_canonical_name(name, canonical):
    assert canonical_name(name) == canonical


def test_unwrap_removes_every_wrapper():
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


def architecture(name):
    options = {"every": 2} if name == "cross_attention" else {"encoder_token": IMAGE}
    return fuse(tiny_decoder(), TinyEncoder(), arch=name, **options)


every_architecture = pytest.mark.parametrize(
    "name", ["cross_attention", "joint_decoder", "mot", "moma", "deepstack"]
)


@every_architecture
def test_trainer_decays_the_same_tensors_as_in_the_plain_decoder(name):
    decoder = architecture(name).decoder
    decayed = Trainer.get_decay_parameter_names(None, decoder)
    pretrained = [n for n in decayed if n not in get_fusion_params(decoder)]
    assert pretrained == Trainer.get_decay_parameter_names(None, tiny_decoder())
    assert len(pretrained) > 20
    assert {n for n in decayed if "fusion_layer" in n} <= get_fusion_params(decoder).keys()


@every_architecture
def test_children_have_the_names_of_the_plain_layer_and_recursions_reach_every_module(name):
    model, plain = architecture(name), tiny_decoder()
    for layer, reference in zip(model.layers, plain.layers, strict=True):
        children = [n for n, _ in layer.named_children()]
        assert children == [n for n, _ in reference.named_children()] + ["fusion_layer"] * (
            "fusion_layer" in layer._modules
        )
        assert all(layer.get_submodule(n) is child for n, child in layer.named_children())
        names = [n for n, _ in layer.named_modules(remove_duplicate=False) if n]
        assert set(names) >= {n for n, _ in reference.named_modules(remove_duplicate=False) if n}
    visited = []
    model.apply(visited.append)
    assert set(visited) == set(model.modules())
    model.double().requires_grad_(True).train()
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert all(m.training for m in model.modules())
    assert not any(m.training for m in model.eval().modules())
    assert all(p.is_meta for p in model.to("meta").parameters())


@every_architecture
def test_torchao_filters_by_the_names_of_the_plain_decoder(name):
    def filtered(decoder):
        names = []
        quantize_(decoder, Int8WeightOnlyConfig(), lambda _, name: names.append(name) or False)
        return names

    names = filtered(architecture(name).decoder)
    assert [n for n in names if "fusion_layer" not in n] == filtered(tiny_decoder())
