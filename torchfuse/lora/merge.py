"""Merging of LoRA layers into the weights beside them, in a model and in an export."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from torchfuse.errors import ModelError
from torchfuse.lora.layers import linear_of, lora_layers, merged_bias, merged_weight
from torchfuse.lora.targets import Place, linear_places
from torchfuse.naming import canonical_name, unwrap_model
from torchfuse.params import is_sharded, quantized_dtype
from torchfuse.quantization import dequantize

__all__ = ["merge_lora", "merged_parameters"]


@torch.no_grad()
def merge_lora(model: nn.Module) -> list[str]:
    """Merge the LoRA layers of a model into its weights, in place, which leaves ``nn.Linear`` layers.

    Outputs stay the same, names are those from before ``add_lora``, and every format can be exported.
    NF4 weights, of other layers too, become plain ones. The merged weights are frozen.

    Args:
        model: a model with LoRA layers, not sharded.

    Returns:
        The canonical names of the layers that were merged.

    Raises:
        ModelError: if there is no LoRA layer, or one is sharded or on the meta device. The model is
            unchanged then.

    Examples:
        >>> from torchfuse.lora import add_lora
        >>> model = nn.Sequential(nn.Linear(5, 7))
        >>> add_lora(model, rank=2, alpha=4, targets=["0"])
        ['0']
        >>> merge_lora(model), list(model.state_dict())
        (['0'], ['0.weight', '0.bias'])
    """
    layers = dict(lora_layers(model))
    if not layers:
        raise ModelError("The model has no LoRA layers to merge.")
    for name, layer in layers.items():
        for parameter in layer.parameters():
            if is_sharded(parameter) or parameter.is_meta:
                where = "on the meta device" if parameter.is_meta else "sharded"
                raise ModelError(
                    f"{name} is {where}; nothing was merged. Build the model again, load what was "
                    "trained (load_trained), and merge that."
                )
    for place in linear_places(unwrap_model(model)):
        if place.name in layers:
            _merge(place)
    dequantize(model, dtypes=("nf4",))
    return list(layers)


def merged_parameters(
    model: nn.Module, gather: Callable[[Tensor], Tensor]
) -> dict[str, Callable[[], Tensor] | None]:
    """Return functions that compute the merged parameters of a model's LoRA layers.

    Args:
        model: a model, which is not changed.
        gather: returns the full values of a parameter that may be sharded.

    Returns:
        By canonical name, a function that returns the merged values; None for a parameter that is merged
        into others.
    """
    found: dict[str, Callable[[], Tensor] | None] = {}
    for name, layer in lora_layers(model):
        for key, _ in layer.named_parameters():
            merge = {"weight": merged_weight, "bias": merged_bias}.get(key)
            found[f"{name}.{canonical_name(key)}" if name else canonical_name(key)] = (
                None if merge is None else functools.partial(_merged, merge, layer, gather)
            )
    return found


def _merged(merge: Any, layer: Any, gather: Callable[[Tensor], Tensor]) -> Tensor:
    values = {canonical_name(n): gather(p.detach()) for n, p in layer.named_parameters()}
    merged: Tensor = merge(layer, values)
    return merged


def _merge(place: Place) -> None:
    layer = place.layer
    values: dict[str, Tensor] = {n: p.detach() for n, p in layer.named_parameters()}
    linear, weight = linear_of(layer), merged_weight(layer, values)
    if linear.bias is not None:
        linear.bias.copy_(merged_bias(layer, values))
    if quantized_dtype(linear.weight) is None:
        linear.weight.copy_(weight)
    else:
        linear.weight = nn.Parameter(weight, requires_grad=False)
    place.put(linear)
