"""Training in less memory: activations on the CPU, an optimizer that steps in the backward pass."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["offload_activations", "step_in_backward"]


def offload_activations(model: nn.Module) -> None:
    """Keep the activations of a model in the CPU's memory until its backward pass.

    Args:
        model: a model on CUDA, as it is called: compiled, sharded or not. Elsewhere nothing changes.

    Examples:
        >>> model = nn.Linear(3, 5)
        >>> offload_activations(model)
        >>> model(torch.ones(1, 3)).sum().backward()
    """
    from torchtune.training import OffloadActivations

    if not next(model.parameters()).is_cuda:
        return
    context = OffloadActivations()
    model.register_forward_pre_hook(lambda *_: context.__enter__() and None)
    model.register_forward_hook(lambda *_: context.__exit__(None, None, None), always_call=True)


def step_in_backward(parameters: Iterable[Tensor], optimizer: torch.optim.Optimizer) -> None:
    """Update each parameter as soon as its gradient is complete, and free the gradient.

    So gradients of all parameters never exist at once. They cannot be clipped or accumulated.

    Args:
        parameters: what the optimizer trains.
        optimizer: its other methods stay as they are; do not call ``step``.

    Examples:
        >>> p = torch.ones(2, requires_grad=True)
        >>> step_in_backward([p], torch.optim.SGD([p], lr=0.5))
        >>> p.sum().backward()
        >>> p, p.grad
        (tensor([0.5000, 0.5000], requires_grad=True), None)
    """

    def step(parameter: Any) -> None:
        optimizer.step()  # of this parameter: no other has a gradient
        parameter.grad = None

    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(step)
