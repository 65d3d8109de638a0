"""The tensors that fusion added to a model, as a state dict."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from torchfuse.checkpoint.artifact.fingerprint import format_differences
from torchfuse.checkpoint.tensors import copy_into
from torchfuse.errors import CheckpointError, ModelError
from torchfuse.params import fusion_buffers, get_fusion_params

__all__ = [
    "FusionMismatch",
    "copy_fusion_tensors",
    "fusion_state_dict",
    "fusion_tensors",
    "load_fusion_state_dict",
]


class FusionMismatch(NamedTuple):
    """What a load with ``strict=False`` ignored, by name.

    Attributes:
        missing: tensors of the model that were not given.
        unexpected: tensors given that the model does not have.
        mismatched: tensors of another shape.
        base: differences from the base that the artifact was trained over, by name of the tensor.
        options: differences in how the model was fused.
    """

    missing: list[str]
    unexpected: list[str]
    mismatched: list[str]
    base: dict[str, str]
    options: list[str]


def fusion_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors that fusion added, by canonical name; persistent buffers included.

    The tensors share memory with the model's, as those of ``state_dict()`` do.

    Raises:
        ModelError: if fusion added nothing to this model.
    """
    tensors = {name: tensor.detach() for name, tensor in fusion_tensors(model).items()}
    if not tensors:
        raise ModelError(
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
        strict: whether every tensor must fit. If not, those that fit are loaded.

    Returns:
        What was ignored: all empty if ``strict``.

    Raises:
        ModelError: if the model is on the meta device.
        CheckpointError: with every tensor that is missing, unexpected or of another shape, if
            ``strict``; if none fits at all, in any case. In both cases the model is unchanged.
    """
    return copy_fusion_tensors(model, state_dict, strict, {}, [])


def fusion_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and persistent buffers that fusion added, by canonical name."""
    return {**get_fusion_params(model), **fusion_buffers(model)}


@torch.no_grad()
def copy_fusion_tensors(
    model: nn.Module,
    state_dict: Mapping[str, Tensor],
    strict: bool,
    base: dict[str, str],
    options: list[str],
) -> FusionMismatch:
    """Load a state dict, given the other differences between its model and this one.

    Args:
        model: as for ``load_fusion_state_dict``.
        state_dict: as for ``load_fusion_state_dict``.
        strict: as for ``load_fusion_state_dict``.
        base: see ``FusionMismatch``.
        options: see ``FusionMismatch``.
    """
    targets = fusion_tensors(model)
    if any(tensor.is_meta for tensor in targets.values()):
        raise ModelError(
            "The model's fusion tensors are on the meta device: give them memory first (model.to_empty)."
        )
    ignored = FusionMismatch(
        missing=[name for name in targets if name not in state_dict],
        unexpected=[name for name in state_dict if name not in targets],
        mismatched=[n for n, t in targets.items() if n in state_dict and t.shape != state_dict[n].shape],
        base=base,
        options=options,
    )
    fitting = [n for n in targets if n in state_dict and n not in ignored.mismatched]
    if (strict and any(ignored)) or not fitting:
        raise CheckpointError(_message(ignored, state_dict, targets))
    for name in fitting:
        copy_into(targets[name], state_dict[name])
    return ignored


def _message(
    mismatch: FusionMismatch, saved: Mapping[str, Tensor], targets: Mapping[str, Tensor]
) -> str:
    lines = [f"option: {problem}" for problem in mismatch.options]
    lines += [f"missing: {name}" for name in mismatch.missing]
    lines += [f"unexpected: {name}" for name in mismatch.unexpected]
    lines += [
        f"shape: {name} is {list(saved[name].shape)}, the model's is {list(targets[name].shape)}"
        for name in mismatch.mismatched
    ]
    advice = ""
    if lines:
        advice += " Was it fused in the same way (arch, every, adapter, fusion_vocab_size, fusion_head)?"
    if mismatch.base:
        lines += format_differences(mismatch.base)
        advice += (
            " Fusion parameters belong to the base that they were trained over: load its pretrained "
            "parts first. Parts that were trained too are loaded by load_trained."
        )
    listing = "\n  ".join(lines)
    return f"The fusion tensors do not fit this model; nothing was loaded.{advice}\n  {listing}"
