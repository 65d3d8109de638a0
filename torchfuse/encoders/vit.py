"""The layer and the checks that the vision transformers of this package share."""

from __future__ import annotations

from typing import Final

from torch import nn
from torchtune.models.clip._component_builders import clip_mlp
from torchtune.models.clip._text_encoder import QuickGELU
from torchtune.modules import (
    Fp32LayerNorm,
    MultiHeadAttention,
    TanhGate,
    TransformerSelfAttentionLayer,
)

__all__ = ["ACTIVATIONS", "vit_layer", "vit_problems"]

ACTIVATIONS: Final[dict[str, type[nn.Module]]] = {"quick_gelu": QuickGELU, "gelu": nn.GELU}


def vit_problems(
    *,
    image_size: int,
    patch_size: int,
    embed_dim: int,
    num_heads: int,
    activation: str,
    **sizes: int,
) -> list[str]:
    """List what is wrong with the numbers of a vision transformer.

    Args:
        image_size: side of an image or tile, in pixels.
        patch_size: side of a patch; must divide ``image_size``.
        embed_dim: width; must be at least 1.
        num_heads: attention heads; must divide ``embed_dim``.
        activation: a key of ``ACTIVATIONS``.
        **sizes: others that must be at least 1.
    """
    sizes = {"embed_dim": embed_dim, **sizes}
    problems = [f"{name}={size} must be at least 1" for name, size in sizes.items() if size < 1]
    if patch_size < 1 or image_size < 1 or image_size % patch_size:
        problems.append(f"patch_size={patch_size} must divide image_size={image_size}")
    if num_heads < 1 or embed_dim % num_heads:
        problems.append(f"num_heads={num_heads} must divide embed_dim={embed_dim}")
    if activation not in ACTIVATIONS:
        problems.append(f"activation={activation!r} must be one of {', '.join(ACTIVATIONS)}")
    return problems


def vit_layer(
    embed_dim: int,
    num_heads: int,
    hidden_dim: int,
    *,
    activation: str,
    norm_eps: float,
    bias: bool,
    gated: bool = False,
) -> TransformerSelfAttentionLayer:
    """Build a layer with full attention and layer norms in fp32.

    Args:
        embed_dim: width of the layer.
        num_heads: attention heads.
        hidden_dim: width inside the feed-forward.
        activation: a key of ``ACTIVATIONS``.
        norm_eps: epsilon of the norms.
        bias: whether the attention's projections have a bias.
        gated: whether attention and feed-forward are scaled by a gate that starts at zero.
    """
    return TransformerSelfAttentionLayer(
        attn=MultiHeadAttention(
            embed_dim=embed_dim,
            num_heads=num_heads,
            num_kv_heads=num_heads,
            head_dim=embed_dim // num_heads,
            q_proj=nn.Linear(embed_dim, embed_dim, bias=bias),
            k_proj=nn.Linear(embed_dim, embed_dim, bias=bias),
            v_proj=nn.Linear(embed_dim, embed_dim, bias=bias),
            output_proj=nn.Linear(embed_dim, embed_dim, bias=bias),
            is_causal=False,
        ),
        mlp=clip_mlp(
            in_dim=embed_dim,
            out_dim=embed_dim,
            hidden_dim=hidden_dim,
            activation=ACTIVATIONS[activation](),
        ),
        sa_norm=Fp32LayerNorm(embed_dim, eps=norm_eps),
        mlp_norm=Fp32LayerNorm(embed_dim, eps=norm_eps),
        sa_scale=TanhGate() if gated else None,
        mlp_scale=TanhGate() if gated else None,
    )
