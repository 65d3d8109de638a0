"""Rows of several documents: nothing attends to another document, and positions restart with each."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["DocumentMask", "document_mask", "document_positions", "positions_within"]


class DocumentMask(Tensor):
    """A mask within documents, with which attention runs on one document after the other.

    It holds the dense mask, and is used as any other. ``scaled_dot_product_attention`` with it computes
    what it computes with the dense mask, but leaves out what is masked: attention to other documents,
    most of a row. Compiled code uses the dense mask, as do calls of other sizes.

    Attributes:
        lengths: of the documents of each row.
    """

    lengths: list[list[int]]

    @classmethod
    def from_dense(cls, mask: Tensor, lengths: list[list[int]]) -> DocumentMask:
        """Add the lengths of each row's documents to their mask ``[b, s, s]`` or ``[b, 1, s, s]``."""
        result = mask.as_subclass(cls)
        result.lengths = lengths
        return result

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func is F.scaled_dot_product_attention and not torch.compiler.is_compiling():
                return _attend(*args, **kwargs)
            result = func(*args, **kwargs)
        # The axis of heads, which attention adds.
        adds_axis = func is Tensor.__getitem__ and args[0].dim() == 3 and result.dim() == 4
        if adds_axis and result.shape[1] == 1 and result.shape[-2:] == args[0].shape[-2:]:
            return cls.from_dense(result, args[0].lengths)
        return result


def document_mask(document_ids: Tensor) -> Tensor:
    """Return the causal mask within documents; on a CPU, outside of compiled code, a ``DocumentMask``.

    Args:
        document_ids: which document each token belongs to, ``[b, s]``; tokens of one follow each other.

    Returns:
        Bool ``[b, s, s]``, True: may attend.

    Examples:
        >>> document_mask(torch.tensor([[0, 0, 1]])).int().tolist()
        [[[1, 0, 0], [1, 1, 0], [0, 0, 1]]]
    """
    number = _begins(document_ids).cumsum(dim=1)
    mask = (number[:, :, None] == number[:, None, :]).tril()
    # Elsewhere reading the lengths would synchronize the device, or break the graph.
    if document_ids.device.type != "cpu" or torch.compiler.is_compiling() or type(mask) is not Tensor:
        return mask
    lengths = [row.bincount()[1:].tolist() for row in number]
    return DocumentMask.from_dense(mask, lengths)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **options: Any,
) -> Tensor:
    """Compute ``scaled_dot_product_attention``, ``[b, h, s, d]``, one document after the other."""
    by_document = isinstance(attn_mask, DocumentMask) and (
        len(q) == len(attn_mask.lengths) and q.shape[2] == k.shape[2] == attn_mask.shape[-1]
    )
    if not by_document:
        return F.scaled_dot_product_attention(q, k, v, attn_mask, dropout_p, is_causal, **options)
    rows = []
    assert isinstance(attn_mask, DocumentMask)
    for row, lengths in enumerate(attn_mask.lengths):
        parts = (x[row : row + 1].split(lengths, dim=2) for x in (q, k, v))
        documents = [
            F.scaled_dot_product_attention(
                one_q, one_k, one_v, dropout_p=dropout_p, is_causal=True, **options
            )
            for one_q, one_k, one_v in zip(*parts, strict=True)
        ]
        rows.append(torch.cat(documents, dim=2))
    return torch.cat(rows)


def document_positions(document_ids: Tensor) -> Tensor:
    """Return the positions of tokens in their documents, whose tokens follow each other.

    Args:
        document_ids: ``[b, s]``.

    Examples:
        >>> document_positions(torch.tensor([[0, 0, 0, 3, 3, -1]])).tolist()
        [[0, 1, 2, 0, 1, 0]]
    """
    at = torch.arange(document_ids.shape[1], device=document_ids.device).expand_as(document_ids)
    return at - torch.where(_begins(document_ids), at, 0).cummax(dim=1).values


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


def _begins(document_ids: Tensor) -> Tensor:
    """Return which tokens are the first of their document, bool ``[b, s]``."""
    first = torch.ones_like(document_ids[:, :1], dtype=torch.bool)
    return torch.cat([first, document_ids[:, 1:] != document_ids[:, :-1]], dim=1)
