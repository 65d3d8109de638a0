"""What fusion learned, and nothing else, as an artifact.

An artifact is a directory. ``fusion.safetensors`` holds the tensors and, in its header, what model
they are for, so that one file, replaced as a whole, is the truth; ``fusion.json`` repeats the header
for people and scripts.

The header also says which base fusion was trained over (see ``fingerprint``), so that it is not loaded
over another one of the same shapes, and what of the model trained, for the record (see ``description``).
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from torchfuse.checkpoint.artifact.description import describe_fusion, description_problems
from torchfuse.checkpoint.artifact.fingerprint import (
    TensorFingerprint,
    compare,
    explain,
    fingerprint,
    pretrained_tensors,
    read_fingerprint,
)
from torchfuse.checkpoint.tensors import copy_into
from torchfuse.errors import CheckpointError
from torchfuse.io.atomic import write_file, write_text
from torchfuse.io.ranks import is_rank_zero
from torchfuse.params import FreezeSpec, FreezeStage, fusion_buffers, get_fusion_params, is_sharded

__all__ = [
    "ARTIFACT_FILE",
    "FusionMismatch",
    "fusion_state_dict",
    "load_artifact",
    "load_fusion",
    "load_fusion_state_dict",
    "save_fusion",
    "whole",
    "write_artifact",
]

ARTIFACT_FILE: Final = "fusion.safetensors"
_DESCRIPTION: Final = "fusion.json"
_KEY: Final = "torchfuse"


class FusionMismatch(NamedTuple):
    """What a load with ``strict=False`` passed over, by name.

    Attributes:
        missing: tensors of the model that were not given.
        unexpected: tensors given that the model has not.
        mismatched: tensors of another shape.
        base: pretrained tensors that differ from those that the artifact was made over, and how.
        options: how the model was fused otherwise, in words.
    """

    missing: list[str]
    unexpected: list[str]
    mismatched: list[str]
    base: dict[str, str]
    options: list[str]


def _fusion_tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**get_fusion_params(model), **fusion_buffers(model)}


def fusion_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The tensors that fusion added, by canonical name; persistent buffers of its modules included.

    The tensors share memory with the model's, as those of ``state_dict()`` do.

    Raises:
        CheckpointError: if fusion added nothing to this model.
    """
    tensors = {name: tensor.detach() for name, tensor in _fusion_tensors(model).items()}
    if not tensors:
        raise CheckpointError(
            "This model has no fusion parameters. What fusion added is found by fusion_params(); "
            "mark modules of your own with register_fusion_module."
        )
    return tensors


def load_fusion_state_dict(
    model: nn.Module, state_dict: Mapping[str, Tensor], strict: bool = True
) -> FusionMismatch:
    """Copy the tensors that fusion added into a model.

    Args:
        model: a fused model, sharded or not.
        state_dict: what ``fusion_state_dict`` returned.
        strict: whether every tensor must fit. If not, what fits is loaded.

    Returns:
        What was passed over: all empty if ``strict``.

    Raises:
        CheckpointError: with every tensor that is missing, unexpected or of another shape, if
            ``strict``; if none fits at all or the model has no memory, in any case. The model is as it
            was then.
    """
    return _load(model, state_dict, strict, {}, [])


@torch.no_grad()
def _load(
    model: nn.Module,
    state_dict: Mapping[str, Tensor],
    strict: bool,
    base: dict[str, str],
    options: list[str],
) -> FusionMismatch:
    ours = _fusion_tensors(model)
    if any(tensor.is_meta for tensor in ours.values()):
        raise CheckpointError(
            "The model's fusion tensors are on the meta device: give them memory first (model.to_empty)."
        )
    skipped = FusionMismatch(
        missing=[name for name in ours if name not in state_dict],
        unexpected=[name for name in state_dict if name not in ours],
        mismatched=[n for n, t in ours.items() if n in state_dict and t.shape != state_dict[n].shape],
        base=base,
        options=options,
    )
    fitting = [n for n in ours if n in state_dict and n not in skipped.mismatched]
    if (strict and any(skipped)) or not fitting:
        raise CheckpointError(_explain(skipped, ours, state_dict))
    for name in fitting:
        copy_into(ours[name], state_dict[name])
    return skipped


