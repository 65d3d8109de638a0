"""Reader of the index of ``torch.distributed.checkpoint`` (DCP) that executes nothing in it.

DCP writes its index, ``.metadata``, as a pickle, and reads it with ``pickle.load``, which executes
the code in it. Here stand-ins take the place of the few classes that belong in it; their state
is checked, and DCP's own objects are made from it.

DCP's ``HuggingFaceStorageWriter`` and ``-Reader`` need no pickle, but in torch 2.9 to 2.15 they cannot
write tied or non-contiguous tensors, need as much memory again as a rank writes, read zeros where a
file is missing, and consolidate 0-d tensors (Adam's step) to zero.
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

# The modules of the classes that DCP writes.
_MODULES: Final = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")


def read_index(path: Path) -> Metadata:
    """Read the index of a checkpoint and check it against the files beside it.

    Args:
        path: the directory of the checkpoint.

    Returns:
        The shape, dtype and chunks of each tensor, and the place of each chunk in the files.

    Raises:
        CheckpointError: if the index is missing, damaged or hostile, or a file that it names is missing
            or too short.
    """
    file = path / ".metadata"
    try:
        with file.open("rb") as stream:
            state = _IndexUnpickler(stream).load().state
        tensors = {str(n): _tensor(tensor.state) for n, tensor in state["state_dict_metadata"].items()}
        places = {
            MetadataIndex(index.state["fqn"], _sizes(index.state["offset"])): _place(path, place.state)
            for index, place in state["storage_data"].items()
        }
        missing = [
            name
            for name, tensor in tensors.items()
            if any(MetadataIndex(name, chunk.offsets) not in places for chunk in tensor.chunks)
        ]
        if missing:
            raise CheckpointError(f"no values are stored for {', '.join(missing)}")
    except Exception as error:  # a hostile or damaged file can cause any
        raise CheckpointError(f"{file} is damaged, or no file of save_checkpoint: {error!r}.") from error
    return Metadata(dict(tensors), storage_data=places, storage_meta=StorageMeta())


class _StandIn:
    """Stand-in for an object in a pickle, which holds its state and executes nothing."""

    state: Any = None

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _IndexUnpickler(pickle.Unpickler):
    """Unpickler that allows dtypes, ``tuple`` and ``str``, and makes stand-ins of other objects."""

    def find_class(self, module: str, name: str) -> Any:
        if module in _MODULES:
            return type(name, (_StandIn,), {})  # a new one each time: a pickle can set its attributes
        if module == "torch" and isinstance(vars(torch).get(name), torch.dtype):
            return vars(torch)[name]
        if (module, name) == ("torch", "Size"):
            return tuple
        if (module, name) == ("torch.serialization", "_get_layout"):
            return str
        raise pickle.UnpicklingError(f"it contains {module}.{name}, which is not allowed there")


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
        offset + length <= end
        for chunk in chunks
        for offset, length, end in zip(chunk.offsets, chunk.sizes, size, strict=True)
    )
    if not inside or sum(math.prod(chunk.sizes) for chunk in chunks) != math.prod(size):
        raise CheckpointError(f"chunks that do not make up a tensor of {list(size)}")
    return TensorStorageMetadata(TensorProperties(dtype), size, chunks)


def _place(path: Path, state: dict[str, Any]) -> _StorageInfo:
    name, offset, length = state["relative_path"], state["offset"], state["length"]
    file = path / name
    if (
        file.resolve().parent != path.resolve()
        or not file.is_file()
        or state.get("transform_descriptors")
    ):
        raise CheckpointError(f"{name!r} is no plain file of this checkpoint")
    if sum(_sizes((offset, length))) > file.stat().st_size:
        raise CheckpointError(f"{name} is cut off")
    return _StorageInfo(name, offset, length)
