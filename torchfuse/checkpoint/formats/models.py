"""The formats of whole models: which one a checkpoint is in, and which can hold a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from torch import nn

from torchfuse.checkpoint.formats.clip import ClipVision
from torchfuse.checkpoint.formats.fused import Fused
from torchfuse.checkpoint.formats.hf_tower import HfTower
from torchfuse.checkpoint.formats.llama import Llama
from torchfuse.checkpoint.formats.llava import Llava
from torchfuse.checkpoint.formats.meta import Meta, has_meta_names
from torchfuse.checkpoint.formats.mllama import Mllama
from torchfuse.checkpoint.formats.parts import read_spec
from torchfuse.checkpoint.formats.spec import ModelSpec, Spec
from torchfuse.checkpoint.formats.torchtune import Torchtune, has_torchtune_names
from torchfuse.errors import CheckpointError
from torchfuse.io.directory import Checkpoint, CheckpointDirectory
from torchfuse.io.torch_file import CheckpointFile
from torchfuse.models.base import FusedModel
from torchfuse.naming import unwrap

__all__ = ["open_checkpoint", "read_model_spec", "spec_to_export"]

_READ: Final[Sequence[type[ModelSpec]]] = (Fused, Llava, Mllama, Torchtune, Meta)
_MODELS: Final[Sequence[type[ModelSpec]]] = (Fused, Llava, Mllama, Torchtune)
_WRITTEN: Final[dict[str, type[Spec]]] = {f.name: f for f in (Fused, Llava, Mllama, Torchtune)}
_PARTS: Final[dict[str, type[Spec]]] = {"llama": Llama, "clip": ClipVision, "hf": HfTower}


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a directory, one of Meta's with its one file, or a file of ``torch.save``.

    Raises:
        CheckpointError: as ``CheckpointDirectory`` and ``CheckpointFile``.
    """
    path = Path(path)
    metas = sorted(path.glob("consolidated*.pth"))
    if metas and not (path / "config.json").exists():
        if len(metas) > 1:
            raise CheckpointError(
                f"{path} holds {len(metas)} files, {metas[0].name} and so on, each with a part of every "
                "tensor. Only models in one file can be read; transformers' directory of the same model "
                "can."
            )
        return CheckpointFile(metas[0])
    return CheckpointFile(path) if path.is_file() else CheckpointDirectory(path)


def read_model_spec(checkpoint: Checkpoint, model: nn.Module | None = None) -> ModelSpec:
    """The settings that a checkpoint of a whole model speaks of.

    Args:
        checkpoint: the checkpoint.
        model: what it is for. A file that says nothing of itself is taken to have been made of this.

    Raises:
        CheckpointError: for an unknown ``model_type``, or a setting that is missing, wrong or cannot be
            expressed.
    """
    config = checkpoint.config
    if "model_type" not in config and has_meta_names(checkpoint):
        config = {**config, "model_type": Meta.name}
        if "n_layers" not in config and model is not None:
            return Meta.of(model)
    elif has_torchtune_names(checkpoint) and config.get("model_type") not in (
        Fused.name,
        Torchtune.name,
    ):
        if model is None:
            raise CheckpointError(
                "the names are torchtune's, and nothing says what model they are of: build it, and give "
                "it to load_pretrained with this checkpoint."
            )
        return Torchtune.of(model)
    spec = read_spec(config, _READ)
    assert isinstance(spec, ModelSpec)
    return spec


def spec_to_export(name: str, model: nn.Module) -> Spec:
    """The settings of a checkpoint of a model, or of a part of one, in the format of a name.

    Raises:
        CheckpointError: for an unknown name, or a model that the format cannot hold, with what of it,
            and the formats that can.
    """
    whole = isinstance(unwrap(model), FusedModel)
    formats = _WRITTEN if whole else _PARTS
    if name not in formats:
        raise CheckpointError(
            f"Unknown format {name!r} for {'a fused model' if whole else 'a part'}; there are "
            f"{', '.join(formats)}."
        )
    try:
        return formats[name].of(unwrap(model)).to_export(unwrap(model))
    except ValueError as error:
        others = [other for other in formats if other != name and _can_hold(formats[other], model)]
        hint = f"Formats that can: {', '.join(others)}." if others else "No format here can."
        raise CheckpointError(f"{error} {hint}") from error


def _can_hold(format_: type[Spec], model: nn.Module) -> bool:
    try:
        format_.of(unwrap(model))
    except ValueError:
        return False
    return True
