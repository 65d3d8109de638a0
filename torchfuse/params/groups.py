"""Groups of parameters for an optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from torchfuse.errors import ConfigError
from torchfuse.params.freezing import FreezeSpec
from torchfuse.params.parts import partition
from torchfuse.params.schedule import FreezeSchedule
from torchfuse.params.stages import FreezeStage
from torchfuse.params.trainable import reshard

__all__ = ["param_groups"]


def param_groups(
    model: nn.Module,
    *,
    lr: float | Mapping[str, float],
    weight_decay: float | Mapping[str, float] = 0.0,
    stages: Iterable[FreezeSpec | FreezeStage] = (),
) -> list[dict[str, Any]]:
    """Return named, disjoint and complete optimizer groups of all parameters that train at any time.

    Args:
        model: a fused model.
        lr: one learning rate, or one for each trainable part by its name (``"decoder"``,
            ``"encoder"``, ``"encoder.<name>"``, ``"fusion"``).
        weight_decay: likewise; a part left out of a mapping has none.
        stages: freeze stages, or a ``FreezeSchedule``. Parameters that any of them trains are in the
            groups too; while frozen they have no gradient, and an optimizer skips them.

    Returns:
        ``{"name", "params", "param_names", "lr", "weight_decay"}`` for each part that trains.

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
    reshard(model)
    ever = set(FreezeSchedule(stages).trained_ever(model))
    trainable = {
        part: {name: p for name, p in parameters.items() if name in ever}
        for part, parameters in partition(model).items()
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
    return [
        {
            "name": part,
            "params": list(parameters.values()),
            "param_names": list(parameters),
            "lr": lr[part] if isinstance(lr, Mapping) else lr,
            "weight_decay": weight_decay.get(part, 0.0)
            if isinstance(weight_decay, Mapping)
            else weight_decay,
        }
        for part, parameters in trainable.items()
    ]
