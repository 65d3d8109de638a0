"""Pretrained checkpoints as tables of tensors, read without trust.

A checkpoint comes from somewhere else, so nothing in it is believed before it is checked, and only
regular files of its own directory are opened. Only headers are read at first: names, shapes and dtypes
of everything are known before a single value is. Tensors are then read one by one, mapped from the file.

safetensors itself refuses headers whose sizes, offsets and shapes contradict each other or the file. It
takes names that stand twice (the last counts), kinds of numbers that torch lacks and empty tensors of
impossible shapes; those are refused here.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
import zipfile
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

__all__ = ["Checkpoint", "CheckpointDirectory", "CheckpointFile", "open_checkpoint", "read_json"]

_ONE_FILE: Final = "model.safetensors"
_INDEX: Final = "model.safetensors.index.json"
_PICKLES: Final = (".bin", ".pt", ".pth")

_MAX_JSON_BYTES: Final = 100_000_000  # what safetensors allows a header
_MAX_DEPTH: Final = 64
_MAX_DIGITS: Final = 300  # a longer number has no floating value

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


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a regular file of a directory.

    A link may lead to a file of the same directory or, in the cache of the Hugging Face hub, to the
    repository's own blobs.

    Raises:
        ValueError: if the file is missing, leaves its directory, or holds no JSON object, naming it.
            JSON that readers take differently (a key twice, NaN, numbers no float holds, half a
            character) or that is made to exhaust a reader (size, depth) is refused too.
    """
    real = _regular_file(path.parent, path.name)
    try:
        if real.stat().st_size > _MAX_JSON_BYTES:
            raise ValueError(f"more than {_MAX_JSON_BYTES} bytes")
        value = _parse(real.read_bytes())
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON that can be used: {error}.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, got a {type(value).__name__}.")
    return value


def _parse(content: bytes) -> Any:
    """The value of a JSON text; ValueError or RecursionError if there is none or more than one."""
    text = content.decode("utf-8")
    value = json.loads(
        text,
        object_pairs_hook=_each_key_once,
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
        raise ValueError(f"more than {_MAX_DEPTH} levels deep")
    if re.search(r"\\u[dD][89a-fA-F]", text):  # half a character fails where it is encoded, so at once
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    return value


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in found if keys.count(key) > 1)
        raise ValueError(f"{twice!r} stands twice in one object")
    return found


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{digits[:20]} is too large a number")
    return value


def _bounded(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"{digits[:20]}... is too large a number")
    return int(digits)


def _regular_file(folder: Path, name: str) -> Path:
    """Where a file of a directory really is.

    Raises:
        ValueError: if it is missing, no regular file (opening a pipe would wait for ever), or a link
            that leaves the directory, except for the blobs of its own repository in the hub's cache.
    """
    path = folder / name
    try:
        root = Path(os.path.realpath(folder, strict=True))
        real = Path(os.path.realpath(path, strict=True))
        mode = real.stat().st_mode
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}.") from error
    cached = [p.parent for p in root.parents if p.name == "snapshots"]
    blobs = cached[0] / "blobs" if cached and cached[0].name.startswith("models--") else None
    if not real.is_relative_to(root) and real.parent != blobs:
        raise ValueError(f"{path} is a link that leaves its directory; put the file itself there.")
    if not stat.S_ISREG(mode):
        raise ValueError(f"{path} is no regular file.")
    return real


