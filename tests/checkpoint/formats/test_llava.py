"""LLaVA directories, read and written, against transformers."""

import pytest
import torch
from checkpoint.parity import assert_close, random_images, random_tokens, scaled_rope
from hf import LLAMA, VISION, edit, llava, shake
from transformers import LlavaForConditionalGeneration, SiglipVisionConfig

from torchfuse import export, from_pretrained
from torchfuse.errors import CheckpointError

pytestmark = pytest.mark.usefixtures("no_grad")

IMAGE = LLAMA["vocab_size"] - 1  # the image token
PATCHES = 9


def conversation():
    """A row with two images in a row and one later, a row with one; all images in one batch."""
    tokens = random_tokens(IMAGE, rows=2, length=41)
    tokens[0, 3 : 3 + 2 * PATCHES] = IMAGE
    tokens[0, 28 : 28 + PATCHES] = IMAGE
    tokens[1, 5 : 5 + PATCHES] = IMAGE
    return tokens, random_images(4, 3, 12, 12)


VARIANTS = {
    "plain": {},
    "tied_silu": {"text": {"tie_word_embeddings": True}, "projector_hidden_act": "silu"},
    "no_bias": {"multimodal_projector_bias": False, "vision_feature_layer": -1},
    "scaled_rope": {"text": {"rope_parameters": scaled_rope(16)}},
    "siglip": {
        "vision": SiglipVisionConfig(**VISION).to_dict(),
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
    },
}


@pytest.mark.format(
    "LLaVA",
    "in and out",
    "logits within 1e-4 in fp32, random small configurations: several images in a row, rows that differ; "
    "CLIP, SigLIP",
)
@pytest.mark.parametrize("variant", VARIANTS)
def test_llava(tmp_path, variant):
    hf_model = llava(tmp_path / "llava", **VARIANTS[variant])
    model = from_pretrained(tmp_path / "llava").eval()
    tokens, images = conversation()
    expected = hf_model(input_ids=tokens, pixel_values=images).logits
    assert_close(model(tokens, encoder_input={"images": images}), expected)
    changed = model(tokens, encoder_input={"images": images.flip(0)})
    assert (changed - expected).abs().max() > 0.1  # the images matter
    export(model, tmp_path / "out", format="llava")
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(again(input_ids=tokens, pixel_values=images).logits, expected)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("head", [True, False], ids=["head", "no_head"])
def test_new_tokens_are_merged_into_the_tables(pretrained, tmp_path, tied, head):
    from hf import llama

    llama(tmp_path / "llama", tie_word_embeddings=tied)
    model = from_pretrained(
        **pretrained | {"decoder": tmp_path / "llama"},
        arch="joint_decoder",
        encoder_token=37,  # the first new token
        fusion_vocab_size=2,
        fusion_head=head,
    ).eval()
    shake(model)
    model.decoder.tok_embeddings.expand(3)
    if head and not tied:
        model.decoder.output.expand(3)
    for name, parameter in model.named_parameters():
        if ".fusion_" in name:
            parameter.normal_()
    export(model, tmp_path / "out", format="llava")
    hf_model = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    assert hf_model.config.text_config.vocab_size == 37 + 2 + 3
    assert hf_model.config.tie_word_embeddings is tied
    tokens, images = random_tokens(31, length=29), random_images(2, 3, 12, 12)
    tokens[:, 3 : 3 + PATCHES], tokens[:, 20:23] = 37, torch.tensor([38, 41, 40])
    expected = hf_model(input_ids=tokens, pixel_values=images).logits
    logits = model(tokens, encoder_input={"images": images})
    columns = 42 if head else 37
    assert logits.shape[-1] == columns
    assert_close(logits, expected[..., :columns])
    if not head and not tied:  # the rows that no parameter fills are the mean of the others
        mean = hf_model.lm_head.weight[:37].mean(0)
        torch.testing.assert_close(hf_model.lm_head.weight[37:], mean.expand(5, -1))
    again = from_pretrained(tmp_path / "out").eval()
    back = again(tokens, encoder_input={"images": images})[..., :columns]
    assert_close(back, logits, atol=1e-5)


def test_an_image_token_outside_the_table_gets_a_row(pretrained, tmp_path):
    model = from_pretrained(**pretrained, arch="joint_decoder", encoder_token=39).eval()
    export(model, tmp_path / "out", format="llava")
    hf_model = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    assert hf_model.config.text_config.vocab_size == 40
    tokens, images = random_tokens(37, length=29), random_images(2, 3, 12, 12)
    tokens[:, 3 : 3 + PATCHES] = 39
    expected = hf_model(input_ids=tokens, pixel_values=images).logits[..., :37]
    assert_close(model(tokens, encoder_input={"images": images}), expected)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"vision_feature_layer": [-2, -3]}, "vision_feature_layer must be a whole number"),
        ({"projector_hidden_act": "tanh"}, "projector_hidden_act must be one of gelu, silu, relu"),
        ({"vision_feature_select_strategy": "some"}, "must be one of default, full"),
        ({"text_config": {"model_type": "gemma"}}, "model_type 'gemma' is not supported, only llama"),
        ({"text_config": None}, "text_config is missing"),
        ({"model_type": "llava_next"}, "model_type 'llava_next'"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_settings_that_are_not_supported(tmp_path, changes, problem):
    llava(tmp_path)
    edit(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=problem):
        from_pretrained(tmp_path)
