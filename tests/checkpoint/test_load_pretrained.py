import pytest
import torch
from checkpoint.parity import assert_close
from hf import clip_tower, edit, fused_model, llama, rename
from safetensors.torch import load_file, save_file
from support import TinyEncoder, same_state, state, text, tiny_decoder

from torchfuse import from_pretrained, fuse, get_fusion_params, load_pretrained, quantize


def refused(model, *problems, **folders):
    """All problems are in one error, and the model is unchanged."""
    before = state(model)
    with pytest.raises(ValueError) as info:
        load_pretrained(model, **folders)
    assert [problem for problem in problems if problem not in str(info.value)] == [], info.value
    assert same_state(before, model)
    return str(info.value)


def change_tensors(folder, change):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def test_only_the_given_parts_change(pretrained):
    model = fused_model(fusion_vocab_size=2, fusion_init=torch.randn(2, 24))
    before, parameters = state(model), dict(model.named_parameters())

    def changed():
        return {
            name for name, value in model.state_dict().items() if not torch.equal(value, before[name])
        }

    load_pretrained(model, decoder=pretrained["decoder"])
    assert changed() == {n for n in before if n.startswith("decoder.") and "fusion" not in n}
    load_pretrained(model, encoder=str(pretrained["encoder"]))
    assert changed() == {
        n for n in before if n.startswith(("decoder.", "encoder.")) and "fusion" not in n
    }
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert parameters["adapter.linear_1.weight"].requires_grad


def test_parameters_keep_their_dtype(pretrained):
    model = fused_model().bfloat16()
    load_pretrained(model, **pretrained)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_all_tensors_that_do_not_fit_are_one_error(folders):
    def change(tensors):
        del tensors["model.norm.weight"], tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.layers.0.mlp.down_proj.weight"] = torch.zeros(3, 5)
        tensors["model.layers.0.post_attention_layernorm.weight"] = torch.zeros(24, dtype=torch.int32)
        tensors["model.layers.7.self_attn.q_proj.weight"] = torch.zeros(1)
        tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(24)

    change_tensors(folders["decoder"], change)
    problems = [
        f"decoder from {folders['decoder']}",
        "missing: norm.scale",
        "missing: layers.1.mlp.w3.weight",
        "shape: model.layers.0.mlp.down_proj.weight is [3, 5], layers.0.mlp.w2.weight is [24, 41]",
        "dtype: model.layers.0.post_attention_layernorm.weight is torch.int32, "
        "layers.0.mlp_norm.scale is torch.float32",
        "unexpected: model.layers.7.self_attn.q_proj.weight",
        "unexpected: model.layers.0.self_attn.q_proj.bias",
    ]
    assert "encoder from" not in refused(fused_model(), *problems, **folders)
    rename(folders["encoder"], lambda key: key.replace("pre_layrnorm", "pre_layernorm"))
    problems += ["unexpected: pre_layernorm.weight", "missing: ln_pre.weight"]
    refused(fused_model(), *problems, **folders)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"num_attention_heads": 12}, "num_attention_heads 12, the model has 6"),
        ({"rms_norm_eps": 1e-6}, "rms_norm_eps 1e-06, the model has 1e-05"),
        ({"rope_parameters": {"rope_theta": 5e5}}, "rope base 500000, the model has 10000"),
        ({"rope_parameters": None, "rope_theta": 5e5}, "rope base 500000"),
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported, only llama"),
        ({"attention_bias": True}, "attention_bias=True is not supported"),
    ],
    ids=str,
)
def test_decoder_settings_are_compared(folders, changes, problem):
    edit(folders["decoder"], **changes)
    refused(fused_model(), problem, **folders)


def test_scaled_rope_is_compared(folders):
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling |= {"original_max_position_embeddings": 8192}
    edit(folders["decoder"], rope_scaling=scaling, rope_parameters=None)
    refused(fused_model(rope_scale_factor=32), "rope scale_factor 8, the model has 32", **folders)
    edit(folders["decoder"], rope_scaling=None)
    refused(fused_model(rope_scale_factor=32), "rope scale_factor 1, the model has 32", **folders)


def test_encoder_settings_are_compared(folders):
    edit(folders["encoder"], hidden_act="gelu", layer_norm_eps=1e-6)
    refused(
        fused_model(vision_num_heads=4),
        "num_attention_heads 5, the model has 4",
        "hidden_act gelu, the model has quick_gelu",
        "layer_norm_eps 1e-06, the model has 1e-05",
        **folders,
    )