class Checkpoint(Mapping[str, tuple[int, ...]]):
    """The tensors of a checkpoint by name: their shapes at once, their values on demand.

    Use it as a context manager, which closes the files.

    Attributes:
        path: where it is.
        config: its configuration, as the JSON beside it has it.
    """

    path: Path
    config: dict[str, Any]
    _shapes: dict[str, tuple[int, ...]]
    _dtypes: dict[str, torch.dtype]

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """The values of one tensor, on the CPU, mapped from the file: do not write to them."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the files; tensors that were read stay valid."""

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of one tensor."""
        return self._dtypes[name]

    def nbytes(self, name: str) -> int:
        """How many bytes the values of one tensor take."""
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

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class CheckpointDirectory(Checkpoint):
    """A Hugging Face directory as one table of tensors, whether it is one file or many.

    An index counts if it is there. If it does not name ``model.safetensors`` although that is there too,
    the directory is refused: transformers would read the one file and pass over the index.

    Args:
        path: a directory with ``config.json`` and ``model.safetensors``, or several files and
            ``model.safetensors.index.json``.

    Raises:
        ValueError: if it is no such directory, naming what is wrong with it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._files = ExitStack()
        if not os.path.isdir(self.path):
            raise ValueError(f"{self.path} is not a directory; give a Hugging Face checkpoint.")
        if not os.path.lexists(self.path / "config.json"):
            raise ValueError(f"{self.path} is not a checkpoint: it has no config.json.")
        self.config = read_json(self.path / "config.json")
        self._readers: dict[str, Any] = {}
        self._shapes, self._dtypes = {}, {}
        faults: list[str] = []
        try:
            for file, names in self._layout().items():
                faults += self._open(file, names)
            if faults:
                raise ValueError(_listed(faults))
        except BaseException:
            self.close()
            raise

    def _layout(self) -> dict[str, list[str] | None]:
        """The files, and for each what the index says is in it (None: whatever is)."""
        index = self.path / _INDEX
        one_file = os.path.lexists(self.path / _ONE_FILE)
        if not os.path.lexists(index):
            if one_file:
                return {_ONE_FILE: None}
            others = sorted(p.name for p in self.path.iterdir() if p.suffix in _PICKLES)
            hint = (
                f" {others[0]} is a pickle, which can run code when it is read; save it anew with "
                "transformers (save_pretrained), which writes safetensors."
                if others
                else ""
            )
            raise ValueError(
                f"{self.path} is not a checkpoint: it has neither {_ONE_FILE} nor {_INDEX}.{hint}"
            )
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{index} has no weight_map.")
        layout: dict[str, list[str] | None] = {}
        faults = []
        for name, file in weight_map.items():
            if not _is_plain_name(file):
                faults.append(f"{index} puts {name} in {file!r}, which is no file beside it.")
                continue
            names = layout.setdefault(file, [])
            assert names is not None
            names.append(name)
        faults += [
            f"{self.path} is incomplete: {file} is missing."
            for file in layout
            if not os.path.lexists(self.path / file)
        ]
        if not faults and one_file and _ONE_FILE not in layout:
            faults = [
                f"{self.path} has both {_ONE_FILE} and {_INDEX}, which does not name it, and readers "
                "differ about which counts: remove the one that is out of date."
            ]
        if faults:
            raise ValueError(_listed(faults))
        return layout

    def _open(self, file: str, names: list[str] | None) -> list[str]:
        """Take what one file holds; what is wrong with that."""
        path = self.path / file
        real = _regular_file(self.path, file)
        try:
            reader = self._files.enter_context(safe_open(real, framework="pt"))
            _check_header(real)
        except (SafetensorError, OSError, ValueError, RecursionError) as error:
            raise ValueError(f"{path} is damaged: {error}.") from error
        held = sorted(reader.keys())
        if names is not None and set(held) != set(names):
            wrong = sorted(set(held) ^ set(names))
            return [f"{path} and {_INDEX} disagree about {len(wrong)} tensors, such as {wrong[0]}."]
        faults = []
        for name in held:
            entry = reader.get_slice(name)
            shape, kind = tuple(entry.get_shape()), entry.get_dtype()
            if kind not in _DTYPES:
                faults.append(f"{path} holds {name} as {kind}, which torch cannot compute with.")
            elif math.prod(max(size, 1) for size in shape) > torch.iinfo(torch.int64).max:
                faults.append(f"{path} holds {name} in the shape {list(shape)}, which cannot be.")
            else:
                self._shapes[name], self._dtypes[name] = shape, _DTYPES[kind]
                self._readers[name] = reader
        return faults

    def read(self, name: str) -> Tensor:
        return self._readers[name].get_tensor(name)

    def close(self) -> None:
        self._files.close()

    def __enter__(self) -> CheckpointDirectory:
        return self


