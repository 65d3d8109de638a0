"""Training in bf16 with weights in fp32.

The update of a training step is often smaller than half the distance between neighbouring bf16 numbers:
then a weight in bf16 does not change. So what trains is kept in fp32, and with it gradients and the
optimizer's states, while matrices are multiplied in bf16 and frozen weights stay in bf16.
"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from torchfuse.errors import ModelError
from torchfuse.naming import named_parameters
from torchfuse.params import quantized_dtype

__all__ = ["computing_in", "keep_in_fp32"]


def keep_in_fp32(model: nn.Module, names: Collection[str]) -> None:
    """Convert parameters to fp32 in place; they remain the same objects.

    Call it before the model is sharded and its optimizer built. ``computing_in`` is needed from then on.

    Args:
        model: a fused model, or any module.
        names: names of parameters, as ``FreezeSchedule.trained_ever`` returns them.

    Raises:
        ModelError: if there is no such parameter, or one is quantized; nothing has changed then.

    Examples:
        >>> model = nn.Linear(3, 5).to(torch.bfloat16)
        >>> keep_in_fp32(model, ["bias"])
        >>> model.weight.dtype, model.bias.dtype
        (torch.bfloat16, torch.float32)
    """
    parameters = dict(named_parameters(model))
    problems = [f"{name} (no such parameter)" for name in names if name not in parameters]
    problems += [
        f"{name} (quantized)"
        for name in names
        if name in parameters and quantized_dtype(parameters[name])
    ]
    if problems:
        raise ModelError(f"These cannot be kept in fp32: {', '.join(problems)}.")
    for name in names:
        parameters[name].data = parameters[name].data.float()


def computing_in(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which matrices are multiplied in a dtype, whatever that of the weights.

    Args:
        dtype: ``torch.bfloat16``, or ``torch.float32`` for a context that does nothing.
        device: where the model is.

    Examples:
        >>> with computing_in(torch.bfloat16, torch.device("cpu")):
        ...     nn.Linear(3, 5)(torch.ones(1, 3)).dtype
        torch.bfloat16
    """
    if dtype is torch.float32:
        return nullcontext()
    return torch.autocast(device.type, dtype)
