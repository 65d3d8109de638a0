"""Rows of several documents: nothing attends to another document, and positions restart with each."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only

from torchfuse.modules.document_attention import (
    BlockAttention,
    DocumentAttention,
    DocumentsInTurn,
    has_block_kernel,
)

__all__ = [
    "DocumentMask",
    "document_mask",
    "document_positions",
    "positions_within",
    "with_block_kernel",
]


class DocumentMask(Tensor):
    """A mask within documents, with which attention leaves out what is masked, most of a row.

    It holds the dense mask, and is used as any other. ``scaled_dot_product_attention`` with it computes
    what it computes with the dense mask. Compiled code uses the dense mask, as do calls of other sizes.

    Attributes:
        attention: how attention is computed.
    """

    attention: DocumentAttention

    @classmethod
    def from_dense(cls, mask: Tensor, attention: DocumentAttention) -> DocumentMask:
        """Add to a mask ``[b, s, s]`` or ``[b, 1, s, s]`` how attention is computed with it."""
        result = mask.as_subclass(cls)
        result.attention = attention
        return result

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if torch.compiler.is_compiling():
                result = func(*args, **kwargs)
            elif func is F.scaled_dot_product_attention:
                return _attend(*args, **kwargs)
            else:
                # Graphs of torch.compile run below dispatch modes, which may not take the class.
                plain, plain_kwargs = tree_map_only(cls, _as_plain, (args, kwargs))
                result = func(*plain, **plain_kwargs)
        # The axis of heads, which attention adds.
        adds_axis = func is Tensor.__getitem__ and args[0].dim() == 3 and result.dim() == 4
        if adds_axis and result.shape[1] == 1 and result.shape[-2:] == args[0].shape[-2:]:
            return cls.from_dense(result, args[0].attention)
        return result


def document_mask(document_ids: Tensor) -> Tensor:
    """Return the causal mask within documents, outside of compiled code a ``DocumentMask``.

    Args:
        document_ids: which document each token belongs to, ``[b, s]``; tokens of one follow each other.

    Returns:
        Bool ``[b, s, s]``, True: may attend.

    Examples:
        >>> document_mask(torch.tensor([[0, 0, 1]])).int().tolist()
        [[[1, 0, 0], [1, 1, 0], [0, 0, 1]]]
    """
    number = _begins(document_ids).cumsum(dim=1)
    mask = with_block_kernel((number[:, :, None] == number[:, None, :]).tril())
    # Elsewhere reading the lengths would synchronize the device, or break the graph.
    if mask.device.type != "cpu" or torch.compiler.is_compiling() or type(mask) is not Tensor:
        return mask
    lengths = [row.bincount()[1:].tolist() for row in number]
    return DocumentMask.from_dense(mask, DocumentsInTurn(lengths))


def with_block_kernel(mask: Tensor) -> Tensor:
    """Return a mask with which attention skips masked blocks, where the device has such a kernel.

    Args:
        mask: bool ``[b, s, s]``, True: may attend.

    Returns:
        A ``DocumentMask``, or the mask itself: in compiled code, and on devices without the kernel.
    """
    if torch.compiler.is_compiling() or type(mask) is not Tensor or not has_block_kernel(mask.device):
        return mask
    return DocumentMask.from_dense(mask, BlockAttention(mask))


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **options: Any,
) -> Tensor:
    """Compute ``scaled_dot_product_attention``, ``[b, h, s, d]``, by its mask if that fits."""
    if isinstance(attn_mask, DocumentMask) and attn_mask.attention.fits(q, k, dropout_p):
        return attn_mask.attention(q, k, v, dropout_p, **options)
    return F.scaled_dot_product_attention(q, k, v, attn_mask, dropout_p, is_causal, **options)


def _as_plain(mask: Tensor) -> Tensor:
    return mask.as_subclass(Tensor)


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
