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
from dataclasses import replace
from itertools import islice
from typing import Any

from torch.utils.data import DataLoader

from torchfuse.data.loading.options import Encoder, LoaderOptions
from torchfuse.data.loading.order import Cursor, RowOrder
from torchfuse.data.loading.rows import Batch, Collate, Row, Rows
from torchfuse.data.readers import Mixture
from torchfuse.data.workers import WorkerWatch
from torchfuse.errors import ConfigError, DataError

__all__ = ["StepLoader"]


class StepLoader:
    """The batches of every optimizer step.

    With ``packed``, every rank computes the lengths of all samples in a process of its own, and opens
    the images of its own rows only; see ``RowOrder``.

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
        steps_per_epoch: steps of one pass over the samples.
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
        longest = transform.max_seq_len
        options = replace(options, max_seq_len=options.max_seq_len or longest)
        problems = options.problems()
        if longest is not None and (options.max_seq_len or 0) > longest:
            problems.append(f"max_seq_len={options.max_seq_len} is more than the transform's, {longest}")
        if problems:
            raise ConfigError(f"Loading: {'; '.join(problems)}.")
        self.samples, self.options = samples, options
        self.transform = copy(transform)
        # A transform refuses what is too long; here that is dropped or cut.
        self.transform.max_seq_len = options.max_seq_len if options.too_long == "error" else None
        self._order = RowOrder(samples, self.transform, options)
        self._world_size, self._rank = world_size, rank
        self._rows_per_step = world_size * options.batch_size * options.batches_per_step
        self.skipped: list[str] = []
        self.too_long = 0
        rows = self._order.rows_per_epoch()
        self.steps_per_epoch = rows // self._rows_per_step
        self.num_steps = self.steps_per_epoch * options.epochs
        if options.max_steps is not None:
            self.num_steps = min(self.num_steps, options.max_steps)
        if not self.num_steps:
            raise DataError(
                f"{len(samples)} samples ({rows} rows) are too few for one step of {world_size} x "
                f"{options.batch_size} x {options.batches_per_step} rows (ranks x batch size x "
                "batches). Give smaller batches, or fewer of them a step."
            )

    def steps(self, cursor: Cursor | None = None) -> Iterator[tuple[list[Batch], Cursor]]:
        """Iterate over steps without end; nothing before the cursor is read.

        Args:
            cursor: where to begin; the start of the data unless given.

        Yields:
            The batches of a step, as the collator makes them, and the cursor after it.

        Raises:
            DataError: for a sample that cannot be used, unless such samples are skipped, and if a worker
                process ends.
        """
        ends: deque[tuple[Cursor, int]] = deque()
        watch = WorkerWatch(self.options.num_workers)
        rows = Rows(self._order.source, self.transform, self.options, watch)
        loader = DataLoader(
            rows,
            batch_sampler=self._batches(cursor or Cursor(), ends),
            collate_fn=Collate(self.transform.pad_id),
            pin_memory=self.options.pin_memory,
            **self.options.workers(self.options.num_workers),
        )
        batches = watch.iterate(loader, rows.samples)
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
        return Cursor.after(epoch, steps * self._rows_per_step)

    def _batches(self, cursor: Cursor, ends: deque[tuple[Cursor, int]]) -> Iterator[list[Row]]:
        """Iterate over the rows of each of this rank's batches, and note where each step ends."""
        step: list[Row] = []
        size, too_long, skip = self.options.batch_size * self._world_size, 0, cursor.row
        for window in self._order.windows(cursor):
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
