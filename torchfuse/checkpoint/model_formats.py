"""The formats of whole models: which one a checkpoint is in, and which can hold a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from torch import nn

from torchfuse.checkpoint.directory import Checkpoint, CheckpointDirectory, CheckpointFile
from torchfuse.checkpoint.formats import read_spec
from torchfuse.checkpoint.fused import Fused
from torchfuse.checkpoint.llava import Llava
from torchfuse.checkpoint.meta import Meta, has_meta_names
from torchfuse.checkpoint.mllama import Mllama
from torchfuse.checkpoint.spec import ModelSpec
from torchfuse.checkpoint.torchtune import Torchtune, has_torchtune_names

__all__ = ["model_spec", "open_checkpoint", "read_model_spec"]

_READ: Final[Sequence[type[ModelSpec]]] = (Fused, Llava, Mllama, Torchtune, Meta)
_WRITTEN: Final[dict[str, type[ModelSpec]]] = {f.name: f for f in (Fused, Llava, Mllama, Torchtune)}


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a directory, one of Meta's with its one file, or a file of ``torch.save``.

    Raises:
        ValueError: as ``CheckpointDirectory`` and ``CheckpointFile``.
    """
    path = Path(path)
    metas = path / "consolidated.00.pth"
    if metas.is_file() and not (path / "config.json").exists():
        return CheckpointFile(metas)
    return CheckpointFile(path) if path.is_file() else CheckpointDirectory(path)


def read_model_spec(checkpoint: Checkpoint, model: nn.Module | None = None) -> ModelSpec:
    """The settings that a checkpoint of a whole model speaks of.

    Args:
        checkpoint: the checkpoint.
        model: what it is for. A file that says nothing of itself is taken to have been made of this.

    Raises:
        ValueError: for an unknown ``model_type``, or a setting that is missing, wrong or cannot be
            expressed.
    """
    config = checkpoint.config
    if "model_type" not in config and has_meta_names(checkpoint):
        config = {**config, "model_type": Meta.name}
        if "n_layers" not in config and model is not None:
            return Meta.of(model)
    elif has_torchtune_names(checkpoint) and config.get("model_type") not in _WRITTEN:
        if model is None:
            raise ValueError(
                "the names are torchtune's, and nothing says what model they are of: build it, and give "
                "it to load_pretrained with this checkpoint."
            )
        return Torchtune.of(model)
    spec = read_spec(config, _READ)
    assert isinstance(spec, ModelSpec)
    return spec


def model_spec(name: str, model: nn.Module) -> ModelSpec:
    """The settings of a model in the format of a name.

    Raises:
        ValueError: for an unknown name, or a model that the format cannot hold, with what of it, and the
            formats that can.
    """
    if name not in _WRITTEN:
        raise ValueError(f"Unknown format {name!r}; there are {', '.join(_WRITTEN)}.")
    try:
        spec = _WRITTEN[name].of(model)
    except ValueError as error:
        others = [other for other in _WRITTEN if other != name and _can_hold(other, model)]
        hint = f"Formats that can: {', '.join(others)}." if others else "No format here can."
        raise ValueError(f"{error} {hint}") from error
    assert isinstance(spec, ModelSpec)
    return spec


def _can_hold(name: str, model: nn.Module) -> bool:
    try:
        _WRITTEN[name].of(model)
    except ValueError:
        return False
    return True
