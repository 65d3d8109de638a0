"""The JSON file of a run's checkpoint: all that is no tensor."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

from torchfuse.checkpoint.artifact.fingerprint import TensorFingerprint, read_fingerprint
from torchfuse.checkpoint.run.optimizer_state import are_strings, is_optimizer_description
from torchfuse.errors import CheckpointError

__all__ = ["Description", "json_problems", "read_description"]

_FORMAT: Final = 1


class Description(NamedTuple):
    """All of a checkpoint that is no tensor.

    Attributes:
        step: the number of steps that were taken.
        trainable: names of the parameters that trained.
        optimizer: as ``optimizer_contents`` returns it; None if no optimizer was saved.
        extra: what the caller added.
        base: fingerprints of the model's tensors that were not saved, by name.
    """

    step: int
    trainable: list[str]
    optimizer: dict[str, Any] | None
    extra: dict[str, Any]
    base: dict[str, TensorFingerprint]

    def to_json(self) -> str:
        """Return the text of the file."""
        base = {name: tensor._asdict() for name, tensor in self.base.items()}
        return json.dumps({"format": _FORMAT, **self._asdict(), "base": base}, indent=1)


def read_description(file: Path) -> Description:
    """Read the file that has the text of ``Description.to_json``.

    Raises:
        CheckpointError: if it is missing, damaged or something else.
    """
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        if data.pop("format") != _FORMAT:
            raise CheckpointError(f"its format is not {_FORMAT}")
        base = read_fingerprint(data.pop("base", {}))  # earlier versions saved all tensors
        found = Description(**data, base=base)
        good = type(found.step) is int and isinstance(found.extra, dict) and are_strings(found.trainable)
        if not good or (found.optimizer is not None and not is_optimizer_description(found.optimizer)):
            raise TypeError("an entry has another type")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{file} is damaged, or no file of save_checkpoint: {error!r}.") from error
    return found


def json_problems(value: Any, where: str) -> list[str]:
    """Return what of a value would not be the same after it was written to JSON and read.

    ``json`` itself turns tuples into lists and all keys into strings without an error.

    Args:
        value: any value.
        where: a name for it.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return []
    parts: Iterator[tuple[str, Any]]
    if isinstance(value, dict):
        if keys := [repr(key) for key in value if not isinstance(key, str)]:
            return [f"{where} has keys that are no strings: {', '.join(keys)}"]
        parts = ((f"{where}[{key!r}]", part) for key, part in value.items())
    elif isinstance(value, list):
        parts = ((f"{where}[{index}]", part) for index, part in enumerate(value))
    else:
        return [f"{where} is a {type(value).__name__}; JSON has dict, list, str, int, float, bool, None"]
    try:
        return [problem for name, part in parts for problem in json_problems(part, name)]
    except RecursionError:
        return [f"{where} is nested too deeply, or within itself"]
