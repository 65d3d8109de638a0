import pytest
import torch
from support import LAYERS, TinyEncoder, inputs, open_gates, same_state, state, text, tiny_decoder
from torch import nn

from torchfuse import (
    describe,
    fuse,
    get_fusion_params,
    param_groups,
    register_fusion_module,
    set_trainable,
)
from torchfuse.params import fusion_buffers, partition


def model_of(**options):
    return fuse(tiny_decoder(), TinyEncoder(), every=2, fusion_vocab_size=2, **options)


def named_model():
    return fuse(tiny_decoder(), {"eye": TinyEncoder(), "ear": TinyEncoder()}, every=3)


def trains(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def names(model, *parts):
    groups = partition(model)
    return {name for part in parts for name in groups[part]}


def test_every_parameter_is_in_exactly_one_part():
    for model in (model_of(), named_model()):
        groups = partition(model)
        listed = [name for parameters in groups.values() for name in parameters]
        assert sorted(listed) == sorted(name for name, _ in model.named_parameters())
    assert list(groups) == ["decoder", "encoder.eye", "encoder.ear", "fusion"]
    assert all(name.startswith("encoders.eye.") for name in groups["encoder.eye"])
    assert {name.split(".")[0] for name in groups["fusion"]} == {"decoder", "adapters"}


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


def test_asking_for_what_is_not_there_changes_nothing():
    model = named_model()
    before = trains(model)
    with pytest.raises(ValueError, match="No encoder named nose; there are eye, ear"):
        set_trainable(model, encoder={"nose": True})
    with pytest.raises(ValueError, match="The encoder is to train, but the model has none"):
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
        ValueError, match=r"lr must name the parts that train, fusion; unknown: encoder\.eye"
    ):
        param_groups(model, lr={"encoder.eye": 1.0, "fusion": 1.0})
    with pytest.raises(ValueError, match="missing: fusion"):
        param_groups(model, lr={})
    set_trainable(model, fusion=False)
    with pytest.raises(ValueError, match="No parameter trains"):
        param_groups(model, lr=1.0)


def test_describe_adds_up():
    model = model_of()
    model.encoder.bfloat16()
    table = describe(model)
    assert table["total"].parameters == sum(p.numel() for p in model.parameters())
    assert table["total"].tensors == len(list(model.parameters()))
    assert table["fusion"].trainable == table["fusion"].parameters == table["total"].trainable
    assert table["decoder"].trainable == 0
    assert table["encoder"].dtype == "bfloat16"
    assert table["total"].dtype == "bfloat16, float32"
    printed = str(table)
    assert [line.split()[0] for line in printed.splitlines()[2:-2]] == ["decoder", "encoder", "fusion"]
    assert "(100.0 %)" in printed
    assert [row.part for row in table][-1] == "total"


def test_a_tag_that_names_nothing_is_an_error():
    module = nn.Linear(3, 5)
    module.fusion_params = lambda: ["weigth"]
    with pytest.raises(
        ValueError, match="Linear '1' names weigth, which it does not have; it has weight"
    ):
        get_fusion_params(nn.Sequential(nn.Identity(), module))


def test_buffers_of_fusion_modules_belong_to_fusion():
    adapter = nn.Sequential(nn.Linear(11, 18), nn.BatchNorm1d(7, affine=False))
    register_fusion_module(adapter)
    model = fuse(tiny_decoder(), TinyEncoder(), every=3, adapter=adapter)
    assert set(fusion_buffers(model)) == {f"adapter.1.{n}" for n in adapter[1].state_dict()}
    assert fusion_buffers(model_of()) == {}


def test_a_decoder_alone_is_all_decoder():
    decoder = tiny_decoder()
    assert list(partition(decoder)["decoder"]) == [n for n, _ in decoder.named_parameters()]
    assert same_state(state(decoder), decoder)
    assert len(decoder.layers) == LAYERS
