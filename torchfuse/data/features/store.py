"""Features on disk: shards of tensors by digest, memory-mapped.

A folder holds ``NNNNN.safetensors``, each written whole or not at all. A shard has a tensor for each
media, named by its modality and the SHA-256 of its encoded bytes, and beside them the files whose
digests were computed: a 64-bit hash of path, span, size and time of modification for each. While these
are the same the digest is too, so that a file is read once.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from torchfuse.data.samples import Media
from torchfuse.errors import CheckpointError
from torchfuse.io.atomic import write_file

__all__ = ["FeatureStore", "FeatureWriter", "hash_file"]

_FILES: Final = "files.keys"
_DIGESTS: Final = "files.digests"
SHARD_NBYTES: Final = 2**27  # from which on a shard is complete
_Keys = NDArray[np.uint64]


class FeatureStore:
    """Features of media, by digest. It can be sent to worker processes.

    Args:
        folder: the folder, as it is now; what is written later is not found.

    Raises:
        CheckpointError: naming each shard that cannot be read.

    Examples:
        >>> from tempfile import TemporaryDirectory
        >>> media = Media(data=b"encoded image")
        >>> with TemporaryDirectory() as folder:
        ...     writer = FeatureWriter(Path(folder), iter(range(9)))
        ...     writer.add(FeatureStore.name(media, media.digest()), torch.ones(1, 5, 7))
        ...     writer.close()
        ...     store = FeatureStore(folder)
        ...     store.get(media).shape, store.get(Media(data=b"another")) is None
        (torch.Size([1, 5, 7]), True)
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.shards = sorted(self.folder.glob("[0-9]*.safetensors"))
        self._handles: dict[int, Any] = {}
        names, shards = [np.empty(0, np.uint64)], [np.empty(0, np.int32)]
        files, digests = [np.empty(0, np.uint64)], [np.empty((0, 32), np.uint8)]
        problems = []
        for number, path in enumerate(self.shards):
            try:
                shard = self._shard(number)
                held = [_hash(name) for name in self._names_in(number)]
                files.append(shard.get_tensor(_FILES).numpy().view(np.uint64))
                digests.append(shard.get_tensor(_DIGESTS).numpy())
            except (SafetensorError, OSError) as error:
                problems.append(f"{path}: {error}")
            else:
                names.append(np.array(held, np.uint64))
                shards.append(np.full(len(held), number, np.int32))
        if problems:
            headline = "Shards of features are damaged; delete them, and they are computed again:"
            raise CheckpointError("\n  ".join([headline, *problems]))
        self._names, self._shard_of = _sort(np.concatenate(names), np.concatenate(shards))
        self._files, self._digests = _sort(np.concatenate(files), np.concatenate(digests))

    def __len__(self) -> int:
        """The number of media."""
        return len(self._names)

    @property
    def last_number(self) -> int:
        """The highest number of a shard; -1 if there is none."""
        return max((int(path.stem) for path in self.shards), default=-1)

    @staticmethod
    def name(media: Media, digest: str) -> str:
        """Return the name of the features of media with a digest."""
        return f"{media.modality}:{digest}"

    def digest(self, media: Media) -> str:
        """Return the SHA-256 of the encoded bytes; a file that has been read before is not read.

        Raises:
            DataError: if the file cannot be read.
        """
        return self.known_digest(hash_file(media)) or media.digest()

    def known_digest(self, file: int | None) -> str | None:
        """Return the digest of a file that was read before, by ``hash_file``."""
        at = None if file is None else _find(self._files, file)
        return None if at is None else bytes(self._digests[at]).hex()

    def __contains__(self, name: object) -> bool:
        """Whether there are features of a name."""
        return isinstance(name, str) and _find(self._names, _hash(name)) is not None

    def get(self, media: Media) -> Tensor | None:
        """Return the features of media, ``[t, n, d_e]``; None if there are none.

        Raises:
            DataError: if the file cannot be read.
            CheckpointError: if the shard cannot be read.
        """
        found = self._find(media)
        return None if found is None else found[0].get_tensor(found[1])

    def num_items(self, media: Media) -> int | None:
        """Return the number of images, tiles or frames, ``t``, as ``get`` without reading features."""
        found = self._find(media)
        return None if found is None else int(found[0].get_slice(found[1]).get_shape()[0])

    def first(self) -> Tensor | None:
        """Return some features, ``[t, n, d_e]``; None if there are none at all."""
        for number in range(len(self.shards)):
            for name in self._names_in(number):
                return self._shard(number).get_tensor(name)
        return None

    def _find(self, media: Media) -> tuple[Any, str] | None:
        name = self.name(media, self.digest(media))
        at = _find(self._names, _hash(name))
        return None if at is None else (self._shard(int(self._shard_of[at])), name)

    def _names_in(self, number: int) -> list[str]:
        return sorted({*self._shard(number).keys()} - {_FILES, _DIGESTS})

    def _shard(self, number: int) -> Any:
        if number not in self._handles:
            self._handles[number] = safe_open(self.shards[number], framework="pt")
        return self._handles[number]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_handles": {}}  # each process maps the shards itself


class FeatureWriter:
    """Write features into shards of a folder.

    Args:
        folder: the folder.
        numbers: the numbers of the shards, none of which another process writes.
    """

    def __init__(self, folder: Path, numbers: Iterator[int]) -> None:
        self._folder, self._numbers = folder, numbers
        self._tensors: dict[str, Tensor] = {}
        self._files: dict[int, str] = {}
        self._nbytes = 0

    def add(self, name: str, features: Tensor) -> None:
        """Add the features of media, on any device, by name.

        Raises:
            CheckpointError: if the disk is full or cannot be written to.
        """
        self._tensors[name] = features.detach().cpu().contiguous().clone()
        self._nbytes += features.nbytes
        if self._nbytes >= SHARD_NBYTES:
            self.close()

    def add_file(self, file: int, digest: str) -> None:
        """Add the digest of a file, by ``hash_file``."""
        self._files[file] = digest

    def close(self) -> None:
        """Write what has been added since the last shard.

        Raises:
            CheckpointError: if the disk is full or cannot be written to.
        """
        if not self._tensors and not self._files:
            return
        digests = np.frombuffer(bytes.fromhex("".join(self._files.values())), np.uint8).reshape(-1, 32)
        files = np.array(list(self._files), np.uint64).view(np.int64)
        tensors = {_FILES: torch.from_numpy(files), _DIGESTS: torch.from_numpy(digests.copy())}
        path = self._folder / f"{next(self._numbers):05}.safetensors"
        write_file(path, partial(save_file, {**self._tensors, **tensors}))
        self._tensors, self._files, self._nbytes = {}, {}, 0


def hash_file(media: Media) -> int | None:
    """Return a hash of path, span, size and time of modification; None for media in memory.

    The path may be missing: that is an error where the media are read.
    """
    if media.path is None:
        return None
    try:
        stat = os.stat(media.path)
    except OSError:
        return None
    return _hash(f"{os.path.abspath(media.path)}\0{media.span}\0{stat.st_size}\0{stat.st_mtime_ns}")


def _hash(text: str) -> int:
    # surrogateescape: names of files are any bytes.
    digest = hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def _sort(keys: _Keys, values: NDArray[Any]) -> tuple[_Keys, NDArray[Any]]:
    """Sort keys and their values, each key once."""
    keys, index = np.unique(keys, return_index=True)
    return keys, values[index]


def _find(keys: _Keys, key: int) -> int | None:
    at = int(np.searchsorted(keys, np.uint64(key)))
    return at if at < len(keys) and int(keys[at]) == key else None