class CheckpointFile(Checkpoint):
    """One file of ``torch.save`` as a table of tensors, such as Meta's or torchtune's.

    It is unpickled by torch's restricted reader, which runs no code of the file. What torchtune puts
    under ``model`` is the table. ``config`` is the object in ``params.json`` or else in ``config.json``
    beside the file, and empty if there is neither.

    Args:
        path: a file that ends in ``.pt``, ``.pth`` or ``.bin``.

    Raises:
        ValueError: if it is no such file, damaged, or holds anything but a table of plain tensors.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if self.path.suffix not in _PICKLES:
            raise ValueError(f"{self.path} must be a file that ends in one of {', '.join(_PICKLES)}.")
        real = _regular_file(self.path.parent, self.path.name)
        beside = (self.path.parent / name for name in ("params.json", "config.json"))
        self.config = next((read_json(file) for file in beside if os.path.lexists(file)), {})
        self._tensors, sizes = _unpickle(real, self.path)
        wrong = [
            f"{name!r} ({why})" for name, t in self._tensors.items() if (why := _not_plain(name, t))
        ]
        if wrong:
            raise ValueError(
                f"{self.path} must hold plain tensors by name and nothing else, got "
                f"{', '.join(wrong[:8])}{' and more' if len(wrong) > 8 else ''}."
            )
        storages = [tensor.untyped_storage() for tensor in self._tensors.values()]
        placed = {storage.data_ptr(): storage.nbytes() for storage in storages if storage.nbytes()}
        if [placed[place] for place in sorted(placed)] != sizes:
            raise ValueError(
                f"{self.path} is damaged: its tensors do not fill what the file has for them."
            )
        self._shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}
        self._dtypes = {name: tensor.dtype for name, tensor in self._tensors.items()}

    def read(self, name: str) -> Tensor:
        return self._tensors[name].detach()

    def close(self) -> None:
        self._tensors = {}

    def __enter__(self) -> CheckpointFile:
        return self


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a Hugging Face directory, or a file of ``torch.save`` if the path ends as one does.

    Raises:
        ValueError: if it is neither, naming what is wrong with it.
    """
    is_file = Path(path).suffix in _PICKLES and not os.path.isdir(path)
    return CheckpointFile(path) if is_file else CheckpointDirectory(path)


def _listed(faults: list[str]) -> str:
    more = [f"... and {len(faults) - 8} more."] if len(faults) > 8 else []
    return "\n".join(faults[:8] + more)


def _is_plain_name(file: Any) -> bool:
    """Whether an entry of an index is the name of something in the directory itself."""
    return isinstance(file, str) and file not in ("", ".", "..") and not set(file) & set("/\\\0")


def _check_header(path: Path) -> None:
    """Refuse a header, of a file that safetensors took, in which a name stands twice."""
    with path.open("rb") as file:
        _parse(file.read(int.from_bytes(file.read(8), "little")))


def _unpickle(real: Path, path: Path) -> tuple[dict[Any, Any], list[int]]:
    """What stands in a file of ``torch.save``, its tensors mapped; the sizes of its records in order."""
    try:
        with zipfile.ZipFile(real) as archive:
            entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("it is compressed, which torch.save never does")
        content = torch.load(str(real), map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # what a hostile pickle raises is up to its author
        # Of torch's own text only this: the rest advises to read the file without protection.
        found = re.search(r"(?i)unsupported [^\n]{1,120}", str(error))
        known = isinstance(error, ValueError | OSError | zipfile.BadZipFile)
        reason = str(error) if known else found[0] if found else type(error).__name__
        raise ValueError(
            f"{path} cannot be read as tensors ({reason}). It must be what torch.save wrote from a "
            "state dict; a pickle that holds other things is not read, because it could run code."
        ) from error
    sizes = [entry.file_size for entry in entries if "/data/" in entry.filename and entry.file_size]
    if isinstance(content, dict) and isinstance(content.get("model"), dict):
        if set(content) != {"model"}:
            others = ", ".join(sorted(repr(key) for key in content if key != "model"))
            raise ValueError(f"{path} holds more than a model: {others[:300]}.")
        content = content["model"]
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{path} must hold tensors by name, got a {type(content).__name__}.")
    return content, sizes


def _not_plain(name: Any, value: Any) -> str | None:
    """Why something is no name with a plain tensor."""
    if not isinstance(name, str):
        return f"the name is a {type(name).__name__}"
    if type(value) not in (Tensor, nn.Parameter):
        return f"a {type(value).__name__}"
    if value.device.type != "cpu" or value.layout != torch.strided or value.is_quantized:
        return "not dense values"
    return None
