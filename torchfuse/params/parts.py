"""The parts of a model: decoder, encoders, what fusion added and LoRA, each parameter in exactly one."""

from __future__ import annotations

from typing import Final

from torch import nn

from torchfuse.naming import ModelWithParts, named_parameters, unwrap_model
from torchfuse.params.tagging import adapter_ids, fusion_ids

__all__ = ["LORA", "partition", "parts_of"]

LORA: Final = "lora"
"""The first component of the names of LoRA parts, such as ``"lora.decoder"``."""


def parts_of(model: nn.Module) -> dict[str, nn.Module]:
    """Return the pretrained parts of a model by name.

    Args:
        model: a fused model, or a module that contains one. Any other module is a ``"decoder"``.

    Raises:
        ModelError: if the module contains several fused models, or parameters beside its fused model.
    """
    inner = unwrap_model(model)
    return inner.parts() if isinstance(inner, ModelWithParts) else {"decoder": inner}


def partition(model: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
    """Return every parameter of a model in exactly one part.

    Args:
        model: as for ``parts_of``.

    Returns:
        ``"decoder"``, ``"encoder"`` (or ``"encoder.<name>"`` for each named encoder) and
        ``"fusion"``, each with its parameters by canonical name. What fusion added is in ``"fusion"``,
        inside of pretrained parts too. Parameters of LoRA layers are in parts of their own, where there
        are any: ``"lora.decoder"``, ``"lora.encoder"`` (or ``"lora.encoder.<name>"``) and
        ``"lora.fusion"``.

    Raises:
        ModelError: as ``parts_of``.
    """
    lora, parts = adapter_ids(model), parts_of(model)
    fusion = fusion_ids(model) - lora
    owner = {
        id(p): part for part, module in parts.items() if part != "decoder" for p in module.parameters()
    }
    inside_fusion = {
        id(p)
        for module in unwrap_model(model).modules()
        if any(id(p) in fusion for p in module.parameters(recurse=False))
        for p in module.parameters()
    }
    result: dict[str, dict[str, nn.Parameter]] = {part: {} for part in [*parts, "fusion"]}
    adapted: dict[str, dict[str, nn.Parameter]] = {f"{LORA}.{part}": {} for part in result}
    for name, parameter in named_parameters(model):
        key = id(parameter)
        if key in lora:
            part = "fusion" if key in inside_fusion else owner.get(key, "decoder")
            adapted[f"{LORA}.{part}"][name] = parameter
        else:
            part = "fusion" if key in fusion else owner.get(key, "decoder")
            result[part][name] = parameter
    return result | {part: parameters for part, parameters in adapted.items() if parameters}
