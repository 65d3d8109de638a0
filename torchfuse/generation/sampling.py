"""Sampling of the next token from logits, without waiting for the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Generators", "Sampling", "SeenTokens", "sample"]

Generators = torch.Generator | Sequence[torch.Generator] | None


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: choose among this many likeliest tokens.
        top_p: choose among the fewest likeliest tokens that together have at least this probability.
        repetition_penalty: divides the logits of tokens that a row holds already, where they are above
            zero, and multiplies them below (CTRL, https://arxiv.org/abs/1909.05858); 1 changes nothing.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0

    def problems(self) -> list[str]:
        """Return what is out of range."""
        problems = []
        if not 0 <= self.temperature < float("inf"):
            problems.append(f"temperature must be at least 0, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            problems.append(f"top_k must be at least 1, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            problems.append(f"top_p must lie in (0, 1], got {self.top_p}")
        if not 0 < self.repetition_penalty < float("inf"):
            problems.append(f"repetition_penalty must be above 0, got {self.repetition_penalty}")
        return problems


class SeenTokens:
    """Which tokens each row of a batch holds, for the repetition penalty.

    Args:
        batch_size: rows.
        vocab_size: tokens that the head scores.
        device: where the table is, which is made when tokens are added first.
    """

    def __init__(self, batch_size: int, vocab_size: int, device: torch.device) -> None:
        self._shape, self._device = (batch_size, vocab_size), device
        self._table: Tensor | None = None

    @property
    def mask(self) -> Tensor | None:
        """Bool ``[b, v]``, True where a row holds a token; None before any was added."""
        return None if self._table is None else self._table[:, :-1]

    def add(self, tokens: Tensor, counts: Tensor | None = None) -> None:
        """Add tokens ``[b, s]``, those that ``counts`` does not mask out."""
        batch_size, vocab_size = self._shape
        if self._table is None:
            self._table = torch.zeros(batch_size, vocab_size + 1, dtype=torch.bool, device=self._device)
        # Padding and tokens that the head does not score share the last column.
        dropped = (tokens >= vocab_size) | (tokens < 0)
        dropped = dropped if counts is None else dropped | ~counts
        self._table.scatter_(1, tokens.masked_fill(dropped, vocab_size), True)

    def reset(self) -> None:
        """Remove all tokens."""
        self._table = None


def sample(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
    seen: Tensor | None = None,
    generator: Generators = None,
) -> Tensor:
    """Choose a token for each row.

    Args:
        logits: ``[b, v]``.
        temperature: see ``Sampling``.
        top_k: see ``Sampling``.
        top_p: see ``Sampling``.
        repetition_penalty: see ``Sampling``.
        seen: which tokens a row holds already, bool ``[b, v]``, for the penalty.
        generator: source of randomness, on the device of ``logits``. One for each row makes a row's
            choices independent of what else is in the batch.

    Returns:
        Ids, ``[b]``.

    Examples:
        >>> sample(torch.tensor([[0.0, 3.0, 1.0]]), temperature=0)
        tensor([1])
    """
    if seen is not None and repetition_penalty != 1:
        penalized = torch.where(logits > 0, logits / repetition_penalty, logits * repetition_penalty)
        logits = torch.where(seen, penalized, logits)
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        weakest = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < weakest, -torch.inf)
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        probabilities = ordered.softmax(dim=-1)
        # A token is dropped if those before it reach top_p; the first never is.
        enough = probabilities.cumsum(dim=-1) - probabilities >= top_p
        logits = logits.masked_fill(enough.scatter(-1, order, enough), -torch.inf)
    # Of exponential waiting times, the shortest is each with the probability of its rate.
    return (logits.softmax(dim=-1) / _waiting_times(logits, generator)).argmax(dim=-1)


def _waiting_times(logits: Tensor, generator: Generators) -> Tensor:
    times = torch.empty_like(logits)
    if generator is None or isinstance(generator, torch.Generator):
        times.exponential_(generator=generator)
    else:
        for row, source in zip(times, generator, strict=True):
            row.exponential_(generator=source)
    return times.clamp(min=torch.finfo(times.dtype).tiny)
