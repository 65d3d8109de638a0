"""Decoders and towers of Hugging Face, read and written, against transformers.

Each test with a ``format`` mark is a row of the table in docs/checkpoints.md.
"""

import pytest
import torch
import transformers
from checkpoint.parity import assert_close, random_tokens
from hf import (
    VISION,
    clip_tower,
    fused_model,
    llama,
    random_llama_config,
    random_tower_config,
    shake,
    whole_clip,
)
from transformers import (
    AutoModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from torchfuse import export, from_pretrained, load_pretrained, save_pretrained

pytestmark = pytest.mark.usefixtures("no_grad")

SEEDS = [*range(3), *(pytest.param(seed, marks=pytest.mark.long) for seed in range(3, 20))]


def save_tower(folder, tower_class, config):
    torch.manual_seed(43)
    tower = tower_class(config).eval()
    shake(tower)
    tower.save_pretrained(folder)
    return tower


def random_pixels(config, rows=2):
    return torch.randn(rows, 3, config.image_size, config.image_size)


@pytest.mark.format(
    "Llama 2, 3, 3.1, 3.2",
    "in and out",
    "logits within 1e-4 in fp32, random small configurations: grouped queries, tied, rope scaling",
)
@pytest.mark.parametrize("seed", SEEDS)
def test_llama(pretrained, tmp_path, seed):
    config = random_llama_config(seed)
    hf_model = llama(tmp_path / "llama", **config, shard=("5GB", "9KB")[seed % 2])
    assert (tmp_path / "llama" / "model.safetensors.index.json").exists() == bool(seed % 2)
    folders = pretrained | {"decoder": tmp_path / "llama"}
    tokens = random_tokens(config["vocab_size"], length=61)  # longer than the unscaled context
    expected = hf_model(tokens).logits
    assert_close(from_pretrained(**folders, every=2).eval()(tokens), expected)
    base = from_pretrained(**folders, arch="joint_decoder", placement="prefix").eval()
    export(base.decoder, tmp_path / "out", format="llama")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(again(tokens).logits, expected)
    assert again.config.tie_word_embeddings == config["tie_word_embeddings"]


@pytest.mark.parametrize("arch", ["cross_attention", "joint_decoder"])
def test_text_logits_of_a_fused_model_are_the_decoders(pretrained, arch):
    options = {"every": None, "encoder_token": 40} if arch == "joint_decoder" else {"every": 1}
    model = fused_model(arch=arch, fusion_vocab_size=2, **options).eval()
    load_pretrained(model, **pretrained)
    alone = fused_model().eval()
    load_pretrained(alone, decoder=pretrained["decoder"])
    tokens = random_tokens(37)
    assert torch.equal(model(tokens), alone.decoder(tokens))


@pytest.mark.format(
    "CLIP vision towers", "in and out", "features of any layer within 1e-4, random small ones"
)
@pytest.mark.parametrize("seed", SEEDS)
def test_clip(pretrained, tmp_path, seed):
    config = CLIPVisionConfig(**random_tower_config(seed), hidden_act=("quick_gelu", "gelu")[seed % 2])
    hf_tower = save_tower(tmp_path / "clip", CLIPVisionModel, config)
    folders, layer = pretrained | {"encoder": tmp_path / "clip"}, seed % (config.num_hidden_layers + 1)
    images = random_pixels(config)
    expected = hf_tower(images, output_hidden_states=True).hidden_states[layer]
    for keep_cls in (True, False):
        model = from_pretrained(**folders, every=3, feature_layer=layer, keep_cls=keep_cls).eval()
        assert_close(model.encoder(images), expected if keep_cls else expected[:, 1:])
    export(model.encoder, tmp_path / "out", format="clip")
    again = AutoModel.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(again(images, output_hidden_states=True).hidden_states[layer], expected)


@pytest.mark.parametrize("keys", ["old", "whole"])
def test_clip_with_the_keys_of_older_files_and_of_whole_models(tmp_path, keys):
    tower = clip_tower(tmp_path, old=True) if keys == "old" else whole_clip(tmp_path).vision_model
    model = fused_model().eval()
    load_pretrained(model, encoder=tmp_path)
    images = torch.randn(4, 3, 12, 12)
    expected = tower(images, output_hidden_states=True).hidden_states[-2][:, 1:]
    assert_close(model.encoder(images), expected)
    assert_close(model.encoder(images.view(2, 2, 3, 12, 12)), expected.reshape(2, -1, 20))


@pytest.mark.format(
    "SigLIP towers, and others of transformers",
    "in and out",
    "features to the bit, random small ones",
)
@pytest.mark.parametrize("seed", SEEDS)
def test_siglip(pretrained, tmp_path, seed):
    config = SiglipVisionConfig(**random_tower_config(seed))
    hf_tower = save_tower(tmp_path / "siglip", SiglipVisionModel, config)
    folders = pretrained | {"encoder": tmp_path / "siglip"}
    model = from_pretrained(**folders, every=3, feature_layer=-2).eval()
    images = random_pixels(config)
    expected = hf_tower(images, output_hidden_states=True)
    assert torch.equal(model.encoder(images=images), expected.hidden_states[-2])
    export(model.encoder, tmp_path / "out", format="hf")
    again = AutoModel.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(again(images).last_hidden_state, expected.last_hidden_state)


def siglip_whole():
    config = transformers.SiglipConfig(
        text_config={"hidden_size": 16, "intermediate_size": 19, "num_hidden_layers": 1}
        | {"num_attention_heads": 2, "vocab_size": 11},
        vision_config=VISION,
    )
    return transformers.SiglipModel(config), lambda whole: whole.vision_model


def siglip2():
    config = transformers.Siglip2VisionConfig(**VISION, num_patches=9)
    return transformers.Siglip2VisionModel(config), lambda tower: tower


def dinov2_classifier():
    config = transformers.Dinov2Config(
        hidden_size=12, num_hidden_layers=2, num_attention_heads=2, image_size=12, patch_size=4
    )
    return transformers.Dinov2ForImageClassification(config), lambda whole: whole.dinov2


def vit():
    config = transformers.ViTConfig(**VISION, hidden_dropout_prob=0.0)
    return transformers.ViTModel(config), lambda tower: tower


def whisper():
    config = transformers.WhisperConfig(
        d_model=12, encoder_layers=2, decoder_layers=1, encoder_attention_heads=2, num_mel_bins=7
    )
    config.update({"decoder_attention_heads": 2, "encoder_ffn_dim": 19, "decoder_ffn_dim": 17})
    config.update({"max_source_positions": 11, "vocab_size": 23, "pad_token_id": 1})
    config.update({"bos_token_id": 2, "eos_token_id": 3, "decoder_start_token_id": 2})
    whole = transformers.WhisperForConditionalGeneration(config)
    return whole, lambda whole: whole.model.encoder


PIXELS = {"pixel_values": torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(9))}
TOWERS = {
    "siglip_whole": (siglip_whole, PIXELS, {}),
    "siglip2": (
        siglip2,
        {
            "pixel_values": PIXELS["pixel_values"].reshape(2, 9, 48),
            "pixel_attention_mask": torch.ones(2, 9, dtype=torch.long),
            "spatial_shapes": torch.tensor([[3, 3], [3, 3]]),
        },
        {},
    ),
    "dinov2_classifier": (dinov2_classifier, PIXELS, {"keep_cls": True}),
    "vit": (vit, PIXELS, {"keep_cls": True}),
    "whisper": (whisper, {"input_features": torch.ones(2, 7, 22).cumsum(-1) / 22}, {}),
}


@pytest.mark.format(
    "SigLIP 2, DINOv2, ViT, Whisper; towers inside whole models",
    "in",
    "features to the bit; through torchfuse's own directories too",
)
@pytest.mark.parametrize("kind", TOWERS)
def test_towers_of_transformers(pretrained, tmp_path, kind):
    make, inputs, options = TOWERS[kind]
    torch.manual_seed(47)
    whole, tower_of = make()
    shake(whole.eval())
    whole.save_pretrained(tmp_path / "tower")
    folders = pretrained | {"encoder": tmp_path / "tower"}
    model = from_pretrained(**folders, every=3, **options).eval()
    expected = tower_of(whole)(**inputs).last_hidden_state
    assert expected.std() > 0.01
    assert torch.equal(model.encoder(**inputs), expected)
    save_pretrained(model, tmp_path / "own")
    again = from_pretrained(tmp_path / "own").eval()
    assert torch.equal(again.encoder(**inputs), expected)
