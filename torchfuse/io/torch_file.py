"""Reader for files of ``torch.save`` that executes nothing in them."""

from __future__ import annotations

import os
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchfuse.errors import CheckpointError
from torchfuse.io.directory import PICKLE_SUFFIXES, Checkpoint, CheckpointDirectory
from torchfuse.io.strict_json import read_json, regular_file

__all__ = ["CheckpointFile", "open_checkpoint"]


class CheckpointFile(Checkpoint):
    """A file of ``torch.save`` that holds tensors by name, such as Meta's or torchtune's.

    torch's restricted unpickler reads it, which executes nothing. If the file has one entry ``model``,
    as torchtune's files have, that is read. ``config`` is the object in ``params.json`` or else in
    ``config.json`` beside the file, and empty if there is neither.

    Args:
        path: a file that ends in ``.pt``, ``.pth`` or ``.bin``.

    Raises:
        CheckpointError: if it is no such file, damaged, or contains anything but plain tensors by name.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if self.path.suffix not in PICKLE_SUFFIXES:
            raise CheckpointError(
                f"{self.path} must be a file that ends in one of {', '.join(PICKLE_SUFFIXES)}."
            )
        real = regular_file(self.path.parent, self.path.name)
        beside = (self.path.parent / name for name in ("params.json", "config.json"))
        self.config = next((read_json(file) for file in beside if os.path.lexists(file)), {})
        self._tensors, sizes = _unpickle(real, self.path)
        wrong = [
            f"{name!r} ({why})" for name, t in self._tensors.items() if (why := _not_plain(name, t))
        ]
        if wrong:
            raise CheckpointError(
                f"{self.path} must hold plain tensors by name and nothing else, got "
                f"{', '.join(wrong[:8])}{' and more' if len(wrong) > 8 else ''}."
            )
        storages = [tensor.untyped_storage() for tensor in self._tensors.values()]
        by_address = {storage.data_ptr(): storage.nbytes() for storage in storages if storage.nbytes()}
        if [by_address[address] for address in sorted(by_address)] != sizes:
            raise CheckpointError(f"{self.path} is damaged: its tensors do not fill its records.")
        self._shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}
        self._dtypes = {name: tensor.dtype for name, tensor in self._tensors.items()}

    def read(self, name: str) -> Tensor:
        return self._tensors[name].detach()

    def close(self) -> None:
        self._tensors = {}


def _unpickle(real: Path, path: Path) -> tuple[dict[Any, Any], list[int]]:
    """Return the contents of a file, its tensors mapped, and the sizes of its records in order."""
    try:
        with zipfile.ZipFile(real) as archive:
            entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise CheckpointError("it is compressed, which torch.save never does")
        content = torch.load(str(real), map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # a hostile pickle can raise any
        # Of torch's message only this: the rest recommends weights_only=False.
        found = re.search(r"(?i)unsupported [^\n]{1,120}", str(error))
        known = isinstance(error, ValueError | OSError | zipfile.BadZipFile)
        reason = str(error) if known else found[0] if found else type(error).__name__
        raise CheckpointError(
            f"{path} cannot be read as tensors ({reason}). It must be what torch.save wrote from a "
            "state dict; a pickle that contains anything else is not read, because it could run code."
        ) from error
    sizes = [entry.file_size for entry in entries if "/data/" in entry.filename and entry.file_size]
    if isinstance(content, dict) and isinstance(content.get("model"), dict):
        if set(content) != {"model"}:
            others = ", ".join(sorted(repr(key) for key in content if key != "model"))
            raise CheckpointError(f"{path} contains more than a model: {others[:300]}.")
        content = content["model"]
    if not isinstance(content, dict) or not content:
        raise CheckpointError(f"{path} must hold tensors by name, got a {type(content).__name__}.")
    return content, sizes


def _not_plain(name: Any, value: Any) -> str | None:
    """Return why an entry is not a name with a plain tensor; None if it is."""
    if not isinstance(name, str):
        return f"the name is a {type(name).__name__}"
    if type(value) not in (Tensor, nn.Parameter):
        return f"a {type(value).__name__}"
    if value.device.type != "cpu" or value.layout != torch.strided or value.is_quantized:
        return "not dense values"
    return None


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a checkpoint: a directory, a file of ``torch.save``, or Meta's directory with one such file.

    Raises:
        CheckpointError: as ``CheckpointDirectory`` and ``CheckpointFile``.
    """
    path = Path(path)
    files = sorted(path.glob("consolidated*.pth"))
    if not files or (path / "config.json").exists():
        return CheckpointFile(path) if path.is_file() else CheckpointDirectory(path)
    if len(files) > 1:
        raise CheckpointError(
            f"{path} has {len(files)} files, {files[0].name} and so on, each with a part of every "
            "tensor. Only models in one file can be read; transformers' directory of the same model can."
        )
    return CheckpointFile(files[0])
