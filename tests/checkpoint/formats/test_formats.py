"""Foreign directories into our models and our models into foreign directories, against transformers.

Each test is a row of the table in the documentation, which ``tests/docs`` makes from the marks.
"""

import json

import pytest
import torch
import transformers
from hf import (
    LLAMA,
    MLLAMA_TEXT,
    VISION,
    llama,
    llava,
    mllama,
    random_llama_config,
    random_tower_config,
    shake,
)
from torch import Tensor
from transformers import (
    AutoModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    MllamaForConditionalGeneration,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.models.mllama.modeling_mllama import MllamaTextCrossAttention

from torchfuse import export, from_pretrained, generate, save_pretrained
from torchfuse.encoders.mllama_tiles import encoder_mask_of_tiles

SEEDS = range(7)
LOGITS = "logits within 1e-4 in fp32, random small configurations"
IMAGE = LLAMA["vocab_size"] - 1  # LLaVA's image token here
PATCHES = 9


def close(ours: Tensor, theirs: Tensor) -> None:
    assert theirs.std() > 0.01  # or nothing was compared
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def no_grad(test):
    return pytest.mark.usefixtures("_without_gradients")(test)


@pytest.fixture
def _without_gradients():
    transformers.logging.set_verbosity_error()
    with torch.no_grad():
        yield


def tokens(vocab: int, rows: int = 2, length: int = 23, seed: int = 5) -> Tensor:
    return torch.randint(1, vocab, (rows, length), generator=torch.Generator().manual_seed(seed))


# -- decoders and towers ------------------------------------------------------------------------------


@pytest.mark.format(
    "Llama 2, 3, 3.1, 3.2", "in and out", f"{LOGITS}: grouped queries, tied, rope scaling"
)
@no_grad
@pytest.mark.parametrize("seed", SEEDS)
def test_llama(tmp_path, seed):
    numbers = random_llama_config(seed)
    theirs = llama(tmp_path / "llama", **numbers)
    tower(tmp_path / "clip", CLIPVisionModel, CLIPVisionConfig(**VISION))
    model = from_pretrained(decoder=tmp_path / "llama", encoder=tmp_path / "clip", every=2).eval()
    text = tokens(numbers["vocab_size"], length=61)  # past the unscaled context
    close(model(text), theirs(text).logits)
    base = from_pretrained(
        decoder=tmp_path / "llama", encoder=tmp_path / "clip", arch="joint_decoder", placement="prefix"
    ).eval()
    export(base.decoder, tmp_path / "out", format="llama")
    back = LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(back(text).logits, theirs(text).logits)
    assert back.config.tie_word_embeddings == numbers["tie_word_embeddings"]


def tower(folder, kind, config):
    torch.manual_seed(43)
    model = kind(config).eval()
    shake(model)
    model.save_pretrained(folder)
    return model


@pytest.mark.format(
    "CLIP vision towers", "in and out", "features of any layer within 1e-4, random small ones"
)
@no_grad
@pytest.mark.parametrize("seed", SEEDS)
def test_clip(tmp_path, seed):
    config = CLIPVisionConfig(**random_tower_config(seed), hidden_act=("quick_gelu", "gelu")[seed % 2])
    theirs = tower(tmp_path / "clip", CLIPVisionModel, config)
    llama(tmp_path / "llama")
    layer = seed % (config.num_hidden_layers + 1)
    model = from_pretrained(
        decoder=tmp_path / "llama",
        encoder=tmp_path / "clip",
        every=3,
        feature_layer=layer,
        keep_cls=True,
    ).eval()
    images = torch.randn(2, 3, config.image_size, config.image_size)
    states = theirs(images, output_hidden_states=True).hidden_states
    close(model.encoder(images), states[layer])
    export(model.encoder, tmp_path / "out", format="clip")
    back = AutoModel.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(back(images, output_hidden_states=True).hidden_states[layer], states[layer])


@pytest.mark.format(
    "SigLIP towers, and others of transformers",
    "in and out",
    "features to the bit, random small ones",
)
@no_grad
@pytest.mark.parametrize("seed", SEEDS)
def test_siglip(tmp_path, seed):
    config = SiglipVisionConfig(**random_tower_config(seed))
    theirs = tower(tmp_path / "siglip", SiglipVisionModel, config)
    llama(tmp_path / "llama")
    model = from_pretrained(
        decoder=tmp_path / "llama", encoder=tmp_path / "siglip", every=3, feature_layer=-2
    ).eval()
    images = torch.randn(2, 3, config.image_size, config.image_size)
    expected = theirs(images, output_hidden_states=True)
    assert torch.equal(model.encoder(images=images), expected.hidden_states[-2])
    export(model.encoder, tmp_path / "out", format="hf")
    back = AutoModel.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(back(images).last_hidden_state, expected.last_hidden_state)


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
    numbers = VISION | {"hidden_dropout_prob": 0.0}
    return transformers.ViTModel(transformers.ViTConfig(**numbers)), lambda tower: tower


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
@no_grad
@pytest.mark.parametrize("kind", TOWERS)
def test_towers_of_transformers(tmp_path, kind):
    make, inputs, options = TOWERS[kind]
    torch.manual_seed(47)
    whole, tower_of = make()
    shake(whole.eval())
    whole.save_pretrained(tmp_path / "tower")
    llama(tmp_path / "llama")
    model = from_pretrained(
        decoder=tmp_path / "llama", encoder=tmp_path / "tower", every=3, **options
    ).eval()
    expected = tower_of(whole)(**inputs).last_hidden_state
    assert expected.std() > 0.01
    assert torch.equal(model.encoder(**inputs), expected)
    save_pretrained(model, tmp_path / "own")
    again = from_pretrained(tmp_path / "own").eval()
    assert torch.equal(again.encoder(**inputs), expected)


# -- LLaVA --------------------------------------------------------------------------------------------


def conversation() -> tuple[Tensor, Tensor]:
    """Two images in a row, one later, and a row with one; the images one behind the other."""
    text = tokens(IMAGE, rows=2, length=41)
    text[0, 3 : 3 + 2 * PATCHES] = IMAGE
    text[0, 28 : 28 + PATCHES] = IMAGE
    text[1, 5 : 5 + PATCHES] = IMAGE
    return text, torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(6))


