"""Rows of several documents: nothing attends to another document, and positions restart with each."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["document_mask", "document_positions", "positions_within"]


def document_mask(document_ids: Tensor) -> Tensor:
    """Return the causal mask within documents.

    Args:
        document_ids: which document each token belongs to, ``[b, s]``.

    Returns:
        Bool ``[b, s, s]``, True: may attend.

    Examples:
        >>> document_mask(torch.tensor([[0, 0, 1]])).int().tolist()
        [[[1, 0, 0], [1, 1, 0], [0, 0, 1]]]
    """
    return (document_ids[:, :, None] == document_ids[:, None, :]).tril()


def document_positions(document_ids: Tensor) -> Tensor:
    """Return the positions of tokens in their documents, whose tokens follow each other.

    Args:
        document_ids: ``[b, s]``.

    Examples:
        >>> document_positions(torch.tensor([[0, 0, 0, 3, 3, -1]])).tolist()
        [[0, 1, 2, 0, 1, 0]]
    """
    at = torch.arange(document_ids.shape[1], device=document_ids.device).expand_as(document_ids)
    begins = torch.ones_like(document_ids, dtype=torch.bool)
    begins[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return at - torch.where(begins, at, 0).cummax(dim=1).values


def positions_within(document_ids: Tensor, counts: Tensor) -> Tensor:
    """Return how many tokens that count come before each one in its document, wherever they are.

    Args:
        document_ids: ``[b, n]``.
        counts: which tokens count, bool ``[b, n]``.

    Returns:
        ``[b, n]``.

    Examples:
        >>> positions_within(torch.tensor([[0, 4, 0, 4]]), torch.tensor([[True, True, False, True]]))
        tensor([[0, 0, 1, 1]])
    """
    same = document_ids[:, :, None] == document_ids[:, None, :]
    return (same & counts[:, None]).tril(-1).sum(dim=-1)
