"""Builders of the layers that fusion adds, from numbers and torchtune's modules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torchtune.modules import (
    FeedForward,
    MultiHeadAttention,
    RMSNorm,
    TanhGate,
    TransformerCrossAttentionLayer,
    TransformerSelfAttentionLayer,
)

from torchfuse.errors import ModelError
from torchfuse.models.cached_attention import CachedAttention
from torchfuse.modules.cross_attention import CrossAttention, GatedCrossAttentionLayer
from torchfuse.modules.experts.mixture_of_transformers import MoTLayer, Start
from torchfuse.naming import unwrap
from torchfuse.params import quantized_dtype

__all__ = ["cross_attention_layer", "mot_layer"]


class _CrossAttentionLayer(GatedCrossAttentionLayer, TransformerCrossAttentionLayer):
    """``GatedCrossAttentionLayer`` as a subclass of torchtune's layer.

    torchtune's decoder sizes encoder caches, and its ``compile_model`` compiles, by that class.
    """


def cross_attention_layer(
    *,
    embed_dim: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    hidden_dim: int,
    norm_eps: float = 1e-5,
    qk_norm: bool = True,
    attn_dropout: float = 0.0,
) -> GatedCrossAttentionLayer:
    """Build a gated cross-attention layer with both gates at zero, as in Llama 3.2 Vision.

    Args:
        embed_dim: width of the decoder, and of the features after the adapter.
        num_heads: heads of queries.
        num_kv_heads: heads of keys and values.
        head_dim: width of a head.
        hidden_dim: width inside the feed-forward.
        norm_eps: epsilon of every RMS norm.
        qk_norm: whether queries and keys are normalised per head.
        attn_dropout: probability of dropping an attention weight in training.

    Examples:
        >>> layer = cross_attention_layer(
        ...     embed_dim=6, num_heads=3, num_kv_heads=1, head_dim=2, hidden_dim=7
        ... )
        >>> x, features = torch.randn(1, 4, 6), torch.randn(1, 5, 6)
        >>> torch.equal(layer(x, encoder_input=features), x)
        True
    """
    attn = CrossAttention(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        q_proj=nn.Linear(embed_dim, num_heads * head_dim, bias=False),
        k_proj=nn.Linear(embed_dim, num_kv_heads * head_dim, bias=False),
        v_proj=nn.Linear(embed_dim, num_kv_heads * head_dim, bias=False),
        output_proj=nn.Linear(num_heads * head_dim, embed_dim, bias=False),
        q_norm=RMSNorm(head_dim, eps=norm_eps) if qk_norm else None,
        k_norm=RMSNorm(head_dim, eps=norm_eps) if qk_norm else None,
        attn_dropout=attn_dropout,
    )
    mlp = FeedForward(
        gate_proj=nn.Linear(embed_dim, hidden_dim, bias=False),
        down_proj=nn.Linear(hidden_dim, embed_dim, bias=False),
        up_proj=nn.Linear(embed_dim, hidden_dim, bias=False),
    )
    return _CrossAttentionLayer(
        attn,
        mlp,
        ca_norm=RMSNorm(embed_dim, eps=norm_eps),
        mlp_norm=RMSNorm(embed_dim, eps=norm_eps),
        ca_scale=TanhGate(),
        mlp_scale=TanhGate(),
    )


def mot_layer(
    layer: nn.Module, names: Sequence[str], *, start: Start = "warm", keys_and_values_only: bool = False
) -> MoTLayer:
    """Build a torchtune decoder layer with weights for other modalities beside its own.

    Args:
        layer: the pretrained layer, for text.
        names: the other modalities.
        start: see ``MoTLayer.reset_experts``.
        keys_and_values_only: see ``MoTLayer.from_pretrained``.

    Raises:
        ModelError: if the layer or its attention is a subclass, whose computation the other modalities
            would not have; if its weights are quantized other than by QLoRA's NF4.
    """
    inner: Any = unwrap(layer)
    attn = getattr(inner, "attn", None)
    problems = [
        f"a {type(module).__name__} is not torchtune's {name}, so its computation is unknown here"
        for module, known, name in (
            (inner, (TransformerSelfAttentionLayer,), "TransformerSelfAttentionLayer"),
            (attn, (MultiHeadAttention, CachedAttention), "MultiHeadAttention"),
        )
        if type(module) not in known
    ]
    problems += [
        f"{name} is quantized ({kind}): fuse first, then quantize"
        for name, parameter in inner.named_parameters()
        if (kind := quantized_dtype(parameter)) not in (None, "nf4")
    ]
    if problems:
        raise ModelError(f"It cannot be shared by modalities: {'; '.join(problems)}.")
    return MoTLayer.from_pretrained(layer, names, start=start, keys_and_values_only=keys_and_values_only)
