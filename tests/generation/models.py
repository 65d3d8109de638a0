"""Small models of every way that features reach a decoder, rows for them, and graphs without a compiler."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from support import FEATURES, IMAGE, TinyEncoder, open_gates, text, tiny_decoder
from torch import Tensor, nn

from torchfuse import fuse
from torchfuse.generation import session
from torchfuse.generation.sampling import Sampling

ARCHS: dict[str, dict[str, Any]] = {
    "cross_attention": {"every": 2},
    "placeholder": {"arch": "joint_decoder", "encoder_token": IMAGE},
    "prefix": {"arch": "joint_decoder", "placement": "prefix"},
}
GREEDY = Sampling(temperature=0)

# Rows with no image, one and two.
AN_IMAGE = 3  # features of one image
LENGTHS = (9, 13, 11)  # of their prompts
WIDE = 2 * AN_IMAGE  # features of a row


def make(name: str, encoder: nn.Module | None = None, *, device: str = "cpu", **options: Any) -> Any:
    """A model in evaluation mode whose features change its answers; options are the decoder's."""
    decoder = tiny_decoder(**{"max_seq_len": 97} | options)
    model = fuse(decoder, encoder or TinyEncoder(), **ARCHS[name]).eval()
    with torch.no_grad():
        for parameter in model.adapter.parameters():
            parameter.mul_(30)  # features that outweigh the embeddings
    return (open_gates(model) if name == "cross_attention" else model).to(device)


def prompt(name: str, batch: int = 2, length: int = 11, seed: int = 3) -> Tensor:
    """Prompts with one image, ``[b, s]``."""
    tokens = text(batch, length, seed)
    if name == "placeholder":
        tokens[:, 1 : 1 + FEATURES] = IMAGE
    return tokens


def mixed_rows(name: str, device: str = "cpu") -> tuple[list[Tensor], Tensor, Tensor]:
    """Prompts with no image, one and two: one by one, as a batch, and which features each row has."""
    rows = [text(1, length, seed)[0] for seed, length in enumerate(LENGTHS)]
    if name == "placeholder":
        rows[1][4 : 4 + AN_IMAGE] = IMAGE
        rows[2][:AN_IMAGE] = rows[2][5 : 5 + AN_IMAGE] = IMAGE
    batch = torch.stack([F.pad(row, (max(LENGTHS) - len(row), 0)) for row in rows])
    valid = torch.arange(WIDE) < torch.tensor([[0], [AN_IMAGE], [WIDE]])
    return [row.to(device) for row in rows], batch.to(device), valid.to(device)


def seeded(*seeds: int, device: str = "cpu") -> list[torch.Generator]:
    return [torch.Generator(device).manual_seed(seed) for seed in seeds]


def trace_only(monkeypatch: Any, backend: Any = "eager") -> None:
    """Have sessions trace their graphs whole and run them uncompiled: inductor takes minutes for it."""
    torch._dynamo.reset()

    @functools.cache
    def compiled(function: Any, device: str) -> Any:
        return torch.compile(function, fullgraph=True, dynamic=False, backend=backend)

    monkeypatch.setattr(session, "compiled", compiled)
