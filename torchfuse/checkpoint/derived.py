"""Fusion parameters that are initialized from pretrained values, and again when those are loaded.

These are new rows of embedding and head that are the mean of the pretrained rows, experts that are
copies of pretrained modules, and the magnitudes of DoRA layers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from torchfuse.lora.layers import is_lora, settings_of
from torchfuse.modules.fusion_embedding import FusionEmbedding
from torchfuse.modules.fusion_linear import FusionLinear

__all__ = ["reinitializers"]


def reinitializers(model: nn.Module, loaded: Iterable[Tensor]) -> list[Callable[[], None]]:
    """Return the calls that compute derived parameters again; parameters that have changed are kept.

    Args:
        model: a fused model, before loading.
        loaded: the tensors that are about to be loaded.
    """
    changing = {id(tensor) for tensor in loaded}
    found: list[Callable[[], None]] = []
    for module in model.modules():
        if not any(id(p) in changing for p in module.parameters()):
            continue
        layer: Any = module
        if isinstance(module, FusionEmbedding | FusionLinear):
            if not any(p.is_meta for p in module.parameters()) and layer.new_rows_are_means():
                found.append(functools.partial(layer.reset_new_rows, "mean"))
        elif callable(getattr(type(module), "experts_are_fresh", None)) and layer.experts_are_fresh():
            found.append(layer.reset_experts)
        elif is_lora(module) and settings_of(module).dora and not layer.lora_b.weight.any():
            found.append(layer.initialize_dora_magnitude)
    return found
