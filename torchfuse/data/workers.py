"""Worker processes that end: which samples they were reading."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import DataLoader, get_worker_info

from torchfuse.errors import DataError

__all__ = ["WorkerWatch", "sample_name"]

_NOTHING = -1


class WorkerWatch:
    """The sample that each worker process is reading, in shared memory.

    A data set holds it, and notes its samples.

    Args:
        num_workers: the number of processes.
    """

    def __init__(self, num_workers: int) -> None:
        self._reading = torch.full((num_workers,), _NOTHING).share_memory_()

    def note(self, index: int = _NOTHING) -> None:
        """Note that this worker begins to read a sample; without an index, that it has read it."""
        worker = get_worker_info()
        if worker is not None:
            self._reading[worker.id] = index

    def iterate(self, loader: DataLoader[Any], samples: Sequence[Any]) -> Iterator[Any]:
        """Iterate over what a loader returns.

        Args:
            loader: loads the data set.
            samples: what the noted indices are of.

        Raises:
            DataError: if a worker process ends, naming what the workers were reading.
        """
        try:
            with _errors_where_awaited():
                batches = iter(loader)
            yield from batches
        except (RuntimeError, ConnectionError, EOFError) as error:
            if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
                raise
            reason = error.__cause__ if isinstance(error.__cause__, RuntimeError) else error
            names = [
                sample_name(samples, index) for index in self._reading.tolist() if index != _NOTHING
            ]
            raise DataError(
                f"A worker process ended while {' or '.join(names) or 'no sample'} was read: "
                f"{str(reason).strip()} If it was killed, memory is short: set fewer "
                "num_workers or a lower prefetch_factor."
            ) from error


def sample_name(samples: Sequence[Any], index: int) -> str:
    """Return file and row of a sample, its index where they are unknown."""
    origin = getattr(samples, "origin", None)
    return f"sample {index}" if origin is None else ", ".join(map(str, origin(index)))


@contextmanager
def _errors_where_awaited() -> Iterator[None]:
    """Put back the handler of SIGCHLD that the start of worker processes replaces.

    torch's handler raises in whatever code runs when a worker ends, such as a training step. Without
    it the error is raised where the worker's batch is awaited, within seconds.
    """
    can_change = hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGCHLD) if can_change else None
    yield
    if can_change:
        is_of_torch = getattr(before, "__module__", "").startswith("torch.")
        signal.signal(signal.SIGCHLD, signal.SIG_DFL if is_of_torch or before is None else before)
