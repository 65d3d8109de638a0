"""Schedules of the learning rate: a linear rise, then one of several curves."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Final

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from torchfuse.errors import ConfigError

__all__ = ["lr_schedule"]

_CURVES: Final[dict[str, Callable[[float], float]]] = {
    "constant": lambda done: 1.0,
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
    "linear": lambda done: 1.0 - done,
}


def lr_schedule(
    kind: str, optimizer: Optimizer, warmup_steps: int, num_steps: int, *, steps_taken: int = 0
) -> LambdaLR:
    """Return a schedule that multiplies the learning rate of every group.

    The factor rises from 0 to 1 in the warm-up steps. Then it is 1 (``"constant"``), or falls to 0 at
    the last step, along half a cosine (``"cosine"``) or a line (``"linear"``).

    Args:
        kind: the name of the curve.
        optimizer: its groups have their highest learning rates.
        warmup_steps: steps of the rise.
        num_steps: steps of the whole run.
        steps_taken: steps that were taken already, by an optimizer whose state was loaded.

    Raises:
        ConfigError: if there is no such curve.

    Examples:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
        >>> schedule = lr_schedule("linear", optimizer, warmup_steps=1, num_steps=3)
        >>> rates = []
        >>> for _ in range(3):
        ...     rates += schedule.get_last_lr()
        ...     optimizer.step()
        ...     schedule.step()
        >>> rates
        [0.0, 0.5, 0.25]
    """
    if kind not in _CURVES:
        raise ConfigError(f"train.lr_schedule must be one of {', '.join(_CURVES)}, got {kind!r}.")
    factor = partial(_factor, _CURVES[kind], warmup_steps, num_steps)
    return LambdaLR(optimizer, factor, last_epoch=steps_taken - 1)


def _factor(curve: Callable[[float], float], warmup_steps: int, num_steps: int, step: int) -> float:
    if step < warmup_steps:
        return step / max(1, warmup_steps)
    done = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    return max(0.0, curve(min(done, 1.0)))
