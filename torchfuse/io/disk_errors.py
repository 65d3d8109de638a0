"""Errors of the disk while something is written, each as one sentence."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from safetensors import SafetensorError

from torchfuse.errors import CheckpointError

__all__ = ["disk_errors"]

_REASONS: Final = {
    errno.ENOSPC: ("the disk is full", "Free some space"),
    errno.EDQUOT: ("the disk quota is used up", "Free some space"),
    errno.EFBIG: ("a file would be larger than this process may write", "Raise the limit (ulimit -f)"),
    errno.EROFS: ("the file system is read-only", "Make it writable"),
    errno.EACCES: ("this user may not write there", "Change the permissions"),
    errno.EPERM: ("this user may not write there", "Change the permissions"),
    errno.EIO: ("the disk reported an input/output error", "Check the disk"),
}


@contextmanager
def disk_errors(
    path: Path, *, tmp: Path | None = None, num_bytes: int | None = None, kept: str = ""
) -> Iterator[None]:
    """Turn errors of the disk into a ``CheckpointError``; other exceptions pass through.

    Args:
        path: the file or directory that is written.
        tmp: the directory that holds the part that was written, if it still exists when this ends.
        num_bytes: the size of all that is written; None if it is unknown.
        kept: a sentence on earlier files. The default is about what exists at ``path``.

    Raises:
        CheckpointError: with the path, the reason and, if the disk is full, how much space there was.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        cause = _os_error(error)
        if cause is None:
            raise
        reason, remedy = _REASONS.get(cause.errno or 0, (str(cause), "Resolve that"))
        if cause.errno == errno.ENOSPC:
            needed = "more are" if num_bytes is None else f"{num_bytes:,} are"
            reason += f" ({_available(path, tmp):,} bytes are available, {needed} needed)"
        if not kept:
            kept = "The previous one is intact." if os.path.lexists(path) else "Nothing is left of it."
        raise CheckpointError(
            f"{path} was not written: {reason}. {kept} {remedy}, or write elsewhere."
        ) from error


def _os_error(error: BaseException) -> OSError | None:
    """Return the system's error that caused an exception of Python, safetensors or torch.save."""
    if isinstance(error, OSError):
        return error
    if found := re.search(r"\(os error (\d+)\)", str(error)):  # safetensors
        return OSError(int(found[1]), os.strerror(int(found[1])))
    # After an error of its stream, torch.save fails once more, by a RuntimeError, to close its archive.
    return error.__context__ if isinstance(error.__context__, OSError) else None


def _available(path: Path, tmp: Path | None) -> int:
    """Return the bytes that a write to a path can take up, with those that ``tmp`` holds already."""
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    files = tmp.rglob("*") if tmp is not None else ()
    return shutil.disk_usage(folder).free + sum(file.stat().st_size for file in files if file.is_file())
