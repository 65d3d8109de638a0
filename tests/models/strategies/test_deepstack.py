"""DeepStack is the joint decoder, and what its maps add to hidden states."""

import functools

import pytest
import torch
from models.architectures import (
    PLACEHOLDER,
    only_the_base_is_quantized,
    prompt,
    refused,
)
from models.architectures import move as move_all
from support import FEATURES, VOCAB, TinyEncoder, inputs, text, tiny_decoder

from torchfuse import (
    fuse,
    generate,
)
from torchfuse.modules.deepstack import DeepStackLayer

LAYOUTS = {"prefix": {"placement": "prefix"}, "placeholder": PLACEHOLDER}  # the joint decoder's, too
# Adapters stay, to be compared.
move = functools.partial(move_all, only="fusion_layer")


def fresh(layout="prefix", *, encoder=None, arch="deepstack", **options):
    encoder = encoder or TinyEncoder()
    torch.manual_seed(7)
    decoder = tiny_decoder(num_layers=4)
    torch.manual_seed(7)
    return fuse(decoder, encoder, arch=arch, **{**LAYOUTS[layout], **options})


# --- what is scored ------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_starts_as_the_joint_decoder_to_the_bit(layout, training):
    model, joint = (fresh(layout, arch=arch).train(training) for arch in ("deepstack", "joint_decoder"))
    call = {"encoder_input": inputs()}
    expected = joint(prompt(layout), **call)
    assert torch.equal(model(prompt(layout), **call), expected)
    assert not torch.allclose(move(model)(prompt(layout), **call), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_maps_add_features_to_their_positions_after_their_layers(layout):
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


# --- building ------------------------------------------------------------------------------------


def fused(**options):
    return [isinstance(layer, DeepStackLayer) for layer in fresh(**options).layers]


def test_which_layers_are_fused():
    assert fused() == [True, True, True, False]
    assert fused(layout="placeholder", layers=[3, 1]) == [False, True, False, True]
    assert fused(every=2) == [False, True, False, False]  # features after the last layer are unused
    assert fused(layout="placeholder", every=2) == [False, True, False, True]
    many = fuse(tiny_decoder(num_layers=7), TinyEncoder(), arch="deepstack")
    assert [isinstance(layer, DeepStackLayer) for layer in many.layers] == [True] * 3 + [False] * 4
    small = fuse(tiny_decoder(num_layers=2), TinyEncoder(), arch="deepstack")
    assert [isinstance(layer, DeepStackLayer) for layer in small.layers] == [True, False]
    described = small.strategy.describe(small.decoder)
    assert described == {"placement": "prefix", "encoder_token": None, "layers": [0], "hidden_dim": None}


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"layers": []}, "layers must name layers of this decoder, 0 to 2, each once; got"),
        ({"layers": [1, 2]}, r"Layer 2 is the last: with features in front.*now \[1, 2\]"),
        ({"layers": [3]}, "0 to 2, each once"),
        ({"every": 4}, "every=4 fuses no layer of this decoder, which has 3"),
        ({"hidden_dim": 0}, "hidden_dim must be at least 1, got 0"),
        ({"placement": "behind"}, "placement must be 'placeholder' or 'prefix' or null, got 'behind'"),
        ({"layers": [0], "every": 2}, r"layers=\[0\] and every=2 both choose the layers to fuse: give"),
        ({"every": 0}, "every=0 fuses no layer of this decoder, which has 3"),
        ({"depth": 3}, "architecture 'deepstack': unknown option 'depth'; it takes placement"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_named_and_nothing_has_changed(options, complaint):
    refused("deepstack", options, complaint)
    with pytest.raises(ValueError, match="Layer 0 is the last"):
        fuse(tiny_decoder(num_layers=1), TinyEncoder(), arch="deepstack")


# --- what is kept --------------------------------------------------------------------------------


def test_only_the_base_is_quantized():
    model = move(fresh()).eval()
    out = only_the_base_is_quantized(model)
    tokens = generate(model, text(), encoder_input=inputs(), max_new_tokens=1, temperature=0)
    assert torch.equal(tokens[:, -1], out[:, -1].argmax(-1))
