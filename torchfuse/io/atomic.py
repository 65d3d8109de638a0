"""Files and directories that appear whole or not at all, also after ``kill -9`` or on a full disk.

Content is written to a temporary name beside its path, synced to the disk and renamed. A ``SaveLock`` is
held meanwhile, so that the next process that writes to the path can remove what a killed one left.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import secrets
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from torchfuse.errors import CheckpointError
from torchfuse.io.disk_errors import disk_errors
from torchfuse.io.save_lock import SaveLock

__all__ = [
    "contains_only_checkpoint_files",
    "fsync_path",
    "fsync_tree",
    "remove_leftovers",
    "tmp_path",
    "write_directory",
    "write_file",
    "write_files",
    "write_text",
]

_AT_FDCWD: Final = -100
_RENAME_EXCHANGE: Final = 2

# One of these is in each checkpoint and artifact, and other programs do not use these names.
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


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file beside its path and rename it.

    Readers of ``path``, during the writing or after a crash, find the old file or the new one. Another
    process that writes to the same path is waited for.

    Args:
        path: the file; missing parents are made.
        write: writes the content to the path that it is given.

    Raises:
        CheckpointError: if the disk is full or cannot be written to; the old file is intact then.
    """
    write_files(path.parent, {path.name: write})


def write_files(folder: str | Path, files: Mapping[str, Callable[[Path], object]]) -> None:
    """Write several files beside their paths, and rename them in their order when all are written.

    Args:
        folder: the directory of the files, made if need be.
        files: for each name a function that writes the content to the path that it is given; files with
            earlier names are in the same directory then.

    Raises:
        CheckpointError: if the disk is full or cannot be written to; the old files are intact then.
    """
    folder = Path(folder)
    with _replacing(folder / next(iter(files))) as tmp:
        tmp.mkdir()
        for name, write in files.items():
            write(tmp / name)
        fsync_tree(tmp)
        for name in files:
            (tmp / name).replace(folder / name)


def write_text(path: Path, text: str) -> None:
    """Write a text in UTF-8, as ``write_file`` does."""
    write_file(path, lambda file: file.write_text(text, encoding="utf-8"))


def write_directory(
    path: str | Path,
    write: Callable[[Path], object],
    *,
    may_replace: Callable[[Path], bool] | None = None,
) -> None:
    """Write a directory beside its path and put it there in one step.

    Readers of ``path``, during the writing or after a crash, find the old directory or the new one,
    never files of both. (Where the system cannot exchange two directories, which Linux can, a crash
    between two renames leaves the old one under a temporary name, and the next write puts it back.)
    Another process that writes to the same path is waited for.

    Args:
        path: the directory; missing parents are made. If it is a link, its target is replaced.
        write: writes the content into the empty directory that it is given.
        may_replace: whether an existing directory that is not empty may be removed with all that it
            contains. The default is ``contains_only_checkpoint_files``.

    Raises:
        CheckpointError: if the path is a file, or a directory that may not be replaced, and nothing has
            been written then; if the disk is full or cannot be written to, and the old directory is
            intact then.
    """
    path = Path(os.path.realpath(path))
    may_replace = may_replace or contains_only_checkpoint_files
    _check_replaceable(path, may_replace)
    with _replacing(path) as tmp:
        tmp.mkdir()
        write(tmp)
        fsync_tree(tmp)
        _check_replaceable(path, may_replace)  # again, since writing takes time
        _put(tmp, path)


def contains_only_checkpoint_files(path: Path, besides: Collection[str] = ()) -> bool:
    """Whether a directory is a checkpoint or an artifact without any other file.

    It must contain ``config.json`` or ``fusion.safetensors``, and apart from these only regular files
    under the usual names of weights, configurations, tokenizers and processors.

    Args:
        path: the directory.
        besides: other names of files that may be in it.
    """
    with os.scandir(path) as entries:
        names = {entry.name: entry.is_file(follow_symlinks=False) for entry in entries}
    return bool(_MARKS & set(names)) and all(
        is_file and (name in _COMPANIONS or name in besides or _WEIGHTS.fullmatch(name))
        for name, is_file in names.items()
    )


def tmp_path(path: Path) -> Path:
    """Return a new hidden name beside a path."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def remove_leftovers(folder: Path, name: str) -> None:
    """Remove files of killed processes under names of ``tmp_path``; the path must be locked.

    Args:
        folder: the directory of the path.
        name: a regular expression of the name of the path.
    """
    # Earlier versions put host and process into the name, and had other suffixes.
    pattern = re.compile(
        rf"\.({name})\.([\w-]+\.\d+-\d+\.)?[0-9a-f]{{8}}\.(?P<suffix>tmp|old|new|saving)"
    )
    for leftover in folder.iterdir():
        found = pattern.fullmatch(leftover.name)
        if found is None:
            continue
        if found["suffix"] == "old" and not os.path.lexists(folder / found[1]):
            leftover.rename(folder / found[1])
        else:
            shutil.rmtree(leftover, ignore_errors=True)


def fsync_tree(folder: Path) -> None:
    """Sync a directory and all that it contains, and give files the usual permissions.

    safetensors makes files that only their owner can read.
    """
    mode = folder.stat().st_mode & 0o666
    for parent, _, names in os.walk(folder, topdown=False):
        for file in (Path(parent, name) for name in names):
            if file.is_file() and not file.is_symlink():
                file.chmod(mode)
                fsync_path(file)
        fsync_path(Path(parent))


def fsync_path(path: Path) -> None:
    """Sync a file, or the names in a directory, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside a path, under its lock and without leftovers; sync afterwards."""
    lock = SaveLock(path.with_name(f".{path.name}.lock"))
    tmp = tmp_path(path)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            if lock.acquire():
                remove_leftovers(path.parent, re.escape(path.name))
            yield tmp
            fsync_path(path.parent)
        finally:
            # Either an incomplete write or, after an exchange, the content that was replaced.
            shutil.rmtree(tmp, ignore_errors=True)
            lock.release()


def _check_replaceable(path: Path, may_replace: Callable[[Path], bool]) -> None:
    if not os.path.lexists(path):
        return
    if not path.is_dir():
        raise CheckpointError(f"{path} is a file; a checkpoint is a directory.")
    names = sorted(os.listdir(path))
    if names and not may_replace(path):
        some = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        raise CheckpointError(
            f"{path} is not replaced, because it may contain more than a checkpoint ({some}); nothing "
            "was written. Give a new directory, or remove this one first."
        )


def _put(tmp: Path, path: Path) -> None:
    """Rename a directory; afterwards the one that it replaced is at ``tmp`` or removed."""
    try:
        tmp.rename(path)  # possible if there is none, or an empty one
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    else:
        return
    if _exchange(tmp, path):
        return
    old = tmp.with_suffix(".old")
    path.rename(old)
    try:
        tmp.rename(path)
    except BaseException:
        old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)


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
