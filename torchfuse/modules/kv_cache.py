"""Caches of keys and values, for inference only.

``KVCache`` is for a sequence, which grows with every step. ``EncoderKVCache`` is for encoder features:
it is filled once, when the features arrive, and read at every later step. It records how much of it is
filled: slots after the features are never attended to, so it may be larger than the features without
changing a result.

Neither ever allocates, branches on a value or waits for the device once it is set up.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from torchfuse.errors import ModelError

__all__ = ["EncoderKVCache", "KVCache", "holds_sequence"]


def holds_sequence(model: nn.Module) -> bool:
    """Return whether any cache in a model holds keys and values."""
    caches: list[Any] = [getattr(module, "kv_cache", None) for module in model.modules()]
    return any(
        bool(cache.is_filled if isinstance(cache, EncoderKVCache) else cache.size)
        for cache in caches
        if cache is not None
    )


class KVCache(nn.Module):
    """Keys and values of a sequence; a drop-in for torchtune's, never part of a state dict.

    Args:
        batch_size: rows.
        max_seq_len: slots for tokens.
        num_kv_heads: heads of keys and values.
        head_dim: width of a head.
        dtype: dtype of keys and values.

    Examples:
        >>> cache = KVCache(2, 7, num_kv_heads=1, head_dim=3, dtype=torch.float32)
        >>> keys, values = cache.update(torch.ones(2, 1, 5, 3), torch.ones(2, 1, 5, 3))
        >>> keys.shape, cache.size
        (torch.Size([2, 1, 7, 3]), 5)
    """

    k_cache: Tensor
    v_cache: Tensor
    cache_pos: Tensor

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
        # The slots of the tokens to come; its first value is how many there are.
        self.register_buffer("cache_pos", torch.arange(max_seq_len), persistent=False)
        self.batch_size = batch_size

    @property
    def size(self) -> int:
        """Number of slots that hold a token; reading it synchronises with the device."""
        return int(self.cache_pos[0])

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keep the keys and values of the next tokens.

        Args:
            keys: ``[b, h, s, d]``; there must be ``s`` empty slots, which is not checked.
            values: as ``keys``.

        Returns:
            All keys and all values, ``[b, h, max_seq_len, d]``.

        Raises:
            ModelError: if rows or length do not fit the cache at all.
        """
        rows, _, length, _ = keys.shape
        if rows != self.k_cache.shape[0] or length > self.k_cache.shape[2]:
            raise ModelError(
                f"The cache holds {self.k_cache.shape[0]} rows of up to {self.k_cache.shape[2]} tokens, "
                f"got {rows} rows of {length}. Set up the caches with this batch_size and "
                "decoder_max_seq_len."
            )
        slots = self.cache_pos[:length]
        self.k_cache.index_copy_(2, slots, keys.to(self.k_cache.dtype))
        self.v_cache.index_copy_(2, slots, values.to(self.v_cache.dtype))
        self.cache_pos.add_(length)
        return self.k_cache, self.v_cache

    def reset(self) -> None:
        """Empty the cache and keep its memory."""
        self.cache_pos.sub_(self.cache_pos[:1].clone())


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
            All keys and all values, ``[b, h, max_seq_len, d]``; ``valid`` marks the slots that are
            filled.

        Raises:
            ModelError: if the batch or the length does not fit; the cache is as it was then.
        """
        batch_size, _, num_tokens, _ = keys.shape
        if batch_size != self.k_cache.shape[0] or num_tokens > self.max_seq_len:
            raise ModelError(
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
        """Empty the cache and keep its memory."""
        self.valid.fill_(False)
        self.is_filled = False
