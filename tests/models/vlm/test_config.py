"""A model from configurations, typed or as mappings; what does not fit is named before it is built."""

import re

import pytest
import torch
from support import IMAGE, VOCAB, text

from torchfuse import get_fusion_params
from torchfuse.models import (
    AdapterConfig,
    ModelConfig,
    VisionEncoderConfig,
    VLMConfig,
    build_modality_strategy,
    build_vlm_wrapper,
)
from torchfuse.params import FreezeSpec, FreezeStage

MODEL = {
    "vocab_size": VOCAB,
    "num_layers": 2,
    "num_heads": 3,
    "num_kv_heads": 1,
    "embed_dim": 18,
    "max_seq_len": 31,
    "intermediate_dim": 29,
}
VISION = {"type": "random", "num_tokens": 4, "feature_dim": 11}
CLIP = {
    "type": "clip",
    "options": {"image_size": 8, "patch_size": 4, "embed_dim": 10, "num_layers": 2, "num_heads": 5},
}
ARCHS = {
    "cross_attention": {"every": 1},
    "joint_decoder": {"encoder_token": IMAGE},
    "mot": {"start": "zero"},
    "moma": {"num_experts": 2},
    "deepstack": {"hidden_dim": 7},
}


def build(vlm, *, model=MODEL, vision=VISION, adapter=None):
    return build_vlm_wrapper(model, vision, adapter or {"type": "linear"}, vlm)


@pytest.mark.parametrize("arch", ARCHS)
def test_typed_and_plain_configurations_build_the_same(arch):
    model = build({"arch": arch, "max_text_len": 13, **ARCHS[arch]})
    own = {name: value for name, value in ARCHS[arch].items() if name != "every"}
    assert model.strategy == build_modality_strategy(arch, **own)
    typed = build_vlm_wrapper(
        ModelConfig(**MODEL),
        VisionEncoderConfig(**VISION),
        AdapterConfig("linear"),
        VLMConfig(arch, own, max_text_len=13, every=ARCHS[arch].get("every")),
    )
    assert typed.strategy == model.strategy
    assert list(typed.state_dict()) == list(model.state_dict())
    tokens = text()
    tokens[:, 1:5] = IMAGE if arch == "joint_decoder" else tokens[:, 1:5]
    logits, _ = model(torch.randn(2, 3, 8, 8), tokens)
    assert logits.shape == (2, 13, VOCAB)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(get_fusion_params(model))


def test_a_joint_decoder_without_a_token_puts_features_in_front():
    model = build({"arch": "joint_decoder"}).eval()
    images = torch.randn(2, 3, 8, 8)
    embeds = torch.cat([model.encode({"images": images}), model.tok_embeddings(text())], dim=1)
    hidden = embeds
    for layer in model.layers:
        hidden = layer(hidden)
    expected = model.transformer.unembed(hidden[:, 4:])
    torch.testing.assert_close(model(images, text())[0], expected, rtol=1e-5, atol=1e-5)


def test_options_of_an_architecture_may_be_beside_it_and_below_options():
    model = build({"arch": "mot", "options": {"start": "zero"}, "layers": [0]})
    assert (model.strategy.start, model.strategy.layers) == ("zero", [0])


def test_fields_that_are_passed_to_fuse():
    more = {"fusion_vocab_size": 2, "on_missing": "participate", "every": 2}
    model = build({"arch": "mot", **more}, vision={**VISION, "num_frames": 3})
    assert model.tok_embeddings.fusion_embedding.weight.shape == (2, 18)
    assert model.on_missing == "participate"
    assert [hasattr(layer, "fusion_layer") for layer in model.layers] == [False, True]
    assert (model.num_frames, model.num_image_tokens) == (3, 12)
    assert build({"arch": "mot"}).on_missing == "skip"


def test_freeze_specs_and_stages():
    stages = [{"start_step": 3, "specs": [{"module": "decoder", "frozen": False}]}]
    config = VLMConfig(
        "mot",
        freeze=[FreezeSpec("fusion", True), {"module": "adapter", "frozen": False}],
        freeze_schedule=stages,
    )
    model = build(config)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    assert names == ["adapter.linear.weight", "adapter.linear.bias"]
    assert config.schedule.apply(model, 3)
    assert model.transformer.tok_embeddings.weight.requires_grad
    staged = VLMConfig("mot", freeze_schedule=[FreezeStage(0, (FreezeSpec("encoder", True),))])
    assert [stage.start_step for stage in staged.schedule] == [0]
    with pytest.raises(ValueError, match="stage at step 0: 'encodr' matches no parameter"):
        build(VLMConfig("mot", freeze=[FreezeSpec("encodr", True)]))
    with pytest.raises(ValueError, match="Nothing trains from step 5 on"):
        build(VLMConfig("mot", freeze_schedule=[FreezeStage(5, (FreezeSpec("*", True),))]))


