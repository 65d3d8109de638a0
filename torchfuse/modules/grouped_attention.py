"""Scaled dot-product attention where several heads of queries share one of keys and values.

The obvious ways copy keys and values to every head of queries, which a step that generates one token
pays for with most of its time. Here the queries that share keys and values are arranged as if
they were positions, so that nothing is copied, on any backend.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

__all__ = ["grouped_attention"]


def grouped_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float = 0.0
) -> Tensor:
    """Attend without positions and never causal.

    Args:
        q: queries, ``[b, h, s, d]``.
        k: keys, ``[b, h_kv, n, d]``; ``h_kv`` divides ``h``.
        v: values, as ``k``.
        mask: bool ``[b, s, n]`` (axes of one are spread), True: may attend. None: everything may.
        dropout_p: probability of dropping an attention weight.

    Returns:
        ``[b, h, s, d]``.

    Examples:
        >>> import torch
        >>> q, k = torch.randn(2, 6, 1, 4), torch.randn(2, 3, 5, 4)
        >>> grouped_attention(q, k, k, None).shape
        torch.Size([2, 6, 1, 4])
    """
    attn_mask = None if mask is None else mask[:, None]
    shared = q.shape[1] != k.shape[1]
    if shared and q.shape[2] == 1:
        grouped = q.unflatten(1, (k.shape[1], -1)).squeeze(3)  # [b, h_kv, h / h_kv, d]
        attended = F.scaled_dot_product_attention(grouped, k, v, attn_mask, dropout_p)
        return attended.flatten(1, 2).unsqueeze(2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask, dropout_p, enable_gqa=shared)
