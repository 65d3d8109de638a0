"""Strict reader for untrusted pretrained checkpoints.

Only regular files of the checkpoint's own directory are opened, and at first only their headers are
read: names, shapes and dtypes of all tensors are checked before a value is read. Tensors are then mapped
from the file one by one.

safetensors itself refuses headers whose sizes, offsets and shapes contradict each other or the file. It
accepts a name twice (and uses the last one), dtypes that torch lacks and empty tensors of impossible
shapes; these are refused here.
"""

from __future__ import annotations

import math
import os
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from torchfuse.errors import CheckpointError
from torchfuse.io.strict_json import parse, read_json, regular_file

__all__ = ["PICKLE_SUFFIXES", "Checkpoint", "CheckpointDirectory"]

_ONE_FILE: Final = "model.safetensors"
_INDEX: Final = "model.safetensors.index.json"
PICKLE_SUFFIXES: Final = (".bin", ".pt", ".pth")

_DTYPES: Final = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}


class Checkpoint(Mapping[str, tuple[int, ...]]):
    """The tensors of a checkpoint by name: a mapping to their shapes; values are read on demand.

    As a context manager it closes the files.

    Attributes:
        path: the directory or file.
        config: the configuration in the JSON file beside the tensors.
    """

    path: Path
    config: dict[str, Any]
    _shapes: dict[str, tuple[int, ...]]
    _dtypes: dict[str, torch.dtype]

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """Return one tensor on the CPU, mapped from the file: do not write to it."""

    @abstractmethod
    def close(self) -> None:
        """Close the files; tensors that were read stay valid."""

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of one tensor."""
        return self._dtypes[name]

    def nbytes(self, name: str) -> int:
        """Return the size of one tensor in bytes."""
        return math.prod(self._shapes[name]) * self._dtypes[name].itemsize

    def __getitem__(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def __repr__(self) -> str:
        size = sum(map(self.nbytes, self))
        return f"{type(self).__name__}({str(self.path)!r}, {len(self)} tensors, {size:,} bytes)"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class CheckpointDirectory(Checkpoint):
    """A Hugging Face directory, of one file or several.

    If there is an index, the files that it names are read. If ``model.safetensors`` exists and is not
    among them, the directory is refused: transformers would read that file and ignore the index.

    Args:
        path: a directory with ``config.json`` and ``model.safetensors``, or several files and
            ``model.safetensors.index.json``.

    Raises:
        CheckpointError: if it is no such directory, with all that is wrong with it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._files = ExitStack()
        if not os.path.isdir(self.path):
            raise CheckpointError(f"{self.path} is not a directory; give a Hugging Face checkpoint.")
        if not os.path.lexists(self.path / "config.json"):
            raise CheckpointError(f"{self.path} is not a checkpoint: it has no config.json.")
        self.config = read_json(self.path / "config.json")
        self._readers: dict[str, Any] = {}
        self._shapes, self._dtypes = {}, {}
        problems: list[str] = []
        try:
            for file, names in self._layout().items():
                problems += self._open(file, names)
            if problems:
                raise CheckpointError(_listed(problems))
        except BaseException:
            self.close()
            raise

    def _layout(self) -> dict[str, list[str] | None]:
        """Return the names of tensors that the index puts into each file; None without an index."""
        index = self.path / _INDEX
        one_file = os.path.lexists(self.path / _ONE_FILE)
        if not os.path.lexists(index):
            if one_file:
                return {_ONE_FILE: None}
            others = sorted(p.name for p in self.path.iterdir() if p.suffix in PICKLE_SUFFIXES)
            hint = (
                f" {others[0]} is a pickle, which can run code when it is read; save it again with "
                "transformers (save_pretrained), which writes safetensors."
                if others
                else ""
            )
            raise CheckpointError(
                f"{self.path} is not a checkpoint: it has neither {_ONE_FILE} nor {_INDEX}.{hint}"
            )
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index} has no weight_map.")
        layout: dict[str, list[str] | None] = {}
        problems = []
        for name, file in weight_map.items():
            if not _is_plain_name(file):
                problems.append(f"{index} puts {name} in {file!r}, which is no file beside it.")
                continue
            names = layout.setdefault(file, [])
            assert names is not None
            names.append(name)
        problems += [
            f"{self.path} is incomplete: {file} is missing."
            for file in layout
            if not os.path.lexists(self.path / file)
        ]
        if not problems and one_file and _ONE_FILE not in layout:
            problems = [
                f"{self.path} has both {_ONE_FILE} and {_INDEX}, which does not name it, and readers "
                "differ in which one they use: remove the one that is out of date."
            ]
        if problems:
            raise CheckpointError(_listed(problems))
        return layout

    def _open(self, file: str, names: list[str] | None) -> list[str]:
        """Open a file and add its tensors; return what is wrong with it."""
        path = self.path / file
        real = regular_file(self.path, file)
        try:
            reader = self._files.enter_context(safe_open(real, framework="pt"))
            _check_header(real)
        except (SafetensorError, OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} is damaged: {error}.") from error
        found = sorted(reader.keys())
        if names is not None and set(found) != set(names):
            wrong = sorted(set(found) ^ set(names))
            return [f"{path} and {_INDEX} disagree about {len(wrong)} tensors, such as {wrong[0]}."]
        problems = []
        for name in found:
            entry = reader.get_slice(name)
            shape, kind = tuple(entry.get_shape()), entry.get_dtype()
            if kind not in _DTYPES:
                problems.append(f"{path} has {name} in {kind}, a dtype that torch lacks.")
            elif math.prod(max(size, 1) for size in shape) > torch.iinfo(torch.int64).max:
                problems.append(f"{path} has {name} in the impossible shape {list(shape)}.")
            else:
                self._shapes[name], self._dtypes[name] = shape, _DTYPES[kind]
                self._readers[name] = reader
        return problems

    def read(self, name: str) -> Tensor:
        return self._readers[name].get_tensor(name)

    def close(self) -> None:
        self._files.close()


def _listed(problems: list[str]) -> str:
    more = [f"... and {len(problems) - 8} more."] if len(problems) > 8 else []
    return "\n".join(problems[:8] + more)


def _is_plain_name(file: Any) -> bool:
    """Whether an entry of an index is the name of a file in the same directory."""
    return isinstance(file, str) and file not in ("", ".", "..") and not set(file) & set("/\\\0")


def _check_header(path: Path) -> None:
    """Refuse a header with a name twice, in a file that safetensors accepted."""
    with path.open("rb") as file:
        parse(file.read(int.from_bytes(file.read(8), "little")))
