"""Names and modules without torch's own wrappers around them."""

from __future__ import annotations

from typing import Final

from torch import nn

__all__ = ["canonical_name", "unwrap"]

# What torch's wrappers add to a name, one path component each.
_WRAPPER_COMPONENTS: Final = frozenset(
    {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}
)
_PARALLEL_WRAPPERS: Final = (nn.parallel.DistributedDataParallel, nn.DataParallel)


def canonical_name(name: str) -> str:
    """Return the name that a parameter or module has without torch's wrappers around it.

    Examples:
        >>> canonical_name("decoder.layers.0._checkpoint_wrapped_module.attn.q_proj.weight")
        'decoder.layers.0.attn.q_proj.weight'
    """
    return ".".join(part for part in name.split(".") if part not in _WRAPPER_COMPONENTS)


def unwrap(module: nn.Module) -> nn.Module:
    """Return the module inside ``torch.compile``, activation-checkpoint and data-parallel wrappers.

    Examples:
        >>> import torch
        >>> linear = nn.Linear(3, 5)
        >>> unwrap(torch.compile(linear)) is linear
        True
    """
    while True:
        if isinstance(module, _PARALLEL_WRAPPERS):
            module = module.module
            continue
        inner = next((module._modules[c] for c in _WRAPPER_COMPONENTS if c in module._modules), None)
        if inner is None:
            return module
        module = inner
