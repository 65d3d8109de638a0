"""What tensors hold their values in, quantized ones too."""

from __future__ import annotations

from typing import Any

from torch import Tensor

__all__ = ["dtype_name", "storage_nbytes", "quantized_dtype"]


def quantized_dtype(tensor: Any) -> str | None:
    """What a quantized tensor holds its values in: ``"int8"``, ``"float8_e4m3fn"``, ``"nf4"``.

    Args:
        tensor: any tensor or parameter.

    Returns:
        None if its values are held in its own dtype.
    """
    inner = tensor
    while hasattr(inner, "__tensor_flatten__"):
        if type(inner).__name__ == "NF4Tensor":
            return "nf4"  # two to a byte; what holds them says less
        held = [getattr(inner, name) for name in inner.__tensor_flatten__()[0]]
        inner = max((t for t in held if isinstance(t, Tensor)), key=lambda t: t.nbytes)
    return None if inner.dtype == tensor.dtype else dtype_name(inner)


def dtype_name(tensor: Any) -> str:
    """The dtype of a tensor as people write it: ``"bfloat16"``."""
    return str(tensor.dtype).removeprefix("torch.")


def storage_nbytes(tensor: Any) -> int:
    """The size of a tensor as it is held; of a quantized one that of what it is made of."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return int(tensor.nbytes)
    held = (getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
    return sum(storage_nbytes(inner) for inner in held if inner is not None)
