"""The functions that run the model on a prompt and on each token after it.

Each is one graph: nothing in it depends on a value, and what later calls need is written in place, to
tensors with fixed addresses.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import Tensor

__all__ = ["bucket", "compiled", "next_logits", "run_prompt"]

_MAX_GRAPHS: Final = 256


def bucket(length: int, most: int) -> int:
    """Return the length that a prompt is padded to where each length needs a graph of its own.

    Powers of two up to 128, then multiples of 128, and never more than ``most``.

    Examples:
        >>> bucket(11, 500), bucket(100, 500), bucket(300, 500), bucket(300, 320)
        (16, 128, 384, 320)
    """
    padded = max(16, 1 << (length - 1).bit_length()) if length <= 128 else -(-length // 128) * 128
    return max(length, min(padded, most))


def run_prompt(
    model: Any,
    tokens: Tensor,
    counts: Tensor,
    valid: Tensor,
    count: Tensor,
    column: Tensor,
    special: Tensor,
    given: Mapping[str, Any],
) -> Tensor:
    """Run the model on a prompt; return the logits ``[b, v]`` of the token after it.

    Args:
        model: with caches set up.
        tokens: ``[b, s]``.
        counts: which of them count, bool ``[b, s]``; the others are padding.
        valid: which slots of the caches may be attended to, bool ``[b, slots]``; updated in place.
        count: tokens of each row so far, ``[b]``; updated in place.
        column: slots in use, ``[1]``; updated in place.
        special: ids that are never generated.
        given: further keywords of the model's call.
    """
    s, slots = tokens.shape[1], valid.shape[1]
    here = column + torch.arange(s, device=tokens.device)
    # Not in place before the model has run: if it raises, nothing has changed.
    seen = valid.index_copy(1, here, counts)
    every = torch.arange(slots, device=tokens.device)
    # Padding attends to itself, so that its softmax is defined.
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
    """Run the model on one token ``[b]`` of each row, as ``run_prompt`` does on several."""
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
    # Tokens that features replace are no text; many are outside the vocabulary.
    banned = torch.isin(torch.arange(logits.shape[-1], device=logits.device), special)
    return logits.masked_fill(banned, -torch.inf)


@functools.cache
def compiled(function: Callable[..., Tensor], device: str) -> Callable[..., Tensor]:
    """Compile a function to one graph for each shape; on CUDA, recorded and replayed."""
    mode = "reduce-overhead" if device == "cuda" else None
    graphs = torch.compile(function, fullgraph=True, dynamic=False, mode=mode)

    @functools.wraps(function)
    def run(*args: Any) -> Tensor:
        # Each model, number of rows and bucket has its own graphs; many are intended.
        with torch._dynamo.config.patch(recompile_limit=_MAX_GRAPHS):
            return graphs(*args)

    return run
