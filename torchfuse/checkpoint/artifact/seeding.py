"""Adapters of one architecture as the beginning of another's.

What an adapter has learned, to say an encoder's features in a decoder's words, is the same thing in all
architectures over one base. Usually one trained as ``joint_decoder`` seeds the others.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from torch import nn

from torchfuse.checkpoint.artifact.description import adapter_problems
from torchfuse.checkpoint.artifact.fingerprint import compare, explain, fingerprint, pretrained_tensors
from torchfuse.checkpoint.artifact.fusion import fusion_state_dict, load_fusion_state_dict, read_artifact
from torchfuse.errors import CheckpointError

__all__ = ["seed_adapters"]

_ADAPTERS: Final = ("adapter.", "adapters.")


def seed_adapters(model: nn.Module, path: str | Path, strict: bool = True) -> list[str]:
    """Load the adapters of an artifact, whatever architecture it is for, and nothing else.

    On a sharded model every rank calls this.

    Args:
        model: a fused model, with its pretrained parts loaded.
        path: directory of an artifact of ``save_fusion``.
        strict: whether the base must be the one that the artifact was made over, and every adapter's
            tensor must be there on both sides. If not, what has the name and the shape of a tensor here
            is loaded.

    Returns:
        The names of what was loaded, in the model's order.

    Raises:
        CheckpointError: if there is no such artifact or it is damaged; with every adapter's tensor
            that does not fit; if nothing does. The model is as it was then.
    """
    tensors, description, base = read_artifact(path)
    theirs = {name: tensor for name, tensor in tensors.items() if name.startswith(_ADAPTERS)}
    ours = {n: t for n, t in fusion_state_dict(model).items() if n.startswith(_ADAPTERS)}
    problems = [
        f"missing in the artifact: {name} {list(tensor.shape)}"
        for name, tensor in ours.items()
        if name not in theirs
    ]
    problems += [
        f"missing here: {name} {list(tensor.shape)}"
        for name, tensor in theirs.items()
        if name not in ours
    ]
    fitting = {n: theirs[n] for n in ours if n in theirs and theirs[n].shape == ours[n].shape}
    problems += [
        f"shape: {name} is {list(theirs[name].shape)}, the model's is {list(ours[name].shape)}"
        for name in ours
        if name in theirs and name not in fitting
    ]
    if strict:
        problems += adapter_problems(description, model)
    if strict and base is not None:
        differs = compare(base, fingerprint(pretrained_tensors(model)))
        problems += explain(differs) if differs else []
    if not fitting or (strict and problems):
        listing = "\n  ".join(problems or ["neither the artifact nor the model has an adapter"])
        raise CheckpointError(
            f"The adapters of {path} do not fit this model; nothing was loaded. Both need the same "
            f"base, names of encoders and kind of adapter.\n  {listing}"
        )
    load_fusion_state_dict(model, fitting, strict=False)
    return list(fitting)
