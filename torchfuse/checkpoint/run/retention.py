"""Removing checkpoints of a run that need not be kept."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from pathlib import Path

from torchfuse.checkpoint.run.load import checkpoint_steps
from torchfuse.errors import ConfigError
from torchfuse.io.atomic import tmp_path

__all__ = ["remove_checkpoints"]


def remove_checkpoints(folder: str | Path, *, keep_last: int, keep: Collection[int] = ()) -> list[Path]:
    """Remove the older checkpoints of a run; one process calls this, between saves.

    A checkpoint is renamed before its files are removed, so that a directory with its name is complete.

    Args:
        folder: what was given to ``save_checkpoint``.
        keep_last: how many of the newest are kept, at least 1.
        keep: steps whose checkpoints are kept too.

    Returns:
        The directories that were removed.

    Raises:
        ConfigError: if none would be kept.

    Examples:
        >>> from tempfile import TemporaryDirectory
        >>> from torch import nn
        >>> from torchfuse.checkpoint import save_checkpoint
        >>> with TemporaryDirectory() as folder:
        ...     for step in range(1, 5):
        ...         save = save_checkpoint(folder, nn.Linear(3, 5), step=step)
        ...     [path.name for path in remove_checkpoints(folder, keep_last=1, keep=[2])]
        ['step_1', 'step_3']
    """
    if keep_last < 1:
        raise ConfigError(f"keep_last must be at least 1, got {keep_last}.")
    steps = checkpoint_steps(folder)
    removed = [Path(folder) / f"step_{step}" for step in steps[:-keep_last] if step not in keep]
    for path in removed:
        hidden = tmp_path(path)
        path.rename(hidden)
        shutil.rmtree(hidden)
    return removed
