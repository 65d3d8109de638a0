"""Losses that join the backward pass of a main loss, scaled as the main loss is.

``add_loss`` adds a loss in the backward pass, so that no training loop has to collect it. Its gradient
must be multiplied by what the loop multiplies its main loss by: the scale of a ``GradScaler``, a number
of tokens (torchtune), one divided by the number of micro-batches. The gradient that reaches a layer does
not contain that factor: a loss ``2 * f``, and a loss ``f`` that is multiplied by two, have the same
gradient. So the factor is taken where it is exact. ``mark_main_loss`` returns the main loss as it is;
the backward pass begins there, and the gradient of the main loss becomes the factor of all losses that
``add_loss`` adds in this pass.
"""

from __future__ import annotations

import math
from typing import Any, Final

import torch
from torch import Tensor

from torchfuse.errors import ModelError

__all__ = ["add_loss", "mark_main_loss"]

# The gradient of the main loss in the running backward pass, by device; NaN if no loss is marked.
_SCALES: Final[dict[torch.device, Tensor]] = {}


def mark_main_loss(loss: Tensor, count: Tensor | int = 1) -> Tensor:
    """Return a loss as it is; losses added by ``add_loss`` are scaled with it in its backward pass.

    Call it on the loss as it comes from the loss function, and multiply or divide afterwards: by the
    scale of a ``GradScaler``, a number of tokens, one divided by the number of micro-batches. Mark one
    loss for each backward pass; of several, the one that is reached last counts.

    Args:
        loss: the main loss, a scalar.
        count: how many tokens the loss is a sum over; 1 if it is a mean. Auxiliary losses are means, and
            are multiplied by this number too.

    Raises:
        ModelError: if the loss is not a scalar.

    Examples:
        >>> w = torch.tensor(3.0, requires_grad=True)
        >>> y = add_loss(torch.ones(2, requires_grad=True), w.square(), weight=0.5)
        >>> (1000 * mark_main_loss(y.mean())).backward()
        >>> w.grad
        tensor(3000.)
    """
    if loss.dim():
        raise ModelError(f"The main loss must be a scalar, got {list(loss.shape)}.")
    return _MarkMainLoss.apply(loss, torch.as_tensor(count, device=loss.device))


def add_loss(y: Tensor, loss: Tensor, weight: float = 1.0, scale: float = 1.0) -> Tensor:
    """Return ``y`` as it is; the backward pass through it also adds the gradient of a loss.

    Args:
        y: any tensor on the way to the main loss.
        loss: a scalar.
        weight: what the loss is multiplied by, relative to a marked main loss.
        scale: what it is multiplied by too if no main loss is marked.

    Examples:
        >>> w = torch.tensor(3.0, requires_grad=True)
        >>> add_loss(torch.ones(2, requires_grad=True), w.square(), weight=0.5).sum().backward()
        >>> w.grad
        tensor(3.)
    """
    return _AddLoss.apply(y, loss, weight, scale)


class _MarkMainLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, count: Tensor) -> Tensor:
        ctx.save_for_backward(count)
        return loss.clone()  # not a view, which training loops could not change in place

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        (count,) = ctx.saved_tensors
        return _set_scale(grads[0], count), None


class _AddLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, loss: Tensor, weight: float, scale: float) -> Tensor:
        ctx.weight, ctx.scale, ctx.dtype = weight, scale, loss.dtype
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor, None, None]:
        scale = _get_scale(grads[0], ctx.scale)
        return grads[0], (ctx.weight * scale).to(ctx.dtype), None, None


# In a compiled graph both are opaque calls that take a gradient, so that they run in the backward pass;
# all other gradients depend on what the first one returns, so that it runs before the second.
@torch.library.custom_op("torchfuse::set_main_loss_scale", mutates_args=())
def _set_scale(grad: Tensor, count: Tensor) -> Tensor:
    _scale_on(grad.device).copy_(grad * count)
    torch.autograd.Variable._execution_engine.queue_callback(_forget_scales)
    return grad.clone()


@torch.library.custom_op("torchfuse::main_loss_scale", mutates_args=())
def _get_scale(grad: Tensor, default: float) -> Tensor:
    scale = _scale_on(grad.device)
    return torch.where(scale.isnan(), default, scale)


@_set_scale.register_fake
def _(grad: Tensor, count: Tensor) -> Tensor:
    return torch.empty_like(grad)


@_get_scale.register_fake
def _(grad: Tensor, default: float) -> Tensor:
    return grad.new_empty((), dtype=torch.float32)


def _scale_on(device: torch.device) -> Tensor:
    if device not in _SCALES:
        _SCALES[device] = torch.full((), math.nan, device=device)
    return _SCALES[device]


def _forget_scales() -> None:
    for scale in _SCALES.values():
        scale.fill_(math.nan)
