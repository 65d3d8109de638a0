"""Steps whose loss or gradients are not finite: skipped and reported; too many in a row are an error."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from torchfuse.errors import ConfigError
from torchfuse.params.storage import is_sharded

__all__ = ["NonFiniteSteps", "clip_gradients"]


def clip_gradients(parameters: Iterable[Tensor], max_norm: float | None) -> float:
    """Scale gradients down to a largest norm, and return their norm before.

    Args:
        parameters: with gradients or without, sharded or not.
        max_norm: the largest norm. None: gradients stay as they are.

    Examples:
        >>> p = torch.zeros(2, requires_grad=True)
        >>> p.grad = torch.tensor([3.0, 4.0])
        >>> clip_gradients([p], 1.0), round(float(p.grad.norm()), 4)
        (5.0, 1.0)
    """
    parameters = [p for p in parameters if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if max_norm is not None:
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return float(norm.full_tensor() if is_sharded(norm) else norm)


class NonFiniteSteps:
    """Count consecutive steps whose loss or gradients are not finite.

    Args:
        most: how many in a row are skipped; one more is an error.
    """

    def __init__(self, most: int) -> None:
        self.most, self.in_a_row = most, 0

    def check(self, step: int, loss: float, norm: float, optimizer: torch.optim.Optimizer) -> str | None:
        """Return None if a step can be taken, else the reason for skipping it.

        On a sharded model every rank calls this, with the same numbers.

        Args:
            step: the number of the step.
            loss: its loss.
            norm: the norm of its gradients.
            optimizer: whose groups are named.

        Raises:
            ConfigError: if too many steps in a row cannot be taken.
        """
        if math.isfinite(loss) and math.isfinite(norm):
            self.in_a_row = 0
            return None
        self.in_a_row += 1
        wrong = [
            group.get("name", str(index))
            for index, group in enumerate(optimizer.param_groups)
            if not math.isfinite(clip_gradients(group["params"], None))
        ]
        where = f"gradients of {', '.join(wrong)}" if wrong else "its loss"
        problem = f"step {step}: loss {loss}, {where} not finite"
        if self.in_a_row > self.most:
            raise ConfigError(
                f"{self.in_a_row} steps in a row cannot be taken; {problem}. They are not saved. Try a "
                "lower train.lr, more train.warmup_steps or a train.clip_grad_norm."
            )
        return problem
