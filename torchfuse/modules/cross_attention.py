"""Gated cross-attention from text to encoder features.

How it differs from the obvious layer:

* Both residuals are gated by ``tanh`` of a scalar that starts at zero (Flamingo,
  https://arxiv.org/abs/2204.14198), so that the fused model starts out as the pretrained one.
* A text position that may attend to nothing (text before its image, a row without image) passes
  through both residuals unchanged, to the bit, with finite gradients. The same rule serves a batch
  that has no features at all.
* Keys and values of the features are computed once per sequence and kept. Whether the cache is filled
  is a Python value, not a tensor, so that decoding compiles to one graph.

Children and their names are those of torchtune's ``TransformerCrossAttentionLayer``, so that weights
of Llama 3.2 Vision load.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchfuse.errors import ConfigError, ModelError
from torchfuse.modules.grouped_attention import grouped_attention
from torchfuse.modules.kv_cache import EncoderKVCache

__all__ = ["CrossAttention", "GatedCrossAttentionLayer"]

_log = logging.getLogger(__name__)


class CrossAttention(nn.Module):
    """Multi-head attention from ``x`` to ``y``, without positions and never causal.

    Heads of keys and values may be fewer than those of queries (grouped-query attention); they are
    not copied.

    Args:
        num_heads: heads of queries.
        num_kv_heads: heads of keys and values; divides ``num_heads``.
        head_dim: width of a head.
        q_proj: ``d -> num_heads * head_dim``.
        k_proj: ``d -> num_kv_heads * head_dim``.
        v_proj: ``d -> num_kv_heads * head_dim``.
        output_proj: ``num_heads * head_dim -> d``.
        q_norm: norm over ``head_dim`` of each query.
        k_norm: norm over ``head_dim`` of each key; given if and only if ``q_norm`` is.
        attn_dropout: probability of dropping an attention weight in training.

    Raises:
        ConfigError: if ``num_kv_heads`` does not divide ``num_heads``.
        ModelError: if only one norm is given.
    """

    def __init__(
        self,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        q_proj: nn.Module,
        k_proj: nn.Module,
        v_proj: nn.Module,
        output_proj: nn.Module,
        q_norm: nn.Module | None = None,
        k_norm: nn.Module | None = None,
        attn_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if num_kv_heads < 1 or num_heads % num_kv_heads:
            raise ConfigError(f"num_kv_heads must divide num_heads, got {num_kv_heads} and {num_heads}.")
        if (q_norm is None) != (k_norm is None):
            raise ModelError("q_norm and k_norm are given together or not at all.")
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.attn_dropout = attn_dropout
        self.q_proj = q_proj
        self.k_proj = k_proj
        self.v_proj = v_proj
        self.output_proj = output_proj
        self.q_norm = q_norm
        self.k_norm = k_norm
        # Named as torchtune's, whose helpers (disable_kv_cache, delete_kv_caches) look for them.
        self.kv_cache: EncoderKVCache | None = None
        self.cache_enabled = False

    def setup_cache(self, batch_size: int, dtype: torch.dtype, max_seq_len: int) -> None:
        """Allocate the cache on the device of the weights; a second call keeps the first cache."""
        if self.kv_cache is not None:
            _log.warning("The encoder cache is set up already; it is kept as it is.")
            return
        device = next(self.parameters()).device
        with device:
            self.kv_cache = EncoderKVCache(
                batch_size,
                max_seq_len,
                num_kv_heads=self.num_kv_heads,
                head_dim=self.head_dim,
                dtype=dtype,
            )
        self.cache_enabled = True

    def reset_cache(self) -> None:
        """Empty the cache.

        Raises:
            RuntimeError: if no cache was set up.
        """
        if self.kv_cache is None:
            raise RuntimeError("There is no encoder cache to reset; call setup_caches first.")
        self.kv_cache.reset()

    @property
    def has_cached_features(self) -> bool:
        """Whether features of an earlier call can be attended to."""
        return self.cache_enabled and self.kv_cache is not None and self.kv_cache.is_filled

    def effective_mask(self, y: Tensor | None, mask: Tensor | None) -> Tensor | None:
        """The mask over what ``forward`` will attend to: ``y``, or every slot of the cache.

        Args:
            y: features, ``[b, n, d]``; None: those in the cache.
            mask: bool ``[b, s, n]``, True: may attend; None: all may.

        Returns:
            Bool ``[b, s, slots]`` (or ``[1, 1, slots]``) with empty slots masked out if there is a
            cache, and ``mask`` itself if there is none.
        """
        cache = self._enabled_cache
        if cache is None:
            return mask
        slots = cache.max_seq_len
        filled = cache.valid if y is None else torch.arange(slots, device=y.device) < y.shape[1]
        if mask is None:
            return filled[None, None]
        return F.pad(mask, (0, slots - mask.shape[-1])) & filled

    def forward(self, x: Tensor, y: Tensor | None = None, *, mask: Tensor | None = None) -> Tensor:
        """Attend from ``x`` to ``y``.

        Args:
            x: queries, ``[b, s, d]``.
            y: what is attended to, ``[b, n, d]``; None: what the cache holds.
            mask: bool over what is attended to, True: may attend; every row must have a True. With a
                cache it covers every slot, as ``effective_mask`` returns it. None: all of them.

        Returns:
            ``[b, s, d]``.

        Raises:
            ModelError: if ``y`` is None and nothing is cached.
        """
        if mask is None:
            mask = self.effective_mask(y, None)
        q = self._heads(self.q_proj(x), self.num_heads, self.q_norm)
        k, v = self._keys_and_values(y)
        attended = grouped_attention(q, k, v, mask, self.attn_dropout if self.training else 0.0)
        return self.output_proj(attended.transpose(1, 2).flatten(2))

    @property
    def _enabled_cache(self) -> EncoderKVCache | None:
        return self.kv_cache if self.cache_enabled else None

    def _keys_and_values(self, y: Tensor | None) -> tuple[Tensor, Tensor]:
        cache = self._enabled_cache
        if y is None:
            if cache is None or not cache.is_filled:
                raise ModelError("There is nothing to attend to: y is None and no cache is filled.")
            return cache.k_cache, cache.v_cache
        k = self._heads(self.k_proj(y), self.num_kv_heads, self.k_norm)
        v = self._heads(self.v_proj(y), self.num_kv_heads, None)
        return (k, v) if cache is None else cache.fill(k, v)

    def _heads(self, x: Tensor, num_heads: int, norm: nn.Module | None) -> Tensor:
        x = x.unflatten(-1, (num_heads, self.head_dim)).transpose(1, 2)  # [b, h, s, head_dim]
        return x if norm is None else norm(x)


class GatedCrossAttentionLayer(nn.Module):
    """``x + gate(attn(norm(x), features))``, then ``x + gate(mlp(norm(x)))``.

    Parts come in built; ``torchfuse.models.layers.cross_attention_layer`` builds them from
    numbers. A drop-in for torchtune's ``TransformerCrossAttentionLayer`` with the same key names.

    Args:
        attn: attention from text to features.
        mlp: feed-forward, ``d -> d``.
        ca_norm: norm before attention.
        mlp_norm: norm before the feed-forward.
        ca_scale: gate of the attention; at zero the layer is the identity.
        mlp_scale: gate of the feed-forward.
    """

    def __init__(
        self,
        attn: CrossAttention,
        mlp: nn.Module,
        *,
        ca_norm: nn.Module,
        mlp_norm: nn.Module,
        ca_scale: nn.Module,
        mlp_scale: nn.Module,
    ) -> None:
        # Not super(): a subclass has torchtune's layer next in line, whose __init__ takes arguments.
        nn.Module.__init__(self)
        self.attn = attn
        self.mlp = mlp
        self.ca_norm = ca_norm
        self.mlp_norm = mlp_norm
        self.ca_scale = ca_scale
        self.mlp_scale = mlp_scale

    def setup_caches(
        self,
        batch_size: int,
        dtype: torch.dtype,
        *,
        encoder_max_seq_len: int | None,
        decoder_max_seq_len: int | None = None,
    ) -> None:
        """Allocate the cache of the features' keys and values.

        Args:
            batch_size: rows.
            dtype: dtype of the cache.
            encoder_max_seq_len: slots for encoder tokens.
            decoder_max_seq_len: not used.

        Raises:
            ModelError: if ``encoder_max_seq_len`` is None.
        """
        if encoder_max_seq_len is None:
            raise ModelError(
                "A cross-attention layer needs encoder_max_seq_len, the number of encoder tokens to "
                "keep. Set up the caches through the fused model, or pass it."
            )
        self.attn.setup_cache(batch_size, dtype, encoder_max_seq_len)

    def caches_are_setup(self) -> bool:
        """Whether the cache exists."""
        return self.attn.kv_cache is not None

    def caches_are_enabled(self) -> bool:
        """Whether the cache is read and written."""
        return self.attn.cache_enabled

    def reset_cache(self) -> None:
        """Empty the cache and keep its memory."""
        self.attn.reset_cache()

    def forward(
        self,
        x: Tensor,
        *,
        encoder_input: Tensor | None = None,
        encoder_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Attend from text to the encoder's features.

        Args:
            x: hidden states of text, ``[b, s, d]``.
            encoder_input: features, ``[b, n, d]``. None: those cached, or none at all, and then ``x``
                is returned as it is.
            encoder_mask: bool ``[b, s, n]``, True where text position ``s`` may attend to feature
                ``n``; with a cache, up to as wide as that. A position with no True comes back unchanged.
                None: all may attend to all.
            **kwargs: what the decoder passes to every layer, not used here.

        Returns:
            ``[b, s, d]``.

        Raises:
            ModelError: if the mask is no bool tensor of that shape.
        """
        if encoder_input is None and not self.attn.has_cached_features:
            return x
        if encoder_mask is not None:
            self._check_mask(x, encoder_input, encoder_mask)
        mask = self.attn.effective_mask(encoder_input, encoder_mask)
        if mask is None:
            return self._fuse(x, encoder_input, None)
        attends = mask.any(dim=-1, keepdim=True)  # [b, s, 1]
        # Softmax over nothing is undefined: those rows attend to everything, and are dropped after.
        fused = self._fuse(x, encoder_input, mask | ~attends)
        return torch.where(attends, fused, x)

    def _fuse(self, x: Tensor, features: Tensor | None, mask: Tensor | None) -> Tensor:
        # Gates may have a wider dtype than the hidden states, whose dtype does not change.
        x = x + self.ca_scale(self.attn(self.ca_norm(x), features, mask=mask)).to(x.dtype)
        return x + self.mlp_scale(self.mlp(self.mlp_norm(x))).to(x.dtype)

    def _check_mask(self, x: Tensor, features: Tensor | None, mask: Tensor) -> None:
        if mask.dtype != torch.bool:
            raise ModelError(
                f"encoder_mask must be bool (True: may attend), got {mask.dtype}. An additive mask "
                "converts with `mask == 0`."
            )
        cache = self.attn.kv_cache if self.attn.cache_enabled else None
        if cache is None:
            assert features is not None
            fits = mask.shape[-1] == features.shape[1]
            num_features: int | str = features.shape[1]
        else:  # their own number, or every slot
            fits = mask.shape[-1] <= cache.max_seq_len
            num_features = f"at most {cache.max_seq_len}"
        rows = mask.dim() == 3 and mask.shape[0] in (1, x.shape[0]) and mask.shape[1] == x.shape[1]
        if not rows or not fits:
            raise ModelError(
                f"encoder_mask must have shape [{x.shape[0]}, {x.shape[1]}, {num_features}] (rows, "
                f"text tokens, encoder tokens), got {list(mask.shape)}."
            )
