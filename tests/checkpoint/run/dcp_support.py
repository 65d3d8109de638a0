"""Small training runs to save and load, and what of them must come back."""

import re

import pytest
import torch
from contract import views
from support import TinyEncoder, tiny_decoder
from torch.distributed.tensor import DTensor

from torchfuse import fuse, param_groups, set_trainable
from torchfuse.checkpoint import load_checkpoint
from torchfuse.naming import named_parameters, unwrap

FROZEN = "decoder.layers.1.mlp.w2.weight"  # one of a part that trains otherwise


def make(seed=0, *, train=True, **changes):
    model = fuse(
        tiny_decoder(seed, tied=True, **changes),
        TinyEncoder(seed=seed),
        every=2,
        fusion_vocab_size=2,
        on_missing="participate",
    )
    if train:
        set_trainable(model, decoder=True)
        dict(named_parameters(model))[FROZEN].requires_grad_(False)
    return model


def adamw(model):
    return torch.optim.AdamW(param_groups(model, lr=1e-2, weight_decay=0.1))


def trained(seed=0, build=adamw, steps=2):
    model = make(seed)
    optimizer = build(model)
    for _ in range(steps):
        views.step(model, optimizer)
    return model, optimizer


def contents(model, optimizer=None):
    """A copy of all that a run holds, whole on every rank."""
    whole = lambda t: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone()  # noqa: E731
    found = {("model", n): whole(t) for n, t in unwrap(model).state_dict().items()}
    found |= {("trains", n): torch.tensor(p.requires_grad) for n, p in named_parameters(model)}
    if optimizer is not None:
        names = {id(p): n for n, p in named_parameters(model)}
        for group in optimizer.param_groups:
            found |= {("lr", names[id(p)]): torch.tensor(float(group["lr"])) for p in group["params"]}
        for parameter, state in optimizer.state.items():
            found |= {(names[id(parameter)], k): whole(torch.as_tensor(v)) for k, v in state.items()}
    return found


def differences(before, after):
    return [
        key
        for key in {**before, **after}
        if key not in before
        or key not in after
        or before[key].dtype != after[key].dtype
        or not torch.equal(before[key], after[key])
    ]


def refused(path, model, optimizer, *problems):
    """One error with every problem; everything is as it was."""
    before = contents(model, optimizer)
    with pytest.raises(ValueError, match=re.escape(str(problems[0]))) as caught:
        load_checkpoint(path, model, optimizer)
    for problem in problems:
        assert problem in str(caught.value)
    assert not differences(before, contents(model, optimizer))
