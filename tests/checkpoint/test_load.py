import pytest
import torch
from hf import clip_tower, edit, fused_model, llama, rename
from safetensors.torch import load_file, save_file
from support import TinyEncoder, same_state, state, text, tiny_decoder

from torchfuse import from_pretrained, fuse, get_fusion_params, load_pretrained, quantize


@pytest.fixture
def folders(tmp_path):
    llama(tmp_path / "llama")
    clip_tower(tmp_path / "clip")
    return {"decoder": tmp_path / "llama", "encoder": tmp_path / "clip"}


def refused(model, *complaints, **folders):
    """Refused with all of these in one error, and the model is as before."""
    before = state(model)
    with pytest.raises(ValueError) as info:
        load_pretrained(model, **folders)
    for complaint in complaints:
        assert complaint in str(info.value), info.value
    assert same_state(before, model)
    return str(info.value)


def test_only_what_was_asked_for_changes(folders):
    model = fused_model(fusion_vocab_size=2, fusion_init=torch.randn(2, 24))
    before = state(model)
    load_pretrained(model, decoder=folders["decoder"])
    changed = {
        name for name, value in model.state_dict().items() if not torch.equal(value, before[name])
    }
    assert all(name.startswith("decoder.") for name in changed)
    assert not any("fusion" in name for name in changed)
    assert {name for name, p in model.named_parameters() if p.requires_grad} >= {
        "adapter.linear_1.weight"
    }
    load_pretrained(model, encoder=str(folders["encoder"]))
    assert not torch.equal(model.encoder.conv.weight, before["encoder.conv.weight"])


def test_parameters_stay_themselves_and_keep_their_dtype(folders):
    model = fused_model().bfloat16()
    parameters = dict(model.named_parameters())
    load_pretrained(model, **folders)
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_all_that_does_not_fit_is_one_error(folders):
    file = folders["decoder"] / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.norm.weight"], tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.0.mlp.down_proj.weight"] = torch.zeros(3, 5)
    tensors["model.layers.7.self_attn.q_proj.weight"] = torch.zeros(1)
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(24)
    save_file(tensors, file)
    message = refused(
        fused_model(),
        f"decoder from {folders['decoder']}",
        "missing: norm.scale",
        "missing: layers.1.mlp.w3.weight",
        "shape: model.layers.0.mlp.down_proj.weight is [3, 5], layers.0.mlp.w2.weight is [24, 41]",
        "unexpected: model.layers.7.self_attn.q_proj.weight",
        "unexpected: model.layers.0.self_attn.q_proj.bias",
        **folders,
    )
    assert "encoder from" not in message


def test_problems_of_both_parts_come_together(folders):
    rename(folders["encoder"], lambda key: key.replace("pre_layrnorm", "pre_layernorm"))
    rename(folders["decoder"], lambda key: key.replace("model.norm", "model.last_norm"))
    refused(
        fused_model(),
        "unexpected: pre_layernorm.weight",
        "missing: ln_pre.weight",
        "unexpected: model.last_norm.weight",
        **folders,
    )


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"num_attention_heads": 12}, "num_attention_heads 12, the model has 6"),
        ({"rms_norm_eps": 1e-6}, "rms_norm_eps 1e-06, the model has 1e-05"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported, only 'silu'"),
        (
            {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
            "rope base 500000, the model has 10000",
        ),
        ({"rope_parameters": None, "rope_theta": 5e5}, "rope base 500000"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2}, "rope_parameters": None},
            "rope type 'linear'",
        ),
        (
            {"rope_scaling": {"rope_type": "llama3"}, "rope_parameters": None},
            "rope: factor is missing",
        ),
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported, only llama"),
        (
            {"num_attention_heads": "6"},
            "num_attention_heads must be a whole number of at least 1, got '6'",
        ),
        ({"attention_bias": True}, "attention_bias=True is not supported"),
        (
            {"rope_parameters": {"rope_theta": 1e4, "rope_type": "yarn"}},
            "rope type 'yarn' is not supported",
        ),
    ],
    ids=str,
)
def test_settings_that_no_shape_shows_are_compared(folders, changes, complaint):
    edit(folders["decoder"], **changes)
    refused(fused_model(), complaint, **folders)


def test_scaled_rope_is_compared_number_by_number(folders):
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    edit(
        folders["decoder"],
        rope_scaling=scaling | {"original_max_position_embeddings": 8192},
        rope_parameters=None,
    )
    refused(fused_model(rope_scale_factor=32), "rope scale_factor 8, the model has 32", **folders)
    edit(folders["decoder"], rope_scaling=None)
    refused(fused_model(rope_scale_factor=32), "rope scale_factor 1, the model has 32", **folders)