@pytest.mark.parametrize(
    ("vlm", "complaint"),
    [
        (5, "vlm must be a VLMConfig or a mapping of its fields, got 5"),
        ({"options": {}}, "vlm: missing option 'arch'; it takes arch, options, max_text_len"),
        ({"arch": "mtt"}, "vlm: Unknown architecture 'mtt'; there are cross_attention, deepst"),
        ({"start": "zero"}, "unknown option 'start', missing option 'arch'"),
        (
            {"arch": "mot", "qk_norm": True},
            "vlm: architecture 'mot': unknown option 'qk_norm'; it takes placement, encoder_token, layers, "
            "start. Fields of vlm itself are arch, options, max_text_len",
        ),
        ({"arch": "mot", "start": "cold"}, "start must be 'warm' or 'zero', got 'cold'"),
        ({"arch": "moma", "capacity": 2.0}, "capacity must lie in (0, 1], got 2.0"),
        ({"arch": "mot", "options": None, "start": "zero"}, "options must be a mapping, got None"),
        (
            {"arch": "mot", "options": {"start": "warm"}, "start": "zero"},
            "vlm: start cannot be in options",
        ),
        ({"arch": "mot", "options": {"arch": "moma"}}, "'mot': unknown option 'arch'"),
        ({"arch": "mot", "options": {3: "warm"}}, "'mot': unknown option 3"),
        ({"arch": "mot", "every": 5}, "every=5 fuses no layer of this decoder, which has 2"),
        ({"arch": "deepstack", "every": 0}, "every=0 fuses no layer"),
        ({"arch": "mot", "max_text_len": -1}, "text_len=-1 must be at least 0"),
        ({"arch": "mot", "fusion_vocab_size": -1}, "must be at least 1, got -1"),
        ({"arch": "mot", "freeze": [{"module": "encoder"}]}, "vlm.freeze: missing option 'frozen'"),
        ({"arch": "mot", "freeze": "encoder"}, "vlm: freeze must be a list (each"),
        ({"arch": "mot", "freeze_schedule": [{"step": 3}]}, "must have the keys start_step and specs"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_vlm_section_that_does_not_fit_is_named(vlm, complaint):
    with pytest.raises(ValueError, match=re.escape(complaint)):
        build(vlm)


@pytest.mark.parametrize(
    ("section", "value", "complaint"),
    [
        ("model", {**MODEL, "depth": 3}, "model: unknown option 'depth'; it takes vocab"),
        (
            "model",
            {**MODEL, "num_layers": 0, "num_heads": -1, "norm_eps": -1.0, "rope_base": float("nan")},
            "num_layers=0 must be at least 1; num_heads=-1 must be at least 1; norm_eps=-1.0 must be finite "
            "and more than 0; rope_base=nan must be",
        ),
        ("model", {**MODEL, "num_heads": 5}, "num_heads=5 must divide embed_dim=18"),
        ("model", {**MODEL, "num_kv_heads": 2}, "num_kv_heads=2 must divide num_heads=3"),
        ("model", {**MODEL, "head_dim": 5}, "head_dim=5 must be even, as the rotary"),
        ("model", {**MODEL, "num_heads": 2}, "head_dim=9 must be even, as the rotary"),
        ("vision", {"type": "vit"}, "Unknown encoder 'vit'; there are clip, hf, random, siglip2"),
        ("vision", {**VISION, "num_frames": 0}, "num_frames=0 must be at least 1"),
        ("vision", {**VISION, "options": {"num_tokens": 3}}, "num_tokens cannot be in options"),
        ("vision", {**VISION, "options": {"name": "clip"}}, "vision_encoder: unknown option 'name'"),
        ("vision", {**VISION, "options": {"sede": 3}}, "encoder 'random': unknown option 'sede'"),
        (
            "vision",
            {**CLIP, "num_tokens": 5, "feature_dim": 7},
            "encoder 'clip': num_tokens is 5, the encoder's 4; feature_dim is 7, the encoder's 10",
        ),
        (
            "adapter",
            {"type": "conv"},
            "Unknown adapter 'conv'; there are attentional_pool, avgpool, lin",
        ),
        (
            "adapter",
            {"options": {"in_dim": 3, "name": "x"}},
            "adapter: unknown option 'in_dim', unknown option 'name'",
        ),
        ("adapter", {"options": {"num_tokens": 4}}, "adapter: num_tokens cannot be in options"),
        ("adapter", {"options": {"hidden_dim": 0}}, "mlp_2layer: hidden_dim=0 must be at least 1"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_section_that_does_not_fit_is_named(section, value, complaint):
    with pytest.raises(ValueError, match=re.escape(complaint)):
        build({"arch": "mot"}, **{section: value})


@pytest.mark.parametrize(
    ("kind", "given", "complaint"),
    [
        (
            VLMConfig,
            {"arch": ["mot"], "max_text_len": "4", "every": True, "on_missing": "wait"},
            "vlm: arch must be a string, got ['mot']; max_text_len must be an integer or null, got '4'; "
            "every must be an integer or null, got True; on_missing must be 'skip' or 'participate', got",
        ),
        (
            VisionEncoderConfig,
            {"type": "random", "num_tokens": "4"},
            "vision_encoder: num_tokens must be an integer or null, got '4'",
        ),
        (ModelConfig, {**MODEL, "vocab_size": "37"}, "model: vocab_size must be an integer, got '37'"),
        (
            AdapterConfig,
            {"type": None, "options": [3]},
            "type must be a string, got None; options must be a",
        ),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_types_are_checked_when_a_configuration_is_made(kind, given, complaint):
    with pytest.raises(ValueError, match=re.escape(complaint)):
        kind(**given)


@pytest.mark.parametrize(
    ("arch", "most", "needed"),
    [
        ("cross_attention", 31, "32 text tokens = 32"),
        ("joint_decoder", 31 - 12, "3 frames x 4 tokens + 20 text tokens = 32"),
        ("mot", 31 - 12, "3 frames x 4 tokens + 20 text tokens = 32"),
    ],
)
@pytest.mark.parametrize("vision", [VISION, CLIP], ids=["random", "clip"])
def test_lengths_are_compared_before_the_decoder_is_built(arch, most, needed, vision, monkeypatch):
    vlm, clips = {"arch": arch, **ARCHS[arch]}, {**vision, "num_frames": 3}
    assert build(vlm | {"max_text_len": most}, vision=clips)
    monkeypatch.setattr(ModelConfig, "build", lambda self: pytest.fail("built too early"))
    with pytest.raises(ValueError, match=re.escape(f"max_seq_len 31 is shorter than {needed}")):
        build(vlm | {"max_text_len": most + 1}, vision=clips)
