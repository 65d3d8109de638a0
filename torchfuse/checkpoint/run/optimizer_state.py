"""An optimizer's state by the names of the model's parameters.

``state_dict()`` of an optimizer counts its parameters; here each has its name, so that the groups may
stand in another order and any number of ranks may hold them. Tensors are kept apart from all other
values, which stand in a JSON file. What belongs to the machine and not to the run (``foreach``,
``fused``) is not saved.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn

from torchfuse.naming import named_parameters

__all__ = [
    "are_strings",
    "is_optimizer_description",
    "optimizer_contents",
    "optimizer_problems",
    "optimizer_targets",
    "set_optimizer",
]

# Of a parameter group: what is saved by name, and how, not what, a step computes on this machine.
_NOT_SAVED: Final = frozenset(
    {"params", "param_names", "foreach", "fused", "capturable", "differentiable"}
)


def optimizer_contents(
    model: nn.Module, optimizer: torch.optim.Optimizer | None
) -> tuple[dict[str, Tensor], dict[str, Any] | None, list[str]]:
    """What an optimizer holds.

    Args:
        model: the model that it trains.
        optimizer: the optimizer; None gives nothing.

    Returns:
        Tensors by name; all other values, ``kind``, ``groups`` and ``state``, or None; and what cannot
        be saved. Whether the groups' options are in JSON's types is not looked at.
    """
    if optimizer is None:
        return {}, None, []
    groups = _names_of_groups(model, optimizer)
    names = [name for group in groups for name in group]
    if "" in names:
        return {}, None, [_foreign_parameters(names)]
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    problems: list[str] = []
    packed = optimizer.state_dict()
    for index, state in packed["state"].items():
        name = names[index]
        values[name] = {"tensors": [], "values": {}}
        for key, value in state.items():
            if isinstance(value, Tensor) and "." not in key:
                values[name]["tensors"].append(key)
                tensors[_state_name(name, key)] = value
            elif _is_number(value):
                values[name]["values"][key] = value
            else:
                problems.append(f"optimizer state {key!r} of {name} is a {type(value).__name__}")
    described = []
    for group, of_group in zip(packed["param_groups"], groups, strict=True):
        options = {key: _plain(value) for key, value in group.items() if key not in _NOT_SAVED}
        described.append({"names": of_group, "options": options})
    return tensors, {"kind": type(optimizer).__name__, "groups": described, "state": values}, problems


def is_optimizer_description(saved: Any) -> bool:
    """Whether a value read from a file is one that ``optimizer_contents`` could have returned.

    Args:
        saved: any value of JSON's types. One that lacks an entry, or has it in another type, may raise
            KeyError, TypeError or AttributeError instead.
    """
    return (
        isinstance(saved["kind"], str)
        and all(
            are_strings(group["names"]) and not _NOT_SAVED & group["options"].keys()
            for group in saved["groups"]
        )
        and all(
            are_strings(state["tensors"]) and all(map(_is_number, state["values"].values()))
            for state in saved["state"].values()
        )
    )


def are_strings(value: Any) -> bool:
    """Whether a value is a list of strings."""
    return isinstance(value, list) and all(isinstance(part, str) for part in value)


def optimizer_problems(
    stored: Mapping[str, Any],
    saved: Mapping[str, Any] | None,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
) -> list[str]:
    """How an optimizer differs from the one that was saved.

    Args:
        stored: what is stored, by name: tensors with ``size`` and ``properties.dtype``.
        saved: the other values, as ``optimizer_contents`` returned them.
        model: the model that the optimizer trains.
        optimizer: the optimizer.
    """
    if saved is None:
        return ["optimizer: none was saved; load the model alone"]
    if saved["kind"] != type(optimizer).__name__:
        return [f"optimizer: it is a {saved['kind']} there, a {type(optimizer).__name__} here"]
    groups = _names_of_groups(model, optimizer)
    ours = [name for group in groups for name in group]
    if "" in ours:
        return [_foreign_parameters(ours)]
    theirs = [name for group in saved["groups"] for name in group["names"]]
    problems = [f"optimizer, missing: {name}" for name in ours if name not in set(theirs)]
    problems += [f"optimizer, unexpected: {name}" for name in theirs if name not in set(ours)]
    if problems:
        problems.append(
            "to restore what trains, load the model alone, build the optimizer again, and load both"
        )
    elif {*map(frozenset, groups)} != {frozenset(group["names"]) for group in saved["groups"]}:
        problems.append("optimizer: its parameters are divided into other groups there")
    for name, state in saved["state"].items():
        keys = [_state_name(name, key) for key in state["tensors"]]
        if name not in set(theirs) or any(key not in stored for key in keys):
            problems.append(f"damaged: the optimizer's state of {name} is not all there")
    return problems


def optimizer_targets(
    stored: Mapping[str, Any], saved: Mapping[str, Any], model: nn.Module
) -> dict[str, Tensor]:
    """Fresh tensors for an optimizer's state, placed as the optimizer itself would place them.

    Args:
        stored: as in ``optimizer_problems``, which found none.
        saved: as in ``optimizer_problems``.
        model: as in ``optimizer_problems``.
    """
    parameters = dict(named_parameters(model))
    targets = {}
    for name, state in saved["state"].items():
        parameter = parameters[name].detach()
        for key in state["tensors"]:
            tensor = stored[_state_name(name, key)]
            dtype = tensor.properties.dtype
            if not tensor.size:
                target = torch.zeros((), dtype=dtype)  # a count, and the same on every rank
            elif tensor.size == parameter.shape:
                target = torch.zeros_like(parameter, dtype=dtype)
            else:
                target = parameter.new_zeros(tensor.size, dtype=dtype)
            targets[_state_name(name, key)] = target
    return targets


def set_optimizer(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    saved: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
) -> None:
    """Give an optimizer the state that was saved.

    Args:
        model: as in ``optimizer_problems``, which found none.
        optimizer: as in ``optimizer_problems``.
        saved: as in ``optimizer_problems``.
        tensors: what ``optimizer_targets`` made, filled.
    """
    groups = _names_of_groups(model, optimizer)
    state = {}
    for index, name in enumerate(name for group in groups for name in group):
        if name in saved["state"]:
            keys = saved["state"][name]["tensors"]
            state[index] = {key: tensors[_state_name(name, key)] for key in keys}
            state[index] |= saved["state"][name]["values"]
    options = {frozenset(group["names"]): group["options"] for group in saved["groups"]}
    packed = optimizer.state_dict()["param_groups"]
    for group, names in zip(packed, groups, strict=True):
        found = options[frozenset(names)]
        group |= {key: _as(group.get(key), value) for key, value in found.items()}
    optimizer.load_state_dict({"state": state, "param_groups": packed})
    # PyTorch casts state to the dtype of its parameter; what was saved in another one keeps it.
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, entries in state.items():
        loaded = optimizer.state[parameters[index]]
        for key, value in entries.items():
            if isinstance(value, Tensor) and loaded[key].dtype != value.dtype:
                loaded[key] = value.to(loaded[key].device)


def _state_name(name: str, key: str) -> str:
    return f"optimizer.state.{name}.{key}"


def _names_of_groups(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[list[str]]:
    """Names of the parameters of each group; an empty one for what is not the model's."""
    names = {id(parameter): name for name, parameter in named_parameters(model)}
    return [[names.get(id(p), "") for p in group["params"]] for group in optimizer.param_groups]


def _is_number(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float)


def _plain(value: Any) -> Any:
    """A hyperparameter in JSON's types."""
    if isinstance(value, Tensor) and value.ndim == 0:
        return value.item()
    return [_plain(part) for part in value] if isinstance(value, tuple | list) else value


def _as(current: Any, value: Any) -> Any:
    """A hyperparameter in the type that the optimizer at hand holds it in."""
    if isinstance(current, Tensor):
        return torch.full_like(current, value)
    if isinstance(current, tuple) and isinstance(value, list) and len(current) == len(value):
        return tuple(_as(one, other) for one, other in zip(current, value, strict=True))
    return value


def _foreign_parameters(names: Sequence[str]) -> str:
    return (
        f"the optimizer holds {names.count('')} parameters that are not the model's; build it over this "
        "model, after sharding"
    )
