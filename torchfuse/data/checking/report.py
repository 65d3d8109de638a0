"""The report of a check: errors by file and row, lengths, images, and what packing would save."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from torchfuse.data.packing import FirstFit

__all__ = ["Report", "RowProblem"]

_LISTED: Final = 50  # rows of a file that are listed one by one, of each kind of problem as many
_VARIABLE: Final = re.compile(r"'[^']*'|\S*[\d/]\S*")  # what messages of one kind differ in
_SIZES: Final = 8  # sizes of images that are listed
_PERCENTILES: Final = (0, 5, 25, 50, 75, 95, 99, 100)
_BINS, _BAR = 12, 40
_BATCH: Final = 8  # rows of the padded batches that packs are compared with


@dataclass(frozen=True)
class RowProblem:
    """What is wrong with a row.

    Attributes:
        path: its file.
        row: its name in the file, such as ``"line 3"`` (from 1) or ``"row 2"`` (from 0).
        index: its index in the samples that were checked.
        message: all that is wrong with it.
    """

    path: Path
    row: str
    index: int
    message: str


@dataclass(frozen=True)
class Report:
    """What a check found; as a string it is a report of several lines.

    Attributes:
        num_rows: rows that were checked.
        errors: rows that cannot be used.
        too_long: rows that are longer than ``max_seq_len``.
        lengths: positions of the decoder that each row without errors takes, int ``[n]``.
        num_learned: tokens with a label in these rows.
        image_sizes: how many images have each width and height; an image counts once in each row.
        max_seq_len: the longest sequence of the transform; None: any.
    """

    num_rows: int
    errors: Sequence[RowProblem]
    too_long: Sequence[RowProblem]
    lengths: NDArray[np.int64]
    num_learned: int
    image_sizes: Mapping[tuple[int, int], int]
    max_seq_len: int | None

    @property
    def ok(self) -> bool:
        """Whether every row can be used."""
        return not self.errors and not self.too_long

    def __str__(self) -> str:
        parts = [
            [f"{self.num_rows:,} rows: {len(self.errors):,} errors, {len(self.too_long):,} too long"],
            [*_listed("errors", self.errors), *_listed("too long", self.too_long)],
            self._length_lines(),
            self._image_lines(),
            self._packing_lines(),
        ]
        return "\n\n".join("\n".join(part) for part in parts if part)

    def _length_lines(self) -> list[str]:
        if not self.lengths.size:
            return []
        total = int(self.lengths.sum())
        values = np.percentile(self.lengths, _PERCENTILES).astype(int)
        names = {0: "shortest", 50: "median", 100: "longest"}
        listed = [f"{names.get(p, f'{p} %')} {v:,}" for p, v in zip(_PERCENTILES, values, strict=True)]
        return [
            f"{total:,} tokens in rows without errors, {self.num_learned:,} of them learned "
            f"({self.num_learned / total:.1%})",
            f"tokens of a row: {', '.join(listed)}",
            *_histogram(self.lengths),
        ]

    def _image_lines(self) -> list[str]:
        if not self.image_sizes:
            return []
        by_count = sorted(self.image_sizes.items(), key=lambda item: (-item[1], item[0]))
        lines = [f"  {width} x {height}: {count:,}" for (width, height), count in by_count[:_SIZES]]
        if others := by_count[_SIZES:]:
            sides = [side for size, _ in others for side in size]
            count = sum(count for _, count in others)
            lines.append(
                f"  {len(others):,} other sizes, sides of {min(sides):,} to {max(sides):,}: {count:,}"
            )
        return [f"{sum(self.image_sizes.values()):,} images by width x height:", *lines]

    def _packing_lines(self) -> list[str]:
        lengths = self.lengths
        if self.max_seq_len is None or not lengths.size:
            return []
        lengths = lengths[lengths <= self.max_seq_len]
        total = int(lengths.sum())
        if not total:
            return []
        padded = sum(
            int(batch.max()) * len(batch)
            for batch in np.split(lengths, range(_BATCH, len(lengths), _BATCH))
        )
        packs = _num_packs(lengths, self.max_seq_len)
        return [
            f"packing: {len(lengths):,} rows fit into {packs:,} sequences of {self.max_seq_len:,} "
            f"positions, {total / (packs * self.max_seq_len):.1%} of them tokens; in batches of "
            f"{_BATCH} rows padded to the longest, {total / padded:.1%} are tokens"
        ]


def _num_packs(lengths: NDArray[np.int64], capacity: int) -> int:
    bins: FirstFit[None] = FirstFit(capacity)
    closed = sum(bins.add(None, length) is not None for length in lengths.tolist())
    while bins.pop() is not None:
        closed += 1
    return closed


def _listed(what: str, problems: Sequence[RowProblem]) -> Iterator[str]:
    for path, group in groupby(problems, key=lambda problem: problem.path):
        found = list(group)
        yield f"{path}: {len(found):,} {what}"
        by_kind: dict[str, list[RowProblem]] = {}
        for problem in found:
            by_kind.setdefault(_VARIABLE.sub("", problem.message), []).append(problem)
        if len(found) <= _LISTED or len(by_kind) > _LISTED:
            by_kind = {"": found}
        for rows in by_kind.values():
            count = _LISTED // len(by_kind)
            yield from (f"  {problem.row}: {problem.message}" for problem in rows[:count])
            if len(rows) > count:
                yield f"  and {len(rows) - count:,} more{' like these' * (len(by_kind) > 1)}"


def _histogram(lengths: NDArray[np.int64]) -> list[str]:
    """Return a line for each range of lengths; the ranges grow by one factor."""
    low, high = int(lengths.min()), int(lengths.max())
    edges = np.unique(np.geomspace(low, high + 1, _BINS + 1).round().astype(int))
    if len(edges) == 1:
        edges = np.append(edges, edges[-1] + 1)
    edges[-1] = high + 1
    counts, _ = np.histogram(lengths, edges)
    ranges = [f"{a:,} to {b - 1:,}" for a, b in pairwise(edges)]
    width = max(map(len, ranges))
    most = counts.max()
    return [
        f"  {name:>{width}} {'#' * -(-_BAR * count // most):<{_BAR}} {count:,}"
        for name, count in zip(ranges, counts, strict=True)
    ]
