"""Dequantization of a model's weights, in place."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

from torchfuse.errors import ModelError
from torchfuse.naming import canonical_name, unwrap_model
from torchfuse.params import is_sharded, quantized_dtype

__all__ = ["dequantize", "plain_weight"]


@torch.no_grad()
def dequantize(model: nn.Module, *, dtypes: Collection[str] | None = None) -> list[str]:
    """Replace quantized weights of a model by plain ones of the same values, in place.

    What quantization rounded stays rounded. Names, modules and all else stay the same.

    Args:
        model: any module, not sharded.
        dtypes: which weights: those stored in these dtypes, see ``torchfuse.params.quantized_dtype``.
            None: all.

    Returns:
        The canonical names of the weights that were quantized.

    Raises:
        ModelError: if one of them is sharded. The model is unchanged then.

    Examples:
        >>> from torchfuse.quantization import quantize
        >>> layer = nn.Linear(17, 5).requires_grad_(False)
        >>> _ = quantize(layer, "int8_weight_only")
        >>> dequantize(layer), type(layer.weight.detach()).__name__
        (['weight'], 'Tensor')
    """
    found: dict[int, tuple[str, nn.Parameter]] = {}
    for name, parameter in unwrap_model(model).named_parameters():
        kind = quantized_dtype(parameter)
        if kind is not None and (dtypes is None or kind in dtypes):
            found[id(parameter)] = (canonical_name(name), parameter)
    sharded = [name for name, parameter in found.values() if is_sharded(parameter)]
    if sharded:
        raise ModelError(f"{sharded[0]} is sharded; nothing was dequantized.")
    with torch.inference_mode(False):
        plain = {
            key: nn.Parameter(plain_weight(parameter), requires_grad=False)
            for key, (_, parameter) in found.items()
        }
    for module in unwrap_model(model).modules():
        for name, present in module._parameters.items():
            if id(present) in plain:
                module._parameters[name] = plain[id(present)]
    return [name for name, _ in found.values()]


def plain_weight(weight: Tensor) -> Tensor:
    """Return the values of a weight as a plain tensor; a weight that is not quantized, as it is."""
    values = weight.detach()
    if quantized_dtype(weight) is None:
        return values
    if hasattr(values, "get_original_weight"):  # NF4
        return values.get_original_weight()
    return values.dequantize()
