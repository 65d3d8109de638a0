"""Groups of parameters for an optimizer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Final

from torch import nn

from torchfuse.errors import ConfigError
from torchfuse.params.freezing import FreezeSpec
from torchfuse.params.parts import LORA, partition
from torchfuse.params.schedule import FreezeSchedule
from torchfuse.params.stages import FreezeStage
from torchfuse.params.trainable import reshard

__all__ = ["param_groups"]

_LAYER: Final = re.compile(r"\.layers\.(\d+)\.")


def param_groups(
    model: nn.Module,
    *,
    lr: float | Mapping[str, float],
    weight_decay: float | Mapping[str, float] = 0.0,
    layer_decay: float = 1.0,
    stages: Iterable[FreezeSpec | FreezeStage] = (),
) -> list[dict[str, Any]]:
    """Return named, disjoint and complete optimizer groups of all parameters that train at any time.

    Args:
        model: a fused model.
        lr: one learning rate, or one for each trainable part by its name (``"decoder"``,
            ``"encoder"``, ``"encoder.<name>"``, ``"fusion"``, ``"lora.decoder"``).
        weight_decay: likewise; a part left out of a mapping has none.
        layer_decay: factor between the learning rates of neighbouring layers of a pretrained part: the
            last layer has the rate of its part, each layer before it the next one's times the factor
            (Clark et al., 2020). Parameters before the first layer count as one more layer; those after
            the last, and those that fusion or LoRA added, have the rate of their part.
        stages: freeze stages, or a ``FreezeSchedule``. Parameters that any of them trains are in the
            groups too; while frozen they have no gradient, and an optimizer skips them.

    Returns:
        ``{"name", "params", "param_names", "lr", "weight_decay"}`` for each part that trains; with
        ``layer_decay`` for each depth of it, whose ``name`` is ``"decoder.layers.3"`` or
        ``"decoder.embeddings"``.

    Raises:
        ConfigError: if a part that trains has no learning rate, a mapping names a part that does not
            train, nothing trains, or a stage does not fit the model.
        ModelError: as ``parts_of``.

    Examples:
        >>> from torchfuse import FusionEmbedding
        >>> model = FusionEmbedding(11, 2, 3)
        >>> [(g["name"], g["lr"]) for g in param_groups(model, lr={"fusion": 1e-3, "decoder": 1e-5})]
        [('decoder', 1e-05), ('fusion', 0.001)]
    """
    if not 0 < layer_decay <= 1:
        raise ConfigError(f"layer_decay must be above 0 and at most 1, got {layer_decay}.")
    reshard(model)
    everything = partition(model)
    ever = set(FreezeSchedule(stages).trained_ever(model))
    trainable = {
        part: {name: p for name, p in parameters.items() if name in ever}
        for part, parameters in everything.items()
    }
    trainable = {part: parameters for part, parameters in trainable.items() if parameters}
    if not trainable:
        raise ConfigError("No parameter trains; choose what does with set_trainable.")
    for what, values in (("lr", lr), ("weight_decay", weight_decay)):
        if isinstance(values, Mapping):
            unknown = sorted(set(values) - set(trainable))
            lacking = sorted(set(trainable) - set(values)) if what == "lr" else []
            if unknown or lacking:
                raise ConfigError(
                    f"{what} must name the parts that train, {', '.join(trainable)}; "
                    f"unknown: {', '.join(unknown) or 'none'}; missing: {', '.join(lacking) or 'none'}."
                )
    rates = lr if isinstance(lr, Mapping) else dict.fromkeys(trainable, lr)
    decays = (
        weight_decay if isinstance(weight_decay, Mapping) else dict.fromkeys(trainable, weight_decay)
    )
    groups = []
    for part, parameters in trainable.items():
        whole = {part: (parameters, 1.0)}
        decayed = layer_decay < 1 and part.split(".")[0] not in ("fusion", LORA)
        split = _by_depth(part, everything[part], parameters, layer_decay) if decayed else whole
        groups += [
            {
                "name": name,
                "params": list(members.values()),
                "param_names": list(members),
                "lr": rates[part] * factor,
                "weight_decay": decays.get(part, 0.0),
            }
            for name, (members, factor) in split.items()
        ]
    return groups


def _by_depth(
    part: str,
    everything: Mapping[str, nn.Parameter],
    trained: Mapping[str, nn.Parameter],
    decay: float,
) -> dict[str, tuple[dict[str, nn.Parameter], float]]:
    """Return the trained parameters of each depth of a part, and the factor of their learning rate."""
    layer_of: dict[str, int | None] = {
        name: int(found[1]) if (found := _LAYER.search(name)) else None for name in everything
    }
    num_layers = 1 + max((layer for layer in layer_of.values() if layer is not None), default=-1)
    behind = False
    result: dict[str, tuple[dict[str, nn.Parameter], float]] = {}
    for name, layer in layer_of.items():
        behind |= layer is not None
        if layer is not None:
            depth, above = f"{part}.layers.{layer}", num_layers - 1 - layer
        elif behind or not num_layers:
            depth, above = part, 0
        else:
            depth, above = f"{part}.embeddings", num_layers
        if name in trained:
            members, _ = result.setdefault(depth, ({}, decay**above))
            members[name] = trained[name]
    return result
