"""Builders of named models from plain scalars, for ``_component_:`` in a YAML.

Decoder and encoder are built with fresh weights; ``load_pretrained`` (or a checkpointer) fills them.
"""

from __future__ import annotations

from typing import Any, Final

from torchtune.models.llama3_2 import llama3_2, llama3_2_1b

from torchfuse.encoders.clip import ClipVisionEncoder, clip_vit_l_14_336
from torchfuse.errors import ConfigError
from torchfuse.models.base import FusedModel
from torchfuse.models.fuse import fuse
from torchfuse.options import passes_options_to

__all__ = ["digits", "llama3_2_1b_clip_vit_l_14_336", "llama_clip"]

_DIGITS: Final[dict[str, Any]] = {
    "vocab_size": 40,
    "num_layers": 4,
    "num_heads": 4,
    "num_kv_heads": 2,
    "embed_dim": 128,
    "max_seq_len": 128,
    "intermediate_dim": 256,
    "image_size": 16,
    "patch_size": 8,
    "vision_embed_dim": 96,
    "vision_num_layers": 4,
    "vision_num_heads": 4,
    "vision_hidden_dim": 192,
}


@passes_options_to(fuse)
def llama3_2_1b_clip_vit_l_14_336(
    *,
    arch: str = "cross_attention",
    feature_layer: int = -2,
    keep_cls: bool = False,
    **fuse_options: Any,
) -> FusedModel:
    """Build Llama 3.2 1B with the CLIP ViT-L/14 tower for images of 336 pixels.

    Args:
        arch: the name of an architecture, see ``torchfuse.fuse``.
        feature_layer: which hidden state of CLIP the features are.
        keep_cls: whether CLIP's class token is a feature too.
        **fuse_options: see ``torchfuse.fuse``.
    """
    encoder = clip_vit_l_14_336(feature_layer=feature_layer, keep_cls=keep_cls)
    return fuse(llama3_2_1b(), encoder, arch=arch, **fuse_options)


@passes_options_to(fuse)
def llama_clip(
    *,
    vocab_size: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    embed_dim: int,
    max_seq_len: int,
    intermediate_dim: int,
    image_size: int,
    patch_size: int,
    vision_embed_dim: int,
    vision_num_layers: int,
    vision_num_heads: int,
    vision_hidden_dim: int | None = None,
    vision_activation: str = "quick_gelu",
    rope_base: int = 10_000,
    rope_scale_factor: int = 1,
    norm_eps: float = 1e-5,
    tie_word_embeddings: bool = True,
    feature_layer: int = -2,
    keep_cls: bool = False,
    arch: str = "cross_attention",
    **fuse_options: Any,
) -> FusedModel:
    """Build a Llama of any size with a CLIP tower of any size.

    Args:
        vocab_size: tokens of the pretrained vocabulary.
        num_layers: layers of the decoder.
        num_heads: heads of queries.
        num_kv_heads: heads of keys and values.
        embed_dim: width of the decoder.
        max_seq_len: longest sequence.
        intermediate_dim: width inside the decoder's feed-forwards.
        image_size: side of the images, in pixels.
        patch_size: side of a patch, in pixels.
        vision_embed_dim: width of the tower.
        vision_num_layers: layers of the tower.
        vision_num_heads: heads of the tower.
        vision_hidden_dim: width inside the tower's feed-forwards; four times its width unless given.
        vision_activation: ``"quick_gelu"`` or ``"gelu"``.
        rope_base: base of the rotary embedding.
        rope_scale_factor: Llama 3.1's scaling of it; 1 is none.
        norm_eps: epsilon of the decoder's RMS norms.
        tie_word_embeddings: whether the head shares the embedding's weight.
        feature_layer: which hidden state of the tower the features are.
        keep_cls: whether the tower's class token is a feature too.
        arch: the name of an architecture, see ``torchfuse.fuse``.
        **fuse_options: see ``torchfuse.fuse``.

    Raises:
        ConfigError: if the numbers do not fit each other.
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
    if problems := [f"{name}={value}" for name, value in sizes.items() if value < 1]:
        raise ConfigError(f"A decoder's sizes must be at least 1, got {', '.join(problems)}.")
    decoder = llama3_2(
        **sizes,
        rope_base=rope_base,
        scale_factor=rope_scale_factor,
        norm_eps=norm_eps,
        tie_word_embeddings=tie_word_embeddings,
    )
    encoder = ClipVisionEncoder(
        image_size=image_size,
        patch_size=patch_size,
        embed_dim=vision_embed_dim,
        num_layers=vision_num_layers,
        num_heads=vision_num_heads,
        hidden_dim=vision_hidden_dim,
        activation=vision_activation,
        feature_layer=feature_layer,
        keep_cls=keep_cls,
    )
    return fuse(decoder, encoder, arch=arch, **fuse_options)


@passes_options_to(llama_clip, **_DIGITS)
def digits(
    *,
    arch: str = "cross_attention",
    feature_layer: int = -1,
    keep_cls: bool = True,
    **options: Any,
) -> FusedModel:
    """Build the fusion of the two tiny checkpoints that ``torchfuse.recipes.prepare_digits`` makes.

    Args:
        arch: the name of an architecture, see ``torchfuse.fuse``.
        feature_layer: which hidden state of the tower the features are.
        keep_cls: whether the tower's class token is a feature too.
        **options: see ``llama_clip``, whose sizes are fixed here, and ``torchfuse.fuse``.
    """
    return llama_clip(**_DIGITS, arch=arch, feature_layer=feature_layer, keep_cls=keep_cls, **options)
