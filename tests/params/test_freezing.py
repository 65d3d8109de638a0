import re

import pytest
import torch
from contract.views import WRAPPERS
from params.freeze_support import make, trains
from support import TinyEncoder, inputs, text, tiny_decoder
from torch import nn

from torchfuse import fuse, param_groups, quantize, set_trainable
from torchfuse.encoders.stub import RandomEncoder
from torchfuse.errors import ConfigError
from torchfuse.naming import named_parameters
from torchfuse.params import FreezeSpec, apply_freeze_specs, freeze_params, partition


def names(model, *parts):
    groups = partition(model)
    return [n for n, _ in named_parameters(model) if any(n in groups[part] for part in parts)]


def below(model, *prefixes):
    return [n for n, _ in named_parameters(model) if n.startswith(prefixes)]


def meant(model, *patterns):
    """What trains when only these patterns do."""
    apply_freeze_specs(model, [FreezeSpec("*", True), *(FreezeSpec(p, False) for p in patterns)])
    return trains(model)


# --- what a name means ---------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["decoder", "encoder", "fusion"])
def test_parts(part):
    model = make()
    assert meant(model, part) == names(model, part) != []


def test_everything():
    model = make()
    assert meant(model, "*") == [n for n, _ in named_parameters(model)]


def test_the_adapter_is_a_part_and_only_one_of_fusion():
    model = make()
    assert meant(model, "adapter") == below(model, "adapter.") != names(model, "fusion")


def test_module_prefixes_end_at_a_dot():
    model = fuse(tiny_decoder(num_layers=11), TinyEncoder(), every=11)
    assert meant(model, "decoder.layers.1") == below(model, "decoder.layers.1.")
    assert "decoder.layers.10.attn.q_proj.weight" in meant(model, "decoder.layers.10")


def test_a_pretrained_module_is_without_what_fusion_put_into_it():
    model = make()
    added = below(model, "decoder.layers.1.fusion_layer.")
    layer = below(model, "decoder.layers.1.")
    pretrained = [n for n in layer if n not in added]
    assert added and pretrained
    for pattern in ("decoder.layers.1", "decoder.layers.1*", "*.layers.[1]", "decoder.layers.?"):
        apply_freeze_specs(model, [FreezeSpec("*", False), FreezeSpec(pattern, True)])
        frozen = {n for n, p in named_parameters(model) if not p.requires_grad}
        assert set(pretrained) <= frozen, pattern
        assert not frozen & set(added), pattern
    assert meant(model, "decoder.layers.*") == [
        n for n in below(model, "decoder.layers.") if ".fusion_layer." not in n
    ]
    assert meant(model, "decoder.layers.1.fusion_layer") == added
    assert meant(model, "decoder.layers.*.fusion_layer") == added
    assert meant(model, "*.fusion_layer.attn") == [n for n in added if ".attn." in n]


def test_a_parameter_by_its_name():
    model = make()
    assert meant(model, "encoder.layers.1.linear.bias") == ["encoder.layers.1.linear.bias"]
    biases = [n for n, _ in named_parameters(model) if n.endswith(".bias")]
    assert meant(model, "*.bias") == biases


def test_named_encoders_by_part_and_by_canonical_name():
    model = fuse(tiny_decoder(), {"eye": TinyEncoder(), "ear": TinyEncoder()}, every=3)
    assert meant(model, "encoder") == below(model, "encoders.")
    assert meant(model, "encoder.eye") == meant(model, "encoders.eye") == below(model, "encoders.eye.")
    assert meant(model, "encoder.ear.layers.0") == below(model, "encoders.ear.layers.0.")
    assert meant(model, "encoder.e*") == below(model, "encoders.")
    assert meant(model, "adapter") == below(model, "adapters.")
    assert meant(model, "adapter.ear") == meant(model, "adapters.ear") == below(model, "adapters.ear.")


def test_a_model_without_parts_is_all_decoder():
    decoder = tiny_decoder()
    assert (
        meant(decoder, "layers.1") == meant(decoder, "decoder.layers.1") == below(decoder, "layers.1.")
    )
    assert meant(decoder, "decoder") == [n for n, _ in decoder.named_parameters()]


