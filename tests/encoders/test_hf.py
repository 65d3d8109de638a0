import copy
import json
import pickle
import re
import sys

import hf
import pytest
import torch
import transformers
from support import WIDTH, open_gates, text, tiny_decoder
from torch import distributed
from torchtune.training import set_activation_checkpointing
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from torchfuse import fuse
from torchfuse.encoders.hf import HfEncoder
from torchfuse.encoders.hf_build import hf_encoder, tower_config
from torchfuse.training import shard

SIZES = {"hidden_size": 20, "intermediate_size": 43, "num_hidden_layers": 3, "num_attention_heads": 5}
VIT = SIZES | {"image_size": 12, "patch_size": 4}
WAVES = {"conv_dim": [8, 6], "conv_kernel": [5, 3], "conv_stride": [3, 2]}
POSITIONS = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
SPEECH = SIZES | WAVES | POSITIONS | {"num_feat_extract_layers": 2}
WHISPER = {
    "d_model": 20,
    "encoder_layers": 3,
    "encoder_attention_heads": 5,
    "encoder_ffn_dim": 43,
    "num_mel_bins": 7,
    "max_source_positions": 11,
}
AST = SIZES | {
    "patch_size": 4,
    "max_length": 23,
    "num_mel_bins": 11,
    "time_stride": 3,
    "frequency_stride": 5,
}
# Configuration and numbers by tower; special tokens in front; tokens in all, None if that depends on the input.
TOWERS = {
    "clip_vision_model": ("CLIPVisionConfig", VIT, 1, 10),
    "siglip_vision_model": ("SiglipVisionConfig", VIT, 0, 9),
    "siglip2_vision_model": (
        "Siglip2VisionConfig",
        SIZES | {"patch_size": 2, "num_patches": 9},
        0,
        None,
    ),
    "vit": ("ViTConfig", VIT, 1, 10),
    "deit": ("DeiTConfig", VIT, 2, 11),
    "dinov2": ("Dinov2Config", VIT, 1, 10),
    "dinov2_with_registers": ("Dinov2WithRegistersConfig", VIT | {"num_register_tokens": 3}, 4, 13),
    "dinov3_vit": ("DINOv3ViTConfig", VIT | {"num_register_tokens": 2}, 3, 12),
    "whisper": ("WhisperConfig", WHISPER, 0, 11),
    "wav2vec2": ("Wav2Vec2Config", SPEECH, 0, None),
    "hubert": ("HubertConfig", SPEECH, 0, None),
    "audio-spectrogram-transformer": ("ASTConfig", AST, 2, 16),
}
# One of each kind; the others differ by their row in the table.
MAIN = [
    "clip_vision_model",
    "siglip_vision_model",
    "siglip2_vision_model",
    "dinov2_with_registers",
    "vit",
    "whisper",
    "wav2vec2",
    "audio-spectrogram-transformer",
]


def config(kind, **changes):
    name, numbers, *_ = TOWERS[kind]
    return getattr(transformers, name)(**numbers | {"initializer_range": 0.3} | changes)


def tower(kind, **changes):
    torch.manual_seed(5)
    made = config(kind, **changes)
    built = WhisperEncoder(made) if kind == "whisper" else transformers.AutoModel.from_config(made)
    hf._shake_norms(built)
    return built.eval()


def encoder(kind, built=None, **options):
    if TOWERS[kind][2]:
        options = {"keep_cls": True} | options
    return HfEncoder(tower(kind) if built is None else built, **options)


