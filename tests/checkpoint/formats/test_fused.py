"""torchfuse's own directories, which hold any fused model."""

import json

import pytest
import torch
from checkpoint.parity import random_tokens
from hf import VISION, clip_tower, edit, llama, rename, shake
from safetensors.torch import load_file, save_file
from support import same_state, state
from torch import nn
from transformers import SiglipVisionConfig, SiglipVisionModel

from torchfuse import from_pretrained, fuse, get_fusion_params, save_pretrained

pytestmark = pytest.mark.usefixtures("no_grad")

PATCHES = 9
VARIANTS = {
    "cross_attention": {"arch": "cross_attention", "every": 2, "fusion_vocab_size": 3},
    "layers": {"arch": "cross_attention", "layers": [0, 2], "num_heads": 3, "num_kv_heads": 3},
    "placeholder": {"arch": "joint_decoder", "encoder_token": 5, "adapter": "linear"},
    "prefix_head": {
        "arch": "joint_decoder",
        "placement": "prefix",
        "fusion_vocab_size": 2,
        "fusion_head": True,
        "on_missing": "participate",
    },
    "mot": {"arch": "mot", "encoder_token": 5, "placement": "placeholder"},
    "moma": {"arch": "moma", "num_text_experts": 2},
    "deepstack": {"arch": "deepstack"},
}


@pytest.mark.format(
    "torchfuse", "in and out", "every tensor, setting and logit to the bit; any architecture"
)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_round_trip(pretrained, tmp_path, variant, tied):
    llama(tmp_path / "llama", tie_word_embeddings=tied)
    folders = pretrained | {"decoder": tmp_path / "llama"}
    model = from_pretrained(**folders, feature_layer=1, **VARIANTS[variant]).eval()
    shake(model)
    save_pretrained(model, tmp_path / "own")
    again = from_pretrained(tmp_path / "own").eval()
    assert same_state(state(model), again)
    assert again.on_missing == model.on_missing
    save_pretrained(again, tmp_path / "again")
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("own", "again")]
    assert configs[0] == configs[1]
    tokens = random_tokens(30)
    tokens[tokens == 5] = 6
    images = {"encoder_input": {"images": torch.randn(2, 3, 12, 12)}}
    if "encoder_token" in VARIANTS[variant]:
        tokens[:, 2 : 2 + PATCHES] = 5
    assert torch.equal(again(tokens, **images), model(tokens, **images))


@pytest.mark.format("torchfuse", "in and out", "several encoders by name, each with its adapter")
def test_round_trip_of_named_encoders(pretrained, tmp_path):
    torch.manual_seed(43)
    SiglipVisionModel(SiglipVisionConfig(**VISION)).save_pretrained(tmp_path / "siglip")
    model = from_pretrained(
        decoder=pretrained["decoder"],
        encoder={"a": pretrained["encoder"], "b": tmp_path / "siglip"},
        every=2,
        keep_cls={"a": True},
        adapter={"a": "linear", "b": "mlp_2layer"},
        dtype=torch.bfloat16,
    ).eval()
    save_pretrained(model, tmp_path / "own")
    again = from_pretrained(tmp_path / "own").eval()
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    images = torch.randn(2, 3, 12, 12)
    inputs = {"encoder_input": {"a": {"images": images}, "b": {"images": images}}}
    tokens = random_tokens(30)
    assert torch.equal(again(tokens, **inputs), model(tokens, **inputs))


def test_a_model_without_fusion_parameters(pretrained, tmp_path):
    options = {"arch": "joint_decoder", "encoder_token": 1}
    decoder = from_pretrained(**pretrained, **options).decoder
    clip_tower(tmp_path / "clip", hidden_size=24, num_attention_heads=4)
    encoder = from_pretrained(
        decoder=pretrained["decoder"], encoder=tmp_path / "clip", **options
    ).encoder
    plain = fuse(decoder, encoder, adapter=None, **options)
    assert not get_fusion_params(plain)
    save_pretrained(plain, tmp_path / "plain")
    again = from_pretrained(tmp_path / "plain")
    assert same_state(state(plain), again)
    assert not any(p.requires_grad for p in again.parameters())


def drop_bias(folder):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    del tensors["adapter.linear_1.bias"]
    save_file(tensors, file)


def too_many_layers(folder):
    encoders = json.loads((folder / "config.json").read_text())["encoders"]
    encoders[""]["num_hidden_layers"] = 10**9
    edit(folder, encoders=encoders)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (drop_bias, r"missing: adapter\.linear_1\.bias"),
        (
            lambda folder: rename(folder, lambda key: key.replace("linear_1.weight", "linear_9.weight")),
            r"unexpected: adapter\.linear_9\.weight",
        ),
        (lambda folder: edit(folder, arch="telepathy"), "Unknown architecture 'telepathy'"),
        (lambda folder: edit(folder, arch=3), "arch must be the name of an architecture, got 3"),
        (lambda folder: edit(folder, encoders={}), "encoders must have at least one entry"),
        (
            lambda folder: edit(folder, adapters={"eye": {}}),
            r"adapters \['eye'\] must have the same names",
        ),
        (
            lambda folder: edit(folder, adapters={"": {"name": "linear"}}),
            "config.json cannot be built as torchfuse: build_adapter.* missing 2 required",
        ),
        (lambda folder: edit(folder, format=2), "format 2 is not supported, only 1"),
        (too_many_layers, "config.json has 1000000003 layers, but there are only"),
    ],
    ids="missing renamed arch no_arch encoders adapters widths format layers".split(),
)
def test_a_directory_that_was_changed_by_hand(pretrained, tmp_path, change, problem):
    save_pretrained(from_pretrained(**pretrained, every=2), tmp_path)
    change(tmp_path)
    with pytest.raises(ValueError, match=problem):
        from_pretrained(tmp_path)


class Unknown(nn.Module):
    feature_dim = 11

    def forward(self, x):
        return x


def test_parts_that_no_configuration_describes_are_named(pretrained, tmp_path):
    decoder = from_pretrained(**pretrained, arch="joint_decoder", encoder_token=1).decoder
    model = fuse(decoder, Unknown(), every=3, adapter=nn.Linear(11, 24))
    with pytest.raises(
        ValueError,
        match=r"encoder 'encoder': no format for a Unknown.*the adapter of 'encoder', a Linear",
    ):
        save_pretrained(model, tmp_path / "out")
