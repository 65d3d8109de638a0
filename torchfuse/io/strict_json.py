"""JSON files of strangers: read once, whole, and never believed before they are checked."""

from __future__ import annotations

import json
import math
import os
import re
import stat
from pathlib import Path
from typing import Any, Final

from torchfuse.errors import CheckpointError

__all__ = ["each_key_once", "parse", "read_json", "regular_file"]

_MAX_JSON_BYTES: Final = 100_000_000  # what safetensors allows a header
_MAX_DEPTH: Final = 64
_MAX_DIGITS: Final = 300  # a longer number has no floating value


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a regular file of a directory.

    A link may lead to a file of the same directory or, in the cache of the Hugging Face hub, to the
    repository's own blobs.

    Raises:
        CheckpointError: if the file is missing, leaves its directory, or holds no JSON object, naming
            it. JSON that readers take differently (a key twice, NaN, numbers no float holds, half a
            character) or that is made to exhaust a reader (size, depth) is refused too.
    """
    real = regular_file(path.parent, path.name)
    try:
        if real.stat().st_size > _MAX_JSON_BYTES:
            raise CheckpointError(f"more than {_MAX_JSON_BYTES} bytes")
        value = parse(real.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no JSON that can be used: {error}.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got a {type(value).__name__}.")
    return value


def parse(content: bytes) -> Any:
    """The value of a JSON text; ValueError or RecursionError if there is none or more than one."""
    text = content.decode("utf-8")
    value = json.loads(
        text,
        object_pairs_hook=each_key_once,
        parse_constant=_refuse_constant,
        parse_float=_finite,
        parse_int=_bounded,
    )
    level = [value]
    for _ in range(_MAX_DEPTH):
        level = [
            child
            for parent in level
            if isinstance(parent, dict | list)
            for child in (parent.values() if isinstance(parent, dict) else parent)
        ]
    if level:
        raise CheckpointError(f"more than {_MAX_DEPTH} levels deep")
    if re.search(r"\\u[dD][89a-fA-F]", text):  # half a character fails where it is encoded, so at once
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    return value


def each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse an object in which a key stands twice; for ``object_pairs_hook``."""
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in found if keys.count(key) > 1)
        raise CheckpointError(f"{twice!r} stands twice in one object")
    return found


def _refuse_constant(name: str) -> None:
    raise CheckpointError(f"{name} is no number")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise CheckpointError(f"{digits[:20]} is too large a number")
    return value


def _bounded(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise CheckpointError(f"{digits[:20]}... is too large a number")
    return int(digits)


def regular_file(folder: Path, name: str) -> Path:
    """Where a file of a directory really is.

    Raises:
        CheckpointError: if it is missing, no regular file (opening a pipe would wait for ever), or a
            link that leaves the directory, except for the blobs of its own repository in the hub's
            cache.
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
        raise CheckpointError(f"{path} is a link that leaves its directory; put the file itself there.")
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"{path} is no regular file.")
    return real
