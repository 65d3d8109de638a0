"""Checks of what a model is called with, made before any of its modules runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn

from torchfuse.generation.sampling import Generators, Sampling
from torchfuse.naming import unwrap

__all__ = [
    "Scores",
    "answer_problems",
    "input_id_problems",
    "num_embeddings",
    "special_tokens",
    "stop_table",
    "stop_token_problems",
    "vocab_size",
]

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
    """Return what is out of range; whether the caches have room is checked elsewhere."""
    problems = []
    if tokens.dim() != 2 or not tokens.numel() or tokens.is_floating_point():
        problems.append(f"tokens must be ids [b, s], got {tokens.dtype} {list(tokens.shape)}")
    elif tokens.device.type == "cpu":  # elsewhere the host would wait for the device
        problems += input_id_problems(model, {"tokens": tokens.unique().tolist()}, special=True)
    if max_new_tokens < 1:
        problems.append(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    problems += sampling.problems()
    if scores not in (None, "logits", "log_probs"):
        problems.append(f'scores must be "logits" or "log_probs", got {scores!r}')
    by_row = [stop for stop in stop_tokens if not isinstance(stop, int)]
    if by_row and (len(by_row) != len(stop_tokens) or len(by_row) != tokens.shape[0]):
        problems.append(f"stop_tokens by row must be {tokens.shape[0]} lists, got {stop_tokens}")
    else:
        ids = [i for row in by_row for i in row] if by_row else stop_tokens
        problems += stop_token_problems(model, ids)
    if isinstance(generator, Sequence) and len(generator) != tokens.shape[0]:
        problems.append(f"generators by row must be {tokens.shape[0]}, got {len(generator)}")
    return problems


def input_id_problems(
    model: nn.Module, ids: Mapping[str, Sequence[int]], *, special: bool = False
) -> list[str]:
    """Return which ids a model cannot read as text.

    Args:
        model: a fused model, or a plain decoder.
        ids: the ids by the name of the argument or the configuration key that they come from.
        special: whether tokens that features replace are allowed; they need no row in the embedding.
    """
    rows, replaced = num_embeddings(model), special_tokens(model)
    problems = []
    for name, given in ids.items():
        if not special and (taken := [i for i in given if i in replaced]):
            problems.append(f"{name} {taken} cannot be text: in this model features replace {taken}")
        if outside := [i for i in given if not 0 <= i < rows and i not in replaced]:
            problems.append(f"{name} {outside} must lie in [0, {rows}), the ids that the model embeds")
    return problems


def stop_token_problems(model: nn.Module, stop_tokens: Sequence[int]) -> list[str]:
    """Return which ids a model can never generate."""
    vocab = vocab_size(model)
    outside = [i for i in stop_tokens if not 0 <= i < vocab]
    return [f"stop_tokens {outside} must lie in [0, {vocab}), what the head scores"] if outside else []


def num_embeddings(model: nn.Module) -> int:
    """Return how many ids a model embeds, those that fusion added included."""
    table: Any = unwrap(model).tok_embeddings
    return int(table.num_embeddings)


def special_tokens(model: nn.Module) -> tuple[int, ...]:
    """Return the ids that features replace."""
    strategy = getattr(unwrap(model), "strategy", None)
    return () if strategy is None else strategy.special_tokens()


def vocab_size(model: nn.Module) -> int:
    """Return how many ids a model's head scores."""
    head: Any = unwrap(model).output
    if hasattr(head, "out_features"):
        return int(head.out_features)
    embedding: Any = getattr(head, "tied_module", None) or unwrap(model).tok_embeddings
    return int(embedding.weight.shape[0])


def stop_table(stop_tokens: Sequence[int] | Sequence[Sequence[int]], tokens: Tensor) -> Tensor:
    """Return the stop tokens of every row, ``[b, k]`` or ``[1, k]``."""
    each = [[stop] if isinstance(stop, int) else list(stop) for stop in stop_tokens]
    by_row = any(not isinstance(stop, int) for stop in stop_tokens)
    rows = each if by_row else [[stop for row in each for stop in row]]
    longest = max(map(len, rows), default=0)
    padded = [row + [_NEVER] * (longest - len(row)) for row in rows]
    return torch.tensor(padded, dtype=tokens.dtype, device=tokens.device).view(len(rows), longest)
