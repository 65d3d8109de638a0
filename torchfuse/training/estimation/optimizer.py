"""The states of an optimizer, on tensors without memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from torchfuse.components import resolve
from torchfuse.options import call_with_options
from torchfuse.training.estimation.tracker import MemoryTracker

__all__ = ["optimizer_states"]

# Quantized states of torchao's optimizers: bytes of a value, and how many values share a scale in fp32.
# Their compiled steps cannot run on fake tensors.
_QUANTIZED: Final = {"8bit": (1.0, 256), "4bit": (0.5, 128), "Fp8": (1.0, 256)}
_LEAST_VALUES: Final = 4096  # smaller parameters have states in their own dtype


def optimizer_states(
    parameters: Sequence[Tensor], component: Mapping[str, Any], tracker: MemoryTracker
) -> Callable[[], None]:
    """Make the states of an optimizer, counted as ``"optimizer"``; return a function that takes a step.

    Args:
        parameters: what trains.
        component: the optimizer and its keywords, as in a configuration.
        tracker: counts them.
    """
    options = {**component}
    path = options.pop("_component_", None)
    optimizer_class: Any = resolve(path, what="train.optimizer")
    name = optimizer_class.__name__
    if optimizer_class.__module__.startswith("torchao"):
        kept = [_quantized_state(p, name) for p in parameters for _ in range(2)]
        for state in kept:
            tracker.add(state, "optimizer")

        def nothing(states: list[Tensor] = kept) -> None:
            """Keep the states alive."""

        return nothing
    options.pop("fused", None)  # a kernel of the device
    optimizer: torch.optim.Optimizer = call_with_options(
        optimizer_class, parameters, what=f"train.optimizer ({path})", options=options
    )
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    for states in optimizer.state.values():
        for state in states.values():
            if isinstance(state, Tensor):
                tracker.add(state, "optimizer")

    def step() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return step


def _quantized_state(parameter: Tensor, name: str) -> Tensor:
    """Return as many bytes as one of the two states of a parameter takes."""
    if "Offload" in name:
        return torch.empty(0, dtype=torch.uint8)  # on the CPU
    size, block = next((v for kind, v in _QUANTIZED.items() if kind in name), (4.0, 0))
    if not block or parameter.numel() < _LEAST_VALUES or parameter.numel() % block:
        return torch.empty_like(parameter)
    nbytes = round(parameter.numel() * size) + 4 * parameter.numel() // block
    return torch.empty(nbytes, dtype=torch.uint8)
