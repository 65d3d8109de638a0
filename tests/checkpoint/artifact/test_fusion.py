import errno
import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from support import IMAGE, TinyEncoder, inputs, open_gates, same_state, state, text, tiny_decoder
from torch import nn

from torchfuse import (
    fuse,
    fusion_state_dict,
    get_fusion_params,
    load_fusion,
    load_fusion_state_dict,
    save_fusion,
    seed_adapters,
)
from torchfuse.checkpoint.artifact.description import describe_fusion
from torchfuse.checkpoint.artifact.fusion import write_artifact
from torchfuse.checkpoint.artifact.trained import load_trained
from torchfuse.errors import CheckpointError, ModelError
from torchfuse.modules.adapters import build_adapter


def make(every=2, **options):
    return fuse(tiny_decoder(), TinyEncoder(), every=every, fusion_vocab_size=2, **options)


def learned():
    model = open_gates(make())
    with torch.no_grad():
        for parameter in get_fusion_params(model).values():
            parameter.add_(torch.randn_like(parameter))
    return model


@pytest.mark.format(
    "fusion-only artifact", "in and out", "every tensor to the bit; nothing else is in it"
)
def test_an_artifact_holds_the_fusion_tensors_and_nothing_else(tmp_path):
    model = learned()
    save_fusion(model, tmp_path / "deep" / "er")
    file = tmp_path / "deep" / "er" / "fusion.safetensors"
    with safe_open(file, framework="pt") as reader:
        assert set(reader.keys()) == set(get_fusion_params(model)) == set(fusion_state_dict(model))
    other = make()
    assert not any(load_fusion(other, tmp_path / "deep" / "er"))
    assert torch.equal(other(text(), encoder_input=inputs()), model(text(), encoder_input=inputs()))
    described = json.loads((file.parent / "fusion.json").read_text())
    assert described["architecture"] == "cross_attention"
    assert described["options"]["fusion_first"] is True


def test_wrapped_and_plain_models_share_artifacts(tmp_path):
    model = learned()
    save_fusion(torch.compile(model, backend="eager"), tmp_path)
    other = make()
    load_fusion(torch.compile(other, backend="eager"), tmp_path)
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            fusion_state_dict(model).values(), fusion_state_dict(other).values(), strict=True
        )
    )


def test_all_that_does_not_fit_is_one_error_and_nothing_changes(tmp_path):
    save_fusion(learned(), tmp_path)
    model = make(every=3, num_kv_heads=3)
    before = state(model)
    with pytest.raises(CheckpointError) as info:
        load_fusion(model, tmp_path)
    for part in (
        "missing: decoder.layers.2.fusion_layer.attn.q_proj.weight",
        "unexpected: decoder.layers.1.fusion_layer.attn.q_proj.weight",
        "nothing was loaded",
    ):
        assert part in str(info.value)
    assert same_state(before, model)
    skipped = load_fusion(model, tmp_path, strict=False)
    assert all("layers.2" in name for name in skipped.missing)
    assert all("layers.1" in name for name in skipped.unexpected)
    assert not same_state(before, model)


def test_shapes_and_empty_matches():
    model, given = make(), fusion_state_dict(learned())
    given = {name: value[:1] for name, value in given.items()}
    with pytest.raises(
        CheckpointError,
        match=r"shape: adapter\.linear_1\.weight is \[1, 11\], the model's is \[18, 11\]",
    ):
        load_fusion_state_dict(model, given)
    with pytest.raises(CheckpointError, match="nothing was loaded"):
        load_fusion_state_dict(model, {"other": torch.zeros(1)}, strict=False)
    with pytest.raises(ModelError, match="has no fusion parameters"):
        fusion_state_dict(tiny_decoder())


def test_another_architecture_is_refused(tmp_path):
    save_fusion(learned(), tmp_path)
    model = fuse(
        tiny_decoder(), TinyEncoder(), arch="joint_decoder", encoder_token=IMAGE, fusion_vocab_size=2
    )
    with pytest.raises(
        CheckpointError, match="option: architecture 'cross_attention', the model's is 'joint_decoder'"
    ):
        load_fusion(model, tmp_path)
    # Not strict, it loads what fits: the adapter and the new tokens.
    skipped = load_fusion(model, tmp_path, strict=False)
    assert skipped.missing == []
    assert not any(name.startswith("adapter") for name in skipped.unexpected)


