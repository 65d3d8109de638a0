"""The share of a device's peak that a training uses: model FLOPs utilization, MFU."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn

from torchfuse.errors import ConfigError
from torchfuse.models.strategy import features_per_image
from torchfuse.naming import find_model, unwrap
from torchfuse.training.estimation.gpus import gpu_named
from torchfuse.training.estimation.simulate import StepSettings, simulate_step

__all__ = ["Utilization", "operations_per_token", "utilization"]

_TEXT: Final = 64  # tokens of text of the longest simulated row


@dataclass(frozen=True)
class Utilization:
    """Computes the MFU of a step from the numbers of its tokens.

    Attributes:
        operations: of forward and backward pass for each token, by kind, see ``operations_per_token``.
        peak: operations a second that the device can do.

    Examples:
        >>> utilization = Utilization({"text": 6e9, "image": 2e9}, peak=1e12)
        >>> utilization.of({"text": 100, "image": 50}, seconds=2.0)
        0.35
    """

    operations: Mapping[str, float]
    peak: float

    def of(self, tokens: Mapping[str, int], seconds: float) -> float:
        """Return the MFU, between 0 and 1, of a step with these tokens that took this long."""
        operations = sum(number * self.operations.get(kind, 0.0) for kind, number in tokens.items())
        return operations / (seconds * self.peak)


def utilization(
    model: nn.Module,
    device: torch.device,
    *,
    trained: Collection[str],
    features_cached: bool = False,
) -> Utilization | None:
    """Return what computes the MFU of a training in bf16; None if the device's peak is not known.

    Args:
        model: a fused model that is neither sharded nor compiled, and whose layers are not checkpointed.
        device: where it is trained.
        trained: canonical names of the parameters that train.
        features_cached: whether features that were computed before replace the encoders.

    Raises:
        ConfigError: as ``operations_per_token``.
    """
    gpu = gpu_named(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if gpu is None:
        return None
    operations = operations_per_token(model, trained=trained, features_cached=features_cached)
    return Utilization(operations, gpu.flops)


def operations_per_token(
    model: nn.Module, *, trained: Collection[str] | None = None, features_cached: bool = False
) -> dict[str, float]:
    """Return the operations of forward and backward pass for a token of each kind.

    Steps of short rows are simulated, with two numbers of words, images and supervised tokens. So
    attention is counted at short distances, and nothing is computed twice in the backward pass.

    Args:
        model: see ``utilization``.
        trained: canonical names of the parameters that train; None: those with ``requires_grad``.
        features_cached: see ``utilization``.

    Returns:
        The kinds of ``StepMetrics.tokens``: ``"text"`` for a position of the decoder; ``"image"``, or
        the name of an encoder, for a feature, with the encoder's operations; ``"supervised"`` for the
        head and the loss of a position, beside ``"text"``.

    Raises:
        ConfigError: if the number of features of an image is unknown, or the decoder's sequence too
            short for two images and text.
    """
    owner: Any = unwrap(find_model(model))
    names = owner.encoder_names
    features = sum(features_per_image(owner, name) for name in names)
    in_sequence = owner.strategy.num_image_tokens(owner)
    text = min(_TEXT, owner.max_seq_len - 2 * in_sequence) // 2
    if text < 4:
        raise ConfigError(
            f"A sequence of {owner.max_seq_len} tokens has no space for text beside two images."
        )

    def operations(text: int, supervised: int, images: int) -> int:
        positions = images * in_sequence + text
        targets = positions - owner.strategy.extra_tokens(images * features) - 1
        settings = StepSettings(
            seq_len=positions,
            images=images,
            supervised=supervised / targets,
            trained=None if trained is None else frozenset(trained),
            optimizer={"_component_": "torch.optim.SGD"},
            features_cached=features_cached,
        )
        return simulate_step(model, settings).flops

    few, many = text // 4, text // 2
    base = operations(text, few, 1)
    of_text = (operations(2 * text, few, 1) - base) / text
    of_supervised = (operations(text, many, 1) - base) / (many - few)
    of_feature = (operations(text, few, 2) - base) / features
    unnamed = names == ["encoder"] and hasattr(owner, "encoder")
    kinds = ["image"] if unnamed else names
    return {"text": of_text, "supervised": of_supervised, **dict.fromkeys(kinds, of_feature)}
