"""Configurations without weights: of a directory, or of a published checkpoint by its name.

A model on the meta device needs no weights, so its size and memory are known before anything is
downloaded.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from torchfuse.errors import CheckpointError
from torchfuse.io.directory import Checkpoint
from torchfuse.io.strict_json import parse, read_json

__all__ = ["CheckpointConfig", "published_config"]

_VARIANT: Final = "-Instruct"  # of the same sizes


class CheckpointConfig(Checkpoint):
    """The configuration of a checkpoint, without its tensors.

    Args:
        path: a directory with ``config.json``. One that does not exist may have the name of a published
            checkpoint: ``checkpoints/Llama-3.1-8B-Instruct``.

    Attributes:
        is_published: whether the configuration is that of the published checkpoint.

    Raises:
        CheckpointError: if there is no such directory, and no published checkpoint of its name is known.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._shapes, self._dtypes = {}, {}
        self.is_published = not self.path.exists()
        published = published_config(self.path)
        if self.is_published and published is None:
            raise CheckpointError(
                f"{self.path} does not exist, and its name is not that of a checkpoint whose sizes are "
                f"known: {', '.join(_published())}."
            )
        self.config = (published if self.is_published else None) or read_json(self.path / "config.json")

    def read(self, name: str) -> Tensor:
        raise KeyError(name)

    def close(self) -> None:
        """There is nothing to close."""


def published_config(path: str | Path) -> dict[str, Any] | None:
    """Return the configuration of the published checkpoint that a directory is named after, if known.

    Examples:
        >>> published_config("checkpoints/Llama-3.2-1B-Instruct")["num_hidden_layers"]
        16
    """
    config: dict[str, Any] | None = _published().get(Path(path).name.removesuffix(_VARIANT))
    return config


def _published() -> dict[str, Any]:
    file = resources.files("torchfuse.checkpoint") / "published.json"
    content: dict[str, Any] = parse(file.read_bytes())
    return content
