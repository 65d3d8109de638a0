"""Load what ``save_checkpoint`` saved, on any number of ranks.

Nothing in a checkpoint is executed (see ``dcp_index``), and names, shapes and dtypes are compared with
the model's before the first tensor is read.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from torch import nn

from torchfuse.checkpoint.run.dcp_storage import DESCRIPTION, Reader, read_tensors
from torchfuse.checkpoint.run.description import read_description
from torchfuse.checkpoint.run.model_state import (
    base_fingerprint,
    model_problems,
    model_tensors,
    set_model,
)
from torchfuse.checkpoint.run.optimizer_state import optimizer_problems, optimizer_targets, set_optimizer
from torchfuse.checkpoint.run.save import wait_for_save
from torchfuse.errors import CheckpointError
from torchfuse.io.ranks import agree, coordination_group, from_rank_zero

__all__ = [
    "LoadedCheckpoint",
    "checkpoint_steps",
    "latest_checkpoint",
    "load_checkpoint",
    "read_checkpoint",
]

_CHECKPOINT: Final = re.compile(r"step_(0|[1-9][0-9]*)")


class LoadedCheckpoint(NamedTuple):
    """What a checkpoint contains besides tensors.

    Attributes:
        path: the directory of the checkpoint.
        step: the number of steps that were taken.
        extra: what was given to ``save_checkpoint``.
        trainable: names of the parameters that train.
    """

    path: Path
    step: int
    extra: dict[str, Any]
    trainable: tuple[str, ...]


def latest_checkpoint(folder: str | Path) -> Path | None:
    """Return the checkpoint of the highest step in a folder; None if there is none.

    Args:
        folder: what was given to ``save_checkpoint``; it need not exist.
    """
    steps = checkpoint_steps(folder)
    return Path(folder) / f"step_{steps[-1]}" if steps else None


def checkpoint_steps(folder: str | Path) -> list[int]:
    """Return the steps of the checkpoints in a folder, in order; the folder need not exist."""
    names = os.listdir(folder) if Path(folder).is_dir() else []
    return sorted(int(found[1]) for name in names if (found := _CHECKPOINT.fullmatch(name)))


def read_checkpoint(path: str | Path) -> LoadedCheckpoint:
    """Return what a checkpoint contains besides tensors, without reading those.

    Args:
        path: as for ``load_checkpoint``.

    Raises:
        CheckpointError: if there is no checkpoint, or it is damaged.

    Examples:
        >>> from tempfile import TemporaryDirectory
        >>> from torchfuse.checkpoint import save_checkpoint
        >>> with TemporaryDirectory() as folder:
        ...     save = save_checkpoint(folder, nn.Linear(3, 5), step=7, extra={"epoch": 2})
        ...     found = read_checkpoint(folder)
        >>> found.step, found.extra
        (7, {'epoch': 2})
    """
    path = Path(path) / _find(Path(path))
    description = read_description(path / DESCRIPTION)
    return LoadedCheckpoint(path, description.step, description.extra, tuple(description.trainable))


def load_checkpoint(
    path: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> LoadedCheckpoint:
    """Load what ``save_checkpoint`` saved; under a process group every rank calls this.

    The number of ranks may differ from that of the save. Which parameters train is loaded too. An
    optimizer must have the parameters that it had then; if other ones train now, load the model alone
    first, build the optimizer, and load both. Tensors that were not saved must be in the model already.

    Args:
        path: a checkpoint, or the folder of a run, whose latest one is loaded.
        model: a model as the saved one, sharded or not, compiled or not, with memory.
        optimizer: an optimizer as the saved one; None: its state is not loaded.

    Returns:
        The path of the checkpoint, its step, its ``extra`` and the names of the parameters that train.

    Raises:
        CheckpointError: if there is no checkpoint, it is damaged, or something does not fit. Model and
            optimizer are unchanged then, on every rank.
    """
    wait_for_save()
    group = coordination_group()
    given = Path(path)
    path = given / from_rank_zero(group, lambda: _find(given))
    problems: list[str] = []
    tensors, base = model_tensors(model), base_fingerprint(model)
    try:
        description = read_description(path / DESCRIPTION)
        reader = Reader(path)
        stored = reader.metadata.state_dict_metadata
        problems = model_problems(stored, tensors, description, model, base)
        if optimizer is not None:
            problems += optimizer_problems(stored, description.optimizer, model, optimizer)
    except ValueError as error:  # of any kind, so that every rank reaches agree
        problems.append(str(error))
    agree(group, problems, f"{path} does not fit; nothing was loaded.")
    target = {name: torch.zeros_like(tensor) for name, tensor in tensors.items() if name in stored}
    saved = description.optimizer if optimizer is not None else None  # if it is missing: a problem above
    if saved is not None:
        target |= optimizer_targets(stored, saved, model)
    read_tensors(target, reader, group)
    if optimizer is not None and saved is not None:
        set_optimizer(model, optimizer, saved, target)
    set_model(model, description, target)
    return LoadedCheckpoint(path, description.step, description.extra, tuple(description.trainable))


def _find(path: Path) -> str:
    """Return where a checkpoint is, relative to what the caller gave."""
    if (path / DESCRIPTION).is_file():
        return "."
    latest = latest_checkpoint(path)
    if latest is None:
        raise CheckpointError(f"{path} is no checkpoint of save_checkpoint, and contains none.")
    return latest.name