def test_a_shared_parameter_is_matched_by_each_of_its_names():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    assert meant(model, "1") == ["0.weight", "1.bias"]


# --- order ---------------------------------------------------------------------------------------


def test_later_specs_override_earlier_ones():
    top, all_of_it = FreezeSpec("encoder.layers.2", False), FreezeSpec("encoder", True)
    model = make(encoder_trainable=True)
    apply_freeze_specs(model, [all_of_it, top])
    assert [n for n in trains(model) if n.startswith("encoder.")] == below(model, "encoder.layers.2.")
    apply_freeze_specs(model, [top, all_of_it])
    assert not [n for n in trains(model) if n.startswith("encoder.")]


def test_what_no_spec_names_stays_as_it_is():
    for decoder in (True, False):
        model = make(decoder_trainable=decoder)
        before = trains(model)
        freeze_params(model, "encoder", frozen=False)
        freeze_params(model, "encoder")
        assert trains(model) == before


def test_freeze_params_is_the_simple_form():
    model = make(encoder_trainable=True)
    freeze_params(model, "encoder.patches", "encoder.layers.*")
    assert [n for n in trains(model) if n.startswith("encoder.")] == below(model, "encoder.norm.")
    with pytest.raises(ConfigError, match="Nothing to freeze: name at least one part or module"):
        freeze_params(model)


# --- the same through every wrapper --------------------------------------------------------------

SPECS = [
    FreezeSpec("*", True),
    FreezeSpec("encoder", False),
    FreezeSpec("encoder.layers.?.linear", True),
    FreezeSpec("encoder.layers.2", False),
    FreezeSpec("decoder.layers.1.attn.*", False),
    FreezeSpec("fusion", False),
    FreezeSpec("decoder.layers.1.fusion_layer.mlp", True),
]


@pytest.mark.parametrize("wrap", WRAPPERS[1:], ids=lambda w: w.__name__)
def test_specs_apply_under_compile_and_checkpointing(wrap):
    plain, wrapped = make(), wrap(make())
    for model in (plain, wrapped):
        apply_freeze_specs(model, SPECS)
    assert trains(wrapped) == trains(plain)
    assert 0 < len(trains(plain)) < len(list(plain.parameters()))
    assert [p.requires_grad for p in wrapped.parameters()] == [
        p.requires_grad for p in plain.parameters()
    ]


# --- gradients and modes -------------------------------------------------------------------------


def test_what_is_frozen_loses_its_gradient():
    model = make(encoder_trainable=True)
    model(text(), encoder_input=inputs()).square().mean().backward()
    assert all(p.grad is not None for p in model.encoder.parameters())
    freeze_params(model, "encoder.layers.1")
    assert all(p.grad is None for p in model.encoder.layers[1].parameters())
    assert all(p.grad is not None for p in model.encoder.layers[2].parameters())


def test_set_trainable_takes_gradients_away_too():
    model = make(encoder_trainable=True)
    model(text(), encoder_input=inputs()).square().mean().backward()
    set_trainable(model)
    assert all(p.grad is None for p in model.encoder.parameters())
    assert all(p.grad is not None for p in model.adapter.parameters())


def modes(model):
    return {n for n, m in model.encoder.named_modules() if m.training}


def test_train_keeps_frozen_modules_in_eval():
    model = make(dropout=0.5)
    everything = {n for n, _ in model.encoder.named_modules()}
    model.train()
    assert modes(model) == set()
    freeze_params(model, "encoder", frozen=False)
    assert modes(model) == everything
    freeze_params(model, "encoder.layers.1")
    for _ in range(2):
        below_1 = {n for n in everything if n.startswith("layers.1")}
        assert modes(model) == everything - below_1
        model.eval()
        assert modes(model) == set()
        model.train()
    freeze_params(model, "encoder")
    assert modes(model.train()) == set()
    model.eval()
    freeze_params(model, "encoder", frozen=False)
    assert modes(model) == set()  # unfreezing starts no training mode
    assert modes(model.train()) == everything


