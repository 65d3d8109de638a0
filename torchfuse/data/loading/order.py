"""The order of rows: a function of seed and epoch, in which a run can begin anywhere."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from torchfuse.data.loading.options import Encoder, LoaderOptions
from torchfuse.data.loading.rows import Row
from torchfuse.data.packing import FirstFit
from torchfuse.data.readers import Mixture

__all__ = ["Cursor", "RowOrder", "Window"]

WINDOW: Final = 1024  # samples that are packed together
_UNUSABLE: Final = -1  # length of a sample that cannot be read


@dataclass(frozen=True)
class Cursor:
    """Position in the data: all that is before it has been trained on.

    Attributes:
        epoch: passes over the data that are complete.
        window: windows of this epoch's order that are complete.
        row: rows of this window that are used.
    """

    epoch: int = 0
    window: int = 0
    row: int = 0

    @classmethod
    def after(cls, epoch: int, num_samples: int) -> Cursor:
        """Return the cursor after a number of samples of an epoch that are not packed."""
        return cls(epoch, *divmod(num_samples, WINDOW))

    def state(self) -> dict[str, int]:
        """Return the cursor as JSON values, of which ``Cursor(**state)`` is the inverse."""
        return asdict(self)


@dataclass
class _Lengths(Dataset[list[int]]):
    samples: Sequence[Any]
    transform: Encoder

    def __getitem__(self, indices: Sequence[int]) -> list[int]:
        return [self._length(index) for index in indices]

    def _length(self, index: int) -> int:
        try:
            return self.transform.length(self.samples[index])
        except Exception:  # it is raised again where the sample is used
            return _UNUSABLE


@dataclass(frozen=True)
class Window:
    """Rows of a part of an epoch's order, and how many of its samples are too long for any."""

    epoch: int
    number: int
    rows: list[Row]
    too_long: int = 0


class RowOrder:
    """The rows of all epochs, window by window.

    With ``packed``, windows of 1,024 samples of the order are packed one after the other, so that which
    samples share a row depends on seed and epoch alone.

    Args:
        samples: ``len()`` and ``[i]``, or a ``Mixture``, which has orders of its own.
        transform: tells the lengths of samples.
        options: seed, packing, workers.
    """

    def __init__(
        self, samples: Sequence[Any] | Mixture, transform: Encoder, options: LoaderOptions
    ) -> None:
        self.samples, self.transform, self.options = samples, transform, options

    def rows_per_epoch(self) -> int:
        if not self.options.packed:
            return len(self.samples)
        epoch, number, indices = next(self._orders(Cursor()))
        lengths = _Lengths(self.source, self.transform)[indices]
        rows = len(self._pack(epoch, number, indices, lengths).rows)
        return rows * len(self.samples) // max(len(indices), 1)

    def _orders(self, cursor: Cursor) -> Iterator[tuple[int, int, list[int]]]:
        """Iterate over epoch, number and samples of each window, without end."""
        epoch, first = cursor.epoch, cursor.window
        while True:
            for number, window in enumerate(self._order(epoch).split(WINDOW)):
                if number >= first:
                    yield epoch, number, window.tolist()
            epoch, first = epoch + 1, 0

    def _order(self, epoch: int) -> Tensor:
        if isinstance(self.samples, Mixture):
            return torch.from_numpy(self.samples.order(epoch))
        generator = torch.Generator().manual_seed(self.options.seed + epoch)
        return torch.randperm(len(self.samples), generator=generator)

    @property
    def source(self) -> Sequence[Any]:
        """What the indices of an order are of."""
        return self.samples.samples if isinstance(self.samples, Mixture) else self.samples

    def windows(self, cursor: Cursor) -> Iterator[Window]:
        if not self.options.packed:
            for epoch, number, indices in self._orders(cursor):
                yield Window(epoch, number, [(index,) for index in indices])
            return
        known: deque[tuple[int, int, list[int]]] = deque()

        def in_order() -> Iterator[list[int]]:
            for window in self._orders(cursor):
                known.append(window)
                yield window[2]

        lengths = DataLoader(
            _Lengths(self.source, self.transform),
            sampler=in_order(),
            batch_size=None,
            **self.options.workers(min(self.options.num_workers, 1)),
        )
        for of_window in lengths:
            yield self._pack(*known.popleft(), of_window)

    def _pack(self, epoch: int, number: int, indices: Sequence[int], lengths: Sequence[int]) -> Window:
        room, rows, too_long = self.options.max_seq_len, list[Row](), 0
        assert room is not None
        bins = FirstFit[int](room, max_open=len(indices))
        for index, length in zip(indices, lengths, strict=True):
            if length > room and self.options.too_long == "drop":
                too_long += 1
            elif length > room or length == _UNUSABLE:
                rows.append((index,))  # to be cut, or for its message
            elif (full := bins.add(index, length)) is not None:
                rows.append(tuple(full))
        while (left := bins.pop()) is not None:
            rows.append(tuple(left))
        return Window(epoch, number, rows, too_long)