def test_settings_of_the_tower_are_compared(folders):
    refused(fused_model(vision_num_heads=4), "num_attention_heads 5, the model has 4", **folders)
    edit(folders["encoder"], hidden_act="gelu", layer_norm_eps=1e-6)
    refused(
        fused_model(),
        "hidden_act gelu, the model has quick_gelu",
        "layer_norm_eps 1e-06, the model has 1e-05",
        **folders,
    )


def test_a_tied_head_in_either_place(tmp_path):
    theirs = llama(tmp_path, tie_word_embeddings=True)
    untied = fused_model(tie_word_embeddings=False)
    load_pretrained(untied, decoder=tmp_path)  # one tensor there, two here
    assert torch.equal(untied.output.weight, theirs.lm_head.weight)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    tied = fused_model(tie_word_embeddings=True)
    load_pretrained(tied, decoder=tmp_path)  # two tensors there, one here
    with torch.no_grad():
        torch.testing.assert_close(tied.eval()(text()), theirs(text()).logits, rtol=0, atol=1e-4)
    tensors["lm_head.weight"] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    refused(fused_model(tie_word_embeddings=True), "unexpected: lm_head.weight", decoder=tmp_path)
    edit(tmp_path, tie_word_embeddings=False)
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    refused(fused_model(tie_word_embeddings=False), "missing: output.weight", decoder=tmp_path)


def test_buffers_of_early_files_are_passed_over(folders):
    file = folders["decoder"] / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(2)
    save_file(tensors, file)
    load_pretrained(fused_model(), **folders)


def test_a_llama_without_its_head_prefix(folders):
    rename(folders["decoder"], lambda key: key.removeprefix("model."))
    load_pretrained(fused_model(), **folders)


def test_named_encoders(tmp_path, folders):
    clip_tower(tmp_path / "other")
    model = fuse(tiny_decoder(), {"a": fused_model().encoder, "b": fused_model().encoder}, every=3)
    before = state(model)
    load_pretrained(model, encoder={"a": folders["encoder"]})
    assert not torch.equal(model.encoders["a"].conv.weight, before["encoders.a.conv.weight"])
    assert torch.equal(model.encoders["b"].conv.weight, before["encoders.b.conv.weight"])
    refused(
        model, "into encoder.c: the model's parts are decoder, encoder.a, encoder.b", encoder={"c": "x"}
    )
    refused(model, "There is nothing to load into encoder:", encoder=folders["encoder"])


def test_nothing_to_load():
    with pytest.raises(ValueError, match="nothing to load from: the model's parts are decoder, encoder"):
        load_pretrained(fused_model())


def test_a_model_of_another_make_is_named(folders):
    model = fuse(tiny_decoder(), TinyEncoder(), every=3)
    refused(
        model, "no format for a TinyEncoder, only clip, mllama_vision, hf", encoder=folders["encoder"]
    )


def test_a_model_without_memory_gets_it_tensor_by_tensor(folders):
    with torch.device("meta"):
        model = fused_model()
    load_pretrained(model, **folders)
    expected = fused_model()
    load_pretrained(expected, **folders)
    added = set(get_fusion_params(model))
    here, there = model.state_dict(), expected.state_dict()
    assert all(torch.equal(here[n], there[n]) for n in here if n not in added)
    assert all(here[n].is_meta for n in added)
    with torch.no_grad():  # what is computed and not loaded is there too
        assert torch.equal(model.eval()(text()), expected.eval()(text()))


def test_integers_are_no_weights(folders):
    file = folders["decoder"] / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int32)
    save_file(tensors, file)
    refused(
        fused_model(), "dtype: model.norm.weight is torch.int32, norm.scale is torch.float32", **folders
    )


@pytest.mark.parametrize("scheme", ["int8_weight_only", "nf4"])
def test_quantized_weights_are_not_written_over(tmp_path, scheme):
    wide = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4}
    llama(tmp_path / "llama", **wide)
    clip_tower(tmp_path / "clip")
    model = from_pretrained(decoder=tmp_path / "llama", encoder=tmp_path / "clip", every=3)
    quantize(model, scheme)
    llama(tmp_path / "llama", **wide, initializer_range=0.7)
    before = model.tok_embeddings.weight.clone()
    said = model.eval()(text())
    with pytest.raises(ValueError, match=r"quantized: layers\.0\.attn\.q_proj\.weight; load before"):
        load_pretrained(model, decoder=tmp_path / "llama")
    assert torch.equal(model.tok_embeddings.weight, before)
    assert torch.equal(model(text()), said)
