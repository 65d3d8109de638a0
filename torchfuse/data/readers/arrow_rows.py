"""Records of Parquet and Arrow files, a group of rows at a time.

The last group is kept, so that rows in their order are read once. Row groups of a Parquet file that are
too large to be read for one row (by default, ``pyarrow`` and ``pandas`` write a million rows in one) are
rewritten in small ones to a temporary Arrow file, which is removed when the process ends.
"""

from __future__ import annotations

import atexit
import hashlib
import shutil
import tempfile
from abc import abstractmethod
from pathlib import Path
from typing import Any, Final

import numpy as np

from torchfuse.errors import ConfigError, DataError

__all__ = ["ArrowFileRows", "ArrowStreamRows", "GroupedRows", "ParquetRows", "file_digest"]

_LARGE: Final = 1 << 26  # bytes of a row group that are too many to read for one row
_GROUP: Final = 256  # rows
_BLOCKS, _BLOCK = 1024, 1 << 16


def file_digest(path: Path) -> str:
    """Return a digest of the size of a file and of its bytes, of large files in 1,024 blocks of 64 kB.

    The blocks are spread evenly, from the first bytes to the last.
    """
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb", buffering=0) as file:
        if size <= _BLOCKS * _BLOCK:
            digest.update(file.read())
        else:
            for offset in np.linspace(0, size - _BLOCK, _BLOCKS).astype(np.int64).tolist():
                file.seek(offset)
                digest.update(file.read(_BLOCK))
    return digest.hexdigest()


class GroupedRows:
    """Rows of a table file that is read in groups.

    Args:
        path: the file.

    Raises:
        ConfigError: if ``pyarrow`` is not installed.
        DataError: if the file cannot be read, or has a column twice.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            import pyarrow
        except ImportError as error:
            raise ConfigError(
                f"{path} is read with pyarrow, which is not installed: pip install 'torchfuse[data]'."
            ) from error
        self._group: tuple[int, Any] = (-1, None)
        try:
            lengths, names = self._open()
            self.digest = file_digest(path)
        except (OSError, UnicodeError, pyarrow.ArrowException) as error:
            raise DataError(f"{path} cannot be read: {error}.") from error
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise DataError(f"{path} has the column {', '.join(twice)} twice.")
        self._ends = np.cumsum(lengths, dtype=np.int64)

    @abstractmethod
    def _open(self) -> tuple[list[int], list[str]]:
        """Return the number of rows of each group, and the names of columns."""

    @abstractmethod
    def _read(self, group: int) -> Any:
        """Return a group: a ``pyarrow`` table or record batch."""

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_group": (-1, None)}

    def __len__(self) -> int:
        return int(self._ends[-1]) if self._ends.size else 0

    def label(self, index: int) -> str:
        """Return the number of a row, from 0."""
        return f"row {index}"

    def __getitem__(self, index: int) -> dict[str, Any]:
        import pyarrow

        group = int(np.searchsorted(self._ends, index, side="right"))
        start = int(self._ends[group - 1]) if group else 0
        try:
            if self._group[0] != group:
                self._group = (-1, None)  # not two groups at once
                self._group = (group, self._read(group))
            return self._group[1].slice(index - start, 1).to_pylist()[0]
        except pyarrow.ArrowException as error:  # not all of them are ValueErrors
            raise DataError(str(error)) from error


class ParquetRows(GroupedRows):
    """Rows of a Parquet file."""

    def _open(self) -> tuple[list[int], list[str]]:
        from pyarrow import parquet

        self._small: ArrowFileRows | None = None
        self._metadata = parquet.read_metadata(self.path)
        groups = [self._metadata.row_group(group) for group in range(self._metadata.num_row_groups)]
        names = self._metadata.schema.to_arrow_schema().names
        if any(group.total_byte_size > _LARGE and group.num_rows > _GROUP for group in groups):
            self._small = ArrowFileRows(_rewrite(self.path))
            return np.diff(self._small._ends, prepend=0).tolist(), names
        return [group.num_rows for group in groups], names

    def _read(self, group: int) -> Any:
        from pyarrow import parquet

        if self._small is not None:
            return self._small.batch(group)
        with parquet.ParquetFile(self.path, metadata=self._metadata) as file:
            return file.read_row_group(group, use_threads=False)


def _rewrite(path: Path) -> Path:
    """Write a Parquet file in small groups to a temporary Arrow file."""
    import pyarrow
    from pyarrow import parquet

    folder = tempfile.mkdtemp(prefix="torchfuse-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    result = Path(folder, path.name).with_suffix(".arrow")
    with (
        parquet.ParquetFile(path, pre_buffer=False) as file,
        pyarrow.OSFile(str(result), "wb") as sink,
        pyarrow.ipc.new_file(sink, file.schema_arrow) as writer,
    ):
        for batch in file.iter_batches(_GROUP, use_threads=False):
            writer.write_batch(batch)
    return result


class ArrowFileRows(GroupedRows):
    """Rows of an Arrow IPC file (Feather)."""

    def _open(self) -> tuple[list[int], list[str]]:
        import pyarrow

        with pyarrow.memory_map(str(self.path)) as source, pyarrow.ipc.open_file(source) as reader:
            groups = range(reader.num_record_batches)
            return [reader.get_batch(group).num_rows for group in groups], reader.schema.names

    def _read(self, group: int) -> Any:
        batch = self.batch(group)
        batch.validate(full=True)  # pyarrow reads out of bounds in a damaged batch
        return batch

    def batch(self, group: int) -> Any:
        """Return the record batch of a group, which is not validated."""
        import pyarrow

        with pyarrow.OSFile(str(self.path)) as source, pyarrow.ipc.open_file(source) as reader:
            return reader.get_batch(group)


class ArrowStreamRows(GroupedRows):
    """Rows of an Arrow IPC stream, which ``datasets`` writes; the file is mapped into memory."""

    _batches: list[Any] | None
    _valid: set[int]

    def _open(self) -> tuple[list[int], list[str]]:
        import pyarrow

        with pyarrow.ipc.open_stream(pyarrow.memory_map(str(self.path))) as reader:
            self._batches, self._valid = list(reader), set()
            return [batch.num_rows for batch in self._batches], reader.schema.names

    def _read(self, group: int) -> Any:
        if self._batches is None:
            self._open()
        assert self._batches is not None
        batch = self._batches[group]
        if group not in self._valid:
            batch.validate(full=True)
            self._valid.add(group)
        return batch

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_batches": None}
