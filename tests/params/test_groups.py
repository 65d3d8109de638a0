import pytest
import torch
from params.models import named_model, trains

from torchfuse import (
    param_groups,
    set_trainable,
)
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
