"""Which format is whose: by the module that a part of a model is, and by what a directory says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from torch import nn

from torchfuse.checkpoint.formats.clip import ClipVision
from torchfuse.checkpoint.formats.hf_tower import HfTower
from torchfuse.checkpoint.formats.llama import Llama
from torchfuse.checkpoint.formats.mllama_vision import MllamaVision
from torchfuse.checkpoint.formats.spec import Spec
from torchfuse.errors import CheckpointError
from torchfuse.naming import unwrap

__all__ = ["DECODERS", "ENCODERS", "format_of", "read_spec"]

DECODERS: Final[Sequence[type[Spec]]] = (Llama,)
ENCODERS: Final[Sequence[type[Spec]]] = (ClipVision, MllamaVision, HfTower)


def format_of(module: nn.Module, formats: Sequence[type[Spec]]) -> type[Spec]:
    """The format that a module is of.

    Raises:
        CheckpointError: if it is of none.
    """
    inner = unwrap(module)
    for format_ in formats:
        if format_.holds(inner):
            return format_
    raise CheckpointError(
        f"No checkpoint format here is for a {type(inner).__name__}; there are "
        f"{', '.join(format_.name for format_ in formats)}."
    )


def read_spec(config: Mapping[str, Any], formats: Sequence[type[Spec]]) -> Spec:
    """The settings that a ``config.json`` holds.

    Raises:
        CheckpointError: for an unknown ``model_type``, or a setting that is missing, wrong or cannot be
            expressed.
    """
    kind = config.get("model_type")
    for format_ in formats:
        if format_.reads(config):
            return format_.from_config(config)
    known = sorted(kind for format_ in formats for kind in format_.model_types)
    raise CheckpointError(f"config.json says model_type {kind!r}; known here: {', '.join(known)}.")
