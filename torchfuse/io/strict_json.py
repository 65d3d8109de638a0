"""Strict reader for untrusted JSON.

``json`` itself keeps the last of two equal keys, reads ``NaN`` and ``1e999``, and accepts half a
surrogate pair, any depth and numbers that no float can hold, where other readers fail or read otherwise.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeVar

from torchfuse.errors import CheckpointError

__all__ = ["each_key_once", "parse", "read_json", "regular_file"]

_MAX_JSON_BYTES: Final = 100_000_000  # what safetensors allows a header
_MAX_DEPTH: Final = 64

_Number = TypeVar("_Number", int, float)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a regular file of a directory.

    It may be a link to a file of the same directory or, in the cache of the Hugging Face hub, of the
    repository's blobs.

    Raises:
        CheckpointError: if the file is missing, is outside of its directory, or contains no JSON object;
            for JSON that other readers read otherwise (a key twice, NaN, numbers that no float can hold,
            half a surrogate pair), and for JSON that exhausts a reader (size, depth).
    """
    real = regular_file(path.parent, path.name)
    try:
        if real.stat().st_size > _MAX_JSON_BYTES:
            raise CheckpointError(f"more than {_MAX_JSON_BYTES} bytes")
        value = parse(real.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no valid JSON: {error}.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got a {type(value).__name__}.")
    return value


def parse(content: bytes) -> Any:
    """Return the value of a JSON text; ValueError or RecursionError if it has none, or more than one."""
    text = content.decode("utf-8")
    value = json.loads(
        text,
        object_pairs_hook=each_key_once,
        parse_constant=_finite(float),
        parse_float=_finite(float),
        parse_int=_finite(int),
    )
    if _depth(value) > _MAX_DEPTH:
        raise CheckpointError(f"more than {_MAX_DEPTH} levels deep")
    if re.search(r"\\u[dD][89a-fA-F]", text):  # half a surrogate pair cannot be encoded
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    return value


def each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse an object that contains a key twice; for ``object_pairs_hook``."""
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in found if keys.count(key) > 1)
        raise CheckpointError(f"the key {twice!r} is twice in one object")
    return found


def _finite(convert: Callable[[str], _Number]) -> Callable[[str], _Number]:
    """Return a conversion of JSON's numbers that refuses those that no float can hold."""

    def converted(digits: str) -> _Number:
        if not math.isfinite(float(digits)):
            raise CheckpointError(f"{digits[:20]} is no finite number")
        return convert(digits)

    return converted


def _depth(value: Any) -> int:
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if parts is None else 1 + max(map(_depth, parts), default=0)


def regular_file(folder: Path, name: str) -> Path:
    """Return the path of a file in a directory, with links resolved.

    Raises:
        CheckpointError: if it is missing, no regular file (opening a pipe would block), or a link to
            another directory, except for the blobs of its own repository in the hub's cache.
    """
    path = folder / name
    try:
        root = Path(os.path.realpath(folder, strict=True))
        real = Path(os.path.realpath(path, strict=True))
        mode = real.stat().st_mode
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from error
    cached = [p.parent for p in root.parents if p.name == "snapshots"]
    blobs = cached[0] / "blobs" if cached and cached[0].name.startswith("models--") else None
    if not real.is_relative_to(root) and real.parent != blobs:
        raise CheckpointError(f"{path} is a link to another directory; put the file itself there.")
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"{path} is no regular file.")
    return real