def test_tied_heads_in_the_checkpoint_and_in_the_model(tmp_path):
    hf_model = llama(tmp_path, tie_word_embeddings=True)
    untied = fused_model(tie_word_embeddings=False)
    load_pretrained(untied, decoder=tmp_path)  # one tensor in the checkpoint, two in the model
    assert torch.equal(untied.output.weight, hf_model.lm_head.weight)
    head = hf_model.lm_head.weight.detach().clone()
    change_tensors(tmp_path, lambda tensors: tensors.update({"lm_head.weight": head}))
    tied = fused_model(tie_word_embeddings=True)
    load_pretrained(tied, decoder=tmp_path)  # two tensors in the checkpoint, one in the model
    with torch.no_grad():
        assert_close(tied.eval()(text()), hf_model(text()).logits)
    change_tensors(tmp_path, lambda tensors: tensors.update({"lm_head.weight": head + 1}))
    refused(fused_model(tie_word_embeddings=True), "unexpected: lm_head.weight", decoder=tmp_path)
    edit(tmp_path, tie_word_embeddings=False)
    change_tensors(tmp_path, lambda tensors: tensors.pop("lm_head.weight"))
    refused(fused_model(tie_word_embeddings=False), "missing: output.weight", decoder=tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: change_tensors(
            folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(2)})
        ),
        lambda folder: rename(folder, lambda key: key.removeprefix("model.")),
    ],
    ids=["rotary buffers", "no prefix"],
)
def test_keys_of_other_versions_of_transformers(folders, pretrained, change):
    change(folders["decoder"])
    model, expected = fused_model(), fused_model()
    load_pretrained(model, decoder=folders["decoder"])
    load_pretrained(expected, decoder=pretrained["decoder"])
    loaded = {n: t for n, t in model.decoder.state_dict().items() if "fusion" not in n}
    assert all(torch.equal(tensor, expected.decoder.state_dict()[n]) for n, tensor in loaded.items())


def test_named_encoders(pretrained):
    model = fuse(tiny_decoder(), {"a": fused_model().encoder, "b": fused_model().encoder}, every=3)
    before = state(model)
    load_pretrained(model, encoder={"a": pretrained["encoder"]})
    assert not torch.equal(model.encoders["a"].conv.weight, before["encoders.a.conv.weight"])
    assert torch.equal(model.encoders["b"].conv.weight, before["encoders.b.conv.weight"])
    refused(
        model, "into encoder.c: the model's parts are decoder, encoder.a, encoder.b", encoder={"c": "x"}
    )
    refused(model, "There is nothing to load into encoder:", encoder=pretrained["encoder"])


def test_arguments_that_do_not_fit(pretrained):
    refused(fused_model(), "nothing to load from: the model's parts are decoder, encoder")
    refused(fused_model(), "decoder, encoder cannot be given: path is the", path="x", **pretrained)


def test_a_part_of_no_format_is_named(pretrained):
    model = fuse(tiny_decoder(), TinyEncoder(), every=3)
    problem = "no format for a TinyEncoder, only clip, mllama_vision, hf"
    refused(model, problem, encoder=pretrained["encoder"])


def test_a_model_on_the_meta_device_gets_its_memory_while_loading(pretrained):
    with torch.device("meta"):
        model = fused_model()
    load_pretrained(model, **pretrained)
    expected = fused_model()
    load_pretrained(expected, **pretrained)
    added = set(get_fusion_params(model))
    got, reference = model.state_dict(), expected.state_dict()
    assert all(torch.equal(got[n], reference[n]) for n in got if n not in added)
    assert all(got[n].is_meta for n in added)
    with torch.no_grad():  # computed buffers are there too
        assert torch.equal(model.eval()(text()), expected.eval()(text()))


@pytest.mark.parametrize("scheme", ["int8_weight_only", "nf4"])
def test_quantized_weights_are_not_overwritten(tmp_path, scheme):
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4}
    llama(tmp_path / "llama", **sizes)
    clip_tower(tmp_path / "clip")
    model = from_pretrained(decoder=tmp_path / "llama", encoder=tmp_path / "clip", every=3).eval()
    quantize(model, scheme)
    llama(tmp_path / "llama", **sizes, initializer_range=0.7)
    embedding, logits = model.tok_embeddings.weight.clone(), model(text())
    with pytest.raises(ValueError, match=r"quantized: layers\.0\.attn\.q_proj\.weight; load before"):
        load_pretrained(model, decoder=tmp_path / "llama")
    assert torch.equal(model.tok_embeddings.weight, embedding)
    assert torch.equal(model(text()), logits)
