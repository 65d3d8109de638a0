"""Whether the parts of a vision-language model fit the decoder's length, as far as they are known."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from torchfuse.models.lengths import check_lengths
from torchfuse.models.vlm.config import AdapterConfig, ModelConfig, VisionEncoderConfig, VLMConfig

__all__ = ["check_vlm_lengths"]


def check_vlm_lengths(
    model: ModelConfig,
    vision: VisionEncoderConfig,
    adapter: AdapterConfig,
    vlm: VLMConfig,
    encoder: nn.Module | None = None,
) -> int | None:
    """Compare the longest sequence with what the decoder can hold, see ``check_lengths``.

    Args:
        model: the decoder.
        vision: the encoder.
        adapter: the adapter.
        vlm: the architecture.
        encoder: the encoder that was built. None: what its configuration says of it is taken, and where
            that is nothing, features are not counted.

    Returns:
        The length of the longest sequence; None if the encoder's number of features is not known.

    Raises:
        ModelError: if the decoder is too short, with every number.
    """
    source: Any = vision if encoder is None else encoder
    strategy = vlm.strategy
    built = None
    if source.num_tokens is not None and source.feature_dim is not None:
        with torch.device("meta"):
            built = adapter.build(source.feature_dim, model.embed_dim, source.num_tokens)
    return check_lengths(
        max_seq_len=model.max_seq_len,
        text_len=vlm.max_text_len or 0,
        num_tokens=None if built is None else source.num_tokens,
        num_frames=vision.num_frames,
        adapter=built,
        in_sequence=bool(strategy.special_tokens() or strategy.extra_tokens(1)),
    )
