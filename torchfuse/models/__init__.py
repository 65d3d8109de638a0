"""Fused models, called as their decoders are, and the strategies of their architectures."""

from torchfuse.models.base import FusedModel
from torchfuse.models.fuse import fuse
from torchfuse.models.lengths import check_lengths
from torchfuse.models.strategies.cross_attention import CrossAttentionStrategy, DeepFusionModel
from torchfuse.models.strategies.deepstack import DeepStackStrategy
from torchfuse.models.strategies.joint_decoder import EarlyFusionModel, JointDecoderStrategy
from torchfuse.models.strategies.moma import MoMaStrategy
from torchfuse.models.strategies.mot import MoTStrategy
from torchfuse.models.strategies.routed_layers import MixtureFusionModel
from torchfuse.models.strategy import (
    ModalityStrategy,
    build_modality_strategy,
    register_modality_strategy,
)
from torchfuse.models.types import CacheState, EncoderFeatures, ModalityContext
from torchfuse.models.vlm import (
    AdapterConfig,
    ModelConfig,
    VisionEncoderConfig,
    VLMConfig,
    VLMWrapper,
    build_vlm_wrapper,
    inner_transformer,
)

__all__ = [
    "AdapterConfig",
    "CacheState",
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
    "check_lengths",
    "fuse",
    "inner_transformer",
    "register_modality_strategy",
]