def scaled_rope(context: int) -> dict[str, object]:
    """Llama 3.1's scaling, of a model that was trained on sequences shorter than the test's."""
    return {
        "rope_theta": 5e5,
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": context,
    }


LLAVA_VARIANTS = {
    "plain": {},
    "tied_gelu_tanh_free": {"text": {"tie_word_embeddings": True}, "projector_hidden_act": "silu"},
    "no_bias": {"multimodal_projector_bias": False, "vision_feature_layer": -1},
    "scaled_rope": {"text": {"rope_parameters": scaled_rope(16)}},
    "siglip": {
        "vision": SiglipVisionConfig(**VISION).to_dict(),
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
    },
}


@pytest.mark.format(
    "LLaVA", "in and out", f"{LOGITS}: several images in a row, rows that differ; CLIP, SigLIP"
)
@no_grad
@pytest.mark.parametrize("variant", LLAVA_VARIANTS)
def test_llava(tmp_path, variant):
    theirs = llava(tmp_path / "llava", **LLAVA_VARIANTS[variant])
    model = from_pretrained(tmp_path / "llava").eval()
    text, images = conversation()
    expected = theirs(input_ids=text, pixel_values=images).logits
    close(model(text, encoder_input={"images": images}), expected)
    changed = model(text, encoder_input={"images": images.flip(0)})
    assert (changed - expected).abs().max() > 0.1  # the images are seen
    export(model, tmp_path / "out", format="llava")
    back = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(back(input_ids=text, pixel_values=images).logits, expected)


@pytest.mark.format("LLaVA", "in", "32 tokens of greedy generation equal transformers'")
@no_grad
def test_llava_says_the_same(tmp_path):
    theirs = llava(tmp_path, text={"max_position_embeddings": 97})
    model = from_pretrained(tmp_path).eval()
    text, images = conversation()
    expected = theirs.generate(
        input_ids=text[1:],
        pixel_values=images[3:],
        max_new_tokens=32,
        min_new_tokens=32,
        do_sample=False,
        suppress_tokens=[IMAGE],
        pad_token_id=0,
    )
    said = generate(
        model,
        text[1:],
        encoder_input={"images": images[3:]},
        max_new_tokens=32,
        temperature=0,
    )
    assert torch.equal(said, expected)


