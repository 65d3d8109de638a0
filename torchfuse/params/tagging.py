"""Which parameters were added to the pretrained ones.

A module names the parameters that fusion added, relative to itself, by a method ``fusion_params()``;
``register_fusion_module`` adds this method to any module. LoRA layers have torchtune's method for it,
``adapter_params()``. Both are fusion parameters: they are trained and saved, and are in no pretrained
checkpoint. Parameters are compared by identity and reported by canonical name, so that results are the
same before and after ``torch.compile``, activation checkpointing and sharding.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from torchfuse.errors import ModelError
from torchfuse.naming import ModelWithParts, canonical_name, named_parameters, unwrap, unwrap_model

__all__ = ["adapter_ids", "fusion_buffers", "fusion_ids", "get_fusion_params", "register_fusion_module"]


def register_fusion_module(module: nn.Module) -> None:
    """Mark every parameter of a module as added by fusion, by giving it ``fusion_params()``.

    The module can still be pickled, copied, compiled, checkpointed and sharded.

    Args:
        module: a layer or a whole model, for example a projection of encoder features.

    Examples:
        >>> projection = nn.Linear(3, 5)
        >>> register_fusion_module(projection)
        >>> sorted(get_fusion_params(nn.Sequential(nn.Linear(2, 3), projection)))
        ['1.bias', '1.weight']
    """
    # A partial over a module-level function pickles and copies with the module it belongs to.
    module.fusion_params = functools.partial(_all_parameter_names, module)  # type: ignore[assignment]


def _all_parameter_names(module: nn.Module) -> list[str]:
    return [canonical_name(name) for name, _ in module.named_parameters()]


def get_fusion_params(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that fusion added, by canonical name, in the order of ``named_parameters``.

    Args:
        model: any module with parts that have ``fusion_params()``, or LoRA layers.

    Raises:
        ModelError: if a ``fusion_params()`` names a parameter that its module does not have.
    """
    fusion = fusion_ids(model)
    return {name: p for name, p in named_parameters(model) if id(p) in fusion}


def fusion_ids(model: nn.Module) -> set[int]:
    """Return the ``id`` of every parameter that fusion added, those of LoRA layers included.

    Args:
        model: as for ``get_fusion_params``.

    Raises:
        ModelError: as ``get_fusion_params``.
    """
    return _named_ids(model, "fusion_params") | adapter_ids(model)


def adapter_ids(model: nn.Module) -> set[int]:
    """Return the ``id`` of every parameter of a LoRA layer, or another layer with ``adapter_params()``.

    Args:
        model: as for ``get_fusion_params``.

    Raises:
        ModelError: as ``get_fusion_params``.

    Examples:
        >>> from torchfuse import add_lora
        >>> model = nn.Sequential(nn.Linear(3, 5))
        >>> _ = add_lora(model, rank=2, alpha=4, targets=["0"])
        >>> [name for name, p in model.named_parameters() if id(p) in adapter_ids(model)]
        ['0.lora_a.weight', '0.lora_b.weight']
    """
    return _named_ids(model, "adapter_params")


def _named_ids(model: nn.Module, method: str) -> set[int]:
    """Return the ``id`` of every parameter that a module inside names by a method."""
    found: set[int] = set()
    for name, module in unwrap_model(model).named_modules():
        names = _own_method(module, method)
        if names is None:
            continue
        own = {canonical_name(n): p for n, p in unwrap(module).named_parameters()}
        named = [canonical_name(n) for n in names()]
        unknown = [n for n in named if n not in own]
        if unknown:
            raise ModelError(
                f"{method}() of {type(module).__name__} {canonical_name(name)!r} names "
                f"{', '.join(unknown)}, which it does not have; it has {', '.join(own) or 'none'}."
            )
        found.update(id(own[n]) for n in named)
    return found


def _own_method(module: nn.Module, name: str) -> Callable[[], list[str]] | None:
    """Return a method that a module has itself: wrappers forward attributes of what they wrap."""
    if isinstance(module, ModelWithParts):  # its methods collect what the modules inside name
        return None
    if name in vars(module):
        return vars(module)[name]
    return getattr(module, name) if callable(getattr(type(module), name, None)) else None


def fusion_buffers(model: nn.Module) -> dict[str, Any]:
    """Return persistent buffers of modules with only fusion parameters, by canonical name."""
    fusion = fusion_ids(model)
    model = unwrap_model(model)
    inside: set[int] = set()
    for module in model.modules():
        own = list(module.parameters())
        if own and all(id(p) in fusion for p in own):
            inside.update(id(m) for m in module.modules())
    return {
        canonical_name(f"{name}.{key}" if name else key): buffer
        for name, module in model.named_modules()
        if id(module) in inside
        for key, buffer in module.named_buffers(recurse=False)
        if key not in module._non_persistent_buffers_set
    }
