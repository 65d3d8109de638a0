"""Checkpoints of a training run."""

from torchfuse.checkpoint.run.load import (
    LoadedCheckpoint,
    checkpoint_steps,
    latest_checkpoint,
    load_checkpoint,
    read_checkpoint,
)
from torchfuse.checkpoint.run.retention import remove_checkpoints
from torchfuse.checkpoint.run.save import Save, save_checkpoint

__all__ = [
    "LoadedCheckpoint",
    "Save",
    "checkpoint_steps",
    "latest_checkpoint",
    "load_checkpoint",
    "read_checkpoint",
    "remove_checkpoints",
    "save_checkpoint",
]
