"""Checkpoint formats, one file each; importing the package registers them."""

from torchfuse.checkpoint.formats.clip import ClipVision
from torchfuse.checkpoint.formats.fused import Fused
from torchfuse.checkpoint.formats.hf_tower import HfTower
from torchfuse.checkpoint.formats.llama import Llama
from torchfuse.checkpoint.formats.llava import Llava
from torchfuse.checkpoint.formats.meta import Meta
from torchfuse.checkpoint.formats.mllama import Mllama
from torchfuse.checkpoint.formats.mllama_vision import MllamaVision
from torchfuse.checkpoint.formats.torchtune import Torchtune

__all__ = [
    "ClipVision",
    "Fused",
    "HfTower",
    "Llama",
    "Llava",
    "Meta",
    "Mllama",
    "MllamaVision",
    "Torchtune",
]
