"""Save a training run: model, optimizer, what trains, step, on any number of ranks.

A checkpoint is a directory ``step_<n>``. Its tensors are stored by ``torch.distributed.checkpoint``
under canonical names, so that any other number of ranks can load them; all else is in
``checkpoint.json``. Rank zero renames a hidden directory when all ranks have written, so that a
directory with the name ``step_<n>`` is complete.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping
from concurrent.futures import Future
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException

from torchfuse.checkpoint.run.dcp_storage import Writer, make_directory, save_error, write_tensors
from torchfuse.checkpoint.run.description import Description, json_problems
from torchfuse.checkpoint.run.model_state import (
    MODEL,
    base_fingerprint,
    buffers_outside,
    model_tensors,
    tensor_problems,
    trained_problems,
)
from torchfuse.checkpoint.run.optimizer_state import optimizer_contents
from torchfuse.io.ranks import agree, coordination_group, from_rank_zero
from torchfuse.naming import named_parameters

__all__ = ["Save", "save_checkpoint", "wait_for_save"]


class Save:
    """A save that may still be running.

    Attributes:
        path: the directory of the checkpoint.
    """

    def __init__(self, path: Path, future: Future[Any], cleanup: ExitStack) -> None:
        self.path = path
        self._future = future
        self._cleanup = cleanup
        self._mutex = threading.Lock()
        future.add_done_callback(lambda _: self._clean_up())

    def wait(self) -> Path:
        """Wait until every rank has written and the directory has its name.

        Returns:
            The directory.

        Raises:
            CheckpointError: if the disk of a rank is full or cannot be written to.
            RuntimeError: if a rank could not write for another reason. In both cases nothing is left of
                this checkpoint, and earlier ones are intact.
        """
        global _running
        if _running is self:
            _running = None  # so that the next save does not raise the same error again
        try:
            self._future.result()
        except CheckpointException as error:
            raise save_error(self.path, error) from error
        finally:
            self._clean_up()  # the callback may not have run yet
        return self.path

    def _clean_up(self) -> None:
        with self._mutex:
            self._cleanup.close()


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

    What killed processes left in the folder is removed. An earlier save that still runs is waited for.

    Args:
        folder: the directory for the checkpoints of the run, made if need be.
        model: any module, sharded or not, compiled or not.
        optimizer: its optimizer; it need not have stepped, nor hold every parameter.
        step: the number of steps that were taken.
        extra: other values to save, such as the state of a scheduler or the position in the data, in
            JSON's types. Rank zero's are saved.
        trained: names of the pretrained parameters that train at any time, as
            ``FreezeSchedule.trained_ever`` returns them. Other pretrained tensors are not saved then;
            the model of a load must have them, and is compared. None: everything is saved.
        asynchronous: return when the tensors have been copied to the CPU, and write in the background.
            Training can continue at once. Call ``wait()`` before the process group is destroyed.

    Returns:
        The save: finished, or running if ``asynchronous``.

    Raises:
        CheckpointError: if something cannot be saved, the step exists already or another process saves
            into the folder, and nothing has been written then; or as ``Save.wait``, also for an earlier
            asynchronous save.
        RuntimeError: as ``Save.wait``.

    Examples:
        >>> from tempfile import TemporaryDirectory
        >>> from torchfuse.checkpoint import load_checkpoint
        >>> model = nn.Linear(3, 5)
        >>> with TemporaryDirectory() as folder:
        ...     save = save_checkpoint(folder, model, step=7, extra={"epoch": 2})
        ...     loaded = load_checkpoint(folder, model)
        >>> save.path.name, loaded.step, loaded.extra
        ('step_7', 7, {'epoch': 2})
    """
    global _running
    wait_for_save()
    group = coordination_group()
    tensors, description, problems = _contents(model, optimizer, step, extra, trained)
    agree(group, problems, "The checkpoint cannot be saved; nothing was written.", same=step)
    text = description.to_json()
    num_bytes = sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())
    path = Path(folder) / f"step_{step}"
    cleanup = ExitStack()
    try:
        tmp = path.with_name(from_rank_zero(group, lambda: make_directory(path, cleanup)))
        future = write_tensors(tensors, Writer(tmp, path, text, num_bytes), group, asynchronous)
    except BaseException:
        cleanup.close()
        raise
    started = _running = Save(path, future, cleanup)
    if not asynchronous:
        wait_for_save()
    return started


def wait_for_save() -> None:
    """Wait for the last save, if that was not done yet; raise as ``Save.wait``."""
    if _running is not None:
        _running.wait()


def _contents(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    step: Any,
    extra: Any,
    trained: Collection[str] | None,
) -> tuple[dict[str, Tensor], Description, list[str]]:
    """Return all tensors by name, all other values, and what cannot be saved; every rank calls this."""
    tensors = model_tensors(model)
    base = {} if trained is None else base_fingerprint(model, trained)
    for name in base:
        del tensors[MODEL + name]
    optimizer_tensors, of_optimizer, problems = optimizer_contents(model, optimizer)
    if trained is not None:
        problems += trained_problems(model, trained, of_optimizer)
    for index, group in enumerate(of_optimizer["groups"] if of_optimizer else []):
        problems += json_problems(group["options"], f"optimizer group {index}")
    problems += tensor_problems(tensors) + buffers_outside(model)
    if type(step) is not int or step < 0:
        problems.append(f"step must be a whole number from 0 on, not {step!r}")
    if extra is not None and not isinstance(extra, Mapping):
        problems.append(f"extra must be a mapping, not a {type(extra).__name__}")
        extra = None
    extra = dict(extra or {})
    problems += json_problems(extra, "extra")
    trainable = [name for name, parameter in named_parameters(model) if parameter.requires_grad]
    description = Description(step, trainable, of_optimizer, extra, base)
    return tensors | optimizer_tensors, description, problems
