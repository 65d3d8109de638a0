"""Training in bf16 with weights in fp32, against training in fp32."""

from __future__ import annotations

import pytest
import torch
from models.architectures import every_arch, make, prompt
from support import VOCAB, inputs, text
from torch import nn

from torchfuse.errors import ModelError
from torchfuse.naming import named_parameters
from torchfuse.params import FreezeSchedule
from torchfuse.training import linear_next_token_loss
from torchfuse.training.precision import computing_in, keep_in_fp32

CPU = torch.device("cpu")


def low(name, **options):
    """A model in bf16 whose trained parameters are in fp32, and their names."""
    model = make(name, encoder_trainable=False, **options).to(torch.bfloat16)
    names = FreezeSchedule(()).trained_ever(model)
    keep_in_fp32(model, names)
    return model, names


@every_arch
def test_what_trains_has_gradients_in_fp32_and_hidden_states_stay_bf16(name):
    model, names = low(name)
    dtypes = set()
    for layer in model.layers:
        layer.register_forward_hook(lambda module, args, out: dtypes.add(out.dtype))
    tokens = prompt(name)
    labels = tokens.masked_fill(tokens >= VOCAB, -100)
    with computing_in(torch.bfloat16, CPU):
        total, _ = linear_next_token_loss(model, tokens, labels=labels, encoder_input=inputs())
    total.backward()
    assert dtypes == {torch.bfloat16}
    for key, parameter in named_parameters(model):
        assert parameter.dtype is (torch.float32 if key in names else torch.bfloat16), key
        assert parameter.grad is None or key in names
    exact = make(name, encoder_trainable=False)
    expected, _ = linear_next_token_loss(exact, tokens, labels=labels, encoder_input=inputs())
    torch.testing.assert_close(total, expected, rtol=0.02, atol=0)
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


def test_parameters_that_cannot_be_kept_in_fp32():
    model = nn.Linear(3, 5).to(torch.bfloat16)
    with pytest.raises(ModelError, match=r"^These cannot be kept in fp32: wieght \(no such parameter\)"):
        keep_in_fp32(model, ["bias", "wieght"])
    assert model.bias.dtype is torch.bfloat16


@pytest.mark.long
def test_weights_move_as_in_fp32_training():
    """2,000 steps of a size that bf16 weights do not move in."""
    moved = {}
    for kind in ("fp32", "masters", "bf16"):
        model = make("cross_attention", encoder_trainable=False)
        if kind != "fp32":
            model.to(torch.bfloat16)
        names = FreezeSchedule(()).trained_ever(model)
        if kind == "masters":
            keep_in_fp32(model, names)
        trained = [p for key, p in named_parameters(model) if key in names]
        before = torch.cat([p.detach().float().flatten() for p in trained])
        optimizer = torch.optim.AdamW(trained, lr=1e-6, weight_decay=0.0)
        for step in range(2000):
            tokens = text(2, 13, seed=step % 50)
            call = {"encoder_input": inputs(seed=step % 50)}
            with computing_in(torch.float32 if kind == "fp32" else torch.bfloat16, CPU):
                total, count = linear_next_token_loss(model, tokens, labels=tokens, **call)
            (total / count).backward()
            optimizer.step()
            optimizer.zero_grad()
        moved[kind] = torch.cat([p.detach().float().flatten() for p in trained]) - before
    start = make("cross_attention", encoder_trainable=False)
    large = (
        torch.cat([p.detach().flatten() for key, p in named_parameters(start) if p.requires_grad]).abs()
        > 0.01
    )
    lengths = {kind: float(vector[large].norm()) for kind, vector in moved.items()}
    cosine = torch.nn.functional.cosine_similarity(moved["masters"], moved["fp32"], dim=0)
    print(f"moved {lengths}, cosine {float(cosine):.4f}")
    assert lengths["masters"] == pytest.approx(lengths["fp32"], rel=0.02)
    assert cosine > 0.9
    assert lengths["bf16"] < 0.1 * lengths["fp32"]
