"""Fusion-only artifacts: directories with the tensors that fusion added, and nothing else.

``fusion.safetensors`` holds the tensors and, in its header, the description of the model, so that one
file, replaced in one step, is the whole artifact. ``fusion.json`` repeats the description in readable
form. A load compares the description and the base fingerprint with the model (see ``description`` and
``fingerprint``).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from torchfuse.checkpoint.artifact.description import describe_fusion, description_problems
from torchfuse.checkpoint.artifact.fingerprint import (
    TensorFingerprint,
    compare_fingerprints,
    fingerprint,
    pretrained_tensors,
    read_fingerprint,
)
from torchfuse.checkpoint.artifact.state_dict import (
    FusionMismatch,
    copy_fusion_tensors,
    fusion_state_dict,
)
from torchfuse.checkpoint.tensors import gather_full, to_safetensors
from torchfuse.errors import CheckpointError
from torchfuse.io.atomic import write_files
from torchfuse.io.ranks import is_rank_zero
from torchfuse.params import FreezeSpec, FreezeStage

__all__ = [
    "Artifact",
    "artifact_file",
    "load_artifact",
    "load_fusion",
    "read_artifact",
    "save_fusion",
    "write_artifact",
]

_FILE: Final = "fusion.safetensors"
_DESCRIPTION: Final = "fusion.json"
_KEY: Final = "torchfuse"


def save_fusion(
    model: nn.Module, path: str | Path, *, stages: Iterable[FreezeSpec | FreezeStage] = ()
) -> None:
    """Write the tensors that fusion added as an artifact; an older one is replaced in one step.

    The artifact belongs to the present values of the pretrained parts; if one of them trains, use
    ``save_trained``. On a sharded model every rank calls this and rank zero writes.

    Args:
        model: a fused model.
        path: directory of the artifact, made if need be.
        stages: the freeze specs and stages by which the model was trained, a ``FreezeSchedule`` for
            example; the artifact records them in their order.

    Raises:
        ModelError: if fusion added nothing to this model.
        CheckpointError: if the path is no directory, or the disk cannot be written to.
    """
    tensors = {name: gather_full(tensor) for name, tensor in fusion_state_dict(model).items()}
    description = describe_fusion(model, stages=stages)
    if is_rank_zero():
        write_artifact(path, tensors, description)


def write_artifact(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    description: Mapping[str, Any],
    more: Mapping[str, Callable[[Path], None]] | None = None,
) -> None:
    """Write an artifact from its parts: either all files or none, but for a crash between two renames.

    Args:
        path: directory of the artifact, made if need be.
        tensors: what ``fusion_state_dict`` returned.
        description: what ``describe_fusion`` returned.
        more: other files of the artifact, as for ``write_files``.

    Raises:
        CheckpointError: if the path is no directory, or as ``write_files``.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise CheckpointError(f"{path} is a file; an artifact is a directory.")
    text = json.dumps(description, indent=2, sort_keys=True)
    files: dict[str, Callable[[Path], object]] = {
        _FILE: lambda file: save_file(to_safetensors(tensors), file, {_KEY: text}),
        _DESCRIPTION: lambda file: file.write_text(text + "\n", encoding="utf-8"),
    }
    write_files(path, files | dict(more or {}))


def load_fusion(model: nn.Module, path: str | Path, strict: bool = True) -> FusionMismatch:
    """Load an artifact of ``save_fusion`` into a model fused in the same way, over the same base.

    On a sharded model every rank calls this.

    Args:
        model: a fused model, with its pretrained parts loaded, in fp32, bf16 or quantized.
        path: directory of the artifact.
        strict: as in ``load_fusion_state_dict``; if not, another base, architecture or option is
            reported, not refused.

    Returns:
        What was ignored: all empty if ``strict``.

    Raises:
        CheckpointError: if there is no such artifact, it is damaged, it is for another architecture or
            another base, or its tensors do not fit.
        ModelError: if the model is on the meta device. In both cases the model is unchanged.
    """
    return load_artifact(model, path, strict=strict)


def load_artifact(
    model: nn.Module, path: str | Path, *, strict: bool, replaced: Collection[str] = ()
) -> FusionMismatch:
    """Load an artifact beside which other tensors of the model are loaded.

    Args:
        model: as in ``load_fusion``.
        path: as in ``load_fusion``.
        strict: as in ``load_fusion``.
        replaced: pretrained parameters that are overwritten next, so that their present values are not
            compared.
    """
    artifact = read_artifact(path)
    base: dict[str, str] = {}
    if artifact.base is not None:
        own = fingerprint(pretrained_tensors(model, replaced))
        base = compare_fingerprints(artifact.base, own)
    options = description_problems(artifact.description, model)
    return copy_fusion_tensors(model, artifact.tensors, strict, base, options)


class Artifact(NamedTuple):
    """The content of an artifact.

    Attributes:
        tensors: the tensors that fusion added, by name.
        description: what ``describe_fusion`` returned.
        base: the base fingerprint; None in artifacts of the first version, which have none.
    """

    tensors: dict[str, Tensor]
    description: dict[str, Any]
    base: dict[str, TensorFingerprint] | None


def read_artifact(path: str | Path) -> Artifact:
    """Read an artifact.

    Raises:
        CheckpointError: if there is none, or it is damaged.
    """
    file = artifact_file(path)
    try:
        with safe_open(file, framework="pt") as reader:
            description = dict(json.loads((reader.metadata() or {})[_KEY]))
            tensors = {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118
        base = read_fingerprint(description["base"]) if "base" in description else None
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file} is no artifact of save_fusion, or damaged: {error}.") from error
    return Artifact(tensors, description, base)


def artifact_file(path: str | Path) -> Path:
    """Return the file of an artifact that holds its tensors.

    Raises:
        CheckpointError: if there is none.
    """
    file = Path(path) / _FILE
    if not file.is_file():
        raise CheckpointError(f"{path} is no artifact of save_fusion: it has no {_FILE}.")
    return file
