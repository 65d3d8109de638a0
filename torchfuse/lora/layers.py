"""torchtune's LoRA and DoRA layers around pretrained linear layers.

The layer takes the place of an ``nn.Linear`` and has its parameter objects under their names, ``weight``
and ``bias``; beside them are ``lora_a.weight``, ``lora_b.weight`` and, in DoRA, ``magnitude``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchfuse.naming import canonical_name, unwrap_model
from torchfuse.quantization.dequantize_model import plain_weight

__all__ = [
    "LoraSettings",
    "build_layer",
    "has_zero_row",
    "is_lora",
    "linear_of",
    "lora_layers",
    "merged_bias",
    "merged_weight",
    "settings_of",
]


@dataclass(frozen=True)
class LoraSettings:
    """Numbers of a LoRA layer.

    Attributes:
        rank: rows of ``lora_a``.
        alpha: what the layer adds is multiplied by ``alpha / rank``.
        dropout: probability that a value of the input of ``lora_a`` is dropped in training.
        dora: whether the norm of each row of the weight is a parameter of its own (DoRA).
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    dora: bool = False


def build_layer(linear: nn.Linear, settings: LoraSettings) -> nn.Module:
    """Return a LoRA layer with the parameters and, at first, the outputs of a linear layer."""
    from torchtune.modules.peft import DoRALinear, LoRALinear

    kind = DoRALinear if settings.dora else LoRALinear
    out_dim, in_dim = linear.weight.shape
    with torch.device("meta"):  # its own weight is replaced
        layer: Any = kind(
            in_dim,
            out_dim,
            rank=settings.rank,
            alpha=settings.alpha,
            dropout=settings.dropout,
            use_bias=linear.bias is not None,
        )
    layer.to(linear.weight.dtype).to_empty(device=linear.weight.device)
    layer.weight, layer.bias = linear.weight, linear.bias
    layer.rank, layer.alpha = settings.rank, settings.alpha  # DoRALinear keeps their quotient alone
    layer.initialize_parameters()
    if settings.dora and not linear.weight.is_meta:
        layer.initialize_dora_magnitude()
    return layer.train(linear.training)


def has_zero_row(linear: nn.Linear) -> bool:
    """Return whether a row of the weight is zero; False on the meta device."""
    weight = linear.weight
    return not weight.is_meta and not bool(plain_weight(weight).any(dim=1).all())


def linear_of(layer: Any) -> nn.Linear:
    """Return a linear layer with the parameters of a LoRA layer that are not LoRA's."""
    with torch.device("meta"):
        linear = nn.Linear(layer.in_dim, layer.out_dim, bias=layer.bias is not None)
    linear.weight, linear.bias = layer.weight, layer.bias
    return linear.train(layer.training)


def is_lora(module: nn.Module) -> bool:
    """Return whether a module is one of torchtune's LoRA or DoRA layers."""
    peft: Any = sys.modules.get("torchtune.modules.peft")  # not imported: there are none
    return peft is not None and isinstance(module, peft.LoRALinear | peft.DoRALinear)


def lora_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Iterate over the LoRA layers of a model by canonical name."""
    for name, module in unwrap_model(model).named_modules():
        if is_lora(module):
            yield canonical_name(name), module


def settings_of(layer: Any) -> LoraSettings:
    """Return the numbers of a LoRA layer."""
    rank = layer.lora_a.out_features
    dora = hasattr(layer, "magnitude")
    alpha = getattr(layer, "alpha", None)  # a DoRA layer of torchtune's builders has none
    if alpha is None:
        alpha = layer.scaling * rank
    return LoraSettings(rank, alpha, float(getattr(layer.dropout, "p", 0.0)), dora)


@torch.no_grad()
def merged_weight(layer: Any, values: dict[str, Tensor]) -> Tensor:
    """Return the weight of the linear layer that a LoRA layer computes.

    Args:
        layer: the LoRA layer.
        values: its parameters by name, plain tensors.

    Returns:
        ``[out, in]`` in the dtype of the layer's weight, computed in fp32 or higher; not quantized.
    """
    exact = _exact_weight(layer, values)
    if "magnitude" in values:
        exact *= _row_scales(exact, values)[:, None]
    return exact.to(values["weight"].dtype)


@torch.no_grad()
def merged_bias(layer: Any, values: dict[str, Tensor]) -> Tensor:
    """Return the bias of the linear layer that a LoRA layer with a bias computes.

    torchtune's DoRA scales the bias as it scales the rows of the weight.

    Args:
        layer: as for ``merged_weight``.
        values: as for ``merged_weight``.
    """
    bias = values["bias"]
    if "magnitude" not in values:
        return bias
    scales = _row_scales(_exact_weight(layer, values), values)
    return (bias.to(scales.dtype) * scales).to(bias.dtype)


def _exact_weight(layer: Any, values: dict[str, Tensor]) -> Tensor:
    settings, weight = settings_of(layer), values["weight"]
    dtype = torch.promote_types(weight.dtype, torch.float32)
    base = plain_weight(weight).to(dtype, copy=True)
    a, b = values["lora_a.weight"].to(dtype), values["lora_b.weight"].to(dtype)
    return base.addmm_(b, a, alpha=settings.alpha / settings.rank)


def _row_scales(weight: Tensor, values: dict[str, Tensor]) -> Tensor:
    return values["magnitude"].to(weight.dtype) / torch.linalg.norm(weight, dim=1)