def _explain(skipped: FusionMismatch, ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> str:
    lines = [f"option: {problem}" for problem in skipped.options]
    lines += [f"missing: {name}" for name in skipped.missing]
    lines += [f"unexpected: {name}" for name in skipped.unexpected]
    lines += [
        f"shape: {name} is {list(theirs[name].shape)}, the model's is {list(ours[name].shape)}"
        for name in skipped.mismatched
    ]
    advice = ""
    if lines:
        advice += " Was it fused in the same way (arch, every, adapter, fusion_vocab_size, fusion_head)?"
    if skipped.base:
        lines += explain(skipped.base)
        advice += (
            " Fusion belongs to the base that it was trained over: load that one's pretrained parts "
            "first. Parts that trained with it come with it by load_trained."
        )
    listing = "\n  ".join(lines)
    return f"The fusion tensors do not fit this model; nothing was loaded.{advice}\n  {listing}"


def save_fusion(
    model: nn.Module, path: str | Path, *, stages: Iterable[FreezeSpec | FreezeStage] = ()
) -> None:
    """Write what fusion learned as an artifact; an older one at this place is replaced whole.

    It belongs to the pretrained parts as they are now; if one of them trains, use ``save_trained``.
    On a sharded model every rank calls this and rank zero writes.

    Args:
        model: a fused model.
        path: directory of the artifact, made if need be.
        stages: the freeze specs and stages by which the model was trained, a ``FreezeSchedule`` for
            example. They stand in the artifact in their order, for the record.

    Raises:
        CheckpointError: if fusion added nothing to this model, or the path is no directory.
    """
    tensors = {name: whole(tensor) for name, tensor in fusion_state_dict(model).items()}
    description = describe_fusion(model, stages=stages)
    if is_rank_zero():
        write_artifact(path, tensors, description)


def write_artifact(
    path: str | Path, tensors: Mapping[str, Tensor], description: Mapping[str, Any]
) -> None:
    """Write an artifact from its parts.

    Args:
        path: directory of the artifact, made if need be.
        tensors: what ``fusion_state_dict`` returned.
        description: what ``describe_fusion`` returned.

    Raises:
        CheckpointError: if the path is no directory.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise CheckpointError(f"{path} is a file; an artifact is a directory.")
    text = json.dumps(description, indent=2, sort_keys=True)
    # Tensors that share memory cannot stand in one file.
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    path.mkdir(parents=True, exist_ok=True)
    write_file(path / ARTIFACT_FILE, lambda file: save_file(plain, file, {_KEY: text}))
    write_text(path / _DESCRIPTION, text + "\n")


def load_fusion(model: nn.Module, path: str | Path, strict: bool = True) -> FusionMismatch:
    """Load an artifact of ``save_fusion`` into a model fused in the same way, over the same base.

    On a sharded model every rank calls this.

    Args:
        model: a fused model, with its pretrained parts loaded, in fp32, bf16 or quantized.
        path: directory of the artifact.
        strict: as in ``load_fusion_state_dict``; if not, another base, architecture or option is
            reported, not refused.

    Returns:
        What was passed over: all empty if ``strict``.

    Raises:
        CheckpointError: if there is no such artifact, it is damaged, it is for another architecture or
            another base, or its tensors do not fit. The model is as it was then.
    """
    return load_artifact(model, path, strict=strict)


def load_artifact(
    model: nn.Module, path: str | Path, *, strict: bool, replaced: Collection[str] = ()
) -> FusionMismatch:
    """As ``load_fusion``.

    Args:
        model: as in ``load_fusion``.
        path: as in ``load_fusion``.
        strict: as in ``load_fusion``.
        replaced: pretrained parameters whose values are about to be replaced, so that those which they
            have now do not matter.
    """
    tensors, description, base = read_artifact(path)
    # Artifacts of earlier versions do not say what base they are for.
    other = {} if base is None else compare(base, fingerprint(pretrained_tensors(model, replaced)))
    return _load(model, tensors, strict, other, description_problems(description, model))


def read_artifact(
    path: str | Path,
) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, TensorFingerprint] | None]:
    """The tensors of an artifact, what it says of its model, and the base that it was made over.

    Raises:
        CheckpointError: if there is none, or it is damaged.
    """
    file = Path(path) / ARTIFACT_FILE
    if not file.is_file():
        raise CheckpointError(f"{path} is no artifact of save_fusion: it has no {ARTIFACT_FILE}.")
    try:
        with safe_open(file, framework="pt") as reader:
            description = dict(json.loads((reader.metadata() or {})[_KEY]))
            tensors = {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118
        base = read_fingerprint(description["base"]) if "base" in description else None
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file} is no artifact of save_fusion, or damaged: {error}.") from error
    return tensors, description, base


def whole(tensor: Tensor) -> Tensor:
    """A tensor as every rank may have it: gathered if it is sharded."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor
