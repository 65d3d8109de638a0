"""The cache of what a sequence sees of the encoder.

A self-attention cache grows by a token a step; this one is filled once, when the features arrive, and
read at every step after that. It knows how much of it is filled: slots behind the features are never
attended to, so it may be larger than the features without changing a result.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["EncoderKVCache"]


class EncoderKVCache(nn.Module):
    """Keys and values of encoder features, with the number of slots that hold any.

    For inference only; never part of a state dict. ``valid`` (bool ``[max_seq_len]``) marks the slots
    that hold a feature. ``is_filled`` is an ordinary Python value, so
    asking for it neither waits for the device nor depends on data.

    Args:
        batch_size: rows.
        max_seq_len: slots for encoder tokens.
        num_kv_heads: heads of keys and values.
        head_dim: width of a head.
        dtype: dtype of keys and values.

    Examples:
        >>> cache = EncoderKVCache(2, 7, num_kv_heads=1, head_dim=3, dtype=torch.float32)
        >>> keys, values = cache.fill(torch.ones(2, 1, 5, 3), torch.ones(2, 1, 5, 3))
        >>> cache.valid.tolist()
        [True, True, True, True, True, False, False]
    """

    k_cache: Tensor
    v_cache: Tensor
    valid: Tensor

    def __init__(
        self,
        batch_size: int,
        max_seq_len: int,
        *,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        shape = (batch_size, num_kv_heads, max_seq_len, head_dim)
        self.register_buffer("k_cache", torch.zeros(shape, dtype=dtype), persistent=False)
        self.register_buffer("v_cache", torch.zeros(shape, dtype=dtype), persistent=False)
        self.register_buffer("valid", torch.zeros(max_seq_len, dtype=torch.bool), persistent=False)
        self.is_filled = False

    @property
    def max_seq_len(self) -> int:
        """Slots for encoder tokens."""
        return self.valid.shape[0]

    def fill(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keep the keys and values of a batch of features, in place of whatever was kept before.

        Args:
            keys: ``[b, h, n, d]``, with ``n`` at most ``max_seq_len``.
            values: as ``keys``.

        Returns:
            All keys and all values, ``[b, h, max_seq_len, d]``; ``valid`` says which slots count.

        Raises:
            ValueError: if the batch or the length does not fit; the cache is as it was then.
        """
        batch_size, _, num_tokens, _ = keys.shape
        if batch_size != self.k_cache.shape[0] or num_tokens > self.max_seq_len:
            raise ValueError(
                f"The encoder cache holds {self.k_cache.shape[0]} rows of up to {self.max_seq_len} "
                f"encoder tokens, got {batch_size} rows of {num_tokens}. Set up the caches with this "
                f"batch_size and encoder_max_seq_len of at least {num_tokens}."
            )
        self.k_cache[:, :, :num_tokens] = keys.to(self.k_cache.dtype)
        self.v_cache[:, :, :num_tokens] = values.to(self.v_cache.dtype)
        self.valid.fill_(False)
        self.valid[:num_tokens] = True
        self.is_filled = True
        return self.k_cache, self.v_cache

    def reset(self) -> None:
        """Empty the cache without giving its memory back."""
        self.valid.fill_(False)
        self.is_filled = False
