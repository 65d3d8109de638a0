"""LoRA in a fused model: names, values and outputs of the base stay; what is added trains, merges, is saved."""

import copy

import pytest
import torch
from hf import VISION
from models.architectures import ARCHS, every_arch, make, prompt
from support import FEATURE_DIM, TinyEncoder, inputs, open_gates, state, text, tiny_decoder
from torch import nn
from torchtune.modules.peft import DoRALinear, LoRALinear
from transformers import CLIPVisionConfig, CLIPVisionModel

from torchfuse import (
    ConfigError,
    ModelError,
    add_lora,
    describe,
    fuse,
    get_fusion_params,
    merge_lora,
    param_groups,
    quantize,
    set_trainable,
)
from torchfuse.encoders import HfEncoder
from torchfuse.params import FreezeSpec, apply_freeze_specs, partition
from torchfuse.quantization import dequantize

EVERY_PART = ("decoder", "encoder", "fusion")


@torch.no_grad()
def move_lora(model, scale=0.2):
    """Values for what starts at zero, and other magnitudes."""
    generator = torch.Generator().manual_seed(29)
    for name, parameter in model.named_parameters():
        if name.endswith(("lora_b.weight", "magnitude")):
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return model


def outputs(model, name="cross_attention"):
    with torch.no_grad():
        return model(prompt(name), encoder_input=inputs())


def deep(**options):
    return open_gates(fuse(tiny_decoder(), TinyEncoder(), every=2, **options)).eval()


@every_arch
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_every_architecture_starts_at_the_base_trains_and_merges(name, dora):
    model = make(name, encoder_trainable=False).eval()
    before, expected = state(model), outputs(model, name)
    parameters = dict(model.named_parameters())
    has_layers = ARCHS[name].get("arch") != "joint_decoder"
    names = add_lora(
        model, parts=EVERY_PART if has_layers else EVERY_PART[:2], rank=3, alpha=5.0, dora=dora
    )
    kind = DoRALinear if dora else LoRALinear
    assert names and all(type(model.get_submodule(n)) is kind for n in names)
    after = dict(model.named_parameters())
    assert all(after[n] is p for n, p in parameters.items())
    assert torch.equal(outputs(model, name), expected)

    move_lora(model)
    model(prompt(name), encoder_input=inputs()).square().mean().backward()
    lora = {part: ps for part, ps in partition(model).items() if part.startswith("lora")}
    assert len(lora) == 2 + has_layers
    assert all(p.grad.any() for p in lora["lora.decoder"].values())
    assert all(any(p.grad is not None and p.grad.any() for p in ps.values()) for ps in lora.values())
    assert all(p.grad is None for n, p in parameters.items() if not p.requires_grad)

    adapted = outputs(model, name)
    assert not torch.allclose(adapted, expected, atol=1e-2)
    assert merge_lora(model) == names
    torch.testing.assert_close(outputs(model, name), adapted, rtol=0, atol=1e-4)
    assert list(model.state_dict()) == list(before)
    assert all(type(model.get_submodule(n)) is nn.Linear for n in names)


def test_biases_are_those_of_the_merged_layer():
    layer = nn.Sequential(nn.Linear(5, 7))
    add_lora(layer, rank=2, alpha=3, targets=["0"], dora=True)
    move_lora(layer)
    x = torch.randn(3, 5)
    expected = layer(x)
    merge_lora(layer)
    torch.testing.assert_close(layer(x), expected)


def test_parts_and_rates():
    model = deep()
    add_lora(model, rank=3, alpha=6)
    add_lora(model, parts=["encoder"], rank=2, alpha=1.5)
    table = describe(model)
    assert [row.part for row in table] == [
        *("decoder", "encoder", "fusion", "lora.decoder", "lora.encoder", "total"),
    ]
    assert table["lora.encoder"].parameters == table["lora.encoder"].trainable == 2 * (5 + FEATURE_DIM)
    assert table["decoder"].trainable == table["encoder"].trainable == 0
    assert table["fusion"].trainable == table["fusion"].parameters
    groups = param_groups(model, lr={"fusion": 1e-5, "lora.decoder": 2e-4, "lora.encoder": 1e-4})
    assert {g["name"]: g["lr"] for g in groups}["lora.decoder"] == 2e-4
    lora = {n for n in get_fusion_params(model) if "lora" in n}
    assert lora == {n for n in dict(model.named_parameters()) if "lora" in n}

    set_trainable(model, fusion=False, lora=True)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == lora
    apply_freeze_specs(model, [FreezeSpec("lora.encoder", True), FreezeSpec("fusion", False)])
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n in get_fusion_params(model) if not n.startswith("encoder")}
    apply_freeze_specs(model, [FreezeSpec("decoder", False), FreezeSpec("lora", True)])
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {
        n for n in dict(model.named_parameters()) if "lora" not in n and "encoder" not in n
    }
    with pytest.raises(
        ConfigError, match=r"lora=True, but the model has no LoRA layers\. Call add_lora"
    ):
        set_trainable(deep(), lora=True)


def test_targets():
    model = deep()
    names = add_lora(model, rank=2, alpha=4, targets=["attn.q_proj", "layers.1.mlp.w?", "output"])
    assert names == [
        "decoder.layers.0.attn.q_proj",
        "decoder.layers.1.attn.q_proj",
        *(f"decoder.layers.1.mlp.{w}" for w in ("w1", "w2", "w3")),
        "decoder.layers.2.attn.q_proj",
        "decoder.output",
    ]
    model = deep()
    names = add_lora(model, rank=2, alpha=4, parts="fusion", targets="q_proj")
    assert names == ["decoder.layers.1.fusion_layer.attn.q_proj"]


