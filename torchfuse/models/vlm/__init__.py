"""A vision-language model for training loops: pixels and ids in, logits and labels out."""

from torchfuse.models.vlm.build import build_vlm_wrapper
from torchfuse.models.vlm.config import AdapterConfig, ModelConfig, VisionEncoderConfig, VLMConfig
from torchfuse.models.vlm.wrapper import VLMWrapper, inner_transformer

__all__ = [
    "AdapterConfig",
    "ModelConfig",
    "VLMConfig",
    "VLMWrapper",
    "VisionEncoderConfig",
    "build_vlm_wrapper",
    "inner_transformer",
]
