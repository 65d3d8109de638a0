"""The index of ``torch.distributed.checkpoint``'s storage, read without running anything in it.

``.metadata`` is a pickle, so whoever can write the file could run code in whoever loads it. It is read
with inert stand-ins for the few classes that belong in it, checked against itself and against the files
beside it, and rebuilt.
"""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import Any, Final

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from torchfuse.errors import CheckpointError

__all__ = ["read_index"]

_INDEX: Final = ".metadata"


def read_index(path: Path) -> Metadata:
    """Read the index of a checkpoint, and check it against the files beside it.

    Args:
        path: the directory of the checkpoint.

    Returns:
        What ``FileSystemReader.read_metadata`` returns: tensors only, and where each piece of them is.

    Raises:
        CheckpointError: if the index is missing, damaged or hostile, or a file that it names is not
            there or too short.
    """
    file = path / _INDEX
    try:
        with file.open("rb") as stream:
            state = _IndexUnpickler(stream).load().state
        tensors = {str(n): _tensor(record.state) for n, record in state["state_dict_metadata"].items()}
        storage = {}
        for index, info in state["storage_data"].items():
            key = MetadataIndex(index.state["fqn"], _sizes(index.state["offset"]))
            storage[key] = _stored(path, info.state)
        lost = [
            name
            for name, tensor in tensors.items()
            if any(MetadataIndex(name, chunk.offsets) not in storage for chunk in tensor.chunks)
        ]
        if lost:
            raise CheckpointError(f"nothing is stored of {', '.join(lost)}")
    except Exception as error:  # whatever a hostile or damaged file makes of the lines above
        raise CheckpointError(f"{file} is damaged, or no file of save_checkpoint: {error!r}.") from error
    return Metadata(dict(tensors), storage_data=storage, storage_meta=StorageMeta())


class _Inert:
    """Stands for an object in a pickle: keeps the state that the pickle gives it, and does nothing."""

    state: Any = None

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _IndexUnpickler(pickle.Unpickler):
    """Reads the index without one class or function of its own choosing."""

    _RECORDS: Final = {
        "torch.distributed.checkpoint.metadata": {
            "Metadata",
            "TensorStorageMetadata",
            "ChunkStorageMetadata",
            "TensorProperties",
            "_MEM_FORMAT_ENCODING",
            "MetadataIndex",
            "StorageMeta",
        },
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    }

    def find_class(self, module: str, name: str) -> Any:
        if name in self._RECORDS.get(module, ()):
            return type(name, (_Inert,), {})  # a new one each time: a pickle can set attributes of it
        if module == "torch" and isinstance(vars(torch).get(name), torch.dtype):
            return vars(torch)[name]
        if (module, name) == ("torch", "Size"):
            return tuple
        if (module, name) == ("torch.serialization", "_get_layout"):
            return str
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which has no place there")


def _sizes(value: Any) -> torch.Size:
    if not isinstance(value, tuple) or not all(type(n) is int and n >= 0 for n in value):
        raise CheckpointError(f"sizes expected, not {value!r}")
    return torch.Size(value)


def _tensor(state: dict[str, Any]) -> TensorStorageMetadata:
    dtype, size = state["properties"].state[0], _sizes(state["size"])
    if not isinstance(dtype, torch.dtype):
        raise CheckpointError(f"a dtype expected, not {dtype!r}")
    chunks = [
        ChunkStorageMetadata(_sizes(chunk.state["offsets"]), _sizes(chunk.state["sizes"]))
        for chunk in state["chunks"]
    ]
    inside = all(
        offset + length <= whole
        for chunk in chunks
        for offset, length, whole in zip(chunk.offsets, chunk.sizes, size, strict=True)
    )
    if not inside or sum(math.prod(chunk.sizes) for chunk in chunks) != math.prod(size):
        raise CheckpointError(f"pieces that do not make up a tensor of {list(size)}")
    return TensorStorageMetadata(TensorProperties(dtype), size, chunks)


def _stored(path: Path, state: dict[str, Any]) -> _StorageInfo:
    name, offset, length = state["relative_path"], state["offset"], state["length"]
    file = path / name
    if (
        file.resolve().parent != path.resolve()
        or not file.is_file()
        or state.get("transform_descriptors")
    ):
        raise CheckpointError(f"{name!r} is no plain file of this checkpoint")
    _sizes((offset, length))
    if offset + length > file.stat().st_size:
        raise CheckpointError(f"{name} is cut off")
    return _StorageInfo(name, offset, length)
