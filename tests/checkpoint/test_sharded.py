"""Sharded models are loaded from directories and written to them."""

import pytest
import torch
from checkpoint.parity import assert_close, random_images, random_tokens
from hf import LLAMA, fused_model, llava
from ranks import run_on_ranks
from support import same_state, state
from torch.distributed.tensor import DTensor

from torchfuse import export, from_pretrained, get_fusion_params, load_pretrained
from torchfuse.training import shard

IMAGE = LLAMA["vocab_size"] - 1


def conversation():
    tokens = random_tokens(IMAGE, length=29)
    tokens[:, 3:12] = IMAGE
    return tokens, {"encoder_input": {"images": random_images(2, 3, 12, 12)}}


@torch.no_grad()
def build_and_export(folder):
    full = from_pretrained(folder / "llava").eval()
    model = from_pretrained(folder / "llava", prepare=shard, on_missing="participate").eval()
    parameters = list(model.parameters())
    assert all(isinstance(p, DTensor) for p in parameters)
    local, total = sum(p.to_local().numel() for p in parameters), sum(p.numel() for p in parameters)
    assert 0.4 < local / total < 0.6
    tokens, images = conversation()
    assert_close(model(tokens, **images), full(tokens, **images), atol=1e-6)
    export(model, folder / "out", format="llava")
    torch.distributed.barrier()
    assert same_state(state(full), from_pretrained(folder / "out"))


def load_into_a_sharded_model(folder):
    full = from_pretrained(folder / "llava")
    model = from_pretrained(folder / "llava", on_missing="participate")
    for parameter in model.parameters():
        parameter.data.zero_()
    shard(model)
    load_pretrained(model, folder / "llava")
    for loaded, expected in zip(model.parameters(), full.parameters(), strict=True):
        assert torch.equal(loaded.full_tensor(), expected)


def copies_follow(decoder, **options):
    model = fused_model(every=1, on_missing="participate", **options)
    shard(model)
    load_pretrained(model, decoder=decoder)
    assert all(
        layer.experts_are_fresh() for layer in model.strategy.fused_layers(model.decoder).values()
    )
    full = fused_model(every=1, **options)
    load_pretrained(full, decoder=decoder)
    expected = get_fusion_params(full)
    added = get_fusion_params(model).items()
    copies = {n: p for n, p in added if "experts" in n or ".fusion_layer.encoder" in n}
    assert copies
    assert [n for n, p in copies.items() if not torch.equal(p.full_tensor(), expected[n])] == []


def on_each_rank(rank, folder, decoder):
    build_and_export(folder)
    load_into_a_sharded_model(folder)
    copies_follow(decoder, arch="mot")
    copies_follow(decoder, arch="moma", num_text_experts=3)


@pytest.mark.distributed
def test_sharded_models(pretrained, tmp_path):
    llava(tmp_path / "llava")
    run_on_ranks(on_each_rank, tmp_path, pretrained["decoder"])
