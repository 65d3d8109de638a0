"""An optimizer's state by the names of the model's parameters, so that groups may change their order.

Tensors are kept apart from other values, which are written to a JSON file. ``foreach``, ``fused`` and
the like are not saved, since they depend on the machine.

torch's ``get_optimizer_state_dict`` and ``set_optimizer_state_dict`` (2.9 to 2.15) cannot replace this:
they step an optimizer that has not stepped, accept parameters and groups that differ, cast fp32 state of
bf16 parameters to bf16, and set ``foreach`` and ``fused`` as on the machine that saved.
"""

from __future__ import annotations

from collections.abc import Mapping
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

# Options of a group that are not saved: the first two since parameters are saved by name, the others
# since they select how a step is computed.
_NOT_SAVED: Final = frozenset(
    {"params", "param_names", "foreach", "fused", "capturable", "differentiable"}
)


def optimizer_contents(
    model: nn.Module, optimizer: torch.optim.Optimizer | None
) -> tuple[dict[str, Tensor], dict[str, Any] | None, list[str]]:
    """Return the contents of an optimizer.

    Args:
        model: the model that it trains.
        optimizer: the optimizer; None for none.

    Returns:
        Tensors by name; all other values (``kind``, ``groups`` and ``state``), or None without an
        optimizer; and what cannot be saved. Whether JSON can hold the groups' options is not checked.
    """
    if optimizer is None:
        return {}, None, []
    groups = _parameter_names(model, optimizer)
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
                tensors[_tensor_name(name, key)] = value
            elif _is_number(value):
                values[name]["values"][key] = value
            else:
                problems.append(f"optimizer state {key!r} of {name} is a {type(value).__name__}")
    described = [
        {"names": of_group, "options": {k: _to_json(v) for k, v in group.items() if k not in _NOT_SAVED}}
        for group, of_group in zip(packed["param_groups"], groups, strict=True)
    ]
    return tensors, {"kind": type(optimizer).__name__, "groups": described, "state": values}, problems


def is_optimizer_description(saved: Any) -> bool:
    """Whether a value read from JSON has the form that ``optimizer_contents`` returns.

    Args:
        saved: any value. If an entry is missing or has another type, this may raise KeyError, TypeError
            or AttributeError instead of returning False.
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
    """Return how an optimizer differs from the one that was saved.

    Args:
        stored: what is stored, by name: tensors with ``size`` and ``properties.dtype``.
        saved: the other values, as ``optimizer_contents`` returned them.
        model: the model that the optimizer trains.
        optimizer: the optimizer.
    """
    if saved is None:
        return ["optimizer: none was saved; load the model alone"]
    kind = type(optimizer).__name__
    if saved["kind"] != kind:
        return [f"optimizer: {saved['kind']} was saved, this is {kind}"]
    groups = _parameter_names(model, optimizer)
    names = [name for group in groups for name in group]
    if "" in names:
        return [_foreign_parameters(names)]
    saved_names = [name for group in saved["groups"] for name in group["names"]]
    problems = [f"optimizer, missing: {name}" for name in names if name not in set(saved_names)]
    problems += [f"optimizer, unexpected: {name}" for name in saved_names if name not in set(names)]
    if problems:
        problems.append(
            "to restore what trains, load the model alone, build the optimizer again, and load both"
        )
    elif {*map(frozenset, groups)} != {frozenset(group["names"]) for group in saved["groups"]}:
        problems.append("optimizer: its parameters were divided into other groups")
    for name, state in saved["state"].items():
        keys = [_tensor_name(name, key) for key in state["tensors"]]
        if name not in set(saved_names) or any(key not in stored for key in keys):
            problems.append(f"damaged: the optimizer's state of {name} is incomplete")
    return problems


def optimizer_targets(
    stored: Mapping[str, Any], saved: Mapping[str, Any], model: nn.Module
) -> dict[str, Tensor]:
    """Return new tensors to read an optimizer's state into, sharded as the optimizer's own would be.

    The arguments are those of ``optimizer_problems``, which found none.
    """
    parameters = dict(named_parameters(model))
    targets = {}
    for name, state in saved["state"].items():
        parameter = parameters[name].detach()
        for key in state["tensors"]:
            tensor = stored[_tensor_name(name, key)]
            dtype = tensor.properties.dtype
            if not tensor.size:
                target = torch.zeros((), dtype=dtype)  # a count, the same on every rank
            elif tensor.size == parameter.shape:
                target = torch.zeros_like(parameter, dtype=dtype)
            else:
                target = parameter.new_zeros(tensor.size, dtype=dtype)
            targets[_tensor_name(name, key)] = target
    return targets


def set_optimizer(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    saved: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
) -> None:
    """Set an optimizer's state and options to those that were saved.

    The arguments are those of ``optimizer_problems``, which found none, and what ``optimizer_targets``
    returned, with the values that were read.
    """
    groups = _parameter_names(model, optimizer)
    state = {}
    for index, name in enumerate(name for group in groups for name in group):
        if name in saved["state"]:
            keys = saved["state"][name]["tensors"]
            state[index] = {key: tensors[_tensor_name(name, key)] for key in keys}
            state[index] |= saved["state"][name]["values"]
    options = {frozenset(group["names"]): group["options"] for group in saved["groups"]}
    packed = optimizer.state_dict()["param_groups"]
    for group, names in zip(packed, groups, strict=True):
        found = options[frozenset(names)]
        group |= {key: _from_json(value, group.get(key)) for key, value in found.items()}
    optimizer.load_state_dict({"state": state, "param_groups": packed})
    # load_state_dict casts state to the dtype of its parameter; the dtype that was saved is right.
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, entries in state.items():
        loaded = optimizer.state[parameters[index]]
        for key, value in entries.items():
            if isinstance(value, Tensor) and loaded[key].dtype != value.dtype:
                loaded[key] = value.to(loaded[key].device)


def _tensor_name(name: str, key: str) -> str:
    return f"optimizer.state.{name}.{key}"


def _parameter_names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[list[str]]:
    """Return the names of the parameters of each group; "" for one that is not the model's."""
    names = {id(parameter): name for name, parameter in named_parameters(model)}
    return [[names.get(id(p), "") for p in group["params"]] for group in optimizer.param_groups]


def _is_number(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float)


def _to_json(value: Any) -> Any:
    """Return an option in JSON's types."""
    if isinstance(value, Tensor) and value.ndim == 0:
        return value.item()
    return [_to_json(part) for part in value] if isinstance(value, tuple | list) else value


def _from_json(value: Any, current: Any) -> Any:
    """Return an option in the type that it has in the optimizer at present."""
    if isinstance(current, Tensor):
        return torch.full_like(current, value)
    if isinstance(current, tuple) and isinstance(value, list) and len(current) == len(value):
        return tuple(_from_json(one, other) for one, other in zip(value, current, strict=True))
    return value


def _foreign_parameters(names: list[str]) -> str:
    return (
        f"the optimizer holds {names.count('')} parameters that are not the model's; build it over this "
        "model, after sharding"
    )
