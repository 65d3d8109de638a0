"""Checkpoints: what the world has, in; what fusion learned, out and in again."""

from torchfuse.checkpoint.artifact.fusion import (
    fusion_state_dict,
    load_fusion,
    load_fusion_state_dict,
    save_fusion,
)
from torchfuse.checkpoint.build import from_pretrained
from torchfuse.checkpoint.export import export, save_pretrained
from torchfuse.checkpoint.load import load_pretrained

__all__ = [
    "export",
    "from_pretrained",
    "fusion_state_dict",
    "load_fusion",
    "load_fusion_state_dict",
    "load_pretrained",
    "save_fusion",
    "save_pretrained",
]