def refused(match, model, kind=ConfigError, **options):
    before, classes = [id(p) for p in model.parameters()], [type(m) for m in model.modules()]
    trains = [p.requires_grad for p in model.parameters()]
    with pytest.raises(kind, match=match):
        add_lora(model, **{"rank": 2, "alpha": 4.0, **options})
    assert [id(p) for p in model.parameters()] == before
    assert [type(m) for m in model.modules()] == classes
    assert [p.requires_grad for p in model.parameters()] == trains


def test_mistakes_change_nothing():
    refused(r"no part 'eye'; the model has decoder, encoder, fusion", deep(), parts=["eye"])
    refused(
        r"'query', 'dense' match no linear layer; decoder has q_proj, k_proj, .*; encoder has 0",
        deep(),
        parts=["decoder", "encoder"],
        targets=["q_proj", "query", "dense"],
    )
    refused("targets is empty", deep(), targets=[])
    refused("name at least one part", deep(), parts=[])
    refused(
        r"rank must be .*got 0; alpha must be .*got 'x'; dropout must be .*got 1\.0; dora must be",
        deep(),
        rank=0,
        alpha="x",
        dropout=1.0,
        dora=1,
    )
    refused("quantize_base is for pretrained parts", deep(), parts=["fusion"], quantize_base=True)
    refused("0 is the model itself|is the model itself", nn.Linear(3, 5), ModelError, targets=["*"])
    model = deep()
    add_lora(model, rank=2, alpha=4, targets=["q_proj"])
    refused(r"has LoRA already; merge_lora.*: decoder\.layers\.0\.attn\.q_proj, ", model, ModelError)
    add_lora(model, rank=2, alpha=4, targets=["v_proj"])
    model = deep()
    quantize(model, "int8_weight_only")
    refused(r"is quantized \(int8\); LoRA needs a base .*: decoder\.layers\.0\.", model, ModelError)
    shared = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5))
    shared[1].weight = shared[0].weight
    refused(r"shares its weight with another layer: 0, 1", shared, ModelError, targets=["*"])
    empty = deep()
    with torch.no_grad():
        empty.layers[1].mlp.w2.weight[5] = 0
    refused(
        r"layers have rows of zeros; .*dora=False.*: decoder\.layers\.1\.mlp\.w2\.$",
        empty,
        ModelError,
        dora=True,
    )
    heads = nn.ModuleList([nn.MultiheadAttention(6, 2)])
    refused(r"is a NonDynamicallyQuantizableLinear", heads, ModelError, targets=["out_proj"])
    refused(r"decoder has no linear layer inside", nn.Sequential(nn.Linear(3, 3)))
    with pytest.raises(ModelError, match="has no LoRA layers to merge"):
        merge_lora(deep())


def wide(seed=0):
    """A model whose layers NF4's blocks fit."""
    decoder = tiny_decoder(seed, num_heads=4, num_kv_heads=4, embed_dim=128, intermediate_dim=256)
    return open_gates(fuse(decoder, TinyEncoder(), every=2)).eval()


@pytest.mark.parametrize("dora", [False, True], ids=["qlora", "qdora"])
def test_a_quantized_base(dora):
    model = wide()
    names = add_lora(model, rank=3, alpha=6, targets=["q_proj", "w1"], dora=dora, quantize_base=True)
    assert len(names) == 6
    assert describe(model)["decoder"].dtype == "float32, nf4"
    assert type(model.decoder.output.weight.detach()) is torch.Tensor
    expected = outputs(model)
    plain = copy.deepcopy(model)
    assert "decoder.layers.0.mlp.w2.weight" in dequantize(plain)
    torch.testing.assert_close(outputs(plain), expected, rtol=0, atol=1e-5)

    move_lora(model)
    model(text(), encoder_input=inputs()).square().mean().backward()
    assert all(p.grad.any() for n, p in model.named_parameters() if "lora_b" in n)
    adapted = outputs(model)
    merge_lora(model)
    assert {type(p.detach()) for p in model.parameters()} == {torch.Tensor}
    torch.testing.assert_close(outputs(model), adapted, rtol=0, atol=1e-4)


def test_a_decoder_of_torchtunes_builder_is_the_same():
    from torchtune.models.llama3_2 import lora_llama3_2

    sizes = {"vocab_size": 37, "num_layers": 3, "num_heads": 3, "num_kv_heads": 1, "embed_dim": 18}
    decoder = lora_llama3_2(
        ["q_proj"], max_seq_len=53, intermediate_dim=29, lora_rank=2, lora_alpha=3, **sizes
    )
    model = fuse(decoder, TinyEncoder(), every=2)
    assert describe(model)["lora.decoder"].trainable == 3 * 2 * (18 + 18)
    move_lora(open_gates(model).eval())
    expected = outputs(model)
    assert merge_lora(model) == [f"decoder.layers.{i}.attn.q_proj" for i in range(3)]
    torch.testing.assert_close(outputs(model), expected, rtol=0, atol=1e-4)


def test_a_tower_of_transformers():
    torch.manual_seed(5)
    tower = HfEncoder(CLIPVisionModel(CLIPVisionConfig(**VISION)), keep_cls=True)
    model = open_gates(fuse(tiny_decoder(), tower, every=2)).eval()
    side = VISION["image_size"]
    call = {"encoder_input": {"pixel_values": torch.randn(2, 3, side, side)}}
    with torch.no_grad():
        expected = model(text(), **call)
        names = add_lora(model, parts="encoder", rank=3, alpha=6)
        assert torch.equal(model(text(), **call), expected)
        assert len(names) == 6 * VISION["num_hidden_layers"]
        move_lora(model)
        adapted = model(text(), **call)
        assert not torch.allclose(adapted, expected, atol=1e-3)
        merge_lora(model)
        torch.testing.assert_close(model(text(), **call), adapted, rtol=0, atol=1e-4)
