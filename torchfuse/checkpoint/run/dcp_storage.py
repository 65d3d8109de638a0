"""Storage of tensors that is whole when it has its name, and safe to read.

``torch.distributed.checkpoint`` writes and reads the tensors. Around its writing stands what makes a
directory appear whole or not at all: a hidden directory, and a lock that only its holder's death or end
gives back. Around its reading stands an index that has been checked (see ``dcp_index``); tensors are
read with ``weights_only=True``.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import shutil
import threading
import warnings
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Final

from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save, save

from torchfuse.checkpoint.run.dcp_index import read_index
from torchfuse.errors import CheckpointError
from torchfuse.io.atomic import write_text

__all__ = ["DESCRIPTION", "Place", "Reader", "Writer", "read_tensors", "reasons", "write_tensors"]

DESCRIPTION: Final = "checkpoint.json"
_LOCK: Final = ".saving.lock"
_UNFINISHED: Final = re.compile(r"\.step_[0-9]+\.[0-9a-f]{8}\.saving")


class Place:
    """Rank zero's hold on a folder during a save: the lock, and the hidden directory.

    Args:
        folder: where checkpoints stand.
        step: the step of the one that is to be written.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self._folder, self._step = folder, step
        self._lock: int | None = None
        self._beside: Path | None = None
        self._mutex = threading.Lock()

    def open(self) -> str:
        """Lock the folder, remove what killed savers left in it, and make a hidden directory.

        Returns:
            The directory's name.

        Raises:
            CheckpointError: if the folder is a file, another process saves into it, or the step is
                there.
        """
        if self._folder.exists() and not self._folder.is_dir():
            raise CheckpointError(f"{self._folder} is a file; checkpoints stand in a directory.")
        self._folder.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self._folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            # The system gives the lock back when its holder dies, however it dies.
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CheckpointError(
                f"Another process is saving into {self._folder}; give every run a folder of its own."
            ) from error
        except OSError:
            pass  # no locks here: left-overs cannot be told from what others write, so they stay
        else:
            for left_over in self._folder.iterdir():
                if _UNFINISHED.fullmatch(left_over.name):
                    shutil.rmtree(left_over, ignore_errors=True)
        if (self._folder / f"step_{self._step}").exists():
            raise CheckpointError(
                f"{self._folder} already has a step_{self._step}; remove it or save elsewhere."
            )
        self._beside = self._folder / f".step_{self._step}.{secrets.token_hex(4)}.saving"
        self._beside.mkdir()
        return self._beside.name

    def close(self) -> None:
        """Remove what did not become a checkpoint, and unlock the folder."""
        with self._mutex:
            if self._beside is not None:
                shutil.rmtree(self._beside, ignore_errors=True)
            if self._lock is not None:
                os.close(self._lock)
            self._lock = self._beside = None


class Writer(FileSystemWriter):
    """Storage that becomes a checkpoint when all ranks have written.

    Args:
        beside: the hidden directory that ranks write into.
        final: its name as a checkpoint.
        text: what is written as ``DESCRIPTION`` when all tensors are.
    """

    def __init__(self, beside: Path, final: Path, text: str) -> None:
        super().__init__(beside, sync_files=True)
        self._final, self._text = final, text

    def storage_meta(self) -> StorageMeta:
        return StorageMeta()  # where it was written is of no use to a reader

    def finish(self, metadata: Metadata, results: list[list[Any]]) -> None:
        # Runs on rank zero alone, after the others have written and before they are told.
        super().finish(metadata, results)
        directory = Path(self.path)
        write_text(directory / DESCRIPTION, self._text)
        directory.rename(self._final)
        folder = os.open(self._final.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_tensors(
    tensors: dict[str, Any], writer: Writer, group: Any, asynchronous: bool
) -> Future[Any]:
    """Write tensors; every rank calls this.

    Args:
        tensors: tensors by name, sharded or not.
        writer: where to.
        group: a group of all ranks on the CPU; None without a process group.
        asynchronous: whether to return as soon as the tensors have been copied to the CPU.

    Returns:
        A future that is done when all ranks have written, or holds the ``CheckpointException``.
    """
    _allow_single_process()
    if asynchronous:
        response = async_save(tensors, storage_writer=writer, process_group=group, no_dist=group is None)
        assert isinstance(response, Future)
        return response
    future: Future[Any] = Future()
    try:
        future.set_result(
            save(tensors, storage_writer=writer, process_group=group, no_dist=group is None)
        )
    except CheckpointException as error:
        future.set_exception(error)
    return future


class Reader(FileSystemReader):
    """Storage whose index has been checked before anything is read by it.

    Args:
        path: the directory of a checkpoint.

    Raises:
        CheckpointError: as ``read_index``.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.metadata = read_index(path)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self.metadata


def read_tensors(target: dict[str, Any], reader: Reader, group: Any) -> None:
    """Read tensors in place; every rank calls this.

    Args:
        target: tensors by name, of the stored shapes and dtypes, sharded or not.
        reader: where from.
        group: a group of all ranks on the CPU; None without a process group.

    Raises:
        CheckpointError: if a rank cannot read; what is in the tensors then is of no use.
    """
    _allow_single_process()
    try:
        load(target, storage_reader=reader, process_group=group, no_dist=group is None)
    except CheckpointException as error:
        raise CheckpointError(
            f"{reader.path} cannot be read, nothing was changed: {reasons(error)}."
        ) from error


def reasons(error: CheckpointException) -> str:
    """Why each rank failed that did, in one line."""
    return "; ".join(f"rank {rank}: {cause!r}" for rank, (cause, _) in sorted(error.failures.items()))


def _allow_single_process() -> None:
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninit")
