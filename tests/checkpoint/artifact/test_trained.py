import json

import pytest
import torch
from models import architectures
from models.architectures import ROUTED
from ranks import run_on_ranks
from safetensors import safe_open
from support import TinyEncoder, inputs, same_state, state, text, tiny_decoder
from torch import nn

from torchfuse import fuse, get_fusion_params, load_fusion, save_fusion, set_trainable
from torchfuse.checkpoint.artifact.trained import load_trained, save_trained
from torchfuse.params import (
    FreezeSchedule,
    FreezeSpec,
    FreezeStage,
    canonical_freeze_meta,
    read_freeze_meta,
)
from torchfuse.training import shard


def make(**trainable):
    model = fuse(tiny_decoder(), TinyEncoder(), every=2, on_missing="participate")
    set_trainable(model, **trainable)
    return model


@torch.no_grad()
def move(model):
    """Change every parameter that trains, and nothing else."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter))
    return model


def names_in(path):
    with safe_open(path / "trained.safetensors", framework="pt") as reader:
        return set(reader.keys())


@pytest.mark.parametrize(
    "trainable",
    [{"decoder": True}, {"encoder": True}, {"decoder": True, "encoder": True, "fusion": False}],
    ids=str,
)
def test_what_trained_is_saved_and_loaded(tmp_path, trainable):
    model = move(make(**trainable))
    save_trained(model, tmp_path)
    parts = {name.split(".")[0] for name in names_in(tmp_path)}
    assert parts == {part for part in ("decoder", "encoder") if trainable.get(part)}
    assert not any("fusion" in name for name in names_in(tmp_path))
    fresh = make()
    load_trained(fresh, tmp_path)
    assert same_state(state(model), fresh)
    assert torch.equal(fresh(text(), encoder_input=inputs()), model(text(), encoder_input=inputs()))


def test_running_means_of_trained_modules_are_saved(tmp_path):
    def with_norm():
        encoder = TinyEncoder()
        encoder.norm = nn.BatchNorm1d(3)
        return fuse(tiny_decoder(), encoder, every=2, encoder_trainable=True)

    model = move(with_norm())
    model.encoder.norm.running_mean += 2
    model.encoder.norm.num_batches_tracked += 5
    save_trained(model, tmp_path)
    fresh = with_norm()
    load_trained(fresh, tmp_path)
    assert same_state(state(model), fresh)


def test_parameters_of_earlier_stages_are_saved_by_name(tmp_path):
    stages = [
        FreezeStage(3, (FreezeSpec("*", True), FreezeSpec("adapter", False))),
        FreezeSpec("encoder.layers.0.weight", False),
    ]
    model = make()
    schedule = FreezeSchedule(stages)
    trained = schedule.trained_ever(model)
    for step in (0, 3):
        schedule.apply(model, step)
        move(model)
    save_trained(model, tmp_path, trained=trained, stages=schedule)
    assert names_in(tmp_path) == {"encoder.layers.0.weight"}
    fresh = make()
    load_trained(fresh, tmp_path)
    assert same_state(state(model), fresh)
    described = json.loads((tmp_path / "fusion.json").read_text())
    assert described["trainable"]["encoder"] == ["encoder.layers.0.weight"]
    assert described["freeze"] == canonical_freeze_meta(stages)
    assert read_freeze_meta(described["freeze"]) == schedule.stages
    with pytest.raises(ValueError, match="trained has names that are no parameters of the model: nose"):
        save_trained(model, tmp_path, trained=["nose"])


def test_the_order_of_freeze_specs_is_recorded(tmp_path):
    order = [FreezeSpec("encoder", True), FreezeSpec("encoder.layers.0", False)]
    found = []
    for specs in (order, order[::-1]):
        save_fusion(make(), tmp_path, stages=specs)
        found.append(json.loads((tmp_path / "fusion.json").read_text())["freeze"])
    assert found[0] != found[1]
    assert [s["module"] for s in found[1][0]["specs"]] == ["encoder.layers.0", "encoder"]
    save_fusion(make(), tmp_path)
    assert json.loads((tmp_path / "fusion.json").read_text())["freeze"] == []


def test_only_fusion_trained_is_the_artifact_alone(tmp_path):
    save_trained(move(make(decoder=True)), tmp_path)
    model = move(make())
    save_trained(model, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"fusion.json", "fusion.safetensors"}
    fresh = make()
    load_trained(fresh, tmp_path)
    assert same_state(state(model), fresh)


def test_files_of_two_saves_are_not_loaded_together(tmp_path):
    save_trained(move(make(decoder=True)), tmp_path)
    save_fusion(move(make()), tmp_path)
    refused(tmp_path, r"trained\.safetensors does not belong to the fusion\.safetensors beside it")


def test_damage_and_other_models_are_refused(tmp_path):
    save_trained(move(make(decoder=True)), tmp_path)
    file = tmp_path / "trained.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-9])
    refused(tmp_path, r"trained\.safetensors is damaged")
    file.write_bytes(whole)
    refused(tmp_path, "does not fit this model.*tok_embeddings", tiny_decoder(vocab_size=41))
    refused(tmp_path / "nowhere", "is no artifact of save_fusion")


def test_the_base_is_what_did_not_train(tmp_path):
    model = move(make(encoder=True))
    save_trained(model, tmp_path)
    described = json.loads((tmp_path / "fusion.json").read_text())
    assert {name.split(".")[0] for name in described["base"]} == {"decoder"}
    assert described["trainable"] == {"decoder": False, "encoder": True, "fusion": True}
    # The encoder's own values are overwritten; the decoder's are compared.
    other = fuse(tiny_decoder(), TinyEncoder(seed=9), every=2)
    load_trained(other, tmp_path)
    assert same_state(state(model), other)
    decoder = tiny_decoder()
    decoder.norm.scale.detach().mul_(3)
    refused(tmp_path, r"base: 1 pretrained tensor differs.*\n.*decoder\.norm\.scale", decoder)


def test_fusion_without_the_pretrained_tensors_trained_with_it_is_refused(tmp_path):
    save_trained(move(make(encoder=True)), tmp_path)
    model = make()
    before = state(model)
    with pytest.raises(ValueError, match=r"are loaded by load_trained(.|\n)*encoder\.layers\.0\.bias"):
        load_fusion(model, tmp_path)
    assert same_state(before, model)


def refused(path, match, decoder=None):
    model = fuse(decoder or tiny_decoder(), TinyEncoder(), every=2)
    before = state(model)
    with pytest.raises(ValueError, match=match):
        load_trained(model, path)
    assert same_state(before, model)


def _sharded(rank, folder):
    model = make(decoder=True)
    shard(model)
    move(model)
    save_trained(model, folder)
    torch.distributed.barrier()
    fresh = make()
    shard(fresh)
    load_trained(fresh, folder)
    for (name, a), (_, b) in zip(model.named_parameters(), fresh.named_parameters(), strict=True):
        assert torch.equal(a.full_tensor(), b.full_tensor()), name


@pytest.mark.distributed
def test_sharded(tmp_path):
    run_on_ranks(_sharded, tmp_path)
    load_trained(make(), tmp_path)


@pytest.mark.parametrize("name", ["cross_attention", "prefix", *ROUTED])
def test_frozen_parts_are_not_written(name, tmp_path):
    model = architectures.make(name, encoder_trainable=False)
    assert not any(p.requires_grad for p in model.encoder.parameters())
    save_trained(model, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"fusion.safetensors", "fusion.json"}
    with safe_open(tmp_path / "fusion.safetensors", framework="pt") as reader:
        assert set(reader.keys()) == set(get_fusion_params(model))
        assert not any(key.startswith("encoder") for key in reader.keys())  # noqa: SIM118
