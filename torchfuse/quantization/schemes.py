"""The quantization schemes: one weight as a tensor of torchao, and whether that runs on a device.

Everything here works with torchao 0.15 to 0.18.
"""

from __future__ import annotations

from typing import Final, Literal

import torch
from torch import Tensor, nn

__all__ = ["NF4_MULTIPLE", "Scheme", "convert", "try_scheme", "unsupported_shape"]

Scheme = Literal["int8_weight_only", "int8_dynamic", "float8_weight_only", "nf4"]

_NF4_BLOCK: Final = 64  # values that share a scale
NF4_MULTIPLE: Final = _NF4_BLOCK * 256  # 256 blocks share the scale of their scales
_NF4_ZEROS: Final = 0x77  # a byte of two values whose code is that of zero
# torchao does not quantize layers that are not wider, or raises an error.
_WIDER_THAN: Final = {"int8_weight_only": 1, "float8_weight_only": 1, "int8_dynamic": 16, "nf4": 0}


def unsupported_shape(weight: Tensor, scheme: str) -> str | None:
    """Return why a scheme cannot quantize a weight ``[out, in]``, or None if it can."""
    shape = list(weight.shape)
    if scheme == "nf4" and weight.numel() % NF4_MULTIPLE:
        return f"{shape} is not a multiple of {NF4_MULTIPLE} values"
    if weight.shape[1] <= _WIDER_THAN[scheme]:
        return f"{shape} is not wider than {_WIDER_THAN[scheme]}"
    return None


def convert(weight: Tensor, scheme: str) -> Tensor:
    """Quantize a weight.

    Args:
        weight: ``[out, in]``, in any floating-point dtype.
        scheme: a ``Scheme``.

    Returns:
        A tensor of the same shape and dtype that is stored in fewer bits. Rows of zeros stay zero.
    """
    import torchao
    from torchao.quantization import (
        Float8Tensor,
        Int8DynamicActivationInt8WeightConfig,
        Int8Tensor,
        PerRow,
        quantize_,
    )

    if scheme == "nf4":
        return _to_nf4(weight)
    if scheme == "float8_weight_only":
        # Without a lower bound the scale of a row of zeros is zero, and its values are 0 / 0.
        smallest = torch.finfo(torch.float8_e4m3fn).max * torch.finfo(weight.dtype).tiny
        return Float8Tensor.from_hp(weight, granularity=PerRow(), hp_value_lb=smallest)
    if scheme == "int8_weight_only":
        # In float32, because torchao 0.15 keeps scales above the epsilon of the dtype: that of bf16 is
        # larger than the scales of most rows, and leaves them 4 bits.
        exact = Int8Tensor.from_hp(weight.float(), PerRow())
        return Int8Tensor(exact.qdata, exact.scale, exact.block_size, weight.dtype)
    # quantize_ sets an attribute on the module that cannot be pickled, hence a module for it alone.
    carrier = nn.Linear(1, 1, bias=False, device="meta")
    carrier.weight = nn.Parameter(weight, requires_grad=False)
    # Version 2 of torchao 0.15 rounds inputs in bf16 to multiples of 1/128; later, 1 is deprecated.
    version = 1 if torchao.__version__.startswith("0.15.") else 2
    # Settings of inductor belong to the process, not to a model.
    quantize_(carrier, Int8DynamicActivationInt8WeightConfig(version=version, set_inductor_config=False))
    return carrier.weight.detach()


def _to_nf4(weight: Tensor) -> Tensor:
    try:
        from torchao.quantization import to_nf4
    except ImportError:  # before torchao 0.18
        from torchao.dtypes.nf4tensor import to_nf4
    weight = weight.contiguous()
    quantized = to_nf4(weight)
    # torchao encodes the values of a block of zeros, 0 / 0, as -1, and the scale is not exactly zero.
    zeros = ~weight.view(-1, _NF4_BLOCK).any(dim=1)
    quantized.quantized_data.view(-1, _NF4_BLOCK // 2)[zeros] = _NF4_ZEROS
    return quantized


def try_scheme(scheme: str, device: torch.device, dtype: torch.dtype) -> bool | Exception:
    """Run a small quantized layer; return whether it has a gradient, or the error."""
    try:
        weight = torch.linspace(-1, 1, NF4_MULTIPLE, device=device, dtype=dtype).reshape(-1, 64)
        layer = nn.Linear(64, len(weight), device="meta")  # draws no random numbers
        layer.weight = nn.Parameter(convert(weight, scheme), requires_grad=False)
        layer.bias = nn.Parameter(weight[:, 0].clone(), requires_grad=False)
        with torch.enable_grad():
            x = weight[:3].clone().requires_grad_()
            total = layer(x).sum()
            if total.requires_grad:
                torch.autograd.grad(total, x)
        total.item()  # waits for the device, which reports errors late
    except Exception as error:  # an unsupported device or dtype raises whatever its library raises
        return error
    return total.requires_grad
