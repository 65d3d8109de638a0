"""Every call of torchtune 0.6.1's fusion modules is accepted."""

import inspect

import pytest
import torch
from support import IMAGE as IMAGE_TOKEN
from support import TinyEncoder, inputs, open_gates, text, text_with_image, tiny_decoder
from torch import nn
from torchtune.generation import generate as torchtune_generate
from torchtune.modules import TransformerDecoder, delete_kv_caches, local_kv_cache, model_fusion

import torchfuse
from torchfuse import fuse

CLASSES = ["FusionLayer", "FusionEmbedding", "DeepFusionModel", "EarlyFusionModel"]
FUNCTIONS = ["register_fusion_module", "get_fusion_params"]


def own_methods(cls):
    plain = set(dir(nn.Module)) - {"__init__", "forward"}
    return [
        n
        for n, f in inspect.getmembers(cls, callable)
        if n not in plain and (n == "__init__" or n[0] != "_")
    ]


def assert_accepts(function, reference, what):
    """Check that every call that fits the reference's signature fits the function's."""
    parameters = inspect.signature(function).parameters
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for position, (name, parameter) in enumerate(inspect.signature(reference).parameters.items()):
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        assert name in parameters or anything, f"{what} lacks {name}"
        if name not in parameters:
            continue
        got = parameters[name]
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
            assert got.kind is got.POSITIONAL_OR_KEYWORD, f"{what}: {name} is no longer positional"
            assert list(parameters)[position] == name, f"{what}: {name} has moved"
        if parameter.default is not parameter.empty:
            assert got.default is not got.empty, f"{what}: {name} is no longer optional"
            assert got.default == parameter.default, f"{what}: {name} has another default"
    required = {
        n
        for n, p in parameters.items()
        if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    }
    assert required <= set(inspect.signature(reference).parameters), f"{what} requires more"


@pytest.mark.parametrize("name", CLASSES)
def test_methods_accept_torchtunes_calls(name):
    cls, reference = getattr(torchfuse, name), getattr(model_fusion, name)
    methods = own_methods(reference)
    assert "forward" in methods
    assert "__init__" in methods
    for method in methods:
        assert_accepts(getattr(cls, method), getattr(reference, method), f"{name}.{method}")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_accept_torchtunes_calls(name):
    assert_accepts(getattr(torchfuse, name), getattr(model_fusion, name), name)


def models():
    yield fuse(tiny_decoder(), TinyEncoder(), every=2)
    yield fuse(tiny_decoder(), TinyEncoder(), arch="joint_decoder", encoder_token=IMAGE_TOKEN)
    yield fuse(tiny_decoder(), TinyEncoder(), arch="joint_decoder", placement="prefix")


@pytest.mark.parametrize("index", range(3))
def test_everything_public_of_a_decoder_is_there(index):
    model, decoder = list(models())[index], tiny_decoder()
    public = {n for n in [*vars(decoder), *decoder._modules, *dir(TransformerDecoder)] if n[0] != "_"}
    public |= {"tok_embeddings", "layers", "norm", "output", "max_seq_len", "num_heads", "head_dim"}
    missing = sorted(n for n in public if not hasattr(model, n))
    assert missing == []
    assert len({id(m) for m in model.modules()}) == len(list(model.modules()))
    names = [name for name, _ in model.named_modules()]
    assert sum(name.endswith("tok_embeddings") for name in names) == 1
    assert model.layers is model.decoder.layers
    assert model.output is model.decoder.output
    assert_accepts(model.forward, decoder.forward, "forward")


def test_attributes_are_assigned_to_the_decoder():
    model = next(models())
    keys = list(model.state_dict())
    model.output_hidden_states = [1]
    model.num_output_chunks = 2
    model.norm = nn.Identity()
    assert model.decoder.output_hidden_states == [1]
    assert model.decoder.num_output_chunks == 2
    assert isinstance(model.decoder.norm, nn.Identity)
    assert "norm" not in model._modules
    assert [k for k in keys if k != "decoder.norm.scale"] == list(model.state_dict())


def test_chunked_output_and_hidden_states():
    model, prefix = fuse(tiny_decoder(), TinyEncoder(), every=2), list(models())[2]
    tokens = text()
    whole = model(tokens)
    model.set_num_output_chunks(3)
    chunks = model(tokens)
    assert len(chunks) == 3
    torch.testing.assert_close(torch.cat(chunks, dim=1), whole, rtol=1e-5, atol=1e-6)
    prefix.output_hidden_states = [0, 2]
    *hidden, logits = prefix(tokens, encoder_input=inputs())
    assert [h.shape[1] for h in hidden] == [tokens.shape[1]] * 2
    assert logits.shape[:2] == tokens.shape
    assert torch.equal(hidden[0], prefix.tok_embeddings(tokens))


