"""Samples of a tar shard, as webdataset and Energon write them.

Members that follow each other and share a name up to its first dot are one sample: ``000.jpg`` and
``000.json``, or ``000.txt`` with a caption. Only headers are read, once, for the offsets of samples.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Final

import numpy as np

from torchfuse.data.readers.arrow_rows import file_digest
from torchfuse.data.readers.media_fields import MODALITIES
from torchfuse.data.samples import Media
from torchfuse.errors import DataError
from torchfuse.io.strict_json import parse

__all__ = ["TarRows"]

_SUFFIXES: Final = {
    "image": "jpg jpeg jfif png apng webp gif bmp tif tiff ppm pgm jp2 avif heic heif svg",
    "video": "mp4 m4v mov avi mkv webm mpg mpeg",
    "audio": "wav flac mp3 ogg opus m4a aac",
}
_PART_FIELDS: Final = ("url", "path", *(f"{m}{end}" for m in MODALITIES for end in ("", "_url")))
_BLOCK: Final = 1 << 20
_MODALITY: Final = {
    suffix: modality for modality, suffixes in _SUFFIXES.items() for suffix in suffixes.split()
}


class TarRows:
    """The samples of a tar file, as records.

    The record is the content of ``.json``, or a ``caption`` from ``.txt``. Names of media in it are
    those of members; where it names none, all media members are its media.

    Args:
        path: the file, not compressed.

    Raises:
        DataError: if the file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        starts, key = [], None
        try:
            self.digest = file_digest(path)
            with path.open("rb") as file:
                for member in _members(file):
                    if _key(member.name) != key:
                        key = _key(member.name)
                        starts.append(member.offset)
        except (OSError, tarfile.TarError) as error:
            raise DataError(f"{path} cannot be read as a tar file: {error}.") from error
        self._offsets = np.array([*starts, path.stat().st_size], np.int64)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def label(self, index: int) -> str:
        """Return the number of a sample, from 0."""
        return f"row {index}"

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            return self._record(*map(int, self._offsets[index : index + 2]))
        except tarfile.TarError as error:
            raise DataError(f"the sample cannot be read ({error})") from error

    def _record(self, start: int, end: int) -> dict[str, Any]:
        media: dict[str, Media] = {}
        texts: dict[str, bytes] = {}
        with self.path.open("rb") as file:
            file.seek(start)
            for member in _members(file, end):
                if not member.isreg() or member.issparse():
                    raise DataError(f"the member {member.name} is a link or no regular file")
                suffix = member.name.rpartition(".")[2].lower()
                if suffix in _MODALITY:
                    span, name = (member.offset_data, member.size), f"{self.path}/{member.name}"
                    media[member.name] = Media(self.path, None, span, name, _MODALITY[suffix])
                elif suffix in ("json", "txt"):
                    if suffix in texts:
                        raise DataError(f"the sample has two .{suffix} members")
                    file.seek(member.offset_data)
                    texts[suffix] = file.read(member.size)
        if not texts:
            names = ", ".join(media) or "none with a known suffix"
            raise DataError(f"the sample needs a .json or .txt member, there are {names}")
        record = parse(texts["json"]) if "json" in texts else {"caption": texts["txt"].decode("utf-8")}
        if not isinstance(record, dict):
            raise DataError(f"expected a JSON object, got a {type(record).__name__}")
        return _with_media(record, media)


def _members(file: BinaryIO, end: int | None = None) -> Iterator[tarfile.TarInfo]:
    """Yield what is not a directory in a tar file, from the position of the file to ``end``.

    Raises:
        tarfile.TarError: if a header is damaged, or behind the end of the archive is another.
    """
    with tarfile.open(fileobj=file, mode="r:") as tar:
        while (member := tar.next()) is not None and (end is None or member.offset < end):
            tar.members.clear()  # type: ignore[attr-defined]  # tarfile keeps every header
            if not member.isdir():
                yield member
        if member is None:  # tarfile takes a damaged header for the end
            at = tar.offset
            file.seek(at)
            while block := file.read(_BLOCK):
                if block.strip(b"\0"):
                    raise tarfile.ReadError(
                        f"there are data after the archive's end at byte {at}: a damaged header, or "
                        "another archive"
                    )


def _key(name: str) -> str:
    path = PurePosixPath(name)
    return str(path.with_name(path.name.partition(".")[0] or path.name))


def _with_media(record: dict[str, Any], media: Mapping[str, Media]) -> dict[str, Any]:
    """Put the media of members into a record: where it names them, or else all beside the messages."""
    fields = [field for m in MODALITIES for field in (m, f"{m}s") if record.get(field) is not None]
    for field in fields:
        value = record[field]
        found = [_member(name, media) for name in (value if isinstance(value, list) else [value])]
        record[field] = found if isinstance(value, list) else found[0]
    messages = [record.get(name) for name in ("messages", "prompt", "completion", "conversations")]
    if not fields and not _fill_parts(messages, media):
        for name in media.values():
            record.setdefault(f"{name.modality}s", []).append(name)
    return record


def _fill_parts(value: Any, media: Mapping[str, Media]) -> bool:
    """Put the media of members where parts of messages name them; return whether any does."""
    if not isinstance(value, dict | list):
        return False
    found = False
    for key, each in value.items() if isinstance(value, dict) else enumerate(value):
        if key in _PART_FIELDS and isinstance(each, str):
            value[key] = _member(each, media)
            found |= value[key] is not each
        else:
            found |= _fill_parts(each, media)
    return found


def _member(name: Any, media: Mapping[str, Media]) -> Any:
    """Return the member of a name, of the last part of it or with a suffix; or the name."""
    for member, found in media.items():
        short = PurePosixPath(member).name
        if name in (member, short, short.partition(".")[2]):
            return found
    return name
