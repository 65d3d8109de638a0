"""Estimate of the memory and the operations of a training, before any weight is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from omegaconf import OmegaConf
from torch import nn

from torchfuse.components import resolve
from torchfuse.errors import ConfigError
from torchfuse.params import partition
from torchfuse.training.config import override, read_config, typed
from torchfuse.training.estimation.result import Estimate
from torchfuse.training.estimation.settings import read_settings
from torchfuse.training.estimation.simulate import StepSettings, simulate_step
from torchfuse.training.parallel.layers import layers_of

__all__ = ["estimate"]

_SCHEMA: Final = "torchfuse.recipes.finetune_config.Config"  # recipes are above this layer


def estimate(
    model_or_config: nn.Module | Mapping[str, Any] | str | Path,
    settings: StepSettings | None = None,
    *,
    overrides: Sequence[str] = (),
    devices: int = 1,
    seq_len: int | None = None,
    images: int | None = None,
    supervised: float = 1.0,
) -> Estimate:
    """Estimate the memory and the operations of a training, without weights.

    A training step of the model's own code is simulated on tensors without memory. What the allocator of
    a device adds (fragmentation, its context: about 1 GiB on CUDA) is not included.

    Args:
        model_or_config: a fused model, best on the meta device; or a configuration of the finetune
            recipe, as a name, a file or its content. Its directories need not exist if they are named
            after published checkpoints whose sizes are known.
        settings: for a model: how it is trained. A configuration has its own.
        overrides: for a configuration: ``key=value``, as on a command line.
        devices: shards of weights, gradients and optimizer states, by FSDP2; each device has batches of
            its own.
        seq_len: for a configuration: positions of each row. None: ``data.max_seq_len``.
        images: for a configuration: images of each row. None: 1, or in packs as many as there is space
            for with 256 tokens of text each.
        supervised: for a configuration: share of the positions that are supervised.

    Raises:
        ConfigError: for a configuration that is wrong, or numbers out of range.
        CheckpointError: for a directory that is wrong.

    Examples:
        >>> result = estimate("digits/joint_decoder")
        >>> result.parameters["decoder"]
        (596096, 0)
        >>> result.memory["weights.decoder"] >= 4 * 596096
        True
        >>> result.on(8).peak < result.peak
        True
    """
    ranges = {"devices": devices, "seq_len": seq_len, "images": images}
    wrong = [f"{name}={n}" for name, n in ranges.items() if n is not None and n < (name != "images")]
    if not 0 < supervised <= 1:
        wrong.append(f"supervised={supervised}")
    if wrong:
        raise ConfigError(
            f"devices and seq_len must be at least 1, images at least 0, and supervised above 0 and at "
            f"most 1; got {', '.join(wrong)}."
        )
    if isinstance(model_or_config, nn.Module):
        model, settings = model_or_config, settings or StepSettings()
    else:
        config, where = _read(model_or_config, overrides)
        model, settings = read_settings(
            config, where, seq_len=seq_len, images=images, supervised=supervised
        )
    simulation = simulate_step(model, settings)
    layers = [_nbytes(layer) for layer in layers_of(model)]
    return Estimate(
        parameters=_parameters(model, settings),
        phases={name: dict(peak) for name, peak in simulation.phases.items()},
        gathered=2 * max(layers, default=0) + _nbytes(model) - sum(layers),
        flops_per_token=simulation.flops / (settings.batch_size * settings.seq_len),
        settings=settings,
        devices=devices,
    )


def _read(given: Any, overrides: Sequence[str]) -> tuple[dict[str, Any], str]:
    if isinstance(given, Mapping):
        config, where = OmegaConf.create(dict(given)), "the configuration"
    else:
        config, where = read_config(given, "estimate takes the YAML of a training"), str(given)
    schema: Any = resolve(_SCHEMA, what="the finetune recipe")
    return asdict(typed(override(config, overrides), schema)), where


def _parameters(model: nn.Module, settings: StepSettings) -> dict[str, tuple[int, int]]:
    trained = settings.trained
    return {
        part: (
            sum(p.numel() for p in parameters.values()),
            sum(
                p.numel()
                for name, p in parameters.items()
                if (p.requires_grad if trained is None else name in trained)
            ),
        )
        for part, parameters in partition(model).items()
        if parameters
    }


def _nbytes(module: nn.Module) -> int:
    return sum(p.nbytes for p in module.parameters())
