"""How tensors are stored: quantized or not, sharded or not, in how many bytes."""

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
    """Return the dtype that a quantized tensor is stored in: ``"int8"``, ``"float8_e4m3fn"``, ``"nf4"``.

    Args:
        tensor: any tensor or parameter.

    Returns:
        None if it is stored in its own dtype.
    """
    inner = tensor
    while hasattr(inner, "__tensor_flatten__"):
        if type(inner).__name__ == "NF4Tensor":
            return "nf4"  # two values a byte; the dtype of the storage does not show it
        inner = max(_inner_tensors(inner), key=lambda t: t.numel())
    return None if inner.dtype == tensor.dtype else dtype_name(inner)


def dtype_name(tensor: Any) -> str:
    """Return the name of a tensor's dtype: ``"bfloat16"``."""
    return str(tensor.dtype).removeprefix("torch.")


def storage_nbytes(tensor: Any) -> int:
    """Return the size of a tensor in storage; of a quantized one, that of all tensors in it."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return int(tensor.nbytes)
    return sum(map(storage_nbytes, _inner_tensors(tensor)))


def _inner_tensors(tensor: Any) -> list[Tensor]:
    values = [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
    return [value for value in values if isinstance(value, Tensor)]
