"""Checkpoints of a training run."""

from torchfuse.checkpoint.run.load import LoadedCheckpoint, latest_checkpoint, load_checkpoint
from torchfuse.checkpoint.run.save import Save, save_checkpoint

__all__ = ["LoadedCheckpoint", "Save", "latest_checkpoint", "load_checkpoint", "save_checkpoint"]
