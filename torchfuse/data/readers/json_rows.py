"""Records of a JSON file, an array or an object a line, found by the offsets of their bytes.

The file is scanned once, which needs no JSON objects in memory: lines by their ends, the elements of an
array by quotes and brackets. A record is parsed, strictly, when it is read.
"""

from __future__ import annotations

import hashlib
import mmap
import re
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from torchfuse.errors import DataError
from torchfuse.io.strict_json import parse

__all__ = ["LINES", "JsonRows"]

LINES: Final = (".jsonl", ".ndjson")  # suffixes of files that are no array, whatever their first line is

_Bytes = NDArray[np.uint8]
_Offsets = NDArray[np.int64]

_CHUNK: Final = 1 << 24
_SPACE: Final = b" \t\r\n"
_BOM: Final = b"\xef\xbb\xbf"
_QUOTE, _BACKSLASH, _NEWLINE = b'"'[0], b"\\"[0], b"\n"[0]
_CLOSING: Final = b"]"[0]
_OPENING = np.isin(np.arange(256), list(b"{["))
_STRUCTURAL = np.isin(np.arange(256), list(b'"{[]}'))
# What may be between two objects: a comma, and elements that are no objects.
_SCALAR: Final = re.compile(rb'"(?:[^"\\]|\\.)*"|[^\s,"{}\[\]]+', re.DOTALL)
_GAP: Final = re.compile(rb"\s*,\s*(?:(?:%s)\s*,\s*)*" % _SCALAR.pattern, re.DOTALL)


class JsonRows:
    """The records of a JSON array or of JSON lines.

    Args:
        path: the file.

    Raises:
        DataError: if the file cannot be read, or is neither an array nor lines of objects.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        # None where no line is blank, and for an array.
        self._line_numbers: _Offsets | None = None
        try:
            with path.open("rb") as file:
                content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is empty"
            raise DataError(f"{path} cannot be read: {reason}.") from error
        self.digest = hashlib.sha256(content).hexdigest()
        start = len(_BOM) if content[: len(_BOM)] == _BOM else 0
        while content[start : start + 1] and content[start] in _SPACE:
            start += 1
        self._is_array = content[start : start + 1] == b"[" and path.suffix not in LINES
        data = np.frombuffer(content, np.uint8)
        if self._is_array:
            self._offsets = _array_offsets(data, content, start, self.path)
        else:
            self._offsets, self._line_numbers = _line_offsets(data, content, start)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def label(self, index: int) -> str:
        """Return the line of a record, from 1, or its row in the array, from 0."""
        if self._is_array:
            return f"row {index}"
        return f"line {index + 1 if self._line_numbers is None else self._line_numbers[index]}"

    def __getitem__(self, index: int) -> Any:
        start, end = map(int, self._offsets[index : index + 2])
        with self.path.open("rb", buffering=0) as file:
            file.seek(start)
            text = file.read(end - start)
        return parse(text.rstrip(_SPACE + b"," if self._is_array else _SPACE))


def _line_offsets(data: _Bytes, content: mmap.mmap, start: int) -> tuple[_Offsets, _Offsets | None]:
    """Return the starts of lines that are not blank and the end of the file; and the lines' numbers."""
    ends = [
        np.flatnonzero(data[at : at + _CHUNK] == _NEWLINE) + (at + 1)
        for at in range(start, len(data), _CHUNK)
    ]
    starts = np.concatenate([np.array([start]), *ends])
    starts = starts[starts < len(data)]
    bounds = np.append(starts, len(data))
    first = data[starts]
    candidates = np.flatnonzero(np.isin(first, list(_SPACE)))
    blank = [at for at in candidates if not content[bounds[at] : bounds[at + 1]].strip()]
    skipped = content[:start].count(b"\n")
    if not blank and not skipped:
        return bounds, None
    kept = np.delete(np.arange(len(starts)), blank)
    return np.append(starts[kept], len(data)), kept + (1 + skipped)