def inputs(kind, rows=2):
    if kind == "siglip2_vision_model":
        mask = torch.ones(rows, 7, dtype=torch.long)
        mask[0, 6:] = 0
        shapes = torch.tensor([[2, 3], [1, 7]]).repeat(rows // 2 + 1, 1)[:rows]
        pixels = torch.randn(rows, 7, 12)
        return {"pixel_values": pixels, "pixel_attention_mask": mask, "spatial_shapes": shapes}
    if kind == "whisper":
        return {"input_features": torch.randn(rows, 7, 22)}
    if kind == "audio-spectrogram-transformer":
        return {"input_values": torch.randn(rows, 23, 11)}
    if kind in ("wav2vec2", "hubert"):
        return {"input_values": torch.randn(rows, 101)}
    return {"pixel_values": torch.randn(rows, 3, 12, 12)}


@pytest.mark.parametrize("kind", TOWERS)
def test_features_equal_the_towers_to_the_bit(kind):
    built, given = tower(kind), inputs(kind)
    with torch.no_grad():
        expected = built(**given, output_hidden_states=True)
        for layer in (None, 0, 1, -2, -1, 3):
            state = expected.last_hidden_state if layer is None else expected.hidden_states[layer]
            assert torch.equal(encoder(kind, built, feature_layer=layer)(**given), state)
    for layer in (0, 1, -1):
        assert not torch.equal(expected.hidden_states[layer], expected.hidden_states[2])


@pytest.mark.parametrize("kind", TOWERS)
def test_attributes_match_the_features(kind):
    _, _, special, tokens = TOWERS[kind]
    one = encoder(kind)
    assert (one.model_type, one.feature_dim, one.num_special_tokens) == (kind, 20, special)
    assert one.num_tokens == tokens
    assert one.image_size == (12 if tokens and "pixel_values" in one.example_input() else None)
    assert one.config is one.wrapped.config
    features = one(**one.example_input())
    assert features.shape[0] == 1 and features.shape[2] == 20
    if tokens:
        assert features.shape[1] == tokens
    if special:
        without = encoder(kind, one.wrapped, keep_cls=False)
        assert without.num_tokens == tokens - special
        assert torch.equal(without(**one.example_input()), features[:, special:])


@pytest.mark.parametrize("kind", MAIN)
def test_names_are_the_towers(kind):
    built = tower(kind)
    expected = built.state_dict()
    parameters = [name for name, _ in built.named_parameters()]
    for layer in (None, 1):
        one = encoder(kind, copy.deepcopy(built), feature_layer=layer)
        assert list(one.state_dict()) == list(expected)
        assert [name for name, _ in one.named_parameters()] == parameters
        one.load_state_dict({name: torch.full_like(t, 0.25) for name, t in expected.items()})
        assert all((tensor == 0.25).all() for tensor in one.wrapped.state_dict().values())
        given = inputs(kind)
        assert torch.equal(copy.deepcopy(one)(**given), one(**given))
    if kind != "wav2vec2":  # torch does not pickle its weight norm
        copied = pickle.loads(pickle.dumps(encoder(kind, built)))
        assert list(copied.state_dict()) == list(expected)


@pytest.mark.parametrize("kind", MAIN)
def test_items_of_a_row_are_independent(kind):
    one, given = encoder(kind, feature_layer=2), inputs(kind, rows=6)
    rows = one(**{name: value.unflatten(0, (2, 3)) for name, value in given.items()})
    alone = one(**given)
    torch.testing.assert_close(rows, alone.reshape(2, -1, 20), rtol=1e-4, atol=1e-5)
    assert rows.shape[1] == 3 * alone.shape[1]


def test_images_is_another_name_of_pixel_values():
    one, images = encoder("vit", keep_cls=False), torch.randn(2, 3, 3, 12, 12)
    assert torch.equal(one(images=images), one(pixel_values=images))
    with pytest.raises(ValueError, match="Give images or pixel_values, they are the same"):
        one(images=images, pixel_values=images)


@pytest.mark.parametrize("kind", ["clip_vision_model", "siglip_vision_model", "vit", "dinov2"])
def test_images_of_another_size_are_encoded_by_interpolation(kind):
    one = encoder(kind, image_size=20)
    images = torch.randn(2, 3, 20, 20)
    options = {} if kind == "dinov2" else {"interpolate_pos_encoding": True}
    assert torch.equal(one(images=images), one.wrapped(images, **options).last_hidden_state)
    assert (one.image_size, one.num_tokens) == (20, one(images=images).shape[1])


def test_only_the_needed_hidden_state_is_requested():
    for layer, expected in ((None, None), (1, [1])):
        one, requested = encoder("siglip_vision_model", feature_layer=layer), []
        one.wrapped.register_forward_pre_hook(
            lambda _, args, kw, got=requested: got.append(kw.get("output_hidden_states")),
            with_kwargs=True,
        )
        one(**inputs("siglip_vision_model"))
        assert requested == [expected]


def test_masks_of_naflex_whisper_and_waves():
    given = inputs("siglip2_vision_model", rows=4)
    mask = encoder("siglip2_vision_model").features_mask(
        **{name: value.unflatten(0, (2, 2)) for name, value in given.items()}
    )
    assert mask.dtype == torch.bool
    assert torch.equal(mask, given["pixel_attention_mask"].bool().reshape(2, 14))

    frames = torch.arange(22) < torch.tensor([[22], [9]])
    given = {**inputs("whisper"), "attention_mask": frames.long()}
    assert encoder("whisper").features_mask(**given).sum(-1).tolist() == [11, 5]

    one, given = encoder("wav2vec2"), inputs("wav2vec2", rows=3)
    assert one.features_mask(**given) is None
    samples = (torch.arange(101) < torch.tensor([[101], [58], [23]])).long()
    mask = one.features_mask(**given, attention_mask=samples)
    num = one(**given).shape[1]
    assert torch.equal(mask, one.wrapped._get_feature_vector_attention_mask(num, samples).bool())
    assert 0 < mask[2].sum() < mask[1].sum() < mask[0].sum() == num

    with pytest.raises(ValueError, match="How a mask applies to the features of 'vit' is not known"):
        encoder("vit").features_mask(**inputs("vit"), attention_mask=torch.ones(2, 10))


def test_padding_is_masked_out_by_the_features_mask():
    kind = "siglip2_vision_model"
    model = open_gates(fuse(tiny_decoder(), encoder(kind), every=2)).eval()
    given, tokens = inputs(kind), text()
    mask = model.encoder.features_mask(**given)
    before = model(tokens, encoder_input=given, encoder_mask=mask)
    given["pixel_values"][0, 6:] += 3.0
    assert torch.equal(model(tokens, encoder_input=given, encoder_mask=mask), before)
    assert not torch.equal(model(tokens, encoder_input=given), before)


@pytest.mark.parametrize("kind", MAIN)
@pytest.mark.parametrize("layer", [None, 2])
def test_gradients_reach_a_trainable_tower(kind, layer):
    model = fuse(tiny_decoder(), encoder(kind, feature_layer=layer), every=2, encoder_trainable=True)
    open_gates(model).train()
    assert model.encoder.wrapped.training
    model.encoder.eval()  # no dropout, no layer drop
    model(text(), encoder_input=inputs(kind)).square().sum().backward()
    got = {name for name, p in model.encoder.named_parameters() if p.grad is not None and p.grad.any()}
    numbers = [re.search(r"(?<!conv_)layers?\.(\d)", name) for name in got]
    layers = {number[1] for number in numbers if number}
    assert layers == ({"0", "1", "2"} if layer is None else {"0", "1"})


def test_a_frozen_tower_has_no_gradient_and_stays_in_eval():
    model = fuse(tiny_decoder(), encoder("vit", tower("vit", hidden_dropout_prob=0.5)), every=2)
    open_gates(model).train()
    assert not any(module.training for module in model.encoder.modules())
    given = inputs("vit")
    assert torch.equal(model.encoder(**given), model.encoder(**given))
    model(text(), encoder_input=given).sum().backward()
    assert all(p.grad is None for p in model.encoder.parameters())
    assert all(p.grad is not None for p in model.adapter.parameters())
    assert next(model.adapter.parameters()).shape[1] == 20
    assert model.encode(given).shape == (2, 10, WIDTH)


@pytest.mark.parametrize("kind", ["clip_vision_model", "whisper", "wav2vec2"])
def test_a_batch_without_input_runs_the_example(kind):
    model = fuse(
        tiny_decoder(), encoder(kind), every=2, encoder_trainable=True, on_missing="participate"
    ).train()
    model(text()).sum().backward()
    assert all(p.grad is not None for p in model.adapter.parameters())


@pytest.mark.parametrize("kind", ["clip_vision_model", "dinov2_with_registers"])
def test_compiles_to_one_graph(kind):
    one, given = encoder(kind, feature_layer=2), inputs(kind)
    compiled = torch.compile(one, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(**given), one(**given), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["siglip_vision_model", "audio-spectrogram-transformer"])
def test_activation_checkpointing_changes_no_gradient(kind):
    one, given = encoder(kind, feature_layer=2), inputs(kind)
    one(**given).square().sum().backward()
    expected = {name: p.grad.clone() for name, p in one.named_parameters() if p.grad is not None}
    one.zero_grad()
    kinds = {type(module) for name, module in one.named_modules() if name.endswith("layers.0")}
    assert len(kinds) == 1
    set_activation_checkpointing(one, auto_wrap_policy=kinds)
    assert any("_checkpoint_wrapped_module" in name for name, _ in one.named_parameters())
    one(**given).square().sum().backward()
    got = {name.replace("_checkpoint_wrapped_module.", ""): p.grad for name, p in one.named_parameters()}
    for name, grad in expected.items():
        assert torch.equal(got[name], grad), name


def test_runs_under_autocast_and_in_bf16():
    one, given = encoder("clip_vision_model", feature_layer=-2), inputs("clip_vision_model")
    exact = one(**given)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(one(**given).float(), exact, rtol=0.1, atol=0.1)
    half = one.to(torch.bfloat16)(pixel_values=given["pixel_values"].bfloat16())
    assert half.dtype == torch.bfloat16


def test_sharded_equals_unsharded(tmp_path):
    def build():
        one = encoder("clip_vision_model", feature_layer=2)
        options = {"encoder_trainable": True, "on_missing": "participate"}
        torch.manual_seed(7)
        return open_gates(fuse(tiny_decoder(), one, every=2, **options)).train()

    reference, given = build(), inputs("clip_vision_model")
    expected = reference(text(), encoder_input=given)
    expected.square().sum().backward()
    store = f"file://{tmp_path}/store"
    distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        model = build()
        shard(model)
        assert list(model.state_dict()) == list(reference.state_dict())
        got = model(text(), encoder_input=given)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        got.square().sum().backward()
        for (name, one), (other, two) in zip(
            reference.named_parameters(), model.named_parameters(), strict=True
        ):
            assert name == other and (one.grad is None) == (two.grad is None), name
            if one.grad is not None:
                torch.testing.assert_close(two.grad.full_tensor(), one.grad, rtol=1e-4, atol=1e-3)
    finally:
        distributed.destroy_process_group()


def write(folder, config):
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("kind", MAIN)
def test_is_built_from_a_directory_and_then_loaded(kind, tmp_path):
    saved = tower(kind)
    if kind == "vit":
        saved.pooler = None
    saved.save_pretrained(tmp_path)
    keep = {"keep_cls": True} if TOWERS[kind][2] else {}
    one = hf_encoder(tmp_path, feature_layer=-2, **keep)
    assert type(one.wrapped) is type(saved)
    assert all(p.isnan().all() for p in one.parameters())
    one.load_state_dict(saved.state_dict())
    given = inputs(kind)
    assert torch.equal(one.eval()(**given), encoder(kind, saved, feature_layer=-2)(**given))


@pytest.mark.parametrize("kind", ["clip_vision_model", "siglip_vision_model", "vit"])
@pytest.mark.parametrize("way", ["assign", "to_empty"])
def test_is_built_on_the_meta_device_and_then_loaded(kind, way):
    keep = {"keep_cls": True} if TOWERS[kind][2] else {}
    with torch.device("meta"):
        one = hf_encoder(config(kind), **keep).eval()
    assert all(p.is_meta for p in one.parameters())
    saved = encoder(kind).state_dict()
    saved = {name: tensor for name, tensor in saved.items() if "pooler" not in name}
    if way == "to_empty":
        one.to_empty(device="cpu")
    one.load_state_dict(saved, assign=way == "assign")
    given = inputs(kind)
    assert torch.equal(one(**given), encoder(kind)(**given))


@pytest.mark.parametrize(
    ("whole", "kind", "text_sizes"),
    [
        ("CLIPConfig", "clip_vision_model", {"projection_dim": 7}),
        ("SiglipConfig", "siglip_vision_model", {"vocab_size": 11}),
        ("Siglip2Config", "siglip2_vision_model", {"vocab_size": 11}),
        ("LlavaConfig", "clip_vision_model", {"model_type": "llama", "vocab_size": 11}),
    ],
)
def test_the_tower_of_a_whole_model_is_built_alone(whole, kind, text_sizes, tmp_path):
    sections = {"vision_config": config(kind).to_dict(), "text_config": text_sizes}
    made = getattr(transformers, whole)(**sections)
    made.save_pretrained(tmp_path)
    keep = {"keep_cls": False} if TOWERS[kind][2] else {}
    for source in (tmp_path, str(tmp_path), made):
        assert tower_config(source).model_type == kind
        one = hf_encoder(source, dtype=torch.bfloat16, **keep)
        assert list(one.state_dict()) == list(tower(kind).state_dict())
        assert {p.dtype for p in one.parameters()} == {torch.bfloat16}
    assert torch.get_default_dtype() == torch.float32
    # Older files have the model_type of the whole model only.
    values = json.loads((tmp_path / "config.json").read_text())
    if whole != "LlavaConfig":
        values["vision_config"].pop("model_type")
        assert tower_config(write(tmp_path, values)).model_type == kind


def test_the_dtype_is_torchs_default_not_the_files(tmp_path):
    tower("siglip_vision_model").half().save_pretrained(tmp_path)
    assert {p.dtype for p in hf_encoder(tmp_path).parameters()} == {torch.float32}


def test_layers_are_not_dropped_at_random():
    made = config("wav2vec2", layerdrop=0.9)
    one = hf_encoder(made, feature_layer=1)
    assert (made.layerdrop, one.config.layerdrop) == (0.9, 0.0)
    other = encoder("wav2vec2", tower("wav2vec2", layerdrop=1.0), feature_layer=1).train()
    with pytest.raises(
        ValueError, match="3 layers, but returned 0 hidden states, so .* set its layerdrop to 0"
    ):
        other(**inputs("wav2vec2"))


def test_a_file_cannot_choose_foreign_code(tmp_path):
    values = config("siglip_vision_model").to_dict()
    values |= {"attn_implementation": "someone/kernel", "auto_map": {"AutoModel": "code--evil.Model"}}
    one = hf_encoder(write(tmp_path, values))
    assert one.config._attn_implementation == "sdpa"
    assert not hasattr(one.config, "auto_map")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, r"config\.json: transformers has no model_type None"),
        ({"model_type": "evil"}, "transformers has no model_type 'evil'"),
        (
            {"model_type": "vit", "hidden_size": "wide"},
            r"config\.json is not a vit configuration: .*hidden_size",
        ),
        ({"model_type": "llama"}, r"A 'llama' \(LlamaModel\) is not a vision or audio tower"),
        ({"model_type": "clip_text_model"}, "is not a vision or audio tower"),
        (
            {"model_type": "vit", **VIT},
            "has 1 class token in front: give keep_cls=True or keep_cls=False",
        ),
    ],
    ids=str,
)
def test_a_directory_without_a_tower_is_an_error(values, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        hf_encoder(write(tmp_path, values))


def test_anything_but_a_directory_or_a_configuration_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="openai/clip is not a directory, and nothing is downloaded"):
        hf_encoder("openai/clip")
    with pytest.raises(ValueError, match=r"config\.json cannot be read"):
        hf_encoder(tmp_path)
    for content, message in (
        ("{", "is no valid JSON: Expecting"),
        ("[3]", "must hold a JSON object, got a list"),
    ):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ValueError, match=rf"config\.json {message}"):
            hf_encoder(tmp_path)
    with pytest.raises(ValueError, match="or a configuration of transformers, got a int"):
        hf_encoder(5)
    with pytest.raises(ValueError, match="The configuration: transformers has no model_type 'eye'"):
        hf_encoder({"model_type": "eye"})
    both = transformers.CLIPConfig()
    both.audio_config = config("whisper")
    with pytest.raises(ValueError, match="A 'clip' has vision_config and audio_config: give one"):
        tower_config(both)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (
            "vit",
            {"keep_cls": None},
            r"ViTModel \(vit\): it has 1 class token in front: give keep_cls=True",
        ),
        (
            "dinov2_with_registers",
            {"keep_cls": None},
            "has 1 class and 3 register token in front: give keep_cls",
        ),
        (
            "siglip_vision_model",
            {"keep_cls": False},
            "keep_cls=False, but it has no class token: leave",
        ),
        (
            "whisper",
            {"keep_cls": True},
            r"WhisperEncoder \(whisper\): keep_cls=True, but it has no class",
        ),
        ("vit", {"feature_layer": 4}, "feature_layer=4 must lie between -4 and 3, or be None"),
        ("vit", {"num_special_tokens": 2}, "num_special_tokens=2, but it has 1"),
        ("whisper", {"image_size": 12}, "image_size=12 is not possible, the tower is fixed to None"),
        ("vit", {"feature_layer": -5, "keep_cls": None}, "keep_cls=False; feature_layer=-5"),
    ],
    ids=str,
)
def test_options_that_do_not_fit_the_tower_are_named(kind, options, message):
    with pytest.raises(ValueError, match=message):
        encoder(kind, **options)


