"""Parameters that were initialized from pretrained values follow the values that are loaded."""

import pytest
import torch
from hf import fused_model
from safetensors.torch import load_file, save_file

from torchfuse import from_pretrained, get_fusion_params, load_pretrained
from torchfuse.models.decoders.llama import llama_decoder
from torchfuse.modules.experts.transformer_expert import LAST_MAPS

IMAGE = 47
PLACEHOLDER = {"placement": "placeholder", "encoder_token": IMAGE}
ARCHS = {
    "mot": {"arch": "mot"},
    "mot_placeholder": {"arch": "mot", **PLACEHOLDER},
    "mot_zero": {"arch": "mot", "start": "zero"},
    "moma": {"arch": "moma", "num_text_experts": 3},
    "moma_zero": {"arch": "moma", "start": "zero", **PLACEHOLDER},
}


def make(name, **options):
    new = {"every": 1, "fusion_vocab_size": 2, "fusion_head": True}
    return fused_model(**{**new, **ARCHS[name], **options})


def fused(model):
    return list(model.strategy.fused_layers(model.decoder).values())


def experts_of(model):
    """Yield every expert, the pretrained module that it is a copy of, and its parameters that start at zero."""
    for layer in fused(model):
        if model.strategy.arch == "mot":
            zeros = LAST_MAPS if model.strategy.start == "zero" else ()
            yield from ((layer.wrapped, expert, zeros) for expert in layer.fusion_layer.values())
            continue
        for name, group in layer.fusion_layer.experts.items():
            zero = name == "text" or model.strategy.start == "zero"
            yield from ((layer.wrapped.mlp, expert, ("w2.",) if zero else ()) for expert in group)
    if model.strategy.arch == "mot" and model.strategy.placement == "placeholder":
        yield from ((model.norm.wrapped, expert, ()) for expert in model.norm.fusion_layer.values())


def assert_copies(model):
    checked = 0
    for pretrained, expert, zeros in experts_of(model):
        source = dict(pretrained.named_parameters())
        for name, parameter in expert.named_parameters():
            expected = torch.zeros_like(parameter) if name.startswith(zeros) else source[name]
            assert torch.equal(parameter, expected), name
            checked += 1
    assert checked


@pytest.mark.parametrize("name", ARCHS)
def test_copies_and_means_follow_the_loaded_values(name, pretrained):
    model = make(name)
    parameters = dict(model.named_parameters())
    before = {n: p.detach().clone() for n, p in parameters.items()}
    load_pretrained(model, decoder=pretrained["decoder"])
    assert not torch.equal(model.layers[0].mlp.w1.weight, before["decoder.layers.0.mlp.w1.weight"])
    assert_copies(model)
    table, head = model.tok_embeddings, model.output
    for rows, new in ((table.weight, table.fusion_embedding), (head.weight, head.fusion_linear)):
        torch.testing.assert_close(new.weight, rows.mean(dim=0).expand(2, -1), rtol=1e-5, atol=1e-6)
    assert all(p is parameters[n] for n, p in model.named_parameters())
    # Routers and adapters are no copies.
    for parameter_name, parameter in get_fusion_params(model).items():
        if "router" in parameter_name or "adapter" in parameter_name:
            assert torch.equal(parameter, before[parameter_name]), parameter_name
    assert all(p.requires_grad for p in get_fusion_params(model).values())


@pytest.mark.parametrize("name", ["mot", "moma"])
def test_parameters_that_have_changed_are_kept(name, pretrained):
    model = make(name)
    changed = fused(model)[0].fusion_layer
    with torch.no_grad():
        next(p for n, p in changed.named_parameters() if n.endswith("w1.weight"))[1, 2] += 1e-3
        model.tok_embeddings.fusion_embedding.weight[1] += 1.0
    kept = [*changed.parameters(), model.tok_embeddings.fusion_embedding.weight]
    before = [p.detach().clone() for p in kept]
    load_pretrained(model, decoder=pretrained["decoder"])
    assert all(torch.equal(p, value) for p, value in zip(kept, before, strict=True))
    assert fused(model)[1].experts_are_fresh()
    assert not fused(model)[0].experts_are_fresh()
    mean = model.output.weight.mean(dim=0).expand(2, -1)
    torch.testing.assert_close(model.output.fusion_linear.weight, mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["mot_placeholder", "moma"])
def test_nothing_follows_a_part_that_is_not_loaded(name, folders):
    model = make(name)
    before = {n: p.detach().clone() for n, p in get_fusion_params(model).items()}

    def same():
        return all(torch.equal(p, before[n]) for n, p in get_fusion_params(model).items())

    load_pretrained(model, encoder=folders["encoder"])
    assert same()
    file = folders["decoder"] / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    save_file(tensors, file)
    with pytest.raises(ValueError, match="Nothing was loaded.*\n.*\n.*missing: norm.scale"):
        load_pretrained(model, decoder=folders["decoder"])
    assert same()
    assert_copies(model)


@pytest.mark.parametrize("name", ARCHS)
def test_from_pretrained_copies_the_loaded_values(name, pretrained):
    model = from_pretrained(**pretrained, **ARCHS[name], fusion_vocab_size=2)
    reference = llama_decoder(
        vocab_size=37,
        num_layers=3,
        num_heads=6,
        num_kv_heads=2,
        embed_dim=24,
        max_seq_len=61,
        intermediate_dim=41,
        tie_word_embeddings=False,
    )
    load_pretrained_decoder(reference, pretrained["decoder"])
    assert torch.equal(model.layers[1].mlp.w1.weight, reference.layers[1].mlp.w1.weight)
    assert_copies(model)
    table = model.tok_embeddings
    mean = reference.tok_embeddings.weight.mean(dim=0).expand(2, -1)
    torch.testing.assert_close(table.fusion_embedding.weight, mean, rtol=1e-5, atol=1e-6)


def load_pretrained_decoder(decoder, folder):
    from torchtune.models.convert_weights import hf_to_tune

    tensors = load_file(folder / "model.safetensors")
    decoder.load_state_dict(
        hf_to_tune(tensors, num_heads=6, num_kv_heads=2, dim=24), strict=True, assign=True
    )
