"""Pretrained checkpoints give the numbers that transformers gives, in fp32 within 1e-4."""

import pytest
import torch
from hf import clip_tower, fused_model, llama, whole_clip
from support import text

from torchfuse import load_pretrained


def close(got, expected):
    assert expected.abs().max() > 0.5  # there is something to compare
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
@pytest.mark.parametrize("shard", ["5GB", "9KB"])
def test_llama(tmp_path, tied, kv_heads, shard):
    theirs = llama(tmp_path, shard=shard, tie_word_embeddings=tied, num_key_value_heads=kv_heads)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard == "9KB")
    model = fused_model(tie_word_embeddings=tied, num_kv_heads=kv_heads).eval()
    load_pretrained(model, decoder=tmp_path)
    tokens = text(3, 47)
    with torch.no_grad():
        close(model(tokens), theirs(tokens).logits)


def test_llama_with_scaled_rope(tmp_path):
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    theirs = llama(tmp_path, rope_parameters=rope, max_position_embeddings=131_072)
    model = fused_model(rope_base=500_000, rope_scale_factor=32).eval()
    load_pretrained(model, decoder=tmp_path)
    tokens = text(2, 47)
    with torch.no_grad():
        close(model(tokens), theirs(tokens).logits)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("layer", [-1, -2, 1, 0])
@pytest.mark.parametrize("keep_cls", [False, True])
def test_clip_tower(tmp_path, activation, layer, keep_cls):
    theirs = clip_tower(tmp_path, hidden_act=activation)
    model = fused_model(vision_activation=activation, feature_layer=layer, keep_cls=keep_cls).eval()
    load_pretrained(model, encoder=tmp_path)
    images = torch.randn(4, 3, 12, 12)
    with torch.no_grad():
        hidden = theirs(images, output_hidden_states=True).hidden_states[layer]
        expected = hidden if keep_cls else hidden[:, 1:]
        close(model.encoder(images), expected)
        rows = model.encoder(images.view(2, 2, 3, 12, 12))
    close(rows, expected.reshape(2, -1, 20))


@pytest.mark.parametrize("spelling", ["old", "whole"])
def test_clip_in_its_other_spellings(tmp_path, spelling):
    old = spelling == "old"
    vision = clip_tower(tmp_path, old=True) if old else whole_clip(tmp_path).vision_model
    model = fused_model().eval()
    load_pretrained(model, encoder=tmp_path)
    images = torch.randn(4, 3, 12, 12)
    with torch.no_grad():
        hidden = vision(images, output_hidden_states=True).hidden_states[-2]
        close(model.encoder(images), hidden[:, 1:])


def test_both_at_once_and_text_to_the_bit(tmp_path):
    """The fused model's text-only logits equal the language model's, loaded on its own, bit for bit."""
    llama(tmp_path / "llama")
    clip_tower(tmp_path / "clip")
    for options in (
        {"every": 1, "fusion_vocab_size": 2},
        {"arch": "joint_decoder", "encoder_token": 40, "every": None},
    ):
        model = fused_model(**options).eval()
        load_pretrained(model, decoder=tmp_path / "llama", encoder=tmp_path / "clip")
        alone = fused_model().eval()
        load_pretrained(alone, decoder=tmp_path / "llama")
        with torch.no_grad():
            assert torch.equal(model(text()), alone.decoder(text()))
