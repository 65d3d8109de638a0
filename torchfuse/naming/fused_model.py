"""The fused model inside a module, and its parameters by name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from torch import nn

from torchfuse.errors import ModelError
from torchfuse.naming.torch_wrappers import canonical_name, unwrap

__all__ = ["ModelWithParts", "find_model", "named_parameters", "unwrap_model"]

_MAX_LISTED: Final = 8


class ModelWithParts(nn.Module):
    """Base class of fused models, by which ``find_model`` recognises them."""

    def parts(self) -> dict[str, nn.Module]:
        """Return the pretrained parts: ``"decoder"``, and ``"encoder"`` or ``"encoder.<name>"``."""
        raise NotImplementedError


def find_model(model: nn.Module) -> nn.Module:
    """Return the one fused model inside a module, with torch's wrappers that are directly around it.

    Args:
        model: a fused model, or a module that contains one at any depth: a Lightning module, an
            ``AveragedModel``, a PEFT model, a ``VLMWrapper``. A module without a fused model inside (a
            decoder, for example) is returned as it is.

    Raises:
        ModelError: if there are several fused models inside, or parameters outside of the fused model.

    Examples:
        >>> from torchfuse import EarlyFusionModel
        >>> from torchtune.models.llama3_2 import llama3_2
        >>> decoder = llama3_2(
        ...     vocab_size=11, num_layers=2, num_heads=3, num_kv_heads=1, embed_dim=12, max_seq_len=17
        ... )
        >>> fused = EarlyFusionModel(decoder, nn.Linear(5, 12), 10)
        >>> find_model(nn.ModuleDict({"model": fused})) is fused, find_model(decoder) is decoder
        (True, True)
    """
    if isinstance(unwrap(model), ModelWithParts):
        return model
    found: dict[nn.Module, tuple[str, nn.Module]] = {}
    for name, module in model.named_modules():
        inner = unwrap(module)
        if isinstance(inner, ModelWithParts):
            found.setdefault(inner, (canonical_name(name), module))
    if not found:
        return model
    if len(found) > 1:
        listed = ", ".join(f"{name} ({type(fused).__name__})" for fused, (name, _) in found.items())
        raise ModelError(
            f"{type(unwrap(model)).__name__} contains {len(found)} fused models: {listed}. Pass the one "
            "that is meant."
        )
    [(fused, (path, outer))] = found.items()
    inside = {id(parameter) for parameter in fused.parameters()}
    outside = [canonical_name(n) for n, p in model.named_parameters() if id(p) not in inside]
    if outside:
        more = f" and {len(outside) - _MAX_LISTED} more" if len(outside) > _MAX_LISTED else ""
        raise ModelError(
            f"{type(unwrap(model)).__name__} has parameters outside of the fused model inside it "
            f"({path}): {', '.join(outside[:_MAX_LISTED])}{more}. Pass the fused model, and treat these "
            "separately."
        )
    return outer


def unwrap_model(model: nn.Module) -> nn.Module:
    """Return the one fused model inside a module, without any wrapper.

    Args:
        model: as for ``find_model``. A module without a fused model inside is returned without torch's
            wrappers.

    Raises:
        ModelError: as ``find_model``.
    """
    return unwrap(find_model(model))


def named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Iterate over the parameters of a model under their canonical names.

    Args:
        model: any module. Of one that contains a fused model, names are the fused model's.

    Raises:
        ModelError: as ``find_model``.

    Examples:
        >>> import torch
        >>> [name for name, _ in named_parameters(torch.compile(nn.Linear(3, 5)))]
        ['weight', 'bias']
    """
    for name, parameter in unwrap_model(model).named_parameters():
        yield canonical_name(name), parameter
