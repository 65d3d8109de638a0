"""DeepStack is the joint decoder, and what its maps add to hidden states."""

import copy

import pytest
import torch
from support import FEATURES, IMAGE, VOCAB, TinyEncoder, inputs, text, tiny_decoder

from torchfuse import (
    MixtureFusionModel,
    from_pretrained,
    fuse,
    generate,
    get_fusion_params,
    load_fusion,
    quantize,
    save_fusion,
    save_pretrained,
)
from torchfuse.encoders.clip import ClipVisionEncoder
from torchfuse.models import DeepStackStrategy
from torchfuse.models.llama import llama_decoder
from torchfuse.modules.deep_stack import DeepStackLayer

PLACEHOLDER = {"placement": "placeholder", "encoder_token": IMAGE}
LAYOUTS = {"prefix": {"placement": "prefix"}, "placeholder": PLACEHOLDER}
TWO = {"eye": IMAGE, "ear": IMAGE + 1}


@torch.no_grad()
def move(model, scale=0.3):
    generator = torch.Generator().manual_seed(23)
    for name, parameter in get_fusion_params(model).items():
        if "fusion_layer" in name:  # adapters stay, to be compared
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return model


def fresh(layout="prefix", *, encoder=None, arch="deepstack", **options):
    encoder = encoder or TinyEncoder()
    torch.manual_seed(7)
    decoder = tiny_decoder(num_layers=4)
    torch.manual_seed(7)
    return fuse(decoder, encoder, arch=arch, **{**LAYOUTS[layout], **options})


def prompt(layout, batch=2, length=13, start=2):
    tokens = text(batch, length)
    if layout == "placeholder":
        tokens[:, start : start + FEATURES] = IMAGE
    return tokens


