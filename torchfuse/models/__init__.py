"""Fused models behind the decoder's own call, and the strategies that make them."""

from torchfuse.models.base import FusedModel
from torchfuse.models.deep_fusion import CrossAttentionStrategy, DeepFusionModel
from torchfuse.models.deep_stack import DeepStackStrategy
from torchfuse.models.early_fusion import EarlyFusionModel, JointDecoderStrategy
from torchfuse.models.expert_fusion import MoMaStrategy
from torchfuse.models.fuse import fuse
from torchfuse.models.mixture_fusion import MixtureFusionModel, MoTStrategy
from torchfuse.models.strategies import (
    EncoderFeatures,
    ModalityContext,
    ModalityStrategy,
    build_modality_strategy,
    register_modality_strategy,
)
from torchfuse.models.vlm import VLMWrapper, build_vlm_wrapper, inner_transformer
from torchfuse.models.vlm_config import AdapterConfig, ModelConfig, VisionEncoderConfig, VLMConfig

__all__ = [
    "AdapterConfig",
    "CrossAttentionStrategy",
    "DeepFusionModel",
    "DeepStackStrategy",
    "EarlyFusionModel",
    "EncoderFeatures",
    "FusedModel",
    "JointDecoderStrategy",
    "MixtureFusionModel",
    "MoMaStrategy",
    "MoTStrategy",
    "ModalityContext",
    "ModalityStrategy",
    "ModelConfig",
    "VLMConfig",
    "VLMWrapper",
    "VisionEncoderConfig",
    "build_modality_strategy",
    "build_vlm_wrapper",
    "fuse",
    "inner_transformer",
    "register_modality_strategy",
]
