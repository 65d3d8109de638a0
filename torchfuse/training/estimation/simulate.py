"""Simulation of a training step on fake tensors, whose sizes are counted.

The model's own code runs, and autograd saves for the backward pass what it saves in training. So no
formula of an architecture is needed, and activation checkpointing, LoRA or another attention kernel are
accounted for.
"""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from torchfuse.checkpoint.streaming import compute_buffers
from torchfuse.naming import find_model, named_parameters, unwrap
from torchfuse.params import partition
from torchfuse.training.estimation.batch import example_batch
from torchfuse.training.estimation.optimizer import optimizer_states
from torchfuse.training.estimation.tracker import MemoryTracker
from torchfuse.training.linear_loss import linear_next_token_loss
from torchfuse.training.parallel.layers import checkpoint_activations
from torchfuse.training.precision import computing_in

__all__ = ["Simulation", "StepSettings", "simulate_step"]

_CPU: Final = torch.device("cpu")
_LEAST_OFFLOADED: Final = 1024  # bytes, torchtune's


@dataclass(frozen=True)
class StepSettings:
    """What determines the memory of a training step, besides the model.

    Attributes:
        batch_size: rows of a batch.
        seq_len: positions of the decoder's sequence, with the features that are in it.
        images: images of each row, for each encoder.
        supervised: share of the positions that are supervised.
        gradient_accumulation_steps: batches of an optimizer step.
        dtype: in which matrices are multiplied.
        fp32_weights: whether what trains is kept in fp32 where ``dtype`` is another.
        trained: canonical names of the parameters that train; None: those with ``requires_grad``.
        optimizer: the component and its keywords, as in a configuration.
        features_cached: whether encoders are replaced by features that were computed before.
        activation_checkpointing: whether activations of layers are computed again in the backward pass.
        activation_offloading: whether activations are kept in the memory of the CPU.
        optimizer_in_backward: whether each parameter is updated as soon as its gradient is there.
        quantized: storage bytes of parameters that will be quantized, by canonical name.
    """

    batch_size: int = 1
    seq_len: int = 2048
    images: int = 1
    supervised: float = 1.0
    gradient_accumulation_steps: int = 1
    dtype: torch.dtype = torch.bfloat16
    fp32_weights: bool = True
    trained: frozenset[str] | None = None
    optimizer: Mapping[str, Any] = field(default_factory=lambda: {"_component_": "torch.optim.AdamW"})
    features_cached: bool = False
    activation_checkpointing: bool = False
    activation_offloading: bool = False
    optimizer_in_backward: bool = False
    quantized: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Simulation:
    """What a step needs.

    Attributes:
        phases: bytes by kind at the peak of ``"forward"``, ``"backward"`` and ``"optimizer"``.
        flops: operations of one batch, forward and backward.
    """

    phases: dict[str, Counter[str]]
    flops: int


