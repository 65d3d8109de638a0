"""Every row of files of samples, as training would read it, on all cores."""

from __future__ import annotations

import copy
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Final

import numpy as np
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from torchfuse.data.checking.report import Report, RowProblem
from torchfuse.data.images import image_size
from torchfuse.data.readers import Samples, read_samples
from torchfuse.data.samples import Media
from torchfuse.data.sequences import IGNORED
from torchfuse.data.transform import SampleTransform
from torchfuse.data.truncate import sequence_length
from torchfuse.data.workers import WorkerWatch, sample_name
from torchfuse.errors import ConfigError, DataError

__all__ = ["check_samples"]

_BATCH: Final = 16  # rows of a message between processes
_FEW: Final = 256  # rows for which processes are not worth starting


@dataclass(frozen=True)
class _Row:
    """What is known of a row: problems, or length, tokens with labels and sizes of images."""

    problems: tuple[str, ...] = ()
    length: int = 0
    num_learned: int = 0
    sizes: tuple[tuple[int, int], ...] = ()


def check_samples(
    path: str | Path | Samples | Sequence[str | Path | Samples],
    *,
    transform: SampleTransform,
    workers: int | None = None,
    format: str = "auto",
    image_root: str | Path | None = None,
) -> Report:
    """Read and transform every row of files of samples, and open every image.

    Args:
        path: files, or samples that are opened already.
        transform: the transform of the training. Its ``max_seq_len`` applies.
        workers: processes. None: one for each core, or none if there are few rows.
        format: of the files, see ``read_samples``.
        image_root: of the files, see ``read_samples``.

    Returns:
        All errors by file and row, and statistics; ``print`` it.

    Raises:
        DataError: if a file cannot be opened at all, or its format is unknown.
        ConfigError: if ``format`` is unknown, ``workers`` is below 0, or a package that reads the file
            is not installed.
    """
    given = [path] if isinstance(path, str | Path | Samples) else path
    samples = Samples.concatenate(
        [
            each
            if isinstance(each, Samples)
            else read_samples(each, format=format, image_root=image_root)
            for each in given
        ]
    )
    if workers is not None and workers < 0:
        raise ConfigError(f"workers must be at least 0, got {workers}.")
    if workers is None:
        workers = 0 if len(samples) < _FEW else _num_cores()
    limit = transform.max_seq_len
    unlimited = copy.copy(transform)
    unlimited.max_seq_len = None  # so that rows that are too long have a length
    watch = WorkerWatch(workers)
    batches = DataLoader(
        _Rows(samples, unlimited, watch), batch_size=_BATCH, num_workers=workers, collate_fn=list
    )
    rows = tqdm(
        chain.from_iterable(watch.iterate(batches, samples)),
        "check",
        len(samples),
        unit="row",
        disable=None,
    )
    return _report(samples, rows, limit)


def _report(samples: Samples, rows: Iterable[_Row], limit: int | None) -> Report:
    errors, too_long, lengths, num_learned = [], [], [], 0
    sizes: Counter[tuple[int, int]] = Counter()
    for index, row in enumerate(rows):
        path, name = samples.origin(index)
        if row.problems:
            errors.append(RowProblem(path, name, index, "; ".join(row.problems)))
            continue
        lengths.append(row.length)
        num_learned += row.num_learned
        sizes.update(row.sizes)
        if limit is not None and row.length > limit:
            message = f"{row.length:,} tokens long, and max_seq_len is {limit:,}"
            too_long.append(RowProblem(path, name, index, message))
    return Report(len(samples), errors, too_long, np.array(lengths, np.int64), num_learned, sizes, limit)


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Rows(Dataset[_Row]):
    """The check of each row."""

    def __init__(self, samples: Samples, transform: SampleTransform, watch: WorkerWatch) -> None:
        self._samples, self._transform, self._watch = samples, transform, watch

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> _Row:
        self._watch.note(index)
        origin = sample_name(self._samples, index)
        try:
            sample = self._samples[index]
        except DataError as error:
            return _Row((_message(error, origin),))
        try:
            encoded = self._transform(sample)
            sizes = [image_size(image)[::-1] for image in sample.images]
        except Exception as error:  # whatever it is, training would stop at this row
            found = self._media_problems(sample.media) or [_message(error, origin)]
            return _Row(tuple(dict.fromkeys(found)))
        prefix = self._transform.layout == "prefix"
        learned = sum(label != IGNORED for label in encoded["labels"][1:])
        return _Row((), sequence_length(encoded, prefix=prefix), int(learned), tuple(sizes))

    def _media_problems(self, media: Sequence[Media]) -> list[str]:
        """Return what is wrong with each of the media, of which the transform named the first."""
        problems: list[str] = []
        for each in media:
            try:
                self._transform.media_input(each)
            except Exception as error:
                problems.append(_message(error, ""))
        return problems


def _message(error: Exception, origin: str) -> str:
    """Return the message of an error, without file and row."""
    text = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    return text.removeprefix(origin).lstrip(":, ").rstrip(".")
