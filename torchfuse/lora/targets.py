"""Selection of the linear layers that get LoRA, by part and name, and why a layer cannot have it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from torchfuse.errors import ConfigError, ModelError
from torchfuse.lora.layers import is_lora
from torchfuse.modules.experts.expert_choice import ExpertChoiceRouter
from torchfuse.naming import canonical_name, unwrap_model
from torchfuse.params import is_sharded, partition, quantized_dtype
from torchfuse.quantization.plan import first_names

__all__ = ["Place", "find_layers", "find_targets", "linear_places"]


@dataclass
class Place:
    """A linear layer, and where it is registered.

    Attributes:
        name: its canonical name.
        layer: the layer.
        registered: the modules that have it as a child, with the child's name.
    """

    name: str
    layer: Any
    registered: list[tuple[nn.Module, str]] = field(default_factory=list)

    def put(self, layer: nn.Module) -> None:
        """Register another layer in its place."""
        for parent, name in self.registered:
            parent._modules[name] = layer


def find_targets(model: nn.Module, parts: Sequence[str], targets: Sequence[str] | None) -> list[Place]:
    """Return the linear layers of parts of a model that names choose, in the model's order.

    Args:
        model: a fused model, or a decoder alone.
        parts: ``"decoder"``, ``"encoder"`` (all of them), ``"encoder.<name>"``, ``"fusion"``.
        targets: names or patterns, see ``add_lora``. None: all linear layers inside of the parts'
            transformer layers.

    Raises:
        ConfigError: naming every unknown part, and every target that matches nothing.
        ModelError: naming every chosen layer that cannot have LoRA.
    """
    model = unwrap_model(model)
    groups = _chosen_parts(model, parts)
    places = {
        part: [place for place in linear_places(model) if id(place.layer.weight) in ids]
        for part, ids in groups.items()
    }
    chosen, problems = _by_name(places, targets) if targets is not None else _in_layers(model, places)
    if problems:
        raise ConfigError(f"LoRA: {'; '.join(problems)}.")
    _raise_refused(model, chosen)
    ids = {id(place.layer) for place in chosen}
    return [place for place in linear_places(model) if id(place.layer) in ids]


def find_layers(model: nn.Module, names: Collection[str]) -> list[Place]:
    """Return the linear layers of a model by canonical name, in the model's order.

    Raises:
        ModelError: naming the layers that do not exist, and those that cannot have LoRA.
    """
    model = unwrap_model(model)
    places = [place for place in linear_places(model) if place.name in names]
    missing = [name for name in names if name not in {place.name for place in places}]
    if missing:
        raise ModelError(f"The model has no linear layer {first_names(missing)}; nothing has changed.")
    _raise_refused(model, places)
    return places


def _chosen_parts(model: nn.Module, parts: Sequence[str]) -> dict[str, set[int]]:
    """Return the ids of the parameters of each chosen part."""
    groups = {part: p for part, p in partition(model).items() if p and not part.startswith("lora.")}
    chosen: dict[str, set[int]] = {}
    problems = []
    for part in parts:
        found = [p for p in groups if p == part or (part == "encoder" and p.startswith("encoder."))]
        if not found:
            problems.append(f"no part {part!r}; the model has {', '.join(groups)}")
        chosen |= {name: {id(p) for p in groups[name].values()} for name in found}
    if not parts:
        problems.append(f"name at least one part of {', '.join(groups)}")
    if problems:
        raise ConfigError(f"LoRA: {'; '.join(problems)}.")
    return chosen


def linear_places(model: nn.Module) -> Iterator[Place]:
    """Iterate over the linear and LoRA layers of a model, each once."""
    registered: dict[int, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for name, child in parent._modules.items():
            registered.setdefault(id(child), []).append((parent, name))
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) or is_lora(module):
            yield Place(canonical_name(name), module, registered.get(id(module), []))


def _by_name(places: dict[str, list[Place]], targets: Sequence[str]) -> tuple[list[Place], list[str]]:
    every = [place for of_part in places.values() for place in of_part]
    chosen = [p for p in every if any(_matches(p.name, target) for target in targets)]
    unmatched = [t for t in targets if not any(_matches(p.name, t) for p in every)]
    if not unmatched and targets:
        return chosen, []
    there = "; ".join(f"{part} has {_last_names(of_part)}" for part, of_part in places.items())
    verb = "matches" if len(unmatched) == 1 else "match"
    what = f"{', '.join(map(repr, unmatched))} {verb} no linear layer"
    return chosen, [f"{what if targets else 'targets is empty'}; {there}"]


def _matches(name: str, target: str) -> bool:
    return fnmatchcase(name, target) or fnmatchcase(name, f"*.{target}")


def _in_layers(model: nn.Module, places: dict[str, list[Place]]) -> tuple[list[Place], list[str]]:
    inside = _ids_inside(model, nn.ModuleList) - _ids_inside(model, ExpertChoiceRouter)
    chosen, problems = [], []
    for part, every in places.items():
        found = [p for p in every if id(p.layer) in inside and (_is_plain(p.layer) or is_lora(p.layer))]
        chosen += found
        if not found:
            problems.append(
                f"{part} has no linear layer inside of transformer layers; name targets: it has "
                f"{_last_names(every)}"
            )
    return chosen, problems


def _ids_inside(model: nn.Module, kind: type[nn.Module]) -> set[int]:
    owners = (module for module in model.modules() if isinstance(module, kind))
    return {id(module) for owner in owners for module in owner.modules()}


def _raise_refused(model: nn.Module, chosen: Sequence[Place]) -> None:
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    refused: dict[str, list[str]] = {}
    for place in chosen:
        for why in _reasons(place, owners):
            refused.setdefault(why, []).append(place.name)
    if refused:
        listing = "\n  ".join(f"{why}: {first_names(names)}" for why, names in refused.items())
        raise ModelError(f"These layers cannot have LoRA; nothing has changed.\n  {listing}")


def _reasons(place: Place, owners: dict[int, int]) -> Iterator[str]:
    layer, weight = place.layer, place.layer.weight
    kind = quantized_dtype(weight)
    if is_lora(layer):
        yield "has LoRA already; merge_lora first, or choose other targets"
    elif not _is_plain(layer):
        yield f"is a {type(layer).__name__}, not a plain nn.Linear"
    if kind not in (None, "nf4"):
        yield f"is quantized ({kind}); LoRA needs a base that is not, or NF4 (quantize_base=True)"
    if is_sharded(weight):
        yield "is sharded; add LoRA first, then shard"
    if owners[id(weight)] > 1:
        yield "shares its weight with another layer"
    if not place.registered:
        yield "is the model itself, not a layer of one"


def _is_plain(layer: nn.Module) -> bool:
    return type(layer) is nn.Linear


def _last_names(places: Sequence[Place]) -> str:
    return first_names(list(dict.fromkeys(place.name.rpartition(".")[2] for place in places))) or "none"
