"""Batches of every optimizer step, read by worker processes, in an order that can be resumed anywhere.

The order of the samples is a function of seed and epoch: ranks and workers share it, and a step has the
same samples whatever their number. Where a run is in it is three integers, a ``Cursor``. torchdata's
``StatefulDataLoader`` saves the state of each worker instead, which binds a resumed run to the number of
workers and ranks that it was started with.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any, Final, Literal, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from torchfuse.data.collate import padded_collate_images
from torchfuse.data.documents import ImageLayout
from torchfuse.data.packing import FirstFit, TooLong, pack
from torchfuse.data.readers import Mixture
from torchfuse.data.truncate import cut_between_turns, sequence_length
from torchfuse.errors import ConfigError, DataError

__all__ = ["Cursor", "Encoder", "LoaderOptions", "StepLoader"]

Batch = dict[str, Any]
Row = tuple[int, ...]  # samples that share a sequence

_WINDOW: Final = 1024  # samples that are packed together
_UNUSABLE: Final = -1  # length of a sample that cannot be read


class Encoder(Protocol):
    """Turn a sample into a sequence; ``SampleTransform`` is one."""

    pad_id: int
    layout: ImageLayout
    max_seq_len: int | None
    image_token: int | None

    def __call__(self, sample: Any) -> dict[str, Any]:
        """Return the sequence, as the collator takes it."""

    def length(self, sample: Any) -> int:
        """Return the positions that a sample takes, without opening images."""


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

    def state(self) -> dict[str, int]:
        """Return the cursor as JSON values, of which ``Cursor(**state)`` is the inverse."""
        return asdict(self)


@dataclass(frozen=True)
class LoaderOptions:
    """How samples become batches.

    Attributes:
        batch_size: rows of a batch on each rank.
        batches_per_step: batches whose gradients are accumulated.
        epochs: passes over the samples; each drops the rows after its last whole step.
        max_steps: the most steps.
        max_seq_len: length of packed rows, and of the longest sample that is used whole. None: the
            transform's.
        packed: whether several samples share a row.
        too_long: what happens to a longer sample, see ``pack``.
        bad_samples: what happens to a sample that cannot be used: ``"error"``, or ``"skip"``: it is left
            out, and listed in ``StepLoader.skipped``.
        num_workers: processes that read samples; 0: this one does.
        prefetch_factor: batches that each worker reads ahead.
        start_method: how workers start: ``"fork"``, ``"spawn"``, ``"forkserver"``; None: as Python does.
        pin_memory: whether batches are in pinned memory, for a faster copy to a GPU.
        seed: of the order.
    """

    batch_size: int = 1
    batches_per_step: int = 1
    epochs: int = 1
    max_steps: int | None = None
    max_seq_len: int | None = None
    packed: bool = False
    too_long: TooLong = "drop"
    bad_samples: Literal["error", "skip"] = "error"
    num_workers: int = 0
    prefetch_factor: int = 2
    start_method: str | None = None
    pin_memory: bool = False
    seed: int = 0

    def problems(self) -> list[str]:
        """Return what is out of range."""
        least = {"batch_size": 1, "batches_per_step": 1, "epochs": 1, "num_workers": 0, "max_steps": 1}
        least |= {"prefetch_factor": 1, "max_seq_len": 1}
        given = {name: getattr(self, name) for name in least}
        problems = [
            f"{name}={value} must be at least {least[name]}"
            for name, value in given.items()
            if value is not None and value < least[name]
        ]
        if self.packed and self.max_seq_len is None:
            problems.append("packed=True needs max_seq_len, the length of packed rows")
        if self.bad_samples not in ("error", "skip"):
            problems.append(f'bad_samples must be "error" or "skip", got {self.bad_samples!r}')
        methods = torch.multiprocessing.get_all_start_methods()
        if self.start_method not in (None, *methods):
            problems.append(f"start_method must be {', '.join(methods)}, got {self.start_method!r}")
        return problems


@dataclass
class _Rows(Dataset[dict[str, Any]]):
    """Rows by the indices of their samples.

    What cannot be used is returned as text, not raised: the error of a worker would reach the user with
    the worker's traceback in its message.
    """

    samples: Sequence[Any]
    transform: Encoder
    options: LoaderOptions

    def __getitem__(self, row: Row) -> dict[str, Any]:
        documents: list[dict[str, Any]] = []
        result: dict[str, Any] = {"bad": [], "too_long": 0}
        for index in row:
            try:
                document = self._fit(self.transform(self.samples[index]))
            except DataError as error:
                result["bad"].append(str(error))
            else:
                result["too_long"] += document is None
                documents += [] if document is None else [document]
        if not documents:
            documents.append(_nothing_to_learn(self.transform.pad_id))
        if self.options.packed:
            assert self.options.max_seq_len is not None
            layout, pad_id = self.transform.layout, self.transform.pad_id
            packs = pack(documents, self.options.max_seq_len, layout=layout, padding_idx=pad_id)
            (documents,) = ([each] for each in packs)
        return {**documents[0], **result}

    def _fit(self, document: dict[str, Any]) -> dict[str, Any] | None:
        """Return a document that is not too long, or None."""
        room, prefix = self.options.max_seq_len, self.transform.layout == "prefix"
        if room is None or sequence_length(document, prefix=prefix) <= room:
            return document
        if self.options.too_long == "drop":
            return None
        return cut_between_turns(document, room, prefix=prefix)


def _nothing_to_learn(pad_id: int) -> dict[str, Any]:
    """Return a document for a row without any, so that every rank has a batch."""
    return {
        "tokens": [pad_id],
        "labels": [-100],
        "images": torch.empty(0, 3, 1, 1),
        "encoder_mask": torch.empty(1, 0, dtype=torch.bool),
    }


@dataclass
class _Lengths(Dataset[list[int]]):
    samples: Sequence[Any]
    transform: Encoder

    def __getitem__(self, indices: Sequence[int]) -> list[int]:
        return [self._length(index) for index in indices]

    def _length(self, index: int) -> int:
        try:
            return self.transform.length(self.samples[index])
        except DataError:
            return _UNUSABLE


@dataclass
class _Collate:
    pad_id: int

    def __call__(self, rows: list[dict[str, Any]]) -> Batch:
        bad = [message for row in rows for message in row.pop("bad")]
        too_long = sum(row.pop("too_long") for row in rows)
        return {**padded_collate_images(rows, self.pad_id), "bad": bad, "too_long": too_long}


@dataclass(frozen=True)
class _Window:
    """Rows of a part of an epoch's order, and how many of its samples are too long for any."""

    epoch: int
    number: int
    rows: list[Row]
    too_long: int = 0


