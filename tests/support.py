"""Small models for tests. Sizes are distinct, and mostly prime, so that a swapped axis fails."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchtune.models.llama3_2 import llama3_2

# aot_eager traces what inductor compiles, without inductor's C++ compiler.
BACKENDS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)]
VOCAB = 37
WIDTH = 18
LAYERS = 3
FEATURES = 7  # encoder tokens of one input
FEATURE_DIM = 11
IMAGE = 41  # an image token outside every table


def tiny_decoder(seed: int = 0, *, tied: bool = False, **changes: Any) -> nn.Module:
    """A Llama of three layers with grouped-query attention."""
    torch.manual_seed(seed)
    numbers = {
        "vocab_size": VOCAB,
        "num_layers": LAYERS,
        "num_heads": 3,
        "num_kv_heads": 1,
        "embed_dim": WIDTH,
        "max_seq_len": 53,
        "intermediate_dim": 29,
        "tie_word_embeddings": tied,
        "scale_factor": 1,
    }
    return llama3_2(**numbers | changes)


class TinyEncoder(nn.Module):
    """Features of what it is given, token by token."""

    feature_dim = FEATURE_DIM

    def __init__(self, in_dim: int = 5, seed: int = 1) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.ModuleList([nn.Linear(in_dim, FEATURE_DIM)])
        self.in_dim = in_dim

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layers[0](x))

    def example_input(self) -> dict[str, Tensor]:
        return {"x": torch.zeros(1, 1, self.in_dim)}


def inputs(batch: int = 2, num: int = FEATURES, in_dim: int = 5, seed: int = 2) -> dict[str, Tensor]:
    """Input for a ``TinyEncoder``, ``num`` tokens a row."""
    generator = torch.Generator().manual_seed(seed)
    return {"x": torch.randn(batch, num, in_dim, generator=generator)}


def text(batch: int = 2, length: int = 13, seed: int = 3) -> Tensor:
    """Token ids of text; no zeros, so that nothing looks like padding."""
    return torch.randint(1, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def text_with_image(batch: int = 2, length: int = 13, num: int = FEATURES) -> Tensor:
    """Text with ``num`` placeholders from position 2 on."""
    tokens = text(batch, length)
    tokens[:, 2 : 2 + num] = IMAGE
    return tokens


@torch.no_grad()
def open_gates(model: nn.Module, value: float = 0.7) -> nn.Module:
    """Set every gate to a value that lets the new layers through; at zero a test of them is vacuous."""
    gates = [p for name, p in model.named_parameters() if name.endswith("_scale.scale")]
    assert gates
    for gate in gates:
        gate.fill_(value)
    return model


def state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all that a model holds, to compare with later."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_state(before: dict[str, Tensor], model: nn.Module) -> bool:
    after = model.state_dict()
    return list(before) == list(after) and all(torch.equal(before[n], after[n]) for n in before)
