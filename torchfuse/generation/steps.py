"""What runs for a prompt and for each token after it, as functions of tensors that keep their place.

Each is one graph: nothing in it depends on a value, and what goes on from call to call is written in
place.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import Tensor

__all__ = ["bucket", "compiled", "next_logits", "read_prompt"]

_MOST_GRAPHS: Final = 256


def bucket(length: int, most: int) -> int:
    """The length that a prompt is padded to where each length needs a graph of its own.

    Powers of two up to 128, then multiples of 128, and never more than ``most``.

    Examples:
        >>> bucket(11, 500), bucket(100, 500), bucket(300, 500), bucket(300, 320)
        (16, 128, 384, 320)
    """
    padded = max(16, 1 << (length - 1).bit_length()) if length <= 128 else -(-length // 128) * 128
    return max(length, min(padded, most))


def read_prompt(
    model: Any,
    tokens: Tensor,
    counts: Tensor,
    valid: Tensor,
    count: Tensor,
    column: Tensor,
    special: Tensor,
    given: Mapping[str, Any],
) -> Tensor:
    """Read ``tokens`` ``[b, s]`` of which ``counts`` count, and score what comes behind, ``[b, v]``.

    ``valid`` ``[b, slots]`` (what may be seen), ``count`` ``[b]`` (tokens so far) and ``column`` ``[1]``
    (slots so far) go on in place.
    """
    s, slots = tokens.shape[1], valid.shape[1]
    here = column + torch.arange(s, device=tokens.device)
    # Written only when the model has taken the tokens: what it refuses leaves no trace.
    seen = valid.index_copy(1, here, counts)
    every = torch.arange(slots, device=tokens.device)
    # What does not count sees itself, so that its softmax is defined.
    mask = (seen[:, None] & (every <= here[:, None])) | (every == here[:, None])
    positions = (count[:, None] + counts.cumsum(dim=1) - 1).clamp(min=0)
    logits = _score(model, tokens, mask, positions, special, given)
    valid.copy_(seen)
    count.add_(counts.sum(dim=1))
    column.add_(s)
    return logits


def next_logits(
    model: Any,
    token: Tensor,
    counts: Tensor,
    valid: Tensor,
    count: Tensor,
    column: Tensor,
    special: Tensor,
) -> Tensor:
    """Read one token ``[b]`` of each row, as ``read_prompt`` does."""
    valid.index_copy_(1, column, counts[:, None])
    logits = _score(model, token[:, None], valid[:, None], count[:, None], special, {})
    count.add_(counts)
    column.add_(1)
    return logits


def _score(
    model: Any,
    tokens: Tensor,
    mask: Tensor,
    positions: Tensor,
    special: Tensor,
    given: Mapping[str, Any],
) -> Tensor:
    output = model(tokens, mask=mask, input_pos=positions, **given)
    while isinstance(output, list):  # hidden states in front, or chunks of the sequence
        output = output[-1]
    logits: Tensor = output[:, -1]
    # A token that stands for a feature is nothing to say; many lie outside the vocabulary.
    banned = torch.isin(torch.arange(logits.shape[-1], device=logits.device), special)
    return logits.masked_fill(banned, -torch.inf)


@functools.cache
def compiled(function: Callable[..., Tensor], device: str) -> Callable[..., Tensor]:
    """A function as one graph for each shape; on CUDA, recorded and replayed."""
    mode = "reduce-overhead" if device == "cuda" else None
    graphs = torch.compile(function, fullgraph=True, dynamic=False, mode=mode)

    @functools.wraps(function)
    def run(*args: Any) -> Tensor:
        # Each model, number of rows and bucket has graphs of its own, and many are no mistake.
        with torch._dynamo.config.patch(recompile_limit=_MOST_GRAPHS):
            return graphs(*args)

    return run
