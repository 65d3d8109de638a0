"""The parts of a model: decoder, encoders, and what fusion added, each parameter in exactly one."""

from __future__ import annotations

from torch import nn

from torchfuse.naming import named_parameters, unwrap
from torchfuse.params.tagging import fusion_ids

__all__ = ["partition", "parts_of"]


def parts_of(model: nn.Module) -> dict[str, nn.Module]:
    """The pretrained parts of a model by name; a model that does not name any is all decoder."""
    inner = unwrap(model)
    parts = getattr(inner, "parts", None)
    return parts() if callable(parts) else {"decoder": inner}


def partition(model: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
    """Every parameter of a model in exactly one part.

    Returns:
        ``"decoder"``, ``"encoder"`` (or ``"encoder.<name>"`` for each named encoder) and
        ``"fusion"``, each with its parameters by canonical name. What fusion added is ``"fusion"``
        wherever it stands.
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
