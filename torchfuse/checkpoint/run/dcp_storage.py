"""Storage of tensors by ``torch.distributed.checkpoint`` (DCP): whole or not at all, and safe to read.

Ranks write into a hidden directory, which rank zero renames when all have finished. What is read has an
index that was checked (see ``dcp_index``), and its tensors are read with ``weights_only=True``.
"""

from __future__ import annotations

import shutil
import warnings
from concurrent.futures import Future
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any, Final

from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save, save

from torchfuse.checkpoint.run.dcp_index import read_index
from torchfuse.errors import CheckpointError
from torchfuse.io.atomic import fsync_path, fsync_tree, remove_leftovers, tmp_path
from torchfuse.io.disk_errors import disk_errors
from torchfuse.io.save_lock import SaveLock

__all__ = [
    "DESCRIPTION",
    "Reader",
    "Writer",
    "make_directory",
    "read_tensors",
    "save_error",
    "write_tensors",
]

DESCRIPTION: Final = "checkpoint.json"
_KEPT: Final = "Earlier checkpoints are intact."


def make_directory(path: Path, cleanup: ExitStack) -> str:
    """Lock the parent of a checkpoint, remove what killed processes left in it, and make a directory.

    Args:
        path: the checkpoint that is to be written.
        cleanup: is given what must be called when the save has ended: it removes the directory, unless
            it was renamed, and releases the lock.

    Returns:
        The name of the directory, which is hidden and in the parent.

    Raises:
        CheckpointError: if the parent is a file, another process saves into it, the checkpoint exists,
            or the disk cannot be written to.
    """
    folder = path.parent
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; checkpoints are written into a directory.")
    lock = SaveLock(folder / ".saving.lock")
    with disk_errors(path, kept=_KEPT):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            locked = lock.acquire(wait=False)
        except BlockingIOError as error:
            raise CheckpointError(
                f"Another process is saving into {folder}; give every run a folder of its own."
            ) from error
        cleanup.callback(lock.release)
        if locked:
            remove_leftovers(folder, r"step_\d+")
        if path.exists():
            raise CheckpointError(f"{folder} already contains {path.name}; remove it or save elsewhere.")
        tmp = tmp_path(path)
        tmp.mkdir()
        cleanup.callback(shutil.rmtree, tmp, ignore_errors=True)
    return tmp.name


class Writer(FileSystemWriter):
    """Storage that becomes a checkpoint when all ranks have written.

    Args:
        tmp: the directory that ranks write into.
        path: its name as a checkpoint.
        text: what ``DESCRIPTION`` will contain.
        num_bytes: the size of all tensors.
    """

    def __init__(self, tmp: Path, path: Path, text: str, num_bytes: int) -> None:
        super().__init__(tmp)
        self._tmp, self._final, self._text, self._num_bytes = tmp, path, text, num_bytes

    def write_data(self, *args: Any) -> Any:
        with self._disk_errors():
            return super().write_data(*args)

    def finish(self, metadata: Metadata, results: list[list[Any]]) -> None:
        # Runs on rank zero only, after all ranks have written and before save returns on any.
        with self._disk_errors():
            super().finish(metadata, results)
            (self._tmp / DESCRIPTION).write_text(self._text, encoding="utf-8")
            fsync_tree(self._tmp)
            self._tmp.rename(self._final)
            fsync_path(self._final.parent)

    def storage_meta(self) -> StorageMeta:
        return StorageMeta()  # the default contains the hidden path

    def _disk_errors(self) -> AbstractContextManager[None]:
        return disk_errors(self._final, tmp=self._tmp, num_bytes=self._num_bytes, kept=_KEPT)


def write_tensors(
    tensors: dict[str, Any], writer: Writer, group: Any, asynchronous: bool
) -> Future[Any]:
    """Write tensors; every rank calls this.

    Args:
        tensors: tensors by name, sharded or not.
        writer: the storage.
        group: a group of all ranks on the CPU; None without a process group.
        asynchronous: whether to return as soon as the tensors have been copied to the CPU.

    Returns:
        A future that is done when all ranks have written. ``save_error`` explains the
        ``CheckpointException`` that it may hold.
    """
    _allow_single_process()
    options: Any = {"storage_writer": writer, "process_group": group, "no_dist": group is None}
    if asynchronous:
        response = async_save(tensors, **options)
        assert isinstance(response, Future)
        return response
    future: Future[Any] = Future()
    try:
        future.set_result(save(tensors, **options))
    except CheckpointException as error:
        future.set_exception(error)
    return future


def save_error(path: Path, error: CheckpointException) -> Exception:
    """Return the exception to raise for a checkpoint that ranks could not write.

    It is a ``CheckpointError`` if the disk of any rank is the cause, else a RuntimeError.
    """
    causes = [cause for cause, _ in error.failures.values()]
    if not any(isinstance(cause, CheckpointError) for cause in causes):
        return RuntimeError(f"{path} was not saved: {_reasons(error)}.")
    return CheckpointError(_reasons(error))


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
        reader: the storage.
        group: a group of all ranks on the CPU; None without a process group.

    Raises:
        CheckpointError: if a rank cannot read; the contents of the tensors are undefined then.
    """
    _allow_single_process()
    try:
        load(target, storage_reader=reader, process_group=group, no_dist=group is None)
    except CheckpointException as error:
        raise CheckpointError(
            f"{reader.path} cannot be read, nothing was changed: {_reasons(error)}."
        ) from error


def _reasons(error: CheckpointException) -> str:
    """Return why each rank failed that did, in one line."""
    return "; ".join(
        f"rank {rank}: {cause if isinstance(cause, CheckpointError) else repr(cause)}"
        for rank, (cause, _) in sorted(error.failures.items())
    )


def _allow_single_process() -> None:
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninit")
