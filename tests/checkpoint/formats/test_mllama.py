"""Directories of Llama 3.2 Vision, read and written, against transformers."""

import pytest
import torch
from checkpoint.parity import assert_close, random_images, random_tokens, scaled_rope
from hf import MLLAMA_TEXT, drop_attention_without_images, edit, mllama
from transformers import MllamaForConditionalGeneration

from torchfuse import export, from_pretrained
from torchfuse.encoders.mllama_tiles import encoder_mask_of_tiles
from torchfuse.errors import CheckpointError

pytestmark = pytest.mark.usefixtures("no_grad")

RATIOS = {0: (0, 0), 2: (1, 2), 5: (2, 1), 6: (2, 2)}  # by transformers' id
VOCAB = MLLAMA_TEXT["vocab_size"]


def hf_inputs(image_first):
    """Two rows with two images each (one of them padding), in one to four tiles.

    Each text token attends to the images before it; text before the first image attends to none.
    """
    ids = torch.tensor([[6, 2], [5, 0]])
    counts = {k: max(1, h * w) for k, (h, w) in RATIOS.items()}
    valid = torch.tensor([[[t < counts[int(i)] for t in range(4)] for i in row] for row in ids])
    mask = torch.zeros(2, 23, 2, 4, dtype=torch.long)
    first = 0 if image_first else 4
    mask[0, first:, 0] = valid[0, 0].long()
    mask[0, 11:, 1] = valid[0, 1].long()
    mask[1, first + 3 * (not image_first) :, 0] = valid[1, 0].long()
    return {
        "pixel_values": random_images(2, 2, 4, 3, 12, 12, seed=7),
        "aspect_ratio_ids": ids,
        "aspect_ratio_mask": valid.long(),
        "cross_attention_mask": mask,
    }


def fused_inputs(inputs):
    """The same for torchfuse's model, whose encoder takes (high, wide) in place of ids."""
    ratios = torch.tensor([[RATIOS[int(i)] for i in row] for row in inputs["aspect_ratio_ids"]])
    return {
        "encoder_input": {"images": inputs["pixel_values"], "aspect_ratio": ratios},
        "encoder_mask": encoder_mask_of_tiles(inputs["cross_attention_mask"], tokens_per_tile=10),
    }


VARIANTS = {
    "plain": {},
    "neighbours": {"text": {"num_hidden_layers": 7, "cross_attention_layers": [0, 2, 4]}},
    "one": {"text": {"num_hidden_layers": 3, "cross_attention_layers": [1], "num_key_value_heads": 6}},
    "scaled_rope": {"text": {"rope_parameters": scaled_rope(8)}},
    "other_states": {
        "vision": {
            "num_hidden_layers": 4,
            "num_global_layers": 1,
            "intermediate_layers_indices": [0, 1, 3],
            "vision_output_dim": 80,
        }
    },
}


@pytest.mark.format(
    "Llama 3.2 Vision (Mllama)",
    "in and out",
    "logits within 1e-4 in fp32, random small configurations: several tiles and images, cross-attention "
    "mask, text before the image",
)
@pytest.mark.parametrize("image_first", [True, False], ids=["image_first", "text_first"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_mllama(tmp_path, variant, image_first, monkeypatch):
    hf_model = mllama(tmp_path / "mllama", **VARIANTS[variant])
    model = from_pretrained(tmp_path / "mllama").eval()
    tokens, inputs = random_tokens(VOCAB), hf_inputs(image_first)
    tokens[:, 4] = VOCAB  # the image token, which the head does not score
    without_images = hf_model(input_ids=tokens).logits
    if not image_first:
        drop_attention_without_images(monkeypatch, inputs["cross_attention_mask"].flatten(2).any(dim=-1))
    expected = hf_model(input_ids=tokens, **inputs).logits
    assert_close(model(tokens, **fused_inputs(inputs)), expected)
    assert (expected - without_images).abs().max() > 0.1  # the images matter
    export(model, tmp_path / "out", format="mllama")
    again = MllamaForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(again(input_ids=tokens, **inputs).logits, expected)


def test_in_transformers_text_attends_to_later_images(tmp_path):
    """Why ``drop_attention_without_images`` is needed; when this fails, it can go."""
    hf_model = mllama(tmp_path)
    tokens, inputs = random_tokens(VOCAB), hf_inputs(image_first=False)
    before = hf_model(input_ids=tokens, **inputs).logits[:, 0]
    inputs["pixel_values"] = -inputs["pixel_values"]
    assert (hf_model(input_ids=tokens, **inputs).logits[:, 0] - before).abs().max() > 1e-3
    model = from_pretrained(tmp_path).eval()
    alone = model(tokens[:, :1])[:, 0]
    assert_close(model(tokens, **fused_inputs(inputs))[:, 0], alone, atol=1e-5)


@pytest.mark.parametrize(
    ("layers", "problem"),
    [
        ([1, 2], r"cross_attention_layers=\[1, 2\] is not supported"),
        ([4], r"cross_attention_layers=\[4\] is not supported"),
        ([], r"cross_attention_layers=\[\] is not supported"),
        (["1"], "cross_attention_layers must be a list of whole numbers"),
    ],
    ids=str,
)
def test_cross_attention_layers_without_a_decoder_layer_after_them(tmp_path, layers, problem):
    mllama(tmp_path)
    text = {"num_hidden_layers": 5, "cross_attention_layers": layers, "hidden_size": 24}
    edit(tmp_path, text_config=text | {"num_attention_heads": 6, "num_key_value_heads": 2})
    with pytest.raises(CheckpointError, match=problem):
        from_pretrained(tmp_path)


def test_states_of_the_tower_may_be_chosen(tmp_path):
    mllama(tmp_path)
    one, other = from_pretrained(tmp_path), from_pretrained(tmp_path, intermediate_layers=[0, 1])
    images = {"images": torch.randn(1, 1, 1, 3, 12, 12)}
    assert not torch.equal(one.encoder(**images), other.encoder(**images))
    assert other.encoder.clip.hidden_layers == [0, 1]
