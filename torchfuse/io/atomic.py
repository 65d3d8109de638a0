"""Files and directories that are there whole or not at all.

Both are written beside their place, brought to the disk and put into place in one step. What is written
beside carries the writer's host and process in its name, so that whoever writes there next can tell the
left-overs of a killed writer from the work of a living one.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import secrets
import shutil
import socket
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Final

from torchfuse.errors import CheckpointError

__all__ = ["holds_only_a_checkpoint", "write_directory", "write_whole"]

_AT_FDCWD: Final = -100
_RENAME_EXCHANGE: Final = 2

# What writers of checkpoints leave in a directory, and nobody else does under these names.
_MARKS: Final = frozenset({"config.json", "fusion.safetensors"})
_WEIGHTS: Final = re.compile(
    r"(model|adapter_model|fusion|trained)(-\d+-of-\d+)?\.safetensors(\.index\.json)?"
)
_COMPANIONS: Final = frozenset(
    "config.json fusion.json generation_config.json preprocessor_config.json processor_config.json "
    "video_preprocessor_config.json tokenizer.json tokenizer_config.json tokenizer.model vocab.json "
    "vocab.txt merges.txt added_tokens.json special_tokens_map.json chat_template.json "
    "chat_template.jinja".split()
)


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file beside its place and rename it into place.

    Whoever reads ``path``, during the writing or after a crash, finds the old file or the new one.

    Args:
        path: the file; its directory must exist.
        write: writes the content to the path that it is given.
    """
    _remove_left_overs(path)
    beside = _beside(path)  # a directory, because some writers write beside their file, too
    beside.mkdir()
    try:
        write(beside / path.name)
        _settle(beside)
        (beside / path.name).replace(path)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    _to_disk(path.parent)


def write_directory(
    path: str | Path,
    write: Callable[[Path], None],
    *,
    may_replace: Callable[[Path], bool] | None = None,
) -> None:
    """Write a directory beside its place and put it there at once.

    Whoever reads ``path``, during the writing or after a crash, finds the old directory or the new one,
    never files of both. (Where the system cannot exchange two directories, which Linux can, a crash in
    the moment between two renames leaves the old one beside its place, and the next write puts it back.)

    Args:
        path: the directory; parents are made if need be. If it is a link, what it leads to is replaced.
        write: writes the content into the empty directory that it is given.
        may_replace: whether a directory in this place, unless it is empty, may be removed with all that
            is in it. None: if it ``holds_only_a_checkpoint``.

    Raises:
        CheckpointError: if a file is in this place, or a directory that may not be replaced. Nothing
            has been written then.
    """
    place = Path(os.path.realpath(path))
    _check_replaceable(place, may_replace or holds_only_a_checkpoint)
    place.parent.mkdir(parents=True, exist_ok=True)
    _remove_left_overs(place)
    beside = _beside(place)
    beside.mkdir()
    try:
        write(beside)
        _settle(beside)
        _check_replaceable(place, may_replace or holds_only_a_checkpoint)  # writing takes its time
        _put(beside, place)
    finally:
        # Either what failed to be written or, after the exchange, what was replaced.
        shutil.rmtree(beside, ignore_errors=True)
    _to_disk(place.parent)


def holds_only_a_checkpoint(path: Path, besides: Collection[str] = ()) -> bool:
    """Whether a directory is a checkpoint or an artifact, and holds nothing else that would be missed.

    It must hold ``config.json`` or ``fusion.safetensors``, and besides only regular files with names
    that weights, configurations, tokenizers and processors have.

    Args:
        path: the directory.
        besides: names of files that may be there, too, because the new directory has its own.
    """
    with os.scandir(path) as entries:
        names = {entry.name: entry.is_file(follow_symlinks=False) for entry in entries}
    return bool(_MARKS & set(names)) and all(
        is_file and (name in _COMPANIONS or name in besides or _WEIGHTS.fullmatch(name))
        for name, is_file in names.items()
    )


def _check_replaceable(place: Path, may_replace: Callable[[Path], bool]) -> None:
    if not os.path.lexists(place):
        return
    if not place.is_dir():
        raise CheckpointError(f"{place} is a file; a checkpoint is a directory.")
    held = sorted(os.listdir(place))
    if held and not may_replace(place):
        some = ", ".join(held[:5]) + (", ..." if len(held) > 5 else "")
        raise CheckpointError(
            f"{place} is not replaced, because it may hold more than a checkpoint ({some}); nothing was "
            "written. Give a new directory, or remove this one first."
        )


def _put(beside: Path, place: Path) -> None:
    """Put a directory into its place; what was there is at ``beside`` or gone afterwards."""
    try:
        beside.rename(place)  # over nothing, or over an empty directory
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    else:
        return
    if _exchange(beside, place):
        return
    aside = beside.with_suffix(".old")
    place.rename(aside)
    try:
        beside.rename(place)
    except BaseException:
        aside.rename(place)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two directories in one step; False if the system or the file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    result = renameat2(
        _AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), ctypes.c_uint(_RENAME_EXCHANGE)
    )
    if result == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(one), None, str(other))


def _settle(folder: Path) -> None:
    """Bring a tree to the disk, with the permissions that files usually get."""
    mode = 0o666 & ~_umask()
    for parent, _, files in os.walk(folder, topdown=False):
        for name in files:
            file = Path(parent, name)
            if file.is_file() and not file.is_symlink():
                file.chmod(mode)
                _to_disk(file)
        _to_disk(Path(parent))


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _beside(path: Path) -> Path:
    """A fresh name beside a path that says who writes there."""
    pid = os.getpid()
    mark = f"{_host()}.{pid}-{_started(pid)}.{secrets.token_hex(4)}"
    return path.with_name(f".{path.name}.{mark}.new")


def _remove_left_overs(path: Path) -> None:
    """Remove what writers to this place left who were killed; put back what one had moved away."""
    left = re.compile(
        rf"\.{re.escape(path.name)}\.{re.escape(_host())}\.(\d+)-(\d+)\.[0-9a-f]{{8}}\.(new|old)"
    )
    for name in os.listdir(path.parent):
        found = left.fullmatch(name)
        if found is None or _lives(int(found[1]), found[2]):
            continue
        beside = path.with_name(name)
        if found[3] == "old" and not os.path.lexists(path):
            beside.rename(path)
        else:
            shutil.rmtree(beside, ignore_errors=True)


def _lives(pid: int, started: str) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):  # another user's; no number of a process
        return True
    return _started(pid) == started


def _started(pid: int) -> str:
    """When a process began, since numbers of processes are given again; 0 where the system hides it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
    except OSError:
        return "0"


def _host() -> str:
    return re.sub(r"[^\w-]", "-", socket.gethostname())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