# -- Llama 3.2 Vision ---------------------------------------------------------------------------------

RATIOS = {0: (0, 0), 2: (1, 2), 5: (2, 1), 6: (2, 2)}  # by transformers' id


def tiles(image_first: bool) -> dict[str, Tensor]:
    """Two rows with two images each (one of them padding), in one to four tiles.

    Each text token sees the images that stand before it; with text before the first image, that text
    sees none.
    """
    ids = torch.tensor([[6, 2], [5, 0]])
    counts = {k: max(1, h * w) for k, (h, w) in RATIOS.items()}
    valid = torch.tensor([[[t < counts[int(i)] for t in range(4)] for i in row] for row in ids])
    seen = torch.zeros(2, 23, 2, 4, dtype=torch.long)
    first = 0 if image_first else 4
    seen[0, first:, 0] = valid[0, 0].long()
    seen[0, 11:, 1] = valid[0, 1].long()
    seen[1, first + 3 * (not image_first) :, 0] = valid[1, 0].long()
    return {
        "pixel_values": torch.randn(2, 2, 4, 3, 12, 12, generator=torch.Generator().manual_seed(7)),
        "aspect_ratio_ids": ids,
        "aspect_ratio_mask": valid.long(),
        "cross_attention_mask": seen,
    }


def ours(inputs: dict[str, Tensor]) -> dict[str, object]:
    """The same for one of our models, whose encoder takes (high, wide) in place of ids."""
    ratios = torch.tensor([[RATIOS[int(i)] for i in row] for row in inputs["aspect_ratio_ids"]])
    return {
        "encoder_input": {"images": inputs["pixel_values"], "aspect_ratio": ratios},
        "encoder_mask": encoder_mask_of_tiles(inputs["cross_attention_mask"], tokens_per_tile=10),
    }


@pytest.fixture
def transformers_without_its_leak(monkeypatch):
    """Mllama as Meta's code has it: text that sees no image gets nothing from cross-attention.

    transformers drops the feed-forward of such text, but adds its attention, which then is over all
    images (its issue 39379). Here the attention is dropped too, which is the only change.
    """
    forward = MllamaTextCrossAttention.forward

    def masked(self, *args, attention_mask=None, **kwargs):
        attended, weights = forward(self, *args, attention_mask=attention_mask, **kwargs)
        if masked.sees is not None:
            attended = attended * masked.sees
        return attended, weights

    masked.sees = None
    monkeypatch.setattr(MllamaTextCrossAttention, "forward", masked)
    return masked


MLLAMA_VARIANTS = {
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
    f"{LOGITS}: several tiles and images, cross-attention mask, text before the image",
)
@no_grad
@pytest.mark.parametrize("image_first", [True, False], ids=["image_first", "text_first"])
@pytest.mark.parametrize("variant", MLLAMA_VARIANTS)
def test_mllama(tmp_path, variant, image_first, transformers_without_its_leak):
    theirs = mllama(tmp_path / "mllama", **MLLAMA_VARIANTS[variant])
    model = from_pretrained(tmp_path / "mllama").eval()
    text, inputs = tokens(MLLAMA_TEXT["vocab_size"]), tiles(image_first)
    text[:, 4] = MLLAMA_TEXT["vocab_size"]  # the image token lies behind what the head scores
    if not image_first:
        transformers_without_its_leak.sees = (
            inputs["cross_attention_mask"].flatten(2).any(-1, keepdim=True).float()
        )
    expected = theirs(input_ids=text, **inputs).logits
    close(model(text, **ours(inputs)), expected)
    assert (expected - theirs(input_ids=text).logits).abs().max() > 0.1  # the images are seen
    export(model, tmp_path / "out", format="mllama")
    back = MllamaForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(back(input_ids=text, **inputs).logits, expected)