class StepLoader:
    """The batches of every optimizer step.

    With ``packed``, windows of 1,024 samples of the order are packed one after the other, so that which
    samples share a row depends on seed and epoch alone. Every rank computes the lengths of all samples
    in a process of its own, and opens the images of its own rows only.

    Args:
        samples: ``len()`` and ``[i]``, or a ``Mixture``, which has orders of its own; they have to be
            picklable for workers that are not forked.
        transform: turns a sample into a sequence.
        options: sizes, order, workers.
        world_size: how many ranks share a step, with equally many rows each.
        rank: this process's.

    Attributes:
        num_steps: steps of the whole run. With ``packed``, how many rows an epoch has is estimated from
            its first window, and exact where there is only one.
        skipped: a message for each sample of this rank that was left out because it cannot be used.
        too_long: how many samples were left out because they are too long; with ``packed`` those of all
            ranks are counted on rank 0.

    Raises:
        ConfigError: naming everything in the options that is out of range.
        DataError: if the samples are too few for one step.
    """

    def __init__(
        self,
        samples: Sequence[Any] | Mixture,
        transform: Encoder,
        options: LoaderOptions,
        *,
        world_size: int = 1,
        rank: int = 0,
    ) -> None:
        options = replace(options, max_seq_len=options.max_seq_len or transform.max_seq_len)
        if problems := options.problems():
            raise ConfigError(f"Loading: {'; '.join(problems)}.")
        self.samples, self.options = samples, options
        self.transform = copy(transform)
        # A transform refuses what is too long; here that is dropped or cut.
        self.transform.max_seq_len = options.max_seq_len if options.too_long == "error" else None
        self._world_size, self._rank = world_size, rank
        self._rows_per_step = world_size * options.batch_size * options.batches_per_step
        self.skipped: list[str] = []
        self.too_long = 0
        rows = self._rows_per_epoch()
        self.num_steps = rows // self._rows_per_step * options.epochs
        if options.max_steps is not None:
            self.num_steps = min(self.num_steps, options.max_steps)
        if not self.num_steps:
            raise DataError(
                f"{len(samples)} samples ({rows} rows) are too few for one step of {world_size} x "
                f"{options.batch_size} x {options.batches_per_step} rows."
            )

    def steps(self, cursor: Cursor | None = None) -> Iterator[tuple[list[Batch], Cursor]]:
        """Iterate over steps without end; nothing before the cursor is read.

        Args:
            cursor: where to begin; the start of the data unless given.

        Yields:
            The batches of a step, as the collator makes them, and the cursor after it.

        Raises:
            DataError: for a sample that cannot be used, unless such samples are skipped.
        """
        ends: deque[tuple[Cursor, int]] = deque()
        loader = DataLoader(
            _Rows(self._source, self.transform, self.options),
            batch_sampler=self._batches(cursor or Cursor(), ends),
            collate_fn=_Collate(self.transform.pad_id),
            pin_memory=self.options.pin_memory,
            **self._workers(self.options.num_workers),
        )
        batches = iter(loader)
        while step := list(islice(batches, self.options.batches_per_step)):
            end, too_long = ends.popleft()
            # Every rank packs all samples.
            self.too_long += sum(batch.pop("too_long") for batch in step)
            self.too_long += 0 if self._rank else too_long
            bad = [message for batch in step for message in batch.pop("bad")]
            if bad and self.options.bad_samples == "error":
                raise DataError("\n  ".join(bad))
            self.skipped += bad
            yield step, end

    def cursor_of_step(self, step: int) -> Cursor:
        """Return the cursor after a number of steps of rows that are not packed."""
        epoch, steps = divmod(step, len(self.samples) // self._rows_per_step)
        window, row = divmod(steps * self._rows_per_step, _WINDOW)
        return Cursor(epoch, window, row)

    def _rows_per_epoch(self) -> int:
        if not self.options.packed:
            return len(self.samples)
        epoch, number, indices = next(self._orders(Cursor()))
        lengths = _Lengths(self._source, self.transform)[indices]
        rows = len(self._pack(epoch, number, indices, lengths).rows)
        return rows * len(self.samples) // max(len(indices), 1)

    def _orders(self, cursor: Cursor) -> Iterator[tuple[int, int, list[int]]]:
        """Iterate over epoch, number and samples of each window, without end."""
        epoch, first = cursor.epoch, cursor.window
        while True:
            for number, window in enumerate(self._order(epoch).split(_WINDOW)):
                if number >= first:
                    yield epoch, number, window.tolist()
            epoch, first = epoch + 1, 0

    def _order(self, epoch: int) -> Tensor:
        if isinstance(self.samples, Mixture):
            return torch.from_numpy(self.samples.order(epoch))
        generator = torch.Generator().manual_seed(self.options.seed + epoch)
        return torch.randperm(len(self.samples), generator=generator)

    @property
    def _source(self) -> Sequence[Any]:
        """What the indices of an order are of."""
        return self.samples.samples if isinstance(self.samples, Mixture) else self.samples

    def _windows(self, cursor: Cursor) -> Iterator[_Window]:
        if not self.options.packed:
            for epoch, number, indices in self._orders(cursor):
                yield _Window(epoch, number, [(index,) for index in indices])
            return
        known: deque[tuple[int, int, list[int]]] = deque()

        def in_order() -> Iterator[list[int]]:
            for window in self._orders(cursor):
                known.append(window)
                yield window[2]

        lengths = DataLoader(
            _Lengths(self._source, self.transform),
            sampler=in_order(),
            batch_size=None,
            **self._workers(min(self.options.num_workers, 1)),
        )
        for of_window in lengths:
            yield self._pack(*known.popleft(), of_window)

    def _pack(self, epoch: int, number: int, indices: Sequence[int], lengths: Sequence[int]) -> _Window:
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
        return _Window(epoch, number, rows, too_long)

    def _batches(self, cursor: Cursor, ends: deque[tuple[Cursor, int]]) -> Iterator[list[Row]]:
        """Iterate over the rows of each of this rank's batches, and note where each step ends."""
        step: list[Row] = []
        size, too_long, skip = self.options.batch_size * self._world_size, 0, cursor.row
        for window in self._windows(cursor):
            if window.number == 0 and window.epoch > cursor.epoch:
                step = []  # what is left of an epoch is too little for a step
            too_long += 0 if skip else window.too_long
            for row, samples in enumerate(window.rows):
                if row < skip:
                    continue
                step.append(samples)
                if len(step) == self._rows_per_step:
                    ends.append((Cursor(window.epoch, window.number, row + 1), too_long))
                    for start in range(0, len(step), size):
                        yield step[start : start + size][self._rank :: self._world_size]
                    step, too_long = [], 0
            skip = 0

    def _workers(self, number: int) -> dict[str, Any]:
        if not number:
            return {}
        return {
            "num_workers": number,
            "prefetch_factor": self.options.prefetch_factor,
            "multiprocessing_context": self.options.start_method,
        }
