"""How tensors hold their values: quantized, sharded, and in how many bytes."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, TypeGuard

from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

__all__ = ["dtype_name", "is_sharded", "quantized_dtype", "storage_nbytes"]


def is_sharded(tensor: Any) -> TypeGuard[DTensor]:
    """Return whether a tensor is a ``DTensor``, without importing that class, which takes over a second.

    Args:
        tensor: any object; only a process that has imported ``torch.distributed.tensor`` can hold one.
    """
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


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
            return "nf4"  # two values a byte; the dtype of the storage does not show it
        held = [getattr(inner, name) for name in inner.__tensor_flatten__()[0]]
        inner = max((t for t in held if isinstance(t, Tensor)), key=lambda t: t.numel())
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