def test_an_unknown_tower_needs_num_special_tokens():
    made = transformers.Data2VecVisionConfig(**VIT)
    with pytest.raises(
        ValueError, match="special tokens in front is not known here: give num_special_tokens="
    ):
        hf_encoder(made)
    with pytest.raises(ValueError, match="num_special_tokens=-1, but it must be at least 0"):
        hf_encoder(made, num_special_tokens=-1)
    built = transformers.Data2VecVisionModel(made).eval()
    one = HfEncoder(built, num_special_tokens=1, keep_cls=False)
    given = inputs("vit")
    assert torch.equal(one(**given), built(**given).last_hidden_state[:, 1:])
    assert one.num_tokens is None


def test_a_module_that_is_not_a_tower_is_an_error(tmp_path):
    whole = hf.whole_clip(tmp_path)
    with pytest.raises(ValueError, match=r"got a CLIPModel\. Of a whole model give the tower alone"):
        HfEncoder(whole)
    whisper = transformers.WhisperModel(
        transformers.WhisperConfig(
            **WHISPER, vocab_size=13, pad_token_id=0, decoder_layers=1, decoder_attention_heads=5
        )
    )
    with pytest.raises(ValueError, match="got a WhisperModel"):
        HfEncoder(whisper)
    assert HfEncoder(whisper.encoder).num_tokens == 11
    with pytest.raises(ValueError, match="An HfEncoder wraps one vision or audio tower .* got a Linear"):
        HfEncoder(torch.nn.Linear(3, 5))


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        ("vit", {"images": torch.zeros(1, 3, 12, 13)}, r"takes images of 12 x 12, got \[1, 3, 12, 13\]"),
        (
            "vit",
            {"images": torch.zeros(3, 12, 12)},
            r"pixel_values with 4 axes, or 5 for several a row; got",
        ),
        ("vit", {"input_values": torch.zeros(1)}, "takes pixel_values .* got only input_values"),
        ("whisper", {}, "takes input_features with 3 axes, or 4 .* got only nothing"),
        ("siglip2_vision_model", {"images": torch.zeros(3, 7)}, "pixel_values with 3 axes"),
    ],
    ids=["size", "axes", "name", "nothing", "naflex"],
)
def test_inputs_that_do_not_fit_are_named(kind, given, message):
    with pytest.raises(ValueError, match=message):
        encoder(kind)(**given)


def test_without_transformers_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    for call in (hf_encoder, tower_config):
        with pytest.raises(ImportError, match=r"pip install torchfuse\[hf\]"):
            call(".")
