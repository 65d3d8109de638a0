"""All that a run learned: what fusion added, and whatever else of the model it trained.

Usually that is the fusion-only artifact and nothing else. Where a pretrained part trains too, its
trained tensors, and the buffers that training moves with them, stand beside the artifact in
``trained.safetensors``, which says by a digest which artifact it belongs to, so that files of two runs
are never taken for one.
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
from torchfuse.checkpoint.artifact.fusion import (
    ARTIFACT_FILE,
    fusion_state_dict,
    load_artifact,
    whole,
    write_artifact,
)
from torchfuse.checkpoint.tensors import copy_into
from torchfuse.errors import CheckpointError
from torchfuse.io.atomic import write_file
from torchfuse.io.ranks import is_rank_zero
from torchfuse.naming import named_parameters
from torchfuse.params import FreezeSpec, FreezeStage

__all__ = ["load_trained", "save_trained", "trained_pretrained_names", "write_trained"]

_FILE: Final = "trained.safetensors"
_KEY: Final = "torchfuse.artifact"


def trained_pretrained_names(model: nn.Module) -> list[str]:
    """Names of pretrained parameters that train."""
    added = fusion_state_dict(model)
    return [n for n, p in named_parameters(model) if p.requires_grad and n not in added]


def save_trained(
    model: nn.Module,
    path: str | Path,
    *,
    trained: Collection[str] | None = None,
    stages: Iterable[FreezeSpec | FreezeStage] = (),
) -> None:
    """Write what fusion learned, and the pretrained parameters that were trained.

    On a sharded model every rank calls this and rank zero writes.

    Args:
        model: a fused model.
        path: directory of the artifact, made if need be.
        trained: names of the parameters that were trained at any time, as
            ``FreezeSchedule.trained_ever`` returns them; those of what fusion added may be among them.
            None: what trains now.
        stages: as for ``save_fusion``.

    Raises:
        CheckpointError: if fusion added nothing to this model, a name is no parameter's, or the path
            is no directory.
    """
    pretrained, added = pretrained_tensors(model), fusion_state_dict(model)
    if trained is None:
        trained = trained_pretrained_names(model)
    names = [name for name in trained if name not in added]
    if unknown := [name for name in names if name not in pretrained]:
        raise CheckpointError(
            f"trained names what is no parameter of the model: {', '.join(unknown[:8])}."
        )
    fusion = {name: whole(tensor) for name, tensor in added.items()}
    # Running means and the like move with the parameters beside them.
    moved = pretrained.keys() - pretrained_tensors(model, names).keys()
    kept = {name: whole(tensor) for name, tensor in pretrained.items() if name in moved}
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
    path = Path(path)
    write_artifact(path, fusion, description)
    if trained:
        tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in trained.items()}
        header = {_KEY: _digest(path)}
        write_file(path / _FILE, lambda file: save_file(tensors, file, header))
    else:
        (path / _FILE).unlink(missing_ok=True)


@torch.no_grad()
def load_trained(model: nn.Module, path: str | Path) -> None:
    """Load what ``save_trained`` wrote into a model fused in the same way, over the same checkpoints.

    Args:
        model: a fused model, sharded or not, with its pretrained parts loaded.
        path: directory of the artifact.

    Raises:
        CheckpointError: if something does not fit, is damaged or belongs to another artifact. The
            model is as it was then.
    """
    path = Path(path)
    file = path / _FILE
    tensors = _read(file, _digest(path)) if file.is_file() else {}
    ours = pretrained_tensors(model)
    wrong = [
        f"{name} {list(tensor.shape)}"
        for name, tensor in tensors.items()
        if name not in ours or ours[name].shape != tensor.shape or ours[name].is_meta
    ]
    if wrong:
        raise CheckpointError(
            f"{file} does not fit this model; nothing was loaded: {'; '.join(wrong[:8])}."
        )
    load_artifact(model, path, strict=True, replaced=tensors)
    for name, tensor in tensors.items():
        copy_into(ours[name], tensor)


def _read(file: Path, digest: str) -> dict[str, Tensor]:
    try:
        with safe_open(file, framework="pt") as reader:
            belongs_to = (reader.metadata() or {}).get(_KEY)
            tensors = {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is damaged: {error}.") from error
    if belongs_to != digest:
        raise CheckpointError(
            f"{file} does not belong to the {ARTIFACT_FILE} beside it: a save was cut off between the "
            "two, or one of them was replaced."
        )
    return tensors


def _digest(path: Path) -> str:
    file = path / ARTIFACT_FILE
    if not file.is_file():
        raise CheckpointError(f"{path} is no artifact of save_fusion: it has no {ARTIFACT_FILE}.")
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
