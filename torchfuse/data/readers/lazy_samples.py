"""Samples that are read when they are asked for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, overload

import numpy as np
from numpy.typing import NDArray

from torchfuse.data.readers.formats import FORMATS, matching_formats
from torchfuse.data.samples import Sample
from torchfuse.errors import DataError

__all__ = ["Rows", "Samples", "Table"]


class Rows(Protocol):
    """The records of a file.

    Attributes:
        path: the file.
        digest: changes with the content of the file.
    """

    path: Path
    digest: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any:
        """Return a record; ValueError if it cannot be read."""

    def label(self, index: int) -> str:
        """Return a row's name for messages."""


@dataclass(frozen=True)
class Table:
    """The samples of a file.

    Attributes:
        rows: its records.
        format: the name of their format.
        root: where relative paths of media begin.
        is_detected: whether the format was detected, so that a record must not have fields of another.
    """

    rows: Rows
    format: str
    root: Path
    is_detected: bool

    def __len__(self) -> int:
        return len(self.rows)

    def origin(self, index: int) -> str:
        """Return file and row."""
        return f"{self.rows.path}, {self.rows.label(index)}"

    def __getitem__(self, index: int) -> Sample:
        origin = self.origin(index)
        try:
            record = self.rows[index]
            if not isinstance(record, Mapping):
                raise DataError(f"expected a JSON object, got a {type(record).__name__}")
            if self.is_detected and len(found := matching_formats(record)) > 1:
                raise DataError(
                    f"the record has fields of the formats {' and '.join(found)}; remove those of one, "
                    "or name the format"
                )
            return FORMATS[self.format].read(record, self.root, origin)
        except json.JSONDecodeError as error:
            raise DataError(f"{origin}: no JSON ({error}).") from error
        except (ValueError, RecursionError, OSError) as error:
            raise DataError(f"{origin}: {str(error).rstrip('.')}.") from error


class Samples(Sequence[Sample]):
    """Samples of one or more files, each read from its file when it is indexed.

    A slice is another ``Samples`` of the same files. Samples can be pickled.

    Attributes:
        tables: the files.
    """

    def __init__(self, tables: Sequence[Table], index: range | NDArray[np.int64] | None = None) -> None:
        self.tables = tuple(tables)
        self._ends = np.cumsum([len(table) for table in tables], dtype=np.int64)
        self._index = range(int(self._ends[-1]) if tables else 0) if index is None else index

    @classmethod
    def concatenate(cls, parts: Sequence[Samples]) -> Samples:
        """Return the samples of all parts, one part after another."""
        tables = [table for part in parts for table in part.tables]
        if all(part._is_whole for part in parts):
            return cls(tables)
        sizes = [int(part._ends[-1]) if part.tables else 0 for part in parts]
        starts = np.cumsum([0, *sizes])
        index = [
            np.asarray(part._index, np.int64) + start for part, start in zip(parts, starts, strict=False)
        ]
        return cls(tables, np.concatenate(index))

    def select(self, indices: NDArray[np.int64]) -> Samples:
        """Return the samples of given indices, in their order."""
        if isinstance(self._index, range):
            if indices.size and not (indices.min() >= 0 and indices.max() < len(self)):
                raise IndexError(f"indices must be from 0 to {len(self) - 1}")
            return Samples(self.tables, self._index.start + indices * self._index.step)
        return Samples(self.tables, self._index[indices])

    @property
    def _is_whole(self) -> bool:
        return isinstance(self._index, range) and self._index == range(sum(map(len, self.tables)))

    @property
    def digest(self) -> str:
        """A digest of the files' contents, of their formats and of which rows these samples are.

        It does not depend on the files' names. Of JSON files every byte counts; of large Parquet, Arrow
        and tar files the size and 1,024 blocks.
        """
        parts = [f"{table.rows.digest} {table.format}" for table in self.tables]
        digest = hashlib.sha256("\n".join(parts).encode())
        if not self._is_whole:
            digest.update(np.ascontiguousarray(self._index, np.int64).tobytes())
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self._index)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> Samples: ...

    def __getitem__(self, index: int | slice) -> Sample | Samples:
        if isinstance(index, slice):
            return Samples(self.tables, self._index[index])
        table, row = self._find(index)
        return table[row]

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))

    def origin(self, index: int) -> tuple[Path, str]:
        """Return the file and the row of a sample, without reading it.

        The row is a line from 1 (``"line 1"``), or a row from 0 (``"row 0"``) where there are no lines.
        """
        table, row = self._find(index)
        return table.rows.path, table.rows.label(row)

    def _find(self, index: int) -> tuple[Table, int]:
        row = int(self._index[index])
        number = int(np.searchsorted(self._ends, row, side="right"))
        return self.tables[number], row - (int(self._ends[number - 1]) if number else 0)

    def __repr__(self) -> str:
        files = ", ".join(f"{table.rows.path} ({table.format})" for table in self.tables[:3])
        more = f" and {len(self.tables) - 3} more" if len(self.tables) > 3 else ""
        return f"Samples({len(self)} of {files}{more})"