def test_buffers_of_fusion_modules_are_saved(tmp_path):
    def model_with_norm():
        adapter = nn.Sequential(nn.Linear(11, 18), nn.BatchNorm1d(7))
        return fuse(tiny_decoder(), TinyEncoder(), every=3, adapter=adapter)

    model = model_with_norm()
    model(text(), encoder_input=inputs())  # moves the running mean
    save_fusion(model, tmp_path)
    other = model_with_norm()
    load_fusion(other, tmp_path)
    assert torch.equal(other.adapter[1].running_mean, model.adapter[1].running_mean)
    assert model.adapter[1].running_mean.any()


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda file: file.unlink(), "is no artifact of save_fusion: it has no fusion.safetensors"),
        (lambda file: file.write_bytes(file.read_bytes()[:-9]), "or damaged"),
        (lambda file: file.write_bytes(b""), "or damaged"),
    ],
)
def test_a_damaged_artifact_is_named(tmp_path, damage, complaint):
    save_fusion(learned(), tmp_path)
    damage(tmp_path / "fusion.safetensors")
    model = make()
    before = state(model)
    with pytest.raises(CheckpointError, match=complaint):
        load_fusion(model, tmp_path)
    assert same_state(before, model)


def test_a_failed_save_leaves_the_old_artifact(tmp_path, monkeypatch):
    model = learned()
    save_fusion(model, tmp_path)
    before = sorted(os.listdir(tmp_path)), (tmp_path / "fusion.safetensors").read_bytes()

    def full_disk(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(CheckpointError, match=r"fusion\.safetensors was not written: the disk is full"):
        save_fusion(learned(), tmp_path)
    assert (sorted(os.listdir(tmp_path)), (tmp_path / "fusion.safetensors").read_bytes()) == before


def test_a_path_that_is_a_file_is_named(tmp_path):
    (tmp_path / "x").write_text("")
    with pytest.raises(CheckpointError, match="x is a file; an artifact is a directory"):
        save_fusion(learned(), tmp_path / "x")


def test_options_that_no_shape_shows_are_compared(tmp_path):
    save_fusion(learned(), tmp_path)
    other = make(fusion_first=False)
    before = state(other)
    with pytest.raises(CheckpointError, match="option: fusion_first True, the model's is False"):
        load_fusion(other, tmp_path)
    assert same_state(before, other)
    load_fusion(make(num_kv_heads=1), tmp_path)  # which is what None means for these layers
    load_fusion(other, tmp_path, strict=False)
    assert not same_state(before, other)


def test_a_model_without_memory_is_refused(tmp_path):
    save_fusion(learned(), tmp_path)
    with pytest.raises(ModelError, match="on the meta device: give them memory first"):
        load_fusion(make().to("meta"), tmp_path)


def test_a_header_that_is_no_description_is_refused(tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "fusion.safetensors", {"torchfuse": "[1]"})
    with pytest.raises(CheckpointError, match="is no artifact of save_fusion, or damaged"):
        load_fusion(make(), tmp_path)


# --- the base it was trained over ----------------------------------------------------------------


def refused(model, path, *complaints):
    before = state(model)
    with pytest.raises(CheckpointError) as info:
        load_fusion(model, path)
    for complaint in ("nothing was loaded", "Fusion parameters belong to the base", *complaints):
        assert complaint in str(info.value)
    assert same_state(before, model)
    return str(info.value)


@pytest.mark.parametrize("there", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("here", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_base_in_other_precision(tmp_path, there, here):
    model = learned().to(there)
    save_fusion(model, tmp_path)
    described = json.loads((tmp_path / "fusion.json").read_text())
    assert set(described["base"]) == set(model.state_dict()) - set(fusion_state_dict(model))
    assert {tensor["dtype"] for tensor in described["base"].values()} == {str(there).split(".")[1]}
    other = make().to(here)
    assert not any(load_fusion(other, tmp_path))
    for name, tensor in fusion_state_dict(other).items():
        assert torch.equal(tensor, fusion_state_dict(model)[name].to(here))


def changed(model):
    model.decoder.layers[2].attn.q_proj.weight.detach()[0, 0] += 1


def renamed(model):
    model.encoder.blocks = model.encoder.layers
    del model.encoder.layers


def reshaped(model):
    model.encoder.layers[0] = nn.Linear(3, 11)


def added(model):
    model.encoder.head = nn.Linear(2, 3, bias=False)


@pytest.mark.format("fusion-only artifact", "in", "another base is one error that names what differs")
@pytest.mark.parametrize(
    ("change", "complaints"),
    [
        (
            changed,
            [
                "base: 1 pretrained tensor differs from",
                "decoder.layers.2.attn.q_proj.weight is float32 [18, 18] in the saved base, "
                "float32 [18, 18] with other values here",
            ],
        ),
        (
            renamed,
            [
                "base: 4 pretrained tensors differ from",
                "encoder.layers.0.weight is float32 [11, 5] in the saved base, missing here",
                "encoder.blocks.0.weight is not in the saved base, float32 [11, 5] here",
            ],
        ),
        (
            reshaped,
            ["encoder.layers.0.weight is float32 [11, 5] in the saved base, float32 [11, 3] here"],
        ),
        (added, ["base: encoder.head.weight is not in the saved base, float32 [3, 2] here"]),
    ],
    ids=["changed", "renamed", "reshaped", "added"],
)
def test_another_base_is_refused_by_name(tmp_path, change, complaints):
    save_fusion(learned(), tmp_path)
    model = make()
    change(model)
    refused(model, tmp_path, *complaints)
    refused(model.bfloat16(), tmp_path, *(c.split("base, float32")[0] for c in complaints))


def test_another_base_is_reported_when_not_strict(tmp_path):
    model = learned()
    save_fusion(model, tmp_path)
    other = make()
    changed(other)
    skipped = load_fusion(other, tmp_path, strict=False)
    assert list(skipped.base) == ["decoder.layers.2.attn.q_proj.weight"]
    assert not any(skipped[:3])
    assert all(torch.equal(t, fusion_state_dict(model)[n]) for n, t in fusion_state_dict(other).items())


def test_all_problems_are_one_error_and_only_the_first_tensors_are_listed(tmp_path):
    save_fusion(learned(), tmp_path)
    model = fuse(tiny_decoder(seed=5), TinyEncoder(), every=3, fusion_vocab_size=2)
    message = refused(model, tmp_path, "missing: decoder.layers.2.fusion_layer", "and 15 more")
    assert message.count("with other values here") == 8
    assert "base: 23 pretrained tensors differ" in message


def test_a_quantized_base_is_the_same_base(tmp_path):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    save_fusion(learned(), tmp_path)
    model = make()
    quantize_(
        model,
        Int8WeightOnlyConfig(version=2),
        lambda m, name: isinstance(m, nn.Linear) and "decoder" in name and "fusion_layer" not in name,
    )
    weights = [name for name, p in model.named_parameters() if type(p) is not nn.Parameter]
    assert len(weights) == 3 * 7 + 1
    assert not any(load_fusion(model, tmp_path))
    save_fusion(model, tmp_path / "quantized")
    assert not any(load_fusion(make(), tmp_path / "quantized"))
    model.decoder.norm.scale.detach().mul_(3)
    with pytest.raises(CheckpointError, match=r"base: decoder\.norm\.scale is float32 \[18\]"):
        load_fusion(model, tmp_path)


def test_an_artifact_without_a_base_loads_over_any(tmp_path):
    model = learned()
    description = describe_fusion(model)
    for name in ("base", "trainable", "fusion_head"):
        del description[name]
    write_artifact(tmp_path, fusion_state_dict(model), description)
    other = make()
    changed(other)
    assert not any(load_fusion(other, tmp_path))


@pytest.mark.parametrize("base", [[1], {"x": 3}, {"x": {"form": [3]}}], ids=str)
def test_a_base_that_is_none_is_refused(tmp_path, base):
    model = learned()
    write_artifact(tmp_path, fusion_state_dict(model), describe_fusion(model) | {"base": base})
    with pytest.raises(CheckpointError, match="is no artifact of save_fusion, or damaged"):
        load_fusion(make(), tmp_path)


def test_what_trained_is_recorded_and_not_compared(tmp_path):
    model = learned()
    assert describe_fusion(model)["trainable"] == {"decoder": False, "encoder": False, "fusion": True}
    model.decoder.norm.scale.requires_grad_(True)
    model.encoder.requires_grad_(True)
    save_fusion(model, tmp_path)
    described = json.loads((tmp_path / "fusion.json").read_text())
    assert described["trainable"] == {
        "decoder": ["decoder.norm.scale"],
        "encoder": True,
        "fusion": True,
    }
    load_fusion(make(), tmp_path)


def test_a_head_that_no_tensor_shows_is_compared(tmp_path):
    def tied(fusion_head):
        options = {"fusion_vocab_size": 2, "fusion_head": fusion_head}
        return fuse(tiny_decoder(tied=True), TinyEncoder(), every=2, **options)

    save_fusion(tied(True), tmp_path)
    load_fusion(tied(True), tmp_path)
    with pytest.raises(CheckpointError, match="option: fusion_head True, the model's is False"):
        load_fusion(tied(False), tmp_path)


ADAPTERS = {
    "linear": ("linear", {}),
    "gelu": ("mlp_2layer", {}),
    "relu": ("mlp_2layer", {"activation": "relu"}),
    "pairs": ("avgpool", {"window": 2}),
    "threes": ("avgpool", {"window": 3}),
    "one_head": ("attentional_pool", {"window": 3, "num_heads": 1}),
    "eleven_heads": ("attentional_pool", {"window": 3, "num_heads": 11}),
}


def adapted(kind, arch="joint_decoder"):
    name, options = ADAPTERS[kind]
    adapter = build_adapter(name, 11, 18, **options)
    return fuse(tiny_decoder(), TinyEncoder(), arch=arch, adapter=adapter, placement="prefix")


@pytest.mark.parametrize(
    ("saved", "loaded", "complaint"),
    [
        ("linear", "pairs", "name 'linear' of the adapter of 'encoder', the model's is 'avgpool'"),
        ("pairs", "threes", "window 2 of the adapter of 'encoder', the model's is 3"),
        ("gelu", "relu", "activation 'gelu' of the adapter of 'encoder', the model's is 'relu'"),
        ("one_head", "eleven_heads", "num_heads 1 of the adapter of 'encoder', the model's is 11"),
    ],
)
def test_an_adapter_of_the_same_shapes_and_another_kind_is_refused(tmp_path, saved, loaded, complaint):
    save_fusion(adapted(saved), tmp_path)
    other = adapted(loaded)
    before = state(other)
    for load in (load_fusion, load_trained):
        with pytest.raises(CheckpointError, match=complaint):
            load(other, tmp_path)
    with pytest.raises(CheckpointError, match=complaint):
        seed_adapters(adapted(loaded, "mot"), tmp_path)
    assert same_state(before, other)
    assert load_fusion(other, tmp_path, strict=False).options[0] == complaint
    load_fusion(adapted(saved), tmp_path)


def test_an_artifact_without_adapter_options_fits_any_adapter_of_its_shapes(tmp_path):
    model = adapted("gelu")
    description = {k: v for k, v in describe_fusion(model).items() if k != "adapters"}
    write_artifact(tmp_path, fusion_state_dict(model), description)
    assert not any(load_fusion(adapted("relu"), tmp_path))
    save_fusion(fuse(tiny_decoder(), TinyEncoder(), adapter=nn.Linear(11, 18), every=2), tmp_path)
    model = fuse(tiny_decoder(), TinyEncoder(), adapter=nn.Linear(11, 18), every=2)
    assert not any(load_fusion(model, tmp_path))


def test_common_tensors_of_another_architecture_are_loaded_and_the_rest_reported(tmp_path):
    save_fusion(adapted("linear"), tmp_path)
    skipped = load_fusion(adapted("linear", "mot"), tmp_path, strict=False)
    assert skipped.options == ["architecture 'joint_decoder', the model's is 'mot'"]
    assert skipped.missing
    assert not skipped.unexpected
