"""torchtune's self-attention with a cached path that copies nothing and never synchronizes.

torchtune's own cached path copies keys and values to every query head and reads a tensor's value at each
step. When caches are set up, the attention of each decoder layer is exchanged for ``CachedAttention``,
which takes over everything that it holds: parameters keep their names, and without caches it computes
the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchtune.modules import MultiHeadAttention

from torchfuse.modules.grouped_attention import grouped_attention
from torchfuse.modules.kv_cache import KVCache

__all__ = ["CachedAttention", "use_cached_attention"]


class CachedAttention(MultiHeadAttention):
    """``MultiHeadAttention`` that caches keys and values in a ``KVCache``."""

    kv_cache: Any
    cache_enabled: bool

    @classmethod
    def from_attention(cls, attn: MultiHeadAttention) -> CachedAttention:
        """Build one from the submodules, attributes, hooks and mode of another attention."""
        new, state = cls.__new__(cls), attn.__getstate__()
        new.__setstate__({**state, "_modules": dict(state["_modules"])})
        return new

    def setup_cache(self, batch_size: int, dtype: torch.dtype, max_seq_len: int) -> None:
        """Allocate the cache on the default device; a second call keeps the first cache."""
        if self.kv_cache is None:
            self.kv_cache = KVCache(
                batch_size,
                max_seq_len,
                num_kv_heads=self.num_kv_heads,
                head_dim=self.head_dim,
                dtype=dtype,
            )
            self.cache_enabled = True

    def forward(
        self,
        x: Tensor,
        y: Tensor | None = None,
        *,
        mask: Any = None,
        input_pos: Tensor | None = None,
    ) -> Tensor:
        """Attend as ``MultiHeadAttention`` does; with a cache, to all slots that ``mask`` allows.

        Args:
            x: ``[b, s, d]``.
            y: the source of keys and values, ``x`` itself.
            mask: bool ``[b, s, slots]`` with a cache, True: may attend.
            input_pos: positions, ``[b, s]`` or ``[s]``.
        """
        if self.kv_cache is None or not self.cache_enabled or y is None or mask is None:
            return super().forward(x, y, mask=mask, input_pos=input_pos)
        q = self._heads(self.q_proj(x), self.q_norm, input_pos)
        k = self._heads(self.k_proj(y), self.k_norm, input_pos)
        v = self._heads(self.v_proj(y), None, None)
        k, v = self.kv_cache.update(k, v)
        attended = grouped_attention(q, k, v, mask)
        return self.output_proj(attended.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor, norm: nn.Module | None, input_pos: Tensor | None) -> Tensor:
        """``[b, heads, s, head_dim]``, rotated and normalised; values are neither."""
        x = x.unflatten(-1, (-1, self.head_dim))
        if self.pos_embeddings is not None and input_pos is not None:
            x = self.pos_embeddings(x, input_pos=input_pos)
        x = x.transpose(1, 2)
        return x if norm is None else norm(x)


def use_cached_attention(decoder: nn.Module) -> None:
    """Exchange the self-attention of torchtune's decoder layers for ``CachedAttention``."""
    for layer in list(decoder.modules()):
        attn: Any = layer._modules.get("attn")
        # Its own class only: a subclass may compute something else.
        if type(attn) is MultiHeadAttention and attn.is_causal and attn.kv_cache is None:
            layer._modules["attn"] = CachedAttention.from_attention(attn)
