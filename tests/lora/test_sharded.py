"""LoRA over an NF4 base under FSDP2, against one process."""

import pytest
import torch
from ranks import run_on_ranks
from safetensors.torch import load_file
from support import TinyEncoder, inputs, open_gates, text, tiny_decoder

from torchfuse import add_lora, describe, fuse
from torchfuse.checkpoint import save_trained
from torchfuse.errors import ModelError
from torchfuse.params import is_sharded
from torchfuse.training import linear_next_token_loss, shard


def quantized(dora, width=256):
    """A model whose layers have a multiple of NF4's 16,384 values, of width 256 on each of two ranks."""
    decoder = tiny_decoder(num_heads=4, num_kv_heads=4, embed_dim=width, intermediate_dim=512)
    model = open_gates(fuse(decoder, TinyEncoder(), every=2, on_missing="participate"))
    torch.manual_seed(7)
    add_lora(model, rank=3, alpha=6, targets=["q_proj", "w2"], dora=dora, quantize_base=True)
    return model


def train(model, rows, num_ranks):
    """The losses of three steps on some of four rows."""
    tokens, pixels = text(4, 13)[rows], inputs(4)["x"][rows]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(3):
        call = {"labels": tokens, "encoder_input": {"x": pixels}}
        total, _ = linear_next_token_loss(model, tokens, **call)
        (total * num_ranks / 48).backward()  # gradients are averaged over ranks
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(total))
    return losses


@pytest.mark.distributed
@pytest.mark.parametrize("dora", [False, True], ids=["qlora", "qdora"])
def test_two_ranks_train_what_one_process_does(tmp_path, dora):
    run_on_ranks(_on_ranks, tmp_path, dora)
    one, two = (load_file(tmp_path / name / "fusion.safetensors") for name in ("one", "two"))
    start = dict(quantized(dora).named_parameters())
    assert one.keys() == two.keys()
    moved = [name for name in one if not torch.equal(one[name], start[name])]
    assert sum(name.endswith("lora_b.weight") for name in moved) == 6
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-5, msg=name)


def _on_ranks(rank, folder, dora):
    model = quantized(dora)
    expected = train(model, slice(None), 1)
    save_trained(model, folder / "one")
    small = quantized(dora, width=128)
    with pytest.raises(
        ModelError, match=r"16,384 values, as many on each of 2 ranks, .*0\.attn\.q_proj"
    ):
        shard(small)
    assert not any(is_sharded(parameter) for parameter in small.parameters())
    model = quantized(dora)
    shard(model)
    assert "nf4" in describe(model)["decoder"].dtype
    losses = torch.tensor(train(model, slice(2 * rank, 2 * rank + 2), 2))
    torch.distributed.all_reduce(losses)
    torch.testing.assert_close(losses, torch.tensor(expected), rtol=1e-5, atol=0)
    save_trained(model, folder / "two")
