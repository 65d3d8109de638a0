import pytest
import torch
from params.models import model_of, named_model, names, trains
from support import inputs, open_gates, state, text, tiny_decoder

from torchfuse import (
    get_fusion_params,
    param_groups,
    set_trainable,
)


@pytest.mark.parametrize("decoder", [False, True])
@pytest.mark.parametrize("encoder", [False, True])
@pytest.mark.parametrize("fusion", [False, True])
def test_what_trains_is_what_was_asked_for(decoder, encoder, fusion):
    asked = {"decoder": decoder, "encoder": encoder, "fusion": fusion}
    expected = [part for part, train in asked.items() if train]
    model = model_of()
    set_trainable(model, **asked)
    assert trains(model) == names(model, *expected)
    built = model_of(**{f"{part}_trainable": train for part, train in asked.items()})
    assert trains(built) == names(built, *expected)


def test_named_encoders_train_by_name():
    model = named_model()
    set_trainable(model, encoder={"ear": True})
    assert trains(model) == names(model, "encoder.ear", "fusion")
    set_trainable(model, encoder=True, fusion=False)
    assert trains(model) == names(model, "encoder.eye", "encoder.ear")


def test_parts_that_do_not_exist_are_refused():
    model = named_model()
    before = trains(model)
    with pytest.raises(ValueError, match="No encoder named nose; there are eye, ear"):
        set_trainable(model, encoder={"nose": True})
    with pytest.raises(
        ValueError, match="encoder=True, but the model has no encoder; it has decoder, fusion"
    ):
        set_trainable(tiny_decoder(), encoder=True)
    with pytest.raises(ValueError, match="Nothing to train in fusion.*It has decoder"):
        set_trainable(tiny_decoder())
    assert trains(model) == before


def test_only_what_trains_moves():
    model = open_gates(model_of())
    before = state(model)
    optimizer = torch.optim.AdamW(param_groups(model, lr=0.1, weight_decay=0.1))
    tokens = text()
    tokens[0, 0] = 37  # a new token
    model(tokens, encoder_input=inputs()).square().mean().backward()
    optimizer.step()
    fusion = get_fusion_params(model)
    moved = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    assert moved == set(fusion)


def test_frozen_modules_stay_in_evaluation_mode():
    model = model_of().train()
    assert not model.encoder.training
    assert not model.decoder.layers[0].training
    assert model.decoder.layers[1].fusion_layer.training
    assert not model.decoder.layers[1].wrapped.training
    assert model.adapter.training
    set_trainable(model, encoder=True)
    assert model.encoder.training
    set_trainable(model)
    assert not model.encoder.training
    assert not any(m.training for m in model.eval().modules())
    with torch.no_grad():
        assert not set_trainable(model, encoder=True)
    assert not model.encoder.training
