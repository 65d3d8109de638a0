"""The state of a training run by name: what of it is tensors, and what stands in a JSON file.

Tensors have canonical names (``model.<name>``, ``optimizer.state.<name>.<key>``) whatever wraps the
model. All that is no tensor is a description: step, what trains, the optimizer's options and counts,
and what the caller adds. It is checked as a file of a stranger is, since a load acts on it.

Pretrained tensors that never train need not be written: a description may hold what they are known by
(see ``fingerprint``), and a load compares that with the model's.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
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
    read_fingerprint,
)
from torchfuse.checkpoint.run.optimizer_state import (
    are_strings,
    is_optimizer_description,
    optimizer_contents,
)
from torchfuse.errors import CheckpointError
from torchfuse.naming import (
    ModelWithParts,
    canonical_name,
    find_model,
    named_parameters,
    unwrap_model,
)

__all__ = [
    "Description",
    "base_of",
    "model_problems",
    "model_tensors",
    "read_description",
    "run_contents",
    "set_model",
]

_FORMAT: Final = 1
_MODEL: Final = "model."


class Description(NamedTuple):
    """What a checkpoint holds beside its tensors.

    Attributes:
        step: how many steps were taken.
        trainable: names of the parameters that trained.
        extra: what the caller added.
        optimizer: as ``optimizer_contents`` returned it; None if no optimizer was saved.
        base: what the tensors of the model that were not saved are known by, by name.
    """

    step: int
    trainable: list[str]
    extra: dict[str, Any]
    optimizer: dict[str, Any] | None
    base: dict[str, TensorFingerprint]


def run_contents(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    step: Any,
    extra: Any,
    trained: Collection[str] | None,
) -> tuple[dict[str, Tensor], dict[str, Any], list[str]]:
    """What a run holds.

    On a sharded model every rank calls this.

    Args:
        model: the model.
        optimizer: its optimizer; None for none.
        step: how many steps were taken; anything else is a problem.
        extra: what the caller adds; what JSON would not give back is a problem.
        trained: pretrained parameters that are kept; None: all are.

    Returns:
        All tensors by name; all other values, in JSON's types; and what cannot be saved.
    """
    tensors = model_tensors(model)
    base = {} if trained is None else base_of(model, trained)
    for name in base:
        del tensors[_MODEL + name]
    of_optimizer, optimizer_values, problems = optimizer_contents(model, optimizer)
    if trained is not None:
        problems += _trained_problems(model, trained, optimizer_values)
    for index, group in enumerate(optimizer_values["groups"] if optimizer_values else []):
        problems += _json_problems(group["options"], f"optimizer group {index}")
    problems += _tensor_problems(tensors) + _buffers_outside(model)
    if type(step) is not int or step < 0:
        problems.append(f"step must be a whole number from 0 on, not {step!r}")
    extra = dict(extra) if isinstance(extra, Mapping) else {} if extra is None else extra
    if isinstance(extra, dict):
        problems += _json_problems(extra, "extra")
    else:
        problems.append(f"extra must be a mapping, not a {type(extra).__name__}")
    values = {
        "format": _FORMAT,
        "step": step,
        "trainable": [name for name, p in named_parameters(model) if p.requires_grad],
        "optimizer": optimizer_values,
        "extra": extra,
        "base": {name: tensor._asdict() for name, tensor in base.items()},
    }
    return tensors | of_optimizer, values, problems


def model_tensors(model: nn.Module) -> dict[str, Any]:
    """Parameters and persistent buffers by the names that they are stored under."""
    return {_MODEL + canonical_name(n): t for n, t in get_model_state_dict(find_model(model)).items()}


def base_of(model: nn.Module, trained: Collection[str] = ()) -> dict[str, TensorFingerprint]:
    """What the pretrained tensors of a model are known by, under each name that they have.

    On a sharded model every rank calls this, and all get the same.

    Args:
        model: any module; in one that is not fused all tensors are pretrained.
        trained: names of parameters to leave out, with the buffers beside them.
    """
    base = fingerprint(pretrained_tensors(model, trained))
    first: dict[int, str] = {}  # a parameter that stands in several places has a name for each
    for name, parameter in unwrap_model(model).named_parameters(remove_duplicate=False):
        known = base.get(first.setdefault(id(parameter), canonical_name(name)))
        if known is not None:
            base[canonical_name(name)] = known
    return base


def _buffers_outside(model: nn.Module) -> list[str]:
    """Persistent buffers of a module that contains the fused model, which would not be saved."""
    inside = {id(buffer) for buffer in unwrap_model(model).buffers()}
    return [
        f"{canonical_name(f'{path}.{key}' if path else key)} is a buffer outside of the fused model, "
        "which is what is saved: pass the fused model, and keep the buffer in extra"
        for path, module in model.named_modules()
        for key, buffer in module.named_buffers(recurse=False)
        if key not in module._non_persistent_buffers_set and id(buffer) not in inside
    ]


def _trained_problems(
    model: nn.Module, trained: Collection[str], optimizer: Mapping[str, Any] | None
) -> list[str]:
    """What must not be left out, and names that mean nothing."""
    names = {name for name, _ in named_parameters(model)}
    moving = {name for name, p in named_parameters(model) if p.requires_grad}
    moving |= {name for group in (optimizer or {"groups": []})["groups"] for name in group["names"]}
    forgotten = sorted(moving & pretrained_tensors(model, trained).keys())
    unknown = sorted({*trained} - names)
    problems = [f"trained names {name}, which is no parameter of the model" for name in unknown]
    return problems + [
        f"{name} trains, or is in the optimizer, and is not in trained" for name in forgotten
    ]


def read_description(file: Path) -> Description:
    """Read what ``run_contents`` returned beside the tensors.

    Args:
        file: a JSON file.

    Raises:
        CheckpointError: if it is not there, is damaged, or is something else.
    """
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        if data["format"] != _FORMAT:
            raise CheckpointError(f"format {data['format']!r}, known here is {_FORMAT}")
        step, trainable, extra, saved = (data[k] for k in ("step", "trainable", "extra", "optimizer"))
        base = read_fingerprint(data.get("base", {}))  # earlier versions kept everything
        good = type(step) is int and isinstance(extra, dict) and are_strings(trainable)
        if saved is not None:
            good = good and is_optimizer_description(saved)
        if not good:
            raise TypeError("an entry is of another type")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{file} is damaged, or no file of save_checkpoint: {error!r}.") from error
    return Description(step, trainable, extra, saved, base)


def model_problems(
    saved: Mapping[str, Any],
    tensors: Mapping[str, Any],
    description: Description,
    model: nn.Module,
    base: Mapping[str, TensorFingerprint],
) -> list[str]:
    """How a model differs from the one that was saved.

    Args:
        saved: what is stored, by name: tensors with ``size`` and ``properties.dtype``.
        tensors: what ``model_tensors`` returned.
        description: what is stored beside them.
        model: the model.
        base: what ``base_of`` returned for it.
    """
    bare = {name: name.removeprefix(_MODEL) for name in [*tensors, *saved]}
    left_out = description.base
    problems = [f"missing: {bare[n]}" for n in tensors if n not in saved and bare[n] not in left_out]
    differ = compare_fingerprints(left_out, {name: base[name] for name in left_out if name in base})
    problems += format_differences(differ)
    problems += [f"unexpected: {bare[n]}" for n in saved if n.startswith(_MODEL) and n not in tensors]
    for name, tensor in tensors.items():
        if name not in saved or not isinstance(tensor, Tensor):
            continue
        theirs = (list(saved[name].size), saved[name].properties.dtype)
        ours = (list(tensor.shape), tensor.dtype)
        if ours != theirs:
            what = "dtype" if ours[0] == theirs[0] else "shape"
            problems.append(
                f"{what}: {bare[name]} is {theirs[0]} {theirs[1]}, the model's is {ours[0]} {ours[1]}"
            )
    problems += _tensor_problems(tensors)
    if not problems:
        can_train = {n for n, p in named_parameters(model) if p.is_floating_point() or p.is_complex()}
        unknown = [name for name in description.trainable if name not in can_train]
        problems += [f"{name} trains there, and is no parameter that can train here" for name in unknown]
    return problems


def set_model(model: nn.Module, description: Description, tensors: Mapping[str, Tensor]) -> None:
    """Give a model the tensors that were saved, and let train what trained.

    Args:
        model: as in ``model_problems``, which found none.
        description: as in ``model_problems``.
        tensors: by the names of ``model_tensors``; those of an optimizer are passed over.
    """
    names = [name for name in tensors if name.startswith(_MODEL)]
    values: dict[str, Any] = {name.removeprefix(_MODEL): tensors[name] for name in names}
    options = StateDictOptions(strict=not description.base)
    set_model_state_dict(find_model(model), values, options=options)
    for name, parameter in named_parameters(model):
        parameter.requires_grad_(name in description.trainable)
    inner = unwrap_model(model)
    if isinstance(inner, ModelWithParts):
        inner.train(inner.training)  # a fused model keeps what is frozen in evaluation mode


def _tensor_problems(tensors: Mapping[str, Any]) -> list[str]:
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


def _json_problems(value: Any, where: str) -> list[str]:
    """What of a value JSON would not give back as it is."""
    if value is None or isinstance(value, bool | int | float | str):
        return []
    parts: Iterator[tuple[str, Any]]
    if isinstance(value, dict):
        if keys := [repr(key) for key in value if not isinstance(key, str)]:
            return [f"{where} has keys that are no strings: {', '.join(keys)}"]
        parts = iter((f"{where}[{key!r}]", part) for key, part in value.items())
    elif isinstance(value, list):
        parts = iter((f"{where}[{index}]", part) for index, part in enumerate(value))
    else:
        return [f"{where} is a {type(value).__name__}; JSON has dict, list, str, int, float, bool, None"]
    try:
        return [problem for name, part in parts for problem in _json_problems(part, name)]
    except RecursionError:
        return [f"{where} is nested too deeply, or within itself"]