@no_grad
def test_transformers_lets_text_see_images_that_come_later(tmp_path):
    """The reason for the fixture above; when this fails, it can go."""
    theirs = mllama(tmp_path)
    text, inputs = tokens(MLLAMA_TEXT["vocab_size"]), tiles(image_first=False)
    before = theirs(input_ids=text, **inputs).logits[:, 0]
    inputs["pixel_values"] = -inputs["pixel_values"]
    assert (theirs(input_ids=text, **inputs).logits[:, 0] - before).abs().max() > 1e-3
    model = from_pretrained(tmp_path).eval()
    alone = model(text[:, :1])[:, 0]
    torch.testing.assert_close(model(text, **ours(inputs))[:, 0], alone, rtol=0, atol=1e-5)


@pytest.mark.format(
    "Llama 3.2 Vision (Mllama)", "in", "32 tokens of greedy generation equal transformers'"
)
@no_grad
def test_mllama_says_the_same(tmp_path):
    theirs = mllama(tmp_path, text={"max_position_embeddings": 97})
    model = from_pretrained(tmp_path).eval()
    text, inputs = tokens(MLLAMA_TEXT["vocab_size"]), tiles(image_first=True)
    expected = theirs.generate(
        input_ids=text,
        **inputs,
        max_new_tokens=32,
        min_new_tokens=32,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
    )
    said = generate(model, text, **ours(inputs), max_new_tokens=32, temperature=0)
    assert torch.equal(said, expected)


# -- ours ---------------------------------------------------------------------------------------------

OWN = {
    "cross_attention": {"arch": "cross_attention", "every": 2, "fusion_vocab_size": 3},
    "layers": {"arch": "cross_attention", "layers": [0, 2], "num_heads": 3, "num_kv_heads": 3},
    "placeholder": {"arch": "joint_decoder", "encoder_token": 5, "adapter": "linear"},
    "prefix_head": {
        "arch": "joint_decoder",
        "placement": "prefix",
        "fusion_vocab_size": 2,
        "fusion_head": True,
        "on_missing": "participate",
    },
}


@pytest.mark.format(
    "torchfuse", "in and out", "every tensor, setting and logit to the bit; any architecture"
)
@no_grad
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("variant", OWN)
def test_own_directories(tmp_path, variant, tied):
    llama(tmp_path / "llama", tie_word_embeddings=tied)
    tower(tmp_path / "clip", CLIPVisionModel, CLIPVisionConfig(**VISION))
    model = from_pretrained(
        decoder=tmp_path / "llama", encoder=tmp_path / "clip", feature_layer=1, **OWN[variant]
    ).eval()
    shake(model)
    save_pretrained(model, tmp_path / "own")
    again = from_pretrained(tmp_path / "own").eval()
    state, expected = again.state_dict(), model.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert again.on_missing == model.on_missing
    save_pretrained(again, tmp_path / "again")
    said = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("own", "again")]
    assert said[0] == said[1]
    text = tokens(30)
    text[text == 5] = 6
    given = {"encoder_input": {"images": torch.randn(2, 3, 12, 12)}}
    if variant == "placeholder":
        text[:, 2 : 2 + PATCHES] = 5
    assert torch.equal(again(text, **given), model(text, **given))


@pytest.mark.format("torchfuse", "in and out", "several encoders by name, each with its adapter")
@no_grad
def test_own_directories_with_named_encoders(tmp_path):
    llama(tmp_path / "llama")
    tower(tmp_path / "clip", CLIPVisionModel, CLIPVisionConfig(**VISION))
    tower(tmp_path / "siglip", SiglipVisionModel, SiglipVisionConfig(**VISION))
    model = from_pretrained(
        decoder=tmp_path / "llama",
        encoder={"a": tmp_path / "clip", "b": tmp_path / "siglip"},
        every=2,
        keep_cls={"a": True},
        adapter={"a": "linear", "b": "mlp_2layer"},
        dtype=torch.bfloat16,
    ).eval()
    save_pretrained(model, tmp_path / "own")
    again = from_pretrained(tmp_path / "own").eval()
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    images = torch.randn(2, 3, 12, 12)
    given = {"encoder_input": {"a": {"images": images}, "b": {"images": images}}}
    assert torch.equal(again(tokens(30), **given), model(tokens(30), **given))
