"""Adapters of one architecture as the start of another's.

Over one base, an adapter maps an encoder's features into the decoder's embedding space in the same way
in all architectures. Usually one trained as ``joint_decoder`` seeds the others.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from torch import nn

from torchfuse.checkpoint.artifact.description import adapter_problems
from torchfuse.checkpoint.artifact.fingerprint import (
    compare_fingerprints,
    fingerprint,
    format_differences,
    pretrained_tensors,
)
from torchfuse.checkpoint.artifact.fusion import read_artifact
from torchfuse.checkpoint.artifact.state_dict import fusion_state_dict, load_fusion_state_dict
from torchfuse.errors import CheckpointError

__all__ = ["seed_adapters"]

_ADAPTERS: Final = ("adapter.", "adapters.")


def seed_adapters(model: nn.Module, path: str | Path, strict: bool = True) -> list[str]:
    """Load the adapters of an artifact, of whatever architecture, and nothing else.

    On a sharded model every rank calls this.

    Args:
        model: a fused model, with its pretrained parts loaded.
        path: directory of an artifact of ``save_fusion``.
        strict: whether the base must be the one that the artifact was trained over, and the artifact
            and the model must have the same adapter tensors. If not, tensors whose name and shape agree
            are loaded.

    Returns:
        The names of the loaded tensors, in the model's order.

    Raises:
        CheckpointError: if there is no such artifact or it is damaged; with every adapter's tensor
            that does not fit; if none does. The model is unchanged then.
    """
    artifact = read_artifact(path)
    saved = {n: t for n, t in artifact.tensors.items() if n.startswith(_ADAPTERS)}
    targets = {n: t for n, t in fusion_state_dict(model).items() if n.startswith(_ADAPTERS)}
    fitting = {n: saved[n] for n in targets if n in saved and saved[n].shape == targets[n].shape}
    problems = [
        f"missing in the artifact: {name} {list(tensor.shape)}"
        for name, tensor in targets.items()
        if name not in saved
    ]
    problems += [
        f"missing in the model: {name} {list(tensor.shape)}"
        for name, tensor in saved.items()
        if name not in targets
    ]
    problems += [
        f"shape: {name} is {list(saved[name].shape)}, the model's is {list(targets[name].shape)}"
        for name in targets
        if name in saved and name not in fitting
    ]
    if strict:
        problems += adapter_problems(artifact.description, model)
    if strict and artifact.base is not None:
        own = fingerprint(pretrained_tensors(model))
        problems += format_differences(compare_fingerprints(artifact.base, own))
    if not fitting or (strict and problems):
        listing = "\n  ".join(problems or ["neither the artifact nor the model has an adapter"])
        raise CheckpointError(
            f"The adapters of {path} do not fit this model; nothing was loaded. Both need the same "
            f"base, names of encoders and kind of adapter.\n  {listing}"
        )
    load_fusion_state_dict(model, fitting, strict=False)
    return list(fitting)