def test_dropout_of_a_frozen_layer_does_nothing_while_others_train():
    model = make(dropout=0.5).train()
    freeze_params(model, "encoder.patches", "encoder.norm", frozen=False)

    def twice():
        return [model.encoder(**inputs()) for _ in range(2)]

    one, other = twice()
    assert one.requires_grad
    assert torch.equal(one, other)
    freeze_params(model, "encoder.layers.0", frozen=False)
    one, other = twice()
    assert not torch.equal(one, other)


def test_an_encoder_without_parameters_stays_in_evaluation():
    model = fuse(tiny_decoder(), RandomEncoder(5, 11), every=3, decoder_trainable=True).train()
    assert not list(model.encoder.parameters())
    assert model.decoder.training
    assert not model.encoder.training


# --- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "frozen", "complaint"),
    [
        ("", True, "module '' has an empty component"),
        ("encoder.", True, "module 'encoder.' has an empty component; write a name such as \"encoder\""),
        ("encoder..norm", True, "has an empty component"),
        (" encoder", True, "module ' encoder' has spaces around it"),
        ("encoder.layers.[01", True, "has unpaired brackets"),
        ("encoder.layers.01]", True, "has unpaired brackets"),
        ("encoder.layers.[]", True, "has unpaired brackets"),
        (None, True, "module must be a string, got None"),
        ("encoder", "yes", "frozen must be true (freeze) or false (let train), got 'yes'"),
        ("encoder", 1, "frozen must be true (freeze) or false (let train), got 1"),
    ],
)
def test_bad_patterns_are_refused_when_the_spec_is_made(module, frozen, complaint):
    with pytest.raises(ConfigError, match="^FreezeSpec: .*" + re.escape(complaint)):
        FreezeSpec(module, frozen)


def test_all_problems_of_a_spec_are_one_error():
    with pytest.raises(ConfigError, match=r"empty component.*; frozen must be true"):
        FreezeSpec("a..b", None)


def test_specs_that_match_nothing_are_all_named_and_nothing_changes():
    model = make()
    model(text(), encoder_input=inputs()).square().mean().backward()
    before = trains(model), {n: p.grad for n, p in model.named_parameters()}
    specs = [
        FreezeSpec("fusion", True),
        FreezeSpec("encodr", False),
        FreezeSpec("encoder.layers.7", False),
        FreezeSpec("encoder.layers.*.mlp", False),
        FreezeSpec("decoder.layers.1.fusion_layer.atn", False),
    ]
    with pytest.raises(ConfigError, match="nothing has changed") as caught:
        apply_freeze_specs(model, specs)
    for problem in (
        "'encodr' matches no parameter; the model has decoder, encoder, fusion, adapter",
        "'encoder.layers.7' matches no parameter; encoder.layers has 0, 1, 2",
        "'encoder.layers.*.mlp' matches no parameter; encoder.layers has 0, 1, 2",
        "'decoder.layers.1.fusion_layer.atn' matches no parameter; decoder.layers.1.fusion_layer has attn",
    ):
        assert problem in str(caught.value)
    assert "'fusion'" not in str(caught.value)
    assert trains(model) == before[0]
    assert all(p.grad is before[1][n] for n, p in model.named_parameters())


def test_a_module_that_is_all_fusions_is_no_part_where_there_is_none():
    with pytest.raises(ConfigError, match="'fusion' matches no parameter; the model has decoder"):
        freeze_params(tiny_decoder(), "fusion")


def test_quantized_weights_cannot_be_let_train():
    model = make()
    quantize(model, "int8_weight_only")
    before = trains(model)
    with pytest.raises(
        ConfigError, match=r"quantized weights and integers cannot train.*q_proj\.weight"
    ):
        freeze_params(model, "decoder", frozen=False)
    assert trains(model) == before
    apply_freeze_specs(model, [FreezeSpec("decoder", True), FreezeSpec("fusion", False)])
    assert param_groups(model, lr=1.0)[0]["name"] == "fusion"
