"""A fused model whose encoder can be frozen in part, and runs over it in two stages."""

from itertools import pairwise

import torch
from support import FEATURE_DIM, inputs, open_gates, text, tiny_decoder
from torch import nn

from torchfuse import fuse, param_groups
from torchfuse.naming import named_parameters
from torchfuse.params import FreezeSchedule, FreezeSpec, FreezeStage
from torchfuse.training.loss import next_token_loss

# The adapter first, then the adapter and the encoder.
BEGIN = 3
TWO_STAGES = [
    FreezeStage(0, (FreezeSpec("*", True), FreezeSpec("adapter", False))),
    FreezeStage(BEGIN, (FreezeSpec("encoder", False),)),
]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(FEATURE_DIM, FEATURE_DIM)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        return x + self.dropout(torch.tanh(self.linear(x)))


class DeepEncoder(nn.Module):
    """Three layers, and parameters outside of them."""

    feature_dim = FEATURE_DIM

    def __init__(self, seed=1):
        super().__init__()
        torch.manual_seed(seed)
        self.patches = nn.Linear(5, FEATURE_DIM)
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.norm = nn.LayerNorm(FEATURE_DIM)
        self.norm.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        x = self.patches(x)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)

    def example_input(self):
        return {"x": torch.zeros(1, 1, 5)}


def make(seed=0, dropout=0.0, **options):
    encoder = DeepEncoder(seed + 1)
    for block in encoder.layers:
        block.dropout.p = dropout
    model = fuse(tiny_decoder(seed), encoder, every=2, on_missing="participate", **options)
    return open_gates(model)


def trains(model):
    return [name for name, p in named_parameters(model) if p.requires_grad]


def adamw(model, stages):
    return torch.optim.AdamW(param_groups(model, lr=1e-2, weight_decay=0.1, stages=stages))


def step(model, optimizer, number, max_norm=0.5):
    """One optimizer step on the batch of this number; returns the norm of its gradients."""
    tokens = text(seed=100 + number)
    total, count = next_token_loss(model(tokens, encoder_input=inputs(seed=200 + number)), tokens)
    (total / count).backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    optimizer.step()
    optimizer.zero_grad()
    return norm


def run(model, optimizer, schedule, steps):
    """Train over steps, and return the encoder's values before each and at the end."""
    seen = []
    for number in steps:
        seen.append(values(model, "encoder."))
        schedule.apply(model, number)
        step(model, optimizer, number)
    return [*seen, values(model, "encoder.")]


def values(model, prefix=""):
    """A copy of parameters, whole on every rank."""
    whole = lambda p: p.full_tensor() if hasattr(p, "full_tensor") else p  # noqa: E731
    return {n: whole(p.detach()).clone() for n, p in named_parameters(model) if n.startswith(prefix)}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def still_until_its_stage(seen):
    """Whether values were bit-equal until the encoder's stage, and all of them moved in each step after."""
    before, after = seen[: BEGIN + 1], seen[BEGIN:]
    return all(equal(before[0], v) for v in before) and not any(
        torch.equal(one[name], other[name]) for one, other in pairwise(after) for name in one
    )


def two_stage_run(wrap=lambda model: model, prepare=lambda model: model, steps=range(6)):
    """A whole run; ``wrap`` returns what is called, ``prepare`` changes in place."""
    model = wrap(make().train())
    prepare(model)
    schedule = FreezeSchedule(TWO_STAGES)
    return model, run(model, adamw(model, schedule), schedule, steps)