def simulate_step(model: nn.Module, settings: StepSettings) -> Simulation:
    """Simulate a training step after the first one, when the optimizer has states.

    Args:
        model: a fused model, of which nothing but names and shapes is used; best on the meta device.
        settings: everything else that determines the step.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fused: Any = _copy_of_fakes(model, settings, mode)
    with mode:
        batch = example_batch(
            fused,
            rows=settings.batch_size,
            length=settings.seq_len,
            images=settings.images,
            features_cached=settings.features_cached,
        )
        rows = settings.batch_size * (batch["tokens"].shape[1] - 1)
        tracker = MemoryTracker(max(1, round(settings.supervised * rows)))
        with warnings.catch_warnings():  # of the model's own code; training shows them
            warnings.simplefilter("ignore")
            return _run(fused, batch, settings, tracker)


def _copy_of_fakes(model: nn.Module, settings: StepSettings, mode: FakeTensorMode) -> nn.Module:
    """Return a copy of a model whose parameters and buffers have no memory, as it is trained."""
    fakes: dict[int, Any] = {}
    with mode:
        for buffer in model.buffers():
            fakes[id(buffer)] = _fake(buffer, buffer.dtype)
        for name, parameter in named_parameters(model):
            trains = parameter.requires_grad if settings.trained is None else name in settings.trained
            keep = trains and settings.fp32_weights and parameter.is_floating_point()
            data = _fake(parameter, torch.float32 if keep else parameter.dtype)
            fakes[id(parameter)] = nn.Parameter(data, requires_grad=trains)
    # A deep copy takes what is in its memo instead of copying it.
    copied = copy.deepcopy(model, fakes)
    compute_buffers(copied, _CPU)
    copied.train()
    if settings.activation_checkpointing:
        checkpoint_activations(copied, [n for n, p in named_parameters(copied) if p.requires_grad])
    if settings.activation_offloading:
        _offload_activations(copied)
    return copied


def _fake(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype, device=_CPU)


def _offload_activations(model: nn.Module) -> None:
    """Keep of each activation but its shape, as ``offload_activations`` does on the device."""
    context = torch.autograd.graph.saved_tensors_hooks(_without_memory, _with_memory)
    model.register_forward_pre_hook(lambda *_: context.__enter__())
    model.register_forward_hook(lambda *_: context.__exit__(), always_call=True)


def _without_memory(saved: Tensor) -> Any:
    small = saved.nbytes < _LEAST_OFFLOADED
    kept = small or isinstance(saved, nn.Parameter | nn.Buffer)
    return saved if kept else (saved.shape, saved.stride(), saved.dtype)


def _with_memory(packed: Any) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    shape, stride, dtype = packed
    return torch.empty_strided(shape, stride, dtype=dtype, device=_CPU)


def _run(
    model: Any, batch: dict[str, Any], settings: StepSettings, tracker: MemoryTracker
) -> Simulation:
    """Run the phases of a step."""
    for part, parameters in partition(model).items():
        for name, parameter in parameters.items():
            tracker.add(parameter, f"weights.{part}", nbytes=settings.quantized.get(name))
            if parameter.requires_grad:
                _count_gradient(parameter, f"gradients.{part}", tracker)
    for buffer in model.buffers():
        tracker.add(buffer, "weights.buffers")
    trained = [p for p in model.parameters() if p.requires_grad]
    phases: dict[str, Counter[str]] = {}
    with tracker:
        step = optimizer_states(trained, settings.optimizer, tracker)
        if settings.optimizer_in_backward:
            _step_in_backward(trained, step)
        hooks = _count_by_module(model, tracker)
        flops = 0
        for _ in range(min(2, settings.gradient_accumulation_steps)):  # gradients exist in the second
            tracker.begin()
            with tracker.kind("loss"), computing_in(settings.dtype, _CPU):
                total, count = linear_next_token_loss(model, **batch, labels=batch["tokens"])
            _keep_larger(phases, "forward", tracker.peak)
            flops = tracker.flops
            tracker.begin()
            with tracker.kind("backward"):
                (total / count).backward()
            del total, count
            _keep_larger(phases, "backward", tracker.peak)
            flops += tracker.flops
        tracker.begin()
        with tracker.kind("optimizer.step"):
            step()
        _keep_larger(phases, "optimizer", tracker.peak)
        for hook in hooks:
            hook.remove()
    return Simulation(phases, flops)


def _keep_larger(phases: dict[str, Counter[str]], name: str, peak: Counter[str]) -> None:
    if peak.total() > phases.get(name, Counter()).total():
        phases[name] = Counter({kind: size for kind, size in peak.items() if size})


def _count_gradient(parameter: Tensor, kind: str, tracker: MemoryTracker) -> None:
    def count(owner: Tensor) -> None:
        assert owner.grad is not None
        tracker.add(owner.grad, kind)

    parameter.register_post_accumulate_grad_hook(count)


def _step_in_backward(parameters: list[Tensor], step: Callable[[], None]) -> None:
    def update(parameter: Tensor) -> None:
        step()
        parameter.grad = None

    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(update)


def _count_by_module(model: Any, tracker: MemoryTracker) -> list[Any]:
    """Count tensors that the forward pass of a part creates as that part's."""
    owner: Any = unwrap(find_model(model))
    kinds = {owner: "activations.decoder"}
    for name in owner.encoder_names:
        kinds[owner.get_encoder(name)] = "activations.encoder"
        if (adapter := owner.get_adapter(name)) is not None:
            kinds[adapter] = "features"
    hooks = []
    for module, kind in kinds.items():
        stack: list[AbstractContextManager[None]] = []

        def enter(_: Any, __: Any, kind: str = kind, stack: list[Any] = stack) -> None:
            stack.append(tracker.kind(kind))
            stack[-1].__enter__()

        def leave(_: Any, __: Any, ___: Any, stack: list[Any] = stack) -> None:
            stack.pop().__exit__(None, None, None)

        hooks.append(module.register_forward_pre_hook(enter))
        hooks.append(module.register_forward_hook(leave, always_call=True))
    return hooks