def _array_offsets(data: _Bytes, content: mmap.mmap, start: int, path: Path) -> _Offsets:
    """Return the starts of the elements of an array, and its end."""
    opened, closed, end = _brackets(data, start)
    if end is None:
        where = "without a closing bracket"
        if len(opened) > len(closed):
            where = f"within row {len(closed)}, which starts on line {_line(content, int(opened[-1]))}"
        raise DataError(f"{path} is no JSON array: it ends {where}.")
    if content[end + 1 :].strip():
        raise DataError(
            f"{path} is no JSON array: it goes on after the end of the array on line "
            f"{_line(content, end)}."
        )
    if content[end] != _CLOSING:
        raise DataError(f"{path} is no JSON array: it begins with [ and ends with }}.")
    # Between two objects is a comma. Before the first and after the last, one is added for the pattern.
    before = np.append(start + 1, closed + 1).tolist()
    after = np.append(opened, end).tolist()
    gaps = [content[a:b] for a, b in zip(before, after, strict=True)]
    if not opened.size and not gaps[0].strip():
        return np.array([end])
    gaps[0] = b"," + gaps[0]
    gaps[-1] += b","
    before[0] -= 1
    scalars = []
    for gap in set(gaps):
        if not _GAP.fullmatch(gap):
            at = gaps.index(gap)
            trails = at == len(opened) and gap[:-1].rstrip().endswith(b",")
            where = "no comma after the last row" if trails else f"a comma before row {at}"
            found = content[before[at] : after[at]][:40].decode(errors="replace")
            raise DataError(
                f"{path} is no JSON array: expected {where}, on line {_line(content, before[at])}, "
                f"got {found!r}."
            )
    if any(gap.strip(_SPACE) != b"," for gap in set(gaps)):
        for offset, gap in zip(before, gaps, strict=True):
            scalars += [offset + found.start() for found in _SCALAR.finditer(gap)]
    return np.append(np.sort(np.append(opened, np.array(scalars, np.int64))), end)


def _brackets(data: _Bytes, start: int) -> tuple[_Offsets, _Offsets, int | None]:
    """Return the brackets that open and close the elements of an array, and the one that ends it."""
    opened, closed = [], []
    level, in_string, at = 0, False, start
    while at < len(data):
        stop = min(at + _CHUNK, len(data))
        while stop < len(data) and data[stop - 1] == _BACKSLASH:
            stop += 1  # an escape sequence stays in one chunk
        chunk = data[at:stop]
        places = np.flatnonzero(_STRUCTURAL[chunk])
        places = np.delete(places, _escaped(chunk, places))
        values = chunk[places]
        is_quote = values == _QUOTE
        outside = (np.cumsum(is_quote) + in_string) % 2 == 0
        in_string = bool((is_quote.sum() + in_string) % 2)
        is_bracket = outside & ~is_quote
        opens = _OPENING[values[is_bracket]]
        levels = level + np.cumsum(np.where(opens, 1, -1))
        offsets = places[is_bracket] + at
        ends = np.flatnonzero(levels == 0)
        if ends.size:
            levels, opens, offsets = (array[: ends[0] + 1] for array in (levels, opens, offsets))
        opened.append(offsets[opens & (levels == 2)])
        closed.append(offsets[~opens & (levels == 1)])
        if ends.size:
            return np.concatenate(opened), np.concatenate(closed), int(offsets[-1])
        level, at = int(levels[-1]) if levels.size else level, stop
    return np.concatenate(opened), np.concatenate(closed), None


def _escaped(chunk: _Bytes, places: _Offsets) -> NDArray[np.intp]:
    """Return which places hold a quote after an odd number of backslashes."""
    # At place 0, -1 is the last byte of the chunk, which is no backslash.
    found = np.flatnonzero((chunk[places] == _QUOTE) & (chunk[places - 1] == _BACKSLASH))
    odd = np.ones(len(found), bool)
    left, length = np.arange(len(found)), 2
    while left.size:
        before = places[found[left]] - length
        left = left[(before >= 0) & (chunk[before] == _BACKSLASH)]
        odd[left] = ~odd[left]
        length += 1
    return found[odd]


def _line(content: mmap.mmap, offset: int) -> int:
    return content[:offset].count(b"\n") + 1
