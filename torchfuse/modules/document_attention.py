"""Attention within the documents of a row, without the work on what is masked."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Final, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["BlockAttention", "DocumentAttention", "DocumentsInTurn", "has_block_kernel"]

_LEAST_HEAD_DIM: Final = 16  # of the kernels of flex_attention
_LEAST_CAPABILITY: Final = (7, 5)


class DocumentAttention(Protocol):
    """A way to compute ``scaled_dot_product_attention`` with the mask that it was made for."""

    def fits(self, q: Tensor, k: Tensor, dropout_p: float) -> bool:
        """Return whether it computes attention of these ``[b, h, s, d]`` with this dropout."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, dropout_p: float, **options: Any) -> Tensor:
        """Return the attended values; ``options`` are ``scale`` and ``enable_gqa``."""


class DocumentsInTurn:
    """Causal attention on one document after the other.

    Args:
        lengths: of the documents of each row.
    """

    def __init__(self, lengths: list[list[int]]) -> None:
        self.lengths = lengths
        self.slots = sum(lengths[0])

    def fits(self, q: Tensor, k: Tensor, dropout_p: float) -> bool:
        return len(q) == len(self.lengths) and q.shape[2] == k.shape[2] == self.slots

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, dropout_p: float, **options: Any) -> Tensor:
        rows = []
        for row, lengths in enumerate(self.lengths):
            parts = (x[row : row + 1].split(lengths, dim=2) for x in (q, k, v))
            documents = [
                F.scaled_dot_product_attention(
                    one_q, one_k, one_v, dropout_p=dropout_p, is_causal=True, **options
                )
                for one_q, one_k, one_v in zip(*parts, strict=True)
            ]
            rows.append(torch.cat(documents, dim=2))
        return torch.cat(rows)


class BlockAttention:
    """Attention by ``flex_attention``, whose kernel skips the blocks in which everything is masked.

    Args:
        mask: bool ``[b, s, s]``, True: may attend.
    """

    def __init__(self, mask: Tensor) -> None:
        from torch.nn.attention.flex_attention import create_block_mask  # imports torch's compiler

        rows, queries, keys = mask.shape
        self.blocks = create_block_mask(
            lambda b, h, q, k: mask[b, q, k], rows, None, queries, keys, device=str(mask.device)
        )
        self.sizes = rows, queries, keys

    def fits(self, q: Tensor, k: Tensor, dropout_p: float) -> bool:
        same_sizes = (len(q), q.shape[2], k.shape[2]) == self.sizes
        return same_sizes and q.shape[-1] >= _LEAST_HEAD_DIM and not dropout_p

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, dropout_p: float, **options: Any) -> Tensor:
        return _compiled_attention()(q, k, v, block_mask=self.blocks, **options)


def has_block_kernel(device: torch.device) -> bool:
    """Return whether ``flex_attention`` compiles to a kernel on a device."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= _LEAST_CAPABILITY


@cache
def _compiled_attention() -> Callable[..., Tensor]:
    """Return ``flex_attention`` as a kernel; without compiling it computes all scores."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)
