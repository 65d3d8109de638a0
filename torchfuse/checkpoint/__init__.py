"""Checkpoints: pretrained models in and out, what fusion learned, and training runs."""

from typing import TYPE_CHECKING

from torchfuse._lazy import lazy_exports
from torchfuse.checkpoint.artifact.fusion import load_fusion, save_fusion
from torchfuse.checkpoint.artifact.lora import load_lora, set_lora
from torchfuse.checkpoint.artifact.seeding import seed_adapters
from torchfuse.checkpoint.artifact.state_dict import fusion_state_dict, load_fusion_state_dict
from torchfuse.checkpoint.artifact.trained import load_trained, save_trained
from torchfuse.checkpoint.export import export, save_pretrained
from torchfuse.checkpoint.load import from_pretrained, load_pretrained
from torchfuse.checkpoint.tune import FusionCheckpointer

if TYPE_CHECKING:
    from torchfuse.checkpoint.run import (
        latest_checkpoint,
        load_checkpoint,
        read_checkpoint,
        remove_checkpoints,
        save_checkpoint,
    )

__all__ = [
    "FusionCheckpointer",
    "export",
    "from_pretrained",
    "fusion_state_dict",
    "latest_checkpoint",
    "load_checkpoint",
    "load_fusion",
    "load_fusion_state_dict",
    "load_lora",
    "load_pretrained",
    "load_trained",
    "read_checkpoint",
    "remove_checkpoints",
    "save_checkpoint",
    "save_fusion",
    "save_pretrained",
    "save_trained",
    "seed_adapters",
    "set_lora",
]

__getattr__ = lazy_exports(
    __name__,
    dict.fromkeys(
        (
            "latest_checkpoint",
            "load_checkpoint",
            "read_checkpoint",
            "remove_checkpoints",
            "save_checkpoint",
        ),
        "run",
    ),
)
