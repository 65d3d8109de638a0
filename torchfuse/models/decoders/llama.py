"""Llama decoders of any size, built from torchtune's modules.

torchtune's own builders have no arguments for some values in Hugging Face configurations: the width of a
head, and the frequencies between which Llama 3.1 scales its rotary embedding, if it does.
"""

from __future__ import annotations

import math

from torch import nn
from torchtune.models.llama3._component_builders import llama3_mlp
from torchtune.models.llama3_1._position_embeddings import Llama3ScaledRoPE
from torchtune.modules import (
    MultiHeadAttention,
    RMSNorm,
    RotaryPositionalEmbeddings,
    TiedLinear,
    TransformerDecoder,
    TransformerSelfAttentionLayer,
)

from torchfuse.errors import ConfigError

__all__ = ["llama_decoder"]


def llama_decoder(
    *,
    vocab_size: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    embed_dim: int,
    max_seq_len: int,
    intermediate_dim: int,
    head_dim: int | None = None,
    norm_eps: float = 1e-5,
    tie_word_embeddings: bool = False,
    rope_base: float = 10_000.0,
    rope_scale_factor: float = 1.0,
    rope_low_freq_factor: float = 1.0,
    rope_high_freq_factor: float = 4.0,
    rope_old_context_len: float = 8192.0,
) -> TransformerDecoder:
    """Build a Llama decoder with fresh weights.

    Args:
        vocab_size: rows of the embedding.
        num_layers: decoder layers.
        num_heads: heads of queries; divides ``embed_dim``.
        num_kv_heads: heads of keys and values; divides ``num_heads``.
        embed_dim: width of the decoder.
        max_seq_len: longest sequence.
        intermediate_dim: width inside the feed-forwards.
        head_dim: width of a head, even; ``embed_dim // num_heads`` unless given.
        norm_eps: epsilon of the RMS norms.
        tie_word_embeddings: whether the head shares the embedding's weight.
        rope_base: base of the rotary embedding.
        rope_scale_factor: Llama 3.1's scaling of it; 1 is none.
        rope_low_freq_factor: full scaling below this frequency, in ``rope_old_context_len`` per
            wavelength.
        rope_high_freq_factor: no scaling above this frequency, in the same unit.
        rope_old_context_len: longest sequence that the unscaled embedding was trained on.

    Raises:
        ConfigError: naming every number that is out of range or does not fit the others.

    Examples:
        >>> decoder = llama_decoder(
        ...     vocab_size=11, num_layers=2, num_heads=3, num_kv_heads=1, embed_dim=12, max_seq_len=7,
        ...     intermediate_dim=13,
        ... )
        >>> decoder.head_dim
        4
    """
    sizes = {
        "vocab_size": vocab_size,
        "num_layers": num_layers,
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "embed_dim": embed_dim,
        "max_seq_len": max_seq_len,
        "intermediate_dim": intermediate_dim,
    }
    factors = {"norm_eps": norm_eps, "rope_base": rope_base, "rope_scale_factor": rope_scale_factor}
    _check(sizes, factors, head_dim)
    head_dim = head_dim or embed_dim // num_heads
    rope: nn.Module
    if rope_scale_factor == 1:
        rope = RotaryPositionalEmbeddings(head_dim, max_seq_len=max_seq_len, base=rope_base)
    else:
        rope = Llama3ScaledRoPE(
            head_dim,
            max_seq_len=max_seq_len,
            base=rope_base,
            scale_factor=rope_scale_factor,
            low_freq_factor=rope_low_freq_factor,
            high_freq_factor=rope_high_freq_factor,
            old_context_len=rope_old_context_len,
        )
    layers = nn.ModuleList()
    for _ in range(num_layers):
        attn = MultiHeadAttention(
            embed_dim=embed_dim,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            q_proj=nn.Linear(embed_dim, num_heads * head_dim, bias=False),
            k_proj=nn.Linear(embed_dim, num_kv_heads * head_dim, bias=False),
            v_proj=nn.Linear(embed_dim, num_kv_heads * head_dim, bias=False),
            output_proj=nn.Linear(num_heads * head_dim, embed_dim, bias=False),
            pos_embeddings=rope,
            max_seq_len=max_seq_len,
        )
        layers.append(
            TransformerSelfAttentionLayer(
                attn=attn,
                mlp=llama3_mlp(dim=embed_dim, hidden_dim=intermediate_dim),
                sa_norm=RMSNorm(dim=embed_dim, eps=norm_eps),
                mlp_norm=RMSNorm(dim=embed_dim, eps=norm_eps),
            )
        )
    embedding = nn.Embedding(vocab_size, embed_dim)
    return TransformerDecoder(
        tok_embeddings=embedding,
        layers=layers,
        max_seq_len=max_seq_len,
        num_heads=num_heads,
        head_dim=head_dim,
        norm=RMSNorm(embed_dim, eps=norm_eps),
        output=TiedLinear(embedding)
        if tie_word_embeddings
        else nn.Linear(embed_dim, vocab_size, bias=False),
    )


def _check(sizes: dict[str, int], factors: dict[str, float], head_dim: int | None) -> None:
    """Raise a ``ConfigError`` that names every number out of range, or else those that do not fit."""
    problems = [f"{name}={size} must be at least 1" for name, size in sizes.items() if size < 1]
    problems += [
        f"{name}={factor} must be finite and more than 0"
        for name, factor in factors.items()
        if not 0 < factor < math.inf
    ]
    if head_dim is not None and head_dim < 1:
        problems.append(f"head_dim={head_dim} must be at least 1")
    if not problems:
        num_heads, num_kv_heads, embed_dim = (
            sizes[n] for n in ("num_heads", "num_kv_heads", "embed_dim")
        )
        width = head_dim or embed_dim // num_heads
        if num_heads % num_kv_heads:
            problems.append(f"num_kv_heads={num_kv_heads} must divide num_heads={num_heads}")
        if head_dim is None and embed_dim % num_heads:
            problems.append(f"num_heads={num_heads} must divide embed_dim={embed_dim}")
        elif width % 2:
            problems.append(f"head_dim={width} must be even, as the rotary embedding rotates pairs")
    if problems:
        raise ConfigError(f"Llama decoder: {'; '.join(problems)}.")
