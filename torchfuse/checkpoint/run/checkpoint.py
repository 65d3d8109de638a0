"""Checkpoints of a training run: model, optimizer, freeze state and step, on any number of ranks.

A checkpoint is a directory ``step_<n>``. Its tensors are stored by ``torch.distributed.checkpoint``
under canonical names, so that any number of ranks reads what any other number wrote; all that is no
tensor stands in ``checkpoint.json`` (see ``run_state``). What never trains may be left out. Everything
is written under a hidden name and renamed by rank zero when all ranks have written, so that what is
called ``step_<n>`` is complete.

Nothing in a checkpoint is run (see ``dcp_storage``), and before the first tensor is read, names, shapes
and dtypes have been compared with the model's.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from torchfuse.checkpoint.run.dcp_storage import (
    DESCRIPTION,
    Place,
    Reader,
    Writer,
    read_tensors,
    reasons,
    write_tensors,
)
from torchfuse.checkpoint.run.optimizer_state import optimizer_problems, optimizer_targets, set_optimizer
from torchfuse.checkpoint.run.state import (
    base_of,
    model_problems,
    model_tensors,
    read_description,
    run_contents,
    set_model,
)
from torchfuse.errors import CheckpointError
from torchfuse.io.ranks import agree, coordination_group, from_rank_zero, is_rank_zero

__all__ = ["LoadedCheckpoint", "Save", "latest_checkpoint", "load_checkpoint", "save_checkpoint"]

_FINISHED: Final = re.compile(r"step_(0|[1-9][0-9]*)")


class LoadedCheckpoint(NamedTuple):
    """What ``load_checkpoint`` loaded, beside the tensors."""

    path: Path
    step: int
    extra: dict[str, Any]
    trainable: tuple[str, ...]


class Save:
    """A save that may still be running; ``wait()`` returns when the checkpoint is there."""

    def __init__(self, path: Path, future: Future[Any], place: Place | None) -> None:
        self.path = path
        self._future = future
        self._place = place
        if place is not None:
            future.add_done_callback(lambda _: place.close())

    def wait(self) -> Path:
        """Wait until every rank has written and the directory has its name.

        Returns:
            The directory.

        Raises:
            RuntimeError: if a rank could not write; nothing is left of the checkpoint then.
        """
        try:
            self._future.result()
        except CheckpointException as error:
            raise RuntimeError(f"{self.path} was not saved: {reasons(error)}.") from error
        finally:
            if self._place is not None:
                self._place.close()  # the callback may not have run yet
        return self.path


_running: Save | None = None


def save_checkpoint(
    folder: str | Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    step: int,
    extra: Mapping[str, Any] | None = None,
    trained: Collection[str] | None = None,
    asynchronous: bool = False,
) -> Save:
    """Save a run as ``folder/step_<step>``; under a process group every rank calls this.

    What killed saves left in the folder is removed. A save that still runs is waited for.

    Args:
        folder: where the checkpoints of the run stand, made if need be.
        model: any module, sharded or not, compiled or not.
        optimizer: its optimizer; it need not have stepped, nor hold every parameter.
        step: how many steps were taken.
        extra: anything else to keep, such as the state of a scheduler or the position in the data, in
            JSON's types. Rank zero's is kept.
        trained: names of the pretrained parameters that train at any time, as
            ``FreezeSchedule.trained_ever`` returns them. Other pretrained tensors are not written then;
            a load expects a model that has them, and compares. None: everything is written.
        asynchronous: return when the tensors have been copied to the CPU, and write in the background.
            Training may go on at once. Call ``wait()`` before the process group is destroyed.

    Returns:
        The save: finished, or running if ``asynchronous``.

    Raises:
        CheckpointError: if something cannot be saved, the step is already there or another process saves
            into the folder; nothing has been written then.
        RuntimeError: if a rank could not write, in this save or in an earlier asynchronous one.

    Examples:
        >>> from tempfile import TemporaryDirectory
        >>> model = nn.Linear(3, 5)
        >>> with TemporaryDirectory() as folder:
        ...     save = save_checkpoint(folder, model, step=7, extra={"epoch": 2})
        ...     loaded = load_checkpoint(folder, model)
        >>> save.path.name, loaded.step, loaded.extra
        ('step_7', 7, {'epoch': 2})
    """
    global _running
    _finish_running()
    group = coordination_group()
    tensors, values, problems = run_contents(model, optimizer, step, extra, trained)
    agree(group, problems, "The checkpoint cannot be saved; nothing was written.", same=step)
    text = json.dumps(values, indent=1)
    folder = Path(folder)
    place = Place(folder, step) if is_rank_zero() else None
    try:
        beside = from_rank_zero(group, lambda: place.open() if place else None)
        writer = Writer(folder / str(beside), folder / f"step_{step}", text)
        future = write_tensors(tensors, writer, group, asynchronous)
    except BaseException:
        if place is not None:
            place.close()
        raise
    started = _running = Save(folder / f"step_{step}", future, place)
    if not asynchronous:
        _finish_running()
    return started


def latest_checkpoint(folder: str | Path) -> Path | None:
    """The checkpoint of the highest step in a folder; None if there is none.

    Args:
        folder: what was given to ``save_checkpoint``; it need not exist.
    """
    folder = Path(folder)
    names = os.listdir(folder) if folder.is_dir() else []
    steps = [int(found[1]) for name in names if (found := _FINISHED.fullmatch(name))]
    return folder / f"step_{max(steps)}" if steps else None


def load_checkpoint(
    path: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> LoadedCheckpoint:
    """Load what ``save_checkpoint`` saved; under a process group every rank calls this.

    The number of ranks may differ from that of the save. What trains is restored too. An optimizer must
    hold what it held then; if that is not what trains now, load the model alone first, build the
    optimizer, and load both. What was left out of the checkpoint must be in the model already.

    Args:
        path: a checkpoint, or the folder of a run, whose latest one is loaded.
        model: a model as the saved one, sharded or not, compiled or not, with memory.
        optimizer: an optimizer as the saved one; None: the optimizer's state is passed over.

    Returns:
        Where it was, its step, its ``extra`` and the names of the parameters that train.

    Raises:
        CheckpointError: if there is no checkpoint, it is damaged, or something does not fit. Model and
            optimizer are as they were then, on every rank.
    """
    _finish_running()
    group = coordination_group()
    given = Path(path)
    path = given / from_rank_zero(group, lambda: _find(given))
    problems: list[str] = []
    tensors, base = model_tensors(model), base_of(model)
    try:
        description = read_description(path / DESCRIPTION)
        reader = Reader(path)
        stored = reader.metadata.state_dict_metadata
        problems = model_problems(stored, tensors, description, model, base)
        if optimizer is not None:
            problems += optimizer_problems(stored, description.optimizer, model, optimizer)
    except ValueError as error:
        problems.append(str(error))
    agree(group, problems, f"{path} does not fit; nothing was loaded.")
    target = {name: torch.zeros_like(tensor) for name, tensor in tensors.items() if name in stored}
    saved = description.optimizer if optimizer is not None else None  # not there: a problem above
    if saved is not None:
        target |= optimizer_targets(stored, saved, model)
    read_tensors(target, reader, group)
    if optimizer is not None and saved is not None:
        set_optimizer(model, optimizer, saved, target)
    set_model(model, description, target)
    return LoadedCheckpoint(path, description.step, description.extra, tuple(description.trainable))


def _find(path: Path) -> str:
    """Where a checkpoint is, relative to what the caller gave."""
    if (path / DESCRIPTION).is_file():
        return "."
    latest = latest_checkpoint(path)
    if latest is None:
        raise CheckpointError(f"{path} is no checkpoint of save_checkpoint, and there is none in it.")
    return latest.name


def _finish_running() -> None:
    global _running
    earlier, _running = _running, None
    if earlier is not None:
        earlier.wait()
