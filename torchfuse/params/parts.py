"""The parts of a model: decoder, encoders, and what fusion added, each parameter in exactly one."""

from __future__ import annotations

from torch import nn

from torchfuse.naming import ModelWithParts, named_parameters, unwrap_model
from torchfuse.params.tagging import fusion_ids

__all__ = ["partition", "parts_of"]


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
        inside of pretrained parts too.

    Raises:
        ModelError: as ``parts_of``.
    """
    fusion = fusion_ids(model)
    parts = parts_of(model)
    owner = {
        id(p): part for part, module in parts.items() if part != "decoder" for p in module.parameters()
    }
    result: dict[str, dict[str, nn.Parameter]] = {part: {} for part in [*parts, "fusion"]}
    for name, parameter in named_parameters(model):
        part = "fusion" if id(parameter) in fusion else owner.get(id(parameter), "decoder")
        result[part][name] = parameter
    return result
