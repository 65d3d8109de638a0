"""A model's state in the checkpoint of a run: tensors by canonical name, and what trains.

Pretrained tensors that never train need not be saved: then their fingerprints are, and a load compares
these with the model's.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Final

from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)

from torchfuse.checkpoint.artifact.fingerprint import (
    TensorFingerprint,
    compare_fingerprints,
    fingerprint,
    format_differences,
    pretrained_tensors,
)
from torchfuse.checkpoint.run.description import Description
from torchfuse.naming import (
    ModelWithParts,
    canonical_name,
    find_model,
    named_parameters,
    unwrap_model,
)

__all__ = [
    "MODEL",
    "base_fingerprint",
    "buffers_outside",
    "model_problems",
    "model_tensors",
    "set_model",
    "tensor_problems",
    "trained_problems",
]

MODEL: Final = "model."


def model_tensors(model: nn.Module) -> dict[str, Any]:
    """Return parameters and persistent buffers by the names that they are stored under."""
    return {MODEL + canonical_name(n): t for n, t in get_model_state_dict(find_model(model)).items()}


def base_fingerprint(model: nn.Module, trained: Collection[str] = ()) -> dict[str, TensorFingerprint]:
    """Return fingerprints of a model's pretrained tensors, under each name that they have.

    On a sharded model every rank calls this, and all get the same.

    Args:
        model: any module; in one that is not fused all tensors are pretrained.
        trained: names of parameters to leave out, with the buffers beside them.
    """
    base = fingerprint(pretrained_tensors(model, trained))
    first: dict[int, str] = {}  # a parameter that several modules share has a name for each
    for name, parameter in unwrap_model(model).named_parameters(remove_duplicate=False):
        found = base.get(first.setdefault(id(parameter), canonical_name(name)))
        if found is not None:
            base[canonical_name(name)] = found
    return base


def trained_problems(
    model: nn.Module, trained: Collection[str], optimizer: Mapping[str, Any] | None
) -> list[str]:
    """Return names in ``trained`` that the model lacks, and parameters that are missing in it.

    Args:
        model: the model.
        trained: names of the pretrained parameters to save.
        optimizer: as ``optimizer_contents`` returns it.
    """
    parameters = dict(named_parameters(model))
    moving = {name for name, parameter in parameters.items() if parameter.requires_grad}
    moving |= {name for group in (optimizer or {"groups": []})["groups"] for name in group["names"]}
    missing = sorted(moving & pretrained_tensors(model, trained).keys())
    unknown = sorted({*trained} - parameters.keys())
    problems = [f"trained names {name}, which is no parameter of the model" for name in unknown]
    return problems + [
        f"{name} trains, or is in the optimizer, and is not in trained" for name in missing
    ]


def tensor_problems(tensors: Mapping[str, Any]) -> list[str]:
    """List the values of ``model_tensors`` that can be neither saved nor loaded."""
    problems = [
        f"{name} is a {type(value).__name__}: a checkpoint of a model holds tensors only"
        for name, value in tensors.items()
        if not isinstance(value, Tensor)
    ]
    return problems + [
        f"{name} is on the meta device: give it memory (model.to_empty)"
        for name, value in tensors.items()
        if isinstance(value, Tensor) and value.is_meta
    ]


def buffers_outside(model: nn.Module) -> list[str]:
    """Return the buffers of a module around the fused model, which would not be saved."""
    inside = {id(buffer) for buffer in unwrap_model(model).buffers()}
    return [
        f"{canonical_name(f'{path}.{key}' if path else key)} is a buffer outside of the fused model, "
        "which is what is saved: pass the fused model, and keep the buffer in extra"
        for path, module in model.named_modules()
        for key, buffer in module.named_buffers(recurse=False)
        if key not in module._non_persistent_buffers_set and id(buffer) not in inside
    ]


def model_problems(
    stored: Mapping[str, Any],
    tensors: Mapping[str, Any],
    description: Description,
    model: nn.Module,
    base: Mapping[str, TensorFingerprint],
) -> list[str]:
    """Return how a model differs from the one that was saved.

    Args:
        stored: what is stored, by name: tensors with ``size`` and ``properties.dtype``.
        tensors: what ``model_tensors`` returned.
        description: what is stored beside them.
        model: the model.
        base: what ``base_fingerprint`` returned for it.
    """
    names = {name: name.removeprefix(MODEL) for name in [*tensors, *stored]}
    left_out = description.base
    problems = [f"missing: {names[n]}" for n in tensors if n not in stored and names[n] not in left_out]
    differ = compare_fingerprints(left_out, {name: base[name] for name in left_out if name in base})
    problems += format_differences(differ)
    problems += [f"unexpected: {names[n]}" for n in stored if n.startswith(MODEL) and n not in tensors]
    for name, tensor in tensors.items():
        if name not in stored or not isinstance(tensor, Tensor):
            continue
        saved = (list(stored[name].size), stored[name].properties.dtype)
        target = (list(tensor.shape), tensor.dtype)
        if saved != target:
            kind = "dtype" if saved[0] == target[0] else "shape"
            problems.append(
                f"{kind}: {names[name]} is {saved[0]} {saved[1]}, the model's is {target[0]} {target[1]}"
            )
    problems += tensor_problems(tensors)
    if not problems:
        can_train = {n for n, p in named_parameters(model) if p.is_floating_point() or p.is_complex()}
        unknown = [name for name in description.trainable if name not in can_train]
        problems += [
            f"{name} trained, and is no parameter of the model that can train" for name in unknown
        ]
    return problems


def set_model(model: nn.Module, description: Description, tensors: Mapping[str, Tensor]) -> None:
    """Set the tensors and what trains of a model to what was saved.

    Args:
        model: as in ``model_problems``, which found none.
        description: as in ``model_problems``.
        tensors: by the names of ``model_tensors``; those of an optimizer are ignored.
    """
    names = [name for name in tensors if name.startswith(MODEL)]
    values: dict[str, Any] = {name.removeprefix(MODEL): tensors[name] for name in names}
    options = StateDictOptions(strict=not description.base)
    set_model_state_dict(find_model(model), values, options=options)
    for name, parameter in named_parameters(model):
        parameter.requires_grad_(name in description.trainable)
    inner = unwrap_model(model)
    if isinstance(inner, ModelWithParts):
        inner.train(inner.training)  # frozen parts of a fused model stay in evaluation mode
