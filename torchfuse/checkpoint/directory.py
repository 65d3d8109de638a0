"""A Hugging Face directory as one table of tensors, whether it is one file or many.

Only headers are read at first: names, shapes and dtypes of everything are known before a single value
is. Tensors are then read one by one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from safetensors import SafetensorError, safe_open
from torch import Tensor

__all__ = ["CheckpointDirectory", "read_json"]

_ONE_FILE: Final = "model.safetensors"
_INDEX: Final = "model.safetensors.index.json"


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ValueError: if the file is missing or holds no JSON object, naming it.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}.") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no JSON: {error}.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, got a {type(value).__name__}.")
    return value


class CheckpointDirectory(Mapping[str, tuple[int, ...]]):
    """The tensors of a directory by name: their shapes at once, their values on demand.

    Use it as a context manager, which closes the files.

    Args:
        path: a directory with ``config.json`` and ``model.safetensors``, or several files and
            ``model.safetensors.index.json``.

    Raises:
        ValueError: if it is no such directory, naming what is wrong with it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._files = ExitStack()
        if not self.path.is_dir():
            raise ValueError(f"{self.path} is not a directory; give a Hugging Face checkpoint.")
        if not (self.path / "config.json").is_file():
            raise ValueError(f"{self.path} is not a checkpoint: it has no config.json.")
        self.config = read_json(self.path / "config.json")
        self._reader: dict[str, Any] = {}
        try:
            for file, names in self._layout().items():
                self._open(file, names)
        except BaseException:
            self._files.close()
            raise
        self._shapes = {
            name: tuple(reader.get_slice(name).get_shape()) for name, reader in self._reader.items()
        }

    def _layout(self) -> dict[str, list[str] | None]:
        """The files, and for each what the index says is in it (None: whatever is)."""
        index = self.path / _INDEX
        if (self.path / _ONE_FILE).is_file() and not index.is_file():
            return {_ONE_FILE: None}
        if not index.is_file():
            others = sorted(p.name for p in self.path.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
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
        for name, file in weight_map.items():
            if not isinstance(file, str) or Path(file).name != file:
                raise ValueError(f"{index} puts {name} in {file!r}, which is no file beside it.")
            names = layout.setdefault(file, [])
            assert names is not None
            names.append(name)
        return layout

    def _open(self, file: str, names: list[str] | None) -> None:
        path = self.path / file
        if not path.is_file():
            raise ValueError(f"{self.path} is incomplete: {file} is missing.")
        try:
            reader = self._files.enter_context(safe_open(path, framework="pt"))
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is damaged: {error}.") from error
        held = set(reader.keys())
        if names is not None and held != set(names):
            wrong = sorted(held ^ set(names))
            raise ValueError(
                f"{path} and {_INDEX} disagree about {len(wrong)} tensors, such as {wrong[0]}."
            )
        self._reader.update(dict.fromkeys(held, reader))

    def __getitem__(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def read(self, name: str) -> Tensor:
        """The values of one tensor, on the CPU."""
        return self._reader[name].get_tensor(name)

    def __enter__(self) -> CheckpointDirectory:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._files.close()
