"""Images, videos and audio in the fields of records: paths, URLs, bytes, or structs of both."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from torchfuse.data.samples import Media
from torchfuse.errors import DataError

__all__ = ["MODALITIES", "read_media", "take_media"]

MODALITIES: Final = ("image", "video", "audio")  # each with fields and tags of its name


def read_media(value: Any, root: Path, modality: str) -> Media:
    """Return the media of a value in a record.

    Args:
        value: a path, a ``file:`` or ``data:`` URL, encoded bytes, a struct of ``bytes`` and ``path`` as
            ``datasets`` has it, or a ``Media``.
        root: where relative paths begin.
        modality: ``"image"``, ``"video"`` or ``"audio"``.

    Raises:
        DataError: for any other value, and for a URL that would have to be downloaded.

    Examples:
        >>> str(read_media({"bytes": None, "path": "cat.jpg"}, Path("images"), "image"))
        'images/cat.jpg'
    """
    if isinstance(value, Media):
        return value
    if isinstance(value, str) and value:
        return Media.from_url(value, root, modality=modality)
    if isinstance(value, bytes):
        return Media(data=value, modality=modality)
    if isinstance(value, Mapping):
        data, path = value.get("bytes"), value.get("path")
        if isinstance(data, bytes):
            return Media(data=data, name=str(path or ""), modality=modality)
        if isinstance(path, str) and path:
            return Media.from_url(path, root, modality=modality)
    raise DataError(f"{modality} must be a path, bytes or a struct of bytes and path, got {value!r:.80}")


def take_media(record: dict[str, Any], root: Path, problems: list[str]) -> dict[str, list[Media]]:
    """Remove the fields ``image``, ``images``, ``video`` and so on from a record; return their media.

    Args:
        record: the record, without fields that are None; changed.
        root: where relative paths begin.
        problems: problems of the record; added to.
    """
    found: dict[str, list[Media]] = {}
    for modality in MODALITIES:
        names = [name for name in (modality, f"{modality}s") if name in record]
        if len(names) == 2:
            problems.append(f"there are both fields {names[0]} and {names[1]}; keep one")
        values = [record.pop(name) for name in names]
        value = values[0] if values else []
        found[modality] = []
        for item in value if isinstance(value, list) else [value]:
            try:
                found[modality].append(read_media(item, root, modality))
            except DataError as error:
                problems.append(str(error))
                found[modality].append(Media(data=b""))  # counts as one
    return found
