"""Errors that a caller can cause and mend, by what has to be mended.

Each is a ``ValueError``, so that code which catches those keeps working. Recipes print a
``ConfigError``, a ``DataError`` or a ``CheckpointError`` as one sentence; any other exception keeps
its traceback.
"""

from collections.abc import Sequence
from os import PathLike
from typing import Final

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "FusionError",
    "ModelError",
    "name_problems",
]

_LISTED: Final = 16  # problems that are listed one by one


class FusionError(ValueError):
    """Base of all errors that torchfuse raises on purpose."""


class ConfigError(FusionError):
    """An option or a key of a configuration is unknown, missing or out of range."""


class DataError(FusionError):
    """A sample, an image or a file of samples cannot be used."""


class CheckpointError(FusionError):
    """A file, a directory or a state dict cannot be read, written or loaded into this model."""


class ModelError(FusionError):
    """Modules or tensors do not fit each other, or a model cannot do what was requested."""


def name_problems(path: str | PathLike[str], problems: Sequence[str]) -> str:
    """Return one message for all problems of a file.

    Examples:
        >>> print(name_problems("a.jsonl", ["line 3: no JSON."]))
        a.jsonl, line 3: no JSON.
        >>> print(name_problems("a.jsonl", ["line 3: no JSON.", "line 5: no JSON."]))
        a.jsonl has 2 problems:
          line 3: no JSON.
          line 5: no JSON.
    """
    if len(problems) == 1:
        return f"{path}, {problems[0]}"
    more = [f"and {len(problems) - _LISTED} more"] if len(problems) > _LISTED else []
    return "\n  ".join([f"{path} has {len(problems)} problems:", *problems[:_LISTED], *more])
