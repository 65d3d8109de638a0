import copy

import pytest
import torch
from quantization.models import (
    LINEARS_PER_LAYER,
    SCHEMES,
    distance,
    given,
    make,
    quantized_names,
)
from support import (
    IMAGE,
    VOCAB,
    TinyEncoder,
    open_gates,
    same_state,
    state,
    text,
    text_with_image,
    tiny_decoder,
)

from torchfuse import (
    describe,
    fuse,
    generate,
    get_fusion_params,
    load_fusion,
    quantize,
    save_fusion,
    set_trainable,
)
from torchfuse.errors import ModelError
from torchfuse.params import partition

DTYPES = {
    "int8_weight_only": "int8",
    "int8_dynamic": "int8",
    "float8_weight_only": "float8_e4m3fn",
    "nf4": "nf4",
}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_stay_close_and_names_modules_and_fusion_are_unchanged(scheme, dtype):
    model = make(fusion_trainable=False, dtype=dtype)
    names, before = [n for n, _ in model.named_parameters()], state(model)
    modules = {name: type(module) for name, module in model.named_modules()}
    with torch.no_grad():
        expected = model(text(), **given(dtype))
        result = quantize(model, scheme)
        assert 0 < distance(model(text(), **given(dtype)), expected) < SCHEMES[scheme]
    assert [n for n, _ in model.named_parameters()] == names and list(model.state_dict()) == list(before)
    assert {name: type(module) for name, module in model.named_modules()} == modules
    assert quantized_names(model) == set(result.quantized) <= set(partition(model)["decoder"])
    others = before.keys() - set(result.quantized)
    assert get_fusion_params(model).keys() < others
    assert all(torch.equal(before[name], model.state_dict()[name]) for name in others)
    # NF4 needs a multiple of 16384 values, which keys and values do not have here.
    fitting = LINEARS_PER_LAYER - 2 if scheme == "nf4" else LINEARS_PER_LAYER
    assert len(result.quantized) == 2 * fitting + (scheme != "nf4")
    assert result.kept["decoder.tok_embeddings.weight"] == "FusionEmbedding"
    if scheme == "nf4":
        assert "[64, 128] is not a multiple" in result.kept["decoder.layers.0.attn.k_proj.weight"]
    assert describe(model)["decoder"].dtype == ", ".join(
        sorted([str(dtype).removeprefix("torch."), DTYPES[scheme]])
    )
    assert result.bytes_after < result.bytes_before * 0.6


ARCHS = {
    "cross_attention": {"every": 2},
    "placeholder": {"arch": "joint_decoder", "encoder_token": IMAGE},
    "prefix": {"arch": "joint_decoder", "placement": "prefix"},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ARCHS)
def test_int8_changes_the_logits_of_each_generated_token_by_less_than_two_percent(name, dtype):
    """With caches, token by token; the largest change, not the mean."""
    decoder = tiny_decoder(embed_dim=72, num_heads=6, num_kv_heads=2, intermediate_dim=131)
    model = fuse(decoder, TinyEncoder(), **ARCHS[name], fusion_trainable=False).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.adapter.parameters():
            parameter.mul_(30)  # features that outweigh the embeddings
    if name == "cross_attention":
        open_gates(model)
    tokens = text_with_image() if name == "placeholder" else text()
    options = {**given(dtype), "max_new_tokens": 11, "temperature": 0, "scores": "logits"}
    expected_tokens, expected = generate(model, tokens, **options)
    quantize(model, "int8_weight_only")
    found_tokens, found = generate(model, tokens, **options)
    # Logits are comparable as long as the tokens before them are the same.
    same = (found_tokens == expected_tokens)[:, 12:-1].cumprod(dim=1).bool()
    expected, found = expected.float()[..., :VOCAB], found.float()[..., :VOCAB]
    changes = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert same.float().mean() > 0.5
    assert 0 < changes[same].max() < 0.02


@pytest.mark.parametrize("scheme", ["int8_weight_only", "float8_weight_only", "nf4"])
def test_gradients_of_fusion_over_a_quantized_base_are_close_to_those_over_the_base(scheme):
    def gradients(model):
        model(text(), **given()).square().mean().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    model = make()
    expected = gradients(copy.deepcopy(model))
    quantize(model, scheme)
    found = gradients(model)
    assert found.keys() == expected.keys() == get_fusion_params(model).keys()
    found, expected = (torch.cat([g[name].flatten() for name in found]) for g in (found, expected))
    assert distance(found, expected) < 2 * SCHEMES[scheme]


def test_a_model_quantized_in_inference_mode_can_be_trained():
    model = make()
    with torch.inference_mode():
        quantize(model, "int8_weight_only")
    model(text(), **given()).sum().backward()
    assert all(p.grad is not None for p in get_fusion_params(model).values())


def test_int8_dynamic_is_refused_below_trainable_parameters():
    model = make()
    before = state(model)
    with pytest.raises(
        ModelError, match=r"int8_dynamic has no gradient.*decoder\.tok_embeddings\.fusion"
    ):
        quantize(model, "int8_dynamic")
    assert same_state(before, model) and not quantized_names(model)
    set_trainable(model, fusion=False)
    quantize(model, "int8_dynamic")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_generation_with_caches_equals_generation_without(scheme):
    model = make(fusion_trainable=False)
    quantize(model, scheme)
    tokens = generate(model, text(), **given(), max_new_tokens=3, temperature=0)
    assert tokens.shape == (2, 13 + 3)
    with torch.no_grad():
        for at in range(13, 16):
            assert torch.equal(model(tokens[:, :at], **given())[:, -1].argmax(-1), tokens[:, at])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_fusion_artifacts_load_over_a_quantized_base_and_over_the_base(scheme, tmp_path):
    trained, fresh = make(fusion_trainable=False), make(fusion_trainable=False)
    with torch.no_grad():
        for p in get_fusion_params(trained).values():
            p.add_(0.1 * torch.randn_like(p))
    quantize(trained, scheme)
    quantize(fresh, scheme)
    save_fusion(trained, tmp_path)
    with torch.no_grad():
        assert not torch.equal(fresh(text(), **given()), trained(text(), **given()))
        assert not any(load_fusion(fresh, tmp_path))
        assert torch.equal(fresh(text(), **given()), trained(text(), **given()))
    assert not any(load_fusion(make(), tmp_path))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_copies_and_checkpoints(scheme, tmp_path):
    model = make(fusion_trainable=False)
    quantize(model, scheme)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=True)
    plain, quantized = make(seed=7, fusion_trainable=False), make(seed=7, fusion_trainable=False)
    plain.load_state_dict(loaded, assign=True)
    quantize(quantized, scheme)
    quantized.load_state_dict(loaded)
    with torch.no_grad():
        expected = model(text(), **given())
        for other in (copy.deepcopy(model), plain, quantized):
            assert torch.equal(other(text(), **given()), expected)
            assert quantized_names(other) == quantized_names(model)


def test_compiles_into_one_graph():
    model = fuse(tiny_decoder(num_layers=1), TinyEncoder(), every=1)
    open_gates(model).eval()
    quantize(model, "int8_weight_only")
    with torch.no_grad():
        expected = model(text(), **given())
        found = torch.compile(model, fullgraph=True, backend="aot_eager")(text(), **given())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