# --- what is scored ------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_begins_as_the_joint_decoder_to_the_bit(layout, training):
    model, joint = (fresh(layout, arch=arch).train(training) for arch in ("deepstack", "joint_decoder"))
    call = {"encoder_input": inputs()}
    expected = joint(prompt(layout), **call)
    assert torch.equal(model(prompt(layout), **call), expected)
    assert not torch.allclose(move(model)(prompt(layout), **call), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_maps_add_features_behind_their_layers_where_features_stand(layout):
    model = move(fresh(layout, layers=[0, 2], hidden_dim=11))
    tokens, features = prompt(layout), model.encode(inputs())
    plain, at = tiny_decoder(num_layers=4), slice(0, FEATURES)
    if layout == "prefix":
        h = torch.cat([features, plain.tok_embeddings(tokens)], dim=1)
    else:
        at = slice(2, 2 + FEATURES)
        h = plain.tok_embeddings(tokens.clamp(max=VOCAB - 1))
        h[:, at] = features
    for index, layer in enumerate(plain.layers):
        h = layer(h)
        if index in (0, 2):
            added = model.layers[index].fusion_layer["encoder"]
            assert added.w1.weight.shape == (11, 18)
            inner = torch.einsum("bnd,hd->bnh", features, added.w1.weight) + added.w1.bias
            inner = inner * 0.5 * (1 + torch.erf(inner / 2**0.5))
            more = torch.einsum("bnh,dh->bnd", inner, added.w2.weight) + added.w2.bias
            h = torch.cat([h[:, : at.start], h[:, at] + more, h[:, at.stop :]], dim=1)
    expected = plain.unembed(h)[:, -13:]
    out = model(tokens, encoder_input=inputs())
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_several_images_of_several_encoders_equal_their_rows_one_by_one():
    encoders = {"eye": TinyEncoder(), "ear": TinyEncoder(seed=6)}
    model = move(fresh("placeholder", encoder=encoders, encoder_token=TWO))
    tokens = text(4, 14)
    tokens[0, 1:7], tokens[0, 9:11] = IMAGE, IMAGE + 1
    tokens[1, 5:8], tokens[3, 2:5] = IMAGE, IMAGE
    tokens[3, 5:7] = IMAGE + 1
    given = {"eye": inputs(4, 6), "ear": inputs(4, 2)}
    masks = {
        "eye": torch.tensor([[1] * 6, [0, 0, 0, 1, 1, 1], [0] * 6, [1, 1, 1, 0, 0, 0]]).bool(),
        "ear": torch.tensor([[1, 1], [0, 0], [0, 0], [1, 1]]).bool(),
    }
    together = model(tokens, encoder_input=given, encoder_mask=masks)
    for row in range(4):
        one = slice(row, row + 1)
        mine = {n: {"x": given[n]["x"][one][:, masks[n][row]]} for n in given if masks[n][row].any()}
        alone = model(tokens[one], encoder_input=mine)
        torch.testing.assert_close(together[one], alone, rtol=1e-4, atol=1e-5)


# --- building ------------------------------------------------------------------------------------


def fused(**options):
    return [isinstance(layer, DeepStackLayer) for layer in fresh(**options).layers]


def test_which_layers_are_fused():
    assert fused() == [True, True, True, False]
    assert fused(layout="placeholder", layers=[3, 1]) == [False, True, False, True]
    assert fused(every=2) == [False, True, False, False]  # nobody reads features behind the last
    assert fused(layout="placeholder", every=2) == [False, True, False, True]
    small = fuse(tiny_decoder(num_layers=2), TinyEncoder(), arch="deepstack")
    assert [isinstance(layer, DeepStackLayer) for layer in small.layers] == [True, False]
    described = small.strategy.describe(small.decoder)
    assert described == {"placement": "prefix", "encoder_token": None, "layers": [0], "hidden_dim": None}


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"layers": []}, "layers must name layers of this decoder, 0 to 2, each once; got"),
        ({"layers": [1, 2]}, r"Layer 2 is the last: where features stand in front.*now \[1, 2\]"),
        ({"layers": [3]}, "0 to 2, each once"),
        ({"every": 4}, "every=4 fuses no layer of this decoder, which has 3"),
        ({"hidden_dim": 0}, "hidden_dim must be at least 1, got 0"),
        ({"placement": "behind"}, 'placement must be "placeholder" or "prefix"'),
        ({"depth": 3}, "architecture 'deepstack': unknown option 'depth'; it takes placement"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_named_and_nothing_has_changed(options, complaint):
    decoder = tiny_decoder()
    before = [(name, id(module)) for name, module in decoder.named_modules()]
    with pytest.raises(ValueError, match=complaint):
        fuse(decoder, TinyEncoder(), arch="deepstack", **options)
    assert [(name, id(module)) for name, module in decoder.named_modules()] == before
    with pytest.raises(ValueError, match="Layer 0 is the last"):
        fuse(tiny_decoder(num_layers=1), TinyEncoder(), arch="deepstack")


def test_a_decoder_that_lacks_what_the_model_needs_is_refused():
    with pytest.raises(ValueError, match='no layer is a DeepStackLayer.*arch="deepstack"'):
        MixtureFusionModel(tiny_decoder(), TinyEncoder(), strategy=DeepStackStrategy())
    decoder = fresh().decoder
    with pytest.raises(ValueError, match="layer 0 has weights for encoder, not for eye; layer 1"):
        MixtureFusionModel(decoder, {"eye": TinyEncoder()}, strategy=DeepStackStrategy())


# --- what is kept --------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_artifact_holds_what_was_learned(layout, tmp_path):
    model, other = move(fresh(layout)), fresh(layout)
    save_fusion(model, tmp_path)
    load_fusion(other, tmp_path)
    given = {"encoder_input": inputs()}
    assert torch.equal(other(prompt(layout), **given), model(prompt(layout), **given))
    with pytest.raises(ValueError, match="placement '(prefix|placeholder)', the model's is"):
        load_fusion(fresh(next(name for name in LAYOUTS if name != layout)), tmp_path)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_directory_holds_the_whole_model(layout, tmp_path):
    torch.manual_seed(3)
    numbers = {"num_heads": 3, "num_kv_heads": 1, "embed_dim": 18, "intermediate_dim": 29}
    decoder = llama_decoder(vocab_size=VOCAB, num_layers=3, max_seq_len=53, **numbers)
    tower = ClipVisionEncoder(image_size=12, patch_size=4, embed_dim=10, num_layers=2, num_heads=5)
    model = move(fuse(decoder, tower, arch="deepstack", hidden_dim=7, **LAYOUTS[layout]))
    save_pretrained(model, tmp_path)
    other = from_pretrained(tmp_path)
    assert list(other.state_dict()) == list(model.state_dict())
    assert other.strategy.describe(other.decoder) == model.strategy.describe(model.decoder)
    tokens = text()
    if layout == "placeholder":
        tokens[:, 1:10] = IMAGE
    call = {"encoder_input": {"images": torch.randn(2, 3, 12, 12)}}
    assert torch.equal(other(tokens, **call), model(tokens, **call))


def test_only_the_base_is_quantized():
    model = move(fresh()).eval()
    exact = model(text(), encoder_input=inputs())
    report = quantize(model, "int8_weight_only", parts=("decoder",))
    assert "decoder.layers.0.mlp.w2.weight" in report.quantized
    assert not any("fusion_layer" in name for name in report.quantized)
    out = model(text(), encoder_input=inputs())
    assert 0 < (out - exact).norm() < 0.05 * exact.norm()
    said = generate(model, text(), encoder_input=inputs(), max_new_tokens=1, temperature=0)
    assert torch.equal(said[:, -1], out[:, -1].argmax(-1))


def test_bf16_stays_bf16_and_copies_copy():
    decoder = tiny_decoder().bfloat16()
    model = fuse(decoder, TinyEncoder(), arch="deepstack", **PLACEHOLDER)
    assert {p.dtype for p in get_fusion_params(model.decoder).values()} == {torch.bfloat16}
    tokens = prompt("placeholder")
    out = model(tokens, encoder_input=inputs())
    assert out.shape == (2, 13, VOCAB)
    assert torch.equal(copy.deepcopy(model)(tokens, encoder_input=inputs()), out)
