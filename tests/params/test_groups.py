import pytest
import torch
from params.models import named_model, trains
from support import LAYERS, TinyEncoder, tiny_decoder

from torchfuse import fuse, param_groups, set_trainable
from torchfuse.errors import ConfigError


def test_param_groups_are_named_disjoint_and_complete():
    model = named_model()
    set_trainable(model, decoder=True, encoder={"eye": True})
    rates = {"decoder": 1e-5, "encoder.eye": 1e-4, "fusion": 1e-3}
    groups = param_groups(model, lr=rates, weight_decay={"decoder": 0.1})
    assert {g["name"]: (g["lr"], g["weight_decay"]) for g in groups} == {
        "decoder": (1e-5, 0.1),
        "encoder.eye": (1e-4, 0.0),
        "fusion": (1e-3, 0.0),
    }
    ids = [id(p) for g in groups for p in g["params"]]
    assert len(ids) == len(set(ids))
    assert set(ids) == {id(p) for p in model.parameters() if p.requires_grad}
    assert {n for g in groups for n in g["param_names"]} == trains(model)
    torch.optim.AdamW(groups).step()


def test_param_groups_name_what_is_wrong():
    model = named_model()
    with pytest.raises(
        ConfigError, match=r"lr must name the parts that train, fusion; unknown: encoder\.eye"
    ):
        param_groups(model, lr={"encoder.eye": 1.0, "fusion": 1.0})
    with pytest.raises(ConfigError, match="missing: fusion"):
        param_groups(model, lr={})
    set_trainable(model, fusion=False)
    with pytest.raises(ConfigError, match="No parameter trains"):
        param_groups(model, lr=1.0)


def test_learning_rates_fall_with_depth():
    model = fuse(tiny_decoder(), TinyEncoder(), every=1, decoder_trainable=True, encoder_trainable=True)
    rates = {"decoder": 1.0, "encoder": 0.5, "fusion": 2.0}
    groups = param_groups(model, lr=rates, layer_decay=0.5)
    layers = {f"decoder.layers.{index}": 0.5 ** (LAYERS - 1 - index) for index in range(LAYERS)}
    expected = {"decoder.embeddings": 0.5**LAYERS, **layers, "decoder": 1.0}
    expected |= {"encoder.layers.0": 0.5, "fusion": 2.0}
    assert {group["name"]: group["lr"] for group in groups} == expected
    [behind] = (group for group in groups if group["name"] == "decoder")
    assert behind["param_names"] == ["decoder.norm.scale", "decoder.output.weight"]
    ids = [id(p) for group in groups for p in group["params"]]
    assert sorted(ids) == sorted(id(p) for p in model.parameters())
    with pytest.raises(ConfigError, match="layer_decay must be above 0 and at most 1, got 0"):
        param_groups(model, lr=1.0, layer_decay=0)
