"""A vision-language model from configurations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torchfuse.models.lengths import check_lengths
from torchfuse.models.vlm.config import AdapterConfig, ModelConfig, VisionEncoderConfig, VLMConfig
from torchfuse.models.vlm.wrapper import VLMWrapper

__all__ = ["build_vlm_wrapper"]


def build_vlm_wrapper(
    model_config: ModelConfig | Mapping[str, Any],
    vision_config: VisionEncoderConfig | Mapping[str, Any],
    adapter_config: AdapterConfig | Mapping[str, Any],
    vlm_config: VLMConfig | Mapping[str, Any],
) -> VLMWrapper:
    """Build a ``VLMWrapper`` from configurations, with fresh weights.

    ``torchfuse.load_pretrained(wrapper, decoder=..., encoder=...)`` loads pretrained ones. What trains
    is as ``vlm_config.freeze`` and the stages from step 0 specify.

    Args:
        model_config: the decoder.
        vision_config: the encoder.
        adapter_config: the adapter.
        vlm_config: the architecture. Each may be a mapping of its fields, and in this one the
            architecture's options may be beside them: ``{"arch": "mot", "start": "zero"}``.

    Raises:
        ConfigError: if a configuration does not fit, naming key, value and choices; if text and features
            are too long for the decoder, with every number, before the decoder is built.
        ModelError: if the parts do not fit each other.

    Examples:
        >>> model = build_vlm_wrapper(
        ...     {"vocab_size": 11, "num_layers": 2, "num_heads": 3, "num_kv_heads": 1, "embed_dim": 12,
        ...      "max_seq_len": 17, "intermediate_dim": 13},
        ...     {"type": "random", "num_tokens": 5, "feature_dim": 7},
        ...     {"type": "linear"},
        ...     {"arch": "mot", "start": "zero", "max_text_len": 12},
        ... )
        >>> type(model.fused).__name__, model.num_image_tokens
        ('MixtureFusionModel', 5)
    """
    model, vision = ModelConfig.read(model_config), VisionEncoderConfig.read(vision_config)
    adapter, vlm = AdapterConfig.read(adapter_config), VLMConfig.read(vlm_config)
    strategy, schedule = vlm.strategy, vlm.schedule
    encoder: Any = vision.build()
    projection = adapter.build(encoder.feature_dim, model.embed_dim, encoder.num_tokens)
    check_lengths(
        max_seq_len=model.max_seq_len,
        text_len=vlm.max_text_len or 0,
        num_tokens=encoder.num_tokens,
        num_frames=vision.num_frames,
        adapter=projection,
        in_sequence=bool(strategy.special_tokens() or strategy.extra_tokens(1)),
    )
    wrapper = VLMWrapper(
        encoder,
        projection,
        model.build(),
        strategy,
        num_frames=vision.num_frames,
        every=vlm.every,
        fusion_vocab_size=vlm.fusion_vocab_size,
        on_missing=vlm.on_missing,
    )
    schedule.trained_ever(wrapper)
    schedule.apply(wrapper, 0)
    return wrapper
