"""A decoder that has no more than torchtune's fusion classes call: embeddings, ``forward``, caches."""

import pytest
import torch
from support import FEATURES, IMAGE, VOCAB, WIDTH, TinyEncoder, inputs, text, text_with_image
from torch import Tensor, nn

from torchfuse import DeepFusionModel, EarlyFusionModel, register_fusion_module


class Minimal(nn.Module):
    """Mean of what came so far, and of the features; no layers, no head of its own, no max_seq_len."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.tok_embeddings = nn.Embedding(VOCAB, WIDTH)
        self.map = nn.Linear(WIDTH, VOCAB)
        self.cached = False
        self.calls: list[tuple[Tensor | None, Tensor | None]] = []

    def setup_caches(self, batch_size, dtype, **lengths):
        self.cached = True

    def caches_are_setup(self):
        return self.cached

    def reset_caches(self):
        self.cached = False

    def forward(self, tokens, *, mask=None, encoder_input=None, encoder_mask=None, input_pos=None):
        self.calls.append((encoder_mask, input_pos))
        h = self.tok_embeddings(tokens).cumsum(dim=1)
        if encoder_input is not None:
            h = h + encoder_input.mean(dim=1, keepdim=True)
        return self.map(h)


class PassThrough(nn.Module):
    def forward(self, embeds, **kwargs):
        return embeds


def encoder():
    return nn.Sequential(TinyEncoder(), nn.Linear(11, WIDTH))


def early(**options):
    return EarlyFusionModel(Minimal(), {"eye": encoder()}, {"eye": IMAGE}, **options)


def eye(x: dict[str, Tensor]):
    return {"encoder_input": {"eye": {"input": x["x"]}}}


def test_deep_fusion_calls_it_with_features():
    model, x = DeepFusionModel(Minimal(), encoder()), {"input": inputs()["x"]}
    visible = torch.ones(2, 13, FEATURES, dtype=torch.bool)
    at = torch.arange(13)
    out = model(text(), encoder_input=x, encoder_mask=visible, input_pos=at)
    assert torch.equal(out, Minimal()(text(), encoder_input=model.encoder(**x)))
    mask, at_decoder = model.decoder.calls[0]
    assert torch.equal(mask, visible)
    assert at_decoder is at
    assert torch.equal(model(text()), Minimal()(text()))


def test_deep_fusion_needs_no_embeddings():
    decoder = Minimal()
    decoder.table = decoder.tok_embeddings
    del decoder.tok_embeddings
    decoder.forward = lambda tokens, **call: decoder.map(decoder.table(tokens))
    model = DeepFusionModel(decoder, encoder())
    out = model(text(), encoder_input={"input": inputs()["x"]})
    assert torch.equal(out, decoder.map(decoder.table(text())))


def test_early_fusion_gives_it_embeddings():
    model, tokens = early(), text_with_image()
    embeds = model.tok_embeddings(tokens.clamp(max=VOCAB - 1))
    embeds = embeds.detach().clone()
    embeds[:, 2 : 2 + FEATURES] = model.encoders["eye"](inputs()["x"])
    out = model(tokens, **eye(inputs()))
    assert torch.equal(out, model.decoder.map(embeds.cumsum(dim=1)))
    assert torch.equal(model.decoder(embeds), out)  # it takes embeddings where it takes ids
    assert torch.equal(model(text()), Minimal()(text()))


def test_features_in_front_are_cut_off():
    model = EarlyFusionModel(Minimal(), encoder(), None)
    out = model(text(), encoder_input={"input": inputs()["x"]})
    embeds = torch.cat([model.encoder(inputs()["x"]), model.tok_embeddings(text())], dim=1)
    assert torch.equal(out, model.decoder.map(embeds.cumsum(dim=1))[:, FEATURES:])


@pytest.mark.parametrize("make", [early, lambda: DeepFusionModel(Minimal(), encoder())])
def test_its_names_and_caches_are_its_own(make):
    model = make()
    own = [f"decoder.{name}" for name, _ in Minimal().named_parameters()]
    assert [name for name, _ in model.named_parameters()][: len(own)] == own
    assert list(model.state_dict())[: len(own)] == own
    model.load_state_dict(make().state_dict())
    model.setup_caches(2, torch.float32)
    assert model.caches_are_setup()
    assert not model.caches_are_enabled()  # it has no such method
    model.reset_caches()
    assert not model.caches_are_setup()


def test_a_fusion_module_inside_it_trains():
    decoder = Minimal()
    register_fusion_module(decoder.map)
    model = DeepFusionModel(decoder, encoder())
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"decoder.map.weight", "decoder.map.bias"}


def test_an_exchanged_decoder_gets_the_embeddings_of_the_first():
    model, tokens = early(), text_with_image()
    table = model.tok_embeddings
    model.decoder = PassThrough()
    assert model.tok_embeddings is table
    out = model(tokens, **eye(inputs()))
    assert torch.equal(out[:, 2 : 2 + FEATURES], model.encoders["eye"](inputs()["x"]))
    assert torch.equal(out[:, 2 + FEATURES :], table(tokens[:, 2 + FEATURES :]))
    model.decoder = Minimal()
    assert model.tok_embeddings is model.decoder.tok_embeddings
    assert "tok_embeddings" not in model._modules


def test_surplus_features_are_padding_unless_strict():
    """As torchtune takes it: rows are padded to the one with the most features."""
    tokens = text()
    tokens[0, 1:4], tokens[1, 5] = IMAGE, IMAGE
    model, x = early(), inputs(num=3)
    model.decoder = PassThrough()
    out = model(tokens, **eye(x))
    features = model.encoders["eye"](x["x"])
    assert torch.equal(out[0, 1:4], features[0])
    assert torch.equal(out[1, 5], features[1, 0])
    other = torch.ones(2, 13, 29, dtype=torch.bool)  # over other features than there are: no effect
    assert torch.equal(model(tokens, **eye(x), encoder_mask=other), out)
    assert torch.equal(model(text(), **eye(x)), model(text()))
    with pytest.raises(ValueError, match="row 0 has 3 tokens and 2 features"):
        model(tokens, **eye(inputs(num=2)))
    strict = early(strict=True)
    with pytest.raises(ValueError, match="row 1 has 1 tokens and 3 features"):
        strict(tokens, **eye(x))
    with pytest.raises(ValueError, match="encoder_mask covers 29 features, but there are 3 of 'eye'"):
        strict(tokens, **eye(x), encoder_mask=other)
