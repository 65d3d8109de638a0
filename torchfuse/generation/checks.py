"""What a question asks for, and what can be wrong with it, before a model reads any of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn

from torchfuse.generation.sampling import Generators, Sampling
from torchfuse.naming import unwrap

__all__ = ["Scores", "answer_problems", "num_features", "stop_table", "vocab_size"]

Scores = Literal["logits", "log_probs"] | None

_NEVER: Final = -1  # no token has this id


def answer_problems(
    model: nn.Module,
    tokens: Tensor,
    max_new_tokens: int,
    sampling: Sampling,
    stop_tokens: Any,
    generator: Generators,
    scores: Scores,
) -> list[str]:
    """What is out of range, in words; room for it is the caches' to say."""
    problems = []
    if tokens.dim() != 2 or not tokens.numel() or tokens.is_floating_point():
        problems.append(f"tokens must be ids [b, s], got {tokens.dtype} {list(tokens.shape)}")
    if max_new_tokens < 1:
        problems.append(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    problems += sampling.problems()
    if scores not in (None, "logits", "log_probs"):
        problems.append(f'scores must be "logits" or "log_probs", got {scores!r}')
    by_row = [stop for stop in stop_tokens if not isinstance(stop, int)]
    if by_row and (len(by_row) != len(stop_tokens) or len(by_row) != tokens.shape[0]):
        problems.append(f"stop_tokens by row must be {tokens.shape[0]} lists, got {stop_tokens}")
    else:
        vocab, ids = vocab_size(model), [i for row in by_row for i in row] if by_row else stop_tokens
        outside = [i for i in ids if not 0 <= i < vocab]
        if outside:
            problems.append(f"stop_tokens {outside} must lie in [0, {vocab}), what the head scores")
    if isinstance(generator, Sequence) and len(generator) != tokens.shape[0]:
        problems.append(f"generators by row must be {tokens.shape[0]}, got {len(generator)}")
    return problems


def num_features(embeds: Tensor | Mapping[str, Tensor] | None) -> int:
    """Features of a row, those of all encoders together."""
    if embeds is None:
        return 0
    parts = [embeds] if isinstance(embeds, Tensor) else list(embeds.values())
    return sum(part.shape[-2] for part in parts)


def vocab_size(model: nn.Module) -> int:
    """How many tokens a model's head scores."""
    head: Any = unwrap(model).output
    if hasattr(head, "out_features"):
        return int(head.out_features)
    embedding: Any = getattr(head, "tied_module", None) or unwrap(model).tok_embeddings
    return int(embedding.weight.shape[0])


def stop_table(stop_tokens: Sequence[int] | Sequence[Sequence[int]], tokens: Tensor) -> Tensor:
    """The stop tokens of every row, ``[b, k]`` or ``[1, k]``."""
    each = [[stop] if isinstance(stop, int) else list(stop) for stop in stop_tokens]
    by_row = any(not isinstance(stop, int) for stop in stop_tokens)
    rows = each if by_row else [[stop for row in each for stop in row]]
    longest = max(map(len, rows), default=0)
    padded = [row + [_NEVER] * (longest - len(row)) for row in rows]
    return torch.tensor(padded, dtype=tokens.dtype, device=tokens.device).view(len(rows), longest)
