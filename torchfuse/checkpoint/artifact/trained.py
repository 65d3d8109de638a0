"""Everything that a run trained: what fusion added, and trained tensors of pretrained parts.

Usually that is the fusion-only artifact alone. Where a pretrained part trains too, its trained tensors,
and the buffers that change with them, are in ``trained.safetensors`` beside the artifact. That file
holds a digest of the artifact, so that files of two runs are not loaded together.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from torchfuse.checkpoint.artifact.description import describe_fusion
from torchfuse.checkpoint.artifact.fingerprint import pretrained_tensors
from torchfuse.checkpoint.artifact.fusion import artifact_file, load_artifact, write_artifact
from torchfuse.checkpoint.artifact.state_dict import fusion_state_dict
from torchfuse.checkpoint.tensors import copy_into, gather_full, to_safetensors
from torchfuse.errors import CheckpointError, ConfigError
from torchfuse.io.ranks import is_rank_zero
from torchfuse.naming import named_parameters
from torchfuse.params import FreezeSpec, FreezeStage

__all__ = ["load_trained", "save_trained", "trained_pretrained_names", "write_trained"]

_FILE: Final = "trained.safetensors"
_KEY: Final = "torchfuse.artifact"


def trained_pretrained_names(model: nn.Module) -> list[str]:
    """Return the names of pretrained parameters that train."""
    added = fusion_state_dict(model)
    return [n for n, p in named_parameters(model) if p.requires_grad and n not in added]


def save_trained(
    model: nn.Module,
    path: str | Path,
    *,
    trained: Collection[str] | None = None,
    stages: Iterable[FreezeSpec | FreezeStage] = (),
) -> None:
    """Write the tensors that fusion added, and the pretrained parameters that were trained.

    On a sharded model every rank calls this and rank zero writes.

    Args:
        model: a fused model.
        path: directory of the artifact, made if need be.
        trained: names of the parameters that were trained at any time, as
            ``FreezeSchedule.trained_ever`` returns them; fusion parameters may be among them. None:
            those that train now.
        stages: as for ``save_fusion``.

    Raises:
        ConfigError: if a name is no parameter of the model.
        ModelError: if fusion added nothing to this model.
        CheckpointError: if the path is no directory, or the disk cannot be written to.
    """
    pretrained, added = pretrained_tensors(model), fusion_state_dict(model)
    if trained is None:
        trained = trained_pretrained_names(model)
    names = [name for name in trained if name not in added]
    if unknown := [name for name in names if name not in pretrained]:
        raise ConfigError(
            f"trained has names that are no parameters of the model: {', '.join(unknown[:8])}."
        )
    fusion = {name: gather_full(tensor) for name, tensor in added.items()}
    # Buffers such as running means change with the parameters of their module.
    changed = pretrained.keys() - pretrained_tensors(model, names).keys()
    kept = {name: gather_full(tensor) for name, tensor in pretrained.items() if name in changed}
    description = describe_fusion(model, without=kept, stages=stages)
    if is_rank_zero():
        write_trained(path, fusion, kept, description)


def write_trained(
    path: str | Path,
    fusion: Mapping[str, Tensor],
    trained: Mapping[str, Tensor],
    description: Mapping[str, Any],
) -> None:
    """Write what ``save_trained`` writes, from its parts.

    Args:
        path: directory of the artifact, made if need be.
        fusion: the tensors that fusion added.
        trained: pretrained tensors that were trained.
        description: what ``describe_fusion`` returned, without what trained.
    """

    def write(file: Path) -> None:
        save_file(to_safetensors(trained), file, {_KEY: _digest(file.parent)})

    write_artifact(path, fusion, description, {_FILE: write} if trained else None)
    if not trained:
        (Path(path) / _FILE).unlink(missing_ok=True)


@torch.no_grad()
def load_trained(model: nn.Module, path: str | Path) -> None:
    """Load what ``save_trained`` wrote into a model fused in the same way, over the same checkpoints.

    Args:
        model: a fused model, sharded or not, with its pretrained parts loaded.
        path: directory of the artifact.

    Raises:
        CheckpointError: if something does not fit, is damaged or belongs to another artifact. The
            model is unchanged then.
    """
    path = Path(path)
    file = path / _FILE
    tensors = _read(file, _digest(path)) if file.is_file() else {}
    targets = pretrained_tensors(model)
    wrong = [
        f"{name} {list(tensor.shape)}"
        for name, tensor in tensors.items()
        if name not in targets or targets[name].shape != tensor.shape or targets[name].is_meta
    ]
    if wrong:
        raise CheckpointError(
            f"{file} does not fit this model; nothing was loaded: {'; '.join(wrong[:8])}."
        )
    load_artifact(model, path, strict=True, replaced=tensors)
    for name, tensor in tensors.items():
        copy_into(targets[name], tensor)


def _read(file: Path, digest: str) -> dict[str, Tensor]:
    try:
        with safe_open(file, framework="pt") as reader:
            belongs_to = (reader.metadata() or {}).get(_KEY)
            tensors = {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is damaged: {error}.") from error
    if belongs_to != digest:
        raise CheckpointError(
            f"{file} does not belong to the {artifact_file(file.parent).name} beside it: a save was "
            "interrupted between the two, or one of them was replaced."
        )
    return tensors


def _digest(path: Path) -> str:
    with artifact_file(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
