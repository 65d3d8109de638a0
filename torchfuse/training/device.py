"""The device and dtype that a recipe runs with, checked before a model is built."""

from __future__ import annotations

import os
from typing import Any, Final

import torch

from torchfuse.errors import ConfigError

__all__ = ["device_and_dtype", "dtype_by_name"]

_DTYPES: Final = {"fp32": torch.float32, "bf16": torch.bfloat16}


def dtype_by_name(name: str, what: str = "dtype") -> torch.dtype:
    """Return the dtype of a name, ``"fp32"`` or ``"bf16"``.

    Raises:
        ConfigError: for another name; ``what`` is the key's.
    """
    if name not in _DTYPES:
        raise ConfigError(f"{what} must be one of {', '.join(_DTYPES)}, got {name!r}.")
    return _DTYPES[name]


def device_and_dtype(device: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    """Return the device and the dtype that a configuration names.

    Args:
        device: such as ``"cpu"``, ``"cuda"`` (each rank's own, under a launcher) or ``"cuda:1"``.
        dtype: ``"fp32"`` or ``"bf16"``. There is no ``"fp16"``: it overflows without a loss scaler.

    Raises:
        ConfigError: if there is no such device here or none for this rank, or no such dtype.

    Examples:
        >>> device_and_dtype("cpu", "bf16")
        (device(type='cpu'), torch.bfloat16)
    """
    from torchtune.utils import get_device

    precision = dtype_by_name(dtype)
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ConfigError(f"device {device!r} is not a device: {str(error).splitlines()[0]}.") from error
    if kind != "cpu":
        backend: Any = getattr(torch, kind, None)
        if backend is None or not backend.is_available():
            raise ConfigError(
                f"device {device!r} is not available on this machine; give another one, such as cpu."
            )
        rank, count = int(os.environ.get("LOCAL_RANK", "0")), backend.device_count()
        if rank >= count:
            raise ConfigError(
                f"device {device!r}: local rank {rank} has no device of its own, there are {count} on "
                f"this machine; launch with --nproc_per_node {count} at most."
            )
    try:
        return get_device(device), precision
    except RuntimeError as error:
        raise ConfigError(f"device {device!r} cannot be used: {error}") from error