@pytest.mark.parametrize("index", range(3))
@pytest.mark.parametrize("padded", [False, True])
def test_torchtunes_generate_with_and_without_caches(index, padded):
    model = list(models())[index].eval()
    if index == 0:
        open_gates(model)
    prompt = text(3, 5)
    if padded:
        prompt[1, :2] = prompt[2, :1] = 0
    kwargs = {"max_generated_tokens": 11, "temperature": 0.0, "pad_id": 0}
    plain, logits = torchtune_generate(model, prompt, **kwargs)
    with local_kv_cache(
        model, batch_size=3, device=torch.device("cpu"), dtype=torch.float32, decoder_max_seq_len=16
    ):
        cached, cached_logits = torchtune_generate(model, prompt, **kwargs)
        model.reset_caches()
        again, _ = torchtune_generate(model, prompt, **kwargs)
    assert not model.caches_are_setup()
    assert plain.shape == (3, 16)
    assert torch.equal(plain, cached)
    assert torch.equal(plain, again)
    torch.testing.assert_close(logits, cached_logits, rtol=1e-4, atol=1e-5)
    reference, _ = torchtune_generate(tiny_decoder().eval(), prompt, **kwargs)
    assert torch.equal(plain, reference)


def test_caches_with_torchtunes_own_calls():
    """An image at the prompt, steps that find it in the cache, torchtune's helpers to clean up."""
    model = open_gates(next(models())).eval()
    tokens, image = text(2, 6), inputs()
    with torch.no_grad():
        expected = model(tokens, encoder_input=image)
        model.setup_caches(2, torch.float32, encoder_max_seq_len=9, decoder_max_seq_len=8)
        assert model.encoder_max_cache_seq_len == 9
        assert model.decoder_max_cache_seq_len == 8
        causal = torch.ones(8, 8, dtype=torch.bool).tril()[None].expand(2, -1, -1)
        visible = torch.ones(2, 4, 7, dtype=torch.bool)
        got = [
            model(
                tokens[:, :4],
                encoder_input=image,
                encoder_mask=visible,
                mask=causal[:, :4],
                input_pos=torch.arange(4),
            )
        ]
        for at in (4, 5):
            step = {"mask": causal[:, at : at + 1], "input_pos": torch.tensor([at])}
            got.append(model(tokens[:, at : at + 1], encoder_mask=visible[:, :1], **step))
    torch.testing.assert_close(torch.cat(got, dim=1), expected, rtol=1e-4, atol=1e-5)
    delete_kv_caches(model)
    with torch.no_grad():
        assert torch.equal(model(tokens, encoder_input=image), expected)


def test_caches_need_mask_and_positions():
    model = next(models()).eval()
    model.setup_caches(2, torch.float32, encoder_max_seq_len=7, decoder_max_seq_len=8)
    with pytest.raises(ValueError, match=r"mask \(\[b, s, slots\].* and input_pos must be given"):
        model(text(2, 4))


def torchtune_style():
    """Models put together by hand, as torchtune's documentation does it."""
    from torchfuse import (
        DeepFusionModel,
        EarlyFusionModel,
        FusionEmbedding,
        FusionLayer,
        register_fusion_module,
    )
    from torchfuse.models.layers import cross_attention_layer

    def encoder():
        projection = nn.Linear(11, 18)
        register_fusion_module(projection)
        return nn.Sequential(nn.Linear(5, 11), projection)

    decoder = tiny_decoder()
    new = cross_attention_layer(embed_dim=18, num_heads=3, num_kv_heads=1, head_dim=6, hidden_dim=23)
    decoder.layers[1] = FusionLayer(decoder.layers[1], new)
    decoder.tok_embeddings = FusionEmbedding.from_pretrained(decoder.tok_embeddings, 2)
    deep = DeepFusionModel(decoder, encoder(), fusion_trainable=True)
    early = EarlyFusionModel(
        tiny_decoder(), {"image": encoder()}, {"image": IMAGE_TOKEN}, False, {"image": False}
    )
    return deep, early


def test_models_put_together_by_hand():
    deep, early = torchtune_style()
    image = {"input": inputs()["x"]}
    assert torch.equal(deep(text()), tiny_decoder()(text()))
    open_gates(deep)
    assert not torch.equal(deep(text(), encoder_input=image), deep(text()))
    trained = {n for n, p in deep.named_parameters() if p.requires_grad}
    assert {n.split(".")[0] for n in trained} == {"decoder", "encoder"}
    assert "encoder.1.weight" in trained
    assert "encoder.0.weight" not in trained
    assert early(text_with_image(), encoder_input={"image": image}).shape == (2, 13, 37)
    assert early.encoders_trainable == {"image": True}  # its projection
    with pytest.raises(ValueError, match="names of the encoders, image; got audio"):
        torchfuse.EarlyFusionModel(
            tiny_decoder(), {"image": TinyEncoder()}, {"image": 1}, False, {"audio": True}
        )
